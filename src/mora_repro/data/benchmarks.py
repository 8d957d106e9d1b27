"""What a model is measured by, and what a measurement gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..spec.run_spec import Eval


@dataclass(frozen=True)
class Questions:
    """Prompts that the model answers by greedy generation.

    `pairs` are (prompt, gold answer); `score(answer, gold)` gives, by metric, (points, of how many); a metric is the
    sum of the points in per cent of what could be had. `longest` says how many tokens an answer may take.
    """

    name: str
    pairs: Sequence[tuple[str, str]]
    score: Callable[[str, str], dict[str, tuple[float, float]]]
    longest: Callable[[PreTrainedTokenizerBase], int]


@dataclass(frozen=True)
class Harness:
    """A task of lm-eval, built in or one of `evaluation/tasks`, whose `metric` is shown under `name`.

    Its data are those that lm-eval names, or a local file or folder `data`, or generated `rows`. `shots` None: as the
    task has them. `validation`: ask its validation split. `limit` bounds the samples.
    """

    name: str
    task: str
    metric: str = "acc"
    shots: int | None = None
    data: str | None = None
    rows: Sequence[dict[str, Any]] | None = None
    validation: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class HeldOut:
    """Texts that are not trained on, measured by their perplexity per token, packed as the training texts are."""

    name: str
    texts: Iterable[str]


Benchmark = Questions | Harness | HeldOut


# The paper's columns, by the name that `eval.data.<name>` points at local files with.
KNOWN = {
    "mmlu": (Harness("mmlu_0shot", "mmlu", shots=0), Harness("mmlu_5shot", "mmlu", shots=5)),
    "pubmedqa": (Harness("pubmedqa", "pubmedqa"),),
    "usmle": (Harness("usmle", "medqa_4options"),),
}


def known(name: str, settings: Eval) -> tuple[Harness, ...]:
    """The benchmarks behind one of the paper's columns (two for `mmlu`), as a run's settings ask for them."""
    validation = settings.split == "validation"
    data = settings.data.get(name)
    return tuple(replace(one, data=data, validation=validation, limit=settings.limit) for one in KNOWN[name])


@dataclass(frozen=True)
class Scores:
    """Metrics by name (in per cent, but for perplexities), their standard errors and numbers of samples where they have
    any, and a row per sample: its benchmark, what was asked, answered and right, and its share of each metric."""

    metrics: dict[str, float]
    stderr: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
