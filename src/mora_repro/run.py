"""One run from its spec to its record: the data's way through the suite, in order."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import cast

import psutil
import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from .data.task import Task, build_task
from .distributed import (
    VARIABLES,
    barrier,
    first_to_fail,
    from_main,
    is_main,
    join,
    leave,
    rank,
    say,
    size,
    started_by_a_launcher,
)
from .errors import Diverged, UserError
from .evaluation import evaluate, prompt_room
from .methods import (
    apply_method,
    changes_base,
    computes_in_bf16,
    count_parameters,
    load_base,
    load_tokenizer,
    needed_gb,
    on_meta_device,
    refuse_what_does_not_fit,
)
from .results.environment import describe_environment, peak_memory_mb
from .results.records import Cost, Curve, Data, Evaluation, Parameters, Record, Store, write_atomically
from .spec import INTERRUPTED, RunSpec
from .spec.options import Options, RunFile
from .training import (
    Outcome,
    batch_shape,
    build_extensions,
    launch,
    logger_callback,
    processes_wanted,
    report_error,
    steps_of,
    train,
    training_arguments,
)


def main(config: DictConfig) -> int:
    """`python train.py`: run the composed configuration; returns the process's exit status."""
    show_warnings()
    spec = RunSpec.from_config(config)
    options = Options.from_config(config, list(HydraConfig.get().overrides.task))
    launched = started_by_a_launcher()  # before anything is said, since rank 0 alone speaks
    for notice in spec.notices():
        say(notice)
    store = Store(options.out)
    with store.explained():
        if not options.rerun and (record := store.finished(spec.id)):
            path = store.record_path(spec.id)
            say(f"this run finished on {record.started[:10]}: {shown(record)}\nrecord: {path}")
            say("run it again: the same command with rerun=true, or out=<folder>")
            return 0
        if not (store.work(spec.id) / "checkpoints").exists():
            for other in store.interrupted_like(spec):
                differing = ", ".join(f"{key}={was}" for key, (_, was) in spec.differences(other).items())
                say(f"this is not the run that was interrupted with {differing}: it starts at step 0, the other stays")
    processes = size() if launched else processes_wanted(spec)
    batch_shape(spec.training, processes)  # for their errors, before anything starts
    logger_callback(options.logger, spec, store.work(spec.id))
    _refuse_this_machine(spec, processes)
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
    return launch(["-m", "mora_repro.worker", str(work / "run.json")], processes, work / "processes")


def as_one_of_many(spec: RunSpec, options: Options, need_weights: bool = False) -> int:
    """This process's part of a run that a launcher started; the exit status. Of many errors, one is shown."""
    try:
        if size() == 1 and not spec.trainer.stage:
            for name in VARIABLES:  # alone without DeepSpeed: as if no launcher had been there, to the bit
                os.environ.pop(name, None)
            return INTERRUPTED if run(spec, options, need_weights).status == "interrupted" else 0
        if spec.trainer.stage:
            build_extensions()  # where `start` has not
        join(deepspeed=spec.trainer.stage > 0)
        record = run(spec, options, need_weights)
        leave()
        return INTERRUPTED if record.status == "interrupted" else 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        status = 2 if isinstance(error, UserError) else 1
        where = f"rank {rank()} of {size()}: " if size() > 1 else ""
        if not report_error(error, traceback.format_exc()) and first_to_fail():
            if status == 1:
                traceback.print_exc()
            print(f"error: {where}{error}", file=sys.stderr)
    # At once: whoever waits for this process notices, and no queue of a GPU holds it.
    sys.stderr.flush()
    os._exit(status)


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
            stack.enter_context(_alone_with(work.with_suffix(".lock"), spec))
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


