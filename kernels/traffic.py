"""What each operation reads and writes: the one table that documents and benchmarks read.

Importing this imports neither Triton nor torch. Elements of the storage type per row of P
(batch x pixels): c is the layer's prefix (or, of a block's tail, its whole width), B its
bottleneck, k its growth. Weights, vectors and workspaces, which do not grow with P or do so by
1/rows of a tile, are left out. What several programs of a launch read, they read at the same
time, all but the first of them from a cache: it counts once. "Least" is what any method moves
that keeps the features and rebuilds the bottleneck.

A test holds each row to the matrices that the operation hands to its kernels.

``python -m effdense.kernels.traffic`` prints the table as docs/traffic.md has it.
"""

from __future__ import annotations

from typing import NamedTuple

SYMBOLS = ("c", "B", "k")


class Width(NamedTuple):
    """A number of elements per row, as multiples of c, B and k."""

    c: float = 0
    B: float = 0
    k: float = 0

    def of(self, c: int, b: int, k: int) -> float:
        return self.c * c + self.B * b + self.k * k

    def __str__(self) -> str:
        terms = [
            symbol if factor == 1 else f"{factor:g} {symbol}"
            for symbol, factor in zip(SYMBOLS, self, strict=True)
            if factor
        ]
        return " + ".join(terms) or "0"


class Traffic(NamedTuple):
    """One operation of a layer or of a block's tail.

    ``products`` counts products of c by B for each row, ``convolutions`` those of B by k for
    each row and tap. ``remark`` says why ``least`` is less than what is moved, where it is.
    """

    name: str
    file: str
    reads: Width
    writes: Width
    least: Width
    products: int = 0
    convolutions: int = 0
    remark: str = ""

    @property
    def moved(self) -> Width:
        pairs = zip(self.reads, self.writes, strict=True)
        return Width(*(a + b for a, b in pairs))


_PRODUCT = Width(c=1), Width(B=1), Width(c=1, B=1), 1
FORWARD = (
    Traffic("BN-ReLU-Conv1x1, with norm2's statistics", "bn_relu_conv1x1.py", *_PRODUCT),
    Traffic(
        *("BN-ReLU-Conv3x3, with the new channels' statistics", "bn_relu_conv3.py"),
        *(Width(B=1), Width(k=1), Width(B=1, k=1)),
        convolutions=1,
    ),
)
REBUILD = Traffic("BN-ReLU-Conv1x1, to rebuild Y", "bn_relu_conv1x1.py", *_PRODUCT)
BACKWARD = (
    Traffic(
        *("BN-ReLU-Conv3x3 backward, input", "bn_relu_conv3_backward.py"),
        *(Width(B=1, k=2), Width(B=1), Width(B=2, k=2)),
        convolutions=1,
    ),
    Traffic(
        *("BN-ReLU-Conv3x3 backward, weight", "bn_relu_conv3_backward.py"),
        *(Width(B=1, k=2), Width(), Width()),
        convolutions=1,
        remark="one pass with the input's spilled registers at every tile tried",
    ),
    Traffic(
        *("BN-ReLU-Conv1x1 backward, D read and written", "bn_relu_conv1x1_backward.py"),
        *(Width(c=2, B=2), Width(c=1), Width(c=3, B=2)),
        products=2,
    ),
)
VENDOR_FORWARD = (
    Traffic("BN-ReLU before it", "bn_relu.py", Width(B=1), Width(B=1), Width()),
    Traffic(
        *("convolution", "the vendor's library", Width(B=1), Width(k=1), Width(B=1, k=1)),
        convolutions=1,
    ),
    Traffic("new channels put in place", "torch", Width(k=1), Width(k=1), Width()),
    Traffic("statistics of new channels", "statistics.py", Width(k=1), Width(), Width()),
)
VENDOR_BACKWARD = (
    Traffic("finish the gradient", "finish_gradient.py", Width(k=2), Width(k=1), Width(k=2)),
    Traffic("BN-ReLU before it", "bn_relu.py", Width(B=1), Width(B=1), Width()),
    Traffic(
        *("convolution backward, input", "the vendor's library"),
        *(Width(k=1), Width(B=1), Width(B=1)),
        convolutions=1,
    ),
    Traffic(
        *("convolution backward, weight", "the vendor's library"),
        *(Width(B=1, k=1), Width(), Width(B=1)),
        convolutions=1,
    ),
    Traffic("sums of norm2", "bn_relu.py", Width(B=2), Width(), Width()),
)
"""In place of the two convolution rows of FORWARD and BACKWARD, where the vendor's is chosen."""

MASK = Traffic("dropout's mask", "dropout.py", Width(), Width(k=1), Width(k=1))

POOL_FORWARD = Traffic("BN-ReLU-GlobalPool", "bn_relu_pool.py", Width(c=1), Width(), Width(c=1))
POOL_BACKWARD = Traffic(
    *("BN-ReLU-GlobalPool backward", "bn_relu_pool.py", Width(c=1), Width(c=1), Width(c=2)),
)
INPUT = Traffic(
    *("finish the input's gradient", "finish_gradient.py", Width(c=2), Width(c=1), Width(c=3)),
)


def transition(dimensions: int) -> tuple[Traffic, Traffic]:
    """Forward and backward of BN-ReLU-AvgPool; the product behind it is the vendor's."""
    part = 1 / 2**dimensions
    forward = Traffic(
        *("BN-ReLU-AvgPool", "bn_relu_pool.py"),
        *(Width(c=1), Width(c=part), Width(c=1 + part)),
    )
    backward = Traffic(
        *("BN-ReLU-AvgPool backward, pooled features rebuilt", "bn_relu_pool.py"),
        *(Width(c=1 + part), Width(c=1 + part), Width(c=2 + 2 * part)),
    )
    return forward, backward


def markdown() -> str:
    """The table of a layer and of a block's tail."""
    lines = ["| operation | file in `kernels/` | reads | writes | least |", "|---|---|---|---|---|"]
    parts = {
        "forward": FORWARD,
        "backward": (REBUILD, *BACKWARD),
        "the vendor's 3x3, where it is chosen: forward": VENDOR_FORWARD,
        "and backward": VENDOR_BACKWARD,
        "where anything is dropped: in forward, and again in backward": (MASK,),
        "a block's tail, c its width": (*transition(2), POOL_FORWARD, POOL_BACKWARD, INPUT),
    }
    for part, rows in parts.items():
        lines.append(f"| **{part}** | | | | |")
        for row in rows:
            file = f"`{row.file}`" if row.file.endswith(".py") else row.file
            least = f"{row.least}: {row.remark}" if row.remark else str(row.least)
            lines.append(f"| {row.name} | {file} | {row.reads} | {row.writes} | {least} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
