"""Which device each process takes and what reduces gradients: agreed, whoever started them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from effdense.engine.distributed import Place, Placement, joined_world
from effdense.errors import UserError
from tests.helpers.ranks import RUN, Ranks


def place(host: str, *gpus: int, local_rank: int | None = None) -> Place:
    return Place(host, tuple(f"{host}/GPU-{gpu}" for gpu in gpus), local_rank)


def test_a_gpu_for_each_process() -> None:
    # torchrun on two machines, each process sees all of its machine's
    places = [place(host, 0, 1, local_rank=local) for host in "ab" for local in (0, 1)]
    found = Placement.of(places, "auto")
    assert found.backend == "nccl"
    assert found.gpus == ("a/GPU-0", "a/GPU-1", "b/GPU-0", "b/GPU-1")
    assert found.local_ranks == (0, 1, 0, 1)
    assert found.local_world_sizes == (2, 2, 2, 2)
    assert [found.sharing(rank) for rank in range(4)] == [1] * 4


def test_local_ranks_follow_from_hosts_where_the_launcher_names_none() -> None:
    found = Placement.of([place(host, 0, 1) for host in ("a", "a", "b", "b")], "cuda")
    assert (found.backend, found.local_ranks) == ("nccl", (0, 1, 0, 1))
    # ranks dealt out in turn
    found = Placement.of([place(host, 0, 1) for host in ("a", "b", "a", "b")], "cuda")
    assert (found.backend, found.local_ranks) == ("nccl", (0, 0, 1, 1))


def test_a_scheduler_that_shows_each_task_one_gpu() -> None:
    # each sees its own as number 0; the local rank may be told or not
    for told in (True, False):
        places = [place("a", gpu, local_rank=gpu if told else None) for gpu in range(4)]
        found = Placement.of(places, "auto")
        assert found.backend == "nccl"
        assert found.gpus == tuple(f"a/GPU-{gpu}" for gpu in range(4))


def test_processes_that_share_gpus_all_use_gloo() -> None:
    found = Placement.of([place("a", 0, 1) for _ in range(4)], "auto")
    assert (found.backend, found.sharing(0)) == ("gloo", 2)
    # machines with unequal numbers of them: each alone would have decided otherwise
    places = [place("a", 0, 1), place("a", 0, 1), place("b", 0), place("b", 0)]
    found = Placement.of(places, "auto")
    assert found.backend == "gloo"
    assert [found.sharing(rank) for rank in range(4)] == [1, 1, 2, 2]


def test_processors() -> None:
    found = Placement.of([place("a"), place("a"), place("b")], "auto")
    assert (found.backend, found.gpus, found.sharing(2)) == ("gloo", (), 1)
    assert found.local_world_sizes == (2, 2, 1)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_some_without_a_gpu_is_one_error_for_all(device: str) -> None:
    places = [place("a", 0), place("b"), place("c")]
    with pytest.raises(UserError, match=r"rank 1, on b, sees no GPU .*, but others do: start"):
        Placement.of(places, device)


def test_cuda_without_any() -> None:
    with pytest.raises(UserError, match="--device cuda: no GPU that torch can use"):
        Placement.of([place("a")], "cuda")
    with pytest.raises(UserError, match="rank 0, on a, sees no GPU that torch can use: start"):
        Placement.of([place("a"), place("b")], "cuda")


def test_what_one_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        def __init__(self, index: int) -> None:
            if index:
                self.uuid = f"uuid-{index}"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    own = Place.own("auto")
    # by what the driver calls it, or what it was shown as where that is not to be had
    assert own.gpus == (f"{own.host}/5", f"{own.host}/uuid-1")
    assert own.local_rank is None
    assert Place.own("cpu").gpus == ()
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert Place.own("cpu").local_rank == 3
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with joined_world("auto", torch.get_num_threads()) as world:
        assert (world.device, world.local_rank, world.sharing) == (torch.device("cuda", 1), 3, 1)
    assert chosen == [torch.device("cuda", 1)]


def without_local_words(rank: int) -> None:
    del os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]


def test_a_launcher_that_tells_ranks_and_no_more(tmp_path: Path) -> None:
    with Ranks(tmp_path, [*RUN, "--epochs", 1], 2, without_local_words) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    assert "2 processes on cpu through gloo" in ranks.said()
