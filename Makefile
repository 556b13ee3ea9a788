# toppy's commands for developers; `make help` lists them.
PYTHON ?= python3
# one environment per interpreter, so that `make test PYTHON=python3.13` stands beside the default
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
# what `make run` and friends use
DEV := .dev
SOURCES := pyproject.toml $(wildcard toppy/quic/native/Cargo.* toppy/quic/native/src/*.rs)

.DEFAULT_GOAL := help
.PHONY: help install demo run doctor test check lint format types layers rust-check bench docs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Make the virtual environment and install toppy with its tools

$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "toppy needs Python 3.11 or later; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@$(BIN)/python -c 'from toppy.quic.choose import SLOW_ENGINE_NOTICE, has_native_engine; \
	  print("native engine: built" if has_native_engine() else "NOTE: " + SLOW_ENGINE_NOTICE)'
	@touch $@

demo: install ## Start a gateway and a client, put real applications through them, say what happened
	@$(BIN)/python -m integration.demo

run: install ## Run a development gateway in the foreground (configuration in .dev/)
	@test -f $(DEV)/gateway.toml || $(BIN)/toppy-gw init $(DEV) --listen 127.0.0.1:4433 --health 127.0.0.1:8080
	$(BIN)/toppy-gw run --config $(DEV)/gateway.toml

doctor: install ## Check the way to the gateway of `make run`
	$(BIN)/toppy doctor --config $(DEV)/client.toml

test: install ## Run the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: test lint types layers rust-check ## What CI runs: tests, lint, types, layers, Rust

lint: install ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## Mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install ## Types
	$(BIN)/mypy

layers: install ## Which module may import which
	$(BIN)/lint-imports

rust-check: ## The binding's own tests and lints, where there is Rust
	@if command -v cargo >/dev/null; then \
	  cd toppy/quic/native && cargo fmt --check && cargo clippy --quiet --release --all-features --all-targets -- -D warnings && cargo test --quiet --release; \
	else echo "rust-check: no cargo here, the native engine is not built or tested"; fi

bench: install ## Measure: app -> client -> gateway -> target, both engines
	$(BIN)/python -m integration.bench

docs: install ## Write the generated pages of docs/
	$(BIN)/python -m toppy.config.reference > docs/configuration.md

clean: ## Remove what the other commands made
	rm -rf .venv .venv-* $(DEV) .toppy-demo build *.egg-info toppy/quic/*.so toppy/quic/native/target \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
