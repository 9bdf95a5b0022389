"""BLOCK_STATUS over the wire: base:allocation, qemu:dirty-bitmap, and R20: it never calls zero what was not at T0."""

import gc
import itertools
import random

import nbd_protocol as nbd
import pytest
from engine_support import CLUSTER, assert_t0, pattern

import cbwcore

BASE = "base:allocation"
HOLE = 3  # NBD_STATE_HOLE | NBD_STATE_ZERO
TIB = 1 << 40
MOST = 2**32 - 1  # bytes of a request


def dirty(name):
    return f"qemu:dirty-bitmap:{name}"


def status(client, host, offset=0, length=None, *, name=BASE, flags=0):
    """(offset, length, flags) of the extents that one request gets."""
    length = client.size - offset if length is None else length
    extents = client.ok(nbd.BLOCK_STATUS, offset, length, flags=flags).status[host.context(client, name)]
    assert sum(n for n, _ in extents) <= length
    assert all(a != b for (_, a), (_, b) in itertools.pairwise(extents)), "neighbours of one status"
    found = []
    for n, state in extents:
        found.append((offset, n, state))
        offset += n
    return found


def whole(client, host, offset=0, end=None, *, name=BASE, step=MOST):
    """All extents of a range, asked for as clients do: on from where the reply before has ended."""
    end = client.size if end is None else end
    found = []
    while offset < end:
        for start, n, state in status(client, host, offset, min(step, end - offset), name=name):
            if found and found[-1][2] == state:
                found[-1] = (found[-1][0], found[-1][1] + n, state)
            else:
                found.append((start, n, state))
            offset += n
    return found


def assert_true(extents, content):
    """They cover all of ``content``, and what they call zero is (R20)."""
    position = 0
    for offset, length, state in extents:
        assert offset == position
        assert state in (0, HOLE)
        position += length
        assert state == 0 or not any(content[offset:position]), f"called zero: {offset}, {length}"
    assert position == len(content)


def backed_up(client, host, size):
    """What a client of the snapshot copies that trusts its block status."""
    copy = bytearray(size)
    for offset, length, state in whole(client, host):
        if not state & 2:
            copy[offset : offset + length] = client.read(offset, length)
    return copy


def layout(*kinds, tail=0):
    """Clusters of data (d), of holes (h)."""
    return b"".join(pattern(CLUSTER, n) if kind == "d" else bytes(CLUSTER) for n, kind in enumerate(kinds)) + bytes(
        tail
    )


@pytest.fixture
def sparse(host, rig):
    """``sparse(content)``: an exported disk with that content, with holes for its clusters of zeroes."""

    def sparse(content, **options):
        disk = rig.sparse(len(content))
        for at in range(0, len(content), 4096):
            if any(content[at : at + 4096]):
                disk.pwrite(content[at : at + 4096], at)
        disk.t0 = content
        host.server.add_export("disk", disk, writable=True, **options)
        return disk

    return sparse


# ---- base:allocation ----


@pytest.mark.parametrize("name", ["disk", "snapshot"])
def test_holes_are_told_from_data(host, sparse, name):
    disk = sparse(layout(*"hddhhdh"))
    host.snapshot(disk)
    client = host.open(name, contexts=[BASE])
    assert status(client, host) == [
        (0, CLUSTER, HOLE),
        (CLUSTER, 2 * CLUSTER, 0),
        (3 * CLUSTER, 2 * CLUSTER, HOLE),
        (5 * CLUSTER, CLUSTER, 0),
        (6 * CLUSTER, CLUSTER, HOLE),
    ]


