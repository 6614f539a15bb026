"""Published figures of hardware that isn't here, for projections.

Peak FLOP/s are dense (no sparsity), float32 without TF32; bandwidths are of device
memory, and of the links per direction. Achieved rates are lower: a projection from these
is a bound, not a promise.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from effdense.choices import DtypeName
from effdense.errors import UserError

DeviceName = Literal["v100", "a100", "h100", "h200", "rtx4090"]
LinkName = Literal["10gbe", "100gbe", "hdr200", "ndr400"]


class Device(NamedTuple):
    """FLOP/s by dtype, bytes/s of device memory and of its link to its peers, source."""

    name: str
    flops: dict[DtypeName, float]
    memory: float
    link: float
    source: str

    def rate(self, dtype: DtypeName) -> float:
        """Peak FLOP/s.

        Raises:
            UserError: where none is published.
        """
        if dtype not in self.flops:
            raise UserError(f"no published {dtype} rate of {self.name}")
        return self.flops[dtype]


DEVICES: dict[DeviceName, Device] = {
    "v100": Device(
        "NVIDIA V100 SXM2 32 GB",
        {"float64": 7.8e12, "float32": 15.7e12, "float16": 125e12},
        900e9,
        150e9,
        "NVIDIA V100 data sheet, 2020",
    ),
    "a100": Device(
        "NVIDIA A100 SXM 80 GB",
        {"float64": 9.7e12, "float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
        2039e9,
        300e9,
        "NVIDIA A100 data sheet, 2021",
    ),
    "h100": Device(
        "NVIDIA H100 SXM 80 GB",
        {"float64": 34e12, "float32": 67e12, "bfloat16": 989e12, "float16": 989e12},
        3.35e12,
        450e9,
        "NVIDIA H100 data sheet, 2023",
    ),
    "h200": Device(
        "NVIDIA H200 SXM 141 GB",
        {"float64": 34e12, "float32": 67e12, "bfloat16": 989e12, "float16": 989e12},
        4.8e12,
        450e9,
        "NVIDIA H200 data sheet, 2024",
    ),
    "rtx4090": Device(
        "NVIDIA GeForce RTX 4090",
        {"float64": 1.29e12, "float32": 82.6e12, "bfloat16": 165.2e12, "float16": 165.2e12},
        1008e9,
        32e9,  # PCIe 4.0 x16; it has no NVLink
        "NVIDIA Ada GPU architecture whitepaper, 2023",
    ),
}

# Bytes/s per direction between machines, by name.
NETWORKS: dict[LinkName, float] = {
    "10gbe": 1.25e9,
    "100gbe": 12.5e9,
    "hdr200": 25e9,
    "ndr400": 50e9,
}
