"""`python -m benchmarks.gpu_torch`: time and memory of the demonstration's algorithm in PyTorch.

It stands beside `benchmarks.gpu_jax`: the same shapes, the same kind of rounds, a row for each
method. Their names, with r a rank:

torch_plain, torch_plain_compiled
    Plain policy gradient, eager and with `torch.compile`.
torch_accumulation, torch_intra_r
    The demonstration's algorithm, by hooks on the linear layers; see `torch_demonstration`.
"""

import argparse
import functools
import random
import time
from collections.abc import Callable
from typing import Any

import torch  # type: ignore[import-not-found]

from benchmarks import cases, gpu_rows
from benchmarks import torch_demonstration as demonstration
from benchmarks.torch_decoder import Decoder

Step = Callable[[Decoder, demonstration.Batch], demonstration.Gradients]


def make_step(name: str) -> Step:
    """The method's gradient of a whole optimizer step.

    Raises:
        ValueError: there is no method of that name.
    """
    match name.split("_"):
        case ["torch", "plain"]:
            return demonstration.plain
        case ["torch", "plain", "compiled"]:
            return functools.partial(demonstration.plain, compiled=True)
        case ["torch", "accumulation"]:
            return functools.partial(demonstration.demonstration, update=demonstration.accumulated)
        case ["torch", "intra", rank] if rank.isdecimal() and int(rank):
            return functools.partial(
                demonstration.demonstration, update=demonstration.intra(int(rank))
            )
    raise ValueError(f"no method {name!r}; see python -m benchmarks.gpu_torch --help")


def make_batch(case: cases.Case, device: str) -> demonstration.Batch:
    """Random tokens, and coefficients of the size of those in `cases.inputs`."""
    shape = (case.microbatches, case.sequences)
    tokens = torch.randint(case.config.vocab, (*shape, case.tokens), device=device)
    return demonstration.Batch(tokens, torch.randn(shape, device=device) / tokens.numel())


class Timed:
    """A step's run on a model and a batch, with the time and memory that it takes."""

    def __init__(self, name: str, model: Decoder, batch: demonstration.Batch):
        self._run = functools.partial(make_step(name), model, batch)
        self._on_gpu = batch.tokens.is_cuda
        self.row: dict[str, Any] = {"method": name, "seconds": [], "memory": {}, "error": None}

    def seconds(self) -> tuple[float, demonstration.Gradients]:
        """One run's seconds, and its result."""
        if self._on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        gradients = self._run()
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began, gradients

    def warm_up(self) -> None:
        """Runs twice: the first compiles a compiled step, the second says what memory it takes."""
        try:
            self.row["first_seconds"] = self.seconds()[0]
            if self._on_gpu:
                torch.cuda.reset_peak_memory_stats()
            _, gradients = self.seconds()
        except RuntimeError as error:
            self.row["error"] = str(error).splitlines()[0]
            return
        if self._on_gpu:
            self.row["memory"]["device_peak"] = torch.cuda.max_memory_allocated()
        self.row["norm"] = sum(g.square().sum().item() for g in gradients.values()) ** 0.5


def main() -> None:
    """Measures the methods named on the command line."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=cases.SIZES, default="qwen3-0.6b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--methods", nargs="+", required=True, metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()

    torch.manual_seed(settings.seed)
    case = cases.SIZES[settings.size]
    gpu_rows.say("make parameters and batch")
    model = Decoder(case.config, settings.device, settings.backend)
    batch = make_batch(case, settings.device)
    every = [Timed(name, model, batch) for name in settings.methods]
    for step in every:
        gpu_rows.say(f"warm up {step.row['method']}")
        step.warm_up()
    shuffled = random.Random(settings.seed)
    ran = [step for step in every if not step.row["error"]]
    for number in range(1, settings.rounds + 1):
        if number > 1 and time.monotonic() - began > settings.stop_after:
            break
        for step in shuffled.sample(ran, len(ran)):
            gpu_rows.say(f"round {number} {step.row['method']}")
            step.row["seconds"].append(step.seconds()[0])
    gpu_rows.finish([step.row for step in every])


if __name__ == "__main__":
    main()
