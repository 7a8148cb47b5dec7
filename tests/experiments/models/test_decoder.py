"""The decoder against a float64 NumPy forward, its cache against its full forward, all layouts."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import proma_jax as proma
from experiments.models.config import Llama3Rope
from experiments.models.decoder import Decoder, DecoderConfig, empty_cache
from proma_jax import policy_gradient as pg

CONFIGS = [
    DecoderConfig(11, width=16, layers=2, heads=4, kv_heads=2, head_dim=6, hidden=24),
    DecoderConfig(7, width=12, layers=1, heads=2, kv_heads=2, head_dim=4, tied_head=False),
    DecoderConfig(13, width=8, layers=1, heads=3, kv_heads=1, head_dim=8, rope_theta=100.0),
    DecoderConfig(11, width=16, layers=1, heads=2, head_dim=4, qk_norm=False, qkv_bias=True),
    DecoderConfig(
        11,
        width=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=16,
        qk_norm=False,
        rope_theta=100.0,
        rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 50),
    ),
]

forward = nnx.jit(lambda decoder, *inputs: decoder(*inputs))
extend = nnx.jit(lambda decoder, *inputs: decoder.extend(*inputs))


def make(config: DecoderConfig) -> Decoder:
    """A decoder whose every parameter, norms included, is random."""
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))


def in_layout(decoder: Decoder, **layout: bool) -> Decoder:
    """A decoder with the parameters of an unrolled one."""
    config = dataclasses.replace(decoder.config, **layout)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    params = nnx.to_pure_dict(nnx.state(decoder))
    if config.scan_layers:
        params["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *params["blocks"].values())
    return nnx.merge(graphdef, nnx.State(params))


def numpy_frequencies(config: DecoderConfig) -> np.ndarray:
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    scaled = []
    for frequency in frequencies:
        fits = scaling.original_max_position_embeddings / (2 * np.pi / frequency)
        if fits < scaling.low_freq_factor:
            scaled.append(frequency / scaling.factor)
        elif fits > scaling.high_freq_factor:
            scaled.append(frequency)
        else:
            share = fits - scaling.low_freq_factor
            share /= scaling.high_freq_factor - scaling.low_freq_factor
            scaled.append((1 - share) * frequency / scaling.factor + share * frequency)
    return np.array(scaled)


def numpy_logits(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Logits of one unpadded sequence, head by head and token by token, in float64."""
    config = decoder.config

    weights = jax.tree.map(
        lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(decoder))
    )

    frequencies = numpy_frequencies(config)

    def norm(x, scale):
        mean_square = sum(feature * feature for feature in x) / len(x)
        return x / np.sqrt(mean_square + config.norm_epsilon) * scale["scale"]

    def rotate(head, position):
        half = config.head_dim // 2
        turned = np.zeros_like(head)
        for i in range(half):
            pair = complex(head[i], head[i + half])
            pair *= np.exp(1j * position * frequencies[i])
            turned[i], turned[i + half] = pair.real, pair.imag
        return turned

    def softmax(x):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    stream = list(weights["embed"]["embedding"][tokens])
    for block in weights["blocks"].values():
        attention, mlp = block["attention"], block["mlp"]
        queries, keys, values = [], [], []
        for t, x in enumerate(stream):
            h = norm(x, block["attention_norm"])

            def heads(name, h=h, attention=attention):
                projected = h @ attention[f"{name}_proj"]["kernel"]
                projected += attention[f"{name}_proj"].get("bias", 0)
                split = projected.reshape(-1, config.head_dim)
                scale = attention.get(f"{name}_norm")
                return [norm(head, scale) for head in split] if scale else split

            queries.append([rotate(q, t) for q in heads("q")])
            keys.append([rotate(k, t) for k in heads("k")])
            values.append(heads("v"))
        for t in range(len(stream)):
            attended = []
            for head in range(config.heads):
                shared = head * config.kv_heads // config.heads
                affinity = np.array([queries[t][head] @ keys[s][shared] for s in range(t + 1)])
                probabilities = softmax(affinity / np.sqrt(config.head_dim))
                attended.append(sum(w * values[s][shared] for s, w in enumerate(probabilities)))
            stream[t] = stream[t] + np.concatenate(attended) @ attention["o_proj"]["kernel"]
        for t, x in enumerate(stream):
            h = norm(x, block["mlp_norm"])
            gate = h @ mlp["gate_proj"]["kernel"]
            gated = gate / (1 + np.exp(-gate)) * (h @ mlp["up_proj"]["kernel"])
            stream[t] = x + gated @ mlp["down_proj"]["kernel"]
    head = weights["embed"]["embedding"].T if config.tied_head else weights["head"]["kernel"]
    return np.stack([norm(x, weights["norm"]) @ head for x in stream])


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_equals_numpy(config):
    decoder = make(config)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=9)
    expected = numpy_logits(decoder, tokens)
    assert np.std(expected) > 0.1
    chex.assert_trees_all_close(
        np.asarray(forward(decoder, jnp.asarray(tokens))), expected, atol=1e-4
    )


