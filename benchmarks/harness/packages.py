"""Other packages' DenseNets, as they come and after ``effdense.convert``.

A case whose ``arch`` is one of ``MODELS`` is built by the package itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
from torch import nn

import effdense
from effdense.memory.timeline import Training

from .case import Case
from .fc_densenet import FCDenseNet
from .providers import set_parameters

ProviderName = Literal["original", "converted", "converted-slabs"]
ModelName = Literal[
    "torchvision-densenet121",
    "torchvision-densenet121-frozen",
    "timm-densenet121",
    "torchxrayvision-densenet121",
    "monai-densenet121-3d",
    "smp-unet-densenet121",
    "fc-densenet67",
]


class PackageModel(NamedTuple):
    """A package's model and the input its users give it."""

    module: str
    line: str
    """The line that a user writes."""
    build: Callable[[], nn.Module]
    channels: int
    dims: int
    classes: int
    dense: bool
    """A class for every pixel."""
    batch_size: int
    image_size: int


def _torchvision() -> nn.Module:
    from torchvision.models import densenet121

    return densenet121()


def _frozen() -> nn.Module:
    """Fine-tuned as in docs/xrays.md, with --freeze 2."""
    model = _torchvision()
    for name, parameter in model.named_parameters():
        if name.startswith("features.denseblock3."):
            break
        parameter.requires_grad_(False)
    return model


def _timm() -> nn.Module:
    import timm

    return timm.create_model("densenet121")


def _torchxrayvision() -> nn.Module:
    import torchxrayvision

    return torchxrayvision.models.DenseNet()


def _monai() -> nn.Module:
    from monai.networks.nets import DenseNet121

    return DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)


def _smp() -> nn.Module:
    import segmentation_models_pytorch

    return segmentation_models_pytorch.Unet("densenet121", encoder_weights=None, classes=2)


MODELS: dict[ModelName, PackageModel] = {
    "torchvision-densenet121": PackageModel(
        "torchvision", "torchvision.models.densenet121()", _torchvision, 3, 2, 1000, False, 8, 224
    ),
    "torchvision-densenet121-frozen": PackageModel(
        "torchvision", "densenet121(), two blocks frozen", _frozen, 3, 2, 1000, False, 8, 224
    ),
    "timm-densenet121": PackageModel(
        "timm", 'timm.create_model("densenet121")', _timm, 3, 2, 1000, False, 8, 224
    ),
    "torchxrayvision-densenet121": PackageModel(
        "torchxrayvision", "xrv.models.DenseNet()", _torchxrayvision, 1, 2, 18, False, 8, 224
    ),
    "monai-densenet121-3d": PackageModel(
        "monai", "DenseNet121(spatial_dims=3, ...)", _monai, 1, 3, 2, False, 8, 48
    ),
    "smp-unet-densenet121": PackageModel(
        "segmentation_models_pytorch", 'smp.Unet("densenet121")', _smp, 3, 2, 2, True, 4, 256
    ),
    "fc-densenet67": PackageModel(
        "torch", "FC-DenseNet67 (growth_rate=16)", FCDenseNet, 3, 2, 12, True, 2, 224
    ),
}


def case(
    arch: ModelName,
    batch_size: int | None = None,
    image_size: int | None = None,
    device: str = "cpu",
) -> Case:
    """A package's model at its usual input, or at another."""
    model = MODELS[arch]
    batch_size, image_size = batch_size or model.batch_size, image_size or model.image_size
    return Case(arch, 0, 0, batch_size, image_size, device=device, spatial_dims=model.dims)


def setup(provider: str, case: Case) -> Training:
    """A package's model, ready to train; every provider has the same parameters and input."""
    package = MODELS[cast(ModelName, case.arch)]
    with torch.device(case.device):
        model = package.build()
    set_parameters(model)
    if provider != "original":
        effdense.convert(model, save="slabs" if provider == "converted-slabs" else "features")
    generator = torch.Generator().manual_seed(1)
    spatial = case.shape[2:]
    x = torch.randn((case.batch_size, package.channels, *spatial), generator=generator)
    shape = (case.batch_size, *spatial) if package.dense else (case.batch_size,)
    target = torch.randint(package.classes, shape, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    return Training(model.train(), optimizer, x.to(case.device), target.to(case.device))
