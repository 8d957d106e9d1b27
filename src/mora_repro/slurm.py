"""A sweep on a Slurm cluster: `python scripts/sweep.py table=1 scale=paper launcher=slurm profile=<name>`.

What is submitted stands in `<out>/sweeps/<name>/`: manifest.json, the scripts of its jobs and their logs. Arrays train,
grouped by what their runs take; after them comes a job that writes the report or, where rates are searched, one that
chooses from the records, submits what follows, and a next one of its kind. Nothing waits on the login node.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from .disk import write_atomically
from .errors import UserError, did_you_mean
from .results.aggregate import by_kind
from .results.records import Store
from .results.search import search
from .spec import INTERRUPTED, RunSpec, compose_config
from .spec.compose import CONF, ROOT
from .spec.options import Options, RunFile
from .spec.run_spec import Strict, describe
from .spec.secrets import refuse_secrets
from .spec.table import Cell
from .sweep import Job, Sweep, has_result, note, planned, title, write_searches

VERSION: Literal[1] = 1  # of the manifest
LAUNCHER = CONF / "launcher"
INSTALL = "apt-get install slurm-client"


class Shape(Strict):
    """What an element of an array takes: nodes, processes on each, minutes, and runs side by side."""

    nodes: PositiveInt = 1
    processes: PositiveInt | None = None
    minutes: PositiveInt
    packed: PositiveInt = 1

    @property
    def total(self) -> int:
        return self.nodes * (self.processes or 1)


class Profile(Shape):
    """A cluster, as conf/launcher/slurm.yaml explains each key."""

    partition: str | None
    account: str | None
    qos: str | None
    small_partition: str | None
    sbatch: tuple[str, ...]
    gpus_per_node: NonNegativeInt
    gpu_type: str | None
    cpus_per_process: PositiveInt
    memory_gb: PositiveFloat | None
    tasks: dict[str, dict[str, PositiveInt]]
    at_once: PositiveInt | None
    array_size: PositiveInt
    signal_seconds: PositiveInt
    requeues: NonNegativeInt
    modules: tuple[str, ...]
    setup: tuple[str, ...]
    python: str | None
    container: tuple[str, ...]
    env: dict[str, str]
    interface: str | None
    scratch: str | None
    offline: bool

    @field_validator("*", mode="after")
    @classmethod
    def _one_line_each(cls, value: Any) -> Any:
        """A line break would end a line of the script; the next would be a command."""
        if any(not character.isprintable() for text in _texts(value) for character in text):
            raise ValueError("has a line break or a control character")
        return value

    @field_validator("env")
    @classmethod
    def _variables(cls, env: dict[str, str]) -> dict[str, str]:
        if wrong := [name for name in env if not re.fullmatch(r"[A-Za-z_]\w*", name)]:
            raise ValueError(f"{wrong[0]!r} is no name of a variable")
        return env

    @model_validator(mode="after")
    def _check(self) -> Profile:
        shapes = [(f"tasks.{name}.", self.of_task(name)) for name in self.tasks]
        for where, shape in [("", Shape(**{key: getattr(self, key) for key in Shape.model_fields})), *shapes]:
            if shape.minutes * 60 <= self.signal_seconds + 60:
                raise ValueError(
                    f"{where}minutes={shape.minutes} is too short for a checkpoint: runs are told to save "
                    f"signal_seconds={self.signal_seconds} before the end, and need a minute to start. Say "
                    f"minutes: {self.signal_seconds // 60 + 3} or more"
                )
            if self.gpus_per_node and max(shape.packed, shape.processes or 1) > self.gpus_per_node:
                raise ValueError(
                    f"{where}processes={shape.processes} or {where}packed={shape.packed} is more than "
                    f"gpus_per_node={self.gpus_per_node}: each process and each packed run has a GPU of its own"
                )
        return self

    def of_task(self, task: str) -> Shape:
        """What a run of a task takes, as the profile says."""
        keys = {key: getattr(self, key) for key in Shape.model_fields}
        return Shape.model_validate({**keys, **self.tasks.get(task, {})})

    @classmethod
    def load(cls, name: str | None) -> Profile:
        """A profile by name or file; None: the defaults. Raises UserError: no such one, unknown keys, wrong values."""
        values = yaml.safe_load((LAUNCHER / "slurm.yaml").read_text())
        if name is not None:
            values |= _read_profile(name)
        known = cls.model_fields
        if unknown := [str(key) for key in values if key not in known]:
            raise UserError(
                f"profile={name} has the unknown key {unknown[0]!r}.{did_you_mean(unknown[0], known)} All keys, with "
                f"what they mean: {LAUNCHER / 'slurm.yaml'}"
            )
        for index, line in enumerate(_texts(values), 1):
            try:
                refuse_secrets([line])
            except UserError as error:
                raise UserError(f"profile={name}, value {index}: {error}") from None
        refuse_secrets([f"{key}={value}" for key, value in values["env"].items()])
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = describe(error).partition(". See it whole")[0]
            raise UserError(f"profile={name}: {problems}. What the keys mean: {LAUNCHER / 'slurm.yaml'}") from error


def _read_profile(name: str) -> dict[str, Any]:
    known = sorted(path.stem for path in (LAUNCHER / "profile").glob("*.yaml"))
    path = LAUNCHER / "profile" / f"{name}.yaml" if name in known else Path(name)
    if path.suffix != ".yaml" or not path.exists():
        raise UserError(
            f"profile={name} is none of {', '.join(known)} and no .yaml file that is here.{did_you_mean(name, known)} "
            f"Make one: cp {LAUNCHER / 'profile' / known[0]}.yaml mycluster.yaml, and profile=mycluster.yaml"
        )
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"profile={name} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"profile={name} has no keys. What there is: {LAUNCHER / 'slurm.yaml'}")
    return values


def shape_of(spec: RunSpec, profile: Profile) -> Shape:
    """What a run takes on a cluster.

    Raises UserError: processes that do not fill their nodes, or can't share the batch.
    """
    from .training import batch_shape  # takes seconds

    shape = profile.of_task(spec.task["name"])
    per_node = shape.processes or profile.gpus_per_node or 1
    wanted = spec.trainer.processes
    if wanted is None:
        shape = shape.model_copy(update={"processes": per_node})
    elif wanted <= per_node:
        shape = shape.model_copy(update={"nodes": 1, "processes": wanted})
    elif wanted % per_node == 0:
        shape = shape.model_copy(update={"nodes": wanted // per_node, "processes": per_node})
    else:
        raise UserError(
            f"trainer.processes={wanted} does not fill nodes of {per_node} processes. Take a multiple, such as "
            f"trainer.processes={wanted // per_node * per_node}, or trainer.processes=null for those of the profile"
        )
    batch_shape(spec.training, shape.total)
    return shape if shape.total == 1 and not spec.trainer.stage else shape.model_copy(update={"packed": 1})


# ---------------------------------------------------------------------------------------------------
# The manifest


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
        words = ["python", "scripts/sweep.py", "launcher=slurm", f"name={self.name}", _override("out", self.out), what]
        return shlex.join(words)

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
            problems = describe(error).partition(". See it whole")[0]
            raise UserError(f"{path} can't be read: {problems}. Start anew under another name: name=<new>") from error


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested values, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.items():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _override(key: str, value: str) -> str:
    """An override of Hydra's with any text as its value."""
    if re.fullmatch(r"[\w./-]+", value):
        return f"{key}={value}"
    return f"{key}='{value.replace(chr(92), chr(92) * 2).replace(chr(39), chr(92) + chr(39))}'"


