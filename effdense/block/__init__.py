"""The dense block in linear memory, and the forwards of modules that run it."""

__all__ = [
    "captured",
    "cuda_graphs",
    "dense_block",
    "forwards",
    "offloading",
    "recomputation",
    "slabs",
    "stepping",
    "traced",
]
