"""Backup jobs: beside what others copy with, under a guest's load and without; what they follow; the space that they
need."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import cbwcore
from cbwcore.bench.pull import PERCENTILES
from cbwcore.bench.results import Bound, Figures, Row, compared
from cbwcore.bench.rounds import Case, Run, Seconds, plainly, ratio
from cbwcore.bench.servers import Server, serving, stop
from cbwcore.bench.setting import (
    BLOCK,
    CLUSTER,
    SEED,
    BenchError,
    Files,
    Item,
    Section,
    Setting,
    find,
    missing,
    need,
    program,
    sparse_file,
)

__all__ = ["BACKUP"]

LARGER = 4  # times the size of the other benchmarks' disks
RATE = 2000  # a guest's writes a second
MOST_OF_CP = 1.3
MOST_OF_HELD = 0.6
LARGE_DISK, SMALL_DISK = 1 << 40, 1 << 30
PIECE = 4 << 20

Latency = dict[str, float]  # a percentile's name, seconds


def half_filled(path: Path, size: int, *, compressible: bool = False) -> Path:
    """Random bytes in every other piece of a disk; of a few values only where they are to be ``compressible``."""
    rng = np.random.default_rng(SEED)
    with path.open("wb") as f:
        f.truncate(size)
        for offset in range(0, size, 2 * PIECE):
            f.seek(offset)
            data = rng.integers(0, 16, PIECE, dtype=np.uint8).tobytes() if compressible else rng.bytes(PIECE)
            f.write(data[: size - offset])
    return path


@contextlib.contextmanager
def half_filled_disk(setting: Setting, *, compressible: bool = False, larger: int = LARGER) -> Iterator[Path]:
    """Gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="backup-", dir=setting.place) as own:
        yield half_filled(Path(own) / "disk", larger * setting.size, compressible=compressible)


def backed_up(disk: Path, image: Path, **options: object) -> Seconds:
    """Of a disk that nobody writes; the image is removed."""
    with cbwcore.Disk(disk) as source:
        began = time.perf_counter()
        source.backup(image, overwrite=True, **options).wait()  # type: ignore[arg-type]
        seconds = Seconds(time.perf_counter() - began)
    remove(image)
    return seconds


def remove(image: Path) -> None:
    """With its manifest, if it has one."""
    image.unlink(missing_ok=True)
    image.with_name(image.name + ".cbw.json").unlink(missing_ok=True)


def copied(*command: object) -> Seconds:
    """A program that makes an image, its last argument; the image is removed."""
    began = time.perf_counter()
    program(*command)
    seconds = Seconds(time.perf_counter() - began)
    remove(Path(str(command[-1])))
    return seconds


# ---- a full backup, raw ----


def without_load(setting: Setting) -> Iterator[Row]:
    """Beside cp, which finds zeroes, too, but neither hashes nor syncs."""
    with half_filled_disk(setting) as disk:
        image = disk.with_name("image")
        cases = {
            "floor": plainly(lambda: copied("cp", "--sparse=always", disk, image)),
            "cbwcore": plainly(lambda: backed_up(disk, image)),
        }
        seconds = setting.seconds(cases)
        yield compared(f"full, raw, {size_of(setting)}, no load", seconds, floor_max=MOST_OF_CP)


