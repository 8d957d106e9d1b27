"""Results of PEFT's method comparison are read as they are, kept apart by protocol, and bad files are named."""

import json

import pytest

from mora_repro.errors import UserError
from mora_repro.report import peers


def result(experiment: str, accuracy: float | None, steps: int = 5000, status: str = "success", **peft) -> str:
    """A result file in the schema of huggingface/peft, with made-up numbers."""
    metrics = [{"step": 250, "valid accuracy": 0.3, "train loss": 0.9}]
    metrics += [] if accuracy is None else [{"step": steps, "test accuracy": accuracy, "train loss": 0.6}]
    train_config = {
        "model_id": "meta-llama/Llama-3.2-3B",
        "dtype": "bfloat16",
        "max_steps": steps,
        "batch_size": 4,
        "seed": 0,
        "optimizer_kwargs": {"lr": 1e-4},
    }
    run = {"created_at": "2025-06-19T19:15:35+00:00", "experiment_name": experiment, "train_config": train_config}
    train = {"status": status, "train_time": 1796.2, "num_trainable_params": 9175040, "cuda_memory_max": 22.3e9}
    run["peft_config"] = peft or None
    return json.dumps({"run_info": run, "train_info": {**train, "metrics": metrics}, "meta_info": {}})


def test_results_are_sorted_within_their_protocol_and_others_are_named(tmp_path):
    (tmp_path / "a.json").write_text(result("lora/r32", 0.48, peft_type="LORA", r=32))
    (tmp_path / "b.json").write_text(result("miss/default", 0.51, peft_type="MISS", r=64))
    (tmp_path / "c.json").write_text(result("full", 0.55, steps=1000))
    (tmp_path / "d.json").write_text(result("failed", 0.1, status="failed", peft_type="LORA"))
    (tmp_path / "e.json").write_text(result("untested", None))
    (tmp_path / "f.json").write_text('{"x": 1}')
    table, problems = peers.read(tmp_path)
    assert table.experiment.tolist() == ["full", "miss/default", "lora/r32"]
    assert table["test accuracy"].tolist() == pytest.approx([55, 51, 48])
    assert table.method.tolist() == ["full fine-tuning", "MISS", "LORA"] and table.r.tolist()[1:] == [64, 32]
    assert len(problems) == 3 and all(name in line for name, line in zip("def", problems))
    text = peers.markdown(table)
    assert text.count("**meta-llama/Llama-3.2-3B") == 2 and "steps: 1000" in text and "other protocols" in text


@pytest.mark.parametrize("files", [{}, {"a.json": "{}"}])
def test_a_folder_without_such_results_is_an_error(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="has no result of PEFT's method comparison"):
        peers.read(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        peers.read(tmp_path / "nowhere")
