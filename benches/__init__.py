"""Benches of kernels and views against their peers; `docs/benchmarks.md` says how to run and read them."""
