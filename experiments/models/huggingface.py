"""Decoders in Hugging Face folders: config.json and safetensors, read and written.

Every name, shape and dtype is checked, and every tensor is used. A tensor goes straight to the
devices that its sharding names, and no more of it is read than they hold: the host never has more
than one leaf of the parameters. A folder is written whole or not at all.

Architectures: LlamaForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM.
"""

import contextlib
import dataclasses
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments import files, processes
from experiments.models import config_json, shards
from experiments.models.config import DecoderConfig
from experiments.models.decoder import Decoder

Path = tuple[Any, ...]
"""Where a parameter is: ("blocks", 0, "mlp", "up_proj", "kernel"), without the 0 if scanned."""
Shardings = Callable[[Path, tuple[int, ...]], jax.sharding.Sharding | None]

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What a saved folder takes over from another."""
MAX_SHARD_BYTES = 5 * 10**9
"""Above it, a saved model's tensors are spread over several files."""

_HEAD = "lm_head.weight"
_TABLE = "model.embed_tokens.weight"
_NAMES = {
    "embed": "model.embed_tokens",
    "blocks": "model.layers",
    "norm": "model.norm",
    "head": "lm_head",
    "attention": "self_attn",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
}


def config_of(
    folder: pathlib.Path,
    *,
    dtype: str | None = None,
    scan_layers: bool = False,
    remat: bool = False,
) -> DecoderConfig:
    """The decoder in a folder; arguments as of `load`, which raises the same."""
    return config_json.read(folder / "config.json", dtype, scan_layers=scan_layers, remat=remat)


