# One snapshot: its maps, its states, what its clients ask of it. _preserve.pxd takes guest writes past it.
#
#   need    a guest write must pass CBW here. Read without a lock by every guest write, and only while ARMED.
#           Set at T0 for the whole scope; each bit is cleared once, under lock, and never set again.
#   done    the target holds the T0 data. Set under lock, only while ARMED and need is set.
#   zero    subset of done: the T0 data are zeroes, and the target holds nothing for them.
#   access  the snapshot may read here: the scope, less what was discarded.
#
# A cluster's life (R1): need -> [copies lists it] -> need, done -> [frozen reads of it have ended] -> done.
#
# `lock` guards everything but the fast path's look at `state` and `need`. It is never held across I/O, and no
# thread that holds it takes another lock, that of the copy buffers included (R18). Whoever changes what a waiter
# waits for calls wake().

from libc.errno cimport EOPNOTSUPP, ETIMEDOUT
from libc.stdint cimport INT64_MAX, int64_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset
from cbwcore._sys cimport (
    cond_init, cond_wait_until, load_relaxed, monotonic_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_t,
    pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock, store_release,
)
from cbwcore._geometry cimport cluster_count, cluster_end, inner_end, inner_first, least, most, outer_end
from cbwcore._bitmap cimport bitmap, bitmap_free, bitmap_init, bitmap_next, bitmap_put, bitmap_test
from cbwcore._reqlist cimport reqlist, reqlist_add, reqlist_find, reqlist_remove, request
from cbwcore._buffers cimport bufpool, bufpool_destroy, bufpool_init, bufpool_unreserve, reserve
from cbwcore._blockio cimport BOUNCE, BOUNCE_BUDGET, blk, blk_close, blk_destroy, blk_discard, blk_check_size, \
    blk_extent, blk_read_cached, blk_read_checked
from cbwcore._workers cimport workers, workers_init, workers_ready, workers_stop

cdef enum:
    ARMED
    BROKEN
    CLOSED

cdef enum:
    BREAK_GUEST_WRITE
    BREAK_SNAPSHOT

cdef enum:
    SOURCE_READ
    TARGET_WRITE
    TIMEOUT

cdef enum:                  # results beside 0 and -errno
    E_BROKEN = -100001
    E_ACCESS = -100002
    E_CLOSED = -100003
    E_WAIT = -100004        # only of what is asked to be done at once

cdef enum:
    READ_RUN = 1 << 20      # bytes that one snapshot read freezes at most
    STATUS_RUN = 1 << 30    # bytes that one look at the maps, and the disk's holes, covers at most
    HISTOGRAM = 40          # wait times: bucket i counts those under 2**i microseconds

cdef enum:                  # snapshot_status() flags
    STATUS_ACCESS = 1
    STATUS_ZERO = 2


cdef struct failure:
    int error               # positive errno
    int operation
    uint64_t offset         # bytes: the run that could not be copied, or was waited for
    uint64_t length
    int64_t time            # ns since the epoch


cdef struct cbw_stats:      # under the snapshot's lock
    uint64_t copies         # runs copied
    uint64_t copied_bytes
    uint64_t zero_bytes     # of copied_bytes: zeroes, that cost the target nothing
    uint64_t failures       # copies that failed
    uint64_t timeouts
    uint64_t waits          # guest writes that CBW held up
    uint64_t wait_ns
    uint64_t longest_wait_ns
    uint64_t copy_waits     # those that waited for the copy of another
    uint64_t frozen_waits   # those that waited for a snapshot read
    uint64_t histogram[40]
    int64_t arm_pause_ns


cdef struct snapshot:
    # Read by every guest write; changed under lock.
    uint64_t state          # CLOSED until armed; then ARMED -> BROKEN -> CLOSED or ARMED -> CLOSED, never back
    bitmap need
    int shift
    # Fixed when the snapshot is made.
    blk *source             # the disk; belongs to the disk, which outlives the snapshot
    bufpool *pool
    reserve own             # its part of the pool
    bufpool bounce          # its readers' bounce buffers: its own, so that they never hold up a guest (R16)
    const uint64_t *clock_skew
    uint64_t size           # bytes, of disk and snapshot
    uint64_t nclusters
    bint target_is_new      # the target reads as zeroes wherever no copy has been written
    blk target
    workers helpers
    # By copies, without the lock.
    uint64_t look_for_holes  # whether it is worth a look at the source before reading
    uint64_t slow_looks      # in a row
    # Under lock.
    pthread_mutex_t lock
    pthread_cond_t changed
    uint64_t refs           # who may still take the lock; the last frees the snapshot
    uint64_t waiters
    uint64_t users          # requests inside; close waits for them
    bitmap done
    bitmap zero
    bitmap access
    reqlist copies          # clusters being copied: at most one copy of a cluster at a time
    reqlist frozen          # snapshot reads of the disk (R6)
    reqlist target_reads    # snapshot reads of the target; a discard waits for them
    int policy
    int64_t timeout_ns      # 0: none
    uint64_t max_copies     # copies at once
    uint64_t copy_run       # bytes of one copy, where the cluster is not larger; at most COPY_RUN
    uint64_t target_limit   # bytes
    uint64_t target_used    # bytes written to the target by copies, or reserved by one under way
    failure cause           # the first failure; valid from BROKEN on
    bint break_unreported
    cbw_stats stats


