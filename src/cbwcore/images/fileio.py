"""Whole transfers to and from files and devices by offset; errors carry the path."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import stat
import struct
from collections.abc import Iterator, Sequence

__all__ = ["close_after_sync", "named", "read_all", "sync", "write_all", "writev_all", "zero_range"]

logger = logging.getLogger(__name__)

BLKZEROOUT = 0x127F  # <linux/fs.h>
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # <linux/falloc.h>
MAX_BUFFERS = 1024  # of one pwritev: IOV_MAX
ZERO_ALIGN = 4096  # a multiple of every logical block size in use
ZEROES = bytes(1 << 20)
CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EPERM)


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """An OSError inside tells of ``path``."""
    try:
        yield
    except OSError as e:
        if e.filename is not None or e.errno is None:
            raise
        raise OSError(e.errno, e.strerror, path) from e


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write all of ``view``; OSError, which a write that takes nothing is, too."""
    while view:
        done = os.pwrite(fd, view, offset)
        if done == 0:
            raise OSError(errno.EIO, "nothing was written")
        view, offset = view[done:], offset + done


def writev_all(fd: int, views: Sequence[memoryview | bytes], offset: int) -> None:
    """Write all of several buffers, one after the other in the file, in as few calls as can be."""
    left = [memoryview(view) for view in views if len(view)]
    while left:
        done = os.pwritev(fd, left[:MAX_BUFFERS], offset)
        if done == 0:
            raise OSError(errno.EIO, "nothing was written")
        offset += done
        gone = 0
        while gone < len(left) and done >= len(left[gone]):
            done -= len(left[gone])
            gone += 1
        del left[:gone]
        if done:
            left[0] = left[0][done:]


def read_all(fd: int, view: memoryview, offset: int) -> None:
    """Fill ``view``; OSError, EIO where the file ends before."""
    while view:
        done = os.preadv(fd, [view], offset)
        if done == 0:
            raise OSError(errno.EIO, f"it ends at {offset}, inside the data")
        view, offset = view[done:], offset + done


def sync(fd: int) -> None:
    """Make all that was written durable; what only close() would report (NFS) is reported here, too. OSError."""
    os.fsync(fd)
    os.close(os.dup(fd))


def close_after_sync(fd: int, path: str) -> None:
    """Close what was made durable, or only read: an error here takes nothing back, and is told to the log alone."""
    try:
        os.close(fd)
    except OSError as e:
        logger.warning("closing %s: %s", path, e)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make a range of a file or block device read as zeroes, given back to the storage where it can be. OSError."""
    end = offset + length
    first, last = -(-offset // ZERO_ALIGN) * ZERO_ALIGN, end // ZERO_ALIGN * ZERO_ALIGN
    if first >= last or not (_punch(fd, first, last - first) or _zero_out(fd, first, last - first)):
        _write_zeroes(fd, offset, end)
        return
    _write_zeroes(fd, offset, first)
    _write_zeroes(fd, last, end)


def _punch(fd: int, offset: int, length: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_int(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
    while libc.fallocate64(ctypes.c_int(fd), flags, ctypes.c_int64(offset), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        if code in CANNOT:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def _zero_out(fd: int, offset: int, length: int) -> bool:
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return False
    try:
        fcntl.ioctl(fd, BLKZEROOUT, struct.pack("QQ", offset, length))
    except OSError as e:
        if e.errno not in CANNOT:
            raise
        return False
    return True


def _write_zeroes(fd: int, offset: int, end: int) -> None:
    while offset < end:
        length = min(end - offset, len(ZEROES))
        write_all(fd, memoryview(ZEROES)[:length], offset)
        offset += length
