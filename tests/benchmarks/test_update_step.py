"""The benchmarked methods compute what they say; how long they take is not tested."""

import dataclasses
import functools
import importlib
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro
from matplotlib import image

import proma_jax as proma
from benchmarks import (
    cases,
    decoder,
    forms,
    growth,
    measure,
    methods,
    naive,
    roofline,
    update_step,
)

LAYOUTS = {
    "unrolled": {},
    "scanned": {"scanned": True},
    "scanned_remat": {"scanned": True, "remat": True},
}


def case_of(layout="unrolled"):
    micro = cases.SIZES["micro"]
    return dataclasses.replace(
        micro, config=dataclasses.replace(micro.config, **LAYOUTS[layout]), microbatches=3
    )


@functools.cache
def gradient(name, layout="unrolled"):
    """With one layer axis in front of every block's leaf, in any layout."""
    case = case_of(layout)
    grads = jax.jit(methods.make_step(name, case))(*cases.inputs(case, seed=0))
    return grads if case.config.scanned else grads | {"layers": decoder.stack(grads["layers"])}


def assert_agree(found, expected, rtol=1e-4):
    """In each leaf, relative to its norm."""
    chex.assert_trees_all_equal_shapes(found, expected)
    errors = jax.tree.map(
        lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)), found, expected
    )
    worst = max(jax.tree.leaves(errors))
    assert worst < rtol, errors


@pytest.mark.parametrize(
    "name", ["plain_per_sequence", "plain_batched", "grpo", "grpo_per_sequence"]
)
def test_plain_methods_agree(name):
    """GRPO's too, since the old policy is the present one: every ratio is 1."""
    assert_agree(gradient(name), gradient("plain_sum"))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("plain_sum", "scanned"),
        ("plain_sum", "scanned_remat"),
        ("accumulation", "scanned"),
        ("accumulation", "scanned_remat"),
    ],
)
def test_layouts_agree(name, layout):
    assert_agree(gradient(name, layout), gradient(name))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("accumulation_dense", "unrolled"),
        ("accumulation_dense", "scanned"),
        ("accumulation_fused", "unrolled"),
        ("accumulation_fused", "scanned_remat"),
    ],
)
def test_accumulation_methods_agree(name, layout):
    assert_agree(gradient(name, layout), gradient("accumulation"))


@pytest.mark.parametrize("name", ["accumulation", "intra_3"])
def test_proma_differs_from_plain(name):
    plain = gradient("plain_sum")
    for kernel in decoder.kernel_shapes(case_of().config):
        difference = gradient(name, "scanned")["layers"][kernel] - plain["layers"][kernel]
        assert jnp.linalg.norm(difference) > 0.01 * jnp.linalg.norm(plain["layers"][kernel])
    found = gradient(name, "scanned")["embedding"]
    np.testing.assert_allclose(found, plain["embedding"], atol=1e-6)


def kernels(grads):
    return {name: grads["layers"][name] for name in decoder.kernel_shapes(case_of().config)}


def test_naive_accumulation_is_accumulation_with_the_same_bound():
    case = case_of("scanned")
    tx = proma.accumulate(optax.identity(), case.microbatches, relative_bound=0.5)
    scores_fn = proma.sequence_scores(case.logprob)

    @jax.jit
    def update(state, tokens, coefficients):
        _, scores = scores_fn(params, tokens)
        grads = proma.weighted_sum(scores, coefficients)
        return tx.update(grads, state, params, scores=scores)

    params, batch = cases.inputs(case, seed=0)
    state = tx.init(params)
    for tokens, coefficients in zip(batch.tokens, batch.coefficients, strict=True):
        updates, state = update(state, tokens, coefficients)
    found = gradient("naive_accumulation", "scanned")
    assert_agree(kernels(found), kernels(updates), rtol=1e-3)
    np.testing.assert_allclose(found["embedding"], updates["embedding"], atol=1e-6)


