"""SIGTERM, sent before a machine is taken away, and Ctrl-C: save after the step, then stop."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from experiments import records, report


@contextlib.contextmanager
def handled() -> Iterator[Callable[[], bool]]:
    """Gives the function that says whether to stop; `records.Preempted` ends in its message.

    A second Ctrl-C interrupts at once. The handlers from before come back at the end.
    """
    asked = []

    def ask(number, frame):
        asked.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    except records.Preempted as preempted:
        report.terminal.print(preempted, highlight=False, soft_wrap=True)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
