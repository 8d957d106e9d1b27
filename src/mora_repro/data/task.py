"""What every task offers: samples to train on, and benchmarks that measure the trained model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import hydra.utils
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..spec import RunSpec
from ..spec.run_spec import LATER_TASK_KEYS, Eval
from .benchmarks import Benchmark
from .files import Corpus

IGNORED = -100  # the label of a token that the loss leaves out


@dataclass(frozen=True)
class Segment:
    """A piece of a sample's text. The loss is on it where it is `trained`; `ends`: the end token follows it."""

    text: str
    trained: bool
    ends: bool = False


Sample = tuple[Segment, ...]


def pair(prompt: str, answer: str) -> Sample:
    """A prompt and its answer; the loss is on the answer and the end token."""
    return Segment(prompt, trained=False), Segment(answer, trained=True, ends=True)


def document(text: str) -> Sample:
    """A text whose every token is trained, the end token too."""
    return (Segment(text, trained=True, ends=True),)


class Task(BaseModel):
    """A task; its fields are the keys of conf/task/<name>.yaml. `metric` is the score that decides.

    `data` is generated, or a corpus: hub, a folder or a file. Samples of a corpus that have a text of a benchmark are
    left out, or kept and counted, as `overlapping` says; it is read up to about `max_tokens` (None: all). A `packed`
    task's samples are documents, put one after the other into blocks of the maximal length; else each sample is padded.
    `mean_of` are the metrics whose mean is a metric `mean`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    metric: str
    seed: NonNegativeInt
    data: str = "generated"
    overlapping: Literal["drop", "keep"] = "drop"
    max_tokens: PositiveInt | None = None

    packed: ClassVar[bool] = False
    mean_of: ClassVar[tuple[str, ...]] = ()

    @property
    def from_corpus(self) -> bool:
        return self.data != "generated"

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The task for a model's tokenizer; it differs where a task takes the tokenizer's chat template."""
        return self

    @abstractmethod
    def samples(self) -> Iterable[Sample]:
        """The training samples, in an order that the task's fields decide; read or made as they are asked for."""

    @abstractmethod
    def benchmarks(self, settings: Eval) -> Sequence[Benchmark]:
        """What the trained model is measured by. Raises UserError where a benchmark's data are not there."""

    def vocabulary(self) -> Iterable[str]:
        """Texts of the task's world, whatever its seed, from which `model.tokenizer=task` learns its tokens."""
        raise UserError(
            f"task={self.name} has no text for a tokenizer to learn from. One token per byte: model.tokenizer=bytes"
        )

    def notices(self) -> list[str]:
        """What the user should know of a valid task before it is run."""
        return []


class CorpusTask(Task):
    """A task that is trained on a generated world or on a corpus; `hub`, `columns` and `on_bad_row` are those of
    `Corpus`."""

    data: str
    hub: dict[str, dict[str, str | None]]
    columns: dict[str, str] = {}
    on_bad_row: Literal["stop", "skip"] = "stop"

    @property
    def corpus(self) -> Corpus:
        return Corpus(self.data, self.hub, self.columns, self.on_bad_row)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A prompt's token ids, after the start token where the tokenizer has one."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + tokenizer(prompt, add_special_tokens=False).input_ids


def build_task(spec: RunSpec) -> Task:
    """The spec's task, its fields validated (UserError); a record's may be older than some of them."""
    kind: type[Task] = hydra.utils.get_class(spec.task["_target_"])
    later = {key: value for key, value in LATER_TASK_KEYS.items() if key in kind.model_fields}
    try:
        task = hydra.utils.instantiate(later | spec.task)
    except hydra.errors.InstantiationException as error:
        if isinstance(error.__cause__, ValidationError):
            item = error.__cause__.errors()[0]
            key = ".".join(["task", *(str(part) for part in item["loc"])])
            problem = item["msg"].removeprefix("Value error, ").lower()
            raise UserError(f"{key}={item['input']!r}: {problem}.") from error
        raise
    assert isinstance(task, Task)
    return task
