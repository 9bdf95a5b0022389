"""Snapshots: targets, groups, policies and timeouts that change, breaks and who hears of them, figures, teardown."""

import errno
import gc
import logging
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest

import cbwcore
from cbwcore import OnCbwError
from cbwcore._cbwcore import FaultPlan

CLUSTER = 65536
SIZE = 4 * CLUSTER + 1000


@pytest.fixture
def disk(make_disk):
    return make_disk(SIZE)


@pytest.fixture
def t0(disk):
    return disk.pread(SIZE, 0)


@pytest.fixture
def broken(disk, t0, plan):
    """``broken(**options)``: a snapshot whose target fails, and that the guest has broken with a write of 3 bytes."""

    def broken(code=errno.EIO, **options):
        snapshot = disk.snapshot(on_cbw_error="break-snapshot", **options)
        plan.error("pwrite", code)
        snapshot._inject(plan)
        disk.pwrite(b"new", 2 * CLUSTER + 7)
        assert disk.pread(3, 2 * CLUSTER + 7) == b"new"
        return snapshot

    return broken


# ---- the target ----


def test_a_new_target_is_sparse_private_and_stays(disk, t0, place):
    target = place / "target"
    with disk.snapshot(target):
        assert (os.stat(target).st_size, os.stat(target).st_mode & 0o777) == (SIZE, 0o600)
        assert os.stat(target).st_blocks == 0
        disk.pwrite(b"x", CLUSTER)
    with open(target, "rb") as f:
        assert f.read() == bytes(CLUSTER) + t0[CLUSTER : 2 * CLUSTER] + bytes(SIZE - 2 * CLUSTER)


def test_an_unnamed_target_leaves_nothing_behind(disk, place):
    before = os.listdir(place)
    with disk.snapshot() as snapshot:
        disk.pwrite(b"x", 0)
        assert os.listdir(place) == before
        assert snapshot.stats().target_allocated >= CLUSTER
    assert os.listdir(place) == before


def test_a_target_larger_than_the_disk_is_not_written_past_it(disk, t0, make_image):
    target = make_image(SIZE + 10_000, "target.img")
    with open(target, "rb") as f:
        before = f.read()
    with disk.snapshot(target) as snapshot:
        disk.pwrite(b"\xff" * SIZE, 0)
        assert snapshot.pread(SIZE, 0) == t0
    with open(target, "rb") as f:
        assert f.read() == t0 + before[SIZE:]


@pytest.mark.parametrize("size", [0, 1, 511, 4096 + 1, CLUSTER, 5 * CLUSTER + 3])
@pytest.mark.parametrize("old_target", [False, True])
def test_every_size(make_disk, make_image, place, size, old_target):
    disk = make_disk(size)
    t0 = disk.pread(size, 0)
    target = make_image(size + 5, "old.img") if old_target else place / "new"
    with disk.snapshot(target, cluster_size=4096) as one, disk.snapshot() as two:
        disk.pwrite(b"\0" * size, 0)
        for snapshot in (one, two):
            assert snapshot.pread(size, 0) == t0
            assert b"".join(snapshot.pread(e.length, e.offset) for e in snapshot.block_status()) == t0
            snapshot.discard(0, size)
            assert not any(extent.access for extent in snapshot.block_status())
    assert disk.pread(size, 0) == bytes(size)


def test_a_discard_of_a_snapshot_shrinks_inward_and_gives_space_back(disk, t0):
    with disk.snapshot() as snapshot:
        disk.pwrite(b"\xff" * SIZE, 0)
        used, allocated = snapshot.stats().target_bytes, snapshot.stats().target_allocated
        snapshot.discard(1, CLUSTER)
        assert snapshot.pread(SIZE, 0) == t0
        snapshot.discard(1, 3 * CLUSTER - 2)
        assert snapshot.pread(CLUSTER, 0) == t0[:CLUSTER]
        assert snapshot.pread(SIZE - 2 * CLUSTER, 2 * CLUSTER) == t0[2 * CLUSTER :]
        with pytest.raises(cbwcore.SnapshotAccessError) as refused:
            snapshot.pread(1, CLUSTER)
        assert refused.value.errno == errno.EACCES
        assert snapshot.stats().target_bytes == used - CLUSTER
        assert snapshot.stats().target_allocated == allocated - CLUSTER
        snapshot.discard(4 * CLUSTER, SIZE - 4 * CLUSTER)
        with pytest.raises(cbwcore.SnapshotAccessError):
            snapshot.pread(1, SIZE - 1)
    assert disk.pread(SIZE, 0) == b"\xff" * SIZE


