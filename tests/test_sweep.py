"""Many runs at a time: only what is missing runs, a failure does not stop the rest, an interrupt loses nothing."""

import signal
import subprocess
import sys

import pytest
import yaml
from held import HELD_UUID, held
from processes import until
from tiny import ROOT, TINY

from mora_repro.results.records import Store
from mora_repro.results.search import search
from mora_repro.spec.compose import options
from mora_repro.spec.table import Selection, load_table, ranks
from mora_repro.sweep import Job, Sweep, planned, run_jobs, title

SWEEP = """
import sys
from pathlib import Path
from mora_repro.results.records import Store
from mora_repro.sweep import Job, run_jobs
jobs = [Job.of([f"method={method}", *sys.argv[2:]]) for method in ("lora", "mora", "fft")]
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
def test_an_interrupted_sweep_goes_on_where_it_was(command, tmp_path):
    arguments = ["-c", SWEEP, str(tmp_path), *TINY, HELD_UUID]
    with held(tmp_path / "hold", *arguments) as process:
        process.send_signal(signal.SIGINT)
        until(
            lambda: any("stopping after" in log.read_text() for log in tmp_path.glob("work/*/log.txt")), "no run stops"
        )
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert not alive(f"out={tmp_path}")
    statuses = [record.status for record in Store(tmp_path).load_all()[0]]
    assert "interrupted" in statuses
    command(*arguments)
    records, problems = Store(tmp_path).load_all()
    assert [record.status for record in records] == ["finished"] * 3 and not problems
    assert all(record.curve.step == list(range(1, 13)) for record in records)


@pytest.mark.slow
def test_a_killed_sweep_started_again_loses_no_run_and_makes_none_twice(command, tmp_path):
    """Killed, it can't stop its runs: they go on, and the next sweep takes their records."""
    arguments = ["-c", SWEEP, str(tmp_path), *TINY, HELD_UUID]
    with held(tmp_path / "hold", *arguments) as process:
        process.kill()
        process.wait()
    command(*arguments)
    records, problems = Store(tmp_path).load_all()
    assert [record.status for record in records] == ["finished"] * 3 and not problems
    assert all(record.curve.step == list(range(1, 13)) for record in records)
    # A run's record is there a moment before its last words.
    until(lambda: not alive(f"out={tmp_path}"), "a run of the killed sweep does not end")
    assert_run_once(tmp_path, records)


def assert_run_once(out, records):
    for record in records:
        log = (Store(out).work(record.id) / "log.txt").read_text()
        assert log.count("parameters are trained") == 1, log


def test_the_rows_of_table_4_have_different_names_on_the_screen():
    names = [title(cell.spec(0)) for cell in load_table("4").cells("mini")]
    assert len(set(names)) == len(names) == 8 and "gsm8k MoRA r=4 sharing seed 0 lr 0.01" in names


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


def test_the_papers_tables_are_those_without_what_goes_beyond_it():
    every, paper = (
        set(Selection(table=name, cells=None, scale="mini", seeds=1, search=False).tables) for name in ("all", "paper")
    )
    assert every - paper == {"tasks", "operators", "magnitude"}
    assert paper == {"1", "2", "3", "4", "6", "7", *(f"figure{number}" for number in (2, 3, 4, 5))}


OWN = """
name: own
title: a table of my own
task: uuid
overrides: [{}]
rows: [{{method: fft}}, {{method: lora, rank: low}}]
columns: [{{name: accuracy, title: accuracy, metric: char_accuracy}}]
"""


@pytest.mark.slow
def test_a_table_of_the_user_s_own_is_run_and_its_status_is_shown(command, tmp_path):
    overrides = [text for text in TINY if not text.startswith(("task=", "scale="))]
    (tmp_path / "own.yaml").write_text(OWN.format(", ".join(f"'{text}'" for text in overrides)))
    sweep = ["scripts/sweep.py", f"cells={tmp_path / 'own.yaml'}", f"out={tmp_path}"]
    command(*sweep, "seeds=1")
    records, _ = Store(tmp_path).load_all()
    assert sorted(record.spec.method.name for record in records) == ["fft", "lora"]
    shown = command(*sweep, "seeds=3", "status=true").stdout
    assert "uuid │ 2" in shown.replace("  ", " ").replace("  ", " ") and "min left" in shown
    [line] = [line for line in shown.splitlines() if line.startswith("│ uuid")]
    assert [part.strip() for part in line.strip("│").split("│")] == ["uuid", "2", "0", "4", "0", "0", "0"]


@pytest.mark.slow
def test_a_search_tries_every_setting_and_then_runs_the_best(tmp_path):
    """Each cell of a tiny table: six tries, two further ones, then the seed with what was found."""
    overrides = [text for text in TINY if not text.startswith(("task=", "task.", "scale="))]
    small = ["task.train_limit=12", "task.test_limit=4", "training.steps=4", "training.warmup_steps=0"]
    table = {"name": "own", "title": "own", "task": "gsm8k", "rows": [{"method": "fft"}]}
    table["overrides"] = [*overrides, *small, "training.evaluate_at=[4]"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(table))
    sweep = Sweep(
        table=None,
        cells=str(tmp_path / "own.yaml"),
        scale="mini",
        seeds=1,
        search=True,
        workers=2,
        status=False,
        out="",
    )
    store, [cell] = Store(tmp_path), sweep.all_cells()
    counts = []
    while jobs := [job for job in planned([cell], sweep, store) if store.finished(job.spec.id) is None]:
        counts.append(len(jobs))
        assert run_jobs(jobs, store, workers=2) == 0
    assert counts == [6, 1, 1, 1]
    records, _ = store.load_all()
    [final] = [record for record in records if record.spec.seed == 0]
    found = search(cell, records)
    assert found.finished and final.spec.lr == dict(found.best)["lr"]


@pytest.mark.slow
def test_two_sweeps_at_once_share_the_runs(tmp_path):
    command = [sys.executable, "-c", SWEEP, str(tmp_path), *TINY, "training.steps=60"]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    records, _ = Store(tmp_path).load_all()
    assert sorted(record.spec.method.name for record in records) == ["fft", "lora", "mora"]
    assert_run_once(tmp_path, records)


@pytest.mark.slow
def test_a_run_that_fails_is_tried_once_more_and_then_left(tmp_path, capfd):
    store = Store(tmp_path)
    job = Job.of(["method=fft", *TINY, "training.max_length=37"])  # no sample has an answer within
    assert run_jobs([job], store, workers=1) == 1
    said = capfd.readouterr().err.replace("\n", " ")
    assert said.count("failed, and is tried once more") == 1 and said.count("failed: ") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["out=/dev/null/x"], "out=/dev/null/x can't be written"),
        (["out=/proc/x"], "out=/proc/x can't be written"),
        (["seeds=three"], "seeds='three'"),
        (["seeds=-1"], "seeds=-1: "),
        (["seeds=101"], "seeds=101: "),
        (["cells=/nowhere.yaml"], "cells=/nowhere.yaml can't be read"),
        (["workers=-1"], "workers=-1: "),
        (["scale=huge"], "scale=huge is not known"),
        (["scale=paper"], "python scripts/sweep.py 'table=[2]' scale=mini"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_error(command_here, arguments, said):
    done = command_here("scripts/sweep.py", "table=2", "scale=mini", *arguments, check=False)
    assert done.returncode == 2 and said in done.stderr