def test_naive_projection_finds_a_clear_subspace():
    """Three strong directions far above the rest, over tokens of two sequences."""
    rng = np.random.default_rng(0)

    def rows(size):
        strong = rng.normal(size=(24, 3)) @ rng.normal(size=(3, size))
        return strong + 1e-3 * rng.normal(size=(24, size))

    def removal(matrix):
        _, _, vectors = np.linalg.svd(matrix)
        return vectors[:3].T @ vectors[:3]

    x, d, g = rows(10), rows(7), rng.normal(size=(10, 7))
    expected = g - removal(x) @ g @ removal(d)
    factors = (jnp.asarray(m.reshape(2, 12, -1), jnp.float32) for m in (x, d))
    found = naive.projected(jnp.asarray(g, jnp.float32), *factors, 3, jax.random.key(0))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_naive_intra_removes_about_as_much_as_intra():
    plain = kernels(gradient("plain_sum"))

    def removed(name):
        parts = jax.tree.map(jnp.subtract, plain, kernels(gradient(name, "scanned")))
        return float(optax.tree.norm(parts) / optax.tree.norm(plain))

    assert removed("naive_intra_3") == pytest.approx(removed("intra_3"), rel=0.2)


def test_fused_intra_agrees():
    fused = gradient("intra_3_fused", "scanned_remat")
    assert_agree(fused, gradient("intra_3", "scanned"), rtol=1e-3)


@pytest.mark.parametrize("name", ["plain", "intra_ten", "intra_0", "accumulation_10"])
def test_unknown_methods_are_errors(name):
    with pytest.raises(ValueError, match=name):
        methods.make_step(name, case_of())


def test_a_step_that_cannot_run_is_reported_and_left_out():
    def too_large(x):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand where")

    steps = {"ok": jnp.sin, "too_large": too_large}
    measured = measure.measure(steps, (jnp.ones(3),), rounds=2, seed=0)
    assert measured["too_large"].error == "RESOURCE_EXHAUSTED: out of memory"
    assert measured["too_large"].seconds == []
    assert measured["ok"].error is None
    assert len(measured["ok"].seconds) == 2
    assert measured["ok"].memory["output"] == 12
    assert measure.fastest(measured, ("too_large", "ok")) == "ok"
    with pytest.raises(RuntimeError, match="out of memory"):
        measure.fastest(measured, ("too_large",))


def test_ratios_are_to_the_same_round():
    slow, plain = (measure.Measurement(seconds=s) for s in ([2.0, 6.0, 4.0], [1.0, 2.0, 2.0]))
    assert measure.fastest({"slow": slow, "plain": plain}, ("slow", "plain")) == "plain"
    assert measure.quartiles(measure.ratios(slow, plain)) == (2.0, 2.0, 2.5)
    assert measure.extra_seconds(slow, plain).tolist() == [1.0, 4.0, 2.0]


def has_a_picture(path):
    pixels = image.imread(path)
    return len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 5


def test_update_step_writes_table_numbers_and_figure(tmp_path, capsys):
    names = ("plain_sum", "plain_batched", "grpo")
    command = update_step.Command(size="micro", methods=names, repeats=2, directory=tmp_path)
    update_step.main(command)
    shown = capsys.readouterr().out.replace("\n", "")
    results = json.loads((tmp_path / "results.json").read_text())
    for text in (*names, "micro_unrolled_float32_2x3x12", "results.json", "ratios.png"):
        assert text in shown
    assert tuple(results["methods"]) == names
    assert results["methods"][results["plain"]]["ratios"] == [1.0, 1.0]
    grpo = results["methods"]["grpo"]
    assert len(grpo["seconds"]) == len(grpo["ratios"]) == 2
    assert grpo["memory"]["temp"] > 0
    assert results["environment"]["versions"]["jax"] == jax.__version__
    assert results["case"]["config"]["width"] == 32
    assert has_a_picture(tmp_path / "ratios.png")


