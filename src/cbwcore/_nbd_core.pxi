# Part of _cbwcore.pyx: the NBD server's compiled side, as Python objects.

cdef tuple NBD_ENDS = ("", "disconnected by the client", "gone", "stopped", "stalled", "bad magic", "oversized request")


cdef class NbdCore:
    """What the connections of one NBD server share: helper threads, and the budget of bytes in flight.

    ``bytes_in_flight``, ``max_request``, ``max_drain``: bytes; ``connections``: how many share the bytes in flight;
    ``max_extents``: per block status reply and context; ``stall_seconds``: how long a request or reply may make no
    progress. DESIGN section 8."""
    cdef nbd_server *server
    cdef uint64_t generation
    cdef bint ready

    def __cinit__(self, *, bytes_in_flight, connections, max_request, max_drain, max_extents,
                  double stall_seconds):
        cdef int rc
        self.generation = fork_generation
        self.server = <nbd_server *>calloc(1, sizeof(nbd_server))
        if self.server == NULL:
            raise MemoryError("no memory for a server")
        self.server.event_fd = self.server.crew.epoll_fd = self.server.crew.wake_fd = -1
        self.server.max_request = as_bytes(max_request, "max_request")
        self.server.max_drain = as_bytes(max_drain, "max_drain")
        self.server.max_extents = as_bytes(max_extents, "max_extents")
        if self.server.max_request > LARGEST:
            raise ConfigError(f"max_request {max_request} is more than {LARGEST}")
        if self.server.max_extents == 0 or not 0 < stall_seconds <= 86400:
            raise ConfigError(f"max_extents {max_extents} is not above 0, or stall_seconds {stall_seconds} not in (0, 86400]")
        self.server.stall_ns = <int64_t>(stall_seconds * 1e9)
        if not 0 < connections <= MAX_SEATS or bytes_in_flight < class_bytes(self.server.max_request):
            raise ConfigError(f"connections {connections} is not in 1..{MAX_SEATS}, or bytes_in_flight {bytes_in_flight} too few")
        rc = room_init(&self.server.memory, as_bytes(bytes_in_flight, "bytes_in_flight"), connections, self.server.max_request)
        if rc == 0:
            rc = helpers_init(&self.server.crew, conn_visit)
        if rc == 0:
            rc = self.server.event_fd = new_eventfd()
        if rc < 0:
            raise os_error(rc, None)
        self.ready = True

    def __dealloc__(self):
        if self.server == NULL or self.generation != fork_generation:
            return
        if self.ready:
            with nogil:
                helpers_stop(&self.server.crew)
            room_destroy(&self.server.memory)
        helpers_destroy(&self.server.crew)
        if self.server.event_fd >= 0:
            close(self.server.event_fd)
        free(self.server)

    def fileno(self):
        """An eventfd: readable once a guest write met the break of a snapshot, for `Disk._report_breaks()`."""
        return self.server.event_fd

    def _stop_helpers(self):
        """When no connection is served any more; again does nothing."""
        if self.generation != fork_generation:
            return
        with nogil:
            helpers_stop(&self.server.crew)

    def _buffers(self):
        """(limit, used, kept, reserved) bytes in flight, as copy_buffers()."""
        cdef bufpool *p = &self.server.memory.buffers
        pthread_mutex_lock(&p.lock)
        figures = (p.limit, p.used + p.reserve_used, p.kept, p.reserved)
        pthread_mutex_unlock(&p.lock)
        return figures


cdef class NbdConnectionCore:
    """The transmission phase of one NBD connection to a disk or snapshot, after its handshake.

    ``contexts``: what was negotiated, None for base:allocation, else a bitmap; on the wire their ids are 1, 2, ...
    ``discard``: TRIM of a snapshot gives up its data; else it is refused."""
    cdef nbd_conn *conn
    cdef NbdCore core
    cdef DiskCore disk
    cdef list bitmaps
    cdef uint64_t generation
    cdef bint served

    def __cinit__(self, NbdCore core not None, source, *, bint read_only, bint discard, bint structured, contexts):
        cdef nbd_conn *c
        cdef BitmapCore dirty
        if not isinstance(source, (DiskCore, SnapshotCore)):
            raise ConfigError(f"a disk or snapshot is exported, not {type(source).__name__}")
        self.generation = fork_generation
        self.core = core
        self.disk = source if isinstance(source, DiskCore) else (<SnapshotCore>source)._disk
        self.disk.check_usable()
        c = <nbd_conn *>calloc(1, sizeof(nbd_conn))
        if c == NULL:
            raise MemoryError("no memory for a connection")
        conn_init(c, core.server)
        self.conn = c
        c.d = self.disk.d
        c.size = c.d.io.size
        c.read_only = read_only or self.disk.read_only
        c.structured = structured
        c.always_waits = c.d.io.align > 1
        if isinstance(source, SnapshotCore):
            self.pin(source, discard)
        self.bitmaps = list(contexts)
        if len(self.bitmaps) > MAX_CONTEXTS:
            raise ConfigError(f"{len(self.bitmaps)} contexts, more than {MAX_CONTEXTS}")
        for i, each in enumerate(self.bitmaps):
            dirty = each
            if dirty is not None and dirty.size != self.disk.size:
                raise ConfigError(f"a bitmap of {dirty.size} bytes, not {self.disk.size}")
            c.contexts[i].dirty = &dirty.map if dirty is not None else NULL
            c.contexts[i].shift = dirty.shift if dirty is not None else 0
        c.ncontexts = <int>len(self.bitmaps)

    cdef int pin(self, SnapshotCore source, bint discard) except -1:
        """Keep the snapshot's lock and state in memory, also when it is closed."""
        cdef snapshot *s = source.open()
        pthread_mutex_lock(&s.lock)
        s.refs += 1
        pthread_mutex_unlock(&s.lock)
        self.conn.s = s
        self.conn.read_only = True
        self.conn.can_reclaim = discard
        self.conn.always_waits = self.conn.always_waits or s.target.align > 1
        source.done_with(s)
        return 0

    def __dealloc__(self):
        if self.conn == NULL or self.generation != fork_generation:
            return
        if self.conn.s != NULL:
            snapshot_put(self.conn.s)
        conn_destroy(self.conn)
        free(self.conn)

    def serve(self, int fd):
        """Serve the connected stream socket ``fd``, which stays the caller's, until it ends; once. How it ended: "disconnected
        by the client", "gone", "stopped", "stalled", "bad magic" or "oversized request". OSError where memory for it is short."""
        cdef int rc
        if self.served or self.generation != fork_generation:
            raise ValueError("a connection is served once")
        self.served = True
        with nogil:
            rc = conn_serve(self.conn, fd)
        if rc < 0:
            raise os_error(rc, None)
        return NBD_ENDS[rc]

    def stop(self):
        """From any thread: what was received is finished and answered, then serve() returns."""
        if self.generation == fork_generation:
            conn_stop(self.conn)
