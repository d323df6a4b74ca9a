# Every target installs what it needs into .venv. Only Python 3.10 or newer and make are required.
PYTHON ?= python3
# A pinned build, so that CPU machines do not download several GB of CUDA libraries. The package itself accepts a range.
TORCH ?= torch==2.13.0
# torch 2.6, the lowest supported version, is a CUDA build on PyPI (x86): TORCH_LOWEST=torch==2.6.0 downloads several GB.
TORCH_LOWEST ?= $(TORCH)
BIN := .venv/bin
JOBS ?= 2
# Size of the benchmarks: smoke takes seconds, small minutes, real 15 minutes, issue an hour; 7b needs an accelerator.
# For `real`, MODELS=FOLDER and DATA=FOLDER as below; otherwise both come from the Hub.
SIZE ?= small

.PHONY: quickstart report real bench bench-serving notebooks test test-matrix conformance serving fuzz docs check style \
	release-check workflows clean

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

report: .venv/report  ## run every system and control on the small pair with 3 seeds, and write docs/results.md; resumable
	$(BIN)/python examples/report.py

# MODELS=FOLDER: a folder with a subfolder for each model, instead of the Hub. DATA=FOLDER: the data sets' own files.
# PART=rationales, pilot, tries, protocol, final or page; PLAN=1 prints the jobs and their estimated times.
# NOTE: a sentence about the models for the page. On an accelerator: SCALE=full PROCESSES=8 BATCH=256.
real: .venv/report  ## run the study of real models, and write docs/real-models.md; resumable; 12 hours on 2 cores
	$(BIN)/python examples/real.py $(if $(MODELS),--models $(MODELS)) $(if $(DATA),--data-dir $(DATA)) $(if $(PART),--part $(PART)) $(if $(NOTE),--note "$(NOTE)") $(if $(SCALE),--size $(SCALE)) $(if $(PROCESSES),--processes $(PROCESSES)) $(if $(BATCH),--batch $(BATCH)) $(if $(PLAN),--plan)

.venv/notebooks: .venv/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -e ".[notebooks]"
	@touch $@

notebooks: .venv/notebooks  ## run the notebooks, and store them with their outputs
	$(BIN)/python examples/notebooks/execute.py

bench: .venv/report  ## compare SoftCoT's time and memory with other methods, and write docs/performance.md
	$(BIN)/python -m benchmarks --size $(SIZE) $(if $(MODELS),--models $(MODELS)) $(if $(DATA),--data-dir $(DATA))

test: .venv/dev  ## run the test suite, with the network off and warnings as errors
	$(BIN)/python -m pytest -n $(JOBS)

# PYTHONS="python3.10 python3.13": every environment with each. ENVIRONMENTS="lowest newest": some of them. TESTS=tests/unit:
# some of the tests. With some, the results are printed only.
test-matrix:  ## run the suite on the lowest and newest versions, and write docs/support.md; resumable
	$(PYTHON) tests/matrix.py --torch "$(TORCH)" --torch-lowest "$(TORCH_LOWEST)" --jobs $(JOBS) $(if $(PYTHONS),--pythons $(PYTHONS)) $(if $(ENVIRONMENTS),--environments $(ENVIRONMENTS)) $(if $(TESTS),--tests $(TESTS))

release-check:  ## build wheel and sdist, check them, and use the wheel with the lowest and the newest versions
	$(PYTHON) tests/release.py --torch "$(TORCH)" --torch-lowest "$(TORCH_LOWEST)"

.venv-workflows/ready: Makefile
	$(PYTHON) -m venv .venv-workflows
	.venv-workflows/bin/python -m pip install --quiet --disable-pip-version-check zizmor==1.32.0 check-jsonschema==0.39.0
	@touch $@

SCHEMA := .venv-workflows/bin/check-jsonschema --quiet --builtin-schema

workflows: .venv-workflows/ready  ## check workflows, dependabot.yml, issue forms and CITATION.cff; the tools work offline
	.venv-workflows/bin/zizmor --offline --no-progress --persona pedantic .github
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) custom.github-workflows-require-timeout .github/workflows/*.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA) vendor.citation-file-format CITATION.cff

# Packages without which the suite skips tests. DeepSpeed is built without its kernels, with the installed torch.
.venv/engines: .venv/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -e ".[quantised]" setuptools wheel ninja
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation "deepspeed>=0.19"
	@touch $@

conformance: .venv/engines  ## test all causal-LM types as bases, sharding engines and quantized bases, and write docs/support.md
	$(BIN)/python -m pytest --last-run "make conformance" tests/conformance tests/integrations/test_dtypes.py

# An environment of its own: vLLM pins the versions of much that is in .venv, too.
.venv-serving/ready: pyproject.toml setup.cfg tests/serving_environment.py
	PYTHONPATH=tests $(PYTHON) tests/serving_environment.py .venv-serving
	@touch $@

# MODELS=FOLDER: a folder with qwen2.5-coder-0.5b and smollm2-135m, which are then tested, too.
serving: .venv-serving/ready  ## test adapters in vLLM on CPUs, in a server and in a program; about 10 minutes on 2 cores
	$(if $(MODELS),SOFTCOT_MODELS=$(MODELS)) .venv-serving/bin/python -m pytest --last-run "make serving" --timeout 900 tests/serving

# MODELS=FOLDER and DATA=FOLDER as for `real`; otherwise both come from the Hub.
bench-serving: .venv-serving/ready  ## compare adapters with their base in vLLM, and write docs/serving-performance.md
	.venv-serving/bin/python -m benchmarks.serving $(if $(MODELS),--base $(MODELS)/qwen2.5-coder-0.5b --assistant $(MODELS)/smollm2-135m) $(if $(DATA),--data-dir $(DATA))

fuzz: .venv/dev  ## compare more than 20,000 random cases, half of them in bfloat16, with the equations; less than 20 minutes on 2 cores
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest --last-run "make fuzz" -n $(JOBS) --timeout 0 tests/contract/test_properties.py tests/contract/test_extension_properties.py tests/unit/test_columns_and_placement.py

.venv/docs: .venv/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -e ".[examples,docs]"
	@touch $@

docs: .venv/docs  ## build the documentation site into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: .venv/dev  ## check format, lint and types, as the pre-commit hooks do
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

style: .venv/dev  ## format, and fix lint errors that can be fixed automatically
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-matrix .venv-release .venv-serving .venv-workflows .pytest_cache .mypy_cache .ruff_cache build site *.egg-info
