"""Runs that are killed, stopped, out of disk space, or met by another program's checkpoint.

Commands run in processes of their own, forked from a server that has imported them already.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections import namedtuple

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

import proma_jax as proma
from experiments import (
    compare,
    configs,
    files,
    methods,
    preemption,
    records,
    train,
    training,
    warm_start,
)
from tests.experiments import tiny

WARM = dataclasses.replace(tiny.WARM, check_every=warm_start.WarmStartConfig.check_every)
START = warm_start.StartConfig(tiny.TASK, WARM)
TRAINING = configs.TrainingConfig(
    steps=60,
    prompts=20,
    group_size=4,
    steps_per_batch=20,
    microbatch_size=2,
    checkpoint_every=7,
    method=methods.MethodConfig(learning_rate=1e-3),
)

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["experiments.train", "experiments.compare"])


def train_command(directory, start_directory, method="reinforce", steps=TRAINING.steps):
    return train.Command(
        method=method,
        directory=directory,
        start_directory=start_directory,
        task=tiny.TASK,
        start=WARM,
        training=dataclasses.replace(TRAINING, steps=steps),
    )


def run_command(command, output):
    with output.open("w") as file, contextlib.redirect_stdout(file):
        importlib.import_module(type(command).__module__).main(command)


def start_process(command, output):
    process = processes.Process(target=run_command, args=(command, output))
    process.start()
    return process


def wait_until(process, condition, *arguments):
    while process.is_alive() and not condition(*arguments):
        time.sleep(5e-3)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Gives the directory of a warm start, `start`, and of a run from it, `<method>/seed_0`."""

    @functools.cache
    def run(method="reinforce", steps=TRAINING.steps):
        root = tmp_path_factory.mktemp("uninterrupted")
        train.main(train_command(root, root / "start", method, steps))
        return root

    return run


def saved_step(directory):
    steps = [int(path.name) for path in directory.glob("checkpoints/*") if path.name.isdigit()]
    return max(steps, default=-1)


def saved_state(directory):
    path = directory / "checkpoints" / str(saved_step(directory)) / "default"
    return ocp.StandardCheckpointer().restore(path)


def saved_after(directory, step):
    return saved_step(directory) > step


def reached(directory, step):
    return any(row["step"] >= step for row in records.read_metrics(directory))


def saving(directory, since):
    """Whether a save is open that began after a moment."""

    def is_later(path):
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_mtime > since

    return any(map(is_later, directory.glob("checkpoints/*.orbax-checkpoint-tmp")))


def without_seconds(rows):
    return [{key: row[key] for key in row if key != "seconds"} for row in rows]


def assert_same_results(directory, expected):
    rows, expected_rows = map(records.read_metrics, (directory, expected))
    assert without_seconds(rows) == without_seconds(expected_rows)
    chex.assert_trees_all_equal(saved_state(directory), saved_state(expected))


@pytest.mark.parametrize(
    ("kills", "method", "steps"),
    [
        (2, "reinforce", TRAINING.steps),
        pytest.param(25, "proma_accumulation", 600, marks=pytest.mark.campaign),
    ],
)
def test_a_killed_run_ends_like_an_uninterrupted_one(kills, method, steps, uninterrupted, tmp_path):
    expected = uninterrupted(method, steps)
    command = train_command(tmp_path, expected / "start", method, steps)
    directory = tmp_path / method / "seed_0"
    moments = random.Random(0)
    committed, vouched_for, killed_saving = -1, [], 0
    for kill in range(kills):
        started = time.time()
        process = start_process(command, tmp_path / "output")
        if kill % 3 == 2:
            process.join(moments.uniform(0, 3))
        else:
            wait_until(process, saved_after, directory, committed)
            committed = saved_step(directory)
        if kill % 3 == 1:
            wait_until(process, saving, directory, time.time())
        time.sleep(moments.uniform(0, 0.06))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        killed_saving += saving(directory, started)
        assert saved_step(directory) >= committed
        committed, rows = saved_step(directory), records.read_metrics(directory)
        assert rows[: len(vouched_for)] == vouched_for
        vouched_for = [row for row in rows if row["step"] <= committed]
        assert [row["step"] for row in vouched_for] == list(range(committed + 1))
    print(f"{kills} kills, {killed_saving} of them within a save")

    train.main(command)
    assert records.read_metrics(directory)[: len(vouched_for)] == vouched_for
    assert_same_results(directory, expected / method / "seed_0")


