"""policy_gradient against float64 NumPy and hand-computed values."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proma_jax import policy_gradient as pg

pytestmark = pytest.mark.any_version

B, T, V = 4, 6, 9
MASKED_LOSSES = [
    lambda lp, other, c, mask: pg.reinforce_loss(lp, c, mask),
    pg.ppo_clip_loss,
    pg.cispo_loss,
    lambda lp, other, c, mask: pg.kl_k1(lp, other, mask),
    lambda lp, other, c, mask: pg.kl_k2(lp, other, mask),
    lambda lp, other, c, mask: pg.kl_k3(lp, other, mask),
]
LOSS_IDS = ["reinforce", "ppo_clip", "cispo", "kl_k1", "kl_k2", "kl_k3"]


@pytest.fixture(autouse=True)
def strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def batch():
    """Log-probabilities of two policies, coefficients and a mask with one empty sequence."""
    rng = np.random.default_rng(0)
    logprobs = -rng.exponential(1.0, (B, T))
    old = logprobs + rng.normal(0.0, 0.5, (B, T))
    coefficients = rng.normal(0.0, 1.0, B)
    mask = rng.random((B, T)) < 0.7
    mask[2] = False
    return logprobs, old, coefficients, mask


def f32(*arrays):
    return tuple(jnp.asarray(x, bool if x.dtype == bool else jnp.float32) for x in arrays)


def log_softmax64(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# Advantages.


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_advantages_match_float64(scale_by_std):
    rewards = np.random.default_rng(1).normal(3.0, 2.0, (5, 8))
    expected = rewards - rewards.mean(-1, keepdims=True)
    if scale_by_std:
        expected /= rewards.std(-1, ddof=1, keepdims=True) + 1e-6
    actual = pg.group_relative_advantages(jnp.float32(rewards), scale_by_std=scale_by_std)
    chex.assert_trees_all_close(actual, jnp.float32(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e19, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("scale_by_std", [True, False])
def test_advantages_of_rewards_of_any_size_match_float64(scale, scale_by_std):
    rewards = np.float32(scale * np.random.default_rng(1).normal(3.0, 2.0, (5, 8)))
    expected = rewards - np.float64(rewards).mean(-1, keepdims=True)
    if scale_by_std:
        expected /= np.float64(rewards).std(-1, ddof=1, keepdims=True) + 1e-6
    actual = pg.group_relative_advantages(jnp.asarray(rewards), scale_by_std=scale_by_std)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    largest = pg.group_relative_advantages(jnp.array([3e38, -3e38, 0.0]))
    np.testing.assert_allclose(largest, [1, -1, 0], atol=1e-6)


def test_advantages_by_hand():
    # Mean 1/4; sample variance (9 + 1 + 1 + 1) / 16 / 3 = 1/4, so the standard deviation is 1/2.
    actual = pg.group_relative_advantages(jnp.array([True, False, False, False]))
    chex.assert_trees_all_close(actual, jnp.array([1.5, -0.5, -0.5, -0.5]), rtol=1e-5)
    assert actual.dtype == jnp.float32


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1e6])
def test_equal_rewards_have_no_advantage_and_a_finite_gradient(reward):
    rewards = jnp.full((2, 7), reward)
    assert not jnp.any(pg.group_relative_advantages(rewards))
    chex.assert_tree_all_finite(jax.grad(lambda r: pg.group_relative_advantages(r)[0, 0])(rewards))


# Coefficients.


def test_token_mean_coefficients():
    actual = pg.token_mean_coefficients(jnp.array([2.0, -1.0, 0.0]), 16)
    chex.assert_trees_all_equal(actual, jnp.array([-0.125, 0.0625, 0.0]))
    assert not jnp.any(pg.token_mean_coefficients(jnp.ones(3), 0))


def test_sequence_mean_coefficients():
    actual = pg.sequence_mean_coefficients(jnp.array([2.0, -1.0, 5.0]), jnp.array([4, 2, 0]), 4)
    chex.assert_trees_all_equal(actual, jnp.array([-0.125, 0.125, 0.0]))


def test_sequence_mean_is_the_mean_of_token_means(batch):
    logprobs, _, advantages, mask = batch
    mask[2, 0] = True
    lengths = mask.sum(1)
    expected = -np.mean(advantages * (logprobs * mask).sum(1) / lengths)
    coefficients = pg.sequence_mean_coefficients(*f32(advantages, lengths), B)
    lp, m = f32(logprobs, mask)
    actual = pg.reinforce_loss(lp, coefficients, m)
    chex.assert_trees_all_close(actual, jnp.float32(expected), rtol=1e-5)


# Surrogate losses.


def test_losses_match_float64(batch):
    logprobs, old, c, mask = batch
    ratio = np.exp(logprobs - old)
    c_t = c[:, None]
    expected = [
        (c_t * logprobs)[mask].sum(),
        np.maximum(c_t * ratio, c_t * np.clip(ratio, 0.8, 1.2))[mask].sum(),
        (c_t * np.minimum(ratio, 1.5) * logprobs)[mask].sum(),
    ]
    lp, old32, c32, m = f32(logprobs, old, c, mask)
    actual = [
        pg.reinforce_loss(lp, c32, m),
        pg.ppo_clip_loss(lp, old32, c32, m),
        pg.cispo_loss(lp, old32, c32, m, max_ratio=1.5),
    ]
    chex.assert_trees_all_close(actual, [jnp.float32(x) for x in expected], rtol=1e-5)


def test_loss_gradients_match_the_textbook(batch):
    logprobs, old, c, mask = batch
    ratio, c_t = np.exp(logprobs - old), c[:, None]
    kept = np.where(c_t < 0, ratio <= 1.2, ratio >= 0.8)
    lp, old32, c32, m = f32(logprobs, old, c, mask)
    ppo = jax.grad(pg.ppo_clip_loss)(lp, old32, c32, m)
    chex.assert_trees_all_close(ppo, jnp.float32(c_t * ratio * kept * mask), rtol=1e-5, atol=1e-7)
    assert (~kept & mask).any()
    assert (kept & mask).any()
    cispo = jax.grad(pg.cispo_loss)(lp, old32, c32, m, max_ratio=1.5)
    expected = jnp.float32(c_t * np.minimum(ratio, 1.5) * mask)
    chex.assert_trees_all_close(cispo, expected, rtol=1e-5, atol=1e-7)


def test_ppo_clip_by_hand():
    # Ratios 1.5 and 0.5: encouraged 1.2 + 0.5, discouraged 1.5 + 0.8.
    old = jnp.log(jnp.array([[0.4, 0.4]]))
    new = jnp.log(jnp.array([[0.6, 0.2]]))
    mask = jnp.ones((1, 2), bool)
    chex.assert_trees_all_close(
        [pg.ppo_clip_loss(new, old, jnp.array([c]), mask) for c in (-1.0, 1.0)],
        [jnp.float32(-1.7), jnp.float32(2.3)],
        rtol=1e-6,
    )
    wide = pg.ppo_clip_loss(new, old, jnp.array([-1.0]), mask, clip_high=0.28)
    chex.assert_trees_all_close(wide, jnp.float32(-1.78), rtol=1e-6)


def test_on_policy_gradients_are_the_weighted_sum_of_scores():
    """All three losses: Σ c_i s_i, with the scores s_i by jax.grad of each log π(y_i)."""
    rng = np.random.default_rng(2)
    table = jnp.float32(rng.normal(size=(5, V)))
    contexts = jnp.asarray(rng.integers(0, 5, (B, T)))
    tokens = jnp.asarray(rng.integers(0, V, (B, T)))
    mask = jnp.asarray(rng.random((B, T)) < 0.7)
    advantages = jnp.float32(rng.normal(size=B))
    c = pg.token_mean_coefficients(advantages, mask.sum())

    def sequence_logprob(table, i):
        return jnp.sum(pg.token_logprobs(table[contexts[i]], tokens[i], mask[i]))

    scores = jnp.stack([jax.grad(sequence_logprob)(table, i) for i in range(B)])
    expected = jnp.einsum("i,i...->...", c, scores)
    old = pg.token_logprobs(table[contexts], tokens, mask)

    def mean_loss(table):
        logprobs = pg.token_logprobs(table[contexts], tokens, mask)
        return -jnp.sum(advantages * logprobs.sum(1)) / mask.sum(dtype=jnp.float32)

    chex.assert_trees_all_close(jax.grad(mean_loss)(table), expected, atol=1e-6)
    for loss in MASKED_LOSSES[:3]:
        gradient = jax.grad(
            lambda w, loss=loss: loss(pg.token_logprobs(w[contexts], tokens, mask), old, c, mask)
        )(table)
        chex.assert_trees_all_close(gradient, expected, atol=1e-6)


def test_ppo_gradient_is_finite_far_off_policy():
    old = jnp.array([[-200.0, -0.1]])
    new = jnp.array([[-0.1, -200.0]])
    for c in (-1.0, 0.0):
        value, gradient = jax.value_and_grad(pg.ppo_clip_loss)(
            new, old, jnp.array([c]), jnp.ones((1, 2), bool)
        )
        chex.assert_tree_all_finite((value, gradient))


def test_no_gradient_flows_into_the_old_policy(batch):
    for loss in (pg.ppo_clip_loss, pg.cispo_loss):
        into_new, into_old = jax.grad(loss, argnums=(0, 1))(*f32(*batch))
        assert jnp.any(into_new)
        assert not jnp.any(into_old)


# KL and entropy.


def test_kl_estimators_match_float64(batch):
    logprobs, other, _, mask = batch
    d = (other - logprobs)[mask]
    expected = [(-d).mean(), (0.5 * d**2).mean(), (np.exp(d) - 1 - d).mean()]
    lp, other32, m = f32(logprobs, other, mask)
    actual = [f(lp, other32, m) for f in (pg.kl_k1, pg.kl_k2, pg.kl_k3)]
    chex.assert_trees_all_close(actual, [jnp.float32(x) for x in expected], rtol=1e-5)


def test_k1_and_k3_are_unbiased():
    """Averaged over a whole vocabulary with weights π, they are the exact divergence."""
    rng = np.random.default_rng(3)
    z, w = jnp.float32(rng.normal(size=(2, 1, V)))
    log_p, log_q = jax.nn.log_softmax(z)[0], jax.nn.log_softmax(w)[0]
    kl = pg.exact_kl(z, w, jnp.array([True]))
    for estimator in (pg.kl_k1, pg.kl_k3):
        per_token = jax.vmap(lambda a, b, f=estimator: f(a[None], b[None], jnp.array([True])))
        chex.assert_trees_all_close(jnp.exp(log_p) @ per_token(log_p, log_q), kl, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0])
def test_exact_kl_and_entropy_match_float64(scale):
    rng = np.random.default_rng(4)
    z = rng.normal(0.0, 3.0, (B, T, 1000)).astype(np.float32)
    w = z + np.float32(scale) * rng.normal(size=z.shape).astype(np.float32)
    mask = rng.random((B, T)) < 0.7
    log_p, log_q = log_softmax64(z.astype(np.float64)), log_softmax64(w.astype(np.float64))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[mask].mean()
    chex.assert_trees_all_close(
        [pg.exact_kl(*f32(z, w, mask)), pg.entropy(*f32(z, mask))],
        [jnp.float32(kl), jnp.float32(-(np.exp(log_p) * log_p).sum(-1)[mask].mean())],
        rtol=2e-3 if scale < 0.01 else 1e-5,
    )


def test_exact_kl_and_entropy_by_hand():
    one = jnp.ones(1, bool)
    uniform = jnp.zeros((1, 8))
    chex.assert_trees_all_close(pg.entropy(uniform, one), jnp.log(8.0), rtol=1e-6)
    assert pg.exact_kl(uniform, uniform + 5.0, one) == 0
    p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    chex.assert_trees_all_close(pg.exact_kl(p, q, one), jnp.float32(expected), rtol=1e-5)


def test_tokens_ruled_out_by_minus_infinity():
    mask = jnp.ones(1, bool)
    p = jnp.array([[0.0, 0.0, -jnp.inf, -jnp.inf]])
    q = jnp.array([[0.0, 1.0, 2.0, -jnp.inf]])
    total = 1 + np.e + np.e**2  # q = (1, e, e²) / total, p = (1/2, 1/2, 0)
    kl, d_kl = jax.value_and_grad(pg.exact_kl, argnums=(0, 1))(p, q, mask)
    chex.assert_trees_all_close(kl, jnp.float32(np.log(total / 2) - 0.5), rtol=1e-5)
    softmax_q = jnp.float32([[1 / total, np.e / total, np.e**2 / total, 0]])
    chex.assert_trees_all_close(d_kl[1], softmax_q - jnp.array([[0.5, 0.5, 0, 0]]), atol=1e-6)
    value, d_entropy = jax.value_and_grad(pg.entropy)(p, mask)
    chex.assert_trees_all_close(value, jnp.log(2.0), rtol=1e-6)
    chex.assert_tree_all_finite((d_kl, d_entropy))
    assert pg.exact_kl(q, p, mask) == jnp.inf


def test_exact_kl_gradient_matches_float64():
    rng = np.random.default_rng(5)
    z, w = rng.normal(0.0, 2.0, (2, 3, V))
    p, q = np.exp(log_softmax64(z)), np.exp(log_softmax64(w))
    log_ratio = np.log(p / q)
    d_z = p * (log_ratio - (p * log_ratio).sum(-1, keepdims=True)) / 3
    actual = jax.grad(pg.exact_kl, argnums=(0, 1))(*f32(z, w, np.ones(3, bool)))
    chex.assert_trees_all_close(actual, f32(d_z, (q - p) / 3), atol=1e-6)


def test_token_logprobs_match_float64():
    rng = np.random.default_rng(6)
    logits, tokens = rng.normal(0.0, 3.0, (B, T, V)), rng.integers(0, V, (B, T))
    mask = rng.random((B, T)) < 0.7
    expected = np.take_along_axis(log_softmax64(logits), tokens[..., None], -1)[..., 0] * mask
    actual = pg.token_logprobs(jnp.float32(logits), jnp.asarray(tokens), jnp.asarray(mask))
    chex.assert_trees_all_close(actual, jnp.float32(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
def test_chunked_token_logprobs_are_those_of_the_logits(chunk_size):
    rng = np.random.default_rng(7)
    hidden, head = rng.normal(size=(2, 3, T, 5)), rng.normal(size=(5, V))
    tokens, mask = rng.integers(0, V, (2, 3, T)), rng.random((2, 3, T)) < 0.7
    weights = jnp.float32(rng.normal(size=(2, 3, T)))
    hidden[~mask], tokens[~mask] = np.nan, -100

    def chunked(hidden, head):
        found = pg.chunked_token_logprobs(hidden, head, tokens, mask, chunk_size=chunk_size)
        return weights.ravel() @ found.ravel(), found

    def at_once(hidden, head):
        hidden = jnp.where(mask[..., None], hidden, 0)
        found = pg.token_logprobs(hidden @ head, tokens, mask)
        return weights.ravel() @ found.ravel(), found

    gradients = [
        jax.jit(jax.grad(fn, argnums=(0, 1), has_aux=True))(*f32(hidden, head))
        for fn in (chunked, at_once)
    ]
    chex.assert_trees_all_close(*gradients, rtol=1e-5, atol=1e-6)


def in_chunks(head, mask=(1, 1), **options):
    hidden = jnp.ones((2, 3), head.dtype)
    return pg.chunked_token_logprobs(hidden, head, jnp.ones(2, int), jnp.array(mask), **options)


def test_chunked_token_logprobs_keep_their_type():
    assert in_chunks(jnp.ones((3, 2), jnp.bfloat16)).dtype == jnp.bfloat16


# What every masked function promises.


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("loss", MASKED_LOSSES, ids=LOSS_IDS)
def test_nothing_leaks_from_masked_log_probabilities(loss, poison, batch):
    logprobs, old, c, mask = batch
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    clean = run(*f32(logprobs, old, c, mask))
    c_poisoned = c.copy()
    c_poisoned[2] = poison  # the empty sequence's
    poisoned = (np.where(mask, logprobs, poison), np.where(mask, old, poison), c_poisoned)
    chex.assert_tree_all_finite(clean)
    chex.assert_trees_all_equal(run(*f32(*poisoned, mask)), clean)
    assert not jnp.any(jnp.where(mask, 0.0, clean[1][0]))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nothing_leaks_from_masked_logits(poison):
    rng = np.random.default_rng(7)
    z, w = rng.normal(size=(2, B, T, V))
    mask = rng.random((B, T)) < 0.7
    tokens = jnp.asarray(rng.integers(0, V, (B, T)))

    def everything(z, w, mask):
        logprobs = pg.token_logprobs(z, jnp.where(mask, tokens, -100), mask)
        return pg.exact_kl(z, w, mask) + pg.entropy(z, mask) + jnp.sum(logprobs)

    run = jax.jit(jax.value_and_grad(everything, argnums=(0, 1)))
    clean = run(*f32(z, w, mask))
    poisoned = [np.where(mask[..., None], x, poison) for x in (z, w)]
    chex.assert_tree_all_finite(clean)
    chex.assert_trees_all_equal(run(*f32(*poisoned, mask)), clean)


def test_nothing_at_all_is_zero(batch):
    logprobs, old, c, mask = f32(*batch)
    empty = jnp.zeros_like(mask)
    for loss in MASKED_LOSSES:
        value, gradient = jax.value_and_grad(loss)(logprobs, old, c, empty)
        assert value == 0
        assert not jnp.any(gradient)
    logits = jnp.zeros((B, T, V))
    assert pg.exact_kl(logits, logits, empty) == pg.entropy(logits, empty) == 0


@pytest.mark.parametrize("loss", MASKED_LOSSES[:3], ids=LOSS_IDS[:3])
def test_microbatches_add_up_and_vmap_agrees(loss, batch):
    lp, old, c, mask = f32(*batch)
    whole = loss(lp, old, c, mask)
    halves = [loss(lp[s], old[s], c[s], mask[s]) for s in (slice(0, 2), slice(2, 4))]
    chex.assert_trees_all_close(sum(halves), whole, rtol=1e-5)
    chex.assert_trees_all_close(jax.vmap(loss)(lp, old, c, mask).sum(), whole, rtol=1e-5)


def test_dtypes_are_kept_and_arithmetic_is_float32(batch):
    lp, old, c, mask = f32(*batch)
    low = lp.astype(jnp.bfloat16)
    integers = mask.astype(jnp.int32)
    for loss in MASKED_LOSSES:
        value, gradient = jax.value_and_grad(loss)(low, old, c, integers)
        assert value.dtype == gradient.dtype == jnp.bfloat16
        expected = loss(low.astype(jnp.float32), old, c, mask).astype(jnp.bfloat16)
        chex.assert_trees_all_equal(value, expected)
    many = jnp.ones(4096, jnp.bfloat16)  # a bfloat16 sum or count would stop at 256
    assert pg.kl_k1(many, jnp.zeros_like(many), jnp.ones(4096, bool)) == 1
    for advantages in (low, low.astype(jnp.float16)):
        assert pg.token_mean_coefficients(advantages, 7).dtype == advantages.dtype
        assert pg.group_relative_advantages(advantages).dtype == advantages.dtype


# Errors.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pg.group_relative_advantages(jnp.ones((3, 1))), r"rewards.*\(3, 1\)"),
        (lambda: pg.group_relative_advantages(jnp.float32(1)), r"rewards.*\(\)"),
        (lambda: pg.group_relative_advantages(jnp.ones(2), epsilon=-1), "epsilon.*-1"),
        (lambda: pg.token_mean_coefficients(jnp.ones(2), -1), "total_tokens.*-1"),
        (lambda: pg.token_mean_coefficients(jnp.ones(2), jnp.ones(2)), r"total_tokens.*\(2,\)"),
        (lambda: pg.token_mean_coefficients(jnp.ones(2, int), 3), "advantages.*int32"),
        (lambda: pg.sequence_mean_coefficients(jnp.ones(2), jnp.ones(3), 3), r"lengths.*\(3,\)"),
        (
            lambda: pg.reinforce_loss(jnp.ones((2, 3)), jnp.ones(3), jnp.ones((2, 3), int)),
            r"coefficients.*\(3,\).*\(2,\)",
        ),
        (
            lambda: pg.reinforce_loss(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 4), int)),
            r"mask.*\(2, 4\).*\(2, 3\)",
        ),
        (
            lambda: pg.reinforce_loss(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 3))),
            "mask must be bool.*float32",
        ),
        (
            lambda: pg.kl_k1(jnp.ones((2, 3)), jnp.ones(3), jnp.ones((2, 3), int)),
            r"other_logprobs.*\(3,\)",
        ),
        (lambda: pg.entropy(jnp.ones((2, 3)), jnp.ones((2, 3), int)), r"logits.*\(2, 3\)"),
        (lambda: pg.entropy(jnp.ones(3), jnp.array(1)), "mask.*scalar"),
        (lambda: pg.token_logprobs(jnp.ones((2, 3)), jnp.ones(2), jnp.ones(2, int)), "tokens.*int"),
        (lambda: in_chunks(jnp.ones((4, 2))), r"hidden \(2, 3\) and head \(4, 2\)"),
        (lambda: in_chunks(jnp.ones((3, 2)), mask=[1]), r"mask has shape \(1,\)"),
        (lambda: in_chunks(jnp.ones((3, 2)), chunk_size=0), "chunk_size must be .* got 0"),
        (
            lambda: pg.ppo_clip_loss(*[jnp.ones((1, 1))] * 2, jnp.ones(1), [[1]], clip_low=2),
            "clip_low.*2",
        ),
        (
            lambda: pg.ppo_clip_loss(*[jnp.ones((1, 1))] * 2, jnp.ones(1), [[1]], clip_high=0),
            "clip_high.*0",
        ),
        (
            lambda: pg.cispo_loss(*[jnp.ones((1, 1))] * 2, jnp.ones(1), [[1]], max_ratio=-1),
            "max_ratio.*-1",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_may_be_traced():
    run = jax.jit(lambda a, n: pg.token_mean_coefficients(a, n))
    chex.assert_trees_all_equal(run(jnp.ones(2), 4), jnp.array([-0.25, -0.25]))


def test_all_is_sorted_and_complete():
    public = {n for n, f in vars(pg).items() if callable(f) and f.__module__ == pg.__name__}
    assert pg.__all__ == sorted(n for n in public if not n.startswith("_"))
