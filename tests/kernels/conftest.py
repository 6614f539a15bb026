"""The interpreter is chosen when Triton is imported: its tests live in processes of their own."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]
else:
    collect_ignore = ["interpreted"]
