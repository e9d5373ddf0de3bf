/* The exchange of shared memory, one call from Python: what `exchange.py` does, in the same words and the same order.

   `begin` starts an exchange and `advance` goes on with it. Neither ever waits: where a peer has not come yet they
   return whom and which word this rank needs, Python waits there (watch.py: spin, futex, deadlines, dead peers), and
   calls `advance` again. So C holds no policy, and a rank with this module and one without understand each other.

   Segments are laid out by segment_layout.py, whose numbers come in at `create`. docs/one-sided.md has the protocol. */

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "strided_copy.h"

enum { MOST_PLACES = 64, MOST_TENSORS = 64 };
/* What `begin` and `advance` return in the lowest 8 bits; above are 8 of the place, and the tensor. As in mover.py. */
enum { DONE = 0, NEEDS_POST = 1, NEEDS_FLAG = 2, NEEDS_SLOT = 3, NEEDS_PIECE = 4, MISMATCH = 5, HOMELESS = 6 };
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

/* Word indices; `channel` is added to a source's first word. */
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
    /* the exchange under way */
    const Plan *plan;
    uint32_t op;
    enum { IDLE, POSTED, FLAGS, PUSHING, PULLING } phase;
    int64_t round;
    uint64_t pending;
    char *input[MOST_TENSORS], *output[MOST_TENSORS];
    uint64_t homeless[MOST_PLACES];
} Mover;

static const char NAME[] = "fvops.mover";

/* ---- words ---- */

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

/* ---- one exchange ---- */

static void copy_own(Mover *m) {
    for (int64_t t = 0; t < m->plan->tensors; t++) {
        const Part *part = &m->plan->parts[t];
        copy(m->output[t] + m->me * part->output_step, m->input[t] + m->me * part->input_step, &part->straight,
             m->plan->streamed);
    }
}

static uint64_t all_others(const Mover *m) {
    uint64_t all = m->places == 64 ? ~(uint64_t)0 : ((uint64_t)1 << m->places) - 1;
    return all & ~((uint64_t)1 << m->me);
}

/* Between two looks: leaves the core to its other thread. */
static void relax(void) {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

static long answer(const Mover *m, int kind, int place) { return kind | (long)place << 8 | (long)m->round << 16; }

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
    atomic_store_explicit(word(m, m->me, m->layout.op), m->op, memory_order_relaxed);
    publish(m, m->me, m->layout.step, ++*m->count.step);
}

/* Push to `place`, which has posted; 0, or MISMATCH when it posted something else. */
static int push_straight(Mover *m, int place) {
    const Plan *plan = m->plan;
    const uint64_t *entry = quad(m, place, m->layout.table + 2 * m->me * plan->tensors);
    if (atomic_load_explicit(word(m, place, m->layout.op), memory_order_relaxed) != m->op) return MISMATCH;
    for (int64_t t = 0; t < plan->tensors; t++)
        if (entry[2 * t + 1] != (uint64_t)plan->parts[t].bytes || entry[2 * t] >= (uint64_t)m->layout.segment_bytes)
            return MISMATCH;
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
    uint32_t count = m->count.sent[place];
    int64_t head = header(m, m->me, count);
    copy(slot(m, place, m->me, count), m->input[m->round] + place * part->input_step, &part->into, 0);
    atomic_store_explicit(word(m, place, head), m->op, memory_order_relaxed);
    *quad(m, place, head / 2 + 1) = part->bytes;
    m->count.sent[place] = ++count;
    publish(m, place, flag(m, m->me) + m->layout.pushed, count);
}

/* Take the next piece from `place`, which is there; 0, or MISMATCH. */
static int pull_piece(Mover *m, int place) {
    const Part *part = &m->plan->parts[m->round];
    uint32_t count = m->count.taken[place];
    int64_t head = header(m, place, count);
    uint32_t op = atomic_load_explicit(word(m, m->me, head), memory_order_relaxed);
    if (op != m->op || *quad(m, m->me, head / 2 + 1) != (uint64_t)part->bytes) return MISMATCH;
    copy(m->output[m->round] + place * part->output_step, slot(m, m->me, place, count), &part->out_of, 0);
    m->count.taken[place] = ++count;
    publish(m, m->me, flag(m, place) + m->layout.drained, count);
    return 0;
}

