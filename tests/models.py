"""Tiny language models that use their parameters in every way that the capture of scores knows.

`MODELS[name]()` makes a `Model`. Most are a decoder with one layer of interest: its parameters are
under "layer", between an embedding table "embed" and a matrix "head". `twins()` makes the same
model twice, unrolled and scanned.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

BATCH, TOKENS, WIDTH, HEADS, LAYERS, VOCABULARY = 4, 6, 4, 2, 3, 9


class Model(NamedTuple):
    """What `sequence_scores` takes: a function of one sequence, parameters, and b sequences."""

    logprob_fn: Callable[[Any, Any], Any]
    params: Any
    microbatch: Any


MODELS: dict[str, Callable[[], Model]] = {}


def random_like(tree, seed=0):
    """Normal numbers in place of every leaf, zero-initialised ones too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), tree)


def kernels(dtype=jnp.float32, **shapes):
    """Random parameters of these shapes."""
    return random_like({name: jax.ShapeDtypeStruct(s, dtype) for name, s in shapes.items()})


def microbatch():
    """(b, tokens + 1) token ids: each sequence repeats some."""
    shape = (BATCH, TOKENS + 1)
    return jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, shape), jnp.int32)


def logprob(logits, tokens):
    """Log-probability of `tokens` under (tokens, vocabulary) logits."""
    return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1))


def decoder(layer, layer_params, dtype=jnp.float32):
    """A language model whose hidden states go through `layer(layer_params, hidden)`."""
    ends = kernels(dtype, embed=(VOCABULARY, WIDTH), head=(WIDTH, VOCABULARY))

    def logprob_fn(params, tokens):
        hidden = params["embed"][tokens[:-1]]
        hidden = hidden + layer(params["layer"], hidden)
        return logprob(hidden @ params["head"], tokens[1:])

    return Model(logprob_fn, {**ends, "layer": layer_params}, microbatch())


def plain(dtype=jnp.float32, **shapes):
    """Registers a decoder around the decorated layer, a function of (parameters, hidden states)."""

    def register(layer):
        name = layer.__name__
        MODELS[name] = functools.cache(lambda: decoder(layer, kernels(dtype, **shapes), dtype))
        return layer

    return register


def whole(model):
    """Registers the decorated function, which returns a whole `Model`."""
    MODELS[model.__name__] = functools.cache(model)
    return model


SQUARE = (WIDTH, WIDTH)
STACK = (LAYERS, WIDTH, WIDTH)


# Plain JAX: one matmul.


@plain(w=SQUARE, b=(WIDTH,), w2=SQUARE)
def mlp(p, h):
    return jnp.tanh(h @ p["w"] + p["b"]) @ p["w2"]


@plain(w=(WIDTH + 1, WIDTH))
def kernel_on_the_left(p, h):
    return (p["w"] @ h.T).T[:, :-1]


