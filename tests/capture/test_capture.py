"""Scores from any JAX function against jax.grad, in every form that models.py knows."""

import itertools
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from proma_jax import (
    DenseScores,
    LayerFactors,
    LookupFactors,
    accumulated_gradient,
    check_scores,
    describe_scores,
    sequence_scores,
    weighted_sum,
)
from proma_jax.capture import _jaxpr, _moves, _operations
from proma_jax.capture.factors import Assembly
from proma_jax.scores.leaf import is_score_leaf
from tests.cases import normal
from tests.models import BATCH, LAYERS, MODELS, TOKENS, WIDTH, Model, kernels, twins

COEFFICIENTS = np.array([1.0, -2.0, 3.0, -0.5])
NARROW = {
    "kernel_behind_a_barrier",
    "kernel_cast",
    "product_of_another_type",
    "bfloat16_parameters",
    "linen_Bfloat16",
    "nnx_bfloat16",
}

# What each leaf's scores are, where they are not dense scores of one layer. Names leave out
# "layer/". A decoder's own embedding and head are as in ENDS unless another is named here.
ENDS = {"embed": "6 tokens, 9 rows of 4", "head": "6 tokens, 4 -> 9"}
SQUARE = "6 tokens, 4 -> 4"
TWICE = "12 tokens, 4 -> 4"
LOOKUP = "6 tokens, 9 rows of 4"
STACK = "3 layers, 6 tokens, 4 -> 4"
STACK_TWICE = "3 layers, 12 tokens, 4 -> 4"
SCANNED = {"w": STACK, "b": "dense, 3 layers"}
ATTENTION = {f"{name}/kernel": SQUARE for name in ("query", "key", "value", "out")}
EXPECTED = {
    "mlp": {"w": SQUARE, "w2": SQUARE},
    "kernel_on_the_left": {"w": "6 tokens, 4 -> 5"},
    "kernel_reshaped": {"w": SQUARE},
    "kernel_transposed": {"w": SQUARE},
    "kernel_cast": {"w": SQUARE},
    "product_of_another_type": {"w": SQUARE},
    "bfloat16_parameters": {"w": SQUARE},
    "several_axes": {"w": SQUARE, "out": SQUARE},
    "batched_kernel": {"w": "2 layers, 6 tokens, 4 -> 4"},
    "kernel_batched_in_the_middle": {"w": "2 layers, 6 tokens, 2 -> 4"},
    "batched_inputs": {"w": SQUARE},
    "vectors": {"v": "6 tokens, 4 -> 1", "w": "6 tokens, 4 -> 1"},
    "one_token_alone": {"w": "1 token, 4 -> 4"},
    "no_tokens": {"w": "0 tokens, 4 -> 4"},
    "equal_inputs": {"w": SQUARE, "q": SQUARE, "k": SQUARE},
    "equal_inputs_without_a_gradient": {"w": SQUARE, "v": SQUARE, "u": SQUARE},
    "inputs_also_go_where_no_gradient_can": {"w": SQUARE},
    "constant_operands": {"w": SQUARE, "v": TWICE},
    "outputs_dropped": {"w": TWICE},
    "kernel_used_twice": {"w": TWICE},
    "kernel_used_both_ways": {"w": f"{SQUARE}; {SQUARE}"},
    "stack_indexed": {"w": STACK},
    "stack_indexed_otherwise": {"w": STACK},
    "stack_with_two_axes_indexed": {"w": "6 layers, 6 tokens, 4 -> 4"},
    "stack_unstacked": {"w": "3 layers, 8 tokens, 4 -> 4"},
    "stack_in_another_order": {"w": STACK},
    "stack_in_a_loop": {"w": STACK},
    "stack_in_a_loop_in_turn": {"w": "2 layers, 18 tokens, 4 -> 4"},
    "stack_by_scanned_numbers": {"w": STACK, "s": "dense, 3 layers"},
    "stack_by_numbers_from_the_data": {"w": "dense, 3 layers"},
    "experts_by_token": {"w": "dense, 3 layers", "b": "6 tokens, 3 rows of 4"},
    "experts_in_a_loop": {"w": STACK},
    "experts_in_a_scan": {"w": STACK},
    "vectors_indexed": {"w": "dense, 3 layers"},
    "kernel_split": {"w": "6 tokens, 4 -> 12"},
    "kernel_split_for_two_inputs": {"w": "12 tokens, 4 -> 8"},
    "kernel_interleaved": {"w": "6 tokens, 4 -> 8"},
    "kernel_sliced": {"w": SQUARE},
    "kernel_reversed": {"w": TWICE},
    "kernels_concatenated": {"q": "12 tokens, 4 -> 3", "k": "12 tokens, 4 -> 1"},
    "kernels_concatenated_along_rows": {"q": "6 tokens, 3 -> 4", "k": "6 tokens, 1 -> 4"},
    "kernels_stacked": dict.fromkeys("qkv", SQUARE),
    "kernels_stacked_for_one_product": dict.fromkeys("qk", SQUARE),
    "kernel_padded": {"w": "6 tokens, 4 -> 3"},
    "kernel_scaled": {"w": TWICE},
    "kernels_added": {"w": SQUARE, "v": SQUARE},
    "kernel_behind_a_barrier": {"w": SQUARE},
    "kernel_kept_flat": {"w": SQUARE},
    "stack_kept_flat": {"w": STACK},
    "kernel_for_each_group": {"w": SQUARE},
    "pointwise_convolution": {"w": SQUARE},
    "pointwise_convolution_of_planes": {"w": SQUARE},
    "vocabulary_in_chunks": {"w": "6 tokens, 4 -> 9"},
    "vocabulary_in_unrolled_chunks": {"w": "6 tokens, 4 -> 9"},
    "head_read_by_its_targets": {"w": SQUARE, "head": f"{LOOKUP}; 6 tokens, 4 -> 9"},
    "tied_embedding": {"embed": f"{LOOKUP}; 6 tokens, 4 -> 9", "w": SQUARE},
    "low_rank": {"a": "6 tokens, 4 -> 2", "b": "6 tokens, 2 -> 4"},
    "lookups": {
        **dict.fromkeys(("clip", "fill", "promised", "taken"), LOOKUP),
        "wide": "6 tokens, 9 rows of 8",
        "scalars": "6 tokens, 9 rows of 1",
        "columns": LOOKUP,
        "one_row": "1 token, 9 rows of 4",
    },
    "tables_read_otherwise": {
        **dict.fromkeys(("mapped", "scanned", "scaled", "columns", "last"), LOOKUP),
        "old": "6 tokens, 7 rows of 4",
        "new": "6 tokens, 2 rows of 4",
        "wide": "6 tokens, 9 rows of 8",
    },
    "tables_of_layers": {"layers/table": f"3 layers, {LOOKUP}", "layers/w": STACK},
    "jit": {"w": SQUARE},
    "jit_called_twice": {"w": TWICE},
    "jit_returns_its_parameter": {"w": f"{SQUARE}; {SQUARE}"},
    "checkpoint": {"w": SQUARE},
    "checkpoint_with_a_policy": {"w": SQUARE, "w2": SQUARE},
    "checkpoint_closes_over_its_parameters": {"w": SQUARE},
    "scan": SCANNED,
    "scan_backwards_and_unrolled": SCANNED,
    "scan_of_checkpoints": SCANNED,
    "scan_of_one": {"w": SQUARE},
    "scan_in_a_scan": {"w": "6 layers, 6 tokens, 4 -> 4", "b": "dense, 6 layers"},
    "scan_in_a_scan_transposed": {"w": "6 layers, 6 tokens, 4 -> 4", "b": "dense, 6 layers"},
    "scan_over_a_reshaped_stack": {"w": "6 layers, 6 tokens, 4 -> 4"},
    "two_scans": {"w": STACK_TWICE},
    "scan_with_a_shared_kernel": {"w": STACK, "shared": "18 tokens, 4 -> 4"},
    "recurrent": {"w": SQUARE, "u": SQUARE},
    "kernel_carried": {"w": "18 tokens, 4 -> 4"},
    "scan_returns_its_parameters": {"w": STACK_TWICE},
    "scan_returns_its_parameters_transposed": {"w": STACK},
    "two_scans_of_which_one_transposes": {"w": "dense, 3 layers"},
    "scan_returns_and_uses_its_parameters_transposed": {"w": "dense, 3 layers"},
    "scan_stacks_a_kernel": {"w": "18 tokens, 4 -> 4"},
    "last_layer_of_a_scan": {"w": "dense, 3 layers"},
    "fori_loop": {"w": TWICE},
    "cond": {"v": SQUARE},
    "while_loop_on_the_side": {"w": SQUARE},
    "stopped_gradient": {"w": SQUARE},
    "custom_vjp": {"v": SQUARE},
    "custom_jvp": {"v": SQUARE},
    "vmapped_heads": {"w": SQUARE},
    "vmapped_tokens": {"w": SQUARE},
    "scanned_heads": {"w": STACK},
    "gradient_inside": {"w": f"{SQUARE}; {SQUARE}"},
    "params_of_every_kind": {"0/0": LOOKUP, "0/1": ENDS["head"]},
    "linen_Mlp": {"Dense_0/kernel": "6 tokens, 8 -> 4", "Dense_1/kernel": "6 tokens, 4 -> 8"},
    "linen_Remat": {
        "mlp/Dense_0/kernel": "6 tokens, 8 -> 4",
        "mlp/Dense_1/kernel": "6 tokens, 4 -> 8",
    },
    "linen_Scan": {"layers/Dense_0/kernel": STACK, "layers/Dense_0/bias": "dense, 3 layers"},
    "linen_ScanOfRemat": {"layers/Dense_0/kernel": STACK, "layers/Dense_0/bias": "dense, 3 layers"},
    "linen_SharedScan": {"Dense_0/kernel": "18 tokens, 4 -> 4"},
    "linen_SeveralAxes": {"split/kernel": "6 tokens, 4 -> 6", "join/kernel": "6 tokens, 6 -> 4"},
    "linen_BatchedDense": {"DenseGeneral_0/kernel": "2 layers, 6 tokens, 2 -> 2"},
    "linen_Attention": {f"attention/{name}": why for name, why in ATTENTION.items()},
    "linen_Bfloat16": {"Dense_0/kernel": SQUARE},
    "linen_tied": {"Embed_0/embedding": f"{LOOKUP}; 6 tokens, 4 -> 9", "Dense_0/kernel": SQUARE},
    "linen_dropout": {"layers_0/kernel": "6 tokens, 4 -> 9"},
    "nnx_mlp": {"layers/1/kernel": "6 tokens, 4 -> 8", "layers/3/kernel": "6 tokens, 8 -> 4"},
    "nnx_remat": {"linear/kernel": SQUARE},
    "nnx_remat_called_twice": {"linear/kernel": TWICE},
    "nnx_jit_called_twice": {"linear/kernel": TWICE},
    "nnx_scan": {"linear/kernel": STACK, "linear/bias": "dense, 3 layers"},
    "nnx_scan_of_remat": {"linear/kernel": STACK, "linear/bias": "dense, 3 layers"},
    "nnx_attention": ATTENTION,
    "nnx_einsum": {"kernel": SQUARE},
    "nnx_several_axes": {
        "layers/0/kernel": "6 tokens, 4 -> 6",
        "layers/1/kernel": "6 tokens, 6 -> 4",
    },
    "nnx_bfloat16": {"layers/0/kernel": SQUARE},
    "nnx_lora": {"lora_a": "6 tokens, 4 -> 2", "lora_b": "6 tokens, 2 -> 4"},
    "nnx_lora_linear": {
        "kernel": SQUARE,
        "lora/lora_a": "6 tokens, 4 -> 2",
        "lora/lora_b": "6 tokens, 2 -> 4",
    },
    "nnx_lora_alone": {"lora/lora_a": "6 tokens, 4 -> 2", "lora/lora_b": "6 tokens, 2 -> 4"},
    "nnx_tied": {
        "embed/embedding": f"{LOOKUP}; 6 tokens, 4 -> 9",
        "linear/kernel": SQUARE,
    },
}


