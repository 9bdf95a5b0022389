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
# thread that holds it takes another lock, that of the copy buffers included (R18). Whoever changes what a waiter
# waits for calls wake().

from libc.errno cimport EAGAIN, ENOMEM, ENOSPC, EOPNOTSUPP, ETIMEDOUT
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
from cbwcore._buffers cimport bufpool, bufpool_destroy, bufpool_init, bufpool_unreserve, reserve
from cbwcore._blockio cimport BOUNCE, BOUNCE_BUDGET, blk, blk_close, blk_destroy, blk_discard, blk_check_size, \
    blk_extent, blk_next_data, blk_read_cached, blk_read_checked
from cbwcore._copy cimport ZERO_WORDS, find_zeroes, old_data, old_data_covers, old_data_fill, old_data_new, old_data_put, \
    old_data_ref, write_target
from cbwcore._uring cimport E_LATE, has_deadline, ring, ring_adopt, ring_clear_deadline, ring_detach, ring_give_back, \
    ring_set_deadline, ring_settle
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


cdef struct cbw_pass:       # one guest write's way past the snapshots; of its thread alone
    old_data *old           # what was read last, for the next snapshot; never kept while waiting
    uint64_t span_start     # bytes: read all of it at once where several snapshots are to be served,
    uint64_t span_end       # else empty
    failure why


cdef struct cbw_visit:      # its part in one snapshot
    int64_t spent           # ns that the snapshot has held it up, in the windows so far
    int64_t deadline        # of this window; 0: none
    bint copy_wait          # it has waited for the copy of another
    bint frozen_wait        # it has waited for a snapshot read


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
    bint source_has_holes   # worth a look before reading; a hint of before T0
    blk target
    workers helpers
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


cdef struct copy_job:       # freed by the last of its owners
    work work               # first: a helper thread finds the job by it
    request claim           # in s.copies until the copy has ended
    snapshot *s
    uint64_t first          # clusters
    uint64_t last
    uint64_t read_start     # bytes to read, if `old` is not given
    uint64_t read_end
    old_data *old
    bint filled             # it holds the data
    uint64_t zeroes[ZERO_WORDS]
    uint64_t reserved       # bytes of the target limit
    int undo                # -errno: the copy has failed, and what was written is still to be given back
    ring *left              # in which a request was left in flight
    bint shared             # the writer wants `old` afterwards, for its other snapshots
    int owners              # writer and copier; under the snapshot's lock
    bint finished
    int error
    failure why


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
    """Stop the helpers, free the maps, close the target; no request is inside. 0, or -errno of close."""
    workers_stop(&s.helpers)
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
        bufpool_destroy(&s.bounce)
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


cdef inline int wait_for(snapshot *s, uint64_t start, uint64_t end, int64_t deadline, cbw_pass *p) noexcept nogil:
    """wait() of a guest write for others to be done with [start, end). It gives its buffer back first: they may need it."""
    cdef old_data *old = p.old
    if old != NULL:
        p.old = NULL
        pthread_mutex_unlock(&s.lock)
        old_data_put(old)
        pthread_mutex_lock(&s.lock)
        return 0
    if wait(s, deadline) == 0:
        return 0
    return timed_out(s, start, end, &p.why)


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


cdef inline int read_old(copy_job *job, uint64_t start, uint64_t end) noexcept nogil:
    """Read the run [start, end), and more around it where other snapshots may want it and a buffer is at hand."""
    cdef snapshot *s = job.s
    cdef bint wide
    cdef int rc
    if job.old == NULL and (job.read_start < start or end < job.read_end):
        old_data_new(s.pool, NULL, True, False, job.read_start, job.read_end, &job.old)
    while not job.filled:
        if job.old == NULL:
            rc = old_data_new(s.pool, &s.own, job.shared, not has_deadline(), start, end, &job.old)
            if rc < 0:
                return E_LATE if rc == -EAGAIN else rc      # a helper is to wait for a buffer
        rc = old_data_fill(s.source, job.old)
        if rc == E_LATE:
            return rc
        job.filled = rc == 0
        if rc < 0:
            wide = job.old.start < start or end < job.old.end
            old_data_put(job.old)
            job.old = NULL
            if not wide:
                return rc
    return 0


cdef inline bint is_hole(copy_job *job, uint64_t start, uint64_t end) noexcept nogil:
    """Whether the run is known to read as zeroes without reading it (R11). With a deadline that is not asked: the file system
    may have to wait for its storage. Where it cannot be told, reading will tell."""
    cdef uint64_t data = start
    if not job.s.source_has_holes or job.filled or has_deadline():
        return False
    if blk_next_data(job.s.source, start, end, &data) < 0 or data < end:
        return False
    memset(job.zeroes, 0xff, sizeof(job.zeroes))
    return True


cdef inline int undo_copy(copy_job *job, uint64_t start, uint64_t end) noexcept nogil:
    """Give back what of a failed copy did get written, for the limit counts it no more."""
    return E_LATE if blk_discard(&job.s.target, start, end - start) == E_LATE else job.undo


