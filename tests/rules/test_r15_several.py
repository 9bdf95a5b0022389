"""R15 several snapshots of one disk; R18 no lock is held across I/O."""

import errno
import itertools

import bitarray
import pytest
from engine_support import (
    CLUSTER,
    S,
    assert_broken,
    assert_refused,
    assert_t0,
    file_bytes,
    ranges,
    stalled,
)

import cbwcore

NEW = b"n" * 4096


# ---- R15 ----


@pytest.mark.parametrize("sizes", list(itertools.permutations([4096, CLUSTER, 4 * CLUSTER])), ids=str)
def test_r15_the_old_data_is_read_once(rig, sizes):
    disk = rig.disk(8 * CLUSTER + 100)
    snaps = [rig.snapshot(disk, cluster_size=size) for size in sizes]
    plan = rig.plan(disk)
    disk.pwrite(NEW, 5 * CLUSTER + 10)
    assert ranges(plan, "pread") == [(4 * CLUSTER, 4 * CLUSTER)]
    assert [snap.stats().cbw_bytes for snap in snaps] == [8192 if size == 4096 else size for size in sizes]
    for snap in snaps:
        assert_t0(snap, disk.t0)


def test_r15_the_old_data_of_a_large_write_is_read_once(rig):
    disk = rig.disk(50 * CLUSTER)
    snaps = [rig.snapshot(disk, cluster_size=size) for size in (4096, CLUSTER, CLUSTER)]
    plan = rig.plan(disk)
    disk.pwrite(b"n" * (disk.size - 2), 1)
    read = ranges(plan, "pread")
    assert sum(length for _, length in read) == disk.size
    assert len({offset for offset, _ in read}) == len(read)
    for snap in snaps:
        assert_t0(snap, disk.t0)


def test_r15_each_has_its_own_t0(rig):
    disk = rig.disk()
    states, snaps = [], []
    for i in range(4):
        states.append(disk.pread(disk.size, 0))
        snaps.append(rig.snapshot(disk, cluster_size=4096 << i))
        disk.pwrite(bytes([65 + i]) * 10000, i * 20000)
    for snap, state in zip(snaps, states, strict=True):
        assert_t0(snap, state)
    for i in (1, 3, 0, 2):  # closed in any order
        snaps[i].close()
        disk.pwrite(b"x" * 100, i * 1000)
        for snap, state in zip(snaps, states, strict=True):
            if snap.state == "armed":
                assert_t0(snap, state)
    assert disk.snapshots == ()


def test_r15_a_broken_one_disturbs_no_other(rig):
    disk = rig.disk()
    dead = rig.snapshot(disk, on_cbw_error=S)
    alive = rig.snapshot(disk, cluster_size=4096)
    plan = rig.plan(dead)
    plan.error("pwrite", errno.EIO)
    disk.pwrite(NEW, 0)
    assert_broken(dead, errno.EIO, "target-write", 0, CLUSTER)
    assert (alive.state, alive.error, alive.stats().cbw_failures) == ("armed", None, 0)
    disk.pwrite(NEW, 2 * CLUSTER)
    assert_t0(alive, disk.t0)
    dead.close()
    disk.pwrite(NEW, 3 * CLUSTER)
    assert_t0(alive, disk.t0)


@pytest.mark.parametrize("dead_first", [True, False])
def test_r15_one_that_refuses_a_write_leaves_the_other_valid(rig, dead_first):
    disk = rig.disk()
    snaps = [rig.snapshot(disk), rig.snapshot(disk)]
    dead, alive = snaps if dead_first else snaps[::-1]
    plan = rig.plan(dead)
    plan.error("pwrite", errno.EIO)
    assert_refused(lambda: disk.pwrite(NEW, 0), errno.EIO, "target-write", 0, CLUSTER)
    assert file_bytes(disk.path) == disk.t0
    assert alive.stats().cbw_failures == 0
    for snap in snaps:
        assert_t0(snap, disk.t0)
    plan.release()
    disk.pwrite(NEW, 0)
    for snap in snaps:
        assert_t0(snap, disk.t0)


