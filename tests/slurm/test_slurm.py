"""Sweeps on a real Slurm of two nodes: they end whatever happens in between, with the numbers of undisturbed runs."""

import re
from pathlib import Path

import pytest
from cluster import Cluster, why_not
from held import HELD_UUID, HOLD, holding
from processes import until
from sweeps import OVERRIDES, Submitted, queued, slurm, until_all_ended
from tiny import ROOT

from mora_repro.errors import UserError
from mora_repro.results.records import Store
from mora_repro.results.search import search
from mora_repro.training import build_extensions

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


def finished(out):
    """The finished records by id; every other is a failure of the test."""
    records, problems = Store(out).load_all()
    assert not problems and all(record.status == "finished" for record in records)
    return {record.id: record for record in records}


def test_two_nodes_of_two_processes_with_zero_2_give_the_losses_of_one_process(tmp_path):
    """Also where they are stopped in between, as before a time limit."""
    build_extensions()
    steps = ["training.steps=60", "training.evaluate_at=[20]", HELD_UUID]
    four = {"method": "lora", "rank": "low", "overrides": [*steps, "trainer=zero2", "trainer.processes=null"]}
    one = {"method": "lora", "rank": "low", "overrides": [*steps, "training.micro_batch_size=1"]}
    hold = tmp_path / "hold"
    sweep = Submitted(tmp_path, [four, one], {"nodes": 2, "processes": 2, "env": {HOLD: str(hold)}})
    with holding(hold):
        assert sweep() == 0
        run = sweep.run_of("trainer=zero2")
        until(lambda: "step 18/60" in sweep.log("train-1-0"), "no step")
        slurm("scancel", "--batch", "--signal=USR1", f"{sweep.manifest.batches[0].id}_0")
        until(lambda: "stopping after this step" in sweep.log("train-1-0"), "it does not stop")
    until_all_ended()
    records = finished(sweep.out)
    many, alone = records[run], records[sweep.run_of("training.micro_batch_size=1")]
    assert (many.environment.processes, alone.environment.processes) == (4, 1), sweep.log("train-1-0")
    assert many.curve.loss == pytest.approx(alone.curve.loss, abs=5e-6)
    log = sweep.log("train-1-0")
    assert "batch 4 = 4 x 1 x 1" in log and "batch 4 = 1 x 1 x 4" in sweep.log("train-2-0")
    assert "going on from step" in log and "Traceback" not in log, log


def test_a_search_its_choice_and_the_runs_need_no_hand_in_between(tmp_path):
    small = ["task.train_limit=12", "task.test_limit=4", "training.steps=4", "training.warmup_steps=0"]
    model = [text for text in OVERRIDES if not text.startswith("task.")]
    cells = {"task": "gsm8k", "overrides": [*model, *small, "training.evaluate_at=[4]"]}
    sweep = Submitted(tmp_path, [{"method": "fft"}], table=cells, search=True)
    assert sweep() == 0
    until_all_ended()
    manifest = sweep.manifest
    assert [len(batch.elements) for batch in manifest.batches if batch.stage == "train"] == [6, 1, 1, 1]
    assert [batch.stage for batch in manifest.batches[1::2]] == ["choose", "choose", "choose", "report"]
    records = finished(sweep.out)
    [cell] = manifest.cells
    found = search(cell, list(records.values()))
    [final] = [record for record in records.values() if record.spec.seed == 0]
    assert found.finished and final.spec.lr == dict(found.best)["lr"]
    assert "9 finished" in sweep.log("report-1") and list(sweep.out.glob("search/*.csv"))


LONG = ["training.steps=1000", "training.save_every=20", "training.evaluate_at=[500]"]
ROWS = [{"method": method, "overrides": LONG} for method in ("fft", "lora", "mora")]
ROWS[1]["rank"] = ROWS[2]["rank"] = "low"


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    sweep = Submitted(tmp_path_factory.mktemp("undisturbed"), ROWS)
    assert sweep() == 0
    until_all_ended()
    return finished(sweep.out)


