"""Base models from every source, methods on top of them, and parameter counts at full size."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from mora_repro.errors import UserError
from mora_repro.methods import (
    apply_method,
    computes_in_bf16,
    count_parameters,
    load_base,
    load_tokenizer,
    on_meta_device,
)
from mora_repro.spec import RunSpec, compose_config


def spec(*overrides: str) -> RunSpec:
    return RunSpec.from_config(compose_config(["scale=mini", *overrides]))


@pytest.fixture
def llama_folder(tmp_path):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_local_folder_is_loaded_as_it_is(llama_folder):
    run = spec("model=hf", f"model.pretrained={llama_folder}", "method=lora", "r=2")
    tokenizer = load_tokenizer(run)
    model = load_base(run, tokenizer, None)
    saved = LlamaForCausalLM.from_pretrained(llama_folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
    assert tokenizer("ab", add_special_tokens=False).input_ids == [100, 101]


def test_a_model_that_is_no_causal_lm_is_refused(tmp_path):
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    run = spec("model=hf", f"model.pretrained={tmp_path / 'bert'}", "model.tokenizer=bytes")
    with pytest.raises(UserError, match=r"BertForMaskedLM, no causal language model.*model=mini"):
        load_base(run, load_tokenizer(run), None)


@pytest.mark.parametrize("load", [lambda run: load_tokenizer(run), lambda run: load_base(run, None, None)])
def test_a_model_that_is_not_there_says_how_to_get_it(load):
    with pytest.raises(UserError, match=r"nobody/nothing.*hf auth login.*model.pretrained=<folder>"):
        load(spec("model=hf", "model.pretrained=nobody/nothing"))


def test_a_folder_that_is_not_there_is_not_taken_for_a_hub_id():
    with pytest.raises(UserError, match="folder /nowhere is not there"):
        load_tokenizer(spec("model=hf", "model.pretrained=/nowhere"))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}.*can't be loaded"):
        load_base(spec("model=hf", f"model.pretrained={tmp_path}"), None, None)


def test_a_model_from_scratch_is_a_function_of_the_seed():
    run = spec("method=fft")
    tokenizer = load_tokenizer(run)

    def made(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return load_base(run, tokenizer, None).model.layers[0].mlp.up_proj.weight

    assert torch.equal(made(1), made(1)) and not torch.equal(made(1), made(2))


@pytest.mark.parametrize("method", ["lora", "mora"])
def test_an_adapter_leaves_the_function_of_the_base_unchanged_and_trains_all_linear_layers(method):
    run = spec(f"method={method}", "r=4")
    tokenizer = load_tokenizer(run)
    base = load_base(run, tokenizer, None).eval()
    ids = torch.arange(20)[None]
    before = base(ids).logits
    model = apply_method(base, run).eval()
    assert torch.equal(model(ids).logits, before)
    trained = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad and "mlp" in name}
    modules = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in modules)
    for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert any(layer in name for name in modules), trained


def test_llama_7b_has_the_parameters_that_the_literature_reports():
    model = on_meta_device(spec("scale=paper", "method=fft"))
    assert count_parameters(model)[1] == 6_738_415_616
    lora = count_parameters(apply_method(on_meta_device(r := spec("scale=paper", "method=lora", "r=8")), r))[0]
    mora = count_parameters(apply_method(on_meta_device(r := spec("scale=paper", "method=mora", "r=8")), r))[0]
    assert lora == 19_988_480
    assert abs(mora / lora - 1) < 0.02


def test_peft_arguments_that_do_not_exist_are_a_user_error():
    run = spec("method=lora", "r=4", "+method.peft.alpha=3")
    with pytest.raises(UserError, match="method=lora"):
        apply_method(load_base(run, load_tokenizer(run), None), run)


def test_a_damaged_model_is_named(llama_folder):
    [weights] = llama_folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    run = spec("model=hf", f"model.pretrained={llama_folder}", "method=lora", "r=2")
    with pytest.raises(UserError, match=f"{llama_folder} can't be loaded"):
        load_base(run, load_tokenizer(run), None)


def test_modules_that_can_not_be_adapted_are_a_user_error():
    run = spec("method=mora", "r=4", "method.peft.target_modules=[embed_tokens]")
    with pytest.raises(UserError, match=r"can't adapt model\.embed_tokens, of type Embedding"):
        apply_method(load_base(run, load_tokenizer(run), None), run)


def test_lists_and_dictionaries_reach_peft_as_such_and_can_be_saved(tmp_path):
    run = spec(
        "method=mora",
        "r=4",
        "method.peft.target_modules=[q_proj,v_proj]",
        "+method.peft.rank_pattern={v_proj: 2}",
        "+method.peft.modules_to_save=[lm_head]",
    )
    model = apply_method(load_base(run, load_tokenizer(run), None), run)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert model.peft_config["default"].rank_pattern == {"v_proj": 2}


def test_mini_is_computed_in_fp32_also_on_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    assert not computes_in_bf16(spec("method=lora")) and computes_in_bf16(spec("method=lora", "scale=paper"))


def test_unknown_target_modules_are_a_user_error():
    run = spec("method=lora", "r=4", "method.peft.target_modules=[query]")
    with pytest.raises(UserError, match="query"):
        apply_method(load_base(run, load_tokenizer(run), None), run)
