"""Many devices: what they give is what one device gives, or what is documented, at what cost."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import proma_jax as proma
from proma_jax import policy_gradient as pg
from tests import oracles
from tests.cases import normal
from tests.oracles import assert_close

P = PartitionSpec
VOCABULARY, WIDTH, HIDDEN, B, TOKENS = 32, 128, 256, 8, 128
LAYERS = MICROBATCHES = 2

MESHES = {
    "data": ({"data": 8}, {}),
    "fsdp": (
        {"data": 8},
        {
            "table": P("data"),
            "scale": P(None, "data"),
            "up": P(None, "data"),
            "bias": P(None, "data"),
            "down": P(None, "data"),
            "head": P("data"),
        },
    ),
    "tensor": (
        {"model": 8},
        {
            "up": P(None, None, "model"),
            "bias": P(None, "model"),
            "down": P(None, "model"),
            "head": P(None, "model"),
        },
    ),
    "hybrid": (
        {"replica": 2, "data": 4},
        {
            "table": P("data"),
            "up": P(None, "data"),
            "bias": P(None, "data"),
            "down": P(None, "data"),
            "head": P("data"),
        },
    ),
    "mixed": (
        {"data": 4, "model": 2},
        {
            "table": P("data"),
            "up": P(None, "data", "model"),
            "bias": P(None, "model"),
            "down": P(None, "model", "data"),
            "head": P("data", "model"),
        },
    ),
}
INNER = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9))
ACCUMULATION = proma.accumulate(INNER, 2)
BOTH = optax.chain(proma.project_intra(rank=2), ACCUMULATION)


def logprob_fn(params, tokens, reads=True, **sharding):
    """A decoder of two scanned and rematerialised layers, without attention."""
    layers = {name: params[name] for name in ("scale", "up", "bias", "down")}

    def layer(h, p):
        hidden = jnp.tanh((h * p["scale"]) @ p["up"] + p["bias"])
        return h + jnp.dot(hidden, p["down"], **sharding), None

    one_hot = jax.nn.one_hot(tokens, VOCABULARY)
    h = params["table"][tokens[:-1]] if reads else one_hot[:-1] @ params["table"]
    h, _ = jax.lax.scan(jax.checkpoint(layer), h, layers)
    return jnp.sum(jax.nn.log_softmax(h @ params["head"]) * one_hot[1:])


def model(seed=0):
    rng = np.random.default_rng(seed)

    def scaled(*shape):
        return normal(rng, *shape) / np.sqrt(shape[-2])

    params = {
        "table": scaled(VOCABULARY, WIDTH),
        "scale": 1 + scaled(LAYERS, WIDTH),
        "up": scaled(LAYERS, WIDTH, HIDDEN),
        "bias": scaled(LAYERS, HIDDEN),
        "down": scaled(LAYERS, HIDDEN, WIDTH),
        "head": scaled(WIDTH, VOCABULARY),
    }
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (MICROBATCHES, B, TOKENS + 1)))
    return params, tokens, scaled(MICROBATCHES, B)


def traffic(compiled):
    """Elements that a device receives in collectives; an all-reduce counts twice.

    Every loop has two iterations, over layers or microbatches.
    """
    received = 0
    for shapes, kind, rest in re.findall(
        r"= (\S+|\(.*?\)) (all-[\w-]+|reduce-scatter|collective-permute)\((.*)", compiled.as_text()
    ):
        times = (2 if kind == "all-reduce" else 1) * 2 ** rest.count("/while/body")
        sizes = re.findall(r"\w+\[([\d,]+)\]", shapes)
        received += times * sum(math.prod(map(int, size.split(","))) for size in sizes)
    return received


def extra_memory(compiled, plain):
    return (
        compiled.memory_analysis().temp_size_in_bytes - plain.memory_analysis().temp_size_in_bytes
    )


def take_step(tx, fn, options, params, state, tokens, coefficients):
    _, scores = proma.sequence_scores(fn, **options)(params, tokens)
    grads = proma.weighted_sum(scores, coefficients)
    return tx.update(grads, state, params, scores=scores)


def plain_gradient(fn, whole, params, tokens, coefficients):
    def loss(params):
        return jnp.sum(coefficients * jax.vmap(fn, (None, 0))(whole(params), tokens))

    return jax.grad(loss)(params)


def compile_step(step, *args, **options):
    return jax.jit(step, **options).lower(*args).compile()


@functools.cache
def on_one_device(reads):
    """The updates after two microbatches, and the memory that the projections take."""
    params, tokens, coefficients = model()
    fn, state = functools.partial(logprob_fn, reads=reads), BOTH.init(params)
    step = compile_step(
        functools.partial(take_step, BOTH, fn, {}), params, state, tokens[0], coefficients[0]
    )
    plain = functools.partial(plain_gradient, fn, lambda params: params)
    extra = extra_memory(step, compile_step(plain, params, tokens[0], coefficients[0]))
    for m in range(MICROBATCHES):
        updates, state = step(params, state, tokens[m], coefficients[m])
    return jax.device_get(updates), extra


class OnMesh:
    """The model, its data and its parameters spread over one of the meshes."""

    def __init__(self, name, axis_type):
        axes, self.specs = MESHES[name]
        self.explicit = axis_type == AxisType.Explicit
        types = (axis_type,) * len(axes)
        self.mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)
        batch_axis = tuple(name for name in axes if name != "model") or None
        params, tokens, coefficients = model()
        self.params = {leaf: self.put(w, *self.specs.get(leaf, ())) for leaf, w in params.items()}
        self.tokens, self.coefficients = (
            self.put(x, None, batch_axis) for x in (tokens, coefficients)
        )
        sharding = {"out_sharding": P()} if self.explicit else {}
        self.logprob_fn = functools.partial(logprob_fn, reads=not self.explicit, **sharding)
        specs = {leaf: P(*self.specs.get(leaf, ())) for leaf in params}
        hints = {"spmd_axis_name": batch_axis, "param_specs": specs}
        self.options = {} if self.explicit else hints

    def plain(self):
        """Plain policy gradient of one microbatch, compiled."""
        gradient = functools.partial(plain_gradient, self.logprob_fn, self.whole)
        shardings = jax.tree.map(lambda x: x.sharding, self.params)
        arguments = self.params, self.tokens[0], self.coefficients[0]
        return compile_step(gradient, *arguments, out_shardings=shardings)

    def put(self, x, *spec):
        return jax.device_put(x, NamedSharding(self.mesh, P(*spec)))

    def whole(self, params):
        """As a model under Explicit axes must have them, where the sequences take an axis."""
        if not self.explicit:
            return params
        return {
            leaf: jax.sharding.reshard(w, P(*[None if e == "data" else e for e in spec]))
            for leaf, w in params.items()
            for spec in [self.specs.get(leaf, ())]
        }


def assert_spread_like(tree, like):
    for x, y in zip(*map(jax.tree.leaves, (tree, like)), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    ("name", "by_both", "by_one", "share"),
    [
        ("data", 2, 1.55, 0.1),
        pytest.param("fsdp", 1.5, 1.2, 0.05, marks=pytest.mark.any_version),
        pytest.param("tensor", 1.35, 1.01, 0.35, marks=pytest.mark.any_version),
        pytest.param("hybrid", 1.45, 0.9, 0.1, marks=pytest.mark.any_version),
        pytest.param("mixed", 1.6, 1.3, 0.15, marks=pytest.mark.any_version),
    ],
)
def test_a_mesh_gives_what_one_device_gives_at_little_cost(name, by_both, by_one, share, axis_type):
    """Costs are bounded by multiples of what plain policy gradient sends on the mesh, for both
    variants and accumulation alone, and by shares of the memory that both take on one device.
    """
    case = OnMesh(name, axis_type)
    expected, extra = on_one_device(reads=not case.explicit)
    with jax.set_mesh(case.mesh):
        params, state = case.params, BOTH.init(case.params)
        microbatch = case.tokens[0], case.coefficients[0]

        def compiled(tx):
            step = functools.partial(take_step, tx, case.logprob_fn, case.options)
            return compile_step(step, params, tx.init(params), *microbatch)

        step, one_step = compiled(BOTH), compiled(ACCUMULATION)
        plain = case.plain()
        for tokens, coefficients in zip(case.tokens, case.coefficients, strict=True):
            updates, new_state = step(params, state, tokens, coefficients)
            assert_spread_like((updates, new_state), (params, state))
            state = new_state
    assert_close(jax.device_get(updates), expected, 2e-5)
    assert traffic(plain) > 0 < extra
    assert traffic(step) <= by_both * traffic(plain)
    assert traffic(one_step) <= by_one * traffic(plain)
    assert extra_memory(step, plain) <= share * extra


@pytest.mark.parametrize(
    ("name", "axis_type", "by_both", "by_one"),
    [
        ("data", AxisType.Auto, 2, 1.35),
        pytest.param("hybrid", AxisType.Auto, 0.9, 0.7, marks=pytest.mark.any_version),
        pytest.param("fsdp", AxisType.Explicit, 1.15, 0.75, marks=pytest.mark.any_version),
        ("tensor", AxisType.Explicit, 1.3, 1.01),
        ("mixed", AxisType.Auto, 1.5, 1.3),
    ],
)
def test_the_fused_form_gives_on_a_mesh_what_one_device_gives(name, axis_type, by_both, by_one):
    """At a cost that is bounded as in the test above; it takes no more memory than plain does."""
    case = OnMesh(name, axis_type)
    expected, extra = on_one_device(reads=not case.explicit)
    arguments = case.params, case.tokens, case.coefficients, 0

    def compiled(**variants):
        return compile_step(
            proma.accumulated_gradient(case.logprob_fn, **variants, **case.options), *arguments
        )

    with jax.set_mesh(case.mesh):
        plain = case.plain()
        one = compiled(accumulation=proma.Accumulation())
        both = compiled(accumulation=proma.Accumulation(), intra=proma.Intra(rank=2))
        grads, _ = both(*arguments)
        updates, _ = jax.jit(INNER.update)(grads, INNER.init(case.params))
    assert_close(jax.device_get(updates), expected, 2e-5)
    assert_spread_like(grads, case.params)
    assert traffic(plain) > 0
    assert traffic(both) <= by_both * MICROBATCHES * traffic(plain)
    assert traffic(one) <= by_one * MICROBATCHES * traffic(plain)
    assert extra_memory(one, plain) <= 0.05 * extra


@pytest.mark.parametrize(
    ("axis_type", "intra"),
    [
        (AxisType.Auto, None),
        pytest.param(AxisType.Auto, 2, marks=pytest.mark.any_version),
        pytest.param(AxisType.Explicit, 2, marks=pytest.mark.any_version),
    ],
)
def test_scores_of_a_head_used_in_chunks_are_whole_on_no_device(axis_type, intra):
    """The fused form makes such a head after the backward pass, from all its dense scores."""
    width, vocabulary, num_tokens = 64, 1024, 64
    mask = jnp.ones(num_tokens, int)
    axes = {"replica": 2, "data": 4}
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * 2)

    def logprob_fn(params, sequence):
        x, tokens = sequence
        h = jnp.tanh(x @ params["w"])
        return pg.chunked_token_logprobs(h, params["head"], tokens, mask, chunk_size=16).sum()

    def gradient_fn(**options):
        return proma.accumulated_gradient(
            logprob_fn,
            accumulation=proma.Accumulation(),
            intra=proma.Intra(rank=intra) if intra else None,
            **options,
        )

    params = {"w": normal(0, width, width), "head": normal(1, width, vocabulary) / 8}
    x = normal(2, MICROBATCHES, B, num_tokens, width)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, vocabulary, x.shape[:-1]))
    arguments = params, (x, tokens), normal(4, MICROBATCHES, B)
    grads, metrics = jax.jit(gradient_fn())(*arguments, 0)
    hints = {"spmd_axis_name": tuple(axes), "param_specs": P("data")}
    with jax.set_mesh(mesh):
        by_rows, by_sequence = (
            NamedSharding(mesh, spec) for spec in (P("data"), P(None, tuple(axes)))
        )
        spread = jax.device_put(arguments, (by_rows, by_sequence, by_sequence))
        on_mesh = gradient_fn(**(hints if axis_type == AxisType.Auto else {}))
        step = compile_step(on_mesh, *spread, 0)
        found, of_found = step(*spread, 0)
    assert_close(found, grads, 2e-5)
    assert_close(of_found, metrics, 1e-4)
    assert_spread_like(found, spread[0])
    dense = B * width * vocabulary
    assert step.memory_analysis().temp_size_in_bytes < 4 * dense
    assert traffic(step) < 2 * MICROBATCHES * dense


def test_lookups_are_added_up_to_a_whole_table_on_no_device():
    vocabulary, width, axes = 1024, 64, {"replica": 2, "data": 4}

    def logprob_fn(params, tokens):
        return jnp.sum(jnp.tanh(params["table"][tokens] @ params["w"]))

    def gradient_fn(**options):
        return proma.accumulated_gradient(logprob_fn, accumulation=proma.Accumulation(), **options)

    params = {"table": normal(0, vocabulary, width), "w": normal(1, width, width) / 8}
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, vocabulary, (MICROBATCHES, B, 512)))
    arguments = params, tokens, normal(3, MICROBATCHES, B)
    grads, _ = jax.jit(gradient_fn())(*arguments, 0)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * 2)
    hints = {"spmd_axis_name": tuple(axes), "param_specs": P("data")}
    with jax.set_mesh(mesh):
        by_rows, by_sequence = (
            NamedSharding(mesh, spec) for spec in (P("data"), P(None, tuple(axes)))
        )
        spread = jax.device_put(arguments, (by_rows, by_sequence, by_sequence))
        step = compile_step(gradient_fn(**hints), *spread, 0)
        found, _ = step(*spread, 0)
    assert_close(found, grads, 2e-5)
    assert_spread_like(found, spread[0])
    assert traffic(step) < 2.5 * MICROBATCHES * vocabulary * width


def test_explicit_axes_are_described_and_checked():
    case = OnMesh("fsdp", AxisType.Explicit)
    with jax.set_mesh(case.mesh):
        table = proma.describe_scores(case.logprob_fn, case.params, case.tokens[0])
        assert "LayerFactors  accumulation, intra  2 layers" in table
        assert max(proma.check_scores(case.logprob_fn, case.params, case.tokens[0]).values()) < 1e-5


def test_a_lookup_told_how_to_be_spread_is_dense_and_right():
    case = OnMesh("data", AxisType.Explicit)

    def logprob_fn(params, tokens):
        return jnp.sum(params["table"].at[tokens].get(out_sharding=P()) @ params["head"])

    with jax.set_mesh(case.mesh):
        params = {name: case.params[name] for name in ("table", "head")}
        of_all = jax.jit(jax.vmap(jax.grad(logprob_fn), (None, 0)))(params, case.tokens[0])
        _, scores = jax.jit(proma.sequence_scores(logprob_fn))(params, case.tokens[0])
        assert isinstance(scores["table"].made, proma.DenseScores)
        sums = proma.weighted_sum(scores, case.coefficients[0])
    expected = jax.tree.map(
        lambda x: np.tensordot(case.coefficients[0], np.float64(x), 1), jax.device_get(of_all)
    )
    assert_close(jax.device_get(sums), expected)


def test_injected_numbers_pass_explicit_axes():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    injected = optax.inject_hyperparams(
        proma.accumulate, static_args=("every_k_schedule", "mask", "axis_name")
    )
    with jax.set_mesh(mesh):
        for solver in ("ridge", "qr", "svd"):
            tx = injected(optax.identity(), 1, solver=solver)
            w = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("data")))
            updates, _ = jax.jit(tx.update)(w, tx.init(w), scores=jnp.ones((2, 8, 4)))
            assert_spread_like(updates, w)


def test_param_specs_that_do_not_fit_are_named():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "none": None}
    x = jnp.ones((8, 4, 3))

    def scores(specs, params=params):
        fn = proma.sequence_scores(
            lambda p, x: jnp.sum(jnp.tanh(x @ p["w"] + p["b"])), param_specs=specs
        )
        return jax.eval_shape(fn, params, x)

    for fits in (None, P(), {"w": P(None, None), "b": None, "none": None}):
        assert scores(fits)[0].shape == (8,)
    for wrong, message in [
        (P(None, "model"), r"for params\['b'\] of shape \(2,\), but it has too many entries"),
        (P("model", "model"), r"for params\['b'\] .* or names an axis twice"),
        ("model", r"param_specs has 'model' for params\['b'\] .* must be a PartitionSpec"),
    ]:
        with pytest.raises(ValueError, match=message):
            scores({"w": P(), "b": wrong, "none": None})
    with pytest.raises(ValueError, match="param_specs does not fit params"):
        scores({"w": P()})
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    w, spread = jax.device_put((params["w"], x), NamedSharding(mesh, P()))
    for name, spec, message in [
        ("dta", P(), "spmd_axis_name is 'dta', but the mesh has the axes"),
        ("dta", None, "spmd_axis_name is 'dta', but the mesh has the axes"),
        ("data", P("dta"), "but the mesh has the axes"),
        ("data", P("data"), "its axes cannot be divided so"),
    ]:
        misspelt = proma.sequence_scores(
            lambda w, x: jnp.sum(jnp.tanh(x @ w)), spmd_axis_name=name, param_specs=spec
        )
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
            jax.jit(misspelt)(w, spread)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    explicit = jax.device_put(params, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="param_specs is for Auto mesh axes"):
        jax.jit(functools.partial(scores, P()))(explicit)


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        (None, P("data"), r"param_specs has .*data.* for params of shape \(8, 2\), but no mesh is"),
        ("data", P(), "spmd_axis_name is 'data', but no mesh is set: call it under `with jax.set"),
        (("replica", "data"), None, r"spmd_axis_name is \('replica', 'data'\), but no mesh is set"),
    ],
)
def test_axes_that_no_mesh_has_are_named_where_none_is_set(name, spec, message):
    def logprob_fn(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    w, x, coefficients = jnp.ones((8, 2)), jnp.ones((2, 8, 4, 8)), jnp.ones((2, 8))
    options = {"spmd_axis_name": name, "param_specs": spec}
    scores_fn = proma.sequence_scores(logprob_fn, **options)
    gradient_fn = proma.accumulated_gradient(logprob_fn, **options)
    calls = (
        lambda w, x: scores_fn(w, x[0]),
        lambda w, x: jax.jit(scores_fn)(w, x[0]),
        lambda w, x: gradient_fn(w, x, coefficients, step=0),
    )
    mesh = jax.make_mesh((1, 8), ("replica", "data"), axis_types=(AxisType.Auto,) * 2)
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(w, x)
        with jax.set_mesh(mesh):
            call(w, x)
        call(w, jax.device_put(x, NamedSharding(mesh, P(None, "data"))))


def test_specs_may_name_axes_that_shard_map_maps():
    """A device's own part is not spread over them any more."""
    params, tokens, coefficients = model()
    specs = jax.tree.map(lambda _: P("devices"), params)
    scores_fn = proma.sequence_scores(logprob_fn, param_specs=specs)
    gradient_fn = proma.accumulated_gradient(logprob_fn, param_specs=specs)

    def both(params, tokens, coefficients):
        _, scores = scores_fn(params, tokens[0])
        of_scores = proma.weighted_sum(scores, coefficients[0])
        fused, _ = gradient_fn(params, tokens[:1], coefficients[:1], step=0)
        return jax.lax.psum((of_scores, fused), "devices")

    expected = plain_gradient(logprob_fn, lambda params: params, params, tokens[0], coefficients[0])
    for found in in_shard_map(both, params, (tokens, coefficients)):
        assert_close(found, expected, 2e-5)


