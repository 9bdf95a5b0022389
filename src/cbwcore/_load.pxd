# The load generator of the benchmarks, what qemu-img bench is to QEMU: N threads, each with one request in flight, on a
# disk of the engine; and the floor, the same bytes moved by plain system calls in the same loop.
#
# Nothing of a request is shared between threads but, where they are not sliced, the index of the next one.

from libc.errno cimport EIO
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free
from posix.stdlib cimport posix_memalign
from cbwcore._sys cimport (
    add_relaxed, cond_init, load_relaxed, monotonic_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_t,
    pthread_cond_wait, pthread_join, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock, pthread_t, read_once, store_release, thread_start, write_once,
)
from cbwcore._geometry cimport round_down, round_up
from cbwcore._snapshot cimport failure
from cbwcore._engine cimport GUEST_WRITE, disk, guest_read, guest_write

cdef enum:
    MAX_LOAD_THREADS = 256
    MAX_LOAD_TARGETS = 16
    LOAD_ALIGN = 4096           # of memory, for O_DIRECT


cdef struct load:               # set before the threads start, and only read by them, but for what is below `lock`
    disk *d                     # the guest's; NULL: the floor's calls, on `fd` and `targets`
    int fd
    int targets[MAX_LOAD_TARGETS]   # get the clusters that a write touches, before it
    uint64_t ntargets
    uint64_t cluster            # bytes, a power of two
    const uint64_t *offsets
    uint64_t count
    uint64_t length             # bytes of one request
    const char *data            # what is written, aligned; NULL: requests are reads
    int64_t *latencies          # ns that request i took, or NULL
    bint sliced                 # each thread has its part of the offsets; else it takes the next one that nobody has
    uint64_t next               # atomic
    uint64_t failed             # atomic: set once, after which threads stop
    pthread_mutex_t lock
    pthread_cond_t changed
    bint go
    int rc                      # 0, or what the first failed request returned
    failure why                 # and why, where the engine told


cdef struct load_thread:
    load *all
    pthread_t id
    char *buffer                # its own: what is read, the clusters that the floor copies
    uint64_t next               # of its slice
    uint64_t end


# ---- one request ----

cdef inline int whole(int64_t rc, uint64_t n) noexcept nogil:
    """Of a plain call, which benchmarks repeat for nothing."""
    if rc < 0:
        return <int>rc
    return 0 if <uint64_t>rc == n else -EIO


cdef inline int plain_request(const load *l, char *buffer, uint64_t off) noexcept nogil:
    """The floor of a read, or of a write whose clusters are first copied to `targets`, if any."""
    cdef uint64_t start = round_down(off, l.cluster), n = round_up(off + l.length, l.cluster) - start, i
    cdef int rc = 0
    if l.data == NULL:
        return whole(read_once(l.fd, buffer, l.length, off), l.length)
    if l.ntargets:
        rc = whole(read_once(l.fd, buffer, n, start), n)
    for i in range(l.ntargets):
        if rc == 0:
            rc = whole(write_once(l.targets[i], buffer, n, start), n)
    return rc if rc < 0 else whole(write_once(l.fd, l.data, l.length, off), l.length)


cdef inline int one_request(load *l, char *buffer, uint64_t off, failure *why) noexcept nogil:
    why.error = 0
    if l.d == NULL:
        return plain_request(l, buffer, off)
    if l.data == NULL:
        return guest_read(l.d, buffer, off, l.length)
    return guest_write(l.d, GUEST_WRITE, l.data, off, l.length, False, False, why)


# ---- a thread ----

cdef inline uint64_t take_next(load_thread *own) noexcept nogil:
    """The index of its next request; at least `count` when there is none."""
    cdef uint64_t i
    if not own.all.sliced:
        return add_relaxed(&own.all.next, 1)
    i = own.next
    own.next += 1
    return i if i < own.end else own.all.count


cdef inline void note_failure(load *l, int rc, const failure *why) noexcept nogil:
    """The first one is what run_load() returns; the threads stop."""
    pthread_mutex_lock(&l.lock)
    if l.rc == 0:
        l.rc = rc
        l.why = why[0]
    pthread_mutex_unlock(&l.lock)
    store_release(&l.failed, 1)


cdef inline void await_go(load *l) noexcept nogil:
    pthread_mutex_lock(&l.lock)
    while not l.go:
        pthread_cond_wait(&l.changed, &l.lock)
    pthread_mutex_unlock(&l.lock)


cdef inline void *load_main(void *arg) noexcept nogil:
    cdef load_thread *own = <load_thread *>arg
    cdef load *l = own.all
    cdef uint64_t i
    cdef int64_t began = 0
    cdef failure why
    cdef int rc
    await_go(l)
    i = take_next(own)
    while i < l.count and not load_relaxed(&l.failed):
        if l.latencies != NULL:
            began = monotonic_ns()
        rc = one_request(l, own.buffer, l.offsets[i], &why)
        if l.latencies != NULL:
            l.latencies[i] = monotonic_ns() - began
        if rc < 0:
            note_failure(l, rc, &why)
        i = take_next(own)
    return NULL


# ---- all of them ----

cdef inline int start_threads(load *l, load_thread *threads, uint64_t n, uint64_t *started) noexcept nogil:
    """0, or -errno, with as many as could be started."""
    cdef uint64_t room = round_up(l.length, l.cluster) + l.cluster, i
    cdef int rc = 0
    for i in range(n):
        threads[i].all = l
        threads[i].next = l.count * i // n
        threads[i].end = l.count * (i + 1) // n
        threads[i].buffer = NULL
        rc = -posix_memalign(<void **>&threads[i].buffer, LOAD_ALIGN, room)
        if rc == 0:
            rc = thread_start(&threads[i].id, load_main, &threads[i])
        if rc < 0:
            free(threads[i].buffer)
            return rc
        started[0] = i + 1
    return 0


cdef inline int64_t run_threads(load *l, uint64_t n) noexcept nogil:
    """ns from the moment when all `n` threads are let go to the end of the last; or -errno, E_CLOSED, with l.why."""
    cdef load_thread threads[MAX_LOAD_THREADS]
    cdef uint64_t started = 0, i
    cdef int64_t began
    l.next = l.failed = 0
    l.go = False
    l.rc = start_threads(l, threads, n, &started)
    l.why.error = 0
    store_release(&l.failed, l.rc != 0)
    began = monotonic_ns()
    pthread_mutex_lock(&l.lock)
    l.go = True
    pthread_cond_broadcast(&l.changed)
    pthread_mutex_unlock(&l.lock)
    for i in range(started):
        pthread_join(threads[i].id, NULL)
    began = monotonic_ns() - began
    for i in range(started):
        free(threads[i].buffer)
    return l.rc if l.rc < 0 else began


cdef inline int load_init(load *l) noexcept nogil:
    pthread_mutex_init(&l.lock, NULL)
    return cond_init(&l.changed)


cdef inline void load_destroy(load *l) noexcept nogil:
    pthread_cond_destroy(&l.changed)
    pthread_mutex_destroy(&l.lock)


cdef inline uint64_t or_words(const uint64_t *words, uint64_t n) noexcept nogil:
    """A plain read of memory."""
    cdef uint64_t seen = 0, i
    for i in range(n):
        seen |= words[i]
    return seen