# ---- several disks, one T0 ----


def test_a_group_has_its_snapshots_in_order_and_options_for_all(make_disk, place):
    disks = [make_disk(SIZE + i, f"{i}.img") for i in range(3)]
    pairs = [(disk, place / f"target{i}") for i, disk in enumerate(disks)]
    group = cbwcore.snapshot_group(
        iter(pairs), name="g", on_cbw_error="break-snapshot", cbw_timeout=7.5, cluster_size=4096, target_limit=4096
    )
    for i, snapshot in enumerate(group):
        assert snapshot.disk is disks[i]
        assert disks[i].snapshots == (snapshot,)
        assert (snapshot.name, snapshot.on_cbw_error, snapshot.cbw_timeout) == ("g", OnCbwError.BREAK_SNAPSHOT, 7.5)
        assert (snapshot.target, snapshot.cluster_size) == (place / f"target{i}", 4096)
    assert cbwcore.snapshot_group([]) == []


def test_two_snapshots_of_one_disk_in_a_group(disk, t0, place):
    one, two = cbwcore.snapshot_group([(disk, place / "one"), (disk, None)])
    disk.pwrite(b"x", 0)
    assert one.pread(SIZE, 0) == two.pread(SIZE, 0) == t0
    assert disk.snapshots == (one, two)


def test_a_group_sees_every_disk_at_one_moment(make_disk, in_threads):
    """A guest that writes a counter to disk a and then to disk b: at no T0 is b ahead, or a by more than one."""
    a, b = make_disk(CLUSTER, "a.img"), make_disk(CLUSTER, "b.img")
    for disk in (a, b):
        disk.pwrite(bytes(8), 0)
    stop = threading.Event()

    def guest():
        for i in range(10**9):
            for disk in (a, b):
                disk.pwrite(i.to_bytes(8, "big"), 0)
            if stop.is_set():
                return

    def backup():
        try:
            for _ in range(100):
                pair = cbwcore.snapshot_group([(b, None), (a, None)])
                in_b, in_a = (int.from_bytes(snapshot.pread(8, 0), "big") for snapshot in pair)
                assert in_a - in_b in (0, 1)
                for snapshot in pair:
                    snapshot.close()
        finally:
            stop.set()

    in_threads(guest, backup)


BAD_SECONDS = {
    "a target too small": lambda disks, place, small: (disks[1], small),
    "a target in a missing directory": lambda disks, place, small: (disks[1], place / "missing" / "t"),
    "the target of the first": lambda disks, place, small: (disks[1], place / "target0"),
    "the disk of the first": lambda disks, place, small: (disks[1], disks[0].path),
    "itself": lambda disks, place, small: (disks[1], disks[1].path),
}


@pytest.mark.parametrize("bad", BAD_SECONDS.values(), ids=BAD_SECONDS.keys())
def test_a_group_is_taken_whole_or_not_at_all(make_disk, make_image, place, unchanged, bad):
    disks = [make_disk(SIZE, f"{i}.img") for i in range(2)]
    old, small = make_image(SIZE, "old.img"), make_image(10, "small.img")
    disks[0].snapshot()
    pairs = [(disks[0], place / "target0"), (disks[1], old), bad(disks, place, small)]
    with unchanged(*disks), pytest.raises(cbwcore.ConfigError):
        cbwcore.snapshot_group(pairs)
    for disk in disks:
        disk.pwrite(b"goes on", 0)
    cbwcore.snapshot_group(pairs[:2])


def test_a_group_with_a_closed_disk_is_not_taken(make_disk, place, unchanged):
    disks = [make_disk(SIZE, f"{i}.img") for i in range(2)]
    disks[1].close()
    with unchanged(disks[0]), pytest.raises(ValueError, match="closed"):
        cbwcore.snapshot_group([(disk, place / f"target{i}") for i, disk in enumerate(disks)])


