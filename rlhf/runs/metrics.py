"""The table of all metrics that a run may log.

OUTPUT_DIR/metrics.jsonl    one JSON object per line, sorted keys, no times: two equal runs give equal bytes
          /times.jsonl      wall-clock seconds of the same steps
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rlhf.errors import InputError, excerpt
from rlhf.runs.jsonlines import encoded, number


class Metric(NamedTuple):
    description: str
    unit: str
    worry: str = ""
    """Reading that is a warning sign; empty if none is known."""


_ROWS: dict[str, tuple[str, ...]] = {
    "score": ("mean score of the completions, all reward functions weighted", "score", "rises while samples get worse"),
    "score_std": ("standard deviation of the step's scores", "score", "0: nothing to learn from"),
    "rewards/<function>/mean": ("mean score given by one reward function", "score"),
    "rewards/<function>/std": ("standard deviation of the scores given by one reward function", "score", "0 for long"),
    "rewards/<function>/abstained": ("share of completions on which one reward function returned None", "share"),
    "rewards/unscored": ("share of completions that no reward function scored", "share", "above 0"),
    "custom/<name>": ("a number that the user's reward function logged", ""),
    "eval/<metric>": ("the metric of that name on held-out prompts or episodes", ""),
    "reward_kl": ("KL(policy || reference), k1 on sampled tokens", "nats per completion", "above 20; below 0 for long"),
    "kl_coef": ("coefficient of the KL penalty in this step", "score per nat", "runs away: kl_target is out of reach"),
    "policy_loss": ("policy loss, minimised; near 0 by design if advantages are whitened", "1"),
    "value_loss": ("value loss, before value_coef", "score squared", "jumps by orders of magnitude"),
    "entropy": ("mean entropy of the policy's distribution", "nats per token", "falls to 0 early, or keeps rising"),
    "policy_kl": ("KL(old || policy) of the update, k3 estimator", "nats per token", "above 0.05: too large a step"),
    "policy_kl_k1": ("KL(old || policy) of the update, k1 estimator; may be negative", "nats per token"),
    "clip_range": ("clip range of this step, which may fall over the run", "1"),
    "measured_kl": (
        "KL(old || policy) over the whole batch after the update",
        "nats per token",
        "far above the target",
    ),
    "penalty_coef": ("coefficient of PPO-Penalty in this step", "1", "runs away: penalty_target is out of reach"),
    "clip_fraction_low": ("share of tokens clipped at the lower bound (advantage < 0)", "share", "above 0.3"),
    "clip_fraction_high": ("share of tokens clipped at the upper bound (advantage > 0)", "share", "above 0.3"),
    "trust_region_kl": ("TRPO: exact KL(old || policy) of the accepted step; 0 if none", "nats", "far below max_kl"),
    "line_search_steps": ("TRPO: how often the step was shortened", "steps", "near the limit backtracks"),
    "line_search_accepted": ("TRPO: 1 if a step was taken, 0 if the policy stayed as it was", "share", "often 0"),
    "surrogate_gain": ("TRPO: rise of mean(ratio * advantage) by the accepted step; 0 if none", "1", "always near 0"),
    "cg_residual": ("TRPO: |H s - g| / |g| of conjugate gradient's solution s", "1", "above 0.5: raise cg_iterations"),
    "explained_variance": ("1 - Var(returns - values) / Var(returns)", "1", "below 0 after the first steps"),
    "grad_norm": ("global gradient norm before clipping", "1", "spikes, or always above max_grad_norm"),
    "critic_grad_norm": ("that of the critic's own weights, if they are clipped by themselves", "1", "spikes"),
    "learning_rate": ("learning rate of this step", "1"),
    "optimizer_steps": (
        "optimizer steps made in this step",
        "steps",
        "fewer than planned: target_kl stopped it",
    ),
    "environment_steps": ("environment steps done so far, over all environments", "steps"),
    "prompts_seen": ("prompts drawn from the data set so far", "prompts"),
    "completion_length": ("mean completion length, EOS included", "tokens", "drifts while the score stands still"),
    "truncated_fraction": ("share of completions cut by the length limit", "share", "above 0.3"),
    "reward": ("GRPO's name for `score`", "score", "rises while samples get worse"),
    "reward_std": (
        "GRPO's name for `score_std`, over all completions of the step",
        "score",
        "0: nothing to learn from",
    ),
    "frac_reward_zero_std": (
        "share of groups whose scores are all equal, which teach nothing",
        "share",
        "above 0.5: prompts too easy or too hard; see dynamic_sampling_rounds",
    ),
    "kl": ("the KL term of the loss before kl_coef, averaged as the loss is", "nats per token"),
    "clip_ratio/<bound>": (
        "GRPO's name for clip_fraction_low, clip_fraction_high: low_mean, high_mean",
        "share",
        "above 0.3",
    ),
    "completions/<length>": (
        "tokens: mean_length, min_length, max_length, mean_terminated_length (those that ended), mean_length_right and "
        "mean_length_wrong (first reward above 0, or not); clipped_ratio: share cut by the length limit",
        "tokens",
        "wrong ones grow while right ones do not",
    ),
    "sampling/sampling_logp_difference/<kind>": (
        "GRPO's names for `sampler_gap` (max) and `sampler_gap_mean` (mean)",
        "nats",
        "above 1e-4 in float32",
    ),
    "dynamic_sampling/rounds": ("rounds of sampling in this step", "rounds", "always the limit"),
    "dynamic_sampling/prompts": ("prompts sampled in this step", "prompts"),
    "sampler_gap": (
        "largest |sampling - training log-prob| of the step's tokens, without those that older weights sampled",
        "nats",
        "above 1e-4 in float32",
    ),
    "sampler_gap_mean": (
        "mean |sampling - training log-prob| of the same tokens",
        "nats",
        "above 1e-5 in float32, above 0.05 in bfloat16",
    ),
    "stale_fraction": (
        "share of the step's tokens or actions that older weights sampled, and with which the sampler is not compared",
        "share",
        "near 1: hardly a token is compared",
    ),
    "episode_return": ("mean undiscounted return of the last 100 finished episodes", "reward"),
    "episode_return_std": ("standard deviation of the evaluation's episode returns", "reward"),
    "action_std": ("mean standard deviation of the Gaussian policy", "action units", "grows, or falls to 0 early"),
    "episode_length": ("mean length of the last 100 finished episodes", "steps"),
}
TABLE = {name: Metric(*row) for name, row in _ROWS.items()}
"""Every metric that a run may log, defined once. `<...>` in a name stands for any text without a slash."""
_PATTERNS = [re.compile(re.sub("<[a-z]+>", "[^/]+", name)) for name in TABLE]


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raise InputError if a source of trajectories reports metrics that `TABLE` does not define, or that are no numbers."""
    unknown = [name for name in metrics if not isinstance(name, str) or unknown_names([name])]
    if unknown:
        raise InputError(
            f"source: its metrics {', '.join(map(str, unknown))} are not in the table of metrics. Name metrics of your own "
            "custom/NAME. Nothing was trained in this step."
        )
    for name, value in metrics.items():
        try:
            encoded(0, {name: number(value)})
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InputError(
                f"source: its metric {excerpt(name)} is {excerpt(value)}, which cannot be written ({error}). Give a "
                "number. Nothing was trained in this step."
            ) from error


def unknown_names(names: Iterable[str]) -> list[str]:
    """The names that `TABLE` does not define."""
    return [name for name in names if not any(p.fullmatch(name.removeprefix("eval/")) for p in _PATTERNS)]
