/* Dropout's mask by a counter-based generator: NOTE [ dropout masks ] in dropout.py. */

/* mask (n): value where an element's bits, as a signed number, are below threshold, else 0. */
void dropout_mask(idx threads, idx n, const int64_t *key, int64_t threshold, double value,
                  REAL *mask) {
    const uint64_t start = (uint64_t)*key;
    const REAL kept = (REAL)value;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (idx i = 0; i < n; i++) {
        uint64_t z = start + (uint64_t)(i + 1) * UINT64_C(0x9E3779B97F4A7C15);
        z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
        z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
        mask[i] = (int64_t)z < threshold ? kept : 0;
    }
}
