"""Language modelling from scratch (paper, section 5.4): text alone, packed into blocks, all of it trained.

A document of the generated language (mora_repro/data/grammar.py):

    a misi nekat a sali funu denu so a bopo gosi that kuzet with Ruba a logo sebe samat a nemi zova . the gosi
    that komat a nire miga komat with Ruba the miga . the nivi migas lame some febo toras but the migas bari a gipa .

At scale paper, the documents are those of C4's English part (Raffel et al. 2020), and any text file or folder of them
can take their place. Measured by perplexity on documents that are not trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import PositiveInt

from ..spec.run_spec import Eval
from .benchmarks import Benchmark, HeldOut
from .files import SUFFIXES, Corpus, Row, Split
from .grammar import documents
from .task import Sample, Task, document

VOCABULARY_DOCUMENTS = 1000
COLUMNS = {"text": str}


class Pretrain(Task):
    """`data` is generated, hub, or a local file or folder (mora_repro/data/files.py) with `text` in each row.

    A corpus without a validation or test set of its own has one held out of its documents, and a folder without a
    training set is one corpus of all its files. `documents` is how many are generated, `test_limit` how many are
    measured at most.
    """

    packed: ClassVar[bool] = True

    hub: dict[str, dict[str, str | None]]
    columns: dict[str, str]
    on_bad_row: Literal["stop", "skip"]
    documents: PositiveInt
    test_limit: PositiveInt

    def samples(self) -> Iterable[Sample]:
        return (document(text) if text is not None else () for text in self.texts("train"))

    def benchmarks(self, settings: Eval) -> Sequence[Benchmark]:
        if path := settings.data.get("perplexity"):
            texts = self._rows(self._corpus(path), "train", settings.limit)
        else:
            texts = self.texts(settings.split, min(self.test_limit, settings.limit or self.test_limit))
        return [HeldOut("perplexity", [text for text in texts if text is not None])]

    def vocabulary(self) -> Iterable[str]:
        """Of a corpus its first documents: what they are made of does not depend on the seed either."""
        if self.data == "generated":
            return documents(0, "vocabulary", VOCABULARY_DOCUMENTS)
        return (text for text in islice(self.texts("train"), VOCABULARY_DOCUMENTS) if text is not None)

    def texts(self, split: Split, limit: int | None = None) -> Iterator[str | None]:
        """The documents of a split, at most `limit`; None for a row that is skipped."""
        if self.data == "generated":
            yield from documents(self.seed, split, limit or self.documents)
            return
        corpus = self._corpus(self.data)
        root = Path(self.data)
        if root.is_dir() and not corpus.has("train"):
            files = sorted(path for path in root.iterdir() if path.name.endswith(SUFFIXES))
            corpora = [replace(corpus, data=str(path)) for path in files] or [corpus]
        else:
            corpora = [corpus]
        yield from islice((text for one in corpora for text in self._of_split(one, split, limit)), limit)

    def _of_split(self, corpus: Corpus, split: Split, limit: int | None) -> Iterator[str | None]:
        whole = corpus.has("validation") and corpus.has("test") if split == "train" else corpus.has(split)
        if whole:
            return self._rows(corpus, split, limit)
        return map(_text, corpus.held_out(split, COLUMNS, key="text", limit=limit))

    def _rows(self, corpus: Corpus, split: Split, limit: int | None) -> Iterator[str | None]:
        return map(_text, corpus.rows(split, COLUMNS, limit))

    def _corpus(self, data: str) -> Corpus:
        return Corpus(data, self.hub, self.columns, self.on_bad_row)


def _text(row: Row | None) -> str | None:
    return None if row is None else str(row["text"])
