# shardtune: `make demo` fine-tunes a real model, `make test` passes the tests; both work on a bare machine.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed

.PHONY: install demo test test-all test-fast test-slurm faults check format docs lock bench bench-scaling bench-gpu bench-data bench-rl bench-course gpu-proof clean

# The environment is rebuilt only when the dependency list changes.
$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "shardtune needs Python >= 3.11; $$($(PYTHON) --version) found. Use: make PYTHON=python3.11 ..."; exit 1; }
	@echo "Installing into $(VENV) (about 1.6 GB, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,check]'
	@touch $(STAMP)

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/python -m launch.main demo

# One worker a core; the last lines say what is slow. Without bytecode each of hundreds of processes would compile the sources anew.
# `make test ROOM=data` runs tests/data alone.
TESTS = env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest tests$(if $(ROOM),/$(ROOM)) -n auto --durations=15

test: $(STAMP)
	@$(TESTS)

test-all: $(STAMP)
	@SHARDTUNE_TEST_ALL=1 $(TESTS)

test-fast: $(STAMP)
	@$(TESTS) -m "not slurm" --ignore tests/parity

# All that needs a SLURM of its own (as root on Debian, which it installs) and hosts of their own over ssh.
test-slurm: $(STAMP)
	@env -u PYTHONDONTWRITEBYTECODE SHARDTUNE_TEST_ALL=1 $(BIN)/python -m pytest tests/slurm tests/launch/cluster/test_ssh.py --durations=15

# 200 kills -9 at random moments: some 20 minutes. A seed of its own: make faults KILLS='--kills 40 --seed 7 --strategies zero3'.
faults: $(STAMP)
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m tests.faults.kills $(KILLS)

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python tests/house_rules.py

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# The site of the documentation, into site/. To look at it: python3 -m http.server --directory site
docs: $(STAMP)
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The images' packages: those that decide a result as they are installed here (and so tested), the rest the newest that fit.
DECIDE = torch|transformers|tokenizers|accelerate|peft|datasets|deepspeed|hydra-core|safetensors|pyarrow|bitsandbytes|numpy
lock: $(STAMP)
	@$(BIN)/pip install --quiet --disable-pip-version-check uv
	@$(BIN)/pip freeze | grep -E '^($(DECIDE))==' | sed 's/+.*//' >build.constraints
	@$(BIN)/uv pip compile setup.py --extra remote --extra evaluate --extra lm_eval --extra endpoint --extra serve --extra report --extra search \
		--extra qlora --extra torchao --extra compressed --extra schedule_free --extra energy --extra tensorboard --constraint build.constraints \
		--python-version 3.12 --python-platform x86_64-manylinux_2_28 \
		--upgrade --quiet --no-header --no-annotate --output-file docker/requirements.lock; code=$$?; rm -f build.constraints; exit $$code

bench: $(STAMP)
	@$(BIN)/python benchmarks/training.py

bench-scaling: $(STAMP)
	@$(BIN)/python benchmarks/training.py --ranks 2
	@$(BIN)/python benchmarks/training.py --lengths

bench-gpu: $(STAMP)
	@$(BIN)/python benchmarks/training.py --gpu

bench-data: $(STAMP)
	@$(BIN)/python benchmarks/data_preparation.py

bench-rl: $(STAMP)
	@$(BIN)/python benchmarks/reinforcement.py

# The experiments of the lessons that are not kept yet: an hour or more on one core. NAMES="dirty balance" measures some of them.
bench-course: $(STAMP)
	@$(BIN)/python benchmarks/course $(NAMES)
	@$(BIN)/python docs/make_experiments.py
	@$(BIN)/python docs/make_diagrams.py

gpu-proof: $(STAMP)
	@$(BIN)/python benchmarks/gpu_proof.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
