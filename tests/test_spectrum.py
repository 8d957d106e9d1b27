"""How many singular values of a run's update are above 0.1 (Figure 5)."""

import json
import shutil

import pytest
import torch
from run_outcome import only_record
from safetensors.torch import load_file
from tiny import TINY
from transformers import LlamaConfig, LlamaForCausalLM

from mora_repro.spectrum import spectrum_between

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_the_update_is_counted_by_kind_and_layer_without_embeddings_and_head():
    torch.manual_seed(0)
    before = LlamaForCausalLM(LlamaConfig(vocab_size=32, **SHAPE))
    after = LlamaForCausalLM(before.config)
    after.load_state_dict(before.state_dict())
    left, _ = torch.linalg.qr(torch.randn(24, 3))
    right, _ = torch.linalg.qr(torch.randn(16, 3))
    with torch.no_grad():
        after.model.layers[1].mlp.up_proj.weight += left @ torch.diag(torch.tensor([1.0, 0.11, 0.09])) @ right.T
        after.lm_head.weight += 1.0
        after.model.embed_tokens.weight += 1.0
    above = spectrum_between(before, after).above
    assert above.pop("up_proj") == [0, 2]
    assert sorted(above) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    assert all(counts == [0, 0] for counts in above.values())


@pytest.fixture
def trained(command_here, tmp_path):
    """Trains with a rate that makes an update of some size, and returns the run's record."""

    def train(*overrides: str):
        command_here("train.py", *TINY, *overrides, "r=2", "lr=0.1", f"out={tmp_path}")
        return only_record(tmp_path)

    return train


def test_lora_has_the_spectrum_of_its_product_and_the_record_gets_it(trained, command_here, tmp_path):
    record = trained("method=lora")
    done = command_here("scripts/spectrum.py", f"run={record.id}", f"out={tmp_path}")
    found = only_record(tmp_path)
    folder = tmp_path / "work" / record.id / "model"
    scaling = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] / 2
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, counts in found.spectrum.above.items():
        [a] = [value for key, value in tensors.items() if f"{name}.lora_A" in key]
        [b] = [value for key, value in tensors.items() if f"{name}.lora_B" in key]
        product = scaling * b.double() @ a.double()
        assert counts == [int((torch.linalg.svdvals(product) > 0.1).sum())] and counts[0] > 0
    assert 0 < found.metrics["singular_values"] <= 2  # its rank
    assert f"mean {found.metrics['singular_values']:.1f}" in done.stdout
    assert found.model_copy(update={"spectrum": None, "metrics": record.metrics}) == record


def test_relora_is_counted_over_all_its_updates(trained, command_here, tmp_path):
    record = trained("method=relora", "method.merge.every=4", "method.merge.restart_warmup=1")
    command_here("scripts/spectrum.py", f"run={record.id}", f"out={tmp_path}")
    assert only_record(tmp_path).metrics["singular_values"] > 2  # more than one update's rank


def test_what_can_not_be_counted_says_why(trained, command_here, tmp_path):
    run = trained("method=prompt_tuning").id
    shutil.copytree(tmp_path / "runs", tmp_path / "kept" / "runs")
    for arguments, words in [
        ([f"out={tmp_path}"], "which runs? run=<id>"),
        ([f"out={tmp_path}", "table=figure5"], "sweep.py table=figure5 scale=mini"),
        ([f"out={tmp_path}", f"run={run}"], "changes no weight"),
        ([f"out={tmp_path / 'kept'}", f"run={run}"], "records are kept without them"),
        ([f"out={tmp_path}", "run=lora"], "no record of that name"),
    ]:
        done = command_here("scripts/spectrum.py", *arguments, check=False)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
