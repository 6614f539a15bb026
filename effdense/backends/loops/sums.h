/* A norm, and the sums over rows that its statistics and gradients are made of. */

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

/* sum and square of (x - shift) over n rows of a vector: four rows at a time, added in the end.
 * Rows further on are fetched, if any are. */
INLINE void sum_rows(idx n, const REAL *x, idx ldx, idx further, idx lanes, vector shift,
                     vector *sum, vector *square) {
    vector s[4] = {{0}}, q[4] = {{0}};
    for (idx i = 0; i < n; i += 4)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            if (i + r < n) {
                vector v = load_lanes(x + (i + r) * ldx, lanes) - shift;
                if (further > 0)
                    __builtin_prefetch(x + (i + r + further) * ldx, 0, 2);
                s[r] += v;
                q[r] += v * v;
            }
    *sum = (s[0] + s[1]) + (s[2] + s[3]);
    *square = (q[0] + q[1]) + (q[2] + q[3]);
}

/* One tile into (mean, m2); `tile` (2c) double is scratch. The tile's mean is rounded first and
 * mended by what the centred rows sum to. Rows so much `further` on are fetched. */
static void add_statistics(idx n, idx c, const REAL *y, idx ldy, idx further, double *tile,
                           double *mean, double *m2, idx seen) {
    for (idx j = 0; j < c; j += LANES) {
        vector sum, rest, squares;
        sum_rows(n, y + j, ldy, further, c - j, (vector){0}, &sum, &squares);
        sum /= (REAL)n;
        sum_rows(n, y + j, ldy, 0, c - j, sum, &rest, &squares);
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
