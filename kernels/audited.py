"""What the audit compiles: every operation on a device, in types, on layers of networks.

An operation is called as a block calls it, on tensors without memory, with a launcher that
notes what it was to start; so the audit cannot drift from what a device would run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from effdense import reference
from effdense.backends.base import Deferred, Normalization, PendingNorm, Statistics, Unfinished
from effdense.kernels import (
    bn_relu,
    bn_relu_conv1x1,
    bn_relu_conv1x1_backward,
    bn_relu_conv3,
    bn_relu_conv3_backward,
    bn_relu_pool,
    dropout,
    finish_gradient,
    statistics,
)
from effdense.kernels.launch import Launcher
from effdense.kernels.launch_table import Architecture, LaunchTable
from effdense.kernels.layouts import PADDING, alignment, cdiv
from effdense.kernels.machine_code import Call

KIB = 1024


class Device(NamedTuple):
    """A compilation target, its shared memory per program and its multiprocessors."""

    target: GPUTarget
    shared_limit: int
    architecture: Architecture


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 163 * KIB, Architecture("cuda", 80, 108)),
    "sm_86": Device(GPUTarget("cuda", 86, 32), 99 * KIB, Architecture("cuda", 86, 84)),
    "sm_87": Device(GPUTarget("cuda", 87, 32), 163 * KIB, Architecture("cuda", 87, 16)),
    "sm_89": Device(GPUTarget("cuda", 89, 32), 99 * KIB, Architecture("cuda", 89, 128)),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 227 * KIB, Architecture("cuda", 90, 132)),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 227 * KIB, Architecture("cuda", 100, 148)),
    "sm_103": Device(GPUTarget("cuda", 103, 32), 227 * KIB, Architecture("cuda", 103, 148)),
    "sm_120": Device(GPUTarget("cuda", 120, 32), 99 * KIB, Architecture("cuda", 120, 170)),
    "sm_121": Device(GPUTarget("cuda", 121, 32), 99 * KIB, Architecture("cuda", 121, 48)),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 64 * KIB, Architecture("hip", 0, 304)),
}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Shape(NamedTuple):
    """A layer of a block: rows, prefix width, buffer width, growth rate, bottleneck width.

    ``name`` is the network's, ``block`` which of its blocks; ``strict`` where every access must
    be of 128 bits and every grid fill the device: the networks of the README. ``side`` is an
    image's, in positions, where that is known.
    """

    name: str
    block: int
    rows: int
    c: int
    width: int
    k: int
    bottleneck: int
    strict: bool = True
    side: int = 0


def _layers(
    name: str,
    config: dict[str, Any],
    images: int,
    size: int,
) -> Iterator[Shape]:
    """The layers of a network on ``images`` of ``size``^2 that are like no other of their block.

    Launches depend on the alignment of a layer's prefix and, through tiles, on its magnitude:
    ``tests/kernels/test_audited.py`` holds that no other variants are met by the whole network.
    """
    c, k = config["num_init_features"], config["growth_rate"]
    for block, layers in enumerate(config["block_config"], 1):
        width, rows = c + layers * k, images * size * size
        kinds = {(alignment(p), p.bit_length()): p for p in range(width - k, c - 1, -k)}
        for prefix in sorted({c, width - k, *kinds.values()}):
            bottleneck = config.get("bn_size", 4) * k
            yield Shape(name, block, rows, prefix, width, k, bottleneck, side=size)
        c, size = width // 2, size // 2


SHAPES = (
    *_layers("k12", reference.densenet_bc_config(100, 12), 64, 32),
    *_layers("k24", reference.densenet_bc_config(250, 24), 64, 32),
    *_layers(
        "121",
        {"num_init_features": 64, "growth_rate": 32, "block_config": (6, 12, 24, 16)},
        *(32, 56),
    ),
    # multiples of 16, and a bottleneck of more than one tile
    Shape("k48", 3, 14 * 14 * 64, 672, 2112, 48, 192, strict=False),
    # nothing is a multiple of anything
    Shape("odd", 1, 7 * 7 * 13, 37, 101, 5, 17, strict=False),
)


OPTIONS = ("num_warps", "num_stages", "maxnreg")


class RecordingLauncher(Launcher):
    """A launcher that notes calls instead of making them, and how many programs each has."""

    def __init__(self, table: LaunchTable, precision: str) -> None:
        super().__init__(table, precision)
        self.calls: list[tuple[Call, int]] = []

    def start(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        integers: dict[str, int],
        constants: dict[str, Any],
    ) -> Callable[..., None]:
        options = {name: constants[name] for name in OPTIONS if name in constants}
        constants = {name: v for name, v in constants.items() if name not in OPTIONS}
        names = kernel.arg_names

        def start(tensors: tuple[Tensor, ...], floats: tuple[float, ...] = ()) -> None:
            given = iter(tensors)
            signature: dict[str, str] = {}
            divisible = []
            for name in names:
                if name in constants:
                    signature[name] = "constexpr"
                elif name in integers:
                    signature[name] = "i32" if integers[name] < 2**31 else "i64"
                elif name.startswith("p_"):
                    tensor = next(given)
                    signature[name] = POINTERS[tensor.dtype]
                    aligned = tensor.storage_offset() * tensor.element_size() % 16 == 0
                    if aligned and (name in kernel.matrices or name.startswith("p_part")):
                        divisible.append(name)
                else:
                    signature[name] = "fp32"
            assert next(given, None) is None, (kernel.__name__, names)
            call = Call(
                *(kernel.fn.__module__, kernel.__name__, signature, constants),
                *(tuple(divisible), tuple(sorted(kernel.matrices)), options),
            )
            self.calls.append((call, math.prod(grid)))

        return start


class Operation(NamedTuple):
    """An operation on a shape, and its cost by formula.

    ``bytes`` and ``flops`` are per element of X's (P, c) operand; ``bytes`` takes the
    element's size. A ``tail`` is run once for each block, all others for a layer. A ``small`` one
    is of few columns, wherever they begin, or of few rows: neither wide accesses nor a full device
    are asked of it.
    """

    name: str
    bytes: Callable[[Shape, int], float]
    flops: Callable[[Shape], float]
    run: Callable[[Shape, torch.dtype, Launcher], Any]
    tail: bool = False
    small: bool = False


def _matrix(rows: int, columns: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, width, dtype=dtype, device="meta")[:, :columns]


def _times(factor: float, shape: Shape, element: int) -> float:
    """Bytes of an element's ``factor`` accesses."""
    return element * factor


