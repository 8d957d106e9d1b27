"""From samples of text to token ids, many at a time, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import resource_tracker

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .overlap import overlaps
from .task import IGNORED, Sample, prompt_tokens

BATCH = 500_000  # characters that are tokenised at a time
INLINE = 16  # batches that this process does alone: starting others takes as long


@dataclass(frozen=True)
class Example:
    """One training example: token ids, and labels of the same length (IGNORED where not trained).

    In a block of several documents, `position_ids` start anew with each; else None.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int] | None = None


def tokenise(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> list[Example]:
    """The start token, then each segment by itself, so that a prompt has the same tokens here and when it is asked."""
    texts = [segment.text for sample in samples for segment in sample]
    tokens = iter(tokenizer(texts, add_special_tokens=False).input_ids if texts else [])
    examples = []
    for sample in samples:
        input_ids = prompt_tokens(tokenizer, "")
        labels = [IGNORED] * len(input_ids)
        for segment in sample:
            ids = next(tokens)
            if segment.ends:
                ids = [*ids, tokenizer.eos_token_id]
            input_ids += ids
            labels += ids if segment.trained else [IGNORED] * len(ids)
        examples.append(Example(input_ids, labels))
    return examples


@dataclass(frozen=True)
class Tokens:
    """Tokenised samples, one after the other: their token ids, where the loss is, their lengths, and how many were cut,
    left out for a row that can't be read (`skipped`), for a text of a benchmark (`overlap`) or without a trained token
    (`dropped`)."""

    ids: np.ndarray
    trained: np.ndarray
    lengths: list[int]
    characters: int = 0
    truncated: int = 0
    dropped: int = 0
    skipped: int = 0
    overlap: int = 0


@dataclass(frozen=True)
class Tokeniser:
    """What makes Tokens of samples. Each is cut at `max_length`, where it is given; samples that share one of the
    n-grams `left_out` are left out or, with `keep_overlap`, counted alone."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    left_out: np.ndarray | None = None
    keep_overlap: bool = False

    def __call__(self, samples: Sequence[Sample]) -> Tokens:
        read = [sample for sample in samples if sample]
        overlapping = [self._overlaps(sample) for sample in read]
        kept = [sample for sample, found in zip(read, overlapping) if self.keep_overlap or not found]
        ids, trained, lengths, truncated, dropped = [], [], [], 0, 0
        for example in tokenise(self.tokenizer, kept):
            truncated += self.max_length is not None and len(example.input_ids) > self.max_length
            mask = np.array(example.labels[: self.max_length]) != IGNORED
            if not mask.any():
                dropped += 1
                continue
            ids.append(np.array(example.input_ids[: self.max_length], np.uint32))
            trained.append(mask)
            lengths.append(len(mask))
        return Tokens(
            np.concatenate(ids or [np.empty(0, np.uint32)]),
            np.concatenate(trained or [np.empty(0, bool)]),
            lengths,
            _characters(samples),
            truncated,
            dropped,
            len(samples) - len(read),
            sum(overlapping),
        )

    def _overlaps(self, sample: Sample) -> bool:
        return self.left_out is not None and overlaps("\n".join(part.text for part in sample), self.left_out)

    def all(self, samples: Iterable[Sample], inline: bool = False) -> Iterator[Tokens]:
        """The Tokens of all samples in their order; of many, in a process per core, unless `inline`.

        A bounded number of batches is in memory, whatever the number of samples.
        """
        batches = _batches(samples)
        first = list(islice(batches, INLINE))
        if inline or len(first) < INLINE:
            yield from map(self, chain(first, batches))
            return
        workers = processes()
        # Not forked: this process has threads (of torch, of the other processes' connections).
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (self,)) as pool:
            waiting: deque = deque()
            try:
                for batch in chain(first, batches):
                    with _ctrl_c_kept_from_new_processes():
                        waiting.append(pool.submit(_tokens, batch))
                    if len(waiting) > 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_kept_from_new_processes() -> Iterator[None]:
    """Processes that start within have SIGINT blocked, while they still import too: the first process answers it."""
    resource_tracker.ensure_running()  # now: its start unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def processes() -> int:
    """How many processes tokenise a large corpus: one per core."""
    return len(os.sched_getaffinity(0))


def _characters(samples: Iterable[Sample]) -> int:
    return sum(len(segment.text) for sample in samples for segment in sample)


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    size = 0
    for sample in samples:
        batch.append(sample)
        size += 1 + _characters([sample])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------
# In a process of the pool

_tokeniser: Tokeniser


def _start(tokeniser: Tokeniser) -> None:
    global _tokeniser
    _tokeniser = tokeniser
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are one per core
    transformers_logging.set_verbosity_error()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes no queue of the pool."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokens(samples: Sequence[Sample]) -> Tokens:
    return _tokeniser(samples)
