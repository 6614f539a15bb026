"""Training to the end beside the naive net: that it compares, and would notice."""

from __future__ import annotations

import convergence
import pytest
import torch
from convergence import Epoch
from harness import results


@pytest.mark.slow
def test_a_short_run_agrees_and_is_drawn(tmp_path, capsys):
    path = tmp_path / "convergence.csv"
    convergence.main(["--seeds", "1", "--epochs", "1", "--output", str(path)])
    rows = results.read(path)
    assert {row["provider"] for row in rows} == set(convergence.PROVIDERS)
    found = {
        (row["provider"], row["dtype"]): float(row["value"])
        for row in rows
        if row["metric"] == "weight difference"
    }
    assert found["naive", "float64"] == 0 < found["effdense-features", "float64"] < 1e-12
    # the runs were not of one and the same network
    assert found["effdense-features", "float32"] > 1e-9
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "agree" in capsys.readouterr().out


def test_weights_that_differ_are_noticed(capsys):
    def run(gap: float) -> dict[str, Epoch]:
        weights = torch.ones(4, dtype=torch.float64)
        own = {name: Epoch(0.0, 0.0, weights.clone()) for name in convergence.PROVIDERS}
        own["effdense-features"].weights[0] += gap
        return own

    assert convergence.print_differences([run(0.0), run(1e-12)], 1e-9)
    assert not convergence.print_differences([run(0.0), run(1e-8)], 1e-9)
    assert not convergence.print_differences([run(float("nan"))], 1e-9)