# Mapped axes: every device has sequences of its own.

DEVICES, OWN = 8, 2
SHAPES = {"kernel": (5, 4), "stack": (2, 3, 3), "bias": (4,), "plain": (3,)}


def microbatches(k, seed=0):
    """k pairs of (DEVICES, ...) gradients and dense scores; "plain" has no scores."""
    rng = np.random.default_rng(seed)

    return [
        (
            {name: normal(rng, DEVICES, *shape) for name, shape in SHAPES.items()},
            {name: normal(rng, DEVICES, OWN, *shape) for name, shape in SHAPES.items()}
            | {"plain": None},
        )
        for _ in range(k)
    ]


def with_layers(scores):
    return {**scores, "stack": proma.DenseScores(scores["stack"], num_layer_axes=1)}


def mapped(tx, kind, per_device=()):
    """`tx.update` of stacked gradients, state and scores, and the stacked state to start with.

    Args:
      tx: the transformation.
      kind: "shard_map" or "pmap".
      per_device: fields of the state that differ between devices.
    """
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    stacked = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), tx.init(params))

    def step(grads, state, scores):
        return tx.update(grads, state, scores=with_layers(scores))

    if kind == "pmap":
        return jax.pmap(step, axis_name="devices"), stacked
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
    specs = tx.init(params)._replace(**dict.fromkeys(per_device, P("devices")))
    specs = jax.tree.map(lambda x: x if isinstance(x, P) else P(), specs)

    def own(x):
        return jax.tree.map(lambda x: x[0], x)

    def of_own(grads, state, scores):
        state = state._replace(**{name: own(getattr(state, name)) for name in per_device})
        updates, state = step(own(grads), state, own(scores))
        lifted = {
            name: jax.tree.map(lambda x: x[None], getattr(state, name)) for name in per_device
        }
        return updates, state._replace(**lifted)

    spread = P("devices")
    of_all = jax.shard_map(
        of_own, mesh=mesh, in_specs=(spread, specs, spread), out_specs=(P(), specs)
    )
    state = tx.init(params)
    return jax.jit(of_all), state._replace(**{n: getattr(stacked, n) for n in per_device})


