"""What users give to `sequence_scores` and its kin, checked, and errors that say what is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp


def check_function(logprob_fn: Any) -> None:
    """Raises a ValueError unless `logprob_fn` is a function."""
    if not callable(logprob_fn):
        raise ValueError(
            f"logprob_fn={logprob_fn!r} must be a function (params, sequence) -> log-probability."
        )


def check_parameters(params: Any) -> None:
    """Raises a ValueError unless every parameter is floating point."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        is_array = hasattr(leaf, "dtype") or isinstance(leaf, (float, int, complex))
        kind = jnp.result_type(leaf) if is_array else type(leaf).__name__
        if is_array and jnp.issubdtype(kind, jnp.floating):
            continue
        cure = "Pass it in the sequence or close over it."
        if not hasattr(leaf, "dtype"):
            cure = (
                "Separate a module's parameters from the rest of it: "
                "params, rest = eqx.partition(model, eqx.is_inexact_array), and in logprob_fn "
                "eqx.combine(params, rest)."
            )
        elif jnp.issubdtype(kind, jax.dtypes.prng_key) or jnp.issubdtype(kind, jnp.unsignedinteger):
            cure = (
                "If it is the state of a random number generator, separate it from the parameters: "
                "graphdef, params, rest = nnx.split(model, nnx.Param, ...), and in logprob_fn "
                "nnx.merge(graphdef, params, rest, copy=True). A random key that each sequence "
                "needs, as for dropout, travels in the sequence."
            )
        raise ValueError(
            f"params{jax.tree_util.keystr(path)} is {kind}, but parameters must be floating point. "
            f"{cure}"
        )


@contextlib.contextmanager
def for_one_sequence(logprob_fn: Callable[..., Any], params: Any, many: Any) -> Iterator[None]:
    """Says of what is raised if a microbatch is taken for one sequence, or one for a microbatch.

    Args:
      logprob_fn: the user's function.
      params: its parameters.
      many: sequences with a leading axis b.
    """
    try:
        yield
    except Exception as error:
        params, many = jax.tree.map(abstract, (params, many))
        b = jax.tree.leaves(many)[0].shape[0]
        try:
            of_many = jax.eval_shape(logprob_fn, params, many)
        except Exception:  # whatever is wrong with it, it is not that
            raise error from None
        values = of_many[0] if isinstance(of_many, tuple) else of_many
        shape = getattr(values, "shape", None)
        if shape == () and not _takes(logprob_fn, params, one_of(many)):
            raise ValueError(
                "logprob_fn takes the microbatch whole, but not a part of it without the leading "
                "axis. If the microbatch is one sequence, give it that axis: jax.tree.map(lambda "
                "x: x[None], sequence). If logprob_fn is written for a batch, write it for one "
                "sequence."
            ) from error
        if shape != (b,):
            raise
        raise ValueError(
            f"logprob_fn is written for a batch: of {b} sequences it makes ({b},) "
            "log-probabilities, but it is called with one sequence, without the axis b, and must "
            "return one number. A function for a batch of one will do: lambda params, sequence: "
            "logprob_fn(params, jax.tree.map(lambda x: x[None], sequence))[0]."
        ) from error


def _takes(logprob_fn: Callable[..., Any], *arguments: Any) -> bool:
    try:
        jax.eval_shape(logprob_fn, *arguments)
    except Exception:
        return False
    return True


@contextlib.contextmanager
def noted(note: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Adds a note to errors of a kind."""
    try:
        yield
    except kind as error:
        error.add_note(note)
        raise


DIFFERENTIATED = (
    "Raised while logprob_fn was differentiated in reverse mode, as by jax.grad, and mapped over "
    "the sequences, as by jax.vmap."
)
"""Where what JAX raises comes from, as where a program has no gradient."""


def check_microbatch(microbatch: Any) -> None:
    """Raises a ValueError unless every leaf has the same leading axis b."""
    leaves = jax.tree_util.tree_leaves_with_path(microbatch)
    if not leaves:
        raise ValueError(
            "microbatch has no arrays: every leaf must have a leading axis of b sequences."
        )
    shapes = [(jax.tree_util.keystr(path), jnp.shape(leaf)) for path, leaf in leaves]
    for name, shape in shapes:
        if not shape:
            raise ValueError(
                f"microbatch{name} has shape (): every leaf must have a leading axis of b "
                "sequences, also where b is 1."
            )
        if shape[0] != shapes[0][1][0]:
            raise ValueError(
                f"microbatch{name} has shape {shape}, but microbatch{shapes[0][0]} has shape "
                f"{shapes[0][1]}: every leaf must have the same leading axis of b sequences."
            )


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array."""
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def one_of(microbatch: Any) -> Any:
    """A sequence of an abstract microbatch."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), microbatch)
