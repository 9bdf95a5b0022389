# The io_uring engine: reads and writes go through a ring, so that a thread can poll for the end of them instead of being
# put to sleep, can have the pieces of a large one worked off at once, and can give up waiting at a deadline.
#
# Each thread has a ring of its own while it lives; then the ring goes into a pool, for the next one. A ring is used by
# one thread at a time, for one request at a time, in up to PIECES pieces. Where no ring is to be had, the plain system
# call does the work: nothing fails for want of a ring.
#
# Completions interrupt nobody (COOP_TASKRUN): a thread that polls enters the kernel to collect them. Another thread may
# collect them, too, which is what lets a late copy go on elsewhere.
#
# A thread that copies for a guest write with a timeout has a `deadline` (R8). At the deadline, or before anything that may
# wait beyond its reach, a call returns E_LATE and what was submitted stays in flight, with its buffer. Then the ring is
# detached and goes, with the copy, to a helper thread; that makes the same call again, which takes over what is in flight.
#
# A ring has a buffer for copies that is registered with the kernel, which spares it pinning the pages of each copy. These
# buffers are beside the budget of _buffers.pxd, RING_BUFFERS of them at most (R17).

from libc.errno cimport EAGAIN, EINTR, ETIME
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.stdlib cimport posix_memalign
from cbwcore._sys cimport (
    add_seq_cst, load_relaxed, monotonic_ns, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock, read_once, sleep_ns, sub_seq_cst, write_once,
)
from cbwcore._geometry cimport least
from cbwcore._buffers cimport BUFFER_ALIGN
from cbwcore._spin cimport spin, spin_begin, spin_end, spin_on, spin_places, spin_turn

cdef extern from "<errno.h>" nogil:
    int ECANCELED               # libc.errno has it not