@contextlib.contextmanager
def guest(server: Server, size: int, waited: list[Latency]) -> Iterator[None]:
    """fio writes at its rate while the block runs; then how long its writes took goes to ``waited``."""
    command = (
        *("fio", "--name=x", "--ioengine=nbd", f"--uri={server.uri('disk')}", f"--bs={BLOCK}", "--rw=randwrite"),
        *("--output-format=json", f"--percentile_list={':'.join(PERCENTILES.values())}"),
        *(f"--size={size}", "--norandommap", "--time_based", "--runtime=600", "--iodepth=1", f"--rate_iops={RATE}"),
    )
    process = subprocess.Popen(
        [find("fio") or "fio", *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # it prints once, at its end, less than a pipe holds
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        written = server.written()
        while server.written() == written:  # it has begun
            if process.poll() is not None:
                raise BenchError("fio does not write")
            time.sleep(0.01)
        yield
        if process.poll() is not None:
            raise BenchError("fio ended before the backup did")
    finally:
        stop(process)
        with process.stdout:
            printed = process.stdout.read()
    told = json.loads(printed[printed.index(b"{") :])["jobs"][0]["write"]
    waited.append({name: told["clat_ns"]["percentile"][key] / 1e9 for name, key in PERCENTILES.items()})


@contextlib.contextmanager
def qemu_under_load(disk: Path, size: int, waited: list[Latency]) -> Iterator[Run]:
    """nbdcopy of the snapshot that QEMU's daemon has of the disk."""

    def files(own: Path, size: int) -> Files:
        target = own / "target"
        with target.open("wb") as f:
            f.truncate(size)
        return Files(disk, target, size)

    image = disk.with_name("image")
    with serving("qemu", disk.parent, size, files) as server, guest(server, size, waited):
        yield lambda: copied("nbdcopy", server.uri("snapshot"), image)
    (disk.parent / "qemu" / "target").unlink()


@contextlib.contextmanager
def cbwcore_under_load(disk: Path, size: int, waited: list[Latency]) -> Iterator[Run]:
    """A backup job in the process that serves the disk to its guest."""
    image, fleece = disk.with_name("image"), disk.with_name("fleece")
    with tempfile.TemporaryDirectory(prefix="cbw-") as name:
        sock = Path(name) / "socket"
        command = [sys.executable, "-m", "cbwcore.bench.backup_host", *map(os.fspath, (disk, fleece, sock))]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != b"ready\n":
                raise BenchError("the disk's host does not start")

            def run() -> Seconds:
                process.stdin.write(os.fsencode(image) + b"\n")  # type: ignore[union-attr]
                return Seconds(process.stdout.readline())  # type: ignore[union-attr]

            with guest(Server(process.pid, sock), size, waited):
                yield run
        finally:
            process.stdin.close()
            process.stdout.close()
            stop(process)
            remove(image)


def under_load(setting: Setting) -> Iterator[Row]:
    """Beside nbdcopy from QEMU's snapshot, with the same guest at both."""
    need("fio")
    size = LARGER * setting.size
    with half_filled_disk(setting) as disk:
        cases: dict[str, Case] = {}
        waited: dict[str, list[Latency]] = {"peer": [], "cbwcore": []}
        if not missing("qemu-storage-daemon", "nbdcopy"):
            cases["peer"] = lambda: qemu_under_load(disk, size, waited["peer"])
        cases["cbwcore"] = lambda: cbwcore_under_load(disk, size, waited["cbwcore"])
        seconds = setting.seconds(cases, rounds=setting.fewer(5, 2))
        what = f"full, raw, {size_of(setting)}, a guest's {RATE} writes a second"
        yield compared(what, seconds, peer_max=1.0, no_peer="not installed")
        for name in PERCENTILES:
            latencies = {case: [each[name] for each in waited[case]] for case in cases}
            yield compared(f"that guest's writes, {name}", latencies, no_peer="not installed")


def size_of(setting: Setting) -> str:
    """Of the disk, for people."""
    return f"{LARGER * setting.size >> 20} MiB half filled"


# ---- qcow2 ----


def compressed(setting: Setting) -> Iterator[Row]:
    """Beside qemu-img convert."""
    with half_filled_disk(setting, compressible=True, larger=1) as disk:
        image = disk.with_name("image.qcow2")
        convert = ("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd")
        cases = {}
        if not missing("qemu-img"):
            cases["peer"] = plainly(lambda: copied(*convert, disk, image))
        cases["cbwcore"] = plainly(lambda: backed_up(disk, image, compress="zstd"))
        seconds = setting.seconds(cases)
        what = f"full, qcow2 with zstd, {setting.size >> 20} MiB half filled, compressible"
        yield compared(what, seconds, peer_max=1.0, no_peer="not installed")


# ---- incremental ----


def incremental_seconds(setting: Setting, size: int, dirty: int) -> Seconds:
    """Of an incremental backup of ``dirty`` random clusters of a sparse disk."""
    rng = random.Random(SEED)
    with sparse_file(setting.place / "sparse", size) as path, cbwcore.Disk(path) as disk:
        full, image = setting.place / "full.qcow2", setting.place / "inc.qcow2"
        disk.backup(full, bitmap="b", overwrite=True).wait()
        for cluster in rng.sample(range(size // CLUSTER), dirty):
            disk.pwrite(setting.data, cluster * CLUSTER)
        began = time.perf_counter()
        disk.backup(image, sync="incremental", bitmap="b", backing=full, overwrite=True).wait()
        seconds = Seconds(time.perf_counter() - began)
    Path(f"{path}.cbw-bitmaps").unlink(missing_ok=True)
    remove(image)
    remove(full)
    return seconds


def incremental(setting: Setting) -> Iterator[Row]:
    """The same dirty bytes on a small and on a large disk; and twice as many."""
    few = setting.fewer(1000, 250)
    names = {"small": (SMALL_DISK, few), "large": (LARGE_DISK, few), "twice": (LARGE_DISK, 2 * few)}
    cases = {
        name: plainly(lambda size=size, dirty=dirty: incremental_seconds(setting, size, dirty))  # type: ignore[misc]
        for name, (size, dirty) in names.items()
    }
    seconds = setting.seconds(cases)
    for name, limit in (("small", None), ("large", 1.3), ("twice", 2.6)):
        size, dirty = names[name]
        over = ratio(seconds[name], seconds["small"])
        yield Row(
            case=f"incremental, {dirty} dirty clusters of a disk of {size >> 30} GiB (floor: the first)",
            ours=Figures(tuple(seconds[name])),
            floor=None if limit is None else Figures(tuple(seconds["small"])),
            over_floor=None if limit is None else over,
            bounds=() if limit is None else (Bound(over, limit, f"≤ {limit:g} × floor"),),
        )


def one_percent(setting: Setting) -> Iterator[Row]:
    """Of 1 TiB, as the bitmap has it; what was written there are zeroes, for want of room."""
    full, image = setting.place / "full.qcow2", setting.place / "inc.qcow2"
    with sparse_file(setting.place / "sparse", LARGE_DISK) as path, cbwcore.Disk(path) as disk:
        disk.backup(full, bitmap="b", overwrite=True).wait()
        for cluster in range(0, LARGE_DISK // CLUSTER, 100):
            disk.bitmaps["b"].set_range(cluster * CLUSTER, 1)
        began = time.perf_counter()
        result = disk.backup(image, sync="incremental", bitmap="b", backing=full, overwrite=True).wait()
        seconds = time.perf_counter() - began
    Path(f"{path}.cbw-bitmaps").unlink(missing_ok=True)
    remove(image)
    remove(full)
    assert result.manifest is not None
    what = f"incremental, 1 % of {LARGE_DISK >> 40} TiB dirty, all of it holes ({result.manifest.zero_bytes >> 30} GiB)"
    yield Row(case=what, ours=Figures((seconds,)))


# ---- the space for old data ----


class Writer(threading.Thread):
    """Uniform random writes, as many a second as asked for."""

    def __init__(self, disk: cbwcore.Disk, rate: float, data: bytes) -> None:
        super().__init__()
        self.writes = 0
        self._disk, self._rate, self._data = disk, rate, data
        self._end = threading.Event()

    def run(self) -> None:
        """Until stopped."""
        rng, began = random.Random(SEED), time.monotonic()
        while not self._end.wait(0.001):
            while self.writes < (time.monotonic() - began) * self._rate:
                self._disk.pwrite(self._data, BLOCK * rng.randrange(self._disk.size // BLOCK))
                self.writes += 1

    def stop(self) -> None:
        """And wait for it."""
        self._end.set()
        self.join()


def space(setting: Setting) -> Iterator[Row]:
    """Of a job, and of a snapshot of the same T0 that is held as long as the job runs."""
    seconds = setting.fewer(6, 2)
    size = setting.size
    clusters = size // CLUSTER
    disk = cbwcore.Disk(setting.files.disk)
    with disk, disk.snapshot(setting.place / "held") as held:
        job = disk.backup(setting.place / "image", speed=size // seconds, fleece=setting.place / "fleece")
        writer = Writer(disk, clusters / seconds, setting.data)
        writer.start()
        try:
            result = job.wait()
        finally:
            writer.stop()
        held_bytes = held.stats().target_bytes
    remove(setting.place / "image")
    (setting.place / "held").unlink()
    if writer.writes < clusters / 4:
        raise BenchError(f"{writer.writes} writes are too few")
    over = result.fleece_peak / held_bytes
    what = f"peak space for old data, {size >> 20} MiB, {writer.writes} uniform writes (floor: a snapshot held)"
    yield Row(
        case=what,
        ours=Figures((float(result.fleece_peak),), "size"),
        floor=Figures((float(held_bytes),), "size"),
        over_floor=over,
        bounds=(Bound(over, MOST_OF_HELD, f"≤ {MOST_OF_HELD:g} × floor"),),
    )


BACKUP = Section(
    "backup",
    "Backup jobs",
    (
        "client: `Disk.backup` with two workers, from T0 to the synced and renamed image, SHA-256 included; under load "
        f"beside fio's nbd engine, random 4 KiB writes, depth 1, {RATE} a second, on a unix socket",
        "device: files on tmpfs; cache mode: buffered",
        "floor: `cp --sparse=always`, without load; peer: nbdcopy of the snapshot of qemu-storage-daemon's "
        "copy-before-write, or `qemu-img convert -c -o compression_type=zstd`",
    ),
    (
        Item("full-without-load", without_load),
        Item("full-under-load", under_load),
        Item("qcow2-zstd", compressed),
        Item("incremental", incremental),
        Item("one-percent", one_percent, quick=False),
        Item("space", space),
    ),
)
