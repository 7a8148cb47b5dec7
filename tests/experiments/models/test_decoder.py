"""The decoder against a float64 NumPy forward, and its cache against its full forward."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models.decoder import Decoder, DecoderConfig, empty_cache

CONFIGS = [
    DecoderConfig(11, width=16, layers=2, heads=4, kv_heads=2, head_dim=6, hidden=24),
    DecoderConfig(7, width=12, layers=1, heads=2, kv_heads=2, head_dim=4, tied_head=False),
    DecoderConfig(13, width=8, layers=1, heads=3, kv_heads=1, head_dim=8, rope_theta=100.0),
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


def numpy_logits(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Logits of one unpadded sequence, head by head and token by token, in float64."""
    config = decoder.config

    weights = jax.tree.map(
        lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(decoder))
    )

    def norm(x, scale):
        mean_square = sum(feature * feature for feature in x) / len(x)
        return x / np.sqrt(mean_square + config.norm_epsilon) * scale["scale"]

    def rotate(head, position):
        half = config.head_dim // 2
        turned = np.zeros_like(head)
        for i in range(half):
            pair = complex(head[i], head[i + half])
            pair *= np.exp(1j * position * config.rope_theta ** (-2 * i / config.head_dim))
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

            def heads(projection, h=h, attention=attention):
                return (h @ attention[projection]["kernel"]).reshape(-1, config.head_dim)

            queries.append([rotate(norm(q, attention["q_norm"]), t) for q in heads("q_proj")])
            keys.append([rotate(norm(k, attention["k_norm"]), t) for k in heads("k_proj")])
            values.append(heads("v_proj"))
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
    chex.assert_trees_all_close(decoder(tokens, valid), expected, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_cache_gives_the_logits_of_the_full_forward(config):
    decoder = make(config)
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, config.vocab_size)
    valid = jnp.arange(8) >= jnp.array([0, 2])[:, None]
    expected = forward(decoder, tokens, valid)

    cache = empty_cache(config, batch=2, slots=10)
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"heads": 3, "kv_heads": 2}, "heads=3"), ({"head_dim": 5}, "head_dim=5")],
)
def test_impossible_shapes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**settings)
