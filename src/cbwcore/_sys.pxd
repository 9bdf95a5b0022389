# What the core takes from the system: atomics, locks, clocks, file calls. No policy here.
#
# Every atomic names its order. The GIL is never a lock of the engine.

from libc.stdint cimport int64_t, uint64_t, uint32_t

cdef extern from * nogil:
    """
    #ifndef __linux__
    #error "cbwcore needs Linux: it is built on O_DIRECT, SEEK_DATA, fallocate and OFD locks"
    #endif
    #if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "cbwcore needs a little-endian machine: its bitmaps are shared with NumPy and bitarray byte by byte"
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/falloc.h>
    #include <linux/fs.h>
    #include <pthread.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <sys/vfs.h>
    #include <time.h>
    #include <unistd.h>

    static inline uint64_t load_relaxed(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static inline uint64_t load_acquire(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline uint64_t load_seq_cst(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline void store_release(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline void store_seq_cst(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t add_relaxed(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
    static inline uint64_t add_seq_cst(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t sub_seq_cst(uint64_t *p, uint64_t v) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t or_acq_rel(uint64_t *p, uint64_t v) { return __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL); }
    static inline uint64_t and_acq_rel(uint64_t *p, uint64_t v) { return __atomic_fetch_and(p, v, __ATOMIC_ACQ_REL); }
    static inline uint64_t exchange_seq_cst(uint64_t *p, uint64_t v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }

    static inline void cpu_relax(void) {
    #if defined __x86_64__ || defined __i386__
        __builtin_ia32_pause();
    #elif defined __aarch64__
        __asm__ __volatile__("yield");
    #endif
    }
    /* CPUs that this process may run on; at least 1. */
    static int count_cpus(void) {
        cpu_set_t set;
        return sched_getaffinity(0, sizeof(set), &set) ? 1 : CPU_COUNT(&set);
    }

    static inline int lowest_bit(uint64_t w) { return __builtin_ctzll(w); }
    static inline int count_bits(uint64_t w) { return __builtin_popcountll(w); }

    /* First index in [k, end) whose word differs from `blank`, else end. 128 bytes at a time, for memory speed: in vectors,
       whose loads no C type calls atomic; what they find is looked at again word by word. */
    #ifdef __SANITIZE_THREAD__
    #define CBW_STRIDE 0
    #else
    #define CBW_STRIDE 16
    #endif
    typedef uint64_t word_pair __attribute__((vector_size(16), aligned(8), may_alias));
    static uint64_t skip_blank_words(const uint64_t *words, uint64_t k, uint64_t end, uint64_t blank) {
        const word_pair b = { blank, blank };
        for (; CBW_STRIDE && k + CBW_STRIDE <= end; k += CBW_STRIDE) {
            const word_pair *p = (const word_pair *)(words + k);
            word_pair x = ((p[0] ^ b) | (p[1] ^ b)) | ((p[2] ^ b) | (p[3] ^ b));
            word_pair y = ((p[4] ^ b) | (p[5] ^ b)) | ((p[6] ^ b) | (p[7] ^ b));
            x |= y;
            if (x[0] | x[1])
                break;
        }
        for (; k < end; k++)
            if (load_relaxed(words + k) != blank)
                return k;
        return end;
    }

    /* Whether n bytes are all zero. The first word decides for nearly all data that is not. */
    static int is_zero(const void *buf, uint64_t n) {
        const unsigned char *p = (const unsigned char *)buf;
        uint64_t w;
        if (n < 16) {
            for (uint64_t i = 0; i < n; i++)
                if (p[i])
                    return 0;
            return 1;
        }
        memcpy(&w, p, 8);
        return w == 0 && memcmp(p, p + 8, n - 8) == 0;
    }

    /* Each thread counts its requests in a slot of its own, so that guests share no written cache line. */
    #define CBW_SLOTS 64
    static uint32_t cbw_next_slot;
    static __thread int cbw_slot = -1;
    static inline int thread_slot(void) {
        if (cbw_slot < 0)
            cbw_slot = (int)(__atomic_fetch_add(&cbw_next_slot, 1, __ATOMIC_RELAXED) % CBW_SLOTS);
        return cbw_slot;
    }

    static inline int64_t monotonic_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    }
    static inline int64_t realtime_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    }
    static inline void sleep_ns(int64_t ns) {
        struct timespec t = { ns / 1000000000, ns % 1000000000 };
        while (nanosleep(&t, &t) == -1 && errno == EINTR)
            ;
    }

    /* A condition whose timed waits follow CLOCK_MONOTONIC. 0 or -errno. */
    static int cond_init(pthread_cond_t *c) {
        pthread_condattr_t a;
        int rc = pthread_condattr_init(&a);
        if (rc)
            return -rc;
        rc = pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
        if (!rc)
            rc = pthread_cond_init(c, &a);
        pthread_condattr_destroy(&a);
        return -rc;
    }
    static void cond_wait_until(pthread_cond_t *c, pthread_mutex_t *m, int64_t when_ns) {
        struct timespec t = { when_ns / 1000000000, when_ns % 1000000000 };
        pthread_cond_timedwait(c, m, &t);
    }

    /* A helper thread: small stack, all signals blocked (they are Python's, for the main thread). 0 or -errno. */
    static int thread_start(pthread_t *t, void *(*run)(void *), void *arg) {
        pthread_attr_t a;
        sigset_t all, old;
        int rc = pthread_attr_init(&a);
        if (rc)
            return -rc;
        pthread_attr_setstacksize(&a, 256 << 10);
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &old);
        rc = pthread_create(t, &a, run, arg);
        pthread_sigmask(SIG_SETMASK, &old, NULL);
        pthread_attr_destroy(&a);
        return -rc;
    }

    /* Memory that costs no page until it is written (R17); NULL when refused. */
    static void *map_lazily(uint64_t n) {
        void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED)
            return NULL;
        madvise(p, n, MADV_NOHUGEPAGE);
        return p;
    }

    /* Let the memory at p be that of the file from off on, and where shared, for whoever else maps or reads it, too: what is
       stored here survives the process, at any instruction. The file must have its blocks, or a store that finds no space
       kills it. */
    static int map_file_over(void *p, uint64_t n, int fd, uint64_t off, int shared) {
        void *at = mmap(p, n, PROT_READ | PROT_WRITE, (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_FIXED, fd, (off_t)off);
        return at == MAP_FAILED ? -errno : 0;
    }
    /* Let the pages at `from` be those at p, in one step for whoever reads there; `from` is gone. */
    static int move_pages_over(void *p, void *from, uint64_t n) {
        void *at = mremap(from, n, n, MREMAP_MAYMOVE | MREMAP_FIXED, p);
        return at == MAP_FAILED ? -errno : 0;
    }

    static inline int64_t write_once(int fd, const void *buf, uint64_t n, uint64_t off) {
        ssize_t rc = pwrite(fd, buf, n, (off_t)off);
        return rc < 0 ? -errno : rc;
    }
    static inline int64_t read_once(int fd, void *buf, uint64_t n, uint64_t off) {
        ssize_t rc = pread(fd, buf, n, (off_t)off);
        return rc < 0 ? -errno : rc;
    }
    /* What is in memory, without waiting for storage; -EAGAIN, -EOPNOTSUPP. */
    static inline int64_t read_cached(int fd, void *buf, uint64_t n, uint64_t off) {
    #ifdef RWF_NOWAIT
        struct iovec v = { buf, n };
        ssize_t rc = preadv2(fd, &v, 1, (off_t)off, RWF_NOWAIT);
        return rc < 0 ? -errno : rc;
    #else
        return -EOPNOTSUPP;
    #endif
    }
    static inline int is_on_tmpfs(int fd) {
        struct statfs f;
        return fstatfs(fd, &f) == 0 && f.f_type == 0x01021994;
    }
    /* Whether the size of a file is known without asking a server: of block devices, and on the local file systems. */
    static inline int knows_size(int fd) {
        struct statfs f;
        struct stat s;
        if (fstat(fd, &s) == 0 && S_ISBLK(s.st_mode))
            return 1;
        if (fstatfs(fd, &f))
            return 0;
        return f.f_type == 0xEF53 || f.f_type == 0x58465342 || f.f_type == 0x9123683E || f.f_type == 0x01021994;
    }
    /* Whether a file has fewer blocks than bytes. What cannot be told counts as holes. */
    static inline int has_holes(int fd) {
        struct stat s;
        return fstat(fd, &s) || (uint64_t)s.st_blocks * 512 < (uint64_t)s.st_size;
    }
    static inline int fallocate_once(int fd, int mode, uint64_t off, uint64_t n) {
        return fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)n) ? -errno : 0;
    }
    /* Whether fallocate(mode) works where the file `fd` is: 1, 0, or -1 where that cannot be known. An unnamed file beside it
       is tried, for the file itself must not change. */
    static int try_fallocate_beside(int fd, int mode) {
        char link[32], path[4096];
        struct stat own, beside;
        int rc = -1, trial;
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, path, sizeof path - 1);
        if (n <= 0 || n >= (ssize_t)sizeof path - 1 || path[0] != '/')
            return -1;
        path[n] = 0;
        strrchr(path, '/')[1] = 0;
        trial = open(path, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
        if (trial < 0)
            return -1;
        if (!fstat(fd, &own) && !fstat(trial, &beside) && own.st_dev == beside.st_dev) {
            if (!fallocate(trial, mode | FALLOC_FL_KEEP_SIZE, 0, 4096))
                rc = 1;
            else if (errno == EOPNOTSUPP)
                rc = 0;
        }
        close(trial);
        return rc;
    }
    static inline int discard_device(int fd, uint64_t off, uint64_t n) {
        uint64_t range[2] = { off, n };
        return ioctl(fd, BLKDISCARD, range) ? -errno : 0;
    }
    static inline int64_t seek_once(int fd, uint64_t off, int whence) {
        off_t rc = lseek(fd, (off_t)off, whence);
        return rc < 0 ? -errno : rc;
    }
    static inline int advise_once(int fd, uint64_t off, uint64_t n) {
        return -posix_fadvise(fd, (off_t)off, (off_t)n, POSIX_FADV_WILLNEED);
    }
    static inline int sync_once(int fd) { return fdatasync(fd) ? -errno : 0; }
    /* Unlock, then close: a forked child shares the description, and would keep the lock for as long as it lives. */
    static inline int close_once(int fd) {
        struct flock whole = { .l_type = F_UNLCK, .l_whence = SEEK_SET };
        fcntl(fd, F_OFD_SETLK, &whole);
        return close(fd) ? -errno : 0;
    }

    /* statx STATX_DIOALIGN by its kernel ABI offsets, so that old headers build too: 0, or -errno when
       the kernel cannot tell. An offset alignment of 0 means that the file has no O_DIRECT. */
    static int dio_alignment(int fd, uint32_t *mem, uint32_t *offset) {
        unsigned char raw[256] = { 0 };
        uint32_t mask;
        if (syscall(SYS_statx, fd, "", 0x1000 /* AT_EMPTY_PATH */, 0x2000u /* STATX_DIOALIGN */, raw))
            return -errno;
        memcpy(&mask, raw, 4);
        memcpy(mem, raw + 152, 4);
        memcpy(offset, raw + 156, 4);
        return mask & 0x2000u ? 0 : -EOPNOTSUPP;
    }

    /* Nanoseconds since the epoch at which a file was made, by statx as above; 0, or -errno where its file system cannot tell. */
    static int birth_time(int fd, int64_t *ns) {
        unsigned char raw[256] = { 0 };
        uint32_t mask, part;
        int64_t sec;
        if (syscall(SYS_statx, fd, "", 0x1000 /* AT_EMPTY_PATH */, 0x800u /* STATX_BTIME */, raw))
            return -errno;
        memcpy(&mask, raw, 4);
        memcpy(&sec, raw + 80, 8);
        memcpy(&part, raw + 88, 4);
        *ns = sec * 1000000000 + part;
        return mask & 0x800u ? 0 : -EOPNOTSUPP;
    }

    static const char zero_block[65536] __attribute__((aligned(4096)));

    /* The test build of tests/schedules alone: its scheduler puts itself before all of the above. */
    #ifdef CBWCORE_YIELD
    #include CBWCORE_YIELD
    #endif
    """
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

    uint64_t load_relaxed(const uint64_t *p)
    uint64_t load_acquire(const uint64_t *p)
    uint64_t load_seq_cst(const uint64_t *p)
    void store_release(uint64_t *p, uint64_t v)
    void store_seq_cst(uint64_t *p, uint64_t v)
    uint64_t add_relaxed(uint64_t *p, uint64_t v)
    uint64_t add_seq_cst(uint64_t *p, uint64_t v)
    uint64_t sub_seq_cst(uint64_t *p, uint64_t v)
    uint64_t or_acq_rel(uint64_t *p, uint64_t v)
    uint64_t and_acq_rel(uint64_t *p, uint64_t v)
    uint64_t exchange_seq_cst(uint64_t *p, uint64_t v)

    void cpu_relax()
    int count_cpus()
    int lowest_bit(uint64_t w)
    int count_bits(uint64_t w)
    uint64_t skip_blank_words(const uint64_t *words, uint64_t k, uint64_t end, uint64_t blank)
    bint is_zero(const void *buf, uint64_t n)
    int CBW_SLOTS
    int thread_slot()
    int64_t monotonic_ns()
    int64_t realtime_ns()
    void sleep_ns(int64_t ns)

    int pthread_mutex_init(pthread_mutex_t *m, void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *m)
    int pthread_mutex_lock(pthread_mutex_t *m)
    int pthread_mutex_unlock(pthread_mutex_t *m)
    int cond_init(pthread_cond_t *c)
    int pthread_cond_destroy(pthread_cond_t *c)
    int pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *m)
    int pthread_cond_signal(pthread_cond_t *c)
    int pthread_cond_broadcast(pthread_cond_t *c)
    void cond_wait_until(pthread_cond_t *c, pthread_mutex_t *m, int64_t when_ns)
    int thread_start(pthread_t *t, void *(*run)(void *) noexcept nogil, void *arg)
    int pthread_join(pthread_t t, void **result)

    void *map_lazily(uint64_t n)
    int map_file_over(void *p, uint64_t n, int fd, uint64_t off, bint shared)
    int move_pages_over(void *p, void *from_, uint64_t n)
    int munmap(void *p, size_t n)
    int madvise(void *p, size_t n, int advice)
    int MADV_DONTNEED

    int64_t read_once(int fd, void *buf, uint64_t n, uint64_t off)
    int64_t write_once(int fd, const void *buf, uint64_t n, uint64_t off)
    int64_t read_cached(int fd, void *buf, uint64_t n, uint64_t off)
    bint is_on_tmpfs(int fd)
    bint knows_size(int fd)
    bint has_holes(int fd)
    int fallocate_once(int fd, int mode, uint64_t off, uint64_t n)
    int try_fallocate_beside(int fd, int mode)
    int discard_device(int fd, uint64_t off, uint64_t n)
    int64_t seek_once(int fd, uint64_t off, int whence)
    int advise_once(int fd, uint64_t off, uint64_t n)
    int sync_once(int fd)
    int close_once(int fd)
    int dio_alignment(int fd, uint32_t *mem, uint32_t *offset)
    int birth_time(int fd, int64_t *ns)
    const char zero_block[65536]
    int FALLOC_FL_PUNCH_HOLE
    int FALLOC_FL_ZERO_RANGE
    int SEEK_DATA
    int SEEK_END
    int SEEK_HOLE
