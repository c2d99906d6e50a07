# Every target sets itself up: it needs Python >= 3.11, pip and the network for the first `pip install`, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: help ppo cartpole test test-slow bench lint clean

help:
	@echo "make ppo        fine-tune a small language model with PPO against a learnt reward model (offline, minutes)"
	@echo "make cartpole   the same PPO balances CartPole (a minute or two)"
	@echo "make test       the tests        make test-slow   the long ones       make lint    ruff and mypy"
	@echo "make bench      the figures of the README"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gym,box2d,mujoco,atari,envpool,video,peers,plots,tracking,dev]'
	@touch $@

ppo: $(READY)
	$(BIN)/python recipes/ppo_rlhf.py --config recipes/configs/ppo_embedded.yaml $(ARGS)

cartpole: $(READY)
	$(BIN)/python -m gym_baselines train --env CartPole-v1 --seed 0 $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m 'not slow' $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m slow $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/embedded_seeds.py

clean:
	rm -rf $(VENV) build dist *.egg-info
