"""Activations: a number by hand, what may never take more, and the peaks of real steps on a CPU."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import ROOT

from mora_repro.methods import apply_method, on_meta_device
from mora_repro.methods.memory import activations, memory
from mora_repro.methods.probe import decoder, linear_modules, probe
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.compose import options

WIDE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
NARROW = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}


def overrides(
    method: str, r: int, precision: str, checkpointing: bool, vocabulary: int, shape: dict, *more: str
) -> list[str]:
    """A run of a LLaMA of that shape, in fp32 or in what ZeRO computes in bf16."""
    return [
        f"method={method}",
        *([] if method == "fft" else [f"r={r}"]),
        "scale=paper",
        "task=gsm8k",
        "model=llama_250m",
        *(f"model.architecture.{key}={value}" for key, value in shape.items()),
        f"model.architecture.vocab_size={vocabulary}",
        f"trainer={'zero2' if precision == 'bf16' else 'plain'}",
        f"trainer.precision={precision}",
        f"trainer.gradient_checkpointing={str(checkpointing).lower()}",
        *more,
    ]


# (what composes it, samples, length): where the loss is the peak, and where a layer's backward pass is.
CASES = {
    "fft": (overrides("fft", 0, "fp32", False, 1000, NARROW), 4, 128),
    "fft in bf16": (overrides("fft", 0, "bf16", False, 2000, WIDE), 4, 128),
    "fft, checkpointing": (overrides("fft", 0, "fp32", True, 1000, NARROW), 4, 128),
    "fft in bf16, checkpointing": (overrides("fft", 0, "bf16", True, 300, WIDE), 4, 256),
    "lora": (overrides("lora", 8, "fp32", False, 1000, NARROW), 4, 128),
    "lora in bf16": (overrides("lora", 64, "bf16", False, 1000, NARROW), 4, 128),
    "lora without dropout, checkpointing": (
        overrides("lora", 8, "fp32", True, 1000, NARROW, "method.peft.lora_dropout=0"),
        4,
        128,
    ),
    "lora in bf16, checkpointing": (overrides("lora", 64, "bf16", True, 200, WIDE), 2, 512),
    "lora with grouped queries": (
        overrides("lora", 8, "fp32", False, 300, {**WIDE, "num_attention_heads": 16}),
        2,
        256,
    ),
    "mora": (overrides("mora", 8, "fp32", False, 1000, NARROW), 4, 128),
    "mora in bf16": (overrides("mora", 64, "bf16", False, 1000, NARROW), 4, 128),
    "mora, checkpointing": (overrides("mora", 8, "fp32", True, 300, NARROW), 4, 128),
    "mora r=64 in bf16, checkpointing": (overrides("mora", 64, "bf16", True, 300, WIDE), 2, 256),
    "dora": (overrides("dora", 8, "fp32", False, 1000, WIDE), 4, 128),
    "dora in bf16, checkpointing": (overrides("dora", 64, "bf16", True, 300, WIDE), 4, 128),
    "mora, eager attention": (overrides("mora", 8, "fp32", False, 300, NARROW, "trainer.attention=eager"), 2, 256),
}
CASES["lora with grouped queries"][0].append("+model.architecture.num_key_value_heads=4")


def planned(composed: list[str], samples: int, length: int) -> int:
    spec = RunSpec.from_config(compose_config(composed))
    return activations(spec, apply_method(on_meta_device(spec), spec), samples, length, "cpu")


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[str, int]:
    """Measured in a process of its own, which has nothing of the plan."""
    folder = tmp_path_factory.mktemp("peaks")
    cases = [{"overrides": over, "samples": samples, "length": length} for over, samples, length in CASES.values()]
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(ROOT / "tests" / "peak_of_step.py"), str(folder / "cases.json"), str(folder / "out.json")],
        check=True,
        cwd=ROOT,
        env=environment,
        capture_output=True,
    )
    return dict(zip(CASES, json.loads((folder / "out.json").read_text()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_real_step_takes_it_within_15_per_cent(case, peaks):
    assert planned(*CASES[case]) / peaks[case] == pytest.approx(1, abs=0.15)


def llama_7b(*more: str) -> tuple[RunSpec, torch.nn.Module]:
    spec = RunSpec.from_config(compose_config(["scale=paper", "task=gsm8k", "trainer.precision=bf16", *more]))
    return spec, apply_method(on_meta_device(spec), spec)


def test_full_training_of_llama_7b_by_hand():
    spec, model = llama_7b("method=fft", "trainer=zero2", "trainer.gradient_checkpointing=false")
    n, h, f, vocabulary = 2 * 1024, 4096, 11008, 32000
    # Of a layer: two norms (4 + 2) N h, both inputs 2 N h, q k v and output 2 N h each, 4 N f in 2 bytes; the
    # log-sums of 32 heads, and a mask of 1,024 values for each token.
    layer = n * (2 * 6 * h + 2 * 2 * h + 4 * 2 * h + 4 * 2 * f + 32 * 4 + 1024 * 2)
    # Of the loss: the last norm 4 N h, its output 2 N h, and three times V in fp32.
    loss = n * ((4 + 2) * h + 12 * vocabulary)
    assert activations(spec, model, 2, 1024) == 32 * layer + loss


def test_checkpointing_keeps_a_layers_input():
    spec, model = llama_7b("method=fft", "trainer=zero2")
    n, h, vocabulary = 8 * 512, 4096, 32000
    assert activations(spec, model, 8, 512) == n * (32 * 2 * h + (4 + 2) * h + 12 * vocabulary)


@pytest.mark.parametrize("method", ["fft", "lora", "mora", "dora"])
def test_more_tokens_take_more_and_checkpointing_less(method):
    spec, model = llama_7b(f"method={method}")
    without = spec.with_settings({"trainer.gradient_checkpointing": False})
    eager = without.with_settings({"trainer.attention": "eager"})
    few, many, longer = (activations(spec, model, *shape) for shape in ((1, 512), (2, 512), (1, 2048)))
    assert few < many < longer
    assert activations(spec, model, 4, 512) < activations(without, model, 4, 512) < activations(eager, model, 4, 512)


@pytest.mark.parametrize("method", [name for name in options("method") if name != "peft"])  # which has no defaults
def test_every_method_can_be_planned(method):
    more = ["trainer=plain", "trainer.gradient_checkpointing=false"]  # what some refuse
    spec = RunSpec.from_config(
        compose_config([f"method={method}", "scale=paper", "task=gsm8k", "model=smollm2_135m", *more])
    )
    model = apply_method(on_meta_device(spec), spec, steps=100)
    found = memory(spec, model, 1, 2, 256)
    assert found.total > found.activations > 0
    assert (found.adapter == 0) == (method == "fft")


def test_parts_of_a_stage_are_shared_by_the_processes():
    totals = []
    for trainer in ("ddp", "zero1", "zero2", "zero3"):
        spec, model = llama_7b("method=fft", f"trainer={trainer}")
        found = memory(spec, model, 8, 8, 512)
        totals.append(found.weights + found.gradients + found.optimizer)
    assert totals == sorted(totals, reverse=True)
    assert totals[3] == 2 * 6_738_415_616  # 16 bytes over 8 processes


def test_what_is_offloaded_takes_no_memory_of_the_gpu():
    spec, model = llama_7b("method=lora", "r=8", "trainer=zero3_offload")
    found = memory(spec, model, 8, 8, 512)
    assert found.weights == found.adapter == found.gradients == found.optimizer == 0 < found.activations
    # A bucket of 5e8 values, and 1e9 weights that are whole at a time.
    assert found.buffers == 2 * (5 * 10**8 + 10**9)


def test_what_a_lora_layer_keeps_by_hand():
    _, model = llama_7b("method=lora", "r=8")
    layer = linear_modules(decoder(model)[2][0])["gate_proj"]
    tokens, k, d = 2 * 64, 4096, 11008
    found = probe(layer, "gate_proj", 2, 64, torch.bfloat16)
    # The dropped input and its mask of a byte; A's output, which B reads.
    assert (found.kept, found.keeps_input) == (tokens * (2 * k + k + 2 * 8), False)
    # Frozen 2 P forwards and backwards; A and B twice that backwards: x needs its gradient too.
    assert found.forward == 2 * tokens * (k * d + 8 * (k + d))
    assert found.backward == 2 * tokens * k * d + 4 * tokens * 8 * (k + d)


@pytest.mark.parametrize(("operator", "r"), [("sharing", 256), ("rotation", 8), ("truncation", 8)])
def test_what_a_mora_layer_keeps_under_dropout(operator, r):
    _, model = llama_7b("method=mora", f"r={r}", f"method.peft.operator={operator}")
    layer = linear_modules(decoder(model)[2][0])["q_proj"]
    assert layer.mora_dropout["default"].p > 0
    tokens, k, size = 2 * 512, 4096, layer.mora_layout["default"].size
    found = probe(layer, "q_proj", 2, 512, torch.bfloat16)
    # Sharing its compressed input, the others their input; and PyTorch's dropout a mask of a byte.
    kept = {"sharing": tokens * 2 * size, "rotation": 0, "truncation": tokens * (k + 2 * k)}
    assert (found.kept, found.keeps_input) == (kept[operator], operator == "rotation")
    # Under ZeRO 3 modules have hooks, and dropout is PyTorch's: rotation keeps the dropped input, as truncation does.
    hooked = probe(layer, "q_proj", 2, 512, torch.bfloat16, hooks=True)
    kept = {"sharing": tokens * (k + 2 * size), "rotation": tokens * (k + 2 * k), "truncation": tokens * (k + 2 * k)}
    assert (hooked.kept, hooked.keeps_input) == (kept[operator], False)
