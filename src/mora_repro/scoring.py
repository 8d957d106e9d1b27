"""Scoring again, without training: a finished run's weights, or any model, by a task's benchmarks or lm-eval's."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast

import torch
from omegaconf import DictConfig
from peft import PeftModel
from pydantic import PositiveInt, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .data.benchmarks import KNOWN, Benchmark, Harness, HeldOut, known, refuse_unread
from .data.task import build_task
from .disk import write_atomically
from .distributed import from_main, is_main, join, leave, say, size, started_by_a_launcher
from .errors import UserError
from .evaluation import ENOUGH, evaluate, fetch, refuse_no_room
from .export import ADAPTER, finished_record, quiet_libraries, registering_module, weights_of
from .methods import load_base, load_tokenizer, precision
from .results.environment import describe_environment
from .results.records import Environment, Store, write_samples
from .spec import RunSpec, compose_config
from .spec.compose import options
from .spec.run_spec import Eval, Strict, script_config, sha256_of


class Wanted(Strict):
    """conf/scripts/evaluate.yaml, validated."""

    run: str | None
    model: str | None
    tasks: tuple[str, ...]
    scale: Literal["mini", "paper"]
    split: Literal["test", "validation"]
    limit: PositiveInt | None
    data: dict[str, str | None]
    out: str
    rerun: bool


class Evaluated(Strict):
    """What an evaluation gave: `<out>/evaluations/<name>.json`, its samples beside it. Metrics as in a run's record."""

    of: str
    tasks: tuple[str, ...]
    eval: Eval
    content: dict[str, str]
    command: str
    started: str
    wall_s: float
    environment: Environment
    metrics: dict[str, float]
    stderr: dict[str, float]
    counts: dict[str, int]


def main(config: DictConfig) -> int:
    """`python scripts/evaluate.py`.

    Raises UserError: no such run or model, no weights of it, a task that is not known, data that can't be had.
    """
    quiet_libraries()
    wanted = script_config(Wanted, config, "evaluate")
    if (wanted.run is None) == (wanted.model is None):
        raise UserError("name what is scored: a run (run=<id>), or a model (model=<hub id or folder>), and not both")
    if started_by_a_launcher() and size() > 1:
        join(deepspeed=False)
    store = Store(wanted.out)
    spec, weights = _of_run(wanted.run, store) if wanted.run else _of_model(wanted)
    data = spec.eval.data | {name: path for name, path in wanted.data.items() if path}
    settings = Eval(split=wanted.split, limit=wanted.limit, data=data)
    tasks = wanted.tasks or ((str(spec.task["name"]),) if wanted.run else ())
    if not tasks:
        raise UserError("name what the model is scored by: tasks=[mmlu,pubmedqa], say, or tasks=[gsm8k]")
    path, content = _place(wanted, settings, tasks, store)
    with store.explained():
        evaluated = None if wanted.rerun else from_main(_load(path))
        if evaluated:
            say(f"this was evaluated on {evaluated.started[:10]}; again: the same command with rerun=true")
        else:
            try:
                evaluated = _evaluate(wanted, spec, weights, tasks, settings, content, path, store)
            except UserError as error:  # what a run's `eval.` has is at the top here
                raise UserError(str(error).replace("eval.data.", "data.").replace("eval.split", "split")) from error
    if is_main():
        _print(evaluated)
        say(f"stored: {path}, and its samples beside it")
    leave()
    return 0


def _evaluate(
    wanted: Wanted,
    spec: RunSpec,
    weights: Path | None,
    tasks: Sequence[str],
    settings: Eval,
    content: dict[str, str],
    path: Path,
    store: Store,
) -> Evaluated:
    start, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    tokenizer = load_tokenizer(spec)
    benchmarks, mean_of, max_length = benchmarks_of(spec, tokenizer, tasks, settings)
    refuse_twice(benchmarks)
    refuse_unread({name: path for name, path in wanted.data.items() if path}, benchmarks)
    fetch(benchmarks)  # an error of their data comes before the model is loaded
    model = load_model(spec, tokenizer, weights, store)
    if torch.cuda.is_available():
        model = model.to("cuda")  # type: ignore[arg-type]
    refuse_no_room(model, tokenizer, benchmarks)
    scores = evaluate(model, tokenizer, benchmarks, max_length, mean_of)
    evaluated = Evaluated(
        of=str(wanted.run or wanted.model),
        tasks=tuple(tasks),
        eval=settings,
        content=content,
        command=shlex.join(["python", *sys.argv]),
        started=started,
        wall_s=round(time.monotonic() - start, 2),
        environment=describe_environment(precision(spec)),
        metrics=scores.metrics,
        stderr=scores.stderr,
        counts=scores.counts,
    )
    if is_main():
        write_samples(path, scores.samples)
        write_atomically(path, evaluated.model_dump_json(indent=1) + "\n")
    return evaluated


def _of_run(run: str, store: Store) -> tuple[RunSpec, Path]:
    record = finished_record(run, store)
    return record.spec, weights_of(record, store)


