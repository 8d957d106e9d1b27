"""What PEFT promises of every tuner, for MORA, on a LLaMA, a GPT-2, a BERT-like classifier and a bare MLP."""

import copy
import json
import pickle
import warnings
import zlib

import pytest
import torch
from models import BERT, GPT2, KINDS, LLAMA, MLP_KIND, Kind, logits
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    convert_to_lora,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from mora import Linear, MoraConfig, MoraLayer, MoraModel, Operator, register_operator
from mora.config import add_peft_type
from mora.dropout import Mask

OPERATORS = ["truncation", "sharing", "decoupling", "rotation"]

pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")


def adapted(kind: Kind, **config) -> PeftModel:
    """A model with an adapter that changes its function (M is random)."""
    arguments = {"r": 3, "init_weights": False, **kind.config, **config}
    return get_peft_model(kind.model(), MoraConfig(**arguments)).eval()


def add(model: PeftModel, kind: Kind, name: str, **config) -> None:
    torch.manual_seed(zlib.crc32(name.encode()))
    model.add_adapter(name, MoraConfig(**{"r": 3, "init_weights": False, **kind.config, **config}))


def layers(model: nn.Module) -> list[MoraLayer]:
    return [module for module in model.modules() if isinstance(module, MoraLayer)]


def close(a: torch.Tensor, b: torch.Tensor, **tolerances) -> bool:
    return torch.allclose(a, b, **{"rtol": 1e-4, "atol": 1e-4, **tolerances})


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Outputs of the same weights: equal but for rounding in the last digits of the largest value.

    They need not be equal to the bit: torch takes another kernel for a weight that needs no gradient.
    """
    return torch.allclose(a, b, rtol=0, atol=2e-6 * a.abs().max().item())


def equal_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
every_operator = pytest.mark.parametrize("operator", OPERATORS)


@every_kind
@every_operator
def test_a_fresh_adapter_changes_nothing_and_trains_only_m(kind, operator):
    base = logits(kind.model(), kind.batch())
    model = get_peft_model(kind.model(), MoraConfig(r=3, operator=operator, **kind.config)).eval()
    assert isinstance(model.base_model, MoraModel) and len(layers(model)) >= 2
    assert torch.equal(logits(model, kind.batch()), base)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in trained if "modules_to_save" in name}  # PEFT trains a classifier's head by itself
    assert all(".mora_M." in name for name in trained.keys() - heads)
    assert len(trained) - len(heads) == len(layers(model))
    for layer in layers(model):
        size = layer.mora_layout["default"].size
        assert layer.mora_M["default"].shape == (size, size)
        assert size == int(((layer.in_features + layer.out_features) * 3) ** 0.5 + 0.5) - (
            int(((layer.in_features + layer.out_features) * 3) ** 0.5 + 0.5) % 2 if operator == "rotation" else 0
        )


@every_kind
@every_operator
def test_merging_keeps_the_function_and_unmerging_restores_the_weights(kind, operator):
    model = adapted(kind, operator=operator)
    base = logits(kind.model(), kind.batch())
    before = logits(model, kind.batch())
    assert not close(before, base)
    weights = [layer.get_base_layer().weight.clone() for layer in layers(model)]
    model.merge_adapter()
    assert all(layer.merged for layer in layers(model))
    assert not any(torch.equal(w, layer.get_base_layer().weight) for w, layer in zip(weights, layers(model)))
    assert close(logits(model, kind.batch()), before)
    model.unmerge_adapter()
    assert all(close(w, layer.get_base_layer().weight, atol=1e-5) for w, layer in zip(weights, layers(model)))
    assert close(logits(model, kind.batch()), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layers(model)[0].unmerge()


@every_kind
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_leaves_a_plain_model(kind, safe):
    model = adapted(kind)
    before = logits(model, kind.batch())
    merged = model.merge_and_unload(safe_merge=safe)
    assert not layers(merged) and close(logits(merged, kind.batch()), before)
    assert not any("mora" in name for name in merged.state_dict())


@every_kind
def test_unload_returns_the_base(kind):
    base = logits(kind.model(), kind.batch())
    assert torch.equal(logits(adapted(kind).unload(), kind.batch()), base)


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_what_is_not_finite_and_leaves_the_base_as_it_was(kind, value):
    model = adapted(kind)
    with torch.no_grad():
        layers(model)[0].mora_M["default"][0, 0] = value
    weight = layers(model)[0].get_base_layer().weight.clone()
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layers(model)[0].get_base_layer().weight, weight) and not layers(model)[0].merged


@every_kind
@every_operator
def test_save_and_load_give_the_same_function_in_safetensors(kind, operator, tmp_path):
    model = adapted(kind, operator=operator, in_grouping="blocked")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["operator"], saved["in_grouping"]) == ("MORA", 3, operator, "blocked")
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert names == get_peft_model_state_dict(model).keys()
    assert sum(name.endswith("mora_M") for name in names) == len(layers(model))
    assert isinstance(PeftConfig.from_pretrained(tmp_path), MoraConfig)
    loaded = PeftModel.from_pretrained(kind.model(), tmp_path).eval()
    assert equal_weights(loaded, model)
    assert same(logits(loaded, kind.batch()), logits(model, kind.batch()))
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if "mora_" in name)
    trainable = PeftModel.from_pretrained(kind.model(), tmp_path, is_trainable=True)
    assert all(p.requires_grad for name, p in trainable.named_parameters() if "mora_" in name)


@every_kind
def test_an_adapter_loads_under_another_name(kind, tmp_path):
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.model(), tmp_path, adapter_name="other").eval()
    assert loaded.active_adapter == "other" and list(loaded.peft_config) == ["other"]
    assert same(logits(loaded, kind.batch()), logits(model, kind.batch()))
    # Loaded a second time, and saved: each adapter in a folder of its name.
    loaded.load_adapter(tmp_path, adapter_name="again")
    loaded.save_pretrained(tmp_path / "both")
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"README.md", "other", "again"}


@every_kind
def test_low_cpu_mem_usage_loads_the_same(kind, tmp_path):
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.model(), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(p.device.type == "meta" for p in loaded.parameters())
    assert same(logits(loaded, kind.batch()), logits(model, kind.batch()))
    empty = get_peft_model(kind.model(), MoraConfig(r=3, **kind.config), low_cpu_mem_usage=True)
    assert {p.device.type for name, p in empty.named_parameters() if "mora_" in name} == {"meta"}


@every_kind
def test_disabling_gives_the_base_also_when_merged(kind):
    base, model = logits(kind.model(), kind.batch()), adapted(kind)
    on = logits(model, kind.batch())
    with model.disable_adapter():
        assert torch.equal(logits(model, kind.batch()), base)
    assert torch.equal(logits(model, kind.batch()), on)
    model.merge_adapter()
    with model.disable_adapter():
        assert close(logits(model, kind.batch()), base)


@every_kind
def test_several_adapters_are_switched_added_and_deleted(kind):
    model = adapted(kind)
    first = logits(model, kind.batch())
    add(model, kind, "second", operator="sharing", r=2)
    assert torch.equal(logits(model, kind.batch()), first)
    model.set_adapter("second")
    second = logits(model, kind.batch())
    assert not close(first, second)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "mora_" in name}
    assert trained and all(name.endswith(".second") for name in trained)
    model.set_adapter("default")
    assert torch.equal(logits(model, kind.batch()), first)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    for layer in layers(model):
        for attribute in ("r", "mora_M", "mora_operator", "mora_layout", "mora_dropout"):
            assert list(getattr(layer, attribute)) == ["default"], attribute
    add(model, kind, "second", operator="sharing", r=2)
    model.set_adapter("second")
    assert close(logits(model, kind.batch()), second)


def test_an_added_adapter_on_other_layers_waits_until_it_is_made_active():
    model = adapted(MLP_KIND, target_modules=["first"])
    before = logits(model, MLP_KIND.batch())
    add(model, MLP_KIND, "second", target_modules=["second"])
    assert torch.equal(logits(model, MLP_KIND.batch()), before)

    def trained() -> set[str]:
        return {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad and "mora_" in name}

    assert trained() == {"default"}
    model.set_adapter("second")
    assert trained() == {"second"} and not torch.equal(logits(model, MLP_KIND.batch()), before)


@every_kind
def test_deleting_the_active_adapter_leaves_the_other(kind):
    model = adapted(kind)
    add(model, kind, "second")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert all(layer.active_adapters == ["second"] for layer in layers(model))


@pytest.mark.parametrize("kind", [LLAMA, MLP_KIND], ids=lambda kind: kind.name)
def test_two_active_adapters_add_up_merged_or_not(kind):
    model = adapted(kind)
    add(model, kind, "second", operator="sharing")
    model.base_model.set_adapter(["default", "second"])
    before = logits(model, kind.batch())
    for layer in layers(model):
        x = torch.randn(2, layer.in_features)
        total = layer.get_delta_weight("default") + layer.get_delta_weight("second")
        with torch.no_grad():
            assert close(layer(x), layer.base_layer(x) + x @ total.T)
    model.merge_adapter()
    assert layers(model)[0].merged_adapters == ["default", "second"]
    assert close(logits(model, kind.batch()), before)


@every_kind
def test_a_mixed_batch_takes_each_samples_own_adapter(kind):
    model = adapted(kind, modules_to_save=kind.modules_to_save)
    add(model, kind, "second", operator="sharing", modules_to_save=kind.modules_to_save)
    with torch.no_grad():  # heads of their own, so that a batch that mixes them up shows
        for name, parameter in model.named_parameters():
            if "modules_to_save.second" in name:
                parameter.add_(0.5)
    separate = {}
    with model.disable_adapter():
        separate["__base__"] = logits(model, kind.batch())
    for name in ("default", "second"):
        model.set_adapter(name)
        separate[name] = logits(model, kind.batch())
    names = ["second", "__base__", "default"]
    mixed = logits(model, kind.batch(), adapter_names=names)
    for row, name in enumerate(names):
        assert close(mixed[row], separate[name][row]), name
    # The hooks are gone afterwards.
    model.set_adapter("default")
    assert torch.equal(logits(model, kind.batch()), separate["default"])


def test_a_mixed_batch_under_beam_search_generates_what_each_adapter_generates():
    model = adapted(LLAMA)
    add(model, LLAMA, "second", operator="sharing")
    arguments = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    names = ["second", "__base__", "default"]
    mixed = model.generate(**LLAMA.batch(), adapter_names=names, **arguments)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**LLAMA.batch(), **arguments)
        else:
            model.set_adapter(name)
            alone = model.generate(**LLAMA.batch(), **arguments)
        assert torch.equal(mixed[row], alone[row]), name


def test_a_mixed_batch_under_beam_search_knows_that_an_encoder_sees_each_sample_once():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(**sizes, initializer_factor=3.0, decoder_start_token_id=0)).eval()
    config = MoraConfig(r=2, init_weights=False, target_modules=["q", "v", "wi", "wo"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, config).eval()
    model.add_adapter("second", MoraConfig(**{**config.to_dict(), "peft_type": None, "operator": "sharing"}))
    arguments = {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    names = ["second", "default", "second"]
    mixed = model.generate(**LLAMA.batch(), adapter_names=names, **arguments)
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = model.generate(**LLAMA.batch(), **arguments)
    assert not torch.equal(alone["default"], alone["second"])
    assert all(torch.equal(mixed[row], alone[name][row]) for row, name in enumerate(names))


def test_mixed_batches_refuse_what_they_cannot_do():
    model = adapted(LLAMA)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        logits(model, LLAMA.batch(), adapter_names=["default", "nobody", "default"])
    with pytest.raises(ValueError, match="same as the number of inputs, but got 2 and 3"):
        logits(model, LLAMA.batch(), adapter_names=["default", "default"])
    with pytest.raises(ValueError, match="training mode"):
        logits(model.train(), LLAMA.batch(), adapter_names=["default"] * 3)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        logits(model, LLAMA.batch(), adapter_names=["default"] * 3)


@every_kind
def test_modules_to_save_are_trained_saved_and_loaded(kind, tmp_path):
    model = adapted(kind, modules_to_save=kind.modules_to_save)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                assert parameter.requires_grad
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.model(), tmp_path).eval()
    assert same(logits(loaded, kind.batch()), logits(model, kind.batch()))
    with model.disable_adapter():
        assert close(logits(model, kind.batch()), logits(kind.model(), kind.batch()))


def train(model: nn.Module, batch: dict[str, torch.Tensor], steps: int = 4) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        output = model(**batch)
        loss = getattr(output, "logits", output).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@every_kind
@every_operator
def test_training_then_reloading_gives_the_same_logits(kind, operator, tmp_path):
    model = get_peft_model(kind.model(), MoraConfig(r=3, operator=operator, dropout=0.1, **kind.config))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, kind.batch(), steps=5)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert all(torch.count_nonzero(layer.mora_M["default"]) for layer in layers(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind.model(), tmp_path).eval()
    assert same(logits(loaded, kind.batch()), logits(model, kind.batch()))


def test_dropout_acts_on_the_input_in_training_alone():
    model = adapted(MLP_KIND, dropout=0.5)
    layer, x = layers(model)[0], torch.randn(64, 10)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
        model.train()
        torch.manual_seed(0)
        noisy = layer(x)
        torch.manual_seed(0)
        mask = Mask.drawn(0.5)
        dropped = x * mask.of(x.shape, x) * mask.scale
        assert close(noisy, layer.base_layer(x) + dropped @ layer.get_delta_weight("default").T)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_keep_fp32_adapters_unless_asked(kind, dtype):
    def made(autocast: bool) -> PeftModel:
        config = MoraConfig(r=3, init_weights=False, **kind.config)
        model = get_peft_model(kind.model().to(dtype), config, autocast_adapter_dtype=autocast).eval()
        with torch.no_grad():
            for layer in layers(model):  # values that the base's dtype can't hold, where M is fp32
                layer.mora_M["default"].mul_(0.3)
        return model

    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in kind.batch().items()}
    for autocast, adapter_dtype in ((True, torch.float32), (False, dtype)):
        model = made(autocast)
        assert {layer.mora_M["default"].dtype for layer in layers(model)} == {adapter_dtype}
        before = logits(model, batch)
        assert before.dtype == dtype and torch.isfinite(before).all()
        weight = layers(model)[0].get_base_layer().weight.clone()
        expected = (weight.float() + layers(model)[0].get_delta_weight("default").float()).to(dtype)
        model.merge_adapter()
        assert torch.equal(layers(model)[0].get_base_layer().weight, expected)  # rounded once
        model.unmerge_adapter()
        model.merge_adapter(safe_merge=True)
        assert layers(model)[0].get_base_layer().weight.dtype == dtype


@every_kind
def test_autocast_runs_forward_and_backward(kind):
    model = adapted(kind)
    full = logits(model, kind.batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**kind.batch())
        loss = getattr(output, "logits", output).float().pow(2).mean()
    loss.backward()
    assert all(layer.mora_M["default"].grad.dtype == torch.float32 for layer in layers(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (logits(model, kind.batch()).float() - full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize("kind", [LLAMA, GPT2, BERT], ids=lambda kind: kind.name)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = adapted(kind).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**kind.batch()).logits.pow(2).mean().backward()
        return [layer.mora_M["default"].grad for layer in layers(model)]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert torch.count_nonzero(plain) and close(plain, checkpointed)


@every_kind
def test_a_deep_copy_is_a_model_of_its_own(kind):
    model = adapted(kind)
    before = logits(model, kind.batch())
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone, kind.batch()), before)
    train(clone, kind.batch())
    assert torch.equal(logits(model, kind.batch()), before)
    assert not close(logits(clone, kind.batch()), before)


@every_kind
@every_operator
def test_a_weighted_adapter_has_the_weighted_update(kind, operator):
    no_heads = {"task_type": None}  # with a task type, PEFT gives each adapter a classifier of its own
    model = adapted(kind, operator=operator, **no_heads)
    add(model, kind, "second", operator=operator, **no_heads)
    model.add_weighted_adapter(["default", "second"], [0.25, -2.0], "sum")
    for layer in layers(model):
        expected = 0.25 * layer.get_delta_weight("default") - 2.0 * layer.get_delta_weight("second")
        assert close(layer.get_delta_weight("sum"), expected)
        assert not layer.mora_M["sum"].requires_grad
    model.set_adapter("sum")
    assert not close(logits(model, kind.batch()), logits(kind.model(), kind.batch()))


def test_a_weighted_adapter_refuses_what_has_no_meaning():
    model = adapted(MLP_KIND)
    add(model, MLP_KIND, "sharing", operator="sharing")
    with pytest.raises(ValueError, match="combination_type='linear' alone, got 'svd'"):
        model.add_weighted_adapter(["default"], [1.0], "x", combination_type="svd")
    with pytest.raises(ValueError, match="same `operator`"):
        model.add_weighted_adapter(["default", "sharing"], [1.0, 1.0], "x")
    with pytest.raises(ValueError, match="nobody not found; there are default, sharing"):
        model.add_weighted_adapter(["default", "nobody"], [1.0, 1.0], "x")
    with pytest.raises(ValueError, match="One weight for each"):
        model.add_weighted_adapter(["default"], [1.0, 1.0], "x")
    assert list(model.peft_config) == ["default", "sharing"]
    # The live groups count, also where the configurations agree.
    model = adapted(MLP_KIND, operator="sharing")
    add(model, MLP_KIND, "second", operator="sharing")
    layers(model)[1].set_grouping("second", "blocked", "strided")
    with pytest.raises(ValueError, match="same layers, sizes and groups"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "x")
    # Two classifiers have no weighted sum; PEFT refuses it for LoRA as well.
    model = adapted(BERT)
    add(model, BERT, "second")
    with pytest.raises(ValueError, match="same module with modules_to_save, as default, second do"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "x")


def test_a_weighted_adapter_keeps_the_dtype_on_a_half_precision_base(tmp_path):
    config = MoraConfig(r=3, init_weights=False, **MLP_KIND.config)
    model = get_peft_model(MLP_KIND.model().bfloat16(), config)
    model.add_weighted_adapter(["default"], [0.1], "tenth")
    layer = layers(model)[0]
    assert layer.mora_M["tenth"].dtype == torch.float32
    assert close(layer.mora_M["tenth"], 0.1 * layer.mora_M["default"], atol=1e-7)
    model.save_pretrained(tmp_path, selected_adapters=["tenth"])
    assert (tmp_path / "tenth" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@every_operator
def test_a_layer_compiles_without_a_graph_break(operator):
    layer = layers(adapted(MLP_KIND, operator=operator, in_grouping="blocked"))[1]
    x = torch.randn(5, layer.in_features)
    compiled = torch.compile(layer, fullgraph=True)(x)  # before anything that a first call keeps
    assert close(compiled, layer(x))
    expected, ours = (torch.autograd.grad(y.pow(2).sum(), layer.mora_M["default"])[0] for y in (layer(x), compiled))
    assert close(ours, expected)


@pytest.mark.slow
def test_a_compiled_model_computes_the_same():
    model = adapted(LLAMA)
    output = torch.compile(model)(**LLAMA.batch()).logits
    assert close(output, logits(model, LLAMA.batch()))
    output.pow(2).mean().backward()
    compiled = [layer.mora_M["default"].grad.clone() for layer in layers(model)]
    model.zero_grad()
    model(**LLAMA.batch()).logits.pow(2).mean().backward()
    for ours, plain in zip(compiled, [layer.mora_M["default"].grad for layer in layers(model)], strict=True):
        assert close(ours, plain)


def test_linear_and_conv1d_of_the_same_weights_compute_the_same():
    model = adapted(GPT2)
    conv = next(layer for layer in layers(model) if layer.in_features != layer.out_features)
    plain = nn.Linear(conv.in_features, conv.out_features)
    with torch.no_grad():
        plain.weight.copy_(conv.get_base_layer().weight.T)
        plain.bias.copy_(conv.get_base_layer().bias)
    twin = Linear(plain, "default", MoraConfig(r=3), r=3)
    with torch.no_grad():
        twin.mora_M["default"].copy_(conv.mora_M["default"])
        x = torch.randn(4, conv.in_features)
        assert close(twin(x), conv(x))
    assert torch.equal(twin.get_delta_weight("default"), conv.get_delta_weight("default").T)


def test_conv1d_is_recognised_and_said():
    with pytest.warns(UserWarning, match="fan_in_fan_out=True, as layers of type Conv1D need"):
        get_peft_model(GPT2.model(), MoraConfig(r=2, target_modules=["c_fc"]))
    with pytest.warns(UserWarning, match="fan_in_fan_out=False, as layers of type Linear need"):
        get_peft_model(MLP_KIND.model(), MoraConfig(r=2, fan_in_fan_out=True, target_modules=["first"]))


def test_biases_stay_untouched():
    model = adapted(MLP_KIND)
    bias = layers(model)[0].get_base_layer().bias.clone()
    train(model, MLP_KIND.batch())
    model.merge_adapter()
    assert torch.equal(layers(model)[0].get_base_layer().bias, bias)


def test_all_linear_leaves_the_output_layer_out():
    names = {name.split(".")[-1] for name, m in adapted(LLAMA).named_modules() if isinstance(m, MoraLayer)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_default_targets_are_those_of_lora():
    model = get_peft_model(LLAMA.model(), MoraConfig(r=2))
    assert {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, MoraLayer)} == {
        "q_proj",
        "v_proj",
    }


def test_rank_pattern_and_layers_to_transform():
    model = adapted(LLAMA, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 1}, layers_to_transform=[1])
    assert [layer.r["default"] for layer in layers(model)] == [3, 1]


def test_an_r_too_large_names_the_layer_its_size_and_the_largest_r():
    with pytest.raises(ValueError) as caught:
        get_peft_model(MLP_KIND.model(), MoraConfig(r=8, target_modules=["first"]))
    said = str(caught.value)
    # sqrt((10 + 24) * 8) = 16.5: 16 rows, and 10 fit; sqrt(34 * 3) = 10.1 fits, sqrt(34 * 4) = 11.7 does not.
    for words in (
        "r=8",
        "first",
        "10 inputs",
        "24 outputs",
        "16 rows",
        "10 fit",
        "largest r that fits is 3",
        "cap=True",
    ):
        assert words in said
    get_peft_model(MLP_KIND.model(), MoraConfig(r=3, target_modules=["first"]))


def test_cap_takes_the_largest_m_with_a_warning_and_survives_saving(tmp_path):
    with pytest.warns(UserWarning, match=r"r=8 is too large for first \(M of 10 instead of 16 rows\): there M"):
        model = get_peft_model(
            MLP_KIND.model(), MoraConfig(r=8, cap=True, init_weights=False, target_modules=["first"])
        ).eval()
    assert layers(model)[0].mora_M["default"].shape == (10, 10)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="M of 10 instead of 16 rows"):
        loaded = PeftModel.from_pretrained(MLP_KIND.model(), tmp_path).eval()
    assert same(logits(loaded, MLP_KIND.batch()), logits(model, MLP_KIND.batch()))


def test_all_layers_that_are_capped_get_one_warning():
    with pytest.warns(UserWarning) as caught:
        get_peft_model(LLAMA.model(), MoraConfig(r=100, cap=True, **LLAMA.config))
    [said] = [str(warning.message) for warning in caught if "cap=True" in str(warning.message)]
    assert "and 13 more" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(LLAMA.model(), MoraConfig(r=1, cap=True, **LLAMA.config))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"r": 0}, "`r` should be a positive rank, got 0"),
        ({"r": "8"}, "`r` should be a positive rank, got '8'"),
        ({"r": 2.5}, "`r` should be a positive rank, got 2.5"),
        ({"r": 2, "rank_pattern": {"up": -1}}, "`up` should be a positive rank"),
        ({"operator": "rotate"}, "Did you mean 'rotation'"),
        ({"dropout": 1.0}, "`dropout` should be at least 0 and below 1"),
        ({"in_grouping": "odd"}, "'strided' or 'blocked', got 'odd'"),
        ({"target_modules": ".*q", "layers_to_transform": [1]}, "`layers_to_transform` cannot be used"),
    ],
)
def test_wrong_configurations_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        MoraConfig(**arguments)


def test_a_layer_that_is_not_supported_is_named_with_those_that_are():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"can't adapt 0, of type Embedding; it adapts torch.nn.Linear.*Conv1D"):
        get_peft_model(model, MoraConfig(r=1, target_modules=["0"]))
    # Its weight is read without a call of the layer: an adapter would do nothing.
    with pytest.raises(TypeError, match=r"can't adapt self_attn.out_proj, of type NonDynamicallyQuantizableLinear"):
        get_peft_model(nn.TransformerEncoderLayer(8, 2), MoraConfig(r=1, target_modules=["out_proj"]))


def test_a_layer_that_no_m_fits_is_said():
    with pytest.raises(ValueError, match=r"No M fits 0 \(5 inputs, 1 outputs\): operator='rotation' needs at least 2"):
        get_peft_model(nn.Sequential(nn.Linear(5, 1)), MoraConfig(r=1, cap=True, target_modules=["0"]))
    get_peft_model(nn.Sequential(nn.Linear(5, 1)), MoraConfig(r=1, operator="sharing", cap=True, target_modules=["0"]))


def test_a_model_can_be_adapted_after_an_r_that_was_too_large():
    model = MLP_KIND.model()
    base = logits(model, MLP_KIND.batch())
    with pytest.raises(ValueError, match="r=50 is too large for second"):
        get_peft_model(model, MoraConfig(r=3, rank_pattern={"second": 50}, **MLP_KIND.config))
    model = get_peft_model(model, MoraConfig(r=3, **MLP_KIND.config)).eval()
    assert len(layers(model)) == 2 and torch.equal(logits(model, MLP_KIND.batch()), base)


def test_groups_change_on_a_live_adapter_and_m_starts_again():
    model = adapted(MLP_KIND, operator="sharing")
    layer = layers(model)[1]
    before = layer.get_delta_weight("default")
    layer.set_grouping("default", "blocked", "strided")
    assert not close(layer.get_delta_weight("default"), before)
    layer.set_grouping("default", "strided", "strided")
    assert torch.equal(layer.get_delta_weight("default"), before)
    layer.merge()
    with pytest.raises(ValueError, match="merged; unmerge it"):
        layer.set_grouping("default", "blocked", "blocked")
    layer.unmerge()
    layer.reset_mora_parameters("default")
    assert torch.count_nonzero(layer.get_delta_weight("default")) == 0
    with pytest.raises(ValueError, match="only 'sharing' has"):
        layers(adapted(MLP_KIND))[0].set_grouping("default", "blocked", "blocked")


def test_new_groups_reach_all_layers_and_the_saved_adapter(tmp_path):
    model = adapted(LLAMA, operator="sharing")
    before = logits(model, LLAMA.batch())
    model.set_grouping("default", "blocked", "strided")
    after = logits(model, LLAMA.batch())
    assert not close(before, after)
    assert {layer.mora_layout["default"].in_grouping for layer in layers(model)} == {"blocked"}
    model.save_pretrained(tmp_path)
    assert same(logits(PeftModel.from_pretrained(LLAMA.model(), tmp_path).eval(), LLAMA.batch()), after)
    model.reset_mora_parameters("default")
    assert torch.equal(logits(model, LLAMA.batch()), logits(LLAMA.model(), LLAMA.batch()))
    model.reset_mora_parameters("default", init_weights=False)
    assert all(torch.count_nonzero(layer.mora_M["default"]) for layer in layers(model))


def test_new_groups_change_nothing_where_they_are_refused():
    model = adapted(MLP_KIND, operator="sharing")
    layers(model)[1].merge()
    with pytest.raises(ValueError, match="merged; unmerge it"):
        model.set_grouping("default", "blocked", "blocked")
    layers(model)[1].unmerge()
    with pytest.raises(ValueError, match="got 'bloked'"):
        model.set_grouping("default", "bloked", "blocked")
    with pytest.raises(ValueError, match="'nobody' not found; there are default"):
        model.set_grouping("nobody", "blocked", "blocked")
    assert {layer.mora_layout["default"].in_grouping for layer in layers(model)} == {"strided"}
    assert model.peft_config["default"].in_grouping == "strided"


def test_merging_and_starting_again_with_other_groups_adds_up(tmp_path):
    """ReMoRA's cycle: merge, zero M, change the groups; the function goes on from where it was."""
    model = adapted(LLAMA, operator="sharing")
    before = logits(model, LLAMA.batch())
    model.merge_adapter()
    for layer in layers(model):
        layer.merged_adapters.clear()  # what was merged stays in the base
    model.reset_mora_parameters("default")
    model.set_grouping("default", "blocked", "blocked")
    assert close(logits(model, LLAMA.batch()), before)
    first = [layer.get_base_layer().weight.clone() for layer in layers(model)]
    train(model, LLAMA.batch())
    trained = logits(model, LLAMA.batch())
    assert not close(trained, before)
    assert all(torch.equal(layer.get_base_layer().weight, w) for layer, w in zip(layers(model), first))
    assert close(logits(model.merge_and_unload(), LLAMA.batch()), trained)


