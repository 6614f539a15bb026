"""The dense block in linear memory: one feature buffer, one pass back.

Symbols (P positions = batch x pixels; all matrices are rows of channels-last tensors):

    X (P, C)    every feature of the block; layer l reads X[:, :c], c = C0 + l k, and
                writes X[:, c:c+k]; never concatenated, "the first c channels" is a view
                (with newest_first it reads the last c and writes the k before them)
    Z (P, c)    relu(norm1(X[:, :c])), never stored: the prologue of the next product
    Y (P, B)    the bottleneck, Z @ W1^T; rebuilt in backward unless save="bottlenecks"
    O (P, k)    conv3x3(relu(norm2(Y))), the layer's new features
    D (P, C)    gradient of X; initialised by whoever reads the whole block
    S, T (c,)   one norm's sums of dZ and dZ xhat: its dbeta and dgamma
    s, t (C,)   the deferred correction of D, summed over layers

NOTE [ shared statistics ]
Features never change once written, so the mean and variance of a channel do not
depend on which layer asks: they are reduced once, when the channel is written. Every
norm still has its own weight, bias and running buffers.

NOTE [ deferred correction ]
Batch norm's input gradient is a dZ - (a / P) (S + T xhat), a = gamma rstd. Only the
first term differs from position to position per layer; the other two are affine in x
with per-channel coefficients. They are summed over the layers in s and t and applied
once, when a channel's gradient is finished: just before its own layer's backward.
t is kept in units of 1/x (T rstd) because norms may differ in eps.

NOTE [ who owns the gradient buffer ]
A second full-size gradient buffer would cost half the floor of memory, and an
incoming gradient may not be changed in place. So the block and its only reader (the
tail: a transition, or the final norm and pooling) are one Function: the tail's
backward writes D, nobody else ever sees it. Without a tail (a block called alone)
the incoming gradient is copied.

NOTE [ which positions ]
Norms may share their statistics with other processes (see synchronization.py). Then mean
and var are merged over them where they are taken, and S, T, s, t summed where they correct
a gradient, whose P is that of all processes; everything else is this process's own.

NOTE [ saved tensors ]
Every tensor goes through save_for_backward: in-place changes are noticed, hooks such
as save_on_cpu see each buffer once, and nothing forms a reference cycle. X is saved
as the dense (P, C) matrix, the base of the view that is returned, because hooks need
not keep strides. The block never reads .grad and never updates parameters: DDP's
hooks on the parameters fire as for any other module.

Sources: Huang et al. 2017 (the network); Pleiss et al. 2017, "Memory-Efficient
Implementation of DenseNets" (shared storage and recomputation); Jung et al. 2019,
"Restructuring Batch Normalization to Accelerate CNN Training" (fusing norms into
neighbouring convolutions).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..autocast import without_autocast
from ..backends.base import Backend, Normalization, PendingNorm, Rebuild, accumulate_dtype
from ..backends.layout import channels_first, neighbour_stands_for, pieces
from ..backends.layout import rows as rows_of
from ..backends.norm_sums import ALL_CHANNELS, direct_channels, second_sum, zero_sums
from ..choices import SAVE_MODES, Save
from ..norms.buffers import NormSpec, normalization
from ..norms.synchronization import Batch


def check_save(save: str) -> Save:
    """``save`` if it is a mode, else ValueError naming the modes."""
    for mode in SAVE_MODES:
        if save == mode:
            return mode
    raise ValueError(f"save must be one of {', '.join(map(repr, SAVE_MODES))}, got {save!r}")


class LayerSpec(NamedTuple):
    """The scalars of one layer; ``norm2`` is None where there is no bottleneck."""

    norm1: NormSpec
    norm2: NormSpec | None
    drop_rate: float
    # 0 outside training
    drop_channels: bool = False
    # a channel of an image at a time instead of element by element


class StageSpec(NamedTuple):
    """The scalars of a block and its tail for one forward."""

    backend: Backend
    save: Save
    layers: tuple[LayerSpec, ...]
    tail: Literal["transition", "pool"] | None
    tail_norm: NormSpec | None
    compute_dtype: torch.dtype
    batch: Batch
    # which statistics are taken over
    keep: bool
    # False under no_grad: nothing will be asked for, nothing is kept
    seed: int
    # of this forward's dropout masks
    newest_first: bool = False
    # each layer's features stand before those it read, as after ``cat([new, x])``


class LayerTensors(NamedTuple):
    """One layer's parameters, and its norms' running statistics where those are frozen."""

    gamma1: Tensor
    beta1: Tensor
    frozen_mean1: Tensor | None
    frozen_var1: Tensor | None
    weight1: Tensor
    gamma2: Tensor | None
    beta2: Tensor | None
    frozen_mean2: Tensor | None
    frozen_var2: Tensor | None
    weight2: Tensor | None


class TailTensors(NamedTuple):
    gamma: Tensor
    beta: Tensor
    frozen_mean: Tensor | None
    frozen_var: Tensor | None
    weight: Tensor | None


# gradients are returned in the order in which tensors were given
_LAYER, _TAIL = len(LayerTensors._fields), len(TailTensors._fields)


class DenseStage(torch.autograd.Function):
    """A dense block and its tail.

    ``apply(spec, x, *tensors)``: x (N, C0, *spatial); tensors are the layers'
    :class:`LayerTensors`, then the tail's :class:`TailTensors`, flattened. Returns
    (output, mean, var, mean2, var2): the output is (N, C, *spatial) without a tail,
    (N, C', *spatial // 2) after a transition, (N, C) after global pooling; mean and
    var (C,) are the features' statistics and mean2, var2 the bottlenecks', one after
    the other, all non-differentiable.
    """

    @staticmethod
    def forward(ctx: Any, spec: StageSpec, x: Tensor, *tensors: Tensor | None) -> Any:
        # Autocast is resolved into spec.compute_dtype by the caller; inside, every cast is ours.
        with without_autocast(x.device):
            stage = _Stage(spec, x.shape, x.device, tensors)
            output = stage.forward(x)
        ctx.spec, ctx.input_shape, ctx.input_dtype = spec, x.shape, x.dtype
        if spec.keep:
            ctx.num_tensors, ctx.num_kept = len(tensors), len(stage.bottlenecks)
            kept = x if spec.save == "input" else stage.x
            # See NOTE [ saved tensors ].
            ctx.save_for_backward(kept, *stage.statistics(), *stage.bottlenecks, *tensors)
        ctx.mark_non_differentiable(*stage.statistics())
        ctx.set_materialize_grads(False)
        return output, *stage.statistics()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * (2 + ctx.num_tensors)
        kept, *rest = ctx.saved_tensors
        statistics, rest = rest[:4], rest[4:]
        bottlenecks, tensors = rest[: ctx.num_kept], rest[ctx.num_kept :]
        with without_autocast(kept.device):
            stage = _Stage(ctx.spec, ctx.input_shape, kept.device, tensors)
            stage.load(kept, statistics, bottlenecks)
            grad_x, grads = stage.backward(grad_output, ctx.needs_input_grad[1:])
        if grad_x is not None:
            grad_x = grad_x.to(ctx.input_dtype)
        return (None, grad_x, *grads)


class _Stage:
    """The algorithm: section 2 of the design, on matrices. Lives for one forward or backward."""

    def __init__(
        self,
        spec: StageSpec,
        input_shape: torch.Size,
        device: torch.device,
        tensors: Sequence[Tensor | None],
    ) -> None:
        self.spec, self.ops, self.device = spec, spec.backend, device
        self.images, self.c0, *self.spatial = input_shape
        self.positions = self.images * math.prod(self.spatial)
        self.layers = [
            LayerTensors(*tensors[i * _LAYER : (i + 1) * _LAYER])  # type: ignore[arg-type]
            for i in range(len(spec.layers))
        ]
        self.tail: TailTensors | None = None
        if spec.tail is not None:
            self.tail = TailTensors(*tensors[len(spec.layers) * _LAYER :])  # type: ignore[arg-type]
        self.k = _growth(self.layers[0]) if self.layers else 0
        self.width = self.c0 + len(self.layers) * self.k
        readers = [layer.norm1 for layer in spec.layers]
        readers += [] if spec.tail_norm is None else [spec.tail_norm]
        self._shared = any(norm.batch_statistics for norm in readers)
        self.dtype = spec.compute_dtype
        self.sum_dtype = accumulate_dtype(self.dtype)
        self.bottleneck = [
            0 if layer.weight2 is None else layer.weight1.shape[0] for layer in self.layers
        ]
        self.bottleneck_offset = [sum(self.bottleneck[:i]) for i in range(len(self.layers))]
        self.bottlenecks: list[Tensor] = []
        self._latest_norm1: tuple[int, Normalization] | None = None
        self.x: Tensor

    # ------------------------------------------------------------------ state

    def statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mean, self.var, self.mean2, self.var2

    def load(self, kept: Tensor, statistics: list[Tensor], bottlenecks: list[Tensor]) -> None:
        """Backward's view of what forward saved; rebuilds X where only the input was kept."""
        self.mean, self.var, self.mean2, self.var2 = statistics
        self.bottlenecks = bottlenecks
        if self.spec.save != "input":
            self.x = kept
            return
        self.x = self._buffer(kept)
        y = None
        for index in range(len(self.layers)):
            if self._neighbour_stands_for(index):
                continue
            y = self._bottleneck(index, y)
            self._new_features(index, y)

    def _buffer(self, x: Tensor) -> Tensor:
        """X with the input's channels filled in; x's own storage where no layer will write."""
        rows = rows_of(x.to(self.dtype))
        if not self.layers:
            return rows
        buffer = torch.empty((self.positions, self.width), dtype=self.dtype, device=self.device)
        buffer[:, self._read(0)] = rows
        return buffer

    # ---------------------------------------------------------------- forward

    def forward(self, x: Tensor) -> Tensor:
        self.x = self._buffer(x)
        self.mean = torch.zeros(self.width, dtype=self.sum_dtype, device=self.device)
        self.var = torch.zeros_like(self.mean)
        self.mean2 = self.mean.new_zeros(sum(self.bottleneck))
        self.var2 = torch.zeros_like(self.mean2)

        self._reduce(self._read(0))
        keep_y = self.spec.keep and self.spec.save == "bottlenecks"
        y = None
        for index in range(len(self.layers)):
            if self._neighbour_stands_for(index):
                if keep_y:
                    self.bottlenecks.append(self._bottleneck_like(index, None))
                continue
            y = self._bottleneck(index, None if keep_y else y, first_time=True)
            if keep_y and y is not None:
                self.bottlenecks.append(y)
            self._new_features(index, y)
            self._reduce(self._written(index))
        return self._tail_forward()

    def _neighbour_stands_for(self, index: int) -> bool:
        # without a bottleneck the convolution's steps, and its temporaries, go by each width
        has_bottleneck = self.bottleneck[index] > 0
        return has_bottleneck and neighbour_stands_for(self.x, index, len(self.layers))

    def _read(self, index: int) -> slice:
        """X's channels that layer ``index`` reads."""
        width = self.c0 + index * self.k
        return slice(self.width - width, self.width) if self.spec.newest_first else slice(0, width)

    def _written(self, index: int) -> slice:
        """X's channels that layer ``index`` writes."""
        read = self._read(index)
        if self.spec.newest_first:
            return slice(read.start - self.k, read.start)
        return slice(read.stop, read.stop + self.k)

    def _reduce(self, channels: slice) -> None:
        # See NOTE [ shared statistics ] and NOTE [ which positions ].
        if self._shared:
            own = self.ops.statistics(self.x[:, channels])
            self.mean[channels], self.var[channels] = self.spec.batch.merge(*own)

    def _norm1(self, index: int) -> Normalization:
        if self._latest_norm1 is not None and self._latest_norm1[0] == index:
            # backward asks twice: for the bottleneck made ahead, and for the layer's own pass
            return self._latest_norm1[1]
        layer, read = self.layers[index], self._read(index)
        mean, var = self.mean[read], self.var[read]
        mean, var = self._frozen(layer.frozen_mean1, layer.frozen_var1, mean, var)
        eps = self.spec.layers[index].norm1.eps
        norm = normalization(eps, layer.gamma1, layer.beta1, mean, var)
        self._latest_norm1 = index, norm
        return norm

    def _norm2(self, index: int) -> Normalization:
        layer, spec = self.layers[index], self.spec.layers[index].norm2
        assert spec is not None
        assert layer.gamma2 is not None
        assert layer.beta2 is not None
        own = self._bottleneck_channels(index)
        mean, var = self.mean2[own], self.var2[own]
        mean, var = self._frozen(layer.frozen_mean2, layer.frozen_var2, mean, var)
        return normalization(spec.eps, layer.gamma2, layer.beta2, mean, var)

    def _tail_norm(self) -> Normalization:
        assert self.tail is not None
        assert self.spec.tail_norm is not None
        tail = self.tail
        mean, var = self._frozen(tail.frozen_mean, tail.frozen_var, self.mean, self.var)
        return normalization(self.spec.tail_norm.eps, tail.gamma, tail.beta, mean, var)

    def _frozen(
        self, frozen_mean: Tensor | None, frozen_var: Tensor | None, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor]:
        if frozen_mean is None or frozen_var is None:
            return mean, var
        return frozen_mean.to(self.sum_dtype), frozen_var.to(self.sum_dtype)

    def _bottleneck_channels(self, index: int) -> slice:
        start = self.bottleneck_offset[index]
        return slice(start, start + self.bottleneck[index])

    def _bottleneck(
        self, index: int, out: Tensor | None, first_time: bool = False
    ) -> Tensor | None:
        """Y of layer ``index`` (P, B), into ``out`` if that fits; None without a bottleneck.

        ``first_time``: in forward proper, where norm2's statistics are still to be taken.
        """
        spec = self.spec.layers[index].norm2
        if spec is None:
            return None
        out = self._bottleneck_like(index, out)
        take = first_time and spec.batch_statistics
        x, norm1, weight1 = (
            self.x[:, self._read(index)],
            self._norm1(index),
            self._weight1(index),
        )
        statistics = self.ops.bn_relu_conv1x1(x, norm1, weight1, out, take)
        if statistics is not None:
            own = self._bottleneck_channels(index)
            self.mean2[own], self.var2[own] = self.spec.batch.merge(*statistics)
        return out

    def _bottleneck_like(self, index: int, y: Tensor | None) -> Tensor:
        """A (P, B) matrix for layer ``index``: ``y``'s storage again if it fits."""
        b = self.bottleneck[index]
        if y is not None and y.shape[1] == b:
            return y
        return self.x.new_empty((self.positions, b))

    def _weight1(self, index: int) -> Tensor:
        return self.layers[index].weight1.to(self.dtype).flatten(1)

    def _new_features(self, index: int, y: Tensor | None) -> None:
        """X[:, c:c+k] of layer ``index``."""
        source, norm, weight = self._convolution(index, y)
        new = self.x[:, self._written(index)]
        self.ops.bn_relu_conv3(source, norm, weight, (self.images, *self.spatial), new)
        mask = self._dropout_mask(index)
        if mask is not None:
            new *= mask

    def _convolution(self, index: int, y: Tensor | None) -> tuple[Tensor, Normalization, Tensor]:
        """What the layer's 3x3 convolution reads: (source, its norm, the weight)."""
        layer = self.layers[index]
        if y is None:
            source = self.x[:, self._read(index)]
            return source, self._norm1(index), layer.weight1.to(self.dtype)
        assert layer.weight2 is not None
        return y, self._norm2(index), layer.weight2.to(self.dtype)

    def _dropout_mask(self, index: int) -> Tensor | None:
        """(P, k) of 0 and 1/(1-p); the same at every call, so backward needs none stored."""
        spec = self.spec.layers[index]
        if spec.drop_rate == 0:
            return None
        shape = (self.images if spec.drop_channels else self.positions, self.k)
        mask = dropout_mask(self.spec.seed, index, shape, spec.drop_rate, self.dtype, self.device)
        if not spec.drop_channels:
            return mask
        return mask.repeat_interleave(math.prod(self.spatial), dim=0)

    # --------------------------------------------------------------- backward

    def backward(
        self, grad_output: Tensor, needs_grad: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        needs_x, needs = needs_grad[0], needs_grad[1:]
        grads: list[Tensor | None] = [None] * len(needs)
        self.s = torch.zeros_like(self.mean)
        self.t = torch.zeros_like(self.mean)
        offset = len(self.layers) * _LAYER
        d, grads[offset:] = self._tail_backward(grad_output, needs[offset:])

        # Below the first layer that needs anything there is nothing to compute.
        first = 0
        if not needs_x:
            wanted = [i for i in range(offset) if needs[i]]
            first = wanted[0] // _LAYER if wanted else len(self.layers)
        kept = self.spec.save == "bottlenecks"
        y = dz = do = None
        for index in reversed(range(first, len(self.layers))):
            own = slice(index * _LAYER, (index + 1) * _LAYER)
            if self._neighbour_stands_for(index):
                like = zip(self.layers[index], needs[own], strict=True)
                grads[own] = [None if p is None or not n else torch.empty_like(p) for p, n in like]
                continue
            do = self._finish(d, self._written(index), do)
            mask = self._dropout_mask(index)
            if mask is not None:
                do *= mask
            if not self.bottleneck[index]:
                grads[own] = self._plain_layer_backward(index, d, do, needs[own])
                continue
            if kept:
                y = self.bottlenecks[index]
            elif y is None:
                y = self._bottleneck(index, None)
            assert y is not None
            dz = self._bottleneck_like(index, dz)
            # a backend rebuilds from the first channels of a pass, so not where old ones stand last
            ahead = index > first and not kept and not self.spec.newest_first
            before = index - 1 if ahead else None
            grads[own], y = self._bottleneck_layer_backward(index, d, do, y, dz, needs[own], before)

        if not needs_x:
            return None, grads
        del y, dz, do  # before the gradient is made
        gradient = self._finish(d, self._read(0), None)
        return channels_first(gradient, self.images, self.spatial), grads

    def _finish(self, d: Tensor, channels: slice, out: Tensor | None) -> Tensor:
        """The gradient of some channels, complete: every reader of them has been here.

        In the storage of ``out``, the same of as many other channels, where given.
        """
        # See NOTE [ deferred correction ] and NOTE [ which positions ].
        if out is None:
            out = self.x.new_empty((self.positions, channels.stop - channels.start))
        s, t = self.s[channels], self.t[channels]
        if self._shared:
            s, t = self.spec.batch.sum(s, t)
        mean, count = self.mean[channels], float(self.spec.batch.count)
        self.ops.finish_gradient(d[:, channels], self.x[:, channels], mean, s, t, count, out)
        return out

    def _bottleneck_layer_backward(
        self,
        index: int,
        d: Tensor,
        do: Tensor,
        y: Tensor,
        dz: Tensor,
        needs: Sequence[bool],
        before: int | None,
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """One layer back: its gradients, and Y of the layer ``before`` if asked for.

        That Y depends on X alone, so it is made while X's rows are in the cache, in the
        storage of this layer's Y, which is used up by then.
        """
        spec = self.spec.layers[index]
        need = LayerTensors(*needs)  # type: ignore[arg-type]
        read = self._read(index)
        assert spec.norm2 is not None

        source, norm2, weight2 = self._convolution(index, y)
        shape = (self.images, *self.spatial)
        dw2, s2, t2 = self.ops.bn_relu_conv3_backward(
            source, norm2, weight2, do, shape, bool(need.weight2), dz, None
        )
        correction = None
        if spec.norm2.batch_statistics:
            correction = (*self.spec.batch.sum(s2, t2), float(self.spec.batch.count))
        norm1 = self._norm1(index)
        y_before, rebuild = None, None
        if before is not None and self.bottleneck[before]:
            y_before = self._bottleneck_like(before, y)
            rebuild = Rebuild(self._norm1(before), self._weight1(before), y_before)
        dw1, s1, t1 = self.ops.bn_relu_conv1x1_backward(
            self.x[:, read],
            norm1,
            self._weight1(index),
            dz,
            d[:, read],
            bool(need.weight1),
            PendingNorm(y, norm2, correction),
            rebuild,
        )
        self._defer(spec.norm1, norm1, s1, t1, read)
        found = LayerTensors(t1, s1, None, None, dw1, t2, s2, None, None, dw2)  # type: ignore[arg-type]
        return _as_gradients(found, self.layers[index], needs), y_before

    def _plain_layer_backward(
        self, index: int, d: Tensor, do: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        layer, spec = self.layers[index], self.spec.layers[index]
        read = self._read(index)
        source, norm1, weight = self._convolution(index, None)
        need = LayerTensors(*needs)  # type: ignore[arg-type]
        shape = (self.images, *self.spatial)
        dw, s, t = self.ops.bn_relu_conv3_backward(
            source, norm1, weight, do, shape, bool(need.weight1), None, d[:, read]
        )
        self._defer(spec.norm1, norm1, s, t, read)
        found = LayerTensors(t, s, None, None, dw, None, None, None, None, None)  # type: ignore[arg-type]
        return _as_gradients(found, layer, needs)

    def _defer(
        self, spec: NormSpec, norm: Normalization, s: Tensor, t: Tensor, read: slice
    ) -> None:
        """Add the correction of one reader of some channels; a frozen norm makes none."""
        if spec.batch_statistics:
            self.s[read].addcmul_(norm.scale, s)
            self.t[read].addcmul_(norm.scale * norm.rstd, t)

    # ------------------------------------------------------------------- tail

    def _tail_forward(self) -> Tensor:
        if self.tail is None:
            return channels_first(self.x, self.images, self.spatial)
        norm = self._tail_norm()
        if self.spec.tail == "pool":
            out = self.x.new_empty((self.images, self.width))
            self.ops.bn_relu_global_pool(self.x, norm, self.images, out)
            return out
        weight = self._tail_weight()
        pooled_spatial = [size // 2 for size in self.spatial]
        out = self.x.new_empty((self.images * math.prod(pooled_spatial), weight.shape[0]))
        for rows, pooled_rows, shape in self._pool_steps():
            # A 1x1 convolution commutes with average pooling: pool first, a quarter of the product.
            pooled = self.x.new_empty((pooled_rows.stop - pooled_rows.start, self.width))
            self.ops.bn_relu_avg_pool(self.x[rows], norm, shape, pooled)
            torch.mm(pooled, weight.t(), out=out[pooled_rows])
            del pooled
        return channels_first(out, self.images, pooled_spatial)

    def _tail_backward(
        self, grad_output: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """D as the whole block's reader leaves it, and the tail's parameter gradients."""
        # See NOTE [ who owns the gradient buffer ].
        d = torch.empty((self.positions, self.width), dtype=self.dtype, device=self.device)
        if self.tail is None:
            d.copy_(rows_of(grad_output))
            return d, []
        assert self.spec.tail_norm is not None
        norm = self._tail_norm()
        dw = None
        if self.spec.tail == "pool":
            s, t = self.ops.bn_relu_global_pool_backward(
                self.x, norm, self.images, grad_output.contiguous(), d
            )
        else:
            weight, dout = self._tail_weight(), rows_of(grad_output)
            need_weight = needs[TailTensors._fields.index("weight")]
            dw = torch.zeros_like(weight, dtype=self.sum_dtype) if need_weight else None
            from_product = need_weight and self.ops.sums_from_products(self.dtype)
            channels = direct_channels(norm) if from_product else ALL_CHANNELS
            s, t = zero_sums(norm, channels)
            for rows, pooled_rows, shape in self._pool_steps():
                dpooled = dout[pooled_rows] @ weight
                pooled = None if dw is None else torch.empty_like(dpooled)
                sums = self.ops.bn_relu_avg_pool_backward(
                    self.x[rows], norm, shape, dpooled, d[rows], pooled, channels
                )
                if dw is not None and pooled is not None:
                    dw += dout[pooled_rows].t() @ pooled
                del dpooled, pooled
                s += sums[0]
                t += sums[1]
            if dw is not None:
                t = second_sum(norm, (weight * dw).sum(0), s, t, channels)
        self._defer(self.spec.tail_norm, norm, s, t, ALL_CHANNELS)
        found = TailTensors(t, s, None, None, dw)
        return d, _as_gradients(found, self.tail, needs)

    def _tail_weight(self) -> Tensor:
        assert self.tail is not None
        assert self.tail.weight is not None
        return self.tail.weight.to(self.dtype).flatten(1)

    def _pool_steps(self) -> Iterator[tuple[slice, slice, tuple[int, ...]]]:
        """Slabs of whole images, or of pairs of an image's lines where images are large.

        Yields (rows, pooled rows, (n, *spatial) of the slab). Windows never cross a slab;
        an image's last odd line goes with its last slab.
        """
        lines, *rest = self.spatial
        line, pooled_line = math.prod(rest), math.prod(size // 2 for size in rest)
        pairs = lines // 2
        pair_bytes = 2 * line * self.width * self.x.element_size()
        # x, z, dz and d of a slab are in use together
        step = self.ops.images_per_step(self.images * pairs, 4 * pair_bytes)
        if step >= pairs:
            n = step // pairs
            for first in pieces(self.x, range(0, self.images, n)):
                last = min(self.images, first + n)
                yield (
                    slice(first * lines * line, last * lines * line),
                    slice(first * pairs * pooled_line, last * pairs * pooled_line),
                    (last - first, *self.spatial),
                )
            return
        for image in pieces(self.x, range(self.images)):
            for pair in pieces(self.x, range(0, pairs, step)):
                stop = min(pairs, pair + step)
                top, bottom = 2 * pair, lines if stop == pairs else 2 * stop
                yield (
                    slice((image * lines + top) * line, (image * lines + bottom) * line),
                    slice(
                        (image * pairs + pair) * pooled_line, (image * pairs + stop) * pooled_line
                    ),
                    (1, bottom - top, *rest),
                )


def dropout_mask(
    seed: int,
    layer: int,
    shape: tuple[int, int],
    p: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The (P, k) mask of one layer in one forward: 1/(1-p) with probability 1-p, else 0.

    A function of its arguments only (rows in (image, pixel) order), so that backward can
    make it again instead of keeping it.
    """
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device)
    # Knuth's multiplicative constant spreads consecutive layers over the seed space.
    generator.manual_seed((seed + (layer + 1) * 2654435761) % (1 << 63))
    mask = torch.empty(shape, dtype=dtype, device=device)
    return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)


def _growth(layer: LayerTensors) -> int:
    return (layer.weight1 if layer.weight2 is None else layer.weight2).shape[0]


def _as_gradients(
    found: NamedTuple, parameters: NamedTuple, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients shaped and typed like their parameters; None where none is needed."""
    return [
        gradient.to(parameter.dtype).view(parameter.shape) if needed else None
        for gradient, parameter, needed in zip(found, parameters, needs, strict=True)
    ]
