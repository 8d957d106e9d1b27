"""Metrics with their standard errors and numbers of samples, from the rows of the samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..data.benchmarks import Scores

ENOUGH = 30  # samples, below which a standard error says little
RESAMPLES = 200  # of a bootstrap, enough for a standard error (Efron and Tibshirani 1993, chapter 6)


def scored(samples: Sequence[dict[str, Any]]) -> Scores:
    """The scores of samples, measured now or read from where they were stored.

    A sample's `metrics` have, by name, a number; [points, of how many]; or {aggregation: value}, where the aggregation
    is one of lm-eval's registry, ours of `metrics.py` among them, and the value is what it takes of each sample.
    `cut_prompts` is among the metrics where any had to be cut.
    """
    values: dict[str, list[Any]] = {}
    for sample in samples:
        for name, value in sample["metrics"].items():
            values.setdefault(name, []).append(value)
    scores = Scores({}, samples=list(samples))
    for name, of_metric in values.items():
        scores.counts[name] = len(of_metric)
        if isinstance(of_metric[0], dict):
            _aggregate(scores, name, of_metric)
        else:
            _mean(scores, name, of_metric)
    if cut := sum(sample.get("cut", False) for sample in samples):
        scores.metrics["cut_prompts"] = float(cut)
    return scores


def _mean(scores: Scores, name: str, values: Sequence[Any]) -> None:
    """What was had of what could be had; its standard error is that of the mean of the samples' shares."""
    pairs = [value if isinstance(value, list | tuple) else (value, 1) for value in values]
    scores.metrics[name] = 100 * sum(got for got, _ in pairs) / sum(of for _, of in pairs)
    if len(pairs) > 1:
        shares = statistics.stdev(got / of for got, of in pairs)
        scores.stderr[name] = 100 * shares / math.sqrt(len(pairs))


def _aggregate(scores: Scores, name: str, values: Sequence[dict[str, Any]]) -> None:
    """An aggregation of lm-eval's registry, and its standard error by bootstrap over the samples."""
    import numpy as np  # both, and lm-eval, take seconds, and most runs need none of them
    from lm_eval.api.registry import get_aggregation
    from scipy.stats import bootstrap

    from . import metrics  # noqa: F401  registers ours

    [aggregation] = values[0]
    of_samples = [value[aggregation] for value in values]
    function: Callable[[list[Any]], float] | None = get_aggregation(aggregation)
    assert function is not None, aggregation
    factor = 1 if aggregation in NOT_IN_PER_CENT else 100
    scores.metrics[name] = factor * float(function(of_samples))
    if len(of_samples) > 1:
        resampled = bootstrap(
            (np.arange(len(of_samples)),),
            lambda chosen: function([of_samples[index] for index in chosen]),
            vectorized=False,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        scores.stderr[name] = factor * float(resampled.standard_error)


NOT_IN_PER_CENT = ("perplexity", "weighted_perplexity", "bits_per_byte")


def together(scores: Iterable[Scores], mean_of: Sequence[str] = ()) -> Scores:
    """The scores of several benchmarks as one.

    `mean` is that of the metrics `mean_of`, taken as independent, where all of them were measured.
    """
    whole = Scores({})
    for part in scores:
        cut = whole.metrics.get("cut_prompts", 0.0) + part.metrics.get("cut_prompts", 0.0)
        whole.metrics.update(part.metrics)
        whole.stderr.update(part.stderr)
        whole.counts.update(part.counts)
        whole.samples.extend(part.samples)
        if cut:
            whole.metrics["cut_prompts"] = cut
    if mean_of and whole.metrics.keys() >= set(mean_of):
        whole.metrics["mean"] = statistics.fmean(whole.metrics[name] for name in mean_of)
        if all(name in whole.stderr for name in mean_of):
            whole.stderr["mean"] = math.hypot(*(whole.stderr[name] for name in mean_of)) / len(mean_of)
            whole.counts["mean"] = sum(whole.counts[name] for name in mean_of)
    return whole
