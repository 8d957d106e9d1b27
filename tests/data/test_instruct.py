"""Conversations: what is trained of them, in both formats; the generated world; bad rows; a run that elicits."""

import json
import re

import pytest
from run_outcome import only_record
from tiny import TINY
from transformers import PreTrainedTokenizerFast

from mora_repro.data.instruct import Instruct, conversations, tulu
from mora_repro.data.instructions import OPTIONS, part_of, world
from mora_repro.data.task import IGNORED, build_task
from mora_repro.data.tokens import tokenise
from mora_repro.errors import UserError
from mora_repro.methods import load_tokenizer
from mora_repro.methods.base import byte_pairs
from mora_repro.spec import RunSpec, compose_config
from mora_repro.spec.run_spec import Eval

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is 1 plus 1?\n"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": " Yes, 2. "},
    {"role": "user", "content": "Thanks."},
]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def spec(*overrides: str) -> RunSpec:
    return RunSpec.from_config(compose_config(["scale=mini", "method=fft", "task=instruct", *overrides]))


def task(*overrides: str) -> Instruct:
    made = build_task(spec(*overrides))
    assert isinstance(made, Instruct)
    return made


def tokenizer(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    made = byte_pairs(["What is 1 plus 1?"], 300)
    made.add_special_tokens(special)
    made.chat_template = template
    return made


def trained_text(tokenizer: PreTrainedTokenizerFast, sample) -> list[str]:
    """The runs of tokens that the loss is on, as text."""
    [example] = tokenise(tokenizer, [sample])
    assert tokenizer.decode(example.input_ids).endswith(sample[-1].text + ("</s>" if sample[-1].ends else ""))
    shown = "".join(
        tokenizer.convert_ids_to_tokens(token) if label != IGNORED else "\0"
        for token, label in zip(example.input_ids, example.labels, strict=True)
    )
    return [tokenizer.convert_tokens_to_string([part]) for part in re.split("\0+", shown) if part]


def test_a_conversation_in_tulus_format_is_trained_on_the_assistants_turns_and_their_ends():
    sample = tulu(MESSAGES[:5])
    assert "".join(segment.text + "</s>" * segment.ends for segment in sample) == (
        "<|system|>\nBe brief.\n<|user|>\nWhat is 1 plus 1?\n<|assistant|>\n2</s>\n"
        "<|user|>\nSure?\n<|assistant|>\nYes, 2.</s>"
    )
    assert trained_text(tokenizer(), sample) == ["2</s>", "Yes, 2.</s>"]


def test_what_follows_the_assistants_last_turn_is_left_out():
    assert tulu(MESSAGES) == tulu(MESSAGES[:5])


def test_the_prompt_that_asks_is_the_one_that_was_trained():
    chat = tokenizer(CHATML, bos_token="<s>", eos_token="<|im_end|>")
    for one in (task(), task("task.template=tokenizer").for_tokenizer(chat)):
        sample = one.sample([{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}])
        assert one.asking("Sure?") == sample[0].text and not sample[0].trained and sample[1].trained


def test_a_tokenizers_own_template_is_trained_on_the_assistants_turns_with_one_start_token():
    chat = tokenizer(CHATML, bos_token="<s>", eos_token="<|im_end|>")
    made = task("task.template=tokenizer").for_tokenizer(chat)
    [example] = tokenise(chat, [made.sample(MESSAGES)])
    assert example.input_ids.count(chat.bos_token_id) == 1 and example.input_ids[0] == chat.bos_token_id
    assert trained_text(chat, made.sample(MESSAGES)) == ["2<|im_end|>\n", " Yes, 2. <|im_end|>\n"]


def test_a_tokenizer_without_a_template_is_refused_with_what_to_do():
    with pytest.raises(UserError, match=r"has none. Take Tulu's: task.template=tulu"):
        task("task.template=tokenizer").for_tokenizer(tokenizer())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "changes earlier turns"),
        ("{{ raise_exception('no system turns') }}", r"refuses a conversation.*no system turns"),
    ],
)
def test_a_template_that_can_not_be_followed_is_refused(template, said):
    with pytest.raises(UserError, match=said):
        task("task.template=tokenizer").for_tokenizer(tokenizer(template)).sample(MESSAGES)


