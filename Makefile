# Every command of the study. `make` or `make help` lists them.
PROFILE ?= default
PYTHON ?= python3
BIN := .venv/bin
REPORT := reports/$(PROFILE)
PACKAGE := $(shell find src -name "*.py") $(wildcard params/*.yaml)
NOTEBOOKS := $(sort $(basename $(notdir $(wildcard notebooks/*.ipynb))))

# Where runs are kept, if not in runs/: made absolute, as notebooks run in a folder of their own.
ifdef VQA_RUNS
override VQA_RUNS := $(patsubst ~/%,$(HOME)/%,$(VQA_RUNS))
override VQA_RUNS := $(if $(filter /%,$(firstword $(VQA_RUNS))),$(VQA_RUNS),$(CURDIR)/$(VQA_RUNS))
export VQA_RUNS
endif
RUNS := $(or $(VQA_RUNS),runs)
SPACE := $(subst x,,x x)
STAMPS := $(subst $(SPACE),\ ,$(RUNS))/stamps/$(PROFILE)

.PHONY: help study test faults lab figures lint clean diffs
.DELETE_ON_ERROR:
.NOTPARALLEL:  # each notebook reads the records of those before it, and uses all cores

help: ## list these commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'
	@echo "  PROFILE=NAME picks another file of params/ ($(basename $(notdir $(wildcard params/*.yaml))))"

study: $(NOTEBOOKS:%=$(STAMPS)/%) ## run every notebook and write the report of PROFILE
	@echo "the report is in $(REPORT)"

test: .venv/ready ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

faults: .venv/ready ## inject every fault many times (about half an hour) and write reports/faults.csv
	$(BIN)/python tests/faults.py

lab: .venv/ready ## open JupyterLab
	$(BIN)/jupyter lab notebooks

figures: .venv/ready ## redraw every figure and table from the recorded results, without training
	$(BIN)/python -m vqa.study.report --readme $(notdir $(patsubst %/records,%,$(wildcard reports/*/records)))

lint: .venv/ready ## check style
	$(BIN)/ruff check src tests && $(BIN)/ruff format --check src tests

diffs: .venv/ready ## show notebook changes as notebooks in this clone's git diff and merge
	$(BIN)/nbdime config-git --enable

clean: ## forget all runs; reports and the environment stay
	rm -rf "$(RUNS)"

# A stamp, not the executed notebook, says what is up to date: reports are in git, where times mean nothing.
# A notebook that fails stays beside its stamp; one that comes to its end replaces that of the report.
$(STAMPS)/%: notebooks/%.ipynb $(PACKAGE) .venv/ready
	@$(BIN)/python -m vqa.study.launch $(PROFILE)
	@mkdir -p $(REPORT) "$$(dirname "$@")"
	$(BIN)/papermill "$<" "$@.ipynb" --cwd notebooks --log-output --no-progress-bar -p profile $(PROFILE)
	@mv "$@.ipynb" $(REPORT)/$*.ipynb
	@touch "$@"

# The results come last: they read what the others record.
$(STAMPS)/08_results: $(patsubst %,$(STAMPS)/%,$(filter-out 08_results,$(NOTEBOOKS)))

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@echo "$(CURDIR)/src" > "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/vqa.pth"
	@touch $@
