"""libnbd's Python, with its own checks off (`set_strict_mode(0)`): requests that no well-behaved client sends.

Each ``judge_...`` function runs in the system's Python, which has the libnbd package, and returns what it saw.
"""

import errno
import inspect
import json
import os
import time

import pytest
from interop_support import CLUSTER, COMMAND, LIMIT, MIB, ODD, assert_same, mixed, need_libnbd_python, pattern


@pytest.fixture
def judge(run):
    """``judge(function, *arguments)``: what the function returns, as JSON, when libnbd's Python runs it.

    ``judge.command(function, *arguments)``: the command that prints it."""
    python = need_libnbd_python()

    def command(function, *arguments):
        sources = [inspect.getsource(each) for each in (connected, error_of, extents_of, function)]
        call = f"print(json.dumps({function.__name__}(*json.loads(sys.argv[1]))))"
        script = "\n".join(["import errno, json, sys, time, nbd", *sources, call])
        return [python, "-c", script, json.dumps(arguments)]

    def judge(function, *arguments):
        return json.loads(run(*command(function, *arguments)).stdout)

    judge.command = command
    return judge


def connected(uri, *contexts, **settings):
    """A libnbd handle that checks nothing by itself."""
    import nbd

    h = nbd.NBD()
    h.set_strict_mode(0)
    for context in contexts:
        h.add_meta_context(context)
    for name, value in settings.items():
        getattr(h, f"set_{name}")(value)
    h.connect_uri(uri)
    return h


def error_of(call, *arguments):
    """The errno's name that a request fails with; None where it succeeds."""
    import nbd

    try:
        call(*arguments)
    except nbd.Error as e:
        return errno.errorcode[e.errnum]
    return None


def extents_of(h, length, offset, flags=0):
    """{context: [[length, flags], ...]} of one block status."""
    found = {}

    def extent(context, position, entries, error):
        found[context] = [entries[i : i + 2] for i in range(0, len(entries), 2)]

    h.block_status(length, offset, extent, flags)
    return found


# ---- requests that must be refused, after which the connection goes on ----


def judge_bad_requests(uri, size):
    import nbd

    h = connected(uri, "base:allocation")
    mib = 1 << 20
    data = bytearray(b"x" * 4096)
    requests = {
        "read past the end": (h.pread, 4096, size - 4095),
        "read at the end": (h.pread, 1, size),
        "read far away": (h.pread, 4096, 1 << 62),
        "read that wraps": (h.pread, 4096, (1 << 64) - 4095),
        "write past the end": (h.pwrite, data, size - 4095),
        "write at the end": (h.pwrite, data, size),
        "write that wraps": (h.pwrite, data, (1 << 64) - 4095),
        "zero past the end": (h.zero, 4096, size - 4095),
        "zero of 4 GiB": (h.zero, (1 << 32) - 1, 0),
        "trim past the end": (h.trim, 4096, size - 4095),
        "trim of 4 GiB": (h.trim, (1 << 32) - 1, 0),
        "cache past the end": (h.cache, 4096, size - 4095),
        "status past the end": (h.block_status, 4096, size - 4095, lambda *a: 0),
        "status of nothing": (h.block_status, 0, 0, lambda *a: 0),
        "read of 33 MiB": (h.pread, 33 * mib, 0),
        "read of 64 MiB": (h.pread, 64 * mib, 0),
        "write of 33 MiB": (h.pwrite, bytearray(33 * mib), 0),
        "write of 64 MiB": (h.pwrite, bytearray(64 * mib), 0),
        "read with an unknown flag": (h.pread, 4096, 0, 1 << 14),
        "write with an unknown flag": (h.pwrite, data, 0, 1 << 14),
        "write with NO_HOLE": (h.pwrite, data, 0, nbd.CMD_FLAG_NO_HOLE),
        "zero with an unknown flag": (h.zero, 4096, 0, 1 << 14),
        "trim with an unknown flag": (h.trim, 4096, 0, 1 << 14),
        "flush with an unknown flag": (h.flush, 1 << 14),
        "status with an unknown flag": (h.block_status, 4096, 0, lambda *a: 0, 1 << 14),
    }
    seen = {}
    for name, request in requests.items():
        before = h.pread(65536, 0)
        seen[name] = error_of(*request)
        assert h.pread(65536, 0) == before, name  # the connection goes on, and nothing was written
    h.shutdown()
    return seen