@pytest.mark.parametrize("name", ["disk", "snapshot"])
@pytest.mark.parametrize(("offset", "length"), [(0, 1), (1, 10), (4095, 2), (CLUSTER - 1, 1), (CLUSTER, 3 * CLUSTER)])
def test_extents_begin_and_end_where_the_request_does(host, sparse, name, offset, length):
    disk = sparse(layout(*"dhdhd"))
    host.snapshot(disk)
    client = host.open(name, contexts=[BASE])
    extents = status(client, host, offset, length)
    assert extents[0][0] == offset
    assert sum(n for _, n, _ in extents) == length
    for start, n, state in extents:
        assert state == (HOLE if start // CLUSTER % 2 else 0)
        assert (start + n - 1) // CLUSTER == start // CLUSTER


@pytest.mark.parametrize("name", ["disk", "snapshot"])
@pytest.mark.parametrize("offset", [0, 1, CLUSTER, CLUSTER + 5, 5 * CLUSTER - 1])
def test_req_one_gets_the_first_extent_of_each_context(host, sparse, name, offset):
    disk = sparse(layout(*"dhdhd"))
    bitmap = cbwcore.DirtyBitmap(disk.size, name="b")
    bitmap.set_range(CLUSTER, CLUSTER)
    host.snapshot(disk)
    host.server.remove_export(name)
    source = disk if name == "disk" else disk.snapshots[0]
    host.server.add_export(name, source, bitmaps=[bitmap])
    client = host.open(name, contexts=[BASE, dirty("b")])
    for length in (1, 100, CLUSTER, client.size - offset):
        reply = client.ok(nbd.BLOCK_STATUS, offset, min(length, client.size - offset), flags=nbd.REQ_ONE)
        assert {len(extents) for extents in reply.status.values()} == {1}
        first = status(client, host, offset, min(length, client.size - offset))[0]
        assert reply.status[host.context(client)][0] == first[1:]


def test_the_tail_of_an_odd_size_is_told_to_the_byte(host, sparse):
    disk = sparse(layout(*"dh", tail=777))
    host.snapshot(disk)
    for name in ("disk", "snapshot"):
        client = host.open(name, contexts=[BASE])
        assert whole(client, host) == [(0, CLUSTER, 0), (CLUSTER, CLUSTER + 777, HOLE)]
        assert status(client, host, disk.size - 1, 1) == [(disk.size - 1, 1, HOLE)]


@pytest.mark.parametrize("name", ["disk", "snapshot"])
def test_no_reply_has_more_extents_than_the_limit_and_the_next_goes_on(host, rig, name):
    server = host.serve(extents=8)
    content = layout(*"dh" * 20)
    disk = rig.sparse(len(content))
    for n in range(20):
        disk.pwrite(content[2 * n * CLUSTER :][:CLUSTER], 2 * n * CLUSTER)
    server.add_export("disk", disk, writable=True)
    host.snapshot(disk, server=server)
    client = host.open(name, contexts=[BASE], server=server)
    assert len(status(client, host)) == 8
    assert len(status(client, host, flags=nbd.REQ_ONE)) == 1
    assert whole(client, host) == [(n * CLUSTER, CLUSTER, HOLE if n % 2 else 0) for n in range(40)]


def test_the_limit_of_2_to_the_17_extents(host, rig):
    """A bitmap of 512 bytes with every other bit set has more."""
    disk = rig.sparse(256 << 20)
    bitmap = cbwcore.DirtyBitmap(disk.size, 512, name="b")
    host.server.add_export("disk", disk, bitmaps=[bitmap])
    for offset in range(0, 140 << 20, 1024):
        bitmap.set_range(offset, 512)
    client = host.open(contexts=[dirty("b")])
    extents = status(client, host, name=dirty("b"))
    assert len(extents) == 1 << 17
    assert sum(n for _, n, _ in extents) == 512 << 17
    assert {n for _, n, _ in extents} == {512}


@pytest.mark.parametrize("name", ["disk", "snapshot"])
def test_ranges_of_four_gib_of_disks_of_terabytes(host, rig, name):
    disk = rig.sparse(8 * TIB)
    far = 5 * TIB + 3 * CLUSTER
    disk.pwrite(b"d" * CLUSTER, far)
    bitmap = disk.bitmaps.add("b", granularity=1 << 20)
    bitmap.set_range(far, 1)
    host.server.add_export("disk", disk, writable=True)
    host.snapshot(disk)
    host.server.remove_export(name)
    host.server.add_export(name, disk if name == "disk" else disk.snapshots[0], bitmaps=["b"])
    client = host.open(name, contexts=[BASE, dirty("b")])
    for offset in (0, 1, 2**32 - 1, 2**32, far - 2**31, 8 * TIB - MOST):
        extents = status(client, host, offset, MOST)
        assert extents[0][0] == offset
        assert sum(n for _, n, _ in extents) == MOST
        data = [(start, n) for start, n, state in extents if state == 0]
        assert data == ([(far, CLUSTER)] if offset == far - 2**31 else [])
        marked = [(start, n) for start, n, state in status(client, host, offset, MOST, name=dirty("b")) if state == 1]
        assert marked == ([(far >> 20 << 20, 1 << 20)] if offset == far - 2**31 else [])
    assert client.call(nbd.BLOCK_STATUS, 8 * TIB - MOST + 1, MOST).error == nbd.EINVAL


# ---- dirty bitmaps ----


def test_a_dirty_bitmap_shows_what_the_guest_has_written(host, sparse):
    disk = sparse(layout(*"dddddd"))
    disk.bitmaps.add("b0", granularity=4096)
    host.server.add_export("mapped", disk, writable=True, bitmaps=["b0"])
    client = host.open("mapped", contexts=[dirty("b0")])
    assert status(client, host, name=dirty("b0")) == [(0, disk.size, 0)]
    client.ok(nbd.WRITE, 5000, 0, b"n" * 10)
    client.ok(nbd.WRITE_ZEROES, CLUSTER, 4096)
    client.ok(nbd.TRIM, 2 * CLUSTER, CLUSTER)
    assert status(client, host, name=dirty("b0")) == [
        (0, 4096, 0),
        (4096, 4096, 1),
        (8192, CLUSTER - 8192, 0),
        (CLUSTER, 4096, 1),
        (CLUSTER + 4096, CLUSTER - 4096, 0),
        (2 * CLUSTER, CLUSTER, 1),
        (3 * CLUSTER, 3 * CLUSTER, 0),
    ]
    assert status(client, host, 5000, 3, name=dirty("b0")) == [(5000, 3, 1)]


def test_both_contexts_at_once_have_extents_of_their_own(host, sparse):
    disk = sparse(layout(*"dhdh"))
    bitmap = cbwcore.DirtyBitmap(disk.size, 4096, name="b0")
    bitmap.set_range(4096, 2 * CLUSTER)
    host.snapshot(disk, bitmaps=[bitmap])
    client = host.open("snapshot", contexts=[dirty("b0"), BASE])
    reply = client.ok(nbd.BLOCK_STATUS, 0, disk.size)
    assert reply.chunks == [nbd.STATUS, nbd.STATUS]
    assert reply.status[host.context(client)] == [(CLUSTER, n) for n in (0, HOLE, 0, HOLE)]
    marked = [(4096, 0), (2 * CLUSTER, 1), (2 * CLUSTER - 4096, 0)]
    assert reply.status[host.context(client, dirty("b0"))] == marked


@pytest.mark.parametrize("granularity", [512, 4096, CLUSTER, 1 << 20])
def test_a_bitmap_of_any_granularity_ends_with_the_export(host, rig, granularity):
    disk = rig.disk(2 * CLUSTER + 100)
    bitmap = cbwcore.DirtyBitmap(disk.size, granularity, name="b")
    bitmap.set_range(disk.size - 1, 1)
    host.server.add_export("disk", disk, bitmaps=[bitmap])
    client = host.open(contexts=[dirty("b")])
    start = (disk.size - 1) // granularity * granularity
    expected = [(0, start, 0)] * (start > 0) + [(start, disk.size - start, 1)]
    assert status(client, host, name=dirty("b")) == expected


def test_many_bitmaps_at_once(host, rig):
    disk = rig.disk(64 * CLUSTER)
    names = [f"b{n}" for n in range(60)]
    for number, name in enumerate(names):
        disk.bitmaps.add(name).set_range(number * CLUSTER, 1)
    host.server.add_export("disk", disk, bitmaps=names)
    client = host.open(contexts=[BASE, *map(dirty, names)])
    reply = client.ok(nbd.BLOCK_STATUS, 0, disk.size)
    for number, name in enumerate(names):
        extents = reply.status[host.context(client, dirty(name))]
        assert [n for n, state in extents if state] == [CLUSTER]
        assert sum(n for n, _ in extents[: 1 if number else 0]) == number * CLUSTER


def test_a_bitmap_that_was_removed_is_still_told_of(host, rig):
    """The clients that selected it have it, though the disk has forgotten it."""
    disk = host.rig.disk(4 * CLUSTER)
    disk.bitmaps.add("b").set_range(CLUSTER, 1)
    host.server.add_export("disk", disk, writable=True, bitmaps=["b"])
    client = host.open(contexts=[BASE, dirty("b")])
    disk.bitmaps.remove("b")
    gc.collect()
    client.ok(nbd.WRITE, 2 * CLUSTER, 0, b"n")
    assert status(client, host, name=dirty("b"))[:2] == [(0, CLUSTER, 0), (CLUSTER, CLUSTER, 1)]


def test_a_bitmap_of_a_disk_that_was_closed(host):
    disk = host.rig.disk(4 * CLUSTER)
    disk.bitmaps.add("b").set_range(CLUSTER, 1)
    host.server.add_export("disk", disk, writable=True, bitmaps=["b"])
    both, one = host.open(contexts=[BASE, dirty("b")]), host.open(contexts=[dirty("b")])
    both.read(0, 1)
    one.read(0, 1)
    disk.close()
    assert both.call(nbd.BLOCK_STATUS, 0, disk.size).error == nbd.ESHUTDOWN
    assert one.call(nbd.BLOCK_STATUS, 0, disk.size).error in (0, nbd.ESHUTDOWN)


def test_bitmaps_change_while_their_status_is_asked_for(host, rig):
    """Every reply is in form, and covers what was asked for."""
    disk = host.rig.disk(64 * CLUSTER)
    bitmap = disk.bitmaps.add("b", granularity=512)
    host.server.add_export("disk", disk, writable=True, bitmaps=["b"])
    asker, guest = host.open(contexts=[dirty("b")]), host.open()
    for number in range(150):
        guest.request(nbd.WRITE, number * 7919 * 512 % disk.size, 0, b"n" * 512)
        if number % 50 == 49:
            bitmap.clear()
        assert sum(n for _, n, _ in status(asker, host, name=dirty("b"))) == disk.size
        assert guest.reply().error == 0


# ---- the scope of a snapshot ----


def test_what_a_snapshot_does_not_cover_is_told_as_data_and_cannot_be_read(host, sparse):
    disk = sparse(layout(*"hdhdhh"))
    scope = cbwcore.DirtyBitmap(disk.size)
    scope.set_range(2 * CLUSTER, 3 * CLUSTER)
    snap = host.snapshot(disk, bitmap=scope)
    client = host.open("snapshot", contexts=[BASE])
    assert [state for _, _, state in whole(client, host, 0, CLUSTER)] == [0]
    for cluster, covered in enumerate([False, False, True, True, True, False]):
        at = cluster * CLUSTER
        reply = client.call(nbd.READ, at, CLUSTER)
        assert reply.error == (0 if covered else nbd.EIO)
        assert bytes(reply.data) == (disk.t0[at : at + CLUSTER] if covered else b"")
        expected = HOLE if covered and disk.t0[at : at + CLUSTER] == bytes(CLUSTER) else 0
        assert status(client, host, at, CLUSTER) == [(at, CLUSTER, expected)]
    assert client.call(nbd.READ, 2 * CLUSTER - 1, 2).error == nbd.EIO
    assert client.call(nbd.READ, 5 * CLUSTER - 1, 2).error == nbd.EIO
    assert client.read(2 * CLUSTER, 3 * CLUSTER) == disk.t0[2 * CLUSTER : 5 * CLUSTER]
    assert snap.state == "armed"


def test_what_was_reclaimed_is_told_as_data_and_cannot_be_read(host, sparse):
    disk = sparse(layout(*"hdhd"))
    host.snapshot(disk, discard=True)
    client = host.open("snapshot", contexts=[BASE])
    assert status(client, host)[0] == (0, CLUSTER, HOLE)
    client.ok(nbd.TRIM, 0, 2 * CLUSTER)
    assert status(client, host, 0, 2 * CLUSTER) == [(0, 2 * CLUSTER, 0)]
    assert client.call(nbd.READ, 0, 1).error == nbd.EIO
    assert status(client, host, 2 * CLUSTER, 2 * CLUSTER) == [(2 * CLUSTER, CLUSTER, HOLE), (3 * CLUSTER, CLUSTER, 0)]


# ---- R20 ----


@pytest.mark.parametrize("flags", [0, nbd.NO_HOLE, nbd.FUA, nbd.FAST_ZERO])
def test_r20_qemus_failing_sequence(host, sparse, flags):
    """``qemu-io -c 'write -z -u 4k 60k'`` on the disk: QEMU 7.2 then shows the disk's new hole in the snapshot."""
    disk = sparse(layout(*"dd"))
    host.snapshot(disk)
    guest = host.open("disk", contexts=[BASE])
    reader = host.open("snapshot", contexts=[BASE])
    guest.ok(nbd.WRITE_ZEROES, 4096, 61440, flags=flags)
    assert whole(reader, host) == [(0, disk.size, 0)]
    assert backed_up(reader, host, disk.size) == disk.t0
    if flags in (0, nbd.FUA):
        assert (4096, 61440, HOLE) in status(guest, host)


@pytest.mark.parametrize("cmd", [nbd.WRITE_ZEROES, nbd.TRIM])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, 4 * CLUSTER), (4096, 61440), (CLUSTER + 1, CLUSTER), (3, 4 * CLUSTER - 7)]
)
def test_r20_holes_that_the_guest_makes_are_not_the_snapshots(host, sparse, cmd, offset, length):
    disk = sparse(layout(*"dddd"))
    host.snapshot(disk)
    guest = host.open("disk")
    reader = host.open("snapshot", contexts=[BASE])
    guest.ok(cmd, offset, length)
    assert whole(reader, host) == [(0, disk.size, 0)]
    assert backed_up(reader, host, disk.size) == disk.t0


