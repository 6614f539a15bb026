"""Every kernel is started on the device of its tensors, whichever is the current one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.launch import REPOSITORY

pytest.importorskip("triton")


def test_kernels_start_where_their_tensors_are() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.two_devices"],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    streams = found.pop("streams")
    assert len(found) == 3 * 3
    for what, (first, second) in found.items():
        # prepared for one device, started on another as well
        here, elsewhere = (first, second) if "on the other" in what else (second, first)
        assert elsewhere == 0, what
        assert here > 30, what
    assert min(streams) > 0
