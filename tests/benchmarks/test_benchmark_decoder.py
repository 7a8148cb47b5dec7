"""The benchmarks' decoder against the experiments', and in all its layouts."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import decoder
from experiments.models.decoder import Decoder
from experiments.models.decoder import DecoderConfig as ReferenceConfig

CONFIG = decoder.DecoderConfig(
    vocab=23, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=24
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, CONFIG.vocab)
init = jax.jit(decoder.init, static_argnums=0)
token_logprobs = jax.jit(decoder.token_logprobs, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    """With norms that are not all 1."""
    start = init(CONFIG, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), start
    )


def in_layout(params, config):
    return params | {"layers": decoder.stack(params["layers"])} if config.scanned else params


def test_agrees_with_the_experiments_decoder(params):
    shape = dataclasses.asdict(CONFIG)
    for name in ("scanned", "remat", "dtype", "tied", "logits_at_a_time"):
        del shape[name]
    config = ReferenceConfig(vocab_size=shape.pop("vocab"), rope_theta=1e6, **shape)
    reference = Decoder(config, rngs=nnx.Rngs(0))
    reference.embed.embedding[...] = params["embedding"]
    reference.norm.scale[...] = params["norm"]
    for block, layer in zip(reference.blocks, params["layers"], strict=True):
        block.attention_norm.scale[...] = layer["attention_norm"]
        block.mlp_norm.scale[...] = layer["mlp_norm"]
        block.attention.q_norm.scale[...] = layer["query_norm"]
        block.attention.k_norm.scale[...] = layer["key_norm"]
        attention, mlp = block.attention, block.mlp
        for name, linear in {
            "query": attention.q_proj,
            "key": attention.k_proj,
            "value": attention.v_proj,
            "output": attention.o_proj,
            "gate": mlp.gate_proj,
            "up": mlp.up_proj,
            "down": mlp.down_proj,
        }.items():
            linear.kernel[...] = layer[name]
    logits = nnx.jit(lambda model: model(TOKENS))(reference)
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    expected = jnp.take_along_axis(logprobs, TOKENS[:, 1:, None], axis=-1)[..., 0]
    found = token_logprobs(CONFIG, params, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    logprob = jax.jit(decoder.logprob, static_argnums=0)(CONFIG, params, TOKENS[0])
    np.testing.assert_allclose(logprob, expected[0].sum(), rtol=1e-5)


def test_later_tokens_do_not_move_earlier_ones(params):
    changed = TOKENS[0].at[6:].add(1) % CONFIG.vocab
    before = token_logprobs(CONFIG, params, TOKENS[0])
    after = token_logprobs(CONFIG, params, changed)
    np.testing.assert_allclose(before[:5], after[:5], rtol=1e-6)
    assert np.all(before[5:] != after[5:])


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scanned", [False, True])
def test_layouts_have_equal_gradients(params, scanned, remat):
    def gradient(config, params):
        return jax.jit(jax.grad(lambda p: decoder.logprob(config, p, TOKENS[0])))(params)

    config = dataclasses.replace(CONFIG, scanned=scanned, remat=remat)
    found = gradient(config, in_layout(params, config))
    expected = in_layout(gradient(CONFIG, params), config)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_some_tokens_at_a_time_are_those_of_all(tied):
    config = dataclasses.replace(CONFIG, tied=tied)
    params = init(config, jax.random.key(0))

    def gradient(config):
        return jax.jit(jax.value_and_grad(lambda p: decoder.logprob(config, p, TOKENS[0])))(params)

    found = gradient(dataclasses.replace(config, logits_at_a_time=3))
    chex.assert_trees_all_close(found, gradient(config), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scanned", [False, True])
def test_init_is_in_the_layout_and_dtype(scanned):
    config = dataclasses.replace(CONFIG, scanned=scanned, dtype="bfloat16")
    params = init(config, jax.random.key(0))
    chex.assert_trees_all_equal_dtypes(params, jax.tree.map(lambda p: p.astype("bfloat16"), params))
    shapes = decoder.kernel_shapes(config)
    for name, shape in shapes.items():
        kernels = params["layers"][name] if scanned else params["layers"][0][name][None]
        assert kernels.shape[1:] == shape
        np.testing.assert_allclose(kernels.astype("float32").std(), shape[0] ** -0.5, rtol=0.2)
    logprobs = token_logprobs(config, params, TOKENS)
    assert logprobs.dtype == jnp.float32
    assert bool(jnp.all(logprobs < 0))


def test_flops_are_those_that_xla_counts():
    """XLA also counts what is no matmul, a few per cent of a decoder that is not too narrow."""
    config = decoder.DecoderConfig(
        vocab=256, width=64, layers=1, heads=2, kv_heads=1, head_dim=32, hidden=192
    )
    params = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((64,), jnp.int32)
    gradient = jax.jit(jax.grad(lambda p, t: decoder.logprob(config, p, t)))
    counted = gradient.lower(params, tokens).cost_analysis()["flops"]
    assert 1 <= counted / decoder.gradient_flops(config, 64) < 1.1


@pytest.mark.parametrize("change", [{"kv_heads": 3}, {"head_dim": 7}])
def test_impossible_shapes_are_errors(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        dataclasses.replace(CONFIG, **change)
