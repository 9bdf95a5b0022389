"""R11 holes, R12 short and interrupted I/O and a cut disk, R13 O_DIRECT, R14 durability, R19 errors of every call."""

import contextlib
import ctypes
import errno
import mmap
import os
import shutil
import sys
import threading

import pytest
from engine_support import (
    CLUSTER,
    S,
    assert_broken,
    assert_cause,
    assert_refused,
    assert_t0,
    file_bytes,
    pattern,
    ranges,
    stalled,
)

import cbwcore
from cbwcore._cbwcore import dio_alignment

NEW = b"n" * 4096


def allocated(path):
    return os.stat(path).st_blocks * 512


def written(plan):
    return [call for call in plan.calls() if call[0] in ("pwrite", "zero", "discard")]


# ---- R11 ----


def test_r11_an_all_hole_disk_costs_the_target_nothing(rig):
    disk = rig.sparse(20 * CLUSTER + 100)
    snap = rig.snapshot(disk)
    plan = rig.plan(snap)
    disk.pwrite(b"n" * disk.size, 0)
    assert written(plan) == []
    assert allocated(snap.target) == 0
    stats = snap.stats()
    assert (stats.target_bytes, stats.target_allocated) == (0, 0)
    assert stats.cbw_bytes == stats.cbw_zero_bytes == disk.size
    assert snap._map("zero") == [True] * 21
    assert_t0(snap, bytes(disk.size))
    assert list(snap.block_status()) == [cbwcore.Extent(0, disk.size, False, True)]


def test_r11_what_the_file_system_knows_as_a_hole_is_not_read(rig):
    disk = rig.sparse(8 * CLUSTER)
    disk.pwrite(b"d" * 4096, 5 * CLUSTER)
    t0 = disk.pread(disk.size, 0)
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    disk.pwrite(NEW, CLUSTER)
    disk.pwrite(NEW * 40, 2 * CLUSTER)
    assert plan.calls("pread") == []
    disk.pwrite(NEW, 5 * CLUSTER)
    assert [call[1:] for call in plan.calls("pread")] == [(5 * CLUSTER, CLUSTER)]
    assert snap.stats().cbw_zero_bytes == 4 * CLUSTER
    assert_t0(snap, t0)


@pytest.mark.parametrize("clusters", [1, 3])
def test_r11_data_behind_a_hole_are_copied(rig, clusters):
    """In the same cluster, and in the same run."""
    disk = rig.sparse(4 * CLUSTER)
    disk.pwrite(b"data", clusters * CLUSTER - 4)
    t0 = disk.pread(4 * CLUSTER, 0)
    snap = rig.snapshot(disk)
    disk.pwrite(b"n" * (3 * CLUSTER), 0)
    assert_t0(snap, t0)


def test_r11_a_disk_without_holes_is_not_searched_for_them(rig):
    disk = rig.disk(4 * CLUSTER)
    rig.snapshot(disk)
    plan = rig.plan(disk)
    disk.pwrite(NEW, 0)
    assert [call for call in plan.calls("seek") if call[1]] == []
    assert len(plan.calls("pread")) == 1


def test_r11_a_hole_of_a_disk_that_was_cut_is_an_error(rig):
    disk = rig.sparse(4 * CLUSTER)
    rig.snapshot(disk)
    os.truncate(disk.path, CLUSTER)
    with pytest.raises(cbwcore.CopyBeforeWriteError) as refused:
        disk.pwrite(NEW, 2 * CLUSTER)
    assert (refused.value.errno, refused.value.operation) == (errno.EIO, "source-read")


def test_r11_written_zeroes_cost_no_more_than_holes(rig):
    disk = rig.disk(bytes(4 * CLUSTER))
    assert allocated(disk.path) > 0
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 2 * CLUSTER)
    assert allocated(snap.target) == 0
    assert_t0(snap, disk.t0)


