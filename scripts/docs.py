"""The generated files of docs/, written anew: `python scripts/docs.py`, or `make docs`."""

import sys

from mora_repro.evaluation import docs
from mora_repro.results import schema

if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(f"error: scripts/docs.py takes no arguments, and got {' '.join(sys.argv[1:])}\n{__doc__}")
    docs.main()
    schema.main()
