/* Vectors of REAL as the processor has them, and what threads share work by. */

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif

typedef int64_t idx;

static idx smaller(idx a, idx b) { return a < b ? a : b; }

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

/* Rows whose columns are gone through one vector after the other; and how far ahead of them the
 * next are fetched. */
enum { ROWS_AHEAD = 32 };

enum { LANES = VECTOR_BYTES / sizeof(REAL), LINE = 64 / sizeof(REAL) };

typedef REAL vector __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL loose __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
typedef __typeof__(__builtin_choose_expr(sizeof(REAL) == 4, (int32_t)0, (int64_t)0)) bits;
typedef bits mask __attribute__((vector_size(VECTOR_BYTES)));

#define INLINE static inline __attribute__((always_inline))

INLINE vector load(const REAL *p) { return *(const loose *)p; }

INLINE void store(REAL *p, vector v) { *(loose *)p = v; }

/* The first `lanes` of a vector, zeros behind; and their way back. */
#if defined(__AVX512F__)
INLINE vector load_lanes(const REAL *p, idx lanes) {
    const unsigned first = (1u << smaller(lanes, LANES)) - 1;
    if (sizeof(REAL) == sizeof(float))
        return (vector)_mm512_maskz_loadu_ps((__mmask16)first, p);
    return (vector)_mm512_maskz_loadu_pd((__mmask8)first, p);
}

INLINE void store_lanes(REAL *p, vector v, idx lanes) {
    const unsigned first = (1u << smaller(lanes, LANES)) - 1;
    if (sizeof(REAL) == sizeof(float))
        _mm512_mask_storeu_ps(p, (__mmask16)first, (__m512)v);
    else
        _mm512_mask_storeu_pd(p, (__mmask8)first, (__m512d)v);
}
#elif defined(__AVX2__)
INLINE mask first_lanes(idx lanes) {
    static const bits window[2 * LANES] = {[0 ... LANES - 1] = -1};
    mask first;
    memcpy(&first, window + LANES - smaller(lanes, LANES), sizeof first);
    return first;
}

INLINE vector load_lanes(const REAL *p, idx lanes) {
    const __m256i first = (__m256i)first_lanes(lanes);
    if (sizeof(REAL) == sizeof(float))
        return (vector)_mm256_maskload_ps((const float *)p, first);
    return (vector)_mm256_maskload_pd((const double *)p, first);
}

INLINE void store_lanes(REAL *p, vector v, idx lanes) {
    const __m256i first = (__m256i)first_lanes(lanes);
    if (lanes >= LANES)
        store(p, v);
    else if (sizeof(REAL) == sizeof(float))
        _mm256_maskstore_ps((float *)p, first, (__m256)v);
    else
        _mm256_maskstore_pd((double *)p, first, (__m256d)v);
}
#else
INLINE vector load_lanes(const REAL *p, idx lanes) {
    if (lanes >= LANES)
        return load(p);
    vector v = {0};
    memcpy(&v, p, lanes * sizeof(REAL));
    return v;
}

INLINE void store_lanes(REAL *p, vector v, idx lanes) {
    if (lanes >= LANES)
        store(p, v);
    else
        memcpy(p, &v, lanes * sizeof(REAL));
}
#endif

INLINE vector cleared(vector v, mask where) { return (vector)((mask)v & ~where); }

INLINE vector rectified(vector v) { return cleared(v, v < 0); }

static idx whole_lines(idx c) { return (c + LINE - 1) / LINE * LINE; }

/* Row stride of rows of c values that are read side by side: whole cache lines, and not all of
 * one set. */
static idx apart(idx c) { return whole_lines(c) + LINE; }

/* Tiles [first, last) of thread `t` out of `threads`. */
static void share(idx tiles, idx t, idx threads, idx *first, idx *last) {
    *first = tiles * t / threads;
    *last = tiles * (t + 1) / threads;
}
