"""The transmission phase: every command, flag, errno and range, of disks and snapshots, with both kinds of replies."""

import errno
import os
import select
import socket
import struct

import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, assert_t0, file_bytes, pattern, settled, stalled, until
from nbd_support import Client, Disconnected

MIB = 1 << 20
SIZE = 4 * CLUSTER + 777  # no multiple of anything
KINDS = ["disk", "read-only", "snapshot", "reclaim"]
READABLE = [nbd.READ, nbd.CACHE, nbd.BLOCK_STATUS]
CHANGING = [nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES]


@pytest.fixture
def disk(host):
    return host.disk(SIZE)


@pytest.fixture
def snap(host, disk):
    return host.snapshot(disk)


@pytest.fixture
def client(host, disk, snap, structured):
    """Of `disk`."""
    return host.open(structured=structured)


@pytest.fixture
def exports(host, disk, snap):
    """One of each kind, all with the content of T0."""
    host.server.add_export("read-only", disk)
    host.server.add_export("reclaim", snap, discard=True)


@pytest.fixture(params=KINDS)
def kind(request, exports):
    """The name of an export of each kind."""
    return request.param


def silent(client):
    """Nothing has come from the server that was not looked at."""
    return not client.replies and not select.select([client.sock], [], [], 0)[0]


def refused(client, disk, error, cmd, offset=0, length=0, flags=0, payload=b""):
    """The request gets that error; nothing has changed, and the connection is in step."""
    before = file_bytes(disk.path)
    reply = client.call(cmd, offset, length, payload, flags=flags)
    assert reply.error == error
    assert file_bytes(disk.path) == before
    assert client.read(0, 512) == before[:512]


# ---- READ ----


def test_every_kind_of_export_reads_as_it_should(host, disk, kind, structured, rng):
    client = host.open(kind, structured=structured)
    assert client.read(0, SIZE) == disk.t0
    for _ in range(40):
        offset = rng.randrange(SIZE)
        length = rng.randint(1, SIZE - offset)
        assert client.read(offset, length) == disk.t0[offset : offset + length]


def test_a_snapshot_reads_t0_and_the_disk_what_was_written(host, disk, snap, structured):
    guest, reader = host.open(structured=structured), host.open("snapshot", structured=structured)
    guest.ok(nbd.WRITE, 100, 0, b"n" * (2 * CLUSTER))
    assert reader.read(0, SIZE) == disk.t0
    assert guest.read(0, SIZE) == disk.t0[:100] + b"n" * (2 * CLUSTER) + disk.t0[100 + 2 * CLUSTER :]


def test_a_small_write_is_copied_for_too(host, disk, snap):
    """Such are served at once, unless they need a copy."""
    guest, reader = host.open(), host.open("snapshot")
    for new in (b"first", b"again"):
        guest.ok(nbd.WRITE, 100, 0, new)
        assert reader.read(0, SIZE) == disk.t0
        assert guest.read(100, 5) == new


@pytest.mark.parametrize("offset", [0, 1, CLUSTER, SIZE - 1, SIZE])
def test_a_read_of_nothing_succeeds_without_data(host, kind, structured, offset):
    client = host.open(kind, structured=structured)
    reply = client.ok(nbd.READ, offset, 0)
    assert reply.data == b""
    assert nbd.OFFSET_DATA not in reply.chunks
    assert client.read(0, 1)


def test_df_without_structured_replies_is_invalid(host, disk):
    refused(host.open(structured=False), disk, nbd.EINVAL, nbd.READ, 0, 512, nbd.DF)


@pytest.mark.parametrize("name", ["disk", "snapshot"])
def test_df_gets_one_chunk(host, name):
    disk = host.disk(bytes(3 * MIB) + pattern(2 * MIB) + bytes(3 * MIB))
    host.snapshot(disk)
    client = host.open(name)
    reply = client.ok(nbd.READ, 1, 8 * MIB - 1, flags=nbd.DF)
    assert reply.data == disk.t0[1:]
    assert len(reply.covered) == 1
    assert client.ok(nbd.READ, 0, 0, flags=nbd.DF).data == b""
    assert client.call(nbd.READ, 8 * MIB, 1, flags=nbd.DF).error == nbd.EINVAL


# ---- WRITE, WRITE_ZEROES, TRIM ----


def test_a_write_is_read_by_everybody_once_it_is_answered(host, disk, client, rng):
    other = host.open()
    expected = bytearray(disk.t0)
    for _ in range(20):
        offset = rng.randrange(SIZE)
        data = rng.randbytes(rng.randint(1, min(SIZE - offset, 100_000)))
        client.ok(nbd.WRITE, offset, 0, data)
        expected[offset : offset + len(data)] = data
        assert other.read(offset, len(data)) == data
    assert file_bytes(disk.path) == disk.pread(SIZE, 0) == expected


ZERO_FLAGS = [0, nbd.NO_HOLE, nbd.FUA, nbd.FUA | nbd.NO_HOLE, nbd.FAST_ZERO, nbd.FAST_ZERO | nbd.NO_HOLE]
ZERO_RANGES = [(0, SIZE), (1, 3), (4095, 2 * CLUSTER), (CLUSTER, CLUSTER), (SIZE - 1, 1)]


