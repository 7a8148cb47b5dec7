"""Your own task, end to end, with a pretrained model. About 12 minutes of CPU time.

    make model-smollm2
    .venv/bin/python -m examples.own_task

SmolLM2-135M is rewarded for answers in capital letters. The eight steps are only to show that all
of it runs: the share of capitals in what the model samples went from 0.04 to 0.06. On the command
line `python -m experiments.train` does the same with `--task examples.own_task:Capitals`; its
--help explains all settings.
"""

import pathlib
from collections.abc import Sequence

from experiments import configs, methods, train
from experiments.models.settings import ModelConfig
from experiments.tasks.settings import TaskConfig
from experiments.tasks.task import Problem

TOPICS = "a cat, the sea, a bicycle, rain, a violin, bread, the moon, a library, snow, a train"


class Capitals:
    """Asks for a short sentence, and rewards the share of its letters that are capital."""

    def __init__(self, held_out: int = 2):
        problems = [
            Problem([{"role": "user", "content": f"Write about {topic}, all in capitals."}])
            for topic in TOPICS.split(", ")
        ]
        self.training, self.validation = problems[held_out:], problems[:held_out]

    def grade(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> dict[str, list[float]]:
        letters = [[letter for letter in text if letter.isalpha()] for text in responses]
        shares = [sum(map(str.isupper, found)) / max(len(found), 1) for found in letters]
        return {"reward": shares, "letters": [float(len(found)) for found in letters]}


def main(model: pathlib.Path, steps: int = 8, learning_rate: float = 5e-6) -> None:
    """Trains the model by PROMA accumulation; results go to runs/capitals."""
    command = train.Command(
        method="proma_accumulation",
        directory=pathlib.Path("runs/capitals"),
        task=TaskConfig("examples.own_task:Capitals"),
        model=ModelConfig(model, prompt_tokens=64, response_tokens=24),
        training=configs.TrainingConfig(
            steps=steps,
            prompts=8,
            group_size=8,
            steps_per_batch=1,
            microbatch_size=8,
            sequences_at_a_time=16,
            method=methods.MethodConfig(learning_rate=learning_rate),
        ),
    )
    train.main(command)


if __name__ == "__main__":
    main(pathlib.Path("models/smollm2-135m-instruct"))
