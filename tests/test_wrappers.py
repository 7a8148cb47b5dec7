"""Both transformations within optax's wrappers and around its optimizers: docs/optax.md."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import proma_jax as proma
from tests.oracles import assert_close

NAMES = ("bias", "first", "second")


def microbatches(k, dtype=np.float32):
    """Gradients and scores of a dense leaf and two kernels."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    def kernel():
        return proma.LayerFactors(normal(3, 4, 5), normal(3, 4, 4))

    def microbatch():
        grads = {"bias": normal(4), "first": normal(5, 4), "second": normal(5, 4)}
        return grads, {"bias": normal(3, 4), "first": kernel(), "second": kernel()}

    return [microbatch() for _ in range(k)]


STEPS = microbatches(4)
PARAMS = jax.tree.map(np.ones_like, STEPS[0][0])
UNPROJECTED = dict.fromkeys(NAMES)
NNX_NAMES = {"bias": "bias", "kernel": "first"}
KEEP = optax.identity()
TRANSFORMS = {
    "accumulate": proma.accumulate(optax.adam(0.1), 2),
    "project_intra": proma.project_intra(2),
}
each_transform = pytest.mark.parametrize("name", TRANSFORMS)


def run(tx, steps=STEPS[:2], params=PARAMS, state=None):
    """The updates at every microbatch, and the last state."""
    state, emitted = tx.init(params) if state is None else state, []
    update = jax.jit(lambda grads, state, scores: tx.update(grads, state, params, scores=scores))
    for grads, scores in steps:
        updates, state = update(grads, state, scores)
        emitted.append(updates)
    return emitted, state


@functools.cache
def alone(name):
    return run(TRANSFORMS[name])[0]


WRAPPERS = {
    "chain": lambda tx: optax.chain(KEEP, tx),
    "named_chain": lambda tx: optax.named_chain(("before", KEEP), ("tx", tx)),
    "masked": lambda tx: optax.masked(tx, lambda params: jax.tree.map(lambda _: True, params)),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": tx}, {"bias": "a", "first": "a", "second": "b"}
    ),
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=False),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
}


@each_transform
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_that_forwards_the_scores_changes_nothing(wrapper, name):
    assert_close(run(WRAPPERS[wrapper](TRANSFORMS[name]))[0], alone(name))


def test_what_each_variant_of_a_chain_removes_has_its_own_name():
    chain = optax.chain(TRANSFORMS["project_intra"], TRANSFORMS["accumulate"])
    _, state = run(chain)
    intra, accumulation = state
    assert optax.tree.get(state, "intra_fraction") == intra.intra_fraction > 0
    assert optax.tree.get(state, "accumulation_fraction") == accumulation.accumulation_fraction > 0


@each_transform
@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_masks_and_partitions_leave_out_the_rest(factor, name):
    tx, chosen = TRANSFORMS[name], {"bias": False, "first": True, "second": False}
    labels = jax.tree.map(lambda ours: "ours" if ours else "rest", chosen)
    wrapped = [optax.partition({"ours": tx, "rest": optax.scale(factor)}, labels)]
    if factor == 1:
        wrapped.append(optax.masked(tx, chosen))
    else:
        frozen = jax.tree.map(lambda ours: not ours, chosen)
        wrapped.append(optax.selective_transform(tx, freeze_mask=frozen))
    expected = [
        {n: updates[n] if chosen[n] else factor * grads[n] for n in NAMES}
        for updates, (grads, _) in zip(alone(name), STEPS[:2], strict=True)
    ]
    for tx in wrapped:
        assert_close(run(tx)[0], expected)


def test_scores_that_a_partition_leaves_out_skip_nothing():
    grads, scores = STEPS[0]
    bad = scores | {"second": jax.tree.map(lambda x: x * jnp.nan, scores["second"])}
    tx = proma.accumulate(KEEP, 1, should_skip_update_fn=optax.skip_not_finite)
    labels = {"bias": "ours", "first": "ours", "second": "frozen"}
    (updates,), _ = run(
        optax.partition({"ours": tx, "frozen": optax.set_to_zero()}, labels), [(grads, bad)]
    )
    assert_close(updates["first"], grads["first"])


