"""Progress a person can read: bars with rates and time left on a terminal, a line now and then in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

# Results go to standard output; how far something is, to standard error.
console = Console(stderr=True)

_SECONDS_BETWEEN_LOG_LINES = 15.0


class RateColumn(ProgressColumn):
    """Units a second, such as 812 tokens/s."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", style="cyan")


class Bar:
    """One bar. `advance` moves it; `status` shows beside it (a loss, say).

    Args:
        done: how much was done before, which says nothing about the rate.
    """

    def __init__(self, description: str, total: float, unit: str, done: float = 0.0) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self._before, self.start = done, done, time.monotonic()
        self._last_line, self._printed = self.start, done
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", style="bold"),
                BarColumn(),
                MofNCompleteColumn(),
                RateColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[status]}", style="dim"),
                console=console,
            )
            self._task = self._progress.add_task(description, total=total, unit=unit, status="")
            self._progress.update(self._task, completed=done)
            self._progress.start()

    def advance(self, amount: float, status: str = "") -> None:
        self.done += amount
        if self._progress is not None:
            self._progress.update(self._task, advance=amount, status=status)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LOG_LINES:
            self._last_line = time.monotonic()
            self._line(status)

    def _line(self, status: str) -> None:
        elapsed = max(time.monotonic() - self.start, 1e-9)
        rate = (self.done - self._before) / elapsed
        left = max(self.total - self.done, 0.0) / rate if rate else 0.0
        self._printed = self.done
        console.print(
            f"{self.description}: {self.done:,.0f}/{self.total:,.0f} {self.unit}, {rate:,.0f}/s, "
            f"{elapsed:.0f} s gone, {left:.0f} s left {status}".rstrip(),
            highlight=False,
            markup=False,
        )

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        elif time.monotonic() - self.start >= 2 and self._printed < self.done:
            self._line("")


@contextmanager
def bar(description: str, total: float, unit: str) -> Iterator[Bar]:
    """A bar for the length of the block."""
    shown = Bar(description, total, unit)
    try:
        yield shown
    finally:
        shown.close()
