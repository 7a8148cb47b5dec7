"""Which model a run begins with, as its settings name it."""

import pathlib
from typing import Literal

from pydantic.dataclasses import dataclass

from experiments import checked

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, config=checked.CONFIG)
class ModelConfig:
    """A pretrained model, and how it is computed."""

    model: pathlib.Path | None = None
    """A Hugging Face folder of a Llama, Qwen2 or Qwen3 model to begin with. Without one, a small
    decoder is first trained on worked examples of the task."""
    prompt_tokens: checked.Count = 512
    """Most tokens of a prompt; a longer one is an error."""
    response_tokens: checked.Count = 1024
    """Most tokens of a response, which is cut off there."""
    dtype: DType = "float32"
    """Of parameters and computation."""
    scan_layers: bool = True
    """Whether layers are run by a scan, which compiles faster, above all for many layers."""
    remat: bool = True
    """Whether the backward pass computes activations again, which takes less memory."""
    logits_at_a_time: checked.Count | None = None
    """Tokens of a sequence whose logits are formed together in training, and of all sequences where
    KL is measured; None: all. Fewer take less memory, above all with large vocabularies."""
    lora: checked.Count | None = None
    """Rank of low-rank adapters on the linear layers of the blocks, which alone are trained; None:
    all parameters are."""
    lora_alpha: checked.Positive | None = None
    """The adapters' products count lora_alpha / lora times; None: 16, at any rank, as in QLoRA."""

    def __post_init__(self):
        if self.lora is None and self.lora_alpha is not None:
            raise ValueError(
                f"lora_alpha={self.lora_alpha} needs the rank of adapters, lora={self.lora}"
            )
