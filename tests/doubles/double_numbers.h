/* Reductions of every dtype that the libraries know, in software: small floats through float, rounded once at the end. */
#ifndef DOUBLE_NUMBERS_H
#define DOUBLE_NUMBERS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum number { I8, U8, I16, U16, I32, U32, I64, U64, F16, BF16, E4M3, E5M2, F32, F64, NUMBERS };
enum reduction { SUM, PROD, MAX, MIN, AVG, REDUCTIONS };

static const size_t number_bytes[NUMBERS] = {1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 1, 1, 4, 8};

/* Width of exponent and mantissa; e4m3 here is the "fn" form: no infinity, one NaN. */
static const struct small { int exponent, mantissa; } small_floats[NUMBERS] = {
    [F16] = {5, 10}, [BF16] = {8, 7}, [E4M3] = {4, 3}, [E5M2] = {5, 2}};

static float small_decode(uint32_t bits, int number) {
    struct small s = small_floats[number];
    int bias = (1 << (s.exponent - 1)) - 1;
    int sign = bits >> (s.exponent + s.mantissa) & 1;
    int exponent = bits >> s.mantissa & ((1 << s.exponent) - 1);
    int mantissa = bits & ((1 << s.mantissa) - 1);
    double value;
    if (number == E4M3 ? exponent == 15 && mantissa == 7 : exponent == (1 << s.exponent) - 1)
        value = mantissa ? NAN : INFINITY;
    else if (exponent)
        value = ldexp(mantissa + (1 << s.mantissa), exponent - bias - s.mantissa);
    else
        value = ldexp(mantissa, 1 - bias - s.mantissa);
    return (float)(sign ? -value : value);
}

static uint32_t small_encode(float x, int number) {
    struct small s = small_floats[number];
    int bias = (1 << (s.exponent - 1)) - 1;
    uint32_t sign = (uint32_t)(signbit(x) != 0) << (s.exponent + s.mantissa);
    uint32_t infinity = ((1u << s.exponent) - 1) << s.mantissa; /* e4m3: the first pattern is not one */
    uint32_t nan = number == E4M3 ? 0x7f : infinity | 1u << (s.mantissa - 1);
    if (isnan(x)) return sign | nan;
    if (isinf(x)) return sign | (number == E4M3 ? nan : infinity);
    if (x == 0) return sign;
    int exponent;
    frexp(x, &exponent);
    exponent = exponent - 1 < 1 - bias ? 1 - bias : exponent - 1;
    /* In units of the last place; a carry out of the mantissa runs into the exponent as it should. */
    uint32_t units = (uint32_t)nearbyint(fabs((double)x) / ldexp(1, exponent - s.mantissa));
    uint32_t bits = units < 1u << s.mantissa ? units
                                             : ((uint32_t)(exponent + bias) << s.mantissa) + units - (1u << s.mantissa);
    if (number == E4M3) return sign | (bits >= 0x7f ? nan : bits);
    return sign | (bits >= infinity ? infinity : bits);
}

static float small_load(const void *at, int number) {
    uint16_t wide = 0;
    memcpy(&wide, at, number_bytes[number]);
    return small_decode(wide, number);
}

#define COMBINE(a, b, op) ((op) == PROD ? (a) * (b) : (op) == MAX ? ((a) > (b) ? (a) : (b)) \
                           : (op) == MIN ? ((a) < (b) ? (a) : (b)) : (a) + (b))

/* `type` is what lies in memory, `work` what is computed in. */
#define REDUCE(type, work)                                                  \
    for (size_t i = 0; i < count; i++) {                                    \
        work total = (work)((const type *)in[0])[i];                        \
        for (int rank = 1; rank < ranks; rank++) {                          \
            work next = (work)((const type *)in[rank])[i];                  \
            total = COMBINE(total, next, op);                               \
        }                                                                   \
        ((type *)out)[i] = (type)(op == AVG ? total / (work)ranks : total); \
    }                                                                       \
    break

/* Sums and products without a sign, so that overflow wraps. */
#define REDUCE_WHOLE(type, work)                          \
    if (op == SUM || op == PROD) { REDUCE(type, uint64_t); } \
    REDUCE(type, work)

/* out[i] = the reduction of in[0][i] .. in[ranks - 1][i], in rank order. */
static void reduce_numbers(void *out, char *const *in, int ranks, size_t count, int number, int op) {
    switch (number) {
    case I8: REDUCE_WHOLE(int8_t, int64_t);
    case U8: REDUCE_WHOLE(uint8_t, uint64_t);
    case I16: REDUCE_WHOLE(int16_t, int64_t);
    case U16: REDUCE_WHOLE(uint16_t, uint64_t);
    case I32: REDUCE_WHOLE(int32_t, int64_t);
    case U32: REDUCE_WHOLE(uint32_t, uint64_t);
    case I64: REDUCE_WHOLE(int64_t, int64_t);
    case U64: REDUCE_WHOLE(uint64_t, uint64_t);
    case F32: REDUCE(float, float);
    case F64: REDUCE(double, double);
    default:
        for (size_t i = 0; i < count; i++) {
            size_t bytes = number_bytes[number];
            float total = small_load(in[0] + i * bytes, number);
            for (int rank = 1; rank < ranks; rank++) {
                float next = small_load(in[rank] + i * bytes, number);
                total = COMBINE(total, next, op);
            }
            uint16_t bits = (uint16_t)small_encode(op == AVG ? total / ranks : total, number);
            memcpy((char *)out + i * bytes, &bits, bytes);
        }
    }
}

#endif
