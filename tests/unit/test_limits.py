"""Limits and scarcity: what is refused, what waits, and that nothing leaks or hangs when something runs out."""

import contextlib
import errno
import os
import resource
import threading

import pytest

import cbwcore
from cbwcore import limits
from cbwcore._cbwcore import MAX_SNAPSHOTS, FaultPlan, copy_buffers
from cbwcore.engines import choose_engine

CLUSTER = 65536
MIB = 1 << 20
DEFAULTS = {
    "copy_buffers": 128 * MIB,
    "copies": 64,
    "copy_bytes": MIB,
    "polling_threads": len(os.sched_getaffinity(0)) - 1,
}


@pytest.fixture(autouse=True)
def restore_limits():
    yield
    for name, value in DEFAULTS.items():
        setattr(limits, name, value)


def test_the_defaults_are_those_of_the_design():
    assert {name: getattr(limits, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("copy_buffers", v) for v in (-1, 0, MIB - 1, 2**63, 2**70)],
        *[("copies", v) for v in (-1, 0, 1025, 2**70)],
        *[("polling_threads", v) for v in (-1, 4097, 2**70)],
        *[("copy_bytes", v) for v in (-4096, 0, 4095, 2 * MIB, 65537, 12288)],
        *[(name, v) for name in DEFAULTS for v in ("64", None, 2.5, 65536.0 * 16, [])],
    ],
)
def test_a_bad_limit_is_refused_and_the_old_one_stays(name, value):
    with pytest.raises((TypeError, cbwcore.ConfigError), match=str(value) if isinstance(value, int) else None):
        setattr(limits, name, value)
    assert getattr(limits, name) == DEFAULTS[name]


# ---- target_limit ----


@pytest.mark.parametrize("clusters", [0, 1, 2])
def test_a_target_takes_its_limit_and_no_byte_more(make_disk, clusters):
    disk = make_disk(4 * CLUSTER)
    t0 = disk.pread(disk.size, 0)
    with disk.snapshot(target_limit=(clusters + 1) * CLUSTER - 1) as snapshot:
        for i in range(clusters):
            disk.pwrite(b"new", i * CLUSTER)
        with pytest.raises(cbwcore.CopyBeforeWriteError) as refused:
            disk.pwrite(b"new", clusters * CLUSTER)
        assert refused.value.errno == errno.ENOSPC
        assert (refused.value.operation, refused.value.offset) == ("target-write", clusters * CLUSTER)
        assert disk.pread(3, clusters * CLUSTER) == t0[clusters * CLUSTER :][:3], "the disk is unchanged (R9)"
        assert snapshot.pread(disk.size, 0) == t0
        assert snapshot.stats().target_bytes == clusters * CLUSTER
        if clusters:
            snapshot.discard(0, CLUSTER)
            disk.pwrite(b"new", clusters * CLUSTER)
            assert snapshot.pread(CLUSTER, clusters * CLUSTER) == t0[clusters * CLUSTER :][:CLUSTER]


def test_zeroes_do_not_count_against_the_target_limit(make_disk):
    disk = make_disk(bytes(4 * CLUSTER))
    with disk.snapshot(target_limit=0) as snapshot:
        disk.pwrite(b"\xff" * 4 * CLUSTER, 0)
        assert snapshot.pread(4 * CLUSTER, 0) == bytes(4 * CLUSTER)


# ---- how many ----


def test_a_disk_has_so_many_snapshots_and_no_more(make_disk, place, unchanged):
    disk = make_disk(3 * CLUSTER)
    t0 = disk.pread(disk.size, 0)
    for _ in range(MAX_SNAPSHOTS):
        disk.snapshot()
    with unchanged(disk), pytest.raises(cbwcore.ConfigError, match=str(MAX_SNAPSHOTS)):
        disk.snapshot(place / "one too many")
    disk.pwrite(b"new", CLUSTER)
    assert all(snapshot.pread(disk.size, 0) == t0 for snapshot in disk.snapshots)
    disk.snapshots[0].close()
    disk.snapshot(place / "fits again")


def test_a_group_is_refused_whole_where_one_disk_is_full(make_disk, place, unchanged):
    full, other = make_disk(CLUSTER, "full.img"), make_disk(CLUSTER, "other.img")
    for _ in range(MAX_SNAPSHOTS - 1):
        full.snapshot()
    pairs = [(other, place / "t0"), (full, place / "t1"), (full, place / "t2")]
    with unchanged(full, other), pytest.raises(cbwcore.ConfigError, match=str(MAX_SNAPSHOTS)):
        cbwcore.snapshot_group(pairs)
    other.pwrite(b"x", 0)
    assert other.stats().snapshots == 0
    cbwcore.snapshot_group(pairs[:2])


