"""Launches, torch operations and host time of a step, counted on a machine without a GPU.

The kernels' host code runs as on an H100, Triton's own binder included, up to the call that
would hand a launch to the device; there a driver counts it and launches nothing. Nothing is
compiled either (that is the audit's work). Results are therefore without meaning, counts and
host times are not: both depend on shapes alone.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import compiler

import effdense
from effdense import reference
from effdense.backends import select
from effdense.backends.triton_backend import INTERPRETED, TritonBackend
from effdense.block import slabs
from effdense.kernels.launch_table import Architecture, LaunchTable

if TYPE_CHECKING:
    from .case import Case

H100 = Architecture("cuda", 90, 132)


class CountingDriver(DriverBase):
    """A device that is told of every launch and does nothing."""

    _numbers = itertools.count()

    def __init__(self, architecture: Architecture = H100) -> None:
        # Triton keeps compiled kernels by device: another driver's are not to be found
        self.number = next(self._numbers)
        self.launches: Counter[str] = Counter()
        self.architecture = architecture
        self.target = GPUTarget("cuda", architecture.number, 32)

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def compiled(self, source: Any, target: Any = None, options: Any = None, **_: Any) -> Any:
        """What stands for a compiled kernel: a name, and a launcher that counts it."""
        name = source.fn.__name__

        def run(*_: Any) -> None:
            self.launches[name] += 1

        return SimpleNamespace(
            name=name,
            run=run,
            function=0,
            packed_metadata=(),
            launch_metadata=lambda *_: None,
            metadata=SimpleNamespace(**(options or {})),
            src=source,
        )

    @contextlib.contextmanager
    def active(self) -> Iterator[TritonBackend]:
        """Makes this the device of all kernels, and of the Triton backend on CPU tensors."""
        if INTERPRETED:
            raise RuntimeError("the interpreter launches nothing: unset TRITON_INTERPRET")
        backend = TritonBackend(LaunchTable(self.architecture))
        drivers: Any = triton.runtime.driver
        held = "_active" if hasattr(drivers, "_active") else "active"  # Triton 3.3's name
        before = getattr(drivers, held)
        drivers.set_active(self)
        try:
            with (
                mock.patch.object(compiler, "compile", self.compiled),
                mock.patch.object(triton.compiler, "compile", self.compiled),
                mock.patch.object(select, "_triton_for", return_value=backend),
                # which a GPU would be waited for to say
                mock.patch.object(slabs, "all_positive", return_value=False),
            ):
                yield backend
        finally:
            setattr(drivers, held, before)


class OperationCounter(TorchDispatchMode):
    """Counts torch's operations that a device would run: no views, no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # set_ gives a tensor other memory
        if name.startswith(("empty", "new_empty")) or name == "set_":
            return out
        if not func._schema.is_mutable and _storages(out) <= _storages((args, kwargs)):
            return out
        self.operations[name] += 1
        return out


def _storages(tree: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_leaves(tree) if isinstance(t, Tensor)}


class Counts(NamedTuple):
    """Launches of our kernels by name, and torch's operations by name, of one step."""

    launches: Counter[str]
    operations: Counter[str]

    @property
    def total(self) -> int:
        return self.launches.total() + self.operations.total()


def images(case: Case) -> Tensor:
    """Two, as small as the network takes them to 8x8 features in its first block."""
    size = 8 if case.is_cifar else 32
    return torch.randn(2, 3, *[size] * case.spatial_dims)


def network(save: str, arguments: dict[str, Any]) -> nn.Module:
    """A network with ``save``, or the naive one; its weights are of no interest."""
    if save == "naive":
        return reference.DenseNet(**arguments)
    return effdense.DenseNet(**arguments, save=save, backend="triton")  # type: ignore[arg-type]


def one_step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Forward and backward of a sum; gradients are made anew each time, as after zero_grad."""
    parameters = list(model.parameters())

    def step() -> None:
        model(images).sum().backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def count(model: nn.Module, images: Tensor, driver: CountingDriver) -> Counts:
    """Of the second step: the first one looks things up."""
    step = one_step(model, images)
    step()
    driver.launches.clear()
    with OperationCounter() as counter:
        step()
    return Counts(driver.launches.copy(), counter.operations)


class PerLayer(NamedTuple):
    """Launches, torch's included: of one more layer, and of one more block beside its layers."""

    layer: float
    block: float
    whole: Counts


def per_layer(save: str, arguments: dict[str, Any], images: Tensor) -> PerLayer:
    """By difference: the network, it with a layer less in its last block, and without that block.

    A network's parts that come once (stem, classifier, loss) are in neither figure. A layer less
    in an earlier block would change what transitions halve, and so which rows are padded.
    """
    driver = CountingDriver()
    with driver.active():

        def counted(config: tuple[int, ...]) -> Counts:
            return count(network(save, arguments | {"block_config": config}), images, driver)

        config = tuple(arguments["block_config"])
        whole = counted(config)
        layer = float(whole.total - counted((*config[:-1], config[-1] - 1)).total)
        block = whole.total - counted(config[:-1]).total - config[-1] * layer
    return PerLayer(layer, block, whole)


def host_seconds(
    arguments: dict[str, Any], saves: list[str], images: Tensor, rounds: int = 9
) -> dict[str, list[float]]:
    """Processor seconds of a step of each, in turn, the first round untimed.

    Of this process: what others do on the machine, and waiting for them, is not in it.
    """
    found: dict[str, list[float]] = {save: [] for save in saves}
    with CountingDriver().active():
        steps = {save: one_step(network(save, arguments), images) for save in saves}
        for i in range(rounds + 1):
            for save, step in steps.items():
                start = time.process_time()
                step()
                if i:
                    found[save].append(time.process_time() - start)
    return found


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Of rounds' ratios, so that a slow moment of the machine touches both sides."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
