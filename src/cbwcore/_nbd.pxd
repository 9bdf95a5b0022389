# The transmission phase of one NBD connection (NBD doc/proto.md), from the first request to the last reply.
#
# One thread at a time is the *reader*: it receives many requests at once and parses them. What will not wait it serves
# itself, one after the other, and collects the answers in `batch`. A request that may wait (a copy before the write,
# O_DIRECT, a flush, much data) it runs too, but gives up being the reader first: to a helper, if more requests are in
# the buffer, else to the socket's watch, so that nobody is woken for nothing. When it is done with that request it is
# the reader again, if nobody else is. So a request never changes threads, and requests overtake each other.
#
# A read will not wait if all of it is in the page cache. Of a write that cannot be known: it is presumed not to, until one
# took long; then, for a while, all of them may.
#
# The reader owns `in_*` and `batch`; a request that outlives its turn owns its payload. The connection's own thread
# is in conn_serve() from the first request to the last; helpers come and go.

from libc.errno cimport EAGAIN, EINVAL, EIO, ENOMEM, ENOSPC, EOPNOTSUPP, EPERM, ETIMEDOUT
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove, strlen
from cbwcore._sys cimport (
    cond_init, exchange_seq_cst, load_acquire, load_relaxed, map_lazily, monotonic_ns, munmap, pthread_cond_broadcast,
    pthread_cond_destroy, pthread_cond_t, pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, store_release,
)
from cbwcore._geometry cimport least
from cbwcore._snapshot cimport (
    CLOSED, E_ACCESS, E_BROKEN, E_CLOSED, E_WAIT, failure, snapshot, snapshot_discard, snapshot_read,
    snapshot_read_at_once, wake,
)
from cbwcore._engine cimport (
    GUEST_DISCARD, GUEST_WRITE, GUEST_WRITE_ZEROES, GUEST_ZERO_FAST, disk, guest_cache, guest_flush, guest_read,
    guest_read_at_once, guest_write, guest_write_at_once,
)
from cbwcore._nbd_helpers cimport (
    MAX_VISITORS, epoll_add, epoll_forget, epoll_watch, eventfd_add, helpers, helpers_ready, seat_call, seat_event, seat_leave,
    seat_take,
)
from cbwcore._nbd_room cimport OWN_BYTES, room, room_put, room_stir, room_take_large, room_take_small, share
from cbwcore._nbd_status cimport EXTENT_BYTES, context, list_extents
from cbwcore._nbd_wire cimport (
    PENDING, get16, get32, get64, patience, patience_new, put16, put32, put64, shut_receiving, wire, wire_destroy,
    wire_gather, wire_init, wire_recv, wire_recv_idle, wire_send,
)

cdef enum:                      # of the protocol
    REQUEST_BYTES = 28
    SIMPLE_BYTES = 16
    CHUNK_BYTES = 20
    REQUEST_MAGIC = 0x25609513
    SIMPLE_MAGIC = 0x67446698
    CHUNK_MAGIC = 0x668e33ef
    CMD_READ = 0
    CMD_WRITE = 1
    CMD_DISC = 2
    CMD_FLUSH = 3
    CMD_TRIM = 4
    CMD_CACHE = 5
    CMD_WRITE_ZEROES = 6
    CMD_BLOCK_STATUS = 7
    FLAG_FUA = 1
    FLAG_NO_HOLE = 2
    FLAG_DF = 4
    FLAG_REQ_ONE = 8
    FLAG_FAST_ZERO = 16
    CHUNK_DONE = 1
    CHUNK_NONE = 0
    CHUNK_OFFSET_DATA = 1
    CHUNK_BLOCK_STATUS = 5
    CHUNK_ERROR = 32769
    NBD_ENOTSUP = 95
    NBD_ESHUTDOWN = 108

cdef enum:
    IN_BYTES = 1 << 17          # received at once; a write whose payload fits is served from there
    BATCH_BYTES = 1 << 17       # answers collected before they are sent
    CONN_BYTES = IN_BYTES + BATCH_BYTES + 2 * PENDING + OWN_BYTES     # touched only as far as they are used
    BATCHED_READ = 1 << 16      # longest read that goes into a batch
    MAX_RUNNING = MAX_VISITORS  # requests of one connection that are run at once
    MAX_CONTEXTS = 64
    FEW = 2                     # requests served from one receipt: of more, others are likely to be on their way
    SEND_BYTES = 1 << 14        # of answers in a batch that is not kept any longer: the client has enough to go on
    LONG_NS = 1_000_000         # a write that took longer, and longer than 1 ns for each byte, has waited
    WARY_NS = 20_000_000        # for how long its like are then presumed to wait

