"""PROMA's accumulation variant: `accumulate` wraps any optax optimizer, like `optax.MultiSteps`.

While the k microbatches of an optimizer step are summed, the running gradient G is projected
orthogonal to each microbatch's scores before that microbatch's own gradient g_m is added:

    G ← G − shrinkage · P_S(G),   S = span{s_1, ..., s_b}
    G ← G + g_m

What is left of earlier microbatches does not, to first order, move the log-probabilities of the
latest one's sequences. After the k-th microbatch the inner optimizer gets G and moves the
parameters; until then the updates are zero.

Example:
  >>> import jax, jax.numpy as jnp, optax
  >>> import proma_jax as proma
  >>> def logprob_fn(params, sequence):
  ...     inputs, tokens = sequence
  ...     logprobs = jax.nn.log_softmax(inputs @ params["kernel"] + params["bias"])
  ...     return jnp.sum(jnp.take_along_axis(logprobs, tokens[:, None], axis=-1))
  >>> params = {"kernel": jnp.zeros((3, 5)), "bias": jnp.zeros(5)}
  >>> inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  >>> tx = proma.accumulate(inner, every_k_schedule=2)
  >>> state = tx.init(params)
  >>> for m in range(2):
  ...     inputs = jax.random.normal(jax.random.key(m), (4, 6, 3))   # b = 4 sequences, 6 tokens
  ...     microbatch = (inputs, jnp.arange(24).reshape(4, 6) % 5)
  ...     logprobs, scores = proma.sequence_scores(logprob_fn)(params, microbatch)
  ...     coefficients = jnp.array([-0.1, 0.2, 0.1, -0.2])           # −advantage / tokens
  ...     grads = proma.weighted_sum(scores, coefficients)
  ...     updates, state = tx.update(grads, state, params, scores=scores)
  ...     params = optax.apply_updates(params, updates)
  ...     print(bool(proma.has_updated(state)), bool(jnp.any(updates["kernel"])))
  False False
  True True
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from proma_jax import settings
from proma_jax._mesh.arrays import automatic, mean, on_devices_of, varying_like
from proma_jax._mesh.scores import like_parameter
from proma_jax._skipping import judge
from proma_jax._states import as_typed, check_shapes, check_state, compiled, state_version
from proma_jax.arithmetic import AxisName
from proma_jax.project import core
from proma_jax.project.span import Solver
from proma_jax.scores.leaf import ScoreLeaf
from proma_jax.scores.match import kinds, match_scores
from proma_jax.settings import Accumulation, Mask, Number

Sync = Literal["microbatch", "emit"]


class AccumulateState(NamedTuple):
    """State of `accumulate`; what it shares with `optax.MultiStepsState` has the same name.

    Attributes:
      mini_step: () int32, microbatches taken so far in this optimizer step.
      gradient_step: () int32, optimizer steps taken so far; what schedules count.
      inner_opt_state: state of the inner optimizer.
      acc_grads: G, shaped like the parameters.
      accumulation_fraction: () float32, ‖removed‖ / ‖G‖ over all leaves, for the latest microbatch.
      accepted: () int32, microbatches of this optimizer step that were not skipped.
      skip_state: what `should_skip_update_fn` last returned beside its verdict.
      version: () int32, of the state's format; see `check_restorable`.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_opt_state: Any
    acc_grads: Any
    accumulation_fraction: jax.Array
    accepted: jax.Array
    skip_state: Any
    version: jax.Array


