"""Training on a Gymnasium environment: the same learner as for language models, with environments as its source."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gymnasium.vector import VectorEnv
from torch import nn

from gym_baselines.agent import AGENT_FILE, EVALUATION_FILE, WEIGHTS_FILE, Agent, describe
from gym_baselines.callbacks import AfterUpdate, StepFunction
from gym_baselines.collect import Collector
from gym_baselines.config import TrainConfig
from gym_baselines.envs.environments import EnvFactory, check_environment, make_vector_env
from gym_baselines.envs.spaces import are_alike
from gym_baselines.evaluate import evaluate
from gym_baselines.learning import AGREEMENT, Schedule, make_optimizer, real_transitions, stepper_of, transitions
from gym_baselines.networks import ActorCritic
from gym_baselines.normalize import RewardScale
from gym_baselines.report import EnvironmentBar
from gym_baselines.source import EnvironmentSource
from rlhf.algorithms.ppo import PPO
from rlhf.algorithms.trpo import TRPO
from rlhf.distributed import Distributed
from rlhf.errors import InputError
from rlhf.lifeline import phase
from rlhf.runs.callbacks import Callback
from rlhf.runs.run import Run
from rlhf.training.learner import Learner

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
"""Settings that may differ when a run is resumed, since they do not change what it computes."""


def train(
    config: TrainConfig,
    *,
    env: EnvLike | None = None,
    features: Callable[[Any], nn.Module] | None = None,
    callbacks: Sequence[Callback | StepFunction] = (),
    distributed: Distributed | None = None,
) -> Agent:
    """Train as `config` says. With `config.output_dir`, also write the agent, its metrics and checkpoints there.

    Args:
        config: All settings of the run.
        env: A function that makes one environment, or a vector environment, to use instead of the id `config.env`,
            which then is just a label.
        features: Makes, from the observation space, a module that replaces the networks' hidden layers.
        callbacks: Called during training; see callbacks.py.
        distributed: The processes to train with; by default those of the launch.

    Returns:
        The trained agent.
    """
    training = Training(config, env=env, features=features, distributed=distributed)
    try:
        training.train(callbacks)
    finally:
        training.close()
    return training.agent


class Training:
    """A training run and all its parts, made once; `train` may be called again to continue it."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        env: EnvLike | None = None,
        features: Callable[[Any], nn.Module] | None = None,
        distributed: Distributed | None = None,
        agent: Agent | None = None,
    ) -> None:
        """Prepare the run and claim its output folder.

        Args:
            config: All settings of the run.
            env: See `train`.
            features: See `train`.
            distributed: See `train`.
            agent: Continue to train this agent's policy, instead of a new one.
        """
        self.config = config
        self._made_by = env or config.env
        self.distributed = distributed or make_group(config)
        rows = self.distributed.share(config.num_envs)
        if agent is None:
            policy = ActorCritic(*self._spaces(), config.network, seed=config.seed, features=features)
            agent = Agent(policy=policy, env=config.env)
        agent.settings = describe(config)
        agent.make_env = self._made_by if callable(self._made_by) else None  # type: ignore[assignment]
        self.agent = agent
        self.policy = agent.policy.to(self.distributed.device)
        self._check(config)
        self.run = Run(
            config.output_dir,
            self.distributed,
            description=self._description(),
            must_match=set(self._description()) - {"total_steps"},
            keep_checkpoints=config.keep_checkpoints,
            writes=(AGENT_FILE, WEIGHTS_FILE, EVALUATION_FILE, "tensorboard"),
            tracker="tensorboard",
        )
        # Claim the folder before anything is computed: if it is refused, no work is lost.
        self.run.open(resume=config.resume, overwrite=config.overwrite)
        self.algorithm = PPO(config.ppo) if config.trust_region is None else TRPO(config.ppo, config.trust_region)
        if "values" not in self.algorithm.needs:  # several processes would wait for the gradients of these parameters
            self.policy.value_net.requires_grad_(False)
        self.learner = Learner(
            self.policy,
            self.algorithm,
            partial(make_optimizer, config),
            config.update,
            self.distributed,
            seed=config.seed,
            agreement=AGREEMENT,
            arrange=real_transitions if config.whole_episodes else transitions,
            stepper=stepper_of(config),
        )
        self.envs = make_vector_env(self._made_by, rows=rows, seed=config.seed, options=config.environment)
        collector = Collector(
            self.envs,
            self.policy,
            seed=config.seed,
            rows=rows,
            device=self.distributed.device,
            whole_episodes=config.whole_episodes,
            masks_actions=config.environment.action_masks,
            with_values="values" in self.algorithm.needs,
            all_sum=self.distributed.all_sum,
        )
        scale = RewardScale(len(rows), gamma=config.ppo.gamma) if config.normalize_rewards else None
        begun = self.agent.environment_steps
        self.source = EnvironmentSource(
            collector,
            self.policy,
            scale,
            self.distributed,
            rollout_steps=config.rollout_steps,
            environment_steps=begun,
            keep_states=config.output_dir is not None and self.distributed.world_size == 1,
        )
        self.schedule = Schedule(begun, config.total_steps)

    # ---- the loop ----

    def prolong(self, more: int) -> None:
        """Extend the run by `more` environment steps; learning rate and clip range start anew and fall over these."""
        self.schedule = Schedule(self.agent.environment_steps, more)

    def train(self, callbacks: Sequence[Callback | StepFunction] = ()) -> None:
        """Train until the planned steps are made or a callback stops the run."""
        self._restore()
        self.run.callbacks = [c if isinstance(c, Callback) else AfterUpdate(c) for c in callbacks]
        config = self.config
        run = self.run
        agent = self.agent
        hidden = not (config.progress_bar and self.distributed.is_main)
        bar = EnvironmentBar(config, steps=agent.environment_steps, until=self.schedule.end, hidden=hidden)
        with run.training(bar):
            run.notify("on_train_start", self)
            while agent.environment_steps < self.schedule.end and not run.stopping():
                before = agent.environment_steps
                step = run.step
                metrics = self.train_step()
                try:
                    metrics |= self.evaluate() if self._due(config.eval_every, before) else {}
                finally:  # the update is logged, and can be saved, even if the evaluation fails
                    run.log(metrics)
                run.notify("on_step_end", self, step, metrics)
                if self._due(config.checkpoint_every, before):
                    run.save()
            run.finish()
            if config.output_dir is not None and self.distributed.is_main:
                agent.save(config.output_dir)
            self.distributed.barrier()
            run.notify("on_train_end", self)

    def train_step(self) -> dict[str, float]:
        """Collect one rollout and learn from it; the metrics."""
        progress = self.schedule.progress(self.agent.environment_steps)
        collected = self.source.collect(self.run.step)
        metrics = self.learner.learn(
            collected.trajectories,
            step=self.run.step,
            progress=progress,
            learning_rate=self.config.learning_rate_at(progress),
        )
        self.source.normalize(collected.trajectories)
        self.agent.environment_steps = self.source.environment_steps
        self.agent.recent_returns = [value for value, _ in self.source.recent]
        if self.config.ppo.surrogate == "clipped" and self.config.trust_region is None:
            metrics["clip_range"], _ = self.algorithm.clip_bounds(progress)
        return metrics | dict(collected.metrics)

    @phase("evaluation")
    def evaluate(self) -> dict[str, float]:
        """Evaluate the greedy policy; mean and standard deviation of its returns, as metrics."""
        result = evaluate(self.agent, episodes=self.config.eval_episodes, seed=self.config.seed)
        metrics = {"eval/episode_return": result.mean, "eval/episode_return_std": result.std}
        self.run.notify("on_evaluate", self, self.run.step, metrics)
        return metrics

    @property
    def should_stop(self) -> bool:
        """Set to True to stop the run after the current update."""
        return self.run.should_stop

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self.run.should_stop = value

    def _due(self, every: int | None, before: int) -> bool:
        """Whether the environment steps passed a multiple of `every` since `before`."""
        return every is not None and self.agent.environment_steps // every > before // every

    # ---- starting, saving ----

    def _spaces(self) -> tuple[Any, Any]:
        made_by = self._made_by
        if isinstance(made_by, str) or callable(made_by):
            return check_environment(made_by, self.config.environment)
        probe = make_vector_env(made_by, rows=range(self.config.num_envs), seed=self.config.seed)
        return probe.single_observation_space, probe.single_action_space

    def _check(self, config: TrainConfig) -> None:
        """Check that settings, environment and policy fit together, before the folder is claimed."""
        if config.eval_every is not None and not (isinstance(self._made_by, str) or callable(self._made_by)):
            raise InputError(
                "eval_every needs environments of its own, and a vector environment cannot be made again: give a function "
                "that makes one environment, or set eval_every to null."
            )
        if config.trust_region is not None and self.policy.shares_layers:
            raise InputError(
                "trust_region (TRPO) steps the policy alone, but policies of pictures and of your own features share their "
                "first layers with the value function: use PPO there."
            )
        # A loaded agent may be given another environment, but not one with other spaces.
        own_spaces = (self.policy.observation_space, self.policy.action_space)
        for own, given in zip(own_spaces, self._spaces(), strict=True):
            if not are_alike(own, given):
                raise InputError(f"env {config.env} has the space {given}, but the agent was trained with {own}.")

    def _restore(self) -> None:
        """Continue from the checkpoint found when the folder was opened, if any; later calls load nothing."""
        resumes = self.run.resumes
        self.run.restore({"learner": self.learner, "source": self.source, "schedule": self.schedule})
        if not resumes:
            return
        self.run.say(*self.learner.adapted)
        self.agent.environment_steps = self.source.environment_steps
        self.agent.recent_returns = [value for value, _ in self.source.recent]
        if self.source.restarted:
            self.run.say(
                f"the environments {self.source.restarted} ({self.config.env}) do not replay their episodes, so they "
                "start new ones: this run no longer equals the interrupted one bit for bit"
            )

    def _description(self) -> dict[str, Any]:
        return {name: value for name, value in describe(self.config).items() if name not in _MAY_CHANGE}

    def close(self) -> None:
        self.envs.close()
        self.run.close()


def make_group(config: TrainConfig) -> Distributed:
    tracker = "tensorboard" if config.tensorboard else None
    return Distributed(cpu=config.device == "cpu", tracker=tracker, tracker_dir=config.output_dir)
