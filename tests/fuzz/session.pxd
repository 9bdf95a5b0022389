# What an input of the transmission fuzzer is: HEAD bytes that choose the export, the client and the faults, then one
# client's session as it is on the wire, but for this: of a WRITE's payload there are only the first SAMPLE bytes, which
# are repeated as long as it is; and the lower half of each handle becomes the number of its request, so that every
# reply can be told. sessions.py says the same in Python.
#
# Parsing also says, in the fuzzer's own words (NBD doc/proto.md), what must become of each request and of the session.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cdef extern from * nogil:
    """
    static inline uint16_t take16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }
    static inline uint32_t take32(const uint8_t *p) { return (uint32_t)take16(p) << 16 | take16(p + 2); }
    static inline uint64_t take64(const uint8_t *p) { return (uint64_t)take32(p) << 32 | take32(p + 4); }
    static inline void give32(uint8_t *p, uint32_t v) { p[0] = v >> 24; p[1] = v >> 16; p[2] = v >> 8; p[3] = v; }
    """
    uint16_t take16(const uint8_t *p)
    uint32_t take32(const uint8_t *p)
    uint64_t take64(const uint8_t *p)
    void give32(uint8_t *p, uint32_t v)

cdef enum:
    HEAD = 5
    REQUEST = 28                # bytes of a request without payload
    SAMPLE = 8
    SHIFT = 12                  # of the snapshots' clusters
    SIZE = (160 << SHIFT) + 1000
    DIRTY_SHIFT = 12            # of the bitmap that is exported
    MOST_REQUEST = 256 << 10    # the server's limits
    MOST_DRAIN = 512 << 10
    MOST_REQUESTS = 200         # of a session; then it ends
    MOST_SENT = 1 << 20
    MOST_RECEIVED = 4 << 20
    SMALL_REPLY = 1024          # bytes of a socket's buffer that a reply without data takes at most
    FEWEST = 2048               # bytes: no two extents in these
    MOST_PIECES = 50            # a session is sent in

cdef enum:                      # numbers of the protocol
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    ZEROES = 6
    STATUS = 7
    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST = 16
    P_EPERM = 1
    P_EIO = 5
    P_ENOMEM = 12
    P_EINVAL = 22
    P_ENOSPC = 28
    P_EOVERFLOW = 75
    P_ENOTSUP = 95
    P_ESHUTDOWN = 108

cdef enum:                      # what is exported
    DISK
    READ_ONLY_DISK
    SNAPSHOT
    COPYING_DISK                # a disk that has a snapshot: guest writes copy before they write

cdef enum:                      # how the client ends
    HALF_CLOSE                  # it sends all, and reads all
    VANISH                      # closes in the middle
    STOP                        # the server is stopped in the middle
    STALL                       # reads nothing

cdef enum:                      # what goes wrong, from some call on
    FAULT_NONE
    FAULT_SLOW_READ = 4
    FAULT_SLOW_WRITE
    FAULT_SLOW_TARGET
    FAULT_READ
    FAULT_WRITE_FULL
    FAULT_SHORT
    FAULT_NO_ZEROES
    FAULT_SEEK
    FAULT_FLUSH
    FAULT_TARGET_FULL
    FAULT_TARGET_READ
    FAULT_NO_DISCARD

cdef enum:                      # how a session ends, as conn_serve() says
    ENDS_DISC = 1
    ENDS_GONE
    ENDS_STOPPED
    ENDS_STALLED
    ENDS_MAGIC
    ENDS_OVERSIZED


cdef struct wish:               # a request
    uint16_t flags
    uint16_t type
    uint64_t handle
    uint64_t off
    uint64_t n
    const uint8_t *payload
    bint whole                  # all of it was in the input
    uint64_t refusals           # a bit for each errno that it may be refused with; 0: it must be served
    # of the reply
    bint answered
    uint32_t error
    uint64_t covered            # bytes of data
    int chunks
    uint64_t contexts           # a bit for each that was told of


