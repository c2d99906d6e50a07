"""Measures algorithms of Stable-Baselines3, with rl-zoo's tuned settings, like our own. Needs the extra `peers`.

Their training environments get no render mode (the library's default "rgb_array" makes LunarLander 4 times slower).
"""

from contextlib import closing
from importlib import import_module
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete

from gym_baselines.envs.environments import EVALUATION, EnvironmentConfig, make_env
from gym_baselines.measuring.lines_of_code import executed_lines
from gym_baselines.measuring.meter import Meter, RunSpec
from gym_baselines.measuring.zoo import ZOO
from rlhf.errors import InputError

ALGORITHMS = {
    "sb3_dqn": ("stable_baselines3", "DQN"),
    "sb3_sac": ("stable_baselines3", "SAC"),
    "sb3_ppo": ("stable_baselines3", "PPO"),
    "sb3_a2c": ("stable_baselines3", "A2C"),
    "sb3_trpo": ("sb3_contrib", "TRPO"),
}
"""Name in `compare` -> (package, class)."""

ACTIONS = {"sb3_dqn": (Discrete,), "sb3_sac": (Box,)}
"""Action spaces that an algorithm needs, if it does not take all."""

PACKAGES = {"stable_baselines3": "stable-baselines3", "sb3_contrib": "sb3-contrib"}
DEFAULT_STEPS = 100_000
LINES_STEPS = {"sb3_dqn": 1_600, "sb3_sac": 250}
"""Steps after which an off-policy algorithm has learnt at least once; the others play two rollouts."""


def require(algorithm: str, env: str) -> None:
    """Raise InputError unless the algorithm is known, fits the environment and is installed."""
    if algorithm not in ALGORITHMS:
        raise InputError(f"algorithms: there is no peer {algorithm!r}; known: {', '.join(ALGORITHMS)}.")
    _check_spaces(algorithm, env)
    package, _ = ALGORITHMS[algorithm]
    try:
        import_module(package)
    except ImportError as error:
        raise InputError(
            f"algorithms: {algorithm} needs {PACKAGES[package]}, which is not installed ({error}). "
            "Install it: pip install 'rlhf-toolkit[peers]'"
        ) from error


def _check_spaces(algorithm: str, env: str) -> None:
    with closing(make_env(env, seed=0, row=0)) as single:
        observations, actions = single.observation_space, single.action_space
    if not isinstance(observations, Box | Discrete) or len(observations.shape) > 1:
        raise InputError(
            f"algorithms: {algorithm} is compared on observations that are vectors, {env} has {observations}: leave it out."
        )
    wanted = ACTIONS.get(algorithm, (Discrete, Box))
    if not isinstance(actions, wanted):
        names = " or ".join(kind.__name__ for kind in wanted)
        raise InputError(f"algorithms: {algorithm} needs {names} actions, {env} has {actions}: leave it out.")


def measures_kl(algorithm: str) -> bool:
    """Whether the KL per update is measured. Not for DQN and SAC: their updates are single minibatches, and DQN has no
    distribution."""
    return algorithm not in ("sb3_dqn", "sb3_sac")


def default_steps(algorithm: str, env: str) -> int:
    return int(ZOO.get((algorithm, env), {}).get("n_timesteps", DEFAULT_STEPS))


def measured_peer(spec: RunSpec, meter: Meter) -> dict[str, Any]:
    """Like `measure.measured_run`, for an algorithm of Stable-Baselines3."""
    model = build(spec)
    player = PeerPlayer(model, spec.env)
    model.learn(spec.total_steps, callback=_watcher(meter, player))
    meter.steps = int(model.num_timesteps)
    episodes = model.ep_info_buffer or ()
    return meter.result(player, [float(episode["r"]) for episode in episodes])


def peer_lines(spec: RunSpec) -> dict[str, list[int]]:
    model = build(spec)
    steps = LINES_STEPS.get(spec.algorithm, 2 * model.n_envs * getattr(model, "n_steps", 1))
    return executed_lines(lambda: model.learn(steps), ["stable_baselines3", ALGORITHMS[spec.algorithm][0]])


def settings_of(spec: RunSpec) -> dict[str, Any]:
    """The zoo's settings, overridden by those of the run. The library's defaults apply to all others."""
    return {**ZOO.get((spec.algorithm, spec.env), {}), **spec.changes}


def build(spec: RunSpec) -> Any:
    """The untrained model, with its training environments."""
    require(spec.algorithm, spec.env)
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    package, name = ALGORITHMS[spec.algorithm]
    settings = settings_of(spec)
    settings.pop("n_timesteps", None)
    normalize = settings.pop("normalize", False)
    envs = make_vec_env(spec.env, settings.pop("n_envs", 1), seed=spec.seed, env_kwargs={"render_mode": None})
    if normalize:
        envs = VecNormalize(envs, gamma=settings.get("gamma", 0.99))
    settings = {name: _schedule(value) for name, value in settings.items()}
    return getattr(import_module(package), name)("MlpPolicy", envs, seed=spec.seed, device="cpu", verbose=0, **settings)


def _schedule(value: Any) -> Any:
    """The zoo's "lin_0.001" as a function that falls linearly to 0 over the training; other values unchanged."""
    if isinstance(value, str) and value.startswith("lin_"):
        start = float(value.removeprefix("lin_"))
        return lambda remaining: start * remaining
    return value


def _watcher(meter: Meter, player: "PeerPlayer") -> Any:
    """A callback of Stable-Baselines3 that measures at the start of a rollout, which follows an update."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Watcher(BaseCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps:
                meter.after_update(self.num_timesteps, player, {})

        def _on_step(self) -> bool:
            return True

    return Watcher()


class PeerPlayer:
    """A model of Stable-Baselines3 in training, as a `Player`."""

    def __init__(self, model: Any, env: str) -> None:
        self.model = model
        self.env = env
        self.options = EnvironmentConfig()
        self.normalizer = model.get_vec_normalize_env()

    def evaluate(self, episodes: int, seed: int) -> np.ndarray:
        """Greedy episodes from the start states that `gym_baselines.evaluate` uses."""
        envs = [make_env(self.env, seed=seed, row=row, purpose=EVALUATION) for row in range(episodes)]
        observations = np.stack([env.reset()[0] for env in envs])
        returns = np.zeros(episodes)
        running = np.arange(episodes)
        while len(running):
            actions, _ = self.model.predict(self._normalized(observations[running]), deterministic=True)
            over = np.zeros(len(running), dtype=bool)
            for place, (episode, action) in enumerate(zip(running, actions, strict=True)):
                observations[episode], reward, terminated, truncated, _ = envs[episode].step(action)
                returns[episode] += float(reward)
                over[place] = terminated or truncated
            running = running[~over]
        for env in envs:
            env.close()
        return returns

    def sample(self, observations: np.ndarray, step: int) -> np.ndarray:
        with torch.random.fork_rng(devices=[]):  # measuring must not disturb training
            torch.manual_seed(step)
            return self.model.predict(self._normalized(observations), deterministic=False)[0]

    @torch.no_grad()
    def distribution(self, observations: np.ndarray) -> Any:
        return self.model.policy.get_distribution(torch.as_tensor(self._normalized(observations))).distribution

    @torch.no_grad()
    def kl(self, old: Any, new: Any) -> float:
        divergence = torch.distributions.kl_divergence(old, new)
        return float(divergence.sum(-1).mean() if divergence.dim() > 1 else divergence.mean())

    def _normalized(self, observations: np.ndarray) -> np.ndarray:
        return observations if self.normalizer is None else self.normalizer.normalize_obs(observations)