def first(microbatch):
    return jax.tree.map(lambda x: x[0], microbatch)


def described(model):
    """The rows of `describe_scores`: (leaf, shape, scores, projected by, why) of each leaf."""
    table = describe_scores(model.logprob_fn, model.params, model.microbatch).splitlines()
    return [re.split("  +", line) for line in table[1 : 1 + len(jax.tree.leaves(model.params))]]


def summary(model):
    """How `describe_scores` describes each leaf, save why a leaf is dense."""
    found = {}
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    for (path, _), (_, _, kind, by, why) in zip(leaves, described(model), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        name = re.sub(r"^(layer/)*|/value$", "", name)
        kinds = ["LookupFactors" if "rows" in use else "LayerFactors" for use in why.split(";")]
        if kind == "DenseScores":
            layers = re.search(r", \d+ layers?$", why)
            found[name] = "dense" + (layers[0] if layers else "")
            assert by == "accumulation"
        else:
            assert kind == " + ".join(kinds)
            assert by == ("accumulation, intra" if kind == "LayerFactors" else "neither")
            found[name] = why
    return found


def everything(model, coefficients=COEFFICIENTS):
    """(log-probabilities, scores, their weighted sum), and what JAX has for the first and last."""

    def run(params, microbatch):
        def loss(params):
            logprobs = jax.vmap(model.logprob_fn, (None, 0))(params, microbatch)
            return jnp.sum(jnp.asarray(coefficients, logprobs.dtype) * logprobs), logprobs

        logprobs, scores = sequence_scores(model.logprob_fn)(params, microbatch)
        gradient, expected_logprobs = jax.grad(loss, has_aux=True)(params)
        ours = logprobs, weighted_sum(scores, jnp.asarray(coefficients, logprobs.dtype))
        return ours, (expected_logprobs, gradient), scores

    return jax.jit(run)(model.params, model.microbatch)


def assert_equal_but_for_rounding(actual, expected, rtol):
    """Leaf by leaf in the norm; a leaf that is zero but for rounding counts as 1 % of them all."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    actual, expected = (
        [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (actual, expected)
    )
    floor = 0.01 * np.sqrt(sum(np.sum(x**2) for x in expected))
    for got, want in zip(actual, expected, strict=True):
        assert np.linalg.norm(got - want) <= rtol * max(np.linalg.norm(want), floor)


def test_every_expectation_is_of_a_model():
    assert EXPECTED.keys() <= MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_each_leaf_has_the_scores_that_its_uses_allow(name):
    found = summary(MODELS[name]())
    expected = {leaf: why for leaf, why in ENDS.items() if leaf in found} | EXPECTED.get(name, {})
    assert found == dict.fromkeys(found, "dense") | expected


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_jax_grad(name):
    actual, expected, scores = everything(MODELS[name]())
    assert_equal_but_for_rounding(actual, expected, 2e-2 if name in NARROW else 1e-5)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(scores))


@pytest.mark.parametrize(
    "name",
    ["mlp", "lookups", "scan_in_a_scan", "outputs_dropped", "tied_embedding", "linen_Mlp"],
)
def test_scores_are_those_of_jax_grad_in_float64(name):
    with jax.enable_x64(True):
        model = MODELS[name]()
        params = jax.tree.map(lambda x: x.astype(jnp.float64), model.params)
        actual, expected, _ = everything(model._replace(params=params))
        assert actual[0].dtype == jnp.float64
        assert_equal_but_for_rounding(actual, expected, 1e-13)


@pytest.mark.parametrize(
    ("module", "reader"),
    [(_jaxpr, "body"), (_moves, "moved"), (_operations, "matmul"), (_operations, "lookup")],
)
def test_what_is_not_recognised_is_dense_and_right(module, reader, monkeypatch):
    monkeypatch.setattr(module, reader, lambda *args: None)
    for name in ("scan_of_checkpoints", "kernel_transposed", "tied_embedding", "stack_in_a_loop"):
        actual, expected, _ = everything(MODELS[name]())
        assert_equal_but_for_rounding(actual, expected, 1e-5)
    expected = {"body": "dense", "matmul": "dense, 3 layers"}.get(reader, STACK)
    assert summary(MODELS["scan_of_checkpoints"]())["w"] == expected


# One model in two forms.


def test_a_scanned_model_has_the_scores_of_its_unrolled_twin():
    unrolled, scanned, stack = twins()
    (logprobs, gradient), _, one_by_one = everything(unrolled)
    (scanned_logprobs, scanned_gradient), _, stacked = everything(scanned)
    chex.assert_trees_all_close(scanned_logprobs, logprobs, rtol=1e-6)
    chex.assert_trees_all_close(scanned_gradient, stack(gradient), atol=1e-6)
    for name, layer_shape in {"w": (LAYERS,), "heads": (LAYERS, 2), "b": (LAYERS,)}.items():
        scores = stacked["layer"][name]
        assert scores.layer_shape == layer_shape
        grams = jnp.stack([layer[name].gram() for layer in one_by_one["layer"]])
        chex.assert_trees_all_close(scores.gram(), grams, atol=1e-5)
        values = jnp.stack([layer[name].dense().values for layer in one_by_one["layer"]], axis=1)
        chex.assert_trees_all_close(scores.dense().values, values, atol=1e-6)
    kinds = {"w": LayerFactors, "heads": LayerFactors, "b": DenseScores}
    assert {name: type(scores) for name, scores in stacked["layer"].items()} == kinds


def test_factors_are_what_a_layer_saw():
    """By hand: X is the input, D the gradient of the log-probability by the output."""
    x = normal(0, BATCH, TOKENS, WIDTH)
    w = kernels(w=(WIDTH, 3))["w"]
    _, scores = sequence_scores(lambda w, x: jnp.sum(jnp.sin(x @ w)))(w, x)
    chex.assert_trees_all_close((scores.inputs, scores.output_grads), (x, jnp.cos(x @ w)))
    _, scores = sequence_scores(lambda w, x: jnp.sum(jnp.sin(w.T @ x.T)))(w, x)
    chex.assert_trees_all_close((scores.inputs, scores.output_grads), (x, jnp.cos(x @ w)))


LOOKUPS = {
    "clip": lambda table, i: table.at[i].get(mode="clip"),
    "fill": lambda table, i: table.at[i].get(mode="fill", fill_value=0),
    "promised": lambda table, i: table.at[i].get(mode="promise_in_bounds"),
    "plain": lambda table, i: table[i],
    "mapped": lambda table, i: jax.vmap(lambda i: table[i])(i),
    "scanned": lambda table, i: jax.lax.map(lambda i: table[i], i),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_out_of_bounds_read_what_jax_grad_has(name):
    table = kernels(w=(5, 2))["w"]
    indices = jnp.array([[0, 4, 5, 2**31 - 1], [-5, -1, -6, -(2**31)]], jnp.int32)

    def logprob_fn(table, indices):
        return jnp.sum(jnp.sin(LOOKUPS[name](table, indices)))

    model, coefficients = Model(logprob_fn, table, indices), np.array([1.0, -2.0], np.float32)
    actual, expected, scores = everything(model, coefficients)
    chex.assert_trees_all_close(actual[1], expected[1], rtol=1e-6)
    fused, _ = accumulated_gradient(logprob_fn)(table, indices[None], coefficients[None], 0)
    chex.assert_trees_all_close(fused, expected[1], rtol=1e-6)
    assert isinstance(scores, LookupFactors)
    assert jnp.all((scores.indices >= 0) & (scores.indices < 5))


# Around the function.


def test_aux_comes_with_the_log_probabilities():
    model = MODELS["tied_embedding"]()

    def logprob_fn(params, tokens):
        return model.logprob_fn(params, tokens), {"w": params["w"], "last": tokens[-1], "n": None}

    (logprobs, aux), scores = sequence_scores(logprob_fn, has_aux=True)(
        model.params, model.microbatch
    )
    expected = sequence_scores(model.logprob_fn)(model.params, model.microbatch)
    chex.assert_trees_all_close((logprobs, scores), expected)
    chex.assert_trees_all_equal(
        aux, {"w": jnp.stack([model.params["w"]] * 4), "last": model.microbatch[:, -1], "n": None}
    )
    table = describe_scores(logprob_fn, model.params, model.microbatch, has_aux=True)
    assert table == describe_scores(model.logprob_fn, model.params, model.microbatch)
    check_scores(logprob_fn, model.params, model.microbatch, has_aux=True)


def test_scores_work_without_jit_in_scans_and_over_an_ensemble():
    model = MODELS["scan"]()
    scores_fn = sequence_scores(model.logprob_fn)
    expected = jax.jit(scores_fn)(model.params, model.microbatch)
    chex.assert_trees_all_close(scores_fn(model.params, model.microbatch), expected, atol=1e-6)
    ensemble = jax.tree.map(lambda x: jnp.stack([x, x]), model.params)
    both = jax.vmap(scores_fn, (0, None))(ensemble, model.microbatch)
    one = jax.tree.map(lambda x: x[1], both)
    chex.assert_trees_all_close(jax.tree.leaves(one), jax.tree.leaves(expected), atol=1e-6)
    microbatches = jnp.stack([model.microbatch, model.microbatch[::-1]])
    _, (logprobs, _) = jax.lax.scan(lambda c, x: (c, scores_fn(model.params, x)), 0, microbatches)
    chex.assert_trees_all_close(logprobs, jnp.stack([expected[0], expected[0][::-1]]), rtol=1e-6)


def test_scores_may_be_differentiated():
    x = jnp.ones((BATCH, TOKENS, WIDTH))
    w = kernels(w=(WIDTH, 3))["w"]

    def logprob_fn(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    def ours(w):
        return jnp.sum(weighted_sum(sequence_scores(logprob_fn)(w, x)[1], jnp.ones(BATCH)) ** 2)

    def expected(w):
        return jnp.sum(jax.grad(lambda w: logprob_fn(w, x))(w) ** 2)

    chex.assert_trees_all_close(jax.grad(ours)(w), jax.grad(expected)(w), rtol=1e-5)


def test_parameters_and_log_probabilities_may_be_constants():
    x = jnp.ones((2, 3))
    logprobs, scores = sequence_scores(lambda p, x: p * p + jnp.sum(x))(0.5, x)
    chex.assert_trees_all_close((logprobs, scores.values), (jnp.full(2, 3.25), jnp.ones(2)))
    logprobs, scores = sequence_scores(lambda p, x: 2.0)(np.ones(2), x)
    chex.assert_trees_all_close((logprobs, scores.values), (jnp.full(2, 2.0), jnp.zeros((2, 2))))
    logprobs, scores = sequence_scores(lambda p, x: jnp.sum(x))({}, x)
    chex.assert_trees_all_close((logprobs, scores), (jnp.full(2, 3.0), {}))


def test_effects_happen(capfd):
    def logprob_fn(w, x):
        def step(h, w):
            jax.debug.print("layer")
            return jnp.tanh(h @ w), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(step), x, w)[0])

    sequence_scores(logprob_fn)(jnp.ones((2, 3, 3)), jnp.ones((1, 4, 3)))
    jax.effects_barrier()
    assert "layer" in capfd.readouterr().out


def test_types_are_not_promoted_on_the_way():
    """In strict mode, and with float16 inputs, which no sum of scores is rounded to."""
    with jax.numpy_dtype_promotion("strict"):
        model = MODELS["scan_of_checkpoints"]()
        check_scores(model.logprob_fn, model.params, model.microbatch)
        x = jnp.ones((2, 5, 4), jnp.float16)
        _, scores = sequence_scores(lambda w, x: jnp.sum(x @ w))(jnp.ones((4, 3), jnp.float16), x)
        assert scores.inputs.dtype == scores.output_grads.dtype == scores.dtype == jnp.float16


# On a mesh.


def dense(scores):
    return jax.tree.map(
        lambda leaf: leaf.dense().values, jax.device_get(scores), is_leaf=is_score_leaf
    )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("form", "spec"),
    [
        ("unrolled", (None, None)),
        ("unrolled", ("model", None)),
        ("unrolled", (None, "model")),
        ("scanned", (None, None)),
        ("scanned", ("model", None)),
    ],
)
def test_a_mesh_changes_nothing(form, spec, axis_type):
    def step(h, w):
        return jnp.tanh(h @ w), None

    def logprob_fn(params, x):
        if form == "scanned":
            x = jax.lax.scan(jax.checkpoint(step), x, params["layers"])[0]
        else:
            x = jnp.tanh(x @ params["w"]) * (x @ params["v"]) + x @ params["w"].T
        return jnp.sum(jax.nn.log_softmax(x))

    square = (WIDTH, WIDTH)
    params = kernels(w=square, v=square, layers=(LAYERS, *square))
    x = normal(0, 8, TOKENS, WIDTH)
    expected = jax.jit(sequence_scores(logprob_fn))(params, x)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)

    def shard(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    with jax.set_mesh(mesh):
        sharded = {name: shard(w, *[None] * (w.ndim - 2), *spec) for name, w in params.items()}
        actual = jax.jit(sequence_scores(logprob_fn))(sharded, shard(x, "data"))
    chex.assert_trees_all_close(dense(actual[1]), dense(expected[1]), atol=1e-5)
    as_made = {name: leaf.made for name, leaf in actual[1].items()}
    chex.assert_trees_all_close(dense(as_made), dense(expected[1]), atol=1e-5)
    factors = as_made["w" if form == "unrolled" else "layers"]
    assert not isinstance(factors, DenseScores)


def test_the_mapped_axis_may_be_named():
    model = MODELS["scan"]()
    microbatch = jnp.concatenate([model.microbatch] * 2)
    expected = jax.jit(sequence_scores(model.logprob_fn))(model.params, microbatch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def logprob_fn(params, tokens):
        params = jax.lax.with_sharding_constraint(params, NamedSharding(mesh, PartitionSpec()))
        return model.logprob_fn(params, tokens)

    sharded = jax.device_put(microbatch, NamedSharding(mesh, PartitionSpec("data")))
    scores_fn = sequence_scores(logprob_fn, spmd_axis_name="data")
    actual = jax.jit(scores_fn)(model.params, sharded)
    chex.assert_trees_all_close(dense(actual[1]), dense(expected[1]), atol=1e-5)
    assert isinstance(actual[1]["layer"]["w"], LayerFactors)


# What it costs.


def test_zero_probes_are_compiled_away():
    """A probe has a factor's shape without b, which nothing in the compiled program has."""
    model = MODELS["scan_of_checkpoints"]()
    scores_fn = jax.jit(sequence_scores(model.logprob_fn))
    compiled = scores_fn.lower(model.params, model.microbatch).compile().as_text()
    assert f"f32[{LAYERS},{BATCH},{TOKENS},{WIDTH}]" in compiled
    assert f"f32[{LAYERS},{TOKENS},{WIDTH}]" not in compiled
    assert f"f32[{TOKENS},{WIDTH}]" not in compiled


def test_equal_inputs_are_stored_once():
    def logprob_fn(params, x):
        def step(h, p):
            return jnp.tanh(h @ p["q"]) * jnp.tanh(h @ p["k"]) * (h @ p["v"]), None

        return jnp.sum(jax.lax.scan(step, x, params)[0])

    stack = (LAYERS, WIDTH, WIDTH)
    params, x = kernels(q=stack, k=stack, v=stack), jnp.ones((BATCH, TOKENS, WIDTH))
    (jitted,) = jax.make_jaxpr(sequence_scores(logprob_fn))(params, x).jaxpr.eqns
    jaxpr = _jaxpr.body(jitted).jaxpr
    (backward,) = (e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["reverse"])
    factors = [v for v in backward.outvars if v.aval.shape == (LAYERS, BATCH, TOKENS, WIDTH)]
    assert len(factors) == 4  # h, and the output gradients of q, k and v


# What `jax.vmap` cannot map.


@jax.custom_batching.custom_vmap
def unmapped_sine(x):
    return jnp.sin(x)


@unmapped_sine.def_vmap
def _(axis_size, in_batched, x):
    raise NotImplementedError("no rule for sines")


@jax.custom_vjp
def sine(x):
    return unmapped_sine(x)


sine.defvjp(lambda x: (sine(x), x), lambda x, grad: (grad * jnp.cos(x),))


def with_ragged_products(params, h):
    """A mixture of experts: tokens in the order of their experts, whose kernels multiply them."""
    gates = jax.nn.softmax(h @ params["router"])
    expert = jnp.argmax(gates, axis=-1)
    order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=WIDTH)
    products = jax.lax.ragged_dot(h[order], params["w"], sizes)
    return jnp.sum(products[jnp.argsort(order)] * jnp.max(gates, axis=-1, keepdims=True))


