"""Environments as a source of trajectories: rollouts, scaled rewards, and what is counted of the episodes."""

from collections import deque
from dataclasses import replace
from statistics import fmean

import torch

from gym_baselines.collect import Collector
from gym_baselines.networks import ActorCritic
from gym_baselines.normalize import RewardScale
from gym_baselines.restore import from_checkpoint, restore_rows, row_states, to_checkpoint
from rlhf.core.masking import masked_mean
from rlhf.distributed import Distributed
from rlhf.runs.checkpoint import Saved
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
    ) -> None:
        """rollout_steps: of each environment in a rollout. environment_steps: made before, over all environments."""
        self.collector, self.policy, self.reward_scale = collector, policy, reward_scale
        self.distributed, self.rollout_steps = distributed, rollout_steps
        self.environment_steps = environment_steps
        self.recent: deque[tuple[float, float]] = deque(maxlen=100)  # (return, length) of the last finished episodes
        self.rollouts = 0
        """Rollouts that are complete; while one is played, environments and weights belong to different steps."""
        self.restarted: list[int] = []
        """Rows whose episodes could not be continued by `load`, so that they began new ones."""

    def collect(self, step: int) -> Collected:
        """One rollout of every environment, continued where the last one stopped."""
        self.rollouts = -1
        rollout = self.collector.collect(self.rollout_steps, step)
        trajectories, all_sum = rollout.trajectories, self.distributed.all_sum
        metrics = self._metrics(trajectories)
        if self.reward_scale is not None:
            trajectories = replace(trajectories, rewards=self.reward_scale(trajectories, all_sum))
        made = all_sum(torch.tensor(float(rollout.num_steps), dtype=torch.float64))
        self.environment_steps += int(made)
        by_time = self.distributed.gather_rows(rollout.finished).transpose(0, 1).flatten(0, 1)
        self.recent.extend((value, length) for value, length in by_time[by_time[:, 1] > 0].tolist())
        self.rollouts = step + 1
        counted = {"environment_steps": self.environment_steps, **self._episodes()}
        return Collected(trajectories=trajectories, metrics=metrics | counted)

    def normalize(self, trajectories: Trajectories) -> None:
        """Take the observations into the policy's statistics: after the update, which still needs the old ones."""
        if self.policy.normalizer is not None:
            observations = trajectories.inputs["observations"]
            self.policy.normalizer.update(observations, trajectories.mask, self.distributed.all_sum)

    def state(self, step: int) -> Saved | None:
        """Where each environment is in its episode, and what was counted; None if they have gone on since."""
        if self.rollouts != step:
            return None
        rows = self.distributed.gather_objects([row_states(self.collector, self.reward_scale)])
        tensors, numbers = to_checkpoint({row: state for part in rows for row, state in part.items()})
        values = {
            "rows": numbers,
            "reward_moments": None if self.reward_scale is None else self.reward_scale.moments.tolist(),
            "environment_steps": self.environment_steps,
            "rollouts": self.rollouts,
            "recent": [list(pair) for pair in self.recent],
        }
        return Saved(values, {"rows": tensors})

    def load(self, saved: Saved) -> None:
        """Bring the environments back there; `restarted` names those that could not be."""
        values = saved.values
        self.environment_steps, self.rollouts = values["environment_steps"], values["rollouts"]
        self.recent.extend((value, length) for value, length in values["recent"])
        if self.reward_scale is not None:
            self.reward_scale.moments = torch.tensor(values["reward_moments"], dtype=torch.float64)
        rows = from_checkpoint(dict(saved.tensors["rows"]), values["rows"])
        self.restarted = restore_rows(self.collector, self.reward_scale, rows)

    def _metrics(self, trajectories: Trajectories) -> dict[str, float]:
        """How random the policy still is, from the distributions it acted by."""
        assert trajectories.old_distribution is not None
        entropy = self.policy.family.entropy(trajectories.old_distribution)
        metrics = {"entropy": masked_mean(entropy, trajectories.mask, self.distributed.all_sum).item()}
        if self.policy.log_std is not None:
            metrics["action_std"] = self.policy.log_std.detach().exp().mean().item()
        return metrics

    def _episodes(self) -> dict[str, float]:
        """Means over the last 100 episodes, in the order in which they ended."""
        if not self.recent:
            return {}
        returns, lengths = zip(*self.recent, strict=True)
        return {"episode_return": fmean(returns), "episode_length": fmean(lengths)}
