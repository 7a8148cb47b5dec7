"""The config.json of a Hugging Face folder, read into a DecoderConfig and written from one.

Every key is honoured, known to change nothing here, or refused by name: none is ignored unread.
"""

import json
import pathlib
from typing import Any, NamedTuple

import pydantic

from experiments import files
from experiments.models.config import DecoderConfig, Llama3Rope


class Family(NamedTuple):
    """What is fixed for an architecture."""

    architecture: str
    model_type: str
    qk_norm: bool
    qkv_bias: bool


FAMILIES = (
    Family("LlamaForCausalLM", "llama", qk_norm=False, qkv_bias=False),
    Family("Qwen2ForCausalLM", "qwen2", qk_norm=False, qkv_bias=True),
    Family("Qwen3ForCausalLM", "qwen3", qk_norm=True, qkv_bias=False),
)

_ONLY: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "partial_rotary_factor": 1,
    "rope_interleaved": False,
    "use_mrope": False,
    "use_sliding_window": False,
}
"""Keys with the one value that the decoder computes."""

_HARMLESS = {
    "_name_or_path",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "is_llama_config",
    "max_position_embeddings",
    "max_window_layers",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "return_dict",
    "tokenizer_class",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
"""Keys that change nothing of what the decoder computes."""

_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
}
_ROPE_NUMBERS = {
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
}


class _Keys:
    """The keys of one config.json that have not been read yet."""

    def __init__(self, path: pathlib.Path):
        with files.using(path.parent):
            content = path.read_bytes()
        self.path = path
        self.left: dict[str, Any] = files.parse(
            content, dict, str(path), "Download the model anew.", ["architectures"]
        )

    def refuse(self, why: str) -> files.Failure:
        return files.Failure(f"{self.path}: {why}")

    def take(self, key: str, default: Any = None) -> Any:
        """A key's value; `default` also for null, without one an error."""
        value = self.left.pop(key, None)
        if value is None and default is None:
            raise self.refuse(f"the key {key!r} is missing")
        return default if value is None else value

    def number(self, key: str) -> Any:
        value = self.take(key)
        if not isinstance(value, int | float) or value <= 0:
            raise self.refuse(f"{key}={value!r} is no positive number")
        return value

    def check(self, key: str, value: Any, *allowed: Any) -> None:
        if value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise self.refuse(f"{key}={value!r} is not supported: it must be {wanted}")


def read(
    path: pathlib.Path, dtype: str | None = None, *, scan_layers: bool = False, remat: bool = False
) -> DecoderConfig:
    """The decoder that a config.json describes.

    Args:
        path: the file.
        dtype: "float32" or "bfloat16"; None takes the file's own.
        scan_layers: as in DecoderConfig.
        remat: as in DecoderConfig.

    Raises:
        Failure: a key is missing or unknown, or has a value that the decoder does not compute.
    """
    keys = _Keys(path)
    family = _family(keys)
    for key, only in _ONLY.items():
        keys.check(key, keys.take(key, only), only)
    for layer_type in keys.take("layer_types", ["full_attention"]):
        keys.check("layer_types", layer_type, "full_attention")
    if family.model_type != "llama":
        keys.take("sliding_window", 0)  # use_sliding_window is false
    settings = {name: keys.number(key) for name, key in _SIZES.items()}
    width, heads = settings["width"], settings["heads"]
    one_each = heads if family.model_type == "llama" else None
    settings["kv_heads"] = keys.take("num_key_value_heads", one_each)
    is_implied = family.model_type != "qwen3" and width % heads == 0
    settings["head_dim"] = keys.take("head_dim", width // heads if is_implied else None)
    settings["tied_head"] = keys.take("tie_word_embeddings", False)
    theta, scaling = _rope(keys)
    settings["dtype"] = _dtype(keys, dtype)

    unknown = {key: value for key, value in keys.left.items() if key not in _HARMLESS}
    for key, value in unknown.items():
        raise keys.refuse(
            f"{key}={value!r} is not supported. If it changes nothing of what the model computes, "
            "remove it from the file"
        )
    try:
        return DecoderConfig(
            **settings,
            rope_theta=theta,
            rope_scaling=Llama3Rope(**scaling) if scaling else None,
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias,
            scan_layers=scan_layers,
            remat=remat,
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        raise keys.refuse(f"{_SIZES.get(name, name)}: {first['msg']}") from error


def _family(keys: _Keys) -> Family:
    architectures = keys.take("architectures")
    known = {family.architecture: family for family in FAMILIES}
    keys.check("architectures", architectures, *([name] for name in known))
    family = known[architectures[0]]
    keys.check("model_type", keys.take("model_type"), family.model_type)
    return family


def _rope(keys: _Keys) -> tuple[float, dict[str, Any]]:
    """Base and scaling of the wavelengths, in transformers' old spelling or in its new one."""
    old_theta = keys.left.pop("rope_theta", None)
    old, new = keys.left.pop("rope_scaling", None), keys.left.pop("rope_parameters", None)
    if old and new and old != new:
        raise keys.refuse("rope_scaling and rope_parameters differ: remove one")
    rope = dict(new or old or {})
    theta = rope.pop("rope_theta", old_theta) or 10_000.0
    if old_theta not in (None, theta):
        raise keys.refuse(f"rope_theta={old_theta!r} differs from rope_parameters' {theta!r}")
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    keys.check("rope_type", kind, "default", "llama3")
    keys.check("partial_rotary_factor", rope.pop("partial_rotary_factor", 1), 1)
    if set(rope) != (_ROPE_NUMBERS if kind == "llama3" else set()):
        raise keys.refuse(f"a rope of type {kind!r} with {sorted(rope)} is not supported")
    return theta, rope


def _dtype(keys: _Keys, asked: str | None) -> str:
    own = keys.left.pop("torch_dtype", None)
    own = keys.left.pop("dtype", own)
    if asked is not None:
        return asked
    if own not in ("float32", "bfloat16"):
        raise keys.refuse(
            f"dtype={own!r} is not supported: ask for dtype='float32' or 'bfloat16', to which "
            "every tensor is cast"
        )
    return own


def text(config: DecoderConfig, others: dict[str, Any]) -> str:
    """A config.json in the spelling that every version of transformers reads.

    Args:
        config: of the decoder.
        others: further keys, such as token ids.

    Raises:
        ValueError: no family has this combination of biases and norms.
    """
    for family in FAMILIES:
        if (family.qk_norm, family.qkv_bias) == (config.qk_norm, config.qkv_bias):
            break
    else:
        raise ValueError(
            f"qk_norm={config.qk_norm} with qkv_bias={config.qkv_bias}: no family has both"
        )
    scaling = config.rope_scaling
    keys = {key: getattr(config, name) for name, key in _SIZES.items()} | {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling and {"rope_type": "llama3"} | vars(scaling),
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": config.dtype,
    }
    return json.dumps(others | keys, indent=2) + "\n"


def harmless(path: pathlib.Path) -> dict[str, Any]:
    """The keys of a config.json that change nothing of what the decoder computes."""
    return {key: value for key, value in _Keys(path).left.items() if key in _HARMLESS}
