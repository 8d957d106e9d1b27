"""Word problems with a chain of steps and a final number.

A sample of the generated world, with the part that the loss is on between arrows:

    Mia has 14 figs. Mia gets 5 more. Mia gives 8 to Tom. How many figs?
    >>14+5=19
    19-8=11
    #### 11</s><<

At scale paper, MetaMathQA (Yu et al. 2023) is trained on, and GSM8K (Cobbe et al. 2021) and MATH are asked, all in
the instruction form of MetaMath. `task.data=<folder>` takes files in the schema of openai/gsm8k instead.

Measured by exact match: the share of questions, in per cent, whose generated answer ends in the gold number, or of
MATH in the gold expression (answers.py). With `task.math`, MATH (Hendrycks et al. 2021) is asked too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from pydantic import PositiveInt, field_validator
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..spec.run_spec import Eval
from .answers import equal, final_expression, final_number
from .benchmarks import Questions
from .files import Split
from .sources import rows_of
from .task import CorpusTask, Sample, pair

NAMES = ["Mia", "Tom", "Ana", "Ben", "Zoe", "Max", "Eva", "Sam", "Lea", "Jon"]
THINGS = ["figs", "pens", "eggs", "cups", "keys", "hats", "nuts", "cards", "shells", "stamps"]
LARGEST = 20  # of all numbers in the generated world
CHANGE = 5  # the most that a step adds or takes

Score = Callable[[str, str], dict[str, tuple[float, float]]]


class Gsm8k(CorpusTask):
    """`data` is generated, hub, a folder or a file; the limits are numbers of problems (None: all there are).

    `steps` bounds the steps of a generated problem, and `prompt` holds `{question}`. `math` is MATH's data set on the
    hub, or None where it is not asked. An answer may take `max_new_tokens`, and in a user's files more, where nine of
    ten gold answers need more.
    """

    steps: tuple[PositiveInt, PositiveInt]
    prompt: str
    train_limit: PositiveInt | None
    test_limit: PositiveInt | None
    max_new_tokens: PositiveInt
    math: Literal["EleutherAI/hendrycks_math"] | None

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
        validation, data = settings.split == "validation", settings.data
        if "gsm8k" in data:
            rows = [(row["question"], row["answer"]) for row in rows_of("gsm8k", data["gsm8k"], settings.split)]
        else:
            rows = [row for row in self.rows(settings.split) if row]
        benchmarks = [self._questions("gsm8k", rows, score, settings.limit)]
        if "math" in data or (self.math and not validation):
            found = rows_of("math", data.get("math"), settings.split)
            rows = [(row["problem"], row["solution"]) for row in found]
            benchmarks.append(self._questions("math", rows, math_score, settings.limit))
        elif self.math and self.data == "hub":
            benchmarks.append(self._questions("math", self._held_out("MATH"), math_score, settings.limit))
        return benchmarks

    def _questions(self, name: str, rows: list[tuple[str, str]], scored_by: Score, limit: int | None) -> Questions:
        asked = [(self.asking(question), answer) for question, answer in rows[:limit]]
        return Questions(name, asked, scored_by, lambda tokenizer: self._longest_answer(tokenizer, asked))

    def asking(self, question: str) -> str:
        """The prompt that asks a question."""
        return self.prompt.replace("{question}", question)

    def rows(self, split: Split) -> Iterable[tuple[str, str] | None]:
        """(question, answer) of a split; None for a row that is skipped.

        Of MetaMathQA, and of files without a validation set, about two training questions in a hundred are left out of
        training, with all that is made from them; one of the two is in the validation set.
        """
        limit = self.train_limit if split == "train" else self.test_limit
        if self.data == "generated":
            return self._generated(split)
        columns = {"question": str, "answer": str}
        if split == "test":  # is never held out: a corpus has one
            rows = self.corpus.rows(split, columns, limit)
        elif split == "validation" and self.data == "hub" and not self.corpus.has(split):
            return self._held_out("GSM")[:limit]
        else:
            rows = self.corpus.own_or_held_out(split, columns, self._key, limit)
        return ((row["question"], row["answer"]) if row else None for row in rows)

    @property
    def _key(self) -> str:
        """The column that tells which rows are made from the same question."""
        named = self.data == "hub" or "original_question" in self.columns
        return "original_question" if named else "question"

    def _held_out(self, kind: Literal["GSM", "MATH"]) -> list[tuple[str, str]]:
        """MetaMathQA's validation questions that come from GSM8K or from MATH, as they were before any rephrasing."""
        columns = dict.fromkeys(("question", "answer", "original_question", "type"), str)
        rows = self.corpus.held_out("validation", columns, "original_question")
        taken = (row for row in rows if row and row["type"].startswith(kind))
        originals = (row for row in taken if row["question"] == row["original_question"])
        return list({row["question"]: row["answer"] for row in originals}.items())

    def _generated(self, split: Split) -> list[tuple[str, str]]:
        """Training leaves out the test set's questions, and validation those of both."""
        count = self.test_limit or 200
        test = generate(self.seed, "test", count, self.steps)
        if split == "test":
            return test
        asked = {question for question, _ in test}
        train = generate(self.seed, "train", self.train_limit or 4000, self.steps, asked)
        if split == "train":
            return train
        return generate(self.seed, "validation", count, self.steps, asked | {question for question, _ in train})

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


def math_score(answer: str, gold: str) -> dict[str, tuple[float, float]]:
    """math_exact_match: the answer's final expression is that of the gold solution."""
    return {"math_exact_match": (equal(final_expression(answer), final_expression(gold, boxed_first=True)), 1)}


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
