/* The dense block's operations on CPUs: the Backend protocol's, on row tiles, in C.
 *
 * Compiled once for REAL = float and once for REAL = double by cpu_library.py, on the user's
 * machine. Operands, symbols and conventions are those of base.py: matrices of P rows with any
 * row stride (ld...), inner stride 1, and dense vectors of c channels.
 *
 * A thread takes a contiguous range of row tiles and keeps a tile's temporaries in its own
 * cache, where the products and all elementwise work on that tile happen. Sums over rows are
 * taken in REAL over a few rows and in double beyond, thread by thread, and the threads' sums
 * are added in the order of the threads: the same bits for the same number of threads.
 * The matrix product is the BLAS that torch itself uses, handed in as a pointer; inside a
 * parallel region it runs in the calling thread alone. Nothing here allocates: `work` holds
 * what a thread needs, at the stride the caller chose.
 *
 * NaN passes through relu and its mask as in torch: comparisons are written so that they are
 * false for NaN in the branch that clears.
 */

#if defined(__AVX512F__)
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

typedef struct {
    const REAL *mean, *rstd, *scale, *shift;
} norm;

/* Which channels take T from its definition: `count` of them, listed in `index` unless all. */
typedef struct {
    idx count;
    const idx *index;
} channels;

/* Rows summed in REAL before the sum goes to double. */
enum { SUM_ROWS = 32 };

static idx smaller(idx a, idx b) { return a < b ? a : b; }

/* ------------------------------------------------------------------------- vectors */

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

enum { LANES = VECTOR_BYTES / sizeof(REAL), LINE = 64 / sizeof(REAL) };

typedef REAL vector __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL loose __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
typedef __typeof__((vector){0} < (vector){0}) mask;

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

/* Row stride of rows of c values that are read side by side: whole lines, not all of one cache set. */
static idx apart(idx c) { return whole_lines(c) + LINE; }

/* Tiles [first, last) of thread `t` out of `threads`. */
static void share(idx tiles, idx t, idx threads, idx *first, idx *last) {
    *first = tiles * t / threads;
    *last = tiles * (t + 1) / threads;
}

static void normalize_rectify(idx n, idx c, const REAL *x, idx ldx, const norm *f, REAL *z,
                              idx ldz) {
    const REAL *restrict scale = f->scale, *restrict shift = f->shift;
    for (idx i = 0; i < n; i++) {
        const REAL *restrict xi = x + i * ldx;
        REAL *restrict zi = z + i * ldz;
        for (idx j = 0; j < c; j++) {
            REAL v = xi[j] * scale[j] + shift[j];
            zi[j] = v < 0 ? 0 : v;
        }
    }
}

/* sum += partial, which is cleared. */
static void flush(idx c, REAL *restrict partial, double *restrict sum) {
    for (idx j = 0; j < c; j++) {
        sum[j] += partial[j];
        partial[j] = 0;
    }
}

/* partial += a row's part of T, g already masked; centred first, so that nothing cancels. */
static void add_second_row(const REAL *restrict x, const REAL *restrict g,
                           const REAL *restrict mean, channels direct, REAL *restrict partial) {
    if (direct.index == NULL)
        for (idx j = 0; j < direct.count; j++)
            partial[j] += g[j] * (x[j] - mean[j]);
    else
        for (idx j = 0; j < direct.count; j++) {
            idx q = direct.index[j];
            partial[j] += g[q] * (x[q] - mean[q]);
        }
}

/* T of a tile from its definition. */
static void add_second_sum(idx n, const REAL *x, idx ldx, const REAL *g, idx ldg, const norm *f,
                           channels direct, REAL *restrict partial, double *restrict t) {
    memset(partial, 0, direct.count * sizeof(REAL));
    for (idx i = 0; i < n && direct.count > 0; i++) {
        add_second_row(x + i * ldx, g + i * ldg, f->mean, direct, partial);
        if (i % SUM_ROWS == SUM_ROWS - 1 || i == n - 1)
            flush(direct.count, partial, t);
    }
}

/* out = sums of all threads, each (c,) at `stride`. */
static void add_threads(idx c, const double *sums, idx stride, idx threads, REAL *out) {
    for (idx j = 0; j < c; j++) {
        double total = 0;
        for (idx t = 0; t < threads; t++)
            total += sums[t * stride + j];
        out[j] = (REAL)total;
    }
}

/* How many channels' |beta| is at least `ratio` |gamma|, both times rstd: see norm_sums.py.
 * They are flagged, (c,). */
static idx unstable_channels(idx c, const norm *f, double ratio, idx *flags) {
    idx count = 0;
    for (idx j = 0; j < c; j++) {
        REAL beta = (f->shift[j] + f->mean[j] * f->scale[j]) * f->rstd[j], gamma = f->scale[j];
        flags[j] = (beta < 0 ? -beta : beta) >= (REAL)ratio * (gamma < 0 ? -gamma : gamma);
        count += flags[j];
    }
    return count;
}

/* T of the direct channels in units of xhat. */
static void finish_second_sum(channels direct, const norm *f, REAL *t) {
    for (idx j = 0; j < direct.count; j++)
        t[j] *= f->rstd[direct.index == NULL ? j : direct.index[j]];
}

/* S and T (c,) from the threads' sums (2c each) and, for channels that are not flagged, from
 * product = sum W dW: see norm_sums.py. Without flags none is; without a product all are. */
static void finish_sums(idx c, const norm *f, const idx *flags, const double *sums, idx threads,
                        const double *product, REAL *s, REAL *t) {
    add_threads(c, sums, 2 * c, threads, s);
    add_threads(c, sums + c, 2 * c, threads, t);
    for (idx j = 0; j < c; j++) {
        REAL beta = f->shift[j] + f->mean[j] * f->scale[j];
        if (product == NULL || (flags != NULL && flags[j]))
            t[j] *= f->rstd[j];
        else
            t[j] = ((REAL)product[j] - beta * s[j]) * (f->rstd[j] / f->scale[j]);
    }
}

/* Columns [first, last) of the threads' parts of a weight's gradient (rows, ld) onto the first
 * part, and product = sum W dW. The other parts stand one after the other in `others`. */
static void add_parts(idx rows, idx ld, idx first, idx last, const REAL *weight, REAL *dw,
                      const REAL *others, idx count, double *product) {
    memset(product + first, 0, (last - first) * sizeof(double));
    for (idx i = 0; i < rows; i++) {
        REAL *restrict own = dw + i * ld;
        const REAL *restrict w = weight + i * ld;
        for (idx t = 0; t < count; t++) {
            const REAL *restrict part = others + (t * rows + i) * ld;
            for (idx j = first; j < last; j++)
                own[j] += part[j];
        }
        for (idx j = first; j < last; j++)
            product[j] += (double)w[j] * own[j];
    }
}

