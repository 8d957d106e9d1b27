"""From a task's samples to token ids."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..spec import RunSpec
from .task import IGNORED, Sample, Task, prompt_tokens


@dataclass(frozen=True)
class Example:
    """One training example: token ids, and labels of the same length (IGNORED where not trained)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TrainingSet:
    """`truncated` samples were cut at the maximal length; `dropped` ones had nothing left to train."""

    examples: list[Example]
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def fingerprint(self) -> str:
        """sha256 (first 16 digits) of all token ids and labels."""
        rows = [[example.input_ids, example.labels] for example in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def tokenise(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Example:
    """The start token, then each segment by itself, so that a prompt has the same tokens here and when it is asked."""
    input_ids = prompt_tokens(tokenizer, "")
    labels = [IGNORED] * len(input_ids)
    for segment in sample:
        ids = tokenizer(segment.text, add_special_tokens=False).input_ids
        if segment.ends:
            ids = [*ids, tokenizer.eos_token_id]
        input_ids += ids
        labels += ids if segment.trained else [IGNORED] * len(ids)
    return Example(input_ids, labels)


def prepare(spec: RunSpec, task: Task, tokenizer: PreTrainedTokenizerBase) -> TrainingSet:
    """Tokenise a task's samples, each cut at `training.max_length` tokens.

    Raises UserError where no sample is left.
    """
    max_length = spec.training.max_length
    examples, truncated, dropped = [], 0, 0
    for sample in task.samples():
        example = tokenise(tokenizer, sample)
        truncated += len(example.input_ids) > max_length
        example = Example(example.input_ids[:max_length], example.labels[:max_length])
        if all(label == IGNORED for label in example.labels):
            dropped += 1
            continue
        examples.append(example)
    if not examples:
        raise UserError(
            f"task={task.name}: no training sample has an answer within training.max_length={max_length} "
            f"tokens; raise it: training.max_length={4 * max_length}"
        )
    return TrainingSet(examples, truncated, dropped)
