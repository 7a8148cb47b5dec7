"""The number that a response gives."""

from decimal import Decimal

import pytest

from experiments.tasks import answers


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("It is 4.\n#### 72", 72),
        ("#### 71\nNo, wait.\n#### 72", 72),
        ("####72.", 72),
        ("#### $1,234.50 for 3 shirts", "1234.5"),
        ("#### -5", -5),
        ("#### −5", -5),
        ("#### $-5", -5),
        ("#### -$5", -5),
        ("#### 25%", 25),
        ("#### **18**", 18),
        ("72 ####", None),
        ("#### unknown", None),
        (r"\boxed{5}, or rather \boxed{\$72}, not 9", 72),
        (r"\boxed{72\%} of 9", 72),
        (r"\boxed{72 \text{ eggs}} of 9", 72),
        (r"\boxed{5} but #### 6", 6),
        ("The answer is 72.", 72),
        ("12 of 72 eggs", 72),
        ("9-5 = 4", 4),
        ("9 - 5", 5),
        ("pages 9-5", 5),
        ("It fell to -5", -5),
        ("1,2,3", 3),
        ("1,234,567", 1234567),
        ("12,34", 34),
        ("1,2345", 2345),
        (".5", "0.5"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_is_found_by_the_rule(response, expected):
    assert answers.number(response) == (None if expected is None else Decimal(expected))


@pytest.mark.parametrize("response", ["1 2", "x5", "5x", "5..", "--5", "1,23", "four", "", "."])
def test_other_than_a_number_is_no_number_alone(response):
    assert answers.only_number(response) is None
