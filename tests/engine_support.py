"""What the tests of the engine share: a rig of disks, snapshots and fault plans, and guests in threads.

Nothing here sleeps to let something happen: `until` looks at a state that must come, and fails when it does not.
"""

import contextlib
import errno
import os
import random
import threading
import time
from pathlib import Path

import pytest

import cbwcore
from cbwcore._cbwcore import FaultPlan, copy_buffers

CLUSTER = 65536
LIMIT = float(os.environ.get("CBWCORE_TEST_LIMIT") or 20)  # seconds; what must come and does not by then hangs
G = "break-guest-write"
S = "break-snapshot"


def pattern(size, seed=1):
    """Seeded bytes, none of them zero, so that no cluster passes for a hole."""
    return random.Random(seed).randbytes(size).replace(b"\0", b"\1")


def until(condition, what, limit=LIMIT):
    """Wait for a condition that must come."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"not within {limit} s: {what}"
        time.sleep(0.0002)


def settled(value):
    """A figure of the engine, once it has not changed for a moment."""
    last, since = value(), time.monotonic()
    while time.monotonic() < since + 0.1:
        time.sleep(0.001)
        if value() != last:
            last, since = value(), time.monotonic()
    return last


def copy_budget():
    """(limit, used, kept) bytes of the copy buffers."""
    return copy_buffers()[:3]


def file_bytes(path, offset=0, length=-1):
    with open(path, "rb") as f:
        f.seek(offset)
        return f.read(length)


def end_plan(plan):
    """Let what is stalled go on, and print what replays the plan: pytest shows it where the test failed."""
    plan.release()
    print(f"to replay, release() by release(): {[FaultPlan(text) for text in plan.history]}")


class Guest(threading.Thread):
    """One call in a thread of its own, and what became of it."""

    def __init__(self, call, *args, **options):
        super().__init__(daemon=True)
        self._call = call, args, options
        self.value = self.error = None
        self.start()

    def run(self):
        call, args, options = self._call
        try:
            self.value = call(*args, **options)
        except BaseException as e:
            self.error = e

    @property
    def done(self):
        return not self.is_alive()

    def result(self, limit=LIMIT):
        """What the call returned or raised; a hang fails."""
        self.join(limit)
        assert self.done, f"hangs: {self._call}"
        if self.error is not None:
            raise self.error
        return self.value

    def reaches(self, condition, what):
        """The call waits in the state that `condition` tells of, and is not done."""
        until(lambda: self.done or condition(), what)
        assert not self.done, f"did not wait: {what}; it got {self.error or self.value!r}"


class Rig:
    """Disks and snapshots in one folder; faults are taken away and all is closed at the end, also of a failed test."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.disks = []
        self.plans = []
        self.guests = []
        self.count = 0

    def path(self, name):
        self.count += 1
        return self.folder / f"{name}{self.count}"

    def disk(self, content=4 * CLUSTER, *, folder=None, **options):
        """A disk with `content`: bytes, or the size of a pattern. `disk.t0` is it."""
        t0 = content if isinstance(content, bytes) else pattern(content, seed=self.count)
        path = Path(folder) / "disk" if folder else self.path("disk")
        path.write_bytes(t0)
        return self.open(path, t0, **options)

    def sparse(self, size, **options):
        path = self.path("disk")
        with open(path, "wb") as f:
            f.truncate(size)
        return self.open(path, None, **options)

    def open(self, path, t0, **options):
        disk = cbwcore.Disk(path, **options)
        disk.t0 = t0
        self.disks.append(disk)
        return disk

    def snapshot(self, disk, target=None, **options):
        return disk.snapshot(target or self.path("target"), **options)

    def plan(self, of):
        """A fault plan, put before the file of a disk or before the target of a snapshot."""
        plan = FaultPlan()
        self.plans.append(plan)
        of._inject(plan)
        return plan

    def run(self, call, *args, **options):
        guest = Guest(call, *args, **options)
        self.guests.append(guest)
        return guest

    def close(self):
        for plan in self.plans:
            end_plan(plan)
        closers = [Guest(self._close, disk) for disk in self.disks]
        for thread in self.guests + closers:
            thread.join(LIMIT)
        hung = [thread._call for thread in self.guests + closers if not thread.done]
        assert not hung, f"hang at the end: {hung}"

    @staticmethod
    def _close(disk):
        for snapshot in disk.snapshots:
            with contextlib.suppress(OSError):
                snapshot.close()
        with contextlib.suppress(OSError):
            disk.close()


def stalled(plan, count=1):
    """Wait until that many calls are stalled."""
    until(lambda: plan.stalled >= count, f"{count} stalled calls")


def ranges(plan, op):
    """(offset, length) of the calls of `op`, oldest first."""
    return [(offset, length) for _, offset, length in plan.calls(op)]


def assert_t0(snapshot, t0):
    """Every byte of the snapshot reads as at T0."""
    assert snapshot.pread(snapshot.size, 0) == t0


def assert_broken(snapshot, code, operation, offset, length):
    """Broken for good by that cause: no byte can be read, and every error tells of it."""
    assert snapshot.state == "broken"
    assert_cause(snapshot.error, code, operation, offset, length)
    assert snapshot.error.time == pytest.approx(time.time(), abs=60)
    for off in {*range(0, snapshot.size, 4096), max(snapshot.size - 1, 0)}:
        with pytest.raises(cbwcore.SnapshotBrokenError) as e:
            snapshot.pread(min(4096, snapshot.size - off), off)
        assert e.value.errno == errno.EACCES
        assert_cause(e.value.__cause__, code, operation, offset, length)
    with pytest.raises(cbwcore.SnapshotBrokenError):
        list(snapshot.block_status())


def assert_cause(error, code, operation, offset, length):
    assert type(error) is cbwcore.CopyBeforeWriteError
    assert (error.errno, error.operation, error.offset, error.length) == (code, operation, offset, length)


def assert_refused(guest_call, code, operation, offset, length):
    """The call raises the CopyBeforeWriteError of that cause; returns it."""
    with pytest.raises(cbwcore.CopyBeforeWriteError) as e:
        guest_call()
    assert_cause(e.value, code, operation, offset, length)
    return e.value


@contextlib.contextmanager
def targets_behind(plan):
    """Snapshots taken meanwhile have ``plan`` before their target, before any guest write can reach it."""
    attach = cbwcore.Snapshot._attach

    def attach_and_inject(self, *args):
        attach(self, *args)
        self._inject(plan)

    cbwcore.Snapshot._attach = attach_and_inject
    try:
        yield
    finally:
        del cbwcore.Snapshot._attach


@pytest.fixture
def rig(place):
    made = Rig(place)
    yield made
    made.close()
