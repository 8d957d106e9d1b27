"""One run from its spec to its record: the data's way through the suite, in order."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PromptLearningConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from .data.benchmarks import refuse_unread
from .data.preparation import prepare
from .data.task import build_task
from .disk import weights_sha256, write_atomically
from .distributed import (
    alone_with,
    barrier,
    from_main,
    is_main,
    say,
    size,
)
from .errors import Diverged, UserError
from .evaluation import ENOUGH, evaluate, fetch, refuse_no_room
from .machine import refuse_full_disk, what_takes_less_memory
from .methods import (
    apply_method,
    count_parameters,
    load_base,
    load_tokenizer,
    precision,
    refuse_too_long,
)
from .results.environment import describe_environment, peak_memory_mb
from .results.records import Cost, Curve, Data, Evaluation, Parameters, Record, Store
from .spec import INTERRUPTED, RunSpec
from .spec.options import Options, RunFile
from .training import (
    Outcome,
    launch,
    steps_of,
    train,
    training_arguments,
)


def run(spec: RunSpec, options: Options, need_weights: bool = False) -> Record:
    """Run a spec, its base first, and write its record; one that finished is not run again.

    Every process of the run calls this; all return the same record.

    Args:
        need_weights: the run's weights are wanted too, so that a record alone does not do. The record stays.

    Raises UserError: what the run needs is not there, or the output folder can't be written.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where installed, warns that it has to find that out
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    store = Store(options.out)
    work = store.work(spec.id)
    with store.explained(), ExitStack() as stack:
        finished = None
        if is_main():
            work.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone_with(work.with_suffix(".lock"), f"another process runs {spec.id}"))
            if options.rerun:
                for name in ("checkpoints", "checkpoint.partial", "initial", "model"):
                    shutil.rmtree(work / name, ignore_errors=True)
                store.record_path(spec.id).unlink(missing_ok=True)
            finished = store.finished(spec.id)
            write_atomically(work / "spec.json", spec.model_dump_json(indent=1) + "\n")
        finished = from_main(finished)
        if finished and (not need_weights or (work / "model").exists()):
            return finished
        made = _run(spec, store, work, options, save=finished is None)
        if made.status == "finished" and is_main():
            for name in ("checkpoints", "initial"):  # only now: the record is safe
                shutil.rmtree(work / name, ignore_errors=True)
        return made


def _run(spec: RunSpec, store: Store, work: Path, options: Options, save: bool) -> Record:
    started = time.monotonic()
    save = save and is_main()
    record = Record(
        id=spec.id,
        status="failed",
        spec=spec,
        command=shlex.join(["python", "train.py", *options.overrides]),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=describe_environment(precision(spec)),
    )
    try:
        if spec.training.threads:
            torch.set_num_threads(spec.training.threads)
        tokenizer = load_tokenizer(spec)
        task = build_task(spec).for_tokenizer(tokenizer)
        benchmarks = task.benchmarks(spec.eval)  # an error of their files comes before all work
        refuse_unread(spec.eval.data, benchmarks)
        fetch(benchmarks)
        if task.packed:  # known before hours of preparation
            refuse_too_long(spec, tokenizer, spec.training.max_length)
        data = prepare(spec, task, tokenizer, store.out)
        refuse_too_long(spec, tokenizer, max(data.lengths))
        for notice in task.notices():
            say(notice)
        base_weights = None
        if spec.model.base:
            if not _base_is_there(spec, options, store):
                return record.model_copy(update={"status": "interrupted"})
            base_weights = store.work(spec.base_spec().id) / "model"
        say(f"{spec.id}\n{task.title}: {len(data)} samples, {data.tokens} tokens; working folder: {work}")
        for notice in data.notices():
            say(notice)
        if spec.trainer.stage == 3 and not (spec.model.pretrained or base_weights):
            base_weights = _from_scratch(spec, tokenizer, work)
        arguments = training_arguments(spec, work)  # before the model, so that ZeRO 3 shards it from the first moment
        say(_how_it_runs(spec, arguments))
        set_seed(spec.seed)
        steps = steps_of(spec.training, len(data))
        model = apply_method(load_base(spec, tokenizer, base_weights), spec, steps)
        refuse_no_room(cast(PreTrainedModel, model), tokenizer, benchmarks)
        trainable, total = count_parameters(model)
        if task.packed and isinstance(getattr(model, "active_peft_config", None), PromptLearningConfig):
            say(f"{spec.method.title}: PEFT takes no positions here, so that the documents of a block see each other")
        say(f"{spec.method.title}: {trainable:,} of {total:,} parameters are trained")
        refuse_full_disk(spec, options, store, work, model)
        outcome = train(
            spec,
            options,
            arguments,
            model,
            tokenizer,
            data,
            partial(
                evaluate,
                cast(PreTrainedModel, model),
                tokenizer,
                benchmarks,
                spec.training.max_length,
                task.mean_of,
            ),
            work,
        )
        record = record.model_copy(
            update={
                "status": "finished" if outcome.finished else "interrupted",
                "data": Data(
                    fingerprint=data.fingerprint,
                    examples=len(data),
                    tokens=data.tokens,
                    truncated=data.truncated,
                    dropped=data.dropped,
                    skipped=data.skipped,
                    overlap=data.overlap,
                    base=spec.model.base_id,
                    base_sha256=weights_sha256(base_weights) if base_weights and spec.model.base else None,
                ),
                "parameters": Parameters(trainable=trainable, total=total),
                **_history(outcome),
                "cost": Cost(
                    wall_s=round(time.monotonic() - started, 2),
                    train_s=round(outcome.seconds, 2),
                    tokens_per_s=round(outcome.tokens / max(outcome.seconds, 1e-9), 1),
                    peak_memory_mb=round(peak_memory_mb(), 1),
                ),
            }
        )
    except Exception as error:
        status = "diverged" if isinstance(error, Diverged) else "failed"
        record = record.model_copy(update={"status": status, "error": f"{type(error).__name__}: {error}"})
        if save:
            store.save(record)
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(what_takes_less_memory(spec, error)) from error
        raise
    if save:
        if record.status == "finished":
            store.save_samples(spec.id, outcome.samples)
        store.save(record)
    return record