cdef enum:                      # what the reader came to
    ENDED                       # no request will come
    DRY                         # a helper found no request
    GOT                         # a request; of read_on(): one that may wait

cdef enum:                      # how a connection ended
    END_NONE
    END_DISC
    END_GONE
    END_STOPPED
    END_STALLED
    END_MAGIC
    END_OVERSIZED


cdef struct nbd_server:         # what the connections of a server share
    helpers crew
    room memory                 # bytes in flight
    uint64_t max_request        # bytes
    uint64_t max_drain          # bytes: a longer payload is not even received
    uint64_t max_extents
    int64_t stall_ns
    int event_fd                # to tell Python of breaks


cdef struct nbd_request:
    uint16_t flags
    uint16_t type
    uint64_t handle
    uint64_t off
    uint64_t n
    const char *payload         # in the connection's buffer until owned
    void *owned                 # of the server's room
    bint reads_next             # its thread is the reader again


cdef struct nbd_conn:
    nbd_server *server
    # Fixed before the first request.
    disk *d                     # outlives the connection
    snapshot *s                 # NULL where the disk itself is exported; kept in memory by a reference
    bint read_only
    bint can_reclaim            # TRIM of a snapshot
    bint structured
    bint always_waits           # O_DIRECT
    uint64_t size
    int ncontexts
    context contexts[MAX_CONTEXTS]
    # Anybody's.
    wire w
    uint64_t stopping           # set once
    # The reader's.
    char *in_buf
    uint64_t in_start
    uint64_t in_end
    patience slow_peer          # of the request that is being received
    char *batch
    uint64_t nbatch
    uint64_t served             # requests since it last received
    int64_t wary_until          # monotonic ns
    # Under lock.
    pthread_mutex_t lock
    pthread_cond_t changed
    bint reading                # there is a reader
    bint owner_waits            # the connection's own thread wants to be it
    bint watched                # the socket's next event calls a helper
    int running                 # requests that are run by threads that are not the reader
    int end                     # END_NONE while requests may come
    int seat
    share memory                # under the room's lock


# ---- replies ----

cdef inline uint32_t wire_errno(const nbd_conn *c, const nbd_request *r, int64_t rc, bint from_target) noexcept nogil:
    """The protocol's errno for a failure (DESIGN section 8). EPERM and EINVAL say that the request was wrong, and ENOTSUP is for
    FAST_ZERO alone: a storage that fails with these has failed, EIO. So has a snapshot's target, whatever it says: ENOSPC would
    make a hypervisor pause its guest for a full backup store."""
    if rc == E_CLOSED:
        return NBD_ESHUTDOWN
    if from_target or rc == E_BROKEN or rc == E_ACCESS:
        return EIO
    if rc == -ENOMEM or rc == check(c, r):
        return <uint32_t>-rc
    if rc == -EOPNOTSUPP and r.type == CMD_WRITE_ZEROES and r.flags & FLAG_FAST_ZERO:
        return NBD_ENOTSUP
    if rc == -ENOSPC and r.type in (CMD_WRITE, CMD_WRITE_ZEROES, CMD_TRIM, CMD_FLUSH):
        return ENOSPC
    return EIO


cdef inline const char *error_text(int64_t rc) noexcept nogil:
    """For people, beside the errno."""
    if rc == E_BROKEN:
        return b"the snapshot is broken"
    if rc == E_ACCESS:
        return b"outside the snapshot's scope, or discarded"
    if rc == E_CLOSED:
        return b"the export is closed"
    return b""


cdef inline uint64_t put_simple(char *p, const nbd_request *r, uint32_t error) noexcept nogil:
    put32(p, SIMPLE_MAGIC)
    put32(p + 4, error)
    put64(p + 8, r.handle)
    return SIMPLE_BYTES


cdef inline uint64_t put_chunk(char *p, const nbd_request *r, uint16_t flags, uint16_t type, uint64_t n) noexcept nogil:
    put32(p, CHUNK_MAGIC)
    put16(p + 4, flags)
    put16(p + 6, type)
    put64(p + 8, r.handle)
    put32(p + 16, <uint32_t>n)
    return CHUNK_BYTES