cdef struct session:
    int kind
    bint structured
    bint discard
    int ncontexts               # 1: base:allocation; 2: and a bitmap; 3: a bitmap alone, then base:allocation
    bint warm                   # buffers that come back are kept, as in life; else they are freed, for AddressSanitizer
    bint always_waits
    bint uncached               # as if no page were in memory
    bint tight                  # a small budget
    bint guest_writes           # behind a snapshot, meanwhile
    bint old_writes             # before
    bint break_snapshot         # the policy
    bint close_snapshot         # in the middle
    uint64_t extents
    uint64_t piece              # bytes that are sent at once
    int leave
    uint64_t cut                # bytes: where the middle is
    int fault
    int fault_at
    uint8_t wire[MOST_SENT]
    uint64_t nwire
    wish wishes[MOST_REQUESTS]
    uint64_t nwishes
    uint64_t most_received      # bytes
    bint ragged                 # it ends inside a request
    int end


cdef inline uint64_t bit(uint32_t error) noexcept nogil:
    """EPERM .. EINVAL .. ENOTSUP fit into a word by their place in the protocol's list."""
    if error == P_EPERM:
        return 1
    if error == P_EIO:
        return 2
    if error == P_ENOMEM:
        return 4
    if error == P_EINVAL:
        return 8
    if error == P_ENOSPC:
        return 16
    if error == P_EOVERFLOW:
        return 32
    if error == P_ENOTSUP:
        return 64
    if error == P_ESHUTDOWN:
        return 128
    return 0


cdef inline bint changes(const wish *w) noexcept nogil:
    return w.type == WRITE or w.type == ZEROES or w.type == TRIM


cdef inline bint overlap(const wish *a, const wish *b) noexcept nogil:
    return a.off < b.off + b.n and b.off < a.off + a.n


cdef inline uint64_t refusals_of(const session *s, const wish *w) noexcept nogil:
    """Every errno that a rule refuses the request with, whatever the order in which a server looks."""
    cdef uint64_t found = 0
    cdef uint16_t known = FUA
    cdef bint read_only = s.kind == READ_ONLY_DISK or s.kind == SNAPSHOT
    if w.type > STATUS:
        return bit(P_EINVAL)
    if w.type == READ and s.structured:
        known |= DF
    if w.type == ZEROES:
        known |= NO_HOLE | FAST
    if w.type == STATUS:
        known |= REQ_ONE
    if w.flags & ~known:
        found |= bit(P_EINVAL)
    if (w.type == READ or w.type == WRITE) and w.n > MOST_REQUEST:
        found |= bit(P_EINVAL)
    if w.type == STATUS and (w.n == 0 or s.ncontexts == 0):
        found |= bit(P_EINVAL)
    if read_only and changes(w) and not (w.type == TRIM and s.kind == SNAPSHOT and s.discard):
        found |= bit(P_EPERM)
    if w.type == FLUSH:
        return found | (bit(P_EINVAL) if w.off or w.n else 0)
    if w.off > SIZE or w.n > SIZE - w.off:
        found |= bit(P_ENOSPC) if w.type == WRITE or w.type == ZEROES else bit(P_EINVAL)
    return found


cdef inline void choose(session *s, const uint8_t *head) noexcept nogil:
    """What the first bytes of the input say."""
    cdef uint64_t[8] pieces
    cdef uint64_t[4] extents
    cdef int[8] leaves
    pieces[:] = [1, 7, 28, 29, 4096, 65536, 131072, 131073]
    extents[:] = [1 << 17, 1, 2, 5]
    leaves[:] = [HALF_CLOSE, HALF_CLOSE, HALF_CLOSE, HALF_CLOSE, HALF_CLOSE, VANISH, STOP, STALL]
    s.kind = head[0] & 3
    s.structured = head[0] & 4
    s.discard = head[0] & 8
    s.ncontexts = (head[0] >> 4) & 3 if s.structured else 0
    s.extents = extents[(head[0] >> 6) & 3]
    s.piece = pieces[head[1] & 7] if head[1] & 8 else MOST_SENT
    s.leave = leaves[(head[1] >> 4) & 7]
    s.guest_writes = head[1] & 128 and s.kind == SNAPSHOT
    s.cut = head[2]
    s.fault = head[3] & 15
    s.fault_at = (head[3] >> 4) & 15
    s.warm = not head[4] & 1
    s.always_waits = head[4] & 2
    s.tight = head[4] & 4
    s.old_writes = head[4] & 8 and s.kind == SNAPSHOT
    s.break_snapshot = head[4] & 16
    s.close_snapshot = head[4] & 32 and s.kind == SNAPSHOT
    s.uncached = head[4] & 64


