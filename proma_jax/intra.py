"""PROMA's intra-microbatch variant: `project_intra`, an ordinary link of an `optax.chain`.

Of each microbatch's gradient g of a kernel it removes what lies in the dominant subspaces of the
kernel's inputs X (n, d_in) and output gradients D (n, d_out), over all tokens n of the microbatch:

    Q_x, Q_d = orthonormal bases of about the top-r right singular subspaces of X and D
    g ← g − shrinkage · Q_x (Q_xᵀ g Q_d) Q_dᵀ

A token whose output gradient is zero in a layer (padding, or beyond the loss) has no say in that
layer's bases. The rank means something only beside the number of tokens and the layer's widths: of
few tokens or narrow layers a rank of 10 removes far more than of large ones, and with n ≤ rank all.

Example:
  >>> import jax, jax.numpy as jnp, optax
  >>> import proma_jax as proma
  >>> scores_fn = proma.sequence_scores(lambda params, x: jnp.sum(jnp.sin(x @ params["kernel"])))
  >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
  >>> inputs = jax.random.normal(jax.random.key(1), (2, 16, 8))   # 2 sequences of 16 tokens
  >>> _, scores = scores_fn(params, inputs)
  >>> grads = proma.weighted_sum(scores, jnp.array([-1.0, 1.0]))
  >>> tx = optax.chain(proma.project_intra(rank=2), optax.adamw(1e-3))
  >>> updates, state = tx.update(grads, tx.init(params), params, scores=scores)
  >>> 0 < float(state[0].intra_fraction) < 1
  True
"""

import collections
import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from proma_jax import _options
from proma_jax._mesh import automatic, spec_of, spread
from proma_jax._states import check_state, compiled, on_devices_of, state_version
from proma_jax.scores import AxisName, LayerFactors, contract, known_spec, match_scores, wide
from proma_jax.subspace import (
    Orthonormalization,
    dominant_directions,
    orthonormal_basis,
    random_start,
)

Start = Callable[[int, int, Any], jax.Array]
"""(rank, dimension, dtype) to the directions from which bases of that shape start."""


