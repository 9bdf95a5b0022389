"""Holes (R11): what mkfs and a copy onto an all-hole disk cost the target."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cbwcore.bench.loads import BUFFERED_MODES, engine, every, floor, load, qemu_modes
from cbwcore.bench.places import Site, loop_device
from cbwcore.bench.results import Bound, Figures, Row, compared, show_size
from cbwcore.bench.rounds import Case, Run
from cbwcore.bench.servers import START_SECONDS, Server, here, serving, stop
from cbwcore.bench.setting import (
    CLUSTER,
    SEED,
    BenchError,
    Files,
    Item,
    NotHere,
    Section,
    Setting,
    find,
    missing,
    need,
    program,
    sparse_file,
)

__all__ = ["HOLES"]

DISK, COPY = 512 << 20, 140_000_000  # bytes
QUICK_DISK, QUICK_COPY = 128 << 20, 32_000_000
MOST = 1 << 20
PIECE = 1 << 20
SERVERS = ("qemu", "cbwcore")


def all_holes(own: Path, size: int) -> Files:
    """A sparse disk; and a target, sparse too."""
    files = Files(own / "disk", own / "target", size)
    for path in (files.disk, files.target):
        with path.open("wb") as f:
            f.truncate(size)
    return files


@contextlib.contextmanager
def fused(server: Server, mounted: Path) -> Iterator[Path]:
    """The server's disk as a file."""
    mounted.mkdir()
    process = subprocess.Popen(
        [find("nbdfuse") or "nbdfuse", str(mounted), server.uri("disk")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        path = mounted / "nbd"
        deadline = time.monotonic() + START_SECONDS
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise NotHere("nbdfuse cannot mount here")
            time.sleep(0.01)
        yield path
    finally:
        with contextlib.suppress(BenchError):
            program("umount", mounted)
        stop(process)
        mounted.rmdir()


def work(server: Server, place: Path, nbytes: int) -> None:
    """mkfs.ext4 on the server's disk, and a file of ``nbytes`` random bytes in it."""
    with contextlib.ExitStack() as held:
        loop = held.enter_context(loop_device(held.enter_context(fused(server, place / "fuse"))))
        program("mkfs.ext4", "-q", "-F", loop.path)
        mounted = place / "mounted"
        mounted.mkdir()
        held.callback(mounted.rmdir)
        program("mount", loop.path, mounted)
        held.callback(program, "umount", mounted)
        with (mounted / "copy").open("wb") as f:
            f.write(np.random.default_rng(SEED).bytes(nbytes))
            f.flush()
            os.fsync(f.fileno())


def holes(setting: Setting) -> Iterator[Row]:
    """Through cbwcore serve, and QEMU's daemon."""
    if os.geteuid():
        raise NotHere("loop devices and mounts need root")
    need("nbdfuse", "losetup", "mkfs.ext4", "mount", "umount")
    size, nbytes = setting.fewer(DISK, QUICK_DISK), setting.fewer(COPY, QUICK_COPY)
    space: dict[str, float] = {}
    place = setting.place / "holes"
    place.mkdir()

    @contextlib.contextmanager
    def case(kind: str) -> Iterator[Run]:
        with serving(kind, place, size, all_holes) as server:
            yield lambda: work(server, place, nbytes)
        space[kind] = (place / kind / "target").stat().st_blocks * 512
        for name in ("disk", "target"):
            (place / kind / name).unlink()

    seconds = setting.seconds({kind: (lambda kind=kind: case(kind)) for kind in here(*SERVERS)}, rounds=1)  # type: ignore[misc]
    what = f"mkfs.ext4 and a copy of {nbytes / 1e6:.0f} MB, all-hole disk of {size >> 20} MiB"
    for name, values, kind in (
        (f"{what}: space of the target", {k: [v] for k, v in space.items()}, "size"),
        (f"{what}: time", seconds, "time"),
    ):
        ours, peer = values["cbwcore"], values.get("qemu")
        bound = (Bound(ours[0], MOST, f"≤ {show_size(MOST)}", kind="size"),) if kind == "size" else ()
        yield Row(
            case=name,
            ours=Figures(tuple(ours), kind),
            peer=None if peer is None else Figures(tuple(peer), kind),
            over_peer=None if not peer or not peer[0] else ours[0] / peer[0],
            bounds=bound,
            note="" if peer else "not installed",
        )


# ---- first writes where the old data is zeroes ----


def zeroes(setting: Setting, old: str, target: str) -> Iterator[Row]:
    """4 KiB into each cluster of a disk that reads as zeroes, with a fresh disk in every run."""
    size = setting.size
    count = min(size // CLUSTER, setting.fewer(1024, 256))
    writes = load(every(CLUSTER, size, count), setting.data)

    def fresh(make: Callable[[Site], Case]) -> Case:
        @contextlib.contextmanager
        def case() -> Iterator[Run]:
            with contextlib.ExitStack() as held:
                disk = held.enter_context(sparse_file(setting.place / "old", size))
                if old == "zeroes":
                    fill_zeroes(disk, count * CLUSTER)
                where = setting.files.target
                if target == "sparse":
                    where = held.enter_context(sparse_file(setting.place / "new", size))
                yield held.enter_context(make(Site(disk, where, size, "tmpfs"))())

        return case

    modes = {mode: fresh(lambda s, mode=mode: qemu_modes(s, count, 1)[mode]) for mode in qemu_here()}  # type: ignore[misc]
    cases = {"floor": fresh(lambda s: floor(s, writes)), **modes, "cbwcore": fresh(lambda s: engine(s, writes))}
    seconds = setting.seconds(cases, ops=count)
    name = {"hole": "a hole", "zeroes": "allocated zeroes"}[old]
    case = f"first 4 KiB write into a cluster of {name}, {target} target"
    yield compared(case, seconds, peers=BUFFERED_MODES, no_peer="not installed")


def fill_zeroes(path: Path, nbytes: int) -> None:
    """Allocate the start of it."""
    with path.open("r+b") as f:
        for _ in range(0, nbytes, PIECE):
            f.write(bytes(min(PIECE, nbytes)))


def qemu_here() -> tuple[str, ...]:
    """Its modes, where it is installed."""
    return () if missing("qemu-img") else BUFFERED_MODES


HOLES = Section(
    "holes",
    "Holes: the target's space, and the time",
    (
        "client: a file system on a loop device over nbdfuse, unix socket, one run; of the first writes, the load "
        "generator, depth 1, 64 KiB clusters",
        "device: files on tmpfs; cache mode: buffered",
        "floor: the same loop over pread of the cluster, pwrite of it to the target, pwrite of the data; peer: "
        "qemu-storage-daemon, or `qemu-img bench`, with copy-before-write",
    ),
    (
        Item("mkfs-and-copy", holes),
        *(
            Item(f"{old}-{target}", functools.partial(zeroes, old=old, target=target))
            for old in ("hole", "zeroes")
            for target in ("sparse", "allocated")
        ),
    ),
)
