"""What `scripts/sweep.py launcher=slurm` does: submit what is missing, and what follows from the records; cancel."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..disk import write_atomically
from ..errors import UserError
from ..results.aggregate import by_kind
from ..results.records import Store
from ..results.search import search
from ..sweep import Sweep, has_result, planned, title, write_searches
from .manifest import Batch, Manifest, Run, alone_with_sweep, manifest_of, name_of
from .profile import Profile, Shape, shape_of
from .queue import ask_slurm, busy, queue
from .scripts import lines_of, needs_the_hub, script, write_run_file
from .status import show

INSTALL = "apt-get install slurm-client"


def main(sweep: Sweep) -> int:
    """What `scripts/sweep.py launcher=slurm` does; the exit status.

    Raises UserError: no Slurm here, a profile or manifest that can't be read, or what sbatch refuses.
    """
    store = Store(Path(sweep.out).absolute() if sweep.out else "")
    with store.explained():
        if sweep.status or sweep.cancel or sweep.retry:
            manifest = Manifest.load(store.out / "sweeps" / name_of(sweep))
            if sweep.status:
                return show(manifest)
            _refuse_no_slurm()
            with alone_with_sweep(manifest.path):
                manifest = Manifest.load(manifest.path)
                if sweep.cancel:
                    return cancel(manifest)
                if sweep.profile:
                    profile = Profile.load(sweep.profile)
                    manifest = manifest.model_copy(update={"profile": profile})
                return submit(manifest)
        if sweep.dry_run:
            return dry_run(manifest_of(sweep, store))
        _refuse_no_slurm()
        folder = store.out / "sweeps" / name_of(sweep)
        folder.mkdir(parents=True, exist_ok=True)
        with alone_with_sweep(folder):
            return submit(manifest_of(sweep, store))


def _refuse_no_slurm() -> None:
    if shutil.which("sbatch") is None:
        raise UserError(
            "launcher=slurm submits with sbatch, and there is none on this machine. Log in to the cluster's login "
            f"node, or install it (on Debian or Ubuntu: {INSTALL}). What works here: dry_run=true, which prints the "
            "scripts, and launcher=local"
        )


def submit(manifest: Manifest) -> int:
    """A person's submission: what has no result and neither runs nor waits."""
    manifest = manifest.model_copy(update={"round": manifest.round + 1})
    manifest, new = _with_new(manifest)
    if not new:
        live = len(busy(manifest))
        print(f"nothing to submit: {live} runs are running or queued, all others have a result. {manifest.hint}")
        return 0
    _refuse_missing(manifest, new)
    _submit_all(manifest, new)
    print(manifest.hint)
    return 0


def advance(manifest: Manifest) -> int:
    """What the job that chooses does: submit what follows from the records."""
    manifest, new = _with_new(manifest)
    _submit_all(manifest, new)
    return 0


def _with_new(manifest: Manifest) -> tuple[Manifest, list[Batch]]:
    """The manifest with the runs and arrays that are to be submitted now, and these arrays.

    What failed in this round is not tried again: the records of a search would ask for it for ever.
    """
    store = Store(manifest.out)
    tried = {run for batch in manifest.batches if batch.round == manifest.round for run in batch.runs}
    done = tried | busy(manifest)
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


def _submit_all(manifest: Manifest, new: list[Batch]) -> None:
    """Submit arrays, and what comes after them and those that still run, in place of what was to come."""
    for batch in new:
        manifest = _submitted(manifest, batch, after=[])
    live = queue(manifest)
    for element in live:
        if element.batch.stage != "train" and element.job != os.environ.get("SLURM_JOB_ID"):
            ask_slurm("scancel", element.job)
    after = sorted({element.job for element in live if element.batch.stage == "train"})
    stage: Literal["choose", "report"] = "choose" if after and _is_searching(manifest) else "report"
    number = 1 + sum(batch.stage == stage for batch in manifest.batches)
    if stage == "report" and manifest.sweep.search:
        write_searches(manifest.cells, Store(manifest.out))
    _submitted(manifest, Batch(name=f"{stage}-{number}", stage=stage, round=manifest.round), after)


def _is_searching(manifest: Manifest) -> bool:
    """Whether some cell's rate is not chosen yet."""
    if not manifest.sweep.search:
        return False
    near = by_kind(Store(manifest.out).load_all()[0])
    return any(not search(cell, near.get(cell.kind, [])).finished for cell in manifest.cells)


def _submitted(manifest: Manifest, batch: Batch, after: Sequence[str]) -> Manifest:
    """Write a job's files, submit it, and note that in the manifest.

    It is noted before too: a job that is submitted when this process dies is found again by its name.

    Raises UserError with sbatch's words; the script stays.
    """
    folder = manifest.path
    for name in ("jobs", "logs", "runs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for run in batch.runs:
        write_run_file(run, manifest)
    if batch.elements:
        write_atomically(folder / "jobs" / f"{batch.name}.txt", lines_of(batch, manifest))
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
    size = f", {len(batch.elements)} elements, {len(batch.runs)} runs" if batch.elements else ""
    waits = f", after {', '.join(after)}" if after else ""
    print(f"submitted {batch.name} as job {batch.id}{size}{waits}", flush=True)
    return manifest


def dry_run(manifest: Manifest) -> int:
    """Print all scripts that would be submitted now, and what they take at most."""
    manifest, new = _with_new(manifest)
    runs = sum(len(batch.runs) for batch in new)
    hours = {"node": 0.0, "GPU": 0.0}
    for batch in new:
        shape = shape_of(manifest.runs[batch.elements[0][0]].spec, manifest.profile)
        print(f"# {batch.name}.sh\n{script(batch, manifest)}\n# {batch.name}.txt\n{lines_of(batch, manifest)}")
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


def cancel(manifest: Manifest) -> int:
    """Take the sweep's jobs out of the queue and end those that run; checkpoints stay."""
    live = sorted({element.job for element in queue(manifest)})
    if live:
        ask_slurm("scancel", *live)
    print(f"cancelled {len(live)} jobs. It goes on from the last checkpoints: {manifest.command('retry=true')}")
    return 0


def _refuse_missing(manifest: Manifest, new: list[Batch]) -> None:
    """Raise UserError where a run's data or model is not here, before it waits in a queue for a GPU."""
    if not manifest.profile.offline:
        return
    different: dict[str, str] = {}
    for run in (run for batch in new for run in batch.runs):
        spec = manifest.runs[run].spec
        if needs_the_hub(spec):
            different.setdefault(repr((spec.task, spec.model, spec.eval, spec.training.max_length)), run)
    if not different:
        return
    files = [str(write_run_file(run, manifest)) for run in different.values()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "mora_repro.slurm", "check", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"nothing is submitted: {done.stderr.strip().removeprefix('error: ')}")