# ---- life ----

cdef inline int snapshot_init(snapshot *s, blk *source, bufpool *pool, const uint64_t *clock_skew, uint64_t size,
                              int shift, bint scoped) noexcept nogil:
    """Maps and locks; CLOSED until arm(). `scoped`: need and access start empty, and the caller fills them."""
    cdef int rc
    memset(s, 0, sizeof(snapshot))
    s.state = CLOSED
    s.refs = 1
    s.target.fd = s.target.tail_fd = -1
    s.source = source
    s.pool = pool
    s.clock_skew = clock_skew
    s.size = size
    s.shift = shift
    s.nclusters = cluster_count(size, shift)
    pthread_mutex_init(&s.lock, NULL)
    rc = cond_init(&s.changed) or workers_init(&s.helpers) or bufpool_init(&s.bounce, BOUNCE_BUDGET, BOUNCE)
    if rc == 0:
        rc = bitmap_init(&s.need, s.nclusters, not scoped) or bitmap_init(&s.access, s.nclusters, not scoped)
    if rc == 0:
        rc = bitmap_init(&s.done, s.nclusters, False) or bitmap_init(&s.zero, s.nclusters, False)
    return rc


cdef inline int snapshot_release(snapshot *s) noexcept nogil:
    """Stop the helpers, free maps and buffers, close the target; no request is inside. 0, or -errno of close."""
    workers_stop(&s.helpers)
    bufpool_destroy(&s.bounce)
    bitmap_free(&s.need)
    bitmap_free(&s.done)
    bitmap_free(&s.zero)
    bitmap_free(&s.access)
    bufpool_unreserve(s.pool, &s.own)
    return blk_close(&s.target)


cdef inline void snapshot_put(snapshot *s) noexcept nogil:
    cdef bint last
    pthread_mutex_lock(&s.lock)
    s.refs -= 1
    last = s.refs == 0
    pthread_mutex_unlock(&s.lock)
    if last:
        blk_destroy(&s.target)
        pthread_cond_destroy(&s.changed)
        pthread_mutex_destroy(&s.lock)
        free(s)


# ---- waiting ----

cdef inline int64_t now(const snapshot *s) noexcept nogil:
    """Monotonic ns, plus what a test has added."""
    return monotonic_ns() + <int64_t>load_relaxed(s.clock_skew)


cdef inline int64_t deadline_after(const snapshot *s, int64_t ns) noexcept nogil:
    cdef int64_t t = now(s)
    return INT64_MAX if ns > INT64_MAX - t else t + ns


cdef inline void wake(snapshot *s) noexcept nogil:
    if s.waiters:
        pthread_cond_broadcast(&s.changed)


cdef inline int wait(snapshot *s, int64_t deadline) noexcept nogil:
    """Wait, under lock, until something changed; the caller looks again. -ETIMEDOUT once the deadline (0: none) is past."""
    if deadline and now(s) >= deadline:
        return -ETIMEDOUT
    s.waiters += 1
    if deadline:
        cond_wait_until(&s.changed, &s.lock, deadline - <int64_t>load_relaxed(s.clock_skew))
    else:
        pthread_cond_wait(&s.changed, &s.lock)
    s.waiters -= 1
    return 0


# ---- the snapshot's own requests ----

cdef inline int usable(const snapshot *s) noexcept nogil:
    if s.state == ARMED:
        return 0
    return E_BROKEN if s.state == BROKEN else E_CLOSED


cdef inline int end_read(snapshot *s, reqlist *reads, request *r, int rc) noexcept nogil:
    """Unfreeze, and look at the state once more: after a break the disk may have moved on while it was read (R7)."""
    pthread_mutex_lock(&s.lock)
    reqlist_remove(reads, r)
    wake(s)
    if s.state != ARMED:
        rc = usable(s)
    pthread_mutex_unlock(&s.lock)
    return rc


