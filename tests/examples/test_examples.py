"""The examples run, each by its own main function, at sizes that take seconds."""

import importlib
import json
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

pytestmark = pytest.mark.any_version
ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = sorted({path.stem for path in (ROOT / "examples").glob("*.py")} - {"own_task"})
MODEL = ROOT / "tests" / "experiments" / "models" / "data" / "qwen3"


def example(name):
    """Imported when it runs, since the other versions' environments lack what some need."""
    return importlib.import_module(f"examples.{name}")


def assert_learns(rewards, by):
    assert rewards[-1] > rewards[0] + by


def test_a_task_of_your_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example("own_task").main(MODEL, steps=2, learning_rate=1e-3)
    [metrics] = tmp_path.glob("runs/capitals/proma_accumulation/seed_0/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[2]["update_norm"] > 0
    assert rows[2]["rollout_letters"] > 0


@pytest.mark.parametrize("name", ["linen_train_state", "nnx_dropout", "equinox_model"])
def test_a_model_of_each_library_learns(name):
    assert_learns(example(name).main(steps=12), by=0.1)


def test_each_sequence_has_a_dropout_mask_of_its_own():
    dropout = example("nnx_dropout")
    model = dropout.Policy(nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0), 2)[jnp.array([0, 0, 1])]
    microbatch = {"tokens": jnp.ones((3, 9), int), "coefficients": jnp.ones(3), "key": keys}
    logprobs = dropout.train_step(model, dropout.make_optimizer(model), microbatch)
    assert logprobs[0] == logprobs[1]
    assert logprobs[0] != logprobs[2]


def test_lora_learns_and_leaves_the_model_as_it_was():
    lora = example("lora")
    rewards, model = lora.main(steps=20)
    assert_learns(rewards, by=0.1)
    frozen = nnx.Not(nnx.LoRAParam)
    start = lora.with_adapters(lora.Policy(nnx.Rngs(0)), nnx.Rngs(1))
    before, after = (nnx.to_pure_dict(nnx.state(m, frozen)) for m in (start, model))
    chex.assert_trees_all_equal(after, before)


def test_ppo_clip_learns():
    assert_learns(example("ppo_clip_with_proma").main(batches=6), by=0.1)


def test_the_fused_step_learns_and_removes_by_both_variants():
    rewards, metrics = example("fused_step").main(steps=8)
    assert_learns(rewards, by=0.1)
    assert 0 < metrics.accumulation_fraction[-1] < 1
    assert 0 < metrics.intra_fraction[-1] < 1


def test_eight_devices_learn_and_keep_copies_of_the_parameters():
    rewards, params = example("data_parallel").main(steps=12)
    assert_learns(rewards, by=0.1)
    for leaf in jax.tree.leaves(params):
        assert len(leaf.devices()) == 8
        assert leaf.is_fully_replicated


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path):
    module = example("checkpoint_and_resume")
    resumed, expected = module.main(tmp_path, interrupted_after=6, microbatches=8)
    chex.assert_trees_all_equal(resumed, expected)
    start = module.init_params(jax.random.key(0))
    assert all(jnp.any(resumed[name] != start[name]) for name in start)


def test_grpo_learns_and_says_how_far_each_step_moved_the_policy():
    rewards, divergences = zip(*example("grpo_with_proma").main(batches=4), strict=True)
    assert_learns(rewards, by=0.02)
    assert all(0 < kl < 1 for kl in divergences)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short_and_say_how_long_they_take(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= (120 if name == "grpo_with_proma" else 100)
    assert re.search(r"About [0-9]+ (seconds|minutes)", text.split('"""')[1])
