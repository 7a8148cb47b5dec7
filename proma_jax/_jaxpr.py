"""What the capture of scores reads from JAX's traced programs, and nothing else does.

The parameters of JAX's primitives are not a stable interface. This module alone looks at them; what
it does not recognise it reports as such (`None`), and the capture then falls back to dense scores.
`tests/test_jaxpr.py` pins what is relied on, at the oldest and newest supported JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.api_util
import jax.numpy as jnp
from jax.extend import core

from proma_jax.scores import View

_CALLS = {"jit", "pjit", "closed_call", "core_call"}
_REMATS = {"remat", "remat2", "checkpoint"}
_SAME_VALUE = {
    "convert_element_type",
    "copy",
    "name",
    "reshard",
    "sharding_constraint",
}


def _none_if_unknown(read: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a reader of equations return None where an equation's params are not as it expects."""

    @functools.wraps(read)
    def reader(*args: Any) -> Any:
        try:
            return read(*args)
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    return reader


@dataclasses.dataclass(frozen=True)
class Body:
    """The program inside an equation, with its inputs and outputs one to one with the equation's.

    Attributes:
      kind: "call" (jit), "remat" or "scan".
      jaxpr: the program.
      consts: values of its constant variables.
      num_consts: inputs that every iteration of a scan reads whole. The next `num_carry` are
        carried, the rest are scanned over; of the outputs the first `num_carry` are carried.
      num_carry: see above.
      length: iterations of a scan.
      settings: arguments of `jax.checkpoint` or `jax.lax.scan` that run it in the same way.
    """

    kind: str
    jaxpr: core.Jaxpr
    consts: Sequence[Any]
    num_consts: int = 0
    num_carry: int = 0
    length: int = 1
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@_none_if_unknown
def body(eqn: core.JaxprEqn) -> Body | None:
    """The program inside a jit, remat or scan equation; None for any other or unknown layout."""
    name = eqn.primitive.name
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if name not in _CALLS | _REMATS | {"scan"} or inner is None:
        return None
    jaxpr, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
    counts_agree = (
        len(jaxpr.invars) == len(eqn.invars)
        and len(jaxpr.outvars) == len(eqn.outvars)
        and len(jaxpr.constvars) == len(consts)
    )
    if not counts_agree:
        return None
    if name in _CALLS:
        return Body("call", jaxpr, consts)
    if name in _REMATS:
        settings = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
        return Body("remat", jaxpr, consts, settings=settings)
    return _scan_body(eqn, jaxpr, consts)


def _scan_body(eqn: core.JaxprEqn, jaxpr: core.Jaxpr, consts: Sequence[Any]) -> Body | None:
    """Reads the split of a scan's inputs off their shapes: scanned ones lose their leading axis."""
    length = eqn.params["length"]
    scanned = [
        _is_slice(o.aval, i.aval, length) for o, i in zip(eqn.invars, jaxpr.invars, strict=True)
    ]
    stacked = [
        _is_slice(o.aval, i.aval, length) for o, i in zip(eqn.outvars, jaxpr.outvars, strict=True)
    ]
    num_carry = _leading_false(stacked)
    num_unscanned = _leading_false(scanned)
    num_consts = num_unscanned - num_carry
    in_order = all(scanned[num_unscanned:]) and all(stacked[num_carry:]) and num_consts >= 0
    if not in_order:
        return None
    carried = zip(jaxpr.invars[num_consts:num_unscanned], jaxpr.outvars[:num_carry], strict=True)
    if any(i.aval.shape != o.aval.shape or i.aval.dtype != o.aval.dtype for i, o in carried):
        return None
    settings = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    return Body("scan", jaxpr, consts, num_consts, num_carry, length, settings)


def _is_slice(outer: Any, inner: Any, length: int) -> bool:
    return outer.shape == (length, *inner.shape)


def _leading_false(flags: list[bool]) -> int:
    return flags.index(True) if True in flags else len(flags)


def zeros(variable: Any, lengths: Sequence[int], dtype: Any = None) -> jax.Array:
    """(*lengths, *shape) zeros for a variable, sharded like it."""
    aval = variable.aval
    spec = jax.sharding.PartitionSpec(*[None] * len(lengths), *aval.sharding.spec)
    sharding = jax.sharding.NamedSharding(aval.sharding.mesh, spec)
    return jnp.zeros((*lengths, *aval.shape), dtype or aval.dtype, out_sharding=sharding)


def evaluate(eqn: core.JaxprEqn, *operands: Any) -> list[Any]:
    """The equation's outputs, with its own differentiation and batching rules intact."""
    variables = list(dict.fromkeys(v for v in eqn.invars if isinstance(v, core.Var)))
    values = {v: x for v, x in zip(eqn.invars, operands, strict=True) if isinstance(v, core.Var)}
    inputs = tuple(values[v] for v in variables)
    debug_info = jax.api_util.debug_info(
        "proma_jax",
        lambda *_: None,
        inputs,
        {},
        result_paths_thunk=lambda: ("",) * len(eqn.outvars),
    )
    jaxpr = core.Jaxpr((), variables, eqn.outvars, [eqn], eqn.effects, debug_info)
    return jax.core.eval_jaxpr(jaxpr, (), *inputs)