def test_padding_changes_nothing():
    decoder = make(CONFIGS[0])
    tokens = jnp.arange(5)
    padded = jnp.concatenate([jnp.array([9, 9, 9]), tokens])
    logits = forward(decoder, padded, jnp.arange(8) >= 3)
    chex.assert_trees_all_close(logits[3:], forward(decoder, tokens), atol=1e-5)


def test_batch_equals_sequences():
    decoder = make(CONFIGS[0])
    tokens = jax.random.randint(jax.random.key(0), (3, 6), 0, 11)
    valid = jnp.arange(6) >= jnp.array([0, 2, 4])[:, None]
    expected = jnp.stack([forward(decoder, t, v) for t, v in zip(tokens, valid, strict=True)])
    chex.assert_trees_all_close(forward(decoder, tokens, valid), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "scan_layers"), [*((config, False) for config in CONFIGS[:3]), (CONFIGS[0], True)]
)
def test_cache_gives_the_logits_of_the_full_forward(config, scan_layers):
    unrolled = make(config)
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, config.vocab_size)
    valid = jnp.arange(8) >= jnp.array([0, 2])[:, None]
    expected = forward(unrolled, tokens, valid)

    decoder = in_layout(unrolled, scan_layers=scan_layers)
    cache = empty_cache(decoder.config, batch=2, slots=10)
    logits, cache = extend(decoder, tokens[:, :5], valid[:, :5], cache)
    steps = [logits]
    for t in range(5, 8):
        logits, cache = extend(decoder, tokens[:, t : t + 1], valid[:, t : t + 1], cache)
        steps.append(logits)
    assert cache.length == 8
    chex.assert_trees_all_close(
        jnp.where(valid[..., None], jnp.concatenate(steps, axis=1), 0),
        jnp.where(valid[..., None], expected, 0),
        atol=1e-5,
    )


def test_layouts_start_and_learn_alike():
    def start_and_gradient(**layout):
        config = dataclasses.replace(CONFIGS[0], **layout)
        graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))

        def loss(params):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(jnp.arange(9))))

        return nnx.to_pure_dict(params), nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))

    expected = start_and_gradient()
    chex.assert_trees_all_close(start_and_gradient(remat=True), expected, atol=1e-5)
    for tree in expected:
        tree["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *tree["blocks"].values())
    for remat in (False, True):
        found = start_and_gradient(scan_layers=True, remat=remat)
        chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_projection_has_factors(scan_layers):
    layout = {"layers": 1 + scan_layers, "scan_layers": scan_layers, "remat": scan_layers}
    config = dataclasses.replace(CONFIGS[0], qkv_bias=True, tied_head=False, **layout)
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))

    def logprob(params, tokens):
        decoder = nnx.merge(graphdef, params)
        hidden, mask = decoder.hidden(tokens)[:-1], jnp.ones(len(tokens) - 1, bool)
        head = decoder.head_kernel
        return pg.chunked_token_logprobs(hidden, head, tokens[1:], mask, chunk_size=4).sum()

    sequences = jnp.arange(18).reshape(2, 9) % 11
    table = proma.describe_scores(logprob, params, sequences).splitlines()
    kernels = [line for line in table if "kernel" in line]
    assert len(kernels) == 1 + 7
    assert all("LayerFactors" in line for line in kernels)
    assert any("LookupFactors" in line for line in table if "embedding" in line)
    proma.check_scores(logprob, params, sequences)


@pytest.mark.parametrize("tied_head", [False, True])
def test_hidden_states_and_head_give_the_logits(tied_head):
    decoder = make(dataclasses.replace(CONFIGS[0], tied_head=tied_head))
    tokens = jnp.arange(6)
    by_hand = nnx.jit(lambda decoder: decoder.hidden(tokens) @ decoder.head_kernel)
    chex.assert_trees_all_close(by_hand(decoder), forward(decoder, tokens), atol=1e-5)


def test_bfloat16_is_close_to_float32_throughout():
    wide = make(CONFIGS[0])
    decoder = in_layout(wide, scan_layers=True, dtype="bfloat16")
    nnx.update(decoder, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(decoder)))
    fresh = nnx.state(nnx.eval_shape(lambda: Decoder(decoder.config, rngs=nnx.Rngs(0))))
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.state(decoder), fresh)

    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 11)
    valid = jnp.ones((2, 8), bool)
    logits, cache = extend(decoder, tokens, valid, empty_cache(decoder.config, 2, 8))
    assert logits.dtype == cache.layers[0][0].dtype == jnp.bfloat16
    expected = forward(wide, tokens)
    for found in (logits, forward(decoder, tokens)):
        error = np.asarray(found, np.float32) - expected
        assert 0 < np.std(error) < 0.02 * np.std(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"heads": 3, "kv_heads": 2}, "heads=3"), ({"head_dim": 5}, "head_dim=5")],
)
def test_impossible_shapes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**settings)


def test_impossible_wavelengths_are_refused():
    with pytest.raises(ValueError, match=r"high_freq_factor=1.0 must be greater than"):
        Llama3Rope(8.0, 1.0, 1.0, 50)
