"""Tasks of plain texts, all of whose tokens are trained: pretraining, from scratch (`pretrain`) or on a domain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import ClassVar

from ..errors import UserError
from ..spec.run_spec import Eval
from .benchmarks import HeldOut
from .files import SUFFIXES, Corpus, Row, Split
from .task import CorpusTask

COLUMNS = {"text": str}


class TextTask(CorpusTask):
    """`data` is generated, hub, or a local file or folder (mora_repro/data/files.py) with `text` in each row.

    A corpus without a validation or test set of its own has one held out of its documents, and a folder without a
    training set is one corpus of all its files.
    """

    packed: ClassVar[bool] = True

    def texts(self, split: Split, limit: int | None = None) -> Iterator[str | None]:
        """The documents of a split of the corpus, at most `limit`; None for a row that is skipped."""
        root = Path(self.data)
        corpora = [self.corpus]
        if root.is_dir() and not self.corpus.has("train"):
            files = sorted(path for path in root.iterdir() if path.name.endswith(SUFFIXES))
            corpora = [replace(self.corpus, data=str(path)) for path in files] or corpora
        rows = (one.own_or_held_out(split, COLUMNS, key="text", limit=limit) for one in corpora)
        return islice(map(_text, chain.from_iterable(rows)), limit)

    def held_out(self, settings: Eval, limit: int) -> HeldOut:
        """At most `limit` documents that are not trained on, or all those of `eval.data.perplexity`.

        Raises UserError where there are none.
        """
        if path := settings.data.get("perplexity"):
            rows = self._instead(Path(path), settings)
        else:
            rows = self.texts(settings.split, min(limit, settings.limit or limit))
        texts = [text for text in rows if text is not None]
        if not texts:
            raise UserError(
                f"task.data={self.data} has too few documents: one in a hundred is held out for {settings.split}, and "
                f"here that is none. Give it a few hundred (blank lines are between those of a text file), or other "
                f"documents to measure the perplexity of: eval.data.perplexity=<file>"
            )
        return HeldOut("perplexity", texts)

    def _instead(self, path: Path, settings: Eval) -> Iterator[str | None]:
        """The documents of a file, or of the set of a folder that is asked for."""
        if not path.exists():
            raise UserError(
                f"eval.data.perplexity={path} is not there. It should be a file of documents, or a folder with "
                f"{settings.split}.txt (or one of {', '.join(SUFFIXES)})"
            )
        split = settings.split if path.is_dir() else "train"  # of a file, that is all
        corpus = Corpus(str(path), {}, self.columns, self.on_bad_row)
        return map(_text, corpus.rows(split, COLUMNS, settings.limit))


def _text(row: Row | None) -> str | None:
    return None if row is None else str(row["text"])
