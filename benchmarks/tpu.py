"""`python -m benchmarks.tpu`: what a step takes on TPU chips, by their compiler, without a chip.

libtpu compiles for named topologies on any machine. Nothing is allocated and nothing runs: models
are given by their shapes. For each method it says what the compiled program needs on one device:

memory
    The arguments (parameters and batch), the results, and the compiler's peak beyond the arguments:
    what is live at the worst moment, results included. `temp_size_in_bytes`, which JAX names too,
    is no such figure: for the fused form at Qwen3-0.6B's shapes it is 9.1 GiB, where 6.3 GiB are
    allocated. The largest arrays at that moment are in the results file. Of a program that does
    not fit into the chip's memory, only the compiler's message is kept, which says by how much.
work
    Operations, bytes of memory read and written, and bytes received from other devices, loops
    included; see `hlo`. Also by kind of collective.
compilation
    Seconds of tracing, lowering and the compiler, and the seconds that the processor's cores
    worked on it, which other programs on the machine change less.

On a mesh the axes are "data" and "fsdp": sequences are spread over both, kernels and the embedding
table by their rows over "fsdp". All layers are scanned and rematerialised.
"""

import dataclasses
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib import figure
from rich import box, table

from benchmarks import cases, decoder, hlo, measure, methods, screen
from benchmarks.screen import terminal
from experiments import chips, environment

_METHODS = (
    "plain_batched",
    "plain_fused",
    "accumulation_fused",
    "intra_10_fused",
    "both_10_fused",
)
_NUM_LARGEST = 8


@dataclasses.dataclass(frozen=True)
class Command:
    """Compiles methods for TPU chips and says what they need, relative to the first."""

    size: cases.Size = "qwen3-0.6b"
    """The decoder, and the batch that goes with it."""
    topology: str = "v5p:2x2x1"
    """The chips: v5e:2x4, v5p:2x2x1, v5p:4x4x4, v6e:2x4, ..."""
    data: int = 1
    """Devices along the mesh axis over which sequences alone are spread."""
    fsdp: int = 1
    """Devices along the mesh axis over which parameters are spread as well."""
    layers: int | None = None
    """Number of blocks. Default: the decoder's."""
    vocab: int | None = None
    """Rows of the embedding table. Default: the decoder's."""
    sequences: int | None = None
    """Sequences in a microbatch, on all devices together. Default: 8."""
    tokens: int | None = None
    """Tokens of each sequence. Default: that of the size."""
    microbatches: int | None = None
    """Microbatches in the optimizer step. Default: that of the size."""
    logits_at_a_time: int | None = None
    """Tokens of a sequence whose logits are formed together. Default: that of the size."""
    methods: tuple[str, ...] = _METHODS
    """What to compile; see `benchmarks.methods`. The first is what the others are compared with."""
    directory: pathlib.Path | None = None
    """Where the results go. Default: runs/bench/ and the name of the case."""

    def __post_init__(self):
        if self.data < 1 or self.fsdp < 1:
            raise ValueError(f"{self.data=} and {self.fsdp=} must be at least 1")
        if not self.methods:
            raise ValueError("methods must name one method at least")

    @property
    def case(self) -> cases.Case:
        """The case that the settings describe, on one device."""
        case = cases.SIZES[self.size]
        config = dataclasses.replace(
            case.config,
            scanned=True,
            remat=True,
            layers=self.layers or case.config.layers,
            vocab=self.vocab or case.config.vocab,
            logits_at_a_time=self.logits_at_a_time or case.config.logits_at_a_time,
        )
        case = dataclasses.replace(case, config=config)
        return case.with_batch(self.sequences, self.tokens, self.microbatches)

    @property
    def name(self) -> str:
        """The case in words."""
        case, topology = self.case, self.topology.replace(":", "_")
        batch = f"{case.microbatches}x{case.sequences}x{case.tokens}"
        depth = f"{case.config.layers}layers_vocab{case.config.vocab}"
        return f"tpu_{self.size}_{depth}_{batch}_{topology}_{self.data}x{self.fsdp}"


def mesh_of(command: Command) -> Mesh:
    """The mesh of (data, fsdp) chips.

    Raises:
        ValueError: the topology has too few chips, or cannot be cut so.
    """
    topology = chips.described(command.topology)
    count = len(topology.devices)
    if command.data * command.fsdp not in (1, count):
        raise ValueError(
            f"data={command.data} times fsdp={command.fsdp} must be the {count} chips "
            f"of topology={command.topology!r}, or 1."
        )
    return chips.mesh(topology, (command.data, command.fsdp))


def _spec(path: Any, leaf: Any) -> P:
    """How a parameter leaf is spread: kernels and tables by their rows, norms not at all."""
    is_norm = path[-1].key.endswith("norm")
    return P() if is_norm else P(*[None] * (leaf.ndim - 2), "fsdp")


def arguments_of(case: cases.Case, mesh: Mesh) -> tuple[cases.Case, decoder.Params, cases.Batch]:
    """The case as it is told of the mesh, and the shapes of parameters and batch."""

    def placed(x: Any, spec: P) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.eval_shape(lambda: decoder.init(case.config, jax.random.key(0)))
    specs = jax.tree_util.tree_map_with_path(_spec, params)
    shape = (case.microbatches, case.sequences)
    batch = jax.eval_shape(
        lambda: cases.Batch(
            tokens=jnp.zeros((*shape, case.tokens), jnp.int32),
            coefficients=jnp.zeros(shape),
            old_logprobs=jnp.zeros((*shape, case.tokens - 1)),
        )
    )
    if mesh.size > 1:
        on_mesh = {"spmd_axis_name": ("data", "fsdp"), "param_specs": specs}
        case = dataclasses.replace(case, on_mesh=on_mesh)
    spread = jax.tree.map(lambda x: placed(x, P(None, ("data", "fsdp"))), batch)
    return case, jax.tree.map(placed, params, specs), spread


