# One NBD connection's socket: receiving and sending with a limit on stalls, and the replies of many threads in one stream.
#
# Whoever has a reply becomes the sender if there is none; otherwise a small reply is left with the one who is sending,
# so that replies which pile up behind a slow client, or a busy core, leave together in one system call.
#
# Before it blocks, the reader polls: for the first bytes of a request, for further requests of a client that sends many,
# and for the rest of one. But not where connections are as busy as there are CPUs to poll on: there it would take the time
# of others, and every poll would find something just because it did.
#
# The peer is *lost* once it went away or stalled. From then on nothing is sent, and whoever receives sees the end.

from libc.errno cimport EAGAIN, EINTR, EPIPE, ETIMEDOUT
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from cbwcore._sys cimport (
    cond_init, load_acquire, load_relaxed, monotonic_ns, pthread_cond_destroy, pthread_cond_signal, pthread_cond_t,
    pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock, store_release,
)
from cbwcore._geometry cimport least
from cbwcore._spin cimport spin, spin_begin, spin_end, spin_init, spin_on, spin_places, spin_turn

cdef extern from * nogil:
    """
    #include <poll.h>
    #include <sys/socket.h>
    #include <sys/uio.h>

    static inline uint16_t get16(const char *p) { uint16_t v; memcpy(&v, p, 2); return __builtin_bswap16(v); }
    static inline uint32_t get32(const char *p) { uint32_t v; memcpy(&v, p, 4); return __builtin_bswap32(v); }
    static inline uint64_t get64(const char *p) { uint64_t v; memcpy(&v, p, 8); return __builtin_bswap64(v); }
    static inline void put16(char *p, uint16_t v) { v = __builtin_bswap16(v); memcpy(p, &v, 2); }
    static inline void put32(char *p, uint32_t v) { v = __builtin_bswap32(v); memcpy(p, &v, 4); }
    static inline void put64(char *p, uint64_t v) { v = __builtin_bswap64(v); memcpy(p, &v, 8); }

    typedef struct iovec cbw_piece;
    static inline void set_piece(cbw_piece *p, const void *base, uint64_t n) { p->iov_base = (void *)base; p->iov_len = n; }
    /* Take `n` sent bytes off the front of the pieces. */
    static inline void advance_pieces(cbw_piece **p, int *count, uint64_t n) {
        while (*count && n >= (*p)->iov_len) {
            n -= (*p)->iov_len;
            ++*p;
            --*count;
        }
        if (*count) {
            (*p)->iov_base = (char *)(*p)->iov_base + n;
            (*p)->iov_len -= n;
        }
    }
    static inline int64_t send_once(int fd, cbw_piece *p, int count) {
        struct msghdr m = { .msg_iov = p, .msg_iovlen = (size_t)count };
        ssize_t rc = sendmsg(fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
        return rc < 0 ? -errno : rc;
    }
    static inline int64_t recv_once(int fd, void *buf, uint64_t n, int wait) {
        ssize_t rc = recv(fd, buf, n, wait ? 0 : MSG_DONTWAIT);
        return rc < 0 ? -errno : rc;
    }
    /* Wait up to `ns` for the socket. An error or a hangup counts as ready: the next call tells of it. */
    static inline void socket_wait(int fd, int to_send, int64_t ns) {
        struct pollfd p = { .fd = fd, .events = to_send ? POLLOUT : POLLIN };
        struct timespec t = { ns / 1000000000, ns % 1000000000 };
        ppoll(&p, 1, &t, NULL);
    }
    /* Whether there is something to read, or to be told of. Takes no lock that the peer's sending needs. */
    static inline int socket_ready(int fd) {
        struct pollfd p = { .fd = fd, .events = POLLIN };
        return poll(&p, 1, 0) != 0;
    }
    /* Connections of the process that received requests in a period: its number, and in the low 16 bits how many. */
    static uint64_t cbw_busy[4];
    static inline uint64_t busy_in(uint64_t period) {
        uint64_t seen = load_relaxed(&cbw_busy[period & 3]);
        return seen >> 16 == period ? seen & 0xffff : 0;
    }
    static inline void count_busy(uint64_t period) {
        uint64_t *place = &cbw_busy[period & 3], seen = load_relaxed(place), next;
        do
            next = (period << 16) + (seen >> 16 == period ? (seen & 0xffff) + 1 : 1);
        while (!__atomic_compare_exchange_n(place, &seen, next, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    }
    static inline void shut_receiving(int fd) { shutdown(fd, SHUT_RD); }
    static inline void shut_all(int fd) { shutdown(fd, SHUT_RDWR); }
    """
    ctypedef struct cbw_piece:
        uint64_t iov_len
    uint16_t get16(const char *p)
    uint32_t get32(const char *p)
    uint64_t get64(const char *p)
    void put16(char *p, uint16_t v)
    void put32(char *p, uint32_t v)
    void put64(char *p, uint64_t v)
    void set_piece(cbw_piece *p, const void *base, uint64_t n)
    void advance_pieces(cbw_piece **p, int *count, uint64_t n)
    int64_t send_once(int fd, cbw_piece *p, int count)
    int64_t recv_once(int fd, void *buf, uint64_t n, bint wait)
    void socket_wait(int fd, bint to_send, int64_t ns)
    bint socket_ready(int fd)
    uint64_t busy_in(uint64_t period)
    void count_busy(uint64_t period)
    void shut_receiving(int fd)
    void shut_all(int fd)

