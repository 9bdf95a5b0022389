"""The handshake over a socket, byte for byte (NBD doc/proto.md, fixed newstyle)."""

import ssl
import struct

import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, until
from nbd_support import Client, Disconnected

WRITABLE = (
    nbd.HAS_FLAGS
    | nbd.SEND_FLUSH
    | nbd.SEND_FUA
    | nbd.SEND_TRIM
    | nbd.SEND_WRITE_ZEROES
    | nbd.SEND_FAST_ZERO
    | nbd.SEND_CACHE
    | nbd.CAN_MULTI_CONN
)
READ_ONLY = nbd.HAS_FLAGS | nbd.READ_ONLY | nbd.SEND_CACHE | nbd.CAN_MULTI_CONN
ALL_INFO = (nbd.INFO_EXPORT, nbd.INFO_NAME, nbd.INFO_DESCRIPTION, nbd.INFO_BLOCK_SIZE)
KNOWN = range(1, 11)


@pytest.fixture
def disk(host):
    return host.disk(3 * CLUSTER + 7)


def works(client, disk):
    """The transmission phase has begun, and neither side is a byte ahead of the other."""
    assert client.read(1, 1000) == disk.t0[1:1001]
    client.disconnect()


# ---- greeting and client flags ----


def test_the_greeting_offers_fixed_newstyle_and_no_zeroes_and_nothing_else(host, disk):
    assert host.hello().handshake_flags == nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES


@pytest.mark.parametrize("flags", [4, 7, 1 << 16 | 3, 1 << 31, 2**32 - 1])
def test_an_unknown_client_flag_drops_the_client(host, disk, flags):
    assert host.hello(flags=flags).dropped() == b""


@pytest.mark.parametrize("flags", range(4))
def test_export_name_is_followed_by_124_zeroes_unless_both_sides_do_without(host, disk, flags):
    client = host.hello(flags=flags)
    assert client.export_name("disk").size == disk.size
    works(client, disk)


@pytest.mark.parametrize("flags", [nbd.FIXED_NEWSTYLE, nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES])
def test_go_is_never_followed_by_zeroes(host, disk, flags):
    client = host.hello(flags=flags)
    assert client.go("disk").error == 0
    works(client, disk)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\0" * 64, struct.pack(">I", 3) + b"IHAVEOPX" * 8]
)
def test_what_is_no_nbd_client_is_dropped(host, disk, garbage):
    client = host.connect()
    client.send(garbage)
    assert client.dropped()[18:] == b""
    works(host.open(), disk)


def test_a_handshake_that_comes_byte_by_byte_is_no_other(host, disk):
    client = host.connect()
    option = nbd.option_header(nbd.GO, len(nbd.info_payload("disk"))) + nbd.info_payload("disk")
    for byte in struct.pack(">I", 3) + option:
        client.send(bytes([byte]))
    client.recv(18)
    assert client.option_reply(nbd.GO).error == 0
    works(client, disk)


def test_the_handshake_takes_no_byte_of_what_follows_it(host, disk):
    client = host.connect()
    structured = nbd.option_header(nbd.STRUCTURED_REPLY)
    go = nbd.info_payload("disk")
    read = client.expect(nbd.READ, 5, 100)
    client.send(struct.pack(">I", 3) + structured + nbd.option_header(nbd.GO, len(go)) + go + read)
    client.recv(18)
    assert client.option_reply(nbd.STRUCTURED_REPLY).error == 0
    assert client.option_reply(nbd.GO).error == 0
    assert client.reply().data == disk.t0[5:105]
    works(client, disk)


def test_a_request_right_behind_export_name_is_served(host, disk):
    client = host.connect()
    client.send(struct.pack(">I", 3) + nbd.option_header(nbd.EXPORT_NAME, 4) + b"disk" + client.expect(nbd.READ, 0, 9))
    client.recv(18)
    assert client.unpack("QH") == (disk.size, WRITABLE)
    assert client.reply().data == disk.t0[:9]


# ---- options in general ----