@pytest.mark.parametrize("flags", ZERO_FLAGS)
@pytest.mark.parametrize(("offset", "length"), ZERO_RANGES)
def test_write_zeroes_leaves_zeroes_there_and_nothing_else(host, disk, snap, client, flags, offset, length):
    reply = client.call(nbd.WRITE_ZEROES, offset, length, flags=flags)
    if reply.error == nbd.ENOTSUP and flags & nbd.FAST_ZERO:  # then nothing has changed
        offset, length = 0, 0
        reply.error = 0
    assert reply.error == 0
    assert client.read(0, SIZE) == disk.t0[:offset] + bytes(length) + disk.t0[offset + length :]
    assert_t0(snap, disk.t0)


def allocated(disk):
    """Whether the file system holds data for any of its whole clusters."""
    return any(extent.data for extent in disk.block_status(0, SIZE // CLUSTER * CLUSTER))


def test_write_zeroes_makes_holes_unless_it_must_not(host, disk, client):
    client.ok(nbd.WRITE_ZEROES, 0, SIZE, flags=nbd.NO_HOLE)
    assert allocated(disk)
    client.ok(nbd.WRITE_ZEROES, 0, SIZE)
    assert not allocated(disk)
    client.ok(nbd.WRITE_ZEROES, 0, SIZE, flags=nbd.NO_HOLE)
    assert client.read(0, SIZE) == bytes(SIZE)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_where_zeroing_is_not_fast_only_fast_zero_says_so(host, rig, disk, client, code):
    """A file system that cannot zero a range."""
    plan = rig.plan(disk)
    plan.error("zero", code)
    plan.error("discard", code)
    refused(client, disk, nbd.ENOTSUP, nbd.WRITE_ZEROES, 0, CLUSTER, nbd.FAST_ZERO)
    assert plan.calls("pwrite") == []
    client.ok(nbd.WRITE_ZEROES, 0, CLUSTER)
    assert client.read(0, SIZE) == bytes(CLUSTER) + disk.t0[CLUSTER:]


@pytest.mark.parametrize("flags", [nbd.FAST_ZERO, nbd.FAST_ZERO | nbd.FUA])
def test_fast_zero_that_is_refused_copies_nothing(host, disk, snap, client, flags):
    """tmpfs can make holes and cannot zero a range: it must not cost the snapshot a copy to find that out."""
    reply = client.call(nbd.WRITE_ZEROES, 0, SIZE, flags=flags | nbd.NO_HOLE)
    if reply.error == 0:
        pytest.skip("the file system of this disk zeroes ranges")
    assert reply.error == nbd.ENOTSUP
    assert snap.stats().cbw_bytes == snap.stats().guest_writes == disk.stats().guest_writes == 0
    assert client.read(0, SIZE) == disk.t0
    client.ok(nbd.WRITE_ZEROES, 0, SIZE, flags=flags)  # as a hole it is fast
    assert client.read(0, SIZE) == bytes(SIZE)
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("flags", [0, nbd.NO_HOLE])
def test_where_only_a_try_could_tell_fast_zero_is_refused_without_a_copy_from_then_on(
    host, rig, disk, snap, client, flags
):
    rig.plan(disk).error("zero", errno.EOPNOTSUPP)
    assert client.call(nbd.WRITE_ZEROES, 0, CLUSTER, flags=flags | nbd.FAST_ZERO).error == nbd.ENOTSUP
    copied = snap.stats().cbw_bytes
    for flags_ in (flags | nbd.FAST_ZERO, flags | nbd.FAST_ZERO | nbd.FUA):
        refused(client, disk, nbd.ENOTSUP, nbd.WRITE_ZEROES, 0, SIZE, flags_)
    assert snap.stats().cbw_bytes == copied <= CLUSTER
    client.ok(nbd.WRITE_ZEROES, 0, SIZE, flags=flags)
    assert client.read(0, SIZE) == bytes(SIZE)
    assert_t0(snap, disk.t0)


def test_fast_zero_whose_edges_fail_is_an_error_and_no_refusal(host, rig, disk, client):
    """ENOTSUP says that nothing has changed."""
    rig.plan(disk).error("flush", errno.EOPNOTSUPP)
    assert client.call(nbd.WRITE_ZEROES, 0, CLUSTER, flags=nbd.FAST_ZERO | nbd.FUA).error == nbd.EIO


@pytest.mark.parametrize("flags", [0, nbd.FUA])
def test_trim_changes_nothing_but_what_it_names_and_not_the_snapshot(host, disk, snap, client, flags):
    client.ok(nbd.TRIM, CLUSTER + 1, 2 * CLUSTER, flags=flags)
    got = client.read(0, SIZE)
    assert got[: CLUSTER + 1] == disk.t0[: CLUSTER + 1]
    assert got[3 * CLUSTER + 1 :] == disk.t0[3 * CLUSTER + 1 :]
    assert_t0(snap, disk.t0)


def test_trim_is_only_a_hint_where_the_storage_cannot(host, rig, disk, client):
    rig.plan(disk).error("discard", errno.EOPNOTSUPP)
    client.ok(nbd.TRIM, 0, CLUSTER)
    assert client.read(0, SIZE)[CLUSTER:] == disk.t0[CLUSTER:]


def test_trim_of_a_snapshot_gives_up_whole_clusters_inside_it(host, disk, snap, structured):
    host.server.add_export("reclaim", snap, discard=True)
    client = host.open("reclaim", structured=structured)
    assert client.flags & nbd.SEND_TRIM
    client.ok(nbd.TRIM, 1, CLUSTER - 2)
    assert client.read(0, SIZE) == disk.t0
    client.ok(nbd.TRIM, CLUSTER - 1, 2 * CLUSTER + 1)
    assert client.call(nbd.READ, CLUSTER, 1).error == nbd.EIO
    assert client.call(nbd.READ, 0, SIZE).error == nbd.EIO
    assert client.read(0, CLUSTER) == disk.t0[:CLUSTER]
    assert client.read(3 * CLUSTER, SIZE - 3 * CLUSTER) == disk.t0[3 * CLUSTER :]
    assert file_bytes(disk.path) == disk.t0


# ---- read-only exports ----


CHANGES = [(nbd.WRITE, 5), (nbd.WRITE, 3 * CLUSTER), (nbd.WRITE_ZEROES, 0), (nbd.TRIM, 0)]


@pytest.mark.parametrize("flags", [0, nbd.FUA])
@pytest.mark.parametrize(
    ("name", "cmd", "payload"),
    [(name, *change) for name in KINDS[1:] for change in CHANGES if (name, change[0]) != ("reclaim", nbd.TRIM)],
)
def test_a_change_of_a_read_only_export_is_not_permitted(
    host, disk, snap, exports, structured, name, cmd, payload, flags
):
    client = host.open(name, structured=structured)
    assert client.flags & nbd.READ_ONLY
    refused(client, disk, nbd.EPERM, cmd, 10, payload or CLUSTER, flags, b"n" * payload)
    assert_t0(snap, disk.t0)


def test_an_oversized_write_to_a_read_only_export_is_drained(host, disk, snap):
    client = host.open("snapshot")
    assert client.call(nbd.WRITE, 0, 0, bytes(33 * MIB)).error in (nbd.EPERM, nbd.EINVAL)
    assert client.read(0, SIZE) == disk.t0


# ---- ranges ----

OUTSIDE = [(SIZE - 1, 2), (SIZE, 1), (SIZE + 1, 1), (2**63, 512), (2**63 - 1, 1), (2**64 - 512, 512), (2**64 - 1, 1)]


@pytest.mark.parametrize(("offset", "length"), OUTSIDE)
@pytest.mark.parametrize("cmd", READABLE + CHANGING)
def test_outside_the_export_changes_get_enospc_and_all_else_einval(host, disk, snap, structured, cmd, offset, length):
    contexts = ["base:allocation"] if structured else []
    client = host.open(structured=structured, contexts=contexts)
    error = nbd.ENOSPC if cmd in (nbd.WRITE, nbd.WRITE_ZEROES) else nbd.EINVAL
    refused(client, disk, error, cmd, offset, length, payload=b"n" * length if cmd == nbd.WRITE else b"")
    assert disk.stats().guest_writes == 0
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("cmd", [nbd.READ, nbd.CACHE, nbd.BLOCK_STATUS, nbd.TRIM])
def test_outside_a_snapshot_is_invalid(host, snap, kind, structured, cmd):
    client = host.open("reclaim", structured=structured)
    for offset, length in OUTSIDE:
        assert client.call(cmd, offset, length).error == nbd.EINVAL
    assert client.read(SIZE - 1, 1)


def test_the_last_byte_belongs_to_the_export(host, disk, client):
    client.ok(nbd.WRITE, SIZE - 1, 0, b"L")
    assert client.read(SIZE - 1, 1) == b"L"
    for cmd in (nbd.CACHE, nbd.WRITE_ZEROES, nbd.TRIM):
        client.ok(cmd, SIZE - 1, 1)
    assert file_bytes(disk.path)[:-1] == disk.t0[:-1]


@pytest.mark.parametrize("flags", [0, nbd.FUA])
@pytest.mark.parametrize("offset", [0, 99, SIZE])
@pytest.mark.parametrize("cmd", [nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES, nbd.CACHE])
def test_a_request_of_length_zero_succeeds_and_does_nothing(disk, snap, client, cmd, offset, flags):
    client.ok(cmd, offset, 0, flags=flags)
    assert file_bytes(disk.path) == disk.t0
    assert snap.stats().cbw_copies == 0
    assert client.read(0, 9) == disk.t0[:9]


def test_block_status_of_length_zero_is_invalid(host, disk):
    client = host.open(contexts=["base:allocation"])
    assert client.call(nbd.BLOCK_STATUS, 0, 0).error == nbd.EINVAL
    assert client.read(0, 9) == disk.t0[:9]


@pytest.mark.parametrize("cmd", [nbd.READ, nbd.TRIM, nbd.WRITE_ZEROES, nbd.CACHE, nbd.BLOCK_STATUS, 8, 99])
@pytest.mark.parametrize("offset", [0, 512, 2**64 - 2**32 + 1, 2**64 - 1])
def test_a_length_of_four_gib_is_an_error_like_any_other(host, disk, snap, client, cmd, offset):
    error = nbd.ENOSPC if cmd == nbd.WRITE_ZEROES else nbd.EINVAL
    refused(client, disk, error, cmd, offset, 2**32 - 1)


def test_a_sparse_disk_takes_four_gib_at_once_of_what_brings_no_data(host, rig):
    disk = rig.sparse(9 << 30)
    host.server.add_export("disk", disk, writable=True)
    host.snapshot(disk)
    client = host.open(contexts=["base:allocation"])
    client.ok(nbd.WRITE, 5 << 30, 0, b"data")
    for cmd in (nbd.TRIM, nbd.WRITE_ZEROES, nbd.CACHE):
        assert client.call(cmd, 4 << 30, 2**32 - 1).error == 0
    assert client.read(5 << 30, 4) == bytes(4)
    assert sum(n for n, _ in client.ok(nbd.BLOCK_STATUS, 1, 2**32 - 1).status[1]) <= 2**32 - 1
    assert client.call(nbd.READ, 0, 2**32 - 1).error == nbd.EINVAL
    assert host.open("snapshot").read(5 << 30, 4) == bytes(4)


# ---- sizes of requests ----


@pytest.fixture
def large(host):
    """A disk of 33 MiB."""
    return host.disk(pattern(MIB) * 33)


@pytest.mark.parametrize("name", ["disk", "snapshot"])
def test_a_read_of_32_mib_is_served_and_one_byte_more_is_invalid(host, large, structured, name):
    host.snapshot(large)
    client = host.open(name, structured=structured)
    assert client.read(12345, 32 * MIB) == large.t0[12345 : 12345 + 32 * MIB]
    assert client.call(nbd.READ, 0, 32 * MIB + 1).error == nbd.EINVAL
    assert client.read(0, 9) == large.t0[:9]


def test_a_write_of_32_mib_is_served_and_one_byte_more_is_drained_and_invalid(host, large, structured):
    snap = host.snapshot(large)
    client = host.open(structured=structured)
    data = b"w" * (32 * MIB)
    client.ok(nbd.WRITE, 99, 0, data)
    assert client.call(nbd.WRITE, 0, 0, b"x" * (32 * MIB + 1)).error == nbd.EINVAL
    assert client.read(0, 200) == large.t0[:99] + b"w" * 101
    assert file_bytes(large.path) == large.t0[:99] + data + large.t0[99 + len(data) :]
    assert_t0(snap, large.t0)


def test_a_write_of_64_mib_is_drained(host, disk, structured):
    refused(host.open(structured=structured), disk, nbd.EINVAL, nbd.WRITE, 0, 0, 0, bytes(64 * MIB))


@pytest.mark.parametrize("length", [64 * MIB + 1, 2**31, 2**32 - 1])
def test_a_write_above_64_mib_drops_the_client_before_its_data(host, disk, structured, length):
    client = host.open(structured=structured)
    client.send(nbd.header(nbd.WRITE, 0, length))
    assert client.dropped() == b""
    assert file_bytes(disk.path) == disk.t0


EDGES = [65535, 65536, 65537, 131043, 131044, 131045, 131071, 131072, 131073, 262143, 262144, 262145]


@pytest.mark.parametrize("name", ["disk", "snapshot"])
@pytest.mark.parametrize("length", EDGES)
def test_lengths_at_the_edges_of_the_servers_buffers(host, structured, name, length):
    """Alone, and close behind each other."""
    disk = host.disk(pattern(MIB) * 9)
    host.snapshot(disk)
    client = host.open(name, structured=structured)
    assert client.read(77, length) == disk.t0[77 : 77 + length]
    if name == "disk":
        client.ok(nbd.WRITE, 77, 0, b"w" * length)
        assert client.read(0, length + 200) == disk.t0[:77] + b"w" * length + disk.t0[77 + length :][:123]
        written = b"".join(client.expect(nbd.WRITE, n * MIB, length) + bytes([n]) * length for n in range(1, 5))
        client.send(written + b"".join(client.expect(nbd.READ, n * MIB, length) for n in range(5, 8)))
    else:
        client.send(b"".join(client.expect(nbd.READ, n * MIB, length) for n in range(1, 8)))
    for _ in range(7):
        reply = client.reply()
        assert reply.error == 0
        assert reply.cmd == nbd.WRITE or reply.data == disk.t0[reply.offset :][:length]
    if name == "disk":
        for n in range(1, 5):
            assert client.read(n * MIB, length) == bytes([n]) * length


# ---- flags and commands ----

ALL = [nbd.READ, nbd.WRITE, nbd.FLUSH, nbd.TRIM, nbd.CACHE, nbd.WRITE_ZEROES, nbd.BLOCK_STATUS]
FLAGS_OF = {
    nbd.READ: nbd.FUA | nbd.DF,
    nbd.WRITE_ZEROES: nbd.FUA | nbd.NO_HOLE | nbd.FAST_ZERO,
    nbd.BLOCK_STATUS: nbd.FUA | nbd.REQ_ONE,
}
BAD_FLAGS = [(cmd, 1 << bit) for cmd in ALL for bit in range(16) if not FLAGS_OF.get(cmd, nbd.FUA) & 1 << bit]


@pytest.mark.parametrize(("cmd", "flags"), BAD_FLAGS)
def test_a_flag_that_is_not_the_commands_is_invalid(host, disk, snap, cmd, flags):
    client = host.open(contexts=["base:allocation"])
    length = 0 if cmd == nbd.FLUSH else 512
    payload = b"n" * 512 if cmd == nbd.WRITE else b""
    refused(client, disk, nbd.EINVAL, cmd, 0, length, flags, payload)
    refused(client, disk, nbd.EINVAL, cmd, 0, length, flags | nbd.FUA, payload)
    assert snap.stats().cbw_copies == disk.stats().guest_writes == 0


@pytest.mark.parametrize("cmd", ALL)
def test_fua_is_accepted_with_every_command(host, disk, structured, cmd):
    client = host.open(structured=structured, contexts=["base:allocation"] if structured else [])
    assert client.flags & nbd.SEND_FUA
    payload = b"n" * 512 if cmd == nbd.WRITE else b""
    reply = client.call(cmd, 0, 0 if cmd == nbd.FLUSH else 512, payload, flags=nbd.FUA)
    assert reply.error == (nbd.EINVAL if cmd == nbd.BLOCK_STATUS and not structured else 0)


@pytest.mark.parametrize("cmd", [8, 9, 100, 0x8000, 0xFFFF])
@pytest.mark.parametrize("length", [0, 512, 2**32 - 1])
def test_an_unknown_command_is_invalid_and_has_no_payload(host, disk, kind, structured, cmd, length):
    client = host.open(kind, structured=structured)
    assert client.call(cmd, 0, length).error == nbd.EINVAL
    assert client.read(0, 9) == disk.t0[:9]


@pytest.mark.parametrize("magic", [0, 0x12560953, 0x25609514, 0x21E41C71, nbd.SIMPLE_MAGIC, nbd.CHUNK_MAGIC])
def test_a_request_with_another_magic_drops_the_client(host, disk, structured, magic):
    client = host.open(structured=structured)
    client.send(struct.pack(">I", magic) + nbd.header(nbd.WRITE, 0, 4)[4:] + b"oops")
    assert client.dropped() == b""
    assert file_bytes(disk.path) == disk.t0


@pytest.mark.parametrize(("offset", "length"), [(1, 0), (0, 1), (SIZE, 0), (2**64 - 1, 2**32 - 1)])
def test_a_flush_with_an_offset_or_a_length_is_invalid(client, disk, offset, length):
    refused(client, disk, nbd.EINVAL, nbd.FLUSH, offset, length)


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (1, SIZE - 1), (SIZE, 0)])
def test_cache_succeeds_on_every_export(host, disk, kind, structured, offset, length):
    client = host.open(kind, structured=structured)
    assert client.flags & nbd.SEND_CACHE
    client.ok(nbd.CACHE, offset, length)
    assert client.read(0, SIZE) == disk.t0


