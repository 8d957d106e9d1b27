"""What jobs call: `python -m mora_repro.slurm check <run.json> ...`, or `advance` or `status` and a manifest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError
from ..spec import INTERRUPTED
from .manifest import Manifest, alone_with_sweep
from .scripts import check
from .status import show
from .submit import advance


def _of_a_job(arguments: Sequence[str]) -> int:
    """`python -m mora_repro.slurm check <run.json> ...`, or `advance` or `status` and a manifest."""
    what, *files = arguments
    if what == "check":
        return check(files)
    folder = Path(files[0]).parent
    with alone_with_sweep(folder):
        does: Callable[[Manifest], int] = {"advance": advance, "status": show}[what]
        return does(Manifest.load(folder))


if __name__ == "__main__":
    try:
        sys.exit(_of_a_job(sys.argv[1:]))
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
