"""The fixed workload of the sweep, and the oracle that judges each of its steps while something fails.

The oracle never asks the engine what is right: before and after each request it reads the disk's file itself."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cases import KINDS, POLICIES, PROCESS, TABLE_OPS, TABLES, Case

import cbwcore
from cbwcore._cbwcore import FaultPlan

CLUSTER = 65536
SIZE = 6 * CLUSTER + 1000
HOLE = 5  # the cluster that is one
LIMIT = 10.0
FULL, INCREMENTAL, RESTORED = "full.qcow2", "incremental.qcow2", "restored"
EXPECTED = (OSError, cbwcore.CbwError, MemoryError)
ACTIONS = {"short": 1, "kill": 2}
LIBRARY = ctypes.CDLL(None)


class WrongError(AssertionError):
    """What must never be, whatever fails."""


def check(condition: object, what: str) -> None:
    if not condition:
        raise WrongError(what)


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """What this thread calls meanwhile is the test's own, neither counted nor failed."""
    LIBRARY.sweep_pause(1)
    try:
        yield
    finally:
        LIBRARY.sweep_pause(-1)


def t0_of_disk() -> bytes:
    content = bytearray(random.Random(1).randbytes(SIZE).replace(b"\0", b"\1"))
    content[HOLE * CLUSTER : (HOLE + 1) * CLUSTER] = bytes(CLUSTER)
    return bytes(content)


def make_disk(home: Path) -> None:
    content = t0_of_disk()
    with open(home / "disk", "wb") as f:
        f.write(content[: HOLE * CLUSTER])
        f.seek((HOLE + 1) * CLUSTER)
        f.write(content[(HOLE + 1) * CLUSTER :])


