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

#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif

typedef int64_t idx;

/* Fortran BLAS, column major. Integers are passed as 64 bits: a BLAS of 32-bit integers reads
 * the low half, which is all of a small number on a little-endian machine. */
typedef void gemm_function(const char *trans_a, const char *trans_b, const idx *m, const idx *n,
                           const idx *k, const REAL *alpha, const REAL *a, const idx *lda,
                           const REAL *b, const idx *ldb, const REAL *beta, REAL *c,
                           const idx *ldc);

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

/* The channels whose |beta| is at least `ratio` |gamma|, both times rstd: see norm_sums.py.
 * `index` (c,) is scratch. */
static channels unstable_channels(idx c, const norm *f, double ratio, idx *index) {
    channels found = {0, index};
    for (idx j = 0; j < c; j++) {
        REAL beta = (f->shift[j] + f->mean[j] * f->scale[j]) * f->rstd[j], gamma = f->scale[j];
        if ((beta < 0 ? -beta : beta) >= (REAL)ratio * (gamma < 0 ? -gamma : gamma))
            index[found.count++] = j;
    }
    /* gathering many columns costs more than reading all of them */
    return 4 * found.count <= c ? found : (channels){c, NULL};
}

/* T of the direct channels in units of xhat. */
static void finish_second_sum(channels direct, const norm *f, REAL *t) {
    for (idx j = 0; j < direct.count; j++)
        t[j] *= f->rstd[direct.index == NULL ? j : direct.index[j]];
}

/* S and T (c,) from the threads' sums (2c each, T of the direct channels) and, for the other
 * channels, from product = sum W dW: see norm_sums.py. */
static void finish_sums(idx c, const norm *f, channels direct, const double *sums, idx threads,
                        const double *product, REAL *s, REAL *t) {
    add_threads(c, sums, 2 * c, threads, s);
    if (direct.index == NULL) {
        add_threads(direct.count, sums + c, 2 * c, threads, t);
        finish_second_sum(direct, f, t);
        return;
    }
    for (idx j = 0; j < c; j++) {
        REAL beta = f->shift[j] + f->mean[j] * f->scale[j];
        t[j] = ((REAL)product[j] - beta * s[j]) * (f->rstd[j] / f->scale[j]);
    }
    for (idx j = 0; j < direct.count; j++) {
        idx q = direct.index[j];
        double total = 0;
        for (idx i = 0; i < threads; i++)
            total += sums[i * 2 * c + c + j];
        t[q] = (REAL)total * f->rstd[q];
    }
}

/* Columns [first, last) of the threads' parts of a weight's gradient (rows, c) onto the first
 * part, and product = sum W dW. The other parts stand one after the other in `others`. */
