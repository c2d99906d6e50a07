"""Compares our GRPO's loss and gradients with those of TRL's GRPOTrainer, on the same batch, weights and settings.

Takes a minute: pip install -e '.[trl]'; python benchmarks/trl_parity.py

Both sides run their whole optimizer step. TRL: a real GRPOTrainer, which gets fixed completions through its argument
`rollout_func`, runs `training_step` twice per batch: once with the sampler's weights, from which TRL takes its old
log-probs, and once after the weights were changed, as by an optimizer step, so that the ratios differ from 1. Ours:
`Scorer`, `GRPO.prepare` and `update`, with an optimizer that stores gradients instead of applying them. Exit status 1
if a pair that should agree does not.

In float32 TRL runs unmodified. Two of its parts use float32 for any model: advantages, so float64 runs use TRL's on
both sides (float32 runs use each side's own; advantages are also compared by themselves); and the fused LM head, so
float64 runs replace `_get_per_token_logps_and_entropies` by a plain log-softmax with positions that do not count
padding.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from trl_sides import EOS, LONGEST, TRL, VERSION, Batch, Case, Result, Weights, ours

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
ADVANTAGE_TOLERANCE = 1e-6  # absolute; advantages are of order 1, in float32

GSPO = {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03}
OUR_GSPO = {"ratio": "sequence_mean", "clip_range": 0.02, "clip_range_high": 0.03}
"""A narrower clip range, since the ratio of a whole completion stays nearer to 1 than that of a token."""
FORMS = [
    Case("grpo", {"loss_type": "grpo"}, {"aggregation": "sequence_mean"}),
    Case("dapo (token mean)", {"loss_type": "dapo"}, {"aggregation": "token_mean"}),
    Case("dr_grpo", {"loss_type": "dr_grpo"}, {"aggregation": "constant_length", "constant_length": LONGEST}),
    Case("gspo", GSPO | {"loss_type": "grpo"}, OUR_GSPO),
    Case(
        "cispo, cap 1.28",
        {"loss_type": "cispo", "epsilon_high": 1.28},
        {"surrogate": "clipped_weight", "clip_range": 1.0, "clip_range_high": 0.28, "aggregation": "token_mean"},
    ),
]
KL = [
    ("", {}, {}),
    (" + k3", {"beta": 0.04, "use_bias_correction_kl": False}, {"kl_coef": 0.04, "kl_estimator": "k3"}),
    (
        " + weighted k3",
        {"beta": 0.04, "use_bias_correction_kl": True},
        {"kl_coef": 0.04, "kl_estimator": "weighted_k3"},
    ),
]
MORE = [
    Case("scale_rewards batch", {"loss_type": "grpo", "scale_rewards": "batch"}, {"scale": "batch_std"}),
    Case("scale_rewards none", {"loss_type": "grpo", "scale_rewards": "none"}, {"scale": "none"}),
    Case(
        "gspo, clip 0.2 and 0.28",
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"ratio": "sequence_mean"},
    ),
    Case("luspo", GSPO | {"loss_type": "luspo"}, OUR_GSPO | {"aggregation": "constant_length", "constant_length": 1}),
    Case("bnpo, one microbatch", {"loss_type": "bnpo"}, {"aggregation": "token_mean"}, accumulation=(1, 1)),
    Case("delta = dual_clip 1.4", {"loss_type": "grpo", "delta": 1.4}, {"dual_clip": 1.4}),
    Case(
        "entropy_coef, dapo, one microbatch",
        {"loss_type": "dapo", "entropy_coef": 0.1},
        {"aggregation": "token_mean", "entropy_coef": 0.1},
        accumulation=(1, 1),
    ),
    Case("mask_truncated, grpo", {"loss_type": "grpo", "mask_truncated_completions": True}, {"mask_truncated": True}),
    Case(
        "mask_truncated, dr_grpo",
        {"loss_type": "dr_grpo", "mask_truncated_completions": True},
        {"aggregation": "constant_length", "constant_length": LONGEST, "mask_truncated": True},
    ),
]


# --- the comparison ---


def gradient_gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of a parameter's gradient, relative to the norm of that gradient.

    The norm is taken as at least a thousandth of the whole gradient's, for parameters such as a bias that cancels in
    the softmax.
    """
    assert one.keys() == other.keys()
    floor = 1e-3 * torch.stack([g.norm() for g in one.values()]).norm()
    return max(float((one[name] - other[name]).norm() / one[name].norm().clamp(min=floor)) for name in one)


def both(case: Case, family: str, dtype: torch.dtype, temperature: float, *, even: bool) -> tuple[Result, Result]:
    """The results of TRL and of this toolkit.

    Args:
        case: The settings of both sides.
        family: Architecture of the model, "llama" or "gpt2".
        dtype: Type of the weights. In float64 both sides use TRL's advantages.
        temperature: Sampling temperature.
        even: Give all prompts the same length.
    """
    batch = Batch.draw(even_prompts=even)
    weights = Weights(family, dtype)
    with tempfile.TemporaryDirectory() as folder:
        theirs = TRL(case, batch, weights, temperature, folder).step()
    given = theirs.advantages if dtype == torch.float64 else None
    return theirs, ours(case, batch, weights, temperature, theirs.window, given)


