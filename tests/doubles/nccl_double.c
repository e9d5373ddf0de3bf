/* A library with NCCL's C interface that works on host memory between processes: for tests of whoever calls NCCL.
 *
 * Stricter than the real one: arguments are compared between the ranks, and a mistake is an error on all of them.
 * Compiled with -DNO_ALLTOALL it is a library from before ncclAlltoAll.
 */
enum { CODE_ARGUMENT = 4, CODE_USAGE = 5, CODE_SYSTEM = 2, CODE_ABORTED = 6, IN_PROGRESS = 7 };
#include "double_collectives.h"
#include "double_common.h"
#include "double_transfers.h"

#define CONFIG_MAGIC 0xcafebeefu
#define INIT_SECONDS 60 /* a blocking initialisation cannot be aborted */

typedef struct { char bytes[128]; } unique_id;
typedef struct { /* the part of ncclConfig_t that every version has */
    size_t size;
    unsigned int magic, version;
    int blocking;
} config;

static const int number_of[] = {I8, U8, I32, U32, I64, U64, F16, F32, F64, BF16, E4M3, E5M2};
#define DATATYPES ((int)(sizeof number_of / sizeof *number_of))

struct queued { /* an operation, in a group or on its own */
    int is_transfer;
    struct transfer transfer;
    struct collective collective;
};

static _Thread_local struct {
    int depth, code;
    size_t count, room;
    struct queued *items;
    char text[TEXT_BYTES];
} group;

#define CALLED(c)                               \
    do {                                        \
        int injected = called(__func__, c);     \
        if (injected) return injected;          \
    } while (0)

static int run(struct queued *items, size_t count) {
    struct transfer *transfers = calloc(count ? count : 1, sizeof *transfers);
    if (!transfers) abort();
    size_t open = 0;
    for (size_t i = 0; i < count; i++)
        if (items[i].is_transfer) transfers[open++] = items[i].transfer;
    int code = run_transfers(transfers, open);
    free(transfers);
    for (size_t i = 0; i < count && !code; i++)
        if (!items[i].is_transfer) code = run_collective(&items[i].collective);
    return code;
}

/* Run `item` now, or keep it for the end of the group. */
static int issue(struct comm *c, struct queued item) {
    if (!group.depth) {
        int code = run(&item, 1);
        return code ? code : atomic_load(&c->unfinished_polls) > 0 ? IN_PROGRESS : 0;
    }
    if (group.count == group.room) {
        group.room = group.room ? 2 * group.room : 16;
        group.items = realloc(group.items, group.room * sizeof *group.items);
        if (!group.items) abort();
    }
    atomic_fetch_add(&c->users, 1);
    group.items[group.count++] = item;
    return 0;
}

/* An error inside a group is also what ends it. */
static int note(int code) {
    if (code && code != IN_PROGRESS && group.depth && !group.code) {
        group.code = code;
        memcpy(group.text, last_error, sizeof last_error);
    }
    return code;
}

static int check_type(struct comm *c, const char *function, int datatype) {
    if (datatype >= 0 && datatype < DATATYPES) return 0;
    return comm_fail(c, CODE_ARGUMENT, "%s: %d is no datatype", function, datatype);
}

static int collective(const char *function, struct comm *c, int kind, const void *send, void *recv, size_t count,
                      int datatype, int op, int root) {
    int code = comm_enter(c);
    if (code) return note(code);
    code = called(function, c);
    if (!code && !comm_ready(c)) code = fail_here(CODE_ARGUMENT, "%s before the communicator was ready", function);
    if (!code) code = comm_trouble(c);
    if (!code) code = check_type(c, function, datatype);
    if (!code && (op < 0 || op >= REDUCTIONS)) code = comm_fail(c, CODE_ARGUMENT, "%s: %d is no reduction", function, op);
    if (!code && (root < 0 || root >= c->nranks))
        code = comm_fail(c, CODE_ARGUMENT, "%s: root %d is no rank of %d", function, root, c->nranks);
    int reads = kind != BROADCAST || c->rank == root, writes = kind != REDUCE_TO || c->rank == root;
    if (!code && count && ((reads && !send) || (writes && !recv)))
        code = comm_fail(c, CODE_ARGUMENT, "%s: null buffer", function);
    if (!code && kind == ALL_TO_ALL && count && send == recv)
        code = comm_fail(c, CODE_ARGUMENT, "%s: in place", function);
    if (!code) {
        struct queued item = {.collective = {c, {kind, number_of[datatype], op, root, count}, send, recv}};
        code = issue(c, item);
    }
    comm_leave(c);
    return note(code);
}

