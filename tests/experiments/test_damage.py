"""Files of a run that are damaged, shortened or gone: each is named, with what to do about it."""

import dataclasses
import json
import shutil

import chex
import jax.numpy as jnp
import pytest

from experiments import files, records


@dataclasses.dataclass(frozen=True)
class Settings:
    a: int = 1


# Where orbax itself meets damage among many arrays, its threads leave tracebacks.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
STATE = {"w": jnp.arange(6.0), "n": jnp.int32(3), "many": [jnp.zeros(2)] * 100}


@pytest.fixture
def directory(tmp_path):
    """A run of five steps, its latest checkpoint after the fifth."""
    with records.Run(tmp_path, Settings()) as run:
        run.begin(STATE)
        for step in range(6):
            run.log({"step": step, "loss": 1.0})
        run.save(5, STATE)
    return tmp_path


def go_on(directory):
    with records.Run(directory, Settings()) as run:
        step, state = run.step, run.restore(STATE)
        run.begin(state)
    chex.assert_trees_all_equal(state, STATE)
    return step, [row["step"] for row in records.read_metrics(directory)]


def overwrite(pattern, content):
    def damage(directory):
        found = [path for path in directory.glob(pattern) if path.is_file()]
        assert found
        for path in found:
            path.write_bytes(content)

    return damage


def remove(pattern):
    def damage(directory):
        for path in list(directory.glob(pattern)):
            path.unlink()

    return damage


def append(content):
    def damage(directory):
        with (directory / "metrics.jsonl").open("ab") as file:
            file.write(content)

    return damage


def drop_lines(*numbers):
    def damage(directory):
        path = directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(x for i, x in enumerate(lines, 1) if i not in numbers))

    return damage


def add_an_empty_checkpoint(directory):
    (directory / "checkpoints" / "7").mkdir()


def add_half_a_checkpoint(directory):
    checkpoints = directory / "checkpoints"
    shutil.copytree(checkpoints / "5", checkpoints / "7", ignore=shutil.ignore_patterns("d"))


def put_a_file_in_the_place_of_the_checkpoints(directory):
    shutil.rmtree(directory / "checkpoints")
    (directory / "checkpoints").touch()


def put_a_folder_in_the_place_of_the_metrics(directory):
    (directory / "metrics.jsonl").unlink()
    (directory / "metrics.jsonl").mkdir()


def put_a_folder_in_the_place_of_the_lock(directory):
    (directory / "lock").unlink()
    (directory / "lock").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (overwrite("config.json", b""), "config.json is damaged.* another directory"),
        (overwrite("config.json", b"[1]"), "config.json is damaged.* another directory"),
        (overwrite("config.json", b"\xff\0"), "config.json is damaged.* another directory"),
        (overwrite("environment.json", b"{"), "environment.json is damaged.* delete it"),
        (overwrite("environment.json", b"{}"), "environment.json is damaged.* delete it"),
        (append(b"\0" * 40 + b"\n"), "metrics.jsonl, line 7, is damaged.* Delete that line"),
        (append(b"7\n"), "metrics.jsonl, line 7, is damaged.* Delete that line"),
        (append(b'{"loss": 1}\n'), "metrics.jsonl, line 7, is damaged.* Delete that line"),
        (append(b'{"step": 6, "loss": NaN}\n'), "metrics.jsonl, line 7, is damaged"),
        (remove("metrics.jsonl"), "metrics.jsonl is damaged: 0 rows up to step 5, but 6 when"),
        (drop_lines(3), "metrics.jsonl is damaged: 5 rows up to step 5, but 6 when"),
        (drop_lines(5, 6), "metrics.jsonl is damaged: 4 rows up to step 5.* Put back a copy"),
        (add_an_empty_checkpoint, "checkpoints/7 is damaged.* delete it.* the checkpoint before"),
        (add_half_a_checkpoint, "checkpoints/7 is damaged.* delete it.* the checkpoint before"),
        (overwrite("checkpoints/5/**/d/*", b"\0" * 99), "checkpoints/5 is damaged.* delete it"),
        (remove("checkpoints/5/**/_METADATA"), "checkpoints/5 is damaged.* delete it"),
        (remove("checkpoints/5/_CHECKPOINT_METADATA"), "checkpoints/5 is damaged.* delete it"),
        (overwrite("checkpoints/5/_CHECKPOINT_METADATA", b"{"), "checkpoints/5 is damaged"),
        (put_a_folder_in_the_place_of_the_metrics, "metrics.jsonl'.* or choose another"),
        (put_a_file_in_the_place_of_the_checkpoints, "checkpoints'.* or choose another"),
        (put_a_folder_in_the_place_of_the_lock, "lock'.* or choose another"),
    ],
)
def test_what_is_damaged_is_named_with_what_to_do(damage, message, directory):
    damage(directory)
    before = {path: path.read_bytes() for path in directory.rglob("*.json*") if path.is_file()}
    with pytest.raises(files.Failure, match=f"{directory}.*{message}") as failure:
        go_on(directory)
    assert "\n" not in str(failure.value)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize(
    "damage",
    [
        append(b'{"step": 6, "lo'),
        append(b'{"step": 6, "loss": 1.0}\n'),
        remove("environment.json"),
        lambda directory: (directory / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(),
    ],
)
def test_what_an_interruption_leaves_is_no_damage(damage, directory):
    damage(directory)
    assert go_on(directory) == (5, list(range(6)))


def test_a_damaged_checkpoint_may_be_deleted(directory):
    add_half_a_checkpoint(directory)
    shutil.rmtree(directory / "checkpoints" / "7")
    assert go_on(directory) == (5, list(range(6)))
    shutil.rmtree(directory / "checkpoints" / "5")
    with records.Run(directory, Settings()) as run:
        assert run.step is None
        run.begin(STATE)
    assert records.read_metrics(directory) == []


def test_a_moved_run_goes_on(directory, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "run"
    directory.rename(moved)
    assert go_on(moved) == (5, list(range(6)))


@pytest.mark.parametrize(
    ("row", "state", "named"),
    [
        ({"loss": float("nan")}, STATE, "loss nan"),
        ({"loss": float("-inf")}, STATE, "loss -inf"),
        ({}, {"w": jnp.array([0, jnp.inf]), "n": jnp.int32(3)}, r"\['w'\]"),
        ({}, {"w": jnp.full((), jnp.nan, jnp.bfloat16)}, r"\['w'\]"),
    ],
)
def test_a_number_that_is_not_finite_ends_a_run(row, state, named, directory):
    row = {"step": 6, "loss": 1.0} | row
    with records.Run(directory, Settings()) as run:
        run.begin(STATE)
        run.log(row)
        with pytest.raises(
            files.Failure, match=f"Step 6 gave .* finite: {named}.* checkpoint 5 in it"
        ):
            run.check_finite(row, state)
    last = (directory / "metrics.jsonl").read_text().splitlines()[-1]
    logged = json.loads(last, parse_constant=pytest.fail)
    assert logged == {"step": 6, "loss": None if "loss" in named else 1.0}
    assert go_on(directory) == (5, list(range(6)))
