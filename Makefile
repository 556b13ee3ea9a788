# toppy's commands for developers; `make help` lists them.
PYTHON ?= python3
# one environment per interpreter, so that `make test PYTHON=python3.13` stands beside the default
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
# what `make run` and friends use
DEV := .dev
SOURCES := pyproject.toml $(wildcard toppy/quic/native/Cargo.* toppy/quic/native/src/*.rs)

.DEFAULT_GOAL := help
.PHONY: help venv demo run doctor compose-up compose-down test check lint format types layers rust-check bench bench-quick docs wheel install uninstall clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## Make the virtual environment and install toppy with its tools

$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "toppy needs Python 3.11 or later; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@$(BIN)/python -c 'from toppy.quic.choose import SLOW_ENGINE_NOTICE, has_native_engine; \
	  print("native engine: built" if has_native_engine() else "NOTE: " + SLOW_ENGINE_NOTICE)'
	@touch $@

demo: venv ## Start a gateway and a client, put real applications through them, say what happened
	@$(BIN)/python -m integration.demo

run: venv ## Run a development gateway in the foreground (configuration in .dev/)
	@test -f $(DEV)/gateway.toml || $(BIN)/toppy-gw init $(DEV) --listen 127.0.0.1:4433 --health 127.0.0.1:8080
	$(BIN)/toppy-gw run --config $(DEV)/gateway.toml

doctor: venv ## Check the way to the gateway of `make compose-up`, or else of `make run`
	$(BIN)/toppy doctor --config $(firstword $(wildcard $(DEV)/compose/client.toml) $(DEV)/client.toml)

compose-up: ## Start gateway, UDP echo and client in containers, and wait until they are healthy
	docker/compose.sh up

compose-down: ## End them, and remove what they made
	docker/compose.sh down

test: venv ## Run the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: test lint types layers rust-check ## What CI runs: tests, lint, types, layers, Rust

lint: venv ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv ## Mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: venv ## Types
	$(BIN)/mypy

layers: venv ## Which module may import which
	$(BIN)/lint-imports

rust-check: ## The binding's own tests and lints, where there is Rust
	@if command -v cargo >/dev/null; then \
	  cd toppy/quic/native && cargo fmt --check && cargo clippy --quiet --release --all-features --all-targets -- -D warnings && cargo test --quiet --release; \
	else echo "rust-check: no cargo here, the native engine is not built or tested"; fi

bench: venv ## Measure everything three times, beside other gateways; writes docs/performance.md (an hour)
	$(BIN)/python -m integration.bench

bench-quick: venv ## The main figures, in a minute; writes nothing
	$(BIN)/python -m integration.bench --quick

docs: venv ## Write the generated pages of docs/
	$(BIN)/python -m toppy.config.reference > docs/configuration.md
	$(BIN)/python -m toppy.client.doctor.report > docs/doctor.schema.json

wheel: venv ## Make a wheel in dist/, for `make install PACKAGE=dist/…whl`
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist \
	  --config-settings=--build-option=--py-limited-api=cp311 .

# PREFIX=, DESTDIR= and the others reach the script as make hands them on; it says what they mean
install: ## Install for the whole system, as a service (root; docs/systemd.md)
	@systemd/install.sh install

uninstall: ## Remove what `make install` put there; /etc/toppy stays
	@systemd/install.sh uninstall

clean: ## Remove what the other commands made
	rm -rf .venv .venv-* $(DEV) .toppy-demo build dist *.egg-info toppy/quic/*.so toppy/quic/native/target \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
