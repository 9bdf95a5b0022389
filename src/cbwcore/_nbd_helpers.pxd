# The NBD server's helper threads: each reads for a connection while the one that read before runs a request that waits.
#
# A connection takes a *seat*. A helper comes to it when it is called (there are requests in its buffer) or when its
# socket, watched while nobody reads it, has something. Idle helpers sleep in epoll_wait(), and one of them is woken.
# As long as fewer than MAX_HELPERS exist, one is always idle: a connection whose requests all wait for a dead target, or
# for their client, holds up no other. Half of them are for connections that have none, so that greedy ones cannot have
# them all; where none is left connections fall back on their own threads.

from libc.errno cimport EAGAIN
from libc.stdint cimport uint32_t, uint64_t
from cbwcore._sys cimport (
    cond_init, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_t, pthread_cond_wait, pthread_join,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, pthread_t,
    thread_start,
)
from posix.unistd cimport close

cdef extern from * nogil:
    """
    #include <sys/epoll.h>
    #include <sys/eventfd.h>

    #define CBW_WAKE UINT64_MAX
    static inline int new_eventfd(void) { int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); return fd < 0 ? -errno : fd; }
    static inline int new_epoll(void) { int fd = epoll_create1(EPOLL_CLOEXEC); return fd < 0 ? -errno : fd; }
    static inline void eventfd_add(int fd) { uint64_t one = 1; if (write(fd, &one, 8) < 0) { } }
    /* Edge-triggered: nobody needs to read the counter. Calls may coalesce: who is woken wakes the next, see next_called(). */
    static inline int epoll_add_wake(int ep, int fd) {
        struct epoll_event e = { .events = EPOLLIN | EPOLLET, .data.u64 = CBW_WAKE };
        return epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e) ? -errno : 0;
    }
    /* Known, and watched for one event, or for none. */
    static inline int epoll_add(int ep, int fd, uint64_t data) {
        struct epoll_event e = { .events = EPOLLONESHOT, .data.u64 = data };
        return epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e) ? -errno : 0;
    }
    static inline void epoll_watch(int ep, int fd, int on, uint64_t data) {
        struct epoll_event e = { .events = on ? EPOLLIN | EPOLLRDHUP | EPOLLONESHOT : EPOLLONESHOT, .data.u64 = data };
        epoll_ctl(ep, EPOLL_CTL_MOD, fd, &e);
    }
    static inline void epoll_forget(int ep, int fd) { epoll_ctl(ep, EPOLL_CTL_DEL, fd, NULL); }
    /* What the next event is about. */
    static inline uint64_t epoll_next(int ep) {
        struct epoll_event e;
        while (epoll_wait(ep, &e, 1, -1) != 1)
            ;
        return e.data.u64;
    }
    """
    const uint64_t CBW_WAKE
    int new_eventfd()
    int new_epoll()
    void eventfd_add(int fd)
    int epoll_add_wake(int ep, int fd)
    int epoll_add(int ep, int fd, uint64_t data)
    void epoll_watch(int ep, int fd, bint on, uint64_t data)
    void epoll_forget(int ep, int fd)
    uint64_t epoll_next(int ep)

cdef enum:
    MAX_HELPERS = 256
    FREE_FOR_ALL = 128          # with so many at work no seat gets a second one
    MAX_VISITORS = 16           # of a seat: more would find nothing that they may run
    MAX_SEATS = 4096
    NO_SEAT = -1


cdef struct seat:
    void *taker                 # a connection; NULL: the seat is free
    uint32_t generation         # of takers, so that a late event is not taken for one of the next
    uint64_t visitors           # helpers that are with the taker
    int next                    # in the queue
    bint queued
    bint missed                 # a visitor was needed that could not be spared: one who is there looks again


cdef struct helpers:
    pthread_mutex_t lock        # guards all below
    pthread_cond_t visited
    void (*visit)(void *taker) noexcept nogil
    int epoll_fd
    int wake_fd
    uint64_t idle               # helpers in epoll_next(), or just started
    uint64_t count              # each is joined by helpers_stop()
    bint stopping
    int first                   # queue of seats that were called for; NO_SEAT: empty
    int last
    pthread_t threads[MAX_HELPERS]
    seat seats[MAX_SEATS]


cdef inline int helpers_init(helpers *h, void (*visit)(void *taker) noexcept nogil) noexcept nogil:
    """Of zeroed memory. 0 or -errno."""
    cdef int rc
    h.visit = visit
    h.first = h.last = NO_SEAT
    h.epoll_fd = h.wake_fd = -1
    pthread_mutex_init(&h.lock, NULL)
    rc = cond_init(&h.visited)
    if rc < 0:
        return rc
    h.epoll_fd = new_epoll()
    if h.epoll_fd < 0:
        return h.epoll_fd
    h.wake_fd = new_eventfd()
    return h.wake_fd if h.wake_fd < 0 else epoll_add_wake(h.epoll_fd, h.wake_fd)


cdef inline void helpers_destroy(helpers *h) noexcept nogil:
    """After helpers_stop()."""
    if h.epoll_fd >= 0:
        close(h.epoll_fd)
    if h.wake_fd >= 0:
        close(h.wake_fd)
    pthread_cond_destroy(&h.visited)
    pthread_mutex_destroy(&h.lock)


cdef inline void keep_one_idle(helpers *h) noexcept nogil:
    """Under lock. Where no thread can be had the connections' own threads do it all, one request after the other."""
    if h.idle == 0 and h.count < MAX_HELPERS and not h.stopping:
        if thread_start(&h.threads[h.count], helper_main, h) == 0:
            h.count += 1
            h.idle += 1


