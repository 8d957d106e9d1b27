"""Whole runs of a few steps: the same numbers to the bit, also after an interrupt or a kill."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from held import HELD_UUID, stopped
from run_outcome import assert_same_run, only_record, weights
from tiny import ROOT, TINY

from mora_repro.data.task import IGNORED
from mora_repro.data.tokens import Example
from mora_repro.errors import Diverged, UserError
from mora_repro.results.records import Store
from mora_repro.run import run
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.options import Options
from mora_repro.training.checkpoints import last_checkpoint, seal
from mora_repro.training.train import Collator


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fft", "lora", "mora"])
def test_a_run_gives_a_whole_record_and_the_same_numbers_again(command, command_here, tmp_path, method):
    first, second = tmp_path / "1", tmp_path / "2"
    command("train.py", f"method={method}", *TINY, f"out={first}")
    command_here("train.py", f"method={method}", *TINY, f"out={second}")
    assert_same_run(first, second)
    record = only_record(first)
    assert record.curve.step == list(range(1, 13))
    assert record.curve.loss[-1] < record.curve.loss[0]
    assert [evaluation.step for evaluation in record.evaluations] == [6, 12]
    assert record.metrics == record.evaluations[-1].metrics
    assert 0 <= record.metrics["char_accuracy"] <= 100
    assert record.data.examples == 12 and record.data.base is None
    assert record.environment.packages["torch"] == version("torch")
    assert record.cost.tokens_per_s > 0 and record.cost.peak_memory_mb > 100
    assert str(tmp_path) not in record.command
    trained = sum(tensor.numel() for tensor in weights(first).values())
    assert trained == record.parameters.trainable
    assert not list((first / "work").glob("*/checkpoints"))


@pytest.mark.slow
def test_the_cost_in_a_record_is_what_is_seen_from_outside(tmp_path):
    start = time.monotonic()
    longer = ["training.steps=60", "training.evaluate_at=[60]"]
    command = [sys.executable, "train.py", "method=mora", *TINY, *longer, f"out={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    assert status == 0
    record = only_record(tmp_path)
    cost = record.cost
    assert cost.peak_memory_mb == pytest.approx(usage.ru_maxrss * 1024 / 1e6, rel=0.02)
    assert cost.train_s < cost.wall_s < seconds
    passes = len(record.curve.step) * record.spec.training.batch_size / record.data.examples
    assert cost.tokens_per_s * cost.train_s == pytest.approx(passes * record.data.tokens, rel=0.02)


@pytest.mark.slow
def test_a_finished_run_says_so_and_stops_and_rerun_runs_it_again(command_here, tmp_path):
    arguments = ("train.py", "method=mora", *TINY, f"out={tmp_path}")
    command_here(*arguments)
    [path] = (tmp_path / "runs").glob("*.json")
    before = path.stat().st_mtime_ns
    again = command_here(*arguments)
    assert "this run finished on" in again.stderr and str(path) in again.stderr and "rerun=true" in again.stderr
    assert path.stat().st_mtime_ns == before
    command_here(*arguments, "rerun=true")
    assert path.stat().st_mtime_ns != before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "number"), [("mora", signal.SIGINT), ("fft", signal.SIGTERM), ("lora", signal.SIGKILL)]
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(command_here, tmp_path, method, number):
    arguments = ["train.py", f"method={method}", *TINY, HELD_UUID, "training.evaluate_at=[7]"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command_here(*arguments, f"out={whole}")
    status, said = stopped(tmp_path / "hold", number, *arguments, f"out={cut}")
    if number != signal.SIGKILL:
        assert status == 130, said
        assert only_record(cut).status == "interrupted"
    else:
        # What a kill in the middle of a save leaves behind.
        [checkpoint] = cut.glob("work/*/checkpoints/*")
        torn = checkpoint.with_name("checkpoint-11")
        torn.mkdir()
        (torn / "trainer_state.json").write_text("{")
    done = command_here(*arguments, f"out={cut}")
    assert f"going on from step {4 if number == signal.SIGKILL else 8}" in done.stderr
    assert_same_run(whole, cut)


@pytest.mark.slow
def test_a_run_stopped_while_it_saves_its_weights_does_not_train_a_step_too_many(command_here, tmp_path, monkeypatch):
    # 12 samples in batches of 4: the last step is in the middle of an epoch.
    arguments = ["method=lora", *TINY, "training.steps=11", "training.evaluate_at=[6]", "training.save_every=11"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command_here("train.py", *arguments, f"out={whole}")
    spec, store = RunSpec.from_config(compose_config(arguments)), Store(cut)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["mora_repro.training.train"], "save_trained", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(spec, Options(out=str(cut)))
    assert store.load(spec.id) is None and not (store.work(spec.id) / "model").exists()
    command_here("train.py", *arguments, f"out={cut}")
    assert_same_run(whole, cut)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task.data={folder}", "has no test.jsonl"),
        ("method.peft.target_modules=[query]", "query"),
        ("method.peft.lora_alpha=abc", "lora_alpha='abc'"),
    ],
)
def test_a_mistake_is_said_before_the_base_is_trained(command_here, tmp_path, override, said):
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "1"}\n')
    out = tmp_path / "out"
    arguments = ["method=lora", "task=gsm8k", "scale=mini", override.format(folder=tmp_path), f"out={out}"]
    done = command_here("train.py", *arguments, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not list(out.glob("work/*base*"))


@pytest.mark.slow
def test_an_interrupt_ends_a_multirun(tmp_path):
    arguments = ["train.py", "-m", "method=lora,mora", *TINY, HELD_UUID, f"out={tmp_path}"]
    status, said = stopped(tmp_path / "hold", signal.SIGINT, *arguments)
    assert status == 130 and said.count("the same command goes on where it was") == 1
    assert only_record(tmp_path).status == "interrupted"


@pytest.mark.slow
def test_a_run_trains_its_base_first_and_records_it(command_here, tmp_path):
    tiny = [override for override in TINY if override != "model.base=null"]
    command_here("train.py", "method=mora", *tiny, f"out={tmp_path}")
    records = {record.spec.task["name"]: record for record in Store(tmp_path).load_all()[0]}
    assert records["uuid"].data.base == records["uuid_base"].id
    assert len(records["uuid"].data.base_sha256) == 64
    # A second run finds the base and does not train it again.
    done = command_here("train.py", "method=lora", *tiny, f"out={tmp_path}")
    assert "uuid_base" not in done.stderr
    assert records["uuid_base"].command.startswith("python train.py method=fft task=uuid_base scale=mini")
    # Where its record is there and its weights are not, they are made again, and the record stays.
    store, base = Store(tmp_path), records["uuid_base"].id
    shutil.rmtree(store.work(base))
    before = store.record_path(base).stat().st_mtime_ns
    command_here("train.py", "method=fft", *tiny, f"out={tmp_path}")
    assert (store.work(base) / "model").exists() and store.record_path(base).stat().st_mtime_ns == before
    assert len({record.data.base_sha256 for record in store.load_all()[0] if record.id != base}) == 1


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_a_record_that_says_so(command_here, tmp_path):
    done = command_here("train.py", "method=fft", *TINY, "lr=1e30", f"out={tmp_path}", check=False)
    assert done.returncode == 2 and "learning rate is too high" in done.stderr
    record = only_record(tmp_path)
    assert record.status == "diverged" and "learning rate is too high" in record.error


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """As a gradient leaves them that is no number: the loss of the same step is that of the weights before."""

    def spoil(_, args, state, control, model, **__):
        if state.global_step == 2:
            with torch.no_grad():
                next(model.parameters())[0] = math.nan

    monkeypatch.setattr("mora_repro.training.callbacks.EvaluateAt.on_step_end", spoil)
    spec = RunSpec.from_config(compose_config(["method=fft", *TINY, "training.save_every=1"]))
    with pytest.raises(Diverged, match="a weight is nan at step 2"):
        run(spec, Options(out=str(tmp_path)))
    assert [path.name for path in tmp_path.glob("work/*/checkpoints/*")] == ["checkpoint-1"]
    assert only_record(tmp_path).status == "diverged"


@pytest.mark.slow
def test_two_processes_with_the_same_spec_share_one_run(tmp_path):
    arguments = [sys.executable, "train.py", "method=lora", *TINY, f"out={tmp_path}"]
    both = [subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert only_record(tmp_path).status == "finished"
    assert sum("step 1/12" in text for text in said) == 1


@pytest.mark.slow
def test_hydra_multirun_writes_a_record_per_run(command_here, tmp_path):
    command_here("train.py", "-m", "method=lora,mora", *TINY, f"out={tmp_path}")
    assert sorted(record.spec.method.name for record in Store(tmp_path).load_all()[0]) == ["lora", "mora"]


def mounted(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"can't mount a file system to fill: {done.stderr.strip() or 'not root'}")


@pytest.mark.slow
@pytest.mark.parametrize(("options", "said"), [("ro", "can't be written"), ("size=64k", "free"), ("size=24k", "full")])
def test_an_output_folder_that_cannot_be_written_is_an_error_that_says_so(command, tmp_path, options, said):
    mounted(tmp_path, options)
    try:
        if said == "full":
            (tmp_path / "filler").write_bytes(b"0" * 20_000)
        done = command("train.py", "method=fft", *TINY, f"out={tmp_path}", check=False)
        assert done.returncode == 2 and said in done.stderr and "out=" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.glob("runs/.*")) and not list(tmp_path.glob("work/*/.spec*"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_an_output_folder_below_a_file_is_an_error(command_here, tmp_path):
    (tmp_path / "file").touch()
    done = command_here("train.py", "method=fft", *TINY, f"out={tmp_path / 'file' / 'x'}", check=False)
    assert done.returncode == 2 and "can't be written" in done.stderr


def test_the_collator_pads_on_the_right_and_masks_the_padding():
    batch = Collator(pad_token_id=9)([Example([1, 2, 3], [IGNORED, 2, 3]), Example([4], [4])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_last_whole_checkpoint_is_taken_and_torn_ones_are_removed(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    assert last_checkpoint(folder) is None
    for step in (8, 9, 10):
        partial = tmp_path / "partial"
        partial.mkdir()
        (partial / "weights").write_bytes(b"12345")
        seal(partial, folder / f"checkpoint-{step}", keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    (folder / "checkpoint-10" / "weights").write_bytes(b"123")
    assert last_checkpoint(folder).name == "checkpoint-9"
    assert not (folder / "checkpoint-10").exists()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"at step 9 with 1 processes, and 4 .*on 1 again .*rerun=true"):
        last_checkpoint(folder)


@pytest.mark.slow
def test_the_metrics_file_has_a_line_per_logged_step(command_here, tmp_path):
    command_here("train.py", "method=lora", *TINY, f"out={tmp_path}")
    [path] = (tmp_path / "work").glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"steps": 12}
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert os.path.getsize(path) < 20_000
