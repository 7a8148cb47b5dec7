"""The demonstration's algorithm in PyTorch: hooks on the linear layers of an eager decoder.

Written from the description of the method alone; no code of its author was used. The backward pass
is that of the summed log-probabilities, without the advantages. Forward hooks keep each linear
layer's inputs, backward hooks get the gradient of its outputs, and there, layer by layer, the
running gradient is projected and the microbatch's advantage-weighted gradient added.

Where the description leaves a choice, the cheaper is taken, so that the demonstration's cost is
rather understated: no gradient of the linear layers' weights is computed beside what the hooks do,
no layer keeps its scores, and the tied head has no hook. As there, the embedding table and the
norms get the gradient of the plain sum.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch  # type: ignore[import-not-found]
from torch import nn

from benchmarks.torch_decoder import Decoder

_EPSILON = 1e-8
_RIDGE = 1e-2

Gradients = dict[str, torch.Tensor]
Update = Callable[..., torch.Tensor]


class Batch(NamedTuple):
    """One optimizer step's sequences.

    Attributes:
        tokens: (k, b, T) int64.
        coefficients: (k, b) float32, each sequence's weight in the loss gradient.
    """

    tokens: torch.Tensor
    coefficients: torch.Tensor


def _zeros(model: Decoder) -> Gradients:
    return {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}


def _take_gradients(model: Decoder, totals: Gradients) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            totals[name] += parameter.grad
            parameter.grad = None


def plain(model: Decoder, batch: Batch, compiled: bool = False) -> Gradients:
    """Plain policy gradient: the sum of the microbatches' weighted gradients, in float32."""
    totals = _zeros(model)
    for tokens, coefficients in zip(*batch, strict=True):
        (coefficients * model(tokens, compiled).sum(dim=-1)).sum().backward()
        _take_gradients(model, totals)
    return totals


def accumulated(
    total: torch.Tensor,
    inputs: torch.Tensor,
    output_grads: torch.Tensor,
    coefficients: torch.Tensor,
) -> torch.Tensor:
    """Accumulation: the running gradient without its part in the scores' span, plus the new one.

    Args:
        total: (d_out, d_in) float32, the layer's running gradient.
        inputs: (b, T, d_in).
        output_grads: (b, T, d_out).
        coefficients: (b,) float32.
    """
    scores = torch.einsum("bto,bti->boi", output_grads, inputs).float().flatten(1)
    norms = scores.norm(dim=1, keepdim=True)
    units = scores / (norms + _EPSILON)
    gram = units @ units.T
    ridge = _RIDGE * torch.eye(len(gram), device=gram.device)
    weights = torch.linalg.solve(gram + ridge, units @ total.flatten())
    return total + (coefficients @ scores - weights @ units).view_as(total)


def _basis(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """(d, rank): a randomised range finder with one power iteration, of rows (n, d)."""
    noise = torch.randn(len(rows), rank, device=rows.device)
    found = rows.T @ noise
    found = rows.T @ (rows @ found)
    return torch.linalg.qr(found).Q


def intra(rank: int) -> Update:
    """The update, in place of `accumulated`, of the intra variant."""

    def update(total, inputs, output_grads, coefficients):
        weighted = output_grads * coefficients[:, None, None].to(output_grads.dtype)
        gradient = (weighted.flatten(0, 1).T @ inputs.flatten(0, 1)).float()
        x, d = inputs.flatten(0, 1).float(), output_grads.flatten(0, 1).float()
        directions = min(rank, len(x), x.shape[1], d.shape[1])
        q_x, q_d = _basis(x, directions), _basis(d, directions)
        return total + gradient - q_d @ (q_d.T @ gradient @ q_x) @ q_x.T

    return update


@contextlib.contextmanager
def _hooked(
    model: Decoder, totals: Gradients, update: Update, coefficients: torch.Tensor
) -> Iterator[None]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    inputs: dict[nn.Module, torch.Tensor] = {}

    def keep_inputs(layer, arguments, output):
        inputs[layer] = arguments[0].detach()

    @torch.no_grad()
    def use_output_grads(layer, input_grads, output_grads):
        name = names[layer.weight]
        totals[name] = update(totals[name], inputs.pop(layer), output_grads[0], coefficients)

    handles = []
    for layer in model.linears.values():
        layer.weight.requires_grad_(False)
        handles.append(layer.register_forward_hook(keep_inputs))
        handles.append(layer.register_full_backward_hook(use_output_grads))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in model.linears.values():
            layer.weight.requires_grad_(True)


def demonstration(model: Decoder, batch: Batch, update: Update) -> Gradients:
    """A step's gradient by hooks; `update` is `accumulated` or `intra(rank)`."""
    totals = _zeros(model)
    for tokens, coefficients in zip(*batch, strict=True):
        with _hooked(model, totals, update, coefficients):
            model(tokens).sum().backward()
        _take_gradients(model, totals)
    return totals
