"""The audit compiles every kernel, with every constant, that the self-check can meet."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.launch import REPOSITORY

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

COMPARE = """
import json, sys
from unittest import mock
import torch
from effdense.autocast import computing_in
from effdense.backends.dry_run import DryRun
from effdense.commands.env import NETWORKS
from effdense.kernels import audit
from effdense.kernels.launch import Launcher
from effdense.models import DenseNet, configuration

device, dtype = sys.argv[1:]
audited, prepare = set(), Launcher.prepare

def noted(self, *arguments, **constants):
    found = prepare(self, *arguments, **constants)
    if isinstance(self, audit.RecordingLauncher):
        audited.update(self._kernels)
    return found

with mock.patch.object(Launcher, "prepare", noted):
    audit.jobs([device], [dtype], sorted({shape.name for shape in audit.SHAPES}))
narrow = None if dtype == "fp32" else audit.DTYPES[dtype]
met = set()
for tf32 in (False, True):
    dry = DryRun(audit.DEVICES[device].architecture, tf32)
    with dry.on_meta(), computing_in(narrow), torch.device("meta"):
        for name, depth, growth_rate, shape in NETWORKS:
            network = DenseNet(**configuration(name, depth, growth_rate, backend="triton"))
            network(torch.empty(shape)).sum().backward()
    met |= {kernel for found in dry.met for kernel in found.unknown.variant.kernels}

missing = met - audited
print(json.dumps([len(met), sorted(map(str, missing))]))
"""


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("sm_90", "bf16"), ("sm_80", "fp16"), ("sm_90", "fp32"), ("gfx942", "bf16")],
)
def test_what_networks_of_the_readme_run_is_audited(device: str, dtype: str) -> None:
    # a process of its own: here Triton may have been imported as an interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, device, dtype],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    met, missing = json.loads(done.stdout)
    assert met > 60
    assert missing == []
