"""What happens around training steps: evaluation, metrics file, progress, checkpoints, stopping."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import Diverged
from ..spec import RunSpec

SEAL = "complete"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; torn ones (without the seal) are removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if (path / SEAL).exists():
            whole.append(path)
        else:
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


class SealCheckpoints(TrainerCallback):
    """Marks a checkpoint as whole once all of its files are written."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / SEAL).touch()


class NoCheckpointAtTheEnd(TrainerCallback):
    """The weights are saved there anyway, and the Trainer, resumed after the last step, would make one more."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False


class EvaluateAt(TrainerCallback):
    """Evaluates after the given optimizer steps, and after the last one."""

    def __init__(self, steps: tuple[int, ...]):
        self.steps = set(steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self.steps or state.global_step >= state.max_steps:
            control.should_evaluate = True


class GracefulStop(TrainerCallback):
    """On SIGINT or SIGTERM: finish the step, save, stop. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, _: Any) -> None:
            self.signal = number
            print("\nstopping after this step ...", file=sys.stderr, flush=True)
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.signal is not None and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


class MetricsFile(TrainerCallback):
    """metrics.jsonl: a line with the number of steps, then one per log. Refuses a loss that is not finite."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        lines = [{"steps": state.max_steps}, *state.log_history]  # the history of a resumed run
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        with self.path.open("a") as file:
            file.write(json.dumps({**logs, "step": state.global_step}) + "\n")
        if not math.isfinite(logs.get("loss", 0.0)):
            raise Diverged(
                f"the loss is {logs['loss']} at step {state.global_step}: the learning rate is too high "
                f"for this method. Try a lower one: lr={args.learning_rate / 3:.1g}"
            )


class ProgressLine(TrainerCallback):
    """A progress bar on a terminal; elsewhere a line at every tenth of the steps."""

    def __init__(self, spec: RunSpec):
        self.metric = str(spec.task["metric"])
        title = f"{spec.task['name']} {spec.name}"  # short: all has place in 80 columns
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]} {task.fields[metric]}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar = self.progress.add_task(title, total=None, loss="-", metric="")
        self.shown = -1

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.update(self.bar, total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        scores = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        metric = "  ".join(f"{name} {value:.1f}" for name, value in scores.items())
        if self.metric in scores:
            self.progress.update(self.bar, metric=f"{self.metric} {scores[self.metric]:.1f}")
        if "loss" in logs:
            self.progress.update(self.bar, loss=f"{logs['loss']:.3f}")
        if not self.console.is_terminal and "loss" in logs:
            tenth = 10 * state.global_step // state.max_steps
            if tenth > self.shown:
                self.shown = tenth
                self.console.print(
                    f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}", highlight=False
                )
        if not self.console.is_terminal and metric:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {metric}", highlight=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.stop()