@plain(w=(2, WIDTH * WIDTH // 2))
def kernel_reshaped(p, h):
    return h @ jnp.squeeze(p["w"].reshape(1, WIDTH, WIDTH), 0)


@plain(w=(2, WIDTH, WIDTH // 2))
def kernel_transposed(p, h):
    return h @ p["w"].transpose(2, 0, 1).reshape(WIDTH, WIDTH).T[None].squeeze(0)


@plain(w=SQUARE)
def kernel_cast(p, h):
    return (h.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32)


@plain(w=SQUARE)
def product_of_another_type(p, h):
    h, w = h.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16)
    return jnp.matmul(h, w, precision="highest", preferred_element_type=jnp.float32)


@plain(jnp.bfloat16, w=SQUARE)
def bfloat16_parameters(p, h):
    return h @ p["w"]


@plain(w=(WIDTH, HEADS, 2), out=(HEADS, 2, WIDTH))
def several_axes(p, h):
    return jnp.einsum("thd,hdo->to", jnp.tanh(jnp.einsum("ti,ihd->thd", h, p["w"])), p["out"])


@plain(w=(HEADS, WIDTH, WIDTH))
def batched_kernel(p, h):
    heads = jnp.tanh(jnp.einsum("hti,hio->hto", jnp.stack([h, jnp.tanh(h)]), p["w"]))
    return heads[0] + heads[1]


@plain(w=(WIDTH, HEADS, 2))
def kernel_batched_in_the_middle(p, h):
    return jnp.einsum("thd,ohd->tho", h.reshape(TOKENS, HEADS, 2), p["w"]).reshape(TOKENS, -1)[
        :, :WIDTH
    ]


@plain(w=SQUARE)
def batched_inputs(p, h):
    return jnp.tanh(h.reshape(2, TOKENS // 2, WIDTH) @ p["w"]).reshape(TOKENS, WIDTH)


@plain(v=(WIDTH,), w=(WIDTH, 1))
def vectors(p, h):
    return jnp.tanh(h @ p["v"])[:, None] + h @ p["w"]


@plain(w=SQUARE)
def one_token_alone(p, h):
    return jnp.tanh(h[0] @ p["w"])


@plain(w=SQUARE)
def no_tokens(p, h):
    return jnp.sum(h[:0] @ p["w"])


@plain(w=SQUARE, q=SQUARE, k=SQUARE)
def equal_inputs(p, h):
    h = jnp.tanh(h)
    return (h @ p["w"]) * (h @ p["q"]) + h @ p["k"]


# Plain JAX: several uses.


@plain(w=SQUARE)
def kernel_used_twice(p, h):
    return jnp.tanh(jnp.tanh(h @ p["w"]) @ p["w"])


@plain(w=SQUARE)
def kernel_used_both_ways(p, h):
    return jnp.tanh(h @ p["w"]) @ p["w"].T


@whole
def tied_embedding():
    def logprob_fn(params, tokens):
        hidden = jnp.tanh(params["embed"][tokens[:-1]] @ params["w"])
        return logprob(hidden @ params["embed"].T, tokens[1:])

    params = kernels(embed=(VOCABULARY, WIDTH), w=SQUARE)
    return Model(logprob_fn, params, microbatch())


@plain(w=SQUARE)
def kernel_and_its_norm(p, h):
    return h @ p["w"] - 0.1 * jnp.sum(p["w"] ** 2)


@plain(w=SQUARE)
def kernel_times_itself(p, h):
    return h @ (p["w"] @ p["w"])


@plain(a=(WIDTH, 2), b=(2, WIDTH))
def product_of_kernels(p, h):
    return h @ (p["a"] @ p["b"])


@plain(a=(WIDTH, 2), b=(2, WIDTH))
def low_rank(p, h):
    return h @ p["a"] @ p["b"]


@plain(unused=(3,))
def unused(p, h):
    return jnp.tanh(h)


@whole
def kernel_returned():
    """The (1, 1) kernel of a matmul is also the function's value, unchanged."""

    def logprob_fn(params, tokens):
        logits = tokens[:-1, None].astype(jnp.float32) @ params["w"]
        return {"value": params["w"].reshape(()), "aux": logits}["value"]

    return Model(logprob_fn, kernels(w=(1, 1)), microbatch())


@whole
def kernel_used_and_returned_in_turn():
    """The value passes through a jit together with the kernel that the jit uses."""

    @jax.jit
    def inner(w, x):
        return w.reshape(()), jnp.sum(jnp.tanh(x @ w))

    def logprob_fn(params, tokens):
        value, total = inner(params["w"], tokens[:-1, None].astype(jnp.float32))
        return value + 0 * total

    return Model(logprob_fn, kernels(w=(1, 1)), microbatch())


# Plain JAX: parts of parameters, and parameters in parts.


@plain(w=STACK)
def stack_indexed(p, h):
    for i in range(LAYERS):
        h = jnp.tanh(h @ p["w"][i])
    return h


@plain(w=STACK)
def stack_indexed_otherwise(p, h):
    """By every other function that reads one slice at a number known when it is traced."""
    h = jnp.tanh(h @ jnp.take(p["w"], 1, axis=0))
    h = jnp.tanh(h @ p["w"][jnp.asarray(-1)])
    return jnp.tanh(h @ jax.lax.dynamic_index_in_dim(p["w"], 0, keepdims=False))


@plain(w=(2, LAYERS, WIDTH, WIDTH))
def stack_with_two_axes_indexed(p, h):
    return jnp.tanh(h @ p["w"][1, 0]) @ p["w"][0, jnp.asarray(2)]


@plain(w=STACK)
def stack_unstacked(p, h):
    first, second, third = jnp.unstack(p["w"])
    return jnp.tanh(h @ second) @ third + jnp.tanh(h[:2] @ first).sum(0)


@plain(w=STACK)
def stack_in_another_order(p, h):
    return jax.lax.scan(scanned_matmul, h, p["w"][jnp.array([2, 0, 1])])[0]


@plain(w=STACK)
def stack_in_a_loop(p, h):
    return jax.lax.fori_loop(0, LAYERS, lambda i, h: jnp.tanh(h @ p["w"][i]), h)


@plain(w=(2, WIDTH, WIDTH))
def stack_in_a_loop_in_turn(p, h):
    """Two layers take turns, backwards, in a loop that counts down by itself."""

    def step(carry, _):
        h, i = carry
        w = jax.lax.dynamic_index_in_dim(p["w"], i % 2, keepdims=False)
        return (jnp.tanh(h @ w), i - 1), None

    return jax.lax.scan(jax.checkpoint(step), (h, 4), length=5)[0][0]


@plain(w=STACK, s=(LAYERS, WIDTH))
def stack_by_scanned_numbers(p, h):
    def step(h, i):
        return jnp.tanh(h @ p["w"][i] * p["s"][i]), None

    return jax.lax.scan(step, h, jnp.arange(LAYERS), reverse=True)[0]


@plain(w=STACK)
def stack_by_numbers_from_the_data(p, h):
    numbers = jnp.argsort(h[:LAYERS, 0])
    return jax.lax.scan(lambda h, i: (jnp.tanh(h @ p["w"][i]), None), h, numbers)[0]


@plain(w=STACK, b=(LAYERS, WIDTH))
def experts_by_token(p, h):
    expert = jnp.argmax(h[:, :LAYERS], axis=-1)
    return jnp.einsum("ti,tio->to", h, p["w"][expert]) + p["b"][expert]


@plain(w=STACK)
def experts_in_a_loop(p, h):
    gates = jax.nn.softmax(h[:, :LAYERS])
    return sum(gates[:, i, None] * jnp.tanh(h @ p["w"][i]) for i in range(LAYERS))


@plain(w=STACK)
def experts_in_a_scan(p, h):
    gates = jax.nn.softmax(h[:, :LAYERS]).T

    def add(total, inputs):
        gate, w = inputs
        return total + gate[:, None] * jnp.tanh(h @ w), None

    return jax.lax.scan(jax.checkpoint(add), jnp.zeros_like(h), (gates, p["w"]))[0]


@plain(w=(LAYERS, WIDTH))
def vectors_indexed(p, h):
    return sum(jnp.tanh(h * p["w"][i]) for i in range(LAYERS))


@plain(w=(LAYERS,))
def scalars_indexed(p, h):
    return sum(jnp.tanh(h * p["w"][i]) for i in range(LAYERS))


@plain(w=(WIDTH, 3 * WIDTH))
def kernel_split(p, h):
    query, key, value = jnp.split(p["w"], 3, axis=1)
    return jnp.tanh(h @ query) * jnp.tanh(h @ key) + h @ value


@plain(w=(WIDTH, 2 * WIDTH))
def kernel_split_for_two_inputs(p, h):
    return jnp.tanh(h @ p["w"][:, :WIDTH]) @ p["w"][:, WIDTH:]


@plain(w=(WIDTH, 2 * WIDTH))
def kernel_interleaved(p, h):
    return jnp.tanh(h @ p["w"][:, ::2]) * (h @ p["w"][:, 1::2])


@plain(w=SQUARE)
def kernel_sliced(p, h):
    return h[:, :2] @ p["w"][:2]


@plain(w=SQUARE)
def kernel_reversed(p, h):
    return jnp.tanh(h @ p["w"][::-1]) @ jnp.flip(p["w"])


@plain(q=(WIDTH, 3), k=(WIDTH, 1))
def kernels_concatenated(p, h):
    return jnp.tanh(h @ jnp.concatenate([p["q"], jnp.ones((WIDTH, 1)), p["k"]], axis=1))[:, 1:] @ (
        jnp.concatenate([p["q"], p["k"]], axis=1)
    )


@plain(q=(3, WIDTH), k=(1, WIDTH))
def kernels_concatenated_along_rows(p, h):
    return h @ jnp.concatenate([p["k"], p["q"]])


@plain(q=SQUARE, k=SQUARE, v=SQUARE)
def kernels_stacked(p, h):
    return jax.lax.scan(scanned_matmul, h, jnp.stack([p["q"], p["k"], p["v"]]))[0]


@plain(q=SQUARE, k=SQUARE)
def kernels_stacked_for_one_product(p, h):
    q, k = jnp.einsum("ti,sio->sto", h, jnp.stack([p["q"], p["k"]]))
    return jnp.tanh(q) * k


@plain(w=(WIDTH, 3))
def kernel_padded(p, h):
    return h @ jnp.pad(p["w"], ((0, 0), (0, 1)))


@plain(w=SQUARE)
def kernel_scaled(p, h):
    return jnp.tanh(h @ (0.5 * p["w"])) @ (-p["w"] / 3)


@plain(w=SQUARE, v=SQUARE)
def kernels_added(p, h):
    return h @ (p["w"] - 2 * p["v"])


@plain(w=SQUARE)
def kernel_behind_a_barrier(p, h):
    w, _ = jax.lax.optimization_barrier((p["w"], h))
    return h @ jax.lax.reduce_precision(w, 8, 10)


@plain(w=(WIDTH * WIDTH,))
def kernel_kept_flat(p, h):
    return h @ p["w"].reshape(WIDTH, WIDTH)


@plain(w=(LAYERS * WIDTH, WIDTH))
def stack_kept_flat(p, h):
    return jax.lax.scan(scanned_matmul, h, p["w"].reshape(STACK))[0]


@plain(w=SQUARE)
def kernel_for_each_group(p, h):
    """The same kernel for two groups of tokens, as a batch that it is broadcast to."""
    groups = h.reshape(2, TOKENS // 2, WIDTH)
    kernels = jnp.broadcast_to(p["w"], (2, *SQUARE))
    return jnp.einsum("gti,gio->gto", groups, kernels).reshape(h.shape)


@plain(w=(1, WIDTH, WIDTH))
def pointwise_convolution(p, h):
    return jax.lax.conv_general_dilated(
        h[None], p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0]


@plain(w=(WIDTH, WIDTH, 1, 1))
def pointwise_convolution_of_planes(p, h):
    planes = h.T.reshape(1, WIDTH, 2, TOKENS // 2)
    return jax.lax.conv_general_dilated(planes, p["w"], (1, 1), "VALID").reshape(WIDTH, TOKENS).T


def head_in_chunks(h, head):
    """The log-sum-exp of the logits, a third of the vocabulary at a time."""
    chunks = head.reshape(WIDTH, 3, VOCABULARY // 3).transpose(1, 0, 2)

    def step(total, chunk):
        return jnp.logaddexp(total, jax.nn.logsumexp(h @ chunk, axis=-1)), None

    return jax.lax.scan(jax.checkpoint(step), jnp.full(len(h), -jnp.inf), chunks)[0]


@plain(w=(WIDTH, VOCABULARY))
def vocabulary_in_chunks(p, h):
    return h + jnp.tanh(head_in_chunks(h, p["w"]))[:, None]


@plain(w=(WIDTH, VOCABULARY))
def vocabulary_in_unrolled_chunks(p, h):
    chunks = p["w"].reshape(WIDTH, 3, VOCABULARY // 3)
    return h + jnp.tanh(sum(jax.nn.logsumexp(h @ chunks[:, i], axis=-1) for i in range(3)))[:, None]


@whole
def head_read_by_its_targets():
    """Logits of the targets from rows of the head, the log-sum-exp from the whole head."""

    def logprob_fn(params, tokens):
        hidden, head = jnp.tanh(params["embed"][tokens[:-1]] @ params["w"]), params["head"].T
        chosen = jnp.sum(hidden * head[tokens[1:]], axis=-1)
        return jnp.sum(chosen - jax.nn.logsumexp(hidden @ head.T, axis=-1))

    params = kernels(embed=(VOCABULARY, WIDTH), w=SQUARE, head=(WIDTH, VOCABULARY))
    return Model(logprob_fn, params, microbatch())


@plain(w=(3, WIDTH, WIDTH))
def convolution(p, h):
    return jax.lax.conv_general_dilated(
        h[None], p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0]


@plain(w=(2, 3, 2, WIDTH))
def convolution_of_planes(p, h):
    """Strided, dilated, padded, and with axes in an unusual order."""
    planes = h.reshape(2, TOKENS // 2, 2, 2)
    return (
        jax.lax.conv_general_dilated(
            planes,
            p["w"],
            window_strides=(2, 1),
            padding=((1, 1), (2, 0)),
            lhs_dilation=(1, 2),
            rhs_dilation=(1, 2),
            dimension_numbers=("HWNC", "HWIO", "NCWH"),
        )
        .reshape(-1)[: h.size]
        .reshape(h.shape)
    )


@plain(v=(3, WIDTH, WIDTH), g=(WIDTH,))
def convolution_with_a_computed_kernel(p, h):
    return jax.lax.conv_general_dilated(
        h[None], p["v"] * p["g"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0]


@plain(w=(3, 1, WIDTH))
def depthwise_convolution(p, h):
    return jax.lax.conv_general_dilated(
        h[None],
        p["w"],
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=WIDTH,
    )[0]


# Plain JAX: lookups.


@whole
def lookups():
    """Every way to index a table, with indices out of bounds too."""

    def logprob_fn(params, tokens):
        far = tokens[:-1] * 2 - 6
        hidden = params["fill"].at[far].get(mode="fill", fill_value=0.5)
        hidden = hidden + params["clip"].at[far].get(mode="clip")
        hidden = hidden + params["promised"].at[tokens[:-1]].get(mode="promise_in_bounds")
        hidden = hidden + jnp.take(params["taken"], tokens[:-1].reshape(2, -1), axis=0).reshape(
            -1, WIDTH
        )
        hidden = hidden + params["wide"][tokens[:-1]].sum(1) + params["scalars"][tokens[:-1], None]
        hidden = hidden + params["columns"][:, tokens[:-1]].T + params["one_row"][tokens[0]]
        return logprob(jnp.tanh(hidden) @ params["head"], tokens[1:])

    table = (VOCABULARY, WIDTH)
    names = ("fill", "clip", "promised", "taken", "one_row")
    tables = {name: table for name in names}
    others = {"wide": (VOCABULARY, 2, WIDTH), "scalars": (VOCABULARY,), "columns": table[::-1]}
    params = kernels(**tables, **others, head=(WIDTH, VOCABULARY))
    return Model(logprob_fn, params, microbatch())


@whole
def tables_of_layers():
    """A scan in which every layer looks tokens up in a table of its own."""

    def logprob_fn(params, tokens):
        def step(hidden, p):
            return jnp.tanh((hidden + p["table"][tokens[:-1]]) @ p["w"]), None

        hidden = jax.lax.scan(step, jnp.zeros((TOKENS, WIDTH)), params["layers"])[0]
        return logprob(hidden @ params["head"], tokens[1:])

    layers = kernels(table=(LAYERS, VOCABULARY, WIDTH), w=STACK)
    params = {**kernels(head=(WIDTH, VOCABULARY)), "layers": layers}
    return Model(logprob_fn, params, microbatch())


@whole
def tables_read_otherwise():
    """Row by row under `jax.vmap` and in a scan, in parts, scaled, by columns, and by kernels."""

    def logprob_fn(params, tokens):
        read = tokens[:-1]
        hidden = jax.vmap(lambda i: params["mapped"][i])(read)
        hidden = hidden + jax.lax.map(lambda i: params["scanned"][i], read)
        rows = jnp.concatenate([params["old"], params["new"]])
        hidden = hidden + rows[read] + 2 * (params["scaled"] * 0.25)[read]
        hidden = hidden + params["wide"][read].reshape(TOKENS, -1)[:, :WIDTH]
        hidden = hidden + jnp.take(params["columns"], read, axis=1).T
        hidden = hidden + jax.vmap(lambda i: params["last"][:, i])(read)
        return logprob(jnp.tanh(hidden) @ params["head"], tokens[1:])

    table = (VOCABULARY, WIDTH)
    tables = dict.fromkeys(("mapped", "scanned", "scaled"), table)
    others = {"wide": (VOCABULARY, 2, WIDTH), "columns": table[::-1], "last": table[::-1]}
    parts = {"old": (VOCABULARY - 2, WIDTH), "new": (2, WIDTH)}
    params = kernels(**tables, **others, **parts, head=(WIDTH, VOCABULARY))
    return Model(logprob_fn, params, microbatch())


# Plain JAX: transformations.


def block(p, h):
    return jnp.tanh(h @ p["w"] + p["b"])


def scanned_block(h, p):
    return block(p, h), None


@plain(w=SQUARE, b=(WIDTH,))
def jit(p, h):
    return jax.jit(jax.jit(block))(p, h)


@plain(w=SQUARE, b=(WIDTH,))
def jit_called_twice(p, h):
    layer = jax.jit(block)
    return layer(p, layer(p, h))


@plain(w=SQUARE)
def jit_returns_its_parameter(p, h):
    once = jax.jit(lambda w, h: (w.T, jnp.tanh(h @ w)))
    w, h = once(p["w"], h)
    return once(w, h)[1]


@plain(w=SQUARE, b=(WIDTH,))
def checkpoint(p, h):
    return jax.checkpoint(block)(p, h)


@plain(w=SQUARE, b=(WIDTH,), w2=SQUARE)
def checkpoint_with_a_policy(p, h):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    layer = jax.checkpoint(lambda p, h: block(p, h) @ p["w2"], policy=policy, prevent_cse=False)
    return layer(p, h)


@plain(w=SQUARE, b=(WIDTH,))
def checkpoint_closes_over_its_parameters(p, h):
    return jax.checkpoint(lambda h: jax.jit(lambda h: block(p, h))(h))(h)


@plain(w=STACK, b=(LAYERS, WIDTH))
def scan(p, h):
    return jax.lax.scan(scanned_block, h, p)[0]


@plain(w=STACK, b=(LAYERS, WIDTH))
def scan_backwards_and_unrolled(p, h):
    return jax.lax.scan(scanned_block, h, p, reverse=True, unroll=2)[0]


@plain(w=STACK, b=(LAYERS, WIDTH))
def scan_of_checkpoints(p, h):
    return jax.lax.scan(jax.checkpoint(scanned_block, prevent_cse=False), h, p)[0]


@plain(w=(1, WIDTH, WIDTH), b=(1, WIDTH))
def scan_of_one(p, h):
    return jax.lax.scan(scanned_block, h, p)[0]


@plain(w=(2, LAYERS, WIDTH, WIDTH), b=(2, LAYERS, WIDTH))
def scan_in_a_scan(p, h):
    return jax.lax.scan(lambda h, p: (scan(p, h), None), h, p)[0]


@plain(w=(LAYERS, 2, WIDTH, WIDTH), b=(LAYERS, 2, WIDTH))
def scan_in_a_scan_transposed(p, h):
    swapped = jax.tree.map(lambda x: x.swapaxes(0, 1), p)
    return jax.lax.scan(lambda h, p: (scan(p, h), None), h, swapped)[0]


@plain(w=(2 * LAYERS, WIDTH, WIDTH))
def scan_over_a_reshaped_stack(p, h):
    stacked = p["w"].reshape(LAYERS, 2, WIDTH, WIDTH)
    return jax.lax.scan(lambda h, w: (jax.lax.scan(scanned_matmul, h, w)[0], None), h, stacked)[0]


def scanned_matmul(h, w):
    return jnp.tanh(h @ w), None


@plain(w=STACK)
def two_scans(p, h):
    h = jax.lax.scan(scanned_matmul, h, p["w"])[0]
    return jax.lax.scan(scanned_matmul, h, p["w"])[0]


@plain(w=STACK)
def two_scans_of_which_one_transposes(p, h):
    h = jax.lax.scan(scanned_matmul, h, p["w"])[0]
    return jax.lax.scan(scanned_matmul, h, p["w"].swapaxes(1, 2))[0]


@plain(w=SQUARE)
def scan_and_loop_share_a_square(p, h):
    """One use takes the rows of the kernel as four layers, the other the kernel whole."""
    total = jax.lax.scan(lambda c, row: (c + (h @ row)[:, None], None), jnp.zeros_like(h), p["w"])
    return total[0] + h @ p["w"]


@plain(w=STACK, shared=SQUARE)
def scan_with_a_shared_kernel(p, h):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w) @ p["shared"], None), h, p["w"])[0]


@plain(w=SQUARE, u=SQUARE)
def recurrent(p, h):
    def step(state, x):
        state = jnp.tanh(state @ p["w"] + x @ p["u"])
        return state, state

    return jax.lax.scan(step, jnp.zeros(WIDTH), h)[1]


@plain(w=SQUARE)
def kernel_carried(p, h):
    def step(carry, _):
        w, h = carry
        return (w, jnp.tanh(h @ w)), None

    (w, h), _ = jax.lax.scan(step, (p["w"], h), length=2)
    return h @ w


@plain(w=SQUARE, v=SQUARE)
def kernels_swapped_in_the_carry(p, h):
    def step(carry, _):
        w, v, h = carry
        return (v, w, jnp.tanh(h @ w)), None

    return jax.lax.scan(step, (p["w"], p["v"], h), length=3)[0][2]


@plain(w=SQUARE)
def kernel_transposed_in_the_carry(p, h):
    def step(carry, _):
        w, h = carry
        return (w.T, jnp.tanh(h @ w)), None

    return jax.lax.scan(step, (p["w"], h), length=3)[0][1]


@plain(w=SQUARE, v=SQUARE)
def kernel_put_into_the_carry(p, h):
    def step(carry, _):
        w, h = carry
        return (p["v"], jnp.tanh(h @ w)), None

    return jax.lax.scan(step, (p["w"], h), length=2)[0][1] @ p["v"]


@plain(w=STACK)
def scan_returns_its_parameters(p, h):
    h, w = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), w), h, p["w"])
    return jax.lax.scan(scanned_matmul, h, w)[0]


@plain(w=STACK)
def scan_returns_its_parameters_transposed(p, h):
    """Stacked backwards, read forwards: every slice stays at its index."""
    w = jax.lax.scan(lambda c, w: (c, w.T), 0, p["w"], reverse=True)[1]
    return jax.lax.scan(scanned_matmul, h, w)[0]


@plain(w=STACK)
def scan_returns_and_uses_its_parameters_transposed(p, h):
    h, w = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), w.T), h, p["w"])
    return jax.lax.scan(scanned_matmul, h, w)[0]


@plain(w=SQUARE)
def scan_stacks_a_kernel(p, h):
    w = jax.lax.scan(lambda c, _: (c, p["w"]), 0, length=2)[1]
    return jnp.tanh(h @ p["w"]) + jax.lax.scan(scanned_matmul, h, w)[0]


@plain(w=STACK)
def last_layer_of_a_scan(p, h):
    """The carry ends as the last slice of a stack that is also used layer by layer."""
    w = jax.lax.scan(lambda c, w: (w, None), jnp.zeros(SQUARE), p["w"])[0]
    return jax.lax.scan(scanned_matmul, h, p["w"])[0] @ w


@plain(w=SQUARE)
def fori_loop(p, h):
    return jax.lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ p["w"]), h)


