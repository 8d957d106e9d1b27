"""The final answers of awkward real outputs, and when two are the same."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_repro.data.answers import equal, final_expression, final_number
from mora_repro.data.gsm8k import math_score, score

NEXT = "\n\n### Instruction:\nAnd what is 2+2?\n\n### Response: The answer is: 4"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is: 1,234,567.", 1234567),
        ("The answer is: $1,234.50.", Fraction("1234.5")),
        ("The answer is: 1{,}000", 1000),
        ("The answer is: 1,\\!000", 1000),
        ("The answer is: 1/2.", Fraction(1, 2)),
        ("The answer is: \\frac{1}{2}", Fraction(1, 2)),
        ("The answer is: $\\dfrac{3}{4}$.", Fraction(3, 4)),
        ("The answer is: \\frac12", Fraction(1, 2)),
        ("The answer is: 2 1/2 hours", Fraction(5, 2)),
        ("The answer is: 2\\frac{1}{2}", Fraction(5, 2)),
        ("The answer is: -\\frac{1}{2}", Fraction(-1, 2)),
        ("The answer is: -1 1/2", Fraction(-3, 2)),
        ("The answer is: -42", -42),
        ("So she has 18 apples. The answer is: \\boxed{18}", 18),
        ("The answer is: 70\\%", 70),
        ("The answer is: 12 and not 13", 12),
        ("48/2 = 24 and 48+24 = 72", 72),
        ("a half, 3/4, is left", Fraction(3, 4)),
        ("The answer is: 18" + NEXT, 18),
        ("5 and 6" + NEXT, 6),
        ("7 " * 500, 7),
        ("1/0", 0),
        ("The answer is: unknown", None),
        ("", None),
    ],
)
def test_the_final_number_of_an_awkward_output(text, number):
    assert final_number(text) == number


@given(
    st.integers(-(10**9), 10**9),
    st.sampled_from(["#### {}", "The answer is: {}.", "so {:,} in all", "\\boxed{{{:,}}}"]),
)
def test_whole_numbers_are_read_as_they_are_written(number, form):
    assert final_number(form.format(number)) == number


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("The answer is: \\frac{1}{2}.", "\\frac{1}{2}"),
        ("Thus $x=3$. The answer is: $x+1$\nMore text", "$x+1$"),
        ("We get \\boxed{4}, then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("The answer is: \\boxed{(1,2)}.", "(1,2)"),
        ("Final Answer: The final answer is $2$. I hope it is correct.", "$2$"),
        ("The answer is: 2.5. And so on", "2.5"),
        ("The answer is: 18" + NEXT, "18"),
        ("an unclosed \\boxed{4", None),
        ("no answer at all", None),
        ("The answer is:", None),
    ],
)
def test_the_final_expression_of_an_output(text, expression):
    assert final_expression(text) == expression


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("1/2", "\\frac{1}{2}", True),
        ("\\dfrac12", "\\frac{1}{2}", True),
        ("0.5", "\\frac{1}{2}", True),
        ("$0.75$", "\\tfrac{3}{4}", True),
        ("1,000", "1000", True),
        ("1{,}000", "1,\\!000", True),
        ("18.0", "18", True),
        ("2\\frac{1}{2}", "\\frac{5}{2}", True),
        ("x + 1", "x+1", True),
        ("\\left( 1, 2 \\right)", "(1,2)", True),
        ("10\\%", "10", True),
        ("30^\\circ", "30", True),
        ("\\$5", "5", True),
        ("5\\text{ cm}", "5", True),
        ("x=3", "3", True),
        ("\\sqrt2", "\\sqrt{2}", True),
        ("(1,234)", "(1234)", False),
        ("-3", "3", False),
        ("\\frac{1}{3}", "0.33", False),
        ("", "3", False),
        (None, "3", False),
        ("3", None, False),
        (None, None, False),
    ],
)
def test_expressions_are_equal_after_normalisation_or_as_numbers(answer, gold, same):
    assert equal(answer, gold) is same


def test_a_solutions_box_is_the_gold_expression_whatever_else_it_says():
    gold = "At first the answer is: 3 it seems, but it is $\\boxed{\\frac{3}{4}}$."
    assert math_score("We add. The answer is: 0.75.", gold) == {"math_exact_match": (True, 1)}
    assert math_score("The answer is: 3", gold) == {"math_exact_match": (False, 1)}
    assert math_score("never " * 1000, gold) == {"math_exact_match": (False, 1)}
    assert score("The answer is: 3/4", "#### 0.75") == {"exact_match": (True, 1)}
