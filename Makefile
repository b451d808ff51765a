# Every target sets up what it needs first; `make setup` takes a second or two when nothing changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo train-demo bench test lint format clean

# Arguments for the programs: make demo DEMO="--episodes 50 --seed 7"
DEMO ?=
TRAIN ?=
BENCH ?=
PYTEST ?=

help:
	@echo "make demo        the main job: a simulated SO-101, the policy and the player over ROS 2 (DEMO=\"--episodes 50 --seed 7\")"
	@echo "make test        lint, format, import contract and all tests (PYTEST=\"-k robot\")"
	@echo "make train-demo  record the scripted teacher, train on the bags, evaluate open loop (TRAIN=\"...\")"
	@echo "make bench       measure the policy (BENCH=\"...\")"
	@echo "make setup       environment and build alone (PYTHON=python3.12 chooses the interpreter)"
	@echo "make format      put the code into shape"
	@echo "make clean       remove what was built and written, keep the environment"

setup:
	@scripts/setup.sh

demo: setup
	@source scripts/env.sh && exec python -m pi0_ros.demo.run $(DEMO)

train-demo: setup
	@source scripts/env.sh && exec python -m pi0_ros.demo.train $(TRAIN)

bench: setup
	@source scripts/env.sh && exec python -m pi0_ros.benchmark.cli $(BENCH)

lint: setup
	@source scripts/env.sh && ruff check . && ruff format --check . && lint-imports

format: setup
	@source scripts/env.sh && ruff check --fix . && ruff format .

test: lint
	@source scripts/env.sh && exec pytest -q $(PYTEST)

clean:
	rm -rf build install log demo_output bench_output
	find pi0_ros -maxdepth 1 -type l -delete
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
