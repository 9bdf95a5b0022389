"""The bytes of a sidecar file, in which the bitmaps of a disk outlive its process.

====================  ==================================================================================
0                     directory, first copy
512 KiB               directory, second copy
1 MiB and more        areas: the bits of one bitmap each, whole pages, bit i at byte i // 8, lowest first
====================  ==================================================================================

A copy of the directory is `HEADER`, then JSON (`Directory`). A change writes one copy, makes it durable, then the other
in the same way, and is complete only then: so whatever happens to one copy, torn by a crash or damaged later, the other
has what was complete. The copy with the higher generation counts."""

from __future__ import annotations

import os
import struct
from typing import Literal, NamedTuple

import google_crc32c
import msgspec

from cbwcore.errors import ConfigError, StateError
from cbwcore.options import check_name

__all__ = ["AREAS", "Directory", "Entry", "Job", "Slot", "checksum", "read_directory", "write_directory"]

MAGIC = b"CBWBITS\n"
VERSION = 1
HEADER = struct.Struct("<8sIIQI4x")  # MAGIC, VERSION, bytes of JSON, generation, CRC32C of those four and the JSON
CHECKED = struct.Struct("<8sIIQ")
SLOT = 512 << 10  # bytes of a copy
AREAS = 2 * SLOT  # where the first area may begin
PAGE = 4096
PIECE = 1 << 20
SPARE = 512  # bytes of JSON that a bitmap may come to need: for a job, an epoch, a checksum


def step(what: str) -> None:
    """For tests, which put a function in its place that ends the process here."""


def sync(fd: int) -> None:
    """Make all that was written durable, mapped pages included; for tests to watch. OSError."""
    os.fsync(fd)


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job has the bitmap: it stays as it was at T0, and the area at ``offset`` has what was written from then on.

    ``running``: no backup has the bitmap's bits. ``succeeded``: the backup ``since`` has them."""

    state: Literal["running", "succeeded"]
    offset: int
    since: str | None = None


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bitmap. ``offset``, ``length``: its area. ``crc``: CRC32C of its bits, after a clean close. ``inconsistent``:
    why the bits mean nothing."""

    name: str
    granularity: int
    enabled: bool
    since: str | None
    offset: int
    length: int
    crc: int | None = None
    inconsistent: str | None = None
    job: Job | None = None


class Directory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file is of, and the bitmaps in it.

    ``in_use``: a process has, or had, the disk open for writing, in the boot ``boot_id``. ``mtime_ns``: of the disk at
    the last clean close, if it is a regular file. Sizes in bytes."""

    identity: str
    size: int
    in_use: bool
    boot_id: str
    mtime_ns: int | None
    bitmaps: tuple[Entry, ...]


class Slot(NamedTuple):
    """Which copy counts (0 or 1), its generation and what it says."""

    number: int
    generation: int
    directory: Directory


def boot_id() -> str:
    """Another one whenever the machine has started again. OSError."""
    with open("/proc/sys/kernel/random/boot_id") as f:
        return f.read().strip()


def checksum(data: memoryview) -> int:
    """CRC32C of bytes."""
    crc: int = google_crc32c.value(b"")
    for start in range(0, len(data), PIECE):
        crc = google_crc32c.extend(crc, bytes(data[start : start + PIECE]))
    return crc


def area_length(size: int, granularity: int) -> int:
    """Bytes that the area of a bitmap takes: those of `BitmapCore._mapped`."""
    bits = -(-size // granularity)
    return -(-((bits + 7) // 8 + 1) // PAGE) * PAGE


def read_directory(fd: int) -> Slot:
    """The copy that counts. StateError says what is wrong with the file; OSError."""
    found: list[Slot] = []
    complaints: list[str] = []
    for index in (0, 1):
        try:
            found.append(_read_slot(fd, index))
        except StateError as e:
            complaints.append(str(e))
    if not found:
        raise StateError(complaints[0])
    return max(found, key=lambda slot: slot.generation)


def _read_slot(fd: int, index: int) -> Slot:
    raw = os.pread(fd, SLOT, index * SLOT)
    if len(raw) < HEADER.size or raw[: len(MAGIC)] != MAGIC:
        raise StateError("no bitmap file of cbwcore's, or its beginning is damaged")
    _, version, length, generation, crc = HEADER.unpack_from(raw)
    text = raw[HEADER.size : HEADER.size + length]
    if len(text) != length or crc != _crc_of(version, generation, text):
        raise StateError("its directory is damaged")
    if version != VERSION:
        raise StateError(f"it is of version {version}, this cbwcore knows version {VERSION}")
    try:
        directory = msgspec.json.decode(text, type=Directory)
    except msgspec.DecodeError as e:
        raise StateError(f"its directory cannot be read: {e}") from None
    _check_directory(directory)
    return Slot(index, generation, directory)


def _crc_of(version: int, generation: int, text: bytes) -> int:
    crc: int = google_crc32c.value(CHECKED.pack(MAGIC, version, len(text), generation) + text)
    return crc


def _check_directory(directory: Directory) -> None:
    """A directory whose checksum is right may have been made by anybody. StateError."""
    areas: list[tuple[int, int]] = []
    for entry in directory.bitmaps:
        shift = entry.granularity.bit_length() - 1
        if not (9 <= shift <= 31 and entry.granularity == 1 << shift and 0 <= directory.size < 2**63):
            raise StateError(
                f"bitmap {entry.name!r} has the granularity {entry.granularity}, the disk {directory.size} bytes"
            )
        if entry.length != area_length(directory.size, entry.granularity):
            raise StateError(f"bitmap {entry.name!r} has an area of {entry.length} bytes, which is not what it needs")
        areas.append((entry.offset, entry.length))
        if entry.job is not None:
            areas.append((entry.job.offset, entry.length))
        try:
            check_name(entry.name)
        except ConfigError as e:
            raise StateError(f"a bitmap: {e}") from None
    if len({entry.name for entry in directory.bitmaps}) < len(directory.bitmaps):
        raise StateError("two bitmaps have one name")
    end = AREAS
    for offset, length in sorted(areas):
        if offset % PAGE or offset < end or offset + length >= 2**63:
            raise StateError(f"the area at {offset} is where none can be")
        end = offset + length


def encode_directory(directory: Directory, spare: int = 0) -> bytes:
    """The JSON. ConfigError where it, and ``spare`` bytes for each bitmap, have no room in the file."""
    text = msgspec.json.encode(directory)
    if HEADER.size + len(text) + spare * len(directory.bitmaps) > SLOT:
        raise ConfigError(
            f"the directory of {len(directory.bitmaps)} bitmaps takes {len(text)} bytes, more than there are"
        )
    return text


def write_directory(fd: int, slot: Slot, directory: Directory, *, durable: bool = True) -> Slot:
    """Both copies, first the one that does not count in ``slot``; durable on return. OSError; ConfigError, and nothing
    was written."""
    text = encode_directory(directory)
    generation = slot.generation + 1
    record = HEADER.pack(MAGIC, VERSION, len(text), generation, _crc_of(VERSION, generation, text)) + text
    for number in (1 - slot.number, slot.number):
        # Whoever dies in here leaves this copy torn, and the other whole: first as it was before the change, which
        # nobody has acted on yet, then as it is after it.
        step(f"copy {number}")
        write_all(fd, record, number * SLOT)
        step(f"copy {number} written")
        # Without this the machine could write the second copy, and tear it, before the first is on storage.
        if durable:
            sync(fd)
    return Slot(slot.number, generation, directory)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """OSError."""
    while data:
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n