def compile_step(step: Callable[..., Any], arguments: Any) -> dict[str, Any]:
    """Compiles a step and says what it needs."""
    jax.clear_caches()
    began, began_cpu = time.perf_counter(), time.process_time()
    shardings = jax.tree.map(lambda x: x.sharding, arguments[0])
    lowered = jax.jit(step, out_shardings=shardings).lower(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = {
            "xla_dump_to": folder,
            "xla_dump_hlo_as_text": True,
            "xla_dump_hlo_pass_re": "NONE",
        }
        compiled = lowered.compile(compiler_options=options)
        done, done_cpu = time.perf_counter(), time.process_time()
        reports = sorted(pathlib.Path(folder).glob("*memory-usage-report.txt"))
        largest = largest_arrays(reports[-1].read_text()) if reports else []
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    program = hlo.Program(text)
    collectives = program.collectives()
    return {
        "compile_seconds": done - began,
        "cpu_seconds": done_cpu - began_cpu,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "beyond_arguments_bytes": memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        "largest_arrays": largest,
        "operations": program.operations(),
        "moved_bytes": program.bytes(),
        "received_bytes": sum(traffic.bytes for traffic in collectives.values()),
        "collectives": {kind: traffic._asdict() for kind, traffic in collectives.items()},
    }


def largest_arrays(report: str) -> list[str]:
    """The largest places in the chip's memory by the compiler's report: size, and what is there."""
    space = report.partition("Memory Space: default")[2].partition("\n\n")[0]
    rows = re.findall(r"^ *[\d.]+\w+\( *\d+%\); +([\d.]+\w+); +\d+; +\d+; (.*)$", space, re.M)
    return [f"{size}: {arrays}" for size, arrays in rows[:_NUM_LARGEST]]


class _Column(NamedTuple):
    key: str
    header: str
    unit: float
    has_ratio: bool = True


_MEMORY = (
    _Column("argument_bytes", "inputs GiB", 2**30, has_ratio=False),
    _Column("output_bytes", "results GiB", 2**30, has_ratio=False),
    _Column("beyond_arguments_bytes", "beyond inputs GiB", 2**30),
    _Column("cpu_seconds", "compile CPU s", 1),
)
_WORK = (
    _Column("operations", "Tflop", 1e12),
    _Column("moved_bytes", "memory GiB", 2**30),
    _Column("received_bytes", "received GiB", 2**30),
)


def _table(
    results: dict[str, dict[str, Any]], title: str, columns: Sequence[_Column]
) -> table.Table:
    """Methods by columns, each with its ratio to the first method."""
    baseline = next(iter(results.values()))
    shown = table.Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    shown.add_column("method", no_wrap=True)
    for column in columns:
        for header in (column.header, "ratio")[: 1 + column.has_ratio]:
            shown.add_column(header, justify="right")
    for name, row in results.items():
        cells = [name]
        for key, _, unit, has_ratio in columns:
            cells.append(f"{row[key] / unit:.3g}")
            if has_ratio:
                cells.append(f"{row[key] / baseline[key]:.2f}" if baseline[key] else "-")
        shown.add_row(*cells)
    return shown


def _draw(results: dict[str, dict[str, Any]], title: str, file: pathlib.Path) -> None:
    drawing = figure.Figure(figsize=(8, 1 + 0.5 * len(results)), layout="constrained")
    memory, seconds = drawing.subplots(1, 2, sharey=True)
    names = list(results)[::-1]
    memory.barh(names, [results[n]["beyond_arguments_bytes"] / 2**30 for n in names])
    memory.set_xlabel("peak memory of a device beyond arguments, GiB")
    seconds.barh(names, [results[n]["compile_seconds"] for n in names], color="tab:orange")
    seconds.set_xlabel("compilation, s")
    drawing.suptitle(title, fontsize="medium")
    drawing.savefig(file, dpi=150)


def main(command: Command) -> None:
    """Compiles and writes the results."""
    began = time.monotonic()
    mesh = mesh_of(command)
    case, *arguments = arguments_of(command.case, mesh)
    results, misfits = {}, {}
    with jax.set_mesh(mesh):
        for name in command.methods:
            terminal.print(f"Compiling {name} for {command.topology}")
            try:
                results[name] = compile_step(methods.make_step(name, case), arguments)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                misfits[name] = str(error).splitlines()[0]
                terminal.print(f"{name} does not fit: {misfits[name]}")
    directory = command.directory or pathlib.Path("runs/bench") / command.name
    directory.mkdir(parents=True, exist_ok=True)
    file, drawing = directory / "results.json", directory / "memory.png"
    title = f"{command.name}, for one device"
    measure.save(file, command, environment.current(), results=results, misfits=misfits)
    if results:
        _draw(results, title, drawing)
        terminal.print(_table(results, title, _MEMORY), _table(results, "", _WORK))
    screen.say_where(file, drawing, began)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # its time is a result
    main(tyro.cli(Command, prog="python -m benchmarks.tpu"))
