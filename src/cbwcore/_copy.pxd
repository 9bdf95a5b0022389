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
from cbwcore._geometry cimport cluster_end, least, most, round_down, round_up
from cbwcore._bitmap cimport bitmap, bitmap_next
from cbwcore._buffers cimport bufpool, bufpool_get, bufpool_put, reserve
from cbwcore._blockio cimport blk, blk_extent, blk_read_checked, blk_write, blk_write_zeroes

cdef enum:
    COPY_RUN = 1 << 20      # the most bytes of one copy, where the cluster is not larger
    ZERO_WORDS = 4          # of a map with a bit for each of COPY_RUN's clusters, 4 KiB at least


cdef struct old_data:
    uint64_t refs
    bufpool *pool
    reserve *own            # whose reserve the buffer is; then it is not shared. Else NULL
    char *buf
    uint64_t start          # bytes on the disk
    uint64_t end


cdef inline void old_data_put(old_data *old) noexcept nogil:
    if old != NULL and sub_seq_cst(&old.refs, 1) == 1:
        bufpool_put(old.pool, old.buf, old.end - old.start, old.own)
        free(old)


cdef inline old_data *old_data_ref(old_data *old) noexcept nogil:
    add_seq_cst(&old.refs, 1)
    return old


cdef inline bint old_data_covers(const old_data *old, uint64_t start, uint64_t end) noexcept nogil:
    return old != NULL and old.start <= start and end <= old.end


cdef inline int old_data_read(blk *source, bufpool *pool, reserve *own, bint patient, uint64_t start, uint64_t end,
                              old_data **out) noexcept nogil:
    """Read [start, end) of the disk into a buffer of the budget; bufpool_get() says when it waits."""
    cdef old_data *old = <old_data *>malloc(sizeof(old_data))
    cdef void *buf
    cdef int rc
    if old == NULL:
        return -ENOMEM
    old.own = own
    rc = bufpool_get(pool, end - start, &old.own, patient, &buf)
    if rc < 0:
        free(old)
        return rc
    old.refs = 1
    old.pool = pool
    old.buf = <char *>buf
    old.start = start
    old.end = end
    rc = blk_read_checked(source, NULL, buf, end - start, start)
    if rc < 0:
        old_data_put(old)
        return rc
    out[0] = old
    return 0


cdef inline int ensure_zero(blk *target, uint64_t start, uint64_t end) noexcept nogil:
    """Make [start, end) of the target read as zeroes; what already is a hole costs nothing (R11), as far as it is one of
    whole blocks: the file system's may be smaller than those of O_DIRECT."""
    cdef uint64_t stop
    cdef int64_t pos
    cdef bint hole
    cdef int rc = 0
    while start < end and rc == 0:
        pos = blk_extent(target, start, end, &hole)
        if pos < 0:
            return <int>pos
        stop = <uint64_t>pos
        if hole and stop < end:
            stop = round_down(stop, target.align)
            hole = stop > start
        if not hole:
            stop = least(round_up(most(stop, start + 1), target.align), end)
            rc = blk_write_zeroes(target, NULL, start, stop - start, True, False)
        start = stop
    return rc


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
