"""cbw_timeout against a stopped target: none wraps, none fires early; it counts all that a guest write waits for."""

import errno
import math
import time

import pytest
from engine_support import (
    CLUSTER,
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


def stopped(rig, timeout, policy=G, clusters=4):
    """A disk whose snapshot's target takes nothing."""
    disk = rig.disk(clusters * CLUSTER)
    snap = rig.snapshot(disk, cbw_timeout=timeout, on_cbw_error=policy)
    plan = rig.plan(snap)
    plan.stall("pwrite")
    return disk, snap, plan


def goes_on_waiting(guest, disk):
    """After the clock was moved: give a timeout that fires wrongly the chance to."""
    guest.join(0.03)
    assert not guest.done, f"it fired early: {guest.error}"


# ---- lengths ----


@pytest.mark.parametrize("policy", [G, S])
def test_a_short_timeout_in_real_time(rig, policy):
    disk, snap, plan = stopped(rig, 0.05, policy)
    started = time.monotonic()
    guest = rig.run(disk.pwrite, NEW, 0)
    guest.join(10)
    waited = time.monotonic() - started
    assert 0.05 <= waited < 5
    if policy == G:
        assert_refused(guest.result, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
        assert file_bytes(disk.path) == disk.t0
        assert_t0(snap, disk.t0)
    else:
        guest.result()
        assert disk.pread(4096, 0) == NEW
        assert_broken(snap, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    stats = snap.stats()
    assert (stats.timeouts, stats.cbw_copies, stats.cbw_failures) == (1, 0, 0)
    assert 0.05 <= stats.longest_wait <= waited
    plan.release()


@pytest.mark.parametrize("policy", [G, S])
@pytest.mark.parametrize("timeout", [4.2, 4.29, 4.3, 5, 45, 86400, 1e6])
def test_a_timeout_fires_when_its_time_is_up_and_not_before(rig, policy, timeout):
    """QEMU 7.2 wraps at 4.29 s: there 5 s fires after 0.7 s."""
    disk, snap, plan = stopped(rig, timeout, policy)
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    wrapped = timeout % 4.294967296  # where a 32-bit count of ns would be up
    for step in (wrapped, timeout - wrapped - 1) if wrapped < timeout - 1 else (timeout - 1,):
        disk._advance_clock(step)
        goes_on_waiting(guest, disk)
    assert (snap.state, snap.stats().timeouts) == ("armed", 0)
    disk._advance_clock(1)
    if policy == G:
        assert_refused(guest.result, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
        assert snap.state == "armed"
    else:
        guest.result()
        assert_broken(snap, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    assert snap.stats().timeouts == 1
    assert snap.stats().longest_wait == pytest.approx(timeout, abs=10)


@pytest.mark.parametrize("timeout", [2**31 / 1e3, 2**32 / 1e9, 2**63 / 1e9, 2**64 / 1e9, 1e10, 1e300, math.inf])
def test_a_huge_timeout_never_fires_early(rig, timeout):
    disk, snap, plan = stopped(rig, timeout)
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    disk._advance_clock(min(timeout, 1e9) * 0.75)
    goes_on_waiting(guest, disk)
    assert snap.cbw_timeout == timeout
    plan.release()
    guest.result()
    assert snap.stats().timeouts == 0
    assert_t0(snap, disk.t0)


def test_no_timeout_waits_for_as_long_as_it_takes(rig):
    disk, snap, plan = stopped(rig, 0)
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    disk._advance_clock(1e9)
    goes_on_waiting(guest, disk)
    plan.release()
    guest.result()
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("timeout", [1e-12, 1e-9])
def test_the_least_timeout_is_not_taken_for_none(rig, timeout):
    disk, snap, plan = stopped(rig, timeout)
    assert_refused(lambda: disk.pwrite(NEW, 0), errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    plan.release()
    until(lambda: snap._map("done")[0], "the late copy counts")
    snap.cbw_timeout = 0
    disk.pwrite(NEW, 0)
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("bad", [-1, -1e-9, -math.inf, math.nan, "5", None])
def test_what_is_no_timeout_is_refused_and_the_old_one_stays(rig, bad):
    disk = rig.disk()
    with pytest.raises(cbwcore.ConfigError, match="cbw_timeout"):
        rig.snapshot(disk, cbw_timeout=bad)
    assert disk.snapshots == ()
    snap = rig.snapshot(disk, cbw_timeout=7)
    with pytest.raises(cbwcore.ConfigError, match="cbw_timeout"):
        snap.cbw_timeout = bad
    assert snap.cbw_timeout == 7


# ---- what it covers ----


def test_it_covers_the_sum_over_the_runs_of_a_large_write(rig):
    """Three runs of 1 MiB, each slow but within the time; together they are not."""
    disk = rig.disk(48 * CLUSTER)
    snap = rig.snapshot(disk, cbw_timeout=1000)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_target.stall("pwrite", end=1 << 20)
    on_disk.stall("pread", start=1 << 20, end=2 << 20)
    guest = rig.run(disk.pwrite, b"L" * disk.size, 0)
    stalled(on_target)
    disk._advance_clock(400)
    goes_on_waiting(guest, disk)
    on_target.release()
    stalled(on_disk)
    on_target.stall("pwrite", start=2 << 20)
    disk._advance_clock(400)
    goes_on_waiting(guest, disk)
    on_disk.release()
    stalled(on_target)
    goes_on_waiting(guest, disk)
    disk._advance_clock(300)
    assert_refused(guest.result, errno.ETIMEDOUT, "timeout", 2 << 20, 1 << 20)
    assert ranges(on_disk, "pwrite") == []
    assert snap.stats().timeouts == 1
    assert_t0(snap, disk.t0)
    on_target.release()
    disk.pwrite(b"L" * disk.size, 0)
    assert_t0(snap, disk.t0)


def test_it_covers_the_sum_of_a_copy_and_a_frozen_read(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, cbw_timeout=1000)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_disk.stall("pread", times=1)
    reader = rig.run(snap.pread, CLUSTER, 0)
    stalled(on_disk)
    on_target.stall("pwrite")
    guest = rig.run(disk.pwrite, NEW, 0)
    stalled(on_target)
    disk._advance_clock(600)
    goes_on_waiting(guest, disk)
    on_target.release()
    guest.reaches(lambda: snap.stats().frozen_waits >= 1, "the wait for a frozen read")
    disk._advance_clock(500)
    assert_refused(guest.result, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    on_disk.release()
    assert reader.result() == disk.t0[:CLUSTER]
    disk.pwrite(NEW, 0)
    assert_t0(snap, disk.t0)


def test_it_covers_a_wait_for_a_free_copy(rig):
    before = cbwcore.limits.copies
    cbwcore.limits.copies = 2
    try:
        disk, snap, plan = stopped(rig, 0)
    finally:
        cbwcore.limits.copies = before
    busy = [rig.run(disk.pwrite, NEW, i * CLUSTER) for i in range(2)]
    stalled(plan, 2)
    snap.cbw_timeout = 5
    guest = rig.run(disk.pwrite, NEW, 3 * CLUSTER)
    guest.reaches(lambda: snap.stats().copy_waits >= 1, "the wait for a free copy")
    assert plan.stalled == 2
    disk._advance_clock(6)
    with pytest.raises(cbwcore.CopyBeforeWriteError) as e:
        guest.result()
    assert (e.value.errno, e.value.operation) == (errno.ETIMEDOUT, "timeout")
    plan.release()
    for other in busy:
        other.result()
    disk.pwrite(NEW, 3 * CLUSTER)
    assert_t0(snap, disk.t0)


def test_a_failure_in_time_is_that_failure_and_no_timeout(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk, cbw_timeout=5)
    rig.plan(snap).error("pwrite", errno.EDQUOT, times=1)
    assert_refused(lambda: disk.pwrite(NEW, 0), errno.EDQUOT, "target-write", 0, CLUSTER)
    assert (snap.stats().timeouts, snap.stats().cbw_failures) == (0, 1)
    disk.pwrite(NEW, 0)
    assert_t0(snap, disk.t0)


def test_each_guest_write_has_a_time_of_its_own(rig):
    disk, snap, plan = stopped(rig, 10)
    first = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    disk._advance_clock(6)
    second = rig.run(disk.pwrite, NEW, CLUSTER)
    stalled(plan, 2)
    disk._advance_clock(5)
    assert_refused(first.result, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    goes_on_waiting(second, disk)
    disk._advance_clock(6)
    assert_refused(second.result, errno.ETIMEDOUT, "timeout", CLUSTER, CLUSTER)
    assert snap.stats().timeouts == 2


@pytest.mark.parametrize("policy", [G, S])
def test_a_timeout_over_a_cluster_that_others_wait_for_frees_each_in_its_own_time(rig, policy):
    disk, snap, plan = stopped(rig, 10, policy)
    first = rig.run(disk.pwrite, b"1" * 10, 0)
    stalled(plan)
    disk._advance_clock(6)
    second = rig.run(disk.pwrite, b"2" * 10, 10)
    second.reaches(lambda: snap.stats().copy_waits >= 1, "the wait for another's copy")
    disk._advance_clock(5)
    if policy == S:  # the first one's timeout broke the snapshot: nobody waits any more
        first.result()
        second.result()
        assert disk.pread(20, 0) == b"1" * 10 + b"2" * 10
        return
    assert_refused(first.result, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    goes_on_waiting(second, disk)
    plan.release()
    second.result()
    assert disk.pread(20, 0) == disk.t0[:10] + b"2" * 10
    assert_t0(snap, disk.t0)


# ---- changed while armed ----


def test_a_timeout_set_while_armed_holds_for_the_writes_that_come(rig):
    disk, snap, plan = stopped(rig, 0)
    before = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    snap.cbw_timeout = 5
    after = rig.run(disk.pwrite, NEW, CLUSTER)
    stalled(plan, 2)
    disk._advance_clock(6)
    assert_refused(after.result, errno.ETIMEDOUT, "timeout", CLUSTER, CLUSTER)
    goes_on_waiting(before, disk)
    snap.cbw_timeout = 0
    again = rig.run(disk.pwrite, NEW, 2 * CLUSTER)
    stalled(plan, 3)
    disk._advance_clock(1000)
    goes_on_waiting(again, disk)
    plan.release()
    before.result()
    again.result()
    assert_t0(snap, disk.t0)


def test_policy_and_timeout_changed_under_load(rig):
    disk = rig.disk(32 * CLUSTER)
    snap = rig.snapshot(disk)
    guests = [rig.run(lambda i=i: [disk.pwrite(NEW, c * CLUSTER + i * 4096) for c in range(32)]) for i in range(4)]
    for i in range(50):
        snap.cbw_timeout = 1000.0 if i % 2 else 0.0
        snap.on_cbw_error = S if i % 3 else G
    for guest in guests:
        guest.result()
    assert snap.state == "armed"
    assert_t0(snap, disk.t0)


# ---- ends ----


@pytest.mark.parametrize("policy", [G, S])
def test_close_waits_for_late_copies_and_frees_waiting_guests(rig, policy):
    disk, snap, plan = stopped(rig, 10, policy)
    target = snap.target
    late = rig.run(disk.pwrite, b"1" * 10, 0)
    stalled(plan)
    disk._advance_clock(11)
    late.join(20)
    waiting = None
    if policy == G:
        waiting = rig.run(disk.pwrite, b"2" * 10, 10)
        waiting.reaches(lambda: snap.stats().copy_waits >= 1, "the wait for the late copy")
    closer = rig.run(snap.close)
    closer.reaches(lambda: snap.state == "closed", "the wait for the late copy")
    if waiting is not None:
        waiting.result()
        assert disk.pread(10, 10) == b"2" * 10
    assert not closer.done
    assert plan.stalled == 1
    plan.release()
    closer.result()
    assert file_bytes(target, 0, CLUSTER) == disk.t0[:CLUSTER]
    with pytest.raises(ValueError, match="closed"):
        snap.pread(1, 0)
    disk.pwrite(NEW, 2 * CLUSTER)


def test_close_frees_a_guest_that_waits_for_a_frozen_read(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    reader = rig.run(snap.pread, CLUSTER, 0)
    stalled(plan)
    guest = rig.run(disk.pwrite, NEW, 0)
    guest.reaches(lambda: snap.stats().frozen_waits >= 1, "the wait for a frozen read")
    closer = rig.run(snap.close)
    guest.result()
    assert not reader.done
    plan.release()
    with pytest.raises(ValueError, match="closed"):  # never newer data
        reader.result()
    closer.result()


def test_closing_the_disk_waits_for_late_copies_too(rig):
    disk, snap, plan = stopped(rig, 10)
    late = rig.run(disk.pwrite, NEW, 0)
    stalled(plan)
    disk._advance_clock(11)
    assert_refused(late.result, errno.ETIMEDOUT, "timeout", 0, CLUSTER)
    closer = rig.run(disk.close)
    closer.reaches(lambda: snap.state == "closed", "the wait for the late copy")
    assert not closer.done
    plan.release()
    closer.result()
    with pytest.raises(ValueError, match="closed"):
        disk.pread(1, 0)


def test_many_late_copies_all_end(rig):
    disk, snap, plan = stopped(rig, 10, clusters=100)
    guests = [rig.run(disk.pwrite, NEW, i * CLUSTER) for i in range(64)]
    stalled(plan, 64)
    disk._advance_clock(11)
    for i, guest in enumerate(guests):
        assert_refused(guest.result, errno.ETIMEDOUT, "timeout", i * CLUSTER, CLUSTER)
    assert snap.stats().timeouts == 64
    plan.release()
    until(lambda: snap._map("done").count(True) == 64, "all late copies count")
    plan.stall("pwrite")
    more = [rig.run(disk.pwrite, NEW, i * CLUSTER) for i in range(64, 100)]
    stalled(plan, 36)
    plan.release()
    for guest in more:
        guest.result()
    assert_t0(snap, disk.t0)
