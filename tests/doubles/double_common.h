/* What both doubles stand on: a communicator over POSIX shared memory between the processes of one machine (Linux).
 *
 * A library that includes this file defines, before it, its result codes CODE_ARGUMENT, CODE_USAGE, CODE_SYSTEM and
 * CODE_ABORTED. Every wait ends when its condition holds, when the communicator is retired (aborted or destroyed, by
 * any thread), or when any rank reports misuse: that report is kept in the shared segment, and all ranks return it.
 */
#ifndef DOUBLE_COMMON_H
#define DOUBLE_COMMON_H

#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_RANKS 8
#define RING_BYTES (16 * 1024)   /* a message that fits may be sent before anyone receives it */
#define STAGE_BYTES (256 * 1024) /* a collective's chunk, for each rank */
#define TEXT_BYTES 512
#define NAME_PREFIX "/fvops-double-"

struct ring { /* one sender, one receiver */
    _Atomic uint64_t written, read;
    char bytes[RING_BYTES];
};

struct described { /* a collective as one rank called it; all ranks' must be equal */
    int32_t kind, number, op, root;
    uint64_t count;
};

struct segment {
    _Atomic uint32_t changes; /* futex word: grows with whatever a waiter may wait for */
    _Atomic uint32_t nranks, attached, error_state;
    int error_code;
    char error_text[TEXT_BYTES];
    _Atomic uint32_t present[MAX_RANKS];
    _Atomic uint64_t phase[MAX_RANKS];
    struct described described[MAX_RANKS][2];
    struct ring rings[MAX_RANKS][MAX_RANKS]; /* [sender][receiver] */
    char stage[MAX_RANKS][STAGE_BYTES];
};

enum { ALIVE, DESTROYED, ABORTED };

struct comm { /* never freed, so that a stale handle is recognised */
    struct comm *next;
    struct segment *shared;
    char name[64];
    int rank, nranks;
    _Atomic int gone, users, async_error, unfinished_polls;
    _Atomic int unmapped;
    uint64_t phase, sequence;
};

static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;
static struct comm *registry;
static _Thread_local char last_error[TEXT_BYTES];

/* Errors. `fail_here` is this rank's own; `comm_fail` is told to every rank of the communicator. */

static int fail_here(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return code;
}

