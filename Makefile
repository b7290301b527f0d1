# Every target makes .venv when it is missing. torch is pinned first: a looser range may pull gigabytes of CUDA.
PY ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check
SMOLLM2 := HuggingFaceTB/SmolLM2-135M-Instruct
export FT_MODELS ?= models
VLLM_PYTHON := $(or $(FT_VLLM_PYTHON),$(CURDIR)/.vllm/bin/python)

.PHONY: demo demo-rl test check bench models vllm clean

demo: .venv/.test models  ## the flagship rehearsed, and SmolLM2 learning to add: under ten minutes on two cores
	$(BIN)/python bench/demo.py

demo-rl: .venv/.test models vllm  ## SmolLM2 learning to add from rewards alone: two samplers, three seeds each
	FT_VLLM_PYTHON=$(VLLM_PYTHON) $(BIN)/python bench/rl.py

test: .venv/.test  ## all tests that need no GPU
	$(BIN)/pytest -n 2 -m "not gpu"

check: .venv/.test  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: .venv/.bench models  ## everything in bench/, side by side with peers
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/data.py --model $(FT_MODELS)/$(SMOLLM2)
	$(BIN)/python bench/logprobs.py
	$(BIN)/python bench/losses.py
	$(BIN)/python bench/nf4.py
	$(BIN)/python bench/experts.py
	$(BIN)/python bench/qlora.py
	$(BIN)/ft bench kernels
	$(BIN)/python bench/sft.py --model $(FT_MODELS)/$(SMOLLM2)
	$(BIN)/python bench/dpo.py --model $(FT_MODELS)/$(SMOLLM2)

models: $(FT_MODELS)/$(SMOLLM2)/config.json  ## the real model of the demonstration

$(FT_MODELS)/$(SMOLLM2)/config.json: | .venv/.test
	$(BIN)/python bench/fetch_smollm2.py

vllm: | $(VLLM_PYTHON)  ## vLLM, in an environment of its own

$(VLLM_PYTHON): | .venv/.test
	$(BIN)/python bench/vllm_env.py .vllm

.venv/.test: pyproject.toml
	test -x $(BIN)/python || $(PY) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) -e '.[test]'
	touch $@

.venv/.bench: .venv/.test
	$(PIP) -e '.[bench]'
	touch $@

clean:
	rm -rf .venv .vllm runs .ft-cache
