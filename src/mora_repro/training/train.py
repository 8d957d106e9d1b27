"""One training: a model, a task's samples, and the spec's recipe, resumed where it was."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from .. import distributed
from ..data.benchmarks import Scores
from ..data.shards import TrainingSet
from ..data.task import IGNORED
from ..data.tokens import Example
from ..errors import Diverged, UserError
from ..methods import changes_base, computes_in_bf16
from ..methods.adalora import AllocateRank, allocator_state, load_allocator_state
from ..spec import RunSpec
from ..spec.options import Options
from ..spec.run_spec import Training
from .callbacks import EvaluateAt, GracefulStop, MetricsFile, NoCheckpointAtTheEnd, ProgressLine
from .checkpoints import last_checkpoint, read_tensors, save_trained, seal, step_of, write_tensors
from .loggers import logger_callback
from .merging import Merging, refuse_no_merge
from .optimizer import parameter_groups, trained_parameters, with_restarts
from .sharded import load_into, state_of_main


@dataclass(frozen=True)
class Outcome:
    """What a training gave. `log` is the Trainer's history, whole also after a resume; `seconds` and
    `tokens` (of all processes) are those since this start, evaluations not counted; `samples` are the last
    evaluation's."""

    finished: bool
    log: list[dict[str, Any]]
    seconds: float
    tokens: int
    samples: list[dict[str, Any]]


def batch_shape(recipe: Training, processes: int) -> tuple[int, int]:
    """(samples at a time, accumulation) of a process, so that a step has `batch_size` samples of all processes.

    At a time it takes as many as divide evenly, at most `micro_batch_size`.

    Raises UserError where the processes can't share the batch evenly.
    """
    if recipe.batch_size % processes:
        divisors = [n for n in range(1, recipe.batch_size + 1) if recipe.batch_size % n == 0]
        near = min(divisors, key=lambda n: abs(n - processes))
        multiple = processes * max(1, round(recipe.batch_size / processes))
        raise UserError(
            f"training.batch_size={recipe.batch_size} can't be shared by {processes} processes. Take "
            f"trainer.processes={near}, or a batch that {processes} divides: training.batch_size={multiple}"
        )
    share = recipe.batch_size // processes
    largest = min(recipe.micro_batch_size or share, share)
    micro = next(n for n in range(largest, 0, -1) if share % n == 0)
    return micro, share // micro


def steps_of(recipe: Training, samples: int) -> int:
    """The number of optimizer steps of a training on so many samples."""
    return recipe.steps or math.ceil((recipe.epochs or 1) * math.ceil(samples / recipe.batch_size))


