"""What accumulation removes from one leaf, against float64 NumPy and by its defining properties."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proma_jax.arithmetic import layer_norms
from proma_jax.project.span import Numbers, combinations, removed_exactly
from proma_jax.scores.leaves import DenseScores, LayerFactors
from proma_jax.scores.tables import LookupFactors, SumScores
from tests import oracles
from tests.cases import layer_factors, normal

pytestmark = pytest.mark.any_version

SOLVERS = ("ridge", "qr", "svd")
EXACT = ("qr", "svd")


def removed_part(gradient, update, scores, *, solver="ridge", **numbers):
    """What is removed from a leaf's accumulated gradient, in the leaf's layout."""
    total, numbers = scores.view.apply(gradient), Numbers(**numbers)
    own_length = layer_norms(scores.view.apply(update), scores.num_layer_axes)
    if solver == "ridge":
        form = scores.compact()
        [combination] = combinations([form], [total], [own_length], numbers)
        part = combination.removed(form)
    else:
        part, _ = removed_exactly(scores, total, own_length, numbers, solver=solver)
    return scores.view.invert(part)


run = jax.jit(removed_part, static_argnames="solver")


def relative_error(actual, expected, scale):
    """‖actual − expected‖ / ‖scale‖ in float64."""
    difference = np.float64(actual) - np.float64(expected)
    return np.linalg.norm(difference) / np.linalg.norm(np.float64(scale))


def explicit(leaf: LayerFactors):
    pairs = zip(leaf.inputs, leaf.output_grads, strict=True)
    return np.stack([oracles.score(np.asarray(x), np.asarray(d)) for x, d in pairs])


@given(
    seed=st.integers(0, 2**32 - 1),
    b=st.sampled_from([1, 2, 5, 8]),
    shape=st.sampled_from([(3,), (7, 5), (2, 3, 4)]),
    solver=st.sampled_from(SOLVERS),
    shrinkage=st.sampled_from([0.0, 0.3, 1.0]),
    bound=st.sampled_from([None, 0.0, 0.5, 100.0]),
    exponents=st.tuples(*[st.integers(-10, 10)] * 3),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_dense_scores_match_float64(seed, b, shape, solver, shrinkage, bound, exponents, dtype):
    rng = np.random.default_rng(seed)
    score_scale, gradient_scale, update_scale = (10.0**e for e in exponents)
    values = normal(rng, b, *shape) * 10.0 ** rng.uniform(-3, 3, (b, *[1] * len(shape)))
    values = (values * score_scale).astype(dtype)
    gradient = normal(rng, *shape) * gradient_scale
    update = (normal(rng, *shape) * update_scale).astype(dtype)
    options = {"solver": solver, "shrinkage": shrinkage, "relative_bound": bound}
    actual = run(gradient, update, DenseScores(values), **options)
    expected = oracles.removed(gradient, update, values, **options)
    assert actual.dtype == jnp.float32
    assert relative_error(actual, expected, gradient) < 2e-5


def small_case():
    rng = np.random.default_rng(0)
    return normal(rng, 4, 3), normal(rng, 4, 3), normal(rng, 2, 4, 3)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_scores_does_not_matter(solver, scale):
    gradient, update, values = small_case()
    values = values * jnp.asarray([scale, 1.0])[:, None, None]
    actual = run(gradient, update, DenseScores(values), solver=solver)
    expected = oracles.removed(gradient, update, values, solver=solver)
    assert relative_error(actual, expected, expected) < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_bound_holds_at_every_scale_of_the_gradients(solver, scale):
    gradient, update, values = small_case()
    options = {"solver": solver, "relative_bound": 0.1}
    expected = run(gradient, update, DenseScores(values), **options)
    actual = run(gradient * scale, update * scale, DenseScores(values), **options)
    assert relative_error(actual / scale, expected, expected) < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("tokens", "d_in", "d_out"),
    [(2, 12, 9), (20, 4, 3), (5, 1, 6), (1, 3, 3)],
    ids=["factored", "dense", "column", "one-token"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_factors_match_float64(solver, tokens, d_in, d_out, dtype, scale):
    rng = np.random.default_rng(0)
    leaf = layer_factors(rng, 4, tokens, d_in, d_out, dtype)
    leaf = LayerFactors((leaf.inputs * scale).astype(dtype), leaf.output_grads)
    gradient, update = normal(rng, d_in, d_out), normal(rng, d_in, d_out)
    options = {"solver": solver, "relative_bound": 0.5}
    actual = run(gradient, update, leaf, **options)
    expected = oracles.removed(gradient, update, explicit(leaf), **options)
    assert relative_error(actual, expected, gradient) < 2e-5


@pytest.mark.parametrize("solver", SOLVERS)
def test_lookups_and_tied_tables_match_float64(solver):
    rng = np.random.default_rng(0)
    indices = jnp.asarray(rng.integers(0, 7, (4, 5)), jnp.int32)
    lookups = LookupFactors(indices, normal(rng, 4, 5, 3), num_embeddings=7)
    head = layer_factors(rng, 4, 5, 7, 3)
    table = [
        oracles.lookup_score(np.asarray(i), np.asarray(d), 7)
        for i, d in zip(indices, lookups.output_grads, strict=True)
    ]
    gradient = normal(rng, 7, 3)
    for leaf, scores in [
        (lookups, np.stack(table)),
        (SumScores((lookups, head)), np.stack(table) + explicit(head)),
    ]:
        actual = run(gradient, gradient, leaf, solver=solver)
        expected = oracles.removed(gradient, gradient, scores, solver=solver)
        assert relative_error(actual, expected, gradient) < 1e-5


@given(
    seed=st.integers(0, 2**32 - 1),
    solver=st.sampled_from(EXACT),
    b=st.integers(1, 8),
    closeness=st.floats(-9, 0),
    scale=st.integers(-10, 10),
)
def test_exact_solvers_leave_nothing_along_the_scores(seed, solver, b, closeness, scale):
    """|⟨ŝ_i, G′⟩| ≤ 1e-5 ‖G‖, also among nearly dependent scores."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(1, 40)) + 10**closeness * rng.normal(size=(b, 40))
    values = jnp.asarray(values * 10.0**scale, jnp.float32)
    gradient = normal(rng, 40)
    rest = gradient - run(gradient, gradient, DenseScores(values), solver=solver)
    along = oracles.unit_rows(values) @ np.float64(rest)
    assert np.abs(along).max() <= 1e-5 * np.linalg.norm(gradient)


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e3])
def test_exact_solvers_leave_nothing_along_every_direction_above_rtol(solver, condition):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 6)))[0] for n in (6, 300))
    values = jnp.asarray((left * np.geomspace(1, 1 / condition, 6)) @ right.T, jnp.float32)
    directions = np.linalg.svd(np.float64(values), full_matrices=False)[2]
    gradient = normal(rng, 300)
    rest = gradient - run(gradient, gradient, DenseScores(values), solver=solver)
    along = directions @ np.float64(rest)
    assert np.abs(along).max() <= 1e-5 * np.linalg.norm(gradient)


