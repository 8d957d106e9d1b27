"""From a task's samples to the folder of token ids that training reads: made once, found again by what decides it."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from ..distributed import alone_with, barrier, from_main, is_main, say
from ..errors import UserError
from ..spec import RunSpec
from . import shards
from .overlap import ngrams_of
from .shards import Index, TrainingSet
from .task import Task
from .tokens import Tokeniser, Tokens


def prepare(spec: RunSpec, task: Task, tokenizer: PreTrainedTokenizerBase, out: Path) -> TrainingSet:
    """The task's training set, in `<out>/data/<task>-<fingerprint>`; made where it is not there, by rank 0 alone.

    Every process of a run calls this. Samples are cut at `training.max_length` tokens or, where the task packs them,
    put one after the other into blocks of that length. Of a corpus, samples that have a text of a benchmark are left
    out (`task.overlapping=drop`). Stopped, it starts over; of several commands one does it, and the others wait.

    Raises UserError: no sample is left.
    """
    folder = _folder(spec, task, tokenizer, out)
    index = None
    if is_main():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone_with(folder.with_suffix(".lock"), f"another command prepares {folder}"):
            index = _found(folder) or _made(spec, task, tokenizer, folder)
    index = from_main(index)
    barrier()
    assert index is not None
    return TrainingSet(folder, index)


def is_prepared(spec: RunSpec, task: Task, tokenizer: PreTrainedTokenizerBase, out: Path) -> bool:
    """Whether the training set is there."""
    return _folder(spec, task, tokenizer, out).exists()


def _folder(spec: RunSpec, task: Task, tokenizer: PreTrainedTokenizerBase, out: Path) -> Path:
    return out / "data" / f"{task.name}-{fingerprint(spec, task, tokenizer)}"


def fingerprint(spec: RunSpec, task: Task, tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (first 16 digits) of all that decides a training set: the task and its files, the tokenizer, lengths, the
    benchmarks whose texts are left out, and the code of samples."""
    fast = tokenizer.is_fast
    parts: dict[str, Any] = {
        "task": {key: value for key, value in spec.task.items() if key not in ("title", "metric")},
        "data": {key: content for key, content in spec.content.items() if key.startswith("task.")},
        "tokenizer": [
            type(tokenizer).__name__,
            tokenizer.backend_tokenizer.to_str() if fast else tokenizer.get_vocab(),
            [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template],
        ],
        "max_length": spec.training.max_length,
        "code": [path.read_text() for path in _sources(task)],
    }
    if task.from_corpus:
        parts["benchmarks"] = {key: value for key, value in spec.content.items() if key.startswith("eval.")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _sources(task: Task) -> list[Path]:
    """The modules that decide what the samples of a task are."""
    return sorted({*Path(__file__).parent.glob("*.py"), Path(inspect.getfile(type(task)))})


def _found(folder: Path) -> Index | None:
    """The index of a training set that is there, whole; what is not whole is removed."""
    if not folder.exists():
        return None
    try:
        return shards.load_index(folder)
    except ValueError as torn:
        say(f"{folder / str(torn)} is not as it was written: preparing the data again")
        shutil.rmtree(folder)
        return None


def _made(spec: RunSpec, task: Task, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Index:
    max_length = spec.training.max_length
    left_out = None
    unchecked: list[str] = []
    if task.from_corpus:
        # All that a benchmark has: a limit is of this run, and the model may be scored without it.
        whole = spec.eval.model_copy(update={"limit": None})
        left_out, unchecked = ngrams_of(task.benchmarks(whole))
        other = "test" if spec.eval.split == "validation" else "validation"
        with suppress(UserError):  # where there is no such set, nothing of it can be trained on
            for benchmark in task.benchmarks(whole.model_copy(update={"split": other})):
                with suppress(UserError):
                    left_out = np.union1d(left_out, ngrams_of([benchmark])[0])
    length = None if task.packed else max_length
    tokeniser = Tokeniser(tokenizer, length, left_out, keep_overlap=task.overlapping == "keep")
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with _Line(task) as line:
        parts = _up_to(task.max_tokens, tokeniser.all(task.samples()))
        block = max_length if task.packed else None
        index = shards.write(partial, parts, block, dtype, tokenizer.pad_token_id, line.advance)
    if not index.samples:
        overlapping = f"; {index.overlap} have a text of a benchmark, and are kept with task.overlapping=keep"
        raise UserError(
            f"task={task.name}: no training sample has an answer within training.max_length={max_length} tokens; "
            f"raise it: training.max_length={4 * max_length}{overlapping if index.overlap else ''}"
        )
    if task.from_corpus:
        index = index.model_copy(update={"unchecked": tuple(dict.fromkeys(unchecked))})
    else:
        index = index.model_copy(update={"overlap": None})
    shards.seal(partial, index)
    partial.rename(folder)
    say(f"prepared {line.note()}: {folder}")
    return index


def _up_to(tokens: int | None, parts: Iterator[Tokens]) -> Iterator[Tokens]:
    """The parts until there are so many tokens, the last one whole; None: all."""
    total = 0
    for part in parts:
        yield part
        total += len(part.ids)
        if tokens is not None and total >= tokens:
            return


class _Line:
    """A progress bar on a terminal; elsewhere a line each half a minute. The end is known for plain text files alone.

    A context around the preparation.
    """

    def __init__(self, task: Task):
        self.console = Console(stderr=True)
        self.total = _characters(task)
        self.tokens = self.samples = self.characters = 0
        self.since = self.said = time.monotonic()
        self.progress = Progress(
            TextColumn("preparing"),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar = self.progress.add_task("preparing", total=self.total, note="")

    def note(self) -> str:
        speed = self.tokens / max(time.monotonic() - self.since, 1e-9)
        return f"{self.samples:,} samples, {self.tokens:,} tokens, {speed:,.0f} tokens/s"

    def advance(self, part: Tokens) -> None:
        self.tokens += len(part.ids)
        self.samples += len(part.lengths)
        self.characters += part.characters
        note, now = self.note(), time.monotonic()
        self.progress.update(self.bar, completed=self.characters, note=note)
        if not self.console.is_terminal and now - self.said > 30:
            self.said = now
            share = f", about {100 * self.characters / self.total:.0f} %" if self.total else ""
            say(f"preparing: {note}{share}")

    def __enter__(self) -> _Line:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def _characters(task: Task) -> int | None:
    """About how many characters a corpus of plain text files has; None for others."""
    source = Path(task.data)
    if not task.from_corpus or not source.exists():
        return None
    files = [source] if source.is_file() else [*source.glob("train.*"), *source.glob("train/*")]
    if all(file.suffix in (".jsonl", ".json", ".csv", ".txt") for file in files):
        return sum(file.stat().st_size for file in files)
    return None
