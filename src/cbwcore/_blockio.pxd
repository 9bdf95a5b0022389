# Block I/O on one file or block device: whole transfers, O_DIRECT alignment, zeroes, holes.
#
# An I/O engine is a table of operations, `blk_ops`; each entry makes one attempt and may be short.
# The loops above it (R12), the alignment (R13) and the errors (R19) are the same for every engine.
#
# O_DIRECT: [0, direct_end) goes through `fd` in units of `align`. A file whose size is no multiple of it
# has its last page [direct_end, size) served through `tail_fd`, which is buffered; the two never share a page.
# Every function returns 0 or -errno.

from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, ENOTTY, ENXIO, EOPNOTSUPP
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.string cimport memcpy
from cbwcore._sys cimport (
    FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, SEEK_DATA, SEEK_END, SEEK_HOLE, close_once, cond_init, discard_device,
    fallocate_once, load_acquire, load_relaxed, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_t, pthread_cond_wait,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock,
    read_cached, read_once, seek_once, sleep_ns, store_release, sync_once, try_fallocate_beside, write_once, zero_block,
)
from cbwcore._geometry cimport least, round_down, round_up
from cbwcore._reqlist cimport reqlist, reqlist_add, reqlist_conflict, reqlist_remove, request
from cbwcore._buffers cimport bufpool, bufpool_get, bufpool_put
from cbwcore._spin cimport spin, spin_init
from cbwcore._uring cimport E_LATE, has_deadline, ring_io

cdef enum:
    BOUNCE = 1 << 20            # bytes of one bounce buffer
    BOUNCE_BUDGET = 8 << 20     # bytes of all bounce buffers of one user of a file: its guests, or a snapshot's readers
    ZERO_BLOCK = 65536
    ZEROING_UNKNOWN = 0
    ZEROING_FAST = 1
    ZEROING_SLOW = 2            # zeroes must be written
    SHORTEST_TRIES = 100        # attempts in a row that O_DIRECT may end inside one block


cdef struct blk


cdef struct blk_ops:
    int64_t (*pread)(blk *b, int fd, void *buf, uint64_t n, uint64_t off) noexcept nogil
    int64_t (*pread_cached)(blk *b, int fd, void *buf, uint64_t n, uint64_t off) noexcept nogil   # or -EAGAIN
    int64_t (*pwrite)(blk *b, int fd, const void *buf, uint64_t n, uint64_t off) noexcept nogil
    int (*zero)(blk *b, uint64_t off, uint64_t n, bint may_unmap) noexcept nogil
    int (*discard)(blk *b, uint64_t off, uint64_t n) noexcept nogil
    int (*flush)(blk *b) noexcept nogil
    int64_t (*seek)(blk *b, uint64_t off, int whence) noexcept nogil
    bint keeps_deadline         # calls may return E_LATE, see _uring.pxd


cdef struct blk:
    const blk_ops *ops          # the engine, or a test's faults before it; changed only while no I/O is in flight
    const blk_ops *engine
    void *faults                # the plan of the fault-injecting engine, else NULL
    int fd
    int tail_fd                 # -1 where there is no tail
    bint is_device
    bint in_memory              # on tmpfs: no read waits for storage
    bint size_waits             # asking for the size may wait for a server: on a network file system, or FUSE
    spin polls                  # for the ends of its requests
    uint64_t size               # bytes, fixed at open
    uint64_t direct_end         # bytes; `size` where I/O is buffered or the size is aligned
    uint64_t align              # of offsets and lengths through fd; 1 where buffered
    uint64_t mem_align          # of memory; 1 where buffered
    uint64_t zero_align         # of fallocate ranges
    uint64_t cut                # sticky: the file was seen smaller than `size`, and may since have grown again
    uint64_t zeroing[2]         # by may_unmap: what is known of the file system's zeroing; ZEROING_ values
    uint64_t tracked            # writes are listed in `writes`; set once, by the first unaligned write, while drained
    pthread_mutex_t lock        # guards all below
    pthread_cond_t written      # a write or flush ended
    reqlist writes              # writes in flight, where tracked
    uint64_t flushes_begun      # fdatasync calls; at most one is under way
    uint64_t flushes_done
    int flush_error             # sticky, a positive errno
    uint64_t data_start         # [data_start, data_end) was last found to be data: looking for the end of data may walk
    uint64_t data_end           # through all of it
    uint64_t holes_made         # by requests through here, which then end that knowledge


