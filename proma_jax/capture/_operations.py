"""Equations that use a parameter: matrix products, lookups in a table, convolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from proma_jax.capture._jaxpr import evaluate, none_if_unknown
from proma_jax.capture.pieces import Piece


@dataclasses.dataclass(frozen=True)
class Matmul:
    """Axes of a product seen as a kernel (layers, d_in, d_out) applied to tokens.

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

    @property
    def data(self) -> int:
        """Which operand is not the kernel."""
        return 1 - self.kernel


@none_if_unknown
def matmul(eqn: core.JaxprEqn, kernel: int) -> Matmul | None:
    """Reads a dot_general, or a convolution of single points, with operand `kernel` the kernel."""
    if not all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.invars):
        return None
    if eqn.primitive.name == "conv_general_dilated":
        return _pointwise_convolution(eqn) if kernel == 1 else None
    if eqn.primitive.name != "dot_general":
        return None
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


def _pointwise_convolution(eqn: core.JaxprEqn) -> Matmul | None:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    kernel_out, kernel_in, *window = numbers.rhs_spec
    is_pointwise = (
        all(eqn.invars[1].aval.shape[axis] == 1 for axis in window)
        and all(stride == 1 for stride in params["window_strides"])
        and all(padding == (0, 0) for padding in params["padding"])
        and all(dilation == 1 for dilation in params["lhs_dilation"])
        and params["feature_group_count"] == params["batch_group_count"] == 1
    )
    if not is_pointwise:
        return None
    batch, features, *places = numbers.lhs_spec
    batch_out, features_out, *places_out = numbers.out_spec
    return Matmul(
        kernel=1,
        kernel_axes=((), (kernel_in, *window), (kernel_out,)),
        input_axes=((), (batch, *places), (features,)),
        output_axes=((), (batch_out, *places_out), (features_out,)),
    )


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A read of whole slices along one axis of a table, which is the first operand.

    Attributes:
      axis: of the table, along which indices choose.
      num_embeddings: its length.
      data: which operand holds the indices.
      column: which entry along the last axis of that operand is the index; None if it is the index.
      result_axes: for each axis of the result the table's axis; None for those of the tokens.
      out_of_bounds: "clip" (the nearest slice is read), or "drop" (it gets no gradient).
    """

    axis: int
    num_embeddings: int
    data: int
    column: int | None
    result_axes: tuple[int | None, ...]
    out_of_bounds: str

    @property
    def token_axes(self) -> tuple[int, ...]:
        """The result's axes for what is looked up."""
        return tuple(i for i, axis in enumerate(self.result_axes) if axis is None)

    def arrange(self, piece: Piece, token_shape: Sequence[int]) -> Piece:
        """What the result holds, of a piece of the table with the chosen entries along `axis` only.

        They are one, or as many as tokens.
        """
        chosen, sizes = piece.axes[self.axis], iter(token_shape)
        axes = []
        for axis in self.result_axes:
            if axis is not None:
                is_gone = axis == self.axis
                axes.append(np.zeros(1, np.int64) if is_gone else piece.axes[axis])
                continue
            size = next(sizes)
            axes.append(chosen if len(chosen) == size > 1 else np.zeros(size, np.int64))
        alone = piece.squeeze((self.axis,)) if len(chosen) == 1 else piece
        return dataclasses.replace(alone, axes=tuple(axes))


