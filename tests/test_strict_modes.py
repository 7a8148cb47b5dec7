"""Strict modes of JAX pass, nothing is kept alive, and nothing is compiled twice."""

import gc
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import proma_jax as proma
from proma_jax import policy_gradient as pg
from tests.cases import normal

B, K, TOKENS, WIDTH, VOCABULARY = 3, 2, 5, 4, 7


def logprob_fn(params, sequence):
    hidden = params["table"][sequence["tokens"]]

    def layer(h, p):
        return jnp.tanh(h @ p["w"] + p["b"][None]), None

    hidden = jax.lax.scan(jax.checkpoint(layer), hidden, params["layers"])[0]
    logits = jnp.tanh(hidden @ params["w"]) @ params["head"]
    return jnp.sum(pg.token_logprobs(logits, sequence["tokens"], sequence["mask"]))


def parameters():
    return {
        "table": normal(0, VOCABULARY, WIDTH),
        "layers": {"w": normal(0, 2, WIDTH, WIDTH), "b": normal(0, 2, WIDTH)},
        "w": normal(1, WIDTH, WIDTH),
        "head": normal(0, WIDTH, VOCABULARY),
    }


def sequences(*shape):
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (*shape, TOKENS))
    mask = jnp.ones(tokens.shape, bool).at[..., 0, 3:].set(False)
    return {"tokens": jnp.asarray(tokens, jnp.int32), "mask": mask}


def updated(tx):
    """A function that takes two microbatches with a transformation, eagerly but for the scores."""
    scores_fn = proma.sequence_scores(logprob_fn)

    def run(params, batch):
        state = tx.init(params)
        for m in range(K):
            microbatch = jax.tree.map(operator.itemgetter(m), batch)
            _, scores = scores_fn(params, microbatch)
            grads = proma.weighted_sum(scores, jnp.array([0.5, -1.0, 0.25]))
            updates, state = tx.update(grads, state, params, scores=scores)
        return updates, state

    return run


def with_numbers(params, batch):
    """All of `policy_gradient`."""
    del params
    mask, length = batch["mask"][0], batch["mask"][0].sum(-1)
    logprobs, logits = normal(0, B, TOKENS) - 3, normal(0, B, TOKENS, VOCABULARY)
    other, others = normal(1, B, TOKENS) - 3, normal(1, B, TOKENS, VOCABULARY)
    advantages = pg.group_relative_advantages(jnp.array([[1, 0, 0]])).reshape(-1)
    coefficients = pg.token_mean_coefficients(advantages, mask.sum())
    return (
        pg.sequence_mean_coefficients(advantages, length, B),
        pg.group_relative_advantages(normal(0, 2, 3), scale_by_std=False),
        jax.value_and_grad(pg.reinforce_loss)(logprobs, coefficients, mask),
        jax.value_and_grad(pg.ppo_clip_loss)(logprobs, other, coefficients, mask),
        jax.value_and_grad(pg.cispo_loss)(logprobs, other, coefficients, mask),
        [kl(logprobs, other, mask) for kl in (pg.kl_k1, pg.kl_k2, pg.kl_k3)],
        jax.value_and_grad(pg.exact_kl)(logits, others, mask),
        jax.value_and_grad(pg.entropy)(logits, mask),
    )


INNER = optax.sgd(1e-3, momentum=0.9)  # optax.adam itself fails where types are strict
BOTH = optax.chain(proma.project_intra(2), proma.accumulate(INNER, K))
FUNCTIONS = {
    "sequence_scores": lambda: (
        lambda params, batch: proma.sequence_scores(logprob_fn)(
            params, jax.tree.map(lambda x: x[0], batch)
        )
    ),
    "describe_scores": lambda: (
        lambda params, batch: len(
            proma.describe_scores(logprob_fn, params, jax.tree.map(lambda x: x[0], batch))
        )
    ),
    "check_scores": lambda: (
        lambda params, batch: proma.check_scores(
            logprob_fn, params, jax.tree.map(lambda x: x[0], batch), rtol=1e-2
        )
    ),
    **{
        f"accumulate, {solver}": lambda solver=solver: updated(
            proma.accumulate(INNER, K, solver=solver, relative_bound=0.5)
        )
        for solver in ("ridge", "qr", "svd")
    },
    **{
        f"project_intra, {method}": lambda method=method: updated(
            proma.project_intra(2, orthonormalization=method)
        )
        for method in ("cholesky_qr", "qr", "svd")
    },
    "both, skipping": lambda: updated(
        optax.chain(
            proma.project_intra(2),
            proma.accumulate(
                optax.sgd(0.1),
                K,
                average=True,
                should_skip_update_fn=optax.skip_not_finite,
            ),
        )
    ),
    "accumulated_gradient": lambda: (
        lambda params, batch: proma.accumulated_gradient(
            logprob_fn,
            accumulation=proma.Accumulation(relative_bound=0.5),
            intra=proma.Intra(2),
        )(params, batch, normal(0, K, B), step=0)
    ),
    "check_restorable, has_updated": lambda: (
        lambda params, batch: (
            proma.check_restorable(BOTH.init(params), BOTH.init(params)),
            proma.has_updated(BOTH.init(params)),
        )
    ),
    "policy_gradient": lambda: with_numbers,
}
MODES = {
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "types": lambda: jax.numpy_dtype_promotion("strict"),
    "nans": lambda: jax.debug_nans(True),
}
ONLY_CONCRETE = {"describe_scores", "check_scores", "check_restorable, has_updated"}
LIKE_ANOTHER = {"accumulate, qr", "accumulate, svd", "project_intra, qr", "project_intra, svd"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_strict_modes_pass(name, mode):
    fn = FUNCTIONS[name]()
    params, batch = parameters(), sequences(K, B)
    with MODES[mode]():
        jax.block_until_ready(fn(params, batch))
        if name not in ONLY_CONCRETE:
            jax.block_until_ready(jax.jit(fn)(params, batch))


@pytest.mark.any_version
@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - ONLY_CONCRETE - LIKE_ANOTHER))
def test_nothing_leaks_from_a_trace(name):
    """Traced only: while JAX looks for leaks it keeps nothing that it has traced or compiled."""
    with jax.checking_leaks():
        jax.jit(FUNCTIONS[name]()).lower(parameters(), sequences(K, B))


