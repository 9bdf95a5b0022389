"""The errors of cbwcore.

::

    CbwError(Exception)
    ├── ConfigError(CbwError, ValueError)             option, range or geometry refused; nothing was changed
    ├── CopyBeforeWriteError(CbwError, OSError)       the guest write refused under break-guest-write
    ├── SnapshotBrokenError(CbwError, OSError)        EACCES; ``__cause__`` is the first failure
    ├── SnapshotAccessError(CbwError, OSError)        EACCES: outside the scope bitmap, or discarded
    ├── StateError(CbwError)                          a persistent state file is damaged, foreign or in use
    └── JobCancelledError(CbwError)                   the backup job was cancelled

Failures of the disk itself are plain ``OSError(errno, text, path)``; use after close is ``ValueError``.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CbwError",
    "ConfigError",
    "CopyBeforeWriteError",
    "JobCancelledError",
    "SnapshotAccessError",
    "SnapshotBrokenError",
    "StateError",
]


class CbwError(Exception):
    """Whatever cbwcore itself reports."""


class ConfigError(CbwError, ValueError):
    """An option, a range or a geometry was refused; nothing was opened or changed."""


class CopyBeforeWriteError(CbwError, OSError):
    """Old data could not be copied before a guest write.

    Raised to the guest under break-guest-write: the disk is unchanged, the snapshot as valid as before, and the next
    write to the same place tries again (R9). Under break-snapshot it is the snapshot's ``error``.

    ``errno`` is the cause's (ETIMEDOUT for ``cbw_timeout``), ``offset`` and ``length`` (bytes) the run that could not
    be copied or was waited for, ``operation`` one of "source-read", "target-write", "timeout", and ``time`` the moment
    of a snapshot's break in seconds since the epoch, else None.
    """

    def __init__(self, errno: int, text: str, operation: str, offset: int, length: int) -> None:
        super().__init__(errno, f"copy-before-write failed in {operation} at offset {offset}, length {length}: {text}")
        self._made_from = (errno, text, operation, offset, length)
        self.operation = operation
        self.offset = offset
        self.length = length
        self.time: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_from, {"time": self.time}


class SnapshotBrokenError(CbwError, OSError):
    """The snapshot is broken, now and for good. errno is EACCES, as in QEMU; ``__cause__`` is the first failure."""


class SnapshotAccessError(CbwError, OSError):
    """EACCES: the range is outside the scope bitmap, or was discarded."""


class StateError(CbwError):
    """A persistent state file is damaged, foreign or in use."""


class JobCancelledError(CbwError):
    """The backup job was cancelled: there is no image, and its bitmap has lost nothing."""
