/* LD_PRELOAD: lets calls of the compiled core, and of nobody else, into libc and liburing fail as a test says: memory, threads,
   rings, and what has no way through the I/O table. For test_refusals.py, whose programs call refuse() through ctypes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/statfs.h>
#include <sys/types.h>
#include <unistd.h>

static struct rule { const char *name; long skip, times; int code; } rules[16];
static int nrules;
static long hits;
static uintptr_t core_start, core_end;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int find_core(struct dl_phdr_info *info, size_t size, void *unused) {
    if (!strstr(info->dlpi_name, "_cbwcore."))
        return 0;
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_LOAD && info->dlpi_phdr[i].p_flags & PF_X) {
            core_start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            core_end = core_start + info->dlpi_phdr[i].p_memsz;
        }
    return 0;
}

/* Let `times` calls of `name` by the core fail with the errno `code`, after the first `skip`. */
void refuse(const char *name, long skip, long times, int code) {
    pthread_mutex_lock(&lock);
    dl_iterate_phdr(find_core, NULL);
    rules[nrules++] = (struct rule) { strdup(name), skip, times, code };
    pthread_mutex_unlock(&lock);
}

/* From now on nothing is refused; how many calls were. */
long allow(void) {
    long n;
    pthread_mutex_lock(&lock);
    nrules = 0;
    n = hits;
    hits = 0;
    pthread_mutex_unlock(&lock);
    return n;
}

/* The errno that this call is to fail with, or 0. */
static int refused(const char *name, void *caller) {
    int code = 0;
    if (!nrules || (uintptr_t)caller < core_start || (uintptr_t)caller >= core_end)
        return 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < nrules && !code; i++)
        if (!strcmp(rules[i].name, name) && rules[i].times > 0) {
            if (rules[i].skip-- > 0)
                continue;
            rules[i].times--;
            code = rules[i].code;
            hits++;
        }
    pthread_mutex_unlock(&lock);
    return code;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define CALL(type, name, params, args, failure) \
    type name params { \
        int code = refused(#name, __builtin_return_address(0)); \
        REAL(name); \
        if (code) \
            return failure; \
        return real args; \
    }
#define BY_ERRNO(value) (errno = code, value)

/* dlsym() may call these */
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t);
void *malloc(size_t n) {
    int code = refused("malloc", __builtin_return_address(0));
    return code ? BY_ERRNO(NULL) : __libc_malloc(n);
}
void *calloc(size_t n, size_t size) {
    int code = refused("calloc", __builtin_return_address(0));
    return code ? BY_ERRNO(NULL) : __libc_calloc(n, size);
}
CALL(int, posix_memalign, (void **out, size_t align, size_t n), (out, align, n), code)
CALL(void *, mmap64, (void *at, size_t n, int prot, int flags, int fd, off64_t off), (at, n, prot, flags, fd, off), BY_ERRNO(MAP_FAILED))
CALL(int, madvise, (void *at, size_t n, int advice), (at, n, advice), BY_ERRNO(-1))
CALL(int, pthread_create, (pthread_t *t, const pthread_attr_t *a, void *(*run)(void *), void *arg), (t, a, run, arg), code)
CALL(int, pthread_attr_init, (pthread_attr_t *a), (a), code)
CALL(int, pthread_condattr_init, (pthread_condattr_t *a), (a), code)
CALL(int, epoll_create1, (int flags), (flags), BY_ERRNO(-1))
CALL(int, epoll_ctl, (int fd, int op, int on, struct epoll_event *e), (fd, op, on, e), BY_ERRNO(-1))
CALL(int, epoll_wait, (int fd, struct epoll_event *e, int n, int ms), (fd, e, n, ms), BY_ERRNO(-1))
CALL(int, eventfd, (unsigned n, int flags), (n, flags), BY_ERRNO(-1))
CALL(ssize_t, recv, (int fd, void *buf, size_t n, int flags), (fd, buf, n, flags), BY_ERRNO(-1))
CALL(ssize_t, sendmsg, (int fd, const struct msghdr *m, int flags), (fd, m, flags), BY_ERRNO(-1))
CALL(int, poll, (struct pollfd *p, nfds_t n, int ms), (p, n, ms), BY_ERRNO(-1))
CALL(int, fstatfs64, (int fd, struct statfs64 *f), (fd, f), BY_ERRNO(-1))
CALL(ssize_t, readlink, (const char *path, char *buf, size_t n), (path, buf, n), BY_ERRNO(-1))
CALL(int, close, (int fd), (fd), BY_ERRNO((real(fd), errno = code, -1)))
CALL(int, fdatasync, (int fd), (fd), BY_ERRNO(-1))

void *mremap(void *at, size_t old, size_t n, int flags, ...) {
    va_list more;
    void *to;
    int code = refused("mremap", __builtin_return_address(0));
    static void *(*real)(void *, size_t, size_t, int, ...);
    if (!real)
        real = (void *(*)(void *, size_t, size_t, int, ...))dlsym(RTLD_NEXT, "mremap");
    va_start(more, flags);
    to = va_arg(more, void *);
    va_end(more);
    return code ? BY_ERRNO(MAP_FAILED) : real(at, old, n, flags, to);
}

/* system calls of the core that have no wrapper: statx alone */
long syscall(long number, ...) {
    va_list more;
    long a[6];
    int code = refused("syscall", __builtin_return_address(0));
    static long (*real)(long, ...);
    if (!real)
        real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    va_start(more, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(more, long);
    va_end(more);
    return code ? BY_ERRNO(-1) : real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* liburing, without its header: not every build has it */
struct io_uring;
int io_uring_queue_init_params(unsigned n, struct io_uring *io, void *params);
int io_uring_register_buffers(struct io_uring *io, const void *v, unsigned n);
int io_uring_submit_and_wait(struct io_uring *io, unsigned wait);
int io_uring_wait_cqe_timeout(struct io_uring *io, void **e, void *t);
int __io_uring_get_cqe(struct io_uring *io, void **e, unsigned submit, unsigned wait, void *mask);
CALL(int, io_uring_queue_init_params, (unsigned n, struct io_uring *io, void *params), (n, io, params), -code)
CALL(int, io_uring_register_buffers, (struct io_uring *io, const void *v, unsigned n), (io, v, n), -code)
CALL(int, io_uring_submit_and_wait, (struct io_uring *io, unsigned wait), (io, wait), -code)
CALL(int, io_uring_wait_cqe_timeout, (struct io_uring *io, void **e, void *t), (io, e, t), -code)
CALL(int, __io_uring_get_cqe, (struct io_uring *io, void **e, unsigned s, unsigned w, void *m), (io, e, s, w, m), -code)
