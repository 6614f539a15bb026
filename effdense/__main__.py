"""The command line ``python -m effdense COMMAND``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .engine.errors import UserError, one_line_errors


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with status 2 and one line for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m effdense")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_plot(commands)
    _add_plan(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_convert_report(commands)
    options = parser.parse_args(arguments)
    with one_line_errors():
        options.run(options)


def _add_plot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plot",
        help="redraw the curves from the CSV files of one run, or overlay several",
        description="Draw loss.png and error.png from train.csv and test.csv, and "
        "images-per-second.png and memory.png from speed.csv.",
    )
    parser.add_argument(
        "work_dirs", metavar="WORKDIR", nargs="+", type=Path, help="folder of a run"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: WORKDIR; must be given for several)",
    )
    parser.set_defaults(run=_plot)


def _plot(options: argparse.Namespace) -> None:
    # matplotlib takes a second to import
    from .engine import plots

    output = options.output
    if output is None:
        if len(options.work_dirs) > 1:
            raise UserError(
                "several runs are drawn into one figure: say where with --output FOLDER"
            )
        output = options.work_dirs[0]
    for path in plots.draw(options.work_dirs, output, plots.ALL):
        print(path)


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="choose what each dense block saves, so that training fits a memory budget",
        description="Choose what each dense block of a network saves for backward: the fastest "
        "choice whose predicted peak fits a budget of memory. Nothing is allocated or trained.",
    )
    parser.add_argument(
        "arch",
        choices=("densenet_bc", "densenet121", "densenet161", "densenet169", "densenet201"),
        metavar="ARCH",
        help="densenet_bc, densenet121, densenet161, densenet169 or densenet201",
    )
    parser.add_argument("--depth", type=int, default=100, help="of densenet_bc (default 100)")
    parser.add_argument("--growth-rate", type=int, default=12, help="of densenet_bc (default 12)")
    parser.add_argument("--batch-size", type=int, default=64, help="images (default 64)")
    parser.add_argument(
        "--image-size", type=int, help="pixels (default 32 for densenet_bc, else 224)"
    )
    parser.add_argument(
        "--budget", default="auto", help='such as "8GiB"; "auto" (default): what is free'
    )
    parser.add_argument("--optimizer", default="sgd-momentum", help="default sgd-momentum")
    parser.add_argument("--amp", choices=("none", "bf16", "fp16"), default="none")
    parser.add_argument("--ddp", action="store_true", help="count DDP's gradient buckets")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    import torch

    import effdense
    from effdense.estimation import AMP_DTYPES

    size = options.image_size or (32 if options.arch == "densenet_bc" else 224)
    try:
        with torch.device("meta"):
            if options.arch == "densenet_bc":
                model = effdense.densenet_bc(options.depth, options.growth_rate)
            else:
                model = getattr(effdense, options.arch)()
        found = effdense.plan(
            model,
            (options.batch_size, 3, size, size),
            options.budget,
            optimizer=options.optimizer,
            amp=AMP_DTYPES[options.amp],
            ddp=options.ddp,
            device=options.device,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    print(found)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="test a run's network on a folder of images",
        description="Test the network of a finished run on the images in FOLDER/CLASS/.",
    )
    parser.add_argument("work_dir", metavar="WORKDIR", type=Path, help="folder of the run")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="one folder per class in it")
    parser.add_argument("--batch-size", type=int, default=64, help="images (default 64)")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from .engine.export import evaluated, trained

    loss, error, images = evaluated(trained(options.work_dir), options.folder, options.batch_size)
    print(f"error {error:.2f} %, loss {loss:.4f} on {images:,} images")


def _add_predict(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "predict",
        help="classify images with a run's network",
        description="Classify images with the network of a finished run: CSV on standard output, "
        "with the most probable class of each image.",
    )
    parser.add_argument("work_dir", metavar="WORKDIR", type=Path, help="folder of the run")
    parser.add_argument(
        "images", metavar="PATH", nargs="+", type=Path, help="image, or folder of images"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images (default 64)")
    parser.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> None:
    import csv
    import sys

    from .engine.export import images_in, predictions, trained

    model = trained(options.work_dir)
    paths = images_in(options.images)
    writer = csv.writer(sys.stdout)
    writer.writerow(["image", "class", "probability"])
    for path, probabilities in predictions(model, paths, options.batch_size):
        best = int(probabilities.argmax())
        writer.writerow([path, model.classes[best], f"{float(probabilities[best]):.4f}"])


def _add_convert_report(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> None:
    parser = commands.add_parser(
        "convert-report",
        help="list what effdense.convert would make linear in a model, what not, and why",
        description="Build a model on the meta device by calling MODULE:CALLABLE without "
        "arguments, convert it and list what was converted, what was left and why. "
        "For example: python -m effdense convert-report torchvision.models:densenet121",
    )
    parser.add_argument("model", metavar="MODULE:CALLABLE", help="what returns the model")
    parser.set_defaults(run=_convert_report)


def _convert_report(options: argparse.Namespace) -> None:
    import importlib
    import os
    import sys

    import torch

    import effdense

    name, _, path = options.model.partition(":")
    if not name or not path:
        raise UserError(f"expected MODULE:CALLABLE, got {options.model!r}")
    # as python -m of one's own module finds it
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UserError(f"can't find {options.model}: {error}") from None
    if not callable(found):
        raise UserError(f"{options.model} is a {type(found).__name__}, which can't be called")
    model: object = found
    if not isinstance(found, torch.nn.Module):
        try:
            with torch.device("meta"):
                model = found()
        except Exception as error:
            line = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"calling {options.model} without arguments failed: {line}") from None
    if not isinstance(model, torch.nn.Module):
        raise UserError(f"{options.model} returned a {type(model).__name__}, not a torch.nn.Module")
    print(effdense.convert(model, report=True))


if __name__ == "__main__":
    main()