def test_a_mask_may_leave_out_a_whole_subtree():
    grads, scores = (
        {"bias": tree["bias"], "kernels": {n: tree[n] for n in NAMES[1:]}} for tree in STEPS[0]
    )
    tx = optax.masked(proma.accumulate(optax.scale(2.0), 1), {"bias": True, "kernels": False})
    (updates,), _ = run(tx, [(grads, scores)], grads)
    assert_close(updates, grads | {"bias": 2 * grads["bias"]})


def test_dense_scores_may_be_masked_with_the_updates():
    steps = [(grads, jax.tree.map(lambda g: np.stack([g, g * g]), grads)) for grads, _ in STEPS[:2]]
    tx, chosen = proma.accumulate(KEEP, 2), {"bias": False, "first": True, "second": True}
    masked = run(optax.masked(tx, chosen, mask_compatible_extra_args=True), steps)[0]
    expected = run(tx, steps)[0]
    for n in ("first", "second"):
        assert_close([updates[n] for updates in masked], [updates[n] for updates in expected])


INJECTED = {
    "accumulate": (
        functools.partial(proma.accumulate, ridge=0.1, relative_bound=0.2, skip_fraction=0.3),
        ("every_k_schedule",),
        (optax.adam(0.1), 2),
    ),
    "project_intra": (proma.project_intra, ("rank", "power_iterations", "key"), (2,)),
}


NUMBERS = {
    "accumulate": {"ridge", "shrinkage", "relative_bound", "skip_fraction", "rtol"},
    "project_intra": {"shrinkage"},
}


@each_transform
def test_injected_numbers_are_used_and_may_be_set_between_updates(name):
    factory, static, args = INJECTED[name]
    tx = optax.inject_hyperparams(factory, static_args=static)(*args, shrinkage=0.5)
    assert_close(run(tx)[0], run(factory(*args, shrinkage=0.5))[0])
    state = tx.init(PARAMS)
    assert state.hyperparams.keys() == NUMBERS[name]
    state.hyperparams["shrinkage"] = jnp.zeros(())
    assert_close(run(tx, state=state)[0], run(factory(*args, shrinkage=0.0))[0])


def test_injected_schedules_count_microbatches_and_ours_optimizer_steps():
    inject = optax.inject_hyperparams(proma.accumulate, static_args="every_k_schedule")
    injected = run(inject(KEEP, 2, shrinkage=lambda count: jnp.where(count < 3, 0.0, 1.0)), STEPS)
    ours = run(
        proma.accumulate(KEEP, 2, shrinkage=lambda step: jnp.where(step < 1, 0.0, 1.0)), STEPS
    )
    assert_close(injected[0], ours[0])
    assert (injected[1].count, ours[1].gradient_step) == (4, 2)


def test_injected_numbers_take_the_parameters_type_unless_told():
    params = jax.tree.map(jnp.bfloat16, PARAMS)
    for dtype, expected in [(None, jnp.bfloat16), (jnp.float32, jnp.float32)]:
        inject = optax.inject_hyperparams(proma.accumulate, "every_k_schedule", dtype)
        assert inject(KEEP, 2).init(params).hyperparams["ridge"].dtype == expected


