"""Small sweeps on a test's cluster: submitted, waited for, and looked at."""

import subprocess
from pathlib import Path

import yaml
from processes import until
from tiny import TINY

from mora_repro.slurm.manifest import Manifest
from mora_repro.slurm.submit import main
from mora_repro.sweep import Sweep

PROFILE = {"minutes": 10, "memory_gb": 3}
OVERRIDES = [text for text in TINY if not text.startswith(("task=", "scale="))]


class Submitted:
    """A sweep of own cells with one seed, in a folder of its own."""

    def __init__(
        self, folder: Path, rows: list[dict], profile: dict | None = None, table: dict | None = None, **keys: object
    ):
        """`table` has further keys of the table of cells, `keys` are of the sweep."""
        folder.mkdir(parents=True, exist_ok=True)
        own = {"name": "own", "title": "own", "task": "uuid", "overrides": OVERRIDES}
        self.folder, self.keys = folder, keys
        (folder / "own.yaml").write_text(yaml.safe_dump({**own, **(table or {}), "rows": rows}))
        self.change_profile(profile or {})
        self.out = folder / "out"
        self.path = self.out / "sweeps" / "own-mini"

    def change_profile(self, profile: dict) -> None:
        (self.folder / "profile.yaml").write_text(yaml.safe_dump({**PROFILE, **profile}))

    def __call__(self, **keys: object) -> int:
        """`python scripts/sweep.py launcher=slurm` with these keys; its exit status."""
        every = {"table": None, "scale": "mini", "seeds": 1, "search": False, "workers": None, "status": False}
        here = {"cells": str(self.folder / "own.yaml"), "profile": str(self.folder / "profile.yaml")}
        return main(Sweep(**{**every, **here, "launcher": "slurm", "out": str(self.out), **self.keys, **keys}))

    @property
    def manifest(self) -> Manifest:
        return Manifest.load(self.path)

    def log(self, name: str) -> str:
        path = self.path / "logs" / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def run_of(self, *words: str) -> str:
        """The id of the run whose overrides have these words."""
        [found] = [id for id, run in self.manifest.runs.items() if set(words) <= set(run.overrides)]
        return found


def queued() -> list[str]:
    """What runs or waits: 12_0, 13."""
    return subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True).stdout.split()


def until_all_ended() -> None:
    until(lambda: not queued(), "jobs do not end")


def slurm(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
