"""The generated world of instructions: what is known of invented towns, and sums.

Each item can be told, in plain text, and asked, as an instruction; its answer can be verified:

    told    The river of Bado is Temu.        asked   Name the river of Bado.  ->  Temu
    told    Together 3 and 9 make 12.         asked   Tell me 3 plus 9.        ->  12

The world is the same for every seed, so that a base can have learned it; a seed decides what of it the instructions
are about that are trained on, and what those are about that are asked.
"""

from __future__ import annotations

import random
from functools import cache
from typing import NamedTuple

from .files import Split

TOWNS = 60
VALUES = 12  # of a relation
LARGEST = 9  # number in a sum
OPTIONS = 4

# By kind: how it is told up to the answer, and how it is asked.
FORMS = {
    "river": (
        ["The river of {} is", "{} lies on the river", "By {} flows the river"],
        ["What is the river of {}?", "Name the river of {}.", "Tell me the river of {}."],
    ),
    "dish": (
        ["The dish of {} is", "In {} people eat", "At {} the cooks make"],
        ["What is the dish of {}?", "Name the dish of {}.", "Tell me the dish of {}."],
    ),
    "craft": (
        ["The craft of {} is", "In {} people build", "From {} the traders bring"],
        ["What is the craft of {}?", "Name the craft of {}.", "Tell me the craft of {}."],
    ),
    "sum": (
        ["{} plus {} is", "Together {} and {} make"],
        ["What is {} plus {}?", "Add {} and {}.", "Tell me {} plus {}."],
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
            near = [str(one + two + off) for off in range(-3, 4) if one + two + off >= 0]
            items.append(_item("sum", f"{one} plus {two}", [str(one), str(two)], str(one + two), near))
    return items


def _item(kind: str, about: str, given: list[str], answer: str, values: list[str]) -> Item:
    told, asked = ([form.format(*given) for form in forms] for forms in FORMS[kind])
    return Item(kind, about, told, asked, answer, [value for value in values if value != answer])


@cache
def part_of(seed: int, part: Split | None) -> dict[str, list[Item]]:
    """The items of a part by kind: half of the world is trained on, a quarter each are for validation and test.

    None: the whole world.
    """
    abouts = sorted({item.about for item in world()})
    random.Random(f"instruct parts {seed}").shuffle(abouts)
    names: tuple[Split, ...] = ("train", "train", "validation", "test")
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
