"""R1 the order of a guest write, R2 what done means, R3 two writers in one cluster."""

import errno

import pytest
from engine_support import (
    CLUSTER,
    LIMIT,
    G,
    S,
    assert_broken,
    assert_refused,
    assert_t0,
    file_bytes,
    ranges,
    stalled,
    until,
)

import cbwcore

NEW = b"n" * 4096


def test_r01_old_data_is_in_the_target_before_the_disk_changes(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_target.stall("pwrite")
    on_disk.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 8192)
    stalled(on_target)
    assert ranges(on_disk, "pread") == [(0, CLUSTER)]
    assert ranges(on_disk, "pwrite") == []
    assert (snap._map("need")[0], snap._map("done")[0]) == (True, False)
    on_target.release()
    stalled(on_disk)
    assert (snap._map("need")[0], snap._map("done")[0]) == (False, True)
    assert file_bytes(snap.target, 0, CLUSTER) == disk.t0[:CLUSTER]
    assert file_bytes(disk.path) == disk.t0
    on_disk.release()
    guest.result()
    assert disk.pread(4096, 8192) == NEW
    assert_t0(snap, disk.t0)


def test_r01_a_frozen_read_holds_the_write_after_its_copy(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    reader = rig.run(snap.pread, 4096, 0)
    stalled(plan)
    guest = rig.run(disk.pwrite, NEW, 0)
    guest.reaches(lambda: snap.stats().frozen_waits >= 1, "the wait for a frozen read")
    assert (snap._map("need")[0], snap._map("done")[0]) == (True, True)
    assert ranges(plan, "pwrite") == []
    assert file_bytes(disk.path) == disk.t0
    assert not reader.done
    plan.release()
    assert reader.result() == disk.t0[:4096]
    guest.result()
    assert snap._map("need") == [False, True, True, True]
    assert disk.pread(4096, 0) == NEW
    assert_t0(snap, disk.t0)


def test_r01_once_copied_new_snapshot_reads_use_the_target_while_an_old_one_is_frozen(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    reader = rig.run(snap.pread, 4096, 0)
    stalled(plan)
    guest = rig.run(disk.pwrite, NEW, 0)
    guest.reaches(lambda: snap.stats().frozen_waits >= 1, "the wait for a frozen read")
    seen = ranges(plan, "pread")
    assert snap.pread(CLUSTER, 0) == disk.t0[:CLUSTER]
    assert ranges(plan, "pread") == seen
    plan.release()
    assert reader.result() == disk.t0[:4096]
    guest.result()


def test_r01_a_write_with_need_clear_touches_nothing_but_the_disk(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 0)
    before = snap.stats()
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_target.stall("pwrite")
    other = rig.run(disk.pwrite, NEW, CLUSTER)  # the snapshot is busy with another cluster meanwhile
    stalled(on_target)
    on_disk.forget_calls()
    on_target.forget_calls()
    rig.run(disk.pwrite, b"m" * 100, 50).result()
    assert on_disk.calls() == [("pwrite", 50, 100)]
    assert on_target.calls() == []
    assert snap.stats().waits == before.waits
    on_target.release()
    other.result()
    assert_t0(snap, disk.t0)


def test_r01_a_large_write_waits_for_all_of_its_clusters(rig):
    disk = rig.disk(6 * CLUSTER)
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 2 * CLUSTER)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_target.stall("pwrite", start=4 * CLUSTER)
    new = b"L" * (4 * CLUSTER)
    guest = rig.run(disk.pwrite, new, CLUSTER + 1)
    stalled(on_target)
    assert ranges(on_disk, "pwrite") == []
    on_target.release()
    guest.result()
    assert disk.pread(len(new), CLUSTER + 1) == new
    assert snap._map("need") == [True] + [False] * 5
    assert_t0(snap, disk.t0)


def test_r01_a_write_whose_first_cluster_was_copied_copies_the_others(rig):
    disk = rig.disk(130 * 4096)  # over three words of the map
    snap = rig.snapshot(disk, cluster_size=4096)
    disk.pwrite(b"n", 0)
    disk.pwrite(b"n" * (129 * 4096), 0)
    assert snap._map("need") == [False] * 129 + [True]
    assert_t0(snap, disk.t0)


def test_r01_writers_and_readers_of_one_cluster_all_see_their_own_order(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pread", times=2)
    readers = [rig.run(snap.pread, CLUSTER, 0) for _ in range(2)]
    stalled(plan, 2)
    guests = [rig.run(disk.pwrite, bytes([65 + i]) * 100, 100 * i) for i in range(4)]
    until(lambda: snap.stats().frozen_waits >= 4, "four waits for frozen reads")
    assert not any(guest.done for guest in guests)
    plan.release()
    assert [reader.result() for reader in readers] == [disk.t0[:CLUSTER]] * 2
    for i, guest in enumerate(guests):
        guest.result()
        assert disk.pread(100, 100 * i) == bytes([65 + i]) * 100
    assert snap.stats().cbw_copies == 1
    assert_t0(snap, disk.t0)


# ---- R2 ----


def test_r02_a_failed_copy_marks_nothing_done(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(snap)
    plan.error("pwrite", errno.EIO)
    with pytest.raises(cbwcore.CopyBeforeWriteError):
        disk.pwrite(NEW, 0)
    assert snap._map("done") == [False] * 4
    assert snap._map("need") == [True] * 4
    assert snap._map("zero") == [False] * 4


def test_r02_a_late_copy_after_a_failed_guest_write_counts(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, cbw_timeout=5)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_target.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(on_target)
    disk._advance_clock(6)
    assert_refused(guest.result, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    assert (snap._map("need")[0], snap._map("done")[0]) == (True, False)
    on_target.release()
    until(lambda: snap._map("done")[0], "the late copy counts")
    assert snap._map("need")[0]
    on_disk.forget_calls()
    disk.pwrite(NEW, 0)
    assert on_disk.calls() == [("pwrite", 0, 4096)]
    assert snap.stats().cbw_copies == 1
    assert_t0(snap, disk.t0)


def test_r02_a_late_copy_after_the_break_never_counts(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, cbw_timeout=5, on_cbw_error=S)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    disk._advance_clock(6)
    guest.result()
    assert_broken(snap, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    plan.release()
    until(lambda: file_bytes(snap.target, 0, CLUSTER) == disk.t0[:CLUSTER], "the late copy is written")
    with pytest.raises(AssertionError, match="not within"):
        until(lambda: snap._map("done")[0] or snap.stats().cbw_copies, "a late copy that counts", limit=0.1)
    assert_broken(snap, errno.ETIMEDOUT, "timeout", 0, CLUSTER)


def test_r02_a_copy_marks_its_own_clusters_alone(rig):
    disk = rig.disk(5 * CLUSTER)
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 2 * CLUSTER - 100)
    assert snap._map("done") == [False, True, True, False, False]
    assert_t0(snap, disk.t0)


def test_r02_the_maps_are_separate(rig):
    disk = rig.disk(bytes(CLUSTER) + b"a" * (5 * CLUSTER))
    scope = cbwcore.DirtyBitmap(disk.size)
    scope.set_range(0, 5 * CLUSTER)
    snap = rig.snapshot(disk, bitmap=scope)
    disk.pwrite(NEW, 0)
    disk.pwrite(NEW, CLUSTER)
    snap.discard(2 * CLUSTER, CLUSTER)
    assert snap._map("need") == [False, False, False, True, True, False]
    assert snap._map("done") == [True, True, False, False, False, False]
    assert snap._map("zero") == [True, False, False, False, False, False]
    assert snap._map("access") == [True, True, False, True, True, False]


# ---- R3 ----


def one_copies_and_another_waits(rig, disk, snap, on_disk):
    """A writer whose copy is stalled in its source read, and a second one that waits for it."""
    on_disk.stall("pread", times=1)
    first = rig.run(disk.pwrite, b"1" * 4096, 0)
    stalled(on_disk)
    second = rig.run(disk.pwrite, b"2" * 4096, 0)
    second.reaches(lambda: snap.stats().copy_waits >= 1, "the wait for another's copy")
    return first, second


def test_r03_the_second_writer_waits_for_the_first_ones_copy(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    first, second = one_copies_and_another_waits(rig, disk, snap, plan)
    assert ranges(plan, "pwrite") == []
    plan.release()
    first.result()
    second.result()
    assert ranges(plan, "pread") == [(0, CLUSTER)]
    assert snap.stats().cbw_copies == 1
    assert disk.pread(4096, 0) in (b"1" * 4096, b"2" * 4096)
    assert_t0(snap, disk.t0)


def test_r03_the_second_writer_copies_itself_when_the_first_ones_copy_failed(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    first, second = one_copies_and_another_waits(rig, disk, snap, on_disk)
    on_target.error("pwrite", errno.EIO, times=1)
    on_disk.release()
    assert_refused(first.result, errno.EIO, "target-write", 0, CLUSTER)
    second.result()
    assert disk.pread(4096, 0) == b"2" * 4096
    assert ranges(on_disk, "pread")[:2] == [(0, CLUSTER)] * 2
    assert (snap.stats().cbw_copies, snap.stats().cbw_failures) == (1, 1)
    assert_t0(snap, disk.t0)


def test_r03_each_writer_fails_for_its_own_io_only(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    first, second = one_copies_and_another_waits(rig, disk, snap, on_disk)
    on_target.error("pwrite", errno.EIO, times=1)
    on_target.error("pwrite", errno.EDQUOT, times=1)
    on_disk.release()
    assert_refused(first.result, errno.EIO, "target-write", 0, CLUSTER)
    assert_refused(second.result, errno.EDQUOT, "target-write", 0, CLUSTER)
    assert snap.stats().cbw_failures == 2
    assert disk.pread(disk.size, 0) == disk.t0
    assert_t0(snap, disk.t0)


def test_r03_of_many_waiters_one_copies_after_a_failure(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_disk.stall("pread", times=1)
    first = rig.run(disk.pwrite, b"f" * 10, 0)
    stalled(on_disk)
    others = [rig.run(disk.pwrite, bytes([48 + i]) * 10, 10 + 10 * i) for i in range(6)]
    until(lambda: snap.stats().copy_waits >= 6, "six waits for another's copy")
    on_target.error("pwrite", errno.EIO, times=1)
    on_disk.release()
    assert_refused(first.result, errno.EIO, "target-write", 0, CLUSTER)
    for guest in others:
        guest.result(LIMIT)
    assert snap.stats().cbw_copies == 1
    assert disk.pread(10, 0) == disk.t0[:10]
    assert_t0(snap, disk.t0)


def test_r03_a_run_goes_around_a_cluster_that_another_copies(rig):
    disk = rig.disk(5 * CLUSTER)
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    first = rig.run(disk.pwrite, b"1" * 100, 2 * CLUSTER)
    stalled(plan)
    second = rig.run(disk.pwrite, b"2" * (5 * CLUSTER), 0)
    second.reaches(lambda: snap.stats().copy_waits >= 1, "the wait for another's copy")
    assert snap._map("done") == [True, True, False, False, False]
    plan.release()
    first.result()
    second.result()
    read = ranges(plan, "pread")
    assert sum(length for _, length in read) == disk.size  # each cluster once
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("policy", [G, S])
def test_r03_a_failure_of_the_first_does_not_reach_the_second_after_a_break_either(rig, policy):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=policy)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    first, second = one_copies_and_another_waits(rig, disk, snap, on_disk)
    on_target.error("pwrite", errno.EIO, times=1)
    on_disk.release()
    if policy == G:
        assert_refused(first.result, errno.EIO, "target-write", 0, CLUSTER)
    else:
        first.result()
        assert_broken(snap, errno.EIO, "target-write", 0, CLUSTER)
    second.result()
    assert disk.pread(4096, 0) in (b"1" * 4096, b"2" * 4096)
