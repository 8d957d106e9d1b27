"""Many runs at a time on one machine: the searches and runs of tables' cells, each a process of `train.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from omegaconf import DictConfig
from pydantic import PositiveInt, model_validator
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table as Grid

from .disk import write_atomically
from .errors import UserError
from .results.aggregate import by_kind
from .results.records import Store
from .results.search import Search, search, settled, table
from .signals import answered_by, interrupt
from .spec import INTERRUPTED, RunSpec, compose_config
from .spec.compose import ROOT
from .spec.run_spec import script_config
from .spec.table import FIRST_SEARCH_SEED, Cell, Selection

POLL_SECONDS = 0.5
ATTEMPTS = 2  # at a run that fails


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
    if sweep.launcher == "slurm":
        from .slurm.submit import main as on_slurm  # which imports this module

        return on_slurm(sweep)
    cells = sweep.all_cells()
    store = Store(sweep.out)
    if sweep.status:
        return show_status(cells, sweep, store)
    if sweep.scale == "paper" and not _gpus():
        raise UserError(
            f"scale=paper needs a CUDA GPU, and torch finds none. What runs here: "
            f"python scripts/sweep.py 'table=[{','.join(sweep.tables)}]' scale=mini"
        )
    status, tried = 0, set[str]()
    with store.explained():
        # A search's next try, and a cell's settings, follow from the records of the tries before.
        while jobs := [job for job in planned(cells, sweep, store) if job.spec.id not in tried]:
            tried |= {job.spec.id for job in jobs}
            status = max(status, run_jobs(jobs, store, sweep.workers))
            if status == INTERRUPTED:
                return status
        if sweep.search:
            write_searches(cells, store)
    return status


class Sweep(Selection):
    """conf/scripts/sweep.yaml, validated."""

    workers: PositiveInt | None
    status: bool
    out: str
    launcher: Literal["local", "slurm"] = "local"
    profile: str | None = None
    name: str | None = None
    dry_run: bool = False
    cancel: bool = False
    retry: bool = False

    @model_validator(mode="after")
    def _check(self) -> Sweep:
        if sum((self.status, self.dry_run, self.cancel, self.retry)) > 1:
            raise ValueError("one at a time of status, dry_run, cancel and retry")
        for key in ("profile", "name", "dry_run", "cancel", "retry"):
            if self.launcher == "local" and getattr(self, key):
                raise ValueError(f"{key} is of launcher=slurm: add launcher=slurm, or leave {key} out")
        return self


def planned(cells: Sequence[Cell], sweep: Sweep, store: Store) -> list[Job]:
    """All runs of the cells that are known so far: the tries of a search and, once it has ended, a run per seed."""
    near = by_kind(store.load_all()[0])
    jobs: dict[str, Job] = {}
    for cell in cells:
        records = near.get(cell.kind, [])
        if sweep.search and not (found := search(cell, records)).finished:
            made = [cell.tried(setting) for setting in found.tries]
        else:
            taken = settled(cell, records)
            made = [(taken.overrides(seed), taken.spec(seed)) for seed in range(sweep.seeds)]
        jobs |= {spec.id: Job(tuple(overrides), spec) for overrides, spec in made}
    return list(jobs.values())


def write_searches(cells: Sequence[Cell], store: Store) -> None:
    """Write all tries of the cells, a file per task and scale."""
    near = by_kind(store.load_all()[0])
    searches: dict[str, list[Search]] = {}
    for cell in cells:
        found = search(cell, near.get(cell.kind, []))
        searches.setdefault(f"{cell.task}-{cell.scale}", []).append(found)
    for name, some in searches.items():
        if any(found.records for found in some):
            path = store.out / "search" / f"{name}.csv"
            write_atomically(path, table(some).to_csv(index=False))
            print(f"all tries: {path}")


def show_status(cells: Sequence[Cell], sweep: Sweep, store: Store) -> int:
    """What is done, running, failed and left, until all is done or ctrl-C ends the watching."""
    console = Console()
    with answered_by(interrupt, signal.SIGINT, signal.SIGTERM), Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                jobs = planned(cells, sweep, store)
                states = {job.spec.id: _state(job, store) for job in jobs}
                live.update(_status(jobs, states, store), refresh=True)
                if not console.is_terminal or not any(state == "running" for state in states.values()):
                    return 0
                time.sleep(2)
        except KeyboardInterrupt:
            return 0


def _state(job: Job, store: Store) -> str:
    record = store.load(job.spec.id)
    if record and record.status in ("finished", "diverged"):
        return record.status
    if _is_locked(store, job):
        return "running"
    return record.status if record else "waiting"


def _status(jobs: Sequence[Job], states: dict[str, str], store: Store) -> Grid:
    """A line per task and state, those that run or failed by name, and the time left."""
    grid = Grid("task", "finished", "running", "waiting", "interrupted", "diverged", "failed", title="runs")
    by_task: dict[str, list[str]] = {}
    for job in jobs:
        by_task.setdefault(job.spec.task["name"], []).append(states[job.spec.id])
    for task, some in by_task.items():
        grid.add_row(task, *(str(some.count(str(column.header))) for column in grid.columns[1:]))
    running = [job for job in jobs if states[job.spec.id] == "running"]
    lines = [f"running: {title(job.spec)} {note(store, job)}" for job in running]
    lines += [f"failed: {title(job.spec)}" for job in jobs if states[job.spec.id] == "failed"]
    took = [r.cost.wall_s for job in jobs if (r := store.finished(job.spec.id)) and r.cost]
    left = sum(state in ("waiting", "interrupted", "running") for state in states.values())
    if took and left:
        minutes = left * sum(took) / len(took) / 60 / max(1, len(running))
        at_once = f"{len(running)} at a time" if running else "one at a time"
        lines.append(f"about {minutes:.0f} min left, {at_once}")
    grid.caption = "\n".join(lines)
    return grid


def note(store: Store, job: Job) -> str:
    steps, total, note = _tail(store.work(job.spec.id) / "metrics.jsonl") or (0, None, "starting")
    return f"{steps}/{total} {note}" if total else note


def _is_locked(store: Store, job: Job) -> bool:
    """Whether some process runs it now."""
    path = store.work(job.spec.id).with_suffix(".lock")
    if not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


def run_jobs(jobs: list[Job], store: Store, workers: int | None = None) -> int:
    """Run the jobs that have no result yet; the exit status as in `main`.

    Each run's output goes to `work/<id>/log.txt`. A run that fails is tried once more, then reported, and the rest goes
    on. What another sweep runs is left to it. On SIGINT or SIGTERM every run saves a checkpoint and ends, and the next
    call goes on from there.
    """
    waiting = [job for job in jobs if not has_result(store, job)]
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


def has_result(store: Store, job: Job) -> bool:
    """Whether it finished; that a try of a search diverged is a result too."""
    record = store.load(job.spec.id)
    if record is None:
        return False
    return record.status == "finished" or (record.status == "diverged" and job.spec.seed == FIRST_SEARCH_SEED)


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
        self.attempts: dict[str, int] = {}
        self.failed: list[Job] = []
        self.waiting: list[Job] = []
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
        # The first run of each base comes first, so that no worker waits while another trains the base of both.
        by_base = {job.spec.model.base_id: job for job in reversed(jobs)}
        first = [job for job in jobs if by_base[job.spec.model.base_id] is job]
        self.waiting = [*first, *(job for job in jobs if job not in first)]
        while self.waiting or self.running:
            for slot in sorted(set(range(workers)) - {running.slot for running in self.running.values()}):
                if (job := self._next()) is not None:
                    self._start(job, slot)
            time.sleep(POLL_SECONDS)
            self._look(len(jobs))

    def _next(self) -> Job | None:
        """The next job that no other sweep runs, or has run meanwhile; None where there is none now."""
        for job in list(self.waiting):
            if has_result(self.store, job):
                self.waiting.remove(job)
                self.done += 1
                self.console.print(f"done by another sweep: {title(job.spec)}", highlight=False, soft_wrap=True)
            elif not _is_locked(self.store, job):
                self.waiting.remove(job)
                return job
        return None

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
        cores = sorted(os.sched_getaffinity(0))
        if not gpus and job.spec.training.threads == 1 and slot < len(cores):
            os.sched_setaffinity(process.pid, {cores[slot]})
        line = self.progress.add_task(title(job.spec), total=None, note="starting")
        self.attempts[job.spec.id] = self.attempts.get(job.spec.id, 0) + 1
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
            record = self.store.load(run_id)
            if record is None or not has_result(self.store, job):
                log = self.store.work(run_id) / "log.txt"
                # A loss that diverged would do so again.
                again = self.attempts[run_id] < ATTEMPTS and not (record and record.status == "diverged")
                what = "failed, and is tried once more" if again else "failed"
                self.console.print(
                    f"{what}: {title(job.spec)}: {_last_line(log)} ({log})",
                    highlight=False,
                    soft_wrap=True,
                    style="red",
                )
                if again:
                    self.waiting.append(job)
                else:
                    self.failed.append(job)
                    self.done += 1
                continue
            self.done += 1
            if record.status == "diverged":
                self.console.print(f"diverged: {title(job.spec)}{self._left()}", highlight=False, soft_wrap=True)
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
    peft = spec.method.peft or {}
    operator = f" {peft['operator']}" if peft.get("operator") else ""
    scaled = f" alpha {peft['lora_alpha']:g}" if peft.get("lora_alpha") else ""
    return f"{spec.task['name']} {spec.name}{operator} seed {spec.seed} lr {spec.lr:g}{scaled}"


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
