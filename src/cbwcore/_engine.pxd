# A disk and the guest's requests on it: the path of one guest write, the gate, arming.
#
# A guest write is *in flight* from its look at the snapshots' need maps until its own I/O has ended. It counts
# itself in a slot of its thread, and it is not in flight while it waits for a copy: so draining (R10) waits for
# plain disk I/O alone, never for a slow target. After such a wait it enters again and looks again, at every
# snapshot there is by then.
#
# The gate is shut to drain: to take or drop a snapshot, to change the recording bitmaps, to close. While it is shut
# and drained, the shutter alone owns `snaps` and `sinks`; while it is open nobody changes them.
# A writer adds to its slot and then reads the gate; the shutter sets the gate and then reads the slots. Both in
# sequentially consistent order, so at least one of them sees the other.

from libc.errno cimport E2BIG, EIO, ENOSPC, EOPNOTSUPP
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign
from cbwcore._sys cimport (
    CBW_SLOTS, add_relaxed, add_seq_cst, advise_once, cond_init, load_relaxed, load_seq_cst, monotonic_ns, pthread_cond_broadcast,
    pthread_cond_destroy, pthread_cond_t, pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, store_release, store_seq_cst, sub_seq_cst, thread_slot,
)
from cbwcore._geometry cimport least, most, outer_end, round_down, round_up
from cbwcore._bitmap cimport bitmap, bitmap_put
from cbwcore._buffers cimport bufpool, bufpool_destroy, bufpool_init
from cbwcore._blockio cimport (
    BOUNCE, BOUNCE_BUDGET, blk, blk_close, blk_destroy, blk_discard, blk_extent, blk_flush, blk_needs_tracking,
    blk_read, blk_read_cached, blk_track, blk_write, blk_write_zeroes, blk_zeroes_fast,
)
from cbwcore._copy cimport old_data_put
from cbwcore._snapshot cimport ARMED, E_CLOSED, E_WAIT, failure, snapshot, snapshot_put, snapshot_quiesce, snapshot_revoke
from cbwcore._preserve cimport cbw_pass, cbw_visit, note_wait, snapshot_needs, snapshot_preserve

cdef enum:
    MAX_SNAPSHOTS = 64
    MAX_SINKS = 256

cdef enum:
    GUEST_WRITE
    GUEST_WRITE_ZEROES
    GUEST_ZERO_FAST         # write zeroes, or -EOPNOTSUPP where that is no faster than writing data
    GUEST_DISCARD


cdef struct slot:           # one per 128 bytes: no two threads write one cache line, nor one pair of lines
    uint64_t writers        # guest writes in flight
    uint64_t readers        # other users of the disk
    uint64_t guest_writes   # since open
    uint64_t guest_write_bytes
    uint64_t guest_reads
    uint64_t guest_read_bytes
    uint64_t unused[10]


cdef struct sink:           # a bitmap in which every guest write is recorded, before it is submitted
    bitmap *map
    int shift               # granularity


cdef struct switch:         # what arming does to a bitmap, at T0
    disk *d
    bitmap *map
    int shift
    bint starts             # it records guest writes from T0 on; else up to T0, and not one after it


cdef struct disk:
    blk io
    bufpool bounce          # the guests' bounce buffers
    slot *slots
    uint64_t refs           # the disk object and its snapshots; the last frees the disk
    uint64_t closed         # set once, before the last drain
    uint64_t clock_skew     # ns that a test has added to the clock
    uint64_t breaks         # snapshot breaks that Python has not been told of
    pthread_mutex_t gate_lock
    pthread_cond_t gate_changed
    uint64_t gate           # 1 while shut; changed under gate_lock, read without it
    uint64_t nsnaps
    snapshot *snaps[MAX_SNAPSHOTS]
    uint64_t nsinks
    sink sinks[MAX_SINKS]


# ---- life ----

cdef inline int disk_init(disk *d) noexcept nogil:
    cdef void *slots
    cdef int rc
    memset(d, 0, sizeof(disk))
    d.io.fd = d.io.tail_fd = -1
    d.refs = d.closed = 1
    pthread_mutex_init(&d.gate_lock, NULL)
    rc = posix_memalign(&slots, 128, CBW_SLOTS * sizeof(slot))
    if rc:
        return -rc
    memset(slots, 0, CBW_SLOTS * sizeof(slot))
    d.slots = <slot *>slots
    return cond_init(&d.gate_changed) or bufpool_init(&d.bounce, BOUNCE_BUDGET, BOUNCE)


