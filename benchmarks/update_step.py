"""`python -m benchmarks.update_step`: time and memory of one optimizer step's gradient.

Every method computes the gradient of k microbatches in one jitted function, without the optimizer
itself. A ratio is to the fastest way of computing plain policy gradient in the same layout.
"""

import dataclasses
import pathlib
import time
from typing import Any, Literal

import jax
import tyro
from matplotlib import figure
from rich import box, table

from benchmarks import cases, decoder, measure, methods, screen
from benchmarks.screen import terminal
from experiments import environment

Layout = Literal["unrolled", "scanned"]


@dataclasses.dataclass(frozen=True)
class Command:
    """Times methods against plain policy gradient, in interleaved rounds on one case."""

    size: cases.Size = "tiny"
    """The decoder, and the batch that goes with it."""
    layout: Layout = "unrolled"
    """Whether the decoder's blocks are a Python loop or a scan over stacked parameters."""
    remat: bool = False
    """Whether the backward pass computes each block's activations anew."""
    dtype: decoder.DtypeName | None = None
    """Of parameters and activations. Default: float32, for qwen3-0.6b bfloat16."""
    sequences: int | None = None
    """Sequences in a microbatch. Default: 8."""
    tokens: int | None = None
    """Tokens of each sequence. Default: 256, for qwen3-0.6b 1536."""
    microbatches: int | None = None
    """Microbatches in the optimizer step. Default: 2, for tiny 4."""
    methods: tuple[str, ...] = methods.METHODS
    """What to measure; see `benchmarks.methods`. Ranks may be others than 10 and 100."""
    repeats: int = 7
    """Timed rounds, each of which runs every method once."""
    seed: int = 0
    """Of parameters, batch, and the order within the rounds."""
    directory: pathlib.Path | None = None
    """Where the results go. Default: runs/bench/ and the name of the case."""

    def __post_init__(self):
        if not set(self.methods) & set(methods.PLAIN):
            raise ValueError(f"{self.methods=} must hold one of {', '.join(methods.PLAIN)}")
        if self.repeats < 1:
            raise ValueError(f"{self.repeats=} must be at least 1")

    @property
    def case(self) -> cases.Case:
        """The case that the settings describe."""
        case = cases.SIZES[self.size]
        shape = dataclasses.replace(
            case.config,
            scanned=self.layout == "scanned",
            remat=self.remat,
            dtype=self.dtype or case.config.dtype,
        )
        case = dataclasses.replace(case, config=shape)
        return case.with_batch(self.sequences, self.tokens, self.microbatches)

    @property
    def name(self) -> str:
        """The case in words."""
        case = self.case
        remat = "_remat" if self.remat else ""
        batch = f"{case.microbatches}x{case.sequences}x{case.tokens}"
        return f"{self.size}_{self.layout}{remat}_{case.config.dtype}_{batch}"


def _summary(
    measured: dict[str, measure.Measurement], plain: str, parameter_bytes: int
) -> dict[str, dict[str, Any]]:
    """Each method's results, raw and summed up."""
    baseline = measured[plain]
    summary = {}
    for name, result in measured.items():
        row: dict[str, Any] = dataclasses.asdict(result)
        row["compile_ratio"] = result.compile_seconds / baseline.compile_seconds
        if result.memory:
            extra = result.memory["temp"] - baseline.memory["temp"]
            row["extra_temp_per_parameter_byte"] = extra / parameter_bytes
        if result.seconds:
            row["seconds_quartiles"] = measure.quartiles(result.seconds)._asdict()
            row["ratios"] = measure.ratios(result, baseline).tolist()
            row["ratio_quartiles"] = measure.quartiles(row["ratios"])._asdict()
        summary[name] = row
    return summary


