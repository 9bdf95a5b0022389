"""QEMU's 2x2: policy x {error, timeout}, over every guest request, both sides that can fail, and a full target."""

import errno
import logging

import pytest
from engine_support import (
    CLUSTER,
    G,
    S,
    assert_broken,
    assert_refused,
    assert_t0,
    file_bytes,
    pattern,
    ranges,
    stalled,
)

import cbwcore

OFFSET, LENGTH = CLUSTER + 4096, 8192  # the guest's request; cluster 1 is what it needs
RUN = (CLUSTER, CLUSTER)
NEW = b"n" * LENGTH

REQUESTS = {
    "write": (lambda disk: disk.pwrite(NEW, OFFSET), NEW, "pwrite"),
    "write-fua": (lambda disk: disk.pwrite(NEW, OFFSET, fua=True), NEW, "pwrite"),
    "write-zeroes": (lambda disk: disk.pwrite_zeroes(OFFSET, LENGTH), bytes(LENGTH), "zero"),
    "discard": (lambda disk: disk.discard(OFFSET, LENGTH), bytes(LENGTH), "discard"),
}
ERRORS = {  # what fails: (where, its call, errno, operation)
    "source-read": ("disk", "pread", errno.EIO, "source-read"),
    "target-write": ("target", "pwrite", errno.EIO, "target-write"),
    "target-full": ("target", "pwrite", errno.ENOSPC, "target-write"),
    "target-limit": (None, None, errno.ENOSPC, "target-write"),
}


@pytest.fixture(params=REQUESTS, ids=str)
def request_of_guest(request):
    return REQUESTS[request.param]


class Case:
    """A disk with one snapshot that tells of its break, and plans on both sides."""

    def __init__(self, rig, policy, **options):
        self.disk = rig.disk(4 * CLUSTER + 100)
        self.told = []
        self.snap = rig.snapshot(self.disk, on_cbw_error=policy, on_break=self.told.append, **options)
        self.on_disk = rig.plan(self.disk)
        self.on_target = rig.plan(self.snap)

    def refused(self, call, code, operation):
        """Under break-guest-write: the error is the guest's, and nothing else has happened."""
        disk, snap = self.disk, self.snap
        error = assert_refused(call, code, operation, *RUN)
        assert isinstance(error, OSError)
        assert error.time is None
        changes = [call for call in self.on_disk.calls() if call[0] in ("pwrite", "zero", "discard")]
        assert changes == []
        assert file_bytes(disk.path) == disk.t0
        assert disk.pread(disk.size, 0) == disk.t0
        assert (snap.state, snap.error, self.told) == ("armed", None, [])
        assert snap._map("need") == [True] * 5
        assert snap._map("done") == [False] * 5
        assert_t0(snap, disk.t0)

    def broken(self, code, operation, new):
        """Under break-snapshot: the write is done, the snapshot is gone for good, and was told of once."""
        disk, snap = self.disk, self.snap
        assert file_bytes(disk.path) == self.expected(new)
        assert disk.pread(disk.size, 0) == self.expected(new)
        assert self.told == [snap]
        assert_broken(snap, code, operation, *RUN)

    def expected(self, new):
        return self.disk.t0[:OFFSET] + new + self.disk.t0[OFFSET + LENGTH :]

    def counts(self, copies, failures, timeouts):
        stats = self.snap.stats()
        assert (stats.cbw_copies, stats.cbw_failures, stats.timeouts) == (copies, failures, timeouts)
        assert stats.cbw_bytes == copies * CLUSTER
        if not self.on_target.stalled:  # what a copy under way may take is reserved
            assert stats.target_bytes == copies * CLUSTER
        assert stats.waits >= 1

    def next_write_works(self, call, new):
        """Once the fault is over the same request succeeds, and T0 is still there."""
        call(self.disk)
        assert self.disk.pread(self.disk.size, 0) == self.expected(new)
        assert (self.snap.state, self.told) == ("armed", [])
        assert_t0(self.snap, self.disk.t0)

    def next_write_is_plain(self):
        """After the break a guest write costs one write of the disk and nothing else."""
        self.on_disk.forget_calls()
        self.on_target.forget_calls()
        self.disk.pwrite(b"after", 3 * CLUSTER)
        assert self.on_disk.calls() == [("pwrite", 3 * CLUSTER, 5)]
        assert self.on_target.calls() == []
        assert self.disk.pread(5, 3 * CLUSTER) == b"after"
        assert len(self.told) == 1


def failing(rig, policy, fault):
    where, op, code, operation = ERRORS[fault]
    case = Case(rig, policy, **({"target_limit": CLUSTER - 1} if fault == "target-limit" else {}))
    if where is not None:
        (case.on_disk if where == "disk" else case.on_target).error(op, code, times=1)
    return case, code, operation


