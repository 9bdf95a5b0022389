# The fault-injecting I/O engine, for tests: it sits in the operations table before psync (or any other engine)
# and fails, shortens, delays or stalls the calls that its plan names. It also counts and logs every call,
# so that a test can say what was read and written, and how often.

from libc.errno cimport EAGAIN
from libc.stdint cimport int64_t, uint64_t
from cbwcore._sys cimport (
    cond_init, pthread_cond_broadcast, pthread_cond_t, pthread_cond_wait, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, sleep_ns,
)
from cbwcore._geometry cimport least
from cbwcore._blockio cimport blk, blk_ops

cdef enum:
    OP_READ
    OP_WRITE
    OP_ZERO
    OP_DISCARD
    OP_FLUSH
    OP_SEEK
    OPS

cdef enum:
    ACT_ERROR       # fail with errno `value`
    ACT_SHORT       # transfer at most `value` bytes
    ACT_DELAY       # sleep `value` ns first
    ACT_STALL       # wait for plan_release() first

cdef enum:
    MAX_RULES = 64
    LOG_LENGTH = 65536


cdef struct fault_rule:
    int op
    int action
    int64_t value
    uint64_t start      # bytes; calls that touch [start, end) match
    uint64_t end
    uint64_t skip       # matching calls to let through first
    uint64_t times      # matching calls to hit after that


cdef struct fault_call:
    uint64_t op
    uint64_t off
    uint64_t n


cdef struct fault_plan:
    pthread_mutex_t lock        # guards all below; never held across I/O
    pthread_cond_t changed
    const blk_ops *inner
    uint64_t nrules
    fault_rule rules[MAX_RULES]
    uint64_t stalled            # calls waiting now
    uint64_t releases           # plan_release() calls so far
    uint64_t ncalls             # calls seen; the last LOG_LENGTH are in `log`
    fault_call log[LOG_LENGTH]


cdef inline int plan_init(fault_plan *p, const blk_ops *inner) noexcept nogil:
    p.inner = inner
    pthread_mutex_init(&p.lock, NULL)
    return cond_init(&p.changed)


cdef inline void plan_release(fault_plan *p) noexcept nogil:
    """Forget every rule and let the stalled calls go on."""
    pthread_mutex_lock(&p.lock)
    p.nrules = 0
    p.releases += 1
    pthread_cond_broadcast(&p.changed)
    pthread_mutex_unlock(&p.lock)


cdef inline bint rule_hits(fault_rule *r, int op, uint64_t off, uint64_t n) noexcept nogil:
    if r.op != op or r.times == 0:
        return False
    if op < OP_FLUSH and (off >= r.end or off + n <= r.start):
        return False
    if r.skip:
        r.skip -= 1
        return False
    r.times -= 1
    return True


cdef inline int64_t plan_apply(fault_plan *p, int op, uint64_t off, uint64_t *n) noexcept nogil:
    """Log the call and apply the rules that hit it, in order. 0, or the -errno that the call is to return."""
    cdef uint64_t i, seen
    cdef int64_t delay = 0, rc = 0
    cdef fault_rule *r
    cdef fault_call *call
    pthread_mutex_lock(&p.lock)
    call = &p.log[p.ncalls % LOG_LENGTH]
    call.op = <uint64_t>op
    call.off = off
    call.n = n[0]
    p.ncalls += 1
    for i in range(p.nrules):
        r = &p.rules[i]
        if rc or not rule_hits(r, op, off, n[0]):
            continue
        if r.action == ACT_ERROR:
            rc = -r.value
        elif r.action == ACT_SHORT:
            n[0] = least(n[0], <uint64_t>r.value)
        elif r.action == ACT_DELAY:
            delay += r.value
        else:
            seen = p.releases
            p.stalled += 1
            pthread_cond_broadcast(&p.changed)
            while p.releases == seen:
                pthread_cond_wait(&p.changed, &p.lock)
            p.stalled -= 1
            break
    pthread_mutex_unlock(&p.lock)
    if delay:
        sleep_ns(delay)
    return rc


cdef inline int64_t faulty_pread(blk *b, int fd, void *buf, uint64_t n, uint64_t off) noexcept nogil:
    cdef fault_plan *p = <fault_plan *>b.faults
    cdef int64_t rc = plan_apply(p, OP_READ, off, &n)
    return rc if rc < 0 else p.inner.pread(b, fd, buf, n, off)


cdef inline int64_t faulty_pread_cached(blk *b, int fd, void *buf, uint64_t n, uint64_t off) noexcept nogil:
    """While there are rules nothing counts as cached, so that they meet the real read."""
    cdef fault_plan *p = <fault_plan *>b.faults
    cdef bint rules
    pthread_mutex_lock(&p.lock)
    rules = p.nrules != 0
    pthread_mutex_unlock(&p.lock)
    return -EAGAIN if rules else p.inner.pread_cached(b, fd, buf, n, off)


cdef inline int64_t faulty_pwrite(blk *b, int fd, const void *buf, uint64_t n, uint64_t off) noexcept nogil:
    cdef fault_plan *p = <fault_plan *>b.faults
    cdef int64_t rc = plan_apply(p, OP_WRITE, off, &n)
    return rc if rc < 0 else p.inner.pwrite(b, fd, buf, n, off)


cdef inline int faulty_zero(blk *b, uint64_t off, uint64_t n, bint may_unmap) noexcept nogil:
    cdef fault_plan *p = <fault_plan *>b.faults
    cdef int64_t rc = plan_apply(p, OP_ZERO, off, &n)
    return <int>rc if rc < 0 else p.inner.zero(b, off, n, may_unmap)


cdef inline int faulty_discard(blk *b, uint64_t off, uint64_t n) noexcept nogil:
    cdef fault_plan *p = <fault_plan *>b.faults
    cdef int64_t rc = plan_apply(p, OP_DISCARD, off, &n)
    return <int>rc if rc < 0 else p.inner.discard(b, off, n)


cdef inline int faulty_flush(blk *b) noexcept nogil:
    cdef fault_plan *p = <fault_plan *>b.faults
    cdef uint64_t n = 0
    cdef int64_t rc = plan_apply(p, OP_FLUSH, 0, &n)
    return <int>rc if rc < 0 else p.inner.flush(b)


cdef inline int64_t faulty_seek(blk *b, uint64_t off, int whence) noexcept nogil:
    cdef fault_plan *p = <fault_plan *>b.faults
    cdef uint64_t n = 0
    cdef int64_t rc = plan_apply(p, OP_SEEK, off, &n)
    return rc if rc < 0 else p.inner.seek(b, off, whence)
