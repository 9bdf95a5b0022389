"""What a place is that a backup or a restored disk goes to."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable

from cbwcore.errors import ConfigError
from cbwcore.files import lock, open_for, overlap, storage
from cbwcore.images.partial import partial_name

__all__ = ["check_apart", "is_device_at", "open_device"]

Path = str | os.PathLike[str]


def is_device_at(name: str) -> bool:
    """Whether there is a block device at ``name``, which may be a link to it."""
    try:
        return stat.S_ISBLK(os.stat(name).st_mode)
    except FileNotFoundError:
        return False


def check_apart(name: str, others: Iterable[Path]) -> None:
    """Refuse a ``name`` that is the bytes of one of the others, or whose partial would replace one."""
    others = list(others)
    for place in (name, partial_name(name)):
        _check_apart(place, others)


def _check_apart(name: str, others: list[Path]) -> None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return
        own = storage(fd)
        for other in others:
            try:
                other_fd = os.open(other, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                if overlap(own, storage(other_fd)) or os.path.samestat(os.fstat(fd), os.fstat(other_fd)):
                    raise ConfigError(f"{name} is {os.fsdecode(other)} itself, which is needed as it is")
            finally:
                os.close(other_fd)
    finally:
        os.close(fd)


def open_device(name: str, size: int) -> int:
    """A block device, ours alone. ConfigError where it is smaller than the disk, or in use."""
    try:
        fd = open_for(name, os.O_RDWR)
    except OSError as e:
        if e.errno == errno.EBUSY:
            raise ConfigError(f"{name} is in use: it is mounted, or another program has it for itself") from e
        raise
    try:
        has = os.lseek(fd, 0, os.SEEK_END)
        if has < size:
            raise ConfigError(f"{name} is {has} bytes, less than the disk's {size}")
        if not lock(fd, exclusive=True):
            raise ConfigError(f"{name} is in use: another process has it locked")
    except BaseException:
        os.close(fd)
        raise
    return fd
