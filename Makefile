# Two commands do everything on a fresh machine with Python 3.11+ and g++: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TYPED := -p optc.optimizer -p optc.passes -p optc.runtime -m optc -m optc.cli -m optc.errors
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all sanitize check format schema bench clean

demo: $(INSTALLED)
	$(BIN)/optc compile examples/tiny-llama -o build/tiny.optc --force
	$(BIN)/optc run build/tiny.optc -p "def read_lines(path):" -n 96 --temperature 0.7 --top-p 0.9 --seed 7

# One process a core, each with one thread: files are dealt out whole, so that they keep what they share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED)
	$(PYTEST)

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in every instruction set that this machine has. They are
# built first: a compiler takes long under the sanitizer's allocator. What aborts would take captured output with it (-s).
# Inductor takes no options in CXX, so its own code is left out.
SANITIZED := CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=all -g1"
BUILD_ALL := from optc.optimizer.lowering.native import *; from optc.runtime.ops.kernels import supports; \
	[build_kernels(isa) for isa in REQUIRED_FLAGS if supports(isa)]

sanitize: $(INSTALLED)
	$(SANITIZED) OPTC_CACHE=.pytest_cache/d $(BIN)/python -c "$(BUILD_ALL)"
	$(SANITIZED) LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -s tests/test_*_kernels.py -k "not compiled_code"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .mypy_cache/path && ln -sfn "$(CURDIR)" .mypy_cache/path/optc  # the root is the package: give it its name
	MYPYPATH=.mypy_cache/path $(BIN)/mypy $(TYPED)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(INSTALLED)
	$(BIN)/python -c "from optc.runtime.manifest import schema_json; print(schema_json(), end='')" > docs/manifest.schema.json

bench: $(INSTALLED)
	$(BIN)/python benchmarks/foundation.py

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