cdef extern from * nogil:
    """
    #ifdef CBW_LIBURING
    #include <liburing.h>

    #ifndef IORING_SETUP_COOP_TASKRUN
    #define IORING_SETUP_COOP_TASKRUN 0
    #endif
    #define CBW_HAVE_URING 1
    /* Its memory is not for forked children. 0 or -errno. */
    static int uring_open(struct io_uring *io, unsigned entries) {
        struct io_uring_params p = { .flags = IORING_SETUP_COOP_TASKRUN };
        int rc = io_uring_queue_init_params(entries, io, &p);
        if (rc == -EINVAL) {
            memset(&p, 0, sizeof(p));
            rc = io_uring_queue_init_params(entries, io, &p);
        }
        if (rc == 0)
            io_uring_ring_dontfork(io);
        return rc;
    }
    static inline void uring_close(struct io_uring *io) { io_uring_queue_exit(io); }
    static int uring_register(struct io_uring *io, void *buf, uint64_t n) {
        struct iovec v = { buf, n };
        return io_uring_register_buffers(io, &v, 1);
    }
    static inline void uring_prepare(struct io_uring *io, int write, int fixed, int fd, void *buf, uint64_t n,
                                     uint64_t off, uint64_t tag) {
        struct io_uring_sqe *e = io_uring_get_sqe(io);      /* there is one: all before were submitted */
        if (fixed && write)
            io_uring_prep_write_fixed(e, fd, buf, (unsigned)n, off, 0);
        else if (fixed)
            io_uring_prep_read_fixed(e, fd, buf, (unsigned)n, off, 0);
        else if (write)
            io_uring_prep_write(e, fd, buf, (unsigned)n, off);
        else
            io_uring_prep_read(e, fd, buf, (unsigned)n, off);
        e->user_data = tag;
    }
    /* How many were submitted, or -errno; with `wait`, once that many have ended. */
    static inline int uring_submit(struct io_uring *io, unsigned wait) { return io_uring_submit_and_wait(io, wait); }
    static inline void uring_look(struct io_uring *io) { io_uring_get_events(io); }
    /* Sleep until one has ended, for `ns` at most (0: for ever). 0 or -errno. */
    static inline int uring_sleep(struct io_uring *io, int64_t ns) {
        struct io_uring_cqe *e;
        struct __kernel_timespec t = { ns / 1000000000, ns % 1000000000 };
        return ns ? io_uring_wait_cqe_timeout(io, &e, &t) : io_uring_wait_cqe(io, &e);
    }
    /* Take one that has ended; 0 where there is none. */
    static inline int uring_take(struct io_uring *io, uint64_t *tag, int64_t *result) {
        struct io_uring_cqe *e;
        unsigned head, found = 0;
        io_uring_for_each_cqe(io, head, e) {
            *tag = e->user_data;
            *result = e->res;
            found = 1;
            break;
        }
        if (found)
            io_uring_cq_advance(io, 1);
        return (int)found;
    }
    #else
    #define CBW_HAVE_URING 0
    #define CBW_LIBURING ""
    struct io_uring { int unused; };
    static inline int uring_open(struct io_uring *io, unsigned entries) { return -ENOSYS; }
    static inline void uring_close(struct io_uring *io) { }
    static inline int uring_register(struct io_uring *io, void *buf, uint64_t n) { return -ENOSYS; }
    static inline void uring_prepare(struct io_uring *io, int write, int fixed, int fd, void *buf, uint64_t n,
                                     uint64_t off, uint64_t tag) { }
    static inline int uring_submit(struct io_uring *io, unsigned wait) { return -ENOSYS; }
    static inline void uring_look(struct io_uring *io) { }
    static inline int uring_sleep(struct io_uring *io, int64_t ns) { return -ENOSYS; }
    static inline int uring_take(struct io_uring *io, uint64_t *tag, int64_t *result) { return 0; }
    #endif

    /* The thread's own ring; a destructor retires it when the thread ends. */
    static __thread void *cbw_own_ring;
    static pthread_key_t cbw_ring_key;
    static inline void *own_ring(void) { return cbw_own_ring; }
    static inline void set_own_ring(void *r) { cbw_own_ring = r; pthread_setspecific(cbw_ring_key, r); }
    static inline int ring_key_create(void (*retire)(void *)) { return -pthread_key_create(&cbw_ring_key, retire); }
    struct cbw_rings { pthread_mutex_t lock; void *idle, *lost; uint64_t nidle, count, buffers, busy; };
    static struct cbw_rings cbw_all_rings;
    """
    struct io_uring:
        pass
    bint HAVE_URING "CBW_HAVE_URING"
    const char *LIBURING_VERSION "CBW_LIBURING"     # empty where that is not known
    int uring_open(io_uring *io, unsigned entries)
    void uring_close(io_uring *io)
    int uring_register(io_uring *io, void *buf, uint64_t n)
    void uring_prepare(io_uring *io, bint write, bint fixed, int fd, void *buf, uint64_t n, uint64_t off, uint64_t tag)
    int uring_submit(io_uring *io, unsigned wait)
    void uring_look(io_uring *io)
    int uring_sleep(io_uring *io, int64_t ns)
    bint uring_take(io_uring *io, uint64_t *tag, int64_t *result)
    void *own_ring()
    void set_own_ring(void *r)
    int ring_key_create(void (*retire)(void *) noexcept nogil)
    struct ring_pool "cbw_rings":
        pthread_mutex_t lock    # guards all below
        void *idle              # linked by `next`
        void *lost              # likewise: never closed nor freed
        uint64_t nidle
        uint64_t count          # of all rings
        uint64_t buffers        # registered
        uint64_t busy           # threads that have a request in flight; without the lock
    ring_pool rings "cbw_all_rings"

cdef enum:
    E_LATE = -100005            # see above
    PIECES = 8                  # of one request, in flight at once
    PIECE = 1 << 18             # bytes: what is larger is worked off in pieces by several CPUs of the kernel's
    RING_BUFFER = 1 << 16       # bytes of a registered buffer: a run of this size is the usual copy
    RING_BUFFERS = 128
    IDLE_RINGS = 16             # kept for threads to come


