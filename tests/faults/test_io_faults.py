"""Faults of single calls beside the policies: partial writes, faults under snapshot reads, faults that come and go."""

import errno
import random

import pytest
from engine_support import (
    CLUSTER,
    G,
    S,
    assert_broken,
    assert_refused,
    assert_t0,
    file_bytes,
    pattern,
    ranges,
    stalled,
    until,
)

import cbwcore

NEW = b"n" * 4096


def test_a_disk_write_that_fails_half_way_leaves_the_snapshot_whole(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.short("pwrite", 4096, times=1)
    plan.error("pwrite", errno.EIO, start=4096)
    with pytest.raises(OSError, match="Input/output"):
        disk.pwrite(b"n" * (2 * CLUSTER), 0)
    assert disk.pread(2 * CLUSTER, 0) == b"n" * 4096 + disk.t0[4096 : 2 * CLUSTER]
    assert_t0(snap, disk.t0)
    assert snap._map("done") == [True, True, False, False]
    assert snap._map("need") == [False, False, True, True]


def test_a_write_of_no_bytes_is_none(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    for call in (lambda: disk.pwrite(b"", 5), lambda: disk.pwrite_zeroes(5, 0), lambda: disk.discard(5, 0)):
        call()
    assert (on_disk.calls(), on_target.calls()) == ([], [])
    assert snap._map("need") == [True] * 4


@pytest.mark.parametrize("policy", [G, S])
def test_a_source_read_that_ends_short_and_then_fails(rig, policy):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=policy)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_disk.short("pread", 4096, times=1)
    on_disk.error("pread", errno.EIO, start=4096, times=1)
    if policy == G:
        assert_refused(lambda: disk.pwrite(NEW, 0), errno.EIO, "source-read", 0, CLUSTER)
        assert on_target.calls() == []
        assert_t0(snap, disk.t0)
        disk.pwrite(NEW, 0)
        assert_t0(snap, disk.t0)
    else:
        disk.pwrite(NEW, 0)
        assert_broken(snap, errno.EIO, "source-read", 0, CLUSTER)
        assert on_target.calls() == []


@pytest.mark.parametrize("side", ["disk", "target"])
def test_a_fault_under_a_snapshot_read_fails_that_read_alone(rig, side):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S)
    disk.pwrite(NEW, 0)
    plan = rig.plan(disk if side == "disk" else snap)
    bad = CLUSTER if side == "disk" else 0
    plan.error("pread", errno.EIO, start=bad, end=bad + 1)
    with pytest.raises(OSError, match="Input/output") as e:
        snap.pread(disk.size, 0)
    assert not isinstance(e.value, cbwcore.CbwError)
    assert snap.pread(CLUSTER - 1, bad + 1) == disk.t0[bad + 1 : bad + CLUSTER]
    assert (snap.state, snap.error) == ("armed", None)
    rig.run(disk.pwrite, NEW, 2 * CLUSTER).result()
    plan.release()
    assert_t0(snap, disk.t0)


