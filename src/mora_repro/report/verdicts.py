"""The paper's claims, and what the records say of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import yaml
from pydantic import PositiveFloat
from scipy import stats

from ..results.aggregate import CONFIDENCE, CellResult, Interval, collect, paired_difference
from ..results.records import Record, higher_is_better
from ..spec.compose import ROOT
from ..spec.table import Part, at, cells_in
from .tables import BUDGET_TOLERANCE

CLAIMS = ROOT / "results" / "claims.yaml"
MOST_SEEDS = 1000  # beyond which a number of seeds is no advice

Word = Literal["holds", "does not hold", "cannot tell", "not run"]


class Claim(Part):
    """An entry of results/claims.yaml, whose head says what its fields are."""

    id: str
    claim: str
    where: str
    kind: Literal["better", "on_par", "parameters"]
    metric: str | dict[str, str] | None = None
    over: Literal["end", "steps"] = "end"
    margin: PositiveFloat | None = None
    first: Part
    second: Part


@dataclass(frozen=True)
class Verdict:
    """What the records of a scale say of a claim.

    `difference` is first minus second, paired by seed, in the metric's own units; where `samples`, its interval is over
    the samples of the one seed that has run, and says nothing of how runs differ. `effect` is Cohen's d of the paired
    differences, and `needed` the number of seeds at which an interval of the spread seen would decide; None where not
    known.
    """

    claim: Claim
    word: Word
    first: CellResult
    second: CellResult
    difference: Interval | None = None
    samples: bool = False
    effect: float | None = None
    needed: int | None = None

    @property
    def records(self) -> list[str]:
        """The ids of the records behind it."""
        return [record.id for result in (self.first, self.second) for record in result.records.values()]

    @property
    def unequal(self) -> bool:
        """One side has searched its rate, the other has not: their difference says nothing of the methods."""
        return self.first.searched != self.second.searched

    @property
    def reason(self) -> str:
        """The numbers that decide, in words."""
        first, second = self.first.cell.name, self.second.cell.name
        if self.word == "not run":
            missing = [result.cell.name for result in (self.first, self.second) if not result.records]
            return f"not run: {', '.join(missing)}" if missing else f"no seed has run with both {first} and {second}"
        if self.claim.kind == "parameters":
            return f"{self.first.trainable:,} in {first}, {self.second.trainable:,} in {second}"
        assert self.difference is not None
        text = f"{first} {self.difference.mean:+.2f} against {second}"
        if self.unequal:
            text += f", whose rate has {'no search' if self.first.searched else 'a search'} behind it, unlike {first}'s"
        low, high = self.difference.low, self.difference.high
        if self.samples:
            return f"{text} (one seed; over its samples alone {low:+.2f} to {high:+.2f})"
        if self.difference.n == 1:
            return f"{text} (one seed)"
        text += f" (95 % interval {low:+.2f} to {high:+.2f}, {self.difference.n} seeds"
        if self.effect is not None:
            text += f", d = {self.effect:.1f}"
        return f"{text}; {self.needed} seeds would decide)" if self.needed else f"{text})"


def claims() -> list[Claim]:
    return [Claim.model_validate(entry) for entry in yaml.safe_load(CLAIMS.read_text())]


def verdicts(scale: str, records: Sequence[Record]) -> list[Verdict]:
    """A verdict on every claim from the records of a scale."""
    every = claims()
    cells = [cell for claim in every for side in (claim.first, claim.second) for cell in cells_in(scale, side, claim)]
    results = collect(cells, records)
    return [judge(claim, scale, *pair) for claim, pair in zip(every, zip(results[::2], results[1::2]), strict=True)]


def judge(claim: Claim, scale: str, first: CellResult, second: CellResult) -> Verdict:
    """The verdict on a claim from the records of its two cells.

    better: holds where the difference's 95 % interval lies on the right side of 0, does not hold where it lies on the
    other. on_par: holds where the interval lies within the margin, does not hold where it lies outside. Else the seeds
    cannot tell, and nor can they where one cell has searched its rate and the other has not. One seed never can: the
    interval over its samples, which is given where the record has standard errors, leaves out how runs differ.
    """
    if claim.kind == "parameters":
        ours, theirs = first.trainable, second.trainable
        if ours is None or theirs is None:
            return Verdict(claim, "not run", first, second)
        near = abs(ours - theirs) <= BUDGET_TOLERANCE * theirs
        return Verdict(claim, "holds" if near else "does not hold", first, second)
    assert claim.metric is not None  # the other kinds compare one
    metric = at(claim.metric, scale)
    values = [r.mean_over_steps(metric) if claim.over == "steps" else r.final(metric) for r in (first, second)]
    difference = paired_difference(*values)
    if difference is None:
        return Verdict(claim, "not run", first, second)
    word, samples = _word(claim, metric, difference), False
    [*seeds] = values[0].keys() & values[1].keys()
    if len(seeds) == 1 and claim.over == "end" and (error := _error(metric, seeds[0], first, second)) is not None:
        half = float(stats.norm.ppf((1 + CONFIDENCE) / 2) * error)
        difference, samples = Interval(difference.mean, half, 1), True
    effect = needed = None
    if difference.n > 1:
        spread = statistics.stdev(values[0][seed] - values[1][seed] for seed in seeds)
        effect = difference.mean / spread if spread else None
        needed = _seeds_needed(claim, metric, difference.mean, spread) if word == "cannot tell" else None
    found = Verdict(claim, word, first, second, difference, samples, effect, needed)
    return replace(found, word="cannot tell", needed=None) if found.unequal else found


def _error(metric: str, seed: int, *results: CellResult) -> float | None:
    """The standard error, over samples, of the difference between two records' last evaluations."""
    errors = [result.records[seed].evaluations[-1].stderr.get(metric) for result in results]
    return math.hypot(*errors) if None not in errors else None  # type: ignore[arg-type]