@pytest.mark.parametrize("handle", [0, 1, 2**32, 2**63, 2**64 - 1, 0x2560951367446698])
def test_a_handle_is_any_64_bits(host, disk, client, handle):
    client.send(client.expect(nbd.READ, 3, 7, handle=handle))
    assert client.reply(handle).data == disk.t0[3:10]
    client.send(client.expect(nbd.READ, SIZE, 7, handle=handle))
    assert client.reply(handle).error == nbd.EINVAL
    client.send(client.expect(nbd.FLUSH, handle=handle))
    assert client.reply(handle).error == 0


# ---- durability ----


def syncs(plan):
    return len(plan.calls("flush"))


def test_flush_covers_what_other_connections_were_told_is_written(host, rig, disk, structured):
    plan = rig.plan(disk)
    writer, flusher = host.open(structured=structured), host.open(structured=structured)
    writer.ok(nbd.WRITE, 0, 0, b"n" * 512)
    writer.ok(nbd.WRITE_ZEROES, CLUSTER, 512)
    writer.ok(nbd.TRIM, 2 * CLUSTER, CLUSTER)
    before = syncs(plan)
    flusher.ok(nbd.FLUSH)
    assert syncs(plan) > before
    assert [op for op, *_ in plan.calls()][-1] == "flush"


