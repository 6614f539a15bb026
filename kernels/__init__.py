"""Triton kernels for the dense block; imported as ``effdense.kernels`` and only so.

One operation a file; each file reads from top to bottom: the same thing in plain PyTorch,
the kernels, their launchers. Importing this package imports no Triton, its modules do.
Names inside kernels: ``p_*`` pointers, ``s_*`` row strides, ``i_*`` program indices,
``o_*`` offsets, ``m_*`` masks, ``b_*`` tiles of values, with shapes in brackets.

Traffic
-------
Elements of the storage type that one layer moves between memory and the chip, in units
of P (the rows): c is the layer's prefix, B its bottleneck, k its growth. "Minimum" is
what any method moves that keeps the features and rebuilds the bottleneck. Weights,
vectors and workspaces, which do not grow with P or do so by 1/block_p, are left out.

==============================  ==================  ===========  ====================
operation                       reads               writes       minimum
==============================  ==================  ===========  ====================
forward
  BN-ReLU-Conv1x1 + statistics  c                   B            c + B
  BN-ReLU before the 3x3        B                   B            0: no 3x3 kernel here
  statistics of new channels    k                   0            0: in the 3x3
backward
  finish gradient               2 k                 k            2 k: in the 3x3
  BN-ReLU-Conv1x1 (rebuild Y)   c                   B            c + B
  BN-ReLU before the 3x3        B                   B            0: no 3x3 kernel here
  BN-ReLU sums                  2 B                 0            0: in the 3x3
  BN-ReLU input gradient        2 B                 B            2 B + B
  BN-ReLU-Conv1x1 backward      c + B + c (D)       c (D)        c + B + c and c
==============================  ==================  ===========  ====================

So of the c-wide passes, which grow with depth, none is above the minimum: one read
forward; backward one read to rebuild Y, one read of X and one read and write of D. Two
assumptions. A bottleneck of more than 128 columns is cut into ceil(B / 128) tiles: the
forward product reads X once per tile (neighbours in time, so mostly from the L2 cache)
and the backward once for D and once more per tile for dW. And dY is counted once, although
every tile of channels reads it: the programs that share its rows run side by side.

Per block: a transition reads C and writes C / 4 forward (two dimensions), and backward
reads C + C / 4 and writes C (D, its only initialisation) and C / 4; global pooling reads C
forward, reads C and writes C backward. No operation stores a (P, c)-sized temporary.

Workspaces, float32, freed with the call: statistics 8 r c bytes for r row ranges; a
product's statistics 8 ceil(P / block_p) B; sums 8 r c; the product's backward
4 r (B + 2) c, where r <= programs / ceil(c / block_c) bounds it by
4 programs block_c (B + 2), twice the multiprocessors being ``programs``.
"""

__all__ = [
    "bn_relu",
    "bn_relu_conv1x1",
    "bn_relu_conv1x1_backward",
    "bn_relu_pool",
    "finish_gradient",
    "launch",
    "statistics",
]
