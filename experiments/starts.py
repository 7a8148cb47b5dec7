"""What all methods start from: a small decoder that a warm start trained, or a pretrained model."""

import pathlib

import jax
from flax import nnx

from experiments import files, meshes, sampling, warm_start
from experiments.models import lora
from experiments.models.decoder import DecoderConfig
from experiments.models.settings import ModelConfig
from experiments.tasks.settings import TaskConfig


def decoder_config(
    task: TaskConfig, model: ModelConfig, start: warm_start.WarmStartConfig
) -> DecoderConfig:
    """The decoder's shape."""
    if model.model is None:
        return warm_start.StartConfig(task, start).decoder
    from experiments.models import huggingface

    return huggingface.config_of(model.model)


def pretrained(
    config: ModelConfig, mesh: jax.sharding.Mesh | None = None
) -> tuple[sampling.Policy, nnx.State]:
    """The policy of a model folder, and its parameters, spread over a mesh if there is one.

    Raises:
        files.Failure: the folder is not one of a model that the decoder can be, or what reads such
            folders is not installed.
    """
    assert config.model is not None
    try:
        from experiments.models import huggingface
        from experiments.models.pretrained_tokens import Pretrained
    except ModuleNotFoundError as error:
        raise files.Failure(
            f"{error}: install what reads model folders, pip install '.[models]' in the clone."
        ) from error
    graphdef, params = huggingface.load(
        config.model,
        dtype=config.dtype,
        scan_layers=config.scan_layers,
        remat=config.remat,
        sharding=None if mesh is None else lambda path, shape: meshes.sharding(mesh, shape),
    )
    policy = sampling.Policy(
        graphdef,
        Pretrained(config.model),
        prompt_width=config.prompt_tokens,
        response_width=config.response_tokens,
        logits_at_a_time=config.logits_at_a_time,
        mesh=mesh,
    )
    return adapted(policy, params, config)


def adapted(
    policy: sampling.Policy, params: nnx.State, config: ModelConfig
) -> tuple[sampling.Policy, nnx.State]:
    """The policy with adapters, if the settings ask for them."""
    if config.lora is None:
        return policy, params
    graphdef, params = lora.add(policy.graphdef, params, config.lora, config.lora_alpha or 16.0)
    return policy._replace(graphdef=graphdef), params


def save(
    folder: pathlib.Path, policy: sampling.Policy, params: nnx.State, config: ModelConfig
) -> None:
    """Writes a model that began as another's folder, whose tokenizer it takes over.

    Adapters are added to its weights.

    Raises:
        files.Failure: the folder is in use or cannot be written.
    """
    from experiments.models import huggingface

    graphdef, params = lora.merge(policy.graphdef, params)
    huggingface.save(folder, graphdef, params, source=config.model)


def check_free(folder: pathlib.Path) -> None:
    """Raises a files.Failure if a model could not be saved in a folder."""
    if folder.exists() and any(folder.iterdir()):
        raise files.Failure(f"{folder} is there already: remove it, or choose another.")
    files.check_writable(folder)
