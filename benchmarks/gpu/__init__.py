"""What a GPU makes of effdense, in ten minutes, in one report: ``python -m benchmarks.gpu``.

It asks for nothing but this checkout, torch, Triton and pytest. Each section runs in a process
of its own with a share of the time, writes its rows as it finds them, and so leaves them to
the report when it breaks, hangs or runs out of time.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import effdense

ROOT = Path(__file__).parents[2]

if importlib.util.find_spec("effdense.kernels") is None:
    # a checkout that nobody installed: the kernels stand beside the package
    effdense.__path__.append(str(ROOT))
