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


# ---- bitmaps ----

cdef class BitmapCore:
    """``nbits`` bits; the buffer protocol shows them read-only, bit i at byte i // 8, lowest bit first."""
    cdef bitmap map
    cdef Py_ssize_t nbytes
    cdef DiskCore recorded_by          # the disk whose guest writes set bits here, or None
    cdef readonly object size          # bytes that the bitmap speaks of
    cdef readonly object granularity   # bytes per bit
    cdef readonly object inconsistent  # why its bits cannot be relied on, or None
    cdef int shift

    def __cinit__(self, size, int shift, *args, **kwargs):
        self.size = as_bytes(size, "size")
        self.shift = shift
        self.granularity = 1 << shift
        cdef uint64_t nbits = (self.size + self.granularity - 1) >> shift
        if bitmap_init(&self.map, nbits, False) < 0:
            raise MemoryError(f"no address space for a bitmap of {nbits} bits")
        self.nbytes = (nbits + 7) // 8

    def __dealloc__(self):
        bitmap_free(&self.map)

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.inconsistent is not None:
            raise BufferError(f"the bitmap is inconsistent: {self.inconsistent}")
        PyBuffer_FillInfo(view, self, self.map.words, self.nbytes, 1, flags)

    def __len__(self):
        return self.map.nbits

    def _put(self, uint64_t first, uint64_t end, bint value):
        with nogil:
            bitmap_put(&self.map, first, least(end, self.map.nbits), value)

    def _next(self, uint64_t start, bint value):
        cdef uint64_t bit
        with nogil:
            bit = bitmap_next(&self.map, start, self.map.nbits, value)
        return bit

    def _run(self, uint64_t start):
        """(first, end) of the first run of set bits from ``start`` on; both the number of bits where there is none."""
        cdef uint64_t first, end
        with nogil:
            first = bitmap_next(&self.map, start, self.map.nbits, True)
            end = bitmap_next(&self.map, first, self.map.nbits, False)
        return first, end

    def _run_at(self, uint64_t bit):
        """(value, end) of the run that ``bit`` is in."""
        cdef bint value
        cdef uint64_t end
        with nogil:
            value = bitmap_test(&self.map, bit)
            end = bitmap_next(&self.map, bit + 1, self.map.nbits, not value)
        return value, end

    def _count(self):
        cdef uint64_t n
        with nogil:
            n = bitmap_count(&self.map, 0, self.map.nbits)
        return n

    def _merge(self, BitmapCore other):
        """Set every bit whose range touches a set bit of ``other``."""
        cdef uint64_t size = self.size
        with nogil:
            merge_bits(&self.map, NULL, self.shift, &other.map, other.shift, size)

    def _reset(self):
        cdef int rc
        cdef DiskCore recorded_by = self.recorded_by
        if recorded_by is not None:
            recorded_by.check_usable()
        with nogil:
            if recorded_by is not None:
                gate_shut(recorded_by.d)
            rc = bitmap_reset(&self.map)
            if recorded_by is not None:
                gate_open(recorded_by.d)
        if rc < 0:
            raise MemoryError("the bitmap could not be cleared")

    @property
    def _mapped(self):
        """Bytes that the bits take in memory, or in a file: whole pages."""
        return self.map.mapped

    def _map_file(self, int fd, uint64_t offset, *, bint shared=True):
        """From here on the bits are those of the file at ``offset``, whole pages, which must have their blocks; so they outlive
        the process. Not ``shared``: what is changed here is not changed in the file. Only of a bitmap that nobody uses yet.
        Raises OSError."""
        cdef int rc = bitmap_map_file(&self.map, fd, offset, shared)
        if rc < 0:
            raise os_error(rc, None)

    def _unmap_file(self):
        """From here on the bits are in memory again, as they are now; nothing where they are not a file's. Nobody may be setting
        bits. Raises OSError."""
        cdef int rc
        with nogil:
            rc = bitmap_unmap_file(&self.map)
        if rc < 0:
            raise os_error(rc, None)

    def _spoil(self, str why):
        """The bits cannot be relied on, for good: nobody is shown them."""
        self.inconsistent = why

    @property
    def enabled(self):
        """Whether guest writes are recorded."""
        return self.recorded_by is not None

    def _record(self, DiskCore recorder):
        """Let the guest writes of ``recorder`` (None: of no disk) set bits here, once those in flight are done."""
        cdef int rc = 0
        cdef DiskCore before = self.recorded_by
        if (recorder or before) is not None:
            (<DiskCore>(recorder or before)).check_usable()
        if recorder is not None and before is None:
            with nogil:
                gate_shut(recorder.d)
                rc = add_sink(recorder.d, &self.map, self.shift)
                gate_open(recorder.d)
            if rc < 0:
                raise ConfigError(f"a disk records at most {MAX_SINKS} bitmaps")
        elif recorder is None and before is not None:
            with nogil:
                gate_shut(before.d)
                drop_sink(before.d, &self.map)
                gate_open(before.d)
        self.recorded_by = recorder