@pytest.mark.parametrize("solver", EXACT)
def test_projecting_twice_changes_nothing(solver):
    rng = np.random.default_rng(0)
    gradient, scores = normal(rng, 30, 20), DenseScores(normal(rng, 8, 30, 20))
    rest = gradient - run(gradient, gradient, scores, solver=solver)
    again = run(rest, gradient, scores, solver=solver)
    assert relative_error(again, 0, gradient) < 1e-6


@pytest.mark.parametrize("solver", EXACT)
def test_exact_solvers_leave_nothing_in_large_leaves(solver):
    rng = np.random.default_rng(0)
    values = normal(rng, 16, 50_000)
    gradient = normal(rng, 50_000) + values.sum(0)
    rest = gradient - run(gradient, gradient, DenseScores(values), solver=solver)
    along = oracles.unit_rows(values) @ np.float64(rest)
    assert np.abs(along).max() <= 1e-8 * np.linalg.norm(gradient)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_rank_deficient_span_is_that_of_its_distinct_scores(solver):
    rng = np.random.default_rng(0)
    gradient, two = normal(rng, 50), normal(rng, 2, 50)
    zero = jnp.zeros((1, 50))
    expected = oracles.projection(gradient, two, "qr")
    many = DenseScores(jnp.concatenate([zero, two, two * 1e5, two[:1] - two[1:], zero]))
    tolerance = 5e-3 if solver == "ridge" else 1e-5  # ridge / (σ² + ridge) of a direction stays
    actual = run(gradient, gradient, many, solver=solver)
    assert relative_error(actual, expected, gradient) < tolerance
    nothing = run(gradient, gradient, DenseScores(jnp.zeros((3, 50))), solver=solver)
    chex.assert_trees_all_equal(nothing, jnp.zeros(50))


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_sequences_than_parameters_remove_all_but_the_ridge(solver):
    rng = np.random.default_rng(0)
    gradient = normal(rng, 3)
    rest = gradient - run(gradient, gradient, DenseScores(normal(rng, 8, 3)), solver=solver)
    limit = 2e-2 if solver == "ridge" else 1e-6
    assert relative_error(rest, 0, gradient) < limit


