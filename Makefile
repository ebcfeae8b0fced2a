# Everything a user or CI runs. `make setup` makes .venv once; the other targets do it by themselves.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments for pip where torch is installed, such as --index-url for a CPU-only build of torch.
TORCH_PIP_ARGS ?=
# Extra arguments for the benchmarks of `make bench`, such as --quick.
BENCH_ARGS ?=

.PHONY: setup demo test bench lint format clean

KERNELS := $(wildcard torchrec_mpe/kernels/cpu/*)

setup: $(VENV)/.built

$(VENV)/.installed: pyproject.toml tools/install.sh
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10, 3.11 or 3.12 found; install one, or set PYTHON=/path/to/python"; exit 2; }
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_PIP_ARGS="$(TORCH_PIP_ARGS)" bash tools/install.sh
	@touch $@

# The C++ operators, in place; again whenever one of their sources changes.
$(VENV)/.built: setup.py $(KERNELS) $(VENV)/.installed
	@echo "building the C++ operators" >&2
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace >build-operators.log 2>&1 \
		|| { tail -n 30 build-operators.log >&2; exit 2; }
	@rm build-operators.log
	@touch $@

demo: setup
	@rm -rf demo-output
	$(BIN)/torchrec-mpe demo --out demo-output

test: setup
	$(BIN)/python -m pytest

# Prints what was measured and, unless the run is a quick one, records it in benchmarks/results.
bench_json = $(if $(filter --quick,$(BENCH_ARGS)),,--json benchmarks/results/$(1).json)

bench: setup
	$(BIN)/python benchmarks/lookup.py $(BENCH_ARGS) $(call bench_json,lookup)
	$(BIN)/python benchmarks/search_op.py $(BENCH_ARGS) $(call bench_json,search_op)
	$(BIN)/python benchmarks/train_step.py $(BENCH_ARGS) $(call bench_json,train_step)
	@if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then \
		$(BIN)/python benchmarks/gpu_lookup.py $(BENCH_ARGS) $(call bench_json,gpu_lookup); \
	else echo "bench: gpu_lookup.py is left out, there is no NVIDIA GPU here"; fi

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy torchrec_mpe

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output torchrec_mpe/kernels/*.so
