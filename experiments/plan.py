"""`python -m experiments.plan`: what a run takes of each device, by the compiler, before it is run.

Nothing is allocated and nothing runs: of the model's folder only config.json is read, of the task
nothing. With `--topology` libtpu compiles for TPU chips that need not be there.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pydantic.dataclasses import dataclass

from experiments import (
    checked,
    chips,
    command_line,
    files,
    meshes,
    methods,
    report,
    sampling,
    starts,
    training,
    warm_start,
)
from experiments.command_line import Unprefixed
from experiments.configs import TrainingConfig
from experiments.methods import MethodName
from experiments.models import huggingface, lora
from experiments.models.decoder import Decoder
from experiments.models.settings import ModelConfig
from experiments.models.tokens import Characters
from experiments.tasks.settings import TaskConfig


@dataclass(frozen=True, config=checked.CONFIG)
class Command:
    """Compiles a run's sampling and update, and says what memory they take of each device.

    It takes the settings of experiments.train, `--preset NAME` among them.
    """

    method: MethodName = "proma_accumulation"
    """Which method to train with."""
    topology: str | None = None
    """TPU chips, such as v5p:2x2x1, v5p:4x4x4 or v6e:2x4; a mesh must take all of them. None: the
    devices that are here."""
    task: Annotated[TaskConfig, Unprefixed] = TaskConfig()
    model: Annotated[ModelConfig, Unprefixed] = ModelConfig()
    start: warm_start.WarmStartConfig = warm_start.WarmStartConfig()
    training: TrainingConfig = TrainingConfig()
    devices: Annotated[meshes.MeshConfig, Unprefixed] = meshes.MeshConfig()

    def __post_init__(self):
        if self.model.model is None:
            raise ValueError(f"model={self.model.model} must be a folder with a config.json")
        self.training.check_on(self.devices)

    def mesh(self) -> Mesh:
        """The mesh, of one device if none is named.

        Raises:
            files.Failure: there are not so many devices, or no such chips.
        """
        if self.topology is None:
            return self.devices.made() or chips.of_one(jax.devices())
        try:
            topology = chips.described(self.topology)
        except Exception as error:  # of several types
            raise files.Failure(
                f"--topology {self.topology} cannot be compiled for: {error}. It needs libtpu, "
                "pip install 'jax[tpu]', and a name like v5p:2x2x1."
            ) from error
        count = len(topology.devices)
        if self.devices.size not in (1, count):
            raise files.Failure(
                f"--mesh {self.devices.mesh} must have as many devices as --topology "
                f"{self.topology} has chips, {count}, or be left out, for one."
            )
        return chips.mesh(topology, self.devices.shape)


class Program(NamedTuple):
    """A program of a run.

    Attributes:
        name: what it does.
        lowered: it, to be compiled.
        beside: bytes of each device that the run holds meanwhile, beside the arguments.
    """

    name: str
    lowered: jax.stages.Lowered
    beside: int


def programs(command: Command, mesh: Mesh) -> Iterator[Program]:
    """What a run of full-length sequences compiles."""
    settings = command.training
    policy, shapes = _policy(command, mesh)
    params, frozen = lora.split(shapes)
    method = methods.make_method(command.method, settings.method, policy, settings.microbatches)
    params, frozen, opt_state = jax.tree.map(
        lambda x: _shape(x, meshes.sharding(mesh, x.shape)),
        (params, frozen, jax.eval_shape(method.init, params)),
    )
    of_start, of_optimizer = meshes.bytes_held(params), meshes.bytes_held(opt_state)

    def spread(made: Callable[[], Any], axis: int) -> Any:
        rows = NamedSharding(mesh, P(*[None] * axis, meshes.AXES))
        return jax.tree.map(lambda x: _shape(x, rows), jax.eval_shape(made))

    def rollouts(*counts: int) -> sampling.Rollouts:
        padding = sampling.no_rollouts(policy, math.prod(counts))
        return jax.tree.map(lambda x: x.reshape(*counts, -1), padding)

    together = min(settings.sequences_at_a_time, settings.prompts * settings.group_size)
    copies = meshes.together(mesh, together, settings.group_size)
    prompts = together // copies, policy.prompt_width
    yield Program(
        f"sampling, {together} sequences at a time",
        sampling.sample.lower(
            policy.graphdef,
            nnx.merge_state(params, frozen),
            spread(lambda: jnp.zeros(prompts, jnp.int32), axis=0),
            spread(lambda: jnp.zeros(prompts, bool), axis=0),
            jax.eval_shape(lambda: jax.random.key(0)),
            copies=copies,
            config=policy.config,
            response_width=policy.response_width,
            ends=(0,),
            pad=0,
        ),
        of_start + of_optimizer,
    )
    k_by_b = settings.microbatches, settings.microbatch_size
    minibatch = spread(lambda: methods.Microbatch(rollouts(*k_by_b), jnp.zeros(k_by_b)), axis=1)
    yield Program(
        f"update, {k_by_b[0]} microbatches of {k_by_b[1]}",
        training.update.lower(method.step, params, opt_state, minibatch, frozen),
        of_start,
    )


def _policy(command: Command, mesh: Mesh) -> tuple[sampling.Policy, nnx.State]:
    """The policy, and its parameters' shapes."""
    model = command.model
    assert model.model is not None
    config = huggingface.config_of(
        model.model, dtype=model.dtype, scan_layers=model.scan_layers, remat=model.remat
    )

    def policy(graphdef: nnx.GraphDef) -> sampling.Policy:
        return sampling.Policy(
            graphdef,
            Characters(""),  # on which no shape depends
            prompt_width=model.prompt_tokens,
            response_width=model.response_tokens,
            config=command.training.sampling,
            logits_at_a_time=model.logits_at_a_time,
            mesh=mesh,
        )

    def decoder() -> Decoder:
        graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
        adapted, params = starts.adapted(policy(graphdef), params, model)
        return nnx.merge(adapted.graphdef, params)

    graphdef, params = nnx.split(nnx.eval_shape(decoder))
    return policy(graphdef), params


def _shape(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def main(command: Command) -> None:
    """Runs the command."""
    mesh = command.mesh()
    report.terminal.print(
        f"{command.method} on {meshes.described(mesh)}. Of each device:", highlight=False
    )
    with jax.set_mesh(mesh):
        for program in programs(command, mesh):
            began = time.monotonic()
            memory = program.lowered.compile().memory_analysis()
            assert memory is not None
            peak, arguments = memory.peak_memory_in_bytes, memory.argument_size_in_bytes
            report.terminal.print(
                f"{program.name}: {report.in_words(peak)} at its peak, "
                f"{report.in_words(arguments)} of them arguments; with what the run holds beside "
                f"{report.in_words(peak + program.beside)}. Compiled in "
                f"{time.monotonic() - began:.0f} s.",
                highlight=False,
            )


if __name__ == "__main__":
    if "--topology" in sys.argv:
        jax.config.update("jax_platforms", "cpu")
    command_line.run(Command, main, "python -m experiments.plan")
