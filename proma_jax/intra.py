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
  >>> 0 < float(state[0].projected_fraction) < 1
  True
"""

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from proma_jax import _options
from proma_jax.scores import LayerFactors, contract, match_scores, wide
from proma_jax.subspace import Orthonormalization, dominant_subspace


class ProjectIntraState(NamedTuple):
    """State of `project_intra`.

    Attributes:
      step: () int32, updates so far; what schedules count.
      rng_key: data of the PRNG key that, folded with `step`, starts a microbatch's bases.
      projected_fraction: () float32, ‖removed‖ / ‖g‖ over all leaves, for the latest microbatch.
    """

    step: jax.Array
    rng_key: jax.Array
    projected_fraction: jax.Array


def project_intra(
    rank: int = 10,
    *,
    shrinkage: _options.Number = 1.0,
    power_iterations: int = 2,
    orthonormalization: Orthonormalization = "cholesky_qr",
    mask: _options.Mask = None,
    seed: int = 0,
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
      seed: of the random starts of the bases. All layers of one width share a start, so neither the
        names of layers nor masking, partitioning or scanning over them change anything.

    Returns:
      The transformation. Updates keep their dtypes; the arithmetic is float32.

    Raises:
      ValueError: an option out of range; in `update`, no `scores`, scores that do not fit the
        updates (with the name of the leaf and both shapes), a mask that asks for a leaf without
        LayerFactors, or no leaf that has them.
    """
    _options.check_count("rank", rank)
    _options.check_count("power_iterations", power_iterations)
    _options.check_choice("orthonormalization", orthonormalization, get_args(Orthonormalization))
    _options.check_number("shrinkage", shrinkage, 0, 1)

    def init_fn(params: Any) -> ProjectIntraState:
        del params
        return ProjectIntraState(
            step=jnp.zeros((), jnp.int32),
            rng_key=jax.random.key_data(jax.random.key(seed)),
            projected_fraction=jnp.zeros((), jnp.float32),
        )

    def update_fn(
        updates: Any,
        state: ProjectIntraState,
        params: Any = None,
        *,
        scores: Any = None,
        **extra: Any,
    ) -> tuple[Any, ProjectIntraState]:
        del params, extra
        matched = match_scores(updates, scores)
        kinds = (LayerFactors,)
        projects = _options.projected_leaves(matched, mask, updates, kinds, kinds)
        if matched and not any(isinstance(leaf, LayerFactors) for _, _, leaf in matched):
            raise ValueError(
                "scores has no LayerFactors, so there is nothing to project: take scores from "
                "proma_jax.sequence_scores, and see proma_jax.describe_scores."
            )
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng_key), state.step)
        factor = _options.at_step(shrinkage, state.step)

        def remove(update: jax.Array, factors: LayerFactors) -> jax.Array:
            return jnp.asarray(factor) * _projection(
                update, factors, rank, key, power_iterations, orthonormalization
            )

        removed = [
            remove(update, leaf) if isinstance(leaf, LayerFactors) and project else None
            for (_, update, leaf), project in zip(matched, projects, strict=True)
        ]
        projected = [
            update if part is None else (wide(update) - part).astype(update.dtype)
            for (_, update, _), part in zip(matched, removed, strict=True)
        ]
        fraction = _options.fraction(
            [part for part in removed if part is not None], jax.tree.leaves(updates)
        )
        new_state = ProjectIntraState(optax.safe_increment(state.step), state.rng_key, fraction)
        return _options.with_leaves(updates, projected), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _projection(
    update: jax.Array,
    factors: LayerFactors,
    rank: int,
    key: jax.Array,
    power_iterations: int,
    orthonormalization: Orthonormalization,
) -> jax.Array:
    """Q_x (Q_xᵀ g Q_d) Q_dᵀ for every layer of a leaf, in the leaf's shape; bases are rows."""

    def one_layer(gradient: jax.Array, inputs: jax.Array, output_grads: jax.Array) -> jax.Array:
        x, d = (rows.reshape(-1, rows.shape[-1]) for rows in (inputs, output_grads))
        in_loss = jnp.any(d != 0, axis=-1)
        q_x, q_d = (
            dominant_subspace(
                rows,
                min(rank, *x.shape, d.shape[1]),
                key,
                kept=in_loss,
                power_iterations=power_iterations,
                orthonormalization=orthonormalization,
            )
            for rows in (x, d)
        )
        core = contract("ri,ij,sj->rs", q_x, gradient, q_d)
        return contract("ri,rs,sj->ij", q_x, core, q_d)

    for _ in range(factors.num_layer_axes):
        one_layer = jax.vmap(one_layer)
    layers = factors.view.apply(wide(update))
    return factors.view.invert(
        one_layer(layers, factors.tokens("inputs"), factors.tokens("output_grads"))
    )
