"""Inputs of the transmission fuzzer, in Python: what session.pxd says, so that recorded sessions become inputs, and
inputs can be replayed against the installed package."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import nbd_protocol as nbd

HEAD = 5  # bytes before the requests
SAMPLE = 8  # bytes of a WRITE's payload that an input has; they are repeated
CLUSTER = 1 << 12
SIZE = 160 * CLUSTER + 1000
DIRTY = 1 << 12  # granularity of the bitmap that is exported
MAX_REQUEST, MAX_DRAIN = 256 << 10, 512 << 10
MAX_REQUESTS, MAX_SENT, MAX_RECEIVED = 200, 1 << 20, 4 << 20

DISK, READ_ONLY_DISK, SNAPSHOT, COPYING_DISK = range(4)
HALF_CLOSE, VANISH, STOP, STALL = range(4)
LEAVES = (HALF_CLOSE,) * 5 + (VANISH, STOP, STALL)
PIECES = (1, 7, 28, 29, 4096, 65536, 131072, 131073)
EXTENTS = (1 << 17, 1, 2, 5)
BASE, BITMAP = "base:allocation", "qemu:dirty-bitmap:b"
CONTEXTS = ((), (BASE,), (BASE, BITMAP), (BITMAP, BASE))

DISCONNECTED, GONE, MAGIC, OVERSIZED = "disconnected by the client", "gone", "bad magic", "oversized request"
HEADER = struct.Struct(">IHHQQI")


def t0() -> bytes:
    """What the disk holds: of five clusters three have data without a zero byte, one is a hole, one is of zeroes."""
    content = bytearray(SIZE)
    for i in range(SIZE):
        if i // CLUSTER % 5 < 3:
            content[i] = 1 + ((i + 1) * 0x9E3779B97F4A7C15 % (1 << 64) >> 40) % 255
    return bytes(content)


def is_hole(cluster: int) -> bool:
    """Whether the disk has a hole there."""
    return cluster % 5 == 3


def is_dirty(block: int) -> bool:
    """A bit of the bitmap that is exported."""
    return block * 7 % 5 < 2


@dataclass
class Request:
    """One of a session. ``payload``: as far as it was sent; ``whole``: that is all of it."""

    flags: int
    cmd: int
    handle: int
    offset: int
    length: int
    payload: bytes = b""
    whole: bool = True

    @property
    def changes(self) -> bool:
        return self.cmd in (nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM)


@dataclass
class Session:
    """An input taken apart. ``wire``: what the client sends; ``end``: how serve() must say that it ended."""

    kind: int
    structured: bool
    discard: bool
    contexts: tuple[str, ...]
    extents: int
    piece: int
    leave: int
    cut: int
    tight: bool
    wire: bytearray = field(default_factory=bytearray)
    requests: list[Request] = field(default_factory=list)
    end: str = GONE
    ragged: bool = False


def head(kind: int, structured: bool, contexts: tuple[str, ...], *, discard: bool = False) -> bytes:
    """Of a session whose client sends all, and reads all."""
    return bytes([kind | structured << 2 | discard << 3 | CONTEXTS.index(contexts) << 4, 0, 0, 0, 0])


def pack(start: bytes, wire: bytes) -> bytes:
    """The input for a session that was recorded, of whole requests."""
    out, at = bytearray(start), 0
    while len(wire) - at >= HEADER.size:
        _, _, cmd, _, _, length = HEADER.unpack_from(wire, at)
        stored = HEADER.size + (min(length, SAMPLE) if cmd == nbd.WRITE else 0)
        out += wire[at : at + stored]
        at += HEADER.size + (length if cmd == nbd.WRITE else 0)
    return bytes(out)


def split(data: bytes) -> list[bytes]:
    """The requests of an input, as they are stored; the last may be something else."""
    parts, at = [], HEAD
    while at < len(data):
        size = HEADER.size
        if len(data) - at >= size and int.from_bytes(data[at + 6 : at + 8]) == nbd.WRITE:
            size += min(int.from_bytes(data[at + 24 : at + 28]), SAMPLE)
        parts.append(data[at : at + size])
        at += size
    return parts


def parse(data: bytes) -> Session | None:
    """An input; None where there is not even a head."""
    if len(data) < HEAD:
        return None
    structured = bool(data[0] & 4)
    session = Session(
        kind=data[0] & 3,
        structured=structured,
        discard=bool(data[0] & 8),
        contexts=CONTEXTS[data[0] >> 4 & 3] if structured else (),
        extents=EXTENTS[data[0] >> 6],
        piece=PIECES[data[1] & 7] if data[1] & 8 else MAX_SENT,
        leave=LEAVES[data[1] >> 4 & 7],
        cut=0,
        tight=bool(data[4] & 4),
    )
    _parse_requests(session, data[HEAD:])
    session.cut = len(session.wire) * (data[2] + 1) // 256
    return session


def _parse_requests(session: Session, data: bytes) -> None:
    received = 0
    while len(data) >= HEADER.size:
        magic, flags, cmd, handle, offset, length = HEADER.unpack_from(data)
        if magic != nbd.REQUEST_MAGIC:
            session.end = MAGIC
            _put_rest(session, data)
            return
        count = len(session.requests)
        request = Request(flags, cmd, handle & ~0xFFFFFFFF | count, offset, length)
        received += 1024 + (length if cmd == nbd.READ and length <= MAX_REQUEST else 0)
        received += 2048 + length // 256 if cmd == nbd.BLOCK_STATUS and length <= SIZE else 0
        payload = length if cmd == nbd.WRITE and length <= MAX_DRAIN else 0
        if count == MAX_REQUESTS or received > MAX_RECEIVED:
            return
        if len(session.wire) + 2 * HEADER.size + payload > MAX_SENT:
            return
        session.wire += HEADER.pack(magic, flags, cmd, request.handle, offset, length)
        data = data[HEADER.size :]
        if cmd == nbd.DISC or (cmd == nbd.WRITE and length > MAX_DRAIN):
            session.end = DISCONNECTED if cmd == nbd.DISC else OVERSIZED
            _put_rest(session, data)
            return
        session.requests.append(request)
        if cmd == nbd.WRITE:
            data = _put_payload(session, request, data)
            if not request.whole:
                session.ragged = True
                return
    session.ragged = bool(data)
    _put_rest(session, data)


def _put_rest(session: Session, data: bytes) -> None:
    session.wire += data[: MAX_SENT - len(session.wire)]


def _put_payload(session: Session, request: Request, data: bytes) -> bytes:
    """The payload on the wire; what is left of the input."""
    sample = data[: min(request.length, SAMPLE)]
    request.whole = len(sample) == min(request.length, SAMPLE)
    request.payload = sample
    if request.whole and request.length:
        request.payload = (sample * -(-request.length // len(sample)))[: request.length]
    session.wire += request.payload
    return data[len(sample) :]
