"""Kept tensors that are elsewhere between forward and backward."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import effdense
from effdense import reference
from effdense.block import offloading
from tests.helpers.measure_memory import measure
from tests.helpers.places import placed


def gradients(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    model(x).square().mean().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What goes out, in order."""
    found: list[Tensor] = []
    send = offloading._send

    def note(tensor: Tensor, folder: Any) -> Any:
        found.append(tensor)
        return send(tensor, folder)

    monkeypatch.setattr(offloading, "_send", note)
    return found


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("save", [*effdense.SAVE_MODES, ("input", "all")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_the_same_bits(
    save: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, sent: list[Tensor]
) -> None:
    monkeypatch.setattr(offloading, "MIN_BYTES", 1)
    model = effdense.DenseNet(6, (3, 4), 10, drop_rate=0.1, num_classes=7, save=save).to(dtype)
    model, x = placed(model), placed(torch.randn(3, 3, 64, 48).to(dtype))
    torch.manual_seed(1)
    here = gradients(model, x)
    model.offload = True
    torch.manual_seed(1)
    away = gradients(model, x)
    assert sent
    assert not any(tensor.is_leaf and tensor.requires_grad for tensor in sent)
    assert len(here) == len(away)
    assert all(torch.equal(a, b) for a, b in zip(here, away, strict=True))


@pytest.mark.usefixtures("device")
def test_any_network_by_the_context(sent: list[Tensor]) -> None:
    model, x = placed(reference.densenet_bc(22, 12)), placed(torch.randn(16, 3, 32, 32))
    here = gradients(model, x)
    model.zero_grad()
    x.requires_grad_()
    with effdense.offload():
        loss = model(x).square().mean()
    loss.backward()
    assert x.grad is not None
    away = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    assert all(torch.equal(a, b) for a, b in zip(here, away, strict=True))
    assert all(tensor.nbytes >= offloading.MIN_BYTES for tensor in sent)


def test_files_have_no_names_and_go_with_the_graph(tmp_path: Path) -> None:
    model, x = effdense.densenet_bc(22, 12), torch.randn(32, 3, 32, 32)
    with effdense.offload(tmp_path):
        loss = model(x).sum()
    assert not list(tmp_path.iterdir())
    if os.path.isdir("/proc/self/fd"):
        # the last block's features are under 1 MiB
        assert _open_files(tmp_path) == 2
        loss.backward()
        del loss
        gc.collect()
        assert _open_files(tmp_path) == 0


def _open_files(folder: Path) -> int:
    targets = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
    return sum(target.startswith(str(folder)) for target in targets)


@pytest.mark.usefixtures("device")
@pytest.mark.real_device
def test_the_layout_comes_back() -> None:
    for x in (
        placed(torch.randn(5, 64, 32, 32)).to(memory_format=torch.channels_last),
        placed(torch.randn(300, 2000)).t(),
        placed(torch.randn(1, 1 << 19))[:, 5:],
    ):
        kept = offloading._send(x, None)
        back = offloading._fetch(kept)
        assert back.stride() == x.stride()
        assert torch.equal(back, x)
        assert back.data_ptr() != x.data_ptr()


def test_what_is_not_dense_stays() -> None:
    x = torch.randn(1024, 1024)
    assert offloading._goes_out(x, 1 << 20)
    assert not offloading._goes_out(x[:, :1000], 1 << 20)
    assert not offloading._goes_out(x[:1].expand(1024, 1024), 1 << 20)
    assert not offloading._goes_out(torch.nn.Parameter(x), 1 << 20)
    assert not offloading._goes_out(x[:100], 1 << 20)
    assert offloading._goes_out(x[:256], 1 << 20)
    assert not offloading._goes_out(x[:256], (1 << 20) + 1)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"), effdense.offload(tmp_path / "nowhere"):
        effdense.densenet_bc(22, 12)(torch.randn(32, 3, 32, 32))


def test_flags_per_block() -> None:
    model = effdense.densenet_bc(22, 12)
    model.offload = (True, False, True)
    assert model.offload == (True, False, True)
    with pytest.raises(ValueError, match="for each of 3 blocks"):
        model.offload = [True]
    with pytest.raises(ValueError, match="for each of 3 blocks"):
        model.offload = "yes"  # type: ignore[assignment]


@pytest.mark.slow
def test_resident_memory_falls(tmp_path: Path) -> None:
    """Plain autograd's kept tensors in files: in a fresh process, less than half remains."""
    job = {"model": "effdense", "save": "all", "depth": 40, "growth_rate": 12, "batch": 64}
    here, away = measure(**job)["peak"], measure(**job, offload=True)["peak"]
    assert away < here / 2
