"""TensorBoard and Weights & Biases have the rows of metrics.jsonl, each once, whatever happened."""

import importlib.util
import sys
import types

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from experiments import command_line, configs, files, loggers, records, train
from tests.experiments import tiny

CONFIG = tiny.run_config("grpo", configs.TrainingConfig(steps=4, prompts=8))
STATE = {"x": jnp.float32(0)}


def row(step, process=0):
    """What the processes that work on a run have in common, and what each has its own of."""
    return {"step": step, "reward": step / 8, "seconds": float(process)}


def work(directory, config, process, dies_at=4):
    """Works on a run as `training.train` does, with a checkpoint every two steps."""
    with records.Run(directory, CONFIG) as run, loggers.Loggers(config, CONFIG) as logged:
        is_finished = run.step == 4
        logged.opened(run, is_finished)
        if is_finished:
            return
        run.begin(STATE)
        for step in range(0 if run.step is None else run.step + 1, dies_at + 1):
            run.log(row(step, process))
            logged.send()
            if step in (2, 4):
                run.save(step, STATE)


def events(folder):
    """What TensorBoard shows of a folder: {name: {step: value}}."""
    shown = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                for steps in shown.values():
                    for step in [step for step in steps if step >= event.step]:
                        del steps[step]
            for value in event.summary.value:
                steps = shown.setdefault(value.tag, {})
                assert event.step not in steps
                steps[event.step] = value.simple_value
    return shown


def test_tensorboard_has_each_row_once(tmp_path):
    for process, dies_at in enumerate((1, 3, 4, 4)):
        work(tmp_path, loggers.LoggersConfig(tensorboard=True), process, dies_at)
        rows = records.read_metrics(tmp_path)
        assert [row["step"] for row in rows] == list(range(dies_at + 1))
        folder = tmp_path / "tensorboard"
        assert events(folder) == {
            name: {row["step"]: row[name] for row in rows} for name in ("reward", "seconds")
        }
        for path in folder.glob(
            "*vents.*"
        ):  # so that the next one, of the same second, stays beside
            path.rename(folder / f"{process}.{path.name}")


class StandIn(types.ModuleType):
    """Weights & Biases, as far as it is used here: it takes steps in order and knows runs again."""

    Settings = dict

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.histories = {}
        self.inits = []
        self.is_offline = False

    def init(self, id, resume, **settings):
        if self.is_offline:
            raise self.Error("No API key configured. Use `wandb login`.")
        self.inits.append(settings)
        id = id or f"run{len(self.histories)}"
        return self.Run(id, self.histories.setdefault(id, []))

    class Run:
        def __init__(self, id, history):
            self.id, self.history = id, history

        @property
        def step(self):
            return len(self.history)

        def log(self, values, step, commit):
            assert step == self.step
            self.history.append((step, values))

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass


@pytest.fixture
def wandb(monkeypatch):
    module = StandIn()
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_rows_that_it_lacks(tmp_path, wandb):
    config = loggers.LoggersConfig(wandb="project")
    work(tmp_path, config, 0, dies_at=1)
    work(tmp_path, config, 1, dies_at=3)  # begins anew, since there is no checkpoint
    first, second = wandb.histories.values()
    assert [step for step, _ in second] == [0, 1, 2, 3]
    del second[1:]  # what did not arrive before the process ended
    work(tmp_path, config, 2)
    work(tmp_path, config, 3)
    assert list(wandb.histories.values()) == [first, second]
    rows = records.read_metrics(tmp_path)
    assert [{"step": step, **values} for step, values in second] == rows
    assert len(wandb.inits) == 4
    assert wandb.inits[0]["project"] == "project"
    assert wandb.inits[0]["config"]["training"]["steps"] == 4


def test_what_wandb_has_against_a_run_is_told(tmp_path, wandb):
    wandb.is_offline = True
    with pytest.raises(files.Failure, match=r"Use `wandb login`\. With WANDB_MODE=offline"):
        work(tmp_path, loggers.LoggersConfig(wandb="project"), 0)


@pytest.mark.parametrize(
    ("flags", "package"), [("--tensorboard", "tensorboardX"), ("--wandb project", "wandb")]
)
def test_a_missing_package_is_named_before_the_run(flags, package, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else real(name)
    )
    with pytest.raises(SystemExit):
        command_line.read(train.Command, "prog", ["--method", "grpo", *flags.split()])
    error = capsys.readouterr().err
    assert f"error: {flags.split()[0]} " in error
    assert f"needs the package {package}: pip install '.[" in error
