"""R8 what a timeout covers and what becomes of a late copy; R9 after a refused guest write. More: tests/faults."""

import errno
import threading

import pytest
from engine_support import (
    CLUSTER,
    S,
    assert_broken,
    assert_refused,
    assert_t0,
    copy_budget,
    file_bytes,
    ranges,
    stalled,
    until,
)

import cbwcore

NEW = b"n" * 4096


def handed_out():
    _, used, kept = copy_budget()
    return used - kept


# ---- R8 ----


def test_r08_the_timeout_covers_the_own_copy(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, cbw_timeout=5)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, CLUSTER)
    stalled(plan)
    disk._advance_clock(4)
    assert not guest.done
    disk._advance_clock(2)
    assert_refused(guest.result, errno.ETIMEDOUT, "timeout", CLUSTER, CLUSTER)


def test_r08_the_timeout_covers_anothers_copy(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    first = rig.run(disk.pwrite, b"1", 0)  # no timeout yet: it waits for as long as it takes
    stalled(plan)
    snap.cbw_timeout = 5
    second = rig.run(disk.pwrite, b"2", 1)
    second.reaches(lambda: snap.stats().copy_waits >= 1, "the wait for another's copy")
    disk._advance_clock(6)
    assert_refused(second.result, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    assert not first.done
    plan.release()
    first.result()
    assert disk.pread(2, 0) == b"1" + disk.t0[1:2]
    assert_t0(snap, disk.t0)


def test_r08_the_timeout_covers_frozen_reads(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, cbw_timeout=5)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    reader = rig.run(snap.pread, CLUSTER, CLUSTER)
    stalled(plan)
    guest = rig.run(disk.pwrite, NEW, CLUSTER + 8192)
    guest.reaches(lambda: snap.stats().frozen_waits >= 1, "the wait for a frozen read")
    disk._advance_clock(6)
    assert_refused(guest.result, errno.ETIMEDOUT, "timeout", CLUSTER, CLUSTER)
    assert snap._map("done")[1]
    assert file_bytes(disk.path) == disk.t0
    plan.release()
    assert reader.result() == disk.t0[CLUSTER : 2 * CLUSTER]
    disk.pwrite(NEW, CLUSTER)
    assert snap.stats().cbw_copies == 1
    assert_t0(snap, disk.t0)


def test_r08_a_late_copy_owns_its_buffer(rig):
    disk = rig.disk(8 * CLUSTER)
    snap = rig.snapshot(disk, cbw_timeout=5)
    plan = rig.plan(snap)
    free = handed_out()
    plan.stall("pwrite", times=1)
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    disk._advance_clock(6)
    assert_refused(guest.result, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    assert handed_out() == free + CLUSTER
    for i in range(1, 8):  # whoever reused that buffer would put this into it
        disk.pwrite(NEW, i * CLUSTER)
    plan.release()
    until(lambda: snap._map("done")[0], "the late copy counts")
    until(lambda: handed_out() == free, "its buffer comes back")
    assert file_bytes(snap.target, 0, CLUSTER) == disk.t0[:CLUSTER]
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
def test_r08_close_waits_for_a_late_copy(rig, policy):
    disk = rig.disk()
    snap = rig.snapshot(disk, cbw_timeout=5, on_cbw_error=policy)
    target = snap.target
    plan = rig.plan(snap)
    plan.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    disk._advance_clock(6)
    guest.join()
    closer = rig.run(snap.close)
    closer.reaches(lambda: snap.state == "closed", "the wait for a late copy")
    rig.run(disk.pwrite, NEW, 0).result()  # guests are not held up by it
    assert not closer.done
    plan.release()
    closer.result()
    assert file_bytes(target, 0, CLUSTER) == disk.t0[:CLUSTER]


def test_r08_a_late_copy_that_fails_leaves_the_snapshot_as_it_is(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, cbw_timeout=5)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_disk.stall("pread", times=1)
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(on_disk)
    disk._advance_clock(6)
    assert_refused(guest.result, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    on_target.error("pwrite", errno.EIO)
    on_disk.release()
    until(lambda: snap.stats().cbw_failures == 1, "the late copy fails")
    assert (snap.state, snap.error) == ("armed", None)
    assert snap._map("done") == [False] * 4
    on_target.release()
    disk.pwrite(NEW, 0)
    assert_t0(snap, disk.t0)


def test_r08_the_next_write_joins_a_late_copy(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, cbw_timeout=5)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    disk._advance_clock(6)
    assert_refused(guest.result, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    again = rig.run(disk.pwrite, NEW, 0)
    again.reaches(lambda: snap.stats().copy_waits >= 1, "the wait for the late copy")
    plan.release()
    again.result()
    assert ranges(plan, "pwrite") == [(0, CLUSTER)]
    assert_t0(snap, disk.t0)


def test_r08_a_timeout_under_break_snapshot_breaks_and_lets_the_write_go(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, cbw_timeout=5, on_cbw_error=S)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    reader = rig.run(snap.pread, CLUSTER, 0)
    stalled(plan)
    guest = rig.run(disk.pwrite, NEW, 0)
    guest.reaches(lambda: snap.stats().frozen_waits >= 1, "the wait for a frozen read")
    disk._advance_clock(6)
    guest.result()
    assert_broken(snap, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    plan.release()
    with pytest.raises(cbwcore.SnapshotBrokenError):
        reader.result()


# ---- R9 ----

FAULTS = {
    "source-read": ("disk", "pread", errno.EIO),
    "target-write": ("target", "pwrite", errno.EDQUOT),
}


@pytest.mark.parametrize("operation", FAULTS)
def test_r09_after_a_failure_the_next_write_tries_again(rig, operation):
    where, op, code = FAULTS[operation]
    disk = rig.disk()
    snap = rig.snapshot(disk)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    (on_disk if where == "disk" else on_target).error(op, code, times=2)
    for tries in (1, 2):
        assert_refused(lambda: disk.pwrite(NEW, CLUSTER + 5), code, operation, CLUSTER, CLUSTER)
        assert ranges(on_disk, "pread") == [(CLUSTER, CLUSTER)] * tries
        assert ranges(on_disk, "pwrite") == []
        assert snap._map("need") == [True] * 4
    assert file_bytes(disk.path) == disk.t0
    assert (snap.state, snap.error) == ("armed", None)
    assert_t0(snap, disk.t0)
    disk.pwrite(NEW, CLUSTER + 5)
    assert disk.pread(4096, CLUSTER + 5) == NEW
    assert_t0(snap, disk.t0)
    assert (snap.stats().cbw_copies, snap.stats().cbw_failures) == (1, 2)


def test_r09_a_large_write_that_fails_late_changes_nothing(rig):
    disk = rig.disk(40 * CLUSTER)
    snap = rig.snapshot(disk)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_target.error("pwrite", errno.EIO, start=39 * CLUSTER)
    new = b"N" * disk.size
    with pytest.raises(cbwcore.CopyBeforeWriteError) as e:
        disk.pwrite(new, 0)
    assert e.value.offset <= 39 * CLUSTER < e.value.offset + e.value.length
    assert ranges(on_disk, "pwrite") == []
    assert file_bytes(disk.path) == disk.t0
    assert_t0(snap, disk.t0)
    copied = snap._map("done").count(True)
    assert 0 < copied < 40
    on_target.release()
    on_disk.forget_calls()
    disk.pwrite(new, 0)
    read = sum(length for _, length in ranges(on_disk, "pread"))
    assert read == (40 - copied) * CLUSTER  # what was copied stays copied
    assert disk.pread(disk.size, 0) == new
    assert_t0(snap, disk.t0)


def test_r09_other_clusters_are_not_touched_by_a_failure(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(snap)
    plan.error("pwrite", errno.EIO, start=0, end=CLUSTER)
    with pytest.raises(cbwcore.CopyBeforeWriteError):
        disk.pwrite(NEW, 0)
    disk.pwrite(NEW, CLUSTER)
    assert disk.pread(4096, CLUSTER) == NEW
    assert_t0(snap, disk.t0)


def test_r09_a_target_that_took_part_of_a_copy_does_no_harm(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(snap)
    plan.short("pwrite", 4096, times=1)
    plan.error("pwrite", errno.ENOSPC, start=4096)
    assert_refused(lambda: disk.pwrite(NEW, 0), errno.ENOSPC, "target-write", 0, CLUSTER)
    assert ranges(plan, "pwrite") == [(0, CLUSTER), (4096, CLUSTER - 4096)]
    assert_t0(snap, disk.t0)
    plan.release()
    disk.pwrite(NEW, 0)
    assert_t0(snap, disk.t0)


def test_r09_what_a_failed_copy_has_written_is_given_back(rig):
    """The limit counts it no more, so the target must not keep it."""
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(snap)
    plan.short("pwrite", 8192, times=1)
    plan.error("pwrite", errno.EIO, start=8192, times=1)
    assert_refused(lambda: disk.pwrite(NEW, 0), errno.EIO, "target-write", 0, CLUSTER)
    assert ranges(plan, "discard") == [(0, CLUSTER)]
    assert (snap.stats().target_bytes, snap.stats().target_allocated) == (0, 0)


def test_r09_the_space_of_a_failed_copy_is_given_back_to_the_limit(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, target_limit=2 * CLUSTER)
    plan = rig.plan(snap)
    plan.error("pwrite", errno.EIO, times=3)
    for _ in range(3):
        assert_refused(lambda: disk.pwrite(NEW, 0), errno.EIO, "target-write", 0, CLUSTER)
    assert snap.stats().target_bytes == 0
    disk.pwrite(NEW, 0)
    disk.pwrite(NEW, CLUSTER)
    assert snap.stats().target_bytes == 2 * CLUSTER
    assert_refused(lambda: disk.pwrite(NEW, 2 * CLUSTER), errno.ENOSPC, "target-write", 2 * CLUSTER, CLUSTER)
    snap.discard(0, CLUSTER)
    disk.pwrite(NEW, 2 * CLUSTER)
    assert_t0_but_first(snap, disk.t0)


def assert_t0_but_first(snap, t0):
    assert snap.pread(snap.size - CLUSTER, CLUSTER) == t0[CLUSTER:]


def test_r09_many_writers_through_one_outage_all_succeed_on_their_next_try(rig):
    disk = rig.disk(8 * CLUSTER)
    snap = rig.snapshot(disk)
    plan = rig.plan(snap)
    plan.error("pwrite", errno.EIO)
    cleared = threading.Event()

    def write_until_it_works(i):
        new = bytes([65 + i]) * 4096
        try:
            disk.pwrite(new, i * 8192)
        except cbwcore.CopyBeforeWriteError as e:
            cleared.wait(20)
            disk.pwrite(new, i * 8192)
            return (e.errno, e.operation) == (errno.EIO, "target-write")
        return False

    guests = [rig.run(write_until_it_works, i) for i in range(16)]
    until(lambda: snap.stats().cbw_failures >= 16, "every writer has failed once")
    plan.release()
    cleared.set()
    assert all(guest.result() for guest in guests)
    for i in range(16):
        assert disk.pread(4096, i * 8192) == bytes([65 + i]) * 4096
    assert_t0(snap, disk.t0)
