"""The commands of ``python -m effdense``, a file each.

A command's module has ``add``, which gives it a parser with its options and, as ``run``, what
it does with them. ``network`` is the MODEL argument that several of them take.
"""

from __future__ import annotations

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

__all__ = ["convert_report", "env", "evaluate", "graph", "plan", "plot", "predict", "verify"]
