"""The demo's four policy cases: each policy against a target that runs full, and one that is too slow.

Every case has a small disk of its own, all of it data, and one guest write into each of some clusters. The first few
copies fit; then the fault is met. Expected is, to the byte, what the policy promises.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from cbwcore._cbwcore import FaultPlan
from cbwcore.cli.guests import GUESTS
from cbwcore.cli.image import naming
from cbwcore.cli.report import Cost, GuestGot, Proof, Run, SnapshotReads, cost_of, errno_name
from cbwcore.disk import Disk
from cbwcore.errors import CopyBeforeWriteError, SnapshotAccessError, SnapshotBrokenError
from cbwcore.policy import OnCbwError, SnapshotState
from cbwcore.snapshot import Snapshot

__all__ = ["FAULTS", "Fault", "TargetFull", "TargetSlow", "run_case"]

CLUSTER = 65536
CLUSTERS = 64
WRITES = 24
COPIES_BEFORE_FAULT = 16
WRITE_BYTES = 4096
TIMEOUT = 0.2  # seconds that a guest write may wait
SLOW = 1.5  # seconds that a slow target takes for each copy
PATIENCE = 30.0  # seconds; the timeout once the target is well again


class Write(NamedTuple):
    """One guest write."""

    offset: int
    data: bytes

    @property
    def cluster(self) -> int:
        """The cluster that it is in."""
        return self.offset // CLUSTER


class Outcome(NamedTuple):
    """What the guest got for a write, and after how many seconds."""

    write: Write
    error: CopyBeforeWriteError | None
    seconds: float


class Fault:
    """Something wrong with a snapshot's target. ``errno`` is what a copy then fails with."""

    name: ClassVar[str]
    errno: ClassVar[int]
    options: ClassVar[dict[str, Any]]

    def begin(self, snapshot: Snapshot) -> None:
        """Called before the first guest write."""

    def clear(self, snapshot: Snapshot, copied: Iterable[int]) -> set[int]:
        """Make the target well again; the clusters that were given up for it, out of the ``copied``."""
        raise NotImplementedError


class TargetFull(Fault):
    """The target may take a few copies and no more. The backup gives clusters back when it has them."""

    name = "target full"
    errno = errno.ENOSPC
    options: ClassVar[dict[str, Any]] = {"target_limit": COPIES_BEFORE_FAULT * CLUSTER}

    def clear(self, snapshot: Snapshot, copied: Iterable[int]) -> set[int]:
        """Discard what was copied, as a backup does with what it has read."""
        given_up = set(copied)
        for cluster in given_up:
            snapshot.discard(cluster * CLUSTER, CLUSTER)
        return given_up


class TargetSlow(Fault):
    """After a few copies each write to the target takes longer than the guest may wait."""

    name = "target slow"
    errno = errno.ETIMEDOUT
    options: ClassVar[dict[str, Any]] = {"cbw_timeout": TIMEOUT}

    def __init__(self) -> None:
        self.plan = FaultPlan()

    def begin(self, snapshot: Snapshot) -> None:
        """Put the fault-injecting I/O engine before the target's."""
        self.plan.delay("pwrite", SLOW, skip=COPIES_BEFORE_FAULT)
        snapshot._inject(self.plan)

    def clear(self, snapshot: Snapshot, copied: Iterable[int]) -> set[int]:
        """End the delays, and let the guest wait for the copies that are late already."""
        self.plan.release()
        snapshot.cbw_timeout = PATIENCE
        return set()


FAULTS: tuple[type[Fault], ...] = (TargetFull, TargetSlow)


def run_case(work: Path, policy: OnCbwError, fault: Fault, seed: int) -> Run:
    """One case, in the directory ``work``."""
    rng = random.Random(f"{seed}/{policy}/{fault.name}")
    t0 = rng.randbytes(CLUSTERS * CLUSTER)
    writes = pick_writes(rng)
    path, target = work / f"{policy}, {fault.name}.img", work / f"{policy}, {fault.name}.fleece"
    with naming(path):
        path.write_bytes(t0)
    judge = judge_refusals if policy is OnCbwError.BREAK_GUEST_WRITE else judge_break
    with (
        Disk(path) as disk,
        disk.snapshot(target, on_cbw_error=policy, cluster_size=CLUSTER, **fault.options) as snapshot,
    ):
        fault.begin(snapshot)
        outcomes = guest_writes(disk, writes)
        return judge(disk, snapshot, fault, t0, outcomes)


def pick_writes(rng: random.Random) -> list[Write]:
    """One write somewhere in each of some clusters."""
    places = [c * CLUSTER + rng.randrange(CLUSTER - WRITE_BYTES) for c in rng.sample(range(CLUSTERS), WRITES)]
    return [Write(offset, rng.randbytes(WRITE_BYTES)) for offset in places]


def guest_writes(disk: Disk, writes: Iterable[Write]) -> list[Outcome]:
    """Write them from several threads."""

    def attempt(write: Write) -> Outcome:
        error = None
        began = time.monotonic()
        try:
            disk.pwrite(write.data, write.offset)
        except CopyBeforeWriteError as e:
            error = e
        return Outcome(write, error, time.monotonic() - began)

    with ThreadPoolExecutor(GUESTS, "guest") as pool:
        return list(pool.map(attempt, writes))


