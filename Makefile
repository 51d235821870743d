# `make demo` and `make test` do everything on a fresh machine. Rerun any target: finished work is skipped.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     := $(shell command -v uv 2>/dev/null)
# uv does not read pip's PIP_FIND_LINKS: hand it on.
UV_LINKS := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))
# install WHAT: into the environment, without a word unless it fails.
ifneq ($(UV),)
install = uv pip install --quiet --python $(BIN)/python $(UV_LINKS) $(1)
else
install = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(1)
endif
# One thread a process: the tests' processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast install-mcore-new test-mcore-new test-slurm fuzz certify-faults container-check coverage lint docs docs-tables release-check clean

help: ## list these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F '\t' '{ printf "%-22s%s\n", $$1, $$2 }'

# A stamp file per set of dependencies, so that a second run installs nothing.
$(VENV)/.made:
	@tools/check_host.sh $(PYTHON) $(VENV) $(if $(UV),uv)
	@echo "== making $(VENV)"
ifneq ($(UV),)
	@uv venv --quiet --allow-existing --python $(PYTHON) $(VENV)
else
	@$(PYTHON) -m venv $(VENV)
	@$(call install,--upgrade pip)
endif
	@touch $@

$(VENV)/.installed: $(VENV)/.made requirements.txt pyproject.toml
	@echo "== installing the package"
	@$(call install,--editable .)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "== installing what the tests need"
	@$(call install,--editable ".[test]")
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "== installing what the documentation needs"
	@$(call install,--editable ".[docs]")
	@touch $@

demo: $(VENV)/.installed ## the whole recipe on an invented miniature world, ending in a table and an HTML report
	$(BIN)/medllm pipeline examples/laptop.yaml

test: $(VENV)/.installed-test ## the whole test suite (but for test-slurm)
	$(PYTEST) -m "not slurm" -n 2 --dist loadfile $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-test ## unit tests only, without the slow ones: two and a half minutes on two cores
	$(PYTEST) -q -m "not slow" -n 2 --dist worksteal tests/unit $(PYTEST_ARGS)

# The other Megatron-Core (megatron_medllm/versions.py), on a newer Python, in an environment of its own. It holds torch's
# CUDA build where pip finds no other: 3 GB to download, 6 GiB on the disk.
NEW_PYTHON ?= python3.12
NEW_VENV   ?= .venv-312
NEW_TESTS  := tests/unit/parallel tests/unit/models tests/unit/checkpoint tests/unit/train tests/unit/test_versions.py \
  $(addprefix tests/dist/test_,$(addsuffix .py,conversion saves model_layouts adapter_layouts overlaps rpo_layouts \
  context_parallel logprob_tp lone_ranks)) \
  $(addprefix tests/e2e/test_,$(addsuffix .py,megatron_versions train_cpt cpt_gradients rpo_gradients pipeline))

install-mcore-new:
	@MEDLLM_NEEDED_GIB=8 $(MAKE) --no-print-directory VENV=$(NEW_VENV) PYTHON=$(NEW_PYTHON) $(NEW_VENV)/.installed-test

test-mcore-new: $(VENV)/.installed-test install-mcore-new ## the newest Megatron-Core on Python 3.12: parallel, models, checkpoint, train, dist, the demo
	MEDLLM_OTHER_PYTHON=$(abspath $(BIN)/python) OMP_NUM_THREADS=1 $(NEW_VENV)/bin/python -m pytest -m "not slurm" -n 2 --dist loadfile $(NEW_TESTS) $(PYTEST_ARGS)

test-slurm: $(VENV)/.installed-test ## the batch jobs on a local Slurm (Debian's slurm-wlm; needs root to install it)
	$(BIN)/python -m pytest -m slurm tests/slurm $(PYTEST_ARGS)

fuzz: $(VENV)/.installed-test ## random files, questions, pairs, adapters and recipes for FUZZ_SECONDS (600)
	FUZZ_SECONDS=$${FUZZ_SECONDS:-600} $(PYTEST) -q tests/fuzz $(PYTEST_ARGS)

# The second time everything is there, as torch is in NVIDIA's image: nothing may be replaced.
container-check: ## the container's install script in a clean virtual environment, twice (no CUDA, no docker)
	rm -rf build/container && $(PYTHON) -m venv build/container
	PYTHON=$(CURDIR)/build/container/bin/python EXTRAS= docker/install.sh
	build/container/bin/python -m pip freeze --exclude megatron-medllm >build/container/first.txt
	PYTHON=$(CURDIR)/build/container/bin/python EXTRAS= docker/install.sh
	build/container/bin/python -m pip freeze --exclude megatron-medllm | diff build/container/first.txt -

# Everything that docs/certify.md says of layouts and faults; results as lines of JSON in build/certify.jsonl.
certify-faults: $(VENV)/.installed-test ## every layout's certificate, every injected fault (half an hour on two cores)
	@mkdir -p build
	MEDLLM_CERTIFY_ALL=$(CURDIR)/build/certify.jsonl $(PYTEST) tests/dist/test_certify.py tests/dist/test_certify_faults.py $(PYTEST_ARGS)

# Every process that the tests start is measured too ([tool.coverage] in pyproject.toml).
coverage: $(VENV)/.installed-test ## lines that the test suite reaches: a table, and build/coverage/index.html
	@rm -rf build/coverage && mkdir -p build/coverage
	COVERAGE_FILE=$(CURDIR)/build/coverage/data $(PYTEST) -m "not slurm" -n 2 --dist loadfile --cov=megatron_medllm --cov-report= $(PYTEST_ARGS)
	-@COVERAGE_FILE=$(CURDIR)/build/coverage/data $(BIN)/coverage combine --append --quiet build/coverage 2>/dev/null  # of processes that ended last
	COVERAGE_FILE=$(CURDIR)/build/coverage/data $(BIN)/coverage html --quiet --directory build/coverage
	COVERAGE_FILE=$(CURDIR)/build/coverage/data $(BIN)/coverage report --skip-covered --sort=miss

lint: $(VENV)/.installed-test ## ruff, mypy, the import contract, shellcheck
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@if command -v shellcheck >/dev/null; then shellcheck -x slurm/*.sbatch slurm/*.sh tools/*.sh docker/*.sh .ci/run; else echo "shellcheck is not installed: skipped"; fi

docs-tables: $(VENV)/.installed ## rerun the commands whose output the documentation shows, and rewrite it
	$(BIN)/python tools/docs_tables.py

docs: $(VENV)/.installed-docs ## the documentation as a site in build/site; a dead link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

release-check: ## build the wheel, install it into an environment of its own and use it there
	@tools/check_host.sh $(PYTHON) build/release
	PYTHON=$(PYTHON) tools/check_release.sh

clean: ## remove the environment, runs and everything built
	rm -rf $(VENV) $(NEW_VENV) runs build dist *.egg-info
