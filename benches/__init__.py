"""Benches of kernels, views and whole steps against their peers; `docs/benchmarks.md` says how to run and read them."""

KERNEL_BENCHES = ("benches/bench_token_stats.py", "benches/bench_linear_token_stats.py")
VIEW_BENCHES = ("benches/bench_views.py",)
