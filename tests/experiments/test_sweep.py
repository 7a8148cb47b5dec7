"""A sweep one of whose learning rates diverges, and its figures."""

import dataclasses
import io
import json

import jax
import numpy as np
import optax
import pytest
from matplotlib import image
from rich import console

from experiments import (
    configs,
    environment,
    files,
    loggers,
    methods,
    plot,
    records,
    report,
    sweep,
    training,
)
from tests.experiments import tiny

SETTINGS = configs.TrainingConfig(
    steps=100, prompts=4, group_size=4, microbatch_size=4, validation_every=50, checkpoint_every=20
)


@pytest.fixture(scope="module")
def start_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("start")
    report.start(tiny.run_config("grpo", SETTINGS), directory, lambda: False)
    return directory


@pytest.fixture
def command(start_directory, tmp_path):
    return sweep.Command(
        variants=("grpo,clip=0.1",),
        learning_rates=(1e-3, 1e30),  # AdamW's steps are so long then that logits overflow
        seeds=(0,),
        directory=tmp_path / "sweep",
        start_directory=start_directory,
        task=tiny.TASK,
        start=tiny.WARM,
        training=SETTINGS,
        loggers=loggers.LoggersConfig(tensorboard=True),
    )


def test_a_sweep_takes_what_is_finished_and_goes_on_after_a_run_that_diverges(command, monkeypatch):
    finished, diverging = (cell.directory for cell in command.cells())
    start = report.start(command, command.start_directory, lambda: False)
    training.train(command.cells()[0].config, *start, finished)
    before = [(path, path.read_bytes()) for path in finished.glob("*.json*")]

    output = io.StringIO()
    monkeypatch.setattr(report, "terminal", console.Console(file=output, width=200))
    sweep.main(dataclasses.replace(command, learning_rates=command.learning_rates[::-1]))
    told = output.getvalue()
    assert "1/2  grpo,clip=0.1, lr 1e+30, seed 0: not finite at step" in told
    assert "2/2  grpo,clip=0.1, lr 0.001, seed 0: best 0." in told
    assert "complete already" in told
    assert before == [(path, path.read_bytes()) for path, _ in before]
    assert None in records.read_metrics(diverging)[-1].values()
    assert all(any((run / "tensorboard").iterdir()) for run in (finished, diverging))
    assert {path.name for path in (command.directory / "figures").iterdir()} == {
        "learning_rates.png",
        "score_against_kl.png",
    }


def test_a_cell_that_cannot_be_worked_on_ends_the_sweep_with_the_reason(command):
    first = command.cells()[0].directory
    (first / "environment.partial").mkdir(parents=True)
    with pytest.raises(files.Failure, match=f"{first} cannot be used"):
        sweep.main(command)


def save(directory, method, rate, seed, *, settings=SETTINGS, score=0.5, steps=4, **changes):
    """Writes a run's settings and metrics."""
    changed = dataclasses.replace(settings.method, learning_rate=rate, **changes)
    config = tiny.run_config(method, dataclasses.replace(settings, steps=4, method=changed))
    config = dataclasses.replace(config, seed=seed)
    run = directory / method / f"{rate}-{seed}-{len(list(directory.rglob('config.json')))}"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(environment.plain(config)))
    rows = [{"step": 0, "cumulative_kl": 0.0, "validation": score}]
    for step in range(1, steps + 1):
        row = {"step": step, "step_kl": rate, "start_kl": rate * step, "cumulative_kl": rate * step}
        row |= {"entropy": 1.0, "update_norm": 0.1, "seconds": 0.1}
        row |= {"accumulation_fraction": 0.0, "intra_fraction": 0.0}
        rows.append(row | ({"validation": score + rate * step} if step % 2 == 0 else {}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_runs_are_found_and_named_by_what_differs(tmp_path):
    for rate in (1e-3, 1e-2):
        for seed in (0, 1):
            save(tmp_path, "grpo", rate, seed)
            save(tmp_path, "proma_accumulation", rate, seed, skip_fraction=0.5)
            save(tmp_path, "proma_accumulation", rate, seed, skip_fraction=0)
    save(tmp_path, "grpo", 0.1, 0, steps=3)
    environment.describe(tmp_path, tiny.START)
    found = plot.find(tmp_path)
    assert [
        (one.label, {rate: len(one.complete(rate)) for rate in one.runs})
        for one in plot.series(found)
    ] == [
        ("GRPO", {1e-3: 2, 1e-2: 2, 0.1: 0}),
        ("PROMA accumulation, skip fraction 0.5", {1e-3: 2, 1e-2: 2}),
        ("PROMA accumulation, skip fraction 0", {1e-3: 2, 1e-2: 2}),
    ]


def test_figures_are_drawn_from_saved_metrics(tmp_path):
    command = plot.Command(tmp_path, tmp_path / "drawn")
    for method in ("grpo", "proma_intra"):
        for rate in (1e-3, 1e-2):
            save(tmp_path, method, rate, 0)
    plot.main(command)
    before = [image.imread(path) for path in sorted(command.output.iterdir())]
    assert len(before) == 2
    save(tmp_path, "grpo", 1e-2, 1, score=0.9)
    save(tmp_path, "grpo", 1e-1, 1, steps=1)
    plot.main(command)
    for old, path in zip(before, sorted(command.output.iterdir()), strict=True):
        new = image.imread(path)
        assert min(new.shape[:2]) >= 400
        assert old.shape != new.shape or np.abs(old - new).max() > 0.5


def test_runs_that_are_not_comparable_are_refused(tmp_path):
    save(tmp_path, "grpo", 1e-3, 0)
    save(tmp_path, "grpo", 1e-2, 0, settings=dataclasses.replace(SETTINGS, prompts=8))
    with pytest.raises(files.Failure, match=r"training\.prompts: 4 there, 8 now"):
        plot.series(plot.find(tmp_path))


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(files.Failure, match=f"{tmp_path} has no runs in it"):
        plot.find(tmp_path)


def test_the_learning_rate_is_in_the_state_and_not_in_the_program(start_directory):
    policy, start = report.start(tiny.run_config("grpo", SETTINGS), start_directory, lambda: False)
    slow, fast = (
        methods.make_method("grpo", methods.MethodConfig(learning_rate=rate), policy, 4)
        for rate in (1e-4, 1e-2)
    )
    assert slow.step is fast.step
    assert optax.tree.get(slow.init(start), "step_size") == np.float32(1e-4)
    assert optax.tree.get(fast.init(start), "step_size") == np.float32(1e-2)


def test_the_length_of_a_matched_update_is_in_the_state_and_not_in_the_program(start_directory):
    policy, start = report.start(tiny.run_config("grpo", SETTINGS), start_directory, lambda: False)
    method = methods.make_method("grpo_matched", methods.MethodConfig(), policy, 4)
    state = method.init(start)
    aimed = methods.aimed(state, 0.3)
    assert optax.tree.get(aimed, "update_length") == np.float32(0.3)
    assert jax.tree.map(jax.typeof, aimed) == jax.tree.map(jax.typeof, state)
