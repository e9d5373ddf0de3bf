/* The steps of a reduction: terms through the channels to who reduces, in the order of places; and, for all_reduce, each
   reduced piece on into the others' results while it is in cache. */

#ifndef FVOPS_MOVER_REDUCE_H
#define FVOPS_MOVER_REDUCE_H

#include "arithmetic.h"
#include "mover.h"
#include "mover_exchange.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Bytes of piece `round` of the term for `place`; not above 0 when it has no such piece. */
static int64_t piece_bytes(const Mover *m, int place, int64_t round) {
    const Reduction *r = m->reduction;
    return smaller(r->chunk, r->bytes[place] - round * r->chunk);
}

/* Has some other place's term a piece `round`? */
static int more_terms(const Mover *m) {
    for (int place = 0; place < m->places; place++)
        if (place != m->me && piece_bytes(m, place, m->round) > 0) return 1;
    return 0;
}

static void push_term(Mover *m, int place) {
    const Reduction *r = m->reduction;
    int64_t bytes = piece_bytes(m, place, m->round);
    memcpy(slot(m, place, m->me, m->count.sent[place]), m->input[0] + r->offset[place] + m->round * r->chunk, bytes);
    announce(m, place, bytes);
}

/* Is the piece from `place`, which is there, what this rank reduces next? 0, or WRONG_PIECE. */
static int check_term(const Mover *m, int place) {
    return is_announced(m, place, piece_bytes(m, m->me, m->round - 1)) ? 0 : WRONG_PIECE;
}

static void reduce_piece(Mover *m) {
    const Reduction *r = m->reduction;
    int64_t at = (m->round - 1) * r->chunk, bytes = piece_bytes(m, m->me, m->round - 1);
    const char *terms[MOST_PLACES];
    for (int place = 0; place < m->places; place++)
        terms[place] = place == m->me ? m->input[0] + r->offset[place] + at : slot(m, m->me, place, m->count.taken[place]);
    char *result = m->output[0] + (r->spread ? r->offset[m->me] : 0) + at;
    combine(result, terms, m->places, bytes, r->arithmetic, r->average);
    for (int place = 0; place < m->places; place++)
        if (place != m->me) release(m, place);
}

/* Say where each place's share shall go: all of the result is the others' to write, but for this rank's own share. */
static void post_shares(Mover *m) {
    const Reduction *r = m->reduction;
    for (int source = 0; source < m->places; source++) {
        if (source == m->me) continue;
        uint64_t *entry = quad(m, m->me, m->layout.table + 2 * source);
        entry[0] = m->output[0] + r->offset[source] - m->segment[m->me];
        entry[1] = r->bytes[source];
    }
    publish_post(m);
}

/* Where `place`, which has posted, wants this rank's share; 0, or WRONG_POST. */
static int find_room(Mover *m, int place) {
    const uint64_t *entry = quad(m, place, m->layout.table + 2 * m->me);
    if (atomic_load_explicit(word(m, place, m->layout.op), memory_order_relaxed) != m->op) return WRONG_POST;
    if (entry[1] != (uint64_t)m->reduction->bytes[m->me] || entry[0] >= (uint64_t)m->layout.segment_bytes) return WRONG_POST;
    m->room[place] = entry[0];
    m->homeless[place] = entry[0] == 0;
    return 0;
}

static void spread_piece(Mover *m) {
    const Reduction *r = m->reduction;
    int64_t at = (m->round - 1) * r->chunk, bytes = piece_bytes(m, m->me, m->round - 1);
    const char *piece = m->output[0] + r->offset[m->me] + at;
    Geometry whole = {.row = bytes, .sizes = {1, 1, 1, 1}};
    for (int place = 0; place < m->places; place++)
        if (place != m->me && m->room[place]) copy(m->segment[place] + m->room[place] + at, piece, &whole, can_stream());
}

static void raise_flags(Mover *m) {
    for (int place = 0; place < m->places; place++)
        if (place != m->me) publish(m, place, flag(m, m->me), ++m->count.raised[place]);
}

#endif
