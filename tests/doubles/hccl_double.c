/* A library with HCCL's C interface that works on host memory between processes: for tests of whoever calls HCCL.
 *
 * Stricter than the real one: arguments are compared between the ranks, and a mistake is an error on all of them.
 * HCCL has no call for the text of the last error; here HcclGetErrorString adds it to the code's name.
 */
enum { CODE_ARGUMENT = 1, CODE_USAGE = 5, CODE_SYSTEM = 8, CODE_TIMEOUT = 9, CODE_ABORTED = 22 };
#include "double_collectives.h"
#include "double_common.h"
#include "double_transfers.h"

#define ROOT_INFO_BYTES 4108

typedef struct { char bytes[ROOT_INFO_BYTES]; } root_info;
typedef struct {
    int send_or_recv; /* 0, 1 */
    void *buffer;
    uint64_t count;
    int type;
    uint32_t remote;
} batch_item;

static const int number_of[] = {I8, I16, I32, F16, F32, I64, U64, U8, U16, U32, F64, BF16};
#define DATATYPES ((int)(sizeof number_of / sizeof *number_of))

/* What HCCL's documentation lets be reduced on Atlas A2 and A3. */
static int reducible(int number, int op) {
    if (op == PROD && (number == I16 || number == BF16)) return 0;
    return number == I8 || number == I16 || number == I32 || number == I64 || number == F16 || number == F32 ||
           number == BF16;
}

/* Enter, count and check what all calls share; on success the caller leaves. */
static int begin(const char *function, struct comm *c, int type, uint32_t peer, uint64_t count, const void *send,
                 const void *recv) {
    int code = comm_enter(c);
    if (code) return code;
    code = called(function, c);
    if (!code) code = comm_trouble(c);
    if (!code && (type < 0 || type >= DATATYPES)) code = comm_fail(c, CODE_ARGUMENT, "%s: %d is no datatype", function, type);
    if (!code && peer >= (uint32_t)c->nranks)
        code = comm_fail(c, CODE_ARGUMENT, "%s: %u is no rank of %d", function, peer, c->nranks);
    if (!code && count && (!send || !recv)) code = comm_fail(c, CODE_ARGUMENT, "%s: null buffer", function);
    if (code) comm_leave(c);
    return code;
}

static int collective(const char *function, struct comm *c, int kind, const void *send, void *recv, uint64_t count,
                      int type, int op, uint32_t root) {
    int code = begin(function, c, type, root, count, send, recv);
    if (code) return code;
    int reduces = kind == ALL_REDUCE || kind == REDUCE_TO || kind == REDUCE_SCATTER;
    if (op < 0 || op >= AVG) /* HCCL has no average */
        code = comm_fail(c, CODE_ARGUMENT, "%s: %d is no reduction", function, op);
    else if (reduces && !reducible(number_of[type], op))
        code = comm_fail(c, CODE_USAGE, "%s: datatype %d cannot be reduced with op %d", function, type, op);
    if (!code) {
        struct collective x = {c, {kind, number_of[type], op, (int)root, count}, send, recv};
        code = run_collective(&x);
    }
    comm_leave(c);
    return code;
}

static const char *code_name(int code) {
    switch (code) {
    case 0: return "HCCL_SUCCESS";
    case CODE_ARGUMENT: return "HCCL_E_PARA";
    case 4: return "HCCL_E_INTERNAL";
    case CODE_USAGE: return "HCCL_E_NOT_SUPPORT";
    case CODE_SYSTEM: return "HCCL_E_SYSCALL";
    case CODE_TIMEOUT: return "HCCL_E_TIMEOUT";
    case CODE_ABORTED: return "HCCL_E_SUSPENDING";
    default: return "unknown error";
    }
}

EXPORT const char *HcclGetErrorString(int code) {
    static _Thread_local char text[TEXT_BYTES + 32];
    snprintf(text, sizeof text, "%s: %s", code_name(code), last_error);
    return text;
}

EXPORT int HcclGetRootInfo(root_info *info) {
    int code = called(__func__, NULL);
    if (code) return code;
    memset(info, 0, sizeof *info);
    make_name(info->bytes, sizeof info->bytes);
    info->bytes[ROOT_INFO_BYTES - 1] = 'z'; /* who carries fewer bytes is found out */
    return 0;
}

