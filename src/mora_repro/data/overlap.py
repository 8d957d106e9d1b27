"""Text of the benchmarks in training samples: 13-grams of words that both have (as Brown et al. 2020 look for it)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .benchmarks import Benchmark, HeldOut, Questions, column_of
from .sources import rows_of

N = 13
_WORD = re.compile(r"[^\W_]+")
# Powers of an odd number: a product of 64 bits that depends on each word and its place.
_FACTORS = np.array([pow(0x9E3779B97F4A7C15, power, 1 << 64) for power in range(1, N + 1)], np.uint64)


def ngrams(text: str) -> np.ndarray:
    """A hash of 64 bits of each 13 words in a row, lower case and without punctuation; the same in every process."""
    words = np.array([zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())], np.uint64)
    if len(words) < N:
        return np.empty(0, np.uint64)
    return np.lib.stride_tricks.sliding_window_view(words, N) @ _FACTORS


def overlaps(text: str, grams: np.ndarray) -> bool:
    """Whether a text has one of the n-grams, which are sorted."""
    if not len(grams):
        return False
    found = ngrams(text)
    places = np.searchsorted(grams, found)
    return bool((grams[np.minimum(places, len(grams) - 1)] == found).any())


def ngrams_of(benchmarks: Iterable[Benchmark]) -> tuple[np.ndarray, list[str]]:
    """The n-grams of the benchmarks' texts, sorted, and the names of those whose texts are not at hand."""
    grams: list[np.ndarray] = []
    unknown = []
    for benchmark in benchmarks:
        texts = _texts(benchmark)
        if texts is None:
            unknown.append(benchmark.name)
        else:
            grams += [np.unique(ngrams(text)) for text in texts]
    return np.unique(np.concatenate(grams or [np.empty(0, np.uint64)])), unknown


def _texts(benchmark: Benchmark) -> Iterable[str] | None:
    """What a benchmark asks or measures; None where that is lm-eval's to fetch."""
    if isinstance(benchmark, Questions):
        return _without_what_all_have([prompt for prompt, _ in benchmark.pairs])
    if isinstance(benchmark, HeldOut):
        return benchmark.texts
    if benchmark.rows is not None:
        return _without_what_all_have([row["input"] for row in benchmark.rows])
    if column := column_of(benchmark):
        rows = rows_of(column, benchmark.data, "validation" if benchmark.validation else "test")
        return (text for row in rows for text in _texts_in(row))
    return None


def _without_what_all_have(prompts: Sequence[str]) -> list[str]:
    """Without the start and the end that all share: a template, which training prompts may have too."""
    if len(set(prompts)) < 2:
        return list(prompts)
    start = _shared(prompts)
    end = _shared([prompt[start:][::-1] for prompt in prompts])
    return [prompt[start : len(prompt) - end] for prompt in prompts]


def _shared(texts: Sequence[str]) -> int:
    """How many characters all texts start with."""
    first, last = min(texts), max(texts)
    return next(
        (place for place, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), min(len(first), len(last))
    )


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(part)
