# One snapshot: its maps, the copy-before-write of a guest write, snapshot reads, discard, break.
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
# thread that holds it takes another lock (R18). Whoever changes what a waiter waits for calls wake().

from libc.errno cimport ENOMEM, ENOSPC, ETIMEDOUT
from libc.stdint cimport INT64_MAX, int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from cbwcore._sys cimport (
    cond_init, cond_wait_until, load_acquire, load_relaxed, monotonic_ns, pthread_cond_broadcast, pthread_cond_destroy,
    pthread_cond_t, pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_t, pthread_mutex_unlock, realtime_ns, store_release,
)
from cbwcore._geometry cimport cluster_count, cluster_end, inner_end, inner_first, least, most, outer_end
from cbwcore._bitmap cimport bitmap, bitmap_any, bitmap_count, bitmap_free, bitmap_init, bitmap_next, bitmap_put, \
    bitmap_test
from cbwcore._reqlist cimport reqlist, reqlist_add, reqlist_find, reqlist_remove, request
from cbwcore._buffers cimport bufpool
from cbwcore._blockio cimport blk, blk_close, blk_destroy, blk_discard, blk_extent, blk_read
from cbwcore._copy cimport COPY_RUN, find_zeroes, old_data, old_data_covers, old_data_put, old_data_read, \
    old_data_ref, write_target
from cbwcore._workers cimport work, workers, workers_init, workers_ready, workers_stop, workers_submit

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

cdef enum:
    READ_RUN = 1 << 20      # bytes that one snapshot read freezes at most
    STATUS_RUN = 1 << 30    # bytes that one look at the disk's holes freezes at most
    HISTOGRAM = 40          # wait times: bucket i counts those under 2**i microseconds
    MAX_RUN_CLUSTERS = 256  # COPY_RUN in the smallest clusters

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
    uint64_t copy_waits     # times that one waited for a copy of another
    uint64_t frozen_waits   # times that one waited for a snapshot read
    uint64_t histogram[40]
    int64_t arm_pause_ns


cdef struct snapshot:
    # Read by every guest write; changed under lock.
    uint64_t state          # ARMED -> BROKEN -> CLOSED or ARMED -> CLOSED, never back
    bitmap need
    int shift
    # Fixed when the snapshot is made.
    blk *source             # the disk; belongs to the disk, which outlives the snapshot
    bufpool *pool
    const uint64_t *clock_skew
    uint64_t size           # bytes, of disk and snapshot
    uint64_t nclusters
    bint target_is_new      # the target reads as zeroes wherever no copy has been written
    blk target
    workers helpers
    # Under lock.
    pthread_mutex_t lock
    pthread_cond_t changed
    uint64_t waiters
    uint64_t users          # guest writes in their slow path; close waits for them
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


cdef struct copy_job:       # freed by the last of writer and copier, under the snapshot's lock
    work work               # first: a helper thread finds the job by it
    request claim           # in s.copies until the copy has ended
    snapshot *s
    uint64_t first          # clusters
    uint64_t last
    uint64_t read_start     # bytes to read, if `old` is not given
    uint64_t read_end
    old_data *old
    uint64_t zeroes[4]
    uint64_t reserved       # bytes of the target limit
    int owners
    bint finished
    int error
    failure why


# ---- life ----

cdef inline int snapshot_init(snapshot *s, blk *source, bufpool *pool, const uint64_t *clock_skew, uint64_t size,
                              int shift, bint scoped) noexcept nogil:
    """Maps and locks; ARMED from the start, but no guest write sees it before it is linked to its disk.
    `scoped`: need and access start empty, and the caller fills them."""
    cdef int rc
    memset(s, 0, sizeof(snapshot))
    s.target.fd = s.target.tail_fd = -1
    s.source = source
    s.pool = pool
    s.clock_skew = clock_skew
    s.size = size
    s.shift = shift
    s.nclusters = cluster_count(size, shift)
    pthread_mutex_init(&s.lock, NULL)
    rc = cond_init(&s.changed) or workers_init(&s.helpers)
    if rc == 0:
        rc = bitmap_init(&s.need, s.nclusters, not scoped) or bitmap_init(&s.access, s.nclusters, not scoped)
    if rc == 0:
        rc = bitmap_init(&s.done, s.nclusters, False) or bitmap_init(&s.zero, s.nclusters, False)
    return rc


