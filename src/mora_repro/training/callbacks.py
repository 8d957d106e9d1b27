"""What happens around training steps: evaluation, metrics file, progress, checkpoints, stopping."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import distributed
from ..progress import CONSOLE
from ..signals import answered_by
from ..spec import RunSpec


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
    """On SIGINT, SIGTERM or SIGUSR1: finish the step, save, stop. A second ctrl-C ends the process at once.

    Whichever process gets the signal, all stop after the same step.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        def note(number: int, _: Any) -> None:
            if not self.asked:
                distributed.say("\nstopping after this step ...")
            self.asked = True
            if number == signal.SIGINT:
                signal.signal(number, before[signal.SIGINT])

        with answered_by(note, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) as before:
            yield

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if distributed.any_of(self.asked) and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


class MetricsFile(TrainerCallback):
    """metrics.jsonl: a line with the number of steps, then one per log."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        lines = [{"steps": state.max_steps}, *state.log_history]  # the history of a resumed run
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        with self.path.open("a") as file:
            file.write(json.dumps({**logs, "step": state.global_step}) + "\n")


class ProgressLine(TrainerCallback):
    """A progress bar on a terminal; elsewhere a line at every tenth of the steps. A context around the training.

    Args:
        tokens: gives the number of tokens that this process has trained on since it started.
    """

    def __init__(self, spec: RunSpec, tokens: Callable[[], int]):
        self.metric = str(spec.task["metric"])
        self.tokens = tokens
        self.since = 0.0
        title = f"{spec.task['name']} {spec.name}"  # short: all has place in 80 columns
        self.console = CONSOLE
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[note]}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar = self.progress.add_task(title, total=None, note="")
        self.shown = -1

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.since = time.monotonic()
        self.progress.update(self.bar, total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        scores = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if scores:
            errors = {name: logs.get(f"stderr_{name}") for name in scores}
            metric = "  ".join(
                f"{name} {value:.1f}" + (f" ± {errors[name]:.1f}" if errors[name] is not None else "")
                for name, value in scores.items()
            )
            self._print(f"step {state.global_step}/{state.max_steps}  {metric}")
        if "loss" not in logs:
            return
        speed = self.tokens() * distributed.size() / max(time.monotonic() - self.since, 1e-9)
        note = f"loss {logs['loss']:.3f} lr {logs['learning_rate']:.0e} {speed:,.0f} tok/s"
        self.progress.update(self.bar, note=note)
        tenth = 10 * state.global_step // state.max_steps
        if not self.console.is_terminal and tenth > self.shown:
            self.shown = tenth
            self._print(f"step {state.global_step}/{state.max_steps}  {note}")

    def _print(self, text: str) -> None:
        with suppress(OSError):  # that nobody reads it any more ends no run
            self.progress.print(text, highlight=False, soft_wrap=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()  # the cursor comes back, after an error too