def test_a_group_of_too_many_is_refused(make_disk, unchanged):
    disks = [make_disk(4096, f"disk{i}.img") for i in range(65)]
    with unchanged(*disks), pytest.raises(cbwcore.ConfigError, match="65"):
        cbwcore.snapshot_group([(disk, None) for disk in disks])


def test_a_disk_records_so_many_bitmaps_and_no_more(make_disk, place, unchanged):
    disk = make_disk(3 * CLUSTER)
    for i in range(256):
        disk.bitmaps.add(f"b{i}")
    with unchanged(disk):
        with pytest.raises(cbwcore.ConfigError, match="256"):
            disk.bitmaps.add("one too many")
        with pytest.raises(cbwcore.ConfigError, match="256"):
            disk.snapshot(place / "target", bitmap="b0")
    disk.bitmaps.remove("b255")
    with unchanged(disk), pytest.raises(cbwcore.ConfigError, match="256"):
        disk.snapshot(place / "target", bitmap="b0")
    disk.bitmaps.remove("b254")
    disk.pwrite(b"x", CLUSTER)
    with disk.snapshot(place / "target", bitmap="b0") as snapshot:
        assert snapshot.pread(1, CLUSTER) == b"x"
    assert all(bitmap.count() == CLUSTER for bitmap in disk.bitmaps.values())


# ---- scarcity ----


@contextlib.contextmanager
def limited(what, soft):
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


@contextlib.contextmanager
def descriptors_left(count):
    """Let this process open ``count`` descriptors more."""
    taken = []
    try:
        with limited(resource.RLIMIT_NOFILE, max(int(fd) for fd in os.listdir("/proc/self/fd")) + 10 + count):
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            for _ in range(count):
                os.close(taken.pop())
            yield
    finally:
        for fd in taken:
            os.close(fd)


class Old:
    """An armed snapshot that is there before a shortage, and must work in it as ever: keep the old."""

    def __init__(self, disk, target, t0=None):
        self.disk = disk
        self.t0 = disk.pread(disk.size, 0) if t0 is None else t0
        self.snap = disk.snapshot(target)

    def copies_for_a_write_to(self, cluster):
        """The first one there. T0 is all there afterwards."""
        copies = self.snap.stats().cbw_copies
        self.disk.pwrite(b"in a shortage", cluster * CLUSTER + 5)
        assert self.disk.pread(13, cluster * CLUSTER + 5) == b"in a shortage"
        stats = self.snap.stats()
        assert (self.snap.state, stats.cbw_copies, stats.cbw_failures) == ("armed", copies + 1, 0)
        self.reads_t0()

    def reads_t0(self):
        assert self.snap.pread(len(self.t0), 0) == self.t0


@pytest.mark.parametrize("count", range(4))
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("target", ["new", "old", "unnamed"])
def test_no_descriptors_left_for_a_target(make_disk, make_image, place, unchanged, count, direct, target):
    """Refused with nothing left behind, or taken in full; the tail of an odd size needs a descriptor more."""
    disk = make_disk(3 * CLUSTER + 1, direct=direct)
    old = Old(disk, place / "target of the old")
    path = {"new": place / "new.img", "old": make_image(3 * CLUSTER + 1, "old.img"), "unnamed": None}[target]
    needed = 2 if direct else 1
    if count >= needed:
        with descriptors_left(count):
            old.copies_for_a_write_to(0)
            snapshot = disk.snapshot(path)
            old.copies_for_a_write_to(1)
        snapshot.close()
        return

    def is_refused():
        with pytest.raises(cbwcore.ConfigError, match=os.strerror(errno.EMFILE)):
            disk.snapshot(path)

    with unchanged(disk), descriptors_left(count):
        is_refused()
    with descriptors_left(count):
        old.copies_for_a_write_to(0)
        is_refused()
        old.copies_for_a_write_to(2)
    disk.snapshot(path).close()
    old.copies_for_a_write_to(1)


