"""`python -m experiments.models.gguf`: a Hugging Face folder from a GGUF file.

Reads files of the architectures llama, qwen2 and qwen3, in any type that the gguf library can
dequantise. What the file says and is not known here is an error, never ignored. The folder is
written whole or not at all.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import gguf
import numpy as np
import pydantic
import tyro
from pydantic.dataclasses import dataclass

from experiments import checked, command_line, files
from experiments.models import config_json, huggingface, shards
from experiments.models.config import DecoderConfig, Llama3Rope
from experiments.models.decoder import rotary_frequencies
from experiments.models.gguf_tokenizer import GGUFTokenizer

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, config=checked.CONFIG)
class Command:
    """Makes a Hugging Face folder from a GGUF file: weights, config.json and tokenizer."""

    file: tyro.conf.Positional[pathlib.Path]
    """The GGUF file."""
    folder: tyro.conf.Positional[pathlib.Path]
    """Where the folder goes, which must not be there yet."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights. float32 holds what any type of GGUF means; bfloat16 takes half the space, and
    rounds all but BF16."""


def main(command: Command) -> None:
    """Runs the command."""
    convert(command.file, command.folder, command.dtype)
    print(f"Wrote {command.folder}")


def convert(
    file: pathlib.Path, folder: pathlib.Path, dtype: Literal["float32", "bfloat16"] = "float32"
) -> None:
    """Makes a Hugging Face folder from a GGUF file.

    Args:
        file: of the architecture llama, qwen2 or qwen3.
        folder: which is not there yet, or is empty.
        dtype: of the weights.

    Raises:
        Failure: the file is damaged, or holds what is not known; the folder is in use.
    """
    with files.using(file.parent):
        try:
            reader = gguf.GGUFReader(file)
        except (ValueError, IndexError, KeyError) as error:
            raise files.Failure(f"{file} is no GGUF file, or is damaged: {error}") from error
    keys = _Keys(file, {name: field.contents() for name, field in reader.fields.items()})
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = keys.take("general.architecture", _ARCHITECTURES)
    tokenizer = keys.tokenizer()
    context = keys.take(f"{architecture}.context_length")
    vocab_size = len(tokenizer.keys["tokens"])
    config = _config(keys, architecture, tensors, vocab_size, dtype)
    keys.check_all_read()

    shapes = huggingface.tensor_shapes(config)
    known = gguf.get_tensor_name_map(_ARCHITECTURES[architecture], config.layers)
    names = {name: known.get_name(name, (".weight", ".bias")) or name for name in shapes}
    _check(keys, {names[name]: shape for name, shape in shapes.items()}, tensors)

    def make(name: str) -> np.ndarray:
        tensor = tensors[names[name]]
        try:
            weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise keys.refuse(f"{tensor.name}: {error}") from error
        heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
        if architecture == "llama" and heads is not None:
            weights = _halves_of_heads(weights, heads)
        return weights.astype(dtype)

    size = np.dtype(dtype).itemsize
    sizes = {name: int(np.prod(shape)) * size for name, shape in shapes.items()}
    ids = tokenizer.generation()
    with huggingface.writing(folder) as partial:
        others = ids | {"max_position_embeddings": context}
        (partial / "config.json").write_text(config_json.text(config, others))
        tokenizer.build().save(str(partial / "tokenizer.json"))
        settings = tokenizer.settings(context)
        (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (partial / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
        shards.write(partial, sizes, make, huggingface.MAX_SHARD_BYTES)


class _Keys:
    """The keys of one file that have not been read yet."""

    def __init__(self, file: pathlib.Path, keys: Mapping[str, Any]):
        self.file = file
        self.left = dict(keys)

    def refuse(self, why: str) -> files.Failure:
        return files.Failure(f"{self.file}: {why}.")

    def take(self, key: str, allowed: Any = None, default: Any = None) -> Any:
        """A key's value, one of those allowed if these are given; an error without a default."""
        value = self.left.pop(key, default)
        if value is None:
            raise self.refuse(f"the key {key} is missing")
        if allowed is not None and value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise self.refuse(f"{key}={value!r} is not supported: it must be {wanted}")
        return value

    def tokenizer(self) -> GGUFTokenizer:
        template = self.left.pop("tokenizer.chat_template", None)
        prefix = "tokenizer.ggml."
        named = [key for key in self.left if key.startswith(prefix)]
        return GGUFTokenizer({k.removeprefix(prefix): self.left.pop(k) for k in named}, template)

    def check_all_read(self) -> None:
        for key, value in self.left.items():
            if key == "split.count" and value > 1:
                raise self.refuse("it is one of several: merge them with llama-gguf-split")
            if not key.startswith(("GGUF.", "general.", "quantize.imatrix.", "split.")):
                raise self.refuse(f"{key}={value!r:.60} is not supported")


