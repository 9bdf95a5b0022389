"""A directory for what a command makes."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

__all__ = ["workspace"]


@contextlib.contextmanager
def workspace(prefix: str, parent: str | None) -> Iterator[Path]:
    """A temporary directory that is removed whatever happens, SIGTERM included."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as work:
            yield Path(work)
    finally:
        signal.signal(signal.SIGTERM, before)