@contextmanager
def _alone_with(path: Path, spec: RunSpec) -> Iterator[None]:
    """Hold the lock of a run; waits where another command holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process runs {spec.id}; waiting for it to end ...")
        lock.acquire()
    with lock:
        yield


def _run(spec: RunSpec, store: Store, work: Path, options: Options, save: bool) -> Record:
    started = time.monotonic()
    save = save and is_main()
    record = Record(
        id=spec.id,
        status="failed",
        spec=spec,
        command=shlex.join(["python", "train.py", *options.overrides]),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=describe_environment(),
    )
    try:
        if spec.training.threads:
            torch.set_num_threads(spec.training.threads)
        task = build_task(spec)
        tokenizer = load_tokenizer(spec)
        data = task.training_set(tokenizer, spec.training.max_length)
        for notice in task.notices():
            say(notice)
        base_weights = None
        if spec.model.base:
            _refuse_before_the_base(spec, task)
            if not _base_is_there(spec, options, store):
                return record.model_copy(update={"status": "interrupted"})
            base_weights = store.work(spec.base_spec().id) / "model"
        say(f"{spec.id}\n{task.title}: {len(data.examples)} samples, {data.tokens} tokens; working folder: {work}")
        if data.truncated or data.dropped:
            say(f"{data.truncated} samples cut at {spec.training.max_length} tokens, {data.dropped} of them dropped")
        if spec.trainer.stage == 3 and not (spec.model.pretrained or base_weights):
            base_weights = _from_scratch(spec, tokenizer, work)
        arguments = training_arguments(spec, work)  # before the model, so that ZeRO 3 shards it from the first moment
        say(_how_it_runs(spec, arguments))
        set_seed(spec.seed)
        steps = steps_of(spec.training, len(data.examples))
        model = apply_method(load_base(spec, tokenizer, base_weights), spec, steps)
        prompt_room(cast(PreTrainedModel, model), tokenizer, task)  # before hours of training, not after
        trainable, total = count_parameters(model)
        say(f"{spec.method.title}: {trainable:,} of {total:,} parameters are trained")
        if is_main():
            _refuse_full_disk(spec, options, store, work, model)
        outcome = train(
            spec,
            options,
            arguments,
            model,
            tokenizer,
            data.examples,
            partial(evaluate, cast(PreTrainedModel, model), tokenizer, task),
            work,
        )
        record = record.model_copy(
            update={
                "status": "finished" if outcome.finished else "interrupted",
                "data": Data(
                    fingerprint=data.fingerprint,
                    examples=len(data.examples),
                    tokens=data.tokens,
                    truncated=data.truncated,
                    dropped=data.dropped,
                    base=spec.model.base_id,
                    base_sha256=_weights_sha256(base_weights) if base_weights and spec.model.base else None,
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
            raise UserError(_out_of_memory(spec, error)) from error
        raise
    if save:
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
        f"{'bf16' if arguments.bf16 else 'fp32'}; {batch}"
    )


def _out_of_memory(spec: RunSpec, error: BaseException) -> str:
    micro = spec.training.micro_batch_size or spec.training.batch_size
    tips = [f"training.micro_batch_size={max(1, micro // 2)}"]
    if not spec.trainer.gradient_checkpointing:
        tips.append("trainer.gradient_checkpointing=true")
    if spec.trainer.stage < 3:
        tips.append("trainer=zero3 on several GPUs")
    return f"the GPU's memory is full: {str(error).split('. ')[0]}. Less takes: {', or '.join(tips)}"


def _history(outcome: Outcome) -> dict[str, object]:
    """The record's curve, evaluations and final metrics, from the Trainer's log."""
    losses = [entry for entry in outcome.log if "loss" in entry]
    evaluations = [
        Evaluation(
            step=entry["step"],
            metrics={name.removeprefix("eval_"): entry[name] for name in entry if name.startswith("eval_")},
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


def _weights_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _refuse_before_the_base(spec: RunSpec, task: Task) -> None:
    """Raise the UserError that would come after a base's training: of the questions' files, or of the method."""
    assert task.asked
    with warnings.catch_warnings(action="ignore"):  # they are shown when the method is applied to the weights
        apply_method(on_meta_device(spec), spec)


def _base_overrides(spec: RunSpec, overrides: list[str]) -> list[str]:
    """What composes the base of a run that these overrides compose."""
    model = [text for text in overrides if text.startswith(("model=", "model.")) and "model.base=" not in text]
    return ["method=fft", f"task={spec.model.base}", f"scale={spec.scale}", *model]


def _refuse_this_machine(spec: RunSpec, processes: int) -> None:
    """Raises UserError where the run's scale needs a GPU and there is none, or where it does not fit into memory."""
    cuda = torch.cuda.is_available()
    model = apply_method(on_meta_device(spec), spec)
    if spec.scale == "paper" and not cuda:
        raise UserError(
            f"scale=paper needs a CUDA GPU, and torch {torch.__version__} finds none. {spec.model.title} with "
            f"{spec.name} takes about {needed_gb(spec, model, processes):.0f} GB of GPU memory for weights, gradients "
            f"and optimizer, before activations. What runs here: "
            f"python train.py method={spec.method.name} task={spec.task['name']} scale=mini"
        )
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().available
    refuse_what_does_not_fit(spec, model, processes, memory, "cuda" if cuda else "cpu")


def _refuse_full_disk(spec: RunSpec, options: Options, store: Store, work: Path, model: torch.nn.Module) -> None:
    """Raises UserError where the run's checkpoints and weights have no place; the oldest goes when the next is there.

    A checkpoint has what is trained, AdamW's two moments and ZeRO's masters, all in fp32, and after merges the base.
    """
    trainable, total = count_parameters(model)
    whole = total * (2 if computes_in_bf16(spec) else 4)
    checkpoint = 16 * trainable + (whole if spec.method.merge else 0)
    final = whole if spec.method.peft is None or changes_base(spec) else 4 * trainable
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    need, free = (options.keep_checkpoints + 1) * checkpoint + final - there, shutil.disk_usage(store.out).free
    if free < need:
        raise UserError(
            f"out={store.out} has {free / 1e6:.1f} MB free, and this run's checkpoints and weights take "
            f"{need / 1e6:.1f} MB. Make room, keep fewer (trainer.keep_checkpoints=1), or choose another folder: "
            f"out=<folder>"
        )


def shown(record: Record) -> str:
    """The final metrics, in words."""
    return ", ".join(f"{name} {value:.2f}" for name, value in record.metrics.items()) or "no metrics"


def show_warnings() -> None:
    """Warnings that concern the run become a line each."""
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """A line for what concerns the run, such as capped layers; deprecations are for the suite's tests."""
    if issubclass(category, UserWarning):
        say(f"warning: {message}")