@plain(w=SQUARE, v=SQUARE)
def cond(p, h):
    h = h @ p["v"]
    return jax.lax.cond(h[0, 0] > 0, lambda h: jnp.tanh(h @ p["w"]), lambda h: h, h)


@plain(w=SQUARE, v=SQUARE)
def cond_chooses_a_kernel(p, h):
    return h @ jax.lax.cond(h[0, 0] > 0, lambda: p["w"], lambda: p["v"]) + h @ p["w"]


@plain(w=SQUARE, v=SQUARE)
def while_loop_on_the_side(p, h):
    n = jax.lax.while_loop(lambda n: n @ n < 9, lambda n: n @ p["v"] * 9 + 9, jnp.ones(WIDTH))
    return jnp.tanh(h @ p["w"]) + jax.lax.stop_gradient(n)


@plain(w=SQUARE, v=SQUARE)
def stopped_gradient(p, h):
    return h @ jax.lax.stop_gradient(p["w"]) + h @ p["w"] + h @ jax.lax.stop_gradient(p["v"])


@jax.custom_vjp
def doubled_gradient(h, w):
    return h @ w


doubled_gradient.defvjp(lambda h, w: (h @ w, (h, w)), lambda r, g: (2 * g @ r[1].T, 2 * r[0].T @ g))


