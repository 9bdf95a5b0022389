"""Opening disks and targets: kind, size, O_DIRECT alignment, locks. Nothing is left open or changed on an error."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
from typing import NamedTuple

from cbwcore._cbwcore import dio_alignment
from cbwcore.errors import ConfigError

__all__ = ["BlockFile", "create_target", "open_disk", "open_target"]

logger = logging.getLogger(__name__)

BLKSSZGET = 0x1268  # <linux/fs.h>: the logical block size
PAGE = 4096
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
    """(memory, offset) alignment in bytes for O_DIRECT (R13): from statx, else the logical block size, else a page."""
    known = dio_alignment(fd)
    if known is not None:
        return max(known[0], 1), known[1]
    unit = logical_block_size(fd) if is_device else PAGE
    return unit, unit


def lock(fd: int, exclusive: bool) -> bool:
    """Take an open-file-description lock on the whole file, which QEMU's image locking respects too; False if it is held."""
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


def describe(fd: int, path: Path, direct: bool, flags: int) -> BlockFile:
    """What the core needs to know of ``fd``, opened with ``flags``; on an error ``fd`` is closed."""
    tail_fd = -1
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ConfigError(f"{os.fspath(path)} is neither a regular file nor a block device")
        is_device = stat.S_ISBLK(mode)
        size = os.lseek(fd, 0, os.SEEK_END)
        mem_align, align = direct_alignment(fd, is_device) if direct else (1, 1)
        direct_end = size
        if size % align:
            direct_end = size - size % max(align, PAGE)
            tail_fd = os.open(path, flags & ~(os.O_DIRECT | os.O_CREAT | os.O_EXCL))
        zero_align = max(align, logical_block_size(fd)) if is_device else align
        return BlockFile(fd, tail_fd, size, direct_end, align, mem_align, zero_align, is_device)
    except BaseException:
        os.close(fd)
        raise


def open_disk(path: Path, *, direct: bool, read_only: bool) -> BlockFile:
    """Open and lock a disk: alone, or with other readers where ``read_only``. OSError; ConfigError where it is in use."""
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    try:
        fd = os.open(path, flags)
    except OSError as e:
        if direct and e.errno == errno.EINVAL:
            raise ConfigError(f"{os.fspath(path)}: its file system has no O_DIRECT; open it with direct=False") from None
        raise
    opened = describe(fd, path, direct, flags)
    if not lock(opened.fd, exclusive=not read_only):
        opened.close()
        raise ConfigError(f"{os.fspath(path)} is in use: another process or Disk has it locked")
    return opened


def open_target(path: Path, disk: BlockFile, *, direct: bool) -> BlockFile:
    """Open, check and lock an existing target for one snapshot alone; ConfigError says what is wrong with it."""
    name = os.fspath(path)
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError as e:
        raise ConfigError(f"target {name} cannot be opened for writing: {e.strerror}") from e
    try:
        target = describe(fd, path, False, flags)
    except OSError as e:
        raise ConfigError(f"target {name} cannot be used: {e.strerror}") from e
    try:
        if same_file(target.fd, disk.fd):
            raise ConfigError(f"target {name} is the disk itself")
        if target.size < disk.size:
            raise ConfigError(f"target {name} is {target.size} bytes, less than the disk's {disk.size}")
        if not lock(target.fd, exclusive=True):
            raise ConfigError(f"target {name} is in use: another process or snapshot has it locked")
    except BaseException:
        target.close()
        raise
    return with_direct(target, path) if direct else target


def create_target(path: Path | None, disk: BlockFile, disk_path: Path, *, direct: bool) -> BlockFile:
    """A new sparse target as large as the disk, locked: ``path``, or an unnamed file beside the disk. ConfigError."""
    name = f"target {os.fspath(path)}" if path is not None else "an unnamed target"
    flags = os.O_RDWR | os.O_CLOEXEC
    if path is None and disk.is_device:
        raise ConfigError(f"{os.fspath(disk_path)} is a block device: name a target, there is no place beside it")
    try:
        if path is None:
            beside = os.path.dirname(os.path.realpath(disk_path))
            fd = os.open(beside, flags | os.O_TMPFILE, 0o600)
            path = f"/proc/self/fd/{fd}"
            created = False
        else:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            created = True
    except OSError as e:
        raise ConfigError(f"{name} cannot be created: {e.strerror}") from e
    try:
        os.ftruncate(fd, disk.size)
        target = describe(fd, path, False, flags)
        if not lock(target.fd, exclusive=True):
            target.close()
            raise ConfigError(f"{name} is in use: another process has it locked")
    except BaseException as e:
        if created:
            os.unlink(path)
        if isinstance(e, OSError):
            raise ConfigError(f"{name} cannot be made {disk.size} bytes long: {e.strerror}") from e
        raise
    return with_direct(target, path) if direct else target


def with_direct(target: BlockFile, path: Path) -> BlockFile:
    """The same open target with O_DIRECT, where its file system has it; else as it is, and the log says so."""
    flags = fcntl.fcntl(target.fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(target.fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError as e:
        logger.warning("target %s: no O_DIRECT (%s), its writes are buffered", os.fspath(path), e.strerror)
        return target
    return describe(target.fd, path, True, os.O_RDWR | os.O_CLOEXEC)
