/* The floor: the same bytes moved by plain system calls, and the same memory read by a plain loop.
 *
 * Compiled at run time by benchmarks/conftest.py. Every function returns the nanoseconds it took, or -errno. */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 64 };

struct part {
    int disk, target;
    uint64_t first, end; /* clusters */
    uint64_t cluster, length;
    const char *data;
    int64_t rc;
};

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int64_t failed(ssize_t done, uint64_t wanted) {
    if (done < 0)
        return -errno;
    return (uint64_t)done == wanted ? 0 : -EIO;
}

static void *write_part(void *arg) {
    struct part *p = arg;
    char *buffer;
    p->rc = -posix_memalign((void **)&buffer, 4096, p->cluster);
    if (p->rc)
        return NULL;
    for (uint64_t c = p->first; c < p->end && p->rc == 0; c++) {
        off_t at = (off_t)(c * p->cluster);
        p->rc = failed(pread(p->disk, buffer, p->cluster, at), p->cluster);
        if (p->rc == 0)
            p->rc = failed(pwrite(p->target, buffer, p->cluster, at), p->cluster);
        if (p->rc == 0)
            p->rc = failed(pwrite(p->disk, p->data, p->length, at), p->length);
    }
    free(buffer);
    return NULL;
}

/* The first write of `length` bytes into each of `clusters` clusters, shared out evenly between the threads. */
int64_t first_writes(int disk, int target, uint64_t clusters, uint64_t cluster, const char *data, uint64_t length,
                     uint64_t threads) {
    struct part parts[MAX_THREADS];
    pthread_t ids[MAX_THREADS];
    int64_t rc = 0, started = now();
    uint64_t i, running = 0;
    if (threads == 0 || threads > MAX_THREADS)
        return -EINVAL;
    for (i = 0; i < threads; i++) {
        parts[i] = (struct part){disk,    target, clusters * i / threads, clusters * (i + 1) / threads,
                                 cluster, length, data,                   0};
        rc = -pthread_create(&ids[i], NULL, write_part, &parts[i]);
        if (rc)
            break;
        running++;
    }
    for (i = 0; i < running; i++) {
        pthread_join(ids[i], NULL);
        rc = rc ? rc : parts[i].rc;
    }
    return rc ? rc : now() - started;
}

/* Plain writes of `length` bytes at each of `count` offsets. */
int64_t plain_writes(int disk, const uint64_t *offsets, uint64_t count, const char *data, uint64_t length) {
    int64_t rc = 0, started = now();
    for (uint64_t i = 0; i < count && rc == 0; i++)
        rc = failed(pwrite(disk, data, length, (off_t)offsets[i]), length);
    return rc ? rc : now() - started;
}

/* A plain read of `count` words of memory. */
int64_t read_words(const uint64_t *words, uint64_t count, uint64_t *all) {
    int64_t started = now();
    uint64_t seen = 0;
    for (uint64_t i = 0; i < count; i++)
        seen |= words[i];
    *all = seen;
    return now() - started;
}
