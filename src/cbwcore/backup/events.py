"""A job's states and events, by the names that QEMU's jobs have."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from enum import StrEnum

import msgspec

__all__ = ["JobEvent", "JobStatus"]

MAX_ERRORS = 1000  # a job that ignores errors may meet any number of them: more are counted, not kept


class JobStatus(StrEnum):
    """created → running ⇄ paused → concluded; aborting comes before concluded where it failed or was cancelled."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    ABORTING = "aborting"
    CONCLUDED = "concluded"


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a job.

    ``event``: JOB_STATUS_CHANGE, BLOCK_JOB_ERROR, BLOCK_JOB_COMPLETED or BLOCK_JOB_CANCELLED. ``offset`` of ``len``
    bytes are done. Of an error: ``operation`` "read" or "write", ``action`` "report", "ignore" or "stop". ``error``:
    its text; that of BLOCK_JOB_COMPLETED is None after success. ``time``: seconds since the epoch."""

    event: str
    device: str
    time: float
    status: JobStatus
    offset: int
    len: int
    speed: int
    error: str | None = None
    operation: str | None = None
    action: str | None = None


class EventLog:
    """The events of a job, for any number of readers; each reads all of them, from the first on."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: list[JobEvent] = []
        self._closed = False
        self.errors = 0

    def add(self, event: JobEvent, *, last: bool = False) -> None:
        """Tell all readers; ``last``: none comes after it."""
        with self._changed:
            if event.event == "BLOCK_JOB_ERROR":
                self.errors += 1
                if self.errors > MAX_ERRORS:
                    return
            self._events.append(event)
            self._closed = last
            self._changed.notify_all()

    def read(self, timeout: float | None = None) -> Iterator[JobEvent]:
        """The events, waiting for those to come, until the last; or until none came for ``timeout`` seconds."""
        seen = 0
        while True:
            with self._changed:
                deadline = None if timeout is None else time.monotonic() + timeout
                while seen == len(self._events) and not self._closed:
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        return
                    self._changed.wait(left)
                if seen == len(self._events):
                    return
                event = self._events[seen]
            seen += 1
            yield event