@pytest.mark.parametrize("opt", [0, nbd.PEEK_EXPORT, nbd.EXTENDED_HEADERS, 12, 0x12345678, 2**32 - 1])
@pytest.mark.parametrize("payload", [b"", b"x", nbd.option_header(nbd.ABORT) * 8, bytes(65536)])
def test_an_unknown_option_is_read_to_its_end_and_answered_err_unsup(host, disk, opt, payload):
    client = host.hello()
    assert client.option(opt, payload).error == nbd.ERR_UNSUP
    assert client.go("disk").error == 0
    works(client, disk)


@pytest.mark.parametrize("magic", [0, nbd.NBDMAGIC, nbd.IHAVEOPT ^ 1, nbd.REQUEST_MAGIC])
def test_an_option_with_another_magic_drops_the_client(host, disk, magic):
    client = host.hello()
    client.send(nbd.option_header(nbd.LIST, magic=magic))
    assert client.dropped() == b""


@pytest.mark.parametrize("opt", [nbd.LIST, nbd.STARTTLS, nbd.STRUCTURED_REPLY])
def test_a_payload_where_none_belongs_is_invalid_and_has_no_effect(host, disk, opt):
    client = host.hello()
    assert client.option(opt, b"abc").error == nbd.ERR_INVALID
    assert client.go("disk").error == 0
    assert client.structured is False
    works(client, disk)  # with simple replies


@pytest.mark.parametrize("opt", [*KNOWN, nbd.EXTENDED_HEADERS, 99])
def test_an_option_of_four_gib_drops_the_client_at_once(host, disk, opt):
    client = host.hello()
    client.send_option(opt, b"", length=2**32 - 1)
    assert client.dropped() == b""


@pytest.mark.parametrize("opt", sorted(set(KNOWN) - {nbd.EXPORT_NAME, nbd.ABORT, nbd.PEEK_EXPORT}))
def test_a_known_option_that_is_too_long_is_too_big_and_the_next_one_is_served(host, disk, opt):
    client = host.hello()
    assert client.option(opt, bytes(65537)).error in (nbd.ERR_TOO_BIG, nbd.ERR_INVALID)
    assert client.go("disk").error == 0
    works(client, disk)


def test_abort_is_acknowledged_and_ends_the_connection(host, disk):
    client = host.hello()
    assert client.option(nbd.ABORT).error == 0
    assert client.dropped() == b""


def test_abort_with_a_payload_is_an_abort(host, disk):
    client = host.hello()
    assert client.option(nbd.ABORT, b"IHAVEOPT" * 100).error == 0
    assert client.dropped() == b""


def test_abort_without_waiting_for_the_answer_harms_nobody(host, disk):
    for _ in range(10):
        client = host.hello()
        client.send_option(nbd.ABORT)
        client.sock.close()
    host.ended()
    works(host.open(), disk)


# ---- LIST ----


def test_list_names_every_export_in_order_with_its_description(host, disk):
    host.server.add_export("ümlaut /:%", disk, description="of a disk")
    host.snapshot(disk)
    reply = host.hello().option(nbd.LIST)
    assert reply.error == 0
    assert reply.names == ["disk", "ümlaut /:%", "snapshot"]
    assert reply.descriptions == ["", "of a disk", ""]


def test_list_of_a_server_without_exports_is_empty(host):
    client = host.hello()
    assert client.option(nbd.LIST).names == []
    assert client.go("").error == nbd.ERR_UNKNOWN


def test_list_can_tell_of_the_longest_name_and_description(host, disk):
    host.server.add_export("n" * 1023, disk, description="d" * 4096)
    reply = host.hello().option(nbd.LIST)
    assert (reply.names[1], reply.descriptions[1]) == ("n" * 1023, "d" * 4096)


def test_exports_that_come_and_go_are_seen_by_a_negotiation_under_way(host, disk):
    client = host.hello()
    host.server.add_export("later", disk)
    assert client.option(nbd.LIST).names == ["disk", "later"]
    host.server.remove_export("disk")
    assert client.option(nbd.LIST).names == ["later"]
    assert client.go("disk").error == nbd.ERR_UNKNOWN
    assert client.info("").error == 0
    assert client.go("later").error == 0