def _norm(c: int) -> Normalization:
    mean, var, gamma, beta = torch.empty(4, c, device="meta")
    return Normalization(mean, var, gamma, beta, 1e-5)


def operations() -> list[Operation]:
    """Every operation in every mode the dense block uses."""

    def x(s: Shape, t: torch.dtype) -> Tensor:
        width = cdiv(s.width, PADDING) * PADDING if s.strict else s.width
        return _matrix(s.rows, s.c, width, t)

    def dense(s: Shape, t: torch.dtype, columns: int) -> Tensor:
        return _matrix(s.rows, columns, columns, t)

    def parameter(rows: int, columns: int) -> Tensor:
        return _matrix(rows, columns, columns, torch.float32)

    def pair(c: int) -> Tensor:
        return torch.empty(2, c, device="meta")

    def image(s: Shape, dims: int) -> tuple[int, ...]:
        # even sizes as the networks have them, and odd ones
        n = s.side or (8 if s.rows % 64 == 0 else 7)
        images = s.rows // n**2
        return {1: (images, n * n), 2: (images, n, n), 3: (images, n, n, 1)}[dims]

    def pooled(s: Shape, t: torch.dtype, dims: int) -> Tensor:
        shape = image(s, dims)
        width = cdiv(s.c, PADDING) * PADDING if s.strict else s.c
        return _matrix(shape[0] * math.prod(n // 2 for n in shape[1:]), s.c, width, t)

    def new_stats(s: Shape, t: torch.dtype, g: Launcher) -> Any:
        return statistics.statistics(new(s, t), Statistics(*pair(s.k)), g)

    def new_finish(s: Shape, t: torch.dtype, g: Launcher) -> Any:
        v = torch.empty(3, s.k, device="meta")
        out = dense(s, t, s.k)
        return finish_gradient.finish_gradient(new(s, t), new(s, t), *v, 1.0, out, g)

    def stats(s: Shape, t: torch.dtype, g: Launcher) -> Any:
        return statistics.statistics(x(s, t), Statistics(*pair(s.c)), g)

    def conv(s: Shape, t: torch.dtype, g: Launcher, take: bool) -> Any:
        found = Statistics(*pair(s.bottleneck)) if take else None
        args = parameter(s.bottleneck, s.c), dense(s, t, s.bottleneck), found
        return bn_relu_conv1x1.bn_relu_conv1x1(x(s, t), _norm(s.c), *args, g)

    def conv_backward(
        s: Shape, t: torch.dtype, g: Launcher, need: bool = True, frozen: bool = False
    ) -> Any:
        dz, y = dense(s, t, s.bottleneck), dense(s, t, s.bottleneck)
        correction = None if frozen else (*pair(s.bottleneck), 1.0)
        pending = PendingNorm(y, _norm(s.bottleneck), correction)
        deferred = None if frozen else Deferred(*pair(s.c))
        args = parameter(s.bottleneck, s.c), dz, x(s, t), need, pending, deferred
        run = bn_relu_conv1x1_backward.bn_relu_conv1x1_backward
        return run(x(s, t), _norm(s.c), *args, g)

    def new(s: Shape, t: torch.dtype) -> Tensor:
        # the k columns of a wider matrix behind a layer's prefix
        width = max(s.width, s.c + s.k)
        width = cdiv(width, PADDING) * PADDING if s.strict else width
        return torch.empty(s.rows, width, dtype=t, device="meta")[:, s.c : s.c + s.k]

    def weight3(s: Shape, dims: int, last: bool) -> Tensor:
        weight = torch.empty(s.k, s.bottleneck, *[3] * dims, device="meta")
        order = (0, *range(2, 2 + dims), 1)
        back = (0, 1 + dims, *range(1, 1 + dims))
        return weight.permute(order).contiguous().permute(back) if last else weight

    def conv3(s: Shape, t: torch.dtype, g: Launcher, dims: int, other: bool = False) -> None:
        if dims != 2 and s.strict:
            return
        shape, weight = image(s, dims), weight3(s, dims, other)
        rows = s._replace(rows=math.prod(shape))
        mask = dense(rows, t, s.k) if other else None
        found = None if other else Statistics(*pair(s.k))
        args = _norm(s.bottleneck), weight, shape, new(rows, t), mask, found
        bn_relu_conv3.bn_relu_conv3(dense(rows, t, s.bottleneck), *args, g)

    def conv3_backward(
        s: Shape, t: torch.dtype, g: Launcher, dims: int, other: bool = False
    ) -> None:
        if dims != 2 and s.strict:
            return
        shape, weight = image(s, dims), weight3(s, dims, other)
        rows = s._replace(rows=math.prod(shape))
        mask = dense(rows, t, s.k) if other else None
        mean, to_s, to_t = torch.empty(3, s.k, device="meta")
        d, x_new = new(rows, t), new(rows, t)
        gradient = Unfinished(d, x_new, mean, to_s, to_t, 1.0, mask, lambda: d)
        y = dense(rows, t, s.bottleneck)
        into = (None, y) if other else (y, None)
        args = _norm(s.bottleneck), weight, gradient, shape, True, *into
        bn_relu_conv3_backward.bn_relu_conv3_backward(y, *args, g)

    def finish(s: Shape, t: torch.dtype, g: Launcher) -> Any:
        # the block asks for whole groups of columns
        s = s._replace(c=cdiv(s.c, PADDING) * PADDING) if s.strict else s
        v = torch.empty(3, s.c, device="meta")
        return finish_gradient.finish_gradient(x(s, t), x(s, t), *v, 1.0, x(s, t), g)

    def mask(s: Shape, t: torch.dtype, g: Launcher) -> Any:
        key = torch.empty(1, dtype=torch.int64, device="meta")
        return dropout.dropout_mask(dropout.wide(dense(s, t, s.k)), key, 0.2, g)

    def apply(s: Shape, t: torch.dtype, g: Launcher, correct: bool) -> Any:
        y, dz = dense(s, t, s.bottleneck), dense(s, t, s.bottleneck)
        correction = (*pair(s.bottleneck), 1.0) if correct else None
        return bn_relu.bn_relu_backward_apply(y, _norm(s.bottleneck), dz, correction, g)

    def in_pieces(s: Shape, t: torch.dtype, g: Launcher, pool: Callable[..., None]) -> None:
        # a block of many positions is pooled in pieces, of which the last has any number of images
        images, *sides = image(s, 2)
        for power in range(images.bit_length() - 1):
            pool(s._replace(rows=2**power * math.prod(sides)), t, g, 2)

    def avg(s: Shape, t: torch.dtype, g: Launcher, dims: int) -> None:
        if dims != 2 and s.strict:
            return
        shape, out = image(s, dims), pooled(s, t, dims)
        rows = s._replace(rows=math.prod(shape))
        bn_relu_pool.bn_relu_avg_pool(x(rows, t), _norm(s.c), shape, out, g)

    def avg_backward(s: Shape, t: torch.dtype, g: Launcher, dims: int) -> None:
        if dims != 2 and s.strict:
            return
        shape, out = image(s, dims), pooled(s, t, dims)
        rows = s._replace(rows=math.prod(shape))
        run = bn_relu_pool.bn_relu_avg_pool_backward
        run(x(rows, t), _norm(s.c), shape, out, x(rows, t), out, None, g)

    def global_(s: Shape, t: torch.dtype, g: Launcher) -> Any:
        out = _matrix(s.rows // 49, s.c, s.c, t)
        return bn_relu_pool.bn_relu_global_pool(x(s, t), _norm(s.c), s.rows // 49, out, g)

    def global_backward(s: Shape, t: torch.dtype, g: Launcher) -> Any:
        width = cdiv(s.c, PADDING) * PADDING if s.strict else s.c
        out = _matrix(s.rows // 49, s.c, width, t)
        run = bn_relu_pool.bn_relu_global_pool_backward
        return run(x(s, t), _norm(s.c), s.rows // 49, out, x(s, t), None, g)

    def reduce(s: Shape, t: torch.dtype, g: Launcher, accumulate: bool) -> Any:
        y, dz = dense(s, t, s.bottleneck), dense(s, t, s.bottleneck)
        d = dense(s, t, s.bottleneck) if accumulate else None
        return bn_relu.bn_relu_backward_reduce(y, _norm(s.bottleneck), dz, d, g)

    def forward(s: Shape, t: torch.dtype, g: Launcher) -> Any:
        out = dense(s, t, s.bottleneck)
        return bn_relu.bn_relu(dense(s, t, s.bottleneck), _norm(s.bottleneck), out, g)

    def per(s: Shape) -> float:
        return s.bottleneck / s.c

    def conv3_operation(dims: int, other: bool) -> Operation:
        return Operation(
            f"BN-ReLU-Conv3 {dims}-D" + other * ", frozen, dropout, channels last",
            lambda s, e: e * (s.bottleneck + s.k) / s.c,
            lambda s: (5 + 2 * 3**dims * s.k) * s.bottleneck / s.c,
            partial(conv3, dims=dims, other=other),
        )

    def conv3_backward_operation(dims: int, other: bool) -> Operation:
        return Operation(
            f"BN-ReLU-Conv3 {dims}-D backward" + other * ", onto D, dropout, channels last",
            lambda s, e: e * (3 * s.bottleneck + 4 * s.k) / s.c,
            lambda s: (15 + 4 * 3**dims * s.k) * s.bottleneck / s.c,
            partial(conv3_backward, dims=dims, other=other),
        )

    tiles = {dims: 1 / 2**dims for dims in (1, 2, 3)}
    found = [
        Operation("statistics of a prefix", lambda s, e: e, lambda s: 6, stats),
        Operation("BN-ReLU", lambda s, e: 2 * e, lambda s: 3, forward),
        Operation(
            *("BN-ReLU sums", lambda s, e: 2 * e, lambda s: 8),
            partial(reduce, accumulate=False),
        ),
        Operation(
            *("BN-ReLU accumulate", lambda s, e: 4 * e, lambda s: 10),
            partial(reduce, accumulate=True),
        ),
        *(
            Operation(
                *(f"BN-ReLU input gradient{name}", lambda s, e: 3 * e),
                *(lambda s, cost=cost: cost, partial(apply, correct=correct)),
            )
            for name, correct, cost in (("", True, 9), (", frozen", False, 4))
        ),
        Operation("dropout's mask", lambda s, e: e * s.k / s.c, lambda s: 14 * s.k / s.c, mask),
        Operation("finish gradient", lambda s, e: 3 * e, lambda s: 6, finish),
        *(
            Operation(
                *(f"BN-ReLU-Conv1x1{name}", lambda s, e: e * (1 + per(s))),
                *(lambda s: 3 + 2 * s.bottleneck, partial(conv, take=take)),
            )
            for name, take in ((" + statistics", True), ("", False))
        ),
        *(
            Operation(
                f"BN-ReLU-Conv1x1 backward{name}",
                # a bottleneck of several tiles reads X again for each tile of dW
                lambda s, e: e * (3 + 2 * per(s) + (s.bottleneck > 128) * cdiv(s.bottleneck, 128)),
                lambda s: 10 + 4 * s.bottleneck,
                partial(conv_backward, need=need, frozen=frozen),
            )
            for name, need, frozen in (
                *(("", True, False), (", no dW", False, False), (", frozen", True, True)),
            )
        ),
        *(conv3_operation(dims, False) for dims in (1, 2, 3)),
        conv3_operation(2, True),
        *(conv3_backward_operation(dims, False) for dims in (1, 2, 3)),
        conv3_backward_operation(2, True),
        Operation(
            *("statistics of new features", lambda s, e: e * s.k / s.c),
            *(lambda s: 6 * s.k / s.c, new_stats),
            small=True,
        ),
        Operation(
            *("finish gradient of new features", lambda s, e: 3 * e * s.k / s.c),
            *(lambda s: 6 * s.k / s.c, new_finish),
            small=True,
        ),
        Operation(
            *("BN-ReLU-AvgPool, pieces", partial(_times, 1.25), lambda s: 4),
            partial(in_pieces, pool=avg),
            tail=True,
            small=True,
        ),
        Operation(
            *("BN-ReLU-AvgPool backward, pieces", partial(_times, 2.5), lambda s: 10),
            partial(in_pieces, pool=avg_backward),
            tail=True,
            small=True,
        ),
        Operation(*("BN-ReLU-GlobalPool", lambda s, e: e, lambda s: 4, global_), tail=True),
        Operation(
            *("BN-ReLU-GlobalPool backward", lambda s, e: 2 * e),
            *(lambda s: 9, global_backward),
            tail=True,
        ),
    ]
    for dims in (1, 2, 3):
        found.append(
            Operation(
                f"BN-ReLU-AvgPool {dims}-D",
                partial(_times, 1 + tiles[dims]),
                lambda s: 4,
                partial(avg, dims=dims),
                tail=True,
            )
        )
        found.append(
            Operation(
                f"BN-ReLU-AvgPool {dims}-D backward",
                partial(_times, 2 + 2 * tiles[dims]),
                lambda s: 10,
                partial(avg_backward, dims=dims),
                tail=True,
            )
        )
    return found