def _base_is_there(spec: RunSpec, options: Options, store: Store) -> bool:
    """Train the base of a run where it is missing, on rank 0; False where that was interrupted."""
    base = spec.base_spec()
    base_options = Options(out=options.out, overrides=tuple(_base_overrides(spec, list(options.overrides))))
    if "RANK" not in os.environ:
        return run(base, base_options, need_weights=True).status == "finished"
    status = 0
    if is_main() and not (store.work(base.id) / "model").exists():
        # In a process of its own: the base is trained alone, whatever trains the run.
        job = store.work(base.id) / "run.json"
        write_atomically(job, RunFile(spec=base, options=base_options, need_weights=True).model_dump_json() + "\n")
        status = launch(["-m", "mora_repro.worker", str(job)], 1, store.work(base.id) / "processes")
    if status := from_main(status):
        if status == INTERRUPTED:
            return False
        raise UserError(f"the base {base.id} could not be trained, as said above")
    return True


def _from_scratch(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, work: Path) -> Path:
    """The folder of a model with the seed's random weights: made whole by rank 0, for all to load in shards.

    Made in shards, it would have other weights than under the other trainers.
    """
    folder = work / "initial"
    if is_main() and not folder.exists():
        set_seed(spec.seed)
        load_base(spec, tokenizer, None).save_pretrained(beside := work / "initial.partial")
        beside.rename(folder)
    barrier()
    return folder


def _how_it_runs(spec: RunSpec, arguments: TrainingArguments) -> str:
    """The processes and the batch, in words."""
    where = "GPU" if torch.cuda.is_available() else "CPU"
    micro, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    batch = f"batch {spec.training.batch_size} = {size()} x {micro} x {accumulation}"
    return (
        f"trainer={spec.trainer.name} on {size()} {where} process{'es' if size() > 1 else ''}, "
        f"{precision(spec)}; {batch}"
    )


def _history(outcome: Outcome) -> dict[str, object]:
    """The record's curve, evaluations and final metrics, from the Trainer's log."""
    losses = [entry for entry in outcome.log if "loss" in entry]
    evaluations = [
        Evaluation(
            step=entry["step"],
            metrics=_with_prefix(entry, "eval_"),
            stderr=_with_prefix(entry, "stderr_"),
            counts=_with_prefix(entry, "count_"),
        )
        for entry in outcome.log
        if any(name.startswith("eval_") for name in entry)
    ]
    return {
        "curve": Curve(
            step=[entry["step"] for entry in losses],
            loss=[entry["loss"] for entry in losses],
            lr=[entry["learning_rate"] for entry in losses],
        ),
        "evaluations": evaluations,
        "metrics": evaluations[-1].metrics if outcome.finished and evaluations else {},
    }


def _with_prefix(entry: dict[str, float], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}


def _base_overrides(spec: RunSpec, overrides: list[str]) -> list[str]:
    """What composes the base of a run that these overrides compose."""
    model = [text for text in overrides if text.startswith(("model=", "model.")) and "model.base=" not in text]
    return ["method=fft", f"task={spec.model.base}", f"scale={spec.scale}", *model]


def shown(record: Record) -> str:
    """The final metrics, in words; those of few samples say so."""
    counts = record.evaluations[-1].counts if record.evaluations else {}
    few = {name: f" (of {counts[name]} samples)" for name in counts if counts[name] < ENOUGH}
    scores = [f"{name} {value:.2f}{few.get(name, '')}" for name, value in record.metrics.items()]
    return ", ".join(scores) or "no metrics"
