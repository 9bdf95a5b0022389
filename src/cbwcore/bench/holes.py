"""Holes (R11): what mkfs and a copy onto an all-hole disk cost the target."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cbwcore.bench.places import loop_device
from cbwcore.bench.results import Bound, Figures, Row, show_size
from cbwcore.bench.rounds import Run
from cbwcore.bench.servers import START_SECONDS, Server, here, serving, stop
from cbwcore.bench.setting import SEED, BenchError, Files, Item, NotHere, Section, Setting, find, need, program

__all__ = ["HOLES"]

DISK, COPY = 512 << 20, 140_000_000  # bytes
QUICK_DISK, QUICK_COPY = 128 << 20, 32_000_000
MOST = 1 << 20
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


HOLES = Section(
    "holes",
    "Holes: the target's space",
    (
        "client: a file system on a loop device over nbdfuse, unix socket; one run",
        "device: sparse files on tmpfs; cache mode: buffered",
        "peer: qemu-storage-daemon with copy-before-write",
    ),
    (Item("mkfs-and-copy", holes),),
)
