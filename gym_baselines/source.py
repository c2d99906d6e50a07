"""Environments as a source of trajectories: rollouts, scaled rewards and episode statistics."""

from collections import deque
from dataclasses import replace
from statistics import fmean

import torch

from gym_baselines.collect import Collector
from gym_baselines.networks import ActorCritic
from gym_baselines.normalize import RewardScale
from gym_baselines.restore import are_numbers, check_rows, from_checkpoint, restore_rows, row_states, to_checkpoint
from rlhf.core.masking import masked_mean
from rlhf.distributed import Distributed
from rlhf.errors import InputError, excerpt
from rlhf.lifeline import phase
from rlhf.runs.checkpoint import ANOTHER, Saved
from rlhf.training.source import Collected
from rlhf.types import Trajectories


class EnvironmentSource:
    """A `Source` whose rows are environments."""

    def __init__(
        self,
        collector: Collector,
        policy: ActorCritic,
        reward_scale: RewardScale | None,
        distributed: Distributed,
        *,
        rollout_steps: int,
        environment_steps: int = 0,
        keep_states: bool = False,
    ) -> None:
        """Start counting.

        Args:
            collector: Plays the environments of this process.
            policy: The policy that the collector plays with.
            reward_scale: Scales the rewards; None to leave them.
            distributed: The processes of the run.
            rollout_steps: Steps of each environment in a rollout.
            environment_steps: Steps made before this run, over all environments.
            keep_states: Keep the states from before and after each rollout, so that a run that fails amid a step can be
                saved as it was before it. For one process only.
        """
        self.collector = collector
        self.policy = policy
        self.reward_scale = reward_scale
        self.distributed = distributed
        self.rollout_steps = rollout_steps
        self.environment_steps = environment_steps
        self.keep_states = keep_states
        self.recent: deque[tuple[float, float]] = deque(maxlen=100)  # (return, length) of the last finished episodes
        self.rollouts = 0
        """Complete rollouts; -1 while one is played, since environments and weights then belong to different steps."""
        self._normalized = 0  # rollouts whose observations are in the policy's statistics; -1 while they are added
        self._kept: dict[int, Saved] = {}  # rollouts -> state after them, for the last two
        self.restarted: list[int] = []
        """Rows whose episodes `load` could not continue, so that they began new ones."""

    @phase("sampling")
    def collect(self, step: int) -> Collected:
        """Collect one rollout of every environment, continuing where the last one stopped."""
        before = self._kept.get(step) or self._now() if self.keep_states else None
        self.rollouts = -1
        rollout = self.collector.collect(self.rollout_steps, step)
        trajectories = rollout.trajectories
        all_sum = self.distributed.all_sum
        metrics = self._metrics(trajectories)
        if self.reward_scale is not None:
            trajectories = replace(trajectories, rewards=self.reward_scale(trajectories, all_sum))
        made = all_sum(torch.tensor(float(rollout.num_steps), dtype=torch.float64))
        self.environment_steps += int(made)
        by_time = self.distributed.gather_rows(rollout.finished).transpose(0, 1).flatten(0, 1)
        self.recent.extend((value, length) for value, length in by_time[by_time[:, 1] > 0].tolist())
        self.rollouts = step + 1
        if before is not None:
            self._kept = {step: before, step + 1: self._now()}
        counted = {"environment_steps": self.environment_steps, **self._episodes()}
        return Collected(trajectories=trajectories, metrics=metrics | counted)

    def normalize(self, trajectories: Trajectories) -> None:
        """Add the observations to the normaliser's statistics; only after the update, which needs the old ones."""
        self._normalized = -1
        if self.policy.normalizer is not None:
            observations = trajectories.inputs["observations"]
            self.policy.normalizer.update(observations, trajectories.mask, self.distributed.all_sum)
        self._normalized = self.rollouts

    def state(self, step: int) -> Saved | None:
        """The environments' states and the counters after `step` rollouts.

        With `keep_states` also where the rollout after them has failed, and without asking environments that may be gone.
        """
        if self._normalized != step:
            return None  # the policy's statistics belong to another step
        if step in self._kept:
            return self._kept[step]
        return self._now() if self.rollouts == step else None

    def _now(self) -> Saved:
        rows = self.distributed.gather_objects([row_states(self.collector, self.reward_scale)])
        tensors, numbers = to_checkpoint({row: state for part in rows for row, state in part.items()})
        values = {
            "rows": numbers,
            "reward_moments": None if self.reward_scale is None else self.reward_scale.moments.tolist(),
            "environment_steps": self.environment_steps,
            "rollouts": self.rollouts,
            "recent": [list(pair) for pair in self.recent],
        }
        return Saved(values, {"rows": {name: tensor.clone() for name, tensor in tensors.items()}})

    def check(self, saved: Saved, step: int) -> None:
        """Raise InputError unless `saved` is a state after `step` steps of environments like these."""
        saved.count("environment_steps")
        if saved.count("rollouts") != step:
            raise InputError(
                f"state.json: rollouts is {saved.count('rollouts')}, but the checkpoint is of step {step}. {ANOTHER}"
            )
        recent, moments = saved.value("recent", list), saved.values.get("reward_moments")
        if not all(are_numbers(pair, 2) for pair in recent):
            raise InputError(f"state.json: recent is {excerpt(recent)}, not pairs of return and length. {ANOTHER}")
        if not (moments is None if self.reward_scale is None else are_numbers(moments, 3)):
            raise InputError(
                f"state.json: reward_moments is {excerpt(moments)}, which does not fit this run. {ANOTHER}"
            )
        rows = from_checkpoint(dict(saved.tensors["rows"]), saved.value("rows", dict))
        check_rows(row_states(self.collector, self.reward_scale), rows)

    def load(self, saved: Saved) -> None:
        """Restore what `state` saved; `restarted` then lists the rows whose episodes could not be restored."""
        values = saved.values
        self.environment_steps = values["environment_steps"]
        self.rollouts = self._normalized = values["rollouts"]
        self._kept = {}
        self.recent.extend((value, length) for value, length in values["recent"])
        if self.reward_scale is not None:
            self.reward_scale.moments = torch.tensor(values["reward_moments"], dtype=torch.float64)
        rows = from_checkpoint(dict(saved.tensors["rows"]), values["rows"])
        self.restarted = restore_rows(self.collector, self.reward_scale, rows)

    def _metrics(self, trajectories: Trajectories) -> dict[str, float]:
        """Entropy of the policy that acted and, for Gaussian actions, its standard deviation."""
        assert trajectories.old_distribution is not None
        entropy = self.policy.family.entropy(trajectories.old_distribution)
        metrics = {"entropy": masked_mean(entropy, trajectories.mask, self.distributed.all_sum).item()}
        if self.policy.log_std is not None:
            metrics["action_std"] = self.policy.log_std.detach().exp().mean().item()
        return metrics

    def _episodes(self) -> dict[str, float]:
        """Mean return and length of the last 100 finished episodes."""
        if not self.recent:
            return {}
        returns, lengths = zip(*self.recent, strict=True)
        return {"episode_return": fmean(returns), "episode_length": fmean(lengths)}
