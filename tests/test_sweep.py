"""Many runs at a time: only what is missing runs, a failure does not stop the rest, an interrupt loses nothing."""

import signal
import subprocess
import sys

import pandas as pd
import pytest
from processes import wait_for_checkpoint
from tiny import ROOT, TINY

from mora_repro.results.records import Store
from mora_repro.results.search import search_table, tries
from mora_repro.spec.compose import options
from mora_repro.spec.table import Cell, load_table, ranks
from mora_repro.sweep import Job, run_jobs

SWEEP = """
import sys
from pathlib import Path
from mora_repro.results.records import Store
from mora_repro.sweep import Job, run_jobs
jobs = [Job.of([f"method={method}", "training.steps=300", *sys.argv[2:]]) for method in ("lora", "mora", "fft")]
sys.exit(run_jobs(jobs, Store(Path(sys.argv[1])), workers=2))
"""


@pytest.mark.slow
def test_only_missing_runs_are_run_and_a_failure_does_not_stop_the_rest(tmp_path, capfd):
    store = Store(tmp_path)
    jobs = [Job.of(["method=fft", *TINY, f"lr={lr}"]) for lr in ("1e-3", "1e30", "2e-3")]
    assert run_jobs(jobs[:1], store, workers=2) == 0
    [first] = (tmp_path / "runs").glob("*.json")
    before = first.stat().st_mtime_ns
    capfd.readouterr()
    assert run_jobs(jobs, store, workers=2) == 1
    said = capfd.readouterr().err
    assert "3 runs, 1 finished before" in said.replace("\n", " ")
    assert "failed" in said and "learning rate is too high" in said.replace("\n", " ")
    assert first.stat().st_mtime_ns == before
    assert [store.load(job.spec.id).status for job in jobs] == ["finished", "diverged", "finished"]
    assert (store.work(jobs[2].spec.id) / "log.txt").read_text().strip().endswith("model")


def alive(pattern: str) -> bool:
    return subprocess.run(["pgrep", "-f", pattern], capture_output=True).returncode == 0


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path):
    command = [sys.executable, "-c", SWEEP, str(tmp_path), *TINY, "training.steps=300"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_checkpoint(tmp_path)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert not alive(f"out={tmp_path}")
    statuses = [record.status for record in Store(tmp_path).load_all()[0]]
    assert "interrupted" in statuses
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    records, problems = Store(tmp_path).load_all()
    assert [record.status for record in records] == ["finished"] * 3 and not problems
    assert all(record.curve.step == list(range(1, 301)) for record in records)


@pytest.mark.parametrize("name", options("table"))
@pytest.mark.parametrize("scale", options("scale"))
def test_every_cell_of_every_table_composes(name, scale):
    cells = load_table(name).cells(scale)
    assert len(set(cells)) == len(cells)
    for cell in cells:
        spec = cell.spec(seed=3)
        assert (spec.scale, spec.seed, spec.r, spec.method.name) == (scale, 3, cell.r, cell.method)


def test_table_2_has_the_rows_of_the_paper():
    cells = [(cell.method, cell.r) for cell in load_table("2").cells("paper")]
    assert cells == [("fft", None), ("lora", 8), ("mora", 8), ("lora", 256), ("mora", 256)]
    assert [r for _, r in [(c.method, c.r) for c in load_table("figure2").cells("paper")]][1:] == ranks("paper")["all"]


@pytest.mark.slow
@pytest.mark.parametrize(("names", "number"), [(("2", "figure2"), 15), (("gsm8k",), 6)])
def test_every_cell_gets_the_same_number_of_different_tries(names, number):
    for cell in {cell for name in names for cell in load_table(name).cells("mini")}:
        ids = {Job.of([*cell.overrides(100), *extra]).spec.id for extra in tries(cell)}
        assert len(ids) == len(tries(cell)) == number


def test_the_best_try_has_the_best_mean_score_and_edges_are_marked(tmp_path):
    record = next(iter(Store(ROOT / "results").load_all()[0]), None)
    if record is None:
        pytest.skip("no record to make tries from")
    store, specs = Store(tmp_path), []
    scores = {("lora", 4, 1e-3): [50, 60], ("lora", 4, 2e-3): [10, 100], ("lora", 4, 3e-3): [55, 55]}
    for (method, r, lr), values in scores.items():
        spec = Cell(method, r, "uuid", "mini").spec(100).model_copy(update={"lr": lr})
        evaluations = [
            record.evaluations[0].model_copy(update={"step": 75 * (i + 1), "metrics": {"char_accuracy": value}})
            for i, value in enumerate(values)
        ]
        made = record.model_copy(update={"id": spec.id, "spec": spec, "evaluations": evaluations, "status": "finished"})
        store.save(made)
        specs.append(spec)
    diverged = specs[0].model_copy(update={"lr": 1.0})
    store.save(record.model_copy(update={"id": diverged.id, "spec": diverged, "status": "diverged", "evaluations": []}))
    specs.append(diverged)
    table = search_table(specs, store)
    # 1e-3 and 2e-3 and 3e-3 all have a mean of 55: the lowest rate wins, and it is an edge of the grid.
    assert table.score.tolist()[:3] == [55, 55, 55] and pd.isna(table.score[3])
    assert table.best.tolist() == [True, False, False, False] and table.edge.tolist() == [True, False, False, False]


@pytest.mark.slow
@pytest.mark.parametrize(("names", "rows"), [(("2", "figure2"), 9), (("gsm8k",), 5)])
def test_the_mini_recipes_are_the_best_of_the_search_that_is_recorded(names, rows):
    table = pd.read_csv(ROOT / "results" / "search" / f"{'-'.join(names)}-mini.csv")
    cells = {cell for name in names for cell in load_table(name).cells("mini")}
    tried = {Job.of([*cell.overrides(100), *extra]).spec.id for cell in cells for extra in tries(cell)}
    assert set(table.record) == tried and len(cells) == rows
    for (task, method, r), tried in table.groupby(["task", "method", "r"], dropna=False):
        [best] = tried[tried.best].to_dict("records")
        assert best["score"] == tried.score.max()
        spec = Cell(method, None if pd.isna(r) else int(r), task, "mini").spec(0)
        assert spec.lr == best["lr"], f"{method} r={r}"
        if method == "lora":
            assert spec.method.peft["lora_alpha"] == best["alpha"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["out=/dev/null/x"], "out=/dev/null/x can't be written"),
        (["out=/proc/x"], "out=/proc/x can't be written"),
        (["seeds=three"], "seeds='three'"),
        (["seeds=0"], "seeds=0: "),
        (["seeds=101"], "seeds=101: "),
        (["search=true", "search_seed=1"], "search_seed=1: "),
        (["workers=-1"], "workers=-1: "),
        (["scale=huge"], "scale=huge is not known"),
        (["scale=paper"], "python scripts/sweep.py 'table=[2]' scale=mini"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_error(command_here, arguments, said):
    done = command_here("scripts/sweep.py", "table=2", "scale=mini", *arguments, check=False)
    assert done.returncode == 2 and said in done.stderr