def test_r20_holes_of_t0_stay_the_snapshots(host, sparse):
    disk = sparse(layout(*"hhhh"))
    host.snapshot(disk)
    guest, reader = host.open("disk"), host.open("snapshot", contexts=[BASE])
    guest.ok(nbd.WRITE, 100, 0, b"n" * (3 * CLUSTER))
    assert whole(reader, host) == [(0, disk.size, HOLE)]
    assert reader.read(0, disk.size) == disk.t0


def test_r20_data_hole_data_again(host, sparse):
    """Whatever becomes of the disk behind the snapshot's back."""
    disk = sparse(layout(*"dhd"))
    host.snapshot(disk)
    guest, reader = host.open("disk"), host.open("snapshot", contexts=[BASE])
    expected = [(0, CLUSTER, 0), (CLUSTER, CLUSTER, HOLE), (2 * CLUSTER, CLUSTER, 0)]
    for cmd in (nbd.TRIM, nbd.WRITE, nbd.WRITE_ZEROES, nbd.WRITE, nbd.TRIM):
        guest.ok(cmd, 0, disk.size, b"n" * disk.size if cmd == nbd.WRITE else b"")
        assert whole(reader, host) == expected
        assert backed_up(reader, host, disk.size) == disk.t0


@pytest.mark.parametrize("garbage", [False, True], ids=["new-target", "used-target"])
@pytest.mark.parametrize("number", range(4))
def test_r20_random_guests_never_make_the_status_lie(host, rig, sparse, number, garbage):
    """Against T0, after each of their requests; a backup that trusts the status is T0 to the byte."""
    rng = random.Random(number)
    content = layout(*(rng.choice("dh") for _ in range(9)), tail=rng.choice([0, 1, 5000]))
    disk = sparse(content)
    target = rig.path("target")
    if garbage:
        target.write_bytes(b"\xee" * len(content))
    snap = host.snapshot(disk, target=target, cluster_size=rng.choice([4096, 16384, CLUSTER]))
    guest, reader = host.open("disk", contexts=[BASE]), host.open("snapshot", contexts=[BASE])
    for _ in range(25):
        offset = rng.randrange(disk.size)
        length = rng.randint(1, min(disk.size - offset, 2 * CLUSTER))
        cmd = rng.choice([nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM])
        flags = rng.choice([0, 0, nbd.FUA, nbd.NO_HOLE if cmd == nbd.WRITE_ZEROES else 0])
        guest.ok(cmd, offset, length, rng.randbytes(length) if cmd == nbd.WRITE else b"", flags=flags)
        assert_true(whole(reader, host, step=rng.choice([4096, CLUSTER + 1, MOST])), content)
        part = rng.randrange(disk.size)
        assert reader.read(part, 1 + (disk.size - part) // 2) == content[part : part + 1 + (disk.size - part) // 2]
    assert backed_up(reader, host, disk.size) == content
    assert_true(whole(guest, host), guest.read(0, disk.size))
    assert_t0(snap, content)


def test_r20_a_backup_while_the_guest_writes(host, sparse, rng):
    """The guest's requests are in flight while the snapshot's status is asked for and its data are read."""
    disk = sparse(layout(*(rng.choice("dh") for _ in range(24))))
    host.snapshot(disk)
    guest, reader = host.open("disk"), host.open("snapshot", contexts=[BASE])
    copy = bytearray(disk.size)
    position = 0
    while position < disk.size:
        for _ in range(4):
            offset = rng.randrange(disk.size - CLUSTER)
            cmd = rng.choice([nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM])
            guest.request(cmd, offset, CLUSTER, b"n" * CLUSTER if cmd == nbd.WRITE else b"")
        for offset, length, state in status(reader, host, position, min(3 * CLUSTER, disk.size - position)):
            position = offset + length
            if state == 0:
                copy[offset:position] = reader.read(offset, length)
    while guest.pending:
        guest.reply()
    assert copy == disk.t0
