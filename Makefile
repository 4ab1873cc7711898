# imagine_opd: `make demo` and `make test` set up all they need; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUST_SOURCES := Cargo.toml $(wildcard Cargo.lock) build.rs $(wildcard rust/*.rs rust/*.c)
FUZZ_SECONDS ?= 600
# For the C libraries. Their build also links tools, in which libFuzzer's functions are missing.
FUZZ_CFLAGS := -fsanitize=address -fsanitize-coverage=trace-pc,trace-cmp -fno-omit-frame-pointer
FUZZ_LDFLAGS := -Wl,--unresolved-symbols=ignore-all
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow check bench fuzz docs clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY)  ## Create .venv with everything: dependencies, the Rust extension, developer tools

$(READY): pyproject.toml $(RUST_SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "imagine_opd needs Python 3.10 or newer; set PYTHON=python3.x"; exit 1; }
	@command -v cargo >/dev/null || { echo "imagine_opd needs a Rust toolchain: https://rustup.rs"; exit 1; }
	@sh scripts/ensure_nasm.sh
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/maturin && test -x $(BIN)/cmake || $(BIN)/python -m pip install -q 'maturin>=1.9.4,<2' 'cmake>=3.20,<5'
	@echo "Building the Rust extension and installing what it needs (the first time: a few minutes, 6 GB)"
	@PIP_QUIET=1 $(BIN)/maturin develop -q --release --extras dev
	@touch $@

demo: setup  ## Watch a vision-language model learn to see fine detail (a few minutes on 2 cores)
	$(BIN)/imagine-opd demo --output demo

test: setup  ## Run the tests, on up to four cores at once
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

slow: setup  ## Run the tests that take over 30 s: runs killed at random moments, the GPU suite's dry run
	$(BIN)/python -m pytest -m slow

check: setup  ## Lint, types, stub, import floors, Rust format, lints and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest imagine_opd._rust
	$(BIN)/lint-imports
	cargo fmt --check
	cargo clippy --release --all-targets -- -D warnings
	cargo test --release --no-default-features --features simd

bench: setup  ## Benchmark views and kernels against their peers on this machine
	$(BIN)/python -m pytest benches --benchmark-only

fuzz: setup  ## Fuzz decoding, views and plans, FUZZ_SECONDS=600 each (nightly Rust and cargo-fuzz)
	@cargo +nightly fuzz --version >/dev/null 2>&1 || { echo "make fuzz needs nightly Rust and cargo-fuzz:" \
	  "rustup toolchain install nightly && cargo install cargo-fuzz"; exit 1; }
	@for run in decode:images views:images plan:plan; do \
	  mkdir -p fuzz/corpus/$${run%:*} && \
	  CFLAGS="$(FUZZ_CFLAGS)" LDFLAGS="$(FUZZ_LDFLAGS)" cargo +nightly fuzz run $${run%:*} fuzz/corpus/$${run%:*} \
	    fuzz/seeds/$${run#*:} -- -max_total_time=$(FUZZ_SECONDS) -max_len=32768 -timeout=20 -malloc_limit_mb=32 \
	    || exit 1; \
	done

docs: setup  ## Rewrite the generated parts of docs/ (the command line's help, memory tables)
	$(BIN)/python scripts/write_cli_help.py
	$(BIN)/python scripts/write_scaling.py

clean:  ## Remove what was built, the venv included
	rm -rf $(VENV) target dist
