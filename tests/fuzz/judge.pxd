# The oracle: whether a stream of replies is what the protocol and the session (session.pxd) allow, whether every byte
# that was read was there to be read, and whether what the disk holds afterwards is what was written.
#
# Requests are in flight together, so the order in which they touched the disk is not known. A byte is *explained* if it
# is T0's, or some WRITE's there, or zero where a ZEROES or TRIM reached; an incomplete WRITE explains nothing.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort
from libc.string cimport memcmp
from session cimport (
    COPYING_DISK, DF, DIRTY_SHIFT, DISK, ENDS_GONE, ENDS_STALLED, ENDS_STOPPED, FAST, FAULT_FLUSH, FAULT_READ, FAULT_SEEK,
    FAULT_TARGET_FULL, FAULT_TARGET_READ, FAULT_WRITE_FULL, FLUSH, FUA, HALF_CLOSE, MOST_RECEIVED, P_EIO, P_ENOMEM, P_ENOSPC,
    P_ENOTSUP, P_ESHUTDOWN, READ, REQ_ONE, SIZE, SNAPSHOT, STALL, STATUS, STOP, TRIM, VANISH, WRITE, ZEROES, bit, changes,
    overlap, session, take16, take32, take64, wish,
)

cdef struct verdict:
    const session *s
    const uint8_t *t0
    const uint8_t *zeroes       # SIZE bytes
    const uint8_t *got          # what the client received
    uint64_t ngot
    int end                     # as conn_serve() returned
    uint64_t writes             # calls that changed the disk
    const wish *current         # for the report


cdef inline void describe(const session *s) noexcept nogil:
    """The session, for the report of a failure."""
    cdef const wish *w
    cdef uint64_t i
    fprintf(stderr, b"export %d, structured %d, discard %d, contexts %d, extents %llu, client leaves %d at %llu of %llu bytes,\n"
            b"pieces of %llu, fault %d at %d, waits %d, tight %d, writes beside %d, before %d; it must end with %d\n",
            s.kind, s.structured, s.discard, s.ncontexts, s.extents, s.leave, s.cut, s.nwire, s.piece, s.fault, s.fault_at,
            s.always_waits, s.tight, s.guest_writes, s.old_writes, s.end)
    for i in range(s.nwishes):
        w = &s.wishes[i]
        fprintf(stderr, b"%4llu: type %d flags %d offset %llu length %llu%s: refusals %llu, answered %d with %u\n",
                i, w.type, w.flags, w.off, w.n, b"" if w.whole else b" (cut)", w.refusals, w.answered, w.error)


cdef inline void must(const verdict *v, bint condition, const char *what, uint64_t a, uint64_t b) noexcept nogil:
    if condition:
        return
    fprintf(stderr, b"ORACLE: %s (%llu, %llu)", what, a, b)
    if v.current != NULL:
        fprintf(stderr, b" of request %llu", <uint64_t>(v.current - v.s.wishes))
    fprintf(stderr, b"; it ended with %d\n", v.end)
    describe(v.s)
    abort()


# ---- what bytes may be ----

cdef inline uint64_t same(const uint8_t *data, const uint8_t *like, uint64_t n) noexcept nogil:
    """How many bytes are alike."""
    cdef uint64_t i
    if memcmp(data, like, n) == 0:
        return n
    for i in range(n):
        if data[i] != like[i]:
            return i
    return n


cdef inline uint64_t explained_by(const verdict *v, const wish *w, const uint8_t *data, uint64_t off,
                                  uint64_t n) noexcept nogil:
    """How many of the bytes at `off` the request may have put there."""
    cdef uint64_t at = off - w.off
    if not w.whole or not changes(w) or w.refusals or off < w.off or at >= w.n:
        return 0
    if n > w.n - at:
        n = w.n - at
    return same(data, w.payload + at if w.type == WRITE else v.zeroes, n)


