"""The NBD handshake: negotiate() over a socket pair, without a server."""

import contextlib
import os
import random
import select
import socket
import struct
import time
import tracemalloc
from types import SimpleNamespace

import pytest
from handshake_support import (
    ABORT,
    ACK,
    BASE,
    DF,
    EXPORT_NAME,
    FIXED,
    GO,
    INFO,
    INVALID,
    LIST,
    LIST_META,
    META,
    MIB,
    NO_ZEROES,
    READ_ONLY,
    REP_INFO,
    SERVER,
    SET_META,
    SIZE,
    STARTTLS,
    STRUCTURED,
    TOO_BIG,
    TRIM,
    UNKNOWN,
    UNSUP,
    WRITABLE,
    HandshakeClient,
    go,
    meta,
    option,
    text,
    u16,
    u32,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cbwcore.nbd import NbdLimits, handshake
from cbwcore.nbd.exports import Export, Exports
from cbwcore.nbd.handshake import HandshakeError, negotiate

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
    client = HandshakeClient(exports)
    try:
        client.send(b"".join(options) + tail)
        client.sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(HandshakeError):
            negotiated = client.guest.result()
            assert negotiated is None or negotiated.export in list(exports)
    finally:
        client.close()