def _name(sweep: Sweep) -> str:
    """What is given, or what follows from the tables: 1-paper. Raises UserError for a name that no folder may have."""
    parts = [*sweep.tables, *([Path(sweep.cells).stem] if sweep.cells else [])]
    name = sweep.name or "-".join([*parts, sweep.scale] if parts else [])
    if not re.fullmatch(r"[\w.-]{1,60}", name) or name.startswith((".", "-")):
        raise UserError(
            f"name={name}: a sweep is named by letters, digits and .-_, 60 at most, such as name=table1; without "
            f"name= it is that of its tables, so give table= or cells="
        )
    return name


def _manifest(sweep: Sweep, store: Store) -> Manifest:
    """The sweep's manifest, with the jobs of earlier submissions; not written yet."""
    if any(not character.isprintable() for character in str(store.out)):
        raise UserError(f"out={str(store.out)!r} has a line break or a control character. Name another folder")
    profile = Profile.load(sweep.profile)
    asked = sweep.model_copy(update={"dry_run": False})
    values = {
        "name": _name(sweep),
        "out": str(store.out),
        "folder": os.getcwd(),
        "python": sys.executable,
        "sweep": asked,
        "cells": tuple(sweep.all_cells()),
        "profile": profile,
        "made_with": {"mora-repro": version("mora-repro"), "commit": _commit()},
    }
    folder = store.out / "sweeps" / str(values["name"])
    if (folder / "manifest.json").exists():
        return Manifest.load(folder).model_copy(update=values)
    return Manifest(**values)


