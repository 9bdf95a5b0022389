# Copy buffers, aligned for O_DIRECT, from one budget (R17): a buffer is reserved before it is
# allocated, and whoever finds the budget spent waits for a buffer to come back.
#
# Nobody holds one buffer while waiting for another, so the wait always ends. Buffers that came back
# are kept warm, last in first out, up to KEEP bytes: the next copy finds its buffer in the cache.

from libc.errno cimport ENOMEM
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from posix.stdlib cimport posix_memalign
from cbwcore._sys cimport (
    cond_init, pthread_cond_broadcast, pthread_cond_t, pthread_cond_wait, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock,
)

cdef enum:
    BUFFER_ALIGN = 4096
    SMALLEST_SHIFT = 12
    CLASSES = 16                # 4 KiB .. 128 MiB
    KEEP = 16 << 20


cdef struct bufpool:
    pthread_mutex_t lock        # guards all below
    pthread_cond_t returned
    uint64_t limit              # bytes; the budget
    uint64_t used               # bytes handed out or kept; never above limit
    uint64_t kept               # bytes in `idle`
    uint64_t waiting            # threads in bufpool_get() that found the budget spent
    void *idle[16]              # per size class: buffers at rest, linked through their first word


cdef inline int size_class(uint64_t n) noexcept nogil:
    cdef int k = 0
    while (<uint64_t>1 << (SMALLEST_SHIFT + k)) < n:
        k += 1
    return k


cdef inline uint64_t class_bytes(int k) noexcept nogil:
    return <uint64_t>1 << (SMALLEST_SHIFT + k)


cdef inline int bufpool_init(bufpool *p, uint64_t limit) noexcept nogil:
    p.limit = limit
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
            p.used -= class_bytes(k)
    p.kept = 0


cdef inline int bufpool_get(bufpool *p, uint64_t n, void **out) noexcept nogil:
    """A buffer of at least `n` bytes, waiting for the budget. 0, or -ENOMEM (also where n exceeds the budget)."""
    cdef int k = size_class(n)
    cdef uint64_t size = class_bytes(k)
    pthread_mutex_lock(&p.lock)
    while p.idle[k] == NULL and p.used + size > p.limit:
        if size > p.limit:
            pthread_mutex_unlock(&p.lock)
            return -ENOMEM
        if p.kept:
            evict(p)
            continue
        p.waiting += 1
        pthread_cond_wait(&p.returned, &p.lock)
        p.waiting -= 1
    if p.idle[k] != NULL:
        out[0] = p.idle[k]
        p.idle[k] = (<void **>out[0])[0]
        p.kept -= size
        pthread_mutex_unlock(&p.lock)
        return 0
    p.used += size
    pthread_mutex_unlock(&p.lock)
    if posix_memalign(out, BUFFER_ALIGN, size) == 0:
        return 0
    pthread_mutex_lock(&p.lock)
    p.used -= size
    pthread_cond_broadcast(&p.returned)
    pthread_mutex_unlock(&p.lock)
    return -ENOMEM


cdef inline void bufpool_put(bufpool *p, void *buf, uint64_t n) noexcept nogil:
    """Return a buffer that bufpool_get() gave for the same `n`."""
    cdef int k = size_class(n)
    cdef uint64_t size = class_bytes(k)
    pthread_mutex_lock(&p.lock)
    if p.kept + size <= KEEP and not p.waiting:
        (<void **>buf)[0] = p.idle[k]
        p.idle[k] = buf
        p.kept += size
    else:
        free(buf)
        p.used -= size
        pthread_cond_broadcast(&p.returned)
    pthread_mutex_unlock(&p.lock)


cdef inline void bufpool_set_limit(bufpool *p, uint64_t limit) noexcept nogil:
    """A lower limit holds for buffers to come; those handed out are waited for by bufpool_get()."""
    pthread_mutex_lock(&p.lock)
    evict(p)
    p.limit = limit
    pthread_cond_broadcast(&p.returned)
    pthread_mutex_unlock(&p.lock)