def test_flush_is_answered_only_when_it_is_done(host, rig, disk, structured):
    plan = rig.plan(disk)
    writer, flusher = host.open(structured=structured), host.open(structured=structured)
    writer.ok(nbd.WRITE, 0, 0, b"n" * 512)
    plan.stall("flush")
    flush = flusher.request(nbd.FLUSH)
    stalled(plan)
    assert writer.read(0, 512) == b"n" * 512  # meanwhile others go on
    assert silent(flusher)
    plan.release()
    assert flusher.reply(flush).error == 0


def test_flush_that_fails_is_an_error_to_whoever_asked(host, rig, disk, structured):
    client = host.open(structured=structured)
    client.ok(nbd.WRITE, 0, 0, b"n" * 512)
    rig.plan(disk).error("flush", errno.EIO)
    assert client.call(nbd.FLUSH).error == nbd.EIO


@pytest.mark.parametrize("cmd", [nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM])
def test_fua_is_answered_only_when_the_data_are_durable(host, rig, disk, structured, cmd):
    plan = rig.plan(disk)
    client = host.open(structured=structured)
    client.ok(cmd, 0, CLUSTER, b"n" * CLUSTER if cmd == nbd.WRITE else b"")
    assert syncs(plan) == 0
    plan.error("flush", errno.EIO, times=1)
    reply = client.call(cmd, 0, CLUSTER, b"n" * CLUSTER if cmd == nbd.WRITE else b"", flags=nbd.FUA)
    assert syncs(plan) == 1
    assert reply.error == nbd.EIO


