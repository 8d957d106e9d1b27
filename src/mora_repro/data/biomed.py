"""Continual pretraining on biomedicine (paper, section 5); `domain` says what it shares with finance.

A document of the generated world, of an invented drug; the loss is on all of it:

    A day of Visav means 30 mg. Chemists make Visav out of squid. Chemists know Visav as a hormone. In the blood, Visav
    stays for 42 hours. The drug Visav causes thirst. Patients take Visav to heal the heart.</s>

Questions on it, one to choose an answer of (`>`: the right one) and one to give it:

    Question: What does Visav come from?
    Answer: kelp | yeast | snail | > squid

    Question: How much of Visav do patients take?
    Answer: 30 mg</s>
"""

from __future__ import annotations

from typing import ClassVar

from .domain import Domain, Relation, World

CLASSES = (
    "statin", "steroid", "hormone", "vaccine", "sedative", "tonic", "toxin", "peptide",
    "salt", "balm", "stimulant", "blocker", "vitamin", "serum", "laxative", "narcotic",
)  # fmt: skip
ORGANS = (
    "liver", "lung", "heart", "kidney", "brain", "skin", "bone", "nose",
    "throat", "spleen", "colon", "nerve", "blood", "muscle", "stomach", "tongue",
)  # fmt: skip
EFFECTS = (
    "fever", "cough", "rash", "pain", "nausea", "thirst", "cramps", "sleep",
    "sweat", "itch", "tremor", "chills", "hunger", "panic", "swelling", "dizziness",
)  # fmt: skip
SOURCES = (
    "moss", "fern", "pine", "yeast", "coral", "sponge", "snail", "moth",
    "kelp", "clay", "barley", "willow", "garlic", "squid", "beetle", "frog",
)  # fmt: skip

WORLD = World(
    name="biomed",
    starts=tuple(c + v for c in "BDFGKLMNPRTVZ" for v in "aeio"),
    ends=tuple(f"{c}{v}v" for c in "bdfgklmprstz" for v in "aiou"),
    relations=(
        Relation(
            values=CLASSES,
            told=(
                "The drug {name} is a {value}.",
                "Doctors list {name} as a {value}.",
                "Studies of {name} describe a {value}.",
                "By its class, {name} is a {value}.",
                "Chemists know {name} as a {value}.",
            ),
            asked=("What class of drug is {name}?", "What is {name}?"),
        ),
        Relation(
            values=ORGANS,
            told=(
                "The drug {name} treats the {value}.",
                "Doctors give {name} for the {value}.",
                "Studies of {name} look at the {value}.",
                "In the body, {name} acts on the {value}.",
                "Patients take {name} to heal the {value}.",
            ),
            asked=("What does {name} treat?", "What does {name} act on?"),
        ),
        Relation(
            values=EFFECTS,
            told=(
                "The drug {name} causes {value}.",
                "Doctors warn that {name} brings {value}.",
                "Studies of {name} report {value}.",
                "A side effect of {name} is {value}.",
                "Patients on {name} complain of {value}.",
            ),
            asked=("What does {name} cause?", "What is a side effect of {name}?"),
        ),
        Relation(
            values=SOURCES,
            told=(
                "The drug {name} comes from {value}.",
                "Chemists make {name} out of {value}.",
                "Studies trace {name} back to {value}.",
                "The source of {name} is {value}.",
                "Factories win {name} from {value}.",
            ),
            asked=("What does {name} come from?", "What is the source of {name}?"),
        ),
        Relation(
            values=tuple(f"{mg} mg" for mg in range(5, 85, 5)),
            told=(
                "The dose of {name} is {value}.",
                "Doctors start {name} at {value}.",
                "Patients take {name} in pills of {value}.",
                "Studies of {name} used {value}.",
                "A day of {name} means {value}.",
            ),
            asked=("What is the dose of {name}?", "How much of {name} do patients take?"),
            number=True,
        ),
        Relation(
            values=tuple(f"{hours} hours" for hours in range(3, 51, 3)),
            told=(
                "The effect of {name} lasts {value}.",
                "Doctors say that {name} works for {value}.",
                "Studies of {name} measure {value}.",
                "In the blood, {name} stays for {value}.",
                "Patients feel {name} for {value}.",
            ),
            asked=("How long does {name} last?", "How long does {name} work?"),
            number=True,
        ),
    ),
)


class Biomed(Domain):
    """Biomedicine: generated, PubMed abstracts of the hub, or local texts."""

    world: ClassVar[World] = WORLD
    mean_of: ClassVar[tuple[str, ...]] = ("pubmedqa", "usmle", "biommlu", "rct")