def test_r11_of_a_run_only_the_clusters_with_data_are_written(rig):
    content = b"a" * CLUSTER + bytes(2 * CLUSTER) + b"b" * CLUSTER + bytes(CLUSTER - 1) + b"c" + bytes(100)
    disk = rig.disk(content)
    snap = rig.snapshot(disk)
    plan = rig.plan(snap)
    disk.pwrite(b"n" * disk.size, 0)
    assert sum(length for _, length in ranges(plan, "pwrite")) == 3 * CLUSTER
    assert snap._map("zero") == [False, True, True, False, False, True]
    assert snap.stats().target_bytes == allocated(snap.target) == 3 * CLUSTER
    assert_t0(snap, disk.t0)


@pytest.mark.parametrize("last", [0, CLUSTER // 2, CLUSTER - 1])
def test_r11_one_byte_that_is_not_zero_makes_a_cluster_data(rig, last):
    content = bytearray(CLUSTER)
    content[last] = 1
    disk = rig.disk(bytes(content))
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 4096)
    assert_t0(snap, disk.t0)
    assert snap._map("zero") == [False]


def test_r11_zeroes_are_really_there_in_a_target_full_of_garbage(rig):
    disk = rig.disk(bytes(2 * CLUSTER) + b"a" * CLUSTER + bytes(CLUSTER + 100))
    target = rig.path("target")
    target.write_bytes(b"\xff" * disk.size)
    snap = rig.snapshot(disk, target)
    disk.pwrite(b"n" * disk.size, 0)
    assert_t0(snap, disk.t0)
    snap.close()
    assert file_bytes(target) == disk.t0
    assert allocated(target) < 2 * CLUSTER


def test_r11_holes_of_an_existing_target_are_left_alone(rig):
    disk = rig.sparse(4 * CLUSTER)
    target = rig.path("target")
    with open(target, "wb") as f:
        f.truncate(disk.size)
        f.seek(CLUSTER)
        f.write(b"\xff" * 4096)
    snap = rig.snapshot(disk, target)
    disk.pwrite(b"n" * disk.size, 0)
    assert allocated(snap.target) == 0
    assert_t0(snap, bytes(disk.size))
    assert file_bytes(target) == bytes(disk.size)


def test_r11_tmpfs_is_not_asked_for_the_holes_of_a_target(rig):
    """It would walk through all pages of it that were allocated and never written: 30 ms for each GiB."""
    disk = rig.sparse(4 * CLUSTER)
    target = rig.path("target")
    with open(target, "wb") as f:
        os.posix_fallocate(f.fileno(), 0, disk.size)
    snap = rig.snapshot(disk, target)
    plan = rig.plan(snap)
    for c in range(1, 4):
        disk.pwrite(NEW, c * CLUSTER)
    assert {call[1] for call in plan.calls("seek")} == {0}, "where it ends (R12)"
    assert written(plan) == [("zero", c * CLUSTER, CLUSTER) for c in range(1, 4)]
    assert_t0(snap, bytes(disk.size))


def test_r12_a_target_that_was_cut_takes_no_zeroes(rig):
    """A copy of them would succeed behind its end, and say nothing of those that were lost."""
    disk = rig.sparse(4 * CLUSTER)
    target = rig.path("target")
    target.write_bytes(b"\xff" * disk.size)
    snap = rig.snapshot(disk, target)
    os.truncate(target, CLUSTER)
    assert_refused(lambda: disk.pwrite(NEW, 2 * CLUSTER), errno.EIO, "target-write", 2 * CLUSTER, CLUSTER)
    assert file_bytes(disk.path) == bytes(disk.size)
    os.truncate(target, disk.size)
    assert_refused(lambda: disk.pwrite(NEW, CLUSTER), errno.EIO, "target-write", CLUSTER, CLUSTER)
    assert_t0(snap, bytes(disk.size))


def test_r11_where_tmpfs_is_slow_to_tell_holes_they_are_read(rig):
    """For the same reason: three slow answers in a row, and the snapshot asks no more. Two change nothing."""
    disk = rig.sparse(20 * CLUSTER)
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.delay("seek", 0.001, times=2)
    for c in range(4):
        disk.pwrite(NEW, c * CLUSTER)
    assert plan.calls("pread") == []
    plan.delay("seek", 0.001)
    for c in range(4, 10):
        disk.pwrite(NEW, c * CLUSTER)
    assert ranges(plan, "pread") == [(c * CLUSTER, CLUSTER) for c in range(7, 10)]
    assert snap.stats().cbw_zero_bytes == 10 * CLUSTER
    assert allocated(snap.target) == 0
    assert_t0(snap, bytes(disk.size))
    snap.close()
    plan.forget_calls()
    rig.snapshot(disk)
    disk.pwrite(NEW, 10 * CLUSTER)
    assert plan.calls("seek"), "another snapshot asks again"


def test_r11_zeroes_count_nothing_towards_the_target_limit(rig):
    disk = rig.disk(bytes(3 * CLUSTER) + b"a" * CLUSTER)
    snap = rig.snapshot(disk, target_limit=0)
    disk.pwrite(b"n" * (3 * CLUSTER), 0)
    assert_refused(lambda: disk.pwrite(NEW, 3 * CLUSTER), errno.ENOSPC, "target-write", 3 * CLUSTER, CLUSTER)
    assert_t0(snap, disk.t0)


def test_r11_a_target_that_cannot_punch_holes_is_written_zeroes(rig):
    disk = rig.sparse(CLUSTER)
    target = rig.path("target")
    target.write_bytes(b"\xff" * CLUSTER)
    snap = rig.snapshot(disk, target)
    plan = rig.plan(snap)
    plan.error("zero", errno.EOPNOTSUPP)
    disk.pwrite(NEW, 0)
    assert file_bytes(target) == bytes(CLUSTER)
    assert_t0(snap, bytes(CLUSTER))


# ---- R12 ----


def everything(disk, snap):
    """One of each request; what the snapshot reads must be T0 after it."""
    disk.pwrite(b"w" * 5000, 100)
    disk.pwrite(b"f" * 5000, CLUSTER + 100, fua=True)
    disk.pwrite_zeroes(2 * CLUSTER + 100, 9000)
    disk.discard(3 * CLUSTER, 8192)
    disk.flush()
    expected = bytearray(disk.t0)
    expected[100:5100] = b"w" * 5000
    expected[CLUSTER + 100 : CLUSTER + 5100] = b"f" * 5000
    expected[2 * CLUSTER + 100 : 2 * CLUSTER + 9100] = bytes(9000)
    expected[3 * CLUSTER : 3 * CLUSTER + 8192] = bytes(8192)
    assert disk.pread(disk.size, 0) == bytes(expected)
    list(disk.block_status())
    list(snap.block_status())
    assert_t0(snap, disk.t0)
    snap.discard(0, CLUSTER)


@pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN])
def test_r12_interrupted_calls_are_unseen(rig, code):
    disk = rig.disk(4 * CLUSTER)
    target = rig.path("target")
    target.write_bytes(b"\xff" * disk.size)
    snap = rig.snapshot(disk, target)
    for plan in (rig.plan(disk), rig.plan(snap)):
        for op in ("pread", "pwrite", "zero", "discard", "flush", "seek"):
            plan.error(op, code, times=2)
            plan.error(op, code, skip=3, times=1)
    everything(disk, snap)
    assert snap.stats().cbw_failures == 0


