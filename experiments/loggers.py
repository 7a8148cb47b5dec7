"""The rows of metrics.jsonl, sent on to TensorBoard and to Weights & Biases.

A process first sends the rows that are in the file already, since one that was killed may not have
sent them all. TensorBoard then hides what it had of the run. Weights & Biases keeps what it has and
gets only what it lacks, so that of a row that was done again it shows the first form.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Self

from pydantic.dataclasses import dataclass

from experiments import checked, environment, files, processes, records
from experiments.configs import RunConfig

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""What each setting needs; the extra that installs it is named like the setting."""


@dataclass(frozen=True, config=checked.CONFIG)
class LoggersConfig:
    """Where metrics go beside metrics.jsonl, which they always go to."""

    tensorboard: bool = False
    """Whether metrics also go to TensorBoard's files, in the folder `tensorboard` of the run."""
    wandb: str | None = None
    """The project of Weights & Biases that metrics also go to. With WANDB_MODE=offline in the
    environment they are kept in the folder `wandb` of the run, for `wandb sync`."""

    def __post_init__(self):
        for extra, package in _PACKAGES.items():
            value = getattr(self, extra)
            if value and importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"{extra}={value} needs the package {package}: "
                    f"pip install '.[{extra}]' in the clone"
                )


NONE = LoggersConfig()


class Loggers:
    """A run's loggers, open from when the run is opened until the context ends.

    Of several processes that work on the run the first alone has any.

    Args:
        config: which loggers.
        run: the run's settings.
    """

    def __init__(self, config: LoggersConfig, run: RunConfig):
        self._config = config
        self._run = run
        self._open = contextlib.ExitStack()
        self._sends: list[Callable[[records.Row], None]] = []
        self._sent = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self._open.__exit__(*exception)

    def opened(self, run: records.Run, finished: bool) -> None:
        """Opens the loggers. Of a run that is finished, they get what they lack."""
        self._directory = run.directory
        begins = run.step is None
        processes.by_first(lambda: self._open_all(begins))
        if finished:
            self.send()

    def _open_all(self, begins: bool) -> None:
        if self._config.tensorboard:
            self._sends.append(self._tensorboard())
        if self._config.wandb:
            self._sends.append(self._wandb(self._config.wandb, begins))

    def send(self) -> None:
        """Sends the rows of metrics.jsonl that were not sent yet."""
        rows = records.read_metrics(self._directory) if self._sends else []
        for row in rows[self._sent :]:
            for send in self._sends:
                send(row)
        self._sent = len(rows)

    def _tensorboard(self) -> Callable[[records.Row], None]:
        from tensorboardX import SummaryWriter

        folder = self._directory / "tensorboard"
        with files.using(folder):
            writer = self._open.enter_context(SummaryWriter(str(folder), purge_step=0))

        def send(row):
            for name, value in _values(row).items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()

        return send

    def _wandb(self, project: str, begins: bool) -> Callable[[records.Row], None]:
        import wandb

        path = self._directory / "wandb_id"
        known = path.read_text() if path.exists() and not begins else None
        try:
            run = wandb.init(
                project=project,
                id=known,
                resume="allow",
                name=f"{self._run.method}, seed {self._run.seed}",
                group=self._run.method,
                config=environment.plain(self._run),
                dir=self._directory,
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise files.Failure(
                f"Weights & Biases: {str(error).rstrip('.')}. With WANDB_MODE=offline in the "
                "environment, metrics are kept for a later `wandb sync`."
            ) from error
        self._open.enter_context(run)
        with files.using(self._directory):
            files.replace(path, run.id)
        first = run.step

        def send(row):
            if row["step"] >= first:
                run.log(_values(row), step=row["step"], commit=True)

        return send


def _values(row: records.Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}