@plain(w=SQUARE, v=SQUARE)
def custom_vjp(p, h):
    return doubled_gradient(h @ p["v"], p["w"])


@jax.custom_jvp
def leaky_product(h, w):
    return jax.nn.relu(h @ w)


@leaky_product.defjvp
def _(primals, tangents):
    (h, w), (dh, dw) = primals, tangents
    return leaky_product(h, w), dh @ w + h @ dw


@plain(w=SQUARE, v=SQUARE)
def custom_jvp(p, h):
    return leaky_product(jax.nn.silu(h @ p["v"]), p["w"])


@plain(w=(HEADS, WIDTH, 2))
def vmapped_heads(p, h):
    return jax.vmap(lambda w: jnp.tanh(h @ w), out_axes=1)(p["w"]).reshape(TOKENS, WIDTH)


@plain(w=SQUARE)
def vmapped_tokens(p, h):
    return jax.vmap(lambda x: jnp.tanh(x @ p["w"]))(h)


@plain(w=(LAYERS, HEADS, WIDTH, 2))
def scanned_heads(p, h):
    return jax.lax.scan(lambda h, w: (vmapped_heads({"w": w}, h), None), h, p["w"])[0]


@plain(w=SQUARE)
def gradient_inside(p, h):
    """A gradient with respect to the inputs is part of the model."""
    return jax.grad(lambda h: jnp.sum(jnp.tanh(h @ p["w"])))(h)