@pytest.mark.parametrize("nbytes", [1, 511, 4096])
def test_r12_short_transfers_are_unseen(rig, nbytes):
    disk = rig.disk(4 * CLUSTER)
    snap = rig.snapshot(disk)
    for plan in (rig.plan(disk), rig.plan(snap)):
        plan.short("pread", nbytes, times=40)
        plan.short("pwrite", nbytes, times=40)
    everything(disk, snap)
    assert snap.stats().cbw_failures == 0


def test_r12_short_transfers_of_a_direct_disk_are_unseen(rig, tmp_path, open_direct):
    disk = open_direct(tmp_path, pattern(4 * CLUSTER + 100))
    snap = rig.snapshot(disk, tmp_path / "target")
    for plan in (rig.plan(disk), rig.plan(snap)):
        plan.short("pread", 4096, times=40)
        plan.short("pwrite", 8192, times=40)
    everything(disk, snap)


def test_r12_an_attempt_that_ends_inside_a_block_is_made_again_from_the_block_on(rig, place, open_direct):
    """On tmpfs, which takes requests of parts of blocks, as the plan makes them."""
    disk = open_direct(place, pattern(4 * CLUSTER))
    plan = rig.plan(disk)
    for op in ("pread", "pwrite"):
        plan.short(op, 4096 + 100, times=1)
    new = pattern(CLUSTER, seed=5)
    disk.pwrite(new, 0)
    assert disk.pread(CLUSTER, 0) == new
    for op in ("pread", "pwrite"):
        assert [call for call in ranges(plan, op) if call[0] % 4096] == []


