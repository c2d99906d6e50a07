"""What a run measures: one table of names, sums reduced once per step, and the files they end in.

OUTPUT_DIR/metrics.jsonl    one JSON object per line, sorted keys, no times: two equal runs give equal bytes
          /times.jsonl      the wall-clock seconds of the same steps
"""

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.errors import InputError, TrainingError
from rlhf.types import Metrics

METRICS_FILE, TIMES_FILE = "metrics.jsonl", "times.jsonl"


class Metric(NamedTuple):
    description: str
    unit: str
    worry: str = ""
    """What reading is a warning sign; empty where none is known."""


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
    "reward": ("GRPO's name of `score`", "score", "rises while samples get worse"),
    "reward_std": ("GRPO's name of `score_std`, over all completions of the step", "score", "0: nothing to learn from"),
    "frac_reward_zero_std": (
        "share of groups whose scores are all equal, which teach nothing",
        "share",
        "above 0.5: prompts too easy or too hard; see dynamic_sampling_rounds",
    ),
    "kl": ("the KL term of the loss before kl_coef, averaged as the loss is", "nats per token"),
    "clip_ratio/<bound>": (
        "GRPO's name of clip_fraction_low, clip_fraction_high: low_mean, high_mean",
        "share",
        "above 0.3",
    ),
    "completions/<length>": (
        "tokens: mean_length, min_length, max_length, mean_terminated_length (those that ended), mean_length_right and "
        "mean_length_wrong (first reward above 0, or not); clipped_ratio: share cut by the length limit",
        "tokens",
        "wrong ones grow while right ones do not",
    ),
    "sampling/sampling_logp_difference/max": ("GRPO's name of `sampler_gap`", "nats", "above 1e-4 in float32"),
    "dynamic_sampling/rounds": ("rounds of sampling in this step", "rounds", "always the limit"),
    "dynamic_sampling/prompts": ("prompts sampled in this step", "prompts"),
    "sampler_gap": ("largest |sampling - training log-prob| of the step's tokens", "nats", "above 1e-4 in float32"),
    "episode_return": ("mean undiscounted return of the last 100 finished episodes", "reward"),
    "episode_return_std": ("standard deviation of the evaluation's episode returns", "reward"),
    "action_std": ("mean standard deviation of the Gaussian policy", "action units", "grows, or falls to 0 early"),
    "episode_length": ("mean length of the last 100 finished episodes", "steps"),
}
TABLE = {name: Metric(*row) for name, row in _ROWS.items()}
"""Every metric that a run may log, defined once. `<...>` in a name stands for any text without a slash."""
_PATTERNS = [re.compile(re.sub("<[a-z]+>", "[^/]+", name)) for name in TABLE]


def unknown_names(names: Iterable[str]) -> list[str]:
    """The names that `TABLE` does not define."""
    return [name for name in names if not any(p.fullmatch(name.removeprefix("eval/")) for p in _PATTERNS)]


class MetricSums:
    """Adds up (sum, count) pairs on the device, without synchronising, and divides after one collective."""

    def __init__(self) -> None:
        self._added: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def add(self, metrics: Metrics) -> None:
        """metrics: name -> (sum, count), scalars. They are added up in `reduce`: here a microbatch costs no operation."""
        for name, (total, count) in metrics.items():
            totals, counts = self._added.setdefault(name, ([], []))
            totals.append(total.detach())
            counts.append(count.detach())

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """name -> sum / count over all processes; a name whose global count is 0 is left out (it has no mean).

        Exactly one `all_sum` (none if nothing was added). Every process must have added the same names.
        """
        names = sorted(self._added)
        if not names:
            return {}
        fingerprint = float(zlib.crc32("\n".join(names).encode()) >> 12)  # 20 bits: its sums are exact
        sums = [_wide(torch.stack(values)).sum() for name in names for values in self._added[name]]
        head = sums[0].new_tensor([1.0, fingerprint])
        processes, fingerprints, *flat = all_sum(torch.cat([head, torch.stack(sums)])).tolist()
        assert fingerprints == fingerprint * processes, f"processes reduce different metrics; this one has {names}"
        pairs = zip(names, flat[::2], flat[1::2], strict=True)
        return {name: total / count for name, total, count in pairs if count != 0}