/* ------------------------------------------------------------------ mean and variance
 *
 * Per thread: mean and centred squares of the rows seen, merged tile by tile (Chan, Golub,
 * LeVeque 1979), so that a mean much larger than the deviation costs no accuracy. */

static void merge(idx c, double *mean, double *m2, idx seen, const double *mean_b,
                  const double *m2_b, idx n) {
    double fraction = (double)n / (double)(seen + n);
    for (idx j = 0; j < c; j++) {
        double delta = mean_b[j] - mean[j];
        mean[j] += delta * fraction;
        m2[j] += m2_b[j] + delta * delta * (double)seen * fraction;
    }
}

/* sum and square of (x - shift) over n rows of a vector: four rows at a time, added in the end. */
INLINE void sum_rows(idx n, const REAL *x, idx ldx, idx lanes, vector shift, vector *sum,
                     vector *square) {
    vector s[4] = {{0}}, q[4] = {{0}};
    for (idx i = 0; i < n; i += 4)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            if (i + r < n) {
                vector v = load_lanes(x + (i + r) * ldx, lanes) - shift;
                s[r] += v;
                q[r] += v * v;
            }
    *sum = (s[0] + s[1]) + (s[2] + s[3]);
    *square = (q[0] + q[1]) + (q[2] + q[3]);
}

/* One tile into (mean, m2); `tile` (2c) double is scratch. The tile's mean is rounded first and
 * mended by what the centred rows sum to. */
static void add_statistics(idx n, idx c, const REAL *y, idx ldy, double *tile, double *mean,
                           double *m2, idx seen) {
    for (idx j = 0; j < c; j += LANES) {
        vector sum, rest, squares;
        sum_rows(n, y + j, ldy, c - j, (vector){0}, &sum, &squares);
        sum /= (REAL)n;
        sum_rows(n, y + j, ldy, c - j, sum, &rest, &squares);
        for (idx i = 0; i < smaller(LANES, c - j); i++) {
            double correction = (double)rest[i] / (double)n;
            tile[j + i] = sum[i] + correction;
            tile[c + j + i] = squares[i] - correction * rest[i];
        }
    }
    merge(c, mean, m2, seen, tile, tile + c, n);
}

/* Mean and biased variance from the threads' (mean, m2), each 2c at `stride`. */
static void finish_statistics(idx c, double *sums, idx stride, const idx *seen, idx threads,
                              REAL *mean, REAL *var) {
    idx total = seen[0];
    for (idx t = 1; t < threads; t++) {
        double *own = sums + t * stride;
        if (seen[t] > 0)
            merge(c, sums, sums + c, total, own, own + c, seen[t]);
        total += seen[t];
    }
    for (idx j = 0; j < c; j++) {
        mean[j] = (REAL)sums[j];
        var[j] = (REAL)(sums[c + j] / (double)total);
    }
}

enum { MOST_THREADS = 1024 };

/* sums (threads, 4c): scratch. */
void statistics(idx threads, idx rows, idx c, const REAL *x, idx ldx, idx tile_rows, double *sums,
                REAL *mean, REAL *var) {
    idx tiles = (rows + tile_rows - 1) / tile_rows, seen[MOST_THREADS];
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (idx t = 0; t < threads; t++) {
        double *own = sums + t * 4 * c;
        idx first, last;
        share(tiles, t, threads, &first, &last);
        memset(own, 0, 2 * c * sizeof(double));
        seen[t] = 0;
        for (idx i = first; i < last; i++) {
            idx row = i * tile_rows, n = smaller(tile_rows, rows - row);
            add_statistics(n, c, x + row * ldx, ldx, own + 2 * c, own, own + c, seen[t]);
            seen[t] += n;
        }
    }
    finish_statistics(c, sums, 4 * c, seen, threads, mean, var);
}

/* --------------------------------------------------------------------- elementwise */

void bn_relu(idx threads, idx rows, idx c, const REAL *x, idx ldx, const norm *f, REAL *out,
             idx ldo) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (idx t = 0; t < threads; t++) {
        idx first, last;
        share(rows, t, threads, &first, &last);
        normalize_rectify(last - first, c, x + first * ldx, ldx, f, out + first * ldo, ldo);
    }
}

