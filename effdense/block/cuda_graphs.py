"""``effdense.cuda_graphs``: a model's training steps by CUDA graphs, on the device itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line
from .recording import CannotCapture, Device, Recording


class CudaGraphs:
    """What of a model runs by CUDA graphs, and why what does not.

    Attributes:
        stages: names of the modules whose stage was captured, in the order of a step.
        left_out: why other stages were not, by name.
        fault: why none is used: what went wrong; None where nothing did.
    """

    def __init__(self, recording: Recording | None, fault: str | None) -> None:
        self._recording = recording
        self.fault = fault
        self.stages = tuple(stage.name for stage in recording.stages) if recording else ()
        self.left_out = dict(recording.left_out) if recording else {}

    def release(self) -> None:
        """Run everything as without graphs from now on, and give back their memory."""
        if self._recording is not None:
            self._recording.release()
        self._recording, self.stages = None, ()

    def __str__(self) -> str:
        if self.fault is not None:
            return f"no CUDA graphs: {self.fault}"
        if self._recording is not None and not self.stages and not self.left_out:
            return (
                'no CUDA graphs: the model has none of effdense\'s stages (save="all" is autograd)'
            )
        said = [f"{len(self.stages)} stages by CUDA graphs"]
        said += [f"{name} without: {reason}" for name, reason in self.left_out.items()]
        return "; ".join(said) + "; other batch sizes and evaluation run without"


def cuda_graphs(model: nn.Module, *inputs: Any) -> CudaGraphs:
    """Capture the training steps of a model's dense blocks, transitions and stem as CUDA graphs.

    From then on ``model(x)`` for an ``x`` of the same shape, type and place starts each of these
    stages as a whole, forward and backward, where it would launch hundreds of kernels. Results
    are the same, dropout draws a new mask each step, and all around (loss, optimiser, gradient
    scaling, accumulation, DistributedDataParallel) stays as it is. What has another shape, or
    needs no gradients, or was changed since (a norm frozen, a parameter replaced) runs without
    graphs, as does what can't be captured: norms without momentum, offloaded blocks, recomputed
    layers (of another kind than BN-ReLU-Conv) that draw random numbers, and those of one's own.

    Norms that synchronise are captured with NCCL and within :func:`effdense.known_images`: with
    other images than these in any process the stage runs without its graph in all. Every process
    must call this function, and where one of them can't capture, none does.

    The first replay is compared with the same step without graphs. If they differ, or if
    capturing fails, no graph is used, and a warning says why. The model's buffers and the random
    states are afterwards what they were.

    Args:
        model: on a GPU, in the modes that it will be trained in; before DistributedDataParallel
            takes it, whose backwards belong to another stream than a capture's (with torch 2.14,
            which can make an exception of them, also within it), and with no loss of an earlier
            step alive. To be called within the autocast that it will be trained in.
        inputs: what it is called with, of the shapes of a training step.

    Known limitations: the captured stages' memory is theirs until ``release()``, about a step's
    without graphs; a step's backward must come before its model's next forward, else that one
    runs without graphs; ``retain_graph`` raises. Never run on a GPU yet: tests replay what was
    recorded on a CPU.

    Raises:
        ValueError: where no input is a tensor on a GPU.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    if not tensors:
        raise ValueError("cuda_graphs needs an input that is a tensor, of a training step's shape")
    recording = Recording(_device(tensors[0]), inner)
    try:
        if inner is not model and not recording.device.records_stale_streams():
            raise CannotCapture(
                "this version of torch can't capture what DistributedDataParallel holds: call "
                "cuda_graphs before it takes the model"
            )
        recording.run(lambda: inner(*inputs))
    except CannotCapture as error:
        fault = first_line(error)
        warnings.warn(f"effdense: CUDA graphs are not used: {fault}", RuntimeWarning, stacklevel=2)
        return CudaGraphs(None, fault)
    return CudaGraphs(recording, None)


def _device(x: Tensor) -> Device:
    """What records there; tests have something else."""
    if x.device.type != "cuda":
        raise ValueError(f"CUDA graphs need a GPU, got an input on {x.device}")
    return _CudaDevice(x.device)


class _CudaDevice:
    """Streams, graphs and one pool of memory of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def current(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device)

    def warm_up(self, function: Callable[[], Any]) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            found = function()
        torch.cuda.current_stream().wait_stream(self._stream)
        return found

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # other threads (loaders, NCCL's watchdog) go on with what a capture must not do
        options: Any = {"stream": self._stream, "capture_error_mode": "thread_local"}
        before = torch.cuda.current_stream()
        try:
            with _stale_streams_recorded(), torch.cuda.graph(graph, pool=self._pool, **options):
                found = function()
        except BaseException:
            self._leave(before)
            raise
        return found, graph.replay

    def _leave(self, stream: torch.cuda.Stream) -> None:
        """What torch leaves undone where a capture can't be ended.

        Its graph's context stays on the capture's stream, the allocator goes on to believe that a
        capture is under way (and frees nothing that other streams used), and so does the random
        generator. Each raises where there is nothing to be done.
        """
        torch.cuda.set_stream(stream)
        index = self._device.index
        # as torch 2.7 calls it, and later ones
        for name in ("_cuda_endAllocateCurrentStreamToPool", "_cuda_endAllocateToPool"):
            with suppress(RuntimeError, AttributeError):
                getattr(torch._C, name)(index, self._pool)
        with suppress(RuntimeError):
            generator = torch.cuda.default_generators[index]
            fresh = torch.Generator(self._device)
            fresh.set_state(generator.get_state())
            generator.graphsafe_set_state(fresh.graphsafe_get_state())

    def records_stale_streams(self) -> bool:
        return _override_stale_streams() is not None

    def records_collectives(self, group: Any) -> bool:
        return "cuda:nccl" in torch.distributed.get_backend_config(group)

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self._device)

    def set_random_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self._device)


def _override_stale_streams() -> Callable[[bool], None] | None:
    return getattr(torch.autograd.graph, "set_override_stale_capture_stream", None)


@contextmanager
def _stale_streams_recorded() -> Iterator[None]:
    """Inside, what autograd holds for another stream (of a loss that lives) is captured, too."""
    override = _override_stale_streams()
    if override is None:
        yield
        return
    before = torch._C._override_stale_capture_stream()
    override(True)
    try:
        yield
    finally:
        override(before)
