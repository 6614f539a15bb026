"""How the processes of a run find each other, agree and stop.

One process per device, started by torchrun; without torchrun there is one process and no
process group, and everything below works unchanged.
"""

from __future__ import annotations

import datetime
import gc
import inspect
import itertools
import json
import math
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import TrainingError, UserError, first_line

T = TypeVar("T")

# A download by one process, which the others wait for, may take this long.
_TIMEOUT = datetime.timedelta(minutes=30)

# Of the runs of this process, which all processes begin in the same order.
_RUNS = itertools.count(1)


@dataclass(frozen=True)
class World:
    """This process's place among all, and its device."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    backend: str | None
    """What reduces gradients, "nccl" or "gloo"; None for a single process."""
    attempt: str = ""
    """A name that these processes have in common with no others; empty for a single process."""
    launch: str = ""
    """The same, but that processes which torchrun has restarted find it again: of a script's
    first run its first."""
    sharing: int = 1
    """Processes on this process's GPU, itself included; 1 on a processor."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


def launched_processes() -> tuple[int, int]:
    """Processes in all and on this machine, as the launcher says; (1, 1) without one."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return world_size, int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))


@dataclass(frozen=True)
class Place:
    """What one process knows of where it runs, before it has met the others."""

    host: str
    gpus: tuple[str, ...]
    """Names of those that it sees, each the same in every process that sees it."""
    local_rank: int | None = None
    """What the launcher says of it; None where it says nothing."""

    @classmethod
    def own(cls, device: str) -> Place:
        """This process's; a processor's has no GPUs."""
        host, local_rank = platform.node(), os.environ.get("LOCAL_RANK")
        seen = torch.cuda.device_count() if device != "cpu" else 0
        gpus = tuple(_gpu_name(host, i) for i in range(seen))
        return cls(host, gpus, None if local_rank is None else int(local_rank))


def _gpu_name(host: str, index: int) -> str:
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if uuid is not None:
        return f"{host}/{uuid}"
    # a ROCm build, or an old torch: what a scheduler shows, or the number
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("HIP_VISIBLE_DEVICES")
    return f"{host}/{shown.split(',')[index] if shown else index}"


@dataclass(frozen=True)
class Placement:
    """Where all processes run: the same in each of them, as it follows from all :class:`Place`.

    A process takes the GPU of its local rank, or of those that it sees the one at that place,
    where a scheduler shows it fewer. nccl wants a GPU for each process.
    """

    backend: Literal["nccl", "gloo"]
    local_ranks: tuple[int, ...]
    local_world_sizes: tuple[int, ...]
    gpus: tuple[str, ...]
    """Of each process; empty on processors."""

    @classmethod
    def of(cls, places: Sequence[Place], device: str) -> Placement:
        """By the places in the order of ranks.

        Raises:
            UserError: where some processes see GPUs and some none, or "cuda" is asked for and
                there are none.
        """
        hosts = [place.host for place in places]
        local_ranks = tuple(
            hosts[:rank].count(place.host) if place.local_rank is None else place.local_rank
            for rank, place in enumerate(places)
        )
        without = [rank for rank, place in enumerate(places) if not place.gpus]
        if without and (device == "cuda" or len(without) < len(places)):
            if len(places) == 1:
                raise UserError("--device cuda: no GPU that torch can use; leave it out or use cpu")
            raise UserError(
                f"rank {without[0]}, on {hosts[without[0]]}, sees no GPU that torch can use"
                + (", but others do" if len(without) < len(places) else "")
                + ": start a process for each GPU, or let all use --device cpu"
            )
        gpus = tuple(
            place.gpus[local % len(place.gpus)]
            for local, place in zip(local_ranks, places, strict=True)
            if place.gpus
        )
        alone = bool(gpus) and len(set(gpus)) == len(gpus)
        sizes = tuple(hosts.count(host) for host in hosts)
        return cls("nccl" if alone else "gloo", local_ranks, sizes, gpus)

    def sharing(self, rank: int) -> int:
        """Processes on the GPU of ``rank``, itself included; 1 on processors."""
        return self.gpus.count(self.gpus[rank]) if self.gpus else 1


@contextmanager
def joined_world(device: Literal["auto", "cpu", "cuda"], threads: int) -> Iterator[World]:
    """Join the process group, if there is one, and leave it at the end.

    GPUs use nccl, with gloo beside it for what lives in main memory; processors use gloo, and
    so do all processes where some share a GPU, which nccl refuses. Which it is follows from what
    every process sees, so that none waits for others in another group. After an error the group
    is not left but abandoned: to leave it would wait for processes that may never come.

    Raises:
        UserError: on every process, when "cuda" is asked for and there is none, or some
            processes see GPUs and some none.
    """
    world_size, local_world_size = launched_processes()
    rank = int(os.environ.get("RANK", "0"))
    torch.set_num_threads(threads)
    own = Place.own(device)
    if world_size == 1:
        placement = Placement.of([own], device)
        chosen = _chosen(own, placement.local_ranks[0])
        yield World(rank, 1, placement.local_ranks[0], local_world_size, chosen, None)
        return
    store, attempt, launch = _met()
    # a script may begin run after run, with the same options
    launch = f"{launch}-{next(_RUNS)}"
    placement = Placement.of(_places(store, rank, world_size, own), device)
    chosen, backend = _chosen(own, placement.local_ranks[rank]), placement.backend
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
        device_id=chosen if backend == "nccl" else None,
    )
    yield World(
        rank,
        world_size,
        placement.local_ranks[rank],
        placement.local_world_sizes[rank],
        chosen,
        backend,
        attempt,
        launch,
        placement.sharing(rank),
    )
    dist.barrier()
    leave_process_group()


def _places(store: dist.Store, rank: int, world_size: int, own: Place) -> list[Place]:
    """Those of all processes, in the order of their ranks."""
    store.set(f"place/{rank}", json.dumps(asdict(own)))
    found = (json.loads(store.get(f"place/{other}")) for other in range(world_size))
    return [Place(place["host"], tuple(place["gpus"]), place["local_rank"]) for place in found]


def _chosen(own: Place, local_rank: int) -> torch.device:
    if not own.gpus:
        return torch.device("cpu")
    chosen = torch.device("cuda", local_rank % len(own.gpus))
    torch.cuda.set_device(chosen)
    return chosen


def leave_process_group() -> None:
    """Leave the default process group, and let go of what holds it."""
    # What holds the group in cycles (DDP) would keep it, and its threads, until the interpreter
    # is torn down, and a thread that wants the interpreter then aborts the process.
    gc.collect()
    dist.destroy_process_group()


def _met(timeout: datetime.timedelta = _TIMEOUT) -> tuple[dist.PrefixStore, str, str]:
    """Meet the other processes in their common store.

    torchrun's agent serves one store for all attempts of a launch, though processes that read
    what dead ones have left there meet nobody; and it tells the number of the attempt only as its
    own machine counts. So every process asks rank 0 with a word of its own, and rank 0, which
    alone knows its word, answers those that live: one round trip each.

    Returns:
        The store under a name that no earlier attempt has used, that name, and the launch's.

    Raises:
        TrainingError: where a process does not come in time.
    """
    common, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store, own = dist.PrefixStore("effdense/meeting", common), uuid.uuid4().hex
    try:
        if rank == 0:
            attempt, end = own, time.monotonic() + timeout.total_seconds()
            missing = set(range(1, world_size))
            while missing := {other for other in missing if not store.check([f"{own}/{other}"])}:
                if time.monotonic() > end:
                    raise TrainingError(f"rank {min(missing)} did not come within {timeout}")
                # an earlier attempt's words may be answered too: nobody hears it
                for other in missing:
                    if store.check([str(other)]):
                        store.set(store.get(str(other)).decode(), own)
                time.sleep(0.01)
        else:
            store.set(str(rank), own)
            store.wait([own], timeout)
            attempt = store.get(own).decode()
            store.set(f"{attempt}/{rank}", "")
        launch = store.compare_set("launch", "", attempt).decode()
    except dist.DistError as error:
        raise TrainingError(f"rank {rank} met no rank 0 within {timeout}: {error}") from None
    return dist.PrefixStore(f"effdense/{attempt}", common), attempt, launch


@contextmanager
def all_or_none() -> Iterator[None]:
    """Run the body on every process; a :class:`UserError` on any of them is raised on all.

    The body must not communicate.
    """
    said = ""
    try:
        yield
    except UserError as error:
        said = str(error)
    for message in gathered(said):
        if message:
            raise UserError(message)


def in_turns(turn: int, make: Callable[[], T]) -> T:
    """What ``make`` returns, called by processes of turn 0 first, then of 1 and of 2; a collective.

    Raises:
        UserError: on every process, where it is raised on any.
    """
    made: list[T] = []
    for now in range(3):
        with all_or_none():
            if now == turn:
                made.append(make())
    return made[0]


@contextmanager
def lost_processes(world: World, doing: Callable[[], str]) -> Iterator[None]:
    """Say in words where an exchange with the other processes fails within the body.

    What raises then depends on what has gone wrong elsewhere: gloo's sockets a RuntimeError of
    gloo's, NCCL and the store a DistError. Nothing else is touched.

    Args:
        world: this process's place.
        doing: what this process is doing.

    Raises:
        TrainingError: on this process alone; the others find out by themselves.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise TrainingError(
            f"rank {world.rank} (process {os.getpid()} on {platform.node()}) lost the other "
            f"processes {doing()}: {first_line(error)}"
        ) from error


