"""The README's code runs as it stands, and its chains take a step."""

import pathlib
import re

import jax
import jax.numpy as jnp

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_code_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert "updated: True, removed: 0." in capsys.readouterr().out

    for chain in ("intra", "both"):
        names["tx"] = names[chain]
        step = jax.jit(names["step"].__wrapped__)
        params, state = names["params"], names["tx"].init(names["params"])
        for _ in range(4):
            params, state = step(params, state, names["microbatch"], names["coefficients"])
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params, names["params"])
        assert all(jax.tree.leaves(moved))