def test_r15_a_stalled_target_holds_up_only_what_its_own_scope_covers(rig):
    disk = rig.disk()
    dead = rig.snapshot(disk, bitmap=bitarray.bitarray("1000"))
    alive = rig.snapshot(disk)
    plan = rig.plan(dead)
    plan.stall("pwrite")
    held = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    rig.run(disk.pwrite, NEW, CLUSTER).result()
    assert rig.run(alive.pread, disk.size, 0).result() == disk.t0
    assert not held.done
    plan.release()
    held.result()
    assert_t0(alive, disk.t0)
    assert dead.pread(CLUSTER, 0) == disk.t0[:CLUSTER]


@pytest.mark.parametrize("slow_first", [True, False])
def test_r15_the_timeout_of_one_counts_its_own_waiting_only(rig, slow_first):
    """The slow one has no timeout: what it makes a write wait must not run the other's out."""
    disk = rig.disk(40 * CLUSTER)
    options = [{}, {"cbw_timeout": 5}]
    made = [rig.snapshot(disk, **o) for o in (options if slow_first else options[::-1])]
    slow, quick = made if slow_first else made[::-1]
    plan = rig.plan(slow)
    plan.stall("pwrite", times=1)
    guest = rig.run(disk.pwrite, b"n" * disk.size, 0)
    stalled(plan)
    disk._advance_clock(100)
    plan.release()
    guest.result()
    assert quick.stats().timeouts == 0
    for snap in made:
        assert_t0(snap, disk.t0)


def test_r15_policies_and_scopes_are_each_ones_own(rig):
    disk = rig.disk()
    narrow = rig.snapshot(disk, bitmap=bitarray.bitarray("0100"), on_cbw_error=S)
    wide = rig.snapshot(disk)
    for snap in (narrow, wide):
        rig.plan(snap).error("pwrite", errno.EIO, times=1)
    assert_refused(lambda: disk.pwrite(NEW, 0), errno.EIO, "target-write", 0, CLUSTER)
    assert narrow.state == "armed"
    disk.pwrite(NEW, CLUSTER)
    assert_broken(narrow, errno.EIO, "target-write", CLUSTER, CLUSTER)
    assert_t0(wide, disk.t0)


def test_r15_a_fault_of_the_disk_beside_the_cluster_fails_no_copy(rig):
    """Reading for all at once reads more than the smaller clusters need; that more must not fail them."""
    disk = rig.disk(4 * CLUSTER)
    large = rig.snapshot(disk, cluster_size=4 * CLUSTER, on_cbw_error=S)
    small = rig.snapshot(disk)
    rig.plan(disk).error("pread", errno.EIO, start=3 * CLUSTER)
    disk.pwrite(NEW, 0)
    assert_broken(large, errno.EIO, "source-read", 0, 4 * CLUSTER)
    assert (small.state, small.stats().cbw_failures) == ("armed", 0)
    assert small.pread(CLUSTER, 0) == disk.t0[:CLUSTER]


def test_r15_one_closed_while_a_write_waits_for_it_lets_the_write_pass_the_others(rig):
    disk = rig.disk()
    going = rig.snapshot(disk, cbw_timeout=1000)
    staying = rig.snapshot(disk)
    plan = rig.plan(going)
    plan.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    closer = rig.run(going.close)
    guest.result()
    plan.release()
    closer.result()
    assert_t0(staying, disk.t0)


# ---- R18 ----


def carry_on(rig, disk, snap, own=0, flush=True):
    """Every operation that does not need cluster `own` completes; `flush`: that too."""
    other = (own + 1) % 4 * CLUSTER
    third = (own + 2) % 4 * CLUSTER
    for call in (
        lambda: disk.stats(),
        lambda: snap.stats(),
        lambda: (snap.state, snap.error, repr(snap), repr(disk), disk.snapshots),
        lambda: disk.pread(CLUSTER, other),
        lambda: snap.pread(CLUSTER, other),
        lambda: disk.pwrite(NEW, other),
        lambda: disk.pwrite_zeroes(other, CLUSTER),
        lambda: disk.discard(other, CLUSTER),
        lambda: flush and disk.flush(),
        lambda: list(disk.block_status(other, CLUSTER)),
        lambda: list(snap.block_status(other, CLUSTER)),
        lambda: list(snap.block_status(third, CLUSTER)),
        lambda: setattr(snap, "cbw_timeout", 1000.0),
        lambda: setattr(snap, "cbw_timeout", 0.0),
        lambda: setattr(snap, "on_cbw_error", "break-snapshot"),
        lambda: setattr(snap, "on_cbw_error", "break-guest-write"),
        lambda: snap.open().read(0),
        lambda: snap._map("need"),
        lambda: snap.discard(other, CLUSTER),
        lambda: disk.bitmaps.add("b"),
        lambda: disk.pwrite(NEW, third),
        lambda: disk.bitmaps.remove("b"),
        lambda: rig.snapshot(disk).close(),
        lambda: cbwcore.limits.copy_buffers,
        lambda: disk._advance_clock(0),
    ):
        rig.run(call).result()


