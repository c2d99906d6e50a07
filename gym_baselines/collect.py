"""Collects `Trajectories` from a Gymnasium vector environment: one row per environment, steps along the time axis.

The three autoreset modes differ in where the final observation of an episode appears:

    NEXT_STEP   The last step returns it. The following step ignores its action and returns the reset observation. This
                *ghost* step is masked: it trains nothing and is not counted. Its value is V(final observation), so
                next_values[t] = values[t + 1] holds in every step.
    SAME_STEP   The last step returns the reset observation, and puts the final one into infos["final_obs"], whose
                value is computed separately for next_values. There are no ghost steps.
    DISABLED    The last step returns it, and the collector resets the environment itself; otherwise as SAME_STEP.

Actions depend only on (seed, row, number of real steps of the row), so all modes give the same transitions, and a run
does not depend on which process holds which environment.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from gym_baselines.envs.vector import action_masks, autoreset_mode, finished_games, reports_games
from gym_baselines.record import Record, Segment
from rlhf.core.masking import AllSum, local_sum
from rlhf.core.random import ACTIONS, uniform
from rlhf.errors import TrainingError
from rlhf.types import Inputs, PolicyOutputs, Trajectories

_MOST_ROLLOUTS_PER_EPISODE = 1000


class ActingPolicy(Protocol):
    """The part of a policy that the collector uses; see `ActorCritic` for the shapes."""

    family: Any

    @property
    def dtype(self) -> torch.dtype: ...
    def __call__(self, inputs: Inputs, actions: Tensor, with_values: bool, with_entropy: bool) -> PolicyOutputs: ...
    def sample(
        self, observations: Tensor, draws: Tensor, action_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    def values(self, observations: Tensor) -> Tensor: ...
    def env_actions(self, actions: Tensor) -> np.ndarray: ...


class Rollout(NamedTuple):
    trajectories: Trajectories
    finished: Tensor
    """(rows, time, 2): undiscounted return and length of the episode that ended at this step; 0 if none did."""
    num_steps: int
    """Real steps that the environments of this process made for this rollout."""


class Collector:
    """Plays fixed-length rollouts. Each continues where the last one stopped, even within an episode or at a ghost."""

    def __init__(
        self,
        envs: VectorEnv,
        policy: ActingPolicy,
        *,
        seed: int,
        rows: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        whole_episodes: bool = False,
        masks_actions: bool = False,
        with_values: bool = True,
        all_sum: AllSum = local_sum,
    ) -> None:
        """Reset the environments.

        Args:
            envs: The environments of this process.
            policy: Chooses the actions and scores them.
            seed: Seed of the actions.
            rows: Global index of each environment; 0 .. n - 1 if None.
            device: Where the policy is and trajectories go.
            whole_episodes: Rollouts hold only complete episodes; steps of unfinished ones are carried over.
            masks_actions: Read the allowed actions from infos["action_mask"].
            with_values: Compute the policy's values; otherwise they are 0.
            all_sum: Sums a tensor over all processes.
        """
        self.envs = envs
        self.policy = policy
        self.seed = seed
        self.device = torch.device(device)
        self.mode = autoreset_mode(envs)
        self.ghosts_follow_ends = self.mode == AutoresetMode.NEXT_STEP
        self.reports_games = reports_games(envs)
        self.whole_episodes = whole_episodes
        self.masks_actions = masks_actions
        self.with_values = with_values
        self.all_sum = all_sum
        self.rows = torch.tensor(range(envs.num_envs) if rows is None else rows)
        num = envs.num_envs
        self.is_ghost = np.zeros(num, dtype=bool)  # rows whose next step only resets
        self.steps_done = torch.zeros(num, dtype=torch.int64)  # real steps of each row; part of the key of its actions
        self.returns = np.zeros(num)  # of the running episodes
        self.lengths = np.zeros(num, dtype=np.int64)
        self.carried: list[Segment] | None = None  # steps of unfinished episodes, if whole_episodes
        observation, infos = envs.reset()
        self.observation = np.array(observation)
        self.action_mask = self.allowed(infos, np.zeros(num, dtype=bool), None)

    def collect(self, num_steps: int, version: int = 0) -> Rollout:
        """Play `num_steps` steps of every environment and score them with the policy's present weights.

        version: how many updates the policy has had.

        With whole_episodes, the rollout holds the episodes that ended in it, from their first step on. As long as no
        episode has ended on any process, another `num_steps` steps are played.
        """
        record = self._play(num_steps, version)
        made = int(record.mask.sum())
        if not self.whole_episodes:
            return self._score(record, made)
        for _ in range(_MOST_ROLLOUTS_PER_EPISODE):
            record, self.carried = record.split_whole_episodes(self.carried)
            if self.all_sum(torch.tensor(float(record.ends.any()))) > 0:
                return self._score(record, made)
            record = self._play(num_steps, version)
            made += int(record.mask.sum())
        raise TrainingError(
            f"No episode ended in {_MOST_ROLLOUTS_PER_EPISODE} rollouts of {num_steps} steps, and whole_episodes learns "
            "from complete ones only: set environment.max_episode_steps, or whole_episodes to false."
        )

    def _play(self, num_steps: int, version: int) -> Record:
        num = self.envs.num_envs
        record = Record.empty(num_steps, self.envs, self.policy, with_masks=self.action_mask is not None)
        draws_at = self._draws(num_steps)
        made = np.zeros(num, dtype=np.int64)  # real steps of this rollout
        each = np.arange(num)
        with torch.inference_mode():
            for t in range(num_steps):
                record.observations[t] = self.observation
                record.mask[t] = ~self.is_ghost
                masks = None
                if record.action_masks is not None:
                    record.action_masks[t] = self.action_mask
                    masks = torch.from_numpy(record.action_masks[t]).to(self.device)
                draws = torch.from_numpy(draws_at[each, made]).to(self.device)
                actions, logprobs = self.policy.sample(self._to_policy(self.observation), draws, masks)
                record.actions[t], record.logprobs[t] = actions.cpu().numpy(), logprobs.cpu().numpy()
                self._step(record, t, self.policy.env_actions(actions))
                made += record.mask[t]
        self.observation = np.array(self.observation)  # a copy: the environments may reuse their buffer
        self.steps_done += torch.from_numpy(made)
        self._check(record)
        if self.whole_episodes:  # these steps may be used after later updates
            record.versions = np.full_like(record.mask, version, dtype=np.int64)
        return record

    def _draws(self, num_steps: int) -> np.ndarray:
        """Uniform numbers, (rows, steps, num_draws), for the next `num_steps` real steps of each row."""
        steps = self.steps_done[:, None, None] + torch.arange(num_steps)[:, None]
        dimensions = torch.arange(self.policy.family.num_draws)
        return uniform(self.seed, ACTIONS, steps, self.rows[:, None, None], dimensions).numpy()

    def _step(self, record: Record, t: int, actions: np.ndarray) -> None:
        """Step the environments with the actions of time t, and record rewards, ends and final observations."""
        self.observation, rewards, terminated, truncated, infos = self.envs.step(actions)
        ends = terminated | truncated
        record.rewards[t], record.terminated[t], record.ends[t] = rewards, terminated, ends
        self.returns += record.rewards[t]  # 0 at a ghost
        self.lengths += record.mask[t]
        self.action_mask = self.allowed(infos, ends, None)
        if self.reports_games:  # a lost life ends an episode for learning; whole games are reported
            self._note_games(record, t, infos, ends)
        if ends.any():
            self._finish(record, t, ends, infos)
        if self.ghosts_follow_ends:
            self.is_ghost = ends

    def _finish(self, record: Record, t: int, ends: np.ndarray, infos: dict[str, Any]) -> None:
        """Record final observations, and our own returns and lengths (those of wrappers differ between modes)."""
        if not self.reports_games:
            record.finished[t, ends, 0], record.finished[t, ends, 1] = self.returns[ends], self.lengths[ends]
        self.returns[ends], self.lengths[ends] = 0.0, 0
        rows = np.flatnonzero(ends).tolist()
        if self.mode == AutoresetMode.SAME_STEP:
            record.final_observations += [(t, row, np.array(infos["final_obs"][row])) for row in rows]
        elif self.mode == AutoresetMode.DISABLED or self.whole_episodes:
            record.final_observations += [(t, row, np.array(self.observation[row])) for row in rows]
        if self.mode == AutoresetMode.DISABLED:
            self.observation, after = self.envs.reset(options={"reset_mask": ends})
            self.action_mask = self.allowed(after, np.zeros_like(ends), self.action_mask)
            if self.reports_games:
                self._note_games(record, t, after, ends)

    def _note_games(self, record: Record, t: int, infos: dict[str, Any], ends: np.ndarray) -> None:
        """Record the games that ended. The reset after a lost life makes a step, which may end the game too."""
        over, returns, lengths = finished_games(infos, ends)
        record.finished[t, over, 0], record.finished[t, over, 1] = returns[over], lengths[over]

    def allowed(self, infos: dict[str, Any], ends: np.ndarray, before: np.ndarray | None) -> np.ndarray | None:
        """(rows, choices) bool: the actions that are allowed in the next step."""
        if not self.masks_actions:
            return None
        return action_masks(infos, self.policy.family.num_params, ends, before)

    @torch.no_grad()
    def _score(self, record: Record, num_steps: int) -> Rollout:
        """Compute old log-probs, values and distributions by the training forward, in one pass over the rollout."""
        observations = self._to_policy(record.observations).transpose(0, 1)  # (rows, time, ...)
        inputs = {"observations": observations.contiguous()}
        if record.action_masks is not None:
            inputs["action_mask"] = self._rows_first(record.action_masks)
        actions = self._rows_first(record.actions)
        if actions.is_floating_point():
            actions = actions.to(self.policy.dtype)  # the dtype in which they were drawn, so without loss
        rows, time = actions.shape[:2]
        outputs = self.policy(
            {name: tensor.flatten(0, 1) for name, tensor in inputs.items()},
            actions.reshape(rows * time, 1, *actions.shape[2:]),
            with_values=self.with_values,
            with_entropy=False,
        )
        old_logprobs = outputs.logprobs.view(rows, time)
        values = next_values = torch.zeros_like(old_logprobs)
        if self.with_values:
            assert outputs.values is not None
            values = outputs.values.view(rows, time)
            next_values = self._next_values(record, values)
        distribution = outputs.distribution
        trajectories = Trajectories(
            inputs=inputs,
            actions=actions,
            mask=self._rows_first(record.mask),
            rewards=self._rows_first(record.rewards).to(values.dtype),
            sampling_logprobs=self._rows_first(record.logprobs).to(values.dtype),
            old_logprobs=old_logprobs,
            values=values,
            next_values=next_values,
            terminated=self._rows_first(record.terminated),
            episode_ends=self._rows_first(record.ends),
            old_distribution=None if distribution is None else distribution.view(rows, time, -1),
            row_tokens=torch.full((rows,), time, device=self.device),
            row_index=self.rows.to(self.device),
            policy_version=None if record.versions is None else self._rows_first(record.versions),
        )
        return Rollout(trajectories, self._rows_first(record.finished), num_steps)

    def _next_values(self, record: Record, values: Tensor) -> Tensor:
        """V of each step's successor: the next step, the final observation, or at the end the present one."""
        last = [self.observation, *(observation[None] for _, _, observation in record.final_observations)]
        last_values = self.policy.values(self._to_policy(np.concatenate(last)))
        next_values = torch.cat([values[:, 1:], last_values[: len(values), None]], dim=1)
        if record.final_observations:
            times, rows, _ = zip(*record.final_observations, strict=True)
            next_values[list(rows), list(times)] = last_values[len(values) :]
        return next_values

    def _rows_first(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).transpose(0, 1).contiguous().to(self.device)

    def _to_policy(self, observations: np.ndarray) -> Tensor:
        """Observations as a tensor: floats in the policy's dtype, integers as they are (the network scales images)."""
        tensor = torch.from_numpy(observations)
        return tensor.to(self.device, self.policy.dtype if tensor.is_floating_point() else tensor.dtype)

    def _check(self, record: Record) -> None:
        """Raise TrainingError, naming the environment, if a reward or observation is not finite."""
        if not np.isfinite(record.rewards).all():
            t, row = np.argwhere(~np.isfinite(record.rewards))[0]
            raise self._not_finite("reward", record.rewards[t, row], row, t)
        if not np.isfinite(record.observations).all():
            t, row = np.argwhere(~np.isfinite(record.observations))[0][:2]
            raise self._not_finite("observation", record.observations[t, row], row, t)
        finals = [(t, row, final) for t, row, final in record.final_observations if not record.terminated[t, row]]
        for t, row, observation in [*finals, *((len(record.mask), row, o) for row, o in enumerate(self.observation))]:
            if not np.isfinite(observation).all():
                raise self._not_finite("observation", observation, row, t)

    def _not_finite(self, what: str, value: Any, row: int, t: int) -> TrainingError:
        return TrainingError(
            f"The {what} of environment {int(self.rows[row])} is not finite ({value}) at step {t} of a rollout. Look for a "
            "division by zero or a diverging simulation in the environment."
        )