cdef inline void check_content(const verdict *v, const uint8_t *data, uint64_t off, uint64_t n) noexcept nogil:
    """That each byte of [off, off + n) is explained."""
    cdef const session *s = v.s
    cdef uint64_t known, i, end = off + n
    while off < end:
        known = same(data, v.t0 + off, end - off)
        i = 0
        while known == 0 and i < s.nwishes and s.kind != SNAPSHOT:
            known = explained_by(v, &s.wishes[i], data, off, end - off)
            i += 1
        must(v, known > 0, b"a byte that nobody wrote there", off, data[0])
        off += known
        data += known


# ---- what may fail ----

cdef inline bint was_trimmed(const session *s, const wish *w) noexcept nogil:
    cdef uint64_t i
    for i in range(s.nwishes):
        if s.wishes[i].type == TRIM and s.wishes[i].whole and not s.wishes[i].refusals and overlap(&s.wishes[i], w):
            return True
    return False


cdef inline uint64_t excuses(const session *s, const wish *w) noexcept nogil:
    """The errnos that a request which is not refused may yet fail with."""
    cdef uint64_t found = bit(P_ENOMEM) if s.leave == STALL else 0
    cdef bint writes = changes(w) and s.kind != SNAPSHOT
    if s.close_snapshot or s.leave == STOP:
        found |= bit(P_ESHUTDOWN)
    if s.kind == SNAPSHOT:
        if w.type == READ and was_trimmed(s, w):
            found |= bit(P_EIO)
        if s.fault in (FAULT_READ, FAULT_TARGET_READ, FAULT_SEEK):
            found |= bit(P_EIO)
        if s.fault == FAULT_TARGET_FULL and s.break_snapshot and (s.guest_writes or s.old_writes):
            found |= bit(P_EIO)
        return found
    if w.type == ZEROES and w.flags & FAST:
        found |= bit(P_ENOTSUP)
    if s.fault == FAULT_READ and (w.type == READ or (writes and s.kind == COPYING_DISK)):
        found |= bit(P_EIO)
    if s.fault == FAULT_WRITE_FULL and (w.type == WRITE or w.type == ZEROES):
        found |= bit(P_ENOSPC)
    if s.fault == FAULT_SEEK and (w.type == STATUS or writes):
        found |= bit(P_EIO)
    if s.fault == FAULT_FLUSH and (w.type == FLUSH or w.flags & FUA):
        found |= bit(P_EIO)
    if s.fault == FAULT_TARGET_FULL and writes and s.kind == COPYING_DISK:
        found |= bit(P_EIO)
    return found


# ---- the stream of replies ----

cdef inline void settle(const verdict *v, wish *w, uint32_t error) noexcept nogil:
    """The result of a request."""
    w.error = error
    if error == 0:
        must(v, w.refusals == 0, b"a request that must be refused was served", w.refusals, 0)
    elif w.refusals:
        must(v, bit(error) & w.refusals != 0, b"refused with the wrong errno", error, w.refusals)
    else:
        must(v, bit(error) & excuses(v.s, w) != 0, b"an errno without a reason", error, excuses(v.s, w))


cdef inline wish *find(verdict *v, uint64_t handle) noexcept nogil:
    """The request that a reply is for."""
    cdef uint64_t i = handle & <uint64_t>0xffffffff
    must(v, i < v.s.nwishes and v.s.wishes[i].handle == handle, b"a reply to an unknown handle", handle, 0)
    v.current = &v.s.wishes[i]
    must(v, v.current.whole, b"a reply to half a request", handle, 0)
    must(v, not v.current.answered, b"a second reply", handle, 0)
    return <wish *>v.current


