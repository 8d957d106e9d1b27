"""Experiment loggers: Weights & Biases and TensorBoard. A run never ends, fails or waits because of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, TypeAdapter, ValidationError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import UserError
from ..spec import INTERRUPTED, RunSpec
from ..spec.run_spec import Strict

# wandb waits this long for its server, at the start and for the last uploads (s).
START_SECONDS, FINISH_SECONDS = 30, 60


class NoLogger(Strict):
    name: Literal["none"]


class WandbLogger(Strict):
    """conf/logger/wandb.yaml. There is no key here: wandb takes it from WANDB_API_KEY or `wandb login`."""

    name: Literal["wandb"]
    project: str = Field(min_length=1)
    entity: str | None
    mode: Literal["online", "offline"]


class TensorboardLogger(Strict):
    name: Literal["tensorboard"]


class Open(Protocol):
    """A logger that is open. Steps are optimizer steps; `flush` is called where a run can be resumed."""

    def log(self, values: dict[str, float], step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self, status: int) -> None: ...


def logger_callback(logger: dict[str, Any], spec: RunSpec, work: Path) -> Logger | None:
    """The callback for a composed `logger`, or None for logger=none.

    Use it as a context manager around the training, so that it is closed also where that raises.

    Raises UserError: an unknown logger or mode, a missing or unknown key.
    """
    adapter: TypeAdapter[NoLogger | WandbLogger | TensorboardLogger] = TypeAdapter(
        Annotated[NoLogger | WandbLogger | TensorboardLogger, Field(discriminator="name")]
    )
    try:
        settings = adapter.validate_python(logger)
    except ValidationError as error:
        raise UserError(_describe(error)) from error
    if isinstance(settings, WandbLogger):
        return Logger("wandb", lambda step: Wandb(settings, spec, work))
    if isinstance(settings, TensorboardLogger):
        return Logger("tensorboard", lambda step: Tensorboard(work / "tensorboard", step))
    return None


def _describe(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(["logger", *(str(part) for part in item["loc"][1:])])  # the first is the logger's name
        shown = f"={item['input']!r}" if not isinstance(item["input"], dict) else ""
        lines.append(f"{key}{shown}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return "\n       ".join(lines) + ". Choices: conf/logger"


class Logger(TrainerCallback):
    """Passes the Trainer's logs on, in the first process alone.

    What fails is said once on stderr, and the logger is off from there on.
    """

    def __init__(self, name: str, start: Callable[[int], Open]):
        self.name = name
        self.start = start  # from the number of steps done before
        self.open: Open | None = None

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._close(INTERRUPTED if isinstance(error, KeyboardInterrupt) else int(error is not None))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:

            def start() -> None:
                self.open = self.start(state.global_step)

            self._guarded("can't start", start)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = {name: value for name, value in kwargs["logs"].items() if name != "epoch"}  # the step says as much
        if opened := self.open:
            self._guarded("can't write", lambda: opened.log(logs, state.global_step))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if opened := self.open:
            self._guarded("can't write", opened.flush)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._close(0 if state.global_step >= state.max_steps else INTERRUPTED)

    def _close(self, status: int) -> None:
        opened, self.open = self.open, None
        if opened:
            self._guarded("can't finish", lambda: opened.close(status))

    def _guarded(self, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a logger raises: the run is worth more
            self.open = None
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"warning: logger={self.name} {what}: {reason}; the run goes on without it", file=sys.stderr)


class Wandb:
    """A run of Weights & Biases with the id of ours, so that a resumed run goes on in the same one."""

    def __init__(self, settings: WandbLogger, spec: RunSpec, work: Path):
        import wandb  # here: it takes half a second

        folder = work / "wandb"
        folder.mkdir(parents=True, exist_ok=True)  # where it can't be written, wandb would take another one unsaid
        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            init_timeout=START_SECONDS,
            finish_timeout=FINISH_SECONDS,
        )
        wandb.setup(settings=quiet)
        if settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError(
                "no API key. Set WANDB_API_KEY or call `wandb login`; without a network: logger.mode=offline"
            )
        self.run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            dir=str(work),
            id=spec.id,
            name=f"{spec.task['name']} {spec.name} seed {spec.seed}",
            resume="allow",
            config=spec.model_dump(mode="json"),
            settings=quiet,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def flush(self) -> None:
        """wandb's own process has every value already."""

    def close(self, status: int) -> None:
        self.run.finish(exit_code=status)


class Tensorboard:
    """Event files. What an earlier process wrote of steps after `done`, which are made again, is hidden."""

    def __init__(self, folder: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second

        self.writer = SummaryWriter(str(folder), purge_step=done + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self, status: int) -> None:
        self.writer.close()
