"""Where the cases run: the directory for their files, the size of their disks, the rounds; and what a section is."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from cbwcore.bench.results import Plot, Row
from cbwcore.bench.rounds import Case, Pedantic, in_turn, interleave
from cbwcore.errors import CbwError, ConfigError

__all__ = [
    "BLOCK",
    "CLUSTER",
    "ROOM",
    "SEED",
    "BenchError",
    "Files",
    "Item",
    "NotHere",
    "Section",
    "Setting",
    "missing",
    "program",
    "random_file",
]

SEED = 20240229
BLOCK = 4096  # bytes of one request
CLUSTER = 65536
ROOM = 8  # times the size of a disk, that all files at a time may take
FULL_SIZE, QUICK_SIZE = 1 << 30, 128 << 20
FULL_ROUNDS, QUICK_ROUNDS = 5, 3
PIECE = 64 << 20
SBIN = "/usr/sbin:/sbin"

T = TypeVar("T")


class NotHere(Exception):  # noqa: N818 - it is no error
    """A case cannot run on this machine; why."""


class BenchError(CbwError):
    """A program of a benchmark failed, or a run did not do what it was to measure."""


class Item(NamedTuple):
    """One case of a section; it yields rows, and notes. ``quick``: whether the quick run has it."""

    name: str
    run: Callable[[Setting], Iterable[Row | str]]
    quick: bool = True


class Section(NamedTuple):
    """A table, and the plots of its points. ``conditions``: client, depth, device and cache mode."""

    name: str
    title: str
    conditions: tuple[str, ...]
    items: tuple[Item, ...]
    plots: tuple[Plot, ...] = ()


class Files(NamedTuple):
    """A disk of random bytes and a target of its size, all allocated."""

    disk: Path
    target: Path
    size: int

    @classmethod
    def make(cls, place: Path, size: int) -> Files:
        """The same bytes in every run."""
        disk, target = random_file(place / "disk", size, SEED + 1), random_file(place / "target", size, SEED + 2)
        return cls(disk, target, size)


class Setting:
    """Of a run of benchmarks. ``place``: an empty directory, best on tmpfs; ``size``: bytes of a disk, whole MiB.

    ConfigError where there is no room."""

    def __init__(self, place: Path, *, size: int | None = None, rounds: int | None = None, quick: bool = False) -> None:
        self.place = place
        self.size = size or (QUICK_SIZE if quick else FULL_SIZE)
        self.rounds = rounds or (QUICK_ROUNDS if quick else FULL_ROUNDS)
        self.quick = quick
        self.pedantic: Pedantic = in_turn
        self.data = np.random.default_rng(SEED).bytes(BLOCK)
        self._always = contextlib.ExitStack()
        self._section = contextlib.ExitStack()
        self._things: dict[str, object] = {}
        self._files: Files | None = None
        free, needed = shutil.disk_usage(place).free, ROOM * self.size + (64 << 20)
        if free < needed:
            raise ConfigError(f"{place} has {free >> 20} MiB free, the benchmarks need {needed >> 20}")

    @property
    def files(self) -> Files:
        """On ``place``, made once."""
        if self._files is None:
            self._files = Files.make(self.place, self.size)
        return self._files

    def kept(self, name: str, make: Callable[[], contextlib.AbstractContextManager[T]]) -> T:
        """What ``make`` makes, once, until the section ends."""
        if name not in self._things:
            self._things[name] = self._section.enter_context(make())
        return self._things[name]  # type: ignore[return-value]

    def end_section(self) -> None:
        """Take down what was kept."""
        self._things.clear()
        self._section.close()

    def seconds(self, cases: dict[str, Case], *, ops: int = 1, rounds: int | None = None) -> dict[str, list[float]]:
        """Of one of ``ops`` operations, of every case, in every round."""
        taken = interleave(cases, rounds or self.rounds, self.pedantic)
        return {name: [value / ops for value in values] for name, values in taken.items()}

    def fewer(self, full: int, quick: int) -> int:
        """Of rounds or the like, what this run can afford."""
        return quick if self.quick else full


def random_file(path: Path, size: int, seed: int) -> Path:
    """``size`` bytes, all allocated."""
    generator = np.random.default_rng(seed)
    with path.open("wb") as f:
        for start in range(0, size, PIECE):
            f.write(generator.bytes(min(PIECE, size - start)))
    return path


def scattered(count: int, span: int, step: int = BLOCK) -> list[int]:
    """``count`` random multiples of ``step`` in the first ``span`` bytes, some of them twice; the same in every run."""
    return [step * k for k in random.Random(SEED).choices(range(span // step), k=count)]


def missing(*names: str) -> list[str]:
    """Which of these programs are not installed."""
    return [name for name in names if find(name) is None]


def find(name: str) -> str | None:
    """A program's path."""
    return shutil.which(name) or shutil.which(name, path=SBIN)


def need(*names: str) -> None:
    """NotHere, where one of these programs is not installed."""
    lacking = missing(*names)
    if lacking:
        raise NotHere(f"not installed: {', '.join(lacking)}")


def program(*command: object, timeout: float = 300) -> str:
    """Run a program to its end; what it printed. BenchError where it fails."""
    words = [str(word) for word in command]
    words[0] = find(words[0]) or words[0]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{' '.join(words)} hangs") from None
    if done.returncode:
        raise BenchError(f"{' '.join(words)}: {one_line(done.stdout + done.stderr) or f'exit {done.returncode}'}")
    return done.stdout


def one_line(text: str) -> str:
    """The end of what a program said."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())[-400:]


def each(names: Sequence[T], make: Callable[[T], Item]) -> tuple[Item, ...]:
    """Items of one kind."""
    return tuple(make(name) for name in names)


@contextlib.contextmanager
def sparse_file(path: Path, size: int) -> Iterator[Path]:
    """A hole of ``size`` bytes, gone afterwards."""
    with path.open("wb") as f:
        f.truncate(size)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