# ---- many requests at once ----


def test_a_copy_that_hangs_holds_up_its_own_write_alone(host, rig, disk, snap, structured):
    """On the same connection: later reads, writes elsewhere, flushes and statuses are answered first."""
    rig.plan(snap).stall("pwrite")
    client = host.open(structured=structured, contexts=["base:allocation"] if structured else [])
    slow = client.request(nbd.WRITE, 0, 0, b"n" * 512)
    stalled(rig.plans[0])
    assert client.read(CLUSTER, 512) == disk.t0[CLUSTER : CLUSTER + 512]
    assert client.read(0, 512) == disk.t0[:512]  # R16
    client.ok(nbd.FLUSH)
    client.ok(nbd.CACHE, 0, SIZE)
    if structured:
        client.ok(nbd.BLOCK_STATUS, 0, SIZE)
    assert list(client.pending) == [slow]
    rig.plans[0].release()
    assert client.reply(slow).error == 0
    assert client.read(0, 512) == b"n" * 512


def test_a_source_read_that_hangs_holds_up_its_own_write_alone(host, rig, disk, snap, structured):
    plan = rig.plan(disk)
    plan.stall("pread", start=0, end=CLUSTER, times=1)
    client = host.open(structured=structured)
    slow = client.request(nbd.WRITE, 0, 0, b"n" * 512)
    stalled(plan)
    assert client.read(CLUSTER, 512) == disk.t0[CLUSTER : CLUSTER + 512]
    client.ok(nbd.WRITE, 2 * CLUSTER, 0, b"m" * 512)
    assert list(client.pending) == [slow]
    plan.release()
    assert client.reply(slow).error == 0
    assert_t0(snap, disk.t0)


