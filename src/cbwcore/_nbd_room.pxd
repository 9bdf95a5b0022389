# Memory for the data of NBD requests in flight: one budget for a server, counted before it is allocated.
#
# Small requests (up to OWN_BYTES) of a connection are served whatever the others do: it has memory of its own to fall
# back on. Larger ones wait for their turn, first come first served. A connection gets at most a quarter of it all, and a
# quarter is kept for connections that have nothing yet, so that the greedy, or a dead disk's clients, hold up no others.
# Nobody waits for ever: not past the connection's stop, nor longer than a stalled peer may take.

from libc.errno cimport EAGAIN, ENOMEM
from libc.stdint cimport int64_t, uint64_t
from cbwcore._sys cimport (
    cond_init, cond_wait_until, load_acquire, monotonic_ns, pthread_cond_broadcast, pthread_cond_destroy,
    pthread_cond_t, pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock,
)
from cbwcore._geometry cimport least
from cbwcore._buffers cimport bufpool, bufpool_destroy, bufpool_get, bufpool_init, bufpool_put, class_bytes
from cbwcore._snapshot cimport E_CLOSED

cdef enum:
    OWN_BYTES = 1 << 17
    KEEP_BYTES = 8 << 20        # to keep warm
    LOOK_NS = 1_000_000_000     # how often a waiter looks whether its peer is lost


cdef struct place:              # in the queue; its thread's, until it has left it
    place *next


cdef struct room:
    bufpool buffers
    pthread_mutex_t lock        # guards all below; not held while allocating
    pthread_cond_t changed
    place *first                # who waits for a large buffer, the oldest first
    uint64_t returns            # buffers that came back so far
    uint64_t taken              # bytes of large buffers, those waited for included


cdef struct share:              # a connection's part; under the room's lock
    uint64_t charged            # bytes of its large buffers
    bint own_busy
    void *own                   # OWN_BYTES; fixed


cdef inline int room_init(room *m, uint64_t limit) noexcept nogil:
    m.first = NULL
    m.returns = m.taken = 0
    pthread_mutex_init(&m.lock, NULL)
    return cond_init(&m.changed) or bufpool_init(&m.buffers, limit, KEEP_BYTES)


cdef inline void room_destroy(room *m) noexcept nogil:
    bufpool_destroy(&m.buffers)
    pthread_cond_destroy(&m.changed)
    pthread_mutex_destroy(&m.lock)


cdef inline void *room_take_small(room *m, share *s, uint64_t n) noexcept nogil:
    """Memory for n <= OWN_BYTES. It may wait for another small request of the same connection, and for nobody else."""
    cdef void *buf = NULL
    cdef bint is_free
    pthread_mutex_lock(&m.lock)
    is_free = m.first == NULL
    pthread_mutex_unlock(&m.lock)
    if is_free and bufpool_get(&m.buffers, n, NULL, False, &buf) == 0:
        return buf
    pthread_mutex_lock(&m.lock)
    while s.own_busy:
        pthread_cond_wait(&m.changed, &m.lock)
    s.own_busy = True
    pthread_mutex_unlock(&m.lock)
    return s.own


cdef inline int wait_on(room *m, int64_t deadline, const uint64_t *stopping, const uint64_t *lost) noexcept nogil:
    """Under lock: until something may have changed. E_CLOSED once the connection is to stop or has lost its peer;
    -ENOMEM when the time is up."""
    cdef int64_t now = monotonic_ns()
    if load_acquire(stopping) or load_acquire(lost):
        return E_CLOSED
    if now >= deadline:
        return -ENOMEM
    cond_wait_until(&m.changed, &m.lock, now + <int64_t>least(<uint64_t>(deadline - now), LOOK_NS))
    return 0


cdef inline void leave_queue(room *m, place *mine) noexcept nogil:
    """Under lock."""
    cdef place **link = &m.first
    while link[0] != mine:
        link = &link[0].next
    link[0] = mine.next
    pthread_cond_broadcast(&m.changed)


cdef inline void join_queue(room *m, place *mine) noexcept nogil:
    """Under lock."""
    cdef place **link = &m.first
    while link[0] != NULL:
        link = &link[0].next
    mine.next = NULL
    link[0] = mine


cdef inline bint is_greedy(const room *m, const share *s, uint64_t size) noexcept nogil:
    """Under lock: whether a connection that has something already would get too much."""
    cdef uint64_t quarter = m.buffers.limit // 4
    return s.charged and (s.charged + size > quarter or m.taken + size > 3 * quarter)


cdef inline int room_take_large(room *m, share *s, uint64_t n, int64_t ns, const uint64_t *stopping,
                                const uint64_t *lost, void **out) noexcept nogil:
    """Memory for n > OWN_BYTES, after waiting for up to `ns`. 0, -ENOMEM or E_CLOSED."""
    cdef uint64_t size = class_bytes(n), seen
    cdef int64_t deadline = monotonic_ns() + ns
    cdef place mine
    cdef int rc = 0
    if size > m.buffers.limit:
        return -ENOMEM
    pthread_mutex_lock(&m.lock)
    while rc == 0 and is_greedy(m, s, size):
        rc = wait_on(m, deadline, stopping, lost)
    if rc < 0:
        pthread_mutex_unlock(&m.lock)
        return rc
    s.charged += size
    m.taken += size
    join_queue(m, &mine)
    while rc == 0:
        seen = m.returns
        if m.first == &mine:
            pthread_mutex_unlock(&m.lock)
            rc = bufpool_get(&m.buffers, n, NULL, False, out)
            pthread_mutex_lock(&m.lock)
            if rc != -EAGAIN:
                break
        rc = wait_on(m, deadline, stopping, lost) if seen == m.returns else 0
    leave_queue(m, &mine)
    if rc < 0:
        s.charged -= size
        m.taken -= size
    pthread_mutex_unlock(&m.lock)
    return rc


cdef inline void room_put(room *m, share *s, void *buf, uint64_t n) noexcept nogil:
    """Give back what was taken for the same `n`."""
    if buf != s.own:
        bufpool_put(&m.buffers, buf, n, NULL)
    pthread_mutex_lock(&m.lock)
    if buf == s.own:
        s.own_busy = False
    elif n > OWN_BYTES:
        s.charged -= class_bytes(n)
        m.taken -= class_bytes(n)
    m.returns += 1
    pthread_cond_broadcast(&m.changed)
    pthread_mutex_unlock(&m.lock)


cdef inline void room_stir(room *m) noexcept nogil:
    """Let those who wait look whether they are to stop."""
    pthread_mutex_lock(&m.lock)
    pthread_cond_broadcast(&m.changed)
    pthread_mutex_unlock(&m.lock)
