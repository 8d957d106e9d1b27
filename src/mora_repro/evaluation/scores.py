"""Metrics with their standard errors and numbers of samples, from the scores of the samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from ..data.benchmarks import Scores

ENOUGH = 30  # samples, below which a standard error says little


def of_points(points: Sequence[dict[str, tuple[float, float]]]) -> Scores:
    """Scores of samples that each have, by metric, (points, of how many).

    The standard error is that of the mean of the samples' shares; one sample has none.
    """
    metrics, stderr, counts = {}, {}, {}
    for name in points[0]:
        got, of = [sample[name][0] for sample in points], [sample[name][1] for sample in points]
        metrics[name] = 100 * sum(got) / sum(of)
        counts[name] = len(points)
        if len(points) > 1:
            stderr[name] = 100 * statistics.stdev(g / o for g, o in zip(got, of)) / math.sqrt(len(points))
    return Scores(metrics, stderr, counts)


def together(scores: Iterable[Scores], mean_of: Sequence[str] = ()) -> Scores:
    """The scores of several benchmarks as one.

    `mean` is that of the metrics `mean_of`, taken as independent, where all of them were measured.
    """
    whole = Scores({})
    for part in scores:
        whole.metrics.update(part.metrics)
        whole.stderr.update(part.stderr)
        whole.counts.update(part.counts)
        whole.samples.extend(part.samples)
    if mean_of and whole.metrics.keys() >= set(mean_of):
        whole.metrics["mean"] = statistics.fmean(whole.metrics[name] for name in mean_of)
        if all(name in whole.stderr for name in mean_of):
            whole.stderr["mean"] = math.hypot(*(whole.stderr[name] for name in mean_of)) / len(mean_of)
            whole.counts["mean"] = sum(whole.counts[name] for name in mean_of)
    return whole
