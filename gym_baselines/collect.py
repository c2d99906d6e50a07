"""From a Gymnasium vector environment to `Trajectories`: rows are environments, time is their steps.

The two autoreset modes differ in where the final observation of an episode appears:

    NEXT_STEP   the ending step returns it; the step after ignores the action and returns the reset observation. That
                *ghost* step is masked: it trains nothing and is not counted. Its value is V(final observation), so
                next_values[t] = values[t + 1] holds in every step.
    SAME_STEP   the ending step returns the reset observation already, and the final one in infos["final_obs"], whose
                value is then computed for next_values. There are no ghosts.

Actions depend on (seed, row, how many real steps the row has made), so both modes give the same transitions, and a
run does not depend on which process holds which environment.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from gym_baselines.environments import autoreset_mode, check_supported
from rlhf.core.random import ACTIONS, uniform
from rlhf.errors import TrainingError
from rlhf.types import Inputs, PolicyOutputs, Trajectories


class ActingPolicy(Protocol):
    """What the collector needs of a policy; `CategoricalPolicy` documents the shapes."""

    @property
    def dtype(self) -> torch.dtype: ...
    def __call__(self, inputs: Inputs, actions: Tensor, with_values: bool, with_entropy: bool) -> PolicyOutputs: ...
    def sample(self, observations: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]: ...
    def values(self, observations: Tensor) -> Tensor: ...


class Rollout(NamedTuple):
    trajectories: Trajectories
    finished: Tensor
    """(rows, time, 2): undiscounted return and length of the episode that ended at this step, 0 where none did."""


class Collector:
    """Plays fixed-length rollouts that continue where the last one stopped, in the middle of an episode or of a reset."""

    def __init__(
        self,
        envs: VectorEnv,
        policy: ActingPolicy,
        *,
        seed: int,
        rows: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """rows: the global index of each environment, 0 .. n - 1 if None. Resets the environments."""
        check_supported(envs.single_observation_space, envs.single_action_space, "the vector environment")
        self.envs, self.policy, self.seed, self.device = envs, policy, seed, torch.device(device)
        self.ghosts_follow_ends = autoreset_mode(envs) == AutoresetMode.NEXT_STEP
        self.rows = torch.tensor(range(envs.num_envs) if rows is None else rows)
        self.first_action = int(getattr(envs.single_action_space, "start", 0))
        self.observation = np.array(envs.reset()[0])
        self.is_ghost = np.zeros(envs.num_envs, dtype=bool)  # the coming step only resets
        self.steps_done = torch.zeros(envs.num_envs, dtype=torch.int64)  # real steps of each row: keys its actions
        self.returns = np.zeros(envs.num_envs)  # of the episodes now running
        self.lengths = np.zeros(envs.num_envs, dtype=np.int64)

    def collect(self, num_steps: int) -> Rollout:
        """Play `num_steps` steps of every environment and score them with the policy's present weights."""
        record = _Record(num_steps, self.envs)
        draws = uniform(self.seed, ACTIONS, self.steps_done[:, None] + torch.arange(num_steps), self.rows[:, None])
        made = np.zeros(self.envs.num_envs, dtype=np.int64)  # real steps of this rollout
        each = np.arange(self.envs.num_envs)
        draws_at = draws.numpy()
        for t in range(num_steps):
            observation = self._to_policy(self.observation)
            with torch.inference_mode():
                actions, logprobs = self.policy.sample(
                    observation, torch.from_numpy(draws_at[each, made]).to(self.device)
                )
            record.observations[t], record.mask[t] = self.observation, ~self.is_ghost
            record.actions[t], record.logprobs[t] = actions.cpu().numpy(), logprobs.cpu().numpy()
            self.observation, rewards, terminated, truncated, infos = self.envs.step(
                record.actions[t] + self.first_action
            )
            ends = terminated | truncated
            record.rewards[t], record.terminated[t], record.ends[t] = rewards, terminated, ends
            made += record.mask[t]
            self._count_episodes(record, t)
            if self.ghosts_follow_ends:
                self.is_ghost = ends
            elif ends.any():
                record.final_observations += [(t, row, np.array(infos["final_obs"][row])) for row in ends.nonzero()[0]]
        self.observation = np.array(self.observation)  # the environments may reuse their buffer
        self.steps_done += torch.from_numpy(made)
        return self._score(record, num_steps)

    def _count_episodes(self, record: "_Record", t: int) -> None:
        """Returns and lengths by our own arithmetic: the wrappers' differ between modes and versions."""
        self.returns += record.rewards[t]  # 0 at a ghost
        self.lengths += record.mask[t]
        ends = record.ends[t]
        if ends.any():
            record.finished[t, ends, 0], record.finished[t, ends, 1] = self.returns[ends], self.lengths[ends]
            self.returns[ends], self.lengths[ends] = 0.0, 0

    @torch.no_grad()
    def _score(self, record: "_Record", num_steps: int) -> Rollout:
        """Old log-probs and values from the training forward, in one pass over the rollout."""
        observations = self._to_policy(record.observations).transpose(0, 1)  # (rows, time, ...)
        actions = torch.from_numpy(record.actions).t().to(self.device)
        shape = actions.shape
        outputs = self.policy(
            {"observations": observations.flatten(0, 1)}, actions.reshape(-1, 1), with_values=True, with_entropy=False
        )
        assert outputs.values is not None
        values = outputs.values.view(shape)
        last = [self.observation, *(observation[None] for _, _, observation in record.final_observations)]
        last_values = self.policy.values(self._to_policy(np.concatenate(last)))
        next_values = torch.cat([values[:, 1:], last_values[: shape[0], None]], dim=1)
        for (t, row, _), value in zip(record.final_observations, last_values[shape[0] :], strict=True):
            next_values[row, t] = value
        self._check(record)

        def rows_first(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).transpose(0, 1).contiguous().to(self.device)

        trajectories = Trajectories(
            inputs={"observations": observations.contiguous()},
            actions=actions.contiguous(),
            mask=rows_first(record.mask),
            rewards=rows_first(record.rewards).to(values.dtype),
            sampling_logprobs=rows_first(record.logprobs).to(values.dtype),
            old_logprobs=outputs.logprobs.view(shape),
            values=values,
            next_values=next_values,
            terminated=rows_first(record.terminated),
            episode_ends=rows_first(record.ends),
            row_tokens=torch.full((shape[0],), num_steps, device=self.device),
            row_index=self.rows.to(self.device),
        )
        return Rollout(trajectories, rows_first(record.finished))

    def _to_policy(self, observations: np.ndarray) -> Tensor:
        return torch.from_numpy(observations).to(self.device, self.policy.dtype)

    def _check(self, record: "_Record") -> None:
        """An environment that gives a NaN is named before anything is learnt from it."""
        for name, array in (("reward", record.rewards), ("observation", record.observations)):
            if not np.isfinite(array).all():
                t, row = np.argwhere(~np.isfinite(array))[0][:2]
                raise TrainingError(
                    f"The {name} of environment {int(self.rows[row])} is not finite ({array[t, row]}) at step {t} of a "
                    "rollout. Look for a division by zero or a diverging simulation in the environment."
                )


class _Record:
    """Time-major buffers of one rollout: one contiguous row is written per step."""

    def __init__(self, num_steps: int, envs: VectorEnv) -> None:
        shape = (num_steps, envs.num_envs)
        space = envs.single_observation_space
        self.observations = np.empty((*shape, *space.shape), dtype=space.dtype)  # type: ignore[misc]
        self.actions = np.empty(shape, dtype=np.int64)
        self.logprobs = np.empty(shape)
        self.rewards = np.empty(shape)
        self.mask, self.terminated, self.ends = (np.empty(shape, dtype=bool) for _ in range(3))
        self.finished = np.zeros((*shape, 2))
        self.final_observations: list[tuple[int, int, np.ndarray]] = []