cdef inline int snapshot_destroy(snapshot *s) noexcept nogil:
    """Stop the helpers, free the maps and close the target; nobody uses the snapshot any more. 0, or -errno of close."""
    cdef int rc
    workers_stop(&s.helpers)
    bitmap_free(&s.need)
    bitmap_free(&s.done)
    bitmap_free(&s.zero)
    bitmap_free(&s.access)
    pthread_cond_destroy(&s.changed)
    pthread_mutex_destroy(&s.lock)
    rc = blk_close(&s.target)
    blk_destroy(&s.target)
    return rc


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


cdef inline int wait_for(snapshot *s, const request *r, int64_t deadline, failure *why) noexcept nogil:
    """wait(), and on a timeout say for which range."""
    cdef uint64_t start = r.start, end = r.end
    if wait(s, deadline) == 0:
        return 0
    return timed_out(s, start, end, why)


cdef inline int timed_out(snapshot *s, uint64_t start, uint64_t end, failure *why) noexcept nogil:
    s.stats.timeouts += 1
    why.error = ETIMEDOUT
    why.operation = TIMEOUT
    why.offset = start
    why.length = end - start
    return -ETIMEDOUT


# ---- the copy ----

cdef inline int reserve_target(snapshot *s, copy_job *job, uint64_t bytes) noexcept nogil:
    cdef int rc = 0
    pthread_mutex_lock(&s.lock)
    if bytes > s.target_limit or s.target_used > s.target_limit - bytes:
        rc = -ENOSPC
    else:
        s.target_used += bytes
        job.reserved = bytes
    pthread_mutex_unlock(&s.lock)
    return rc


cdef inline int copy_clusters(copy_job *job) noexcept nogil:
    """Read old, write target. 0, or -errno with job.why.operation set."""
    cdef snapshot *s = job.s
    cdef uint64_t start = job.first << s.shift, end = cluster_end(job.last - 1, s.shift, s.size), data
    cdef int rc
    job.why.operation = SOURCE_READ
    if job.old == NULL:
        rc = old_data_read(s.source, s.pool, job.read_start, job.read_end, &job.old)
        if rc < 0 and (job.read_start < start or end < job.read_end):
            rc = old_data_read(s.source, s.pool, start, end, &job.old)     # the fault may lie outside what is needed
        if rc < 0:
            return rc
    job.why.operation = TARGET_WRITE
    data = find_zeroes(job.old, job.first, job.last, s.shift, s.size, job.zeroes)
    rc = reserve_target(s, job, data)
    if rc == 0:
        rc = write_target(&s.target, s.pool, job.old, job.first, job.last, s.shift, s.size, job.zeroes, s.target_is_new)
    return rc


cdef inline void job_release(copy_job *job) noexcept nogil:
    """Under lock."""
    job.owners -= 1
    if job.owners == 0:
        old_data_put(job.old)
        free(job)


cdef inline void mark_copied(snapshot *s, copy_job *job) noexcept nogil:
    """The disk still holds T0 here: need is set and this copy has held its claim all along (R2)."""
    cdef uint64_t c, bytes = cluster_end(job.last - 1, s.shift, s.size) - (job.first << s.shift)
    for c in range(job.first, job.last):
        if (job.zeroes[(c - job.first) >> 6] >> ((c - job.first) & 63)) & 1:
            bitmap_put(&s.zero, c, c + 1, True)
    bitmap_put(&s.done, job.first, job.last, True)
    s.stats.copies += 1
    s.stats.copied_bytes += bytes
    s.stats.zero_bytes += bytes - job.reserved