# ---- EXPORT_NAME, INFO and GO ----


@pytest.mark.parametrize(
    "name", ["nosuch", "DISK", "disk ", b"disk\0", b"\xff\xfe", b"x" * 4096, b"x" * 4097, bytes(65537)]
)
def test_export_name_of_what_is_not_there_drops_the_client(host, disk, name):
    with pytest.raises(Disconnected):
        host.hello().export_name(name)


@pytest.mark.parametrize("opt", [nbd.INFO, nbd.GO])
@pytest.mark.parametrize("name", ["nosuch", "DISK", "disk/", "n" * 1023, b"x" * 4096])
def test_an_export_that_is_not_there_is_unknown_and_negotiation_goes_on(host, disk, opt, name):
    client = host.hello()
    assert client.info(name, *ALL_INFO, opt=opt).error == nbd.ERR_UNKNOWN
    assert client.go("disk").error == 0
    works(client, disk)


@pytest.mark.parametrize("opt", [nbd.INFO, nbd.GO])
@pytest.mark.parametrize("name", [b"disk\0", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80"])
def test_a_name_that_is_no_string_is_no_export(host, disk, opt, name):
    client = host.hello()
    assert client.info(name, opt=opt).error in (nbd.ERR_INVALID, nbd.ERR_UNKNOWN)
    assert client.go("disk").error == 0
    works(client, disk)


@pytest.mark.parametrize("structured", [False, True])
def test_info_and_go_tell_size_flags_and_block_sizes_always(host, disk, structured):
    client = host.hello()
    if structured:
        client.option(nbd.STRUCTURED_REPLY)
    told = client.info("disk")
    flags = WRITABLE | (nbd.SEND_DF if structured else 0)
    assert told.info == {nbd.INFO_EXPORT: (disk.size, flags), nbd.INFO_BLOCK_SIZE: (1, 4096, 32 << 20)}
    assert client.go("disk").info == told.info
    works(client, disk)


def test_info_and_go_tell_name_and_description_when_asked(host, disk):
    host.server.add_export("second", disk, description="what it is")
    client = host.hello()
    told = client.info("second", *ALL_INFO)
    assert set(told.info) == set(ALL_INFO)
    assert told.info[nbd.INFO_NAME] == "second"
    assert told.info[nbd.INFO_DESCRIPTION] == "what it is"
    assert client.go("second", *ALL_INFO).info == told.info


def test_information_that_nobody_knows_of_is_ignored(host, disk):
    client = host.hello()
    told = client.info("disk", 4, 999, 65535, nbd.INFO_NAME)
    assert told.error == 0
    assert set(told.info) - {nbd.INFO_BLOCK_SIZE} == {nbd.INFO_EXPORT, nbd.INFO_NAME}


def test_the_empty_name_is_the_first_export_and_its_name_is_told(host, disk):
    host.server.add_export("second", disk)
    client = host.hello()
    assert client.go("", nbd.INFO_NAME).info[nbd.INFO_NAME] == "disk"
    works(client, disk)
    works(host.hello().export_name(""), disk)


def test_an_export_that_is_named_by_nothing_is_the_default_though_it_is_not_the_first(host, disk):
    second = host.disk(b"s" * 4096, name="")
    client = host.hello()
    assert client.go("").error == 0
    works(client, second)


@pytest.mark.parametrize("opt", [nbd.INFO, nbd.GO])
@pytest.mark.parametrize(
    "payload",
    {
        "nothing": b"",
        "half a length": b"\0\0",
        "no count": struct.pack(">I4s", 4, b"disk"),
        "half a count": struct.pack(">I4sB", 4, b"disk", 0),
        "name past the end": struct.pack(">I4sH", 5, b"disk", 0),
        "name past the end by the count": struct.pack(">I4sH", 6, b"disk", 0),
        "name of 4 GiB": struct.pack(">I4sH", 2**32 - 1, b"disk", 0),
        "name of 2 GiB": struct.pack(">I4sH", 2**31, b"disk", 0),
        "too few requests": struct.pack(">I4sHH", 4, b"disk", 2, 0),
        "65535 requests": struct.pack(">I4sHH", 4, b"disk", 65535, 0),
        "too many requests": struct.pack(">I4sHHH", 4, b"disk", 1, 0, 1),
        "half a request": struct.pack(">I4sHB", 4, b"disk", 0, 1),
    }.items(),
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_a_malformed_info_or_go_is_invalid(host, disk, opt, payload):
    client = host.hello()
    assert client.option(opt, payload[1]).error == nbd.ERR_INVALID
    assert client.go("disk").error == 0
    works(client, disk)


def test_transmission_flags_of_every_kind_of_export(host, disk):
    snap = host.snapshot(disk)
    host.server.add_export("reclaim", snap, discard=True)
    host.server.add_export("read-only", disk)
    expected = {
        "disk": WRITABLE,
        "read-only": READ_ONLY,
        "snapshot": READ_ONLY,
        "reclaim": READ_ONLY | nbd.SEND_TRIM,
    }
    for name, flags in expected.items():
        client = host.hello()
        assert client.info(name).info[nbd.INFO_EXPORT] == (disk.size, flags)
        client.option(nbd.STRUCTURED_REPLY)
        assert client.info(name).info[nbd.INFO_EXPORT] == (disk.size, flags | nbd.SEND_DF)
        assert client.go(name).info[nbd.INFO_EXPORT][1] == flags | nbd.SEND_DF
        assert host.hello().export_name(name).flags == flags


@pytest.mark.parametrize("size", [1, 511, 512, 4097, CLUSTER - 1, CLUSTER + 1])
def test_the_size_is_the_disks_to_the_byte(host, size):
    disk = host.disk(size)
    client = host.open()
    assert client.size == size
    assert client.read(0, size) == disk.t0


# ---- STRUCTURED_REPLY ----


def test_structured_replies_asked_for_twice_are_still_negotiated(host, disk):
    client = host.hello()
    assert client.option(nbd.STRUCTURED_REPLY).error == 0
    assert client.option(nbd.STRUCTURED_REPLY).error in (0, nbd.ERR_INVALID)
    client.go("disk")
    works(client, disk)


def test_structured_replies_last_over_failed_options(host, disk):
    client = host.hello()
    client.option(nbd.STRUCTURED_REPLY)
    client.go("nosuch")
    client.option(nbd.LIST, b"x")
    client.export_name("disk")
    assert client.flags & nbd.SEND_DF
    works(client, disk)


# ---- metadata contexts ----


@pytest.fixture
def bitmaps(host, disk):
    """Its two bitmaps are exported, too, as `mapped`."""
    for name in ("b0", "weird: b/1"):
        disk.bitmaps.add(name)
    host.server.add_export("mapped", disk, bitmaps=["b0", "weird: b/1"])
    return ["qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:weird: b/1"]


@pytest.fixture
def client(host):
    client = host.hello()
    client.option(nbd.STRUCTURED_REPLY)
    return client


BASE = "base:allocation"


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ((), [BASE, "b0", "b1"]),
        (("base:",), [BASE]),
        (("base:allocation",), [BASE]),
        (("qemu:",), ["b0", "b1"]),
        (("qemu:dirty-bitmap:",), ["b0", "b1"]),
        (("qemu:dirty-bitmap:b0",), ["b0"]),
        (("base:", "qemu:dirty-bitmap:weird: b/1"), [BASE, "b1"]),
        (("base:", "base:allocation", "base:"), [BASE]),
        (("base:nosuch", "qemu:dirty-bitmap:nosuch"), []),
        (("x-other:", "x-other:thing", "qemu:allocation-depth"), []),
    ],
)
def test_list_meta_context_lists_what_the_queries_match(client, bitmaps, queries, expected):
    names = {BASE: BASE, "b0": bitmaps[0], "b1": bitmaps[1]}
    reply = client.meta(nbd.LIST_META_CONTEXT, "mapped", *queries)
    assert reply.error == 0
    assert sorted(reply.names) == sorted(names[n] for n in expected)
    assert set(reply.contexts) <= {0}
    assert client.go("mapped").error == 0
    assert client.call(nbd.BLOCK_STATUS, 0, 512).error == nbd.EINVAL  # listing selects nothing


@pytest.mark.parametrize("opt", [nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT])
@pytest.mark.parametrize("query", ["", "base", ":", "allocation", b"base:\xff", b"base:allocation\0", "base:x"])
def test_a_query_without_meaning_selects_nothing_or_is_invalid(client, bitmaps, opt, query):
    reply = client.meta(opt, "mapped", query)
    assert reply.error in (0, nbd.ERR_INVALID)
    assert reply.names == []
    assert client.meta(opt, "mapped", BASE).names == [BASE]


@pytest.mark.parametrize("opt", [nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT])
def test_contexts_of_an_export_that_is_not_there_are_unknown(client, disk, opt):
    assert client.meta(opt, "nosuch", BASE).error == nbd.ERR_UNKNOWN
    assert client.go("disk").error == 0


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ((), []),
        (("base:",), []),
        (("qemu:", "qemu:dirty-bitmap:"), []),
        (("x-other:thing", "qemu:dirty-bitmap:nosuch"), []),
        ((BASE,), [BASE]),
        ((BASE, BASE, BASE), [BASE]),
        ((BASE, "x-other:thing", "qemu:dirty-bitmap:b0"), [BASE, "b0"]),
        (("qemu:dirty-bitmap:weird: b/1", BASE, "qemu:dirty-bitmap:b0"), ["b1", BASE, "b0"]),
    ],
)
def test_set_meta_context_selects_exact_names_once_each(client, disk, bitmaps, queries, expected):
    names = {BASE: BASE, "b0": bitmaps[0], "b1": bitmaps[1]}
    reply = client.meta(nbd.SET_META_CONTEXT, "mapped", *queries)
    assert reply.error == 0
    assert sorted(reply.names) == sorted(names[n] for n in expected)
    assert client.go("mapped").error == 0
    status = client.call(nbd.BLOCK_STATUS, 0, 512)  # one chunk for each that was selected
    assert status.error == (0 if expected else nbd.EINVAL)
    assert client.read(0, 99) == disk.t0[:99]


