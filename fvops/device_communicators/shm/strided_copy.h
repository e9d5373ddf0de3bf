/* A strided copy between two places in memory, past the cache where that is asked for and the processor can.

   A store to memory that is not in cache reads it first; a streaming store does not, and leaves the cache to others. It
   is weakly ordered: `copy` ends with a fence, so that a word stored after it is seen after it. */

#ifndef FVOPS_STRIDED_COPY_H
#define FVOPS_STRIDED_COPY_H

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Rows of at least so many bytes may be streamed; of up to so many, the next one is fetched meanwhile. */
enum { MOST_AXES = 4, STREAMED_ROW = 256, FETCHED_ROW = 8192 };

/* A strided copy: `row` bytes that are contiguous on both sides, over axes, innermost first, unused ones of size 1. */
typedef struct {
    int64_t row, sizes[MOST_AXES], from[MOST_AXES], to[MOST_AXES];
} Geometry;

#if defined(__x86_64__)
/* A line at `from`, past the cache to the line `to`. Its halves are stored one after the other, and the compiler is kept
   from moving them: a line that is begun and left is written twice. */
__attribute__((target("avx2"))) static inline void stream_line(char *to, const char *from) {
    __m256i a = _mm256_loadu_si256((const __m256i *)from), b = _mm256_loadu_si256((const __m256i *)(from + 32));
    _mm256_stream_si256((__m256i *)to, a), _mm256_stream_si256((__m256i *)(to + 32), b);
    atomic_signal_fence(memory_order_seq_cst);
}

/* `next`: what is read after this row, NULL where the processor finds it itself. Rows with gaps between them leave each page
   soon, and what fetches ahead in hardware stops at a page's end. Fetching what is not mapped does nothing. */
__attribute__((target("avx2"))) static void stream_row(char *to, const char *from, int64_t bytes, const char *next) {
    int64_t head = -(intptr_t)to & 63;
    memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    if (next)
        for (; bytes >= 128; to += 128, from += 128, next += 128, bytes -= 128) {
            _mm_prefetch(next, _MM_HINT_T0), _mm_prefetch(next + 64, _MM_HINT_T0);
            stream_line(to, from), stream_line(to + 64, from + 64);
        }
    else
        for (; bytes >= 128; to += 128, from += 128, bytes -= 128) stream_line(to, from), stream_line(to + 64, from + 64);
    memcpy(to, from, bytes);
}

static int can_stream(void) { return __builtin_cpu_supports("avx2"); }
static void end_streams(void) { _mm_sfence(); }
#else
static void stream_row(char *to, const char *from, int64_t bytes, const char *next) { memcpy(to, from, bytes); }
static int can_stream(void) { return 0; }
static void end_streams(void) {}
#endif

static void copy_rows(char *to, const char *from, const Geometry *g, int streamed) {
    int fetched = g->row <= FETCHED_ROW;
    for (int64_t i = 0; i < g->sizes[0]; i++, to += g->to[0], from += g->from[0])
        streamed ? stream_row(to, from, g->row, fetched ? from + g->from[0] : NULL) : (void)memcpy(to, from, g->row);
}

static void copy(char *to, const char *from, const Geometry *g, int streamed) {
    streamed = streamed && g->row >= STREAMED_ROW;
    for (int64_t k = 0; k < g->sizes[3]; k++)
        for (int64_t j = 0; j < g->sizes[2]; j++)
            for (int64_t i = 0; i < g->sizes[1]; i++)
                copy_rows(to + i * g->to[1] + j * g->to[2] + k * g->to[3],
                          from + i * g->from[1] + j * g->from[2] + k * g->from[3], g, streamed);
    if (streamed) end_streams();
}

#endif
