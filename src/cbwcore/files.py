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
PAGE = 4096
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


def same_file(a: int, b: int) -> bool:
    """Whether two descriptors are of one file, or of one device by different nodes."""
    x, y = os.fstat(a), os.fstat(b)
    if stat.S_ISBLK(x.st_mode) and stat.S_ISBLK(y.st_mode):
        return x.st_rdev == y.st_rdev
    return (x.st_dev, x.st_ino) == (y.st_dev, y.st_ino)


@contextlib.contextmanager
def closed_on_error(fd: int) -> Iterator[int]:
    """``fd``, closed if what is done with it fails."""
    try:
        yield fd
    except BaseException:
        os.close(fd)
        raise


def check_kind(fd: int, path: Path) -> None:
    """Only regular files and block devices are disks and targets."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ConfigError(f"{os.fspath(path)} is neither a regular file nor a block device")


def describe(fd: int, direct: bool) -> BlockFile:
    """What the core needs to know of ``fd``; the last step of opening, for it may open the tail's descriptor."""
    is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
    size = os.lseek(fd, 0, os.SEEK_END)
    mem_align, align = direct_alignment(fd, is_device) if direct else (1, 1)
    zero_align = max(align, logical_block_size(fd)) if is_device else align
    if size % align == 0:
        return BlockFile(fd, -1, size, size, align, mem_align, zero_align, is_device)
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    tail_fd = os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC)
    return BlockFile(fd, tail_fd, size, size - size % max(align, PAGE), align, mem_align, zero_align, is_device)


def open_disk(path: Path, *, direct: bool, read_only: bool) -> BlockFile:
    """Open and lock a disk: alone, or with other readers where ``read_only``. OSError; ConfigError if it is in use."""
    name = os.fspath(path)
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | OPEN_FLAGS | (os.O_DIRECT if direct else 0)
    try:
        with closed_on_error(os.open(path, flags)) as fd:
            check_kind(fd, path)
            if not lock(fd, exclusive=not read_only):
                raise ConfigError(f"{name} is in use: another process or Disk has it locked")
            return describe(fd, direct)
    except OSError as e:
        if direct and e.errno == errno.EINVAL:
            raise ConfigError(f"{name}: its file system has no O_DIRECT; open it with direct=False") from None
        raise


def open_target(path: Path, disk: BlockFile, *, direct: bool) -> BlockFile:
    """Open, check and lock an existing target for one snapshot alone; ConfigError says what is wrong with it."""
    name = os.fspath(path)
    try:
        with closed_on_error(os.open(path, os.O_RDWR | OPEN_FLAGS)) as fd:
            check_kind(fd, path)
            size = os.lseek(fd, 0, os.SEEK_END)
            if same_file(fd, disk.fd):
                raise ConfigError(f"target {name} is the disk itself")
            if size < disk.size:
                raise ConfigError(f"target {name} is {size} bytes, less than the disk's {disk.size}")
            if not lock(fd, exclusive=True):
                raise ConfigError(f"target {name} is in use: another process or snapshot has it locked")
            return describe(fd, direct and set_direct(fd, name))
    except OSError as e:
        raise ConfigError(f"target {name} cannot be opened for writing: {e.strerror}") from e


def create_target(path: Path | None, disk: BlockFile, disk_path: Path, *, direct: bool) -> BlockFile:
    """A new sparse target as large as the disk, locked: ``path``, or an unnamed file beside the disk. ConfigError."""
    flags = os.O_RDWR | OPEN_FLAGS
    if path is None and disk.is_device:
        raise ConfigError(f"{os.fspath(disk_path)} is a block device: name a target, there is no place beside it")
    with contextlib.ExitStack() as undo:
        try:
            if path is None:
                name, beside = "an unnamed target", os.path.dirname(os.path.realpath(disk_path))
                fd = os.open(beside, flags | os.O_TMPFILE, 0o600)
            else:
                name = f"target {os.fspath(path)}"
                fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
                undo.callback(os.unlink, path)
            undo.callback(os.close, fd)
            os.ftruncate(fd, disk.size)
            if not lock(fd, exclusive=True):
                raise ConfigError(f"{name} is in use: another process has it locked")
            target = describe(fd, direct and set_direct(fd, name))
        except OSError as e:
            raise ConfigError(f"{name} of {disk.size} bytes cannot be created: {e.strerror}") from e
        undo.pop_all()
    return target


def set_direct(fd: int, name: str) -> bool:
    """Switch an open target to O_DIRECT; False, and a line in the log, where its file system has none."""
    try:
        direct_alignment(fd, stat.S_ISBLK(os.fstat(fd).st_mode))
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as e:
        logger.warning("%s: no O_DIRECT (%s), its writes are buffered", name, e.strerror)
        return False
    return True
