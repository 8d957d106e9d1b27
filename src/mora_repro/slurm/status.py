"""How far a sweep is, and why runs have failed."""

from __future__ import annotations

import re

from ..results.records import Store
from ..sweep import Job, has_result, note, title
from .manifest import Batch, Manifest
from .queue import Element, ended, queue


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
        mine, past = (next((x for x in some if (x.batch, x.index) == (batch, index)), None) for some in (live, over))
        at = mine or past
        named = f"{title(job.spec)} ({at.job}_{index})" if at else title(job.spec)
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
    states = {element.batch.name: element for element in [*over, *live]}
    for batch in manifest.batches:
        if batch.stage != "train" and batch.round == manifest.round:
            state = states.get(batch.name)
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
    elif record and record.error:
        reason = f"{record.status}: {record.error}"
    elif errors := re.findall(r"^(?:\d+: )?error: (.*)", log, re.MULTILINE):  # ours; --label puts a number before it
        reason = f"{state.lower()}: {errors[-1]}"
    else:
        reason = state.lower()
    return f"{reason} (log: {path})"