def _of_model(wanted: Wanted) -> tuple[RunSpec, Path | None]:
    """A spec that loads the model, and the folder of its adapter where it is one. Its task is not looked at."""
    source = str(wanted.model)
    adapter = Path(source) if (Path(source) / ADAPTER).exists() else None
    if adapter:
        base = json.loads((adapter / ADAPTER).read_text())["base_model_name_or_path"]
        source = str(base)
    named = source in options("model") and not Path(source).exists()
    model = [f"model={source}"] if named else ["model=hf", f"model.pretrained='{source}'"]
    spec = RunSpec.from_config(compose_config(["method=fft", "task=gsm8k", f"scale={wanted.scale}", *model]))
    if spec.model.pretrained is None:
        raise UserError(f"model={source} is made by a run, and has no weights without one: run=<id>")
    return spec, adapter


def load_model(
    spec: RunSpec, tokenizer: PreTrainedTokenizerBase, weights: Path | None, store: Store
) -> PreTrainedModel:
    """The model with a run's weights, an adapter not merged; without `weights`, the spec's pretrained model.

    Raises UserError where the base of an adapter is not there.
    """
    adapter = weights is not None and (weights / ADAPTER).exists()
    if weights is not None and not adapter:
        return load_base(spec, tokenizer, weights)
    base = None
    if spec.model.base_id:
        base = weights_of(finished_record(spec.model.base_id, store), store)
    set_seed(spec.seed)  # of a base that is random
    model = load_base(spec, tokenizer, base)
    if weights is None:
        return model
    import mora  # noqa: F401  its adapters are known to PEFT from here on

    if module := registering_module(spec):
        importlib.import_module(module)
    return cast(PreTrainedModel, PeftModel.from_pretrained(model, weights))


def benchmarks_of(
    spec: RunSpec, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], settings: Eval
) -> tuple[list[Benchmark], tuple[str, ...], int]:
    """What the tasks ask, the metrics that have a mean, and the length of the blocks of held-out texts.

    A task is one of the suite's, as the run has it or as its scale has it, or a column of the paper's tables, or one of
    lm-eval's.
    """
    found: list[Benchmark] = []
    mean_of: tuple[str, ...] = ()
    max_length = spec.training.max_length
    for name in tasks:
        if name in KNOWN:
            found += known(name, settings)
        elif name in options("task"):
            of_run = name == spec.task["name"]
            composed = (
                spec
                if of_run
                else RunSpec.from_config(compose_config(["method=fft", f"task={name}", f"scale={spec.scale}"]))
            )
            task = build_task(composed).for_tokenizer(tokenizer)
            asked = task.benchmarks(settings)
            if any(isinstance(one, HeldOut) for one in asked):
                max_length = composed.training.max_length
            found += asked
            mean_of += task.mean_of
        else:
            validation = settings.split == "validation"
            found.append(Harness(name, name, metric=None, validation=validation, limit=settings.limit))
    return found, mean_of, max_length


def refuse_twice(benchmarks: Sequence[Benchmark]) -> None:
    """Raises UserError where two benchmarks have the same name."""
    names = [benchmark.name for benchmark in benchmarks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"the tasks have {', '.join(sorted(twice))} twice: name each once, or score by one task alone")


def _place(wanted: Wanted, settings: Eval, tasks: Sequence[str], store: Store) -> tuple[Path, dict[str, str]]:
    """The file of an evaluation, by what is asked of what, and the sha256 of the local files that it reads."""
    named = {f"eval.data.{name}": path for name, path in settings.data.items()} | {"model": str(wanted.model)}
    content = {key: sha256_of(Path(path)) for key, path in named.items() if Path(path).exists()}
    asked = [wanted.run, wanted.model, wanted.scale, list(tasks), settings.model_dump(), content]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:10]
    of = re.sub(r"[^\w.-]+", "-", wanted.run or Path(str(wanted.model)).name)
    return store.out / "evaluations" / f"{of}-{'-'.join(tasks)[:60]}-{digest}.json", content


def _load(path: Path) -> Evaluated | None:
    try:
        return Evaluated.model_validate_json(path.read_text())
    except (FileNotFoundError, ValidationError):
        return None


def _print(evaluated: Evaluated) -> None:
    """The metrics in a table on stdout; those of few samples say so."""
    table = Table(title=f"{evaluated.of}, {evaluated.eval.split} set", box=box.SIMPLE_HEAD)
    table.add_column("metric")
    for name in ("value", "standard error", "samples"):
        table.add_column(name, justify="right")
    few = False
    for name, value in evaluated.metrics.items():
        stderr, count = evaluated.stderr.get(name), evaluated.counts.get(name)
        few |= (too_few := count is not None and count < ENOUGH)
        table.add_row(
            name,
            f"{value:.2f}",
            "-" if stderr is None else f"{stderr:.2f}",
            "-" if count is None else f"{count}{' *' if too_few else ''}",
        )
    if few:
        table.caption = f"* fewer than {ENOUGH} samples: too few to tell models apart"
    Console().print(table)