COMPILED = []


def note_compilation(event, *args, **kwargs):
    if event.endswith("backend_compile_duration"):
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(note_compilation)


def calls_of(name):
    """A function without arguments to be called several times, as a program would."""
    params, batch = parameters(), sequences(K, B)
    microbatch = jax.tree.map(lambda x: x[0], batch)
    scores_fn = proma.sequence_scores(logprob_fn)
    gradient_fn = proma.accumulated_gradient(
        logprob_fn, accumulation=proma.Accumulation(), intra=proma.Intra(2)
    )
    coefficients, weights = normal(0, K, B), normal(0, B)
    _, scores = scores_fn(params, microbatch)
    grads = proma.weighted_sum(scores, weights)

    def transformed(tx):
        state = tx.init(params)
        return lambda: tx.update(grads, state, params, scores=scores)

    return {
        "sequence_scores": lambda: scores_fn(params, microbatch),
        "weighted_sum": lambda: proma.weighted_sum(scores, weights),
        "accumulated_gradient": lambda: gradient_fn(params, batch, coefficients, step=0),
        "accumulate": transformed(proma.accumulate(INNER, K)),
        "project_intra": transformed(proma.project_intra(2)),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["sequence_scores", "weighted_sum", "accumulated_gradient", "accumulate", "project_intra"],
)
def test_eager_calls_compile_once(name):
    COMPILED.clear()
    call = calls_of(name)
    call()
    assert COMPILED
    COMPILED.clear()
    call()
    call()
    assert not COMPILED


def test_a_restored_start_compiles_its_update_once():
    """Restored parameters are committed to a device, as those of `jax.device_put` are."""
    params = jax.device_put(parameters(), jax.devices()[0])
    state = BOTH.init(params)
    assert all(leaf.committed for leaf in jax.tree.leaves(state))
    _, scores = proma.sequence_scores(logprob_fn)(params, sequences(B))
    grads = proma.weighted_sum(scores, normal(0, B))
    update = jax.jit(BOTH.update)
    COMPILED.clear()
    for _ in range(3):
        _, state = update(grads, state, params, scores=scores)
    assert len(COMPILED) == 1


@pytest.mark.parametrize("name", ["accumulated_gradient", "sequence_scores", "accumulate"])
def test_nothing_is_kept_alive(name):
    scores_fn = proma.sequence_scores(lambda w, x: jnp.sum(jnp.tanh(x @ w)))
    gradient_fn = proma.accumulated_gradient(
        lambda w, x: jnp.sum(jnp.tanh(x @ w)), accumulation=proma.Accumulation()
    )
    tx = proma.accumulate(optax.sgd(0.1), 2)
    x = normal(0, K, B, TOKENS, 64)

    def once(i):
        w = jnp.full((64, 64), 0.1 * i)
        if name == "accumulated_gradient":
            return gradient_fn(w, x, jnp.ones((K, B)), step=0)
        _, scores = scores_fn(w, x[0])
        grads = proma.weighted_sum(scores, jnp.ones(B))
        return tx.update(grads, tx.init(w), w, scores=scores)

    def alive():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    jax.block_until_ready(once(0))
    before = alive()
    for i in range(1, 4):
        jax.block_until_ready(once(i))
    assert alive() - before < 64 * 64 * 4
