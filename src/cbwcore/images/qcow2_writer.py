"""Writing a qcow2 image from its front to its end, without ever reading it.

Space is taken under a small lock, in whole clusters, or for compressed clusters in bytes; compressing and writing are
outside of it. What is held in memory: the L2 tables (each for 512 MiB of the disk) that pieces are still to come for,
and the refcount blocks (each for 2 GiB of the file) in which something is under way. They are written as soon as they
are final, the rest and the header in the end: a file without its header is no qcow2 image."""

from __future__ import annotations

import os
import threading

import numpy as np
import zstandard
from numpy.typing import NDArray

from cbwcore.errors import ConfigError
from cbwcore.images.digest import Piece
from cbwcore.images.fileio import sync, write_all, writev_all
from cbwcore.images.qcow2 import (
    CLUSTER,
    COPIED,
    L2_ENTRIES,
    L2_SPAN,
    MAX_NAME,
    MAX_SIZE,
    REFCOUNTS,
    ZERO,
    Header,
    compressed_entry,
    encode_header,
    l1_entries,
    virtual_size,
)
from cbwcore.images.raw_output import data_runs

__all__ = ["Qcow2Writer", "backing_name"]

LEVEL = 1  # of zstd: see docs/backup.md for what it costs and saves
Words = NDArray[np.uint64]


def backing_name(image: str, backing: str) -> bytes:
    """How ``image`` names ``backing``: relative to its own folder, and never such that QEMU takes it for a protocol.

    ConfigError where that is longer than an image can record."""
    folder = os.path.realpath(os.path.dirname(os.path.abspath(image)))
    name = os.fsencode(os.path.relpath(os.path.realpath(backing), folder))
    if b":" in name.split(b"/", 1)[0]:
        name = b"./" + name
    if len(name) > MAX_NAME:
        raise ConfigError(f"the name of the backing file {backing} from {folder} is longer than {MAX_NAME} bytes")
    return name


class Refcounts:
    """How often each host cluster is used: blocks of 32768 counts. Under the writer's lock."""

    def __init__(self) -> None:
        self.blocks: dict[int, NDArray[np.uint16]] = {}
        self.table: dict[int, int] = {}
        """Where the blocks that are written are in the file."""

    def add(self, first: int, count: int) -> None:
        """One use of each of ``count`` clusters."""
        end = first + count
        while first < end:
            block, start = divmod(first, REFCOUNTS)
            stop = min(REFCOUNTS, start + end - first)
            if block not in self.blocks:
                self.blocks[block] = np.zeros(REFCOUNTS, ">u2")
            self.blocks[block][start:stop] += 1
            first += stop - start


class Table:
    """An L2 table on its way, and its place in the file, once it has one (0: not yet)."""

    __slots__ = ("entries", "place")

    def __init__(self) -> None:
        self.entries: Words = np.zeros(L2_ENTRIES, ">u8")
        self.place = 0


class Blob:
    """A guest cluster's bytes as they are to be stored."""

    __slots__ = ("data", "index", "place", "whole")

    def __init__(self, index: int, data: memoryview | bytes, whole: bool) -> None:
        self.index = index  # of the guest cluster within its piece
        self.data = data
        self.whole = whole  # it has a host cluster of its own; else it is compressed
        self.place = 0  # bytes into the file


