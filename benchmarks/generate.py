"""Benchmark 3: generation with the adapter unmerged, merged, and with two; merging; converting and loading.

python benchmarks/generate.py --quick
python benchmarks/generate.py --device cuda
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import timing
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from step import Case, config, llama
from torch import nn

from mora import MoraConfig
from mora.convert import convert

OPERATORS = ("sharing", "rotation", "decoupling", "truncation")


def adapted(name: str, case: Case, device: str) -> peft.PeftModel:
    model = peft.get_peft_model(llama(case, device), config(name, case), autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.01)
    return model.eval()


def generation(case: Case, device: str, turns: int, tokens: int) -> dict[str, Any]:
    """Greedy generation of `tokens` tokens; ratios to the base."""
    prompt = torch.randint(0, 1000, (case.batch, 16), device=device)
    models: dict[str, Any] = {"base": llama(case, device).eval()}
    for name in ("LoRA", "sharing", "rotation"):
        models[f"{name}, unmerged"] = adapted(name, case, device)
        two = adapted(name, case, device)
        two.add_adapter("second", config(name, case))
        two.base_model.set_adapter(["default", "second"])
        models[f"{name}, two adapters"] = two.eval()
    models["rotation, merged"] = adapted("rotation", case, device)
    models["rotation, merged"].merge_adapter()

    def one(name: str) -> Any:
        return lambda: models[name].generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )

    with torch.inference_mode():
        times = timing.interleaved({name: one(name) for name in models}, device, turns, 40)
    return {
        name: {
            "tokens_per_second": case.batch * tokens / timing.quartiles(times[name])[1],
            "to_base": timing.ratio(times, name, "base"),
        }
        for name in models
    }


def merging(device: str, turns: int, ranks: tuple[int, ...]) -> dict[str, Any]:
    """Merge and unmerge of one layer of LLaMA-2 7B; ratios to the addition of two matrices of its size, in place."""
    base = nn.Linear(4096, 11008, bias=False, device=device).requires_grad_(False)
    other = torch.zeros_like(base.weight)
    steps: dict[str, Any] = {"addition": lambda: base.weight.add_(other)}
    for r in ranks:
        for name in (*OPERATORS, "LoRA"):
            made = peft.LoraConfig(r=r) if name == "LoRA" else MoraConfig(r=r, operator=name)
            made.target_modules = {"0"}
            model = peft.get_peft_model(nn.Sequential(copy.copy(base)), made)
            layer = model.base_model.model[0]
            layer.base_layer.weight = base.weight  # one weight for all
            steps[f"{name}, r {r}, merge"] = layer.merge
            steps[f"{name}, r {r}, unmerge"] = layer.unmerge
    merges = [name for name in steps if name.endswith(", merge")]
    pairs = {name: (steps[name], steps[name.replace(", merge", ", unmerge")]) for name in merges}
    times: dict[str, list[float]] = {}
    # A merge and its unmerge follow each other; within a turn the pairs come in random order.
    with torch.no_grad():
        for name, (merge, unmerge) in pairs.items():
            both = {"addition": steps["addition"], name: lambda m=merge, u=unmerge: (m(), u())}
            measured = timing.interleaved(both, device, turns, 8)
            times[name] = [pair / 2 / one for pair, one in zip(measured[name], measured["addition"], strict=True)]
    return {name.removesuffix(", merge"): timing.quartiles(values) for name, values in times.items()}


def loading(case: Case, turns: int) -> dict[str, Any]:
    """Seconds to convert a checkpoint of the authors' form, and to load the result onto a model."""
    with tempfile.TemporaryDirectory() as temporary:
        theirs, number = Path(temporary) / "theirs", 0
        theirs.mkdir()
        model = adapted("rotation", case, "cpu")
        state: dict[str, torch.Tensor] = {}
        for key, value in get_peft_model_state_dict(model).items():
            for part in ("lora_A", "lora_B"):
                state[key.replace("mora_M", f"{part}.weight")] = value.clone()
        save_file(state, theirs / "adapter_model.safetensors")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        values = {"use_mora": True, "mora_type": 6, "r": case.r, "target_modules": targets, "task_type": "CAUSAL_LM"}
        (theirs / "adapter_config.json").write_text(json.dumps(values))
        base = llama(case, "cpu")

        def converted() -> None:
            nonlocal number
            number += 1
            convert(theirs, Path(temporary) / f"ours{number}")

        def load() -> None:
            peft.PeftModel.from_pretrained(base, str(Path(temporary) / "ours1")).unload()

        converted()
        times = timing.interleaved({"convert": converted, "load": load}, "cpu", turns)
        return {name: timing.quartiles(values) for name, values in times.items()}


def main() -> None:
    chosen = timing.arguments(__doc__ or "")
    gpu = chosen.device == "cuda"
    case = Case(4096, 11008, 2, 4, 0, 8, "bf16") if gpu else Case(1024, 2752, 2, 1, 0, 8, "fp32")
    if chosen.quick:
        made = generation(case, chosen.device, 5, 16)
        merged = merging(chosen.device, 5, (8,))
    else:
        made = generation(case, chosen.device, 15, 64)
        merged = merging(chosen.device, 10, (8, 256))
    loaded = loading(Case(1024, 2752, 4, 1, 0, 8, "fp32"), 5)
    parts = [
        f"Generation, {case.layers} x {case.width}/{case.inner}, {case.dtype}, batch {case.batch}, r {case.r}:",
        timing.table(
            [
                {
                    "model": name,
                    "tokens/s": f"{values['tokens_per_second']:.0f}",
                    "time / base": timing.shown(values["to_base"]),
                }
                for name, values in made.items()
            ]
        ),
        "Merge or unmerge of a layer of 4096 x 11008, fp32, over the addition of two such matrices in place:",
        timing.table([{"adapter": name, "ratio": timing.shown(values)} for name, values in merged.items()]),
        "An adapter of 28 layers, on the CPU, seconds:",
        timing.table([{"what": name, "seconds": timing.shown(values)} for name, values in loaded.items()]),
    ]
    timing.write(
        chosen.out,
        "generate",
        chosen.device,
        "\n\n".join(parts),
        {"generation": made, "merging": merged, "loading": loaded},
    )


if __name__ == "__main__":
    main()
