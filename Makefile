# Every target sets up what it needs in .venv; nothing has to be installed before but Python 3.10 or newer and make.
PYTHON ?= python3
# A pinned build, so that a CPU machine does not fetch several GB of CUDA libraries. The package itself takes a range.
TORCH ?= torch==2.13.0
# torch 2.6, the lowest that is claimed, is a CUDA build on PyPI (x86): TORCH_LOWEST=torch==2.6.0 costs several GB.
TORCH_LOWEST ?= $(TORCH)
BIN := .venv/bin
JOBS ?= 2
# Of the benchmarks: smoke takes seconds, small minutes, issue an hour; 7b needs an accelerator.
SIZE ?= small

.PHONY: quickstart report bench test test-matrix conformance fuzz check style clean

.venv/base: pyproject.toml setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[examples]"
	@touch $@

.venv/dev: .venv/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -e ".[dev]"
	@touch $@

quickstart: .venv/base  ## train and use an adapter on the small pair, offline, in minutes
	$(BIN)/python examples/quickstart.py

.venv/report: .venv/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -e ".[examples,report]"
	@touch $@

report: .venv/report  ## every system and control on the small pair, 3 seeds; writes docs/results.md; goes on if stopped
	$(BIN)/python examples/report.py

bench: .venv/report  ## SoftCoT's time and memory beside its rivals'; writes docs/performance.md
	$(BIN)/python -m benchmarks --size $(SIZE)

test: .venv/dev  ## the whole test suite, network off, warnings as errors
	$(BIN)/python -m pytest -n $(JOBS)

test-matrix:  ## the suite on the lowest and newest versions; writes docs/support.md; goes on if stopped
	$(PYTHON) tests/matrix.py --torch "$(TORCH)" --torch-lowest "$(TORCH_LOWEST)" --jobs $(JOBS)

# What the suite skips where it is not installed. DeepSpeed is built without its kernels, with the torch that is here.
.venv/engines: .venv/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -e ".[quantised]" setuptools wheel ninja
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation "deepspeed>=0.19"
	@touch $@

conformance: .venv/engines  ## all causal-LM types as bases, sharding engines, quantised bases; writes docs/support.md
	$(BIN)/python -m pytest tests/conformance tests/integrations/test_dtypes.py

fuzz: .venv/dev  ## more than 20,000 random cases against the equations, half of them in bfloat16, from a new seed; some 8 minutes on 2 cores
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -n $(JOBS) --timeout 0 tests/contract/test_properties.py tests/unit/test_columns_and_placement.py

check: .venv/dev  ## format, lint and types, as the pre-commit hooks run them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

style: .venv/dev  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-matrix .pytest_cache .mypy_cache .ruff_cache build *.egg-info
