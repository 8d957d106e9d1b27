"""Rows of a corpus, one after the other: from a user's files or from the hub, with errors that name file and line."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
from pyarrow import parquet

from ..disk import write_atomically
from ..errors import UserError

Split = Literal["train", "validation", "test"]
Row = dict[str, Any]

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".arrow", ".csv", ".csv.gz", ".txt", ".txt.gz", ".json")
OF_SAVE_TO_DISK = ("state.json", "dataset_info.json")  # what `datasets` writes beside its rows
KINDS = {str: "text", int: "a whole number", list: "a list"}
CHUNK = 1 << 20  # characters of a JSON file that are read at a time
LONGEST = 1 << 26  # characters that one row of it may have
BATCH = 256  # rows of a columnar file in memory


class BadRow(Exception):
    """Why a row can't be taken."""


@dataclass(frozen=True)
class Corpus:
    """Where the rows of a task are.

    Attributes:
        data: "hub", or a local folder or file. A folder holds, for each split, a file `<split>.<suffix>` or a folder
            of files; a single file is the split "train". A text file has a row per document, column "text"; blank
            lines are between the documents.
        hub: for each split, `path`, and where they differ from the hub's default or ours `name` (of the
            configuration), `revision`, `split`, and for each of our columns the name of theirs.
        columns: for local files, the name of their column for each of ours; without one, it is the same.
        on_bad_row: "stop" with an error, or "skip" a row that can't be read or lacks a column.
        check: raises BadRow for a row of our columns that can't be taken for another reason.
        key: what a user names `data` by.
    """

    data: str
    hub: Mapping[str, Mapping[str, str | None]]
    columns: Mapping[str, str]
    on_bad_row: Literal["stop", "skip"] = "stop"
    check: Callable[[Row], None] | None = None
    key: str = "task.data"

    def rows(self, split: Split, columns: Mapping[str, type], limit: int | None = None) -> Iterator[Row | None]:
        """The rows of a split with our columns alone, in the corpus's order, at most `limit`; None for each skipped.

        One row after the other is read, so that a corpus may be larger than the memory. `columns` has the type of
        each: str, int or list. What is taken of a validation or test set of the hub is kept in the cache of
        `datasets`, for a machine without internet.

        Raises UserError, at once: no such folder or file, no such split, a data set that can't be had. While rows are
        taken: one that can't be, a missing column, no rows.
        """
        if self.data == "hub" and split != "train":
            wanted = [dict(self.hub.get(split, {})), split, sorted(columns), limit, self.on_bad_row]
            return _kept(wanted, lambda: self._rows(split, columns, limit))
        return self._rows(split, columns, limit)

    def held_out(
        self, split: Split, columns: Mapping[str, type], key: str, limit: int | None = None, one_in: int = 100
    ) -> Iterator[Row | None]:
        """Rows of the training set that make up `split`, for a corpus that has no such set of its own.

        About one in `one_in` is "validation", another "test", and the rest "train"; the text of the column `key`
        decides, so that equal texts are never in two parts. Skipped rows are among those of "train".

        Raises UserError as `rows`, while rows are taken.
        """
        columns = {**columns, key: str}

        def chosen() -> Iterator[Row | None]:
            rows = self._rows("train", columns, None)
            parts = ((row, _part(row[key], one_in) if row else "train") for row in rows)
            return islice((row for row, part in parts if part == split), limit)

        if self.data == "hub" and split != "train":
            source = dict(self.hub.get("train", {}))
            return _kept([source, split, sorted(columns), limit, self.on_bad_row, key, one_in], chosen)
        return chosen()

    def own_or_held_out(
        self, split: Split, columns: Mapping[str, type], key: str, limit: int | None = None
    ) -> Iterator[Row | None]:
        """The rows of a split: of the corpus's own set or, where it has none, as `held_out` has them.

        The training set is whole where the corpus has both other sets.
        """
        needed: tuple[Split, ...] = ("validation", "test") if split == "train" else (split,)
        if all(map(self.has, needed)):
            return self.rows(split, columns, limit)
        return self.held_out(split, columns, key, limit)

    def has(self, split: Split) -> bool:
        """Whether the corpus has a set of its own for a split."""
        root = Path(self.data)
        if self.data == "hub":
            return split in self.hub
        if not root.is_dir():
            return split == "train"
        return (root / split).is_dir() or any((root / f"{split}{suffix}").is_file() for suffix in SUFFIXES)

    def _rows(self, split: Split, columns: Mapping[str, type], limit: int | None) -> Iterator[Row | None]:
        if self.data == "hub":
            source, read = self._of_hub(split, columns)
            theirs = {ours: str(self.hub[split].get(ours) or ours) for ours in columns}
        else:
            files = self._files(split, columns)
            source = str(files[0]) if len(files) == 1 else self.data
            read = chain.from_iterable(map(read_file, files))
            theirs = {ours: self.columns.get(ours, ours) for ours in columns}
        return self._checked(source, read, columns, theirs, limit)

    def _checked(
        self,
        source: str,
        read: Iterator[tuple[str, Any]],
        columns: Mapping[str, type],
        theirs: dict[str, str],
        limit: int | None,
    ) -> Iterator[Row | None]:
        found, first_problem = 0, ""
        for where, row in read:
            if found == limit:
                return
            try:
                taken = _taken(row, columns, theirs)
                if self.check:
                    self.check(taken)
            except BadRow as problem:
                if self.on_bad_row == "stop":
                    raise UserError(f"{where} {problem} Leave such rows out: task.on_bad_row=skip") from None
                first_problem = first_problem or f" that can be taken; the first that can't: {where} {problem}"
                yield None
                continue
            found += 1
            yield taken
        if not found:
            needed = _named(theirs.values())
            raise UserError(f"{source} has no rows{first_problem or f'; {needed} are expected in each.'}")

    def _files(self, split: Split, columns: Mapping[str, type]) -> list[Path]:
        """The split's files. Raises UserError where there are none."""
        root = Path(self.data)
        needed = _named(self.columns.get(ours, ours) for ours in columns)
        kinds = ", ".join(SUFFIXES)
        if root.is_file():
            if split != "train":
                suffix = "".join(root.suffixes)
                raise UserError(
                    f"{self.key}={root} is one file, which is trained on, and a {split} set is needed too. Make a "
                    f"folder with train{suffix} and {split}{suffix}: {self.key}=<folder>"
                )
            if not root.name.endswith(SUFFIXES):
                raise UserError(f"{root}: it is not known how to read such a file; what can be read: {kinds}")
            return [root]
        if not root.is_dir():
            others = f"; the public data set: {self.key}=hub" if self.hub else ""
            if self.key == "task.data":
                others += "; a generated world: task.data=generated"
            raise UserError(
                f"{self.key}={root} is no folder and no file. A folder should hold {split}.jsonl with {needed} in each "
                f"line (or one of {kinds}){others}"
            )
        folder = root / split
        candidates = folder.iterdir() if folder.is_dir() else (root / f"{split}{suffix}" for suffix in SUFFIXES)
        found = sorted(
            path
            for path in candidates
            if path.is_file() and path.name.endswith(SUFFIXES) and path.name not in OF_SAVE_TO_DISK
        )
        if not found:
            there = ", ".join(sorted(path.name for path in root.iterdir())) or "nothing"
            raise UserError(
                f"{root} has no {split}.jsonl and no folder {split}/ with files ({kinds}); it holds {there}."
            )
        suffixes = {next(suffix for suffix in SUFFIXES if path.name.endswith(suffix)) for path in found}
        if len(suffixes) > 1:
            raise UserError(
                f"{folder if folder.is_dir() else root} has {_named(path.name for path in found)} for {split}, and "
                f"it is not clear which to take: leave files of one kind there."
            )
        return found

    def _of_hub(self, split: Split, columns: Mapping[str, type]) -> tuple[str, Iterator[tuple[str, Any]]]:
        """The set's name and its rows. Raises UserError where it can't be had, or lacks a column."""
        if split not in self.hub:
            raise UserError(
                f"{self.key}=hub names no {split} set, but {_named(self.hub)}. Say which: "
                f"'+task.hub.{split}={{path: <data set>, split: <its split>}}', or take files: {self.key}=<folder>"
            )
        source = self.hub[split]
        path, theirs = str(source["path"]), source.get("split") or split
        name = f"{path} ({', '.join(part for part in (source.get('name'), theirs) if part)})"
        try:
            rows = _load(path, source.get("name"), theirs, source.get("revision"))
            # The first row now, since a stream's errors come when it is read.
            start = list(islice(rows, 1))
        except Exception as error:  # the hub's client raises some twenty kinds
            needed = _named(columns)
            raise UserError(
                f"{not_to_be_had(path, error)} Or take files, {split}.jsonl with {needed} in each line: "
                f"{self.key}=<folder>"
            ) from error
        return name, ((f"{name}, row {number}", row) for number, row in enumerate(chain(start, rows), 1))


