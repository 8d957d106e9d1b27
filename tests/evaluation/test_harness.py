"""lm-eval in process: its likelihoods are the model's, whatever the method and the processes; data from files."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from processes import alone, launcher
from tiny_model import tiny_model, tiny_tokenizer

from mora_repro.data.benchmarks import KNOWN, Harness, known
from mora_repro.data.biomed import Biomed
from mora_repro.data.finance import Finance
from mora_repro.data.task import prompt_tokens
from mora_repro.errors import UserError
from mora_repro.evaluation import evaluate, fetch, refuse_no_room
from mora_repro.evaluation.harness import tasks_of
from mora_repro.spec.run_spec import Eval
from mora_repro.training import build_extensions

EXAMPLES = Path(sys.modules["mora_repro.evaluation.harness"].__file__).with_name("examples")
FILES = Eval(data={name: str(EXAMPLES / name) for name in KNOWN})
ROWS = [
    {
        "input": f"{number} of {'many ' * (number % 4)}:",
        "options": ["a", "b", "of many"][: 2 + number % 2],
        "gold_index": 0,
    }
    for number in range(9)
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def likelihood(model, tokenizer, prompt: str, option: str) -> float:
    """Of an option after a prompt, without padding, cache and library."""
    before = prompt_tokens(tokenizer, prompt)
    ids = prompt_tokens(tokenizer, prompt + option)
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    chances = logits[-len(ids) :].log_softmax(-1)  # virtual tokens come before
    model.train()
    return sum(float(chances[place - 1, ids[place]]) for place in range(len(before), len(ids)))


@pytest.mark.parametrize("method", ["none", "lora", "prompt", "prefix"])
def test_an_answer_is_the_likeliest_option_and_the_model_is_left_as_it_was(model, tokenizer, method):
    torch.manual_seed(1)
    configs = {
        "lora": LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    }
    asked = model if method == "none" else get_peft_model(tiny_model(), configs[method])
    asked.train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    scores = evaluate(asked, tokenizer, [Harness("choices", "choices", rows=ROWS)], 64)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist()) and asked.training
    best = [max(row["options"], key=lambda option: likelihood(asked, tokenizer, row["input"], option)) for row in ROWS]
    assert [sample["answer"] for sample in scores.samples] == best and len(set(best)) > 1
    right = [answer == row["options"][0] for answer, row in zip(best, ROWS)]
    assert scores.metrics == {"choices": pytest.approx(100 * sum(right) / len(right))}
    assert scores.counts == {"choices": 9} and scores.stderr["choices"] > 0


def test_nothing_is_printed_by_lm_eval(model, tokenizer, capfd):
    evaluate(model, tokenizer, known("ner", FILES) + known("rct", FILES), 64)
    assert capfd.readouterr() == ("", "")


def test_a_prompt_beyond_the_positions_is_cut_and_counted(tokenizer):
    rows = [{**ROWS[0], "input": "q" * length} for length in (10, 64, 65, 200)]
    scores = evaluate(tiny_model(positions=64), tokenizer, [Harness("long", "long", rows=rows)], 64)
    assert scores.metrics["cut_prompts"] == 2 and scores.counts["long"] == 4


def test_an_answer_that_does_not_fit_the_positions_is_refused(tokenizer):
    model = tiny_model(positions=64)
    with pytest.raises(UserError, match=r"ner allows answers of 100 tokens, and the model has 64 positions"):
        refuse_no_room(model, tokenizer, known("ner", FILES))
    rows = [{**ROWS[0], "options": ["x" * 100, "b"]}]
    with pytest.raises(UserError, match=r"an answer of 100 tokens does not fit the 64 positions"):
        evaluate(model, tokenizer, [Harness("long", "long", rows=rows)], 64)


def test_every_column_of_the_paper_is_asked_from_local_files(model, tokenizer):
    columns = [one for name in KNOWN for one in known(name, FILES)]
    fetch(columns)
    scores = evaluate(model, tokenizer, columns, 64, mean_of=Biomed.mean_of)
    assert set(scores.metrics) == {"mmlu_0shot", "mmlu_5shot", *Biomed.mean_of, *Finance.mean_of, "mean"}
    assert scores.metrics["mean"] == pytest.approx(sum(scores.metrics[name] for name in Biomed.mean_of) / 4)
    assert scores.counts["headline"] == 2
    prompts = {sample["benchmark"]: sample["prompt"] for sample in scores.samples}
    assert prompts["mmlu_5shot"].count("Answer:") == 6 and prompts["mmlu_5shot"].endswith(prompts["mmlu_0shot"][-99:])
    assert "Abstract: To see whether" in prompts["pubmedqa"] and "B. Monosodium urate" in prompts["usmle"]
    asked = {(sample["benchmark"], sample["gold"]) for sample in scores.samples}
    assert {("rct", "METHODS"), ("fpb", "positive"), ("mmlu_0shot", "B"), ("convfinqa", "25%")} <= asked


def test_the_validation_set_is_another_one_and_the_limit_bounds_each_task(model, tokenizer, tmp_path):
    rows = [{**ROWS[0], "input": f"row {number}:"} for number in range(200)]
    (tmp_path / "rct.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"rct": str(tmp_path / "rct.jsonl")}
    test, validation = (
        {row["input"] for task in tasks_of(one).tasks.values() for row in task.eval_docs}
        for split in ("test", "validation")
        for one in known("rct", Eval(data=data, split=split))
    )
    assert not test & validation and len(test | validation) == 200 and 5 < len(validation) < 40
    scores = evaluate(model, tokenizer, known("rct", Eval(data=data, limit=6)), 64)
    assert scores.counts == {"rct": 6}
    [of_folder] = known("rct", Eval(data={"rct": str(EXAMPLES / "rct")}, split="validation"))
    assert "Pain fell" in evaluate(model, tokenizer, [of_folder], 64).samples[0]["prompt"]


def test_subjects_of_mmlu_count_by_their_size_and_biomedical_ones_alike(model, tokenizer, tmp_path):
    row = json.loads((EXAMPLES / "mmlu" / "test.jsonl").read_text())
    subjects = ["anatomy"] * 6 + ["medical_genetics"] * 2
    rows = [{**row, "question": f"{n}?", "subject": name, "answer": n % 4} for n, name in enumerate(subjects)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    settings = Eval(data={"mmlu": str(tmp_path), "biommlu": str(tmp_path)})
    mmlu, biommlu = known("mmlu", settings)[0], known("biommlu", settings)[0]
    scores = evaluate(model, tokenizer, [mmlu, biommlu], 64)
    right = [sample["metrics"]["mmlu_0shot"] for sample in scores.samples[:8]]
    assert scores.metrics["mmlu_0shot"] == pytest.approx(100 * sum(right) / 8)
    assert scores.metrics["biommlu"] == pytest.approx(100 * (sum(right[:6]) / 6 + sum(right[6:]) / 2) / 2)
    with pytest.raises(UserError, match=r"has no dev set, which is needed here.*eval.data.mmlu=<folder>"):
        evaluate(model, tokenizer, known("mmlu", settings), 64)


@pytest.mark.slow  # all of lm-eval's tasks are looked through
def test_what_lm_eval_has_not_or_can_not_load_is_said(model, tokenizer):
    with pytest.raises(UserError, match=r"lm-eval has no task mmluu. Did you mean .*mmlu"):
        evaluate(model, tokenizer, [Harness("mmluu", "mmluu")], 64)
    with pytest.raises(UserError, match=r"lm-eval's task arc_easy can't be loaded .*cache of `datasets`"):
        evaluate(model, tokenizer, [Harness("arc_easy", "arc_easy", metric=None)], 64)


def test_the_index_of_the_papers_tasks_needs_no_look_at_all_others():
    from mora_repro.evaluation.harness import task_manager

    assert len(task_manager().all_tasks) < 100 and {one.task for ones in KNOWN.values() for one in ones} <= set(
        task_manager().all_tasks
    )


@pytest.mark.slow
def test_scores_are_the_same_on_one_process_on_two_and_in_shards(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    program = str(Path(__file__).with_name("scores_of_processes.py"))
    build_extensions()
    found = []
    for processes, stage in [(1, 0), (2, 0), (2, 3)]:
        result = tmp_path / f"{processes}-{stage}.json"
        command = [sys.executable, *(launcher(processes) if processes > 1 else []), program]
        done = subprocess.run(
            [*command, str(stage), str(tmp_path / "model"), str(result)],
            env={name: value for name, value in alone(29_700, Path(__file__).parent).items() if "RANK" not in name},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        found.append(json.loads(result.read_text()))
    assert found[0] == found[1] == found[2]
    assert set(found[0][0]) == {"choices", "one", "ner", "convfinqa", "own"}
