"""What the benchmarks share: cases, providers, measurements, counts and reports."""
