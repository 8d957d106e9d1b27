"""One training: a model, a task's samples, and the spec's recipe, resumed where it was."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ..data.task import IGNORED, Example
from ..methods import computes_in_bf16
from ..spec import RunSpec
from .callbacks import (
    EvaluateAt,
    GracefulStop,
    MetricsFile,
    NoCheckpointAtTheEnd,
    ProgressLine,
    SealCheckpoints,
    last_checkpoint,
)


@dataclass(frozen=True)
class Outcome:
    """What a training gave. `log` is the Trainer's history, whole also after a resume; `seconds` and
    `tokens` are those of this process, evaluations not counted."""

    finished: bool
    log: list[dict[str, Any]]
    seconds: float
    tokens: int


def train(
    spec: RunSpec,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    evaluate: Callable[[], dict[str, float]],
    work: Path,
) -> Outcome:
    """Train `model` in place and save it to `work/model` when finished.

    Goes on from the last whole checkpoint in `work/checkpoints`, which stay there. SIGINT or SIGTERM finish the step,
    save a checkpoint, and return with `finished` false. Raises Diverged where the loss is not finite.
    """
    recipe = spec.training
    cuda = torch.cuda.is_available()
    micro = recipe.micro_batch_size or recipe.batch_size
    arguments = TrainingArguments(
        output_dir=str(work / "checkpoints"),
        max_steps=recipe.steps or -1,
        num_train_epochs=recipe.epochs or 1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // micro,
        learning_rate=spec.lr,
        lr_scheduler_type=recipe.schedule,
        lr_scheduler_kwargs={"num_decay_steps": recipe.decay_steps, "decay_type": "linear"}
        if recipe.decay_steps
        else {},
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        bf16=computes_in_bf16(spec),
        use_cpu=not cuda,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # else a NaN would be logged as a loss of 0
        save_strategy="steps",
        save_steps=recipe.save_every,
        save_total_limit=2,
        seed=spec.seed,
        data_seed=spec.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else the Trainer multiplies the batch by the number of GPUs
    stop = GracefulStop()
    trainer = TaskTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,  # a list is a map-style dataset
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=[
            EvaluateAt(recipe.evaluate_at),
            MetricsFile(work / "metrics.jsonl"),
            NoCheckpointAtTheEnd(),
            SealCheckpoints(),
            ProgressLine(spec),
            stop,
        ],
    )
    trainer.evaluate_task = evaluate
    trainer.remove_callback(PrinterCallback)  # the Trainer's own printing; ProgressLine takes its place
    set_seed(spec.seed)
    checkpoint = last_checkpoint(work / "checkpoints")
    start = time.monotonic()
    with stop.listening():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.monotonic() - start - trainer.evaluation_seconds
    finished = trainer.state.global_step >= trainer.state.max_steps
    if finished:
        # Beside and renamed: weights that stand in `model` are whole.
        partial = work / "model.partial"
        trainer.save_model(str(partial))
        tokenizer.save_pretrained(partial)
        shutil.rmtree(work / "model", ignore_errors=True)
        partial.rename(work / "model")
    return Outcome(finished, trainer.state.log_history, seconds, trainer.tokens_seen)


class TaskTrainer(Trainer):
    """Trainer whose evaluation is the task's own, logged under `eval_`."""

    evaluate_task: Callable[[], dict[str, float]]
    evaluation_seconds = 0.0
    tokens_seen = 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        start = time.monotonic()
        metrics = {f"eval_{name}": value for name, value in self.evaluate_task().items()}
        self.evaluation_seconds += time.monotonic() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens_seen += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *args, **kwargs)


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the right to its longest sample: input_ids, labels, attention_mask, each (batch, length)."""

    pad_token_id: int

    def __call__(self, batch: list[Example]) -> dict[str, torch.Tensor]:
        width = max(len(example.input_ids) for example in batch)

        def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

        return {
            "input_ids": padded([example.input_ids for example in batch], self.pad_token_id),
            "labels": padded([example.labels for example in batch], IGNORED),
            "attention_mask": padded([[1] * len(example.input_ids) for example in batch], 0),
        }
