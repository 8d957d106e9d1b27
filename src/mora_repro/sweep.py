"""Many runs at a time on one machine: the cells of a table, each a process of `train.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from omegaconf import DictConfig
from pydantic import Field, PositiveInt
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .errors import UserError
from .results.records import Store
from .results.search import tries, write_search
from .signals import answered_by, interrupt
from .spec import INTERRUPTED, RunSpec, compose_config
from .spec.compose import ROOT
from .spec.run_spec import Strict, script_config
from .spec.table import FIRST_SEARCH_SEED, load_table

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """One run to make: its overrides of conf/config.yaml, and the spec that they compose to."""

    overrides: tuple[str, ...]
    spec: RunSpec

    @classmethod
    def of(cls, overrides: list[str]) -> Job:
        return cls(tuple(overrides), RunSpec.from_config(compose_config(overrides)))


def main(config: DictConfig) -> int:
    """`python scripts/sweep.py`; the exit status: 0, 1 where a run failed, 130 when interrupted."""
    sweep = script_config(Sweep, config, "sweep")
    if sweep.scale == "paper" and not _gpus():
        names = ",".join(sweep.tables)
        raise UserError(
            f"scale=paper needs a CUDA GPU, and torch finds none. What runs here: "
            f"python scripts/sweep.py 'table=[{names}]' scale=mini"
        )
    cells = list(dict.fromkeys(cell for name in sweep.tables for cell in load_table(name).cells(sweep.scale)))
    store = Store(sweep.out)
    if sweep.search:
        overrides = [[*cell.overrides(sweep.search_seed), *extra] for cell in cells for extra in tries(cell)]
    else:
        overrides = [cell.overrides(seed) for cell in cells for seed in range(sweep.seeds)]
    jobs = list({job.spec.id: job for job in map(Job.of, overrides)}.values())
    with store.explained():
        status = run_jobs(jobs, store, sweep.workers)
        if sweep.search and all(_is_tried(store, job) for job in jobs):
            name = f"{'-'.join(sweep.tables)}-{sweep.scale}"
            write_search([job.spec for job in jobs], store, store.out / "search" / f"{name}.csv")
            return 0
    return status


class Sweep(Strict):
    """conf/scripts/sweep.yaml, validated. The seeds of tables and those of searches are kept apart."""

    table: str | int | tuple[str | int, ...]
    scale: str
    seeds: int = Field(ge=1, le=FIRST_SEARCH_SEED)
    search: bool
    search_seed: int = Field(ge=FIRST_SEARCH_SEED)
    workers: PositiveInt | None
    out: str

    @property
    def tables(self) -> list[str]:
        return [str(name) for name in (self.table if isinstance(self.table, tuple) else (self.table,))]


def _is_tried(store: Store, job: Job) -> bool:
    """Whether a try has a result; that it diverged is one."""
    record = store.load(job.spec.id)
    return record is not None and record.status in ("finished", "diverged")


def run_jobs(jobs: list[Job], store: Store, workers: int | None = None) -> int:
    """Run the jobs that have no finished record; the exit status as in `main`.

    Each run's output goes to `work/<id>/log.txt`. A run that fails is reported, and the rest goes on.
    On SIGINT or SIGTERM every run saves a checkpoint and ends, and the next call goes on from there.
    """
    waiting = [job for job in jobs if store.finished(job.spec.id) is None]
    console = Console(stderr=True)
    console.print(
        f"{len(jobs)} runs, {len(jobs) - len(waiting)} finished before; records: {store.out / 'runs'}, "
        f"logs: {store.out / 'work'}/<run>/log.txt",
        highlight=False,
        soft_wrap=True,
    )
    if not waiting:
        return 0
    pool = Pool(store, console, waiting)
    # Also where SIGINT was ignored, as in background jobs.
    with pool, answered_by(interrupt, signal.SIGINT, signal.SIGTERM):
        try:
            pool.work(waiting, workers or _default_workers())
        except KeyboardInterrupt:
            return INTERRUPTED
        finally:
            pool.stop()
    return 1 if pool.failed else 0


@dataclass(frozen=True)
class Running:
    """A job's process, its line on the screen, and its slot (the GPU it has to itself, where there are any)."""

    job: Job
    process: subprocess.Popen[bytes]
    line: TaskID
    slot: int


