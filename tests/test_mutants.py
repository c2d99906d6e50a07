"""One core, two worlds: each core function is broken, and a short run notices, on a control task and on the token tree.

Both worlds run their real training loops (`gym_baselines.train`, `PPOTrainer`) on problems whose answer is known: the best
policy, its exact values, or how far an update may move the policy. A *scenario* trains and asserts; the working code passes
all of them, and each mutant of tests/broken.py makes the scenario that its row names fail, by an assertion or because the
trainer itself stops. Where a mutant cannot matter in one of the worlds, the row says why.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.core.advantages import gae
from rlhf.core.kl import adaptive_kl_coef, kl_estimate
from rlhf.core.logprobs import token_logprobs
from rlhf.core.losses import clipped_surrogate, clipped_value_loss, unclipped_surrogate
from rlhf.core.masking import whiten
from rlhf.errors import TrainingError
from rlhf.rollout.engine import GenerationConfig
from rlhf.training.update import UpdateConfig
from tests import broken, control_tasks, token_tree, tree
from tests.control_tasks import Bonus, Constant, Nothing, StayOrLeave, Switches

# --- control: what a short run must end in ---


def epochs(number: int, **options: Any) -> UpdateConfig:
    """`number` gradient steps per rollout, each on all of it."""
    return UpdateConfig(num_epochs=number, minibatch_size=180, max_grad_norm=1e9, **options)


control = partial(control_tasks.run, num_envs=6, rollout_steps=30)


def limits(**ppo: Any) -> None:
    """Staying is optimal only if a time limit bootstraps and leaving does not; the values are known."""
    result = control(StayOrLeave, 30, learning_rate=0.3, update=epochs(4), ppo=ppo)
    assert (result.probabilities[:, 0] > 0.95).all()
    torch.testing.assert_close(result.values[-1], StayOrLeave.values, rtol=0, atol=0.3)


def unclipped() -> None:
    limits(surrogate="unclipped")


def leaks() -> None:
    """Five steps that look alike, one of which pays: their common value tells whether the next episode was heard of."""
    result = control(Bonus, 20, learning_rate=0.3, update=epochs(4))
    torch.testing.assert_close(result.values[-1], Bonus.values, rtol=0, atol=0.3)


def one_step() -> None:
    """The same with lambda 0: V = 2 + gamma V = 20, since every step sees only the mean of what follows."""
    result = control(Bonus, 40, learning_rate=0.6, update=epochs(8), ppo={"gae_lambda": 0.0})
    torch.testing.assert_close(result.values[-1], torch.tensor([2 / (1 - control_tasks.GAMMA)]), rtol=0, atol=1.0)


def step_size() -> None:
    """30 gradient steps on one rollout: with the clip, KL(old || new) stays near 0.1; without, it passes 1."""
    result = control(StayOrLeave, 4, learning_rate=0.05, lr_schedule="constant", update=epochs(30))
    assert max(result.kl) < 0.3


def kl_stop() -> None:
    """target_kl 0.01 ends an update at 1.5 times that; one more gradient step may have been made."""
    result = control(StayOrLeave, 6, learning_rate=0.05, update=epochs(30, target_kl=0.01))
    assert max(result.kl) < 0.04


def value_overshoot() -> None:
    """The target is 5 in every sample and a gradient step moves V by up to 1: only the max lets the loss pull V back."""
    settings = {"gamma": 0.0, "value_clip_range": 0.2}
    result = control(Constant, 20, learning_rate=1.0, lr_schedule="constant", update=epochs(8), ppo=settings)
    assert (result.values[-6:] - 5).abs().max() < 0.2


def offset() -> None:
    """Rewards of 1000 and 999 without a critic: after whitening only their difference is left."""
    settings = {"gamma": 0.0, "value_coef": 0.0, "normalize_advantages": "batch"}
    result = control(shifted(Switches, 990.0), 15, learning_rate=0.1, update=epochs(8), ppo=settings)
    right = result.probabilities[torch.arange(8), torch.arange(8) % 2]
    assert (right > 0.97).all()


def shifted(env: type[control_tasks.Table], extra: float) -> type[control_tasks.Table]:
    """`env` with `extra` added to its rewards."""

    class Shifted(env):  # type: ignore[misc, valid-type]
        def move(self, action: int) -> tuple[float, int, bool]:
            reward, state, terminated = super().move(action)
            return reward + extra, state, terminated

    return Shifted


def uniform() -> None:
    """No reward but an entropy bonus: the policy ends uniform."""
    settings = {"entropy_coef": 0.1, "normalize_advantages": "none"}
    result = control(Nothing, 20, learning_rate=0.1, update=epochs(4), ppo=settings)
    torch.testing.assert_close(result.probabilities, torch.full((2, 2), 0.5).double(), rtol=0, atol=0.1)


# --- the token tree ---


def tokens(directory: Path, problem: tree.Problem, lm: Any, *, steps: int, ppo: dict[str, Any], **settings: Any):
    return token_tree.train(
        problem,
        lm,
        directory / "run",
        total_steps=steps,
        ppo=PPOConfig(**{"kl_coef": problem.beta, **ppo}),
        **{"learning_rate": 4e-3, "generation": GenerationConfig(max_new_tokens=tree.MAX_TOKENS), **settings},
    )


def language(shift: float = 0.0, scale: float = 1.0, beta: float = 0.37) -> tuple[tree.Problem, Any]:
    """The standard problem with rewards `scale` R + `shift`, and the model that is also its reference."""
    lm = token_tree.language_model(0)
    problem = token_tree.problem_of(lm, beta=beta)
    return replace(problem, rewards=scale * problem.rewards + shift), lm


def optimum(directory: Path, **ppo: Any) -> None:
    """20 steps come near pi* and V*."""
    result = tokens(directory, *language(), steps=20, ppo=ppo)
    assert result.regret < 0.02 and result.kl_to_optimum < 0.025 and result.value_error < 0.15


def optimum_unclipped(directory: Path) -> None:
    """Small steps, since nothing limits them; halfway is far enough to see the direction."""
    result = tokens(directory, *language(), steps=20, ppo={"surrogate": "unclipped"}, learning_rate=5e-4)
    assert result.regret < 0.5


def optimum_at_half_temperature(directory: Path) -> None:
    """Policy and reference are softmax(logits / 0.5); so is the known optimum's reference."""
    problem, lm = language()
    problem = replace(problem, reference=problem.reference / 0.5)
    generation = GenerationConfig(max_new_tokens=tree.MAX_TOKENS, temperature=0.5)
    result = tokens(directory, problem, lm, steps=25, ppo={}, generation=generation, learning_rate=2e-3)
    assert result.regret < 0.05 and result.kl_to_optimum < 0.05


