"""What the commands share in reading their command lines."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Iterator
from typing import NoReturn

from cbwcore.errors import CbwError, ConfigError

__all__ = ["Parser", "UsageError", "as_usage", "parse_seconds", "parse_size"]

UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
MAX_SIZE = 2**63 - 1


class UsageError(CbwError):
    """The command line asks for what cannot be; exit code 2."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose commands are Parsers too."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.splitlines())}; see {self.prog} --help\n")


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """A ConfigError inside is a UsageError: it is about the command line alone, and not about this machine."""
    try:
        yield
    except ConfigError as e:
        raise UsageError(str(e)) from e


def parse_size(text: str, least: int = 0) -> int:
    """Bytes, or with K, M, G or T for the units of 1024. argparse.ArgumentTypeError."""
    match = re.fullmatch(r"([0-9]+)([KMGT]?)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, with K, M, G or T if any unit")
    nbytes = int(match[1]) << UNITS[match[2]]
    if not least <= nbytes <= MAX_SIZE:
        raise argparse.ArgumentTypeError(f"{nbytes} bytes is not from {least} to {MAX_SIZE}")
    return nbytes


def parse_seconds(text: str) -> float:
    """A time above 0. argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value
