"""What Slurm knows of a sweep's jobs: those that run or wait, and how others have ended."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import dataclass

from ..errors import UserError
from .manifest import Batch, Manifest


@dataclass(frozen=True)
class Element:
    """A job of the sweep, or an element of an array: Slurm's number and state, and where it runs or why it waits."""

    batch: Batch
    job: str
    index: int | None
    state: str
    note: str = ""

    @property
    def runs(self) -> tuple[str, ...]:
        return () if self.index is None else self.batch.elements[self.index]

    @property
    def is_running(self) -> bool:
        return self.state in ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STAGE_OUT")


def ask_slurm(*command: str) -> str:
    """What a command of Slurm's prints. Raises UserError with its words where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{shlex.join(command)}: {done.stderr.strip()}. Is Slurm up? scontrol ping")
    return done.stdout


def queue(manifest: Manifest) -> list[Element]:
    """What of the sweep is running or waiting, by the names of its jobs."""
    if not manifest.batches or shutil.which("squeue") is None:
        return []
    names = {f"{manifest.key}-{batch.name}": batch for batch in manifest.batches}
    found = []
    for line in ask_slurm("squeue", "--me", "-h", "-r", "-o", "%F|%K|%T|%j|%R").splitlines():
        job, index, state, name, note = line.split("|", 4)
        if name in names:
            found.append(Element(names[name], job, int(index) if index.isdigit() else None, state, note))
    return found


def ended(manifest: Manifest) -> list[Element]:
    """How the sweep's jobs have ended: from sacct or, without accounting, as far as the controller remembers."""
    ids = {batch.id: batch for batch in manifest.batches if batch.id}
    if not ids or shutil.which("scontrol") is None:
        return []
    words = ["sacct", "-n", "-P", "-X", "-j", ",".join(ids), "-o", "JobID,State"]
    done = subprocess.run(words, capture_output=True, text=True) if shutil.which("sacct") else None
    found = []
    if done and done.returncode == 0 and done.stdout.strip():
        for line in done.stdout.splitlines():
            name, state = line.split("|")
            job, _, index = name.partition("_")
            found += [Element(ids[job], job, each, state.split()[0]) for each in _indices(index)]
        return found
    for job in ids:
        said = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True).stdout
        for line in said.splitlines():
            keys = dict(word.split("=", 1) for word in line.split() if "=" in word)
            indices = _indices(keys.get("ArrayTaskId", ""))
            found += [Element(ids[job], job, each, keys["JobState"]) for each in indices]
    return found


def _indices(text: str) -> list[int | None]:
    """Of an array: '3', '[0-2,5%2]'; None for a job that is none."""
    indices: list[int | None] = []
    for part in filter(None, text.strip("[]").partition("%")[0].split(",")):
        first, _, last = part.partition("-")
        indices += range(int(first), int(last or first) + 1)
    return indices or [None]


def busy(manifest: Manifest) -> set[str]:
    """The runs that are running or waiting."""
    return {run for element in queue(manifest) for run in element.runs}