def token_step_size(directory: Path) -> None:
    """16 gradient steps on each of three rollouts: with the clip, KL(old || new) of sentences stays below 1 nat."""
    result = tokens(directory, *language(), steps=3, ppo={}, learning_rate=1e-2, update=UpdateConfig(num_epochs=16))
    assert max(result.kl) < 1.5


def token_value_overshoot(directory: Path) -> None:
    """Every sentence scores 2: V of the empty prefix must settle there although the learning rate stays high."""
    settings = {"kl_coef": 0.0, "value_coef": 1.0, "normalize_advantages": "none"}
    result = tokens(
        directory,
        *language(shift=2.0, scale=0.0),
        steps=12,
        ppo=settings,
        learning_rate=1e-2,
        lr_schedule="constant",
        update=UpdateConfig(num_epochs=8),
    )
    assert (result.values[-4:, 0] - 2).abs().max() < 0.1


def token_offset(directory: Path) -> None:
    """Scores around 100 without a critic: after whitening only their differences are left."""
    result = tokens(directory, *language(shift=100.0), steps=20, ppo={"value_coef": 0.0, "gae_lambda": 1.0})
    assert result.regret < 0.02


def token_kl_target(directory: Path) -> None:
    """kl_coef starts too low for the target of 0.5 nats per completion: the KL overshoots to 2.7 and must come back."""
    result = tokens(directory, *language(beta=0.1), steps=30, ppo={"kl_target": 0.5, "kl_horizon": 150})
    assert sum(step["reward_kl"] for step in result.history[-5:]) / 5 < 1.2


