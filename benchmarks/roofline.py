"""`python -m benchmarks.roofline`: what this machine could do at best, against what plain takes.

First it measures the machine's ceilings: square matrix products, copy and triad bandwidth, and the
skinny products (r, d) (d, n) that intra's range finder is made of. Then it counts, kernel by
kernel, what a method must do beyond plain policy gradient, at least:

accumulation, at k - 1 of k microbatches, the cheaper of two ways
    * scores: write b · d_in · d_out numbers, read them for the Gram matrix and the inner products
      with G, and again for the weighted sum;
    * factors: the Gram matrix over pairs of tokens, b² T² (d_in + d_out), and the inner products
      with G, 2 n · d_in · d_out for n = b · T. Weights are then known before the weight gradient is
      made, which therefore costs nothing.
intra, at every microbatch
    Two products for each power iteration, of each distinct X and each D with r vectors:
    4 · n · d · r, reading all of X or D each time; and the projection, 4 · r · d_in · d_out.

What takes the longer, arithmetic or memory, counts, at the measured ceilings. Plain is timed, and
the least ratio is 1 + least extra seconds / plain's seconds: a method that does plain's work as
plain does cannot be faster, as long as what it reads comes from memory: the bandwidth is that of
arrays well above the cache's size, and a small kernel's scores fit into the cache. Fusing away a
round of memory that plain makes is not ruled out either.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from rich import box, table

from benchmarks import cases, decoder, measure, methods, screen, update_step
from benchmarks.screen import terminal
from experiments import environment

_POWER_ITERATIONS = 2


class Ceilings(NamedTuple):
    """Best rates seen, in operations or bytes per second."""

    matmul: float
    skinny: dict[int, float]
    copy: float
    triad: float


@dataclasses.dataclass(frozen=True)
class Command:
    """Measures the machine's ceilings and bounds the methods' ratios from below."""

    size: cases.Size = "tiny"
    """The decoder, and the batch that goes with it."""
    layout: update_step.Layout = "unrolled"
    """Of plain, which is timed: a Python loop over the blocks or a scan."""
    remat: bool = False
    """Of plain: whether the backward pass computes each block's activations anew."""
    ranks: tuple[int, ...] = (10, 100)
    """Ranks of intra."""
    matmul_size: int = 2048
    """Rows and columns of the square matrices."""
    megabytes: int = 256
    """Of the arrays that are copied; well above the caches' size."""
    repeats: int = 5
    """Runs of everything timed: the best counts for ceilings, the median for plain."""
    seed: int = 0
    """Of parameters and batch."""
    directory: pathlib.Path = pathlib.Path("runs/bench/roofline")
    """Where the results go."""


def _rate(
    amount: float, fn: Callable[..., jax.Array], repeats: int, *arguments: jax.Array
) -> float:
    """Amount per second of the fastest of some runs."""
    compiled = jax.jit(fn)
    jax.block_until_ready(compiled(*arguments))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - began)
    return amount / min(seconds)


def ceilings(command: Command, case: cases.Case) -> dict[str, Ceilings]:
    """The machine's, for float32 (at full precision) and bfloat16 matrices."""
    side, length = command.matmul_size, command.megabytes * 250_000
    tokens, width = case.sequences * case.tokens, case.config.width
    vector = jnp.ones(length)
    copy = _rate(8 * length, jnp.negative, command.repeats, vector)
    triad = _rate(12 * length, lambda a, b: a + 3 * b, command.repeats, vector, vector + 1)

    def product(a, b):
        return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)

    def matmul_rate(dtype, rows, inner, columns):
        operands = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
        return _rate(2 * rows * inner * columns, product, command.repeats, *operands)

    return {
        dtype: Ceilings(
            matmul=matmul_rate(dtype, side, side, side),
            skinny={r: matmul_rate(dtype, r, width, tokens) for r in command.ranks},
            copy=copy,
            triad=triad,
        )
        for dtype in ("float32", "bfloat16")
    }


