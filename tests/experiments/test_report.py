"""Progress: what is shown of a run in a terminal and elsewhere, and Ctrl-C while a step goes on."""

import dataclasses
import io
import signal
import threading

import pytest
from rich import console

from experiments import configs, loggers, preemption, records, report
from tests.experiments import tiny
from tests.experiments.test_loggers import events

SETTINGS = configs.TrainingConfig(
    steps=4, prompts=4, group_size=4, microbatch_size=4, validation_every=2, checkpoint_every=2
)
CONFIG = tiny.run_config("reinforce", SETTINGS)


@pytest.fixture
def shown(monkeypatch):
    """What is printed where there is no terminal."""
    output = io.StringIO()
    monkeypatch.setattr(report, "terminal", console.Console(file=output, width=80))
    return output


def never():
    return False


def run_all(directory, config=CONFIG):
    start = report.start(config, directory / "start", never)
    return report.train(config, *start, directory / "run", never)


def test_a_run_is_shown_in_lines_where_there_is_no_terminal(shown, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SECONDS_BETWEEN_LINES", 0.0)
    run_all(tmp_path)
    lines = shown.getvalue().splitlines()
    assert lines[0] == f"warm start: begun, in {tmp_path / 'start'}"
    assert lines[1] == "warm start  0/?  compiling"
    assert lines[2].startswith("warm start  1/?  loss ")
    assert lines[3].endswith(" s/step")
    assert lines[52].startswith("Start: 1,824 parameters, ")
    begun, compiling, memory, first, second, third, last = lines[53:]
    assert begun == f"reinforce, seed 0: begun, in {tmp_path / 'run'}"
    assert compiling == "reinforce, seed 0  0/4  compiling"
    assert memory.startswith("reinforce, seed 0: the update takes ")
    assert first.startswith("reinforce, seed 0  1/4  score ")
    assert "s/step" not in first
    assert second.endswith(" left")
    assert third.endswith(" left")
    assert last.startswith("reinforce, seed 0  4/4  score ")
    assert last.endswith(" s/step")
    assert "\x1b" not in shown.getvalue()


def test_lines_are_few(shown, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SECONDS_BETWEEN_LINES", 1e9)
    run_all(tmp_path)
    numbers = [line.split()[3] for line in shown.getvalue().splitlines() if "seed 0  " in line]
    assert numbers == ["0/4", "4/4"]


def test_a_run_is_shown_as_a_bar_in_a_terminal(tmp_path, monkeypatch):
    output = io.StringIO()
    terminal = console.Console(file=output, force_terminal=True, width=80)
    monkeypatch.setattr(report, "terminal", terminal)
    with (
        report._Shown("proma_accumulation, seed 0", 100) as shown,
        records.Run(tmp_path, SETTINGS) as run,
    ):
        shown.opened(run, False)
        for step in range(100):
            shown.row({"step": step, "validation": 0.5})
            shown._bar.refresh()
    for text in ("compiling", "━", "99/100", "score 0.50", "s/step, 0:00:01 left", "\x1b["):
        assert text in output.getvalue()


def test_where_a_run_begins_is_said(shown, tmp_path):
    start = report.start(CONFIG, tmp_path / "start", never)
    to = loggers.LoggersConfig(tensorboard=True)
    shorter = dataclasses.replace(CONFIG, training=dataclasses.replace(SETTINGS, steps=2))
    report.train(shorter, *start, tmp_path / "run", never, to)
    shown.truncate(0)
    report.train(CONFIG, *start, tmp_path / "run", never, to)
    assert f"reinforce, seed 0: resumed from step 2, in {tmp_path / 'run'}" in shown.getvalue()
    assert "reinforce, seed 0  2/4  compiling" in shown.getvalue()
    shown.truncate(0)
    report.train(CONFIG, *start, tmp_path / "run", never, to)
    assert f"seed 0: complete already, in {tmp_path / 'run'}" in shown.getvalue()
    assert "compiling" not in shown.getvalue()
    shown.truncate(0)
    directory, _ = report.train(shorter, *start, tmp_path / "run", never, to)
    assert directory == tmp_path / "run-2"
    for folder, steps in ((tmp_path / "run", {0, 2, 4}), (directory, {0, 2})):
        assert events(folder / "tensorboard")["validation"].keys() == steps
    assert (
        f"{tmp_path / 'run'} holds a run with other settings (training.steps: 4 there, 2 now). "
        f"This one goes beside it.\nreinforce, seed 0: begun, in {directory}\n"
    ) in shown.getvalue()


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGINT, "Stopping after this step (again to stop at once)."),
        (signal.SIGTERM, "Stopping after this step."),
    ],
)
def test_a_signal_is_acknowledged_while_the_step_goes_on(number, told, monkeypatch):
    acknowledged = threading.Event()

    class Output(io.StringIO):
        def flush(self):
            if told in self.getvalue():
                acknowledged.set()

    def send():
        signal.pthread_kill(threading.get_ident(), number)

    monkeypatch.setattr(report, "terminal", console.Console(file=Output(), width=80))
    with preemption.handled() as stopping:
        sender = threading.Thread(target=send)
        sender.start()
        # Python handles a signal in its main thread, which waits here as it does for a device.
        assert acknowledged.wait(timeout=10)
        sender.join()
        assert stopping()
