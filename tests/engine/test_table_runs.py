"""Runs on tables: labels with gaps, patients, 16-bit pictures; the same on 1, 2 and 3 processes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml

from effdense.commands.train import parse
from effdense.engine import plots
from effdense.engine.checkpoint import Position
from effdense.engine.training import run
from tests.helpers.launch import flags
from tests.helpers.pictures import write_xrays
from tests.helpers.ranks import Ranks, final_state, wait_for

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {
    **{"data": "csv", "data_dir": "xrays", "table": "xrays/table.csv", "group_column": "patient"},
    **{"arch": "densenet_bc", "depth": 10, "growth_rate": 4, "image_size": 24, "channels": 1},
    **{"epochs": 1, "batch_size": 8, "threads": 1, "num_workers": 1, "checkpoint_steps": 3},
}
LABELS: list[object] = ["--label-columns", "Edema", "Fracture", "Mass"]


def test_killed_and_resumed_on_one_two_and_three_processes(tmp_path: Path) -> None:
    write_xrays(tmp_path / "xrays", 120)
    scores = killed_and_resumed(tmp_path, [*flags(**OPTIONS, balance="sampling"), *LABELS])
    assert {"error", "auroc", "auprc", "mean_class_error"} <= set(scores)
    recorded = yaml.safe_load((tmp_path / "whole-1" / "config.yaml").read_text())
    assert recorded["task"] == "multilabel"
    assert len(recorded["normalization"]["mean"]) == 1


def test_fine_tuned_from_a_file_of_torchvision_s_weights(tmp_path: Path) -> None:
    """Of three colours and a thousand classes; killed and resumed, on 1, 2 and 3 processes."""
    write_xrays(tmp_path / "xrays", 48)
    sizes = {"growth_rate": 4, "block_config": [2, 2], "num_init_features": 8}
    theirs = torchvision.models.DenseNet(**sizes)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    own = {name: value for name, value in OPTIONS.items() if name not in NETWORK}
    start: dict[str, Any] = {
        "model": "torchvision.models:DenseNet",
        "model_args": json.dumps(sizes),
    }
    start |= {"weights": tmp_path / "weights.pth", "freeze": "1", "head_lr_factor": 10}
    own |= {**start, "image_size": 32, "batch_size": 6, "num_workers": 0}
    killed_and_resumed(tmp_path, [*flags(**own), *LABELS])
    found = torch.load(tmp_path / "whole-3" / "model.pt", weights_only=True)
    again = torchvision.models.DenseNet(**sizes, num_classes=3)
    first = again.features.conv0
    again.features.conv0 = torch.nn.Conv2d(1, 8, first.kernel_size, 2, 3, bias=False)
    again.load_state_dict(found)
    frozen = "features.denseblock1.denselayer2.conv2.weight"
    assert torch.equal(found[frozen], theirs.state_dict()[frozen])


NETWORK = {"arch", "depth", "growth_rate"}


def test_labels_with_gaps_are_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_xrays(tmp_path / "xrays", 120)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "draw", lambda *_: [])
    arguments = [*flags(**{**OPTIONS, "num_workers": 0, "epochs": 6, "augment": "none"}), *LABELS]
    run(parse(list(map(str, arguments)), ""))
    assert last_row(next(tmp_path.glob("runs/csv-1/scores.csv")))["auroc"] > 0.9


def killed_and_resumed(folder: Path, options: list[object]) -> dict[str, float]:
    """Run undisturbed, and killed and resumed, on 1, 2 and 3 processes; the scores of them all.

    The bits are the same with as many processes, and but for rounding they are with others.
    """
    found = []
    for processes in (1, 2, 3):
        whole, cut = folder / f"whole-{processes}", folder / f"cut-{processes}"
        run = [*options, "--sync-batch-norm"]
        with Ranks(folder, [*run, "--work-dir", whole], processes) as ranks:
            assert ranks.wait() == [0] * processes, ranks.said()
        with Ranks(folder, [*run, "--work-dir", cut], processes) as ranks:
            wait_for((cut / "checkpoints" / str(Position(1, 3))).exists)
            ranks.kill()
        with Ranks(folder, [*run, "--work-dir", cut], processes) as ranks:
            assert ranks.wait() == [0] * processes, ranks.said()
            assert "going on from epoch 1" in ranks.said()
        assert final_state(cut) == final_state(whole)
        found.append(last_row(whole / "test.csv") | last_row(whole / "scores.csv"))
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[2] == pytest.approx(found[0], rel=1e-3)
    return found[0]


def last_row(path: Path) -> dict[str, float]:
    with path.open(newline="") as file:
        *_, row = csv.DictReader(file)
    return {name: float(cell) for name, cell in row.items()}
