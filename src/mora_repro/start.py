"""How a run is started: here, in processes of its own, or as one of those that a launcher started."""

from __future__ import annotations

import os
import sys
import traceback
import warnings

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from .disk import write_atomically
from .distributed import VARIABLES, first_to_fail, join, leave, rank, say, size, started_by_a_launcher
from .errors import UserError
from .machine import refuse_this_machine
from .results.records import Store
from .run import run, shown
from .spec import INTERRUPTED, RunSpec
from .spec.options import Options, RunFile
from .training import (
    batch_shape,
    build_extensions,
    launch,
    load_extensions,
    logger_callback,
    processes_wanted,
    report_error,
)


def main(config: DictConfig) -> int:
    """`python train.py`: run the composed configuration; returns the process's exit status."""
    show_warnings()
    spec = RunSpec.from_config(config)
    options = Options.from_config(config, list(HydraConfig.get().overrides.task))
    launched = started_by_a_launcher()  # before anything is said, since rank 0 alone speaks
    for notice in spec.notices():
        say(notice)
    if options.plan:
        from .plan import plan_this  # not for runs: its imports take a moment

        return plan_this(spec, config.machine, options.out)
    store = Store(options.out)
    with store.explained():
        if not options.rerun and (record := store.finished(spec.id)):
            path = store.record_path(spec.id)
            say(f"this run finished on {record.started[:10]}: {shown(record)}\nrecord: {path}")
            say("run it again: the same command with rerun=true, or out=<folder>")
            return 0
        if not (store.work(spec.id) / "checkpoints").exists():
            for differing in store.interrupted_like(spec):
                say(f"this is not the run that was interrupted with {differing}: it starts at step 0, the other stays")
    if launched and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError("a multirun (-m) starts the processes of its runs itself: leave the launcher out")
    wanted = spec.trainer.processes
    if launched and wanted not in (None, size()):
        raise UserError(
            f"trainer={spec.trainer.name} has trainer.processes={wanted}, and the launcher has started {size()}. Take "
            f"those of the launcher: trainer=ddp, or trainer.processes=null"
        )
    processes = size() if launched else processes_wanted(spec)
    batch_shape(spec.training, processes)  # for their errors, before anything starts
    logger_callback(options.logger, spec, store.work(spec.id))
    refuse_this_machine(spec, processes)
    status = as_one_of_many(spec, options) if launched else start(spec, options, processes)
    if status == 0 and (record := store.load(spec.id)):
        say(f"finished: {shown(record)}\nrecord:  {store.record_path(spec.id)}")
        say(f"weights: {store.work(spec.id) / 'model'}")
    return status


def start(spec: RunSpec, options: Options, processes: int) -> int:
    """Run a spec, here or in processes of its own where it takes several or DeepSpeed; the exit status."""
    if processes == 1 and not spec.trainer.stage:
        return INTERRUPTED if run(spec, options).status == "interrupted" else 0
    store = Store(options.out)
    work = store.work(spec.id)
    with store.explained():
        write_atomically(work / "run.json", RunFile(spec=spec, options=options).model_dump_json(indent=1) + "\n")
    if spec.trainer.stage:
        build_extensions()
    say(f"starting {processes} process{'es' if processes > 1 else ''} ...")
    try:
        return launch(["-m", "mora_repro.worker", str(work / "run.json")], processes, work / "processes")
    except UserError as error:
        # Rank 0 has written what it saw, which may be that another process no longer answers.
        if (record := store.load(spec.id)) and record.status == "failed":
            store.save(record.model_copy(update={"error": str(error)}))
        raise


def as_launched(spec: RunSpec, options: Options) -> int:
    """This process's part of a run whose file torchrun or srun handed to it; the exit status."""
    for notice in spec.notices():
        say(notice)
    try:
        refuse_this_machine(spec, size())
    except UserError as error:
        if first_to_fail():
            print(f"error: {_where()}{error}", file=sys.stderr)
        return 2
    status = as_one_of_many(spec, options)
    if status == 0 and (record := Store(options.out).load(spec.id)):
        say(f"finished: {shown(record)}\nrecord:  {Store(options.out).record_path(spec.id)}")
    # torchrun takes every other status for a failure, and shows it at length.
    return 0 if status == INTERRUPTED and "TORCHELASTIC_RUN_ID" in os.environ else status


def as_one_of_many(spec: RunSpec, options: Options, need_weights: bool = False) -> int:
    """This process's part of a run that a launcher started; the exit status. Of many errors, one is shown."""
    try:
        if spec.trainer.stage:
            load_extensions()
        if size() > 1 or spec.trainer.stage:
            join(deepspeed=spec.trainer.stage > 0)
        else:
            for name in VARIABLES:  # alone without DeepSpeed: as if no launcher had been there, to the bit
                os.environ.pop(name, None)
        record = run(spec, options, need_weights)
        leave()
        return INTERRUPTED if record.status == "interrupted" else 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        status = 2 if isinstance(error, UserError) else 1
        if not report_error(error, traceback.format_exc()) and first_to_fail():
            if status == 1:
                traceback.print_exc()
            print(f"error: {_where()}{error}", file=sys.stderr)
    # At once: whoever waits for this process notices, and no queue of a GPU holds it.
    sys.stderr.flush()
    os._exit(status)


def _where() -> str:
    return f"rank {rank()} of {size()}: " if size() > 1 else ""


def show_warnings() -> None:
    """Warnings that concern the run become a line each."""
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """A line for what concerns the run, such as capped layers; deprecations are for the suite's tests."""
    if issubclass(category, UserWarning):
        say(f"warning: {message}")
