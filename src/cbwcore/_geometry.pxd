# Bytes to clusters and back (R4). A cluster is 1 << shift bytes; the tail cluster may be shorter.

from libc.stdint cimport uint64_t


cdef inline uint64_t least(uint64_t a, uint64_t b) noexcept nogil:
    return a if a < b else b


cdef inline uint64_t most(uint64_t a, uint64_t b) noexcept nogil:
    return a if a > b else b


cdef inline uint64_t round_down(uint64_t x, uint64_t unit) noexcept nogil:
    """`unit` is a power of two."""
    return x & ~(unit - 1)


cdef inline uint64_t round_up(uint64_t x, uint64_t unit) noexcept nogil:
    return (x + unit - 1) & ~(unit - 1)


cdef inline uint64_t cluster_count(uint64_t size, int shift) noexcept nogil:
    return (size >> shift) + (1 if size & ((<uint64_t>1 << shift) - 1) else 0)


cdef inline uint64_t cluster_end(uint64_t cluster, int shift, uint64_t size) noexcept nogil:
    """End in bytes of `cluster`; the tail cluster ends where the disk ends."""
    return least((cluster + 1) << shift, size)


cdef inline uint64_t outer_end(uint64_t offset, uint64_t length, int shift) noexcept nogil:
    """One past the last cluster that a range touches: CBW rounds outward. `length` is not 0."""
    return ((offset + length - 1) >> shift) + 1


cdef inline uint64_t inner_first(uint64_t offset, int shift) noexcept nogil:
    """First cluster that begins inside the range: a discard of a snapshot shrinks inward."""
    return cluster_count(offset, shift)


cdef inline uint64_t inner_end(uint64_t offset, uint64_t length, int shift, uint64_t size) noexcept nogil:
    """One past the last cluster that ends inside the range; may be at or below inner_first()."""
    if offset + length == size:
        return cluster_count(size, shift)
    return (offset + length) >> shift
