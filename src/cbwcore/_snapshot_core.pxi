# Part of _cbwcore.pyx: snapshots and their arming, as Python objects.

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
        self.s.look_for_holes = not self.d.io.is_device and has_holes(self.d.io.fd)
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
