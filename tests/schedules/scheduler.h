/* A deterministic scheduler, for the test build of the core (CBWCORE_YIELD; see README.md here).
 *
 * src/cbwcore/_sys.pxd includes this after its own definitions. It puts itself before every lock, wait, wake, thread,
 * atomic, clock and file call that the core makes, so that all of them are *points*: named by the function and the object,
 * and the only places where one task can see what another does. Tasks are coroutines of one thread; between two points a
 * task runs alone, and at a point explore(), walk() or replay() says which task goes on.
 *
 *   lock            a task whose lock is held cannot go on, and is not asked
 *   cond wait       gives the lock up in the same step; goes on when woken, or when the clock has passed its deadline
 *   atomics         points where watch() says that tasks look at the object without a lock
 *   file calls      of files that are here in memory, a byte per half cluster; a transfer is a step per cluster
 *   clock           stands still until a task advances it
 *
 * All that a run is made of lies in known places: the heaps of the tasks, their stacks, and `cs`. So explore() saves and
 * restores it with memcpy, and knows a state again by its hash: it visits each state once, by whatever path, and misses none.
 * What it does not show: orders that only weak memory allows, spurious wakeups, want of memory.
 */
#ifndef CBW_SCHEDULER_H
#define CBW_SCHEDULER_H
#include <stdarg.h>
#include <stdlib.h>
#include <ucontext.h>

enum { CS_TASKS = 12, CS_OPERATIONS = 6, CS_STACK = 48 << 10, CS_HEAP = 24 << 10, CS_SHIFT = 6, CS_UNIT = 32, CS_UNITS = 4, CS_FILES = 8,
       CS_WATCHES = 24, CS_DULLS = 12, CS_DEPTH = 2000, CS_TEXT = 400 };
enum { CS_START, CS_LOCK, CS_WAKE, CS_JOIN, CS_ATOMIC, CS_IO, CS_STEP };        /* what a task is about to do */
enum { CS_FREE, CS_LIVE, CS_DONE };
enum { CS_OK, CS_VIOLATION, CS_LIMIT, CS_BAD_SCHEDULE };
#define CS_MUTEX 0x5ced0001u
#define CS_COND 0x5ced0002u
#define CS_DEAD 0xdbdbdbdbdbdbdbdbull

struct cs_task {
    int state, kind, signaled, held, joins;
    void *object, *cond;
    int64_t deadline;
    void *(*run)(void *);
    void *arg;
    char *low;                          /* its stack from here on is in use */
    const char *where, *what;
    ucontext_t context;
};
struct cs_file {                        /* 0: disk, 1: disk, others: targets */
    int open, changed;                  /* changed: clusters that were written, a bit each */
    uint8_t unit[CS_UNITS], hole[CS_UNITS / 2];
};
struct cs_watch { char *start, *end; int guarded; };
struct cs_dull { void *p; uint64_t n; };

static struct {                         /* the whole of a run, beside heaps and stacks */
    struct cs_task task[CS_TASKS];
    struct cs_file file[CS_FILES];
    struct cs_watch watch[CS_WATCHES];
    struct cs_dull dull[CS_DULLS];
    uint64_t top[CS_TASKS];             /* bytes of each heap in use */
    int64_t clock;
    int watches, dulls, blocks, readers, fail_read, fail_write, fail_disk, failed_by, cold;     /* readers:
                                           tasks that copy nothing, a bit each; failed_by: those whose I/O failed;
                                           cold: clusters that are not in memory, of any file */
} cs;
static char cs_heap[CS_TASKS][CS_HEAP] __attribute__((aligned(64)));
static char cs_stack[CS_TASKS][CS_STACK] __attribute__((aligned(64)));

static int cs_cur;                      /* the task that runs; 0 before there are any */
static int cs_quiet = 1;                /* set-up: nothing is a point */
static ucontext_t cs_main;
static char cs_text[CS_TEXT];           /* the first violation */
static void (*cs_on_store)(void *p, uint64_t value);

static __attribute__((noinline)) void cs_leave(void) {
    struct cs_task *t = &cs.task[cs_cur];
    t->low = (char *)__builtin_frame_address(0);
    swapcontext(&t->context, &cs_main);
}

