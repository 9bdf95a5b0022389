"""The content digest of a backup: SHA-256 over what it stores, whatever its format.

The unit is 65536 bytes. For every unit that the backup stores, in order of offset, a record of 40 bytes: the unit's
offset on the disk (u64, little endian), then the SHA-256 of its bytes (a short last unit: its bytes alone), or 32 zero
bytes where it is stored as zeroes. The digest is the SHA-256 of the records. A full backup stores the units that are
not all zero; an incremental or bitmap backup all units that it copied, zeroes included."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from typing import Any

import numpy as np

from cbwcore.errors import ConfigError

__all__ = ["UNIT", "ContentDigest", "Piece", "records"]

UNIT = 65536
ZERO_DIGEST = bytes(32)
ZERO_RECORD = np.dtype([("offset", "<u8"), ("digest", "V32")])
ZERO_BLOCK = 4096  # records of zeroes that are made at once
ALL_ZEROES = b"\1"  # of a piece: a record of zeroes for each unit, made when its turn comes


class Piece:
    """A range of the disk that is on its way into a backup: the ticket from `ContentDigest.begin` on."""

    __slots__ = ("_records", "length", "offset", "slot")

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.length = length
        self.slot: Any = None  # the store's: the space that a failed write took, which the next try uses
        self._records: bytes | None = None

    def __repr__(self) -> str:
        return f"<Piece {self.offset}+{self.length}>"


def records(offset: int, view: memoryview, zeroes: bytes, layered: bool) -> bytes:
    """The records of the units at ``offset`` (a multiple of the unit) with the bytes ``view``.

    ``zeroes``: a byte for each unit, 1 where it is all zeroes: those have records where ``layered``, else none."""
    parts: list[bytes] = []
    for i, zero in enumerate(zeroes):
        if zero and not layered:
            continue
        start = i * UNIT
        parts.append((offset + start).to_bytes(8, "little"))
        parts.append(ZERO_DIGEST if zero else hashlib.sha256(view[start : start + UNIT]).digest())
    return b"".join(parts)


class ContentDigest:
    """Takes the records of pieces that come in any order, and hashes them in the order of their offsets. Thread-safe.

    What waits for its turn is 40 bytes for each unit of the pieces that were begun and are not done."""

    def __init__(self, size: int, *, layered: bool) -> None:
        self.size = size
        self.layered = layered
        self._lock = threading.Lock()
        self._sha = hashlib.sha256()
        self._begun: deque[Piece] = deque()
        self._end = 0

    def begin(self, offset: int, length: int) -> Piece:
        """Announce a piece, in order of offset: whole units, but for the disk's end. ConfigError."""
        end = offset + length
        with self._lock:
            if (
                length <= 0
                or offset < self._end
                or offset % UNIT
                or end > self.size
                or (end % UNIT and end != self.size)
            ):
                raise ConfigError(
                    f"a piece at {offset} of {length} bytes: pieces are whole units of {UNIT} bytes inside "
                    f"{self.size}, begun in order of offset, the next at {self._end} or above"
                )
            piece = Piece(offset, length)
            self._begun.append(piece)
            self._end = end
        return piece

    def check(self, piece: Piece) -> None:
        """Refuse a piece that is done already. ConfigError."""
        if piece._records is not None:
            raise ConfigError(f"{piece!r} is stored already")

    def put(self, piece: Piece, found: bytes) -> None:
        """The piece is stored, with those `records`."""
        self._put(piece, found)

    def put_zeroes(self, piece: Piece) -> None:
        """The piece is stored as zeroes: where not layered, it has no records."""
        self._put(piece, ALL_ZEROES if self.layered else b"")

    @property
    def settled(self) -> int:
        """All pieces that begin below this offset are done, and no more will begin there."""
        with self._lock:
            return self._begun[0].offset if self._begun else self._end

    def hexdigest(self) -> str:
        """The digest, once all pieces are done. ConfigError before."""
        with self._lock:
            if self._begun:
                raise ConfigError(f"{self._begun[0]!r} was begun and is not stored")
            return self._sha.hexdigest()

    def _put(self, piece: Piece, records: bytes) -> None:
        with self._lock:
            self.check(piece)
            piece._records = records
            while self._begun and (found := self._begun[0]._records) is not None:
                first = self._begun.popleft()
                if found is ALL_ZEROES:
                    self._hash_zeroes(first)
                else:
                    self._sha.update(found)
                first._records = b""

    def _hash_zeroes(self, piece: Piece) -> None:
        end = piece.offset + piece.length
        for start in range(piece.offset, end, ZERO_BLOCK * UNIT):
            offsets = np.arange(start, min(end, start + ZERO_BLOCK * UNIT), UNIT, dtype="<u8")
            block = np.zeros(len(offsets), ZERO_RECORD)
            block["offset"] = offsets
            self._sha.update(block.tobytes())
