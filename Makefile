# Every target makes .venv when it is missing. torch is pinned first: a looser range may pull gigabytes of CUDA.
PY ?= python3
BIN := .venv/bin
TORCH ?= torch==2.13.0
export FT_MODELS ?= models

.PHONY: demo test check bench models clean

.venv/.test: pyproject.toml
	@test -x $(BIN)/python || $(PY) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

.venv/.bench: .venv/.test
	$(BIN)/pip install -q --disable-pip-version-check -e '.[bench]'
	@touch $@

check: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

test: .venv/.test
	$(BIN)/pytest -n 2 -m "not gpu"
