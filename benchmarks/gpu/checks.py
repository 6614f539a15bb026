"""What must hold on a device besides right operations: waits, graphs, places, bits, launches."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import effdense

from .networks import FULL, TINY, Network, Step
from .sheet import Sheet


def run(sheet: Sheet, device: torch.device, tiny: bool) -> None:
    network = TINY[0]
    for what, check in (
        ("two runs with --deterministic", _deterministic),
        ("steps by CUDA graphs", _graphs),
        ("steps of the trainer that never wait for the GPU", _waits),
        ("a network on the last GPU while the first is current", _last_device),
        ("launches of a layer", _launches),
    ):
        if not sheet.has_time("checks", what, 5):
            continue
        try:
            check(sheet, what, network, device)
        except Exception as error:
            sheet.failed("checks", what, error)


def _model(network: Network, device: torch.device, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return effdense.DenseNet(**network.arguments(), **options).to(device)


def _state_after(
    network: Network, device: torch.device, prepare: Callable[[Step], None] = lambda step: None
) -> list[Tensor]:
    """Weights and buffers after three steps, with dropout."""
    step = Step(_model(network, device, drop_rate=0.2), network, torch.float32, device)
    prepare(step)
    torch.manual_seed(1)
    for _ in range(3):
        step()
    return [t.detach().clone() for t in step.model.state_dict().values()]


def _difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest, relative to each tensor's largest value."""
    pairs = zip(one, other, strict=True)
    found = [((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in pairs]
    return max(found)


def _deterministic(sheet: Sheet, what: str, network: Network, device: torch.device) -> None:
    # which torch before 2.9 asks of products then
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        pair = [_state_after(network, device) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    equal = all(torch.equal(a, b) for a, b in zip(*pair, strict=True))
    sheet.check("checks", what, equal, note="three steps; weights and buffers compared bit for bit")


def _graphs(sheet: Sheet, what: str, network: Network, device: torch.device) -> None:
    if device.type != "cuda":
        sheet.skip("checks", what, "no GPU")
        return
    said = []

    def capture(step: Step) -> None:
        with warnings.catch_warnings(record=True):
            said.append(effdense.cuda_graphs(step.model, step.images))

    without, replayed = _state_after(network, device), _state_after(network, device, capture)
    difference = _difference(replayed, without)
    holds = said[0].fault is None and difference < 1e-3
    sheet.check("checks", what, holds, difference, f"after three steps; {said[0]}")


def _waits(sheet: Sheet, what: str, network: Network, device: torch.device) -> None:
    try:
        from effdense.engine.distributed import joined_world
        from effdense.engine.options import TrainConfig
        from effdense.engine.tasks import Classification
        from effdense.engine.trainer import Trainer
    except ImportError as error:
        sheet.skip("checks", what, f"{error.name} is not installed")
        return
    options: Any = {"data": "fake", "batch_size": network.batch, "image_size": network.pixels}
    config = TrainConfig(**options, threads=1, ema=0.9, clip_grad=1.0).resolved()
    with joined_world("auto" if device.type == "cuda" else "cpu", threads=1) as world:
        trainer = Trainer(
            _model(network, world.device), config, world, Classification(tuple("abcdefghij"))
        )
        images = torch.randn(network.shape, device=world.device)
        labels = torch.arange(network.batch, device=world.device) % 10
        trainer.network.train()
        trainer.step(images, labels, network.batch, lr=0.1)
        if device.type != "cuda":
            sheet.skip("checks", what, "no GPU")
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                trainer.step(images, labels, network.batch, lr=0.1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    sheet.check(
        "checks", what, True, note="ten, with clipping and averaged weights; to wait is an error"
    )


def _last_device(sheet: Sheet, what: str, network: Network, device: torch.device) -> None:
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        sheet.skip("checks", what, "one GPU; it takes two" if count else "no GPU")
        return
    last = torch.device("cuda", count - 1)
    with torch.cuda.device(0):
        difference = _difference(
            [t.cpu() for t in _state_after(network, last)],
            [t.cpu() for t in _state_after(network, torch.device("cuda", 0))],
        )
    sheet.check("checks", what, difference < 1e-3, difference, f"{last} against cuda:0")


def _launches(sheet: Sheet, what: str, network: Network, device: torch.device) -> None:
    """By difference: a network, and it with a layer less in each block."""
    if device.type != "cuda":
        _counted(sheet, what, network)
        return
    arguments = FULL[0].arguments()
    config, found = arguments["block_config"], {}
    images = torch.randn(8, 3, 32, 32, device=device)
    for save in ("features", "bottlenecks", "naive"):
        counts = [
            _kernels(save, arguments | {"block_config": tuple(n - less for n in config)}, images)
            for less in (0, 1)
        ]
        found[save] = (counts[0] - counts[1]) / len(config)
        if save != "naive":
            note = "kernels of forward and backward, at most 12"
            sheet.check("checks", f"{what}, {save}", found[save] <= 12, found[save], note)
    note = "kernels of forward and backward of the naive network"
    sheet.measured("checks", f"{what}, naive", found["naive"], "", note)


def _counted(sheet: Sheet, what: str, network: Network) -> None:
    """Without a GPU: by Triton's host code, in front of a driver that launches nothing."""
    try:
        launches = importlib.import_module("benchmarks.harness.launches")
    except ImportError as error:
        sheet.skip("checks", what, f"{error.name} is not installed")
        return
    images = torch.randn(2, 3, 8, 8)
    for save in ("features", "bottlenecks"):
        found = launches.per_layer(save, network.arguments(), images).layer
        note = "kernels of forward and backward, at most 12; counted where nothing is launched"
        sheet.check("checks", f"{what}, {save}", found <= 12, found, note)


def _kernels(save: str, arguments: dict[str, Any], images: Tensor) -> int:
    from torch.profiler import ProfilerActivity, profile

    from effdense import reference

    options: Any = arguments if save == "naive" else arguments | {"save": save}
    kind: Any = reference.DenseNet if save == "naive" else effdense.DenseNet
    model = kind(**options).to(images.device)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            model(images).sum().backward()
        model.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        torch.cuda.synchronize()
    kinds = [event for event in found.events() if event.device_type.name == "CUDA"]
    return len([event for event in kinds if "mem" not in event.name.lower()[:3]])
