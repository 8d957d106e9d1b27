"""What a run takes in memory: numbers by hand, those of real trainings, and what a refusal says."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import alone
from tiny import TINY
from torch import nn

from mora_repro.errors import UserError
from mora_repro.methods import apply_method, load_base, load_tokenizer, on_meta_device
from mora_repro.methods.memory import bytes_per_process, needed_gb, refuse_what_does_not_fit
from mora_repro.spec import RunSpec, compose_config

ALL_7B, LORA_8 = 6_738_415_616, 19_988_480
GB = 10**9


@cache
def run(*overrides: str) -> tuple[RunSpec, nn.Module]:
    """A run of LLaMA-2 7B and its model, in bf16 unless the overrides say otherwise."""
    spec = RunSpec.from_config(compose_config(["scale=paper", "task=uuid", "trainer.precision=bf16", *overrides]))
    return spec, apply_method(on_meta_device(spec), spec)


@pytest.mark.parametrize(
    ("overrides", "processes", "expected"),
    [
        (("method=fft", "trainer=plain"), 1, 16 * ALL_7B),
        (("method=fft", "trainer=plain", "trainer.precision=fp32"), 1, 16 * ALL_7B),
        (("method=fft", "trainer=ddp"), 8, 16 * ALL_7B),
        # ZeRO's figure 1, with its 7.5 B and 64 GPUs replaced by ours.
        (("method=fft", "trainer=zero1"), 8, 4 * ALL_7B + 12 * ALL_7B // 8),
        (("method=fft", "trainer=zero2"), 8, 2 * ALL_7B + 14 * ALL_7B // 8),
        (("method=fft", "trainer=zero3"), 8, 2 * ALL_7B),
        (("method=fft", "trainer=zero3", "trainer.precision=fp32"), 8, 20 * ALL_7B // 8),
        (("method=fft", "trainer=zero2", "trainer.precision=fp32"), 8, 4 * ALL_7B + 2 * ALL_7B),
        (("method=fft", "trainer=zero3_offload"), 8, 0),
        (("method=lora", "r=8", "trainer=plain"), 1, 2 * ALL_7B + 16 * LORA_8),
        (("method=lora", "r=8", "trainer=zero2"), 8, 2 * ALL_7B + 2 * LORA_8 + 14 * LORA_8 // 8),
        (("method=lora", "r=8", "trainer=zero3"), 8, 2 * ALL_7B // 8 + 2 * LORA_8),
    ],
)
def test_llama_7b_takes_what_one_reckons_by_hand(overrides, processes, expected):
    assert bytes_per_process(*run(*overrides), processes) == expected


def test_figure_1_of_the_zero_paper():
    # 7.5 B parameters on 64 GPUs: 120, 31.4, 16.6 and 1.9 GB. Its baseline has fp16 weights and gradients and an fp32
    # master copy; ours has fp32 weights and gradients: 16 bytes both.
    model = nn.Linear(75_000, 100_000, bias=False, device="meta")
    found = [bytes_per_process(run("method=fft", f"trainer={name}")[0], model, 64) / GB for name in STAGES]
    assert [round(number, 1) for number in found] == [120.0, 31.4, 16.6, 1.9]


STAGES = ("ddp", "zero1", "zero2", "zero3")


@settings(deadline=None)
@given(
    trained=st.integers(1000, 10**10),
    frozen=st.integers(0, 10**10),
    processes=st.integers(2, 512),
    more=st.integers(1, 512),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_more_processes_and_higher_stages_never_take_more(trained, frozen, processes, more, precision):
    model = nn.ParameterList(
        nn.Parameter(torch.empty(size, device="meta"), requires_grad=grad)
        for size, grad in ((trained, True), (frozen, False))
    )
    specs = [run("method=fft", f"trainer={name}", f"trainer.precision={precision}")[0] for name in STAGES]
    by_stage = [bytes_per_process(spec, model, processes) for spec in specs]
    assert by_stage == sorted(by_stage, reverse=True)
    assert all(bytes_per_process(spec, model, processes + more) <= now for spec, now in zip(specs, by_stage))
    # All processes together hold at least everything once.
    assert by_stage[-1] * processes >= 4 * trained + 2 * frozen


@pytest.mark.parametrize("method", ["fft", "lora", "mora"])
def test_a_real_step_takes_it_to_the_byte(method):
    spec = RunSpec.from_config(compose_config([f"method={method}", *TINY]))
    model = apply_method(load_base(spec, load_tokenizer(spec), None), spec)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    ids = torch.arange(9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    kept = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    kept += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]

    assert bytes_per_process(spec, model, 1) == sum(tensor.numel() * tensor.element_size() for tensor in kept)


DEEPSPEED = """
import gc, sys
import deepspeed, torch
import test_memory
from mora_repro.methods.memory import _bytes

bf16, frozen = sys.argv[2] == "bf16", sys.argv[3] == "frozen"
spec, _ = test_memory.run("method=fft", f"trainer={sys.argv[1]}", f"trainer.precision={sys.argv[2]}")
config = spec.trainer.model_dump()["deepspeed"]
config["bf16"]["enabled"] = bf16
for name in ("batch_size", "micro_batch_size_per_gpu"):
    config[f"train_{name}"] = 1
config["gradient_accumulation_steps"] = config["gradient_clipping"] = 1
small = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters")
config["zero_optimization"] |= {name: 1000 for name in small}  # buffers are none of what is counted
config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}

def kept():
    gc.collect()
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

