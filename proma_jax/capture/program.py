"""A traced `logprob_fn`, run again with taps, and the scores that these report.

Matrix products whose data go back to one variable make a group: the variable is reported once, be
that outside of a scan in which the products are. `Program.run` leaves it to its caller what happens
to a group (`Visit`): `sequence_scores` has the taps report, `accumulated_gradient` puts a node
there that sees the gradients of the results of the whole group.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from proma_jax._mesh.arrays import varying_like
from proma_jax._mesh.axes import has_several_devices
from proma_jax._words import counted
from proma_jax.capture import _jaxpr, _operations, taps
from proma_jax.capture.access import accesses
from proma_jax.capture.factors import Assembly, Reported, assemble, groups, score_leaf
from proma_jax.capture.layout import CannotArrange, Layout, arrange, layers_of_dense
from proma_jax.capture.search import Path, Search, Source
from proma_jax.scores.leaf import ScoreLeaf, View
from proma_jax.scores.leaves import DenseScores, LayerFactors
from proma_jax.scores.tables import LookupFactors, SumScores

Array = jax.Array
Carried = dict[int, Any]
Visit = Callable[[Path, Array, dict[Path, Any], Carried], tuple[Array, dict[Path, Any], Carried]]
"""See `Program.run`."""


class Program:
    """A traced function and what is known of each parameter's uses in it.

    Args:
      closed: the traced function, its first inputs the parameter leaves.
      out_tree: structure of its outputs, the first of which is the log-probability.
      num_params: how many leaves there are.

    Attributes:
      uses: those that are tapped, by path.
      members: for the first use of each group, all uses of the group.
      parts: for each leaf that is not dense, its layout and how its factors are put together: one
        for each part that its scores are the sum of.
      why_dense: for each leaf that is, why.
    """

    def __init__(self, closed: Any, out_tree: Any, num_params: int) -> None:
        self.jaxpr, self.consts, self.out_tree = closed.jaxpr, closed.consts, out_tree
        search = Search(self.jaxpr, self.consts, num_params)
        shapes = [variable.aval.shape for variable in self.jaxpr.invars[:num_params]]
        self.why_dense = dict(search.lost)
        self.parts: dict[int, list[tuple[Layout, Assembly]]] = {}
        for leaf, of_leaf in accesses(search.uses.values()).items():
            if leaf in self.why_dense:
                continue
            try:
                arranged = arrange(shapes[leaf], of_leaf)
            except CannotArrange as reason:
                self.why_dense[leaf] = str(reason)
            else:
                self.parts[leaf] = [
                    (layout, Assembly(placements, layout.layer_shape, layout.matrix_shape))
                    for layout, placements in arranged
                ]
        self.dense_layers = {
            leaf: layers_of_dense(shapes[leaf], search.touched[leaf])
            for leaf in range(num_params)
            if leaf not in self.parts
        }
        self.shapes = shapes
        self.uses = {
            path: use
            for path, use in sorted(search.uses.items())
            if any(piece.leaf in self.parts for piece in use.pieces)
        }
        first: dict[Any, Path] = {}
        self.members: dict[Path, list[Path]] = defaultdict(list)
        for path, use in self.uses.items():
            group = path if use.is_lookup else use.sources[0]
            self.members[first.setdefault(group, path)].append(path)
        self.first = {path: group for group, paths in self.members.items() for path in paths}
        self._met: dict[Path, list[tuple[Path, Any]]] = defaultdict(list)
        self._met_within: dict[Path, set[int]] = defaultdict(set)
        for group in self.members:
            source = self._where_met(group)
            here, leaves = group[: len(source.path) + 1], self.leaves_of(group)
            self._met[here].append((group, source.variable))
            for i in range(len(here)):
                self._met_within[here[:i]] |= leaves
        convolutions = list(_convolutions(self.jaxpr, ()))
        self.hides_convolution = not all(_operations.is_convolution(e) for _, e in convolutions)
        special = [*self.uses, *(path for path, _ in convolutions)]
        self._scopes = {path[:i] for path in special for i in range(len(path))}

    def _where_met(self, group: Path) -> Source:
        """The innermost variable that all uses of a group go back to, outside of further scans.

        Farther out, what a remat should compute again would be kept.
        """
        sources = self.uses[group].sources
        return next(
            source
            for source in reversed(sources)
            if source.num_scans == sources[0].num_scans
            and all(path[: len(source.path)] == source.path for path in self.members[group])
        )

    def leaves_of(self, group: Path) -> set[int]:
        """The leaves that the uses of a group are of, but for dense ones."""
        pieces = [piece for path in self.members[group] for piece in self.uses[path].pieces]
        return {piece.leaf for piece in pieces if piece.leaf in self.parts}

    @property
    def dense(self) -> list[int]:
        """The leaves with dense scores."""
        return sorted(self.dense_layers)

    def value_and_scores(self, params: Any, sequence: Any) -> tuple[Any, Any]:
        """One sequence's outputs and scores (without the leading axis b)."""
        leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, params))
        data = jax.tree.leaves(sequence)
        probes = varying_like(self.probes(self.members), sequence)

        def run(dense: list[Array], probes: Any) -> tuple[Array, Any]:
            values = list(leaves)
            for i, value in zip(self.dense, dense, strict=True):
                values[i] = value
            value, outputs, _ = self.run([*values, *data], probes, self.reported)
            return value, outputs

        differentiate = jax.grad(run, argnums=(0, 1), has_aux=True)
        (gradients, found), outputs = differentiate([leaves[i] for i in self.dense], probes)
        scores: dict[int, ScoreLeaf] = {
            i: self.dense_leaf(i, gradient)
            for i, gradient in zip(self.dense, gradients, strict=True)
        }
        factored = list(self.parts)
        dtypes = [leaves[i].dtype for i in factored]
        scores |= zip(factored, self.factored(factored, self.reports(found), dtypes), strict=True)
        return outputs, jax.tree.unflatten(treedef, [scores[i] for i in range(len(leaves))])

    def probes(self, groups: Any) -> dict[Path, tuple[Array | None, Array]]:
        """Zeros for all uses of some groups."""
        return {
            path: (
                taps.data_probe(self.uses[path]) if path == group else None,
                taps.result_probe(self.uses[path]),
            )
            for group in groups
            for path in self.members[group]
        }

    def reported(
        self, group: Path, data: Array, probes: dict[Path, Any], carried: Carried
    ) -> tuple[Array, dict[Path, tuple[Array | None, Array]], Carried]:
        """Has a group's taps report; a `Visit`."""
        if self.uses[group].is_lookup:
            return data, {group: probes[group]}, carried
        data = taps.report(jnp.asarray(data), probes[group][0])
        return data, {path: (None, probes[path][1]) for path in self.members[group]}, carried

    def reports(self, found: dict[Path, tuple[Array, Array]]) -> dict[Path, Reported]:
        """What each use reports, from the gradients of the probes."""
        return {path: Reported(found[self.first[path]][0], found[path][1]) for path in found}

    def run(
        self,
        arguments: Sequence[Any],
        extra: dict[Path, Any],
        visit: Visit,
        carried: Carried | None = None,
    ) -> tuple[Array, Any, Carried]:
        """The outputs for one sequence, from a program with its taps.

        Args:
          arguments: leaves of the parameters and of the sequence.
          extra: a pytree for each of some uses, with the lengths of the enclosing scans in front.
          visit: called where a group is met, with its first use, its data, the slices of `extra` in
            this place, and what is carried; returns the data, for each use of the group the probes
            of its tap, that of the result with the lengths of the scans in between in front, and
            what is carried on.
          carried: a pytree for each of some parameter leaves, which goes from one visit to the next
            group that uses the leaf, also from iteration to iteration of a scan.

        Returns:
          The log-probability, all outputs, and what is carried after the last visit.
        """
        outputs, carried = self._run(
            self.jaxpr, self.consts, (), extra, carried or {}, arguments, visit
        )
        return outputs[0], jax.tree.unflatten(self.out_tree, outputs), carried

    def _run(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        path: Path,
        extra: dict[Path, Any],
        carried: Carried,
        args: Sequence[Any],
        visit: Visit,
    ) -> tuple[list[Any], Carried]:
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(atom: Any) -> Any:
            return values[atom] if isinstance(atom, core.Var) else atom.val

        for number, eqn in enumerate(jaxpr.eqns):
            here = (*path, number)
            for group, source in self._met.get(here, ()):
                values[source], probes, carried = visit(group, values[source], extra, carried)
                extra = extra | probes
            operands = [read(atom) for atom in eqn.invars]
            if here in self.uses:
                results = [taps.tapped(self.uses[here], operands, extra[here])]
            elif here in self._scopes:
                results, carried = self._run_inside(eqn, here, extra, carried, operands, visit)
            elif _operations.is_convolution(eqn):
                results = [_operations.convolve(eqn, *operands)]
            else:
                results = _jaxpr.evaluate(eqn, *operands)
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars], carried

    def _run_inside(
        self,
        eqn: core.JaxprEqn,
        path: Path,
        extra: dict[Path, Any],
        carried: Carried,
        operands: list[Any],
        visit: Visit,
    ) -> tuple[list[Any], Carried]:
        inner = _jaxpr.body(eqn)
        assert inner is not None
        within = {p: x for p, x in extra.items() if p[: len(path)] == path}
        used = {leaf: x for leaf, x in carried.items() if leaf in self._met_within.get(path, ())}

        def fn(within: Any, used: Carried, *args: Any) -> tuple[list[Any], Carried]:
            return self._run(inner.jaxpr, inner.consts, path, within, used, args, visit)

        results, used = _jaxpr.rebuild(inner, fn)(within, used, *operands)
        return results, carried | used

    def factored(
        self, leaves: Sequence[int], reported: dict[Path, Reported], dtypes: Sequence[Any]
    ) -> list[ScoreLeaf]:
        """One sequence's scores of some leaves that are not dense, from what their uses report."""
        chosen = [part for leaf in leaves for part in self.parts[leaf]]
        assemblies = [assembly for _, assembly in chosen]
        of_parts = zip(assemblies, assemble(assemblies, reported), groups(assemblies), strict=True)
        scores: list[ScoreLeaf] = []
        for leaf, dtype in zip(leaves, dtypes, strict=True):
            of_leaf = [
                score_leaf(*next(of_parts), view=layout.view(self.shapes[leaf]), dtype=dtype)
                for layout, _ in self.parts[leaf]
            ]
            scores.append(of_leaf[0] if len(of_leaf) == 1 else SumScores(tuple(of_leaf)))
        return scores

    def dense_leaf(self, leaf: int, gradient: Array) -> DenseScores:
        """A dense leaf's scores for one sequence."""
        view = self.view(leaf)
        values = view.apply(gradient)
        return DenseScores(values, self.num_layer_axes(leaf), view, gradient.dtype)

    def num_layer_axes(self, leaf: int) -> int:
        """How many axes of a leaf, in the layout of its scores, count layers."""
        if leaf in self.dense_layers:
            return len(self.dense_layers[leaf])
        of_leaf = self.parts[leaf]
        return len(of_leaf[0][1].layer_shape) if len(of_leaf) == 1 else 0

    def view(self, leaf: int) -> View:
        """How a leaf is read in the layout of its scores."""
        shape = self.shapes[leaf]
        if leaf in self.dense_layers:
            layers = self.dense_layers[leaf]
            return View().transpose([*layers, *(i for i in range(len(shape)) if i not in layers)])
        layouts = [layout for layout, _ in self.parts[leaf]]
        return layouts[0].view(shape) if len(layouts) == 1 else View()

    def kind(self, leaf: int) -> type[ScoreLeaf]:
        """The type of a leaf's scores."""
        if leaf in self.dense_layers:
            return DenseScores
        of_leaf = self.parts[leaf]
        kind = LookupFactors if of_leaf[0][1].is_lookup else LayerFactors
        return kind if len(of_leaf) == 1 else SumScores

    def describe(self, leaf: int) -> tuple[str, str]:
        """The representation of a leaf's scores, and why it has that one."""
        if leaf in self.dense_layers:
            count = math.prod(self.shapes[leaf][i] for i in self.dense_layers[leaf])
            layers = f", {counted(count, 'layer')}" if self.dense_layers[leaf] else ""
            return "DenseScores", self.why_dense.get(leaf, "not used") + layers
        kinds, whys = [], []
        for layout, assembly in self.parts[leaf]:
            is_lookup = assembly.is_lookup
            count = counted(math.prod(layout.layer_shape), "layer")
            layers = f"{count}, " if layout.layers else ""
            d_in, d_out = layout.matrix_shape
            rows = f"{d_in} rows of" if is_lookup else f"{d_in} ->"
            kinds.append("LookupFactors" if is_lookup else "LayerFactors")
            whys.append(f"{layers}{counted(assembly.num_tokens, 'token')}, {rows} {d_out}")
        return " + ".join(kinds), "; ".join(whys)