@pytest.mark.parametrize("count", range(2))
def test_no_descriptors_left_for_a_disk(make_image, make_disk, place, unchanged, count):
    path = make_image(3 * CLUSTER + 1)
    old = Old(make_disk(3 * CLUSTER, "other.img"), place / "target of the old")

    def is_refused():
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)) as failed:
            cbwcore.Disk(path, direct=True)
        assert failed.value.filename == path

    with unchanged(path, old.disk), descriptors_left(count):
        is_refused()
    with descriptors_left(count):
        is_refused()
        old.copies_for_a_write_to(0)
    cbwcore.Disk(path, direct=True).close()
    old.copies_for_a_write_to(1)


@pytest.mark.parametrize("target", ["new", None])
def test_a_target_that_may_not_be_so_long_is_refused(make_disk, place, unchanged, target):
    disk = make_disk(3 * CLUSTER)
    old = Old(disk, place / "target of the old")

    def is_refused():
        with pytest.raises(cbwcore.ConfigError, match=os.strerror(errno.EFBIG)):
            disk.snapshot(place / target if target else None)

    with unchanged(disk), limited(resource.RLIMIT_FSIZE, CLUSTER):
        is_refused()
    with limited(resource.RLIMIT_FSIZE, CLUSTER):
        is_refused()
        old.copies_for_a_write_to(0)  # disk and target are in the limit there
    old.copies_for_a_write_to(1)


def test_a_target_that_may_not_grow_fails_the_write_and_no_more(make_disk, place):
    disk = make_disk(3 * CLUSTER)
    t0 = disk.pread(disk.size, 0)
    with disk.snapshot(place / "target") as snapshot:
        with limited(resource.RLIMIT_FSIZE, CLUSTER):
            with pytest.raises(cbwcore.CopyBeforeWriteError) as refused:
                disk.pwrite(b"x", 2 * CLUSTER)
            assert refused.value.errno == errno.EFBIG
        assert disk.pread(disk.size, 0) == snapshot.pread(disk.size, 0) == t0
        disk.pwrite(b"x", 2 * CLUSTER)
        assert snapshot.pread(disk.size, 0) == t0


def memory_pages(which):
    """Pages of address space (0), or resident (1)."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[which])


def test_no_address_space_for_the_maps_is_a_memory_error(make_disk, place):
    disk = make_disk(4 * CLUSTER)
    t0 = disk.pread(disk.size, 0)
    disk.close()
    os.truncate(disk.path, 1 << 44)
    with cbwcore.Disk(disk.path) as disk:
        old = Old(disk, place / "target of the old", t0)
        used = memory_pages(0) * 4096
        before = disk.snapshots, sorted(os.listdir(place)), len(os.listdir("/proc/self/fd"))
        for cluster, extra in enumerate((0, 600 * MIB, 1200 * MIB)):  # 512 MiB a map at 4 KiB clusters
            with limited(resource.RLIMIT_AS, used + 64 * MIB + extra):
                with pytest.raises(MemoryError):
                    disk.snapshot(place / "target", cluster_size=4096)
                old.copies_for_a_write_to(cluster)
        assert (disk.snapshots, sorted(os.listdir(place)), len(os.listdir("/proc/self/fd"))) == before
        disk.snapshot(place / "target", cluster_size=4096)
        old.copies_for_a_write_to(3)


def test_arming_a_huge_sparse_disk_costs_no_memory(make_disk):
    """R17: 16 TiB at 64 KiB clusters, and one write in it."""
    disk = make_disk(b"")
    os.truncate(disk.path, 1 << 44)
    disk.close()
    with cbwcore.Disk(disk.path) as disk:
        before = memory_pages(1) * 4096
        with disk.snapshot() as snapshot:
            disk.pwrite(b"x", (1 << 44) - 1)
            assert memory_pages(1) * 4096 - before < 16 * MIB
            assert snapshot.pread(1, (1 << 44) - 1) == b"\0"


# RLIMIT_NPROC does not hold for root: the child becomes a user who may have no thread more than there are.
NO_THREADS = """
import errno, os, resource, sys, threading
import cbwcore

path, io, policy = sys.argv[1:4]
C, folder, user = 65536, os.path.dirname(path), 54321
with open(path, "rb") as f:
    t0 = f.read()


def copies_for_writes(*clusters):
    copies = [snap.stats().cbw_copies for snap in (old, timed)]
    for c in clusters:
        disk.pwrite(b"new", c * C + 5)
        assert disk.pread(3, c * C + 5) == b"new"
    for snap, before in zip((old, timed), copies):
        stats = snap.stats()
        assert (snap.state, stats.cbw_copies, stats.cbw_failures) == ("armed", before + len(clusters), 0)
        assert snap.pread(len(t0), 0) == t0


