"""Benchmark 1: one linear layer, forward and backward, its base frozen.

MoRA's operators beside PEFT's LoRA, DoRA, HiRA and RandLoRA of equal parameters and VeRA of the same rank (no VeRA has
so many parameters), and beside rotation as the authors compute it. All get the gradient of the layer's input too, as
layers within a model do.

    python benchmarks/layer.py --quick
    python benchmarks/layer.py --device cuda
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Any

import peft
import timing
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mora import MoraConfig
from mora_repro.methods.budget import PARAMETERS

OPERATORS = ("sharing", "rotation", "decoupling", "truncation")


@dataclass(frozen=True)
class Case:
    """in and out features, rank, tokens, "fp32" or "bf16" (base and adapter), dropout's probability."""

    k: int
    d: int
    r: int
    tokens: int
    dtype: str
    dropout: float = 0.0


class AuthorsRotation(nn.Module):
    """Rotation as in the authors' code: x padded by cat, turned as x cos + cat(-second half, first half) sin."""

    def __init__(self, base: nn.Linear, size: int, dropout: float) -> None:
        super().__init__()
        self.base, self.size, self.dropout = base, size, nn.Dropout(dropout)
        self.m = nn.Parameter(torch.zeros(size, size, dtype=base.weight.dtype, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y, size = self.base(x), self.size
        x = self.dropout(x)
        blocks = math.ceil(x.shape[-1] / size)
        if missing := blocks * size - x.shape[-1]:
            x = torch.cat((x, x[..., :missing]), dim=-1)
        x = x.view(*x.shape[:-1], blocks, size)
        theta = 10000.0 ** (-torch.arange(0, size, 2, device=x.device).float() / size)
        angle = torch.outer(torch.arange(blocks, device=x.device).float(), theta)
        cos, sin = (torch.cat((part, part), dim=-1).to(x.dtype) for part in (angle.cos(), angle.sin()))
        turned = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), dim=-1)
        out = linear(x * cos + turned * sin, self.m).flatten(-2)
        if (features := y.shape[-1]) > out.shape[-1]:
            out = out.repeat(*[1] * (out.dim() - 1), math.ceil(features / out.shape[-1]))
        return y + out[..., :features]


