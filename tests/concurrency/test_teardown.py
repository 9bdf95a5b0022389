"""Closing in the middle of everything: nothing hangs or stays open, and nobody gets what is neither T0 nor an error."""

# ruff: noqa: PT017  (what is looked at in threads is one outcome of several)

from __future__ import annotations

import contextlib
import errno
import faulthandler
import gc
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_support import targets_behind

import cbwcore
from cbwcore._cbwcore import FaultPlan, copy_buffers

PLACE = os.environ.get("CBWCORE_TEST_DIR") or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
SEED = int(os.environ.get("CBWCORE_SEED") or random.SystemRandom().randrange(2**32))
SLOWER = 4 if os.environ.get("CBWCORE_SANITIZER") else 1  # under a sanitizer: fewer rounds
SIZE = 256 * 1024 + 100
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def seed_and_stacks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The seed is printed; a hang shows every stack."""
    caplog.set_level("CRITICAL")  # breaks are logged
    print(f"replay with CBWCORE_SEED={SEED}")
    faulthandler.dump_traceback_later(240, file=sys.__stderr__)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(switch)
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def home() -> Iterator[Path]:
    path = tempfile.mkdtemp(prefix="cbw-teardown-", dir=PLACE)
    opened[:] = []
    yield Path(path)
    closer = threading.Thread(target=lambda: [disk.close() for disk in opened], daemon=True)
    closer.start()
    closer.join(20)  # after a deadlock this one hangs too; the test has failed then, and the others go on
    shutil.rmtree(path)


def image(home: Path, name: str = "disk", size: int = SIZE) -> tuple[str, bytes]:
    content = random.Random(name).randbytes(size)
    (home / name).write_bytes(content)
    return str(home / name), content


opened: list[cbwcore.Disk] = []


def open_disk(home: Path, name: str = "disk", size: int = SIZE, **options: object) -> tuple[cbwcore.Disk, bytes]:
    """A disk that is closed at the end of the test, also where that fails."""
    path, content = image(home, name, size)
    opened.append(cbwcore.Disk(path, **options))
    return opened[-1], content


class Crew:
    """Threads that must end: run(body) starts one, done() waits for all, or shows every stack and fails."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.stop = threading.Event()

    def run(self, body: Callable[[], object]) -> threading.Thread:
        def main() -> None:
            try:
                body()
            except BaseException as e:
                self.errors.append(e)
                self.stop.set()

        t = threading.Thread(target=main, daemon=True)
        self.threads.append(t)
        t.start()
        return t

    def repeat(self, body: Callable[[random.Random], object]) -> threading.Thread:
        r = random.Random(f"{SEED}/{len(self.threads)}")

        def loop() -> None:
            while not self.stop.is_set():
                body(r)

        return self.run(loop)

    def done(self, limit: float = 60) -> None:
        end = time.monotonic() + limit
        for t in self.threads:
            t.join(max(end - time.monotonic(), 0))
            if t.is_alive():
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                pytest.fail("a thread hangs", pytrace=False)
        if self.errors:
            raise self.errors[0]


def until(condition: Callable[[], object], limit: float = 30) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.0005)


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def mappings() -> int:
    with open("/proc/self/maps") as f:
        return sum(1 for _ in f)


def kept() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), tasks()


