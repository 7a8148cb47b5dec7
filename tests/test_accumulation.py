"""`accumulate` against a float64 NumPy account of whole optimizer steps, and its promises."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

import proma_jax as proma
from proma_jax.capture import _jaxpr
from proma_jax.scores.leaf import is_score_leaf
from tests import models, oracles
from tests.oracles import assert_close

SHAPES = {"kernel": (5, 4), "bias": (4,), "stack": (2, 3, 3)}
KEEP = optax.identity()


def microbatches(k, b=3, seed=0, dtype=jnp.float32, scale=1.0):
    """k pairs of gradients and dense scores, "stack" in two layers, "plain" without scores."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    result = []
    for _ in range(k):
        grads = {name: normal(*shape) for name, shape in SHAPES.items()} | {"plain": normal(3)}
        scores = {name: normal(b, *shape) for name, shape in SHAPES.items()} | {"plain": None}
        scores["stack"] = proma.DenseScores(scores["stack"], num_layer_axes=1)
        result.append((grads, scores))
    return result


def run(tx, steps, params=None):
    """The updates at every microbatch, and the last state."""
    params = jax.tree.map(jnp.zeros_like, steps[0][0]) if params is None else params
    state, emitted = tx.init(params), []
    update = jax.jit(tx.update)
    for grads, scores in steps:
        updates, state = update(grads, state, params, scores=scores)
        emitted.append(updates)
    return emitted, state


def emitted_gradient(steps, **options):
    """What the inner optimizer gets after all of `steps`."""
    return run(proma.accumulate(KEEP, len(steps), **options), steps)[0][-1]


def expected_gradient(steps, **options):
    def layers(leaf, pick):
        updates = [pick(grads[leaf]) for grads, _ in steps]
        return updates, [pick(getattr(s[leaf], "values", s[leaf]), 1) for _, s in steps]

    def whole(x, axis=0):
        return np.float64(x)

    def layer(i):
        return lambda x, axis=0: np.float64(jnp.take(x, i, axis))

    expected = {n: oracles.accumulate(*layers(n, whole), **options) for n in ("kernel", "bias")}
    stack = [oracles.accumulate(*layers("stack", layer(i)), **options) for i in range(2)]
    plain = sum(np.float64(grads["plain"]) for grads, _ in steps)
    return expected | {"stack": np.stack(stack), "plain": plain}


@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.sampled_from([1, 2, 4, 5]),
    solver=st.sampled_from(["ridge", "qr", "svd"]),
    shrinkage=st.sampled_from([0.4, 1.0]),
    bound=st.sampled_from([None, 0.5]),
    skip=st.sampled_from([0.0, 0.001, 0.5, 0.6, 1.0]),
    scale=st.sampled_from([1e-10, 1.0, 1e10]),
)
def test_whole_steps_match_float64(seed, k, solver, shrinkage, bound, skip, scale):
    steps = microbatches(k, seed=seed, scale=scale)
    options = {
        "solver": solver,
        "shrinkage": shrinkage,
        "relative_bound": bound,
        "skip_fraction": skip,
    }
    assert_close(emitted_gradient(steps, **options), expected_gradient(steps, **options), 5e-5)


@pytest.mark.any_version
class Variants(chex.TestCase):
    @chex.all_variants
    @parameterized.parameters("ridge", "svd")
    def test_jit_and_devices_change_nothing(self, solver):
        steps = microbatches(3)
        tx = proma.accumulate(KEEP, 3, solver=solver)
        update = self.variant(lambda grads, state, scores: tx.update(grads, state, scores=scores))
        state = tx.init(steps[0][0])
        for grads, scores in steps:
            updates, state = update(grads, state, scores)
        chex.assert_trees_all_close(
            updates, emitted_gradient(steps, solver=solver), rtol=1e-4, atol=1e-5
        )


def test_no_shrinkage_is_plain_accumulation():
    steps = microbatches(4)
    plain = jax.tree.map(lambda *grads: sum(grads), *[grads for grads, _ in steps])
    chex.assert_trees_all_close(emitted_gradient(steps, shrinkage=0.0), plain, atol=1e-6)
    chex.assert_trees_all_close(emitted_gradient(steps, skip_fraction=1.0), plain, atol=1e-6)
    mean = emitted_gradient(steps, shrinkage=0.0, average=True)
    chex.assert_trees_all_close(mean, jax.tree.map(lambda x: x / 4, plain), atol=1e-6)