cdef inline void copy_main(work *w) noexcept nogil:
    """Do a copy, in the guest's thread or a helper's. After a break, or a close, it counts no more (R8)."""
    cdef copy_job *job = <copy_job *>w
    cdef snapshot *s = job.s
    cdef int rc = copy_clusters(job)
    pthread_mutex_lock(&s.lock)
    if rc == 0 and s.state == ARMED:
        mark_copied(s, job)
    if rc < 0:
        s.target_used -= job.reserved
        s.stats.failures += 1
    job.error = rc
    job.finished = True
    reqlist_remove(&s.copies, &job.claim)
    wake(s)
    job_release(job)
    pthread_mutex_unlock(&s.lock)


cdef inline void start_copy(snapshot *s, copy_job *job, bint may_be_late) noexcept nogil:
    """Do a claimed copy, with the lock given up meanwhile; where it may be late, a helper thread does it."""
    cdef int rc = 0
    pthread_mutex_unlock(&s.lock)
    if may_be_late:
        rc = workers_submit(&s.helpers, &job.work)
    else:
        copy_main(&job.work)
    pthread_mutex_lock(&s.lock)
    if rc < 0:
        job.error = rc
        job.finished = True
        job.why.operation = SOURCE_READ
        s.stats.failures += 1
        reqlist_remove(&s.copies, &job.claim)
        wake(s)
        job_release(job)


cdef struct cbw_pass:       # one guest write's way past the snapshots; of its thread alone
    old_data *old           # what was read last, for the next snapshot
    uint64_t span_start     # bytes: read all of it at once where several snapshots are to be served,
    uint64_t span_end       # else empty
    failure why


cdef inline int copy_own(snapshot *s, uint64_t first, uint64_t last, int64_t deadline, cbw_pass *p) noexcept nogil:
    """Claim the clusters [first, last), copy them and wait for that. Under lock, given up meanwhile."""
    cdef copy_job *job = <copy_job *>calloc(1, sizeof(copy_job))
    cdef uint64_t start = first << s.shift, end = cluster_end(last - 1, s.shift, s.size)
    cdef int rc = 0
    p.why.offset = start
    p.why.length = end - start
    if job == NULL:
        p.why.error = ENOMEM
        p.why.operation = SOURCE_READ
        return -ENOMEM
    job.s = s
    job.work.run = copy_main
    job.owners = 2
    job.first = first
    job.last = last
    job.read_start = start
    job.read_end = end
    if p.span_start < p.span_end:
        job.read_start = least(p.span_start, start)
        job.read_end = most(p.span_end, end)
    if old_data_covers(p.old, start, end):
        job.old = old_data_ref(p.old)
    else:
        old_data_put(p.old)             # nobody holds one buffer while waiting for another
        p.old = NULL
    reqlist_add(&s.copies, &job.claim, start, end)
    start_copy(s, job, deadline != 0)
    while not job.finished and s.state == ARMED and rc == 0:
        rc = wait(s, deadline)
    if job.finished:
        rc = job.error
        p.why.error = -rc
        p.why.operation = job.why.operation
        if rc == 0 and p.old == NULL:
            p.old = old_data_ref(job.old)
    elif rc < 0:
        timed_out(s, start, end, &p.why)
    job_release(job)
    return rc


# ---- copy-before-write ----

