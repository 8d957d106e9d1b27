"""Benchmark 2: a training step of a LLaMA with each method: forward, backward, AdamW.

Real widths, few layers. Beside time: peak memory of the step, and the bytes that the adapters alone keep for the
backward pass (the model's own, without adapters, taken off).

    python benchmarks/step.py --quick
    python benchmarks/step.py --device cuda
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import timing
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mora import MoraConfig

METHODS = ("LoRA", "sharing", "rotation", "decoupling", "truncation", "DoRA", "HiRA")


@dataclass(frozen=True)
class Case:
    """Hidden and intermediate width, layers, samples and tokens of a batch, rank, dtype, dropout's probability."""

    width: int
    inner: int
    layers: int
    batch: int
    length: int
    r: int
    dtype: str
    dropout: float = 0.0


def config(name: str, case: Case) -> peft.PeftConfig:
    common: dict[str, Any] = {"r": case.r, "target_modules": "all-linear"}
    if name in ("LoRA", "DoRA"):
        return peft.LoraConfig(**common, lora_dropout=case.dropout, use_dora=name == "DoRA")
    if name == "HiRA":
        return peft.HiraConfig(**common, hira_dropout=case.dropout)
    return MoraConfig(**common, dropout=case.dropout, operator=name)


def llama(case: Case, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=1000,
                hidden_size=case.width,
                intermediate_size=case.inner,
                num_hidden_layers=case.layers,
                num_attention_heads=max(1, case.width // 128),
                attn_implementation="sdpa",
            )
        )
    return model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]).requires_grad_(False)


def measure(case: Case, device: str, methods: tuple[str, ...], turns: int, seconds: float) -> dict[str, Any]:
    """One model for all methods, which are switched between steps, so that the base's weights are there once."""
    tokens = torch.randint(0, 1000, (case.batch, case.length), device=device)
    models: dict[str, nn.Module] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    base = llama(case, device)
    for name in methods:
        model = llama(case, device)
        model.load_state_dict(base.state_dict(), assign=True)  # the same storage
        model.requires_grad_(False)
        model = peft.get_peft_model(model, config(name, case), autocast_adapter_dtype=False)
        models[name] = model
        optimizers[name] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    models["base"] = base
    for model in models.values():
        model.train()
        # The first layer's input gets a gradient everywhere, so that the frozen base does all of its backward pass.
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))

    def forward(name: str) -> torch.Tensor:
        return models[name](input_ids=tokens, labels=tokens, use_cache=False).loss

    def step(name: str) -> None:
        forward(name).backward()
        if name in optimizers:
            optimizers[name].step()
            optimizers[name].zero_grad()

    def one(name: str) -> Any:
        return lambda: step(name)

    times = timing.interleaved({name: one(name) for name in models}, device, turns, seconds)
    saved = {name: timing.saved_bytes(lambda name=name: forward(name), model) for name, model in models.items()}
    return {
        name: {
            "milliseconds": 1e3 * timing.quartiles(times[name])[1],
            "to_lora": timing.ratio(times, name, "LoRA"),
            "to_base": timing.ratio(times, name, "base"),
            "peak_bytes": timing.peak_bytes(one(name), device),
            "saved_by_adapters": saved[name] - saved["base"],
        }
        for name in models
    }


def main() -> None:
    chosen = timing.arguments(__doc__ or "")
    if chosen.device == "cuda":
        sizes = [(4096, 11008, 2, 4, 1024)]
        kinds = [(8, "bf16", 0.0), (8, "bf16", 0.05), (256, "bf16", 0.0)]
    else:
        sizes = [(1024, 2752, 2, 2, 512)] if chosen.quick else [(1024, 2752, 4, 2, 512)]
        kinds = [(8, "fp32", 0.0), (8, "bf16", 0.05)]
    cases = [Case(*size, *kind) for size in sizes for kind in kinds]
    if chosen.device == "cpu" and not chosen.quick:
        cases += [Case(2048, 5504, 2, 1, 512, *kind) for kind in kinds]
        more = [(8, "fp32", 0.05), (64, "fp32", 0.0), (8, "bf16", 0.0), (64, "bf16", 0.0)]
        cases += [Case(*sizes[0], *kind) for kind in more]
    methods = METHODS[:3] if chosen.quick else METHODS
    rows, data = [], []
    for case in cases:
        result = measure(case, chosen.device, methods, 20, 25)
        data.append({"case": vars(case), "results": result})
        lora = result["LoRA"]
        for name, values in result.items():
            rows.append(
                {
                    "model": f"{case.layers} x {case.width}/{case.inner}",
                    "tokens": case.batch * case.length,
                    "r": case.r,
                    "dtype": case.dtype + (f", dropout {case.dropout}" if case.dropout else ""),
                    "method": name,
                    "ms": f"{values['milliseconds']:.1f}",
                    "step / LoRA": timing.shown(values["to_lora"]),
                    "step / base": timing.shown(values["to_base"]),
                    "peak / LoRA": f"{values['peak_bytes'] / lora['peak_bytes']:.2f}",
                    "adapters' saved / LoRA": f"{values['saved_by_adapters'] / lora['saved_by_adapters']:.2f}",
                }
            )
            print(*rows[-1].values(), sep=" | ", flush=True)
    timing.write(chosen.out, "step", chosen.device, timing.table(rows), data)


if __name__ == "__main__":
    main()