def test_the_bound_means_the_same_for_a_mean_as_for_a_sum():
    steps = microbatches(4)
    total = emitted_gradient(steps, relative_bound=0.1)
    mean = emitted_gradient(steps, relative_bound=0.1, average=True)
    chex.assert_trees_all_close(mean, jax.tree.map(lambda x: x / 4, total), atol=1e-6)


def test_earlier_microbatches_keep_nothing_along_the_latest_scores():
    steps = microbatches(4)
    kept = emitted_gradient(steps, solver="qr")
    last_grads, last_scores = steps[-1]
    rest = np.float64(kept["kernel"] - last_grads["kernel"]).ravel()
    along = oracles.unit_rows(last_scores["kernel"]) @ rest
    assert np.abs(along).max() < 1e-5 * np.linalg.norm(rest)


@pytest.mark.parametrize("solver", ["ridge", "qr", "svd"])
def test_the_order_of_microbatches_matters_that_of_sequences_does_not(solver):
    steps = microbatches(3)
    permuted = [
        (grads, jax.tree.map(lambda s: s[jnp.array([2, 0, 1])], scores)) for grads, scores in steps
    ]
    gradient = emitted_gradient(steps, solver=solver)
    assert_close(emitted_gradient(permuted, solver=solver), gradient)
    reordered = emitted_gradient([steps[1], steps[0], steps[2]], solver=solver)
    difference = np.linalg.norm(np.float64(reordered["kernel"] - gradient["kernel"]))
    assert difference > 0.1 * np.linalg.norm(np.float64(gradient["kernel"]))


def test_padding_changes_nothing():
    """Zero scores, as of sequences of padding, and zero rows in factors, as of padded tokens."""
    steps = microbatches(3)
    padded = [
        (grads, jax.tree.map(lambda s: jnp.pad(s, [(0, 2)] + [(0, 0)] * (s.ndim - 1)), scores))
        for grads, scores in steps
    ]
    assert_close(emitted_gradient(padded), emitted_gradient(steps))


def test_updates_are_zero_until_the_inner_optimizer_runs_once_a_step():
    steps = microbatches(6)
    emitted, state = run(proma.accumulate(optax.adam(0.1), 3), steps)
    assert [bool(jnp.any(u["kernel"])) for u in emitted] == [False, False, True] * 2
    assert state.inner_opt_state[0].count == state.gradient_step == 2
    assert state.mini_step == 0
    chex.assert_trees_all_equal(state.acc_grads, jax.tree.map(jnp.zeros_like, state.acc_grads))


def test_steps_do_not_leak_into_each_other():
    steps = microbatches(6)
    emitted, _ = run(proma.accumulate(KEEP, 3), steps)
    assert_close(emitted[5], emitted_gradient(steps[3:]))


def test_has_updated_sees_through_wrappers():
    tx = optax.chain(optax.scale(2.0), proma.accumulate(optax.adam(0.1), 2))
    steps = microbatches(4)
    state, seen = tx.init(steps[0][0]), []
    for grads, scores in steps:
        _, state = tx.update(grads, state, scores=scores)
        seen.append(bool(proma.has_updated(state)))
    assert seen == [False, True, False, True]
    with pytest.raises(ValueError, match="holds 0"):
        proma.has_updated(optax.adam(0.1).init(jnp.zeros(2)))


def test_k_and_every_option_may_be_schedules_of_the_optimizer_steps():
    steps = microbatches(5)
    tx = proma.accumulate(
        KEEP,
        lambda step: jnp.where(step == 0, 2, 3),
        shrinkage=lambda step: jnp.where(step == 0, 0.5, 1.0),
        ridge=lambda step: jnp.where(step == 0, 1e-2, 1e-1),
        relative_bound=lambda step: jnp.where(step == 0, 1e9, 0.3),
        skip_fraction=lambda step: jnp.where(step == 0, 0.0, 0.5),
    )
    emitted, state = run(tx, steps)
    assert state.gradient_step == 2
    assert_close(emitted[1], emitted_gradient(steps[:2], shrinkage=0.5))
    second = {"ridge": 1e-1, "relative_bound": 0.3, "skip_fraction": 0.5}
    assert_close(emitted[4], emitted_gradient(steps[2:], **second))


