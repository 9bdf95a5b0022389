# One copy: the old data of a run of clusters, read once from the disk and written to a target.
#
# `old_data` is shared: a guest write that several snapshots need hands the same buffer to each (R15),
# and a copy that outlived its guest write's patience goes on owning it (R8). The last owner returns it.
# A copy takes no bounce buffer: its own is aligned, and so are its reads and writes, but for a tail that is buffered
# anyway. So it gives the functions of _blockio.pxd no pool for them.
#
# A buffer read for one snapshot is right for another of the same pass: every snapshot of the pass was armed
# before the read, so where one of them still needs a cluster when it claims it, no guest write has reached
# that cluster since, and what was read is its T0 data too.

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from cbwcore._sys cimport add_seq_cst, is_zero, sub_seq_cst
from cbwcore._geometry cimport cluster_end, most, round_down
from cbwcore._bitmap cimport bitmap, bitmap_next
from cbwcore._buffers cimport bufpool, bufpool_get, bufpool_put, reserve
from cbwcore._blockio cimport blk, blk_check_size, blk_next_data, blk_read_checked, blk_write, blk_write_zeroes
from cbwcore._uring cimport ring, ring_take_buffer

cdef enum:
    COPY_RUN = 1 << 20      # the most bytes of one copy, where the cluster is not larger
    ZERO_WORDS = 4          # of a map with a bit for each of COPY_RUN's clusters, 4 KiB at least


cdef struct old_data:
    uint64_t refs
    bufpool *pool
    reserve *own            # whose reserve the buffer is; then it is not shared. Else NULL
    ring *lender            # whose registered buffer it is; then it is not shared either, nor of the pool. Else NULL
    char *buf
    uint64_t start          # bytes on the disk
    uint64_t end


cdef inline void old_data_put(old_data *old) noexcept nogil:
    if old == NULL or sub_seq_cst(&old.refs, 1) != 1:
        return
    if old.lender != NULL:
        old.lender.buffer_taken = False
    else:
        bufpool_put(old.pool, old.buf, old.end - old.start, old.own)
    free(old)


cdef inline old_data *old_data_ref(old_data *old) noexcept nogil:
    add_seq_cst(&old.refs, 1)
    return old


cdef inline bint old_data_covers(const old_data *old, uint64_t start, uint64_t end) noexcept nogil:
    return old != NULL and old.start <= start and end <= old.end


cdef inline int old_data_new(bufpool *pool, reserve *own, bint shared, bint patient, uint64_t start, uint64_t end,
                             old_data **out) noexcept nogil:
    """A buffer for [start, end) of the disk, not yet filled: of the budget, or, if it is not to be `shared`, of this
    thread's ring. bufpool_get() says when it waits, or fails."""
    cdef old_data *old = <old_data *>malloc(sizeof(old_data))
    cdef void *buf = NULL
    cdef int rc
    if old == NULL:
        return -ENOMEM
    old.own = own
    old.lender = NULL
    if not shared:
        buf = ring_take_buffer(end - start, &old.lender)
    if buf == NULL:
        rc = bufpool_get(pool, end - start, &old.own, patient, &buf)
        if rc < 0:
            free(old)
            return rc
    old.refs = 1
    old.pool = pool
    old.buf = <char *>buf
    old.start = start
    old.end = end
    out[0] = old
    return 0


cdef inline int old_data_fill(blk *source, old_data *old) noexcept nogil:
    """Read it from the disk."""
    return blk_read_checked(source, NULL, old.buf, old.end - old.start, old.start)


cdef inline int ensure_zero(blk *target, uint64_t start, uint64_t end) noexcept nogil:
    """Make [start, end) of the target read as zeroes; where it is a hole, or begins with one, that costs nothing (R11).

    tmpfs is not asked for holes: it would walk through every page behind `start` that was allocated and never written, while
    to punch a hole where one is takes a microsecond; but whether it was cut, where that would succeed, too (R12). No file
    system is asked how far data go."""
    cdef uint64_t data = start
    cdef int rc = blk_check_size(target) if target.in_memory else blk_next_data(target, start, end, &data)
    if rc < 0 or data == end:
        return rc
    start = most(start, round_down(data, target.align))
    return blk_write_zeroes(target, NULL, start, end - start, True, False)


cdef inline uint64_t find_zeroes(const old_data *old, uint64_t first, uint64_t last, int shift, uint64_t size,
                                 uint64_t *zeroes) noexcept nogil:
    """Mark in `zeroes` (bit i: cluster first + i) the clusters of [first, last) that read as zeroes; bytes of the rest."""
    cdef uint64_t c, start, length, data = 0
    for c in range(first, last):
        start = c << shift
        length = cluster_end(c, shift, size) - start
        if is_zero(old.buf + (start - old.start), length):
            zeroes[(c - first) >> 6] |= <uint64_t>1 << ((c - first) & 63)
        else:
            data += length
    return data


cdef inline int write_target(blk *target, const old_data *old, uint64_t first, uint64_t last, int shift, uint64_t size,
                             uint64_t *zeroes, bint target_is_new) noexcept nogil:
    """Write the clusters [first, last) to the target, in as few transfers as their zeroes allow."""
    cdef bitmap zero
    cdef uint64_t c = first, stop, start, end
    cdef bint hole
    cdef int rc = 0
    zero.words = zeroes
    zero.flip = 0
    while c < last and rc == 0:
        hole = (zeroes[(c - first) >> 6] >> ((c - first) & 63)) & 1
        stop = first + bitmap_next(&zero, c - first, last - first, not hole)
        start = c << shift
        end = cluster_end(stop - 1, shift, size)
        if not hole:
            rc = blk_write(target, NULL, old.buf + (start - old.start), end - start, start)
        elif not target_is_new:
            rc = ensure_zero(target, start, end)
        c = stop
    return rc
