/* BN-ReLU and average pooling, and back through both.
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
