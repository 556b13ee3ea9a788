#!/bin/sh
# What gateway and client of docker/compose.yaml need, made once and kept in their volume.
set -eu
if [ ! -e /etc/toppy/client.toml ]; then
  toppy-gw init /etc/toppy --listen 0.0.0.0:4433 --health 0.0.0.0:8080 --name gateway
fi
if ! grep -q udp-echo /etc/toppy/client.toml; then
  cat >> /etc/toppy/client.toml <<'END'

[[policy.allow]]
host = "udp-echo"
ports = [9999]
END
fi