def _table(summary: dict[str, dict[str, Any]], plain: str, title: str) -> table.Table:
    shown = table.Table(
        title=title,
        caption=f"ratio: to {plain} in the same round, median and quartiles; compile: tracing and "
        "lowering + XLA's compilation, and the latter's ratio; temp: XLA's temporary memory; "
        f"extra temp: beyond {plain}'s, as a fraction of the parameters' bytes",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    headers = ("median\nseconds", "ratio", "quartiles", "compile\ns", "ratio", "temp\nMB")
    shown.add_column("method", no_wrap=True)
    for header in (*headers, "extra\ntemp"):
        shown.add_column(header, justify="right", no_wrap=True)
    for name, row in summary.items():
        cells = ["failed", "", ""]
        if row["seconds"]:
            ratio = row["ratio_quartiles"]
            cells = [
                f"{row['seconds_quartiles']['median']:.4f}",
                f"{ratio['median']:.3f}",
                f"[{ratio['lower']:.3f}, {ratio['upper']:.3f}]",
            ]
        if row["memory"]:
            cells += [
                f"{row['trace_seconds']:.1f} + {row['compile_seconds']:.1f}",
                f"{row['compile_ratio']:.2f}",
                f"{row['memory']['temp'] / 1e6:.1f}",
                f"{row['extra_temp_per_parameter_byte']:+.2f}",
            ]
        shown.add_row(name, *cells, style="bold" if name == plain else None)
    return shown


def _draw(summary: dict[str, dict[str, Any]], plain: str, title: str, path: pathlib.Path) -> None:
    """Ratios as horizontal bars, quartiles as whiskers."""
    ran = {name: row["ratio_quartiles"] for name, row in summary.items() if row["seconds"]}
    picture = figure.Figure(figsize=(7.2, 1.3 + 0.3 * len(ran)), layout="constrained")
    panel = picture.subplots()
    medians = [row["median"] for row in ran.values()]
    whiskers = [
        [row["median"] - row["lower"] for row in ran.values()],
        [row["upper"] - row["median"] for row in ran.values()],
    ]
    colours = ["#999999" if name in methods.PLAIN else "#0072B2" for name in ran]
    bars = panel.barh(list(ran), medians, xerr=whiskers, color=colours, ecolor="black", capsize=2)
    panel.bar_label(bars, [f"{median:.2f}" for median in medians], padding=4, fontsize="small")
    panel.axvline(1, color="black", linewidth=1)
    panel.invert_yaxis()
    panel.margins(x=0.1)
    panel.set(xlabel=f"time of an optimizer step's gradient / that of {plain}", title=title)
    picture.savefig(path, dpi=150)


def main(command: Command) -> None:
    """Runs the command."""
    began = time.monotonic()
    case = command.case
    steps = {name: methods.make_step(name, case) for name in command.methods}
    directory = command.directory or pathlib.Path("runs/bench") / command.name
    directory.mkdir(parents=True, exist_ok=True)
    where = environment.current()
    params, batch = cases.inputs(case, command.seed)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    step_flops = (
        case.microbatches * case.sequences * decoder.gradient_flops(case.config, case.tokens)
    )
    terminal.print(
        f"{command.name}: {parameters:,} parameters, {step_flops / 1e9:,.1f} GFLOP in the matmuls "
        f"of a plain step, on {', '.join(where['devices'])}",
        highlight=False,
    )

    measured = screen.measure_shown(
        steps, (params, batch), rounds=command.repeats, seed=command.seed
    )
    plain = measure.fastest(measured, methods.PLAIN)
    summary = _summary(measured, plain, parameter_bytes)
    rate = step_flops / summary[plain]["seconds_quartiles"]["median"]
    files = [directory / "results.json", directory / "ratios.png"]
    measure.save(
        files[0],
        command,
        where,
        case=dataclasses.asdict(case),
        parameters=parameters,
        parameter_bytes=parameter_bytes,
        plain=plain,
        plain_step_flops=step_flops,
        plain_flops_per_second=rate,
        methods=summary,
    )
    _draw(summary, plain, command.name, files[1])

    terminal.print(_table(summary, plain, command.name))
    for name, row in summary.items():
        if row["error"]:
            terminal.print(f"{name} failed: {row['error']}", highlight=False, markup=False)
    terminal.print(f"{plain} runs at {rate / 1e9:,.1f} GFLOP/s.", highlight=False)
    screen.say_where(files[0], files[1], began)


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # its time is a result
    main(tyro.cli(Command, prog="python -m benchmarks.update_step"))
