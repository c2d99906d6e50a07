"""Training on a Gymnasium environment. The loop is the algorithm: collect, prepare, update."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from gym_baselines.agent import AGENT_FILE, WEIGHTS_FILE, Agent, check_output_dir, describe
from gym_baselines.collect import Collector
from gym_baselines.config import TrainConfig
from gym_baselines.environments import EnvFactory, check_spaces, make_vector_env
from gym_baselines.networks import CategoricalPolicy
from rlhf.algorithms.ppo import PPO
from rlhf.distributed import Distributed
from rlhf.errors import TrainingError
from rlhf.metrics import METRICS_FILE, TIMES_FILE, MetricsWriter
from rlhf.types import TrainingBatch
from rlhf.update import update

Callback = Callable[[Agent, dict[str, float]], bool | None]
"""Called after every update with the agent and the step's metrics; returning False ends the training."""

RUN_FILES = (AGENT_FILE, WEIGHTS_FILE, METRICS_FILE, TIMES_FILE)


def train(
    config: TrainConfig,
    *,
    env: EnvFactory | None = None,
    callbacks: Sequence[Callback] = (),
    distributed: Distributed | None = None,
) -> Agent:
    """Train PPO as `config` says and return the agent; with `output_dir`, also write it and its metrics there.

    env: a function that makes one environment, instead of the id in `config.env` (which then is just a name).
    """
    distributed = distributed or Distributed()
    made_by = env or config.env
    observations, actions = check_spaces(made_by)
    if config.output_dir is not None and distributed.is_main:
        check_output_dir(config.output_dir, overwrite=config.overwrite, files=RUN_FILES)
    policy = CategoricalPolicy(
        observations.shape, int(actions.n), hidden_sizes=config.hidden_sizes, seed=config.seed
    ).to(distributed.device)
    agent = Agent(
        policy=policy,
        env=config.env,
        observation_shape=tuple(observations.shape),
        num_actions=int(actions.n),
        first_action=int(actions.start),
        hidden_sizes=tuple(config.hidden_sizes),
        settings=describe(config),
    )
    rows = distributed.share(config.num_envs)
    envs = make_vector_env(made_by, rows=rows, seed=config.seed, autoreset=config.autoreset)
    algorithm, state = PPO(config.ppo), PPO(config.ppo).initial_state()
    model, optimizer = distributed.prepare(
        policy, Adam(policy.parameters(), lr=config.learning_rate, eps=1e-5, fused=True)
    )
    collector = Collector(envs, policy, seed=config.seed, rows=rows, device=distributed.device)
    log = _Log(config, distributed)

    step = 0
    while agent.environment_steps < config.total_steps:
        progress = agent.environment_steps / config.total_steps
        learning_rate = set_learning_rate(optimizer, config, progress)
        rollout = collector.collect(config.rollout_steps)
        batch = algorithm.prepare(rollout.trajectories, progress, state, distributed.all_sum)
        batch = distributed.gather_batch(batch.flatten())
        gap = check_ratio(batch, step)
        metrics = update(model, algorithm, batch, optimizer, config.update, distributed, seed=config.seed, step=step)
        agent.environment_steps += int(batch.mask.sum())
        metrics |= {"learning_rate": learning_rate, "environment_steps": agent.environment_steps, "sampler_gap": gap}
        metrics |= log.episodes(distributed.gather_rows(rollout.finished))
        log.write(step, metrics)
        step += 1
        stops = [callback(agent, metrics) is False for callback in callbacks]  # all are called, then one may stop
        if any(stops):
            break

    envs.close()
    log.close()
    if config.output_dir is not None and distributed.is_main:
        agent.save(config.output_dir)
    return agent


def set_learning_rate(optimizer: Optimizer, config: TrainConfig, progress: float) -> float:
    """The learning rate is a function of progress alone, so there is no scheduler whose state must be kept."""
    learning_rate = config.learning_rate * (1.0 - progress if config.lr_schedule == "linear" else 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    return learning_rate


def check_ratio(batch: TrainingBatch, step: int) -> float:
    """The policy that sampled is the policy that learns: its log-probs must agree, so that the ratio starts at 1.

    Returns the largest difference; TrainingError if it is more than rounding.
    """
    difference = (batch.sampling_logprobs - batch.old_logprobs).abs()
    gap = torch.where(batch.mask, difference, 0.0).max().item()
    if not gap < 1e-3:
        raise TrainingError(
            f"Log-probs in sampling and in training differ by up to {gap:.2g} before update {step}. The policy must be a "
            "pure function of the observation: no dropout, no batch statistics."
        )
    return gap


class _Log:
    """What the main process tells the user: the progress bar and the metrics files. Other processes only count."""

    def __init__(self, config: TrainConfig, distributed: Distributed) -> None:
        self.recent_returns: deque[float] = deque(maxlen=100)
        self.recent_lengths: deque[float] = deque(maxlen=100)
        self._start = time.perf_counter()
        write = config.output_dir is not None and distributed.is_main
        self._writer = MetricsWriter(config.output_dir) if write else None  # type: ignore[arg-type]
        self._bar = tqdm(
            total=config.total_steps,
            unit=" steps",
            desc=config.env,
            disable=not (config.progress_bar and distributed.is_main),
        )

    def episodes(self, finished: Tensor) -> dict[str, float]:
        """Means over the last 100 episodes, in the order in which they ended. finished: (rows, time, 2), all processes'."""
        by_time = finished.transpose(0, 1).flatten(0, 1)
        for episode_return, length in by_time[by_time[:, 1] > 0].tolist():
            self.recent_returns.append(episode_return)
            self.recent_lengths.append(length)
        if not self.recent_returns:
            return {}
        return {"episode_return": fmean(self.recent_returns), "episode_length": fmean(self.recent_lengths)}

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._bar.update(int(metrics["environment_steps"]) - self._bar.n)
        if "episode_return" in metrics:
            self._bar.set_postfix_str(
                f"mean return of {len(self.recent_returns)} episodes {metrics['episode_return']:.1f}"
            )
        if self._writer is not None:
            self._writer.write(step, metrics, {"seconds": time.perf_counter() - self._start})

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()


__all__: Sequence[str] = ["Callback", "train"]
