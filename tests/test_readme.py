"""What README.md and CONTRIBUTING.md show is there: commands, keys, files, and the library's example."""

import re
import shlex

import pytest
import yaml
from tiny import ROOT
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from mora_repro.report import tables, verdicts
from mora_repro.results.records import Store
from mora_repro.spec import RunSpec, compose_config

README = (ROOT / "README.md").read_text()
TEXTS = README + (ROOT / "CONTRIBUTING.md").read_text()
PYTHON = re.findall(r"^(?:\$ )?python (\S+) (.*)$", README, re.MULTILINE)


def test_every_make_target_exists():
    shown = set(re.findall(r"`?make ([a-z0-9-]+)", TEXTS))
    there = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= shown <= there


@pytest.mark.parametrize(("script", "arguments"), PYTHON, ids=lambda text: text)
def test_every_python_command_composes(script, arguments):
    keys = [text for text in shlex.split(arguments) if not text.startswith("-") and text not in ("job",)]
    if script in ("train.py", "scripts/prepare.py"):
        keys = [key for key in keys if not key.startswith("show=")]
        scale = [] if any(key.startswith("scale=") for key in keys) else ["scale=mini"]
        RunSpec.from_config(compose_config([*keys, *scale]))
    else:
        known = yaml.safe_load((ROOT / "conf" / script).with_suffix(".yaml").read_text())
        assert {key.split("=")[0].split(".")[0] for key in keys} <= known.keys()


@pytest.mark.parametrize("shown", [" ".join(found) for found in PYTHON if "--" in found[1]])
def test_what_is_shown_and_not_run_is_printed(command, shown):
    assert len(command(*shlex.split(shown)).stdout.splitlines()) > 20


def test_every_linked_file_exists():
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", TEXTS) if "://" not in link]
    assert len(links) > 3
    assert [link for link in links if link and not (ROOT / link).exists()] == []


def test_the_librarys_example_runs(tmp_path, monkeypatch, capsys):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "path" / "to" / "model")
    monkeypatch.chdir(tmp_path)
    [example] = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "MoraConfig" in block]
    values: dict = {}
    exec(example, values)
    assert "trainable params" in capsys.readouterr().out
    assert type(values["merged"]) is LlamaForCausalLM and (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def rows_of(markdown: str) -> str:
    return "".join(line + "\n" for line in markdown.splitlines() if line.startswith("|"))


def test_the_table_the_verdicts_and_the_demos_output_are_those_of_the_records():
    records = Store(ROOT / "results").load_all()[0]
    table = tables.build("2", "mini", records)
    written = ROOT / "results" / "tables" / table.file
    assert written.with_suffix(".md").read_text() == tables.markdown(table)
    assert written.with_suffix(".csv").read_text() == tables.csv(table)
    assert written.with_suffix(".tex").read_text() == tables.latex(table)
    assert rows_of(tables.markdown(table)) in README
    found = verdicts.markdown(verdicts.verdicts("mini", records), "mini")
    assert (ROOT / "results" / "tables" / "verdicts-mini.md").read_text() == found
    assert rows_of(found) in README
    # The demo is seed 0 of the same cells: the same numbers to the bit.
    demo = tables.build("2", "mini", [record for record in records if record.spec.seed == 0])
    for line in demo.lines:
        values = r"\s+".join(f"{entry.ours.mean:.1f}" for entry in line.entries)
        assert re.search(rf"^ {line.name}\s.*\s{values}\s", README, re.MULTILINE), values
