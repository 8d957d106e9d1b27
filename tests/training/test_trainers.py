"""Whole runs of a few steps under every trainer: the losses of one process, merges included; resume to the bit."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from held import HELD_UUID, held, stopped
from processes import children_of, is_running, launcher
from run_outcome import assert_same_run, only_record, weights
from tiny import ROOT, TINY

from mora_repro import distributed, signals
from mora_repro.errors import UserError
from mora_repro.results.records import Store
from mora_repro.spec import CONF, RunSpec, compose_config
from mora_repro.spec.compose import options
from mora_repro.training import batch_shape, build_extensions, launch

MERGES = ["method.merge.every=5", "method.merge.restart_warmup=2"]
METHODS = [method for method in options("method") if method != "peft"]
CORE = ["fft", "lora", "mora", "relora", "remora"]
MERGING = ("relora", "remora", "periodic_lora")
LAUNCHER = launcher(2)
# Nothing is kept whole between steps, as with parameters of a real model's size.
SHARDED = "+trainer.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"


def train(method: str, *others: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "train.py", *overrides(method, *others)]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def many(folder: Path, processes: int, runs: list[dict]) -> None:
    """Run many_runs.py in so many processes."""
    build_extensions()
    plan = folder / f"plan-{len(list(folder.iterdir()))}.json"
    plan.write_text(json.dumps(runs))
    program = [str(Path(__file__).with_name("many_runs.py")), str(plan)]
    alone = processes == 1 and "trainer=plain" in runs[0]["overrides"]
    command = [sys.executable, *([] if alone else launcher(processes)), *program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


def overrides(method: str, *others: str) -> list[str]:
    rank = [] if method == "fft" else ["r=2"]
    momentum = ["method.merge.momentum=0.25"] if method == "periodic_lora" else []
    # Scores at the end alone: under ZeRO 3 an evaluation takes longer than the training.
    once = "training.evaluate_at=[]"
    return [f"method={method}", *rank, *TINY, once, *(MERGES if method in MERGING else []), *momentum, *others]


def able(trainer: str) -> list[str]:
    """The methods that can run under a trainer."""
    files = {method: (CONF / "method" / f"{method}.yaml").read_text() for method in METHODS}
    return [method for method, text in files.items() if trainer not in (yaml.safe_load(text).get("cannot") or {})]


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The output folders of every method's run in one process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("plain")
    outs = {method: folder / method for method in METHODS}
    many(folder, 1, [{"overrides": overrides(m, "trainer=plain"), "out": str(out)} for m, out in outs.items()])
    return outs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "processes", "methods"),
    [
        ("ddp", 2, METHODS),
        ("zero1", 2, CORE),
        ("zero2", 2, METHODS),
        ("zero3", 2, METHODS),
        ("zero3", 1, CORE),
        ("zero3_offload", 2, CORE),
    ],
    ids=["ddp", "zero1", "zero2", "zero3", "zero3 alone", "offload"],
)
def test_the_losses_are_those_of_one_process(plain, tmp_path, trainer, processes, methods):
    sharded = [SHARDED] if trainer.startswith("zero3") else []
    how = [f"trainer={trainer}", f"trainer.processes={processes}", *sharded]
    methods = [method for method in methods if method in able(trainer)]
    many(tmp_path, processes, [{"overrides": overrides(m, *how), "out": str(tmp_path / m)} for m in methods])
    for method in methods:
        one, other = only_record(plain[method]), only_record(tmp_path / method)
        assert other.curve.step == one.curve.step and other.curve.lr == one.curve.lr
        assert other.curve.loss == pytest.approx(one.curve.loss, abs=5e-6), method
        assert other.parameters == one.parameters and other.metrics == one.metrics
        theirs = weights(plain[method])
        for name, tensor in weights(tmp_path / method).items():
            torch.testing.assert_close(tensor, theirs[name], atol=2e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "processes", "methods"),
    [
        ("plain", 1, METHODS),
        ("zero2", 2, CORE),
        ("zero3", 2, CORE),
    ],
    ids=["plain", "zero2", "zero3"],
)
def test_a_run_goes_on_to_the_bit_from_before_at_and_after_a_merge(tmp_path, trainer, processes, methods):
    often = ["training.save_every=1", f"trainer={trainer}", f"trainer.processes={processes}"]
    often += [SHARDED] if trainer == "zero3" else ["training.evaluate_at=[6]"]
    runs = [{"overrides": overrides(m, *often), "out": str(tmp_path / m)} for m in methods]
    if trainer == "plain":
        masters = ["trainer.precision=bf16", "+method.merge.fp32_master=true"]
        runs.append({"overrides": overrides("relora", *often, *masters), "out": str(tmp_path / "masters")})
        methods = [*methods, "relora"]
    again = [
        {**run, "out": f"{run['out']}-from-{step}", "after": run["out"], "step": step}
        for run, method in zip(runs, methods, strict=True)
        for step in ((4, 5, 6) if method in MERGING else (5,))
    ]
    many(tmp_path, processes, [*runs, *again])
    for run in again:
        assert_same_run(Path(run["after"]), Path(run["out"]))


@pytest.mark.slow
def test_a_run_under_zero_3_that_is_killed_leaves_no_process_and_goes_on_to_the_bit(tmp_path):
    how = [
        "trainer=zero3",
        "trainer.processes=2",
        SHARDED,
        HELD_UUID,
        "training.evaluate_at=[8]",
        "training.save_every=3",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = train("remora", *how, f"out={whole}")
    assert done.returncode == 0, done.stderr
    with held(tmp_path / "hold", "train.py", *overrides("remora", *how), f"out={killed}") as process:
        children = children_of(process.pid)
        process.kill()
        process.communicate()
        assert len(children) == 2 and not any(is_running(child) for child in children)
    done = train("remora", *how, f"out={killed}")
    assert done.returncode == 0 and "going on from step 6" in done.stderr, done.stderr
    assert_same_run(whole, killed)


@pytest.mark.slow
def test_a_signal_stops_all_processes_after_the_same_step(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # The loss is logged every 7 steps: its mean must not forget the steps before a stop.
    how = ["trainer=zero2", "trainer.processes=2", "training.steps=40", "training.log_every=7"]
    how += [HELD_UUID, "training.evaluate_at=[9,18,27]"]
    assert train("relora", *how, f"out={whole}").returncode == 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        status, said = stopped(tmp_path / "hold", number, "train.py", *overrides("relora", *how), f"out={cut}")
        assert status == 130, said
        assert said.count("stopping after this step") == 1 and said.count("goes on where it was") == 1
        assert only_record(cut).status == "interrupted"
    done = train("relora", *how, f"out={cut}")
    assert done.returncode == 0 and "going on from step 28" in done.stderr, done.stderr
    assert_same_run(whole, cut)


@pytest.mark.slow
def test_torchrun_is_joined_and_rank_0_trains_the_base(tmp_path):
    tiny = [override for override in TINY if override != "model.base=null"]
    joined, alone = tmp_path / "joined", tmp_path / "alone"
    for out, command in ((joined, [*LAUNCHER, "train.py", "trainer=zero3", SHARDED]), (alone, ["train.py"])):
        arguments = [sys.executable, *command, "method=lora", *tiny, f"out={out}"]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("finished: ") == 1
        assert (f"on {2 if out == joined else 1} CPU process" in done.stderr) and "error" not in done.stderr
    one, other = ({r.spec.task["name"]: r for r in Store(out).load_all()[0]} for out in (alone, joined))
    assert one["uuid_base"].curve == other["uuid_base"].curve
    assert one["uuid"].data == other["uuid"].data
    assert other["uuid"].curve.loss == pytest.approx(one["uuid"].curve.loss, abs=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("started_by", [[], LAUNCHER], ids=["by itself", "torchrun"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lr=1e30", "error: rank [01] of 2: the loss is .* learning rate is too high"),
        ("method.peft.target_modules=[query]", "error: method=lora: .*'query'.* linear layers: q_proj, "),
    ],
)
def test_an_error_of_all_processes_is_shown_once(tmp_path, started_by, override, said):
    arguments = ["train.py", "method=lora", *TINY, "trainer.processes=2", override]
    command = [sys.executable, *started_by, *arguments, f"out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (1 if started_by else 2), done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(ours) == 1 and re.match(said, ours[0]), done.stderr
    assert started_by or "Traceback" not in done.stderr


@pytest.mark.slow
def test_every_process_ends_where_one_is_killed(tmp_path):
    arguments = ["train.py", "method=lora", *TINY, HELD_UUID, "trainer.processes=2", f"out={tmp_path}"]
    with held(tmp_path / "hold", *arguments) as process:
        children = children_of(process.pid)
        assert len(children) == 2
        os.kill(children[1], signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "rank 1 of 2" in said
    assert not any(is_running(child) for child in children)


def spec(*overrides: str) -> RunSpec:
    return RunSpec.from_config(compose_config(["scale=mini", "method=lora", *overrides]))


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "shape"),
    [(16, None, 1, (16, 1)), (16, None, 2, (8, 1)), (128, 8, 1, (8, 16)), (128, 8, 32, (4, 1)), (96, 8, 4, (8, 3))],
)
def test_the_batch_is_the_recipes_whatever_the_number_of_processes(batch, micro, processes, shape):
    recipe = spec(f"training.batch_size={batch}", f"training.micro_batch_size={micro or 'null'}").training
    assert batch_shape(recipe, processes) == shape
    assert shape[0] * shape[1] * processes == batch


def test_a_batch_that_the_processes_cannot_share_is_refused_with_what_can():
    with pytest.raises(UserError, match=r"batch_size=16 can't be shared by 3 .*processes=[24].*batch_size=15"):
        batch_shape(spec().training, 3)


@pytest.mark.slow
def test_hydras_multirun_starts_processes_for_every_run(tmp_path):
    """With a run that computes in bf16 and spares memory, which costs no more than bf16's rounding."""
    how = ["trainer.processes=2", "trainer.gradient_checkpointing=true", "trainer.precision=fp32,bf16"]
    done = train("lora", "-m", *how, f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    low, full = sorted(Store(tmp_path).load_all()[0], key=lambda record: record.spec.trainer.precision)
    assert full.environment.processes == low.environment.processes == 2
    assert low.curve.loss != full.curve.loss
    assert low.curve.loss == pytest.approx(full.curve.loss, abs=0.02)


@pytest.mark.slow
def test_a_changed_spec_is_said_to_be_another_run(command, tmp_path):
    how = ["train.py", "method=lora", *TINY, HELD_UUID, f"out={tmp_path}"]
    status, said = stopped(tmp_path / "hold", signal.SIGTERM, *how, "training.steps=20")
    assert status == 130, said
    said = command(*how).stderr
    assert "not the run that was interrupted with training.steps=20: it starts at step 0" in said


def test_sruns_variables_are_taken_for_torchruns(monkeypatch):
    for name in (*distributed.VARIABLES, "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert not distributed.started_by_a_launcher()
    slurm = {
        "SLURM_JOB_ID": "71",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "MASTER_ADDR": "10.0.0.7",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as alone:
        alone.setenv("SLURM_STEP_NUM_TASKS", "1")
        assert not distributed.started_by_a_launcher()
    for name in set(distributed.VARIABLES) - {"MASTER_ADDR"}:
        monkeypatch.setenv(name, "")  # so that what is set below is taken back after the test
        monkeypatch.delenv(name)
    assert distributed.started_by_a_launcher()
    assert (distributed.rank(), distributed.size(), os.environ["LOCAL_RANK"]) == (3, 4, "1")
    assert os.environ["LOCAL_WORLD_SIZE"] == "2" and os.environ["MASTER_ADDR"] == "10.0.0.7"
    assert 20_000 <= int(os.environ["MASTER_PORT"]) < 60_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train.py", "method=relora", "method.merge.every=100"], "comes to no merge in 12 steps"),
        ([*LAUNCHER, "train.py", "method=lora", "trainer=plain"], "the launcher has started 2"),
        ([*LAUNCHER, "train.py", "-m", "method=lora,mora", "trainer=ddp"], "leave the launcher out"),
        (["train.py", "method=lora", "trainer=plain", "trainer.stage=2"], "choose trainer=zero2"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, command, said):
    arguments = [sys.executable, *command, *TINY, f"out={tmp_path}"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count(said) == 1, done.stderr
    assert not list(tmp_path.glob("work/*/model"))


@pytest.mark.slow
def test_the_first_process_says_why_though_another_fails_sooner(tmp_path):
    late = "import os, time; time.sleep(5 * (os.environ['RANK'] == '0'))\n"
    (tmp_path / "late.py").write_text(f"{late}from mora_repro.spec import RUN, entry\nentry(RUN, 'mora_repro.start')\n")
    command = [sys.executable, *LAUNCHER, str(tmp_path / "late.py"), "method=lorra"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("method=lorra is not known") == 1, done.stderr
    assert done.stderr.count("scale=mini") == 1 and "interrupted" not in done.stderr, done.stderr


@pytest.mark.parametrize("ended", [True, False])
def test_a_process_that_nobody_ends_has_failed_alone(monkeypatch, ended):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 60 if ended else 0.1)
    if ended:
        with signals.answered_by(signals.interrupt, signal.SIGALRM):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            assert not distributed.first_to_fail()
    else:
        assert distributed.first_to_fail()


@pytest.mark.slow
def test_the_others_are_ended_when_one_dies_before_they_meet(tmp_path):
    program = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(1000)"
    assert launch(["-c", program], 2, tmp_path) == 3


@pytest.mark.slow
def test_asylora_starts_orthogonal_in_bf16_too(tmp_path):
    how = ["trainer=zero2", "trainer.precision=bf16"]
    many(tmp_path, 1, [{"overrides": overrides("asylora", *how), "out": str(tmp_path / "out")}])
    record = only_record(tmp_path / "out")
    assert record.environment.precision == "bf16"
    [matrix, *_] = [tensor for name, tensor in weights(tmp_path / "out").items() if "lora_A" in name]
    torch.testing.assert_close(matrix.float() @ matrix.float().T, torch.eye(2), atol=0.02, rtol=0)


@pytest.mark.slow
def test_the_lock_of_a_killed_process_holds_up_no_other(tmp_path):
    build_extensions()
    [extension] = Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("deepspeed_shm_comm*.so")
    (extension.parent / "lock").touch()
    done = train("lora", "trainer=zero2", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