cdef void merge_bits(bitmap *into, bitmap *also, int shift, const bitmap *other, int other_shift,
                     uint64_t size) noexcept nogil:
    """Set in `into`, and in `also` if there is one, what touches a set bit of `other`, which may be changing: both get the
    same."""
    cdef uint64_t bit = 0, stop, start, end
    while True:
        bit = bitmap_next(other, bit, other.nbits, True)
        if bit == other.nbits:
            return
        stop = bitmap_next(other, bit, other.nbits, False)
        if stop == bit:
            continue                    # cleared meanwhile
        start = bit << other_shift
        end = least(stop << other_shift, size)
        bitmap_put(into, start >> shift, outer_end(start, end - start, shift), True)
        if also != NULL:
            bitmap_put(also, start >> shift, outer_end(start, end - start, shift), True)
        bit = stop


# ---- the disk ----

cdef void abandon(blk *b) noexcept nogil:
    if b.fd >= 0:
        close(b.fd)
    if b.tail_fd >= 0:
        close(b.tail_fd)
    b.fd = b.tail_fd = -1


cdef void attach(blk *b, fd, tail_fd, size, direct_end, align, mem_align, zero_align, bint is_device, bint uring):
    """Let `b` have open descriptors, and an I/O engine."""
    b.engine = b.ops = &URING if uring else &PSYNC
    b.fd = fd
    b.tail_fd = tail_fd
    b.size = size
    b.direct_end = direct_end
    b.align = align
    b.mem_align = mem_align
    b.zero_align = zero_align
    b.is_device = is_device
    b.in_memory = is_on_tmpfs(fd)
    b.size_waits = not knows_size(fd)


cdef void inject(blk *b, FaultPlan plan):
    """Put a plan before the I/O engine; None takes it away."""
    b.faults = NULL
    b.ops = b.engine
    if plan is not None:
        plan.plan.inner = b.engine
        b.faults = plan.plan
        b.ops = &FAULTY


