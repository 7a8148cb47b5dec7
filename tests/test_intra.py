"""`project_intra` against float64 NumPy on every layer, and its promises."""

import functools
import warnings

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
from tests import models, oracles


def factors(rng, b=3, tokens=8, d_in=6, d_out=5, layers=(), dtype=jnp.float32, scale=1.0):
    """Factors whose directions differ in strength, so that a subspace dominates."""

    def rows(d):
        strengths = np.geomspace(1, 0.02, d)
        return jnp.asarray(scale * rng.normal(size=(b, *layers, tokens, d)) * strengths, dtype)

    return proma.LayerFactors(rows(d_in), rows(d_out), num_layer_axes=len(layers))


def start_of(state, d, r):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng_key), state.step)
    return np.float64(jax.random.normal(key, (r, d)))


def expected_layer(grads, leaf, state, rank, iterations=2, shrinkage=1.0):
    x, d = (np.asarray(a).reshape(-1, a.shape[-1]) for a in (leaf.inputs, leaf.output_grads))
    r = min(rank, *x.shape, d.shape[1])
    starts = [start_of(state, a.shape[1], r) for a in (x, d)]
    return oracles.project_intra(grads, x, d, starts, iterations, shrinkage)


def project(grads, scores, *, state=None, **options):
    tx = proma.project_intra(**options)
    state = tx.init(grads) if state is None else state
    return jax.jit(tx.update)(grads, state, scores=scores)


assert_close = functools.partial(oracles.assert_close, tolerance=5e-5)


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.sampled_from([(1, 3, 6, 5), (3, 8, 6, 5), (2, 4, 20, 3), (1, 1, 1, 4), (2, 40, 8, 8)]),
    rank=st.sampled_from([1, 2, 4]),
    iterations=st.sampled_from([1, 2]),
    method=st.sampled_from(["cholesky_qr", "qr", "svd"]),
    shrinkage=st.sampled_from([0.3, 1.0]),
    exponents=st.tuples(st.integers(-10, 10), st.integers(-10, 10)),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_gradients_match_float64(
    seed, sizes, rank, iterations, method, shrinkage, exponents, dtype
):
    rng = np.random.default_rng(seed)
    leaf = factors(rng, *sizes, dtype=dtype, scale=10.0 ** exponents[0])
    coefficients = jnp.asarray(rng.normal(size=sizes[0]) * 10.0 ** exponents[1], jnp.float32)
    grads = proma.weighted_sum({"w": leaf}, coefficients)
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    state = proma.project_intra().init(wide)
    projected, _ = project(
        wide,
        {"w": leaf},
        rank=rank,
        power_iterations=iterations,
        orthonormalization=method,
        shrinkage=shrinkage,
    )
    expected = expected_layer(wide["w"], leaf, state, rank, iterations, shrinkage)
    difference = np.linalg.norm(np.float64(projected["w"]) - expected)
    assert difference <= 1e-4 * np.linalg.norm(np.float64(wide["w"]))


@pytest.mark.any_version
class Variants(chex.TestCase):
    @chex.all_variants
    @parameterized.parameters("cholesky_qr", "svd")
    def test_jit_and_devices_change_nothing(self, method):
        leaf = factors(np.random.default_rng(0))
        grads = proma.weighted_sum({"w": leaf}, jnp.array([1.0, -2.0, 3.0]))
        tx = proma.project_intra(rank=2, orthonormalization=method)
        update = self.variant(lambda grads, state, scores: tx.update(grads, state, scores=scores))
        projected, _ = update(grads, tx.init(grads), {"w": leaf})
        expected = expected_layer(grads["w"], leaf, tx.init(grads), 2)
        assert_close(projected["w"], expected)


