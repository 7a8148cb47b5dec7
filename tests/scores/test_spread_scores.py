"""Scores that devices have exchanged, in numbers of their own, against the scores as they were."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import proma_jax as proma
from proma_jax._mesh.scores import spread_scores
from tests.cases import normal

P = PartitionSpec
B, LAYERS, TOKENS, D_IN, D_OUT = 16, 2, 6, 24, 5
AXES = {"replica": 2, "data": 4}
ROWS = P(None, "data")


def factored():
    inputs = normal(0, B, LAYERS, TOKENS, D_IN).at[3].set(0)
    return proma.LayerFactors(inputs, normal(1, B, LAYERS, TOKENS, D_OUT), num_layer_axes=1)


def dense():
    return factored().dense()


def operations(scores, leaf, weights, factor):
    moderate, size = scores.rescaled()
    return {
        "gram": scores.gram(),
        "gram_by_rows": scores.gram_by_rows(),
        "dots": scores.dots(leaf),
        "weighted_sum": scores.weighted_sum(weights),
        "weighted_sum_by_layers": scores.weighted_sum(factor.T),
        "dense": scores.dense().values,
        "made": scores.made.dense().values,
        "rescaled": moderate.dense().values * size[..., None, None],
        "times": scores.times(factor).dense().values,
        "times_of_the_sequences": scores.times(factor).weighted_sum(weights),
        "are_zero": scores.are_zero(),
    }


@pytest.mark.parametrize("kind", [factored, dense])
def test_the_operations_are_those_of_the_scores_in_their_own_order(kind):
    scores = kind()
    arguments = normal(2, LAYERS, D_IN, D_OUT), normal(3, B), normal(4, B, LAYERS)
    expected = jax.device_get(operations(scores, *arguments))
    mesh = jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(AxisType.Auto,) * 2)
    by_sequence, by_rows = (NamedSharding(mesh, spec) for spec in (P(tuple(AXES)), ROWS))
    layouts = []

    @jax.jit
    def on_mesh(scores, leaf, weights, factor):
        exchanged = spread_scores(scores, leaf, tuple(AXES), ROWS).compact()
        assert exchanged.compact() is exchanged
        layouts.append(exchanged.layout)
        return operations(exchanged, leaf, weights, factor)

    leaf, weights, factor = arguments
    put = jax.device_put((scores, leaf), (by_sequence, by_rows))
    with jax.set_mesh(mesh):
        found = jax.device_get(on_mesh(*put, weights, factor))
    [layout] = layouts
    assert layout.by_feature == P(None, None, ("data", "replica"), None)
    assert layout.numbering.forth(jnp.arange(B)).tolist() != list(range(B))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