def test_an_adapter_of_an_unregistered_operator_says_how_to_load_it(tmp_path):
    saved = adapted(MLP_KIND)
    saved.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"rotation"', '"somebodys"'))
    with pytest.raises(ValueError, match=r"'somebodys'.*registered before .* loaded: mora.register_operator"):
        PeftModel.from_pretrained(MLP_KIND.model(), tmp_path)


@pytest.mark.parametrize("kind", [LLAMA, GPT2, MLP_KIND], ids=lambda kind: kind.name)
def test_peft_converts_the_update_to_lora(kind):
    model = adapted(kind)
    expected = logits(model, kind.batch())
    config, state = convert_to_lora(model, rank=1.0, progressbar=False)  # all singular values
    config.fan_in_fan_out = kind is GPT2
    lora = get_peft_model(kind.model(), config).eval()
    set_peft_model_state_dict(lora, state)
    assert close(logits(lora, kind.batch()), expected, atol=1e-3)


def test_transformers_own_adapter_methods_take_mora(tmp_path):
    model = LLAMA.model()
    model.add_adapter(MoraConfig(r=3, init_weights=False, target_modules=["q_proj"]))
    assert len(layers(model)) == 2
    model.save_pretrained(tmp_path)
    loaded = LLAMA.model()
    loaded.load_adapter(str(tmp_path))
    assert same(logits(loaded, LLAMA.batch()), logits(model, LLAMA.batch()))
    assert not close(logits(loaded, LLAMA.batch()), logits(LLAMA.model(), LLAMA.batch()))


