"""Triton kernels for the dense block; imported as ``effdense.kernels`` and only so.

One operation a file; each file reads from top to bottom: the same thing in plain PyTorch,
the kernels, their launchers. What these share, each upon the one before: ``layouts``, how
matrices lie; ``launch_table``, tile sizes; ``launch``, how kernels are started, and
``launch_search``, tile sizes by trial. Importing this package imports no Triton; the kernels,
``launch`` and ``launch_search`` do. ``traffic`` is what each operation reads and writes, the
table that docs/traffic.md shows and the rooflines of the benchmarks are made of.

Names inside kernels: ``p_*`` pointers, ``s_*`` row strides, ``i_*`` program indices,
``o_*`` offsets, ``m_*`` masks, ``b_*`` tiles of values, with shapes in brackets.

None of the c-wide passes, which grow with depth, is above the minimum: one read forward;
backward one read to rebuild Y, one read of X and one read and write of D. Two assumptions. A
bottleneck of more than 128 columns is cut into ceil(B / 128) tiles: the forward product reads
X once per tile (neighbours in time, so mostly from the L2 cache) and the backward once for D
and once more per tile for dW. And dZ2 and Y are counted once, although every tile of channels
reads them: the programs that share their rows run side by side. No operation stores a
(P, c)-sized temporary.

Workspaces, float32, freed with the call: statistics 8 r c bytes for r row ranges; a
product's statistics 8 ceil(P / block_p) B; sums 8 r c; the product's backward
4 r (B + 2) c, where r <= programs / ceil(c / block_c) bounds it by
4 programs block_c (B + 2), twice the multiprocessors being ``programs``.
"""

__all__ = [
    "bn_relu",
    "bn_relu_conv1x1",
    "bn_relu_conv1x1_backward",
    "bn_relu_conv3",
    "bn_relu_conv3_backward",
    "bn_relu_pool",
    "dropout",
    "finish_gradient",
    "launch",
    "launch_search",
    "launch_table",
    "layouts",
    "statistics",
    "traffic",
]
