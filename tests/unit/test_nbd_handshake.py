"""The NBD handshake, its exports, limits and TLS: negotiate() and relay() over a socket pair, without a server."""

import contextlib
import gc
import os
import random
import select
import socket
import ssl
import struct
import subprocess
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_support import LIMIT, Guest, settled, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cbwcore
from cbwcore.nbd import NbdLimits, TlsConfig, handshake
from cbwcore.nbd import protocol as nbd
from cbwcore.nbd.exports import Export, Exports
from cbwcore.nbd.handshake import HandshakeError, Negotiated, negotiate
from cbwcore.nbd.tls import _Flow, relay

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
TRIM, DF = 1 << 5, 1 << 7


# ---- the client ----


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


class Client:
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


@pytest.fixture
def connect():
    """``connect(exports, ...)``: a Client; closed at the end."""
    with contextlib.ExitStack() as undo:

        def connect(exports, **options):
            client = Client(exports, **options)
            undo.callback(client.close)
            return client

        yield connect


@pytest.fixture
def exports(make_disk):
    """ "disk", writable, with bitmaps "b0" and "b1"; "snapshot" of it; and "other", read-only."""
    disk = make_disk(SIZE)
    disk.bitmaps.add("b0")
    disk.bitmaps.add("b1", granularity=512)
    exports = Exports()
    exports.add(Export("disk", disk, writable=True, bitmaps=["b0", "b1"], description="the guest's"))
    exports.add(Export("snapshot", disk.snapshot(), discard=True))
    exports.add(Export("other", make_disk(CLUSTER, "other.img")))
    return exports


# ---- the beginning ----


@pytest.mark.parametrize("flags", [0, FIXED, NO_ZEROES, FIXED | NO_ZEROES])
def test_known_client_flags_are_taken(connect, exports, flags):
    assert connect(exports, flags=flags).go("other").export is exports.find("other")


@pytest.mark.parametrize("flags", [4, 7, 1 << 16, 1 << 31, 0xFFFFFFFF])
def test_an_unknown_client_flag_drops(connect, exports, flags):
    connect(exports, flags=flags).dropped(hex(flags))


@pytest.mark.parametrize("magic", [b"\0" * 8, b"NBDMAGIC", b"IHAVEOPU", bytes.fromhex("0003e889045565a9")])
def test_an_option_without_its_magic_drops(connect, exports, magic):
    client = connect(exports)
    client.send(magic + u32(LIST) + u32(0))
    client.dropped("magic")


def test_a_client_may_leave_at_any_byte(connect, exports):
    """And is neither an error nor waited for."""
    talk = u32(FIXED) + option(STRUCTURED) + option(SET_META, meta("disk", "base:")) + option(GO, go("disk", 3))
    for length in range(len(talk)):
        client = connect(exports, flags=None)
        client.send(talk[:length])
        client.sock.shutdown(socket.SHUT_WR)
        client.left()
    client = connect(exports, flags=None)
    client.send(talk)
    assert client.guest.result().structured


# ---- the end: EXPORT_NAME, GO, ABORT ----


@pytest.mark.parametrize("flags", [FIXED, FIXED | NO_ZEROES])
@pytest.mark.parametrize(("name", "transmission"), [("disk", WRITABLE), ("snapshot", READ_ONLY | TRIM)])
def test_export_name_is_answered_with_124_zeroes_or_none(connect, exports, flags, name, transmission):
    client = connect(exports, flags=flags)
    client.send(option(EXPORT_NAME, name.encode()))
    expected = struct.pack(">QH", SIZE, transmission) + (b"" if flags & NO_ZEROES else bytes(124))
    assert client.read(len(expected)) == expected
    assert client.guest.result() == (client.served, exports.find(name), False, ())
    client.silence()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (b"nobody", "no export 'nobody'"),
        (b"n" * 4096, "no export 'nnnn"),
        (b"\n" * 4096, "no export"),
        (b"\xff", "UTF-8"),
        (b"disk\0", "NUL"),
        (b"n" * 4097, "4097.*4096"),
        (b"n" * 65537, "65537.*65536"),
    ],
)
def test_an_export_name_that_is_none_drops(connect, exports, name, match):
    client = connect(exports)
    client.send(option(EXPORT_NAME, name))
    client.dropped(match)


def test_export_name_keeps_what_was_negotiated_before(connect, exports):
    client = connect(exports)
    assert client.ends(STRUCTURED) == ACK
    assert client.ends(SET_META, meta("disk", "qemu:dirty-bitmap:b1", "base:allocation")) == ACK
    client.send(option(EXPORT_NAME, b"disk"))
    assert client.read(10) == struct.pack(">QH", SIZE, WRITABLE | DF)
    export = exports.find("disk")
    assert client.guest.result()[1:] == (export, True, (export.bitmaps["b1"], None))


@pytest.mark.parametrize("end", [option(EXPORT_NAME, b"disk"), option(GO, go("disk"))])
def test_no_byte_is_read_beyond_the_handshake(connect, exports, end):
    client = connect(exports)
    requests = random.Random(1).randbytes(1000)
    client.send(end + requests)
    negotiated = client.guest.result()
    assert negotiated.sock is client.served
    assert negotiated.sock.gettimeout() is None
    assert os.get_blocking(negotiated.sock.fileno())
    assert negotiated.sock.recv(2000) == requests


def test_all_of_it_in_single_bytes(connect, exports):
    client = connect(exports, flags=None)
    for byte in u32(3) + option(STRUCTURED) + option(LIST_META, meta("disk")) + option(GO, go("disk")):
        client.send(bytes([byte]))
    assert client.guest.result().structured


@pytest.mark.parametrize("payload", [b"", b"goodbye", bytes(70000)])
def test_abort_is_acknowledged_whatever_it_says(connect, exports, payload):
    client = connect(exports)
    assert client.ask(ABORT, payload) == [(ACK, b"")]
    client.left()
    client.silence()
    assert not select.select([client.served], [], [], 0)[0], "unread bytes would reset the connection, answer and all"


def test_abort_need_not_wait_for_its_answer(connect, exports):
    client = connect(exports)
    client.send(option(ABORT))
    client.sock.close()
    client.left()


def test_an_abort_behind_the_deadline_is_too_late(exports, monkeypatch):
    """Without an answer, and the caller is told why: it is the deadline that ended it."""
    client, served = socket.socketpair()
    with client, served:
        client.sendall(u32(3) + option(ABORT))
        now, read = [0.0], socket.socket.recv_into
        monkeypatch.setattr(handshake, "time", SimpleNamespace(monotonic=lambda: now[0]))

        class Late(socket.socket):
            def recv_into(self, view):
                count = read(self, view)
                if len(view) == 16:  # the option's header
                    now[0] = 2.0
                return count

        with Late(fileno=os.dup(served.fileno())) as late, pytest.raises(TimeoutError, match="took too long"):
            negotiate(late, exports, NbdLimits(), None, 1.0)


