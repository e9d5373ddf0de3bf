/* The collectives of shared memory, one call from Python: what `exchange.py` and `reductions.py` do, in the same words and
   the same order.

   `begin` and `reduce` start one and `advance` goes on with it. None of them sleeps: where a peer has not come in a while
   they return whom and which word this rank needs, Python waits there (watch.py: futex, deadlines, dead peers), and
   calls `advance` again. So C holds no policy, and a rank with this module and one without understand each other. */

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "mover.h"
#include "mover_exchange.h"
#include "mover_reduce.h"

static uint64_t all_others(const Mover *m) {
    uint64_t all = m->places == 64 ? ~(uint64_t)0 : ((uint64_t)1 << m->places) - 1;
    return all & ~((uint64_t)1 << m->me);
}

/* Between two looks: leaves the core to its other thread. */
static void relax(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static long answer(const Mover *m, int kind, int place) { return kind | (long)place << 8 | (long)m->round << 16; }

/* Serve every peer that is ready; what is wrong, if something is. */
static int serve_ready(Mover *m, int *place) {
    uint64_t later = m->pending >> m->me >> 1 << m->me << 1, sooner = m->pending & ~later; /* from the next place on */
    for (uint64_t half = later; later | sooner; half = later) {
        if (!half) later = sooner, sooner = 0, half = later;
        int peer = *place = __builtin_ctzll(half), wrong = 0;
        later &= later - 1;
        switch (m->phase) {
        case POSTED:
            if (!reached(m, peer, m->layout.step, *m->count.step)) continue;
            wrong = push_straight(m, peer);
            break;
        case FLAGS:
            if (!reached(m, m->me, flag(m, peer), m->count.seen[peer])) continue;
            break;
        case PUSHING:
            if (!slot_is_free(m, peer)) continue;
            push_piece(m, peer);
            break;
        case PULLING:
            if (!piece_is_there(m, peer)) continue;
            wrong = pull_piece(m, peer);
            break;
        case TERMS:
            if (piece_bytes(m, peer, m->round) <= 0) break;
            if (!slot_is_free(m, peer)) continue;
            push_term(m, peer);
            break;
        case PIECES:
            if (!piece_is_there(m, peer)) continue;
            wrong = check_term(m, peer);
            break;
        case ROOM:
            if (!reached(m, peer, m->layout.step, *m->count.step)) continue;
            wrong = find_room(m, peer);
            break;
        case OVER:
            break;
        }
        if (wrong) return wrong;
        m->pending &= ~((uint64_t)1 << peer);
    }
    return 0;
}

/* Serve the peers until none is pending: DONE; or until one has not come in a while: what is needed of which. A look that
   was worth it allows more of them, and looks in vain halve them. */
static long serve(Mover *m) {
    static const int needs[] = {
        [POSTED] = NEEDS_POST,   [FLAGS] = NEEDS_FLAG,  [PUSHING] = NEEDS_SLOT, [PULLING] = NEEDS_PIECE,
        [TERMS] = NEEDS_SLOT,    [PIECES] = NEEDS_PIECE, [ROOM] = NEEDS_POST,
    };
    int place;
    for (int64_t idle = 0; idle <= m->looks; idle++) {
        uint64_t before = m->pending;
        int wrong = serve_ready(m, &place);
        if (wrong) return answer(m, wrong, place);
        if (m->pending != before) {
            if (idle) m->looks = m->looks * 2 < m->most_looks ? m->looks * 2 : m->most_looks;
            idle = -1; /* 0 at the next look */
        }
        if (!m->pending) return DONE;
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

/* Now only the others' flags are missing; true where something has to go through the channels before. */
static int await_flags(Mover *m) {
    uint64_t any = 0;
    for (int place = 0; place < m->places; place++) {
        m->count.seen[place] += place != m->me;
        any |= m->homeless[place];
    }
    enter(m, FLAGS);
    return any != 0;
}

/* On to the next piece, or after the last one to the end; true as for `await_flags`. */
static int next_round(Mover *m) {
    m->round++;
    if (piece_bytes(m, m->me, m->round - 1) > 0 || more_terms(m)) {
        enter(m, TERMS);
    } else if (m->reduction->spread) {
        raise_flags(m);
        return await_flags(m);
    } else {
        m->phase = OVER, m->pending = 0;
    }
    return 0;
}

static long go_on(Mover *m) {
    for (;;) {
        long result = serve(m);
        if (result != DONE) return result;
        switch (m->phase) {
        case POSTED:
            if (await_flags(m)) return HOMELESS;
            break;
        case PUSHING:
            /* As in exchange.py: piece n+1 is pushed to all once piece n has come from all. */
            if (m->round == 0) copy_own(m);
            enter(m, PULLING);
            break;
        case PULLING:
            if (++m->round == m->plan->tensors) return DONE;
            enter(m, PUSHING);
            break;
        case FLAGS:
            return DONE;
        /* As in reductions.py: piece n+1 of the terms is pushed before piece n is reduced. */
        case TERMS:
            if (m->round > 0 && piece_bytes(m, m->me, m->round - 1) > 0) {
                enter(m, PIECES);
                break;
            }
            if (next_round(m)) return HOMELESS;
            break;
        case PIECES:
            reduce_piece(m);
            if (m->reduction->spread && m->round == 1) {
                enter(m, ROOM);
                break;
            }
            /* fall through */
        case ROOM:
            if (m->reduction->spread) spread_piece(m);
            if (next_round(m)) return HOMELESS;
            break;
        case OVER:
            return DONE;
        }
    }
}

static long start_exchange(Mover *m) {
    m->round = 0;
    memset(m->homeless, 0, sizeof m->homeless);
    if (m->plan->eager) {
        enter(m, PUSHING);
    } else {
        post(m);
        copy_own(m);
        enter(m, POSTED);
    }
    return go_on(m);
}

static long start_reduction(Mover *m) {
    m->round = 0;
    memset(m->homeless, 0, sizeof m->homeless);
    if (m->reduction->spread) post_shares(m);
    enter(m, TERMS);
    return go_on(m);
}

/* ---- Python ---- */

static const char NAME[] = "fvops.mover";

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
    PyObject *capsule = PyCapsule_New(m, NAME, destroy);
    if (capsule == NULL) PyMem_Free(m);
    return capsule;
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
    return run(m, start_exchange);
}

/* reduce(mover, reduction, op, input, output): as `begin`; the output has this rank's reduced term, at `offset[me]` with
   `spread`. */
static PyObject *reduce(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (count != 5) return PyErr_Format(PyExc_TypeError, "reduce takes 5 arguments, got %zd", count);
    Mover *m = mover_of(args[0]);
    if (m == NULL) return NULL;
    m->reduction = (const Reduction *)(intptr_t)number(args[1]);
    m->op = number(args[2]);
    m->input[0] = (char *)(intptr_t)number(args[3]), m->output[0] = (char *)(intptr_t)number(args[4]);
    if (PyErr_Occurred()) return NULL;
    return run(m, start_reduction);
}

/* advance(mover): go on with what `begin` or `reduce` began, once what it needed is there. */
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

/* abi(): changes whenever mover.py and this module could misunderstand each other. */
static PyObject *abi(PyObject *module, PyObject *nothing) {
    return PyLong_FromLong(INTERFACE << 20 | (long)(sizeof(Part) + sizeof(Reduction) + sizeof(Layout)));
}

static PyObject *streams(PyObject *module, PyObject *nothing) { return PyBool_FromLong(can_stream()); }

static PyMethodDef methods[] = {
    {"create", (PyCFunction)(void (*)(void))create, METH_FASTCALL, NULL},
    {"begin", (PyCFunction)(void (*)(void))begin, METH_FASTCALL, NULL},
    {"reduce", (PyCFunction)(void (*)(void))reduce, METH_FASTCALL, NULL},
    {"advance", advance, METH_O, NULL},
    {"homeless", homeless, METH_O, NULL},
    {"abi", abi, METH_NOARGS, NULL},
    {"streams", streams, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_mover", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__mover(void) { return PyModule_Create(&definition); }