cdef class DiskCore:
    """The guest's side of a disk. Every method may be called from any thread."""
    cdef disk *d
    cdef uint64_t generation
    cdef bint read_only
    cdef object faults                 # keeps an injected plan alive
    cdef readonly object path
    cdef readonly object size

    def __cinit__(self, *args, **kwargs):
        self.d = <disk *>calloc(1, sizeof(disk))
        if self.d == NULL or disk_init(self.d) < 0 or blk_init(&self.d.io) < 0:
            raise MemoryError("no memory for a disk")
        self.generation = fork_generation

    def __dealloc__(self):
        if self.d != NULL and self.generation == fork_generation:
            disk_put(self.d)

    cdef int check_usable(self) except -1:
        if self.generation != fork_generation:
            raise ValueError(f"disk {self.path} was opened before a fork and is not usable in the child")
        return 0

    def _check_new(self):
        """ValueError if this object has been a disk already: its snapshots and guests must not find another."""
        if self.d.io.ops != NULL:
            raise ValueError(f"this object is disk {self.path} already")

    def _attach(self, path, fd, tail_fd, size, direct_end, align, mem_align, zero_align, bint is_device, bint read_only,
                bint uring):
        """Take over open descriptors; the disk is usable from here. ``uring``: by io_uring, else psync."""
        self.path = path
        self.size = size
        self.read_only = read_only
        attach(&self.d.io, fd, tail_fd, size, direct_end, align, mem_align, zero_align, is_device, uring)
        self.d.closed = 0

    @property
    def closed(self):
        """Whether it is not open: never opened, or closed, or this is the child of a fork."""
        return self.d == NULL or bool(load_relaxed(&self.d.closed)) or self.generation != fork_generation

    cdef object failed(self, int64_t rc, const failure *why):
        if rc == E_CLOSED:
            return ValueError(f"disk {self.path} is closed")
        if why != NULL and why.error:
            return cbw_error(why)
        return os_error(rc, self.path)

    cdef int write(self, int op, const void *buf, uint64_t offset, uint64_t length, bint fua, bint may_unmap) except -1:
        cdef failure why
        cdef int rc
        self.check_usable()
        check_range(offset, length, self.d.io.size)
        if load_relaxed(&self.d.closed):
            raise self.failed(E_CLOSED, NULL)
        if self.read_only:
            raise OSError(_errno.EPERM, "the disk was opened read-only", self.path)
        if length == 0:
            return 0
        with nogil:
            rc = guest_write(self.d, op, buf, offset, length, fua, may_unmap, &why)
        if load_relaxed(&self.d.breaks) and exchange_seq_cst(&self.d.breaks, 0):
            self._report_breaks()
        if rc < 0:
            raise self.failed(rc, &why)
        return 0

    def _report_breaks(self):
        """Completed by the Python class: tell of the snapshots that broke."""

    def pread(self, length, offset):
        """Read ``length`` bytes at ``offset`` (both bytes) as the guest sees them.

        Raises OSError of the disk, ConfigError (a ValueError) for a range outside it, ValueError after close."""
        cdef long long n = as_bytes(length, "length"), off = as_bytes(offset, "offset")
        cdef int rc
        cdef char *p
        self.check_usable()
        check_range(off, n, self.d.io.size)
        data = PyBytes_FromStringAndSize(NULL, n)
        p = PyBytes_AS_STRING(data)
        with nogil:
            rc = guest_read(self.d, p, off, n)
        if rc < 0:
            raise self.failed(rc, NULL)
        return data

    def pread_into(self, buffer, offset):
        """Fill ``buffer`` (any writable C-contiguous buffer) from ``offset`` bytes on, without a copy. Raises as pread()."""
        cdef long long off = as_bytes(offset, "offset")
        cdef Py_buffer view
        cdef int rc
        self.check_usable()
        get_buffer(buffer, &view, True)
        try:
            check_range(off, view.len, self.d.io.size)
            with nogil:
                rc = guest_read(self.d, view.buf, off, view.len)
        finally:
            PyBuffer_Release(&view)
        if rc < 0:
            raise self.failed(rc, NULL)

    def pwrite(self, buffer, offset, *, bint fua=False):
        """Write all of ``buffer`` (any C-contiguous buffer) at ``offset`` bytes; with ``fua`` durably (R14).

        Old clusters that a snapshot still needs are copied first (R1). Raises CopyBeforeWriteError where that fails under
        break-guest-write, and then the disk is unchanged (R9); OSError of the disk; ConfigError; ValueError after close."""
        cdef long long off = as_bytes(offset, "offset")
        cdef Py_buffer view
        get_buffer(buffer, &view, False)
        try:
            self.write(GUEST_WRITE, view.buf, off, view.len, fua, False)
        finally:
            PyBuffer_Release(&view)

    def pwrite_zeroes(self, offset, length, *, bint may_unmap=True, bint fua=False):
        """Make a range (bytes) read as zeroes; ``may_unmap`` lets it become a hole. A guest write (R5); raises as pwrite()."""
        self.write(GUEST_WRITE_ZEROES, NULL, as_bytes(offset, "offset"), as_bytes(length, "length"), fua, may_unmap)

    def discard(self, offset, length):
        """Tell the storage that a range (bytes) is not needed; advisory. A guest write (R5); raises as pwrite()."""
        self.write(GUEST_DISCARD, NULL, as_bytes(offset, "offset"), as_bytes(length, "length"), False, True)

    def flush(self):
        """Make every completed guest write durable (R14). A failure is for good: later flushes fail too. Raises OSError."""
        cdef int rc
        self.check_usable()
        with nogil:
            rc = guest_flush(self.d)
        if rc < 0:
            raise self.failed(rc, NULL)

    def _extent(self, uint64_t start, uint64_t end):
        """(end, hole) of the extent at ``start``, before ``end``."""
        cdef bint hole = False
        cdef int64_t rc
        self.check_usable()
        with nogil:
            rc = guest_status(self.d, start, end, &hole)
        if rc < 0:
            raise self.failed(rc, NULL)
        return rc, hole

    def _counters(self):
        """(writes, written bytes, reads, read bytes) since open."""
        cdef uint64_t writes = 0, written = 0, reads = 0, read = 0
        cdef int i
        for i in range(CBW_SLOTS):
            writes += load_relaxed(&self.d.slots[i].guest_writes)
            written += load_relaxed(&self.d.slots[i].guest_write_bytes)
            reads += load_relaxed(&self.d.slots[i].guest_reads)
            read += load_relaxed(&self.d.slots[i].guest_read_bytes)
        return writes, written, reads, read

    def _forked(self):
        """Whether this is the child of a fork, where the disk is the parent's alone."""
        return self.generation != fork_generation

    def _abandon(self):
        """In the child of a fork: let go of the descriptors, but not of the locks, which are the parent's, too."""
        abandon(&self.d.io)

    def _close(self):
        cdef int rc
        if self.generation != fork_generation or load_relaxed(&self.d.closed):
            return
        with nogil:
            rc = disk_close(self.d)
        if rc < 0:
            raise os_error(rc, self.path)

    def _inject(self, FaultPlan plan):
        """For tests: put the fault-injecting engine before the disk's own; None takes it away. No I/O may be in flight."""
        inject(&self.d.io, plan)
        self.faults = plan

    def _advance_clock(self, double seconds):
        """For tests: let the snapshots' timeouts see time pass, and wake whoever waits with one."""
        cdef uint64_t i
        add_seq_cst(&self.d.clock_skew, <uint64_t>(seconds * 1e9))
        with nogil:
            gate_shut(self.d)
            for i in range(self.d.nsnaps):
                pthread_mutex_lock(&self.d.snaps[i].lock)
                wake(self.d.snaps[i])
                pthread_mutex_unlock(&self.d.snaps[i].lock)
            gate_open(self.d)


