# `make` lists the targets. Everything is set up in $(VENV), once for each choice of torch.

TORCH  ?= torch==2.13.0
PYTHON ?= python3
VENV   ?= .venv
TESTS  ?= tests
PYTEST ?= -n 2
SANITIZE       ?= address,undefined
SANITIZE_TESTS ?= tests -m "not slow and not gpu" --ignore tests/test_benchmarks.py

BIN       := $(VENV)/bin
CPP_FILES  = $(shell find csrc tests -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

help:
	@echo 'make demo       train two small language models with the native loss and with this one'
	@echo 'make test       run the tests            TESTS="tests/test_x.py -k name" chooses, PYTEST="-n 2" are options'
	@echo 'make test-all   run the exhaustive grids too'
	@echo 'make sanitize   run the tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer (Linux, gcc)'
	@echo 'make benchmarks measure everything on this CPU and write docs/benchmarks.md. Half an hour'
	@echo 'make gpu        on a machine with a CUDA GPU: build, test, check and measure with the Python there is'
	@echo 'make kernels    compile every CUDA kernel for every architecture, and check what nvcc made: a quarter of an hour'
	@echo 'make build      only set up and build    DEBUG=1 with symbols, CXX=clang++ another compiler'
	@echo 'make wheel      write a wheel to dist/'
	@echo 'make lint       check style              make format mends it'
	@echo 'make clean      remove what was built    make distclean removes $(VENV) too'
	@echo
	@echo 'TORCH="torch==2.12.0" chooses another torch (now $(TORCH)), PYTHON=python3.12 the Python of a new $(VENV).'

demo: build
	$(BIN)/python examples/language_model.py

# Without the cases that are marked `long`.
test: build
	$(BIN)/python -m pytest $(PYTEST) -m "not long" $(TESTS)

test-all: build
	$(BIN)/python -m pytest $(PYTEST) $(TESTS)

# Always asks ninja, which knows every header and flag; nothing to do takes two seconds, most of it to import torch.
build: $(VENV)/installed
	$(BIN)/python setup.py --quiet build_ext --inplace

wheel: $(VENV)/installed
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# The recorded choice of torch changes only when TORCH does, and then everything is installed again.
$(VENV)/torch: always
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || { rm -f $(VENV)/installed; echo '$(TORCH)' > $@; }

$(VENV)/installed: $(VENV)/torch pyproject.toml
	@echo 'Setting up $(VENV) with $(TORCH), and building: this takes a few minutes, once.'
	$(BIN)/python -m pip install --quiet 'setuptools>=77' ninja '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev,examples,bench,clients]'
	@touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: $(VENV)/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_FILES)

# A second package beside a copy of the tests, so that neither the normal build nor Python's path is touched. The
# sanitizers' runtimes have to be there before Python's own allocations. PyTorch leaks by design.
STAGE := build/sanitized
sanitize: $(VENV)/installed
	rm -rf $(STAGE) && mkdir -p $(STAGE) && cp -R csrc tests pyproject.toml $(STAGE)
	CXX=$(CXX) SANITIZE=$(SANITIZE) $(BIN)/python setup.py --quiet build --build-lib $(STAGE)
	cd $(STAGE) && \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 SANITIZE=$(SANITIZE) \
	    $(abspath $(BIN))/python -m pytest --capture=sys $(SANITIZE_TESTS)

# Needs a CUDA torch, nvcc and pytest, and neither a network nor $(VENV). The script says where results go.
gpu:
	PYTHON=$(PYTHON) bash benchmarks/gpu_acceptance.sh

# Needs nvcc, and no GPU.
kernels: $(VENV)/installed
	XENT_COMPILE_ALL=1 $(BIN)/python -m pytest $(PYTEST) tests/test_cuda_compile.py

# With `pip install '.[peers]'` the accuracy table has Liger in it. A result stands for the machine it was measured on.
benchmarks: build
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.idioms
	$(BIN)/python -m benchmarks.linear
	$(BIN)/python -m benchmarks.vocab_parallel
	$(BIN)/python -m benchmarks.frameworks
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf build dist *.egg-info cross_entropy_ext/*.so .pytest_cache .ruff_cache examples/output
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

always:
.PHONY: help demo test test-all build wheel lint format sanitize gpu kernels benchmarks clean distclean always
