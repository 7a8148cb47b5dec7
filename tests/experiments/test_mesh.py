"""A run on a mesh of eight virtual devices is that of one device, but for rounding."""

import dataclasses
import functools
import pathlib

import chex
import jax
import pytest
from jax.sharding import PartitionSpec

from experiments import (
    command_line,
    configs,
    files,
    generate,
    meshes,
    methods,
    plan,
    report,
    starts,
    train,
    training,
    warm_start,
)
from experiments.models.settings import ModelConfig
from experiments.tasks import code
from tests.experiments import tiny

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "models" / "data" / "qwen3"
SAMPLES = HERE / "tasks" / "samples"
MESH = "data=4,fsdp=2"
ROUNDING = {"rtol": 1e-4, "atol": 1e-6}


class Vowels(code.MBPP):
    """MBPP's problems, rewarded for vowels: programs of an untrained model pass no test."""

    def __post_init__(self):
        pass

    def grade(self, problems, responses):
        del problems
        return {"reward": [sum(letter in "aeiou" for letter in text) for text in responses]}


def config():
    """The preset with a tiny random model, short responses and few of them."""
    flags = f"""
        --preset mbpp-qwen3-0.6b --method proma_accumulation --model {MODEL}
        --task {__name__}:Vowels --task-options train_file={SAMPLES / "mbpp.jsonl"}
        --prompt-tokens 1024 --response-tokens 16 --training.steps 4 --training.prompts 2
        --training.sequences-at-a-time 32 --training.kl-sequences 12
        --training.validation-problems 1 --training.method.learning-rate 1e-3
    """
    return command_line.read(train.Command, "train", flags.split()).run_config()


class Start:
    """The policy and its start on a mesh, and the bytes of each device that updates are given."""

    def __init__(self, config, mesh):
        self.argument_bytes = []
        made = meshes.MeshConfig(mesh).made()
        self.start = report.start(config, pathlib.Path(), lambda: False, made)

    def train(self, config, directory):
        """The run's metrics but for the seconds, and the parameters that it ends with."""

        def on_compiled(update):
            self.argument_bytes.append(update.memory_analysis().argument_size_in_bytes)

        rows = training.train(config, *self.start, directory, on_compiled=on_compiled)
        numbers = [{name: row[name] for name in row if name != "seconds"} for row in rows]
        return numbers, training.trained(config, *self.start, directory)


@pytest.fixture(scope="module")
def one_device():
    return Start(config(), None)


@pytest.fixture(scope="module")
def expected(one_device, tmp_path_factory):
    return one_device.train(config(), tmp_path_factory.mktemp("one_device") / "run")


def assert_same(found, expected):
    for row, expected_row in zip(found[0], expected[0], strict=True):
        chex.assert_trees_all_close(row, expected_row, **ROUNDING)
    chex.assert_trees_all_close(*map(jax.device_get, (found[1], expected[1])), **ROUNDING)


def test_the_preset_of_the_paper_trains_alike_on_a_mesh_and_goes_on_without_it(
    one_device, expected, tmp_path
):
    assert len({row["reward"] for row in expected[0][1:]}) > 1
    spread = Start(config(), MESH)
    assert_same(spread.train(config(), tmp_path / "whole"), expected)
    assert max(spread.argument_bytes) < 0.55 * min(one_device.argument_bytes)
    half = dataclasses.replace(config().training, steps=2)
    spread.train(dataclasses.replace(config(), training=half), tmp_path / "half")
    assert_same(one_device.train(config(), tmp_path / "half"), expected)


@pytest.mark.parametrize(("method", "rank"), [("grpo", 2), ("proma_both", None)])
def test_adapters_and_methods_outside_of_the_backward_pass_train_alike(method, rank, tmp_path):
    settings = configs.TrainingConfig(
        steps=2,
        prompts=8,
        group_size=4,
        microbatch_size=8,
        method=methods.MethodConfig(learning_rate=3e-3, skip_fraction=0.0),
    )
    trained = warm_start.warm_start(tiny.START, tmp_path / "start")
    policy, params = starts.adapted(*trained, ModelConfig(lora=rank))

    leaves = functools.partial(jax.tree.leaves, is_leaf=lambda x: x is None)

    def check_that_the_next_step_is_given_the_same(update):
        given, _ = update.input_shardings
        pairs = [leaves(shardings[:2]) for shardings in (given, update.output_shardings)]
        for before, after in zip(*pairs, strict=True):
            assert before in (None, after)  # None: what `update` does not read

    def train(mesh):
        made = meshes.MeshConfig(mesh).made()
        config = tiny.run_config(method, settings)
        rows = training.train(
            config,
            policy._replace(mesh=made),
            params,
            tmp_path / f"{mesh}",
            on_compiled=check_that_the_next_step_is_given_the_same if mesh else lambda update: None,
        )
        return [{name: row[name] for name in row if name != "seconds"} for row in rows]

    for row, expected in zip(train("data=2,fsdp=4"), train(None), strict=True):
        chex.assert_trees_all_close(row, expected, **ROUNDING)


def test_responses_to_any_number_of_prompts_are_the_same_on_a_mesh(capsys):
    said = []
    for mesh in (None, "fsdp=4"):
        command = generate.Command(
            MODEL,
            ("2 plus", "What", "a", "b", "c"),
            text=True,
            greedy=True,
            max_tokens=6,
            devices=meshes.DevicesConfig(mesh),
        )
        generate.main(command)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((), ()),
        ((16,), ()),
        ((3, 5), ()),
        ((3, 8), (None, "fsdp")),
        ((12, 8), ("fsdp",)),
        ((8, 8), (None, "fsdp")),
        ((4, 8, 6), (None, "fsdp")),
    ],
)
def test_an_array_is_spread_along_its_largest_dimension_that_can_be(shape, spec):
    assert meshes.spec(meshes.MeshConfig("fsdp=4").made(), shape) == PartitionSpec(*spec)


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(files.Failure, match="--mesh data=16 needs 16 devices, but JAX finds 8"):
        meshes.MeshConfig("data=16").made()


def test_a_plan_says_what_each_program_takes(capsys):
    settings = configs.TrainingConfig(
        prompts=2, microbatch_size=4, method=methods.MethodConfig(fused=True)
    )
    model = ModelConfig(MODEL, prompt_tokens=16, response_tokens=8, lora=2)
    assert plan.Command(model=model, training=settings).mesh().size == 1
    plan.main(plan.Command(model=model, training=settings, devices=meshes.MeshConfig("fsdp=4")))
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "on 4 cpu, data=1, fsdp=4" in printed
    for name in ("sampling, 16 sequences", "update, 2 microbatches of 4"):
        assert f"{name}" in printed
    assert printed.count(" at its peak") == 2
