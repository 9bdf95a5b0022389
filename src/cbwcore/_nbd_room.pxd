# Memory for the data of NBD requests in flight: one budget for a server, counted before it is allocated.
#
# What is in flight is held at the storage's pace, or at a client's: a payload that is half received, a reply that nobody
# takes. A client can stop for ever, so no part of the budget that others cannot do without may be held by it:
#
# - Each connection has a *part* of the budget to itself. A request that fits into what is free of it is served whatever
#   the others do, and those of one connection wait for each other at most. The parts leave enough for the largest request.
# - The rest is *common*: for what exceeds a connection's part, first come first served. A connection gets at most half of
#   it, or one request. Whoever has waited for a tenth of the stall limit since its turn came *starves*: until it is served,
#   a peer that holds common memory must move STEADY bytes in each tenth of that limit, and be done within half of it, or
#   it is lost (_nbd_wire.pxd). So bad clients may hold a large request up, but not until it fails.
# - Small requests (up to OWN_BYTES) never wait for any of it: the connection has memory of its own to fall back on.
#
# Nobody waits for ever: not past the connection's stop, nor, once it is its turn, longer than a stalled peer may take.

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint64_t
from cbwcore._sys cimport (
    cond_init, cond_wait_until, load_acquire, monotonic_ns, pthread_cond_broadcast, pthread_cond_destroy,
    pthread_cond_signal, pthread_cond_t, pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, store_release,
)
from cbwcore._geometry cimport least, most
from cbwcore._buffers cimport bufpool, bufpool_destroy, bufpool_get, bufpool_init, bufpool_put, class_bytes
from cbwcore._snapshot cimport E_CLOSED

cdef enum:
    OWN_BYTES = 1 << 17
    LEAST_PART = 4096
    KEEP_BYTES = 8 << 20        # to keep warm
    LOOK_NS = 1_000_000_000     # how often a waiter looks whether its peer is lost
    TURN_NS = 100_000_000       # and one whose turn it is, whether it starves
    STARVES = 10                # the part of the stall limit after which a waiter starves


cdef struct share:              # what a connection has; under the room's lock
    uint64_t charged            # bytes of its buffers, beginning with its own part
    uint64_t in_common          # bytes of them that the common part gave; read without the lock, too
    bint own_busy
    void *own                   # OWN_BYTES beside the budget; fixed


cdef struct place:              # in the queue; its thread's, until it has left it
    place *next
    pthread_cond_t suits        # it may go on: nobody else is woken for nothing
    bint knows                  # it was told that its turn has come
    const share *owner
    uint64_t size


cdef struct room:
    bufpool buffers             # never short: what is handed out was granted before
    uint64_t part               # bytes of each connection's own part; a power of two, or 0; fixed
    uint64_t common             # bytes of the rest; fixed
    pthread_mutex_t lock        # guards all below; not held while allocating
    pthread_cond_t own_free     # some connection's own memory came back
    place *first                # who waits for common memory, the oldest first
    uint64_t taken              # bytes of the common part
    uint64_t starving           # whose turn it is has waited for long; read without the lock