static int point_to_point(const char *function, struct comm *c, int sending, void *buffer, size_t count, int datatype,
                          int peer) {
    int code = comm_enter(c);
    if (code) return note(code);
    code = called(function, c);
    if (!code && !comm_ready(c)) code = fail_here(CODE_ARGUMENT, "%s before the communicator was ready", function);
    if (!code) code = comm_trouble(c);
    if (!code) code = check_type(c, function, datatype);
    if (!code && (peer < 0 || peer >= c->nranks))
        code = comm_fail(c, CODE_ARGUMENT, "%s: peer %d is no rank of %d", function, peer, c->nranks);
    if (!code && peer == c->rank && !group.depth)
        code = comm_fail(c, CODE_USAGE, "%s: peer %d is this rank, outside a group", function, peer);
    if (!code && count && !buffer) code = comm_fail(c, CODE_ARGUMENT, "%s: null buffer", function);
    if (!code) {
        struct header header = {MESSAGE_POINT_TO_POINT, datatype, count};
        size_t bytes = count * number_bytes[number_of[datatype]];
        struct queued item = {1, {c, sending, peer, buffer, bytes, 0, header, 0}, {0}};
        code = issue(c, item);
    }
    comm_leave(c);
    return note(code);
}

EXPORT int ncclGetVersion(int *version) {
    CALLED(NULL);
#ifdef NO_ALLTOALL
    *version = 22703;
#else
    *version = 22809;
#endif
    return 0;
}

EXPORT const char *ncclGetErrorString(int code) {
    static const char *const texts[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error",
                                        "invalid argument", "invalid usage", "remote process exited or there was an error",
                                        "NCCL operation in progress"};
    return code >= 0 && code < 8 ? texts[code] : "unknown result code";
}

EXPORT const char *ncclGetLastError(struct comm *c) {
    (void)c;
    return last_error;
}

EXPORT int ncclGetUniqueId(unique_id *id) {
    CALLED(NULL);
    memset(id, 0, sizeof *id);
    make_name(id->bytes, sizeof id->bytes);
    return 0;
}

EXPORT int ncclCommInitRank(struct comm **out, int nranks, unique_id id, int rank) {
    CALLED(NULL);
    int code = comm_attach(out, id.bytes, nranks, rank);
    time_t until = time(NULL) + INIT_SECONDS;
    while (!code && !comm_ready(*out)) {
        uint32_t seen = comm_changes(*out);
        code = comm_trouble(*out);
        if (!code && time(NULL) > until) code = fail_here(CODE_SYSTEM, "not all ranks came in %d s", INIT_SECONDS);
        if (!code && !comm_ready(*out)) comm_pause(*out, seen);
    }
    if (code && *out) comm_retire(*out, ABORTED);
    return code;
}

EXPORT int ncclCommInitRankConfig(struct comm **out, int nranks, unique_id id, int rank, const config *wanted) {
    CALLED(NULL);
    if (!wanted || wanted->size < sizeof *wanted || wanted->magic != CONFIG_MAGIC || wanted->version < 21400)
        return fail_here(CODE_ARGUMENT, "ncclConfig_t was not initialised");
    if (wanted->blocking) return ncclCommInitRank(out, nranks, id, rank);
    int code = comm_attach(out, id.bytes, nranks, rank);
    return code ? code : IN_PROGRESS;
}

EXPORT int ncclCommGetAsyncError(struct comm *c, int *code) {
    int failed = comm_enter(c);
    if (failed) return failed;
    failed = called(__func__, c);
    *code = atomic_load(&c->async_error);
    if (*code) fail_here(0, "rank %d: injected asynchronous error", c->rank);
    if (!*code) *code = comm_trouble(c);
    if (!*code && !comm_ready(c)) *code = IN_PROGRESS;
    if (!*code && atomic_load(&c->unfinished_polls) > 0) {
        atomic_fetch_sub(&c->unfinished_polls, 1);
        *code = IN_PROGRESS;
    }
    comm_leave(c);
    return failed;
}

static int ask(const char *function, struct comm *c, int *out, int rank) {
    int code = comm_enter(c);
    if (code) return code;
    code = called(function, c);
    *out = rank ? c->rank : c->nranks;
    comm_leave(c);
    return code;
}

EXPORT int ncclCommCount(struct comm *c, int *count) { return ask(__func__, c, count, 0); }
EXPORT int ncclCommUserRank(struct comm *c, int *rank) { return ask(__func__, c, rank, 1); }