/* out = d - (s + t (x - mean)) / count; vectors (2c): scratch. */
void finish_gradient(idx threads, idx rows, idx c, const REAL *d, idx ldd, const REAL *x, idx ldx,
                     const REAL *mean, const REAL *s, const REAL *t, double count, REAL *vectors,
                     REAL *out, idx ldo) {
    REAL *slope = vectors, *offset = vectors + c;
    for (idx j = 0; j < c; j++) {
        slope[j] = t[j] / -(REAL)count;
        offset[j] = s[j] / -(REAL)count - slope[j] * mean[j];
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (idx thread = 0; thread < threads; thread++) {
        idx first, last;
        share(rows, thread, threads, &first, &last);
        for (idx i = first; i < last; i++) {
            const REAL *restrict di = d + i * ldd, *restrict xi = x + i * ldx;
            REAL *restrict oi = out + i * ldo;
            for (idx j = 0; j < c; j++)
                oi[j] = di[j] + (xi[j] * slope[j] + offset[j]);
        }
    }
}

/* dz = scale dz, plus slope x + offset where slope is given. */
static void apply_gradient(idx n, idx c, const REAL *x, idx ldx, const REAL *restrict scale,
                           const REAL *restrict slope, const REAL *restrict offset, REAL *dz,
                           idx ldz) {
    for (idx i = 0; i < n; i++) {
        const REAL *restrict xi = x + i * ldx;
        REAL *restrict gi = dz + i * ldz;
        if (slope == NULL)
            for (idx j = 0; j < c; j++)
                gi[j] *= scale[j];
        else
            for (idx j = 0; j < c; j++)
                gi[j] = scale[j] * gi[j] + (xi[j] * slope[j] + offset[j]);
    }
}

/* What a norm's correction is made of: its S and T over `count` rows; NULL for a frozen norm.
 * vectors (2c) are scratch. */
typedef struct {
    norm f;
    const REAL *s, *t;
    double count;
    REAL *vectors;
} correction;

/* (slope, offset) of what is affine in x in a norm's input gradient, in the scratch, or NULL. */
static const REAL *corrected_slope(idx c, const correction *n) {
    if (n->s == NULL)
        return NULL;
    REAL *slope = n->vectors, *offset = n->vectors + c;
    for (idx j = 0; j < c; j++) {
        slope[j] = n->f.scale[j] * n->f.rstd[j] * n->t[j] / -(REAL)n->count;
        offset[j] = n->f.scale[j] * n->s[j] / -(REAL)n->count - slope[j] * n->f.mean[j];
    }
    return n->vectors;
}

void bn_relu_backward_apply(idx threads, idx rows, idx c, const REAL *x, idx ldx,
                            const correction *n, REAL *dz, idx ldz) {
    const REAL *slope = corrected_slope(c, n);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (idx t = 0; t < threads; t++) {
        idx first, last;
        share(rows, t, threads, &first, &last);
        apply_gradient(last - first, c, x + first * ldx, ldx, n->f.scale, slope, n->vectors + c,
                       dz + first * ldz, ldz);
    }
}

/* out = dz where z > 0, its sums into s and t; d += scale out where d is given.
 * partial (threads, 2c) REAL, sums (threads, 2c) double: scratch. */
void bn_relu_backward_reduce(idx threads, idx rows, idx c, const REAL *x, idx ldx, const norm *f,
                             const REAL *z, idx ldz, const REAL *dz, idx lddz, REAL *out, idx ldo,
                             REAL *d, idx ldd, channels *direct, idx tile_rows, double *sums,
                             REAL *partial, REAL *s, REAL *t_out) {
    idx tiles = (rows + tile_rows - 1) / tile_rows;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (idx t = 0; t < threads; t++) {
        double *own = sums + t * 2 * c;
        REAL *restrict sum = partial + t * 2 * c;
        idx first, last;
        share(tiles, t, threads, &first, &last);
        memset(own, 0, 2 * c * sizeof(double));
        for (idx tile = first; tile < last; tile++) {
            idx row = tile * tile_rows, n = smaller(tile_rows, rows - row);
            memset(sum, 0, c * sizeof(REAL));
            for (idx i = row; i < row + n; i++) {
                const REAL *restrict zi = z + i * ldz;
                const REAL *gi = dz + i * lddz;
                REAL *oi = out + i * ldo;
#pragma omp simd
                for (idx j = 0; j < c; j++) {
                    REAL g = zi[j] <= 0 ? 0 : gi[j];
                    oi[j] = g;
                    sum[j] += g;
                }
                if (d != NULL) {
                    REAL *restrict di = d + i * ldd;
                    for (idx j = 0; j < c; j++)
                        di[j] += f->scale[j] * oi[j];
                }
                if (i % SUM_ROWS == SUM_ROWS - 1 || i == row + n - 1)
                    flush(c, sum, own);
            }
            add_second_sum(n, x + row * ldx, ldx, out + row * ldo, ldo, f, *direct, sum + c,
                           own + c);
        }
    }
    add_threads(c, sums, 2 * c, threads, s);
    add_threads(direct->count, sums + c, 2 * c, threads, t_out);
    finish_second_sum(*direct, f, t_out);
}

/* ----------------------------------------------------------------------- pooling
 *
 * Averages over windows of (wz, wy, wx) positions of an (images, depth, height, width) grid;
 * what is left over at the end of a dimension belongs to no window. A window of the whole
 * image is global pooling. Work is cut at lines of windows. */

typedef struct {
    norm f;
    const REAL *x; /* (rows, c), row stride ldx */
    idx ldx, c, images, depth, height, width, wz, wy, wx;
} pool;

/* Windows along each dimension, lines of windows, and 1 / positions of a window. */
typedef struct {
    idx z, y, x, lines, positions;
} windows;

static windows windows_of(const pool *p) {
    windows w = {p->depth / p->wz, p->height / p->wy, p->width / p->wx, 0, p->wz * p->wy * p->wx};
    w.lines = p->images * w.z * w.y;
    return w;
}

/* Row of position `at` of window `x` of a line of windows. */
static idx window_row(const pool *p, windows w, idx line, idx x, idx at) {
    idx image = line / (w.z * w.y), z = line / w.y % w.z, y = line % w.y;
    z = z * p->wz + at / (p->wy * p->wx);
    y = y * p->wy + at / p->wx % p->wy;
    return ((image * p->depth + z) * p->height + y) * p->width + x * p->wx + at % p->wx;
}

/* out (windows, c) dense = averages of relu(norm(x)).
 * partial (threads, c) REAL, sums (threads, c) double: scratch. */
void bn_relu_pool(idx threads, const pool *p, double *sums, REAL *partial, REAL *out) {
    const windows w = windows_of(p);
    const idx c = p->c;
    const REAL *restrict scale = p->f.scale, *restrict shift = p->f.shift;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (idx t = 0; t < threads; t++) {
        REAL *restrict sum = partial + t * c;
        double *own = sums + t * c;
        idx first, last;
        share(w.lines, t, threads, &first, &last);
        memset(sum, 0, c * sizeof(REAL));
        for (idx window = first * w.x; window < last * w.x; window++) {
            memset(own, 0, c * sizeof(double));
            for (idx at = 0; at < w.positions; at++) {
                const REAL *restrict x =
                    p->x + window_row(p, w, window / w.x, window % w.x, at) * p->ldx;
                for (idx j = 0; j < c; j++) {
                    REAL v = x[j] * scale[j] + shift[j];
                    sum[j] += v < 0 ? 0 : v;
                }
                if (at % SUM_ROWS == SUM_ROWS - 1 || at == w.positions - 1)
                    flush(c, sum, own);
            }
            for (idx j = 0; j < c; j++)
                out[window * c + j] = (REAL)(own[j] / (double)w.positions);
        }
    }
}

/* One position: g = the masked gradient out of `given`, d = scale g, sum += g, z_sum += z. */
static void pool_backward_row(idx c, const REAL *restrict x, const norm *f,
                              const REAL *restrict given, REAL *restrict g, REAL *restrict d,
                              REAL *restrict sum, REAL *restrict z_sum) {
    const REAL *restrict scale = f->scale, *restrict shift = f->shift;
    for (idx j = 0; j < c; j++) {
        REAL v = x[j] * scale[j] + shift[j];
        REAL masked = v <= 0 ? 0 : given[j];
        z_sum[j] += v < 0 ? 0 : v;
        g[j] = masked;
        sum[j] += masked;
        d[j] = scale[j] * masked;
    }
}

/* Back through it: d = scale dz, zero outside windows, for dpooled (windows, c) dense; s and t;
 * the averages themselves into `pooled` where given.
 * partial (threads, 5c) REAL, sums (threads, 3c) double: scratch. */
void bn_relu_pool_backward(idx threads, const pool *p, const REAL *dpooled, REAL *d, idx ldd,
                           REAL *pooled, channels *direct, double *sums, REAL *partial, REAL *s,
                           REAL *t_out) {
    const windows w = windows_of(p);
    const idx c = p->c, lines = p->images * p->depth * p->height;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (idx t = 0; t < threads; t++) {
        REAL *sum = partial + t * 5 * c, *second = sum + c;
        REAL *given = sum + 2 * c, *g = sum + 3 * c, *z_sum = sum + 4 * c;
        double *own = sums + t * 3 * c;
        idx first, last, rows = 0;
        memset(sum, 0, 5 * c * sizeof(REAL));
        memset(own, 0, 2 * c * sizeof(double));
        share(w.lines, t, threads, &first, &last);
        for (idx window = first * w.x; window < last * w.x; window++) {
            memset(own + 2 * c, 0, c * sizeof(double));
            for (idx j = 0; j < c; j++)
                given[j] = dpooled[window * c + j] / (REAL)w.positions;
            for (idx at = 0; at < w.positions; at++) {
                idx row = window_row(p, w, window / w.x, window % w.x, at);
                const REAL *x = p->x + row * p->ldx;
                pool_backward_row(c, x, &p->f, given, g, d + row * ldd, sum, z_sum);
                if (direct->count > 0)
                    add_second_row(x, g, p->f.mean, *direct, second);
                if (++rows % SUM_ROWS == 0) {
                    flush(c, sum, own);
                    flush(direct->count, second, own + c);
                }
                if (at % SUM_ROWS == SUM_ROWS - 1 || at == w.positions - 1)
                    flush(c, z_sum, own + 2 * c);
            }
            if (pooled != NULL)
                for (idx j = 0; j < c; j++)
                    pooled[window * c + j] = (REAL)(own[2 * c + j] / (double)w.positions);
        }
        flush(c, sum, own);
        flush(direct->count, second, own + c);
        share(lines, t, threads, &first, &last);
        for (idx line = first; line < last; line++) {
            idx y = line % p->height, z = line / p->height % p->depth;
            idx inside = y < w.y * p->wy && z < w.z * p->wz ? w.x * p->wx : 0;
            for (idx x = inside; x < p->width; x++)
                memset(d + (line * p->width + x) * ldd, 0, c * sizeof(REAL));
        }
    }
    add_threads(c, sums, 3 * c, threads, s);
    add_threads(direct->count, sums + c, 3 * c, threads, t_out);
    finish_second_sum(*direct, &p->f, t_out);
}

/* ------------------------------------------------------------------------ products
 *
 * A product's innermost loop keeps ROWS rows by up to VECTORS vectors of the result in
 * registers. Its right operand is read vector by vector, from rows or from panels: columns
 * [first, first + width) of every row together, the panels one after the other, zeros behind
 * the last column. An element of the result is summed in the order of the operands, wherever
 * it stands in a tile: the same bits for any tiling. */

/* ROWS x VECTORS results, VECTORS operands and a factor: 28 of 32 registers, or all of 16. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define ROWS 8
#else
#define ROWS 4
#endif

enum { VECTORS = 3 };

/* acc += a @ b, (rows, k) by (k, vectors): element (i, j) of a at a[i * row + j * step]. */
INLINE void multiply(const int rows, const int vectors, idx k, const REAL *a, idx row, idx step,
                     const REAL *b, idx ldb, vector acc[ROWS][VECTORS]) {
    for (idx i = 0; i < k; i++) {
        vector operand[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            operand[v] = load(b + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            REAL factor = a[r * row];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                acc[r][v] += operand[v] * factor;
        }
        a += step;
        b += ldb;
    }
}

/* f(rows, vectors, ...) with both constant: ROWS or 1, and 1 to VECTORS. */
#define SPECIALIZED(f, rows, vectors, ...)                                                     \
    do {                                                                                       \
        if ((rows) == ROWS && (vectors) == 3)                                                  \
            f(ROWS, 3, __VA_ARGS__);                                                           \
        else if ((rows) == ROWS && (vectors) == 2)                                             \
            f(ROWS, 2, __VA_ARGS__);                                                           \
        else if ((rows) == ROWS)                                                               \
            f(ROWS, 1, __VA_ARGS__);                                                           \
        else if ((vectors) == 3)                                                               \
            f(1, 3, __VA_ARGS__);                                                              \
        else if ((vectors) == 2)                                                               \
            f(1, 2, __VA_ARGS__);                                                              \
        else                                                                                   \
            f(1, 1, __VA_ARGS__);                                                              \
    } while (0)

static idx rows_at_once(idx left) { return left < ROWS ? 1 : ROWS; }

/* Vectors of the next panel of so many columns; not three and a lone one. */
static idx panel_vectors(idx columns) {
    idx vectors = (columns + LANES - 1) / LANES;
    return vectors == 4 ? 2 : smaller(vectors, VECTORS);
}

INLINE void product_rows(const int rows, const int vectors, idx k, const REAL *a, idx row,
                         idx step, const REAL *b, idx ldb, int add, REAL *out, idx ldo,
                         idx columns) {
    vector acc[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            acc[r][v] = add ? load_lanes(out + r * ldo + v * LANES,
                                         v + 1 < vectors ? LANES : columns - v * LANES)
                            : (vector){0};
    multiply(rows, vectors, k, a, row, step, b, ldb, acc);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            store_lanes(out + r * ldo + v * LANES, acc[r][v],
                        v + 1 < vectors ? LANES : columns - v * LANES);
}

/* One panel: out (n, columns) = or += a (n, k) @ b. */
static void panel_product(idx n, idx columns, idx k, const REAL *a, idx row, idx step,
                          const REAL *b, idx ldb, int add, REAL *out, idx ldo) {
    const idx vectors = panel_vectors(columns);
    for (idx i = 0, rows; i < n; i += rows) {
        rows = rows_at_once(n - i);
        SPECIALIZED(product_rows, rows, vectors, k, a + i * row, row, step, b, ldb, add,
                    out + i * ldo, ldo, columns);
    }
}

/* out (n, columns) = or += a (n, k) @ b, b in panels or, with a row stride, in rows. */
static void matrix_product(idx n, idx columns, idx k, const REAL *a, idx row, idx step,
                           const REAL *b, idx ldb, int add, REAL *out, idx ldo) {
    for (idx first = 0, width; first < columns; first += width) {
        width = panel_vectors(columns - first) * LANES;
        panel_product(n, smaller(width, columns - first), k, a, row, step,
                      b + (ldb ? first : k * first), ldb ? ldb : width, add, out + first, ldo);
    }
}

typedef struct {
    norm f;
    idx c, b;
    const REAL *weight; /* (b, c) */
    REAL *y;            /* (rows, b), dense */
    REAL *panels;       /* the weight's transpose in panels, c rows of b columns: scratch */
} product;

/* Thread t's part of the transpose of a weight (b, c) in panels. */
static void pack_transposed(const product *p, idx t, idx threads) {
    const idx b = p->b, c = p->c;
    for (idx first = 0, width; first < b; first += width) {
        width = panel_vectors(b - first) * LANES;
        const idx valid = smaller(width, b - first);
        const REAL *w = p->weight + first * c;
        for (idx j = c * t / threads; j < c * (t + 1) / threads; j++) {
            REAL *row = p->panels + c * first + j * width;
            for (idx i = 0; i < valid; i++)
                row[i] = w[i * c + j];
            memset(row + valid, 0, (width - valid) * sizeof(REAL));
        }
    }
}

/* Thread t's part of a weight (b, c) itself in panels, b rows of c columns. */
static void pack(const product *p, REAL *panels, idx t, idx threads) {
    const idx b = p->b, c = p->c;
    for (idx first = 0, width; first < c; first += width) {
        width = panel_vectors(c - first) * LANES;
        const idx valid = smaller(width, c - first);
        for (idx i = b * t / threads; i < b * (t + 1) / threads; i++) {
            REAL *row = panels + b * first + i * width;
            memcpy(row, p->weight + i * c + first, valid * sizeof(REAL));
            memset(row + valid, 0, (width - valid) * sizeof(REAL));
        }
    }
}

/* z = relu(x scale + shift) of a few rows, whole vectors with zeros behind the last column;
 * what is `ahead` of x is fetched. */
static void normalize_columns(idx n, idx c, const REAL *x, idx ldx, idx ahead, const REAL *scale,
                              const REAL *shift, REAL *z, idx ldz) {
    for (idx j = 0; j < c; j += LANES) {
        const idx lanes = c - j;
        const vector a = load_lanes(scale + j, lanes), b = load_lanes(shift + j, lanes);
        for (idx i = 0; i < n; i++) {
            const REAL *at = x + i * ldx + j;
            store(z + i * ldz + j, rectified(load_lanes(at, lanes) * a + b));
            __builtin_prefetch(at + ahead, 0, 2);
        }
    }
}

/* Some rows' relu(norm(x)) @ weight^T; z (ROWS, apart(c)): scratch. */
static void tile_product(idx n, const REAL *x, idx ldx, const product *p, REAL *z, REAL *y) {
    const idx ldz = apart(p->c);
    for (idx i = 0, rows; i < n; i += rows) {
        rows = rows_at_once(n - i);
        normalize_columns(rows, p->c, x + i * ldx, ldx, ROWS * ldx, p->f.scale, p->f.shift, z, ldz);
        matrix_product(rows, p->b, p->c, z, ldz, 1, p->panels, 0, 0, y + i * p->b, p->b);
    }
}

/* Rows [first, last) of thread `t`: whole groups of ROWS. */
static void share_rows(idx rows, idx t, idx threads, idx *first, idx *last) {
    share((rows + ROWS - 1) / ROWS, t, threads, first, last);
    *first = smaller(*first * ROWS, rows);
    *last = smaller(*last * ROWS, rows);
}

/* y = relu(norm(x)) @ weight^T and, where `mean` is given, y's statistics.
 * z (threads, ROWS, apart(c)) REAL and sums (threads, 4b) double: scratch. */
void bn_relu_conv1x1(idx threads, idx rows, const REAL *x, idx ldx, const product *p,
                     idx tile_rows, double *sums, REAL *z, REAL *mean, REAL *var) {
    const idx b = p->b;
    idx seen[MOST_THREADS];
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
        for (idx t = 0; t < threads; t++)
            pack_transposed(p, t, threads);
#pragma omp for schedule(static, 1)
        for (idx t = 0; t < threads; t++) {
            idx first, last;
            share_rows(rows, t, threads, &first, &last);
            double *own = sums + t * 4 * b;
            seen[t] = last - first;
            if (mean != NULL)
                memset(own, 0, 2 * b * sizeof(double));
            for (idx row = first; row < last; row += tile_rows) {
                idx n = smaller(tile_rows, last - row);
                REAL *y = p->y + row * b;
                tile_product(n, x + row * ldx, ldx, p, z + t * ROWS * apart(p->c), y);
                if (mean != NULL)
                    add_statistics(n, b, y, b, own + 2 * b, own, own + b, row - first);
            }
        }
    }
    if (mean != NULL)
        finish_statistics(b, sums, 4 * b, seen, threads, mean, var);
}

/* The gradient after norm2's ReLU becomes the one of y, tile by tile: apply_gradient's operands. */
typedef struct {
    const REAL *y;
    correction n;
} pending;

/* A tile's x and d from a panel's first column on, its z, and what the rows sum up. */
typedef struct {
    idx columns;
    const REAL *x, *z, *scale, *mean;
    REAL *d;
    idx ldx, ldd, ahead_x, ahead_d;
    vector s[VECTORS], t[VECTORS];
    int direct; /* whether any column's T is wanted */
} panel;

/* d += scale dz of some rows from row i on, dz = (dy @ w) [z > 0], and what it sums to. */
INLINE void backward_rows(const int rows, const int vectors, idx i, idx b, const REAL *dy,
                          const REAL *w, panel *p) {
    const idx width = vectors * LANES, rest = p->columns - (vectors - 1) * LANES;
    vector acc[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            acc[r][v] = (vector){0};
    multiply(rows, vectors, b, dy + i * b, b, 1, w, width, acc);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        const idx lanes = v + 1 < vectors ? LANES : rest;
        const vector scale = load_lanes(p->scale + v * LANES, lanes);
        vector s = p->s[v];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            REAL *d = p->d + (i + r) * p->ldd + v * LANES;
            __builtin_prefetch(d + p->ahead_d, 1, 2);
            __builtin_prefetch(p->x + (i + r) * p->ldx + v * LANES + p->ahead_x, 0, 2);
            vector g = cleared(acc[r][v], load(p->z + (i + r) * width + v * LANES) <= 0);
            s += g;
            acc[r][v] = g;
            store_lanes(d, load_lanes(d, lanes) + scale * g, lanes);
        }
        p->s[v] = s;
        if (p->direct) {
            const vector mean = load_lanes(p->mean + v * LANES, lanes);
            for (int r = 0; r < rows; r++) {
                const REAL *x = p->x + (i + r) * p->ldx + v * LANES;
                p->t[v] += acc[r][v] * (load_lanes(x, lanes) - mean);
            }
        }
    }
}

/* sum (c,) += a panel's vectors. */
static void flush_panel(const panel *p, const vector *from, double *sum) {
    for (idx j = 0; j < p->columns; j++)
        sum[j] += from[j / LANES][j % LANES];
}

/* One pass over x: dw += dy^T z, d += scale dz, s and t; see base.py.
 * Scratch: z (threads, tile_rows VECTORS LINE and, for `again`, ROWS apart(c)), others
 * (threads - 1, b, c) REAL, sums (threads, 2c) and product (c) double, flags (c). */
void bn_relu_conv1x1_backward(idx threads, idx rows, const REAL *x, idx ldx, const product *p,
                              REAL *dy, const pending *before, const product *again, REAL *d,
                              idx ldd, double ratio, idx tile_rows, double *sums, double *product,
                              idx *flags, REAL *z_all, REAL *others, REAL *dw_out, REAL *s, REAL *t_out) {
    const idx c = p->c, b = p->b;
    const REAL *slope = before == NULL ? NULL : corrected_slope(b, &before->n);
    const idx unstable = unstable_channels(c, &p->f, ratio, flags);
    const idx z_size = tile_rows * VECTORS * LINE;
    const idx room = again == NULL ? z_size : z_size + ROWS * apart(again->c);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
        for (idx t = 0; t < threads; t++) {
            pack(p, p->panels, t, threads);
            if (again != NULL)
                pack_transposed(again, t, threads);
        }
#pragma omp for schedule(static, 1)
        for (idx t = 0; t < threads; t++) {
            double *own = sums + t * 2 * c;
            REAL *z = z_all + t * room;
            REAL *dw = t == 0 ? dw_out : others + (t - 1) * b * c;
            idx first, last;
            share_rows(rows, t, threads, &first, &last);
            memset(own, 0, 2 * c * sizeof(double));
            if (first == last)
                memset(dw, 0, b * c * sizeof(REAL));
            for (idx row = first; row < last; row += tile_rows) {
                const idx n = smaller(tile_rows, last - row);
                REAL *dyt = dy + row * b;
                if (before != NULL)
                    apply_gradient(n, b, before->y + row * b, b, before->n.f.scale, slope,
                                   before->n.vectors + b, dyt, b);
                for (idx j = 0, width; j < c; j += width) {
                    const idx vectors = panel_vectors(c - j);
                    width = vectors * LANES;
                    panel q = {.columns = smaller(width, c - j), .x = x + row * ldx + j, .z = z,
                               .scale = p->f.scale + j, .mean = p->f.mean + j,
                               .d = d + row * ldd + j, .ldx = ldx, .ldd = ldd};
                    q.ahead_x = j + width < c ? width : tile_rows * ldx - j;
                    q.ahead_d = j + width < c ? width : tile_rows * ldd - j;
                    for (idx i = j; unstable > 0 && i < j + q.columns; i++)
                        q.direct |= (int)flags[i];
                    normalize_columns(n, q.columns, q.x, ldx, 0, q.scale, p->f.shift + j, z,
                                      width);
                    panel_product(b, q.columns, n, dyt, 1, b, z, width, row > first, dw + j, c);
                    for (idx i = 0, group; i < n; i += group) {
                        group = rows_at_once(n - i);
                        SPECIALIZED(backward_rows, group, vectors, i, b, dyt, p->panels + b * j,
                                    &q);
                    }
                    flush_panel(&q, q.s, own + j);
                    if (q.direct)
                        flush_panel(&q, q.t, own + c + j);
                }
                if (again != NULL)
                    tile_product(n, x + row * ldx, ldx, again, z + z_size,
                                 again->y + row * again->b);
            }
        }
#pragma omp for schedule(static, 1)
        for (idx t = 0; t < threads; t++)
            add_parts(b, c, c * t / threads, c * (t + 1) / threads, p->weight, dw_out, others,
                      threads - 1, product);
    }
    finish_sums(c, &p->f, unstable > 0 ? flags : NULL, sums, threads, product, s, t_out);
}

