# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Operations on the engine under the deterministic scheduler (scheduler.h), and the oracle that judges them.

Made of the core's ``cdef inline`` parts, compiled with CBWCORE_YIELD. A *case* is a world (its letters, see `SETTINGS`) and a
few operations (see `OPERATIONS`), which run at once on a disk of two clusters, each of two units, a byte value each.
"""

from libc.errno cimport EAGAIN, EIO, ENOSPC, ETIMEDOUT
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memcpy, memset

from cbwcore._sys cimport add_seq_cst, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock
from cbwcore._bitmap cimport bitmap, bitmap_free, bitmap_init, bitmap_next, bitmap_put, bitmap_reset, bitmap_test
from cbwcore._buffers cimport bufpool, bufpool_destroy, bufpool_init, bufpool_reserve
from cbwcore._blockio cimport (
    blk, blk_init, blk_ops, psync_discard, psync_flush, psync_pread, psync_pread_cached, psync_pwrite, psync_seek, psync_zero,
)
from cbwcore._snapshot cimport (
    ARMED, BREAK_GUEST_WRITE, BREAK_SNAPSHOT, BROKEN, E_ACCESS, E_BROKEN, E_CLOSED, E_WAIT, STATUS_ACCESS, STATUS_ZERO,
    failure, snapshot, snapshot_discard, snapshot_init, snapshot_put, snapshot_read, snapshot_read_at_once,
    snapshot_release, snapshot_set_timeout, snapshot_status, wake,
)
from cbwcore._engine cimport (
    GUEST_DISCARD, GUEST_WRITE, GUEST_WRITE_ZEROES, add_sink, arm, disarm, disk, disk_close, disk_init, disk_put, drop_sink,
    gate_open, gate_shut, guest_read, guest_read_at_once, guest_write, guest_write_at_once, slot, switch,
)

cdef extern from * nogil:       # scheduler.h, which _sys.pxd includes
    struct cs_file:
        int open
        int changed
        unsigned char unit[4]
        unsigned char hole[2]
    ctypedef struct cs_run:
        cs_file file[8]
        int64_t clock
        int blocks
        int readers
        int fail_read
        int fail_write
        int fail_disk
        int failed_by
        int cold
    ctypedef struct cs_told:
        uint64_t states
        uint64_t steps
        uint64_t schedules
        int depth
        char path[2000]
    cs_run cs
    cs_told cs_report
    char cs_text[400]
    int cs_cur
    int CBW_SLOTS
    int CS_STEP
    void (*cs_on_store)(void *p, uint64_t value) noexcept nogil
    void cs_reset()
    void cs_operation(void *(*run)(void *) noexcept nogil, void *arg)
    void cs_ready(void *(*finish)(void *) noexcept nogil, void *arg)
    int cs_explore(uint64_t most_states)
    int cs_walk(uint64_t seed)
    int cs_replay(const char *path, void (*tell)(int task, const char *where, const char *what) noexcept)
    void cs_point(int kind, void *object, const char *where, const char *what)
    void cs_watch(void *p, uint64_t n, int guarded)
    void cs_dull(void *p, uint64_t n)
    void cs_mutex_soft(pthread_mutex_t *m)
    void cs_fail(const char *format, ...)

cdef enum:
    SHIFT = 6
    CLUSTER = 64
    UNIT = 32
    UNITS = 4
    SIZE = 128
    MOST_OPS = 6
    MOST_SIDES = 6

cdef enum:
    OP_WRITE
    OP_WRITE_AT_ONCE
    OP_ZERO
    OP_DISCARD
    OP_TWO_DISKS
    OP_GUEST_READ
    OP_GUEST_READ_AT_ONCE
    OP_READ
    OP_READ_AT_ONCE
    OP_STATUS
    OP_GIVE_UP
    OP_CLOCK
    OP_FAIL_WRITE
    OP_FAIL_READ
    OP_FAIL_DISK
    OP_POLICY
    OP_CLOSE
    OP_CLOSE_DISK
    OP_ARM
    OP_GROUP
    OP_FREEZE
    OP_FREEZE_MERGE
    OP_JOB

# name: (kind, disk or snapshot, first unit, end unit)
OPERATIONS = {
    "w0": (OP_WRITE, 0, 0, 2), "w1": (OP_WRITE, 0, 2, 4), "w": (OP_WRITE, 0, 0, 4), "p0": (OP_WRITE, 0, 1, 2),
    "p": (OP_WRITE, 0, 1, 3), "W0": (OP_WRITE, 1, 0, 2),
    "wa0": (OP_WRITE_AT_ONCE, 0, 0, 2), "wa": (OP_WRITE_AT_ONCE, 0, 0, 4),
    "z0": (OP_ZERO, 0, 0, 2), "z": (OP_ZERO, 0, 0, 4), "d0": (OP_DISCARD, 0, 0, 2), "d1": (OP_DISCARD, 0, 2, 4),
    "v": (OP_TWO_DISKS, 0, 0, 2),
    "n": (OP_GUEST_READ, 0, 0, 4), "na": (OP_GUEST_READ_AT_ONCE, 0, 0, 4),
    "r0": (OP_READ, 0, 0, 2), "r": (OP_READ, 0, 0, 4), "R": (OP_READ, 1, 0, 4), "s": (OP_STATUS, 0, 0, 4),
    "ra0": (OP_READ_AT_ONCE, 0, 0, 2), "ra": (OP_READ_AT_ONCE, 0, 0, 4),
    "x0": (OP_GIVE_UP, 0, 0, 2), "x": (OP_GIVE_UP, 0, 0, 4),
    "t": (OP_CLOCK, 0, 0, 0), "fw": (OP_FAIL_WRITE, 0, 0, 0), "fr": (OP_FAIL_READ, 0, 0, 0), "fd": (OP_FAIL_DISK, 0, 0, 0),
    "b": (OP_POLICY, 0, 0, 0), "c": (OP_CLOSE, 0, 0, 0), "C": (OP_CLOSE_DISK, 0, 0, 0), "a": (OP_ARM, 0, 0, 4),
    "g": (OP_GROUP, 0, 0, 4), "f": (OP_FREEZE, 0, 0, 4), "F": (OP_FREEZE_MERGE, 0, 0, 4), "j": (OP_JOB, 0, 0, 4),
}
SETTINGS = {
    "G": "break-guest-write", "S": "break-snapshot", "0": "no snapshot at first", "1": "one", "2": "two",
    "t": "cbw_timeout, and so helper threads", "h": "cluster 1 is a hole", "o": "targets that are not new",
    "q": "copies of one cluster, one at a time", "k": "cluster 1 is not in the page cache",
    "m": "the copy budget is one buffer beside the reserves",
}
ARMED_BY = {OP_ARM: 1, OP_GROUP: 2, OP_FREEZE: 1, OP_FREEZE_MERGE: 1}       # how many snapshots


cdef struct op:
    int kind
    int which           # disk, or side
    uint64_t first      # units
    uint64_t end
    unsigned char value
    int ended
    int after           # operations that had ended when this began, a bit each
    int rc[2]           # per disk
    bint refused[2]     # by a snapshot's policy
    unsigned char got[4]


cdef struct side:       # a snapshot
    snapshot *s         # as long as it may be looked at by the oracle
    snapshot *handle    # NULL from close on: SnapshotCore.s
    pthread_mutex_t closing
    int disk
    int group
    bint known          # T0 has been, and is `t0`
    unsigned char t0[4]
    bint broken         # found when it was closed


cdef struct world:
    disk *d[2]
    int ndisks
    bint closed[2]
    pthread_mutex_t gil
    pthread_mutex_t admin[2]
    side sides[MOST_SIDES]
    int nsides
    bufpool pool
    bitmap recording
    bitmap successor
    bint frozen
    bint settled
    bint merged
    int changed_at_t0   # clusters of disk 0
    bint bits_at_t0[2]
    op ops[MOST_OPS]
    int nops
    int has             # kinds of operations, a bit each
    int policy
    int64_t timeout
    bint old_target
    uint64_t copy_run
    uint64_t max_copies
    int blocks


cdef world *W
cdef blk_ops PSYNC
PSYNC.pread = psync_pread
PSYNC.pread_cached = psync_pread_cached
PSYNC.pwrite = psync_pwrite
PSYNC.zero = psync_zero
PSYNC.discard = psync_discard
PSYNC.flush = psync_flush
PSYNC.seek = psync_seek
PSYNC.keeps_deadline = False
cdef unsigned char DATA[256][SIZE]      # what writers write


cdef bint has(int kind) noexcept nogil:
    return (W.has >> kind) & 1


cdef void attach(blk *b, int fd) noexcept nogil:
    b.engine = b.ops = &PSYNC
    b.fd = fd
    b.tail_fd = -1
    b.size = b.direct_end = SIZE
    b.align = b.mem_align = b.zero_align = 1
    cs.file[fd].open = 1


# ---- what the Python classes do around the core, in the same order; `gil` stands for the GIL ----

cdef snapshot *open_side(side *x) noexcept nogil:
    """SnapshotCore.open()"""
    cdef snapshot *s
    pthread_mutex_lock(&W.gil)
    s = x.handle
    if s != NULL:
        pthread_mutex_lock(&s.lock)
        s.users += 1
        pthread_mutex_unlock(&s.lock)
    pthread_mutex_unlock(&W.gil)
    return s


cdef void done_with(snapshot *s) noexcept nogil:
    pthread_mutex_lock(&s.lock)
    s.users -= 1
    wake(s)
    pthread_mutex_unlock(&s.lock)


cdef void close_side(int i) noexcept nogil:
    """Snapshot._shut(), SnapshotCore.release()"""
    cdef side *x = &W.sides[i]
    cdef snapshot *s
    if W.closed[x.disk]:
        return
    pthread_mutex_lock(&x.closing)
    pthread_mutex_lock(&W.gil)
    s = x.handle
    x.handle = NULL
    pthread_mutex_unlock(&W.gil)
    if s != NULL:
        disarm(W.d[x.disk], s)
        x.broken = s.cause.error != 0
        if s.users or s.copies.count or s.frozen.count or s.target_reads.count:
            cs_fail("somebody is inside a closed snapshot")
        snapshot_release(s)
        x.s = NULL
        snapshot_put(s)
        disk_put(W.d[x.disk])
    pthread_mutex_unlock(&x.closing)


cdef void close_disk(int i) noexcept nogil:
    """Disk.close()"""
    cdef int k
    pthread_mutex_lock(&W.admin[i])
    if not W.closed[i]:
        for k in range(W.nsides):
            if W.sides[k].disk == i:
                close_side(k)
        disk_close(W.d[i])
        W.closed[i] = True
    pthread_mutex_unlock(&W.admin[i])


cdef int make_snapshot(int i) noexcept nogil:
    """_prepare(). -errno where there is no buffer for its reserve, or no thread for its copies; then there is no snapshot."""
    cdef int rc
    cdef side *x = &W.sides[i]
    cdef snapshot *s = <snapshot *>calloc(1, sizeof(snapshot))
    cdef disk *d = W.d[x.disk]
    snapshot_init(s, &d.io, &W.pool, &d.clock_skew, SIZE, SHIFT, False)
    blk_init(&s.target)
    attach(&s.target, 2 + i)
    if W.old_target:
        memset(cs.file[2 + i].unit, 0x99, UNITS)
        memset(cs.file[2 + i].hole, 0, 2)
    else:
        memset(cs.file[2 + i].hole, 1, 2)
    s.look_for_holes = 1
    s.target_is_new = not W.old_target
    s.policy = W.policy
    s.target_limit = <uint64_t>1 << 62
    s.max_copies = W.max_copies
    s.copy_run = W.copy_run
    rc = bufpool_reserve(&W.pool, &s.own, SIZE)
    if rc == 0:
        rc = snapshot_set_timeout(s, W.timeout)
    if rc < 0:
        snapshot_release(s)
        snapshot_put(s)
        return rc
    add_seq_cst(&d.refs, 1)
    cs_watch(&s.state, sizeof(s.state), True)
    cs_watch(s.need.words, 8, True)
    cs_dull(&s.stats, sizeof(s.stats))
    x.s = x.handle = s
    return 0


cdef void forget_side(int i) noexcept nogil:
    """It was not armed after all: SnapshotCore.release()"""
    cdef side *x = &W.sides[i]
    if x.s == NULL:
        return
    snapshot_release(x.s)
    snapshot_put(x.s)
    disk_put(W.d[x.disk])
    x.s = x.handle = NULL


cdef int take(int first, int count, bint freeze) noexcept nogil:
    """take_snapshots()"""
    cdef disk *disks[2]
    cdef disk *owners[2]
    cdef snapshot *snaps[2]
    cdef switch switches[2]
    cdef int i, rc = 0
    for i in range(count):
        pthread_mutex_lock(&W.admin[i])
    for i in range(count):
        if W.closed[i]:
            rc = E_CLOSED
    for i in range(count):
        if rc == 0:
            rc = make_snapshot(first + i)
            disks[i] = owners[i] = W.d[i]
            snaps[i] = W.sides[first + i].s
    if rc < 0:
        for i in range(count):
            forget_side(first + i)
    else:
        if freeze:
            bitmap_init(&W.successor, 2, False)
            cs_watch(W.successor.words, 8, False)
            W.frozen = True
            switches[0].d = switches[1].d = W.d[0]
            switches[0].map = &W.successor
            switches[1].map = &W.recording
            switches[0].shift = switches[1].shift = SHIFT
            switches[0].starts = True
            switches[1].starts = False
        rc = arm(disks, count, snaps, owners, count, switches, 2 if freeze else 0)
    for i in range(count):
        pthread_mutex_unlock(&W.admin[count - 1 - i])
    return rc


cdef void at_store(void *p, uint64_t value) noexcept nogil:
    """T0 is the moment at which the first snapshot of a group becomes ARMED: all the gates are shut, and nobody writes."""
    cdef int i, k
    if value != ARMED:
        return
    for i in range(W.nsides):
        if W.sides[i].s == NULL or <void *>&W.sides[i].s.state != p or W.sides[i].known:
            continue
        for k in range(W.nsides):
            if k == i or (W.sides[k].group and W.sides[k].group == W.sides[i].group):
                W.sides[k].known = True
                memcpy(W.sides[k].t0, cs.file[W.sides[k].disk].unit, UNITS)
        if W.frozen and not W.changed_at_t0:
            W.changed_at_t0 = cs.file[0].changed | 4
            cs.file[0].changed = 0
            W.bits_at_t0[0] = bitmap_test(&W.recording, 0)
            W.bits_at_t0[1] = bitmap_test(&W.recording, 1)


# ---- the oracle ----

cdef void check_data(const side *x, const unsigned char *data, uint64_t off, uint64_t n, const char *who) noexcept nogil:
    cdef uint64_t u, i
    if not x.known:
        cs_fail("%s reads a snapshot before its T0", who)
    for u in range(off // UNIT, (off + n) // UNIT):
        for i in range(UNIT):
            if data[u * UNIT - off + i] != x.t0[u]:
                cs_fail("%s: unit %d of the snapshot reads %#x, and not %#x as at T0", who, <int>u, <int>data[u * UNIT - off + i],
                        <int>x.t0[u])
                return


cdef bint may_break() noexcept nogil:
    return ((W.policy == BREAK_SNAPSHOT or has(OP_POLICY))
            and (has(OP_FAIL_READ) or has(OP_FAIL_WRITE) or (has(OP_CLOCK) and W.timeout)))


cdef int check_refusal(int rc, const char *who) noexcept nogil:
    """Of a request to a snapshot."""
    if rc == E_CLOSED and (has(OP_CLOSE) or has(OP_CLOSE_DISK)):
        return rc
    if rc == E_BROKEN and may_break():
        return rc
    if rc == E_ACCESS and (has(OP_GIVE_UP) or has(OP_JOB)):
        return rc
    cs_fail("%s gets %d", who, rc)
    return rc


cdef int read_side(int i, uint64_t off, uint64_t n, const char *who, bint at_once=False) noexcept nogil:
    cdef unsigned char data[SIZE]
    cdef side *x = &W.sides[i]
    cdef snapshot *s = open_side(x)
    cdef bint in_target = False
    cdef int rc
    if s == NULL:
        return check_refusal(E_CLOSED, who)
    memset(data, 0xee, SIZE)
    if at_once:
        rc = snapshot_read_at_once(s, <char *>data, n, off, &in_target)
    else:
        rc = snapshot_read(s, <char *>data, n, off, &in_target)
    done_with(s)
    if at_once and rc == E_WAIT:
        return rc
    if rc < 0:
        return check_refusal(rc, who)
    check_data(x, data, off, n, who)
    return 0


cdef int look_at_status(int i, const char *who) noexcept nogil:
    cdef side *x = &W.sides[i]
    cdef snapshot *s
    cdef uint64_t off = 0, u
    cdef int64_t rc
    cdef int flags = 0
    while off < SIZE:
        s = open_side(x)
        if s == NULL:
            return check_refusal(E_CLOSED, who)
        rc = snapshot_status(s, off, SIZE, &flags)
        done_with(s)
        if rc < 0:
            return check_refusal(<int>rc, who)
        if rc <= <int64_t>off or rc > SIZE:
            cs_fail("%s: an extent from %d ends at %d", who, <int>off, <int>rc)
            return 0
        if not flags & STATUS_ACCESS:
            check_refusal(E_ACCESS, who)
        elif flags & STATUS_ZERO:
            for u in range(off // UNIT, (<uint64_t>rc + UNIT - 1) // UNIT):
                if x.t0[u]:
                    cs_fail("%s: unit %d of the snapshot is called zero, and was %#x at T0", who, <int>u, <int>x.t0[u])
        off = <uint64_t>rc
    return 0


cdef int guest(op *o, int disk_index, int kind) noexcept nogil:
    """A guest write, and whether it may fail as it does."""
    cdef failure why
    cdef int rc = guest_write(W.d[disk_index], kind, DATA[o.value], o.first * UNIT, (o.end - o.first) * UNIT, False, True, &why)
    o.rc[disk_index] = rc
    o.refused[disk_index] = rc < 0 and rc != E_CLOSED and why.error != 0
    if rc == 0 or (rc == E_CLOSED and has(OP_CLOSE_DISK)):
        return rc
    if rc == -ETIMEDOUT and why.error and has(OP_CLOCK) and W.timeout:
        pass
    elif rc == -EIO and why.error and not W.timeout and (cs.failed_by >> cs_cur) & 1:
        pass                                    # R3: a copy of its own
    elif rc == -EIO and why.error and W.timeout and cs.failed_by:
        pass                                    # by a helper of its
    elif rc == -EIO and not why.error and (cs.failed_by >> cs_cur) & 1 and has(OP_FAIL_DISK):
        pass
    else:
        cs_fail("a guest write gets %d (%d)", rc, why.error)
    if why.error and W.policy == BREAK_SNAPSHOT:
        cs_fail("a guest write is refused under break-snapshot: %d", rc)
    return rc


cdef int guest_at_once(op *o) noexcept nogil:
    """A guest write that is to wait for nothing: where it says that it would, it has done nothing."""
    cdef int rc = guest_write_at_once(W.d[0], DATA[o.value], o.first * UNIT, (o.end - o.first) * UNIT)
    o.rc[0] = rc
    o.refused[0] = rc == E_WAIT
    if rc == E_WAIT and W.nsides == 0 and not has(OP_CLOSE_DISK):
        cs_fail("a guest write at once would wait, and there is nothing to wait for")
    elif rc < 0 and rc != E_WAIT and not (rc == -EIO and (cs.failed_by >> cs_cur) & 1 and has(OP_FAIL_DISK)):
        cs_fail("a guest write at once gets %d", rc)
    return rc


cdef void check_disk(int k) noexcept nogil:
    """Each unit has what the last write left; a refused one left nothing."""
    cdef int i, j
    cdef uint64_t u
    cdef op *o
    cdef bint found, first_value, superseded
    for u in range(UNITS):
        found = False
        first_value = True
        for i in range(W.nops):
            o = &W.ops[i]
            if not writes(o, k, u) or o.refused[k] or o.rc[k] == E_CLOSED:
                continue
            if o.rc[k] == 0:
                first_value = False
            superseded = False
            for j in range(W.nops):
                if writes(&W.ops[j], k, u) and W.ops[j].rc[k] == 0 and (W.ops[j].after >> i) & 1:
                    superseded = True
            if not superseded and cs.file[k].unit[u] == o.value:
                found = True
        if first_value and cs.file[k].unit[u] == initial(k, u):
            found = True
        if not found:
            cs_fail("unit %d of disk %d has %#x in the end: a write is lost, or one was refused and done", <int>u, k,
                    <int>cs.file[k].unit[u])


cdef bint writes(const op *o, int k, uint64_t u) noexcept nogil:
    if o.kind == OP_TWO_DISKS:
        return o.first <= u < o.end
    return o.kind <= OP_DISCARD and o.which == k and o.first <= u < o.end


cdef bint HOLE = False


cdef unsigned char initial(int k, uint64_t u) noexcept nogil:
    return 0 if HOLE and u >= 2 else <unsigned char>(0xa0 + 4 * k + u)


cdef int read_disk(int k, bint at_once) noexcept nogil:
    """Each unit has what it had at first, or what somebody writes."""
    cdef unsigned char data[SIZE]
    cdef int rc, i
    cdef uint64_t u
    cdef bint found
    memset(data, 0xee, SIZE)
    rc = guest_read_at_once(W.d[k], data, 0, SIZE) if at_once else guest_read(W.d[k], data, 0, SIZE)
    if rc == E_WAIT and at_once:
        return rc
    if rc < 0:
        if rc != E_CLOSED or not has(OP_CLOSE_DISK):
            cs_fail("a guest read gets %d", rc)
        return rc
    for u in range(UNITS):
        found = data[u * UNIT] == initial(k, u)
        for i in range(W.nops):
            found = found or (writes(&W.ops[i], k, u) and data[u * UNIT] == W.ops[i].value)
        if not found:
            cs_fail("a guest reads %#x", <int>data[u * UNIT])
    return 0


cdef void check_target(const snapshot *s) noexcept nogil:
    """An armed snapshot at rest has paid for what its target holds, and holds nothing that was given up."""
    cdef uint64_t c, used = 0
    for c in range(2):
        if bitmap_test(&s.done, c) and not bitmap_test(&s.zero, c):
            used += CLUSTER
        if bitmap_test(&s.done, c) and not bitmap_test(&s.access, c):
            cs_fail("cluster %d was given up, and is in the target", <int>c)
    if used < s.target_used and has(OP_FAIL_WRITE) and (has(OP_GIVE_UP) or has(OP_JOB)):
        return              # the target's discard has failed: the space stays taken, and counted
    if used != s.target_used:
        cs_fail("%d bytes of the target count as used, and %d are", <int>s.target_used, <int>used)


cdef void check_bitmaps() noexcept nogil:
    """Every write is in the bitmap; a frozen one has those before T0, its successor those after it."""
    cdef int c, changed, before
    cdef const bitmap *now = &W.successor if W.frozen and W.changed_at_t0 and not W.settled else &W.recording
    for c in range(2):
        changed = (cs.file[0].changed >> c) & 1
        before = (W.changed_at_t0 >> c) & 1
        if before and not W.bits_at_t0[c]:
            cs_fail("the bitmap misses a write before T0 into cluster %d", c)
        if (changed or (before and W.merged)) and not bitmap_test(now, c):
            cs_fail("the bitmap misses a write into cluster %d", c)


# ---- operations ----

cdef int settle(bint merge) noexcept nogil:
    """Freeze.commit(), or merge(). From here on `recording` is to have what was written after T0, or all of it."""
    cdef uint64_t c
    pthread_mutex_lock(&W.admin[0])
    for c in range(2):
        if bitmap_test(&W.recording, c) != W.bits_at_t0[c]:
            cs_fail("the frozen bitmap changed after T0, cluster %d", <int>c)
    if not merge:
        bitmap_reset(&W.recording)
    if not W.closed[0]:
        gate_shut(W.d[0])
        add_sink(W.d[0], &W.recording, SHIFT)
        gate_open(W.d[0])
    for c in range(2):                          # merge_bits()
        if bitmap_next(&W.successor, c, c + 1, True) == c:
            bitmap_put(&W.recording, c, c + 1, True)
    gate_shut(W.d[0])
    drop_sink(W.d[0], &W.successor)
    gate_open(W.d[0])
    W.settled = True
    W.merged = merge
    pthread_mutex_unlock(&W.admin[0])
    return 0


cdef int copy_all(int i) noexcept nogil:
    """BackupJob._copy() of each cluster in turn: read, store, give up."""
    cdef unsigned char data[CLUSTER]
    cdef side *x = &W.sides[i]
    cdef snapshot *s
    cdef bint in_target = False
    cdef uint64_t c
    cdef int rc
    for c in range(2):
        s = open_side(x)
        if s == NULL:
            return check_refusal(E_CLOSED, "a job")
        memset(data, 0xee, CLUSTER)
        rc = snapshot_read(s, <char *>data, CLUSTER, c * CLUSTER, &in_target)
        done_with(s)
        if rc < 0:
            return check_refusal(rc, "a job")
        check_data(x, data, c * CLUSTER, CLUSTER, "a job")
        rc = give_up(i, c * CLUSTER, CLUSTER)
        if rc < 0:
            return rc
    return 0


cdef int give_up(int i, uint64_t off, uint64_t n) noexcept nogil:
    cdef snapshot *s = open_side(&W.sides[i])
    cdef int rc
    if s == NULL:
        return check_refusal(E_CLOSED, "a discard")
    rc = snapshot_discard(s, off, n)
    done_with(s)
    if rc < 0 and not (rc == -EIO and (cs.failed_by >> cs_cur) & 1):
        return check_refusal(rc, "a discard")
    return rc


cdef int set_policy(int i) noexcept nogil:
    cdef snapshot *s = open_side(&W.sides[i])
    if s == NULL:
        return check_refusal(E_CLOSED, "set_policy")
    pthread_mutex_lock(&s.lock)
    s.policy = BREAK_SNAPSHOT
    pthread_mutex_unlock(&s.lock)
    done_with(s)
    return 0


cdef int arm_and_read(op *o) noexcept nogil:
    cdef int count = 2 if o.kind == OP_GROUP else 1, i
    cdef bint freeze = o.kind == OP_FREEZE or o.kind == OP_FREEZE_MERGE
    cdef int rc = take(o.which, count, freeze)
    if rc == -ENOSPC or rc == -EAGAIN:
        return rc           # ConfigError; OSError
    if rc < 0:
        return check_refusal(rc, "arming")
    for i in range(count):
        read_side(o.which + i, 0, SIZE, "who armed")
    if freeze:
        settle(o.kind == OP_FREEZE_MERGE)
    return 0


cdef int do(op *o) noexcept nogil:
    if o.kind == OP_WRITE:
        return guest(o, o.which, GUEST_WRITE)
    if o.kind == OP_WRITE_AT_ONCE:
        return guest_at_once(o)
    if o.kind == OP_ZERO:
        return guest(o, o.which, GUEST_WRITE_ZEROES)
    if o.kind == OP_DISCARD:
        return guest(o, o.which, GUEST_DISCARD)
    if o.kind == OP_TWO_DISKS:
        guest(o, 0, GUEST_WRITE)
        return guest(o, 1, GUEST_WRITE)
    if o.kind == OP_GUEST_READ:
        return read_disk(o.which, False)
    if o.kind == OP_GUEST_READ_AT_ONCE:
        return read_disk(o.which, True)
    if o.kind == OP_READ:
        return read_side(o.which, o.first * UNIT, (o.end - o.first) * UNIT, "a read")
    if o.kind == OP_READ_AT_ONCE:
        return read_side(o.which, o.first * UNIT, (o.end - o.first) * UNIT, "a read at once", True)
    if o.kind == OP_STATUS:
        return look_at_status(o.which, "block status")
    if o.kind == OP_GIVE_UP:
        return give_up(o.which, o.first * UNIT, (o.end - o.first) * UNIT)
    if o.kind == OP_POLICY:
        return set_policy(0)
    if o.kind == OP_CLOSE:
        close_side(o.which)
    elif o.kind == OP_CLOSE_DISK:
        close_disk(0)
    elif o.kind == OP_JOB:
        return copy_all(0)
    elif o.kind >= OP_ARM:
        return arm_and_read(o)
    elif o.kind == OP_CLOCK:
        cs.clock += 1000000
    elif o.kind == OP_FAIL_WRITE:
        cs.fail_write = 1
    elif o.kind == OP_FAIL_READ:
        cs.fail_read = 1
    elif o.kind == OP_FAIL_DISK:
        cs.fail_disk = 1
    return 0


cdef void *run_op(void *arg) noexcept nogil:
    cdef op *o = <op *>arg
    cdef int i
    for i in range(W.nops):
        o.after |= W.ops[i].ended << i
    do(o)
    o.ended = 1
    return NULL


cdef void *finish(void *arg) noexcept nogil:
    """All operations have ended: judge what is left, close everything, and see that nothing is left then."""
    cdef int i, k
    cdef op late
    cdef unsigned char before[2][4]
    cs.readers = -1
    cs.fail_read = cs.fail_write = cs.fail_disk = 0
    for k in range(W.ndisks):
        check_disk(k)
        memcpy(before[k], cs.file[k].unit, UNITS)
    check_bitmaps()
    for i in range(W.nsides):
        if W.sides[i].handle == NULL:
            continue
        if W.sides[i].s.state == BROKEN and not may_break():
            cs_fail("the snapshot is broken")
        if W.sides[i].s.state == ARMED:
            check_target(W.sides[i].s)
            if W.sides[i].s.cause.error:
                cs_fail("the snapshot has a cause, and is not broken")
        if W.sides[i].s.state == ARMED and not (has(OP_GIVE_UP) or has(OP_JOB)):
            if read_side(i, 0, SIZE, "a read in the end") < 0:
                cs_fail("the snapshot cannot be read in the end")
        else:
            read_side(i, 0, CLUSTER, "a read in the end")
            read_side(i, CLUSTER, CLUSTER, "a read in the end")
        look_at_status(i, "block status in the end")
    W.has |= 1 << OP_CLOSE_DISK
    for k in range(W.ndisks):
        close_disk(k)
        memset(&late, 0, sizeof(late))
        late.end = UNITS
        late.value = 0x77
        if guest(&late, k, GUEST_WRITE) != E_CLOSED:
            cs_fail("a write after close is not refused")
        if guest_write_at_once(W.d[k], DATA[late.value], 0, SIZE) != E_WAIT:
            cs_fail("a write at once after close is not refused")
        for i in range(UNITS):
            if cs.file[k].unit[i] != before[k][i]:
                cs_fail("the disk changed at close")
        disk_put(W.d[k])
    if W.pool.used or W.pool.reserve_used or W.pool.reserved:
        cs_fail("copy buffers are left: %d, of reserves %d, reserved %d", <int>W.pool.used, <int>W.pool.reserve_used,
                <int>W.pool.reserved)
    bufpool_destroy(&W.pool)
    bitmap_free(&W.recording)
    if W.frozen:
        bitmap_free(&W.successor)
    if cs.blocks != W.blocks:
        cs_fail("%d pieces of memory are left", cs.blocks - W.blocks)
    for i in range(8):
        if cs.file[i].open:
            cs_fail("file %d is left open", i)
    return NULL


# ---- a case ----

cdef void set_up(str letters, list names) except *:
    """The world, and its operations, ready to run."""
    global W, HOLE
    cdef int i, k
    cdef op *o
    unknown = [x for x in letters if x not in SETTINGS] + [x for x in names if x not in OPERATIONS]
    if unknown or not 0 < len(names) <= MOST_OPS:
        raise ValueError(f"no case: {letters}:{','.join(names)}")
    cs_reset()
    W = <world *>calloc(1, sizeof(world))
    W.blocks = cs.blocks
    set_hook()
    HOLE = "h" in letters
    cs.cold = 2 if "k" in letters else 0
    W.policy = BREAK_SNAPSHOT if "S" in letters else BREAK_GUEST_WRITE
    W.timeout = 1000 if "t" in letters else 0
    W.old_target = "o" in letters
    W.copy_run = CLUSTER if "q" in letters else SIZE
    W.max_copies = 1 if "q" in letters else 64
    W.ndisks = 2 if {"g", "v", "W0"} & set(names) else 1
    # a buffer of the core's smallest size for each snapshot's reserve, and one or many for all
    reserves = 2 if "2" in letters else 0 if "0" in letters else 1
    for name in names:
        reserves += ARMED_BY.get(OPERATIONS[name][0], 0)
    bufpool_init(&W.pool, 4096 * (reserves + 1) if "m" in letters else 1 << 20, 0)
    cs_mutex_soft(&W.gil)
    for k in range(W.ndisks):
        cs_mutex_soft(&W.admin[k])
        W.d[k] = <disk *>calloc(1, sizeof(disk))
        disk_init(W.d[k])
        blk_init(&W.d[k].io)
        attach(&W.d[k].io, k)
        W.d[k].closed = 0
        for i in range(UNITS):
            cs.file[k].unit[i] = initial(k, i)
        cs.file[k].hole[1] = HOLE
        cs_watch(&W.d[k].gate, 8, True)
        cs_watch(&W.d[k].closed, 8, False)
        cs_watch(W.d[k].slots, CBW_SLOTS * sizeof(slot), False)
        cs_dull(&W.d[k].breaks, sizeof(W.d[k].breaks))
    bitmap_init(&W.recording, 2, False)
    cs_watch(W.recording.words, 8, False)
    add_sink(W.d[0], &W.recording, SHIFT)
    W.nops = len(names)
    for i, name in enumerate(names):
        o = &W.ops[i]
        o.kind, o.which, o.first, o.end = OPERATIONS[name]
        o.value = 0x10 + i if o.kind in (OP_WRITE, OP_WRITE_AT_ONCE, OP_TWO_DISKS) else 0
        W.has |= 1 << o.kind
        if o.kind > OP_TWO_DISKS:
            # what these read is no copy's
            cs.readers |= 1 << (i + 1)
    for i in range(2 if "2" in letters else 0 if "0" in letters else 1):
        cs_mutex_soft(&W.sides[W.nsides].closing)
        W.nsides += 1
        take(i, 1, False)
    for i in range(W.nops):
        o = &W.ops[i]
        if o.kind < OP_ARM or o.kind > OP_FREEZE_MERGE:
            continue
        o.which = W.nsides
        for k in range(ARMED_BY[o.kind]):
            cs_mutex_soft(&W.sides[W.nsides].closing)
            W.sides[W.nsides].disk = k
            W.sides[W.nsides].group = i + 1
            W.nsides += 1
    for i in range(W.nops):
        cs_operation(run_op, &W.ops[i])
    cs_ready(finish, NULL)


cdef void set_hook() noexcept nogil:
    global cs_on_store
    cs_on_store = at_store


cdef object verdict(int rc):
    return {
        "status": ("ok", "violation", "limit", "bad schedule")[rc], "text": cs_text.decode(), "states": cs_report.states,
        "steps": cs_report.steps, "schedules": cs_report.schedules, "path": cs_report.path[:cs_report.depth].decode(),
    }


def explore(str letters, list names, uint64_t most_states=50_000_000):
    """Every state that any interleaving of the operations reaches."""
    cdef int rc
    set_up(letters, names)
    with nogil:
        rc = cs_explore(most_states)
    return verdict(rc)


def walk(str letters, list names, uint64_t seed, uint64_t count=1):
    """`count` interleavings at random, of `seed` and the numbers that follow; the last one is told of."""
    cdef int rc = 0
    cdef uint64_t i
    set_up(letters, names)
    with nogil:
        for i in range(count):
            rc = cs_walk(seed + i)
            if rc:
                break
    return verdict(rc)


cdef list TRACE = []


cdef void tell(int task, const char *where, const char *what) noexcept with gil:
    TRACE.append((task, where.decode(), what.decode()))


def replay(str letters, list names, str path):
    """The interleaving that a path tells of; also its steps, as (task, function, what it is about to do)."""
    set_up(letters, names)
    TRACE.clear()
    rc = cs_replay(path.encode(), tell)
    return verdict(rc), list(TRACE)


cdef void fill() noexcept:
    cdef int v
    for v in range(256):
        memset(DATA[v], v, SIZE)


fill()