cdef inline int copy_clusters(copy_job *job) noexcept nogil:
    """Read old, write target. 0, or -errno with job.why.operation set. E_LATE: it is to be called again, by a helper, and
    goes on where it was."""
    cdef snapshot *s = job.s
    cdef uint64_t start = job.first << s.shift, end = cluster_end(job.last - 1, s.shift, s.size), data
    cdef bint hole
    cdef int rc = 0
    if job.undo:
        return undo_copy(job, start, end)
    job.why.operation = SOURCE_READ
    hole = is_hole(job, start, end)
    if not hole:
        rc = read_old(job, start, end)
    if rc < 0:
        return rc
    job.why.operation = TARGET_WRITE
    if not hole and job.reserved == 0:
        data = find_zeroes(job.old, job.first, job.last, s.shift, s.size, job.zeroes)
        rc = reserve_target(s, job, data)
        if rc < 0:
            return rc
    rc = write_target(&s.target, job.old, job.first, job.last, s.shift, s.size, job.zeroes, s.target_is_new)
    if rc == 0 or rc == E_LATE:
        return rc
    job.undo = rc
    return undo_copy(job, start, end)


cdef inline void job_free(copy_job *job) noexcept nogil:
    """By the last owner, without the lock."""
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


cdef inline void end_copy(snapshot *s, copy_job *job, int rc) noexcept nogil:
    """Under lock. After a break, or a close, a copy counts no more (R8)."""
    if rc == 0 and s.state == ARMED:
        mark_copied(s, job)
    if rc < 0:
        s.target_used -= job.reserved
        s.stats.failures += 1
    job.error = rc
    job.finished = True
    job.owners -= 1
    reqlist_remove(&s.copies, &job.claim)
    wake(s)


cdef inline void finish_copy(copy_job *job, int rc) noexcept nogil:
    """With what copy_clusters() came to; not E_LATE."""
    cdef snapshot *s = job.s
    cdef bint last
    if not (job.shared and job.filled) or (job.old != NULL and job.old.own != NULL):
        old_data_put(job.old)
        job.old = NULL
    pthread_mutex_lock(&s.lock)
    end_copy(s, job, rc)
    last = job.owners == 0
    pthread_mutex_unlock(&s.lock)
    if last:
        job_free(job)


cdef inline void copy_late(work *w) noexcept nogil:
    """Go on with a copy whose deadline is past, in a helper's thread."""
    cdef copy_job *job = <copy_job *>w
    cdef ring *left = job.left
    cdef ring *before = NULL
    cdef int rc
    if left != NULL:
        before = ring_adopt(left)
    rc = copy_clusters(job)
    ring_settle()               # before the buffer goes
    finish_copy(job, rc)
    if left != NULL:
        ring_give_back(before)


cdef inline void copy_main(work *w) noexcept nogil:
    """Do a copy, in the guest's thread or a helper's. Where there is no helper for what is late, the guest waits on."""
    cdef copy_job *job = <copy_job *>w
    cdef int rc = copy_clusters(job)
    if rc != E_LATE:
        finish_copy(job, rc)
        return
    job.left = ring_detach()
    job.work.run = copy_late
    if workers_submit(&job.s.helpers, &job.work) < 0:
        copy_late(&job.work)


cdef inline copy_job *new_job(snapshot *s, uint64_t first, uint64_t last, uint64_t start, uint64_t end,
                              cbw_pass *p) noexcept nogil:
    cdef copy_job *job = <copy_job *>calloc(1, sizeof(copy_job))
    if job == NULL:
        return NULL
    job.s = s
    job.work.run = copy_main
    job.owners = 2
    job.first = first
    job.last = last
    job.read_start = start
    job.read_end = end
    job.shared = p.span_start < p.span_end
    if job.shared:
        job.read_start = least(p.span_start, start)
        job.read_end = most(p.span_end, end)
    if p.old != NULL:
        job.old = old_data_ref(p.old)
        job.filled = True
    return job


cdef inline bint keeps_deadline(const snapshot *s, int64_t deadline) noexcept nogil:
    """Whether this thread can copy itself and yet give up at the deadline; its ring then has it."""
    return (s.source.ops.keeps_deadline and s.target.ops.keeps_deadline
            and ring_set_deadline(deadline - <int64_t>load_relaxed(s.clock_skew)))


