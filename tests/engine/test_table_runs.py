"""Runs on tables: labels with gaps, patients, 16-bit pictures; the same on 1, 2 and 3 processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml

from effdense.commands.train import parse
from effdense.engine import plots
from effdense.engine.training import train
from tests.helpers.launch import flags
from tests.helpers.pictures import write_xrays
from tests.helpers.ranks import killed_and_resumed, last_row

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
    train(parse(list(map(str, arguments)), ""))
    assert last_row(next(tmp_path.glob("runs/csv-1/scores.csv")))["auroc"] > 0.9