def cut(disk, size):
    os.truncate(disk.path, size)


@pytest.mark.parametrize("policy", ["break-guest-write", S])
def test_r12_the_end_of_file_inside_the_disk_is_an_error_for_copies(rig, policy):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=policy)
    cut(disk, 2 * CLUSTER + 100)
    if policy == S:
        disk.pwrite(NEW, 2 * CLUSTER)
        assert_broken(snap, errno.EIO, "source-read", 2 * CLUSTER, CLUSTER)
        return
    for offset in (2 * CLUSTER, 3 * CLUSTER):
        assert_refused(lambda offset=offset: disk.pwrite(NEW, offset), errno.EIO, "source-read", offset, CLUSTER)
    assert snap._map("done") == [False] * 4
    assert disk.pread(2 * CLUSTER + 100, 0) == disk.t0[: 2 * CLUSTER + 100]  # nothing was written


def test_r12_the_end_of_file_inside_the_disk_is_an_error_for_reads(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    cut(disk, CLUSTER + 100)
    for reads in (disk, snap):
        for length, offset in ((101, CLUSTER), (1, CLUSTER + 100), (CLUSTER, 3 * CLUSTER)):
            with pytest.raises(OSError, match="Input/output") as e:
                reads.pread(length, offset)
            assert e.value.errno == errno.EIO
    assert disk.pread(100, CLUSTER) == disk.t0[CLUSTER : CLUSTER + 100]
    with contextlib.suppress(OSError):  # what is left may be T0's; a snapshot may also refuse to vouch for it
        assert snap.pread(100, CLUSTER) == disk.t0[CLUSTER : CLUSTER + 100]
    assert snap.state == "armed"


@pytest.mark.parametrize("size", [0, 100, CLUSTER, 2 * CLUSTER + 100, 4 * CLUSTER - 1])
def test_r12_the_end_of_file_inside_the_disk_is_an_error_for_block_status(rig, size):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    cut(disk, size)
    for asked in (disk, snap):
        told = []
        with pytest.raises(OSError, match="Input/output"):  # noqa: PT012
            for extent in asked.block_status():
                told.append(extent)
        assert not any(extent.zero for extent in told)


def test_r12_a_disk_that_was_cut_inside_a_hole_never_passes_for_zeroes(rig):
    disk = rig.sparse(4 * CLUSTER)
    snap = rig.snapshot(disk)
    cut(disk, CLUSTER)
    for asked in (disk, snap):
        with pytest.raises(OSError, match="Input/output"):
            list(asked.block_status(2 * CLUSTER, CLUSTER))
    with pytest.raises(cbwcore.CopyBeforeWriteError):
        disk.pwrite(NEW, 2 * CLUSTER)


def test_r12_a_disk_that_grew_is_never_read_past_its_size(rig):
    disk = rig.disk(CLUSTER + 100)
    snap = rig.snapshot(disk)
    os.truncate(disk.path, 4 * CLUSTER)
    plan = rig.plan(disk)
    assert disk.size == snap.size == CLUSTER + 100
    for call in (
        lambda: disk.pread(1, CLUSTER + 100),
        lambda: snap.pread(2, CLUSTER + 99),
        lambda: disk.pwrite(b"xx", CLUSTER + 99),
        lambda: disk.pwrite_zeroes(CLUSTER, 101),
        lambda: disk.discard(CLUSTER, 101),
        lambda: snap.discard(CLUSTER, 101),
    ):
        with pytest.raises(cbwcore.ConfigError):
            call()
    disk.pwrite(b"x", CLUSTER + 99)
    assert ranges(plan, "pread") == [(CLUSTER, 100)]
    assert_t0(snap, disk.t0)


# ---- R13 ----


def test_r13_alignment_comes_from_the_kernel(rig, tmp_path, open_direct):
    disk = open_direct(tmp_path, pattern(CLUSTER))
    known = dio_alignment(disk._file.fd)
    if known is None:
        pytest.skip("this kernel does not tell")
    assert (max(known[0], 1), known[1]) == (disk._file.mem_align, disk._file.align)


@pytest.mark.parametrize("size", [4 * CLUSTER, 4 * CLUSTER + 777, 300])
def test_r13_unaligned_requests_of_a_direct_disk_are_served(rig, tmp_path, open_direct, size):
    disk = open_direct(tmp_path, pattern(size))
    snap = rig.snapshot(disk, tmp_path / "target")
    plan = rig.plan(disk)
    expected = bytearray(disk.t0)
    for offset, length in [(1, 7), (511, 2), (100, 200), (0, size), (size - 1, 1), (size // 2 + 1, size // 3)]:
        if offset + length > size:
            continue
        new = pattern(length, seed=offset)
        disk.pwrite(new, offset)
        expected[offset : offset + length] = new
        assert disk.pread(length, offset) == new
    assert disk.pread(size, 0) == bytes(expected)
    assert_t0(snap, disk.t0)
    edge = disk._file.direct_end
    assert all(off % disk._file.align == 0 for off, _ in ranges(plan, "pwrite") if off < edge)


def test_r13_two_unaligned_writes_in_one_block_lose_neither(rig, tmp_path, open_direct):
    disk = open_direct(tmp_path, pattern(CLUSTER))
    disk.pwrite(b"t", 1)  # from here on writes are listed
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    first = rig.run(disk.pwrite, b"1" * 50, 1000)
    stalled(plan)
    second = rig.run(disk.pwrite, b"2" * 50, 1060)
    second.join(0.1)
    assert not second.done
    assert ranges(plan, "pwrite") == []
    plan.release()
    first.result()
    second.result()
    assert disk.pread(110, 1000) == b"1" * 50 + disk.t0[1050:1060] + b"2" * 50


def test_r13_an_aligned_write_is_not_lost_under_a_read_modify_write(rig, tmp_path, open_direct):
    disk = open_direct(tmp_path, pattern(CLUSTER))
    unit = disk._file.align
    disk.pwrite(b"t", 1)
    plan = rig.plan(disk)
    aligned = mmap.mmap(-1, unit)  # memory that needs no bounce buffer
    aligned.write(b"M" * unit)
    for change, expected in (
        (lambda: disk.pwrite(b"A" * unit, unit), b"A"),
        (lambda: disk.pwrite(aligned, unit), b"M"),
        (lambda: disk.pwrite_zeroes(unit, unit), b"\0"),
        (lambda: disk.discard(unit, unit), b"\0"),
    ):
        plan.stall("pread", times=1)
        first = rig.run(disk.pwrite, b"1", unit + 5)
        stalled(plan)
        second = rig.run(change)
        second.join(0.05)
        assert not second.done
        plan.release()
        first.result()
        second.result()
        assert disk.pread(unit, unit) == expected * unit


def test_r13_writes_elsewhere_go_on_during_a_read_modify_write(rig, tmp_path, open_direct):
    disk = open_direct(tmp_path, pattern(4 * CLUSTER))
    disk.pwrite(b"t", 1)
    plan = rig.plan(disk)
    plan.stall("pread", times=1)
    first = rig.run(disk.pwrite, b"1", 5)
    stalled(plan)
    rig.run(disk.pwrite, b"2", CLUSTER + 5).result()
    rig.run(disk.pwrite, b"3" * CLUSTER, 2 * CLUSTER).result()
    rig.run(disk.pread, 10, 0).result()
    assert not first.done
    plan.release()
    first.result()


def test_r13_many_unaligned_writers_of_a_few_blocks_lose_nothing(rig, tmp_path, open_direct):
    disk = open_direct(tmp_path, bytes(4096))
    start = threading.Barrier(8)

    def write(i):
        start.wait(20)
        for at in range(i, 4096, 8):
            disk.pwrite(bytes([65 + i]), at)

    for guest in [rig.run(write, i) for i in range(8)]:
        guest.result()
    assert disk.pread(4096, 0) == bytes(range(65, 73)) * 512


# ---- R14 ----


def test_r14_flush_syncs_after_all_completed_writes(rig):
    disk = rig.disk()
    plan = rig.plan(disk)
    disk.pwrite(NEW, 0)
    disk.pwrite(NEW, CLUSTER)
    disk.flush()
    assert [op for op, *_ in plan.calls()] == ["pwrite", "pwrite", "flush"]
    disk.pwrite_zeroes(0, 4096, fua=True)
    assert [op for op, *_ in plan.calls()][-2:] == ["zero", "flush"]


@pytest.mark.parametrize(
    ("change", "durable"),
    [
        ("disk.pwrite(b'plain', 5)", False),
        ("disk.pwrite(b'plain', 5); disk.flush()", True),
        ("disk.pwrite(b'plain', 65541, fua=True)", True),
        ("disk.pwrite_zeroes(5, 10, fua=True)", True),
    ],
)
def test_r14_the_system_calls_are_durable_ones(rig, tmp_path, change, durable):
    """The write itself is RWF_DSYNC, or the disk is synced after it."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not here")
    disk = tmp_path / "disk"
    disk.write_bytes(b"d" * (2 * CLUSTER))
    code = f"import cbwcore; disk = cbwcore.Disk({str(disk)!r}); snap = disk.snapshot(); {change}; print('end')"
    log = tmp_path / "log"
    trace = ["strace", "-f", "-y", "-o", str(log), "-e", "trace=pwrite64,pwritev2,fallocate,fdatasync"]
    assert os.spawnvp(os.P_WAIT, "strace", [*trace, sys.executable, "-c", code]) == 0
    calls = [line for line in log.read_text().splitlines() if f"<{disk}>" in line]
    written = [i for i, call in enumerate(calls) if "write" in call or "fallocate" in call]
    assert written
    after = [call for call in calls[written[-1] :] if "RWF_DSYNC" in call or "fdatasync" in call]
    assert bool(after) == durable


@pytest.mark.parametrize("again", [lambda disk: disk.flush(), lambda disk: disk.pwrite_zeroes(0, 4096, fua=True)])
def test_r14_a_failed_flush_is_for_good(rig, again):
    disk = rig.disk()
    plan = rig.plan(disk)
    plan.error("flush", errno.ENOSPC, times=1)
    disk.pwrite(NEW, 0)
    with pytest.raises(OSError, match="No space") as e:
        disk.flush()
    assert (e.value.errno, e.value.filename) == (errno.ENOSPC, disk.path)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            again(disk)
    assert len(ranges(plan, "flush")) == 1  # the next one would succeed, and lie
    disk.pwrite(NEW, CLUSTER)
    assert disk.pread(4096, CLUSTER) == NEW


def write_back(path):
    """Have the kernel write back what is dirty, without asking it for the outcome."""
    with open(path, "rb") as f:
        whole = ctypes.c_int64(0)
        ctypes.CDLL(None).sync_file_range(f.fileno(), whole, whole, 7)


@pytest.mark.parametrize("fua", [False, True])
def test_r14_a_write_that_the_kernel_lost_makes_flush_fail(rig, resources, needs, fua):
    """A loop device over a file system that runs full and then has room again: the first write is lost in between."""
    with needs():
        full = resources.mount("none", resources.directory(), "-t", "tmpfs", "-o", "size=1m")
        with open(f"{full}/image", "wb") as f:
            f.truncate(4 << 20)
        disk = rig.open(resources.loop(f"{full}/image"), None)
    with open(f"{full}/ballast", "wb", buffering=0) as f:
        f.write(b"x" * (1 << 20))
    try:
        disk.pwrite(b"A" * CLUSTER, 0)
        write_back(disk.path)
        os.truncate(f"{full}/ballast", 0)
        with contextlib.suppress(OSError):  # it may say, of its own sync, that something was lost
            disk.pwrite(b"B" * 4096, 1 << 20, fua=fua)
        with pytest.raises(OSError, match="Input/output"):
            disk.flush()
    finally:
        disk.close()


def test_r14_a_failed_plain_write_leaves_flush_alone(rig):
    disk = rig.disk()
    plan = rig.plan(disk)
    plan.error("pwrite", errno.EIO, times=1)
    with pytest.raises(OSError, match="Input/output"):
        disk.pwrite(NEW, CLUSTER)
    disk.flush()


def test_r14_a_durable_write_goes_past_the_snapshots_like_any(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    disk.pwrite(NEW, 0, fua=True)
    disk.pwrite_zeroes(CLUSTER, CLUSTER, fua=True)
    assert snap._map("done") == [True, True, False, False]
    assert_t0(snap, disk.t0)


# ---- R19 ----


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("pread", lambda disk: disk.pread(10, 5)),
        ("pread", lambda disk: disk.pread_into(bytearray(10), 5)),
        ("pwrite", lambda disk: disk.pwrite(b"x", 5)),
        ("zero", lambda disk: disk.pwrite_zeroes(0, 4096)),
        ("discard", lambda disk: disk.discard(0, 4096)),
        ("flush", lambda disk: disk.flush()),
        ("seek", lambda disk: list(disk.block_status())),
    ],
)
def test_r19_an_error_of_the_disk_reaches_the_caller_of_every_request(rig, op, call):
    disk = rig.disk()
    rig.plan(disk).error(op, errno.EREMOTEIO, times=1)
    with pytest.raises(OSError, match=os.strerror(errno.EREMOTEIO)) as e:
        call(disk)
    assert not isinstance(e.value, cbwcore.CbwError)
    assert (e.value.errno, e.value.filename) == (errno.EREMOTEIO, disk.path)
    if op != "flush":
        call(disk)


@pytest.mark.parametrize(
    ("op", "of_target", "call"),
    [
        ("pread", False, lambda snap: snap.pread(10, 5)),
        ("pread", True, lambda snap: snap.pread(10, CLUSTER)),
        ("pread", True, lambda snap: snap.pread_into(bytearray(10), CLUSTER)),
        ("seek", False, lambda snap: list(snap.block_status())),
        ("discard", True, lambda snap: snap.discard(CLUSTER, CLUSTER)),
    ],
)
def test_r19_an_error_under_a_snapshot_reaches_its_caller_and_breaks_nothing(rig, op, of_target, call):
    disk = rig.disk()
    snap = rig.snapshot(disk, on_cbw_error=S)
    disk.pwrite(NEW, CLUSTER)
    rig.plan(snap if of_target else disk).error(op, errno.EREMOTEIO, times=1)
    with pytest.raises(OSError, match=os.strerror(errno.EREMOTEIO)) as e:
        call(snap)
    assert not isinstance(e.value, cbwcore.CbwError)
    assert e.value.errno == errno.EREMOTEIO
    assert str(e.value.filename) == str(snap.target if of_target else disk.path)
    assert (snap.state, snap.error) == ("armed", None)
    assert snap.pread(CLUSTER, 0) == disk.t0[:CLUSTER]


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_r19_errors_of_every_lseek_are_looked_at(rig, skip):
    """SEEK_DATA and SEEK_HOLE of an extent of data; SEEK_DATA and SEEK_END of a hole."""
    disk = rig.disk(b"a" * CLUSTER)
    os.truncate(disk.path, 2 * CLUSTER)
    disk.close()
    disk = rig.open(disk.path, None)
    plan = rig.plan(disk)
    plan.error("seek", errno.EREMOTEIO, skip=skip, times=1)
    with pytest.raises(OSError, match=os.strerror(errno.EREMOTEIO)):
        list(disk.block_status())


@pytest.mark.parametrize("op", ["seek", "zero"])
def test_r19_a_target_that_fails_to_become_zero_fails_the_copy(rig, op):
    disk = rig.sparse(CLUSTER)
    target = rig.path("target")
    target.write_bytes(b"\xff" * CLUSTER)
    snap = rig.snapshot(disk, target)
    rig.plan(snap).error(op, errno.EREMOTEIO, times=1)
    assert_refused(lambda: disk.pwrite(NEW, 0), errno.EREMOTEIO, "target-write", 0, CLUSTER)
    disk.pwrite(NEW, 0)
    assert_t0(snap, bytes(CLUSTER))


def test_r19_fallocate_that_is_not_supported_is_done_by_writing(rig):
    disk = rig.disk()
    snap = rig.snapshot(disk)
    plan = rig.plan(disk)
    plan.error("zero", errno.EOPNOTSUPP)
    plan.error("discard", errno.EOPNOTSUPP)
    disk.pwrite_zeroes(100, CLUSTER)
    assert disk.pread(CLUSTER, 100) == bytes(CLUSTER)
    disk.discard(2 * CLUSTER, CLUSTER)  # advisory
    assert_t0(snap, disk.t0)


def test_r19_an_error_in_the_middle_of_write_zeroes_is_seen(rig):
    disk = rig.disk()
    plan = rig.plan(disk)
    plan.error("zero", errno.EOPNOTSUPP)
    plan.error("pwrite", errno.EIO, skip=1)
    with pytest.raises(OSError, match="Input/output"):
        disk.pwrite_zeroes(0, 3 * CLUSTER)


def close_behind(fd):
    """Make the next use of `fd` an EBADF."""
    os.close(fd)


def test_r19_errors_of_close_are_reported(rig):
    disk = rig.disk()
    close_behind(disk._file.fd)
    with pytest.raises(OSError, match="Bad file descriptor") as e:
        disk.close()
    assert (e.value.errno, e.value.filename) == (errno.EBADF, disk.path)
    assert disk.closed
    disk.close()


def test_r19_errors_of_a_targets_close_are_reported(rig):
    disk = rig.disk()
    target = rig.path("target")
    snap = rig.snapshot(disk, target)
    (fd,) = [fd for fd in os.listdir("/proc/self/fd") if is_file(fd, target)]
    close_behind(int(fd))
    with pytest.raises(OSError, match="Bad file descriptor") as e:
        snap.close()
    assert (e.value.errno, str(e.value.filename)) == (errno.EBADF, str(target))
    assert snap.state == "closed"
    assert disk.snapshots == ()
    snap.close()
    disk.pwrite(NEW, 0)


def is_file(fd, path):
    try:
        return os.path.samefile(f"/proc/self/fd/{fd}", path)
    except OSError:
        return False


def test_r19_a_target_descriptor_that_went_away_is_a_copy_error(rig):
    disk = rig.disk()
    target = rig.path("target")
    snap = rig.snapshot(disk, target, on_cbw_error=S)
    (fd,) = [fd for fd in os.listdir("/proc/self/fd") if is_file(fd, target)]
    close_behind(int(fd))
    disk.pwrite(NEW, 0)
    assert snap.state == "broken"
    assert_cause(snap.error, errno.EBADF, "target-write", 0, CLUSTER)
    with pytest.raises(OSError, match="Bad file descriptor"):
        snap.close()


def test_r19_a_failed_close_of_one_snapshot_still_closes_the_disk(rig):
    disk = rig.disk()
    target = rig.path("target")
    rig.snapshot(disk, target)
    other = rig.snapshot(disk)
    (fd,) = [fd for fd in os.listdir("/proc/self/fd") if is_file(fd, target)]
    close_behind(int(fd))
    with pytest.raises(OSError, match="Bad file descriptor"):
        disk.close()
    disk.close()
    assert disk.closed
    assert other.state == "closed"
    with cbwcore.Disk(disk.path) as again:  # its lock is gone
        assert again.pread(10, 0) == disk.t0[:10]