cdef inline int64_t read_run(snapshot *s, char *buf, uint64_t n, uint64_t off, bint at_once,
                             bint *in_target) noexcept nogil:
    """Read one run, from the disk or the target; how many bytes, or an error. `at_once`: all that is asked for, or E_WAIT
    where it is not one run, or not all in memory."""
    cdef uint64_t first = off >> s.shift, stop
    cdef reqlist *reads
    cdef request r
    cdef int rc
    cdef uint64_t wanted = n
    cdef blk *b
    n = least(n, READ_RUN)
    pthread_mutex_lock(&s.lock)
    rc = usable(s)
    if rc == 0 and not bitmap_test(&s.access, first):
        rc = E_ACCESS
    if rc < 0:
        pthread_mutex_unlock(&s.lock)
        return rc
    in_target[0] = bitmap_test(&s.done, first)
    stop = bitmap_next(&s.done, first, outer_end(off, n, s.shift), not in_target[0])
    stop = bitmap_next(&s.access, first, stop, False)
    n = least(n, (stop << s.shift) - off)
    if at_once and n < wanted:
        pthread_mutex_unlock(&s.lock)
        return E_WAIT
    reads = &s.target_reads if in_target[0] else &s.frozen
    reqlist_add(reads, &r, off, off + n)
    pthread_mutex_unlock(&s.lock)
    b = &s.target if in_target[0] else s.source
    if at_once and blk_read_cached(b, buf, n, off) < 0:
        rc = E_WAIT
    else:
        rc = blk_check_size(b) if at_once else blk_read_checked(b, &s.bounce, buf, n, off)
    rc = end_read(s, reads, &r, rc)
    return rc if rc < 0 else <int64_t>n


cdef inline int snapshot_read(snapshot *s, char *buf, uint64_t n, uint64_t off, bint *in_target) noexcept nogil:
    """Read T0 data, or fail; `in_target` then says which file a -errno comes from."""
    cdef int64_t rc
    if n == 0:
        pthread_mutex_lock(&s.lock)
        rc = usable(s)
        pthread_mutex_unlock(&s.lock)
        return <int>rc
    while n:
        rc = read_run(s, buf, n, off, False, in_target)
        if rc < 0:
            return <int>rc
        buf += rc
        n -= <uint64_t>rc
        off += <uint64_t>rc
    return 0


cdef inline int snapshot_read_at_once(snapshot *s, char *buf, uint64_t n, uint64_t off, bint *in_target) noexcept nogil:
    """snapshot_read() of n > 0 bytes that waits for no storage; else E_WAIT."""
    cdef int64_t rc = read_run(s, buf, n, off, True, in_target)
    return <int>rc if rc < 0 else 0


cdef inline int64_t still_t0(snapshot *s, uint64_t first, int64_t end) noexcept nogil:
    """How far, up to `end` (or the error that it is), the disk still holds T0 from the cluster `first` on, so that what it
    was asked before is true; the start of `first` where not even there. No guest write reaches a cluster before it is done."""
    cdef uint64_t stop
    cdef int rc
    pthread_mutex_lock(&s.lock)
    rc = usable(s)
    if rc == 0 and end > 0:
        stop = bitmap_next(&s.done, first, outer_end(0, <uint64_t>end, s.shift), True)
        stop = bitmap_next(&s.access, first, stop, False)
        end = <int64_t>least(stop << s.shift, <uint64_t>end)
    pthread_mutex_unlock(&s.lock)
    return rc if rc < 0 else end


cdef inline int64_t snapshot_status(snapshot *s, uint64_t off, uint64_t end, int *flags) noexcept nogil:
    """End of the extent from `off` on, with STATUS_ flags, or an error. It tells of T0, and stays true (R20): copied clusters
    are answered from the maps, and of the others the disk, as far as none of them was copied meanwhile."""
    cdef uint64_t first = off >> s.shift, last, stop
    cdef bint value, hole = False
    cdef int64_t pos
    cdef int rc
    flags[0] = 0
    end = least(end, off + STATUS_RUN)
    last = outer_end(off, end - off, s.shift)
    pthread_mutex_lock(&s.lock)
    rc = usable(s)
    if rc < 0:
        pthread_mutex_unlock(&s.lock)
        return rc
    stop = bitmap_next(&s.access, first, last, not bitmap_test(&s.access, first))
    if not bitmap_test(&s.access, first):
        pthread_mutex_unlock(&s.lock)
        return <int64_t>least(stop << s.shift, end)
    flags[0] = STATUS_ACCESS
    value = bitmap_test(&s.done, first)
    stop = bitmap_next(&s.done, first, stop, not value)
    if value:
        value = bitmap_test(&s.zero, first)
        stop = bitmap_next(&s.zero, first, stop, not value)
        flags[0] |= STATUS_ZERO if value else 0
        pthread_mutex_unlock(&s.lock)
        return <int64_t>least(stop << s.shift, end)
    pthread_mutex_unlock(&s.lock)
    pos = blk_extent(s.source, off, least(stop << s.shift, end), &hole)
    flags[0] |= STATUS_ZERO if hole else 0
    pos = still_t0(s, first, pos)
    if pos < 0 or pos > <int64_t>off:
        return pos
    return snapshot_status(s, off, end, flags)      # its first cluster was copied, or discarded, meanwhile