def adapters(case: Case, device: str, wide: bool) -> dict[str, nn.Module]:
    """The layer with each method, all on the same weight; `wide`: also those that are slower by their nature."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
    base = nn.Linear(case.k, case.d, bias=False, dtype=dtype, device=device)
    budget = case.r * (case.k + case.d)

    def nearest(name: str) -> int:
        return min(range(1, min(case.k, case.d)), key=lambda n: abs(PARAMETERS[name](n, case.k, case.d) - budget))

    configs: dict[str, peft.PeftConfig] = {"LoRA": peft.LoraConfig(r=case.r, lora_dropout=case.dropout)}
    for operator in OPERATORS:
        configs[operator] = MoraConfig(r=case.r, operator=operator, dropout=case.dropout)
    if wide:
        configs["DoRA"] = peft.LoraConfig(r=case.r, lora_dropout=case.dropout, use_dora=True)
        configs["VeRA"] = peft.VeraConfig(r=case.r, vera_dropout=case.dropout)
        configs["HiRA"] = peft.HiraConfig(r=case.r, hira_dropout=case.dropout)
        configs["RandLoRA"] = peft.RandLoraConfig(r=nearest("peft.RandLoraConfig"), randlora_dropout=case.dropout)
    made: dict[str, nn.Module] = {}
    for name, config in configs.items():
        config.target_modules = {"0"}
        model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.01)
        made[name] = model.base_model.model.train()
    made["authors"] = AuthorsRotation(copy.deepcopy(base), 2 * (round(math.sqrt(budget)) // 2), case.dropout).train()
    made["base"] = base.requires_grad_(False)
    made["authors"].base.requires_grad_(False)
    return made


def measure(case: Case, device: str, turns: int, seconds: float, wide: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    modules = {name: module.to(device) for name, module in adapters(case, device, wide).items()}
    dtype = modules["base"].weight.dtype
    x = torch.randn(case.tokens, case.k, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn(case.tokens, case.d, dtype=dtype, device=device)

    def step(module: nn.Module) -> None:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        torch.autograd.grad(module(x), [x, *trained], gradient)

    def one(name: str) -> Any:
        return lambda: step(modules[name])

    times = timing.interleaved({name: one(name) for name in modules}, device, turns, seconds)
    middle = {name: timing.quartiles(of)[1] for name, of in times.items()}
    result: dict[str, Any] = {}
    for name, module in modules.items():
        result[name] = {
            "milliseconds": 1e3 * middle[name],
            "to_lora": timing.ratio(times, name, "LoRA"),
            "own_to_authors": (middle[name] - middle["base"]) / (middle["authors"] - middle["base"]),
            "peak_bytes": timing.peak_bytes(one(name), device),
            "saved_bytes": timing.saved_bytes(lambda module=module: module(x), module),
            "parameters": sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad),
        }
        if device == "cuda":
            result[name]["gpu_milliseconds"] = 1e3 * timing.gpu_seconds(one(name))
    return result


def cases(quick: bool, device: str) -> list[Case]:
    if device == "cuda":
        shapes, ranks, tokens = [(4096, 4096), (4096, 11008), (11008, 4096)], [8, 128, 256], [4096, 16384]
        if quick:
            shapes, ranks, tokens = shapes[:2], [8, 256], [8192]
        chosen = [
            Case(k, d, r, t, "bf16", dropout)
            for (k, d), r, t, dropout in itertools.product(shapes, ranks, tokens, (0.0, 0.05))
        ]
        return [*chosen, *(Case(*shapes[0], r, tokens[0], "fp32") for r in (8, 256))]
    kinds = [("fp32", 0.0), ("fp32", 0.05), ("bf16", 0.0), ("bf16", 0.05)]
    if quick:
        return [Case(1024, 1024, r, 2048, dtype, dropout) for r in (8, 64) for dtype, dropout in kinds]
    chosen = [
        Case(k, d, r, 2048, dtype, dropout)
        for (k, d), r, (dtype, dropout) in itertools.product(
            [(1024, 1024), (1024, 2752), (2752, 1024), (2048, 2048)], (8, 64, 256), kinds
        )
    ]
    # r_hat divides the sides at 1024 x 1024, r 8 (it is 128), and nowhere else.
    chosen += [Case(1024, 1024, r, t, dtype) for r in (8, 64) for t in (128, 512, 8192) for dtype in ("fp32", "bf16")]
    chosen += [Case(2048, 2048, 128, t, "fp32") for t in (512, 1024)]  # where folding begins to pay
    return chosen


def _on_the_gpu(values: dict[str, Any], lora: dict[str, Any]) -> dict[str, str]:
    """The GPU's time alone: what it is where the CPU, which launches, is ahead, as in a model of many layers."""
    if "gpu_milliseconds" not in values:
        return {}
    own = values["gpu_milliseconds"]
    return {"GPU ms": f"{own:.2f}", "GPU / LoRA": f"{own / lora['gpu_milliseconds']:.2f}"}


def main() -> None:
    chosen = timing.arguments(__doc__ or "")
    rows, data = [], []
    on_cpu = chosen.device == "cpu"
    for case in cases(chosen.quick, chosen.device):
        result = measure(
            case, chosen.device, turns=40 if on_cpu else 30, seconds=5 if chosen.quick else 12, wide=not chosen.quick
        )
        data.append({"case": vars(case), "results": result})
        lora = result["LoRA"]
        for name, values in result.items():
            rows.append(
                {
                    "k x d": f"{case.k} x {case.d}",
                    "r": case.r,
                    "tokens": case.tokens,
                    "dtype": case.dtype + (f", dropout {case.dropout}" if case.dropout else ""),
                    "method": name,
                    "ms": f"{values['milliseconds']:.2f}",
                    "step / LoRA": timing.shown(values["to_lora"]),
                    **_on_the_gpu(values, lora),
                    "own / authors": f"{values['own_to_authors']:.2f}",
                    "peak / LoRA": f"{values['peak_bytes'] / lora['peak_bytes']:.2f}",
                    "saved / LoRA": f"{values['saved_bytes'] / lora['saved_bytes']:.2f}",
                    "parameters": f"{values['parameters']:,}",
                }
            )
            print(*rows[-1].values(), sep=" | ", flush=True)
    timing.write(chosen.out, "layer", chosen.device, timing.table(rows), data)


if __name__ == "__main__":
    main()
