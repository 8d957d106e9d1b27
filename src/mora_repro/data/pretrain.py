"""Language modelling from scratch (paper, section 5.4): text alone, packed into blocks, all of it trained.

A document of the generated language (mora_repro/data/grammar.py):

    a misi nekat a sali funu denu so a bopo gosi that kuzet with Ruba a logo sebe samat a nemi zova . the gosi
    that komat a nire miga komat with Ruba the miga . the nivi migas lame some febo toras but the migas bari a gipa .

At scale paper, the documents are those of C4's English part (Raffel et al. 2020), and any text file or folder of them
can take their place. Measured by perplexity on documents that are not trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from pydantic import PositiveInt

from ..spec.run_spec import Eval
from .benchmarks import Benchmark
from .files import Split
from .grammar import documents
from .task import Sample, document
from .texts import TextTask

VOCABULARY_DOCUMENTS = 1000


class Pretrain(TextTask):
    """`documents` is how many are generated, `test_limit` how many are measured at most."""

    documents: PositiveInt
    test_limit: PositiveInt

    def samples(self) -> Iterable[Sample]:
        return (document(text) if text is not None else () for text in self.texts("train"))

    def benchmarks(self, settings: Eval) -> Sequence[Benchmark]:
        return [self.held_out(settings, self.test_limit)]

    def vocabulary(self) -> Iterable[str]:
        """Of a corpus its first documents: what they are made of does not depend on the seed either."""
        if self.data == "generated":
            return documents(0, "vocabulary", VOCABULARY_DOCUMENTS)
        return (text for text in islice(self.texts("train"), VOCABULARY_DOCUMENTS) if text is not None)

    def texts(self, split: Split, limit: int | None = None) -> Iterator[str | None]:
        if self.data == "generated":
            return documents(self.seed, split, limit or self.documents)
        return super().texts(split, limit)