def test_a_guest_that_waits_for_a_frozen_read_goes_on_when_that_read_fails(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.short("pread", 4096, times=1)
    plan.stall("pread", start=4096, end=8192, times=1)
    reader = rig.run(snap.pread, 8192, 0)
    stalled(plan)
    guest = rig.run(disk.pwrite, NEW, 0)
    guest.reaches(lambda: snap.stats().frozen_waits >= 1, "the wait for a frozen read")
    plan.error("pread", errno.EIO)  # comes too late for the stalled call, which succeeds
    plan.release()
    assert reader.result() == disk.t0[:8192]
    guest.result()
    plan.stall("pread", times=1)
    reader = rig.run(snap.pread, 100, CLUSTER)
    stalled(plan)
    guest = rig.run(disk.pwrite, NEW, CLUSTER)
    count = snap.stats().frozen_waits
    guest.reaches(lambda: snap.stats().frozen_waits > count or snap._map("done")[1], "the wait for a frozen read")
    plan.release()
    reader.result()
    guest.result()
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("op", ["seek", "zero"])
def test_faults_of_a_target_that_must_be_zeroed(rig, op):
    disk = rig.sparse(4 * CLUSTER)
    target = rig.path("target")
    target.write_bytes(b"\xff" * disk.size)
    snap = rig.snapshot(disk, target)
    rig.plan(snap).error(op, errno.EIO, times=1)
    assert_refused(lambda: disk.pwrite(NEW, CLUSTER), errno.EIO, "target-write", CLUSTER, CLUSTER)
    assert snap._map("done") == snap._map("zero") == [False] * 4
    assert_t0(snap, bytes(disk.size))
    disk.pwrite(NEW, CLUSTER)
    assert_t0(snap, bytes(disk.size))
    assert file_bytes(target, CLUSTER, CLUSTER) == bytes(CLUSTER)


def test_the_runs_before_a_failed_one_stay_copied(rig):
    disk = rig.disk(64 * CLUSTER)
    snap = rig.snapshot(disk)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_target.error("pwrite", errno.EIO, skip=2, times=1)
    with pytest.raises(cbwcore.CopyBeforeWriteError) as e:
        disk.pwrite(b"L" * disk.size, 0)
    assert (e.value.operation, e.value.offset, e.value.length) == ("target-write", 2 << 20, 1 << 20)
    assert snap._map("done") == [True] * 32 + [False] * 32
    assert ranges(on_disk, "pwrite") == []
    disk.pwrite(b"L" * disk.size, 0)
    assert len(ranges(on_disk, "pread")) == 5
    assert_t0(snap, disk.t0)


def test_a_discard_of_a_snapshot_that_the_target_refuses_still_gives_the_clusters_up(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 0)
    rig.plan(snap).error("discard", errno.EIO, times=1)
    with pytest.raises(OSError, match="Input/output"):
        snap.discard(0, CLUSTER)
    with pytest.raises(cbwcore.SnapshotAccessError):
        snap.pread(1, 0)
    assert snap.stats().target_bytes == CLUSTER  # its space is still taken
    disk.pwrite(b"m", 0)
    assert snap.pread(CLUSTER, CLUSTER) == disk.t0[CLUSTER : 2 * CLUSTER]
    snap.discard(0, CLUSTER)


def test_faults_that_come_and_go_under_load(rig, seed):
    """Every write succeeds or is refused, every snapshot byte is T0, and the disk has what its guests were told."""
    disk = rig.disk(32 * CLUSTER + 777)
    snap = rig.snapshot(disk, cluster_size=16384)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    strip = 2 * CLUSTER
    for i in range(20):
        on_target.error("pwrite", errno.EIO, skip=7 * i, times=2)
        on_disk.error("pread", errno.EINTR, skip=5 * i, times=2)
        on_target.short("pwrite", 5000, skip=3 * i, times=3)

    def guest(g):
        rng = random.Random(seed + g)
        mine = bytearray(disk.t0[g * strip : (g + 1) * strip])
        refused = 0
        for _ in range(60):
            at = rng.randrange(strip)
            n = rng.randint(1, min(strip - at, 30000))
            new = rng.randbytes(n)
            try:
                disk.pwrite(new, g * strip + at)
                mine[at : at + n] = new
            except cbwcore.CopyBeforeWriteError as e:
                refused += (e.errno, e.operation) == (errno.EIO, "target-write")
        return bytes(mine), refused

    def reader(r):
        rng = random.Random(seed - r)
        for _ in range(100):
            at = rng.randrange(disk.size)
            n = rng.randint(1, min(disk.size - at, 200000))
            assert snap.pread(n, at) == disk.t0[at : at + n]

    readers = [rig.run(reader, r) for r in range(2)]
    guests = [rig.run(guest, g) for g in range(6)]
    refused = 0
    for g, thread in enumerate(guests):
        mine, count = thread.result()
        refused += count
        assert disk.pread(strip, g * strip) == mine
    for thread in readers:
        thread.result()
    assert refused == snap.stats().cbw_failures > 0
    assert_t0(snap, disk.t0)


def test_a_broken_snapshot_under_load_never_gives_newer_data(rig, seed):
    disk = rig.disk(16 * CLUSTER)
    snap = rig.snapshot(disk, on_cbw_error=S)
    rig.plan(snap).error("pwrite", errno.EIO, skip=6)

    def reader(r):
        rng = random.Random(seed + r)
        while True:
            at = rng.randrange(disk.size - 4096)
            try:
                assert snap.pread(4096, at) == disk.t0[at : at + 4096]
            except cbwcore.SnapshotBrokenError as e:
                return e.__cause__.errno == errno.EIO

    readers = [rig.run(reader, r) for r in range(4)]
    guests = [rig.run(lambda i=i: disk.pwrite(b"\xee" * CLUSTER, i * CLUSTER)) for i in range(16)]
    for thread in guests:
        thread.result()
    until(lambda: snap.state == "broken", "the break")
    assert all(thread.result() for thread in readers)
    assert disk.pread(disk.size, 0) == b"\xee" * disk.size


def test_zeroes_at_the_end_of_a_disk_that_was_cut_fail(rig):
    disk = rig.disk()
    with open(disk.path, "r+b") as f:
        f.truncate(CLUSTER)
    with pytest.raises(OSError, match="Input/output"):
        disk.pwrite_zeroes(3 * CLUSTER, CLUSTER)


@pytest.mark.parametrize("policy", [G, S])
def test_a_disk_that_does_not_tell_its_size_gives_no_t0_data(rig, policy):
    """Else it might have been cut, and written again (R12)."""
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=policy)
    plan = rig.plan(disk)
    plan.error("seek", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        snap.pread(4096, 0)
    if policy == G:
        assert_refused(lambda: disk.pwrite(NEW, 0), errno.EIO, "source-read", 0, CLUSTER)
        plan.release()
        assert_t0(snap, disk.t0)
    else:
        disk.pwrite(NEW, 0)
        assert_broken(snap, errno.EIO, "source-read", 0, CLUSTER)


def test_a_file_system_that_knows_no_holes_has_data_throughout(rig):
    disk = rig.disk()
    plan = rig.plan(disk)
    plan.error("seek", errno.EINVAL, skip=1)
    assert [(e.offset, e.length, e.data) for e in disk.block_status()] == [(0, 4 * CLUSTER, True)]


def test_a_target_that_cannot_discard_keeps_the_space_and_counts_it(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 0)
    rig.plan(snap).error("discard", errno.EOPNOTSUPP)
    snap.discard(0, CLUSTER)
    assert snap.stats().target_bytes == CLUSTER
    with pytest.raises(cbwcore.SnapshotAccessError):
        snap.pread(1, 0)


def test_of_the_space_that_is_given_up_zeroes_are_none(rig):
    disk = rig.disk(bytes(CLUSTER) + pattern(CLUSTER) + bytes(CLUSTER) + pattern(CLUSTER))
    snap = rig.snapshot(disk)
    disk.pwrite(b"n" * (4 * CLUSTER), 0)
    assert snap.stats().target_bytes == 2 * CLUSTER
    snap.discard(0, 3 * CLUSTER)
    assert snap.stats().target_bytes == CLUSTER


@pytest.mark.parametrize("part", ["start", "end"])
def test_a_read_modify_write_whose_read_fails_writes_nothing(rig, place, part):
    path = place / "direct"
    path.write_bytes(pattern(4 * CLUSTER))
    try:
        disk = rig.open(path, pattern(4 * CLUSTER), direct=True)
    except cbwcore.ConfigError as e:
        pytest.skip(str(e))
    plan = rig.plan(disk)
    plan.error("pread", errno.EIO, skip=0 if part == "start" else 1)
    with pytest.raises(OSError, match="Input/output"):
        disk.pwrite(b"n" * 10_000, 100)
    assert ranges(plan, "pwrite") == []
    assert file_bytes(path) == disk.t0


def test_two_that_shut_the_gate_take_turns(rig):
    disk = rig.disk()
    plan = rig.plan(disk)
    plan.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    first = rig.run(disk.snapshot, rig.path("target"))
    second = rig.run(disk._advance_clock, 0.0)
    assert not first.done
    assert not second.done
    plan.release()
    guest.result()
    first.result()
    second.result()