def accumulate(
    inner: optax.GradientTransformation,
    every_k_schedule: int | Callable[[jax.Array], Any],
    *,
    solver: Solver = "ridge",
    ridge: Number = 1e-2,
    shrinkage: Number = 1.0,
    relative_bound: Number | None = None,
    skip_fraction: Number = 0.0,
    rtol: float = 1e-6,
    average: bool = False,
    accumulator_dtype: DTypeLike = "float32",
    mask: Mask = None,
    should_skip_update_fn: optax.ShouldSkipUpdateFunction | None = None,
    axis_name: AxisName = None,
    sync: Sync = "microbatch",
) -> optax.GradientTransformationExtraArgs:
    """Accumulates microbatches, projecting G orthogonal to each one's scores on the way.

    Call `update(updates, state, params, scores=scores)` once for each microbatch, with the
    microbatch's loss gradient, whatever the objective, and the scores of its sequences from
    `sequence_scores`. Scores line up with updates by leaf path. A leaf that a layer scan or an
    einsum batch axis stacks is projected layer by layer.

    Arrays (b, *leaf.shape) of your own, as from `jax.vmap(jax.grad(logprob_fn), (None, 0))`, serve
    as well, and None where a leaf is not to be projected. But an array is one layer, whatever it
    stacks (`DenseScores(array, num_layer_axes=1)` says otherwise), and it is projected also where
    it is of an embedding table.

    Args:
      inner: any optax optimizer; it runs on the last microbatch of a step only. Gradient clipping
        belongs in it, where it sees the whole step's gradient. Other extra arguments reach it.
      every_k_schedule: k, the microbatches of an optimizer step, or a function from the number of
        optimizer steps taken so far to k. One that returns less than 1 makes every microbatch a
        step.
      solver: of the projection P_S. "ridge" is the author's: it leaves the fraction ridge / (σ² +
        ridge) of a direction whose singular value among the unit-norm scores is σ. "qr" and "svd"
        are exact; they need a leaf's b scores themselves, b times its memory, where "ridge" may
        make do with their factors.
      ridge: of the solver "ridge", at least 0. Default: the author's 1e-2.
      shrinkage: fraction of the projection that is removed, in [0, 1]; 0 is plain accumulation.
        Default: the author's 1.
      relative_bound: where ‖P_S(G)‖ exceeds this many times ‖g_m‖ in a layer, it is scaled down to
        that length; at least 0. Default: None, no bound (the paper's Algorithm 1). The published
        runs used 0.5.
      skip_fraction: nothing is removed at the microbatches m < skip_fraction · k, counted from 0;
        in [0, 1]. Default: 0, all remove. The published runs used 0.5 and 0.001.
      rtol: "qr" and "svd" keep directions with at most this fraction of the largest singular value
        in G. Default: 1e-6, eight float32 epsilons.
      average: divides G by the step's number of microbatches that were not skipped when it goes to
        `inner`, as `use_grad_mean` of `optax.MultiSteps` does. Default: False, a sum, since
        coefficients are normalised by the whole mini-batch already.
      accumulator_dtype: of G. Default: float32. `inner` gets G in the updates' dtype.
      mask: which leaves are projected, a pytree of bools or a function from the updates to one.
        Default: those with dense scores or LayerFactors; embedding lookups and tied tables, as
        `sequence_scores` reports them, are accumulated plainly.
      should_skip_update_fn: as in `optax.MultiSteps`, e.g. `optax.skip_not_finite`. A microbatch
        whose updates it rejects, or whose scores hold NaN or infinity, contributes and removes
        nothing, but counts towards k. Default: None, nothing is skipped.
      axis_name: of one or several mapped axes, inside `jax.shard_map` or `jax.pmap`, as of
        `jax.lax.pmean`: each device has sequences, their scores and their gradient of its own, and
        the microbatch's gradient is the mean over the axis. In `jax.shard_map`, `jax.grad` with
        respect to parameters that are the same on all devices is their sum already: docs/meshes.md.
        Default: None; arrays that are spread over a mesh under `jax.jit` need none and make one
        microbatch.
      sync: with `axis_name`, when the devices' parts are brought together. "microbatch" (default):
        the span is that of all devices' scores, and the result, the same on all, that of one device
        with all sequences. "emit": every device projects a running gradient of its own with its own
        scores only, and the mean of these goes to `inner`; nothing is communicated before that.
        `acc_grads`, `accumulation_fraction`, `accepted` and `skip_state` then differ from device to
        device.

    Under `optax.inject_hyperparams`, name in its static_args what is not a number:
    every_k_schedule, mask and should_skip_update_fn.

    Returns:
      The transformation. `updates` come out zero until the k-th microbatch, then as `inner` makes
      them. The state keeps its structure, shapes and dtypes. ridge, shrinkage, relative_bound and
      skip_fraction may be schedules, functions of the number of optimizer steps taken so far.

    Raises:
      ValueError: an option out of range; in `update`, no `scores`, or scores or a state that do not
        fit the updates, with the name of the leaf and both shapes.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise ValueError(
            f"inner={inner!r} must be an optax transformation, like optax.adamw(1e-5)."
        )
    if not callable(every_k_schedule):
        settings.check_count(
            "every_k_schedule", every_k_schedule, "the number of microbatches of an optimizer step"
        )
    options = Accumulation(solver, ridge, shrinkage, relative_bound, skip_fraction, rtol, mask)
    if accumulator_dtype is None or not jnp.issubdtype(accumulator_dtype, jnp.floating):
        raise ValueError(f"{accumulator_dtype=} must be a floating point type, like 'float32'.")
    settings.check_axis_name(axis_name)
    settings.check_choice("sync", sync, get_args(Sync))
    if sync == "emit" and axis_name is None:
        raise ValueError("sync='emit' needs the axis_name of what is brought together then.")
    together = axis_name if sync == "microbatch" else None
    at_emission = axis_name if sync == "emit" else None
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> AccumulateState:
        gradient_step = jnp.zeros((), jnp.int32)
        skip_state = judge(should_skip_update_fn, params, [], gradient_step, params)[1]
        state = AccumulateState(
            mini_step=jnp.zeros((), jnp.int32),
            gradient_step=gradient_step,
            inner_opt_state=inner.init(params),
            acc_grads=optax.tree.zeros_like(params, dtype=accumulator_dtype),
            accumulation_fraction=jnp.zeros((), jnp.float32),
            accepted=jnp.zeros((), jnp.int32),
            skip_state=optax.tree.zeros_like(skip_state),
            version=state_version(),
        )
        return on_devices_of(params, state)

    def take(
        updates: Any, state: AccumulateState, params: Any, scores: Any, extra: dict[str, Any]
    ) -> tuple[Any, AccumulateState]:
        updates = mean(updates, together)
        matched = match_scores(updates, scores)
        step, m = state.gradient_step, state.mini_step
        k = settings.at_step(every_k_schedule, step)
        projects = options.projects(kinds(matched), updates)
        accumulated = jax.tree.leaves(state.acc_grads)
        numbers = core.Microbatch(options.removes(m, k, step), options.at_step(step))
        inner_state = state.inner_opt_state
        if together is None:
            accumulated = varying_like(accumulated, (updates, scores))
        if axis_name is None:
            inner_state = varying_like(inner_state, (updates, scores))
        chosen = [
            leaf if project else None
            for (_, _, leaf), project in zip(matched, projects, strict=True)
        ]

        def add(
            accumulated: list[jax.Array],
            updates: list[jax.Array],
            chosen: list[ScoreLeaf | None],
            numbers: core.Microbatch,
        ) -> tuple[list[jax.Array], jax.Array]:
            def added(
                total: jax.Array, update: jax.Array, scores: ScoreLeaf | None
            ) -> tuple[jax.Array, jax.Array]:
                """What is added to a leaf's total, and the norm of what was removed from it."""
                if scores is None:
                    return update, core.norm(None)
                own, within = scores.view.apply(update), scores.view.apply(total)
                leaf = core.Leaf(scores, own, within)
                [part] = core.parts([leaf], numbers, accumulation=options, axis_name=together)
                return scores.view.invert(part.added), part.norms[0]

            found = [added(*of_leaf) for of_leaf in zip(accumulated, updates, chosen, strict=True)]
            summed = [
                (total + part).astype(accumulator_dtype)
                for total, (part, _) in zip(accumulated, found, strict=True)
            ]
            return summed, core.fraction([length for _, length in found], accumulated)

        summed, fraction = automatic(
            add,
            (accumulated, None),
            accumulated,
            jax.tree.leaves(updates),
            chosen,
            numbers,
        )

        summed = [
            like_parameter(total, leaf) for total, (_, _, leaf) in zip(summed, matched, strict=True)
        ]
        of_leaves = [leaf for _, _, leaf in matched]
        skip, skip_state = judge(should_skip_update_fn, updates, of_leaves, step, params, together)
        total = jax.tree.unflatten(
            jax.tree.structure(state.acc_grads),
            [jnp.where(skip, old, new) for old, new in zip(accumulated, summed, strict=True)],
        )
        emits = m >= k - 1
        accepted = jnp.where(skip, state.accepted, state.accepted + 1)

        def emit(total: Any, inner_state: Any) -> tuple[Any, Any]:
            if average:
                count = jnp.maximum(accepted, 1)
                total = jax.tree.map(lambda x: x / count.astype(x.dtype), total)
            whole = mean(total, at_emission)
            gradient = optax.tree.cast_like(whole, updates)
            emitted = inner.update(gradient, inner_state, params, **extra)
            if axis_name is None:
                emitted = varying_like(emitted, (updates, scores))
            return emitted[0], jax.tree.map(as_typed, emitted[1], inner_state)

        def hold(total: Any, inner_state: Any) -> tuple[Any, Any]:
            shapes, _ = jax.eval_shape(emit, total, inner_state)
            return jax.tree.map(jnp.zeros_like, shapes), inner_state

        new_updates, inner_state = jax.lax.cond(emits, emit, hold, total, inner_state)
        return new_updates, AccumulateState(
            mini_step=jnp.where(emits, 0, m + 1),
            gradient_step=jnp.where(emits, optax.safe_increment(step), step),
            inner_opt_state=inner_state,
            acc_grads=jax.tree.map(lambda x: jnp.where(emits, 0, x), total),
            accumulation_fraction=jnp.where(skip, 0, fraction),
            accepted=jnp.where(emits, 0, accepted),
            skip_state=jax.tree.map(as_typed, skip_state, state.skip_state),
            version=state.version,
        )

    take_as_one = compiled(take, *vars(options).values())

    def update_fn(
        updates: Any,
        state: AccumulateState,
        params: Any = None,
        *,
        scores: Any = None,
        **extra: Any,
    ) -> tuple[Any, AccumulateState]:
        check_state(state, AccumulateState)
        updates = jax.tree.map(jnp.asarray, updates)
        check_shapes(updates, state.acc_grads)
        return take_as_one(updates, state, params, scores, extra)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def has_updated(state: Any) -> jax.Array:
    """Whether the latest microbatch completed an optimizer step.

    Args:
      state: of `accumulate`, or of anything that wraps one, such as `optax.chain`.

    Returns:
      () bool.

    Raises:
      ValueError: the state holds no AccumulateState (optax.MultiSteps has a method `has_updated` of
        its own), or several.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.identity(), accumulate(optax.sgd(0.1), 2))
      >>> print(has_updated(tx.init(jnp.zeros(3))))
      False
    """

    def is_ours(x: Any) -> bool:
        return isinstance(x, AccumulateState)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    if len(found) != 1:
        raise ValueError(f"state must hold one AccumulateState, but holds {len(found)}.")
    return (jnp.asarray(found[0].mini_step) == 0) & (jnp.asarray(found[0].gradient_step) > 0)
