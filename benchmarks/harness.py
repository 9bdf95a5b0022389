"""What the benchmarks share: rounds that interleave the cases, the table, the first write's cases, the floor in C."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import shutil
import statistics
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cbwcore

QUICK = os.environ.get("CBWCORE_BENCH_QUICK", "") not in ("", "0")
SIZE = int(os.environ.get("CBWCORE_BENCH_SIZE", 128 << 20 if QUICK else 1 << 30))
ROUNDS = int(os.environ.get("CBWCORE_BENCH_ROUNDS", 3 if QUICK else 7))
SEED = 20240229


class Seconds(float):
    """What a run measured itself."""


# A case sets its files up, gives the function that is timed, and cleans up. The function returns Seconds where it
# knows them better (the floor, the peer), else anything.
Run = Callable[[], object]
Case = Callable[[], contextlib.AbstractContextManager[Run]]


# ---- rounds ----


def timed(run: Run) -> float:
    """Seconds that ``run`` took."""
    started = time.perf_counter()
    own = run()
    return own if isinstance(own, Seconds) else time.perf_counter() - started


def plainly(run: Run) -> Case:
    """A case with nothing to set up."""
    return lambda: contextlib.nullcontext(run)


def interleave(benchmark: Any, cases: dict[str, Case], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of every case in every round, A B C A B C. The last one is what pytest-benchmark reports."""
    *others, last = cases
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with contextlib.ExitStack() as held:

        def setup() -> tuple[tuple[Run], dict[str, Any]]:
            held.close()
            for name in others:
                with cases[name]() as run:
                    seconds[name].append(timed(run))
            return (held.enter_context(cases[last]()),), {}

        benchmark.pedantic(lambda run: seconds[last].append(timed(run)), setup=setup, rounds=rounds)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios: a slow spell of the machine takes both sides of its round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# ---- the table ----


def show_time(seconds: float) -> str:
    """With three digits, in the unit that fits."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def show_size(count: float) -> str:
    """Of memory."""
    return f"{count / (1 << 20):.1f} MiB"


def spread(values: Sequence[float], show: Callable[[float], str] = show_time) -> str:
    """Median, least and most; of speeds: fastest and slowest."""
    return f"{show(statistics.median(values))} ({show(min(values))}–{show(max(values))})"


class Bound(NamedTuple):
    """One promise: ``value`` is at most (or ``at_least``) ``limit``; ``floor``: the floor's value, if any."""

    value: float
    limit: float
    text: str
    at_least: bool = False
    floor: float | None = None

    def met_by(self, value: float) -> bool:
        """Whether ``value`` would keep it."""
        return value >= self.limit if self.at_least else value <= self.limit

    def verdict(self) -> str:
        """Of a miss it is told where not even the floor got there."""
        if self.met_by(self.value):
            return "yes"
        if self.floor is None or self.met_by(self.floor):
            return "MISSED"
        return f"MISSED, by the floor too ({self.floor:.2f})"


class Row(NamedTuple):
    """One line of the table; ratios are cbwcore's time over the other's."""

    case: str
    ours: str
    floor: str = "–"
    over_floor: str = "–"
    peer: str = "–"
    over_peer: str = "–"
    bounds: tuple[Bound, ...] = ()

    def cells(self) -> tuple[str, ...]:
        """A bound that is missed is told, and fails nothing."""
        texts = "; ".join(bound.text for bound in self.bounds) or "–"
        met = "; ".join(bound.verdict() for bound in self.bounds) or "–"
        return (*self[:-1], texts, met)


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """The table, line by line, aligned."""
    table = [("case", "cbwcore", "floor", "ratio", "peer", "ratio", "bound", "met?"), *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, tuple("-" * width for width in widths))
    for cells in table:
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def compare(
    benchmark: Any,
    case: str,
    *,
    ours: Case,
    floor: Case,
    peer: Case | None = None,
    ops: int = 1,
    rounds: int = ROUNDS,
    show: Callable[[float], str] = show_time,
    floor_max: float | None = None,
    peer_max: float | None = None,
    no_peer: str = "–",
) -> Row:
    """Ours beside a floor and a peer, ``ops`` operations in a run; the figures go into extra_info, too."""
    cases = {"floor": floor} | ({"peer": peer} if peer else {}) | {"cbwcore": ours}
    seconds = interleave(benchmark, cases, rounds)
    times = {name: [value / ops for value in values] for name, values in seconds.items()}
    ratios = {name: ratio(times["cbwcore"], times[name]) for name in cases if name != "cbwcore"}
    benchmark.extra_info |= {"case": case, "operations": ops, "seconds": times, "ratios": ratios}
    bounds = []
    if floor_max:
        bounds.append(Bound(ratios["floor"], floor_max, f"≤ {floor_max:g} × floor"))
    if peer and peer_max:
        text = f"≤ {peer_max:g} × peer"
        bounds.append(Bound(ratios["peer"], peer_max, text, floor=ratio(times["floor"], times["peer"])))
    return Row(
        case,
        spread(times["cbwcore"], show),
        spread(times["floor"], show),
        f"{ratios['floor']:.2f}",
        spread(times["peer"], show) if peer else no_peer,
        f"{ratios['peer']:.2f}" if peer else "–",
        tuple(bounds),
    )


# ---- files ----


@contextlib.contextmanager
def descriptor(path: Path) -> Iterator[int]:
    """A plain descriptor."""
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def random_file(path: Path, seed: int) -> Path:
    """SIZE bytes, all allocated."""
    generator = np.random.default_rng(seed)
    piece = 64 << 20
    with path.open("wb") as f:
        for start in range(0, SIZE, piece):
            f.write(generator.bytes(min(piece, SIZE - start)))
    return path