# ---- options ----


@pytest.mark.parametrize("number", [0, 4, 11, 12, 99, 1 << 31, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0, 1, 4096, 65536, 65537, 3 * MIB])
def test_an_unknown_option_is_consumed_and_unsupported(connect, exports, number, length):
    """Extended headers (11) among them; the payload looks like options."""
    client = connect(exports)
    assert client.ends(number, (option(ABORT) * (length // 16 + 1))[:length]) == UNSUP
    client.go("disk")


@pytest.mark.parametrize("number", [LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META])
def test_an_option_that_is_too_long_is_consumed_and_refused(connect, exports, number):
    client = connect(exports)
    payload = (option(ABORT) * 5000)[:65537]
    assert client.ends(number, payload) == TOO_BIG
    assert client.ends(number, payload[:-1]) == INVALID, "within the limit, but nonsense"
    assert not client.go("disk").structured


@pytest.mark.parametrize("number", [ABORT, LIST, GO, 77])
def test_an_option_above_the_drain_limit_drops_unread(connect, exports, number):
    client = connect(exports, limits=NbdLimits(request=4096, drain=100000))
    client.send(b"IHAVEOPT" + u32(number) + u32(100001))
    client.dropped("100001.*100000")
    client = connect(exports)
    client.send(b"IHAVEOPT" + u32(number) + u32(0xFFFFFFFF))
    client.dropped("4294967295")


def test_a_long_option_takes_no_memory(connect, exports):
    client = connect(exports)
    piece = bytes(MIB)
    tracemalloc.start()
    try:
        for number in (GO, 99):
            client.send(b"IHAVEOPT" + u32(number) + u32(16 * MIB))
            for _ in range(16):
                client.send(piece)
            assert client.reply(number)[0] == {GO: TOO_BIG, 99: UNSUP}[number]
        assert tracemalloc.get_traced_memory()[1] < MIB // 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("limit", [1, 32])
def test_so_many_options_and_no_more(connect, exports, limit):
    limits = NbdLimits(options=limit)
    client = connect(exports, limits=limits)
    for i in range(limit):
        assert client.ends(99 if i % 2 else LIST) == (UNSUP if i % 2 else ACK)
    client.send(option(GO, go("disk")))
    client.dropped(f"more than {limit} options")
    client = connect(exports, limits=limits)
    for _ in range(limit - 1):
        assert client.ends(LIST) == ACK
    client.go("disk")
    client = connect(exports, limits=limits)
    for _ in range(limit):
        assert client.ends(LIST) == ACK
    client.sock.shutdown(socket.SHUT_WR)
    client.left()


def test_list(connect, exports):
    client = connect(exports)
    assert client.ask(LIST) == [
        (SERVER, text("disk") + b"the guest's"),
        (SERVER, text("snapshot")),
        (SERVER, text("other")),
        (ACK, b""),
    ]
    exports.remove("disk")
    assert client.ask(LIST)[0] == (SERVER, text("snapshot"))
    assert connect(Exports()).ask(LIST) == [(ACK, b"")]


@pytest.mark.parametrize("number", [LIST, STRUCTURED])
def test_options_without_payload_refuse_one(connect, exports, number):
    client = connect(exports)
    assert client.ends(number, b"x") == INVALID
    assert not client.go("disk").structured


# ---- INFO and GO ----

EXPORT = (REP_INFO, struct.pack(">HQH", 0, SIZE, WRITABLE))
NAME = (REP_INFO, u16(1) + b"disk")
DESCRIPTION = (REP_INFO, u16(2) + b"the guest's")
BLOCK_SIZE = (REP_INFO, struct.pack(">HIII", 3, 1, 4096, 32 * MIB))


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize("name", ["disk", ""])
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([], [EXPORT, BLOCK_SIZE]),
        ([0, 3], [EXPORT, BLOCK_SIZE]),
        ([1], [EXPORT, BLOCK_SIZE, NAME]),
        ([3, 2, 1, 0], [EXPORT, BLOCK_SIZE, NAME, DESCRIPTION]),
        ([2, 2, 4, 0xFFFF], [EXPORT, BLOCK_SIZE, DESCRIPTION]),
    ],
)
def test_what_info_and_go_tell(connect, exports, number, name, asked, told):
    client = connect(exports)
    assert client.ask(number, go(name, *asked)) == [*told, (ACK, b"")]
    if number == INFO:
        client.go("other")
    else:
        assert client.guest.result().export is exports.find("disk")


def test_the_flags_of_each_kind_of_export(connect, exports):
    def flags(client, name):
        return struct.unpack(">HQH", client.ask(INFO, go(name))[0][1])[2]

    client = connect(exports)
    assert [flags(client, name) for name in exports.names()] == [WRITABLE, READ_ONLY | TRIM, READ_ONLY]
    assert client.ends(STRUCTURED) == ACK
    assert [flags(client, name) & DF for name in exports.names()] == [DF] * 3


def test_an_info_without_a_description_has_none(connect, exports):
    assert [kind for kind, _ in connect(exports).ask(INFO, go("other", 2))] == [REP_INFO, REP_INFO, ACK]


MALFORMED_GO = {
    "empty": b"",
    "a piece of a length": b"\0\0\0",
    "no count": text("disk"),
    "half a count": text("disk") + b"\0",
    "a count too large": text("disk") + u16(2) + u16(0),
    "half an info": text("disk") + u16(1) + b"\0",
    "a count too small": text("disk") + u16(0) + u16(0),
    "a byte too many": go("disk") + b"\0",
    "a name beyond the end": u32(7) + b"disk" + u16(0),
    "the largest name": u32(0xFFFFFFFF) + b"disk" + u16(0),
    "no UTF-8": text(b"d\xc3") + u16(0),
    "a surrogate": text(b"\xed\xa0\x80") + u16(0),
    "a NUL": text(b"disk\0") + u16(0),
}


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize("payload", MALFORMED_GO.values(), ids=MALFORMED_GO)
def test_a_malformed_go_is_invalid(connect, exports, number, payload):
    client = connect(exports)
    assert [kind for kind, _ in client.ask(number, payload)] == [INVALID]
    client.go("disk")


@pytest.mark.parametrize("number", [INFO, GO])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nobody", UNKNOWN),
        ("dis", UNKNOWN),
        ("n" * 4096, UNKNOWN),
        ("\n" * 4096, UNKNOWN),
        ("€" * 1365, UNKNOWN),
        ("\U0001f4be" * 1024, UNKNOWN),
        ("n" * 4097, TOO_BIG),
        ("n" * 65530, TOO_BIG),
    ],
)
def test_an_unknown_export_gets_a_short_text(connect, exports, number, name, kind):
    """CVE-2020-10761: a text that repeated the name grew too long, and the server asserted."""
    client = connect(exports)
    replies = client.ask(number, go(name))
    assert [kind for kind, _ in replies] == [kind]
    assert b"\n" not in replies[0][1]
    client.go("disk")


def test_the_default_export(connect, exports, make_disk):
    assert connect(exports).go().export is exports.find("disk")
    exports.remove("disk")
    assert connect(exports).go().export is exports.find("snapshot")
    exports.add(Export("", make_disk(512, "default.img")))
    assert connect(exports).go().export.name == ""
    assert connect(Exports()).ends(GO, go()) == UNKNOWN


# ---- metadata contexts ----

BASE = "base:allocation"
B0, B1 = "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([], [BASE, B0, B1]),
        (["base:"], [BASE]),
        ([BASE], [BASE]),
        (["qemu:"], [B0, B1]),
        (["qemu:dirty-bitmap:"], [B0, B1]),
        ([B1], [B1]),
        ([B1, B1, "qemu:", "base:"], [BASE, B0, B1]),
        ([""], []),
        (["base"], []),
        (["base:allocatio"], []),
        (["base:allocation:"], []),
        (["BASE:allocation"], []),
        (["qemu:allocation-depth"], []),
        (["qemu:dirty-bitmap"], []),
        (["qemu:dirty-bitmap:b"], []),
        (["qemu:dirty-bitmap:b2", "x-anything:", "nbd-server:x"], []),
        (["x" * 4096, B0], [B0]),
    ],
)
def test_which_contexts_a_query_finds(connect, exports, queries, found):
    client = connect(exports)
    assert client.ends(STRUCTURED) == ACK
    replies = client.ask(LIST_META, meta("disk", *queries))
    assert replies == [*((META, u32(0) + name.encode()) for name in found), (ACK, b"")]
    assert client.go("disk").contexts == (), "listing selects nothing"


@pytest.mark.parametrize(
    ("queries", "selected"),
    [
        ([], []),
        ([BASE], [BASE]),
        ([B1, BASE, B0], [B1, BASE, B0]),
        ([B0, B0, BASE, BASE], [B0, BASE]),
        (["base:", "qemu:", "qemu:dirty-bitmap:", "", "x-y:z", "qemu:dirty-bitmap:b2"], []),
        (["base:", BASE], [BASE]),
    ],
)
def test_which_contexts_a_query_selects(connect, exports, queries, selected):
    client = connect(exports)
    assert client.ends(STRUCTURED) == ACK
    replies = client.ask(SET_META, meta("disk", *queries))
    assert replies == [*((META, u32(i) + name.encode()) for i, name in enumerate(selected, 1)), (ACK, b"")]
    negotiated = client.go("disk")
    bitmaps = exports.find("disk").bitmaps
    assert negotiated.contexts == tuple({BASE: None, B0: bitmaps["b0"], B1: bitmaps["b1"]}[name] for name in selected)


@pytest.mark.parametrize("number", [LIST_META, SET_META])
def test_contexts_need_structured_replies(connect, exports, number):
    client = connect(exports)
    assert client.ends(number, meta("disk", BASE)) == INVALID
    assert client.ends(STRUCTURED) == ACK
    assert client.ends(number, meta("disk", BASE)) == ACK


MALFORMED_META = {
    "empty": (b"", INVALID),
    "no count": (text("disk"), INVALID),
    "half a count": (text("disk") + b"\0\0", INVALID),
    "a count too large": (text("disk") + u32(2) + text(BASE), INVALID),
    "a count too small": (text("disk") + u32(0) + text(BASE), INVALID),
    "a byte too many": (meta("disk", BASE) + b"\0", INVALID),
    "a query beyond the end": (text("disk") + u32(1) + u32(16) + BASE.encode(), INVALID),
    "the largest query": (text("disk") + u32(1) + u32(0xFFFFFFFF) + BASE.encode(), INVALID),
    "a name beyond the end": (u32(0xFFFFFFF0) + meta("disk", BASE), INVALID),
    "a query of no UTF-8": (meta("disk", b"base:\xff"), INVALID),
    "a query with a NUL": (meta("disk", b"base:\0"), INVALID),
    "a long query": (meta("disk", "x" * 4097, BASE), TOO_BIG),
    "a long name": (meta("n" * 4097, BASE), TOO_BIG),
    "65 queries": (meta("disk", *[BASE] * 65), TOO_BIG),
    "the most queries": (text("disk") + u32(0xFFFFFFFF), TOO_BIG),
    "too long": (meta("disk", BASE) + bytes(65536), TOO_BIG),
    "no such export": (meta("nobody", BASE), UNKNOWN),
}


@pytest.mark.parametrize(("payload", "kind"), MALFORMED_META.values(), ids=MALFORMED_META)
def test_a_failed_set_leaves_no_context(connect, exports, payload, kind):
    client = connect(exports)
    assert client.ends(STRUCTURED) == ACK
    assert client.ends(SET_META, meta("disk", BASE, B0)) == ACK
    assert [kind for kind, _ in client.ask(SET_META, payload)] == [kind]
    assert client.go("disk").contexts == ()


@pytest.mark.parametrize(("payload", "kind"), MALFORMED_META.values(), ids=MALFORMED_META)
def test_a_failed_list_changes_nothing(connect, exports, payload, kind):
    client = connect(exports)
    assert client.ends(STRUCTURED) == ACK
    assert client.ends(SET_META, meta("disk", BASE)) == ACK
    assert [kind for kind, _ in client.ask(LIST_META, payload)] == [kind]
    assert client.go("disk").contexts == (None,)


def test_the_last_set_counts_and_only_for_its_export(connect, exports):
    def contexts(*sets, chosen):
        client = connect(exports)
        assert client.ends(STRUCTURED) == ACK
        for payload in sets:
            assert client.ends(SET_META, payload) == ACK
        return client.go(chosen).contexts

    b0 = exports.find("disk").bitmaps["b0"]
    assert contexts(meta("disk", BASE), meta("disk", B0), chosen="disk") == (b0,)
    assert contexts(meta("disk", BASE), meta("disk"), chosen="disk") == ()
    assert contexts(meta("disk", BASE), chosen="other") == ()
    assert contexts(meta("disk", BASE), meta("other", BASE), chosen="disk") == ()
    assert contexts(meta("other", BASE), meta("disk", BASE), chosen="disk") == (None,)
    assert contexts(meta("", B0), chosen="disk") == (b0,), "which is the default export"
    assert contexts(meta("snapshot", BASE, B0), chosen="snapshot") == (None,), "it has no bitmaps"


def test_contexts_of_an_export_that_was_replaced_are_gone(connect, exports, make_disk):
    client = connect(exports)
    assert client.ends(STRUCTURED) == ACK
    assert client.ends(SET_META, meta("disk", BASE, B0)) == ACK
    exports.remove("disk")
    exports.add(Export("disk", make_disk(512, "new.img")))
    negotiated = client.go("disk")
    assert (negotiated.export.size, negotiated.contexts) == (512, ())


def test_queries_up_to_the_limit(connect, exports):
    client = connect(exports, limits=NbdLimits(queries=3, string_bytes=20, option_bytes=200))
    assert client.ends(STRUCTURED) == ACK
    assert client.ends(LIST_META, meta("disk", *[B0] * 3)) == ACK
    assert client.ends(LIST_META, meta("disk", *[B0] * 4)) == TOO_BIG
    assert client.ends(LIST_META, meta("disk", "x" * 21)) == TOO_BIG
    assert client.ends(SET_META, meta("disk", B0) + bytes(200)) == TOO_BIG


# ---- the deadline ----


@pytest.mark.parametrize("sent", [b"", b"\0\0", u32(3), u32(3) + option(LIST), u32(3) + option(GO, go("disk"))[:-1]])
def test_a_client_that_says_no_more_is_dropped_in_time(connect, exports, sent):
    before = time.monotonic()
    client = connect(exports, flags=None, seconds=0.3)
    client.send(sent)
    with pytest.raises(TimeoutError):
        client.guest.result()
    assert 0.3 <= time.monotonic() - before < 2


def test_a_client_that_drips_bytes_is_dropped_in_time(connect, exports):
    client = connect(exports, seconds=0.4)
    client.send(b"IHAVEOPT" + u32(99) + u32(1000))
    for _ in range(1000):
        if client.guest.done:
            break
        client.send(b"x")
        time.sleep(0.02)
    with pytest.raises(TimeoutError):
        client.guest.result()


def test_a_client_that_does_not_read_is_dropped_in_time(connect, make_disk):
    disk = make_disk(512)
    exports = Exports()
    for i in range(300):
        exports.add(Export(f"{i}", disk, description="d" * 4096))
    client = connect(exports, seconds=0.4)
    client.send(option(LIST))
    with pytest.raises(TimeoutError):
        client.guest.result()


def test_no_time_at_all(exports):
    client, served = socket.socketpair()
    with client, served, pytest.raises(TimeoutError):
        negotiate(served, exports, NbdLimits(), None, time.monotonic() - 1)


def test_another_thread_may_end_it(connect, exports):
    client = connect(exports)
    assert client.ends(LIST) == ACK
    client.served.shutdown(socket.SHUT_RDWR)
    client.left()


# ---- whatever a client sends ----

LENGTHS = st.one_of(st.integers(0, 64), st.integers(0, 0xFFFFFFFF))
OPTIONS = st.builds(
    lambda number, payload, lie: b"IHAVEOPT" + u32(number) + u32(len(payload) if lie is None else lie) + payload,
    st.integers(0, 12),
    st.one_of(
        st.binary(max_size=64),
        st.builds(go, st.sampled_from(["", "disk", "x"]), st.integers(0, 5)),
        st.builds(meta, st.sampled_from(["", "disk", "x"]), st.sampled_from(["", BASE, B0, "qemu:", "base:"])),
    ),
    st.one_of(st.none(), st.none(), LENGTHS),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OPTIONS, max_size=6), st.binary(max_size=20))
def test_whatever_a_client_sends_it_is_served_or_dropped(exports, options, tail):
    client = Client(exports)
    try:
        client.send(b"".join(options) + tail)
        client.sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(HandshakeError):
            negotiated = client.guest.result()
            assert negotiated is None or negotiated.export in list(exports)
    finally:
        client.close()


# ---- TLS: certificates ----