def compare(case: Case, family: str, dtype: torch.dtype, temperature: float) -> bool:
    theirs, mine = both(case, family, dtype, temperature, even=family == "gpt2" and dtype == torch.float32)
    loss = abs(mine.loss - theirs.loss) / max(abs(theirs.loss), 0.1)  # at least 0.1, as a loss may nearly cancel
    gradient = gradient_gap(theirs.gradients, mine.gradients)
    advantage = float((mine.advantages - theirs.advantages).abs().max())
    kind = f"{family:<7}{str(dtype)[6:]:<9}{temperature:<5}"
    low_high = f"{mine.clipped[0]:>4.0%} {mine.clipped[1]:>4.0%}"
    equal = loss <= TOLERANCE[dtype] and gradient <= TOLERANCE[dtype] and advantage <= ADVANTAGE_TOLERANCE
    print(
        f"{case.name:<36}{kind}{theirs.loss:>10.6f}  {loss:>8.1e}  {gradient:>8.1e}  {advantage:>8.1e}  {low_high}  "
        f"{'equal' if equal else 'DIFFERENT'}",
        flush=True,
    )
    return equal


# --- where they differ, and by how much ---


def _window_share(batch: Batch, window: list[int]) -> float:
    """TRL divides by the mean token count of a generation batch's microbatches, not by the count of this window."""
    all_tokens = torch.tensor(float(sum(map(len, batch.completions))))  # TRL computes it in float32
    return sum(len(batch.completions[row]) for row in window) / float(all_tokens * 1 / 3)


def _kept_share(batch: Batch, window: list[int]) -> float:
    """TRL also excludes truncated completions from the token count."""
    return sum(map(len, batch.completions)) / sum(len(ids) for ids in batch.completions if ids[-1] == EOS)


def _cap(batch: Batch, window: list[int]) -> float:
    """If unset, TRL's cap is `epsilon` = 0.2, below nearly every ratio: a fifth of a policy gradient without ratio."""
    return 0.2


CISPO = {"loss_type": "cispo", "epsilon_high": None}
DIFFERENCES: list[tuple[Case, Callable[[Batch, list[int]], float]]] = [
    (replace(FORMS[1], name="dapo, step = 1/3 of the generation", accumulation=(1, 3)), _window_share),
    (
        Case(
            "mask_truncated, dapo",
            {"loss_type": "dapo", "mask_truncated_completions": True},
            {"aggregation": "token_mean", "mask_truncated": True},
        ),
        _kept_share,
    ),
    (Case("cispo, cap left at its default", CISPO, {"surrogate": "score", "aggregation": "token_mean"}), _cap),
]


def differ(case: Case, predicted: Callable[[Batch, list[int]], float]) -> bool:
    """Whether TRL's gradient is `predicted` times ours; our loss is the mean over all tokens of the optimizer step."""
    theirs, mine = both(case, "gpt2", torch.float64, 1.0, even=False)  # Llama's norms round to float32
    factor = predicted(Batch.draw(even_prompts=False), theirs.window)
    gap = gradient_gap(theirs.gradients, {name: factor * g for name, g in mine.gradients.items()})
    explained = gap <= TOLERANCE[torch.float64]
    verdict = "explained" if explained else "UNEXPLAINED"
    print(f"{case.name:<36}TRL / ours = {factor:.4f}, gradients then agree to {gap:.1e}  {verdict}")
    return explained


def absolute_positions() -> None:
    """Print the gap for GPT-2: its positions count TRL's left padding, so log-probs depend on the other prompts."""
    theirs, mine = both(FORMS[0], "gpt2", torch.float32, 1.0, even=False)
    gap = gradient_gap(theirs.gradients, mine.gradients)
    print(f"{'gpt2, prompts of uneven length':<36}TRL counts the padding as positions: gradients differ by {gap:.0%}")


def main() -> None:
    torch.set_num_threads(1)
    print(f"TRL {VERSION}, torch {torch.__version__}; differences: of the loss, of the worst parameter's gradient")
    columns = f"{'temp':<5}{'loss':>10}  {'loss':>8}  {'gradient':>8}  {'advant.':>8}  clipped"
    print(f"{'case':<36}{'model':<7}{'dtype':<9}{columns}")
    verdicts = []
    for form in FORMS:
        for name, theirs, mine in KL:
            case = replace(form, name=form.name + name, trl=form.trl | theirs, ours=form.ours | mine)
            for family in ("llama", "gpt2"):
                for dtype in (torch.float32, torch.float64):
                    verdicts += [compare(case, family, dtype, temperature) for temperature in (1.0, 0.7)]
    for case in MORE:
        verdicts += [compare(case, "llama", dtype, 0.7) for dtype in (torch.float32, torch.float64)]
    print(f"{sum(verdicts)} of {len(verdicts)} cases equal.\n\nDocumented differences")
    explained = [differ(case, predicted) for case, predicted in DIFFERENCES]
    absolute_positions()
    sys.exit(0 if all(verdicts) and all(explained) else 1)


if __name__ == "__main__":
    main()
