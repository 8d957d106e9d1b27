"""The manifest of a sweep: its runs with their whole specs, and the jobs that were submitted for them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from ..checkout import git
from ..disk import write_atomically
from ..errors import UserError
from ..results.records import Store
from ..spec import RunSpec
from ..spec.run_spec import Strict, problems
from ..spec.table import Cell
from ..sweep import Sweep
from .profile import Profile

VERSION: Literal[1] = 1


class Run(Strict):
    """One run of the sweep: its title, what composes it, and its whole spec."""

    title: str
    overrides: tuple[str, ...]
    spec: RunSpec


class Batch(Strict):
    """One job of Slurm's, an array where it trains.

    `elements` are the runs of each element, `id` is Slurm's number (None: it was not submitted), `round` counts what
    people submitted.
    """

    name: str
    stage: Literal["train", "choose", "report"]
    elements: tuple[tuple[str, ...], ...] = ()
    id: str | None = None
    round: int

    @property
    def runs(self) -> list[str]:
        return [run for element in self.elements for run in element]


class Manifest(Strict):
    """A sweep as it was submitted; `<out>/sweeps/<name>/manifest.json`. All paths are absolute."""

    version: Literal[1] = VERSION
    made_with: dict[str, str]
    name: str
    out: str
    folder: str  # where it was submitted
    python: str
    sweep: Sweep
    cells: tuple[Cell, ...]
    profile: Profile
    round: int = 0
    runs: dict[str, Run] = Field(default_factory=dict)
    batches: tuple[Batch, ...] = ()

    @property
    def path(self) -> Path:
        """The sweep's own folder."""
        return Path(self.out) / "sweeps" / self.name

    @property
    def key(self) -> str:
        """What the names of its jobs begin with; of two sweeps of one name in two folders each has its own."""
        return f"mora-{self.name}-{hashlib.sha256(str(self.path).encode()).hexdigest()[:6]}"

    def command(self, what: str) -> str:
        """How a person has something done with this sweep."""
        which = [f"name={self.name}", as_override("out", self.out)]
        return shlex.join(["python", "scripts/sweep.py", "launcher=slurm", *which, what])

    @property
    def hint(self) -> str:
        return f"how far it is: {self.command('status=true')}"

    def save(self) -> None:
        write_atomically(self.path / "manifest.json", self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Raises UserError: there is none, or one that this version can't read."""
        path = folder / "manifest.json"
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            there = sorted(each.parent.name for each in folder.parent.glob("*/manifest.json"))
            raise UserError(
                f"no sweep {folder.name} has been submitted from {folder.parent.parent}. "
                + (f"There are: {', '.join(there)} (name=<name>)" if there else "Submit one: leave status=true out")
            ) from None
        except ValueError as error:
            raise UserError(
                f"{path} is no manifest ({error}). Start the sweep under another name: name=<new>"
            ) from error
        if values.get("version") != VERSION:
            raise UserError(
                f"{path} was written by another version of this suite (its format is {values.get('version')}, this one "
                f"reads {VERSION}; made with {values.get('made_with')}). Finish it with that version, or start anew "
                f"under another name, which keeps the finished runs: name={folder.name}-2"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(
                f"{path} can't be read: {problems(error)}. Start anew under another name: name=<new>"
            ) from error


def as_override(key: str, value: str) -> str:
    """An override of Hydra's with any text as its value."""
    if re.fullmatch(r"[\w./-]+", value):
        return f"{key}={value}"
    return f"{key}='{value.replace(chr(92), chr(92) * 2).replace(chr(39), chr(92) + chr(39))}'"


def name_of(sweep: Sweep) -> str:
    """What is given, or what follows from the tables: 1-paper. Raises UserError for a name that no folder may have."""
    parts = [*sweep.tables, *([Path(sweep.cells).stem] if sweep.cells else [])]
    name = sweep.name or "-".join([*parts, sweep.scale] if parts else [])
    if not re.fullmatch(r"[\w.-]{1,60}", name) or name.startswith((".", "-")):
        raise UserError(
            f"name={name}: a sweep is named by letters, digits and .-_, 60 at most, such as name=table1; without "
            f"name= it is that of its tables, so give table= or cells="
        )
    return name


def manifest_of(sweep: Sweep, store: Store) -> Manifest:
    """The sweep's manifest, with the jobs of earlier submissions; not written yet."""
    if any(not character.isprintable() for character in str(store.out)):
        raise UserError(f"out={str(store.out)!r} has a line break or a control character. Name another folder")
    profile = Profile.load(sweep.profile)
    asked = sweep.model_copy(update={"dry_run": False})
    values = {
        "name": name_of(sweep),
        "out": str(store.out),
        "folder": os.getcwd(),
        "python": sys.executable,
        "sweep": asked,
        "cells": tuple(sweep.all_cells()),
        "profile": profile,
        "made_with": {"mora-repro": version("mora-repro"), "commit": git("rev-parse", "HEAD") or "unknown"},
    }
    folder = store.out / "sweeps" / str(values["name"])
    if (folder / "manifest.json").exists():
        return Manifest.load(folder).model_copy(update=values)
    return Manifest(**values)


@contextmanager
def alone_with_sweep(folder: Path) -> Iterator[None]:
    """Within: no other command changes the sweep."""
    with (folder / "manifest.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield
