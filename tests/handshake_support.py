"""A client of negotiate(), the handshake without a server, and the numbers of the specification."""

import contextlib
import socket
import struct
import time

import pytest
from engine_support import LIMIT, Guest

from cbwcore.nbd import NbdLimits
from cbwcore.nbd.handshake import HandshakeError, Negotiated, negotiate

CLUSTER = 65536
MIB = 1 << 20
SIZE = 3 * CLUSTER + 512
# Numbers of the specification, written down again: a wrong constant of the product must not agree with itself.
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META = 1, 2, 3, 5, 6, 7, 8, 9, 10
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, TOO_BIG = (2**31 + n for n in (1, 2, 3, 5, 6, 9))
FIXED, NO_ZEROES = 1, 2
WRITABLE = 0b1101_0110_1101  # HAS_FLAGS FLUSH FUA TRIM WRITE_ZEROES MULTI_CONN CACHE FAST_ZERO
READ_ONLY = 0b0101_0000_0011  # HAS_FLAGS READ_ONLY MULTI_CONN CACHE
BASE = "base:allocation"
TRIM, DF = 1 << 5, 1 << 7


def u16(value):
    return struct.pack(">H", value)


def u32(value):
    return struct.pack(">I", value)


def text(value):
    data = value.encode() if isinstance(value, str) else value
    return u32(len(data)) + data


def option(number, payload=b""):
    return b"IHAVEOPT" + u32(number) + u32(len(payload)) + payload


def go(name="", *infos):
    return text(name) + u16(len(infos)) + b"".join(map(u16, infos))


def meta(name, *queries):
    return text(name) + u32(len(queries)) + b"".join(map(text, queries))


class HandshakeClient:
    """The client's end, and negotiate() at the other, in a thread."""

    def __init__(self, exports, *, limits=None, tls=None, flags=FIXED | NO_ZEROES, seconds=LIMIT):
        self.sock, self.served = socket.socketpair()
        self.sock.settimeout(LIMIT)
        deadline = time.monotonic() + seconds
        self.guest = Guest(negotiate, self.served, exports, limits or NbdLimits(), tls, deadline)
        self.opened = [self.sock, self.served]
        assert self.read(18) == b"NBDMAGIC" + b"IHAVEOPT" + b"\0\3"
        if flags is not None:
            self.send(u32(flags))

    def close(self):
        for sock in self.opened:
            sock.close()
        with contextlib.suppress(Exception):
            negotiated = self.guest.result()
            if negotiated is not None:
                negotiated.sock.close()

    def send(self, data):
        self.sock.sendall(data)

    def read(self, length):
        data = b""
        while len(data) < length:
            part = self.sock.recv(length - len(data))
            assert part, f"the server closed after {data!r}"
            data += part
        return data

    def reply(self, number):
        """(type, payload) of one reply to an option."""
        magic, replied, kind, length = struct.unpack(">QIII", self.read(20))
        assert (magic, replied) == (0x3E889045565A9, number)
        payload = self.read(length)
        if kind >= 2**31:
            assert len(payload) <= 256, "what a string should keep to"
            payload.decode()
        return kind, payload

    def ask(self, number, payload=b""):
        """All replies to an option."""
        self.send(option(number, payload))
        replies = [self.reply(number)]
        while ACK < replies[-1][0] < 2**31:
            replies.append(self.reply(number))
        return replies

    def ends(self, number, payload=b""):
        """The type of the last reply."""
        return self.ask(number, payload)[-1][0]

    def go(self, name=""):
        """GO; what was negotiated."""
        assert self.ends(GO, go(name)) == ACK
        negotiated = self.guest.result()
        assert type(negotiated) is Negotiated
        return negotiated

    def silence(self):
        """Nothing came but what was read, and nothing can: negotiate() is over."""
        assert self.guest.done
        self.served.shutdown(socket.SHUT_WR)
        assert self.sock.recv(1) == b""

    def dropped(self, match):
        """negotiate() refused to go on, without a word to the client."""
        with pytest.raises(HandshakeError, match=match) as e:
            self.guest.result()
        assert "\n" not in str(e.value)
        assert len(str(e.value)) < 200
        self.silence()

    def left(self):
        """negotiate() took it that the client went."""
        assert self.guest.result() is None

    def starttls(self, context):
        """STARTTLS and the client's side of the TLS handshake."""
        assert self.ask(STARTTLS) == [(ACK, b"")]
        self.sock = context.wrap_socket(self.sock)
        self.opened.append(self.sock)
