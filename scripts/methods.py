"""All methods, and their trainable parameters on LLaMA-2 7B: `python scripts/methods.py`, or `make methods`."""

import sys

from mora_repro.methods.listing import main

if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(f"error: scripts/methods.py takes no arguments, and got {' '.join(sys.argv[1:])}\n{__doc__}")
    sys.exit(main())
