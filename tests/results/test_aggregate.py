"""Which records make a cell, and the statistics over them, by hand."""

import math

import pytest
from results.made import record

from mora_repro.results.aggregate import Interval, collect, leader, paired_difference
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
    assert result.at_step("char_accuracy", 300) == Interval(4.0, math.inf, 1)


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


def test_a_seed_without_all_steps_has_no_mean_over_them():
    whole, torn = record(LORA, 0, [1, 2, 3, 6]), record(LORA, 1, [1, 2, 3, 4])
    torn = torn.model_copy(update={"evaluations": torn.evaluations[:3]})
    [result] = collect([LORA], [whole, torn])
    assert result.mean_by_seed("char_accuracy", [75, 150, 225, 300]) == {0: 3.0}
    assert [result.at_step("char_accuracy", step).n for step in (75, 300)] == [2, 1]
    assert result.at_step("char_accuracy", 76) is None


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([Interval(50, 5, 3), Interval(60.1, 5, 3)], 1),
        ([Interval(50, 5, 3), Interval(60, 5, 3)], None),  # they touch
        ([Interval(40, 25, 3), Interval(50, 1, 3), Interval(60, 1, 3)], None),  # the third's wide interval reaches
        ([Interval(50, math.inf, 1), Interval(90, math.inf, 1)], None),
        ([Interval(99, math.inf, 1), Interval(50, 1, 3), Interval(40, 1, 3)], None),  # the best has one seed
        ([Interval(10, math.inf, 1), Interval(50, 1, 3)], None),
        ([None, Interval(50, 1, 3), Interval(40, 1, 3)], 1),
        ([None, Interval(50, 1, 3)], None),
        ([Interval(100, 0, 3), Interval(100, 0, 3)], None),
    ],
)
def test_a_row_leads_only_where_no_other_interval_reaches_its_own(intervals, expected):
    assert leader(intervals) == expected


def test_differences_are_paired_by_seed():
    # 10, 11 and 12 points: between the seeds the values differ by far more.
    ours = paired_difference({0: 20.0, 1: 51.0, 2: 92.0, 7: 0.0}, {0: 10.0, 1: 40.0, 2: 80.0, 8: 0.0})
    assert (ours.mean, ours.n) == (11.0, 3)
    assert ours.half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
