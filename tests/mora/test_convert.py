"""Checkpoints of the authors' code: the converted adapter computes what their formula computes."""

import json
import math
import subprocess
import sys

import dense
import pytest
import torch
from models import MLP_KIND, logits
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mora.convert import ConversionError, convert, main

# mora_type: groups of the input, groups of the output (None: rotation); facts of the authors' code.
TYPES = {
    1: ("strided", "strided"),
    2: ("blocked", "blocked"),
    3: ("blocked", "strided"),
    4: ("strided", "blocked"),
    6: None,
}
SHAPES = {"first": (10, 24), "second": (24, 18)}


def checkpoint(folder, mora_type=1, r=3, copies=("lora_A", "lora_B"), **config):
    """Write what the authors' save_pretrained writes for the MLP, then `config` over it; returns M by module."""
    generator = torch.Generator().manual_seed(mora_type)
    matrices, state = {}, {}
    for name, (k, d) in SHAPES.items():
        size = int(math.sqrt((k + d) * r) + 0.5)
        size -= size % 2 if mora_type == 6 else 0
        matrices[name] = torch.randn(size, size, generator=generator)
        for copy in copies:
            state[f"base_model.model.{name}.{copy}.weight"] = matrices[name].clone()
    values = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": ["first", "second"],
        "use_mora": True,
        "mora_type": mora_type,
        "use_dora": False,
        **config,
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(state, folder / "adapter_model.safetensors")
    return matrices


@pytest.mark.parametrize("mora_type", TYPES)
@pytest.mark.parametrize("copies", [("lora_A", "lora_B"), ("lora_A",), ("lora_B",)])
def test_a_converted_adapter_computes_the_same_function(tmp_path, mora_type, copies):
    matrices = checkpoint(tmp_path / "in", mora_type, copies=copies)
    convert(tmp_path / "in", tmp_path / "out")
    converted = PeftModel.from_pretrained(MLP_KIND.model(), tmp_path / "out").eval()
    expected = MLP_KIND.model()
    for name, (k, d) in SHAPES.items():
        operator = "rotation" if TYPES[mora_type] is None else "sharing"
        delta = dense.delta_weight(operator, matrices[name], k, d, TYPES[mora_type] or ("strided", "strided"))
        getattr(expected, name).weight.data += delta
    ours, theirs = logits(converted, MLP_KIND.batch()), logits(expected, MLP_KIND.batch())
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, logits(MLP_KIND.model(), MLP_KIND.batch()), atol=1e-2)


def test_the_configuration_is_carried_over(tmp_path):
    checkpoint(tmp_path / "in", 6, task_type="CAUSAL_LM", base_model_name_or_path="some/base", layers_pattern=None)
    config = convert(tmp_path / "in", tmp_path / "out")
    assert (config.r, config.operator, config.dropout) == (3, "rotation", 0.05)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["task_type"] == "CAUSAL_LM" and saved["base_model_name_or_path"] == "some/base"
    assert sorted(saved["target_modules"]) == ["first", "second"] and "lora_alpha" not in saved


def test_a_pickled_checkpoint_is_read_as_tensors_alone(tmp_path):
    checkpoint(tmp_path / "in")
    weights = tmp_path / "in" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "in" / "adapter_model.bin")
    weights.unlink()
    convert(tmp_path / "in", tmp_path / "out")
    torch.save({"x": torch.nn.Linear(1, 1)}, tmp_path / "in" / "adapter_model.bin")
    with pytest.raises(ConversionError, match="more than tensors"):
        convert(tmp_path / "in", tmp_path / "again")


def test_modules_to_save_stay(tmp_path):
    checkpoint(tmp_path / "in", modules_to_save=["head"])
    weights = tmp_path / "in" / "adapter_model.safetensors"
    state = load_file(weights)
    head = {"base_model.model.head.weight": torch.ones(3, 18), "base_model.model.head.bias": torch.ones(3)}
    save_file(state | head, weights)
    convert(tmp_path / "in", tmp_path / "out")
    model = PeftModel.from_pretrained(MLP_KIND.model(), tmp_path / "out")
    assert torch.equal(model.base_model.model.head.modules_to_save["default"].weight, torch.ones(3, 18))


def change(state, name, value):
    state[f"base_model.model.first.{name}.weight"] = value
    return state