cdef inline uint64_t simple_reply(verdict *v, const uint8_t *p, uint64_t left) noexcept nogil:
    """Its length, 0 where it was cut."""
    cdef wish *w
    cdef uint32_t error
    if left < 16:
        return 0
    w = find(v, take64(p + 8))
    error = take32(p + 4)
    must(v, w.type != STATUS or error, b"a status without chunks", 0, 0)
    must(v, not v.s.structured or (w.type != READ and w.type != STATUS), b"a simple reply instead of a chunk", w.type, 0)
    if w.type == READ and error == 0 and left < 16 + w.n:
        return 0
    settle(v, w, error)
    w.answered = True
    if w.type != READ or error:
        return 16
    check_content(v, p + 16, w.off, w.n)
    return 16 + w.n


cdef inline bint dirty(uint64_t block) noexcept nogil:
    """The bitmap that is exported."""
    return (block * 7) % 5 < 2


cdef inline void check_dirty(const verdict *v, uint64_t off, uint64_t n, bint value) noexcept nogil:
    cdef uint64_t block
    for block in range(off >> DIRTY_SHIFT, ((off + n - 1) >> DIRTY_SHIFT) + 1):
        must(v, dirty(block) == value, b"a wrong dirty bit", off, n)


cdef inline void check_extents(const verdict *v, wish *w, const uint8_t *p, uint64_t n) noexcept nogil:
    """A chunk of NBD_REPLY_TYPE_BLOCK_STATUS."""
    cdef const session *s = v.s
    cdef uint64_t most = 1 if w.flags & REQ_ONE else s.extents, count, i, off = w.off, length
    cdef uint32_t which, flags
    must(v, n >= 12 and n % 8 == 4, b"a status chunk of so many bytes", n, 0)
    which = take32(p)
    count = n // 8
    must(v, 1 <= which <= (2 if s.ncontexts > 1 else 1), b"a status of an unknown context", which, 0)
    must(v, not (w.contexts >> which) & 1, b"a context twice", which, 0)
    must(v, count <= most, b"too many extents", count, most)
    w.contexts |= <uint64_t>1 << which
    for i in range(count):
        length = take32(p + 4 + 8 * i)
        flags = take32(p + 8 + 8 * i)
        must(v, 0 < length <= w.off + w.n - off, b"an empty extent, or one past what was asked about", off, length)
        if s.ncontexts > 1 and which == (2 if s.ncontexts == 2 else 1):     # the bitmap's
            must(v, flags <= 1, b"unknown flags of an extent", flags, which)
            check_dirty(v, off, length, flags)
        else:
            must(v, flags == 0 or flags == 3, b"unknown flags of an extent", flags, which)
            if flags:
                check_content(v, v.zeroes, off, length)
        off += length
    must(v, off == w.off + w.n or count == most or excuses(s, w) != 0, b"a status that ends early", off, count)


cdef inline void check_chunk(const verdict *v, wish *w, uint16_t type, bint last, const uint8_t *p, uint64_t n) noexcept nogil:
    """A whole chunk's payload. The last chunk completes the reply."""
    w.chunks += 1
    if type == 0:               # NONE
        must(v, n == 0 and last, b"NONE with a payload, or not at the end", n, last)
    elif type == 1:             # OFFSET_DATA
        must(v, w.type == READ and n > 8, b"data for another command, or none", w.type, n)
        must(v, take64(p) >= w.off and take64(p) - w.off + n - 8 <= w.n, b"data outside the request", take64(p), n - 8)
        must(v, w.covered == 0 or not w.flags & DF, b"fragments in spite of DF", w.covered, 0)
        w.covered += n - 8
        check_content(v, p + 8, take64(p), n - 8)
    elif type == 5:             # BLOCK_STATUS
        must(v, w.type == STATUS, b"a status for another command", w.type, 0)
        check_extents(v, w, p, n)
    else:
        must(v, type == 32769, b"an unknown type of chunk", type, 0)
        must(v, n >= 6 and n == 6 + take16(p + 4) and n < 256, b"an error chunk of so many bytes", n, 0)
        must(v, last and take32(p) != 0, b"an error chunk that is not the last, or without an error", last, take32(p))
        settle(v, w, take32(p))
    if last and type != 32769:
        settle(v, w, 0)
        must(v, w.type != READ or w.covered == w.n, b"a read of another length", w.covered, w.n)
        must(v, w.type != STATUS or w.contexts == (6 if v.s.ncontexts > 1 else 2), b"not all contexts", w.contexts, 0)
    w.answered = last


