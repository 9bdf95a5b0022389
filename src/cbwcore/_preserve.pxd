# Copy-before-write: how a guest write passes one snapshot (R1), and the copy of old data that it may need first.
#
# Everything here is under the snapshot's lock but the copy itself, copy_clusters(). A copy has two owners: the guest write
# that wants it, and whoever does it; a guest write may go on without a copy that is late (R8), and that then ends
# with nobody waiting.

from libc.errno cimport EAGAIN, ENOMEM, ENOSPC, ETIMEDOUT
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from cbwcore._sys cimport (
    add_relaxed, load_acquire, load_relaxed, monotonic_ns, pthread_mutex_lock, pthread_mutex_unlock, realtime_ns, store_release,
)
from cbwcore._geometry cimport cluster_end, least, most, outer_end
from cbwcore._bitmap cimport bitmap_any, bitmap_next, bitmap_put, bitmap_test
from cbwcore._reqlist cimport reqlist_add, reqlist_find, reqlist_remove, request
from cbwcore._blockio cimport blk_discard, blk_next_data
from cbwcore._copy cimport ZERO_WORDS, find_zeroes, old_data, old_data_covers, old_data_fill, old_data_new, old_data_put, \
    old_data_ref, write_target
from cbwcore._uring cimport E_LATE, has_deadline, ring, ring_adopt, ring_clear_deadline, ring_detach, ring_give_back, \
    ring_set_deadline, ring_settle
from cbwcore._workers cimport work, workers_submit
from cbwcore._snapshot cimport (
    ARMED, BREAK_SNAPSHOT, BROKEN, HISTOGRAM, SOURCE_READ, TARGET_WRITE, TIMEOUT, cbw_stats, deadline_after, failure, now,
    snapshot, wait, wake,
)


cdef enum:
    SLOW_LOOK = 200_000         # ns that a look for holes may take: reading what a copy is of does not take longer
    SLOW_LOOKS = 3


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


# ---- waiting ----

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


cdef inline void note_look(snapshot *s, int64_t began) noexcept nogil:
    """tmpfs, asked for the next data, walks through all pages that were allocated and never written, 30 ms for each GiB. Where
    that is so it is not asked again; one slow answer, or two, may be the scheduler's."""
    if not s.source.in_memory:
        return
    if monotonic_ns() - began >= SLOW_LOOK:
        add_relaxed(&s.slow_looks, 1)
        if load_relaxed(&s.slow_looks) >= SLOW_LOOKS:
            store_release(&s.look_for_holes, 0)
    elif load_relaxed(&s.slow_looks):
        store_release(&s.slow_looks, 0)


cdef inline bint is_hole(copy_job *job, uint64_t start, uint64_t end) noexcept nogil:
    """Whether the run is known to read as zeroes without reading it (R11). With a deadline that is not asked: the file system
    may have to wait for its storage. Where it cannot be told, reading will tell."""
    cdef uint64_t data = start
    cdef int64_t began
    cdef int rc
    if not load_relaxed(&job.s.look_for_holes) or job.filled or has_deadline():
        return False
    began = monotonic_ns()
    rc = blk_next_data(job.s.source, start, end, &data)
    note_look(job.s, began)
    if rc < 0 or data < end:
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
