"""One run from its spec to its record: the data's way through the suite, in order."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
import time
import warnings
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import cast

import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from .data.task import Task, build_task
from .errors import Diverged, UserError
from .evaluation import evaluate, prompt_room
from .methods import apply_method, count_parameters, load_base, load_tokenizer, on_meta_device
from .results.environment import describe_environment, peak_memory_mb
from .results.records import Cost, Curve, Data, Evaluation, Parameters, Record, Store, write_atomically
from .spec import INTERRUPTED, RunSpec
from .training import Outcome, train


def main(config: DictConfig) -> int:
    """`python train.py`: run the composed configuration; returns the process's exit status."""
    warnings.showwarning = _show_warning
    spec = RunSpec.from_config(config)
    for notice in spec.notices():
        say(notice)
    store = Store(config.out)
    with store.explained():
        if not config.rerun and (record := store.finished(spec.id)):
            path = store.record_path(spec.id)
            say(f"this run finished on {record.started[:10]}: {shown(record)}\nrecord: {path}")
            say("run it again: the same command with rerun=true, or out=<folder>")
            return 0
    overrides = [text for text in HydraConfig.get().overrides.task if not text.startswith(("out=", "rerun="))]
    record = run(spec, store, overrides, anew=config.rerun)
    if record.status == "interrupted":
        return INTERRUPTED
    say(f"finished: {shown(record)}\nrecord:  {store.record_path(spec.id)}\nweights: {store.work(spec.id) / 'model'}")
    return 0


def run(spec: RunSpec, store: Store, overrides: list[str], need_weights: bool = False, anew: bool = False) -> Record:
    """Run a spec, its base first, and write its record; one that finished is not run again.

    Args:
        overrides: what the spec was composed from, for the record; names no local folder of output.
        need_weights: the run's weights are wanted too, so that a record alone does not do. The record stays.
        anew: forget an earlier run of the same spec.

    Raises UserError: what the run needs is not there, or the output folder can't be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a run takes one process so far, and WORLD_SIZE says that there are more. Start it without a launcher: "
            f"python train.py {shlex.join(overrides)}"
        )
    if spec.scale == "paper" and not torch.cuda.is_available():
        raise UserError(_what_paper_scale_needs(spec))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where installed, warns that it has to find that out
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    work = store.work(spec.id)
    with store.explained():
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another process runs {spec.id}; waiting for it to end ...")
            lock.acquire()
        with lock:
            if anew:
                shutil.rmtree(work, ignore_errors=True)
                store.record_path(spec.id).unlink(missing_ok=True)
            record = store.finished(spec.id)
            if record and (not need_weights or (work / "model").exists()):
                return record
            write_atomically(work / "spec.json", spec.model_dump_json(indent=1) + "\n")
            made = _run(spec, store, work, overrides, save=record is None)
            if made.status == "finished":
                shutil.rmtree(work / "checkpoints", ignore_errors=True)  # only now: the record is safe
            return made


def _run(spec: RunSpec, store: Store, work: Path, overrides: list[str], save: bool) -> Record:
    started = time.monotonic()
    record = Record(
        id=spec.id,
        status="failed",
        spec=spec,
        command=shlex.join(["python", "train.py", *overrides]),
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
            base = spec.base_spec()
            if run(base, store, _base_overrides(spec, overrides), need_weights=True).status == "interrupted":
                return record.model_copy(update={"status": "interrupted"})
            base_weights = store.work(base.id) / "model"
        say(f"{spec.id}\n{task.title}: {len(data.examples)} samples, {data.tokens} tokens; working folder: {work}")
        if data.truncated or data.dropped:
            say(f"{data.truncated} samples cut at {spec.training.max_length} tokens, {data.dropped} of them dropped")
        set_seed(spec.seed)
        model = apply_method(load_base(spec, tokenizer, base_weights), spec)
        prompt_room(cast(PreTrainedModel, model), tokenizer, task)  # before hours of training, not after
        trainable, total = count_parameters(model)
        say(f"{spec.method.title}: {trainable:,} of {total:,} parameters are trained")
        _refuse_full_disk(store, work, trainable)
        outcome = train(
            spec,
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
                    base_sha256=_weights_sha256(base_weights) if base_weights else None,
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
        raise
    if save:
        store.save(record)
    return record


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


def _what_paper_scale_needs(spec: RunSpec) -> str:
    """Why paper scale does not run here: the memory it takes, and the command that works instead."""
    model = apply_method(on_meta_device(spec), spec)
    trainable, total = count_parameters(model)
    # bf16 base; of what is trained: fp32 weights, gradients and AdamW's two moments (fft keeps no other copy).
    gigabytes = (16 * trainable + 2 * (total - trainable)) / 1e9
    mini = f"python train.py method={spec.method.name} task={spec.task['name']} scale=mini"
    return (
        f"scale=paper needs a CUDA GPU, and torch {torch.__version__} finds none. {spec.model.title} with "
        f"{spec.name} takes about {gigabytes:.0f} GB of GPU memory for "
        f"weights, gradients and optimizer, before activations. What runs here: {mini}"
    )


def _refuse_full_disk(store: Store, work: Path, trainable: int) -> None:
    """Three checkpoints of fp32 weights and two moments (the oldest goes when the next is there), and the weights."""
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    need, free = 4 * (3 * 3 + 1) * trainable - there, shutil.disk_usage(store.out).free
    if free < need:
        raise UserError(
            f"out={store.out} has {free / 1e6:.1f} MB free, and this run's checkpoints and weights take "
            f"{need / 1e6:.1f} MB. Make room, or choose another folder: out=<folder>"
        )


def shown(record: Record) -> str:
    """The final metrics, in words."""
    return ", ".join(f"{name} {value:.2f}" for name, value in record.metrics.items()) or "no metrics"


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """A line for what concerns the run, such as capped layers; deprecations are for the suite's tests."""
    if issubclass(category, UserWarning):
        say(f"warning: {message}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