def training_arguments(spec: RunSpec, work: Path) -> TrainingArguments:
    """transformers' arguments. Under ZeRO 3 a model is sharded as it is loaded while these exist.

    Raises UserError: a batch that the processes can't share.
    """
    recipe = spec.training
    cuda = torch.cuda.is_available()
    micro, accumulation = batch_shape(recipe, distributed.size())
    arguments = TrainingArguments(
        output_dir=str(work / "checkpoints"),
        max_steps=recipe.steps or -1,
        num_train_epochs=recipe.epochs or 1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=spec.lr,
        lr_scheduler_type=recipe.schedule,
        lr_scheduler_kwargs={"num_decay_steps": recipe.decay_steps, "decay_type": "linear"}
        if recipe.decay_steps
        else {},
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        optim="adamw_torch_fused" if cuda and not spec.trainer.offload else "adamw_torch",
        bf16=computes_in_bf16(spec),
        use_cpu=not cuda,
        gradient_checkpointing=spec.trainer.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        deepspeed=spec.trainer.deepspeed,
        ddp_backend=("nccl" if cuda else "gloo") if distributed.size() > 1 else None,
        ddp_find_unused_parameters=False,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # else a NaN would be logged as a loss of 0
        save_strategy="steps",
        save_steps=recipe.save_every,
        seed=spec.seed,
        data_seed=spec.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else the Trainer multiplies the batch by the number of GPUs
    return arguments


def train(
    spec: RunSpec,
    options: Options,
    arguments: TrainingArguments,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: TrainingSet,
    evaluate: Callable[[], Scores],
    work: Path,
) -> Outcome:
    """Train `model` in place and save it to `work/model` when finished.

    Goes on from the last whole checkpoint in `work/checkpoints`, which stay there. SIGINT, SIGTERM or SIGUSR1 finish
    the step, save a checkpoint, and return with `finished` false. Raises Diverged where the loss is not finite.
    """
    if changed := changes_base(spec):
        refuse_no_merge(spec, model)
    stop = GracefulStop()
    merging = Merging(spec, model) if spec.method.merge else None
    checkpoint = last_checkpoint(work / "checkpoints")
    trainer = TaskTrainer(
        spec,
        evaluate,
        merging,
        checkpoint,
        options.keep_checkpoints,
        model=model,
        args=arguments,
        train_dataset=examples,  # map-style
        data_collator=Collator(tokenizer.pad_token_id, flat=spec.trainer.attention == "flash_attention_2"),
        callbacks=[
            EvaluateAt(spec.training.evaluate_at),
            NoCheckpointAtTheEnd(),
            stop,
            *([merging] if merging else []),
        ],
    )
    if trainer.allocates:
        trainer.add_callback(AllocateRank(model, distributed.size() * arguments.gradient_accumulation_steps))
    line = ProgressLine(spec, lambda: int(trainer.tokens_seen)) if distributed.is_main() else None
    if line:
        trainer.add_callback(MetricsFile(work / "metrics.jsonl"))
        trainer.add_callback(line)
    if logger := logger_callback(options.logger, spec, work):
        trainer.add_callback(logger)  # after the metrics file
    trainer.add_callback(Restored(trainer))
    trainer.remove_callback(PrinterCallback)  # the Trainer's own printing; ProgressLine takes its place
    set_seed(spec.seed)
    if checkpoint:
        distributed.say(f"going on from step {step_of(checkpoint)}")
    start = time.monotonic()
    with stop.listening(), line or nullcontext(), logger or nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - start - trainer.evaluation_seconds
    finished = trainer.state.global_step >= trainer.state.max_steps
    if finished:
        save_trained(model, tokenizer, work / "model", as_a_whole_model=spec.method.peft is None or changed)
    tokens = sum(distributed.gather(int(trainer.tokens_seen)))
    return Outcome(finished, trainer.state.log_history, seconds, tokens, trainer.samples)


class TaskTrainer(Trainer):
    """Trainer whose evaluation is the task's own, logged as `eval_`, `stderr_` and `count_`, and whose checkpoints are
    whole or not there.

    A checkpoint also holds what transformers' does not: the base after merges, and the loss since the last log, so that
    the log of a resumed run is that of one that never stopped.
    """

    def __init__(
        self,
        spec: RunSpec,
        evaluate_task: Callable[[], Scores],
        merging: Merging | None,
        checkpoint: Path | None,
        keep_checkpoints: int,
        **arguments: Any,
    ):
        """`checkpoint` is the one that the training goes on from; `arguments` are the Trainer's."""
        super().__init__(**arguments)
        self.spec, self.evaluate_task, self.merging = spec, evaluate_task, merging
        self.checkpoint, self.keep_checkpoints = checkpoint, keep_checkpoints
        self.allocates = isinstance(getattr(self.network, "base_model", None), AdaLoraModel)
        self.evaluation_seconds = 0.0
        self.samples: list[dict[str, Any]] = []  # of the last evaluation
        self.tokens_seen: int | torch.Tensor = 0

    @property
    def network(self) -> nn.Module:
        """The model, as no engine has wrapped it."""
        assert self.model is not None
        return self.model

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        if self.spec.training.group_by_length:
            assert isinstance(self.train_dataset, TrainingSet)
            recipe, lengths = self.spec.training, self.train_dataset.lengths
            return GroupedByLength(recipe.batch_size, lengths, self.spec.seed, lambda: self.state.global_step)
        return super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args)
            decayed = self.get_decay_parameter_names(self.network)
            groups = parameter_groups(self.network, self.spec.method, self.spec.lr, self.spec.training, decayed)
            self.optimizer = kind(groups, **arguments)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if self.merging:
            assert isinstance(schedule, LambdaLR)
            self.lr_scheduler = with_restarts(schedule, self.merging.schedule)
            return self.lr_scheduler
        return schedule

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        start = time.monotonic()
        scores = self.evaluate_task()
        self.evaluation_seconds += time.monotonic() - start
        self.samples = scores.samples
        metrics = {f"eval_{name}": value for name, value in scores.metrics.items()}
        errors = {f"stderr_{name}": value for name, value in scores.stderr.items()}
        self.log(metrics | errors | {f"count_{name}": value for name, value in scores.counts.items()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        # Read rarely, so that a GPU is not waited for.
        mask = inputs.get("attention_mask")
        self.tokens_seen = self.tokens_seen + (inputs["input_ids"].numel() if mask is None else mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        refuse_no_number(logs.get("loss", 0.0), self.state.global_step, self.spec.lr)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The folder alone: `_save_checkpoint` writes what is trained, or DeepSpeed does."""
        Path(str(output_dir)).mkdir(parents=True, exist_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = read_tensors(Path(resume_from_checkpoint), ("trained",))["trained"]
        load_into(trained_parameters(self.network), state)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        since_log = distributed.gather(self._tr_loss.item())
        refuse_no_number(sum(since_log), self.state.global_step, self.spec.lr)
        # What a gradient that is not finite has left, though the loss was a number.
        parts = [getattr(parameter, "ds_tensor", parameter) for parameter in trained_parameters(self.network).values()]
        if distributed.any_of(not all(bool(part.isfinite().all()) for part in parts)):
            refuse_no_number(math.nan, self.state.global_step, self.spec.lr, "a weight")
        folder = Path(str(self.args.output_dir))
        partial = folder.with_name("checkpoint.partial")
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        distributed.barrier()
        self.args.output_dir = str(partial)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(folder)
        name = f"checkpoint-{self.state.global_step}"
        state = self.merging.state() if self.merging else {}
        if not self.is_deepspeed_enabled:
            state["trained"] = state_of_main(trained_parameters(self.network))
        if self.allocates:
            state["allocator"] = allocator_state(self.network)
        if distributed.is_main():
            write_tensors(partial / name, state)
            loss = {"since_log": since_log, "last_logged": self._globalstep_last_logged}
            (partial / name / "loss.json").write_text(json.dumps(loss))
        distributed.barrier()
        if distributed.is_main():
            seal(partial / name, folder / name, self.keep_checkpoints)
            partial.rmdir()
        distributed.barrier()

    def restore(self) -> None:
        """What `_save_checkpoint` added, after the Trainer has restored its own."""
        if self.checkpoint is None:
            return
        loss = json.loads((self.checkpoint / "loss.json").read_text())
        self._tr_loss += loss["since_log"][distributed.rank()]
        self._globalstep_last_logged = loss["last_logged"]
        if self.merging and self.merging.merges_before(self.state.global_step):
            self.merging.load_state(read_tensors(self.checkpoint, ("base", "momentum", "masters")))
        if self.allocates:
            state = distributed.from_main(read_tensors(self.checkpoint, ("allocator",)))
            load_allocator_state(self.network, state["allocator"])


class Restored(TrainerCallback):
    """Hands the trainer its turn once it has restored a checkpoint's other parts."""

    def __init__(self, trainer: TaskTrainer):
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.restore()


def refuse_no_number(value: float, step: int, lr: float, what: str = "the loss") -> None:
    """Raises Diverged for a value that is not finite; the checkpoint before stays."""
    if not math.isfinite(value):
        raise Diverged(
            f"{what} is {value} at step {step}: the learning rate is too high for this method. "
            f"Try a lower one: lr={lr / 3:.1g}"
        )


class GroupedByLength(LengthGroupedSampler):
    """Examples of about the same length together in a step, whose batches then have little padding.

    The order is a function of the seed and the epoch, in every process. `steps_done` tells the epoch, since the data
    loader of a resumed run does not where there are several processes.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, steps_done: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.steps_done = seed, steps_done

    def __iter__(self) -> Iterator[int]:
        epoch = self.steps_done() // math.ceil(len(self.lengths) / self.batch_size)
        self.generator.manual_seed(1_000_003 * self.seed + epoch)
        return super().__iter__()


@dataclass(frozen=True)
class Collator:
    """Makes a batch of examples: input_ids and labels, each (batch, length).

    Samples are padded on the right to the longest, under an attention_mask. Blocks of documents have position_ids and
    no mask: from positions that start anew, transformers knows that tokens attend within their document alone. With
    FlashAttention it looks at these in a batch of one row alone, so that all blocks are then put into one (`flat`).
    """

    pad_token_id: int
    flat: bool = False

    def __call__(self, batch: list[Example]) -> dict[str, Any]:
        if batch[0].position_ids is not None:
            columns = {part.name: [getattr(example, part.name) for example in batch] for part in fields(Example)}
            blocks = {name: torch.tensor(rows) for name, rows in columns.items()}
            if self.flat:
                blocks = {name: rows.view(1, -1) for name, rows in blocks.items()}
            return {**blocks, "use_cache": False}  # with a cache, positions are not looked at
        width = max(len(example.input_ids) for example in batch)

        def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

        return {
            "input_ids": padded([example.input_ids for example in batch], self.pad_token_id),
            "labels": padded([example.labels for example in batch], IGNORED),
            "attention_mask": padded([[1] * len(example.input_ids) for example in batch], 0),
        }