# ---- policy and timeout while armed ----


def test_the_policy_may_change_while_armed(disk, t0, plan):
    snapshot = disk.snapshot()
    plan.error("pwrite", errno.EIO)
    snapshot._inject(plan)
    with pytest.raises(cbwcore.CopyBeforeWriteError):
        disk.pwrite(b"new", 0)
    assert disk.pread(SIZE, 0) == snapshot.pread(SIZE, 0) == t0
    assert (snapshot.state, snapshot.error) == ("armed", None)
    snapshot.on_cbw_error = "break-snapshot"
    disk.pwrite(b"new", 0)
    assert disk.pread(3, 0) == b"new"
    assert (snapshot.state, snapshot.on_cbw_error) == ("broken", OnCbwError.BREAK_SNAPSHOT)
    snapshot.on_cbw_error = "break-guest-write"
    disk.pwrite(b"new", CLUSTER)
    with pytest.raises(cbwcore.SnapshotBrokenError):
        snapshot.pread(1, SIZE - 1)


def test_a_policy_set_while_a_write_waits_holds_for_that_write(disk, plan):
    snapshot = disk.snapshot()
    plan.stall("pwrite")
    snapshot._inject(plan)
    outcome = []

    def write():
        try:
            disk.pwrite(b"new", 0)
        except cbwcore.CopyBeforeWriteError as e:
            outcome.append(e.errno)

    snapshot.cbw_timeout = 1000
    writer = threading.Thread(target=write)
    writer.start()
    plan.wait_stalled()
    snapshot.on_cbw_error = "break-snapshot"
    disk._advance_clock(1001)
    writer.join(20)
    assert not writer.is_alive()
    assert outcome == []
    assert snapshot.state == "broken"
    assert disk.pread(3, 0) == b"new"
    assert (snapshot.error.errno, snapshot.error.operation) == (errno.ETIMEDOUT, "timeout")
    plan.release()


def test_the_timeout_may_change_while_armed(disk, t0, plan):
    snapshot = disk.snapshot()
    plan.stall("pwrite")
    snapshot._inject(plan)
    snapshot.cbw_timeout = 30.0
    outcome = []

    def write():
        with pytest.raises(cbwcore.CopyBeforeWriteError) as refused:
            disk.pwrite(b"new", CLUSTER)
        outcome.append(refused.value)

    writer = threading.Thread(target=write)
    writer.start()
    plan.wait_stalled()
    disk._advance_clock(31)
    writer.join(20)
    assert (outcome[0].errno, outcome[0].operation) == (errno.ETIMEDOUT, "timeout")
    assert (outcome[0].offset, outcome[0].length) == (CLUSTER, CLUSTER)
    assert disk.pread(SIZE, 0) == snapshot.pread(SIZE, 0) == t0
    plan.release()
    snapshot.cbw_timeout = 0
    disk.pwrite(b"new", CLUSTER)
    assert disk.pread(3, CLUSTER) == b"new"
    assert snapshot.pread(SIZE, 0) == t0
    assert snapshot.stats().timeouts == 1


# ---- a break, and who hears of it ----


def test_the_first_cause_is_kept_also_after_close(broken, disk):
    before = time.time()
    snapshot = broken(errno.ENOSPC, name="s")
    for _ in range(2):
        cause = snapshot.error
        assert isinstance(cause, cbwcore.CopyBeforeWriteError)
        assert (cause.errno, cause.operation) == (errno.ENOSPC, "target-write")
        assert (cause.offset, cause.length) == (2 * CLUSTER, CLUSTER)
        assert before <= cause.time <= time.time()
        assert os.strerror(errno.ENOSPC) in str(cause)
        disk.pwrite(b"another", 0)
        snapshot.close()
    assert snapshot.error is cause
    assert snapshot.state == "closed"


def test_the_cause_is_kept_where_nobody_asked_before_the_disk_closed(broken, disk):
    snapshot = broken()
    disk.close()
    assert snapshot.error.errno == errno.EIO


