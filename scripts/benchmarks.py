"""docs/benchmarks.md, written anew: `python scripts/benchmarks.py`, or `make docs`."""

import sys

from mora_repro.evaluation.docs import main

if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(f"error: scripts/benchmarks.py takes no arguments, and got {' '.join(sys.argv[1:])}\n{__doc__}")
    sys.exit(main())
