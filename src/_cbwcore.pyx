# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, embedsignature=True
"""The compiled core: the only crossings of the GIL, and the only place where an errno becomes an exception.

The rules of the data path live in the ``.pxd`` parts beside the Python modules; ``_engine.pxd`` is where to start.
Each class here owns one C structure and is completed by the Python class of the same name without ``Core``.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport E2BIG, EACCES, EIO
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from posix.stdlib cimport posix_memalign
from posix.unistd cimport close

from cbwcore._sys cimport (
    CBW_SLOTS, FALLOC_FL_PUNCH_HOLE, add_seq_cst, count_cpus, exchange_seq_cst, fallocate_once, has_holes, is_on_tmpfs,
    is_zero, knows_size, load_relaxed, monotonic_ns, pthread_cond_wait, pthread_mutex_lock, pthread_mutex_unlock, store_release,
)
from cbwcore._sys cimport birth_time as c_birth_time, dio_alignment as c_dio_alignment
from cbwcore._geometry cimport least, most, outer_end
from cbwcore._bitmap cimport bitmap, bitmap_count, bitmap_free, bitmap_init, bitmap_map_file, bitmap_next, bitmap_put, \
    bitmap_reset, bitmap_test, bitmap_unmap_file
from cbwcore._buffers cimport LARGEST, bufpool, bufpool_init, bufpool_reserve, bufpool_set_limit, class_bytes
from cbwcore._blockio cimport (
    blk, blk_init, blk_ops, psync_discard, psync_flush, psync_pread, psync_pread_cached, psync_pwrite, psync_seek, psync_zero,
    uring_discard, uring_pread, uring_pwrite, uring_seek, uring_zero,
)
from cbwcore._uring cimport HAVE_URING, LIBURING_VERSION, rings_forget, rings_init, rings_probe
from cbwcore._faults cimport (
    ACT_DELAY, ACT_ERROR, ACT_SHORT, ACT_STALL, LOG_LENGTH, MAX_RULES, OP_DISCARD, OP_FLUSH, OP_READ, OP_SEEK, OP_WRITE,
    OP_ZERO, fault_call, fault_plan, fault_rule, faulty_discard, faulty_flush, faulty_pread, faulty_pread_cached,
    faulty_pwrite, faulty_seek, faulty_zero, plan_init, plan_release,
)
from cbwcore._spin cimport spin_places
from cbwcore._snapshot cimport (
    E_ACCESS, E_BROKEN, E_CLOSED, HISTOGRAM, STATUS_ACCESS, STATUS_ZERO, cbw_stats, failure, snapshot, snapshot_discard,
    snapshot_init, snapshot_put, snapshot_read, snapshot_release, snapshot_set_timeout, snapshot_status, wake,
)
from cbwcore._engine cimport (
    GUEST_DISCARD, GUEST_WRITE, GUEST_WRITE_ZEROES, MAX_SINKS, add_sink, arm, drop_sink, disarm, disk, disk_close,
    disk_init, disk_put, gate_open, gate_shut, guest_flush, guest_read, guest_status, guest_write, switch,
)
from cbwcore._engine cimport MAX_SNAPSHOTS as C_MAX_SNAPSHOTS
from cbwcore._nbd_helpers cimport MAX_SEATS, helpers_destroy, helpers_init, helpers_stop, new_eventfd
from cbwcore._nbd_room cimport room_destroy, room_init
from cbwcore._nbd cimport (
    MAX_CONTEXTS, conn_destroy, conn_init, conn_serve, conn_stop, conn_visit, nbd_conn, nbd_server,
)
from cbwcore._load cimport (
    LOAD_ALIGN, MAX_LOAD_TARGETS, MAX_LOAD_THREADS, load, load_destroy, load_init, or_words, run_threads,
)

import errno as _errno
import os

from cbwcore.errors import ConfigError, CopyBeforeWriteError, SnapshotAccessError, SnapshotBrokenError

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object o, int *overflow) except? -1

# Names by the numbers of the enums in _snapshot.pxd.
OPERATIONS = ("source-read", "target-write", "timeout")
POLICIES = ("break-guest-write", "break-snapshot")
STATES = ("armed", "broken", "closed")
MAX_SNAPSHOTS = C_MAX_SNAPSHOTS
LIBURING = LIBURING_VERSION.decode()    # the version that the build has, "" for none or one unknown

cdef blk_ops PSYNC
PSYNC.pread = psync_pread
PSYNC.pread_cached = psync_pread_cached
PSYNC.pwrite = psync_pwrite
PSYNC.zero = psync_zero
PSYNC.discard = psync_discard
PSYNC.flush = psync_flush
PSYNC.seek = psync_seek
PSYNC.keeps_deadline = False

cdef blk_ops URING
URING.pread = uring_pread
URING.pread_cached = psync_pread_cached
URING.pwrite = uring_pwrite
URING.zero = uring_zero
URING.discard = uring_discard
URING.flush = psync_flush
URING.seek = uring_seek
URING.keeps_deadline = True

cdef blk_ops FAULTY
FAULTY.pread = faulty_pread
FAULTY.pread_cached = faulty_pread_cached
FAULTY.pwrite = faulty_pwrite
FAULTY.zero = faulty_zero
FAULTY.discard = faulty_discard
FAULTY.flush = faulty_flush
FAULTY.seek = faulty_seek
FAULTY.keeps_deadline = False          # a plan may stall a call

cdef bufpool POOL
if bufpool_init(&POOL, 128 << 20, 16 << 20) < 0 or rings_init() < 0:
    raise MemoryError("cannot set up the copy buffers")

store_release(&spin_places, count_cpus() - 1)

cdef uint64_t fork_generation = 0      # a forked child has none of the threads and half of the locks: it may use nothing


def _after_fork_in_child():
    global fork_generation
    fork_generation += 1
    bufpool_init(&POOL, POOL.limit, POOL.keep)      # its lock, and what it counts, were the parent's
    rings_forget()


os.register_at_fork(after_in_child=_after_fork_in_child)


# ---- arguments and errors ----

cdef inline long long as_bytes(object value, str what) except -1:
    """A count of bytes from any integer; ConfigError where it is negative or past 2**63 - 1."""
    cdef int overflow = 0
    cdef long long n = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow or n < 0:
        raise ConfigError(f"{what} {value} is outside 0..{2**63 - 1}")
    return n


cdef inline int check_range(long long offset, long long length, uint64_t size) except -1:
    if <uint64_t>offset > size or <uint64_t>length > size - <uint64_t>offset:
        raise ConfigError(f"offset {offset} length {length} reaches past the end, {size} bytes")
    return 0


cdef int get_buffer(object obj, Py_buffer *view, bint writable) except -1:
    """The bytes of any C-contiguous buffer; held until PyBuffer_Release."""
    try:
        PyObject_GetBuffer(obj, view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
    except (BufferError, ValueError, TypeError) as e:
        kind = "writable C-contiguous" if writable else "C-contiguous"
        raise ConfigError(f"a {kind} buffer is needed, not {type(obj).__name__}: {e}") from None
    return 0


cdef object os_error(int64_t rc, object path):
    cdef int code = <int>-rc
    return OSError(code, os.strerror(code), path)


cdef object thread_error(int rc):
    """Of snapshot_set_timeout(): EAGAIN alone would not say what there is none of."""
    return OSError(-rc, f"no helper thread for cbw_timeout: {os.strerror(-rc)}")


def dio_alignment(int fd):
    """(memory, offset) alignment in bytes that O_DIRECT needs on ``fd``, from statx STATX_DIOALIGN: offset 0 where the file
    has no O_DIRECT, None where the kernel cannot tell."""
    cdef uint32_t mem = 0, offset = 0
    if c_dio_alignment(fd, &mem, &offset) < 0:
        return None
    return mem, offset


def birth_time(int fd):
    """Nanoseconds since the epoch at which the file ``fd`` was made; None where its file system or kernel cannot tell."""
    cdef int64_t ns = 0
    return ns if c_birth_time(fd, &ns) == 0 else None


def punch_hole(int fd, offset, length):
    """Let a range (bytes) of a file read as zeroes and take no space. OSError; EOPNOTSUPP where the file system cannot."""
    cdef uint64_t off = as_bytes(offset, "offset"), n = as_bytes(length, "length")
    cdef int rc
    with nogil:
        rc = fallocate_once(fd, FALLOC_FL_PUNCH_HOLE, off, n)
    if rc < 0:
        raise os_error(rc, None)


def io_uring_state():
    """(whether this build has io_uring, the errno that the kernel refuses a ring with, 0: it does not)"""
    return bool(HAVE_URING), -rings_probe() if HAVE_URING else 0


def set_copy_budget(limit):
    """Bytes that the copy buffers of the process may take (R17)."""
    cdef uint64_t n = as_bytes(limit, "copy buffer budget")
    if bufpool_set_limit(&POOL, n) < 0:
        raise ConfigError(f"copy buffer budget {limit} is less than the {POOL.reserved} bytes reserved by snapshots")


def copy_buffers():
    """(limit, used, kept, reserved) bytes of the copy buffer budget: used counts those at rest, which are kept;
    reserved is what the snapshots have set aside for themselves."""
    pthread_mutex_lock(&POOL.lock)
    figures = (POOL.limit, POOL.used + POOL.reserve_used, POOL.kept, POOL.reserved)
    pthread_mutex_unlock(&POOL.lock)
    return figures


def set_polling_threads(count):
    """How many threads may poll at once before they block; 0: none ever does."""
    store_release(&spin_places, as_bytes(count, "polling threads"))


def polling_threads():
    """As set_polling_threads() left it; at first one less than the CPUs of the process."""
    return load_relaxed(&spin_places)


def zero_units(buffer, Py_ssize_t unit):
    """Which units of ``buffer`` (bytes-like; the last may be short) are all zeroes: a byte each, 1 or 0. ``unit``: bytes."""
    cdef Py_buffer view
    cdef Py_ssize_t i, count
    cdef char *flags
    cdef const char *p
    if unit < 1:
        raise ConfigError(f"unit {unit} is less than 1 byte")
    get_buffer(buffer, &view, False)
    try:
        count = (view.len + unit - 1) // unit
        found = PyBytes_FromStringAndSize(NULL, count)
        flags = PyBytes_AS_STRING(found)
        p = <const char *>view.buf
        with nogil:
            for i in range(count):
                flags[i] = is_zero(p + i * unit, least(unit, view.len - i * unit))
    finally:
        PyBuffer_Release(&view)
    return found


# ---- the classes, a file for each side ----

include "cbwcore/_bitmap_core.pxi"
include "cbwcore/_disk_core.pxi"
include "cbwcore/_snapshot_core.pxi"
include "cbwcore/_nbd_core.pxi"
include "cbwcore/_fault_plan.pxi"
include "cbwcore/_load_core.pxi"
