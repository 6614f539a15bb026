"""``export``: a run's network for other programs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Options:
    """Write the network of a run, or of a file that it has exported, as ONNX.

    ONNX Runtime, which must be installed, is then held against torch.
    """

    source: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run, or its model.safetensors."""
    onnx: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: model.onnx beside RUN's)")
    ] = None
    """Where to write."""
    images: Annotated[
        tuple[Path, ...],
        arg(metavar="PATH [PATH ...]", help_behavior_hint="(default: the test set's first)"),
    ] = ()
    """Images, or folders of them; eight are answered by both. Noise if there are none."""
    tolerance: float = 1e-4
    """Largest difference of an output over the largest output."""


def run(options: Options) -> None:
    import torch

    from ..engine.export import first_tested, images_in, trained
    from ..engine.records import write_output

    folder = options.source if options.source.is_dir() else options.source.parent
    target = options.onnx or folder / "model.onnx"
    if not target.parent.is_dir():
        raise UserError(f"cannot write {target}: there is no folder {target.parent}")
    if target.exists() and not target.is_file():
        raise UserError(f"cannot write {target}: it is no file")
    model = trained(options.source)
    if options.images and model.prepare is not None:
        paths = images_in(options.images, model)[:8]
        images = torch.stack([model.prepare(path) for path in paths])
        what = f"{len(images)} images"
    else:
        try:
            images = first_tested(options.source, 8)
            what = f"the test set's first {len(images)} images"
        except UserError as error:
            images = torch.randn(8, *model.shape, generator=torch.Generator().manual_seed(0))
            what = f"noise, as there is no test set: {error}"
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  what torch.onnx writes with
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed: pip install onnxscript onnxruntime"
        ) from None
    difference = 0.0

    def write(path: Path) -> None:
        nonlocal difference
        _write_onnx(model.network, images, path)
        difference = _difference(model.network, images, path)
        if not difference <= options.tolerance:
            raise UserError(
                f"{target} is not written, as it would answer otherwise than torch: by "
                f"{difference:.1e} of the largest output, more than --tolerance "
                f"{options.tolerance}"
            )

    write_output(target, write)
    print(f"{target}; ONNX Runtime and torch differ by {difference:.1e} at most on {what}")


def _write_onnx(network: nn.Module, images: Tensor, path: Path) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (images,),
            str(path),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["images"],
            output_names=["outputs"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )


def _difference(network: nn.Module, images: Tensor, path: Path) -> float:
    """Of what ONNX Runtime and torch answer, over the largest output."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = network(images)
    largest = float(expected.abs().max())
    return float((torch.from_numpy(found) - expected).abs().max()) / max(largest, 1e-30)
