"""Finds every use of every parameter in a traced program.

Parameters are followed from equation to equation, as `Piece`s, through jit, remat and scan. A use
is a matrix product with a parameter, or a lookup in one. Whatever else happens to a parameter makes
it lost: its scores will be dense. So a parameter leaf is in `uses` or in `lost` or, if nothing
happens to it, in neither; a leaf that is in `lost` may have uses as well, which then do not matter.

A variable that a scan, jit or remat gets from outside unchanged is, for what is in there, the same
variable: two uses share their data where these go back to one variable.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core

from proma_jax.capture import _jaxpr, _moves, _operations
from proma_jax.capture._moves import Origin
from proma_jax.capture.known import Scope
from proma_jax.capture.pieces import Piece, are_same, whole

Path = tuple[int, ...]
"""Where an equation is: its number in the program, in the program inside that equation, ..."""


class Source(NamedTuple):
    """A variable in one program.

    Attributes:
      path: of the equation that the program is inside, () for the traced function.
      variable: the variable.
      num_scans: how many scans are around the program.
    """

    path: Path
    variable: Any
    num_scans: int


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A matrix product with parameters, or a lookup in them.

    Attributes:
      path: where the equation is.
      eqn: the equation.
      operation: its axes.
      pieces: what its operand holds of the parameters.
      scans: lengths of the scans around it, from the outside.
      sources: the variable that the data are (what is multiplied, or the indices), in each program
        in which it is there unchanged: from that which it goes back to, to the use's own operand.
    """

    path: Path
    eqn: core.JaxprEqn
    operation: _operations.Matmul | _operations.Lookup
    pieces: tuple[Piece, ...]
    scans: tuple[int, ...]
    sources: tuple[Source, ...]

    @property
    def num_source_scans(self) -> int:
        """How many of the scans are around the variable too that the data go back to."""
        return self.sources[0].num_scans

    @property
    def is_lookup(self) -> bool:
        return isinstance(self.operation, _operations.Lookup)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the search is: in which program, and what is known there.

    Attributes:
      path: of the equation that the program is inside, () for the traced function.
      scope: for numbers that are known.
      scans: lengths of the scans around.
      outside: of the program's inputs that come from outside unchanged, what they are there.
    """

    path: Path
    scope: Scope
    scans: tuple[int, ...]
    outside: dict[Any, tuple[Source, ...]]

    def sources(self, variable: Any) -> tuple[Source, ...]:
        """As of a `Use`."""
        here = Source(self.path, variable, len(self.scans))
        return (*self.outside.get(variable, ()), here)


class Search:
    """Uses of parameters in a program.

    Args:
      jaxpr: the program, whose first inputs are the parameter leaves.
      consts: values of its constant variables.
      num_params: how many leaves there are.

    Attributes:
      uses: by path.
      lost: leaves whose scores will be dense, and why.
      touched: for each leaf, what was read of it by uses and by what made it lost.
    """

    def __init__(self, jaxpr: core.Jaxpr, consts: Sequence[Any], num_params: int) -> None:
        self.uses: dict[Path, Use] = {}
        self.lost: dict[int, str] = {}
        self.touched: dict[int, list[Piece]] = defaultdict(list)
        self._selections: dict[Path, Use] = {}
        origins: list[Origin] = [None] * len(jaxpr.invars)
        for leaf, variable in enumerate(jaxpr.invars[:num_params]):
            origins[leaf] = (whole(leaf, variable.aval.shape),)
        place = _Place((), Scope(jaxpr, consts), (), {})
        results = self._walk(jaxpr, origins, place)
        self._lose(results[0], "returned as the log-probability")
        self.uses |= self._selections

    def _lose(self, origin: Origin, why: str) -> None:
        """Gives up on the leaves of an origin.

        Slices that were looked up have their gradient from the lookup, whatever is done with them.
        """
        for piece in origin or ():
            if not piece.selected:
                self.lost.setdefault(piece.leaf, why)
                self.touched[piece.leaf].append(piece)

    def _walk(self, jaxpr: core.Jaxpr, origins: Sequence[Origin], place: _Place) -> list[Origin]:
        """Follows parameters from a program's inputs to its outputs, noting uses on the way."""
        known = {v: o for v, o in zip(jaxpr.invars, origins, strict=True) if o is not None}

        def look_up(atoms: Sequence[Any]) -> list[Origin]:
            return [known.get(a) if isinstance(a, core.Var) else None for a in atoms]

        for number, eqn in enumerate(jaxpr.eqns):
            operands = look_up(eqn.invars)
            if any(operands):
                results = self._follow(eqn, operands, (*place.path, number), place)
                known |= {v: o for v, o in zip(eqn.outvars, results, strict=True) if o is not None}
        return look_up(jaxpr.outvars)

    def _follow(
        self, eqn: core.JaxprEqn, origins: list[Origin], path: Path, place: _Place
    ) -> list[Origin]:
        nothing: list[Origin] = [None] * len(eqn.outvars)
        inner = _jaxpr.body(eqn)
        if inner is not None:
            return self._follow_inside(eqn, inner, origins, path, place)
        results = _moves.moved(eqn, origins, lambda i: place.scope.everywhere(eqn.invars[i]))
        if results is not None:
            return results
        positions = [i for i, origin in enumerate(origins) if origin is not None]
        operation = _read(eqn, positions[0]) if len(positions) == 1 else None
        if operation is None or not isinstance(eqn.invars[operation.data], core.Var):
            for origin in origins:
                self._lose(origin, f"used by {eqn.primitive.name}")
            return nothing
        pieces, data = origins[positions[0]] or (), eqn.invars[operation.data]
        sources = place.sources(data)
        if isinstance(operation, _operations.Lookup):
            return [self._note_lookup(Use(path, eqn, operation, pieces, place.scans, sources[-1:]))]
        self._note_product(Use(path, eqn, operation, pieces, place.scans, sources))
        return nothing

    def _note_product(self, use: Use) -> None:
        for piece in use.pieces:
            self.touched[piece.leaf].append(piece)
            if piece.selected:
                why = "its slices are kernels, chosen by an index that is known only at run time"
                self.lost.setdefault(piece.leaf, why)
        if not any(piece.selected for piece in use.pieces):
            self.uses[use.path] = use

    def _note_lookup(self, use: Use) -> Origin:
        """Notes a lookup; slices with several axes may be kernels, and are followed.

        If a matrix product uses one, the leaf is lost. If none does, it is a table after all.
        """
        operation = use.operation
        assert isinstance(operation, _operations.Lookup)
        shape = use.eqn.outvars[0].aval.shape
        token_shape = [shape[i] for i in operation.token_axes]
        slices, features = [], []
        for piece in use.pieces:
            one = piece.select(operation.axis)
            slices.append(operation.arrange(one, token_shape))
            features.append(sum(len(axis) > 1 for axis in one.axes))
        may_be_kernels = max(features) > 1
        for piece, one in zip(use.pieces, slices, strict=True):
            self.touched[piece.leaf].append(one if may_be_kernels else piece)
        if any(piece.selected for piece in use.pieces):
            for piece in use.pieces:
                self.lost.setdefault(piece.leaf, "read by several indices known only at run time")
            return None
        if not may_be_kernels:
            self.uses[use.path] = use
            return None
        self._selections[use.path] = use
        return tuple(slices)

    def _follow_inside(
        self,
        eqn: core.JaxprEqn,
        inner: _jaxpr.Body,
        origins: list[Origin],
        path: Path,
        place: _Place,
    ) -> list[Origin]:
        scope = place.scope.inside(eqn, inner)
        is_scan = inner.kind == "scan"
        unchanged = inner.num_consts if is_scan else len(eqn.invars)
        outside = {
            variable: place.sources(atom)
            for variable, atom in zip(inner.jaxpr.invars[:unchanged], eqn.invars, strict=False)
            if isinstance(atom, core.Var)
        }
        scans = (*place.scans, inner.length) if is_scan else place.scans
        inside = _Place(path, scope, scans, outside)
        if is_scan:
            return self._follow_scan(inner, origins, inside)
        return self._walk(inner.jaxpr, origins, inside)

    def _follow_scan(
        self, inner: _jaxpr.Body, origins: list[Origin], inside: _Place
    ) -> list[Origin]:
        num_consts, num_carry = inner.num_consts, inner.num_carry
        unscanned = num_consts + num_carry
        consts, carry = (
            [_each(origin, Piece.in_loop) for origin in some]
            for some in (origins[:num_consts], origins[num_consts:unscanned])
        )
        slices = [_each(origin, Piece.sliced) for origin in origins[unscanned:]]
        while True:
            results = self._walk(inner.jaxpr, [*consts, *carry, *slices], inside)
            changed = [
                i
                for i in range(num_carry)
                if carry[i] is not None and not are_same(carry[i] or (), results[i] or ())
            ]
            if not changed:
                break
            for i in changed:
                self._lose(carry[i], "changed in a scan's carry")
                carry[i] = None
        for origin, result in zip(carry, results[:num_carry], strict=True):
            if origin is None:
                self._lose(result, "put into a scan's carry")
        carried = [_each(origin, Piece.after_loop) for origin in carry]
        stacked = []
        for result in results[num_carry:]:
            stack = _each(result, lambda piece: piece.stacked(inner.length))
            if stack is None:
                self._lose(result, "stacked by a scan")
            stacked.append(stack)
        return [*carried, *stacked]


def _read(eqn: core.JaxprEqn, position: int) -> _operations.Matmul | _operations.Lookup | None:
    """An equation that uses a parameter, its operand number `position`."""
    if eqn.primitive.name in ("gather", "dynamic_slice"):
        return _operations.lookup(eqn) if position == 0 else None
    return _operations.matmul(eqn, position)


def _each(origin: Origin, change: Any) -> Origin:
    """An origin with each piece changed; None if one of them cannot be."""
    pieces = [change(piece) for piece in origin or ()]
    return None if origin is None or any(piece is None for piece in pieces) else tuple(pieces)
