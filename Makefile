# Everything a maintainer does, one target each. `make help` lists them.
# A target sets up .venv from requirements.lock by itself; where nothing changed, that costs nothing.

PYTHON ?= python3
JOBS ?= 2
# Which chapters and tests `make test` runs; e.g. make test PYTEST_ARGS="-k packaging".
PYTEST_ARGS ?=
# The benchmark: smoke, book or full; a grid of usf.study.grid, or GRID/CELL for one cell of it (default: the profile's);
# local or slurm; folders of the data sets; anything else for Snakemake, e.g. ARGS=--dry-run
PROFILE ?= smoke
GRID ?=
ENGINE ?= local
MVTEC ?=
VISA ?=
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.usf-setup
WORKFLOW := .venv-workflow/bin
WORKFLOW_STAMP := .venv-workflow/.usf-setup
CHAPTERS := book/intro.md $(wildcard book/[0-9][0-9]-*.md) book/appendix-reproducibility.md
NOTEBOOKS := $(patsubst book/%.md,build/notebooks/%.ipynb,$(CHAPTERS))
RUNS := $(patsubst book/%.md,build/notebooks/%.ipynb,$(wildcard book/runs/*.md))
# Folders of build/ with records that only trainings can make again; `make clean` keeps these and deletes the rest.
RECORDS := ablation alarms benchmark hybrid limits mixtures positions rescoring stability uncounted
# Where `make publish` finds what `make book` left for download.
PORTABLE := _build/html/_sources/book

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup book times notebooks executed publish benchmark workflow lint test lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create or update .venv

# uv comes from the lock as well, with its hash: pip installs it, and uv installs the rest.
$(BIN)/uv: | requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=<path> ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@awk '/^uv==/ {found = 1} found {print} found && !/\\$$/ {exit}' requirements.lock > .venv/uv.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r .venv/uv.txt

$(STAMP): requirements.lock pyproject.toml | $(BIN)/uv
	VIRTUAL_ENV=.venv $(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes requirements.lock
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --no-deps --editable .
	@touch $@

book: $(STAMP) ## build the HTML book (executes what changed)
	@USF_PROFILE=book $(BIN)/jupyter-book build -q -W -n --keep-going . \
	  || { rm -rf _build/html _build/.doctrees; echo "The book was not built: see the errors above." >&2; exit 1; }
	@echo "The book: file://$(CURDIR)/_build/html/index.html"

times: $(STAMP) ## how long the chapters took when they were last executed, and the slowest cells
	@$(BIN)/python book/_ext/times.py

notebooks: $(NOTEBOOKS) $(RUNS) ## build/notebooks/*.ipynb from the chapters

build/notebooks/%.ipynb: book/%.md | $(STAMP)
	@mkdir -p $(@D)
	@$(BIN)/jupytext --quiet --to notebook --output $@ $<

executed: $(NOTEBOOKS:build/notebooks/%=build/executed/%) ## build/executed/*.ipynb: the chapters run one by one, in PROFILE

# In an empty folder, as in the book: nothing may depend on where a chapter runs.
build/executed/%.ipynb: build/notebooks/%.ipynb
	@mkdir -p $(@D) && folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && echo "executing $*" && \
	  OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} TQDM_DISABLE=1 USF_PROFILE=$(PROFILE) \
	  $(BIN)/papermill --no-progress-bar --cwd "$$folder" $< $@

# Plumbing, so that neither the branch that is checked out nor its index is touched.
publish: ## push the notebooks of the built book to the branch `notebooks` of origin, where Colab opens them
	@ls $(PORTABLE)/*.ipynb > /dev/null || { echo "There is no built book: run make book" >&2; exit 1; }
	@export GIT_DIR="$$(git rev-parse --absolute-git-dir)" GIT_INDEX_FILE="$$(mktemp -d)/index" && \
	  (cd $(PORTABLE) && git --work-tree=. add --force --all -- '*.ipynb') && \
	  commit=$$(git -c user.name="The usf developers" -c user.email=usf@localhost commit-tree \
	    -m "Notebooks of $$(git rev-parse --short HEAD)" "$$(git write-tree)") && \
	  git push --quiet --force origin "$$commit:refs/heads/notebooks"

workflow: $(WORKFLOW_STAMP) ## create or update .venv-workflow, the engine of the benchmark

$(WORKFLOW_STAMP): workflow/requirements.lock | $(BIN)/uv
	@test -x $(WORKFLOW)/python || $(PYTHON) -m venv --without-pip .venv-workflow
	VIRTUAL_ENV=.venv-workflow $(BIN)/uv pip sync --quiet --compile-bytecode --require-hashes workflow/requirements.lock
	@touch $@

# The engine is itself a job: killed in whatever way, it leaves nothing running.
benchmark: $(STAMP) $(WORKFLOW_STAMP) $(RUNS) ## the grid of trainings: make benchmark PROFILE=smoke|book|full
	@$(BIN)/python -m usf.study.jobs -- $(WORKFLOW)/snakemake --snakefile workflow/Snakefile \
	  --workflow-profile workflow/profiles/$(ENGINE) --config profile=$(PROFILE) engine=$(ENGINE) \
	  $(if $(GRID),grid=$(GRID)) $(if $(MVTEC),mvtec=$(MVTEC)) $(if $(VISA),visa=$(VISA)) $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint notebooks workflow ## everything that checks the project, the chapters in profile smoke
	OMP_NUM_THREADS=1 USF_PROFILE=smoke $(BIN)/python -m pytest -n $(JOBS) --dist worksteal \
	  --doctest-modules --nbmake --nbmake-timeout=600 src/usf tests $(NOTEBOOKS) $(PYTEST_ARGS)

lock: $(STAMP) ## resolve both locks anew
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --generate-hashes \
	  --all-extras pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --generate-hashes \
	  workflow/requirements.in -o workflow/requirements.lock

clean: ## remove what was generated (not .venv, and not the records of studies in build/)
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache .hypothesis .snakemake
	@test ! -d build || find build -mindepth 1 -maxdepth 1 $(RECORDS:%=! -name %) -exec rm -rf {} +
