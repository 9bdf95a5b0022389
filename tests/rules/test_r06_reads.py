"""R6 frozen runs, R7 breaks, R16 what a snapshot read may hold up."""

import errno
import threading
import time

import bitarray
import pytest
from engine_support import (
    CLUSTER,
    S,
    assert_broken,
    assert_cause,
    assert_t0,
    file_bytes,
    pattern,
    ranges,
    settled,
    stalled,
    until,
)

import cbwcore

NEW = b"n" * 4096


def frozen_wait(guest, snap, count=1):
    guest.reaches(lambda: snap.stats().frozen_waits >= count, "the wait for a frozen read")


def frozen_and_waiting(rig, disk, snap, on_disk):
    """(a snapshot read that stalls in the first cluster, a guest write there that waits for it)."""
    on_disk.stall("pread", end=CLUSTER, times=1)
    reader = rig.run(snap.pread, 4096, 0)
    stalled(on_disk)
    waiting = rig.run(disk.pwrite, b"!" * 10, 0)
    frozen_wait(waiting, snap)
    return reader, waiting


# ---- R6 ----


def test_r06_a_snapshot_read_freezes_the_clusters_it_reads_and_no_others(rig):
    disk = rig.disk(6 * CLUSTER)
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    reader = rig.run(snap.pread, CLUSTER + 2, 2 * CLUSTER - 1)  # clusters 1, 2 and 3
    stalled(plan)
    assert ranges(plan, "pread") == [(2 * CLUSTER - 1, CLUSTER + 2)]
    for free in (0, 4, 5):
        rig.run(disk.pwrite, NEW, free * CLUSTER).result()
    for count, held in enumerate((1, 2, 3), start=1):
        frozen_wait(rig.run(disk.pwrite, NEW, held * CLUSTER), snap, count)
    plan.release()
    assert reader.result() == disk.t0[2 * CLUSTER - 1 : 3 * CLUSTER + 1]
    for guest in rig.guests:
        guest.result()
    assert_t0(snap, disk.t0)


def test_r06_a_run_ends_where_the_target_has_the_data(rig):
    disk = rig.disk(4 * CLUSTER)
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 2 * CLUSTER)
    plan = rig.plan(disk)
    plan.stall("pread", end=2 * CLUSTER, times=1)
    reader = rig.run(snap.pread, 4 * CLUSTER, 0)
    stalled(plan)
    assert ranges(plan, "pread") == [(0, 2 * CLUSTER)]
    rig.run(disk.pwrite, NEW, 3 * CLUSTER).result()
    frozen_wait(rig.run(disk.pwrite, NEW, CLUSTER), snap)
    plan.release()
    assert reader.result() == disk.t0


def test_r06_a_run_that_was_read_is_thawed_before_the_next(rig):
    disk = rig.disk(4 * CLUSTER)
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 2 * CLUSTER)
    plan = rig.plan(disk)
    plan.stall("pread", start=3 * CLUSTER, times=1)
    reader = rig.run(snap.pread, 4 * CLUSTER, 0)
    stalled(plan)
    rig.run(disk.pwrite, NEW, 0).result()
    rig.run(disk.pwrite, NEW, CLUSTER).result()
    frozen_wait(rig.run(disk.pwrite, NEW, 3 * CLUSTER), snap)
    plan.release()
    assert reader.result() == disk.t0


def test_r06_a_read_of_the_target_freezes_nothing(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 0)
    plan = rig.plan(snap)
    plan.stall("pread")
    reader = rig.run(snap.pread, CLUSTER, 0)
    stalled(plan)
    rig.run(disk.pwrite, b"m" * CLUSTER, 0).result()
    plan.release()
    assert reader.result() == disk.t0[:CLUSTER]
    assert snap.stats().frozen_waits == 0


def test_r06_a_large_read_freezes_at_most_a_run_at_a_time(rig):
    disk = rig.disk(40 * CLUSTER)
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    reader = rig.run(snap.pread, disk.size, 0)
    stalled(plan)
    ((_, length),) = ranges(plan, "pread")
    rig.run(disk.pwrite, NEW, length).result()
    frozen_wait(rig.run(disk.pwrite, NEW, length - 1), snap)
    plan.release()
    assert reader.result() == disk.t0