def accumulation_seconds(case: cases.Case, ceiling: Ceilings) -> float:
    """The least a step takes beyond plain."""
    b, tokens = case.sequences, case.sequences * case.tokens
    bandwidth = max(ceiling.copy, ceiling.triad)
    total = 0.0
    for d_in, d_out in decoder.kernel_shapes(case.config).values():
        size = d_in * d_out
        through_scores = max(3 * 4 * b * size / bandwidth, (b * b + 4 * b) * size / ceiling.matmul)
        pairs = tokens * tokens * (d_in + d_out)  # half of them, twice the work each
        through_factors = (pairs + 2 * tokens * size) / ceiling.matmul
        total += min(through_scores, through_factors)
    return total * case.config.layers * (case.microbatches - 1)


def intra_seconds(case: cases.Case, rank: int, ceiling: Ceilings) -> float:
    """The least a step takes beyond plain; query, key and value share X, as do gate and up."""
    shapes = decoder.kernel_shapes(case.config)
    tokens = case.sequences * case.tokens
    inputs = [shapes[name][0] for name in ("query", "output", "gate", "down")]
    factors = inputs + [d_out for _, d_out in shapes.values()]
    item = jnp.dtype(case.config.dtype).itemsize
    passes = 2 * _POWER_ITERATIONS
    reading = passes * tokens * sum(factors) * item / max(ceiling.copy, ceiling.triad)
    finding = passes * 2 * tokens * sum(factors) * rank / ceiling.skinny[rank]
    projecting = 4 * rank * sum(d_in * d_out for d_in, d_out in shapes.values()) / ceiling.matmul
    return (max(reading, finding) + projecting) * case.config.layers * case.microbatches


def _print_ceilings(found: dict[str, Ceilings]) -> None:
    for dtype, ceiling in found.items():
        skinny = ", ".join(f"rank {r}: {x / 1e9:,.1f}" for r, x in ceiling.skinny.items())
        terminal.print(
            f"{dtype}: matmul {ceiling.matmul / 1e9:,.1f} GFLOP/s, skinny {skinny} GFLOP/s",
            highlight=False,
        )
    copy, triad = found["float32"].copy, found["float32"].triad
    terminal.print(f"copy {copy / 1e9:.1f} GB/s, triad {triad / 1e9:.1f} GB/s", highlight=False)


def main(command: Command) -> None:
    """Runs the command."""
    case = update_step.Command(size=command.size, layout=command.layout, remat=command.remat).case
    where = environment.current()
    found = ceilings(command, case)
    _print_ceilings(found)
    measured = screen.measure_shown(
        {name: methods.make_step(name, case) for name in methods.PLAIN},
        cases.inputs(case, command.seed),
        rounds=command.repeats,
        seed=command.seed,
    )
    plain = measure.fastest(measured, methods.PLAIN)
    seconds = measure.quartiles(measured[plain].seconds).median
    ceiling = found[case.config.dtype]
    flops = case.microbatches * case.sequences * decoder.gradient_flops(case.config, case.tokens)
    extra = {"accumulation": accumulation_seconds(case, ceiling)}
    extra |= {f"intra_{r}": intra_seconds(case, r, ceiling) for r in command.ranks}
    bounds: dict[str, dict[str, Any]] = {
        name: {"least_extra_seconds": least, "least_ratio": 1 + least / seconds}
        for name, least in extra.items()
    }
    shown = table.Table(
        title=f"{command.size}: {plain} takes {seconds:.4f} s, {flops / seconds / 1e9:,.1f} "
        f"GFLOP/s, {flops / seconds / ceiling.matmul:.0%} of the ceiling",
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    shown.add_column("method")
    for header in ("least extra seconds", "least ratio"):
        shown.add_column(header, justify="right")
    for name, bound in bounds.items():
        shown.add_row(name, f"{bound['least_extra_seconds']:.5f}", f"{bound['least_ratio']:.3f}")
    terminal.print(shown)
    command.directory.mkdir(parents=True, exist_ok=True)
    file = command.directory / "roofline.json"
    measure.save(
        file,
        command,
        where,
        case=dataclasses.asdict(case),
        ceilings={dtype: ceiling._asdict() for dtype, ceiling in found.items()},
        plain=plain,
        plain_seconds=measured[plain].seconds,
        plain_step_flops=flops,
        bounds=bounds,
    )
    terminal.print(f"Settings, environment, all numbers: {file}", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Command, prog="python -m benchmarks.roofline"))
