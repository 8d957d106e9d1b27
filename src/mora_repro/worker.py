"""One process of a run: python -m mora_repro.worker <run.json>, started by training/launch.py or by a launcher."""

from __future__ import annotations

import sys
from pathlib import Path

from .distributed import die_with_parent
from .spec.compose import interrupts_by_every_signal
from .spec.options import RunFile
from .start import as_one_of_many, show_warnings


def main() -> int:
    die_with_parent()
    interrupts_by_every_signal()
    show_warnings()
    job = RunFile.load(Path(sys.argv[1]))
    return as_one_of_many(job.spec, job.options, job.need_weights)


if __name__ == "__main__":
    sys.exit(main())
