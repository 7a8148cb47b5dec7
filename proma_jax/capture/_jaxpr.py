"""Programs inside the equations of JAX's traced programs, and how to run either again.

The parameters of JAX's primitives are not a stable interface. The modules of this package whose
names begin with an underscore alone look at them; what they do not recognise they report as such
(`None`), and the capture then falls back to dense scores. `tests/capture` pins what is relied on,
at the oldest and newest supported JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.api_util
from jax.extend import core

_CALLS = {"jit", "pjit", "closed_call", "core_call"}
_REMATS = {"remat", "remat2", "checkpoint"}


def none_if_unknown(read: Callable[..., Any]) -> Callable[..., Any]:
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


@none_if_unknown
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


def evaluate(eqn: core.JaxprEqn, *operands: Any) -> list[Any]:
    """The equation's outputs, with its own differentiation and batching rules intact."""
    variables = list(dict.fromkeys(v for v in eqn.invars if isinstance(v, core.Var)))
    values = {v: x for v, x in zip(eqn.invars, operands, strict=True) if isinstance(v, core.Var)}
    debug_info = _debug_info(len(variables), len(eqn.outvars))
    jaxpr = core.Jaxpr((), variables, eqn.outvars, [eqn], eqn.effects, debug_info)
    return jax.core.eval_jaxpr(jaxpr, (), *(values[v] for v in variables))


@functools.cache
def _debug_info(num_inputs: int, num_outputs: int) -> Any:
    return jax.api_util.debug_info(
        "proma_jax",
        lambda *_: None,
        (0,) * num_inputs,
        {},
        result_paths_thunk=lambda: ("",) * num_outputs,
    )


def rebuild(inner: Body, fn: Callable[..., Any]) -> Callable[..., tuple[list[Any], Any]]:
    """`fn` run as an equation runs its program: inline, rematerialised, or scanned.

    `fn` takes two values more than the program: a pytree that a scan slices along its leading axes,
    and one that it hands from iteration to iteration. It returns the program's results and that.
    """
    if inner.kind == "call":
        return fn
    if inner.kind == "remat":
        return jax.checkpoint(fn, **inner.settings)

    def scanned(extra: Any, carried: Any, *args: Any) -> tuple[list[Any], Any]:
        consts = args[: inner.num_consts]
        carry = args[inner.num_consts : inner.num_consts + inner.num_carry]
        xs = args[inner.num_consts + inner.num_carry :]

        def step(carry: tuple[Any, Any], slices: tuple[Any, Sequence[Any]]) -> tuple[Any, Any]:
            outs, carried = fn(slices[0], carry[0], *consts, *carry[1], *slices[1])
            return (carried, tuple(outs[: inner.num_carry])), tuple(outs[inner.num_carry :])

        (carried, carry), ys = jax.lax.scan(step, (carried, carry), (extra, xs), **inner.settings)
        return [*carry, *ys], carried

    return scanned


def ends_in_a_mean(jaxpr: core.Jaxpr) -> bool:
    """Whether a program's first result is seen to be a sum divided by how many it sums."""
    eqn, jaxpr = _made_by(jaxpr, jaxpr.outvars[0])
    if eqn is None or eqn.primitive.name != "div":
        return False
    (total, _), (count, _) = (_made_by(jaxpr, atom) for atom in eqn.invars)
    if total is None or total.primitive.name != "reduce_sum":
        return False
    divisor = eqn.invars[1]
    if isinstance(divisor, core.Var):
        return count is not None and count.primitive.name in ("max", "reduce_sum")
    return divisor.val == total.invars[0].aval.size > 1


def _made_by(jaxpr: core.Jaxpr, atom: Any) -> tuple[core.JaxprEqn | None, core.Jaxpr]:
    """The equation that a variable is made by, but for its type and shape, and its program."""
    while isinstance(atom, core.Var):
        eqn = next((eqn for eqn in jaxpr.eqns if atom in eqn.outvars), None)
        if eqn is None:
            break
        inner = body(eqn)
        if inner is not None and inner.kind != "scan":
            jaxpr, atom = inner.jaxpr, inner.jaxpr.outvars[eqn.outvars.index(atom)]
        elif eqn.primitive.name in ("convert_element_type", "reshape", "neg"):
            atom = eqn.invars[0]
        else:
            return eqn, jaxpr
    return None, jaxpr


def shares_random_numbers(jaxpr: core.Jaxpr, b: int) -> bool:
    """Whether a program that is mapped over b sequences draws random numbers once for all."""
    return any(
        eqn.primitive.name == "random_bits" and b not in eqn.invars[0].aval.shape
        for eqn in _equations(jaxpr)
    )


def _equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The equations of a program and of all programs inside of them."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, core.Jaxpr):
                yield from _equations(inner)


def is_narrow(jaxpr: core.Jaxpr) -> bool:
    """Whether a program computes anything in floating point of fewer than 32 bits."""
    return re.search(r"\b(bf16|f16|f8\w*)\[", str(jaxpr)) is not None