def _wide(values: Tensor) -> Tensor:
    """In float64, so that microbatch sizes hardly show; MPS has none."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


class JsonLines:
    """A file of JSON objects, one per line and each with its "step", that a resumed run continues to the byte."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab")  # noqa: SIM115

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Sorted keys, all digits; on the disk's cache when it returns."""
        try:
            self._file.write(
                json.dumps({**record, "step": step}, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n"
            )
            self._file.flush()
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written at step {step}: {error}") from error

    def sync(self) -> None:
        """Put what was written on the disk: call it before the checkpoint of the step is written."""
        os.fsync(self._file.fileno())

    def truncate_to(self, step: int) -> None:
        """Cut every line later than `step` (-1: all), so that a resumed run writes them again, byte for byte.

        A torn last line (killed while writing) is cut too. Raises InputError, touching nothing, if a line that must
        stay cannot be read.
        """
        self._file.truncate(_end_of_step(self.path, step))
        self.sync()

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """Appends to metrics.jsonl and times.jsonl of one run. One process of a run makes one."""

    def __init__(self, directory: str | Path) -> None:
        self._metrics = JsonLines(Path(directory) / METRICS_FILE)
        self._times = JsonLines(Path(directory) / TIMES_FILE)

    def write(self, step: int, metrics: Mapping[str, float], times: Mapping[str, float] | None = None) -> None:
        """One line per file. A NaN or infinity becomes null, since JSON has none."""
        self._metrics.write(step, {name: _number(value) for name, value in metrics.items()})
        if times is not None:
            self._times.write(step, {name: _number(value) for name, value in times.items()})

    def sync(self) -> None:
        self._metrics.sync()
        self._times.sync()

    def truncate_to(self, step: int) -> None:
        """See JsonLines; nothing is touched if either file cannot be cut there."""
        for file in (self._metrics, self._times):
            _end_of_step(file.path, step)
        self._metrics.truncate_to(step)
        self._times.truncate_to(step)

    def close(self) -> None:
        self._metrics.close()
        self._times.close()


def _number(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    value = float(value)  # also numpy scalars and 0-d tensors
    return value if math.isfinite(value) else None


def _step_of(line: bytes) -> int | None:
    """The step of a whole, readable line; None otherwise."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _end_of_step(path: Path, last_step: int) -> int:
    """Bytes of the leading lines whose step is at most `last_step`."""
    steps_and_sizes = [(_step_of(line), len(line)) for line in path.read_bytes().splitlines(keepends=True)]
    end, count = 0, 0
    for step, size in steps_and_sizes:
        if step is None or step > last_step:
            break
        end, count = end + size, count + 1
    if any(step is not None and step <= last_step for step, _ in steps_and_sizes[count:]):
        raise InputError(
            f"{path}: line {count + 1} is damaged or out of order, and later lines of steps up to {last_step} would be "
            "lost. Repair or delete that line, then resume."
        )
    return end


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file (or of the run directory that holds one); a torn last line is left out."""
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a run's output directory or its {METRICS_FILE}.")
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if _step_of(line) is None and number < len(lines):
            raise InputError(f"{path}: line {number} is not a metrics line: {line[:60]!r}. Repair or delete it.")
    return [json.loads(line) for line in lines if _step_of(line) is not None]


def plot_curves(path: str | Path, png: str | Path, names: Sequence[str]) -> None:
    """Draw the metrics `names` of a run over its steps, one panel each, into the file `png`."""
    lines = read_metrics(path)
    missing = [name for name in names if all(line.get(name) is None for line in lines)]
    if missing or not names:
        known = sorted({key for line in lines for key in line} - {"step"})
        raise InputError(f"{path} has no values of {missing or 'an empty list of names'}; it has {known}.")
    try:
        from matplotlib.figure import Figure  # not pyplot: no display and no global state needed
    except ImportError as error:
        raise InputError("Curves need matplotlib: pip install rlhf-toolkit[plots]") from error
    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for name, panel in zip(names, panels, strict=False):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        panel.plot(*zip(*points, strict=True), linewidth=1.4, marker="o" if len(points) < 30 else None, markersize=3)
        unit = TABLE[name].unit if name in TABLE else ""
        panel.set(title=name, xlabel="step", ylabel=unit if unit not in ("", "1") else "value")
        panel.grid(alpha=0.3)
    for panel in list(figure.axes)[len(names) :]:
        panel.set_visible(False)
    figure.savefig(str(png), dpi=120)
