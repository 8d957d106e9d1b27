"""Texts of the benchmarks are found in training samples, whatever their case and punctuation; templates are not."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_repro.data.benchmarks import Harness, HeldOut, Questions
from mora_repro.data.overlap import N, ngrams, ngrams_of, overlaps

WORDS = [
    "if",
    "a",
    "train",
    "leaves",
    "at",
    "noon",
    "and",
    "drives",
    "for",
    "three",
    "hours",
    "how",
    "far",
    "does",
    "it",
    "get",
    "then",
]
TEMPLATE = "Below is an instruction that describes a task and the answer is asked for below it: {} Answer:"


def questions(*prompts: str) -> Questions:
    return Questions("asked", [(prompt, "1") for prompt in prompts], lambda *_: {}, lambda _: 1)


def grams_of(*benchmarks) -> np.ndarray:
    return ngrams_of(benchmarks)[0]


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not():
    grams = grams_of(HeldOut("texts", [" ".join(WORDS)]))
    assert overlaps(f"Before, {' - '.join(WORDS[2 : 2 + N]).upper()}! after", grams)
    assert not overlaps(" ".join(["before", *WORDS[2 : 1 + N], "after"]), grams)
    assert not overlaps(" ".join(reversed(WORDS)), grams)
    assert not overlaps("", grams) and not overlaps(" ".join(WORDS), grams_of())


@given(st.lists(st.sampled_from("abc"), max_size=40), st.lists(st.sampled_from("abc"), max_size=40))
def test_texts_overlap_where_they_share_n_words_in_a_row(one, other):
    rows = [{tuple(words[start : start + N]) for start in range(len(words) - N + 1)} for words in (one, other)]
    assert overlaps(" ".join(one), np.unique(ngrams(" ".join(other)))) == bool(rows[0] & rows[1])


def test_a_template_that_all_prompts_have_is_no_text_of_the_benchmark():
    first, second = " ".join(WORDS), "what is the name of the river on which the old town of the two lies ?"
    grams = grams_of(questions(TEMPLATE.format(first), TEMPLATE.format(second)))
    assert not overlaps(TEMPLATE.format("how many apples are there"), grams)
    assert overlaps(TEMPLATE.format(first), grams) and overlaps(second, grams)


def test_texts_of_rows_and_files_are_looked_for_and_what_lm_eval_fetches_is_named(tmp_path):
    path = tmp_path / "test.jsonl"
    row = {"question": " ".join(WORDS), "subject": "any", "choices": ["b " * 20], "answer": 0}
    path.write_text(json.dumps(row))
    rows = Harness("rows", "rows", rows=[{"input": "c " * 20, "options": ["1"], "gold_index": 0}])
    grams, unknown = ngrams_of([Harness("mmlu_0shot", "mmlu", data=str(path)), rows, Harness("other", "other")])
    assert all(overlaps(text, grams) for text in (" ".join(WORDS), "b " * 13, "c " * 13))
    assert not overlaps("d " * 20, grams) and unknown == ["other"]


@pytest.mark.parametrize("text", ["Straße über Öl", "数字 和 字母", "3.5 kg of x_1"])
def test_words_of_any_script_count(text):
    assert len(ngrams(" ".join([text] * N))) > 0