cdef inline int blk_init(blk *b) noexcept nogil:
    pthread_mutex_init(&b.lock, NULL)
    spin_init(&b.polls)
    return cond_init(&b.written)


cdef inline int blk_close(blk *b) noexcept nogil:
    cdef int rc = 0, tail = 0
    if b.fd >= 0:
        rc = close_once(b.fd)
    if b.tail_fd >= 0:
        tail = close_once(b.tail_fd)
    b.fd = b.tail_fd = -1
    return rc if rc < 0 else tail


cdef inline void blk_destroy(blk *b) noexcept nogil:
    pthread_cond_destroy(&b.written)
    pthread_mutex_destroy(&b.lock)


# ---- psync: the plain system calls ----

cdef inline int64_t psync_pread(blk *b, int fd, void *buf, uint64_t n, uint64_t off) noexcept nogil:
    return read_once(fd, buf, n, off)


cdef inline int64_t psync_pread_cached(blk *b, int fd, void *buf, uint64_t n, uint64_t off) noexcept nogil:
    cdef int64_t rc
    if b.in_memory:
        return read_once(fd, buf, n, off)
    rc = read_cached(fd, buf, n, off)
    return -EAGAIN if rc == -EOPNOTSUPP else rc


cdef inline int64_t psync_pwrite(blk *b, int fd, const void *buf, uint64_t n, uint64_t off) noexcept nogil:
    return write_once(fd, buf, n, off)


cdef inline int psync_zero(blk *b, uint64_t off, uint64_t n, bint may_unmap) noexcept nogil:
    return fallocate_once(b.fd, FALLOC_FL_PUNCH_HOLE if may_unmap else FALLOC_FL_ZERO_RANGE, off, n)


cdef inline int psync_discard(blk *b, uint64_t off, uint64_t n) noexcept nogil:
    if b.is_device:
        return discard_device(b.fd, off, n)
    return fallocate_once(b.fd, FALLOC_FL_PUNCH_HOLE, off, n)


cdef inline int psync_flush(blk *b) noexcept nogil:
    return sync_once(b.fd)


cdef inline int64_t psync_seek(blk *b, uint64_t off, int whence) noexcept nogil:
    return seek_once(b.fd, off, whence)


# ---- io_uring: data through the ring; the rest, which is rare and has no use for it, by the plain calls ----

cdef inline int64_t uring_pread(blk *b, int fd, void *buf, uint64_t n, uint64_t off) noexcept nogil:
    return ring_io(&b.polls, False, fd, buf, n, off)


cdef inline int64_t uring_pwrite(blk *b, int fd, const void *buf, uint64_t n, uint64_t off) noexcept nogil:
    return ring_io(&b.polls, True, fd, <void *>buf, n, off)


cdef inline int uring_zero(blk *b, uint64_t off, uint64_t n, bint may_unmap) noexcept nogil:
    return E_LATE if has_deadline() and not b.in_memory else psync_zero(b, off, n, may_unmap)


cdef inline int uring_discard(blk *b, uint64_t off, uint64_t n) noexcept nogil:
    return E_LATE if has_deadline() and not b.in_memory else psync_discard(b, off, n)


cdef inline int64_t uring_seek(blk *b, uint64_t off, int whence) noexcept nogil:
    if has_deadline() and not b.in_memory and (whence != SEEK_END or b.size_waits):
        return E_LATE
    return psync_seek(b, off, whence)


# ---- whole transfers ----

cdef inline bint try_again(int64_t rc) noexcept nogil:
    """Whether one attempt is to be repeated; EAGAIN waits a little first."""
    if rc == -EINTR:
        return True
    if rc == -EAGAIN:
        sleep_ns(100_000)
        return True
    return False


cdef inline int64_t progress(int64_t rc, uint64_t n, uint64_t unit, int *stuck) noexcept nogil:
    """By how many bytes an attempt at `n` that returned `rc` >= 0 moves on: whole blocks. -EIO where it never does."""
    cdef uint64_t done = round_down(<uint64_t>rc, unit)
    stuck[0] = 0 if done else stuck[0] + 1
    return -EIO if <uint64_t>rc > n or stuck[0] == SHORTEST_TRIES else <int64_t>done


