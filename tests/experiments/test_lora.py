"""Low-rank adapters: they alone are trained, by every path, and end up in the saved weights."""

import dataclasses
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import proma_jax as proma
from experiments import configs, methods, sampling, starts, train, training, validation
from experiments.models import huggingface, lora
from experiments.models.decoder import Decoder, DecoderConfig
from experiments.models.settings import ModelConfig
from experiments.tasks.settings import TaskConfig
from tests.experiments.test_pretrained import Vowels, rows_of

FOLDER = pathlib.Path(__file__).parent / "models" / "data" / "qwen3"
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def decoder(**settings):
    """A decoder without adapters, the same whatever the settings."""
    config = DecoderConfig(
        vocab_size=11, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, hidden=24, **settings
    )
    return nnx.split(Decoder(config, rngs=nnx.Rngs(0)))


def moved(params):
    """Parameters whose adapters add something."""
    adapters, frozen = lora.split(params)
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(adapters)))
    keys = jax.tree.unflatten(jax.tree.structure(adapters), list(keys))
    noisy = jax.tree.map(lambda x, k: x + 0.1 * jax.random.normal(k, x.shape), adapters, keys)
    return nnx.merge_state(noisy, frozen)


@functools.partial(jax.jit, static_argnames="graphdef")
def logits_of(graphdef, params):
    return nnx.merge(graphdef, params)(TOKENS).astype(jnp.float32)


@pytest.mark.parametrize(
    "settings", [{}, {"scan_layers": True, "remat": True, "dtype": "bfloat16"}], ids=["f32", "bf16"]
)
def test_adapters_begin_as_nothing_and_end_in_the_weights(settings):
    plain = decoder(**settings)
    graphdef, params = lora.add(*plain, rank=2, alpha=16.0)
    np.testing.assert_array_equal(logits_of(graphdef, params), logits_of(*plain))
    adapters, frozen = lora.split(params)
    chex.assert_trees_all_equal(frozen, plain[1])
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    assert sum(x.size for x in jax.tree.leaves(adapters)) == 2 * 2 * (
        (16 + 16) + 2 * (16 + 8) + (16 + 16) + 3 * (16 + 24)
    )
    changed = moved(params)
    expected = logits_of(graphdef, changed)
    assert np.abs(expected - logits_of(*plain)).max() > 0.1
    merged = lora.merge(graphdef, changed)
    assert merged[0] == plain[0]
    atol = 0.2 if settings else 1e-5
    np.testing.assert_allclose(logits_of(*merged), expected, atol=atol)
    chex.assert_trees_all_equal(lora.split(changed)[1], plain[1])


POLICY = ModelConfig(FOLDER, prompt_tokens=16, response_tokens=6, lora=2)


@functools.cache
def policy_and_minibatch():
    """A policy whose adapters add something, and two microbatches of its responses."""
    policy, params = starts.pretrained(POLICY)
    params = moved(params)
    rollouts = sampling.respond(policy, params, ["a", "bc", "d e", "f"], jax.random.key(0))
    minibatch = methods.Microbatch(rollouts, jnp.array([1.0, -1.0, 0.5, -0.5]))
    return policy, params, jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), minibatch)


def test_scores_of_adapters_are_exact():
    policy, params, minibatch = policy_and_minibatch()
    adapters, frozen = lora.split(params)

    def logprob(adapters, rollout):
        whole = nnx.merge_state(adapters, frozen)
        return jnp.sum(sampling.response_logprobs(policy, whole, rollout))

    errors = proma.check_scores(logprob, adapters, jax.tree.map(lambda x: x[0], minibatch.rollouts))
    assert len(errors) == len(jax.tree.leaves(adapters)) == 14


def test_the_fused_form_takes_the_same_step():
    policy, params, minibatch = policy_and_minibatch()
    adapters, frozen = lora.split(params)
    after = []
    for fused in (False, True):
        settings = methods.MethodConfig(fused=fused, skip_fraction=0.0, learning_rate=1e-2)
        method = methods.make_method("proma_both", settings, policy, 2)
        found, _, about = training.update(
            method.step, adapters, method.init(adapters), minibatch, frozen
        )
        assert about["accumulation_fraction"] > 0
        after.append((found, about["update_norm"]))
    chex.assert_trees_all_close(*after, atol=1e-4)


def test_a_run_trains_adapters_alone_and_its_model_is_saved(tmp_path):
    command = train.Command(
        method="proma_accumulation",
        directory=tmp_path / "runs",
        save_model=tmp_path / "model",
        task=TaskConfig("tests.experiments.test_pretrained:Vowels"),
        model=dataclasses.replace(POLICY, prompt_tokens=64),
        training=configs.TrainingConfig(
            steps=2,
            prompts=4,
            group_size=2,
            microbatch_size=2,
            method=methods.MethodConfig(learning_rate=0.1, skip_fraction=0.0),
        ),
    )
    train.main(command)
    rows = rows_of(command)
    assert rows[-1]["start_kl"] > 0
    [checkpoint] = tmp_path.glob("runs/*/*/checkpoints/2/default")
    saved = ocp.StandardCheckpointer().metadata(checkpoint).item_metadata.tree["params"]
    adapters = lora.split(starts.pretrained(command.model)[1])[0]
    assert len(jax.tree.leaves(saved)) == len(jax.tree.leaves(adapters))
    before, after = (
        dict(nnx.to_flat_state(huggingface.load(folder)[1]))
        for folder in (FOLDER, tmp_path / "model")
    )
    changed = {path for path in before if np.any(before[path][...] != after[path][...])}
    assert changed == {path for path in before if path[-1] == "kernel"}
    merged = dataclasses.replace(command.model, model=tmp_path / "model", lora=None)
    found = validation.scores(*starts.pretrained(merged), Vowels())
    assert found == pytest.approx({name: rows[-1][name] for name in found})