disk = cbwcore.Disk(path, io=io)
old = disk.snapshot(on_cbw_error=policy)
timed = disk.snapshot(on_cbw_error=policy, cbw_timeout=60)      # psync needs a helper thread, and has one from here on
copies_for_writes(0)
go, errors = threading.Barrier(5), []


def write(part):
    try:
        go.wait()
        for c in range(part * 4, part * 4 + 4):
            disk.pwrite(b"n" * 4096, c * C)
    except BaseException as e:
        errors.append(e)


writers = [threading.Thread(target=write, args=(part,), daemon=True) for part in range(1, 5)]
for writer in writers:
    writer.start()

hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
os.chown(folder, user, user)
os.setresgid(user, user, 0)
os.setresuid(user, user, 0)
try:
    threading.Thread(target=print).start()
except RuntimeError:
    pass
else:
    sys.exit("there are threads: this test tests nothing")

before = disk.snapshots, sorted(os.listdir(folder)), len(os.listdir("/proc/self/fd"))
for target in (os.path.join(folder, "new target"), None):
    try:
        disk.snapshot(target, on_cbw_error=policy, cbw_timeout=60)
    except OSError as e:
        assert e.errno == errno.EAGAIN and "thread" in str(e), e
    else:
        raise AssertionError("a snapshot with a timeout and no helper")
try:
    old.cbw_timeout = 60
except OSError as e:
    assert e.errno == errno.EAGAIN and "thread" in str(e), e
else:
    raise AssertionError
assert old.cbw_timeout == 0
assert (disk.snapshots, sorted(os.listdir(folder)), len(os.listdir("/proc/self/fd"))) == before

copies_for_writes(1)
with disk.snapshot(on_cbw_error=policy) as plain:       # without a timeout nobody needs a thread
    copies_for_writes(2)
    assert plain.pread(3, 2 * C + 5) == t0[2 * C + 5 :][:3]
go.wait()                                               # four writers at once share the one helper
for writer in writers:
    writer.join(30)
assert errors == [] and not any(writer.is_alive() for writer in writers)
assert disk.pread(16 * C, 4 * C) == b"".join(b"n" * 4096 + t0[c * C + 4096 : (c + 1) * C] for c in range(4, 20))
copies_for_writes(3)

resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
old.cbw_timeout = 60
with disk.snapshot(on_cbw_error=policy, cbw_timeout=60) as late:
    copies_for_writes(20)
    assert late.pread(3, 20 * C + 5) == t0[20 * C + 5 :][:3]
