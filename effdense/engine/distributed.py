"""How the processes of a run find each other, agree and stop.

One process per device, started by torchrun; without torchrun there is one process and no
process group, and everything below works unchanged.
"""

from __future__ import annotations

import datetime
import gc
import inspect
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import TrainingError, UserError, first_line

T = TypeVar("T")

# A download by one process, which the others wait for, may take this long.
_TIMEOUT = datetime.timedelta(minutes=30)


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
    """The same, but that processes which torchrun has restarted keep it."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


def launched_processes() -> tuple[int, int]:
    """Processes in all and on this machine, as the launcher says; (1, 1) without one."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return world_size, int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))


@contextmanager
def joined_world(device: Literal["auto", "cpu", "cuda"], threads: int) -> Iterator[World]:
    """Join the process group, if there is one, and leave it at the end.

    GPUs use nccl, with gloo beside it for what lives in main memory; processors use gloo, and
    so do several processes that share a GPU, which nccl refuses. After an error the group is
    not left but abandoned: to leave it would wait for processes that may never come.

    Raises:
        UserError: when "cuda" is asked for and there is none.
    """
    world_size, local_world_size = launched_processes()
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.set_num_threads(threads)
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: no GPU that torch can use; leave it out or use cpu")
    if gpus:
        chosen = torch.device("cuda", local_rank % gpus)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
    if world_size == 1:
        yield World(rank, world_size, local_rank, local_world_size, chosen, None)
        return
    backend = "nccl" if gpus >= local_world_size else "gloo"
    store, attempt, launch = _met()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
        device_id=chosen if backend == "nccl" else None,
    )
    yield World(rank, world_size, local_rank, local_world_size, chosen, backend, attempt, launch)
    dist.barrier()
    leave_process_group()


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


def gathered_tensor(values: Tensor) -> list[Tensor]:
    """The tensors of all processes, of one shape, in the order of their ranks."""
    if not dist.is_initialized():
        return [values]
    all_values = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(all_values, values)
    return all_values


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
    network, whose statistics have seen all shares.
    """
    if not dist.is_initialized():
        return
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
        same = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = torch.cat([buffer.flatten() for buffer in same])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for buffer, mean in zip(same, flat.split([b.numel() for b in same]), strict=True):
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