cdef inline int preserve_run(snapshot *s, uint64_t c, uint64_t end, int64_t deadline, cbw_pass *p) noexcept nogil:
    """One step of R1 for the needed clusters from `c` on: wait, copy, or clear need. Under lock; the caller looks again.

    A second writer waits for the first one's copy and then finds, in the same critical section, either done set
    or nobody copying: then it copies itself (R3)."""
    cdef uint64_t stop = bitmap_next(&s.need, c, end, False)
    cdef request *r
    if bitmap_test(&s.done, c):
        stop = bitmap_next(&s.done, c, stop, False)
        r = reqlist_find(&s.frozen, c << s.shift, stop << s.shift)
        if r != NULL:
            s.stats.frozen_waits += 1
            return wait_for(s, r, deadline, &p.why)
        bitmap_put(&s.need, c, stop, False)
        return 0
    r = reqlist_find(&s.copies, c << s.shift, (c + 1) << s.shift)
    if r == NULL and s.copies.count >= s.max_copies:
        r = s.copies.first
    if r != NULL:
        s.stats.copy_waits += 1
        return wait_for(s, r, deadline, &p.why)
    stop = bitmap_next(&s.done, c, stop, True)
    stop = least(stop, c + most(s.copy_run >> s.shift, 1))
    r = reqlist_find(&s.copies, c << s.shift, stop << s.shift)
    while r != NULL:
        stop = r.start >> s.shift
        r = reqlist_find(&s.copies, c << s.shift, stop << s.shift)
    return copy_own(s, c, stop, deadline, p)


cdef inline void snapshot_break(snapshot *s, const failure *why) noexcept nogil:
    """ARMED -> BROKEN, under lock (R7): first the cause, then the state, then every waiter, and only then does
    the guest write go on. From here need counts no more, and a frozen read that ends fails, whatever it read."""
    s.cause = why[0]
    s.cause.time = realtime_ns()
    s.break_unreported = True
    store_release(&s.state, BROKEN)
    wake(s)


cdef inline void note_wait(cbw_stats *stats, int64_t ns) noexcept nogil:
    cdef int64_t us = ns // 1000
    cdef int i = 0
    while i < HISTOGRAM - 1 and (us >> i):
        i += 1
    stats.waits += 1
    stats.wait_ns += <uint64_t>ns
    stats.longest_wait_ns = most(stats.longest_wait_ns, <uint64_t>ns)
    stats.histogram[i] += 1


cdef inline bint snapshot_needs(const snapshot *s, uint64_t off, uint64_t n) noexcept nogil:
    """The fast path of every guest write (R1): no lock, no other map."""
    return load_acquire(&s.state) == ARMED and bitmap_any(&s.need, off >> s.shift, outer_end(off, n, s.shift))


cdef inline int snapshot_preserve(snapshot *s, uint64_t off, uint64_t n, int64_t *spent, cbw_pass *p) noexcept nogil:
    """Let a guest write pass: after return 0 it needs nothing more of [off, off + n) here, now and for good.

    `spent`: ns of this snapshot's timeout that earlier parts of the same guest write used up; kept up to date.
    -errno, with p.why filled, where the policy fails the guest write (R9): the snapshot is as valid as before."""
    cdef uint64_t c, end = outer_end(off, n, s.shift)
    cdef int64_t started, deadline = 0
    cdef int rc = 0
    if not snapshot_needs(s, off, n):
        return 0
    pthread_mutex_lock(&s.lock)
    started = now(s)
    if s.timeout_ns:
        deadline = deadline_after(s, s.timeout_ns - least(spent[0], s.timeout_ns))
    while rc == 0 and s.state == ARMED:
        c = bitmap_next(&s.need, off >> s.shift, end, True)
        if c == end:
            break
        rc = preserve_run(s, c, end, deadline, p)
    if s.state != ARMED:
        rc = 0
    elif rc < 0 and s.policy == BREAK_SNAPSHOT:
        snapshot_break(s, &p.why)
        rc = 0
    spent[0] += now(s) - started
    pthread_mutex_unlock(&s.lock)
    return rc


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


