"""Opening disks and targets: kind, size, O_DIRECT alignment, locks. Nothing is left open or changed on an error."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from cbwcore._cbwcore import dio_alignment
from cbwcore.errors import ConfigError

__all__ = ["BlockFile", "create_target", "open_disk", "open_target"]

logger = logging.getLogger(__name__)

BLKSSZGET = 0x1268  # <linux/fs.h>: the logical block size
BLKROGET = 0x125E  # whether the device is read-only
LOOP_GET_STATUS64 = 0x4C05  # <linux/loop.h>: struct loop_info64 begins with device, inode, rdevice, offset
LOOP_INFO_SIZE = 232
PAGE = os.sysconf("SC_PAGE_SIZE")
OPEN_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK  # or a FIFO, which check_kind() refuses, would block the open for ever
Path = str | os.PathLike[str]


class BlockFile(NamedTuple):
    """An open file or block device, as the core takes it over; sizes and alignments in bytes."""

    fd: int
    tail_fd: int
    size: int
    direct_end: int
    align: int
    mem_align: int
    zero_align: int
    is_device: bool

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self.fd)
        if self.tail_fd >= 0:
            os.close(self.tail_fd)


def logical_block_size(fd: int) -> int:
    """Of a block device, in bytes."""
    return int(struct.unpack("i", fcntl.ioctl(fd, BLKSSZGET, b"\0" * 4))[0])


def direct_alignment(fd: int, is_device: bool) -> tuple[int, int]:
    """(memory, offset) alignment in bytes for O_DIRECT (R13): from statx, else the logical block size, else a page.

    OSError EINVAL where the file has no O_DIRECT, as open would say."""
    known = dio_alignment(fd)
    if known is not None:
        if known[1] == 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return max(known[0], 1), known[1]
    unit = logical_block_size(fd) if is_device else PAGE
    return unit, unit


def lock(fd: int, exclusive: bool) -> bool:
    """Take an open-file-description lock on the whole file, which QEMU's locking respects; False if it is held."""
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi", kind, os.SEEK_SET, 0, 0, 0))
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock_and_close(fd: int) -> None:
    """A forked child shares the description, and would keep the lock for as long as it lives. OSError."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi", fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
    finally:
        os.close(fd)


@contextlib.contextmanager
def closed_on_error(fd: int) -> Iterator[int]:
    """``fd``, closed if what is done with it fails."""
    try:
        yield fd
    except BaseException:
        os.close(fd)
        raise


class Storage(NamedTuple):
    """The bytes that a descriptor is of: of a file, of a device, or, behind a loop device, of its file."""

    where: tuple[int, ...]
    start: int
    end: int


def storage(fd: int) -> Storage:
    """What ``fd`` stores its bytes in, whatever name it was opened by."""
    status = os.fstat(fd)
    size = os.lseek(fd, 0, os.SEEK_END)
    if stat.S_ISREG(status.st_mode):
        return Storage((status.st_dev, status.st_ino), 0, size)
    first, device = 0, f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    if os.path.exists(f"{device}/partition"):
        with open(f"{device}/start") as start:
            first = int(start.read()) * 512
        device = os.path.join(os.path.realpath(device), "..")
    if not os.path.exists(f"{device}/loop"):
        return Storage((status.st_rdev,), 0, size)
    dev, inode, _, offset = struct.unpack_from("QQQQ", fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(LOOP_INFO_SIZE)))
    return Storage((dev, inode), offset + first, offset + first + size)


def overlap(a: Storage, b: Storage) -> bool:
    """Whether two descriptors are of the same bytes."""
    return a.where == b.where and a.start < b.end and b.start < a.end


def open_for(path: Path, flags: int) -> int:
    """Open a file, or a block device, which is then ours alone in the kernel's eyes too: by any node, or mounted.

    OSError; EROFS for a device that does not take writes."""
    exclusive = flags & os.O_ACCMODE == os.O_RDWR and stat.S_ISBLK(os.stat(path).st_mode)
    fd = os.open(path, flags | OPEN_FLAGS | (os.O_EXCL if exclusive else 0))
    with closed_on_error(fd):
        if exclusive and struct.unpack("i", fcntl.ioctl(fd, BLKROGET, bytes(4)))[0]:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))
    return fd


def check_kind(fd: int, path: Path) -> None:
    """Only regular files and block devices are disks and targets."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ConfigError(f"{os.fspath(path)} is neither a regular file nor a block device")


