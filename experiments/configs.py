"""The settings of a run: all that its results depend on."""

from collections.abc import Collection
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments import checked, meshes, methods, starts, validation, warm_start
from experiments.models.settings import ModelConfig
from experiments.sampling import SamplingConfig
from experiments.tasks.settings import TaskConfig


@dataclass(frozen=True, config=checked.CONFIG)
class TrainingConfig:
    """Settings of a run that are the same for all methods."""

    steps: checked.Count = 40
    """Optimizer steps. A finished run goes on if it is asked for more."""
    prompts: checked.Count = 128
    """Prompts in a rollout batch."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Responses sampled to each prompt; rewards count relative to their mean."""
    steps_per_batch: checked.Count = 2
    """Optimizer steps per rollout batch; each takes its share of the prompts."""
    microbatch_size: checked.Count = 8
    """Sequences in a microbatch."""
    sequences_at_a_time: checked.Count = 1024
    """Sequences that are sampled, or whose KL is measured, together; fewer take less memory."""
    kl_sequences: checked.Count | None = None
    """Sequences of a rollout batch whose KL and entropy are measured, evenly spaced; None: all. A
    forward pass goes over them after each optimizer step, and two more for each rollout batch."""
    validation_problems: checked.Count | None = None
    """Problems of a validation, the first ones; None: all."""
    validation_every: checked.Count = 4
    """Optimizer steps between two greedy validations; the last step is validated too."""
    checkpoint_every: checked.Count = 10
    """Optimizer steps between two checkpoints."""
    sampling: SamplingConfig = SamplingConfig()
    method: methods.MethodConfig = methods.MethodConfig()

    def __post_init__(self):
        if self.steps % self.steps_per_batch:
            raise ValueError(
                f"steps={self.steps} must be a multiple of steps_per_batch={self.steps_per_batch}"
            )
        if self.prompts % self.steps_per_batch:
            raise ValueError(
                f"prompts={self.prompts} must be a multiple of "
                f"steps_per_batch={self.steps_per_batch}"
            )
        sequences = self.prompts * self.group_size
        if self.kl_sequences is not None and self.kl_sequences > sequences:
            raise ValueError(
                f"kl_sequences={self.kl_sequences} must be at most {sequences}, the sequences of a "
                "rollout batch"
            )
        if self.sequences_per_step % self.microbatch_size:
            raise ValueError(
                f"microbatch_size={self.microbatch_size} must divide the {self.sequences_per_step} "
                f"sequences of an optimizer step, which are prompts={self.prompts} times "
                f"group_size={self.group_size} over steps_per_batch={self.steps_per_batch}"
            )

    def check_with(
        self,
        names: Collection[methods.MethodName],
        task: TaskConfig,
        model: ModelConfig,
        start: warm_start.WarmStartConfig,
    ) -> None:
        """Raises a ValueError if methods cannot be trained on the task from this start."""
        problems = len(task.made.training)
        if self.prompts > problems:
            raise ValueError(
                f"training.prompts={self.prompts} must be at most {problems}, the training "
                f"problems of {task.name}"
            )
        validation.check_count(
            "training.validation_problems", self.validation_problems, task.name, task.made
        )
        decoder = starts.decoder_config(task, model, start)
        if model.lora is not None and model.lora > decoder.narrowest_in_blocks:
            raise ValueError(
                f"lora={model.lora} must be at most {decoder.narrowest_in_blocks}, the inputs or "
                "outputs of the narrowest matrix in the decoder's blocks"
            )
        most, what = decoder.narrowest, "inputs or outputs of the decoder's narrowest matrix"
        if model.lora is not None:
            most, what = model.lora, "rank of the adapters"
        if {"proma_intra", "proma_both"} & set(names) and self.method.rank > most:
            raise ValueError(
                f"training.method.rank={self.method.rank} must be at most {most}, the {what}"
            )

    def check_on(self, devices: meshes.MeshConfig) -> None:
        """Raises a ValueError if devices cannot share the sequences evenly."""
        if self.microbatch_size % devices.size:
            raise ValueError(
                f"training.microbatch_size={self.microbatch_size} must be a multiple of "
                f"{devices.size}, the devices of mesh={devices.mesh}: take fewer devices, or "
                "larger microbatches, which make it another experiment"
            )
        sampled = min(self.sequences_at_a_time, self.prompts * self.group_size)
        if sampled % devices.size:
            raise ValueError(
                f"training.sequences_at_a_time={self.sequences_at_a_time} must be a multiple of "
                f"{devices.size}, the devices of mesh={devices.mesh}"
            )

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimizer step learns from."""
        return self.prompts * self.group_size // self.steps_per_batch

    @property
    def microbatches(self) -> int:
        """Microbatches of one optimizer step."""
        return self.sequences_per_step // self.microbatch_size


@dataclass(frozen=True, config=checked.CONFIG)
class RunConfig:
    """All that a run's results depend on."""

    method: methods.MethodName
    """Which method to train with."""
    seed: checked.Seed = 0
    """Of prompts, sampling and shuffling."""
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    start: warm_start.WarmStartConfig = warm_start.WarmStartConfig()
    training: TrainingConfig = TrainingConfig()
    update_norms: tuple[checked.NotNegative, ...] = ()
    """grpo_matched: the global norm that each optimizer step's update is rescaled to."""

    def __post_init__(self):
        self.training.check_with([self.method], self.task, self.model, self.start)
        needed = self.training.steps if self.method == "grpo_matched" else 0
        if len(self.update_norms) != needed:
            raise ValueError(
                f"{len(self.update_norms)} update_norms for method={self.method!r}, which needs "
                f"{needed}: grpo_matched takes one per optimizer step, the others none"
            )