def first_difference(a: bytes, b: bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def same(got: bytes, wanted: bytes, what: str) -> None:
    if got != wanted:
        raise WrongError(f"{what}: {len(got)} bytes, of {len(wanted)}, differ first at {first_difference(got, wanted)}")


def part_of(after: bytes, before: bytes, wanted: bytes, what: str) -> None:
    """Each byte is as before or as wanted."""
    if after not in (before, wanted):
        bad = [i for i, each in enumerate(zip(after, before, wanted, strict=True)) if each[0] not in each[1:]]
        check(not bad, f"{what}: at {bad[:1]} it is neither as before nor as was written")


def errnos(error: BaseException | None) -> Iterator[int]:
    """Of an error and what it came from."""
    while error is not None:
        if isinstance(error, OSError):
            yield error.errno
        error = error.__cause__


class Journal:
    """What was begun and what was acknowledged, for the judge of a run that is killed."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()

    def note(self, *event: object) -> None:
        """Two threads may do so at once, but the one that is killed has said all before."""
        if self._path is not None:
            with unseen(), self._lock, open(self._path, "ab", buffering=0) as f:
                f.write(pickle.dumps(event))

    @staticmethod
    def read(path: Path) -> list[tuple[Any, ...]]:
        events = []
        with contextlib.suppress(EOFError, pickle.UnpicklingError), open(path, "rb") as f:
            while True:  # the last one may have been cut short, by another thread's death
                events.append(pickle.load(f))
        return events


class Run:
    """One run of the workload, in a folder of its own."""

    def __init__(self, home: Path, case: Case) -> None:
        self.home = home
        self.case = case
        self.config = case.config
        self.plans = {place: FaultPlan() for place in TABLES}
        self.journal = Journal(home / "journal" if case.action == "kill" else None)
        self.disk: cbwcore.Disk | None = None
        self.snap: cbwcore.Snapshot | None = None
        self.t0 = b""  # of the snapshot
        self.bases: dict[str | None, bytes] = {}  # by `since`: what the bitmap has every change from
        self.backups: dict[str, bytes] = {}  # those that succeeded, and what they must restore to
        self.restored: bytes | None = None
        self.errors: list[str] = []
        self.stray: list[str] = []
        sys.unraisablehook = lambda u: self.stray.append(f"unraisable: {u.exc_value!r} in {u.object!r}")
        threading.excepthook = lambda a: self.stray.append(f"in a thread: {a.exc_value!r}")

    # ---- faults ----

    def begin_faults(self) -> None:
        case = self.case
        attach = cbwcore.Snapshot._attach

        def attach_with_plan(snapshot: cbwcore.Snapshot, *args: object) -> None:
            attach(snapshot, *args)
            snapshot._inject(self.plans["target"])

        cbwcore.Snapshot._attach = attach_with_plan
        times = 1 if case.once else 2**62
        if case.place in TABLES and case.action:
            plan = self.plans[case.place]
            if case.action == "short":
                plan.short(case.kind, 4096, skip=case.nth, times=times)
            else:
                plan.error(case.kind, getattr(errno, case.action), skip=case.nth, times=times)
        kind = list(KINDS).index(case.kind) if case.place == PROCESS and case.action else -1
        action = ACTIONS.get(case.action, 0)
        code = getattr(errno, case.action, 0)
        LIBRARY.sweep_on(kind, ctypes.c_uint64(case.nth), ctypes.c_uint64(times), action, code)

    def seen(self) -> dict[str, int]:
        """How many calls of each kind there were."""
        found = {f"{PROCESS} {kind}": LIBRARY.sweep_seen(i) for i, kind in enumerate(KINDS)}
        for place, plan in self.plans.items():
            for op in TABLE_OPS:
                found[f"{place} {op}"] = len(plan.calls(op))
        return {key: count for key, count in found.items() if count}

    def was_hit(self) -> bool:
        """Whether the fault has come to pass."""
        if self.case.place in TABLES:
            return len(self.plans[self.case.place].calls(self.case.kind)) > self.case.nth
        return bool(LIBRARY.sweep_hits())

    def end_faults(self) -> None:
        LIBRARY.sweep_off()
        for plan in self.plans.values():
            plan.release()

    # ---- the disk as it is ----

    def look(self) -> bytes:
        with unseen():
            return (self.home / "disk").read_bytes()

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """The result of a step, or None where it fails in one of the ways that it may."""
        self.journal.note("begin", name)
        try:
            result = call()
        except EXPECTED as e:
            self.note_error(name, e)
            return None
        except RuntimeError as e:
            check("start new thread" in str(e), f"{name}: {e!r}")
            self.note_error(name, e)
            return None
        except WrongError:
            raise
        except BaseException as e:
            raise WrongError(f"{name}: {e!r} is no clear error") from e
        self.journal.note("end", name)
        return True if result is None else result

    def note_error(self, name: str, error: BaseException) -> None:
        check(self.case.action, f"{name}: {error!r} though nothing was made to fail")
        check(str(error), f"{name}: {error!r} does not say why")
        check(not self.case.is_unseen, f"{name}: {error!r}, which is to be tried again (R12)")
        if self.case.place in TABLES:
            check(getattr(errno, self.case.action) in errnos(error), f"{name}: {error!r} does not tell the errno")
        self.errors.append(f"{name}: {type(error).__name__}: {error}")
        if isinstance(error, cbwcore.CopyBeforeWriteError):
            check(self.config.policy == "G", f"{name}: refused by {error!r} under break-snapshot")
            check(error.operation in ("source-read", "target-write"), f"{name}: {error.operation}")

    def change(self, name: str, offset: int, data: bytes, call: Callable[[], None], *, advisory: bool = False) -> None:
        """A guest's request: acknowledged it is on the disk; refused, or advisory, any part of its own range may be."""
        before = self.look()
        wanted = before[:offset] + data + before[offset + len(data) :]
        self.journal.note("change", name, before, wanted)
        done = self.attempt(name, call)
        after = self.look()
        if done and not advisory:
            same(after, wanted, f"the disk after {name}")
        else:
            part_of(after, before, wanted, f"the disk after {name}, of which nothing need be done")
        self.journal.note("changed", name, after)

    def write(self, name: str, offset: int, length: int, **options: Any) -> None:
        data = random.Random(name).randbytes(length).replace(b"\0", b"\2")
        self.change(name, offset, data, lambda: self.disk.pwrite(data, offset, **options))

    def read(self, name: str, source: Any, content: bytes, offset: int, length: int) -> None:
        got = self.attempt(name, lambda: source.pread(length, offset))
        if got is not None:
            same(got, content[offset : offset + length], name)

    def status(self, name: str, source: Any, content: bytes) -> None:
        """What is called zero is zero (R20)."""
        for extent in self.attempt(name, lambda: list(source.block_status())) or ():
            if extent.zero:
                zeroes = content[extent.offset : extent.offset + extent.length]
                check(not any(zeroes), f"{name}: {extent} is no zero")

    # ---- the steps ----

    def run(self) -> None:
        self.disk = self.attempt("open", self.open)
        if self.disk is None:
            return
        self.disk._inject(self.plans["disk"])
        if self.attempt("add bitmap", lambda: self.disk.bitmaps.add("b", persistent=True)):
            self.bases[None] = self.look()
        else:
            check("b" not in self.disk.bitmaps, "a bitmap that could not be added is there")
        self.with_snapshot()
        self.with_backups()
        self.close("close")
        self.open_again()

    def close(self, name: str) -> None:
        self.attempt(name, self.disk.close)
        check(self.disk.closed, "close() leaves the disk open")

    def open_again(self) -> None:
        """With its bitmaps; where they cannot be used it says so, and something has failed."""
        disk = self.attempt("open again", self.open)
        if disk is None:
            return
        self.disk = disk
        if disk.bitmaps.problem is not None:
            check(self.errors, f"nothing has failed, and yet: {disk.bitmaps.problem}")
            self.errors.append(f"problem: {disk.bitmaps.problem}")
        else:
            check("b" in disk.bitmaps or not self.bases, "the bitmap is gone")
            if disk.bitmaps.get("b") is not None and disk.bitmaps["b"].inconsistent is not None:
                check(self.errors, f"nothing has failed, and yet: {disk.bitmaps['b'].inconsistent}")
            self.judge_bitmap()
        self.close("close again")

    def open(self) -> cbwcore.Disk:
        return cbwcore.Disk(self.home / "disk", io=self.config.engine, direct=self.config.direct)

    def with_snapshot(self) -> None:
        # With a timeout copies go to helper threads, or to a ring with a deadline (R8).
        options = {"on_cbw_error": POLICIES[self.config.policy], "cbw_timeout": 30 if self.config.policy == "S" else 0}
        self.snap = self.attempt("snapshot", lambda: self.disk.snapshot(self.home / "target", **options))
        self.t0 = self.look()
        self.journal.note("t0", self.t0)
        self.write("first write", 100, CLUSTER)  # of two clusters in part
        self.write("whole cluster", 2 * CLUSTER, CLUSTER)
        self.write("again", 200, 5000, fua=True)
        zeroes = 3 * CLUSTER + 512, CLUSTER - 1024
        self.change("zeroes", zeroes[0], bytes(zeroes[1]), lambda: self.disk.pwrite_zeroes(*zeroes))
        hole = 4 * CLUSTER, CLUSTER
        if self.snap is not None:
            self.read("snapshot read", self.snap, self.t0, 0, SIZE)
            self.status("snapshot status", self.snap, self.t0)
            self.attempt("snapshot discard", lambda: self.snap.discard(0, CLUSTER))
        self.change("discard", hole[0], bytes(hole[1]), lambda: self.disk.discard(*hole), advisory=True)
        self.write("over a hole", HOLE * CLUSTER + 10, 5000)
        self.write("tail", SIZE - 300, 300)
        self.read("disk read", self.disk, self.look(), 50, SIZE - 50)
        self.status("disk status", self.disk, self.look())
        self.attempt("flush", self.disk.flush)
        if self.snap is not None:
            self.read("snapshot read again", self.snap, self.t0, CLUSTER, SIZE - CLUSTER)
            self.judge_snapshot()
            self.attempt("snapshot close", self.snap.close)
            check(self.snap.state == "closed", "close() leaves the snapshot open")

    def judge_snapshot(self) -> None:
        """The fault is over for a moment: under G all is T0; under S it is, or the snapshot is broken."""
        with unseen(), self.no_faults():
            if self.config.policy == "S" and self.snap.state == "broken":
                check(self.snap.error is not None, "broken without a cause")
                self.errors.append(f"broken: {self.snap.error}")
                with contextlib.suppress(cbwcore.SnapshotBrokenError):
                    self.snap.pread(1, CLUSTER)
                    raise WrongError("a broken snapshot is read")
                return
            check(self.snap.state == "armed", f"the snapshot is {self.snap.state}")
            same(self.snap.pread(SIZE - CLUSTER, CLUSTER), self.t0[CLUSTER:], "the snapshot once the fault is over")

    @contextlib.contextmanager
    def no_faults(self) -> Iterator[None]:
        """Of the I/O table; what their rules count goes on where it was."""
        for thing in (self.disk, self.snap):
            thing._inject(None)
        yield
        self.disk._inject(self.plans["disk"])
        self.snap._inject(self.plans["target"])

    def with_backups(self) -> None:
        has_bitmap = "b" in self.disk.bitmaps
        whole = self.backup(FULL, sync="full", **({"bitmap": "b"} if has_bitmap else {}))
        self.write("after the full backup", CLUSTER + 7, 3000)
        if whole and has_bitmap:
            self.backup(INCREMENTAL, sync="incremental", bitmap="b", backing=self.home / FULL)
        self.write("after both", 3 * CLUSTER, 100)
        for name in (INCREMENTAL, FULL):
            if name in self.backups:
                target = self.home / RESTORED
                if self.attempt("restore", lambda n=name, to=target: cbwcore.restore(self.home / n, to)):
                    self.restored = self.backups[name]
                break

    def backup(self, name: str, **options: Any) -> bool:
        """A backup job, during which a guest writes; whether it succeeded."""
        t0 = self.look()
        self.journal.note("backup", name, t0)
        wrong: list[WrongError] = []
        wrote: list[bool] = []

        def guest(job: Any) -> None:  # called by the job, after its first span
            try:
                if not wrote:
                    wrote.append(True)
                    self.write(f"during {name}", 2 * CLUSTER + 100, 70000)
            except WrongError as e:
                wrong.append(e)

        options |= {"workers": 1, "chunk_size": CLUSTER, "progress": guest, "format": "qcow2"}
        options["on_cbw_error"] = POLICIES[self.config.policy]
        job = self.attempt(f"start {name}", lambda: self.disk.backup(self.home / name, **options))
        result = None if job is None else self.attempt(f"job {name}", lambda: self.finish(job, name))
        if wrong:
            raise wrong[0]
        if result is None:
            self.absent(name)
        else:
            self.backups[name] = t0
            self.journal.note("backed up", name)
            if "bitmap" in options and result.bitmap_error is None:
                self.bases[result.id] = t0
        self.judge_bitmap()
        return result is not None

    @staticmethod
    def finish(job: Any, name: str) -> Any:
        try:
            return job.wait(LIMIT)
        except TimeoutError as e:
            if "is not done after" in str(e):
                raise WrongError(f"the job of {name} hangs") from e
            raise

    def absent(self, name: str) -> None:
        """A backup that was not acknowledged does not look like one."""
        with unseen():
            for path in (self.home / name, self.home / f"{name}.cbw.json"):
                if self.case.once:
                    check(not path.exists(), f"the backup failed, and {path.name} is there")
            with contextlib.suppress(cbwcore.StateError, OSError):
                cbwcore.verify_backup(self.home / name)
                raise WrongError(f"{name} failed, and passes for a backup")

    def judge_bitmap(self) -> None:
        """It has every change since its base."""
        with unseen():
            if "b" not in self.disk.bitmaps or not self.bases:
                return
            bitmap = self.disk.bitmaps["b"]
            if bitmap.inconsistent is not None:
                self.errors.append(f"inconsistent: {bitmap.inconsistent}")
                return
            check(bitmap.since in self.bases, f"the bitmap is since {bitmap.since}, which is no backup")
            covers(bitmap, self.bases[bitmap.since], self.look())


def covers(bitmap: Any, base: bytes, content: bytes) -> None:
    """Each cluster that differs from the base is dirty."""
    for offset in range(0, SIZE, CLUSTER):
        if base[offset : offset + CLUSTER] != content[offset : offset + CLUSTER]:
            check(bitmap.is_dirty(offset), f"the bitmap lacks the change at {offset}")