def test_a_snapshot_read_that_hangs_holds_up_no_guest(host, rig, disk, snap, structured):
    rig.plan(disk).stall("pread", start=0, end=CLUSTER, times=1)
    reader = host.open("snapshot", structured=structured)
    guest = host.open(structured=structured)
    slow = reader.request(nbd.READ, 0, CLUSTER)
    stalled(rig.plans[0])
    assert guest.read(0, 512) == disk.t0[:512]
    guest.ok(nbd.WRITE, CLUSTER, 0, b"n" * 512)
    rig.plans[0].release()
    assert reader.reply(slow).data == disk.t0[:CLUSTER]


def test_two_writes_into_one_cluster_are_both_answered_after_its_one_copy(host, rig, disk, snap, structured):
    plan = rig.plan(snap)
    plan.stall("pwrite")
    client, other = host.open(structured=structured), host.open(structured=structured)
    client.request(nbd.WRITE, 0, 0, b"a" * 512)
    stalled(plan)
    client.request(nbd.WRITE, 512, 0, b"b" * 512)
    other.request(nbd.WRITE, 1024, 0, b"c" * 512)
    until(lambda: snap.stats().copy_waits >= 2, "two waits for the copy")
    assert silent(client)
    assert silent(other)
    plan.release()
    assert [client.reply().error, client.reply().error, other.reply().error] == [0, 0, 0]
    assert client.read(0, 1536) == b"a" * 512 + b"b" * 512 + b"c" * 512
    assert snap.stats().cbw_copies == 1


def test_requests_sent_in_one_piece_are_all_answered_once(host, disk, client, rng):
    """Also those that are refused among them; whatever the order, each reply is that of its own request."""
    sent, expected = [], {}
    for number in range(600):
        offset = rng.randrange(SIZE)
        if number % 5 == 4:
            sent.append(client.expect(nbd.READ, SIZE, 1 + number))
        else:
            sent.append(client.expect(nbd.READ, offset, min(rng.randint(1, 2000), SIZE - offset)))
            expected[client.handle] = offset
    client.send(b"".join(sent))
    for _ in range(600):
        reply = client.reply()
        assert reply.error == (0 if reply.offset < SIZE else nbd.EINVAL)
        assert bytes(reply.data) == (disk.t0[reply.offset : reply.offset + reply.length] if not reply.error else b"")
    assert client.pending == {}