def run(update, state, steps):
    for grads, scores in steps:
        updates, state = update(grads, state, scores)
    return updates, state


def first_device(kind, tree):
    return jax.tree.map(lambda x: np.asarray(x)[0], tree) if kind == "pmap" else tree


def on_one(steps, **options):
    """What one device gives with the mean gradient and all scores."""
    tx = proma.accumulate(optax.identity(), len(steps), **options)
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    state = tx.init(params)
    for grads, scores in steps:
        mean = jax.tree.map(lambda x: x.mean(0), grads)
        scores = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), scores)
        updates, state = tx.update(mean, state, scores=with_layers(scores))
    return updates, state


@pytest.mark.parametrize(
    ("solver", "bound", "size"),
    [("ridge", None, 1), ("ridge", 0.5, 1e-30), ("qr", None, 1), ("svd", None, 1)],
)
@pytest.mark.parametrize("kind", ["shard_map", "pmap"])
def test_accumulation_over_a_mapped_axis_is_that_of_one_device(kind, solver, bound, size):
    steps, options = microbatches(3), {"solver": solver, "relative_bound": bound}
    steps = [(jax.tree.map(lambda g: size * g, grads), scores) for grads, scores in steps]
    tx = proma.accumulate(optax.identity(), 3, axis_name="devices", **options)
    updates, state = run(*mapped(tx, kind), steps)
    expected, expected_state = on_one(steps, **options)
    assert_close(first_device(kind, updates), expected, 2e-5)
    assert_close(first_device(kind, state), expected_state, 2e-5)


