# A short adaptive poll before a thread blocks. Sleeping and being woken costs more than most of what is waited for: on
# fast storage, or at depth 1 over NBD, it is the larger part of a request's time.
#
# Polling gives way. At most `places` threads of the process poll at once (by default one less than it has CPUs, so that
# what is waited for has a CPU to run on). A place where polls find nothing earns no more of them for a while, and a thread
# that finds itself preempted while it polls stops at once: others need its CPU.

from libc.stdint cimport int64_t, uint64_t
from cbwcore._sys cimport add_seq_cst, cpu_relax, load_relaxed, monotonic_ns, store_release, sub_seq_cst

cdef extern from * nogil:
    """
    static uint64_t cbw_spin_places;    /* threads that may poll at once */
    static uint64_t cbw_spinning;       /* threads that do */
    """
    uint64_t spin_places "cbw_spin_places"
    uint64_t spinning "cbw_spinning"

cdef enum:
    SPIN_NS = 100_000           # the longest poll
    SPIN_GAP_NS = 20_000        # between two looks at the clock: the thread was preempted
    SPIN_CREDIT = 8             # polls in a row that may find nothing
    SPIN_REST = 64              # waits without a poll, once the credit is spent; then one more is tried


cdef struct spin:               # the experience of one waiting place. Hints: threads may race, and lose an update
    uint64_t credit             # SPIN_CREDIT at most
    uint64_t rest               # waits until the next try


cdef struct spin_turn:          # one poll
    int64_t until
    int64_t last


cdef inline void spin_init(spin *s) noexcept nogil:
    s.credit = SPIN_CREDIT
    s.rest = 0


cdef inline bint spin_begin(spin *s, spin_turn *t) noexcept nogil:
    """Whether to poll now; if so spin_end() must follow."""
    cdef uint64_t rest
    if load_relaxed(&s.credit) == 0:
        rest = load_relaxed(&s.rest)
        if rest:
            store_release(&s.rest, rest - 1)
            return False
    if load_relaxed(&spinning) >= load_relaxed(&spin_places):
        return False
    if add_seq_cst(&spinning, 1) >= load_relaxed(&spin_places):
        sub_seq_cst(&spinning, 1)
        return False
    t.last = monotonic_ns()
    t.until = t.last + SPIN_NS
    return True


cdef inline bint spin_on(spin_turn *t) noexcept nogil:
    """After a look that found nothing: whether to look again."""
    cdef int64_t before = t.last
    cpu_relax()
    t.last = monotonic_ns()
    return t.last < t.until and t.last - before < SPIN_GAP_NS


cdef inline void spin_end(spin *s, bint found) noexcept nogil:
    cdef uint64_t credit = load_relaxed(&s.credit)
    sub_seq_cst(&spinning, 1)
    if found:
        if credit < SPIN_CREDIT:
            store_release(&s.credit, credit + 1)
    elif credit > 1:
        store_release(&s.credit, credit - 1)
    else:
        store_release(&s.credit, 0)
        store_release(&s.rest, SPIN_REST)
