"""effdense: DenseNets in linear memory, exact, and faster than the naive network.

    import effdense
    import torchvision

    model = effdense.densenet_bc(depth=250, growth_rate=24, num_classes=10)
    model = effdense.convert(torchvision.models.densenet121())
    model = effdense.densenet121(weights="IMAGENET1K_V1", save="bottlenecks")

    print(effdense.estimate(model, (64, 3, 224, 224)))
    plan = effdense.plan(model, (64, 3, 224, 224), budget="8GiB")
    plan.apply(model)

Each name is imported when it is first asked for: a command line that only says what its options
are waits for no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .choices import SAVE_MODES, Save
from .version import __version__

if TYPE_CHECKING:
    from . import reference
    from .block.cuda_graphs import CudaGraphs, cuda_graphs
    from .block.forwards import DenseBlock, Transition
    from .block.offloading import offload
    from .block.stepping import step_in_backward
    from .conversion import ConversionReport, conversion_report, convert, revert
    from .engine.export import load
    from .engine.options import TrainConfig
    from .engine.training import TrainResult, train
    from .memory.estimation import BlockEstimate, Estimate, estimate
    from .memory.planning import BudgetError, Plan, budget_bytes, deepest, largest_batch, plan
    from .models import DenseNet, densenet121, densenet161, densenet169, densenet201, densenet_bc
    from .norms.sync_batch_norm import SyncBatchNorm
    from .norms.synchronization import known_images

__all__ = [
    "SAVE_MODES",
    "BlockEstimate",
    "BudgetError",
    "ConversionReport",
    "CudaGraphs",
    "DenseBlock",
    "DenseNet",
    "Estimate",
    "Plan",
    "Save",
    "SyncBatchNorm",
    "TrainConfig",
    "TrainResult",
    "Transition",
    "__version__",
    "budget_bytes",
    "conversion_report",
    "convert",
    "cuda_graphs",
    "deepest",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet_bc",
    "estimate",
    "known_images",
    "largest_batch",
    "load",
    "offload",
    "plan",
    "reference",
    "revert",
    "step_in_backward",
    "train",
]

_HOMES = {
    "block.cuda_graphs": ("CudaGraphs", "cuda_graphs"),
    "block.forwards": ("DenseBlock", "Transition"),
    "block.offloading": ("offload",),
    "block.stepping": ("step_in_backward",),
    "conversion": ("ConversionReport", "conversion_report", "convert", "revert"),
    "engine.export": ("load",),
    "engine.options": ("TrainConfig",),
    "engine.training": ("TrainResult", "train"),
    "memory.estimation": ("BlockEstimate", "Estimate", "estimate"),
    "memory.planning": (
        *("BudgetError", "Plan", "budget_bytes", "deepest", "largest_batch", "plan"),
    ),
    "models": (
        *("DenseNet", "densenet121", "densenet161", "densenet169", "densenet201", "densenet_bc"),
    ),
    "norms.sync_batch_norm": ("SyncBatchNorm",),
    "norms.synchronization": ("known_images",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "reference":
        return importlib.import_module(".reference", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