def test_two_mapped_axes_may_be_named_together():
    steps = microbatches(2)
    tx = proma.accumulate(optax.identity(), 2, axis_name=("hosts", "devices"))
    mesh = jax.make_mesh((2, 4), ("hosts", "devices"), axis_types=(AxisType.Auto,) * 2)

    def own(x):
        return jax.tree.map(lambda x: x[0], x)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(("hosts", "devices")),) * 2, out_specs=P()
    )
    def total(grads, scores):
        state = tx.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})
        for g, s in zip(grads, scores, strict=True):
            updates, state = tx.update(own(g), state, scores=with_layers(own(s)))
        return updates

    updates = total(*map(list, zip(*steps, strict=True)))
    assert_close(updates, on_one(steps)[0], 2e-5)


@pytest.mark.parametrize("kind", ["shard_map", "pmap"])
def test_running_gradients_of_each_device_are_averaged_on_emission(kind):
    steps = microbatches(3)
    tx = proma.accumulate(
        optax.identity(), 3, solver="qr", relative_bound=0.5, axis_name="devices", sync="emit"
    )
    update, state = mapped(tx, kind, per_device=("acc_grads", "accumulation_fraction"))
    updates, _ = run(update, state, steps)

    def layer(name, device, pick=lambda x: x):
        grads = [pick(np.float64(g[name][device])) for g, _ in steps]
        scores = [np.stack([pick(np.float64(s)) for s in sc[name][device]]) for _, sc in steps]
        return oracles.accumulate(grads, scores, solver="qr", relative_bound=0.5)

    def one_device(device):
        stack = [layer("stack", device, lambda x, i=i: x[i]) for i in range(2)]
        return {
            "kernel": layer("kernel", device),
            "bias": layer("bias", device),
            "stack": np.stack(stack),
            "plain": sum(np.float64(g["plain"][device]) for g, _ in steps),
        }

    each = [one_device(device) for device in range(DEVICES)]
    expected = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *each)
    assert_close(first_device(kind, updates), expected, 2e-5)