def describe(fd: int, path: Path, size: int, direct: bool) -> BlockFile:
    """What the core needs to know of ``fd``, whose first ``size`` bytes are used; the last step of opening, for it may
    open the tail's descriptor."""
    is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
    mem_align, align = direct_alignment(fd, is_device) if direct else (1, 1)
    zero_align = max(align, logical_block_size(fd)) if is_device else align
    if size % align == 0:
        return BlockFile(fd, -1, size, size, align, mem_align, zero_align, is_device)
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    try:
        tail_fd = os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC)
    except OSError as e:
        raise OSError(e.errno, e.strerror, os.fspath(path)) from None
    return BlockFile(fd, tail_fd, size, size - size % max(align, PAGE), align, mem_align, zero_align, is_device)


def open_disk(path: Path, *, direct: bool, read_only: bool) -> BlockFile:
    """Open and lock a disk: alone, or with other readers where ``read_only``. OSError; ConfigError if it is in use."""
    name = os.fspath(path)
    try:
        with closed_on_error(open_for(path, os.O_RDONLY if read_only else os.O_RDWR)) as fd:
            check_kind(fd, path)
            if not lock(fd, exclusive=not read_only):
                raise ConfigError(f"{name} is in use: another process or Disk has it locked")
            if direct and not set_direct(fd):
                raise ConfigError(f"{name}: its file system has no O_DIRECT; open it with direct=False")
            return describe(fd, path, os.lseek(fd, 0, os.SEEK_END), direct)
    except OSError as e:
        if e.errno == errno.EBUSY:
            raise ConfigError(f"{name} is in use: it is mounted, or another program has it for itself") from e
        raise


def open_target(path: Path, disk: BlockFile, *, direct: bool) -> BlockFile:
    """Open, check and lock an existing target for one snapshot alone; ConfigError says what is wrong with it."""
    name = os.fspath(path)
    try:
        with closed_on_error(open_for(path, os.O_RDWR)) as fd:
            check_kind(fd, path)
            own = storage(fd)
            if overlap(own, storage(disk.fd)):
                raise ConfigError(f"target {name} is the disk itself")
            if own.end - own.start < disk.size:
                raise ConfigError(f"target {name} is {own.end - own.start} bytes, less than the disk's {disk.size}")
            if not lock(fd, exclusive=True):
                raise ConfigError(f"target {name} is in use: another process or snapshot has it locked")
            return describe(fd, path, disk.size, direct_target(fd, name, direct))
    except OSError as e:
        if e.errno != errno.EBUSY:
            raise ConfigError(f"target {name} cannot be opened for writing: {e.strerror}") from e
        same = disk.is_device and os.stat(path).st_rdev == os.fstat(disk.fd).st_rdev
        why = "the disk itself" if same else "in use: it is mounted, or another program or snapshot has it for itself"
        raise ConfigError(f"target {name} is {why}") from e


def create_target(path: Path | None, disk: BlockFile, disk_path: Path, *, direct: bool) -> BlockFile:
    """A new sparse target as large as the disk, locked: ``path``, or an unnamed file beside the disk. ConfigError."""
    flags = os.O_RDWR | OPEN_FLAGS
    if path is None and disk.is_device:
        raise ConfigError(f"{os.fspath(disk_path)} is a block device: name a target, there is no place beside it")
    with contextlib.ExitStack() as undo:
        try:
            if path is None:
                name, beside = "an unnamed target", os.path.dirname(os.readlink(f"/proc/self/fd/{disk.fd}"))
                fd = os.open(beside, flags | os.O_TMPFILE, 0o600)
            else:
                name = f"target {os.fspath(path)}"
                fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
                undo.callback(os.unlink, path)
            undo.callback(os.close, fd)
            os.ftruncate(fd, disk.size)
            if not lock(fd, exclusive=True):
                raise ConfigError(f"{name} is in use: another process has it locked")
            target = describe(fd, name, disk.size, direct_target(fd, name, direct))
        except OSError as e:
            raise ConfigError(f"{name} of {disk.size} bytes cannot be created: {e.strerror}") from e
        undo.pop_all()
    return target


def set_direct(fd: int) -> bool:
    """Switch to O_DIRECT; False where the file system has none."""
    try:
        direct_alignment(fd, stat.S_ISBLK(os.fstat(fd).st_mode))
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as e:
        if e.errno == errno.EINVAL:
            return False
        raise
    return True


def direct_target(fd: int, name: str, wanted: bool) -> bool:
    """Whether a target is used with O_DIRECT: as its disk is, where its file system has it; else the log says so."""
    if wanted and not set_direct(fd):
        logger.warning("%s: its file system has no O_DIRECT, its writes are buffered", name)
        return False
    return wanted
