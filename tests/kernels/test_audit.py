"""A representative part of the audit, and that it would notice what it looks for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def audit(*arguments: str) -> subprocess.CompletedProcess[str]:
    # a process of its own: here Triton may have been imported as an interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "effdense.kernels.audit", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("device", "dtype", "kernels", "matrix"),
    [
        ("sm_80", "bf16", "conv1x1_bwd|finish", "HMMA"),
        ("sm_90", "fp16", "conv1x1_fwd|statistics_fwd", "HGMMA"),
        ("sm_100", "bf16", "conv1x1_bwd", "UTCHMMA"),
        ("gfx942", "fp16", "conv1x1_fwd|bn_relu_fwd", "v_mfma"),
    ],
)
def test_representative_kernels(device: str, dtype: str, kernels: str, matrix: str) -> None:
    if device == "sm_80" and triton.__version__.startswith("3.3."):
        pytest.skip("Triton 3.3 spills 2 to 4 of 255 registers here; newer ones chose the tiles")
    options = ["--devices", device, "--dtypes", dtype, "--shapes", "k24"]
    done = audit(*options, "--kernels", kernels)
    if "ROCm linker" in done.stderr:
        pytest.skip("this Triton brings no linker for AMD's code")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].endswith(" 0 with faults")
    products = [line for line in lines if "conv1x1" in line]
    assert products
    # of tiles too small for the device's own instruction, the one before it
    assert all(matrix in line or "HMMA" in line for line in products)
    assert any(f" {matrix}" in line for line in products)


def test_refuses_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "effdense.kernels.audit"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr


RESUMED = """
import contextlib, io
from effdense.kernels import audit

def run(options="fp32"):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        common = f"--devices sm_80 --shapes odd --processes 1 --kernels {kernels}"
        audit.main(f"{common} --dtypes {options}".split())
    return said.getvalue()

def no_compiler(call, target):
    raise AssertionError("compiled again")

kernels = "statistics_fwd|bn_relu_fwd"
first = run()
compile_call, audit.compile_call = audit.compile_call, no_compiler
assert run() == first, run()
kernels = "statistics_fwd"
for changed in "fp16", "fp32 --devices sm_86":
    try:
        run(changed)
    except AssertionError:
        continue
    raise SystemExit(f"not compiled: {changed}")
record = audit.cache_folder("audit") / "findings.jsonl"
lines = record.read_text().splitlines()
# statistics of a prefix and of new features, and BN-ReLU
assert len(lines) == 3, lines
# the process was killed as it wrote the last line
record.write_text("\\n".join([*lines[:-1], lines[-1][:40]]))
kernels = "statistics_fwd|bn_relu_fwd"
audit.compile_call = compile_call
assert run() == first, run()
print("resumed")
"""


def test_an_audit_goes_on_where_it_was(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    command = [sys.executable, "-c", RESUMED]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "resumed\n", done.stdout + done.stderr


FAULTS = """
import sys
from effdense.kernels import audit
from effdense.kernels.launch_table import Launch, LaunchTable

def table(self, operation, like, channels, bottleneck=0):
    return {launch}

LaunchTable.__call__ = table
arguments = "--devices {device} --dtypes {dtype} --shapes {shape} --processes 1 --kernels {kernel}"
if {narrow}:
    import effdense.kernels.bn_relu as module
    import effdense.kernels.launch as launching
    module.pad = lambda x: 1
    launching.alignment = lambda *integers: 1
    audit.wide_accesses_expected = lambda job: True
sys.exit(audit.main(arguments.split()))
"""


@pytest.mark.parametrize(
    ("launch", "device", "dtype", "kernel", "narrow", "fault"),
    [
        ("Launch(256, 128, 128, 4, 1)", "sm_80", "fp16", "bn_relu_bwd_reduce", False, "spills"),
        ("Launch(128, 128, 128, 8, 4)", "sm_86", "fp16", "conv1x1_fwd", False, "shared memory"),
        ("Launch(32, 64, 64, 4, 1)", "sm_80", "fp16", "bn_relu_fwd", True, "no 128-bit loads"),
    ],
)
def test_faults_are_found(
    launch: str, device: str, dtype: str, kernel: str, narrow: bool, fault: str
) -> None:
    code = FAULTS.format(
        launch=launch, device=device, dtype=dtype, shape="k24", kernel=kernel, narrow=narrow
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert fault in done.stdout