def test_other_leaves_pass_unchanged_and_no_shrinkage_changes_nothing():
    rng = np.random.default_rng(0)
    scores = {
        "kernel": factors(rng),
        "bias": jnp.ones((3, 5)),
        "table": proma.LookupFactors(jnp.zeros((3, 8), int), jnp.ones((3, 8, 4)), 9),
        "none": None,
    }
    grads = proma.weighted_sum(scores, jnp.ones(3)) | {"none": jnp.ones(2)}
    projected, _ = project(grads, scores, rank=2)
    others = ("bias", "table", "none")
    chex.assert_trees_all_equal({n: projected[n] for n in others}, {n: grads[n] for n in others})
    assert jnp.any(projected["kernel"] != grads["kernel"])
    unchanged, state = project(grads, scores, rank=2, shrinkage=0.0)
    chex.assert_trees_all_equal(unchanged, grads)
    assert state.intra_fraction == 0


def test_a_rank_that_covers_all_tokens_removes_everything_and_is_warned_of():
    leaf = factors(np.random.default_rng(0), b=1, tokens=3, d_in=9, d_out=7)
    grads = proma.weighted_sum({"w": leaf}, jnp.ones(1))
    warning = r"Intra of rank 5 removes the whole gradient of \['w'\] \(3 tokens, 9 -> 7\)\."
    with pytest.warns(UserWarning, match=warning):
        projected, state = project(grads, {"w": leaf}, rank=5)
    assert jnp.linalg.norm(projected["w"]) < 1e-5 * jnp.linalg.norm(grads["w"])
    np.testing.assert_allclose(state.intra_fraction, 1, rtol=1e-5)


def test_a_rank_that_covers_both_widths_is_warned_of_and_no_other_is():
    def logprob_fn(params, x):
        return jnp.sum(jnp.sin(x @ params["w"] @ params["v"]))

    params = {"w": jnp.ones((5, 4)), "v": jnp.ones((4, 4))}
    batch, coefficients = jnp.ones((2, 3, 6, 5)), jnp.ones((2, 3))
    gradient_fn = proma.accumulated_gradient(logprob_fn, intra=proma.Intra(rank=4))
    with pytest.warns(UserWarning, match=r"of \['v'\] \(18 tokens, 4 -> 4\)\."):
        gradient_fn(params, batch, coefficients, step=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        proma.accumulated_gradient(logprob_fn, intra=proma.Intra(rank=3))(
            params, batch, coefficients, step=0
        )


def test_projecting_twice_changes_nothing():
    leaf = factors(np.random.default_rng(0))
    grads = proma.weighted_sum({"w": leaf}, jnp.ones(3))
    once, _ = project(grads, {"w": leaf}, rank=2)
    twice, state = project(once, {"w": leaf}, rank=2)
    assert_close(twice, once, tolerance=3e-6)
    assert state.intra_fraction < 3e-6


def test_neither_the_order_of_sequences_nor_padding_change_anything():
    leaf = factors(np.random.default_rng(0))
    grads = proma.weighted_sum({"w": leaf}, jnp.array([1.0, -2.0, 3.0]))
    expected, _ = project(grads, {"w": leaf}, rank=2)
    order = jnp.array([2, 0, 1])
    permuted = proma.LayerFactors(leaf.inputs[order], leaf.output_grads[order])
    assert_close(project(grads, {"w": permuted}, rank=2)[0], expected)
    # Padded tokens have inputs, however large, but no output gradient.
    for large in (100.0, 1e30):
        padded = proma.LayerFactors(
            jnp.pad(leaf.inputs, [(0, 1), (0, 4), (0, 0)], constant_values=large),
            jnp.pad(leaf.output_grads, [(0, 1), (0, 4), (0, 0)]),
        )
        assert_close(project(grads, {"w": padded}, rank=2)[0], expected)


def test_intra_fraction_is_what_was_removed():
    leaf = factors(np.random.default_rng(0))
    grads = proma.weighted_sum({"w": leaf}, jnp.ones(3)) | {"b": jnp.ones(4)}
    projected, state = project(grads, {"w": leaf, "b": None}, rank=2)
    removed = np.linalg.norm(grads["w"] - projected["w"])
    whole = np.hypot(np.linalg.norm(grads["w"]), 2.0)
    np.testing.assert_allclose(state.intra_fraction, removed / whole, rtol=1e-5)


def test_each_microbatch_has_bases_of_its_own_and_keys_repeat():
    leaf = factors(np.random.default_rng(0), tokens=30, d_in=12, d_out=12)
    grads, scores = proma.weighted_sum({"w": leaf}, jnp.ones(3)), {"w": leaf}
    first, state = project(grads, scores, rank=2, power_iterations=1)
    second, state = project(grads, scores, rank=2, power_iterations=1, state=state)
    assert jnp.any(first["w"] != second["w"])
    assert state.step == 2
    again, _ = project(grads, scores, rank=2, power_iterations=1)
    other, _ = project(grads, scores, rank=2, power_iterations=1, key=1)
    chex.assert_trees_all_equal(again, first)
    assert jnp.any(other["w"] != first["w"])


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_a_key_in_any_form_gives_the_same_bases(kind):
    leaf = factors(np.random.default_rng(0), tokens=30, d_in=12, d_out=12)
    grads, scores = proma.weighted_sum({"w": leaf}, jnp.ones(3)), {"w": leaf}
    x, coefficients = leaf.inputs[None], jnp.ones((1, 3))
    others = []
    with jax.default_prng_impl(kind):
        raw = jnp.asarray(jax.random.key_data(jax.random.key(7)))
        for key in (7, np.int64(7), jax.random.key(7), raw, np.asarray(raw), 8):
            settings = {"rank": 2, "power_iterations": 1, "key": key}
            projected, _ = project(grads, scores, **settings)
            fused, _ = proma.accumulated_gradient(
                lambda w, x: jnp.sum(jnp.sin(x @ w)), intra=proma.Intra(**settings)
            )(jnp.ones((12, 12)), x, coefficients, step=0)
            others.append((projected, fused))
    *same, other = others
    for found in same:
        chex.assert_trees_all_equal(found, same[0])
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.any(a != b)), other, same[0])))