cdef inline int read_all(blk *b, int fd, char *buf, uint64_t n, uint64_t off) noexcept nogil:
    """Read exactly `n` bytes. End of file before that is EIO: the disk has been cut (R12)."""
    cdef uint64_t unit = b.align if fd == b.fd else 1
    cdef int64_t rc
    cdef int stuck = 0
    while n:
        rc = b.ops.pread(b, fd, buf, n, off)
        if try_again(rc):
            continue
        if rc == 0:
            store_release(&b.cut, 1)
            return -EIO
        if rc > 0:
            rc = progress(rc, n, unit, &stuck)
        if rc < 0:
            return <int>rc
        buf += rc
        n -= <uint64_t>rc
        off += <uint64_t>rc
    return 0


cdef inline int write_all(blk *b, int fd, const char *buf, uint64_t n, uint64_t off) noexcept nogil:
    """Write exactly `n` bytes."""
    cdef uint64_t unit = b.align if fd == b.fd else 1
    cdef int64_t rc
    cdef int stuck = 0
    while n:
        rc = b.ops.pwrite(b, fd, buf, n, off)
        if try_again(rc):
            continue
        if rc >= 0:
            rc = progress(rc, n, unit, &stuck)
        if rc < 0:
            return <int>rc
        buf += rc
        n -= <uint64_t>rc
        off += <uint64_t>rc
    return 0


# ---- O_DIRECT: bounce buffers and read-modify-write ----

cdef inline bint memory_fits(const blk *b, const void *buf) noexcept nogil:
    return (<uintptr_t>buf & (b.mem_align - 1)) == 0


cdef inline bint range_fits(const blk *b, uint64_t off, uint64_t n) noexcept nogil:
    return ((off | n) & (b.align - 1)) == 0


cdef inline bint blk_needs_tracking(const blk *b, uint64_t off, uint64_t n) noexcept nogil:
    """Whether this write is a read-modify-write and writes are not yet listed; if so the caller drains and tracks."""
    if b.align == 1 or off >= b.direct_end or load_acquire(&b.tracked):
        return False
    return not range_fits(b, off, least(off + n, b.direct_end) - off)


cdef inline void blk_track(blk *b) noexcept nogil:
    """From here writes are listed. The caller has drained the writes in flight."""
    store_release(&b.tracked, 1)


cdef inline void range_lock(blk *b, request *r, uint64_t start, uint64_t end, bint serialising) noexcept nogil:
    """Enter a write into the list, after every write that it must not overlap (R13)."""
    pthread_mutex_lock(&b.lock)
    while reqlist_conflict(&b.writes, start, end, serialising):
        pthread_cond_wait(&b.written, &b.lock)
    r.serialising = serialising
    reqlist_add(&b.writes, r, start, end)
    pthread_mutex_unlock(&b.lock)


cdef inline void range_unlock(blk *b, request *r) noexcept nogil:
    pthread_mutex_lock(&b.lock)
    reqlist_remove(&b.writes, r)
    pthread_cond_broadcast(&b.written)
    pthread_mutex_unlock(&b.lock)


cdef inline int read_bounced(blk *b, bufpool *pool, char *buf, uint64_t n, uint64_t off) noexcept nogil:
    """Read an unaligned range, or into unaligned memory, through an aligned buffer."""
    cdef uint64_t start, end, piece
    cdef void *bounce
    cdef int rc = 0
    while n and rc == 0:
        start = round_down(off, b.align)
        piece = least(n, start + BOUNCE - off)
        end = round_up(off + piece, b.align)
        rc = bufpool_get(pool, end - start, NULL, True, &bounce)
        if rc < 0:
            return rc
        rc = read_all(b, b.fd, <char *>bounce, end - start, start)
        if rc == 0:
            memcpy(buf, <char *>bounce + (off - start), piece)
        bufpool_put(pool, bounce, end - start, NULL)
        buf += piece
        n -= piece
        off += piece
    return rc


cdef inline int read_modify_write(blk *b, char *bounce, uint64_t start, uint64_t end, const char *buf, uint64_t n,
                                  uint64_t off) noexcept nogil:
    """Write [off, off + n) inside the aligned [start, end): read the blocks that are only partly written first."""
    cdef uint64_t last = end - b.align
    cdef int rc = 0
    if off > start:
        rc = read_all(b, b.fd, bounce, b.align, start)
    if rc == 0 and off + n < end and (last > start or off == start):
        rc = read_all(b, b.fd, bounce + (last - start), b.align, last)
    if rc < 0:
        return rc
    memcpy(bounce + (off - start), buf, n)
    return write_all(b, b.fd, bounce, end - start, start)


