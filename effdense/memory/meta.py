"""A training step on the meta device, whose tensors have shapes and no storage.

All that makes such a step stand for a real one is here: what computes, in which pieces, under
which rules of autocast, and short cuts for torch's rules of shapes.

NOTE [ what a simulation leaves out ]
Work that leaves no trace in memory. Of a pass cut into pieces the first stands for all: none
is larger, and each takes its memory after the one before has given it back; the last may be
smaller, and is done too where a library keeps something for every shape. In a deep block some
layers' temporaries stand for their neighbours', which are between theirs, up to the rounding
of tiles; what those layers keep is made without computing it.

NOTE [ rules of shapes ]
On meta tensors torch works out every operation's result in Python, at up to milliseconds
each. The rules here are the same results in microseconds; where one isn't certain, torch's
is asked. Tests hold an estimate with them equal to one without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import islice, pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..autocast import autocast as real_autocast
from ..autocast import autocast_dtype, computing_in
from ..backends.base import (
    KERNEL_ROW_MULTIPLE,
    KERNEL_STEP_BYTES,
    Backend,
    Normalization,
    Piece,
    Statistics,
    Unfinished,
)
from ..backends.cpu_backend import CpuBackend
from ..backends.cpu_library import DTYPES as LOOP_DTYPES
from ..backends.layout import room
from ..backends.norm_sums import ALL_CHANNELS, Channels
from ..backends.precision import tf32_convolutions
from ..backends.select import fault, on_meta
from ..backends.torch_backend import TorchBackend
from ..block.offloading import HOLDERS
from ..norms.synchronization import unsynchronised

DeviceType = Literal["cpu", "cuda"]

# The kind of device that meta tensors stand for: it decides how large temporaries are.
_stands_for: ContextVar[DeviceType | None] = ContextVar("_stands_for", default=None)


def stands_for() -> DeviceType:
    """The kind of device that meta tensors stand for."""
    return _stands_for.get() or "cpu"


@contextmanager
def simulation(device: DeviceType = "cpu", every_shape: bool = False) -> Iterator[None]:
    """Inside, a step on meta tensors takes the memory of one on this kind of device.

    ``every_shape``: it goes through operations of every shape there is, not only of the
    largest. Norms take the statistics of this process alone.
    """

    def backend(name: str, dtype: torch.dtype) -> Backend:
        if name == "triton" or (name == "auto" and device == "cuda"):
            return _Kernels(every_shape)
        loops = name in ("auto", "cpu") and device == "cpu" and dtype in LOOP_DTYPES
        if loops and fault(torch.device("cpu"), dtype) is None:
            return _Loops(every_shape)
        return _Sampled(device, every_shape)

    tokens = _stands_for.set(device), on_meta.set(backend)
    try:
        with unsynchronised():
            yield
    finally:
        _stands_for.reset(tokens[0])
        on_meta.reset(tokens[1])


def simulation_of(x: Tensor) -> AbstractContextManager[None]:
    """A simulation where x is on meta and there is none yet."""
    return simulation() if x.is_meta and _stands_for.get() is None else nullcontext()


class _Sampled(TorchBackend):
    """A backend on tensors without values; see NOTE [ what a simulation leaves out ]."""

    def __init__(self, device: str, every_shape: bool) -> None:
        TorchBackend.__init__(self, device)
        self._every_shape = every_shape

    def pieces(self, cuts: Iterable[Piece]) -> Iterable[Piece]:
        if not self._every_shape:
            return islice(cuts, 1)
        first, *rest = cuts
        return [first, *rest[-1:]]

    def layers(
        self, indices: Iterable[int], total: int, leave_out: Callable[[int], None]
    ) -> Iterator[int]:
        for index in indices:
            if self._every_shape or _stands_by_itself(index, total):
                yield index
            else:
                leave_out(index)

    def dropout_mask(self, key: Tensor, p: float, out: Tensor) -> None:
        pass

    def direct_channels(self, norm: Normalization) -> None:
        # nothing to look at; None is what nearly every norm's channels come to
        return None

    def _tiles(self, x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
        # not even cut, for hundreds of views take their time
        step = self._tile_rows(x)
        firsts = self.pieces(range(0, x.shape[0], step))
        return iter([tuple(m[first : first + step] for m in (x, *others)) for first in firsts])


def _stands_by_itself(layer: int, layers: int) -> bool:
    return layers < 32 or not 2 <= layer < layers - 2 or layer % (layers // 8) == 0


class _Loops(_Sampled, CpuBackend):
    """The compiled loops: memory is taken as ever and nothing computed."""

    def __init__(self, every_shape: bool) -> None:
        super().__init__("cpu", every_shape)
        self._library: Any = _Idle()


class _Idle:
    def call(self, *arguments: Any) -> None:
        pass


class _Kernels(_Sampled):
    """The Triton backend: its kernels have no tiles in memory.

    Their workspaces, partial sums of some MiB, are not counted. Of the two convolutions it is
    the one that the type decides for where none was timed.
    """

    row_multiple = KERNEL_ROW_MULTIPLE

    def __init__(self, every_shape: bool) -> None:
        super().__init__("cuda", every_shape)
        self._tile_bytes, self._step_bytes = 0, KERNEL_STEP_BYTES

    def sums_from_products(self, dtype: torch.dtype) -> bool:
        return False

    def bn_relu_backward_reduce(
        self,
        x: Tensor,
        norm: Normalization,
        dz: Tensor,
        z: Tensor | None = None,
        out: Tensor | None = None,
        channels: Channels = ALL_CHANNELS,
    ) -> tuple[Tensor, Tensor]:
        return _sums(norm)

    def bn_relu_backward_accumulate(
        self, x: Tensor, norm: Normalization, dz: Tensor, d: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return _sums(norm)

    def bn_relu_avg_pool(
        self, x: Tensor, norm: Normalization, shape: tuple[int, ...], out: Tensor
    ) -> None:
        pass

    def bn_relu_avg_pool_backward(
        self,
        x: Tensor,
        norm: Normalization,
        shape: tuple[int, ...],
        dpooled: Tensor,
        d: Tensor,
        pooled: Tensor | None,
        channels: Channels = ALL_CHANNELS,
    ) -> tuple[Tensor, Tensor]:
        return _sums(norm)

    def bn_relu_conv3(
        self,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        shape: tuple[int, ...],
        out: Tensor,
        mask: Tensor | None,
        statistics: Statistics | None,
    ) -> None:
        if _is_exact(source):
            super().bn_relu_conv3(source, norm, weight, shape, out, mask, statistics)

    def bn_relu_conv3_backward(
        self,
        source: Tensor,
        norm: Normalization,
        weight: Tensor,
        gradient: Unfinished,
        shape: tuple[int, ...],
        need_weight: bool,
        dz: Tensor | None,
        d: Tensor | None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        if _is_exact(source):
            given = source, norm, weight, gradient, shape, need_weight, dz, d
            return super().bn_relu_conv3_backward(*given)
        dw = torch.empty_like(weight, dtype=torch.float32) if need_weight else None
        return dw, *_sums(norm)


def _sums(norm: Normalization) -> tuple[Tensor, Tensor]:
    """S and T, which a kernel makes and returns."""
    return torch.empty_like(norm.mean), torch.empty_like(norm.mean)


def _is_exact(matrix: Tensor) -> bool:
    return matrix.dtype == torch.float32 and not tf32_convolutions()


class _Nothing:
    """What went out of a device's memory."""

    def __init__(self, flat: Tensor, folder: Any) -> None:
        pass

    def read(self, flat: Tensor) -> None:
        pass


