"""What a server exports: disks and snapshots by name, and the metadata contexts of each."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from cbwcore.bitmaps import DirtyBitmap
from cbwcore.disk import Disk
from cbwcore.errors import ConfigError
from cbwcore.nbd import protocol as nbd
from cbwcore.options import check_name
from cbwcore.policy import SnapshotState
from cbwcore.snapshot import Snapshot

__all__ = ["Export", "Exports"]

PREFERRED_BLOCK = 4096
READ_ONLY_FLAGS = (
    nbd.NBD_FLAG_HAS_FLAGS | nbd.NBD_FLAG_READ_ONLY | nbd.NBD_FLAG_SEND_CACHE | nbd.NBD_FLAG_CAN_MULTI_CONN
)
WRITABLE_FLAGS = (
    nbd.NBD_FLAG_HAS_FLAGS
    | nbd.NBD_FLAG_SEND_FLUSH
    | nbd.NBD_FLAG_SEND_FUA
    | nbd.NBD_FLAG_SEND_TRIM
    | nbd.NBD_FLAG_SEND_WRITE_ZEROES
    | nbd.NBD_FLAG_SEND_FAST_ZERO
    | nbd.NBD_FLAG_SEND_CACHE
    | nbd.NBD_FLAG_CAN_MULTI_CONN
)


class Export:
    """One disk or snapshot under one name; it does not change once made.

    ``name``: up to 1023 bytes of UTF-8 without NUL, and may be empty. ``writable``: of a disk that is not read-only.
    ``bitmaps``: `DirtyBitmap`s as large as the source, or names of its disk's. ``discard``: TRIM of a snapshot gives
    up what it covers (reclaim). ``description``: for people, up to 4096 bytes. ConfigError; StateError for
    an inconsistent bitmap; ValueError after close.
    """

    def __init__(
        self,
        name: str,
        source: Disk | Snapshot,
        *,
        writable: bool = False,
        bitmaps: Iterable[DirtyBitmap | str] = (),
        discard: bool = False,
        description: str = "",
    ) -> None:
        self.name = name if name == "" else check_name(name)
        self.source = _checked_source(name, source)
        if writable and isinstance(source, Snapshot):
            raise ConfigError(f"export {name!r} is of a snapshot and cannot be writable")
        if writable and isinstance(source, Disk) and source.read_only:
            raise ConfigError(f"export {name!r} cannot be writable: disk {source.path} is open read-only")
        if discard and not isinstance(source, Snapshot):
            raise ConfigError(f"export {name!r}: discard is for snapshots, and this is of a disk")
        self.writable = writable
        self.discard = discard
        self.description = _checked_description(name, description)
        self.bitmaps = dict(_checked_bitmaps(name, source, bitmaps))

    def __repr__(self) -> str:
        return f"<Export {self.name!r} of {self.source!r}, {'writable' if self.writable else 'read-only'}>"

    @property
    def size(self) -> int:
        """Bytes."""
        return self.source.size

    @property
    def contexts(self) -> dict[str, DirtyBitmap | None]:
        """The metadata contexts by name; None is base:allocation."""
        return {
            nbd.BASE_ALLOCATION: None,
            **{nbd.QEMU_DIRTY_BITMAP + name: bitmap for name, bitmap in self.bitmaps.items()},
        }

    def transmission_flags(self, structured: bool) -> int:
        """For a connection with, or without, structured replies."""
        flags = WRITABLE_FLAGS if self.writable else READ_ONLY_FLAGS
        if self.discard:
            flags |= nbd.NBD_FLAG_SEND_TRIM
        if structured:
            flags |= nbd.NBD_FLAG_SEND_DF
        return flags

    def block_sizes(self, request: int) -> tuple[int, int, int]:
        """(minimum, preferred, maximum) bytes of a request, where the server takes up to ``request``."""
        disk = self.source if isinstance(self.source, Disk) else self.source.disk
        align = disk._file.align
        return 1, align if PREFERRED_BLOCK < align <= request else PREFERRED_BLOCK, request


def _checked_source(name: str, source: object) -> Disk | Snapshot:
    if isinstance(source, Disk):
        source._check_open()
        return source
    if not isinstance(source, Snapshot):
        raise ConfigError(f"export {name!r} is of a Disk or a Snapshot, not of a {type(source).__name__}")
    if source.state == SnapshotState.CLOSED:
        raise ValueError(f"snapshot {source.name!r} is closed")
    return source


def _checked_description(name: str, text: str) -> str:
    if not isinstance(text, str):
        raise ConfigError(f"export {name!r}: description {text!r} is no string")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"export {name!r}: description {text!r} is no UTF-8 text") from None
    if size > nbd.NBD_MAX_STRING or "\0" in text:
        raise ConfigError(f"export {name!r}: a description of {size} bytes is over {nbd.NBD_MAX_STRING}, or has a NUL")
    return text


def _checked_bitmaps(
    name: str, source: Disk | Snapshot, bitmaps: Iterable[DirtyBitmap | str]
) -> Iterator[tuple[str, DirtyBitmap]]:
    disk = source if isinstance(source, Disk) else source.disk
    seen = set()
    for each in bitmaps:
        if isinstance(each, str) and each not in disk.bitmaps:
            raise ConfigError(f"export {name!r}: disk {disk.path} has no bitmap {each!r}")
        bitmap = disk.bitmaps[each] if isinstance(each, str) else each
        if not isinstance(bitmap, DirtyBitmap):
            raise ConfigError(f"export {name!r}: a bitmap is a DirtyBitmap or a name, not a {type(each).__name__}")
        if bitmap.size != source.size:
            raise ConfigError(
                f"export {name!r}: bitmap {bitmap.name!r} is of {bitmap.size} bytes, the export of {source.size}"
            )
        bitmap._check_consistent()
        if check_name(bitmap.name) in seen:
            raise ConfigError(f"export {name!r} has two bitmaps {bitmap.name!r}")
        seen.add(bitmap.name)
        yield bitmap.name, bitmap


class Exports:
    """The exports of a server by name, in the order they were added. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_name: dict[str, Export] = {}

    def __iter__(self) -> Iterator[Export]:
        with self._lock:
            return iter(tuple(self._by_name.values()))

    def names(self) -> tuple[str, ...]:
        """Of all that are there now, the first one added first."""
        return tuple(export.name for export in self)

    def find(self, name: str) -> Export | None:
        """The export of that name, or None; "" is, where none has that name, the first one added.

        It may be removed at any moment after."""
        with self._lock:
            if name in self._by_name or name:
                return self._by_name.get(name)
            return next(iter(self._by_name.values()), None)

    def add(self, export: Export) -> None:
        """ConfigError where the name is taken."""
        with self._lock:
            if export.name in self._by_name:
                raise ConfigError(f"there is an export {export.name!r} already")
            self._by_name[export.name] = export

    def remove(self, name: str) -> Export:
        """Forget the export of exactly that name, and return it. ConfigError where there is none."""
        with self._lock:
            if name not in self._by_name:
                raise ConfigError(f"there is no export {name!r}")
            return self._by_name.pop(name)
