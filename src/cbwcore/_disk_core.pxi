# Part of _cbwcore.pyx: a disk in use by its guest, as a Python object.

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
