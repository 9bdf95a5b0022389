"""A thousand rounds of open, arm, write, fail a copy, close: descriptors, threads and memory stay where they were."""

import contextlib
import ctypes
import errno
import gc
import os

import pytest
from engine_support import CLUSTER, G, S, pattern, until

import cbwcore
from cbwcore._cbwcore import FaultPlan, copy_buffers

ROUNDS, WARM_UP = (100, 40) if os.environ.get("CBWCORE_SANITIZER") else (1000, 200)
LOST = 64  # bytes a round that count as lost; the least that the core allocates for a round is larger
GROWTH = (16 if os.environ.get("CBWCORE_SANITIZER") else 4) << 20  # bytes of the process that come and go
NEW = b"n" * 4096


class Allocated(ctypes.Structure):
    """struct mallinfo2"""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [*zip(_names, [ctypes.c_size_t] * 10, strict=True)]


def allocated():
    """Bytes that malloc() has given out and not got back; 0 where a sanitizer, or an old libc, has its own or none."""
    if os.environ.get("CBWCORE_SANITIZER"):
        return 0
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = Allocated
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def resident():
    """Bytes in memory, but for what malloc() keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def mappings():
    with open("/proc/self/maps") as f:
        return sum(1 for _ in f)


def threads():
    return len(os.listdir("/proc/self/task"))


def descriptors():
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if is_open(int(fd)))


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:  # that of the listing itself
        return False
    return True


def one_round(path, number, io):
    """Two snapshots under both policies; copies fail at the source or the target, with and without a timeout."""
    side = ("pread", "pwrite")[number % 2]
    timeout = 60.0 if number % 3 == 0 else 0.0
    plan = FaultPlan()
    with cbwcore.Disk(path, io=io) as disk:
        snaps = [disk.snapshot(on_cbw_error=policy, cbw_timeout=timeout) for policy in (G, S)]
        (disk if side == "pread" else snaps[number // 2 % 2])._inject(plan)
        plan.error(side, errno.EIO)
        with contextlib.suppress(cbwcore.CopyBeforeWriteError):
            disk.pwrite(NEW, CLUSTER - 100)
        plan.release()
        disk.pwrite(NEW, 0)
        assert snaps[0].state == "armed"
        assert snaps[0].pread(8192, 0) == T0[:8192]


T0 = pattern(4 * CLUSTER)


@pytest.mark.parametrize("io", ["psync", "io_uring"])
def test_a_thousand_rounds_of_failure_leave_nothing(place, io, caplog):
    caplog.set_level("CRITICAL")  # breaks are logged, and pytest would keep each record
    path = place / "disk"

    def rounds(count):
        for number in range(count):
            path.write_bytes(T0)
            one_round(path, number, io)
        gc.collect()

    try:
        cbwcore.Disk(path_of(path), io=io).close()
    except cbwcore.ConfigError as e:
        pytest.skip(str(e))
    rounds(WARM_UP)
    before = descriptors(), threads()
    maps, size, given = mappings(), resident(), allocated()
    rounds(ROUNDS)
    until(lambda: threads() == before[1], "the end of all helper threads")
    assert (descriptors(), threads()) == before
    assert mappings() <= maps + 8, "mappings grow"  # malloc's own arenas come and go
    assert allocated() - given < LOST * ROUNDS, "memory is lost"
    assert resident() - size < GROWTH, "the process grows"
    assert copy_buffers()[1] == copy_buffers()[2], "a copy buffer was not given back"
    assert copy_buffers()[3] == 0, "a reserve was not given back"


def path_of(path):
    path.write_bytes(T0)
    return path


def test_a_closed_snapshot_that_is_kept_holds_no_buffer(place):
    """R17: of a bounce buffer, for a read that O_DIRECT does not fit, nothing is left after close()."""
    path = place / "disk"
    try:
        disk = cbwcore.Disk(path_of(path), direct=True)
    except cbwcore.ConfigError as e:
        pytest.skip(str(e))
    with disk:
        kept, given = [], 0
        for number in range(20):
            snapshot = disk.snapshot()
            snapshot.pread(1000, 1)
            snapshot.close()
            kept.append(snapshot)
            given = given if number else allocated()
        assert allocated() - given < 20 * 3000