static void cs_fail(const char *format, ...) {
    va_list a;
    va_start(a, format);
    if (!cs_text[0])
        vsnprintf(cs_text, sizeof cs_text, format, a);
    va_end(a);
    if (!cs_quiet)
        cs_leave();                     /* and is never continued */
}

/* The task is about to do something that others see, or that sees others. noinline: all registers that its callers use are
   saved in its frame, and so are part of the state. */
static __attribute__((noinline)) void cs_point(int kind, void *object, const char *where, const char *what) {
    struct cs_task *t = &cs.task[cs_cur];
    if (cs_quiet)
        return;
    t->kind = kind;
    t->object = object;
    t->where = where;
    t->what = what;
    __builtin_unwind_init();
    cs_leave();
}

/* ---- memory: each task allocates in its own heap, so that addresses do not depend on the schedule ---- */

static void *cs_alloc(uint64_t n) {
    char *p;
    n = (n + 15) & ~15ull;
    if (cs.top[cs_cur] + n + 16 > CS_HEAP) {
        cs_fail("the heap of task %d is too small", cs_cur);
        abort();
    }
    p = cs_heap[cs_cur] + cs.top[cs_cur];
    *(uint64_t *)p = n;
    cs.top[cs_cur] += n + 16;
    cs.blocks++;
    return memset(p + 16, 0, n);
}
static void cs_free(void *p) {
    if (!p)
        return;
    if (*(uint64_t *)p == CS_DEAD && ((uint64_t *)p)[1] == CS_DEAD)
        cs_fail("freed twice");
    memset(p, 0xdb, ((uint64_t *)p)[-2]);           /* never used again: who looks at it is found */
    cs.blocks--;
}
static int cs_memalign(void **p, uint64_t a, uint64_t n) {      /* data buffers: two clusters */
    *p = cs_alloc(a < 4096 || n < 2 << CS_SHIFT ? n : 2 << CS_SHIFT);
    return 0;
}
static void *cs_map(uint64_t n) { (void)n; return cs_alloc(16); }                               /* maps: 128 clusters */
static int cs_unmap(void *p) { cs_free(p); return 0; }
static int cs_forget(void *p) { memset(p, 0, 16); return 0; }

/* ---- locks ---- */

struct cs_mutex { unsigned magic; int owner, soft; };       /* soft: of the test's, and held across I/O */

static void cs_mutex_init(pthread_mutex_t *m) { *(struct cs_mutex *)m = (struct cs_mutex){ CS_MUTEX, 0, 0 }; }
static void cs_mutex_soft(pthread_mutex_t *m) { cs_mutex_init(m); ((struct cs_mutex *)m)->soft = 1; }
static void cs_mutex_destroy(pthread_mutex_t *m) {
    struct cs_mutex *x = (struct cs_mutex *)m;
    if (x->magic != CS_MUTEX || x->owner)
        cs_fail("a lock is destroyed that is held, or gone");
    x->magic = 0;
}
static void cs_take(struct cs_mutex *x, const char *where, const char *what) {
    struct cs_task *t = &cs.task[cs_cur];
    if (x->magic != CS_MUTEX || x->owner)
        cs_fail("%s: lock %s, which is gone", where, what);
    if (!x->soft && t->held++)
        cs_fail("%s: lock %s with another lock held", where, what);
    x->owner = cs_cur + 1;
}
static void cs_drop(struct cs_mutex *x, const char *where, const char *what) {
    if (x->magic != CS_MUTEX || x->owner != cs_cur + 1)
        cs_fail("%s: unlock %s, which it does not hold", where, what);
    x->owner = 0;
    cs.task[cs_cur].held -= !x->soft;
}
static int cs_lock(pthread_mutex_t *m, const char *where, const char *what) {
    cs_point(CS_LOCK, m, where, what);
    cs_take((struct cs_mutex *)m, where, what);
    return 0;
}
static int cs_unlock(pthread_mutex_t *m, const char *where, const char *what) {
    cs_drop((struct cs_mutex *)m, where, what);
    return 0;
}

/* ---- conditions ---- */

