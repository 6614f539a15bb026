"""What an installed effdense must do, whatever it was installed from.

    python tests/project/smoke.py

Needs nothing but the package and what it depends on. Exit status 0 and one line if all is well.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F

import effdense
from effdense import reference
from effdense.backends.select import get_backend

NETWORK: dict[str, Any] = {
    "growth_rate": 4,
    "block_config": (2, 3),
    "num_init_features": 6,
    "num_classes": 5,
}
KERNELS = ("bn_relu", "bn_relu_conv1x1", "bn_relu_conv1x1_backward", "bn_relu_pool", "statistics")


def main() -> None:
    assert effdense.__version__ == importlib.metadata.version("effdense")
    missing = [name for name in effdense.__all__ if not hasattr(effdense, name)]
    assert not missing, missing
    training_steps_agree()
    an_estimate_and_a_plan()
    other_people_s_models()
    if importlib.util.find_spec("triton") is not None:
        for name in KERNELS:
            importlib.import_module(f"effdense.kernels.{name}")
    command_line()
    backend = get_backend("auto", torch.device("cpu"), torch.float32).name
    print(
        f"effdense {effdense.__version__} works: Python {platform.python_version()}, "
        f'torch {torch.__version__}, backend "{backend}" on this processor, {effdense.__file__}'
    )


def training_steps_agree() -> None:
    """One step of every save mode is the naive network's, in both types of the C loops."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        torch.manual_seed(0)
        naive = reference.DenseNet(small_inputs=True, **NETWORK).to(dtype)
        x, labels = torch.randn(3, 3, 9, 7, dtype=dtype), torch.tensor([0, 4, 2])
        expected = step(naive, x, labels)
        for save in effdense.SAVE_MODES:
            torch.manual_seed(0)
            model = effdense.DenseNet(small_inputs=True, save=save, **NETWORK).to(dtype)
            found = step(model, x, labels)
            for name, value in expected.items():
                error = (found[name] - value).norm() / value.norm().clamp(min=1e-3)
                assert error <= tolerance, (dtype, save, name, float(error))


def step(model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameters and buffers after one step, and the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    return {"loss": loss.detach()} | {
        name: value for name, value in model.state_dict().items() if value.is_floating_point()
    }


def an_estimate_and_a_plan() -> None:
    model = effdense.densenet_bc(depth=22, growth_rate=8)
    peak = effdense.estimate(model, (4, 3, 32, 32)).peak
    assert effdense.plan(model, (4, 3, 32, 32), budget=2 * peak).peak <= 2 * peak


def other_people_s_models() -> None:
    from torchvision.models import DenseNet

    model = DenseNet(4, (2, 2), 8, num_classes=3)
    report = effdense.conversion_report(model)
    assert len(report.converted) >= 2, str(report)
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def command_line() -> None:
    command = [sys.executable, "-I", "-m", "effdense"]
    for arguments in (["--help"], ["plan", "densenet_bc", "--depth", "22", "--budget", "1GiB"]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main()