cdef enum:
    PENDING = 16384             # bytes of small replies that may wait for the sender
    GATHER_NS = 40_000          # the longest that requests which have come wait for those that are coming
    STEP_NS = 10_000            # and for the next of them
    ENOUGH = 1 << 14            # bytes not worth waiting any longer
    PERIOD_SHIFT = 22           # about 4 ms: who received something in it is busy
    STEADY = 1 << 20            # bytes: who moves fewer within the stall limit, and is not done, has stalled
    HURRY = 10                  # with others starving: within this part of the limit,
    HURRY_ALL = 2               # and all of the transfer within this one
    LOOKS = 40                  # how often, in the stall limit, a waiting transfer looks at that


cdef struct patience:           # of one transfer; monotonic ns
    int64_t deadline            # 0 until it first has to wait
    int64_t since               # when that was
    int64_t begun               # when it was the first time; 0: not yet
    uint64_t moved              # bytes since `since`


cdef struct wire:
    int fd
    int64_t stall_ns
    uint64_t stop_by            # monotonic ns, 0 until the connection is to stop: from then on no peer gets more time
    uint64_t lost               # set once, to a positive errno
    const uint64_t *starving    # whether others wait for memory that this connection holds, if it does; of _nbd_room.pxd
    const uint64_t *in_common
    uint64_t period             # the reader's: of its last receipt,
    uint64_t others             # and other connections that received something in the one before
    spin first                  # the reader's: where it waits for a request,
    spin more                   # for further ones,
    spin rest                   # and for the rest of one
    pthread_mutex_t lock        # guards all below; not held while sending
    pthread_cond_t sent
    bint sending
    uint64_t waiting            # threads that want to be the sender
    uint64_t npending
    char *pending               # replies left to the sender
    char *outgoing              # the sender's: what was pending when it last looked


cdef inline int wire_init(wire *w, int64_t stall_ns, char *buffers, const uint64_t *starving,
                          const uint64_t *in_common) noexcept nogil:
    """`buffers`: 2 * PENDING bytes, of the caller. The socket comes later."""
    w.stall_ns = stall_ns
    w.starving = starving
    w.in_common = in_common
    w.lost = 0
    w.stop_by = 0
    w.sending = False
    w.period = w.others = 0
    spin_init(&w.first)
    spin_init(&w.more)
    spin_init(&w.rest)
    w.waiting = w.npending = 0
    w.pending = buffers
    w.outgoing = buffers + PENDING
    pthread_mutex_init(&w.lock, NULL)
    return cond_init(&w.sent)


