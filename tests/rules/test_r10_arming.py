"""R10 one T0; R17 bounded memory."""

import errno
import gc
import struct
import threading
from pathlib import Path

import pytest
from engine_support import (
    CLUSTER,
    LIMIT,
    assert_refused,
    assert_t0,
    copy_budget,
    pattern,
    ranges,
    settled,
    stalled,
    until,
)

import cbwcore
from cbwcore._cbwcore import copy_buffers

NEW = b"n" * 4096

MIB = 1 << 20


def held_at_the_gate(rig, disk, offset):
    """Guest writes of one byte from `offset` on, until one of them waits; how many went through, and that one."""
    for i in range(20):
        guest = rig.run(disk.pwrite, b"G", offset + i)
        guest.join(0.1)
        if not guest.done:
            return i, guest
        guest.result()
    raise AssertionError("guest writes go on being let in while a snapshot drains")


# ---- R10 ----


def test_r10_taking_a_snapshot_drains_switches_and_lets_on(rig):
    disk = rig.disk()
    plan = rig.plan(disk)
    plan.stall("pwrite", times=1)
    before = rig.run(disk.pwrite, b"B" * 100, 0)
    stalled(plan)
    target = rig.path("target")
    arming = rig.run(disk.snapshot, target)
    until(target.exists, "the target is made")
    passed, held = held_at_the_gate(rig, disk, CLUSTER)
    assert not arming.done
    assert "armed" not in [snap.state for snap in disk.snapshots]
    assert len(ranges(plan, "pwrite")) == 1 + passed
    assert rig.run(disk.pread, 10, 2 * CLUSTER).result() == disk.t0[2 * CLUSTER : 2 * CLUSTER + 10]
    plan.release()
    snap = arming.result()
    before.result()
    held.result()
    t0 = bytearray(disk.t0)
    t0[:100] = b"B" * 100
    t0[CLUSTER : CLUSTER + passed] = b"G" * passed
    assert_t0(snap, bytes(t0))
    t0[CLUSTER + passed : CLUSTER + passed + 1] = b"G"
    assert disk.pread(disk.size, 0) == bytes(t0)


def test_r10_writes_that_wait_for_a_copy_do_not_hold_up_a_new_snapshot(rig):
    disk = rig.disk()
    first = rig.snapshot(disk)
    plan = rig.plan(first)
    plan.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    second = rig.run(rig.snapshot, disk).result()
    assert not guest.done
    plan.release()
    guest.result()
    assert second._map("done") == [True, False, False, False]  # it came before that write reached the disk
    assert_t0(first, disk.t0)
    assert_t0(second, disk.t0)


def test_r10_a_group_has_one_t0_under_concurrent_writers(rig):
    """Each writer writes its next number to A and then to B: at any one moment B's is A's, or one less."""
    writers, rounds = 4, 25
    a, b = rig.disk(bytes(writers * CLUSTER)), rig.disk(bytes(writers * CLUSTER))
    stop = threading.Event()

    def count(i):
        number = 0
        while not stop.is_set():
            number += 1
            a.pwrite(struct.pack("<Q", number), i * CLUSTER)
            b.pwrite(struct.pack("<Q", number), i * CLUSTER)
        return number

    guests = [rig.run(count, i) for i in range(writers)]
    last = [0] * writers
    for i in range(rounds):
        for w in range(writers):
            until(lambda w=w: struct.unpack("<Q", b.pread(8, w * CLUSTER))[0] > last[w], "progress")
        pairs = [(a, rig.path("target")), (b, rig.path("target"))]
        with_t0 = cbwcore.snapshot_group(pairs if i % 2 else pairs[::-1])
        in_a, in_b = with_t0 if i % 2 else with_t0[::-1]
        for w in range(writers):
            at_a, at_b = (struct.unpack("<Q", snap.pread(8, w * CLUSTER))[0] for snap in (in_a, in_b))
            assert at_b <= at_a <= at_b + 1, f"round {i}, writer {w}"
            last[w] = at_a
        in_a.close()
        in_b.close()
    stop.set()
    assert all(guest.result() for guest in guests)


