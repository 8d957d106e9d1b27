"""UUID memorisation (paper, section 3), and copying, the general skill of its mini base.

A sample, with the part that the loss is on between arrows:

    c3c2c4ef-8f95-4b4f-9a4e-1d3f0b7a5e21:>>a5e1f6c8-0d0f-4d43-8d5a-6f1d2b3c4e5f</s><<

Keys and values are random (version 4) UUIDs, a function of the seed, so that no earlier knowledge helps.
Measured by character accuracy: the share of a value's 36 characters that greedy generation from the key
gets right at their place, in per cent; chance is 6 % for the digits, while the four dashes and the
version digit are always the same.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable, Sequence

from pydantic import PositiveInt

from ..spec.run_spec import Eval
from .benchmarks import Questions, longest_of
from .task import Sample, Task, pair

QUESTIONS_WHEN_COPYING = 64


class Uuid(Task):
    """`pairs` of UUIDs to memorise; with `copy_key`, each value is its key, and others are asked."""

    pairs: PositiveInt
    copy_key: bool

    def samples(self) -> Iterable[Sample]:
        return (pair(key, value) for key, value in self.pairs_to_train())

    def pairs_to_train(self) -> list[tuple[str, str]]:
        return self._draw("train", self.pairs)

    def benchmarks(self, settings: Eval) -> Sequence[Questions]:
        if self.copy_key:
            asked = self._draw(settings.split, QUESTIONS_WHEN_COPYING)[: settings.limit]
        else:
            asked = self.pairs_to_train()[: settings.limit]  # for validation too: what is measured is memory of these
        return [Questions(self.name, asked, score, longest_of(asked))]

    def _draw(self, split: str, count: int) -> list[tuple[str, str]]:
        digits = random.Random(f"{split} {self.seed}")
        pairs = []
        for _ in range(count):
            key, value = (str(uuid.UUID(int=digits.getrandbits(128), version=4)) for _ in range(2))
            pairs.append((f"{key}:", key if self.copy_key else value))
        return pairs


def score(answer: str, value: str) -> dict[str, tuple[float, float]]:
    """char_accuracy: right characters at their place; exact: whole values."""
    return {
        "char_accuracy": (sum(a == v for a, v in zip(answer, value)), len(value)),
        "exact": (answer == value, 1),
    }
