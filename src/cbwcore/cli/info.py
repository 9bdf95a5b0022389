"""``cbwcore info``: what a disk is, and what can be done with it here. It never writes to the disk, nor locks it."""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import tempfile
from typing import Any

import msgspec
from rich.table import Table

from cbwcore._cbwcore import LIBURING, io_uring_state
from cbwcore.cli.output import console, print_json, size_text
from cbwcore.engines import choose_engine
from cbwcore.errors import ConfigError
from cbwcore.files import direct_alignment, logical_block_size

__all__ = ["Info", "add_command", "look_at"]

BLKPBSZGET = 0x127B  # <linux/fs.h>: the physical block size
FICLONE = 0x40049409  # <linux/fs.h>
IO_URING_SETUP = 425  # the system call's number on every architecture but alpha
IO_URING_PARAMS = 120  # bytes


class Fact(msgspec.Struct, frozen=True):
    """Whether something can be done, None where that cannot be told, and why."""

    possible: bool | None
    reason: str


class Direct(msgspec.Struct, frozen=True):
    """O_DIRECT, and the alignment that it needs, in bytes."""

    possible: bool
    reason: str
    memory_alignment: int | None = None
    offset_alignment: int | None = None


class Sectors(msgspec.Struct, frozen=True):
    """Of a block device, in bytes."""

    logical: int
    physical: int


class Choice(msgspec.Struct, frozen=True):
    """An I/O engine, and why it is taken."""

    engine: str
    reason: str


class IoUring(msgspec.Struct, frozen=True):
    """Whether the kernel allows io_uring, and whether this build has the engine."""

    kernel: Fact
    build: Fact


class Info(msgspec.Struct, frozen=True):
    """All that ``cbwcore info`` tells; sizes in bytes, None for what does not apply.

    ``auto``, ``auto_direct``: the engine of ``io="auto"`` for buffered files and for O_DIRECT."""

    path: str
    kind: str
    size: int
    allocated: int | None
    sectors: Sectors | None
    file_system: str | None
    direct: Direct
    reflink: Fact
    io_uring: IoUring
    auto: Choice
    auto_direct: Choice


def add_command(commands: Any) -> None:
    """Put the command into the parser."""
    about = "what a disk is, and what can be done with it here"
    parser = commands.add_parser("info", help=about, description=f"Tell {about}.")
    parser.add_argument("path", metavar="PATH", help="a file or block device; it is only read, and not locked")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    facts = look_at(args.path)
    if args.json:
        print_json(facts)
    else:
        show(facts)
    return 0