cdef inline void disk_put(disk *d) noexcept nogil:
    if sub_seq_cst(&d.refs, 1) != 1:
        return
    blk_close(&d.io)
    blk_destroy(&d.io)
    bufpool_destroy(&d.bounce)
    pthread_cond_destroy(&d.gate_changed)
    pthread_mutex_destroy(&d.gate_lock)
    free(d.slots)
    free(d)


# ---- in flight, and the gate ----

cdef inline void leave_write(disk *d, slot *own) noexcept nogil:
    sub_seq_cst(&own.writers, 1)
    if load_seq_cst(&d.gate):
        pthread_mutex_lock(&d.gate_lock)
        pthread_cond_broadcast(&d.gate_changed)
        pthread_mutex_unlock(&d.gate_lock)


cdef inline slot *enter_write(disk *d) noexcept nogil:
    """Be in flight; waits while the gate is shut. NULL once the disk is closed."""
    cdef slot *own = &d.slots[thread_slot()]
    while True:
        add_seq_cst(&own.writers, 1)
        if not load_seq_cst(&d.gate):
            break
        leave_write(d, own)
        pthread_mutex_lock(&d.gate_lock)
        while load_relaxed(&d.gate):
            pthread_cond_wait(&d.gate_changed, &d.gate_lock)
        pthread_mutex_unlock(&d.gate_lock)
    if load_relaxed(&d.closed):
        leave_write(d, own)
        return NULL
    return own


cdef inline void leave_read(disk *d, slot *own) noexcept nogil:
    sub_seq_cst(&own.readers, 1)
    if load_seq_cst(&d.closed):
        pthread_mutex_lock(&d.gate_lock)
        pthread_cond_broadcast(&d.gate_changed)
        pthread_mutex_unlock(&d.gate_lock)


cdef inline slot *enter_read(disk *d) noexcept nogil:
    """Use the disk without changing it; never waits (R16). NULL once the disk is closed."""
    cdef slot *own = &d.slots[thread_slot()]
    add_seq_cst(&own.readers, 1)
    if load_seq_cst(&d.closed):
        leave_read(d, own)
        return NULL
    return own


cdef inline uint64_t total_writers(const disk *d) noexcept nogil:
    cdef uint64_t total = 0
    cdef int i
    for i in range(CBW_SLOTS):
        total += load_seq_cst(&d.slots[i].writers)
    return total


cdef inline uint64_t total_readers(const disk *d) noexcept nogil:
    cdef uint64_t total = 0
    cdef int i
    for i in range(CBW_SLOTS):
        total += load_seq_cst(&d.slots[i].readers)
    return total


cdef inline void gate_shut(disk *d) noexcept nogil:
    """Hold new guest writes back and wait until none is in flight. One shutter at a time."""
    pthread_mutex_lock(&d.gate_lock)
    while load_relaxed(&d.gate):
        pthread_cond_wait(&d.gate_changed, &d.gate_lock)
    store_seq_cst(&d.gate, 1)
    while total_writers(d):
        pthread_cond_wait(&d.gate_changed, &d.gate_lock)
    pthread_mutex_unlock(&d.gate_lock)


cdef inline void gate_open(disk *d) noexcept nogil:
    pthread_mutex_lock(&d.gate_lock)
    store_seq_cst(&d.gate, 0)
    pthread_cond_broadcast(&d.gate_changed)
    pthread_mutex_unlock(&d.gate_lock)


cdef inline int disk_close(disk *d) noexcept nogil:
    """Let what is under way finish, then close. Its snapshots are closed already. 0, or -errno of close."""
    store_seq_cst(&d.closed, 1)
    gate_shut(d)
    gate_open(d)
    pthread_mutex_lock(&d.gate_lock)
    while total_readers(d):
        pthread_cond_wait(&d.gate_changed, &d.gate_lock)
    pthread_mutex_unlock(&d.gate_lock)
    return blk_close(&d.io)