def _commit() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


# ---------------------------------------------------------------------------------------------------
# Commands


def main(sweep: Sweep) -> int:
    """What `scripts/sweep.py launcher=slurm` does; the exit status.

    Raises UserError: no Slurm here, a profile or manifest that can't be read, or what sbatch refuses.
    """
    store = Store(Path(sweep.out).absolute() if sweep.out else "")
    with store.explained():
        if sweep.status or sweep.cancel or sweep.retry:
            manifest = Manifest.load(store.out / "sweeps" / _name(sweep))
            if sweep.status:
                return show(manifest)
            _refuse_no_slurm()
            with _alone(manifest.path):
                manifest = Manifest.load(manifest.path)
                if sweep.cancel:
                    return cancel(manifest)
                if sweep.profile:
                    profile = Profile.load(sweep.profile)
                    manifest = manifest.model_copy(update={"profile": profile})
                return submit(manifest)
        if sweep.dry_run:
            return dry_run(_manifest(sweep, store))
        _refuse_no_slurm()
        folder = store.out / "sweeps" / _name(sweep)
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            return submit(_manifest(sweep, store))


def _refuse_no_slurm() -> None:
    if shutil.which("sbatch") is None:
        raise UserError(
            "launcher=slurm submits with sbatch, and there is none on this machine. Log in to the cluster's login "
            f"node, or install it (on Debian or Ubuntu: {INSTALL}). What works here: dry_run=true, which prints the "
            "scripts, and launcher=local"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within: no other command changes the sweep."""
    with (folder / "manifest.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def submit(manifest: Manifest) -> int:
    """A person's submission: what has no result and neither runs nor waits."""
    manifest = manifest.model_copy(update={"round": manifest.round + 1})
    manifest, new = _with_new(manifest)
    if not new:
        busy = len(_busy(manifest))
        print(f"nothing to submit: {busy} runs are running or queued, all others have a result. {_hints(manifest)}")
        return 0
    _refuse_missing(manifest, new)
    _submit_all(manifest, new)
    print(_hints(manifest))
    return 0


def advance(manifest: Manifest) -> int:
    """What the job that chooses does: submit what follows from the records."""
    manifest, new = _with_new(manifest)
    _submit_all(manifest, new)
    return 0


def _hints(manifest: Manifest) -> str:
    return f"how far it is: {manifest.command('status=true')}"


def _with_new(manifest: Manifest) -> tuple[Manifest, list[Batch]]:
    """The manifest with the runs and arrays that are to be submitted now, and these arrays.

    What failed in this round is not tried again: the records of a search would ask for it for ever.
    """
    store = Store(manifest.out)
    tried = {run for batch in manifest.batches if batch.round == manifest.round for run in _runs(batch)}
    done = tried | _busy(manifest)
    jobs = [job for job in planned(manifest.cells, manifest.sweep, store) if not has_result(store, job)]
    jobs = [job for job in jobs if job.spec.id not in done]
    runs = {job.spec.id: Run(title=title(job.spec), overrides=job.overrides, spec=job.spec) for job in jobs}
    groups: dict[tuple[Shape, bool], list[str]] = {}
    for job in jobs:
        key = shape_of(job.spec, manifest.profile), job.spec.trainer.stage > 0
        groups.setdefault(key, []).append(job.spec.id)
    number = sum(batch.stage == "train" for batch in manifest.batches)
    new = []
    for (shape, _), ids in groups.items():
        elements = [tuple(ids[start : start + shape.packed]) for start in range(0, len(ids), shape.packed)]
        for start in range(0, len(elements), manifest.profile.array_size):
            number += 1
            part = tuple(elements[start : start + manifest.profile.array_size])
            new.append(Batch(name=f"train-{number}", stage="train", elements=part, round=manifest.round))
    return manifest.model_copy(update={"runs": manifest.runs | runs}), new


def _runs(batch: Batch) -> list[str]:
    return [run for element in batch.elements for run in element]


def _submit_all(manifest: Manifest, new: list[Batch]) -> None:
    """Submit arrays, and what comes after them and those that still run."""
    live = {element.job for element in queue(manifest)}
    for batch in new:
        manifest = _submitted(manifest, batch, after=())
    for batch in manifest.batches:
        if batch.stage != "train" and batch.id in live and batch.id != os.environ.get("SLURM_JOB_ID"):
            _slurm("scancel", str(batch.id))  # another one comes after all
    stage: Literal["choose", "report"] = "choose" if new and _is_searching(manifest) else "report"
    number = 1 + sum(batch.stage == stage for batch in manifest.batches)
    last = Batch(name=f"{stage}-{number}", stage=stage, round=manifest.round)
    trained = {batch.id for batch in manifest.batches if batch.stage == "train"}
    after = [batch.id for batch in manifest.batches if batch.id and batch.id in trained & (live | _ids(manifest, new))]
    if stage == "report" and manifest.sweep.search:
        write_searches(manifest.cells, Store(manifest.out))
    _submitted(manifest, last, after)


def _ids(manifest: Manifest, batches: list[Batch]) -> set[str | None]:
    names = {batch.name for batch in batches}
    return {batch.id for batch in manifest.batches if batch.name in names}


def _is_searching(manifest: Manifest) -> bool:
    """Whether some cell's rate is not chosen yet."""
    if not manifest.sweep.search:
        return False
    near = by_kind(Store(manifest.out).load_all()[0])
    return any(
        not search(cell, near.get((cell.method, cell.r, cell.task, cell.scale), [])).finished for cell in manifest.cells
    )


def _submitted(manifest: Manifest, batch: Batch, after: Sequence[str]) -> Manifest:
    """Write a job's files, submit it, and note that in the manifest.

    It is noted before too: a job that is submitted when this process dies is found again by its name.

    Raises UserError with sbatch's words; the script stays.
    """
    folder = manifest.path
    for name in ("jobs", "logs", "runs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for run in _runs(batch):
        _write_run_file(run, manifest)
    if batch.elements:
        write_atomically(folder / "jobs" / f"{batch.name}.txt", _lines(batch, manifest))
    path = folder / "jobs" / f"{batch.name}.sh"
    write_atomically(path, script(batch, manifest))
    manifest = manifest.model_copy(update={"batches": (*manifest.batches, batch)})
    manifest.save()
    dependency = [f"--dependency=afterany:{':'.join(after)}"] if after else []
    command = ["sbatch", "--parsable", *dependency, str(path)]
    # Not with the variables of the job that this may run in.
    clean = {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or name[:6] != "SLURM_"}
    done = subprocess.run(command, env=clean, capture_output=True, text=True)
    if done.returncode:
        manifest.model_copy(update={"batches": manifest.batches[:-1]}).save()
        raise UserError(
            f"sbatch refuses {path}: {done.stderr.strip()}\nThe script stays. Change the profile, or it, and submit "
            f"the sweep again; by hand: {shlex.join(command)}"
        )
    batch = batch.model_copy(update={"id": done.stdout.strip().partition(";")[0]})
    manifest = manifest.model_copy(update={"batches": (*manifest.batches[:-1], batch)})
    manifest.save()
    size = f", {len(batch.elements)} elements, {len(_runs(batch))} runs" if batch.elements else ""
    waits = f", after {', '.join(after)}" if after else ""
    print(f"submitted {batch.name} as job {batch.id}{size}{waits}", flush=True)
    return manifest


def _write_run_file(run_id: str, manifest: Manifest) -> Path:
    """What the trainer gets; returns the file."""
    run = manifest.runs[run_id]
    kept = tuple(text for text in run.overrides if text.startswith(("logger", "trainer.keep_checkpoints")))
    options = _options(kept).model_copy(update={"out": manifest.out, "overrides": run.overrides})
    path = manifest.path / "runs" / f"{run_id}.json"
    write_atomically(path, RunFile(spec=run.spec, options=options).model_dump_json() + "\n")
    return path


@cache
def _options(overrides: tuple[str, ...]) -> Options:
    return Options.from_config(compose_config(list(overrides)), [])


def _lines(batch: Batch, manifest: Manifest) -> str:
    """A line per element: its runs and, behind a colon, the bases that they may train first."""
    lines = []
    for element in batch.elements:
        bases = {base for run in element if (base := manifest.runs[run].spec.model.base_id)}
        lines.append(f"{' '.join(element)}:{' '.join(sorted(bases))}\n")
    return "".join(lines)


def script(batch: Batch, manifest: Manifest) -> str:
    """What sbatch is given."""
    environment = Environment(
        loader=FileSystemLoader(ROOT / "slurm"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="<%#",  # {# is bash's
        comment_end_string="#%>",
    )
    environment.filters["quoted"] = lambda value: shlex.quote(str(value))
    specs = [manifest.runs[run].spec for run in _runs(batch)]
    profile = manifest.profile
    shape = shape_of(specs[0], profile) if specs else Shape(minutes=60, processes=1)
    options = _sbatch_options(batch, manifest, shape, len(specs))
    return environment.get_template(f"{batch.stage}.sh.j2").render(
        options=[f"{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
        + ["--requeue", *(shlex.quote(option) for option in profile.sbatch)],
        sweep=manifest.path,
        out=manifest.out,
        folder=manifest.folder,
        profile=profile,
        python=[*profile.container, profile.python or manifest.python],
        name=batch.name,
        shape=shape,
        deepspeed=any(spec.trainer.stage for spec in specs),
        check=profile.offline and any(needs_the_hub(spec) for spec in specs),
        retry=manifest.command("retry=true"),
        tables=bool(manifest.sweep.tables),
        report=ROOT / "scripts" / "report.py",
        out_override=_override("out", manifest.out),
    )


def _sbatch_options(batch: Batch, manifest: Manifest, shape: Shape, runs: int) -> dict[str, Any]:
    profile = manifest.profile
    training = batch.stage == "train"
    per_node = (shape.processes or 1) * shape.packed
    gpu = f"gpu:{profile.gpu_type}" if profile.gpu_type else "gpu"
    at_once = f"%{profile.at_once}" if profile.at_once else ""
    memory = profile.memory_gb and f"{max(1, round(profile.memory_gb * 1024 * (per_node if training else 1)))}M"
    log = str(manifest.path / "logs" / batch.name).replace("%", "%%")
    return {
        "--job-name": f"{manifest.key}-{batch.name}",
        "--array": f"0-{len(batch.elements) - 1}{at_once}" if training else None,
        "--output": f"{log}{'-%a' if training else ''}.log",
        "--open-mode": "append",
        "--partition": profile.partition if training else profile.small_partition or profile.partition,
        "--account": profile.account,
        "--qos": profile.qos,
        "--nodes": shape.nodes,
        "--ntasks-per-node": shape.packed,
        "--cpus-per-task": profile.cpus_per_process * (shape.processes or 1),
        "--gres": f"{gpu}:{per_node}" if training and profile.gpus_per_node else None,
        "--mem": memory,
        "--time": shape.minutes,
        "--signal": f"B:USR1@{profile.signal_seconds}" if training else None,
    }


def dry_run(manifest: Manifest) -> int:
    """Print all scripts that would be submitted now, and what they take at most."""
    manifest, new = _with_new(manifest)
    runs = sum(len(_runs(batch)) for batch in new)
    hours = {"node": 0.0, "GPU": 0.0}
    for batch in new:
        shape = shape_of(manifest.runs[batch.elements[0][0]].spec, manifest.profile)
        print(f"# {batch.name}.sh\n{script(batch, manifest)}\n# {batch.name}.txt\n{_lines(batch, manifest)}")
        each = len(batch.elements) * shape.minutes / 60
        hours["node"] += each * shape.nodes
        hours["GPU"] += each * shape.total * shape.packed if manifest.profile.gpus_per_node else 0
    searching = _is_searching(manifest)
    last = Batch(name="choose-1" if searching else "report-1", stage="choose" if searching else "report", round=1)
    print(f"# {last.name}.sh\n{script(last, manifest)}")
    more = ", and what follows from the search" if searching else ""
    elements = sum(len(batch.elements) for batch in new)
    print(
        f"# {runs} runs in {len(new)} arrays of {elements} elements{more}; at most {hours['node']:.1f} node-hours and "
        f"{hours['GPU']:.1f} GPU-hours, were each to take its whole time. Nothing was submitted."
    )
    return 0


# ---------------------------------------------------------------------------------------------------
# What Slurm knows


@dataclass(frozen=True)
class Element:
    """A job, or an element of an array, as Slurm sees it: its state in Slurm's word, and why or where."""

    job: str
    index: int | None
    state: str
    note: str = ""

    @property
    def is_running(self) -> bool:
        return self.state in ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STAGE_OUT")


def _slurm(*command: str) -> str:
    """What a command of Slurm's prints. Raises UserError with its words where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{shlex.join(command)}: {done.stderr.strip()}. Is Slurm up? scontrol ping")
    return done.stdout


def queue(manifest: Manifest) -> list[Element]:
    """What of the sweep is running or waiting, by the names of its jobs."""
    if not manifest.batches or shutil.which("squeue") is None:
        return []
    names = {f"{manifest.key}-{batch.name}" for batch in manifest.batches}
    found = []
    for line in _slurm("squeue", "--me", "-h", "-r", "-o", "%F|%K|%T|%j|%R").splitlines():
        job, index, state, name, note = line.split("|", 4)
        if name in names:
            found.append(Element(job, int(index) if index.isdigit() else None, state, note))
    return found


def ended(manifest: Manifest) -> list[Element]:
    """How the sweep's jobs have ended: from sacct or, without accounting, as far as the controller remembers."""
    ids = [batch.id for batch in manifest.batches if batch.id]
    if not ids or shutil.which("scontrol") is None:
        return []
    words = ["sacct", "-n", "-P", "-X", "-j", ",".join(ids), "-o", "JobID,State,ExitCode"]
    done = subprocess.run(words, capture_output=True, text=True) if shutil.which("sacct") else None
    found = []
    if done and done.returncode == 0 and done.stdout.strip():
        for line in done.stdout.splitlines():
            job, state, code = line.split("|")
            number, _, index = job.partition("_")
            found += [Element(number, each, state.split()[0], code) for each in _indices(index)]
        return found
    for job in ids:
        said = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True).stdout
        for line in said.splitlines():
            keys = dict(word.split("=", 1) for word in line.split() if "=" in word)
            indices = _indices(keys.get("ArrayTaskId", ""))
            found += [Element(job, each, keys["JobState"], keys["ExitCode"]) for each in indices]
    return found


def _indices(text: str) -> list[int | None]:
    """Of an array: '3', '[0-2,5%2]'; None for a job that is none."""
    indices: list[int | None] = []
    for part in filter(None, text.strip("[]").partition("%")[0].split(",")):
        first, _, last = part.partition("-")
        indices += range(int(first), int(last or first) + 1)
    return indices or [None]


def _busy(manifest: Manifest) -> set[str]:
    """The runs that are running or waiting."""
    names = {batch.id: batch for batch in manifest.batches if batch.id}
    found: set[str] = set()
    for element in queue(manifest):
        batch = names.get(element.job)
        if batch and batch.elements and element.index is not None:
            found |= set(batch.elements[element.index])
    return found


def cancel(manifest: Manifest) -> int:
    """Take the sweep's jobs out of the queue and end those that run; checkpoints stay."""
    live = sorted({element.job for element in queue(manifest)})
    if live:
        _slurm("scancel", *live)
    print(f"cancelled {len(live)} jobs. It goes on from the last checkpoints: {manifest.command('retry=true')}")
    return 0


def show(manifest: Manifest) -> int:
    """Print what is done, runs, waits and failed, and why; the exit status is 1 where something failed."""
    store = Store(manifest.out)
    jobs = [Job(run.overrides, run.spec) for run in manifest.runs.values()]
    live, over = queue(manifest), ended(manifest)
    elements = [(batch, index, some) for batch in manifest.batches for index, some in enumerate(batch.elements)]
    where = {run: (batch, index) for batch, index, some in elements for run in some}
    lines: dict[str, list[str]] = {"finished": [], "running": [], "queued": [], "failed": [], "not submitted": []}
    for job in jobs:
        batch, index = where.get(job.spec.id, (None, None))
        mine = next((each for each in live if batch and (each.job, each.index) == (batch.id, index)), None)
        past = next((each for each in over if batch and (each.job, each.index) == (batch.id, index)), None)
        named = f"{title(job.spec)} ({batch.id}_{index})" if batch else title(job.spec)
        if has_result(store, job):
            lines["finished"].append(named)
        elif mine:
            kind = "running" if mine.is_running else "queued"
            lines[kind].append(f"{named} {note(store, job) if mine.is_running else ''} {mine.note}")
        elif batch is None or batch.id is None:
            lines["not submitted"].append(named)
        else:
            lines["failed"].append(f"{named}: {_why(job, manifest, batch, index or 0, past, store)}")
    counts = ", ".join(f"{len(some)} {kind}" for kind, some in lines.items() if some)
    print(f"sweep {manifest.name}: {len(jobs)} runs known so far: {counts or 'none'}")
    for kind in ("running", "queued", "failed", "not submitted"):
        for line in lines[kind]:
            print(f"  {kind}: {line.rstrip()}")
    states = {each.job: each for each in [*over, *live]}
    for batch in manifest.batches:
        if batch.stage != "train" and batch.round == manifest.round:
            state = states.get(str(batch.id))
            print(f"  {batch.name} ({batch.id}): {state.state.lower() if state else 'unknown'}")
    if lines["failed"] or lines["not submitted"]:
        print(f"again: {manifest.command('retry=true')}")
    return 1 if lines["failed"] else 0


def _why(job: Job, manifest: Manifest, batch: Batch, index: int, past: Element | None, store: Store) -> str:
    """Why a run has ended without a result."""
    path = manifest.path / "logs" / f"{batch.name}-{index}.log"
    log = path.read_text(errors="replace") if path.exists() else ""
    state = past.state if past else "no longer known to Slurm"
    record = store.load(job.spec.id)
    had = re.search(r"exceeded memory limit \((\d+) > (\d+)\)", log)
    if state == "OUT_OF_MEMORY" or had or "oom_kill" in log or "oom-kill" in log:
        asked = manifest.profile.memory_gb
        has = f"memory_gb={asked:g} of each process" if asked else "the cluster's default (memory_gb in the profile)"
        if had:
            has += f", {int(had[2]) / 2**30:.2f} GB in all, and needed more than {int(had[1]) / 2**30:.2f} GB"
        reason = (
            f"killed for memory: it had {has}. Raise memory_gb, then: {manifest.command('retry=true')} profile=<file>"
        )
    elif not log:
        reason = (
            f"{state.lower()} without a word: a compute node that can't see {manifest.out} can't write the log. Choose "
            f"a folder on a file system that all nodes share: out=<folder>"
        )
    elif errors := re.findall(r"^(?:\d+: )?error: (.*)", log, re.MULTILINE):  # ours; --label puts a number before it
        reason = f"{state.lower()}: {errors[-1]}"
    elif record and record.error:
        reason = f"{record.status}: {record.error}"
    else:
        reason = state.lower()
    return f"{reason} (log: {path})"


# ---------------------------------------------------------------------------------------------------
# What a job needs that it can't fetch


def needs_the_hub(spec: RunSpec) -> bool:
    """Whether a run reads a model or data that the suite does not make itself."""
    return spec.model.pretrained is not None or spec.task.get("data", "generated") != "generated"


def _refuse_missing(manifest: Manifest, new: list[Batch]) -> None:
    """Raise UserError where a run's data or model is not here, before it waits in a queue for a GPU."""
    if not manifest.profile.offline:
        return
    different: dict[str, str] = {}
    for run in (run for batch in new for run in _runs(batch)):
        spec = manifest.runs[run].spec
        if needs_the_hub(spec):
            different.setdefault(repr((spec.task, spec.model, spec.eval, spec.training.max_length)), run)
    if not different:
        return
    files = [str(_write_run_file(run, manifest)) for run in different.values()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "mora_repro.slurm", "check", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"nothing is submitted: {done.stderr.strip().removeprefix('error: ')}")


def check(files: Sequence[str]) -> int:
    """Look, without a network, whether all is there that the runs need.

    Raises UserError with the commands that prepare it.
    """
    from .prepare import missing  # takes seconds

    why, commands = [], []
    for path in files:
        job = RunFile.load(Path(path))
        if needs_the_hub(job.spec) and (lack := missing(job.spec, Store(job.options.out))):
            why.append(f"{job.spec.id}: {lack}")
            words = ["python", "scripts/prepare.py", *job.options.overrides, _override("out", job.options.out)]
            commands.append(shlex.join(words))
    if why:
        raise UserError(
            f"{len(why)} of {len(files)} runs lack what they need. {why[0]}\nWhere there is internet, such as on the login "
            "node:\n" + "\n".join(commands)
        )
    return 0


def _of_a_job(arguments: Sequence[str]) -> int:
    """`python -m mora_repro.slurm check <run.json> ...`, or `advance` or `status` and a manifest."""
    what, *files = arguments
    if what == "check":
        return check(files)
    folder = Path(files[0]).parent
    with _alone(folder):
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