@pytest.mark.parametrize("slow", [0, 1])
def test_r10_no_gate_of_a_group_opens_before_all_are_shut(rig, slow):
    """While one disk drains, a write comes to the other: it is waited for, or held back; never in flight at T0."""
    disks = [rig.disk(), rig.disk()]
    plans = [rig.plan(disk) for disk in disks]
    draining, other = plans[slow], plans[1 - slow]
    draining.stall("pwrite", times=1)
    first = rig.run(disks[slow].pwrite, b"1", 0)
    stalled(draining)
    targets = [rig.path("target") for _ in disks]
    arming = rig.run(cbwcore.snapshot_group, list(zip(disks, targets, strict=True)))
    until(lambda: all(target.exists() for target in targets), "the targets are made")
    arming.join(0.05)
    other.stall("pwrite", times=1)
    second = rig.run(disks[1 - slow].pwrite, b"2", 0)
    second.join(0.05)
    in_flight = other.stalled
    draining.release()
    first.result()
    if in_flight:
        arming.join(0.1)
        assert not arming.done
        other.release()
    snaps = arming.result()
    other.release()
    second.result()
    assert snaps[slow].pread(1, 0) == b"1"
    assert snaps[1 - slow].pread(1, 0) == (b"2" if in_flight else disks[1 - slow].t0[:1])


def test_r10_of_a_group_that_cannot_be_taken_nothing_is_left(rig):
    a, b = rig.disk(), rig.disk()
    small = rig.path("small")
    small.write_bytes(b"too small")
    made = rig.path("target")
    with pytest.raises(cbwcore.ConfigError, match="less than the disk"):
        cbwcore.snapshot_group([(a, made), (b, small)])
    assert not made.exists()
    assert small.read_bytes() == b"too small"
    assert (a.snapshots, b.snapshots) == ((), ())
    plan = rig.plan(a)
    rig.run(a.pwrite, NEW, 0).result()
    rig.run(b.pwrite, NEW, 0).result()
    assert plan.calls() == [("pwrite", 0, 4096)]


def test_r10_two_groups_in_opposite_order_do_not_deadlock(rig):
    a, b = rig.disk(), rig.disk()

    def take(pairs):
        for _ in range(10):
            for snap in cbwcore.snapshot_group([(disk, rig.path(threading.current_thread().name)) for disk in pairs]):
                snap.close()

    takers = [rig.run(take, pairs) for pairs in ([a, b], [b, a])]
    for taker in takers:
        taker.result()


def test_r10_the_pause_is_measured_and_counts_the_drain(rig):
    disk = rig.disk()
    plan = rig.plan(disk)
    plan.delay("pwrite", 0.1, times=1)
    guest = rig.run(disk.pwrite, NEW, 0)
    until(lambda: ranges(plan, "pwrite"), "the write is in flight")
    snap = rig.snapshot(disk)
    guest.result()
    assert 0 < snap.stats().arm_pause < LIMIT
    quiet = rig.snapshot(disk)
    assert snap.stats().arm_pause > quiet.stats().arm_pause > 0


def test_r10_arming_does_no_io_on_the_disk_whatever_its_size(rig):
    disk = rig.sparse(1 << 40)
    plan = rig.plan(disk)
    scope = cbwcore.DirtyBitmap(disk.size)
    scope.set_range(0, 1)
    scope.set_range(disk.size - 1, 1)
    rig.snapshot(disk)
    snap = rig.snapshot(disk, bitmap=scope)
    assert plan.calls() == []
    disk.pwrite(NEW, disk.size - 4096)
    assert plan.calls(), "the plan sees what the disk is asked"
    assert snap.stats().cbw_copies == 1


def test_r10_disabling_a_snapshot_lets_its_guests_on_at_once(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, cbw_timeout=1000)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    closer = rig.run(snap.close)
    guest.result()
    assert not closer.done
    plan.release()
    closer.result()


# ---- R17 ----


def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_r17_arming_16_tib_costs_no_page_that_no_write_has_touched(rig):
    try:
        disk = rig.sparse(16 << 40)
    except OSError as e:
        pytest.skip(f"no file of 16 TiB here: {e.strerror}")
    warm = rig.snapshot(rig.disk())  # whatever the first snapshot of a process costs
    warm.stats()
    scope = cbwcore.DirtyBitmap(disk.size)
    scope.set_range(8 << 40, CLUSTER)
    before = resident()
    snap = rig.snapshot(disk)
    scoped = rig.snapshot(disk, bitmap=scope)
    assert resident() - before < 1 << 20
    for offset in (0, 8 << 40, disk.size - 4096):
        disk.pwrite(NEW, offset)
    assert resident() - before < 2 << 20
    assert snap.stats().cbw_copies == 3
    assert scoped.stats().cbw_copies == 1
    assert snap.pread(4096, 8 << 40) == scoped.pread(4096, 8 << 40) == bytes(4096)