disk.close()
os.setresuid(0, 0, 0)                                   # so that a coverage run can write its counts at exit
print("right")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without threads")
@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
@pytest.mark.parametrize("io", ["psync", "io_uring"])
def test_no_threads_left(make_image, run_python, io, policy):
    """A timeout that would need one is refused, and says so; what there is goes on with the one helper that it has."""
    if choose_engine(io, direct=False)[0] != io:
        pytest.skip("no io_uring here")
    done = run_python(NO_THREADS, make_image(21 * CLUSTER), io, policy, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


# ---- the copy budget ----


def test_copies_stay_inside_the_budget(make_disk, in_threads):
    limits.copy_buffers = 2 * MIB
    disk = make_disk(16 * MIB)
    t0 = disk.pread(disk.size, 0)
    seen = []

    def write(part):
        for i in range(part * 4, part * 4 + 4):
            disk.pwrite(b"\xff" * MIB, i * MIB)
            seen.append(copy_buffers()[1])

    with disk.snapshot() as snapshot:
        in_threads(*(lambda part=part: write(part) for part in range(4)))
        assert max(seen) <= 2 * MIB
        assert snapshot.pread(disk.size, 0) == t0
    assert disk.pread(disk.size, 0) == b"\xff" * disk.size


def test_a_cluster_that_exceeds_the_budget_is_refused(make_disk, unchanged):
    limits.copy_buffers = 2 * MIB
    disk = make_disk(CLUSTER)
    with unchanged(disk), pytest.raises(cbwcore.ConfigError, match=f"{4 * MIB}.*{2 * MIB}"):
        disk.snapshot(cluster_size=4 * MIB)


def test_a_budget_that_an_armed_snapshot_needs_cannot_be_lowered(make_disk):
    disk = make_disk(4 * MIB)
    t0 = disk.pread(disk.size, 0)
    with disk.snapshot(cluster_size=4 * MIB) as snapshot:
        with pytest.raises(cbwcore.ConfigError, match=f"{MIB}.*{4 * MIB}"):
            limits.copy_buffers = MIB
        assert limits.copy_buffers == 128 * MIB
        limits.copy_buffers = 8 * MIB
        disk.pwrite(b"x", 0)
        assert snapshot.pread(disk.size, 0) == t0
    limits.copy_buffers = MIB


# Each of these holds the whole budget in one copy while something else needs a bounce buffer for O_DIRECT.
BUDGET_CODE = """
import sys, threading, time
import cbwcore
from cbwcore._cbwcore import FaultPlan, copy_buffers
MIB = 1 << 20
cbwcore.limits.copy_buffers = MIB
disk_path, target_path = sys.argv[1:]
"""

A_TAIL_IN_A_LARGER_TARGET = """
with cbwcore.Disk(disk_path, direct=True) as disk:
    t0 = disk.pread(disk.size, 0)
    with disk.snapshot(target_path, cluster_size=MIB) as snapshot:
        disk.pwrite(b"x", 0)
        assert snapshot.pread(disk.size, 0) == t0
print("done")
"""

A_FROZEN_READ_THAT_THE_COPY_WAITS_FOR = """
with cbwcore.Disk(disk_path, direct=True) as disk:
    t0 = disk.pread(disk.size, 0)
    snapshot = disk.snapshot(cluster_size=MIB)
    plan = FaultPlan()
    plan.stall("pwrite")
    snapshot._inject(plan)
    writer = threading.Thread(target=disk.pwrite, args=(b"x" * 4096, 0), daemon=True)
    writer.start()
    plan.wait_stalled()
    got = []
    reader = threading.Thread(target=lambda: got.append(snapshot.pread(1, 100)), daemon=True)
    reader.start()
    time.sleep(0.2)     # for a reader without a buffer there is no event; later only makes the test weaker
    plan.release()
    for thread in (writer, reader):
        thread.join(5)
        assert not thread.is_alive(), "a deadlock over the copy budget"
    assert got == [t0[100:101]]
    snapshot._inject(None)
print("done")
"""


@pytest.mark.parametrize(
    ("code", "size"),
    [(A_TAIL_IN_A_LARGER_TARGET, MIB - 100), (A_FROZEN_READ_THAT_THE_COPY_WAITS_FOR, MIB)],
    ids=["tail-in-a-larger-target", "frozen-read"],
)
def test_nobody_waits_for_a_buffer_while_holding_one(make_image, run_python, code, size):
    done = run_python(BUDGET_CODE + code, make_image(size), make_image(2 * MIB, "target.img"), timeout=10)
    assert done.stdout == "done\n", done.stderr


def test_one_copy_at_once_serves_many_writers(make_disk, in_threads):
    limits.copies = 1
    limits.copy_bytes = 4096
    disk = make_disk(MIB)
    t0 = disk.pread(disk.size, 0)
    with disk.snapshot(cluster_size=4096) as snapshot:
        plan = FaultPlan()
        snapshot._inject(plan)
        in_threads(*(lambda i=i: disk.pwrite(b"\xff" * (MIB // 4), i * MIB // 4) for i in range(4)))
        assert snapshot.pread(disk.size, 0) == t0
        assert {length for _, _, length in plan.calls("pwrite")} == {4096}
        assert len(plan.calls("pwrite")) == 256
        snapshot._inject(None)


def test_copies_at_once_are_limited(make_disk, plan):
    limits.copies = 2
    disk = make_disk(8 * CLUSTER)
    t0 = disk.pread(disk.size, 0)
    with disk.snapshot() as snapshot:
        plan.stall("pwrite")
        snapshot._inject(plan)
        writers = [threading.Thread(target=disk.pwrite, args=(b"x", i * CLUSTER)) for i in range(4)]
        for writer in writers:
            writer.start()
        plan.wait_stalled(2)
        while snapshot.stats().copy_waits < 2:
            threading.Event().wait(0.001)
        assert plan.stalled == 2
        plan.release()
        for writer in writers:
            writer.join()
        assert snapshot.pread(disk.size, 0) == t0
        snapshot._inject(None)
