"""The raw client itself: it accepts what the protocol allows, and sees every breach of it that it is there to see."""

import contextlib
import socket
import struct

import nbd_protocol as nbd
import pytest
from nbd_support import Client, Disconnected, ProtocolError

BASE = 7  # the id of its one context
SIZE = 1 << 20


def simple(error=0, handle=1, data=b"", magic=nbd.SIMPLE_MAGIC):
    return struct.pack(">IIQ", magic, error, handle) + data


def chunk(kind, payload=b"", *, done=1, handle=1):
    return struct.pack(">IHHQI", nbd.CHUNK_MAGIC, done, kind, handle, len(payload)) + payload


def data(offset, content, done=1):
    return chunk(nbd.OFFSET_DATA, struct.pack(">Q", offset) + content, done=done)


def hole(offset, length, done=1):
    return chunk(nbd.OFFSET_HOLE, struct.pack(">QI", offset, length), done=done)


def status(*extents, context=BASE, done=1):
    return chunk(
        nbd.STATUS, struct.pack(f">I{2 * len(extents)}I", context, *(n for e in extents for n in e)), done=done
    )


def error(code, text=b"", *, length=None, done=1):
    return chunk(nbd.ERROR, struct.pack(">IH", code, len(text) if length is None else length) + text, done=done)


def option_reply(opt, kind, payload=b"", magic=nbd.REPLY_MAGIC):
    return struct.pack(">QIII", magic, opt, kind, len(payload)) + payload


@pytest.fixture
def scripted():
    """``scripted(bytes, structured=...)``: a client whose server sends just these, and closes."""
    with contextlib.ExitStack() as undo:

        def scripted(script, *, structured=True):
            ours, theirs = socket.socketpair()
            client = undo.enter_context(Client(ours, timeout=5))
            client.size, client.structured, client.contexts = SIZE, structured, {BASE: "base:allocation"}
            theirs.sendall(script)
            theirs.shutdown(socket.SHUT_WR)
            undo.callback(theirs.close)
            return client

        yield scripted


GOOD = [
    (nbd.READ, 4, False, simple(data=b"abcd"), b"abcd"),
    (nbd.READ, 4, False, simple(nbd.EIO), b""),
    (nbd.READ, 4, True, data(0, b"abcd"), b"abcd"),
    (nbd.READ, 4, True, data(2, b"cd", done=0) + data(0, b"ab"), b"abcd"),
    (nbd.READ, 4, True, hole(0, 2, done=0) + data(2, b"cd", done=0) + chunk(nbd.NONE), b"\0\0cd"),
    (nbd.READ, 4, True, error(nbd.EIO, b"no"), b""),
    (nbd.READ, 0, True, chunk(nbd.NONE), b""),
    (nbd.WRITE, 4, True, simple(), b""),
    (nbd.WRITE, 4, True, error(nbd.EPERM), b""),
    (nbd.BLOCK_STATUS, 4, True, status((3, 0), (5, 3)), b""),
]


@pytest.mark.parametrize(("cmd", "length", "structured", "script", "expected"), GOOD)
def test_what_the_protocol_allows_is_accepted(scripted, cmd, length, structured, script, expected):
    client = scripted(script, structured=structured)
    assert bytes(client.call(cmd, 0, length).data) == expected
    assert client.pending == {}
    assert client.dropped() == b""


BAD = {
    "magic": (nbd.READ, 4, simple(magic=nbd.REQUEST_MAGIC)),
    "an unknown handle": (nbd.WRITE, 4, simple(handle=2)),
    "a second reply": (nbd.WRITE, 4, simple() * 2),
    "an errno outside the list": (nbd.WRITE, 4, simple(13)),
    "ENOTSUP without FAST_ZERO": (nbd.WRITE, 4, simple(nbd.ENOTSUP)),
    "a simple reply to READ": (nbd.READ, 4, simple(data=b"abcd")),
    "a simple error to READ": (nbd.READ, 4, simple(nbd.EINVAL)),
    "BLOCK_STATUS without a status": (nbd.BLOCK_STATUS, 4, chunk(nbd.NONE)),
    "a short read": (nbd.READ, 4, data(0, b"abc")),
    "a read without data": (nbd.READ, 4, chunk(nbd.NONE)),
    "overlap": (nbd.READ, 4, data(0, b"abc", done=0) + data(2, b"cd")),
    "data before the request": (nbd.READ, 4, data(2**64 - 1, b"abcd")),
    "data past the request": (nbd.READ, 4, data(1, b"abcd")),
    "a hole past the request": (nbd.READ, 4, hole(0, 2**32 - 1)),
    "an empty hole": (nbd.READ, 4, hole(0, 0)),
    "empty data": (nbd.READ, 4, data(0, b"")),
    "data for a write": (nbd.WRITE, 4, data(0, b"abcd")),
    "NONE that is not the last": (nbd.WRITE, 4, chunk(nbd.NONE, done=0)),
    "NONE with a payload": (nbd.WRITE, 4, chunk(nbd.NONE, b"x")),
    "unknown flags of a chunk": (nbd.WRITE, 4, chunk(nbd.NONE, done=3)),
    "an unknown chunk": (nbd.READ, 4, chunk(3)),
    "a chunk that is too long": (nbd.READ, 4, struct.pack(">IHHQI", nbd.CHUNK_MAGIC, 1, 1, 1, 2**32 - 1)),
    "an error of 0": (nbd.READ, 4, error(0)),
    "an error's text past its chunk": (nbd.READ, 4, error(nbd.EIO, b"no", length=3)),
    "an error's text that is no UTF-8": (nbd.READ, 4, error(nbd.EIO, b"\xff")),
    "an error's text that is too long": (nbd.READ, 4, error(nbd.EIO, b"x" * 4097)),
    "two errors": (nbd.READ, 4, error(nbd.EIO, done=0) + error(nbd.EIO)),
    "an empty status": (nbd.BLOCK_STATUS, 4, status()),
    "an empty extent": (nbd.BLOCK_STATUS, 4, status((0, 0))),
    "an extent after the end": (nbd.BLOCK_STATUS, 4, status((4, 0), (1, 3))),
    "a status past the export": (nbd.BLOCK_STATUS, 4, status((SIZE + 1, 0))),
    "an unknown context": (nbd.BLOCK_STATUS, 4, status((4, 0), context=8)),
    "a context twice": (nbd.BLOCK_STATUS, 4, status((4, 0), done=0) + status((4, 0))),
    "a status of odd length": (nbd.BLOCK_STATUS, 4, chunk(nbd.STATUS, bytes([0, 0, 0, BASE] * 4))),
}