def test_growth_writes_table_numbers_and_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "PLAIN", ("plain_batched",))
    base = growth.Point(sequences=2, tokens=6, width=16, layers=1, vocab=16, scanned=True)
    command = growth.Command(
        variables=("rank",),
        methods=("naive_accumulation", "naive_intra_{rank}"),
        base=base,
        rank=(2,),
        repeats=1,
        directory=tmp_path,
    )
    growth.main(command)
    results = json.loads((tmp_path / "growth.json").read_text())
    plain, intra = results["points"]
    assert (plain["method"], plain["measured"]) == ("plain", "plain_batched")
    assert (intra["value"], intra["measured"]) == (2, "naive_intra_2")
    assert "Growth of a step's cost" in capsys.readouterr().out
    assert has_a_picture(tmp_path / "growth.png")


def test_slopes_are_those_of_power_laws():
    rows = [
        {"variable": "rank", "method": name, "value": r, "seconds": [1.0], "cost": {"median": cost}}
        for r in (1, 2, 4)
        for name, cost in (("square", 3 * r**2), ("noise", -1.0))
    ]
    assert growth.slope(rows, "rank", "square") == pytest.approx(2)
    assert growth.slope(rows, "rank", "noise") is None


def test_roofline_bounds():
    """By hand: the arithmetic of one kernel shape, with all ceilings at 1 but for the memory's."""
    case = cases.SIZES["micro"]
    ceiling = roofline.Ceilings(matmul=1.0, skinny={2: 1.0}, copy=1e30, triad=1.0)
    sizes = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    assert roofline.accumulation_seconds(case, ceiling) == 2 * (3 * 3 + 4 * 3) * sizes
    features = (32 + 32 + 32 + 48) + (32 + 16 + 16 + 32 + 48 + 48 + 32)
    finding, projecting = 4 * 2 * 36 * 2 * features, 4 * 2 * sizes
    assert roofline.intra_seconds(case, 2, ceiling) == 2 * 2 * (finding + projecting)


def test_roofline_writes_table_and_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "PLAIN", ("plain_batched",))
    roofline.main(
        roofline.Command(
            size="micro",
            ranks=(2,),
            matmul_size=16,
            megabytes=1,
            repeats=1,
            directory=tmp_path,
        )
    )
    results = json.loads((tmp_path / "roofline.json").read_text())
    assert set(results["bounds"]) == {"accumulation", "intra_2"}
    assert all(bound["least_ratio"] > 1 for bound in results["bounds"].values())
    assert "GFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["update_step", "growth", "roofline"])
def test_help_explains_every_setting(name, capsys):
    command = importlib.import_module(f"benchmarks.{name}").Command
    with pytest.raises(SystemExit) as ended:
        tyro.cli(command, args=["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(command):
        if field.name != "base":
            assert f"--{field.name.replace('_', '-')}" in shown
    assert "Where the results go" in shown


def test_update_step_wants_a_baseline():
    with pytest.raises(ValueError, match="plain_sum"):
        update_step.Command(methods=("accumulation",))


def test_forms_agree_and_write_a_table(tmp_path, capsys):
    command = forms.Command(shapes=((4, 3),), tokens=(2, 40), repeats=1, directory=tmp_path)
    forms.main(command)
    rows = json.loads((tmp_path / "forms.json").read_text())["rows"]
    assert [row["chosen"] for row in rows] == ["factors", "dense"]
    assert "forms.json" in capsys.readouterr().out.replace("\n", "")
    rng = np.random.default_rng(0)
    factors = proma.LayerFactors(*(jnp.asarray(rng.normal(size=(3, 5, d))) for d in (4, 3)))
    total, coefficients = jnp.ones((4, 3)), jnp.ones(3)
    dense = forms.microbatch(total, factors.dense(), coefficients)
    np.testing.assert_allclose(forms.microbatch(total, factors, coefficients), dense, rtol=1e-4)