@pytest.mark.parametrize(
    ("factory", "args", "options", "error", "message"),
    [
        (proma.accumulate, (KEEP, 2), {}, ValueError, "every_k_schedule=.*static_args"),
        (proma.project_intra, (2,), {}, ValueError, "rank=.*static_args"),
        (
            proma.accumulate,
            (KEEP, lambda step: 2),
            {"should_skip_update_fn": optax.skip_not_finite},
            TypeError,
            "gradient_step",
        ),
        (
            proma.accumulate,
            (KEEP, lambda step: 2),
            {"accumulator_dtype": jnp.float32},
            ValueError,
            "dtype",
        ),
    ],
)
def test_injecting_what_is_not_a_number_is_an_error(factory, args, options, error, message):
    with pytest.raises(error, match=message):
        optax.inject_hyperparams(factory)(*args, **options).init(PARAMS)


def test_an_injected_mask_function_must_be_static():
    def mask(updates):
        return jax.tree.map(lambda x: x.ndim > 1, updates)

    static = ("every_k_schedule", "mask")
    inject = optax.inject_hyperparams(proma.accumulate, static_args=static)
    _, state = run(inject(KEEP, 2, mask=mask))
    assert state.inner_state.accumulation_fraction > 0
    inject = optax.inject_hyperparams(proma.accumulate, static_args="every_k_schedule")
    with pytest.raises(ValueError, match="name mask in its static_args"):
        run(inject(KEEP, 2, mask=mask))


@each_transform
def test_nnx_optimizer_forwards_the_scores(name):
    model = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, TRANSFORMS[name], wrt=nnx.Param)
    updates = {ours: sum(updates[n] for updates in alone(name)) for ours, n in NNX_NAMES.items()}
    expected = jax.tree.map(jnp.add, nnx.to_pure_dict(nnx.state(model)), updates)
    for microbatch in STEPS[:2]:
        grads, scores = (
            nnx.State({ours: nnx.Param(tree[n]) for ours, n in NNX_NAMES.items()})
            for tree in microbatch
        )
        optimizer.update(model, grads, scores=scores)
    assert_close(nnx.to_pure_dict(nnx.state(model)), expected)


@each_transform
@pytest.mark.parametrize(
    ("wrap", "error", "message"),
    [
        (lambda tx: optax.chain(optax.MultiSteps(tx, 1)), ValueError, "scores is None: pass"),
        (lambda tx: optax.flatten(tx), ValueError, r"scores\['bias'\].*from one tree"),
        (lambda tx: proma.accumulate(tx, 1), ValueError, "scores is None: pass"),
        (lambda tx: optax.lookahead(tx, 2, 0.5), TypeError, "argument 'scores'"),
        (lambda tx: optax.contrib.sam(tx, optax.sgd(0.1)), TypeError, "argument 'scores'"),
        (lambda tx: optax.contrib.split_real_and_imaginary(tx), TypeError, "argument 'scores'"),
    ],
    ids=["MultiSteps", "flatten", "accumulate", "lookahead", "sam", "split_real_and_imaginary"],
)
def test_a_wrapper_that_drops_the_scores_is_an_error(wrap, error, message, name):
    tx, (grads, scores) = wrap(TRANSFORMS[name]), STEPS[0]
    with pytest.raises(error, match=message):
        tx.update(grads, tx.init(PARAMS), PARAMS, scores=scores)


def test_lookahead_goes_neither_around_nor_into_accumulate():
    (grads, scores), params = STEPS[0], optax.LookaheadParams.init_synced(PARAMS)
    around = optax.chain(optax.lookahead(TRANSFORMS["accumulate"], 2, 0.5))
    inside = proma.accumulate(optax.lookahead(optax.sgd(0.1), 2, 0.5), 2)
    for tx, message in [
        (around, "scores is None: pass"),
        (inside, "init and update need one tree"),
    ]:
        with pytest.raises(ValueError, match=message):
            tx.update(grads, tx.init(params), params, scores=scores)


def test_a_train_state_drops_the_scores_with_an_error_and_update_takes_them():
    grads, scores = STEPS[0]
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=TRANSFORMS["project_intra"])
    with pytest.raises(ValueError, match="scores is None: pass update"):
        state.apply_gradients(grads=grads, scores=scores)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, scores=scores)
    params = optax.apply_updates(state.params, updates)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    assert_close(state.params, optax.apply_updates(PARAMS, alone("project_intra")[0]))


