"""`accumulated_gradient` against the two transformations, microbatch by microbatch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import proma_jax as proma
from proma_jax import policy_gradient as pg
from tests import models, oracles
from tests.cases import normal
from tests.oracles import assert_close

K = 3
ACCUMULATIONS = {
    "ridge": proma.Accumulation(),
    "bounded": proma.Accumulation(relative_bound=0.3, skip_fraction=0.5, shrinkage=0.7),
    "qr": proma.Accumulation(solver="qr"),
}
VARIANTS = {
    "plain": (None, None),
    **{name: (settings, None) for name, settings in ACCUMULATIONS.items()},
    "intra": (None, proma.Intra(rank=2)),
    "both": (proma.Accumulation(relative_bound=0.5), proma.Intra(rank=2, shrinkage=0.5)),
}


def step_of(model, k=K, seed=0):
    """(k, b, ...) sequences and their weights."""
    rng = np.random.default_rng(seed)
    b = jax.tree.leaves(model.microbatch)[0].shape[0]
    order = jnp.asarray(rng.integers(0, b, (k, b)))
    coefficients = normal(rng, k, b)
    return jax.tree.map(lambda x: x[order], model.microbatch), coefficients


def by_transformations(model, batch, coefficients, accumulation, intra):
    """The gradient that the inner optimizer gets, and what was removed at each microbatch."""
    k = coefficients.shape[0]
    settings = {} if accumulation is None else vars(accumulation)
    if accumulation is None:
        settings = {"shrinkage": 0.0}
    accumulate = proma.accumulate(optax.identity(), k, **settings)
    tx = accumulate
    if intra is not None:
        tx = optax.chain(proma.project_intra(**vars(intra)), accumulate)
    scores_fn = proma.sequence_scores(model.logprob_fn)

    def one(state, inputs):
        microbatch, weights = inputs
        values, scores = scores_fn(model.params, microbatch)
        grads = proma.weighted_sum(scores, weights)
        updates, state = tx.update(grads, state, model.params, scores=scores)
        fractions = [
            optax.tree.get(state, name) for name in ("accumulation_fraction", "intra_fraction")
        ]
        return state, (updates, values, fractions)

    _, (updates, values, fractions) = jax.lax.scan(
        one, tx.init(model.params), (batch, coefficients)
    )
    return jax.tree.map(lambda x: x[-1], updates), values, fractions


def agree(name, variant):
    """Compares the two forms on a model."""
    model = models.MODELS[name]()
    accumulation, intra = VARIANTS[variant]
    batch, coefficients = step_of(model)
    gradient_fn = proma.accumulated_gradient(
        model.logprob_fn, accumulation=accumulation, intra=intra
    )
    table = proma.describe_scores(model.logprob_fn, model.params, model.microbatch)
    if intra and "LayerFactors" not in table:
        with pytest.raises(ValueError, match="nothing to project"):
            gradient_fn(model.params, batch, coefficients, step=0)
        return
    grads, metrics = jax.jit(gradient_fn)(model.params, batch, coefficients, step=0)
    expected, logprobs, fractions = jax.jit(
        lambda b, c: by_transformations(model, b, c, accumulation, intra)
    )(batch, coefficients)
    params = jax.tree.map(jnp.asarray, model.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    tolerance = 2e-2 if {"bfloat16", "float16"} & dtypes_of(params) else 1e-4
    assert_close(grads, expected, tolerance)
    assert_close(metrics.logprobs, logprobs, tolerance)
    if accumulation:
        removed = metrics.accumulation_fraction
        np.testing.assert_allclose(removed, fractions[0], rtol=1e-2, atol=1e-5)
    if intra:
        np.testing.assert_allclose(metrics.intra_fraction, fractions[1], rtol=1e-2, atol=1e-5)


def dtypes_of(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@pytest.mark.any_version
@pytest.mark.parametrize(
    "name",
    [
        "kernel_batched_in_the_middle",
        "no_tokens",
        "tied_embedding",
        "tables_of_layers",
        "vmapped_heads",
        "equal_inputs_without_a_gradient",
        "constant_operands",
        "params_of_every_kind",
        "nnx_scan_of_remat",
        "nnx_lora",
    ],
)
def test_it_is_what_the_transformations_give_on_models_of_many_kinds(name):
    agree(name, "both")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "both"])
@pytest.mark.parametrize(
    "name",
    ["linen_tied", pytest.param("scan_of_checkpoints", marks=pytest.mark.any_version)],
)
def test_it_is_what_the_transformations_give_in_every_variant(name, variant):
    agree(name, variant)


@pytest.mark.any_version
def test_an_unrolled_model_gives_what_its_scanned_twin_gives():
    unrolled, scanned, stack = models.twins()
    for settings in (VARIANTS["bounded"], VARIANTS["intra"]):
        results = []
        for model in (unrolled, scanned):
            gradient_fn = proma.accumulated_gradient(
                model.logprob_fn, accumulation=settings[0], intra=settings[1]
            )
            results.append(jax.jit(gradient_fn)(model.params, *step_of(model), 0)[0])
        assert_close(results[1], stack(results[0]), 1e-4)


def test_kernels_that_share_an_input_share_the_tokens_that_count():
    """The query reads the last token only, the key all: both bases of the input are of all."""

    def logprob_fn(params, x):
        return jnp.sum(jnp.sin(x @ params["query"])[-1]) + jnp.sum(jnp.cos(x @ params["key"]))

    params = models.kernels(query=(5, 4), key=(5, 4))
    x = normal(0, K, 2, 6, 5)
    model = models.Model(logprob_fn, params, x[0])
    _, scores = proma.sequence_scores(logprob_fn)(params, x[0])
    assert scores["query"].in_loss.all()
    assert jnp.sum(jnp.any(scores["query"].output_grads != 0, axis=-1)) == 2
    coefficients, intra = jnp.ones((K, 2)), proma.Intra(rank=2)
    actual, _ = proma.accumulated_gradient(logprob_fn, intra=intra)(params, x, coefficients, 0)
    expected, _, _ = by_transformations(model, x, coefficients, None, intra)
    assert_close(actual, expected)


def test_the_step_must_be_given():
    """Left out, schedules and random starts would stand still."""
    gradient_fn = proma.accumulated_gradient(lambda w, x: jnp.sum(x @ w))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'step'"):
        gradient_fn(jnp.ones((3, 2)), jnp.ones((2, 2, 5, 3)), jnp.ones((2, 2)))


@pytest.mark.any_version
def test_schedules_and_starts_go_on_from_step_to_step():
    model = models.MODELS["mlp"]()
    batch, coefficients = step_of(model)

    def halved(step):
        return 1.0 / (1 + step)

    gradient_fn = proma.accumulated_gradient(
        model.logprob_fn,
        accumulation=proma.Accumulation(shrinkage=halved),
        intra=proma.Intra(rank=1, shrinkage=halved, key=3),
    )
    tx = optax.chain(
        proma.project_intra(rank=1, shrinkage=halved, key=3),
        proma.accumulate(optax.identity(), K, shrinkage=halved),
    )
    state, scores_fn = tx.init(model.params), proma.sequence_scores(model.logprob_fn)
    for step in range(2):
        for m in range(K):
            _, scores = scores_fn(model.params, batch[m])
            grads = proma.weighted_sum(scores, coefficients[m])
            updates, state = tx.update(grads, state, model.params, scores=scores)
        actual, _ = gradient_fn(model.params, batch, coefficients, step)
        assert_close(actual, updates)


def test_aux_is_stacked_and_it_compiles_once():
    model = models.MODELS["mlp"]()

    def logprob_fn(params, tokens):
        value = model.logprob_fn(params, tokens)
        return value, {"length": tokens.shape[0], "value": value}

    chex.clear_trace_counter()
    gradient_fn = proma.accumulated_gradient(
        logprob_fn, accumulation=proma.Accumulation(), has_aux=True
    )
    run = jax.jit(chex.assert_max_traces(gradient_fn, n=1))
    for seed in range(2):
        batch, coefficients = step_of(model, seed=seed)
        _, metrics = run(model.params, batch, coefficients, seed)
    chex.assert_trees_all_equal(metrics.aux["value"], metrics.logprobs)
    chex.assert_shape([metrics.aux["length"], metrics.logprobs], coefficients.shape)
    assert metrics.accumulation_fraction[0] == 0
    assert jnp.all(metrics.accumulation_fraction[1:] > 0)


def test_masked_leaves_are_accumulated_plainly():
    model = models.MODELS["mlp"]()
    batch, coefficients = step_of(model)
    mask = jax.tree.map(lambda _: False, model.params) | {"head": True}
    settings = proma.Accumulation(mask=mask), proma.Intra(rank=1, mask=mask)
    masked, plain = (
        proma.accumulated_gradient(model.logprob_fn, accumulation=a, intra=i)(
            model.params, batch, coefficients, step=0
        )[0]
        for a, i in (settings, (None, None))
    )
    assert_close([masked["embed"], masked["layer"]], [plain["embed"], plain["layer"]])
    assert np.linalg.norm(masked["head"] - plain["head"]) > 0.1 * np.linalg.norm(plain["head"])


def test_what_is_not_finite_is_seen():
    model = models.MODELS["mlp"]()
    batch, coefficients = step_of(model)
    poisoned = model.params | {"head": model.params["head"].at[0, 0].set(jnp.inf)}
    for settings in (VARIANTS["qr"], VARIANTS["both"]):
        gradient_fn = proma.accumulated_gradient(
            model.logprob_fn, accumulation=settings[0], intra=settings[1]
        )
        grads, _ = jax.jit(gradient_fn)(poisoned, batch, coefficients, step=0)
        assert not jnp.all(jnp.isfinite(grads["head"]))


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scales_of_scores_do_not_matter(scale):
    """What is removed of G is the same, whatever the scale of the scores."""

    def logprob_fn(params, x):
        return jnp.sum(jnp.sin(x @ params)) * scale

    params = models.kernels(w=(5, 4))["w"]
    x = normal(0, 2, 3, 7, 5)
    coefficients = jnp.asarray([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]) / scale
    gradient_fn = proma.accumulated_gradient(logprob_fn, accumulation=proma.Accumulation())
    grads, metrics = gradient_fn(params, x, coefficients, step=0)
    scores = jax.vmap(lambda x: jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(params))(x[1])
    first = jax.grad(
        lambda w: jnp.sum(coefficients[0] * scale * jnp.sum(jnp.sin(x[0] @ w), (1, 2)))
    )
    before = np.float64(first(params))
    assert_close(grads, before - oracles.projection(before, scores, "ridge"))
    assert 0.1 < metrics.accumulation_fraction[1] < 1


def test_no_score_outlives_its_layer_and_no_gradient_stands_beside_the_total():
    """A scanned, rematerialised model needs less memory than plain policy gradient does.

    That holds the microbatch's gradient beside the total, where here each layer is added in place.
    """
    layers, width, b, tokens = 16, 128, 4, 16

    def logprob_fn(stack, x):
        def layer(h, w):
            return h + jnp.tanh(h @ w), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, stack)[0])

    stack = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
    batch = jax.ShapeDtypeStruct((K, b, tokens, width), jnp.float32)
    coefficients = jax.ShapeDtypeStruct((K, b), jnp.float32)

    def plain(stack, batch, coefficients):
        def add(total, inputs):
            x, c = inputs
            loss = lambda stack: c @ jax.vmap(logprob_fn, (None, 0))(stack, x)  # noqa: E731
            return total + jax.grad(loss)(stack), None

        return jax.lax.scan(add, jnp.zeros_like(stack), (batch, coefficients))[0]

    def memory(step):
        lowered = jax.jit(step).lower(stack, batch, coefficients)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    of_plain, all_layers = memory(plain), layers * width * width * 4
    assert of_plain > all_layers
    for variant in ("ridge", "intra", "both"):
        accumulation, intra = VARIANTS[variant]
        gradient_fn = proma.accumulated_gradient(logprob_fn, accumulation=accumulation, intra=intra)
        fused = memory(functools.partial(gradient_fn, step=0))
        assert fused <= of_plain - 0.5 * all_layers, variant


@pytest.mark.parametrize("variant", ["plain", "intra", "ridge"])
def test_a_tied_table_is_added_to_in_chunks_of_tokens(variant):
    """No array holds the gradients of all logits, and the result is that of logits made at once."""
    b, tokens, width, vocabulary = 2, 64, 16, 512
    mask = jnp.ones(tokens, int)

    def logprob_fn(params, sequence, in_chunks=True):
        h, head = jnp.tanh(params["table"][sequence] @ params["w"]), params["table"].T
        if in_chunks:
            return pg.chunked_token_logprobs(h, head, sequence, mask, chunk_size=8).sum()
        return pg.token_logprobs(h @ head, sequence, mask).sum()

    params = {"table": normal(0, vocabulary, width), "w": normal(1, width, width)}
    batch = jnp.asarray(np.random.default_rng(2).integers(0, vocabulary, (K, b, tokens)))
    arguments = params, batch, normal(3, K, b), 0
    accumulation, intra = VARIANTS[variant]

    def compiled(fn):
        gradient_fn = proma.accumulated_gradient(fn, accumulation=accumulation, intra=intra)
        return jax.jit(gradient_fn).lower(*arguments).compile()

    chunked = compiled(logprob_fn)
    at_once = compiled(functools.partial(logprob_fn, in_chunks=False))
    (grads, metrics), (expected, of_expected) = chunked(*arguments), at_once(*arguments)
    assert_close(grads, expected, 1e-5)
    assert_close(metrics, of_expected, 1e-5)
    saved = b * tokens * vocabulary * 4
    memory = [x.memory_analysis().temp_size_in_bytes for x in (chunked, at_once)]
    assert memory[0] < memory[1] - 0.5 * saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones((2, 3)), jnp.ones(3), 0), r"coefficients has shape \(3,\)"),
        ((jnp.ones((3, 4, 3)), jnp.ones((3, 2)), 0), r"batch has shape \(3, 4, 3\)"),
        ((jnp.ones((0, 2, 3)), jnp.ones((0, 2)), 0), r"coefficients has shape \(0, 2\)"),
        ((jnp.ones((2, 2, 3)), 1j * jnp.ones((2, 2)), 0), "type complex64: it must be .* real"),
        (({}, jnp.ones((3, 2)), 0), "batch has no arrays"),
        ((jnp.ones((3, 2, 3)), jnp.ones((3, 2)), jnp.ones(2)), r"step has shape \(2,\)"),
    ],
)
def test_a_batch_without_its_axes_is_refused(arguments, message):
    gradient_fn = proma.accumulated_gradient(lambda w, x: jnp.sum(x @ w))
    with pytest.raises(ValueError, match=message):
        gradient_fn(jnp.ones((3, 2)), *arguments)


def test_settings_and_parameters_are_checked():
    with pytest.raises(ValueError, match="accumulator_dtype='int32'"):
        proma.accumulated_gradient(jnp.sum, accumulator_dtype="int32")
    with pytest.raises(ValueError, match=r"accumulation=True must be a proma_jax\.Accumulation"):
        proma.accumulated_gradient(jnp.sum, accumulation=True)
    with pytest.raises(ValueError, match=r"intra=Grad.* must be a proma_jax\.Intra, such as"):
        proma.accumulated_gradient(jnp.sum, intra=proma.project_intra(rank=2))
    with pytest.raises(ValueError, match="logprob_fn=1 must be a function"):
        proma.accumulated_gradient(1)
    with pytest.raises(ValueError, match=r"ridge=-1"):
        proma.Accumulation(ridge=-1)
    with pytest.raises(ValueError, match="rank=0"):
        proma.Intra(rank=0)
    gradient_fn = proma.accumulated_gradient(lambda w, x: jnp.sum(x @ w))
    with pytest.raises(ValueError, match="params is int32"):
        gradient_fn(jnp.ones((3, 2), jnp.int32), jnp.ones((2, 2, 5, 3)), jnp.ones((2, 2)), 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_parameters_are_harmless(variant):
    accumulation, intra = VARIANTS[variant]
    gradient_fn = proma.accumulated_gradient(
        lambda params, x: jnp.sum(x), accumulation=accumulation, intra=intra
    )
    grads, metrics = gradient_fn({}, jnp.ones((2, 3, 4)), jnp.ones((2, 3)), 0)
    assert grads == {}
    assert metrics.accumulation_fraction.tolist() == metrics.intra_fraction.tolist() == [0, 0]