@plain(w=SQUARE, v=SQUARE, u=SQUARE)
def equal_inputs_without_a_gradient(p, h):
    """The first of three matmuls with the same inputs leads nowhere."""
    h = jnp.tanh(h)
    first, second, third = h @ p["w"], h @ p["v"], h @ p["u"]
    return jax.lax.stop_gradient(first) + second * third


@plain(w=SQUARE)
def inputs_also_go_where_no_gradient_can(p, h):
    fixed = jnp.ones((TOKENS, WIDTH))
    n = jax.lax.while_loop(lambda n: jnp.sum(n) < 99, lambda n: n * 2, fixed)
    return fixed @ p["w"] + h * n


@plain(w=SQUARE, v=SQUARE)
def constant_operands(p, h):
    """The other operand, or the kernel, is a NumPy array that the function closes over."""
    constant = np.arange(WIDTH * TOKENS, dtype=np.float32).reshape(TOKENS, WIDTH) / 10
    return constant @ p["w"] + h @ constant[:WIDTH] + h @ p["v"] * (constant @ p["v"])


@plain(w=SQUARE)
def outputs_dropped(p, h):
    """Equations with an unused output, and a scan whose outputs are literals."""
    (carry, _), ones = jax.lax.scan(
        lambda c, _: ((jnp.tanh(c[0] @ p["w"]), 0), 1.0), (h, 1), length=2
    )
    return jax.lax.top_k(carry, WIDTH)[0] * jnp.sum(ones)