def test_peft_knows_the_method():
    assert PeftType.MORA == "MORA" and PeftType("MORA") is PeftType.MORA is PeftType["MORA"]
    assert list(PeftType).count(PeftType.MORA) == 1
    assert pickle.loads(pickle.dumps(PeftType.MORA)) is PeftType.MORA
    config = copy.deepcopy(MoraConfig(r=3))
    assert config.peft_type is PeftType.MORA and get_peft_config({"peft_type": "MORA", "r": 5}).r == 5
    status = adapted(LLAMA).get_model_status()
    assert (status.adapter_model_type, status.peft_types) == ("MoraModel", {"default": "MORA"})


def test_a_mora_of_pefts_own_is_not_taken_over(monkeypatch):
    monkeypatch.delattr(PeftType.MORA, "added_by_mora")  # as PEFT's member would be
    with pytest.raises(ImportError, match="has a method MORA of its own"):
        add_peft_type()


def test_a_registered_operator_trains_saves_and_loads(tmp_path):
    register_operator(
        Operator(
            "test_last",
            lambda x, la: x[..., -la.size :],
            lambda y, la: nn.functional.pad(y, (la.out_features - la.size, 0)),
        ),
        overwrite=True,
    )
    model = get_peft_model(MLP_KIND.model(), MoraConfig(r=2, operator="test_last", target_modules=["second"]))
    train(model, MLP_KIND.batch())
    before = logits(model, MLP_KIND.batch())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP_KIND.model(), tmp_path).eval()
    assert same(logits(loaded, MLP_KIND.batch()), before)
    assert close(logits(loaded.merge_and_unload(), MLP_KIND.batch()), before)


@every_operator
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_merging_keeps_the_function(operator, dtype):
    model = adapted(LLAMA, operator=operator).to("cuda", dtype)
    batch = {name: value.cuda() for name, value in LLAMA.batch().items()}
    before = logits(model, batch).float()
    model.merge_adapter()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1 * before.abs().max().item()
    assert (logits(model, batch).float() - before).abs().max() < tolerance