class Files(NamedTuple):
    """A disk of random bytes and a target of its size; 4 KiB to write."""

    disk: Path
    target: Path
    data: bytes

    @classmethod
    def make(cls, place: Path) -> Files:
        """The same bytes in every run."""
        data = np.random.default_rng(SEED).bytes(4096)
        return cls(random_file(place / "disk", SEED + 1), random_file(place / "target", SEED + 2), data)


def offsets_of(step: int, most: int | None = None) -> range:
    """Of every cluster of ``step`` bytes, or of the first ``most``."""
    return range(0, SIZE if most is None else min(SIZE, most * step), step)


def scattered(count: int, span: int = SIZE) -> list[int]:
    """``count`` random offsets of 4 KiB within the first ``span`` bytes; the same in every run."""
    return [4096 * k for k in random.Random(SEED).choices(range(min(span, SIZE) // 4096), k=count)]


def write_all(disk: cbwcore.Disk, data: bytes, offsets: Sequence[int]) -> None:
    """A guest: one write after the other."""
    pwrite = disk.pwrite
    for offset in offsets:
        pwrite(data, offset)


# ---- the first write into each of the first ``most`` clusters: ours, the floor's, the peer's ----


def ours_first(files: Files, cluster: int, most: int, threads: int = 1) -> Case:
    """Through a fresh snapshot, from Python."""
    offsets = offsets_of(cluster, most)
    parts = [offsets[len(offsets) * i // threads : len(offsets) * (i + 1) // threads] for i in range(threads)]

    @contextlib.contextmanager
    def case() -> Iterator[Run]:
        with cbwcore.Disk(files.disk) as disk, disk.snapshot(files.target, cluster_size=cluster) as snapshot:

            def run() -> None:
                helpers = [threading.Thread(target=write_all, args=(disk, files.data, part)) for part in parts[1:]]
                for helper in helpers:
                    helper.start()
                write_all(disk, files.data, parts[0])
                for helper in helpers:
                    helper.join()

            yield run
            assert snapshot.stats().cbw_bytes == len(offsets) * cluster

    return case


def floor_first(files: Files, floor: Floor, cluster: int, most: int, threads: int = 1) -> Case:
    """pread of the cluster, pwrite of it, pwrite of 4 KiB, in C."""
    clusters = len(offsets_of(cluster, most))

    @contextlib.contextmanager
    def case() -> Iterator[Run]:
        with descriptor(files.disk) as disk, descriptor(files.target) as target:
            yield lambda: floor.first_writes(disk, target, clusters, cluster, files.data, len(files.data), threads)

    return case


def peer_first(files: Files, most: int) -> Case | None:
    """QEMU's copy-before-write filter under qemu-img bench, at depth 1, 64 KiB clusters; None where there is none."""
    if shutil.which("qemu-img") is None:
        return None
    image = (
        f"driver=copy-before-write,file.driver=file,file.filename={files.disk},"
        f"target.driver=file,target.filename={files.target}"
    )
    options = f"-w -c {len(offsets_of(65536, most))} -d 1 -s 4096 -S 65536 -t writeback --image-opts"
    command = ["qemu-img", "bench", *options.split(), image]

    def bench() -> Seconds:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"Run completed in ([0-9.]+) seconds", done.stdout)
        if done.returncode or found is None:
            raise RuntimeError(f"qemu-img bench: {done.stdout}{done.stderr}")
        return Seconds(found[1])

    return plainly(bench)


class Floor:
    """floor.c, compiled into ``place``; its functions in seconds."""

    def __init__(self, place: Path) -> None:
        compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
        library = place / "floor.so"
        options = ["-O3", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread", "-o"]
        subprocess.run([*compiler.split(), *options, library, Path(__file__).with_name("floor.c")], check=True)
        u64, i64 = ctypes.c_uint64, ctypes.c_int64
        self._lib = ctypes.CDLL(os.fspath(library))
        for name, arguments in {
            "first_writes": (ctypes.c_int, ctypes.c_int, u64, u64, ctypes.c_char_p, u64, u64),
            "plain_writes": (ctypes.c_int, ctypes.c_void_p, u64, ctypes.c_char_p, u64),
            "read_words": (ctypes.c_void_p, u64, ctypes.POINTER(u64)),
        }.items():
            function = getattr(self._lib, name)
            function.argtypes, function.restype = arguments, i64

    def first_writes(
        self, disk: int, target: int, clusters: int, cluster: int, data: bytes, length: int, threads: int
    ) -> Seconds:
        """Of ``length`` bytes into each cluster."""
        return self._seconds(self._lib.first_writes(disk, target, clusters, cluster, data, length, threads))

    def plain_writes(self, fd: int, offsets: Sequence[int], data: bytes) -> Seconds:
        """One pwrite after the other."""
        raw = np.array(offsets, dtype=np.uint64)
        return self._seconds(self._lib.plain_writes(fd, raw.ctypes.data, len(raw), data, len(data)))

    def read_words(self, words: np.ndarray) -> Seconds:
        """A plain read of 64-bit words."""
        seen = ctypes.c_uint64()
        return self._seconds(self._lib.read_words(words.ctypes.data, len(words), ctypes.byref(seen)))

    @staticmethod
    def _seconds(ns: int) -> Seconds:
        if ns < 0:
            raise OSError(-ns, os.strerror(-ns))
        return Seconds(ns / 1e9)
