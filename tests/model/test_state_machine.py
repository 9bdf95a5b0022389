"""The engine against a plain bytearray, one request at a time.

The model knows what a disk, its snapshots and its bitmaps must say after every step: what the guest gets (done, or
which error with which errno), the disk's bytes, each byte of each snapshot or the error in its place, the states, the
maps and the counters. What a rule of DESIGN.md leaves open (which clusters a refused write had already copied) is taken
over from the core within the bounds that the rule sets. Threads are in tests/concurrency.
"""

# ruff: noqa: PT017  (whether there is an error is what the model says, not the test)

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import tempfile
import threading
import time
from typing import Any

import bitarray
import numpy as np
import pytest
from engine_support import targets_behind
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import cbwcore
from cbwcore._cbwcore import FaultPlan

PLACE = os.environ.get("CBWCORE_TEST_DIR") or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
PAGE = 4096
CLUSTERS = [4096, 8192, 16384, 65536, 262144]
SIZES = [
    1,
    511,
    512,
    513,
    4095,
    4096,
    4097,
    5000,
    8191,
    12289,
    65535,
    65536,
    65537,
    3 * 65536 - 1,
    262143,
    262145,
    600_001,
]
ERRORS = [errno.EIO, errno.ENOSPC, errno.EREMOTEIO]

Range = tuple[int, int]


def pattern(n: int, seed: int) -> bytes:
    """n bytes: zeroes, one byte over and over, or noise."""
    if seed == 0:
        return bytes(n)
    return bytes([seed]) * n if seed < 8 else random.Random(seed).randbytes(n)


def overlap(a: Range, b: Range) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