@pytest.mark.parametrize("fault", ERRORS)
def test_break_guest_write_and_an_error(rig, request_of_guest, fault):
    call, new, _ = request_of_guest
    case, code, operation = failing(rig, G, fault)
    case.refused(lambda: call(case.disk), code, operation)
    case.counts(0, 1, 0)
    if fault == "target-limit":
        for _ in range(3):  # it stays full; each write says so
            case.refused(lambda: call(case.disk), code, operation)
        case.snap.close()
        call(case.disk)
        assert case.disk.pread(LENGTH, OFFSET) == new
        return
    case.next_write_works(call, new)
    case.counts(1, 1, 0)


@pytest.mark.parametrize("fault", ERRORS)
def test_break_snapshot_and_an_error(rig, request_of_guest, fault, caplog):
    call, new, _ = request_of_guest
    case, code, operation = failing(rig, S, fault)
    with caplog.at_level(logging.ERROR):
        call(case.disk)
    case.broken(code, operation, new)
    assert len([record for record in caplog.records if "is broken" in record.getMessage()]) == 1
    case.counts(0, 1, 0)
    case.next_write_is_plain()
    assert_broken(case.snap, code, operation, *RUN)


@pytest.mark.parametrize("side", ["disk", "target"])
def test_break_guest_write_and_a_timeout(rig, request_of_guest, side):
    call, new, _ = request_of_guest
    case = Case(rig, G, cbw_timeout=5)
    plan, op = (case.on_disk, "pread") if side == "disk" else (case.on_target, "pwrite")
    plan.stall(op, times=1)
    guest = rig.run(call, case.disk)
    stalled(plan)
    case.disk._advance_clock(6)
    case.refused(guest.result, errno.ETIMEDOUT, "timeout")
    case.counts(0, 0, 1)
    plan.release()
    case.next_write_works(call, new)
    case.counts(1, 0, 1)


@pytest.mark.parametrize("side", ["disk", "target"])
def test_break_snapshot_and_a_timeout(rig, request_of_guest, side):
    call, new, _ = request_of_guest
    case = Case(rig, S, cbw_timeout=5)
    plan, op = (case.on_disk, "pread") if side == "disk" else (case.on_target, "pwrite")
    plan.stall(op, times=1)
    guest = rig.run(call, case.disk)
    stalled(plan)
    case.disk._advance_clock(6)
    guest.result()
    case.broken(errno.ETIMEDOUT, "timeout", new)
    case.counts(0, 0, 1)
    case.next_write_is_plain()
    plan.release()
    case.snap.close()
    assert case.disk.pread(LENGTH, OFFSET) == new
    assert case.snap.error.errno == errno.ETIMEDOUT


@pytest.mark.parametrize("policy", [G, S])
def test_a_disk_write_that_fails_after_the_copy_is_the_disks_error(rig, request_of_guest, policy):
    call, new, op = request_of_guest
    case = Case(rig, policy)
    case.on_disk.error(op, errno.EIO, times=1)
    with pytest.raises(OSError, match="Input/output") as e:
        call(case.disk)
    assert not isinstance(e.value, cbwcore.CbwError)
    assert (e.value.errno, e.value.filename) == (errno.EIO, case.disk.path)
    assert case.disk.pread(case.disk.size, 0) == case.disk.t0
    assert (case.snap.state, case.snap.error, case.told) == ("armed", None, [])
    assert case.snap._map("done")[1]
    assert_t0(case.snap, case.disk.t0)
    case.counts(1, 0, 0)
    case.next_write_works(call, new)
    case.counts(1, 0, 0)


# ---- a target that is really full ----


@pytest.fixture
def small_tmpfs(resources, needs):
    """A tmpfs of 512 KiB; unmounted in the end."""
    with needs():
        return resources.mount("none", resources.directory(), "-t", "tmpfs", "-o", "size=512k")


@pytest.mark.parametrize("policy", [G, S])
def test_a_target_on_a_file_system_that_runs_full(rig, small_tmpfs, request_of_guest, policy):
    call, new, _ = request_of_guest
    disk = rig.disk(pattern(16 * CLUSTER))
    told = []
    snap = rig.snapshot(disk, f"{small_tmpfs}/target", on_cbw_error=policy, on_break=told.append)
    snapped = [2 + i for i in range(14)]
    with open(f"{small_tmpfs}/ballast", "wb", buffering=0) as ballast:
        ballast.write(b"x" * (5 * CLUSTER))  # three clusters are left
    for i in snapped[:3]:
        disk.pwrite(b"n", i * CLUSTER)
    if policy == G:
        assert_refused(lambda: call(disk), errno.ENOSPC, "target-write", *RUN)
        assert_refused(lambda: disk.pwrite(b"n", 9 * CLUSTER), errno.ENOSPC, "target-write", 9 * CLUSTER, CLUSTER)
        disk.pwrite(b"m", snapped[0] * CLUSTER + 5)  # what is copied already needs no room
        assert (snap.state, snap.error, told) == ("armed", None, [])
        assert_t0(snap, disk.t0)
        with open(f"{small_tmpfs}/ballast", "r+b") as ballast:
            ballast.truncate(0)
        call(disk)
        assert disk.pread(LENGTH, OFFSET) == new
        assert_t0(snap, disk.t0)
        assert (snap.stats().cbw_copies, snap.stats().cbw_failures) == (4, 2)
    else:
        call(disk)
        assert disk.pread(LENGTH, OFFSET) == new
        assert told == [snap]
        assert_broken(snap, errno.ENOSPC, "target-write", *RUN)
        disk.pwrite(b"n", 9 * CLUSTER)
        assert (snap.stats().cbw_copies, snap.stats().cbw_failures) == (3, 1)
    snap.close()


