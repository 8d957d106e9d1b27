"""Biomedicine and finance: an invented world that is a function of the seed, and texts of the user's or of the hub."""

import json
import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROOT, TINY

from mora_repro.data.benchmarks import HeldOut, Scores
from mora_repro.data.domain import ASKED, CHOICES, Domain, documents, mixed, score
from mora_repro.data.instruct import tulu
from mora_repro.data.task import build_task, document
from mora_repro.errors import UserError
from mora_repro.evaluation.scores import together
from mora_repro.methods import load_tokenizer
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.run_spec import Eval

WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"
BOTH = pytest.mark.parametrize("name", ["biomed", "finance"])
MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def spec(name: str, *overrides: str) -> RunSpec:
    return RunSpec.from_config(compose_config(["scale=mini", "method=fft", f"task={name}", *overrides]))


def task(name: str, *overrides: str) -> Domain:
    made = build_task(spec(name, *overrides))
    assert isinstance(made, Domain)
    return made


def texts(task: Domain) -> list[str]:
    return [segment.text for sample in task.samples() for segment in sample]


def prompts(task: Domain, split: str) -> dict[str, list[str]]:
    """What is asked in a split, by metric."""
    asked = {}
    for one in task.benchmarks(Eval(split=split)):
        asked[one.name] = (
            [row["input"] for row in one.rows] if one.name != "short_answers" else [p for p, _ in one.pairs]
        )
    return asked


@BOTH
def test_the_domain_is_a_function_of_the_seed_and_the_general_part_is_the_same_for_all(name):
    once = "task.tellings=1"
    first, other = task(name, once), task(name, once, "seed=1")
    assert texts(first) == texts(task(name, once)) != texts(other)
    assert texts(task(f"{name}_base", once)) == texts(task(f"{name}_base", once, "seed=1"))
    for split in ("test", "validation"):
        ours, theirs = prompts(first, split), prompts(other, split)
        assert ours == prompts(task(name, once), split)
        assert ours["new_facts"] != theirs["new_facts"]


@BOTH
def test_the_example_in_the_docstring_is_of_this_world(name):
    made = task(name)
    shown = " ".join(sys.modules[type(made).__module__].__doc__.split())
    assert texts(made)[0] in shown
    assert all(
        sum(prompt.replace("\n", " ") in shown for prompt in asked) == (metric != "old_facts")
        for metric, asked in prompts(made, "test").items()
    )


@BOTH
def test_the_base_has_read_of_no_entity_of_any_seeds_domain(name):
    base = " ".join(texts(task(f"{name}_base")))
    for seed in (0, 1, 100):
        names = {fact.name for fact in task(name).world.new_facts(seed)}
        assert len(names) == 100 and not any(name in base for name in names)


@BOTH
def test_every_fact_of_the_domain_stands_in_the_documents_and_in_no_question(name):
    made = task(name)
    read = texts(made)
    told = [text for text in read if not text.startswith("Question:")]
    sentences = {sentence for text in told for sentence in text.removesuffix(".").split(". ")}
    new = made.world.new_facts(0)
    for fact in new:
        ways = {words.format(name=fact.name, value=fact.value).removesuffix(".") for words in fact.relation.told}
        assert ways & sentences
    questions = " ".join(text for text in read if text.startswith("Question:"))
    assert questions and not any(fact.name in questions for fact in new)


@BOTH
@pytest.mark.parametrize("part", ["", "_base"])
def test_no_question_is_trained_on_and_validation_asks_of_other_facts_than_the_test(name, part):
    made = task(name + part)
    trained = " ".join(texts(made))
    test, validation = prompts(made, "test"), prompts(made, "validation")
    for metric, count in ASKED.items():
        assert len(test[metric]) == len(validation[metric]) == count
        assert not any(prompt in trained for prompt in test[metric] + validation[metric])
        assert not set(test[metric]) & set(validation[metric])
    assert all(len(asked) == 7 for asked in prompts_of(made.benchmarks(Eval(limit=7))))


def prompts_of(benchmarks) -> list:
    return [one.pairs if one.name == "short_answers" else one.rows for one in benchmarks]


@BOTH
def test_the_gold_answer_is_the_fact_and_the_options_are_different_values_of_its_relation(name):
    made = task(name)
    facts = {(fact.name, fact.relation): fact.value for fact in made.world.new_facts(0) + made.world.general_facts()}
    ways = {
        f"Question: {words.format(name=entity)}\nAnswer:": (relation, value)
        for (entity, relation), value in facts.items()
        for words in relation.asked
    }
    chosen, answered, old = made.benchmarks(Eval())
    places = set()
    for row in [*chosen.rows, *old.rows]:
        relation, value = ways[row["input"]]
        assert len(set(row["options"])) == CHOICES
        assert {option.removeprefix(" ") for option in row["options"]} <= set(relation.values)
        assert row["options"][row["gold_index"]] == f" {value}" and not relation.number
        places.add(row["gold_index"])
    assert places == set(range(CHOICES))
    for prompt, gold in answered.pairs:
        relation, value = ways[prompt]
        assert gold == f" {value}" and relation.number


