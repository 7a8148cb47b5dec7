"""Equations on numbers that are known while a program is traced, computed in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from proma_jax.capture._jaxpr import none_if_unknown


def is_plain(aval: Any) -> bool:
    """Whether a variable holds numbers that NumPy has too."""
    return not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)


def _select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    return np.choose(np.asarray(which, np.int64), cases)


def _quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As of `jax.lax.div`: of integers towards zero."""
    return (x - np.fmod(x, y)) // y if np.issubdtype(x.dtype, np.integer) else x / y


_ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "and": np.bitwise_and,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "copy": np.positive,
    "div": _quotient,
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "rem": np.fmod,
    "select_n": _select,
    "sign": np.sign,
    "sub": np.subtract,
}
_SHAPING: dict[str, Callable[..., np.ndarray]] = {
    "broadcast_in_dim": lambda eqn, x: _broadcast(
        x, eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
    ),
    "concatenate": lambda eqn, *xs: np.concatenate(xs, eqn.params["dimension"]),
    "convert_element_type": lambda eqn, x: x,
    "iota": lambda eqn: _broadcast(
        np.arange(eqn.params["shape"][eqn.params["dimension"]]),
        eqn.params["shape"],
        (eqn.params["dimension"],),
    ),
    "reshape": lambda eqn, x: x.reshape(eqn.outvars[0].aval.shape),
    "slice": lambda eqn, x: x[
        tuple(
            slice(*bounds)
            for bounds in zip(
                eqn.params["start_indices"],
                eqn.params["limit_indices"],
                eqn.params["strides"] or (1,) * x.ndim,
                strict=True,
            )
        )
    ],
    "squeeze": lambda eqn, x: np.squeeze(x, eqn.params["dimensions"]),
    "dynamic_slice": lambda eqn, x, *starts: x[
        tuple(
            np.clip(start, 0, length - size) + np.arange(size).reshape(-1, *[1] * (x.ndim - 1 - i))
            for i, (start, length, size) in enumerate(
                zip(starts, x.shape, eqn.params["slice_sizes"], strict=True)
            )
        )
    ],
}


def _broadcast(x: np.ndarray, shape: Sequence[int], dimensions: Sequence[int]) -> np.ndarray:
    aligned = np.ones(len(shape), int)
    aligned[list(dimensions)] = x.shape
    return np.broadcast_to(x.reshape(aligned), shape)


@none_if_unknown
def compute(eqn: core.JaxprEqn, operands: Sequence[np.ndarray]) -> np.ndarray | None:
    """The result of an equation on numbers, in NumPy; None where there is no rule for it here."""
    name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
    if name in _ARITHMETIC:
        return np.asarray(_ARITHMETIC[name](*operands)).astype(dtype)
    return np.asarray(_SHAPING[name](eqn, *operands)).astype(dtype)
