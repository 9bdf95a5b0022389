/* LD_PRELOAD: counts the calls into the system by kind, and lets the N-th of one kind fail, come up short, or kill the
   process. For tests/faults/test_sweep.py, which arms it through ctypes.

   What is counted is what the process calls through libc's functions, be it from Python's os module or from the compiled
   core; of malloc and mmap only what the core calls itself (and Python's mmap module), for an interpreter that is short of
   memory tells us nothing. Data that go through io_uring are not seen here: see FaultPlan. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* In the order of KINDS in cases.py. */
enum { READ, WRITE, OPEN, CLOSE, SYNC, FALLOCATE, TRUNCATE, RENAME, UNLINK, SEEK, STAT, LOCK, MMAP, MALLOC, THREAD, KINDS };

enum { FAIL, SHORT, KILL };

static struct {
    int on;                 /* counting */
    int kind, action, code; /* the rule; kind -1: none */
    uint64_t skip, times;
    uint64_t seen[KINDS];
    uint64_t hits;
} rule = { .kind = -1 };

static __thread int paused;     /* this thread is the test itself */

void sweep_pause(int by) { paused += by; }
uint64_t sweep_seen(int kind) { return __atomic_load_n(&rule.seen[kind], __ATOMIC_SEQ_CST); }
uint64_t sweep_hits(void) { return __atomic_load_n(&rule.hits, __ATOMIC_SEQ_CST); }
void sweep_off(void) { __atomic_store_n(&rule.on, 0, __ATOMIC_SEQ_CST); }

/* Where the code of the compiled core, and of Python's mmap module, is. */
static struct { uintptr_t start, end; } owners[8];
static int nowners;

static int find_owner(struct dl_phdr_info *info, size_t size, void *unused) {
    if (!strstr(info->dlpi_name, "_cbwcore.") && !strstr(info->dlpi_name, "/mmap."))
        return 0;
    for (int i = 0; i < info->dlpi_phnum && nowners < 8; i++)
        if (info->dlpi_phdr[i].p_type == PT_LOAD && info->dlpi_phdr[i].p_flags & PF_X) {
            owners[nowners].start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            owners[nowners].end = owners[nowners].start + info->dlpi_phdr[i].p_memsz;
            nowners++;
        }
    return 0;
}

/* From now on let calls of `kind` from the `skip`-th on, `times` of them, suffer `action`; code: an errno. */
void sweep_on(int kind, uint64_t skip, uint64_t times, int action, int code) {
    nowners = 0;
    dl_iterate_phdr(find_owner, NULL);
    memset(rule.seen, 0, sizeof rule.seen);
    rule.hits = 0;
    rule.kind = kind;
    rule.action = action;
    rule.code = code;
    rule.skip = skip;
    rule.times = times;
    __atomic_store_n(&rule.on, 1, __ATOMIC_SEQ_CST);
}

/* A part of n bytes: of a whole block where the file has O_DIRECT. */
static size_t part_of(int fd, size_t n) {
    if (syscall(SYS_fcntl, fd, F_GETFL) & O_DIRECT)
        return n > 4096 ? n / 2 / 4096 * 4096 : n;
    return n > 200 ? 100 : n / 2;
}

/* Whether this call is to fail (its errno is set) or, with `n`, to be shortened. */
static int hit_fd(int kind, int fd, size_t *n) {
    uint64_t nth;
    if (!__atomic_load_n(&rule.on, __ATOMIC_SEQ_CST) || paused)
        return 0;
    nth = __atomic_fetch_add(&rule.seen[kind], 1, __ATOMIC_SEQ_CST);
    if (kind != rule.kind || nth < rule.skip || nth - rule.skip >= rule.times)
        return 0;
    __atomic_fetch_add(&rule.hits, 1, __ATOMIC_SEQ_CST);
    if (rule.action == KILL)
        kill(getpid(), SIGKILL);
    if (rule.action == SHORT) {
        if (n && *n > 1)
            *n = part_of(fd, *n);
        return 0;
    }
    errno = rule.code;
    return 1;
}
static int hit(int kind, size_t *n) { return hit_fd(kind, -1, n); }

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* ---- data ---- */

ssize_t pread(int fd, void *buf, size_t n, off_t off) {
    REAL(pread);
    return hit_fd(READ, fd, &n) ? -1 : real(fd, buf, n, off);
}
ssize_t pread64(int fd, void *buf, size_t n, off64_t off) {
    REAL(pread64);
    return hit_fd(READ, fd, &n) ? -1 : real(fd, buf, n, off);
}
ssize_t pwrite(int fd, const void *buf, size_t n, off_t off) {
    REAL(pwrite);
    return hit_fd(WRITE, fd, &n) ? -1 : real(fd, buf, n, off);
}
ssize_t pwrite64(int fd, const void *buf, size_t n, off64_t off) {
    REAL(pwrite64);
    return hit_fd(WRITE, fd, &n) ? -1 : real(fd, buf, n, off);
}