def test_set_meta_context_replaces_the_set_before(client, bitmaps):
    client.meta(nbd.SET_META_CONTEXT, "mapped", BASE)
    client.meta(nbd.SET_META_CONTEXT, "mapped", bitmaps[0])
    client.go("mapped")
    (extents,) = client.ok(nbd.BLOCK_STATUS, 0, 512).status.values()
    assert list(client.contexts.values()) == [bitmaps[0]]
    assert extents == [(512, 0)]


@pytest.mark.parametrize(
    "payload",
    {
        "an unknown export": nbd.meta_payload("nosuch", BASE),
        "no queries": nbd.meta_payload("disk"),
        "queries that select nothing": nbd.meta_payload("disk", "base:"),
        "a malformed payload": nbd.meta_payload("disk", BASE) + b"x",
        "an empty payload": b"",
        "too many queries": nbd.meta_payload("disk", *[BASE] * 65),
        "a query that is too long": nbd.meta_payload("disk", "base:" + "a" * 4092),
        "a payload that is too long": bytes(65537),
    }.items(),
    ids=lambda value: value[0],
)
def test_set_meta_context_forgets_the_set_before_though_it_fails(client, disk, payload):
    assert client.meta(nbd.SET_META_CONTEXT, "disk", BASE).names == [BASE]
    assert client.option(nbd.SET_META_CONTEXT, payload[1]).names == []
    assert client.go("disk").error == 0
    assert client.call(nbd.BLOCK_STATUS, 0, 512).error == nbd.EINVAL
    assert client.read(0, 9) == disk.t0[:9]


