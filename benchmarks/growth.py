"""`python -m benchmarks.growth`: how a step's cost grows, one variable at a time from a base case.

For plain policy gradient (the faster of its forms at each point) it is the seconds of a step, for
the other methods the seconds beyond plain, both against the expectation, which is drawn dashed:

plain
    Every kernel (d_in, d_out) costs 6 · n · d_in · d_out for n = b · T tokens: slope 1 in sequences
    b, tokens T and layers, 2 in width. Attention adds b · T² · width, so that T tends to 2.
accumulation
    The weight gradient's product is made per sequence rather than at once, which costs nothing.
    The Gram matrix adds b² · d_in · d_out, the inner products with the running gradient and the
    weighted sum b · d_in · d_out each: slope 1 in sequences, tending to 2; 0 in tokens; 2 in width;
    1 in layers. The embedding table, which is also the head, is not projected.
intra
    Each product of the range finder with X or D costs n · d · r: slope 1 in sequences, tokens,
    layers and rank, 1 in width. Orthonormalising (r² · d) and projecting (r · d_in · d_out) do not
    grow with n and tend to 2 in rank and in width.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal, get_args

import jax
import numpy as np
import tyro
from matplotlib import figure
from rich import box, table

from benchmarks import cases, decoder, measure, methods, screen
from benchmarks.screen import terminal
from experiments import environment

Variable = Literal["sequences", "tokens", "width", "layers", "rank"]
Rows = list[dict[str, Any]]

_PLAIN = "plain"
_STYLES = {"plain": "#000000", "accumulation": "#0072B2", "intra": "#009E73", "both": "#D55E00"}
# Slopes in a log-log plot; the second is that of the part which grows fastest, where it differs.
_EXPECTED: dict[str, dict[Variable, tuple[int, ...]]] = {
    "plain": {"sequences": (1,), "tokens": (1, 2), "width": (2,), "layers": (1,), "rank": (0,)},
    "accumulation": {"sequences": (1, 2), "tokens": (0,), "width": (2,), "layers": (1,)},
    "intra": {
        "sequences": (1,),
        "tokens": (1,),
        "width": (1, 2),
        "layers": (1,),
        "rank": (1, 2),
    },
}


@dataclasses.dataclass(frozen=True)
class Point:
    """A case and a rank."""

    sequences: int = 8
    """Sequences in a microbatch."""
    tokens: int = 256
    """Tokens of each sequence."""
    width: int = 256
    """Features of the residual stream; heads and feed-forward grow with it."""
    layers: int = 2
    """Blocks of the decoder."""
    rank: int = 10
    """Rank of intra's subspaces."""
    vocab: int = 256
    """Rows of the embedding table, few so that the head does not hide the blocks."""
    microbatches: int = 2
    """Microbatches in the optimizer step."""
    scanned: bool = False
    """Whether the blocks are scanned over."""
    remat: bool = False
    """Whether the backward pass computes each block's activations anew."""

    @property
    def case(self) -> cases.Case:
        """The case, with heads of up to 64 features and two query heads to a key head."""
        heads = max(1, self.width // 64)
        shape = decoder.DecoderConfig(
            vocab=self.vocab,
            width=self.width,
            layers=self.layers,
            heads=heads,
            kv_heads=max(1, heads // 2),
            head_dim=min(64, self.width),
            hidden=3 * self.width,
            scanned=self.scanned,
            remat=self.remat,
        )
        return cases.Case(shape, self.sequences, self.tokens, self.microbatches)


@dataclasses.dataclass(frozen=True)
class Command:
    """Times methods and plain policy gradient while one variable after the other grows."""

    variables: tuple[Variable, ...] = get_args(Variable)
    """What to vary."""
    methods: tuple[str, ...] = ("accumulation_fused", "intra_{rank}_fused")
    """What to measure beside plain; {rank} stands for the rank, and where the rank varies, only
    methods with it are measured."""
    base: Point = Point()
    """Where all else is held."""
    sequences: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Values of sequences."""
    tokens: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Values of tokens; up to 4096 on an accelerator."""
    width: tuple[int, ...] = (64, 128, 256, 512)
    """Values of width."""
    layers: tuple[int, ...] = (1, 2, 4, 8)
    """Values of layers."""
    rank: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Values of rank."""
    repeats: int = 7
    """Timed rounds at each point."""
    seed: int = 0
    """Of parameters, batch, and the order within the rounds."""
    directory: pathlib.Path = pathlib.Path("runs/bench/growth")
    """Where the results go."""

    def __post_init__(self):
        for template in self.methods:
            methods.make_step(template.format(rank=self.base.rank), self.base.case)


def _measure(command: Command, variable: Variable, value: int) -> Rows:
    """One row per method, plain first, at one point."""
    change: dict[str, Any] = {variable: value}
    point = dataclasses.replace(command.base, **change)
    templates = [name for name in command.methods if variable != "rank" or "{rank}" in name]
    names = {template: template.format(rank=point.rank) for template in templates}
    steps = {
        name: methods.make_step(name, point.case) for name in (*methods.PLAIN, *names.values())
    }
    measured = screen.measure_shown(
        steps,
        cases.inputs(point.case, command.seed),
        rounds=command.repeats,
        seed=command.seed,
        title=f"{variable} {value}:",
    )
    fastest = measure.fastest(measured, methods.PLAIN)
    baseline = measured[fastest]
    rows: Rows = []
    for label, name in ((_PLAIN, fastest), *names.items()):
        result = measured[name]
        row: dict[str, Any] = {
            "variable": variable,
            "value": value,
            "method": label,
            "measured": name,
        }
        row |= dataclasses.asdict(result)
        if result.seconds:
            cost = baseline.seconds if label == _PLAIN else measure.extra_seconds(result, baseline)
            row["cost"] = measure.quartiles(cost)._asdict()
            row["ratio"] = measure.quartiles(measure.ratios(result, baseline))._asdict()
        rows.append(row)
    return rows


def _points(rows: Rows, variable: str, method: str, kind: str) -> list[tuple[int, dict[str, Any]]]:
    """(value, quartiles) of what can be drawn on logarithmic axes."""
    return [
        (row["value"], row[kind])
        for row in rows
        if (row["variable"], row["method"]) == (variable, method)
        and row["seconds"]
        and row[kind]["median"] > 0
    ]


def slope(rows: Rows, variable: str, method: str) -> float | None:
    """Least-squares slope of log cost against log value; None without two positive costs."""
    points = _points(rows, variable, method, "cost")
    if len(points) < 2:
        return None
    logs = np.log([[value, cost["median"]] for value, cost in points])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def _kind(method: str) -> str:
    """The key of a method's style and expectation."""
    return next((kind for kind in _STYLES if kind in method.split("_")), "both")


def _label(method: str) -> str:
    """A method in words: "intra_{rank}_fused" is "intra, fused"."""
    words = [word for word in method.split("_") if word not in (_kind(method), "{rank}")]
    return ", ".join([_kind(method), *words])


def _expected(method: str, variable: Variable) -> tuple[int, ...]:
    return _EXPECTED.get(_kind(method), {}).get(variable, ())


def _draw(rows: Rows, command: Command, path: pathlib.Path) -> None:
    """A column per variable: costs above, ratios below; dashed, the expected slopes."""
    columns = len(command.variables)
    picture = figure.Figure(figsize=(1 + 2.9 * columns, 6), layout="constrained")
    panels = picture.subplots(2, columns, squeeze=False, sharex="col", sharey="row")
    for column, variable in enumerate(command.variables):
        costs, ratios = panels[:, column]
        for method in (_PLAIN, *command.methods):
            colour = _STYLES[_kind(method)]
            for panel, kind in ((costs, "cost"), (ratios, "ratio")):
                points = _points(rows, variable, method, kind)
                if not points or (kind == "ratio" and method == _PLAIN):
                    continue
                values = np.array([value for value, _ in points])
                spread = np.array([list(quartiles.values()) for _, quartiles in points])
                middle, lower, upper = spread.T
                label = _label(method) + (": beyond plain" if method != _PLAIN else "")
                whiskers = [np.minimum(middle - lower, 0.9 * middle), upper - middle]
                panel.errorbar(
                    values, middle, whiskers, color=colour, marker=".", capsize=2, label=label
                )
                if kind == "cost":
                    for power in _expected(method, variable):
                        guide = middle[-1] * (values / values[-1]) ** power
                        panel.plot(values, guide, "--", color=colour, linewidth=0.8, alpha=0.6)
        costs.set(xscale="log", yscale="log", title=variable)
        ratios.set(xscale="log", xlabel=variable)
        ratios.axhline(1, color="black", linewidth=1)
        values = getattr(command, variable)
        ratios.set_xticks(values, map(str, values))
        ratios.minorticks_off()
    drawn = [row["cost"]["median"] for row in rows if row["seconds"] and row["cost"]["median"] > 0]
    panels[0, 0].set_ylim(min(drawn) / 3, max(drawn) * 3)  # rather than the guides' range
    panels[0, 0].set_ylabel("seconds of an optimizer step's gradient")
    panels[1, 0].set_ylabel("ratio to plain")
    picture.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    picture.savefig(path, dpi=150)


def _table(rows: Rows, command: Command) -> table.Table:
    shown = table.Table(
        title="Growth of a step's cost",
        caption="cost: seconds, for all but plain those beyond plain; slope: of log cost against "
        "log value; ratio to plain: at the first and the last value",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for header in ("variable", "method"):
        shown.add_column(header, no_wrap=True)
    for header in ("slope", "expected", "first\nratio", "last\nratio"):
        shown.add_column(header, justify="right")
    for variable in command.variables:
        for method in (_PLAIN, *command.methods):
            ratios = [q["median"] for _, q in _points(rows, variable, method, "ratio")]
            if not ratios:
                continue
            found = slope(rows, variable, method)
            shown.add_row(
                variable,
                _label(method),
                "none" if found is None else f"{found:.2f}",
                " to ".join(map(str, _expected(method, variable))),
                f"{ratios[0]:.3f}",
                f"{ratios[-1]:.3f}",
            )
    return shown


def main(command: Command) -> None:
    """Runs the command."""
    began = time.monotonic()
    command.directory.mkdir(parents=True, exist_ok=True)
    files = [command.directory / "growth.json", command.directory / "growth.png"]
    where, rows = environment.current(), Rows()
    for variable in command.variables:
        for value in getattr(command, variable):
            at = _measure(command, variable, value)
            rows += at
            costs = (
                f"{row['method']} {row['cost']['median']:.4f} s"
                if row["seconds"]
                else f"{row['method']} failed: {row['error']}"
                for row in at
            )
            terminal.print(f"{variable} {value}: {', '.join(costs)}", highlight=False, markup=False)
    slopes = {
        variable: {method: slope(rows, variable, method) for method in (_PLAIN, *command.methods)}
        for variable in command.variables
    }
    measure.save(files[0], command, where, slopes=slopes, points=rows)
    _draw(rows, command, files[1])
    terminal.print(_table(rows, command))
    screen.say_where(files[0], files[1], began)


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # its time is a result
    main(tyro.cli(Command, prog="python -m benchmarks.growth"))
