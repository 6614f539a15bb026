"""Curves of fifty steps are what they have always been."""

from __future__ import annotations

from pathlib import Path

import pytest

from effdense.choices import BackendName
from tests.helpers.golden import (
    FAMILIES,
    STEPS,
    TOLERANCE,
    bits,
    curve,
    distance,
    expected,
    facts,
)

RUNS = [(name, backend) for name, family in FAMILIES.items() for backend in family.backends]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), RUNS, ids=["-".join(run) for run in RUNS])
def test_a_curve_is_the_one_on_record(name: str, backend: BackendName, tmp_path: Path) -> None:
    found, record = curve(name, backend, tmp_path), expected(name)
    assert len(found["losses"]) == STEPS
    apart = distance(found, record)
    here = facts(backend)
    if here["capability"] not in ("AVX2", "AVX512"):
        pytest.skip(f"images are resized otherwise with {here['capability']}: {apart:.1e}")
    if name == "imagefolder" and here["torch"].startswith("2.7."):
        pytest.skip(f"images are resized otherwise by torch {here['torch']}: {apart:.1e}")
    assert apart <= TOLERANCE[FAMILIES[name].dtype], f"another curve: {apart:.1e} of the loss"
    for known in record["bits"]:
        if (known["facts"], known["backend"]) == (here, backend):
            same = {what: known[what] for what in ("losses", "tests")}
            assert bits(found) == same, (
                f"{apart:.1e} from the record: the same curve, but not its bits. Where that is "
                f"meant: python -m tests.helpers.golden {name}, and say why in the commit"
            )


def test_a_change_in_the_last_bit_is_a_distance() -> None:
    record = expected("digits")
    found = {what: [float.fromhex(v) for v in values] for what, values in record["curve"].items()}
    assert distance(found, record) == 0
    assert bits(found) == record["curve"]
    found["losses"][30] *= 1 + 2**-52
    assert 0 < distance(found, record) < 1e-15
    assert bits(found) != record["curve"]
    found["tests"][0] *= 1.01
    assert distance(found, record) == pytest.approx(0.01)
