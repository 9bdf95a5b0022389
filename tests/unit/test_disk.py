"""The guest's side: sizes, buffers, locks, block status, figures, and what becomes of a disk after a fork."""

import array
import contextlib
import ctypes
import errno
import mmap
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

import cbwcore

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 on: threads are the point

CLUSTER = 65536
SIZES = [0, 1, 511, 512, 4095, 4096, 4097, CLUSTER, CLUSTER + 1, 3 * CLUSTER + 1000]


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_reads_and_writes_to_its_last_byte(make_image, size, direct, assert_status):
    path = make_image(size)
    t0 = Path(path).read_bytes()
    with cbwcore.Disk(path, direct=direct) as disk, disk.snapshot() as snapshot:
        assert disk.size == snapshot.size == size
        assert disk.pread(size, 0) == t0
        assert disk.pread(0, size) == b""
        if size:
            disk.pwrite(b"\0", size - 1)
            disk.pwrite(b"", size)
            disk.pwrite_zeroes(0, size // 2)
        disk.flush()
        now = bytes(size // 2) + t0[size // 2 : -1] + bytes(min(size, 1))
        assert disk.pread(size, 0) == now
        assert snapshot.pread(size, 0) == t0
        assert_status(disk, now)
        assert_status(snapshot, t0)
    assert Path(path).read_bytes() == now


@pytest.mark.parametrize("make_path", [str, Path, os.fsencode], ids=["str", "Path", "bytes"])
def test_a_path_of_any_kind(make_image, make_path):
    path = make_path(make_image(CLUSTER))
    with cbwcore.Disk(path) as disk:
        assert disk.path == os.fsdecode(path)
        assert disk.path in repr(disk)


def test_closing_by_the_context_manager_also_after_an_error(make_image):
    with pytest.raises(KeyError), cbwcore.Disk(make_image(CLUSTER)) as disk:
        raise KeyError
    assert disk.closed
    assert "closed" in repr(disk)


# ---- buffers ----

WRITABLE = {
    "bytearray": lambda: bytearray(4096),
    "memoryview": lambda: memoryview(bytearray(5000))[7:4103],
    "mmap": lambda: mmap.mmap(-1, 4096),
    "array of int": lambda: array.array("i", [0] * 1024),
    "ctypes": lambda: (ctypes.c_uint64 * 512)(),
    "numpy 2-D": lambda: np.zeros((8, 512), np.uint8),
    "numpy float": lambda: np.zeros(512),
}


@pytest.mark.parametrize("make", WRITABLE.values(), ids=WRITABLE.keys())
def test_any_contiguous_buffer_is_filled_and_written_whole(make_disk, make):
    disk = make_disk(3 * CLUSTER)
    t0 = disk.pread(disk.size, 0)
    with disk.snapshot() as snapshot:
        buffer = make()
        disk.pread_into(buffer, 100)
        assert bytes(memoryview(buffer).cast("B")) == t0[100:4196]
        disk.pwrite(buffer, CLUSTER)
        assert disk.pread(4096, CLUSTER) == t0[100:4196]
        other = make()
        snapshot.pread_into(other, CLUSTER)
        assert bytes(memoryview(other).cast("B")) == t0[CLUSTER : CLUSTER + 4096]


def test_a_buffer_in_use_by_a_read_cannot_be_resized(make_disk, plan):
    """It is held for the whole I/O."""
    disk = make_disk(CLUSTER)
    plan.stall("pread")
    disk._inject(plan)
    buffer = bytearray(4096)
    reader = threading.Thread(target=disk.pread_into, args=(buffer, 0))
    reader.start()
    plan.wait_stalled()
    with pytest.raises(BufferError):
        buffer.extend(b"x" * 100_000)
    plan.release()
    reader.join()
    disk._inject(None)
    buffer.append(1)


# ---- zeroes, discards, flush ----


@pytest.mark.parametrize("may_unmap", [False, True])
def test_zeroes_may_become_a_hole_or_stay_allocated(make_disk, may_unmap):
    disk = make_disk(16 * CLUSTER)
    before = os.stat(disk.path).st_blocks
    disk.pwrite_zeroes(CLUSTER, 8 * CLUSTER, may_unmap=may_unmap)
    assert disk.pread(8 * CLUSTER, CLUSTER) == bytes(8 * CLUSTER)
    allocated = os.stat(disk.path).st_blocks
    assert allocated < before if may_unmap else allocated == before


def test_a_discard_gives_the_space_back(make_disk):
    disk = make_disk(16 * CLUSTER)
    before = os.stat(disk.path).st_blocks
    disk.discard(CLUSTER, 8 * CLUSTER)
    assert os.stat(disk.path).st_blocks == before - 8 * CLUSTER // 512


def test_a_failed_flush_is_for_good(make_disk, plan):
    """The kernel forgets the pages that it could not write; a second flush that succeeds would lie (R14)."""
    disk = make_disk(CLUSTER)
    plan.error("flush", errno.EIO, times=1)
    disk._inject(plan)
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)) as failed:
            disk.flush()
        assert (failed.value.errno, failed.value.filename) == (errno.EIO, disk.path)
    disk._inject(None)