def test_what_cannot_be_mapped_is_taken_one_by_one():
    x = normal(0, BATCH, TOKENS, WIDTH)
    w = kernels(w=(WIDTH, 3))["w"]

    def logprob_fn(w, x):
        return jnp.sum(sine(x @ w))

    with pytest.warns(UserWarning, match=r"cannot map logprob_fn \(no rule for sines\)"):
        logprobs, scores = sequence_scores(logprob_fn)(w, x)
    expected = sequence_scores(lambda w, x: jnp.sum(jnp.sin(x @ w)))(w, x)
    chex.assert_trees_all_close((logprobs, scores), expected, atol=1e-6)
    assert "taken one after the other" in describe_scores(logprob_fn, w, x)
    assert "one after the other" not in describe_scores(lambda w, x: jnp.sum(x @ w), w, x)
    with pytest.raises(NotImplementedError, match="no rule for sines") as raised:
        accumulated_gradient(logprob_fn)(w, x[None], jnp.ones((1, BATCH)), 0)
    assert any(
        "sequence_scores takes them one after the other" in n for n in raised.value.__notes__
    )


@pytest.mark.filterwarnings("ignore:jax.vmap cannot map")
def test_a_mixture_of_experts_by_ragged_products_has_its_scores():
    params = kernels(router=(WIDTH, WIDTH), w=(WIDTH, WIDTH, 5))
    x = normal(0, BATCH, TOKENS, WIDTH)
    _, scores = sequence_scores(with_ragged_products)(params, x)
    assert isinstance(scores["w"], DenseScores)
    check_scores(with_ragged_products, params, x)
    expected = [jax.grad(with_ragged_products)(params, one) for one in x]
    for coefficients, want in zip(np.eye(BATCH, dtype=np.float32), expected, strict=True):
        chex.assert_trees_all_close(weighted_sum(scores, coefficients), want, atol=1e-5)


