"""SIGTERM and SIGINT while a stage trains: wait for the end of the step, so that a checkpoint can be written."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn


class StopRequest:
    """Whether a signal has asked the process to end, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def obey(self) -> NoReturn:
        """Ends as the command line does: exit code 143 for SIGTERM, KeyboardInterrupt for SIGINT."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signal.SIGTERM)


@contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Inside the block SIGTERM and the first SIGINT become a request; a second SIGINT does what it did before.

    Outside the main thread, which alone may say what signals do, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[signal.Signals, Any] = {}

    def take(number: int, _: FrameType | None) -> None:
        if request.signal is None:
            request.signal = signal.Signals(number)
            # Not through `console`, which may be in the middle of a line.
            os.write(2, b"\nhylo: stopping after this step, with a checkpoint (Ctrl-C: at once)\n")
        # Schedulers may send SIGTERM twice; a person who presses Ctrl-C twice means it.
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.getsignal(number) or signal.SIG_DFL
    try:
        for number in before:
            signal.signal(number, take)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