class Pool:
    """Worker processes and their progress on the terminal."""

    def __init__(self, store: Store, console: Console, jobs: list[Job]):
        self.store = store
        self.console = console
        self.running: dict[str, Running] = {}
        self.failed: list[Job] = []
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),  # narrow, so that all has place in 80 columns
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[note]}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.progress.start()
        # A base is trained once by the first run that needs it, and counts as one run more.
        bases = {job.spec.model.base_id for job in jobs if job.spec.model.base_id}
        self.bases = {base for base in bases if not self._has_weights(base)}
        self.total = len(jobs) + len(self.bases)
        self.done = 0
        self.overall = self.progress.add_task("all runs", total=self.total, note=f"0/{len(jobs)}")
        self.started = time.monotonic()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def work(self, jobs: list[Job], workers: int) -> None:
        waiting = list(jobs)
        while waiting or self.running:
            for slot in sorted(set(range(workers)) - {running.slot for running in self.running.values()}):
                if waiting:
                    self._start(waiting.pop(0), slot)
            time.sleep(POLL_SECONDS)
            self._look(len(jobs))

    def stop(self) -> None:
        """Ask every run that still runs to save and end, and wait for it."""
        for running in self.running.values():
            running.process.send_signal(signal.SIGTERM)
        for running in self.running.values():
            running.process.wait()

    def _start(self, job: Job, slot: int) -> None:
        work = self.store.work(job.spec.id)
        work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "train.py"), *job.overrides, f"out={self.store.out}"]
        environment = dict(os.environ)
        if gpus := _gpus():
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        with (work / "log.txt").open("ab") as log:
            # A session of its own: the terminal's ctrl-C reaches this process alone, which passes it on.
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        line = self.progress.add_task(title(job.spec), total=None, note="starting")
        self.running[job.spec.id] = Running(job, process, line, slot)

    def _look(self, jobs: int) -> None:
        """Update the progress of every running job, and take the ended ones out."""
        part = 0.0
        for run_id, running in list(self.running.items()):
            job = running.job
            steps, total, note = self._steps(job)
            self.progress.update(running.line, completed=steps, total=total, note=note)
            if running.process.poll() is None:
                part += steps / total if total else 0.0
                continue
            del self.running[run_id]
            self.progress.remove_task(running.line)
            self.done += 1
            record = self.store.finished(run_id)
            if record is None:
                self.failed.append(job)
                log = self.store.work(run_id) / "log.txt"
                self.console.print(
                    f"failed: {title(job.spec)}: {_last_line(log)} ({log})",
                    highlight=False,
                    soft_wrap=True,
                    style="red",
                )
                continue
            scores = ", ".join(f"{name} {value:.1f}" for name, value in record.metrics.items())
            self.console.print(f"done: {title(job.spec)}: {scores}{self._left()}", highlight=False, soft_wrap=True)
        part += sum(self._base_part(base) for base in self.bases)
        self.progress.update(self.overall, completed=self.done + part, note=f"{self.done}/{jobs}")

    def _left(self) -> str:
        """Where there is no bar: the time left, from the runs so far."""
        if self.console.is_terminal:
            return ""
        runs = self.total - len(self.bases)
        seconds = (time.monotonic() - self.started) / self.done * (runs - self.done)
        return f" ({self.done}/{runs}, about {seconds / 60:.1f} min left)"

    def _steps(self, job: Job) -> tuple[int, int | None, str]:
        """(steps done, all steps, a note) of a running job, from its metrics file or that of its base."""
        if found := _tail(self.store.work(job.spec.id) / "metrics.jsonl"):
            return found
        base = job.spec.model.base_id
        if base in self.bases and (part := self._base_part(base)) < 1:
            return 0, None, f"base {part:.0%}"
        return 0, None, "starting"

    def _has_weights(self, base: str) -> bool:
        """Whether a base needs no training; its record alone does not do."""
        return (self.store.work(base) / "model").exists()

    def _base_part(self, base: str) -> float:
        """How much of a base's training is done, from 0 to 1."""
        if self._has_weights(base):
            return 1.0
        steps, total, _ = _tail(self.store.work(base) / "metrics.jsonl") or (0, 1, "")
        return steps / (total or 1)


def title(spec: RunSpec) -> str:
    """A run's short name on the screen."""
    alpha = (spec.method.peft or {}).get("lora_alpha")
    scaled = "" if alpha is None else f" alpha {alpha:g}"
    return f"{spec.task['name']} {spec.name} seed {spec.seed} lr {spec.lr:g}{scaled}"


def _tail(path: Path) -> tuple[int, int | None, str] | None:
    """The last logged step, the number of steps, and the last loss of a metrics file; None before its first line."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, json.JSONDecodeError):
        return None
    if not lines:
        return None
    losses = [line for line in lines if "loss" in line] or [{"step": 0, "loss": float("nan")}]
    return losses[-1]["step"], lines[0]["steps"], f"loss {losses[-1]['loss']:.3f}"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


@cache
def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name for name in visible.split(",") if name] or [str(i) for i in range(torch.cuda.device_count())]


def _default_workers() -> int:
    return len(_gpus()) or len(os.sched_getaffinity(0))
