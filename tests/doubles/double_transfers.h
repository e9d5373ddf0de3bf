/* Point-to-point messages through the rings, any number of them in progress together.
 *
 * A message is a header and its bytes. Messages of one pair and direction are first in, first out; a receiver compares
 * the header with what it expects, and a difference fails the communicator on all ranks. A sender is done when all its
 * bytes are in the ring: at once for a small message, and for a larger one only while it is being received.
 */
#ifndef DOUBLE_TRANSFERS_H
#define DOUBLE_TRANSFERS_H

#include "double_common.h"

enum { MESSAGE_POINT_TO_POINT = 1, MESSAGE_ALL_TO_ALL_V = 2 };

struct header {
    int32_t kind, dtype;
    uint64_t count;
};

struct transfer {
    struct comm *comm;
    int sending, peer;
    char *at;
    uint64_t bytes, done;
    struct header header;
    int begun;
};

static void ring_copy(struct ring *ring, uint64_t position, char *bytes, uint64_t count, int into) {
    uint64_t offset = position % RING_BYTES, first = count < RING_BYTES - offset ? count : RING_BYTES - offset;
    if (into) {
        memcpy(ring->bytes + offset, bytes, first);
        memcpy(ring->bytes, bytes + first, count - first);
    } else {
        memcpy(bytes, ring->bytes + offset, first);
        memcpy(bytes + first, ring->bytes, count - first);
    }
}

/* Move what can be moved now: 1 when anything was, 0 when nothing, below 0 on a failed check. */
static int transfer_progress(struct transfer *t) {
    struct comm *c = t->comm;
    struct ring *ring = t->sending ? &c->shared->rings[c->rank][t->peer] : &c->shared->rings[t->peer][c->rank];
    uint64_t written = atomic_load(&ring->written), read = atomic_load(&ring->read);
    uint64_t room = t->sending ? RING_BYTES - (written - read) : written - read;
    _Atomic uint64_t *position = t->sending ? &ring->written : &ring->read;
    int moved = 0;
    if (!t->begun) {
        struct header header = t->header;
        if (room < sizeof header) return 0;
        ring_copy(ring, atomic_load(position), (char *)&header, sizeof header, t->sending);
        if (memcmp(&header, &t->header, sizeof header) != 0) {
            comm_fail(c, CODE_ARGUMENT,
                      "receives %llu of datatype %d (kind %d), but rank %d sends %llu of datatype %d (kind %d)",
                      (unsigned long long)t->header.count, t->header.dtype, t->header.kind, t->peer,
                      (unsigned long long)header.count, header.dtype, header.kind);
            return -1;
        }
        atomic_fetch_add(position, sizeof header);
        room -= sizeof header;
        t->begun = moved = 1;
    }
    uint64_t count = t->bytes - t->done < room ? t->bytes - t->done : room;
    if (count) {
        ring_copy(ring, atomic_load(position), t->at + t->done, count, t->sending);
        atomic_fetch_add(position, count);
        t->done += count;
        moved = 1;
    }
    if (moved) comm_signal(c);
    return moved;
}

static int transfer_done(const struct transfer *t) { return t->begun && t->done == t->bytes; }

/* Is an earlier message of the same pair and direction still under way? */
static int transfer_queued(const struct transfer *all, size_t at) {
    for (size_t i = 0; i < at; i++)
        if (!transfer_done(&all[i]) && all[i].comm == all[at].comm && all[i].sending == all[at].sending &&
            all[i].peer == all[at].peer)
            return 1;
    return 0;
}

static int run_transfers(struct transfer *all, size_t count) {
    for (;;) {
        int moved = 0;
        struct transfer *open = NULL;
        uint32_t seen = 0;
        for (size_t i = 0; i < count; i++) {
            if (transfer_done(&all[i])) continue;
            uint32_t before = comm_changes(all[i].comm);
            int step = transfer_queued(all, i) ? 0 : transfer_progress(&all[i]);
            int code = comm_trouble(all[i].comm);
            if (code) return code;
            moved |= step;
            if (!open && !transfer_done(&all[i])) open = &all[i], seen = before;
        }
        if (!open) return 0;
        if (!moved) comm_pause(open->comm, seen);
    }
}

#endif