@pytest.mark.parametrize("timeout", [0.0, 1000.0])
def test_r17_copy_buffers_stay_within_their_budget(rig, set_budget, timeout):
    budget, guests = set_budget(2), 50  # more than the budget has buffers for
    disk = rig.disk(guests * CLUSTER)
    snap = rig.snapshot(disk, cbw_timeout=timeout)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    writers = [rig.run(disk.pwrite, NEW, i * CLUSTER) for i in range(guests)]
    assert 1 <= settled(lambda: plan.stalled) <= budget // CLUSTER
    limit, used, kept = copy_budget()
    assert (limit, kept) == (budget, 0)
    assert plan.stalled * CLUSTER <= used <= budget
    assert not any(writer.done for writer in writers)
    plan.release()
    for writer in writers:
        writer.result()
    assert copy_budget()[1] <= budget
    assert snap.stats().cbw_copies == guests
    assert_t0(snap, disk.t0)


def test_r17_every_buffer_comes_back(rig, set_budget):
    """One copy has the shared part of the budget, one the snapshot's reserve, others wait; and all that again."""
    set_budget(2)
    disk = rig.disk(8 * MIB)
    snap = rig.snapshot(disk, cluster_size=MIB)
    plan = rig.plan(snap)
    for start in (0, 4):
        plan.stall("pwrite")
        guests = [rig.run(disk.pwrite, b"n", (start + i) * MIB) for i in range(4)]
        stalled(plan, 2)
        assert copy_buffers()[1] == 2 * MIB
        plan.release()
        for guest in guests:
            guest.result()
        assert copy_buffers()[1] == copy_buffers()[2] <= MIB
    assert_t0(snap, disk.t0)


def test_r17_nobody_waits_with_a_buffer_in_hand(rig):
    """Two snapshots share the buffer that was read; then the write waits for a frozen read of the second."""
    disk = rig.disk()
    snaps = [rig.snapshot(disk) for _ in range(2)]
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    reader = rig.run(snaps[1].pread, 4096, 0)
    stalled(plan)
    guest = rig.run(disk.pwrite, NEW, 0)
    guest.reaches(lambda: snaps[1].stats().frozen_waits == 1, "the wait for a frozen read")
    until(lambda: copy_buffers()[1] == copy_buffers()[2], "the end of all buffers")
    assert not guest.done
    plan.release()
    guest.result()
    assert reader.result() == disk.t0[:4096]


def test_r17_buffers_at_rest_make_room_for_larger_ones(rig, set_budget):
    """Of the shared part of the budget a small buffer is kept, and then the rest does not do."""
    cbwcore.limits.copy_buffers = 128 * MIB
    small, large = rig.disk(MIB), rig.disk(4 * MIB)
    before = cbwcore.limits.copy_bytes
    cbwcore.limits.copy_bytes = CLUSTER
    try:
        first, second = rig.snapshot(small), rig.snapshot(large, cluster_size=MIB)
    finally:
        cbwcore.limits.copy_bytes = before
    cbwcore.limits.copy_buffers = copy_buffers()[3] + MIB  # what is reserved, and one large buffer
    rig.run(small.pwrite, b"n", 0).result()  # in a new thread, which has no ring with a buffer of its own
    assert copy_buffers()[1:3] == (CLUSTER, CLUSTER)
    rig.run(large.pwrite, b"n", 0).result()
    assert copy_buffers()[1:3] == (MIB, MIB)
    assert_t0(first, small.t0)
    assert_t0(second, large.t0)


def test_r15_old_data_that_do_not_do_for_the_next_snapshot_are_read_again(rig, set_budget):
    """There is no buffer for what both want; so the first reads its own cluster, and the second its larger one."""
    set_budget(128)
    disk = rig.disk(4 * MIB)
    before = cbwcore.limits.copy_bytes
    cbwcore.limits.copy_bytes = CLUSTER
    try:
        snaps = [rig.snapshot(disk), rig.snapshot(disk, cluster_size=MIB)]
    finally:
        cbwcore.limits.copy_bytes = before
    cbwcore.limits.copy_buffers = copy_buffers()[3] + 4 * CLUSTER
    plan = rig.plan(disk)
    disk.pwrite(b"n", 0)
    assert [n for _, n in ranges(plan, "pread")] == [CLUSTER, MIB]
    for snap in snaps:
        assert_t0(snap, disk.t0)


