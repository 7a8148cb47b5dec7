"""Learners with PROMA against Tunix alone, and against a loop of our own on the same rollouts."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import proma_jax as proma
from proma_jax.tunix import use_proma
from tests.tunix import models, tiny

LOSSES = {
    "on_policy": {},
    "token_mean": {"loss_agg_mode": "token-mean"},
    "kl_penalty": {"beta": 0.1},
    "two_iterations": {"num_iterations": 2},
    "gspo": {"loss_algo": "gspo-token"},
}
NO_PROJECTION = proma.Accumulation(shrinkage=0.0)


def trained(learner, **variant):
    """The learner after three optimizer steps, and the examples that it trained on."""
    examples = []
    update_actor = learner.rl_cluster.update_actor

    def recorded(train_ds, eval_ds, skip_jit):
        examples.extend(train_ds)
        update_actor(train_ds, eval_ds, skip_jit)

    learner.rl_cluster.update_actor = recorded
    if variant:
        use_proma(learner, **variant)
    learner.train(tiny.prompts())
    assert learner.rl_cluster.actor_trainer.train_steps >= 3
    return learner, examples


@pytest.mark.parametrize("loss", LOSSES)
def test_without_projection_three_steps_give_tunix_own_parameters(loss):
    start = tiny.parameters(tiny.learner())
    expected, _ = trained(tiny.learner(**LOSSES[loss]))
    found, _ = trained(tiny.learner(**LOSSES[loss]), accumulation=NO_PROJECTION)
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), start, tiny.parameters(expected))
    assert min(jax.tree.leaves(moved)) > 1e-3
    chex.assert_trees_all_close(tiny.parameters(found), tiny.parameters(expected), atol=2e-6)
    for name in ("loss", "pg_clipfrac", "kl", "grad_norm"):
        logged = [tiny.logged(learner, name) for learner in (found, expected)]
        chex.assert_trees_all_close(*logged, atol=1e-5)


ACCUMULATION = proma.Accumulation(relative_bound=0.5, skip_fraction=0.1)
VARIANTS = {
    "accumulation": {"accumulation": ACCUMULATION},
    "intra": {"intra": proma.Intra(rank=2)},
    "both": {"accumulation": ACCUMULATION, "intra": proma.Intra(rank=2)},
}


def own_loop(model, wrt, examples, k, tx):
    """The parameters after updates by our transformations, written out with a model's logits."""
    graphdef, params, rest = nnx.split(model, wrt, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)

    def logprob_fn(params, row):
        prompt, completion, mask = row
        tokens = jnp.concatenate([prompt, completion])
        real = tokens != 0
        positions = jnp.maximum(jnp.cumsum(real) - 1, 0)
        attention = jnp.tril(jnp.ones((len(tokens),) * 2, bool)) & real
        logits, _ = nnx.merge(graphdef, params, rest)(
            tokens[None], positions[None], None, attention[None]
        )
        logits = logits[0, len(prompt) - 1 : -1]
        return proma.policy_gradient.token_logprobs(logits, completion, mask > 0).sum()

    @jax.jit
    def step(params, state, example):
        rows = example.prompt_ids, example.completion_ids, example.completion_mask
        _, scores = proma.sequence_scores(logprob_fn)(params, rows)
        lengths = example.completion_mask.sum(axis=-1)
        coefficients = -example.advantages / lengths / len(lengths)
        grads = proma.weighted_sum(scores, coefficients)
        updates, state = tx.update(grads, state, params, scores=scores)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for example in examples:
        params, state = step(params, state, example)
    assert optax.tree.get(state, "gradient_step") == len(examples) // k
    return params


@pytest.mark.parametrize(
    ("family", "variant"), [*(("qwen3", name) for name in VARIANTS), ("qwen3_lora", "both")]
)
def test_with_projection_three_steps_are_those_of_our_own_loop(family, variant):
    make, wrt = models.FAMILIES[family], nnx.LoRAParam if "lora" in family else nnx.Param
    optimizer, k = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2)), 4
    training = {"train_micro_batch_size": 1, "actor_optimizer": optimizer}
    learner, examples = trained(tiny.learner(make(), training=training), **VARIANTS[variant])
    links = {
        "accumulation": lambda: proma.accumulate(optimizer, k, average=True, **vars(ACCUMULATION)),
        "intra": lambda: optax.MultiSteps(optimizer, k).gradient_transformation(),
    }
    tx = links["intra" if variant == "intra" else "accumulation"]()
    if variant != "accumulation":
        tx = optax.chain(proma.project_intra(rank=2), tx)
    expected = own_loop(make(), wrt, examples, k, tx)
    found = nnx.as_pure(nnx.state(learner.rl_cluster.actor_trainer.model, wrt))
    chex.assert_trees_all_close(found, expected, atol=1e-5)
    for name, is_on in [("accumulation", variant != "intra"), ("intra", variant != "accumulation")]:
        if is_on:
            fractions = tiny.logged(learner, f"proma/{name}_fraction")
            assert len(fractions) == 3
            assert all(0 < fraction < 1 for fraction in fractions)


def test_a_mesh_changes_nothing():
    def parameters(mesh_shape):
        model = models.tiny_qwen3(num_kv_heads=2)
        learner, _ = trained(tiny.learner(model, mesh_shape=mesh_shape), **VARIANTS["both"])
        return jax.device_get(tiny.parameters(learner))

    chex.assert_trees_all_close(parameters((2, 2)), parameters((1, 1)), atol=1e-5)
