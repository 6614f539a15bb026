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
as the dense (P, C) matrix, because hooks need not keep strides. Without a tail X itself
is returned, and users may write what they are given: they get a tensor of its own that
shares X's memory until somebody does. The block never reads .grad and never updates
parameters: DDP's hooks on the parameters fire as for any other module.

Sources: Huang et al. 2017 (the network); Pleiss et al. 2017, "Memory-Efficient
Implementation of DenseNets" (shared storage and recomputation); Jung et al. 2019,
"Restructuring Batch Normalization to Accelerate CNN Training" (fusing norms into
neighbouring convolutions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..backends.base import (
    Backend,
    Deferred,
    Normalization,
    PendingNorm,
    Rebuild,
    Statistics,
    Unfinished,
    accumulate_dtype,
)
from ..backends.dropout import layer_keys
from ..backends.layout import channels, channels_first, like_parameter, round_up
from ..backends.layout import rows as rows_of
from ..backends.sharing import as_base, copy_on_write
from ..backends.stepwise import Total
from ..choices import SAVE_MODES, Save
from ..differentiation import Anchor, first_order
from ..norms.buffers import NormSpec
from ..norms.synchronization import Batch
from .cuts import Cut, cuts
from .stepping import Step


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
    """0 outside training."""
    drop_channels: bool = False
    """A channel of an image at a time instead of element by element."""


class StageSpec(NamedTuple):
    """The scalars of a block and its tail for one forward."""

    backend: Backend
    save: Save
    layers: tuple[LayerSpec, ...]
    tail: Literal["transition", "pool"] | None
    tail_norm: NormSpec | None
    compute_dtype: torch.dtype
    batch: Batch
    """Which statistics are taken over."""
    keep: bool
    """False under no_grad: nothing will be asked for, nothing is kept."""
    anchor: Anchor
    """What x depends on."""
    newest_first: bool = False
    """Each layer's features stand before those it read, as after ``cat([new, x])``."""
    new_only: bool = False
    """Without a tail what the layers made is returned, without the block's input."""
    steps: tuple[Step | None, ...] | None = None
    """What is to be done at once with the gradients of the tensors, instead of returning them."""


class LayerTensors(NamedTuple):
    """One layer's parameters, and its norms' running statistics where those are frozen.

    Their gradients too: None where there is none. Without a bottleneck all of norm2's and
    weight2 are None.
    """

    gamma1: Tensor | None
    beta1: Tensor | None
    weight1: Tensor | None
    frozen_mean1: Tensor | None = None
    frozen_var1: Tensor | None = None
    gamma2: Tensor | None = None
    beta2: Tensor | None = None
    weight2: Tensor | None = None
    frozen_mean2: Tensor | None = None
    frozen_var2: Tensor | None = None
    bias: Tensor | None = None
    """Of the 3-wide convolution."""


class TailTensors(NamedTuple):
    """The tail's likewise; ``weight`` is None where it is global pooling."""

    gamma: Tensor | None
    beta: Tensor | None
    weight: Tensor | None = None
    frozen_mean: Tensor | None = None
    frozen_var: Tensor | None = None


# gradients are returned in the order in which tensors were given
_LAYER = len(LayerTensors._fields)
_WEIGHT1, _WEIGHT2, _BIAS = map(LayerTensors._fields.index, ("weight1", "weight2", "bias"))
_TAIL_WEIGHT = TailTensors._fields.index("weight")


class DenseStage(torch.autograd.Function):
    """A dense block and its tail.

    ``apply(spec, x, seed, *tensors)``: x (N, C0, *spatial); seed () is this forward's of
    dropout, None where nothing is dropped (backends/dropout.py); tensors are the layers'
    :class:`LayerTensors`, then the tail's :class:`TailTensors`, flattened. Returns
    (output, mean, var, mean2, var2): the output is (N, C, *spatial) without a tail (or
    (N, L k, *spatial) of new features only),
    (N, C', *spatial // 2) after a transition, (N, C) after global pooling; mean and
    var (C,) are the features' statistics and mean2, var2 the bottlenecks', one after
    the other, all non-differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any, spec: StageSpec, x: Tensor, seed: Tensor | None, *tensors: Tensor | None
    ) -> Any:
        # Autocast is resolved into spec.compute_dtype by the caller; inside, every cast is ours.
        with without_autocast(x.device):
            stage = _Stage(spec, x.shape, x.device, seed, tensors)
            output = stage.forward(x)
        ctx.spec, ctx.input_shape, ctx.input_dtype = spec, x.shape, x.dtype
        ctx.anchor = spec.anchor
        if spec.keep:
            ctx.num_tensors, ctx.num_kept = len(tensors), len(stage.bottlenecks)
            kept = x if spec.save == "input" else stage.buffer
            # See NOTE [ saved tensors ].
            ctx.save_for_backward(kept, seed, *stage.statistics(), *stage.bottlenecks, *tensors)
        ctx.mark_non_differentiable(*stage.statistics())
        ctx.set_materialize_grads(False)
        return output, *stage.statistics()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * (3 + ctx.num_tensors)
        kept, seed, *rest = ctx.saved_tensors
        statistics, rest = rest[:4], rest[4:]
        bottlenecks, tensors = rest[: ctx.num_kept], rest[ctx.num_kept :]
        with without_autocast(kept.device):
            stage = _Stage(ctx.spec, ctx.input_shape, kept.device, seed, tensors)
            stage.load(kept, statistics, bottlenecks)
            needs = ctx.needs_input_grad[1], *ctx.needs_input_grad[3:]
            grad_x, grads = stage.backward(grad_output, needs)
        if grad_x is not None:
            grad_x = grad_x.to(ctx.input_dtype)
        return (None, grad_x, None, *grads)


class _Stage:
    """The algorithm: section 2 of the design, on matrices. Lives for one forward or backward."""

    def __init__(
        self,
        spec: StageSpec,
        input_shape: torch.Size,
        device: torch.device,
        seed: Tensor | None,
        tensors: Sequence[Tensor | None],
    ) -> None:
        self.spec, self.ops, self.device = spec, spec.backend, device
        # of the layers' dropout masks
        self.keys = None if seed is None else layer_keys(seed, len(spec.layers))
        self.images, self.c0, *self.spatial = input_shape
        self.shape = (self.images, *self.spatial)
        self.positions = math.prod(self.shape)
        count = len(spec.layers)
        self.layers = [LayerTensors(*tensors[i * _LAYER : (i + 1) * _LAYER]) for i in range(count)]
        self.tail = None if spec.tail is None else TailTensors(*tensors[count * _LAYER :])
        self.k = _growth(self.layers[0]) if self.layers else 0
        self.width = self.c0 + count * self.k
        readers = [layer.norm1 for layer in spec.layers]
        readers += [] if spec.tail_norm is None else [spec.tail_norm]
        self._shared = any(norm.batch_statistics for norm in readers)
        self.dtype = spec.compute_dtype
        self.sum_dtype = accumulate_dtype(self.dtype)
        self.bottleneck = [
            0 if layer.weight2 is None else _given(layer.weight1).shape[0] for layer in self.layers
        ]
        self.bottlenecks: list[Tensor] = []
        self._latest_norm1: tuple[int, Normalization] | None = None
        self.buffer: Tensor
        # X is its first ``width`` columns

    # ------------------------------------------------------------------ state

    def statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mean, self.var, self.mean2, self.var2

    def load(self, kept: Tensor, statistics: list[Tensor], bottlenecks: list[Tensor]) -> None:
        """Backward's view of what forward saved; rebuilds X where only the input was kept."""
        self._use_statistics(*statistics)
        self.bottlenecks = bottlenecks
        if self.spec.save != "input":
            self._use(kept)
            return
        self._use(self._filled(kept))
        y = None
        for index in self._each(range(len(self.layers)), leave_out=lambda _: None):
            y = self._bottleneck(index, y)
            self._new_features(index, y)

    def _use(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.x = buffer[:, : self.width]
        self._x_by_layer = self._by_layer(self.x)

    def _use_statistics(self, mean: Tensor, var: Tensor, mean2: Tensor, var2: Tensor) -> None:
        self.mean, self.var, self.mean2, self.var2 = mean, var, mean2, var2
        self._by_layer_statistics = list(map(Statistics, self._by_layer(mean), self._by_layer(var)))
        both = (vector.split_with_sizes(self.bottleneck) for vector in (mean2, var2))
        self._bottleneck_statistics = list(map(Statistics, *both))

    def _empty_rows(self, width: int) -> Tensor:
        """Room for (P, width), and columns that nobody reads where the backend wants some."""
        columns = round_up(width, self.ops.row_multiple)
        return torch.empty((self.positions, columns), dtype=self.dtype, device=self.device)

    def _filled(self, x: Tensor) -> Tensor:
        """Room for X with the input's channels; x's own storage where no layer will write."""
        rows = rows_of(x.to(self.dtype))
        if not self.layers:
            return rows
        buffer = self._empty_rows(self.width)
        buffer[:, self._read(0)] = rows
        return buffer

    def _each(self, indices: Iterable[int], leave_out: Callable[[int], None]) -> Iterable[int]:
        """The layers in this order; a simulation has ``leave_out`` stand for some of them."""
        # without a bottleneck the convolution's steps, and its temporaries, go by each width
        if not all(self.bottleneck):
            return indices
        return self.ops.layers(indices, len(self.layers), leave_out)

    # ---------------------------------------------------------------- forward

    def forward(self, x: Tensor) -> Tensor:
        self._use(self._filled(x))
        mean = torch.zeros(self.width, dtype=self.sum_dtype, device=self.device)
        mean2 = mean.new_zeros(sum(self.bottleneck))
        vectors = mean, torch.zeros_like(mean), mean2, torch.zeros_like(mean2)
        self._use_statistics(*vectors)

        # See NOTE [ shared statistics ].
        if self._shared:
            read = self._read(0)
            own = Statistics(_part(self.mean, read), _part(self.var, read))
            self.ops.statistics(_part(self.x, read), own)
            self.spec.batch.merge(own)
        keep_y = self.spec.keep and self.spec.save == "bottlenecks"
        y = None

        def leave_out(index: int) -> None:
            if keep_y:
                self.bottlenecks.append(self._bottleneck_like(index, None))

        for index in self._each(range(len(self.layers)), leave_out):
            y = self._bottleneck(index, None if keep_y else y, first_time=True)
            if keep_y and y is not None:
                self.bottlenecks.append(y)
            self._new_features(index, y, first_time=True)
        return self._tail_forward()

    def _read(self, index: int) -> slice:
        """X's channels that layer ``index`` reads."""
        return channels(0, self.c0 + index * self.k, self.width, self.spec.newest_first)

    def _by_layer(self, x: Tensor) -> Sequence[Tensor]:
        """What each layer writes, of a tensor whose last dimension is X's channels."""
        # one call for all layers: each costs the host as much as an operation
        sizes = [self.c0, *[self.k] * len(self.layers)]
        if self.spec.newest_first:
            return x.split_with_sizes(sizes[::-1], -1)[-2::-1]
        return x.split_with_sizes(sizes, -1)[1:]

    def _returned(self) -> slice:
        """X's channels that are returned without a tail."""
        first = self.c0 if self.spec.new_only else 0
        return channels(first, self.width, self.width, self.spec.newest_first)

    def _norm1(self, index: int) -> Normalization:
        if self._latest_norm1 is not None and self._latest_norm1[0] == index:
            # backward asks twice: for the bottleneck made ahead, and for the layer's own pass
            return self._latest_norm1[1]
        layer, read = self.layers[index], self._read(index)
        statistics = Statistics(_part(self.mean, read), _part(self.var, read))
        frozen = layer.frozen_mean1, layer.frozen_var1
        eps = self.spec.layers[index].norm1.eps
        norm = self._normalization(statistics, frozen, layer.gamma1, layer.beta1, eps)
        self._latest_norm1 = index, norm
        return norm

    def _norm2(self, index: int) -> Normalization:
        layer, spec = self.layers[index], _given(self.spec.layers[index].norm2)
        statistics = self._bottleneck_statistics[index]
        frozen = layer.frozen_mean2, layer.frozen_var2
        return self._normalization(statistics, frozen, layer.gamma2, layer.beta2, spec.eps)

    def _tail_norm(self) -> Normalization:
        tail, spec = _given(self.tail), _given(self.spec.tail_norm)
        statistics = Statistics(self.mean, self.var)
        frozen = tail.frozen_mean, tail.frozen_var
        return self._normalization(statistics, frozen, tail.gamma, tail.beta, spec.eps)

    def _normalization(
        self,
        statistics: Statistics,
        frozen: tuple[Tensor | None, Tensor | None],
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
    ) -> Normalization:
        mean, var = statistics
        if frozen[0] is not None and frozen[1] is not None:
            mean, var = frozen[0].to(self.sum_dtype), frozen[1].to(self.sum_dtype)
        return Normalization(mean, var, _given(gamma), _given(beta), eps)

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
        own = self._bottleneck_statistics[index] if take else None
        x, norm1 = _part(self.x, self._read(index)), self._norm1(index)
        self.ops.bn_relu_conv1x1(x, norm1, self._weight1(index), out, own)
        if own is not None:
            # See NOTE [ which positions ].
            self.spec.batch.merge(own)
        return out

    def _bottleneck_like(self, index: int, y: Tensor | None) -> Tensor:
        """A (P, B) matrix for layer ``index``: ``y``'s storage again if it fits."""
        b = self.bottleneck[index]
        if y is not None and y.shape[1] == b:
            return y
        return self.x.new_empty((self.positions, b))

    def _weight1(self, index: int) -> Tensor:
        return _given(self.layers[index].weight1).flatten(1)

    def _new_features(self, index: int, y: Tensor | None, first_time: bool = False) -> None:
        """X[:, c:c+k] of layer ``index``; in forward proper, their statistics too."""
        source, norm, weight = self._convolution(index, y)
        own = self._by_layer_statistics[index] if first_time and self._shared else None
        new, mask, bias = (
            self._x_by_layer[index],
            self._dropout_mask(index),
            self.layers[index].bias,
        )
        if bias is None:
            self.ops.bn_relu_conv3(source, norm, weight, self.shape, new, mask, own)
        else:
            self.ops.bn_relu_conv3(source, norm, weight, self.shape, new, None, None)
            new += bias
            if mask is not None:
                new *= mask
            if own is not None:
                self.ops.statistics(new, own)
        if own is not None:
            # See NOTE [ which positions ].
            self.spec.batch.merge(own)

    def _convolution(self, index: int, y: Tensor | None) -> tuple[Tensor, Normalization, Tensor]:
        """What the layer's 3x3 convolution reads: (source, its norm, the weight)."""
        layer = self.layers[index]
        if y is None:
            return _part(self.x, self._read(index)), self._norm1(index), _given(layer.weight1)
        return y, self._norm2(index), _given(layer.weight2)

    def _dropout_mask(self, index: int) -> Tensor | None:
        """(P, k) of 0 and 1/(1-p); the same at every call, so backward needs none stored."""
        spec = self.spec.layers[index]
        if spec.drop_rate == 0:
            return None
        mask = self.x.new_empty((self.images if spec.drop_channels else self.positions, self.k))
        self.ops.dropout_mask(_given(self.keys)[index], spec.drop_rate, mask)
        if not spec.drop_channels:
            return mask
        return mask.repeat_interleave(math.prod(self.spatial), dim=0)

    # --------------------------------------------------------------- backward

    def backward(
        self, grad_output: Tensor, needs_grad: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        needs_x, needs = needs_grad[0], needs_grad[1:]
        grads: list[Tensor | None] = [None] * len(needs)
        self._steps = _due(self.spec.steps)
        # See NOTE [ deferred correction ].
        self.s = torch.zeros_like(self.mean)
        self.t = torch.zeros_like(self.mean)
        self._st_by_layer = list(zip(self._by_layer(self.s), self._by_layer(self.t), strict=True))
        offset = len(self.layers) * _LAYER
        d, grads[offset:] = self._tail_backward(grad_output, needs[offset:])
        self._d_by_layer = self._by_layer(d)
        self._step(slice(offset, len(grads)), grads)

        # Below the first layer that needs anything there is nothing to compute.
        first = 0
        if not needs_x:
            wanted = [i for i in range(offset) if needs[i]]
            first = wanted[0] // _LAYER if wanted else len(self.layers)

        def own(index: int) -> slice:
            return slice(index * _LAYER, (index + 1) * _LAYER)

        def leave_out(index: int) -> None:
            steps = self._steps or [None] * len(needs)
            like = zip(self.layers[index], needs[own(index)], steps[own(index)], strict=True)
            # a step would have used them up
            grads[own(index)] = [
                torch.empty_like(p) if p is not None and n and step is None else None
                for p, n, step in like
            ]

        kept = self.spec.save == "bottlenecks"
        y = dz = None
        self._scratch: Tensor | None = None
        for index in self._each(reversed(range(first, len(self.layers))), leave_out):
            need = needs[own(index)]
            slabs = self._cuts(index)
            if not self.bottleneck[index]:
                found = self._plain_layer_backward(index, d, need)
            elif len(slabs) > 1:
                y = dz = None
                found = self._bottleneck_layer_backward_by_slabs(index, d, slabs, need)
            else:
                if kept:
                    y = self.bottlenecks[index]
                elif y is None:
                    y = self._bottleneck(index, None)
                dz = self._bottleneck_like(index, dz)
                # a backend rebuilds from the first channels of a pass, so not where old ones
                # stand last
                ahead = index > first and not kept and not self.spec.newest_first
                before = index - 1 if ahead else None
                found, y = self._bottleneck_layer_backward(index, d, _given(y), dz, need, before)
            grads[own(index)] = _as_gradients(found, self.layers[index], need)
            del found
            self._step(own(index), grads)

        if not needs_x:
            return None, grads
        return channels_first(self._input_gradient(d), self.images, self.spatial), grads

    def _step(self, own: slice, grads: list[Tensor | None]) -> None:
        """Use up those gradients that nobody is to get; see stepping.py."""
        if self._steps is None:
            return
        for i in range(*own.indices(len(grads))):
            step, gradient = self._steps[i], grads[i]
            if step is not None and gradient is not None:
                step(gradient)
                grads[i] = None

    def _input_gradient(self, d: Tensor) -> Tensor:
        """Of the block's input, (P, C0)."""
        gradient = self._empty_rows(self.c0)
        # columns behind that nobody reads are written too, so that accesses stay wide
        read = self._read(0)
        if not self.spec.newest_first:
            read = slice(0, min(gradient.shape[1], self.width))
        s, t = self._complete(_part(self.s, read), _part(self.t, read))
        mean, count = _part(self.mean, read), float(self.spec.batch.count)
        out = gradient[:, : read.stop - read.start]
        self.ops.finish_gradient(_part(d, read), _part(self.x, read), mean, s, t, count, out)
        return gradient[:, : self.c0]

    def _complete(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """s and t of channels of which every reader has been here."""
        # See NOTE [ which positions ].
        return self.spec.batch.sum(s, t) if self._shared else (s, t)

    def _gradient(self, index: int) -> Unfinished:
        """Of the channels that layer ``index`` wrote."""
        s, t = self._complete(*self._st_by_layer[index])
        return Unfinished(
            d=self._d_by_layer[index],
            x=self._x_by_layer[index],
            mean=self._by_layer_statistics[index].mean,
            s=s,
            t=t,
            count=float(self.spec.batch.count),
            mask=self._dropout_mask(index),
            scratch=self._finished_like,
        )

    def _bias_gradient(self, gradient: Unfinished, need: Sequence[bool]) -> Tensor | None:
        return gradient.finish(self.ops).sum(0, dtype=self.sum_dtype) if need[_BIAS] else None

    def _finished_like(self) -> Tensor:
        if self._scratch is None:
            self._scratch = self.x.new_empty((self.positions, self.k))
        return self._scratch

    def _bottleneck_layer_backward(
        self,
        index: int,
        d: Tensor,
        y: Tensor,
        dz: Tensor,
        need: Sequence[bool],
        before: int | None,
    ) -> tuple[LayerTensors, Tensor | None]:
        """One layer back: its gradients, and Y of the layer ``before`` if asked for.

        That Y depends on X alone, so it is made while X's rows are in the cache, in the
        storage of this layer's Y, which is used up by then.
        """
        spec, read = self.spec.layers[index], self._read(index)
        source, norm2, weight2 = self._convolution(index, y)
        gradient = self._gradient(index)
        dbias = self._bias_gradient(gradient, need)
        dw2, s2, t2 = self.ops.bn_relu_conv3_backward(
            source, norm2, weight2, gradient, self.shape, need[_WEIGHT2], dz, None
        )
        correction = None
        if _given(spec.norm2).batch_statistics:
            correction = (*self.spec.batch.sum(s2, t2), float(self.spec.batch.count))
        norm1 = self._norm1(index)
        y_before, rebuild = None, None
        if before is not None and self.bottleneck[before]:
            y_before = self._bottleneck_like(before, y)
            rebuild = Rebuild(self._norm1(before), self._weight1(before), y_before)
        dw1, s1, t1 = self.ops.bn_relu_conv1x1_backward(
            _part(self.x, read),
            norm1,
            self._weight1(index),
            dz,
            _part(d, read),
            need[_WEIGHT1],
            PendingNorm(y, norm2, correction),
            rebuild,
            self._deferred(spec.norm1, read),
        )
        found = LayerTensors(
            gamma1=t1, beta1=s1, weight1=dw1, gamma2=t2, beta2=s2, weight2=dw2, bias=dbias
        )
        return found, y_before

    def _cuts(self, index: int) -> list[Cut]:
        """The slabs in which layer ``index`` is gone back through; none where it is not cut."""
        if self.spec.save != "slabs" or not self.bottleneck[index]:
            return []
        line = math.prod(self.spatial[1:])
        # Y and its gradient
        nbytes = 2 * line * self.bottleneck[index] * self.x.element_size()
        lines = self.images * self.spatial[0]
        return list(cuts(self.shape, self.ops.images_per_step(lines, nbytes)))

    def _bottleneck_layer_backward_by_slabs(
        self, index: int, d: Tensor, slabs: Sequence[Cut], need: Sequence[bool]
    ) -> LayerTensors:
        """One layer back likewise; see cuts.py, NOTE [ bottlenecks by slabs ]."""
        spec, read = self.spec.layers[index], self._read(index)
        x, dx = _part(self.x, read), _part(d, read)
        norm1, weight1 = self._norm1(index), self._weight1(index)
        norm2, weight2 = self._norm2(index), _given(self.layers[index].weight2)
        gradient = self._gradient(index)
        dbias = self._bias_gradient(gradient, need)
        largest = max(slab.rows for slab in slabs)
        all_y, all_dz = x.new_empty((2, largest, self.bottleneck[index])).unbind()

        def back(slab: Cut, alone: bool) -> tuple[Tensor, Tensor, Any]:
            y, dz = all_y[: slab.rows], all_dz[: slab.rows]
            self.ops.bn_relu_conv1x1(x[slab.around], norm1, weight1, y, None)
            own = self._gradient_of(gradient, slab, alone)
            need_weight = alone and need[_WEIGHT2]
            sums = self.ops.bn_relu_conv3_backward(
                y, norm2, weight2, own, slab.shape, need_weight, dz, None
            )
            return y[slab.inside], dz[slab.inside], sums

        total = Total(self.sum_dtype)
        for slab in self.ops.pieces(slabs):
            total.add(*back(slab, alone=True)[2])
        dw2, s2, t2 = total.result()
        correction = None
        if _given(spec.norm2).batch_statistics:
            correction = (*self.spec.batch.sum(s2, t2), float(self.spec.batch.count))
        total = Total(self.sum_dtype)
        for slab in self.ops.pieces(slabs):
            y, dz, _ = back(slab, alone=False)
            sums = self.ops.bn_relu_conv1x1_backward(
                x[slab.own],
                norm1,
                weight1,
                dz,
                dx[slab.own],
                need[_WEIGHT1],
                PendingNorm(y, norm2, correction),
                None,
                self._deferred(spec.norm1, read),
            )
            total.add(*sums)
        dw1, s1, t1 = total.result()
        return LayerTensors(
            gamma1=t1, beta1=s1, weight1=dw1, gamma2=t2, beta2=s2, weight2=dw2, bias=dbias
        )

    def _gradient_of(self, gradient: Unfinished, slab: Cut, alone: bool) -> Unfinished:
        """A slab's part; ``alone``: zero on the lines around it."""
        rows, mask = slab.around, gradient.mask
        part = None if mask is None else mask[rows]
        if alone and slab.own != rows:
            zero = gradient.d.new_zeros((slab.rows, self.k))
            zero[slab.inside] = 1 if part is None else part[slab.inside]
            part = zero
        return replace(
            gradient,
            d=gradient.d[rows],
            x=gradient.x[rows],
            mask=part,
            scratch=lambda: gradient.d.new_empty((slab.rows, self.k)),
        )

    def _plain_layer_backward(self, index: int, d: Tensor, need: Sequence[bool]) -> LayerTensors:
        read = self._read(index)
        source, norm1, weight = self._convolution(index, None)
        gradient = self._gradient(index)
        dbias = self._bias_gradient(gradient, need)
        dw, s, t = self.ops.bn_relu_conv3_backward(
            source, norm1, weight, gradient, self.shape, need[_WEIGHT1], None, _part(d, read)
        )
        self._defer(self.spec.layers[index].norm1, norm1, s, t, read)
        return LayerTensors(gamma1=t, beta1=s, weight1=dw, bias=dbias)

    def _deferred(self, spec: NormSpec, read: slice) -> Deferred | None:
        """Where a reader of some channels leaves its correction; a frozen norm makes none."""
        if not spec.batch_statistics:
            return None
        return Deferred(_part(self.s, read), _part(self.t, read))

    def _defer(
        self, spec: NormSpec, norm: Normalization, s: Tensor, t: Tensor, read: slice
    ) -> None:
        deferred = self._deferred(spec, read)
        if deferred is not None:
            deferred.add(norm, s, t)

    # ------------------------------------------------------------------- tail

    def _tail_forward(self) -> Tensor:
        if self.tail is None:
            features = channels_first(self.x[:, self._returned()], self.images, self.spatial)
            # See NOTE [ saved tensors ].
            saved = self.spec.keep and self.spec.save != "input"
            return copy_on_write(features) if saved else as_base(features)
        norm = self._tail_norm()
        if self.spec.tail == "pool":
            out = self.x.new_empty((self.images, self.width))
            self.ops.bn_relu_global_pool(self.x, norm, self.images, out)
            return out
        weight = _given(self.tail.weight).flatten(1)
        pooled = [size // 2 for size in self.spatial]
        out = self.x.new_empty((self.images * math.prod(pooled), weight.shape[0]))
        self.ops.bn_relu_avg_pool_conv1x1(self.x, norm, weight, self.shape, out)
        return as_base(channels_first(out, self.images, pooled))

    def _tail_backward(
        self, grad_output: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """D as the whole block's reader leaves it, and the tail's parameter gradients."""
        # See NOTE [ who owns the gradient buffer ].
        d = self._empty_rows(self.width)[:, : self.width]
        if self.tail is None:
            d[:, self._returned()].copy_(rows_of(grad_output))
            if self.spec.new_only:
                d[:, self._read(0)].zero_()
            return d, []
        norm, dw = self._tail_norm(), None
        if self.spec.tail == "pool":
            dout = grad_output.contiguous()
            s, t = self.ops.bn_relu_global_pool_backward(self.x, norm, self.images, dout, d)
        else:
            weight, dout = _given(self.tail.weight).flatten(1), rows_of(grad_output)
            dw, s, t = self.ops.bn_relu_avg_pool_conv1x1_backward(
                self.x, norm, weight, self.shape, dout, d, needs[_TAIL_WEIGHT]
            )
        self._defer(_given(self.spec.tail_norm), norm, s, t, slice(0, self.width))
        return d, _as_gradients(TailTensors(gamma=t, beta=s, weight=dw), self.tail, needs)


def _due(steps: Sequence[Step | None] | None) -> list[Step | None] | None:
    """The steps that the present backward pass is to take."""
    if steps is None:
        return None
    return [step if step is not None and step.is_due() else None for step in steps]


_T = TypeVar("_T")


def _given(value: _T | None) -> _T:
    """What a stage's construction guarantees to be there."""
    assert value is not None
    return value


def _part(x: Tensor, channels: slice) -> Tensor:
    """A view of some channels, which are x's last dimension."""
    # indexing would cost the host twice as much
    return x.narrow(-1, channels.start, channels.stop - channels.start)


def _growth(layer: LayerTensors) -> int:
    return _given(layer.weight1 if layer.weight2 is None else layer.weight2).shape[0]


def _as_gradients(
    found: Iterable[Tensor | None], parameters: Iterable[Tensor | None], needs: Iterable[bool]
) -> list[Tensor | None]:
    """Gradients shaped, laid out and typed like their parameters; None where none is needed."""
    return [
        like_parameter(_given(gradient), parameter) if needed and parameter is not None else None
        for gradient, parameter, needed in zip(found, parameters, needs, strict=True)
    ]