@dataclasses.dataclass(frozen=True)
class Intra:
    """Settings of the intra-microbatch variant, as the arguments of `project_intra`.

    Attributes:
      rank: see `project_intra`; the same holds for the others.
      shrinkage: if it is a function, of the number of microbatches so far.
      power_iterations: of the subspace iteration.
      orthonormalization: of the bases.
      mask: which leaves are projected.
      key: of the random starts of the bases.
    """

    rank: int = 10
    shrinkage: _options.Number = 1.0
    power_iterations: int = 2
    orthonormalization: Orthonormalization = "cholesky_qr"
    mask: _options.Mask = None
    key: int | jax.Array = 0

    def __post_init__(self) -> None:
        _options.check_count("rank", self.rank, "the dimension of the subspaces")
        _options.check_count(
            "power_iterations", self.power_iterations, "how often a basis is refined"
        )
        choices = get_args(Orthonormalization)
        _options.check_choice("orthonormalization", self.orthonormalization, choices)
        _options.check_number("shrinkage", self.shrinkage, 0, 1)
        _options.check_mask(self.mask)
        _options.check_key(self.key)

    def projects(self, kinds: Sequence[tuple[str, type]], updates: Any) -> list[bool]:
        """Which leaves are projected, given the path and the kind of scores of each."""
        projects = _options.projected_leaves(
            kinds, self.mask, updates, (LayerFactors,), (LayerFactors,)
        )
        if kinds and not any(issubclass(kind, LayerFactors) for _, kind in kinds):
            raise ValueError(
                "scores has no LayerFactors, so there is nothing to project: take scores from "
                "proma_jax.sequence_scores, and see proma_jax.describe_scores."
            )
        return projects

    def start(self, key: jax.Array, step: jax.Array) -> Start:
        """Where the bases of a microbatch start: the same for all layers of one width."""
        return functools.cache(functools.partial(random_start, jax.random.fold_in(key, step)))

    def rank_in(self, num_tokens: int, d_in: int, d_out: int) -> int:
        """The rank of a layer's subspaces, for a microbatch of so many tokens."""
        return min(self.rank, num_tokens, d_in, d_out)

    def rank_of(self, factors: LayerFactors) -> int:
        """The rank of the subspaces of a layer with these factors."""
        num_tokens, d_in = factors.rows("inputs").shape[-2:]
        return self.rank_in(num_tokens, d_in, factors.output_grads.shape[-1])

    def warn_of_whole_gradients(self, layers: Sequence[tuple[str, int, int, int]]) -> None:
        """Warns of layers whose gradient is in the subspaces, all of it.

        Args:
          layers: path, number of tokens, d_in and d_out of each.
        """
        whole = [
            f"{path or '(root)'} ({_count(num_tokens, 'token')}, {d_in} -> {d_out})"
            for path, num_tokens, d_in, d_out in layers
            for rank in [self.rank_in(num_tokens, d_in, d_out)]
            if 0 < num_tokens == rank or d_in == d_out == rank
        ]
        if whole:
            warnings.warn(
                f"Intra of rank {self.rank} removes the whole gradient of {', '.join(whole)}. Take "
                "a rank well below the tokens of a microbatch and the widths of its layers, or "
                "leave these out by a mask.",
                stacklevel=2,
            )

    def directions(
        self, factors: Sequence[LayerFactors], start: Start
    ) -> list[tuple[jax.Array, jax.Array]]:
        """What spans the dominant subspaces of each leaf's inputs and output gradients.

        Args:
          factors: of each leaf. Leaves with the same `input_group` share the directions of their
            inputs.
          start: of the subspace iteration.

        Returns:
          For each leaf (*layers, r, d_in) and (*layers, r, d_out), rows of unit length, or zero.
        """
        matrices: dict[Any, tuple[jax.Array, jax.Array | None]] = {}
        keys: list[tuple[Any, Any]] = []
        for leaf in factors:
            inputs, output_grads = leaf.rows("inputs"), leaf.rows("output_grads")
            in_loss = leaf.tokens_in_loss().reshape(inputs.shape[:-1])
            own = (len(keys),)
            shared = own if leaf.input_group is None else leaf.input_group
            rank, layers = self.rank_of(leaf), leaf.layer_shape
            of_inputs = rank, inputs.shape[-1], layers, "inputs", shared
            of_grads = rank, output_grads.shape[-1], layers, "output_grads", own
            matrices |= {of_inputs: (inputs, in_loss), of_grads: (output_grads, None)}
            keys.append((of_inputs, of_grads))
        alike: dict[Any, list[Any]] = collections.defaultdict(list)
        for key in matrices:
            alike[key[:3]].append(key)
        found: dict[Any, jax.Array] = {}
        for (rank, dimension, _), group in alike.items():
            rows, kept = zip(*(matrices[key] for key in group), strict=True)
            from_start = start(rank, dimension, rows[0].dtype)
            directions = dominant_directions(
                rows, from_start, kept=kept, power_iterations=self.power_iterations
            )
            found |= zip(group, directions, strict=True)
        return [(found[of_inputs], found[of_grads]) for of_inputs, of_grads in keys]

    def common_parts(
        self,
        gradients: Sequence[jax.Array],
        directions: Sequence[tuple[jax.Array, jax.Array]],
    ) -> list[jax.Array]:
        """What lies in the dominant subspaces: Q_x (Q_xᵀ g Q_d) Q_dᵀ; bases are rows.

        Args:
          gradients: g of each leaf, (*layers, d_in, d_out).
          directions: of each leaf, as from `directions`.
        """
        distinct = {id(rows): rows for pair in directions for rows in pair}
        alike: dict[Any, list[int]] = collections.defaultdict(list)
        for key, rows in distinct.items():
            alike[rows.shape[-2:], rows.dtype].append(key)
        bases: dict[int, jax.Array] = {}
        for (shape, _), group in alike.items():
            flat = [
                distinct[key].reshape(math.prod(distinct[key].shape[:-2]), *shape) for key in group
            ]
            basis = orthonormal_basis(jnp.concatenate(flat), self.orthonormalization)
            ends = itertools.accumulate(len(rows) for rows in flat)
            for key, rows, end in zip(group, flat, ends, strict=True):
                bases[key] = basis[end - len(rows) : end].reshape(distinct[key].shape)

        def common_part(gradient: jax.Array, q_x: jax.Array, q_d: jax.Array) -> jax.Array:
            core = contract("...ri,...ij,...sj->...rs", q_x, gradient, q_d)
            return contract("...ri,...rs,...sj->...ij", q_x, core, q_d)

        return [
            common_part(gradient, bases[id(x)], bases[id(d)])
            for gradient, (x, d) in zip(gradients, directions, strict=True)
        ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class ProjectIntraState(NamedTuple):
    """State of `project_intra`.

    Attributes:
      step: () int32, updates so far; what schedules count.
      rng_key: data of the PRNG key that, folded with `step`, starts a microbatch's bases.
      intra_fraction: () float32, ‖removed‖ / ‖g‖ over all leaves, for the latest microbatch.
      version: () int32, of the state's format; see `check_restorable`.
    """

    step: jax.Array
    rng_key: jax.Array
    intra_fraction: jax.Array
    version: jax.Array


def project_intra(
    rank: int = 10,
    *,
    shrinkage: _options.Number = 1.0,
    power_iterations: int = 2,
    orthonormalization: Orthonormalization = "cholesky_qr",
    mask: _options.Mask = None,
    key: int | jax.Array = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Removes what lies in a microbatch's dominant subspaces from its gradient, layer by layer.

    Call `update(updates, state, params, scores=scores)` with scores from `sequence_scores`.
    Kernels, whose scores are `LayerFactors`, are projected; all other leaves (norms, biases,
    embeddings, tied tables) pass unchanged. Put it before whatever accumulates the microbatches,
    and gradient clipping after that.

    Args:
      rank: r, the dimension of the subspaces; min(rank, n, d_in, d_out) in each layer. Default: the
        published 10.
      shrinkage: fraction of the projection that is removed, in [0, 1]; a number or a function of
        the number of updates so far. Default: 1, as published.
      power_iterations: of the subspace iteration, at least 1. Default: 2, with which the bases
        capture at least the energy ‖X Q‖² / ‖X‖² of the published scheme's 1.
      orthonormalization: "cholesky_qr" (default), "qr" or "svd"; as in
        `subspace.orthonormal_basis`.
      mask: which leaves are projected, a pytree of bools or a function from the updates to one.
        Default: those with LayerFactors.
      key: of the random starts of the bases: a seed, or a key of `jax.random.key` or its raw data.
        Default: 0. All layers of one width share a start, so neither the names of layers nor
        masking, partitioning or scanning over them change anything.
      axis_name: of one or several mapped axes, inside `jax.shard_map` or `jax.pmap`, as of
        `jax.lax.pmean`. Every device then projects its own microbatch's gradient with its own
        bases, and the result, the same on all, is the mean over the axis, as published. As for
        `accumulate`, the gradients must be the devices' own (docs/meshes.md). Default: None; arrays
        that are spread over a mesh under `jax.jit` need none and make one microbatch.

    Returns:
      The transformation. Updates keep their dtypes; the arithmetic is float32.

    Raises:
      ValueError: an option out of range; in `update`, no `scores`, scores that do not fit the
        updates (with the name of the leaf and both shapes), a mask that asks for a leaf without
        LayerFactors, or no leaf that has them.
    """
    _options.check_axis_name(axis_name)
    options = Intra(rank, shrinkage, power_iterations, orthonormalization, mask, key)

    def init_fn(params: Any) -> ProjectIntraState:
        state = ProjectIntraState(
            step=jnp.zeros((), jnp.int32),
            rng_key=jnp.array(jax.random.key_data(_options.prng_key(key))),
            intra_fraction=jnp.zeros((), jnp.float32),
            version=state_version(),
        )
        return on_devices_of(params, state)

    def project(
        updates: Any, state: ProjectIntraState, scores: Any
    ) -> tuple[Any, ProjectIntraState]:
        matched = match_scores(updates, scores)
        projects = options.projects([(path, type(leaf)) for path, _, leaf in matched], updates)
        leaves = [spread(update, known_spec(leaf)) for _, update, leaf in matched]
        chosen = [
            (update, leaf)
            for update, (_, _, leaf), project in zip(leaves, matched, projects, strict=True)
            if project and isinstance(leaf, LayerFactors)
        ]
        options.warn_of_whole_gradients(
            [
                (path, leaf.rows("inputs").shape[-2], *leaf.matrix_shape)
                for (path, _, leaf), project in zip(matched, projects, strict=True)
                if project and isinstance(leaf, LayerFactors)
            ]
        )

        def remove(
            chosen: list[tuple[jax.Array, LayerFactors]],
            updates: list[jax.Array],
            rng_key: jax.Array,
            step: jax.Array,
            factor: jax.Array,
        ) -> tuple[list[jax.Array], jax.Array]:
            kind = jax.random.key_impl(_options.prng_key(key))
            start = options.start(jax.random.wrap_key_data(rng_key, impl=kind), step)
            layers = [leaf.view.apply(wide(update)) for update, leaf in chosen]
            directions = options.directions([leaf for _, leaf in chosen], start)
            parts = options.common_parts(layers, directions)
            removed = [
                factor * leaf.view.invert(part)
                for (_, leaf), part in zip(chosen, parts, strict=True)
            ]
            projected = [
                (wide(update) - part).astype(update.dtype)
                for (update, _), part in zip(chosen, removed, strict=True)
            ]
            return projected, _options.fraction(removed, updates, axis_name)

        factor = jnp.asarray(_options.at_step(shrinkage, state.step))
        specs = [spec_of(update) for update, _ in chosen], PartitionSpec()
        found, fraction = automatic(
            remove, specs, chosen, leaves, state.rng_key, state.step, factor
        )
        of_each = iter(found)
        projected = [
            next(of_each) if project else update
            for update, project in zip(leaves, projects, strict=True)
        ]
        projected = _options.mean(projected, axis_name)
        new_state = state._replace(step=optax.safe_increment(state.step), intra_fraction=fraction)
        return _options.with_leaves(updates, projected), new_state

    project_as_one = compiled(project, shrinkage)

    def update_fn(
        updates: Any,
        state: ProjectIntraState,
        params: Any = None,
        *,
        scores: Any = None,
        **extra: Any,
    ) -> tuple[Any, ProjectIntraState]:
        del params, extra
        check_state(state, ProjectIntraState)
        return project_as_one(jax.tree.map(jnp.asarray, updates), state, scores)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
