"""Equations that only move, scale or add up a parameter's entries: slices, reshapes, ..."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from proma_jax._mesh.axes import changes_mesh
from proma_jax.capture._jaxpr import none_if_unknown
from proma_jax.capture._operations import lookup
from proma_jax.capture.pieces import Piece

Origin = tuple[Piece, ...] | None
"""What a variable holds of the parameters; None if nothing."""


@none_if_unknown
def moved(
    eqn: core.JaxprEqn,
    origins: Sequence[Origin],
    known: Callable[[int], np.ndarray | None],
) -> list[Origin] | None:
    """Follows parameters through an equation that only moves, scales or adds up their entries.

    Args:
      eqn: the equation.
      origins: of its operands.
      known: the value of an operand where that is known, as of `Scope.everywhere`.

    Returns:
      The origins of its results, or None where the equation does anything else.
    """
    name = eqn.primitive.name
    if name == "stop_gradient":
        return [None]
    follow = _MOVES.get(name)
    if follow is None:
        return None
    results = [tuple(pieces or ()) for pieces in follow(eqn, origins, known)]
    for pieces, variable in zip(results, eqn.outvars, strict=True):
        is_floating = jnp.issubdtype(variable.aval.dtype, jnp.floating)
        if pieces and (not is_floating or any(piece is None for piece in pieces)):
            return None
    return [tuple(piece for piece in pieces if not piece.is_nowhere) or None for pieces in results]


def _same(eqn: core.JaxprEqn, origins: Sequence[Origin], known: Any) -> list[Origin]:
    """The results are the operands."""
    del known
    for operand, result in zip(eqn.invars, eqn.outvars, strict=True):
        old, new = operand.aval, result.aval
        if old.shape != new.shape or changes_mesh(old, new):
            raise ValueError
    return list(origins)


def _each(move: Callable[[core.JaxprEqn, Piece], Piece | None]) -> Callable[..., Any]:
    """A rule for an equation whose only operand holds parameters."""

    def follow(eqn: core.JaxprEqn, origins: Sequence[Origin], known: Any) -> list[Any]:
        del known
        (pieces,) = origins
        return [tuple(move(eqn, piece) for piece in pieces or ())]

    return follow


def _reshape(eqn: core.JaxprEqn, piece: Piece) -> Piece | None:
    in_order = eqn.params.get("dimensions") is None
    return piece.reshape(eqn.outvars[0].aval.shape) if in_order else None


def _pad(eqn: core.JaxprEqn, origins: Sequence[Origin], known: Any) -> list[Any]:
    del known
    pieces, filler = origins
    if filler:
        raise ValueError
    return [tuple(piece.pad(eqn.params["padding_config"]) for piece in pieces or ())]


def _concatenate(eqn: core.JaxprEqn, origins: Sequence[Origin], known: Any) -> list[Any]:
    del known
    axis, size = eqn.params["dimension"], eqn.outvars[0].aval.shape[eqn.params["dimension"]]
    starts = np.cumsum([0, *(operand.aval.shape[axis] for operand in eqn.invars)])
    return [
        tuple(
            piece.placed(axis, start, size)
            for pieces, start in zip(origins, starts, strict=False)
            for piece in pieces or ()
        )
    ]


def _stack(eqn: core.JaxprEqn, origins: Sequence[Origin], known: Any) -> list[Any]:
    del known
    axis, shape = eqn.params["axis"], list(eqn.outvars[0].aval.shape)
    size, shape[axis] = shape[axis], 1
    others = [i for i in range(len(shape)) if i != axis]
    return [
        tuple(
            piece.broadcast(shape, others).placed(axis, start, size)
            for start, pieces in enumerate(origins)
            for piece in pieces or ()
        )
    ]


def _split(eqn: core.JaxprEqn, origins: Sequence[Origin], known: Any) -> list[Any]:
    del known
    (pieces,) = origins
    axis, shape = eqn.params["axis"], eqn.invars[0].aval.shape
    is_unstack = eqn.primitive.name == "unstack"
    sizes = [1] * shape[axis] if is_unstack else eqn.params["sizes"]
    results, start = [], 0
    for size in sizes:
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = start, start + size
        parts = [piece.slice(starts, limits) for piece in pieces or ()]
        results.append(tuple(part.squeeze((axis,)) if is_unstack else part for part in parts))
        start += size
    return results


def _product(eqn: core.JaxprEqn, origins: Sequence[Origin], known: Any) -> list[Any]:
    """A parameter times, or divided by, one known number."""
    place = next(i for i, origin in enumerate(origins) if origin)
    is_quotient = eqn.primitive.name == "div"
    numbers = known(1 - place)
    if numbers is None or origins[1 - place] or (is_quotient and place == 1):
        raise ValueError
    number = float(numbers.flat[0])
    if eqn.invars[place].aval.shape != eqn.outvars[0].aval.shape or np.any(numbers != number):
        raise ValueError
    factor = 1 / number if is_quotient else number
    return [tuple(piece.times(factor) for piece in origins[place] or ())]


def _total(eqn: core.JaxprEqn, origins: Sequence[Origin], known: Any) -> list[Any]:
    """A sum, or difference, of parameters."""
    del known
    shape = eqn.outvars[0].aval.shape
    if not all(origins) or any(operand.aval.shape != shape for operand in eqn.invars):
        raise ValueError
    signs = [1, -1 if eqn.primitive.name == "sub" else 1]
    return [
        tuple(
            piece.times(sign)
            for pieces, sign in zip(origins, signs, strict=True)
            for piece in pieces or ()
        )
    ]


def _dynamic_slice(eqn: core.JaxprEqn, origins: Sequence[Origin], known: Any) -> list[Any]:
    """Windows that begin at numbers known while tracing."""
    pieces: list[Piece | None] = list(origins[0] or ())
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    for axis, (length, size) in enumerate(zip(shape, sizes, strict=True)):
        if length == size:
            continue
        starts = known(1 + axis)
        if starts is None:
            raise ValueError
        first = np.clip(starts, 0, length - size)
        pieces = [piece and piece.at(axis, first, size) for piece in pieces]
    return [tuple(pieces)]


def _gather(eqn: core.JaxprEqn, origins: Sequence[Origin], known: Any) -> list[Any]:
    """Entries along one axis whose numbers are known while tracing: an index or a list of them."""
    pick, indices = lookup(eqn), known(1)
    if pick is None or indices is None:
        raise ValueError
    length = pick.num_embeddings
    numbers = indices[..., pick.column]
    if pick.out_of_bounds == "clip":
        numbers = np.clip(numbers, 0, length - 1)
    elif np.any((numbers < 0) | (numbers >= length)):
        raise ValueError
    token_shape = eqn.invars[1].aval.shape[:-1]
    scans = numbers.shape[: numbers.ndim - len(token_shape)]
    pieces = []
    for piece in origins[0] or ():
        if math.prod(token_shape) == 1:
            chosen = piece.at(pick.axis, numbers.reshape(scans), 1)
        elif math.prod(scans) == 1:
            chosen = piece.take(pick.axis, numbers.ravel())
        else:
            raise ValueError
        pieces.append(chosen and pick.arrange(chosen, token_shape))
    return [tuple(pieces)]


_MOVES: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys(
        (
            "convert_element_type",
            "copy",
            "name",
            "optimization_barrier",
            "reduce_precision",
            "reshard",
            "sharding_constraint",
        ),
        _same,
    ),
    "broadcast_in_dim": _each(
        lambda eqn, piece: piece.broadcast(
            eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
        )
    ),
    "neg": _each(lambda eqn, piece: piece.times(-1)),
    "reshape": _each(_reshape),
    "rev": _each(lambda eqn, piece: piece.reverse(eqn.params["dimensions"])),
    "slice": _each(
        lambda eqn, piece: piece.slice(
            *(eqn.params[key] for key in ("start_indices", "limit_indices", "strides"))
        )
    ),
    "squeeze": _each(lambda eqn, piece: piece.squeeze(eqn.params["dimensions"])),
    "transpose": _each(lambda eqn, piece: piece.transpose(eqn.params["permutation"])),
    "add": _total,
    "add_any": _total,
    "concatenate": _concatenate,
    "div": _product,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "mul": _product,
    "pad": _pad,
    "split": _split,
    "stack": _stack,
    "sub": _total,
    "unstack": _split,
}
