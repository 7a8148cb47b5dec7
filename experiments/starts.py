"""What all methods start from: a small decoder that a warm start trained, or a pretrained model."""

from flax import nnx

from experiments import files, sampling, warm_start
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


def pretrained(config: ModelConfig) -> tuple[sampling.Policy, nnx.State]:
    """The policy of a model folder, and its parameters.

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
            f"{error}: install what reads model folders, pip install 'proma-jax[models]'."
        ) from error
    graphdef, params = huggingface.load(
        config.model, dtype=config.dtype, scan_layers=config.scan_layers, remat=config.remat
    )
    tokenizer = Pretrained(config.model)
    return sampling.Policy(
        graphdef, tokenizer, config.prompt_tokens, config.response_tokens
    ), params