/* Of a vector that is to be shortened: half of its first part. */
static ssize_t vector(int kind, int fd, const struct iovec *v, int count, off_t off, int flags) {
    size_t n = count ? v->iov_len : 0, all = n;
    struct iovec part;
    if (hit_fd(kind, fd, &n))
        return -1;
    if (n < all) {
        part.iov_base = v->iov_base;
        part.iov_len = n;
        v = &part;
        count = 1;
    }
    return syscall(kind == READ ? SYS_preadv2 : SYS_pwritev2, fd, v, (long)count, (long)off, 0L, (long)flags);
}
ssize_t preadv(int fd, const struct iovec *v, int count, off_t off) { return vector(READ, fd, v, count, off, 0); }
ssize_t preadv64(int fd, const struct iovec *v, int count, off64_t off) { return vector(READ, fd, v, count, off, 0); }
ssize_t preadv2(int fd, const struct iovec *v, int count, off_t off, int flags) {
    return vector(READ, fd, v, count, off, flags);
}
ssize_t preadv64v2(int fd, const struct iovec *v, int count, off64_t off, int flags) {
    return vector(READ, fd, v, count, off, flags);
}
ssize_t pwritev(int fd, const struct iovec *v, int count, off_t off) { return vector(WRITE, fd, v, count, off, 0); }
ssize_t pwritev64(int fd, const struct iovec *v, int count, off64_t off) { return vector(WRITE, fd, v, count, off, 0); }
ssize_t pwritev2(int fd, const struct iovec *v, int count, off_t off, int flags) {
    return vector(WRITE, fd, v, count, off, flags);
}
ssize_t pwritev64v2(int fd, const struct iovec *v, int count, off64_t off, int flags) {
    return vector(WRITE, fd, v, count, off, flags);
}
ssize_t read(int fd, void *buf, size_t n) {
    REAL(read);
    return hit_fd(READ, fd, &n) && errno != EAGAIN ? -1 : real(fd, buf, n);    /* no file says that here */
}

int fsync(int fd) {
    REAL(fsync);
    return hit(SYNC, NULL) ? -1 : real(fd);
}
int fdatasync(int fd) {
    REAL(fdatasync);
    return hit(SYNC, NULL) ? -1 : real(fd);
}
int fallocate(int fd, int mode, off_t off, off_t n) {
    REAL(fallocate);
    return hit(FALLOCATE, NULL) ? -1 : real(fd, mode, off, n);
}
int fallocate64(int fd, int mode, off64_t off, off64_t n) {
    REAL(fallocate64);
    return hit(FALLOCATE, NULL) ? -1 : real(fd, mode, off, n);
}
int posix_fallocate(int fd, off_t off, off_t n) {   /* it returns its errno */
    REAL(posix_fallocate);
    return hit(FALLOCATE, NULL) ? errno : real(fd, off, n);
}
int posix_fallocate64(int fd, off64_t off, off64_t n) {
    REAL(posix_fallocate64);
    return hit(FALLOCATE, NULL) ? errno : real(fd, off, n);
}
int ftruncate(int fd, off_t n) {
    REAL(ftruncate);
    return hit(TRUNCATE, NULL) ? -1 : real(fd, n);
}
int ftruncate64(int fd, off64_t n) {
    REAL(ftruncate64);
    return hit(TRUNCATE, NULL) ? -1 : real(fd, n);
}
off_t lseek(int fd, off_t off, int whence) {
    REAL(lseek);
    return hit(SEEK, NULL) ? -1 : real(fd, off, whence);
}
off64_t lseek64(int fd, off64_t off, int whence) {
    REAL(lseek64);
    return hit(SEEK, NULL) ? -1 : real(fd, off, whence);
}

/* ---- names ---- */

static mode_t mode_of(int flags, va_list args) {
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(args, mode_t) : 0;
}
#define OPENER(name, params, ...) \
    int name params { \
        va_list args; \
        mode_t mode; \
        REAL(name); \
        va_start(args, flags); \
        mode = mode_of(flags, args); \
        va_end(args); \
        return hit(OPEN, NULL) ? -1 : real(__VA_ARGS__, flags, mode); \
    }
