"""A merge seen from inside, under every trainer; and the schedule of the rate around it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import launcher
from tiny import ROOT, TINY
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from mora_repro.errors import UserError
from mora_repro.methods import apply_method, load_base, load_tokenizer
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.run_spec import Merge
from mora_repro.training.checkpoints import save_trained
from mora_repro.training.launch import build_extensions
from mora_repro.training.merging import Merging, adapted_layers, refuse_no_merge
from mora_repro.training.optimizer import parameter_groups, with_restarts

STEPS = [
    "training.steps=6",
    "training.schedule=constant",
    "training.warmup_steps=0",
    "training.evaluate_at=[]",
    "training.save_every=100",
    "method.merge.every=4",
    "method.merge.restart_warmup=0",
    "+method.peft.modules_to_save=[lm_head]",
    "lr=1e-3",
]
SHARDED = "+trainer.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"


def look(folder: Path, processes: int, *overrides: str) -> dict:
    build_extensions()
    program = Path(__file__).with_name("inside_a_merge.py")
    command = [sys.executable, *launcher(processes), str(program), str(folder / "seen.json"), *TINY, *STEPS, *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["relora", "remora"])
@pytest.mark.parametrize(
    ("trainer", "processes", "precision"),
    [
        ("plain", 1, "fp32"),
        ("ddp", 2, "fp32"),
        ("plain", 1, "bf16"),
        ("zero1", 2, "bf16"),
        ("zero2", 2, "fp32"),
        ("zero2", 1, "bf16"),
        ("zero3", 2, "fp32"),
        ("zero3", 2, "bf16"),
    ],
)
def test_a_merge_keeps_the_function_and_restarts_the_adapter_alone(tmp_path, method, trainer, processes, precision):
    sharded = [SHARDED] if trainer == "zero3" else []
    how = [f"method={method}", f"trainer={trainer}", f"trainer.precision={precision}", *sharded]
    seen = look(tmp_path, processes, *how)
    assert seen["moments_before"] > 0 and seen["base_moved"] > 0, "nothing was merged"
    assert seen["function_moved"] <= (1e-5 if precision == "fp32" else 0.02) * seen["logits"]
    assert seen["masters_off"] == 0 and seen["moments"] == 0
    assert seen["others_untouched"] and seen["others"] == 1
    assert seen["same_on_all_ranks"]
    # The first step of Adam has the size of the rate only if moments and step count are zero.
    assert seen["first_update"] == pytest.approx(seen["lr"], rel=0.02)


def spec(*overrides: str) -> RunSpec:
    return RunSpec.from_config(compose_config([*TINY, *overrides]))


def made(*overrides: str) -> tuple[RunSpec, torch.nn.Module]:
    run = spec(*overrides)
    torch.manual_seed(0)
    return run, apply_method(load_base(run, load_tokenizer(run), None), run)


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)


def test_the_rate_falls_to_zero_after_a_merge_and_climbs_to_the_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / 100)
    jagged = with_restarts(schedule, Merge(every=20, restart_warmup=5)).lr_lambdas[0]
    assert [jagged(step) for step in (0, 1, 19)] == [1, 0.99, 0.81]
    assert jagged(20) == 0
    assert [jagged(20 + i) for i in range(1, 5)] == pytest.approx([0.75 * i / 5 for i in range(1, 5)])
    assert jagged(25) == 0.75 and jagged(39) == 0.61 and jagged(40) == 0


def test_new_matrices_are_a_function_of_seed_and_number_and_disturb_no_other_draw():
    run, model = made("method=relora", "r=2")
    draws = []
    for number in (1, 2, 1):
        torch.manual_seed(5)
        Merging(run, model).merge(number)
        layer = next(iter(adapted_layers(model).values()))
        draws.append((layer.lora_A["default"].weight.detach().clone(), torch.rand(1)))
    assert torch.equal(draws[0][0], draws[2][0]) and not torch.equal(draws[0][0], draws[1][0])
    assert draws[0][1] == draws[1][1]


def test_remora_changes_the_grouping_and_goes_round():
    mixed = "method.merge.groupings=[[strided,strided],[blocked,blocked],[strided,blocked]]"
    run, model = made("method=remora", "r=2", mixed)
    merging, seen = Merging(run, model), []
    for number in range(4):
        if number:
            merging.merge(number)
        layout = next(iter(adapted_layers(model).values())).mora_layout["default"]
        seen.append((layout.in_grouping, layout.out_grouping))
    assert seen == [("strided", "strided"), ("blocked", "blocked"), ("strided", "blocked"), ("strided", "strided")]


def test_momentum_unloads_a_moving_average():
    run, model = made("method=periodic_lora", "r=2", "method.merge.momentum=0.25")
    merging = Merging(run, model)
    layer = next(iter(adapted_layers(model).values()))
    start, expected = layer.get_base_layer().weight.detach().clone(), 0
    average = torch.zeros_like(start)
    for number in (1, 2, 3):
        randomise(model)
        average = 0.25 * average + 0.75 * layer.get_delta_weight("default").detach()
        expected = expected + average
        merging.merge(number)
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), start + expected)


def test_an_fp32_master_keeps_what_bf16_rounds_away():
    """Many small updates: bf16 alone loses them, and with the master the base is the rounded sum."""
    errors = {}
    for keep in (False, True):
        run, model = made("method=relora", "r=2", "trainer.precision=bf16", f"+method.merge.fp32_master={keep}")
        merging = Merging(run, model)
        layer = next(iter(adapted_layers(model).values()))
        exact = layer.get_base_layer().weight.detach().double()
        for number in range(1, 30):
            with torch.no_grad():
                layer.lora_B["default"].weight.fill_(1e-5)
            exact += layer.get_delta_weight("default").double()
            merging.merge(number)
        off = layer.get_base_layer().weight.detach().double() - exact
        errors[keep] = float(off.abs().max() / exact.abs().max())
    assert errors[True] < 0.004 < 2 * errors[False]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["method=relora", "+method.peft.use_dora=true"], "a variant of LoRA"),
        (["method=relora", "+method.peft.lora_bias=true"], "has biases"),
        (["method=vera", "+method.merge={every: 5, restart_warmup: 2}"], "it has Linear"),
    ],
)
def test_what_cannot_be_merged_is_refused(overrides, why):
    run, model = made(*overrides, "r=2")
    with pytest.raises(UserError, match=rf"changes the base.*{why}"):
        refuse_no_merge(run, model)


@pytest.mark.parametrize("method", ["relora", "remora", "pissa"])
def test_a_whole_model_that_is_saved_is_the_one_that_was_trained(tmp_path, method):
    run, model = made(f"method={method}", "r=2", "+method.peft.modules_to_save=[lm_head]")
    randomise(model)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        before = model.eval()(ids).logits
        save_trained(model, load_tokenizer(run), tmp_path / "model", as_a_whole_model=True)
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()(ids).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_lora_plus_has_its_own_rate_for_b_and_adapters_are_apart():
    run, model = made("method=lora_plus", "r=2", "+method.peft.modules_to_save=[lm_head]")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, run.method, 1e-3, run.training, [])
    assert groups[0]["lr"] == 1e-3
    rates = {}
    for group in groups:
        for parameter in group["params"]:
            kind = next(k for k in ("lora_A", "lora_B", "lm_head") if k in names[id(parameter)])
            rates.setdefault(kind, set()).add((group["lr"], group["adapter"]))
    assert rates == {"lora_A": {(1e-3, True)}, "lora_B": {(4e-3, True)}, "lm_head": {(1e-3, False)}}


def test_lora_plus_rates_are_those_of_peft():
    from peft.optimizers import create_loraplus_optimizer

    run, model = made("method=lora_plus", "r=2")
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)
    expected = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    ours = {id(p): g["lr"] for g in parameter_groups(model, run.method, 1e-3, run.training, []) for p in g["params"]}
    assert ours == expected


def test_a_rate_factor_for_a_name_that_is_not_there_is_a_user_error():
    run, model = made("method=lora", "r=2", "+method.lr_factors={lora_C: 2}")
    with pytest.raises(UserError, match=r"'lora_C'.*lora_A, lora_B"):
        parameter_groups(model, run.method, 1e-3, run.training, [])
