# Two commands, on a fresh Debian or Ubuntu machine with Python >= 3.11, as root or with sudo:
#   make demo    make test
# With CPU=1 they install PyTorch without CUDA.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
EXTRAS := report,dev,docs,ffcv,timm,onnx,umap,tensorboard,wandb,mlflow,trackio
BIN := $(VENV)/bin
DEMO := demo
# Processes that run the tests, one file at a time each: three on two cores, since tests often wait.
# In the order of tests/conftest.py: by default files with few tests come last, and these are the slowest.
JOBS := 3
PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
FLOOR := tests/kernels tests/engine/test_capture.py tests/engine/test_working_weights.py tests/engine/test_step.py \
  tests/bench/test_launches.py tests/bench/test_mocked_gpu.py tests/bench/test_kernel_times.py \
  tests/faults/test_run_gpu.py
# The path from sources through betons and runs to accuracies. Only tests that compare with FFCV
# itself are skipped.
NO_FFCV := $(addprefix tests/data/test_,decoder.py decode_torchvision.py loader.py verify.py manifest.py jpeg_tables.py \
  beton_write.py convert.py embedded.py) $(addprefix tests/runs/test_,inputs.py folder.py) tests/engine/test_trainer.py \
  tests/evaluation/test_protocol.py tests/test_api.py tests/cli/test_main.py tests/test_first_light.py \
  tests/faults/test_data_reader.py tests/faults/test_data_mutations.py
# g++ and Python's headers build FFCV's extension. Tests judge JPEG files by libturbojpeg.
DEBIAN := g++ make python3-venv python3-dev libturbojpeg0-dev
# 30 MB of real images. Without them the installation goes on; the demonstration uses textures.
IMAGES := dataset-fashion-mnist
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Of the installers, uv alone has a name for PyTorch's builds without CUDA. Everything else is the same.
ifeq ($(CPU),1)
TORCH = $(PIP) install uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --torch-backend cpu \
  --constraint $(CONSTRAINTS) torch torchvision &&
endif

.PHONY: setup demo test lint types unit test-floor floor test-no-ffcv no-ffcv lowered lower faults docs-test docs slurm-test ray-test bench figures clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

$(VENV)/.system:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"fastbyol needs Python 3.11 or newer and {sys.executable} is {v[0]}.{v[1]}: run make PYTHON=python3.12")'
	@if [ -z "$(DEBIAN)" ]; then :; elif dpkg -s $(DEBIAN) >/dev/null 2>&1; then echo "system packages: all there"; else \
	  echo "system packages: installing $(DEBIAN)"; \
	  if [ "$$(id -u)" = 0 ]; then SUDO=; elif command -v sudo >/dev/null; then SUDO=sudo; \
	  else echo "neither root nor sudo: ask an administrator for: apt-get install $(DEBIAN)"; exit 1; fi; \
	  $$SUDO apt-get update -qq && \
	  $$SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(DEBIAN) >/dev/null; fi
	@[ -z "$(IMAGES)" ] || dpkg -s $(IMAGES) >/dev/null 2>&1 || { if [ "$$(id -u)" = 0 ]; then SUDO=; else SUDO=sudo; fi; \
	  $$SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(IMAGES) >/dev/null; } || \
	  echo "no package $(IMAGES): the demonstration downloads it or takes textures"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.python: $(VENV)/.system pyproject.toml $(CONSTRAINTS)
	@echo "python packages: installing torch and what else pyproject.toml names (several GB the first time)"
	@$(TORCH) $(PIP) install --constraint $(CONSTRAINTS) setuptools --editable '.[$(EXTRAS)]'
	@touch $@

# Libraries whose models tests read weights of, in a folder of their own and without what they demand:
# the one a second set of training libraries, the other torch 1.9.
$(VENV)/.foreign: $(VENV)/.python
	@$(PIP) install --no-deps --constraint $(CONSTRAINTS) --upgrade --target $(VENV)/foreign lightly solo-learn
	@touch $@

$(VENV)/.ready: $(VENV)/.python $(VENV)/.foreign fastbyol/build_ffcv.py
	@$(BIN)/python -m fastbyol.build_ffcv
	@touch $@

demo: setup
	$(BIN)/fastbyol demo $(DEMO)

test: setup lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# With bytecode, whatever the environment says: tests start hundreds of processes.
unit: setup
	PYTHONDONTWRITEBYTECODE= $(PYTEST)

# Tests what is compiled and launched on a GPU with the oldest versions that pyproject.toml allows,
# which such machines have.
OLDEST := VENV=.venv-floor CONSTRAINTS=constraints-floor.txt EXTRAS=report,dev,ffcv
test-floor:
	$(MAKE) $(OLDEST) floor

floor: setup
	$(PYTEST) $(FLOOR)

# Tests with fastbyol installed by pip alone: without FFCV and without Debian packages.
test-no-ffcv:
	$(MAKE) VENV=.venv-no-ffcv EXTRAS=report,dev DEBIAN= IMAGES= no-ffcv

no-ffcv: $(VENV)/.python
	$(PYTEST) $(NO_FFCV)

# Lowers a step for an H100 with Inductor, without an H100. Oldest versions; takes some minutes.
lowered:
	$(MAKE) $(OLDEST) lower

lower: setup
	$(BIN)/python -m fastbyol_bench.lowered

# Runs the faults of tests/faults/README.md at its full counts; `make test` runs a seeded few.
faults: setup
	FASTBYOL_FAULTS=full $(BIN)/python -m pytest -s --timeout 14400 tests/faults

# Runs every command line of README.md and docs, the notebooks, and the site's build; `make test`
# does, too.
docs-test: setup
	$(BIN)/python -m pytest tests/test_docs.py tests/bench/site

# The documentation site, in site/: some seconds. Anything broken in it is an error. `python -m
# mkdocs serve` shows it while one writes.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# The launcher on a real SLURM of this machine, which pre-empts jobs (tests/slurm/README.md). As root,
# in some minutes.
SLURM := slurmctld slurmd slurm-client munge
slurm-test: setup
	@dpkg -s $(SLURM) >/dev/null 2>&1 || { apt-get update -qq && \
	  env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM) >/dev/null; }
	$(BIN)/python -m pytest -s tests/slurm/launcher.py

# The launcher on a Ray cluster of two CPUs of this machine.
ray-test: setup
	$(PIP) install --constraint $(CONSTRAINTS) --editable '.[ray]'
	$(BIN)/python -m pytest -s tests/ray_cluster/launcher.py

# About ten minutes on two cores. Run it on a quiet machine only.
bench: setup
	$(BIN)/fastbyol bench all --device cpu --out bench/results/cpu.json
	$(BIN)/python -m fastbyol_bench.readme

figures: setup
	$(BIN)/python -m fastbyol_bench.first_light bench/results/first_light

clean:
	rm -rf .venv .venv-floor .venv-no-ffcv $(DEMO) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