@pytest.mark.parametrize("between", [nbd.LIST, nbd.LIST_META_CONTEXT, nbd.INFO, nbd.STRUCTURED_REPLY, 99])
def test_no_other_option_changes_the_set(client, disk, between):
    client.meta(nbd.SET_META_CONTEXT, "disk", BASE)
    payload = {nbd.LIST_META_CONTEXT: nbd.meta_payload("disk", "x:y"), nbd.INFO: nbd.info_payload("disk")}
    client.option(between, payload.get(between, b""))
    client.go("disk")
    assert client.ok(nbd.BLOCK_STATUS, 0, disk.size).status == {next(iter(client.contexts)): [(disk.size, 0)]}


def test_contexts_of_another_export_than_go_asks_for_are_void(client, host, disk):
    host.server.add_export("other", disk)
    client.meta(nbd.SET_META_CONTEXT, "other", BASE)
    assert client.go("disk").error == 0
    client.contexts = {}
    assert client.call(nbd.BLOCK_STATUS, 0, 512).error == nbd.EINVAL


def test_contexts_last_over_a_go_that_fails(client, disk):
    client.meta(nbd.SET_META_CONTEXT, "disk", BASE)
    assert client.go("nosuch").error == nbd.ERR_UNKNOWN
    client.go("disk")
    assert client.call(nbd.BLOCK_STATUS, 0, 512).error == 0


