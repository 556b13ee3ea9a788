"""``python -m toppy.worker``: only the control plane starts it."""

from toppy.worker.main import main

main()
