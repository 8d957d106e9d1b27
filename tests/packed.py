"""A task of documents, as those of corpora are, for tests of packing: its texts are lines of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from tiny import TINY

from mora_repro.data.benchmarks import HeldOut
from mora_repro.data.files import Corpus
from mora_repro.data.task import Sample, Task, document
from mora_repro.spec.run_spec import Eval


class Documents(Task):
    """Documents of `data`, held out by the text where `one_in` says how many."""

    packed: ClassVar[bool] = True
    one_in: int = 4

    def texts(self, split: str) -> Iterator[str | None]:
        rows = Corpus(self.data, {}, {}, "skip").held_out(split, {"text": str}, "text", one_in=self.one_in)
        return (row and row["text"] for row in rows)

    def samples(self) -> Iterator[Sample]:
        return (document(text) if text is not None else () for text in self.texts("train"))

    def benchmarks(self, settings: Eval) -> Sequence[HeldOut]:
        return [HeldOut("perplexity", [text for text in self.texts(settings.split) if text])]


# For a run of it. The recipe is that of uuid.
PACKED = [
    *(override for override in TINY if not override.startswith(("task.", "training.evaluate_at"))),
    "task._target_=packed.Documents",
    "~task.pairs",
    "~task.copy_key",
    "task.metric=perplexity",
    "training.max_length=24",
]
