"""Reading comprehension: what is mined from which text, and what is kept."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROOT

from mora_repro.data.reading import LONGEST, MOST, comprehend, domain_keywords, mine, sentences, split_title

PUBMEDQA = ROOT.parent / "shared" / "data" / "pubmedqa" / "part.jsonl"

KEYWORDS = frozenset({"insulin", "glucose", "pancreas"})
TEXTS = {
    "title": ("Rivers of the north\n\nThe water is cold all year.", "Rivers of the north"),
    "keywords": ("The pancreas releases insulin after glucose arrives.", "insulin, glucose"),
    "entailment": ("Twenty adults slept badly. Therefore, they recalled fewer words.", "They recalled fewer words."),
    "paraphrase": ("The effect is not linear. In other words, twice the dose is not twice the gain.", "Twice the dose"),
    "cause": ("The whole experiment was stopped because of a broken pump.", "A broken pump."),
    "completion": (
        "One is there now. Two were there then. Three will be there. Four may come soon.",
        "Three will be there.",
    ),
}
PLAIN = "It was a quiet day in town."


@pytest.mark.parametrize("kind", TEXTS)
def test_each_kind_is_mined_from_a_text_that_has_it_and_no_other_kind_is(kind):
    text, word = TEXTS[kind]
    for seed in range(20):
        asked = mine(text, seed, KEYWORDS)
        assert {question.kind for question in asked} == {kind}
        assert word in asked[0].asked + asked[0].answer


@pytest.mark.parametrize("text", ["", " \n", PLAIN, "Only a heading", "No end here\n\nno capital and no stop"])
def test_a_text_without_any_pattern_stays_as_it_is(text):
    assert comprehend(text, 0, KEYWORDS) == text


@pytest.mark.parametrize(
    ("connective", "verdict"),
    [("Therefore", "Yes"), ("As a result", "Yes"), ("However", "No"), ("In contrast", "No"), ("Moreover", "Maybe")],
)
def test_the_connective_decides_the_verdict_and_is_in_neither_question_nor_answer(connective, verdict):
    text = f"Prices rose in the spring. {connective}, people bought less bread."
    answers = set()
    for seed in range(30):
        (question,) = mine(text, seed)
        assert connective not in question.asked + question.answer
        answers.add(question.answer)
    assert answers == {verdict, "People bought less bread."}


@pytest.mark.parametrize("kind", TEXTS)
def test_every_kind_has_several_phrasings(kind):
    assert len({mine(TEXTS[kind][0], seed, KEYWORDS)[0].asked for seed in range(40)}) > 1


@pytest.mark.parametrize(
    "text",
    [
        "He was late because of it, they said; others knew better.",
        "The house due to the left is large and old.",  # no effect of three words before it
        "Nobody asked them why. Thus far nothing had happened there.",  # no comma: no connective
        "Prices rose in spring.\n\nHowever, this opens another paragraph.",
    ],
)
def test_what_only_looks_like_a_pattern_is_not_mined(text):
    assert not {question.kind for question in mine(text, 0)} & {"cause", "entailment"}


PIECES = [*'aB1 .,!?\n"(=', "However, ", "due to ", "The insulin, glucose and pancreas are here. ", "\0", "é"]


@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_text_is_kept_whole_and_first_and_grows_within_a_bound(text):
    made = comprehend(text, 0, KEYWORDS)
    assert made.startswith(text)
    # A question quotes at most two sentences, and its answer two more.
    assert len(made) - len(text) <= 6 * MOST * (4 * LONGEST + 200)
    assert made == comprehend(text, 0, KEYWORDS)


def test_another_seed_asks_other_questions():
    text = "\n\n".join(text for text, _ in TEXTS.values())
    assert len({comprehend(text, seed, KEYWORDS) for seed in range(10)}) > 5


def test_questions_do_not_depend_on_the_state_of_the_dice_of_others():
    made = comprehend(TEXTS["entailment"][0], 3)
    random.seed(99)
    assert comprehend(TEXTS["entailment"][0], 3) == made


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("Sleep and memory\n\nBody.", "Sleep and memory"),
        (" = Homarus gammarus = \n \n Body.", "Homarus gammarus"),
        ("# Is it so?\n\nBody.", "Is it so?"),
        ("A line that is\nwrapped.", None),
        ("A first sentence.\n\nA second.", None),
        ("Alone", None),
        (f"{'long ' * 40}\n\nBody.", None),
    ],
)
def test_a_title_is_a_short_first_line_that_is_set_apart(text, title):
    assert split_title(text)[0] == title


@pytest.mark.parametrize(
    ("paragraph", "count"),
    [
        ("Dr. Smith gave 3.5 mg to J. Doe. It helped.", 2),
        ("Signs (e.g. Fever, cf. Fig. 2) were rare. See No. 5 in the U.S. Army.", 2),
        ('He said "No!" They left... 40 came back? Yes.', 4),
        ("H. gammarus is blue. H. americanus is not", 2),
        ("Wrapped within\na sentence. Next one.", 2),
    ],
)
def test_sentences_end_where_a_reader_ends_them(paragraph, count):
    found = sentences(paragraph)
    assert len(found) == count and " ".join(found) == " ".join(paragraph.split())


def test_keywords_are_frequent_in_the_domain_and_rare_elsewhere():
    domain = ["The insulin level and the glucose level of these people"] * 20 + ["Metformin once"]
    general = ["The people of the town and the level of the river"] * 20
    found = domain_keywords(domain, general)
    assert {"insulin", "glucose"} <= found and not found & {"level", "people", "metformin", "the"}


@pytest.mark.skipif(not PUBMEDQA.exists(), reason="the PubMedQA sample is not beside this checkout")
def test_most_abstracts_give_several_kinds():
    rows = [json.loads(line) for line in PUBMEDQA.read_text().splitlines()[:100]]
    texts = [f"{row['question']}\n\n" + "\n".join(row["context"]["contexts"]) for row in rows]
    kinds = [{question.kind for question in mine(text, 0)} for text in texts]
    assert sum(len(found) >= 2 for found in kinds) > 80
    assert set.union(*kinds) >= {"title", "entailment", "cause", "completion"}
