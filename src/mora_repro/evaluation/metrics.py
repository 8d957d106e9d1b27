"""The metrics of our tasks for lm-eval (tasks/*.yaml): a sample's results, and their aggregations in its registry."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.registry import register_aggregation
from sklearn.metrics import f1_score

_ENTITY = re.compile(r"([^,;()\n]+?)\s*\((\w+)\)")
_AMOUNT = re.compile(
    r"([-+]?)\s?[$€£]?\s?(\d[\d,]*\.?\d*|\.\d+)(?:e([-+]?\d+))?\s?(%|bn\b|billion\b|[kmb]\b|million\b)?", re.I
)
_UNITS = {"%": 0.01, "k": 1e3, "m": 1e6, "million": 1e6, "b": 1e9, "bn": 1e9, "billion": 1e9}


@register_aggregation("weighted_f1")
def weighted_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """F1 of each class, weighted by its share of the (gold, answer) pairs' golds."""
    return _f1(pairs, "weighted")


@register_aggregation("micro_f1")
def micro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """F1 over all classes' decisions together; with one answer per sample it is the accuracy."""
    return _f1(pairs, "micro")


@register_aggregation("mean_of_weighted_f1")
def mean_of_weighted_f1(triples: Sequence[tuple[Any, int, int]]) -> float:
    """The weighted F1 within each group of (group, gold, answer), then the mean over groups."""
    return statistics.fmean(map(weighted_f1, _groups(triples)))


@register_aggregation("mean_of_means")
def mean_of_means(pairs: Sequence[tuple[Any, float]]) -> float:
    """The mean within each group of (group, value), then the mean over groups."""
    return statistics.fmean(statistics.fmean(value for (value,) in group) for group in _groups(pairs))


def _f1(pairs: Sequence[tuple[int, int]], average: str) -> float:
    golds, answers = zip(*pairs)
    return float(f1_score(golds, answers, average=average, zero_division=0.0))


def _groups(rows: Sequence[Sequence[Any]]) -> list[list[tuple[Any, ...]]]:
    groups: dict[Any, list[tuple[Any, ...]]] = defaultdict(list)
    for group, *rest in rows:
        groups[group].append(tuple(rest))
    return list(groups.values())


def headline_results(row: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """(kind of question, gold, answer); the answer is the option of the highest log-likelihood."""
    likelihoods = [likelihood for likelihood, _ in results]
    return {"f1": (row["class_id"], row["gold_index"], likelihoods.index(max(likelihoods)))}


def ner_results(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F1 of the row's entities; one is right where both its text and its type are."""
    gold, found = entities(_first_label(row)), entities(results[0])
    if not gold and not found:
        return {"entity_f1": 1.0}
    return {"entity_f1": 2 * len(gold & found) / (len(gold) + len(found))}


def entities(text: str) -> set[tuple[str, str]]:
    """(text, type) of each "text (TYPE)" in a list of entities."""
    return {(" ".join(name.split()), kind.upper()) for name, kind in _ENTITY.findall(text)}


def convfinqa_results(row: dict[str, Any], results: list[str]) -> dict[str, int]:
    """Whether some number in the answer's first line is within 0.01 of the gold one."""
    gold = amounts(_first_label(row))
    found = amounts(results[0].strip().partition("\n")[0])
    return {
        "exact_match": int(bool(gold) and any(math.isclose(one, gold[0], rel_tol=0, abs_tol=0.01) for one in found))
    }


def amounts(text: str) -> list[float]:
    """The numbers of a text, without commas and currency signs, per cent as hundredths, k, m and bn multiplied out."""
    return [
        float(f"{sign}{digits.replace(',', '')}e{exponent or 0}") * _UNITS.get(unit.lower(), 1)
        for sign, digits, exponent, unit in _AMOUNT.findall(text)
    ]


def _first_label(row: dict[str, Any]) -> str:
    return row["label"] if isinstance(row["label"], str) else row["label"][0]
