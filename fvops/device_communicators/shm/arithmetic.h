/* Sums of the ranks' terms: in the order of their places, with the same roundings as arithmetic.py, hence the same bits but
   for a NaN's. */

#ifndef FVOPS_ARITHMETIC_H
#define FVOPS_ARITHMETIC_H

#include <stdint.h>
#include <string.h>

/* As in mover.py. */
enum { FLOAT32, FLOAT64, INT32, INT64, BFLOAT16 };
enum { BLOCK = 512 };

#define SUM_OF(TYPE, NAME)                                                                                              \
    static void NAME(char *result, const char *const *terms, int count, int64_t bytes, int average) {                   \
        TYPE *restrict out = (TYPE *)result;                                                                            \
        int64_t n = bytes / (int64_t)sizeof(TYPE);                                                                      \
        const TYPE *restrict first = (const TYPE *)terms[0], *restrict second = (const TYPE *)terms[1];                 \
        for (int64_t i = 0; i < n; i++) out[i] = first[i] + second[i];                                                  \
        for (int t = 2; t < count; t++) {                                                                               \
            const TYPE *restrict term = (const TYPE *)terms[t];                                                         \
            for (int64_t i = 0; i < n; i++) out[i] += term[i];                                                          \
        }                                                                                                               \
        if (average)                                                                                                    \
            for (int64_t i = 0; i < n; i++) out[i] /= (TYPE)count;                                                      \
    }

SUM_OF(float, sum_float32)
SUM_OF(double, sum_float64)
/* Unsigned, since they wrap around; there is no average of integers. */
SUM_OF(uint32_t, sum_int32)
SUM_OF(uint64_t, sum_int64)

static float from_bfloat16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16; /* to nearest, ties to even */
}

static void sum_bfloat16(char *result, const char *const *terms, int count, int64_t bytes, int average) {
    for (int64_t at = 0; at < bytes; at += 2 * BLOCK) {
        int64_t n = (bytes - at) / 2 < BLOCK ? (bytes - at) / 2 : BLOCK;
        float wide[BLOCK];
        const uint16_t *first = (const uint16_t *)(terms[0] + at);
        for (int64_t i = 0; i < n; i++) wide[i] = from_bfloat16(first[i]);
        for (int t = 1; t < count; t++) {
            const uint16_t *term = (const uint16_t *)(terms[t] + at);
            for (int64_t i = 0; i < n; i++) wide[i] += from_bfloat16(term[i]);
        }
        uint16_t *out = (uint16_t *)(result + at);
        for (int64_t i = 0; i < n; i++) out[i] = to_bfloat16(average ? wide[i] / (float)count : wide[i]);
    }
}

/* `bytes` of the sum, or average, of `count` terms, at least two; the result is other memory than theirs. */
static void combine(char *result, const char *const *terms, int count, int64_t bytes, int arithmetic, int average) {
    switch (arithmetic) {
    case FLOAT32: sum_float32(result, terms, count, bytes, average); break;
    case FLOAT64: sum_float64(result, terms, count, bytes, average); break;
    case INT32: sum_int32(result, terms, count, bytes, 0); break;
    case INT64: sum_int64(result, terms, count, bytes, 0); break;
    default: sum_bfloat16(result, terms, count, bytes, average);
    }
}

#endif
