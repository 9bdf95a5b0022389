"""R20 block status agrees with reads, whatever the guest does after T0."""

import random

import pytest
from engine_support import CLUSTER, assert_t0, stalled

import cbwcore


def lay_out(rng, clusters, tail):
    """Content of data, written zeroes and holes, cluster by cluster and in smaller parts."""
    parts = []
    for _ in range(clusters):
        kind = rng.choice("dzm")
        if kind == "d":
            parts.append(rng.randbytes(CLUSTER))
        elif kind == "z":
            parts.append(bytes(CLUSTER))
        else:
            parts.append(rng.randbytes(4096) + bytes(CLUSTER - 8192) + rng.randbytes(4096))
    return b"".join(parts) + bytes(tail)


def sparse(rig, content):
    """A disk with that content, with holes for its zeroes."""
    disk = rig.sparse(len(content))
    for at in range(0, len(content), 4096):
        if any(content[at : at + 4096]):
            disk.pwrite(content[at : at + 4096], at)
    disk.t0 = content
    return disk


def test_r20_qemus_failing_sequence_shows_no_hole_where_t0_has_data(rig, assert_status):
    """``qemu-io -c 'write -z -u 4k 60k'``: QEMU 7.2 then reports the disk's new hole in the snapshot."""
    disk = rig.disk(4 * CLUSTER)
    snap = rig.snapshot(disk)
    disk.pwrite_zeroes(4096, 61440)
    assert any(extent.zero for extent in disk.block_status())
    assert list(snap.block_status()) == [cbwcore.Extent(0, disk.size, True, False)]
    assert_status(snap, disk.t0)
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("change", ["pwrite_zeroes", "discard"])
def test_r20_holes_made_after_t0_are_not_the_snapshots(rig, assert_status, change):
    disk = rig.disk(3 * CLUSTER + 100)
    snap = rig.snapshot(disk)
    getattr(disk, change)(0, disk.size)
    assert next(disk.block_status()).zero
    assert list(snap.block_status()) == [cbwcore.Extent(0, disk.size, True, False)]
    assert_status(snap, disk.t0)


def test_r20_zeroes_of_t0_that_were_overwritten_still_count_as_zero(rig, assert_status):
    disk = rig.sparse(4 * CLUSTER)
    snap = rig.snapshot(disk)
    disk.pwrite(b"n" * (2 * CLUSTER), CLUSTER)
    assert list(snap.block_status()) == [cbwcore.Extent(0, disk.size, False, True)]
    assert_status(snap, bytes(disk.size))


@pytest.mark.parametrize("garbage", [False, True])
@pytest.mark.parametrize("number", range(6))
def test_r20_status_agrees_with_reads_after_any_guest_writes(rig, assert_status, number, garbage):
    rng = random.Random(number)
    content = lay_out(rng, 10, rng.choice([0, 1, 5000]))
    disk = sparse(rig, content)
    target = rig.path("target")
    if garbage:
        target.write_bytes(b"\xee" * len(content))
    snap = rig.snapshot(disk, target, cluster_size=rng.choice([4096, 16384, CLUSTER]))
    for _ in range(25):
        offset = rng.randrange(disk.size)
        length = rng.randint(1, min(disk.size - offset, 2 * CLUSTER))
        rng.choice(
            [
                lambda: disk.pwrite(b"n" * length, offset),  # noqa: B023
                lambda: disk.pwrite_zeroes(offset, length),  # noqa: B023
                lambda: disk.discard(offset, length),  # noqa: B023
            ]
        )()
        assert_status(snap, content)
    assert_t0(snap, content)
    assert_status(disk, disk.pread(disk.size, 0))


def test_r20_an_extent_stays_true_after_it_was_given_out(rig):
    disk = sparse(rig, b"a" * CLUSTER + bytes(CLUSTER) + b"b" * CLUSTER)
    snap = rig.snapshot(disk)
    extents = snap.block_status()
    first = next(extents)
    disk.pwrite(b"n" * disk.size, 0)
    rest = list(extents)
    assert [first, *rest] == [
        cbwcore.Extent(0, CLUSTER, True, False),
        cbwcore.Extent(CLUSTER, CLUSTER, False, True),
        cbwcore.Extent(2 * CLUSTER, CLUSTER, True, False),
    ]


