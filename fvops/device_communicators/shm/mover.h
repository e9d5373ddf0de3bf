/* What a rank knows of its group in C, and the words through which ranks tell each other what is there.

   Segments are laid out by segment_layout.py, whose numbers come in at `create`. docs/one-sided.md has the protocol. */

#ifndef FVOPS_MOVER_H
#define FVOPS_MOVER_H

#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "strided_copy.h"

/* Raise it with every change of what mover.py hands over or is told; it is the number there. */
enum { INTERFACE = 1 };
enum { MOST_PLACES = 64, MOST_TENSORS = 64 };
/* What `begin` and `advance` return in the lowest 8 bits; above are 8 of the place, and the tensor. As in mover.py. */
enum { DONE = 0, NEEDS_POST = 1, NEEDS_FLAG = 2, NEEDS_SLOT = 3, NEEDS_PIECE = 4, WRONG_POST = 5, WRONG_PIECE = 6, HOMELESS = 7 };

/* One tensor of an exchange: the bytes of a part, from part to part on either side, and how a part is copied straight,
   into a slot and out of one. mover.py packs it. */
typedef struct {
    int64_t bytes, input_step, output_step;
    Geometry straight, into, out_of;
} Part;

typedef struct {
    int64_t tensors, eager, streamed;
    Part parts[];
} Plan;

/* A reduction: each place's term, `bytes[j]` at `offset[j]` of the input, goes there in pieces of `chunk` bytes. `spread`:
   the reduced pieces go on into the others' results (all_reduce), at `offset[me]` of these. mover.py packs it. */
typedef struct {
    int64_t arithmetic, average, spread, chunk, offset[MOST_PLACES], bytes[MOST_PLACES];
} Reduction;

/* Word indices and byte offsets in a segment; those of a channel count from its source's flag. */
typedef struct {
    int64_t first_flag, flag_step, pushed, drained, headers, slots, slot_bytes, slot_count, table, step, op, segment_bytes;
} Layout;

/* Counts that Python shares: the step, then one for each place. */
typedef struct {
    uint32_t *step, *raised, *seen, *sent, *taken;
} Counts;

typedef struct {
    int me, places;
    char *segment[MOST_PLACES];
    Layout layout;
    Counts count;
    /* How often `serve` looks again before Python sleeps: learnt, as in watch.py. */
    int64_t looks, fewest_looks, most_looks;
    /* what is under way: of `phase`, at tensor or piece `round`, with the peers that are still to be served */
    const Plan *plan;
    const Reduction *reduction;
    uint32_t op;
    enum { POSTED, FLAGS, PUSHING, PULLING, TERMS, PIECES, ROOM, OVER } phase;
    int64_t round;
    uint64_t pending;
    char *input[MOST_TENSORS], *output[MOST_TENSORS];
    /* by place: which tensors it has no room for, as bits; where in its segment it wants this rank's share */
    uint64_t homeless[MOST_PLACES];
    uint64_t room[MOST_PLACES];
} Mover;

static _Atomic uint32_t *word(const Mover *m, int place, int64_t index) {
    return (_Atomic uint32_t *)(m->segment[place] + 4 * index);
}

static uint64_t *quad(const Mover *m, int place, int64_t index) { return (uint64_t *)(m->segment[place] + 8 * index); }

static int reached(const Mover *m, int place, int64_t index, uint32_t target) {
    return (int32_t)(atomic_load_explicit(word(m, place, index), memory_order_acquire) - target) >= 0;
}

/* Everything that was written before is seen by who sees the word; whoever sleeps on it wakes. */
static void publish(const Mover *m, int place, int64_t index, uint32_t value) {
    atomic_store_explicit(word(m, place, index), value, memory_order_release);
    syscall(SYS_futex, word(m, place, index), FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

static int64_t flag(const Mover *m, int source) { return m->layout.first_flag + source * m->layout.flag_step; }

static char *slot(const Mover *m, int place, int source, uint32_t count) {
    const Layout *l = &m->layout;
    return m->segment[place] + l->slots + (source * l->slot_count + count % l->slot_count) * l->slot_bytes;
}

static int64_t header(const Mover *m, int source, uint32_t count) {
    return flag(m, source) + m->layout.headers + count % m->layout.slot_count * 4;
}

/* The post: what the table says is to be read, as step `count.step`. */
static void publish_post(Mover *m) {
    atomic_store_explicit(word(m, m->me, m->layout.op), m->op, memory_order_relaxed);
    publish(m, m->me, m->layout.step, ++*m->count.step);
}

/* Channels: the next slot at `place`, and the next piece from there. */

static int slot_is_free(const Mover *m, int place) {
    uint32_t needed = m->count.sent[place] + 1 - (uint32_t)m->layout.slot_count;
    return reached(m, place, flag(m, m->me) + m->layout.drained, needed);
}

/* The slot is filled. */
static void announce(Mover *m, int place, int64_t bytes) {
    int64_t head = header(m, m->me, m->count.sent[place]);
    atomic_store_explicit(word(m, place, head), m->op, memory_order_relaxed);
    *quad(m, place, head / 2 + 1) = bytes;
    publish(m, place, flag(m, m->me) + m->layout.pushed, ++m->count.sent[place]);
}

static int piece_is_there(const Mover *m, int place) {
    return reached(m, m->me, flag(m, place) + m->layout.pushed, m->count.taken[place] + 1);
}

static int is_announced(const Mover *m, int place, int64_t bytes) {
    int64_t head = header(m, place, m->count.taken[place]);
    uint32_t op = atomic_load_explicit(word(m, m->me, head), memory_order_relaxed);
    return op == m->op && *quad(m, m->me, head / 2 + 1) == (uint64_t)bytes;
}

static void release(Mover *m, int place) {
    publish(m, m->me, flag(m, place) + m->layout.drained, ++m->count.taken[place]);
}

#endif