@pytest.mark.parametrize(
    ("config", "weights", "said"),
    [
        ({"mora_type": 5}, None, r"mora_type=5 is unknown; known types: 1 \(sharing\), 2 .*6 \(rotation\)"),
        ({"mora_type": [1]}, None, r"mora_type=\[1\] is unknown"),
        ({"mora_type": True}, None, "mora_type=True is unknown"),
        ({"r": 0}, None, "not valid: `r` should be a positive rank, got 0"),
        ({"r": "8"}, None, "not valid: `r` should be a positive rank, got '8'"),
        ({"rank_pattern": {"first": -1}}, None, "not valid: `first` should be"),
        ({"layer_replication": [[0, 1]]}, None, "layer_replication=.* has no counterpart"),
        (
            {},
            lambda state: state | {"base_model.model.e.lora_embedding_A": torch.zeros(2, 2)},
            "lora_embedding_A has no",
        ),
        ({"mora_type": 7}, None, r"mora_type=7 is unknown"),
        ({"use_mora": False}, None, "no use_mora=true"),
        ({"bias": "all"}, None, "only bias='none'"),
        ({"use_dora": True}, None, "only use_dora=False"),
        ({}, lambda state: change(state, "lora_B", torch.zeros(10, 10)), "lora_A and lora_B differ"),
        ({}, lambda state: change(state, "lora_A", torch.zeros(3, 10)), r"is \(3, 10\), and M is square"),
        ({}, lambda state: {"other": torch.zeros(1)}, "no lora_A and no lora_B"),
    ],
)
def test_what_cannot_be_converted_is_said_and_leaves_nothing(tmp_path, config, weights, said):
    checkpoint(tmp_path / "in")
    path = tmp_path / "in" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if weights:
        path = tmp_path / "in" / "adapter_model.safetensors"
        save_file(weights(load_file(path)), path)
    with pytest.raises(ConversionError, match=said):
        convert(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_fields_that_the_authors_leave_empty_are_no_obstacle(tmp_path):
    empty = {"layers_pattern": "", "layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {}}
    checkpoint(tmp_path / "in", 6, lora_dropout=None, layer_replication=None, use_rslora=False, **empty)
    config = convert(tmp_path / "in", tmp_path / "out")
    assert (config.dropout, config.layers_pattern, config.rank_pattern) == (0.0, None, {})


def test_the_ranks_of_single_layers_are_carried_over(tmp_path):
    checkpoint(tmp_path / "in", rank_pattern={"second": 2})
    weights = tmp_path / "in" / "adapter_model.safetensors"
    state = load_file(weights)
    for copy in ("lora_A", "lora_B"):
        state[f"base_model.model.second.{copy}.weight"] = torch.eye(9)  # sqrt((24 + 18) * 2) = 9.2
    save_file(state, weights)
    convert(tmp_path / "in", tmp_path / "out")
    model = PeftModel.from_pretrained(MLP_KIND.model(), tmp_path / "out")
    assert torch.equal(model.base_model.model.second.mora_M["default"], torch.eye(9))


def test_an_existing_folder_is_taken_only_empty(tmp_path):
    checkpoint(tmp_path / "in")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "in", tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(ConversionError, match="exists already"):
        convert(tmp_path / "in", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(before)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    checkpoint(tmp_path / "in")

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("mora.convert.save_file", full)
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_config.json", b"[1]", "holds a list"),
        ("adapter_config.json", b"\xff{", "is no JSON"),
        ("adapter_config.json", b"{", "is no JSON"),
        ("adapter_config.json", None, "has no adapter_config.json"),
        ("adapter_model.safetensors", b"torn", "can't be read"),
        ("adapter_model.safetensors", None, "neither adapter_model.safetensors nor adapter_model.bin"),
    ],
)
def test_damaged_files_are_said_in_one_line(tmp_path, capsys, file, content, said):
    checkpoint(tmp_path / "in")
    (tmp_path / "in" / file).unlink()
    if content is not None:
        (tmp_path / "in" / file).write_bytes(content)
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_command_converts_and_explains_mistakes(tmp_path):
    checkpoint(tmp_path / "in")
    command = [sys.executable, "-m", "mora.convert", str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "MoRA r=3, operator=sharing" in done.stdout
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "exists already" in done.stderr and "Traceback" not in done.stderr