def openssl(home, *arguments):
    done = subprocess.run(["openssl", *arguments], cwd=home, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def make_authority(home, name):
    """``name``.pem and ``name``-key.pem, and what `openssl ca` needs."""
    openssl(
        home,
        *NEW_KEY,
        "-x509",
        "-days",
        "2",
        "-subj",
        f"/CN={name}",
        "-keyout",
        f"{name}-key.pem",
        "-out",
        f"{name}.pem",
    )
    (home / f"{name}.index").touch()
    (home / f"{name}.cnf").write_text(
        f"[ca]\ndefault_ca=x\n[x]\ndatabase={name}.index\ndefault_md=sha256\ndefault_crl_days=2\n"
    )


def make_certificate(home, name, authority="ca"):
    """``name``.pem and ``name``-key.pem."""
    openssl(home, *NEW_KEY, "-subj", f"/CN={name}", "-keyout", f"{name}-key.pem", "-out", f"{name}.req")
    signer = ["-CA", f"{authority}.pem", "-CAkey", f"{authority}-key.pem", "-CAcreateserial"]
    openssl(home, "x509", "-req", "-days", "2", "-in", f"{name}.req", *signer, "-out", f"{name}.pem")


NEW_KEY = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A directory with "ca", "server", "client" and "revoked" by it, "stranger" by another authority, and crl.pem."""
    home = tmp_path_factory.mktemp("certificates")
    make_authority(home, "ca")
    make_authority(home, "other")
    for name in ("server", "client", "revoked"):
        make_certificate(home, name)
    make_certificate(home, "stranger", "other")
    ca = ["ca", "-config", "ca.cnf", "-keyfile", "ca-key.pem", "-cert", "ca.pem"]
    openssl(home, *ca, "-gencrl", "-out", "empty-crl.pem")
    openssl(home, *ca, "-revoke", "revoked.pem")
    openssl(home, *ca, "-gencrl", "-out", "crl.pem")
    return home


@pytest.fixture
def directory(tmp_path, certificates):
    """A directory as TlsConfig wants it."""
    for name, source in {"ca-cert": "ca", "server-cert": "server", "server-key": "server-key"}.items():
        (tmp_path / f"{name}.pem").write_bytes((certificates / f"{source}.pem").read_bytes())
    return tmp_path


@pytest.fixture
def as_client(certificates):
    """``as_client(name)``: the ssl context of a client with that certificate, or with none."""

    def as_client(name="client"):
        context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        if name:
            context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}-key.pem")
        return context

    return as_client


def test_certificates_are_found_by_their_names(directory):
    assert TlsConfig(directory).required
    assert not TlsConfig(str(directory), required=False).required


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_a_missing_certificate_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(cbwcore.ConfigError, match=str(directory / name)):
        TlsConfig(directory)
    (directory / name).mkdir()
    with pytest.raises(cbwcore.ConfigError, match=str(directory / name)):
        TlsConfig(directory)


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem", "ca-crl.pem"])
@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(range(256))])
def test_a_bad_certificate_is_named(directory, name, content):
    (directory / name).write_bytes(content)
    with pytest.raises(cbwcore.ConfigError, match=str(directory / name.replace("key", "cert"))) as e:
        TlsConfig(directory)
    assert "\n" not in str(e.value)


def test_the_key_of_another_certificate_is_refused(directory, certificates):
    (directory / "server-key.pem").write_bytes((certificates / "client-key.pem").read_bytes())
    with pytest.raises(cbwcore.ConfigError, match="KEY_VALUES_MISMATCH"):
        TlsConfig(directory)


def test_an_encrypted_key_is_refused_and_nobody_is_asked(directory, certificates):
    openssl(
        certificates,
        "ec",
        "-in",
        "server-key.pem",
        "-aes256",
        "-passout",
        "pass:x",
        "-out",
        str(directory / "server-key.pem"),
    )
    with pytest.raises(cbwcore.ConfigError, match=r"server-key\.pem is encrypted"):
        TlsConfig(directory)


def test_revocations_that_cannot_be_read_are_not_taken_for_none(directory):
    (directory / "ca-crl.pem").symlink_to(directory / "nowhere")
    with pytest.raises((cbwcore.ConfigError, OSError), match=r"ca-crl\.pem"):
        TlsConfig(directory)


@pytest.mark.parametrize("names", [["crl", "other"], ["other"], ["ca"]])
def test_a_certificate_among_the_revoked_is_not_trusted(directory, certificates, names):
    (directory / "ca-crl.pem").write_bytes(b"".join((certificates / f"{name}.pem").read_bytes() for name in names))
    with pytest.raises(cbwcore.ConfigError, match=r"ca-crl\.pem"):
        TlsConfig(directory)


# ---- TLS: the handshake ----


def test_a_session_from_its_beginning(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory))
    client.starttls(as_client())
    assert client.sock.version() == "TLSv1.3"
    assert client.ends(STRUCTURED) == ACK
    assert client.ends(SET_META, meta("disk", BASE)) == ACK
    requests = random.Random(1).randbytes(1000)
    client.send(option(GO, go("disk")) + requests)  # in one TLS record
    assert [client.reply(GO)[0] for _ in range(3)] == [REP_INFO, REP_INFO, ACK]
    negotiated = client.guest.result()
    assert negotiated[1:] == (exports.find("disk"), True, (None,))
    assert isinstance(negotiated.sock, ssl.SSLSocket)
    assert client.served.fileno() not in (-1, negotiated.sock.fileno()), "the caller's socket is the caller's"
    assert negotiated.sock.recv(2000) == requests


@pytest.mark.parametrize("number", [0, LIST, 4, INFO, GO, STRUCTURED, LIST_META, SET_META, 11, 99])
@pytest.mark.parametrize("payload", [b"", go("disk"), bytes(70000)])
def test_without_tls_all_is_refused_where_it_is_required(connect, exports, directory, as_client, number, payload):
    client = connect(exports, tls=TlsConfig(directory))
    assert [kind for kind, _ in client.ask(number, payload)] == [TLS_REQD]
    client.starttls(as_client())
    assert not client.go("disk").structured


def test_without_tls_an_export_name_drops_where_it_is_required(connect, exports, directory):
    client = connect(exports, tls=TlsConfig(directory))
    client.send(option(EXPORT_NAME, b"disk"))
    client.dropped("TLS")


def test_without_tls_a_client_may_abort(connect, exports, directory):
    client = connect(exports, tls=TlsConfig(directory))
    assert client.ends(ABORT) == ACK
    client.left()


def test_tls_that_is_not_required(connect, exports, directory, as_client):
    tls = TlsConfig(directory, required=False)
    assert connect(exports, tls=tls).go("disk").export.name == "disk"
    client = connect(exports, tls=tls)
    client.starttls(as_client())
    assert isinstance(client.go("disk").sock, ssl.SSLSocket)


def test_a_server_without_tls_says_so(connect, exports):
    client = connect(exports)
    assert client.ends(STARTTLS) == POLICY
    client.go("disk")


def test_starttls_takes_no_payload_and_comes_once(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory))
    assert client.ends(STARTTLS, b"x") == INVALID
    client.starttls(as_client())
    assert client.ends(STARTTLS) == INVALID
    client.go("disk")


def test_starttls_forgets_what_was_negotiated(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory, required=False))
    assert client.ends(STRUCTURED) == ACK
    assert client.ends(SET_META, meta("disk", BASE)) == ACK
    client.starttls(as_client())
    assert client.ends(SET_META, meta("disk", BASE)) == INVALID, "structured replies are forgotten"
    assert client.go("disk")[2:] == (False, ())


def test_starttls_forgets_contexts_too(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory, required=False))
    assert client.ends(STRUCTURED) == ACK
    assert client.ends(SET_META, meta("disk", BASE)) == ACK
    client.starttls(as_client())
    assert client.ends(STRUCTURED) == ACK
    assert client.go("disk")[2:] == (True, ())


def test_options_count_on_through_starttls(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory), limits=NbdLimits(options=2))
    client.starttls(as_client())
    assert client.ends(LIST) == ACK
    client.send(option(GO, go("disk")))
    with pytest.raises(HandshakeError, match="more than 2 options"):
        client.guest.result()


@pytest.mark.parametrize("injected", [option(GO, go("disk")), option(STRUCTURED) * 40, option(LIST) + b"\x16\3\1"])
def test_plaintext_behind_starttls_is_no_part_of_the_session(connect, exports, directory, as_client, injected):
    """What somebody on the wire adds in the clear must not be taken for the authenticated client's."""
    client = connect(exports, tls=TlsConfig(directory))
    client.send(option(STARTTLS) + injected)
    assert client.reply(STARTTLS) == (ACK, b"")
    with pytest.raises(HandshakeError, match="TLS failed"):
        client.guest.result()
    client.served.shutdown(socket.SHUT_RDWR)
    assert client.sock.recv(4096)[:1] in (b"", b"\x15"), "at most a TLS alert"


@pytest.mark.parametrize(
    ("name", "crl", "match"),
    [
        (None, None, "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        ("stranger", None, "issuer|self.signed"),
        ("revoked", "crl", "revoked"),
        ("stranger", "crl", "issuer|self.signed"),
    ],
)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_without_a_good_certificate_is_dropped(
    connect, exports, directory, certificates, as_client, name, crl, match, version
):
    if crl:
        (directory / "ca-crl.pem").write_bytes((certificates / f"{crl}.pem").read_bytes())
    client = connect(exports, tls=TlsConfig(directory))
    context = as_client(name)
    context.minimum_version = context.maximum_version = version
    with contextlib.suppress(OSError, AssertionError):  # in TLS 1.3 it hears of it only after its own handshake
        client.starttls(context)
        client.read(1)
        pytest.fail("the server went on")
    with pytest.raises(HandshakeError, match=match):
        client.guest.result()


@pytest.mark.parametrize(("name", "crl"), [("revoked", "empty-crl"), ("client", "crl")])
def test_a_client_that_is_not_revoked_is_served(connect, exports, directory, certificates, as_client, name, crl):
    (directory / "ca-crl.pem").write_bytes((certificates / f"{crl}.pem").read_bytes())
    client = connect(exports, tls=TlsConfig(directory))
    client.starttls(as_client(name))
    client.go("disk")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_tls_is_refused(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory))
    context = as_client()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        client.starttls(context)
    with pytest.raises(HandshakeError, match="UNSUPPORTED_PROTOCOL"):
        client.guest.result()


def test_a_client_that_stops_in_the_tls_handshake_is_dropped_in_time(connect, exports, directory):
    client = connect(exports, tls=TlsConfig(directory), seconds=0.4)
    assert client.ask(STARTTLS) == [(ACK, b"")]
    client.send(b"\x16\3\1")
    with pytest.raises(TimeoutError):
        client.guest.result()


def test_another_thread_may_end_a_tls_session(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory))
    client.starttls(as_client())
    assert client.ends(LIST)
    client.served.shutdown(socket.SHUT_RDWR)
    client.left()


