# Two commands matter: `make demo` and `make test`. Everything they need is set up in .venv on the first call.
#
#   ENGINE=deepspeed    demo trains with that engine in place of fsdp2
#   PYTHON=python3.12   the interpreter that .venv is made from (3.11 or newer)
#   ROWS=FILE.csv       other published rows for plan-accuracy, judged with the shipped constants
#   REFIT=1             plan-accuracy prints the constants fitted on all rows
#   SITE_TORCH=1        use the torch that the machine provides, not the pinned one (`make clean` first)
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
SITE_TORCH ?=
ENGINE ?=
ROWS ?=
REFIT ?=
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/aifactory-train
MACHINE := runs/local-machine.yaml
DEMO := configs/recipes/demo.yaml
DEMO_RUN := runs/demo$(ENGINE:%=-%)
YARDSTICK := configs/recipes/cpu-yardstick.yaml

# Of pip's output: one line per download, and the slow last step. Its errors go past the filter, on stderr.
PIP_LINES := sed -u -n -E -e 's/^ *(Downloading|Using cached) ([^ ]+) (\(.*\)).*/  \2 \3/p' \
  -e 's/^Installing collected.*/  unpacking (a minute or two)/p' -e 's/^(Successfully installed).*/  done/p'
PIP_INSTALL = $(BIN)/pip install --disable-pip-version-check --no-input --progress-bar off -c $(VENV)/constraints.txt
title = @printf '\n== %s\n' '$(1)'

.PHONY: help demo test parity check launchers bench-smoke bench-peers bench-checkpoint plan-accuracy gpu-check clean
help:
	@echo 'make demo         from text to a trained, exported, sampled language model (2 CPU ranks, or the GPU)'
	@echo '                  ENGINE=deepspeed: with that engine'
	@echo 'make test         all tests that need no GPU'
	@echo 'make parity       every layout against one process, the long list too; writes docs/parity.md'
	@echo 'make check        format, types, house rules, fast tests: under a minute'
	@echo 'make bench-smoke  the smoke suite here, in 2 minutes, into bench-results/smoke'
	@echo 'make bench-peers  our tokens/s beside those of other frameworks, in turns (15 minutes on 2 cores)'
	@echo 'make bench-checkpoint  a checkpoint of 1 B parameters beside dd: 25 GB of disk, 14 GB of memory, 10 minutes'
	@echo 'make plan-accuracy  the planner beside published runs, with fits (4 minutes); ROWS=FILE.csv: other rows, no fit'
	@echo 'make gpu-check    one GPU, 8 minutes: parity, memory, host syncs and speed into benchmarks/results/'
	@echo 'make launchers    render launchers/*.sbatch anew from configs/machines/'
	@echo 'make clean        remove .venv, .venv-peers, builds and caches; runs/ and prepared/ stay'

demo: $(VENV)/.installed $(ENGINE:%=$(VENV)/.installed-%) $(MACHINE)
	$(call title,prepare: text to tokens)
	@$(RUN) prepare $(DEMO)
	$(call title,plan and launch: 2 MPI ranks train)
	@$(RUN) launch $(DEMO) --machine $(MACHINE) --cpu-ranks 2 --run $(DEMO_RUN) $(ENGINE:%=--set layout.engine=%)
	$(call title,export: a Hugging Face folder)
	@$(RUN) export $(DEMO_RUN)
	$(call title,report)
	@$(RUN) report $(DEMO_RUN)
	$(call title,sample: plain transformers reads the export)
	@$(RUN) sample $(DEMO_RUN) --prompt "def __init__(self"

$(MACHINE): | $(VENV)/.installed
	$(call title,probe: what this machine can do)
	@$(RUN) probe --out $@

# Most tests wait for ranks that they have started: a second worker fills the cores meanwhile. One file, one worker:
# its tests share what it makes once. By file, as --dist loadgroup of pytest-xdist 3.8 groups nothing under pytest 9.2
# (https://github.com/pytest-dev/pytest-xdist/issues/1386).
test: $(VENV)/.installed-test $(VENV)/.installed-system
	@$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