@pytest.mark.parametrize(
    ("op", "request_", "code"),
    [
        ("pread", lambda d: d.pread(1, 0), errno.EIO),
        ("pread", lambda d: d.pread_into(bytearray(1), 0), errno.ENXIO),
        ("pwrite", lambda d: d.pwrite(b"x", 0), errno.ENOSPC),
        ("pwrite", lambda d: d.pwrite(b"x", 0, fua=True), errno.EDQUOT),
        ("zero", lambda d: d.pwrite_zeroes(0, CLUSTER), errno.EIO),
        ("discard", lambda d: d.discard(0, CLUSTER), errno.EROFS),
        ("seek", lambda d: list(d.block_status()), errno.EIO),
    ],
    ids=["pread", "pread_into", "pwrite", "fua", "zeroes", "discard", "block_status"],
)
def test_a_failure_of_the_disk_is_an_os_error_with_errno_and_path(make_disk, plan, op, request_, code):
    disk = make_disk(CLUSTER)
    plan.error(op, code)
    disk._inject(plan)
    with pytest.raises(OSError, match=os.strerror(code)) as failed:
        request_(disk)
    assert (failed.value.errno, failed.value.filename) == (code, disk.path)
    assert not isinstance(failed.value, cbwcore.CbwError)
    disk._inject(None)
    assert disk.pread(1, 0)


def test_a_disk_cut_short_is_an_error_and_not_zeroes(make_disk):
    disk = make_disk(4 * CLUSTER)
    t0 = disk.pread(CLUSTER, 0)
    with disk.snapshot() as snapshot:
        os.truncate(disk.path, CLUSTER)
        assert disk.pread(CLUSTER, 0) == t0
        with contextlib.suppress(OSError):
            assert snapshot.pread(CLUSTER, 0) == t0
        for source in (disk, snapshot):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                source.pread(2 * CLUSTER, 0)
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                list(source.block_status())
        with pytest.raises(cbwcore.CopyBeforeWriteError) as refused:
            disk.pwrite(b"x", 3 * CLUSTER)
        assert refused.value.operation == "source-read"
        assert os.stat(disk.path).st_size == CLUSTER


# ---- block status ----


def test_block_status_shows_the_holes_of_the_file(make_disk):
    disk = make_disk(bytes(100))
    os.truncate(disk.path, 8 * CLUSTER)
    disk.close()
    with cbwcore.Disk(disk.path) as disk:
        disk.pwrite(b"x" * 4096, 2 * CLUSTER)
        disk.pwrite_zeroes(0, CLUSTER)
        assert [(e.offset, e.length, e.data, e.zero) for e in disk.block_status()] == [
            (0, 2 * CLUSTER, False, True),
            (2 * CLUSTER, 4096, True, False),
            (2 * CLUSTER + 4096, 6 * CLUSTER - 4096, False, True),
        ]
        assert [(e.offset, e.length) for e in disk.block_status(2 * CLUSTER + 1, 10)] == [(2 * CLUSTER + 1, 10)]
        assert list(disk.block_status(5, 0)) == list(disk.block_status(8 * CLUSTER)) == []