static int cs_cond_init(pthread_cond_t *c) { *(unsigned *)c = CS_COND; return 0; }
static int cs_cond_wait(pthread_cond_t *c, pthread_mutex_t *m, int64_t deadline, const char *where, const char *what) {
    struct cs_task *t = &cs.task[cs_cur];
    if (cs_quiet)
        cs_fail("%s: waits in the set-up", where);
    if (*(unsigned *)c != CS_COND)
        cs_fail("%s: wait for %s, which is gone", where, what);
    cs_drop((struct cs_mutex *)m, where, what);
    t->cond = c;
    t->signaled = 0;
    t->deadline = deadline;
    cs_point(CS_WAKE, m, where, what);
    t->cond = NULL;
    t->signaled = 0;
    t->deadline = 0;
    cs_take((struct cs_mutex *)m, where, what);
    return 0;
}
static int cs_wake(pthread_cond_t *c, int all, const char *where, const char *what) {
    if (*(unsigned *)c != CS_COND)
        cs_fail("%s: wake %s, which is gone", where, what);
    for (int i = 0; i < CS_TASKS; i++) {
        struct cs_task *t = &cs.task[i];
        if (t->state == CS_LIVE && t->cond == c && !t->signaled) {
            t->signaled = 1;
            if (!all)
                break;                  /* the helpers of a snapshot, which alone are woken so, are all the same */
        }
    }
    return 0;
}
static int cs_cond_destroy(pthread_cond_t *c) {
    for (int i = 0; i < CS_TASKS; i++)
        if (cs.task[i].state == CS_LIVE && cs.task[i].cond == c)
            cs_fail("a condition is destroyed for which a task waits");
    *(unsigned *)c = 0;
    return 0;
}

/* ---- threads ---- */

static void cs_entry(void) {
    struct cs_task *t = &cs.task[cs_cur];
    t->run(t->arg);
    if (t->held)
        cs_fail("a task ends with a lock held");
    t->state = CS_DONE;
    cs_leave();
}
static int cs_spawn(int i, int end, void *(*run)(void *), void *arg, const char *what) {
    for (; i < end; i++) {
        struct cs_task *t = &cs.task[i];
        if (t->state != CS_FREE)
            continue;
        memset(t, 0, sizeof *t);
        t->state = CS_LIVE;
        t->kind = CS_START;
        t->run = run;
        t->arg = arg;
        t->where = "thread";
        t->what = what;
        getcontext(&t->context);
        t->context.uc_stack.ss_sp = cs_stack[i];
        t->context.uc_stack.ss_size = CS_STACK;
        t->context.uc_link = NULL;
        makecontext(&t->context, cs_entry, 0);
        t->low = cs_stack[i] + CS_STACK;            /* what makecontext has put there is always the same */
        return i;
    }
    return -EAGAIN;
}
static int cs_thread_start(pthread_t *t, void *(*run)(void *), void *arg) {
    int i = cs_spawn(CS_OPERATIONS + 1, CS_TASKS, run, arg, "helper");
    if (i > 0)
        *t = (pthread_t)i;
    return i < 0 ? i : 0;
}
static int cs_join(pthread_t t, const char *where) {
    if (cs_quiet)
        cs_fail("%s: joins in the set-up", where);
    cs.task[cs_cur].joins = (int)t;
    cs_point(CS_JOIN, NULL, where, "join");
    return 0;
}

/* ---- atomics ---- */

static void cs_watch(void *p, uint64_t n, int guarded) {    /* guarded: changed only under the lock that its readers may hold */
    if (cs.watches == CS_WATCHES)
        cs_fail("too many watches");
    else
        cs.watch[cs.watches++] = (struct cs_watch){ (char *)p, (char *)p + n, guarded };
}
static void cs_dull(void *p, uint64_t n) {                  /* figures that nothing depends on */
    if (cs.dulls == CS_DULLS)
        cs_fail("too many figures");
    else
        cs.dull[cs.dulls++] = (struct cs_dull){ p, n };
}
static void cs_atomic(const void *p, int change, const char *where, const char *what) {
    for (int i = 0; i < cs.watches && !cs_quiet; i++)
        if ((const char *)p >= cs.watch[i].start && (const char *)p < cs.watch[i].end) {
            if (change || !cs.watch[i].guarded || !cs.task[cs_cur].held)
                cs_point(CS_ATOMIC, (void *)p, where, what);
            break;
        }
    if (*(const uint64_t *)p == CS_DEAD)
        cs_fail("%s: %s is gone", where, what);
}
static void cs_store(void *p, uint64_t v, const char *where, const char *what) {
    cs_atomic(p, 1, where, what);
    if (cs_on_store)
        cs_on_store(p, v);
}

