"""Made-up records give each verdict, with the numbers that decide it."""

import pytest
from results.made import record, searched

from mora_repro.report import verdicts
from mora_repro.report.verdicts import Claim, judge
from mora_repro.results.aggregate import collect
from mora_repro.spec.table import Cell, Part

LORA, MORA = Cell("lora", 4, "uuid", "mini"), Cell("mora", 4, "uuid", "mini")


def claim(kind: str = "better", **fields) -> Claim:
    sides = {"first": Part(method="mora", rank="low"), "second": Part(method="lora", rank="low")}
    fields = {"metric": "char_accuracy", "task": "uuid", **sides, **fields}
    return Claim(id="x", claim="MoRA is better.", where="here", kind=kind, **fields)


def verdict(mora: list[float], lora: list[float], the_claim: Claim | None = None, **made) -> verdicts.Verdict:
    records = [record(MORA, seed, [value] * 4, **made) for seed, value in enumerate(mora)]
    records += [record(LORA, seed, [value] * 4, **made) for seed, value in enumerate(lora)]
    return judge(the_claim or claim(), "mini", *collect([MORA, LORA], records))


def test_it_holds_where_the_paired_interval_lies_above_zero():
    found = verdict([39.0, 60.0, 81.0], [10.0, 30.0, 50.0])  # 29, 30, 31 points, though the seeds differ by 40
    assert found.word == "holds" and found.effect == pytest.approx(30) and found.needed is None
    assert found.reason == ("MoRA r=4 +30.00 against LoRA r=4 (95 % interval +27.52 to +32.48, 3 seeds, d = 30.0)")
    assert len(found.records) == 6


def test_it_does_not_hold_where_the_interval_lies_below_zero():
    assert verdict([10.0, 30.0, 50.0], [39.0, 60.0, 81.0]).word == "does not hold"


def test_it_cannot_tell_where_the_interval_has_zero_and_says_how_many_seeds_would_decide():
    found = verdict([20.0, 60.0], [10.0, 30.0])  # 10 and 30 points: mean 20, deviation 14.1
    assert found.word == "cannot tell" and found.needed == 5  # t(4) 2.776 * 14.14 / sqrt(5) = 17.6 < 20 < 22.5 at 4
    assert "5 seeds would decide" in found.reason


def test_no_number_of_seeds_is_promised_where_there_is_no_difference():
    found = verdict([10.0, 20.0], [20.0, 10.0])
    assert found.word == "cannot tell" and found.needed is None


def test_a_cell_that_searched_its_rate_is_not_judged_against_one_that_has_not():
    lora = [record(LORA, seed, [10.0] * 4) for seed in range(3)]
    mora = [record(MORA, seed, [90.0] * 4) for seed in range(3)]
    assert judge(claim(), "mini", *collect([MORA, LORA], [*mora, *lora])).word == "holds"
    found = judge(claim(), "mini", *collect([MORA, LORA], [*searched(MORA), *lora]))
    assert found.word == "cannot tell" and found.needed is None
    assert "LoRA r=4, whose rate has no search behind it, unlike MoRA r=4's" in found.reason
    assert judge(claim(), "mini", *collect([MORA, LORA], [*searched(MORA), *searched(LORA)])).reason.endswith("seed)")


@pytest.mark.parametrize(
    ("mora", "word"),
    [
        ([50.0, 50.1, 49.9], "holds"),
        ([51.0, 51.1, 51.2], "holds"),
        ([53.0, 53.1, 53.2], "does not hold"),
        ([47.0, 46.9, 46.8], "does not hold"),
        ([50.0, 55.0, 45.0], "cannot tell"),
        ([52.0, 52.1, 51.9], "cannot tell"),  # about the margin
    ],
)
def test_on_par_is_within_the_margin(mora, word):
    assert verdict(mora, [50.0, 50.0, 50.0], claim("on_par", margin=2.0)).word == word


def test_one_seed_without_standard_errors_cannot_tell():
    found = verdict([90.0], [10.0])
    assert found.word == "cannot tell" and found.reason.endswith("(one seed)") and found.needed is None


def test_one_seed_cannot_tell_and_gives_the_interval_of_its_samples():
    # The difference of 5 points has the standard error 1.414: 1.96 times that is 2.77.
    found = verdict([60.0], [55.0], stderr=1.0)
    assert found.samples and found.word == "cannot tell"
    assert "one seed; over its samples alone +2.23 to +7.77" in found.reason
    assert not verdict([60.0, 61.0], [55.0, 57.0], stderr=1.0).samples


def test_the_mean_over_the_steps_has_no_standard_error():
    assert verdict([60.0], [10.0], claim(over="steps"), stderr=1.0).word == "cannot tell"


def test_where_lower_is_better_the_lower_one_holds():
    lower = claim(metric="perplexity")
    assert verdict([10.0, 11.0, 12.0], [20.0, 21.0, 22.1], lower, metric="perplexity").word == "holds"
    assert verdict([20.0, 21.0, 22.1], [10.0, 11.0, 12.0], lower, metric="perplexity").word == "does not hold"


def test_what_has_not_run_is_said_by_name():
    assert verdict([], [10.0]).reason == "not run: MoRA r=4"
    unpaired = [record(MORA, 0, [1] * 4), record(LORA, 1, [1] * 4)]
    found = judge(claim(), "mini", *collect([MORA, LORA], unpaired))
    assert (found.word, found.reason) == ("not run", "no seed has run with both MoRA r=4 and LoRA r=4")


@pytest.mark.parametrize(("trainable", "word"), [(4080, "holds"), (3920, "holds"), (4081, "does not hold")])
def test_parameters_are_compared_to_two_percent(trainable, word):
    records = [record(MORA, 0, [1] * 4, trainable=trainable), record(LORA, 0, [1] * 4, trainable=4000)]
    found = judge(claim("parameters", metric=None), "mini", *collect([MORA, LORA], records))
    assert found.word == word and f"{trainable:,} in MoRA r=4, 4,000 in LoRA r=4" == found.reason


def test_every_claim_is_decided_by_cells_that_compose():
    found = verdicts.verdicts("mini", []) + verdicts.verdicts("paper", [])
    assert {each.word for each in found} == {"not run"}
    assert len({each.claim.id for each in found}) == len(found) / 2
    assert all(each.claim.margin for each in found if each.claim.kind == "on_par")
