/* The 1x1 convolution with the BN-ReLU before it, and back through both. */

typedef struct {
    norm f;
    idx c, b;
    const REAL *weight; /* (b, c) */
    REAL *y;            /* (rows, b), dense */
    REAL *panels;       /* the weight or its transpose in panels: scratch */
} product;

/* Thread t's part of the weight's transpose in its panels. */
static void pack_transposed(const product *p, idx t, idx threads) {
    pack(p->c, p->b, p->weight, 1, p->c, p->panels, t, threads);
}

/* Some rows' relu(norm(x)) @ weight^T; z (ROWS, apart(c)): scratch. */
static void tile_product(idx n, const REAL *x, idx ldx, const product *p, REAL *z, REAL *y) {
    const idx ldz = apart(p->c);
    for (idx i = 0, rows; i < n; i += rows) {
        rows = rows_at_once(n - i);
        /* the lines of lanes that are masked out as well: a load waits for them too */
        const idx lines = whole_lines(p->c) / LINE + 1;
        const ahead next = {.x = x + (i + ROWS) * ldx, .ldx = ldx, .lines = lines};
        normalize_rectify(rows, p->c, x + i * ldx, ldx, p->f.scale, p->f.shift, z, ldz, ldz);
        matrix_product(rows, p->b, p->c, z, ldz, 1, p->panels, 0, 0, y + i * p->b, p->b, &next);
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
                    add_statistics(n, b, y, b, 0, own + 2 * b, own, own + b, row - first);
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
    idx ldx, ldd;
    vector s[VECTORS], t[VECTORS];
    int direct; /* whether any column's T is wanted */
} panel;

/* d += scale dz of some rows from row i on, dz = (dy @ w) [z > 0], and what it sums to. */
INLINE void backward_rows(const int rows, const int vectors, idx i, idx b, const REAL *dy,
                          const REAL *w, const ahead *next, panel *p) {
    const idx width = vectors * LANES, rest = p->columns - (vectors - 1) * LANES;
    vector acc[ROWS][VECTORS];
    multiply(rows, vectors, b, dy + i * b, b, 1, w, width, next, acc);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        const idx lanes = v + 1 < vectors ? LANES : rest;
        const vector scale = load_lanes(p->scale + v * LANES, lanes);
        vector s = p->s[v];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            REAL *d = p->d + (i + r) * p->ldd + v * LANES;
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
                              idx *flags, REAL *z_all, REAL *others, REAL *dw_out, REAL *s,
                              REAL *t_out) {
    const idx c = p->c, b = p->b;
    const REAL *slope = before == NULL ? NULL : corrected_slope(b, &before->n);
    const idx unstable = unstable_channels(c, &p->f, ratio, flags);
    const idx z_size = tile_rows * VECTORS * LINE;
    const idx room = again == NULL ? z_size : z_size + ROWS * apart(again->c);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
        for (idx t = 0; t < threads; t++) {
            pack(b, c, p->weight, c, 1, p->panels, t, threads);
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
                    /* the panel's right neighbour, from the last the next tile's first */
                    const idx right = j + width < c ? 0 : tile_rows;
                    const idx column = j + width < c ? j + width : 0;
                    for (idx i = j; unstable > 0 && i < j + q.columns; i++)
                        q.direct |= (int)flags[i];
                    normalize_rectify(n, q.columns, q.x, ldx, q.scale, p->f.shift + j, z, width,
                                      width);
                    panel_product(b, q.columns, n, dyt, 1, b, z, width, row > first, dw + j, c,
                                  &NOTHING);
                    for (idx i = 0, group; i < n; i += group) {
                        group = rows_at_once(n - i);
                        const ahead next = {x + (row + right + i) * ldx + column,
                                            d + (row + right + i) * ldd + column, ldx, ldd,
                                            VECTORS * LANES / LINE + 1};
                        SPECIALIZED(backward_rows, group, vectors, i, b, dyt, p->panels + b * j,
                                    &next, &q);
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