def test_a_snapshot_without_a_failure_has_no_error(disk):
    snapshot = disk.snapshot()
    disk.pwrite(b"x", 0)
    assert snapshot.error is None
    snapshot.close()
    assert snapshot.error is None


BROKEN_CALLS = {
    "pread": lambda s: s.pread(1, SIZE - 1),
    "pread nothing": lambda s: s.pread(0, 0),
    "pread_into": lambda s: s.pread_into(bytearray(1), 0),
    "block_status": lambda s: list(s.block_status()),
    "discard": lambda s: s.discard(0, CLUSTER),
    "open": lambda s: s.open(),
}


@pytest.mark.parametrize("call", BROKEN_CALLS.values(), ids=BROKEN_CALLS.keys())
def test_a_broken_snapshot_refuses_with_its_cause(broken, call):
    snapshot = broken()
    with pytest.raises(cbwcore.SnapshotBrokenError) as refused:
        call(snapshot)
    assert refused.value.errno == errno.EACCES
    cause = refused.value.__cause__
    assert (cause.errno, cause.operation, cause.offset) == (errno.EIO, "target-write", 2 * CLUSTER)
    assert os.strerror(errno.EIO) in str(refused.value)


def test_a_broken_snapshot_still_has_its_figures(broken):
    stats = broken().stats()
    assert (stats.cbw_failures, stats.cbw_copies, stats.cbw_bytes) == (1, 0, 0)


def test_on_break_is_called_once_after_the_write(broken, disk):
    heard = []

    def on_break(snapshot):
        heard.append(
            (snapshot, snapshot.state, snapshot.error.errno, disk.pread(3, 2 * CLUSTER + 7), threading.get_ident())
        )

    snapshot = broken(on_break=on_break)
    disk.pwrite(b"more", 0)
    disk.pwrite(b"more", SIZE - 4)
    snapshot.close()
    assert heard == [(snapshot, "broken", errno.EIO, b"new", threading.get_ident())]


def test_on_break_is_called_once_when_many_writers_meet_the_break(disk, plan, in_threads):
    heard = []
    snapshot = disk.snapshot(on_cbw_error="break-snapshot", cluster_size=4096, on_break=heard.append)
    target_fails = FaultPlan()
    target_fails.error("pwrite")
    snapshot._inject(target_fails)
    plan.stall("pread")
    disk._inject(plan)
    writes = [lambda i=i: disk.pwrite(b"x", i * 4096) for i in range(8)]
    in_threads(*writes, lambda: (plan.wait_stalled(8), plan.release()))
    disk._inject(None)
    assert heard == [snapshot]
    assert all(disk.pread(1, i * 4096) == b"x" for i in range(8))


def test_on_break_is_not_called_without_a_break(disk, plan):
    heard = []
    with disk.snapshot(on_break=heard.append) as snapshot:
        plan.error("pwrite", times=1)
        snapshot._inject(plan)
        with pytest.raises(cbwcore.CopyBeforeWriteError):
            disk.pwrite(b"x", 0)
        disk.pwrite(b"x", 0)
        snapshot._inject(None)
    assert heard == []


def test_what_on_break_raises_is_logged_and_not_raised(broken, caplog):
    def on_break(snapshot):
        raise KeyError("careless")

    with caplog.at_level(logging.ERROR, logger="cbwcore"):
        snapshot = broken(on_break=on_break, name="fleece")
    assert snapshot.state == "broken"
    assert "careless" in caplog.text
    assert "fleece" in caplog.text
    assert os.strerror(errno.EIO) in caplog.text, "the cause is in the log, too"


ON_BREAK_USES = {
    "close the snapshot": lambda s: s.close(),
    "close the disk": lambda s: s.disk.close(),
    "take another": lambda s: s.disk.snapshot(),
    "write the disk": lambda s: s.disk.pwrite(b"\xee", 0),
    "read the disk": lambda s: s.disk.pread(SIZE, 0),
}


