"""What `check_restorable` says about states that changed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import proma_jax as proma

TX = optax.chain(proma.project_intra(rank=2), proma.accumulate(optax.adam(0.1), 4))
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}


def state(params=PARAMS):
    return params, TX.init(params)


def as_saved(tree):
    """As checkpointing libraries hand states back: NamedTuples as dicts, tuples as lists."""
    if hasattr(tree, "_asdict"):
        return {name: as_saved(value) for name, value in tree._asdict().items()}
    if isinstance(tree, (tuple, list)):
        return [as_saved(value) for value in tree]
    if isinstance(tree, dict):
        return {name: as_saved(value) for name, value in tree.items()}
    return np.asarray(tree)


def with_accumulation(**changes):
    params, (intra, accumulation) = state()
    return params, (intra, accumulation._replace(**changes))


@pytest.mark.parametrize("form", [lambda x: x, as_saved, lambda x: jax.eval_shape(lambda: x)])
def test_a_state_of_the_same_program_is_restorable(form):
    proma.check_restorable(form(state()), state())
    proma.check_restorable(state(), form(state()))


def test_leaves_that_differ_are_named():
    saved = as_saved(state(PARAMS | {"w": jnp.ones((3, 4))}))
    with pytest.raises(ValueError, match=r"0\.w has shape \(3, 4\) there and \(3, 2\) here; .*mu"):
        proma.check_restorable(saved, state())
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(ValueError, match=r"0\.b has type float32 there and bfloat16 here"):
        proma.check_restorable(state(), (half, TX.init(PARAMS)))
    for there, here, message in [
        (PARAMS | {"c": jnp.ones(1)}, PARAMS, "c is there, but not here"),
        (PARAMS, PARAMS | {"c": jnp.ones(1)}, "c is not there"),
    ]:
        with pytest.raises(ValueError, match=message):
            proma.check_restorable(there, here)


def test_numbers_are_leaves_too():
    proma.check_restorable({"step": 3}, {"step": 0})
    with pytest.raises(ValueError, match=r"step has shape \(\) there and \(2,\) here"):
        proma.check_restorable({"step": 3}, {"step": np.arange(2)})


def test_many_differences_are_counted():
    many = {f"w{i}": jnp.ones(1) for i in range(15)}
    with pytest.raises(ValueError, match="and 5 more leaves"):
        proma.check_restorable({}, many)


@pytest.mark.parametrize("form", [lambda x: x, as_saved])
def test_another_version_is_named_with_the_cure(form):
    older = with_accumulation(version=jnp.int32(0))
    with pytest.raises(
        ValueError, match=r"1\.1\.version is 0 there and 3 here.*Another version of"
    ):
        proma.check_restorable(form(older), state())


def test_a_state_from_before_versions_is_named_with_the_cure():
    saved = as_saved(state())
    del saved[1][1]["version"]
    with pytest.raises(ValueError, match=r"1\.1\.version is not there.*Another version of proma"):
        proma.check_restorable(saved, state())


def test_the_version_stays():
    grads, scores = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, {"b": None}
    scores["w"] = proma.LayerFactors(jnp.ones((2, 4, 3)), jnp.ones((2, 4, 2)))
    before = TX.init(PARAMS)
    _, after = TX.update(grads, before, PARAMS, scores=scores)
    proma.check_restorable(after, before)


def test_a_version_of_the_users_own_is_a_leaf_like_others():
    """Only our states' versions are judged by their values."""
    saved, wanted = ({"version": jnp.int32(i), "tx": TX.init(PARAMS)} for i in range(2))
    proma.check_restorable(saved, wanted)
    saved["version"] = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"version has shape \(2,\) there and \(\) here$"):
        proma.check_restorable(saved, wanted)
