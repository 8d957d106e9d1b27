"""What runs would take, beforehand: memory, arithmetic, hours, money. `scripts/plan.py`, and `train.py plan=true`."""

from __future__ import annotations

import csv
import io
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid
from torch import nn

from .data.task import build_task
from .data.tokens import tokenise
from .disk import write_atomically
from .errors import UserError
from .gpus import Gpu, Machine, gpu_called
from .methods import apply_method, count_parameters, load_tokenizer, on_meta_device
from .methods.flops import flops
from .methods.memory import PARTS, Memory, as_on_gpus, gb, memory, under
from .report.terminal import short
from .results.records import Record, Store
from .results.search import grid, rounds_of
from .spec import RunSpec
from .spec.compose import recipes
from .spec.run_spec import describe, script_config
from .spec.table import Cell, Selection
from .training import batch_shape, processes_wanted, steps_of

TRAINERS = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")  # from the one that takes most to that which takes least
COUNTED = 1000  # samples that are tokenised to know their mean length


# ---------------------------------------------------------------------------------------------------
# How much data a run has


@dataclass(frozen=True)
class Size:
    """Training samples of an epoch; their mean length and that of the longest, in tokens; `note` where it is not
    counted."""

    samples: int
    mean: float
    longest: int
    note: str | None = None