def not_to_be_had(path: str, error: Exception) -> str:
    """Why a data set of the hub is not here, and how to get it."""
    why = str(error).splitlines() or [""]
    return (
        f"the data set {path} can't be had ({type(error).__name__}: {why[0][:200]}). If it is gated, ask for access on "
        f"https://huggingface.co/datasets/{path} and log in with `hf auth login`. For a machine without internet, on "
        f"one that has it: python scripts/prepare.py with the keys of the run."
    )


def place_of(text: str, places: int) -> int:
    """One of so many places, by the text's hash: the same in every process, and as good as random."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % places


def _part(text: str, one_in: int) -> Split:
    place = place_of(text, one_in)
    return "validation" if place == 0 else "test" if place == 1 else "train"


def _kept(wanted: list[Any], rows: Callable[[], Iterator[Row | None]]) -> Iterator[Row | None]:
    """The rows of the hub that are `wanted`: from the cache, where they are put first if they are not there."""
    import datasets

    name = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "mora-repro" / f"{name}.jsonl"
    if not path.exists():
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows()))
    with path.open(encoding="utf-8") as kept:
        return iter([json.loads(line) for line in kept])


def _taken(row: Any, columns: Mapping[str, type], theirs: Mapping[str, str]) -> Row:
    """Our columns of a row. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"should be a JSON object, and is {str(row)[:60]!r}.")
    taken = {}
    for ours, kind in columns.items():
        column = theirs[ours]
        if column not in row:
            raise BadRow(
                f"has no {column!r}; it has {_named(row)}, and {_named(theirs.values())} are needed. Name its column: "
                f"task.columns.{ours}=<column> (of the hub's sets: task.hub.<split>.{ours}=<column>)."
            )
        if not isinstance(row[column], kind):
            raise BadRow(f": {column!r} should be {KINDS[kind]}, and is {str(row[column])[:60]!r}.")
        taken[ours] = row[column]
    return taken


