"""The dense block's arithmetic behind one interface: torch operations or Triton kernels."""
