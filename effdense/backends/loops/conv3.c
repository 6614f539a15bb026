/* The 3-wide convolution with the BN-ReLU before it, and back through both.
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
        idx step = 1, at = row * apart(b);
        if (transposed)
            at = panel_column(b, padded, row, &step);
        REAL *restrict u = v->u + at;
        const REAL *w = v->weight;
        if (row < columns)
            w += tap_offset(v, stride, row / v->k, row % v->k);
        for (idx i = 0; i < (transposed ? b : whole_lines(b)); i++) {
            REAL w0 = 0, w1 = 0, w2 = 0;
            if (row < columns && i < b) {
                const REAL *wi = w + i * stride[1];
                w0 = wi[0], w1 = wi[stride[4]], w2 = wi[2 * stride[4]];
            }
            u[i * step] = w0;
            u[plane + i * step] = (w0 + w2 + w1) / 2;
            u[2 * plane + i * step] = (w0 + w2 - w1) / 2;
            u[3 * plane + i * step] = w2;
        }
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
                                   v->u + i * b * ldm, 0, 0, m + i * capacity * ldm, ldm, &NOTHING);
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
                                       du + i * columns * ldv, ldv, &NOTHING);
                    /* v is used up */
                    matrix_product(n, wide, columns, ei, columns, 1, v->u + i * columns * ldv, ldv,
                                   0, vi, ldv, &NOTHING);
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
