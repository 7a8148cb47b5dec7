"""Settings by name, or from an earlier run's config.json, as the flags that a user would type.

Flags that are typed as well come after them and win.
"""

import pathlib
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from experiments import files

_QWEN3 = """
--training.prompts 64 --training.group-size 16 --training.steps-per-batch 2
--training.microbatch-size 8 --training.steps 52 --training.validation-every 4
--training.sequences-at-a-time 64 --training.kl-sequences 64
--training.method.learning-rate 2e-6 --training.method.relative-bound None
--training.method.rank 10 --training.method.fused
--prompt-tokens 512 --response-tokens 1024 --logits-at-a-time 256
"""

PRESETS = {
    "demo": "--task addition --training.steps 40",
    "addition": "--task addition",
    "reversal": """
        --task reversal --start.decoder.layers 3 --start.target-accuracy 0.4
        --start.max-steps 4000 --training.steps 60 --training.method.learning-rate 3e-5
    """,
    "smollm2-arithmetic": """
        --model models/smollm2-135m-instruct --no-remat --task arithmetic --task-options hardest=2
        --prompt-tokens 64 --response-tokens 16 --training.steps 10 --training.prompts 16
        --training.sequences-at-a-time 32 --training.kl-sequences 32
        --training.validation-problems 128 --training.validation-every 2
        --training.method.learning-rate 1e-5 --training.method.fused
    """,
    "gsm8k-qwen3-0.6b": f"""
        --model models/qwen3-0.6b --task gsm8k
        --task-options train_file=data/gsm8k_train.jsonl validation_file=data/svamp.json {_QWEN3}
    """,
    "mbpp-qwen3-0.6b": f"""
        --model models/qwen3-0.6b --allow-code-execution --task mbpp
        --task-options train_file=data/mbpp.jsonl validation_file=data/HumanEval.jsonl.gz {_QWEN3}
    """,
}
"""Each preset's flags. Those with Qwen3-0.6B are the paper's setting: 64 prompts x 16 responses,
two optimizer steps of 32 prompts, microbatches of 8, 512 + 1,024 tokens, AdamW at 2e-6 (published:
1e-6 to 1e-5), 52 steps; accumulation without a bound, from the second half of the microbatches."""


def expanded(args: Sequence[str]) -> list[str]:
    """Arguments with `--preset NAME` and `--config FILE` replaced by the flags they stand for.

    Raises:
        files.Failure: there is no such preset, or the file holds no settings of a run.

    Example:
        >>> expanded(["--preset", "addition", "--seed", "1"])
        ['--task', 'addition', '--seed', '1']
    """
    stands_for = {"--preset": _preset, "--config": _config}
    first: list[str] = []
    typed: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg in stands_for:
            first += stands_for[arg](next(rest, ""))
        else:
            typed.append(arg)
    return first + typed


def _preset(name: str) -> list[str]:
    if name not in PRESETS:
        raise files.Failure(f"There is no preset {name!r}, but: {', '.join(PRESETS)}")
    return shlex.split(PRESETS[name])


def _config(name: str) -> list[str]:
    path = pathlib.Path(name)
    with files.using(path):
        content = path.read_bytes()
    cure = "Choose the config.json of a run."
    settings = files.parse(content, dict, str(path), cure, keys=["method", "seed", "training"])
    settings.pop("update_norms")
    unprefixed = settings.pop("task") | settings.pop("model")
    return list(_flags(settings | unprefixed, ""))


def _flags(settings: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, value in settings.items():
        flag = f"{prefix}{name}".replace("_", "-")
        if isinstance(value, dict):
            yield from _flags(value, f"{flag}.")
        elif isinstance(value, bool):
            head, _, tail = f"--{flag}".rpartition(".")
            yield (f"--{flag}" if value else f"{head}.no-{tail}" if head else f"--no-{flag}")
        elif isinstance(value, list):
            yield from [f"--{flag}", *map(str, value)]
        elif value is not None or name != "rope_scaling":
            yield from [f"--{flag}", str(value)]
