"""Continual pretraining on a domain (paper, section 5): what `biomed` and `finance` share.

At scale paper, documents of the domain are mixed with general instructions, and the paper's benchmarks are asked. At
scale mini, a generated world takes their place. It has entities with invented names, each with one value for each of
the domain's relations, a fact. Documents tell them, and questions ask them. The general part of the world is the
same for every seed: the base learns it from documents and questions. The domain is as many other entities, drawn by
the task's seed, of which there are documents alone. So a question about them measures what was
memorised from the documents, and one about the general part whether the base's knowledge has stayed.

Measured at scale mini, in per cent:

- new_facts: the right one of four values is the likeliest answer, for facts of the domain; chance is 25.
- short_answers: numbers of the domain, by greedy generation; chance is 6.
- old_facts: as new_facts, for facts of the general part that only its documents tell; the base knows most of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any, ClassVar

from pydantic import NonNegativeFloat, PositiveInt, field_validator

from ..errors import UserError
from ..spec.run_spec import Eval
from .benchmarks import Benchmark, Harness, Questions, known, longest_of
from .files import Corpus
from .instruct import refuse_malformed, tulu
from .reading import comprehend, domain_keywords
from .task import Sample, document
from .texts import TextTask

ENTITIES = 100  # of the general part, and of the domain
CHOICES = 4  # of a multiple-choice question
HELD_OUT = 1000  # documents of a corpus whose perplexity is measured
KEYWORD_TEXTS = 2000  # of the domain, and as many general ones, by which the domain's keywords are found
ASKED = {"new_facts": 200, "short_answers": 100, "old_facts": 100}  # in each of the splits test and validation


@dataclass(frozen=True)
class Relation:
    """What an entity has one value of. `told` are sentences with {name} and {value}, `asked` questions with {name}.

    A sentence has the name before the value: a model that learns to go from a name to a value has learned nothing
    about the way back. It starts with neither, so that a name follows a space wherever it stands.
    """

    values: tuple[str, ...]
    told: tuple[str, ...]
    asked: tuple[str, ...]
    number: bool = False


@dataclass(frozen=True)
class Fact:
    """An entity's value for a relation."""

    name: str
    relation: Relation
    value: str

    def telling(self, dice: random.Random) -> str:
        """A sentence that tells it."""
        return dice.choice(self.relation.told).format(name=self.name, value=self.value)

    def question(self, dice: random.Random) -> tuple[str, str]:
        """A prompt that asks it, and the answer."""
        question = dice.choice(self.relation.asked).format(name=self.name)
        return f"Question: {question}\nAnswer:", f" {self.value}"

    def choice(self, dice: random.Random) -> dict[str, Any]:
        """A multiple-choice row for lm-eval: the prompt, CHOICES values, and the index of the right one."""
        wrong = [value for value in self.relation.values if value != self.value]
        gold = dice.randrange(CHOICES)
        options = dice.sample(wrong, CHOICES - 1)
        options.insert(gold, self.value)
        prompt, _ = self.question(dice)
        return {"input": prompt, "options": [f" {value}" for value in options], "gold_index": gold}


@dataclass(frozen=True)
class World:
    """A generated domain. A name is one of `starts` and one of `ends`, each of which is a token."""

    name: str
    starts: tuple[str, ...]
    ends: tuple[str, ...]
    relations: tuple[Relation, ...]

    def general_facts(self) -> list[Fact]:
        """All facts of the general part, by entity."""
        return self._facts(self._names()[:ENTITIES], random.Random(f"{self.name} general facts"))

    def old_facts(self, split: str) -> list[Fact]:
        """Facts of the general part that are asked in a split, and of which no question is trained on."""
        dice = random.Random(f"{self.name} old facts")
        return asked(self.general_facts(), "old_facts", split, dice)

    def general_questions(self) -> list[Fact]:
        """Facts of the general part of which questions are trained on: all that are not asked."""
        held_out = {*self.old_facts("test"), *self.old_facts("validation")}
        return [fact for fact in self.general_facts() if fact not in held_out]

    def new_facts(self, seed: int) -> list[Fact]:
        """All facts of the domain of a seed, by entity."""
        dice = random.Random(f"{self.name} new facts {seed}")
        return self._facts(dice.sample(self._names()[ENTITIES:], ENTITIES), dice)

    def _names(self) -> list[str]:
        names = [start + end for start in self.starts for end in self.ends]
        random.Random(f"{self.name} names").shuffle(names)
        return names

    def _facts(self, names: list[str], dice: random.Random) -> list[Fact]:
        return [Fact(name, relation, dice.choice(relation.values)) for name in names for relation in self.relations]

    def vocabulary(self) -> Iterator[str]:
        """Every word of the world, the parts of names by far the most often, so that each becomes a token."""
        for _ in range(100):
            yield from (f" {start}" for start in self.starts)
            yield from self.ends
        for relation in self.relations:
            for text in (*relation.told, *relation.asked):
                text = text.format(name="", value="")
                yield from (text, f"Question: {text}\nAnswer:")
            yield from (f" {value}" for value in relation.values)