def test_nothing_is_sent_before_emission():
    tx = proma.accumulate(optax.identity(), 3, axis_name="devices", sync="emit")
    update, state = mapped(tx, "shard_map", per_device=("acc_grads", "accumulation_fraction"))
    grads, scores = microbatches(1)[0]
    text = update.lower(grads, state, scores).compile().as_text()
    assert "all-reduce(" in text
    assert "all-reduce(" not in text[text.index("ENTRY") :]


@pytest.mark.parametrize("kind", ["shard_map", "pmap"])
def test_one_devices_nan_skips_the_microbatch_everywhere(kind):
    steps = microbatches(3)
    bad_grads, bad_scores = steps[1]
    bad_scores = {**bad_scores, "kernel": bad_scores["kernel"].at[5, 0, 0, 0].set(jnp.nan)}
    options = {"should_skip_update_fn": optax.skip_not_finite}
    tx = proma.accumulate(optax.identity(), 3, axis_name="devices", **options)
    update, state = mapped(tx, kind)
    updates, _ = run(update, state, [steps[0], (bad_grads, bad_scores), steps[2]])
    expected, _ = on_one([steps[0], steps[2]])
    assert_close(first_device(kind, updates), expected, 2e-5)


@pytest.mark.parametrize("kind", ["shard_map", "pmap"])
def test_intra_projects_each_devices_microbatch_and_averages(kind):
    rng = np.random.default_rng(0)
    inputs = normal(rng, DEVICES, OWN, 6, 5)
    output_grads = normal(rng, DEVICES, OWN, 6, 4)
    grads = normal(rng, DEVICES, 5, 4)
    tx = proma.project_intra(rank=2, axis_name="devices")
    state = tx.init(grads[0])
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng_key), 0)
    starts = [np.float64(jax.random.normal(key, (2, d))) for d in (5, 4)]
    projected = [
        oracles.project_intra(g, x.reshape(-1, 5), d.reshape(-1, 4), starts, 2)
        for g, x, d in zip(*map(np.asarray, (grads, inputs, output_grads)), strict=True)
    ]

    def step(g, x, d):
        return tx.update(g, tx.init(g), scores=proma.LayerFactors(x, d))

    if kind == "pmap":
        updates, state = jax.pmap(step, axis_name="devices")(grads, inputs, output_grads)
    else:
        mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
        updates, state = jax.jit(
            jax.shard_map(
                lambda *own: step(*(x[0] for x in own)),
                mesh=mesh,
                in_specs=P("devices"),
                out_specs=P(),
            )
        )(grads, inputs, output_grads)
    assert_close(first_device(kind, updates), np.mean(projected, axis=0), 2e-5)
    removed = np.linalg.norm(np.float64(grads) - projected) / np.linalg.norm(np.float64(grads))
    fraction = first_device(kind, state).intra_fraction
    np.testing.assert_allclose(fraction, removed, rtol=1e-5)