cdef inline void wire_destroy(wire *w) noexcept nogil:
    pthread_cond_destroy(&w.sent)
    pthread_mutex_destroy(&w.lock)


cdef inline void lose(wire *w, int error) noexcept nogil:
    """The peer is lost: whoever waits for it, here or in the kernel, goes on. The first error is kept."""
    if load_acquire(&w.lost) == 0:
        store_release(&w.lost, error)
    shut_all(w.fd)


cdef inline void patience_new(patience *p) noexcept nogil:
    """Of a transfer that begins."""
    p.deadline = p.begun = 0


cdef inline bint keeps_waiting(const wire *w, const patience *p, int64_t now) noexcept nogil:
    """Whether others starve for what the peer holds, and it is too slow for that."""
    if not load_acquire(w.starving) or not load_acquire(w.in_common):
        return False
    return now - p.since >= w.stall_ns // HURRY or now - p.begun >= w.stall_ns // HURRY_ALL


cdef inline bint may_poll(const wire *w) noexcept nogil:
    """Whether few enough other connections are busy."""
    return w.others < load_relaxed(&spin_places)


cdef inline void note_receipt(wire *w) noexcept nogil:
    cdef uint64_t period = <uint64_t>monotonic_ns() >> PERIOD_SHIFT
    if period == w.period:
        return
    w.others = busy_in(period - 1)
    if w.others and w.period == period - 1:
        w.others -= 1
    w.period = period
    count_busy(period)


cdef inline bint poll_briefly(const wire *w, spin *place) noexcept nogil:
    """Whether the socket has something before it does not pay to look any longer."""
    cdef spin_turn turn
    cdef bint found
    if not may_poll(w) or not spin_begin(place, &turn):
        return False
    found = socket_ready(w.fd)
    while not found and spin_on(&turn):
        found = socket_ready(w.fd)
    spin_end(place, found)
    return found


