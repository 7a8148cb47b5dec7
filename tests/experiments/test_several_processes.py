"""Several processes, as on several hosts, train as one does, and stop together."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import chex
import jax
import pytest

from experiments import command_line, meshes, records, starts, train
from experiments.models import shards
from experiments.tasks.task import LazyProblems, Problem

NAME = f"tests.experiments.{pathlib.Path(__file__).stem}"
MODEL = pathlib.Path(__file__).parent / "models" / "data" / "qwen3"
MESH = "data=2,fsdp=2"
STEPS = 3


class Vowels:
    """Rewards vowels; the last of two processes is sent SIGTERM when it draws the third batch."""

    def __init__(self):
        self.drawn = 0
        self.training = LazyProblems(6, self.problem)
        self.validation = [Problem("Vowels: a"), Problem("Vowels: e")]

    def problem(self, place):
        self.drawn += 1
        # It is read once to be checked; a batch's two problems are, to sample and again to grade.
        if os.environ.get("JAX_PROCESS_ID") == "1" and self.drawn == 1 + 2 * 4 + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return Problem(f"Vowels: {'iouxyz'[place]}")

    def grade(self, problems, responses):
        del problems
        assert jax.process_index() == 0
        return {"reward": [sum(letter in "aeiou" for letter in text) for text in responses]}


def command(folder, *flags):
    flags = f"""
        --model {MODEL} --task {NAME}:Vowels --method reinforce --directory {folder}
        --no-remat --prompt-tokens 16 --response-tokens 8 --training.steps {STEPS}
        --training.prompts 2 --training.steps-per-batch 1 --training.kl-sequences 8
        --training.validation-every {STEPS} --training.method.learning-rate 1e-3 {" ".join(flags)}
    """
    return command_line.read(train.Command, "train", flags.split())


def run_in(folder):
    return folder / "reinforce" / "seed_0"


def in_files(model):
    """The model's tensors as its files have them."""
    tensors = shards.tensors(model)
    return {name: x.read((slice(None),) * len(x.shape)) for name, x in tensors.items()}


@pytest.mark.campaign
def test_two_processes_train_as_one_which_goes_on_when_they_were_stopped(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", NAME, str(tmp_path / "two")],
            cwd=pathlib.Path(__file__).parents[2],
            env=os.environ
            | {
                "XLA_FLAGS": flags,
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        train.main(command(tmp_path / "one"))
        ends = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [code for *_, code in ends] == [128 + signal.SIGTERM] * 2, ends
    first, second = (out.replace("\n", " ") for out, *_ in ends)
    assert "Preempted after step 2" in first
    assert "seed 0" not in second
    chex.assert_trees_all_equal(*map(in_files, (tmp_path / "two" / "model", MODEL)))
    train.main(command(tmp_path / "two"))
    rows, expected = (
        [
            {name: row[name] for name in row if name != "seconds"}
            for row in records.read_metrics(run_in(tmp_path / name))
        ]
        for name in ("two", "one")
    )
    assert len({row["reward"] for row in expected[1:]}) > 1
    chex.assert_trees_all_close(rows, expected, rtol=1e-4, atol=1e-6)
    entries = json.loads((run_in(tmp_path / "two") / "environment.json").read_bytes())
    assert [entry["processes"] for entry in entries] == [2, 1]


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        ("--distributed", "--distributed True needs a mesh over the devices of all processes"),
        ("--distributed --mesh fsdp=2", "--distributed True needs a pretrained model"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(flags, refusal, capsys):
    with pytest.raises(SystemExit):
        command_line.read(train.Command, "train", f"--method grpo {flags}".split())
    assert refusal in capsys.readouterr().err


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    several = command(folder, "--distributed", "--mesh", MESH)
    try:
        train.main(several)
    finally:
        policy, params = starts.pretrained(several.model, meshes.MeshConfig(MESH).made())
        starts.save(folder / "model", policy, params, several.model)
