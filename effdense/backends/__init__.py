"""The dense block's arithmetic behind one interface: torch operations or Triton kernels."""

__all__ = [
    "base",
    "cpu_backend",
    "cpu_library",
    "dropout",
    "dry_run",
    "empty",
    "layout",
    "norm_sums",
    "precision",
    "select",
    "self_check",
    "sharing",
    "stepwise",
    "told",
    "torch_backend",
    "triton_backend",
    "variants",
]