/* Serve every peer that is ready; what is wrong, if something is. */
static int serve_ready(Mover *m, int *place) {
    for (int distance = 1; distance < m->places; distance++) {
        int peer = *place = (m->me + distance) % m->places, wrong = 0;
        if (!(m->pending >> peer & 1)) continue;
        switch (m->phase) {
        case POSTED:
            if (!reached(m, peer, m->layout.step, *m->count.step)) continue;
            wrong = push_straight(m, peer);
            break;
        case FLAGS:
            if (!reached(m, m->me, flag(m, peer), m->count.seen[peer])) continue;
            break;
        case PUSHING:
            if (!reached(m, peer, flag(m, m->me) + m->layout.drained,
                         m->count.sent[peer] + 1 - (uint32_t)m->layout.slot_count))
                continue;
            push_piece(m, peer);
            break;
        default:
            if (!reached(m, m->me, flag(m, peer) + m->layout.pushed, m->count.taken[peer] + 1)) continue;
            wrong = pull_piece(m, peer);
        }
        if (wrong) return wrong;
        m->pending &= ~((uint64_t)1 << peer);
    }
    return 0;
}

/* Serve the peers until none is pending: DONE; or until one has not come in a while: what is needed of which. A look that
   was worth it allows more of them, and looks in vain halve them. */
static long serve(Mover *m) {
    static const int needs[] = {[POSTED] = NEEDS_POST, [FLAGS] = NEEDS_FLAG, [PUSHING] = NEEDS_SLOT, [PULLING] = NEEDS_PIECE};
    int place;
    for (int64_t looks = 0; ; looks++) {
        uint64_t before = m->pending;
        int wrong = serve_ready(m, &place);
        if (wrong) return answer(m, wrong, place);
        if (m->pending != before) {
            if (looks) m->looks = m->looks * 2 < m->most_looks ? m->looks * 2 : m->most_looks;
            looks = 0;
        }
        if (!m->pending) return DONE;
        if (looks >= m->looks) break;
        relax();
    }
    m->looks = m->looks / 2 > m->fewest_looks ? m->looks / 2 : m->fewest_looks;
    for (place = (m->me + 1) % m->places; !(m->pending >> place & 1);) place = (place + 1) % m->places;
    return answer(m, needs[m->phase], place);
}

static void enter(Mover *m, int phase) {
    m->phase = phase;
    m->pending = all_others(m);
}

static long go_on(Mover *m) {
    for (;;) {
        long result = serve(m);
        if (result != DONE) return result;
        switch (m->phase) {
        case POSTED: {
            uint64_t any = 0;
            for (int place = 0; place < m->places; place++) {
                m->count.seen[place] += place != m->me;
                any |= m->homeless[place];
            }
            enter(m, FLAGS);
            if (any) return HOMELESS;
            break;
        }
        case PUSHING:
            /* As in exchange.py: piece n+1 is pushed to all once piece n has come from all. */
            if (m->round == 0) copy_own(m);
            enter(m, PULLING);
            break;
        case PULLING:
            if (++m->round == m->plan->tensors) return DONE;
            enter(m, PUSHING);
            break;
        default:
            return DONE;
        }
    }
}

static long start(Mover *m) {
    memset(m->homeless, 0, sizeof m->homeless);
    m->round = 0;
    if (m->plan->eager) {
        enter(m, PUSHING);
    } else {
        post(m);
        copy_own(m);
        enter(m, POSTED);
    }
    return go_on(m);
}

/* ---- Python ---- */

static long long number(PyObject *object) { return PyLong_AsLongLong(object); }

static Mover *mover_of(PyObject *capsule) { return PyCapsule_GetPointer(capsule, NAME); }

static void destroy(PyObject *capsule) { PyMem_Free(PyCapsule_GetPointer(capsule, NAME)); }

/* create(me, counts, layout, segments, fewest looks, most looks): `counts` the address of 1 + 4 * places 32-bit counts,
   `layout` the numbers of `Layout` in order, `segments` the addresses of all places' segments. */