/* ---- files ---- */

static struct cs_file *cs_io(int fd, const char *where, const char *what) {
    struct cs_file *f = &cs.file[fd];
    if (cs.task[cs_cur].held)
        cs_fail("%s: %s with a lock held", where, what);
    cs_point(CS_IO, f, where, what);
    if (!f->open)
        cs_fail("%s: %s of file %d after its close", where, what, fd);
    return f;
}
static int cs_faulty(int fd, int write) {
    int *left = fd < 2 ? (write ? &cs.fail_disk : &cs.fail_read) : &cs.fail_write;
    if (!*left || (fd >= 2 && !write))
        return 0;
    *left = 0;
    cs.failed_by |= 1 << cs_cur;
    return 1;
}
static int64_t cs_read(int fd, char *buf, uint64_t n, uint64_t off, const char *where) {
    for (uint64_t at = off, stop; at < off + n; at = stop) {
        struct cs_file *f = cs_io(fd, where, fd < 2 ? "read the disk" : "read the target");
        stop = (at | ((1 << CS_SHIFT) - 1)) + 1;
        if (stop > off + n)
            stop = off + n;
        if (!(cs.readers >> cs_cur & 1) && cs_faulty(fd, 0))
            return -EIO;
        for (uint64_t u = at; u < stop; u += CS_UNIT)
            memset(buf + (u - off), f->unit[u / CS_UNIT], CS_UNIT);
    }
    return (int64_t)n;
}
/* Up to the first cluster that is not in memory. */
static int64_t cs_read_cached(int fd, char *buf, uint64_t n, uint64_t off, const char *where) {
    uint64_t stop = off;
    while (stop < off + n && !(cs.cold >> (stop >> CS_SHIFT) & 1))
        stop = (stop | ((1 << CS_SHIFT) - 1)) + 1;
    if (stop > off + n)
        stop = off + n;
    if (stop > off)
        return cs_read(fd, buf, stop - off, off, where);
    cs_io(fd, where, "ask what is in memory");
    return -EAGAIN;
}
static int64_t cs_write(int fd, const char *buf, uint64_t n, uint64_t off, const char *where) {
    for (uint64_t at = off, stop; at < off + n; at = stop) {
        struct cs_file *f = cs_io(fd, where, fd < 2 ? "write the disk" : "write the target");
        stop = (at | ((1 << CS_SHIFT) - 1)) + 1;
        if (stop > off + n)
            stop = off + n;
        if (cs_faulty(fd, 1))
            return -EIO;
        for (uint64_t u = at; u < stop; u += CS_UNIT) {
            if (memcmp(buf + (u - off), buf + (u - off) + 1, CS_UNIT - 1))
                cs_fail("%s: torn data", where);
            f->unit[u / CS_UNIT] = (uint8_t)buf[u - off];
        }
        f->hole[at >> CS_SHIFT] = 0;
        f->changed |= 1 << (at >> CS_SHIFT);
    }
    return (int64_t)n;
}
static int cs_zero(int fd, uint64_t off, uint64_t n, const char *where) {
    for (uint64_t at = off, stop; at < off + n; at = stop) {
        struct cs_file *f = cs_io(fd, where, fd < 2 ? "zero the disk" : "zero the target");
        stop = (at | ((1 << CS_SHIFT) - 1)) + 1;
        if (stop > off + n)
            stop = off + n;
        if (cs_faulty(fd, 1))
            return -EIO;
        for (uint64_t u = at; u < stop; u += CS_UNIT)
            f->unit[u / CS_UNIT] = 0;
        if (stop - at == 1 << CS_SHIFT)
            f->hole[at >> CS_SHIFT] = 1;
        f->changed |= 1 << (at >> CS_SHIFT);
    }
    return 0;
}
static int64_t cs_seek(int fd, uint64_t off, int whence, const char *where) {
    struct cs_file *f = &cs.file[fd];
    if (whence == SEEK_END)
        return CS_UNITS * CS_UNIT;      /* never changes */
    f = cs_io(fd, where, whence == SEEK_DATA ? "seek data" : "seek a hole");
    while (off < CS_UNITS * CS_UNIT && f->hole[off >> CS_SHIFT] != (whence == SEEK_HOLE))
        off = (off | ((1 << CS_SHIFT) - 1)) + 1;
    return off < CS_UNITS * CS_UNIT || whence == SEEK_HOLE ? (int64_t)off : -ENXIO;
}
static int cs_close(int fd, const char *where) {
    cs_io(fd, where, "close")->open = 0;
    return 0;
}

