"""BN-ReLU-MaxPool by slabs of lines, of a tensor that need not exist as a whole.

NOTE [ slabs ]
A line is what one index of the first spatial dimension holds: a line of pixels of an image, a
plane of a volume. Where images are small a slab is some of them, else some of the lines of one.
Every line of x is made in one slab, whose windows may reach into the lines of the one before;
the last one's may have no other.

NOTE [ pooling before the norm ]
scale x + shift, rounded, and the ReLU behind it never fall as x grows where gamma is positive,
and never grow where it is negative. So the largest of a window's z = relu(norm(x)) is that of
its largest x, or of its smallest, and pooling can be done before the statistics are known: of x
times the sign of gamma, its largest. All below is in terms of that x and of |gamma|; the source
of x gives it with its sign. Where gamma is 0 all of z is the same, and the window's first
position has its maximum, as in torch.

Known limitation: of positions whose z are equal though their x are not (rounded to the same
number by the norm, which happens in 16 bits) torch's pooling gives the gradient to the first,
this to the one whose x is largest, and among equal x to the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.base import Backend, Correction, Normalization, Statistics
from ..backends.layout import channels_first, room
from ..backends.layout import rows as rows_of

MAX_POOL: dict[type[nn.Module], Any] = {
    nn.MaxPool1d: F.max_pool1d,
    nn.MaxPool2d: F.max_pool2d,
    nn.MaxPool3d: F.max_pool3d,
}
_BACKWARD = (
    torch.ops.aten.max_pool2d_with_indices_backward,
    torch.ops.aten.max_pool3d_with_indices_backward,
)


class Slab(NamedTuple):
    """Images, and lines of them; see NOTE [ slabs ]."""

    images: slice
    first: int
    last: int
    """The lines of x that no slab before it has."""
    pooled: slice
    """The lines of the output that it makes."""
    whole: bool
    """All lines of its images."""


class Source(Protocol):
    """Where x (N, C, *spatial) comes from, with the sign of its norm's weight."""

    def lines(self, images: slice, first: int, last: int) -> Tensor:
        """Some lines of some images, in channels-last order."""
        ...


class Moments:
    """Mean and biased variance (C,) of what is added (Chan, Golub, LeVeque 1979)."""

    def __init__(self, ops: Backend, like: Tensor) -> None:
        self._ops, self.count = ops, 0
        self.mean, self.var = torch.empty_like(like), torch.empty_like(like)

    def add(self, rows: Tensor) -> None:
        if not len(rows):
            return
        if not self.count:
            self._ops.statistics(rows, Statistics(self.mean, self.var))
            self.count = len(rows)
            return
        own = Statistics(torch.empty_like(self.mean), torch.empty_like(self.var))
        self._ops.statistics(rows, own)
        count = self.count + len(rows)
        share = len(rows) / count
        distance = own.mean - self.mean
        self.mean += distance * share
        self.var += (own.var - self.var) * share
        self.var.addcmul_(distance, distance, value=share * (1 - share))
        self.count = count


