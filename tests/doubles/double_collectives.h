/* Collectives through the ranks' stages, a chunk at a time: write own stage, meet, read the others', meet.
 *
 * Before anything moves, all ranks compare what they were called with.
 */
#ifndef DOUBLE_COLLECTIVES_H
#define DOUBLE_COLLECTIVES_H

#include "double_common.h"
#include "double_numbers.h"

enum kind { ALL_REDUCE = 1, REDUCE_TO, ALL_GATHER, REDUCE_SCATTER, BROADCAST, ALL_TO_ALL, ALL_TO_ALL_V };
static const char *const kind_names[] = {
    "", "AllReduce", "Reduce", "AllGather", "ReduceScatter", "Broadcast", "AlltoAll", "AlltoAllV"};

struct collective {
    struct comm *comm;
    struct described what; /* count: elements of AllReduce, Reduce and Broadcast, of one rank's part in the others */
    const char *send;
    char *recv;
};

static int agree(struct comm *c, const struct described *mine) {
    int slot = c->sequence++ % 2, code; /* two: a rank may be one collective ahead, never two */
    c->shared->described[c->rank][slot] = *mine;
    if ((code = comm_meet(c))) return code;
    for (int rank = 0; rank < c->nranks; rank++) {
        const struct described *theirs = &c->shared->described[rank][slot];
        if (memcmp(theirs, mine, sizeof *mine) != 0)
            return comm_fail(c, CODE_ARGUMENT,
                             "%s(count %llu, type %d, op %d, root %d), but rank %d: %s(count %llu, type %d, op %d, root %d)",
                             kind_names[mine->kind], (unsigned long long)mine->count, mine->number, mine->op, mine->root,
                             rank, kind_names[theirs->kind], (unsigned long long)theirs->count, theirs->number,
                             theirs->op, theirs->root);
    }
    return 0;
}

/* Elements [from, from + count) of every part into this rank's stage; parts lie `width` bytes apart in both. */
static void stage_in(const struct collective *x, size_t from, size_t count, int parts) {
    size_t bytes = number_bytes[x->what.number];
    char *stage = x->comm->shared->stage[x->comm->rank];
    for (int part = 0; part < parts; part++)
        memcpy(stage + part * count * bytes, x->send + (part * x->what.count + from) * bytes, count * bytes);
}

static void stage_out(const struct collective *x, size_t from, size_t count) {
    struct comm *c = x->comm;
    size_t bytes = number_bytes[x->what.number], part = x->what.count;
    char *in[MAX_RANKS];
    for (int rank = 0; rank < c->nranks; rank++) in[rank] = c->shared->stage[rank];
    switch (x->what.kind) {
    case REDUCE_SCATTER:
        for (int rank = 0; rank < c->nranks; rank++) in[rank] += c->rank * count * bytes;
        /* fall through */
    case ALL_REDUCE:
        reduce_numbers(x->recv + from * bytes, in, c->nranks, count, x->what.number, x->what.op);
        break;
    case REDUCE_TO:
        if (c->rank == x->what.root)
            reduce_numbers(x->recv + from * bytes, in, c->nranks, count, x->what.number, x->what.op);
        break;
    case BROADCAST:
        memcpy(x->recv + from * bytes, in[x->what.root], count * bytes);
        break;
    case ALL_GATHER:
        for (int rank = 0; rank < c->nranks; rank++)
            memcpy(x->recv + (rank * part + from) * bytes, in[rank], count * bytes);
        break;
    case ALL_TO_ALL:
        for (int rank = 0; rank < c->nranks; rank++)
            memcpy(x->recv + (rank * part + from) * bytes, in[rank] + c->rank * count * bytes, count * bytes);
    }
}

static int run_collective(const struct collective *x) {
    struct comm *c = x->comm;
    int code = agree(c, &x->what);
    if (code) return code;
    int parts = x->what.kind == REDUCE_SCATTER || x->what.kind == ALL_TO_ALL ? c->nranks : 1;
    size_t chunk = STAGE_BYTES / number_bytes[x->what.number] / parts;
    for (size_t from = 0; from < x->what.count; from += chunk) {
        size_t count = x->what.count - from < chunk ? x->what.count - from : chunk;
        if (x->what.kind != BROADCAST || c->rank == x->what.root) stage_in(x, from, count, parts);
        if ((code = comm_meet(c))) return code;
        stage_out(x, from, count);
        if ((code = comm_meet(c))) return code;
    }
    return 0;
}

#endif