def test_bad_requests(serve, image, judge):
    size = 80 * MIB + 1000
    t0 = pattern(MIB) + bytes(size - MIB)
    path = image(t0)
    server = serve(path)
    seen = judge(judge_bad_requests, server.uri(), size)
    no_space = {"write past the end", "write at the end", "write that wraps", "zero past the end", "zero of 4 GiB"}
    assert seen == {name: "ENOSPC" if name in no_space else "EINVAL" for name in seen}
    assert len(seen) == 25
    assert_same(path, t0)


def judge_read_only(uri, size):
    import nbd

    h = connected(uri, "base:allocation")
    assert h.is_read_only()
    before = h.pread(65536, 0)
    requests = {
        "write": (h.pwrite, bytearray(4096), 0),
        "write of 1 byte": (h.pwrite, bytearray(1), size - 1),
        "write of 8 MiB": (h.pwrite, bytearray(8 << 20), 0),
        "write with FUA": (h.pwrite, bytearray(4096), 0, nbd.CMD_FLAG_FUA),
        "zero": (h.zero, 4096, 0),
        "zero of all": (h.zero, size, 0),
        "trim": (h.trim, 4096, 0),
    }
    seen = {}
    for name, request in requests.items():
        seen[name] = error_of(*request)
        assert h.pread(65536, 0) == before, name
    h.shutdown()
    return seen


def test_read_only_exports(serve, image, judge):
    t0 = pattern(ODD)
    path = image(t0)
    server = serve(path)
    assert set(judge(judge_read_only, server.uri("snapshot"), ODD).values()) == {"EPERM"}
    assert_same(path, t0)
    server.stop()
    read_only = serve(path, "--read-only", "--no-snapshot", target=None)
    assert set(judge(judge_read_only, read_only.uri(), ODD).values()) == {"EPERM"}
    assert_same(path, t0)


def judge_simple_replies(uri, size):
    import nbd

    h = connected(uri, request_structured_replies=False)
    assert not h.get_structured_replies_negotiated()
    assert not h.can_df()
    seen = {
        "DF": error_of(h.pread, 4096, 0, nbd.CMD_FLAG_DF),
        "past the end": error_of(h.pread, 4096, size - 1),
        "write": error_of(h.pwrite, bytearray(b"y" * 10), size - 10),
        "status": error_of(h.block_status, 4096, 0, lambda *a: 0),
    }
    tail = h.pread(20, size - 20)
    h.shutdown()
    return [seen, tail.hex()]


def test_without_structured_replies(serve, image, judge):
    t0 = pattern(ODD)
    server = serve(image(t0))
    seen, tail = judge(judge_simple_replies, server.uri(), ODD)
    assert seen.pop("status") in ("EINVAL", "ENOTSUP")  # libnbd itself says ENOTSUP, and does not ask
    assert seen == {"DF": "EINVAL", "past the end": "EINVAL", "write": None}
    assert bytes.fromhex(tail) == t0[-20:-10] + b"y" * 10


def judge_nothing(uri, size):
    """Requests of no bytes, which the protocol leaves open and this server does."""
    h = connected(uri)
    before = h.pread(4096, 0)
    seen = [
        error_of(call, *arguments)
        for offset in (0, 1, size)
        for call, *arguments in (
            (h.pread, 0, offset),
            (h.pwrite, bytearray(), offset),
            (h.zero, 0, offset),
            (h.trim, 0, offset),
            (h.cache, 0, offset),
        )
    ]
    assert h.pread(4096, 0) == before
    h.shutdown()
    return seen


def test_requests_of_no_bytes(serve, image, judge):
    t0 = pattern(ODD)
    path = image(t0)
    assert set(judge(judge_nothing, serve(path).uri(), ODD)) == {None}
    assert_same(path, t0)


# ---- requests that must succeed ----