def test_writes_and_their_payloads_may_come_in_any_pieces(host, disk, client, rng):
    expected = bytearray(disk.t0)
    stream = bytearray()
    for i in range(120):
        offset, length = i * 2048, rng.choice([1, 511, 512, 2000])
        data = rng.randbytes(length)
        stream += client.expect(nbd.WRITE, offset, length) + data
        expected[offset : offset + length] = data
    while stream:
        n = rng.choice([1, 3, 27, 28, 29, 1000, 60000])
        client.send(bytes(stream[:n]))
        del stream[:n]
    assert {client.reply().error for _ in range(120)} == {0}
    assert client.read(0, SIZE) == expected


@pytest.mark.parametrize("length", [100, 2 * CLUSTER])
def test_a_request_that_comes_byte_by_byte_is_no_other(host, disk, client, length):
    message = client.expect(nbd.WRITE, 7, length) + b"n" * length
    for byte in message[:60]:
        client.send(bytes([byte]))
    client.send(message[60:])
    assert client.reply().error == 0
    assert client.read(0, SIZE) == disk.t0[:7] + b"n" * length + disk.t0[7 + length :]


def test_random_requests_of_three_guests_leave_what_they_were_told(host, disk, snap, structured, rng):
    """Each has a third of the disk for itself; T0 stays what it was."""
    guests = [host.open(structured=structured) for _ in range(3)]
    reader = host.open("snapshot", structured=structured)
    third = SIZE // 3
    model = bytearray(disk.t0)
    for _ in range(30):
        for number, guest in enumerate(guests):
            taken = []
            for _ in range(6):  # in flight at once, apart from each other
                offset = number * third + len(taken) * (third // 6) + rng.randrange(third // 12)
                length = rng.randint(1, third // 12)
                cmd = rng.choice([nbd.WRITE, nbd.WRITE, nbd.WRITE_ZEROES, nbd.READ])
                data = rng.randbytes(length) if cmd == nbd.WRITE else b""
                taken.append((guest.request(cmd, offset, length, data), cmd, offset, length, data))
            for handle, cmd, offset, length, data in taken:
                reply = guest.reply(handle)
                assert reply.error == 0
                if cmd == nbd.READ:
                    assert reply.data == model[offset : offset + length]
                else:
                    model[offset : offset + length] = data or bytes(length)
        offset = rng.randrange(SIZE)
        length = rng.randint(1, SIZE - offset)
        assert reader.read(offset, length) == disk.t0[offset : offset + length]
    assert file_bytes(disk.path) == model
    assert reader.read(0, SIZE) == disk.t0


def test_random_requests_on_every_kind_of_storage(host, storage, structured, rng):
    """Buffered and with O_DIRECT, in flight together, against a model; T0 stays what it was."""
    t0 = pattern(storage.size(SIZE))
    disk = storage.disk(t0)
    host.server.add_export("disk", disk, writable=True)
    with disk.snapshot(storage.new_path()) as snap:
        host.server.add_export("snapshot", snap)
        guest, reader = host.open(structured=structured), host.open("snapshot", structured=structured)
        model, slots = bytearray(t0), 8
        for _ in range(12):
            for slot in range(slots):
                offset = slot * (len(t0) // slots) + rng.randrange(1000)
                length = rng.choice([1, 512, 4096, 4097, 20000])
                cmd = rng.choice([nbd.WRITE, nbd.WRITE, nbd.WRITE_ZEROES])
                data = rng.randbytes(length) if cmd == nbd.WRITE else b""
                guest.request(cmd, offset, length, data, flags=rng.choice([0, 0, 0, nbd.FUA]))
                model[offset : offset + length] = data or bytes(length)
            assert [guest.reply().error for _ in range(slots)] == [0] * slots
            offset = rng.randrange(len(t0) - 5000)
            assert guest.read(offset, 5000) == model[offset : offset + 5000]
            assert reader.read(offset, 5000) == t0[offset : offset + 5000]
        assert guest.read(0, len(t0)) == model
        assert reader.read(0, len(t0)) == t0
        host.server.close()


def test_15_copies_that_hang_hold_up_nothing_else_of_their_connection(host, rig, structured):
    disk = host.disk(20 * CLUSTER)
    snap = host.snapshot(disk)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    client = host.open(structured=structured)
    for number in range(15):
        client.request(nbd.WRITE, number * CLUSTER, 0, b"n" * 512)
    stalled(plan, 15)
    assert client.read(16 * CLUSTER, 512) == disk.t0[16 * CLUSTER :][:512]
    assert client.read(0, 512) == disk.t0[:512]
    client.ok(nbd.FLUSH)
    plan.release()
    assert [client.reply().error for _ in range(15)] == [0] * 15


def test_a_dead_target_holds_up_no_other_disk_however_many_wait_for_it(host, rig):
    """More writes than the server has threads for."""
    disk = host.disk(200 * CLUSTER)
    snap = host.snapshot(disk)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    clients = [host.open() for _ in range(10)]
    for number, client in enumerate(clients):
        for n in range(20):
            client.send(client.expect(nbd.WRITE, (number * 20 + n) * CLUSTER, 512) + b"n" * 512)
    settled(lambda: plan.stalled)
    other = host.disk(name="other")
    host.snapshot(other, name="others snapshot")
    for name, t0 in (("other", other.t0), ("disk", disk.t0), ("snapshot", disk.t0), ("others snapshot", other.t0)):
        client = host.open(name)
        assert client.read(0, 4 * CLUSTER) == t0[: 4 * CLUSTER]
        if name == "other":
            client.ok(nbd.WRITE, 0, 0, b"n" * 512)
            client.ok(nbd.FLUSH)
    plan.release()
    for client in clients:
        assert [client.reply().error for _ in range(20)] == [0] * 20
    assert_t0(snap, disk.t0)


# ---- the end ----


def test_disc_is_not_answered_and_ends_the_connection(host, client):
    client.ok(nbd.WRITE, 0, 0, b"n")
    client.disconnect()
    host.ended()


def test_disc_finishes_what_is_in_flight(host, rig, disk, snap, structured):
    """Requests before it are answered, those that wait for their copies too; then the connection ends."""
    plan = rig.plan(snap)
    plan.stall("pwrite")
    client = host.open(structured=structured)
    slow = b"".join(client.expect(nbd.WRITE, n * CLUSTER, 512) + b"n" * 512 for n in range(3))
    quick = b"".join(client.expect(nbd.READ, 3 * CLUSTER + i, 10) for i in range(20))
    client.send(slow + quick + nbd.header(nbd.DISC))
    for _ in range(20):
        assert client.reply().error == 0
    stalled(plan, 3)
    assert len(client.pending) == 3
    plan.release()
    assert [client.reply().error for _ in range(3)] == [0] * 3
    assert client.dropped() == b""
    assert [disk.pread(512, n * CLUSTER) for n in range(3)] == [b"n" * 512] * 3


def test_what_follows_disc_is_not_done(host, disk, client):
    client.send(nbd.header(nbd.DISC) + nbd.header(nbd.WRITE, 0, 512) + b"n" * 512)
    assert client.dropped() == b""
    host.ended()
    assert file_bytes(disk.path) == disk.t0


@pytest.mark.parametrize("flags", [0, nbd.FUA, 0xFFFF])
def test_disc_with_anything_in_its_fields_is_disc(host, disk, client, flags):
    client.send(nbd.header(nbd.DISC, 512, 2**32 - 1, flags=flags))
    assert client.dropped() == b""
    assert host.open().read(0, 9) == disk.t0[:9]


def test_a_client_that_closes_its_sending_side_gets_its_answers(host, disk, client):
    client.send(b"".join(client.expect(nbd.READ, i, 1000) for i in range(50)))
    client.sock.shutdown(socket.SHUT_WR)
    for _ in range(50):
        reply = client.reply()
        assert reply.data == disk.t0[reply.offset : reply.offset + 1000]
    assert client.dropped() == b""


def test_a_client_that_closes_its_sending_side_gets_the_answer_that_waits(host, rig, snap, structured):
    plan = rig.plan(snap)
    plan.stall("pwrite")
    client = host.open(structured=structured)
    client.request(nbd.WRITE, 0, 0, b"n" * 512)
    stalled(plan)
    client.sock.shutdown(socket.SHUT_WR)
    plan.release()
    assert client.reply().error == 0
    assert client.dropped() == b""


@pytest.mark.parametrize("end", ["disc", "vanish", "close"])
def test_serve_connection_serves_one_socket_until_it_ends(host, rig, disk, structured, end):
    """As under inetd, or ssh."""
    ours, theirs = socket.socketpair()
    with theirs:
        run = rig.run(host.server.serve_connection, theirs)
        client = Client(ours).hello()
        if structured:
            client.option(nbd.STRUCTURED_REPLY)
        client.go("disk")
        client.ok(nbd.WRITE, 5, 0, b"n" * 2 * CLUSTER)
        assert client.read(0, 9) == disk.t0[:5] + b"nnnn"
        assert not run.done
        if end == "disc":
            client.disconnect()
        elif end == "vanish":
            ours.close()
        else:
            host.server.close()
            assert client.dropped() == b""
        run.result()
        ours.close()


def test_close_answers_what_is_in_flight_and_then_ends_the_connections(host, rig, disk, snap, structured):
    plan = rig.plan(snap)
    plan.stall("pwrite")
    client, idle = host.open(structured=structured), host.open(structured=structured)
    for n in range(3):
        client.request(nbd.WRITE, n * CLUSTER, 0, b"n" * 512)
    stalled(plan, 3)
    closer = rig.run(host.server.close)
    assert idle.dropped() == b""
    assert not closer.done
    plan.release()
    assert [client.reply().error for _ in range(3)] == [0] * 3
    assert client.dropped() == b""
    closer.result()
    assert not os.path.lexists(host.paths[host.server])


def test_the_whole_transmission_over_tcp(host, rig, structured):
    disk = rig.disk(SIZE)
    server = host.serve_tcp()
    server.add_export("disk", disk, writable=True)
    client = host.open(server=server, structured=structured)
    client.ok(nbd.WRITE, 5, 0, b"n" * (3 * CLUSTER))
    assert client.read(0, SIZE) == disk.t0[:5] + b"n" * (3 * CLUSTER) + disk.t0[5 + 3 * CLUSTER :]
    client.send(nbd.header(nbd.WRITE, 0, 2**32 - 1))
    with pytest.raises(Disconnected):
        client.reply()