# ---- bitmaps that record guest writes ----

cdef inline int add_sink(disk *d, bitmap *map, int shift) noexcept nogil:
    """Under the shut gate: every guest write that comes will be in `map`. -ENOSPC where there are too many."""
    if d.nsinks == MAX_SINKS:
        return -ENOSPC
    d.sinks[d.nsinks].map = map
    d.sinks[d.nsinks].shift = shift
    d.nsinks += 1
    return 0


cdef inline void drop_sink(disk *d, const bitmap *map) noexcept nogil:
    """Under the shut gate."""
    cdef uint64_t i
    for i in range(d.nsinks):
        if d.sinks[i].map == map:
            d.nsinks -= 1
            d.sinks[i] = d.sinks[d.nsinks]
            return


cdef inline void record(disk *d, uint64_t off, uint64_t n) noexcept nogil:
    cdef uint64_t i
    for i in range(d.nsinks):
        bitmap_put(d.sinks[i].map, off >> d.sinks[i].shift, outer_end(off, n, d.sinks[i].shift), True)


# ---- snapshots ----

cdef inline void set_armed(snapshot *s, int64_t pause) noexcept nogil:
    """Under the shut gate, once linked; `pause`: ns that guest writes have been held back. Anybody may close it from here."""
    pthread_mutex_lock(&s.lock)
    store_release(&s.state, ARMED)
    s.stats.arm_pause_ns = pause
    pthread_mutex_unlock(&s.lock)


cdef inline int make_switches(switch *switches, uint64_t n) noexcept nogil:
    """Under the shut gates: all of them, or none and -E2BIG where a disk would record too many. First those that start,
    then those that stop: the moment is one."""
    cdef uint64_t i, done = n
    for i in range(n):
        if switches[i].starts and add_sink(switches[i].d, switches[i].map, switches[i].shift) < 0:
            done = i
            break
    for i in range(done):
        if switches[i].starts == (done < n):
            drop_sink(switches[i].d, switches[i].map)
    return 0 if done == n else -E2BIG


cdef inline int arm(disk **disks, uint64_t ndisks, snapshot **snaps, disk **owners, uint64_t nsnaps, switch *switches,
                    uint64_t nswitches) noexcept nogil:
    """One T0 for all: shut every gate, link every snapshot, switch the bitmaps, open every gate (R10). -ENOSPC where a disk
    has MAX_SNAPSHOTS, -E2BIG where it has MAX_SINKS; then none is linked and no bitmap switched. `disks`: each once, in
    order of address, so that two groups cannot deadlock."""
    cdef uint64_t i
    cdef int64_t began = monotonic_ns()
    cdef int rc = 0
    for i in range(ndisks):
        gate_shut(disks[i])
    for i in range(nsnaps):
        if owners[i].nsnaps == MAX_SNAPSHOTS:
            rc = -ENOSPC
            break
        owners[i].snaps[owners[i].nsnaps] = snaps[i]
        owners[i].nsnaps += 1
    if rc == 0:
        rc = make_switches(switches, nswitches)
    for i in range(nsnaps):
        drop_sink(owners[i], &snaps[i].need)
        drop_sink(owners[i], &snaps[i].access)
        if rc < 0:
            unlink_snapshot(owners[i], snaps[i])
    if rc == 0:
        for i in range(nsnaps):
            set_armed(snaps[i], monotonic_ns() - began)
    for i in range(ndisks):
        gate_open(disks[i])             # from here another thread may have closed and freed them
    return rc


cdef inline void unlink_snapshot(disk *d, const snapshot *s) noexcept nogil:
    """Under the shut gate."""
    cdef uint64_t i
    for i in range(d.nsnaps):
        if d.snaps[i] == s:
            d.nsnaps -= 1
            d.snaps[i] = d.snaps[d.nsnaps]
            return


cdef inline void disarm(disk *d, snapshot *s) noexcept nogil:
    """Close a snapshot: its waiters go on, guests stop seeing it, and nothing uses it after return."""
    snapshot_revoke(s)
    gate_shut(d)
    unlink_snapshot(d, s)
    drop_sink(d, &s.need)
    drop_sink(d, &s.access)
    gate_open(d)
    snapshot_quiesce(s)


