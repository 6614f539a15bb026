"""CUDA graphs of stages whose norms synchronise: what two processes record and do again.

Collectives are recorded like any other operation. Each of the processes compares its replays
with the same steps without graphs, within DistributedDataParallel.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ranks import by_ranks

pytestmark = pytest.mark.slow


def test_replayed_steps_are_steps_bit_for_bit(tmp_path: Path) -> None:
    found = by_ranks("replayed_steps", 2, tmp_path)
    assert len(found) == 7
    for kind, of_ranks in found.items():
        for equal, stages, replays in of_ranks.tolist():
            assert equal, kind
            assert stages == (3 if kind == "converted" else 2)
            # all steps but the one whose images are shared otherwise, which no rank replays
            assert replays == 2 * stages * 2


def test_what_one_process_can_not_capture_none_does(tmp_path: Path) -> None:
    by_ranks("refusals", 2, tmp_path)


def test_a_stage_captured_alone_is_not_replayed_among_others(tmp_path: Path) -> None:
    stages, replays = by_ranks("unseen_group", 2, tmp_path)["replays"].tolist()
    assert replays == 2 * stages > 0