def test_nothing_that_happens_to_jobs_changes_a_bit(cluster, undisturbed, tmp_path, capsys):
    """Two signals as before a time limit, a cancelled element and a retry, a lost node, a restarted controller."""
    sweep = Submitted(tmp_path, ROWS, {"cpus_per_process": 6})  # two on a node
    assert sweep() == 0
    fft, lora, mora = (sweep.run_of(f"method={method}") for method in ("fft", "lora", "mora"))
    [train, report] = [batch.id for batch in sweep.manifest.batches]

    def until_step(run):
        last = {path.name for path in sweep.out.glob(f"work/{run}/checkpoints/*")}
        until(lambda: {p.name for p in sweep.out.glob(f"work/{run}/checkpoints/*")} - last, f"{run} makes no step")

    def signalled():
        return sweep.log("train-1-0").count("back into the queue")

    until_step(lora)
    slurm("scancel", f"{train}_1")
    until_step(mora)
    node = cluster.said("squeue", "-h", "-j", f"{train}_2", "-o", "%N").strip()
    cluster.cut_power(node)
    until_step(fft)
    slurm("scancel", "--batch", "--signal=USR1", f"{train}_0")
    until(lambda: signalled() == 1, "not requeued")
    assert report in queued()
    cluster.restart_controller()
    until_step(fft)
    slurm("scancel", "--batch", "--signal=USR1", f"{train}_0")
    until(lambda: signalled() == 2, "not requeued again")
    cluster.start_node(node)
    until_all_ended()
    assert "start 1" in sweep.log("train-1-2"), "the lost node's run was not started again"
    until_all_ended()
    capsys.readouterr()
    assert sweep(status=True) == 1
    said = capsys.readouterr().out
    assert "2 finished, 1 failed" in said and f"({train}_1): cancelled" in said, said
    assert sweep(retry=True) == 0
    until_all_ended()
    records = finished(sweep.out)
    assert records.keys() == undisturbed.keys()
    for run, record in records.items():
        assert record.curve == undisturbed[run].curve and record.evaluations == undisturbed[run].evaluations
    assert "going on from step" in sweep.log("train-2-0"), lora
    assert sweep.log("train-1-0").count(" start ") == 3


def test_a_slurmd_that_dies_alone_costs_a_run_nothing(cluster, undisturbed, tmp_path):
    """The run goes on. Slurm takes the node for lost, and may start it a second time, which then waits."""
    sweep = Submitted(tmp_path, ROWS[:1], {"cpus_per_process": 6})
    assert sweep() == 0
    [train, _] = [batch.id for batch in sweep.manifest.batches]
    [run] = sweep.manifest.runs
    until(lambda: list(sweep.out.glob(f"work/{run}/checkpoints/checkpoint-*")), "no checkpoint")
    node = cluster.said("squeue", "-h", "-j", f"{train}_0", "-o", "%N").strip()
    cluster.kill_slurmd(node)
    until(lambda: Store(sweep.out).finished(run), "the run does not go on")
    cluster.start_node(node)
    until_all_ended()
    assert finished(sweep.out)[run].curve == undisturbed[run].curve
    assert "going on from step" not in sweep.log("train-1-0")


def test_a_run_that_gets_nowhere_between_two_requeues_stops_and_says_so(tmp_path, capsys):
    sweep = Submitted(tmp_path, [{"method": "fft", "overrides": ["training.steps=100000"]}])
    assert sweep() == 0
    [train, _] = [batch.id for batch in sweep.manifest.batches]
    for start in (0, 1):
        until(lambda start=start: f"start {start}" in sweep.log("train-1-0"), "not started")
        slurm("scancel", "--batch", "--signal=USR1", f"{train}_0")
    until_all_ended()
    capsys.readouterr()
    assert sweep(status=True) == 1
    assert "no new checkpoint since the last requeue" in capsys.readouterr().out


HOSTILE = "a'b\"; touch PWNED; $(touch PWNED) `touch PWNED` #%j"


def test_small_runs_share_a_node_and_hostile_values_do_nothing(tmp_path, monkeypatch):
    (tmp_path / HOSTILE).mkdir()
    monkeypatch.chdir(tmp_path / HOSTILE)
    monkeypatch.setenv("HF_TOKEN", "hf_never_written_down")
    row = {"method": "lora", "rank": "low"}
    rows = [row, {"method": "fft"}, {**row, "overrides": ["lr=1e30"]}]
    profile = {"gpus_per_node": 4, "packed": 2, "env": {"X": HOSTILE}, "interface": HOSTILE, "modules": [HOSTILE]}
    sweep = Submitted(tmp_path / HOSTILE, rows, {**profile, "scratch": str(tmp_path)})
    assert sweep() == 0
    [train, _] = sweep.manifest.batches
    assert [len(element) for element in train.elements] == [2, 1]
    until_all_ended()
    statuses = sorted(record.status for record in Store(sweep.out).load_all()[0])
    assert statuses == ["diverged", "finished", "finished"], sweep.log("train-1-0")
    assert not list(tmp_path.rglob("PWNED")) and not (ROOT / "PWNED").exists()
    assert not list(tmp_path.glob("mora-*")), "the scratch folder stays"
    for path in (path for path in sweep.path.rglob("*") if path.is_file()):
        assert "hf_never_written_down" not in path.read_text(), path