@plain(w=SQUARE)
def mask_of_booleans(p, h):
    return (h > 0) @ p["w"] + (h > 0).astype(jnp.int32) @ p["w"]


@whole
def params_of_every_kind():
    """NumPy arrays, a Python number, a bare tuple, and a leaf with no elements."""

    def logprob_fn(params, tokens):
        (embed, head), scale, empty = params
        hidden = jnp.tanh(embed[tokens[:-1]]) * scale
        return logprob(hidden @ head, tokens[1:]) + jnp.sum(empty)

    drawn = jax.tree.map(np.asarray, kernels(embed=(VOCABULARY, WIDTH), head=(WIDTH, VOCABULARY)))
    return Model(
        logprob_fn, ((drawn["embed"], drawn["head"]), 0.5, jnp.zeros((0, 2))), microbatch()
    )


# Flax Linen.


def linen_params(module, inputs):
    """Random parameters of a Linen module."""
    return random_like(jax.eval_shape(module.init, jax.random.key(0), inputs)["params"])


def linen(module_class):
    """Registers a decoder around a Linen module."""

    def model():
        module = module_class()
        params = linen_params(module, jnp.zeros((TOKENS, WIDTH)))
        return decoder(lambda p, h: module.apply({"params": p}, h), params)

    MODELS[f"linen_{module_class.__name__}"] = functools.cache(model)
    return module_class


