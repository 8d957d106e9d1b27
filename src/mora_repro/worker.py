"""One process of a run: python -m mora_repro.worker <run.json>.

training/launch.py starts it, or torchrun or srun in a job of Slurm's. Of several files, which tasks of srun's run side
by side, each task takes its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from . import imported


def _end_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent is gone, so that a kill leaves no worker (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)  # it is gone already


def _own(files: list[str]) -> str:
    """The file of this task, which gets one of the job's GPUs."""
    if len(files) == 1:
        return files[0]
    task = int(os.environ["SLURM_PROCID"])
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(gpus) >= len(files):
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[task]
    return files[task]


def main() -> int:
    if parent := os.environ.get("MORA_PARENT"):
        _end_with_parent(int(parent))
    from .signals import interrupts_by_every_signal

    interrupts_by_every_signal()
    path = Path(_own(sys.argv[1:]))
    imported("mora_repro.start")  # takes seconds
    from .spec.options import RunFile
    from .start import as_launched, as_one_of_many, show_warnings

    show_warnings()
    job = RunFile.load(path)
    if parent:
        return as_one_of_many(job.spec, job.options, job.need_weights)
    return as_launched(job.spec, job.options)


if __name__ == "__main__":
    sys.exit(main())
