/* The dense block's operations on CPUs: the Backend protocol's, on row tiles, in C.
 *
 * Compiled once for REAL = float and once for REAL = double by cpu_library.py, on the user's
 * machine. Operands, symbols and conventions are those of base.py: matrices of P rows with any
 * row stride (ld...), inner stride 1, and dense vectors of c channels.
 *
 * A thread takes a contiguous range of rows and keeps a tile's temporaries in its own cache,
 * where the products and all elementwise work on that tile happen. Sums over rows are taken in
 * REAL over a few rows and in double beyond, thread by thread, and the threads' sums are added
 * in the order of the threads: the same bits for the same number of threads. Nothing here
 * allocates: scratch is handed in, each thread's at a stride of its size.
 *
 * NaN passes through relu and its mask as in torch: comparisons are written so that they are
 * false for NaN in the branch that clears.
 */

#include "vectors.h"

#include "sums.h"

#include "products.h"

#include "norms.c"

#include "pooling.c"

#include "conv1x1.c"

#include "conv3.c"

#include "dropout.c"