def test_sigterm_saves_after_the_step_and_the_same_command_goes_on(uninterrupted, tmp_path):
    expected = uninterrupted()
    command = train_command(tmp_path, expected / "start")
    directory = tmp_path / "reinforce" / "seed_0"

    process = start_process(command, tmp_path / "output")
    wait_until(process, reached, directory, 2)
    process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    rows = records.read_metrics(directory)
    stopped = rows[-1]["step"]
    assert stopped % TRAINING.steps_per_batch
    assert saved_step(directory) == stopped
    message = (tmp_path / "output").read_text().splitlines()[-1]
    assert message == (
        f"Preempted after step {stopped}, checkpoint in {directory / 'checkpoints'}. "
        "The same command goes on from there."
    )

    train.main(command)
    assert records.read_metrics(directory)[: len(rows)] == rows
    assert_same_results(directory, expected / "reinforce" / "seed_0")


def test_compare_stops_in_the_warm_start_and_in_a_run(uninterrupted, tmp_path):
    command = compare.Command(
        methods=("reinforce", "grpo"),
        seeds=(0,),
        directory=tmp_path,
        start_directory=tmp_path / "start",
        task=tiny.TASK,
        start=WARM,
        training=TRAINING,
    )
    process = start_process(command, tmp_path / "output")
    wait_until(process, (tmp_path / "start" / "environment.json").exists)
    process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert 1 <= saved_step(tmp_path / "start") < WARM.check_every
    assert f"checkpoint in {tmp_path / 'start'}" in (tmp_path / "output").read_text()
    assert not (tmp_path / "reinforce").exists()

    process = start_process(command, tmp_path / "output")
    directory = tmp_path / "reinforce" / "seed_0"
    wait_until(process, reached, directory, 2)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 128 + signal.SIGINT
    assert_same_results(tmp_path / "start", uninterrupted() / "start")
    last_step = records.read_metrics(directory)[-1]["step"]
    assert saved_step(directory) == last_step < TRAINING.steps
    assert f"checkpoint in {directory}" in (tmp_path / "output").read_text()
    assert not (tmp_path / "grpo").exists()


def test_the_handlers_from_before_come_back():
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with preemption.handled() as stopping:
            assert signal.getsignal(number) not in before
            assert not stopping()
            signal.raise_signal(number)
            assert stopping()
        assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_ctrl_c_interrupts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGINT, before)
        stack.enter_context(preemption.handled())
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@dataclasses.dataclass(frozen=True)
class Settings:
    pass


@pytest.fixture
def state():
    return {"x": jax.random.normal(jax.random.key(0), (256, 256))}


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(files.Failure, match=f"{directory} cannot be used: .* choose"):
            records.Run(directory, Settings())


@pytest.mark.parametrize("module", [train, compare])
def test_a_command_finds_its_folder_unwritable_before_the_warm_start(module, tmp_path):
    (tmp_path / "file").touch()
    settings = {"method": "grpo"} if module is train else {}
    command = module.Command(
        **settings,
        directory=tmp_path / "file",
        start_directory=tmp_path / "start",
        task=tiny.TASK,
        start=WARM,
        training=TRAINING,
    )
    with pytest.raises(files.Failure, match=r"file/.* cannot be used: .* choose another"):
        module.main(command)
    assert not (tmp_path / "start").exists()


def test_a_folder_that_cannot_be_written_is_an_error_before_work_is_spent(state, tmp_path):
    with records.Run(tmp_path, Settings()) as run:
        (tmp_path / "environment.partial").mkdir()
        with pytest.raises(files.Failure, match=f"{tmp_path} cannot be used: .* choose"):
            run.begin(state)


def test_no_room_for_the_checkpoints_is_an_error_before_work_is_spent(state, tmp_path, monkeypatch):
    def set_free(count):
        usage = namedtuple("usage", "free")(count)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    size = 4 * 256 * 256
    with records.Run(tmp_path, Settings()) as run:
        set_free(2 * size - 1)
        with pytest.raises(
            files.Failure, match=f"{tmp_path} .* 524,288 bytes needed, 524,287 free"
        ):
            run.begin(state)
        set_free(2 * size)
        run.begin(state)
        run.save(1, state)
    with records.Run(tmp_path, Settings()) as run:
        set_free(size - 1)
        with pytest.raises(files.Failure, match="262,144 bytes needed, 262,143 free"):
            run.begin(state)
        set_free(size)
        run.begin(state)