def look_at(path: str) -> Info:
    """The facts about the file or block device at ``path``. OSError; ConfigError where it is neither."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        is_device = stat.S_ISBLK(status.st_mode)
        if not is_device and not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path} is neither a regular file nor a block device")
        size = os.lseek(fd, 0, os.SEEK_END)
        return Info(
            path=path,
            kind="block device" if is_device else "regular file",
            size=size,
            allocated=None if is_device else status.st_blocks * 512,
            sectors=sectors(fd) if is_device else None,
            file_system=None if is_device else file_system(fd),
            direct=try_direct(path, fd, is_device, size),
            reflink=Fact(False, "a block device has no files to clone") if is_device else try_reflink(path, status),
            io_uring=IoUring(try_io_uring(), built_io_uring()),
            auto=Choice(*choose_engine("auto")),
            auto_direct=Choice(*choose_engine("auto", direct=True)),
        )
    finally:
        os.close(fd)


def sectors(fd: int) -> Sectors:
    """The block sizes of a device."""
    physical = struct.unpack("I", fcntl.ioctl(fd, BLKPBSZGET, b"\0" * 4))[0]
    return Sectors(logical_block_size(fd), physical)


def file_system(fd: int) -> str | None:
    """The type of the file system that holds an open file, by its mount; None where /proc does not tell."""
    try:
        with open(f"/proc/self/fdinfo/{fd}") as f:
            mount = next(line.split()[1] for line in f if line.startswith("mnt_id:"))
        with open("/proc/self/mountinfo") as f:
            fields = next(line.split() for line in f if line.split(maxsplit=1)[0] == mount)
    except (OSError, StopIteration):
        return None
    return fields[fields.index("-") + 1]


def try_direct(path: str, fd: int, is_device: bool, size: int) -> Direct:
    """Open with O_DIRECT and read one block, if there is one."""
    try:
        direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as e:
        return Direct(False, f"open: {e.strerror}")
    memory, offset = direct_alignment(fd, is_device)
    try:
        with mmap.mmap(-1, max(memory, offset)) as block:
            os.preadv(direct, [block], 0)
    except OSError as e:
        return Direct(False, f"read: {e.strerror}")
    finally:
        os.close(direct)
    return Direct(True, "a block was read so" if size else "opened so; there is nothing to read", memory, offset)


def try_reflink(path: str, status: os.stat_result) -> Fact:
    """Clone one unnamed temporary file beside ``path`` into another; both are gone afterwards."""
    directory = os.path.dirname(os.path.realpath(path))
    try:
        with tempfile.TemporaryFile(dir=directory) as a, tempfile.TemporaryFile(dir=directory) as b:
            if os.fstat(a.fileno()).st_dev != status.st_dev:
                return Fact(None, f"{directory} is on another file system")
            a.write(b"\1" * mmap.PAGESIZE)
            a.flush()
            return clone(a.fileno(), b.fileno())
    except OSError as e:
        return Fact(None, f"no test file beside it: {e.strerror}")


def clone(source: int, target: int) -> Fact:
    """Whether FICLONE works between two files."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as e:
        refused = e.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS)
        return Fact(False if refused else None, f"FICLONE: {e.strerror}")
    return Fact(True, "a file beside it was cloned")


def try_io_uring() -> Fact:
    """Ask the kernel for the smallest ring, and give it back."""
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(IO_URING_PARAMS)
    fd = libc.syscall(ctypes.c_long(IO_URING_SETUP), ctypes.c_uint(1), parameters)
    if fd < 0:
        return Fact(False, f"io_uring_setup: {os.strerror(ctypes.get_errno())}")
    os.close(fd)
    return Fact(True, "a ring was set up")


def built_io_uring() -> Fact:
    """Whether this build has the engine."""
    built = io_uring_state()[0]
    return Fact(built, f"with liburing {LIBURING}".rstrip() if built else "liburing was not found when it was built")


def show(facts: Info) -> None:
    """Print the facts for people."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows(facts):
        table.add_row(name, value)
    console().print(table)


def rows(facts: Info) -> list[tuple[str, str]]:
    """What is printed, line by line."""
    lines = [("path", facts.path), ("kind", facts.kind), ("size", f"{size_text(facts.size)} ({facts.size} bytes)")]
    if facts.sectors is not None:
        lines.append(("sectors", f"{facts.sectors.logical} bytes logical, {facts.sectors.physical} physical"))
    if facts.allocated is not None:
        holes = max(facts.size - facts.allocated, 0)
        lines.append(("allocated", f"{size_text(facts.allocated)}, holes {size_text(holes)}"))
        lines.append(("file system", facts.file_system or "unknown: /proc does not tell"))
    direct, ring = facts.direct, facts.io_uring
    lines.append(("O_DIRECT", answer(direct.possible, direct.reason)))
    if direct.possible:
        lines.append(("alignment", f"memory {direct.memory_alignment}, offset {direct.offset_alignment} bytes"))
    lines += [
        ("reflink", answer(facts.reflink.possible, facts.reflink.reason)),
        ("io_uring", f"this kernel {answer(ring.kernel.possible, ring.kernel.reason)}"),
        ("", f"this build {answer(ring.build.possible, ring.build.reason)}"),
        ('io="auto"', f"{facts.auto.engine} ({facts.auto.reason})"),
        ("", f"with O_DIRECT {facts.auto_direct.engine} ({facts.auto_direct.reason})"),
    ]
    return lines


def answer(possible: bool | None, reason: str) -> str:
    """Yes, no or unknown, and why."""
    return f"{'unknown' if possible is None else 'yes' if possible else 'no'} ({reason})"