def test_r17_writers_of_several_snapshots_and_sizes_share_the_budget(rig, set_budget):
    budget = set_budget(4)
    disk = rig.disk(pattern(64 * CLUSTER))
    snaps = [rig.snapshot(disk, cluster_size=size) for size in (4096, CLUSTER, 1 << 20)]
    plans = [rig.plan(snap) for snap in snaps]
    for plan in plans:
        plan.stall("pwrite")
    writers = [rig.run(disk.pwrite, NEW, i * CLUSTER) for i in range(64)]
    for _ in snaps:
        assert settled(lambda: sum(plan.stalled for plan in plans)) > 0
        assert copy_budget()[1] <= budget
        for plan in plans:
            if plan.stalled:
                plan.release()
                break
    for plan in plans:
        plan.release()
    for writer in writers:
        writer.result()
    assert copy_budget()[1] <= budget
    for snap in snaps:
        assert_t0(snap, disk.t0)


def test_r17_a_timeout_holds_also_for_a_write_that_waits_for_a_buffer(rig, set_budget):
    set_budget(2)
    disk = rig.disk(60 * CLUSTER)
    snap = rig.snapshot(disk)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    holders = [rig.run(disk.pwrite, NEW, i * CLUSTER) for i in range(50)]
    assert settled(lambda: plan.stalled) < len(holders)
    snap.cbw_timeout = 5
    guest = rig.run(disk.pwrite, NEW, 55 * CLUSTER)
    until(lambda: guest.done or disk._advance_clock(6), "the timeout")
    assert_refused(guest.result, errno.ETIMEDOUT, "timeout", 55 * CLUSTER, CLUSTER)
    plan.release()
    for holder in holders:
        holder.result()
    assert_t0(snap, disk.t0)


def test_r17_a_dead_target_leaves_buffers_to_the_snapshots_of_another_disk(rig, set_budget):
    budget = set_budget(4)
    dead, alive = rig.disk(64 * CLUSTER), rig.disk(20 * CLUSTER)
    plan = rig.plan(rig.snapshot(dead))
    snap = rig.snapshot(alive)
    plan.stall("pwrite")
    writers = [rig.run(dead.pwrite, NEW, i * CLUSTER) for i in range(64)]
    assert settled(lambda: plan.stalled) <= budget // CLUSTER
    for i in range(20):
        rig.run(alive.pwrite, NEW, i * CLUSTER).result(5)
    assert not any(writer.done for writer in writers)
    assert copy_budget()[1] <= budget
    plan.release()
    for writer in writers:
        writer.result()
    assert_t0(snap, alive.t0)


def test_r17_a_copy_never_needs_a_second_buffer_while_it_holds_one(rig, tmp_path, set_budget, open_direct):
    """A direct target that is longer than the disk, whose size is no whole number of blocks."""
    set_budget(1)
    disk = open_direct(tmp_path, pattern((1 << 20) - 100))
    target = tmp_path / "target"
    target.write_bytes(b"x" * (2 << 20))
    snap = rig.snapshot(disk, target, cluster_size=1 << 20)
    guest = rig.run(disk.pwrite, b"n" * 100, 4096)
    try:
        guest.result(5)
    finally:
        set_budget(64)  # let it go on, if it hangs
    assert_t0(snap, disk.t0)


def test_r17_stalled_snapshot_reads_of_the_target_hold_no_copy_buffer(rig, set_budget):
    set_budget(1)
    disk = rig.disk(4 << 20)
    snap = rig.snapshot(disk)
    disk.pwrite(b"n" * (1 << 20), 0)
    plan = rig.plan(snap)
    plan.stall("pread")
    readers = [rig.run(snap.pread, 1 << 20, 0) for _ in range(4)]
    stalled(plan, 4)
    rig.run(disk.pwrite, b"n" * (1 << 20), 1 << 20).result()
    plan.release()
    for reader in readers:
        assert reader.result() == disk.t0[: 1 << 20]
    assert_t0(snap, disk.t0)
