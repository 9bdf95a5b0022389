"""The oracle run: guests, snapshot readers, an operator and a saboteur at once, and every byte accounted for.

Each disk is cut into units of a few hundred bytes, and the units into stripes, each owned by one writer; stripes are
smaller and larger than clusters and blocks, so that writers share both. A writer does one request after the other, over
both disks, and logs each. A unit's bytes say who wrote them, when in that writer's log, and where they belong, over and
over: so a torn, lost, misplaced or too new unit shows.

What T0 is: a request that ended before the snapshot was asked for is in it, one that began after it was there is not,
and R10 says that there is no half: for each writer, T0 is its log up to one request, over all disks of the group. The
run proves for each snapshot that such a request exists, between those two bounds, and that every byte that any reader
ever got agrees with it. Every other phase pauses the writers around T0, and then the two bounds are one.

    python oracle.py --seconds 60 --seed 7 --direct --unit 487
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import cbwcore
from cbwcore._cbwcore import FaultPlan

PAGE = 4096
DISKS = 2
SOURCE_ERROR, TARGET_ERROR, TARGET_READ_ERROR, DISK_ERROR = errno.EREMOTEIO, errno.EL2HLT, errno.EL3RST, errno.EBADE
ZERO, UNKNOWN = 0, -1  # what a unit holds, beside the number of a request
PLACE = os.environ.get("CBWCORE_TEST_DIR") or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


class WrongError(AssertionError):
    """A byte, an error or a state that must not be."""


def join_all(threads: list[threading.Thread], limit: float) -> None:
    """Join, or show every stack and fail."""
    end = time.monotonic() + limit
    for t in threads:
        t.join(max(end - time.monotonic(), 0))
        if t.is_alive():
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            raise WrongError(f"{t.name} hangs")


class Op:
    """One guest request of one writer. `state`: None in flight, "done", "refused" (no effect), "unknown"."""

    __slots__ = ("disk", "first", "last", "state", "zero")

    def __init__(self, disk: int, first: int, last: int, zero: bool) -> None:
        self.disk, self.first, self.last, self.zero = disk, first, last, zero
        self.state: str | None = None


class Side:
    """A snapshot of one disk, and what readers saw in it."""

    def __init__(
        self,
        snap: cbwcore.Snapshot,
        disk: int,
        plan: FaultPlan,
        units: int,
        scope: set[int] | None,
        options: dict[str, Any],
    ) -> None:
        self.snap = snap
        self.disk = disk
        self.plan = plan
        self.scope = scope
        self.options = options
        self.seen = np.full(units, -2, dtype=np.int64)  # per unit: what T0 holds, -2 while nobody read it
        self.lock = threading.Lock()  # guards `seen`
        self.given_up: set[int] = set()  # clusters whose discard has returned
        self.giving_up: set[int] = set()  # or begun
        self.closing = False
        self.may_break = options["on_cbw_error"] == "break-snapshot"
        self.broken = 0


class Oracle:
    """One run."""

    def __init__(
        self,
        seed: int,
        seconds: float,
        *,
        direct: bool = False,
        unit: int = 512,
        writers: int = 4,
        readers: int = 3,
        verbose: bool = False,
    ) -> None:
        self.seed, self.seconds, self.direct, self.unit = seed, seconds, direct, unit
        self.writers, self.readers = writers, readers
        self.random = random.Random(seed)
        self.verbose = verbose
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.count: Counter[str] = Counter()
        self.logs: list[list[Op]] = [[] for _ in range(writers)]
        self.turns = [
            threading.Lock() for _ in range(writers)
        ]  # held by a writer during a request; the operator takes all to pause
        self.live: list[Side] = []  # snapshots that readers read
        self.past: list[tuple[list[Side], list[int], list[int]]] = []
        self.timeouts_used = self.limits_used = False
        self.dir = tempfile.mkdtemp(prefix="cbw-oracle-", dir=PLACE)

    # ---- what a unit looks like ----

    def stamp(self, disk: int, index: int, number: int) -> bytes:
        """The bytes of a unit: 24 bytes again and again."""
        if number == ZERO:
            return bytes(self.unit)
        head = np.array(
            [disk << 48 | index, number, (number * 0x9E3779B97F4A7C15 + index * 31 + disk) & (2**63 - 1)], dtype="<i8"
        ).tobytes()
        return (head * (self.unit // 24 + 1))[: self.unit]

    def stamps(self, disk: int, first: int, last: int, number: int) -> bytes:
        return b"".join(self.stamp(disk, i, number) for i in range(first, last))

    def parse(self, disk: int, index: int, data: bytes) -> int:
        """The request that wrote a unit. A unit that none wrote as a whole is a negative number of its own."""
        number = int.from_bytes(data[8:16], "little", signed=True) if any(data[:24]) else 0
        if number >= 0 and data == self.stamp(disk, index, number):
            return number
        return -3 - (hash(data) & (2**60 - 1))

    # ---- the disks ----

    def lay_out(self) -> None:
        r = self.random
        self.sizes, self.units, self.owner, self.stripes = [], [], [], []
        for _ in range(DISKS):
            units = r.randint(1200, 2200)
            size = units * self.unit + r.choice([0, 1, 100, 300])
            owner = np.zeros(units, dtype=np.int64)
            stripes: list[list[tuple[int, int]]] = [[] for _ in range(self.writers)]
            at = 0
            while at < units:
                n = min(r.choice([1, 1, 2, 3, 5, 8, 16, 40, 100]), units - at)
                w = r.randrange(self.writers)
                owner[at : at + n] = w
                stripes[w].append((at, at + n))
                at += n
            for w in range(self.writers):
                if not stripes[w]:
                    stripes[w].append((0, 0))
            self.sizes.append(size)
            self.units.append(units)
            self.owner.append(owner)
            self.stripes.append(stripes)
        self.paths = [os.path.join(self.dir, f"disk{d}") for d in range(DISKS)]
        for path, size in zip(self.paths, self.sizes, strict=True):
            with open(path, "wb") as f:
                f.truncate(size)
        self.now = [[np.zeros(u, dtype=np.int64) for u in self.units] for _ in range(self.writers)]  # each writer's own
        self.base = [[np.zeros(u, dtype=np.int64) for u in self.units] for _ in range(self.writers)]  # the operator's:
        self.base_at = [0] * self.writers  # up to which request
        self.disks = [cbwcore.Disk(path, direct=self.direct) for path in self.paths]
        self.plans = [FaultPlan() for _ in range(DISKS)]
        for disk, plan in zip(self.disks, self.plans, strict=True):
            disk._inject(plan)

    # ---- threads ----

    def thread(self, name: str, body: Callable[[random.Random], None]) -> threading.Thread:
        r = random.Random(f"{self.seed}/{name}")

        def main() -> None:
            try:
                while not self.stop.is_set():
                    body(r)
            except BaseException as e:
                e.add_note(f"in {name}")
                self.errors.append(e)
                self.stop.set()

        return threading.Thread(target=main, name=name, daemon=True)

    def run(self) -> None:
        """Run it all; raises WrongError."""
        self.lay_out()
        before = sys.getswitchinterval(), cbwcore.limits.copies, cbwcore.limits.copy_bytes
        sys.setswitchinterval(1e-4)
        try:
            threads = [self.thread(f"writer{w}", lambda r, w=w: self.write(w, r)) for w in range(self.writers)]
            threads += [self.thread(f"reader{i}", self.read) for i in range(self.readers)]
            threads += [self.thread("operator", self.operate), self.thread("saboteur", self.sabotage)]
            for t in threads:
                t.start()
            self.stop.wait(self.seconds)
            self.stop.set()
            for plan in self.plans:
                plan.release()
            join_all(threads, 60)
            if self.errors:
                raise self.errors[0]
            for plan in self.plans:
                plan.release()  # what the saboteur did last
            self.settle()
        except BaseException as e:
            e.add_note(self.replay())
            raise
        finally:
            sys.setswitchinterval(before[0])
            cbwcore.limits.copies, cbwcore.limits.copy_bytes = before[1:]
            for plan in [*self.plans, *(s.plan for s in self.live)]:
                plan.release()
            closer = threading.Thread(target=lambda: [disk.close() for disk in self.disks], name="closer", daemon=True)
            closer.start()
            closer.join(60)
            shutil.rmtree(self.dir)
        if closer.is_alive():
            raise WrongError("a disk cannot be closed")

    def replay(self) -> str:
        """How to do it again."""
        return (
            f"replay: CBWCORE_SEED={self.seed} python {__file__} --seconds {self.seconds} --unit {self.unit}"
            f"{' --direct' if self.direct else ''}; counts: {dict(self.count)}"
        )

    # ---- guests ----

    def write(self, w: int, r: random.Random) -> None:
        """One request of a writer; after one with an unknown outcome, the same range again."""
        log = self.logs[w]
        with self.turns[w]:
            again = log[-1] if log and log[-1].state == "unknown" else None
            if again is not None:
                op = Op(again.disk, again.first, again.last, again.zero)
                how = "zeroes" if op.zero else "write"
            else:
                d = r.randrange(DISKS)
                first, last = r.choice(self.stripes[d][w])
                if first == last:
                    return
                a = r.randrange(first, last)
                b = r.randint(a + 1, last)
                if r.random() < 0.3:
                    a, b = first, last
                how = r.choice(["write"] * 6 + ["zeroes", "discard"])
                if how == "discard" and self.direct:
                    a, b = self.whole_blocks(a, b)
                    if a >= b:
                        return
                op = Op(d, a, b, how != "write")
            log.append(op)
            number = len(log)
            off, n = op.first * self.unit, (op.last - op.first) * self.unit
            disk = self.disks[op.disk]
            try:
                if how == "write":
                    disk.pwrite(self.stamps(op.disk, op.first, op.last, number), off, fua=r.random() < 0.02)
                elif how == "zeroes":
                    disk.pwrite_zeroes(off, n, may_unmap=r.random() < 0.7)
                else:
                    disk.discard(off, n)
                op.state = "done"
                self.count[how] += 1
            except cbwcore.CopyBeforeWriteError as e:
                self.check_refusal(e)
                op.state = "refused"
                self.count[f"refused {e.operation}"] += 1
            except OSError as e:
                if e.errno not in (DISK_ERROR, SOURCE_ERROR):
                    raise
                op.state = "unknown"
                self.count["disk errors"] += 1
            self.apply(w, self.now[w], number - 1, number)
            if r.random() < 0.1:
                self.read_back(w, op.disk, op.first, op.last)

    def whole_blocks(self, a: int, b: int) -> tuple[int, int]:
        """O_DIRECT discards whole blocks only: a range of units that is made of them."""
        start, end = -(-a * self.unit // PAGE) * PAGE, b * self.unit // PAGE * PAGE
        while start < end and start % self.unit:
            start += PAGE
        while start < end and end % self.unit:
            end -= PAGE
        return (start // self.unit, end // self.unit) if start < end else (0, 0)

    def check_refusal(self, e: cbwcore.CopyBeforeWriteError) -> None:
        known = {
            "source-read": {SOURCE_ERROR},
            "target-write": {TARGET_ERROR, TARGET_READ_ERROR, errno.ENOSPC},
            "timeout": {errno.ETIMEDOUT},
        }
        if e.errno not in known[e.operation]:
            raise WrongError(f"a guest write got {e!r}") from e

    def apply(self, w: int, held: list[np.ndarray], start: int, end: int) -> None:
        """Bring what the units of writer w hold (per disk) from after its request `start` to after `end`."""
        for number in range(start + 1, end + 1):
            op = self.logs[w][number - 1]
            if op.state != "refused":
                mine = self.owner[op.disk][op.first : op.last] == w
                held[op.disk][op.first : op.last][mine] = (
                    UNKNOWN if op.state == "unknown" else ZERO if op.zero else number
                )

    def read_back(self, w: int, disk: int, first: int, last: int) -> None:
        """A guest reads what it wrote: nobody else may have changed it."""
        try:
            data = self.disks[disk].pread((last - first) * self.unit, first * self.unit)
        except OSError as e:
            if e.errno != SOURCE_ERROR:
                raise
            return
        expected = self.now[w][disk][first:last]
        for i in range(first, last):
            part = data[(i - first) * self.unit : (i - first + 1) * self.unit]
            if expected[i - first] != UNKNOWN and self.parse(disk, i, part) != expected[i - first]:
                raise WrongError(
                    f"disk {disk} unit {i}: writer {w} finds {self.parse(disk, i, part)}, not {expected[i - first]}"
                )
        self.count["guest reads"] += 1

    # ---- snapshot readers ----

    def read(self, r: random.Random) -> None:
        """Read somewhere in a live snapshot, or look at its block status."""
        live = self.live
        if not live or all(side.broken > 3 for side in live):
            time.sleep(0.0005)
            return
        side = r.choice(live)
        units = self.units[side.disk]
        first = r.randrange(units)
        last = min(first + r.choice([1, 2, 7, 30, 300]), units)
        try:
            if r.random() < 0.1:
                self.look_at_status(side, first, last)
            else:
                self.read_units(side, first, last)
        except cbwcore.SnapshotBrokenError as e:
            if (
                not side.may_break
                or e.errno != errno.EACCES
                or not isinstance(e.__cause__, cbwcore.CopyBeforeWriteError)
            ):
                raise
            self.check_refusal(e.__cause__)
            side.broken += 1
            self.count["reads of broken"] += 1
        except cbwcore.SnapshotAccessError:
            wanted = self.clusters(side, first, last)
            if not (wanted & side.giving_up or (side.scope is not None and wanted - side.scope)):
                raise
            self.count["reads outside"] += 1
        except ValueError:
            if not side.closing:
                raise
        except OSError as e:
            if e.errno not in (SOURCE_ERROR, TARGET_READ_ERROR):
                raise
            self.count["snapshot read errors"] += 1

    def clusters(self, side: Side, first: int, last: int) -> set[int]:
        c = side.snap.cluster_size
        return set(range(first * self.unit // c, (last * self.unit - 1) // c + 1))

    def read_units(self, side: Side, first: int, last: int) -> None:
        """Read, and note what T0 holds there; a byte that differs from an earlier read is not T0."""
        gone = set(side.given_up)
        data = side.snap.pread((last - first) * self.unit, first * self.unit)
        wanted = self.clusters(side, first, last)
        if wanted & gone or (side.scope is not None and wanted - side.scope):
            raise WrongError(f"snapshot {side.options}: units {first}..{last} were read, though outside or discarded")
        got = np.array(
            [self.parse(side.disk, first + i, data[i * self.unit : (i + 1) * self.unit]) for i in range(last - first)]
        )
        with side.lock:
            seen = side.seen[first:last]
            differ = np.flatnonzero((seen != -2) & (seen != got))
            if len(differ):
                i = int(differ[0])
                raise WrongError(f"snapshot {side.options}: unit {first + i} read {seen[i]} before and {got[i]} now")
            side.seen[first:last] = got
        self.count["snapshot reads"] += 1

    def look_at_status(self, side: Side, first: int, last: int) -> None:
        """What is called zero is zero at T0 (R20)."""
        at = first * self.unit
        for e in side.snap.block_status(at, (last - first) * self.unit):
            if e.offset != at or e.length <= 0:
                raise WrongError(f"extents do not follow each other: {e} at {at}")
            at += e.length
            inside = range(-(-e.offset // self.unit), (e.offset + e.length) // self.unit)
            if e.zero and len(inside):
                with side.lock:
                    seen = side.seen[inside.start : inside.stop]
                    if ((seen != -2) & (seen != ZERO)).any():
                        raise WrongError(f"snapshot {side.options}: {e} is called zero and was read as data")
                    side.seen[inside.start : inside.stop] = ZERO
        if at != last * self.unit:
            raise WrongError(f"extents end at {at}, not {last * self.unit}")
        self.count["status"] += 1

    # ---- the operator ----

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No writer is in a request."""
        with contextlib.ExitStack() as stack:
            for turn in self.turns:
                stack.enter_context(turn)
            yield

    def position(self) -> list[int]:
        """How many requests of each writer have ended."""
        out = []
        for log in self.logs:
            n = len(log)
            out.append(n - 1 if n and log[n - 1].state is None else n)
        return out

    def operate(self, r: random.Random) -> None:
        """Take a snapshot or a group, let it live a while, change it, check it, close it."""
        which = r.choice([[0], [1], [0, 1], [0, 1]])
        sides, lower, upper = self.take(which, r)
        self.live = [*self.live, *sides]
        end = time.monotonic() + r.choice([0.0, 0.02, 0.1, 0.3])
        while time.monotonic() < end and not self.stop.is_set():
            for side in sides:
                self.meddle(side, r)
            time.sleep(0.005)
        for side in sides:
            side.plan.release()
            if not self.stop.is_set() and r.random() < 0.6:
                self.read_all(side)
        for side in sides:
            side.closing = True
        for side in r.sample(sides, len(sides)):
            if side.snap.state == "broken":
                self.count["broken"] += 1
                if not side.may_break:
                    raise WrongError(f"{side.options} broke: {side.snap.error!r}")
            stats = side.snap.stats()
            if side.options["target_limit"] is not None and stats.target_bytes > side.options["target_limit"]:
                raise WrongError(f"{side.options}: {stats}")
            if not stats.wait_seconds >= stats.longest_wait >= 0:
                raise WrongError(f"{stats}")
            side.snap.close()
        self.live = [s for s in self.live if s not in sides]
        self.judge(sides, lower, upper)
        self.count["snapshots"] += len(sides)

    def take(self, which: list[int], r: random.Random) -> tuple[list[Side], list[int], list[int]]:
        """Arm, and know between which requests T0 lies."""
        options: dict[str, Any] = {
            "on_cbw_error": r.choice(["break-guest-write", "break-snapshot"]),
            "cbw_timeout": r.choice([0.0, 0.0, 0.003, 0.05, 30.0]),
            "cluster_size": r.choice([4096, 4096, 16384, 65536, 262144]),
            "target_limit": r.choice([None, None, None, None, 200_000]),
        }
        cbwcore.limits.copy_bytes = r.choice([4096, 65536, 1 << 20])
        cbwcore.limits.copies = r.choice([1, 2, 64])
        scope: set[int] | None = None
        bitmap = None
        if len(which) == 1 and r.random() < 0.3:
            clusters = -(-self.sizes[which[0]] // options["cluster_size"])
            bitmap = np.array([r.random() < 0.7 for _ in range(clusters)])
            scope = set(np.flatnonzero(bitmap).tolist())
        pairs = [(self.disks[d], self.target(d, r)) for d in which]
        plans: list[FaultPlan] = []
        attach = cbwcore.Snapshot._attach

        def attach_and_inject(snap: cbwcore.Snapshot, *args: Any) -> None:
            attach(snap, *args)
            plans.append(FaultPlan())
            snap._inject(plans[-1])

        cbwcore.Snapshot._attach = attach_and_inject
        try:
            with self.paused() if r.random() < 0.4 else contextlib.nullcontext():
                lower = self.position()
                snaps = cbwcore.snapshot_group(pairs, bitmap=bitmap, **options)
                upper = [len(log) for log in self.logs]
        finally:
            del cbwcore.Snapshot._attach
            for _, target in pairs:
                if target is not None:
                    os.unlink(target)  # it lives as long as it is open
        self.count["exact T0" if lower == upper else "bounded T0"] += 1
        sides = [Side(s, d, p, self.units[d], scope, options) for s, d, p in zip(snaps, which, plans, strict=True)]
        return sides, lower, upper

    def target(self, d: int, r: random.Random) -> str | None:
        kind = r.choice(["unnamed", "new", "garbage"])
        if kind == "unnamed":
            return None
        path = os.path.join(self.dir, f"target{d}")
        if kind == "garbage":
            with open(path, "wb") as f:
                f.write(b"\xee" * (self.sizes[d] + r.choice([0, 5000])))
        return path

    def meddle(self, side: Side, r: random.Random) -> None:
        what = r.choice(["fault", "fault", "fault", "release", "discard", "policy", "timeout", "stats"])
        if what == "fault":
            side.plan.release()
            kind = r.randrange(5)
            start = r.randrange(self.sizes[side.disk])
            if kind == 0:
                side.plan.error("pwrite", TARGET_ERROR, skip=r.randrange(3), times=r.randint(1, 3))
            elif kind == 1:
                side.plan.delay("pwrite", r.choice([0.0005, 0.004, 0.02]), times=r.randint(1, 20))
            elif kind == 2:
                side.plan.short("pwrite", PAGE, times=r.randint(1, 20))
                side.plan.short("pread", 2 * PAGE, times=r.randint(1, 20))
            elif kind == 3:
                side.plan.error("pread", TARGET_READ_ERROR, start=start, end=start + 20_000, times=2)
            else:
                side.plan.delay("pread", 0.003, times=3)
        elif what == "release":
            side.plan.release()
        elif what == "discard" and r.random() < 0.3:
            first = r.randrange(self.units[side.disk])
            last = min(first + r.randrange(200), self.units[side.disk])
            c = side.snap.cluster_size
            gone = {
                i
                for i in self.clusters(side, first, last)
                if last > first
                and first * self.unit <= i * c
                and min((i + 1) * c, self.sizes[side.disk]) <= last * self.unit
            }
            side.giving_up |= gone
            with contextlib.suppress(cbwcore.SnapshotBrokenError):
                side.snap.discard(first * self.unit, (last - first) * self.unit)
                side.given_up |= gone
        elif what == "policy":
            policy = r.choice(["break-guest-write", "break-snapshot"])
            side.may_break = side.may_break or policy == "break-snapshot"
            side.snap.on_cbw_error = policy
        elif what == "timeout":
            side.snap.cbw_timeout = r.choice([0.0, 0.002, 0.1, 1e9])
        else:
            side.snap.stats()

    def read_all(self, side: Side) -> None:
        """The backup: every cluster that can be read, whole; each read is tried again past injected disk faults."""
        per_unit = side.snap.cluster_size // self.unit + 1
        for first in range(0, self.units[side.disk], per_unit):
            last = min(first + per_unit, self.units[side.disk])
            wanted = self.clusters(side, first, last)
            if wanted & side.giving_up or (side.scope is not None and wanted - side.scope):
                continue
            for _ in range(1000):
                try:
                    self.read_units(side, first, last)
                    break
                except cbwcore.SnapshotBrokenError:
                    if not side.may_break:
                        raise
                    return
                except OSError as e:
                    if e.errno not in (SOURCE_ERROR, TARGET_READ_ERROR):
                        raise
                    self.plans[side.disk].release()
            else:
                raise WrongError("a snapshot read failed 1000 times")
        self.count["backups"] += 1

    # ---- the judgement ----

    def judge(self, sides: list[Side], lower: list[int], upper: list[int]) -> None:
        """For each writer, one moment of its log explains every byte that was read of the whole group."""
        for w in range(self.writers):
            self.apply(w, self.base[w], self.base_at[w], lower[w])
            self.base_at[w] = lower[w]
            held = [a.copy() for a in self.base[w]]
            at = lower[w]
            first = wrong = self.differs(w, held, sides)
            while wrong is not None and at < upper[w]:
                self.apply(w, held, at, at + 1)
                at += 1
                wrong = self.differs(w, held, sides)
            if wrong is not None:
                raise WrongError(
                    f"no T0 of writer {w} in its requests {lower[w]}..{upper[w]} explains snapshot {sides[0].options}: "
                    f"after the first, {first}; after the last, {wrong}"
                )
            self.count["requests between the bounds"] += upper[w] - lower[w]
        for side in sides:
            self.count["units proven"] += int((side.seen != -2).sum())

    def differs(self, w: int, held: list[np.ndarray], sides: list[Side]) -> str | None:
        for side in sides:
            expected = held[side.disk]
            mine = (self.owner[side.disk] == w) & (side.seen != -2) & (expected != UNKNOWN)
            bad = np.flatnonzero(mine & (side.seen != expected))
            if len(bad):
                i = int(bad[0])
                where = f"disk {side.disk} unit {i} (byte {i * self.unit})"
                return f"{where} was read as {side.seen[i]}, not {expected[i]}; {len(bad)} such"
        return None

    def settle(self) -> None:
        """Every writer's last word is on the disk: no guest write was lost, none that was refused came through."""
        for d in range(DISKS):
            data = self.disks[d].pread(self.sizes[d], 0)
            got = np.array([self.parse(d, i, data[i * self.unit : (i + 1) * self.unit]) for i in range(self.units[d])])
            for w in range(self.writers):
                expected = self.now[w][d]
                bad = np.flatnonzero((self.owner[d] == w) & (expected != UNKNOWN) & (got != expected))
                if len(bad):
                    i = int(bad[0])
                    raise WrongError(f"disk {d} unit {i}: {got[i]}, writer {w} left {expected[i]}; {len(bad)} such")
            if any(data[self.units[d] * self.unit :]):
                raise WrongError(f"disk {d}: bytes past the last unit were written")
        if self.verbose:
            print(self.replay(), file=sys.stderr)

    # ---- the saboteur ----

    def sabotage(self, r: random.Random) -> None:
        """Faults of the disks, now and then."""
        time.sleep(r.choice([0.001, 0.01, 0.05]))
        d = r.randrange(DISKS)
        plan = self.plans[d]
        plan.release()
        kind = r.randrange(8)
        start = r.randrange(self.sizes[d])
        if kind == 0:
            plan.error("pread", SOURCE_ERROR, start=start, end=start + r.choice([1, 70_000]), times=r.randint(1, 4))
        elif kind == 1:
            plan.error("pwrite", DISK_ERROR, times=r.randint(1, 3))
        elif kind == 2:
            plan.delay("pread", r.choice([0.0005, 0.003, 0.01]), times=r.randint(1, 10))
        elif kind == 3:
            plan.delay("pwrite", r.choice([0.0005, 0.003]), times=r.randint(1, 10))
        elif kind == 4:
            plan.short("pread", PAGE, times=50)
            plan.short("pwrite", PAGE, times=50)
        elif kind == 5:
            for op in ("pread", "pwrite", "zero", "discard"):
                plan.error(op, r.choice([errno.EINTR, errno.EAGAIN]), times=3)
        elif kind == 6:
            plan.error("zero", errno.EOPNOTSUPP, times=5)
        self.count["sabotage"] += 1


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=int(os.environ.get("CBWCORE_SEED") or random.randrange(2**32)))
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--unit", type=int, default=512)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--readers", type=int, default=3)
    a = parser.parse_args()
    faulthandler.enable()
    faulthandler.dump_traceback_later(a.seconds + 120, exit=True)
    Oracle(a.seed, a.seconds, direct=a.direct, unit=a.unit, writers=a.writers, readers=a.readers, verbose=True).run()
    return 0


if __name__ == "__main__":
    import logging

    logging.disable(logging.ERROR)
    sys.exit(main())
