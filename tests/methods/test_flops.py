"""The arithmetic of a training: by hand, and beside torch's counter on a real model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mora_repro.methods import apply_method, on_meta_device
from mora_repro.methods.flops import flops
from mora_repro.methods.probe import flop_counter
from mora_repro.spec import RunSpec, compose_config

LAYERS, H, F, VOCABULARY = 32, 4096, 11008, 32000
PER_LAYER = 4 * H * H + 3 * H * F
TOKENS, LENGTH = 2 * 512, 512
ATTENTION = 4 * LENGTH * H * LAYERS  # forwards, a token


def of_llama_7b(*more: str) -> tuple[int, int, int]:
    spec = RunSpec.from_config(compose_config(["scale=paper", "task=gsm8k", *more]))
    found = flops(spec, apply_method(on_meta_device(spec), spec), 2, LENGTH)
    return found.forward, found.backward, found.recomputed


def test_full_training_is_6nd_with_attention_and_what_is_recomputed():
    weights = LAYERS * PER_LAYER + H * VOCABULARY
    forward, backward, recomputed = of_llama_7b("method=fft")
    assert forward == TOKENS * (2 * weights + ATTENTION)
    assert forward + backward == TOKENS * (6 * weights + 3 * ATTENTION)
    assert recomputed == TOKENS * (2 * LAYERS * PER_LAYER + ATTENTION)
    assert of_llama_7b("method=fft", "trainer.gradient_checkpointing=false")[2] == 0


def test_a_frozen_base_takes_4nd_and_lora_6nd_of_its_own():
    weights = LAYERS * PER_LAYER + H * VOCABULARY
    lora = LAYERS * 8 * (4 * 2 * H + 3 * (H + F))
    forward, backward, _ = of_llama_7b("method=lora", "r=8")
    assert forward + backward == TOKENS * (4 * weights + 6 * lora + 3 * ATTENTION)


def test_rotation_takes_a_product_for_each_block():
    more, _, _ = of_llama_7b("method=mora", "r=8", "method.peft.operator=rotation")
    base = TOKENS * (2 * (LAYERS * PER_LAYER + H * VOCABULARY) + ATTENTION)
    # r_hat is 256 with 16 blocks, and 348 with 12 where a side is 11,008: the smaller side's blocks reach the output.
    # Of the last one's rows, the down projection computes those before 4,096.
    cut = 12 * 348 - 4096
    assert more - base == TOKENS * 2 * LAYERS * (4 * 16 * 256**2 + 3 * 12 * 348**2 - cut * 348)


@pytest.mark.parametrize("method", ["fft", "lora", "mora", "dora"])
def test_torchs_counter_finds_as_much_in_a_real_step(method):
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 8, "num_attention_heads": 4}
    spec = RunSpec.from_config(
        compose_config(
            [
                f"method={method}",
                *([] if method == "fft" else ["r=4"]),
                "scale=paper",
                "task=gsm8k",
                "model=llama_250m",
                *(f"model.architecture.{key}={value}" for key, value in shape.items()),
                "model.architecture.vocab_size=300",
                "trainer=plain",
                "trainer.precision=fp32",
                "trainer.gradient_checkpointing=false",
            ]
        )
    )
    config = LlamaConfig(**spec.model.architecture)
    model = apply_method(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), spec).train()
    ids = torch.zeros(2, 32, dtype=torch.long)
    with flop_counter() as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    planned = flops(spec, apply_method(on_meta_device(spec), spec), 2, 32)
    # What goes to frozen embeddings needs no gradient: a part of the first layer's, which is not taken off.
    assert planned.total / counter.get_total_flops() == pytest.approx(1, abs=0.03)