@pytest.mark.parametrize("change", ["discard", "pwrite_zeroes"])
def test_r20_a_status_in_flight_does_not_tell_of_the_hole_that_a_write_makes(rig, change):
    disk = rig.disk(4 * CLUSTER)
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("seek", times=1)
    asker = rig.run(lambda: list(snap.block_status()))
    stalled(plan)
    getattr(disk, change)(0, 2 * CLUSTER)  # and nobody waits for the status
    plan.release()
    assert {(e.data, e.zero) for e in asker.result()} == {(True, False)}
    assert next(iter(disk.block_status())).zero, "the disk itself has the hole"


@pytest.mark.parametrize("again", [False, True])
def test_r20_a_hole_that_was_data_is_found_again(rig, again):
    """How far data go is remembered; a hole made since is told of, by the disk and by a later snapshot."""
    disk = rig.disk(4 * CLUSTER)
    assert [e.data for e in disk.block_status()] == [True]
    disk.discard(CLUSTER, CLUSTER)
    if again:
        disk.pwrite(b"d" * CLUSTER, CLUSTER)
        disk.pwrite_zeroes(CLUSTER, CLUSTER)
    expected = [(0, CLUSTER, False), (CLUSTER, CLUSTER, True), (2 * CLUSTER, 2 * CLUSTER, False)]
    assert [(e.offset, e.length, e.zero) for e in disk.block_status()] == expected
    snap = rig.snapshot(disk)
    assert [(e.offset, e.length, e.zero) for e in snap.block_status()] == expected


def test_r20_the_end_of_data_is_asked_once(rig):
    """On tmpfs each such question walks through all data, and holds up guest writes meanwhile."""
    disk = rig.disk(64 * CLUSTER)
    snap = rig.snapshot(disk)
    for c in range(0, 64, 2):
        disk.pwrite(b"n", c * CLUSTER)
    plan = rig.plan(disk)
    assert sum(e.length for e in snap.block_status()) == disk.size
    assert len(plan.calls("seek")) <= 2


def test_r20_what_cannot_be_read_is_neither_data_nor_zero(rig, assert_status):
    disk = rig.disk(bytes(2 * CLUSTER) + b"a" * (2 * CLUSTER))
    scope = cbwcore.DirtyBitmap(disk.size)
    scope.set_range(CLUSTER, 3 * CLUSTER)
    snap = rig.snapshot(disk, bitmap=scope)
    disk.pwrite(b"n", CLUSTER)
    snap.discard(3 * CLUSTER, CLUSTER)
    outside = {"data": False, "zero": False, "access": False}
    assert list(snap.block_status()) == [
        cbwcore.Extent(0, CLUSTER, **outside),
        cbwcore.Extent(CLUSTER, CLUSTER, False, True),
        cbwcore.Extent(2 * CLUSTER, CLUSTER, True, False),
        cbwcore.Extent(3 * CLUSTER, CLUSTER, **outside),
    ]
    for extent in snap.block_status():
        if extent.access:
            assert snap.pread(extent.length, extent.offset) == disk.t0[extent.offset : extent.offset + extent.length]
            continue
        with pytest.raises(cbwcore.SnapshotAccessError):
            snap.pread(extent.length, extent.offset)


def test_r20_parts_of_a_status_agree_with_the_whole(rig, assert_status):
    content = lay_out(random.Random(99), 6, 100)
    disk = sparse(rig, content)
    snap = rig.snapshot(disk)
    disk.pwrite_zeroes(CLUSTER // 2, 3 * CLUSTER)
    whole = assert_status(snap, content)
    for offset in range(0, disk.size, 12288):
        length = min(20000, disk.size - offset)
        for extent in snap.block_status(offset, length):
            end = extent.offset + extent.length
            (around,) = [w for w in whole if w.offset <= extent.offset and end <= w.offset + w.length]
            assert (around.data, around.zero) == (extent.data, extent.zero)