cdef inline uint64_t chunk(verdict *v, const uint8_t *p, uint64_t left) noexcept nogil:
    """Its length, 0 where it was cut."""
    cdef wish *w
    cdef uint64_t n
    must(v, v.s.structured, b"a chunk that was not negotiated", 0, 0)
    if left < 20:
        return 0
    must(v, take16(p + 4) <= 1, b"unknown flags of a chunk", take16(p + 4), 0)
    w = find(v, take64(p + 8))
    n = take32(p + 16)
    must(v, n < MOST_RECEIVED, b"a chunk of so many bytes", n, 0)
    if left < 20 + n:
        return 0
    check_chunk(v, w, take16(p + 6), take16(p + 4) & 1, p + 20, n)
    return 20 + n


cdef inline void check_replies(verdict *v) noexcept nogil:
    """All that was received. Only who does not read to the end may have got half a reply."""
    cdef uint64_t at = 0, n
    cdef bint may_be_cut = v.s.leave == VANISH or v.s.leave == STALL
    while at < v.ngot:
        v.current = NULL
        n = v.ngot - at
        if n >= 4:
            if take32(v.got + at) == 0x67446698:
                n = simple_reply(v, v.got + at, n)
            else:
                must(v, take32(v.got + at) == 0x668e33ef, b"no magic of a reply", take32(v.got + at), at)
                n = chunk(v, v.got + at, n)
        else:
            n = 0
        must(v, n > 0 or may_be_cut, b"half a reply", at, v.ngot)
        if n == 0:
            break
        at += n
    v.current = NULL


cdef inline bint ends_well(const verdict *v) noexcept nogil:
    """Whether the session may have ended so."""
    if v.end == v.s.end:
        return True
    if v.s.leave == STOP:
        return v.end == ENDS_STOPPED
    if v.s.leave == VANISH:
        return v.end == ENDS_GONE
    return v.s.leave == STALL and v.end == ENDS_STALLED


cdef inline void check_session(verdict *v) noexcept nogil:
    """The replies, and how it ended."""
    cdef const session *s = v.s
    cdef uint64_t i
    check_replies(v)
    must(v, ends_well(v), b"it must have ended otherwise", s.end, s.leave)
    if s.leave == HALF_CLOSE:
        for i in range(s.nwishes):
            v.current = &s.wishes[i]
            must(v, v.current.answered or not v.current.whole, b"no reply", i, 0)
    v.current = NULL
    if s.kind != DISK and s.kind != COPYING_DISK and not s.guest_writes:
        must(v, v.writes == 0, b"a read-only disk was written to", v.writes, 0)


# ---- what the disk holds afterwards ----

cdef inline bint is_alone(const session *s, const wish *w) noexcept nogil:
    """Whether no other request may have changed what it wrote."""
    cdef uint64_t i
    for i in range(s.nwishes):
        if &s.wishes[i] != w and changes(&s.wishes[i]) and not s.wishes[i].refusals and overlap(&s.wishes[i], w):
            return False
    return True


cdef inline void check_disk(verdict *v, const uint8_t *content, uint64_t start, uint64_t end) noexcept nogil:
    """`content`: all of the disk; [start, end) is where it may have been written to."""
    cdef const wish *w
    cdef uint64_t i
    check_content(v, content + start, start, end - start)
    for i in range(v.s.nwishes):
        w = &v.s.wishes[i]
        if not w.answered or w.error or w.n == 0 or (w.type != WRITE and w.type != ZEROES) or not is_alone(v.s, w):
            continue
        v.current = w
        must(v, explained_by(v, w, content + w.off, w.off, w.n) == w.n, b"a write that is not there", w.off, w.n)
    v.current = NULL