def in_shard_map(fn, replicated, spread):
    """`fn` on each of eight devices' shares of the sequences, the second axis of `spread`."""
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
    own = P(None, "devices")
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=(P(), *[own] * len(spread)), out_specs=P())
    return jax.jit(mapped)(replicated, *spread)


def test_scores_in_shard_map_are_the_devices_own():
    """A gradient with respect to what all devices share would be summed over them."""
    params, tokens, coefficients = model()
    tx = proma.accumulate(optax.identity(), 2)
    tx_on_axis = proma.accumulate(optax.identity(), 2, axis_name="devices")

    def gradient(tx, params, tokens, coefficients):
        state = tx.init(params)
        for m in range(2):
            _, scores = proma.sequence_scores(logprob_fn)(params, tokens[m])
            grads = proma.weighted_sum(scores, coefficients[m])
            updates, state = tx.update(grads, state, params, scores=scores)
        return updates

    on_axis = functools.partial(gradient, tx_on_axis)
    updates = in_shard_map(on_axis, params, (tokens, coefficients))
    expected = jax.jit(functools.partial(gradient, tx))(params, tokens, coefficients / DEVICES)
    assert_close(updates, expected, 2e-5)


def varying(x):
    return jax.lax.pcast(x, "devices", to="varying")


def test_gradients_of_a_loss_in_shard_map_are_taken_of_varying_parameters():
    params, tokens, coefficients = model()

    def gradients(params, tokens, coefficients):
        def loss(params):
            logprobs = jax.vmap(logprob_fn, (None, 0))(params, tokens[0])
            return jnp.sum(coefficients[0] * logprobs)

        _, scores = proma.sequence_scores(logprob_fn)(params, tokens[0])
        both = jax.grad(loss)(varying(params)), proma.weighted_sum(scores, coefficients[0])
        return jax.lax.pmean(both, "devices")

    of_loss, of_scores = in_shard_map(gradients, params, (tokens, coefficients))
    assert_close(of_loss, of_scores, 2e-5)