def test_block_status_is_lazy(make_disk, plan):
    disk = make_disk(CLUSTER)
    disk._inject(plan)
    status = disk.block_status()
    assert plan.calls() == []
    next(status)
    assert plan.calls("seek")
    disk._inject(None)


# ---- who may have it open ----


def test_readers_share_a_disk_and_keep_writers_out(make_image):
    path = make_image(CLUSTER)
    with cbwcore.Disk(path, read_only=True) as one, cbwcore.Disk(path, read_only=True) as two:
        assert one.pread(10, 0) == two.pread(10, 0)
        with pytest.raises(cbwcore.ConfigError, match="in use"):
            cbwcore.Disk(path)
        with one.snapshot() as snapshot:
            assert snapshot.pread(10, 0) == two.pread(10, 0)
    cbwcore.Disk(path).close()


def test_a_closed_disk_and_its_target_can_be_opened_again(make_image, place):
    path = make_image(CLUSTER)
    for _ in range(3):
        with cbwcore.Disk(path) as disk:
            disk.snapshot(place / "target")
            disk.pwrite(b"x", 0)


# ---- figures ----


def test_stats_count_what_the_guest_did(make_disk):
    disk = make_disk(3 * CLUSTER)
    disk.pwrite(b"12345", 10)
    disk.pwrite_zeroes(0, 1000)
    disk.discard(0, CLUSTER)
    disk.pread(7, 0)
    disk.pread_into(bytearray(13), 0)
    with pytest.raises(cbwcore.ConfigError):
        disk.pwrite(b"x", 3 * CLUSTER)
    with disk.snapshot():
        stats = disk.stats()
    assert (stats.guest_writes, stats.guest_write_bytes) == (3, 5 + 1000 + CLUSTER)
    assert (stats.guest_reads, stats.guest_read_bytes, stats.snapshots) == (2, 20, 1)
    assert disk.stats().snapshots == 0


def test_guests_in_threads_run_at_the_same_time(make_disk, plan):
    """Without the GIL, and without a lock of the engine across I/O (R18): two writes and a read are inside at once."""
    disk = make_disk(4 * CLUSTER)
    plan.stall("pwrite")
    plan.stall("pread")
    disk._inject(plan)
    calls = [lambda: disk.pwrite(b"a", 0), lambda: disk.pwrite(b"b", 1), lambda: disk.pread(1, 0)]
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    plan.wait_stalled(3)
    plan.release()
    for thread in threads:
        thread.join()
    disk._inject(None)
    assert disk.pread(2, 0) == b"ab"


# ---- fork ----

AFTER_FORK = {
    "disk.pread": lambda d, s: d.pread(1, 0),
    "disk.pread_into": lambda d, s: d.pread_into(bytearray(1), 0),
    "disk.pwrite": lambda d, s: d.pwrite(b"x", 0),
    "disk.pwrite_zeroes": lambda d, s: d.pwrite_zeroes(0, 1),
    "disk.discard": lambda d, s: d.discard(0, CLUSTER),
    "disk.flush": lambda d, s: d.flush(),
    "disk.block_status": lambda d, s: list(d.block_status()),
    "disk.snapshot": lambda d, s: d.snapshot(d.path + ".child"),
    "snapshot_group": lambda d, s: cbwcore.snapshot_group([(d, d.path + ".child")]),
    "bitmaps.add": lambda d, s: d.bitmaps.add("new"),
    "bitmap.disable": lambda d, s: d.bitmaps["old"].disable(),
    "bitmap.clear": lambda d, s: d.bitmaps["old"].clear(),
    "snapshot.pread": lambda d, s: s.pread(1, 0),
    "snapshot.pread_into": lambda d, s: s.pread_into(bytearray(1), 0),
    "snapshot.block_status": lambda d, s: list(s.block_status()),
    "snapshot.discard": lambda d, s: s.discard(0, CLUSTER),
    "snapshot.open": lambda d, s: s.open(),
    "snapshot.stats": lambda d, s: s.stats(),
    "snapshot.on_cbw_error": lambda d, s: setattr(s, "on_cbw_error", "break-snapshot"),
    "snapshot.cbw_timeout": lambda d, s: setattr(s, "cbw_timeout", 5.0),
}
HARMLESS_AFTER_FORK = {
    "disk.close": lambda d, s: d.close(),
    "snapshot.close": lambda d, s: s.close(),
    "snapshot.state": lambda d, s: s.state,
    "snapshot.error": lambda d, s: s.error,
    "repr": lambda d, s: repr(d) + repr(s) + repr(d.bitmaps["old"]),
}