# Descriptions and checks.


def test_description_of_abstract_values():
    model = MODELS["scan"]()
    abstract = jax.eval_shape(lambda: (model.params, model.microbatch))
    assert describe_scores(model.logprob_fn, *abstract) == (
        "leaf            shape      scores         projected by         why\n"
        "['embed']       (9, 4)     LookupFactors  neither              6 tokens, 9 rows of 4\n"
        "['head']        (4, 9)     LayerFactors   accumulation, intra  6 tokens, 4 -> 9\n"
        "['layer']['b']  (3, 4)     DenseScores    accumulation         used by add, 3 layers\n"
        "['layer']['w']  (3, 4, 4)  LayerFactors   accumulation, intra  3 layers, 6 tokens, 4 -> "
        "4\n"
        "Not projected unless accumulate(..., mask=...) is True for it: ['embed']. Tables that are "
        "looked up are not by default, be they embeddings, tied embeddings, or heads that are read "
        "by their targets."
    )
    alone = describe_scores(lambda w, x: x @ w, jnp.ones(3), jnp.ones((2, 3))).splitlines()
    assert alone[1:] == ["(root)  (3,)   LayerFactors  accumulation, intra  1 token, 3 -> 1"]


@pytest.mark.parametrize("name", ["tied_embedding", "head_read_by_its_targets"])
def test_a_table_with_lookups_and_products_is_said_to_need_a_mask(name):
    model, leaf = MODELS[name](), {"tied_embedding": "embed"}.get(name, "head")
    row = next(row for row in described(model) if row[0] == f"['{leaf}']")
    assert row[2:4] == ["LookupFactors + LayerFactors", "neither"]
    table = describe_scores(model.logprob_fn, model.params, model.microbatch)
    assert re.search(rf"Not projected unless accumulate.*mask.*\['{leaf}'\]", table)


