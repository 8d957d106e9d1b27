"""Which records make a cell, and the statistics over them, by hand."""

import math

import pytest
from results.made import record
from scipy import stats

from mora_repro.results.aggregate import Interval, collect, holm, p_value, paired_difference, winner
from mora_repro.spec.table import FIRST_SEARCH_SEED, Cell

LORA = Cell("lora", 4, "uuid", "mini")


def test_the_interval_of_three_values_is_the_one_computed_by_hand():
    # Mean 4, standard deviation 2, t with 2 degrees of freedom at 97.5 % is 4.302653.
    interval = Interval.of([2.0, 4.0, 6.0])
    assert (interval.mean, interval.n) == (4.0, 3)
    assert interval.half == pytest.approx(4.302653 * 2 / math.sqrt(3), abs=1e-6)
    assert interval.high - interval.low == pytest.approx(2 * interval.half)


def test_one_value_bounds_nothing_and_none_is_an_error():
    assert Interval.of([5.0]) == Interval(5.0, math.inf, 1)
    assert Interval.of([5.0, 5.0]).half == 0
    with pytest.raises(ValueError, match="at least one"):
        Interval.of([])


@pytest.mark.parametrize(
    "overrides",
    [["lr=3.3e-3"], ["method.peft.lora_alpha=8"], ["task.pairs=65"], ["r=8"], ["model.architecture.hidden_size=64"]],
)
def test_a_record_with_another_setting_is_no_record_of_the_cell(overrides):
    own = record(LORA, 0, [1, 2, 3, 4])
    other = record(LORA, 1, [90, 90, 90, 90], overrides=overrides)
    [result] = collect([LORA], [own, other])
    assert result.records == {0: own}
    assert result.final("char_accuracy") == {0: 4.0}


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_only_finished_runs_count(status):
    assert collect([LORA], [record(LORA, 0, [1, 2, 3, 4], status=status)])[0].records == {}


def test_the_search_s_seed_joins_no_table_though_its_chosen_try_is_the_recipe():
    seed = FIRST_SEARCH_SEED
    chosen = record(LORA, seed, [90, 90, 90, 90])
    assert chosen.id == LORA.spec(seed).id
    assert collect([LORA], [chosen])[0].records == {}


def test_scales_do_not_mix():
    mini, paper = Cell("lora", 8, "uuid", "mini"), Cell("lora", 8, "uuid", "paper")
    records = [record(mini, 0, [1, 1, 1, 1]), record(paper, 0, [9, 9, 9, 9])]
    found = [list(result.records.values()) for result in collect([mini, paper], records)]
    assert found == [records[:1], records[1:]]


def test_the_mean_over_the_steps_is_higher_where_it_is_learnt_earlier():
    [result] = collect([LORA], [record(LORA, 0, [1, 2, 3, 6]), record(LORA, 1, [6, 6, 6, 6])])
    assert result.mean_over_steps("char_accuracy") == {0: 3.0, 1: 6.0}
    assert result.by_step("char_accuracy")[0] == {75: 1, 150: 2, 225: 3, 300: 6}
    assert result.final("char_accuracy") == {0: 6, 1: 6}
    assert result.mean_over_steps("exact") == {} == result.final("exact")


def test_p_values_are_those_of_scipy_s_paired_test():
    ours, theirs = [3.0, 5.0, 4.0, 7.0], [1.0, 2.0, 3.5, 4.0]
    assert p_value([a - b for a, b in zip(ours, theirs)]) == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert p_value([2.0, 2.0]) == 0 and p_value([0.0, 0.0]) == 1


def test_holm_s_correction_is_the_one_computed_by_hand():
    # 0.01 * 4, 0.02 * 3, 0.03 * 2, and the largest never below one before it.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def seeds(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([seeds(50, 51, 52), seeds(60, 61, 62.1)], 1),
        ([seeds(50, 90, 10), seeds(52, 92.1, 12)], 1),  # paired by seed: 2 points always
        ([seeds(50, 51, 52), seeds(53, 51, 60)], None),
        ([seeds(50), seeds(90)], None),  # one seed
        ([seeds(99), seeds(50, 51, 52)], None),  # the best shares one seed with the other
        ([seeds(), seeds(50, 51, 52), seeds(40, 41, 42)], 1),
        ([seeds(), seeds(50, 51, 52)], None),
        ([seeds(100, 100, 100), seeds(100, 100, 100)], None),
        ([seeds(40, 41, 42), seeds(50, 51, 52), seeds(49, 52, 50)], None),  # one is apart, the other is not
    ],
)
def test_a_row_wins_only_where_it_is_better_than_every_other(rows, expected):
    assert winner(rows, "char_accuracy") == expected


def test_where_lower_is_better_the_lowest_wins():
    assert winner([seeds(50, 51, 52), seeds(60, 61, 62.1)], "perplexity") == 0


def test_many_comparisons_ask_for_more_than_one_does():
    close = seeds(1.0, 2.0, 1.6)
    apart = seeds(0, 0, 0)
    assert 0.025 < p_value(list(close.values())) < 0.05
    assert winner([close, apart], "m") == 0
    assert winner([close, apart, dict(apart)], "m") is None


def test_differences_are_paired_by_seed():
    # 10, 11 and 12 points: between the seeds the values differ by far more.
    ours = paired_difference({0: 20.0, 1: 51.0, 2: 92.0, 7: 0.0}, {0: 10.0, 1: 40.0, 2: 80.0, 8: 0.0})
    assert (ours.mean, ours.n) == (11.0, 3)
    assert ours.half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
