# Two commands do everything from a bare clone: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

# Every Triton that is supported. Its 3.6.0 does not interpret loops beside numpy 2.4.
TRITONS := 3.6.0 3.7.1 3.9.0
BESIDE_3.6.0 := numpy==2.3.5

# One thread a worker: the workers fill the cores, and results do not depend on the machine's size.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --durations=15

# What `make soak` and `make fuzz` try: from which seed, how many cases and, for soak, how many disturbances of each kind
# and how many seconds at most.
SEED ?= 1000
CASES ?= 5000
DISTURBANCES ?= 100
SECONDS ?= 900

.PHONY: demo test lint types unit interpreter aot soak fuzz sanitize test-gpu matrix format clean

demo: $(READY)
	$(BIN)/lhc-triton demo --out out/demo

NATIVE := kernels/lhc_kernels/cpu
SOURCES := $(wildcard $(NATIVE)/*.cpp $(NATIVE)/*.h) tests/kernels/native_driver.cpp

test: lint types unit interpreter aot

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(PYTEST) -m "not interpreter and not aot and not gpu"

# Interpreted and compiled kernels cannot share a process: the variable is read when a kernel is decorated.
interpreter: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter

aot: $(READY)
	$(PYTEST) -m aot

soak: $(READY)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/runtime/soak.py --first $(SEED) --cases $(CASES) \
	  --disturbances $(DISTURBANCES) --seconds $(SECONDS) --workers $(WORKERS)

# Damaged files of every kind that is read, and random networks through files; the tests try some of each.
fuzz: $(READY)
	OMP_NUM_THREADS=1 LHC_TRITON_FUZZ=$(CASES) LHC_TRITON_FUZZ_SEED=$(SEED) $(BIN)/python -m pytest \
	  tests/runtime/saved/test_artifact_fuzz.py tests/runtime/saved/test_artifact_random.py \
	  tests/runtime/saved/test_readers_fuzz.py

matrix: $(TRITONS:%=matrix-%)

# A throw-away environment holds this Triton alone and takes everything else from the pinned one.
matrix-%: $(READY)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && set -e && \
	$(BIN)/python -m venv "$$folder" && python="$$folder/bin/python" && \
	purelib='import sysconfig; print(sysconfig.get_path("purelib"))' && \
	$(BIN)/python -c "$$purelib" > "$$($$python -c "$$purelib")/pinned.pth" && \
	$$python -m pip install --quiet --disable-pip-version-check --no-deps triton==$* $(BESIDE_$*) && \
	$$python -c 'import numpy, torch, triton; print("== Triton", triton.__version__, "numpy", \
	  numpy.__version__, "torch", torch.__version__)' && \
	export OMP_NUM_THREADS=1 TRITON_CACHE_DIR="$$folder/cache" && \
	TRITON_INTERPRET=1 $$python -m pytest -n $(WORKERS) -m interpreter && \
	$$python -m pytest -n $(WORKERS) -m aot

# Random calls of the native kernel, without torch or Python, in a build that stops at the first bad address, overflow or
# shift (AddressSanitizer, UBSan).
sanitize:
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && set -e && \
	for source in tests/kernels/native_driver.cpp $(addprefix $(NATIVE)/,cells_float.cpp cells_pairs.cpp \
	  cells_fours.cpp conv.cpp finish.cpp layer.cpp quantise.cpp regions.cpp); do echo "$$source"; \
	  $${CXX:-c++} -std=c++20 -O1 -g1 -march=native -Wall -Wextra -Werror -fsanitize=address,undefined \
	    -fno-sanitize-recover -I $(NATIVE) -c $$source -o "$$folder/$$(basename $$source).o"; done && \
	$${CXX:-c++} -fsanitize=address,undefined -pthread "$$folder"/*.o -o "$$folder/driver" && \
	"$$folder/driver" $(SEED) $(CASES)

# With the machine's own Python and packages (torch, triton, pytest, hypothesis and what lhc_triton imports), from the bare
# checkout. Most of the time goes to compiling, so with pytest-xdist there is a worker for each core. Of other plugins and of
# the packages' warnings nothing is known, so the former are not loaded and the latter only shown.
test-gpu: export PYTHONPATH := .:kernels:bench
test-gpu: export PYTEST_DISABLE_PLUGIN_AUTOLOAD := 1
test-gpu: export OMP_NUM_THREADS := 1
test-gpu:
	$(PYTHON) -m pytest $(if $(shell $(PYTHON) -c 'import xdist' 2>&1),,-p xdist -n $(shell nproc)) -W default \
	  -m gpu --durations 10 tests/kernels tests/runtime

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	  "make: Python %d.%d found, 3.11 to 3.13 supported: set PYTHON=/path/to/python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
