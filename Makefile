# `make` lists the targets. Everything runs in .venv, made on first use with $(PYTHON);
# test-torch has an environment for each version of torch.

PYTHON ?= python3
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
# Processes that run the tests, one for each core; a file's tests stay in one of them.
WORKERS ?= auto
FUZZ_SECONDS ?= 600
# Settings under which torch computes as on other processors: see CONTRIBUTING.md. Commas join some.
PROCESSORS ?= OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 \
	ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE PERTURB=1
TORCH ?=
# The version of the npm package that a browser runs ONNX files with.
ONNXRUNTIME_WEB := 1.30.0

# Threads that wait must not spin: on a busy machine that costs more than it saves.
export OMP_WAIT_POLICY ?= passive

VENV := .venv
PINS := -c constraints.txt
PARALLEL := -n $(WORKERS) --dist loadfile
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo docs test test-slow test-integrations test-notebooks test-kernels test-gpu test-torch test-processors test-processors-short coverage fuzz lint format wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*  ## ' Makefile | sed -E 's/^([a-z-]+):.*  ## /\1\t/' | \
		while IFS="$$(printf '\t')" read -r name text; do printf '  make %-22s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.installed-demo  ## train and compress a small model: examples/mnist.py $(DEMO_FLAGS)
	$(PY) examples/mnist.py $(DEMO_FLAGS)

docs: $(VENV)/.installed-docs  ## build the site of the docs into build/site and check it
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	DIFFQ_SITE=build/site $(PY) -m pytest -q tests/docs/test_site.py

test: $(VENV)/.installed-test  ## run the tests: pytest $(PYTEST_FLAGS)
	$(PY) -m pytest $(PARALLEL) $(PYTEST_FLAGS)

test-slow: $(VENV)/.installed-test  ## run the tests marked slow, which `make test` leaves out
	$(PY) -m pytest -m slow $(PARALLEL) $(PYTEST_FLAGS)

test-integrations: $(VENV)/.installed-integrations $(VENV)/node_modules  ## run the tests of models in other libraries
	$(PY) -m pytest tests/integrations $(PARALLEL) $(PYTEST_FLAGS)

test-notebooks: $(VENV)/.installed-notebooks  ## run the notebooks of examples/notebooks
	$(PY) -m pytest -m 'slow or not slow' tests/docs/test_notebooks.py $(PYTEST_FLAGS)

test-kernels: $(VENV)/.installed-kernels  ## run the tests of GPU kernels in Triton's interpreter
	TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels $(PARALLEL) $(PYTEST_FLAGS)

test-gpu: $(VENV)/.installed-test  ## run the tests that need a GPU on it, with the Triton of its torch
	$(PY) -m pytest tests/gpu tests/kernels $(PYTEST_FLAGS)

test-processors: $(VENV)/.installed-test  ## run the tests as on other processors, $(PROCESSORS)
	@failed=; for settings in $(PROCESSORS); do \
		printf '\n== %s\n' "$$settings"; \
		env $$(echo "$$settings" | tr , ' ') $(PY) -m pytest -q $(PARALLEL) $(PYTEST_FLAGS) || \
			failed="$$failed $$settings"; \
	done; test -z "$$failed" || { echo "error: tests fail under$$failed" >&2; exit 1; }

# Without the files that take long, that multiply no matrices, or that need other libraries.
test-processors-short: PROCESSORS = ATEN_CPU_CAPABILITY=default,OMP_NUM_THREADS=2,PERTURB=1
test-processors-short: PYTEST_FLAGS += $(addprefix --ignore=tests/,format fuzz legacy cli reports docs packed ptq integrations kernels \
	test_distributed.py test_benchmarks.py test_sweep.py storage/test_open.py storage/test_load.py $(patsubst %,attach/test_%.py,compile fault_injection attach changed_models))
test-processors-short: test-processors  ## the same in a few minutes: several settings at once

test-torch:  ## run the tests on another torch: TORCH=2.6.0, in an environment of its own
	@test -n '$(TORCH)' || { echo 'test-torch needs a version: make test-torch TORCH=2.6.0' >&2; exit 2; }
	$(MAKE) test VENV=.venv-torch-$(TORCH) PINS=torch==$(TORCH)

coverage: $(VENV)/.installed-dev  ## check that the tests reach every branch of diffq.format
	$(PY) -m pytest -q tests/format tests/fuzz --cov=diffq.format --cov-branch --cov-fail-under=100

fuzz: $(VENV)/.installed-dev  ## fuzz the reader of files for FUZZ_SECONDS with atheris
	$(PIP) install 'atheris>=2.3'
	$(PY) -m tests.fuzz.fuzz_reader -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=3000 out/corpus

lint: $(VENV)/.installed-dev  ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed-dev  ## rewrite the sources in the checked style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

wheel: $(VENV)/.created  ## build the wheel into dist/
	rm -rf build dist
	$(PIP) wheel --no-deps --wheel-dir dist .
	@ls dist

clean:  ## remove the environments, build outputs and caches
	rm -rf .venv .venv-torch-* build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an environment and its packages are made once, and again when their inputs change.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
		"diffq needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0] + \
		": name another one, e.g. make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Without npm, or without Chromium, the test in a browser is skipped.
$(VENV)/node_modules: Makefile | $(VENV)/.created
	@! command -v npm > /dev/null || npm install --prefix $(VENV) --silent --no-audit --no-fund \
		--ignore-scripts onnxruntime-web@$(ONNXRUNTIME_WEB)
	@! test -d $@ || touch $@

$(VENV)/.installed-%: pyproject.toml setup.cfg constraints.txt | $(VENV)/.created
	@echo "Installing diffq[$*] into $(VENV) (the first time takes some minutes: torch is large)"
	$(PIP) install $(PINS) -e '.[$*]'
	@touch $@
