"""Metrics, standard errors and counts from the rows of samples, those that are stored too."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from mora_repro.data.benchmarks import Scores
from mora_repro.evaluation import metrics, scored
from mora_repro.evaluation.scores import together
from mora_repro.results.records import read_samples, write_samples

PAIRS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=40)


def rows(name: str, values: list) -> list[dict]:
    return [{"benchmark": name, "prompt": "\u2028\x85 p", "metrics": {name: value}} for value in values]


def test_scores_are_computed_again_from_stored_samples(tmp_path):
    samples = [
        *rows("exact", [1, 0, True, 0]),
        *rows("characters", [[3, 4], [1, 2]]),
        *rows("fpb", [{"weighted_f1": [0, 1]}, {"weighted_f1": [1, 1]}, {"weighted_f1": [2, 2]}]),
        *rows("biommlu", [{"mean_of_means": ["a", 1.0]}, {"mean_of_means": ["b", 0.0]}, {"mean_of_means": ["b", 1.0]}]),
    ]
    samples[0]["cut"] = True
    scores = scored(samples)
    assert scores.metrics["exact"] == 50 and scores.metrics["characters"] == pytest.approx(100 * 4 / 6)
    assert scores.metrics["biommlu"] == 75 and scores.metrics["cut_prompts"] == 1
    assert scores.counts == {"exact": 4, "characters": 2, "fpb": 3, "biommlu": 3} and set(scores.stderr) == set(
        scores.counts
    )
    write_samples(tmp_path / "run.json", samples)
    assert read_samples(tmp_path / "run.json") == json.loads(json.dumps(samples))
    assert scored(read_samples(tmp_path / "run.json")) == Scores(
        scores.metrics, scores.stderr, scores.counts, read_samples(tmp_path / "run.json")
    )


@given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_the_standard_error_of_a_share_is_that_of_the_mean(right):
    scores = scored(rows("m", right))
    assert scores.metrics["m"] == pytest.approx(100 * np.mean(right))
    assert scores.stderr["m"] == pytest.approx(100 * stats.sem(right))


def test_a_bootstrapped_standard_error_is_near_the_analytic_one():
    values = [float(number % 3 == 0) for number in range(300)]
    analytic = scored(rows("m", values)).stderr["m"]
    bootstrapped = scored(rows("m", [{"mean_of_means": ["one", value]} for value in values]))
    assert bootstrapped.metrics["m"] == pytest.approx(100 * np.mean(values))
    assert bootstrapped.stderr["m"] == pytest.approx(analytic, rel=0.2)
    assert bootstrapped.stderr == scored(rows("m", [{"mean_of_means": ["one", value]} for value in values])).stderr


@settings(max_examples=20, deadline=None)
@given(PAIRS, PAIRS)
def test_f1_is_sklearns_and_that_of_groups_is_their_mean(first, second):
    golds, answers = zip(*first)
    assert metrics.micro_f1(first) == pytest.approx(np.mean([gold == answer for gold, answer in first]))
    assert metrics.weighted_f1(first) == f1_score(golds, answers, average="weighted", zero_division=0.0)
    grouped = [("a", *pair) for pair in first] + [("b", *pair) for pair in second]
    mean = (metrics.weighted_f1(first) + metrics.weighted_f1(second)) / 2
    assert metrics.mean_of_weighted_f1(grouped) == pytest.approx(mean)


def test_one_sample_has_no_standard_error():
    assert scored(rows("m", [1])).stderr == {} and scored(rows("m", [{"micro_f1": [0, 0]}])).stderr == {}


def test_the_mean_of_benchmarks_takes_them_as_independent_and_adds_up_cut_prompts():
    parts = [scored([{**row, "cut": True} for row in rows(name, [0, 1, 1])]) for name in ("a", "b")]
    whole = together(parts, mean_of=("a", "b"))
    assert whole.metrics["mean"] == pytest.approx(200 / 3) and whole.metrics["cut_prompts"] == 6
    assert whole.stderr["mean"] == pytest.approx(parts[0].stderr["a"] / 2**0.5) and whole.counts["mean"] == 6


@pytest.mark.parametrize(
    ("answer", "gold", "f1"),
    [
        ("Acme Bank (ORG), Jane Roe (PER)", "Acme Bank (ORG), Jane Roe (PER)", 1),
        (" jane roe (PER); Acme  Bank (org)", "Acme Bank (ORG), Jane Roe (PER)", 1 / 2),
        ("Acme Bank (PER)", "Acme Bank (ORG)", 0),
        ("Bank (ORG)", "Acme Bank (ORG)", 0),
        ("Jane Roe (PER), Jane Roe (PER)", "Jane Roe (PER), Denver (LOC)", 2 / 3),
        ("", "Denver (LOC)", 0),
        ("none", "none", 1),
    ],
)
def test_an_entity_is_right_where_its_text_and_its_type_are(answer, gold, f1):
    assert metrics.ner_results({"label": [gold]}, [answer]) == {"entity_f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("25%", "0.25", 1),
        ("it is 0.2549, or so", "25.0%", 1),
        ("0.27", "25%", 0),
        ("$ 1,234.5", "1234.5", 1),
        ("1.2k", "1,200", 1),
        ("3 bn", "3,000 m", 1),
        ("-4", "4", 0),
        ("of 7 and 9", "9", 1),
        ("no number", "9", 0),
        ("8\n9", "9", 0),
        ("9", "none", 0),
        ("9", ["9", "8"], 1),
        (" 5.", "5", 1),
    ],
)
def test_some_number_of_the_first_line_is_near_the_gold_one(answer, gold, right):
    assert metrics.convfinqa_results({"label": gold}, [answer]) == {"exact_match": right}
