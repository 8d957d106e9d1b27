"""What every task offers to training and evaluation."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import hydra.utils
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..spec import RunSpec

IGNORED = -100  # the label of a token that the loss leaves out


@dataclass(frozen=True)
class Example:
    """One training sample: token ids, and labels of the same length (IGNORED where not trained)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TrainingSet:
    """`truncated` samples were cut at the maximal length; `dropped` ones had nothing left to train."""

    examples: list[Example]
    truncated: int = 0
    dropped: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def fingerprint(self) -> str:
        """sha256 (first 16 digits) of all token ids and labels."""
        rows = [[example.input_ids, example.labels] for example in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


class Task(BaseModel):
    """A task; its fields are the keys of conf/task/<name>.yaml. `metric` is the score that decides."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    metric: str
    seed: NonNegativeInt

    @abstractmethod
    def pairs_to_train(self) -> list[tuple[str, str]]:
        """(prompt, answer) texts; the loss is on the answer and the end token."""

    @abstractmethod
    def questions(self) -> list[tuple[str, str]]:
        """(prompt, gold answer) texts that the trained model is asked."""

    @cached_property
    def asked(self) -> list[tuple[str, str]]:
        """The questions, drawn or read once."""
        return self.questions()

    @abstractmethod
    def longest_answer(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """How many tokens an answer may take."""

    def notices(self) -> list[str]:
        """What the user should know of a valid task before it is run."""
        return []

    @abstractmethod
    def score(self, answers: list[str]) -> dict[str, float]:
        """Metrics in per cent, from the generated answers in the order of `questions`."""

    def training_set(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TrainingSet:
        """Tokenise the pairs: start token, prompt, answer, end token, cut at `max_length` tokens.

        Raises UserError where no sample is left.
        """
        examples, truncated, dropped = [], 0, 0
        for prompt, answer in self.pairs_to_train():
            prompt_ids = prompt_tokens(tokenizer, prompt)
            answer_ids = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            input_ids = (prompt_ids + answer_ids)[:max_length]
            labels = ([IGNORED] * len(prompt_ids) + answer_ids)[:max_length]
            truncated += len(prompt_ids) + len(answer_ids) > max_length
            if all(label == IGNORED for label in labels):
                dropped += 1
                continue
            examples.append(Example(input_ids, labels))
        if not examples:
            raise UserError(
                f"task={self.name}: no training sample has an answer within training.max_length={max_length} "
                f"tokens; raise it: training.max_length={4 * max_length}"
            )
        return TrainingSet(examples, truncated, dropped)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A prompt's token ids, after the start token where the tokenizer has one."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + tokenizer(prompt, add_special_tokens=False).input_ids


def build_task(spec: RunSpec) -> Task:
    """The spec's task, its fields validated (UserError)."""
    try:
        task = hydra.utils.instantiate(spec.task)
    except hydra.errors.InstantiationException as error:
        if isinstance(error.__cause__, ValidationError):
            item = error.__cause__.errors()[0]
            key = ".".join(["task", *(str(part) for part in item["loc"])])
            problem = item["msg"].removeprefix("Value error, ").lower()
            raise UserError(f"{key}={item['input']!r}: {problem}.") from error
        raise
    assert isinstance(task, Task)
    return task