/* ---- what a task may do now ---- */

static int cs_enabled(int i) {
    struct cs_task *t = &cs.task[i];
    if (t->state != CS_LIVE)
        return 0;
    if (t->kind == CS_LOCK)
        return ((struct cs_mutex *)t->object)->owner == 0;
    if (t->kind == CS_WAKE)
        return (t->signaled || (t->deadline && cs.clock >= t->deadline)) && ((struct cs_mutex *)t->object)->owner == 0;
    if (t->kind == CS_JOIN)
        return cs.task[t->joins].state == CS_DONE;
    return 1;
}
static unsigned cs_all_enabled(void) {
    unsigned mask = 0;
    for (int i = 1; i < CS_TASKS; i++)
        mask |= (unsigned)cs_enabled(i) << i;
    return mask;
}
static void cs_go_on(int i) {
    cs_cur = i;
    swapcontext(&cs_main, &cs.task[i].context);
}

/* ---- the state: kept, restored, and known again ---- */

static uint64_t cs_mix(uint64_t h, const void *p, uint64_t n) {
    const uint64_t *w = (const uint64_t *)p;
    uint64_t a = h, b = ~h;
    for (uint64_t i = 0; i < n / 8; i += 2) {
        a = (a ^ w[i]) * 0x9e3779b97f4a7c15ull;
        a ^= a >> 29;
        if (i + 1 < n / 8) {
            b = (b ^ w[i + 1]) * 0xc2b2ae3d27d4eb4full;
            b ^= b >> 31;
        }
    }
    a = (a ^ (b << 23 | b >> 41)) * 0xff51afd7ed558ccdull;
    return a ^ a >> 32;
}
static uint64_t cs_hash(void) {
    uint64_t h = 1;
    for (int i = 0; i < cs.dulls; i++)
        if (*(uint64_t *)cs.dull[i].p != CS_DEAD)
            memset(cs.dull[i].p, 0, cs.dull[i].n);
    for (int i = 0; i < CS_TASKS; i++) {
        struct cs_task *t = &cs.task[i];
        uint64_t few[] = { (uint64_t)t->state, (uint64_t)t->kind, (uint64_t)t->signaled, (uint64_t)t->object,
                           (uint64_t)t->cond, (uint64_t)t->deadline, (uint64_t)t->joins, (uint64_t)t->held };
        if (t->state == CS_LIVE) {
            h = cs_mix(h, few, sizeof few);
            h = cs_mix(h, t->low, (uint64_t)(cs_stack[i] + CS_STACK - t->low) & ~7ull);
        } else
            h = cs_mix(h, few, 8);
        h = cs_mix(h, cs_heap[i], cs.top[i]);
    }
    h = cs_mix(h, cs.file, sizeof cs.file & ~7ull);
    return cs_mix(h, &cs.clock, (uint64_t)((char *)(&cs + 1) - (char *)&cs.clock) & ~7ull) | 1;
}

struct cs_saved { char *p; uint64_t room; unsigned todo; int chosen; };

