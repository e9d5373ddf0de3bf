/* The steps of an exchange: post where results go, push straight into the peers' results, or go through the channels. */

#ifndef FVOPS_MOVER_EXCHANGE_H
#define FVOPS_MOVER_EXCHANGE_H

#include "mover.h"

static void copy_own(Mover *m) {
    for (int64_t t = 0; t < m->plan->tensors; t++) {
        const Part *part = &m->plan->parts[t];
        copy(m->output[t] + m->me * part->output_step, m->input[t] + m->me * part->input_step, &part->straight,
             m->plan->streamed);
    }
}

static void post(Mover *m) {
    const Plan *plan = m->plan;
    for (int source = 0; source < m->places; source++) {
        if (source == m->me) continue;
        uint64_t *entry = quad(m, m->me, m->layout.table + 2 * source * plan->tensors);
        for (int64_t t = 0; t < plan->tensors; t++, entry += 2) {
            entry[0] = m->output[t] + source * plan->parts[t].output_step - m->segment[m->me];
            entry[1] = plan->parts[t].bytes;
        }
    }
    publish_post(m);
}

/* Push to `place`, which has posted; 0, or WRONG_POST when it posted something else. */
static int push_straight(Mover *m, int place) {
    const Plan *plan = m->plan;
    const uint64_t *entry = quad(m, place, m->layout.table + 2 * m->me * plan->tensors);
    if (atomic_load_explicit(word(m, place, m->layout.op), memory_order_relaxed) != m->op) return WRONG_POST;
    for (int64_t t = 0; t < plan->tensors; t++)
        if (entry[2 * t + 1] != (uint64_t)plan->parts[t].bytes || entry[2 * t] >= (uint64_t)m->layout.segment_bytes)
            return WRONG_POST;
    for (int64_t t = 0; t < plan->tensors; t++) {
        const Part *part = &plan->parts[t];
        if (entry[2 * t])
            copy(m->segment[place] + entry[2 * t], m->input[t] + place * part->input_step, &part->straight, plan->streamed);
        else
            m->homeless[place] |= (uint64_t)1 << t;
    }
    publish(m, place, flag(m, m->me), ++m->count.raised[place]);
    return 0;
}

static void push_piece(Mover *m, int place) {
    const Part *part = &m->plan->parts[m->round];
    copy(slot(m, place, m->me, m->count.sent[place]), m->input[m->round] + place * part->input_step, &part->into, 0);
    announce(m, place, part->bytes);
}

/* Take the next piece from `place`, which is there; 0, or WRONG_PIECE. */
static int pull_piece(Mover *m, int place) {
    const Part *part = &m->plan->parts[m->round];
    if (!is_announced(m, place, part->bytes)) return WRONG_PIECE;
    copy(m->output[m->round] + place * part->output_step, slot(m, m->me, place, m->count.taken[place]), &part->out_of, 0);
    release(m, place);
    return 0;
}

#endif
