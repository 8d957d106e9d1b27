"""Every kind of file gives the same rows, one at a time, and what is wrong is named by file and line."""

import csv
import gzip
import io
import itertools
import json
import tracemalloc
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from mora_repro.data.files import Corpus, Split
from mora_repro.errors import UserError

ROWS = [{"question": f"How, many\n{number}?", "answer": number, "unused": "é"} for number in range(600)]
COLUMNS = {"question": str, "answer": int}
WANTED = [{"question": row["question"], "answer": row["answer"]} for row in ROWS]


def corpus(data: Path | str, skip: bool = False, **columns: str) -> Corpus:
    return Corpus(str(data), {}, columns, "skip" if skip else "stop")


def read(data: Path | str, split: Split = "train", limit: int | None = None, skip: bool = False) -> list[dict | None]:
    return list(corpus(data, skip).rows(split, COLUMNS, limit))


def written(path: Path) -> Path:
    """ROWS in the kind of file that the path's suffix names."""
    kind = path.name.partition(".")[2]
    frame = pd.DataFrame(ROWS)
    if kind.startswith("jsonl"):
        text = "\n\n".join(json.dumps(row) for row in ROWS)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2))
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "arrow":
        with pa.ipc.new_file(path, (table := pa.Table.from_pandas(frame)).schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "arrow"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = written(tmp_path / f"train.{kind}")
    assert read(path) == read(tmp_path) == WANTED
    assert read(tmp_path, limit=3) == WANTED[:3]


@pytest.mark.parametrize("kind", ["csv", "csv.gz"])
def test_csv_has_text_in_its_columns(tmp_path, kind):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]))
    writer.writeheader()
    writer.writerows([*ROWS, {"question": "long " * 100_000, "answer": 1}])
    encoded = text.getvalue().encode()
    (tmp_path / f"train.{kind}").write_bytes(gzip.compress(encoded) if kind.endswith("gz") else encoded)
    questions = [row["question"] for row in corpus(tmp_path).rows("train", {"question": str})]
    assert questions == [*(row["question"] for row in ROWS), "long " * 100_000]


def test_what_datasets_saved_is_read(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path)
    assert read(tmp_path) == WANTED


def test_a_split_may_be_a_folder_of_files(tmp_path):
    (tmp_path / "train").mkdir()
    for number in (1, 2):
        written(tmp_path / "train" / f"{number}.parquet")
    assert read(tmp_path) == WANTED * 2
    written(tmp_path / "train" / "3.jsonl")
    with pytest.raises(UserError, match=r"'1.parquet', '2.parquet', '3.jsonl'.*files of one kind"):
        read(tmp_path)