# ---- snapshots ----

cdef object cbw_error(const failure *why):
    error = CopyBeforeWriteError(why.error, os.strerror(why.error), OPERATIONS[why.operation], why.offset, why.length)
    if why.time:
        error.time = why.time / 1e9
    return error


cdef class SnapshotCore:
    """A disk as it was at T0. Every method may be called from any thread."""
    cdef snapshot *s                   # NULL from close on
    cdef snapshot *kept                # the same, for good: a reader it told of a break finds the cause there after close, too
    cdef disk *d                       # owns one of its references
    cdef uint64_t generation
    cdef bint linked
    cdef uint64_t guest_writes_before
    cdef readonly DiskCore _disk
    cdef object faults
    cdef readonly object size
    cdef readonly object cluster_size

    def __cinit__(self, DiskCore owner not None, int shift, bint scoped, *args, **kwargs):
        cdef int rc
        owner.check_usable()
        if load_relaxed(&owner.d.closed):
            raise owner.failed(E_CLOSED, NULL)
        self.generation = fork_generation
        self.s = self.kept = <snapshot *>calloc(1, sizeof(snapshot))
        if self.s == NULL:
            raise MemoryError("no memory for a snapshot")
        rc = snapshot_init(self.s, &owner.d.io, &POOL, &owner.d.clock_skew, owner.d.io.size, shift, scoped)
        if rc < 0 or blk_init(&self.s.target) < 0:
            raise MemoryError("no memory for a snapshot's maps")
        self._disk = owner
        self.d = owner.d
        add_seq_cst(&self.d.refs, 1)
        self.size = owner.size
        self.cluster_size = 1 << shift

    def __dealloc__(self):
        if self.generation != fork_generation:
            return
        if self.s != NULL:
            self.release()
        if self.kept != NULL:
            snapshot_put(self.kept)
        if self.d != NULL:
            disk_put(self.d)

    cdef int release(self) noexcept:
        cdef int rc
        cdef snapshot *s = self.s
        cdef disk *d = self.d
        cdef bint linked = self.linked
        self.s = NULL                  # under the GIL: no request enters from here; those inside are waited for
        with nogil:
            if linked:
                disarm(d, s)
            rc = snapshot_release(s)
        return rc

    def _attach(self, fd, tail_fd, size, direct_end, align, mem_align, zero_align, bint is_device, bint uring, bint is_new,
                int policy, int64_t timeout_ns, target_limit, uint64_t max_copies, uint64_t copy_run):
        """Take over the target's open descriptors, set a copy's buffer aside, and start a helper thread where there is a
        timeout."""
        cdef int rc
        attach(&self.s.target, fd, tail_fd, size, direct_end, align, mem_align, zero_align, is_device, uring)
        self.s.source_has_holes = not self.d.io.is_device and has_holes(self.d.io.fd)
        self.s.target_is_new = is_new
        self.s.policy = policy
        self.s.target_limit = target_limit
        self.s.max_copies = max_copies
        self.s.copy_run = copy_run
        if bufpool_reserve(&POOL, &self.s.own, max(copy_run, <uint64_t>1 << self.s.shift)) < 0:
            raise ConfigError(f"the copy buffers, {POOL.limit} bytes, are all in use or set aside for other snapshots")
        rc = snapshot_set_timeout(self.s, timeout_ns)
        if rc < 0:
            raise thread_error(rc)

    def _begin_scope(self, bint recorded):
        """From here on guest writes are in the scope (``recorded``), so that the bitmap can be copied at leisure."""
        cdef int rc
        self.linked = True
        if not recorded:
            return
        with nogil:
            gate_shut(self.d)
            rc = add_sink(self.d, &self.s.need, self.s.shift)
            if rc == 0:
                rc = add_sink(self.d, &self.s.access, self.s.shift)
            gate_open(self.d)
        if rc < 0:
            raise ConfigError(f"a disk records at most {MAX_SINKS} bitmaps")

    def _add_scope(self, BitmapCore source not None):
        """Put every cluster that touches a set bit of ``source`` into the scope."""
        with nogil:
            merge_bits(&self.s.need, &self.s.access, self.s.shift, &source.map, source.shift, self.s.size)

    cdef snapshot *open(self) except NULL:
        """The snapshot, pinned: the caller gives it back with done_with()."""
        if self.generation != fork_generation:
            raise ValueError("the snapshot was taken before a fork and is not usable in the child")
        if self.s == NULL:
            raise ValueError("the snapshot is closed")
        pthread_mutex_lock(&self.s.lock)
        self.s.users += 1
        pthread_mutex_unlock(&self.s.lock)
        return self.s

    cdef void done_with(self, snapshot *s) noexcept nogil:
        pthread_mutex_lock(&s.lock)
        s.users -= 1
        wake(s)
        pthread_mutex_unlock(&s.lock)

    cdef object failed(self, int64_t rc, uint64_t offset, uint64_t length, bint in_target):
        if rc == E_CLOSED:
            return ValueError("the snapshot is closed")
        if rc == E_ACCESS:
            return SnapshotAccessError(EACCES, f"offset {offset} length {length} is outside the snapshot's scope or discarded")
        if rc == E_BROKEN:
            cause = self.error
            error = SnapshotBrokenError(EACCES, f"the snapshot is broken: {cause}")
            error.__cause__ = cause
            return error
        return os_error(rc, self._target_path() if in_target else self._disk.path)

    def _target_path(self):
        """Completed by the Python class."""

    def _take_break(self):
        """True for one caller after a break, False for all others."""
        cdef bint taken
        if self.generation != fork_generation:
            return False
        pthread_mutex_lock(&self.kept.lock)
        taken = self.kept.break_unreported
        self.kept.break_unreported = False
        pthread_mutex_unlock(&self.kept.lock)
        return bool(taken)

    def _state(self):
        """Index into STATES."""
        return load_relaxed(&self.s.state) if self.s != NULL else 2

    def _cause(self):
        """The first failure, as a CopyBeforeWriteError; None while there is none."""
        cdef failure why
        if self.generation != fork_generation:
            return None
        pthread_mutex_lock(&self.kept.lock)
        why = self.kept.cause
        pthread_mutex_unlock(&self.kept.lock)
        return cbw_error(&why) if why.error else None

    def pread(self, length, offset):
        """Read ``length`` bytes at ``offset`` (both bytes) as they were at T0.

        Raises SnapshotBrokenError after a break, SnapshotAccessError outside the scope or where discarded, OSError of disk or
        target, ConfigError (a ValueError) for a range outside the snapshot, ValueError after close."""
        cdef long long n = as_bytes(length, "length"), off = as_bytes(offset, "offset")
        cdef snapshot *s
        cdef char *p
        cdef bint in_target = False
        cdef int rc
        check_range(off, n, self._disk.d.io.size)
        data = PyBytes_FromStringAndSize(NULL, n)
        p = PyBytes_AS_STRING(data)
        s = self.open()
        with nogil:
            rc = snapshot_read(s, p, n, off, &in_target)
            self.done_with(s)
        if rc < 0:
            raise self.failed(rc, off, n, in_target)
        return data

    def pread_into(self, buffer, offset):
        """Fill ``buffer`` (any writable C-contiguous buffer) with T0 data from ``offset`` bytes on. Raises as pread();
        after an error the contents of ``buffer`` are undefined."""
        cdef long long off = as_bytes(offset, "offset")
        cdef Py_buffer view
        cdef snapshot *s
        cdef bint in_target = False
        cdef int rc
        get_buffer(buffer, &view, True)
        try:
            check_range(off, view.len, self._disk.d.io.size)
            s = self.open()
            with nogil:
                rc = snapshot_read(s, <char *>view.buf, view.len, off, &in_target)
                self.done_with(s)
            if rc < 0:
                raise self.failed(rc, off, view.len, in_target)
        finally:
            PyBuffer_Release(&view)

    def discard(self, offset, length):
        """Give up the whole clusters inside a range (bytes; R4): they read as SnapshotAccessError from here on, guest writes
        no longer copy them, and the target's space for them is given back. Raises as pread()."""
        cdef long long n = as_bytes(length, "length"), off = as_bytes(offset, "offset")
        cdef snapshot *s
        cdef int rc
        check_range(off, n, self._disk.d.io.size)
        s = self.open()
        with nogil:
            rc = snapshot_discard(s, off, n)
            self.done_with(s)
        if rc < 0:
            raise self.failed(rc, off, n, True)

    def _extent(self, uint64_t start, uint64_t end):
        """(end, accessible, zero) of the extent at ``start``, before ``end``."""
        if start >= end or end > self._disk.d.io.size:
            raise ConfigError(f"no range: {start}..{end}")
        cdef snapshot *s = self.open()
        cdef int flags = 0
        cdef int64_t rc
        with nogil:
            rc = snapshot_status(s, start, end, &flags)
            self.done_with(s)
        if rc < 0:
            raise self.failed(rc, start, end - start, False)
        return rc, bool(flags & STATUS_ACCESS), bool(flags & STATUS_ZERO)

    def _abandon(self):
        """As DiskCore._abandon(), for the target."""
        if self.s != NULL:
            abandon(&self.s.target)

    def _set_policy(self, int policy):
        cdef snapshot *s = self.open()
        pthread_mutex_lock(&s.lock)
        s.policy = policy
        pthread_mutex_unlock(&s.lock)
        self.done_with(s)

    def _set_timeout(self, int64_t ns):
        cdef snapshot *s = self.open()
        cdef int rc = snapshot_set_timeout(s, ns)
        self.done_with(s)
        if rc < 0:
            raise thread_error(rc)

    def _counters(self):
        """The figures of stats() as a dict; times in seconds, histogram as (upper bound, count) pairs."""
        cdef snapshot *s = self.open()
        cdef cbw_stats now
        cdef uint64_t used
        cdef int fd, i
        pthread_mutex_lock(&s.lock)
        now = s.stats
        used = s.target_used
        fd = s.target.fd
        pthread_mutex_unlock(&s.lock)
        try:
            allocated = os.fstat(fd).st_blocks * 512
        finally:
            self.done_with(s)
        return {
            "guest_writes": self._disk._counters()[0] - self.guest_writes_before,
            "cbw_copies": now.copies,
            "cbw_bytes": now.copied_bytes,
            "cbw_zero_bytes": now.zero_bytes,
            "cbw_failures": now.failures,
            "timeouts": now.timeouts,
            "waits": now.waits,
            "wait_seconds": now.wait_ns / 1e9,
            "longest_wait": now.longest_wait_ns / 1e9,
            "wait_histogram": tuple((2 ** i / 1e6, now.histogram[i]) for i in range(HISTOGRAM) if now.histogram[i]),
            "copy_waits": now.copy_waits,
            "frozen_waits": now.frozen_waits,
            "target_bytes": used,
            "target_allocated": allocated,
            "arm_pause": now.arm_pause_ns / 1e9,
        }

    @property
    def _target_bytes(self):
        """What `stats` calls target_bytes, at this moment and without a lock; 0 after close."""
        return load_relaxed(&self.s.target_used) if self.s != NULL else 0

    def _map(self, str name):
        """For tests: a map as a list of bools, one per cluster."""
        cdef snapshot *s = self.open()
        cdef bitmap *maps[4]
        maps[:] = [&s.need, &s.done, &s.zero, &s.access]
        cdef bitmap *m = maps[("need", "done", "zero", "access").index(name)]
        cdef uint64_t i
        bits = [bitmap_next(m, i, i + 1, True) == i for i in range(s.nclusters)]
        self.done_with(s)
        return bits

    def _close(self):
        """Wait for what is under way, late copies included (R8), then let go of the target. Raises OSError of its close."""
        cdef int rc
        if self.s == NULL or self.generation != fork_generation:
            return
        rc = self.release()
        if rc < 0:
            raise os_error(rc, self._target_path())

    def _inject(self, FaultPlan plan):
        """For tests: as DiskCore._inject(), for the target."""
        if self.s == NULL:
            raise ValueError("the snapshot is closed")
        inject(&self.s.target, plan)
        self.faults = plan