cdef inline bint needs_chunks(const nbd_conn *c, const nbd_request *r) noexcept nogil:
    """READ is never answered by a simple reply once structured ones were negotiated, and BLOCK_STATUS by no other."""
    return c.structured and (r.type == CMD_READ or r.type == CMD_BLOCK_STATUS)


cdef inline uint64_t put_result(const nbd_conn *c, char *p, const nbd_request *r, uint32_t error,
                                const char *text) noexcept nogil:
    """The whole reply of a request that brings no data."""
    cdef uint64_t n = strlen(text)
    if not needs_chunks(c, r):
        return put_simple(p, r, error)
    if error == 0:
        return put_chunk(p, r, CHUNK_DONE, CHUNK_NONE, 0)
    put_chunk(p, r, CHUNK_DONE, CHUNK_ERROR, 6 + n)
    put32(p + CHUNK_BYTES, error)
    put16(p + CHUNK_BYTES + 4, <uint16_t>n)
    memcpy(p + CHUNK_BYTES + 6, text, n)
    return CHUNK_BYTES + 6 + n


cdef inline uint64_t put_read_head(const nbd_conn *c, char *p, const nbd_request *r) noexcept nogil:
    """What goes before the data that were read."""
    if not c.structured:
        return put_simple(p, r, 0)
    put_chunk(p, r, CHUNK_DONE, CHUNK_OFFSET_DATA, 8 + r.n)
    put64(p + CHUNK_BYTES, r.off)
    return CHUNK_BYTES + 8


cdef inline void send_result(nbd_conn *c, const nbd_request *r, int64_t rc, bint from_target) noexcept nogil:
    cdef char reply[256]
    cdef uint32_t error = wire_errno(c, r, rc, from_target) if rc < 0 else 0
    wire_send(&c.w, reply, put_result(c, reply, r, error, error_text(rc)), NULL, 0)


cdef inline void flush_batch(nbd_conn *c) noexcept nogil:
    if c.nbatch:
        wire_send(&c.w, c.batch, c.nbatch, NULL, 0)
        c.nbatch = 0


cdef inline char *batch_room(nbd_conn *c, uint64_t n) noexcept nogil:
    """Where the next `n` bytes of the batch go."""
    if c.nbatch + n > BATCH_BYTES:
        flush_batch(c)
    return c.batch + c.nbatch


cdef inline void batch_result(nbd_conn *c, const nbd_request *r, int64_t rc, bint from_target) noexcept nogil:
    cdef uint32_t error = wire_errno(c, r, rc, from_target) if rc < 0 else 0
    c.nbatch += put_result(c, batch_room(c, 256), r, error, error_text(rc))


# ---- memory ----

cdef inline int take_buffer(nbd_conn *c, nbd_request *r, uint64_t n, int64_t ns) noexcept nogil:
    """Memory for `n` bytes; large requests wait for it for up to `ns`. 0, -ENOMEM or E_CLOSED."""
    cdef int rc
    if n <= OWN_BYTES:
        r.owned = room_take_small(&c.server.memory, &c.memory, n)
        return 0
    rc = room_take_large(&c.server.memory, &c.memory, n, ns, &c.stopping, &c.w.lost, &r.owned)
    if rc < 0:
        r.owned = NULL
    return rc


cdef inline void drop_buffer(nbd_conn *c, nbd_request *r, uint64_t n) noexcept nogil:
    """Give back what take_buffer() took for the same `n`."""
    room_put(&c.server.memory, &c.memory, r.owned, n)
    r.owned = NULL


# ---- receiving ----

cdef inline int end_of(nbd_conn *c, int64_t rc) noexcept nogil:
    """How the connection ended, from what receiving returned, 0 or an error."""
    if load_acquire(&c.stopping):
        return END_STOPPED
    if rc == -ETIMEDOUT or load_acquire(&c.w.lost) == ETIMEDOUT:
        return END_STALLED
    return END_GONE


