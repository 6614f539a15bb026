"""The ImageNet stem: Conv-BN-ReLU-MaxPool, or what of it can be run as one.

NOTE [ what the stem keeps ]
The convolution's output is as large as the first block's features, and would be alive in
that block's backward, the peak of a step. It is made from three channels, by a hundredth of
a step's arithmetic. So where the first block would rather compute again than keep
("features", "slabs", "input") the stem keeps its images and convolves them again; else it keeps the
convolution's output. There is no whole gradient of that output: batch norm's sums are over
the maxima of the pooling, where alone its gradient isn't zero, so that each slab's gradient
can be finished when it is made, and go through the convolution at once. In forward the output
is pooled where it is made (slabs.py) and never is there as a whole; only backward, to which the
dense blocks have given back their memory by then, makes all of it; with "slabs" not even that,
and each slab is convolved twice there. A convolution that can't be
run without calling it is called, and BN-ReLU-MaxPool keeps its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..autocast import autocast_dtype, without_autocast
from ..backends.base import Backend, Normalization, Statistics, accumulate_dtype
from ..backends.empty import EmptyBackend
from ..backends.layout import channels_first, channels_last, like_parameter, readable, room
from ..backends.layout import rows as rows_of
from ..backends.select import get_backend
from ..backends.sharing import as_base
from ..choices import Save
from ..differentiation import Anchor, first_order
from ..norms.buffers import NormSpec, batch_of, read_norm, refuse_wider, update_running_statistics
from ..norms.synchronization import Batch
from ..recognition.objections import BATCH_NORMS, CONVOLUTIONS, has_hooks, module_objection
from ..recognition.reading import read_norm_relu
from ..tracing import outside_graphs, torch_function
from . import slabs
from .captured import run_captured
from .slabs import MAX_POOL, Moments, Pooling, Slab, Source


def run_stem(
    modules: Sequence[nn.Module], x: Tensor, backend: str, save: Save
) -> tuple[Tensor | None, int]:
    """[Conv-]BN-ReLU-MaxPool at the head of ``modules``, and how many they are; else (None, 1).

    ``save`` is what the dense block behind them keeps; see NOTE [ what the stem keeps ].
    """
    at = 1 if type(modules[0]) in CONVOLUTIONS else 0
    norm = modules[at] if len(modules) > at else None
    if not isinstance(norm, BATCH_NORMS) or has_hooks(norm):
        return None, 1
    return _run_stem(x, modules[:at], modules[at:], backend, save)


@torch_function(0)
@outside_graphs
def _run_stem(
    x: Tensor,
    convolution: Sequence[Any],
    modules: Sequence[nn.Module],
    backend: str,
    save: Save,
) -> tuple[Tensor | None, int]:
    found = read_norm_relu(modules)
    if isinstance(found, str) or len(modules) <= found[1]:
        return None, 1
    norm, used = found
    pool = modules[used]
    if type(pool) not in MAX_POOL or has_hooks(pool) or pool.return_indices:
        return None, 1
    channels = convolution[0].in_channels if convolution else norm.num_features
    if x.dim() != 3 + list(MAX_POOL).index(type(pool)) or x.shape[1] != channels:
        # torch's own error
        return None, 1
    if not convolution:
        run = partial(_norm_relu_max_pool, norm=norm, pool=pool, backend=backend)
        return run_captured(modules[: used + 1], x, run), used + 1
    (conv,) = convolution
    if _objection(conv, x) is not None:
        # called as it is; what follows it may still be run as one
        return None, 1
    run = partial(
        _conv_norm_relu_max_pool, conv=conv, norm=norm, pool=pool, backend=backend, save=save
    )
    return run_captured([conv, *modules[: used + 1]], x, run), used + 2


def _objection(conv: Any, x: Tensor) -> str | None:
    """Why a convolution can't be run without calling it, or None."""
    objection = module_objection("the convolution", conv)
    if objection is not None:
        return objection
    if conv.bias is not None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "it does more than multiply zero-padded windows"
    weight = conv.weight
    if x.dim() != weight.dim() or x.shape[1] != conv.in_channels or x.device != weight.device:
        return "its input doesn't fit"
    if _compute_dtype(x, weight) is None:
        return "its input is of another type"
    if x.numel() == 0 or min(_output_size(conv, x)) < 1:
        return "it has no output"
    return None


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """What a convolution of x computes in; None for types that torch wouldn't convolve."""
    autocast, double = autocast_dtype(x.device), torch.float64 in (x.dtype, weight.dtype)
    if autocast is not None and not double:
        # as torch's own operations: autocast leaves double alone
        return autocast if x.is_floating_point() else None
    return x.dtype if x.dtype == weight.dtype else None