parity: $(VENV)/.installed-test
	@PARITY=all $(BIN)/pytest tests/parity/test_matrix.py tests/parity/test_checkpoints_move.py tests/parity/test_engines.py

check: $(VENV)/.installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo 'do: $(BIN)/ruff format .'; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/pytest -q tests/test_house.py tests/test_promises.py tests/unit $(wildcard tests/golden)

launchers: $(VENV)/.installed
	@$(BIN)/python launchers/render.py

bench-smoke: $(VENV)/.installed
	@rm -rf bench-results/smoke
	@$(RUN) bench smoke --out bench-results/smoke

bench-peers: $(VENV)/.installed-test
	$(call title,prepare: the text of the yardstick)
	@$(RUN) prepare $(YARDSTICK)
	$(call title,compare: ours and other frameworks in turns)
	@$(BIN)/python benchmarks/peers/compare.py

bench-checkpoint: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.checkpoint_speed

gpu-check: $(VENV)/.installed-test
	@$(BIN)/python -m benchmarks.gpu_check

# One thread per process: the fits run side by side.
plan-accuracy: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.plan_accuracy $(if $(ROWS),--rows '$(ROWS)') $(if $(REFIT),--refit)

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "aifactory-train needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo "not there")"; \
	  echo "  do:    apt-get install python3.11 python3.11-venv   (or: module load Python), then"; \
	  echo "         make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; } >&2
	@echo '== set up $(VENV) (once)'
	@$(PYTHON) -m venv $(if $(SITE_TORCH),--system-site-packages) $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment"; \
	  echo "  do:    apt-get install python3-venv   (of the same version as $(PYTHON))"; exit 1; } >&2

$(VENV)/.installed: setup.py constraints.txt | $(VENV)/bin/python
	@sed '$(if $(SITE_TORCH),/^torch==/d)' constraints.txt > $(VENV)/constraints.txt
	@echo '== install aifactory-train and what it needs (once; torch is the large one)'
	@$(PIP_INSTALL) -e . | $(PIP_LINES)
	@touch $@

$(VENV)/.installed-fsdp2: ;

$(VENV)/.installed-%: setup.py constraints.txt | $(VENV)/.installed
	@echo '== install what $* needs (once)'
	@$(PIP_INSTALL) -e '.[$*]' | $(PIP_LINES)
	@touch $@

$(VENV)/.installed-test: setup.py constraints.txt | $(VENV)/.installed
	@echo '== install what the tests need (once)'
	@$(PIP_INSTALL) -e '.[test]' | $(PIP_LINES)
	@touch $@

# Programs that tests use and pip does not have. Where one is missing, its tests say so.
$(VENV)/.installed-system: | $(VENV)/bin/python
	@PATH=$$PATH:/usr/sbin; has() { command -v "$$@" > /dev/null; }; \
	need() { \
	  if [ "$$(id -u)" = 0 ] && has apt-get; then \
	    echo "  $$1, for the test$$2"; \
	    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$1; } \
	      >> $(VENV)/apt.log 2>&1 || echo "  no $$1: apt-get failed (see $(VENV)/apt.log)"; \
	  else \
	    echo "  no $$1 and no right to install it, for the test$$2"; \
	    echo "  do:    apt-get install $$1   (as root), or go on without"; \
	  fi; \
	}; \
	has chromium chromium-browser google-chrome || need chromium ' that opens the report'; \
	{ has slurmctld && has slurmd && has srun && has munged; } || need 'slurm-wlm munge' 's that run jobs on a real Slurm'
	@touch $@

clean:
	rm -rf $(VENV) .venv-peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find aifactory_train benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo 'runs/ and prepared/ stay; remove them by hand if you want them gone'