/* ---------------------------------------------------------------- 3-wide convolution
 *
 * Work is cut at lines (rows of pixels along the last dimension) of an (images, depth, height)
 * grid; spatial dimensions that are not there have size 1 and a window of 1.
 *
 * Along a line the convolution is Winograd's F(2, 3): two neighbouring outputs of three taps
 * take four products of sums instead of six products (Winograd 1980; Lavin, Gray 2016). For
 * inputs d0..d3 around a pair of outputs and taps w0..w2,
 *
 *     v = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)
 *     u = (w0, (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2, w2)
 *     m = u v,  outputs (m0 + m1 + m2, m1 - m2 - m3),
 *
 * all of it linear in w and in d, so that backward is the adjoint of each step: with e =
 * (g0, g0 + g1, g0 - g1, -g1) of a pair of output gradients, du = e v and dv = u e. Where a
 * line is odd, its last pair has one pixel outside. The taps across lines are plain: one
 * product for all of them, (pairs, b) by (b, across k), wide where k is small. */

typedef struct {
    norm f;
    const REAL *source; /* (rows, b), row stride lds */
    idx lds, b, k;
    idx images, depth, height, width;
    idx dz, dy;         /* reach of the window in lines: 0 or 1 */
    const REAL *weight; /* (k, b, 2 dz + 1, 2 dy + 1, 3) at these strides */
    idx stride[5];
    REAL *u;            /* four planes of the transformed weight: scratch */
} convolution;

