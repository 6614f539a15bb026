"""What is chosen by name, in Python and on command lines alike.

Importing this imports no torch.
"""

from __future__ import annotations

from typing import Literal, get_args

Save = Literal["all", "bottlenecks", "features", "slabs", "input"]
"""What a dense block keeps for backward, from most memory to least; "slabs" keeps what "features"
does, and has smaller temporaries."""
SAVE_MODES: tuple[Save, ...] = get_args(Save)

BackendName = Literal["auto", "torch", "cpu", "triton"]
"""What computes the dense blocks."""

NetworkName = Literal["densenet_bc", "densenet121", "densenet161", "densenet169", "densenet201"]
"""densenet_bc: the paper's CIFAR family; the others: its ImageNet family."""

DtypeName = Literal["float64", "float32", "bfloat16", "float16"]
"""What is computed in; 16 bits mean autocast over float32 parameters."""

OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]
"""Of torch.optim."""

ScheduleName = Literal["multistep", "cosine"]
"""Of the learning rate."""

AugmentName = Literal["paper", "trivial-augment", "mixup", "none"]
"""What is done to training images."""