def test_a_second_process_waits_for_the_first(state, tmp_path, caplog):
    def latest_step():
        with records.Run(tmp_path, Settings()) as run:
            return run.step

    with concurrent.futures.ThreadPoolExecutor() as pool:
        with records.Run(tmp_path, Settings()) as run:
            second = pool.submit(latest_step)
            while not second.done() and not caplog.text:
                time.sleep(5e-3)
            assert f"{tmp_path}: waiting for another process" in caplog.text
            run.begin(state)
            run.save(1, state)
        assert second.result() == 1


def test_who_waits_for_another_process_can_be_stopped(uninterrupted, tmp_path):
    start = warm_start.warm_start(START, uninterrupted() / "start")
    config = configs.RunConfig("reinforce", task=tiny.TASK, start=WARM, training=TRAINING)
    waiting = [
        functools.partial(warm_start.warm_start, START, tmp_path),
        functools.partial(training.train, config, *start, tmp_path),
    ]
    with records.Run(tmp_path, Settings()):
        for work in waiting:
            with pytest.raises(records.Preempted, match=f"another process worked on {tmp_path}"):
                work(stopping=lambda: True)


def test_what_a_killed_save_leaves_behind_is_removed(state, tmp_path):
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    with records.Run(tmp_path, Settings()) as run:
        assert run.step is None
        run.save(7, state)
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == ["7"]


@contextlib.contextmanager
def files_end_at(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_and_fail(directory, state, later_saves):
    with contextlib.ExitStack() as full_disk, records.Run(directory, Settings()) as run:
        run.begin(state)
        run.log({"step": 1})
        run.save(1, state)
        run._manager.wait_until_finished()
        run.log({"step": 2})
        full_disk.enter_context(files_end_at(100_000))
        run.save(2, state)
        for step in later_saves:
            run.save(step, state)
            pytest.fail("the failed save was not noticed")


@pytest.mark.parametrize("later_saves", [(), (3,)])
def test_a_save_that_fails_in_the_background_is_an_error_and_loses_nothing(
    later_saves, state, tmp_path
):
    with pytest.raises(files.Failure, match=f"{tmp_path}/checkpoints cannot .* File too large"):
        save_and_fail(tmp_path, state, later_saves)
    assert [row["step"] for row in records.read_metrics(tmp_path)] == [1, 2]
    with records.Run(tmp_path, Settings()) as run:
        assert run.step == 1
        chex.assert_trees_all_equal(run.restore(jax.tree.map(jnp.zeros_like, state)), state)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"x": jnp.zeros((256, 3))}, r"x has shape \(256, 256\) there and \(256, 3\) here"),
        ({"x": jnp.zeros((256, 256), jnp.bfloat16)}, "x has type float32 there and bfloat16 here"),
        ({"x": jnp.zeros((256, 256)), "y": jnp.zeros(3)}, "y is not there"),
        ({"y": jnp.zeros(3)}, "x is there, but not here; y is not there"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error_that_says_why(wanted, message, state, tmp_path):
    with records.Run(tmp_path, Settings()) as run:
        run.begin(state)
        run.save(7, state)
    with records.Run(tmp_path, Settings()) as run:
        with pytest.raises(files.Failure, match=f"checkpoints/7 cannot be restored: .*{message}"):
            run.restore(wanted)
        with pytest.raises(files.Failure, match="another directory, or go on with the git_commit"):
            run.restore(wanted)


def test_a_state_of_another_version_is_an_error(tmp_path):
    state = proma.project_intra().init({"w": jnp.ones(2)})
    with records.Run(tmp_path, Settings()) as run:
        run.begin(state)
        run.save(1, state._replace(version=jnp.int32(0)))
    with (
        records.Run(tmp_path, Settings()) as run,
        pytest.raises(files.Failure, match=r"version is 0 there and \d here"),
    ):
        run.restore(state)
