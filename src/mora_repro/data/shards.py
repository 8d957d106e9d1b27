"""Token ids on disk: arrays of numpy that are mapped into memory, and an index that knows their checksums."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from ..disk import write_atomically
from ..spec.run_spec import Strict
from .task import IGNORED
from .tokens import Example, Tokens

SHARD = 1 << 23  # tokens
ARRAYS = ("tokens", "trained", "starts")
INDEX = "index.json"


class Shard(Strict):
    """One part of a training set: for each of ARRAYS a file's size in bytes and sha256. `starts` are the places of the
    samples (or documents) in it, and its end."""

    tokens: int
    samples: int
    files: dict[str, tuple[int, str]]


class Index(Strict):
    """What a folder holds.

    `samples` are those trained on (documents, where packed into a `block` of so many tokens), and `tokens` theirs; for
    the counts see Tokens. `overlap` None: not looked for; `unchecked` are benchmarks whose texts were not at hand.
    """

    block: int | None
    samples: int = 0
    tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    skipped: int = 0
    overlap: int | None = None
    unchecked: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()


class TrainingSet:
    """The training examples of a folder, read when they are asked for; its index's counts are attributes.

    Packed, an example is a block of exactly `index.block` tokens, whose documents have positions of their own; no token
    is predicted from another document's.
    """

    def __init__(self, folder: Path, index: Index):
        self.folder, self.index = folder, index
        counts = [shard.tokens // index.block if index.block else shard.samples for shard in index.shards]
        self._ends = list(accumulate(counts))
        self._arrays = [
            {name: np.load(folder / f"{name}-{number:05}.npy", mmap_mode="r") for name in ARRAYS}
            for number in range(len(index.shards))
        ]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        place = index - (self._ends[shard - 1] if shard else 0)
        arrays = self._arrays[shard]
        if size := self.index.block:
            return _block(arrays, place * size, (place + 1) * size)
        start, end = arrays["starts"][place : place + 2].tolist()
        ids = arrays["tokens"][start:end].astype(np.int64)
        return Example(ids.tolist(), np.where(arrays["trained"][start:end], ids, IGNORED).tolist())

    @cached_property
    def lengths(self) -> list[int]:
        """Of the examples, in tokens."""
        if self.index.block:
            return [self.index.block] * len(self)
        return [int(length) for arrays in self._arrays for length in np.diff(arrays["starts"])]

    def notices(self) -> list[str]:
        """What was done to the samples, and the user should know."""
        index = self.index
        told = [
            (index.truncated, "samples cut at training.max_length"),
            (index.dropped, "samples left out that have no trained token within training.max_length"),
            (index.skipped, "rows left out that could not be read (task.on_bad_row=skip)"),
            (index.overlap, "samples share 13 words in a row with a benchmark (task.overlapping=drop leaves them out)"),
        ]
        unchecked = f"not looked for in the training samples: the texts of {', '.join(index.unchecked)}, which "
        unchecked += "lm-eval fetches; with eval.data.<name>=<file> they are"
        return [f"{count} {what}" for count, what in told if count] + [unchecked] * bool(index.unchecked)

    @property
    def fingerprint(self) -> str:
        """sha256 (first 16 digits) of all token ids and of where the loss is."""
        sums = "".join(sha for shard in self.index.shards for _, sha in shard.files.values())
        return hashlib.sha256(f"{self.index.block} {sums}".encode()).hexdigest()[:16]

    @property
    def tokens(self) -> int:
        return self.index.tokens

    @property
    def truncated(self) -> int:
        return self.index.truncated

    @property
    def dropped(self) -> int:
        return self.index.dropped

    @property
    def skipped(self) -> int:
        return self.index.skipped

    @property
    def overlap(self) -> int | None:
        return self.index.overlap


def _block(arrays: Mapping[str, np.ndarray], start: int, end: int) -> Example:
    """The documents, or parts of them, between two places."""
    starts = arrays["starts"]
    inside = starts[np.searchsorted(starts, start, "right") : np.searchsorted(starts, end)]
    begins = np.array([start, *inside])
    positions = np.arange(start, end) - np.repeat(begins, np.diff([*begins, end]))
    ids = arrays["tokens"][start:end].astype(np.int64)
    labels = np.where(arrays["trained"][start:end] & (positions > 0), ids, IGNORED)
    return Example(ids.tolist(), labels.tolist(), positions.tolist())


def _filling(tokens: int, fill: int) -> Tokens:
    """So many tokens that are not trained."""
    return Tokens(np.full(tokens, fill, np.uint32), np.zeros(tokens, bool), [tokens])


def blocks_of(parts: Iterable[Tokens], block: int, fill: int) -> list[Example]:
    """The blocks that `write` would make of documents, in memory."""
    parts = list(parts)
    if rest := -sum(len(part.ids) for part in parts) % block:
        parts.append(_filling(rest, fill))
    lengths = [length for part in parts for length in part.lengths]
    arrays = {
        "tokens": np.concatenate([part.ids for part in parts] or [np.empty(0)]),
        "trained": np.concatenate([part.trained for part in parts] or [np.empty(0)]),
        "starts": np.cumsum([0, *lengths]),
    }
    return [_block(arrays, start, start + block) for start in range(0, len(arrays["tokens"]), block)]


def write(
    folder: Path,
    parts: Iterable[Tokens],
    block: int | None,
    dtype: type[np.unsignedinteger],
    fill: int,
    progress: Callable[[Tokens], None] = lambda _: None,
) -> Index:
    """Write samples to a new folder as shards, and give their index, which `seal` writes once the folder is whole.

    With `block`, every shard has whole blocks of so many tokens; a document goes on in the next where it has no place,
    and the last is filled with the token `fill`, untrained. `progress` is told of each part that is written.
    """
    folder.mkdir(parents=True)
    shards: list[Shard] = []
    ids: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    starts: list[int] = []
    counts = dict.fromkeys(("tokens", "samples", "truncated", "dropped", "skipped", "overlap"), 0)
    size = 0  # of what is not yet written, in tokens

    def flush(end: int) -> None:
        """Write the first `end` tokens."""
        nonlocal ids, trained, starts, size
        whole, mask = np.concatenate(ids), np.concatenate(trained)
        here = [start for start in starts if start < end]
        arrays = {
            "tokens": whole[:end].astype(dtype),
            "trained": mask[:end],
            "starts": np.array([*here, end], np.int64),
        }
        files = {}
        for name, array in arrays.items():
            path = folder / f"{name}-{len(shards):05}.npy"
            np.save(path, array)
            files[name] = (path.stat().st_size, _sha256(path))
        shards.append(Shard(tokens=end, samples=len(here), files=files))
        ids, trained = [whole[end:].copy()], [mask[end:].copy()]
        size -= end
        starts = [start - end for start in starts if start >= end]
        if size and (not starts or starts[0]):
            starts = [0, *starts]  # the rest of a document

    def add(part: Tokens) -> None:
        nonlocal starts, size
        starts += [size + start for start in accumulate(part.lengths[:-1], initial=0)] if part.lengths else []
        ids.append(part.ids)
        trained.append(part.trained)
        size += len(part.ids)

    for part in parts:
        add(part)
        counts["tokens"] += len(part.ids)
        counts["samples"] += len(part.lengths)
        for name in ("truncated", "dropped", "skipped", "overlap"):
            counts[name] += getattr(part, name)
        progress(part)
        if size >= max(SHARD, block or 0):
            flush(size - size % block if block else size)
    if size:
        if block and size % block:
            add(_filling(-size % block, fill))
        flush(size)
    return Index(block=block, shards=tuple(shards), **counts)


def seal(folder: Path, index: Index) -> None:
    """Write the index: the folder is whole."""
    write_atomically(folder / INDEX, index.model_dump_json(indent=1) + "\n")


def load_index(folder: Path) -> Index:
    """The index of a folder whose files are as they were written. Raises ValueError, saying which is not."""
    try:
        index = Index.model_validate_json((folder / INDEX).read_text())
    except (OSError, ValidationError) as error:
        raise ValueError(INDEX) from error
    for number, shard in enumerate(index.shards):
        for name, (size, sha256) in shard.files.items():
            path = folder / f"{name}-{number:05}.npy"
            if not path.is_file() or path.stat().st_size != size or _sha256(path) != sha256:
                raise ValueError(path.name)
    return index


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
