"""Instruction tuning (paper, section 5.1): conversations, of which the assistant's turns are trained.

A sample of the generated world (mora_repro/data/instructions.py) in the chat format of Tulu (Wang et al. 2023), with
the parts that the loss is on between arrows:

    <|system|>
    Answer shortly.
    <|user|>
    Name the river of Bado.
    <|assistant|>
    >>Temu</s><<
    <|user|>
    What is 3 plus 9?
    <|assistant|>
    >>12</s><<

At scale paper, the Tulu v2 mixture (Ivison et al. 2023) is trained on, and MMLU (Hendrycks et al. 2021) is asked, with
no and with five examples. In the generated world, `choices` is the share of instructions, in per cent, whose right
answer is the likeliest of four; they are about other things than those that are trained on, and chance is 25. The base
has been told the whole world in plain text, and has seen no conversation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import PositiveInt, PrivateAttr
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..spec.run_spec import Eval
from .benchmarks import Benchmark, Harness, known
from .files import BadRow, Row
from .instructions import Item, draw, options, part_of
from .task import CorpusTask, Sample, Segment, document

Message = Mapping[str, str]  # role, content

ROLES = ("system", "user", "assistant")
SYSTEM = ["Answer shortly.", "You are a helpful assistant.", "Give the answer and nothing else."]
STATEMENTS = 5  # of a text that the base learns
VOCABULARY_TEXTS = 2000


class Instruct(CorpusTask):
    """`data` is generated, hub, or a local file or folder (mora_repro/data/files.py) with `messages` in each row, a
    list of {role, content}.

    `train_limit` and `test_limit` are numbers of conversations and of generated instructions (None: all there are, of a
    data set). `template` is Tulu's chat format, or that of the model's tokenizer.
    """

    template: Literal["tulu", "tokenizer"]
    train_limit: PositiveInt | None
    test_limit: PositiveInt

    _tokenizer: PreTrainedTokenizerBase | None = PrivateAttr(None)

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        if self.template == "tulu":
            return self
        if not tokenizer.chat_template:
            raise UserError(
                f"task.template=tokenizer asks for the tokenizer's own chat template, and "
                f"{tokenizer.name_or_path or 'this tokenizer'} has none. Take Tulu's: task.template=tulu"
            )
        task = self.model_copy()
        task._tokenizer = tokenizer
        return task

    def samples(self) -> Iterable[Sample]:
        if self.data == "generated":
            return (self.sample(messages) for messages in conversations(self.seed, self.train_limit or 3200))
        corpus = replace(self.corpus, check=refuse_malformed)
        rows = corpus.rows("train", {"messages": list}, self.train_limit)
        return (self.sample(row["messages"]) if row else () for row in rows)

    def benchmarks(self, settings: Eval) -> Sequence[Benchmark]:
        if self.data != "generated":
            return known("mmlu", settings)
        return [
            multiple_choice(
                self.seed, settings, self.test_limit, lambda dice, item: self.asking(dice.choice(item.asked))
            )
        ]

    def vocabulary(self) -> Iterable[str]:
        """Plain text and conversations: the base's tokens are those of the run that starts from it."""
        yield from texts(0, VOCABULARY_TEXTS)
        for messages in conversations(0, VOCABULARY_TEXTS):
            yield "".join(segment.text for segment in tulu(messages))

    def sample(self, messages: Sequence[Message]) -> Sample:
        """A conversation; the assistant's turns are trained."""
        return tulu(messages) if self._tokenizer is None else by_template(self._tokenizer, messages)

    def asking(self, instruction: str) -> str:
        """The prompt that asks an instruction."""
        turn = {"role": "user", "content": instruction}
        if self._tokenizer is None:
            return tulu([turn, {"role": "assistant", "content": ""}])[0].text
        return _rendered(self._tokenizer, [turn], asking=True)