class Domain(TextTask):
    """`general` is where the general instructions are, hub or local (of no use where `data` is generated);
    `general_hub` and `general_columns` are for them what `hub` and `columns` are for the documents. `general_ratio` is
    how many of their characters there are for each of a document's.

    `reading_comprehension` puts questions mined from it behind each document of a corpus; those that start from the
    domain's keywords need the general instructions, to tell which words these are. `measured_by` are the
    benchmarks, some of `mean_of`. A generated world tells of each entity `tellings` times, each time in other words,
    and `general_only` leaves the domain out.
    """

    general: str
    general_hub: dict[str, dict[str, str | None]]
    general_columns: dict[str, str]
    general_ratio: NonNegativeFloat
    measured_by: tuple[str, ...]
    reading_comprehension: bool
    tellings: PositiveInt
    general_only: bool

    world: ClassVar[World]

    @field_validator("measured_by")
    @classmethod
    def _check_measured_by(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in cls.mean_of]:
            raise ValueError(f"there is no {unknown[0]}, but {', '.join(cls.mean_of)}")
        return names

    def samples(self) -> Iterable[Sample]:
        if self.general_only:
            return self._general()
        return mixed(self._documents(), self._general, self.general_ratio)

    def _documents(self) -> Iterator[Sample]:
        if self.data == "generated":
            dice = random.Random(f"{self.world.name} documents {self.seed}")
            facts = self.world.new_facts(self.seed)
            for _ in range(self.tellings):
                yield from map(document, documents(facts, dice))
            return
        keywords = self._keywords() if self.reading_comprehension else frozenset()
        for text in self.texts("train"):
            if text is None:
                yield ()
            else:
                yield document(comprehend(text, self.seed, keywords) if self.reading_comprehension else text)

    def _keywords(self) -> frozenset[str]:
        """The domain's, by its first documents; none where there are no general instructions to compare them with."""
        if not self.general_ratio:
            return frozenset()
        texts = (text for text in self.texts("train") if text is not None)
        general = (segment.text for segment in chain.from_iterable(self._general()) if segment.trained)
        return domain_keywords(islice(texts, KEYWORD_TEXTS), islice(general, KEYWORD_TEXTS))

    def _general(self) -> Iterator[Sample]:
        if self.data == "generated":
            dice = random.Random(f"{self.world.name} general samples")
            for _ in range(self.tellings):
                texts = documents(self.world.general_facts(), dice)
                texts += ["".join(fact.question(dice)) for fact in self.world.general_questions()]
                dice.shuffle(texts)
                yield from map(document, texts)
            return
        corpus = Corpus(
            self.general, self.general_hub, self.general_columns, self.on_bad_row, refuse_malformed, "task.general"
        )
        try:
            for row in corpus.rows("train", {"messages": list}):
                yield tulu(row["messages"]) if row else ()
        except UserError as error:
            words = str(error).replace("task.columns", "task.general_columns").replace("task.hub", "task.general_hub")
            raise UserError(f"the general instructions (without any: task.general_ratio=0): {words}") from error

    def benchmarks(self, settings: Eval) -> Sequence[Benchmark]:
        if self.data == "generated":
            return self._generated_benchmarks(settings)
        chosen = [one for name in self.measured_by for one in known(name, settings)]
        return [*chosen, self.held_out(settings, HELD_OUT)]

    def _generated_benchmarks(self, settings: Eval) -> list[Benchmark]:
        new = self.world.new_facts(self.seed)
        dice = random.Random(f"{self.world.name} questions {self.seed}")
        chosen = asked(new, "new_facts", settings.split, dice)[: settings.limit]
        numbers = asked(new, "short_answers", settings.split, dice)[: settings.limit]
        old = self.world.old_facts(settings.split)[: settings.limit]
        pairs = [fact.question(dice) for fact in numbers]
        return [
            Harness("new_facts", f"{self.world.name}_new_facts", rows=[fact.choice(dice) for fact in chosen]),
            Questions("short_answers", pairs, score, longest_of(pairs)),
            Harness("old_facts", f"{self.world.name}_old_facts", rows=[fact.choice(dice) for fact in old]),
        ]

    def vocabulary(self) -> Iterable[str]:
        return self.world.vocabulary()


def score(answer: str, gold: str) -> dict[str, tuple[float, float]]:
    """short_answers: the answer is the gold one, number and unit."""
    return {"short_answers": (answer.strip() == gold.strip(), 1)}


def asked(facts: list[Fact], metric: str, split: str, dice: random.Random) -> list[Fact]:
    """The facts that a split's questions are about, ASKED[metric] of them: numbers for short_answers, else others.

    With equal dice, those of test and of validation are different ones.
    """
    askable = [fact for fact in facts if fact.relation.number == (metric == "short_answers")]
    dice.shuffle(askable)
    count = ASKED[metric]
    return askable[:count] if split == "test" else askable[count : 2 * count]


def documents(facts: list[Fact], dice: random.Random) -> list[str]:
    """A text for each entity, with its facts in any order and any words; the texts in any order."""
    texts = []
    for _, group in groupby(facts, lambda fact: fact.name):
        of_one = list(group)
        dice.shuffle(of_one)
        texts.append(" ".join(fact.telling(dice) for fact in of_one))
    dice.shuffle(texts)
    return texts


def mixed(texts: Iterable[Sample], general: Callable[[], Iterable[Sample]], ratio: float) -> Iterator[Sample]:
    """Documents, with general samples between them: `ratio` of their characters for each of a document's.

    Where the general samples end, they start over.
    """
    owed = 0.0
    others: Iterator[Sample] = iter(())
    for text in texts:
        yield text
        owed += ratio * _length(text)
        while owed > 0:
            sample = next(others, None)
            if sample is None:
                others = iter(general())
                continue
            yield sample
            owed -= _length(sample)


def _length(sample: Sample) -> int:
    return sum(len(segment.text) for segment in sample)
