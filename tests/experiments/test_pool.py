"""A comparison by two processes: killed in the middle, it ends as one by a single process does."""

import dataclasses
import io
import multiprocessing
import os
import signal
import threading
import time

import jax
import pytest
from rich import console

from experiments import compare, configs, files, loggers, methods, pool, records, report, training
from tests.experiments import tiny

SETTINGS = configs.TrainingConfig(
    steps=100, prompts=4, group_size=4, microbatch_size=4, validation_every=50, checkpoint_every=20
)

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["experiments.compare"])


@pytest.fixture
def command(tmp_path):
    return compare.Command(
        methods=("grpo", "proma_accumulation", "grpo_matched"),
        seeds=(0,),
        processes=2,
        directory=tmp_path / "two",
        start_directory=tmp_path / "start",
        task=tiny.TASK,
        start=tiny.WARM,
        training=SETTINGS,
        loggers=loggers.LoggersConfig(tensorboard=True),
    )


def told(command, monkeypatch):
    """What a comparison prints."""
    output = io.StringIO()
    monkeypatch.setattr(report, "terminal", console.Console(file=output, width=200))
    compare.main(command)
    return output.getvalue()


def rows(command, method):
    """Of a run, but for the seconds, in which no two agree."""
    found = records.read_metrics(command.directory / method / "seed_0")
    return [{key: row[key] for key in row if key != "seconds"} for row in found]


def table(printed):
    """The table that a comparison ends with, but for the seconds."""
    lines = printed[printed.index("method") :].splitlines()
    return [line.split()[:-1] for line in lines if "GRPO" in line or "PROMA" in line]


def test_a_killed_comparison_by_two_processes_ends_like_one_by_one(command, monkeypatch):
    alone = dataclasses.replace(command, processes=1, directory=command.directory.parent / "one")
    expected = told(alone, monkeypatch)
    assert "side by side" not in expected

    first, second = (command.directory / name / "seed_0" for name in command.methods[:2])
    process = processes.Process(target=compare.main, args=[command])
    process.start()
    while process.is_alive() and not (
        any(path.name.isdigit() for path in first.glob("checkpoints/*"))
        and (second / "config.json").exists()
    ):
        time.sleep(5e-3)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with files.alone(first, lambda: None):  # once the processes that worked are gone too
        assert records.read_metrics(first)[-1]["step"] < SETTINGS.steps

    printed = told(command, monkeypatch)
    assert "3/3  grpo_matched, seed 0: " in printed
    assert "timed while 2 runs went on side by side" in " ".join(printed.split())
    assert len(table(printed)) == 3
    assert table(printed) == table(expected)
    for method in command.methods:
        assert rows(command, method) == rows(alone, method)
        assert any((command.directory / method / "seed_0" / "tensorboard").iterdir())


def test_numbers_that_are_not_finite_end_a_comparison(command, monkeypatch):
    def outcomes(command, cells, start, stopping):
        yield cells[0], pool.Outcome(cells[0].directory, 1.0, records.NotFinite("Step 3 gave"))

    monkeypatch.setattr(pool, "outcomes", outcomes)
    with pytest.raises(records.NotFinite, match="Step 3"):
        compare.main(command)


@pytest.fixture
def cell(command):
    training = dataclasses.replace(SETTINGS, steps=4, method=methods.MethodConfig(clip=0.123))
    config = configs.RunConfig("grpo", task=command.task, start=command.start, training=training)
    return pool.Cell("grpo", command.directory / "run", config)


def test_the_first_run_is_with_a_process_before_the_start_is_trained(command, cell):
    cells = [cell]

    def start(before_training):
        before_training()
        assert not cells
        assert not cell.directory.exists()
        report.start(command, command.start_directory, lambda: False)

    [(done, outcome)] = pool.outcomes(command, cells, start, lambda: False)
    assert done == cell
    assert outcome.not_finite is None
    assert [row["step"] for row in records.read_metrics(cell.directory)] == [0, 1, 2, 3, 4]


def test_what_a_run_needs_is_compiled_from_an_untrained_start(command, cell, monkeypatch, caplog):
    monkeypatch.setattr(pool, "_stop", threading.Event(), raising=False)
    policy, params = report.start(command, command.start_directory, lambda: False)
    with jax.log_compiles():
        pool._compile(cell.config)
        assert "jit(update)" in caplog.text
        caplog.clear()
        training.train(cell.config, policy, params, cell.directory)
    assert "jit(update)" not in caplog.text
    assert "jit(sample)" not in caplog.text
    assert "jit(_hidden)" not in caplog.text


@pytest.mark.parametrize(
    ("number", "count", "share"), [(0, 1, [2, 3, 5, 7, 8]), (1, 2, [3, 7]), (5, 6, None)]
)
def test_processes_share_the_cores(monkeypatch, number, count, share):
    used = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {8, 2, 3, 5, 7}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *given: used.append(given), raising=False)
    pool._keep_to_share(number, count)
    assert used == ([] if share is None else [(0, share)])