cdef inline int receive(nbd_conn *c, uint64_t need, bint begun, bint owner, int *end) noexcept nogil:
    """Have `need` bytes in the buffer from in_start on. GOT; DRY; ENDED, and `end` tells why.
    `begun`: they are the rest of a request, which must not stall; else its peer may take its time."""
    cdef uint64_t have = c.in_end - c.in_start
    cdef int64_t rc
    if have >= need:
        return GOT
    if have and c.in_start:
        memmove(c.in_buf, c.in_buf + c.in_start, have)
    c.in_start = 0
    c.in_end = have
    flush_batch(c)
    while have < need:
        if load_acquire(&c.stopping):
            end[0] = END_STOPPED
            return ENDED
        if have == 0 and not begun:
            rc = wire_recv_idle(&c.w, c.in_buf, IN_BYTES, owner)
            if rc == -EAGAIN:
                return DRY
        else:
            rc = wire_recv(&c.w, c.in_buf + have, IN_BYTES - have, &c.slow_peer)
        if rc <= 0:
            end[0] = end_of(c, rc)
            return ENDED
        have += <uint64_t>rc
        if c.served > FEW and have < IN_BYTES // 2:
            have += wire_gather(&c.w, c.in_buf + have, IN_BYTES - have)
        c.served = 0
        c.in_end = have
    return GOT


cdef inline int receive_far(nbd_conn *c, char *into, uint64_t n) noexcept nogil:
    """Receive `n` bytes of payload to `into` (NULL: drop them), first what the buffer has. 0 or how the connection ended."""
    cdef uint64_t have = least(c.in_end - c.in_start, n)
    cdef int64_t rc
    if into != NULL:
        memcpy(into, c.in_buf + c.in_start, have)
        into += have
    c.in_start += have
    n -= have
    if n:
        flush_batch(c)
        c.in_start = c.in_end = 0
    while n:
        if load_acquire(&c.stopping):
            return END_STOPPED
        rc = wire_recv(&c.w, into if into != NULL else c.in_buf, n if into != NULL else least(n, IN_BYTES), &c.slow_peer)
        if rc <= 0:
            return end_of(c, rc)
        n -= <uint64_t>rc
        if into != NULL:
            into += rc
    return 0


cdef inline int64_t check(const nbd_conn *c, const nbd_request *r) noexcept nogil:
    """0, or the -errno of a request that is refused without a look at the export."""
    cdef uint16_t known = FLAG_FUA
    if r.type > CMD_BLOCK_STATUS or r.type == CMD_DISC:
        return -EINVAL
    if r.type == CMD_READ and c.structured:
        known |= FLAG_DF
    elif r.type == CMD_WRITE_ZEROES:
        known |= FLAG_NO_HOLE | FLAG_FAST_ZERO
    elif r.type == CMD_BLOCK_STATUS:
        known |= FLAG_REQ_ONE
    if r.flags & ~known:
        return -EINVAL
    if (r.type == CMD_READ or r.type == CMD_WRITE) and r.n > c.server.max_request:
        return -EINVAL
    if r.type == CMD_FLUSH:
        return -EINVAL if r.off or r.n else 0
    if c.read_only and (r.type == CMD_WRITE or r.type == CMD_WRITE_ZEROES or (r.type == CMD_TRIM and not c.can_reclaim)):
        return -EPERM
    if r.off > c.size or r.n > c.size - r.off:
        return -ENOSPC if r.type == CMD_WRITE or r.type == CMD_WRITE_ZEROES else -EINVAL
    if r.type == CMD_BLOCK_STATUS and (c.ncontexts == 0 or r.n == 0):
        return -EINVAL
    return 0


cdef inline int receive_payload(nbd_conn *c, nbd_request *r, bint owner, int64_t *refused, int *end) noexcept nogil:
    """The data of a WRITE: in the buffer where they fit, else in memory of their own. GOT or ENDED.

    What is refused is drained, so that the connection goes on, but not without bounds."""
    if refused[0] == 0 and REQUEST_BYTES + r.n <= IN_BYTES:
        if receive(c, r.n, True, owner, end) != GOT:
            return ENDED
        r.payload = c.in_buf + c.in_start
        c.in_start += r.n
        return GOT
    if r.n > c.server.max_drain:
        end[0] = END_OVERSIZED
        return ENDED
    if refused[0] == 0:
        flush_batch(c)
        refused[0] = take_buffer(c, r, r.n, c.w.stall_ns)
        patience_new(&c.slow_peer)              # that was not the peer's fault
    end[0] = receive_far(c, <char *>r.owned, r.n)
    if end[0]:
        if r.owned != NULL:
            drop_buffer(c, r, r.n)
        return ENDED
    r.payload = <const char *>r.owned
    return GOT