static idx lines_of(const convolution *v) { return v->images * v->depth * v->height; }

static idx across(const convolution *v) { return (2 * v->dz + 1) * (2 * v->dy + 1); }

static idx pairs_of(const convolution *v) { return (v->width + 1) / 2; }

/* Offset of tap (line, output channel) of the weight, its first of three. */
static idx tap_offset(const convolution *v, const idx *stride, idx line, idx o) {
    idx height = 2 * v->dy + 1;
    return o * stride[0] + line / height * stride[2] + line % height * stride[3];
}

/* u from the weight, its taps across and output channels divided among the threads of a parallel
 * region: one row of b each, or (transposed) one column of panels, whole lines of them. */
static void transform_weight(const convolution *v, int transposed) {
    const idx b = v->b, columns = across(v) * v->k, *stride = v->stride;
    const idx padded = whole_lines(columns);
    const idx plane = transposed ? b * padded : columns * apart(b);
#pragma omp for schedule(static)
    for (idx row = 0; row < (transposed ? padded : columns); row++) {
        idx first = 0, width = panel_vectors(padded) * LANES;
        for (; row >= first + width; width = panel_vectors(padded - first) * LANES)
            first += width;
        REAL *restrict u = v->u + (transposed ? b * first + row - first : row * apart(b));
        const idx step = transposed ? width : 1;
        const REAL *w = v->weight;
        if (row < columns)
            w += tap_offset(v, stride, row / v->k, row % v->k);
        for (idx i = 0; i < b; i++) {
            const REAL *wi = w + i * stride[1];
            REAL w0 = wi[0], w1 = wi[stride[4]], w2 = wi[2 * stride[4]], ends = w0 + w2;
            u[i * step] = w0;
            u[plane + i * step] = (ends + w1) / 2;
            u[2 * plane + i * step] = (ends - w1) / 2;
            u[3 * plane + i * step] = w2;
        }
        for (idx i = b; i < whole_lines(b) && !transposed; i++)
            u[i] = u[plane + i] = u[2 * plane + i] = u[3 * plane + i] = 0;
        for (idx i = 0; i < 4 * b && row >= columns; i++)
            u[i / b * plane + i % b * step] = 0;
    }
}