def test_without_ridge_the_ridge_solver_projects_exactly():
    rng = np.random.default_rng(0)
    gradient, scores = normal(rng, 50), normal(rng, 4, 50)
    scores = jnp.concatenate([scores, scores[:2]])
    actual = run(gradient, gradient, DenseScores(scores), solver="ridge", ridge=0.0)
    assert relative_error(actual, oracles.projection(gradient, scores), gradient) < 1e-5


@pytest.mark.parametrize("closeness", [1e-8, 1e-7, 1e-5, 1e-4])
def test_without_ridge_nearly_dependent_scores_add_nothing_to_the_gradient(closeness):
    rng = np.random.default_rng(0)
    gradient, scores = normal(rng, 40), normal(rng, 1, 40) + closeness * normal(rng, 6, 40)
    rest = gradient - run(gradient, gradient, DenseScores(scores), solver="ridge", ridge=0.0)
    assert np.linalg.norm(rest) <= (1 + 1e-5) * np.linalg.norm(gradient)


@pytest.mark.parametrize("kind", ["generic", "a zero score", "a dead layer", "no gradient", "tiny"])
def test_only_scores_of_extreme_size_are_rescaled(kind, monkeypatch):
    """An empty response or a dead layer must not cost more than others."""
    rng, taken = np.random.default_rng(0), []
    scores, gradient = DenseScores(normal(rng, 3, 2, 4, 5), num_layer_axes=1), normal(rng, 2, 4, 5)
    match kind:
        case "a zero score":
            scores = DenseScores(scores.values.at[1].set(0), num_layer_axes=1)
        case "a dead layer":
            scores = DenseScores(scores.values.at[:, 1].set(0), num_layer_axes=1)
        case "no gradient":
            gradient = gradient.at[0].set(0)
        case "tiny":
            scores = DenseScores(scores.values * 1e-12, num_layer_axes=1)
    expected = [
        oracles.projection(g, s, "ridge")
        for g, s in zip(gradient, np.moveaxis(np.float64(scores.values), 0, 1), strict=True)
    ]
    rescaled = DenseScores.rescaled

    def noted(self):
        jax.debug.callback(lambda: taken.append(1))
        return rescaled(self)

    monkeypatch.setattr(DenseScores, "rescaled", noted)
    actual = jax.jit(lambda *arguments: removed_part(*arguments))(gradient, gradient, scores)
    jax.effects_barrier()
    assert len(taken) == (kind == "tiny")
    np.testing.assert_allclose(actual, np.stack(expected), atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_stacked_layers_are_projected_and_bounded_one_by_one(solver, kind):
    rng = np.random.default_rng(0)
    gradients, updates = normal(rng, 2, 3, 12, 9), normal(rng, 2, 3, 12, 9)
    updates = updates * jnp.asarray([[[1e-3]], [[1.0]], [[1e3]]])
    if kind == "dense":
        scores = DenseScores(normal(rng, 4, 2, 3, 12, 9), num_layer_axes=2)
        one = [[DenseScores(scores.values[:, i, j]) for j in range(3)] for i in range(2)]
    else:
        x, d = normal(rng, 4, 2, 3, 5, 12), normal(rng, 4, 2, 3, 5, 9)
        scores = LayerFactors(x, d, num_layer_axes=2)
        one = [[LayerFactors(x[:, i, j], d[:, i, j]) for j in range(3)] for i in range(2)]
    options = {"solver": solver, "relative_bound": 0.5}
    actual = run(gradients, updates, scores, **options)
    expected = jnp.stack(
        [
            jnp.stack([run(gradients[i, j], updates[i, j], one[i][j], **options) for j in range(3)])
            for i in range(2)
        ]
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_is_never_hidden_and_stays_in_its_layer(solver, poison):
    rng = np.random.default_rng(0)
    values = normal(rng, 4, 2, 6, 5).at[1, 0, 2, 3].set(poison)
    gradient = normal(rng, 2, 6, 5)
    removed = run(gradient, gradient, DenseScores(values, num_layer_axes=1), solver=solver)
    assert jnp.isnan(removed[0]).all()
    clean = run(gradient[1], gradient[1], DenseScores(values[:, 1]), solver=solver)
    chex.assert_trees_all_close(removed[1], clean, rtol=1e-5, atol=1e-6)
    poisoned = run(
        gradient.at[0, 0, 0].set(poison), gradient, DenseScores(values, 1), solver=solver
    )
    assert jnp.isnan(poisoned[0]).any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_vmap_agrees_and_the_gradient_with_respect_to_g_is_the_projection_itself(solver):
    rng = np.random.default_rng(0)
    gradients, values = normal(rng, 3, 20), normal(rng, 3, 4, 20)

    def removed(gradient, values):
        return removed_part(gradient, gradient, DenseScores(values), solver=solver)

    together = jax.jit(jax.vmap(removed))(gradients, values)
    each = jnp.stack([removed(*pair) for pair in zip(gradients, values, strict=True)])
    chex.assert_trees_all_close(together, each, rtol=1e-4, atol=1e-5)
    probe = normal(rng, 20)
    derivative = jax.grad(lambda g: jnp.vdot(probe, removed(g, values[0])))(gradients[0])
    chex.assert_trees_all_close(derivative, removed(probe, values[0]), rtol=1e-4, atol=1e-5)


def test_ridge_is_differentiable_also_among_equal_scores():
    rng = np.random.default_rng(0)
    values = jnp.tile(normal(rng, 1, 9), (3, 1)).at[2].set(0)
    gradient = normal(rng, 9)

    def size(values, ridge):
        removed = removed_part(gradient, gradient, DenseScores(values), ridge=ridge)
        return jnp.sum(removed**2)

    chex.assert_tree_all_finite(jax.grad(size, argnums=(0, 1))(values, 1e-2))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norms_neither_overflow_nor_underflow(scale):
    x = normal(np.random.default_rng(0), 2, 3, 4) * scale
    expected = np.linalg.norm(np.float64(x).reshape(2, -1), axis=1)
    chex.assert_trees_all_close(layer_norms(x, 1), jnp.float32(expected), rtol=1e-5)
    assert layer_norms(jnp.zeros(3)) == 0