def test_a_typed_key_keeps_its_generator():
    leaf = factors(np.random.default_rng(0), tokens=30, d_in=12, d_out=12)
    grads, scores = proma.weighted_sum({"w": leaf}, jnp.ones(3)), {"w": leaf}
    key = jax.random.key(7, impl="rbg")
    with jax.default_prng_impl("rbg"):
        expected, _ = project(grads, scores, rank=2, power_iterations=1, key=7)
    found, _ = project(grads, scores, rank=2, power_iterations=1, key=key)
    chex.assert_trees_all_equal(found, expected)


def test_a_donated_state_leaves_the_key_to_its_owner():
    leaf = factors(np.random.default_rng(0))
    grads, scores = proma.weighted_sum({"w": leaf}, jnp.ones(3)), {"w": leaf}
    tx = proma.project_intra(rank=2, key=jax.random.key(7))
    for _ in range(2):
        jax.jit(tx.update, donate_argnums=1)(grads, tx.init(grads), scores=scores)


@pytest.mark.parametrize(
    "key",
    [
        1.0,
        True,
        None,
        "0",
        2**64,
        np.zeros(2, np.int32),
        np.zeros(3, np.uint32),
        jax.random.split(jax.random.key(0)),
    ],
)
def test_what_is_not_one_key_is_named(key):
    for make in (proma.Intra, proma.project_intra):
        with pytest.raises(ValueError, match=r"(?s)key=.* must be an int or one key, as of"):
            make(key=key)


def test_stacked_layers_are_projected_one_by_one_through_their_view():
    rng = np.random.default_rng(0)
    view = proma.View().transpose((1, 0, 2))  # the leaf is (d_in, layers, d_out)
    leaf = factors(rng, layers=(2,))
    leaf = proma.LayerFactors(leaf.inputs, leaf.output_grads, num_layer_axes=1, view=view)
    grads = proma.weighted_sum({"w": leaf}, jnp.ones(3))
    projected, _ = project(grads, {"w": leaf}, rank=2)
    state = proma.project_intra().init(grads)
    for layer in range(2):
        one = proma.LayerFactors(leaf.inputs[:, layer], leaf.output_grads[:, layer])
        expected = expected_layer(grads["w"][:, layer], one, state, rank=2)
        assert_close(projected["w"][:, layer], expected)