def _convolutions(jaxpr: core.Jaxpr, path: Path) -> Iterator[tuple[Path, core.JaxprEqn]]:
    """The convolutions of one group in a program, and the equations that hide some."""
    for number, eqn in enumerate(jaxpr.eqns):
        if _operations.contains_convolution(eqn):
            inner = _jaxpr.body(eqn)
            here = (*path, number)
            yield from [(here, eqn)] if inner is None else _convolutions(inner.jaxpr, here)


def trace(logprob_fn: Callable[..., Any], params: Any, sequence: Any, has_aux: bool) -> Program:
    """Traces `logprob_fn` and finds the uses of each parameter.

    Raises:
      ValueError: it does not return what `sequence_scores` needs, or cannot be right on the mesh.
    """
    closed, shapes = jax.make_jaxpr(logprob_fn, return_shape=True)(params, sequence)
    if has_aux and not (isinstance(shapes, tuple) and len(shapes) == 2):
        raise ValueError(
            f"has_aux=True, but logprob_fn returned {shapes}: it must return (scalar, aux)."
        )
    value = shapes[0] if has_aux else shapes
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"logprob_fn must return a floating point scalar for one sequence, got {value}. Sum "
            "the log-probabilities of the response tokens; other outputs need has_aux=True."
        )
    if _jaxpr.ends_in_a_mean(closed.jaxpr):
        warnings.warn(
            "logprob_fn ends in a mean. The log-probability of a sequence is the sum over its "
            "response tokens; how they are weighed is a matter of the coefficients.",
            stacklevel=2,
        )
    program = Program(closed, jax.tree.structure(shapes), len(jax.tree.leaves(params)))
    if program.hides_convolution and has_several_devices():
        raise ValueError(
            "logprob_fn has a convolution inside of a jax.lax.cond, a while loop or a function "
            "with a gradient of its own (custom_vjp). On a mesh XLA may get its gradient for each "
            "sequence wrong, which cannot be mended from here: take the convolution out of there."
        )
    return program