# ---- guest requests ----

cdef inline bint needs_cbw(const disk *d, uint64_t off, uint64_t n) noexcept nogil:
    cdef uint64_t i
    for i in range(d.nsnaps):
        if snapshot_needs(d.snaps[i], off, n):
            return True
    return False


cdef inline void pin(snapshot *s) noexcept nogil:
    """Keep the snapshot in memory, not open: close() waits only for what is inside it, never for another's target."""
    pthread_mutex_lock(&s.lock)
    s.refs += 1
    pthread_mutex_unlock(&s.lock)


cdef inline void unpin(disk *d, snapshot *s, int64_t held_up) noexcept nogil:
    """`held_up`: ns that the guest write spent here."""
    pthread_mutex_lock(&s.lock)
    if held_up:
        note_wait(&s.stats, held_up)
    if s.break_unreported:
        add_seq_cst(&d.breaks, 1)
    pthread_mutex_unlock(&s.lock)
    snapshot_put(s)


cdef inline int preserve(snapshot **snaps, uint64_t nsnaps, uint64_t off, uint64_t n, uint64_t size,
                         cbw_visit *visits, failure *why) noexcept nogil:
    """Take a guest write past the snapshots, one window of at most a copy run after the other, so that each window's
    old data is read once for all of them (R15). Each snapshot's timeout counts its own waiting only."""
    cdef uint64_t window = 1, unit = 1, end = off + n, stop, i
    cdef cbw_pass p
    cdef int rc = 0
    memset(&p, 0, sizeof(p))
    for i in range(nsnaps):
        unit = most(unit, <uint64_t>1 << snaps[i].shift)
        window = most(window, snaps[i].copy_run)
    window = most(window, unit)
    while off < end and rc == 0:
        stop = least(round_down(off, window) + window, end)
        if nsnaps > 1:
            p.span_start = round_down(off, unit)
            p.span_end = least(round_up(stop, unit), size)
        for i in range(nsnaps):
            rc = snapshot_preserve(snaps[i], off, stop - off, &visits[i], &p)
            if rc < 0:
                break
        old_data_put(p.old)
        p.old = NULL
        off = stop
    why[0] = p.why
    return rc


cdef inline int pass_snapshots(disk *d, slot *own, uint64_t off, uint64_t n, failure *why) noexcept nogil:
    """Leave flight, preserve what the snapshots of now need. The snapshots are pinned before flight is left."""
    cdef snapshot *pinned[MAX_SNAPSHOTS]
    cdef cbw_visit visits[MAX_SNAPSHOTS]
    cdef uint64_t count = d.nsnaps, i
    cdef int rc
    for i in range(count):
        pinned[i] = d.snaps[i]
        pin(pinned[i])
    leave_write(d, own)
    memset(visits, 0, count * sizeof(cbw_visit))
    rc = preserve(pinned, count, off, n, d.io.size, visits, why)
    for i in range(count):
        unpin(d, pinned[i], visits[i].spent)
    return rc


cdef inline void track_writes(disk *d) noexcept nogil:
    """Before the first read-modify-write: drain, and from then on list writes (R13)."""
    gate_shut(d)
    blk_track(&d.io)
    gate_open(d)


cdef inline int submit(disk *d, int op, const void *buf, uint64_t off, uint64_t n, bint fua,
                       bint may_unmap) noexcept nogil:
    cdef int rc
    if op == GUEST_DISCARD:
        rc = blk_discard(&d.io, off, n)
        return 0 if rc == -EOPNOTSUPP else rc
    if op == GUEST_WRITE:
        rc = blk_write(&d.io, &d.bounce, buf, n, off)
    else:
        rc = blk_write_zeroes(&d.io, &d.bounce, off, n, may_unmap, op == GUEST_ZERO_FAST)
    if rc == 0 and fua:
        rc = blk_flush(&d.io)
        return -EIO if rc == -EOPNOTSUPP else rc    # something was written, so it is no refusal
    return rc