class Snap:
    """What the model knows of one snapshot."""

    def __init__(self, snap: cbwcore.Snapshot, t0: bytes, scope: set[int], **facts: Any) -> None:
        self.snap = snap
        self.t0 = t0
        self.cluster = snap.cluster_size
        self.n = -(-len(t0) // self.cluster)
        self.need = set(scope)
        self.access = set(scope)
        self.done: set[int] = set()
        self.copied = 0  # bytes of every cluster that ever got done
        self.copied_zeroes = 0
        self.used = 0  # bytes of the target
        self.causes: set[tuple[int, str]] = set()  # what may have broken it
        self.broken = False
        self.guest_writes = 0
        self.held = 0  # guest writes that CBW held up
        self.held_known = True
        self.timeouts = 0
        self.told: list[Any] = []
        self.write_fault: tuple[int, Range] | None = None
        self.read_fault: int | None = None
        self.plan: FaultPlan = facts["plan"]
        self.policy: str = facts["policy"]
        self.limit: int | None = facts["limit"]
        self.target: str | None = facts["target"]
        self.is_new: bool = facts["is_new"]
        self.looks_for_holes: bool = facts["looks_for_holes"]
        self.copy_run: int = max(cbwcore.limits.copy_bytes, self.cluster)
        self.failed_copies = False
        self.nonzero = {c for c in range(self.n) if any(t0[c * self.cluster : (c + 1) * self.cluster])}

    def span(self, c: int) -> Range:
        return c * self.cluster, min((c + 1) * self.cluster, len(self.t0))

    def length(self, c: int) -> int:
        start, end = self.span(c)
        return end - start

    def touched(self, off: int, n: int) -> set[int]:
        return set(range(off // self.cluster, (off + n - 1) // self.cluster + 1)) if n else set()

    def mark(self, clusters: set[int]) -> None:
        """These were copied."""
        fresh = clusters - self.done
        self.done |= fresh
        self.copied += sum(map(self.length, fresh))
        self.copied_zeroes += sum(self.length(c) for c in fresh - self.nonzero)
        self.used += sum(self.length(c) for c in fresh & self.nonzero)

    def map(self, name: str) -> set[int]:
        return {i for i, bit in enumerate(self.snap._map(name)) if bit}


class Engine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.dir = tempfile.mkdtemp(prefix="cbw-model-", dir=PLACE)
        self.path = os.path.join(self.dir, "disk")
        self.counter = itertools.count()
        self.snaps: list[Snap] = []  # in the order in which they were taken
        self.bitmaps: dict[str, list[Any]] = {}  # name -> [bitmap, must be set, may be set]
        self.disk: cbwcore.Disk | None = None
        self.copy_bytes = cbwcore.limits.copy_bytes
        self.raw = -1

    # ---- opening and closing ----

    @initialize(
        size=st.one_of(st.sampled_from(SIZES), st.integers(1, 20_000), st.integers(1, 700_000)),
        direct=st.booleans(),
        seed=st.integers(0, 2**16),
        snapshots=st.integers(0, 3),
        data=st.data(),
    )
    def start(self, size: int, direct: bool, seed: int, snapshots: int, data: st.DataObject) -> None:
        """A disk with holes, zeroes and data, and most often a snapshot or more."""
        r = random.Random(seed)
        self.size = size
        with open(self.path, "wb") as f:
            f.truncate(size)
            for _ in range(r.randrange(5)):
                off = r.randrange(size)
                f.seek(off)
                f.write(pattern(r.randint(1, size - off), r.choice([0, 1, 99])))
        with open(self.path, "rb") as f:
            self.model = bytearray(f.read())
        assert len(self.model) == size
        self.open(direct)
        for _ in range(snapshots):
            self.take_one(data)

    def open(self, direct: bool) -> None:
        self.disk_fault: tuple[str, int, Range] | None = None
        self.submitted = self.submitted_bytes = self.age = 0
        try:
            self.disk = cbwcore.Disk(self.path, direct=direct)
        except cbwcore.ConfigError as e:
            if "O_DIRECT" not in str(e):
                raise
            direct = False
            self.disk = cbwcore.Disk(self.path)
        self.direct = direct
        self.align = self.disk._file.align
        self.direct_end = self.disk._file.direct_end
        self.plan = FaultPlan()
        self.disk._inject(self.plan)
        self.raw = os.open(self.path, os.O_RDONLY)

    def teardown(self) -> None:
        """Every snapshot that is still armed reads as T0 all over; then everything closes."""
        try:
            if self.disk is not None:
                self.plan.release()
                for s in self.snaps:
                    s.plan.release()
                    s.write_fault = s.read_fault = None
                self.disk_fault = None
                for s in self.snaps:
                    if not s.broken:
                        self.check_read(s, 0, self.size)
                        for c in sorted(s.access):
                            start, end = s.span(c)
                            assert s.snap.pread(end - start, start) == s.t0[start:end]
                self.disk.close()
                for s in self.snaps:
                    assert s.snap.state == "closed"
                with open(self.path, "rb") as f:
                    assert f.read() == self.model
        finally:
            cbwcore.limits.copy_bytes = self.copy_bytes
            if self.disk is not None:
                self.disk.close()
            if self.raw >= 0:
                os.close(self.raw)
            shutil.rmtree(self.dir)

    @precondition(lambda self: self.age >= 15)
    @rule(direct=st.booleans(), data=st.data())
    def reopen(self, direct: bool, data: st.DataObject) -> None:
        order = data.draw(st.permutations(self.snaps), label="closing order")
        for s in order[: data.draw(st.integers(0, len(order)), label="closed before the disk")]:
            s.snap.close()
        self.disk.close()
        for s in self.snaps:
            assert s.snap.state == "closed"
            with pytest.raises(ValueError, match="closed"):
                s.snap.pread(1, 0)
        with pytest.raises(ValueError, match="closed"):
            self.disk.pread(1, 0)
        with pytest.raises(ValueError, match="closed"):
            self.disk.pwrite(b"x", 0)
        os.close(self.raw)
        self.snaps.clear()
        self.bitmaps.clear()
        self.open(direct)

    # ---- what a range is ----

    def draw_range(self, data: st.DataObject, whole: bool = True) -> Range:
        """(offset, length): any, aligned, small, empty, the tail, all."""
        kind = data.draw(st.sampled_from(["any", "small", "page", "cluster", "tail", "empty", "all"]), label="range")
        if kind == "all" and whole:
            return 0, self.size
        if kind == "empty":
            return data.draw(st.integers(0, self.size)), 0
        if kind == "tail":
            n = data.draw(st.integers(1, min(self.size, 70_000)))
            return self.size - n, n
        unit = {"page": PAGE, "cluster": 65536}.get(kind, 1)
        off = data.draw(st.integers(0, (self.size - 1) // unit)) * unit
        most = self.size - off if kind == "any" else min(self.size - off, 3 * unit if unit > 1 else 600)
        n = data.draw(st.integers(1, most)) if unit == 1 else data.draw(st.sampled_from([unit, 2 * unit, 3 * unit]))
        return off, min(n, self.size - off)

    def io_ranges(self, off: int, n: int) -> list[Range]:
        """What a transfer of the disk touches: whole blocks where it is direct."""
        if not self.direct or n == 0:
            return [(off, off + n)] if n else []
        out = []
        if off < self.direct_end:
            end = min(off + n, self.direct_end)
            out.append((off - off % self.align, -(-end // self.align) * self.align))
        if off + n > self.direct_end:
            out.append((max(off, self.direct_end), off + n))
        return out

    def rmw_blocks(self, off: int, n: int) -> list[Range]:
        """The blocks that an unaligned write has to read (R13)."""
        if not self.direct or off >= self.direct_end:
            return []
        end = min(off + n, self.direct_end)
        return [(e - e % self.align, e - e % self.align + self.align) for e in (off, end) if e % self.align]

    def fault_hits(self, op: str, ranges: list[Range]) -> int:
        """The errno that an injected disk fault gives a transfer of these ranges; 0 for none."""
        if self.disk_fault is None or self.disk_fault[0] != op:
            return 0
        return self.disk_fault[1] if any(overlap(self.disk_fault[2], r) for r in ranges) else 0

    # ---- guest writes ----

    def is_hole(self, start: int, end: int) -> bool:
        try:
            return os.lseek(self.raw, start, os.SEEK_DATA) >= end
        except OSError as e:
            assert e.errno == errno.ENXIO
            return True

    def clusters_read(self, s: Snap, off: int, n: int) -> set[int]:
        """Of those that a guest write has copied: not those of a run that is known to be a hole throughout (R11)."""
        window = max(o.copy_run for o in self.snaps)
        runs: list[list[int]] = []
        for c in sorted((s.touched(off, n) & s.need) - s.done):
            goes_on = runs and runs[-1][-1] == c - 1 and c * s.cluster % window != 0
            if goes_on and len(runs[-1]) < s.copy_run // s.cluster:
                runs[-1].append(c)
            else:
                runs.append([c])
        skipped = [run for run in runs if s.looks_for_holes and self.is_hole(s.span(run[0])[0], s.span(run[-1])[1])]
        return {c for run in runs if run not in skipped for c in run}

    def failures(self, s: Snap, off: int, n: int) -> set[tuple[int, str]]:
        """Why copying for a guest write must fail for this snapshot; empty: it succeeds."""
        wanted = (s.touched(off, n) & s.need) - s.done
        out = set()
        for c in self.clusters_read(s, off, n):
            code = self.fault_hits("pread", [s.span(c)])
            if code:
                out.add((code, "source-read"))
        for c in wanted:
            if s.write_fault and c in s.nonzero and overlap(s.write_fault[1], s.span(c)):
                out.add((s.write_fault[0], "target-write"))
        if s.limit is not None and s.used + sum(s.length(c) for c in wanted & s.nonzero) > s.limit:
            out.add((errno.ENOSPC, "target-write"))
        return out

    def guest(
        self, op: str, off: int, n: int, call: Any, new: bytes, submit: tuple[int, bool], transient: bool = False
    ) -> None:
        """One guest write: `new` are the bytes it leaves. `submit`: (errno of the disk's own failure, whether the range
        may then be partly written). `transient`: the faults are gone after it."""
        armed = [s for s in self.snaps if not s.broken]
        fails = {id(s): self.failures(s, off, n) for s in armed} if n else {}
        refusing = [s for s in armed if fails.get(id(s)) and s.policy == "break-guest-write"]
        error: OSError | None = None
        try:
            call()
        except OSError as e:
            error = e
        refused = isinstance(error, cbwcore.CopyBeforeWriteError)
        if refusing:
            assert refused, f"{op} got {error!r}, but copying for it must fail: {fails}"
            assert (error.errno, error.operation) in set().union(*(fails[id(s)] for s in refusing))
            assert any(
                overlap((error.offset, error.offset + error.length), s.span(c))
                for s in refusing
                for c in s.touched(off, n)
            )
        elif n and submit[0]:
            assert error is not None, f"{op} must fail"
            assert not refused
            assert error.errno == submit[0], f"{op} got {error!r}"
        else:
            assert error is None, f"{op} of {n} at {off} failed: {error!r}"
        for s in armed:
            self.passed(s, off, n, fails.get(id(s), set()), refused)
        self.record(off, n, refused)
        if n and not refused:
            self.submitted += 1
            self.submitted_bytes += n
            for s in self.snaps:
                s.guest_writes += 1
        self.age += 1
        old = bytes(self.model[off : off + n])
        if error is None:
            self.model[off : off + n] = new
        elif not refused and submit[1]:
            got = os.pread(self.raw, n, off)
            assert all(g in (o, w) for g, o, w in zip(got, old, new, strict=True))
            self.model[off : off + n] = got
        self.check_disk()
        if transient:
            self.healthy()
        for s in self.snaps:
            self.check_read(s, max(off - 700, 0), min(off + n + 700, self.size) - max(off - 700, 0))

    def passed(self, s: Snap, off: int, n: int, fails: set[tuple[int, str]], refused: bool) -> None:
        """Move the maps of one snapshot over a guest write, and compare them."""
        touched = s.touched(off, n) & s.need
        done, need = s.map("done"), s.map("need")
        if fails:
            s.failed_copies = True
        if fails and s.policy == "break-snapshot" and (not refused or s.snap.state == "broken"):
            assert s.snap.state == "broken", f"{fails} must break it"
            s.broken = True
            s.causes = fails
            return
        if touched:
            s.held += 1
        if refused:
            assert s.done <= done <= s.done | touched
            assert s.need - touched <= need <= s.need
            assert s.need - need <= done, "need was cleared without a copy"
            s.held_known = False
            s.mark(done - s.done)
            s.need = need
        else:
            s.mark(touched)
            s.need -= touched
        assert done == s.done
        assert need == s.need

    def record(self, off: int, n: int, refused: bool) -> None:
        for entry in self.bitmaps.values():
            bitmap, must, may = entry
            if bitmap.enabled and n:
                bits = set(range(off // bitmap.granularity, (off + n - 1) // bitmap.granularity + 1))
                may |= bits
                if not refused:
                    must |= bits

    def check_disk(self) -> None:
        got = os.pread(self.raw, self.size + 1, 0)
        if got != self.model:
            at = next(i for i, (a, b) in enumerate(itertools.zip_longest(got, self.model)) if a != b)
            raise AssertionError(f"the disk differs from the model from byte {at} on")

    def submit_fault(self, op: str, off: int, n: int, zeroes: bool = False) -> tuple[int, bool]:
        if op == "pwrite":
            return self.fault_hits("pwrite", self.io_ranges(off, n)) or self.fault_hits(
                "pread", self.rmw_blocks(off, n)
            ), zeroes
        return self.fault_hits(op, [(off, off + n)]), False

    @rule(data=st.data(), seed=st.integers(0, 255), fua=st.booleans())
    def write(self, data: st.DataObject, seed: int, fua: bool) -> None:
        off, n = self.draw_range(data)
        new = pattern(n, seed)
        self.guest(
            "write", off, n, lambda: self.disk.pwrite(new, off, fua=fua), new, self.submit_fault("pwrite", off, n)
        )

    @precondition(lambda self: any(not s.broken and s.need for s in self.snaps))
    @rule(data=st.data(), seed=st.integers(0, 255))
    def write_needed(self, data: st.DataObject, seed: int) -> None:
        """A write that touches a cluster which a snapshot still needs."""
        s = data.draw(st.sampled_from([s for s in self.snaps if not s.broken and s.need]))
        start, end = s.span(data.draw(st.sampled_from(sorted(s.need)), label="cluster"))
        off = data.draw(st.integers(start, end - 1))
        n = data.draw(st.integers(1, min(self.size - off, 3 * s.cluster)))
        new = pattern(n, seed)
        self.guest("write", off, n, lambda: self.disk.pwrite(new, off), new, self.submit_fault("pwrite", off, n))

    @rule(data=st.data(), may_unmap=st.booleans(), fua=st.booleans())
    def write_zeroes(self, data: st.DataObject, may_unmap: bool, fua: bool) -> None:
        off, n = self.draw_range(data)
        a = self.align
        first, last = -(-off // a) * a, (off + n) // a * a
        partly = (0, False)
        if n and self.disk_fault is not None:
            # what fallocate takes, fails or leaves to plain writes depends on the file system: see which
            kind, code, _ = self.disk_fault
            if kind == "zero" and code != errno.EOPNOTSUPP and first < last:
                partly = code, False
            elif kind in ("pwrite", "pread"):
                return self.write_zeroes_past_fault(off, n, may_unmap)
        self.guest(
            "write zeroes",
            off,
            n,
            lambda: self.disk.pwrite_zeroes(off, n, may_unmap=may_unmap, fua=fua),
            bytes(n),
            partly,
        )
        return None

    def write_zeroes_past_fault(self, off: int, n: int, may_unmap: bool) -> None:
        """Whether plain writes are needed is the file system's to say: either outcome, but nothing unseen."""
        pieces = [(off, off + n), *self.rmw_blocks(off, n)]
        hit = self.fault_hits("pwrite", pieces) or self.fault_hits("pread", pieces)
        if not hit or any(
            self.failures(s, off, n) and s.policy == "break-guest-write" for s in self.snaps if not s.broken
        ):
            return self.guest(
                "write zeroes",
                off,
                n,
                lambda: self.disk.pwrite_zeroes(off, n, may_unmap=may_unmap),
                bytes(n),
                (0, False),
            )
        outcome: list[int] = [0, True]

        def call() -> None:
            try:
                self.disk.pwrite_zeroes(off, n, may_unmap=may_unmap)
            except OSError as e:
                outcome[0] = e.errno
                raise

        class Outcome(tuple):
            """The errno that came, where it is the injected one."""

            def __getitem__(self, i: Any) -> Any:
                return (outcome[0] if outcome[0] == hit else 0, True)[i]

        return self.guest("write zeroes", off, n, call, bytes(n), Outcome())

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        off, n = self.draw_range(data)
        a = self.align
        first, last = -(-off // a) * a, (off + n) // a * a
        new = bytearray(self.model[off : off + n])
        if first < last and not (self.disk_fault and self.disk_fault[:2] == ("discard", errno.EOPNOTSUPP)):
            new[first - off : last - off] = bytes(last - first)
        code = self.submit_fault("discard", off, n)[0] if first < last else 0
        self.guest(
            "discard",
            off,
            n,
            lambda: self.disk.discard(off, n),
            bytes(new),
            (0 if code == errno.EOPNOTSUPP else code, False),
        )

    @rule()
    def flush(self) -> None:
        self.disk.flush()

    # ---- guest reads ----

    @rule(data=st.data(), into=st.booleans())
    def read(self, data: st.DataObject, into: bool) -> None:
        off, n = self.draw_range(data)
        code = self.fault_hits("pread", self.io_ranges(off, n))
        got = bytearray(n)
        try:
            if into:
                self.disk.pread_into(got, off)
            else:
                got[:] = self.disk.pread(n, off)
        except OSError as e:
            assert e.errno == code
            assert e.filename == self.path
        else:
            assert code == 0
            assert got == self.model[off : off + n]

    @rule(data=st.data())
    def status(self, data: st.DataObject) -> None:
        off, n = self.draw_range(data)
        extents = list(self.disk.block_status(off, n))
        self.check_cover(extents, off, n)
        for e in extents:
            assert e.access
            assert e.data != e.zero
            assert not e.zero or not any(self.model[e.offset : e.offset + e.length])

    @staticmethod
    def check_cover(extents: list[cbwcore.Extent], off: int, n: int) -> None:
        assert sum(e.length for e in extents) == n
        at = off
        for e in extents:
            assert e.offset == at
            assert e.length > 0
            at += e.length
        assert all(a[2:] != b[2:] for a, b in itertools.pairwise(extents)), "neighbours of one status are joined"

    # ---- snapshots ----

    def draw_scope(self, data: st.DataObject, cluster: int) -> tuple[Any, set[int] | None]:
        n = -(-self.size // cluster)
        kind = data.draw(st.sampled_from(["none", "none", "none", "dirty", "bitarray", "numpy", "own"]), label="scope")
        if kind == "none" or (kind == "own" and not self.bitmaps):
            return None, None
        if kind == "own":
            name = data.draw(st.sampled_from(sorted(self.bitmaps)))
            bitmap, must, _ = self.bitmaps[name]
            return (name if data.draw(st.booleans()) else bitmap), self.rounded(must, bitmap.granularity, cluster)
        if kind == "dirty":
            bitmap = cbwcore.DirtyBitmap(
                self.size, data.draw(st.sampled_from([512, 4096, 16384, 65536, 1 << 20]), label="granularity")
            )
            for _ in range(data.draw(st.integers(0, 4))):
                bitmap.set_range(*self.draw_range(data))
            bits = {
                b
                for o, length in bitmap.ranges()
                for b in range(o // bitmap.granularity, -(-(o + length) // bitmap.granularity))
            }
            return bitmap, self.rounded(bits, bitmap.granularity, cluster)
        scope = set(data.draw(st.lists(st.integers(0, n - 1), max_size=8), label="clusters")) or set(range(0, n, 2))
        if kind == "numpy":
            bools = np.zeros(n, dtype=np.bool_)
            bools[sorted(scope)] = True
            return bools, scope
        bits = bitarray.bitarray(n, endian=data.draw(st.sampled_from(["little", "big"])))
        bits.setall(0)
        for c in scope:
            bits[c] = 1
        return bits, scope

    def rounded(self, bits: set[int], granularity: int, cluster: int) -> set[int]:
        """Clusters that touch a granule of `bits` (R4)."""
        out: set[int] = set()
        for b in bits:
            start, end = b * granularity, min((b + 1) * granularity, self.size)
            out |= set(range(start // cluster, (end - 1) // cluster + 1))
        return out

    def make_target(self, kind: str, seed: int) -> tuple[str | None, bool]:
        if kind == "unnamed":
            return None, True
        path = os.path.join(self.dir, f"target{next(self.counter)}")
        if kind == "new":
            return path, True
        more = 0 if kind == "garbage" else 1 + seed * 37
        with open(path, "wb") as f:
            f.truncate(self.size + more)
            if seed % 3:
                f.write(pattern(self.size + more, 8 + seed))
        return path, False

    @precondition(lambda self: len(self.snaps) < 4)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        self.take_one(data)

    @precondition(lambda self: not any(not s.broken for s in self.snaps))
    @rule(data=st.data())
    def take_again(self, data: st.DataObject) -> None:
        """Where none is armed, be more eager."""
        while len(self.snaps) >= 4:
            self.snaps.pop(0).snap.close()
        self.take_one(data)

    def take_one(self, data: st.DataObject) -> None:
        cluster = data.draw(st.sampled_from(CLUSTERS), label="cluster_size")
        policy = data.draw(st.sampled_from(["break-guest-write", "break-snapshot"]), label="policy")
        kind = data.draw(st.sampled_from(["unnamed", "new", "garbage", "larger"]), label="target")
        seed = data.draw(st.integers(0, 200), label="seed")
        limited = data.draw(
            st.sampled_from([None, None, None, None, 0, 4096, 10_000, 65536, 300_000]), label="target_limit"
        )
        timeout = data.draw(st.sampled_from([0.0, 0.0, 60.0, 1e12]), label="cbw_timeout")
        copy_bytes = data.draw(st.sampled_from([4096, 16384, 65536, 1 << 20]), label="copy_bytes")
        bitmap, scope = self.draw_scope(data, cluster)
        target, is_new = self.make_target(kind, seed)
        cbwcore.limits.copy_bytes = copy_bytes
        looks_for_holes = os.fstat(self.raw).st_blocks * 512 < self.size
        told: list[Any] = []
        with targets_behind(plan := FaultPlan()):
            snap = self.disk.snapshot(
                target,
                name=f"s{seed}",
                bitmap=bitmap,
                on_cbw_error=policy,
                cbw_timeout=timeout,
                cluster_size=cluster,
                target_limit=limited,
                on_break=told.append,
            )
        s = Snap(
            snap,
            bytes(self.model),
            set(range(-(-self.size // cluster))) if scope is None else scope,
            plan=plan,
            policy=policy,
            limit=limited,
            target=target,
            is_new=is_new,
            looks_for_holes=looks_for_holes,
        )
        s.told = told
        assert s.map("need") == s.map("access") == s.need
        self.snaps.append(s)

    def some(self, data: st.DataObject) -> Snap:
        return data.draw(st.sampled_from(self.snaps), label="snapshot")

    def expected_read(self, s: Snap, off: int, n: int) -> tuple[type | None, int]:
        """The error of a snapshot read, with its errno; (None, 0) for none."""
        if s.broken:
            return cbwcore.SnapshotBrokenError, errno.EACCES
        for c in sorted(s.touched(off, n)):
            start, end = max(s.span(c)[0], off), min(s.span(c)[1], off + n)
            if c not in s.access:
                return cbwcore.SnapshotAccessError, errno.EACCES
            code = s.read_fault if c in s.done else self.fault_hits("pread", self.io_ranges(start, end - start))
            if code:
                return OSError, code
        return None, 0

    def check_read(self, s: Snap, off: int, n: int) -> None:
        kind, code = self.expected_read(s, off, n)
        try:
            got = s.snap.pread(n, off)
        except OSError as e:
            assert kind is not None, f"snapshot read of {n} at {off}: {e!r}"
            assert type(e) is kind
            assert e.errno == code
            if s.broken:
                assert isinstance(e.__cause__, cbwcore.CopyBeforeWriteError)
                assert (e.__cause__.errno, e.__cause__.operation) in s.causes
        else:
            assert kind is None, f"snapshot read of {n} at {off} gave data, not {kind}"
            assert got == s.t0[off : off + n], f"snapshot read of {n} at {off} is not T0"

    @precondition(lambda self: self.snaps)
    @rule(data=st.data())
    def snapshot_read(self, data: st.DataObject) -> None:
        s = self.some(data)
        self.check_read(s, *self.draw_range(data))

    @precondition(lambda self: self.snaps)
    @rule(data=st.data())
    def snapshot_file(self, data: st.DataObject) -> None:
        s = self.some(data)
        off, n = self.draw_range(data)
        if self.expected_read(s, off, n)[0]:
            return
        with s.snap.open() as f:
            f.seek(off)
            got = b""
            while len(got) < n:
                part = f.read(n - len(got))
                assert part
                got += part
            assert got == s.t0[off : off + n]

    @precondition(lambda self: self.snaps)
    @rule(data=st.data())
    def snapshot_status(self, data: st.DataObject) -> None:
        s = self.some(data)
        off, n = self.draw_range(data)
        if s.broken:
            if n:
                with pytest.raises(cbwcore.SnapshotBrokenError):
                    list(s.snap.block_status(off, n))
            return
        extents = list(s.snap.block_status(off, n))
        self.check_cover(extents, off, n)
        for e in extents:
            inside = {c in s.access for c in s.touched(e.offset, e.length)}
            assert inside == {e.access}
            assert e.data == (e.access and not e.zero)
            assert not e.zero or (e.access and not any(s.t0[e.offset : e.offset + e.length]))

    @precondition(lambda self: self.snaps)
    @rule(data=st.data())
    def snapshot_discard(self, data: st.DataObject) -> None:
        s = self.some(data)
        off, n = self.draw_range(data)
        if s.broken:
            with pytest.raises(cbwcore.SnapshotBrokenError):
                s.snap.discard(off, n)
            return
        s.snap.discard(off, n)
        gone = {c for c in s.touched(off, n) if off <= s.span(c)[0] and s.span(c)[1] <= off + n}
        s.access -= gone
        s.need -= gone
        s.used -= sum(s.length(c) for c in gone & s.done & s.nonzero)
        s.done -= gone
        assert s.map("access") == s.access
        assert s.map("need") == s.need
        assert s.map("done") == s.done

    @precondition(lambda self: len(self.snaps) > 1)
    @rule(data=st.data())
    def snapshot_close(self, data: st.DataObject) -> None:
        s = self.some(data)
        error = s.snap.error
        s.snap.close()
        s.snap.close()
        self.snaps.remove(s)
        assert s.snap.state == "closed"
        assert repr(s.snap.error) == repr(error)
        for call in (
            lambda: s.snap.pread(0, 0),
            lambda: list(s.snap.block_status()),
            lambda: s.snap.discard(0, 0),
            s.snap.stats,
            s.snap.open,
        ):
            with pytest.raises(ValueError, match="closed"):
                call()

    @precondition(lambda self: self.snaps)
    @rule(
        data=st.data(),
        policy=st.sampled_from(["break-guest-write", "break-snapshot"]),
        timeout=st.sampled_from([0.0, 60.0]),
    )
    def change(self, data: st.DataObject, policy: str, timeout: float) -> None:
        s = self.some(data)
        s.snap.on_cbw_error = policy
        s.snap.cbw_timeout = timeout
        s.policy = policy
        assert s.snap.on_cbw_error == policy
        assert s.snap.cbw_timeout == timeout

    # ---- faults ----

    def draw_fault_range(self, data: st.DataObject) -> Range:
        if data.draw(st.booleans()):
            return 0, 2**62
        off, n = self.draw_range(data)
        return off, off + max(n, 1)

    @rule(data=st.data(), op=st.sampled_from(["pread", "pwrite", "zero", "discard"]), code=st.sampled_from(ERRORS))
    def break_disk(self, data: st.DataObject, op: str, code: int) -> None:
        """A lasting fault of the disk. A short write that then fails may leave anything, so writes fail whole."""
        where = self.draw_fault_range(data) if op == "pread" else (0, 2**62)
        if op in ("zero", "discard") and data.draw(st.booleans()):
            code = errno.EOPNOTSUPP
        self.plan.release()
        self.plan.error(op, code, start=where[0], end=where[1])
        self.disk_fault = op, code, where

    @rule(
        op=st.sampled_from(["pread", "pwrite"]),
        pages=st.integers(1, 20),
        code=st.sampled_from([errno.EINTR, errno.EAGAIN]),
    )
    def hinder_disk(self, op: str, pages: int, code: int) -> None:
        """Short transfers and interruptions: no one may notice (R12)."""
        self.plan.release()
        self.disk_fault = None
        self.plan.error(op, code, times=2)
        self.plan.short(op, pages * PAGE if self.direct else pages * 997)

    @precondition(lambda self: self.snaps)
    @rule(data=st.data(), code=st.sampled_from(ERRORS), short=st.booleans())
    def break_target(self, data: st.DataObject, code: int, short: bool) -> None:
        s = self.some(data)
        if self.direct and not s.is_new:
            return  # an unaligned tail in a larger target is read and written in ways that are its own affair
        s.plan.release()
        s.write_fault = s.read_fault = None
        if short:
            s.plan.short("pwrite", 5 * PAGE)
            s.plan.short("pread", 3 * PAGE)
        elif data.draw(st.booleans(), label="reads fail"):
            s.plan.error("pread", code)
            s.read_fault = code
        else:
            where = self.draw_fault_range(data)
            s.plan.error("pwrite", code, start=where[0], end=where[1])
            s.write_fault = code, where

    @rule()
    def repair(self) -> None:
        self.plan.release()
        self.disk_fault = None
        for s in self.snaps:
            s.plan.release()
            s.write_fault = s.read_fault = None

    def healthy(self) -> None:
        self.repair()
        assert not any(s.write_fault or s.read_fault for s in self.snaps)

    @precondition(lambda self: len(self.snaps) == 1 and not self.snaps[0].broken)  # several share reads, and retry them
    @rule(data=st.data(), source=st.booleans(), code=st.sampled_from(ERRORS), seed=st.integers(1, 255))
    def write_past_transient_fault(self, data: st.DataObject, source: bool, code: int, seed: int) -> None:
        """One call fails; the same write passes when it is tried again (R9), or has broken the snapshot (R7)."""
        self.healthy()
        s = self.snaps[0]
        off, n = self.draw_range(data)
        wanted = (s.touched(off, n) & s.need) - s.done
        if not (self.clusters_read(s, off, n) if source else wanted & s.nonzero) or self.failures(s, off, n):
            return
        if source:
            self.plan.error("pread", code, times=1)
            self.disk_fault = "pread", code, (0, 2**62)
        else:
            s.plan.error("pwrite", code, times=1)
            s.write_fault = code, (0, 2**62)
        new = pattern(n, seed)
        policy = s.policy
        if policy == "break-snapshot" and source and self.rmw_blocks(off, n):
            self.healthy()  # the second read of the same call is the guest's own
            return
        self.guest("write", off, n, lambda: self.disk.pwrite(new, off), new, (0, False), transient=True)
        if policy == "break-guest-write":
            self.check_read(s, 0, self.size)
            self.guest("write", off, n, lambda: self.disk.pwrite(new, off), new, (0, False))

    @precondition(lambda self: any(not s.broken and s.need for s in self.snaps))
    @rule(data=st.data(), code=st.sampled_from(ERRORS), seed=st.integers(1, 255))
    def write_beside_bad_byte(self, data: st.DataObject, code: int, seed: int) -> None:
        """A byte that cannot be read fails the snapshots that need it, and none whose clusters end before it (R15)."""
        self.healthy()
        s = data.draw(st.sampled_from([s for s in self.snaps if not s.broken and s.need]), label="snapshot")
        start, end = s.span(data.draw(st.sampled_from(sorted(s.need)), label="cluster"))
        bad = data.draw(st.one_of(st.just(end - 1), st.integers(start, end - 1)), label="bad byte")
        off = data.draw(st.one_of(st.just(start), st.integers(start, end - 1)))
        n = data.draw(st.integers(1, min(self.size - off, 5000)))
        self.plan.error("pread", code, start=bad, end=bad + 1)
        self.disk_fault = "pread", code, (bad, bad + 1)
        new = pattern(n, seed)
        fault = self.submit_fault("pwrite", off, n)
        self.guest("write", off, n, lambda: self.disk.pwrite(new, off), new, fault, transient=True)

    @precondition(lambda self: any(not s.broken for s in self.snaps))
    @rule(data=st.data(), seed=st.integers(1, 255))
    def write_past_stalled_target(self, data: st.DataObject, seed: int) -> None:
        """A copy outlives its timeout (R8): under break-guest-write it counts when it ends, after a break never."""
        self.healthy()
        s = data.draw(st.sampled_from([s for s in self.snaps if not s.broken]))
        off, n = self.draw_range(data)
        wanted = (s.touched(off, n) & s.need) - s.done
        if not wanted & s.nonzero or any(self.failures(o, off, n) for o in self.snaps if not o.broken):
            return
        usual, s.snap.cbw_timeout = s.snap.cbw_timeout, 3600.0
        s.plan.stall("pwrite")
        timeouts = s.snap.stats().timeouts
        new = pattern(n, seed)
        others = [o for o in self.snaps if not o.broken and o is not s]
        errors: list[BaseException] = []

        def write() -> None:
            try:
                self.disk.pwrite(new, off)
            except BaseException as e:
                errors.append(e)

        thread = threading.Thread(target=write)
        thread.start()
        until = time.monotonic() + 60
        while not s.plan.stalled:
            assert thread.is_alive(), errors
            assert time.monotonic() < until
            time.sleep(0)
        self.disk._advance_clock(4000)
        thread.join(60)
        assert not thread.is_alive()
        refused = bool(errors)
        for e in errors:
            assert isinstance(e, cbwcore.CopyBeforeWriteError)
            assert (e.errno, e.operation) == (errno.ETIMEDOUT, "timeout")
        assert refused == (s.policy == "break-guest-write")
        self.record(off, n, refused)
        if s.policy == "break-guest-write":
            assert s.snap.state == "armed"
            assert s.snap.stats().timeouts == timeouts + 1
            self.check_disk()
        else:
            assert s.snap.state == "broken"
            s.broken, s.causes, s.failed_copies = True, {(errno.ETIMEDOUT, "timeout")}, True
            self.submitted += 1
            self.submitted_bytes += n
            for o in self.snaps:
                o.guest_writes += 1
            self.model[off : off + n] = new
            self.check_disk()
        copies, before = s.snap.stats().cbw_copies, s.map("done")
        s.plan.release()
        for o in others:
            self.passed(o, off, n, set(), refused)
        s.held_known = False
        if s.broken:
            time.sleep(0.001)
            assert s.map("done") == before <= s.done | s.touched(off, n), "a late copy marked done after the break"
            return
        while s.snap.stats().cbw_copies == copies:
            assert time.monotonic() < until, "the late copy never ended"
            time.sleep(0)
        s.snap.cbw_timeout = usual
        done, need = s.map("done"), s.map("need")
        assert s.done <= done <= s.done | wanted
        assert s.need - need <= done
        s.mark(done - s.done)
        s.need = need
        self.check_read(s, 0, self.size)

    # ---- bitmaps ----

    @precondition(lambda self: len(self.bitmaps) < 3)
    @rule(shift=st.integers(9, 18), enabled=st.booleans())
    def bitmap_add(self, shift: int, enabled: bool) -> None:
        name = f"b{next(self.counter)}"
        bitmap = self.disk.bitmaps.add(name, granularity=1 << shift, enabled=enabled)
        assert bitmap.enabled == enabled
        self.bitmaps[name] = [bitmap, set(), set()]

    @precondition(lambda self: self.bitmaps)
    @rule(data=st.data(), what=st.sampled_from(["enable", "disable", "clear", "merge", "set", "remove"]))
    def bitmap_change(self, data: st.DataObject, what: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.bitmaps)))
        entry = self.bitmaps[name]
        bitmap = entry[0]
        if what == "merge":
            other = self.bitmaps[data.draw(st.sampled_from(sorted(self.bitmaps)))]
            bits = self.rounded(other[1], other[0].granularity, bitmap.granularity)
            bitmap.merge(other[0])
            entry[1] |= bits
            entry[2] |= self.rounded(other[2], other[0].granularity, bitmap.granularity)
        elif what == "set":
            off, n = self.draw_range(data)
            bitmap.set_range(off, n)
            for bits in entry[1:]:
                bits |= set(range(off // bitmap.granularity, (off + n - 1) // bitmap.granularity + 1)) if n else set()
        elif what == "remove":
            self.disk.bitmaps.remove(name)
            del self.bitmaps[name]
            assert not bitmap.enabled
        else:
            getattr(bitmap, what)()
            if what == "clear":
                entry[1:] = [set(), set()]

    # ---- after every step ----

    @invariant()
    def bitmaps_agree(self) -> None:
        for bitmap, must, may in self.bitmaps.values():
            shown = set(np.flatnonzero(np.unpackbits(bitmap.numpy(), bitorder="little")).tolist())
            assert must <= shown <= may

    @invariant()
    def figures_agree(self) -> None:
        if self.disk is None:
            return
        figures = self.disk.stats()
        assert (figures.guest_writes, figures.guest_write_bytes) == (self.submitted, self.submitted_bytes)
        assert figures.snapshots == len(self.snaps)
        assert self.disk.snapshots == tuple(s.snap for s in self.snaps)
        for s in self.snaps:
            assert s.snap.state == ("broken" if s.broken else "armed")
            assert len(s.told) == s.broken
            stats = s.snap.stats()
            assert stats.guest_writes == s.guest_writes
            assert stats.cbw_bytes >= stats.cbw_zero_bytes
            assert stats.waits == sum(n for _, n in stats.wait_histogram)
            assert stats.longest_wait <= stats.wait_seconds
            assert stats.frozen_waits == 0
            if s.broken:
                assert (s.snap.error.errno, s.snap.error.operation) in s.causes
                assert s.snap.error.time <= time.time()
                continue
            assert s.snap.error is None
            assert stats.target_bytes == s.used
            assert stats.cbw_bytes == s.copied
            assert stats.cbw_zero_bytes == s.copied_zeroes
            assert s.limit is None or stats.target_bytes <= s.limit
            assert (stats.cbw_copies > 0) == (s.copied > 0)
            if s.held_known:
                assert stats.waits == s.held, "waits counts guest writes"
            if s.is_new and not s.failed_copies:
                pages = sum(-(-s.length(c) // PAGE) * PAGE for c in s.done & s.nonzero)
                assert stats.target_allocated <= pages + PAGE, "zeroes cost the target nothing (R11)"


Engine.TestCase.settings = settings(
    max_examples=60 if os.environ.get("CBWCORE_SANITIZER") else 600,
    stateful_step_count=50,
    deadline=None,
    print_blob=True,
    derandomize=False,
)
TestEngine = pytest.mark.timeout(600)(Engine.TestCase)
