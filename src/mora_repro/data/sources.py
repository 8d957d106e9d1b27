"""The rows of the public benchmarks: of the hub, or of a user's files in the schema of the hub's set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..distributed import say
from ..errors import UserError
from .files import SUFFIXES, BadRow, Row, not_to_be_had, place_of, read_file

ONE_IN = 10  # rows of a set that has a test split alone are its validation set


@dataclass(frozen=True)
class Form:
    """A schema that a benchmark's rows may have, and how its rows become those that lm-eval's task reads."""

    columns: Mapping[str, type]
    read: Callable[[Row], Row] = dict


@dataclass(frozen=True)
class Source:
    """A data set of the hub: its name, its configurations (read one after the other), its splits by ours (test,
    validation, and dev for shots), and the forms of its rows. A validation split None is held out: one in ONE_IN of the
    test set's rows, by their hash, which are then not in the test set."""

    path: str
    names: tuple[str | None, ...]
    splits: Mapping[str, str | None]
    forms: tuple[Form, ...]


_CHOICE = Form({"input": str, "options": list, "gold_index": int})
_HEADLINE = Form({**_CHOICE.columns, "class_id": int})
_GENERATED = (Form({"input": str, "label": str}), Form({"input": str, "label": list}))
_MMLU = Source(
    "cais/mmlu",
    ("all",),
    {"test": "test", "validation": "validation", "dev": "dev"},
    (Form({"question": str, "subject": str, "choices": list, "answer": int}),),
)
_PUBMEDQA = (
    Form(
        {"question": str, "context": dict, "final_decision": str},
        lambda row: {
            "QUESTION": row["question"],
            "CONTEXTS": list(row["context"]["contexts"]),
            "final_decision": row["final_decision"],
        },
    ),
    Form({"QUESTION": str, "CONTEXTS": list, "final_decision": str}),
)
_ENDINGS = [f"ending{number}" for number in range(4)]
_USMLE = (
    Form({"sent1": str, **dict.fromkeys(_ENDINGS, str), "label": int}),
    Form(
        {"question": str, "options": dict, "answer_idx": str},
        lambda row: {
            "sent1": row["question"],
            **{ending: row["options"][letter] for ending, letter in zip(_ENDINGS, "ABCD")},
            "label": "ABCD".index(row["answer_idx"]),
        },
    ),
)


def _adaptllm(domain: str, name: str, *forms: Form) -> Source:
    return Source(f"AdaptLLM/{domain}-tasks", (name,), {"test": "test", "validation": None}, forms)


_MATH = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


# By the name that `eval.data.<name>` points at files with.
SOURCES = {
    "gsm8k": Source("openai/gsm8k", ("main",), {"test": "test"}, (Form({"question": str, "answer": str}),)),
    "math": Source("EleutherAI/hendrycks_math", _MATH, {"test": "test"}, (Form({"problem": str, "solution": str}),)),
    "mmlu": _MMLU,
    "biommlu": _MMLU,
    # lm-eval's own source, bigbio/pubmed_qa, is a script, which `datasets` no longer runs; its rows may be in files.
    "pubmedqa": Source("qiaojin/PubMedQA", ("pqa_labeled",), {"test": "train", "validation": None}, _PUBMEDQA),
    "usmle": Source("GBaker/MedQA-USMLE-4-options-hf", (None,), {"test": "test", "validation": "validation"}, _USMLE),
    "rct": _adaptllm("medicine", "RCT", _CHOICE),
    "fpb": _adaptllm("finance", "FPB", _CHOICE),
    "fiqa_sa": _adaptllm("finance", "FiQA_SA", _CHOICE),
    "headline": _adaptllm("finance", "Headline", _HEADLINE),
    "ner": _adaptllm("finance", "NER", *_GENERATED),
    "convfinqa": _adaptllm("finance", "ConvFinQA", *_GENERATED),
}


