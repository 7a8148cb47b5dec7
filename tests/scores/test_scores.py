"""Every kind of score leaf against the explicit scores it stands for."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import proma_jax as proma
from proma_jax.arithmetic import contract
from proma_jax.scores import products
from proma_jax.scores.leaf import gradient_dtype, map_layers
from proma_jax.scores.match import match_scores
from tests import oracles
from tests.cases import layer_factors, normal

B = 3


def kernel(rng, tokens=4, d_in=5, d_out=3, dtype=jnp.float32):
    leaf = layer_factors(rng, B, tokens, d_in, d_out, dtype)
    explicit = [oracles.score(*pair) for pair in zip(*map(np.asarray, pair_of(leaf)), strict=True)]
    return leaf, np.stack(explicit)


def pair_of(leaf):
    return leaf.inputs, leaf.output_grads


def dense(rng):
    leaf = proma.DenseScores(normal(rng, B, 5, 3))
    return leaf, np.float64(leaf.values)


def factored(rng):
    return kernel(rng, tokens=1)


def many_tokens(rng):
    return kernel(rng, tokens=20)


def narrow(rng):
    return kernel(rng, dtype=jnp.bfloat16)


def narrow_with_many_tokens(rng):
    return kernel(rng, tokens=70, dtype=jnp.bfloat16)


def several_token_axes(rng):
    leaf, explicit = kernel(rng, tokens=6)
    split = [x.reshape(B, 2, 3, -1) for x in pair_of(leaf)]
    return proma.LayerFactors(*split), explicit


def stacked_factors(rng):
    """Two by two layers, in a leaf that keeps them behind its rows."""
    leaf = proma.LayerFactors(normal(rng, B, 2, 2, 4, 5), normal(rng, B, 2, 2, 4, 3), 2)
    view = proma.View().reshape((5, 4, 3), (5, 2, 2, 3)).transpose((1, 2, 0, 3))
    leaf = proma.LayerFactors(*pair_of(leaf), num_layer_axes=2, view=view)
    layers = [
        [
            [
                oracles.score(
                    np.asarray(leaf.inputs[i, j, k]), np.asarray(leaf.output_grads[i, j, k])
                )
                for k in range(2)
            ]
            for j in range(2)
        ]
        for i in range(B)
    ]
    return leaf, np.stack(layers)


def stacked_dense(rng):
    leaf = proma.DenseScores(normal(rng, B, 2, 5, 3), num_layer_axes=1)
    return leaf, np.float64(leaf.values)


def lookups(rng, rows=7, d=3):
    indices = jnp.asarray(rng.integers(0, rows, (B, 6)), jnp.int32)
    leaf = proma.LookupFactors(indices, normal(rng, B, 6, d), rows)
    pairs = zip(np.asarray(indices), np.asarray(leaf.output_grads), strict=True)
    return leaf, np.stack([oracles.lookup_score(i, g, rows) for i, g in pairs])


def stacked_lookups(rng):
    indices = jnp.asarray(rng.integers(0, 7, (B, 2, 6)), jnp.int32)
    leaf = proma.LookupFactors(indices, normal(rng, B, 2, 6, 3), 7, num_layer_axes=1)
    return leaf, np.stack(
        [
            [
                oracles.lookup_score(
                    np.asarray(indices[i, j]), np.asarray(leaf.output_grads[i, j]), 7
                )
                for j in range(2)
            ]
            for i in range(B)
        ]
    )


def tied(rng):
    table, explicit = lookups(rng)
    head, head_explicit = kernel(rng, d_in=3, d_out=7)
    head = proma.LayerFactors(*pair_of(head), view=proma.View().transpose((1, 0)))
    return proma.SumScores((table, head)), explicit + head_explicit.transpose(0, 2, 1)


KINDS = [
    dense,
    factored,
    many_tokens,
    narrow,
    narrow_with_many_tokens,
    several_token_axes,
    stacked_factors,
    stacked_dense,
    lookups,
    stacked_lookups,
    tied,
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def case(request):
    """A score leaf and its explicit scores (b, *layers, ...) in float64."""
    return request.param(np.random.default_rng(0))


@pytest.fixture(params=["cpu", "accelerator"])
def device(request, monkeypatch):
    """The form of the products that a CPU takes, and that of other devices, computed here."""
    if request.param == "accelerator":
        monkeypatch.setattr(products, "_BLOCK", 4)

        def of_accelerator(*arguments, default, cpu=None, tpu=None):
            return (tpu or default)(*arguments)

        monkeypatch.setattr(jax.lax, "platform_dependent", of_accelerator)


def flat(explicit, leaf):
    """(*layers, b, n)."""
    layers = leaf.num_layer_axes
    rows = explicit.reshape(*explicit.shape[: 1 + layers], -1)
    return np.moveaxis(rows, 0, layers)


@pytest.mark.usefixtures("device")
def test_the_operations_match_the_explicit_scores(case):
    leaf, explicit = case
    rng, rows = np.random.default_rng(1), flat(explicit, leaf)
    array = normal(rng, *explicit.shape[1:])
    weights = normal(rng, *leaf.layer_shape, B)
    flat_array = np.float64(array).reshape(*leaf.layer_shape, -1)
    operations = jax.jit(
        lambda leaf: (
            leaf.gram(),
            leaf.gram_by_rows(),
            leaf.dots(array),
            leaf.weighted_sum(weights),
        )
    )
    expected = (
        *[np.einsum("...in,...jn->...ij", rows, rows)] * 2,
        np.einsum("...bn,...n->...b", rows, flat_array),
        np.einsum("...b,...bn->...n", np.float64(weights), rows).reshape(array.shape),
    )
    for form in (leaf, leaf.compact(), leaf.dense()):
        for actual, want in zip(operations(form), expected, strict=True):
            assert actual.dtype == jnp.float32
            np.testing.assert_allclose(actual, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_shows_where_its_score_is_not_zero(poison):
    rows = jnp.asarray([[1.0, 0.0, 2.0, 0.0], [-1.0, 3.0, -2.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    weights = jnp.asarray([poison, poison, 2.0])
    factors = jnp.ones((B, 70, 1)), jnp.broadcast_to(rows[:, None], (B, 70, 4))
    kernel = proma.LayerFactors(*factors)
    narrow = proma.LayerFactors(*(x.astype(jnp.bfloat16) for x in factors))
    for leaf, tokens in ((proma.DenseScores(rows), 1), (kernel, 70), (narrow, 70)):
        total = np.ravel(jax.jit(type(leaf).weighted_sum)(leaf, weights))
        assert not np.isfinite(total[:3]).any()
        np.testing.assert_allclose(total[3], 2.0 * tokens, rtol=1e-5)


@pytest.mark.usefixtures("device")
def test_weighted_sums_have_gradients(case):
    leaf, _ = case
    weights = normal(np.random.default_rng(1), *leaf.layer_shape, B)
    values = normal(np.random.default_rng(2), *leaf.dense().values.shape).at[0, 0].set(0)
    spread = proma.DenseScores(values, leaf.num_layer_axes)
    chex.assert_numerical_grads(lambda w: spread.weighted_sum(w), (weights,), 1, atol=1e-2)
    chex.assert_numerical_grads(
        lambda v: dataclasses.replace(spread, values=v).weighted_sum(weights),
        (values,),
        1,
        atol=1e-2,
    )


def test_dense_forms_and_views(case):
    leaf, explicit = case
    np.testing.assert_allclose(leaf.dense().values, explicit, atol=1e-5)
    whole = leaf.view.invert(jnp.zeros(explicit.shape[1:]))
    assert leaf.leaf_shape == whole.shape
    chex.assert_trees_all_equal(leaf.view.apply(leaf.view.invert(explicit[0])), explicit[0])


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_rescaled_scores_are_of_moderate_size(case, scale):
    leaf, explicit = case
    factor = scale * jnp.asarray([1.0, 0.0, 1e3])
    explicit = explicit * np.float64(factor).reshape(-1, *[1] * (explicit.ndim - 1))
    factor = factor.reshape(B, *[1] * leaf.num_layer_axes)
    scaled, sizes = leaf.times(jnp.broadcast_to(factor, (B, *leaf.layer_shape))).rescaled()
    norms = np.sqrt(np.einsum("...ii->...i", np.float64(scaled.gram())))
    assert norms.max() < 1e3
    assert (np.moveaxis(norms, -1, 0)[[0, 2]] > 1e-2).all()
    restored = scaled.times(sizes).dense().values
    np.testing.assert_allclose(restored, explicit, rtol=1e-4, atol=1e-5 * np.abs(explicit).max())


def test_layers_are_visited_one_by_one(case):
    leaf, explicit = case
    layers = jnp.asarray(explicit[0], jnp.float32)
    doubled = map_layers(lambda one, x: one.dense().values[1] + x, leaf, layers)
    np.testing.assert_allclose(doubled, explicit[1] + explicit[0], rtol=1e-4, atol=1e-4)


def test_weighted_sum_is_shaped_and_typed_like_the_parameters(case):
    leaf, explicit = case
    coefficients = jnp.asarray([1.0, -2.0, 0.5])
    total = proma.weighted_sum({"w": leaf, "none": None}, coefficients)
    assert total["none"] is None
    assert total["w"].shape == leaf.leaf_shape
    assert total["w"].dtype == gradient_dtype(leaf)
    want = leaf.view.invert(jnp.asarray(np.tensordot(np.float64(coefficients), explicit, 1)))
    tolerance = 1e-2 if total["w"].dtype == jnp.bfloat16 else 1e-5
    scale = np.abs(want).max()
    np.testing.assert_allclose(np.float64(total["w"]), want, atol=tolerance * scale)


def test_weighted_sum_wants_one_coefficient_per_sequence(case):
    with pytest.raises(ValueError, match=r"coefficients has shape \(2,\).*\['w'\].*3 sequences"):
        proma.weighted_sum({"w": case[0]}, jnp.ones(2))


def test_scores_travel_through_jit_scan_and_vmap(case):
    leaf, _ = case
    coefficients = jnp.asarray([1.0, -2.0, 0.5])
    expected = proma.weighted_sum(leaf, coefficients)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), leaf)
    each = jax.vmap(lambda s: proma.weighted_sum(s, coefficients))(twice)
    _, scanned = jax.lax.scan(lambda c, s: (c, proma.weighted_sum(s, coefficients)), 0, twice)
    for result in (each, scanned):
        chex.assert_trees_all_close(result[1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_products_are_summed_in_float32(dtype):
    rng = np.random.default_rng(0)
    x, y = normal(rng, 4, 1000, dtype=dtype), normal(rng, 1000, 3, dtype=dtype)
    result = contract("ij,jk->ik", x, y)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, np.float64(x) @ np.float64(y), rtol=1e-4, atol=1e-3)


def test_float64_scores_stay_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        leaf = proma.LayerFactors(*(jnp.asarray(rng.normal(size=(B, 2, d))) for d in (5, 3)))
        assert proma.weighted_sum(leaf, jnp.ones(B)).dtype == leaf.gram().dtype == jnp.float64


@pytest.mark.any_version
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_layers_and_no_tokens_are_harmless(layers, tokens):
    factors = jnp.ones((B, layers, tokens, 5)), jnp.ones((B, layers, tokens, 3))
    indices = jnp.zeros((B, layers, tokens), jnp.int32)
    table = proma.LookupFactors(indices, factors[1], 5, num_layer_axes=1)
    kernel = proma.LayerFactors(*factors, num_layer_axes=1)
    accumulate = proma.accumulate(optax.identity(), 2, mask={"w": True})
    for tx, leaf in [(accumulate, kernel), (accumulate, table), (proma.project_intra(), kernel)]:
        update = {"w": proma.weighted_sum(leaf, jnp.ones(B))}
        chex.assert_shape(update["w"], (layers, 5, 3))
        state = tx.init(update)
        for _ in range(2):
            updates, state = tx.update(update, state, scores={"w": leaf})
        chex.assert_tree_all_finite(updates)


def test_masked_leaves_are_passed_over_and_the_rest_lines_up_by_path():
    updates = {"a": jnp.ones(3), "b": optax.MaskedNode(), "c": {"d": jnp.ones((2, 2))}}
    scores = {"a": jnp.ones((B, 3)), "b": {"deep": jnp.ones((B, 9))}, "c": {"d": None}}
    matched = match_scores(updates, scores)
    assert [path for path, _, _ in matched] == ["['a']", "['c']['d']"]
    assert isinstance(matched[0][2], proma.DenseScores)
    assert matched[1][2] is None
    matched = match_scores(updates, {**scores, "a": optax.MaskedNode()})
    assert matched[0][2] is None
