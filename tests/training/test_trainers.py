"""Whole runs of a few steps under every trainer: the losses of one process, merges included; resume to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from outcome import assert_same_run, only_record, weights
from tiny import ROOT, TINY

from mora_repro.errors import UserError
from mora_repro.spec import RunSpec, compose_config
from mora_repro.training import batch_shape

MERGES = ["method.merge.every=5", "method.merge.restart_warmup=2"]
METHODS = {"fft": [], "lora": [], "mora": [], "relora": MERGES, "remora": MERGES}
# Nothing is kept whole between steps, as with parameters of a real model's size.
SHARDED = "+trainer.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The output folder of a method's run in one process without DeepSpeed, run once."""
    folder = tmp_path_factory.mktemp("plain")

    def run(method: str) -> Path:
        out = folder / method
        if not out.exists():
            train(method, f"out={out}")
        return out

    return run


def train(method: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "train.py", f"method={method}", *TINY, *METHODS.get(method, []), *overrides]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "trainer",
    [
        ["trainer=ddp", "trainer.processes=2"],
        ["trainer=zero1", "trainer.processes=2"],
        ["trainer=zero2", "trainer.processes=2"],
        ["trainer=zero3", "trainer.processes=2", SHARDED],
        ["trainer=zero3"],
    ],
    ids=lambda trainer: "-".join(part.split("=")[1] for part in trainer),
)
def test_the_loss_is_that_of_one_process(plain, tmp_path, method, trainer):
    done = train(method, *trainer, f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    expected, ours = plain(method), tmp_path
    one, other = only_record(expected), only_record(ours)
    assert other.curve.step == one.curve.step and other.curve.lr == one.curve.lr
    assert other.curve.loss == pytest.approx(one.curve.loss, abs=5e-6)
    assert other.parameters == one.parameters and other.metrics == one.metrics
    theirs = weights(expected)
    for name, tensor in weights(ours).items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainer", [["trainer=plain"], ["trainer=zero2"], ["trainer=zero3", SHARDED]], ids=lambda t: t[0]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_to_the_bit_from_before_at_and_after_a_merge(tmp_path, method, trainer):
    """A run is killed with all checkpoints kept, and goes on from those around the merge at step 10."""
    often = [*trainer, "training.steps=24", "training.save_every=1", "trainer.keep_checkpoints=100"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = train(method, *often, f"out={whole}")
    assert done.returncode == 0, done.stderr
    arguments = [sys.executable, "train.py", f"method={method}", *TINY, *METHODS[method], *often, f"out={killed}"]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(killed.glob("work/*/checkpoints/checkpoint-11")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()  # the workers end with it
    process.communicate()
    assert not list(killed.glob("runs/*")), "the kill came after the run's end"
    for step in (9, 10, 11) if METHODS[method] else (10,):
        out = tmp_path / f"from-{step}"
        shutil.copytree(killed, out, ignore=later_than(step))
        torn = next(out.glob("work/*/checkpoints")) / "checkpoint-12"
        shutil.copytree(torn.with_name(f"checkpoint-{step}"), torn)
        largest = max((path for path in torn.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        done = train(method, *often, f"out={out}")
        assert done.returncode == 0, done.stderr
        assert f"going on from step {step}" in done.stderr
        assert_same_run(whole, out)


def later_than(step: int):
    def ignore(_: str, names: list[str]) -> list[str]:
        return [name for name in names if name.startswith("checkpoint-") and int(name.split("-")[1]) > step]

    return ignore


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_all_processes_after_the_same_step(tmp_path, number):
    """With a loss that is logged every 7 steps: its mean must not forget the steps before the stop."""
    trainer = ["trainer=zero2", "trainer.processes=2", "training.steps=60", "training.log_every=7"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train("relora", *trainer, f"out={whole}").returncode == 0
    arguments = [sys.executable, "train.py", "method=relora", *TINY, *MERGES, *trainer, f"out={cut}"]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(cut.glob("work/*/checkpoints/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    assert said.count("stopping after this step") == 1 and said.count("goes on where it was") == 1
    assert only_record(cut).status == "interrupted"
    assert train("relora", *trainer, f"out={cut}").returncode == 0
    assert_same_run(whole, cut)


@pytest.mark.slow
def test_torchrun_is_joined_and_its_base_is_trained_by_rank_0(plain, tmp_path):
    tiny = [override for override in TINY if override != "model.base=null"]
    arguments = ["--standalone", "--nproc-per-node=2", "train.py", "method=lora", *tiny, "trainer=zero3", SHARDED]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments, f"out={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished: ") == 1 and "on 2 CPU processes" in done.stderr
    alone = tmp_path / "alone"
    assert train("lora", "model.base=uuid_base", f"out={alone}").returncode == 0
    ours = next(path for path in (tmp_path / "runs").glob("*-uuid-*"))
    theirs = next(path for path in (alone / "runs").glob("*-uuid-*"))
    one, other = (json.loads(path.read_text()) for path in (theirs, ours))
    assert other["curve"]["loss"] == pytest.approx(one["curve"]["loss"], abs=5e-6)
    assert other["data"]["base_sha256"] == one["data"]["base_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]])
def test_an_error_of_all_processes_is_shown_once_with_a_rank(tmp_path, launcher):
    arguments = ["train.py", "method=lora", *TINY, "trainer.processes=2", "method.peft.target_modules=[query]"]
    command = [sys.executable, *launcher, *arguments, f"out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in ([1] if launcher else [2]), done.stderr
    assert done.stderr.count("error: rank ") == 1 and done.stderr.count("query") == 1 + len(launcher[:1])
    assert only_record(tmp_path).status == "failed"


@pytest.mark.slow
def test_every_process_ends_where_one_is_killed(tmp_path):
    arguments = [sys.executable, "train.py", "method=lora", *TINY, "training.steps=2000", "trainer.processes=2"]
    process = subprocess.Popen([*arguments, f"out={tmp_path}"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("work/*/checkpoints/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "rank 1 of 2" in said
    assert not any(Path(f"/proc/{child}").exists() for child in children)


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