def _config(
    keys: _Keys,
    architecture: str,
    tensors: Mapping[str, gguf.ReaderTensor],
    vocab_size: int,
    dtype: Literal["float32", "bfloat16"],
) -> DecoderConfig:
    def take(key, allowed=None, default=None):
        return keys.take(f"{architecture}.{key}", allowed, default)

    width, heads = take("embedding_length"), take("attention.head_count")
    head_dim = take("attention.key_length", default=width // heads)
    take("attention.value_length", [head_dim], default=head_dim)
    take("rope.dimension_count", [head_dim], default=head_dim)
    take("rope.scaling.type", ["none"], default="none")
    take("expert_count", [0], default=0)
    take("vocab_size", [vocab_size], default=vocab_size)
    try:
        config = DecoderConfig(
            vocab_size=vocab_size,
            width=width,
            layers=take("block_count"),
            heads=heads,
            kv_heads=take("attention.head_count_kv", default=heads),
            head_dim=head_dim,
            hidden=take("feed_forward_length"),
            rope_theta=_shortest(take("rope.freq_base", default=10_000.0)),
            norm_epsilon=_shortest(take("attention.layer_norm_rms_epsilon")),
            tied_head="output.weight" not in tensors,
            qk_norm=architecture == "qwen3",
            qkv_bias=architecture == "qwen2",
            dtype=dtype,
        )
    except pydantic.ValidationError as error:
        raise keys.refuse(f"the shape of the model: {error.errors()[0]['msg']}") from error
    if _ROPE_FACTORS not in tensors:
        return config
    return dataclasses.replace(config, rope_scaling=_rope_scaling(keys, config, tensors))


def _shortest(x: float) -> float:
    """The shortest decimal that is this number in float32, as a GGUF file holds it."""
    return float(str(np.float32(x)))


def _rope_scaling(
    keys: _Keys, config: DecoderConfig, tensors: Mapping[str, gguf.ReaderTensor]
) -> Llama3Rope:
    """What all Llama 3 have in common, with the factor that the file's own factors show."""
    factors = tensors[_ROPE_FACTORS].data
    scaling = Llama3Rope(_shortest(factors.max()), 1.0, 4.0, 8192)
    scaled = rotary_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    if not np.allclose(factors * scaled, rotary_frequencies(config), rtol=1e-4):
        raise keys.refuse(f"{_ROPE_FACTORS} is not that of a Llama 3, and no other is supported")
    return scaling


def _check(
    keys: _Keys,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, gguf.ReaderTensor],
) -> None:
    """Raises a Failure unless the file has these tensors, and no others."""
    for name in sorted(set(shapes) - set(tensors)):
        raise keys.refuse(f"the tensor {name} is missing")
    for name in sorted(set(tensors) - set(shapes) - {_ROPE_FACTORS}):
        raise keys.refuse(f"{name} is no tensor of such a decoder")
    for name, shape in shapes.items():
        found = tuple(map(int, tensors[name].shape[::-1]))
        if found != shape:
            raise keys.refuse(f"{name} has the shape {found}, but should have {shape}")


def _halves_of_heads(weights: np.ndarray, heads: int) -> np.ndarray:
    """Puts the two features of each rotated pair half a head apart: in the file, they alternate."""
    pairs = weights.reshape(heads, -1, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


if __name__ == "__main__":
    command_line.run(Command, main, "python -m experiments.models.gguf")