cdef struct ring:
    io_uring io
    ring *next
    int64_t deadline            # monotonic ns; 0: this thread waits as long as it takes
    # The request that was submitted last; in flight until `got` is `count`.
    bint write
    int fd
    char *buf
    uint64_t n
    uint64_t off
    uint64_t count              # pieces
    uint64_t got
    bint left                   # in flight, and not yet taken over
    int64_t results[PIECES]
    # The registered buffer; NULL until wanted, or where it was refused.
    char *buffer
    bint buffer_taken
    bint buffer_refused


# ---- a thread's ring ----

cdef inline void ring_free(ring *r) noexcept nogil:
    uring_close(&r.io)
    free(r.buffer)
    free(r)


cdef inline void ring_put_away(ring *r) noexcept nogil:
    """Into the pool; nothing is in flight."""
    cdef bint keep
    pthread_mutex_lock(&rings.lock)
    keep = rings.nidle < IDLE_RINGS
    if keep:
        r.next = <ring *>rings.idle
        rings.idle = r
        rings.nidle += 1
    else:
        rings.count -= 1
        rings.buffers -= r.buffer != NULL
    pthread_mutex_unlock(&rings.lock)
    if not keep:
        ring_free(r)


cdef inline void ring_lose(ring *r) noexcept nogil:
    """This thread's ring is of no use any more. It cannot be closed, for its descriptor may be somebody else's by now, nor freed:
    a copy may have its buffer. So it is kept, and counted."""
    set_own_ring(NULL)
    pthread_mutex_lock(&rings.lock)
    r.next = <ring *>rings.lost
    rings.lost = r
    pthread_mutex_unlock(&rings.lock)


cdef inline void ring_retire(void *r) noexcept nogil:
    """When its thread ends."""
    set_own_ring(NULL)
    ring_put_away(<ring *>r)


cdef inline ring *ring_from_pool() noexcept nogil:
    cdef ring *r
    pthread_mutex_lock(&rings.lock)
    r = <ring *>rings.idle
    if r != NULL:
        rings.idle = r.next
        rings.nidle -= 1
    pthread_mutex_unlock(&rings.lock)
    return r


cdef inline ring *ring_open() noexcept nogil:
    """A new one; NULL where there is none to be had."""
    cdef ring *r = <ring *>calloc(1, sizeof(ring))
    if r == NULL:
        return NULL
    if uring_open(&r.io, PIECES) < 0:
        free(r)
        return NULL
    pthread_mutex_lock(&rings.lock)
    rings.count += 1
    pthread_mutex_unlock(&rings.lock)
    return r


cdef inline ring *thread_ring() noexcept nogil:
    """This thread's, from when it is first wanted; NULL where there is none to be had."""
    cdef ring *r = <ring *>own_ring()
    if r != NULL:
        return r
    r = ring_from_pool()
    if r == NULL:
        r = ring_open()
    if r != NULL:
        set_own_ring(r)
    return r


cdef inline int rings_probe() noexcept nogil:
    """Whether this thread can have a ring: 0, or the -errno of setting one up."""
    cdef io_uring io
    cdef int rc
    if own_ring() != NULL:
        return 0
    rc = uring_open(&io, 1)
    if rc == 0:
        uring_close(&io)
    return rc


cdef inline int rings_init() noexcept nogil:
    """Once, at import. 0 or -errno."""
    pthread_mutex_init(&rings.lock, NULL)
    return ring_key_create(ring_retire)


cdef inline void rings_forget() noexcept nogil:
    """In the child of a fork: every ring is the parent's."""
    pthread_mutex_init(&rings.lock, NULL)
    set_own_ring(NULL)
    rings.idle = NULL
    rings.nidle = rings.count = rings.buffers = rings.busy = 0


# ---- its registered buffer ----

cdef inline bint register_buffer(ring *r) noexcept nogil:
    """Once for each ring."""
    cdef void *buf = NULL
    cdef bint allowed
    r.buffer_refused = True
    pthread_mutex_lock(&rings.lock)
    allowed = rings.buffers < RING_BUFFERS
    rings.buffers += allowed
    pthread_mutex_unlock(&rings.lock)
    if not allowed:
        return False
    if posix_memalign(&buf, BUFFER_ALIGN, RING_BUFFER) == 0 and uring_register(&r.io, buf, RING_BUFFER) == 0:
        r.buffer = <char *>buf
        return True
    free(buf)
    pthread_mutex_lock(&rings.lock)
    rings.buffers -= 1
    pthread_mutex_unlock(&rings.lock)
    return False