def gathered(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gathered_on_main(value: T) -> list[T]:
    """On rank 0 the values of all processes, in the order of their ranks; elsewhere none."""
    if not dist.is_initialized():
        return [value]
    is_main = dist.get_rank() == 0
    values: list[Any] = [None] * dist.get_world_size() if is_main else []
    dist.gather_object(value, values if is_main else None)
    return values


def from_main(value: T) -> T:
    """Rank 0's value, on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def largest(values: Sequence[float]) -> list[float]:
    """The element-wise maximum over all processes, through main memory."""
    if not dist.is_initialized():
        return list(values)
    agreed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return agreed.tolist()


class LateLargest:
    """:func:`largest`, of what was given to the call before: nobody waits for it.

    What is given travels while the next step is computed. A collective: every process makes
    the same calls, the last of them with ``last``, which leaves nothing on its way.
    """

    def __init__(self) -> None:
        self._on_its_way: tuple[Any, Tensor] | None = None

    def __call__(self, values: Sequence[float], last: bool) -> list[float]:
        if not dist.is_initialized():
            return list(values)
        found = [0.0] * len(values)
        if self._on_its_way is not None:
            work, agreed = self._on_its_way
            work.wait()
            found, self._on_its_way = agreed.tolist(), None
        if not (last or any(found)):
            given = torch.tensor(values, dtype=torch.float64)
            work = dist.all_reduce(given, dist.ReduceOp.MAX, async_op=True)
            self._on_its_way = work, given
        return found


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every element of this process's tensors is finite, (): a few launches for all."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    # each one's largest absolute value; a NaN stays one
    most = [torch.stack(torch._foreach_norm(same, math.inf)) for same in by_dtype.values()]
    return torch.cat([values.double() for values in most]).isfinite().all()


def everywhere(holds: Tensor) -> Tensor:
    """Whether a flag () is set on all processes, by their devices: no host waits."""
    if not dist.is_initialized():
        return holds
    broken = (~holds).to(torch.int32)
    dist.all_reduce(broken, dist.ReduceOp.MAX)
    return broken == 0


def summed(values: Tensor) -> Tensor:
    """The sum over all processes; ``values`` is left as it is."""
    if not dist.is_initialized():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def average_running_statistics(model: nn.Module) -> None:
    """Replace the norms' running statistics by their mean over all processes.

    Batch statistics are those of each process's share of the batch, so the running ones drift
    apart. Averaged before each evaluation, every process evaluates, and rank 0 saves, the same
    network, whose statistics have seen all shares. Those that are the same on every process, as
    of frozen norms, stay as they are.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not dist.is_initialized() or not buffers:
        return
    # in float64 the sum of equal float32 numbers, and so their mean, is exact
    flat = torch.cat([buffer.flatten().double() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def data_parallel(model: nn.Module, world: World) -> nn.Module:
    """The model whose backward averages gradients over all processes.

    Batch norm's statistics stay per process, those of b / N images where N processes share a
    batch of b, unless the norms synchronise. :func:`average_running_statistics` says what becomes
    of the running ones.
    """
    if world.world_size == 1:
        return model
    # torch 2.14 gave the option another name and warns at the old one
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
    if world.device.type == "cuda":
        options["device_ids"] = [world.device.index]
    return DistributedDataParallel(model, **options)
