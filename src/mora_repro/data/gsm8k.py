"""Word problems with a chain of steps and a final number.

A sample of the generated world, with the part that the loss is on between arrows:

    Mia has 14 figs. Mia gets 5 more. Mia gives 8 to Tom. How many figs?
    >>14+5=19
    19-8=11
    #### 11</s><<

At scale paper, MetaMathQA (Yu et al. 2023) is trained on and GSM8K (Cobbe et al. 2021) is asked, both in the
instruction form of MetaMath. `task.data=<folder>` takes files in the schema of openai/gsm8k instead.

Measured by exact match: the share of questions, in per cent, whose generated answer ends in the gold number.
The number is the one after `####` or "The answer is", else the last in the text; commas, currency signs and
a trailing point are left out, and numbers are compared by value, so that 18 and 18.00 are the same.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Literal

from pydantic import Field, PositiveInt, field_validator
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..spec.run_spec import Eval
from .benchmarks import Questions
from .files import Corpus, Split
from .task import Sample, Task, pair

NAMES = ["Mia", "Tom", "Ana", "Ben", "Zoe", "Max", "Eva", "Sam", "Lea", "Jon"]
THINGS = ["figs", "pens", "eggs", "cups", "keys", "hats", "nuts", "cards", "shells", "stamps"]
LARGEST = 20  # of all numbers in the generated world
CHANGE = 5  # the most that a step adds or takes

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_MARK = re.compile(r"####|answer is:?", re.IGNORECASE)


class Gsm8k(Task):
    """`data` is generated, hub, a folder or a file; the limits are numbers of problems (None: all there are).

    `steps` bounds the steps of a generated problem, and `prompt` holds `{question}`. `hub`, `columns` and `on_bad_row`
    are those of a Corpus. An answer may take `max_new_tokens`, and in a user's files more, where nine of ten gold
    answers need more.
    """

    hub: dict[str, dict[str, str | None]]
    columns: dict[str, str] = Field(default={})
    on_bad_row: Literal["stop", "skip"] = "stop"
    steps: tuple[PositiveInt, PositiveInt]
    prompt: str
    train_limit: PositiveInt | None
    test_limit: PositiveInt | None
    max_new_tokens: PositiveInt

    @field_validator("steps")
    @classmethod
    def _check_steps(cls, steps: tuple[int, int]) -> tuple[int, int]:
        if steps[0] > steps[1]:
            raise ValueError("the first number is the smallest number of steps, and the second the largest")
        return steps

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        if "{question}" not in prompt:
            raise ValueError("the prompt needs {question}, where the question is put")
        return prompt

    @property
    def _from_files(self) -> bool:
        return self.data not in ("generated", "hub")

    def samples(self) -> Iterable[Sample]:
        return (pair(self.asking(row[0]), row[1]) if row else () for row in self.rows("train"))

    def benchmarks(self, settings: Eval) -> Sequence[Questions]:
        asked = [(self.asking(row[0]), row[1]) for row in self.rows("test") if row]
        return [Questions("gsm8k", asked, score, lambda tokenizer: self._longest_answer(tokenizer, asked))]

    def asking(self, question: str) -> str:
        """The prompt that asks a question."""
        return self.prompt.replace("{question}", question)

    def rows(self, split: Split) -> Iterable[tuple[str, str] | None]:
        """(question, answer) of "train" or "test"; None for a row that is skipped."""
        limit = self.train_limit if split == "train" else self.test_limit
        if self.data == "generated":
            # The test comes first, so that the training problems can leave its questions out.
            test = generate(self.seed, "test", self.test_limit or 200, self.steps)
            if split == "test":
                return test
            return generate(self.seed, "train", limit or 4000, self.steps, {question for question, _ in test})
        corpus = Corpus(self.data, self.hub, self.columns, self.on_bad_row)
        rows = corpus.rows(split, {"question": str, "answer": str}, limit)
        return ((row["question"], row["answer"]) if row else None for row in rows)

    def notices(self) -> list[str]:
        if not self._from_files or not (self.train_limit or self.test_limit):
            return []
        return [
            f"of {self.data}, at most {self.train_limit} problems are trained on and {self.test_limit} asked "
            f"(None: no limit); all of them: task.train_limit=null task.test_limit=null"
        ]

    def _longest_answer(self, tokenizer: PreTrainedTokenizerBase, asked: list[tuple[str, str]]) -> int:
        if not self._from_files:
            return self.max_new_tokens
        lengths = sorted(len(tokenizer(gold, add_special_tokens=False).input_ids) + 1 for _, gold in asked)
        return max(self.max_new_tokens, lengths[9 * (len(lengths) - 1) // 10])


def score(answer: str, gold: str) -> dict[str, tuple[float, float]]:
    """exact_match: the answer's final number is the gold one."""
    number = final_number(gold)
    return {"exact_match": (number is not None and final_number(answer) == number, 1)}


def final_number(text: str) -> Decimal | None:
    """The answer's number: after the last mark, else the last of the text; None where there is none."""
    marks = list(_MARK.finditer(text))
    if marks and (after := _NUMBER.search(text, marks[-1].end())):
        found = after.group()
    elif numbers := _NUMBER.findall(text):
        found = numbers[-1]
    else:
        return None
    try:
        return Decimal(found.replace(",", ""))
    except InvalidOperation:
        return None


def generate(
    seed: int, split: str, count: int, steps: tuple[int, int], leave_out: set[str] | None = None
) -> list[tuple[str, str]]:
    """`count` different problems of `steps[0]` to `steps[1]` steps, none of `leave_out`; a function of the seed."""
    dice = random.Random(f"gsm8k {split} {seed}")
    taken = set(leave_out or ())
    problems: list[tuple[str, str]] = []
    repeated = 0  # in a row
    while len(problems) < count:
        question, answer = _problem(dice, dice.randint(*steps))
        if question not in taken:
            taken.add(question)
            problems.append((question, answer))
            repeated = 0
            continue
        repeated += 1
        if repeated > 1000:
            raise UserError(
                f"task.data=generated has too few different problems of {steps[0]} to {steps[1]} steps for "
                f"{count}; ask for fewer (task.train_limit={len(problems)}) or more steps (task.steps=[2,6])."
            )
    return problems


def _problem(dice: random.Random, steps: int) -> tuple[str, str]:
    """A problem about one person's things: more, fewer or twice as many at each step, never above LARGEST."""
    name, other = dice.sample(NAMES, 2)
    thing = dice.choice(THINGS)
    now = dice.randint(2, 10)
    told, chain = [f"{name} has {now} {thing}."], []
    for _ in range(steps):
        kinds = ["more"] * (now < LARGEST) + ["fewer"] * (now > 1) + ["twice"] * (1 < now <= LARGEST // 2)
        kind = dice.choice(kinds)
        if kind == "more":
            change = dice.randint(1, min(CHANGE, LARGEST - now))
            told.append(dice.choice([f"{name} gets {change} more.", f"{other} adds {change}."]))
            step, after = f"{now}+{change}", now + change
        elif kind == "fewer":
            change = dice.randint(1, min(CHANGE, now - 1))
            told.append(dice.choice([f"{name} gives {change} to {other}.", f"{change} are lost."]))
            step, after = f"{now}-{change}", now - change
        else:
            told.append("The number doubles.")
            step, after = f"{now}*2", now * 2
        chain.append(f"{step}={after}")
        now = after
    told.append(f"How many {thing}?")
    return " ".join(told), "\n".join([*chain, f"#### {now}"])