HOLDERS["meta"] = _Nothing


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """``torch.autocast`` to ``dtype``, on meta too; None for no autocast.

    On meta the rules are kept for the operations that a DenseNet, or another convolutional
    network, is made of.
    """
    if device.type != "meta":
        return real_autocast(device.type, dtype)
    return nullcontext() if dtype is None else _Rules(dtype)


_NARROW: set[Any] = {
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    F.linear,
    torch.matmul,
    torch.mm,
    torch.addmm,
}
_WIDE: dict[str, set[Any]] = {"cpu": {F.avg_pool3d, F.cross_entropy}, "cuda": {F.cross_entropy}}


class _Rules(TorchFunctionMode):
    """Casts as torch.autocast does: parameters once per context, all else at every use."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype, self._wide = dtype, _WIDE[stands_for()]
        self._cast: dict[nn.Parameter, Tensor] = {}
        self._inside = ExitStack()

    def __enter__(self) -> _Rules:
        self._inside.enter_context(computing_in(self._dtype))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._inside.close()
        self._cast.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if autocast_dtype(_META) is not None:
            target = self._dtype if func in _NARROW else None
            target = torch.float32 if func in self._wide else target
            if target is not None:
                args = [self._to(value, target) for value in args]
                kwargs = {name: self._to(value, target) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _to(self, value: Any, dtype: torch.dtype) -> Any:
        # autocast leaves double alone
        if not isinstance(value, Tensor) or value.dtype in (dtype, torch.float64):
            return value
        if not value.is_floating_point():
            return value
        if not isinstance(value, nn.Parameter) or not torch.is_grad_enabled():
            return value.to(dtype)
        if value not in self._cast:
            self._cast[value] = value.to(dtype)
        return self._cast[value]


_META = torch.device("meta")

Rule = Callable[[tuple[Any, ...], dict[str, Any]], Any]

_aten = torch.ops.aten


def meta_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``func`` returns, or NotImplemented where torch must be asked."""
    rule = _RULES.get(func)
    if rule is None or not (args and isinstance(args[0], Tensor) and args[0].is_meta):
        return NotImplemented
    return rule(args, kwargs)