/* The weight's gradient, at `stride`, from du, likewise. */
static void gather_weight(const convolution *v, const REAL *du, REAL *gradient,
                          const idx *stride) {
    const idx b = v->b, columns = across(v) * v->k, plane = columns * apart(b);
#pragma omp for schedule(static)
    for (idx row = 0; row < columns; row++) {
        REAL *w = gradient + tap_offset(v, stride, row / v->k, row % v->k);
        const REAL *restrict u = du + row * apart(b);
        for (idx i = 0; i < b; i++) {
            REAL *wi = w + i * stride[1];
            REAL sum = (u[plane + i] + u[2 * plane + i]) / 2;
            wi[0] = u[i] + sum;
            wi[stride[4]] = (u[plane + i] - u[2 * plane + i]) / 2;
            wi[2 * stride[4]] = sum + u[3 * plane + i];
        }
    }
}

/* The line (dz, dy) away from `line`, or -1 outside its image. */
static idx neighbour(const convolution *v, idx line, idx dz, idx dy) {
    idx y = line % v->height + dy, z = line / v->height % v->depth + dz;
    if (y < 0 || y >= v->height || z < 0 || z >= v->depth)
        return -1;
    return line + dz * v->height + dy;
}

/* v of one line of h = relu(norm(source)), with zeros before it and behind: four planes of a row
 * for each pair, at apart(b), zeros behind its b. */
