/* Statistics, BN-ReLU alone, and gradients of both. */

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
            add_statistics(n, c, x + row * ldx, ldx, ROWS_AHEAD, own + 2 * c, own, own + c,
                           seen[t]);
            seen[t] += n;
        }
    }
    finish_statistics(c, sums, 4 * c, seen, threads, mean, var);
}

/* z = relu(x scale + shift) of a few rows; of the last vector, columns [c, filled) become 0. */
static void normalize_rectify(idx n, idx c, const REAL *x, idx ldx, const REAL *scale,
                              const REAL *shift, REAL *z, idx ldz, idx filled) {
    for (idx j = 0; j < c; j += LANES) {
        const idx lanes = c - j;
        const vector a = load_lanes(scale + j, lanes), b = load_lanes(shift + j, lanes);
        for (idx i = 0; i < n; i++)
            store_lanes(z + i * ldz + j, rectified(load_lanes(x + i * ldx + j, lanes) * a + b),
                        filled - j);
    }
}

void bn_relu(idx threads, idx rows, idx c, const REAL *x, idx ldx, const norm *f, REAL *out,
             idx ldo) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (idx t = 0; t < threads; t++) {
        idx first, last;
        share(rows, t, threads, &first, &last);
        for (idx row = first; row < last; row += ROWS_AHEAD)
            normalize_rectify(smaller(ROWS_AHEAD, last - row), c, x + row * ldx, ldx, f->scale,
                              f->shift, out + row * ldo, ldo, c);
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
        for (idx row = first; row < last; row += ROWS_AHEAD)
            for (idx j = 0; j < c; j += LANES) {
                const idx lanes = c - j;
                const vector a = load_lanes(slope + j, lanes), b = load_lanes(offset + j, lanes);
                for (idx i = row; i < smaller(row + ROWS_AHEAD, last); i++) {
                    const REAL *di = d + i * ldd + j, *xi = x + i * ldx + j;
                    vector v = load_lanes(di, lanes) + (load_lanes(xi, lanes) * a + b);
                    store_lanes(out + i * ldo + j, v, lanes);
                    /* a few channels of wide rows are far apart: no hardware fetches them ahead */
                    __builtin_prefetch(di + ROWS_AHEAD * ldd, 0, 2);
                    __builtin_prefetch(xi + ROWS_AHEAD * ldx, 0, 2);
                }
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