static void comm_signal(struct comm *c) {
    atomic_fetch_add(&c->shared->changes, 1);
    syscall(SYS_futex, &c->shared->changes, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static int comm_fail(struct comm *c, int code, const char *format, ...) {
    char text[TEXT_BYTES - 32];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    snprintf(last_error, sizeof last_error, "rank %d: %s", c->rank, text);
    uint32_t none = 0;
    if (atomic_compare_exchange_strong(&c->shared->error_state, &none, 1)) {
        memcpy(c->shared->error_text, last_error, sizeof last_error);
        c->shared->error_code = code;
        atomic_store(&c->shared->error_state, 2);
    }
    comm_signal(c);
    return code;
}

static int comm_trouble(struct comm *c) {
    if (atomic_load(&c->gone) != ALIVE)
        return fail_here(CODE_ABORTED, "rank %d: the communicator was %s during the call", c->rank,
                         atomic_load(&c->gone) == ABORTED ? "aborted" : "destroyed");
    if (atomic_load(&c->shared->error_state) == 2) {
        memcpy(last_error, c->shared->error_text, sizeof last_error);
        return c->shared->error_code;
    }
    return 0;
}

static uint32_t comm_changes(struct comm *c) { return atomic_load(&c->shared->changes); }

/* Sleep until something changes after `seen`; bounded, since retirement in this process must be noticed too. */
static void comm_pause(struct comm *c, uint32_t seen) {
    struct timespec limit = {0, 5 * 1000 * 1000};
    syscall(SYS_futex, &c->shared->changes, FUTEX_WAIT, seen, &limit, NULL, 0);
}

/* Life of a communicator. `users` counts its creation and every call in flight; who leaves last unmaps. */

static void comm_leave(struct comm *c) {
    if (atomic_fetch_sub(&c->users, 1) == 1 && !atomic_exchange(&c->unmapped, 1))
        munmap(c->shared, sizeof *c->shared);
}

static int comm_enter(struct comm *c) {
    int known = 0;
    pthread_mutex_lock(&registry_lock);
    for (struct comm *at = registry; at; at = at->next) known |= at == c;
    if (known) atomic_fetch_add(&c->users, 1);
    pthread_mutex_unlock(&registry_lock);
    if (!known) return fail_here(CODE_ARGUMENT, "%p is not a communicator of this library", (void *)c);
    int gone = atomic_load(&c->gone);
    if (gone == ALIVE) return 0;
    comm_leave(c);
    return fail_here(CODE_ARGUMENT, "rank %d: the communicator was %s before the call", c->rank,
                     gone == ABORTED ? "aborted" : "destroyed");
}

static int comm_ready(struct comm *c) { return atomic_load(&c->shared->attached) == (uint32_t)c->nranks; }

static void comm_retire(struct comm *c, int how) {
    int alive = ALIVE;
    if (!comm_ready(c)) shm_unlink(c->name);
    if (!atomic_compare_exchange_strong(&c->gone, &alive, how)) return;
    comm_signal(c);
    comm_leave(c);
}

static void make_name(char *name, size_t size) {
    unsigned char random[16];
    if (getrandom(random, sizeof random, 0) != sizeof random) abort();
    int at = snprintf(name, size, "%s", NAME_PREFIX);
    for (size_t i = 0; i < sizeof random; i++) at += snprintf(name + at, size - at, "%02x", random[i]);
}

static int comm_attach(struct comm **out, const char *name, int nranks, int rank) {
    *out = NULL;
    if (strncmp(name, NAME_PREFIX, strlen(NAME_PREFIX)) != 0)
        return fail_here(CODE_ARGUMENT, "the id was not made by this library");
    if (nranks < 1 || nranks > MAX_RANKS || rank < 0 || rank >= nranks)
        return fail_here(CODE_ARGUMENT, "rank %d of %d ranks is out of range (at most %d)", rank, nranks, MAX_RANKS);
    int file = shm_open(name, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, sizeof(struct segment)) != 0)
        return fail_here(CODE_SYSTEM, "cannot open shared memory %s", name);
    struct segment *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (shared == MAP_FAILED) return fail_here(CODE_SYSTEM, "cannot map shared memory %s", name);
    struct comm *c = calloc(1, sizeof *c);
    if (!c) abort();
    c->shared = shared;
    c->rank = rank;
    c->nranks = nranks;
    atomic_store(&c->users, 1);
    snprintf(c->name, sizeof c->name, "%.63s", name);
    pthread_mutex_lock(&registry_lock);
    c->next = registry;
    registry = c;
    pthread_mutex_unlock(&registry_lock);
    *out = c;
    uint32_t agreed = 0;
    if (!atomic_compare_exchange_strong(&shared->nranks, &agreed, nranks) && agreed != (uint32_t)nranks)
        return comm_fail(c, CODE_ARGUMENT, "says that there are %d ranks, another says %u", nranks, agreed);
    if (atomic_exchange(&shared->present[rank], 1)) return comm_fail(c, CODE_ARGUMENT, "this rank came twice");
    if (atomic_fetch_add(&shared->attached, 1) + 1 == (uint32_t)nranks) shm_unlink(name);
    comm_signal(c);
    return 0;
}

/* Wait until all ranks have come here as often as this one. */
static int comm_meet(struct comm *c) {
    uint64_t mine = ++c->phase;
    atomic_store(&c->shared->phase[c->rank], mine);
    comm_signal(c);
    for (;;) {
        uint32_t seen = comm_changes(c);
        int here = 0, code;
        for (int rank = 0; rank < c->nranks; rank++) here += atomic_load(&c->shared->phase[rank]) >= mine;
        if (here == c->nranks) return 0;
        if ((code = comm_trouble(c))) return code;
        comm_pause(c, seen);
    }
}

/* Faults, and a count of calls. `double_fault("ncclSend", 2, FAULT_ERROR, 3)`: the second call from now fails. */

enum { FAULT_ERROR = 1, FAULT_HANG = 2, FAULT_ASYNC = 3, FAULT_IN_PROGRESS = 4 };
#define MAX_FUNCTIONS 64

static struct counted {
    char function[48];
    int calls, until, kind, code;
} counted[MAX_FUNCTIONS];
static pthread_mutex_t counted_lock = PTHREAD_MUTEX_INITIALIZER;

static struct counted *count_of(const char *function) {
    for (int i = 0; i < MAX_FUNCTIONS; i++) {
        if (!counted[i].function[0]) snprintf(counted[i].function, sizeof counted[i].function, "%s", function);
        if (strcmp(counted[i].function, function) == 0) return &counted[i];
    }
    abort();
}

EXPORT void double_fault(const char *function, int nth, int kind, int code) {
    pthread_mutex_lock(&counted_lock);
    struct counted *count = count_of(function);
    count->until = nth;
    count->kind = kind;
    count->code = code;
    pthread_mutex_unlock(&counted_lock);
}

EXPORT int double_calls(const char *function) {
    pthread_mutex_lock(&counted_lock);
    int calls = count_of(function)->calls;
    pthread_mutex_unlock(&counted_lock);
    return calls;
}

/* Count a call of `function`; do what an injected fault wants. `c` is a communicator that the caller has entered. */
static int called(const char *function, struct comm *c) {
    pthread_mutex_lock(&counted_lock);
    struct counted *count = count_of(function);
    count->calls++;
    int kind = count->until > 0 && --count->until == 0 ? count->kind : 0, code = count->code;
    pthread_mutex_unlock(&counted_lock);
    if (kind == FAULT_ERROR) return fail_here(code, "injected into %s", function);
    if (kind == FAULT_ASYNC && c) atomic_store(&c->async_error, code);
    if (kind == FAULT_IN_PROGRESS && c) atomic_store(&c->unfinished_polls, code);
    if (kind == FAULT_HANG && c) {
        int trouble;
        for (;;) {
            uint32_t seen = comm_changes(c);
            if ((trouble = comm_trouble(c))) return trouble;
            comm_pause(c, seen);
        }
    }
    return 0;
}

#endif