static void transform_line(const convolution *v, idx line, REAL *out, idx plane) {
    const idx b = v->b, width = v->width, lds = v->lds, ldv = apart(b);
    for (idx j = 0; j < b; j += LANES) {
        const idx lanes = b - j;
        const vector scale = load_lanes(v->f.scale + j, lanes);
        const vector shift = load_lanes(v->f.shift + j, lanes);
        const REAL *source = v->source + line * width * lds + j;
        REAL *o = out + j;
        vector d0 = {0}, d1 = rectified(load_lanes(source, lanes) * scale + shift);
        for (idx x = 0; x < width; x += 2, o += ldv) {
            vector d2 = {0}, d3 = {0};
            if (x + 1 < width)
                d2 = rectified(load_lanes(source + (x + 1) * lds, lanes) * scale + shift);
            if (x + 2 < width)
                d3 = rectified(load_lanes(source + (x + 2) * lds, lanes) * scale + shift);
            store(o, d0 - d2);
            store(o + plane, d1 + d2);
            store(o + 2 * plane, d2 - d1);
            store(o + 3 * plane, d1 - d3);
            d0 = d2;
            d1 = d3;
        }
    }
}

/* Add the outputs of one line's pairs to the line they belong to; m is four planes of rows
 * `ldm` apart, k of each row. */
static void add_outputs(idx width, idx k, const REAL *m, idx ldm, idx plane, REAL *out, idx ldo) {
    for (idx j = 0; j < k; j += LANES) {
        const idx lanes = k - j;
        const REAL *from = m + j;
        REAL *o = out + j;
        for (idx x = 0; x < width; x += 2, from += ldm, o += 2 * ldo) {
            vector m1 = load_lanes(from + plane, lanes), m2 = load_lanes(from + 2 * plane, lanes);
            vector first = load_lanes(from, lanes) + (m1 + m2);
            store_lanes(o, load_lanes(o, lanes) + first, lanes);
            if (x + 1 < width) {
                vector second = (m1 - m2) - load_lanes(from + 3 * plane, lanes);
                store_lanes(o + ldo, load_lanes(o + ldo, lanes) + second, lanes);
            }
        }
    }
}

/* e of one line of dout (dense, k; NULL outside the image) into four planes of rows `lde`. */
static void transform_gradients(idx width, idx k, const REAL *dout, REAL *e, idx lde, idx plane) {
    for (idx j = 0; j < k; j += LANES) {
        const idx lanes = k - j;
        REAL *o = e + j;
        for (idx x = 0; x < width; x += 2, o += lde) {
            vector first = {0}, second = {0};
            if (dout != NULL)
                first = load_lanes(dout + x * k + j, lanes);
            if (dout != NULL && x + 1 < width)
                second = load_lanes(dout + (x + 1) * k + j, lanes);
            store_lanes(o, first, lanes);
            store_lanes(o + plane, first + second, lanes);
            store_lanes(o + 2 * plane, first - second, lanes);
            store_lanes(o + 3 * plane, -second, lanes);
        }
    }
}

/* out = conv3(relu(norm(source))), (rows, k) at stride ldo.
 * Scratch of each thread: v (4, tile_lines pairs, apart(b)) and m (4, tile_lines pairs, whole
 * lines of across k); of all: v->u. */
void bn_relu_conv3(idx threads, const convolution *v, idx tile_lines, REAL *v_all,
                   REAL *m_all, REAL *out, idx ldo) {
    const idx lines = lines_of(v), width = v->width, b = v->b, k = v->k, pairs = pairs_of(v);
    const idx reach = v->dz * v->height + v->dy, capacity = tile_lines * pairs;
    const idx ldv = apart(b), ldm = whole_lines(across(v) * k);
#pragma omp parallel num_threads(threads)
    {
        transform_weight(v, 1);
#pragma omp for schedule(static, 1)
        for (idx t = 0; t < threads; t++) {
            REAL *vt = v_all + t * 4 * capacity * ldv, *m = m_all + t * 4 * capacity * ldm;
            idx first, last;
            share(lines, t, threads, &first, &last);
            /* Lines of other threads that reach into this thread's are computed once more. */
            idx from = first < reach ? 0 : first - reach, to = smaller(lines, last + reach);
            idx cleared = first;
            if (first == last)
                to = from;
            for (idx top = from; top < to; top += tile_lines) {
                idx bottom = smaller(to, top + tile_lines), n = (bottom - top) * pairs;
                for (; cleared < smaller(last, bottom + reach); cleared++)
                    for (idx x = 0; x < width; x++)
                        memset(out + (cleared * width + x) * ldo, 0, k * sizeof(REAL));
                for (idx line = top; line < bottom; line++)
                    transform_line(v, line, vt + (line - top) * pairs * ldv, capacity * ldv);
                for (idx i = 0; i < 4; i++)
                    matrix_product(n, ldm, b, vt + i * capacity * ldv, ldv, 1,
                                   v->u + i * b * ldm, 0, 0, m + i * capacity * ldm, ldm);
                for (idx line = top; line < bottom; line++)
                    for (idx dz = -v->dz, tap = 0; dz <= v->dz; dz++)
                        for (idx dy = -v->dy; dy <= v->dy; dy++, tap++) {
                            idx target = neighbour(v, line, -dz, -dy);
                            if (target >= first && target < last)
                                add_outputs(width, k, m + (line - top) * pairs * ldm + tap * k,
                                            ldm, capacity * ldm, out + target * width * ldo, ldo);
                        }
            }
        }
    }
}