static char *cs_copy(char *to, void *p, uint64_t n, int back) {
    if (back)
        memcpy(p, to, n);
    else
        memcpy(to, p, n);
    return to + n;
}
static char *cs_copy_all(char *at, int back) {
    at = cs_copy(at, &cs, sizeof cs, back);
    for (int i = 0; i < CS_TASKS; i++) {
        at = cs_copy(at, cs_heap[i], cs.top[i], back);
        if (cs.task[i].state == CS_LIVE) {
            char *low = cs.task[i].low - 256;       /* with the frame of swapcontext() */
            if (cs.task[i].kind == CS_START)
                low = cs_stack[i] + CS_STACK - 256;
            at = cs_copy(at, low, (uint64_t)(cs_stack[i] + CS_STACK - low), back);
        }
    }
    return at;
}
static void cs_save(struct cs_saved *s) {
    uint64_t n = sizeof cs;
    for (int i = 0; i < CS_TASKS; i++)
        n += cs.top[i] + (cs.task[i].state == CS_LIVE ? (uint64_t)(cs_stack[i] + CS_STACK - cs.task[i].low) + 512 : 0);
    if (n > s->room) {
        free(s->p);
        s->room = n + 8192;
        s->p = (char *)malloc(s->room);
        if (!s->p)
            abort();
    }
    cs_copy_all(s->p, 0);
}
static void cs_restore(struct cs_saved *s) { cs_copy_all(s->p, 1); }

/* ---- the states that were seen ---- */

static uint64_t *cs_seen, cs_seen_room, cs_seen_count;

static int cs_see(uint64_t h) {         /* 1: for the first time */
    if (cs_seen_count * 2 >= cs_seen_room) {
        uint64_t *old = cs_seen, room = cs_seen_room, n = room ? room * 2 : 1 << 16;
        cs_seen = (uint64_t *)calloc(n, 8);
        if (!cs_seen)
            abort();
        cs_seen_room = n;
        for (uint64_t i = 0; i < room; i++)
            if (old[i]) {
                uint64_t k = old[i] & (n - 1);
                while (cs_seen[k])
                    k = (k + 1) & (n - 1);
                cs_seen[k] = old[i];
            }
        free(old);
    }
    uint64_t k = (h >> 7) & (cs_seen_room - 1);
    k = h & (cs_seen_room - 1);
    while (cs_seen[k]) {
        if (cs_seen[k] == h)
            return 0;
        k = (k + 1) & (cs_seen_room - 1);
    }
    cs_seen[k] = h;
    cs_seen_count++;
    return 1;
}
static void cs_see_nothing(void) {
    free(cs_seen);
    cs_seen = NULL;
    cs_seen_room = cs_seen_count = 0;
}

/* ---- runs ---- */

static struct { uint64_t states, steps, schedules; int depth; char path[CS_DEPTH + 1]; } cs_report;
static struct cs_saved cs_begin, cs_stackof[CS_DEPTH];
static uint64_t cs_way[CS_DEPTH + 1];   /* the hash of the state after so many steps of the path */
static int cs_operations;               /* tasks 1 to this are those under test */
static void *(*cs_finish)(void *);
static void *cs_finish_arg;

