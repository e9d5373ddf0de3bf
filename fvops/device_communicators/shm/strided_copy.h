/* A strided copy between two places in memory, past the cache where that is asked for and the processor can.

   A store to memory that is not in cache reads it first; a streaming store does not, and leaves the cache to others. It
   is weakly ordered: `copy` ends with a fence, so that a word stored after it is seen after it. */

#ifndef FVOPS_STRIDED_COPY_H
#define FVOPS_STRIDED_COPY_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Rows of at least so many bytes may be streamed. */
enum { MOST_AXES = 4, STREAMED_ROW = 256 };

/* A strided copy: `row` bytes that are contiguous on both sides, over axes, innermost first, unused ones of size 1. */
typedef struct {
    int64_t row, sizes[MOST_AXES], from[MOST_AXES], to[MOST_AXES];
} Geometry;

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void stream_row(char *to, const char *from, int64_t bytes) {
    int64_t head = -(intptr_t)to & 31;
    memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    for (; bytes >= 128; to += 128, from += 128, bytes -= 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)from), b = _mm256_loadu_si256((const __m256i *)(from + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(from + 64)), d = _mm256_loadu_si256((const __m256i *)(from + 96));
        _mm256_stream_si256((__m256i *)to, a), _mm256_stream_si256((__m256i *)(to + 32), b);
        _mm256_stream_si256((__m256i *)(to + 64), c), _mm256_stream_si256((__m256i *)(to + 96), d);
    }
    memcpy(to, from, bytes);
}

static int can_stream(void) { return __builtin_cpu_supports("avx2"); }
static void end_streams(void) { _mm_sfence(); }
#else
static void stream_row(char *to, const char *from, int64_t bytes) { memcpy(to, from, bytes); }
static int can_stream(void) { return 0; }
static void end_streams(void) {}
#endif

static void copy_rows(char *to, const char *from, const Geometry *g, int streamed) {
    for (int64_t i = 0; i < g->sizes[0]; i++, to += g->to[0], from += g->from[0])
        streamed ? stream_row(to, from, g->row) : (void)memcpy(to, from, g->row);
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
