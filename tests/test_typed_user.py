"""The program whose types `make typecheck` checks strictly also runs."""

import jax
import jax.numpy as jnp
import pytest

from tests import typed_user


@pytest.mark.any_version
def test_the_typed_program_of_a_user_takes_a_step_in_both_ways(capsys):
    updated, gradient, loss = typed_user.main()
    for leaf in jax.tree.leaves((updated, gradient, loss)):
        assert jnp.isfinite(leaf).all()
    assert "removed 0." in capsys.readouterr().out