/* Waits for all ranks as long as the real one's variable says, in seconds. */
EXPORT int HcclCommInitRootInfo(uint32_t nranks, const root_info *info, uint32_t rank, struct comm **out) {
    int code = called(__func__, NULL);
    if (code) return code;
    if (info->bytes[ROOT_INFO_BYTES - 1] != 'z') return fail_here(CODE_ARGUMENT, "the root info was cut short");
    const char *seconds = getenv("HCCL_CONNECT_TIMEOUT");
    time_t until = time(NULL) + (seconds ? atoi(seconds) : 120);
    code = comm_attach(out, info->bytes, (int)nranks, (int)rank);
    while (!code && !comm_ready(*out)) {
        uint32_t seen = comm_changes(*out);
        code = comm_trouble(*out);
        if (!code && time(NULL) > until) code = fail_here(CODE_TIMEOUT, "not all ranks came");
        if (!code && !comm_ready(*out)) comm_pause(*out, seen);
    }
    if (code && *out) comm_retire(*out, ABORTED);
    return code;
}

/* Also ends what other threads wait for: HCCL has no abort of its own. */
EXPORT int HcclCommDestroy(struct comm *c) {
    int code = comm_enter(c);
    if (code) return code;
    code = called(__func__, c);
    if (!code) comm_retire(c, DESTROYED);
    comm_leave(c);
    return code;
}

EXPORT int HcclGetCommAsyncError(struct comm *c, int *code) {
    int failed = comm_enter(c);
    if (failed) return failed;
    failed = called(__func__, c);
    *code = atomic_load(&c->async_error);
    if (*code) fail_here(0, "rank %d: injected asynchronous error", c->rank);
    if (!*code) *code = comm_trouble(c);
    comm_leave(c);
    return failed;
}

static int ask(const char *function, struct comm *c, uint32_t *out, int rank) {
    int code = comm_enter(c);
    if (code) return code;
    code = called(function, c);
    *out = (uint32_t)(rank ? c->rank : c->nranks);
    comm_leave(c);
    return code;
}

EXPORT int HcclGetRankSize(struct comm *c, uint32_t *size) { return ask(__func__, c, size, 0); }
EXPORT int HcclGetRankId(struct comm *c, uint32_t *rank) { return ask(__func__, c, rank, 1); }

EXPORT int HcclAllReduce(void *send, void *recv, uint64_t count, int type, int op, struct comm *c, void *stream) {
    (void)stream;
    return collective(__func__, c, ALL_REDUCE, send, recv, count, type, op, 0);
}

EXPORT int HcclReduce(void *send, void *recv, uint64_t count, int type, int op, uint32_t root, struct comm *c,
                      void *stream) {
    (void)stream;
    return collective(__func__, c, REDUCE_TO, send, recv, count, type, op, root);
}

EXPORT int HcclAllGather(void *send, void *recv, uint64_t count, int type, struct comm *c, void *stream) {
    (void)stream;
    return collective(__func__, c, ALL_GATHER, send, recv, count, type, 0, 0);
}

EXPORT int HcclReduceScatter(void *send, void *recv, uint64_t count, int type, int op, struct comm *c, void *stream) {
    (void)stream;
    return collective(__func__, c, REDUCE_SCATTER, send, recv, count, type, op, 0);
}

EXPORT int HcclBroadcast(void *buffer, uint64_t count, int type, uint32_t root, struct comm *c, void *stream) {
    (void)stream;
    return collective(__func__, c, BROADCAST, buffer, buffer, count, type, 0, root);
}

EXPORT int HcclAlltoAll(const void *send, uint64_t send_count, int send_type, const void *recv, uint64_t recv_count,
                        int recv_type, struct comm *c, void *stream) {
    (void)stream;
    if (send_count != recv_count || send_type != recv_type) {
        int code = comm_enter(c);
        if (code) return code;
        code = comm_fail(c, CODE_ARGUMENT, "%s: sends %llu of datatype %d, receives %llu of datatype %d", __func__,
                         (unsigned long long)send_count, send_type, (unsigned long long)recv_count, recv_type);
        comm_leave(c);
        return code;
    }
    return collective(__func__, c, ALL_TO_ALL, send, (void *)(uintptr_t)recv, send_count, send_type, 0, 0);
}

static struct transfer transfer(struct comm *c, int sending, const void *base, uint64_t offset, uint64_t count, int type,
                                uint32_t peer, int kind) {
    size_t bytes = number_bytes[number_of[type]];
    struct transfer t = {c, sending, (int)peer, (char *)(uintptr_t)base + offset * bytes, count * bytes, 0,
                         {kind, type, count}, 0};
    return t;
}

