"""Settings that are checked when they are made: types, ranges, finiteness, and what fits together.

Every class of settings is a pydantic dataclass with `config=checked.CONFIG`: a value of another
type or out of its field's range is a `ValueError`, and nothing is cast but an int to a float. What
only makes sense together is checked in `__post_init__`, whose messages name each setting as
`name=value`, so that `command_line` can show it as the flag that the user typed.
"""

from typing import Annotated

from pydantic import ConfigDict, Field

CONFIG = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What NumPy and JAX both take as it is: JAX would take 2^32 for 0."""


def check_distinct(name: str, values: tuple) -> None:
    """Raises a ValueError if a setting names something twice."""
    if len(set(values)) < len(values):
        raise ValueError(f"{name}={values} must not name anything twice")
