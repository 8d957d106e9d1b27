"""Word problems: generated ones are right and a function of the seed; answers are read as MetaMath's scoring does."""

import json
import re
from fractions import Fraction

import pandas as pd
import pytest
from tiny import ROOT, TINY
from transformers import ByT5Tokenizer

from mora_repro.data.answers import final_number
from mora_repro.data.gsm8k import CHANGE, LARGEST, Gsm8k, generate, score
from mora_repro.data.task import build_task, pair
from mora_repro.errors import UserError
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.run_spec import Eval

REAL = ROOT.parent / "shared" / "data" / "gsm8k"
ROW = {"question": "How many?", "answer": "It is 3.\n#### 3"}


def task(*overrides: str) -> Gsm8k:
    made = build_task(RunSpec.from_config(compose_config(["scale=mini", "method=fft", "task=gsm8k", *overrides])))
    assert isinstance(made, Gsm8k)
    return made


def asked(*overrides: str) -> list[tuple[str, str]]:
    [questions] = task(*overrides).benchmarks(Eval())
    return questions.pairs


def test_the_first_records_task_is_the_one_of_now():
    records = [json.loads(path.read_text()) for path in (ROOT / "results" / "runs").glob("mini-gsm8k-fft-*.json")]
    first = RunSpec.model_validate(min(records, key=lambda record: record["started"])["spec"])
    assert "math" not in first.task
    assert build_task(first) == task(f"seed={first.seed}")


@pytest.mark.parametrize("steps", [(1, 1), (2, 3), (5, 5)])
def test_generated_problems_have_right_chains_and_answers(steps):
    problems = generate(0, "train", 300, steps)
    assert len({question for question, _ in problems}) == 300
    lengths = set()
    for question, answer in problems:
        *chain, last = answer.split("\n")
        lengths.add(len(chain))
        now = int(re.search(r"has (\d+)", question).group(1))
        for step in chain:
            left, sign, right, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step).groups()
            assert int(left) == now
            now = {"+": now + int(right), "-": now - int(right), "*": now * int(right)}[sign]
            assert now == int(result) and 0 < now <= LARGEST
            assert (sign == "*" and right == "2" and "doubles" in question) or int(right) <= CHANGE
            assert sign == "*" or f" {right}" in question
        assert last == f"#### {now}" and question.endswith("?")
    assert lengths == set(range(steps[0], steps[1] + 1))


def test_the_generated_world_is_a_function_of_the_seed_and_no_test_question_is_trained_on():
    assert generate(0, "train", 50, (2, 3)) == generate(0, "train", 50, (2, 3)) != generate(1, "train", 50, (2, 3))
    trained = {prompt.text for prompt, _ in task("task.train_limit=3000").samples()}
    test = {prompt for prompt, _ in asked()}
    assert (len(trained), len(test)) == (3000, 200) and not trained & test


def test_validation_problems_are_others_and_leave_the_training_ones_as_they_were():
    made = task("task.train_limit=3000")
    [validation] = made.benchmarks(Eval(split="validation"))
    prompts = {prompt for prompt, _ in validation.pairs}
    assert len(prompts) == 200 and not prompts & {prompt for prompt, _ in asked()}
    trained = [prompt.text for prompt, _ in made.samples()]
    assert not prompts & set(trained)
    left_out = {question for question, _ in generate(0, "test", 200, made.steps)}
    expected = generate(0, "train", 3000, made.steps, left_out)
    assert trained == [made.asking(question) for question, _ in expected]
    assert len(made.benchmarks(Eval(limit=7))[0].pairs) == 7


def test_the_validation_set_of_files_is_theirs_or_held_out_of_training(tmp_path):
    write(tmp_path, "train", [{**ROW, "question": f"{number}?"} for number in range(1000)])
    write(tmp_path, "test", [ROW])
    made = task(f"task.data={tmp_path}", "task.train_limit=null", "task.test_limit=null")
    held_out = {prompt for prompt, _ in made.benchmarks(Eval(split="validation"))[0].pairs}
    trained = {prompt.text for prompt, _ in made.samples()}
    assert 2 < len(held_out) < 30 and len(trained) > 950 and not held_out & trained
    write(tmp_path, "validation", [{**ROW, "question": "mine?"}])
    assert [prompt for prompt, _ in made.benchmarks(Eval(split="validation"))[0].pairs] == ["mine?\n"]
    assert len(list(made.samples())) == 1000