def _word(claim: Claim, metric: str, difference: Interval) -> Word:
    sign = 1 if higher_is_better(metric) else -1
    low, high = sorted((sign * difference.low, sign * difference.high))
    if claim.kind == "better":
        return "holds" if low > 0 else "does not hold" if high < 0 else "cannot tell"
    assert claim.margin is not None
    if -claim.margin < low and high < claim.margin:
        return "holds"
    return "does not hold" if low > claim.margin or high < -claim.margin else "cannot tell"


def _seeds_needed(claim: Claim, metric: str, mean: float, spread: float) -> int | None:
    """The fewest seeds whose interval, about the same mean and spread, decides; None beyond MOST_SEEDS."""
    for seeds in range(2, MOST_SEEDS + 1):
        half = stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1) * spread / math.sqrt(seeds)
        if _word(claim, metric, Interval(mean, float(half), seeds)) != "cannot tell":
            return seeds
    return None


def data(found: Sequence[Verdict]) -> pd.DataFrame:
    """A row per claim, in full precision. What is not known is NA."""
    return pd.DataFrame(
        [
            {
                "id": each.claim.id,
                "claim": each.claim.claim,
                "where": each.claim.where,
                "verdict": each.word,
                "difference": each.difference.mean if each.difference else None,
                "low": each.difference.low if each.difference and math.isfinite(each.difference.half) else None,
                "high": each.difference.high if each.difference and math.isfinite(each.difference.half) else None,
                "seeds": each.difference.n if each.difference else 0,
                "effect": each.effect,
                "seeds_needed": each.needed,
                "records": " ".join(each.records),
            }
            for each in found
        ]
    ).astype({"seeds_needed": "Int64"})


def markdown(found: Sequence[Verdict], scale: str) -> str:
    """The claims that have runs, and how many have none."""
    ran = [each for each in found if each.word != "not run"]
    rows = [[each.claim.claim, each.claim.where, f"**{each.word}**", each.reason] for each in ran]
    table = pd.DataFrame(rows, columns=["the paper's claim", "where", f"at scale {scale}", "decided by"])
    text = table.to_markdown(index=False, disable_numparse=True) + "\n"
    return text + (
        f"\n{len(found) - len(ran)} of {len(found)} claims have no runs yet.\n" if len(ran) < len(found) else ""
    )