OPENER(open, (const char *path, int flags, ...), path)
OPENER(open64, (const char *path, int flags, ...), path)
OPENER(openat, (int dir, const char *path, int flags, ...), dir, path)
OPENER(openat64, (int dir, const char *path, int flags, ...), dir, path)

/* What fails here has closed the descriptor all the same, as Linux does. */
int close(int fd) {
    int rc;
    REAL(close);
    if (!hit(CLOSE, NULL))
        return real(fd);
    rc = errno;
    real(fd);
    errno = rc;
    return -1;
}
int rename(const char *from, const char *to) {
    REAL(rename);
    return hit(RENAME, NULL) ? -1 : real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    return hit(RENAME, NULL) ? -1 : real(a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(renameat2);
    return hit(RENAME, NULL) ? -1 : real(a, from, b, to, flags);
}
int unlink(const char *path) {
    REAL(unlink);
    return hit(UNLINK, NULL) ? -1 : real(path);
}
int unlinkat(int dir, const char *path, int flags) {
    REAL(unlinkat);
    return hit(UNLINK, NULL) ? -1 : real(dir, path, flags);
}

/* ---- facts and locks ---- */

#define STATER(name, params, ...) \
    int name params { \
        REAL(name); \
        return hit(STAT, NULL) ? -1 : real(__VA_ARGS__); \
    }
STATER(stat, (const char *path, struct stat *s), path, s)
STATER(stat64, (const char *path, struct stat64 *s), path, s)
STATER(lstat, (const char *path, struct stat *s), path, s)
STATER(lstat64, (const char *path, struct stat64 *s), path, s)
STATER(fstat, (int fd, struct stat *s), fd, s)
STATER(fstat64, (int fd, struct stat64 *s), fd, s)
STATER(fstatat, (int dir, const char *path, struct stat *s, int flags), dir, path, s, flags)
STATER(fstatat64, (int dir, const char *path, struct stat64 *s, int flags), dir, path, s, flags)
STATER(fstatfs, (int fd, struct statfs *s), fd, s)
STATER(fstatfs64, (int fd, struct statfs64 *s), fd, s)

#define LOCKER(name) \
    int name(int fd, int cmd, ...) { \
        va_list args; \
        void *arg; \
        REAL(name); \
        va_start(args, cmd); \
        arg = va_arg(args, void *); \
        va_end(args); \
        return cmd == F_OFD_SETLK && hit(LOCK, NULL) ? -1 : real(fd, cmd, arg); \
    }
LOCKER(fcntl)
LOCKER(fcntl64)

/* ---- memory and threads ---- */

static int is_ours(void *caller) {
    uintptr_t at = (uintptr_t)caller;
    if (!__atomic_load_n(&rule.on, __ATOMIC_SEQ_CST) || paused)
        return 0;
    for (int i = 0; i < nowners; i++)
        if (owners[i].start <= at && at < owners[i].end)
            return 1;
    return 0;
}
void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t off) {
    REAL(mmap);
    return is_ours(__builtin_return_address(0)) && hit(MMAP, NULL) ? MAP_FAILED : real(at, n, prot, flags, fd, off);
}
void *mmap64(void *at, size_t n, int prot, int flags, int fd, off64_t off) {
    REAL(mmap64);
    return is_ours(__builtin_return_address(0)) && hit(MMAP, NULL) ? MAP_FAILED : real(at, n, prot, flags, fd, off);
}
void *mremap(void *at, size_t old, size_t n, int flags, ...) {
    va_list args;
    void *to;
    va_start(args, flags);
    to = va_arg(args, void *);
    va_end(args);
    if (is_ours(__builtin_return_address(0)) && hit(MMAP, NULL))
        return MAP_FAILED;
    return (void *)syscall(SYS_mremap, at, old, n, (long)flags, to);
}

extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t count, size_t n);
extern void *__libc_memalign(size_t align, size_t n);
void *malloc(size_t n) {
    return is_ours(__builtin_return_address(0)) && hit(MALLOC, NULL) ? NULL : __libc_malloc(n);
}
void *calloc(size_t count, size_t n) {
    return is_ours(__builtin_return_address(0)) && hit(MALLOC, NULL) ? NULL : __libc_calloc(count, n);
}
int posix_memalign(void **p, size_t align, size_t n) {
    void *got;
    int kept = errno;
    if (is_ours(__builtin_return_address(0)) && hit(MALLOC, NULL)) {
        errno = kept;
        return ENOMEM;
    }
    got = __libc_memalign(align, n);
    if (!got)
        return ENOMEM;
    *p = got;
    return 0;
}
int pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*run)(void *), void *arg) {
    REAL(pthread_create);
    return hit(THREAD, NULL) ? errno : real(t, a, run, arg);
}