def test_no_rephrasing_of_a_held_out_question_is_trained_on(tmp_path):
    rows = [
        {"query": f"{number}, in other words {way}?", "response": "The answer is: 3", "original_question": f"{number}?"}
        for number in range(500)
        for way in range(3)
    ]
    write(tmp_path, "train", rows)
    columns = ["task.columns.question=query", "task.columns.answer=response"]
    columns += ["+task.columns.original_question=original_question"]
    made = task(f"task.data={tmp_path}", *columns, "task.train_limit=null", "task.test_limit=null")
    held_out = list(made.rows("validation"))
    numbers = {question.partition(",")[0] for question, _ in held_out}
    assert numbers and len(held_out) == 3 * len(numbers)
    assert not numbers & {question.partition(",")[0] for question, _ in made.rows("train")}


def test_gsm8k_and_math_are_asked_from_files(tmp_path):
    write(tmp_path, "gsm8k", [ROW])
    write(tmp_path, "math", [{"problem": "One?", "solution": "It is $\\boxed{1}$."}] * 3)
    files = {"gsm8k": str(tmp_path / "gsm8k.jsonl"), "math": str(tmp_path / "math.jsonl")}
    gsm8k, math = task().benchmarks(Eval(data=files, limit=2))
    assert gsm8k.pairs == [("How many?\n", ROW["answer"])] and len(math.pairs) == 2
    assert math.score("The answer is: 1", math.pairs[0][1]) == {"math_exact_match": (1, 1)}
    config = compose_config(["scale=paper", "method=fft", "task=gsm8k", "model=llama2_7b"])
    paper = build_task(RunSpec.from_config(config))
    assert paper.math == "EleutherAI/hendrycks_math"
    with pytest.raises(UserError, match=r"EleutherAI/hendrycks_math can't be had.*eval.data.math=<path>"):
        paper.benchmarks(Eval(data={"gsm8k": files["gsm8k"]}))
    with pytest.raises(UserError, match=r"math.jsonl has no validation set.*eval.data.math=<folder>"):
        task().benchmarks(Eval(data={"math": files["math"]}, split="validation"))


def test_more_problems_than_there_are_is_an_error_that_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr("mora_repro.data.gsm8k.THINGS", ["figs"])  # a smaller world is sooner used up
    with pytest.raises(UserError, match=r"too few different problems of 1 to 1 steps.*task.train_limit=\d+"):
        generate(0, "train", 1_000_000, (1, 1))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3+4=7\n#### 7", 7),
        ("#### 1,234,567", 1234567),
        ("#### $18.00", 18),
        ("so he pays $1,200.50 in all.", Fraction("1200.5")),
        ("The answer is: 42.", 42),
        ("The answer is 42 and not 43", 42),
        ("the answer is -7", -7),
        ("first #### 1 then #### 2", 2),
        ("2 eggs and 3 more", 3),
        ("#### .5", Fraction("0.5")),
        ("70% of them", 70),
        ("The answer is unknown after 5", 5),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_final_number_of_an_answer(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("answer", "right"), [("#### 18.0", 1), ("The answer is: 18", 1), ("no", 0), ("", 0), ("#### 181", 0)]
)
def test_score_compares_by_value(answer, right):
    assert score(answer, "9*2=18\n#### 18") == {"exact_match": (right, 1)}


def test_a_gold_answer_without_a_number_is_never_right():
    assert score("none", "none") == {"exact_match": (0, 1)}


def write(folder, split: str, rows: list[dict]) -> None:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_users_files_are_read_as_jsonl_or_parquet(tmp_path):
    write(tmp_path, "train", [ROW, {**ROW, "question": "And?", "source": "x"}])
    pd.DataFrame([ROW] * 3).to_parquet(tmp_path / "test.parquet")
    samples = list(task(f"task.data={tmp_path}").samples())
    assert samples == [pair("How many?\n", ROW["answer"]), pair("And?\n", ROW["answer"])]
    assert asked(f"task.data={tmp_path}") == [("How many?\n", ROW["answer"])] * 3
    assert len(list(task(f"task.data={tmp_path}", "task.train_limit=1").samples())) == 1


