# make run: from nothing to the report of the main job. make test: from nothing to the tests.
# make conformance: from nothing to Hugging Face's own model tests, run against our classes.
PY ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: run test lint conformance clean

run: $(READY)
	HF_HUB_OFFLINE=$${HF_HUB_OFFLINE:-1} OMP_NUM_THREADS=1 \
	$(BIN)/python -m experiments.compare $(ARGS)

test: $(READY)
	WANDB_MODE=disabled HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

conformance: $(READY)
	$(BIN)/python tests/conformance/hf_conformance.py $(ARGS)

# constraints.txt is the tested set; the bounds in pyproject.toml are what is allowed.
$(READY): pyproject.toml constraints.txt
	@command -v $(PY) >/dev/null || { echo "$(PY) not found: install it or say make PY=python3"; exit 1; }
	$(PY) -m venv $(VENV) || { echo "no venv module: on Debian, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
