"""`python -m experiments.generate`: what a model says to a prompt."""

import json
import pathlib
from typing import Annotated

import jax
import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments import checked, command_line, meshes, sampling, starts
from experiments.models.settings import DType, ModelConfig
from experiments.sampling import SamplingConfig
from experiments.tasks.task import Chat


@dataclass(frozen=True, config=checked.CONFIG)
class Command:
    """Prints what a pretrained model answers, or how it goes on."""

    model: pathlib.Path
    """A Hugging Face folder of a Llama, Qwen2 or Qwen3 model."""
    prompt: Annotated[tuple[str, ...], Field(min_length=1)]
    """What is asked; several prompts are answered one beside the other."""
    system: str | None = None
    """A system message, put before each prompt."""
    text: bool = False
    """Whether the model goes on with the prompt as it is, instead of answering it in a chat."""
    samples: checked.Count = 1
    """Responses to each prompt."""
    greedy: bool = False
    """Whether the likeliest token is always taken."""
    max_tokens: checked.Count = 256
    """Most tokens of a response."""
    seed: checked.Seed = 0
    """Of what is drawn."""
    drawing: Annotated[SamplingConfig, command_line.Unprefixed] = SamplingConfig()
    dtype: DType = "float32"
    """Of parameters and computation."""
    devices: Annotated[meshes.DevicesConfig, command_line.Unprefixed] = meshes.DevicesConfig()
    json: bool = False
    """Whether to print JSON objects, one a line: prompt, response, the number of its tokens,
    whether it came to an end, and its log-probability."""

    def __post_init__(self):
        if self.text and self.system is not None:
            raise ValueError(f"system={self.system} needs a chat, but text={self.text}")
        if self.greedy and self.samples > 1:
            raise ValueError(f"samples={self.samples} would be equal with greedy={self.greedy}")

    def asked(self, prompt: str) -> str | Chat:
        """A prompt as the model gets it."""
        if self.text:
            return prompt
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": prompt}]


def main(command: Command) -> None:
    """Runs the command."""
    policy, params = starts.pretrained(
        ModelConfig(command.model, response_tokens=command.max_tokens, dtype=command.dtype),
        command.devices.made(),
    )
    prompts = [prompt for prompt in command.prompt for _ in range(command.samples)]
    asked = [command.asked(prompt) for prompt in command.prompt]
    widest = max(len(policy.tokenizer.encode(prompt)) for prompt in asked)
    policy = policy._replace(prompt_width=widest, config=command.drawing)
    key = None if command.greedy else jax.random.key(command.seed)
    rollouts = sampling.respond(policy, params, asked, key, copies=command.samples)
    responses = sampling.texts(policy, rollouts)
    logprobs = np.asarray(rollouts.logprobs, np.float64).sum(axis=1)
    ended = sampling.ended(policy, rollouts)
    lengths = np.asarray(rollouts.mask).sum(axis=1)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if command.json:
            about = {
                "prompt": prompt,
                "response": response,
                "tokens": int(lengths[i]),
                "ended": bool(ended[i]),
                "logprob": float(logprobs[i]),
            }
            print(json.dumps(about, ensure_ascii=False))
        else:
            print(response if ended[i] else f"{response} [cut off at {lengths[i]} tokens]")


if __name__ == "__main__":
    command_line.run(Command, main, "python -m experiments.generate")
