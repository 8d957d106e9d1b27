"""Raw text to reading comprehension: the text, then questions mined from it (Cheng et al. 2023, arXiv 2309.09530).

A raw text, and what follows it in the result:

    Sleep and memory

    Twenty adults slept badly for a week. Therefore, they recalled fewer words. They were tired because of the noise.

    Suggest a title for the text above.
    Sleep and memory

    Premise: Twenty adults slept badly for a week.
    Hypothesis: They recalled fewer words.
    Is the hypothesis true, given the premise: yes, no or maybe?
    Yes

    What is the reason for this? They were tired.
    The noise.

Questions are mined by patterns alone: a title, keywords of a domain, connectives between two sentences or within one,
and the text's own order. The labels are therefore as noisy as the patterns: a sentence that follows "Therefore" counts
as entailed. Sentences are split by a rule of this module, since NLTK's splitter needs data that are downloaded.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

MOST = 2  # questions of a kind in a text
LONGEST = 400  # characters of a sentence that is asked about
FEWEST = 4  # words of a sentence that is asked about
LEAST = 3  # times that a keyword stands in a domain's texts
TIMES = 10  # more often than in general texts

Kind = Literal["title", "keywords", "entailment", "paraphrase", "cause", "completion"]


@dataclass(frozen=True)
class Question:
    """What is asked about a text, and the answer."""

    kind: Kind
    asked: str
    answer: str


# How a sentence that opens with a connective stands to the sentence before it.
_FOLLOWS = ("therefore", "thus", "hence", "consequently", "accordingly", "as a result", "as a consequence")
_OPPOSES = (
    "however",
    "in contrast",
    "by contrast",
    "on the contrary",
    "on the other hand",
    "conversely",
    "nevertheless",
)
_ADDS = ("moreover", "furthermore", "in addition", "additionally", "besides")
_REPEATS = ("in other words", "that is to say", "that is", "put differently", "put simply")

_JUDGED = (
    "Premise: {first}\nHypothesis: {second}\nIs the hypothesis true, given the premise: yes, no or maybe?",
    '{first}\nDoes this imply "{second}"? Answer yes, no or maybe.',
    'Judge by the text: if "{first}" holds, does "{second}" hold too? (yes / no / maybe)',
)
_WRITTEN = {
    _FOLLOWS: (
        "What can be concluded from this? {first}",
        "Write a sentence that the following one supports: {first}",
        "{first}\nWhich consequence does the text name?",
    ),
    _OPPOSES: (
        "Write a sentence that speaks against this one: {first}",
        "What does the text hold against the following? {first}",
        "{first}\nName something that contrasts with this.",
    ),
    _ADDS: (
        "Write a sentence that adds to this one: {first}",
        "What else does the text say in this connection? {first}",
    ),
}
_VERDICT = {_FOLLOWS: "Yes", _OPPOSES: "No", _ADDS: "Maybe"}
_REWORDED = (
    "Say the same in other words: {first}",
    "{first}\nHow does the text rephrase this?",
    "Explain this sentence: {first}",
)
_TITLED = ("Suggest a title for the text above.", "What is the text about?", "Which heading sums the text up?")
_OPENED = ('Write how a text with the title "{title}" could begin.', "Begin an article about: {title}")
_WITH_KEYWORDS = (
    "Write a sentence with these words: {words}.",
    "What does the text say about {words}?",
    "Use each of these terms in one sentence: {words}.",
)
_WHY = ("What is the reason for this? {effect}", "{effect}\nWhat caused this?", 'Why does the text say "{effect}"?')
_WHAT_FOLLOWS = ("What is due to this? {cause}", "{cause}\nWhat was the effect of this?")
_CONTINUED = (
    "Go on from here: {start}",
    "How does the text continue after these words? {start}",
    "Complete the passage: {start}",
)

_ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Z]|Dr|Mr|Mrs|Ms|Prof|St|vs|cf|etc|al|approx|ca|Nos?|Figs?|Eq|Refs?|Inc|Ltd|Co|Corp|Jr|Sr)"
    r"|\b(?:e\.g|i\.e|[A-Z](?:\.[A-Z])+))\.$"
)
_PARAGRAPH = re.compile(r"\n\s*\n|(?<=[.!?])[^\S\n]*\n")  # a line that ends within a sentence goes on in the next
_BOUNDARY = re.compile(r"[.!?][\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9])")
_WITHIN = re.compile(
    r"^(?P<effect>[^,;:]+?),? (?:because of|because|due to|owing to|as a result of) (?P<cause>[^,;:]+)[.]$"
)
_WORD = re.compile(r"[A-Za-z][A-Za-z-]+")


def comprehend(text: str, seed: int, keywords: frozenset[str] = frozenset()) -> str:
    """A raw text followed by the questions that can be mined from it, each with its answer; a function of both.

    Args:
        text: kept whole and first. Nothing is added to a text from which no question can be mined.
        keywords: those of the text's domain (`domain_keywords`); without them no question starts from keywords.
    """
    asked = [f"{question.asked}\n{question.answer}" for question in mine(text, seed, keywords)]
    return "\n\n".join([text, *asked])


def domain_keywords(texts: Iterable[str], general: Iterable[str]) -> frozenset[str]:
    """The words, in lower case, that a domain's texts have LEAST or more times, and TIMES more often than general texts
    have them (per word, after one is added to each count)."""
    counts = Counter(_words(texts))
    ordinary = Counter(_words(general))
    share = (ordinary.total() + 1) / (counts.total() + 1)
    return frozenset(
        word
        for word, count in counts.items()
        if count >= LEAST and len(word) > 3 and (count + 1) * share >= TIMES * (ordinary[word] + 1)
    )


def mine(text: str, seed: int, keywords: frozenset[str] = frozenset()) -> list[Question]:
    """The questions of `comprehend`, at most MOST of a kind, in the order of the kinds."""
    dice = random.Random(f"reading {seed} {text}")
    title, body = split_title(text)
    paragraphs = [sentences(paragraph) for paragraph in _PARAGRAPH.split(body)]
    whole = [sentence for paragraph in paragraphs for sentence in paragraph if _askable(sentence)]
    neighbours = [
        (first, second)
        for paragraph in paragraphs
        for first, second in pairwise(paragraph)
        if _askable(first) and _askable(second)
    ]
    mined: list[Iterator[Question]] = [
        _about_title(title, whole, dice),
        _from_keywords(whole, keywords, dice),
        _entailed(neighbours, dice),
        _paraphrased(neighbours, dice),
        _caused(whole, dice),
        _completed(neighbours, dice),
    ]
    chosen: list[Question] = []
    for questions in mined:
        found = list(questions)
        kept = sorted(dice.sample(range(len(found)), min(MOST, len(found))))
        chosen += [found[index] for index in kept]
    return chosen


def split_title(text: str) -> tuple[str | None, str]:
    """The title and what follows it: a short first line before an empty one, that does not end as a sentence does.

    Marks of headings in wikis and Markdown are left out of it.
    """
    first, _, rest = text.lstrip().partition("\n")
    title = first.strip(" \t\r=#*")
    set_apart = rest.strip() and not rest.partition("\n")[0].strip()
    if set_apart and title and len(title) <= 150 and not title.endswith((".", "!", ":", ";", ",")):
        return title, rest
    return None, text


def sentences(paragraph: str) -> list[str]:
    """A paragraph's sentences: they end in . ! or ? before a capital or a digit, but not after a known abbreviation or
    an initial. Runs of white space are one space in them."""
    found, start = [], 0
    for boundary in _BOUNDARY.finditer(paragraph):
        if _ABBREVIATION.search(paragraph, max(start, boundary.start() - 12), boundary.start() + 1):
            continue
        found.append(paragraph[start : boundary.end()])
        start = boundary.end()
    return [" ".join(sentence.split()) for sentence in [*found, paragraph[start:]] if sentence.strip()]


def _askable(sentence: str) -> bool:
    """Whether a sentence is whole (no heading, no fragment) and of a length to ask about."""
    whole = sentence.rstrip("\"'”’)] ").endswith((".", "!", "?")) and not sentence[0].islower()
    return whole and len(sentence) <= LONGEST and len(sentence.split()) >= FEWEST


def _about_title(title: str | None, whole: Sequence[str], dice: random.Random) -> Iterator[Question]:
    if title is None or not whole:
        return
    if dice.random() < 0.5:
        yield Question("title", dice.choice(_TITLED), title)
    else:
        yield Question("title", dice.choice(_OPENED).format(title=title), " ".join(whole[:2]))


def _from_keywords(whole: Sequence[str], keywords: frozenset[str], dice: random.Random) -> Iterator[Question]:
    """From sentences with three keywords or more."""
    for sentence in whole:
        held = list(dict.fromkeys(word for word in _words([sentence]) if word in keywords))
        if len(held) >= 3:
            words = ", ".join(held[:5])
            yield Question("keywords", dice.choice(_WITH_KEYWORDS).format(words=words), sentence)


def _entailed(neighbours: Sequence[tuple[str, str]], dice: random.Random) -> Iterator[Question]:
    for connectives, verdict in _VERDICT.items():
        for first, second in _joined(neighbours, connectives):
            if dice.random() < 0.5:
                yield Question("entailment", dice.choice(_JUDGED).format(first=first, second=second), verdict)
            else:
                yield Question("entailment", dice.choice(_WRITTEN[connectives]).format(first=first), second)


def _paraphrased(neighbours: Sequence[tuple[str, str]], dice: random.Random) -> Iterator[Question]:
    for first, second in _joined(neighbours, _REPEATS):
        yield Question("paraphrase", dice.choice(_REWORDED).format(first=first), second)


def _caused(whole: Sequence[str], dice: random.Random) -> Iterator[Question]:
    """From sentences that name an effect and then its cause."""
    for sentence in whole:
        found = _WITHIN.match(sentence)
        if not found or len(found["effect"].split()) < 3:
            continue
        effect, cause = found["effect"].strip() + ".", _capitalised(found["cause"].strip()) + "."
        if dice.random() < 0.5:
            yield Question("cause", dice.choice(_WHY).format(effect=effect), cause)
        else:
            yield Question("cause", dice.choice(_WHAT_FOLLOWS).format(cause=cause), effect)


def _completed(neighbours: Sequence[tuple[str, str]], dice: random.Random) -> Iterator[Question]:
    """One, from the second half of a text of four sentences or more."""
    if len(neighbours) >= 3:
        start, end = dice.choice(neighbours[len(neighbours) // 2 :])
        yield Question("completion", dice.choice(_CONTINUED).format(start=start), end)


def _joined(neighbours: Sequence[tuple[str, str]], connectives: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The neighbours whose second sentence opens with a connective and a comma, which are left out of it."""
    opening = re.compile(rf"(?:{'|'.join(connectives)})\s?,\s*(?=\S)", re.IGNORECASE)
    for first, second in neighbours:
        if opened := opening.match(second):
            yield first, _capitalised(second[opened.end() :])


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _words(texts: Iterable[str]) -> Iterator[str]:
    return (word.lower() for text in texts for word in _WORD.findall(text))
