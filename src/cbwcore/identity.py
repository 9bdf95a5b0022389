"""What a disk is known by: the same after a reboot or a rename, another for a copy."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from cbwcore._cbwcore import birth_time
from cbwcore.files import LOOP_GET_STATUS64, LOOP_INFO_SIZE, OPEN_FLAGS

__all__ = ["identify"]

SECTOR = 512  # sysfs counts in these, whatever the device's own are


def identify(fd: int) -> str:
    """The identity of an open disk, one printable line.

    A regular file: its inode, and when it was made (where its file system tells). A device: the wwid, serial number or
    device mapper's uuid that it has from its hardware or its makers, else its name; a partition: where it starts, too.
    A loop device: the identity of the file behind it, and where in that it starts. OSError."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return _of_file(status.st_ino, birth_time(fd))
    return _of_device(fd, status.st_rdev)


def _of_file(inode: int, born: int | None) -> str:
    return f"file inode {inode}" + ("" if born is None else f" born {born // 10**9}.{born % 10**9:09}")


def _of_device(fd: int, number: int) -> str:
    node = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    start = 0
    if os.path.exists(f"{node}/partition"):
        start = int(_read(f"{node}/start") or 0) * SECTOR
        node = os.path.join(os.path.realpath(node), "..")
    if os.path.exists(f"{node}/loop"):
        return _of_loop(fd, node, start)
    return f"device {_name_of_device(node, number)}" + (f" start {start}" if start else "")


def _name_of_device(node: str, number: int) -> str:
    for attribute in ("dm/uuid", "wwid", "device/wwid", "serial", "device/serial"):
        found = _read(f"{node}/{attribute}")
        if found:
            return f"{os.path.basename(attribute)} {found}"
    if os.path.exists(node):
        return os.path.basename(os.path.realpath(node))
    return f"{os.major(number)}:{os.minor(number)}"  # without sysfs


def _of_loop(fd: int, node: str, start: int) -> str:
    """The file's inode is the kernel's word; its name may be gone or another file's, and then there is no birth
    time."""
    dev, inode, _, offset = struct.unpack_from("QQQQ", fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(LOOP_INFO_SIZE)))
    born = None
    try:
        behind = os.open(_read(f"{node}/loop/backing_file") or "", os.O_RDONLY | OPEN_FLAGS)
    except OSError:
        behind = -1
    if behind >= 0:
        try:
            status = os.fstat(behind)
            if (status.st_dev, status.st_ino) == (dev, inode):
                born = birth_time(behind)
        finally:
            os.close(behind)
    return f"loop of {_of_file(inode, born)} start {offset + start}"


def _read(path: str) -> str | None:
    """A sysfs attribute in one line of printable text; None where there is none, or nothing in it."""
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as f:
            words = f.read().split()
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ENXIO, errno.ENODEV, errno.EIO, errno.EINVAL):
            return None
        raise
    return " ".join("".join(c if c.isprintable() else "?" for c in word) for word in words) or None
