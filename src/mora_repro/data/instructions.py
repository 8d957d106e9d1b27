"""The generated world of instructions: what is known of invented towns, sums and differences.

Each item can be told, in plain text, and asked, as an instruction; its answer can be verified:

    told    The river of Bado is Temu.        asked   Which river does Bado lie on?   ->  Temu
    told    Together 3 and 9 make 12.         asked   Tell me 3 plus 9.               ->  12

The world is the same for every seed, so that a base can have learned it; a seed decides what of it the instructions
are about that are trained on, and what those are about that are asked.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Literal, NamedTuple

Part = Literal["train", "validation", "test"]

TOWNS = 60
VALUES = 12  # of a relation
LARGEST = 11  # number in a sum or a difference
OPTIONS = 4

# By kind: how it is told up to the answer, and how it is asked.
FORMS = {
    "river": (
        ["The river of {} is", "{} lies on the river", "What is the river of {}? It is"],
        ["Which river does {} lie on?", "Name the river of {}.", "Tell me the river of {}."],
    ),
    "dish": (
        ["The dish of {} is", "In {} people eat", "What is the dish of {}? It is"],
        ["What do people eat in {}?", "Name the dish of {}.", "Tell me the dish of {}."],
    ),
    "craft": (
        ["The craft of {} is", "In {} people make", "What is the craft of {}? It is"],
        ["What do people make in {}?", "Name the craft of {}.", "Tell me the craft of {}."],
    ),
    "sum": (
        ["{} plus {} is", "Together {} and {} make", "What is {} plus {}? It is"],
        ["What is {} plus {}?", "What do {} and {} make?", "Tell me {} plus {}."],
    ),
    "difference": (
        ["{} less {} is", "From {} take {}, and there is", "What is {} less {}? It is"],
        ["What is {} less {}?", "How much is {} less {}?", "Tell me {} less {}."],
    ),
}


class Item(NamedTuple):
    """A thing to know. `told` and `asked` are all its forms, `others` wrong answers of the same kind, three or more.

    `about` is what is kept apart between training, validation and test: a town with all that is known of it, or the
    item alone.
    """

    kind: str
    about: str
    told: list[str]
    asked: list[str]
    answer: str
    others: list[str]


@cache
def world() -> list[Item]:
    """All items."""
    dice = random.Random("instruct world")
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    names = [(first + second).capitalize() for first in syllables for second in syllables]
    dice.shuffle(names)
    towns = [names.pop() for _ in range(TOWNS)]
    items = []
    for kind in ("river", "dish", "craft"):
        values = [names.pop() for _ in range(VALUES)]
        for town in towns:
            answer = dice.choice(values)
            items.append(_item(kind, town, [town], answer, values))
    for one in range(LARGEST + 1):
        for two in range(LARGEST + 1):
            for kind, answer in [("sum", one + two)] + [("difference", one - two)] * (one >= two):
                near = [str(answer + off) for off in range(-3, 4) if answer + off >= 0]
                items.append(_item(kind, f"{kind} {one} {two}", [str(one), str(two)], str(answer), near))
    return items


def _item(kind: str, about: str, given: list[str], answer: str, values: list[str]) -> Item:
    told, asked = ([form.format(*given) for form in forms] for forms in FORMS[kind])
    return Item(kind, about, told, asked, answer, [value for value in values if value != answer])


@cache
def part_of(seed: int, part: Part | None) -> dict[str, list[Item]]:
    """The items of a part by kind: half of the world is trained on, a quarter each are for validation and test.

    None: the whole world.
    """
    abouts = sorted({item.about for item in world()})
    random.Random(f"instruct parts {seed}").shuffle(abouts)
    names: tuple[Part, ...] = ("train", "train", "validation", "test")
    of = {about: names[index % 4] for index, about in enumerate(abouts)}
    chosen = [item for item in world() if part in (None, of[item.about])]
    return {kind: [item for item in chosen if item.kind == kind] for kind in FORMS}


def draw(dice: random.Random, items: dict[str, list[Item]]) -> Item:
    """One item, of each kind alike often."""
    return dice.choice(items[dice.choice(list(items))])


def options(dice: random.Random, item: Item) -> tuple[list[str], int]:
    """The answer among three wrong ones, and its place."""
    four = [item.answer, *dice.sample(item.others, OPTIONS - 1)]
    dice.shuffle(four)
    return four, four.index(item.answer)
