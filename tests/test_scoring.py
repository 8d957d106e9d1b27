"""scripts/evaluate.py: a run's weights score what the run did, without training; any model; the same again is found."""

import json
from pathlib import Path

import pytest
from tiny import TINY
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from mora_repro.data.benchmarks import KNOWN
from mora_repro.evaluation import scored
from mora_repro.results.records import Store, read_samples
from mora_repro.scoring import benchmarks_of
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.run_spec import Eval

EXAMPLES = Path(__file__).parents[1] / "src" / "mora_repro" / "evaluation" / "examples"


@pytest.fixture
def model(tmp_path) -> str:
    """A folder with a model of random weights."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def only_file(out: Path) -> Path:
    [path] = out.glob("evaluations/*.json")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fft", "mora"])
def test_a_runs_weights_score_what_the_run_did(command_here, tmp_path, method):
    command_here("train.py", f"method={method}", *TINY, f"out={tmp_path}")
    [record] = Store(tmp_path).load_all()[0]
    done = command_here("scripts/evaluate.py", f"run={record.id}", f"out={tmp_path}")
    assert "char_accuracy" in done.stdout and "12 *" in done.stdout and "fewer than 30 samples" in done.stdout
    evaluated = json.loads(only_file(tmp_path).read_text())
    assert evaluated["metrics"] == record.metrics
    assert (evaluated["stderr"], evaluated["counts"]) == (record.evaluations[-1].stderr, record.evaluations[-1].counts)
    samples = read_samples(only_file(tmp_path))
    assert samples == read_samples(Store(tmp_path).record_path(record.id)) and scored(samples).metrics == record.metrics


@pytest.mark.slow
def test_a_model_is_scored_by_columns_of_the_paper_once(command_here, tmp_path, model):
    data = [f"data.{name}={EXAMPLES / name}" for name in KNOWN]
    asked = ["scripts/evaluate.py", f"model={model}", f"tasks=[{','.join(KNOWN)}]", *data, f"out={tmp_path}"]
    first = command_here(*asked)
    assert "Traceback" not in first.stderr and "it/s" not in first.stderr
    evaluated = json.loads(only_file(tmp_path).read_text())
    assert len(evaluated["metrics"]) == 11 and len(evaluated["content"]) == 11
    only_file(tmp_path).write_text(json.dumps(evaluated | {"metrics": {"marked": 1.0}}))
    again = command_here(*asked)
    assert "was evaluated on" in again.stderr and "marked" in again.stdout
    assert "marked" not in command_here(*asked, "rerun=true").stdout
    assert {path.name for path in (tmp_path / "evaluations").iterdir()} == {
        only_file(tmp_path).name,
        only_file(tmp_path).with_suffix(".samples.jsonl.gz").name,
    }


def test_a_task_asks_what_a_run_of_it_asks():
    """With the tokenizer's chat template, where the run has it; held-out texts in blocks as the task trains."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    spec = RunSpec.from_config(compose_config(["scale=mini", "method=fft", "task=instruct", "task.template=tokenizer"]))
    found, _, max_length = benchmarks_of(spec, tokenizer, ["instruct", "pretrain"], Eval(limit=3))
    assert [row["input"][0] + row["input"][-1] for row in found[0].rows] == ["[]"] * 3
    pretrain = RunSpec.from_config(compose_config(["scale=mini", "method=fft", "task=pretrain"]))
    assert max_length == pretrain.training.max_length != spec.training.max_length


@pytest.mark.slow
def test_what_can_not_be_scored_is_said_without_a_traceback(command_here, tmp_path, model):
    rct = [f"model={model}", "tasks=[rct]", f"data.rct={EXAMPLES / 'rct'}"]
    for arguments, said in [
        ([], "name what is scored: a run"),
        (["run=a", "model=b"], "and not both"),
        (["run=nothing"], "has no record of that name"),
        ([f"model={model}"], "name what the model is scored by"),
        ([f"model={model}", "tasks=[rct,rct]", f"data.rct={EXAMPLES / 'rct'}"], "rct twice"),
        ([f"model={model}", "tasks=[rct]"], ": data.rct=<path>"),
        ([f"model={model}", "tasks=[arc_easy]", "split=validation"], "a validation set are for gsm8k, math, mmlu"),
        ([*rct, "data.mmlu=a"], "error: data.mmlu=a would not be read"),
        (["model=/nowhere", "tasks=[rct]", f"data.rct={EXAMPLES / 'rct'}"], "/nowhere"),
    ]:
        done = command_here("scripts/evaluate.py", *arguments, f"out={tmp_path / 'out'}", check=False)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, arguments
    assert not (tmp_path / "out" / "evaluations").exists()