def load(
    folder: pathlib.Path,
    *,
    dtype: str | None = None,
    scan_layers: bool = False,
    remat: bool = False,
    sharding: Shardings | None = None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """A decoder's structure and parameters, as `nnx.split` gives them.

    Args:
        folder: with config.json and model.safetensors, or its shards and their index.
        dtype: "float32" or "bfloat16", to which floating tensors of any dtype are cast. None: what
            config.json says, which all tensors must have.
        scan_layers: whether blocks are stacked, as in DecoderConfig.
        remat: as in DecoderConfig.
        sharding: of the parameter at a path and of a shape; None puts it on the default device.
            Default: all there.

    Raises:
        Failure: the folder cannot be read; config.json asks for what the decoder does not compute;
            a tensor is missing, left over, or of another shape or dtype.
    """
    config = config_of(folder, dtype=dtype, scan_layers=scan_layers, remat=remat)
    graphdef, params = _structure(config)
    leaves = {path: _Leaf.at(path, x, config.layers) for path, x in nnx.to_flat_state(params)}
    tensors = shards.tensors(folder)
    _check(folder, leaves.values(), tensors, None if dtype else config.dtype)

    def place(path: Path, param: nnx.Variable) -> nnx.Variable:
        shape = param.shape
        read = functools.partial(leaves[path].read, tensors, np.dtype(config.dtype))
        where = sharding(path, shape) if sharding else None
        if where is None:
            return param.replace(jax.device_put(read((slice(None),) * len(shape))))
        return param.replace(jax.make_array_from_callback(shape, where, read))

    return graphdef, nnx.map_state(place, params)


def save(
    folder: pathlib.Path,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    *,
    source: pathlib.Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a decoder to a folder that `load` and transformers open.

    Args:
        folder: which is not there yet, or is empty.
        graphdef: the decoder's structure.
        params: its parameters; if devices of other processes have parts of them, all processes
            must call this, and the first writes.
        source: a folder of the same decoder, whose tokenizer, generation settings and token ids are
            taken over. Default: none is.
        max_shard_bytes: above it, tensors are spread over files of at most this size.

    Raises:
        Failure: the folder is in use or cannot be written; the source holds another decoder.
        ValueError: a parameter is not of the configured shape or dtype.
    """
    config = nnx.merge(graphdef, params).config
    others = {}
    if source is not None:
        layout = {"scan_layers": config.scan_layers, "remat": config.remat}
        if config_of(source, dtype=config.dtype, **layout) != config:
            raise files.Failure(f"{source} holds a decoder of another shape than the one to save.")
        others = config_json.harmless(source / "config.json")
    given = {path: param[...] for path, param in nnx.to_flat_state(params)}
    made: dict[str, Callable[[], np.ndarray]] = {}
    sizes: dict[str, int] = {}
    for path, param in nnx.to_flat_state(_structure(config)[1]):
        value = given[path]
        if (value.shape, value.dtype) != (param.shape, param.dtype):
            raise ValueError(
                f"the parameter {path} must be {param.dtype} {param.shape}, got {value.dtype} "
                f"{value.shape}"
            )
        leaf = _Leaf.at(path, param, config.layers)
        for i, name in enumerate(leaf.names):
            made[name] = functools.partial(leaf.tensor, value, i)
            sizes[name] = value.nbytes // len(leaf.names)
    if not processes.is_first():
        for part in made.values():
            part()
        return
    with writing(folder) as partial:
        (partial / "config.json").write_text(config_json.text(config, others))
        for name in COPIED:
            if source is not None and (source / name).exists():
                shutil.copyfile(source / name, partial / name)
        shards.write(partial, sizes, lambda name: made[name](), max_shard_bytes)


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The tensors in a decoder's files, in their order."""
    _, params = _structure(dataclasses.replace(config, scan_layers=False))
    leaves = [_Leaf.at(path, param, config.layers) for path, param in nnx.to_flat_state(params)]
    return {name: leaf.shape for leaf in leaves for name in leaf.names}


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write to, which becomes `folder` at the end, or, after an error, nothing.

    Raises:
        Failure: `folder` holds something already, or cannot be written.
    """
    with files.using(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise files.Failure(f"{folder} is there already: remove it, or choose another.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
            partial = pathlib.Path(beside) / folder.name
            partial.mkdir()
            yield partial
            partial.replace(folder)


class _Leaf(NamedTuple):
    """A parameter, and the tensors in files that it is made of: one, or one for each block."""

    names: list[str]
    shape: tuple[int, ...]
    is_transposed: bool
    is_stacked: bool

    @classmethod
    def at(cls, path: Path, param: nnx.Variable, layers: int) -> "_Leaf":
        is_stacked = path[0] == "blocks" and not isinstance(path[1], int)
        paths = [(path[0], i, *path[1:]) for i in range(layers)] if is_stacked else [path]
        names = [".".join(_NAMES.get(str(part), str(part)) for part in path) for path in paths]
        shape = param.shape[1:] if is_stacked else param.shape
        is_transposed = path[-1] == "kernel"
        return cls(names, shape[::-1] if is_transposed else shape, is_transposed, is_stacked)

    def read(
        self, tensors: dict[str, shards.Tensor], dtype: np.dtype, index: tuple[slice, ...]
    ) -> np.ndarray:
        """The part of the parameter in a tuple of slices."""
        layers, inside = (index[0], index[1:]) if self.is_stacked else (slice(None), index)
        flip = slice(None, None, -1) if self.is_transposed else slice(None)
        chosen = [tensors[name] for name in self.names[layers]]
        shape = [
            len(range(*s.indices(size))) for s, size in zip(inside[flip], self.shape, strict=True)
        ]
        out = np.empty((len(chosen), *shape[flip]), dtype)
        for i, tensor in enumerate(chosen):
            part = tensor.read(inside[flip])
            out[i] = part.T if self.is_transposed else part
        return out if self.is_stacked else out[0]

    def tensor(self, value: jax.Array, i: int) -> np.ndarray:
        """What goes to a file under the i-th name."""
        one = processes.whole(value[i] if self.is_stacked else value)
        return one.T if self.is_transposed else one


def _structure(config: DecoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A decoder without its numbers."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def _check(
    folder: pathlib.Path,
    leaves: Iterable[_Leaf],
    tensors: dict[str, shards.Tensor],
    dtype: str | None,
) -> None:
    """Raises a Failure unless the tensors are those of the leaves, of `dtype` or, if None, any."""
    expected = {name: leaf.shape for leaf in leaves for name in leaf.names}
    unused = set(tensors) - set(expected)
    if _HEAD in unused and _TABLE in tensors:
        whole = (slice(None), slice(None))
        if not np.array_equal(tensors[_HEAD].read(whole), tensors[_TABLE].read(whole)):
            raise files.Failure(
                f"{folder}: {_HEAD} differs from {_TABLE}, but config.json ties them: set "
                "tie_word_embeddings to false there."
            )
        unused.remove(_HEAD)
    missing = set(expected) - set(tensors)
    for names, what in ((missing, "is missing"), (unused, "is no tensor of such a decoder")):
        for name in sorted(names):
            raise files.Failure(f"{folder}: {name} {what}.")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise files.Failure(
                f"{folder}: {name} has the shape {tensor.shape}, but config.json asks for {shape}."
            )
        if tensor.dtype not in (shards.FLOATING if dtype is None else (dtype,)):
            raise files.Failure(
                f"{folder}: {name} is {tensor.dtype}, not "
                + (f"{dtype}: ask for a dtype, to which all are cast." if dtype else "floating.")
            )