cdef inline uint64_t part_of(uint64_t limit, uint64_t connections, uint64_t largest) noexcept nogil:
    """The largest power of two that each of so many connections can have, so that a request of `largest` bytes, and an
    eighth of it all, is left."""
    cdef uint64_t each = (limit - most(class_bytes(largest), limit // 8)) // connections, part = LEAST_PART
    if each < LEAST_PART:
        return 0
    while 2 * part <= each:
        part *= 2
    return part


cdef inline void room_divide(room *m, uint64_t limit, uint64_t connections, uint64_t largest) noexcept nogil:
    """Before anything is taken."""
    m.part = part_of(limit, connections, largest)
    m.common = limit - connections * m.part


cdef inline int room_init(room *m, uint64_t limit, uint64_t connections, uint64_t largest) noexcept nogil:
    """`limit`: bytes, enough for a request of `largest`."""
    m.first = NULL
    m.taken = m.starving = 0
    room_divide(m, limit, connections, largest)
    pthread_mutex_init(&m.lock, NULL)
    return cond_init(&m.own_free) or bufpool_init(&m.buffers, limit, KEEP_BYTES)


cdef inline void room_destroy(room *m) noexcept nogil:
    bufpool_destroy(&m.buffers)
    pthread_cond_destroy(&m.own_free)
    pthread_mutex_destroy(&m.lock)


# ---- what is granted: under lock ----

cdef inline uint64_t beyond_part(const room *m, uint64_t charged) noexcept nogil:
    return charged - m.part if charged > m.part else 0


cdef inline bint fits_part(const room *m, const share *s, uint64_t size) noexcept nogil:
    return s.charged + size <= m.part


cdef inline bint fits_common(const room *m, const share *s, uint64_t size) noexcept nogil:
    """Whether the common part has what the connection's own lacks."""
    return m.taken - s.in_common + beyond_part(m, s.charged + size) <= m.common


cdef inline bint is_greedy(const room *m, const share *s, uint64_t size) noexcept nogil:
    """Whether a connection that has some of the common part would get too much of it."""
    return s.in_common and beyond_part(m, s.charged + size) > m.common // 2


cdef inline place *whose_turn(const room *m) noexcept nogil:
    """The first in the queue, but for the greedy; NULL: nobody's."""
    cdef place *p = m.first
    while p != NULL and is_greedy(m, p.owner, p.size):
        p = p.next
    return p


cdef inline bint fits_now(const room *m, const share *s, uint64_t size) noexcept nogil:
    """Whether it need not wait."""
    return fits_part(m, s, size) or (fits_common(m, s, size) and not is_greedy(m, s, size) and whose_turn(m) == NULL)


cdef inline void charge(room *m, share *s, uint64_t charged) noexcept nogil:
    """Let the connection have `charged` bytes in all."""
    cdef uint64_t after = beyond_part(m, charged)
    m.taken += after - s.in_common
    s.charged = charged
    store_release(&s.in_common, after)


cdef inline void wake_turn(const room *m) noexcept nogil:
    """Let the one whose turn it is go on, if it can."""
    cdef place *p = whose_turn(m)
    if p != NULL and (fits_common(m, p.owner, p.size) or not p.knows):
        p.knows = True
        pthread_cond_signal(&p.suits)


cdef inline void uncharge(room *m, share *s, uint64_t n) noexcept nogil:
    """A buffer of the connection's came back: others of the same connection may go on, or whose turn it is."""
    cdef place *p = m.first
    charge(m, s, s.charged - class_bytes(n))
    while p != NULL:
        if p.owner == s and fits_part(m, s, p.size):
            pthread_cond_signal(&p.suits)
        p = p.next
    wake_turn(m)


# ---- taking and giving back ----

cdef inline void *granted(room *m, share *s, uint64_t n) noexcept nogil:
    """A buffer that has been charged; NULL, and it is not any more, where the system has no memory."""
    cdef void *buf = NULL
    if bufpool_get(&m.buffers, n, NULL, False, &buf) == 0:
        return buf
    pthread_mutex_lock(&m.lock)
    uncharge(m, s, n)
    pthread_mutex_unlock(&m.lock)
    return NULL


cdef inline void *room_take_small(room *m, share *s, uint64_t n) noexcept nogil:
    """Memory for n <= OWN_BYTES. It may wait for another small request of the same connection, and for nobody else."""
    cdef uint64_t size = class_bytes(n)
    cdef void *buf = NULL
    cdef bint is_free
    pthread_mutex_lock(&m.lock)
    is_free = fits_now(m, s, size)
    if is_free:
        charge(m, s, s.charged + size)
    pthread_mutex_unlock(&m.lock)
    if is_free:
        buf = granted(m, s, n)
    if buf != NULL:
        return buf
    pthread_mutex_lock(&m.lock)
    while s.own_busy:
        pthread_cond_wait(&m.own_free, &m.lock)
    s.own_busy = True
    pthread_mutex_unlock(&m.lock)
    return s.own


cdef inline int wait_on(room *m, place *mine, int64_t deadline, int64_t look, const uint64_t *stopping,
                        const uint64_t *lost) noexcept nogil:
    """Under lock: until something may have changed, for `look` ns at most. E_CLOSED once the connection is to stop or has
    lost its peer; -ENOMEM when the time is up."""
    cdef int64_t now = monotonic_ns()
    if load_acquire(stopping) or load_acquire(lost):
        return E_CLOSED
    if now >= deadline:
        return -ENOMEM
    cond_wait_until(&mine.suits, &m.lock, now + <int64_t>least(<uint64_t>(deadline - now), <uint64_t>look))
    return 0


cdef inline void leave_queue(room *m, place *mine) noexcept nogil:
    """Under lock."""
    cdef place **link = &m.first
    while link[0] != mine:
        link = &link[0].next
    if whose_turn(m) == mine:
        store_release(&m.starving, 0)
    link[0] = mine.next
    wake_turn(m)


cdef inline void join_queue(room *m, place *mine) noexcept nogil:
    """Under lock."""
    cdef place **link = &m.first
    while link[0] != NULL:
        link = &link[0].next
    mine.next = NULL
    link[0] = mine


cdef inline int wait_for_room(room *m, share *s, uint64_t size, int64_t ns, const uint64_t *stopping,
                              const uint64_t *lost) noexcept nogil:
    """Under lock: until `size` bytes can be charged, for up to `ns` not counting its time in the queue behind others, whose
    turns end. 0, -ENOMEM or E_CLOSED."""
    cdef int64_t deadline = monotonic_ns() + ns, turn = 0, look
    cdef place mine
    cdef int rc = cond_init(&mine.suits)
    if rc < 0:
        return rc
    mine.owner = s
    mine.size = size
    mine.knows = False
    join_queue(m, &mine)
    while rc == 0 and not fits_part(m, s, size):
        look = LOOK_NS
        if whose_turn(m) == &mine:
            if fits_common(m, s, size):
                break
            look = TURN_NS
            if turn == 0:
                turn = monotonic_ns()
            elif monotonic_ns() - turn >= ns // STARVES:
                store_release(&m.starving, 1)
        elif ns and not is_greedy(m, s, size):
            deadline = monotonic_ns() + ns
        rc = wait_on(m, &mine, deadline, look, stopping, lost)
    leave_queue(m, &mine)
    pthread_cond_destroy(&mine.suits)
    return rc


cdef inline int room_take_large(room *m, share *s, uint64_t n, int64_t ns, const uint64_t *stopping,
                                const uint64_t *lost, void **out) noexcept nogil:
    """Memory for n > OWN_BYTES, after waiting for up to `ns`. 0, -ENOMEM or E_CLOSED."""
    cdef uint64_t size = class_bytes(n)
    cdef int rc = 0
    if size > m.part + m.common:
        return -ENOMEM
    pthread_mutex_lock(&m.lock)
    if not fits_now(m, s, size):
        rc = wait_for_room(m, s, size, ns, stopping, lost)
    if rc == 0:
        charge(m, s, s.charged + size)
    pthread_mutex_unlock(&m.lock)
    if rc == 0:
        out[0] = granted(m, s, n)
        rc = 0 if out[0] != NULL else -ENOMEM
    return rc


cdef inline void room_put(room *m, share *s, void *buf, uint64_t n) noexcept nogil:
    """Give back what was taken for the same `n`."""
    if buf != s.own:
        bufpool_put(&m.buffers, buf, n, NULL)
    pthread_mutex_lock(&m.lock)
    if buf == s.own:
        s.own_busy = False
        pthread_cond_broadcast(&m.own_free)
    else:
        uncharge(m, s, n)
    pthread_mutex_unlock(&m.lock)


cdef inline void room_stir(room *m) noexcept nogil:
    """Let those who wait look whether they are to stop."""
    cdef place *p
    pthread_mutex_lock(&m.lock)
    p = m.first
    while p != NULL:
        pthread_cond_signal(&p.suits)
        p = p.next
    pthread_mutex_unlock(&m.lock)
