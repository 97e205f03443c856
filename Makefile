# What a user and a contributor run. Everything is installed into .venv, once.
SHELL := bash
BIN := .venv/bin
STAMP := .venv/installed
PREVIOUS := .venv-0.19
OUT := outputs/quickstart

# On a machine with a GPU, `make GPU=1 quickstart` uses it; here two CPU cores do.
ifndef GPU
export ACCELERATE_USE_CPU := true
# A model this small gains nothing from two threads and loses much when they wait for
# each other on a busy machine.
export OMP_NUM_THREADS := 1
LAUNCH := launch --cpu --num_processes 1
else
LAUNCH := launch --num_processes 1
endif
export AXOLOTL_DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help install quickstart quickstart-tp2 evidence evidence-quick test test-unit \
	gpu-check test-previous-lane try-axolotl soak lint pins clean

help:
	@echo "make quickstart      install, make a small model, train it with PSFT and SFT"
	@echo "make quickstart-tp2  the PSFT run again, the model split over two processes"
	@echo "make evidence        what PSFT does to earlier skills, entropy and RL (90 minutes)"
	@echo "make evidence-quick  the same with one seed and fewer updates (10 minutes)"
	@echo "make test-unit       the tests that train nothing (2 minutes)"
	@echo "make test            install, lint, type-check and test (about 30 minutes)"
	@echo "make test-previous-lane  the same plugin on Axolotl 0.19, Python 3.11 (5 minutes)"
	@echo "make gpu-check       on a GPU: is everything right, how fast; writes docs/gpu.md (6 minutes)"
	@echo "make soak            kill, starve and damage runs in every way (about 45 minutes)"
	@echo "make lint            ruff and mypy only"
	@echo "make try-axolotl AXOLOTL=0.22.0  the tests on another release of Axolotl"
	@echo "make pins            write requirements.txt from .venv"
	@echo "make clean           remove outputs/ and .venv/"
	@echo "PYTHON=...           the interpreter to install with, instead of the first found"

install: $(STAMP)

$(STAMP): requirements.txt previous_lane/requirements.txt setup.cfg pyproject.toml
	@PYTHON=$${PYTHON:-$$(bash find_python.sh 3.12 3.13 3.11)} && \
		bash install.sh "$$PYTHON" .venv
	@touch $@

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart/prepare.py --output-dir $(OUT)
	$(BIN)/accelerate $(LAUNCH) -m axolotl.cli.train examples/yaml/quickstart.yaml
	$(BIN)/accelerate $(LAUNCH) -m axolotl.cli.train examples/yaml/quickstart.yaml \
		--psft__objective=sft --output_dir=$(OUT)/sft
	$(BIN)/python -m axolotl_psft.compare $(OUT)/psft $(OUT)/sft \
		--output $(OUT)/comparison.png
	$(BIN)/python examples/quickstart/skills.py $(OUT)/base $(OUT)/sft $(OUT)/psft
	@echo
	@echo "The trained model:   $(OUT)/psft"
	@echo "Both runs, drawn:    $(OUT)/comparison.png"
	@echo "Every metric:        $(BIN)/tensorboard --logdir $(OUT)"

# --multi_gpu with ACCELERATE_USE_CPU is how accelerate starts several CPU processes.
quickstart-tp2: $(STAMP)
	$(BIN)/python examples/quickstart/prepare.py --output-dir $(OUT)
	$(BIN)/accelerate launch --multi_gpu --num_processes 2 --num_machines 1 \
		--mixed_precision no --main_process_port 0 \
		-m axolotl.cli.train examples/yaml/quickstart-tp2.yaml
	test ! -d $(OUT)/psft || $(BIN)/python -m axolotl_psft.compare \
		$(OUT)/psft $(OUT)/psft-tp2 --output $(OUT)/comparison-tp2.png
	$(BIN)/python examples/quickstart/skills.py $(OUT)/base $(OUT)/psft-tp2
	@echo
	@echo "The trained model:   $(OUT)/psft-tp2"

# Interrupted, it goes on where it was.
evidence: $(STAMP)
	$(BIN)/python -m benchmarks.forgetting

evidence-quick: $(STAMP)
	$(BIN)/python -m benchmarks.forgetting --quick

# On a machine with a GPU; elsewhere `$(BIN)/python -m benchmarks.gpu --rehearse`.
gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.gpu.report outputs/gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What is tested of one lane: all on today's Axolotl, a smoke test on the one before.
test: $(STAMP)
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then \
		$(BIN)/python -m pytest previous_lane; \
	else \
		$(MAKE) lint && $(BIN)/python -m pytest -n 2 --dist loadfile; \
	fi

# What tests/conftest.py does not find to train or to start processes.
test-unit: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not whole_run" \
		--ignore tests/distributed

test-previous-lane: $(PREVIOUS)/installed
	$(PREVIOUS)/bin/python -m pytest previous_lane

$(PREVIOUS)/installed: previous_lane/requirements.txt setup.cfg previous_lane/setup.cfg
	@PYTHON=$$(bash find_python.sh 3.11) && bash install.sh "$$PYTHON" $(PREVIOUS)
	@touch $@

# The whole suite on a release that setup.cfg does not know yet, e.g. AXOLOTL=0.22.0, with
# what that pins. Its report is what is to be done for it.
TRY := .venv-axolotl-$(AXOLOTL)
try-axolotl:
	@test -n "$(AXOLOTL)" || { echo "Say which: make try-axolotl AXOLOTL=0.22.0"; exit 1; }
	@PYTHON=$${PYTHON:-$$(bash find_python.sh 3.12 3.13)} && \
		{ test -d $(TRY) || "$$PYTHON" -m venv $(TRY); }
	$(TRY)/bin/pip install --quiet axolotl==$(AXOLOTL) megatron-core \
		$$(sed -n '/^dev =/,/^$$/s/^    \(.*\)==.*/\1/p' setup.cfg)
	$(TRY)/bin/pip install --quiet --no-deps --editable .
	$(TRY)/bin/python -m pytest -n 2 --dist loadfile $(TESTS)

pins: $(STAMP)
	@{ grep '^#' requirements.txt; $(BIN)/pip freeze --exclude-editable | sed -E \
		'/^(cuda-|nvidia-[^m]|triton|xformers|bitsandbytes|liger|torchao)/s/$$/; sys_platform == "linux"/'; \
	} > pins.txt && mv pins.txt requirements.txt

soak: $(STAMP)
	$(BIN)/python -m pytest --soak tests/test_faults.py tests/distributed/test_faults.py
	$(BIN)/python -m pytest --soak -m soak tests/distributed/test_matrix.py \
		tests/distributed/test_overlap.py tests/distributed/test_liger.py \
		tests/distributed/test_tensor_parallel.py tests/test_evidence.py

clean:
	rm -rf outputs .venv .venv-*
