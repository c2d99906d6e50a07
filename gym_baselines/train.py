"""Training on a Gymnasium environment. The loop is the algorithm: collect, prepare, update."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from torch import nn
from torch.optim import Adam, Optimizer, RMSprop

from gym_baselines.agent import AGENT_FILE, EVALUATION_FILE, WEIGHTS_FILE, Agent, describe
from gym_baselines.collect import Collector, Rollout
from gym_baselines.config import TrainConfig
from gym_baselines.envs.environments import EnvFactory, check_environment, make_vector_env
from gym_baselines.envs.spaces import are_alike
from gym_baselines.evaluate import evaluate
from gym_baselines.interrupts import deferred_interrupts
from gym_baselines.networks import ActorCritic
from gym_baselines.normalize import RewardScale
from gym_baselines.report import Report
from gym_baselines.restore import from_checkpoint, restore_rows, row_states, to_checkpoint
from rlhf.algorithms.ppo import PPO
from rlhf.algorithms.trpo import TRPO
from rlhf.core.masking import masked_mean
from rlhf.distributed import Distributed
from rlhf.errors import InputError, TrainingError
from rlhf.runs.checkpoint import Checkpoint
from rlhf.runs.directory import RunDirectory
from rlhf.runs.resume import check_resumable
from rlhf.training.optimizer_state import load_optimizer_tensors, optimizer_tensors
from rlhf.training.update import make_stepper, update
from rlhf.types import TrainingBatch, Trajectories

Callback = Callable[[Agent, dict[str, float]], bool | None]
"""Called after every update with the agent and the step's metrics; returning False ends the training."""
EnvLike = str | EnvFactory | VectorEnv

_MAY_CHANGE = (
    "output_dir",
    "overwrite",
    "resume",
    "progress_bar",
    "checkpoint_every",
    "keep_checkpoints",
    "tensorboard",
)
"""Settings that do not change what a resumed run computes."""


def train(
    config: TrainConfig,
    *,
    env: EnvLike | None = None,
    features: Callable[[Any], nn.Module] | None = None,
    callbacks: Sequence[Callback] = (),
    distributed: Distributed | None = None,
) -> Agent:
    """Train as `config` says and return the agent; with `output_dir`, also write it, its metrics and checkpoints there.

    env: a function that makes one environment, or a vector environment, instead of the id in `config.env` (which then is
    just a name). features: observation space -> module that replaces the networks' first layers.
    """
    training = Training(config, env=env, features=features, distributed=distributed)
    try:
        training.run(callbacks)
    finally:
        training.close()
    return training.agent