cdef inline int next_request(nbd_conn *c, nbd_request *r, bint owner, int64_t *refused, int *end) noexcept nogil:
    """Receive one request, whole. GOT, and `refused` is 0 or its -errno; ENDED; DRY."""
    cdef const char *p
    cdef int got
    if load_acquire(&c.w.lost):
        end[0] = end_of(c, 0)   # nobody is there to take an answer: what is left in the buffer is not worked off
        return ENDED
    patience_new(&c.slow_peer)
    got = receive(c, REQUEST_BYTES, False, owner, end)
    if got != GOT:
        return got
    p = c.in_buf + c.in_start
    r.flags = get16(p + 4)
    r.type = get16(p + 6)
    r.handle = get64(p + 8)
    r.off = get64(p + 16)
    r.n = get32(p + 24)
    r.payload = NULL
    r.owned = NULL
    r.reads_next = False
    if get32(p) != REQUEST_MAGIC:
        end[0] = END_MAGIC
        return ENDED
    c.in_start += REQUEST_BYTES
    if r.type == CMD_DISC:
        end[0] = END_DISC
        return ENDED
    refused[0] = check(c, r)
    if r.type == CMD_WRITE and r.n:
        return receive_payload(c, r, owner, refused, end)
    return GOT


# ---- what a request does ----

cdef inline void tell_breaks(nbd_conn *c) noexcept nogil:
    if load_relaxed(&c.d.breaks) and exchange_seq_cst(&c.d.breaks, 0):
        eventfd_add(c.server.event_fd)


cdef inline bint enter_snapshot(snapshot *s) noexcept nogil:
    """Be inside, so that close() waits; False where it is closed."""
    cdef bint is_open
    pthread_mutex_lock(&s.lock)
    is_open = s.state != CLOSED
    s.users += is_open
    pthread_mutex_unlock(&s.lock)
    return is_open


cdef inline void leave_snapshot(snapshot *s) noexcept nogil:
    pthread_mutex_lock(&s.lock)
    s.users -= 1
    wake(s)
    pthread_mutex_unlock(&s.lock)


cdef inline int read_export(nbd_conn *c, char *buf, const nbd_request *r, bint at_once) noexcept nogil:
    """Fill `buf` from the disk or the snapshot; `at_once`: of what is in memory, else E_WAIT."""
    cdef bint in_target = False
    cdef int rc
    if c.s == NULL:
        return guest_read_at_once(c.d, buf, r.off, r.n) if at_once else guest_read(c.d, buf, r.off, r.n)
    if not enter_snapshot(c.s):
        return E_CLOSED
    if at_once:
        rc = snapshot_read_at_once(c.s, buf, r.n, r.off, &in_target)
    else:
        rc = snapshot_read(c.s, buf, r.n, r.off, &in_target)
    leave_snapshot(c.s)
    return -EIO if rc < 0 and in_target and rc > E_BROKEN else rc


cdef inline int reclaim(nbd_conn *c, const nbd_request *r) noexcept nogil:
    """TRIM of a snapshot gives up its data."""
    cdef int rc
    if not enter_snapshot(c.s):
        return E_CLOSED
    rc = snapshot_discard(c.s, r.off, r.n)
    leave_snapshot(c.s)
    return rc if rc <= E_BROKEN else (-EIO if rc < 0 else 0)


cdef inline int change(nbd_conn *c, int op, const nbd_request *r, bint *from_target) noexcept nogil:
    """A guest write of any kind."""
    cdef failure why
    cdef int rc
    if r.n == 0:
        return guest_flush(c.d) if r.flags & FLAG_FUA else 0
    rc = guest_write(c.d, op, r.payload, r.off, r.n, r.flags & FLAG_FUA, not (r.flags & FLAG_NO_HOLE), &why)
    tell_breaks(c)
    if rc == 0 and op == GUEST_DISCARD and r.flags & FLAG_FUA:
        rc = guest_flush(c.d)
    from_target[0] = rc < 0 and rc != E_CLOSED and why.error != 0
    return rc