@none_if_unknown
def lookup(eqn: core.JaxprEqn) -> Lookup | None:
    """Reads a gather or dynamic_slice equation on a table; None if it is no such lookup."""
    shape = eqn.invars[0].aval.shape
    sizes = eqn.params["slice_sizes"]
    partial = [axis for axis in range(len(shape)) if sizes[axis] != shape[axis]]
    if eqn.primitive.name == "dynamic_slice":
        (axis,) = partial
        if sizes[axis] != 1:
            return None
        return Lookup(axis, shape[axis], 1 + axis, None, tuple(range(len(shape))), "clip")
    numbers = eqn.params["dimension_numbers"]
    indexed = tuple(numbers.start_index_map)
    (axis,) = partial or [axis for axis in indexed if shape[axis] == 1][:1]
    modes = jax.lax.GatherScatterMode
    names = {modes.CLIP: "clip", modes.FILL_OR_DROP: "drop", modes.PROMISE_IN_BOUNDS: "drop"}
    out_of_bounds = names[eqn.params["mode"]]
    # A whole slice may begin anywhere where it is moved into bounds, and only at 0 elsewhere.
    others_matter = len(indexed) > 1 and out_of_bounds != "clip"
    if sizes[axis] != 1 or numbers.operand_batching_dims or others_matter:
        return None
    kept = iter(i for i in range(len(shape)) if i not in numbers.collapsed_slice_dims)
    result_axes = tuple(
        next(kept) if i in numbers.offset_dims else None for i in range(eqn.outvars[0].aval.ndim)
    )
    return Lookup(axis, shape[axis], 1, indexed.index(axis), result_axes, out_of_bounds)


def is_convolution(eqn: core.JaxprEqn) -> bool:
    """Whether an equation is a convolution of one group."""
    if eqn.primitive.name != "conv_general_dilated":
        return False
    return eqn.params["feature_group_count"] == eqn.params["batch_group_count"] == 1


def contains_convolution(eqn: core.JaxprEqn) -> bool:
    """Whether there is a convolution of one group in an equation or in a program inside it."""

    def inside(parameter: Any) -> Iterator[core.JaxprEqn]:
        jaxpr = getattr(parameter, "jaxpr", parameter)
        if isinstance(jaxpr, core.Jaxpr):
            yield from jaxpr.eqns
        elif isinstance(parameter, (tuple, list)):
            for entry in parameter:
                yield from inside(entry)

    return is_convolution(eqn) or any(
        contains_convolution(inner)
        for parameter in eqn.params.values()
        for inner in inside(parameter)
    )


def convolve(eqn: core.JaxprEqn, images: jax.Array, kernel: jax.Array) -> jax.Array:
    """What a convolution equation of one group gives, with another rule for the kernel's gradient.

    JAX's own rule is again a convolution. Mapped by `jax.vmap` over sequences that are spread over
    the devices of a mesh, XLA gets that one wrong (seen with JAX 0.8 to 0.12). Here it is a matrix
    product, as is all of a convolution of single points.
    """
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    kernel_out, kernel_in, *window = numbers.rhs_spec
    places_out = (numbers.out_spec[0], *numbers.out_spec[2:])

    @jax.custom_vjp
    def convolution(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return evaluate(eqn, images, kernel)[0]

    def backward(
        residuals: tuple[jax.Array, jax.Array], grad: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        images, kernel = residuals
        (images_grad,) = jax.linear_transpose(lambda x: evaluate(eqn, x, kernel)[0], images)(grad)
        window_shape = [kernel.shape[axis] for axis in window]
        patches = jax.lax.conv_general_dilated_patches(
            images,
            window_shape,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            dimension_numbers=numbers,
            precision=jax.lax.Precision.HIGHEST,
        )
        product = jax.lax.dot_general(
            patches.astype(grad.dtype),
            grad,
            ((places_out, places_out), ((), ())),
            precision=params["precision"],
        )
        axes = (kernel_in, *window, kernel_out)
        by_window = product.reshape([kernel.shape[i] for i in axes])
        kernel_grad = by_window.transpose([axes.index(i) for i in range(kernel.ndim)])
        return images_grad, kernel_grad.astype(kernel.dtype)

    if matmul(eqn, 1) is not None:
        places_in = (numbers.lhs_spec[0], *numbers.lhs_spec[2:])
        product = jax.lax.dot_general(
            images,
            jax.lax.squeeze(kernel, window),
            (((numbers.lhs_spec[1],), (int(kernel_in > kernel_out),)), ((), ())),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
        axes_out = [places_out[places_in.index(i)] for i in sorted(places_in)]
        return product.transpose(np.argsort([*axes_out, numbers.out_spec[1]]))
    convolution.defvjp(lambda *operands: (convolution(*operands), operands), backward)
    return convolution(images, kernel)
