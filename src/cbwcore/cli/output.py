"""What the commands share in printing facts."""

from __future__ import annotations

import json
import sys
from io import TextIOWrapper

import msgspec
from rich.console import Console

__all__ = ["console", "print_json", "size_text", "time_text"]


def console(*, quiet: bool = False) -> Console:
    """A console on stdout that takes text as it is; what its encoding lacks is printed escaped."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(quiet=quiet, markup=False, emoji=False, highlight=False)


def print_json(facts: msgspec.Struct, *, indent: int | None = 2) -> None:
    """One JSON document on stdout, in ASCII: a path that is no UTF-8 keeps its bytes as Python's surrogate escapes.

    ``indent`` None: in one line."""
    print(json.dumps(msgspec.to_builtins(facts), indent=indent))


def size_text(nbytes: int) -> str:
    """Bytes for people: exact where they are whole units, else to one decimal."""
    value, units = float(nbytes), ["TiB", "GiB", "MiB", "KiB", "bytes"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop()
    return f"{value:.0f} {units[-1]}" if value == int(value) else f"{value:.1f} {units[-1]}"


def time_text(seconds: float) -> str:
    """Seconds for people, to two or three digits."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        value = seconds * scale
        if value < 999.5:
            return f"{value:.1f} {unit}" if 0 < value < 9.95 else f"{value:.0f} {unit}"
    return f"{seconds:.1f} s"
