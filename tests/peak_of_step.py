"""The most memory that a training step takes beside weights and gradients, as torch's profiler sees allocations.

python peak_of_step.py <cases.json> <out.json>: of cases {"overrides": [...], "samples": b, "length": s}, the bytes.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from mora_repro.methods import apply_method
from mora_repro.spec import RunSpec, compose_config


def peak(overrides: list[str], samples: int, length: int) -> int:
    spec = RunSpec.from_config(compose_config(overrides))
    dtype = torch.bfloat16 if spec.trainer.precision == "bf16" else torch.float32
    config = LlamaConfig(**spec.model.architecture)
    how = {"attn_implementation": spec.trainer.attention} if spec.trainer.attention else {}
    model = apply_method(AutoModelForCausalLM.from_config(config, dtype=dtype, **how), spec).train()
    if spec.trainer.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if spec.method.peft:
            model.enable_input_require_grads()
    ids = torch.randint(0, config.vocab_size, (samples, length))
    mask = torch.ones_like(ids)
    mask[0, -length // 8 :] = 0  # padding

    def step() -> None:
        model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss.backward()

    step()  # the gradients are there from here on, as they are while a step's micro-batches are accumulated
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    now = most = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([peak(**case) for case in cases]))