@pytest.mark.parametrize("use", ON_BREAK_USES.values(), ids=ON_BREAK_USES.keys())
def test_on_break_may_use_the_disk(disk, t0, plan, in_threads, use):
    """No lock is held around the callback."""
    errors = []

    def on_break(snapshot):
        try:
            use(snapshot)
        except BaseException as e:
            errors.append(e)

    snapshot = disk.snapshot(on_cbw_error="break-snapshot", on_break=on_break)
    plan.error("pwrite")
    snapshot._inject(plan)
    in_threads(lambda: disk.pwrite(b"new", CLUSTER))
    assert errors == []
    assert snapshot.error.errno == errno.EIO


# ---- figures ----


def test_stats_of_a_quiet_snapshot_are_zero(disk):
    disk.pwrite(b"before T0", 0)
    with disk.snapshot() as snapshot:
        stats = snapshot.stats()
        counts = (stats.guest_writes, stats.cbw_copies, stats.cbw_bytes, stats.cbw_zero_bytes, stats.cbw_failures)
        assert counts == (0, 0, 0, 0, 0)
        assert (stats.waits, stats.wait_seconds, stats.wait_histogram, stats.target_bytes) == (0, 0, (), 0)
        assert 0 < stats.arm_pause < 5


def test_stats_count_copies_bytes_and_waits(make_disk):
    content = os.urandom(2 * CLUSTER) + bytes(CLUSTER) + os.urandom(1000)
    disk = make_disk(content)
    with disk.snapshot() as snapshot:
        disk.pwrite(b"x", 10)
        disk.pwrite(b"x", 20)
        disk.pwrite_zeroes(CLUSTER + 1, CLUSTER)
        disk.discard(3 * CLUSTER, 1000)
        stats = snapshot.stats()
        assert stats.guest_writes == disk.stats().guest_writes == 4
        assert stats.cbw_copies == 3
        assert stats.cbw_bytes == 3 * CLUSTER + 1000
        assert stats.cbw_zero_bytes == CLUSTER
        assert stats.target_bytes == 2 * CLUSTER + 1000
        assert stats.target_bytes <= stats.target_allocated <= stats.target_bytes + 4096
        assert stats.waits == 3 == sum(count for _, count in stats.wait_histogram)
        assert 0 < stats.longest_wait <= stats.wait_seconds
        bounds = [bound for bound, _ in stats.wait_histogram]
        assert bounds == sorted(bounds)
        assert bounds[-1] / 2 <= stats.longest_wait < bounds[-1]
        assert (stats.cbw_failures, stats.timeouts, stats.copy_waits, stats.frozen_waits) == (0, 0, 0, 0)
        assert snapshot.pread(disk.size, 0) == content


def test_stats_count_waits_for_another_and_for_readers(disk, t0, plan):
    snapshot = disk.snapshot()
    plan.stall("pread", times=1)
    disk._inject(plan)
    reader = threading.Thread(target=snapshot.pread, args=(10, 0))
    reader.start()
    plan.wait_stalled()
    writer = threading.Thread(target=disk.pwrite, args=(b"new", 0))
    writer.start()
    deadline = time.monotonic() + 20
    while not snapshot.stats().frozen_waits and time.monotonic() < deadline:
        threading.Event().wait(0.001)
    for _ in range(20):  # looking wakes the writer, which must not count as waiting once more
        snapshot.stats()
        threading.Event().wait(0.001)
    plan.release()
    reader.join()
    writer.join()
    disk._inject(None)
    assert snapshot.stats().frozen_waits == 1
    assert disk.pread(3, 0) == b"new"
    assert snapshot.pread(SIZE, 0) == t0


# ---- closing, and going away ----


def test_snapshots_close_in_any_order(disk, t0):
    snapshots = [disk.snapshot() for _ in range(4)]
    for i in (2, 0, 3, 1):
        disk.pwrite(bytes([i]) * 10, i * CLUSTER)
        assert all(s.pread(SIZE, 0) == t0 for s in disk.snapshots)
        snapshots[i].close()
        assert snapshots[i] not in disk.snapshots
    assert disk.snapshots == ()