def token_uniform(directory: Path) -> None:
    """No score but an entropy bonus: after each prefix the three tokens become equally likely."""
    settings = {"kl_coef": 0.0, "entropy_coef": 0.2, "normalize_advantages": "none"}
    result = tokens(directory, *language(scale=0.0), steps=15, ppo=settings)
    assert (result.theta.exp() - 1 / 3).abs().max() < 0.1


CONTROL = [limits, unclipped, leaks, one_step, step_size, kl_stop, value_overshoot, offset, uniform]
TREE = [
    optimum,
    optimum_unclipped,
    optimum_at_half_temperature,
    token_step_size,
    token_value_overshoot,
    token_offset,
    token_kl_target,
    token_uniform,
]

# --- the list ---


def loss_punishes_entropy(self: PPO, outputs: Any, batch: Any) -> Any:
    """PPO.loss with the sign of the entropy bonus flipped."""
    return _loss(self, replace(outputs, entropy=None if outputs.entropy is None else -outputs.entropy), batch)


_loss = PPO.loss

ONE_EPISODE = "a completion is one episode that ends in its last token, so both flags are equal and nothing follows"
NO_REFERENCE = "a control task has no reference policy"
OWN_LOGPROBS = "the control policy takes log-probs from its own log_softmax, at temperature 1"
NO_HOLES = "masked elements here stand only behind an end, where the recursion is cut anyway; tests/core has holes"
FINITE = "masked log-probs are 0 or those of a real action, so that exp never overflows; tests/core has infinities"
EQUAL_BOUNDS = "both bounds of the clip are 0.2"


class Mutant(NamedTuple):
    function: Callable[..., Any]
    variant: Callable[..., Any]
    control: Callable[[], None] | str
    """The scenario that notices, or why none can."""
    tree: Callable[[Path], None] | str


MUTANTS = [
    Mutant(gae, broken.gae_swaps_its_masks, limits, ONE_EPISODE),
    Mutant(gae, broken.gae_takes_truncation_for_termination, limits, ONE_EPISODE),
    Mutant(gae, broken.gae_ignores_episode_ends, leaks, ONE_EPISODE),
    Mutant(gae, broken.gae_cuts_only_at_terminations, leaks, ONE_EPISODE),
    Mutant(
        gae, broken.gae_bootstraps_after_terminations, limits, "the collector writes a next value of 0 behind the end"
    ),
    Mutant(gae, broken.gae_bootstraps_from_the_same_state, limits, optimum),
    Mutant(
        gae, broken.gae_forgets_lambda, one_step, "every prefix is a state of its own: lambda changes only the variance"
    ),
    Mutant(gae, broken.gae_has_the_wrong_sign, limits, optimum),
    Mutant(gae, broken.gae_returns_advantages_as_returns, limits, optimum),
    Mutant(gae, broken.gae_counts_what_is_masked, NO_HOLES, NO_HOLES),
    Mutant(gae, broken.gae_zeroes_holes_instead_of_passing_over_them, "its next values ignore the final one", NO_HOLES),
    Mutant(whiten, broken.whiten_adds_the_mean_back, offset, token_offset),
    Mutant(whiten, broken.whiten_ignores_the_mask, offset, token_offset),
    Mutant(clipped_surrogate, broken.clip_takes_the_larger_side, step_size, token_step_size),
    Mutant(clipped_surrogate, broken.clip_is_missing, step_size, token_step_size),
    Mutant(clipped_surrogate, broken.clip_inverts_the_ratio, limits, optimum),
    Mutant(clipped_surrogate, broken.clip_flips_the_advantage, limits, optimum),
    Mutant(clipped_surrogate, broken.clip_swaps_its_bounds, EQUAL_BOUNDS, EQUAL_BOUNDS),
    Mutant(clipped_surrogate, broken.clip_masks_after_exp, FINITE, FINITE),
    Mutant(unclipped_surrogate, broken.unclipped_has_the_wrong_sign, unclipped, optimum_unclipped),
    Mutant(clipped_value_loss, broken.value_clip_has_no_max, value_overshoot, token_value_overshoot),
    Mutant(clipped_value_loss, broken.value_loss_has_the_wrong_sign, limits, optimum),
    Mutant(clipped_value_loss, broken.value_loss_targets_the_old_values, limits, optimum),
    Mutant(kl_estimate, broken.kl_has_the_wrong_sign, kl_stop, optimum),
    Mutant(kl_estimate, broken.kl_is_zero, kl_stop, optimum),
    Mutant(
        kl_estimate, broken.kl_swaps_its_arguments, "the two KLs of a small step differ in third order only", optimum
    ),
    Mutant(kl_estimate, broken.kl_k3_takes_the_place_of_k1, NO_REFERENCE, optimum),
    Mutant(adaptive_kl_coef, broken.kl_coef_adapts_the_wrong_way, NO_REFERENCE, token_kl_target),
    Mutant(adaptive_kl_coef, broken.kl_coef_never_adapts, NO_REFERENCE, token_kl_target),
    Mutant(token_logprobs, broken.logprobs_are_of_the_next_token, OWN_LOGPROBS, optimum),
    Mutant(token_logprobs, broken.logprobs_ignore_the_temperature, OWN_LOGPROBS, optimum_at_half_temperature),
    Mutant(PPO.loss, loss_punishes_entropy, uniform, token_uniform),
]