def test_large_dense_scores_are_described_with_their_size():
    def logprob_fn(w, x):
        return jnp.sum(x @ (w @ w))

    for width, b, size in [
        (500, 8, ""),
        (2000, 8, "; 128.0 MB for 8 sequences"),
        (2000, 16, "; 256.0 MB for 16 sequences"),
    ]:
        w, x = (jax.ShapeDtypeStruct((*n, width), jnp.float32) for n in ((width,), (b, 3)))
        table = describe_scores(logprob_fn, w, x)
        assert table.endswith(f"used by dot_general{size}")


@pytest.mark.parametrize(
    "name", ["linen_Attention", "nnx_bfloat16", "kernel_cast", "params_of_every_kind", "unused"]
)
def test_check_passes(name):
    model = MODELS[name]()
    errors = check_scores(model.logprob_fn, model.params, model.microbatch)
    assert len(errors) == len(jax.tree.leaves(model.params))
    assert max(errors.values()) < (2e-2 if name in NARROW else 1e-5)
    with pytest.raises(ValueError, match="embed.*by" if name in NARROW else "rtol=-1"):
        check_scores(*model, rtol=1e-6 if name in NARROW else -1)


def test_check_names_the_leaf_whose_scores_are_wrong(monkeypatch):
    model = MODELS["mlp"]()
    right = Assembly.grads

    def wrong(self, reported):
        factor = 1.01 if self.matrix_shape == (4, 9) else 1
        return [factor * grads for grads in right(self, reported)]

    monkeypatch.setattr(Assembly, "grads", wrong)
    with pytest.raises(ValueError, match=r"rtol=0.0001: \['head'\] by 1.0e-02\.$"):
        check_scores(*model)
    assert check_scores(*model, rtol=0.1)["['head']"] == pytest.approx(0.01, rel=1e-3)


