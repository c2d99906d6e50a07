# Every target sets itself up: it needs Python >= 3.11, pip and the network for the first `pip install`, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: help ppo grpo cartpole test test-slow test-isa test-python gpu bench bench-control figures lint clean

help:
	@echo "make ppo        fine-tune a small language model with PPO against a learnt reward model (offline, minutes)"
	@echo "make grpo       teach a small language model to add with GRPO and a verifiable reward (offline, minutes)"
	@echo "make cartpole   the same PPO balances CartPole (a minute or two)"
	@echo "make test       the tests        make test-slow   the long ones       make lint    ruff and mypy"
	@echo "make test-isa   the tests that compare floats, with the instructions of other CPUs (20 minutes)"
	@echo "make test-python  the tests with Python 3.11, 3.12, 3.13 (where installed) and with the oldest packages (an hour)"
	@echo "make gpu        what a GPU may get wrong, its speed and memory; PYTHON=... names a Python with torch (minutes)"
	@echo "make bench      the figures of the README    make bench-control   those of docs/control.md (hours)"
	@echo "make figures    the plots of docs/control.md (an hour)"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gym,box2d,mujoco,atari,envpool,video,peers,plots,math,tracking,dev]'
	@touch $@

ppo: $(READY)
	$(BIN)/python recipes/ppo_rlhf.py --config recipes/configs/ppo_embedded.yaml $(ARGS)

grpo: $(READY)
	$(BIN)/python recipes/grpo.py --config recipes/configs/grpo_embedded.yaml $(ARGS)

cartpole: $(READY)
	$(BIN)/python -m gym_baselines train --env CartPole-v1 --seed 0 $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m 'not slow' $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m slow $(ARGS)

test-isa: $(READY)
	$(BIN)/python -m tests.any_cpu $(ARGS)

test-python: $(READY)
	$(BIN)/python -m tests.pythons $(ARGS)

gpu:  # with the packages that PYTHON has: no virtual environment, no network
	$(PYTHON) benchmarks/gpu.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/embedded_seeds.py
	$(BIN)/python benchmarks/grpo_seeds.py

bench-control: $(READY)
	$(BIN)/python benchmarks/control_speed.py
	$(BIN)/python -m gym_baselines compare --env CartPole-v1 --algorithms ppo --seeds 10 --eval_episodes 100
	$(BIN)/python -m gym_baselines compare --env CartPole-v1 --algorithms ppo,ppo_penalty,trpo,a2c,reinforce,sb3_ppo,sb3_dqn --eval_every 10000 --output_dir runs/compare-CartPole-v1-all
	$(BIN)/python -m gym_baselines compare --env Pendulum-v1 --algorithms ppo --final_episodes 50
	$(BIN)/python -m gym_baselines compare --env Pendulum-v1 --algorithms ppo,sb3_ppo,sb3_sac --seeds 2 --eval_every 10000 --final_episodes 50 --output_dir runs/compare-Pendulum-v1-all
	$(BIN)/python -m gym_baselines compare --env LunarLander-v3 --algorithms ppo --eval_every 100000
	$(BIN)/python -m gym_baselines compare --env Hopper-v5 --algorithms ppo,sb3_ppo --seeds 2 --total_steps 300000 --eval_every 30000
	$(BIN)/python -m gym_baselines compare --env HalfCheetah-v5 --algorithms ppo,sb3_ppo --seeds 2 --total_steps 300000 --eval_every 30000

figures: $(READY)
	for name in clip-objective step-size gae-lambda penalty vector-envs; do $(BIN)/python -m gym_baselines plot $$name || exit 1; done

clean:
	rm -rf $(VENV) .venvs build dist *.egg-info
