"""Numbers in a traced program that are known while it is traced, such as the counter of a loop.

A layer may be read from a stack by `stack[i]` with an `i` that is computed: from a Python number,
from `jnp.arange`, from a loop's counter. A `Scope` finds the value of such a variable, in NumPy and
only when asked, by going back to what it is computed from. Anything that depends on the parameters
or the data, or that it has no rule for, is not known (None).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from proma_jax.capture import _jaxpr, _numbers

_MOST = 2**12
"""Arrays of more entries, and scans of more iterations in all, are not followed: it takes long."""


class Scope:
    """The variables of one program: that of the traced function, or one inside an equation.

    Args:
      jaxpr: the program.
      consts: values of its constant variables.
      outer: the scope that the equation is in; None for the traced function.
      eqn: the equation.
      body: what is inside.
    """

    def __init__(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        outer: Scope | None = None,
        eqn: core.JaxprEqn | None = None,
        body: _jaxpr.Body | None = None,
    ) -> None:
        self.outer, self.eqn, self.body = outer, eqn, body
        self.results = jaxpr.outvars
        self.iterations: tuple[range, ...] = outer.iterations if outer else ()
        if body is not None and body.kind == "scan":
            in_turn = range(body.length)[:: -1 if body.settings["reverse"] else 1]
            self.iterations = (*self.iterations, in_turn)
        self._consts = dict(zip(jaxpr.constvars, consts, strict=True))
        self._inputs = {variable: i for i, variable in enumerate(jaxpr.invars)}
        self._made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self._found: dict[tuple[Any, tuple[int, ...]], np.ndarray | None] = {}
        self._settle(jaxpr)

    def _settle(self, jaxpr: core.Jaxpr) -> None:
        """Finds the variables that depend on neither parameters nor data, which may be known."""
        inputs = [v for v in jaxpr.invars if self.outer and self.outer.is_fixed(self._from(v))]
        while True:
            self._fixed = {*self._consts, *inputs}
            for eqn in jaxpr.eqns:
                self._fixed.update(self._fixed_results(eqn))
            changing = [
                v for v in inputs if self._is_carried(v) and not self.is_fixed(self._next(v))
            ]
            if not changing:
                return
            inputs = [v for v in inputs if v not in changing]

    def _fixed_results(self, eqn: core.JaxprEqn) -> list[Any]:
        """The results of an equation that depend on neither parameters nor data."""
        are_fixed = [self.is_fixed(atom) for atom in eqn.invars]
        if all(are_fixed):
            return eqn.outvars
        if not any(
            is_fixed and isinstance(a, core.Var)
            for is_fixed, a in zip(are_fixed, eqn.invars, strict=True)
        ):
            return []
        body = _jaxpr.body(eqn)
        if body is None or body.kind == "scan":
            return []
        within = self.inside(eqn, body)
        results = zip(eqn.outvars, within.results, strict=True)
        return [variable for variable, result in results if within.is_fixed(result)]

    def is_fixed(self, atom: Any) -> bool:
        """Whether a variable depends on neither parameters nor data."""
        return not isinstance(atom, core.Var) or atom in self._fixed

    def _from(self, variable: Any) -> Any:
        """What comes from outside for an input of the program."""
        assert self.eqn is not None
        return self.eqn.invars[self._inputs[variable]]

    def _is_carried(self, variable: Any) -> bool:
        if self.body is None or self.body.kind != "scan":
            return False
        first = self.body.num_consts
        return first <= self._inputs[variable] < first + self.body.num_carry

    def _next(self, variable: Any) -> Any:
        """What a carried input is in the next iteration."""
        assert self.body is not None
        return self.results[self._inputs[variable] - self.body.num_consts]

    def inside(self, eqn: core.JaxprEqn, body: _jaxpr.Body) -> Scope:
        """The scope of the program inside an equation."""
        return Scope(body.jaxpr, body.consts, self, eqn, body)

    def everywhere(self, atom: Any) -> np.ndarray | None:
        """The values of a variable in all iterations of the scans around it, or None.

        Returns:
          (*scans, *shape), with size 1 for scans in whose iterations it is the same.
        """
        lengths = [len(in_turn) for in_turn in self.iterations]
        if math.prod(lengths) > _MOST:
            return None
        values = {}
        for iteration in itertools.product(*self.iterations):
            value = self.value(atom, iteration)
            if value is None:
                return None
            values[iteration] = value
        together = np.stack([values[iteration] for iteration in np.ndindex(*lengths)])
        together = together.reshape((*lengths, *together.shape[1:]))
        for depth in range(len(lengths)):
            first = together.take([0], axis=depth)
            together = first if np.all(together == first) else together
        return together

    def value(self, atom: Any, iteration: tuple[int, ...]) -> np.ndarray | None:
        """The value of a variable in one iteration of the scans around it, or None."""
        if not isinstance(atom, core.Var):
            return np.asarray(atom.val)
        if not self.is_fixed(atom):
            return None
        if getattr(atom.aval, "size", math.inf) > _MOST or not _numbers.is_plain(atom.aval):
            return None
        key = atom, iteration
        if key not in self._found:
            self._found[key] = self._find(atom, iteration)
        return self._found[key]

    def _find(self, variable: Any, iteration: tuple[int, ...]) -> np.ndarray | None:
        if variable in self._consts:
            const = self._consts[variable]
            return None if isinstance(const, jax.core.Tracer) else np.asarray(const)
        if variable in self._inputs:
            return self._input(variable, iteration)
        eqn = self._made_by[variable]
        body = _jaxpr.body(eqn)
        if body is None:
            operands = [self.value(atom, iteration) for atom in eqn.invars]
            return None if any(x is None for x in operands) else _numbers.compute(eqn, operands)
        if body.kind == "scan":
            return None
        within = self.inside(eqn, body)
        return within.value(within.results[eqn.outvars.index(variable)], iteration)

    def _input(self, variable: Any, iteration: tuple[int, ...]) -> np.ndarray | None:
        assert self.outer is not None
        assert self.body is not None
        if self.body.kind != "scan":
            return self.outer.value(self._from(variable), iteration)
        around, now = iteration[:-1], iteration[-1]
        turn = self.iterations[-1].index(now)
        if self._is_carried(variable) and turn > 0:
            return self.value(self._next(variable), (*around, self.iterations[-1][turn - 1]))
        value = self.outer.value(self._from(variable), around)
        is_sliced = self._inputs[variable] >= self.body.num_consts + self.body.num_carry
        return value[now] if is_sliced and value is not None else value