class Training:
    """A run that can go on: everything that a step needs or leaves behind, made once."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        env: EnvLike | None = None,
        features: Callable[[Any], nn.Module] | None = None,
        distributed: Distributed | None = None,
        agent: Agent | None = None,
    ) -> None:
        """agent: continue with this one's policy instead of a new one."""
        self.config, self._made_by = config, env or config.env
        self.distributed = distributed or make_group(config)
        device = self.distributed.device
        rows = self.distributed.share(config.num_envs)
        if agent is None:
            policy = ActorCritic(*self._spaces(), config.network, seed=config.seed, features=features)
            agent = Agent(policy=policy, env=config.env)
        agent.settings = describe(config)
        agent.make_env = self._made_by if callable(self._made_by) else None  # type: ignore[assignment]
        if config.eval_every is not None and not (isinstance(self._made_by, str) or callable(self._made_by)):
            raise InputError(
                "eval_every needs environments of its own, and a vector environment cannot be made again: give a function "
                "that makes one environment, or set eval_every to null."
            )
        self.agent, self.policy = agent, agent.policy.to(device)
        if config.trust_region is not None and self.policy.shares_layers:
            raise InputError(
                "trust_region (TRPO) steps the policy alone, but policies of pictures and of your own features share their "
                "first layers with the value function: use PPO there."
            )
        self._check_spaces()
        self._checkpoint: Checkpoint | None = None
        self.directory = self._open_directory()
        self.algorithm = PPO(config.ppo) if config.trust_region is None else TRPO(config.ppo, config.trust_region)
        self.state = self.algorithm.initial_state()
        if "values" not in self.algorithm.needs:
            self.policy.value_net.requires_grad_(
                False
            )  # several processes wait for a gradient of all that may have one
        self._own_optimizer = make_optimizer(config, self.policy)
        self.model, self.optimizer = self.distributed.prepare(self.policy, self._own_optimizer)
        self.stepper = make_stepper(self.model, self.algorithm, self.optimizer, config.update, self.distributed)
        self.envs = make_vector_env(self._made_by, rows=rows, seed=config.seed, options=config.environment)
        self.collector = Collector(
            self.envs,
            self.policy,
            seed=config.seed,
            rows=rows,
            device=device,
            whole_episodes=config.whole_episodes,
            masks_actions=config.environment.action_masks,
            with_values="values" in self.algorithm.needs,
            all_sum=self.distributed.all_sum,
        )
        self.reward_scale = RewardScale(len(rows), gamma=config.ppo.gamma) if config.normalize_rewards else None
        self.updates = 0
        begun = self.agent.environment_steps
        self.schedule = (begun, begun + config.total_steps)  # steps over which learning rate and clip range fall
        self.recent: deque[tuple[float, float]] = deque(maxlen=100)  # (return, length) of the last finished episodes
        self._saved_at = 0
        self._between_updates = True

    # ---- the loop ----

    def prolong(self, more: int) -> None:
        """Let the run go on for `more` environment steps, over which learning rate and clip range fall anew."""
        steps = self.agent.environment_steps
        self.schedule = (steps, steps + more)

    def run(self, callbacks: Sequence[Callback] = ()) -> None:
        """Train until the planned steps are made or a callback returns False."""
        self._restore_once()
        report = self.report = Report(
            self.config,
            self.distributed,
            first_update=self.updates,
            steps=self.agent.environment_steps,
            until=self.schedule[1],
        )
        try:
            with deferred_interrupts() as interrupted:
                self._loop(callbacks, interrupted)
        except BaseException:
            if self._between_updates and self.distributed.world_size == 1:
                self.save_checkpoint()  # Ctrl-C or a failing callback: what is trained is not lost
            raise
        finally:
            report.close()

    def _loop(self, callbacks: Sequence[Callback], interrupted: Callable[[], bool]) -> None:
        config, stop = self.config, False
        while self.agent.environment_steps < self.schedule[1] and not stop:
            before = self.agent.environment_steps
            metrics = self.step()
            if self._due(config.eval_every, before):
                metrics |= self.evaluate()
            self._log(metrics)
            answers = [callback(self.agent, metrics) for callback in callbacks]  # all are called
            stop = self._on_any(any(answer is not None and not answer for answer in answers))
            if self._on_any(interrupted()):
                self.save_checkpoint()
                raise KeyboardInterrupt
            if self._due(config.checkpoint_every, before):
                self.save_checkpoint()
        self.save()

    def _on_any(self, answer: bool) -> bool:
        """Whether some process says so: then all do the same."""
        return bool(self.distributed.all_sum(torch.tensor(float(answer))) > 0)

    def step(self) -> dict[str, float]:
        """One rollout and what is learnt from it."""
        config, distributed = self.config, self.distributed
        start, end = self.schedule
        progress = (self.agent.environment_steps - start) / (end - start)
        learning_rate = set_learning_rate(self.optimizer, config, progress)
        self._between_updates = False  # from here on, environments and weights belong to different steps
        rollout = self.collector.collect(config.rollout_steps)
        trajectories = rollout.trajectories
        extra = self._rollout_metrics(trajectories)
        if self.reward_scale is not None:
            trajectories = replace(trajectories, rewards=self.reward_scale(trajectories, distributed.all_sum))
        batch = self.algorithm.prepare(trajectories, progress, self.state, distributed.all_sum)
        batch = distributed.gather_batch(batch).flatten()
        if config.whole_episodes:
            batch = batch.select(batch.mask.squeeze(1))
        if not config.whole_episodes or self.updates == 0:  # carried steps were sampled by older weights
            extra["sampler_gap"] = check_ratio(batch, self.updates)
        metrics = update(
            self.model,
            self.algorithm,
            batch,
            self.optimizer,
            config.update,
            distributed,
            seed=config.seed,
            step=self.updates,
            state=self.state,
            stepper=self.stepper,
        )
        metrics |= extra
        if self.policy.normalizer is not None:
            observations = rollout.trajectories.inputs["observations"]
            self.policy.normalizer.update(observations, trajectories.mask, distributed.all_sum)
        self._count(rollout)
        if config.ppo.surrogate == "clipped" and config.trust_region is None:
            metrics["clip_range"] = batch.coefficients["clip_low"]
        return metrics | {
            "learning_rate": learning_rate,
            "environment_steps": self.agent.environment_steps,
            **self._episodes(),
        }

    def evaluate(self) -> dict[str, float]:
        """Returns of the greedy policy."""
        config = self.config
        result = evaluate(self.agent, episodes=config.eval_episodes, seed=config.seed)
        return {"eval/episode_return": result.mean, "eval/episode_return_std": result.std}

    def _rollout_metrics(self, trajectories: Trajectories) -> dict[str, float]:
        """How random the policy still is, from the distributions it acted by."""
        assert trajectories.old_distribution is not None
        entropy = self.policy.family.entropy(trajectories.old_distribution)
        metrics = {"entropy": masked_mean(entropy, trajectories.mask, self.distributed.all_sum).item()}
        if self.policy.log_std is not None:
            metrics["action_std"] = self.policy.log_std.detach().exp().mean().item()
        return metrics

    def _count(self, rollout: Rollout) -> None:
        made = self.distributed.all_sum(torch.tensor(float(rollout.num_steps), dtype=torch.float64))
        self.agent.environment_steps += int(made)
        self.updates += 1
        by_time = self.distributed.gather_rows(rollout.finished).transpose(0, 1).flatten(0, 1)
        self.recent.extend((value, length) for value, length in by_time[by_time[:, 1] > 0].tolist())
        self.agent.recent_returns = [value for value, _ in self.recent]

    def _episodes(self) -> dict[str, float]:
        """Means over the last 100 episodes, in the order in which they ended."""
        if not self.recent:
            return {}
        returns, lengths = zip(*self.recent, strict=True)
        return {"episode_return": fmean(returns), "episode_length": fmean(lengths)}

    def _due(self, every: int | None, before: int) -> bool:
        """Whether the last update passed a multiple of `every` steps."""
        return every is not None and self.agent.environment_steps // every > before // every

    # ---- starting, saving, telling ----

    def _spaces(self) -> tuple[Any, Any]:
        made_by = self._made_by
        if isinstance(made_by, str) or callable(made_by):
            return check_environment(made_by, self.config.environment)
        probe = make_vector_env(made_by, rows=range(self.config.num_envs), seed=self.config.seed)
        return probe.single_observation_space, probe.single_action_space

    def _check_spaces(self) -> None:
        """A loaded agent may be given another environment, but not one with other spaces."""
        policy = self.policy
        for own, given in zip((policy.observation_space, policy.action_space), self._spaces(), strict=True):
            if not are_alike(own, given):
                raise InputError(f"env {self.config.env} has the space {given}, but the agent was trained with {own}.")

    def _open_directory(self) -> RunDirectory | None:
        """Claimed before anything is computed: a refused folder costs nothing."""
        config = self.config
        if config.output_dir is None:
            return None
        directory = RunDirectory(
            config.output_dir,
            is_main=self.distributed.is_main,
            barrier=self.distributed.barrier,
            keep=config.keep_checkpoints,
            others=(AGENT_FILE, WEIGHTS_FILE, EVALUATION_FILE, "tensorboard"),
        )
        self._checkpoint = directory.open(resume=config.resume, overwrite=config.overwrite)
        return directory

    def _restore_once(self) -> None:
        """Continue from the checkpoint that the directory was opened with, if there is one."""
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            self._restore(checkpoint)

    def _log(self, metrics: dict[str, float]) -> None:
        self.report.step(self.updates - 1, metrics)
        self._between_updates = True

    def save(self) -> None:
        """The agent in output_dir, and a checkpoint from which `resume` can go on (with a larger total_steps, say)."""
        if self.directory is None:
            return
        if self._saved_at < self.updates:
            self.save_checkpoint()
        if self.distributed.is_main:
            self.agent.save(self.directory.path)
        self.distributed.barrier()

    def save_checkpoint(self) -> None:
        """Everything that the updates so far left behind; random draws leave nothing."""
        if self.directory is None or self._saved_at == self.updates:
            return
        self.report.sync()
        rows = self.distributed.gather_objects([row_states(self.collector, self.reward_scale)])
        row_tensors, row_numbers = to_checkpoint({row: state for part in rows for row, state in part.items()})
        tensors, optimizer_state = optimizer_tensors(self._own_optimizer, self.policy.named_parameters())
        self.directory.save(
            self.updates,
            {"policy": dict(self.policy.state_dict()), "optimizer": tensors, "rows": row_tensors},
            {
                "algorithm": self.state,
                "optimizer": optimizer_state,
                "rows": row_numbers,
                "reward_moments": None if self.reward_scale is None else self.reward_scale.moments.tolist(),
                "environment_steps": self.agent.environment_steps,
                "schedule": list(self.schedule),
                "recent": [list(pair) for pair in self.recent],
            },
            config=self._description(),
        )
        self._saved_at = self.updates

    @property
    def saved(self) -> str:
        """What is left of the run if it ends now, for the user."""
        if self.directory is None or not self._saved_at:
            return "nothing is saved"
        return f"update {self._saved_at} is saved: continue with resume (--resume) in {self.config.output_dir}"

    def _restore(self, checkpoint: Checkpoint) -> None:
        must_match = set(self._description()) - {"total_steps"}
        notes = check_resumable(checkpoint.config, self._description(), must_match=must_match)
        state = checkpoint.state
        self.policy.load_state_dict(checkpoint.tensors("policy"))
        load_optimizer_tensors(
            self._own_optimizer, self.policy.named_parameters(), checkpoint.tensors("optimizer"), state["optimizer"]
        )
        self.state, self.updates = state["algorithm"], checkpoint.step
        self._saved_at = self.updates
        self.agent.environment_steps = state["environment_steps"]
        start, end = state["schedule"]
        self.schedule = (start, max(end, start + self.config.total_steps))
        self.recent.extend((value, length) for value, length in state["recent"])
        self.agent.recent_returns = [value for value, _ in self.recent]
        if self.reward_scale is not None:
            self.reward_scale.moments = torch.tensor(state["reward_moments"], dtype=torch.float64)
        rows = from_checkpoint(checkpoint.tensors("rows"), state["rows"])
        restarted = restore_rows(self.collector, self.reward_scale, rows)
        self._say(f"resumed from {checkpoint.path}", *[f"changed since: {note}" for note in notes])
        if restarted:
            self._say(
                f"the environments {restarted} ({self.config.env}) do not replay their episodes, so they start new ones: "
                "this run is not the one that was interrupted, to the bit"
            )

    def _description(self) -> dict[str, Any]:
        return {name: value for name, value in describe(self.config).items() if name not in _MAY_CHANGE}

    def _say(self, *lines: str) -> None:
        if self.distributed.is_main:
            for line in lines:
                print(f"gym_baselines: {line}")

    def close(self) -> None:
        self.envs.close()
        if self.directory is not None:
            self.directory.close()
        self.distributed.close()


def make_group(config: TrainConfig) -> Distributed:
    tracker = "tensorboard" if config.tensorboard else None
    return Distributed(cpu=config.device == "cpu", tracker=tracker, tracker_dir=config.output_dir)


def make_optimizer(config: TrainConfig, policy: nn.Module) -> Optimizer:
    """Adam or RMSprop over all parameters; TRPO's policy parameters never get a gradient from it."""
    if config.optimizer == "rmsprop":
        return RMSprop(policy.parameters(), lr=config.learning_rate, alpha=0.99, eps=config.optimizer_eps)
    return Adam(policy.parameters(), lr=config.learning_rate, eps=config.optimizer_eps, fused=True)


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