@linen
class Mlp(nn.Module):
    @nn.compact
    def __call__(self, h):
        return nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(h))))


@linen
class Remat(nn.Module):
    @nn.compact
    def __call__(self, h):
        return nn.remat(Mlp)(name="mlp")(h)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return jnp.tanh(nn.Dense(WIDTH)(h)), None


@linen
class Scan(nn.Module):
    @nn.compact
    def __call__(self, h):
        axes = {"params": 0}
        layers = nn.scan(LinenBlock, axes, split_rngs={"params": True}, length=LAYERS)
        return layers(name="layers")(h, None)[0]


@linen
class ScanOfRemat(nn.Module):
    @nn.compact
    def __call__(self, h):
        layer, axes = nn.remat(LinenBlock, prevent_cse=False), {"params": 0}
        layers = nn.scan(layer, axes, split_rngs={"params": True}, length=LAYERS)
        return layers(name="layers")(h, None)[0]


@linen
class SharedScan(nn.Module):
    """The same layer, three times."""

    @nn.compact
    def __call__(self, h):
        kwargs = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        return nn.scan(LinenBlock, **kwargs, length=LAYERS)(name="layer")(h, None)[0]


@linen
class SeveralAxes(nn.Module):
    @nn.compact
    def __call__(self, h):
        heads = nn.DenseGeneral((HEADS, 3), name="split")(h)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), name="join")(jnp.tanh(heads))


@linen
class BatchedDense(nn.Module):
    @nn.compact
    def __call__(self, h):
        heads = h.reshape(HEADS, TOKENS, WIDTH // HEADS)
        return nn.DenseGeneral(2, batch_dims=0, axis=-1)(heads).reshape(TOKENS, WIDTH)


@linen
class Attention(nn.Module):
    @nn.compact
    def __call__(self, h):
        attention = nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")
        return attention(h, mask=nn.make_causal_mask(h[:, 0]))


@linen
class Conv(nn.Module):
    @nn.compact
    def __call__(self, h):
        return nn.Conv(WIDTH, kernel_size=(3,))(h)


@linen
class Bfloat16(nn.Module):
    """float32 parameters, bfloat16 arithmetic."""

    @nn.compact
    def __call__(self, h):
        return nn.Dense(WIDTH, dtype=jnp.bfloat16)(h).astype(jnp.float32)


@whole
def linen_tied():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(VOCABULARY, WIDTH)
            return embed.attend(nn.Dense(WIDTH)(embed(tokens)))

    def logprob_fn(params, tokens):
        return logprob(Tied().apply({"params": params}, tokens[:-1]), tokens[1:])

    return Model(logprob_fn, linen_params(Tied(), microbatch()[0, :-1]), microbatch())


@whole
def linen_dropout():
    """The sequence brings its random key."""
    module = nn.Sequential([nn.Dense(VOCABULARY), nn.Dropout(0.5, deterministic=False)])

    def logprob_fn(params, sequence):
        tokens, rngs = sequence["tokens"], {"dropout": sequence["key"]}
        hidden = module.apply({"params": params["layer"]}, params["embed"][tokens[:-1]], rngs=rngs)
        return logprob(hidden, tokens[1:])

    layer = linen_params(module, jnp.zeros((TOKENS, WIDTH)))
    params = {**kernels(embed=(VOCABULARY, WIDTH)), "layer": layer}
    keys = jax.random.split(jax.random.key(1), BATCH)
    return Model(logprob_fn, params, {"tokens": microbatch(), "key": keys})


# Flax NNX.


def in_nnx(make_module):
    """Registers a decoder around the NNX module that the decorated function makes."""

    def model():
        graph, params = nnx.split(nnx.eval_shape(lambda: make_module(nnx.Rngs(0))))
        return decoder(lambda p, h: nnx.merge(graph, p)(h), random_like(params))

    MODELS[make_module.__name__] = functools.cache(model)
    return make_module


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, h):
        return jnp.tanh(self.linear(h))


