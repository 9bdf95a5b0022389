# What NBD_CMD_BLOCK_STATUS answers (NBD doc/proto.md, "Metadata querying"): extents of one context, joined and bounded.
#
# They never reach past the range that was asked about, and none is empty. base:allocation comes from the engine's maps
# and the files' holes (R20); what a snapshot does not cover is told as data, and reading it is an error.

from libc.stdint cimport int64_t, uint32_t, uint64_t
from cbwcore._geometry cimport least
from cbwcore._bitmap cimport bitmap, bitmap_next, bitmap_test
from cbwcore._engine cimport disk, guest_status
from cbwcore._nbd_wire cimport put32
from cbwcore._snapshot cimport STATUS_ZERO, snapshot, snapshot_status

cdef enum:
    NBD_STATE_HOLE = 1          # base:allocation
    NBD_STATE_ZERO = 2
    NBD_STATE_DIRTY = 1         # qemu:dirty-bitmap
    EXTENT_BYTES = 8            # length, flags


cdef struct context:
    bitmap *dirty               # NULL: base:allocation
    int shift                   # its granularity


cdef inline int64_t allocation_at(disk *d, snapshot *s, uint64_t off, uint64_t end, uint32_t *state) noexcept nogil:
    """End of the extent at `off`, or an error. `s`: NULL for the disk itself."""
    cdef int flags = 0
    cdef bint hole = False
    cdef int64_t stop
    if s == NULL:
        stop = guest_status(d, off, end, &hole)
    else:
        stop = snapshot_status(s, off, end, &flags)
        hole = flags & STATUS_ZERO
    state[0] = NBD_STATE_HOLE | NBD_STATE_ZERO if hole else 0
    return stop


cdef inline int64_t dirty_at(const context *c, uint64_t off, uint64_t end, uint32_t *state) noexcept nogil:
    cdef uint64_t bit = off >> c.shift
    cdef bint dirty = bitmap_test(c.dirty, bit)
    state[0] = NBD_STATE_DIRTY if dirty else 0
    return <int64_t>least(bitmap_next(c.dirty, bit + 1, c.dirty.nbits, not dirty) << c.shift, end)


cdef inline int64_t list_extents(disk *d, snapshot *s, const context *c, uint64_t off, uint64_t n, char *out,
                                 uint64_t most) noexcept nogil:
    """Write up to `most` extents of [off, off + n) to `out`, in the order and form of the wire; how many bytes that are.
    An error only where there is not even one: what comes after an error is not told."""
    cdef uint64_t end = off + n, start = off, count = 0
    cdef uint32_t state = 0, held = 0
    cdef int64_t stop
    while off < end:
        stop = allocation_at(d, s, off, end, &state) if c.dirty == NULL else dirty_at(c, off, end, &state)
        if stop < 0 and off == start and count == 0:
            return stop
        if stop < 0:
            break
        if off > start and state != held:
            put32(out, <uint32_t>(off - start))
            put32(out + 4, held)
            out += EXTENT_BYTES
            count += 1
            start = off
            if count == most:
                break
        held = state
        off = <uint64_t>stop
    if off > start:
        put32(out, <uint32_t>(off - start))
        put32(out + 4, held)
        count += 1
    return <int64_t>(count * EXTENT_BYTES)
