# Helper threads for copies that a guest write may have to abandon (R8): a system call cannot be
# called off, so with a timeout the copy runs here, and the guest waits for it as long as it may.
# Each snapshot has its own, so that one dead target never holds up another snapshot (R15).

from libc.errno cimport EAGAIN
from libc.stdint cimport uint64_t
from cbwcore._sys cimport (
    cond_init, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal, pthread_cond_t,
    pthread_cond_wait, pthread_join, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_t, pthread_mutex_unlock, pthread_t, thread_start,
)

cdef enum:
    MAX_WORKERS = 64


cdef struct work:
    work *next
    void (*run)(work *w) noexcept nogil     # owns the work from here


cdef struct workers:
    pthread_mutex_t lock        # guards all below; held across no I/O
    pthread_cond_t changed
    work *first
    work *last
    uint64_t queued
    uint64_t idle               # threads waiting for work
    uint64_t count              # threads started; each is joined by workers_stop()
    bint stopping
    pthread_t threads[MAX_WORKERS]


cdef inline void *worker_main(void *arg) noexcept nogil:
    cdef workers *p = <workers *>arg
    cdef work *w
    pthread_mutex_lock(&p.lock)
    while True:
        while p.first == NULL and not p.stopping:
            p.idle += 1
            pthread_cond_wait(&p.changed, &p.lock)
            p.idle -= 1
        w = p.first
        if w == NULL:
            break
        p.first = w.next
        p.queued -= 1
        pthread_mutex_unlock(&p.lock)
        w.run(w)
        pthread_mutex_lock(&p.lock)
    pthread_mutex_unlock(&p.lock)
    return NULL


cdef inline int workers_init(workers *p) noexcept nogil:
    pthread_mutex_init(&p.lock, NULL)
    return cond_init(&p.changed)


cdef inline int start_worker(workers *p) noexcept nogil:
    """One thread more, under lock. 0, or -errno."""
    cdef int rc = thread_start(&p.threads[p.count], worker_main, p)
    if rc == 0:
        p.count += 1
    return rc


cdef inline int workers_ready(workers *p) noexcept nogil:
    """Make sure that there is a thread, so that a later want of threads slows copies down and fails none."""
    cdef int rc = 0
    pthread_mutex_lock(&p.lock)
    if p.count == 0:
        rc = start_worker(p)
    pthread_mutex_unlock(&p.lock)
    return rc


cdef inline int workers_submit(workers *p, work *w) noexcept nogil:
    """Hand `w` to a thread. 0, or -errno where there is no thread at all; then `w` was not taken."""
    cdef int rc = 0
    pthread_mutex_lock(&p.lock)
    if p.queued >= p.idle and p.count < MAX_WORKERS:
        rc = start_worker(p)
    if p.count == 0:
        pthread_mutex_unlock(&p.lock)
        return rc if rc < 0 else -EAGAIN
    w.next = NULL
    if p.first == NULL:
        p.first = w
    else:
        p.last.next = w
    p.last = w
    p.queued += 1
    pthread_cond_signal(&p.changed)
    pthread_mutex_unlock(&p.lock)
    return 0


cdef inline void workers_stop(workers *p) noexcept nogil:
    """Finish what is queued and join every thread. No submit may follow."""
    cdef uint64_t i
    pthread_mutex_lock(&p.lock)
    p.stopping = True
    pthread_cond_broadcast(&p.changed)
    pthread_mutex_unlock(&p.lock)
    for i in range(p.count):
        pthread_join(p.threads[i], NULL)
    pthread_cond_destroy(&p.changed)
    pthread_mutex_destroy(&p.lock)