def judge_flags(uri):
    """FUA on every command; DF; and FAST_ZERO, which may be refused but must then change nothing."""
    import nbd

    h = connected(uri, "base:allocation")
    fua = nbd.CMD_FLAG_FUA
    seen = [
        error_of(h.pread, 4096, 0, fua),
        error_of(h.pwrite, bytearray(b"w" * 100), 5, fua),
        error_of(h.zero, 100, 200, fua),
        error_of(h.zero, 8192, 65536, fua | nbd.CMD_FLAG_NO_HOLE),
        error_of(h.trim, 4096, 131072, fua),
        error_of(h.cache, 4096, 0, fua),
        error_of(h.flush, fua),
        error_of(h.block_status, 4096, 0, lambda *a: 0, fua),
        error_of(h.pread, 1 << 20, 3, nbd.CMD_FLAG_DF | fua),
        error_of(h.cache, 1 << 20, 0),
        error_of(h.flush),
    ]
    before = h.pread(65536, 1 << 20)
    fast = error_of(h.zero, 65536, 1 << 20, nbd.CMD_FLAG_FAST_ZERO)
    assert h.pread(65536, 1 << 20) == (before if fast else bytearray(65536))
    h.shutdown()
    return [seen, fast]


def test_flags(serve, image, judge):
    t0 = pattern(ODD)
    path = image(t0)
    server = serve(path)
    seen, fast = judge(judge_flags, server.uri())
    assert set(seen) == {None}
    assert fast in (None, "ENOTSUP")
    now = bytearray(t0)
    now[5:105] = b"w" * 100
    now[200:300] = bytes(100)
    now[65536:73728] = bytes(8192)
    with open(path, "rb") as f:
        assert_same(f.read(131072), bytes(now[:131072]))


def judge_structured_reads(uri, size):
    """Every byte comes in exactly one chunk; with DF there is one chunk."""
    import nbd

    h = connected(uri)
    whole = bytearray(size)
    for flags in (0, nbd.CMD_FLAG_DF):
        for length, offset in ((size, 0), (1, size - 1), (100_001, 12_345), (65536, 65536)):
            chunks = []

            def chunk(data, position, status, error, chunks=chunks):
                assert status in (nbd.READ_DATA, nbd.READ_HOLE)
                chunks.append((position, len(data)))

            data = h.pread_structured(length, offset, chunk, flags)
            at = offset
            for position, count in sorted(chunks):
                assert position == at
                at += count
            assert at == offset + length
            assert len(chunks) == 1 or not flags
            whole[offset : offset + length] = data
    h.shutdown()
    return whole.hex()


def test_structured_reads(serve, image, judge):
    t0 = mixed(2 * MIB + 333)
    server = serve(image(t0))
    for name in ("disk", "snapshot"):
        assert_same(bytes.fromhex(judge(judge_structured_reads, server.uri(name), len(t0))), t0)