# ---- close while others are at work ----


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_disk_closed_under_writers_and_readers(home: Path, direct: bool) -> None:
    """Every request either ends as if alone or says that the disk, or the snapshot, is closed."""
    r = random.Random(SEED)
    for round_ in range(24 // SLOWER):
        disk, t0 = open_disk(home, f"disk{round_}", direct=direct)
        snap = disk.snapshot(cluster_size=4096, cbw_timeout=r.choice([0, 30]))
        crew = Crew()
        began = [0]

        def guest(q: random.Random, disk: cbwcore.Disk = disk, crew: Crew = crew, began: list[int] = began) -> None:
            try:
                q.choice(
                    [
                        lambda: disk.pwrite(b"w" * q.randrange(9000), q.randrange(SIZE - 9000)),
                        lambda: disk.pread(q.randrange(9000), q.randrange(SIZE - 9000)),
                        lambda: disk.pwrite_zeroes(q.randrange(SIZE - 9000), 5000),
                        lambda: disk.discard(q.randrange(SIZE - 9000), 9000),
                        disk.flush,
                        lambda: list(disk.block_status()),
                    ]
                )()
                began[0] += 1
            except ValueError as e:
                assert "closed" in str(e)
                crew.stop.set()

        def reader(q: random.Random, snap: cbwcore.Snapshot = snap, t0: bytes = t0, crew: Crew = crew) -> None:
            off = q.randrange(SIZE)
            n = min(q.randrange(20_000), SIZE - off)
            try:
                assert snap.pread(n, off) == t0[off : off + n]
                list(snap.block_status(off, n))
                snap.stats()
            except ValueError as e:
                assert "closed" in str(e)
                crew.stop.set()

        for _ in range(3):
            crew.repeat(guest)
            crew.repeat(reader)
        until(lambda began=began, crew=crew: began[0] > 20 or crew.errors)
        time.sleep(r.random() * 0.01)
        if r.random() < 0.5:
            snap.close()
        disk.close()
        crew.done()
        assert snap.state == "closed"
        assert not disk.snapshots


def test_snapshot_closed_while_guests_wait_for_its_target(home: Path) -> None:
    """Closing lets the waiting guest writes go on; the late copy is waited for (R8)."""
    for timeout in (0.0, 60.0):
        disk, _ = open_disk(home, f"disk{timeout}")
        plan = FaultPlan()
        with targets_behind(plan):
            snap = disk.snapshot(cluster_size=65536, cbw_timeout=timeout)
        plan.stall("pwrite")
        crew = Crew()
        wrote = []
        for i in range(4):
            crew.run(lambda i=i, d=disk, wrote=wrote: (d.pwrite(bytes([i]) * 100, i * 1000), wrote.append(i)))
        until(lambda plan=plan: plan.stalled)
        until(lambda snap=snap: snap.stats().copy_waits >= 3)
        closer = crew.run(snap.close)
        if timeout:  # the copy is a helper's: all four go on at once, while it is still stalled
            until(lambda wrote=wrote: len(wrote) == 4)
            assert plan.stalled
        else:  # one of the four is inside its own copy
            until(lambda wrote=wrote: len(wrote) == 3)
        closer.join(0.05)
        assert closer.is_alive(), "close returned while a copy was under way"
        plan.release()
        crew.done()
        for i in range(4):
            assert disk.pread(100, i * 1000) == bytes([i]) * 100
        disk.close()


def test_disk_closed_while_a_guest_waits_for_a_target(home: Path) -> None:
    disk, _ = open_disk(home)
    plan = FaultPlan()
    with targets_behind(plan):
        disk.snapshot(cbw_timeout=60)
    plan.stall("pwrite")
    crew = Crew()
    outcome: list[object] = []

    def write() -> None:
        try:
            outcome.append(disk.pwrite(b"x", 0))
        except ValueError as e:
            outcome.append(e)

    crew.run(write)
    until(lambda: plan.stalled)
    crew.run(disk.close)
    until(lambda: outcome)
    plan.release()
    crew.done()
    with open(home / "disk", "rb") as f:
        first = f.read(1)
    assert (first == b"x") == (outcome[0] is None), "the guest was told otherwise than what the disk holds"


def test_a_stalled_snapshot_read_holds_up_close_and_its_own_clusters_alone(home: Path) -> None:
    disk, t0 = open_disk(home)
    plan = FaultPlan()
    disk._inject(plan)
    snap = disk.snapshot(cluster_size=4096)
    plan.stall("pread", start=0, end=4096, times=1)
    crew = Crew()
    got: list[object] = []

    def read() -> None:
        try:
            got.append(snap.pread(4096, 0))
        except ValueError as e:
            got.append(e)

    crew.run(read)
    until(lambda: plan.stalled)
    disk.pwrite(b"free", 8192)
    writer = crew.run(lambda: disk.pwrite(b"held", 0))
    until(lambda: snap.stats().frozen_waits)
    closer = crew.run(snap.close)
    writer.join(30)
    assert not writer.is_alive(), "close did not let the waiting guest write go on"
    assert closer.is_alive()
    plan.release()
    crew.done()
    assert got[0] == t0[:4096] or isinstance(got[0], ValueError)
    disk.close()


def test_broken_error_keeps_its_cause_while_the_snapshot_is_being_closed(home: Path) -> None:
    """A reader that is told "broken" is told why, also where close() comes between the look and the report."""
    disk, _ = open_disk(home)
    for _ in range(100 // SLOWER):
        snap = disk.snapshot(target_limit=0, on_cbw_error="break-snapshot", cluster_size=4096)
        disk.pwrite(random.randbytes(8), 4096)
        assert snap.state == "broken"
        crew = Crew()
        seen: list[BaseException] = []

        def read(
            r: random.Random, snap: cbwcore.Snapshot = snap, crew: Crew = crew, seen: list[BaseException] = seen
        ) -> None:
            try:
                snap.pread(1, 0)
            except cbwcore.SnapshotBrokenError as e:
                seen.append(e)
            except ValueError:
                crew.stop.set()

        for _ in range(3):
            crew.repeat(read)
        until(lambda seen=seen, crew=crew: seen or crew.errors)
        snap.close()
        crew.done()
        for error in seen:
            assert isinstance(error.__cause__, cbwcore.CopyBeforeWriteError), f"{error!r} has no cause"
            assert error.__cause__.errno == errno.ENOSPC
    disk.close()


def test_break_in_the_middle_of_close_is_known_or_never_was(home: Path) -> None:
    """If any reader was told "broken", then that was told with its cause, `error` keeps it, and on_break was called."""
    disk, _ = open_disk(home)
    for i in range(300 // SLOWER):
        told: list[cbwcore.Snapshot] = []
        snap = disk.snapshot(target_limit=0, on_cbw_error="break-snapshot", cluster_size=4096, on_break=told.append)
        crew = Crew()
        seen: list[BaseException] = []
        gate = threading.Barrier(3)

        def read(
            snap: cbwcore.Snapshot = snap, seen: list[BaseException] = seen, gate: threading.Barrier = gate
        ) -> None:
            gate.wait()
            with contextlib.suppress(ValueError):
                while True:
                    try:
                        snap.pread(1, 0)
                    except cbwcore.SnapshotBrokenError as e:
                        seen.append(e)

        crew.run(read)
        crew.run(lambda gate=gate: (gate.wait(), disk.pwrite(b"x", 4096)))
        crew.run(lambda gate=gate, snap=snap: (gate.wait(), snap.close()))
        crew.done()
        if seen:
            assert all(isinstance(error.__cause__, cbwcore.CopyBeforeWriteError) for error in seen), (
                f"round {i}: no cause"
            )
            assert isinstance(snap.error, cbwcore.CopyBeforeWriteError), f"round {i}: it broke, and has no error"
            assert told == [snap], f"round {i}: on_break was called {len(told)} times"
    disk.close()


def test_break_just_before_the_core_closes_is_kept_and_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with the break at its latest: close() has begun, and the guest write that broke it is not yet done."""
    disk, _ = open_disk(home)
    plan = FaultPlan()
    disk._inject(plan)
    told: list[cbwcore.Snapshot] = []
    snap = disk.snapshot(target_limit=0, on_cbw_error="break-snapshot", on_break=told.append)
    crew = Crew()
    close = cbwcore.Snapshot._close

    def late_break(self: cbwcore.Snapshot) -> None:
        plan.stall("pwrite")
        crew.run(lambda: disk.pwrite(b"x", 0))
        until(lambda: plan.stalled)
        with pytest.raises(cbwcore.SnapshotBrokenError):
            self.pread(1, 0)
        threading.Timer(0.05, plan.release).start()
        close(self)

    with monkeypatch.context() as patch:
        patch.setattr(cbwcore.Snapshot, "_close", late_break)
        snap.close()
    crew.done()
    assert isinstance(snap.error, cbwcore.CopyBeforeWriteError), "it broke, and has no error"
    assert told == [snap], f"on_break was called {len(told)} times"


def test_reader_told_of_a_break_finds_its_cause_while_the_core_closes(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told "broken", and asks for the cause only when close() has begun, and waits for the guest write."""
    disk, _ = open_disk(home)
    plan = FaultPlan()
    disk._inject(plan)
    snap = disk.snapshot(target_limit=0, on_cbw_error="break-snapshot")
    crew = Crew()
    told: list[cbwcore.SnapshotBrokenError] = []
    asks = threading.Event()
    cause, close = cbwcore.Snapshot._cause, cbwcore.Snapshot._close

    def ask_late(self: cbwcore.Snapshot) -> cbwcore.CopyBeforeWriteError | None:
        if asks.is_set():
            until(lambda: self.state == "closed")
        return cause(self)

    def read() -> None:
        asks.set()
        with pytest.raises(cbwcore.SnapshotBrokenError) as caught:
            snap.pread(1, 0)
        told.append(caught.value)
        plan.release()

    def late_break(self: cbwcore.Snapshot) -> None:
        plan.stall("pwrite")
        crew.run(lambda: disk.pwrite(b"x", 0))
        until(lambda: plan.stalled)
        crew.run(read)
        until(asks.is_set)
        time.sleep(0.05)  # until it is in ask_late
        close(self)

    with monkeypatch.context() as patch:
        patch.setattr(cbwcore.Snapshot, "_close", late_break)
        patch.setattr(cbwcore.Snapshot, "_cause", ask_late)
        snap.close()
        crew.done()
    assert told[0].__cause__ is not None
    assert told[0].__cause__.errno == errno.ENOSPC  # type: ignore[attr-defined]


def test_close_from_many_threads_at_once(home: Path) -> None:
    for i in range(20 // SLOWER):
        disk, _ = open_disk(home, f"disk{i}")
        snaps = [disk.snapshot() for _ in range(4)]
        crew = Crew()
        gate = threading.Barrier(10)

        def close(thing: cbwcore.Disk | cbwcore.Snapshot, gate: threading.Barrier = gate) -> None:
            gate.wait()
            thing.close()

        for thing in [*snaps, *snaps, disk, disk]:
            crew.run(lambda thing=thing, close=close: close(thing))
        crew.done()
        assert disk.closed
        assert {s.state for s in snaps} == {"closed"}


def test_on_break_callback_may_close(home: Path) -> None:
    """The callback runs in a guest's thread that holds nothing: it may close the snapshot, others the disk."""
    for i in range(20 // SLOWER):
        disk, _ = open_disk(home, f"disk{i}")
        told: list[cbwcore.Snapshot] = []

        def on_break(snap: cbwcore.Snapshot, told: list[cbwcore.Snapshot] = told) -> None:
            snap.close()
            told.append(snap)

        snaps = [disk.snapshot(target_limit=0, on_cbw_error="break-snapshot", on_break=on_break) for _ in range(3)]
        crew = Crew()
        for k in range(4):
            crew.run(lambda disk=disk, k=k: disk.pwrite(b"x" * 10, k * 65536))
        for t in crew.threads:
            t.join(60)
        crew.run(disk.close)
        crew.done()
        assert sorted(map(id, told)) == sorted(map(id, snaps))
        assert all(s.error.errno == errno.ENOSPC for s in snaps)


# ---- nothing is left behind ----


def test_rounds_of_failure_leave_nothing_behind(home: Path) -> None:
    """Open, arm, fail, close, 200 times: descriptors, threads, mappings and copy buffers stay where they were."""
    path, _ = image(home)
    small = home / "small"
    small.write_bytes(b"x")

    def one(i: int) -> None:
        r = random.Random(SEED + i)
        disk = cbwcore.Disk(path, direct=i % 2 == 1)
        plan = FaultPlan()
        disk._inject(plan)
        bitmap = disk.bitmaps.add("b", granularity=4096)
        target = None if i % 3 else str(home / "target")
        snap = disk.snapshot(
            target,
            on_cbw_error=["break-guest-write", "break-snapshot"][i // 2 % 2],
            cbw_timeout=[0, 60][i // 4 % 2],
            cluster_size=4096,
            bitmap=[None, bitmap][i // 8 % 2],
        )
        for bad in (str(small), path, str(home / "none" / "target")):
            with pytest.raises(cbwcore.ConfigError):
                disk.snapshot(bad)
        with pytest.raises(cbwcore.ConfigError):
            cbwcore.snapshot_group([(disk, None), (disk, str(small))])
        with pytest.raises(cbwcore.ConfigError):
            cbwcore.Disk(path)
        bitmap.set_range(0, SIZE)
        plan.error("pread", errno.EIO, times=r.choice([1, 100]))
        with contextlib.suppress(OSError):
            disk.pwrite(b"y" * 10_000, 1)
        with contextlib.suppress(OSError):
            snap.pread(SIZE, 0)
        plan.release()
        if i % 5 == 0:
            with contextlib.suppress(OSError):
                snap.open().read(10)
        if i % 7 == 0:
            pass  # nobody closes: the collector does
        elif i % 7 == 1:
            snap.close()
            disk.close()
        else:
            disk.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(home / "target")

    def rounds(n: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            for i in range(n):
                one(i)
                if i % 7 == 0:
                    gc.collect()
            gc.collect()

    rounds(36)
    before, maps, used = kept(), mappings(), copy_buffers()
    rounds(200 // SLOWER)
    assert kept() == before
    assert mappings() <= maps + 12, "mappings grow"  # malloc's own arenas come and go
    assert copy_buffers()[1] <= max(used[1], 16 << 20)
    assert copy_buffers()[1] == copy_buffers()[2], "a copy buffer was not given back"


def test_threads_of_timeouts_end_with_their_snapshot(home: Path) -> None:
    disk, _ = open_disk(home)
    plan = FaultPlan()
    before = tasks()
    with targets_behind(plan):
        snap = disk.snapshot(cluster_size=4096, cbw_timeout=0.02)
    plan.stall("pwrite")
    for i in range(10):
        with pytest.raises(cbwcore.CopyBeforeWriteError) as e:
            disk.pwrite(b"x", i * 4096)
        assert e.value.errno == errno.ETIMEDOUT
    assert tasks() >= before + 10, "a late copy keeps its thread"
    crew = Crew()
    crew.run(snap.close)
    time.sleep(0.02)
    plan.release()
    crew.done()
    until(lambda: tasks() == before)
    disk.close()


# ---- arming ----


def test_groups_armed_in_opposite_order_do_not_deadlock(home: Path) -> None:
    disks = [open_disk(home, f"disk{i}")[0] for i in range(3)]
    crew = Crew()
    taken = [0]
    end = time.monotonic() + 2

    def group(order: list[int]) -> None:
        while time.monotonic() < end:
            snaps = cbwcore.snapshot_group([(disks[i], None) for i in order], cluster_size=4096)
            taken[0] += 1
            for s in reversed(snaps):
                s.close()

    def write(r: random.Random) -> None:
        disks[r.randrange(3)].pwrite(b"x" * 100, r.randrange(SIZE - 100))

    def bitmaps(r: random.Random) -> None:
        d = disks[r.randrange(3)]
        name = f"b{r.random()}"
        d.bitmaps.add(name)
        d.bitmaps[name].clear()
        d.bitmaps.remove(name)

    orders = [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2], [2, 0]]
    for order in orders:
        crew.run(lambda order=order: group(order))
    for _ in range(3):
        crew.repeat(write)
    crew.repeat(bitmaps)
    for t in crew.threads[: len(orders)]:
        t.join(60)
    crew.stop.set()
    crew.done()
    assert taken[0] >= len(orders)
    for d in disks:
        assert not d.snapshots
        d.close()


def test_64_threads_arm_and_close_while_others_write(home: Path) -> None:
    """Also past the most snapshots that a disk may have: that is refused, and nothing else happens."""
    disk, _ = open_disk(home)
    crew = Crew()
    end = time.monotonic() + 2.5
    refused, proven = [0], [0]

    def churn(i: int) -> None:
        r = random.Random(f"{SEED}/{i}")
        while time.monotonic() < end:
            try:
                snap = disk.snapshot(
                    cluster_size=r.choice([4096, 65536]), on_cbw_error=r.choice(list(cbwcore.OnCbwError))
                )
            except cbwcore.ConfigError as e:
                assert "at most" in str(e)
                refused[0] += 1
                continue
            off = r.randrange(SIZE - 512)
            first = snap.pread(512, off)
            if r.random() < 0.5:
                disk.pwrite(r.randbytes(512), off)
            assert snap.pread(512, off) == first
            proven[0] += 1
            snap.close()
            assert snap.state == "closed"

    for i in range(64):
        crew.run(lambda i=i: churn(i))
    crew.done(120)
    assert proven[0] >= 64
    assert not disk.snapshots
    assert disk.stats().snapshots == 0
    disk.close()


# ---- maps and bitmaps under change ----


def test_scope_is_one_thing_while_its_bitmap_changes(home: Path) -> None:
    """A scope is copied when the snapshot is taken: need and access are the same set, whoever changes the bitmap then.
    A cluster with access and without need would be read from the disk and not be protected there."""
    path = home / "large"
    with open(path, "wb") as f:
        f.truncate(64 << 20)
    disk = cbwcore.Disk(path)
    opened.append(disk)
    clusters = disk.size // 4096
    bitmap = disk.bitmaps.add("scope", granularity=512)
    for c in range(0, clusters, 2):
        bitmap.set_range(c * 4096, 1)  # many runs: copying the scope takes a while
    crew = Crew()
    crew.repeat(lambda r: bitmap.set_range((r.randrange(clusters) | 1) * 4096, 1))
    wrong = []
    for _ in range(40 // SLOWER):
        snap = disk.snapshot(bitmap=bitmap, cluster_size=4096)
        need, access = snap._map("need"), snap._map("access")
        wrong += [i for i in range(clusters) if need[i] != access[i]]
        snap.close()
    crew.stop.set()
    crew.done()
    disk.close()
    assert not wrong, f"clusters in need or access alone: {wrong[:20]}"


def test_bitmap_enabled_and_disabled_from_many_threads_still_records(home: Path) -> None:
    """Whatever the order was: an enabled bitmap records (a lost bit is lost data in the next incremental backup)."""
    disk, _ = open_disk(home)
    bitmap = disk.bitmaps.add("b", granularity=4096)
    for round_ in range(150 // SLOWER):
        crew = Crew()
        gate = threading.Barrier(6)

        def flip(i: int, gate: threading.Barrier = gate) -> None:
            gate.wait()
            for k in range(10):
                (bitmap.enable if (i + k) % 2 else bitmap.disable)()

        for i in range(6):
            crew.run(lambda i=i, flip=flip: flip(i))
        crew.done()
        if not bitmap.enabled:
            bitmap.enable()
        bitmap.clear()
        disk.pwrite(b"x", round_ * 1000)
        assert bitmap.count() == 4096, f"round {round_}: enabled, and the write was not recorded"
    disk.bitmaps.remove("b")
    disk.pwrite(b"x", 0)
    disk.close()


# ---- the copy budget ----


@pytest.fixture
def budget() -> Iterator[Callable[[int], None]]:
    usual = cbwcore.limits.copy_buffers

    def budget(n: int) -> None:
        cbwcore.limits.copy_buffers = n

    yield budget
    cbwcore.limits.copy_buffers = usual  # whoever waits for a buffer gets it now
    until(lambda: copy_buffers()[1] == copy_buffers()[2])


def test_copy_into_a_larger_direct_target_needs_no_second_buffer(home: Path, budget: Callable[[int], None]) -> None:
    """The disk's tail lies inside a block of the target: writing it is a read-modify-write, for which the copy, which
    already holds the whole budget, must not wait for more of it."""
    size = (1 << 20) - 100
    target = home / "target"
    target.write_bytes(b"\xee" * (2 << 20))
    budget(1 << 20)
    disk, content = open_disk(home, "odd", size, direct=True)
    snap = disk.snapshot(str(target), cluster_size=1 << 20)
    crew = Crew()
    crew.run(lambda: disk.pwrite(b"x" * 4096, 0))
    crew.done(15)
    assert snap.pread(size, 0) == content
    snap.close()
    disk.close()


def test_stalled_targets_that_hold_the_budget_stop_no_guest_read(home: Path, budget: Callable[[int], None]) -> None:
    """R16: a guest's unaligned O_DIRECT read needs a buffer, and must not wait for somebody's target to come back."""
    budget(1 << 20)
    disk, content = open_disk(home, "big", 2 << 20, direct=True)
    plan = FaultPlan()
    with targets_behind(plan):
        snap = disk.snapshot(cluster_size=1 << 20, cbw_timeout=60)
    plan.stall("pwrite")
    crew = Crew()
    got: list[bytes] = []
    try:
        crew.run(lambda: disk.pwrite(b"x" * 4096, 0))
        until(lambda: plan.stalled)
        reader = crew.run(lambda: got.append(disk.pread(100, (1 << 20) + 1)))
        reader.join(5)
        assert not reader.is_alive(), "a guest read waits for a stalled target"
    finally:
        plan.release()
    crew.done()
    assert got == [content[(1 << 20) + 1 :][:100]]
    snap.close()
    disk.close()


def test_stalled_targets_that_hold_the_budget_do_not_outlast_cbw_timeout(
    home: Path, budget: Callable[[int], None]
) -> None:
    """R8, R15: cbw_timeout covers all that a guest write waits for, here buffers that another disk's stalled copies
    hold; better still, it need not wait for those."""
    budget(3 << 20)
    disk, _ = open_disk(home, "big", 2 << 20, direct=True)
    other, _ = open_disk(home, "other", 8 << 20)
    plan = FaultPlan()
    with targets_behind(plan):
        held = other.snapshot(cluster_size=1 << 20, cbw_timeout=60)
    snap = disk.snapshot(cluster_size=4096, cbw_timeout=5)
    plan.stall("pwrite")
    crew = Crew()
    outcome: list[object] = []

    def write() -> None:
        try:
            outcome.append(disk.pwrite(b"x" * 4096, 0))
        except cbwcore.CopyBeforeWriteError as e:
            outcome.append(e.errno)

    try:
        for i in range(8):
            crew.run(lambda i=i: other.pwrite(b"x" * 4096, i << 20))
        until(lambda: plan.stalled >= 2)
        time.sleep(0.05)
        writer = crew.run(write)
        writer.join(20)
        assert not writer.is_alive(), "a guest write waits for a buffer past its cbw_timeout"
        assert outcome in ([None], [errno.ETIMEDOUT])
    finally:
        plan.release()
    crew.done()
    for thing in (snap, held, disk, other):
        thing.close()


def test_lowered_budget_with_many_copies_ends(home: Path, budget: Callable[[int], None]) -> None:
    """Sixteen guests, four snapshots, room for four copies: all of them get through."""
    budget(1 << 20)
    cbwcore_copy, cbwcore.limits.copy_bytes = cbwcore.limits.copy_bytes, 256 * 1024
    try:
        for direct in (False, True):
            disk, t0 = open_disk(home, "big", 4 << 20, direct=direct)
            snaps = [disk.snapshot(cluster_size=c, cbw_timeout=t) for c in (4096, 262144) for t in (0, 60)]
            crew = Crew()
            for i in range(16):
                crew.run(
                    lambda i=i, disk=disk: [
                        disk.pwrite(bytes([i]) * 70_001, (i * 255_000 + k * 70_001) % (4 << 20)) for k in range(3)
                    ]
                )
            crew.done(60)
            for s in snaps:
                assert np.array_equal(np.frombuffer(s.pread(s.size, 0), np.uint8), np.frombuffer(t0, np.uint8))
            disk.close()
    finally:
        cbwcore.limits.copy_bytes = cbwcore_copy


# ---- in a process of its own, because a deadlock would take the rest along ----

ON_BREAK = """
import contextlib, errno, faulthandler, os, sys, threading, time
import cbwcore
from cbwcore._cbwcore import FaultPlan

faulthandler.dump_traceback_later(15, exit=True)
path = sys.argv[1]
disk = cbwcore.Disk(path)
plan = FaultPlan()
disk._inject(plan)
inside, go_on = threading.Event(), threading.Event()

def on_break(snap):
    inside.set()
    go_on.wait()
    with contextlib.suppress(ValueError):
        disk.bitmaps.add("again")           # what a backup tool does: something with the disk

snap = disk.snapshot(target_limit=0, on_cbw_error="break-snapshot", on_break=on_break)
plan.stall("pwrite")
writer = threading.Thread(target=disk.pwrite, args=(b"x", 0))
writer.start()
while not plan.stalled:
    time.sleep(0.001)
assert snap.state == "broken"               # and the write, which has not ended, has not told of it
closers = [threading.Thread(target=snap.close), threading.Thread(target=disk.close)]
closers[0].start()
inside.wait(1)                              # close() tells of it first, or not at all until the write has ended
closers[1].start()
time.sleep(0.1)
go_on.set()
plan.release()
for t in [writer, *closers]:
    t.join()
assert inside.is_set(), "on_break was not called"
assert snap.error.errno == errno.ENOSPC
"""


def test_on_break_from_close_may_use_the_disk_while_that_is_closed(home: Path) -> None:
    """Where close() is the one that tells of the break, the callback holds nothing that disk.close() waits for."""
    path, _ = image(home)
    done = subprocess.run([sys.executable, "-c", ON_BREAK, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