def test_closing_lets_a_waiting_guest_write_go_on(disk, plan):
    """The write waits for its copy only as long as there is a snapshot to copy for."""
    snapshot = disk.snapshot(cbw_timeout=1000)
    plan.stall("pwrite")
    snapshot._inject(plan)
    writer = threading.Thread(target=disk.pwrite, args=(b"new", 0))
    writer.start()
    plan.wait_stalled()
    closer = threading.Thread(target=snapshot.close)
    closer.start()
    writer.join(20)
    assert not writer.is_alive()
    assert disk.pread(3, 0) == b"new"
    assert closer.is_alive(), "close waits for the copy that is under way (R8)"
    plan.release()
    closer.join(20)
    assert not closer.is_alive()


def test_closing_from_many_threads_at_once(disk, in_threads):
    snapshot = disk.snapshot(cbw_timeout=5)
    disk.pwrite(b"x", 0)
    in_threads(*[snapshot.close] * 4, *[disk.close] * 4)
    assert disk.closed
    assert snapshot.state == "closed"


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # a recorded warning would keep the disk
def test_a_forgotten_disk_lets_go_of_everything(make_image, unchanged, place):
    path = make_image(SIZE)
    with unchanged():
        disk = cbwcore.Disk(path)
        disk.bitmaps.add("b")
        disk.snapshot(cbw_timeout=5)
        gone = weakref.finalize(disk, lambda: None)
        del disk
        gc.collect()
        assert not gone.alive
    cbwcore.Disk(path).close()


def test_a_forgotten_disk_is_warned_of(make_image):
    disk = cbwcore.Disk(make_image(SIZE))
    del disk
    with pytest.warns(ResourceWarning, match=r"unclosed.*disk\.img"):
        gc.collect()


def test_a_snapshot_keeps_its_disk(make_image):
    snapshot = cbwcore.Disk(make_image(SIZE)).snapshot()
    gc.collect()
    snapshot.disk.pwrite(b"x", 0)
    assert len(snapshot.pread(SIZE, 0)) == SIZE
    snapshot.disk.close()


LEFT_OPEN = {
    "all": "",
    "a file": "f = s.open(); f.read(10)",
    "an iterator": "i = iter(s.block_status()); next(i)",
    "views of a bitmap": "v = d.bitmaps['b'].numpy(); w = d.bitmaps['b'].bitarray()",
    "a cycle": "d.me = d; s.me = s; s.f = s.open(); del d, s; gc.collect()",
    "a cycle for the end": "gc.disable(); d.me = d; s.me = s; del d, s",
    "a broken snapshot": """
p = FaultPlan(); p.error('pwrite'); s._inject(p)
d.pwrite(b'y', 100000); assert s.state == 'broken'""",
    "a late copy": """
p = FaultPlan(); p.delay('pwrite', 0.2); s._inject(p); s.cbw_timeout = 0.01
d.pwrite(b'y', 100000); assert s.state == 'broken'""",
    "a busy guest": """
def guest():
    while True: d.pwrite(b'y', 100000)
threading.Thread(target=guest, daemon=True).start()""",
    "a stalled guest": """
p = FaultPlan(); p.stall('pwrite'); d._inject(p)
threading.Thread(target=d.pwrite, args=(b'y', 0), daemon=True).start(); p.wait_stalled()""",
    "a closed disk": "d.close()",
    "an atexit handler": "import atexit; atexit.register(d.close); atexit.register(s.close)",
    "a module global": "import types; m = types.ModuleType('m'); sys.modules['m'] = m; m.d, m.s = d, s",
}


@pytest.mark.parametrize("left", LEFT_OPEN.values(), ids=LEFT_OPEN.keys())
def test_what_is_left_open_at_exit_is_silent(make_image, run_python, left):
    code = f"""
import gc, logging, sys, threading
logging.disable()
import cbwcore
from cbwcore._cbwcore import FaultPlan
d = cbwcore.Disk(sys.argv[1])
b = d.bitmaps.add("b")
s = d.snapshot(on_cbw_error="break-snapshot", cbw_timeout=30)
d.pwrite(b"x", 0)
{left}
"""
    done = run_python(code, make_image(SIZE))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_is_silent_and_starts_nothing():
    code = "import threading, cbwcore; assert threading.active_count() == 1"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
