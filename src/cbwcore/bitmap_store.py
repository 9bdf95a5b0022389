"""The sidecar file of a disk: persistent bitmaps that survive ``kill -9``, and are never silently short.

While the disk is open the bits of its bitmaps are the file's pages (MAP_SHARED): what a guest write records is in the
page cache before the write reaches the disk, and outlives the process. The machine's end is another matter. Then the
file says "in use" in the name of a boot that is over, and the bitmaps are inconsistent. What the directory says of them
is changed before whatever relies on it is done; each change is one `write_directory`, the moment it takes hold."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from cbwcore import bitmap_file
from cbwcore._cbwcore import BitmapCore, punch_hole
from cbwcore.bitmap_file import (
    AREAS,
    SPARE,
    Directory,
    Entry,
    Job,
    Slot,
    checksum,
    encode_directory,
    read_directory,
    write_all,
    write_directory,
)
from cbwcore.errors import StateError
from cbwcore.files import OPEN_FLAGS, BlockFile, lock, unlock_and_close
from cbwcore.forked import forked
from cbwcore.identity import identify

__all__ = ["BitmapStore", "UnusableError", "create_store", "default_path", "open_store"]

logger = logging.getLogger(__name__)

SUFFIX = ".cbw-bitmaps"
WENT_DOWN = "the machine went down while the disk was in use"
WRITTEN_BEHIND = "the disk was written without its bitmaps"
PIECE = 1 << 20


class UnusableError(StateError):
    """The file is there, and no bitmap in it can be used; the disk can."""


class Area(NamedTuple):
    """A part of the file, in bytes."""

    offset: int
    length: int


def default_path(disk_path: str, disk: BlockFile) -> str | None:
    """Beside a regular file, whatever link it was opened by; None for a block device, which has no place beside it."""
    return None if disk.is_device else os.path.realpath(disk_path) + SUFFIX


def open_store(path: str, disk: BlockFile, *, read_only: bool) -> BitmapStore | None:
    """The file at ``path``, locked, its bitmaps still to be loaded; None where there is none.

    UnusableError where it is damaged, or of another disk, or of another size; StateError where it is in use;
    OSError."""
    try:
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | OPEN_FLAGS)
    except FileNotFoundError:
        return None
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UnusableError(f"{path} is no regular file")
        _lock(fd, path, exclusive=not read_only)
        try:
            slot = read_directory(fd)
        except StateError as e:
            raise UnusableError(f"{path}: {e}") from None
        identity = identify(disk.fd)
        if slot.directory.identity != identity:
            raise UnusableError(f"{path} is of another disk: {slot.directory.identity}, not {identity}")
        store = BitmapStore(path, fd, slot, disk, read_only=read_only)
        undo.pop_all()
        undo.callback(store.abandon)
        store.check_size(disk.size)
        undo.pop_all()
    return store


def create_store(path: str, disk: BlockFile) -> BitmapStore:
    """A new file at ``path``, in use, with no bitmap in it; it takes the place of what was there. OSError,
    StateError."""
    partial = path + ".partial"
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | OPEN_FLAGS, 0o600)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        _lock(fd, partial, exclusive=True)
        undo.callback(os.unlink, partial)
        directory = Directory(identify(disk.fd), disk.size, True, bitmap_file.boot_id(), None, ())
        try:
            os.ftruncate(fd, 0)
            os.posix_fallocate(fd, 0, AREAS)
            slot = write_directory(fd, Slot(0, 0, directory), directory)
            bitmap_file.step("new file written")
            # Up to here a death leaves a .partial, which the next one starts again; from here the whole file. It is
            # empty, and says so, until a bitmap is added.
            os.rename(partial, path)
        except OSError as e:
            raise OSError(e.errno, e.strerror, path) from None
        undo.pop_all()
        undo.callback(os.close, fd)
        _sync_parent(path)
        store = BitmapStore(path, fd, slot, disk, read_only=False)
        undo.pop_all()
    return store


def _lock(fd: int, path: str, *, exclusive: bool) -> None:
    if not lock(fd, exclusive):
        raise StateError(f"{path} is in use: another disk or process has it locked")


def _sync_parent(path: str) -> None:
    """Make the name durable. OSError."""
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class BitmapStore:
    """An open sidecar file. Everything is called under the disk's ``_admin``.

    ``failed``: why nothing is written to the directory any more. Then ``in_use`` stays, whatever comes."""

    def __init__(self, path: str, fd: int, slot: Slot, disk: BlockFile, *, read_only: bool) -> None:
        self.path = path
        self.read_only = read_only
        self.failed: str | None = None
        self._fd = fd
        self._slot = slot
        self._entries = {entry.name: entry for entry in slot.directory.bitmaps}
        self._boot_id = bitmap_file.boot_id()
        self._garbage: list[Area] = []  # areas of jobs that are over, when the directory says so
        # A descriptor of the disk's of our own, which is there when the disk is closed: not locked, never written.
        self._disk_fd = os.open(f"/proc/self/fd/{disk.fd}", os.O_RDONLY | OPEN_FLAGS)
        forked.add(self)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Of all bitmaps, as the directory has them."""
        return tuple(self._entries.values())

    def entry(self, name: str) -> Entry:
        """Of one bitmap."""
        return self._entries[name]

    # ---- opening ----

    def check_size(self, size: int) -> None:
        """UnusableError where the disk has another size; its bitmaps are then inconsistent, also when it is changed
        back."""
        directory = self._slot.directory
        if directory.size == size:
            return
        why = f"the disk was resized from {directory.size} bytes"
        if not self.read_only:
            self._write([self._spoiled(entry, why) for entry in self.entries])
        raise UnusableError(f"{self.path}: {why} to {size}")

    def load(self, name: str, bitmap: BitmapCore) -> None:
        """Let ``bitmap`` have the bits of an entry, all of them: also those that a job's successor has recorded. Where
        they mean nothing, its ``inconsistent`` says why."""
        entry = self._entries[name]
        why = entry.inconsistent or self._what_happened() or self._cut(entry)
        if why is None:
            with self._named_errors():
                if not self.read_only:
                    os.posix_fallocate(self._fd, entry.offset, entry.length)  # a sparse copy has no blocks for the bits
                bitmap._map_file(self._fd, entry.offset, shared=not self.read_only)
            if entry.crc is not None and checksum(memoryview(bitmap)) != entry.crc:
                why = "its bits are damaged"
        if why is not None:
            bitmap._unmap_file()
            bitmap._spoil(why)
            self._entries[name] = self._spoiled(entry, why)
            return
        if entry.job is not None:
            self._recover(entry, entry.job, bitmap)
        if self.read_only:
            bitmap._unmap_file()

    def _what_happened(self) -> str | None:
        directory = self._slot.directory
        if directory.in_use:
            return None if directory.boot_id == self._boot_id else WENT_DOWN
        return None if directory.mtime_ns == self._mtime_ns() else WRITTEN_BEHIND

    def _mtime_ns(self) -> int | None:
        """Of a regular file; a device's says nothing."""
        status = os.fstat(self._disk_fd)
        return status.st_mtime_ns if stat.S_ISREG(status.st_mode) else None

    def _cut(self, entry: Entry) -> str | None:
        """Past the end of the file there is no page."""
        ends = [entry.offset + entry.length] + ([] if entry.job is None else [entry.job.offset + entry.length])
        return None if max(ends) <= os.fstat(self._fd).st_size else "the bitmap file is cut off"

    def _recover(self, entry: Entry, job: Job, bitmap: BitmapCore) -> None:
        """The end of a job whose process died. Whoever dies in here does it again: the directory still has the job, and
        the successor is not changed."""
        successor = BitmapCore(bitmap.size, entry.granularity.bit_length() - 1)
        successor._map_file(self._fd, job.offset, shared=False)
        if job.state == "succeeded":
            bitmap_file.step("recover reset")
            bitmap._reset()
            entry = msgspec.structs.replace(entry, since=job.since)
        bitmap_file.step("recover merge")
        bitmap._merge(successor)
        self._entries[entry.name] = msgspec.structs.replace(entry, job=None)
        self._garbage.append(Area(job.offset, entry.length))

    def _spoiled(self, entry: Entry, why: str) -> Entry:
        if entry.job is not None:
            self._garbage.append(Area(entry.job.offset, entry.length))
        return msgspec.structs.replace(entry, inconsistent=entry.inconsistent or why, crc=None, since=None, job=None)

    def begin_use(self) -> None:
        """All bitmaps are loaded: say that they are in use. OSError.

        Durable before the first guest write is recorded, or the machine's end could leave a file that seems clean and
        lacks it. Whoever dies before has written nothing."""
        self._write([msgspec.structs.replace(entry, crc=None) for entry in self.entries])
        while self._garbage:
            self.free(self._garbage.pop())

    # ---- changes ----

    def add(self, bitmap: BitmapCore, name: str, *, enabled: bool, content: BitmapCore | None = None) -> None:
        """A new bitmap, whose bits are the file's from here on, and at first those of ``content``. OSError,
        ConfigError, StateError; then nothing is changed."""
        self._check_room(name)
        area = self._allocate(bitmap, name)
        with self._given_back(bitmap, area):
            if content is not None:
                bitmap._merge(content)
            # Whoever dies before has leaked an area that no directory names; after, the bitmap is there, with its bits.
            entry = Entry(name, bitmap.granularity, enabled, None, area.offset, area.length)
            self._write([*self.entries, entry])

    def _check_room(self, name: str) -> None:
        """So that what is to be said of a bitmap later does not fail for want of room. ConfigError."""
        entry = Entry(name, 1 << 31, False, None, 2**63, 2**63)
        directory = msgspec.structs.replace(self._slot.directory, bitmaps=(*self.entries, entry))
        encode_directory(directory, SPARE)

    def remove(self, name: str) -> Area:
        """The directory forgets a bitmap; to be freed when its bits are no longer the file's. OSError, StateError.

        Whoever dies after has leaked the area at most until it is used again."""
        entry = self._entries[name]
        self._write([each for each in self.entries if each is not entry])
        return Area(entry.offset, entry.length)

    def change(self, name: str, **fields: Any) -> None:
        """Other ``enabled``, ``since`` or ``job``; nothing where they are so already. OSError, StateError; then nothing
        is changed."""
        changed = msgspec.structs.replace(self._entries[name], **fields)
        if changed != self._entries[name]:
            self._write([changed if each.name == name else each for each in self.entries])

    def begin_job(self, name: str, successor: BitmapCore) -> None:
        """From T0 on, which comes after this, the successor records instead: an area of its own, which the directory
        knows before a guest write can be in it alone. OSError, ConfigError, StateError; then nothing is changed."""
        area = self._allocate(successor, name)
        with self._given_back(successor, area):
            self.change(name, job=Job("running", area.offset))

    def succeed_job(self, name: str, since: str | None) -> None:
        """A backup has the bitmap's bits: whoever dies from here on, the bitmap becomes what the successor has."""
        job = self._entries[name].job
        assert job is not None
        self.change(name, job=Job("succeeded", job.offset, since))

    def end_job(self, name: str, since: str | None) -> Area:
        """The bitmap records again and has all that it is to have; the successor's area is to be freed when it has
        ended."""
        entry = self._entries[name]
        assert entry.job is not None
        self.change(name, job=None, since=since)
        return Area(entry.job.offset, entry.length)

    def free(self, area: Area) -> None:
        """Give the space back, of which no directory knows any more. What cannot be given back is used again at
        least."""
        bitmap_file.step("free")
        if not self.read_only:
            with contextlib.suppress(OSError):
                punch_hole(self._fd, *area)

    def _allocate(self, bitmap: BitmapCore, name: str) -> Area:
        """Zeroed space for a bitmap's bits, durably so, and the bitmap's pages are there. OSError."""
        self._check_writable()
        area = self._find_room(bitmap._mapped)
        size = os.fstat(self._fd).st_size
        try:
            self._zero(area, size)
            os.posix_fallocate(self._fd, *area)  # a store into a page without space for it would be SIGBUS
        except OSError as e:
            with contextlib.suppress(OSError):
                punch_hole(self._fd, *area)
                os.ftruncate(self._fd, size)
            what = f"{e.strerror}: {area.length} bytes for the bits of bitmap {name!r}"
            raise OSError(e.errno, what, self.path) from None
        bitmap_file.step("area allocated")
        # Durable before a directory names it: else the machine's end could leave what was there before as bits. (It
        # leaves them inconsistent, too; but no promise should lean on another.)
        self._sync()
        with self._named_errors():
            bitmap._map_file(self._fd, area.offset)
        return area

    def _sync(self) -> None:
        try:
            bitmap_file.sync(self._fd)
        except OSError as e:
            self._fail(e)
            raise OSError(e.errno, e.strerror, self.path) from None

    def _fail(self, error: OSError) -> None:
        """What a failed fsync has lost it does not tell again: so this process never calls the file clean."""
        self.failed = f"{error.strerror}"
        logger.error("%s: %s; from here on only bits are recorded in it", self.path, error.strerror)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """OSError says of which file."""
        try:
            yield
        except OSError as e:
            raise OSError(e.errno, e.strerror, self.path) from None

    def _find_room(self, length: int) -> Area:
        """The first gap between the areas, or after them."""
        taken = [Area(entry.offset, entry.length) for entry in self.entries]
        taken += [Area(entry.job.offset, entry.length) for entry in self.entries if entry.job is not None]
        offset = AREAS
        for area in sorted([*taken, *self._garbage]):
            if offset + length <= area.offset:
                break
            offset = area.offset + area.length
        return Area(offset, length)

    def _zero(self, area: Area, size: int) -> None:
        """Past ``size``, the file's, there is nothing."""
        end = min(area.offset + area.length, size)
        if end <= area.offset:
            return
        try:
            punch_hole(self._fd, area.offset, end - area.offset)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            for start in range(area.offset, end, PIECE):
                write_all(self._fd, bytes(min(PIECE, end - start)), start)

    @contextlib.contextmanager
    def _given_back(self, bitmap: BitmapCore, area: Area) -> Iterator[None]:
        """What `_allocate` did is undone if what follows fails."""
        try:
            yield
        except BaseException:
            bitmap._unmap_file()
            self.free(area)
            raise

    def _check_writable(self) -> None:
        if self.failed is not None:
            raise StateError(f"{self.path} is not written any more: {self.failed}")

    def _write(self, entries: Iterable[Entry], *, in_use: bool = True, mtime_ns: int | None = None) -> None:
        """The directory says so from here on, durably. OSError, StateError; ConfigError where it has no room."""
        self._check_writable()
        before = self._slot.directory
        entries = tuple(entries)
        directory = Directory(before.identity, before.size, in_use, self._boot_id, mtime_ns, entries)
        try:
            self._slot = write_directory(self._fd, self._slot, directory)
        except OSError as e:
            self._fail(e)
            # So that the death of the process finds the file as it was, that is what the page cache gets to have.
            again = Slot(self._slot.number, self._slot.generation + 1, before)
            with contextlib.suppress(OSError):
                write_directory(self._fd, again, before, durable=False)
            raise OSError(e.errno, e.strerror, self.path) from None
        self._entries = {entry.name: entry for entry in entries}

    # ---- the end ----

    def close(self, bitmaps: Mapping[str, BitmapCore], *, clean: bool) -> None:
        """No guest write comes any more. ``bitmaps``: those of the file by name, which keep their bits in memory, and
        include what successors had. ``clean``: everything went well so far; else the file stays in use. OSError."""
        with contextlib.ExitStack() as steps:  # backwards
            steps.callback(self._let_go)
            for bitmap in bitmaps.values():
                steps.callback(bitmap._unmap_file)
            if clean and not self.read_only and self.failed is None:
                self._finish(bitmaps)

    def _finish(self, bitmaps: Mapping[str, BitmapCore]) -> None:
        # The disk first: a bit that a commit has cleared says that a backup has these data, and after the machine's end
        # the disk must still have them, too. Then mtime_ns is also what the next boot finds.
        bitmap_file.step("sync disk")
        try:
            bitmap_file.sync(self._disk_fd)
        except OSError as e:
            raise OSError(
                e.errno, f"{e.strerror}: the disk was not flushed, its bitmaps stay in use", self.path
            ) from None
        crcs = {name: checksum(memoryview(bitmap)) for name, bitmap in bitmaps.items() if bitmap.inconsistent is None}
        entries = [msgspec.structs.replace(each, crc=crcs.get(each.name), job=None) for each in self.entries]
        bitmap_file.step("sync bits")
        # Durable before the directory calls them clean. (Its own first fsync would do it with the first copy's, in any
        # order.)
        self._sync()
        self._write(entries, in_use=False, mtime_ns=self._mtime_ns())

    def abandon(self) -> None:
        """Close it as it is, in use or not. Again does nothing."""
        with contextlib.suppress(OSError):
            self._let_go()

    def _let_go(self) -> None:
        fds, self._fd, self._disk_fd = (self._fd, self._disk_fd), -1, -1
        if fds[0] >= 0:
            try:
                unlock_and_close(fds[0])
            finally:
                os.close(fds[1])

    def _abandon(self) -> None:
        """In the child of a fork: the lock is the parent's, and goes on."""
        fds, self._fd, self._disk_fd = (self._fd, self._disk_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)