def test_partitions_of_project_intra_each_need_a_kernel():
    tx, (grads, scores) = TRANSFORMS["project_intra"], STEPS[0]
    tx = optax.partition({"a": tx, "b": tx}, {"bias": "a", "first": "b", "second": "b"})
    with pytest.raises(ValueError, match="no LayerFactors, so there is nothing to project"):
        tx.update(grads, tx.init(PARAMS), PARAMS, scores=scores)


@pytest.mark.parametrize(
    ("optimizer", "params"),
    [
        (optax.lookahead(optax.sgd(0.1), 2, 0.5), optax.LookaheadParams.init_synced(PARAMS)),
        (optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.2)), PARAMS),
        (optax.flatten(optax.adam(0.1)), PARAMS),
        (optax.MultiSteps(optax.adam(0.1), 2, use_grad_mean=False), PARAMS),
    ],
    ids=["lookahead", "sam", "flatten", "MultiSteps"],
)
def test_a_wrapper_that_drops_the_scores_may_follow_project_intra(optimizer, params):
    without_extra_args = optax.GradientTransformation(optimizer.init, optimizer.update)
    emitted, _ = run(optax.chain(TRANSFORMS["project_intra"], without_extra_args), params=params)
    state = optimizer.init(params)
    for updates, projected in zip(emitted, alone("project_intra"), strict=True):
        expected, state = optimizer.update(projected, state, params)
        assert_close(updates, expected)


NAMED_INNER = {
    "adamw": optax.adamw(0.1),
    "lion": optax.lion(0.1),
    "muon": optax.contrib.muon(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adafactor": optax.adafactor(0.1),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "schedule_free_adamw": optax.contrib.schedule_free_adamw(0.1),
}
WRAPPED_INNER = {
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 5),
    "flatten": optax.flatten(optax.adam(0.1)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0, 4)),
    "mechanize": optax.contrib.mechanize(optax.adam(0.1)),
    "sam": optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.2)),
}


@functools.cache
def emitted_gradients(dtype):
    return run(proma.accumulate(KEEP, 2), microbatches(4, dtype))[0]


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("inner", "dtype"),
    [(n, d) for n in NAMED_INNER for d in ("float32", "bfloat16")]
    + [(n, "float32") for n in WRAPPED_INNER],
)
def test_the_inner_optimizer_takes_one_step_per_emission_and_none_between(inner, dtype):
    inner = (NAMED_INNER | WRAPPED_INNER)[inner]
    tx = proma.accumulate(inner, 2)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), PARAMS)
    state, expected_state = tx.init(params), inner.init(params)
    update, expected_update = jax.jit(tx.update), jax.jit(inner.update)
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    gradients = emitted_gradients(dtype)
    steps = zip(microbatches(4, dtype), gradients, [False, True] * 2, strict=True)
    for (grads, scores), gradient, emits in steps:
        before = state.inner_opt_state
        updates, state = update(grads, state, params, scores=scores)
        assert proma.has_updated(state) == emits
        if emits:
            expected, expected_state = expected_update(gradient, expected_state, params)
            assert_close(updates, expected, tolerance)
            assert_close(state.inner_opt_state, expected_state, tolerance)
            params = optax.apply_updates(params, updates)
        else:
            assert_close((updates, state.inner_opt_state), (gradient, before), 0)