class InstructBase(Instruct):
    """What the base learns: the same world in plain text, without a conversation. Asked for how a statement ends."""

    def samples(self) -> Iterable[Sample]:
        return map(document, texts(self.seed, self.train_limit or 3200))

    def benchmarks(self, settings: Eval) -> Sequence[Benchmark]:
        return [multiple_choice(self.seed, settings, self.test_limit, lambda dice, item: f"{dice.choice(item.told)} ")]


def conversations(seed: int, count: int) -> Iterable[Sequence[Message]]:
    """`count` conversations of one to three instructions, some of them after a system turn; a function of the seed."""
    dice = random.Random(f"instruct conversations {seed}")
    items = part_of(seed, "train")
    for _ in range(count):
        messages = [{"role": "system", "content": dice.choice(SYSTEM)}] if dice.random() < 0.3 else []
        for _ in range(dice.randint(1, 3)):
            item = draw(dice, items)
            messages.append({"role": "user", "content": dice.choice(item.asked)})
            messages.append({"role": "assistant", "content": item.answer})
        yield messages


def texts(seed: int, count: int) -> Iterable[str]:
    """`count` plain texts about the whole world; a function of the seed."""
    dice = random.Random(f"instruct texts {seed}")
    items = part_of(seed, None)
    for _ in range(count):
        told = (draw(dice, items) for _ in range(STATEMENTS))
        yield " ".join(f"{dice.choice(item.told)} {item.answer}." for item in told)


def multiple_choice(seed: int, settings: Eval, limit: int, prompt: Callable[[random.Random, Item], str]) -> Harness:
    """Items of the part that the settings ask for, no prompt twice, each with its answer among four options."""
    dice = random.Random(f"instruct {settings.split} {seed}")
    items = part_of(seed, settings.split)
    wanted = min(limit, settings.limit or limit)
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(20 * wanted):
        item = draw(dice, items)
        four, gold = options(dice, item)
        asked = prompt(dice, item)
        rows.setdefault(asked, {"input": asked, "options": four, "gold_index": gold})
        if len(rows) == wanted:
            break
    return Harness("choices", "choices", rows=list(rows.values()))


def refuse_malformed(row: Row) -> None:
    """Raises BadRow where `messages` is no conversation that can be trained on."""
    for number, message in enumerate(row["messages"], 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise BadRow(f": message {number} should have a text `role` and a text `content`: {message!s:.60}")
        if message["role"] not in ROLES:
            raise BadRow(f": message {number} has the role {message['role']!r}; there are {', '.join(ROLES)}.")
    if all(message["role"] != "assistant" for message in row["messages"]):
        raise BadRow("has no turn of the assistant, so that there is nothing to train.")


def tulu(messages: Sequence[Message]) -> Sample:
    """A conversation in Tulu's format; the end token follows each of the assistant's turns, and nothing the last."""
    segments: list[Segment] = []
    before = ""
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "assistant":
            segments += [Segment(f"{before}<|assistant|>\n", trained=False), Segment(content, trained=True, ends=True)]
            before = "\n"
        else:
            before += f"<|{message['role']}|>\n{content}\n"
    return tuple(segments)


def by_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Sample:
    """A conversation in the chat template of a tokenizer, which has its own ends of turns.

    Raises UserError for a template under which a turn changes what stands before it, or that refuses the conversation.
    """
    segments: list[Segment] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = _rendered(tokenizer, messages[:index], asking=True), _rendered(tokenizer, messages[: index + 1])
        if not before.startswith(done) or not after.startswith(before):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} changes earlier turns when one is added, so that it "
                f"can't be told what the assistant says. Take Tulu's: task.template=tulu"
            )
        segments += [Segment(before[len(done) :], trained=False), Segment(after[len(before) :], trained=True)]
        done = after
    return tuple(segments)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], asking: bool = False) -> str:
    """The conversation as text, without the start token, which every sample gets."""
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=asking
        )
    except Exception as error:  # whatever a template raises, such as for a system turn that it does not have
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} refuses a conversation of "
            f"{', '.join(message['role'] for message in messages)} ({error}). Take Tulu's: task.template=tulu"
        ) from error
    return str(text).removeprefix(tokenizer.bos_token or "")