/* Before a run: forget the last one. What follows, up to cs_ready(), is set-up. */
static void cs_reset(void) {
    memset(&cs, 0, sizeof cs);
    cs.clock = 1;
    memset(cs_heap, 0, sizeof cs_heap);
    memset(cs_stack, 0, sizeof cs_stack);
    memset(&cs_report, 0, sizeof cs_report);
    cs_text[0] = 0;
    cs_cur = 0;
    cs_quiet = 1;
    cs_operations = 0;
    cs_see_nothing();
}
static void cs_operation(void *(*run)(void *), void *arg) {
    cs_operations++;
    cs_spawn(cs_operations, CS_OPERATIONS + 1, run, arg, "operation");
}
/* The set-up ends: operations are there, as tasks from 1 on; helpers come to where they wait for work. */
static void cs_ready(void *(*finish)(void *), void *arg) {
    cs_finish = finish;
    cs_finish_arg = arg;
    cs_quiet = 0;
    for (int i = CS_OPERATIONS + 1; i < CS_TASKS; i++)
        while (!cs_text[0] && cs_enabled(i))
            cs_go_on(i);
    cs_save(&cs_begin);
}
static int cs_operations_ended(void) {
    for (int i = 1; i <= cs_operations; i++)
        if (cs.task[i].state != CS_DONE)
            return 0;
    return 1;
}
/* Nothing can go on: that must be the end. Then the finish, which looks at everything and closes it, in one order. */
static void cs_end(void) {
    int i;
    cs_report.schedules++;
    if (!cs_operations_ended()) {
        int n = snprintf(cs_text, sizeof cs_text, "deadlock:");
        for (i = 1; i < CS_TASKS && n < CS_TEXT - 100; i++)
            if (cs.task[i].state == CS_LIVE)
                n += snprintf(cs_text + n, sizeof cs_text - (size_t)n, " task %d in %s at %s;", i, cs.task[i].where, cs.task[i].what);
        return;
    }
    cs.task[1].state = CS_FREE;         /* its place; it has ended */
    i = cs_spawn(1, 2, cs_finish, cs_finish_arg, "finish");
    for (unsigned mask; !cs_text[0] && cs.task[i].state == CS_LIVE;) {
        mask = cs_all_enabled();
        if (!mask) {
            snprintf(cs_text, sizeof cs_text, "the finish hangs in %s at %s", cs.task[i].where, cs.task[i].what);
            return;
        }
        cs_go_on(__builtin_ctz(mask));
        cs_report.steps++;
    }
    for (i = 1; i < CS_TASKS && !cs_text[0]; i++)
        if (cs.task[i].state == CS_LIVE)
            snprintf(cs_text, sizeof cs_text, "task %d is left in %s at %s", i, cs.task[i].where, cs.task[i].what);
}
static void cs_step(int i) {
    if (cs_report.depth == CS_DEPTH) {
        snprintf(cs_text, sizeof cs_text, "no end after %d steps", CS_DEPTH);
        return;
    }
    cs_report.path[cs_report.depth++] = "0123456789abc"[i];
    cs_report.steps++;
    cs_go_on(i);
}
/* Whether the path has come to this state before. Then it can go round and round, and nobody gets anywhere. */
static void cs_look_back(uint64_t h) {
    for (int i = 0; i < cs_report.depth; i++)
        if (cs_way[i] == h)
            snprintf(cs_text, sizeof cs_text, "livelock: the same state again after %d steps", cs_report.depth - i);
}
/* Every state that any schedule reaches, once each. */
static int cs_explore(uint64_t most_states) {
    struct cs_saved *s;
    unsigned mask;
    int level = 0, fresh;
    uint64_t h;
    cs_restore(&cs_begin);
    for (;;) {
        if (cs_text[0])
            return CS_VIOLATION;
        h = cs_hash();
        fresh = cs_see(h);
        if (!fresh)
            cs_look_back(h);
        cs_way[cs_report.depth] = h;
        if (cs_text[0])
            return CS_VIOLATION;
        mask = fresh ? cs_all_enabled() : 0;
        if (fresh && !mask) {
            cs_end();
            if (cs_text[0])
                return CS_VIOLATION;
        }
        cs_report.states = cs_seen_count;
        if (cs_seen_count >= most_states)
            return CS_LIMIT;
        if (mask & (mask - 1)) {
            s = &cs_stackof[level++];
            s->todo = mask & (mask - 1);
            s->chosen = cs_report.depth;
            cs_save(s);
        } else if (!mask) {
            while (level && !cs_stackof[level - 1].todo)
                level--;
            if (!level)
                return CS_OK;
            s = &cs_stackof[level - 1];
            mask = s->todo;
            s->todo &= mask - 1;
            cs_report.depth = s->chosen;
            cs_restore(s);
        }
        cs_step(__builtin_ctz(mask));
    }
}
/* One schedule at random: a task mostly goes on; `seed` is the whole of the chance. */
static int cs_walk(uint64_t seed) {
    unsigned mask;
    int last = 0, often;
    cs_restore(&cs_begin);
    cs_report.depth = 0;
    seed = (seed + 1) * 0x9e3779b97f4a7c15ull;
    often = 2 + (int)(seed >> 60);      /* one switch in so many steps */
    while (!cs_text[0] && (mask = cs_all_enabled())) {
        seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17;
        if (!(mask >> last & 1) || (seed >> 32) % (unsigned)often == 0) {
            int skip = (int)((seed >> 20) % (unsigned)__builtin_popcount(mask));
            unsigned m = mask;
            while (skip--)
                m &= m - 1;
            last = __builtin_ctz(m);
        }
        cs_step(last);
    }
    if (!cs_text[0])
        cs_end();
    return cs_text[0] ? CS_VIOLATION : CS_OK;
}
/* The schedule that a path tells of; `tell` is called with each step before it is made. */
static int cs_replay(const char *path, void (*tell)(int task, const char *where, const char *what)) {
    cs_restore(&cs_begin);
    cs_report.depth = 0;
    for (; *path && !cs_text[0]; path++) {
        int i = *path <= '9' ? *path - '0' : *path - 'a' + 10;
        if (i < 1 || i >= CS_TASKS || !cs_enabled(i))
            return CS_BAD_SCHEDULE;
        tell(i, cs.task[i].where, cs.task[i].what);
        cs_step(i);
    }
    if (!cs_text[0] && cs_all_enabled())
        return CS_BAD_SCHEDULE;
    if (!cs_text[0])
        cs_end();
    return cs_text[0] ? CS_VIOLATION : CS_OK;
}

