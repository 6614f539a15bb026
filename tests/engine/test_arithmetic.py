"""--tf32 and what else decides how a GPU computes, for as long as a run lasts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from effdense.backends.precision import tf32_convolutions
from effdense.engine.options import TrainConfig
from effdense.engine.training import _arithmetic


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before, benchmark = tf32_convolutions(), torch.backends.cudnn.benchmark
    yield
    assert tf32_convolutions() == before
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize(("tf32", "expected"), [("on", True), ("off", False), (None, None)])
def test_tf32(tf32: Any, expected: bool | None) -> None:
    before = tf32_convolutions()
    with _arithmetic(TrainConfig(tf32=tf32).resolved()):
        assert tf32_convolutions() == (before if expected is None else expected)
    assert tf32_convolutions() == before


def test_a_run_may_go_on_with_another() -> None:
    held = TrainConfig(tf32="on").resolved().options()
    assert TrainConfig(tf32="off").resolved().differences(held) == []


@pytest.mark.parametrize("deterministic", [True, False])
def test_algorithms_are_tried_where_they_may_differ(deterministic: bool) -> None:
    torch.backends.cudnn.benchmark = False
    with _arithmetic(TrainConfig(deterministic=deterministic).resolved()):
        assert torch.backends.cudnn.benchmark is not deterministic
    assert not torch.backends.cudnn.benchmark


def test_settings_mixed_by_the_user_are_read_without_an_error() -> None:
    conv = getattr(torch.backends.cudnn, "conv", None)
    if not hasattr(conv, "fp32_precision"):
        pytest.skip("torch before 2.9 has one switch alone")
    assert conv is not None
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        with pytest.raises(RuntimeError):
            _ = torch.backends.cudnn.allow_tf32
        assert not tf32_convolutions()
        with _arithmetic(TrainConfig(tf32="on").resolved()):
            assert tf32_convolutions()
        assert conv.fp32_precision == "ieee"
    finally:
        conv.fp32_precision = before