def test_the_optimizer_may_follow_a_loop_over_the_microbatches():
    inner, grads_only = optax.adam(0.1), proma.accumulate(KEEP, 4)
    stacked = jax.tree.map(lambda *x: np.stack(x), *STEPS)

    @jax.jit
    def step(state, inner_state):
        def add(carry, microbatch):
            total, state = carry
            grads, scores = microbatch
            emitted, state = grads_only.update(grads, state, PARAMS, scores=scores)
            return (optax.tree.add(total, emitted), state), None

        zeros = optax.tree.zeros_like(PARAMS)
        (gradient, state), _ = jax.lax.scan(add, (zeros, state), stacked)
        updates, inner_state = inner.update(gradient, inner_state, PARAMS)
        return updates, state, inner_state

    updates, state, inner_state = step(grads_only.init(PARAMS), inner.init(PARAMS))
    emitted, expected = run(proma.accumulate(inner, 4), STEPS)
    assert_close(updates, emitted[-1])
    assert_close(inner_state, expected.inner_opt_state)
    assert proma.has_updated(state)


def test_schedule_free_outside_moves_the_parameters_between_emissions():
    tx = optax.contrib.schedule_free(proma.accumulate(optax.sgd(0.1), 2), 0.1)
    emitted, state = run(tx, STEPS[:3])
    assert state.base_optimizer_state.mini_step == 1
    assert np.abs(emitted[2]["first"]).max() > 1e-3


def test_apply_if_finite_neither_counts_what_it_drops_nor_drops_for_ever():
    bad = jax.tree.map(lambda g: g * np.nan, STEPS[0][0]), STEPS[0][1]
    _, state = run(optax.apply_if_finite(TRANSFORMS["accumulate"], 2), [bad] * 3)
    assert state.inner_state.mini_step == 1
    assert np.isnan(state.inner_state.acc_grads["first"]).all()


def test_apply_if_finite_does_not_see_scores_and_should_skip_update_fn_does():
    grads, scores = STEPS[1]
    steps = [STEPS[0], (grads, scores | {"bias": scores["bias"] * np.nan})]
    outside = optax.apply_if_finite(proma.accumulate(KEEP, 2), 5)
    assert np.isnan(run(outside, steps)[0][1]["bias"]).all()
    skipping = proma.accumulate(KEEP, 2, should_skip_update_fn=optax.skip_not_finite)
    assert_close(run(skipping, steps)[0][1], STEPS[0][0])


def test_conditionally_transform_lets_the_gradient_itself_out_and_conditionally_mask_does_not():
    for wrap, factor in [(optax.conditionally_transform, 1), (optax.conditionally_mask, 0)]:
        emitted, state = run(wrap(TRANSFORMS["accumulate"], lambda step: step > 0))
        assert_close(emitted[0], optax.tree.scale(factor, STEPS[0][0]))
        assert state.inner_state.mini_step == 1


def test_clipping_before_accumulate_is_of_microbatches_inside_of_steps_and_after_of_updates():
    grads = jax.tree.map(lambda g: g / optax.tree.norm(STEPS[0][0]), STEPS[0][0])
    clip, steps = optax.clip_by_global_norm(0.5), [(grads, UNPROJECTED)] * 2
    for tx, expected in [
        (optax.chain(clip, proma.accumulate(optax.scale(3.0), 2)), 3.0),
        (proma.accumulate(optax.chain(clip, optax.scale(3.0)), 2), 1.5),
        (optax.chain(proma.accumulate(optax.scale(3.0), 2), clip), 0.5),
    ]:
        np.testing.assert_allclose(optax.tree.norm(run(tx, steps)[0][1]), expected, rtol=1e-5)


def test_multisteps_around_a_projection_projects_sums_with_the_latest_scores():
    total = jax.tree.map(np.add, STEPS[0][0], STEPS[1][0])
    around = run(optax.MultiSteps(proma.project_intra(2), 2, use_grad_mean=False))[0][1]
    assert_close(around, run(proma.project_intra(2), [(total, STEPS[1][1])])[0][0])
    published = jax.tree.map(np.add, *alone("project_intra"))
    assert np.linalg.norm(around["first"] - published["first"]) > 0.1
    emitted, _ = run(optax.MultiSteps(proma.accumulate(KEEP, 1), 2, use_grad_mean=False))
    assert_close(emitted[1], total)