class Window(NamedTuple):
    """A max-pooling along the lines."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    def first(self, pooled: int) -> int:
        """The first line that is read for a line of the output; below 0 it is padding."""
        return pooled * self.stride - self.padding

    def last(self, pooled: int) -> int:
        """Behind the last one."""
        return self.first(pooled) + self.dilation * (self.kernel - 1) + 1


class Group(NamedTuple):
    """Windows of a slab, and the lines that they read."""

    pooled: slice
    """The lines of the output that they make."""
    x: Tensor
    """The lines, (n, C, lines, *spatial)."""
    first: int
    """Which line of the image the first of them is; above it there is padding."""
    padding: int
    """That pooling has to add along the lines."""


class Pooling:
    """The pooling of tensors of one shape."""

    def __init__(self, ops: Backend, pool: Any, shape: torch.Size, dtype: torch.dtype) -> None:
        self.ops, self.pool, self.dtype = ops, pool, dtype
        self.images, self.channels, *self.spatial = shape
        dims = len(self.spatial)
        parts = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        sizes = [(n,) * dims if isinstance(n, int) else tuple(n) for n in parts]
        self.windows = [Window(*own) for own in zip(*sizes, strict=True)]
        pairs = zip(self.spatial, self.windows, strict=True)
        self.pooled = [_pooled_size(n, window, pool.ceil_mode) for n, window in pairs]
        self.lines, *rest = self.spatial
        self.line = math.prod(rest)
        self.window = self.windows[0]

    def slabs(self) -> Iterator[Slab]:
        """All of x, in order; see NOTE [ slabs ]."""
        line_bytes = self.line * self.channels * self.dtype.itemsize
        step = self.ops.images_per_step(self.images * self.lines, line_bytes)
        every = slice(0, self.pooled[0])
        if step >= self.lines:
            step //= self.lines
            for first in self.ops.pieces(range(0, self.images, step)):
                images = slice(first, min(self.images, first + step))
                yield Slab(images, 0, self.lines, every, True)
            return
        # of the lines that a slab's windows read most should be its own
        reach = self.window.last(0) - self.window.first(0)
        step = max(step, 2 * reach) // self.window.stride
        for image in self.ops.pieces(range(self.images)):
            for start in self.ops.pieces(range(0, self.pooled[0], step)):
                stop = min(self.pooled[0], start + step)
                # a simulation leaves slabs out
                first = 0 if start == 0 else self._made(start)
                last = self.lines if stop == self.pooled[0] else self._made(stop)
                yield Slab(slice(image, image + 1), first, last, slice(start, stop), False)

    def _made(self, pooled: int) -> int:
        """The lines of x that are made before those that only output from ``pooled`` on reads."""
        return max(0, min(self.lines, self.window.last(pooled - 1)))

    def forward(self, source: Source, moments: Moments | None, keep: Tensor | None) -> Tensor:
        """Windows' largest x, (N, *pooled, C).

        ``moments`` are given all of x, and ``keep`` (N, *spatial, C) gets it.
        """
        out: Tensor | None = None
        for slab, x, held in self._with_held(source):
            if moments is not None:
                moments.add(rows_of(x))
            if keep is not None:
                keep[slab.images, slab.first : slab.last] = x.movedim(1, -1)
            if out is None:
                out = self._pooled_like(x, self.images)
            for group in self._groups(slab, x, held):
                out[slab.images, group.pooled] = self._max_pool(group)[0].movedim(1, -1)
                del group  # it may be a view of x
            del x, held  # before the next slab's are made
        if out is None:
            if moments is not None:
                moments.mean.zero_()
                moments.var.zero_()
            out = self._pooled_like(source.lines(slice(0, 0), 0, self.lines), 0)
        return out

    def reduce(
        self, source: Source, norm: Normalization, grad_output: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """S and T; the pixel of each maximum, and its gradient before the ReLU, (N, *pooled, C).

        Pooling's gradient is zero but at the maxima, so sums over these are the whole sums.
        """
        s: Tensor | None = None
        t: Tensor | None = None
        shape = self.images, *self.pooled, self.channels
        # no image has 2^31 of them
        pixels = norm.mean.new_empty(shape, dtype=torch.int32)
        masked = grad_output.new_empty(shape)
        flat = None if all_positive(norm.gamma) else norm.gamma == 0
        for slab, x, held in self._with_held(source):
            maxima = self._pooled_like(x, len(x), slab.pooled)
            for group in self._groups(slab, x, held):
                found = self._max_pool(group)
                if flat is not None:
                    found = self._first_where(flat, group, *found)
                largest, where = (each.movedim(1, -1) for each in found)
                begin = group.pooled.start - slab.pooled.start
                maxima[:, begin : begin + largest.shape[1]] = largest
                pixels[slab.images, group.pooled] = where.add_(group.first * self.line)
                del group, found, largest, where
            grad = rows_of(grad_output[slab.images, :, slab.pooled])
            out = masked[slab.images, slab.pooled].flatten(0, -2)
            sums = self.ops.bn_relu_backward_reduce(maxima.flatten(0, -2), norm, grad, None, out)
            del x, held, maxima, grad, out  # before the next slab's are made
            if s is None or t is None:
                s, t = sums
                continue
            s += sums[0]
            t += sums[1]
        if s is None or t is None:  # of no image
            s, t = torch.zeros_like(norm.mean), torch.zeros_like(norm.mean)
        return s, t, pixels, masked

    def backward(
        self,
        source: Source,
        norm: Normalization,
        pixels: Tensor,
        masked: Tensor,
        correction: Correction | None,
    ) -> Iterator[tuple[Slab, Tensor]]:
        """The gradient of x, a slab at a time, (n, C, lines, *spatial)."""
        grad, found = masked.movedim(-1, 1), pixels.movedim(-1, 1)
        for slab in self.slabs():
            if slab.first == slab.last:
                continue
            dx = rows_of(self.scatter(slab, grad, found))
            x = rows_of(source.lines(slab.images, slab.first, slab.last))
            self.ops.bn_relu_backward_apply(x, norm, dx, correction)
            images = slab.images.stop - slab.images.start
            size = slab.last - slab.first, *self.spatial[1:]
            yield slab, channels_first(dx, images, size)
            del dx, x  # before the next slab's are made

    def _with_held(self, source: Source) -> Iterator[tuple[Slab, Tensor, Tensor | None]]:
        """Each slab, its lines of x, and those right above them that its windows read too."""
        held: Tensor | None = None
        for slab in self.slabs():
            if slab.first == 0:
                held = None
            x = source.lines(slab.images, slab.first, slab.last)
            yield slab, x, held
            if not slab.whole:
                above = 0 if held is None else held.shape[2]
                begin = self.window.first(slab.pooled.stop) - slab.first
                if begin < 0 and above:
                    assert held is not None
                    wanted = torch.cat([held[:, :, max(0, above + begin) :], x], 2)
                else:
                    wanted = x[:, :, max(0, begin) :]
                # without the rest's memory
                held = room(wanted, wanted.shape).copy_(wanted)
                del wanted
            del x  # before the next slab's is made

    def _groups(self, slab: Slab, x: Tensor, held: Tensor | None) -> Iterator[Group]:
        """The slab's windows: those that read its own lines alone read them where they are."""
        if slab.whole:
            yield Group(slab.pooled, x, 0, self.window.padding)
            return
        window, (start, stop) = self.window, (slab.pooled.start, slab.pooled.stop)
        inner = start
        while inner < stop and window.first(inner) < slab.first:
            inner += 1
        outer = stop
        while outer > inner and window.last(outer - 1) > slab.last:
            outer -= 1
        for begin, end in ((start, inner), (inner, outer), (outer, stop)):
            if begin == end:
                continue
            first, last = window.first(begin), window.last(end - 1)
            own = x[:, :, max(0, first - slab.first) : last - slab.first]
            parts = [own]
            if first < slab.first:
                wanted = slab.first - max(0, first)
                if held is not None and wanted:
                    parts.insert(0, held[:, :, -wanted:])
            outside = max(0, -first), max(0, last - self.lines)
            for n, at in zip(outside, (0, len(parts) + 1), strict=True):
                if n:
                    size = (*own.shape[:2], n, *own.shape[3:])
                    parts.insert(at, room(own, size).fill_(-math.inf))
            lines = own if len(parts) == 1 else torch.cat(parts, 2)
            del own, parts
            yield Group(slice(begin, end), lines, first, 0)

    def _max_pool(self, group: Group) -> tuple[Tensor, Tensor]:
        """Windows' largest x, and where in the group's lines, (n, C, *pooled)."""
        windows = [self.window._replace(padding=group.padding), *self.windows[1:]]
        kernel, stride, paddings, dilation = zip(*windows, strict=True)
        return MAX_POOL[type(self.pool)](
            group.x, kernel, stride, paddings, dilation, self.pool.ceil_mode, return_indices=True
        )

    def _first_where(
        self, flat: Tensor, group: Group, largest: Tensor, pixels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What ``_max_pool`` found, but windows' first pixels in the channels that are flat."""
        where = torch.zeros((), dtype=torch.int64, device=pixels.device)
        lines = (slice(0, n) for n in self.pooled[1:])
        offsets = (group.first, *[0] * len(self.spatial[1:]))
        dims = zip(self.windows, (group.pooled, *lines), self.spatial, offsets, strict=True)
        for window, outputs, size, offset in dims:
            first = torch.arange(outputs.start, outputs.stop, device=pixels.device)
            first = (first * window.stride - window.padding).clamp_(min=0) - offset
            where = where.unsqueeze(-1) * size + first
        x = group.x.flatten(2).index_select(2, where.flatten()).view(largest.shape)
        of_channel = flat.view(-1, *[1] * where.dim())
        # in place: none of the three is small
        torch.where(of_channel, x, largest, out=largest)
        return largest, torch.where(of_channel, where, pixels, out=pixels)

    def _pooled_like(self, x: Tensor, images: int, lines: slice | None = None) -> Tensor:
        """Room for the output of some images, or of some of its lines, (images, *pooled, C)."""
        high = self.pooled[0] if lines is None else lines.stop - lines.start
        return x.new_empty((images, high, *self.pooled[1:], self.channels))

    def scatter(self, slab: Slab, grad: Tensor, pixels: Tensor) -> Tensor:
        """The gradient of the slab's lines of x, (n, C, lines, *spatial).

        ``grad`` and ``pixels`` (N, C, *pooled) are those of all maxima.
        """
        if slab.whole:
            return self._spread(grad[slab.images], pixels[slab.images], 0, self.lines, self.window)
        # all windows that read one of these lines
        window, height = self.window, self.pooled[0]
        reach = window.last(0) - window.first(0)
        start = max(0, -(-(slab.first + window.padding - reach + 1) // window.stride))
        stop = min(height, (slab.last - 1 + window.padding) // window.stride + 1)
        first, last = window.first(start), window.last(stop - 1)
        part = slab.images, slice(None), slice(start, stop)
        found = self._spread(grad[part], pixels[part], first, last, window._replace(padding=0))
        # lines that no window reads
        above, below = max(0, first - slab.first), max(0, slab.last - last)
        if above or below:
            found = F.pad(found, [*[0, 0] * (len(self.spatial) - 1), above, below])
        begin = slab.first - first + above
        return found[:, :, begin : begin + slab.last - slab.first]

    def _spread(
        self, grad: Tensor, pixels: Tensor, first: int, last: int, window: Window
    ) -> Tensor:
        """The gradient of lines ``first`` to ``last``, which ``window`` reads and nothing else."""
        pixels = pixels.to(torch.int64)
        if first:
            pixels -= first * self.line
        kernel, stride, padding, dilation = map(
            list, zip(*[window, *self.windows[1:]], strict=True)
        )
        size = (*grad.shape[:2], last - first, *self.spatial[1:])
        x = room(grad, size)
        ceil = self.pool.ceil_mode
        if x.dim() > 3:
            backward = _BACKWARD[x.dim() - 4]
            return backward(grad, x, kernel, stride, padding, dilation, ceil, pixels)
        # as on images one pixel high
        windows = kernel, stride, padding, dilation
        both = [[high, *own] for high, own in zip((1, 1, 0, 1), windows, strict=True)]
        grad, x, pixels = grad.unsqueeze(2), x.unsqueeze(2), pixels.unsqueeze(2)
        return _BACKWARD[0](grad, x, *both, ceil, pixels).squeeze(2)


def all_positive(gamma: Tensor) -> bool:
    """Whether it is known that all of them are; a GPU would be waited for to say."""
    return gamma.device.type == "cpu" and bool(gamma.min() > 0)


def _pooled_size(size: int, window: Window, ceil: bool) -> int:
    """As torch counts windows: with ``ceil`` the last may reach out, but must begin inside."""
    left = size + 2 * window.padding - window.dilation * (window.kernel - 1) - 1
    found = (left + (window.stride - 1 if ceil else 0)) // window.stride + 1
    if ceil and (found - 1) * window.stride >= size + window.padding:
        found -= 1
    return found