cdef inline int write_bounced(blk *b, bufpool *pool, const char *buf, uint64_t n, uint64_t off) noexcept nogil:
    """Write an unaligned range, or from unaligned memory. A piece that needs read-modify-write holds the range lock."""
    cdef uint64_t start, end, piece
    cdef void *bounce
    cdef request r
    cdef bint listed
    cdef int rc = 0
    while n and rc == 0:
        start = round_down(off, b.align)
        piece = least(n, start + BOUNCE - off)
        end = round_up(off + piece, b.align)
        rc = bufpool_get(pool, end - start, NULL, True, &bounce)
        if rc < 0:
            return rc
        listed = load_acquire(&b.tracked)
        if listed:
            range_lock(b, &r, start, end, not range_fits(b, off, piece))
        rc = read_modify_write(b, <char *>bounce, start, end, buf, piece, off)
        if listed:
            range_unlock(b, &r)
        bufpool_put(pool, bounce, end - start, NULL)
        buf += piece
        n -= piece
        off += piece
    return rc


cdef inline int write_listed(blk *b, const char *buf, uint64_t n, uint64_t off) noexcept nogil:
    cdef request r
    cdef int rc
    range_lock(b, &r, off, off + n, False)
    rc = write_all(b, b.fd, buf, n, off)
    range_unlock(b, &r)
    return rc


# ---- what the engine calls ----

cdef inline int blk_read(blk *b, bufpool *pool, void *buf, uint64_t n, uint64_t off) noexcept nogil:
    """Read [off, off + n), which lies inside the disk. `pool`: for bounce buffers."""
    cdef uint64_t direct = n if off + n <= b.direct_end else (b.direct_end - off if off < b.direct_end else 0)
    cdef int rc = 0
    if direct:
        if b.align == 1 or (range_fits(b, off, direct) and memory_fits(b, buf)):
            rc = read_all(b, b.fd, <char *>buf, direct, off)
        else:
            rc = read_bounced(b, pool, <char *>buf, direct, off)
    if rc == 0 and direct < n:
        rc = read_all(b, b.tail_fd, <char *>buf + direct, n - direct, off + direct)
    return rc


cdef inline int blk_read_cached(blk *b, void *buf, uint64_t n, uint64_t off) noexcept nogil:
    """blk_read() of what is in memory; -EAGAIN where not all of it is, or anything is odd: blk_read() will tell."""
    if b.align > 1 or b.ops.pread_cached(b, b.fd, buf, n, off) != <int64_t>n:
        return -EAGAIN
    return 0


cdef inline int64_t seek(blk *b, uint64_t off, int whence) noexcept nogil:
    """What lseek() says once nothing interrupts it, as a signal does that meets a FUSE or network file system (R12)."""
    cdef int64_t rc = -EINTR
    while try_again(rc):
        rc = b.ops.seek(b, off, whence)
    return rc


cdef inline int blk_check_size(blk *b) noexcept nogil:
    """-EIO, from then on, where the file has become smaller than it was when opened (R12)."""
    cdef int64_t size
    if load_acquire(&b.cut):
        return -EIO
    size = seek(b, 0, SEEK_END)
    if size < 0:
        return <int>size
    if <uint64_t>size >= b.size:
        return 0
    store_release(&b.cut, 1)
    return -EIO


cdef inline int blk_read_checked(blk *b, bufpool *pool, void *buf, uint64_t n, uint64_t off) noexcept nogil:
    """blk_read() of data that must be T0's: of a file that was cut, and perhaps written again, it may be no more."""
    cdef int rc = blk_read(b, pool, buf, n, off)
    return rc if rc < 0 else blk_check_size(b)


