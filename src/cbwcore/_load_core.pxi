# Part of _cbwcore.pyx: the load generator and the floor of the benchmarks, as Python objects.

cdef class Load:
    """Requests for `cbwcore bench`: one of ``length`` bytes, or a write of ``data``, at each of ``offsets`` (a buffer of
    uint64, bytes), by ``threads`` threads with one request in flight each. A thread takes the next offset that nobody has,
    or, ``sliced``, goes through its own part of them. ``latencies``: a writable buffer of an int64 for each, for its ns.

    No two runs at a time. ConfigError."""
    cdef load l
    cdef Py_buffer offsets
    cdef Py_buffer latencies
    cdef void *data
    cdef uint64_t threads
    cdef uint64_t furthest             # where the last byte of a request ends
    cdef bint ready
    cdef bint running

    def __cinit__(self, offsets, data=None, *, length=0, threads=1, bint sliced=False, latencies=None):
        cdef uint64_t i
        self.threads = as_bytes(threads, "threads")
        if not 1 <= self.threads <= MAX_LOAD_THREADS:
            raise ConfigError(f"{threads} threads, not 1 to {MAX_LOAD_THREADS}")
        if load_init(&self.l) < 0:
            raise MemoryError("no memory for a load")
        self.ready = True
        self.l.sliced = sliced
        get_buffer(offsets, &self.offsets, False)
        self.l.offsets = <const uint64_t *>self.offsets.buf
        self.l.count = self.offsets.len // 8
        if self.offsets.len % 8 or <size_t>self.offsets.buf % 8:
            raise ConfigError("offsets are a buffer of uint64")
        if latencies is not None:
            get_buffer(latencies, &self.latencies, True)
            if self.latencies.len != self.offsets.len or <size_t>self.latencies.buf % 8:
                raise ConfigError("latencies are a buffer of an int64 for each offset")
            self.l.latencies = <int64_t *>self.latencies.buf
        self.set_request(data, length)
        for i in range(self.l.count):
            if self.l.offsets[i] > <uint64_t>(2 ** 63 - 1) - self.l.length:
                raise ConfigError(f"offset {self.l.offsets[i]} is outside 0..{2**63 - 1}")
            self.furthest = most(self.furthest, self.l.offsets[i] + self.l.length)

    cdef int set_request(self, data, length) except -1:
        """What each of them moves."""
        cdef Py_buffer view
        if data is None:
            self.l.length = as_bytes(length, "length")
        else:
            get_buffer(data, &view, False)
            self.l.length = view.len
            if view.len and posix_memalign(&self.data, LOAD_ALIGN, view.len) == 0:
                memcpy(self.data, view.buf, view.len)
            PyBuffer_Release(&view)
            self.l.data = <const char *>self.data
        if self.l.length == 0 or self.l.length > LARGEST:
            raise ConfigError(f"requests of {self.l.length} bytes, not 1 to {LARGEST}")
        if data is not None and self.data == NULL:
            raise MemoryError("no memory for a load")
        return 0

    def __dealloc__(self):
        if self.ready:
            load_destroy(&self.l)
        PyBuffer_Release(&self.offsets)         # nothing happens where none is held
        PyBuffer_Release(&self.latencies)
        free(self.data)

    cdef int64_t run(self) except? -1:
        cdef int64_t rc
        if self.running:
            raise ValueError("this load is running")
        self.running = True
        with nogil:
            rc = run_threads(&self.l, self.threads)
        self.running = False
        return rc

    def on_disk(self, DiskCore disk not None):
        """Be the guest of ``disk``; the ns that it took. The first error ends it and is raised, as by its pwrite() or pread()."""
        cdef int64_t rc
        disk.check_usable()
        if disk.closed:
            raise disk.failed(E_CLOSED, NULL)
        check_range(0, self.furthest, disk.d.io.size)
        if self.l.data != NULL and disk.read_only:
            raise OSError(_errno.EPERM, "the disk was opened read-only", disk.path)
        if self.running:
            raise ValueError("this load is running")
        self.l.d = disk.d
        self.l.cluster = LOAD_ALIGN
        rc = self.run()
        if load_relaxed(&disk.d.breaks) and exchange_seq_cst(&disk.d.breaks, 0):
            disk._report_breaks()
        if rc < 0:
            raise disk.failed(rc, &self.l.why)
        return rc

    def on_files(self, int fd, targets=(), *, cluster=65536):
        """The floor, by plain system calls on ``fd``: a write first copies the whole clusters (of ``cluster`` bytes) that it
        touches to each descriptor of ``targets``. The ns that it took; OSError, for a short transfer too."""
        cdef uint64_t size = as_bytes(cluster, "cluster")
        cdef int64_t rc
        targets = tuple(targets)
        if size == 0 or size & (size - 1) or size > LARGEST or len(targets) > MAX_LOAD_TARGETS:
            raise ConfigError(f"cluster {cluster} is no power of two, or {len(targets)} targets are too many")
        if self.running:
            raise ValueError("this load is running")
        for i, target in enumerate(targets):
            self.l.targets[i] = target
        self.l.ntargets = len(targets)
        self.l.d = NULL
        self.l.fd = fd
        self.l.cluster = size
        rc = self.run()
        if rc < 0:
            raise os_error(rc, None)
        return rc


def read_words(words):
    """Read all of a buffer, 64 bits at a time; (the ns that it took, all of it or-ed together)."""
    cdef Py_buffer view
    cdef uint64_t seen
    cdef int64_t began
    get_buffer(words, &view, False)
    with nogil:
        began = monotonic_ns()
        seen = or_words(<const uint64_t *>view.buf, view.len // 8)
        began = monotonic_ns() - began
    PyBuffer_Release(&view)
    return began, seen