def test_check_finds_a_function_that_is_not_one():
    calls = itertools.count(1)
    with pytest.raises(ValueError, match=r"\(root\) by "):
        check_scores(lambda w, x: next(calls) * jnp.sum(x @ w), jnp.ones(3), jnp.ones((2, 5, 3)))


# Errors.


def total(params, x):
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves((params, x)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sequence_scores(total)({"n": jnp.arange(3)}, jnp.ones(2)), r"\['n'\] is int32"),
        (lambda: sequence_scores(total)([jnp.ones(2) * 1j], jnp.ones(2)), r"\[0\] is complex64"),
        (lambda: sequence_scores(total)(True, jnp.ones(2)), "params is bool"),
        (lambda: sequence_scores(total)({"n": "a"}, jnp.ones(2)), r"\['n'\] is str"),
        (lambda: sequence_scores(3), "logprob_fn=3 must be a function"),
        (lambda: describe_scores(total, 1, jnp.ones(2)), "params is int32"),
        (lambda: check_scores(total, 1, jnp.ones(2)), "params is int32"),
        (lambda: describe_scores(total, 1.0, ()), "no arrays"),
        (
            lambda: describe_scores(total, 1.0, {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}),
            r"microbatch\['b'\] has shape \(3,\).*microbatch\['a'\] has shape \(2, 3\)",
        ),
        (lambda: sequence_scores(total)(1.0, ()), "no arrays"),
        (lambda: sequence_scores(total)(1.0, jnp.float32(1)), r"microbatch has shape \(\)"),
        (
            lambda: sequence_scores(total)(1.0, {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}),
            r"microbatch\['b'\] has shape \(3,\).*microbatch\['a'\] has shape \(2, 3\)",
        ),
        (lambda: sequence_scores(lambda p, x: p * x)(1.0, jnp.ones((2, 3))), r"scalar.*3"),
        (lambda: sequence_scores(lambda p, x: 1)(1.0, jnp.ones(2)), "floating point scalar.*int32"),
        (lambda: sequence_scores(lambda p, x: (p, x))(1.0, jnp.ones(2)), "has_aux=True"),
        (lambda: sequence_scores(lambda p, x: None)(1.0, jnp.ones(2)), "scalar.*None"),
        (
            lambda: sequence_scores(lambda p, x: p, has_aux=True)(1.0, jnp.ones(2)),
            r"must return \(scalar, aux\)",
        ),
        (
            lambda: describe_scores(lambda p, x: (p * x, x), 1.0, jnp.ones((2, 3)), has_aux=True),
            "floating point scalar",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("leaf", "cure"),
    [
        (jax.nn.relu, r"params\['n'\] is .*eqx.partition\(model, eqx.is_inexact_array\)"),
        (False, r"params\['n'\] is bool.*eqx.partition"),
        (jax.random.key(0), r"key<fry>.*nnx.split\(model, nnx.Param, ...\).*copy=True"),
        (jnp.uint32(3), r"uint32.*nnx.split\(model, nnx.Param, ...\).*travels in the sequence"),
        (jnp.int32(3), r"int32.*Pass it in the sequence or close over it"),
    ],
)
def test_whole_modules_are_refused_with_the_cure(leaf, cure):
    with pytest.raises(ValueError, match=cure):
        sequence_scores(total)({"w": jnp.ones(3), "n": leaf}, jnp.ones((2, 3)))