def test_r06_block_status_freezes_nothing_and_tells_of_t0_all_the_same(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("seek", times=1)
    asker = rig.run(lambda: list(snap.block_status(CLUSTER, CLUSTER)))
    stalled(plan)
    rig.run(disk.pwrite, NEW, 2 * CLUSTER).result()
    rig.run(disk.pwrite_zeroes, CLUSTER, CLUSTER).result()
    assert snap.stats().frozen_waits == 0
    plan.release()
    assert asker.result() == [cbwcore.Extent(CLUSTER, CLUSTER, True, False)]


def test_r06_a_failed_snapshot_read_thaws_its_run(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.error("pread", errno.EIO, times=1)
    with pytest.raises(OSError, match="Input/output error") as e:
        snap.pread(10, 0)
    assert e.value.errno == errno.EIO
    rig.run(disk.pwrite, NEW, 0).result()
    assert snap.stats().frozen_waits == 0
    assert_t0(snap, disk.t0)


def test_r06_a_wait_for_a_snapshot_read_is_counted_once(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    rig.run(snap.pread, 4096, 0)
    stalled(plan)
    guest = rig.run(disk.pwrite, NEW, 0)
    frozen_wait(guest, snap)
    for i in range(50):  # each of them wakes the waiter, which goes on waiting
        disk.pwrite(NEW, (1 + i % 3) * CLUSTER)
        snap.pread(4096, (1 + i % 3) * CLUSTER)
        guest.join(0.002)
    plan.release()
    guest.result()
    assert snap.stats().frozen_waits == 1


# ---- R7 ----


def break_it(disk, snap, plan, cluster):
    """Break the snapshot by a target that fails under a guest write to `cluster`."""
    plan.error("pwrite", errno.EIO)
    disk.pwrite(NEW, cluster * CLUSTER)
    assert snap.state == "broken"


def test_r07_read_in_flight_at_break_returns_t0_or_fails(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_disk.stall("pread", end=CLUSTER, times=1)
    reader = rig.run(snap.pread, 4096, 0)
    stalled(on_disk)
    break_it(disk, snap, on_target, 2)
    rig.run(disk.pwrite, b"!" * 4096, 0).result()  # no frozen read holds a write any more
    assert file_bytes(disk.path, 0, 4096) == b"!" * 4096
    on_disk.release()
    with pytest.raises(cbwcore.SnapshotBrokenError) as e:
        reader.result()
    assert e.value.errno == errno.EACCES
    assert_cause(e.value.__cause__, errno.EIO, "target-write", 2 * CLUSTER, CLUSTER)


def test_r07_read_into_in_flight_at_break_fails(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_disk.stall("pread", end=CLUSTER, times=1)
    reader = rig.run(snap.pread_into, bytearray(4096), 0)
    stalled(on_disk)
    break_it(disk, snap, on_target, 1)
    disk.pwrite(b"!" * 4096, 0)
    on_disk.release()
    with pytest.raises(cbwcore.SnapshotBrokenError):
        reader.result()


def test_r07_target_read_in_flight_at_break_returns_t0_or_fails(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S)
    disk.pwrite(NEW, 0)
    plan = rig.plan(snap)
    plan.stall("pread", times=1)
    reader = rig.run(snap.pread, 4096, 0)
    stalled(plan)
    break_it(disk, snap, plan, 2)
    plan.release()
    try:
        assert reader.result() == disk.t0[:4096]
    except cbwcore.SnapshotBrokenError as e:
        assert_cause(e.__cause__, errno.EIO, "target-write", 2 * CLUSTER, CLUSTER)


def test_r07_block_status_in_flight_at_break_fails(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_disk.stall("seek", times=1)
    asker = rig.run(lambda: list(snap.block_status(0, CLUSTER)))
    stalled(on_disk)
    break_it(disk, snap, on_target, 2)
    disk.pwrite_zeroes(0, CLUSTER)
    on_disk.release()
    with pytest.raises(cbwcore.SnapshotBrokenError):
        asker.result()


def test_r07_a_read_over_several_runs_fails_as_a_whole_after_a_break(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S)
    disk.pwrite(NEW, CLUSTER)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_disk.stall("pread", start=2 * CLUSTER, end=2 * CLUSTER + 1, times=1)
    reader = rig.run(snap.pread, 3 * CLUSTER, 0)
    stalled(on_disk)
    break_it(disk, snap, on_target, 3)
    on_disk.release()
    with pytest.raises(cbwcore.SnapshotBrokenError):
        reader.result()


def test_r07_a_break_wakes_a_write_that_waits_for_a_frozen_read(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    reader, guest = frozen_and_waiting(rig, disk, snap, on_disk)
    break_it(disk, snap, on_target, 2)
    guest.result()
    assert not reader.done
    assert file_bytes(disk.path, 0, 10) == b"!" * 10
    on_disk.release()
    with pytest.raises(cbwcore.SnapshotBrokenError):
        reader.result()


def test_r07_a_break_wakes_writes_that_wait_for_copies(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S, cbw_timeout=1000)
    on_target = rig.plan(snap)
    on_target.stall("pwrite", end=CLUSTER)
    own = rig.run(disk.pwrite, b"1" * 10, 0)
    stalled(on_target)
    other = rig.run(disk.pwrite, b"2" * 10, 10)
    other.reaches(lambda: snap.stats().copy_waits >= 1, "the wait for another's copy")
    break_it(disk, snap, on_target, 2)
    own.result()
    other.result()
    assert on_target.stalled == 1  # the copy itself is still under way
    assert file_bytes(disk.path, 0, 20) == b"1" * 10 + b"2" * 10
    on_target.release()


def test_r07_a_break_wakes_waiters_though_its_own_write_still_waits_for_another_snapshot(rig):
    """A break by a timeout in real time: nothing but the break itself wakes the waiter."""
    disk = rig.disk()
    breaking = rig.snapshot(disk, on_cbw_error=S)
    slow = rig.snapshot(disk, bitmap=bitarray.bitarray("0010"))
    on_disk, on_breaking, on_slow = rig.plan(disk), rig.plan(breaking), rig.plan(slow)
    reader, waiting = frozen_and_waiting(rig, disk, breaking, on_disk)
    breaking.cbw_timeout = 0.1
    on_breaking.stall("pwrite")
    on_slow.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 2 * CLUSTER)
    stalled(on_slow)
    assert breaking.state == "broken"
    waiting.result(5)
    assert not guest.done
    on_slow.release()
    guest.result()
    on_disk.release()
    with pytest.raises(cbwcore.SnapshotBrokenError):
        reader.result()


def test_r07_the_cause_is_set_before_the_guest_write_goes_on(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_target.error("pwrite", errno.EDQUOT)
    on_disk.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, CLUSTER)
    stalled(on_disk)
    assert_broken(snap, errno.EDQUOT, "target-write", CLUSTER, CLUSTER)
    assert file_bytes(disk.path) == disk.t0
    on_disk.release()
    guest.result()


def test_r07_the_cause_is_set_before_a_waiter_goes_on(rig):
    """Of a write that the break frees: when it is on its way to the disk, the cause can be read."""
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    reader, waiting = frozen_and_waiting(rig, disk, snap, on_disk)
    on_disk.stall("pwrite", end=CLUSTER, times=1)
    on_target.error("pwrite", errno.EDQUOT)
    breaking = rig.run(disk.pwrite, NEW, 2 * CLUSTER)
    stalled(on_disk, 2)
    assert_broken(snap, errno.EDQUOT, "target-write", 2 * CLUSTER, CLUSTER)
    on_disk.release()
    waiting.result()
    breaking.result()
    with pytest.raises(cbwcore.SnapshotBrokenError):
        reader.result()


def test_r07_the_first_cause_is_kept(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S, cbw_timeout=5)
    plan = rig.plan(snap)
    plan.stall("pwrite", end=2 * CLUSTER, times=2)
    plan.error("pwrite", errno.EDQUOT, start=2 * CLUSTER)
    slow = [rig.run(disk.pwrite, NEW, i * CLUSTER) for i in range(2)]
    stalled(plan, 2)
    before = time.time()
    disk.pwrite(NEW, 2 * CLUSTER)
    first = snap.error
    assert before <= first.time <= time.time()
    for guest in slow:
        guest.result()
    disk._advance_clock(1000)
    plan.error("pwrite", errno.EIO)
    disk.pwrite(NEW, 3 * CLUSTER)
    plan.release()
    assert_broken(snap, errno.EDQUOT, "target-write", 2 * CLUSTER, CLUSTER)
    assert snap.error.time == first.time
    snap.close()
    assert snap.state == "closed"
    assert_cause(snap.error, errno.EDQUOT, "target-write", 2 * CLUSTER, CLUSTER)


def test_r07_a_copy_that_fails_after_the_break_leaves_its_cause(rig):
    disk = rig.disk()
    told = []
    snap = rig.snapshot(disk, on_cbw_error=S, on_break=lambda *args: told.append(args))
    plan = rig.plan(snap)
    plan.delay("pwrite", 0.5, start=CLUSTER)
    plan.error("pwrite", errno.ENOSPC, start=CLUSTER)
    second = rig.run(disk.pwrite, NEW, CLUSTER)
    until(lambda: plan.calls("pwrite"), "the second write's copy")
    plan.error("pwrite", errno.EIO, end=CLUSTER)
    disk.pwrite(NEW, 0)
    second.result()
    assert snap.stats().cbw_failures == 2
    assert len(told) == 1
    assert (snap._cause().errno, snap._cause().offset) == (errno.EIO, 0)  # the core's own: `error` is asked for once
    assert_broken(snap, errno.EIO, "target-write", 0, CLUSTER)


def test_r07_after_a_break_writes_take_the_fast_path(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    break_it(disk, snap, on_target, 0)
    before = snap.stats()
    on_disk.forget_calls()
    on_target.forget_calls()
    disk.pwrite(NEW, CLUSTER)
    disk.pwrite_zeroes(2 * CLUSTER, 4096)
    disk.discard(3 * CLUSTER, 4096)
    assert on_disk.calls() == [("pwrite", CLUSTER, 4096), ("zero", 2 * CLUSTER, 4096), ("discard", 3 * CLUSTER, 4096)]
    assert on_target.calls() == []
    assert snap.stats().waits == before.waits
    assert snap.stats().cbw_failures == 1


def test_r07_a_break_never_heals(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S)
    plan = rig.plan(snap)
    break_it(disk, snap, plan, 0)
    plan.release()
    snap.on_cbw_error = "break-guest-write"
    disk.pwrite(NEW, CLUSTER)
    assert_broken(snap, errno.EIO, "target-write", 0, CLUSTER)
    for call in (lambda: snap.discard(0, CLUSTER), lambda: snap.open(), lambda: snap.pread(0, 0)):
        with pytest.raises(cbwcore.SnapshotBrokenError):
            call()


def test_r07_on_break_is_called_once_in_the_thread_that_met_the_break(rig):
    disk = rig.disk()
    told = []

    def on_break(broken):
        told.append((broken, broken.state, broken.error.errno, threading.current_thread(), file_bytes(disk.path, 0, 4)))

    snap = rig.snapshot(disk, on_cbw_error=S, on_break=on_break)
    rig.plan(snap).error("pwrite", errno.EIO)
    guest = rig.run(disk.pwrite, NEW, 0)
    guest.result()
    disk.pwrite(NEW, CLUSTER)
    assert told == [(snap, "broken", errno.EIO, guest, b"nnnn")]


def test_r07_a_break_is_told_of_though_the_snapshot_is_closed_before_the_write_is_done(rig, caplog):
    disk = rig.disk()
    told = []
    snap = rig.snapshot(disk, on_cbw_error=S, on_break=told.append)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_target.error("pwrite", errno.EIO)
    on_disk.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(on_disk)
    assert snap.state == "broken"
    closer = rig.run(snap.close)
    until(lambda: snap.state == "closed", "the close has begun")
    on_disk.release()
    guest.result()
    closer.result()
    assert told == [snap]
    assert "broken" in caplog.text
    assert_cause(snap.error, errno.EIO, "target-write", 0, CLUSTER)


def test_r07_a_callback_that_raises_does_no_harm(rig, caplog):
    disk = rig.disk()

    def on_break(broken):
        raise RuntimeError("the callback's own trouble")

    snap = rig.snapshot(disk, on_cbw_error=S, on_break=on_break)
    rig.plan(snap).error("pwrite", errno.EIO)
    disk.pwrite(NEW, 0)
    assert disk.pread(4096, 0) == NEW
    assert "the callback's own trouble" in caplog.text


# ---- R16 ----


@pytest.mark.parametrize("where", ["disk", "target"])
def test_r16_a_stalled_snapshot_read_blocks_no_guest_read_and_no_other_write(rig, where):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    if where == "target":
        disk.pwrite(disk.t0[:1], 0)
    plan = rig.plan(disk if where == "disk" else snap)
    plan.stall("pread", times=1)
    reader = rig.run(snap.pread, CLUSTER, 0)
    stalled(plan)
    assert rig.run(disk.pread, disk.size, 0).result() == disk.t0
    into = bytearray(10)
    rig.run(disk.pread_into, into, 5).result()
    assert into == disk.t0[5:15]
    assert len(rig.run(lambda: list(disk.block_status())).result()) == 1
    for i in range(1, 4):
        rig.run(disk.pwrite, NEW, i * CLUSTER).result()
    assert rig.run(snap.pread, 4096, CLUSTER).result() == disk.t0[CLUSTER : CLUSTER + 4096]
    assert not reader.done
    plan.release()
    assert reader.result() == disk.t0[:CLUSTER]
    assert_t0(snap, disk.t0)


def test_r16_guest_reads_of_a_cluster_go_on_while_its_write_waits(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    assert rig.run(disk.pread, CLUSTER, 0).result() == disk.t0[:CLUSTER]
    assert rig.run(snap.pread, CLUSTER, 0).result() == disk.t0[:CLUSTER]
    plan.release()
    guest.result()


def test_r16_a_stalled_guest_read_blocks_no_guest_write(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    reader = rig.run(disk.pread, CLUSTER, 0)
    stalled(plan)
    rig.run(disk.pwrite, NEW, 0).result()
    rig.run(rig.snapshot, disk).result()
    plan.release()
    reader.result()
    assert_t0(snap, disk.t0)


def test_r16_unaligned_snapshot_reads_leave_buffers_for_direct_guest_reads(rig, tmp_path, set_budget, open_direct):
    """Both need bounce buffers: stalled snapshot reads, however many, must not have them all."""
    set_budget(1)
    disk = open_direct(tmp_path, pattern(4 << 20))
    snap = rig.snapshot(disk, tmp_path / "target")
    plan = rig.plan(disk)
    plan.stall("pread", end=2 << 20)
    readers = [rig.run(snap.pread, (1 << 20) - 512, 1) for _ in range(16)]
    settled(lambda: plan.stalled)
    guest = rig.run(disk.pread, 4096, (2 << 20) + 1)
    assert guest.result(5) == disk.t0[(2 << 20) + 1 : (2 << 20) + 4097]
    plan.release()
    for reader in readers:
        assert reader.result() == disk.t0[1 : (1 << 20) - 511]


def test_r16_clusters_outside_the_scope_are_never_held_up(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, bitmap=bitarray.bitarray("1000"))
    plan = rig.plan(snap)
    plan.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    rig.run(disk.pwrite, b"o" * (3 * CLUSTER), CLUSTER).result()
    assert not guest.done
    plan.release()
    guest.result()