EXPORT int HcclAlltoAllV(const void *send, const void *send_counts, const void *send_offsets, int send_type,
                         const void *recv, const void *recv_counts, const void *recv_offsets, int recv_type,
                         struct comm *c, void *stream) {
    (void)stream;
    int code = begin(__func__, c, send_type, 0, 0, NULL, NULL);
    if (code) return code;
    const uint64_t *out = send_counts, *out_at = send_offsets, *in = recv_counts, *in_at = recv_offsets;
    struct described what = {ALL_TO_ALL_V, number_of[send_type], 0, 0, 0};
    if (send_type != recv_type) code = comm_fail(c, CODE_ARGUMENT, "%s: two datatypes", __func__);
    if (!code && out[c->rank] != in[c->rank])
        code = comm_fail(c, CODE_ARGUMENT, "%s: sends itself %llu, receives %llu", __func__,
                         (unsigned long long)out[c->rank], (unsigned long long)in[c->rank]);
    if (!code) code = agree(c, &what);
    if (!code) {
        struct transfer all[2 * MAX_RANKS];
        size_t open = 0;
        for (int peer = 0; peer < c->nranks; peer++) {
            all[open++] = transfer(c, 1, send, out_at[peer], out[peer], send_type, peer, MESSAGE_ALL_TO_ALL_V);
            all[open++] = transfer(c, 0, recv, in_at[peer], in[peer], recv_type, peer, MESSAGE_ALL_TO_ALL_V);
        }
        code = run_transfers(all, open);
        /* A small message is sent before its receiver has looked: nobody leaves until all have. */
        if (!code) code = comm_meet(c);
    }
    comm_leave(c);
    return code;
}

static int point_to_point(const char *function, struct comm *c, int sending, void *buffer, uint64_t count, int type,
                          uint32_t peer) {
    int code = begin(function, c, type, peer, count, buffer, buffer);
    if (code) return code;
    if (peer == (uint32_t)c->rank) code = comm_fail(c, CODE_ARGUMENT, "%s: peer %u is this rank", function, peer);
    if (!code) {
        struct transfer t = transfer(c, sending, buffer, 0, count, type, peer, MESSAGE_POINT_TO_POINT);
        code = run_transfers(&t, 1);
    }
    comm_leave(c);
    return code;
}

EXPORT int HcclSend(void *buffer, uint64_t count, int type, uint32_t peer, struct comm *c, void *stream) {
    (void)stream;
    return point_to_point(__func__, c, 1, buffer, count, type, peer);
}

EXPORT int HcclRecv(void *buffer, uint64_t count, int type, uint32_t peer, struct comm *c, void *stream) {
    (void)stream;
    return point_to_point(__func__, c, 0, buffer, count, type, peer);
}

EXPORT int HcclBatchSendRecv(const batch_item *items, uint32_t count, struct comm *c, void *stream) {
    (void)stream;
    int code = begin(__func__, c, 0, 0, count, items, items);
    if (code) return code;
    struct transfer *all = calloc(count ? count : 1, sizeof *all);
    if (!all) abort();
    for (uint32_t i = 0; i < count && !code; i++) {
        const batch_item *item = &items[i];
        if (item->send_or_recv != 0 && item->send_or_recv != 1)
            code = comm_fail(c, CODE_ARGUMENT, "%s: item %u is neither send nor receive", __func__, i);
        else if (item->type < 0 || item->type >= DATATYPES)
            code = comm_fail(c, CODE_ARGUMENT, "%s: item %u: %d is no datatype", __func__, i, item->type);
        else if (item->remote >= (uint32_t)c->nranks || item->remote == (uint32_t)c->rank)
            code = comm_fail(c, CODE_ARGUMENT, "%s: item %u: %u is no other rank of %d", __func__, i, item->remote,
                             c->nranks);
        else if (item->count && !item->buffer)
            code = comm_fail(c, CODE_ARGUMENT, "%s: item %u: null buffer", __func__, i);
        else
            all[i] = transfer(c, item->send_or_recv == 0, item->buffer, 0, item->count, item->type, item->remote,
                              MESSAGE_POINT_TO_POINT);
    }
    if (!code) code = run_transfers(all, count);
    free(all);
    comm_leave(c);
    return code;
}