@cache
def rows_of(key: str, data: str | None, split: str) -> tuple[Row, ...]:
    """The rows of a benchmark's split ("test", "validation" or "dev"), of a local file or folder or of the hub.

    A file is the test set; a folder has a file for each split, `<split>.jsonl` say.

    Raises UserError: no such file, a row that is none, missing columns, no rows; a data set that can't be had.
    """
    source = SOURCES[key]
    where = f"the data set {source.path}" if data is None else data
    there = {ours for ours, theirs in source.splits.items() if theirs} if data is None else _splits_of(key, Path(data))
    held = "validation" in source.splits and source.splits["validation"] is None and "validation" not in there
    if split not in there and not (split == "validation" and held):
        raise UserError(
            f"{where} has no {split} set, which is needed here; it has {', '.join(sorted(there))}. Point at a folder "
            f"with {split}.jsonl and test.jsonl: eval.data.{key}=<folder>"
        )
    held = held and split != "dev"
    theirs = "test" if held else split
    found = _of_hub(key, theirs) if data is None else _of_file(key, _file(Path(data), theirs))
    if held:
        whole, found = len(found), [row for row in found if _is_held_out(row) == (split == "validation")]
        say(f"{where}: {len(found)} of {whole} rows are its {split} set")
    if not found:
        raise UserError(f"{where} has no {split} rows. Point at others: eval.data.{key}=<file or folder>")
    return tuple(found)


def _is_held_out(row: Row) -> bool:
    return place_of(str(sorted(row.items())), ONE_IN) == 0


def _of_hub(key: str, split: str) -> list[Row]:
    import datasets

    datasets.disable_progress_bars()
    source = SOURCES[key]
    try:
        parts = [datasets.load_dataset(source.path, name, split=source.splits[split]) for name in source.names]
    except Exception as error:  # the hub's client raises some twenty kinds
        raise UserError(
            f"{not_to_be_had(source.path, error)} Or point at a local file or folder whose rows have "
            f"{_needed(source.forms)}: eval.data.{key}=<path>"
        ) from error
    rows = enumerate((row for part in parts for row in part), 1)
    return _read_rows(key, source.path, ((f"{source.path}, row {number}", row) for number, row in rows))


def _of_file(key: str, path: Path) -> list[Row]:
    return _read_rows(key, str(path), read_file(path))


def _read_rows(key: str, where: str, rows: Iterable[tuple[str, Any]]) -> list[Row]:
    """The rows in the first form that they have the columns of."""
    forms = SOURCES[key].forms
    read = []
    for place, row in rows:
        if isinstance(row, BadRow) or not isinstance(row, dict):
            raise UserError(f"{place} {row if isinstance(row, BadRow) else 'should be an object with columns.'}")
        form = next((form for form in forms if _fits(form, row)), None)
        if form is None:
            has = ", ".join(f"{column} ({type(value).__name__})" for column, value in row.items())
            raise UserError(f"{place}: {key} needs {_needed(forms)}, and there is {has}")
        read.append({column: value for column, value in form.read(row).items() if column in _kept(form, row)})
    if not read:
        raise UserError(f"{where} has no rows. {key} needs {_needed(forms)} in each")
    return read


def _fits(form: Form, row: Row) -> bool:
    return all(isinstance(row.get(column), kind) for column, kind in form.columns.items())


def _kept(form: Form, row: Row) -> Iterable[str]:
    return form.columns if form.read is dict else form.read(row)


def _needed(forms: Iterable[Form]) -> str:
    return " or ".join(", ".join(f"{name} ({kind.__name__})" for name, kind in form.columns.items()) for form in forms)


def _splits_of(key: str, path: Path) -> set[str]:
    if path.is_file():
        return {"test"}
    if not path.is_dir():
        raise UserError(
            f"eval.data.{key}={path} is not there. It should be a file, or a folder with test.jsonl, whose rows have "
            f"{_needed(SOURCES[key].forms)}"
        )
    found = {split for split in ("test", "validation", "dev") if _in_folder(path, split)}
    if not found:
        there = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
        raise UserError(f"eval.data.{key}={path} has no test.jsonl (or {', '.join(SUFFIXES)}); it holds {there}")
    return found


def _in_folder(folder: Path, split: str) -> list[Path]:
    return [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]


def _file(path: Path, split: str) -> Path:
    return path if path.is_file() else _in_folder(path, split)[0]