def judge_largest(uri):
    """32 MiB, the largest request, each way; the block sizes say so."""
    import nbd

    h = connected(uri)
    sizes = [h.get_block_size(which) for which in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
    data = bytearray(b"0123456789abcdef" * (2 << 20))
    h.pwrite(data, 77)
    assert h.pread(32 << 20, 77) == data
    assert h.pread(1, 76) + h.pread(1, 77 + (32 << 20)) == bytearray(b"\7\7")
    h.zero(33 << 20, 0)  # no payload: no limit but the disk's end
    assert h.pread(32 << 20, 1 << 20) == bytearray(32 << 20)
    h.trim(40 << 20, 0)
    h.shutdown()
    return sizes


def test_largest_requests(serve, image, judge, run, place, program):
    program("nbdcopy")
    t0 = b"\x07" * (40 * MIB + 100)
    server = serve(image(t0))
    minimum, preferred, maximum = judge(judge_largest, server.uri())
    assert (minimum, maximum) == (1, 32 * MIB)
    assert preferred in (4096, 65536)
    run("nbdcopy", server.uri("snapshot"), place / "out")
    assert_same(place / "out", t0)


# ---- block status ----


def judge_status(uri, size, contexts):
    """Status from everywhere: REQ_ONE and not, at odd places; the map of base:allocation byte by byte."""
    import nbd

    h = connected(uri, *contexts)
    assert all(h.can_meta_context(context) for context in contexts)
    shown = []
    for length, offset in ((size, 0), (1, 0), (1, size - 1), (777, 65_000), (size - 4097, 4097), (200_000, 123_456)):
        for flags in (0, nbd.CMD_FLAG_REQ_ONE):
            for context, entries in extents_of(h, length, offset, flags).items():
                assert len(entries) >= 1
                assert all(count > 0 for count, _ in entries)
                if flags:
                    assert len(entries) == 1
                    assert entries[0][0] <= length
                assert sum(count for count, _ in entries[:-1]) < length
                assert offset + sum(count for count, _ in entries) <= size
                at = offset
                for count, status in entries:
                    shown.append([context, at, count, status])
                    at += count
            assert len(extents_of(h, length, offset, flags)) == len(contexts)
    h.shutdown()
    return shown


def test_status_from_anywhere(host, image, judge, run, program):
    """Several contexts in one request; what is called zero is zero, what is called dirty was written."""
    program("qemu-io")
    t0 = mixed(2 * MIB + 1000)
    here = host(image(t0))
    here.disk.bitmaps.add("a")
    here.disk.bitmaps.add("b", granularity=512)
    here.server.add_export("disk", here.disk, writable=True, bitmaps=["a", "b"])
    here.server.add_export("snapshot", here.disk.snapshot())
    run("qemu-io", "-f", "raw", here.uri(), "-c", "write -z -u 512k 128k", "-c", "write -P 1 1000k 3k")
    now = here.disk.pread(len(t0), 0)
    contexts = ["base:allocation", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]
    for context, offset, length, status in judge(judge_status, here.uri(), len(t0), contexts):
        if context == "base:allocation":
            assert status in (0, 3)
            assert not status or not any(now[offset : offset + length])
        else:
            dirty = list(here.disk.bitmaps[context[-1]].ranges())
            inside = any(start <= offset and offset + length <= start + size for start, size in dirty)
            outside = all(offset + length <= start or offset >= start + size for start, size in dirty)
            assert (status == 1 and inside) or (status == 0 and outside)
    for _, offset, length, status in judge(judge_status, here.uri("snapshot"), len(t0), ["base:allocation"]):
        assert status in (0, 3)
        assert not status or not any(t0[offset : offset + length])


# ---- negotiation ----


def judge_negotiation(uri, name):
    """Look around before choosing: INFO, LIST, LIST_META_CONTEXT, a wrong GO; then the right one."""
    import nbd

    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_opt_mode(True)
    h.set_full_info(True)
    h.connect_uri(uri)
    exports, contexts = [], []
    count = h.opt_list(lambda export, description: exports.append([export, description]))
    assert count == len(exports)
    for wrong in ("nothing", "x" * 4096, "\N{SNOWMAN}"):
        h.set_export_name(wrong)
        assert error_of(h.opt_info) is not None
        assert error_of(h.opt_go) is not None
        assert h.aio_is_negotiating()
    h.set_export_name(name)
    h.opt_info()
    size = h.get_size()
    h.clear_meta_contexts()
    h.opt_list_meta_context(contexts.append)
    bitmaps = []
    h.add_meta_context("qemu:")
    h.opt_list_meta_context(bitmaps.append)
    h.clear_meta_contexts()
    for context in ("base:allocation", "qemu:dirty-bitmap:none", "else:where", "base:"):
        h.add_meta_context(context)
    h.opt_go()
    assert h.aio_is_ready()
    chosen = [h.can_meta_context(context) for context in ("base:allocation", "qemu:dirty-bitmap:none", "else:where")]
    assert h.get_size() == size
    description, canonical = h.get_export_description(), h.get_canonical_export_name()
    first = h.pread(16, 0)
    h.shutdown()
    other = nbd.NBD()
    other.set_opt_mode(True)
    other.connect_uri(uri)
    other.opt_abort()
    assert other.aio_is_closed()
    return [exports, contexts, bitmaps, chosen, size, description, canonical, first.hex()]


def test_negotiation(host, image, judge):
    t0 = pattern(ODD)
    here = host(image(t0))
    here.disk.bitmaps.add("b0")
    here.server.add_export("disk", here.disk, writable=True, bitmaps=["b0"], description="what the guest sees")
    here.server.add_export("snapshot", here.disk.snapshot(), description="what it was")
    exports, contexts, bitmaps, chosen, *facts = judge(judge_negotiation, here.uri("disk"), "disk")
    assert exports == [["disk", "what the guest sees"], ["snapshot", "what it was"]]
    assert sorted(contexts) == ["base:allocation", "qemu:dirty-bitmap:b0"]
    assert bitmaps == ["qemu:dirty-bitmap:b0"]
    assert chosen == [True, False, False]
    assert facts == [ODD, "what the guest sees", "disk", t0[:16].hex()]


def judge_handshakes(uri, size):
    """With and without fixed newstyle, which is EXPORT_NAME, and its 124 zeroes."""
    seen = []
    for flags in range(4):
        h = connected(uri, handshake_flags=flags)
        assert h.get_size() == size
        seen.append([h.get_protocol(), h.pread(16, size - 16).hex()])
        h.shutdown()
    return seen


def test_handshakes(serve, image, judge):
    t0 = pattern(ODD)
    server = serve(image(t0))
    for name in ("disk", "snapshot", ""):
        seen = judge(judge_handshakes, server.uri(name), ODD)
        assert [data for _, data in seen] == [t0[-16:].hex()] * 4
        assert {protocol for protocol, _ in seen} == {"newstyle", "newstyle-fixed"}


def judge_stdio(command):
    """A server of libnbd's own, on its standard input and output."""
    import nbd

    h = nbd.NBD()
    h.set_export_name("disk")
    h.connect_command(command)
    before = h.pread(4096, 12345)
    h.pwrite(bytearray(b"s" * 4096), 12345)
    after = h.pread(4096, 12345)
    h.shutdown()
    return [before.hex(), after.hex(), h.get_size()]


def test_stdio(image, judge):
    t0 = pattern(ODD)
    path = image(t0)
    before, after, size = judge(judge_stdio, [*COMMAND, path, "--stdio"])
    assert bytes.fromhex(before) == t0[12345 : 12345 + 4096]
    assert bytes.fromhex(after) == b"s" * 4096
    assert size == ODD
    assert_same(path, t0[:12345] + b"s" * 4096 + t0[12345 + 4096 :])


# ---- many requests and many connections ----


def judge_pipeline(uri, size):
    """A thousand requests in flight on one connection, each answered once and rightly, in whatever order."""
    import nbd

    h = connected(uri)
    done = []
    block = 4096
    places = [i * 7919 % (size // block) for i in range(1000)]
    for round_number in range(2):
        buffers = {}
        for i, place in enumerate(places):
            data = nbd.Buffer.from_bytearray(bytearray([round_number * 100 + place % 100 + 1]) * block)
            buffers[i] = data
            h.aio_pwrite(data, place * block, completion=lambda error, i=i: done.append((i, error.value)) or 1)
        while h.aio_in_flight():
            h.poll(-1)
        for i, place in enumerate(places):
            buffers[i] = nbd.Buffer(block)
            h.aio_pread(buffers[i], place * block, completion=lambda error, i=i: done.append((i, error.value)) or 1)
        while h.aio_in_flight():
            h.poll(-1)
        for i, place in enumerate(places):
            assert buffers[i].to_bytearray() == bytearray([round_number * 100 + place % 100 + 1]) * block
    assert len(done) == 4 * len(places)
    assert {error for _, error in done} == {0}
    h.shutdown()
    return len(set(places))


def test_a_thousand_requests_in_flight(serve, image, judge, run, place, program):
    program("nbdcopy")
    t0 = pattern(16 * MIB)
    path = image(t0)
    server = serve(path)
    assert judge(judge_pipeline, server.uri(), len(t0)) == 1000
    run("nbdcopy", server.uri("snapshot"), place / "out")
    assert_same(place / "out", t0)


def judge_disconnect(uri):
    """Writes are sent, then DISC, and nobody waits for the replies."""
    import nbd

    h = connected(uri)
    for i in range(64):
        h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i + 1]) * 65536), i * 65536)
    h.aio_disconnect()
    while not (h.aio_is_closed() or h.aio_is_dead()):
        h.poll(-1)


