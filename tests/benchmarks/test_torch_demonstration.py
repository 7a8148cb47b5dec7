"""The demonstration's algorithm in PyTorch does what the library does; needs PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import proma_jax as proma
from benchmarks import cases, decoder

torch = pytest.importorskip("torch")
from benchmarks import torch_decoder, torch_demonstration  # noqa: E402

pytestmark = pytest.mark.any_version

CASE = dataclasses.replace(cases.SIZES["micro"], microbatches=3)
KERNELS = decoder.kernel_shapes(CASE.config)


@pytest.fixture(scope="module")
def setting():
    """The same parameters and batch in JAX and in PyTorch."""
    params, batch = cases.inputs(CASE, seed=0)
    model = torch_decoder.Decoder(CASE.config, "cpu")
    with torch.no_grad():
        model.embedding.weight.copy_(torch.tensor(np.asarray(params["embedding"])))
        for number, layer in enumerate(params["layers"]):
            for name in KERNELS:
                weight = torch.tensor(np.asarray(layer[name]).T)
                model.linears[f"{number}.{name}"].weight.copy_(weight)
    tokens = torch.tensor(np.asarray(batch.tokens), dtype=torch.int64)
    coefficients = torch.tensor(np.asarray(batch.coefficients))
    return params, batch, model, torch_demonstration.Batch(tokens, coefficients)


def assert_same_kernels(gradients, expected):
    for number, layer in enumerate(expected["layers"]):
        for name in KERNELS:
            want = np.asarray(layer[name]).T
            found = gradients[f"layers.{number}.{name}.weight"].numpy()
            assert np.linalg.norm(found - want) <= 1e-4 * np.linalg.norm(want), (number, name)


def test_log_probabilities_agree(setting):
    params, batch, model, torch_batch = setting
    expected = CASE.token_logprobs(params, batch.tokens[0])
    found = model(torch_batch.tokens[0]).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_plain_gradients_agree(setting):
    params, batch, model, torch_batch = setting

    def loss(params):
        logprobs = jnp.sum(CASE.token_logprobs(params, batch.tokens), axis=-1)
        return jnp.sum(batch.coefficients * logprobs)

    gradients = torch_demonstration.plain(model, torch_batch)
    expected = jax.jit(jax.grad(loss))(params)
    assert_same_kernels(gradients, expected)
    embedding = gradients["embedding.weight"].numpy()
    np.testing.assert_allclose(embedding, expected["embedding"], atol=1e-5)


def test_accumulation_by_hooks_is_that_of_the_library(setting):
    params, batch, model, torch_batch = setting
    tx = proma.accumulate(optax.identity(), CASE.microbatches, solver="ridge")

    @jax.jit
    def update(state, tokens, coefficients):
        _, scores = proma.sequence_scores(CASE.logprob)(params, tokens)
        grads = proma.weighted_sum(scores, coefficients)
        return tx.update(grads, state, params, scores=scores)

    state = tx.init(params)
    for tokens, coefficients in zip(batch.tokens, batch.coefficients, strict=True):
        expected, state = update(state, tokens, coefficients)
    found = torch_demonstration.demonstration(model, torch_batch, torch_demonstration.accumulated)
    assert_same_kernels(found, expected)


def test_intra_by_hooks_removes_the_dominant_subspaces():
    """Three strong directions far above the rest, over tokens of two sequences."""
    rng = np.random.default_rng(0)

    def rows(size):
        strong = rng.normal(size=(24, 3)) @ rng.normal(size=(3, size))
        return strong + 1e-3 * rng.normal(size=(24, size))

    def removal(matrix):
        _, _, vectors = np.linalg.svd(matrix)
        return vectors[:3].T @ vectors[:3]

    x, d, total = rows(10), rows(7), rng.normal(size=(7, 10))
    coefficients = np.array([2.0, -1.0])
    gradient = (d * np.repeat(coefficients, 12)[:, None]).T @ x
    expected = total + gradient - removal(d) @ gradient @ removal(x)
    arguments = (total, x.reshape(2, 12, -1), d.reshape(2, 12, -1), coefficients)
    found = torch_demonstration.intra(3)(*(torch.tensor(a, dtype=torch.float32) for a in arguments))
    assert np.linalg.norm(found.numpy() - expected) < 1e-3 * np.linalg.norm(expected)
