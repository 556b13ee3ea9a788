"""``make bench``: what the gateway does, measured from outside on one machine."""