def _output_size(conv: Any, x: Tensor) -> list[int]:
    sizes = zip(
        x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True
    )
    return [(n + 2 * pad - gap * (k - 1) - 1) // step + 1 for n, k, step, pad, gap in sizes]


def _norm_relu_max_pool(x: Tensor, norm: nn.Module, pool: Any, backend: str) -> Tensor:
    """MaxPool(relu(norm(x))) for x (N, C, *spatial); moves the norm's running statistics."""
    ops = get_backend(backend, x.device, x.dtype) if x.numel() else EmptyBackend()
    return _apply(ops, x, norm, pool, None, Anchor(x), x, None, None)


def _conv_norm_relu_max_pool(
    image: Tensor, conv: Any, norm: nn.Module, pool: Any, backend: str, save: Save
) -> Tensor:
    """MaxPool(relu(norm(conv(image)))) likewise, for a convolution without objection."""
    dtype = _compute_dtype(image, conv.weight)
    assert dtype is not None
    ops = get_backend(backend, image.device, dtype)
    again = save in ("features", "slabs", "input") or not torch.is_grad_enabled()
    shape = torch.Size((len(image), conv.out_channels, *_output_size(conv, image)))
    convolution = _Convolution(
        conv.stride, conv.padding, conv.dilation, conv.groups, shape, dtype, again, save != "slabs"
    )
    like = image.new_empty(()).expand(shape)
    return _apply(ops, like, norm, pool, convolution, Anchor(image), None, image, conv.weight)


def _apply(
    ops: Backend,
    like: Tensor,
    norm: nn.Module,
    pool: Any,
    convolution: _Convolution | None,
    anchor: Anchor,
    x: Tensor | None,
    image: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """Run the stem on x, which is of the shape and on the device of ``like``."""
    spec, tensors = read_norm(norm)
    refuse_wider(tensors, like.dtype if convolution is None else convolution.dtype)
    given = [None if t is None else readable(t) for t in tensors]
    batch = batch_of(like, [spec])
    output, mean, var = _Stem.apply(
        ops, batch, spec, pool, convolution, anchor, x, image, weight, *given
    )
    update_running_statistics([norm], [mean], [var], batch.count)
    return output


class _Stem(torch.autograd.Function):
    """BN-ReLU-MaxPool of x, or of what ``convolution`` made of ``image`` and ``weight``."""

    @staticmethod
    def forward(
        ctx: Any,
        ops: Backend,
        batch: Batch,
        spec: NormSpec,
        pool: Any,
        convolution: _Convolution | None,
        anchor: Anchor,
        x: Tensor | None,
        image: Tensor | None,
        weight: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        frozen_mean: Tensor | None,
        frozen_var: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(gamma.device):
            sign, kept = _sign(gamma), None
            if convolution is None:
                assert x is not None
                shape, dtype = x.shape, x.dtype
                source: Source = _Given(x, sign)
                if any(ctx.needs_input_grad):
                    kept = rows_of(x)
                    source = _Given(channels_first(kept, len(x), x.shape[2:]), sign)
            else:
                assert image is not None
                assert weight is not None
                shape, dtype = convolution.shape, convolution.dtype
                source = convolution.source(image, weight, sign)
            pooling = Pooling(ops, pool, shape, dtype)
            like = torch.empty_like(gamma, dtype=accumulate_dtype(dtype))
            moments = Moments(ops, like) if frozen_mean is None else None
            keep = None
            if convolution is not None and not convolution.again:
                keep = like.new_empty((shape[0], *shape[2:], shape[1]), dtype=dtype)
                kept = keep.flatten(0, -2)
            extremes = pooling.forward(source, moments, keep)
            if moments is not None:
                mean, var = moments.mean, moments.var
                batch.merge(Statistics(mean, var))
                if sign is not None:
                    mean *= sign
            else:
                assert frozen_mean is not None
                assert frozen_var is not None
                # copies: the buffers may be changed before backward
                mean = frozen_mean.to(like.dtype, copy=True)
                var = frozen_var.to(like.dtype, copy=True)
            output = torch.empty_like(extremes)
            norm = _signed(mean, var, gamma, beta, spec.eps, sign)
            ops.bn_relu(extremes.flatten(0, -2), norm, output.flatten(0, -2))
        ctx.ops, ctx.batch, ctx.spec, ctx.pool = ops, batch, spec, pool
        ctx.anchor = anchor
        ctx.convolution, ctx.shape, ctx.dtype = convolution, shape, dtype
        # See NOTE [ what the stem keeps ].
        again = convolution is not None and convolution.again
        kept_image = image if again or any(ctx.needs_input_grad[7:9]) else None
        signed = norm.mean, norm.gamma, sign
        ctx.save_for_backward(kept, kept_image, weight, gamma, beta, var, *signed)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return as_base(output.movedim(-1, 1)), mean, var

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 13
        rows, image, weight, gamma, beta, var, *signed, sign = ctx.saved_tensors
        need_x, need_image, need_weight = ctx.needs_input_grad[6:9]
        convolution, dx, dimage, dweight = ctx.convolution, None, None, None
        with without_autocast(gamma.device):
            pooling = Pooling(ctx.ops, ctx.pool, ctx.shape, ctx.dtype)
            images, _, *spatial = ctx.shape
            if rows is None:
                source = convolution.source(image, weight, sign)
                if convolution.whole:
                    source = convolution.again_from(pooling, source)
            else:
                x = channels_first(rows, images, spatial)
                source = _Given(x, sign if convolution is None else None)
            norm = Normalization(signed[0], var, signed[1], beta, ctx.spec.eps)
            s, t, pixels, masked = pooling.reduce(source, norm, grad_output)
            correction = None
            if ctx.spec.batch_statistics:
                correction = (*ctx.batch.sum(s, t), float(ctx.batch.count))
            if need_x or need_image or need_weight:
                parts = pooling.backward(source, norm, pixels, masked, correction)
                if convolution is None:
                    dx = channels_first(torch.empty_like(rows), images, spatial)
                    for slab, part in parts:
                        lines = slice(slab.first, slab.last)
                        dx[slab.images, :, lines] = _along(sign, part)
                        del part  # before the next slab's is made
                else:
                    needs = need_image, need_weight
                    found = convolution.source(image, weight, sign).backward(parts, needs)
                    dimage, dweight = found
            if sign is not None:
                t *= sign
        gradients = dx, dimage, dweight, t.to(gamma.dtype), s.to(beta.dtype)
        return *(None,) * 6, *gradients, None, None


def _sign(gamma: Tensor) -> Tensor | None:
    """1 or -1, either where a norm's weight is 0; None where all are known to be 1."""
    return None if slabs.all_positive(gamma) else torch.ones_like(gamma).copysign_(gamma)


def _signed(
    mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float, sign: Tensor | None
) -> Normalization:
    """The norm of x with the signs."""
    if sign is not None:
        mean, gamma = mean * sign, gamma.abs()
    return Normalization(mean, var, gamma, beta, eps)


def _along(sign: Tensor | None, x: Tensor) -> Tensor:
    """x (N, C, *spatial) times the signs (C,)."""
    return x if sign is None else x * sign.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


class _Given(NamedTuple):
    """x that is there, (N, C, *spatial); with the signs or to be given them."""

    x: Tensor
    sign: Tensor | None

    def lines(self, images: slice, first: int, last: int) -> Tensor:
        return _along(self.sign, self.x[images, :, first:last])


class _Convolution(NamedTuple):
    """A convolution without bias, and what it makes."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    shape: torch.Size
    """Of its output."""
    dtype: torch.dtype
    """It computes in."""
    again: bool
    """Instead of keeping its output."""
    whole: bool
    """And then all of it at once in backward."""

    def source(self, image: Tensor, weight: Tensor, sign: Tensor | None) -> _Convolved:
        signed = weight.to(self.dtype)
        if sign is not None:
            signed = signed * sign.to(self.dtype).view(-1, *[1] * (weight.dim() - 1))
        return _Convolved(self, image, weight, signed, sign)

    def again_from(self, pooling: Pooling, source: Source) -> Source:
        """All of its output, slab by slab as in forward."""
        parts = {
            (slab.images.start, slab.first, slab.last): source.lines(
                slab.images, slab.first, slab.last
            )
            for slab in pooling.slabs()
        }
        left_out = self.shape.numel() - sum(part.numel() for part in parts.values())
        if left_out and parts:
            # by a simulation
            parts[-1, -1, -1] = next(iter(parts.values())).new_empty(left_out)
        return _Parts(parts)


class _Parts(NamedTuple):
    """x by slabs, as which it is asked for too."""

    by_slab: dict[tuple[int, int, int], Tensor]

    def lines(self, images: slice, first: int, last: int) -> Tensor:
        return self.by_slab[images.start, first, last]


class _Convolved(NamedTuple):
    """The output of a convolution, made where it is asked for."""

    convolution: _Convolution
    image: Tensor
    weight: Tensor
    signed: Tensor
    """The weight, of which each output channel has its norm's sign."""
    sign: Tensor | None

    def lines(self, images: slice, first: int, last: int) -> Tensor:
        if first == last:
            shape = self.convolution.shape
            return room(self.signed, (len(self.image[images]), shape[1], 0, *shape[3:]))
        part, padding = self._read(images, first, last)
        return torch.ops.aten.convolution(part, self.signed, None, *self._geometry(padding))

    def backward(
        self, gradients: Iterable[tuple[Slab, Tensor]], needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of image and weight where needed."""
        dimage = torch.zeros_like(self.image) if needs[0] else None
        dweight = None
        for slab, dx in gradients:
            part, padding = self._read(slab.images, slab.first, slab.last)
            geometry = self._geometry(padding)
            found = torch.ops.aten.convolution_backward(
                dx, part, self.signed, None, *geometry, [*needs, False]
            )
            if dimage is not None:
                inside = self._inside(slab.first, slab.last)
                begin = 0 if slab.whole else inside.start - self._reach(slab.first, slab.last)[0]
                own = found[0][:, :, begin : begin + inside.stop - inside.start]
                dimage[slab.images, :, inside] += own
            if needs[1]:
                new = found[1].to(accumulate_dtype(dx.dtype))
                dweight = new if dweight is None else dweight.add_(new)
            del part, found, dx  # before the next slab's are made
        if dweight is None:
            return dimage, None
        if self.sign is not None:
            dweight *= self.sign.view(-1, *[1] * (dweight.dim() - 1))
        return dimage, like_parameter(dweight, self.weight)

    def _reach(self, first: int, last: int) -> tuple[int, int]:
        """The lines of the image that some of the output's read; outside there is padding."""
        stride, padding, dilation = (getattr(self.convolution, name)[0] for name in _SIZES)
        kernel = self.weight.shape[2]
        begin = first * stride - padding
        return begin, begin + (last - first - 1) * stride + dilation * (kernel - 1) + 1

    def _inside(self, first: int, last: int) -> slice:
        """Which of these are the image's; none where all is padding."""
        begin, end = self._reach(first, last)
        lines = self.image.shape[2]
        return slice(min(max(0, begin), lines, end), min(max(0, end), lines))

    def _read(self, images: slice, first: int, last: int) -> tuple[Tensor, int]:
        """What the convolution reads for some lines, and the padding that is left to it."""
        part, padding = self.image[images], self.convolution.padding[0]
        dtype = self.signed.dtype
        if (first, last) == (0, self.convolution.shape[2]):
            # its output takes its input's layout
            part = channels_last(part.to(dtype))
        else:
            padding = 0
            (begin, end), inside = self._reach(first, last), self._inside(first, last)
            image, above = part[:, :, inside], inside.start - begin
            part = room(image, (*part.shape[:2], end - begin, *part.shape[3:]), dtype)
            part[:, :, :above].zero_()
            part[:, :, above : above + image.shape[2]] = image
            part[:, :, above + image.shape[2] :].zero_()
        if part.shape[1] == 1 and part.dim() > 3:
            # one channel is in either order of memory; torch goes by its stride
            strides = list(part.stride())
            strides[1] = 1
            part = part.as_strided(part.shape, strides)
        return part, padding

    def _geometry(self, padding: int) -> tuple[Any, ...]:
        """Stride, padding, dilation, transposed, output padding, groups."""
        conv = self.convolution
        paddings = [padding, *conv.padding[1:]]
        return conv.stride, paddings, conv.dilation, False, [0] * len(paddings), conv.groups


_SIZES = ("stride", "padding", "dilation")
