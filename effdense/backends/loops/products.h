/* Products of matrices.
 *
 * A product's innermost loop keeps ROWS rows by up to VECTORS vectors of the result in
 * registers. Its right operand is read vector by vector, from rows or from panels: columns
 * [first, first + width) of every row together, the panels one after the other, zeros behind
 * the last column. An element of the result is summed in the same order wherever it stands in a
 * tile: the same bits for any tiling. */

/* ROWS x VECTORS results, VECTORS operands and a factor: 28 of 32 registers, or all of 16. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define ROWS 8
#else
#define ROWS 4
#endif

enum { VECTORS = 3 };

/* What is fetched into the cache meanwhile, a line at a time so that nothing waits for it: of
 * ROWS rows so many lines each, of x and, where it is given, of d, which is to be written. */
typedef struct {
    const REAL *x, *d;
    idx ldx, ldd, lines;
} ahead;

static const ahead NOTHING = {0};

/* acc = a @ b, (rows, k) by (k, vectors): element (i, j) of a at a[i * row + j * step]. */
INLINE void multiply(const int rows, const int vectors, idx k, const REAL *a, idx row, idx step,
                     const REAL *b, idx ldb, const ahead *next, vector acc[ROWS][VECTORS]) {
    const idx fetches = ROWS * next->lines;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            acc[r][v] = (vector){0};
    for (idx i = 0; i < k; i++) {
        if (i < fetches) {
            __builtin_prefetch(next->x + i % ROWS * next->ldx + i / ROWS * LINE, 0, 2);
            if (next->d != NULL)
                __builtin_prefetch(next->d + i % ROWS * next->ldd + i / ROWS * LINE, 1, 2);
        }
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

/* Offset of a column in panels of k rows, whose rows are *step apart. */
static idx panel_column(idx k, idx columns, idx column, idx *step) {
    idx first = 0, width = panel_vectors(columns) * LANES;
    for (; column >= first + width; width = panel_vectors(columns - first) * LANES)
        first += width;
    *step = width;
    return k * first + column - first;
}

/* Thread t's part of a matrix (k, columns) in panels; element (i, j) at w[i * row + j * step]. */
static void pack(idx k, idx columns, const REAL *w, idx row, idx step, REAL *panels, idx t,
                 idx threads) {
    for (idx first = 0, width; first < columns; first += width) {
        width = panel_vectors(columns - first) * LANES;
        const idx valid = smaller(width, columns - first);
        for (idx i = k * t / threads; i < k * (t + 1) / threads; i++) {
            REAL *out = panels + k * first + i * width;
            for (idx j = 0; j < valid; j++)
                out[j] = w[i * row + (first + j) * step];
            memset(out + valid, 0, (width - valid) * sizeof(REAL));
        }
    }
}

/* Terms that are summed one after the other: sums of so many are added up, for accuracy. */
enum { BLOCK = 256 };

/* Some rows of one panel: out = or += a @ b. */
INLINE void product_rows(const int rows, const int vectors, idx k, const REAL *a, idx row,
                         idx step, const REAL *b, idx ldb, int add, REAL *out, idx ldo,
                         idx columns, const ahead *next) {
    ahead rest = *next;
    for (idx first = 0; first < k; first += BLOCK) {
        vector acc[ROWS][VECTORS];
        multiply(rows, vectors, smaller(BLOCK, k - first), a + first * step, row, step,
                 b + first * ldb, ldb, &rest, acc);
        rest.x += BLOCK / ROWS * LINE;
        rest.lines -= BLOCK / ROWS;
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                const idx lanes = v + 1 < vectors ? LANES : columns - v * LANES;
                REAL *o = out + r * ldo + v * LANES;
                store_lanes(o, add || first > 0 ? load_lanes(o, lanes) + acc[r][v] : acc[r][v],
                            lanes);
            }
    }
}

/* One panel: out (n, columns) = or += a (n, k) @ b. */
static void panel_product(idx n, idx columns, idx k, const REAL *a, idx row, idx step,
                          const REAL *b, idx ldb, int add, REAL *out, idx ldo,
                          const ahead *next) {
    const idx vectors = panel_vectors(columns);
    for (idx i = 0, rows; i < n; i += rows) {
        rows = rows_at_once(n - i);
        SPECIALIZED(product_rows, rows, vectors, k, a + i * row, row, step, b, ldb, add,
                    out + i * ldo, ldo, columns, next);
    }
}

/* out (n, columns) = or += a (n, k) @ b, b in panels or, with a row stride, in rows. */
static void matrix_product(idx n, idx columns, idx k, const REAL *a, idx row, idx step,
                           const REAL *b, idx ldb, int add, REAL *out, idx ldo,
                           const ahead *next) {
    for (idx first = 0, width; first < columns; first += width) {
        width = panel_vectors(columns - first) * LANES;
        panel_product(n, smaller(width, columns - first), k, a, row, step,
                      b + (ldb ? first : k * first), ldb ? ldb : width, add, out + first, ldo,
                      first == 0 ? next : &NOTHING);
    }
}