def test_other_names_of_columns_and_rows_to_skip_are_said_by_the_task(tmp_path):
    write(tmp_path, "train", [{"query": "How many?", "response": "3"}, {}])
    named = [f"task.data={tmp_path}", "task.columns={question: query, answer: response}"]
    assert list(task(*named, "task.on_bad_row=skip").samples()) == [pair("How many?\n", "3"), ()]
    with pytest.raises(UserError, match=r"train.jsonl, line 2 has no 'query'"):
        list(task(*named).samples())


@pytest.mark.parametrize(
    ("override", "said"),
    [("task.steps=[3,2]", "task.steps=.*smallest number"), ("task.prompt=what", "task.prompt='what'.*{question}")],
)
def test_a_value_that_makes_no_sense_is_named(override, said):
    with pytest.raises(UserError, match=said):
        task(override)


def test_answers_to_a_users_questions_may_be_as_long_as_nine_of_ten_gold_answers(tmp_path):
    write(tmp_path, "test", [{**ROW, "answer": "1" * length} for length in range(1, 101)])
    tokenizer = ByT5Tokenizer(extra_ids=0)
    for overrides, longest in [
        ([f"task.data={tmp_path}"], 90 + 1),
        ([f"task.data={tmp_path}", "task.max_new_tokens=500"], 500),
        ([], 48),
    ]:
        [questions] = task(*overrides).benchmarks(Eval())
        assert questions.longest(tokenizer) == longest


def test_limits_on_a_users_files_are_said(tmp_path):
    assert "at most 3200 problems are trained on and 200 asked" in task(f"task.data={tmp_path}").notices()[0]
    assert task(f"task.data={tmp_path}", "task.train_limit=null", "task.test_limit=null").notices() == []
    assert task().notices() == []


def test_a_run_on_a_malformed_file_ends_with_one_error(command_here, tmp_path):
    write(tmp_path, "train", [ROW])
    (tmp_path / "test.jsonl").write_text("{}\n")
    tiny = [override for override in TINY if not override.startswith(("task=", "task."))]
    arguments = ["train.py", "method=fft", "task=gsm8k", *tiny, f"task.data={tmp_path}", f"out={tmp_path / 'out'}"]
    done = command_here(*arguments, check=False)
    assert done.returncode == 2
    assert "test.jsonl, line 1 has no 'question'" in done.stderr


@pytest.mark.skipif(not REAL.is_dir(), reason="the real GSM8K files are not beside this checkout")
def test_real_gsm8k_is_read_and_every_gold_answer_is_scored_right():
    everything = [f"task.data={REAL}", "task.train_limit=null", "task.test_limit=null"]
    trained = list(task(*everything).samples())
    [validation] = task(*everything).benchmarks(Eval(split="validation"))
    assert 7250 < len(trained) < 7400 and 50 < len(validation.pairs) < 100
    assert not {prompt for prompt, _ in validation.pairs} & {prompt.text for prompt, _ in trained}
    golds = [gold for _, gold in asked(*everything)]
    assert len(golds) == 1000 and all(score(gold, gold) == {"exact_match": (1, 1)} for gold in golds)
    assert all(score("", gold) == {"exact_match": (0, 1)} for gold in golds)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the real GSM8K files are not beside this checkout")
def test_a_run_on_real_gsm8k_reaches_its_record(command_here, tmp_path):
    tiny = [override for override in TINY if not override.startswith(("task=", "task."))]
    arguments = ["train.py", "method=mora", "task=gsm8k", "r=4", *tiny, f"task.data={REAL}", "task.test_limit=4"]
    command_here(*arguments, "task.train_limit=50", f"out={tmp_path}")
    [record] = (tmp_path / "runs").glob("*.json")
    assert set(json.loads(record.read_text())["metrics"]) == {"exact_match"}
