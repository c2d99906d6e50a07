"""Progress bar of a run on environments, and TensorBoard metrics under Stable-Baselines3's names."""

from collections.abc import Mapping

from gym_baselines.config import TrainConfig
from rlhf.runs.reporting import Display, progress_bar

TENSORBOARD_NAMES = {  # ours -> Stable-Baselines3's
    "episode_return": "rollout/ep_rew_mean",
    "episode_length": "rollout/ep_len_mean",
    "eval/episode_return": "eval/mean_reward",
    "policy_kl": "train/approx_kl",
    "explained_variance": "train/explained_variance",
    "policy_loss": "train/policy_gradient_loss",
    "value_loss": "train/value_loss",
    "learning_rate": "train/learning_rate",
    "action_std": "train/std",
    "clip_range": "train/clip_range",
}


class EnvironmentBar(Display):
    """A progress bar that counts environment steps over all environments."""

    def __init__(self, config: TrainConfig, *, steps: int, until: int, hidden: bool) -> None:
        """steps: environment steps made so far. until: environment steps at the end of the run."""
        self._bar = progress_bar(total=until, initial=steps, unit=" steps", desc=config.env, disable=hidden)
        self._epochs = config.update.num_epochs
        self._steps = steps
        self._made = 0

    def show(self, metrics: Mapping[str, float], seconds: float) -> None:
        self._made, self._steps = int(metrics["environment_steps"]) - self._steps, int(metrics["environment_steps"])
        self._bar.update(self._made)
        if "episode_return" in metrics:
            self._bar.set_postfix_str(f"mean return of recent episodes {metrics['episode_return']:.1f}", refresh=False)

    def tracked(self, step: int, metrics: Mapping[str, float], seconds: float) -> tuple[int, dict[str, float]]:
        named = {TENSORBOARD_NAMES[name]: value for name, value in metrics.items() if name in TENSORBOARD_NAMES}
        named |= {f"gym_baselines/{name}": value for name, value in metrics.items() if name not in TENSORBOARD_NAMES}
        named["train/n_updates"] = float((step + 1) * self._epochs)  # Stable-Baselines3 counts epochs
        named["train/clip_fraction"] = metrics.get("clip_fraction_low", 0.0) + metrics.get("clip_fraction_high", 0.0)
        named["train/entropy_loss"] = -metrics["entropy"]
        named["time/fps"] = self._made / seconds
        return self._steps, named

    def close(self) -> None:
        self._bar.close()