@pytest.mark.parametrize("scanned", [False, True])
def test_a_state_made_in_shard_map_may_be_the_same_on_all_devices_at_first(scanned):
    """A scan wants to be told that it does not stay so."""
    steps = microbatches(2)
    tx = proma.accumulate(optax.identity(), 2, axis_name="devices", sync="emit")
    update, state = mapped(tx, "shard_map", per_device=("acc_grads", "accumulation_fraction"))
    expected, _ = run(update, state, steps)

    def both(_, grads, scores):
        state = tx.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})
        own = jax.tree.map(lambda x: x[:, 0], (grads, scores))

        def add(state, own):
            updates, state = tx.update(own[0], state, scores=with_layers(own[1]))
            return state, updates

        if scanned:
            differing = varying((state.acc_grads, state.accumulation_fraction))
            state = state._replace(acc_grads=differing[0], accumulation_fraction=differing[1])
            return jax.tree.map(lambda x: x[-1], jax.lax.scan(add, state, own)[1])
        for m in range(2):
            state, updates = add(state, jax.tree.map(lambda x, m=m: x[m], own))
        return updates

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *steps)
    assert_close(in_shard_map(both, (), stacked), expected)


@pytest.mark.parametrize("inner", [INNER, optax.adafactor(0.1)])
def test_without_an_axis_name_every_device_goes_by_itself(inner):
    steps, tx = microbatches(2), proma.accumulate(inner, 2)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *steps)

    def own_updates(grads, scores):
        state = tx.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})
        for m in range(2):
            g, s = jax.tree.map(lambda x, m=m: x[m], (grads, with_layers(scores)))
            updates, state = tx.update(g, state, g, scores=s)
        return updates

    def on_device(grads, scores):
        own = jax.tree.map(lambda x: x[0], (grads, scores))
        return jax.tree.map(lambda x: x[None], own_updates(*own))

    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"))
    assert_close(jax.jit(mapped)(*stacked), jax.vmap(own_updates)(*stacked), 2e-5)


