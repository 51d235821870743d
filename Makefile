# `make demo` and `make test` do everything on a fresh machine; both may be run again at once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     := $(shell command -v uv 2>/dev/null)
# uv does not read pip's PIP_FIND_LINKS: hand it on.
UV_LINKS := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))

.PHONY: help demo test test-slurm fuzz certify-faults container-check lint clean

help:
	@echo "make demo        the whole recipe on an invented miniature world, ending in a table and an HTML report"
	@echo "make test        the whole test suite"
	@echo "make test-slurm  the batch jobs on a local Slurm (Debian's slurm-wlm; needs root to install it)"
	@echo "make fuzz        random files, questions, pairs, adapters and recipes for FUZZ_SECONDS (600)"
	@echo "make certify-faults  every layout's certificate, every injected fault (half an hour on two cores)"
	@echo "make container-check  the container's install script in a clean virtual environment, twice (no CUDA, no docker)"
	@echo "make lint        ruff, mypy, the import contract, shellcheck"

# A stamp file per set of dependencies, so that a second run installs nothing.
$(VENV)/.made:
	@echo "== making $(VENV)"
ifneq ($(UV),)
	uv venv --python $(PYTHON) $(VENV)
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
endif
	@touch $@

$(VENV)/.installed: $(VENV)/.made requirements.txt pyproject.toml
	@echo "== installing the package"
ifneq ($(UV),)
	uv pip install --python $(BIN)/python $(UV_LINKS) --editable .
else
	$(BIN)/python -m pip install --quiet --editable .
endif
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "== installing what the tests need"
ifneq ($(UV),)
	uv pip install --python $(BIN)/python $(UV_LINKS) --editable ".[test]"
else
	$(BIN)/python -m pip install --quiet --editable ".[test]"
endif
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/medllm pipeline examples/laptop.yaml

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slurm" -n 2 --dist loadfile $(PYTEST_ARGS)

test-slurm: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slurm tests/slurm $(PYTEST_ARGS)

fuzz: $(VENV)/.installed-test
	FUZZ_SECONDS=$${FUZZ_SECONDS:-600} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/fuzz $(PYTEST_ARGS)
# Everything that docs/certify.md says of layouts and faults; results as lines of JSON in build/certify.jsonl.
certify-faults: $(VENV)/.installed-test
	@mkdir -p build
	MEDLLM_CERTIFY_ALL=$(CURDIR)/build/certify.jsonl OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/dist/test_certify.py tests/dist/test_certify_faults.py $(PYTEST_ARGS)

# The second time everything is there, as torch is in NVIDIA's image: nothing may be replaced.
container-check:
	rm -rf build/container && $(PYTHON) -m venv build/container
	PYTHON=$(CURDIR)/build/container/bin/python EXTRAS= docker/install.sh
	build/container/bin/python -m pip freeze --exclude megatron-medllm >build/container/first.txt
	PYTHON=$(CURDIR)/build/container/bin/python EXTRAS= docker/install.sh
	build/container/bin/python -m pip freeze --exclude megatron-medllm | diff build/container/first.txt -

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@if command -v shellcheck >/dev/null; then shellcheck -x slurm/*.sbatch slurm/*.sh tools/*.sh docker/*.sh .ci/run; else echo "shellcheck is not installed: skipped"; fi

clean:
	rm -rf $(VENV) runs build *.egg-info
