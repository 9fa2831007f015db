# make engine   set up, export the embedded model to a TensorRT plan, and show what it makes of real questions
# make app      the same, and open the search page over it in a browser
# make test     set up and run the default tests on all cores; WORKERS=0 for one after the other
# make test-all   the default tests and the slow ones: browser, README commands, parity of the embedded model
# make test-python310  the runtime under Python 3.10, as on JetPack 6, in an environment of its own
# make bench    beside sentence-transformers, optimum, fastembed and PyTorch on this CPU; DATA=FOLDER for your data sets
# make bench-gpu  on a machine with an NVIDIA GPU: its tests, an engine for it, and that beside PyTorch in FP16
# make docs     build the pages of docs/ and the API reference into build/site
# make check    formatting, lint and types, as CI runs them

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Where pip finds torch 2.13.0; empty for pip's default, see the README for CPU-only and CUDA builds.
TORCH_INDEX ?=
PYTHON310 ?= python3.10
PRECISION ?= fp16
# What `make engine` needs; `make app` adds its own, and `make test` and `make check` the rest.
EXTRAS ?= export,cpu,rtx
TEST_EXTRAS ?= openvino,train,evaluation,serve,app,qdrant,ray,dev
# Folder of data sets for `make bench`; empty for passages of Python's documentation.
DATA ?=
# Files of tests at a time, on cores of their own; two took 5.4 GB together. 0 for one after the other.
WORKERS ?= $(shell cores=$$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN); echo $$((cores > 4 ? 4 : cores)))
# What builds engines for this machine's GPU: TensorRT-RTX for RTX cards, TensorRT for those it does not build for.
GPU_RUNTIME ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | grep -qE '^(7\.5|8\.0|9\.0|10\.|12\.1)' && echo trt || echo rtx)
GPU_TARGET ?= $(if $(filter trt,$(GPU_RUNTIME)),datacenter,rtx)
PEERS ?= build/peers
VENV := .venv
BIN := $(VENV)/bin
# Python compiles a module when it is first imported; compiling all 141 distributions ahead takes as long as installing.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
TORCH = $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
READY := $(VENV)/.ready
READY_APP := $(VENV)/.ready-app
READY_TEST := $(VENV)/.ready-test
READY_310 := $(VENV)-3.10/.ready
READY_DOCS := $(VENV)-docs/.ready
# A file of tests at a time goes to each worker, in the order of tests/conftest.py: long ones first.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10
BUNDLE := bundles/nv-embed-mini-$(PRECISION)

.PHONY: engine app test test-all test-python310 docs check format bench bench-gpu clean

engine: $(READY)
	$(BIN)/python -m export.trt --precision $(PRECISION) --out $(BUNDLE)
	$(BIN)/nvembed similarity $(BUNDLE)

app: $(READY_APP)
	$(BIN)/nvembed app

# Each tier by its markers; CONTRIBUTING.md says which one a new test belongs to.
test: $(READY_TEST)
	$(PYTEST) -m "not slow and not browser and not whole_machine" $(ARGS)

test-all: $(READY_TEST)
	@shared=$$(mktemp -d); trap 'rm -rf "$$shared"' EXIT; export NVEMBED_TEST_SHARED="$$shared"; set -ex; \
	$(PYTEST) -m "not whole_machine" $(ARGS); \
	$(BIN)/python -m pytest -m whole_machine --durations=10 $(ARGS) || test $$? = 5  # none of these in ARGS

test-python310: $(READY_TEST) $(READY_310)
	NVEMBED_PYTHON310=$(abspath $(VENV)-3.10/bin/python) $(BIN)/python -m pytest tests/test_python310.py

bench: $(READY_TEST)
	$(BIN)/python -m benchmarks.peers $(PEERS) $(if $(DATA),--data $(DATA))

bench-gpu: $(READY_TEST)
	$(PIP) --editable '.[$(GPU_RUNTIME)]'
	NVEMBED_GPU=required $(BIN)/python -m pytest -m gpu
	$(BIN)/python -m export.trt --precision fp16 --target $(GPU_TARGET) --out bundles/gpu-fp16
	NVEMBED_GPU=required NVEMBED_BUNDLE=bundles/gpu-fp16 $(BIN)/python -m pytest -m gpu tests/backends/test_gpu.py
	$(BIN)/nvembed bench bundles/gpu-fp16 reference@models/nv-embed-mini --device cuda --out build/gpu-bench.json

docs: $(READY_DOCS)
	$(VENV)-docs/bin/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs build/site

check: $(READY_TEST)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY_TEST)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml constraints.txt
	@echo "1/3 making $(VENV) with $(PYTHON)"
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit('error: Python 3.10 or newer is needed, 3.11 is tested; pass PYTHON=...')"
	@$(PYTHON) -m venv $(VENV)
	@echo "2/3 installing torch 2.13.0 (CPU-only: 0.9 GB; with CUDA: several GB)"
	@command -v nvidia-smi > /dev/null || $(TORCH) torch==2.13.0+cpu 2> /dev/null || true  # where an index has that build
	@$(TORCH) torch==2.13.0
	@echo "3/3 installing $(EXTRAS) in the versions of constraints.txt (0.5 GB)"
	@$(PIP) --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

$(READY_APP): $(READY)
	@echo "installing the search page's packages in the versions of constraints.txt (0.4 GB)"
	@$(PIP) --constraint constraints.txt --editable '.[app]'
	@touch $@

$(READY_TEST): $(READY)
	@echo "installing what the tests and checks need too: $(TEST_EXTRAS) (1.9 GB)"
	@$(PIP) --constraint constraints.txt --editable '.[$(TEST_EXTRAS)]'
	@touch $@

$(READY_310): constraints-3.10.txt
	@echo "making $(VENV)-3.10 with the runtime alone (0.3 GB)"
	@$(PYTHON310) -m venv $(VENV)-3.10
	@$(VENV)-3.10/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --requirement constraints-3.10.txt
	@touch $@

$(READY_DOCS): pyproject.toml constraints.txt
	@echo "making $(VENV)-docs with Sphinx (0.2 GB)"
	@$(PYTHON) -m venv $(VENV)-docs
	@$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-3.10 $(VENV)-docs bundles build dist *.egg-info