def test_accumulation_fraction_is_what_was_removed():
    steps = microbatches(3)
    _, before = run(proma.accumulate(KEEP, 4, solver="qr"), steps[:2])
    _, after = run(proma.accumulate(KEEP, 4, solver="qr"), steps)
    whole = np.concatenate([np.ravel(x) for x in jax.tree.leaves(before.acc_grads)])
    removed = np.concatenate(
        [
            np.ravel(old + new - kept)
            for old, new, kept in zip(
                *map(jax.tree.leaves, (before.acc_grads, steps[2][0], after.acc_grads)),
                strict=True,
            )
        ]
    )
    expected = np.linalg.norm(removed) / np.linalg.norm(whole)
    np.testing.assert_allclose(after.accumulation_fraction, expected, rtol=1e-4)
    assert run(proma.accumulate(KEEP, 4), steps[:1])[1].accumulation_fraction == 0


def test_masks_choose_the_projected_leaves():
    steps = microbatches(3)
    projected, plain = emitted_gradient(steps), emitted_gradient(steps, shrinkage=0.0)
    mask = {"kernel": True, "bias": False, "stack": False, "plain": False}
    for form in (mask, lambda updates: {name: name == "kernel" for name in updates}):
        masked = emitted_gradient(steps, mask=form)
        assert_close(masked, plain | {"kernel": projected["kernel"]})


def test_bfloat16_gradients_are_summed_in_float32():
    steps = [(grads, scores) for grads, scores in microbatches(32, dtype=jnp.bfloat16)]
    exact = jax.tree.map(lambda *g: sum(np.float64(x) for x in g), *[grads for grads, _ in steps])
    emitted = emitted_gradient(steps, shrinkage=0.0)
    assert_close(emitted, exact, 4e-3)
    chex.assert_trees_all_equal_dtypes(emitted, steps[0][0])


def test_skipped_microbatches_count_and_say_why():
    steps = microbatches(3)
    limit = functools.partial(optax.skip_large_updates, max_squared_norm=0.0)
    emitted, state = run(proma.accumulate(KEEP, 3, should_skip_update_fn=limit), steps)
    chex.assert_trees_all_equal(emitted[2], jax.tree.map(jnp.zeros_like, emitted[2]))
    assert state.gradient_step == 1
    assert state.skip_state["should_skip"]


def test_a_mean_leaves_out_skipped_microbatches_as_that_of_optax_does():
    """None, one, both and the first of the two of a step: what is left is still a mean."""
    grads, bad = {"w": jnp.full(2, 2.0)}, {"w": jnp.full(2, jnp.nan)}
    tx = proma.accumulate(KEEP, 2, average=True, should_skip_update_fn=optax.skip_not_finite)
    state, emitted = tx.init(grads), []
    for updates in (grads, grads, grads, bad, bad, bad, bad, grads):
        updates, state = tx.update(updates, state, scores={"w": None})
        if proma.has_updated(state):
            emitted.append(float(updates["w"][0]))
    assert emitted == [2, 2, 0, 2]


def test_extra_arguments_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, scale, **extra):
        return jax.tree.map(lambda x: scale * x, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    (grads, scores), tx = microbatches(1)[0], proma.accumulate(inner, 1)
    updates, _ = tx.update(grads, tx.init(grads), scores=scores, scale=3.0)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: 3 * x, grads))


# Models whose scores are put together in different ways; test_capture.py has them all.
COMPOSED = [
    "convolution",
    "kernel_batched_in_the_middle",
    "linen_ScanOfRemat",
    "nnx_attention",
    "nnx_jit_called_twice",
    "nnx_scan_of_remat",
    "scan_in_a_scan_transposed",
    "scan_with_a_shared_kernel",
    "tables_of_layers",
    "tied_embedding",
]


