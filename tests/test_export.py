"""What is exported loads in plain PEFT and transformers code, in a fresh process, and computes what the run did."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny import TINY
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mora_repro.data.task import build_task
from mora_repro.errors import UserError
from mora_repro.evaluation import evaluate
from mora_repro.export import main
from mora_repro.methods import load_tokenizer
from mora_repro.results.records import Record, Store

# After the README's code: logits of fixed tokens, and nothing of the suite in the process.
LOGITS = """
import sys, torch
ids = torch.arange(3, 60)[None]
with torch.no_grad():
    torch.save(model.eval()(ids).logits, sys.argv[1])
assert tokenizer("ab", add_special_tokens=False).input_ids == [100, 101]
assert "mora_repro" not in sys.modules
"""


def readmes_code(folder: Path) -> str:
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    return code


def logits(folder: Path) -> torch.Tensor:
    """Of what the README in `folder` loads, in a process of its own whose working folder it is."""
    result = folder.parent / f"{folder.name}.pt"
    code = readmes_code(folder) + LOGITS
    done = subprocess.run([sys.executable, "-c", code, str(result)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(result)


def only_record(out: Path) -> Record:
    [record] = [found for found in Store(out).load_all()[0] if "base" not in found.spec.task["name"]]
    return record


@pytest.fixture
def exported(command_here, tmp_path):
    """Trains with overrides, exports the run, and returns its record and the folder."""

    def export(*overrides: str, to: str = "to", merge: bool = False) -> tuple[Record, Path]:
        out = tmp_path / "out"
        if overrides:
            command_here("train.py", *overrides, f"out={out}")
        record = only_record(out)
        arguments = [f"run={record.id}", f"merge={str(merge).lower()}", f"to={tmp_path / to}", f"out={out}"]
        done = command_here("scripts/export.py", *arguments)
        assert str(tmp_path / to) in done.stderr and not list(tmp_path.glob(".*partial"))
        return record, tmp_path / to

    return export


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "mora"])
def test_an_adapter_loads_in_plain_code_and_computes_the_same_as_merged(exported, method):
    record, alone = exported(*TINY, f"method={method}", "lr=1e-2")
    _, merged = exported(to="merged", merge=True)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in alone.iterdir()}
    assert not list(alone.glob("*.bin")) and not list(merged.glob("adapter_*")) and not (merged / "base").exists()
    assert ("import mora" in readmes_code(alone)) == (method == "mora")
    ours, theirs = logits(alone), logits(merged)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(alone / "base")
    with torch.no_grad():
        assert (base(torch.arange(3, 60)[None]).logits - ours).abs().max() > 1e-2  # it was trained
    # The run's own score, from the exported model.
    benchmarks = build_task(record.spec).benchmarks(record.spec.eval)
    model, length = AutoModelForCausalLM.from_pretrained(merged), record.spec.training.max_length
    scores = evaluate(model, load_tokenizer(record.spec), benchmarks, length)
    assert scores.metrics == pytest.approx(record.metrics)
    config = json.loads((alone / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(alone / "base")
    said = (alone / "README.md").read_text()
    assert record.id in said and record.command in said and f"{record.metrics['char_accuracy']:.2f}" in said
    # The folder can be moved.
    moved = alone.rename(alone.with_name("moved"))
    torch.testing.assert_close(logits(moved), ours, rtol=0, atol=0)


@pytest.mark.slow
def test_a_whole_model_is_exported_as_it_is(exported):
    _, plain = exported(*TINY, "method=fft")
    _, merged = exported(to="merged", merge=True)
    assert torch.equal(logits(plain), logits(merged))
    assert {path.name for path in plain.iterdir()} == {path.name for path in merged.iterdir()}
    assert "nothing to merge" in (merged / "README.md").read_text() and "peft" not in readmes_code(plain)


@pytest.mark.slow
def test_a_pretrained_base_stays_where_it_is_and_keeps_its_dtype(exported, tmp_path):
    base = tmp_path / "base model"
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(base)
    tiny = [text for text in TINY if not text.startswith("model.")]
    model = ["model=hf", f"model.pretrained='{base}'", "model.tokenizer=bytes"]
    _, alone = exported(*tiny, *model, "method=mora", "r=2")
    _, merged = exported(to="merged", merge=True)
    assert json.loads((alone / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not (alone / "base").exists() and str(base) in readmes_code(alone)
    assert AutoModelForCausalLM.from_pretrained(merged, dtype="auto").dtype == torch.float16
    torch.testing.assert_close(logits(alone), logits(merged), rtol=0, atol=2e-2)  # fp16


@pytest.mark.slow
def test_a_trained_base_comes_along(command_here, tmp_path):
    tiny = [text for text in TINY if text != "model.base=null"]
    out, to = tmp_path / "out", tmp_path / "to"
    command_here("train.py", "method=lora", *tiny, f"out={out}")
    record = only_record(out)
    command_here("scripts/export.py", f"run={record.id}", f"to={to}", f"out={out}")
    trained = Store(out).work(record.spec.model.base_id) / "model"
    assert (to / "base" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    logits(to)
    # Without the base's weights, or without its record too, the error says what makes them.
    shutil.rmtree(trained)
    done = command_here("scripts/export.py", f"run={record.id}", f"to={tmp_path / 'new'}", f"out={out}", check=False)
    again = "python train.py method=fft task=uuid_base scale=mini"
    assert done.returncode == 2 and again in done.stderr and f"out={out} rerun=true" in done.stderr
    Store(out).record_path(record.spec.model.base_id).unlink()
    done = command_here("scripts/export.py", f"run={record.id}", f"to={tmp_path / 'new'}", f"out={out}", check=False)
    assert done.returncode == 2 and f"{record.command} out={out} rerun=true" in done.stderr
    assert not list(tmp_path.glob("*new*")) and not list(tmp_path.glob(".new*"))


@pytest.mark.slow
def test_what_cannot_be_merged_says_so_and_can_be_exported_alone(command_here, tmp_path):
    out = tmp_path / "out"
    prompt = ["method=lora", "method.peft._target_=peft.PromptTuningConfig", "+method.peft.num_virtual_tokens=4"]
    prompt += [f"~method.peft.{key}" for key in ("r", "lora_alpha", "lora_dropout", "target_modules")]
    command_here("train.py", *TINY, *prompt, f"out={out}")
    run = only_record(out).id
    done = command_here(
        "scripts/export.py", f"run={run}", "merge=true", f"to={tmp_path / 'to'}", f"out={out}", check=False
    )
    assert done.returncode == 2 and "can't be merged" in done.stderr and "merge=false" in done.stderr
    assert not (tmp_path / "to").exists() and not (tmp_path / ".to.partial").exists()
    command_here("scripts/export.py", f"run={run}", f"to={tmp_path / 'to'}", f"out={out}")
    logits(tmp_path / "to")


@pytest.mark.slow
def test_mistakes_are_named_and_leave_nothing_behind(command_here, tmp_path):
    out = tmp_path / "out"
    command_here("train.py", "method=lora", *TINY, f"out={out}")
    record = only_record(out)

    def refused(**keys: str | bool) -> str:
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(UserError) as caught:
            main(OmegaConf.create({"run": "???", "merge": False, "to": None, "out": str(out), **keys}))
        assert {path.name for path in tmp_path.iterdir()} == before
        return str(caught.value)

    assert "run has no default and must be given" in refused()
    assert f"Did you mean {record.id}?" in refused(run=f"{record.id[:-1]}x")
    assert "merge='maybe'" in refused(run=record.id, merge="maybe")
    (tmp_path / "there").mkdir()
    said = refused(run=record.id, to=str(tmp_path / "there"))
    assert "is there already" in said and f"rm -r {tmp_path / 'there'}" in said
    (tmp_path / "file").touch()
    assert "can't be written" in refused(run=record.id, to=str(tmp_path / "file" / "x"))
    store = Store(out)
    model = store.work(record.id) / "model"
    (model / "adapter_model.safetensors").write_bytes(b"torn")
    said = refused(run=record.id, merge=True, to=str(tmp_path / "to"))
    assert f"the adapter in {model} are loaded, and that fails" in said and "merge=false" in said
    shutil.rmtree(model)
    assert f"{record.command} out={out} rerun=true" in refused(run=record.id)
    store.save(record.model_copy(update={"status": "interrupted"}))
    assert "has not finished (its status: interrupted)" in refused(run=record.id)


def test_help_names_the_keys_and_a_missing_run_is_an_error(command_here):
    said = command_here("scripts/export.py", "--help").stdout
    assert set(re.findall(r"^ +(\w+)  +\S", said, re.MULTILINE)) == {"run", "merge", "to", "out"}
    done = command_here("scripts/export.py", check=False)
    assert done.returncode == 2 and "run=..." in done.stderr