deepspeed.init_distributed("gloo", verbose=False)
before = kept()
model = torch.nn.Sequential(*[torch.nn.Linear(400, 400, bias=False) for _ in range(10)])
model[1:].requires_grad_(not frozen)
sizes = [torch.empty_like(p, device="meta").requires_grad_(p.requires_grad) for p in model.parameters()]
shapes = torch.nn.ParameterList(torch.nn.Parameter(p, p.requires_grad) for p in sizes)
trained = [p for p in model.parameters() if p.requires_grad]
engine, *_ = deepspeed.initialize(
    model=model, model_parameters=trained, optimizer=torch.optim.AdamW(trained), config=config
)
x = torch.randn(1, 400, dtype=torch.bfloat16 if bf16 else torch.float32)
for step in range(2):
    engine.backward(engine(x).float().pow(2).mean())
    measured = kept() - before
    engine.step()
print("measured over reckoned:", measured / _bytes(spec, shapes, 1))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "precision", "frozen"),
    [
        ("zero2", "bf16", ""),
        ("zero2", "fp32", ""),
        ("zero3", "bf16", "frozen"),
        ("zero3", "fp32", ""),
        ("zero3_offload", "bf16", ""),
        ("zero3_offload", "fp32", "frozen"),
    ],
)
def test_deepspeed_keeps_it(trainer, precision, frozen):
    environment = {**alone(29900, Path(__file__).parent), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", DEEPSPEED, trainer, precision, frozen], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [ratio] = re.findall("measured over reckoned: (.*)", done.stdout)
    assert float(ratio) == pytest.approx(1, abs=0.03)


def refused(overrides: tuple[str, ...], processes: int, available: int, device: str = "cuda") -> str:
    spec, model = run(*overrides)
    with pytest.raises(UserError) as caught:
        refuse_what_does_not_fit(spec, model, processes, available, device)
    return str(caught.value)


@pytest.fixture
def ram(monkeypatch):
    """Sets the machine's free memory."""

    def free(number: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=number))

    free(10**13)
    return free


def test_what_fits_is_not_refused(ram):
    for overrides, processes in ((("method=lora", "r=8", "trainer=plain"), 1), (("method=fft", "trainer=zero3"), 8)):
        refuse_what_does_not_fit(*run(*overrides), processes, 80 * GB, "cuda")


def test_a_refusal_says_what_it_takes_and_what_fits(ram):
    said = refused(("method=fft", "trainer=ddp"), 4, 80 * GB)
    assert "LLaMA-2 7B with FFT takes 107.8 GB of GPU memory in each process" in said
    assert "(trainer=ddp, 4 processes, bf16), and a GPU here has 80.0 GB: 27.8 GB too little" in said
    assert "trainer=zero1 (47.2 GB a GPU); trainer=zero2 (37.1 GB a GPU); trainer=zero3 (27.0 GB a GPU)" in said
    assert "trainer=zero3_offload (134.8 GB of the machine's memory)" in said
    assert "a model of at most 5.0 billion parameters (this has 6.7 billion)" in said


def test_only_what_fits_is_named(ram):
    said = refused(("method=fft", "trainer=zero2"), 4, 30 * GB)
    assert "trainer=zero1" not in said and "trainer=zero3 (27.0 GB a GPU)" in said
    ram(130 * GB)
    assert "offload" not in refused(("method=fft", "trainer=zero2"), 4, 30 * GB)


def test_the_number_of_gpus_that_is_named_is_the_smallest_that_fits(ram):
    for overrides, processes, available in (
        (("method=fft", "trainer=plain"), 1, 80 * GB),
        (("method=fft", "trainer=zero3"), 4, 16 * GB),
        (("method=lora", "r=8", "trainer=zero3"), 2, 2 * GB),
    ):
        said = refused(overrides, processes, available)
        number = int(re.search(r"trainer=zero3 with (\d+) GPUs or more", said)[1])
        spec, model = run(*overrides[:-1], "trainer=zero3")
        assert bytes_per_process(spec, model, number) <= available < bytes_per_process(spec, model, number - 1)


def test_a_trainer_that_the_method_cannot_use_is_not_named(ram):
    spec, model = run("method=fft", "trainer=ddp")
    spec = spec.model_copy(update={"method": spec.method.model_copy(update={"cannot": {"zero3": "it merges"}})})
    with pytest.raises(UserError) as caught:
        refuse_what_does_not_fit(spec, model, 4, 40 * GB, "cuda")
    assert "trainer=zero3 " not in str(caught.value) and "trainer=zero2 " in str(caught.value)


def test_on_a_cpu_all_processes_share_the_memory_and_scale_mini_is_named(ram):
    said = refused(("method=lora", "r=8", "trainer=ddp"), 2, 25 * GB, "cpu")
    assert f"takes {2 * (2 * ALL_7B + 16 * LORA_8) / GB:.1f} GB of this machine's memory" in said
    assert "python train.py method=lora task=uuid scale=mini" in said and "zero3" not in said
    refuse_what_does_not_fit(*run("method=lora", "r=8", "trainer=plain"), 1, 25 * GB, "cpu")


def test_what_is_offloaded_must_fit_into_the_machine(ram):
    overrides = ("method=fft", "trainer=zero3_offload")
    ram(140 * GB)
    refuse_what_does_not_fit(*run(*overrides), 4, 8 * GB, "cuda")
    ram(64 * GB)
    said = refused(overrides, 4, 30 * GB)
    assert "this machine's memory" in said and "it has free 64.0 GB" in said and "trainer=zero3 (27.0 GB a GPU)" in said


def test_a_machine_without_gpus_knows_what_gpus_would_take():
    spec = RunSpec.from_config(compose_config(["scale=paper", "task=uuid", "method=lora", "r=8", "trainer=plain"]))
    model = apply_method(on_meta_device(spec), spec)
    assert needed_gb(spec, model, 1) == (2 * ALL_7B + 16 * LORA_8) / GB