cdef inline int perform(nbd_conn *c, nbd_request *r, bint *from_target) noexcept nogil:
    """Whatever brings no data. 0 or an error."""
    if r.type == CMD_WRITE:
        return change(c, GUEST_WRITE, r, from_target)
    if r.type == CMD_WRITE_ZEROES:
        return change(c, GUEST_ZERO_FAST if r.flags & FLAG_FAST_ZERO else GUEST_WRITE_ZEROES, r, from_target)
    if r.type == CMD_TRIM:
        return change(c, GUEST_DISCARD, r, from_target) if c.s == NULL else reclaim(c, r)
    if c.s != NULL:
        return 0                # nothing was written that a flush could wait for, and nothing is worth reading ahead
    if r.type == CMD_FLUSH:
        return guest_flush(c.d) if not c.read_only else 0
    return guest_cache(c.d, r.off, r.n)


cdef inline void run_read(nbd_conn *c, nbd_request *r) noexcept nogil:
    cdef char head[CHUNK_BYTES + 8]
    cdef int rc = take_buffer(c, r, r.n, c.w.stall_ns)
    if rc < 0:
        send_result(c, r, rc, False)
        return
    rc = read_export(c, <char *>r.owned, r, False)
    if r.n <= BATCHED_READ:     # what is larger a client may take slowly, and meanwhile somebody else is to read
        read_next(c, r)
    if rc < 0:
        send_result(c, r, rc, False)
    else:
        wire_send(&c.w, head, put_read_head(c, head, r), <const char *>r.owned, r.n)
    drop_buffer(c, r, r.n)


cdef inline int status_room(nbd_conn *c, nbd_request *r, uint64_t *most) noexcept nogil:
    """Memory for the extents of a reply: where there is none for all of them, for fewer, which the protocol allows."""
    most[0] = 1 if r.flags & FLAG_REQ_ONE else least(c.server.max_extents, r.n)
    if take_buffer(c, r, most[0] * EXTENT_BYTES, 0) == 0:
        return 0
    most[0] = OWN_BYTES // EXTENT_BYTES
    return take_buffer(c, r, OWN_BYTES, 0)


cdef inline void run_status(nbd_conn *c, nbd_request *r) noexcept nogil:
    """One chunk for each context that was negotiated."""
    cdef char head[CHUNK_BYTES + 4]
    cdef uint64_t most = 0
    cdef int64_t n
    cdef int i, rc = status_room(c, r, &most)
    if rc < 0:
        send_result(c, r, rc, False)
        return
    for i in range(c.ncontexts):
        if c.s != NULL and not enter_snapshot(c.s):
            n = E_CLOSED
        else:
            n = list_extents(c.d, c.s, &c.contexts[i], r.off, r.n, <char *>r.owned, most)
            if c.s != NULL:
                leave_snapshot(c.s)
        if n < 0:
            send_result(c, r, n, False)
            break
        put_chunk(head, r, CHUNK_DONE if i == c.ncontexts - 1 else 0, CHUNK_BLOCK_STATUS, 4 + <uint64_t>n)
        put32(head + CHUNK_BYTES, <uint32_t>i + 1)
        wire_send(&c.w, head, CHUNK_BYTES + 4, <const char *>r.owned, <uint64_t>n)
    drop_buffer(c, r, most * EXTENT_BYTES)


cdef inline void run(nbd_conn *c, nbd_request *r) noexcept nogil:
    """Serve a request that may wait, and answer it."""
    cdef bint from_target = False
    cdef int rc
    if r.type == CMD_READ:
        run_read(c, r)
        return
    if r.type == CMD_BLOCK_STATUS:
        run_status(c, r)
        return
    rc = perform(c, r, &from_target)
    if r.owned != NULL:
        drop_buffer(c, r, r.n)
    read_next(c, r)
    if r.reads_next:
        batch_result(c, r, rc, from_target)
    else:
        send_result(c, r, rc, from_target)


# ---- at once, or not ----

cdef inline bint batch_read(nbd_conn *c, const nbd_request *r) noexcept nogil:
    """Read straight into the batch, behind the reply's head; False where that would wait."""
    cdef char *p = batch_room(c, CHUNK_BYTES + 8 + r.n)
    cdef uint64_t head = put_read_head(c, p, r)
    cdef int rc = read_export(c, p + head, r, True)
    if rc == E_WAIT:
        return False
    if rc < 0:
        batch_result(c, r, rc, False)
    else:
        c.nbatch += head + r.n
    if c.nbatch >= SEND_BYTES:
        flush_batch(c)
    return True