def test_neither_names_nor_masks_change_a_leaf():
    rng = np.random.default_rng(0)
    scores = {"a": factors(rng), "b": factors(rng)}
    grads = proma.weighted_sum(scores, jnp.ones(3))
    expected, _ = project(grads, scores, rank=2)
    renamed, _ = project({"z": grads["a"]}, {"z": scores["a"]}, rank=2)
    chex.assert_trees_all_equal(renamed["z"], expected["a"])
    half, _ = project(grads, scores, rank=2, mask={"a": False, "b": True})
    chex.assert_trees_all_equal(half, {"a": grads["a"], "b": expected["b"]})


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["cholesky_qr", "qr", "svd"])
def test_what_is_not_finite_is_seen_and_stays_in_its_leaf(poison, method):
    rng = np.random.default_rng(0)
    bad, good = factors(rng), factors(rng)
    grads = proma.weighted_sum({"bad": bad, "good": good}, jnp.ones(3))
    bad = proma.LayerFactors(bad.inputs.at[0, 0, 0].set(poison), bad.output_grads)
    scores = {"bad": bad, "good": good}
    projected, state = project(grads, scores, rank=2, orthonormalization=method)
    assert jnp.isnan(projected["bad"]).all()
    chex.assert_tree_all_finite(projected["good"])
    clean, _ = project(grads, {"bad": good, "good": good}, rank=2, state=state)
    chex.assert_tree_all_finite(clean)


@pytest.mark.any_version
def test_an_unrolled_model_gives_what_its_scanned_twin_gives():
    unrolled, scanned, stack = models.twins()
    results = []
    for logprob_fn, params, microbatch in (unrolled, scanned):
        _, scores = jax.jit(proma.sequence_scores(logprob_fn))(params, microbatch)
        grads = proma.weighted_sum(scores, jnp.array([-1.0, 0.5, 2.0, -0.3]))
        results.append(project(grads, scores, rank=1)[0])
    assert_close(results[1], stack(results[0]))


def test_both_variants_compose():
    rng = np.random.default_rng(0)
    leaves = [factors(rng), factors(rng)]
    steps = [(proma.weighted_sum({"w": x}, jnp.ones(3)), {"w": x}) for x in leaves]
    tx = optax.chain(proma.project_intra(rank=1), proma.accumulate(optax.identity(), 2))
    state, projected = tx.init(steps[0][0]), []
    for grads, scores in steps:
        projected.append(expected_layer(grads["w"], scores["w"], state[0], 1))
        updates, state = jax.jit(tx.update)(grads, state, scores=scores)
    dense = np.stack([oracles.score(*pair) for pair in zip(*as_numpy(leaves[1]), strict=True)])
    first, second = projected
    removed = oracles.removed(first, second, dense, solver="ridge")
    assert_close(updates["w"], first - removed + second)


def as_numpy(leaf):
    return np.asarray(leaf.inputs), np.asarray(leaf.output_grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1: it is the dimension of the subspaces"),
        ({"rank": True}, "rank=True"),
        ({"rank": jnp.int32(3)}, "static_args"),
        ({"power_iterations": 0}, "power_iterations=0"),
        ({"orthonormalization": "lu"}, "orthonormalization='lu' must be one of 'cholesky_qr'"),
        ({"shrinkage": -0.1}, "shrinkage=-0.1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        proma.project_intra(**options)


def test_scores_and_masks_that_do_not_fit_are_named():
    leaf = factors(np.random.default_rng(0))
    grads = {"w": jnp.ones((6, 5)), "b": jnp.ones(5)}
    scores = {"w": leaf, "b": jnp.ones((3, 5))}
    mask = {"w": True, "b": True}
    for given_scores, options, message in [
        (None, {}, "scores is None"),
        (scores, {"mask": mask}, r"mask asks to project \['b'\], but its scores are DenseScores"),
        ({**scores, "w": jnp.ones((3, 6, 5))}, {}, "no LayerFactors, so there is nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            project(grads, given_scores, **options)
