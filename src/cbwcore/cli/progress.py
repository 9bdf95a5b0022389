"""How far a command is: a bar with rate and remaining time on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cbwcore.cli.output import console, size_text, time_text

__all__ = ["Meter", "Phases", "phases", "progress"]

LINE_SECONDS = 5.0  # between two lines where there is no terminal


class Meter(Protocol):
    """Takes the bytes that are done, from any thread."""

    def update(self, done_bytes: int) -> None:
        """So many are done in all."""


class Bar:
    """A bar on a terminal."""

    def __init__(self, screen: Progress, label: str, total: int) -> None:
        self._screen = screen
        self._task = screen.add_task(label, total=total)

    def update(self, done_bytes: int) -> None:
        """So many are done in all."""
        self._screen.update(self._task, completed=done_bytes)


class Lines:
    """Lines for a log."""

    def __init__(self, out: Console, label: str, total: int, clock: Callable[[], float]) -> None:
        self._out = out
        self._label = label
        self._total = total
        self._clock = clock
        self._started = self._told = clock()
        self._done = 0
        self._lock = threading.Lock()

    def update(self, done_bytes: int) -> None:
        """So many are done in all."""
        with self._lock:
            self._done = done_bytes
            now = self._clock()
            if now - self._told < LINE_SECONDS:
                return
            self._told = now
        share = 100 * done_bytes // self._total if self._total else 100
        rate = done_bytes / (now - self._started)
        left = f", {time_text((self._total - done_bytes) / rate)} left" if rate else ""
        text = (
            f"{self._label}: {share} %, {size_text(done_bytes)} of {size_text(self._total)}, {size_text(int(rate))}/s"
        )
        self._out.print(text + left)

    def end(self) -> None:
        """Nothing more will come."""
        seconds = self._clock() - self._started
        rate = size_text(int(self._done / seconds)) if seconds > 0 else size_text(self._done)
        self._out.print(f"{self._label}: {size_text(self._done)} in {time_text(seconds)}, {rate}/s")


@contextlib.contextmanager
def progress(
    label: str, total: int, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic
) -> Iterator[Meter]:
    """Show on stdout how far something of ``total`` bytes is; any thread may call ``update(done_bytes)``.

    ``quiet``: show nothing."""
    out = console(quiet=quiet)
    if out.is_terminal and not quiet:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
        )
        with Progress(*columns, TimeRemainingColumn(), console=out, transient=True) as screen:
            yield Bar(screen, label, total)
        return
    lines = Lines(out, label, total, clock)
    yield lines
    lines.end()


class Phases:
    """Shows one `progress` after the other, by the label that it is told."""

    def __init__(self, shown: contextlib.ExitStack, quiet: bool) -> None:
        self._shown = shown
        self._quiet = quiet
        self._label: str | None = None
        self._meter: Meter | None = None

    def __call__(self, label: str, done: int, total: int) -> None:
        """So many bytes of ``label`` are done."""
        if label != self._label or self._meter is None:
            self._shown.close()
            self._label = label
            self._meter = self._shown.enter_context(progress(label, total, quiet=self._quiet))
        self._meter.update(done)


@contextlib.contextmanager
def phases(*, quiet: bool = False) -> Iterator[Phases]:
    """A callback ``(label, done, total)`` that shows the progress of each label in turn."""
    with contextlib.ExitStack() as shown:
        yield Phases(shown, quiet)