cdef inline void *ring_take_buffer(uint64_t n, ring **lender) noexcept nogil:
    """The buffer of this thread's ring, `lender`, for a copy of `n` bytes, until `buffer_taken` is cleared; NULL where it has
    none, or it is too small or in use."""
    cdef ring *r = <ring *>own_ring()
    if r == NULL or n > RING_BUFFER or r.buffer_taken:
        return NULL
    if r.buffer == NULL and (r.buffer_refused or not register_buffer(r)):
        return NULL
    r.buffer_taken = True
    lender[0] = r
    return r.buffer


# ---- one request ----

cdef inline bint is_fixed(const ring *r, const char *buf) noexcept nogil:
    return r.buffer != NULL and r.buffer <= buf < r.buffer + RING_BUFFER


cdef inline void collect(ring *r) noexcept nogil:
    """What has ended."""
    cdef uint64_t tag
    cdef int64_t result
    while r.got < r.count and uring_take(&r.io, &tag, &result):
        r.results[tag] = result
        r.got += 1


cdef inline uint64_t piece_of(const ring *r) noexcept nogil:
    """Bytes of each piece but the last."""
    return PIECE if r.count > 1 else r.n


cdef inline int submit(ring *r, bint wait) noexcept nogil:
    """Submit the request's pieces; with `wait`, sleep until they have ended. 0; -errno where the ring is of no use any
    more, and then nothing is in flight: what was submitted has ended."""
    cdef uint64_t unit = piece_of(r), start = 0, submitted = 0, i
    cdef int rc
    for i in range(r.count):
        uring_prepare(&r.io, r.write, is_fixed(r, r.buf), r.fd, r.buf + start, least(unit, r.n - start), r.off + start, i)
        start += unit
    while submitted < r.count:
        rc = uring_submit(&r.io, <unsigned>r.count if wait else 0)
        if rc >= 0:
            submitted += <uint64_t>rc
            wait = False
        elif rc == -EAGAIN:
            sleep_ns(100_000)           # the kernel is short of memory for it
        elif rc != -EINTR:
            r.count = submitted         # somebody has closed the descriptor
            while r.got < r.count:
                sleep_ns(100_000)
                collect(r)
            return rc
    collect(r)
    return 0


cdef inline bint is_crowded() noexcept nogil:
    """Whether so many wait that whoever polls takes the CPU from what another waits for."""
    return load_relaxed(&rings.busy) > load_relaxed(&spin_places)


cdef inline void poll(ring *r, spin *polls, spin_turn *turn) noexcept nogil:
    while r.got < r.count:
        uring_look(&r.io)
        collect(r)
        if not spin_on(turn) or is_crowded():
            break
    spin_end(polls, r.got == r.count)


cdef inline int sleep(ring *r) noexcept nogil:
    """Until the request has ended. 0, or E_LATE at the deadline."""
    cdef int64_t left = 0
    cdef int rc
    while r.got < r.count:
        if r.deadline:
            left = r.deadline - monotonic_ns()
            if left <= 0:
                r.left = True
                return E_LATE
        rc = uring_sleep(&r.io, left)
        collect(r)
        if rc < 0 and rc != -EINTR and rc != -ETIME and r.got < r.count:
            sleep_ns(100_000)           # somebody has closed the descriptor; it ends all the same
    return 0


cdef inline int64_t outcome(const ring *r) noexcept nogil:
    """Of all pieces as of one attempt: the bytes up to the first that is short, or the error of the first."""
    cdef uint64_t unit = piece_of(r), i
    cdef int64_t total = 0
    for i in range(r.count):
        if r.results[i] < 0:
            return total if total else r.results[i]
        total += r.results[i]
        if <uint64_t>r.results[i] < least(unit, r.n - i * unit):
            break
    return total


