"""Reading the qcow2 images that cbwcore wrote. Nothing in the file is believed: what cannot be is a StateError.

Memory: the L1 table and a few L2 tables, whatever the file says."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

import numpy as np
import zstandard
from numpy.typing import NDArray

from cbwcore.errors import StateError
from cbwcore.images.fileio import named, read_all
from cbwcore.images.kinds import ABSENT, DATA, WINDOW, ZERO, Kinds
from cbwcore.images.qcow2 import (
    CLUSTER,
    COMPRESSED,
    COPIED,
    ENTRY_OFFSET,
    L2_ENTRIES,
    L2_SPAN,
    compressed_range,
    decode_header,
)
from cbwcore.images.qcow2 import ZERO as ZERO_ENTRY

__all__ = ["Qcow2Reader"]

assert WINDOW == L2_SPAN
TABLES = 8  # L2 tables that are kept: threads that read side by side are in the same one, or two
Words = NDArray[np.uint64]


class Qcow2Reader:
    """An image, open as ``fd`` (which stays the caller's). ``path`` is for errors. OSError, StateError."""

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self._fd = fd
        self._file_size = os.lseek(fd, 0, os.SEEK_END)
        self.header = decode_header(self._read_up_to(0, CLUSTER), path)
        self.size = self.header.size
        self._l1 = self._read_table(self.header.l1_offset, self.header.l1_size)
        self._local = threading.local()  # a decompressor for each thread
        self._lock = threading.Lock()
        self._tables: OrderedDict[int, Words] = OrderedDict()  # guarded by _lock

    def windows(self) -> list[int]:
        """The windows in which anything is stored, in order."""
        found: list[int] = np.flatnonzero(self._l1).tolist()
        return found

    def kinds(self, window: int) -> Kinds:
        """What is stored of each cluster of a window of 512 MiB. StateError."""
        table = self._table(window)
        count = min(L2_ENTRIES, -(-(self.size - window * L2_SPAN) // CLUSTER))
        found: Kinds = np.full(count, ABSENT, np.uint8)
        if table is not None:
            part = table[:count]
            found[part != 0] = DATA
            found[part == ZERO_ENTRY] = ZERO
        return found

    def read_into(self, view: memoryview, offset: int) -> None:
        """Read stored data from ``offset`` (whole clusters, but for the end). OSError, StateError."""
        position = 0
        while position < len(view):
            entry = self._entry(offset + position)
            if entry & COMPRESSED:
                end = min(position + CLUSTER, len(view))
                view[position:end] = self._decompressed(entry)[: end - position]
                position = end
                continue
            place = entry & ENTRY_OFFSET
            end = position + CLUSTER
            while end < len(view) and self._entry(offset + end) == (place + end - position) | COPIED:
                end += CLUSTER
            end = min(end, len(view))
            with named(self.path):
                self._read_plain(view[position:end], place)
            position = end

    def _read_plain(self, view: memoryview, place: int) -> None:
        """A short last cluster may be at the file's very end: what is missing are zeroes."""
        inside = max(min(len(view), self._file_size - place), 0)
        read_all(self._fd, view[:inside], place)
        view[inside:] = bytes(len(view) - inside)

    def _decompressed(self, entry: int) -> bytes:
        place, length = compressed_range(entry)
        data = self._read_up_to(place, length)
        decompressor = getattr(self._local, "decompressor", None)
        if decompressor is None:
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor(max_window_size=2 * CLUSTER)
        try:
            if zstandard.frame_content_size(data) != CLUSTER:  # before that much is allocated
                raise StateError(f"{self.path} is damaged: the cluster compressed at {place} is of another size")
            plain: bytes = decompressor.decompress(data)
        except zstandard.ZstdError as e:
            raise StateError(f"{self.path} is damaged: the cluster compressed at {place}: {e}") from e
        return plain

    def _entry(self, offset: int) -> int:
        table = self._table(offset // L2_SPAN)
        entry = 0 if table is None else int(table[offset % L2_SPAN // CLUSTER])
        if entry in (0, ZERO_ENTRY):
            raise StateError(f"{self.path} has no data at {offset}")
        return entry

    def _table(self, index: int) -> Words | None:
        """A checked L2 table; None where there is none."""
        entry = int(self._l1[index])
        if entry == 0:
            return None
        with self._lock:
            table = self._tables.get(index)
        if table is not None:
            return table
        offset = entry & ENTRY_OFFSET
        if entry != offset | COPIED:
            raise StateError(f"{self.path} is damaged: L1 entry {index} is {entry:#x}")
        table = self._read_table(offset, L2_ENTRIES)
        self._check_table(table, index)
        with self._lock:
            self._tables[index] = table
            while len(self._tables) > TABLES:
                self._tables.popitem(last=False)
        return table

    def _check_table(self, table: Words, index: int) -> None:
        """Refuse entries that this cbwcore does not write, and such that point outside of the file."""
        compressed = (table & np.uint64(COMPRESSED)) != 0
        place = table & np.uint64(ENTRY_OFFSET)
        plain_ok = (
            (table == (place | np.uint64(COPIED)))
            & (place % np.uint64(CLUSTER) == 0)
            & (place > 0)
            & (place < np.uint64(self._file_size))
        )
        start = table & np.uint64((1 << 54) - 1)
        compressed_ok = (
            ((table & np.uint64(COPIED)) == 0)
            & (start >= np.uint64(CLUSTER))
            & (start < np.uint64(self._file_size))
            & self.header.zstd
        )
        good = np.where(compressed, compressed_ok, plain_ok) | (table == 0) | (table == np.uint64(ZERO_ENTRY))
        beyond = -(-(self.size - index * L2_SPAN) // CLUSTER)
        good[beyond:] = table[beyond:] == 0
        if not good.all():
            bad = int(np.argmin(good))
            raise StateError(f"{self.path} is damaged: L2 entry {bad} of table {index} is {int(table[bad]):#x}")

    def _read_table(self, offset: int, entries: int) -> Words:
        if offset % CLUSTER or offset + entries * 8 > self._file_size or (entries and offset < CLUSTER):
            raise StateError(f"{self.path} is damaged: a table at {offset} of {entries} entries")
        return np.frombuffer(self._read_up_to(offset, entries * 8), ">u8").astype(np.uint64)

    def _read_up_to(self, offset: int, length: int) -> bytes:
        """Bytes of the file, fewer only at its end."""
        data = bytearray(max(min(length, self._file_size - offset), 0))
        with named(self.path):
            read_all(self._fd, memoryview(data), offset)
        return bytes(data)
