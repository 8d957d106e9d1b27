"""The README's operator example runs, and its table of operators is complete."""

import re
from pathlib import Path

import torch
from models import MLP_KIND, logits
from peft import get_peft_model

import mora
from mora.convert import MORA_TYPES

README = (Path(mora.__file__).parent / "README.md").read_text()


def test_the_example_of_an_operator_runs():
    example = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "register_operator(" in block)
    values: dict = {}
    exec(example.replace('"last"', '"readme_last"').replace("r=8", "r=2, init_weights=False"), values)
    config = values["config"]
    config.target_modules = {"second"}
    model = get_peft_model(MLP_KIND.model(), config).eval()
    before = logits(model, MLP_KIND.batch())
    assert not torch.allclose(before, logits(MLP_KIND.model(), MLP_KIND.batch()), atol=1e-3)
    assert torch.allclose(logits(model.merge_and_unload(), MLP_KIND.batch()), before, atol=1e-5)


def test_every_operator_and_every_type_of_the_authors_is_explained():
    for operator in ("rotation", "sharing", "decoupling", "truncation"):
        assert f'| `"{operator}"' in README
    for number, (operator, *groups) in MORA_TYPES.items():
        wanted = f"{number} ({', '.join(groups)})" if operator == "sharing" else f"| {number} |"
        assert wanted in README, wanted