cdef inline int blk_write(blk *b, bufpool *pool, const void *buf, uint64_t n, uint64_t off) noexcept nogil:
    """Write [off, off + n), which lies inside the disk. A write that reaches the end would heal a file that was cut, and
    hide it: such a write looks first."""
    cdef uint64_t direct = n if off + n <= b.direct_end else (b.direct_end - off if off < b.direct_end else 0)
    cdef int rc = blk_check_size(b) if off + n == b.size else 0
    if rc == 0 and direct:
        if b.align == 1:
            rc = write_all(b, b.fd, <const char *>buf, direct, off)
        elif not (range_fits(b, off, direct) and memory_fits(b, buf)):
            rc = write_bounced(b, pool, <const char *>buf, direct, off)
        elif load_acquire(&b.tracked):
            rc = write_listed(b, <const char *>buf, direct, off)
        else:
            rc = write_all(b, b.fd, <const char *>buf, direct, off)
    if rc == 0 and direct < n:
        rc = write_all(b, b.tail_fd, <const char *>buf + direct, n - direct, off + direct)
    return rc


cdef inline int write_zero_data(blk *b, bufpool *pool, uint64_t off, uint64_t end) noexcept nogil:
    cdef uint64_t n
    cdef int rc = 0
    while off < end and rc == 0:
        n = least(ZERO_BLOCK - (off & (ZERO_BLOCK - 1)), end - off)
        rc = blk_write(b, pool, zero_block, n, off)
        off += n
    return rc


cdef inline uint64_t known_data(blk *b, uint64_t off, uint64_t *made) noexcept nogil:
    """How far data are known to go from `off` on; `off` itself: not at all. What is called data may meanwhile be a hole that
    another program has made: that is no lie to anybody."""
    cdef uint64_t end = off
    pthread_mutex_lock(&b.lock)
    made[0] = b.holes_made
    if b.data_start <= off < b.data_end:
        end = b.data_end
    pthread_mutex_unlock(&b.lock)
    return end


cdef inline void note_data(blk *b, uint64_t start, uint64_t end, uint64_t made) noexcept nogil:
    """`made`: as known_data() gave it before the look."""
    pthread_mutex_lock(&b.lock)
    if made == b.holes_made:
        b.data_start = start
        b.data_end = end
    pthread_mutex_unlock(&b.lock)


cdef inline void forget_data(blk *b) noexcept nogil:
    """After holes may have been made."""
    pthread_mutex_lock(&b.lock)
    b.data_end = 0
    b.holes_made += 1
    pthread_mutex_unlock(&b.lock)


cdef inline int zero_range(blk *b, uint64_t off, uint64_t end, bint may_unmap) noexcept nogil:
    """fallocate over an aligned range, listed like any write."""
    cdef request r
    cdef bint listed = b.align > 1 and load_acquire(&b.tracked)
    cdef int rc = -EINTR
    if listed:
        range_lock(b, &r, off, end, False)
    while try_again(rc):
        rc = b.ops.zero(b, off, end - off, may_unmap)
    forget_data(b)
    if listed:
        range_unlock(b, &r)
    return rc


cdef inline bint blk_zeroes_fast(blk *b, uint64_t off, uint64_t n, bint may_unmap) noexcept nogil:
    """Whether zeroing [off, off + n) need not write them, as far as can be known without a try. A part of a block is written,
    which is as fast. In a directory where no file can be made the first try tells."""
    cdef int known
    if round_up(off, b.zero_align) >= round_down(off + n, b.zero_align):
        return True
    if b.is_device:
        return may_unmap and load_relaxed(&b.zeroing[may_unmap]) != ZEROING_SLOW
    if load_relaxed(&b.zeroing[may_unmap]) == ZEROING_UNKNOWN:
        known = try_fallocate_beside(b.fd, FALLOC_FL_PUNCH_HOLE if may_unmap else FALLOC_FL_ZERO_RANGE)
        store_release(&b.zeroing[may_unmap], ZEROING_SLOW if known == 0 else ZEROING_FAST)
    return load_relaxed(&b.zeroing[may_unmap]) == ZEROING_FAST


cdef inline int blk_write_zeroes(blk *b, bufpool *pool, uint64_t off, uint64_t n, bint may_unmap,
                                 bint fast) noexcept nogil:
    """Make [off, off + n) read as zeroes: deallocated where allowed and possible, else written, or, with `fast`, refused
    with -EOPNOTSUPP. For a block device the kernel may write zeroes itself, unless it may unmap."""
    cdef uint64_t end = off + n
    cdef uint64_t first = round_up(off, b.zero_align), last = round_down(end, b.zero_align)
    cdef int rc = blk_check_size(b) if end == b.size else 0
    if rc < 0:
        return rc
    if first >= last:
        return write_zero_data(b, pool, off, end)
    rc = -EOPNOTSUPP if fast and b.is_device and not may_unmap else zero_range(b, first, last, may_unmap)
    if rc == -EOPNOTSUPP or rc == -EINVAL:
        store_release(&b.zeroing[may_unmap], ZEROING_SLOW)
        if fast:
            return -EOPNOTSUPP
        return write_zero_data(b, pool, off, end)
    if rc == 0:
        rc = write_zero_data(b, pool, off, first)
    if rc == 0:
        rc = write_zero_data(b, pool, last, end)
    return -EIO if rc == -EOPNOTSUPP else rc        # something was changed, so it is no refusal


