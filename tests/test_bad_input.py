"""Input at the edges of what the transformations take: it works as documented, or is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import proma_jax as proma
from tests import oracles
from tests.cases import normal
from tests.oracles import assert_close

pytestmark = pytest.mark.any_version

TRANSFORMATIONS = {
    "accumulate": proma.accumulate(optax.identity(), 2),
    "project_intra": proma.project_intra(rank=2),
}
FACTORS = proma.LayerFactors(jnp.ones((4, 5, 3)), jnp.ones((4, 5, 2)))
GRADS = {"w": jnp.ones((3, 2)), "other": jnp.ones(2)}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize(
    ("grads", "scores", "message"),
    [
        ({"other": jnp.ones(2, int)}, {}, r"updates\['other'\] is int32, but gradients"),
        ({"other": jnp.ones(2, complex)}, {}, r"updates\['other'\] is complex64"),
        ({}, {"other": jnp.ones((4, 2), bool)}, r"scores\['other'\] must be floating.*bool"),
        ({}, {"other": jnp.ones((4, 2), complex)}, r"scores\['other'\] must be .*complex64"),
        ({}, {"other": jnp.ones((5, 2))}, "disagree on the number of sequences b: .*5 at"),
        ({}, {"other": jnp.ones(2)}, r"scores\['other'\] has shape \(2,\).*leading axis b"),
        ({}, {"third": jnp.ones((4, 2))}, r"scores\['third'\] has no counterpart"),
        ({"third": jnp.ones(2)}, {}, r"scores has no leaf for updates\['third'\]"),
    ],
)
def test_leaves_that_do_not_fit_are_named(name, grads, scores, message):
    tx, grads = TRANSFORMATIONS[name], GRADS | grads
    scores = {"w": FACTORS, "other": jnp.ones((4, 2))} | scores
    with pytest.raises(ValueError, match=message):
        tx.update(grads, tx.init(grads), scores=scores)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_scores_of_another_structure_are_named(name):
    tx, logprobs = TRANSFORMATIONS[name], jnp.ones(4)
    scores = {"w": FACTORS, "other": None}
    for wrong, message in [
        (None, "scores is None: pass update"),
        ((logprobs, logprobs), r"scores\[0\] has no counterpart in updates"),
        ([FACTORS, None], r"scores\[0\] has no counterpart in updates"),
        (lambda: scores, "scores has no counterpart in updates"),
        ("scores", "scores has no counterpart in updates"),
    ]:
        with pytest.raises(ValueError, match=message):
            tx.update(GRADS, tx.init(GRADS), scores=wrong)


def test_a_state_of_another_transformation_is_named():
    scores = {"w": FACTORS, "other": None}
    states = {name: tx.init(GRADS) for name, tx in TRANSFORMATIONS.items()}
    for name, other, message in [
        ("accumulate", states["project_intra"], "ProjectIntraState, but must be the Accumulate"),
        ("project_intra", states["accumulate"], "AccumulateState, but must be the ProjectIntra"),
        ("accumulate", states["accumulate"]._asdict(), "of type dict.*must be restored as such"),
    ]:
        with pytest.raises(ValueError, match=message):
            TRANSFORMATIONS[name].update(GRADS, other, scores=scores)


def test_coefficients_and_scores_of_a_weighted_sum_are_real():
    with pytest.raises(ValueError, match="coefficients is complex64, but must be real"):
        proma.weighted_sum({"w": FACTORS}, 1j * jnp.ones(4))
    with pytest.raises(ValueError, match=r"scores\['w'\] must be floating point, got int32"):
        proma.weighted_sum({"w": jnp.ones((4, 2), int)}, jnp.ones(4))
    sums = [proma.weighted_sum({"w": FACTORS}, c)["w"] for c in ([1, 2, 3, 4], np.arange(1, 5))]
    assert_close(sums, [proma.weighted_sum({"w": FACTORS}, jnp.arange(1.0, 5))["w"]] * 2)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_all_that_sequence_scores_returns_is_not_taken_for_the_scores(name):
    pair = jnp.ones(4), {"w": FACTORS, "other": jnp.ones((4, 2))}
    state = TRANSFORMATIONS[name].init(GRADS)
    with pytest.raises(ValueError, match=r"scores is a pair.*give the second of the two"):
        TRANSFORMATIONS[name].update(GRADS, state, scores=pair)
    with pytest.raises(ValueError, match="scores is a pair"):
        proma.weighted_sum(pair, jnp.ones(4))
    with_aux = (pair[0], {"length": jnp.ones(4)}), pair[1]
    with pytest.raises(ValueError, match="scores is a pair"):
        proma.weighted_sum(with_aux, jnp.ones(4))


def test_parameters_may_be_a_pair_themselves():
    grads, scores = (jnp.ones((3, 2)), jnp.ones(2)), (FACTORS, jnp.ones((4, 2)))
    updates, _ = proma.project_intra(rank=2).update(
        grads, proma.project_intra(rank=2).init(grads), scores=scores
    )
    assert jax.tree.map(jnp.shape, updates) == ((3, 2), (2,))
    assert jax.tree.map(jnp.shape, proma.weighted_sum(scores, jnp.ones(4))) == ((3, 2), (2,))


# What works.


@pytest.mark.parametrize("solver", ["ridge", "qr", "svd"])
@pytest.mark.parametrize("b", [1, 7])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)])
def test_any_number_of_sequences_and_any_shape_of_leaf(shape, b, solver):
    rng = np.random.default_rng(0)
    tx = proma.accumulate(optax.identity(), 2, solver=solver)
    steps = [
        (
            normal(rng, *shape),
            jnp.asarray(rng.normal(size=(b, *shape))),
        )
        for _ in range(2)
    ]
    state = tx.init(steps[0][0])
    for grads, scores in steps:
        updates, state = jax.jit(tx.update)(grads, state, scores=scores.astype(jnp.float32))
    if 0 in shape:
        assert updates.shape == shape
        return
    grads, scores = zip(*jax.device_get(steps), strict=True)
    expected = oracles.accumulate(grads, scores, solver=solver)
    assert np.linalg.norm(updates - expected) <= 1e-5 * np.linalg.norm(grads)


@pytest.mark.parametrize(
    "tx",
    [
        *TRANSFORMATIONS.values(),
        proma.accumulate(optax.identity(), 2, solver="qr"),
        proma.accumulate(optax.identity(), 2, solver="svd"),
    ],
)
def test_no_sequences_remove_nothing(tx):
    none = proma.LayerFactors(jnp.ones((0, 5, 3)), jnp.ones((0, 5, 2)))
    scores = {"w": none, "other": jnp.ones((0, 2))}
    state, total = tx.init(GRADS), jax.tree.map(jnp.zeros_like, GRADS)
    for _ in range(2):
        updates, state = tx.update(GRADS, state, scores=scores)
        total = optax.tree.add(total, updates)
    assert_close(total, optax.tree.scale(2.0, GRADS))


@pytest.mark.parametrize("tx", TRANSFORMATIONS.values())
def test_kernels_without_entries_are_harmless(tx):
    params = {"down": jnp.ones((3, 0)), "up": jnp.ones((0, 2)), "w": jnp.ones((3, 2))}

    def logprob_fn(params, x):
        return jnp.sum(jnp.tanh(x @ params["down"] @ params["up"] + x @ params["w"]))

    _, scores = proma.sequence_scores(logprob_fn)(params, jnp.ones((4, 5, 3)))
    grads = proma.weighted_sum(scores, jnp.ones(4))
    updates, _ = tx.update(grads, tx.init(params), scores=scores)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("tx", TRANSFORMATIONS.values())
def test_a_parameter_that_is_none_is_no_parameter(tx):
    """As the bias of a layer that has none."""
    params = {"w": jnp.ones((3, 2)), "bias": None}
    scores_fn = proma.sequence_scores(lambda params, x: jnp.sum(jnp.tanh(x @ params["w"])))
    _, scores = scores_fn(params, jnp.ones((4, 5, 3)))
    grads = proma.weighted_sum(scores, jnp.ones(4))
    updates, _ = tx.update(grads, tx.init(params), scores=scores)
    assert updates["bias"] is None


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_no_parameters_are_harmless(name):
    tx = TRANSFORMATIONS[name]
    updates, state = jax.jit(tx.update)({}, tx.init({}), scores={})
    assert updates == {}
    fraction = {"accumulate": "accumulation_fraction", "project_intra": "intra_fraction"}[name]
    assert getattr(state, fraction) == 0


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_numbers_and_numpy_arrays_are_arrays_too(name):
    tx, w = TRANSFORMATIONS[name], np.ones((3, 2), np.float32)
    grads = {"w": w, "other": 1.0}
    scores = {"w": jax.device_get(FACTORS), "other": np.ones(4, np.float32)}
    state = tx.init(grads)
    for _ in range(2):
        updates, state = tx.update(grads, state, scores=scores)
    assert updates["w"].shape == (3, 2)
    assert updates["other"].shape == ()


def test_a_parameter_that_the_function_ignores_is_accumulated():
    params = {"used": jnp.ones((3, 2)), "ignored": jnp.ones(3)}
    x = normal(0, 4, 5, 3)
    _, scores = proma.sequence_scores(lambda p, x: jnp.sum(jnp.tanh(x @ p["used"])))(params, x)
    tx = optax.chain(proma.project_intra(rank=1), proma.accumulate(optax.identity(), 2))
    state = tx.init(params)
    grads = proma.weighted_sum(scores, jnp.ones(4)) | {"ignored": jnp.arange(3.0)}
    for _ in range(2):
        updates, state = tx.update(grads, state, scores=scores)
    assert_close(updates["ignored"], 2 * jnp.arange(3.0))


def test_the_number_of_microbatches_may_change_between_steps():
    tx = proma.accumulate(optax.identity(), lambda step: jnp.array([1, 3, 2])[step])
    grads, scores = {"w": jnp.ones((3, 2))}, {"w": None}
    state, emitted = tx.init(grads), []
    update = jax.jit(tx.update)
    for _ in range(6):
        updates, state = update(grads, state, scores=scores)
        emitted.append(float(updates["w"][0, 0]))
    assert emitted == [1, 0, 0, 3, 0, 2]


@pytest.mark.parametrize(("k", "emitted"), [(0, [1, 1, 1]), (2, [0, 1, 0]), (2.5, [0, 0, 1])])
def test_a_mean_is_over_the_microbatches_that_there_were(k, emitted):
    tx = proma.accumulate(optax.identity(), lambda step: k, average=True)
    grads, scores = {"w": jnp.ones(2)}, {"w": None}
    state = tx.init(grads)
    for expected in emitted:
        updates, state = tx.update(grads, state, scores=scores)
        assert_close(updates["w"], expected * jnp.ones(2))


@pytest.mark.parametrize("x64", [False, True])
def test_the_first_microbatches_to_remove_are_those_of_exact_arithmetic(x64):
    m, k = np.arange(64)[None], np.arange(1, 65)[:, None]
    with jax.enable_x64(x64):
        for percent in range(0, 101):
            settings = proma.Accumulation(skip_fraction=percent / 100)
            expected = (m > 0) & (100 * m >= percent * k)
            removes = settings.removes(jnp.asarray(m), jnp.asarray(k), jnp.zeros((), jnp.int32))
            np.testing.assert_array_equal(removes, expected, f"{percent=}")
        percents = np.arange(101)[:, None]
        settings = proma.Accumulation(skip_fraction=lambda step: percents / 100)
        for k in range(1, 65):
            m = np.arange(k)
            expected = (m > 0) & (100 * m >= percents * k)
            removes = settings.removes(jnp.asarray(m), k, jnp.zeros((), jnp.int32))
            np.testing.assert_array_equal(removes, expected, f"{k=}")