cdef inline int finish_write(disk *d, slot *own, int op, const void *buf, uint64_t off, uint64_t n, bint fua,
                             bint may_unmap) noexcept nogil:
    """In flight, where no snapshot needs anything more: record, submit, and leave flight."""
    cdef int rc
    record(d, off, n)
    rc = submit(d, op, buf, off, n, fua, may_unmap)
    add_relaxed(&own.guest_writes, 1)
    add_relaxed(&own.guest_write_bytes, n)
    leave_write(d, own)
    return rc


cdef inline int guest_write(disk *d, int op, const void *buf, uint64_t off, uint64_t n, bint fua, bint may_unmap,
                            failure *why) noexcept nogil:
    """A guest write of n > 0 bytes inside the disk (R1, R5). 0; -errno of the disk; E_CLOSED; or -errno with
    why.error set, where a snapshot's policy refused it: then the disk is unchanged (R9)."""
    cdef slot *own
    cdef int rc
    why.error = 0
    own = enter_write(d)
    if own != NULL and op == GUEST_ZERO_FAST and not blk_zeroes_fast(&d.io, off, n, may_unmap):
        leave_write(d, own)
        return -EOPNOTSUPP          # before anything is copied for it
    while own != NULL and needs_cbw(d, off, n):
        rc = pass_snapshots(d, own, off, n, why)
        if rc < 0:
            return rc
        why.error = 0
        own = enter_write(d)
    if own == NULL:
        return E_CLOSED
    if op != GUEST_DISCARD and blk_needs_tracking(&d.io, off, n):
        leave_write(d, own)
        track_writes(d)
        return guest_write(d, op, buf, off, n, fua, may_unmap, why)
    return finish_write(d, own, op, buf, off, n, fua, may_unmap)


cdef inline int guest_write_at_once(disk *d, const void *buf, uint64_t off, uint64_t n) noexcept nogil:
    """guest_write() of data, if it need wait for no copy and no gate; else E_WAIT, and nothing was done."""
    cdef slot *own = &d.slots[thread_slot()]
    add_seq_cst(&own.writers, 1)
    if (load_seq_cst(&d.gate) or load_relaxed(&d.closed) or needs_cbw(d, off, n)
            or blk_needs_tracking(&d.io, off, n)):
        leave_write(d, own)
        return E_WAIT
    return finish_write(d, own, GUEST_WRITE, buf, off, n, False, False)


cdef inline int guest_read(disk *d, void *buf, uint64_t off, uint64_t n) noexcept nogil:
    cdef slot *own = enter_read(d)
    cdef int rc
    if own == NULL:
        return E_CLOSED
    rc = blk_read(&d.io, &d.bounce, buf, n, off)
    add_relaxed(&own.guest_reads, 1)
    add_relaxed(&own.guest_read_bytes, n)
    leave_read(d, own)
    return rc


cdef inline int guest_read_at_once(disk *d, void *buf, uint64_t off, uint64_t n) noexcept nogil:
    """guest_read() that waits for no storage; else E_WAIT."""
    cdef slot *own = enter_read(d)
    cdef int rc
    if own == NULL:
        return E_CLOSED
    rc = blk_read_cached(&d.io, buf, n, off)
    if rc == 0:
        add_relaxed(&own.guest_reads, 1)
        add_relaxed(&own.guest_read_bytes, n)
    leave_read(d, own)
    return E_WAIT if rc < 0 else 0


cdef inline int guest_cache(disk *d, uint64_t off, uint64_t n) noexcept nogil:
    """Have the kernel read ahead; advice, which O_DIRECT has no use for."""
    cdef slot *own = enter_read(d)
    cdef int rc = 0
    if own == NULL:
        return E_CLOSED
    if n and d.io.align == 1:
        rc = advise_once(d.io.fd, off, n)
    leave_read(d, own)
    return rc


cdef inline int guest_flush(disk *d) noexcept nogil:
    cdef slot *own = enter_read(d)
    cdef int rc
    if own == NULL:
        return E_CLOSED
    rc = blk_flush(&d.io)
    leave_read(d, own)
    return rc


cdef inline int64_t guest_status(disk *d, uint64_t off, uint64_t end, bint *hole) noexcept nogil:
    cdef slot *own = enter_read(d)
    cdef int64_t rc
    if own == NULL:
        return E_CLOSED
    rc = blk_extent(&d.io, off, end, hole)
    leave_read(d, own)
    return rc
