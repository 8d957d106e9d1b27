"""What a model is measured by, and what a measurement gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
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


def longest_of(pairs: Sequence[tuple[str, str]]) -> Callable[[PreTrainedTokenizerBase], int]:
    """`Questions.longest` for answers that are known to be no longer than the gold ones: theirs, with the end token."""
    return lambda tokenizer: max(len(tokenizer(gold, add_special_tokens=False).input_ids) for _, gold in pairs) + 1


@dataclass(frozen=True)
class Harness:
    """A task of lm-eval, built in or one of `evaluation/tasks`, whose `metric` is shown under `name`.

    Its data are those that lm-eval names, or a local file or folder `data`, or generated `rows`. `shots` None: as the
    task has them. `validation`: ask its validation split. `limit` bounds the samples, of a group of tasks those of
    each. `metric` None: all of the task's, each under `name` and its own.
    """

    name: str
    task: str
    metric: str | None = "acc"
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
    "biommlu": (Harness("biommlu", "biommlu", shots=0),),
    "rct": (Harness("rct", "rct", metric="f1"),),
    "convfinqa": (Harness("convfinqa", "convfinqa", metric="exact_match"),),
    "fiqa_sa": (Harness("fiqa_sa", "fiqa_sa", metric="f1"),),
    "headline": (Harness("headline", "headline", metric="f1"),),
    "ner": (Harness("ner", "ner", metric="entity_f1"),),
    "fpb": (Harness("fpb", "fpb", metric="f1"),),
}


def known(name: str, settings: Eval) -> tuple[Harness, ...]:
    """The benchmarks behind one of the paper's columns (two for `mmlu`), as a run's settings ask for them."""
    validation = settings.split == "validation"
    data = settings.data.get(name)
    return tuple(replace(one, data=data, validation=validation, limit=settings.limit) for one in KNOWN[name])


def column_of(benchmark: Harness) -> str | None:
    """The paper's column that a benchmark stands behind, or None."""
    return next((column for column, ones in KNOWN.items() if any(one.name == benchmark.name for one in ones)), None)


def refuse_unread(given: Mapping[str, str], benchmarks: Sequence[Benchmark]) -> None:
    """Raises UserError where a local file is given for a benchmark that is not asked."""
    asked = dict.fromkeys((column_of(one) if isinstance(one, Harness) else None) or one.name for one in benchmarks)
    for name, path in given.items():
        if name not in asked:
            score = f"python scripts/evaluate.py run=<id> tasks=[{name}] data.{name}={path}"
            raise UserError(
                f"eval.data.{name}={path} would not be read: what is asked here is {', '.join(asked)}. Leave it out"
                + (f"; a trained model is scored by it with: {score}" if name in KNOWN else "")
            )


@dataclass(frozen=True)
class Scores:
    """Metrics by name (in per cent, but for perplexities), their standard errors and numbers of samples where they have
    any, and a row per sample: its benchmark, what was asked, answered and right, and its part of each metric
    (evaluation/scores.py)."""

    metrics: dict[str, float]
    stderr: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