def write(path, *rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hi", r"'messages' should be a list"),
        (["hi"], r"message 1 should have a text `role` and a text `content`"),
        ([{"role": "user", "content": None}], r"message 1 should have a text"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], r"message 2 has the role 'tool'"),
        (MESSAGES[:2], "has no turn of the assistant"),
        ([], "has no turn of the assistant"),
    ],
)
def test_a_malformed_conversation_is_named_by_file_and_line_or_skipped(tmp_path, messages, said):
    write(tmp_path / "chats.jsonl", {"messages": MESSAGES}, {"messages": messages}, {"messages": MESSAGES})
    data = f"task.data={tmp_path / 'chats.jsonl'}"
    with pytest.raises(UserError, match=rf"chats.jsonl, line 2.*{said}"):
        list(task(data).samples())
    assert list(task(data, "task.on_bad_row=skip").samples()) == [tulu(MESSAGES), (), tulu(MESSAGES)]


def test_a_column_of_another_name_is_mapped(tmp_path):
    write(tmp_path / "train.jsonl", {"turns": MESSAGES})
    assert list(task(f"task.data={tmp_path}", "task.columns.messages=turns").samples()) == [tulu(MESSAGES)]


def test_the_generated_world_is_right_and_every_item_has_enough_wrong_answers():
    for item in world():
        assert item.answer not in item.others and len(set(item.others)) >= OPTIONS - 1
        assert all(form.isascii() and "{" not in form for form in item.told + item.asked)
        if item.kind == "sum":
            assert int(item.answer) == sum(map(int, re.findall(r"\d+", item.told[0])))


def test_conversations_and_their_parts_are_a_function_of_the_seed():
    assert list(conversations(0, 50)) == list(conversations(0, 50)) != list(conversations(1, 50))
    assert part_of(0, "test") != part_of(1, "test")


def test_nothing_that_is_asked_is_trained_on_or_asked_in_the_other_split():
    abouts = {
        part: {item.about for items in part_of(3, part).values() for item in items}
        for part in ("train", "validation", "test")
    }
    assert not abouts["train"] & abouts["test"] and not abouts["train"] & abouts["validation"]
    assert not abouts["validation"] & abouts["test"]
    asked = {form for items in part_of(3, "test").values() for item in items for form in item.asked}
    instructions = {turn["content"] for messages in conversations(3, 2000) for turn in messages}
    assert not asked & instructions
    rows = {split: rows_of(Eval(split=split), "seed=3") for split in ("test", "validation")}
    assert not {row["input"] for row in rows["test"]} & {row["input"] for row in rows["validation"]}
    assert {row["input"].split("\n")[1] for row in rows["test"]} <= asked


def rows_of(settings: Eval, *overrides: str) -> list[dict]:
    [choices] = task(*overrides).benchmarks(settings)
    assert choices.name == "choices"
    return list(choices.rows)


def test_the_options_are_distinct_and_the_gold_one_is_the_answer():
    answers = {form: item.answer for item in world() for form in item.asked}
    rows = rows_of(Eval())
    assert len({row["input"] for row in rows}) == len(rows) == 200
    for row in rows:
        assert len(set(row["options"])) == OPTIONS
        assert row["options"][row["gold_index"]] == answers[row["input"].split("\n")[1]]
    assert {row["gold_index"] for row in rows} == {0, 1, 2, 3}
    assert len(rows_of(Eval(limit=7))) == 7


def test_the_base_is_told_the_whole_world_and_sees_no_conversation():
    texts = [sample[0].text for sample in task("task=instruct_base").samples()]
    assert not any("<|" in text for text in texts)
    told = " ".join(texts)
    assert all(any(f"{form} {item.answer}." in told for form in item.told) for item in world())


def test_a_run_and_its_base_have_the_same_tokens():
    run = spec("task.seed=4")
    assert load_tokenizer(run).get_vocab() == load_tokenizer(run.base_spec()).get_vocab()


def test_a_corpus_is_measured_by_mmlu_with_no_and_five_examples(tmp_path):
    write(tmp_path / "train.jsonl", {"messages": MESSAGES})
    asked = task(f"task.data={tmp_path}").benchmarks(Eval(split="validation", limit=3))
    assert [(one.name, one.shots, one.validation, one.limit) for one in asked] == [
        ("mmlu_0shot", 0, True, 3),
        ("mmlu_5shot", 5, True, 3),
    ]


@pytest.mark.slow
def test_a_tiny_run_reaches_its_record_with_a_standard_error(command_here, tmp_path):
    tiny = [override for override in TINY if not override.startswith(("task=", "task."))]
    small = ["task.train_limit=48", "task.test_limit=40", f"out={tmp_path}"]
    command_here("train.py", "method=mora", "r=4", "task=instruct", *tiny, *small)
    record = only_record(tmp_path)
    assert set(record.metrics) == {"choices"} and record.evaluations[-1].counts == {"choices": 40}
    assert record.evaluations[-1].stderr["choices"] > 0
