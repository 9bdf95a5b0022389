"""Restoring a disk from a backup, and verifying backups."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
import numpy as np

from cbwcore._cbwcore import zero_units
from cbwcore.errors import StateError
from cbwcore.images.chain import NOBODY, Chain, open_chain, pieces_of
from cbwcore.images.digest import UNIT, Piece
from cbwcore.images.fileio import named
from cbwcore.images.kinds import ABSENT, PIECE, WINDOW, Run, runs
from cbwcore.images.manifest import manifest_path
from cbwcore.images.partial import PartialFile
from cbwcore.images.raw_output import RawDevice, RawFile
from cbwcore.images.raw_reader import RawReader
from cbwcore.images.target import check_apart, is_device_at, open_device
from cbwcore.images.workers import work_through

__all__ = ["CheckedImage", "RestoreResult", "VerifyResult", "restore", "verify_backup"]

Path = str | os.PathLike[str]
Progress = Callable[[str, int, int], object]
"""Called with what is being done ("check", "restore", "verify"), the bytes done, the bytes in all; by one thread at a
time."""


class CheckedImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image whose content is what was written; ``created`` is its T0."""

    id: str
    path: str
    created: str
    sync: str
    data_bytes: int
    sha256: str


class VerifyResult(msgspec.Struct, frozen=True, kw_only=True):
    """What `verify_backup` found: the chain, from ``image`` down. ``size``: bytes of the disk; ``complete``: it can be
    restored, for the chain ends with a full backup."""

    image: str
    size: int
    complete: bool
    chain: list[CheckedImage]
    seconds: float


class RestoreResult(msgspec.Struct, frozen=True, kw_only=True):
    """What `restore` did. ``data_bytes``: bytes that were written; the others of ``size`` are zeroes. ``verified``: the
    destination was read back."""

    image: str
    destination: str
    size: int
    data_bytes: int
    verified: bool
    chain: list[CheckedImage]
    seconds: float


class Meter:
    """Adds up what several threads did, and tells of it."""

    def __init__(self, progress: Progress | None, label: str, total: int) -> None:
        self.done = 0
        self._progress = progress
        self._label = label
        self._total = total
        self._lock = threading.Lock()
        self.add(0)

    def add(self, nbytes: int) -> None:
        """So much more is done."""
        with self._lock:
            self.done += nbytes
            if self._progress is not None:
                self._progress(self._label, min(self.done, self._total), self._total)


def verify_backup(image: Path, *, manifest: Path | None = None, progress: Progress | None = None) -> VerifyResult:
    """Read a backup and all its parents and compare them with their manifests.

    ``manifest``: where the backup's own is, if not beside it. StateError, naming the file that is missing, changed or
    damaged; OSError."""
    started = time.monotonic()
    with open_chain(image, manifest) as chain:
        check(chain, progress)
        return VerifyResult(
            image=os.fsdecode(image),
            size=chain.size,
            complete=chain.complete,
            chain=checked(chain),
            seconds=time.monotonic() - started,
        )


def restore(
    image: Path,
    destination: Path,
    *,
    verify: bool = False,
    overwrite: bool = False,
    manifest: Path | None = None,
    progress: Progress | None = None,
) -> RestoreResult:
    """Write the disk as it was at the T0 of a backup to a new sparse file, or to a block device.

    The whole chain is checked before the first byte is written. A file gets its name when it is complete, and replaces
    another only where ``overwrite``; a device may be larger, and what is beyond the disk is left alone. ``verify``:
    read the destination back, from storage where the kernel lets go of its cache, and compare it with the backup.

    ConfigError (the destination), StateError (the backup; a destination that reads back otherwise), OSError. After a
    failure there is no file, and a device has zeroes in its first 64 KiB, if it was touched at all."""
    started = time.monotonic()
    name = os.fsdecode(destination)
    with open_chain(image, manifest) as chain, contextlib.ExitStack() as undo:
        chain.check_complete()
        check_apart(name, [path for member in chain.members for path in (member.path, manifest_path(member.path))])
        place = Device(name, chain.size) if is_device_at(name) else File(name, overwrite)
        undo.callback(place.discard)
        check(chain, progress)
        with named(name):
            place.begin(chain.size)
        written = write(chain, place, name, progress)
        with named(name):
            place.seal()
        if verify:
            compare(chain, place.fd, name, progress)
        with named(name):
            place.publish()
        undo.pop_all()
        place.close()
        return RestoreResult(
            image=os.fsdecode(image),
            destination=name,
            size=chain.size,
            data_bytes=written,
            verified=verify,
            chain=checked(chain),
            seconds=time.monotonic() - started,
        )


