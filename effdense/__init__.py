"""effdense: DenseNets in linear memory, exact, and faster than the naive network."""

from .block.dense_block import SAVE_MODES, Save
from .block.forwards import DenseBlock, Transition
from .block.offloading import offload
from .conversion import ConversionReport, conversion_report, convert, revert
from .memory.estimation import BlockEstimate, Estimate, estimate
from .memory.planning import BudgetError, Plan, budget_bytes, deepest, largest_batch, plan
from .models import DenseNet, densenet121, densenet161, densenet169, densenet201, densenet_bc
from .norms.sync_batch_norm import SyncBatchNorm
from .version import __version__

__all__ = [
    "SAVE_MODES",
    "BlockEstimate",
    "BudgetError",
    "ConversionReport",
    "DenseBlock",
    "DenseNet",
    "Estimate",
    "Plan",
    "Save",
    "SyncBatchNorm",
    "Transition",
    "__version__",
    "budget_bytes",
    "conversion_report",
    "convert",
    "deepest",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet_bc",
    "estimate",
    "largest_batch",
    "offload",
    "plan",
    "revert",
]
