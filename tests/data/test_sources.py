"""Benchmarks' rows from files in the schemas of the hub's sets, and what is said of others."""

import csv
import json

import pandas as pd
import pytest
from tiny import ROOT

from mora_repro.data.benchmarks import Harness, known, refuse_unread
from mora_repro.data.overlap import ngrams_of, overlaps
from mora_repro.data.sources import SOURCES, rows_of
from mora_repro.errors import UserError
from mora_repro.spec.run_spec import Eval

PUBMEDQA = {"question": "q?", "context": {"contexts": ["a", "b"], "labels": []}, "final_decision": "yes", "pubid": 1}
GSM8K = {"question": "How many?", "answer": "#### 3"}
REAL = ROOT.parent / "shared" / "data" / "pubmedqa" / "part.jsonl"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files_of_every_kind_are_read(tmp_path):
    write(tmp_path / "a.jsonl", [GSM8K])
    (tmp_path / "a.json").write_text(json.dumps([GSM8K]))
    pd.DataFrame([GSM8K]).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame([GSM8K]).to_feather(tmp_path / "a.arrow", compression="uncompressed")
    pd.DataFrame([GSM8K]).to_csv(tmp_path / "a.csv", index=False, quoting=csv.QUOTE_ALL)
    for path in tmp_path.iterdir():
        assert rows_of("gsm8k", str(path), "test") == (GSM8K,), path.name


def test_either_schema_of_pubmedqa_and_of_medqa_is_read(tmp_path):
    theirs = {"QUESTION": "q?", "CONTEXTS": ["a", "b"], "final_decision": "yes"}
    for number, row in enumerate([PUBMEDQA, {**theirs, "LABELS": []}]):
        path = write(tmp_path / f"{number}.jsonl", [{**row, "final_decision": "yes"}] * 20)
        assert set(map(str, rows_of("pubmedqa", path, "test"))) == {str(theirs)} or number
    ours = {"sent1": "q", "ending0": "w", "ending1": "x", "ending2": "y", "ending3": "z", "label": 2}
    options = {"question": "q", "options": dict(zip("ABCD", "wxyz")), "answer_idx": "C"}
    for number, row in enumerate([ours, options]):
        assert rows_of("usmle", write(tmp_path / f"usmle{number}.jsonl", [row]), "test") == (ours,)


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("gsm8k", '{"question": "q"}', r"line 1: gsm8k needs question \(str\), answer \(str\), and there is question"),
        ("mmlu", '{"question": "q", "subject": "s", "choices": "a", "answer": 1}', r"needs .*choices \(list\)"),
        ("pubmedqa", '{"question": "q"}', r"needs question \(str\), context \(dict\).* or QUESTION \(str\)"),
        ("rct", "[]", r"line 1 should be an object with columns"),
        ("rct", "{", r"line 1 is no JSON"),
        ("rct", "", r"has no rows. rct needs input \(str\), options \(list\), gold_index \(int\) in each"),
    ],
)
def test_a_row_that_can_not_be_asked_is_named_with_what_is_needed(tmp_path, key, text, said):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        rows_of(key, str(tmp_path / "a.jsonl"), "test")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"eval.data.ner=.*nowhere is not there. .*input \(str\), label \(str\)"):
        rows_of("ner", str(tmp_path / "nowhere"), "test")
    write(tmp_path / "notes.jsonl", [GSM8K])
    with pytest.raises(UserError, match=r"has no test.jsonl .*it holds notes.jsonl"):
        rows_of("gsm8k", str(tmp_path), "test")
    with pytest.raises(UserError, match=r"notes.jsonl has no validation set, .*it has test.*eval.data.gsm8k=<folder>"):
        rows_of("gsm8k", str(tmp_path / "notes.jsonl"), "validation")
    for key, source in SOURCES.items():
        with pytest.raises(
            UserError, match=rf"{source.path} can't be had .*scripts/prepare.py.*eval.data.{key}=<path>"
        ):
            rows_of(key, None, "test")


def test_a_file_for_a_benchmark_that_is_not_asked_is_refused():
    asked = [*known("rct", Eval()), Harness("choices", "choices", rows=[])]
    refuse_unread({"rct": "a.jsonl"}, asked)
    with pytest.raises(UserError, match=r"mmlu=b would not be read: .* rct, choices. .*tasks=\[mmlu\] data.mmlu=b$"):
        refuse_unread({"rct": "a.jsonl", "mmlu": "b"}, asked)


@pytest.mark.skipif(not REAL.exists(), reason="the real PubMedQA rows are not beside this checkout")
def test_real_pubmedqa_is_read(capsys):
    test, validation = (rows_of("pubmedqa", str(REAL), split) for split in ("test", "validation"))
    assert len(test) + len(validation) == len(REAL.read_text().splitlines()) and len(validation) > 20
    assert {row["final_decision"] for row in test} == {"yes", "no", "maybe"}
    assert f"{len(test)} of " in capsys.readouterr().err


def test_the_texts_of_a_benchmarks_files_are_looked_for_in_training_data(tmp_path):
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    row = {"input": f"Which part? {text} or so", "options": ["a", "b"], "gold_index": 0}
    rows = [row | {"gold_index": number} for number in range(30)]
    data = {"rct": write(tmp_path / "rct.jsonl", rows)}
    grams, unknown = ngrams_of([*known("rct", Eval(data=data)), Harness("arc_easy", "arc_easy")])
    assert overlaps(f"It says: {text.upper()}!", grams) and not overlaps(text[4:], grams) and unknown == ["arc_easy"]