cdef inline bint admit(session *s, const wish *w) noexcept nogil:
    """Whether the session may go on with this request."""
    cdef uint64_t reply = SMALL_REPLY
    if w.type == READ and w.n <= MOST_REQUEST:
        reply += w.n
    if w.type == STATUS and w.n <= SIZE:
        reply += 2 * (SMALL_REPLY + w.n // FEWEST * 8)
    if s.nwishes == MOST_REQUESTS or s.most_received + reply > MOST_RECEIVED:
        return False
    if s.nwire + 2 * REQUEST + (w.n if w.type == WRITE and w.n <= MOST_DRAIN else 0) > MOST_SENT:
        return False
    s.most_received += reply
    return True


cdef inline uint64_t put_payload(session *s, wish *w, const uint8_t *data, uint64_t left) noexcept nogil:
    """The payload on the wire; how much of the input that takes."""
    cdef uint64_t sample = w.n if w.n < SAMPLE else SAMPLE, i
    cdef uint8_t *out = s.wire + s.nwire
    w.payload = out
    if left < sample:
        w.whole = False
        memcpy(out, data, left)
        s.nwire += left
        return left
    for i in range(w.n):
        out[i] = data[i & (SAMPLE - 1)]
    s.nwire += w.n
    return sample


cdef inline uint64_t put_rest(session *s, const uint8_t *data, uint64_t left) noexcept nogil:
    """What the server will not look at, or finds to be no request."""
    if left > MOST_SENT - s.nwire:
        left = MOST_SENT - s.nwire
    memcpy(s.wire + s.nwire, data, left)
    s.nwire += left
    return left


cdef inline void parse(session *s, const uint8_t *data, uint64_t size) noexcept nogil:
    """The input after its head. What is on the wire, and what must come of it."""
    cdef wish *w
    cdef wish new
    cdef uint64_t taken
    s.end = ENDS_GONE
    while size >= REQUEST:
        memset(&new, 0, sizeof(wish))
        if take32(data) != 0x25609513:
            s.end = ENDS_MAGIC
            put_rest(s, data, size)
            return
        new.flags = take16(data + 4)
        new.type = take16(data + 6)
        new.handle = (take64(data + 8) & ~<uint64_t>0xffffffff) | s.nwishes
        new.off = take64(data + 16)
        new.n = take32(data + 24)
        new.whole = True
        new.refusals = refusals_of(s, &new)
        if not admit(s, &new):
            return
        memcpy(s.wire + s.nwire, data, REQUEST)
        give32(s.wire + s.nwire + 12, <uint32_t>s.nwishes)
        s.nwire += REQUEST
        data += REQUEST
        size -= REQUEST
        if new.type == DISC or (new.type == WRITE and new.n > MOST_DRAIN):
            s.end = ENDS_DISC if new.type == DISC else ENDS_OVERSIZED
            put_rest(s, data, size)
            return
        w = &s.wishes[s.nwishes]
        w[0] = new
        s.nwishes += 1
        if w.type == WRITE:
            taken = put_payload(s, w, data, size)
            data += taken
            size -= taken
            if not w.whole:
                s.ragged = True
                return
    s.ragged = size > 0
    put_rest(s, data, size)


cdef inline bint session_init(session *s, const uint8_t *data, uint64_t size) noexcept nogil:
    """False where there is not even a head."""
    if size < HEAD:
        return False
    # not the arrays: they are filled as far as they are used
    s.nwire = s.nwishes = s.most_received = 0
    s.ragged = False
    choose(s, data)
    parse(s, data + HEAD, size - HEAD)
    s.cut = s.nwire * (s.cut + 1) // 256
    if s.piece < s.nwire // MOST_PIECES:
        s.piece = s.nwire // MOST_PIECES
    return True
