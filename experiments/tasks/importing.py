"""What a user names as `module:name`, taken from the Python path or the current folder."""

import importlib
import pathlib
import sys
from typing import Any

from experiments import files


def load(named: str, purpose: str) -> Any:
    """The object that `module:name` names.

    Args:
        named: a module that can be imported, a colon, and a name in it, or names with dots.
        purpose: what it is for, for messages.

    Raises:
        files.Failure: there is no such module, or no such name in it. What the module itself
            raises while it is imported comes through.
    """
    module_name, _, name = named.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *name.split(".")]):
        raise files.Failure(f"{purpose} {named!r} must have the form my_module:name")
    here = str(pathlib.Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise files.Failure(
            f"{purpose} {named!r}: there is no module {error.name!r} in {here} or the Python path"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise files.Failure(f"{purpose} {named!r}: {module_name} has no {name!r}")
        found = getattr(found, part)
    return found
