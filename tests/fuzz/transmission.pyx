# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The libFuzzer target of the compiled transmission loop, under AddressSanitizer; run.sh builds it and runs it.

It serves one session (session.pxd) on a disk of patterns and holes, or on a snapshot of it, and judges every reply and
what the disk holds afterwards (judge.pxd). No interpreter is started: it is made of the core's ``cdef inline`` parts
alone. A file as its argument is replayed, and told of where it fails.
"""

from libc.errno cimport EAGAIN, EIO, ENOSPC, EOPNOTSUPP
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort, calloc, free, malloc
from libc.string cimport memcmp, memcpy, memmove, memset
from posix.unistd cimport close, dup, ftruncate

from cbwcore._sys cimport (
    FALLOC_FL_PUNCH_HOLE, add_seq_cst, cond_init, fallocate_once, pthread_cond_broadcast, pthread_cond_t,
    pthread_cond_wait, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, pthread_t, read_once,
    sleep_ns, thread_start, write_once,
)
from cbwcore._geometry cimport least, most, round_down, round_up
from cbwcore._bitmap cimport bitmap, bitmap_init, bitmap_put
from cbwcore._buffers cimport bufpool, bufpool_init, bufpool_reserve, bufpool_set_limit
from cbwcore._nbd_room cimport KEEP_BYTES, room, room_divide, room_init
from cbwcore._blockio cimport (
    blk, blk_init, blk_ops, psync_discard, psync_flush, psync_pread, psync_pread_cached, psync_pwrite, psync_seek, psync_zero,
)
from cbwcore._snapshot cimport (
    BREAK_GUEST_WRITE, BREAK_SNAPSHOT, BROKEN, failure, snapshot, snapshot_init, snapshot_put, snapshot_read, snapshot_release,
)
from cbwcore._engine cimport (
    GUEST_WRITE, GUEST_WRITE_ZEROES, arm, disarm, disk, disk_init, guest_write, pin, total_readers, total_writers,
)
from cbwcore._nbd_helpers cimport helpers_init, new_eventfd
from cbwcore._nbd cimport conn_destroy, conn_init, conn_serve, conn_stop, conn_visit, nbd_conn, nbd_server

from session cimport (
    COPYING_DISK, DIRTY_SHIFT, FAULT_FLUSH, FAULT_NO_DISCARD, FAULT_NONE, FAULT_NO_ZEROES, FAULT_READ, FAULT_SEEK, FAULT_SHORT,
    FAULT_SLOW_READ, FAULT_SLOW_TARGET, FAULT_SLOW_WRITE, FAULT_TARGET_FULL, FAULT_TARGET_READ, FAULT_WRITE_FULL, HALF_CLOSE,
    HEAD, MOST_DRAIN, MOST_RECEIVED, MOST_REQUEST, MOST_SENT, READ_ONLY_DISK, REQUEST, SAMPLE, SHIFT, SIZE, SNAPSHOT, STALL,
    STOP, VANISH, WRITE, give32, session, session_init, take16, take32,
)
from judge cimport check_disk, check_session, describe, dirty, verdict

cdef extern from * nogil:
    """
    #include <dirent.h>
    #include <linux/sockios.h>
    #include <sched.h>
    #include <stdio.h>

    static int make_file(uint64_t n) {
        int fd = memfd_create("fuzz", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, (off_t)n)) {
            perror("memfd");
            abort();
        }
        return fd;
    }
    static void make_sockets(int *ours, int *theirs, int our_bytes, int their_bytes) {
        int fds[2];
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds)) {
            perror("socketpair");
            abort();
        }
        *ours = fds[0];
        *theirs = fds[1];
        setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &our_bytes, sizeof our_bytes);
        setsockopt(fds[1], SOL_SOCKET, SO_SNDBUF, &their_bytes, sizeof their_bytes);
    }
    static inline int64_t try_send(int fd, const void *p, uint64_t n) {
        ssize_t rc = send(fd, p, n, MSG_DONTWAIT | MSG_NOSIGNAL);
        return rc < 0 ? -errno : rc;
    }
    static inline int64_t try_recv(int fd, void *p, uint64_t n) {
        ssize_t rc = recv(fd, p, n, MSG_DONTWAIT);
        return rc < 0 ? -errno : rc;
    }
    static inline void shut_sending(int fd) { shutdown(fd, SHUT_WR); }
    static inline void poll_client(int fd, int to_send, int to_recv) {
        struct pollfd p = { .fd = fd, .events = (to_send ? POLLOUT : 0) | (to_recv ? POLLIN : 0) };
        poll(&p, 1, 1000);
    }
    /* Let the server take what was sent, if it is quick. */
    static inline void let_take(int fd) {
        int left = 1;
        for (int i = 0; i < 4 && left; i++) {
            sched_yield();
            if (ioctl(fd, SIOCOUTQ, &left))
                return;
        }
    }
    static inline int count_entries(const char *path) {
        int n = 0;
        DIR *d = opendir(path);
        while (d && readdir(d))
            n++;
        if (d)
            closedir(d);
        return n;
    }
    /* What a mutation likes to put into a request. */
    static const uint64_t odd_offsets[] = { 0, 1, 511, 512, 4095, 4096, 16383, 16384, 16385, 65536, 131072, 655360, 655361,
        656359, 656360, 656361, 656360 - 4096, 1ull << 31, (1ull << 32) - 1, 1ull << 32, (1ull << 63) - 1, 1ull << 63, ~0ull,
        ~0ull - 4095, ~0ull - 656360 };
    static const uint32_t odd_lengths[] = { 0, 1, 7, 8, 9, 511, 512, 513, 4096, 16384, 16385, 65535, 65536, 65537, 131043, 131044,
        131045, 131072, 131073, 262143, 262144, 262145, 524287, 524288, 524289, 656360, 1u << 31, ~0u, ~0u - 7, ~0u - 27 };
    #define ODD_OFFSETS (sizeof odd_offsets / sizeof *odd_offsets)
    #define ODD_LENGTHS (sizeof odd_lengths / sizeof *odd_lengths)

    size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
    """
    int make_file(uint64_t n)
    void make_sockets(int *ours, int *theirs, int our_bytes, int their_bytes)
    int64_t try_send(int fd, const void *p, uint64_t n)
    int64_t try_recv(int fd, void *p, uint64_t n)
    void shut_sending(int fd)
    void poll_client(int fd, bint to_send, bint to_recv)
    void let_take(int fd)
    int count_entries(const char *path)
    void shut_all(int fd)
    const uint64_t *odd_offsets
    const unsigned int *odd_lengths
    const uint64_t ODD_OFFSETS
    const uint64_t ODD_LENGTHS
    size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most)

cdef enum:
    BUDGET = 64 << 20
    CONNECTIONS = 4
    TIGHT = 512 << 10           # two requests of MOST_REQUEST
    PATIENT_US = 60_000_000
    HASTY_US = 500
    SOCKET_BYTES = 400_000
    LITTLE = 150_000            # bytes that a socket surely takes
    STALLED_BYTES = 4096        # of a socket that nobody reads
    SLOW_NS = 300_000           # longer than what the loop takes for no waiting
    SLOW_CALLS = 3
    BESIDE_WRITES = 3           # at a time
    MOST_BESIDE = 40            # of a session
    BESIDE_BYTES = 16384        # of one, at most
    MANY_HELPERS = 40
    LOOK = 4096                 # sessions between two looks at descriptors and threads
    MUTATIONS = 6


cdef struct file:               # behind a blk, as its `faults`
    bint is_target
    uint64_t calls              # that a fault may hit
    uint64_t writes             # calls that change the file
    pthread_mutex_t lock
    uint64_t start              # bytes: where it may have been changed
    uint64_t end


cdef struct client:             # the thread of a client that does not send all before it reads anything
    pthread_t thread
    pthread_mutex_t lock
    pthread_cond_t changed
    bint busy
    int fd
    uint64_t sent
    uint64_t pieces
    uint64_t writes             # beside


cdef session S
cdef nbd_server *SERVER
cdef bufpool POOL
cdef disk D
cdef snapshot *SNAP             # of D, for this session
cdef bint SNAP_OPEN
cdef nbd_conn *CONN
cdef bitmap DIRTY
cdef file DISK_FILE
cdef file TARGET_FILE
cdef int TARGET_FD
cdef client CLIENT
cdef uint8_t *T0
cdef uint8_t *ZEROES
cdef uint8_t *CONTENT           # of the disk, as far as it has been looked at, and T0 else
cdef uint8_t *GOT
cdef uint8_t *BESIDE            # what write_beside() writes
cdef uint64_t NGOT
cdef uint64_t SESSIONS
cdef int DESCRIPTORS
cdef uint64_t SEED


cdef void demand(bint condition, const char *what) noexcept nogil:
    """What must hold of the core after each session."""
    if not condition:
        fprintf(stderr, b"ORACLE: after the session: %s\n", what)
        describe(&S)
        abort()


# ---- files that count, and fail as the session says ----

cdef blk_ops FILES


cdef bint hit(blk *b, int fault) noexcept nogil:
    """Whether a call meets the fault; being slow passes."""
    cdef file *f = <file *>b.faults
    cdef uint64_t call
    if S.fault != fault:
        return False
    call = add_seq_cst(&f.calls, 1)
    return call >= <uint64_t>S.fault_at and (fault > FAULT_SLOW_TARGET or call < <uint64_t>S.fault_at + SLOW_CALLS)


cdef void changed(blk *b, uint64_t off, uint64_t n) noexcept nogil:
    cdef file *f = <file *>b.faults
    pthread_mutex_lock(&f.lock)
    f.writes += 1
    f.start = least(f.start, off)
    f.end = most(f.end, off + n)
    pthread_mutex_unlock(&f.lock)


cdef int64_t file_pread(blk *b, int fd, void *buf, uint64_t n, uint64_t off) noexcept nogil:
    cdef bint is_target = (<file *>b.faults).is_target
    if hit(b, FAULT_TARGET_READ if is_target else FAULT_READ):
        return -EIO
    if not is_target and hit(b, FAULT_SLOW_READ):
        sleep_ns(SLOW_NS)
    if not is_target and n > 1 and hit(b, FAULT_SHORT):
        n //= 2
    return psync_pread(b, fd, buf, n, off)


cdef int64_t file_pread_cached(blk *b, int fd, void *buf, uint64_t n, uint64_t off) noexcept nogil:
    if S.fault in (FAULT_READ, FAULT_TARGET_READ, FAULT_SHORT):
        return -EAGAIN
    if hit(b, FAULT_SLOW_READ):
        sleep_ns(SLOW_NS)
    return psync_pread_cached(b, fd, buf, n, off)


cdef int64_t file_pwrite(blk *b, int fd, const void *buf, uint64_t n, uint64_t off) noexcept nogil:
    cdef bint is_target = (<file *>b.faults).is_target
    if hit(b, FAULT_SLOW_TARGET if is_target else FAULT_SLOW_WRITE):
        sleep_ns(SLOW_NS)
    if hit(b, FAULT_TARGET_FULL if is_target else FAULT_WRITE_FULL):
        return -ENOSPC
    if not is_target and n > 1 and hit(b, FAULT_SHORT):
        n //= 2
    changed(b, off, n)
    return psync_pwrite(b, fd, buf, n, off)


cdef int file_zero(blk *b, uint64_t off, uint64_t n, bint may_unmap) noexcept nogil:
    if hit(b, FAULT_NO_ZEROES):
        return -EOPNOTSUPP
    changed(b, off, n)
    return psync_zero(b, off, n, may_unmap)


cdef int file_discard(blk *b, uint64_t off, uint64_t n) noexcept nogil:
    if hit(b, FAULT_NO_DISCARD):
        return -EOPNOTSUPP
    changed(b, off, n)
    return psync_discard(b, off, n)


cdef int file_flush(blk *b) noexcept nogil:
    return -EIO if hit(b, FAULT_FLUSH) else psync_flush(b)


cdef int64_t file_seek(blk *b, uint64_t off, int whence) noexcept nogil:
    return -EIO if not (<file *>b.faults).is_target and hit(b, FAULT_SEEK) else psync_seek(b, off, whence)


cdef void file_init(file *f, bint is_target) noexcept nogil:
    f.is_target = is_target
    f.start = SIZE
    pthread_mutex_init(&f.lock, NULL)


cdef void file_forget(file *f) noexcept nogil:
    f.calls = f.writes = f.end = 0
    f.start = SIZE


# ---- the disk ----

cdef bint is_hole(uint64_t cluster) noexcept nogil:
    return cluster % 5 == 3


cdef uint8_t pattern(uint64_t i) noexcept nogil:
    """Of T0: a fifth are holes, a fifth zeroes on the disk."""
    cdef uint64_t cluster = i >> SHIFT
    cdef uint64_t x = (i + 1) * <uint64_t>0x9E3779B97F4A7C15
    return 0 if cluster % 5 >= 3 else <uint8_t>(1 + (x >> 40) % 255)


cdef void restore(uint64_t start, uint64_t end) noexcept nogil:
    """The disk as it was at T0, in the clusters that [start, end) touches."""
    cdef uint64_t c, first = start >> SHIFT, last = round_up(end, 1 << SHIFT) >> SHIFT
    if start >= end:
        return
    start = first << SHIFT
    end = least(last << SHIFT, SIZE)
    write_once(D.io.fd, T0 + start, end - start, start)
    memcpy(CONTENT + start, T0 + start, end - start)
    for c in range(first, last):
        if is_hole(c):
            fallocate_once(D.io.fd, FALLOC_FL_PUNCH_HOLE, c << SHIFT, 1 << SHIFT)


cdef void attach(blk *b, int fd, file *f) noexcept nogil:
    b.ops = &FILES
    b.faults = f
    b.fd = fd
    b.tail_fd = -1
    b.size = b.direct_end = SIZE
    b.align = b.mem_align = 1
    b.zero_align = 4096
    b.in_memory = not S.uncached


cdef void make_disk() noexcept nogil:
    global TARGET_FD
    cdef uint64_t i
    cdef int rc = disk_init(&D) or blk_init(&D.io)
    file_init(&DISK_FILE, False)
    file_init(&TARGET_FILE, True)
    attach(&D.io, make_file(SIZE), &DISK_FILE)
    D.closed = 0
    TARGET_FD = make_file(SIZE)
    for i in range(SIZE):
        T0[i] = pattern(i)
    restore(0, SIZE)
    if rc or bitmap_init(&DIRTY, (SIZE >> DIRTY_SHIFT) + 1, False):
        abort()
    for i in range(DIRTY.nbits):
        bitmap_put(&DIRTY, i, i + 1, dirty(i))


cdef void take_snapshot() noexcept nogil:
    """Arm a snapshot of the disk, on an empty target."""
    global SNAP, SNAP_OPEN
    cdef disk *owner = &D
    cdef int rc
    SNAP = <snapshot *>calloc(1, sizeof(snapshot))
    ftruncate(TARGET_FD, 0)
    ftruncate(TARGET_FD, SIZE)
    rc = snapshot_init(SNAP, &D.io, &POOL, &D.clock_skew, SIZE, SHIFT, False) or blk_init(&SNAP.target)
    attach(&SNAP.target, dup(TARGET_FD), &TARGET_FILE)
    SNAP.target_is_new = True
    SNAP.policy = BREAK_SNAPSHOT if S.break_snapshot else BREAK_GUEST_WRITE
    SNAP.target_limit = ~<uint64_t>0
    SNAP.max_copies = 4
    SNAP.copy_run = 4 << SHIFT
    rc = rc or bufpool_reserve(&POOL, &SNAP.own, SNAP.copy_run) or arm(&owner, 1, &SNAP, &owner, 1, NULL, 0)
    if rc:
        abort()
    SNAP_OPEN = True


cdef void close_snapshot() noexcept nogil:
    """As Snapshot.close(): waits for requests inside, and leaves the structure to the connection, if it has it."""
    global SNAP_OPEN
    SNAP_OPEN = False
    disarm(&D, SNAP)
    snapshot_release(SNAP)
    snapshot_put(SNAP)


cdef void write_beside(uint64_t i) noexcept nogil:
    """A guest write that the session knows nothing of, behind the snapshot that it reads."""
    cdef failure why
    cdef uint64_t off = (i * 37 % 150) << SHIFT
    if i % 3:
        guest_write(&D, GUEST_WRITE, BESIDE, off + 512 * (i % 3), 4096 + i % 2 * 9000, False, False, &why)
    else:
        guest_write(&D, GUEST_WRITE_ZEROES, NULL, off, 3 << SHIFT, False, i % 2, &why)


cdef void write_some_beside() noexcept nogil:
    cdef uint64_t end = CLIENT.writes + BESIDE_WRITES
    while CLIENT.writes < end:
        write_beside(CLIENT.writes)
        CLIENT.writes += 1


# ---- the client ----

cdef void client_leaves() noexcept nogil:
    """It is in the middle, and what was to happen there happens."""
    if S.close_snapshot and SNAP_OPEN:
        close_snapshot()
    if S.leave == STOP:
        conn_stop(CONN)
    if S.leave == VANISH:
        close(CLIENT.fd)
        CLIENT.fd = -1


cdef bint client_sends(uint64_t upto) noexcept nogil:
    """One piece, as far as the socket takes it; False where the server is gone."""
    cdef int64_t rc
    upto = least(upto, CLIENT.sent + S.piece)
    rc = try_send(CLIENT.fd, S.wire + CLIENT.sent, upto - CLIENT.sent)
    if rc > 0:
        CLIENT.sent += <uint64_t>rc
        CLIENT.pieces += 1
        if S.piece < MOST_SENT:
            let_take(CLIENT.fd)
    return rc > 0 or rc == -EAGAIN


cdef bint client_receives() noexcept nogil:
    """What there is; False at the end."""
    global NGOT
    cdef int64_t rc = try_recv(CLIENT.fd, GOT + NGOT, MOST_RECEIVED + 1 - NGOT)
    if rc > 0:
        NGOT += <uint64_t>rc
        demand(NGOT <= MOST_RECEIVED, b"more came than all replies together")
    return rc > 0 or rc == -EAGAIN


cdef void client_session() noexcept nogil:
    """Send and receive until the server is done, or the client leaves."""
    cdef bint sending = True, before = S.cut > 0, receiving = True
    while receiving:
        if sending:
            sending = S.nwire > 0 and client_sends(S.cut if before else S.nwire) and CLIENT.sent < S.nwire
            if not sending and not (S.leave == STALL and S.ragged):
                shut_sending(CLIENT.fd)
        if S.guest_writes and CLIENT.writes < MOST_BESIDE:
            write_some_beside()
        if before and (CLIENT.sent >= S.cut or not sending):
            before = False
            client_leaves()
            if CLIENT.fd < 0:
                return
        if S.leave != STALL:
            receiving = client_receives()
        elif not sending:
            return
        if receiving:
            poll_client(CLIENT.fd, sending, S.leave != STALL)


cdef void *client_main(void *arg) noexcept nogil:
    pthread_mutex_lock(&CLIENT.lock)
    while True:
        while not CLIENT.busy:
            pthread_cond_wait(&CLIENT.changed, &CLIENT.lock)
        pthread_mutex_unlock(&CLIENT.lock)
        client_session()
        pthread_mutex_lock(&CLIENT.lock)
        CLIENT.busy = False
        pthread_cond_broadcast(&CLIENT.changed)
    return NULL


cdef void client_start() noexcept nogil:
    pthread_mutex_lock(&CLIENT.lock)
    CLIENT.busy = True
    pthread_cond_broadcast(&CLIENT.changed)
    pthread_mutex_unlock(&CLIENT.lock)


cdef void client_join() noexcept nogil:
    pthread_mutex_lock(&CLIENT.lock)
    while CLIENT.busy:
        pthread_cond_wait(&CLIENT.changed, &CLIENT.lock)
    pthread_mutex_unlock(&CLIENT.lock)


# ---- the server ----

cdef void make_server() noexcept nogil:
    global SERVER
    SERVER = <nbd_server *>calloc(1, sizeof(nbd_server))
    SERVER.max_request = MOST_REQUEST
    SERVER.max_drain = MOST_DRAIN
    SERVER.event_fd = new_eventfd()
    if SERVER.event_fd < 0 or room_init(&SERVER.memory, BUDGET, CONNECTIONS, MOST_REQUEST) or helpers_init(&SERVER.crew, conn_visit):
        abort()


cdef void make_connection() noexcept nogil:
    """To the export that the session is for."""
    global CONN
    cdef uint64_t limit = TIGHT if S.tight else BUDGET
    cdef bufpool *buffers = &SERVER.memory.buffers
    SERVER.max_extents = S.extents
    SERVER.stall_ns = <int64_t>1000 * (HASTY_US if S.leave == STALL else PATIENT_US)
    buffers.keep = KEEP_BYTES if S.warm else 0
    if buffers.limit != limit and bufpool_set_limit(buffers, limit):
        abort()
    room_divide(&SERVER.memory, limit, CONNECTIONS, MOST_REQUEST)
    CONN = <nbd_conn *>calloc(1, sizeof(nbd_conn))
    conn_init(CONN, SERVER)
    CONN.d = &D
    CONN.size = SIZE
    CONN.read_only = S.kind == READ_ONLY_DISK or S.kind == SNAPSHOT
    CONN.structured = S.structured
    CONN.always_waits = S.always_waits
    CONN.ncontexts = S.ncontexts if S.ncontexts < 3 else 2
    if S.ncontexts > 1:
        CONN.contexts[1 if S.ncontexts == 2 else 0].dirty = &DIRTY
        CONN.contexts[1 if S.ncontexts == 2 else 0].shift = DIRTY_SHIFT
    if S.kind == SNAPSHOT:
        pin(SNAP)
        CONN.s = SNAP
        CONN.can_reclaim = S.discard


cdef bint is_plain() noexcept nogil:
    """Whether it all fits into the sockets, so that nobody need read while it is served."""
    return (S.leave == HALF_CLOSE and S.piece == MOST_SENT and not S.guest_writes and not S.close_snapshot
            and S.nwire <= LITTLE and S.most_received <= LITTLE)


cdef int serve() noexcept nogil:
    """The session, from the first byte sent to the last received; what conn_serve() returned."""
    cdef int server = -1, end
    cdef bint plain = is_plain()
    make_sockets(&CLIENT.fd, &server, SOCKET_BYTES, STALLED_BYTES if S.leave == STALL else SOCKET_BYTES)
    CLIENT.sent = CLIENT.pieces = CLIENT.writes = 0
    if plain:
        client_sends(S.nwire)
        demand(CLIENT.sent == S.nwire, b"the socket does not take it all")
        shut_sending(CLIENT.fd)
    else:
        client_start()
    end = conn_serve(CONN, server)
    shut_all(server)
    if not plain:
        client_join()
    while CLIENT.fd >= 0 and client_receives():
        pass
    close(server)
    if CLIENT.fd >= 0:
        close(CLIENT.fd)
    return end


# ---- what must hold afterwards ----

cdef void check_core() noexcept nogil:
    """Nothing is held any more."""
    cdef room *m = &SERVER.memory
    demand(CONN.running == 0, b"a request is in flight")
    demand(m.buffers.used == m.buffers.kept and m.taken == 0 and m.first == NULL, b"bytes in flight are not given back")
    demand(CONN.memory.charged == 0 and not CONN.memory.own_busy, b"the connection still has memory")
    demand(total_writers(&D) == 0 and total_readers(&D) == 0, b"a user of the disk is left")
    demand(D.bounce.used == D.bounce.kept, b"a bounce buffer is not given back")
    demand(SERVER.crew.count <= MANY_HELPERS, b"too many helpers")
    if SNAP_OPEN:
        demand(SNAP.users == 0 and SNAP.copies.count == 0 and SNAP.frozen.count == 0 and SNAP.target_reads.count == 0,
               b"a user of the snapshot is left")


cdef void check_copies() noexcept nogil:
    """The snapshot that the guest wrote beside is T0 where it was written to."""
    cdef uint64_t start = round_down(DISK_FILE.start, 1 << SHIFT), n
    cdef bint in_target = False
    cdef int rc
    if DISK_FILE.start >= DISK_FILE.end or SNAP.state == BROKEN:
        return
    S.fault = FAULT_NONE
    n = least(round_up(DISK_FILE.end, 1 << SHIFT), SIZE) - start
    rc = snapshot_read(SNAP, <char *>CONTENT + start, n, start, &in_target)
    demand(rc == 0, b"the snapshot cannot be read")
    demand(memcmp(CONTENT + start, T0 + start, n) == 0, b"the snapshot is not T0")


cdef void check_growth() noexcept nogil:
    """Now and then: of descriptors and threads."""
    global DESCRIPTORS
    cdef int found
    if SESSIONS % LOOK:
        return
    found = count_entries(b"/proc/self/fd")
    if SESSIONS == LOOK:
        DESCRIPTORS = found
    demand(found == DESCRIPTORS, b"the number of descriptors changes")
    demand(count_entries(b"/proc/self/task") <= <int>SERVER.crew.count + 8, b"too many threads")


cdef void check_all(int end) noexcept nogil:
    cdef verdict v
    memset(&v, 0, sizeof(v))
    v.s = &S
    v.t0 = T0
    v.zeroes = ZEROES
    v.got = GOT
    v.ngot = NGOT
    v.end = end
    v.writes = DISK_FILE.writes
    check_core()
    check_session(&v)
    if S.kind != SNAPSHOT:
        if DISK_FILE.start < DISK_FILE.end:
            read_once(D.io.fd, CONTENT + DISK_FILE.start, DISK_FILE.end - DISK_FILE.start, DISK_FILE.start)
        check_disk(&v, CONTENT, least(DISK_FILE.start, DISK_FILE.end), DISK_FILE.end)
    if S.kind == COPYING_DISK:
        check_copies()


# ---- libFuzzer's entries ----

cdef public int LLVMFuzzerInitialize(int *argc, char ***argv) noexcept nogil:
    """Once."""
    global T0, ZEROES, CONTENT, GOT, BESIDE
    FILES.pread = file_pread
    FILES.pread_cached = file_pread_cached
    FILES.pwrite = file_pwrite
    FILES.zero = file_zero
    FILES.discard = file_discard
    FILES.flush = file_flush
    FILES.seek = file_seek
    T0 = <uint8_t *>malloc(SIZE)
    ZEROES = <uint8_t *>calloc(1, SIZE)
    CONTENT = <uint8_t *>malloc(SIZE)
    GOT = <uint8_t *>malloc(MOST_RECEIVED + 1)
    BESIDE = <uint8_t *>malloc(BESIDE_BYTES)
    memset(BESIDE, 0xee, BESIDE_BYTES)
    make_disk()
    make_server()
    if bufpool_init(&POOL, 8 << 20, 0) or pthread_mutex_init(&CLIENT.lock, NULL) or cond_init(&CLIENT.changed):
        abort()
    if thread_start(&CLIENT.thread, client_main, NULL):
        abort()
    return 0


cdef public int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) noexcept nogil:
    """One session."""
    global NGOT, SESSIONS
    cdef uint64_t i
    cdef int end
    if not session_init(&S, data, size):
        return 0
    NGOT = 0
    file_forget(&DISK_FILE)
    file_forget(&TARGET_FILE)
    D.io.cut = D.io.flush_error = 0
    D.io.in_memory = not S.uncached
    if S.kind == SNAPSHOT or S.kind == COPYING_DISK:
        take_snapshot()
    for i in range(6 if S.old_writes else 0):
        write_beside(i)
    if not S.guest_writes:
        DISK_FILE.writes = 0
    make_connection()
    end = serve()
    check_all(end)
    if SNAP_OPEN:
        close_snapshot()
    if CONN.s != NULL:
        snapshot_put(CONN.s)
    conn_destroy(CONN)
    free(CONN)
    restore(DISK_FILE.start, DISK_FILE.end)
    SESSIONS += 1
    check_growth()
    return 0


# ---- mutations that know what a request is ----

cdef uint64_t dice(uint64_t sides) noexcept nogil:
    global SEED
    SEED ^= SEED << 13
    SEED ^= SEED >> 7
    SEED ^= SEED << 17
    return (SEED >> 11) % sides


cdef uint64_t length_of(const uint8_t *p, uint64_t left) noexcept nogil:
    """Bytes of the request at `p` in an input; 0 where there is none."""
    cdef uint64_t n = REQUEST
    if left < REQUEST or take32(p) != 0x25609513:
        return 0
    if take16(p + 6) == WRITE:
        n += least(take32(p + 24), SAMPLE)
    return least(n, left)


cdef uint64_t some_request(const uint8_t *data, uint64_t size) noexcept nogil:
    """Where one of the requests begins; `size` where there is none."""
    cdef uint64_t at = HEAD, found = size, seen = 0, n
    while True:
        n = length_of(data + at, size - at)
        if n == 0:
            return found
        seen += 1
        if dice(seen) == 0:
            found = at
        at += n


cdef void put_offset(uint8_t *p) noexcept nogil:
    cdef uint64_t off = dice(SIZE)
    cdef uint64_t kind = dice(4)
    if kind == 0:
        off = odd_offsets[dice(ODD_OFFSETS)]
    elif kind == 1:
        off = round_down(off, 1 << SHIFT)
    elif kind == 2:
        off = SIZE - least(take32(p + 24), SIZE)
    give32(p + 16, <uint32_t>(off >> 32))
    give32(p + 20, <uint32_t>off)


cdef void put_length(uint8_t *p) noexcept nogil:
    give32(p + 24, odd_lengths[dice(ODD_LENGTHS)] if dice(2) else <uint32_t>(1 + dice(1 << (1 + dice(18)))))


cdef void put_command(uint8_t *p) noexcept nogil:
    cdef uint64_t flags = 0
    if dice(3) == 0:
        flags = <uint64_t>1 << dice(5) if dice(8) else dice(65536)
    give32(p + 4, <uint32_t>(flags << 16 | (dice(8) if dice(20) else dice(65536))))


cdef uint64_t insert_request(uint8_t *data, uint64_t size, uint64_t at, uint64_t most_bytes) noexcept nogil:
    """A new one, or a copy of another. The new size."""
    cdef uint64_t n = REQUEST + SAMPLE, other = some_request(data, size)
    cdef uint8_t new[REQUEST + SAMPLE]
    if n > most_bytes - size:
        return size
    if dice(2) and other < size:
        n = length_of(data + other, size - other)
        memcpy(new, data + other, n)
    else:
        give32(new, 0x25609513)
        put_command(new)
        give32(new + 8, <uint32_t>dice(<uint64_t>1 << 32))
        put_length(new)
        put_offset(new)
        give32(new + 28, <uint32_t>dice(<uint64_t>1 << 32))
        give32(new + 32, <uint32_t>dice(<uint64_t>1 << 32))
        if take16(new + 6) != WRITE:
            n = REQUEST
    memmove(data + at + n, data + at, size - at)
    memcpy(data + at, new, n)
    return size + n


cdef uint64_t remove_request(uint8_t *data, uint64_t size, uint64_t at) noexcept nogil:
    cdef uint64_t n = length_of(data + at, size - at)
    memmove(data + at, data + at + n, size - at - n)
    return size - n


cdef public size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most_bytes, unsigned int seed) noexcept nogil:
    """A third is left to libFuzzer, which knows no requests."""
    global SEED
    cdef uint64_t at, choice
    SEED = (<uint64_t>seed << 20) | 1
    if size < HEAD or most_bytes < size or dice(3) == 0:
        return LLVMFuzzerMutate(data, size, most_bytes)
    at = some_request(data, size)
    choice = dice(MUTATIONS)
    if choice == 0:
        data[dice(HEAD)] = <uint8_t>dice(256)
    elif choice == 1 or at == size:
        return insert_request(data, size, at, most_bytes)
    elif choice == 2:
        return remove_request(data, size, at)
    elif choice == 3:
        put_offset(data + at)
    elif choice == 4:
        put_length(data + at)
    elif choice == 5:
        put_command(data + at)
    return size
