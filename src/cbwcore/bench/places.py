"""Devices for the cases: loop devices, a file system on one. All that is made is gone afterwards, on failure too."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cbwcore.bench.setting import SEED, BenchError, Files, NotHere, need, program, random_file

__all__ = ["Site", "ext4", "loop_device", "loop_site"]


class Site(NamedTuple):
    """A disk and a target, and how they are opened. ``device``, ``cache``: in words, for the report."""

    disk: Path
    target: Path
    size: int
    device: str
    direct: bool = False
    driver: str = "file"
    """QEMU's."""

    @property
    def cache(self) -> str:
        """The cache mode in words."""
        return "O_DIRECT" if self.direct else "buffered"

    @contextlib.contextmanager
    def descriptors(self) -> Iterator[tuple[int, int]]:
        """Plain ones, of disk and target, opened likewise."""
        flags = os.O_RDWR | (os.O_DIRECT if self.direct else 0)
        disk = os.open(self.disk, flags)
        try:
            target = os.open(self.target, flags)
            try:
                yield disk, target
            finally:
                os.close(target)
        finally:
            os.close(disk)

    @classmethod
    def of(cls, files: Files, device: str = "tmpfs") -> Site:
        """Plain files, buffered."""
        return cls(files.disk, files.target, files.size, device)


class Loop(NamedTuple):
    """A loop device. ``direct``: whether it goes around the page cache to its file."""

    path: Path
    direct: bool


@contextlib.contextmanager
def loop_device(backing: Path) -> Iterator[Loop]:
    """Over a file, with direct I/O to it where that works; NotHere without root or losetup."""
    if os.geteuid():
        raise NotHere("loop devices need root")
    need("losetup")
    path = Path(attach(backing))
    try:
        dio = Path(f"/sys/block/{path.name}/loop/dio")
        yield Loop(path, dio.exists() and dio.read_text().strip() == "1")
    finally:
        program("losetup", "--detach", path)


def attach(backing: Path) -> str:
    """The device's path."""
    try:
        return program("losetup", "--find", "--show", "--direct-io=on", backing).strip()
    except BenchError:
        try:
            return program("losetup", "--find", "--show", backing).strip()
        except BenchError as e:
            raise NotHere(f"no loop device: {e}") from e


@contextlib.contextmanager
def loop_site(place: Path, size: int) -> Iterator[Site]:
    """Disk and target are loop devices of random bytes, used with O_DIRECT."""
    with contextlib.ExitStack() as held:
        loops = []
        for name, seed in (("loop-disk", SEED + 1), ("loop-target", SEED + 2)):
            backing = place / name
            held.callback(backing.unlink, missing_ok=True)
            loops.append(held.enter_context(loop_device(random_file(backing, size, seed))))
        disk, target = loops
        yield Site(disk.path, target.path, size, f"loop device, direct I/O to its file {on(disk)}", True, "host_device")


def on(loop: Loop) -> str:
    """Whether it has direct I/O."""
    return "on" if loop.direct else "off"


@contextlib.contextmanager
def ext4(place: Path, size: int) -> Iterator[Site]:
    """Disk and target are files of random bytes on an ext4 of their own, on a loop device; buffered."""
    need("mkfs.ext4", "mount", "umount")
    backing, mounted = place / "ext4.img", place / "ext4"
    with contextlib.ExitStack() as held:
        held.callback(backing.unlink, missing_ok=True)
        with backing.open("wb") as f:
            f.truncate(2 * size + size // 4 + (64 << 20))
        loop = held.enter_context(loop_device(backing))
        program("mkfs.ext4", "-q", "-F", loop.path)
        mounted.mkdir()
        held.callback(mounted.rmdir)
        program("mount", loop.path, mounted)
        held.callback(program, "umount", mounted)
        files = Files.make(mounted, size)
        yield Site.of(files, f"ext4 on a loop device, direct I/O to its file {on(loop)}")
