"""A bitmap in a file of its own: JSON that says of itself what it is, to be carried elsewhere or looked at."""

from __future__ import annotations

import contextlib
import os

import google_crc32c
import msgspec

from cbwcore.bitmaps import DirtyBitmap
from cbwcore.errors import ConfigError, StateError

__all__ = ["read_bitmap", "write_bitmap"]

FORMAT = "cbwcore-bitmap"
VERSION = 1


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """``ranges``: what is marked, (offset, length) in bytes. ``crc32c``: of all this with 0 in its place, as compact
    JSON in this order."""

    format: str
    version: int
    name: str
    size: int
    granularity: int
    ranges: list[tuple[int, int]]
    crc32c: int = 0


def _checksum(content: _File) -> int:
    crc: int = google_crc32c.value(msgspec.json.encode(msgspec.structs.replace(content, crc32c=0)))
    return crc


def write_bitmap(bitmap: DirtyBitmap, path: str) -> None:
    """Make the file, durable on return. OSError, FileExistsError among them; then there is none. StateError of the
    bitmap."""
    content = _File(FORMAT, VERSION, bitmap.name, bitmap.size, bitmap.granularity, list(bitmap.ranges()))
    content.crc32c = _checksum(content)
    data = msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"
    with contextlib.ExitStack() as undo, open(path, "xb") as f:
        undo.callback(os.unlink, path)
        try:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        except OSError as e:
            raise OSError(e.errno, e.strerror, path) from None
        undo.pop_all()


def read_bitmap(path: str, size: int) -> DirtyBitmap:
    """The bitmap, in memory. OSError; StateError where the file is damaged; ConfigError where it is of another size."""
    with open(path, "rb") as f:
        data = f.read()
    try:
        content = msgspec.json.decode(data, type=_File)
    except msgspec.DecodeError as e:
        raise StateError(f"{path} is no bitmap that cbwcore has exported, or damaged: {e}") from None
    if content.format != FORMAT or content.version != VERSION:
        raise StateError(f"{path} is {content.format!r} version {content.version}, not {FORMAT!r} version {VERSION}")
    if content.crc32c != _checksum(content):
        raise StateError(f"{path} is damaged: its checksum is wrong")
    if content.size != size:
        raise ConfigError(f"{path} is of a disk of {content.size} bytes, and this one has {size}")
    bitmap = DirtyBitmap(content.size, content.granularity, name=content.name)
    for offset, length in content.ranges:
        bitmap.set_range(offset, length)
    return bitmap