def test_contexts_are_for_export_name_too(client, disk):
    client.meta(nbd.SET_META_CONTEXT, "disk", BASE)
    client.export_name("disk")
    assert client.call(nbd.BLOCK_STATUS, 0, 512).error == 0


def test_set_meta_context_without_structured_replies_is_invalid(host, disk):
    client = host.hello()
    assert client.meta(nbd.SET_META_CONTEXT, "disk", BASE).error == nbd.ERR_INVALID
    assert client.meta(nbd.LIST_META_CONTEXT, "disk").error in (0, nbd.ERR_INVALID)
    client.option(nbd.STRUCTURED_REPLY)
    assert client.go("disk").error == 0
    assert client.call(nbd.BLOCK_STATUS, 0, 512).error == nbd.EINVAL


@pytest.mark.parametrize("opt", [nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT])
@pytest.mark.parametrize(
    "payload",
    {
        "nothing": b"",
        "no count": nbd.prefixed("disk"),
        "half a count": nbd.prefixed("disk") + b"\0\0",
        "name past the end": struct.pack(">I4sI", 9, b"disk", 0),
        "name of 4 GiB": struct.pack(">I4sI", 2**32 - 1, b"disk", 0),
        "a query that is missing": struct.pack(">I4sI", 4, b"disk", 1),
        "2^32-1 queries": struct.pack(">I4sI", 4, b"disk", 2**32 - 1),
        "a query past the end": struct.pack(">I4sII4s", 4, b"disk", 1, 5, b"base"),
        "a query of 4 GiB": struct.pack(">I4sII4s", 4, b"disk", 1, 2**32 - 1, b"base"),
        "something behind": nbd.meta_payload("disk", BASE) + b"\0",
    }.items(),
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_malformed_queries_are_invalid(client, disk, opt, payload):
    error = client.option(opt, payload[1]).error
    assert error in ((nbd.ERR_INVALID, nbd.ERR_TOO_BIG) if "2^32" in payload[0] else (nbd.ERR_INVALID,))
    assert client.go("disk").error == 0
    works(client, disk)


# ---- TLS ----


@pytest.mark.parametrize("opt", [nbd.LIST, nbd.INFO, nbd.GO, nbd.STRUCTURED_REPLY, 9, 10, 11, 99])
def test_before_required_tls_every_option_but_two_is_refused(tls_host, opt):
    host, server = tls_host(required=True)
    client = host.hello(server)
    payload = {nbd.INFO: nbd.info_payload("disk"), nbd.GO: nbd.info_payload("disk"), 9: nbd.meta_payload("disk")}
    reply = client.option(opt, payload.get(opt, b""))
    assert (reply.error, reply.items) == (nbd.ERR_TLS_REQD, [])
    assert client.option(nbd.ABORT).error == 0
    assert client.dropped() == b""


@pytest.mark.parametrize("name", ["disk", "nosuch"])
def test_before_required_tls_export_name_drops_the_client(tls_host, name):
    host, server = tls_host(required=True)
    with pytest.raises(Disconnected):
        host.hello(server).export_name(name)


def test_nobody_learns_before_required_tls_which_exports_there_are(tls_host):
    host, server = tls_host(required=True)
    client = host.hello(server)
    assert client.info("disk") == client.info("nosuch")
    assert client.meta(nbd.LIST_META_CONTEXT, "disk").error == client.meta(nbd.LIST_META_CONTEXT, "nosuch").error


@pytest.mark.parametrize("required", [True, False])
def test_after_starttls_all_is_as_without(tls_host, tls_client, structured, required):
    host, server = tls_host(required=required)
    client = host.hello(server).starttls(tls_client)
    if structured:
        assert client.option(nbd.STRUCTURED_REPLY).error == 0
    assert client.option(nbd.LIST).names == ["disk"]
    assert client.option(99).error == nbd.ERR_UNSUP
    assert client.info("nosuch").error == nbd.ERR_UNKNOWN
    assert client.go("disk").error == 0
    size = client.size
    content = bytes(range(256)) * (size // 256)
    for offset in range(0, len(content), 65536):
        client.ok(nbd.WRITE, offset, 0, content[offset : offset + 65536])
    assert client.read(0, len(content)) == content
    client.disconnect()


def test_starttls_twice_is_invalid_and_the_session_goes_on(tls_host, tls_client):
    host, server = tls_host(required=True)
    client = host.hello(server).starttls(tls_client)
    assert client.option(nbd.STARTTLS).error == nbd.ERR_INVALID
    assert client.go("disk").error == 0
    assert len(client.read(0, 4096)) == 4096


def test_starttls_without_tls_is_refused_and_negotiation_goes_on(host, disk):
    client = host.hello()
    assert client.option(nbd.STARTTLS).error in (nbd.ERR_POLICY, nbd.ERR_UNSUP)
    assert client.go("disk").error == 0
    works(client, disk)


def test_where_tls_is_allowed_a_client_may_do_without(tls_host):
    host, server = tls_host(required=False)
    client = host.hello(server)
    assert client.option(nbd.LIST).names == ["disk"]
    assert client.go("disk").error == 0
    assert len(client.read(0, 4096)) == 4096


def test_after_starttls_there_is_no_way_back(tls_host):
    host, server = tls_host(required=False)
    client = host.hello(server)
    assert client.option(nbd.STARTTLS).error == 0
    client.send_option(nbd.GO, nbd.info_payload("disk"))
    got = client.dropped()
    assert struct.pack(">Q", nbd.REPLY_MAGIC) not in got
    host.ended(server)


def test_a_client_without_a_certificate_is_not_served(tls_host, certificates):
    host, server = tls_host(required=True)
    anonymous = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    anonymous.check_hostname = False
    client = host.hello(server)
    with pytest.raises((Disconnected, ssl.SSLError, ConnectionError)):
        client.starttls(anonymous).go("disk")
    host.ended(server)


def test_dropped_clients_leave_nothing_behind(host, disk):
    """Whatever state they leave in."""
    steps = [
        lambda client: None,
        lambda client: client.recv(18),
        lambda client: client.hello(),
        lambda client: client.hello().send_option(nbd.GO, b"abc", length=100),
        lambda client: client.hello().info("disk"),
        lambda client: client.hello().go("disk"),
    ]
    for step in steps:
        with Client(host.paths[host.server]) as client:
            step(client)
    until(lambda: host.server.connections == 0, "the end of them all")
    works(host.open(), disk)
