"""Files of problems: read whole, every record checked, what is wrong named with file and line.

A file is JSON Lines (an object per line) or one JSON list of objects, either also compressed with
gzip if its name ends in `.gz`.
"""

import gzip
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from experiments import files
from experiments.tasks.task import Problem

File = Annotated[pathlib.Path, Field(strict=False)]
"""A setting that is a file, given as a string or a path."""

Record = dict[str, Any]


def read(path: pathlib.Path, **needed: type | tuple[type, ...]) -> list[Record]:
    """The objects in a file of problems.

    Args:
        path: the file.
        needed: the names that each object must have, and the types of their values.

    Raises:
        files.Failure: the file cannot be read, holds no object, or one that lacks a name or has it
            with a value of another type; says in which line.
    """
    records = []
    for place, record in _parse(path, _text(path)):
        if not isinstance(record, dict):
            raise files.Failure(f"{place} must be an object, not a {type(record).__name__}")
        for name, kind in needed.items():
            if name not in record:
                raise files.Failure(f"{place} lacks {name!r}; it has {sorted(record)}")
            if not isinstance(record[name], kind):
                raise files.Failure(
                    f"{place}: {name!r} must be {_words(kind)}, not {record[name]!r:.80}"
                )
        records.append(record)
    if not records:
        raise files.Failure(f"{path} holds no problems")
    return records


def _text(path: pathlib.Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise files.Failure(f"{path} cannot be read: {error}") from error


def _parse(path: pathlib.Path, text: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        for number, record in enumerate(_json(f"{path}", text), 1):
            yield f"{path}, record {number}", record
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _json(f"{path}, line {number}", line)


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise files.Failure(f"{place} is no JSON: {error}") from error


def _words(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("text" if kind is str else kind.__name__ for kind in kinds)


def split(
    problems: Sequence[Problem], held_out: int, seed: int, path: pathlib.Path
) -> tuple[list[Problem], list[Problem]]:
    """Training and validation problems, of which there are `held_out`, chosen by a seed.

    Raises:
        files.Failure: none would be left to train on.
    """
    if held_out >= len(problems):
        raise files.Failure(
            f"validation_problems={held_out} must be fewer than the {len(problems)} problems of "
            f"{path}: the others are for training"
        )
    order = np.random.default_rng(seed).permutation(len(problems))
    chosen = set(order[:held_out].tolist())
    training = [problem for i, problem in enumerate(problems) if i not in chosen]
    return training, [problems[i] for i in sorted(chosen)]


def train_and_validation(
    read: Callable[[pathlib.Path], list[Problem]],
    train_file: pathlib.Path,
    validation_file: pathlib.Path | None,
    validation_problems: int,
    seed: int,
) -> tuple[list[Problem], list[Problem]]:
    """Problems to train and to validate on.

    Args:
        read: the problems of a file.
        train_file: the file to train on.
        validation_file: the file to validate on; None: problems of the other are held out.
        validation_problems: how many are held out, or at most are taken of the second file.
        seed: chooses them.

    Raises:
        files.Failure: none would be left to train on.
    """
    problems = read(train_file)
    if validation_file is None:
        return split(problems, validation_problems, seed, train_file)
    validation = read(validation_file)
    if validation_problems < len(validation):
        _, validation = split(validation, validation_problems, seed, validation_file)
    return problems, validation