cdef inline int copy_own(snapshot *s, uint64_t first, uint64_t last, int64_t deadline, cbw_pass *p) noexcept nogil:
    """Claim the clusters [first, last), copy them and wait for that. Under lock, given up meanwhile.

    With a deadline the guest write may have to go on without the copy. Where the I/O engines let go at a deadline, this
    thread copies all the same; else a helper thread does."""
    cdef uint64_t start = first << s.shift, end = cluster_end(last - 1, s.shift, s.size)
    cdef copy_job *job
    cdef int rc = 0
    p.why.offset = start
    p.why.length = end - start
    p.why.operation = SOURCE_READ
    if p.old != NULL and not old_data_covers(p.old, start, end):
        return wait_for(s, start, end, deadline, p)     # give it back; the caller looks again
    job = new_job(s, first, last, start, end, p)
    if job == NULL:
        p.why.error = ENOMEM
        return -ENOMEM
    reqlist_add(&s.copies, &job.claim, start, end)
    pthread_mutex_unlock(&s.lock)
    if deadline == 0:
        copy_main(&job.work)
    elif keeps_deadline(s, deadline):
        copy_main(&job.work)
        ring_clear_deadline()
    else:
        rc = workers_submit(&s.helpers, &job.work)
    pthread_mutex_lock(&s.lock)
    if rc < 0:
        end_copy(s, job, rc)                            # no thread took it
        rc = 0
    while not job.finished and s.state == ARMED and rc == 0:
        rc = wait(s, deadline)
    if job.finished:
        rc = job.error
        p.why.error = -rc
        p.why.operation = job.why.operation
        if p.old == NULL:
            p.old = job.old                             # taken over, for the next snapshot, or to be given back
            job.old = NULL
    elif rc < 0:
        timed_out(s, start, end, &p.why)
    job.owners -= 1
    if job.owners == 0:
        job_free(job)                                   # no buffer goes back here: p.old is the same one
    return rc


# ---- copy-before-write ----

cdef inline int preserve_run(snapshot *s, uint64_t c, uint64_t end, cbw_visit *v, cbw_pass *p) noexcept nogil:
    """One step of R1 for the needed clusters from `c` on: wait, copy, or clear need. Under lock; the caller looks again.

    A second writer waits for the first one's copy and then finds, in the same critical section, either done set
    or nobody copying: then it copies itself (R3)."""
    cdef uint64_t stop = bitmap_next(&s.need, c, end, False)
    cdef request *r
    if bitmap_test(&s.done, c):
        stop = bitmap_next(&s.done, c, stop, False)
        if reqlist_find(&s.frozen, c << s.shift, stop << s.shift) != NULL:
            s.stats.frozen_waits += not v.frozen_wait
            v.frozen_wait = True
            return wait_for(s, c << s.shift, cluster_end(stop - 1, s.shift, s.size), v.deadline, p)
        bitmap_put(&s.need, c, stop, False)
        return 0
    r = reqlist_find(&s.copies, c << s.shift, (c + 1) << s.shift)
    if r != NULL or s.copies.count >= s.max_copies:
        s.stats.copy_waits += not v.copy_wait
        v.copy_wait = True
        return wait_for(s, c << s.shift, cluster_end(c, s.shift, s.size), v.deadline, p)
    stop = bitmap_next(&s.done, c, stop, True)
    stop = least(stop, c + most(s.copy_run >> s.shift, 1))
    r = reqlist_find(&s.copies, c << s.shift, stop << s.shift)
    while r != NULL:
        stop = r.start >> s.shift
        r = reqlist_find(&s.copies, c << s.shift, stop << s.shift)
    return copy_own(s, c, stop, v.deadline, p)


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
    """The fast path of every guest write (R1): no lock, no other map. For a caller in flight, or under lock: the map is
    there as long as the state is ARMED and one of the two holds."""
    return load_acquire(&s.state) == ARMED and bitmap_any(&s.need, off >> s.shift, outer_end(off, n, s.shift))


cdef inline int snapshot_preserve(snapshot *s, uint64_t off, uint64_t n, cbw_visit *v, cbw_pass *p) noexcept nogil:
    """Let a guest write pass: after return 0 it needs nothing more of [off, off + n) here, now and for good.

    The timeout is for all windows of one guest write together (R8).
    -errno, with p.why filled, where the policy fails the guest write (R9): the snapshot is as valid as before."""
    cdef uint64_t c, end = outer_end(off, n, s.shift)
    cdef int64_t started
    cdef int rc = 0
    pthread_mutex_lock(&s.lock)
    if not snapshot_needs(s, off, n):
        pthread_mutex_unlock(&s.lock)
        return 0
    s.users += 1
    started = now(s)
    if s.timeout_ns:
        v.deadline = deadline_after(s, s.timeout_ns - least(v.spent, s.timeout_ns))
    while rc == 0 and s.state == ARMED:
        c = bitmap_next(&s.need, off >> s.shift, end, True)
        if c == end:
            break
        rc = preserve_run(s, c, end, v, p)
    if s.state != ARMED:
        rc = 0
    elif rc < 0 and s.policy == BREAK_SNAPSHOT:
        snapshot_break(s, &p.why)
        rc = 0
    v.spent += now(s) - started
    s.users -= 1
    wake(s)
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


cdef inline int64_t snapshot_status(snapshot *s, uint64_t off, uint64_t end, int *flags) noexcept nogil:
    """End of the extent from `off` on, with STATUS_ flags, or an error. It tells of T0, and stays true (R20):
    what the disk is asked about is frozen meanwhile, and copied clusters are answered from the maps."""
    cdef uint64_t first = off >> s.shift, last, stop
    cdef bint value, hole = False
    cdef int64_t pos
    cdef request r
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
    end = least(stop << s.shift, end)
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