static void add_parts(idx rows, idx c, idx first, idx last, const REAL *weight, REAL *dw,
                      const REAL *others, idx count, double *product) {
    memset(product + first, 0, (last - first) * sizeof(double));
    for (idx i = 0; i < rows; i++) {
        REAL *restrict own = dw + i * c;
        const REAL *restrict w = weight + i * c;
        for (idx t = 0; t < count; t++) {
            const REAL *restrict part = others + (t * rows + i) * c;
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

/* One tile into (mean, m2); `partial` (3c) REAL and `tile` (2c) double are scratch. The tile's
 * mean is rounded first and mended by what the centred rows sum to. */
static void add_statistics(idx n, idx c, const REAL *y, idx ldy, REAL *partial, double *tile,
                           double *mean, double *m2, idx seen) {
    REAL *restrict sum = partial, *restrict rest = partial + c, *restrict squares = rest + c;
    memset(partial, 0, 3 * c * sizeof(REAL));
    for (idx i = 0; i < n; i++) {
        const REAL *restrict yi = y + i * ldy;
        for (idx j = 0; j < c; j++)
            sum[j] += yi[j];
    }
    for (idx j = 0; j < c; j++)
        sum[j] /= (REAL)n;
    for (idx i = 0; i < n; i++) {
        const REAL *restrict yi = y + i * ldy;
        for (idx j = 0; j < c; j++) {
            REAL centred = yi[j] - sum[j];
            rest[j] += centred;
            squares[j] += centred * centred;
        }
    }
    for (idx j = 0; j < c; j++) {
        double correction = (double)rest[j] / (double)n;
        tile[j] = sum[j] + correction;
        tile[c + j] = squares[j] - correction * rest[j];
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

/* sums (threads, 4c) double, partial (threads, 3c) REAL: scratch. */
void statistics(idx threads, idx rows, idx c, const REAL *x, idx ldx, idx tile_rows, double *sums,
                REAL *partial, REAL *mean, REAL *var) {
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
            add_statistics(n, c, x + row * ldx, ldx, partial + t * 3 * c, own + 2 * c, own,
                           own + c, seen[t]);
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

/* ------------------------------------------------------------------------ products */

typedef struct {
    norm f;
    idx c, b;
    const REAL *weight; /* (b, c) */
    REAL *y;            /* (rows, b), dense */
} product;

/* A tile's relu(norm(x)) @ weight^T; `z` (n, c) is left behind. */
static void tile_product(gemm_function *gemm, idx n, const REAL *x, idx ldx, const product *p,
                         REAL *z, REAL *y) {
    const REAL one = 1, zero = 0;
    normalize_rectify(n, p->c, x, ldx, &p->f, z, p->c);
    gemm("T", "N", &p->b, &n, &p->c, &one, p->weight, &p->c, z, &p->c, &zero, y, &p->b);
}

/* y = relu(norm(x)) @ weight^T and, where `mean` is given, y's statistics.
 * z (threads, tile_rows, c), partial (threads, 3b) REAL and sums (threads, 4b): scratch. */
void bn_relu_conv1x1(idx threads, gemm_function *gemm, idx rows, const REAL *x, idx ldx,
                     const product *p, idx tile_rows, double *sums, REAL *z, REAL *partial,
                     REAL *mean, REAL *var) {
    idx tiles = (rows + tile_rows - 1) / tile_rows, b = p->b, seen[MOST_THREADS];
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (idx t = 0; t < threads; t++) {
        idx first, last;
        share(tiles, t, threads, &first, &last);
        double *own = sums + t * 4 * b;
        seen[t] = 0;
        if (mean != NULL)
            memset(own, 0, 2 * b * sizeof(double));
        for (idx i = first; i < last; i++) {
            idx row = i * tile_rows, n = smaller(tile_rows, rows - row);
            REAL *y = p->y + row * b;
            tile_product(gemm, n, x + row * ldx, ldx, p, z + t * tile_rows * p->c, y);
            if (mean != NULL)
                add_statistics(n, b, y, b, partial + t * 3 * b, own + 2 * b, own, own + b,
                               seen[t]);
            seen[t] += n;
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

/* One pass over x: dw += dy^T z, d += scale dz, s and t; see base.py.
 * Scratch: z and dz (threads, tile_rows, c) each, others (threads - 1, b, c), partial
 * (threads, 2c) REAL, sums (threads, 2c) and product (c) double, index (c). */
void bn_relu_conv1x1_backward(idx threads, gemm_function *gemm, idx rows, const REAL *x, idx ldx,
                              const product *p, REAL *dy, const pending *before,
                              const product *again, REAL *d, idx ldd, double ratio,
                              idx tile_rows, double *sums, double *product, idx *index,
                              REAL *z_all, REAL *dz_all, REAL *others, REAL *partial, REAL *dw_out,
                              REAL *s, REAL *t_out) {
    idx tiles = (rows + tile_rows - 1) / tile_rows, c = p->c, b = p->b;
    const REAL one = 1, zero = 0;
    const REAL *slope = before == NULL ? NULL : corrected_slope(b, &before->n);
    const channels direct = unstable_channels(c, &p->f, ratio, index);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
        for (idx t = 0; t < threads; t++) {
            double *own = sums + t * 2 * c;
            REAL *restrict sum = partial + t * 2 * c;
            REAL *z = z_all + t * tile_rows * c, *dz = dz_all + t * tile_rows * c;
            REAL *dw = t == 0 ? dw_out : others + (t - 1) * b * c;
            const REAL *restrict scale = p->f.scale;
            idx first, last;
            share(tiles, t, threads, &first, &last);
            memset(own, 0, 2 * c * sizeof(double));
            if (first == last)
                memset(dw, 0, b * c * sizeof(REAL));
            for (idx tile = first; tile < last; tile++) {
                idx row = tile * tile_rows, n = smaller(tile_rows, rows - row);
                const REAL *xt = x + row * ldx;
                REAL *dyt = dy + row * b;
                if (before != NULL)
                    apply_gradient(n, b, before->y + row * b, b, before->n.f.scale, slope,
                                   before->n.vectors + b, dyt, b);
                normalize_rectify(n, c, xt, ldx, &p->f, z, c);
                gemm("N", "T", &c, &b, &n, &one, z, &c, dyt, &b, tile == first ? &zero : &one, dw,
                     &c);
                gemm("N", "N", &c, &n, &b, &one, p->weight, &c, dyt, &b, &zero, dz, &c);
                memset(sum, 0, c * sizeof(REAL));
                for (idx i = 0; i < n; i++) {
                    const REAL *restrict zi = z + i * c;
                    REAL *restrict gi = dz + i * c, *restrict di = d + (row + i) * ldd;
                    for (idx j = 0; j < c; j++) {
                        REAL g = zi[j] <= 0 ? 0 : gi[j];
                        sum[j] += g;
                        di[j] += scale[j] * g;
                    }
                    if (i % SUM_ROWS == SUM_ROWS - 1 || i == n - 1)
                        flush(c, sum, own);
                }
                if (direct.count > 0) {
                    for (idx i = 0; i < n * c; i++)
                        dz[i] = z[i] <= 0 ? 0 : dz[i];
                    add_second_sum(n, xt, ldx, dz, c, &p->f, direct, sum + c, own + c);
                }
                if (again != NULL)
                    tile_product(gemm, n, xt, ldx, again, z, again->y + row * again->b);
            }
        }
#pragma omp for schedule(static, 1)
        for (idx t = 0; t < threads; t++)
            add_parts(b, c, c * t / threads, c * (t + 1) / threads, p->weight, dw_out, others,
                      threads - 1, product);
    }
    finish_sums(c, &p->f, direct, sums, threads, product, s, t_out);
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
    REAL *u;            /* (4, across, k, b): scratch for the transformed weight */
} convolution;

static idx lines_of(const convolution *v) { return v->images * v->depth * v->height; }

static idx across(const convolution *v) { return (2 * v->dz + 1) * (2 * v->dy + 1); }

static idx pairs_of(const convolution *v) { return (v->width + 1) / 2; }

/* Offset of tap (line, output channel) of the weight, its first of three. */
static idx tap_offset(const convolution *v, const idx *stride, idx line, idx o) {
    idx height = 2 * v->dy + 1;
    return o * stride[0] + line / height * stride[2] + line % height * stride[3];
}

/* u from the weight, its rows (across k, b) divided among the threads of a parallel region. */
static void transform_weight(const convolution *v) {
    const idx b = v->b, plane = across(v) * v->k * b, *stride = v->stride;
#pragma omp for schedule(static)
    for (idx row = 0; row < across(v) * v->k; row++) {
        const REAL *w = v->weight + tap_offset(v, stride, row / v->k, row % v->k);
        REAL *restrict u = v->u + row * b;
        for (idx i = 0; i < b; i++) {
            const REAL *wi = w + i * stride[1];
            REAL w0 = wi[0], w1 = wi[stride[4]], w2 = wi[2 * stride[4]], ends = w0 + w2;
            u[i] = w0;
            u[plane + i] = (ends + w1) / 2;
            u[2 * plane + i] = (ends - w1) / 2;
            u[3 * plane + i] = w2;
        }
    }
}

/* The weight's gradient, at `stride`, from du, likewise. */
static void gather_weight(const convolution *v, const REAL *du, REAL *gradient,
                          const idx *stride) {
    const idx b = v->b, plane = across(v) * v->k * b;
#pragma omp for schedule(static)
    for (idx row = 0; row < across(v) * v->k; row++) {
        REAL *w = gradient + tap_offset(v, stride, row / v->k, row % v->k);
        const REAL *restrict u = du + row * b;
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

/* v of one line: h = relu(norm(source)) with a pixel of zeros before it and up to two after,
 * (2 pairs + 2, b), whose zeros are there already; v is four planes of (pairs, b). */
static void transform_line(const convolution *v, idx line, REAL *h, REAL *out, idx plane) {
    const idx b = v->b, pairs = pairs_of(v);
    normalize_rectify(v->width, b, v->source + line * v->width * v->lds, v->lds, &v->f, h + b, b);
    for (idx p = 0; p < pairs; p++) {
        const REAL *restrict d = h + 2 * p * b;
        REAL *restrict o = out + p * b;
        for (idx j = 0; j < b; j++) {
            REAL d0 = d[j], d1 = d[b + j], d2 = d[2 * b + j], d3 = d[3 * b + j];
            o[j] = d0 - d2;
            o[plane + j] = d1 + d2;
            o[2 * plane + j] = d2 - d1;
            o[3 * plane + j] = d1 - d3;
        }
    }
}

/* Add the outputs of one line's pairs to the line they belong to; m is four planes of rows
 * `ldm` apart, k of each row. */
static void add_outputs(idx width, idx k, const REAL *m, idx ldm, idx plane, REAL *out, idx ldo) {
    for (idx x = 0; x < width; x += 2) {
        const REAL *restrict m0 = m + x / 2 * ldm, *restrict m1 = m0 + plane;
        const REAL *restrict m2 = m1 + plane, *restrict m3 = m2 + plane;
        REAL *restrict o = out + x * ldo, *restrict next = o + ldo;
        if (x + 1 < width)
            for (idx j = 0; j < k; j++) {
                o[j] += m0[j] + (m1[j] + m2[j]);
                next[j] += (m1[j] - m2[j]) - m3[j];
            }
        else
            for (idx j = 0; j < k; j++)
                o[j] += m0[j] + (m1[j] + m2[j]);
    }
}

/* e of one line of dout (dense, k; NULL outside the image) into four planes of rows `lde`. */
static void transform_gradients(idx width, idx k, const REAL *dout, REAL *e, idx lde, idx plane) {
    for (idx x = 0; x < width; x += 2) {
        REAL *restrict e0 = e + x / 2 * lde, *restrict e1 = e0 + plane;
        REAL *restrict e2 = e1 + plane, *restrict e3 = e2 + plane;
        const REAL *restrict g = dout + x * k;
        for (idx j = 0; j < k; j++) {
            REAL first = dout == NULL ? 0 : g[j];
            REAL second = dout == NULL || x + 1 == width ? 0 : g[k + j];
            e0[j] = first;
            e1[j] = first + second;
            e2[j] = first - second;
            e3[j] = -second;
        }
    }
}

/* out = conv3(relu(norm(source))), (rows, k) at stride ldo.
 * Scratch of each thread: h (2 pairs + 2, b), v (4, tile_lines pairs, b) and m (4, tile_lines
 * pairs, across k). */
void bn_relu_conv3(idx threads, gemm_function *gemm, const convolution *v, idx tile_lines,
                   REAL *h_all, REAL *v_all, REAL *m_all, REAL *out, idx ldo) {
    const idx lines = lines_of(v), width = v->width, b = v->b, k = v->k, pairs = pairs_of(v);
    const idx columns = across(v) * k, reach = v->dz * v->height + v->dy;
    const idx capacity = tile_lines * pairs;
    const REAL one = 1, zero = 0;
#pragma omp parallel num_threads(threads)
    {
        transform_weight(v);
#pragma omp for schedule(static, 1)
        for (idx t = 0; t < threads; t++) {
            REAL *h = h_all + t * (2 * pairs + 2) * b;
            REAL *vt = v_all + t * 4 * capacity * b, *m = m_all + t * 4 * capacity * columns;
            idx first, last;
            share(lines, t, threads, &first, &last);
            memset(h, 0, (2 * pairs + 2) * b * sizeof(REAL));
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
                    transform_line(v, line, h, vt + (line - top) * pairs * b, capacity * b);
                for (idx i = 0; i < 4; i++)
                    gemm("T", "N", &columns, &n, &b, &one, v->u + i * columns * b, &b,
                         vt + i * capacity * b, &b, &zero, m + i * capacity * columns, &columns);
                for (idx line = top; line < bottom; line++)
                    for (idx dz = -v->dz, tap = 0; dz <= v->dz; dz++)
                        for (idx dy = -v->dy; dy <= v->dy; dy++, tap++) {
                            idx target = neighbour(v, line, -dz, -dy);
                            if (target >= first && target < last)
                                add_outputs(width, k, m + (line - top) * pairs * columns + tap * k,
                                            columns, capacity * columns,
                                            out + target * width * ldo, ldo);
                        }
            }
        }
    }
}

/* One line of dh out of the four planes dv (pairs, b), masked where h is not above zero, into
 * `out`; its sum onto `sum`. `none` is a row of zeros. */
static void gather_line(const convolution *v, idx line, const REAL *dv, idx plane,
                        const REAL *restrict none, REAL *out, REAL *restrict sum) {
    const idx b = v->b, pairs = pairs_of(v);
    const REAL *restrict scale = v->f.scale, *restrict shift = v->f.shift;
    const REAL *source = v->source + line * v->width * v->lds;
    for (idx p = 0; p < pairs; p++) {
        const REAL *restrict v0 = dv + p * b, *restrict v1 = v0 + plane;
        const REAL *restrict v2 = v1 + plane, *restrict v3 = v2 + plane;
        const REAL *restrict before = p == 0 ? none : v3 - b;
        const REAL *restrict after = p + 1 == pairs ? none : v0 + b;
        const REAL *restrict x = source + 2 * p * v->lds;
        REAL *restrict o = out + 2 * p * b;
        for (idx j = 0; j < b; j++) {
            REAL h = x[j] * scale[j] + shift[j];
            REAL g = (v1[j] - v2[j]) + (v3[j] - before[j]);
            o[j] = g = h <= 0 ? 0 : g;
            sum[j] += g;
        }
        if (2 * p + 1 == v->width)
            continue;
        x += v->lds;
        o += b;
        for (idx j = 0; j < b; j++) {
            REAL h = x[j] * scale[j] + shift[j];
            REAL g = (v1[j] + v2[j]) + (after[j] - v0[j]);
            o[j] = g = h <= 0 ? 0 : g;
            sum[j] += g;
        }
    }
}

/* Back through it: dz (rows, b) = the masked gradient after the ReLU where given, else
 * d += scale dz; s and t; the weight's gradient where `gradient` is given, at `stride`.
 * dout (rows, k) dense.
 * Scratch of each thread: h (2 pairs + 2, b), v (4, tile_lines pairs, b), e (4, tile_lines
 * pairs, across k), du (4, across, k, b) where there is a gradient, partial (2b), sums (2b);
 * of all: product (b) double, index (b). */
void bn_relu_conv3_backward(idx threads, gemm_function *gemm, const convolution *v,
                            const REAL *dout, REAL *dz_out, REAL *d, idx ldd, double ratio,
                            idx tile_lines, double *sums, double *product, idx *index, REAL *h_all,
                            REAL *v_all, REAL *e_all, REAL *du_all, REAL *partial, REAL *gradient,
                            const idx *stride, REAL *s, REAL *t_out) {
    const idx lines = lines_of(v), width = v->width, b = v->b, k = v->k, pairs = pairs_of(v);
    const idx columns = across(v) * k, capacity = tile_lines * pairs;
    const REAL one = 1, zero = 0;
    const channels all = {b, NULL};
    const channels direct =
        gradient == NULL ? all : unstable_channels(b, &v->f, ratio, index);
#pragma omp parallel num_threads(threads)
    {
        transform_weight(v);
#pragma omp for schedule(static, 1)
        for (idx t = 0; t < threads; t++) {
            REAL *h = h_all + t * (2 * pairs + 2) * b;
            REAL *vt = v_all + t * 4 * capacity * b, *e = e_all + t * 4 * capacity * columns;
            REAL *du = gradient == NULL ? NULL : du_all + t * 4 * columns * b;
            REAL *restrict sum = partial + t * 2 * b;
            const REAL *restrict scale = v->f.scale;
            double *own = sums + t * 2 * b;
            idx first, last;
            share(lines, t, threads, &first, &last);
            memset(h, 0, (2 * pairs + 2) * b * sizeof(REAL));
            memset(own, 0, 2 * b * sizeof(double));
            memset(sum, 0, b * sizeof(REAL));
            if (du != NULL && first == last)
                memset(du, 0, 4 * columns * b * sizeof(REAL));
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
                        transform_line(v, line, h, vt + (line - top) * pairs * b, capacity * b);
                }
                for (idx i = 0; i < 4; i++) {
                    REAL *vi = vt + i * capacity * b, *ei = e + i * capacity * columns;
                    if (du != NULL)
                        gemm("N", "T", &b, &columns, &n, &one, vi, &b, ei, &columns,
                             top == first ? &zero : &one, du + i * columns * b, &b);
                    /* v is used up */
                    gemm("N", "N", &b, &n, &columns, &one, v->u + i * columns * b, &b, ei,
                         &columns, &zero, vi, &b);
                }
                for (idx line = top; line < bottom; line++) {
                    idx row = line * width;
                    REAL *dh = dz_out == NULL ? h + b : dz_out + row * b;
                    gather_line(v, line, vt + (line - top) * pairs * b, capacity * b, h, dh, sum);
                    for (idx i = 0; d != NULL && i < width; i++) {
                        const REAL *restrict gi = dh + i * b;
                        REAL *restrict di = d + (row + i) * ldd;
                        for (idx j = 0; j < b; j++)
                            di[j] += scale[j] * gi[j];
                    }
                    flush(b, sum, own);
                    add_second_sum(width, v->source + row * v->lds, v->lds, dh, b, &v->f, direct,
                                   sum + b, own + b);
                }
            }
        }
        if (gradient != NULL) {
            /* sum W dW = sum U dU: both sides of one linear map, as are dU and dW */
#pragma omp for schedule(static, 1)
            for (idx t = 0; t < threads; t++)
                add_parts(4 * columns, b, b * t / threads, b * (t + 1) / threads, v->u, du_all,
                          du_all + 4 * columns * b, threads - 1, product);
            gather_weight(v, du_all, gradient, stride);
        }
    }
    finish_sums(b, &v->f, direct, sums, threads, product, s, t_out);
}
