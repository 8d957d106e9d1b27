"""Houlsby's adapters: the equation, and what PEFT promises of a tuner."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mora_repro.methods.houlsby import HoulsbyConfig, Linear

IDS = torch.arange(10)[None]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def adapted(**arguments) -> PeftModel:
    """With random weights everywhere, so that the adapters matter."""
    model = get_peft_model(llama(), HoulsbyConfig(bottleneck=3, task_type="CAUSAL_LM", **arguments)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def test_a_layer_computes_the_equation():
    torch.manual_seed(0)
    base = nn.Linear(5, 7)
    layer = Linear(base, "default", HoulsbyConfig(bottleneck=2))
    x = torch.randn(4, 5)
    y = x @ base.weight.T + base.bias
    assert torch.equal(layer(x), base(x))  # unchanged at the start
    down, up = layer.houlsby_down["default"], layer.houlsby_up["default"]
    for parameter in (down.weight, down.bias, up.weight, up.bias):
        nn.init.normal_(parameter)
    hidden = y @ down.weight.T + down.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    assert torch.allclose(layer(x), y + hidden @ up.weight.T + up.bias, atol=1e-5)


def test_adapters_stand_behind_attention_and_feed_forward_and_start_without_effect():
    base = llama()(IDS).logits
    model = get_peft_model(llama(), HoulsbyConfig(bottleneck=3, task_type="CAUSAL_LM")).eval()
    assert torch.equal(model(IDS).logits, base)
    places = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    assert [name.split(".")[-1] for name in places] == ["o_proj", "down_proj"] * 2
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 2 * (2 * 16 * 3 + 3 + 16)


def test_a_step_changes_the_adapters_alone():
    model = get_peft_model(llama(), HoulsbyConfig(bottleneck=3, task_type="CAUSAL_LM"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # in the first, only `up` has a gradient
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("houlsby_" not in name), name


def test_save_and_load(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert loaded.peft_config["default"].bottleneck == 3
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_disable_switch_and_unload():
    base = llama()(IDS).logits
    model = adapted()
    first = model(IDS).logits
    assert not torch.allclose(first, base)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base)
    model.add_adapter("other", HoulsbyConfig(bottleneck=5, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    assert torch.equal(model(IDS).logits, base)
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)
    assert torch.equal(model.unload()(IDS).logits, base)


def test_merging_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="not linear"):
        adapted().merge_and_unload()


def test_a_bfloat16_base_stays_bfloat16():
    model = get_peft_model(llama().bfloat16(), HoulsbyConfig(bottleneck=3, task_type="CAUSAL_LM"))
    assert model(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("bottleneck", [0, "as_lora"])
def test_a_bottleneck_is_a_positive_width(bottleneck):
    with pytest.raises(ValueError, match="bottleneck"):
        HoulsbyConfig(bottleneck=bottleneck)


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="got Embedding"):
        get_peft_model(llama(), HoulsbyConfig(target_modules=["embed_tokens"]))
