"""The training benchmark: see `benchmarks/README.md`."""