cdef inline bint batch_write(nbd_conn *c, const nbd_request *r) noexcept nogil:
    """Write into the page cache; False where that may wait."""
    cdef int64_t before = monotonic_ns(), after
    cdef int rc
    if before < c.wary_until:
        return False
    rc = guest_write_at_once(c.d, r.payload, r.off, r.n)
    if rc == E_WAIT:
        return False
    batch_result(c, r, rc, False)
    after = monotonic_ns()
    if after - before > LONG_NS + <int64_t>r.n:
        c.wary_until = after + WARY_NS
    return True


cdef inline bint is_empty(const nbd_request *r) noexcept nogil:
    """Whether there is nothing to do."""
    return r.n == 0 and r.type != CMD_FLUSH and (r.type == CMD_READ or not r.flags & FLAG_FUA)


cdef inline bint serve_at_once(nbd_conn *c, const nbd_request *r) noexcept nogil:
    """Serve what will not wait; False where that cannot be said, and nothing was done."""
    if c.always_waits or r.owned != NULL or r.flags & FLAG_FUA:
        return False
    if r.type == CMD_READ:
        return r.n <= BATCHED_READ and batch_read(c, r)
    return r.type == CMD_WRITE and batch_write(c, r)


cdef inline int read_on(nbd_conn *c, nbd_request *r, bint owner, int *end) noexcept nogil:
    """By the reader: serve requests until one may wait (GOT, and it is in `r`), or no more come (DRY, ENDED)."""
    cdef int64_t refused = 0
    cdef int got
    while True:
        got = next_request(c, r, owner, &refused, end)
        if got != GOT:
            break
        c.served += 1
        if refused < 0 or is_empty(r):
            batch_result(c, r, refused, False)
        elif not serve_at_once(c, r):
            break
    flush_batch(c)
    return got


# ---- the reader's part, and how it is handed on ----

cdef inline void keep_payload(nbd_conn *c, nbd_request *r) noexcept nogil:
    """Before another may read: have the payload, at most IN_BYTES, out of the connection's buffer."""
    if r.payload == NULL or r.owned != NULL:
        return
    r.owned = room_take_small(&c.server.memory, &c.memory, r.n)
    memcpy(r.owned, r.payload, r.n)
    r.payload = <const char *>r.owned


cdef inline void hand_on(nbd_conn *c) noexcept nogil:
    """Stop being the reader, to run a request. Under MAX_RUNNING somebody else becomes it when there is something to read."""
    cdef bint more = c.in_start < c.in_end, call = False
    pthread_mutex_lock(&c.lock)
    c.running += 1
    c.reading = False
    if c.owner_waits:
        pthread_cond_broadcast(&c.changed)
    elif c.running < MAX_RUNNING and more:
        call = True
    elif c.running < MAX_RUNNING:
        watch(c)
    pthread_mutex_unlock(&c.lock)
    if call:
        seat_call(&c.server.crew, c.seat)


cdef inline void watch(nbd_conn *c) noexcept nogil:
    """Under lock: let a helper come when the socket has something."""
    c.watched = True
    epoll_watch(c.server.crew.epoll_fd, c.w.fd, True, seat_event(&c.server.crew, c.seat))


cdef inline void become_reader(nbd_conn *c) noexcept nogil:
    """Under lock, where there is none."""
    c.reading = True
    if c.watched:
        c.watched = False
        epoll_watch(c.server.crew.epoll_fd, c.w.fd, False, seat_event(&c.server.crew, c.seat))


cdef inline void read_next(nbd_conn *c, nbd_request *r) noexcept nogil:
    """Before a request that was run is answered: be the reader again, if nobody is. So the socket is not watched any more
    when the answer lets the client go on, and no other thread is woken for what comes then."""
    pthread_mutex_lock(&c.lock)
    if not c.reading and c.end == END_NONE:
        become_reader(c)
        r.reads_next = True
    pthread_mutex_unlock(&c.lock)


cdef inline bint end_run(nbd_conn *c, const nbd_request *r, bint owner) noexcept nogil:
    """After a request was run and answered: whether to read on. The connection's own thread waits until it can."""
    cdef bint mine = r.reads_next
    pthread_mutex_lock(&c.lock)
    c.running -= 1
    while owner and not mine and c.reading and c.end == END_NONE:
        c.owner_waits = True
        pthread_cond_wait(&c.changed, &c.lock)
        c.owner_waits = False
    if not mine and not c.reading and c.end == END_NONE:
        become_reader(c)
        mine = True
    if c.end != END_NONE:
        pthread_cond_broadcast(&c.changed)
    pthread_mutex_unlock(&c.lock)
    return mine