def test_disconnect_finishes_what_is_in_flight(serve, image, judge, run, place, program):
    program("nbdcopy")
    t0 = pattern(8 * MIB)
    path = image(t0)
    server = serve(path)
    judge(judge_disconnect, server.uri())
    expected = b"".join(bytes([i + 1]) * CLUSTER for i in range(64)) + t0[64 * CLUSTER :]
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        with open(path, "rb") as f:
            if f.read() == expected:
                break
        time.sleep(0.01)
    assert_same(path, expected)
    run("nbdcopy", server.uri("snapshot"), place / "out")
    assert_same(place / "out", t0)


def judge_writes_until_the_end(uri, count):
    """Write block after block, 32 in flight, until the server is gone; the numbers of those that were answered."""
    import nbd

    h = connected(uri)
    answered = []
    try:
        for i in range(count):
            block = nbd.Buffer.from_bytearray(bytearray([i % 255 + 1]) * 4096)
            h.aio_pwrite(block, i * 4096, completion=lambda error, i=i: error.value or answered.append(i) or 1)
            while h.aio_in_flight() >= 32:
                h.poll(-1)
    except nbd.Error:
        return answered
    return "the server did not end"


def test_what_was_answered_before_sigterm_is_there(serve, image, judge, background, place):
    path = place / "large.img"
    path.touch()
    os.truncate(path, 512 * MIB)
    server = serve(path)
    guest = background.start(*judge.command(judge_writes_until_the_end, server.uri(), 512 * MIB // 4096))
    end = time.monotonic() + LIMIT
    with open(path, "rb") as f:
        while os.pread(f.fileno(), 1, 2000 * 4096) == b"\0":
            assert time.monotonic() < end
            time.sleep(0.002)
        server.stop()
        answered = json.loads(background.finish(guest))
        assert len(answered) > 1900
        for i in answered:
            assert os.pread(f.fileno(), 4096, i * 4096) == bytes([i % 255 + 1]) * 4096


def judge_many_connections(uri, count):
    """Each sees what any other has written as soon as it was answered; a flush on one is for all."""
    handles = [connected(uri) for _ in range(count)]
    assert all(h.can_multi_conn() for h in handles)
    for i, h in enumerate(handles):
        h.pwrite(bytearray([i + 1]) * 5000, i * 5000)
    handles[0].flush()
    for i in range(count):
        reader = handles[(i * 7 + 3) % count]
        assert reader.pread(5000, i * 5000) == bytearray([i + 1]) * 5000
    for h in handles:
        h.shutdown()


def test_many_connections(serve, image, judge):
    t0 = pattern(ODD)
    path = image(t0)
    server = serve(path)
    judge(judge_many_connections, server.uri(), 90)
    expected = b"".join(bytes([i + 1]) * 5000 for i in range(90))
    assert_same(path, expected + t0[len(expected) :])


def judge_error_in_the_middle(uri, good, bad, cluster):
    """A read that begins where there is data and ends where there is none to be had fails as a whole, others do not."""
    h = connected(uri, "base:allocation")
    first = h.pread(cluster, good)
    seen = [error_of(h.pread, 2 * cluster, good), error_of(h.pread, cluster, bad), error_of(h.pread, 1, bad)]
    assert h.pread(cluster, good) == first
    h.shutdown()
    return [seen, first.hex()]


def test_reads_out_of_the_scope(host, image, judge):
    t0 = pattern(4 * CLUSTER)
    here = host(image(t0))
    scope = here.disk.bitmaps.add("scope", enabled=False)
    scope.set_range(0, CLUSTER)
    here.server.add_export("snapshot", here.disk.snapshot(bitmap="scope"))
    seen, first = judge(judge_error_in_the_middle, here.uri("snapshot"), 0, CLUSTER, CLUSTER)
    assert seen == ["EIO"] * 3
    assert bytes.fromhex(first) == t0[:CLUSTER]


def judge_reclaim(uri, offset, length):
    """TRIM of a snapshot export that takes it; what only overlaps a cluster stays."""
    h = connected(uri, "base:allocation")
    assert h.is_read_only()
    assert h.can_trim()
    seen = {
        "part": error_of(h.trim, 4096, offset),
        "read after": error_of(h.pread, 4096, offset),
        "trim": error_of(h.trim, length, offset),
        "read after trim": error_of(h.pread, 4096, offset),
        "write": error_of(h.pwrite, bytearray(4096), offset),
        "zero": error_of(h.zero, 4096, offset),
        "beside": error_of(h.pread, offset, 0),
    }
    h.shutdown()
    return seen


def test_trim_of_a_snapshot_is_reclaim(serve, image, judge, run):
    """Opted in by --discard; the disk is not touched, and writes stay refused."""
    t0 = pattern(ODD)
    path = image(t0)
    server = serve(path, "--discard")
    seen = judge(judge_reclaim, server.uri("snapshot"), MIB, MIB)
    assert seen == {
        "part": None,
        "read after": None,
        "trim": None,
        "read after trim": "EIO",
        "write": "EPERM",
        "zero": "EPERM",
        "beside": None,
    }
    assert_same(path, t0)
