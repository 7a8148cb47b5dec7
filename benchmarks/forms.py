"""`python -m benchmarks.forms`: when dense scores cost less than pairs of tokens.

For one kernel, what accumulation computes of a microbatch (the loss gradient, the Gram matrix, the
inner products with G and the weighted sum that is removed) is timed twice, with the scores formed
and with their factors alone, over lengths of sequences and widths. `LayerFactors.compact` chooses
between the two by a static rule; the table shows what its choice costs beyond the better one.
"""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import tyro
from rich import box, table

import proma_jax as proma
from benchmarks import measure, screen
from benchmarks.screen import terminal
from experiments import environment
from proma_jax.project import span


@dataclasses.dataclass(frozen=True)
class Command:
    """Times both forms of a kernel's scores."""

    shapes: tuple[tuple[int, int], ...] = ((96, 256), (256, 256), (256, 768), (1024, 1024))
    """(d_in, d_out) of the kernel."""
    tokens: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Tokens of each sequence."""
    sequences: int = 8
    """Sequences in the microbatch."""
    repeats: int = 15
    """Timed rounds."""
    seed: int = 0
    """Of the factors, and the order within the rounds."""
    directory: pathlib.Path = pathlib.Path("runs/bench/forms")
    """Where the results go."""


def microbatch(total, scores, coefficients):
    """The accumulated gradient of one kernel after a microbatch."""
    [found] = span.combinations(
        [scores], [total], [None], span.Numbers(), coefficients=coefficients
    )
    return total + scores.weighted_sum(coefficients - found.weights * found.size)


def main(command: Command) -> None:
    """Runs the command."""
    command.directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(command.seed)
    shown = table.Table(
        caption="seconds are medians; regret: time of the chosen form / time of the better one",
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    for header in ("kernel", "tokens", "dense ms", "factors ms", "chosen", "regret"):
        shown.add_column(header, justify="right")
    rows = []
    for d_in, d_out in command.shapes:
        for tokens in command.tokens:
            shape = (command.sequences, tokens)
            factors = proma.LayerFactors(
                jnp.asarray(rng.normal(size=(*shape, d_in)), jnp.float32),
                jnp.asarray(rng.normal(size=(*shape, d_out)), jnp.float32),
            )
            total = jnp.asarray(rng.normal(size=(d_in, d_out)), jnp.float32)
            forms = {
                "dense": lambda total, s, c: microbatch(total, s.dense(), c),
                "factors": microbatch,
            }
            measured = screen.measure_shown(
                forms,
                (total, factors, jnp.ones(command.sequences)),
                rounds=command.repeats,
                seed=command.seed,
            )
            chosen = "factors" if factors.compact() is factors else "dense"
            seconds = {form: measured[form].seconds for form in forms}
            medians = {form: measure.quartiles(times).median for form, times in seconds.items()}
            regret = medians[chosen] / min(medians.values())
            rows.append({"d_in": d_in, "d_out": d_out, "tokens": tokens, "chosen": chosen})
            rows[-1] |= {"seconds": seconds, "regret": regret}
            cells = [f"{1e3 * medians[form]:.3f}" for form in forms]
            shown.add_row(f"{d_in} x {d_out}", str(tokens), *cells, chosen, f"{regret:.2f}")
    file = command.directory / "forms.json"
    measure.save(file, command, environment.current(), rows=rows)
    terminal.print(shown)
    terminal.print(f"Settings, environment, all times: {file}", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Command, prog="python -m benchmarks.forms"))