def judge_refusals(disk: Disk, snapshot: Snapshot, fault: Fault, t0: bytes, outcomes: list[Outcome]) -> Run:
    """Break-guest-write: the guest pays, the snapshot stays whole, and all is well once the fault is cleared (R9)."""
    refused = [o for o in outcomes if o.error is not None]
    accepted = [o.write for o in outcomes if o.error is None]
    state = snapshot.state
    proofs = [
        Proof(
            f"the target took some copies, then guest writes were refused with {errno.errorcode[fault.errno]}",
            bool(accepted and refused) and all(o.error.errno == fault.errno for o in refused if o.error),
        ),
        in_time(outcomes),
        Proof("the disk is unchanged where a write was refused", disk_holds(disk, t0, accepted)),
        Proof("the snapshot is armed", state is SnapshotState.ARMED),
        Proof("the snapshot reads T0 in every cluster", reads_t0(snapshot, t0)),
    ]
    cost = cost_of(snapshot)
    given_up = fault.clear(snapshot, (w.cluster for w in accepted))
    again = guest_writes(disk, [o.write for o in refused])
    then_ok = [o.write for o in again if o.error is None]
    proofs += [
        Proof("the refused writes work once the fault is cleared", len(then_ok) == len(refused)),
        Proof("the disk then holds every write", disk_holds(disk, t0, accepted + then_ok)),
        Proof("the snapshot still reads T0, but for what was given up", reads_t0(snapshot, t0, given_up)),
    ]
    reads = SnapshotReads(state=state, reads="T0 data")
    return make_run(OnCbwError.BREAK_GUEST_WRITE, fault, outcomes, reads, cost, proofs, len(then_ok))


def judge_break(disk: Disk, snapshot: Snapshot, fault: Fault, t0: bytes, outcomes: list[Outcome]) -> Run:
    """Break-snapshot: the snapshot pays, for good and with its first cause, and the guest notices nothing (R7)."""
    cause = snapshot.error
    proofs = [
        Proof("no guest write was refused", all(o.error is None for o in outcomes)),
        in_time(outcomes),
        Proof("the disk holds every write", disk_holds(disk, t0, [o.write for o in outcomes])),
        Proof(
            f"the snapshot is broken, by {errno.errorcode[fault.errno]}",
            snapshot.state is SnapshotState.BROKEN and cause is not None and cause.errno == fault.errno,
        ),
        Proof("every snapshot read fails, and names that cause", all_reads_fail(snapshot, fault.errno)),
    ]
    reads = SnapshotReads(
        state=snapshot.state,
        reads=SnapshotBrokenError.__name__,
        error=errno.errorcode[errno.EACCES],
        cause=errno_name(cause),
        cause_operation=cause.operation if cause is not None else None,
    )
    return make_run(OnCbwError.BREAK_SNAPSHOT, fault, outcomes, reads, cost_of(snapshot), proofs)


def make_run(
    policy: OnCbwError,
    fault: Fault,
    outcomes: list[Outcome],
    reads: SnapshotReads,
    cost: Cost,
    proofs: list[Proof],
    then_ok: int = 0,
) -> Run:
    """The row of a case."""
    errors = [o.error for o in outcomes if o.error is not None]
    guest = GuestGot(
        requests=len(outcomes),
        refused=len(errors),
        error=errno_name(errors[0]) if errors else None,
        longest=max(o.seconds for o in outcomes),
        then_ok=then_ok,
    )
    name = f"{policy}, {fault.name}"
    return Run(name=name, policy=policy, fault=fault.name, guest=guest, snapshot=reads, cost=cost, proofs=proofs)


def in_time(outcomes: Iterable[Outcome]) -> Proof:
    """A slow target holds nobody up for as long as it takes."""
    return Proof(f"no guest write took {SLOW} s", all(o.seconds < SLOW for o in outcomes))


def disk_holds(disk: Disk, t0: bytes, writes: Iterable[Write]) -> bool:
    """Whether the disk is T0 with these writes, and nothing else, on it."""
    expected = bytearray(t0)
    for offset, data in writes:
        expected[offset : offset + len(data)] = data
    return disk.pread(disk.size, 0) == expected


def reads_t0(snapshot: Snapshot, t0: bytes, given_up: set[int] | frozenset[int] = frozenset()) -> bool:
    """Whether every cluster reads as at T0, but for those that were given up: they must not read at all."""
    for cluster in range(CLUSTERS):
        start = cluster * CLUSTER
        try:
            if snapshot.pread(CLUSTER, start) != t0[start : start + CLUSTER] or cluster in given_up:
                return False
        except OSError as e:
            if not isinstance(e, SnapshotAccessError) or cluster not in given_up:
                return False
    return True


def all_reads_fail(snapshot: Snapshot, cause: int) -> bool:
    """Whether each cluster's read raises SnapshotBrokenError with the errno ``cause`` behind it."""
    for cluster in range(CLUSTERS):
        try:
            snapshot.pread(CLUSTER, cluster * CLUSTER)
        except SnapshotBrokenError as e:
            if not isinstance(e.__cause__, CopyBeforeWriteError) or e.__cause__.errno != cause:
                return False
        else:
            return False
    return True