class Calls(nnx.Module):
    """Calls its layer through a function of (layer, hidden states)."""

    def __init__(self, layer, call):
        self.layer, self.call = layer, call

    def __call__(self, h):
        return self.call(self.layer, h)


def call_layer(layer, h):
    return layer(h)


@in_nnx
def nnx_mlp(rngs):
    return nnx.Sequential(
        nnx.LayerNorm(WIDTH, rngs=rngs),
        nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs),
        nnx.gelu,
        nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs),
    )


@in_nnx
def nnx_remat(rngs):
    return Calls(NnxBlock(rngs), nnx.remat(call_layer))


@in_nnx
def nnx_remat_called_twice(rngs):
    call = nnx.remat(call_layer)
    return Calls(NnxBlock(rngs), lambda layer, h: call(layer, call(layer, h)))


@in_nnx
def nnx_jit_called_twice(rngs):
    call = nnx.jit(call_layer)
    return Calls(NnxBlock(rngs), lambda layer, h: call(layer, call(layer, h)))


def stacked_blocks():
    keys = jax.random.split(jax.random.key(0), LAYERS)
    return nnx.vmap(lambda key: NnxBlock(nnx.Rngs(key)))(keys)


@in_nnx
def nnx_scan(rngs):
    return Calls(stacked_blocks(), nnx.scan(call_layer, in_axes=(0, nnx.Carry), out_axes=nnx.Carry))


@in_nnx
def nnx_scan_of_remat(rngs):
    scanned = nnx.scan(nnx.remat(call_layer), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    return Calls(stacked_blocks(), scanned)


@in_nnx
def nnx_attention(rngs):
    return nnx.MultiHeadAttention(HEADS, WIDTH, rngs=rngs, decode=False)


@in_nnx
def nnx_einsum(rngs):
    return nnx.Einsum("ti,io->to", SQUARE, (WIDTH,), rngs=rngs)


@in_nnx
def nnx_several_axes(rngs):
    return nnx.Sequential(
        nnx.LinearGeneral(WIDTH, (HEADS, 3), rngs=rngs),
        nnx.LinearGeneral((HEADS, 3), WIDTH, axis=(-2, -1), rngs=rngs),
    )


@in_nnx
def nnx_conv(rngs):
    return nnx.Conv(WIDTH, WIDTH, kernel_size=(3,), rngs=rngs)


@in_nnx
def nnx_bfloat16(rngs):
    linear = nnx.Linear(WIDTH, WIDTH, dtype=jnp.bfloat16, rngs=rngs)
    return nnx.Sequential(linear, lambda h: h.astype(jnp.float32))


@in_nnx
def nnx_lora(rngs):
    return nnx.LoRA(WIDTH, 2, WIDTH, rngs=rngs)


@in_nnx
def nnx_lora_linear(rngs):
    return nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=rngs)


@whole
def nnx_lora_alone():
    """Only the adapters are parameters, what they adapt is constant."""
    linear = nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=nnx.Rngs(0))
    graph, adapters, frozen = nnx.split(linear, nnx.LoRAParam, ...)
    return decoder(lambda p, h: nnx.merge(graph, p, frozen)(h), random_like(adapters))


@whole
def nnx_tied():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, tokens):
            return self.embed.attend(self.linear(self.embed(tokens)))

    graph, params = nnx.split(Tied(nnx.Rngs(0)))

    def logprob_fn(params, tokens):
        return logprob(nnx.merge(graph, params)(tokens[:-1]), tokens[1:])

    return Model(logprob_fn, random_like(params), microbatch())


# Twins.


class Twins(NamedTuple):
    """The same model unrolled and scanned; `stack` maps trees shaped like the former's params."""

    unrolled: Model
    scanned: Model
    stack: Callable[[Any], Any]


def twins():
    """A residual decoder whose parameters are a list of layers, or one stack of them.

    Each layer has a kernel "w", a kernel "heads" with a batch axis, and a bias "b".
    """

    def layer(h, p):
        heads = jnp.tanh(h @ p["w"] + p["b"]).reshape(TOKENS, HEADS, WIDTH // HEADS)
        return h + jnp.einsum("thi,hio->tho", heads, p["heads"]).reshape(TOKENS, WIDTH), None

    def scan_layers(layers, h):
        return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), h, layers)[0] - h

    def loop_over_layers(layers, h):
        out = h
        for p in layers:
            out = layer(out, p)[0]
        return out - h

    def stack(tree):
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree["layer"])
        return {**tree, "layer": layers}

    shapes = {"w": SQUARE, "heads": (HEADS, WIDTH // HEADS, WIDTH // HEADS), "b": (WIDTH,)}
    layers = [random_like(kernels(**shapes), seed=i) for i in range(LAYERS)]
    unrolled = decoder(loop_over_layers, layers)
    scanned = decoder(scan_layers, stack({"layer": layers})["layer"])
    return Twins(unrolled, scanned, stack)
