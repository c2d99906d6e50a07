"""What a run tells: the progress bar, metrics.jsonl and times.jsonl, and TensorBoard under the names people know."""

import time

from tqdm import tqdm

from gym_baselines.config import TrainConfig
from rlhf.distributed import Distributed
from rlhf.runs.jsonlines import MetricsWriter
from rlhf.runs.metrics import unknown_names

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


class Report:
    """Files and bar of one run. Every process makes one; only the main one writes."""

    def __init__(
        self, config: TrainConfig, distributed: Distributed, *, first_update: int, steps: int, until: int
    ) -> None:
        """Continues the files where `first_update` begins: later lines, of a run that was interrupted, are cut.

        steps, until: environment steps made so far, and those to be reached.
        """
        self._distributed = distributed
        self._writer: MetricsWriter | None = None
        if config.output_dir is not None and distributed.is_main:
            self._writer = MetricsWriter(config.output_dir)
            self._writer.truncate_to(first_update - 1)
        self._bar = tqdm(
            total=until,
            initial=steps,
            unit=" steps",
            desc=config.env,
            disable=not (config.progress_bar and distributed.is_main),
        )
        self._epochs, self._steps = config.update.num_epochs, steps
        self._clock = time.perf_counter()
        distributed.start_tracking("tensorboard", {})

    def step(self, update: int, metrics: dict[str, float]) -> None:
        unknown = unknown_names(metrics)
        assert not unknown, f"add {unknown} to the table in rlhf/runs/metrics.py"
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        made, self._steps = int(metrics["environment_steps"]) - self._steps, int(metrics["environment_steps"])
        self._bar.update(made)
        if "episode_return" in metrics:
            self._bar.set_postfix_str(f"mean return of recent episodes {metrics['episode_return']:.1f}", refresh=False)
        if self._writer is not None:
            self._writer.write(update, metrics, {"step_s": seconds})
        self._distributed.track(self._tensorboard(update, metrics) | {"time/fps": made / seconds}, self._steps)

    def _tensorboard(self, update: int, metrics: dict[str, float]) -> dict[str, float]:
        named = {TENSORBOARD_NAMES[name]: value for name, value in metrics.items() if name in TENSORBOARD_NAMES}
        named |= {f"gym_baselines/{name}": value for name, value in metrics.items() if name not in TENSORBOARD_NAMES}
        named["train/n_updates"] = float((update + 1) * self._epochs)  # Stable-Baselines3 counts epochs
        named["train/clip_fraction"] = metrics.get("clip_fraction_low", 0.0) + metrics.get("clip_fraction_high", 0.0)
        named["train/entropy_loss"] = -metrics["entropy"]
        return named

    def sync(self) -> None:
        if self._writer is not None:
            self._writer.sync()

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
