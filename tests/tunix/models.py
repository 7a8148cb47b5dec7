"""Tiny models of Tunix's families, with random weights."""

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

VOCABULARY = 32
SIZES = {"num_layers": 1, "embed_dim": 16, "hidden_dim": 24, "head_dim": 8, "num_heads": 2}
QWEN = {"vocab_size": VOCABULARY, "num_kv_heads": 1, "rope_theta": 10_000, "norm_eps": 1e-6}


def randomized(model):
    """Adds noise to the weights, since Tunix's models start with kernels that are zero."""
    state = nnx.state(model, nnx.Param)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noisy = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    nnx.update(model, jax.tree.unflatten(structure, noisy))
    return model


def tiny_qwen3(**changes):
    config = qwen3.ModelConfig(**SIZES | QWEN | changes)
    return randomized(qwen3.Qwen3(config, rngs=nnx.Rngs(0)))


def tiny_qwen2():
    return randomized(qwen2.Qwen2(qwen2.ModelConfig(**SIZES, **QWEN), rngs=nnx.Rngs(0)))


def tiny_llama3():
    return randomized(llama3.Llama3(llama3.ModelConfig(**SIZES, **QWEN), rngs=nnx.Rngs(0)))


def tiny_gemma2():
    config = gemma.ModelConfig(
        **SIZES,
        num_embed=VOCABULARY,
        num_kv_heads=1,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=[gemma.AttentionType.LOCAL_SLIDING],
        attn_logits_soft_cap=50.0,
        sliding_window_size=4,
    )
    return randomized(gemma.Gemma(config, rngs=nnx.Rngs(0)))


def tiny_gemma3():
    config = gemma3.ModelConfig(
        **SIZES,
        num_embed=VOCABULARY,
        num_kv_heads=1,
        sliding_window_size=4,
        param_dtype=jnp.float32,
    )
    return randomized(gemma3.Gemma3(config, rngs=nnx.Rngs(0)))


def with_lora(model):
    provider = qwix.LoraProvider(module_path=".*q_proj|.*gate_proj|.*down_proj", rank=2, alpha=2.0)
    return randomized(qwix.apply_lora_to_model(model, provider, **model.get_model_input()))


FAMILIES = {
    "qwen3": tiny_qwen3,
    "qwen3_tied_remat": lambda: tiny_qwen3(
        use_tied_embedding=True, remat_config=qwen3.RematConfig.DECODER
    ),
    "qwen3_lora": lambda: with_lora(tiny_qwen3()),
    "qwen2": tiny_qwen2,
    "llama3": tiny_llama3,
    "gemma2": tiny_gemma2,
    "gemma3": tiny_gemma3,
}