cdef inline int blk_discard(blk *b, uint64_t off, uint64_t n) noexcept nogil:
    """Give [off, off + n) back to the storage, as far as whole blocks go. -EOPNOTSUPP where the storage cannot."""
    cdef uint64_t end = round_down(off + n, b.zero_align)
    cdef request r
    cdef bint listed = b.align > 1 and load_acquire(&b.tracked)
    cdef int rc = -EINTR
    off = round_up(off, b.zero_align)
    if off >= end:
        return 0
    if listed:
        range_lock(b, &r, off, end, False)
    while try_again(rc):
        rc = b.ops.discard(b, off, end - off)
    forget_data(b)
    if listed:
        range_unlock(b, &r)
    return -EOPNOTSUPP if rc == -ENOTTY or rc == -EINVAL else rc


cdef inline int blk_flush(blk *b) noexcept nogil:
    """Every write that is complete now is durable after return 0 (R14). A failure is for good: the kernel reports it once,
    forgets what it could not write, and would call the next fdatasync a success.

    One fdatasync at a time, so that nobody misses its failure; all who come while one runs share the next."""
    cdef uint64_t ticket
    cdef int rc = -EINTR
    pthread_mutex_lock(&b.lock)
    ticket = b.flushes_begun + 1
    while b.flushes_done < ticket and b.flushes_begun > b.flushes_done:
        pthread_cond_wait(&b.written, &b.lock)
    if b.flush_error or b.flushes_done >= ticket:
        rc = -b.flush_error
        pthread_mutex_unlock(&b.lock)
        return rc
    b.flushes_begun += 1
    pthread_mutex_unlock(&b.lock)
    while try_again(rc):
        rc = b.ops.flush(b)
    pthread_mutex_lock(&b.lock)
    if rc < 0:
        b.flush_error = -rc
    b.flushes_done = b.flushes_begun
    pthread_cond_broadcast(&b.written)
    pthread_mutex_unlock(&b.lock)
    return rc


cdef inline int blk_next_data(blk *b, uint64_t off, uint64_t end, uint64_t *data) noexcept nogil:
    """Where in [off, end) the first byte is that the file system does not know to be in a hole; `end`: all of it is, and
    reads as zeroes. What the file system cannot tell counts as data. 0 or -errno."""
    cdef int64_t pos = -EINVAL if b.is_device else seek(b, off, SEEK_DATA)
    data[0] = off
    if pos == -ENXIO or pos > <int64_t>off:
        data[0] = end if pos < 0 else least(<uint64_t>pos, end)
        return blk_check_size(b)        # a file cut short must not pass for one that reads as zeroes
    return 0 if pos >= 0 or pos == -EINVAL or pos == -EOPNOTSUPP else <int>pos


cdef inline int64_t blk_extent(blk *b, uint64_t off, uint64_t end, bint *hole) noexcept nogil:
    """End of the extent that begins at `off`, at most `end`; -errno."""
    cdef uint64_t made, data = known_data(b, off, &made)
    cdef int64_t pos
    hole[0] = False
    if data > off:
        return <int64_t>least(data, end)
    pos = blk_next_data(b, off, end, &data)
    hole[0] = data > off
    if pos < 0 or hole[0]:
        return pos if pos < 0 else <int64_t>data
    if b.is_device:
        return <int64_t>end
    pos = seek(b, off, SEEK_HOLE)
    if pos == -EINVAL or pos == -EOPNOTSUPP or (pos >= 0 and pos <= <int64_t>off):
        return <int64_t>end
    if pos < 0 and pos != -ENXIO:
        return pos
    note_data(b, off, <uint64_t>pos, made)
    return <int64_t>least(<uint64_t>pos, end)