def test_a_text_file_has_a_row_per_document(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n \nOne,\nof two lines.\n \n\nTwo.")
    assert list(corpus(path).rows("train", {"text": str})) == [{"text": "One,\nof two lines."}, {"text": "Two."}]


def test_columns_have_the_names_that_are_said(tmp_path):
    path = written(tmp_path / "train.jsonl")
    assert next(corpus(path, asked="question").rows("train", {"asked": str})) == {"asked": ROWS[0]["question"]}


def test_a_json_array_of_objects_by_line_is_read_by_line(tmp_path):
    written(tmp_path / "train.jsonl").rename(tmp_path / "train.json")
    assert read(tmp_path) == WANTED


BAD_LINES = [
    (b'{"question": "a", "answer": ', r"line 2 is no JSON .*One object per line"),
    (b'["a", 1]', r"line 2 should be a JSON object"),
    (
        b'{"question": "a", "reply": 1}',
        r"line 2 has no 'answer'; it has 'question', 'reply', .*task.columns.answer",
    ),
    (b'{"question": 3, "answer": 1}', r"line 2 : 'question' should be text, and is '3'"),
    ('{"question": "Café?", "answer": 3}'.encode("latin-1"), r"line 2 can't be read as UTF-8"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES)
def test_a_bad_line_is_named_with_what_was_expected_or_skipped(tmp_path, line, said):
    good = json.dumps(WANTED[0]).encode()
    (tmp_path / "train.jsonl").write_bytes(b"\n".join([good, line, good]))
    with pytest.raises(UserError, match=rf"train.jsonl, {said}.*task.on_bad_row=skip"):
        read(tmp_path)
    assert read(tmp_path, skip=True) == [WANTED[0], None, WANTED[0]]
    (tmp_path / "train.jsonl").write_bytes(line)
    with pytest.raises(UserError, match=r"train.jsonl has no rows that can be taken; the first that can't.*line 1"):
        read(tmp_path, skip=True)


def test_a_line_of_csv_with_other_fields_is_a_bad_row(tmp_path):
    (tmp_path / "train.csv").write_text("question,answer\na,1\nb\nc,2,3\n")
    with pytest.raises(UserError, match=r"train.csv, line 3 has not the 2 fields"):
        list(corpus(tmp_path).rows("train", {"question": str}))
    rows = list(corpus(tmp_path, skip=True).rows("train", {"question": str}))
    assert rows == [{"question": "a"}, None, None]


def test_missing_empty_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is no folder and no file.*'question', 'answer'.*task.data=generated"):
        corpus(tmp_path / "nowhere").rows("train", COLUMNS)
    (tmp_path / "notes.md").touch()
    with pytest.raises(UserError, match=r"has no train.jsonl and no folder train/.*it holds notes.md"):
        corpus(tmp_path).rows("train", COLUMNS)
    with pytest.raises(UserError, match=r"notes.md: it is not known how to read"):
        corpus(tmp_path / "notes.md").rows("train", COLUMNS)
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(UserError, match=r"train.jsonl has no rows; 'question', 'answer' are expected"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"is one file, which is trained on, and a test set is needed"):
        corpus(tmp_path / "train.jsonl").rows("test", COLUMNS)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl.gz", "json"])
def test_a_file_that_is_not_of_its_kind_is_refused(tmp_path, kind):
    (tmp_path / f"train.{kind}").write_bytes(b"[nothing of the kind")
    with pytest.raises(UserError, match=rf"train.{kind}"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl.gz", "json"])
def test_a_file_that_was_cut_off_is_refused(tmp_path, kind):
    path = written(tmp_path / f"train.{kind}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"train.{kind}"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt"])
def test_a_large_file_is_not_held_in_memory(tmp_path, kind):
    rows = [json.dumps({"text": "word " * 1000})] * 6000
    text = {"jsonl": "\n".join(rows), "json": f"[{','.join(rows)}]", "txt": "\n\n".join(rows)}[kind]
    (tmp_path / f"train.{kind}").write_text(text)
    size = len(text)
    del text, rows
    tracemalloc.start()
    assert sum(1 for _ in corpus(tmp_path).rows("train", {"text": str})) == 6000
    assert tracemalloc.get_traced_memory()[1] < size / 4
    tracemalloc.stop()


def test_parts_held_out_are_apart_and_together_the_whole(tmp_path):
    written(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").open("a").write("\n[]\n")
    parts = {
        split: list(corpus(tmp_path, skip=True).held_out(split, COLUMNS, "question", one_in=10))
        for split in ("train", "validation", "test")
    }
    assert all(30 < len(parts[split]) < 90 for split in ("validation", "test"))
    assert sorted(row["answer"] for row in itertools.chain(*parts.values()) if row) == list(range(600))
    assert parts["train"].count(None) == 1 and None not in parts["test"] + parts["validation"]
    few = corpus(tmp_path, skip=True).held_out("test", COLUMNS, "question", limit=5, one_in=10)
    assert list(few) == parts["test"][:5]


# `datasets` takes a folder for the name of a set, so that what it does can run here.


def of_hub(folder: Path, **test: str) -> Corpus:
    return Corpus("hub", {"train": {"path": str(folder)}, "test": {"path": str(folder), **test}}, {})


def test_a_set_of_the_hub_is_streamed_with_its_own_names_of_split_and_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (folder := tmp_path / "set").mkdir()
    written(folder / "train.jsonl")
    assert list(of_hub(folder).rows("train", COLUMNS, 5)) == WANTED[:5]
    renamed = of_hub(folder, split="train", asked="question")
    assert list(renamed.rows("test", {"asked": str}, 2)) == [{"asked": row["question"]} for row in ROWS[:2]]
    (folder / "train.jsonl").unlink()  # as the hub, out of reach
    assert len(list(renamed.rows("test", {"asked": str}, 2))) == 2
    with pytest.raises(UserError, match="can't be had"):
        renamed.rows("test", {"asked": str}, 3)


def test_a_column_that_the_hubs_set_lacks_is_named(tmp_path):
    written(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"row 1 has no 'query'; it has 'question', .*task.hub.<split>.query"):
        list(of_hub(tmp_path).rows("train", {"query": str}))


def test_the_hub_out_of_reach_says_how_to_get_the_data_beforehand():
    corpus = Corpus("hub", {"train": {"path": "meta-math/MetaMathQA"}}, {})
    with pytest.raises(UserError, match=r"MetaMathQA can't be had.*gated.*scripts/prepare.py.*task.data=<folder>"):
        corpus.rows("train", COLUMNS)
    with pytest.raises(UserError, match=r"names no test set, but 'train'.*task.hub.test"):
        corpus.rows("test", COLUMNS)