def test_space_of_the_target_comes_back_when_clusters_are_given_up(rig, small_tmpfs):
    disk = rig.disk(pattern(16 * CLUSTER))
    snap = rig.snapshot(disk, f"{small_tmpfs}/target")
    for i in range(8):
        disk.pwrite(b"n", i * CLUSTER)
    assert_refused(lambda: disk.pwrite(b"n", 8 * CLUSTER), errno.ENOSPC, "target-write", 8 * CLUSTER, CLUSTER)
    snap.discard(0, 2 * CLUSTER)
    disk.pwrite(b"n", 8 * CLUSTER)
    assert snap.pread(disk.size - 2 * CLUSTER, 2 * CLUSTER) == disk.t0[2 * CLUSTER :]
    snap.close()


# ---- policies that change while armed ----


def test_the_policy_that_holds_is_the_one_at_the_failure(rig):
    case = Case(rig, G)
    case.on_target.error("pwrite", errno.EIO)
    case.refused(lambda: case.disk.pwrite(NEW, OFFSET), errno.EIO, "target-write")
    case.snap.on_cbw_error = S
    assert case.snap.on_cbw_error is cbwcore.OnCbwError.BREAK_SNAPSHOT
    case.disk.pwrite(NEW, OFFSET)
    case.broken(errno.EIO, "target-write", NEW)


def test_a_policy_set_while_a_write_waits_holds_for_it(rig):
    case = Case(rig, S)
    case.on_disk.stall("pread", times=1)
    guest = rig.run(case.disk.pwrite, NEW, OFFSET)
    stalled(case.on_disk)
    case.snap.on_cbw_error = G
    case.on_target.error("pwrite", errno.EIO, times=1)
    case.on_disk.release()
    case.refused(guest.result, errno.EIO, "target-write")
    case.next_write_works(lambda disk: disk.pwrite(NEW, OFFSET), NEW)


@pytest.mark.parametrize("bad", ["break", "", None, "BREAK-SNAPSHOT", 1])
def test_a_policy_that_is_none_is_refused_and_the_old_one_stays(rig, bad):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S)
    with pytest.raises(cbwcore.ConfigError, match="on_cbw_error"):
        snap.on_cbw_error = bad
    assert snap.on_cbw_error == S


# ---- several writers at one failure ----


def test_break_snapshot_breaks_once_for_many_writers(rig):
    disk = rig.disk(16 * CLUSTER)
    told = []
    snap = rig.snapshot(disk, on_cbw_error=S, on_break=told.append)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_disk.stall("pread")
    guests = [rig.run(disk.pwrite, bytes([65 + i]) * 4096, i * CLUSTER) for i in range(16)]
    stalled(on_disk, 16)
    on_target.error("pwrite", errno.EIO)
    on_disk.release()
    for i, guest in enumerate(guests):
        guest.result()
        assert disk.pread(4096, i * CLUSTER) == bytes([65 + i]) * 4096
    assert told == [snap]
    assert snap.error.offset in {i * CLUSTER for i in range(16)}
    assert_broken(snap, errno.EIO, "target-write", snap.error.offset, CLUSTER)


def test_break_guest_write_refuses_every_writer_of_its_own(rig):
    disk = rig.disk(16 * CLUSTER)
    snap = rig.snapshot(disk)
    on_disk, on_target = rig.plan(disk), rig.plan(snap)
    on_disk.stall("pread")
    guests = [rig.run(disk.pwrite, NEW, i * CLUSTER) for i in range(16)]
    stalled(on_disk, 16)
    on_target.error("pwrite", errno.EIO)
    on_disk.release()
    for i, guest in enumerate(guests):
        assert_refused(guest.result, errno.EIO, "target-write", i * CLUSTER, CLUSTER)
    assert ranges(on_disk, "pwrite") == []
    assert file_bytes(disk.path) == disk.t0
    assert_t0(snap, disk.t0)