/* One line of dh out of the four planes dv, masked where h is not above zero: into `out` or,
 * `onto` what is there, times the norm's scale. It sums to s and, where given, t. */
static void gather_line(const convolution *v, idx line, const REAL *dv, idx plane, REAL *out,
                        idx ldo, int onto, REAL *s, REAL *t) {
    const idx b = v->b, width = v->width, lds = v->lds, ldv = apart(b);
    for (idx j = 0; j < b; j += LANES) {
        const idx lanes = b - j;
        const vector scale = load_lanes(v->f.scale + j, lanes);
        const vector shift = load_lanes(v->f.shift + j, lanes);
        const vector mean = load_lanes(v->f.mean + j, lanes);
        const REAL *source = v->source + line * width * lds + j, *from = dv + j;
        vector sum = {0}, second = {0}, v0 = load(from), before = {0};
        for (idx x = 0; x < width; x += 2, from += ldv) {
            const vector v1 = load(from + plane), v2 = load(from + 2 * plane);
            const vector v3 = load(from + 3 * plane);
            const vector after = x + 2 < width ? load(from + ldv) : (vector){0};
            const vector pair[2] = {(v1 - v2) + (v3 - before), (v1 + v2) + (after - v0)};
            before = v3;
            v0 = after;
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++)
                if (x + i < width) {
                    const vector at = load_lanes(source + (x + i) * lds, lanes);
                    const vector g = cleared(pair[i], at * scale + shift <= 0);
                    REAL *o = out + (x + i) * ldo + j;
                    sum += g;
                    if (t != NULL)
                        second += g * (at - mean);
                    store_lanes(o, onto ? load_lanes(o, lanes) + scale * g : g, lanes);
                }
        }
        store_lanes(s + j, sum, lanes);
        if (t != NULL)
            store_lanes(t + j, second, lanes);
    }
}

/* Back through it: dz (rows, b) = the masked gradient after the ReLU where given, else
 * d += scale dz; s and t; the weight's gradient where `gradient` is given, at `stride`.
 * dout (rows, k) dense.
 * Scratch of each thread: v (4, tile_lines pairs, apart(b)), e (4, tile_lines pairs, across k),
 * du (4, across, k, apart(b)) where there is a gradient, partial (2b), sums (2b); of all:
 * v->u, product (b) double, flags (b). */
void bn_relu_conv3_backward(idx threads, const convolution *v, const REAL *dout, REAL *dz_out,
                            REAL *d, idx ldd, double ratio, idx tile_lines, double *sums,
                            double *product, idx *flags, REAL *v_all, REAL *e_all,
                            REAL *du_all, REAL *partial, REAL *gradient, const idx *stride,
                            REAL *s, REAL *t_out) {
    const idx lines = lines_of(v), width = v->width, b = v->b, k = v->k, pairs = pairs_of(v);
    const idx columns = across(v) * k, capacity = tile_lines * pairs, ldv = apart(b);
    const idx wide = whole_lines(b);
    const idx unstable = gradient == NULL ? b : unstable_channels(b, &v->f, ratio, flags);
#pragma omp parallel num_threads(threads)
    {
        transform_weight(v, 0);
#pragma omp for schedule(static, 1)
        for (idx t = 0; t < threads; t++) {
            REAL *vt = v_all + t * 4 * capacity * ldv, *e = e_all + t * 4 * capacity * columns;
            REAL *du = gradient == NULL ? NULL : du_all + t * 4 * columns * ldv;
            REAL *sum = partial + t * 2 * b, *second = unstable > 0 ? sum + b : NULL;
            double *own = sums + t * 2 * b;
            idx first, last;
            share(lines, t, threads, &first, &last);
            memset(own, 0, 2 * b * sizeof(double));
            if (du != NULL && first == last)
                memset(du, 0, 4 * columns * ldv * sizeof(REAL));
            for (idx top = first; top < last; top += tile_lines) {
                idx bottom = smaller(last, top + tile_lines), n = (bottom - top) * pairs;
                for (idx line = top; line < bottom; line++) {
                    for (idx dz = -v->dz, tap = 0; dz <= v->dz; dz++)
                        for (idx dy = -v->dy; dy <= v->dy; dy++, tap++) {
                            idx seen = neighbour(v, line, -dz, -dy);
                            transform_gradients(width, k,
                                                seen < 0 ? NULL : dout + seen * width * k,
                                                e + (line - top) * pairs * columns + tap * k,
                                                columns, capacity * columns);
                        }
                    if (du != NULL)
                        transform_line(v, line, vt + (line - top) * pairs * ldv,
                                       capacity * ldv);
                }
                for (idx i = 0; i < 4; i++) {
                    REAL *vi = vt + i * capacity * ldv, *ei = e + i * capacity * columns;
                    if (du != NULL)
                        matrix_product(columns, wide, n, ei, 1, columns, vi, ldv, top > first,
                                       du + i * columns * ldv, ldv);
                    /* v is used up */
                    matrix_product(n, wide, columns, ei, columns, 1, v->u + i * columns * ldv, ldv,
                                   0, vi, ldv);
                }
                for (idx line = top; line < bottom; line++) {
                    const idx row = line * width, ldo = dz_out == NULL ? ldd : b;
                    REAL *out = dz_out == NULL ? d : dz_out;
                    gather_line(v, line, vt + (line - top) * pairs * ldv, capacity * ldv,
                                out + row * ldo, ldo, dz_out == NULL, sum, second);
                    flush(b, sum, own);
                    if (second != NULL)
                        flush(b, second, own + b);
                }
            }
        }
        if (gradient != NULL) {
            /* sum W dW = sum U dU: both sides of one linear map, as are dU and dW */
#pragma omp for schedule(static, 1)
            for (idx t = 0; t < threads; t++)
                add_parts(4 * columns, ldv, b * t / threads, b * (t + 1) / threads, v->u, du_all,
                          du_all + 4 * columns * ldv, threads - 1, product);
            gather_weight(v, du_all, gradient, stride);
        }
    }
    finish_sums(b, &v->f, unstable > 0 ? flags : NULL, sums, threads,
                gradient == NULL ? NULL : product, s, t_out);
}
