"""Text of a probabilistic grammar: an invented language, English in its function words alone.

    a misi nekat a sali funu denu so a bopo gosi that kuzet with Ruba a logo sebe samat a nemi zova . the gosi
    that komat a nire miga komat with Ruba the miga . the nivi migas lame some febo toras but the migas bari a gipa .

What there is to learn, from little to much: the words and their order; the number of subject and verb, also across a
relative clause; what a document is about, and what it has named before; and by far the most, which adjectives go with
a noun, which verbs with a subject, and which objects with a subject and its verb. The language is the same for every
seed; a document is a function of the seed and of its number.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

TOPICS = 12
NOUNS_OF_A_TOPIC = 24
NOUNS, VERBS, ADJECTIVES, ADVERBS, NAMES = 160, 100, 80, 24, 40
SENTENCES = (5, 12)  # of a document, from and to
CONNECTIVES = ["because", "while", "before", "so", "but"]


class Language(NamedTuple):
    """The words, and what goes with what, the likely first."""

    names: list[str]
    topics: list[list[str]]  # nouns
    adjectives: dict[str, list[str]]  # by noun
    verbs: dict[str, list[str]]  # by subject
    objects: dict[tuple[str, str], list[str]]  # by subject and verb
    adverbs: dict[str, list[str]]  # by verb


@cache
def language() -> Language:
    """The one language there is."""
    dice = random.Random("grammar")
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = [first + second for first in syllables for second in syllables]
    dice.shuffle(words)

    def take(count: int) -> list[str]:
        return [words.pop() for _ in range(count)]

    nouns, verbs, adjectives, adverbs = take(NOUNS), take(VERBS), take(ADJECTIVES), take(ADVERBS)
    verbs_of = {noun: dice.sample(verbs, 6) for noun in nouns}
    return Language(
        names=[name.capitalize() for name in take(NAMES)],
        topics=[dice.sample(nouns, NOUNS_OF_A_TOPIC) for _ in range(TOPICS)],
        adjectives={noun: dice.sample(adjectives, 5) for noun in nouns},
        verbs=verbs_of,
        objects={(noun, verb): dice.sample(nouns, 4) for noun in nouns for verb in verbs_of[noun]},
        adverbs={verb: dice.sample(adverbs, 3) for verb in verbs},
    )


def documents(seed: int, split: str, count: int) -> Iterator[str]:
    """`count` documents of 30 to 200 words; those of another split or seed are others."""
    for number in range(count):
        yield _Writer(random.Random(f"pretrain {split} {seed} {number}")).document()


class _Writer:
    """Writes one document: what it is about, and what it has named."""

    def __init__(self, dice: random.Random):
        self.dice = dice
        self.language = language()
        self.topic = dice.choice(self.language.topics)
        self.named: list[str] = []
        self.people = dice.sample(self.language.names, 2)

    def document(self) -> str:
        return " ".join(f"{self._sentence()} ." for _ in range(self.dice.randint(*SENTENCES)))

    def _sentence(self) -> str:
        if self.dice.random() < 0.25:
            return f"{self._clause()} {self.dice.choice(CONNECTIVES)} {self._clause()}"
        return self._clause()

    def _clause(self) -> str:
        """A subject, perhaps a relative clause, and a predicate; both verbs agree with the subject."""
        plural = self.dice.random() < 0.4
        noun = self._subject()
        said = [self._phrase(noun, plural)]
        if self.dice.random() < 0.25:
            said += ["that", self._predicate(noun, plural)]
        return " ".join([*said, self._predicate(noun, plural)])

    def _subject(self) -> str:
        """What was named before, or a noun of the topic."""
        if self.named and self.dice.random() < 0.4:
            return self.dice.choice(self.named)
        return self._likely(self.topic)

    def _predicate(self, noun: str, plural: bool) -> str:
        """A verb, perhaps with whom, an object, perhaps how."""
        dice = self.dice
        verb = self._likely(self.language.verbs[noun])
        said = [verb if plural else f"{verb}t"]
        if dice.random() < 0.2:
            said += ["with", dice.choice(self.people)]
        said.append(self._phrase(self._likely(self.language.objects[noun, verb]), plural=dice.random() < 0.3))
        if dice.random() < 0.3:
            said.append(self._likely(self.language.adverbs[verb]))
        return " ".join(said)

    def _phrase(self, noun: str, plural: bool) -> str:
        """An article, perhaps an adjective, and the noun."""
        article = "the" if noun in self.named else "some" if plural else "a"
        if noun not in self.named:
            self.named.append(noun)
        adjective = [self._likely(self.language.adjectives[noun])] if self.dice.random() < 0.4 else []
        return " ".join([article, *adjective, f"{noun}s" if plural else noun])

    def _likely(self, choices: Sequence[str]) -> str:
        """One of the choices, the n-th with a probability that is proportional to 1/n."""
        return self.dice.choices(choices, [1 / n for n in range(1, len(choices) + 1)])[0]