def test_what_is_queued_or_done_is_not_submitted_again_and_what_is_cancelled_is(tmp_path, capsys):
    held = {"sbatch": ["--hold"]}
    sweep = Submitted(tmp_path, [{"method": "fft"}, {"method": "lora", "rank": "low"}], held)
    assert sweep() == 0
    before = queued()
    assert sweep() == 0 and queued() == before and len(before) == 3
    assert "nothing to submit: 2 runs are running or queued" in capsys.readouterr().out
    assert sweep(seeds=2) == 0
    assert [len(batch.elements) for batch in sweep.manifest.batches if batch.stage == "train"] == [2, 2]
    assert len(queued()) == 5  # one report, after all
    assert sweep(cancel=True) == 0 and not queued()
    assert sweep(status=True) == 1 and "4 failed" in capsys.readouterr().out
    sweep.change_profile({})
    assert sweep(retry=True) == 0
    until_all_ended()
    assert len(finished(sweep.out)) == 4
    assert sweep(status=True) == 0


@pytest.mark.parametrize("accounting", [False, True], ids=["without accounting", "with slurmdbd"])
def test_why_a_run_failed_is_said_with_and_without_accounting(cluster, accounting, tmp_path, capsys, monkeypatch):
    def look():
        """One needs more memory than it has, one finds no folder for its log, one does what it should."""
        small = Submitted(tmp_path / "small", [{"method": "fft"}], {"memory_gb": 0.1})
        unseen = Submitted(tmp_path / "unseen", [{"method": "fft"}], {"sbatch": ["--hold"]})
        fine = Submitted(tmp_path / "fine", [{"method": "fft"}])
        for sweep in (small, unseen, fine):
            assert sweep() == 0
        away = unseen.out.rename(tmp_path / "away")
        slurm("scontrol", "release", *queued())
        until_all_ended()
        away.rename(unseen.out)
        for sweep, status, words in (
            (small, 1, r"killed for memory: it had memory_gb=0.1 of each process, 0.10 GB .* more than 0\.[1-9]\d GB"),
            (unseen, 1, r"a compute node that can't see .*/unseen/out can't write the log"),
            (fine, 0, "1 finished"),
        ):
            capsys.readouterr()
            assert sweep(status=True) == status
            assert re.search(words, said := capsys.readouterr().out), said

    if not accounting:
        look()
        return
    if why := why_not(accounting=True):
        pytest.skip(why)
    monkeypatch.setenv("SLURM_CONF", "")  # so that it is as before after the test
    with Cluster(tmp_path / "slurm", accounting=True) as other:
        look()
        assert other.said("sacct", "-n", "-X", "-P", "-o", "State").split().count("COMPLETED") >= 2


def test_what_sbatch_refuses_is_said_and_the_script_stays(tmp_path):
    sweep = Submitted(tmp_path, [{"method": "fft"}], {"partition": "nowhere"})
    with pytest.raises(UserError, match=r"sbatch refuses \S+: (.|\n)*Invalid partition(.|\n)*by hand:") as refused:
        sweep()
    script = re.search(r"refuses (\S+):", str(refused.value))[1]
    assert "#SBATCH --partition=nowhere" in Path(script).read_text()
    assert not queued()
    sweep.change_profile({})
    assert sweep() == 0
    until_all_ended()
    assert finished(sweep.out)


def test_what_is_missing_on_offline_nodes_is_said_before_anything_is_submitted(tmp_path):
    model = ["model=hf", "model.pretrained=no-one/nothing"]
    sweep = Submitted(tmp_path, [{"method": "fft"}], table={"overrides": model})
    with pytest.raises(UserError, match=r"nothing is submitted: .*no-one/nothing(.|\n)*scripts/prepare.py method=fft"):
        sweep()
    assert not queued()


def test_a_script_can_be_submitted_by_hand(tmp_path):
    sweep = Submitted(tmp_path, [{"method": "fft"}], {"sbatch": ["--hold"]})
    assert sweep() == 0
    assert sweep(cancel=True) == 0
    slurm("sbatch", str(sweep.path / "jobs" / "train-1.sh"))
    slurm("scontrol", "release", *queued())
    until_all_ended()
    assert finished(sweep.out)
