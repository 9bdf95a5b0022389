# Buffers aligned for O_DIRECT, from a budget (R17): a buffer is counted before it is allocated, and whoever finds the
# budget spent waits for one to come back.
#
# Copies share one budget. Each armed snapshot has one copy's worth of it *reserved*: when dead targets hold all the
# rest, the other snapshots' copies go on one at a time, instead of not at all (R15). Bounce buffers have a small
# budget per file, so a dead target holds up nobody's reads but its own.
#
# Nobody holds one buffer while waiting for another, or for anything that waits for a buffer. Buffers that came back are
# kept warm, last in first out, up to `keep` bytes: the next copy finds its buffer in the processor's cache.

from libc.errno cimport EAGAIN, ENOMEM, ENOSPC
from libc.stdint cimport uint64_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign
from cbwcore._sys cimport (
    cond_init, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_t, pthread_cond_wait, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock,
)

cdef enum:
    BUFFER_ALIGN = 4096
    SMALLEST_SHIFT = 12
    CLASSES = 16                # 4 KiB .. 128 MiB
    LARGEST = 1 << 27


cdef struct reserve:            # under the pool's lock
    uint64_t bytes
    bint in_use


cdef struct bufpool:
    pthread_mutex_t lock        # guards all below
    pthread_cond_t returned
    uint64_t limit              # bytes; the budget
    uint64_t keep               # bytes to keep warm at most
    uint64_t reserved           # bytes of the budget that reserves have for themselves
    uint64_t used               # bytes handed out of the shared part, or kept; it never grows past limit - reserved
    uint64_t reserve_used       # bytes handed out of reserves
    uint64_t kept               # bytes in `idle`
    uint64_t waiting            # threads in bufpool_get() that found the budget spent
    void *idle[CLASSES]         # per size class: buffers at rest, linked through their first word


cdef inline int size_class(uint64_t n) noexcept nogil:
    cdef int k = 0
    while (<uint64_t>1 << (SMALLEST_SHIFT + k)) < n:
        k += 1
    return k


cdef inline uint64_t class_bytes(uint64_t n) noexcept nogil:
    """What a buffer of `n` bytes takes of the budget."""
    return <uint64_t>1 << (SMALLEST_SHIFT + size_class(n))


cdef inline int bufpool_init(bufpool *p, uint64_t limit, uint64_t keep) noexcept nogil:
    memset(p, 0, sizeof(bufpool))
    p.limit = limit
    p.keep = keep
    pthread_mutex_init(&p.lock, NULL)
    return cond_init(&p.returned)


cdef inline void evict(bufpool *p) noexcept nogil:
    """Give every kept buffer back to the system. Under lock."""
    cdef int k
    cdef void *buf
    for k in range(CLASSES):
        while p.idle[k] != NULL:
            buf = p.idle[k]
            p.idle[k] = (<void **>buf)[0]
            free(buf)
    p.used -= p.kept
    p.kept = 0


cdef inline void bufpool_destroy(bufpool *p) noexcept nogil:
    evict(p)
    pthread_cond_destroy(&p.returned)
    pthread_mutex_destroy(&p.lock)


cdef inline int bufpool_reserve(bufpool *p, reserve *r, uint64_t bytes) noexcept nogil:
    """Set a buffer of `bytes` aside for `r`; -ENOSPC where the budget has no room for it now."""
    cdef int rc = 0
    bytes = class_bytes(bytes)
    pthread_mutex_lock(&p.lock)
    if p.used + p.reserved + bytes > p.limit:
        evict(p)
    if p.used + p.reserved + bytes > p.limit:
        rc = -ENOSPC
    else:
        p.reserved += bytes
        r.bytes = bytes
    pthread_mutex_unlock(&p.lock)
    return rc


cdef inline void bufpool_unreserve(bufpool *p, reserve *r) noexcept nogil:
    """Its buffer has come back."""
    pthread_mutex_lock(&p.lock)
    p.reserved -= r.bytes
    r.bytes = 0
    pthread_cond_broadcast(&p.returned)
    pthread_mutex_unlock(&p.lock)


cdef inline void *take_kept(bufpool *p, uint64_t n) noexcept nogil:
    """A kept buffer of the right class, else NULL. Under lock."""
    cdef int k = size_class(n)
    cdef void *buf = p.idle[k]
    if buf != NULL:
        p.idle[k] = (<void **>buf)[0]
        p.kept -= class_bytes(n)
    return buf


cdef inline int bufpool_get(bufpool *p, uint64_t n, reserve **own, bint patient, void **out) noexcept nogil:
    """A buffer of at least `n` bytes: of the shared part, else of the reserve `own[0]`, else (`patient`) of what comes
    back. `own` (or NULL) becomes NULL inside unless the reserve was taken. 0, -ENOMEM, or -EAGAIN where not patient."""
    cdef uint64_t size = class_bytes(n)
    cdef reserve *mine = own[0] if own != NULL else NULL
    cdef bint shared = True
    if own != NULL:
        own[0] = NULL
    if n > LARGEST:
        return -ENOMEM
    pthread_mutex_lock(&p.lock)
    out[0] = take_kept(p, n)
    while out[0] == NULL:
        shared = p.used + p.reserved + size <= p.limit
        if shared:
            p.used += size
            break
        if p.kept:
            evict(p)
            continue
        if mine != NULL and not mine.in_use and size <= mine.bytes:
            mine.in_use = True
            p.reserve_used += size
            own[0] = mine
            break
        if not patient or (mine == NULL and size > p.limit - p.reserved) or size > p.limit:
            pthread_mutex_unlock(&p.lock)
            return -EAGAIN if not patient else -ENOMEM
        p.waiting += 1
        pthread_cond_wait(&p.returned, &p.lock)
        p.waiting -= 1
        out[0] = take_kept(p, n)
    pthread_mutex_unlock(&p.lock)
    if out[0] != NULL or posix_memalign(out, BUFFER_ALIGN, size) == 0:
        return 0
    out[0] = NULL
    bufpool_put(p, NULL, n, NULL if shared else mine)
    return -ENOMEM


cdef inline void bufpool_put(bufpool *p, void *buf, uint64_t n, reserve *own) noexcept nogil:
    """Return a buffer that bufpool_get() gave for the same `n`; `own` as that left it."""
    cdef uint64_t size = class_bytes(n)
    cdef bint keep
    pthread_mutex_lock(&p.lock)
    keep = own == NULL and buf != NULL and p.kept + size <= p.keep and not p.waiting and p.used + p.reserved <= p.limit
    if keep:
        (<void **>buf)[0] = p.idle[size_class(n)]
        p.idle[size_class(n)] = buf
        p.kept += size
    elif own == NULL:
        p.used -= size
    else:
        own.in_use = False
        p.reserve_used -= size
    if p.waiting:
        pthread_cond_broadcast(&p.returned)
    pthread_mutex_unlock(&p.lock)
    if not keep:
        free(buf)


cdef inline int bufpool_set_limit(bufpool *p, uint64_t limit) noexcept nogil:
    """A lower limit holds for buffers to come; those handed out are freed as they come back. -ENOSPC where the reserves
    alone exceed it."""
    cdef int rc = 0
    pthread_mutex_lock(&p.lock)
    if limit < p.reserved:
        rc = -ENOSPC
    else:
        evict(p)
        p.limit = limit
        pthread_cond_broadcast(&p.returned)
    pthread_mutex_unlock(&p.lock)
    return rc
