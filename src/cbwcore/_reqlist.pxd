# Requests in flight: byte ranges in a list, found by overlap. The list has no lock of its own;
# its owner's lock guards it, and the owner of a request keeps it alive while it is listed.

from libc.stdint cimport uint64_t


cdef struct request:
    request *next
    request *prev
    uint64_t start      # bytes
    uint64_t end        # bytes, past the last
    bint serialising    # block range lock (R13): no other request may overlap it, and it overlaps none


cdef struct reqlist:
    request *first
    uint64_t count


cdef inline void reqlist_add(reqlist *requests, request *r, uint64_t start, uint64_t end) noexcept nogil:
    r.start = start
    r.end = end
    r.prev = NULL
    r.next = requests.first
    if r.next != NULL:
        r.next.prev = r
    requests.first = r
    requests.count += 1


cdef inline void reqlist_remove(reqlist *requests, request *r) noexcept nogil:
    if r.prev != NULL:
        r.prev.next = r.next
    else:
        requests.first = r.next
    if r.next != NULL:
        r.next.prev = r.prev
    requests.count -= 1


cdef inline request *reqlist_find(const reqlist *requests, uint64_t start, uint64_t end) noexcept nogil:
    """A listed request that overlaps [start, end), else NULL."""
    cdef request *r = requests.first
    while r != NULL:
        if r.start < end and start < r.end:
            return r
        r = r.next
    return NULL


cdef inline bint reqlist_conflict(const reqlist *requests, uint64_t start, uint64_t end,
                                  bint serialising) noexcept nogil:
    """Whether an overlapping request forbids this one: one of the two is serialising."""
    cdef request *r = requests.first
    while r != NULL:
        if (serialising or r.serialising) and r.start < end and start < r.end:
            return True
        r = r.next
    return False