def rebuild(inner: Body, fn: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """`fn` run as an equation runs its program: inline, rematerialised, or scanned.

    `fn` takes one value more than the program: a pytree that a scan slices along its leading axes.
    """
    if inner.kind == "call":
        return fn
    if inner.kind == "remat":
        return jax.checkpoint(fn, **inner.settings)

    def scanned(extra: Any, *args: Any) -> list[Any]:
        consts = args[: inner.num_consts]
        carry = args[inner.num_consts : inner.num_consts + inner.num_carry]
        xs = args[inner.num_consts + inner.num_carry :]

        def step(carry: Sequence[Any], slices: tuple[Any, Sequence[Any]]) -> tuple[Any, Any]:
            outs = fn(slices[0], *consts, *carry, *slices[1])
            return tuple(outs[: inner.num_carry]), tuple(outs[inner.num_carry :])

        carry, ys = jax.lax.scan(step, carry, (extra, xs), **inner.settings)
        return [*carry, *ys]

    return scanned


@_none_if_unknown
def reinterpret(eqn: core.JaxprEqn, view: View, layers: tuple[int, ...]) -> View | None:
    """Follows a parameter through an equation that only changes its layout or type.

    Args:
      eqn: the equation; the parameter is its first operand.
      view: the parameter leaf read as (*layers, *operand.shape).
      layers: sizes of the layer axes.

    Returns:
      The leaf read as (*layers, *output.shape), or None where the equation does anything else.
    """
    name, old = eqn.primitive.name, eqn.invars[0].aval
    new = eqn.outvars[0].aval
    if not jnp.issubdtype(new.dtype, jnp.floating):
        return None
    if name in _SAME_VALUE and old.shape == new.shape:
        changes_mesh = not old.sharding.mesh.empty and old.sharding.mesh != new.sharding.mesh
        return None if changes_mesh else view  # changed where jax.sharding.auto_axes begins
    if name == "transpose":
        count = len(layers)
        return view.transpose([*range(count), *(count + i for i in eqn.params["permutation"])])
    keeps_order = (
        name == "squeeze"
        or (name == "reshape" and eqn.params.get("dimensions") is None)
        or (name == "broadcast_in_dim" and _only_adds_axes(eqn, old, new))
    )
    if keeps_order and old.size == new.size and len(eqn.invars) == 1:
        return view.reshape((*layers, *old.shape), (*layers, *new.shape))
    return None


def _only_adds_axes(eqn: core.JaxprEqn, old: Any, new: Any) -> bool:
    axes = eqn.params["broadcast_dimensions"]
    return old.size == new.size and list(axes) == sorted(axes)


@dataclasses.dataclass(frozen=True)
class Matmul:
    """Axes of a dot_general seen as a kernel (layers, d_in, d_out) applied to tokens.

    Attributes:
      kernel: 0 or 1, which operand is the kernel.
      kernel_axes: its batch, contracted and remaining axes.
      input_axes: the other operand's batch, remaining (token) and contracted axes.
      output_axes: the result's batch, token and remaining kernel axes.
    """

    kernel: int
    kernel_axes: tuple[tuple[int, ...], ...]
    input_axes: tuple[tuple[int, ...], ...]
    output_axes: tuple[tuple[int, ...], ...]


@_none_if_unknown
def matmul(eqn: core.JaxprEqn, kernel: int) -> Matmul | None:
    """Reads a dot_general equation whose operand number `kernel` is the parameter."""
    contracted, batched = eqn.params["dimension_numbers"]
    other = 1 - kernel
    free = [
        tuple(i for i in range(v.aval.ndim) if i not in (*contracted[side], *batched[side]))
        for side, v in enumerate(eqn.invars)
    ]
    num_batch, num_lhs = len(batched[0]), len(free[0])
    batch_out = tuple(range(num_batch))
    lhs_out = tuple(range(num_batch, num_batch + num_lhs))
    rhs_out = tuple(range(num_batch + num_lhs, num_batch + num_lhs + len(free[1])))
    out = (lhs_out, rhs_out)
    return Matmul(
        kernel=kernel,
        kernel_axes=(tuple(batched[kernel]), tuple(contracted[kernel]), free[kernel]),
        input_axes=(tuple(batched[other]), free[other], tuple(contracted[other])),
        output_axes=(batch_out, out[other], out[kernel]),
    )


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A gather that reads whole rows of a table.

    Attributes:
      num_embeddings: rows of the table.
      output_axes: the result's token axes and row axes.
      out_of_bounds: "clip" (the nearest row is read), "drop" (no row is), or "never".
    """

    num_embeddings: int
    output_axes: tuple[tuple[int, ...], ...]
    out_of_bounds: str


@_none_if_unknown
def lookup(eqn: core.JaxprEqn) -> Lookup | None:
    """Reads a gather equation on a table, its first operand; None if it is no plain row lookup."""
    numbers, table = eqn.params["dimension_numbers"], eqn.invars[0].aval
    mode = eqn.params["mode"]
    modes = jax.lax.GatherScatterMode
    names = {modes.CLIP: "clip", modes.FILL_OR_DROP: "drop", modes.PROMISE_IN_BOUNDS: "never"}
    whole_rows = (
        numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and eqn.params["slice_sizes"] == (1, *table.shape[1:])
    )
    exact_as_float = table.shape[0] <= 2**24 if table.ndim else False
    if not (whole_rows and exact_as_float and mode in names):
        return None
    rows = tuple(numbers.offset_dims)
    tokens = tuple(i for i in range(eqn.outvars[0].aval.ndim) if i not in rows)
    return Lookup(table.shape[0], (tokens, rows), names[mode])


def is_narrow(jaxpr: core.Jaxpr) -> bool:
    """Whether a program computes anything in floating point of fewer than 32 bits."""
    return re.search(r"\b(bf16|f16|f8\w*)\[", str(jaxpr)) is not None
