"""Language modelling from scratch (paper, section 5.4): text alone, packed into blocks, all of it trained.

A document of the generated language (mora_repro/data/grammar.py):

    EXAMPLE

At scale paper, the documents are those of C4's English part (Raffel et al. 2020). Measured by perplexity on documents
that are not trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from pydantic import PositiveInt

from ..spec.run_spec import Eval
from .benchmarks import Benchmark, HeldOut
from .grammar import documents
from .task import Sample, Task, document

VOCABULARY_DOCUMENTS = 1000


class Pretrain(Task):
    """`data` is generated, hub, or a local file or folder (mora_repro/data/files.py)."""

    packed: ClassVar[bool] = True

    data: str
    documents: PositiveInt
    test_limit: PositiveInt

    def samples(self) -> Iterable[Sample]:
        return (document(text) for text in documents(self.seed, "train", self.documents))

    def benchmarks(self, settings: Eval) -> Sequence[Benchmark]:
        limit = min(self.test_limit, settings.limit or self.test_limit)
        return [HeldOut("perplexity", list(documents(self.seed, settings.split, limit)))]

    def vocabulary(self) -> Iterable[str]:
        return documents(0, "vocabulary", VOCABULARY_DOCUMENTS)