def test_r18_a_stalled_target_write_holds_no_lock(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(snap)
    plan.stall("pwrite", end=CLUSTER)
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    carry_on(rig, disk, snap)
    assert not guest.done
    plan.release()
    guest.result()


def test_r18_a_stalled_source_read_holds_no_lock(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pread", end=CLUSTER, times=1)
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    carry_on(rig, disk, snap)
    assert not guest.done
    plan.release()
    guest.result()


@pytest.mark.parametrize("op", ["pread", "seek"])
def test_r18_a_stalled_snapshot_read_or_status_holds_no_lock(rig, op):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall(op, times=1)
    asked = rig.run(lambda: snap.pread(CLUSTER, 0) if op == "pread" else list(snap.block_status(0, CLUSTER)))
    stalled(plan)
    carry_on(rig, disk, snap)
    assert not asked.done
    plan.release()
    asked.result()


def test_r18_a_stalled_target_read_holds_no_lock(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 0)
    plan = rig.plan(snap)
    plan.stall("pread", times=1)
    reader = rig.run(snap.pread, CLUSTER, 0)
    stalled(plan)
    carry_on(rig, disk, snap)
    plan.release()
    assert reader.result() == disk.t0[:CLUSTER]


def test_r18_a_stalled_snapshot_discard_holds_no_lock(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 0)
    plan = rig.plan(snap)
    plan.stall("discard", times=1)
    discarding = rig.run(snap.discard, 0, CLUSTER)
    stalled(plan)
    carry_on(rig, disk, snap)
    rig.run(disk.pwrite, NEW, 0).result()
    plan.release()
    discarding.result()


def test_r18_a_stalled_guest_read_or_flush_holds_no_lock(rig):
    for op, call in (("pread", lambda disk: disk.pread(10, 0)), ("flush", lambda disk: disk.flush())):
        disk = rig.disk()
        snap = rig.snapshot(disk)
        plan = rig.plan(disk)
        plan.stall(op, times=1)
        guest = rig.run(call, disk)
        stalled(plan)
        carry_on(rig, disk, snap, flush=op != "flush")
        assert not guest.done
        plan.release()
        guest.result()


def test_r18_a_stalled_guest_write_holds_up_only_what_must_drain_it(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pwrite", times=1)
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    for call in (
        lambda: disk.pwrite(NEW, 0),
        lambda: disk.pwrite(NEW, CLUSTER),
        lambda: disk.pread(CLUSTER, 0),
        lambda: snap.pread(disk.size, 0),
        lambda: snap.stats(),
        lambda: disk.stats(),
        lambda: snap.discard(2 * CLUSTER, CLUSTER),
        lambda: list(snap.block_status()),
        lambda: setattr(snap, "cbw_timeout", 1000.0),
    ):
        rig.run(call).result()
    assert not guest.done
    plan.release()
    guest.result()


def test_r18_a_discard_of_a_snapshot_waits_for_what_uses_its_clusters(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 0)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    for offset, plan, op, call in (
        (0, on_target, "pread", lambda: snap.pread(10, 0)),
        (CLUSTER, on_disk, "pread", lambda: snap.pread(10, CLUSTER)),
        (2 * CLUSTER, on_target, "pwrite", lambda: disk.pwrite(NEW, 2 * CLUSTER)),
    ):
        on_target.forget_calls()
        plan.stall(op, times=1)
        user = rig.run(call)
        stalled(plan)
        discarding = rig.run(snap.discard, offset, CLUSTER)
        discarding.reaches(
            lambda offset=offset: not snap._map("access")[offset // CLUSTER], "the wait for what is under way"
        )
        assert on_target.calls("discard") == []
        with pytest.raises(cbwcore.SnapshotAccessError):
            snap.pread(10, offset)
        plan.release()
        user.result()
        discarding.result()