def test_a_session_that_is_not_served_is_closed_and_says_so(connect, exports, directory, as_client):
    client = connect(exports, tls=TlsConfig(directory))
    client.starttls(as_client())
    client.send(option(EXPORT_NAME, b"nobody"))
    with pytest.raises(HandshakeError, match="nobody"):
        client.guest.result()
    before = len(os.listdir("/proc/self/fd"))
    assert client.sock.recv(1) == b""
    client.close()
    gc.collect()
    assert before - len(os.listdir("/proc/self/fd")) == 2, "only the test's own two were left"


# ---- the relay ----

PIECES = (1, 2, 100, 4124, 16384, 16385, 70000, 300000)


class Relay:
    """``client`` ══ TLS ══ relay ── socket pair ── ``loop``."""

    def __init__(self, tls, context, *, pipelined=b"", stall_seconds=LIMIT, version=None):
        self.raw, self.served = socket.socketpair()
        if version:
            context.minimum_version = context.maximum_version = version
        accepted = Guest(tls.accept, self.served, LIMIT)
        self.client = context.wrap_socket(self.raw.dup(), suppress_ragged_eofs=False)
        self.session = accepted.result()
        self.plain, self.loop = socket.socketpair()
        for sock in (self.client, self.loop):
            sock.settimeout(LIMIT)
        if pipelined:  # half of its record is read before the relay begins, as by a handshake
            self.client.sendall(pipelined)
            assert self.session.recv(len(pipelined) // 2) == pipelined[: len(pipelined) // 2]
        self.guest = Guest(relay, self.session, self.plain, stall_seconds)

    def close(self):
        for sock in (self.client, self.raw, self.loop, self.served):
            sock.close()
        self.guest.result()
        self.session.close()
        self.plain.close()


@pytest.fixture
def relayed(directory, as_client):
    """``relayed(...)``: a Relay; closed at the end, and it must end."""
    tls = TlsConfig(directory)
    with contextlib.ExitStack() as undo:

        def relayed(**options):
            made = Relay(tls, as_client(), **options)
            undo.callback(made.close)
            return made

        yield relayed


def exchange(sock, data, length, rng):
    """Send and receive at once, in one thread as TLS wants it, in pieces of random sizes."""
    sock.setblocking(False)
    blocked = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
    poll = select.poll()
    view, piece, got = memoryview(data), None, bytearray()
    while view or len(got) < length:
        poll.register(sock, select.POLLIN | (select.POLLOUT if view else 0))
        pending = isinstance(sock, ssl.SSLSocket) and sock.pending()
        assert pending or poll.poll(LIMIT * 1000), f"{len(view)} bytes not taken, {length - len(got)} not there"
        with contextlib.suppress(*blocked):
            got += sock.recv(rng.choice(PIECES))
        piece = piece or view[: rng.choice(PIECES)]  # after it was blocked, TLS wants the same again
        with contextlib.suppress(*blocked):
            view, piece = view[sock.send(piece) if piece else 0 :], None
    return bytes(got)


def write(sock, data):
    sock.sendall(data)


def read(sock, length):
    data = bytearray()
    while len(data) < length:
        part = sock.recv(min(1 << 20, length - len(data)))
        if not part:
            break
        data += part
    return bytes(data)


def close_notify(session):
    """That alone: unwrap() would not let it read on. The socket may be full of what was sent before."""
    while True:
        try:
            session._sslobj.shutdown()
            return
        except ssl.SSLWantWriteError:
            poll = select.poll()
            poll.register(session, select.POLLOUT)
            assert poll.poll(LIMIT * 1000)


def end(sock):
    """The end of what ``sock`` sends."""
    if isinstance(sock, ssl.SSLSocket):
        sock.setblocking(False)
        with contextlib.suppress(ssl.SSLWantReadError):
            close_notify(sock)
        sock.settimeout(LIMIT)
    else:
        sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_much_data_both_ways_at_once(relayed, rng, in_threads, version):
    made = relayed(version=version)
    there, back = rng.randbytes(24 * MIB + 1), rng.randbytes(24 * MIB + 3)
    at_client, at_loop = in_threads(
        lambda: exchange(made.client, there, len(back), random.Random(1)),
        lambda: exchange(made.loop, back, len(there), random.Random(2)),
    )
    assert at_loop == there
    assert at_client == back
    assert not made.guest.done


def test_requests_and_replies_in_turn(relayed, rng):
    made = relayed()
    for size in (1, 28, 4096, 16384, 16385, 65536, 65537, 200000):
        data = rng.randbytes(size)
        got = Guest(read, made.loop, size)
        made.client.sendall(data)
        assert got.result() == data
        got = Guest(read, made.client, size)
        made.loop.sendall(data)
        assert got.result() == data


@pytest.mark.parametrize("size", [2, 1000, 16384])
def test_what_is_decrypted_already_is_not_waited_for(relayed, rng, size):
    pipelined = rng.randbytes(size)
    assert read(relayed(pipelined=pipelined).loop, size - size // 2) == pipelined[size // 2 :]


def test_a_record_for_which_there_was_no_room_is_not_waited_for(relayed, rng):
    """Its rest is decrypted already, and no event tells of it."""
    made = relayed()
    sent = b""
    while not (made.session.pending() and settled(made.session.pending)):
        assert len(sent) < 4 * MIB
        record = rng.randbytes(16000)  # 64 KiB end inside the fifth
        made.client.sendall(record)
        sent += record
        until(lambda: not select.select([made.served], [], [], 0)[0], "the relay takes a record")
    assert read(made.loop, len(sent)) == sent


def test_the_loop_ends_first_and_the_client_gets_all_of_it(relayed, rng):
    made = relayed()
    data = rng.randbytes(3 * MIB)
    sending = Guest(lambda: (write(made.loop, data), made.loop.close()))
    assert read(made.client, len(data)) == data
    assert made.client.recv(1) == b"", "with a close_notify: a cut connection would raise"
    sending.result()
    made.guest.result()


def test_the_loop_may_end_with_unread_requests(relayed):
    made = relayed()
    made.client.sendall(b"x" * 100)
    until(lambda: select.select([made.loop], [], [], 0)[0], "the request")
    made.loop.sendall(b"the last reply")
    made.loop.close()
    assert read(made.client, 14) == b"the last reply"
    assert made.client.recv(1) == b""
    made.guest.result()


def test_the_client_ends_first_and_gets_what_is_still_answered(relayed, rng):
    made = relayed()
    there, back = rng.randbytes(3 * MIB), rng.randbytes(3 * MIB)
    sending = Guest(lambda: (write(made.client, there), end(made.client)))
    assert read(made.loop, len(there) + 1) == there, "and then its end"
    sending.result()
    answering = Guest(lambda: (write(made.loop, back), made.loop.close()))
    assert read(made.client, len(back)) == back
    answering.result()
    made.guest.result()


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_is_gone_is_the_end_for_the_loop(relayed, how):
    made = relayed()
    made.client.sendall(b"disconnect")
    if how == "reset":
        made.session.setblocking(False)
        made.raw.sendall(b"no TLS at all")
    else:
        made.client.close()
        made.raw.close()
    assert read(made.loop, 100) == b"disconnect"
    assert not made.guest.done, "the loop may still have something to finish"
    made.loop.close()
    made.guest.result()


def test_a_client_that_is_gone_while_the_loop_sends_ends_it(relayed):
    made = relayed()
    made.client.close()
    made.raw.close()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        write(made.loop, bytes(64 * MIB))
    made.guest.result()


def test_a_client_that_takes_nothing_is_dropped(relayed):
    """Also after the loop has given up: what the relay holds must not hold the relay."""
    made = relayed(stall_seconds=0.5)
    made.loop.settimeout(0.1)
    with pytest.raises(TimeoutError):
        write(made.loop, bytes(64 * MIB))
    before = time.monotonic()
    made.loop.close()
    made.guest.result()
    assert time.monotonic() - before < 3
    assert len(read(made.raw, 64 * MIB)) < 64 * MIB, "what the kernel holds, and then the end"


def test_a_client_that_takes_little_is_not_dropped(relayed):
    made = relayed(stall_seconds=1.0)
    data = bytes(8 * MIB)
    sending = Guest(lambda: (write(made.loop, data), made.loop.close()))
    length = 0
    for _ in range(8):
        length += len(read(made.client, 300000))
        time.sleep(0.2)
    assert length + len(read(made.client, len(data))) == len(data)
    sending.result()
    made.guest.result()


@pytest.mark.parametrize("side", ["client", "loop"])
@pytest.mark.parametrize("busy", [False, True])
def test_shutting_down_either_side_ends_it_at_once(relayed, side, busy):
    made = relayed()
    if busy:
        for sock in (made.client, made.loop):
            sock.settimeout(0.1)
            with pytest.raises(TimeoutError):
                write(sock, bytes(64 * MIB))
    before = time.monotonic()
    if side == "client":
        made.served.shutdown(socket.SHUT_RDWR)
        made.loop.shutdown(socket.SHUT_RDWR)  # the loop, at its end
    else:
        made.plain.shutdown(socket.SHUT_RDWR)
        if busy:
            made.served.shutdown(socket.SHUT_RDWR)  # or the client may still have what is there for it
    made.guest.result()
    assert time.monotonic() - before < 2


def test_nothing_passes_in_the_clear_when_the_session_is_shut_down(relayed):
    """SSLSocket.shutdown() takes the TLS away first, then shuts down; in between, recv() and send() are plain."""
    made = relayed()
    made.session._sslobj = None
    made.raw.sendall(b"a forged request")
    assert read(made.loop, 100) == b""
    made = relayed()
    made.session._sslobj = None
    made.loop.sendall(b"a reply")
    made.guest.result()
    assert read(made.raw, 100) == b""


def test_a_slow_client_is_a_stalled_one_only_without_progress(monkeypatch):
    class End:
        waits_for = 0

        def __init__(self, *counts):
            self.counts = list(counts)

        def __call__(self, view):
            return self.counts.pop(0)

    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    flow = _Flow(End(1000, 1000, 0), End(None, None, 1, None, 1999))
    assert flow.seconds_left(30) is None
    assert flow.move()
    assert flow.seconds_left(30) == 30
    now = 110.0
    assert flow.move(), "more has come, but nothing is sent"
    assert flow.seconds_left(30) == 20
    now = 120.0
    assert flow.move(), "the end has come, and one byte is sent"
    assert flow.seconds_left(30) == 30
    now = 155.0
    assert not flow.move()
    assert flow.seconds_left(30) == -5
    assert not flow.over
    assert flow.move()
    assert flow.seconds_left(30) is None
    assert flow.over


@pytest.mark.parametrize("state", ["idle", "client blocked", "loop blocked", "client ended"])
def test_a_relay_that_waits_takes_no_cpu(relayed, state):
    made = relayed()
    if "blocked" in state:
        sock = made.loop if state == "client blocked" else made.client
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            write(sock, bytes(64 * MIB))
    elif state == "client ended":
        end(made.client)
        assert read(made.loop, 1) == b""
    used = cpu_seconds(made.guest)
    time.sleep(0.5)
    assert cpu_seconds(made.guest) - used < 0.05


def cpu_seconds(thread):
    fields = (Path("/proc/self/task") / str(thread.native_id) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_what_a_relay_holds_is_bounded(relayed):
    made = relayed()
    data = bytes(64 * MIB)
    tracemalloc.start()
    try:
        for sock in (made.client, made.loop):
            sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                write(sock, data)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


# ---- exports ----


def test_what_an_export_is(make_disk):
    disk = make_disk(SIZE)
    bitmap = disk.bitmaps.add("b")
    mine = cbwcore.DirtyBitmap(SIZE, name="mine")
    export = Export("", disk, bitmaps=["b", mine])
    assert (export.name, export.source, export.size) == ("", disk, SIZE)
    assert (export.writable, export.discard, export.description) == (False, False, "")
    assert export.contexts == {BASE: None, "qemu:dirty-bitmap:b": bitmap, "qemu:dirty-bitmap:mine": mine}
    assert export.block_sizes(32 * MIB) == (1, 4096, 32 * MIB)
    snapshot = disk.snapshot()
    assert Export("n" * 1023, snapshot, bitmaps=["b"], discard=True).source is snapshot
    assert Export("€" * 341, disk, writable=True, description="d" * 4096).writable


def refused_exports(disk, read_only, snapshot):
    other = cbwcore.DirtyBitmap(512, name="other")
    nameless = cbwcore.DirtyBitmap(SIZE)
    return {
        "1024 bytes": ("n" * 1024, disk, {}, "1023.*1024"),
        "UTF-8 counts": ("€" * 342, disk, {}, "1026"),
        "a NUL": ("a\0b", disk, {}, "NUL"),
        "a surrogate": ("\udc80", disk, {}, "UTF-8"),
        "no string": (b"disk", disk, {}, "string"),
        "None": (None, disk, {}, "string"),
        "a path": ("x", disk.path, {}, "str"),
        "a writable snapshot": ("x", snapshot, {"writable": True}, "snapshot"),
        "a writable read-only disk": ("x", read_only, {"writable": True}, "read-only"),
        "discard of a disk": ("x", disk, {"discard": True}, "discard"),
        "an unknown bitmap": ("x", disk, {"bitmaps": ["nobody"]}, "'nobody'"),
        "a bitmap of another size": ("x", disk, {"bitmaps": [other]}, f"512.*{SIZE}"),
        "a bitmap without a name": ("x", disk, {"bitmaps": [nameless]}, "name ''"),
        "no bitmap": ("x", disk, {"bitmaps": [7]}, "int"),
        "a bitmap twice": ("x", disk, {"bitmaps": ["b", "b"]}, "two"),
        "a long description": ("x", disk, {"description": "d" * 4097}, "4097.*4096"),
        "a description with a NUL": ("x", disk, {"description": "\0"}, "NUL"),
        "a description of no string": ("x", disk, {"description": 7}, "string"),
        "a description of no UTF-8": ("x", disk, {"description": "\ud800"}, "UTF-8"),
    }


@pytest.mark.parametrize("case", refused_exports(*[type("", (), {"path": ""})] * 3))
def test_a_bad_export_is_refused(make_disk, make_image, case):
    disk = make_disk(SIZE)
    disk.bitmaps.add("b")
    read_only = cbwcore.Disk(make_image(SIZE, "read-only.img"), read_only=True)
    with read_only:
        name, source, arguments, match = refused_exports(disk, read_only, disk.snapshot())[case]
        with pytest.raises(cbwcore.ConfigError, match=match):
            Export(name, source, **arguments)


def test_what_is_closed_is_not_exported(make_disk):
    disk = make_disk(SIZE)
    snapshot = disk.snapshot()
    snapshot.close()
    with pytest.raises(ValueError, match="closed"):
        Export("x", snapshot)
    armed = disk.snapshot()
    disk.close()
    for source in (disk, armed):
        with pytest.raises(ValueError, match="closed"):
            Export("x", source)


@pytest.mark.parametrize(("align", "preferred"), [(1, 4096), (512, 4096), (4096, 4096), (16384, 16384), (MIB, 4096)])
def test_the_preferred_block_size_is_the_storages(make_disk, align, preferred):
    disk = make_disk(SIZE)
    disk._file = disk._file._replace(align=align)
    assert Export("x", disk).block_sizes(65536) == (1, preferred, 65536)
    disk.snapshot(cluster_size=MIB)
    assert Export("x", disk.snapshots[0]).block_sizes(65536) == (1, preferred, 65536)


def test_the_registry_of_exports(make_disk):
    disk = make_disk(512)
    exports = Exports()
    assert (exports.names(), exports.find(""), exports.find("x")) == ((), None, None)
    for name in "bac":
        exports.add(Export(name, disk))
    assert exports.names() == ("b", "a", "c")
    assert exports.find("").name == "b"
    with pytest.raises(cbwcore.ConfigError, match="'a' already"):
        exports.add(Export("a", disk))
    assert exports.remove("b").name == "b"
    for name in ("b", ""):
        with pytest.raises(cbwcore.ConfigError, match=repr(name)):
            exports.remove(name)
    assert exports.find("").name == "a"
    assert exports.find("b") is None


def test_the_registry_from_many_threads(make_disk, in_threads):
    disk = make_disk(512)
    exports = Exports()
    exports.add(Export("stays", disk))

    def work(name):
        for _ in range(200):
            exports.add(Export(name, disk))
            assert {"stays", name} <= {export.name for export in exports}
            assert exports.find("").name == "stays"
            exports.remove(name)

    in_threads(*(lambda name=name: work(name) for name in "abcd"))
    assert exports.names() == ("stays",)


# ---- limits ----


def test_the_default_limits_are_those_of_the_design():
    limits = NbdLimits()
    assert (limits.request, limits.drain, limits.bytes_in_flight) == (32 * MIB, 64 * MIB, 256 * MIB)
    assert (limits.connections, limits.negotiating, limits.options, limits.queries) == (100, 16, 32, 64)
    assert (limits.handshake_seconds, limits.stall_seconds) == (10.0, 30.0)
    assert (limits.option_bytes, limits.string_bytes, limits.extents) == (65536, 4096, 1 << 17)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in NbdLimits.__struct_fields__ for value in (0, -1, "1", None, float("nan"), 1 << 70)],
        *[(name, 1e9) for name in NbdLimits.__struct_fields__],
        ("string_bytes", 4097),
        ("handshake_seconds", float("inf")),
        ("drain", 32 * MIB - 1),
        ("bytes_in_flight", 32 * MIB - 1),
    ],
)
def test_a_bad_limit_is_refused_and_named(name, value):
    with pytest.raises(cbwcore.ConfigError, match=name):
        NbdLimits(**{name: value})


def test_limits_do_not_change():
    with pytest.raises(AttributeError):
        NbdLimits().request = 5


def test_the_constants_of_the_specification():
    assert tuple(struct.unpack(">QQ", b"NBDMAGICIHAVEOPT")) == (nbd.NBD_MAGIC, nbd.NBD_OPTS_MAGIC)
    assert nbd.NBD_REP_MAGIC == 0x3E889045565A9
