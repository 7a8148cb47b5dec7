"""Named tensors in the safetensors files of a folder: found, sliced, and written in shards.

Reading takes from the disk what is asked for and no more, so a tensor can be loaded in parts.
"""

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from experiments import files

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATING = ("float32", "bfloat16", "float16")
_DTYPES = dict(zip(("F32", "BF16", "F16"), FLOATING, strict=True))


class Tensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        shape: of the whole.
        dtype: "float32", "bfloat16", "float16", or whatever else safetensors calls it.
        read: the part in a tuple of slices, one for each dimension.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[tuple[slice, ...]], np.ndarray]


def tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    """All tensors of a folder, by name.

    Raises:
        Failure: there are no files, one is missing or damaged, or the index does not fit them.
    """
    index = folder / INDEX
    with files.using(folder):
        if not index.exists():
            return dict(_in_file(folder / WHOLE))
        content = index.read_bytes()
        cure = "Download the model anew."
        named = files.parse(content, dict, str(index), cure, ["weight_map"])["weight_map"]
        found: dict[str, Tensor] = {}
        for shard in sorted(set(named.values())):
            inside = dict(_in_file(folder / pathlib.Path(shard).name))
            expected = {name for name, file in named.items() if file == shard}
            for name in sorted(expected ^ set(inside)):
                where = "is missing from" if name in expected else "is not in the index, but in"
                raise files.Failure(f"{folder}: the tensor {name} {where} {shard}. {cure}")
            found |= inside
        return found


def _in_file(path: pathlib.Path) -> Iterator[tuple[str, Tensor]]:
    try:
        file = safe_open(path, "np")
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype(), part.get_dtype())
            yield name, Tensor(tuple(part.get_shape()), dtype, part.__getitem__)
    except SafetensorError as error:
        raise files.Failure(f"{path} is damaged: {error}. Download the model anew.") from error


def write(
    folder: pathlib.Path,
    sizes: Mapping[str, int],
    make: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes tensors into a folder, as one file or, above `max_shard_bytes`, as shards of it.

    Args:
        folder: which is there.
        sizes: bytes of each tensor, in the order of writing.
        make: the tensor of a name; no more than one shard's are held at a time.
        max_shard_bytes: of a file, but for a tensor that is larger.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = WHOLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        content = {name: np.ascontiguousarray(make(name)) for name in names}
        save_file(content, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # else the owner's alone
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": sum(sizes.values())}}
        (folder / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}, indent=2))