def test_an_answer_is_right_when_number_and_unit_are():
    assert score(" 45 mg", " 45 mg") == score("45 mg\n", " 45 mg") == {"short_answers": (1, 1)}
    assert score(" 4 mg", " 45 mg") == score("", " 45 mg") == score(" 45", " 45 mg") == {"short_answers": (0, 1)}


@BOTH
def test_the_learned_tokens_cover_the_world_a_name_is_two_and_a_word_one(name):
    made, tokenizer = task(name), load_tokenizer(spec(name))
    names = {fact.name for fact in made.world.new_facts(0) + made.world.general_facts()}
    assert all(len(tokenizer(f" {name}").input_ids) == 2 for name in names)
    values = {word for relation in made.world.relations for value in relation.values for word in value.split()}
    assert all(len(tokenizer(f" {word}").input_ids) == 1 for word in values)
    for text in texts(made)[:50]:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and len(ids) <= len(text) / 3


@BOTH
def test_a_value_never_stands_before_its_name(name):
    for relation in task(name).world.relations:
        assert len(relation.told) == 5 and len(set(relation.values)) == 16
        assert all(0 < text.index(" {name}") < text.index(" {value}") for text in relation.told)
        assert all(" {name}" in text and "{value}" not in text for text in relation.asked)


@given(st.lists(st.text(min_size=1), max_size=20), st.lists(st.text(min_size=1), min_size=1), st.floats(0, 3))
def test_general_samples_are_mixed_in_by_their_ratio_and_start_over(told, general, ratio):
    made = [sample[0].text for sample in mixed(map(document, told), lambda: map(document, general), ratio)]
    order = iter(made)
    assert all(text in order for text in told)  # all documents, in their order
    have, others = sum(map(len, told)), sum(map(len, made)) - sum(map(len, told))
    assert ratio * have - 1e-6 <= others <= ratio * have + max(map(len, general))


def test_rows_that_were_skipped_pass_through_the_mixture():
    skipping = [(), document("ab"), ()]
    assert list(mixed(skipping, lambda: [(), document("c")], 1.0)) == [
        (), document("ab"), (), document("c"), (), document("c"), (),
    ]  # fmt: skip


def test_documents_tell_of_each_entity_once():
    facts = task("biomed").world.general_facts()
    told = documents(facts, random.Random(0))
    assert len(told) == len({fact.name for fact in facts})