class Qcow2Writer:
    """A qcow2 image for a disk of ``size`` bytes in the empty file ``fd``. ``backing``: the name to record, as bytes.

    ConfigError where it is too large for the format."""

    def __init__(
        self,
        fd: int,
        size: int,
        *,
        compress: str | None,
        layered: bool,
        backing: bytes | None,
        backing_format: str | None,
    ) -> None:
        if size > MAX_SIZE:
            raise ConfigError(f"{size} bytes are more than a qcow2 image can have, {MAX_SIZE}")
        self._fd = fd
        self._size = size
        self._compress = compress is not None
        self._layered = layered
        self._backing = backing
        self._backing_format = backing_format
        self._local = threading.local()  # a compressor for each thread
        self._header = b""
        self._lock = threading.Lock()  # guards all below
        self._end = 1  # the next free host cluster; the first is the header's
        self._tail = 0  # where in the file the last compressed cluster ends
        self._under_way: dict[int, int] = {}  # offset of a piece: the first host cluster that it has
        self._l1: Words = np.zeros(l1_entries(size), ">u8")
        self._tables: dict[int, Table] = {}
        self._refcounts = Refcounts()
        self._refcounts.add(0, 1)

    def begin(self, piece: Piece) -> None:
        """A piece will come."""

    def write(self, piece: Piece, view: memoryview, zeroes: bytes) -> None:
        """Store a piece; zeroes, where layered, as zeroes. Thread-safe. OSError: again with the same piece."""
        blobs = self._compressed(view, zeroes) if self._compress else []
        if blobs and not all(blob.whole for blob in blobs):
            self._write_blobs(piece, blobs, zeroes)
        else:
            self._write_plain(piece, view, zeroes)

    def write_zeroes(self, piece: Piece) -> None:
        """Store a piece of zeroes; nothing where not layered. Thread-safe."""
        if not self._layered:
            return
        first, end = piece.offset // CLUSTER, -(-(piece.offset + piece.length) // CLUSTER)
        while first < end:  # a table at a time: those that it fills are written at once
            stop = min(end, (first // L2_ENTRIES + 1) * L2_ENTRIES)
            with self._lock:
                self._map(first, np.full(stop - first, ZERO, ">u8"))
                full = [first // L2_ENTRIES] if stop - first == L2_ENTRIES else []
            self._write_tables(full)
            first = stop

    def settle(self, offset: int) -> None:
        """All pieces below ``offset`` are stored: write the tables that are final. OSError: again, later."""
        with self._lock:
            tables = [index for index in self._tables if (index + 1) * L2_SPAN <= offset]
            blocks = self._final_blocks() if len(self._refcounts.blocks) > 1 else []
        self._write_tables(tables)
        self._write_blocks(blocks)

    def seal(self, backup_id: str) -> int:
        """Write the tables that are left, make all durable; the file's bytes."""
        self._write_tables(sorted(self._tables))
        with self._lock:
            l1_offset = self._take(-(-self._l1.nbytes // CLUSTER)) * CLUSTER if len(self._l1) else 0
        write_all(self._fd, memoryview(self._l1.tobytes()), l1_offset)
        refcount_offset, refcount_clusters = self._write_refcounts()
        os.ftruncate(self._fd, self._end * CLUSTER)
        self._header = encode_header(
            Header(
                size=virtual_size(self._size),
                l1_size=len(self._l1),
                l1_offset=l1_offset,
                refcount_offset=refcount_offset,
                refcount_clusters=refcount_clusters,
                zstd=self._compress,
                backing=self._backing,
                backing_format=self._backing_format,
                backup_id=backup_id,
            )
        )
        sync(self._fd)
        return self._end * CLUSTER

    def complete(self) -> None:
        """Write the header, durably."""
        write_all(self._fd, memoryview(self._header), 0)
        sync(self._fd)

    def spoil(self) -> None:
        """Take the header back."""
        write_all(self._fd, memoryview(bytes(CLUSTER)), 0)

    # ---- data ----

    def _write_plain(self, piece: Piece, view: memoryview, zeroes: bytes) -> None:
        """The data clusters of a piece, one after the other, in one write."""
        count = zeroes.count(0)
        entries: Words = np.where(np.frombuffer(zeroes, np.uint8), ZERO if self._layered else 0, 0).astype(">u8")
        if count:
            if piece.slot is None:
                with self._lock:
                    first = self._take(count, counted=False)
                    self._under_way[piece.offset] = first
                piece.slot = first
            first = piece.slot
            writev_all(self._fd, [run for _, run in data_runs(view, zeroes)], first * CLUSTER)
            places = np.arange(first, first + count, dtype=np.uint64) * np.uint64(CLUSTER)
            entries[np.frombuffer(zeroes, np.uint8) == 0] = places | np.uint64(COPIED)
        with self._lock:
            if count:
                self._refcounts.add(piece.slot, count)
                del self._under_way[piece.offset]
            self._map(piece.offset // CLUSTER, entries)

    def _compressed(self, view: memoryview, zeroes: bytes) -> list[Blob]:
        """The data clusters of a piece, compressed where that makes them smaller."""
        compressor = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = self._local.compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
        blobs = []
        for index, zero in enumerate(zeroes):
            if zero:
                continue
            data: memoryview | bytes = view[index * CLUSTER : (index + 1) * CLUSTER]
            if len(data) < CLUSTER:
                data = bytes(data) + bytes(CLUSTER - len(data))
            small = compressor.compress(data)
            blobs.append(Blob(index, small, False) if len(small) < CLUSTER else Blob(index, data, True))
        return blobs

    def _write_blobs(self, piece: Piece, blobs: list[Blob], zeroes: bytes) -> None:
        if piece.slot is None:
            with self._lock:
                self._under_way[piece.offset] = self._place(blobs)
            piece.slot = [blob.place for blob in blobs]
        for blob, place in zip(blobs, piece.slot, strict=True):  # compressing again gives the same bytes
            blob.place = place
        self._write_runs(sorted(blobs, key=lambda blob: blob.place))
        entries: Words = np.where(np.frombuffer(zeroes, np.uint8), ZERO if self._layered else 0, 0).astype(">u8")
        with self._lock:
            for blob in blobs:
                length = CLUSTER if blob.whole else len(blob.data)
                first, last = blob.place // CLUSTER, (blob.place + length - 1) // CLUSTER
                self._refcounts.add(first, last + 1 - first)
                entries[blob.index] = blob.place | COPIED if blob.whole else compressed_entry(blob.place, length)
            self._map(piece.offset // CLUSTER, entries)
            del self._under_way[piece.offset]

    def _place(self, blobs: list[Blob]) -> int:
        """Give each blob its place; the first host cluster that is touched. Under the lock."""
        for blob in blobs:
            if not blob.whole:
                blob.place = self._take_bytes(len(blob.data))
        for blob in blobs:
            if blob.whole:
                blob.place = self._take(1, counted=False) * CLUSTER
        return min(blob.place for blob in blobs) // CLUSTER

    def _write_runs(self, blobs: list[Blob]) -> None:
        """Write blobs, in order of place; neighbours go out together."""
        first = 0
        while first < len(blobs):
            end, position = first, blobs[first].place
            while end < len(blobs) and blobs[end].place == position:
                position += len(blobs[end].data)
                end += 1
            writev_all(self._fd, [blob.data for blob in blobs[first:end]], blobs[first].place)
            first = end

    # ---- space; under the lock ----

    def _take(self, count: int, *, counted: bool = True) -> int:
        """The next ``count`` host clusters; the first of them."""
        first = self._end
        self._end += count
        if counted:
            self._refcounts.add(first, count)
        return first

    def _take_bytes(self, length: int) -> int:
        """Space for a compressed cluster, behind the last one if it fits or the clusters after that are free."""
        rest = -self._tail % CLUSTER
        if length > rest and self._tail + rest != self._end * CLUSTER:
            self._tail = self._end * CLUSTER
        place = self._tail
        self._tail += length
        self._end = max(self._end, -(-self._tail // CLUSTER))
        return place

    def _map(self, first: int, entries: Words) -> None:
        """Set the L2 entries of guest clusters from ``first`` on."""
        done = 0
        while done < len(entries):
            index, start = divmod(first + done, L2_ENTRIES)
            count = min(L2_ENTRIES - start, len(entries) - done)
            part = entries[done : done + count]
            if index in self._tables or part.any():
                table = self._tables.setdefault(index, Table())
                table.entries[start : start + count] = part
            done += count

    def _final_blocks(self) -> list[int]:
        """The refcount blocks that no use can be added to."""
        lowest = min([self._end, *self._under_way.values()])
        if self._tail % CLUSTER:
            lowest = min(lowest, self._tail // CLUSTER)
        return [block for block in self._refcounts.blocks if (block + 1) * REFCOUNTS <= lowest]

    # ---- tables ----

    def _write_tables(self, indices: list[int]) -> None:
        for index in indices:
            with self._lock:
                table = self._tables.pop(index, None)
                if table is None:  # another thread has it
                    continue
                if table.place == 0:
                    table.place = self._take(1) * CLUSTER
            try:
                write_all(self._fd, memoryview(table.entries.tobytes()), table.place)
            except BaseException:
                with self._lock:
                    self._tables[index] = table
                raise
            self._l1[index] = table.place | COPIED

    def _write_blocks(self, blocks: list[int]) -> None:
        for block in blocks:
            with self._lock:
                counts = self._refcounts.blocks.pop(block, None)
                if counts is None:
                    continue
                place = self._refcounts.table.get(block) or self._take(1) * CLUSTER
                self._refcounts.table[block] = place
            try:
                write_all(self._fd, memoryview(counts.tobytes()), place)
            except BaseException:
                with self._lock:
                    self._refcounts.blocks[block] = counts
                raise

    def _write_refcounts(self) -> tuple[int, int]:
        """The refcount blocks that are left, their own clusters counted, and the table: its offset and clusters."""
        table = self._refcounts.table
        clusters, before = self._end, -1
        while clusters != before:
            before = clusters
            blocks = -(-clusters // REFCOUNTS)
            missing = [block for block in range(blocks) if block not in table or block in self._refcounts.blocks]
            new = sum(block not in table for block in missing)
            table_clusters = -(-blocks * 8 // CLUSTER)
            clusters = self._end + new + table_clusters
        with self._lock:
            first = self._take(clusters - self._end)
            for block in missing:
                if block not in table:
                    table[block], first = first * CLUSTER, first + 1
        self._write_blocks(missing)
        offsets = np.array([table[block] for block in range(blocks)], ">u8")
        write_all(self._fd, memoryview(offsets.tobytes()), first * CLUSTER)
        return first * CLUSTER, table_clusters
