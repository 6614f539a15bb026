"""The variants that the README's networks run are those that the self-check can make small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MEET = """
import json, sys, warnings
sys.path.insert(0, "benchmarks")
import torch
from harness.case import Case
import effdense
from effdense.autocast import computing_in
from effdense.backends import variants
from effdense.backends.dry_run import DryRun
from effdense.kernels.launch import Launcher, Untrusted
from effdense.kernels.launch_table import Architecture
from effdense.kernels.layouts import PADDING, pad

variants._Again.start = lambda *_: (lambda *_: None)
case, architecture, dtype, options = map(json.loads, sys.argv[1:])
dry = DryRun(Architecture(*architecture), tf32=True)
case = Case(*case)
with torch.device("meta"):
    network = effdense.DenseNet(**case.network() | options, save="features", backend="triton")
    images = torch.empty(case.shape)
dtype = None if dtype == "float32" else getattr(torch, dtype)
with dry.on_meta(), computing_in(dtype):
    network(images).sum().backward()
# what reads a prefix of X, and whether X and, at the given place, D lie in padded rows
prefixes = {"bn_relu_conv1x1": 0, "bn_relu_conv1x1_backward": 4, "bn_relu_avg_pool": 0}
prefixes |= {"bn_relu_avg_pool_backward": 4, "bn_relu_global_pool_backward": 4}
narrow = [
    str((m.function.__name__, arguments[0].shape[1]))
    for m in dry.met
    for arguments in [m.arguments]
    for name in [m.function.__name__]
    if name in prefixes and min(pad(arguments[0]), pad(arguments[prefixes[name]])) < PADDING
]
unlike = []
for unknown, function, arguments, precision in dry.met:
    check = variants.CHECKS[function]
    blocks = [c.block_p for c in unknown.choices.values() if hasattr(c, "block_p")]
    small = variants.Small(torch.device("cpu"), False, max(blocks), **check.sizes(*arguments))
    try:
        function(*check.small(small, *arguments), variants._Again(unknown, precision))
    except Untrusted as other:
        unlike.append([str(other), str(unknown.variant), str(other.variant)])
met = sorted({m.function.__name__ for m in dry.met})
print(json.dumps([len(dry.met), met, [name for name in met if name in prefixes], narrow, unlike]))
"""
H100, A100, MI300 = ("cuda", 90, 132), ("cuda", 80, 108), ("hip", 0, 304)
CASES = {
    "k12": ["densenet_bc", 100, 12, 64, 32],
    "k24": ["densenet_bc", 250, 24, 64, 32],
    "densenet121": ["densenet121", 0, 0, 32, 224],
    "volumes": ["densenet_bc", 40, 12, 4, 32, "float32", "cpu", 3],
}


def meet(case: str, device: Any, dtype: str, **options: Any) -> list[Any]:
    # a process of its own: here Triton may have been imported as an interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = [json.dumps(a) for a in (CASES[case], device, dtype, options)]
    done = subprocess.run(
        [sys.executable, "-c", MEET, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "device", "dtype", "options"),
    [
        ("k12", H100, "bfloat16", {}),
        ("k24", H100, "bfloat16", {}),
        ("k24", A100, "float32", {}),
        ("densenet121", MI300, "float16", {}),
        ("volumes", H100, "float32", {"bn_size": None}),
    ],
)
def test_a_small_call_has_the_variant(
    case: str, device: Any, dtype: str, options: dict[str, Any]
) -> None:
    met, operations, of_prefixes, narrow, unlike = meet(case, device, dtype, **options)
    assert met >= 10
    # a network of the README takes the aligned path throughout
    if case != "volumes":
        assert len(of_prefixes) == 5
        assert narrow == []
    assert {"bn_relu_conv3", "bn_relu_conv3_backward", "statistics"} <= set(operations)
    assert unlike == []