def in_child(call, limit=3):
    """The outcome of ``call`` in a forked child: "returned", or the exception's name; "hung" after ``limit`` s."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        outcome = "returned"
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(limit)
            call()
        except BaseException as e:
            outcome = type(e).__name__
        os.write(writer, outcome.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        outcome = answer.read()
    os.waitpid(pid, 0)
    return outcome or "hung"


@pytest.fixture
def busy_at_fork(make_disk, plan, place):
    """A disk and its snapshot while another thread's guest write is in the middle of its I/O, where fork catches it."""
    disk = make_disk(3 * CLUSTER)
    disk.bitmaps.add("old")
    snapshot = disk.snapshot(place / "target")
    plan.stall("pwrite")
    disk._inject(plan)
    writer = threading.Thread(target=disk.pwrite, args=(b"in flight", 2 * CLUSTER))
    writer.start()
    plan.wait_stalled()
    yield disk, snapshot
    plan.release()
    writer.join()
    disk._inject(None)
    assert disk.pread(9, 2 * CLUSTER) == b"in flight"


@pytest.mark.parametrize("call", AFTER_FORK.values(), ids=AFTER_FORK.keys())
def test_a_forked_child_is_refused_and_the_parent_unaffected(busy_at_fork, unchanged, call):
    disk, snapshot = busy_at_fork
    t0 = snapshot.pread(CLUSTER, 0)
    with unchanged():
        assert in_child(lambda: call(disk, snapshot)) == "ValueError"
    assert disk.snapshots == (snapshot,)
    assert list(disk.bitmaps) == ["old"]
    assert snapshot.pread(CLUSTER, 0) == t0
    assert disk.pread(CLUSTER, 0) == t0


@pytest.mark.parametrize("call", HARMLESS_AFTER_FORK.values(), ids=HARMLESS_AFTER_FORK.keys())
def test_a_forked_child_may_let_go(busy_at_fork, unchanged, call):
    """Closing and looking do nothing to the parent and never hang."""
    disk, snapshot = busy_at_fork
    with unchanged():
        assert in_child(lambda: call(disk, snapshot)) == "returned"
    assert snapshot.state == "armed"
    assert snapshot.pread(1, 0) == disk.pread(1, 0)


def test_a_child_that_lives_on_does_not_keep_the_locks(make_image, place):
    """Locks of open file descriptions are inherited; closing in the parent must end them all the same."""
    path = make_image(CLUSTER)
    disk = cbwcore.Disk(path)
    disk.snapshot(place / "target")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        disk.close()
        with cbwcore.Disk(path) as disk:
            disk.snapshot(place / "target").close()
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(pid, 0)


def test_new_disks_work_in_a_child(make_image, make_disk):
    make_disk(CLUSTER, "parent.img").snapshot()
    path = make_image(CLUSTER, "child.img")

    def use():
        with cbwcore.Disk(path) as disk, disk.snapshot(cbw_timeout=5) as snapshot:
            old = disk.pread(1, 0)
            disk.pwrite(b"\xff", 0)
            assert snapshot.pread(1, 0) == old

    assert in_child(use) == "returned"