def arm_snapshots(list snaps, starts=(), stops=()):
    """One T0 for all ``snaps``, each attached to its target and with its scope complete. ``starts`` and ``stops``, of (disk,
    bitmap): bitmaps that record guest writes from T0 on, or up to T0; all disks must be those of ``snaps``. ConfigError, and
    none is armed or switched, where a disk would have more than MAX_SNAPSHOTS, or record too many bitmaps."""
    cdef snapshot *c_snaps[C_MAX_SNAPSHOTS]
    cdef disk *owners[C_MAX_SNAPSHOTS]
    cdef disk *disks[C_MAX_SNAPSHOTS]
    cdef switch switches[2 * MAX_SINKS]
    cdef SnapshotCore snap
    cdef uint64_t n = len(snaps), ndisks = 0, nswitches = 0, i
    cdef int rc
    if n > C_MAX_SNAPSHOTS:
        raise ConfigError(f"{n} snapshots in one group, more than {C_MAX_SNAPSHOTS}")
    if len(starts) + len(stops) > 2 * MAX_SINKS:
        raise ConfigError(f"{len(starts)} bitmaps that start and {len(stops)} that stop, more than {2 * MAX_SINKS}")
    for i in range(n):
        snap = snaps[i]
        c_snaps[i] = snap.s
        owners[i] = snap.d
        snap.guest_writes_before = snap._disk._counters()[0]
        snap.linked = True              # before T0: who closes it from then on must take it off its disk again
    for address in sorted({<size_t>owners[i] for i in range(n)}):
        disks[ndisks] = <disk *><size_t>address
        ndisks += 1
    for pairs, value in ((starts, True), (stops, False)):
        for owner, map in pairs:
            fill_switch(&switches[nswitches], owner, map, value)
            nswitches += 1
    with nogil:
        rc = arm(disks, ndisks, c_snaps, owners, n, switches, nswitches)
    if rc == -E2BIG:
        raise ConfigError(f"a disk records at most {MAX_SINKS} bitmaps")
    if rc < 0:
        raise ConfigError(f"a disk has at most {C_MAX_SNAPSHOTS} snapshots")
    for owner, map in starts:
        (<BitmapCore>map).recorded_by = owner
    for _, map in stops:
        (<BitmapCore>map).recorded_by = None


cdef void fill_switch(switch *s, DiskCore owner, BitmapCore map, bint starts):
    s.d = owner.d
    s.map = &map.map
    s.shift = map.shift
    s.starts = starts


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


include "cbwcore/_nbd_core.pxi"


include "cbwcore/_fault_plan.pxi"


include "cbwcore/_load_core.pxi"
