"""The sentence holds, does not hold, or cannot tell; and one seed never decides."""

import pytest
from results.made import record, table_records

from mora_repro.report import table2
from mora_repro.report.sentence import sentence
from mora_repro.spec.table import Cell

LEVEL = [60.0, 62.0, 61.0]


def of(lora: list[float], mora: list[float], high: tuple[list[float], list[float]] = (LEVEL, LEVEL)) -> str:
    accuracy = {("lora", 4): lora, ("mora", 4): mora, ("lora", 32): high[0], ("mora", 32): high[1]}
    return sentence(table2.build("mini", table_records(accuracy)))


def test_it_holds_where_the_paired_interval_lies_above_zero():
    # Differences of 29, 30 and 31 points, though the seeds themselves differ by 40.
    text = of([10.0, 30.0, 50.0], [39.0, 60.0, 81.0])
    assert "at r=4, holds, MoRA 30.0 points ahead (95 % interval +27.5 to +32.5, 3 seeds)" in text
    assert "as in the paper (+32.1)" in text.split(";")[0]


def test_it_does_not_hold_where_the_interval_lies_below_zero():
    text = of([39.0, 60.0, 81.0], [10.0, 30.0, 50.0])
    assert "at r=4, does not hold, MoRA 30.0 points behind (95 % interval -32.5 to -27.5, 3 seeds)" in text
    assert "unlike the paper (+32.1)" in text.split(";")[0]


def test_it_cannot_tell_where_the_interval_has_zero():
    text = of([10.0, 30.0], [20.0, 60.0])
    assert "at r=4, 2 seeds cannot tell, MoRA 20.0 points ahead (95 % interval -107.1 to +147.1, 2 seeds)" in text
    assert "holds" not in text and "does not hold" not in text


def test_the_high_rank_has_its_own_verdict():
    text = of(LEVEL, LEVEL, high=([50.0, 51.0, 52.0], [40.0, 41.0, 42.1]))
    assert "at r=32, does not hold, MoRA 10.0 points behind" in text
    assert "unlike the paper (+15.2)" in text or "unlike the paper (+15.3)" in text
    assert "at r=4, 3 seeds cannot tell, MoRA 0.0 points apart" in text
    assert "sweep.py" not in text


def test_one_seed_shows_a_direction_and_the_command_for_three():
    text = of([10.0], [90.0], high=([50.0], [40.0]))
    assert "at r=4, one seed cannot tell it from chance, MoRA 80.0 points ahead, as in the paper (+32.1)" in text
    assert "at r=32, one seed cannot tell it from chance, MoRA 10.0 points behind, unlike the paper" in text
    assert "holds" not in text and "interval" not in text
    assert text.splitlines()[-1].strip() == "python scripts/sweep.py table=2 scale=mini seeds=3"


def test_seeds_that_only_one_method_has_are_no_pair():
    lora, mora = Cell("lora", 4, "uuid", "mini"), Cell("mora", 4, "uuid", "mini")
    records = [record(lora, seed, [10] * 4) for seed in (0, 1)] + [record(mora, seed, [90] * 4) for seed in (1, 2)]
    assert "at r=4, one seed cannot tell" in sentence(table2.build("mini", records))
    apart = sentence(table2.build("mini", [*records[:2], records[3]]))
    assert "at r=4, no seed has run with both; at r=32, no seed has run with both" in apart


@pytest.mark.parametrize(("out", "end"), [("results", "seeds=3"), ("results/demo", "seeds=3 out=results/demo")])
def test_the_command_adds_to_the_same_records(out, end):
    table = table2.build("mini", table_records({("lora", 4): [1.0], ("mora", 4): [2.0]}))
    assert sentence(table, out).endswith(end)