def check(chain: Chain, progress: Progress | None) -> None:
    """Compare the whole chain with its manifests."""
    chain.check_content(Meter(progress, "check", sum(m.manifest.data_bytes for m in chain.members)).add)


def checked(chain: Chain) -> list[CheckedImage]:
    """What the results tell of the chain."""
    return [
        CheckedImage(
            id=m.manifest.id,
            path=m.path,
            created=m.manifest.created,
            sync=m.manifest.sync,
            data_bytes=m.manifest.data_bytes,
            sha256=m.manifest.sha256,
        )
        for m in chain.members
    ]


class Place(Protocol):
    """Where a disk is restored to."""

    fd: int

    def begin(self, size: int) -> None:
        """The first change."""

    def seal(self) -> None:
        """All is written: make it durable."""

    def publish(self) -> None:
        """It is complete."""

    def discard(self) -> None:
        """It will not be."""

    def close(self) -> None:
        """Give the descriptors back."""


class File:
    """A file that is to be."""

    def __init__(self, name: str, overwrite: bool) -> None:
        self._file = PartialFile(name, overwrite=overwrite)
        self.fd = self._file.fd
        self.store: RawFile | RawDevice

    def begin(self, size: int) -> None:
        """It is all holes."""
        self.store = RawFile(self.fd, size)

    def seal(self) -> None:
        """All is written: make it durable."""
        self.store.seal("")

    def publish(self) -> None:
        """Give it its name, durably."""
        self._file.publish()
        self._file.sync_folder()

    def discard(self) -> None:
        """Remove it."""
        self._file.discard()

    def close(self) -> None:
        """Give the descriptors back."""
        self._file.close()


class Device:
    """A block device."""

    def __init__(self, name: str, size: int) -> None:
        self.fd = open_device(name, size)
        self.store: RawFile | RawDevice
        self._begun = False

    def begin(self, size: int) -> None:
        """The first unit is held back."""
        self._begun = True
        self.store = RawDevice(self.fd, size)

    def seal(self) -> None:
        """All is written, the first unit last: make it durable."""
        self.store.seal("")
        self.store.complete()

    def publish(self) -> None:
        """It is complete."""

    def discard(self) -> None:
        """Take the first unit back."""
        try:
            if self._begun:
                self.store.spoil()
        finally:
            self.close()

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)


def write(chain: Chain, place: File | Device, name: str, progress: Progress | None) -> int:
    """Write what the chain stores, and nothing where that is zeroes; the bytes that were written."""
    meter = Meter(progress, "restore", sum(run.length for run in chain.data_runs()))
    skipped = Meter(None, "", 0)

    def pieces() -> Iterator[tuple[Run, Piece]]:
        for run in chain.data_runs():
            piece = Piece(run.offset, run.length)
            place.store.begin(piece)
            yield run, piece

    def work(item: tuple[Run, Piece], buffer: memoryview) -> None:
        run, piece = item
        view = buffer[: run.length]
        chain.read_into(view, run)
        zeroes = zero_units(view, UNIT)
        with named(name):
            place.store.write(piece, view, zeroes)
        skipped.add(min(zeroes.count(1) * UNIT, run.length))
        meter.add(run.length)

    work_through(pieces(), work)
    return meter.done - skipped.done


def compare(chain: Chain, fd: int, name: str, progress: Progress | None) -> None:
    """Read a destination back and compare it with the chain. StateError names the first difference that is found."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    copy = RawReader(fd, name, chain.size)

    def pieces() -> Iterator[Run]:
        for window in sorted({*chain.windows(), *copy.windows()}):
            owners = chain.owners(window)
            stored = copy.kinds(window) != ABSENT
            nothing = (owners == NOBODY) & ~stored
            for run in runs(np.where(nothing, NOBODY + 1, owners.astype(np.uint32)), window * WINDOW, chain.size):
                if run.value != NOBODY + 1:
                    yield from pieces_of(run)

    meter = Meter(progress, "verify", sum(run.length for run in pieces()))

    def work(run: Run, buffer: memoryview) -> None:
        wanted, found = buffer[: run.length], buffer[PIECE : PIECE + run.length]
        if run.value == NOBODY:
            wanted[:] = bytes(run.length)
        else:
            chain.read_into(wanted, run)
        copy.read_into(found, run.offset)
        if wanted != found:
            where = int(np.argmax(np.frombuffer(wanted, np.uint8) != np.frombuffer(found, np.uint8)))
            raise StateError(f"{name} differs from the backup at offset {run.offset + where}: the storage changed it")
        meter.add(run.length)

    work_through(pieces(), work, buffers=2)