/* ---- the core's calls ---- */

#ifndef CBW_SCHEDULER_ITSELF
#undef CBW_SLOTS
#define CBW_SLOTS 4
#define thread_slot() (cs_cur % CBW_SLOTS)

#define calloc(a, b) cs_alloc((uint64_t)(a) * (b))
#define malloc(n) cs_alloc(n)
#define free(p) cs_free(p)
#define posix_memalign(p, a, n) cs_memalign((void **)(p), a, n)
#define map_lazily(n) cs_map(n)
#define munmap(p, n) cs_unmap(p)
#define madvise(p, n, a) cs_forget(p)

#define pthread_mutex_init(m, a) cs_mutex_init(m)
#define pthread_mutex_destroy(m) cs_mutex_destroy(m)
#define pthread_mutex_lock(m) cs_lock(m, __func__, #m)
#define pthread_mutex_unlock(m) cs_unlock(m, __func__, #m)
#define cond_init(c) cs_cond_init(c)
#define pthread_cond_destroy(c) cs_cond_destroy(c)
#define pthread_cond_wait(c, m) cs_cond_wait(c, m, 0, __func__, #c)
#define cond_wait_until(c, m, t) cs_cond_wait(c, m, t, __func__, #c)
#define pthread_cond_signal(c) cs_wake(c, 0, __func__, #c)
#define pthread_cond_broadcast(c) cs_wake(c, 1, __func__, #c)
#define thread_start(t, run, arg) cs_thread_start(t, run, arg)
#define pthread_join(t, r) cs_join(t, __func__)

#define monotonic_ns() (cs.clock)
#define realtime_ns() ((int64_t)1)
#define sleep_ns(n) ((void)(n))

#define load_acquire(p) (cs_atomic(p, 0, __func__, #p), load_acquire(p))
#define load_relaxed(p) (cs_atomic(p, 0, __func__, #p), load_relaxed(p))
#define load_seq_cst(p) (cs_atomic(p, 0, __func__, #p), load_seq_cst(p))
#define store_release(p, v) (cs_store(p, v, __func__, #p), store_release(p, v))
#define store_seq_cst(p, v) (cs_store(p, v, __func__, #p), store_seq_cst(p, v))
#define add_seq_cst(p, v) (cs_atomic(p, 1, __func__, #p), add_seq_cst(p, v))
#define sub_seq_cst(p, v) (cs_atomic(p, 1, __func__, #p), sub_seq_cst(p, v))
#define or_acq_rel(p, v) (cs_atomic(p, 1, __func__, #p), or_acq_rel(p, v))
#define and_acq_rel(p, v) (cs_atomic(p, 1, __func__, #p), and_acq_rel(p, v))
#define add_relaxed(p, v) ((void)(p), (void)(v))        /* figures */

#define read_once(fd, buf, n, off) cs_read(fd, (char *)(buf), n, off, __func__)
#define read_cached(fd, buf, n, off) cs_read_cached(fd, (char *)(buf), n, off, __func__)
#define write_once(fd, buf, n, off) cs_write(fd, (const char *)(buf), n, off, __func__)
#define fallocate_once(fd, mode, off, n) cs_zero(fd, off, n, __func__)
#define seek_once(fd, off, whence) cs_seek(fd, off, whence, __func__)
#define close_once(fd) cs_close(fd, __func__)
#define sync_once(fd) 0
#define try_fallocate_beside(fd, mode) 1
#endif
#endif