cdef inline int next_called(helpers *h) noexcept nogil:
    """Under lock: take a seat from the queue, or NO_SEAT. One sleeper more is woken where others are left in it."""
    cdef int i = h.first
    if i == NO_SEAT:
        return i
    h.first = h.seats[i].next
    h.seats[i].queued = False
    if h.first != NO_SEAT:
        eventfd_add(h.wake_fd)
    return i


cdef inline int seat_of(helpers *h, uint64_t event) noexcept nogil:
    """Under lock: the seat that an event is about, NO_SEAT where its taker has left."""
    cdef int i = <int>(event >> 32)
    if h.seats[i].taker != NULL and h.seats[i].generation == <uint32_t>event:
        return i
    return NO_SEAT


cdef inline int await_seat(helpers *h) noexcept nogil:
    """Under lock, given up while asleep: where help is wanted. NO_SEAT: look again."""
    cdef uint64_t event
    if h.first != NO_SEAT:
        return next_called(h)
    h.idle += 1
    pthread_mutex_unlock(&h.lock)
    event = epoll_next(h.epoll_fd)
    pthread_mutex_lock(&h.lock)
    h.idle -= 1
    return next_called(h) if event == CBW_WAKE else seat_of(h, event)


cdef inline void visit_seat(helpers *h, int i) noexcept nogil:
    """Under lock, given up meanwhile: be with the taker until nothing was missed."""
    while True:
        pthread_mutex_unlock(&h.lock)
        h.visit(h.seats[i].taker)
        pthread_mutex_lock(&h.lock)
        if not h.seats[i].missed:
            return
        h.seats[i].missed = False


cdef inline uint64_t visitors_allowed(const helpers *h) noexcept nogil:
    """Under lock: how many helpers may be with a taker at once. One that has run its request is with it until it has
    this lock again: without a limit each such moment on a busy machine would cost a thread more, for good."""
    return MAX_VISITORS if h.count - h.idle <= FREE_FOR_ALL else 1


cdef inline void *helper_main(void *arg) noexcept nogil:
    cdef helpers *h = <helpers *>arg
    cdef int i
    pthread_mutex_lock(&h.lock)
    h.idle -= 1
    while not h.stopping:
        i = await_seat(h)
        if i == NO_SEAT:
            continue
        if h.seats[i].visitors >= visitors_allowed(h):
            h.seats[i].missed = True
            continue
        h.seats[i].visitors += 1
        keep_one_idle(h)
        visit_seat(h, i)
        h.seats[i].visitors -= 1
        pthread_cond_broadcast(&h.visited)
    pthread_mutex_unlock(&h.lock)
    eventfd_add(h.wake_fd)              # the next one
    return NULL


cdef inline int seat_take(helpers *h, void *taker) noexcept nogil:
    """A seat, or -EAGAIN where all are taken."""
    cdef int i
    pthread_mutex_lock(&h.lock)
    for i in range(MAX_SEATS):
        if h.seats[i].taker == NULL:
            h.seats[i].taker = taker
            h.seats[i].generation += 1
            pthread_mutex_unlock(&h.lock)
            return i
    pthread_mutex_unlock(&h.lock)
    return -EAGAIN


cdef inline void unqueue(helpers *h, int i) noexcept nogil:
    """Under lock."""
    cdef int *link = &h.first
    cdef int before = NO_SEAT
    while link[0] != i:
        before = link[0]
        link = &h.seats[before].next
    link[0] = h.seats[i].next
    if h.last == i:
        h.last = before
    h.seats[i].queued = False


cdef inline void seat_leave(helpers *h, int i) noexcept nogil:
    """No helper comes to the taker again, and none is with it after return."""
    pthread_mutex_lock(&h.lock)
    if h.seats[i].queued:
        unqueue(h, i)
    h.seats[i].generation += 1          # events on their way find nobody
    while h.seats[i].visitors:
        pthread_cond_wait(&h.visited, &h.lock)
    h.seats[i].taker = NULL
    pthread_mutex_unlock(&h.lock)


cdef inline void seat_call(helpers *h, int i) noexcept nogil:
    """Have a helper come."""
    pthread_mutex_lock(&h.lock)
    if not h.seats[i].queued:
        h.seats[i].queued = True
        h.seats[i].next = NO_SEAT
        if h.first == NO_SEAT:
            h.first = i
        else:
            h.seats[h.last].next = i
        h.last = i
    keep_one_idle(h)
    pthread_mutex_unlock(&h.lock)
    eventfd_add(h.wake_fd)


cdef inline uint64_t seat_event(const helpers *h, int i) noexcept nogil:
    """For the taker: what epoll is to say of its socket."""
    return (<uint64_t>i << 32) | h.seats[i].generation


cdef inline void helpers_ready(helpers *h) noexcept nogil:
    """Before the first socket is watched: see that somebody watches."""
    pthread_mutex_lock(&h.lock)
    keep_one_idle(h)
    pthread_mutex_unlock(&h.lock)


cdef inline void helpers_stop(helpers *h) noexcept nogil:
    """Join every helper; all seats are free. Again does nothing."""
    cdef uint64_t i
    pthread_mutex_lock(&h.lock)
    h.stopping = True
    pthread_mutex_unlock(&h.lock)
    eventfd_add(h.wake_fd)
    for i in range(h.count):
        pthread_join(h.threads[i], NULL)
    h.count = 0
