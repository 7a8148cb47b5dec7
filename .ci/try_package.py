"""Tries an installed proma_jax without its source; `make package` runs it in a fresh environment.

Without arguments it runs the examples of the docstrings, which need no extras, else the blocks of
Python of the pages named.
"""

import doctest
import importlib
import pathlib
import pkgutil
import re
import sys

import proma_jax


def run_docstrings() -> None:
    """Runs the examples of all modules but those that need Tunix."""
    found = pkgutil.walk_packages(proma_jax.__path__, "proma_jax.")
    names = [module.name for module in found if not module.name.startswith("proma_jax.tunix.")]
    results = [doctest.testmod(importlib.import_module(name)) for name in names]
    failed, attempted = (sum(column) for column in zip(*results, strict=True))
    print(f"{attempted} lines of examples in docstrings, {failed} failed")
    if failed or not attempted:
        sys.exit(1)


def run_page(path: pathlib.Path) -> None:
    """Runs a page's blocks of Python, but for those that use the experiments."""
    found = re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)
    blocks = [block for block in found if "from experiments" not in block]
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
    if not blocks:
        sys.exit(f"{path} has no block of Python.")


if __name__ == "__main__":
    location = pathlib.Path(proma_jax.__file__)
    if "site-packages" not in location.parts:
        sys.exit(f"{location} is not an installed proma_jax.")
    if pages := sys.argv[1:]:
        for page in pages:
            run_page(pathlib.Path(page))
    else:
        run_docstrings()
