"""The I/O engines, and which one a file gets."""

from __future__ import annotations

import os

from cbwcore._cbwcore import io_uring_state
from cbwcore.errors import ConfigError

__all__ = ["ENGINES", "choose_engine"]

ENGINES = ("auto", "psync", "io_uring")


def choose_engine(io: str, *, direct: bool = False) -> tuple[str, str]:
    """The I/O engine for ``io``, and why; ConfigError where it is not one, or is not to be had here.

    "auto" is io_uring for O_DIRECT, where sleeping takes more time than the I/O, and psync for buffered files."""
    if io not in ENGINES:
        raise ConfigError(f"io {io!r} is not one of {', '.join(ENGINES)}")
    if io == "psync" or (io == "auto" and not direct):
        return "psync", "psync was asked for" if io == "psync" else "buffered files are as fast by plain system calls"
    built, error = io_uring_state()
    if not built:
        refused = "this build has no io_uring: liburing was not found"
    elif error:
        refused = f"the kernel allows no io_uring: {os.strerror(error)}"
    else:
        return "io_uring", "io_uring was asked for" if io == "io_uring" else "O_DIRECT is faster by io_uring"
    if io == "io_uring":
        raise ConfigError(f"io 'io_uring': {refused}")
    return "psync", refused
