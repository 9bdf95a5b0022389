"""Closing and taking at the same time, from several threads, from callbacks, and in the child of a fork."""

import os
import sys
import threading

import pytest

import cbwcore
from cbwcore._cbwcore import FaultPlan

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").write_bytes(os.urandom(SIZE))
    with cbwcore.Disk(tmp_path / "disk") as disk:
        yield disk


@pytest.fixture
def slow_gil():
    """A thread that wants the GIL back waits for it long."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1.0)
    yield
    sys.setswitchinterval(before)


def started(call, *args):
    thread = threading.Thread(target=call, args=args, daemon=True)
    thread.start()
    return thread


def ended(thread):
    thread.join(20)
    assert not thread.is_alive()


def test_a_snapshot_may_be_closed_before_the_call_that_took_it_returns(disk, slow_gil):
    plan = FaultPlan()
    disk._inject(plan)
    plan.stall("pwrite", times=1)
    guest = started(disk.pwrite, b"x", 0)
    plan.wait_stalled()
    taken = []
    taking = started(lambda: taken.append(disk.snapshot()))
    plan.release()
    while not disk.snapshots:
        pass  # without giving up the GIL, which disk.snapshot() needs to return
    disk.snapshots[0].close()
    ended(guest)
    ended(taking)
    assert taken[0].state == "closed"
    disk.pwrite(bytes(SIZE), 0)  # of what was freed, nothing is used
    assert disk.pread(SIZE, 0) == bytes(SIZE)


def test_the_second_close_of_a_disk_waits_for_the_first(disk):
    plan = FaultPlan()
    disk._inject(plan)
    plan.stall("pread", times=1)
    reader = started(disk.pread, 1, 0)
    plan.wait_stalled()
    first, second = started(disk.close), started(disk.close)
    second.join(0.1)
    assert second.is_alive()
    plan.release()
    for thread in (reader, first, second):
        ended(thread)
    cbwcore.Disk(disk.path).close()  # the lock is given up


def test_on_break_from_disk_close_cannot_take_a_snapshot_of_it(disk):
    got = []

    def on_break(broken):
        try:
            disk.snapshot()
        except ValueError as e:
            got.append(e)

    snap = disk.snapshot(target_limit=0, on_cbw_error="break-snapshot", on_break=on_break)
    snap._tell_break = lambda: None  # the guest's own telling is late
    disk.pwrite(b"x", 0)
    del snap._tell_break
    disk.close()
    assert "closed" in str(got[0])


def test_on_break_from_disk_close_may_wait_for_a_thread_that_uses_the_disk(disk):
    def on_break(broken):
        with pytest.raises(ValueError, match="closed"):
            disk.bitmaps.add("late")
        ended(started(lambda: disk.stats()))

    snap = disk.snapshot(target_limit=0, on_cbw_error="break-snapshot", on_break=on_break)
    snap._tell_break = lambda: None
    disk.pwrite(b"x", 0)
    del snap._tell_break
    ended(started(disk.close))


def test_merging_a_bitmap_that_another_thread_clears_is_safe():
    into, other = cbwcore.DirtyBitmap(1 << 30), cbwcore.DirtyBitmap(1 << 30)
    stop = threading.Event()

    def flicker():
        while not stop.is_set():
            other.set_range(0, 1)
            other.clear()

    threads = [started(flicker) for _ in range(2)]
    for _ in range(20_000):
        into.merge(other)
    stop.set()
    for thread in threads:
        ended(thread)
    assert set(into.ranges()) <= {(0, 65536)}


def test_extents_by_a_bitmap_that_changes_cover_the_range_once(disk):
    bitmap = cbwcore.DirtyBitmap(SIZE, 4096)
    stop = threading.Event()

    def flicker():
        while not stop.is_set():
            bitmap.set_range(0, SIZE)
            bitmap.clear()

    thread = started(flicker)
    for _ in range(300):
        at = 1000
        for extent in disk.block_status(1000, SIZE - 1000, bitmap=bitmap):
            assert extent.offset == at
            assert extent.length > 0
            at += extent.length
        assert at == SIZE
    stop.set()
    ended(thread)


def test_a_child_that_lives_on_does_not_keep_a_block_device(resources, needs):
    with needs():
        image = resources.directory() + "/image"
        with open(image, "wb") as f:
            f.truncate(SIZE)
        device = resources.loop(image)
    disk = cbwcore.Disk(device)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"r")
        os.read(done[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        disk.close()
        cbwcore.Disk(device).close()
    finally:
        os.write(done[1], b"d")
        os.waitpid(child, 0)
        for fd in (*ready, *done):
            os.close(fd)


def test_an_unnamed_target_is_beside_the_disk_wherever_the_process_is(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "disk").write_bytes(bytes(SIZE))
    monkeypatch.chdir(tmp_path / "images")
    with cbwcore.Disk("disk") as disk:
        monkeypatch.chdir("/")
        with disk.snapshot():
            links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if is_open(fd)]
    assert [link for link in links if link.startswith(f"{tmp_path}/images/#")]


def is_open(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_r17_a_snapshot_that_the_budget_has_no_room_for_is_refused(disk, tmp_path):
    before = cbwcore.limits.copy_buffers
    try:
        cbwcore.limits.copy_buffers = 2 << 20
        snap = disk.snapshot()
        plan = FaultPlan()
        snap._inject(plan)
        plan.stall("pwrite")
        guest = started(disk.pwrite, bytes(SIZE // 2), 0)
        plan.wait_stalled()
        with pytest.raises(cbwcore.ConfigError, match=str(2 << 20)):
            disk.snapshot(tmp_path / "target", cluster_size=2 << 20)
        assert not (tmp_path / "target").exists()
        plan.release()
        ended(guest)
        snap.close()
    finally:
        cbwcore.limits.copy_buffers = before