def size_of(spec: RunSpec) -> Size:
    """The size of a run's training set, without preparing it.

    A corpus of the hub has the documented size (`size` in conf/recipes), and so has what needs the model's own
    tokenizer. Else samples are counted, and the first of them tokenised. Raises UserError where that can't be.
    """
    task = build_task(spec)
    longest = spec.training.max_length
    documented = recipes(spec.scale)[spec.task["name"]].get("size", {})
    # A user's own file is read, whatever the paper's corpus has.
    if spec.task.get("data", "generated") not in ("hub", "generated"):
        documented = {}
    if task.packed and task.max_tokens and task.data == "hub":
        return Size(task.max_tokens // longest, longest, longest)
    if documented:
        samples = documented.get("samples") or sum(1 for _ in task.samples())
        mean = min(documented["tokens"], longest)
        return Size(
            samples,
            mean,
            min(documented.get("longest", longest), longest),
            f"task={task.name}: {samples:,} samples of some {mean:g} tokens (conf/recipes/{spec.scale}.yaml)",
        )
    tokenizer = load_tokenizer(spec)
    samples_of = task.for_tokenizer(tokenizer).samples()
    first = list(islice(samples_of, COUNTED))
    if not first:
        raise UserError(f"task={task.name} has no training sample")
    lengths = [len(example.input_ids) for example in tokenise(tokenizer, first)]
    samples = len(first) + sum(1 for _ in samples_of)
    if task.packed:
        tokens = min(sum(lengths) / len(lengths) * samples, task.max_tokens or math.inf)
        return Size(max(1, round(tokens / longest)), longest, longest)
    cut = [min(length, longest) for length in lengths]
    return Size(samples, sum(cut) / len(cut), max(cut))


# ---------------------------------------------------------------------------------------------------
# One run


@dataclass(frozen=True)
class Planned:
    """What a run takes.

    Args:
        memory: of a process, by trainer, with the micro-batch that is taken under it (`micro`).
        trainer: the one that is taken; None where `problem` says why none can be.
        tokens, flops, hours: of the whole training, without evaluations and loading.
    """

    spec: RunSpec
    processes: int
    trainable: int
    parameters: int
    size: Size
    steps: int
    memory: dict[str, Memory]
    micro: dict[str, int]
    fits: dict[str, bool]
    trainer: str | None = None
    accumulation: int = 0
    flops: float = 0
    hours: float = 0
    problem: str | None = None

    @property
    def tokens(self) -> float:
        return self.steps * self.spec.training.batch_size * self.size.mean

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.processes


def plan_run(spec: RunSpec, gpu: Gpu, processes: int, utilisation: float, largest: bool = False) -> Planned:
    """Plan a run on so many GPUs.

    The micro-batch is the recipe's where it fits, else the largest power of two that does; with `largest` that one at
    once. The trainer is the run's own, or where nothing fits under it the next of TRAINERS. A rank that is too high for
    the model, a batch that the GPUs can't share, and a model that fits nowhere are a `problem`.
    """
    spec = as_on_gpus(spec)
    size = size_of(spec)
    steps = steps_of(spec.training, size.samples)
    planned = Planned(spec, processes, 0, 0, size, steps, {}, {}, {})
    try:
        model = _on_meta(spec, steps)
        trainable, parameters = count_parameters(model)
        planned = replace(planned, trainable=trainable, parameters=parameters)
        own = batch_shape(spec.training, processes)[0]
    except UserError as error:
        return replace(planned, problem=str(error))
    share = spec.training.batch_size // processes
    powers = [2**n for n in reversed(range(share.bit_length())) if share % 2**n == 0]
    choices = powers if largest else [own, *(n for n in powers if n < own)]
    for name in dict.fromkeys((spec.trainer.name, *TRAINERS)):
        if name in spec.method.cannot:
            continue
        run = spec if name == spec.trainer.name else under(spec, name)
        for samples in choices:
            taken = memory(run, model, processes, samples, size.longest)
            if taken.total <= gpu.memory_gb * 1e9:
                break
        planned.memory[name], planned.micro[name] = taken, samples
        planned.fits[name] = taken.total <= gpu.memory_gb * 1e9
    own_place = TRAINERS.index(spec.trainer.name) if spec.trainer.name in TRAINERS else 0
    later = [spec.trainer.name, *TRAINERS[own_place:]]
    trainer = next((name for name in later if planned.fits.get(name)), None)
    if trainer is None:
        return replace(planned, problem=_nowhere(planned, model, gpu))
    samples = planned.micro[trainer]
    each = flops(spec, model, samples, max(1, round(size.mean))).total
    total = each * steps * (spec.training.batch_size // samples)
    hours = total / (processes * gpu.tflops * 1e12 * utilisation) / 3600
    return replace(planned, trainer=trainer, accumulation=share // samples, flops=total, hours=hours)


def _on_meta(spec: RunSpec, steps: int) -> nn.Module:
    """The model with its method, without its memory."""
    architecture = spec.model.architecture
    if spec.model.pretrained is None and architecture and "vocab_size" not in architecture:
        sizes = {**architecture, "vocab_size": len(load_tokenizer(spec))}
        spec = spec.with_settings({"model.architecture": sizes})
    with warnings.catch_warnings(action="ignore"):  # of capped layers: the run itself says so
        return apply_method(on_meta_device(spec), spec, steps)


def _nowhere(planned: Planned, model: nn.Module, gpu: Gpu) -> str:
    """That a run fits under no trainer, and what would help."""
    name, least = min(planned.memory.items(), key=lambda item: item[1].total)
    spec = planned.spec
    parts = asdict(least)
    largest = max(parts, key=lambda part: parts[part])
    ways = []
    if not spec.trainer.gradient_checkpointing:
        ways.append("trainer.gradient_checkpointing=true")
    if least.activations > least.total / 3 and spec.training.max_length > 1:
        ways.append(f"shorter samples: training.max_length={spec.training.max_length // 2}")
    if "zero3" not in spec.method.cannot:
        zero3 = under(spec, "zero3")
        for processes in (2**n * planned.processes for n in range(1, 8)):
            samples = planned.micro.get("zero3", 1)
            taken = memory(zero3, model, processes, samples, planned.size.longest)
            if taken.total <= gpu.memory_gb * 1e9 and spec.training.batch_size % processes == 0:
                ways.append(f"trainer=zero3 on {processes} GPUs ({gb(taken.total)} each)")
                break
    ways.append(f"GPUs of {least.total / 1e9:.0f} GB or more")
    ways.append("a smaller model: model=hf model.pretrained=<it>")
    return (
        f"{spec.model.title} with {spec.name} fits on {gpu.title} under no trainer: it takes {gb(least.total)} of "
        f"{gpu.memory_gb:g} GB under trainer={name} with {planned.micro[name]} samples at a time, most of it "
        f"{largest} ({gb(parts[largest])}). What helps: {'; '.join(ways)}"
    )


def reached(name: str, machine: Machine, store: Store) -> float:
    """The utilisation of a record's run: the arithmetic that it did in a second over its GPUs' peak.

    Args:
        name: the record's id, or its file.

    Raises UserError: no such record, one that has not finished, or of a machine without a known GPU.
    """
    path = Path(name) if name.endswith(".json") else store.record_path(name)
    try:
        record = Record.model_validate_json(path.read_text())
    except OSError as error:
        raise UserError(
            f"calibrate={name}: {path} can't be read ({error.strerror}). It is a record's id or file"
        ) from error
    except ValidationError as error:
        raise UserError(f"calibrate={name}: {path} is no record of a run") from error
    cost, data = record.cost, record.data
    if cost is None or data is None or not cost.tokens_per_s:
        raise UserError(f"calibrate={name} has no speed: it is {record.status}. Name a run that finished")
    known = machine.known()
    device = next(iter(record.environment.gpus), None)
    called = gpu_called(device, known) if device else None
    if called is None:
        on = f"on {device}, which is not in conf/gpus.yaml" if device else f"on a CPU ({record.environment.cpu})"
        raise UserError(
            f"calibrate={name} ran {on}, so that its part of a peak is not known. Name a run on one of "
            f"{', '.join(known)}, add its GPU (gpus=<file>, with `names`), or say the part: utilisation=0.4"
        )
    spec = as_on_gpus(record.spec)
    model = _on_meta(spec, steps_of(spec.training, data.examples))
    length = max(1, min(round(data.tokens / data.examples), spec.training.max_length))
    samples = batch_shape(spec.training, record.environment.processes)[0]
    each = flops(spec, model, samples, length).total / (samples * length)
    peak = record.environment.processes * known[called].tflops * 1e12
    return cost.tokens_per_s * each / peak


# ---------------------------------------------------------------------------------------------------
# The commands


class Wanted(Machine, Selection):
    """conf/scripts/plan.yaml, validated."""

    csv: str | None
    out: str


def main(config: DictConfig) -> int:
    """`python scripts/plan.py`; the exit status: 0, 1 where a cell can't be run as asked.

    Raises UserError: unknown tables, GPUs or nodes; cells that can't be composed.
    """
    wanted = script_config(Wanted, config, "plan")
    gpu, shape = wanted.model(), wanted.shape()
    assert shape is not None  # conf/scripts/plan.yaml has a default
    cells = wanted.all_cells()
    utilisation = _utilisation(wanted, Store(wanted.out))
    lines = []
    for cell in cells:
        planned = plan_run(cell.spec(0), gpu, math.prod(shape), utilisation, wanted.micro_batch == "largest")
        lines.append((cell.name, planned, wanted.seeds + (tries(cell) if wanted.search else 0)))
    console = Console(width=None if sys.stdout.isatty() else 150)
    _show_memory(console, lines, gpu)
    _show_parts(console, lines)
    _show_cost(console, lines, wanted.price)
    console.print(_assumptions(wanted, gpu, utilisation, [planned for _, planned, _ in lines]), soft_wrap=True)
    path = Path(wanted.csv or Path(wanted.out) / "plan.csv")
    with Store(path.parent).explained():
        write_atomically(path, as_csv(lines, wanted.price))
    console.print(f"all of it: {path}", soft_wrap=True)
    return 1 if any(planned.problem for _, planned, _ in lines) else 0


def plan_this(spec: RunSpec, config: DictConfig, out: str) -> int:
    """`python train.py ... plan=true`; the exit status, 1 where the run can't be as asked.

    Args:
        config: `machine` of conf/config.yaml.

    Raises UserError: an unknown GPU or nodes, or a calibration that can't be.
    """
    try:
        machine = Machine.model_validate(OmegaConf.to_container(config, resolve=True))
    except ValidationError as error:
        raise UserError(f"machine.{describe(error)}") from error
    gpu, shape = machine.model(), machine.shape()
    processes = math.prod(shape) if shape else processes_wanted(spec)
    utilisation = _utilisation(machine, Store(out))
    planned = plan_run(spec, gpu, processes, utilisation, machine.micro_batch == "largest")
    console = Console(width=None if sys.stdout.isatty() else 150)
    _show_stages(console, planned, gpu)
    _show_cost(console, [(spec.name, planned, 1)], machine.price)
    console.print(_assumptions(machine, gpu, utilisation, [planned]), soft_wrap=True)
    return 1 if planned.problem else 0


def tries(cell: Cell) -> int:
    """How many runs a cell's search makes."""
    return len(grid(cell)) + rounds_of(cell)


def _utilisation(machine: Machine, store: Store) -> float:
    return reached(machine.calibrate, machine, store) if machine.calibrate else machine.utilisation


Line = tuple[str, Planned, int]  # a cell's name, its plan, and how many runs of it there are


def _grid(title: str, *columns: str, left: int = 2) -> Grid:
    grid = Grid(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index < left else "right", no_wrap=index >= left)
    return grid


def _show_memory(console: Console, lines: Sequence[Line], gpu: Gpu) -> None:
    names = [name for name in TRAINERS if any(name in planned.memory for _, planned, _ in lines)]
    grid = _grid(
        f"GB of each GPU by trainer ({gpu.title}, {gpu.memory_gb:g} GB; x: does not fit), and the one that is taken",
        "task", "method", "parameters", "trained", *names, "taken", "micro x accumulation x GPUs",
    )  # fmt: skip
    for name, planned, _ in lines:
        sizes = [
            f"{planned.memory[each].total / 1e9:.1f}{'' if planned.fits[each] else ' x'}"
            if each in planned.memory
            else "-"
            for each in names
        ]
        grid.add_row(
            _task(planned),
            escape(name),
            short(planned.parameters),
            short(planned.trainable),
            *sizes,
            planned.trainer or "-",
            f"{planned.micro[planned.trainer]} x {planned.accumulation} x {planned.processes}"
            if planned.trainer
            else "-",
        )
    console.print(grid)
    by_problem: dict[str, list[str]] = {}
    for name, planned, _ in lines:
        if planned.problem:
            by_problem.setdefault(planned.problem, []).append(f"{_task(planned)} {name}")
    for problem, names in by_problem.items():
        _show_problem(console, f"{', '.join(names)}: {problem}")


def _show_problem(console: Console, said: str) -> None:
    console.print(f"can't be: {said}", soft_wrap=True, markup=False, highlight=False, style="red")


def _task(planned: Planned) -> str:
    """The task; pretraining has several models."""
    spec = planned.spec
    return f"{spec.task['name']} {spec.model.name}" if spec.task["name"] == "pretrain" else str(spec.task["name"])


def _show_parts(console: Console, lines: Sequence[Line]) -> None:
    grid = _grid("GB of each GPU by part, under the trainer that is taken", "task", "method", *PARTS)
    for name, planned, _ in lines:
        if planned.trainer:
            taken = planned.memory[planned.trainer]
            grid.add_row(_task(planned), escape(name), *_parts(taken))
    console.print(grid)


def _show_stages(console: Console, planned: Planned, gpu: Gpu) -> None:
    spec = planned.spec
    console.print(
        f"{spec.id}\n{spec.model.title} with {spec.name}: {planned.trainable:,} of {planned.parameters:,} parameters "
        f"are trained; {planned.processes} x {gpu.title}",
        soft_wrap=True,
        highlight=False,
    )
    grid = _grid("GB of each GPU", "trainer", "micro x accumulation", *PARTS, f"of {gpu.memory_gb:g} GB")
    share = spec.training.batch_size // planned.processes
    for name in [name for name in ("plain", *TRAINERS) if name in planned.memory]:
        taken, micro = planned.memory[name], planned.micro[name]
        fits = "fits" if planned.fits[name] else "does not fit"
        chosen = f"{name} (taken)" if name == planned.trainer else name
        grid.add_row(chosen, f"{micro} x {share // micro}", *_parts(taken), fits)
    console.print(grid)
    if planned.problem:
        _show_problem(console, planned.problem)


def _show_cost(console: Console, lines: Sequence[Line], price: float | None) -> None:
    money = [] if price is None else ["money"]
    grid = _grid(
        "Time of a run, and GPU-hours of all its runs",
        "task", "method", "steps", "tokens", "EFLOP", "hours", "GPU-hours", "runs", "GPU-hours of all", *money,
    )  # fmt: skip
    total = 0.0
    for name, planned, runs in lines:
        if planned.trainer is None:
            continue
        total += planned.gpu_hours * runs
        grid.add_row(
            _task(planned),
            escape(name),
            f"{planned.steps:,}",
            short(planned.tokens),
            f"{planned.flops / 1e18:,.3g}",
            f"{planned.hours:,.1f}",
            f"{planned.gpu_hours:,.1f}",
            str(runs),
            f"{planned.gpu_hours * runs:,.1f}",
            *([] if price is None else [f"{planned.gpu_hours * runs * price:,.0f}"]),
        )
    if len(lines) > 1:
        grid.add_section()
        runs = sum(runs for _, planned, runs in lines if planned.trainer)
        sums = [f"{total:,.1f}", *([] if price is None else [f"{total * price:,.0f}"])]
        grid.add_row("total", "", *[""] * 5, str(runs), *sums)
    console.print(grid)


def _assumptions(machine: Machine, gpu: Gpu, utilisation: float, planned: Sequence[Planned]) -> str:
    notes = dict.fromkeys(each.size.note for each in planned if each.size.note)
    source = f"as in {machine.calibrate}" if machine.calibrate else "assumed; calibrate=<record> takes a run's"
    lines = [
        f"{utilisation:.0%} of {gpu.tflops:g} TFLOP/s a GPU ({source}; {gpu.source}). Recomputed layers are in it; "
        f"evaluations, loading and queues are not.",
        *(f"not counted, documented or estimated: {note}" for note in notes),
    ]
    return escape("\n".join(lines))


def as_csv(lines: Sequence[Line], price: float | None) -> str:
    """A row for each cell and trainer, in bytes, tokens, FLOPs and hours."""
    rows = []
    for name, planned, runs in lines:
        for trainer in planned.memory or ("",):
            found = planned.memory.get(trainer)
            rows.append(
                {
                    "task": planned.spec.task["name"],
                    "method": name,
                    "r": planned.spec.r,
                    "model": planned.spec.model.name,
                    "parameters": planned.parameters,
                    "trained": planned.trainable,
                    "trainer": trainer,
                    "taken": trainer == planned.trainer,
                    **{f"{part}_bytes": getattr(found, part) if found else "" for part in PARTS},
                    "fits": planned.fits.get(trainer, False),
                    "gpus": planned.processes,
                    "micro_batch": planned.micro.get(trainer, ""),
                    "steps": planned.steps,
                    "tokens": round(planned.tokens),
                    "flops": planned.flops,
                    "hours": planned.hours,
                    "gpu_hours": planned.gpu_hours,
                    "runs": runs,
                    "money": "" if price is None else planned.gpu_hours * runs * price,
                    "problem": planned.problem or "",
                }
            )
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _parts(taken: Memory) -> list[str]:
    return [f"{getattr(taken, part) / 1e9:.2f}" for part in PARTS]
