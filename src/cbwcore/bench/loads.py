"""Cases of the write path: ours by the load generator or from Python, the floor in C, QEMU's filter."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cbwcore._cbwcore import Load
from cbwcore.bench.places import Site
from cbwcore.bench.rounds import Case, Run, Seconds, plainly
from cbwcore.bench.setting import BLOCK, CLUSTER, BenchError, missing, program
from cbwcore.disk import Disk

__all__ = [
    "BUFFERED_MODES",
    "MODES",
    "engine",
    "every",
    "floor",
    "from_python",
    "load",
    "os_pwrite",
    "qemu",
    "qemu_modes",
]

QEMU = "qemu-img"
PATTERN = 0x5A
MODES = ("aio=threads", "aio=native", "aio=io_uring")
BUFFERED_MODES = ("aio=threads", "aio=io_uring")  # native needs O_DIRECT


def every(step: int, span: int, most: int | None = None) -> range:
    """Offsets: of every ``step`` bytes of ``span``, or of the first ``most``."""
    return range(0, span if most is None else min(span, most * step), step)


def load(
    offsets: Sequence[int], data: bytes, threads: int = 1, *, sliced: bool = False, latencies: np.ndarray | None = None
) -> Load:
    """Writes of ``data``."""
    return Load(np.array(offsets, dtype=np.uint64), data, threads=threads, sliced=sliced, latencies=latencies)


def nanoseconds(ns: int) -> Seconds:
    """As Seconds."""
    return Seconds(ns / 1e9)


# ---- ours ----


def engine(
    site: Site,
    writes: Load,
    *,
    cluster: int = CLUSTER,
    io: str = "auto",
    before: Load | None = None,
    copied: int | None = None,
) -> Case:
    """Through a fresh snapshot; ``before`` is written first, untimed. ``copied``: bytes copied in all, afterwards."""

    @contextlib.contextmanager
    def case() -> Iterator[Run]:
        with (
            Disk(site.disk, direct=site.direct, io=io) as disk,
            disk.snapshot(site.target, cluster_size=cluster) as snapshot,
        ):
            if before is not None:
                before.on_disk(disk)
            yield lambda: nanoseconds(writes.on_disk(disk))
            check(snapshot.stats().cbw_bytes, copied)

    return case


def check(found: int, wanted: int | None) -> None:
    """BenchError where it was not copy-before-write that was measured."""
    if wanted is not None and found != wanted:
        raise BenchError(f"{found} bytes were copied, not {wanted}")


def write_all(disk: Disk, data: bytes, offsets: Sequence[int]) -> None:
    """A guest in Python: one write after the other."""
    pwrite = disk.pwrite
    for offset in offsets:
        pwrite(data, offset)


def from_python(
    site: Site,
    offsets: Sequence[int],
    data: bytes,
    threads: int = 1,
    *,
    snapshot: bool = True,
    before: Load | None = None,
    copied: int | None = None,
) -> Case:
    """disk.pwrite in Python threads, each with its own part of the offsets; with a fresh snapshot, or without any."""
    parts = [offsets[len(offsets) * i // threads : len(offsets) * (i + 1) // threads] for i in range(threads)]

    @contextlib.contextmanager
    def case() -> Iterator[Run]:
        with contextlib.ExitStack() as held:
            disk = held.enter_context(Disk(site.disk, direct=site.direct))
            taken = held.enter_context(disk.snapshot(site.target)) if snapshot else None
            if before is not None:
                before.on_disk(disk)

            def run() -> None:
                helpers = [threading.Thread(target=write_all, args=(disk, data, part)) for part in parts[1:]]
                for helper in helpers:
                    helper.start()
                write_all(disk, data, parts[0])
                for helper in helpers:
                    helper.join()

            yield run
            if taken is not None:
                check(taken.stats().cbw_bytes, copied)

    return case


# ---- the floor ----


def floor(site: Site, writes: Load, *, cluster: int = CLUSTER, copies: bool = True) -> Case:
    """pread of the cluster, pwrite of it, pwrite of the data, or, without ``copies``, this alone; in C."""

    @contextlib.contextmanager
    def case() -> Iterator[Run]:
        with site.descriptors() as (disk, target):
            yield lambda: nanoseconds(writes.on_files(disk, [target] if copies else [], cluster=cluster))

    return case


def os_pwrite(site: Site, offsets: Sequence[int], data: bytes) -> Case:
    """os.pwrite, called from Python."""

    @contextlib.contextmanager
    def case() -> Iterator[Run]:
        with site.descriptors() as (fd, _):

            def run(pwrite=os.pwrite) -> None:  # type: ignore[no-untyped-def]
                for offset in offsets:
                    pwrite(fd, data, offset)

            yield run

    return case


# ---- the peer ----


def qemu(site: Site, count: int, depth: int, *, length: int = BLOCK, step: int = CLUSTER, aio: str = "threads") -> Case:
    """qemu-img bench over QEMU's copy-before-write filter, whose clusters are of 64 KiB."""

    def node(name: str, path: Path) -> str:
        direct = f",{name}.cache.direct=on,{name}.aio={aio}" if site.direct else f",{name}.aio={aio}"
        return f"{name}.driver={site.driver},{name}.filename={path}{direct}"

    image = f"driver=copy-before-write,{node('file', site.disk)},{node('target', site.target)}"
    cache = "none" if site.direct else "writeback"
    # By default it writes zeroes, and the runs that come next would meet a disk of another kind.
    options = f"-w -c {count} -d {depth} -s {length} -S {step} --pattern={PATTERN} -t {cache} --image-opts"

    def bench() -> Seconds:
        printed = program(QEMU, "bench", *options.split(), image)
        found = re.search(r"Run completed in ([0-9.]+) seconds", printed)
        if found is None:
            raise BenchError(f"{QEMU} bench: {printed}")
        return Seconds(found[1])

    return plainly(bench)


def qemu_modes(site: Site, count: int, depth: int, *, length: int = BLOCK, step: int = CLUSTER) -> dict[str, Case]:
    """Each way of I/O that QEMU has there, by its name; none where it is not installed."""
    if missing(QEMU):
        return {}
    modes = MODES if site.direct else BUFFERED_MODES
    return {mode: qemu(site, count, depth, length=length, step=step, aio=mode.removeprefix("aio=")) for mode in modes}
