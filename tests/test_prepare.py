"""scripts/prepare.py: what it makes is what a run reads; its mistakes are said in a line."""

import pytest
from tiny import TINY

from mora_repro.errors import UserError
from mora_repro.methods import download
from mora_repro.spec import RunSpec, compose_config


@pytest.mark.slow
def test_a_run_finds_what_was_prepared_and_samples_are_shown(command_here, tmp_path):
    done = command_here("scripts/prepare.py", *TINY, "show=2", f"out={tmp_path}")
    assert done.stdout.count(":>>") == 2 and done.stdout.count("</s><<") == 2
    assert "prepared 12 samples, 888 tokens" in done.stderr and "tokens/s" in done.stderr
    assert "resident memory" in done.stderr
    assert "prepared" not in command_here("scripts/prepare.py", *TINY, f"out={tmp_path}").stderr
    run = command_here("train.py", "method=fft", *TINY, f"out={tmp_path}")
    assert "prepared" not in run.stderr and "12 samples, 888 tokens" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("shw=2", "there is no key 'shw'. Did you mean show? All keys: python scripts/prepare.py --cfg job"),
        ("show=-2", "show=-2: input should be greater than or equal to 0"),
        ("task=uuids", "Did you mean uuid"),
    ],
)
def test_a_mistake_is_said_in_a_line(command_here, tmp_path, override, said):
    done = command_here("scripts/prepare.py", "scale=mini", override, f"out={tmp_path}", check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_model_out_of_reach_says_how_to_get_it():
    spec = RunSpec.from_config(
        compose_config(["scale=mini", "model=hf", "model.pretrained=nobody/nothing", "method=fft"])
    )
    with pytest.raises(UserError, match=r"'nobody/nothing' is neither a local folder nor to be had.*hf auth login"):
        download(spec)


def test_blocks_longer_than_the_models_positions_are_an_error_before_all_preparation(command_here, tmp_path):
    wanted = ["scale=mini", "method=fft", "task=pretrain", "model.tokenizer=bytes", "training.max_length=1025"]
    for script in ("train.py", "scripts/prepare.py"):
        done = command_here(script, *wanted, f"out={tmp_path}", check=False)
        assert done.returncode == 2
        assert "samples of 1025 tokens" in done.stderr and "training.max_length=1024" in done.stderr
    assert not (tmp_path / "data").exists()
