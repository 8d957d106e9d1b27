"""What an answer to a mathematical question says in the end, and whether that is right.

Numbers (GSM8K) are compared by value. Expressions (MATH) are equal after the normalisation of Hendrycks et al. (2021),
which is lm-eval's, or as numbers. A text is read up to where the model goes on with a question of its own, as MetaMath
(Yu et al. 2023) cuts it at the words of its prompt; its answer follows "The answer is" or "####".
"""

from __future__ import annotations

import re
from fractions import Fraction

_MARK = re.compile(r"####|answer is:?", re.IGNORECASE)
_NEXT = re.compile(r"(?:###\s*)?\b(?:Instruction|Response|Question|USER|ASSISTANT):")
_WHOLE = r"\d[\d,]*"
_NUMBER = re.compile(
    rf"(?P<sign>-?)(?:"
    rf"(?:(?P<mixed>{_WHOLE})\s*)?\\[dt]?frac\s*(?:\{{(?P<top>\d+)\}}|(?P<digit>\d))\s*"
    rf"(?:\{{(?P<bottom>[1-9]\d*)\}}|(?P<under>[1-9]))"
    rf"|(?:(?P<whole>{_WHOLE})[ ]+)?(?P<over>{_WHOLE})/(?P<by>[1-9]\d*)"
    rf"|(?P<decimal>{_WHOLE}(?:\.\d+)?|\.\d+))"
)


def final_number(text: str) -> Fraction | None:
    """The answer's number: after the last mark, else the last of the text; None where there is none.

    1,234.5, .5, 3/4, \\frac{3}{4} and 1 3/4 are numbers; currency signs, units and what follows are left out.
    """
    text = _plain(before_next(text))
    marks = list(_MARK.finditer(text))
    if marks and (after := _NUMBER.search(text, marks[-1].end())):
        return _value(after)
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def before_next(text: str) -> str:
    """The text up to where a model that has not stopped asks and answers on."""
    found = _NEXT.search(text)
    return text[: found.start()] if found else text


def final_expression(text: str, boxed_first: bool = False) -> str | None:
    """The answer's expression in LaTeX: after the last mark up to the end of its sentence, else in the last \\boxed.

    `boxed_first`: in a reference solution, whose text may say "the answer is" anywhere.
    """
    text = before_next(text)
    ways = [_boxed, _after_mark] if boxed_first else [_after_mark, _boxed]
    return next((found for way in ways if (found := way(text))), None)


def equal(answer: str | None, gold: str | None) -> bool:
    """Whether two expressions are the same. None, for no answer, equals nothing."""
    if answer is None or gold is None:
        return False
    from lm_eval.tasks.hendrycks_math.utils import is_equiv  # of a package that not every run needs

    numbers = [_NUMBER.fullmatch(_bare(text)) for text in (answer, gold)]
    if all(numbers):
        return _value(numbers[0]) == _value(numbers[1])
    return bool(is_equiv(_bare(answer), _bare(gold)))


def _after_mark(text: str) -> str | None:
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    after = re.split(r"\.?\s*\n|\.\s|\. ?I hope", text[marks[-1].end() :].strip(), maxsplit=1)[0].strip()
    return _boxed(after) or after.rstrip(".").strip() or None


def _boxed(text: str) -> str | None:
    from lm_eval.tasks.hendrycks_math.utils import last_boxed_only_string, remove_boxed

    try:
        return remove_boxed(last_boxed_only_string(text))
    except (AssertionError, TypeError):  # a brace that is never closed; no box
        return None


def _plain(text: str) -> str:
    """Without the separators of thousands that LaTeX has beside the comma."""
    return text.replace("{,}", ",").replace("\\!", "")


def _bare(text: str) -> str:
    """Without dollar signs and LaTeX's spaces around, and thousands separators where it is one number."""
    text = _plain(text).replace("\\$", "").replace("\\ ", " ").strip().strip("$").strip()
    text = re.sub(r"\\[,;]", "", text)
    return text.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text) else text


def _value(match: re.Match[str] | None) -> Fraction:
    assert match is not None
    part = {name: text.replace(",", "") for name, text in match.groupdict().items() if text}
    if "decimal" in part:
        value = Fraction(part["decimal"])
    else:
        top, bottom = part.get("top") or part.get("digit"), part.get("bottom") or part.get("under")
        value = Fraction(int(top or part["over"]), int(bottom or part["by"]))
        value += int(part.get("mixed") or part.get("whole") or 0)
    return -value if "sign" in part else value
