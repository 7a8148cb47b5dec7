r"""The number that a response gives as its answer.

The rule: the first number after the last `####` if there is a `####`; else the first in the last
`\boxed{...}` if there is one; else the last number of the text. Thousands separators, `$`, `%` and
a final period do not matter; a minus sign does, unless something is subtracted (`12-5`).
"""

import re
from decimal import Decimal

_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])(?P<minus>[-−]))?"
    r"(?:\\?\$\s?)?"
    r"(?:(?<=\$)(?P<inner>[-−]))?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


def number(response: str) -> Decimal | None:
    r"""The number that a response gives as its answer, or None.

    Example:
        >>> print(number("48 / 2 = 24, and 48 + 24 = 72.\n#### 72"))
        72
        >>> print(number(r"So it is \boxed{\$1,234.50}, of 9."), number("It costs $-3.50."))
        1234.50 -3.50
        >>> print(number("12-5 = 7"), number("#### none, not 5 of -2"), number("none"))
        7 5 None
    """
    _, mark, marked = response.rpartition("####")
    boxed = _BOXED.findall(response)
    if mark:
        found = _numbers(marked)[:1]
    elif boxed:
        found = _numbers(boxed[-1])[:1]
    else:
        found = _numbers(response)[-1:]
    return found[0] if found else None


def _numbers(text: str) -> list[Decimal]:
    return [
        Decimal(
            ("-" if match["minus"] or match["inner"] else "") + match["digits"].replace(",", "")
        )
        for match in _NUMBER.finditer(text)
    ]


def only_number(response: str) -> Decimal | None:
    """The number that a response consists of, but for spaces around it and a final period.

    Example:
        >>> print(only_number(" 1,234. "), only_number("-7"), only_number("55 or 56"))
        1234 -7 None
    """
    text = response.strip().removesuffix(".")
    match = _NUMBER.fullmatch(text)
    return _numbers(text)[0] if match else None