cdef inline void settle(ring *r) noexcept nogil:
    """Wait for what was left in flight: then its buffer is its owner's again."""
    if r.left:
        sleep(r)
    r.left = False


cdef inline int run(ring *r, spin *polls) noexcept nogil:
    """Submit the request and wait for it, first polling. 0, E_LATE, or what submit() says of a useless ring."""
    cdef spin_turn turn
    cdef bint polling
    cdef int rc
    add_seq_cst(&rings.busy, 1)
    polling = not is_crowded() and spin_begin(polls, &turn)
    rc = submit(r, not polling and r.deadline == 0)
    if polling:
        poll(r, polls, &turn)
    if rc == 0:
        rc = sleep(r)
    sub_seq_cst(&rings.busy, 1)
    return rc


cdef inline int64_t ring_io(spin *polls, bint write, int fd, void *buf, uint64_t n, uint64_t off) noexcept nogil:
    """One attempt: bytes, -errno or E_LATE. `polls`: of the file."""
    cdef ring *r = thread_ring()
    cdef int64_t rc = -ECANCELED
    cdef bint timed = r != NULL and r.deadline != 0     # asked now: the ring may be lost, and its deadline with it
    n = least(n, PIECES * PIECE)
    if r != NULL and r.left and r.write == write and r.fd == fd and r.buf == <char *>buf and r.n == n and r.off == off:
        settle(r)                       # this very request, left by the thread that had the ring before
        rc = outcome(r)
    elif r != NULL:
        settle(r)
        r.write = write
        r.fd = fd
        r.buf = <char *>buf
        r.n = n
        r.off = off
        r.count = 1 if n <= PIECE else (n + PIECE - 1) // PIECE
        r.got = 0
        rc = run(r, polls)
        if rc == 0:
            rc = outcome(r)
        elif rc != E_LATE:
            ring_lose(r)
            rc = -ECANCELED
    if rc != -ECANCELED:
        return rc
    # Nobody has done it. Of ours nothing is ever cancelled: the kernel does it where it can make no thread for a request that
    # may wait (RLIMIT_NPROC). Nor may this thread wait for it, if it has a deadline.
    if timed:
        return E_LATE
    return write_once(fd, buf, n, off) if write else read_once(fd, buf, n, off)


# ---- deadlines ----

cdef inline bint ring_set_deadline(int64_t deadline) noexcept nogil:
    """For the requests of this thread, 0: none. False where it has no ring, and so cannot keep it."""
    cdef ring *r = thread_ring()
    if r == NULL:
        return False
    r.deadline = deadline
    return True


cdef inline void ring_clear_deadline() noexcept nogil:
    cdef ring *r = <ring *>own_ring()
    if r != NULL:
        r.deadline = 0


cdef inline bint has_deadline() noexcept nogil:
    cdef ring *r = <ring *>own_ring()
    return r != NULL and r.deadline != 0


cdef inline ring *ring_detach() noexcept nogil:
    """After E_LATE: the ring, if something is in flight in it, for ring_adopt() elsewhere; else NULL."""
    cdef ring *r = <ring *>own_ring()
    if r == NULL:               # lost
        return NULL
    r.deadline = 0
    if not r.left:
        return NULL
    set_own_ring(NULL)
    return r


cdef inline void ring_settle() noexcept nogil:
    """Wait for what was left in flight, if it was not taken over."""
    cdef ring *r = <ring *>own_ring()
    if r != NULL:
        settle(r)


cdef inline ring *ring_adopt(ring *r) noexcept nogil:
    """Make `r` this thread's; what it had before, or NULL, for ring_give_back()."""
    cdef ring *before = <ring *>own_ring()
    set_own_ring(r)
    return before


cdef inline void ring_give_back(ring *before) noexcept nogil:
    """Undo ring_adopt(), with nothing left in flight."""
    cdef ring *r = <ring *>own_ring()
    set_own_ring(before)
    if r != NULL:               # else it was lost meanwhile
        ring_put_away(r)