@pytest.mark.any_version
@pytest.mark.parametrize("name", COMPOSED)
def test_captured_scores_give_what_dense_scores_give(name):
    """With every leaf projected."""
    logprob_fn, params, microbatch = models.MODELS[name]()
    params = jax.tree.map(jnp.asarray, params)
    everything = jax.tree.map(lambda _: True, params)
    tx = proma.accumulate(KEEP, 2, mask=everything)
    first = jax.tree.map(lambda x: jnp.linspace(-1.0, 1.0, x.size).reshape(x.shape), params)

    @jax.jit
    def gradients(params):
        _, scores = proma.sequence_scores(logprob_fn)(params, microbatch)
        dense = jax.vmap(jax.grad(logprob_fn), (None, 0))(params, microbatch)
        # Layer axes are known to captured scores alone.
        dense = jax.tree.map(as_layers, scores, dense, is_leaf=is_score_leaf)
        state = tx.init(params)._replace(acc_grads=first, mini_step=jnp.int32(1))
        zero = jax.tree.map(jnp.zeros_like, params)
        return [tx.update(zero, state, scores=s)[0] for s in (scores, dense)]

    ours, expected = gradients(params)
    traced = jax.make_jaxpr(logprob_fn)(params, jax.tree.map(lambda x: x[0], microbatch))
    tolerance = 2e-2 if _jaxpr.is_narrow(traced.jaxpr) else 1e-4
    for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(np.float64(a - e)) <= tolerance * np.linalg.norm(np.float64(e)) + 1e-6


def as_layers(leaf, dense):
    layers = jax.vmap(leaf.view.apply)(dense)
    return proma.DenseScores(layers, leaf.num_layer_axes, leaf.view, dense.dtype)


@pytest.mark.any_version
def test_an_unrolled_model_gives_what_its_scanned_twin_gives():
    unrolled, scanned, stack = models.twins()
    results = []
    for logprob_fn, params, microbatch in (unrolled, scanned):
        halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), microbatch)
        steps = []
        for m in range(2):
            half = jax.tree.map(lambda x, m=m: x[m], halves)
            _, scores = jax.jit(proma.sequence_scores(logprob_fn))(params, half)
            steps.append((proma.weighted_sum(scores, jnp.array([-1.0, 0.5])), scores))
        results.append(emitted_gradient(steps, relative_bound=0.5))
    assert_close(results[1], stack(results[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"every_k_schedule": 0},
            "every_k_schedule=0 must be at least 1: it is the number of microbatches",
        ),
        ({"every_k_schedule": 2.0}, "every_k_schedule=2.0"),
        ({"solver": "lu"}, "solver='lu' must be one of 'ridge', 'qr', 'svd'"),
        ({"ridge": -1.0}, r"ridge=-1.0 must be a number in \[0, inf\]"),
        ({"shrinkage": 1.5}, r"shrinkage=1.5 must be a number in \[0, 1\]"),
        ({"skip_fraction": -0.1}, "skip_fraction=-0.1"),
        ({"relative_bound": -0.5}, "relative_bound=-0.5"),
        ({"rtol": 2.0}, "rtol=2.0"),
        ({"shrinkage": None}, "shrinkage=None must be a number"),
        ({"shrinkage": "1"}, "shrinkage='1' must be a number"),
        ({"accumulator_dtype": None}, "accumulator_dtype=None must be a floating point type"),
        ({"accumulator_dtype": jnp.int32}, "accumulator_dtype=.*int32.*floating point"),
        ({"inner": optax.adam}, "inner=.*must be an optax transformation"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        proma.accumulate(**{"inner": KEEP, "every_k_schedule": 2} | options)


def with_scores(**changes):
    grads, scores = microbatches(1)[0]
    return grads, {**scores, **changes}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "scores is None"),
        ({}, r"scores has no leaf for updates\['bias'\] of shape \(4,\)"),
        (with_scores(kernel=jnp.ones((3, 4, 5)))[1], r"scores\['kernel'\] has shape \(3, 4, 5\)"),
        (with_scores(kernel=jnp.ones((7, 5, 4)))[1], "disagree on the number of sequences"),
        (with_scores(kernel=jnp.ones((3, 5, 4), int))[1], r"scores\['kernel'\] must be floating"),
        (with_scores(extra=jnp.ones((3, 2)))[1], r"scores\['extra'\] has no counterpart"),
        (
            with_scores(kernel=proma.LayerFactors(jnp.ones((3, 2, 4)), jnp.ones((3, 2, 4))))[1],
            r"scores\['kernel'\] \(LayerFactors\) are of a leaf of shape \(4, 4\).*\(5, 4\)",
        ),
        (
            with_scores(kernel=proma.LayerFactors(jnp.ones((3, 2, 5)), jnp.ones((3, 6, 4))))[1],
            r"scores\['kernel'\] \(LayerFactors\) has .*\(3, 2, 5\).*\(3, 6, 4\)",
        ),
    ],
)
def test_scores_that_do_not_fit_are_named(scores, message):
    grads, _ = microbatches(1)[0]
    tx = proma.accumulate(KEEP, 2)
    with pytest.raises(ValueError, match=message):
        tx.update(grads, tx.init(grads), scores=scores)


