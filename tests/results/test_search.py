"""Every method gets the same number of tries; the best, from records alone, becomes its setting."""

import math

import pytest
from results.made import record, tried
from tiny import ROOT

from mora_repro.results import search as searches
from mora_repro.results.aggregate import by_kind, collect
from mora_repro.results.records import Record, Store
from mora_repro.results.search import grid, search, settled
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.compose import options
from mora_repro.spec.table import Cell, load_table

LORA = Cell("lora", 4, "gsm8k", "mini")
MORA = Cell("mora", 4, "gsm8k", "mini")


def by_rate(cell: Cell, scores: dict[float, float]) -> list[Record]:
    return [tried(cell, (("lr", rate),), score) for rate, score in scores.items()]


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_every_cell_of_a_task_tries_as_many_different_settings(scale):
    cells = {cell for name in options("table") for cell in load_table(name).cells(scale)}
    sizes: dict[str, set[int]] = {}
    for cell in cells:
        settings = grid(cell)
        assert len(set(settings)) == len(settings) and all(dict(setting)["lr"] > 0 for setting in settings)
        sizes.setdefault(cell.task, set()).add(len(settings))
    assert all(len(found) == 1 for found in sizes.values()), sizes


def test_a_row_with_fewer_rates_goes_on_below_and_above_them():
    # At scale paper the rows of UUID have one rate (FFT) or three, and three tries each.
    assert [dict(setting)["lr"] for setting in grid(Cell("fft", None, "uuid", "paper"))] == [1.5e-5, 3e-5, 6e-5]
    assert [dict(setting)["lr"] for setting in grid(Cell("lora", 8, "uuid", "paper"))] == [1e-4, 2e-4, 3e-4]


def test_a_try_composes_to_its_spec_and_real_data_are_scored_on_the_validation_set():
    overrides, spec = LORA.tried((("lr", 0.00123), ("method.peft.lora_alpha", 99)))
    assert spec == RunSpec.from_config(compose_config(overrides))
    assert (spec.lr, spec.method.peft["lora_alpha"], spec.seed, spec.eval.split) == (0.00123, 99, 100, "test")
    overrides, spec = Cell("mora", 8, "gsm8k", "paper").tried((("lr", 1e-4),))
    assert spec == RunSpec.from_config(compose_config(overrides)) and spec.eval.split == "validation"


def test_further_rates_go_beyond_an_edge_or_towards_the_better_neighbour():
    rates = [dict(setting)["lr"] for setting in grid(MORA)]
    low, high = rates[0], rates[-1]
    rising = by_rate(MORA, {rate: rate for rate in rates})
    first = search(MORA, rising)
    assert first.tries[-1] == (("lr", 2 * high),) and first.missing == [(("lr", 2 * high),)] and not first.finished
    second = search(MORA, [*rising, *by_rate(MORA, {2 * high: high * 0.9})])
    assert dict(second.tries[-1])["lr"] == pytest.approx(high * math.sqrt(2), rel=0.01)
    falling = search(MORA, by_rate(MORA, {rate: -rate for rate in rates}))
    assert falling.missing == [(("lr", low / 2),)]
    middle = rates[2]
    peak = search(MORA, by_rate(MORA, {rate: 10.0 if rate == middle else rate for rate in rates}))
    assert dict(peak.missing[0])["lr"] == pytest.approx(math.sqrt(middle * rates[3]), rel=0.01)


def test_a_search_ends_after_its_rounds_and_its_best_is_the_cell_s_setting():
    records = by_rate(MORA, {dict(setting)["lr"]: 10.0 for setting in grid(MORA)})
    assert settled(MORA, records) == MORA
    while not (found := search(MORA, records)).finished:
        assert len(found.missing) == 1
        records += [tried(MORA, found.missing[0], 50.0 + len(records))]
    assert len(found.tries) == len(grid(MORA)) + 2
    assert found.best == found.tries[-1]
    cell = settled(MORA, records)
    assert cell.spec(0).lr == dict(found.best)["lr"] and cell.name == MORA.name
    ours = cell.spec(1)
    final = record(MORA, 1, [60] * len(ours.training.evaluate_at), metric="exact_match").model_copy(
        update={"spec": ours, "id": ours.id}
    )
    assert collect([MORA], [*records, final])[0].records == {1: final}
    assert collect([MORA], [final])[0].records == {}  # its rate is not the recipe's


def test_of_equal_scores_the_lowest_rate_is_taken_and_a_diverged_try_never():
    rates = [dict(setting)["lr"] for setting in grid(MORA)]
    records = [tried(MORA, (("lr", rates[0]),), 99, "diverged"), *by_rate(MORA, {rate: 5.0 for rate in rates[1:]})]
    found = search(MORA, records)
    assert found.best == (("lr", rates[1]),) and found.scores[(("lr", rates[0]),)] == -math.inf


@pytest.mark.parametrize(
    "override", ["training.steps=200", "task.train_limit=100", "method.peft.operator=sharing", "seed=101"]
)
def test_a_run_with_another_override_is_no_try(override):
    rate = dict(grid(MORA)[0])["lr"]
    overrides = [*MORA.with_settings((("lr", rate),)).overrides(100), override]
    spec = RunSpec.from_config(compose_config(overrides))
    made = tried(MORA, (("lr", rate),), 9.0).model_copy(update={"spec": spec, "id": spec.id})
    assert search(MORA, [made]).scores == {}


def test_where_lower_is_better_the_lowest_score_is_the_best():
    cell, made = Cell("mora", 16, "pretrain", "mini"), []
    for setting in grid(cell):
        _, spec = cell.tried(setting)
        value = 20 + dict(setting)["lr"]
        each = record(cell, 100, [value], metric="perplexity")
        made.append(each.model_copy(update={"spec": spec, "id": spec.id}))
    assert dict(search(cell, made).best)["lr"] == min(dict(setting)["lr"] for setting in grid(cell))


def test_the_tries_table_has_them_all_with_the_best_marked():
    rates = [dict(setting)["lr"] for setting in grid(MORA)]
    records = by_rate(MORA, {rate: rate for rate in rates})
    while not (found := search(MORA, records)).finished:
        records += [tried(MORA, found.missing[0], 0.0)]
    table = searches.table([found])
    assert sorted(table.record) == sorted(record.id for record in records)
    assert table[table.best].lr.tolist() == [rates[-1]] and not table.edge.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2", "figure2"])
def test_the_mini_recipes_are_the_best_of_the_searches_whose_records_are_here(name):
    near = by_kind(Store(ROOT / "results").load_all()[0])
    for cell in load_table(name).cells("mini"):
        found = search(cell, near[cell.method, cell.r, cell.task, cell.scale])
        assert found.finished and cell.with_settings(found.best).spec(0).id == cell.spec(0).id, cell.name
