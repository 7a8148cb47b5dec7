"""Saves a run in the middle of an accumulation, and goes on. About 15 seconds on 2 CPU cores.

    python examples/checkpoint_and_resume.py        # needs orbax-checkpoint

The state of `accumulate` is a pytree of arrays, the accumulated gradient among them, so any
checkpointing library saves it. The run goes on bit for bit. `check_restorable` says in one sentence
what is wrong with a checkpoint of another model, optimizer or version.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import proma_jax as proma
from proma_jax import policy_gradient as pg

VOCABULARY, TOKENS, WIDTH, BATCH, MICROBATCHES = 16, 8, 32, 16, 4


def init_params(key):
    """An embedding and a head."""
    keys = jax.random.split(key)
    embed = jax.random.normal(keys[0], (VOCABULARY, WIDTH))
    return {"embed": embed, "head": jax.random.normal(keys[1], (WIDTH, VOCABULARY))}


def logits_fn(params, tokens):
    """Tokens (..., T) to the logits (..., T, vocabulary) of their next tokens."""
    return jnp.tanh(params["embed"][tokens]) @ params["head"]


def logprob_fn(params, tokens):
    """The log-probability of one sequence."""
    mask = jnp.ones(len(tokens) - 1, bool)
    return pg.token_logprobs(logits_fn(params, tokens[:-1]), tokens[1:], mask).sum()


inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
tx = proma.accumulate(inner, MICROBATCHES)


@jax.jit
def train_step(state):
    """One microbatch, sampled and rewarded; every fourth moves the parameters."""
    params, opt_state, key = state["params"], state["opt_state"], state["key"]
    key, sample_key = jax.random.split(key)
    tokens = jax.random.randint(sample_key, (BATCH, TOKENS + 1), 0, VOCABULARY)
    rewards = jnp.mean(tokens[:, 1:] == tokens[:, :-1], axis=1)
    coefficients = pg.token_mean_coefficients(rewards - rewards.mean(), BATCH * TOKENS)

    _, scores = proma.sequence_scores(logprob_fn)(params, tokens)
    grads = proma.weighted_sum(scores, coefficients)
    updates, opt_state = tx.update(grads, opt_state, params, scores=scores)
    return {"params": optax.apply_updates(params, updates), "opt_state": opt_state, "key": key}


def train(directory, until):
    """Trains until so many microbatches are done, from the latest checkpoint if there is one."""
    params = init_params(jax.random.key(0))
    state = {"params": params, "opt_state": tx.init(params), "key": jax.random.key(1)}
    done = 0
    handler = ocp.StandardCheckpointHandler()  # or a new process cannot read item_metadata
    with ocp.CheckpointManager(directory, item_handlers=handler) as manager:
        if manager.latest_step() is not None:
            done = manager.latest_step()
            proma.check_restorable(manager.item_metadata(done).tree, state)
            state = manager.restore(done, args=ocp.args.StandardRestore(state))
        print(f"from microbatch {done}, {state['opt_state'].mini_step} of them not yet emitted")
        for _ in range(done, until):
            state = train_step(state)
        manager.save(until, args=ocp.args.StandardSave(state))
    return state


def main(directory, interrupted_after=6, microbatches=40):
    """Trains with an interruption and without, and returns both final parameters."""
    interrupted, whole = directory / "interrupted", directory / "whole"
    train(interrupted, interrupted_after)
    resumed = train(interrupted, microbatches)["params"]
    expected = train(whole, microbatches)["params"]
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), resumed, expected)
    print(f"equal bit for bit: {same}")
    return resumed, expected


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(pathlib.Path(directory))