cdef inline int endure(wire *w, patience *p, bint to_send) noexcept nogil:
    """Wait for the socket in the middle of a transfer; -ETIMEDOUT once it has stalled."""
    cdef int64_t now = monotonic_ns(), stop_by = <int64_t>load_acquire(&w.stop_by)
    if p.deadline == 0:
        p.since = now
        p.deadline = now + w.stall_ns
        p.moved = 0
    if p.begun == 0:
        p.begun = now
    if stop_by and stop_by < p.deadline:
        p.deadline = stop_by
    if now >= p.deadline or keeps_waiting(w, p, now):
        return -ETIMEDOUT
    if to_send or not poll_briefly(w, &w.rest):
        socket_wait(w.fd, to_send, <int64_t>least(<uint64_t>(p.deadline - now), <uint64_t>(w.stall_ns // LOOKS) + 1))
    return 0


cdef inline void note_progress(patience *p, uint64_t n) noexcept nogil:
    """Only steady progress buys time: a peer that sends a byte now and then has stalled."""
    p.moved += n
    if p.moved >= STEADY:
        p.deadline = 0


# ---- receiving: by the reader of the connection alone ----

cdef inline int64_t wire_recv(wire *w, char *buf, uint64_t n, patience *p) noexcept nogil:
    """At least one byte, in the middle of a request. The number of bytes; 0 where the peer has gone; -errno."""
    cdef int64_t rc
    while True:
        rc = recv_once(w.fd, buf, n, False)
        if rc >= 0:
            note_progress(p, <uint64_t>rc)
            return rc
        if rc == -EAGAIN:
            rc = endure(w, p, False)
        if rc < 0 and rc != -EINTR:
            return rc


cdef inline int64_t wire_recv_idle(wire *w, char *buf, uint64_t n, bint wait) noexcept nogil:
    """The beginning of a request, however long it takes (`wait`), else -EAGAIN. 0 where the peer has gone; -errno."""
    cdef int64_t rc
    if wait:
        poll_briefly(w, &w.first)
    rc = recv_once(w.fd, buf, n, wait)
    while rc == -EINTR or (wait and rc == -EAGAIN):
        if rc == -EAGAIN:
            socket_wait(w.fd, False, w.stall_ns)    # a socket that its owner has made non-blocking
        rc = recv_once(w.fd, buf, n, wait)
    if rc > 0:
        note_receipt(w)
    return rc


cdef inline bint keep_off(spin_turn *t, int64_t ns) noexcept nogil:
    """Look at nothing for so long; False where polling has to end."""
    cdef int64_t until = t.last + ns
    while t.last < until:
        if not spin_on(t):
            return False
    return True


cdef inline uint64_t wire_gather(wire *w, char *buf, uint64_t n) noexcept nogil:
    """From a client that sends several requests at once, and while it keeps on: what comes after the first of them. To
    receive many in a few calls costs both sides less, in locks and wake-ups, than the first one loses by it."""
    cdef spin_turn turn
    cdef uint64_t got = 0
    cdef int64_t rc = 1, end
    if not may_poll(w) or not spin_begin(&w.more, &turn):
        return 0
    end = turn.last + GATHER_NS
    while rc > 0 and got < ENOUGH and got < n and turn.last < end and keep_off(&turn, STEP_NS):
        rc = recv_once(w.fd, buf + got, n - got, False)
        if rc > 0:
            got += <uint64_t>rc
    spin_end(&w.more, got > 0)
    return got


# ---- sending: by anybody ----

cdef inline int send_pieces(wire *w, cbw_piece *p, int count) noexcept nogil:
    """Send all of it. 0 or -errno."""
    cdef patience left
    cdef int64_t rc
    patience_new(&left)
    advance_pieces(&p, &count, 0)
    while count:
        rc = send_once(w.fd, p, count)
        if rc == -EAGAIN:
            rc = endure(w, &left, True)
            if rc < 0:
                return <int>rc
            continue
        if rc < 0 and rc != -EINTR:
            return <int>rc
        if rc > 0:
            note_progress(&left, <uint64_t>rc)
            advance_pieces(&p, &count, <uint64_t>rc)
    return 0


cdef inline int take_pending(wire *w, cbw_piece *p) noexcept nogil:
    """By the sender, under lock: what was left to it, as a piece."""
    w.pending, w.outgoing = w.outgoing, w.pending
    set_piece(p, w.outgoing, w.npending)
    w.npending = 0
    return 1


cdef inline bint leave_pending(wire *w, const char *head, uint64_t nhead, const char *data, uint64_t ndata) noexcept nogil:
    """Under lock: leave a small reply with the sender, if there is one, and room."""
    if not w.sending or w.npending + nhead + ndata > PENDING:
        return False
    memcpy(w.pending + w.npending, head, nhead)
    if ndata:
        memcpy(w.pending + w.npending + nhead, data, ndata)
    w.npending += nhead + ndata
    return True


cdef inline void wire_send(wire *w, const char *head, uint64_t nhead, const char *data, uint64_t ndata) noexcept nogil:
    """Send one or more whole replies, or leave them with whoever is sending; the caller's memory is free after return.
    A peer that cannot be reached is lost, which the reader of the connection will see."""
    cdef cbw_piece pieces[3]
    cdef int count = 3, rc
    pthread_mutex_lock(&w.lock)
    while not leave_pending(w, head, nhead, data, ndata):
        if not w.sending:
            break
        w.waiting += 1
        pthread_cond_wait(&w.sent, &w.lock)
        w.waiting -= 1
    else:
        pthread_mutex_unlock(&w.lock)
        return
    w.sending = True
    take_pending(w, &pieces[0])
    set_piece(&pieces[1], head, nhead)
    set_piece(&pieces[2], data, ndata)
    while count:
        pthread_mutex_unlock(&w.lock)
        if load_acquire(&w.lost) == 0:
            rc = send_pieces(w, pieces, count)
            if rc < 0:
                lose(w, -rc)
        pthread_mutex_lock(&w.lock)
        count = take_pending(w, &pieces[0]) if w.npending else 0
    w.sending = False
    if w.waiting:
        pthread_cond_signal(&w.sent)        # it will be the sender, or leave its reply with one, who signals the next
    pthread_mutex_unlock(&w.lock)
