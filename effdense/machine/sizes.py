"""Sizes of memory, read from text and shown."""

from __future__ import annotations

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}ib"] = 1024**_power
    _UNITS[f"{_letter}b"] = 1000**_power


def parse_size(text: str) -> int:
    """Bytes of "12GiB", "500 MB" or "1048576".

    Raises:
        ValueError: for anything else; for a number below 1024 without a unit too, by which nobody
            means bytes.
    """
    number = text.strip().lower()
    unit = number.lstrip("0123456789.")
    try:
        value = float(number[: len(number) - len(unit)]) * _UNITS[unit.strip()]
    except (KeyError, ValueError):
        value = 0
    if value < 1 or (not unit.strip() and value < 1024):
        raise ValueError(f'must be a size such as "12GiB" or "500MB", got {text!r}')
    return int(value)


def show_size(size: float) -> str:
    """Such as "1.5 GiB", "33 MiB" or, of less than one, "12 KiB"."""
    if 0 < size < 1 << 20:
        return f"{size / 2**10:,.0f} KiB"
    return f"{size / 2**30:,.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:,.0f} MiB"
