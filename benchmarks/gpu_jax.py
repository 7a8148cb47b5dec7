"""`python -m benchmarks.gpu_jax`: methods of `benchmarks.update_step`, where only JAX is installed.

The same measurement of the same steps, on scanned and rematerialised layers, by `measure.measure`,
without what the terminal's tables and command lines need. It prints a row for each method.
"""

import argparse
import dataclasses

from benchmarks import cases, gpu_rows, measure, methods


def main() -> None:
    """Measures the methods named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=cases.SIZES, default="qwen3-0.6b")
    parser.add_argument("--methods", nargs="+", required=True, metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()

    case = cases.SIZES[settings.size]
    case = dataclasses.replace(
        case, config=dataclasses.replace(case.config, scanned=True, remat=True)
    )
    steps = {name: methods.make_step(name, case) for name in settings.methods}
    gpu_rows.say("make parameters and batch")
    arguments = cases.inputs(case, settings.seed)
    measured = measure.measure(
        steps,
        arguments,
        rounds=settings.rounds,
        seed=settings.seed,
        stop_after=settings.stop_after,
        show=gpu_rows.say,
    )
    rows = [{"method": name, **dataclasses.asdict(result)} for name, result in measured.items()]
    gpu_rows.finish(rows)


if __name__ == "__main__":
    main()
