"""Splits over rows, the launch table, and the search's memory."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, Store

pytest.importorskip("triton")

from effdense.backends.told import Told
from effdense.kernels.launch_search import SearchedLaunchTable
from effdense.kernels.launch_table import Architecture, Launch, LaunchTable
from effdense.kernels.layouts import alignment, power_of_two

H100 = Architecture("cuda", 90, 132)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 1000, 2**33 + 1])
@pytest.mark.parametrize("tiles", [1, 3, 500])
def test_ranges_cover_the_rows(rows: int, tiles: int) -> None:
    launch = Launch(16, programs=64)
    length, ranges = launch.split_rows(rows, tiles)
    assert length % 16 == 0
    assert (ranges - 1) * length < rows <= ranges * length
    assert ranges * tiles <= max(64, tiles)


def test_alignment_and_powers() -> None:
    assert [alignment(n) for n in (0, 1, 24, 36, 48, 4096)] == [16, 1, 8, 4, 16, 16]
    assert alignment(1032, 528) == 8
    assert [power_of_two(n, 16, 128) for n in (1, 16, 17, 96, 129)] == [16, 16, 32, 128, 128]


def test_search_is_remembered(tmp_path: Path) -> None:
    x = torch.zeros(100, 64)
    timed: list[Launch] = []

    def time(run: Callable[[], object]) -> float:
        run()
        # the fewer warps the better
        return timed[-1].num_warps

    def table() -> SearchedLaunchTable:
        return SearchedLaunchTable(H100, "A device / with a name", tmp_path, time)

    first = table()
    plain = LaunchTable(H100)("map", x, 64)
    assert first("map", x, 64) == plain
    first.search("map", x, 64, 0, timed.append)
    assert len(timed) > 3
    assert first("map", x, 64).num_warps == plain.num_warps // 2
    # another process, the same class of shapes: nothing is timed
    count = len(timed)
    second = table()
    second.search("map", x[:90], 64, 0, timed.append)
    assert len(timed) == count
    assert second("map", x[:90], 64) == first("map", x, 64)
    # another class
    assert second("map", x.half(), 64) == LaunchTable(H100)("map", x.half(), 64)
    (file,) = tmp_path.iterdir()
    assert "triton" in file.name
    assert torch.__version__ in file.name


def test_a_damaged_memory_is_no_error(tmp_path: Path) -> None:
    table = SearchedLaunchTable(H100, "device", tmp_path, lambda run: 1.0)
    table.file.parent.mkdir(exist_ok=True)
    table.file.write_text("{")
    again = SearchedLaunchTable(H100, "device", tmp_path, lambda run: 1.0)
    assert again.choices == {}


def test_the_faster_way_is_remembered(tmp_path: Path) -> None:
    x = torch.zeros(100, 64)
    ran: list[str] = []

    def table(seconds: dict[str, float]) -> SearchedLaunchTable:
        def time(run: Callable[[], object]) -> float:
            run()
            return seconds[ran[-1]]

        return SearchedLaunchTable(H100, "device", tmp_path, time)

    ways = {name: partial(ran.append, name) for name in ("ours", "vendor")}
    first = table({"ours": 2.0, "vendor": 1.0})
    assert first.choose("conv3", x, 64, 12, ways) == "vendor"
    assert ran == ["ours", "vendor"]
    # another process finds it there, and times nothing
    assert table({}).choose("conv3", x[:90], 64, 12, ways) == "vendor"
    assert len(ran) == 2
    # what is not to be had any more is searched again
    del ways["vendor"]
    assert table({"ours": 2.0}).choose("conv3", x, 64, 12, ways) == "ours"


@pytest.mark.parametrize(
    "device", [H100, Architecture("cuda", 80, 108), Architecture("hip", 0, 304)]
)
@pytest.mark.parametrize(
    ("rows", "bottleneck"),
    # of the README's networks: their largest and smallest blocks
    [(65536, 48), (4096, 48), (4096, 96), (100352, 128), (6272, 128), (1568, 128)],
)
def test_products_fill_the_device(device: Architecture, rows: int, bottleneck: int) -> None:
    x = torch.empty(rows, 528, dtype=torch.bfloat16, device="meta")
    found = LaunchTable(device)("product", x, 516, bottleneck)
    programs = -(-rows // found.block_p) * -(-bottleneck // found.block_b)
    assert programs >= device.multiprocessors
    # and no smaller than that takes
    assert found.block_p * found.block_b >= 64 * 64 or programs < 4 * device.multiprocessors


def table_of(folder: Path, rank: int, store: Store, seconds: dict[str, float]) -> tuple[Any, Any]:
    """A process's table, and what it has timed; ``seconds`` by alternative."""
    ran: list[str] = []

    def time(run: Callable[[], object]) -> float:
        run()
        return seconds[ran[-1]]

    told = Told("H100", store, rank, timedelta(seconds=0.2))
    ways = {name: partial(ran.append, name) for name in seconds}
    table = SearchedLaunchTable(H100, "device", folder / str(rank), time, told)
    return lambda x: table.choose("conv3", x, 64, 12, ways), ran


def test_rank_0_tries_and_tells(tmp_path: Path) -> None:
    store, x = HashStore(), torch.zeros(100, 64)
    zero, ran_0 = table_of(tmp_path, 0, store, {"ours": 2.0, "vendor": 1.0})
    one, ran_1 = table_of(tmp_path, 1, store, {"ours": 1.0, "vendor": 2.0})
    assert (zero(x), one(x)) == ("vendor", "vendor")
    assert (ran_0, ran_1) == (["ours", "vendor"], [])
    # told again from what rank 0 has on disk, to a process that begins later
    store = HashStore()
    zero, ran_0 = table_of(tmp_path, 0, store, {"ours": 0.0, "vendor": 1.0})
    one, ran_1 = table_of(tmp_path, 1, store, {"ours": 1.0, "vendor": 2.0})
    assert (zero(x), one(x), ran_0, ran_1) == ("vendor", "vendor", [], [])
    # a share of a batch that rank 0 never has: nobody waits for ever, and only once
    assert one(x[:50].half()) is None
    assert zero(x[:50].half()) == "ours"
    assert one(x[:50].half()) is None
    assert ran_1 == []


def test_another_device_is_not_told_what_is_true_of_rank_0s() -> None:
    store = HashStore()
    assert Told("H100", store, 0)("question", lambda: 1) == 1
    assert Told("H100", store, 1)("question", lambda: 2) == 1
    assert Told("A100", store, 2)("question", lambda: 2) is None
    # alone, a process is asked itself
    assert Told("H100")("question", lambda: 3) == 3
