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

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from proma_jax import settings
from proma_jax._mesh.arrays import automatic, mean, on_devices_of
from proma_jax._mesh.scores import like_parameter
from proma_jax._states import check_state, compiled, state_version
from proma_jax.arithmetic import AxisName
from proma_jax.project import core
from proma_jax.project.dominant import random_starts
from proma_jax.project.linalg import Orthonormalization
from proma_jax.scores.leaves import LayerFactors
from proma_jax.scores.match import kinds, match_scores
from proma_jax.settings import Intra, Mask, Number


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
    shrinkage: Number = 1.0,
    power_iterations: int = 2,
    orthonormalization: Orthonormalization = "cholesky_qr",
    mask: Mask = None,
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
        `project.linalg.orthonormal_basis`.
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
    settings.check_axis_name(axis_name)
    options = Intra(rank, shrinkage, power_iterations, orthonormalization, mask, key)

    def init_fn(params: Any) -> ProjectIntraState:
        state = ProjectIntraState(
            step=jnp.zeros((), jnp.int32),
            rng_key=jnp.array(jax.random.key_data(settings.prng_key(key))),
            intra_fraction=jnp.zeros((), jnp.float32),
            version=state_version(),
        )
        return on_devices_of(params, state)

    def project(
        updates: Any, state: ProjectIntraState, scores: Any
    ) -> tuple[Any, ProjectIntraState]:
        matched = match_scores(updates, scores)
        projects = options.projects(kinds(matched), updates)
        leaves = [like_parameter(update, leaf) for _, update, leaf in matched]
        chosen = [
            (update, leaf.made)
            for update, (_, _, leaf), project in zip(leaves, matched, projects, strict=True)
            if project and leaf is not None and isinstance(leaf.made, LayerFactors)
        ]
        paths = [path for (path, _, _), project in zip(matched, projects, strict=True) if project]
        sizes = [(leaf.rows("inputs").shape[-2], *leaf.matrix_shape) for _, leaf in chosen]
        options.warn_of_whole_gradients(
            [(path, *size) for path, size in zip(paths, sizes, strict=True)]
        )
        shapes = [shape for size in sizes for shape in options.shapes_in(*size)]

        def remove(
            chosen: list[tuple[jax.Array, LayerFactors]],
            others: list[jax.Array],
            rng_key: jax.Array,
            step: jax.Array,
            shrinkage: jax.Array,
        ) -> tuple[list[jax.Array], jax.Array]:
            kind = jax.random.key_impl(settings.prng_key(key))
            now = jax.random.fold_in(jax.random.wrap_key_data(rng_key, impl=kind), step)
            numbers = core.Microbatch(intra=shrinkage, starts=random_starts(now, shapes))
            leaves = [
                core.Leaf(leaf, leaf.view.apply(update), in_intra=True) for update, leaf in chosen
            ]
            parts = core.parts(leaves, numbers, intra=options)
            projected = [
                leaf.view.invert(part.added).astype(update.dtype)
                for (update, leaf), part in zip(chosen, parts, strict=True)
            ]
            whole = [*(part.norms[2] for part in parts), *others]
            return projected, core.fraction([p.norms[1] for p in parts], whole, axis_name)

        others = [update for update, of_leaf in zip(leaves, projects, strict=True) if not of_leaf]
        factor = jnp.asarray(settings.at_step(shrinkage, state.step))
        like = [update for update, _ in chosen], None
        found, fraction = automatic(remove, like, chosen, others, state.rng_key, state.step, factor)
        of_each = iter(found)
        projected = [
            like_parameter(next(of_each), leaf) if project else update
            for update, (_, _, leaf), project in zip(leaves, matched, projects, strict=True)
        ]
        projected = mean(projected, axis_name)
        new_state = state._replace(step=optax.safe_increment(state.step), intra_fraction=fraction)
        return jax.tree.unflatten(jax.tree.structure(updates), projected), new_state

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
