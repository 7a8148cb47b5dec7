"""Scores and gradients of every size and degeneracy, and such that are not numbers.

`make campaign` runs many more of the cases that hypothesis draws here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import proma_jax as proma
from tests import oracles
from tests.cases import normal
from tests.oracles import assert_close

pytestmark = pytest.mark.any_version

SOLVERS = ["ridge", "qr", "svd"]
K = 3
DEGENERACIES = [
    "generic",
    "all zero",
    "one zero",
    "all equal",
    "equal but for rounding",
    "of all sizes",
    "padded",
]


def degenerate(rng, kind, b, tokens, d):
    """(b, tokens, d) rows: of inputs, whose scores then are as `kind` says."""
    rows = rng.normal(size=(b, tokens, d))
    match kind:
        case "all zero":
            rows[:] = 0
        case "one zero":
            rows[rng.integers(b)] = 0
        case "all equal":
            rows[:] = rows[0]
        case "equal but for rounding":
            rows[:] = rows[0] * (1 + 1e-8 * rng.normal(size=(b, 1, 1)))
        case "of all sizes":
            rows *= 10.0 ** rng.integers(-12, 12, size=(b, 1, 1))
        case "padded":
            rows[:, tokens // 2 :] = 0
    return rows


@functools.cache
def updater(solver, has_bound):
    """A jitted update whose numbers are arguments, so that few programs serve many cases."""

    def update(grads, state, scores, shrinkage, bound, skip):
        options = {"relative_bound": bound} if has_bound else {}
        tx = proma.accumulate(
            optax.identity(), K, solver=solver, shrinkage=shrinkage, skip_fraction=skip, **options
        )
        return tx.update(grads, state, scores=scores)

    return jax.jit(update)


@given(
    seed=st.integers(0, 2**32 - 1),
    solver=st.sampled_from(SOLVERS),
    sizes=st.sampled_from([(1, 1, 1, 1), (3, 2, 5, 4), (6, 3, 2, 2)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    kinds=st.tuples(*[st.sampled_from(DEGENERACIES)] * K),
    exponents=st.tuples(*[st.integers(-30, 30)] * 2),
    shrinkage=st.sampled_from([0.0, 0.4, 1.0]),
    bound=st.sampled_from([None, 0.0, 0.5]),
    skip=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_accumulation_is_right_for_degenerate_scores_of_any_size(
    seed, solver, sizes, dtype, kinds, exponents, shrinkage, bound, skip
):
    """A factored kernel, and a bias that has the same degeneracies."""
    rng, (b, tokens, d_in, d_out) = np.random.default_rng(seed), sizes
    of_scores, of_grads = (10.0**exponent for exponent in exponents)
    update = updater(solver, bound is not None)
    grads_like = {"kernel": jnp.zeros((d_in, d_out)), "bias": jnp.zeros(d_out)}
    state = proma.accumulate(optax.identity(), K).init(grads_like)
    history = []
    for kind in kinds:
        scale = 1 if kind == "of all sizes" else of_scores
        inputs = jnp.asarray(scale * degenerate(rng, kind, b, tokens, d_in), dtype)
        output_grads = normal(rng, b, tokens, d_out, dtype=dtype)
        bias = jnp.asarray(scale * degenerate(rng, kind, b, 1, d_out)[:, 0], jnp.float32)
        grads = jax.tree.map(
            lambda x: jnp.asarray(of_grads * rng.normal(size=x.shape), jnp.float32), grads_like
        )
        scores = {"kernel": proma.LayerFactors(inputs, output_grads), "bias": bias}
        dense = {
            "kernel": np.stack(list(map(oracles.score, inputs, output_grads))),
            "bias": np.float64(bias),
        }
        history.append((grads, dense))
        updates, state = update(grads, state, scores, shrinkage, bound, skip)
    options = {
        "solver": solver,
        "shrinkage": shrinkage,
        "relative_bound": bound,
        "skip_fraction": skip,
    }
    for leaf in grads_like:
        all_grads = [np.float64(grads[leaf]) for grads, _ in history]
        expected = oracles.accumulate(all_grads, [d[leaf] for _, d in history], **options)
        size = max(map(np.linalg.norm, all_grads))
        assert np.linalg.norm(np.float64(updates[leaf]) - expected) <= 1e-4 * size


@pytest.mark.parametrize("of_scores", [1e-30, 1e-11, 1e11, 1e30])
@pytest.mark.parametrize("of_grads", [1e-30, 1e-11, 1e11, 1e30])
@pytest.mark.parametrize("solver", SOLVERS)
def test_sizes_of_scores_and_gradients_do_not_matter(solver, of_grads, of_scores):
    rng = np.random.default_rng(0)
    state = proma.accumulate(optax.identity(), K).init(jnp.zeros(4))
    grads = jnp.asarray(of_grads * rng.normal(size=(K, 4)), jnp.float32)
    scores = jnp.asarray(of_scores * rng.normal(size=(K, 2, 4)), jnp.float32)
    for g, s in zip(grads, scores, strict=True):
        updates, state = updater(solver, True)(g, state, s, 1.0, 0.5, 0.0)
    options = {"solver": solver, "relative_bound": 0.5}
    assert_close(updates, oracles.accumulate(*map(np.float64, (grads, scores)), **options), 1e-4)


@functools.cache
def projector(method, rank):
    return jax.jit(proma.project_intra(rank=rank, orthonormalization=method).update)


@given(
    seed=st.integers(0, 2**32 - 1),
    method=st.sampled_from(["cholesky_qr", "qr", "svd"]),
    rank=st.sampled_from([1, 3]),
    sizes=st.sampled_from([(1, 1, 1, 1), (3, 4, 5, 4), (2, 20, 8, 6)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    kind=st.sampled_from(DEGENERACIES),
    exponents=st.tuples(*[st.integers(-30, 30)] * 3),
)
def test_intra_removes_a_projection_for_degenerate_factors_of_any_size(
    seed, method, rank, sizes, dtype, kind, exponents
):
    rng, (b, tokens, d_in, d_out) = np.random.default_rng(seed), sizes
    of_inputs, of_output_grads, of_grads = (10.0**exponent for exponent in exponents)
    rows = degenerate(rng, kind, b, tokens, d_in)
    scores = proma.LayerFactors(
        jnp.asarray(rows * (1 if kind == "of all sizes" else of_inputs), dtype),
        jnp.asarray(of_output_grads * rng.normal(size=(b, tokens, d_out)), dtype),
    )
    grads = jnp.asarray(of_grads * rng.normal(size=(d_in, d_out)), jnp.float32)
    state = proma.project_intra().init(grads)
    once, new_state = projector(method, rank)(grads, state, scores=scores)
    twice, _ = projector(method, rank)(once, state, scores=scores)
    g, once, twice = map(np.float64, (grads, once, twice))
    size = np.linalg.norm(g)
    assert np.linalg.norm(once) <= (1 + 1e-5) * size
    assert np.linalg.norm(twice - once) <= 1e-5 * size
    assert abs(np.vdot(g - once, once)) <= 1e-5 * size**2
    assert np.linalg.matrix_rank(g - once, tol=1e-5 * size) <= rank
    assert 0 <= new_state.intra_fraction <= 1 + 1e-5


# What is not a number.


def steps(count, seed=0):
    """Gradients and scores of a factored and of a dense leaf."""
    rng = np.random.default_rng(seed)

    return [
        (
            {"kernel": normal(rng, 5, 4), "bias": normal(rng, 4)},
            {
                "kernel": proma.LayerFactors(normal(rng, 3, 6, 5), normal(rng, 3, 6, 4)),
                "bias": normal(rng, 3, 4),
            },
        )
        for _ in range(count)
    ]


def poisoned(step, where, poison):
    grads, scores = step
    if where == "gradient":
        return {**grads, "kernel": grads["kernel"].at[0, 0].set(poison)}, scores
    kernel = scores["kernel"]
    inputs = kernel.inputs.at[1, 0, 0].set(poison)
    return grads, {**scores, "kernel": proma.LayerFactors(inputs, kernel.output_grads)}


def emissions(tx, microbatches):
    """The state and all updates that were emitted."""
    state, emitted = tx.init(microbatches[0][0]), []
    update = jax.jit(tx.update)
    for grads, scores in microbatches:
        updates, state = update(grads, state, scores=scores)
        if proma.has_updated(state):
            emitted.append(updates)
    return emitted, state


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["gradient", "scores"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_it_reaches_the_caller_and_the_next_step_is_clean(solver, where, poison):
    microbatches = steps(4)
    tx = proma.accumulate(optax.identity(), 2, solver=solver)
    clean, _ = emissions(tx, microbatches)
    microbatches[1] = poisoned(microbatches[1], where, poison)
    (first, second), state = emissions(tx, microbatches)
    assert not jnp.all(jnp.isfinite(first["kernel"]))
    assert_close(first["bias"], clean[0]["bias"])
    assert_close(second, clean[1])
    assert jnp.isfinite(state.accumulation_fraction)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["gradient", "scores"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_skipped_microbatch_is_dropped_alone(solver, where, poison):
    microbatches = steps(6)
    skipping = proma.accumulate(
        optax.trace(0.9), 3, solver=solver, should_skip_update_fn=optax.skip_not_finite
    )
    nothing = jax.tree.map(jnp.zeros_like, microbatches[1])
    for m in (1, 3):
        expected, _ = emissions(
            proma.accumulate(optax.trace(0.9), 3, solver=solver),
            [*microbatches[:m], nothing, *microbatches[m + 1 :]],
        )
        bad = poisoned(microbatches[m], where, poison)
        emitted, _ = emissions(skipping, [*microbatches[:m], bad, *microbatches[m + 1 :]])
        assert_close(emitted, expected)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["gradient", "scores"])
def test_intra_shows_it_in_its_leaf_and_the_next_microbatch_is_clean(where, poison):
    tx, microbatches = proma.project_intra(rank=2), steps(2)
    _, state = tx.update(microbatches[0][0], tx.init(microbatches[0][0]), scores=microbatches[0][1])
    expected, _ = tx.update(microbatches[1][0], state, scores=microbatches[1][1])
    grads, scores = poisoned(microbatches[0], where, poison)
    bad, state = tx.update(grads, tx.init(grads), scores=scores)
    assert not jnp.all(jnp.isfinite(bad["kernel"]))
    assert_close(bad["bias"], grads["bias"])
    after, _ = tx.update(microbatches[1][0], state, scores=microbatches[1][1])
    assert_close(after, expected)


def test_training_goes_on_after_a_poisoned_microbatch():
    """With both variants and Adam, whose moments a NaN would spoil for ever."""
    microbatches = steps(6)
    microbatches[2] = poisoned(microbatches[2], "scores", np.nan)
    tx = optax.chain(
        proma.project_intra(rank=2),
        proma.accumulate(optax.adam(0.1), 2, should_skip_update_fn=optax.skip_not_finite),
    )
    emitted, state = emissions(tx, microbatches)
    assert len(emitted) == 3
    for tree in (emitted, state):
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


# Sequences and tokens without a say.


@pytest.mark.parametrize("tokens", [2, 6])
@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_without_output_gradients_may_be_of_any_size(solver, tokens):
    """With few tokens the scores are used as factors, with many as they are."""
    grads, scores = steps(1)[0]
    kernel = jax.tree.map(lambda x: x[:, :tokens], scores["kernel"])
    padded = proma.LayerFactors(
        jnp.pad(kernel.inputs, [(0, 0), (0, 2), (0, 0)], constant_values=1e25),
        jnp.pad(kernel.output_grads, [(0, 0), (0, 2), (0, 0)]),
    )
    tx = proma.accumulate(optax.identity(), 2, solver=solver)
    (expected,), _ = emissions(tx, [(grads, scores | {"kernel": kernel})] * 2)
    (updates,), _ = emissions(tx, [(grads, scores | {"kernel": padded})] * 2)
    assert_close(updates, expected, 1e-5)


def logprob_fn(params, sequence):
    logits = jnp.tanh(sequence["x"] @ params["w"]) @ params["v"] + params["b"]
    return jnp.sum(jax.nn.log_softmax(logits)[:, 0] * sequence["mask"])


@pytest.mark.parametrize("masked", [[1], [0, 2], [0, 1, 2]])
def test_sequences_without_response_tokens_have_no_say(masked):
    """The result is the one without them, also where none is left."""
    rng = np.random.default_rng(0)
    params = {
        "w": normal(rng, 4, 5),
        "v": normal(rng, 5, 3),
        "b": jnp.zeros(3),
    }
    tx = optax.chain(proma.project_intra(rank=1), proma.accumulate(optax.identity(), 2))
    scores_fn = jax.jit(proma.sequence_scores(logprob_fn))
    microbatches = normal(rng, 2, 3, 6, 4)
    coefficients = jnp.array([1.0, -2.0, 3.0])
    mask = jnp.ones((3, 6)).at[0, 4:].set(0)
    after = mask.at[jnp.array(masked)].set(0)

    def run(kept):
        """The step's gradient, of whose last microbatch only some sequences are there."""
        state = tx.init(params)
        everything = np.arange(3)
        for x, mask_, there in zip(microbatches, (mask, after), (everything, kept), strict=True):
            _, scores = scores_fn(params, {"x": x[there], "mask": mask_[there]})
            grads = proma.weighted_sum(scores, coefficients[there])
            updates, state = jax.jit(tx.update)(grads, state, scores=scores)
        return updates

    kept = np.delete(np.arange(3), masked)
    assert_close(run(np.arange(3)), run(kept), 2e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("settings", [{}, {"relative_bound": 0.5}, {"solver": "qr"}])
def test_the_coefficient_of_a_sequence_without_tokens_has_no_say(settings, poison):
    """In the gradient of scores, in the fused form, and in a loss."""
    params = {name: normals(*shape) for name, shape in SHAPES.items()}
    x, mask = normals(2, 3, 6, 4), jnp.ones((2, 3, 6)).at[:, 1].set(0)
    batch = {"x": x, "mask": mask}
    coefficients = jnp.array([[1.0, poison, 3.0], [-2.0, poison, 0.5]])
    harmless = coefficients.at[:, 1].set(0)
    _, scores = proma.sequence_scores(logprob_fn)(params, jax.tree.map(lambda x: x[0], batch))
    sums = [proma.weighted_sum(scores, c[0]) for c in (coefficients, harmless)]
    assert_close(*sums, 0)
    gradient_fn = proma.accumulated_gradient(
        logprob_fn, accumulation=proma.Accumulation(**settings), intra=proma.Intra(rank=1)
    )
    results = [gradient_fn(params, batch, c, step=0) for c in (coefficients, harmless)]
    assert_close(*results, 0)
    shown = proma.weighted_sum(scores, coefficients[0][jnp.array([1, 0, 2])])
    assert not any(np.all(np.isfinite(x)) for x in jax.tree.leaves(shown))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_opposite_scores_do_not_hide_bad_coefficients(poison):
    total = proma.weighted_sum(jnp.array([[2.0, 0.0], [-2.0, 0.0]]), jnp.full(2, poison))
    np.testing.assert_array_equal(total, [np.nan, 0.0])


SHAPES = {"w": (4, 5), "v": (5, 3), "b": (3,)}


def normals(*shape):
    return normal(sum(shape), *shape)
