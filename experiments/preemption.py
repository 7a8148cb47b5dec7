"""SIGTERM, sent before a machine is taken away, and Ctrl-C: save after the step, then stop.

The exit status is that of a program ended by the signal, 143 or 130, so that whoever sent it, such
as Kubernetes, does not take the run for a finished one.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from experiments import records, report


@contextlib.contextmanager
def handled() -> Iterator[Callable[[], bool]]:
    """Gives the function that says whether to stop; on `records.Preempted` says so, and exits.

    A signal is acknowledged at once, and a second Ctrl-C interrupts. The handlers from before come
    back at the end.
    """
    asked = []

    def ask(number, frame):
        asked.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with _acknowledged():
            yield lambda: bool(asked)
    except records.Preempted as preempted:
        report.terminal.print(preempted, highlight=False, soft_wrap=True)
        number = asked[0] if asked else signal.SIGTERM  # which another process was sent
        raise SystemExit(128 + number) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _acknowledged() -> Iterator[None]:
    """Acknowledges the first signal also while the main thread, which handles it, is in a step."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def acknowledge():
        for number in iter(lambda: os.read(reader, 1), b""):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                again = " (again to stop at once)" if number[0] == signal.SIGINT else ""
                report.terminal.print(f"Stopping after this step{again}.", highlight=False)
                return

    thread = threading.Thread(target=acknowledge)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)
