"""R4 rounding, tails and odd sizes; R5 discard and write-zeroes are guest writes."""

import errno

import bitarray
import numpy as np
import pytest
from engine_support import CLUSTER, S, assert_broken, assert_refused, assert_t0, file_bytes, ranges, stalled

import cbwcore

SIZES = [1, 511, 512, 4095, 4096, 4097, CLUSTER - 1, CLUSTER, CLUSTER + 1, 3 * CLUSTER + 513]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cluster_size", [4096, CLUSTER, 1 << 20])
def test_r04_odd_sizes_work_to_the_last_byte(rig, size, cluster_size):
    disk = rig.disk(size)
    snap = rig.snapshot(disk, cluster_size=cluster_size)
    plan = rig.plan(disk)
    disk.pwrite(b"Z", size - 1)
    last = (size - 1) // cluster_size * cluster_size
    assert ranges(plan, "pread") == [(last, size - last)]
    assert snap.pread(1, size - 1) == disk.t0[-1:]
    disk.pwrite(b"Y" * size, 0)
    assert len(snap._map("need")) == -(-size // cluster_size)
    assert not any(snap._map("need"))
    assert_t0(snap, disk.t0)
    assert snap.stats().cbw_bytes == size
    assert disk.pread(size, 0) == b"Y" * size
    assert len(file_bytes(disk.path)) == size


@pytest.mark.parametrize(
    ("offset", "length", "first", "end"),
    [
        (0, 1, 0, 1),
        (CLUSTER - 1, 1, 0, 1),
        (CLUSTER - 1, 2, 0, 2),
        (CLUSTER, CLUSTER, 1, 2),
        (CLUSTER, CLUSTER + 1, 1, 3),
        (1, 3 * CLUSTER - 2, 0, 3),
        (4 * CLUSTER, 1, 4, 5),
    ],
)
def test_r04_copies_round_outward_to_clusters(rig, offset, length, first, end):
    disk = rig.disk(4 * CLUSTER + 100)
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    disk.pwrite(b"n" * length, offset)
    stop = min(end * CLUSTER, disk.size)
    assert ranges(plan, "pread") == [(first * CLUSTER, stop - first * CLUSTER)]
    assert snap._map("done") == [first <= i < end for i in range(5)]
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize(
    ("offset", "length", "gone"),
    [
        (0, CLUSTER - 1, []),
        (1, CLUSTER, []),
        (1, 2 * CLUSTER - 1, [1]),
        (CLUSTER, CLUSTER, [1]),
        (CLUSTER - 1, CLUSTER + 2, [1]),
        (CLUSTER, 2 * CLUSTER - 1, [1]),
        (3 * CLUSTER, 100, [3]),  # the whole of the short tail
        (3 * CLUSTER, 99, []),
        (3 * CLUSTER + 1, 99, []),
        (2 * CLUSTER + 1, CLUSTER + 99, [3]),
        (0, 3 * CLUSTER + 100, [0, 1, 2, 3]),
        (CLUSTER, 0, []),
        (3 * CLUSTER + 100, 0, []),
    ],
)
def test_r04_discards_of_a_snapshot_shrink_inward(rig, offset, length, gone):
    disk = rig.disk(3 * CLUSTER + 100)
    snap = rig.snapshot(disk)
    disk.pwrite(b"n", 2 * CLUSTER)
    plan = rig.plan(snap)
    snap.discard(offset, length)
    assert snap._map("access") == [i not in gone for i in range(4)]
    if not gone:
        assert plan.calls() == []
    for i in range(4):
        start, stop = i * CLUSTER, min((i + 1) * CLUSTER, disk.size)
        if i not in gone:
            assert snap.pread(stop - start, start) == disk.t0[start:stop]
            continue
        for at in (start, stop - 1):
            with pytest.raises(cbwcore.SnapshotAccessError) as e:
                snap.pread(1, at)
            assert e.value.errno == errno.EACCES


def test_r04_scope_bitmaps_of_finer_granularity_round_outward(rig):
    disk = rig.disk(5 * CLUSTER + 512)
    scope = cbwcore.DirtyBitmap(disk.size, 512)
    scope.set_range(CLUSTER - 1, 2)
    scope.set_range(3 * CLUSTER + 700, 1)
    scope.set_range(disk.size - 1, 1)
    snap = rig.snapshot(disk, bitmap=scope)
    inside = [True, True, False, True, False, True]
    assert snap._map("need") == inside
    assert snap._map("access") == inside
    disk.pwrite(b"n" * disk.size, 0)
    for i, readable in enumerate(inside):
        start, stop = i * CLUSTER, min((i + 1) * CLUSTER, disk.size)
        if readable:
            assert snap.pread(stop - start, start) == disk.t0[start:stop]
        else:
            with pytest.raises(cbwcore.SnapshotAccessError):
                snap.pread(1, start)
    assert snap.stats().cbw_bytes == 3 * CLUSTER + 512


def test_r04_a_scope_coarser_than_the_cluster_covers_all_of_its_range(rig):
    disk = rig.disk(4 * CLUSTER)
    scope = cbwcore.DirtyBitmap(disk.size, 2 * CLUSTER)
    scope.set_range(0, 1)
    assert rig.snapshot(disk, bitmap=scope)._map("need") == [True, True, False, False]


def test_r04_a_scope_is_copied_when_the_snapshot_is_taken(rig):
    disk = rig.disk(4 * CLUSTER)
    scope = cbwcore.DirtyBitmap(disk.size)
    scope.set_range(0, 1)
    snap = rig.snapshot(disk, bitmap=scope)
    scope.set_range(2 * CLUSTER, 1)
    assert snap._map("need") == [True, False, False, False]
    for bits in (bitarray.bitarray("0110"), np.array([False, True, True, False])):
        snap = rig.snapshot(disk, bitmap=bits)
        bits[3] = True
        assert snap._map("need") == [False, True, True, False]


def test_r04_a_read_over_the_edge_of_the_scope_fails_whole(rig):
    disk = rig.disk(2 * CLUSTER)
    snap = rig.snapshot(disk, bitmap=bitarray.bitarray("10"))
    with pytest.raises(cbwcore.SnapshotAccessError):
        snap.pread(2, CLUSTER - 1)
    assert snap.pread(1, CLUSTER - 1) == disk.t0[CLUSTER - 1 : CLUSTER]


@pytest.mark.parametrize("cluster_size", [4096, CLUSTER])
def test_r04_a_disk_of_no_bytes_has_snapshots_that_can_be_used(rig, run_python, cluster_size):
    """In a process of its own, with nothing readable behind the maps: it once read past their end."""
    code = """
import mmap, sys, cbwcore
guards = [mmap.mmap(-1, 4096, prot=0) for _ in range(4096)]
with cbwcore.Disk(sys.argv[1]) as disk, disk.snapshot(cluster_size=int(sys.argv[2])) as snap:
    assert snap.pread(0, 0) == b""
    assert list(snap.block_status()) == []
    snap.discard(0, 0)
    with snap.open() as f:
        assert f.read() == b""
"""
    path = rig.path("disk")
    path.touch()
    ended = run_python(code, path, cluster_size)
    assert (ended.returncode, ended.stderr) == (0, "")


# ---- R5 ----

CHANGES = {
    "write-zeroes": lambda disk, offset, length: disk.pwrite_zeroes(offset, length),
    "write-zeroes-no-unmap": lambda disk, offset, length: disk.pwrite_zeroes(offset, length, may_unmap=False),
    "discard": lambda disk, offset, length: disk.discard(offset, length),
}


@pytest.fixture(params=CHANGES, ids=str)
def change(request):
    return CHANGES[request.param]


def changing_calls(plan):
    return [call for call in plan.calls() if call[0] in ("pwrite", "zero", "discard")]


def test_r05_zeroes_and_discards_copy_the_old_data_first(rig, change):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_target.stall("pwrite")
    guest = rig.run(change, disk, CLUSTER - 4096, 8192)
    stalled(on_target)
    assert changing_calls(on_disk) == []
    assert snap._map("need") == [True] * 4
    on_target.release()
    guest.result()
    assert snap._map("done") == [True, True, False, False]
    assert disk.pread(8192, CLUSTER - 4096) == bytes(8192)
    assert_t0(snap, disk.t0)


def test_r05_zeroes_and_discards_wait_for_frozen_reads(rig, change):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    reader = rig.run(snap.pread, CLUSTER, 0)
    stalled(plan)
    guest = rig.run(change, disk, 0, CLUSTER)
    guest.reaches(lambda: snap.stats().frozen_waits >= 1, "the wait for a frozen read")
    assert changing_calls(plan) == []
    plan.release()
    assert reader.result() == disk.t0[:CLUSTER]
    guest.result()
    assert disk.pread(CLUSTER, 0) == bytes(CLUSTER)
    assert_t0(snap, disk.t0)


def test_r05_zeroes_and_discards_obey_the_policy(rig, change):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(snap)
    plan.error("pwrite", errno.EIO)
    assert_refused(lambda: change(disk, 4096, 4096), errno.EIO, "target-write", 0, CLUSTER)
    assert file_bytes(disk.path) == disk.t0
    assert_t0(snap, disk.t0)
    snap.on_cbw_error = S
    change(disk, 4096, 4096)
    assert disk.pread(4096, 4096) == bytes(4096)
    assert_broken(snap, errno.EIO, "target-write", 0, CLUSTER)


def test_r05_zeroes_and_discards_are_recorded_in_bitmaps(rig, change):
    disk = rig.disk()
    dirty = disk.bitmaps.add("b")
    change(disk, CLUSTER + 1, 10)
    assert list(dirty.ranges()) == [(CLUSTER, CLUSTER)]
