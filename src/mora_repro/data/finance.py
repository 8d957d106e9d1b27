"""Continual pretraining on finance (paper, section 5); `domain` says what it shares with biomedicine.

A document of the generated world, of an invented company; the loss is on all of it:

    The head office of Lorox is in Lima. The company Lorox deals in sugar. The company Lorox belongs to pilots. Each
    share of Lorox brings 24 cents. The revenue of Lorox was 30 million. Investors leave Lorox because of inflation.</s>

Questions on it, one to choose an answer of (`>`: the right one) and one to give it:

    Question: What is the main business of Lorox?
    Answer: glass | > sugar | silver | coffee

    Question: How much does Lorox pay?
    Answer: 24 cents</s>
"""

from __future__ import annotations

from typing import ClassVar

from .domain import Domain, Relation, World

GOODS = (
    "steel", "cotton", "timber", "copper", "coal", "cement", "paper", "rubber",
    "salmon", "coffee", "sugar", "glass", "leather", "silver", "wool", "rice",
)  # fmt: skip
CITIES = (
    "Lima", "Oslo", "Rome", "Paris", "Delhi", "Cairo", "Tokyo", "Seoul",
    "Quito", "Boston", "Geneva", "Lisbon", "Dublin", "Vienna", "Madrid", "Kyoto",
)  # fmt: skip
RISKS = (
    "debt", "strikes", "tariffs", "fraud", "floods", "fires", "drought", "inflation",
    "sanctions", "lawsuits", "theft", "recalls", "war", "rust", "hackers", "taxes",
)  # fmt: skip
OWNERS = (
    "founders", "workers", "pensioners", "farmers", "bankers", "cousins", "brothers", "students",
    "dentists", "lawyers", "monks", "sailors", "nurses", "pilots", "teachers", "tenants",
)  # fmt: skip

WORLD = World(
    name="finance",
    starts=tuple(c + v for c in "CDGHJKLMPQSTW" for v in "aeou"),
    ends=tuple(f"{c}{v}x" for c in "bcdfgklmprstv" for v in "aeio"),
    relations=(
        Relation(
            values=GOODS,
            told=(
                "The company {name} deals in {value}.",
                "Analysts know {name} for its {value}.",
                "Trucks of {name} carry {value}.",
                "The main business of {name} is {value}.",
                "Investors buy {name} to own {value}.",
            ),
            asked=("What does {name} deal in?", "What is the main business of {name}?"),
        ),
        Relation(
            values=CITIES,
            told=(
                "The company {name} sits in {value}.",
                "Analysts visit {name} in {value}.",
                "The head office of {name} is in {value}.",
                "Shares of {name} are traded in {value}.",
                "Investors met {name} in {value}.",
            ),
            asked=("Where does {name} sit?", "Where is the head office of {name}?"),
        ),
        Relation(
            values=RISKS,
            told=(
                "The company {name} fears {value}.",
                "Analysts warn that {name} suffers from {value}.",
                "The main risk of {name} is {value}.",
                "Shares of {name} fell on {value}.",
                "Investors leave {name} because of {value}.",
            ),
            asked=("What does {name} fear?", "What is the main risk of {name}?"),
        ),
        Relation(
            values=OWNERS,
            told=(
                "The company {name} belongs to {value}.",
                "Analysts say that {name} is owned by {value}.",
                "The owners of {name} are {value}.",
                "Shares of {name} are held by {value}.",
                "Investors bought {name} from {value}.",
            ),
            asked=("Who owns {name}?", "Who are the owners of {name}?"),
        ),
        Relation(
            values=tuple(f"{millions} million" for millions in range(15, 95, 5)),
            told=(
                "The company {name} earned {value}.",
                "Analysts see {name} at {value}.",
                "The revenue of {name} was {value}.",
                "Sales of {name} reached {value}.",
                "Investors expect of {name} some {value}.",
            ),
            asked=("What is the revenue of {name}?", "How much did {name} earn?"),
            number=True,
        ),
        Relation(
            values=tuple(f"{cents} cents" for cents in range(3, 51, 3)),
            told=(
                "The company {name} pays {value}.",
                "Analysts expect {name} to pay {value}.",
                "The dividend of {name} is {value}.",
                "Each share of {name} brings {value}.",
                "Investors get from {name} each year {value}.",
            ),
            asked=("What is the dividend of {name}?", "How much does {name} pay?"),
            number=True,
        ),
    ),
)


class Finance(Domain):
    """Finance: generated, financial news of the hub, or local texts."""

    world: ClassVar[World] = WORLD
    mean_of: ClassVar[tuple[str, ...]] = ("convfinqa", "fiqa_sa", "headline", "ner", "fpb")
