"""A batch's positions in slabs, each with the lines around it that a 3-wide convolution reads.

NOTE [ bottlenecks by slabs ]
In backward a layer's Y and its gradient, (P, B) each, stand beside X and D; in forward Y stands
beside X alone, which leaves the peak where it is. With save="slabs" neither exists as a whole.
Norm2's sums are over all positions and come before what they correct, so there are two rounds,
each of which makes Y and its gradient of one slab after the other, in the same memory. Of the
first stay the sums and the weight's gradient; in the second the gradient goes through norm2 and
the product. Each round calls the operations that a whole layer does.

A slab is some images where these are small, else some lines of one (a line is what one index of
the first spatial dimension holds) with one line more on either side. The second round has all of
these lines' gradients, and uses of what it makes the slab's own. In the first the gradient is zero
outside the slab's own lines: then each output position counts in one slab alone, with all that it
reads. What it gives the lines around is a part of their gradient, and sums are linear in that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

# Two more are computed with them.
_LEAST_LINES = 8


class Cut(NamedTuple):
    """One slab; see NOTE [ bottlenecks by slabs ]."""

    own: slice
    """Rows that no other has."""
    around: slice
    """Those and the lines beside them."""
    shape: tuple[int, ...]
    """(n, *spatial) of the latter."""

    @property
    def rows(self) -> int:
        return self.around.stop - self.around.start

    @property
    def inside(self) -> slice:
        """Its own rows, of those around."""
        first = self.own.start - self.around.start
        return slice(first, first + self.own.stop - self.own.start)


def cuts(shape: tuple[int, ...], step: int) -> Iterator[Cut]:
    """(n, *spatial) in slabs of about ``step`` lines."""
    images, lines, *rest = shape
    line = math.prod(rest)
    if step >= lines:
        step //= lines
        for first in range(0, images, step):
            last = min(images, first + step)
            rows = slice(first * lines * line, last * lines * line)
            yield Cut(rows, rows, (last - first, lines, *rest))
        return
    step = max(step, _LEAST_LINES)
    for top in range(0, images * lines, lines):
        for first in range(0, lines, step):
            last = min(lines, first + step)
            above, below = max(0, first - 1), min(lines, last + 1)
            yield Cut(
                slice((top + first) * line, (top + last) * line),
                slice((top + above) * line, (top + below) * line),
                (1, below - above, *rest),
            )
