"""One process of a run: python -m mora_repro.worker <run.json>, started by training/launch.py."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent is gone, so that a kill leaves no worker (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ["MORA_PARENT"]):
            os._exit(1)  # it is gone already


def main() -> int:
    _end_with_parent()
    from .signals import interrupts_by_every_signal
    from .spec.options import RunFile
    from .start import as_one_of_many, show_warnings  # takes seconds

    interrupts_by_every_signal()
    show_warnings()
    job = RunFile.load(Path(sys.argv[1]))
    return as_one_of_many(job.spec, job.options, job.need_weights)


if __name__ == "__main__":
    sys.exit(main())