cdef inline uint64_t data_bytes(const snapshot *s, uint64_t first, uint64_t last) noexcept nogil:
    """Bytes of the target that copies of the clusters [first, last) take. Under lock."""
    cdef uint64_t c = first, stop, total = 0
    while True:
        c = bitmap_next(&s.done, c, last, True)
        if c == last:
            return total
        stop = bitmap_next(&s.zero, c, bitmap_next(&s.done, c, last, False), True)
        if stop == c:
            c = bitmap_next(&s.zero, c, last, False)
            continue
        total += cluster_end(stop - 1, s.shift, s.size) - (c << s.shift)
        c = stop


cdef inline int discard_clusters(snapshot *s, uint64_t first, uint64_t last) noexcept nogil:
    """No read may see the clusters [first, last) again, then, when those under way and the copies have ended, no guest
    write copies them, and then their space is given back."""
    cdef uint64_t start = first << s.shift, end = cluster_end(last - 1, s.shift, s.size), bytes = 0
    cdef int rc
    pthread_mutex_lock(&s.lock)
    rc = usable(s)
    if rc == 0:
        bitmap_put(&s.access, first, last, False)
    while rc == 0 and (reqlist_find(&s.frozen, start, end) != NULL or reqlist_find(&s.target_reads, start, end) != NULL
                       or reqlist_find(&s.copies, start, end) != NULL):
        wait(s, 0)
        rc = usable(s)
    if rc == 0:
        bitmap_put(&s.need, first, last, False)
        bytes = data_bytes(s, first, last)
        bitmap_put(&s.done, first, last, False)
        wake(s)
    pthread_mutex_unlock(&s.lock)
    if rc < 0 or bytes == 0:
        return rc
    rc = blk_discard(&s.target, start, end - start)
    if rc == -EOPNOTSUPP:
        return 0                # the space stays taken, and counted
    pthread_mutex_lock(&s.lock)
    s.target_used -= bytes if rc == 0 else 0
    pthread_mutex_unlock(&s.lock)
    return rc


cdef inline int snapshot_discard(snapshot *s, uint64_t off, uint64_t n) noexcept nogil:
    """Give up the whole clusters inside the range, a part at a time, for the lock's sake."""
    cdef uint64_t first = inner_first(off, s.shift), last = inner_end(off, n, s.shift, s.size), stop
    cdef int rc
    pthread_mutex_lock(&s.lock)
    rc = usable(s)
    pthread_mutex_unlock(&s.lock)
    while first < last and rc == 0:
        stop = least(last, first + most(STATUS_RUN >> s.shift, 1))
        rc = discard_clusters(s, first, stop)
        first = stop
    return rc


cdef inline int snapshot_set_timeout(snapshot *s, int64_t ns) noexcept nogil:
    """0: none. Holds for the guest writes that come; -errno where no helper thread could be started."""
    cdef int rc = workers_ready(&s.helpers) if ns else 0
    if rc < 0:
        return rc
    pthread_mutex_lock(&s.lock)
    s.timeout_ns = ns
    pthread_mutex_unlock(&s.lock)
    return 0


cdef inline void snapshot_revoke(snapshot *s) noexcept nogil:
    """-> CLOSED: guest writes that wait here go on, and reads fail when they end."""
    pthread_mutex_lock(&s.lock)
    store_release(&s.state, CLOSED)
    wake(s)
    pthread_mutex_unlock(&s.lock)


cdef inline void snapshot_quiesce(snapshot *s) noexcept nogil:
    """Wait until no guest write, read or copy uses the snapshot: copies that outlived their timeout included (R8)."""
    pthread_mutex_lock(&s.lock)
    while s.users or s.copies.count or s.frozen.count or s.target_reads.count:
        wait(s, 0)
    pthread_mutex_unlock(&s.lock)