static PyObject *create(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (count != 6) return PyErr_Format(PyExc_TypeError, "create takes 6 arguments, got %zd", count);
    Py_ssize_t places = PyTuple_Size(args[3]), numbers = PyTuple_Size(args[2]);
    if (places < 2 || places > MOST_PLACES || numbers != sizeof(Layout) / sizeof(int64_t))
        return PyErr_Format(PyExc_ValueError, "create: %zd places (2 to %d), %zd layout numbers", places, MOST_PLACES, numbers);
    Mover *m = PyMem_Calloc(1, sizeof *m);
    if (m == NULL) return PyErr_NoMemory();
    m->me = number(args[0]), m->places = places;
    uint32_t *counts = (uint32_t *)(intptr_t)number(args[1]);
    m->count = (Counts){counts, counts + 1, counts + 1 + places, counts + 1 + 2 * places, counts + 1 + 3 * places};
    for (Py_ssize_t i = 0; i < numbers; i++) ((int64_t *)&m->layout)[i] = number(PyTuple_GetItem(args[2], i));
    for (Py_ssize_t i = 0; i < places; i++) m->segment[i] = (char *)(intptr_t)number(PyTuple_GetItem(args[3], i));
    m->fewest_looks = number(args[4]), m->most_looks = m->looks = number(args[5]);
    if (PyErr_Occurred()) {
        PyMem_Free(m);
        return NULL;
    }
    return PyCapsule_New(m, NAME, destroy);
}

static PyObject *run(Mover *m, long (*function)(Mover *)) {
    long result;
    Py_BEGIN_ALLOW_THREADS
    result = function(m);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(result);
}

/* begin(mover, plan, op, input, output, input, output, ...): the plan's address, the call's number, and for each tensor
   the addresses of part 0 on either side. The plan has to stay until the exchange is over. */
static PyObject *begin(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (count < 5) return PyErr_Format(PyExc_TypeError, "begin takes at least 5 arguments, got %zd", count);
    Mover *m = mover_of(args[0]);
    if (m == NULL) return NULL;
    const Plan *plan = (const Plan *)(intptr_t)number(args[1]);
    if (PyErr_Occurred()) return NULL;
    if (plan->tensors > MOST_TENSORS || count != 3 + 2 * plan->tensors)
        return PyErr_Format(PyExc_ValueError, "begin: %zd arguments for %lld tensors", count, (long long)plan->tensors);
    m->plan = plan, m->op = number(args[2]);
    for (int64_t t = 0; t < plan->tensors; t++) {
        m->input[t] = (char *)(intptr_t)number(args[3 + 2 * t]);
        m->output[t] = (char *)(intptr_t)number(args[4 + 2 * t]);
    }
    if (PyErr_Occurred()) return NULL;
    return run(m, start);
}

/* advance(mover): go on with what `begin` began, once what it needed is there. */
static PyObject *advance(PyObject *module, PyObject *capsule) {
    Mover *m = mover_of(capsule);
    return m == NULL ? NULL : run(m, go_on);
}

/* homeless(mover): for each place, as bits, which tensors it has no room for in its pool. */
static PyObject *homeless(PyObject *module, PyObject *capsule) {
    Mover *m = mover_of(capsule);
    if (m == NULL) return NULL;
    PyObject *all = PyTuple_New(m->places);
    for (int place = 0; all != NULL && place < m->places; place++) {
        PyObject *bits = PyLong_FromUnsignedLongLong(m->homeless[place]);
        if (bits == NULL || PyTuple_SetItem(all, place, bits) < 0) {
            Py_DECREF(all);
            return NULL;
        }
    }
    return all;
}

static PyObject *streams(PyObject *module, PyObject *nothing) { return PyBool_FromLong(can_stream()); }

static PyMethodDef methods[] = {
    {"create", (PyCFunction)(void (*)(void))create, METH_FASTCALL, NULL},
    {"begin", (PyCFunction)(void (*)(void))begin, METH_FASTCALL, NULL},
    {"advance", advance, METH_O, NULL},
    {"homeless", homeless, METH_O, NULL},
    {"streams", streams, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_mover", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__mover(void) { return PyModule_Create(&definition); }