QUICK = {
    broken.gae_swaps_its_masks,
    broken.gae_takes_truncation_for_termination,
    broken.gae_ignores_episode_ends,
    broken.clip_takes_the_larger_side,
    broken.value_clip_has_no_max,
}
"""These also run in the quick suite, on control; the whole list takes minutes."""


def put_in_place(patch: pytest.MonkeyPatch, function: Callable[..., Any], variant: Callable[..., Any]) -> None:
    """Replace `function` wherever our packages hold it, also where it was imported by name."""
    if function is PPO.loss or function is _loss:
        patch.setattr(PPO, "loss", variant)
        return
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("rlhf", "gym_baselines") and getattr(module, function.__name__, None) is function:
            patch.setattr(module, function.__name__, variant)


def rows_of(world: str, *, applies: bool) -> list[Any]:
    """pytest parameters: the mutants with a scenario in this world (or those without one)."""
    chosen = [m for m in MUTANTS if callable(getattr(m, world)) == applies]
    return [
        pytest.param(
            m, id=m.variant.__name__, marks=() if world == "control" and m.variant in QUICK else pytest.mark.slow
        )
        for m in chosen
    ]


def quick(scenarios: list[Any], names: set[str]) -> list[Any]:
    return [pytest.param(s, id=s.__name__, marks=() if s.__name__ in names else pytest.mark.slow) for s in scenarios]


FAILURES = (AssertionError, TrainingError)


@pytest.mark.parametrize("scenario", quick(CONTROL, {"limits", "leaks", "step_size", "value_overshoot"}))
def test_the_working_code_passes_on_control(scenario):
    scenario()


@pytest.mark.parametrize("mutant", rows_of("control", applies=True))
def test_a_control_run_notices(mutant, monkeypatch):
    put_in_place(monkeypatch, mutant.function, mutant.variant)
    with pytest.raises(FAILURES):
        mutant.control()


@pytest.mark.parametrize("scenario", quick(TREE, {"token_step_size"}))
def test_the_working_code_passes_on_the_tree(scenario, tmp_path):
    scenario(tmp_path)


@pytest.mark.parametrize("mutant", rows_of("tree", applies=True))
def test_a_token_tree_run_notices(mutant, monkeypatch, tmp_path):
    put_in_place(monkeypatch, mutant.function, mutant.variant)
    with pytest.raises(FAILURES):
        mutant.tree(tmp_path)


def test_every_mutant_is_noticed_somewhere_or_by_the_unit_tests_with_a_reason():
    """No row without a scenario or a reason, and few for which runs cannot tell at all."""
    for mutant in MUTANTS:
        for world in (mutant.control, mutant.tree):
            assert callable(world) or len(world) > 20
    unseen = [m for m in MUTANTS if not callable(m.control) and not callable(m.tree)]
    assert {m.variant for m in unseen} == {
        broken.gae_counts_what_is_masked,
        broken.gae_zeroes_holes_instead_of_passing_over_them,
        broken.clip_swaps_its_bounds,
        broken.clip_masks_after_exp,
    }
    assert {m.function.__name__ for m in MUTANTS} == {
        "gae",
        "whiten",
        "clipped_surrogate",
        "unclipped_surrogate",
        "clipped_value_loss",
        "kl_estimate",
        "adaptive_kl_coef",
        "token_logprobs",
        "loss",
    }