cdef inline int64_t read_run(snapshot *s, char *buf, uint64_t n, uint64_t off) noexcept nogil:
    """Read one run, from the disk or the target; how many bytes, or an error."""
    cdef uint64_t first = off >> s.shift, stop
    cdef reqlist *reads
    cdef request r
    cdef bint in_target
    cdef int rc
    n = least(n, READ_RUN)
    pthread_mutex_lock(&s.lock)
    rc = usable(s)
    if rc == 0 and not bitmap_test(&s.access, first):
        rc = E_ACCESS
    if rc < 0:
        pthread_mutex_unlock(&s.lock)
        return rc
    in_target = bitmap_test(&s.done, first)
    stop = bitmap_next(&s.done, first, outer_end(off, n, s.shift), not in_target)
    stop = bitmap_next(&s.access, first, stop, False)
    n = least(n, (stop << s.shift) - off)
    reads = &s.target_reads if in_target else &s.frozen
    reqlist_add(reads, &r, off, off + n)
    pthread_mutex_unlock(&s.lock)
    rc = blk_read(&s.target if in_target else s.source, s.pool, buf, n, off)
    rc = end_read(s, reads, &r, rc)
    return rc if rc < 0 else <int64_t>n


cdef inline int snapshot_read(snapshot *s, char *buf, uint64_t n, uint64_t off) noexcept nogil:
    """Read T0 data, or fail."""
    cdef int64_t rc
    if n == 0:
        pthread_mutex_lock(&s.lock)
        rc = usable(s)
        pthread_mutex_unlock(&s.lock)
        return <int>rc
    while n:
        rc = read_run(s, buf, n, off)
        if rc < 0:
            return <int>rc
        buf += rc
        n -= <uint64_t>rc
        off += <uint64_t>rc
    return 0


cdef inline int64_t snapshot_status(snapshot *s, uint64_t off, uint64_t end, int *flags) noexcept nogil:
    """End of the extent from `off` on, with STATUS_ flags, or an error. It tells of T0, and stays true (R20):
    what the disk is asked about is frozen meanwhile, and copied clusters are answered from the maps."""
    cdef uint64_t first = off >> s.shift, last = outer_end(off, end - off, s.shift), stop
    cdef bint value, hole = False
    cdef int64_t pos
    cdef request r
    cdef int rc
    flags[0] = 0
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
    end = least(least(stop << s.shift, end), off + STATUS_RUN)
    reqlist_add(&s.frozen, &r, off, end)
    pthread_mutex_unlock(&s.lock)
    pos = blk_extent(s.source, off, end, &hole)
    rc = end_read(s, &s.frozen, &r, <int>pos if pos < 0 else 0)
    flags[0] |= STATUS_ZERO if hole else 0
    return rc if rc < 0 else pos


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


cdef inline int snapshot_discard(snapshot *s, uint64_t off, uint64_t n) noexcept nogil:
    """Give up the whole clusters inside the range: no read may see them again, no guest write copies them, and
    the target's space for them is given back. Reads and copies of them under way are waited for."""
    cdef uint64_t first = inner_first(off, s.shift), last = inner_end(off, n, s.shift, s.size), start, end, bytes
    cdef int rc
    pthread_mutex_lock(&s.lock)
    rc = usable(s)
    if rc < 0 or first >= last:
        pthread_mutex_unlock(&s.lock)
        return rc
    start = first << s.shift
    end = cluster_end(last - 1, s.shift, s.size)
    bitmap_put(&s.access, first, last, False)
    while rc == 0 and (reqlist_find(&s.frozen, start, end) != NULL or reqlist_find(&s.target_reads, start, end) != NULL
                       or reqlist_find(&s.copies, start, end) != NULL):
        wait(s, 0)
        rc = usable(s)
    if rc == 0:
        bitmap_put(&s.need, first, last, False)
        bytes = data_bytes(s, first, last)
        bitmap_put(&s.done, first, last, False)
        s.users += 1
        wake(s)
    pthread_mutex_unlock(&s.lock)
    if rc < 0:
        return rc
    rc = blk_discard(&s.target, start, end - start)
    pthread_mutex_lock(&s.lock)
    if rc == 0:
        s.target_used -= bytes
    s.users -= 1
    wake(s)
    pthread_mutex_unlock(&s.lock)
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