@pytest.mark.parametrize(("cmd", "length", "script"), BAD.values(), ids=BAD)
def test_a_breach_in_transmission_is_seen(scripted, cmd, length, script):
    client = scripted(script)
    client.request(cmd, 0, length)
    with pytest.raises(ProtocolError):
        client.reply(99)  # which never comes: all of the script is looked at


@pytest.mark.parametrize(
    ("cmd", "flags", "script"),
    [
        (nbd.READ, nbd.DF, data(0, b"ab", done=0) + data(2, b"cd")),
        (nbd.BLOCK_STATUS, nbd.REQ_ONE, status((2, 0), (2, 3))),
        (nbd.BLOCK_STATUS, nbd.REQ_ONE, status((5, 0))),
    ],
)
def test_a_breach_of_what_a_flag_asks_for_is_seen(scripted, cmd, flags, script):
    assert scripted(script).call(cmd, 0, 4).error == 0 or cmd == nbd.BLOCK_STATUS
    with pytest.raises(ProtocolError):
        scripted(script).call(cmd, 0, 4, flags=flags)


def test_chunks_without_negotiation_are_seen(scripted):
    with pytest.raises(ProtocolError):
        scripted(data(0, b"abcd"), structured=False).call(nbd.READ, 0, 4)


EXPORT = struct.pack(">HQH", nbd.INFO_EXPORT, SIZE, nbd.HAS_FLAGS)
BAD_OPTIONS = {
    "magic": (nbd.LIST, option_reply(nbd.LIST, nbd.ACK, magic=1)),
    "another option": (nbd.LIST, option_reply(nbd.GO, nbd.ACK)),
    "ACK with data": (nbd.LIST, option_reply(nbd.LIST, nbd.ACK, b"x")),
    "a reply of another option": (nbd.LIST, option_reply(nbd.LIST, nbd.REP_INFO, EXPORT)),
    "an endless reply": (nbd.LIST, struct.pack(">QIII", nbd.REPLY_MAGIC, nbd.LIST, nbd.SERVER, 2**32 - 1)),
    "an error text that is too long": (nbd.GO, option_reply(nbd.GO, nbd.ERR_UNKNOWN, b"x" * 4097)),
    "an error text with NUL": (nbd.GO, option_reply(nbd.GO, nbd.ERR_UNKNOWN, b"\0")),
    "a name past its reply": (nbd.LIST, option_reply(nbd.LIST, nbd.SERVER, struct.pack(">I", 9) + b"x")),
    "GO without INFO_EXPORT": (nbd.GO, option_reply(nbd.GO, nbd.ACK)),
    "INFO_EXPORT of odd length": (nbd.GO, option_reply(nbd.GO, nbd.REP_INFO, EXPORT + b"x")),
    "INFO_EXPORT twice": (nbd.GO, option_reply(nbd.GO, nbd.REP_INFO, EXPORT) * 2),
    "no HAS_FLAGS": (nbd.GO, option_reply(nbd.GO, nbd.REP_INFO, struct.pack(">HQH", 0, SIZE, 2))),
    "SEND_DF": (nbd.GO, option_reply(nbd.GO, nbd.REP_INFO, struct.pack(">HQH", 0, SIZE, nbd.HAS_FLAGS | nbd.SEND_DF))),
    "block sizes": (nbd.GO, option_reply(nbd.GO, nbd.REP_INFO, struct.pack(">HIII", 3, 1, 100, 1 << 25))),
    "a context without a name": (9, option_reply(9, nbd.META_CONTEXT, bytes(4))),
    "a context without a namespace": (9, option_reply(9, nbd.META_CONTEXT, bytes(4) + b"x") + option_reply(9, nbd.ACK)),
}


@pytest.mark.parametrize(("opt", "script"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_breach_in_the_handshake_is_seen(scripted, opt, script):
    with pytest.raises(ProtocolError):
        scripted(script, structured=False).option(opt)


def test_a_closed_connection_and_one_that_says_nothing_are_told_apart(scripted):
    with pytest.raises(Disconnected):
        scripted(simple(data=b"abc"), structured=False).call(nbd.READ, 0, 4)
    ours, theirs = socket.socketpair()
    with theirs, Client(ours, timeout=0.05) as client, pytest.raises(TimeoutError):
        client.dropped()
