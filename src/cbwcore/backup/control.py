"""What holds a job's workers up: a pause, a speed limit, and the end."""

from __future__ import annotations

import threading
import time

__all__ = ["Control", "StopWorking"]

LONGEST_WAIT = 3600.0  # seconds at a time: far longer ones are refused by the clock


class StopWorking(Exception):  # noqa: N818 - no error: the job was cancelled, or failed in another thread
    """Raised in a worker that is to end."""


class Control:
    """One for the workers of a job; they call `enter` before a span of work and `leave` after it."""

    def __init__(self, speed: int) -> None:
        self._changed = threading.Condition()
        self._speed = speed
        self._free_at = 0.0  # when the bytes that were let through are paid for, by the speed
        self._paused = False
        self._stopped = False
        self._active = 0  # workers inside

    @property
    def speed(self) -> int:
        """Bytes a second, 0: no limit."""
        return self._speed

    @speed.setter
    def speed(self, value: int) -> None:
        with self._changed:
            self._speed = value
            self._free_at = 0.0  # who waited by the old speed begins anew
            self._changed.notify_all()

    @property
    def paused(self) -> bool:
        """Whether nobody is at work, and will not be before `resume`."""
        return self._paused and not self._active

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def pause(self) -> None:
        """Let no worker enter; those inside finish their span."""
        with self._changed:
            self._paused = True

    def resume(self) -> bool:
        """Let workers in again; whether that was a change."""
        with self._changed:
            was, self._paused = self._paused, False
            self._changed.notify_all()
        return was

    def stop(self) -> None:
        """From here on `enter` and `sleep` raise StopWorking."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def enter(self, nbytes: int) -> None:
        """Wait until a span of ``nbytes`` may be worked on. StopWorking."""
        with self._changed:
            while True:
                self._check()
                now = time.monotonic()
                if not self._paused and (not self._speed or now >= self._free_at):
                    break
                self._changed.wait(None if self._paused else min(self._free_at - now, LONGEST_WAIT))
            if self._speed:
                self._free_at = max(now, self._free_at) + nbytes / self._speed
            self._active += 1

    def leave(self) -> bool:
        """The span is done with; whether it was the last one before a pause."""
        with self._changed:
            self._active -= 1
            return self._paused and not self._active

    def sleep(self, seconds: float) -> None:
        """Not for longer than until the end. StopWorking."""
        with self._changed:
            self._check()
            self._changed.wait(seconds)
            self._check()

    def _check(self) -> None:
        if self._stopped:
            raise StopWorking