static int retire(const char *function, struct comm *c, int how) {
    int code = comm_enter(c);
    if (code) return code;
    code = called(function, c);
    if (!code && how == DESTROYED && group.depth)
        code = comm_fail(c, CODE_USAGE, "%s inside a group that was not ended", function);
    if (!code) comm_retire(c, how);
    comm_leave(c);
    return code;
}

EXPORT int ncclCommDestroy(struct comm *c) { return retire(__func__, c, DESTROYED); }
EXPORT int ncclCommAbort(struct comm *c) { return retire(__func__, c, ABORTED); }

/* Never done at once, as with the real one on a communicator that does not block. */
EXPORT int ncclCommFinalize(struct comm *c) {
    int code = comm_enter(c);
    if (code) return code;
    code = called(__func__, c);
    if (!code) {
        atomic_store(&c->unfinished_polls, 2);
        code = IN_PROGRESS;
    }
    comm_leave(c);
    return code;
}

EXPORT int ncclAllReduce(const void *send, void *recv, size_t count, int type, int op, struct comm *c, void *stream) {
    (void)stream;
    return collective(__func__, c, ALL_REDUCE, send, recv, count, type, op, 0);
}

EXPORT int ncclReduce(const void *send, void *recv, size_t count, int type, int op, int root, struct comm *c,
                      void *stream) {
    (void)stream;
    return collective(__func__, c, REDUCE_TO, send, recv, count, type, op, root);
}

EXPORT int ncclAllGather(const void *send, void *recv, size_t count, int type, struct comm *c, void *stream) {
    (void)stream;
    return collective(__func__, c, ALL_GATHER, send, recv, count, type, 0, 0);
}

EXPORT int ncclReduceScatter(const void *send, void *recv, size_t count, int type, int op, struct comm *c,
                             void *stream) {
    (void)stream;
    return collective(__func__, c, REDUCE_SCATTER, send, recv, count, type, op, 0);
}

EXPORT int ncclBroadcast(const void *send, void *recv, size_t count, int type, int root, struct comm *c,
                         void *stream) {
    (void)stream;
    return collective(__func__, c, BROADCAST, send, recv, count, type, 0, root);
}

#ifndef NO_ALLTOALL
EXPORT int ncclAlltoAll(const void *send, void *recv, size_t count, int type, struct comm *c, void *stream) {
    (void)stream;
    return collective(__func__, c, ALL_TO_ALL, send, recv, count, type, 0, 0);
}
#endif

EXPORT int ncclSend(const void *buffer, size_t count, int type, int peer, struct comm *c, void *stream) {
    (void)stream;
    return point_to_point(__func__, c, 1, (void *)(uintptr_t)buffer, count, type, peer);
}

EXPORT int ncclRecv(void *buffer, size_t count, int type, int peer, struct comm *c, void *stream) {
    (void)stream;
    return point_to_point(__func__, c, 0, buffer, count, type, peer);
}

EXPORT int ncclGroupStart(void) {
    CALLED(NULL);
    group.depth++;
    return 0;
}

/* Self sends and receives of a group must pair up: nobody else could take part in them. */
static int check_selves(void) {
    for (size_t i = 0; i < group.count; i++) {
        const struct transfer *t = &group.items[i].transfer;
        int open = 0;
        if (!group.items[i].is_transfer || t->peer != t->comm->rank) continue;
        for (size_t j = 0; j < group.count; j++) {
            const struct transfer *other = &group.items[j].transfer;
            if (group.items[j].is_transfer && other->comm == t->comm && other->peer == t->peer)
                open += other->sending ? 1 : -1;
        }
        if (open) return comm_fail(t->comm, CODE_USAGE, "a group's self sends exceed its self receives by %d", open);
    }
    return 0;
}

EXPORT int ncclGroupEnd(void) {
    if (!group.depth) return fail_here(CODE_USAGE, "ncclGroupEnd without ncclGroupStart");
    int code = called(__func__, group.count ? group.items[0].transfer.comm : NULL);
    if (--group.depth) return note(code);
    if (group.code) {
        code = group.code;
        memcpy(last_error, group.text, sizeof last_error);
    }
    if (!code) code = check_selves();
    if (!code) code = run(group.items, group.count);
    for (size_t i = 0; i < group.count; i++) {
        struct comm *c = group.items[i].is_transfer ? group.items[i].transfer.comm : group.items[i].collective.comm;
        if (!code && atomic_load(&c->unfinished_polls) > 0) code = IN_PROGRESS;
        comm_leave(c);
    }
    group.count = 0;
    group.code = 0;
    return code;
}