cdef inline void stop_reading(nbd_conn *c, int end) noexcept nogil:
    """By the reader: nobody reads any more, or (END_NONE, a helper that found nothing) nobody until something comes."""
    pthread_mutex_lock(&c.lock)
    c.reading = False
    c.end = end
    if end != END_NONE or c.owner_waits:
        pthread_cond_broadcast(&c.changed)
    else:
        watch(c)
    pthread_mutex_unlock(&c.lock)


cdef inline void read_and_run(nbd_conn *c, bint owner) noexcept nogil:
    """As the reader. Returns when another is it, or nobody any more."""
    cdef nbd_request r
    cdef int end = END_NONE
    while True:
        if read_on(c, &r, owner, &end) != GOT:
            stop_reading(c, end)
            return
        keep_payload(c, &r)
        hand_on(c)
        run(c, &r)
        if not end_run(c, &r, owner):
            return


cdef inline void conn_visit(void *taker) noexcept nogil:
    """A helper, called or woken."""
    cdef nbd_conn *c = <nbd_conn *>taker
    cdef bint mine
    pthread_mutex_lock(&c.lock)
    mine = not c.reading and c.end == END_NONE and not c.owner_waits and c.running < MAX_RUNNING
    if mine:
        become_reader(c)
    pthread_mutex_unlock(&c.lock)
    if mine:
        read_and_run(c, False)


# ---- life ----

cdef inline void conn_init(nbd_conn *c, nbd_server *server) noexcept nogil:
    """Of zeroed memory; the caller fills in the export."""
    c.server = server
    c.w.fd = -1
    pthread_mutex_init(&c.lock, NULL)
    cond_init(&c.changed)


cdef inline void conn_destroy(nbd_conn *c) noexcept nogil:
    pthread_cond_destroy(&c.changed)
    pthread_mutex_destroy(&c.lock)


cdef inline int conn_serve(nbd_conn *c, int fd) noexcept nogil:
    """Serve a socket until it ends, once; by the thread that belongs to the connection. An END_ value, or -errno where
    there is no memory or no seat for it."""
    cdef helpers *crew = &c.server.crew
    cdef char *memory = <char *>map_lazily(CONN_BYTES)
    cdef int rc = -ENOMEM
    if memory == NULL:
        return rc
    c.in_buf = memory
    c.batch = memory + IN_BYTES
    c.memory.own = memory + IN_BYTES + BATCH_BYTES + 2 * PENDING
    if wire_init(&c.w, c.server.stall_ns, memory + IN_BYTES + BATCH_BYTES, &c.server.memory.starving, &c.memory.in_common) == 0:
        rc = c.seat = seat_take(crew, c)
        if rc >= 0:
            rc = epoll_add(crew.epoll_fd, fd, seat_event(crew, c.seat))
            if rc == 0:
                rc = serve_seated(c, fd)
                epoll_forget(crew.epoll_fd, fd)
            seat_leave(crew, c.seat)
        wire_destroy(&c.w)
    munmap(memory, CONN_BYTES)
    return rc


cdef inline int serve_seated(nbd_conn *c, int fd) noexcept nogil:
    """Read, run, and wait until all is done; how it ended."""
    helpers_ready(&c.server.crew)
    pthread_mutex_lock(&c.lock)
    c.w.fd = fd
    c.reading = True
    pthread_mutex_unlock(&c.lock)
    read_and_run(c, True)
    pthread_mutex_lock(&c.lock)
    while c.running:
        pthread_cond_wait(&c.changed, &c.lock)
    c.w.fd = -1                 # the caller's to close; stop() finds nothing
    pthread_mutex_unlock(&c.lock)
    return c.end


cdef inline void conn_stop(nbd_conn *c) noexcept nogil:
    """From any thread, at any time: requests that were received are finished and answered; no more are received."""
    pthread_mutex_lock(&c.lock)
    store_release(&c.stopping, 1)
    if c.w.fd >= 0:
        store_release(&c.w.stop_by, <uint64_t>(monotonic_ns() + c.w.stall_ns))
        shut_receiving(c.w.fd)
    pthread_mutex_unlock(&c.lock)
    room_stir(&c.server.memory)