def test_a_state_of_other_parameters_is_named():
    grads, scores = microbatches(1)[0]
    tx = proma.accumulate(KEEP, 2)
    state = tx.init(grads | {"bias": jnp.ones((4, 4)), "more": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"updates\['bias'\] has shape \(4,\).*\(4, 4\)"):
        tx.update(grads, state, scores=scores)
    with pytest.raises(ValueError, match=r"updates\['more'\] has shape None.*\(2,\)"):
        tx.update(grads, tx.init(grads | {"more": jnp.ones(2)}), scores=scores)


def test_a_state_beyond_k_emits_at_once():
    steps = microbatches(5)
    _, state = run(proma.accumulate(KEEP, 8), steps[:4])
    grads, scores = steps[4]
    updates, state = proma.accumulate(KEEP, 2).update(grads, state, scores=scores)
    assert jnp.any(updates["kernel"])
    assert state.mini_step == 0


def test_bfloat16_parameters_take_float32_gradients():
    steps = microbatches(2)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), steps[0][0])
    _, state = run(proma.accumulate(optax.adamw(0.1), 2), steps, params)
    moments = {x.dtype for x in jax.tree.leaves(state.inner_opt_state[0].mu)}
    assert moments == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("solver", ["ridge", "qr", "svd"])
def test_float64_is_kept(solver):
    with jax.enable_x64(True):
        steps = microbatches(3, dtype=jnp.float64)
        options = {"solver": solver, "accumulator_dtype": "float64"}
        emitted = emitted_gradient(steps, **options)
        assert_close(emitted, expected_gradient(steps, solver=solver), 1e-12)
        nothing = dict.fromkeys(steps[0][0], False)
        _, state = run(proma.accumulate(KEEP, 4, mask=nothing), steps)
        assert state.accumulation_fraction.dtype == jnp.float32


@pytest.mark.parametrize("types", [(jnp.float64, jnp.float32), (jnp.float32, jnp.float64)])
@pytest.mark.parametrize("accumulator", ["float32", "float64"])
@pytest.mark.parametrize("solver", ["ridge", "qr"])
def test_float64_may_meet_float32(solver, accumulator, types):
    """In parameters, scores, the accumulator, and the numbers that schedules return."""
    of_grads, of_scores = types
    with jax.enable_x64(True):
        steps = [
            (
                jax.tree.map(lambda x: x.astype(of_grads), grads),
                jax.tree.map(lambda x: x.astype(of_scores), scores),
            )
            for grads, scores in microbatches(3, dtype=jnp.float64)
        ]
        options = {
            "solver": solver,
            "accumulator_dtype": accumulator,
            "relative_bound": lambda step: jnp.float64(0.5),
            "ridge": lambda step: jnp.float64(1e-2),
        }
        emitted = emitted_gradient(steps, **options)
        assert {x.dtype for x in jax.tree.leaves(emitted)} == {jnp.dtype(of_grads)}
        assert_close(emitted, expected_gradient(steps, solver=solver, relative_bound=0.5), 1e-5)


def test_what_a_skip_function_says_keeps_its_type():
    skip = functools.partial(optax.skip_large_updates, max_squared_norm=1e9)
    tx = proma.accumulate(KEEP, 2, should_skip_update_fn=skip)
    state = tx.init(jnp.ones(3, jnp.bfloat16))
    _, after = tx.update(jnp.ones(3), state, scores=jnp.ones((2, 3)))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_masks_that_do_not_fit_are_named():
    grads, scores = microbatches(1)[0]
    everything = dict.fromkeys(grads, True)
    for mask, message in [
        (everything, r"mask asks to project \['plain'\], but its scores are None"),
        (everything | {"plain": "no"}, "it holds 'no'"),
        ({"kernel": True}, "mask does not fit the updates"),
    ]:
        tx = proma.accumulate(KEEP, 2, mask=mask)
        with pytest.raises(ValueError, match=message):
            tx.update(grads, tx.init(grads), scores=scores)