def with_random_state(rngs):
    return nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))


def test_the_cure_for_random_state_works():
    model = with_random_state(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def logprob_fn(params, x):
        return jnp.sum(jnp.tanh(nnx.merge(graphdef, params, rest, copy=True)(x)))

    x = jnp.ones((BATCH, TOKENS, WIDTH))
    check_scores(logprob_fn, params, x)
    with pytest.raises(ValueError, match=r"copy=True"):
        sequence_scores(logprob_fn)(nnx.split(model)[1], x)


@pytest.mark.parametrize(
    "batched",
    [
        lambda w, x: jnp.sum(jnp.einsum("bti,io->bto", x, w), axis=(1, 2)),
        lambda w, x: jnp.sum(x @ w, axis=-1)[:, 0],
    ],
)
def test_a_function_for_a_batch_is_refused_with_the_cure(batched):
    w, x = jnp.ones((WIDTH, 3)), jnp.ones((BATCH, TOKENS, WIDTH))
    coefficients = jnp.ones((1, BATCH))
    for call in (
        lambda fn: sequence_scores(fn)(w, x),
        lambda fn: describe_scores(fn, w, x),
        lambda fn: accumulated_gradient(fn)(w, x[None], coefficients, 0),
    ):
        with pytest.raises(ValueError, match=r"written for a batch: of 4 sequences.*batch of one"):
            call(batched)
        call(lambda w, x: batched(w, jax.tree.map(lambda x: x[None], x))[0])
    with pytest.raises(ValueError, match="written for a batch"):
        sequence_scores(lambda w, x: (batched(w, x), x), has_aux=True)(w, x)


@pytest.mark.parametrize("name", ["tied_embedding", "scan", "linen_Attention"])
def test_one_sequence_in_place_of_a_microbatch_is_named(name):
    model = MODELS[name]()
    for call in (
        lambda microbatch: describe_scores(model.logprob_fn, model.params, microbatch),
        lambda microbatch: sequence_scores(model.logprob_fn)(model.params, microbatch),
        lambda microbatch: check_scores(model.logprob_fn, model.params, microbatch),
    ):
        with pytest.raises(ValueError, match=r"If the microbatch is one sequence, give it that"):
            call(first(model.microbatch))


def test_what_cannot_be_differentiated_is_not_taken_for_one_sequence():
    def logprob_fn(w, x):
        return jnp.sum(jax.lax.while_loop(lambda h: jnp.sum(h) < 9, lambda h: h * w, x))

    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        sequence_scores(logprob_fn)(2.0, jnp.ones((2, 3)))


def test_other_errors_of_the_function_stay_what_they_are():
    def logprob_fn(w, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        sequence_scores(logprob_fn)(jnp.ones(3), jnp.ones((2, 3)))


MEANS = {
    "mean": lambda logprobs, mask: logprobs.mean(),
    "sum over a count": lambda logprobs, mask: (logprobs * mask).sum() / mask.sum(),
    "with at least one": lambda logprobs, mask: (
        -((logprobs * mask).sum() / jnp.maximum(mask.sum(), 1))
    ),
    "jitted": lambda logprobs, mask: jax.jit(jnp.mean)(logprobs),
    "masked": lambda logprobs, mask: jnp.mean(logprobs, where=mask > 0),
}
SUMS = {
    "sum": lambda logprobs, mask: (logprobs * mask).sum(),
    "tempered": lambda logprobs, mask: logprobs.sum() / 0.7,
    "sum of means": lambda logprobs, mask: (logprobs / TOKENS).sum(),
}


@pytest.mark.parametrize("name", MEANS | SUMS)
def test_means_are_warned_of_where_they_are_seen(name):
    def logprob_fn(w, x):
        return (MEANS | SUMS)[name](jnp.tanh(x @ w), (x[:, 0] > 0).astype(jnp.float32))

    arguments = jnp.ones(WIDTH), jnp.ones((2, TOKENS, WIDTH))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sequence_scores(logprob_fn)(*arguments)
    assert [str(w.message)[:26] for w in caught] == ["logprob_fn ends in a mean."] * (name in MEANS)


class Noisy(nnx.Module):
    """A rematerialised layer whose dropout holds a stream of random numbers of its own."""

    def __init__(self):
        rngs = nnx.Rngs(0, dropout=1)
        self.linear = nnx.Linear(WIDTH, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    @nnx.remat
    def __call__(self, x):
        return self.dropout(self.linear(x))


@pytest.mark.parametrize("reseeded", ["dropout", "another", None])
def test_one_dropout_mask_for_all_sequences_is_warned_of(reseeded):
    graphdef, params, rest = nnx.split(Noisy(), nnx.Param, ...)

    def logprob_fn(params, sequence):
        model = nnx.merge(graphdef, params, rest, copy=True)
        if reseeded is not None:
            nnx.reseed(model, **{reseeded: sequence["key"]})
        return model(sequence["x"]).sum()

    microbatch = {"x": jnp.ones((2, TOKENS, WIDTH)), "key": jax.random.split(jax.random.key(0))}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_scores(logprob_fn, params, microbatch)
    messages = [str(w.message)[:36] for w in caught]
    assert messages == ["logprob_fn draws random numbers that"] * (reseeded != "dropout")


def endless(params, x):
    return jax.lax.while_loop(lambda c: c < 10, lambda c: c + jnp.sum(params * x), 0.0)


def callback(params, x):
    return jax.pure_callback(jnp.sum, jax.ShapeDtypeStruct((), jnp.float32), params * x)


@pytest.mark.parametrize("logprob_fn", [endless, callback])
def test_what_has_no_gradient_is_said_to_have_none(logprob_fn):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        sequence_scores(logprob_fn)(jnp.ones(3), jnp.ones((2, 3)))
    assert "differentiated in reverse mode, as by jax.grad" in raised.value.__notes__[0]