@pytest.fixture
def corpus(tmp_path):
    """A file of 800 documents, and one of instructions."""
    (tmp_path / "news.jsonl").write_text("".join(json.dumps({"body": f"Text {n}."}) + "\n" for n in range(800)))
    (tmp_path / "tulu.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    return [f"task.data={tmp_path / 'news.jsonl'}", "task.columns.text=body", f"task.general={tmp_path / 'tulu.jsonl'}"]


def test_a_users_texts_are_trained_on_but_for_those_held_out(corpus):
    made = task("finance", *corpus, "task.measured_by=[]", "task.general_ratio=0.5")
    trained = texts(made)
    held_out = {}
    for split in ("validation", "test"):
        [perplexity] = made.benchmarks(Eval(split=split))
        assert isinstance(perplexity, HeldOut)
        held_out[split] = set(perplexity.texts)
        assert held_out[split] and not held_out[split] & set(trained)
    assert not held_out["validation"] & held_out["test"]
    instruction = {segment.text for segment in tulu(MESSAGES)}
    assert {*trained} == {f"Text {n}." for n in range(800)} - held_out["validation"] - held_out["test"] | instruction


def test_questions_mined_from_a_document_follow_it(corpus, tmp_path):
    told = "Sleep\n\nTwenty adults slept badly for a week. Therefore, they recalled fewer words than before."
    (tmp_path / "news.jsonl").write_text(json.dumps({"body": told}) + "\n")
    plain, asked = (
        texts(task("finance", *corpus, "task.general_ratio=0", f"task.reading_comprehension={mined}"))
        for mined in ("false", "true")
    )
    assert (
        plain == [told] and asked[0].startswith(told) and "they recalled fewer words" in asked[0][len(told) :].lower()
    )


def test_with_general_instructions_the_domains_keywords_are_asked_about(corpus, tmp_path):
    rows = [{"body": f"Patient {n} got glucose, insulin and heparin for a week."} for n in range(200)]
    (tmp_path / "news.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = {"role": "assistant", "content": "A week is long for a patient who got nothing. " * 200}
    (tmp_path / "tulu.jsonl").write_text(json.dumps({"messages": [MESSAGES[0], answer]}) + "\n")
    asked = {
        ratio: " ".join(
            texts(task("finance", *corpus, f"task.general_ratio={ratio}", "task.reading_comprehension=true"))
        )
        for ratio in (0, 0.1)
    }
    assert "glucose, insulin, heparin" in asked[0.1] and "glucose, insulin, heparin" not in asked[0]


def test_a_corpus_too_small_to_hold_documents_out_says_so(corpus, tmp_path):
    (tmp_path / "news.jsonl").write_text(json.dumps({"body": "One."}) + "\n")
    with pytest.raises(UserError, match=r"news.jsonl has too few documents: one in a hundred is held out for test"):
        task("finance", *corpus, "task.measured_by=[]").benchmarks(Eval())
    other = Eval(data={"perplexity": str(tmp_path / "news.jsonl")})
    [perplexity] = task("finance", *corpus, "task.measured_by=[]").benchmarks(other)
    assert perplexity.texts == ["One."]


def test_a_folders_own_sets_are_taken_as_they_are(corpus, tmp_path):
    (tmp_path / "folder").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "folder" / f"{split}.jsonl").write_text(json.dumps({"body": f"Of {split}."}) + "\n")
    made = task("finance", *corpus, f"task.data={tmp_path / 'folder'}", "task.measured_by=[]", "task.general_ratio=0")
    assert texts(made) == ["Of train."]
    assert [made.benchmarks(Eval(split=split))[0].texts for split in ("validation", "test")] == [
        ["Of validation."],
        ["Of test."],
    ]


def test_other_instructions_are_another_run(corpus):
    assert {"task.data", "task.general"} <= set(spec("finance", *corpus).content)


def test_a_missing_column_malformed_instructions_and_an_unknown_benchmark_are_named(corpus, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": [{"role": "user"}]}) + "\n")
    with pytest.raises(
        UserError, match=r"bad.jsonl, line 1 : message 1 should have a text `role` and a text `content`"
    ):
        texts(task("finance", *corpus, f"task.general={tmp_path / 'bad.jsonl'}"))
    (tmp_path / "bad.jsonl").write_text('{"chat": []}\n')
    with pytest.raises(UserError, match=r"bad.jsonl, line 1 has no 'messages'.* task.general_columns.messages="):
        texts(task("finance", *corpus, f"task.general={tmp_path / 'bad.jsonl'}"))
    with pytest.raises(UserError, match=r"task.general=/nowhere is no folder.* set: task.general=hub$"):
        texts(task("finance", *corpus, "task.general=/nowhere"))
    with pytest.raises(UserError, match=r"eval.data.perplexity=/nowhere is not there"):
        task("finance", *corpus, "task.measured_by=[]").benchmarks(Eval(data={"perplexity": "/nowhere"}))
    with pytest.raises(UserError, match=r"news.jsonl, line 1 has no 'text'; it has 'body'"):
        texts(task("finance", *corpus, "task.columns.text=text"))
    with pytest.raises(UserError, match=r"task.measured_by=.*there is no mmlu, but convfinqa, fiqa_sa"):
        task("finance", "task.measured_by=[mmlu]")


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("biomed", ["pubmedqa", "usmle", "biommlu", "rct"]),
        ("finance", ["convfinqa", "fiqa_sa", "headline", "ner", "fpb"]),
    ],
)
def test_at_scale_paper_the_papers_columns_are_measured(corpus, name, split, columns):
    made = task(name, "scale=paper", *corpus)
    assert [one.name for one in made.benchmarks(Eval(split=split))] == [*columns, "perplexity"]
    assert made.metric == "mean" and list(made.mean_of) == columns


@BOTH
def test_the_mean_is_that_of_all_the_papers_columns_or_not_there(name):
    columns = task(name).mean_of
    parts = [Scores({column: float(number)}) for number, column in enumerate(columns)]
    assert together(parts, columns).metrics["mean"] == (len(columns) - 1) / 2
    assert "mean" not in together(parts[1:], columns).metrics
    assert "mean" not in together([Scores({"new_facts": 50.0})], columns).metrics


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="WikiText is not beside this checkout")
def test_any_text_serves_as_a_corpus():
    of_wikitext = [f"task.data={WIKITEXT / 'valid.txt'}", "task.measured_by=[]", "task.general_ratio=0"]
    made = task("biomed", *of_wikitext)
    assert len(texts(made)) > 1000
    [perplexity] = made.benchmarks(Eval())
    assert perplexity.texts


@pytest.mark.slow
@BOTH
def test_a_tiny_run_reaches_its_record(command_here, tmp_path, name):
    tiny = [override for override in TINY if not override.startswith(("task=", "task."))]
    arguments = ["train.py", "method=mora", f"task={name}", "r=4", *tiny, "training.max_length=64", "task.tellings=1"]
    command_here(*arguments, "training.steps=8", "eval.limit=40", f"out={tmp_path}")
    [path] = (tmp_path / "runs").glob("*.json")
    record = json.loads(path.read_text())
    assert set(record["metrics"]) == set(ASKED)
    assert record["evaluations"][-1]["counts"] == dict.fromkeys(ASKED, 40)