# ---------------------------------------------------------------------------------------------------
# Readers: (place, row or BadRow) of a file, one after the other


def read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of a file, one after the other; a row that can't be read is a BadRow. Raises UserError."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    readers = {"jsonl": _jsonl, "json": _json, "csv": _csv, "txt": _text, "parquet": _parquet, "arrow": _arrow}
    try:
        yield from readers[kind](path)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        what = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else kind
        raise UserError(f"{path} can't be read as {what} ({str(error).splitlines()[0]}).") from error


def _opened(path: Path, newline: str | None = None) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline=newline)
    return path.open(encoding="utf-8", newline=newline)


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line.decode())
            except UnicodeDecodeError as error:
                yield where, BadRow(f"can't be read as UTF-8 text ({error}).")
            except json.JSONDecodeError as error:
                shown = line.decode().strip()[:60]
                yield where, BadRow(f"is no JSON ({error.msg}): {shown!r}. One object per line.")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """Of a file that is one array, decoded object by object; one of objects without an array is read by lines."""
    decoder = json.JSONDecoder()
    with _opened(path) as file:
        text = file.read(CHUNK).lstrip()
        if not text.startswith("["):
            yield from _jsonl(path)
            return
        text, number = text[1:], 1
        while not (text := text.lstrip(" \t\r\n,")).startswith("]"):
            try:
                row, end = decoder.raw_decode(text)
            except json.JSONDecodeError as error:
                more = file.read(CHUNK) if len(text) < LONGEST else ""
                if not more:
                    where = f"{path}, row {number}"
                    raise UserError(f"{where} is no JSON ({error.msg}): {text[:60]!r}. What follows is lost.") from None
                text += more
                continue
            yield f"{path}, row {number}", row
            text, number = text[end:], number + 1


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    with _opened(path, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            fields = len(reader.fieldnames or ())
            whole = None not in row and None not in row.values()
            problem = BadRow(f"has not the {fields} fields of the first line: {list(row.values())!s:.60}.")
            yield f"{path}, line {reader.line_num}", row if whole else problem


def _text(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        lines: list[str] = []
        start = 1
        for number, line in enumerate(chain(file, [""]), 1):
            if line.strip():
                start = start if lines else number
                lines.append(line)
            elif lines:
                yield f"{path}, line {start}", {"text": "".join(lines).rstrip()}
                lines = []


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    with parquet.ParquetFile(path) as file:
        yield from _of_batches(path, file.iter_batches(BATCH))


def _arrow(path: Path) -> Iterator[tuple[str, Any]]:
    with pa.memory_map(str(path)) as file:
        try:
            reader = pa.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        except pa.ArrowInvalid:  # as `datasets` writes it
            file.seek(0)
            batches = iter(pa.ipc.open_stream(file))
        yield from _of_batches(path, batches)


def _of_batches(path: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            for row in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield f"{path}, row {number}", row


def _load(path: str, name: str | None, split: str, revision: str | None) -> Iterator[Any]:
    """The rows of a data set of the hub: read as they come, or from the cache where the hub can't be reached."""
    import datasets

    try:
        return iter(datasets.load_dataset(path, name, split=split, revision=revision, streaming=True))
    except ConnectionError:  # raised again where the cache has not the set either
        return iter(datasets.load_dataset(path, name, split=split, revision=revision))


def _named(columns: Iterable[Any]) -> str:
    return ", ".join(repr(column) for column in columns)