def test_gradients_through_intra_pass_a_mapped_axis():
    factors = proma.LayerFactors(jnp.ones((DEVICES, OWN, 6, 5)), jnp.ones((DEVICES, OWN, 6, 4)))
    grads = normal(0, DEVICES, 5, 4)
    tx = proma.project_intra(rank=1, axis_name="devices")

    def loss(g, scores):
        return jnp.sum(tx.update(g, tx.init(g), scores=scores)[0] ** 2)

    gradient = jax.pmap(jax.grad(loss), axis_name="devices")(grads, factors)
    chex.assert_tree_all_finite(gradient)
    assert jnp.any(gradient)


def test_the_fused_form_in_shard_map_is_of_the_devices_own_sequences():
    params, tokens, coefficients = model()
    gradient_fn = proma.accumulated_gradient(
        logprob_fn, accumulation=proma.Accumulation(), intra=proma.Intra(rank=2)
    )

    def mean_gradient(params, tokens, coefficients):
        return jax.lax.pmean(gradient_fn(params, tokens, coefficients, 0)[0], "devices")

    mean = in_shard_map(mean_gradient, params, (tokens, coefficients))
    own = jax.jit(lambda t, c: gradient_fn(params, t, c, 0)[0])
    expected = jax.tree.map(
        lambda *xs: np.mean(xs, axis=0),
        *[own(tokens[:, [i]], coefficients[:, [i]]) for i in range(DEVICES)],
    )
    assert_close(mean, expected, 2e-5)


def test_sync_on_emission_needs_an_axis():
    with pytest.raises(ValueError, match="sync='emit' needs the axis_name"):
        proma.accumulate(optax.identity(), 2, sync="emit")
    with pytest.raises(ValueError, match="sync='never' must be one of 'microbatch', 'emit'"):
        proma.accumulate(optax.identity(), 2, axis_name="devices", sync="never")
    for make in (proma.project_intra, functools.partial(proma.accumulate, optax.identity(), 2)):
        for wrong in (["devices"], (), 0):
            with pytest.raises(ValueError, match=r"axis_name=.* must be None, the name of"):
                make(axis_name=wrong)
