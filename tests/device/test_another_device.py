"""What runs on every device, on one that is neither the CPU nor goes together with it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from torch.utils import backend_registration

from tests.helpers.launch import REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch has no devices that are written in Python",
    ),
]

# Autograd's thread of a device lets go of a backward's last tensors after the backward has come
# back. If Python ends meanwhile it ends that thread by force, which C++ takes for a fault: os._exit
MIXED = """
import os
import torch
from tests.helpers.another_device import register
register()
there, here = torch.ones(3).to("another"), torch.ones(3)
assert (there * 2 + there.sum()).cpu().tolist() == [5.0] * 3
(there.requires_grad_() * there).sum().backward()
assert there.grad.device.type == "another" and there.grad.cpu().tolist() == [2.0] * 3
still = there.detach()
for mixed in (lambda: there + here, lambda: torch.cat([here, there]), lambda: still.add_(here)):
    try:
        mixed()
    except RuntimeError as error:
        assert "do not go together" in str(error)
    else:
        raise AssertionError("they went together")
os._exit(0)
"""


def test_its_tensors_do_not_meet_the_cpus() -> None:
    # in a process of its own: a device is there for good
    done = subprocess.run([sys.executable, "-c", MIXED], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_what_runs_on_every_device_runs_on_it() -> None:
    command = [sys.executable, "-m", "pytest", "--another-device", "-k", "another", "tests/device"]
    done = subprocess.run(
        [*command, "-m", "not slow"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 20