def _written_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]


def _out_argument(name: str) -> Rule:
    def rule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # an empty one would be resized
        return kwargs[name] if kwargs[name].numel() else NotImplemented

    return rule


def _pointwise(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tensors of one type in row-major order, of one shape or vectors along its last dimension."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    shape, dtype = max((t.shape for t in tensors), key=len), tensors[0].dtype
    if not dtype.is_floating_point or kwargs:
        return NotImplemented
    for t in tensors:
        if t.dtype != dtype or t.shape not in (shape, shape[-1:]) or not _is_row_major(t):
            return NotImplemented
    if not all(isinstance(value, (Tensor, int, float)) for value in args):
        return NotImplemented
    return _empty(shape, dtype)


def _new(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """new_empty and new_zeros: (tensor, size)."""
    x, size = args
    if kwargs.keys() - {"dtype", "pin_memory"}:
        return NotImplemented
    return _empty(size, kwargs.get("dtype") or x.dtype)


def _like(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (x,) = args
    if kwargs.keys() - {"dtype", "pin_memory"} or not x.is_contiguous():
        return NotImplemented
    return _empty(x.shape, kwargs.get("dtype") or x.dtype)


def _empty(size: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _is_row_major(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    return 0 not in strides and all(a >= b for a, b in pairwise(strides))


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, _, _, _, training = args[:6]
    if not training or weight is None:
        return NotImplemented
    size = (x.shape[1],)
    return torch.empty_like(x), _empty(size, weight.dtype), _empty(size, weight.dtype)


def _batch_norm_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _, x, weight, _, _, _, _, _, _, wanted = args
    if weight is None:
        return NotImplemented
    like = (x, weight, weight)
    return tuple(
        torch.empty_like(t) if want else None for t, want in zip(like, wanted, strict=True)
    )


def _convolution(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # torch's rule forgets the layouts of input and weight, of which a device keeps channels-last
    x, weight, _, _, _, _, transposed = args[:7]
    by_rows = _is_channels_last(x) or _is_channels_last(weight)
    # in double a volume's is row-major on CPUs, as everything is in cuDNN
    double = x.dtype == torch.float64 and (x.dim() == 5 or stands_for() == "cuda")
    if transposed or double or not by_rows:
        return NotImplemented
    return room(x, _aten.convolution.default(*args, **kwargs).shape)


def _is_channels_last(x: Tensor) -> bool:
    """As torch reads strides, also of one channel or one pixel, which are in either layout."""
    if x.dim() < 4:
        return False
    least = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.stride(dim) < max(least, 1) or (dim == 0 and least == x.stride(1)):
            return False
        least = x.stride(dim) * x.shape[dim]
    return True


def _max_pool3d_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # on CUDA in row-major order, whatever the input's
    return _empty(args[1].shape, args[1].dtype) if stands_for() == "cuda" else NotImplemented


def _convolution_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # torch's rule forgets the input's layout, which would cost a copy that no device makes
    found = _aten.convolution_backward.default(*args, **kwargs)
    return (None if found[0] is None else torch.empty_like(args[1]), *found[1:])


_RULES: dict[Any, Rule] = {
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    _aten.max_pool3d_with_indices_backward.default: _max_pool3d_backward,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
    _aten.new_empty.default: _new,
    _aten.new_zeros.default: _new,
    _aten.empty_like.default: _like,
    _aten.zeros_like.default: _like,
    _aten.threshold_backward.grad_input: _out_argument("grad_input"),
}
for _op in (
    _aten.add_.Tensor,
    _aten.mul_.Tensor,
    _aten.sub_.Tensor,
    _aten.div_.Tensor,
    _aten.div_.Scalar,
    _aten.addcmul_.default,
    _aten.addcdiv_.default,
    _aten.addmm_.default,
    _aten.pow_.Scalar,
    _aten.sqrt_.default,
    _aten.relu_.default,
    _aten.zero_.default,
    _aten.fill_.Scalar,
    _aten.copy_.default,
    _aten.lerp_.Scalar,
):
    _RULES[_op] = _written_argument
for _op in (
    _aten.add.out,
    _aten.sub.out,
    _aten.mul.out,
    _aten.addcmul.out,
    _aten.mm.out,
    _aten.mean.out,
    _aten.sum.IntList_out,
):
    _RULES[_op] = _out_argument("out")
for _op in (
    _aten.add.Tensor,
    _aten.sub.Tensor,
    _aten.mul.Tensor,
    _aten.div.Tensor,
    _aten.addcmul.default,
    _aten.rsqrt.default,
    _aten.threshold_backward.default,
):
    _RULES[_op] = _pointwise
