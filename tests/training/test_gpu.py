"""What a CPU can't tell: the same paths on GPUs."""

import subprocess
import sys

import pytest
import torch
from run_outcome import only_record
from tiny import ROOT, TINY

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def train(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "train.py", *TINY, *overrides], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("trainer", ["plain", "ddp", "zero1", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize("method", ["fft", "relora", "remora"])
def test_every_trainer_trains_in_bf16(tmp_path, trainer, method):
    merges = [] if method == "fft" else ["method.merge.every=5", "method.merge.restart_warmup=2"]
    how = [f"method={method}", *merges, f"trainer={trainer}", "trainer.precision=bf16", f"out={tmp_path}"]
    done = train(*how)
    assert done.returncode == 0, done.stderr
    record = only_record(tmp_path)
    assert record.curve.loss[-1] < record.curve.loss[0]
    assert record.environment.processes == (1 if trainer == "plain" else torch.cuda.device_count())


def test_memory_that_is_full_is_an_error_with_what_takes_less(tmp_path):
    wide = ["model.architecture.hidden_size=4096", "model.architecture.num_hidden_layers=8"]
    steps = ["training.steps=1", "training.warmup_steps=0", "training.evaluate_at=[]"]
    batch = ["task.pairs=40000", "training.batch_size=40000", *steps]
    done = train("method=lora", *wide, *batch, f"out={tmp_path}")
    assert done.returncode == 2 and "training.micro_batch_size=20000" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
