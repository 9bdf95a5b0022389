"""Numbers and layouts of the NBD protocol (NBD doc/proto.md), in the tests' own words."""

from __future__ import annotations

import struct

NBDMAGIC, IHAVEOPT, REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
REQUEST_MAGIC, SIMPLE_MAGIC, CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO, STRUCTURED_REPLY = range(1, 9)
LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = 9, 10, 11
ACK, SERVER, REP_INFO, META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_PLATFORM, ERR_TLS_REQD, ERR_UNKNOWN, ERR_SHUTDOWN = range(2**31 + 1, 2**31 + 8)
ERR_TOO_BIG = 2**31 + 9
ITEMS = {LIST: SERVER, INFO: REP_INFO, GO: REP_INFO, LIST_META_CONTEXT: META_CONTEXT, SET_META_CONTEXT: META_CONTEXT}
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES = 1, 2, 4, 8, 32, 64
SEND_DF, CAN_MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO = 128, 256, 1024, 2048
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = ERRORS = 1, 5, 12, 22, 28, 75, 95, 108
NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 0x8001, 0x8002
MAX_STRING, MAX_EXTENTS = 4096, 1 << 20
MAX_CHUNK = (64 << 20) + 64  # bytes of payload: no server of these tests is to send more in one piece


def prefixed(name: bytes | str) -> bytes:
    """A string with its length before it."""
    name = name.encode() if isinstance(name, str) else name
    return struct.pack(">I", len(name)) + name


def info_payload(name: bytes | str, *requests: int) -> bytes:
    """Of INFO and GO."""
    return prefixed(name) + struct.pack(f">H{len(requests)}H", len(requests), *requests)


def meta_payload(name: bytes | str, *queries: bytes | str) -> bytes:
    """Of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return prefixed(name) + struct.pack(">I", len(queries)) + b"".join(map(prefixed, queries))


def option_header(opt: int, length: int = 0, magic: int = IHAVEOPT) -> bytes:
    """Of an option."""
    return struct.pack(">QII", magic, opt, length)


def header(cmd: int, offset: int = 0, length: int = 0, *, flags: int = 0, handle: int = 0) -> bytes:
    """Of a request."""
    return struct.pack(">IHHQQI", REQUEST_MAGIC, flags, cmd, handle, offset, length)
