"""Small decision processes with known answers: values, expected GAE, the policy gradient and what it does to entropy.

Expectations are finite sums over all episodes, so nothing here is sampled. Notation: P[s, a, s'] are transition
probabilities (what is missing to 1 ends the episode), r[s, a, s'] rewards, and r_end[s, a] the reward of an end.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.core.advantages import gae
from rlhf.core.distributions import Categorical
from rlhf.core.logprobs import entropy
from rlhf.core.losses import clipped_surrogate, score_surrogate, unclipped_surrogate
from rlhf.core.masking import local_sum, weighted_sum
from rlhf.training.update import UpdateConfig
from rlhf.types import PolicyOutputs, Trajectories, Weighting
from tests import broken
from tests.controls import names, refute
from tests.updates import update

GAMMA = 0.9
EXACT = {"rtol": 0, "atol": 1e-10}
F64 = torch.float64


@dataclass(frozen=True)
class MDP:
    """A decision process with the softmax policy of `logits`; every tensor is float64."""

    P: Tensor
    r: Tensor
    r_end: Tensor
    start: Tensor
    logits: Tensor

    @property
    def pi(self) -> Tensor:
        return self.logits.softmax(-1)

    @property
    def ends(self) -> Tensor:
        """(states, actions): the probability that the step ends the episode."""
        return 1 - self.P.sum(-1)

    def mean_reward(self) -> Tensor:
        return (self.P * self.r).sum(-1) + self.ends * self.r_end

    def on_policy(self) -> Tensor:
        """P_pi, (states, states)."""
        return torch.einsum("sa,sat->st", self.pi, self.P)

    def values(self, gamma: float = GAMMA) -> Tensor:
        """V = (I - gamma P_pi)^-1 r_pi, differentiable in the logits."""
        identity = torch.eye(len(self.P), dtype=F64)
        return torch.linalg.solve(identity - gamma * self.on_policy(), (self.pi * self.mean_reward()).sum(-1))

    def action_values(self, values: Tensor, gamma: float = GAMMA) -> Tensor:
        """r + gamma P V, (states, actions): Q, if these are the policy's values."""
        return self.mean_reward() + gamma * self.P @ values

    def advantages(self, gamma: float = GAMMA) -> Tensor:
        values = self.values(gamma)
        return self.action_values(values, gamma) - values.unsqueeze(1)

    def visits(self, gamma: float = GAMMA) -> Tensor:
        """d_gamma = (I - gamma P_pi)^-T start: the discounted number of visits to each state."""
        identity = torch.eye(len(self.P), dtype=F64)
        return torch.linalg.solve((identity - gamma * self.on_policy()).T, self.start)


def recurrent(seed: int, states: int = 5, actions: int = 3) -> MDP:
    """Every state follows every other; one step in twenty or so ends the episode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    P = normal(states, actions, states + 1).add(torch.tensor([1.0] * states + [-1.0])).softmax(-1)
    return MDP(
        P[..., :-1],
        normal(states, actions, states),
        normal(states, actions),
        normal(states).softmax(-1),
        normal(states, actions),
    )


def layered(seed: int, layers: int = 3, width: int = 2, actions: int = 2) -> MDP:
    """States in layers; a step leads to the next layer or ends the episode, and behind the last layer it always ends.

    So there are finitely many episodes, of 1 to `layers` steps.
    """
    whole = recurrent(seed, layers * width, actions)
    layer = torch.arange(layers * width) // width
    follows = layer.unsqueeze(0) == layer.unsqueeze(1) + 1
    P = whole.P * follows.unsqueeze(1)
    total = P.sum(-1, keepdim=True)
    goes_on = torch.linspace(0.6, 0.9, len(layer) * actions, dtype=F64).view(len(layer), actions, 1)
    P = torch.where(total > 0, goes_on * P / total.clamp(min=1e-9), 0.0)
    return replace(whole, P=P, start=(layer == 0).to(F64) / width)


@dataclass(frozen=True)
class Episodes:
    """Every possible course of a few steps from every start, one per row; `weight` is its probability."""

    states: Tensor
    actions: Tensor
    next_states: Tensor
    rewards: Tensor
    terminated: Tensor
    mask: Tensor
    weight: Tensor


def enumerate_episodes(mdp: MDP, start: Tensor, steps: int) -> Episodes:
    """All courses of at most `steps` steps; a row's steps after its termination are masked and hold NaN rewards.

    start: (states, actions) probabilities of the first pair.
    """
    found: list[tuple[float, list[tuple[int, int, int, float, bool]]]] = []
    pi, ends = mdp.pi.detach(), mdp.ends

    def follow(state: int, action: int, weight: float, before: list[tuple[int, int, int, float, bool]]) -> None:
        if ends[state, action] > 1e-12:
            last = (state, action, 0, float(mdp.r_end[state, action]), True)
            found.append((weight * float(ends[state, action]), [*before, last]))
        for after in mdp.P[state, action].nonzero().flatten().tolist():
            step = (state, action, after, float(mdp.r[state, action, after]), False)
            probability = weight * float(mdp.P[state, action, after])
            if len(before) + 1 == steps:
                found.append((probability, [*before, step]))
                continue
            for then in range(pi.shape[1]):
                follow(after, then, probability * float(pi[after, then]), [*before, step])

    for state, action in start.nonzero().tolist():
        follow(state, action, float(start[state, action]), [])
    width = max(len(course) for _, course in found)
    blank = (0, 0, 0, float("nan"), False)
    table = [[*course, *[blank] * (width - len(course))] for _, course in found]
    states, actions, next_states, rewards, terminated = (
        torch.tensor([[step[i] for step in row] for row in table], dtype=dtype)
        for i, dtype in enumerate((torch.int64, torch.int64, torch.int64, F64, torch.bool))
    )
    mask = torch.tensor([[t < len(course) for t in range(width)] for _, course in found])
    weight = torch.tensor([weight for weight, _ in found], dtype=F64)
    return Episodes(states, actions, next_states, rewards, terminated, mask, weight)


def expected_gae(gae, mdp: MDP, critic: Tensor, gae_lambda: float, *, steps: int, cut_ends_it: bool) -> Tensor:
    """E[A of the first step | its state and action], (states, actions), by `gae` on every course of `steps` steps.

    cut_ends_it: the cut after `steps` steps is a time limit, else a rollout's end; GAE must not care in the last column.
    """
    every_pair = torch.ones_like(mdp.logits)
    played = enumerate_episodes(mdp, every_pair, steps)
    ends = played.terminated.clone()
    if cut_ends_it:
        ends[:, -1] |= played.mask[:, -1]
    advantages, _ = gae(
        played.rewards,
        critic[played.states],
        torch.where(played.terminated, float("nan"), critic[played.next_states]),  # nothing follows: never to be read
        played.terminated,
        ends,
        played.mask,
        gamma=GAMMA,
        gae_lambda=gae_lambda,
    )
    total = torch.zeros_like(mdp.logits)
    return total.index_put((played.states[:, 0], played.actions[:, 0]), played.weight * advantages[:, 0], True)


def gae_in_closed_form(mdp: MDP, critic: Tensor, gae_lambda: float) -> Tensor:
    """delta + gamma lambda P (I - gamma lambda P_pi)^-1 dbar, dbar = E_pi[delta]: (states, actions)."""
    delta = mdp.action_values(critic) - critic.unsqueeze(1)
    mean = (mdp.pi * delta).sum(-1)
    decay = GAMMA * gae_lambda
    later = torch.linalg.solve(torch.eye(len(mean), dtype=F64) - decay * mdp.on_policy(), mean)
    return delta + decay * mdp.P @ later


def wrong_critic(mdp: MDP) -> Tensor:
    return torch.randn(len(mdp.P), generator=torch.Generator().manual_seed(99), dtype=F64)


# --- values and advantages ---


@pytest.mark.parametrize("seed", range(3))
def test_the_solved_values_satisfy_bellmans_equation_and_advantages_average_to_zero(seed):
    mdp = recurrent(seed)
    values = mdp.values()
    torch.testing.assert_close((mdp.pi * mdp.action_values(values)).sum(-1), values, **EXACT)
    torch.testing.assert_close((mdp.pi * mdp.advantages()).sum(-1), torch.zeros_like(values), **EXACT)
    assert mdp.advantages().abs().max() > 0.1


def check_whole_episodes(gae) -> None:
    for seed in range(2):
        mdp = layered(seed)
        for gae_lambda in (0.0, 0.5, 0.95, 1.0):
            for critic in (wrong_critic(mdp), mdp.values()):
                found = expected_gae(gae, mdp, critic, gae_lambda, steps=3, cut_ends_it=False)
                torch.testing.assert_close(found, gae_in_closed_form(mdp, critic, gae_lambda), **EXACT)


def test_over_all_episodes_gae_with_a_wrong_critic_averages_to_the_closed_form():
    check_whole_episodes(gae)


def test_with_lambda_1_a_wrong_critic_is_only_a_baseline():
    mdp = layered(3)
    critic = wrong_critic(mdp)
    found = expected_gae(gae, mdp, critic, 1.0, steps=3, cut_ends_it=False)
    torch.testing.assert_close(found, mdp.action_values(mdp.values()) - critic.unsqueeze(1), **EXACT)


def check_cut_courses(gae) -> None:
    """With the exact critic, E[A] is the advantage for every lambda, however early a time limit or the rollout cuts."""
    for mdp, steps in ((recurrent(5, states=2, actions=2), 3), (layered(2), 2), (layered(2), 1)):
        for cut_ends_it in (True, False):
            for gae_lambda in (0.0, 0.7, 1.0):
                found = expected_gae(gae, mdp, mdp.values(), gae_lambda, steps=steps, cut_ends_it=cut_ends_it)
                torch.testing.assert_close(found, mdp.advantages(), **EXACT)


def test_with_the_exact_critic_gae_averages_to_the_advantage_for_every_lambda_and_every_cut():
    check_cut_courses(gae)


def test_cut_after_a_few_steps_gae_is_the_power_series_as_far_as_it_was_played():
    mdp = recurrent(7, states=2, actions=2)
    critic, decay, steps = wrong_critic(mdp), GAMMA * 0.8, 4
    delta = mdp.action_values(critic) - critic.unsqueeze(1)
    mean, later = (mdp.pi * delta).sum(-1), torch.zeros(2, dtype=F64)
    for power in range(steps - 1):
        later = later + torch.matrix_power(decay * mdp.on_policy(), power) @ mean
    found = expected_gae(gae, mdp, critic, 0.8, steps=steps, cut_ends_it=False)
    torch.testing.assert_close(found, delta + decay * mdp.P @ later, **EXACT)


EPISODE_VARIANTS = [
    broken.gae_bootstraps_after_terminations,
    broken.gae_bootstraps_from_the_same_state,
    broken.gae_counts_what_is_masked,
    broken.gae_forgets_lambda,
    broken.gae_has_the_wrong_sign,
]


@pytest.mark.parametrize("variant", EPISODE_VARIANTS, ids=names(EPISODE_VARIANTS))
def test_the_check_of_whole_episodes_notices(variant):
    refute(check_whole_episodes, variant)


CUT_VARIANTS = [
    broken.gae_takes_truncation_for_termination,
    broken.gae_swaps_its_masks,
    broken.gae_bootstraps_after_terminations,
    broken.gae_bootstraps_from_the_same_state,
]


@pytest.mark.parametrize("variant", CUT_VARIANTS, ids=names(CUT_VARIANTS))
def test_the_check_of_cut_courses_notices(variant):
    refute(check_cut_courses, variant)


def test_with_the_exact_critic_a_forgotten_lambda_cannot_be_noticed():
    """Why the closed form is checked with a wrong one."""
    check_cut_courses(broken.gae_forgets_lambda)


# --- the policy gradient theorem ---


def gradient_of_the_start_value(mdp: MDP, gamma: float = GAMMA) -> Tensor:
    """Autograd through the linear solve: d (start . V) / d logits."""
    logits = mdp.logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mdp.start @ replace(mdp, logits=logits).values(gamma), logits)
    return gradient


def gradient_of_loss(mdp: MDP, surrogate, weight: Tensor, advantages: Tensor) -> Tensor:
    """- d loss / d logits of one element per (state, action), weighted."""
    logits = mdp.logits.clone().requires_grad_()
    loss = surrogate(logits.log_softmax(-1), mdp.logits.log_softmax(-1), advantages, torch.ones_like(weight).bool())
    (gradient,) = torch.autograd.grad(weighted_sum(loss, weight, 1.0), logits)
    return -gradient


def score(logprobs, old_logprobs, advantages, mask):
    return score_surrogate(logprobs, advantages, mask)


def clipped(*args):
    return clipped_surrogate(*args, clip_low=0.2, clip_high=0.2)


def check_policy_gradient(surrogate) -> None:
    for seed in range(3):
        mdp = recurrent(seed)
        weight = mdp.visits().unsqueeze(1) * mdp.pi
        found = gradient_of_loss(mdp, surrogate, weight, mdp.advantages())
        torch.testing.assert_close(found, gradient_of_the_start_value(mdp), **EXACT)


@pytest.mark.parametrize("surrogate", [score, unclipped_surrogate, clipped])
def test_weighted_by_discounted_visits_every_surrogate_has_the_gradient_of_the_start_value(surrogate):
    check_policy_gradient(surrogate)


def test_the_theorem_in_closed_form():
    mdp = recurrent(0)
    wanted = mdp.visits().unsqueeze(1) * mdp.pi * mdp.advantages()
    torch.testing.assert_close(gradient_of_the_start_value(mdp), wanted, **EXACT)


def test_a_baseline_of_the_state_changes_no_gradient_and_one_of_the_action_does():
    mdp = recurrent(1)
    weight = mdp.visits().unsqueeze(1) * mdp.pi
    wanted = gradient_of_the_start_value(mdp)
    action_values = mdp.action_values(mdp.values())
    baseline = wrong_critic(mdp).unsqueeze(1)
    torch.testing.assert_close(gradient_of_loss(mdp, score, weight, action_values - baseline), wanted, **EXACT)
    of_the_action = torch.arange(3, dtype=F64)
    found = gradient_of_loss(mdp, score, weight, action_values - of_the_action)
    assert (found - wanted).abs().max() > 0.1


def test_without_the_discount_of_late_states_it_is_another_gradient():
    """What practice does; ours leaves the choice of the weights to who makes the batch."""
    mdp, gamma = layered(2), 0.5
    weight = mdp.visits(1.0).unsqueeze(1) * mdp.pi
    found = gradient_of_loss(mdp, score, weight, mdp.advantages(gamma))
    wanted = gradient_of_the_start_value(mdp, gamma)
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), 0) < 0.99


def score_has_the_wrong_sign(logprobs, old_logprobs, advantages, mask):
    return -score_surrogate(logprobs, advantages, mask)


def score_weighs_by_the_ratio_again(logprobs, old_logprobs, advantages, mask):
    """(log pi) exp(log pi - log old): the product rule adds a term."""
    return score_surrogate(logprobs * (logprobs - old_logprobs).exp(), advantages, mask)


def score_is_of_the_probability(logprobs, old_logprobs, advantages, mask):
    return score_surrogate(logprobs.exp(), advantages, mask)


VARIANTS = [score_has_the_wrong_sign, score_weighs_by_the_ratio_again, score_is_of_the_probability]


@pytest.mark.parametrize("variant", VARIANTS, ids=names(VARIANTS))
def test_the_check_of_the_policy_gradient_notices(variant):
    refute(check_policy_gradient, variant)


# --- the same through an algorithm: every episode once, weighted by its probability ---


class Tabular(nn.Module):
    """A softmax policy with one row of logits per state; its values are `critic`, fixed."""

    def __init__(self, logits: Tensor, critic: Tensor | None = None) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.critic = torch.zeros(len(logits), dtype=F64) if critic is None else critic

    def forward(self, inputs, actions, with_values=True, with_entropy=False, old_distribution=None) -> PolicyOutputs:
        family, params = Categorical(self.logits.shape[-1]), self.logits[inputs["observations"]]
        return PolicyOutputs(
            logprobs=family.logprobs(params, actions),
            values=self.critic[inputs["observations"]] if with_values else None,
            entropy=family.entropy(params) if with_entropy else None,
            distribution=params,
            kl=None if old_distribution is None else family.kl(old_distribution, params),
        )


def all_episodes(mdp: MDP, critic: Tensor | None = None) -> tuple[Trajectories, Episodes]:
    played = enumerate_episodes(mdp, mdp.start.unsqueeze(1) * mdp.pi, steps=100)
    assert float(played.weight.sum()) == pytest.approx(1, abs=1e-12)
    logprobs = mdp.logits.log_softmax(-1)[played.states, played.actions]
    critic = torch.zeros(len(mdp.P), dtype=F64) if critic is None else critic
    trajectories = Trajectories(
        inputs={"observations": played.states},
        actions=played.actions,
        mask=played.mask,
        rewards=played.rewards,
        sampling_logprobs=logprobs,
        old_logprobs=logprobs,
        values=critic[played.states],
        next_values=critic[played.next_states],
        terminated=played.terminated,
        episode_ends=played.terminated,
        row_tokens=played.mask.sum(1),
        row_index=torch.arange(len(played.weight)),
    )
    return trajectories, played


def reinforce_gradient(mdp: MDP, config: PPOConfig, *, discount_late_steps: bool, critic: Tensor | None = None):
    """- d loss / d logits of the algorithm on all episodes at once."""
    trajectories, played = all_episodes(mdp, critic)
    algorithm = PPO(config)
    batch = algorithm.prepare(trajectories, 0.0, algorithm.initial_state(), local_sum)
    steps = torch.arange(played.mask.shape[1], dtype=F64)
    weight = played.weight.unsqueeze(1) * (config.gamma**steps if discount_late_steps else 1.0) * played.mask
    weighting = Weighting(weight, weight.sum(-1))
    policy = Tabular(mdp.logits, critic)
    batch = replace(
        batch,
        weightings=dict.fromkeys(batch.weightings, weighting),
        denominators=dict.fromkeys(batch.weightings, torch.ones((), dtype=F64)),
    )
    outputs = policy(batch.inputs, batch.actions, with_values="values" in algorithm.needs)
    loss = algorithm.loss(outputs, batch).total
    loss.backward()
    return -policy.logits.grad


SCORE = {"surrogate": "score", "gae_lambda": 1.0, "normalize_advantages": "none", "kl_coef": 0.0}


def check_reinforce(**changes) -> None:
    mdp = layered(4)
    config = PPOConfig(**{**SCORE, "gamma": GAMMA, "baseline": "none", **changes})
    found = reinforce_gradient(mdp, config, discount_late_steps=True)
    torch.testing.assert_close(found, gradient_of_the_start_value(mdp), **EXACT)


@pytest.mark.parametrize("surrogate", ["score", "unclipped", "clipped"])
def test_over_all_episodes_reinforce_has_the_gradient_of_the_start_value(surrogate):
    check_reinforce(surrogate=surrogate)


def test_the_check_of_reinforce_notices_a_biased_estimator():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.algorithms.ppo.gae", broken.gae_has_the_wrong_sign)
        refute(lambda _: check_reinforce(), None)
    # without a baseline, one-step "advantages" would be bare rewards:
    refute(lambda _: check_reinforce(baseline="value", gae_lambda=0.0), None)


def test_a_learnt_baseline_leaves_the_gradient_alone_whatever_its_values():
    mdp = layered(4)
    config = PPOConfig(**SCORE, gamma=GAMMA, baseline="value", value_coef=0.0)
    found = reinforce_gradient(mdp, config, discount_late_steps=True, critic=wrong_critic(mdp))
    torch.testing.assert_close(found, gradient_of_the_start_value(mdp), **EXACT)


def test_without_a_discount_plain_token_weights_give_the_gradient():
    mdp = layered(4)
    config = PPOConfig(**SCORE, gamma=1.0, baseline="none")
    found = reinforce_gradient(mdp, config, discount_late_steps=False)
    torch.testing.assert_close(found, gradient_of_the_start_value(mdp, 1.0), **EXACT)


# --- what a step does to the entropy (one state; every action once) ---

LOGITS = torch.tensor([[1.0, 0.2, -0.5, -1.3]], dtype=F64)
ADVANTAGES = torch.tensor([1.5, -0.4, 0.3, -1.4], dtype=F64)  # sums to 0


def entropy_after_a_step(learning_rate: float, weight: Tensor, distributed, *, entropy=entropy, **settings) -> float:
    """The entropy after one real update of plain gradient descent; each action is an element of the given weight."""
    policy = Tabular(LOGITS)
    num = LOGITS.shape[1]
    actions = torch.arange(num).unsqueeze(1)
    states = torch.zeros(num, 1, dtype=torch.int64)
    logprobs = LOGITS.log_softmax(-1)[0].unsqueeze(1)
    settings = {**SCORE, "baseline": "none", **settings}
    advantages = settings.pop("advantages", ADVANTAGES)
    algorithm = PPO(PPOConfig(**settings))
    zeros, last = torch.zeros(num, 1, dtype=F64), torch.ones(num, 1, dtype=torch.bool)
    trajectories = Trajectories(
        inputs={"observations": states},
        actions=actions,
        mask=last,
        rewards=advantages.unsqueeze(1),
        sampling_logprobs=logprobs,
        old_logprobs=logprobs,
        values=zeros,
        next_values=zeros,
        terminated=last,
        episode_ends=last,
        row_tokens=torch.ones(num, dtype=torch.int64),
        row_index=torch.arange(num),
    )
    batch = algorithm.prepare(trajectories, 0.0, algorithm.initial_state(), local_sum)
    weighting = Weighting(weight.unsqueeze(1), torch.full((num,), 1 / num, dtype=F64))  # the denominator is 1
    batch = replace(batch, weightings=dict.fromkeys(batch.weightings, weighting))
    optimizer = torch.optim.SGD(policy.parameters(), lr=abs(learning_rate), maximize=learning_rate < 0)
    config = UpdateConfig(num_epochs=1, minibatch_size=None, max_grad_norm=1e9)
    update(policy, algorithm, batch, optimizer, config, distributed, seed=0, step=0)
    return float(entropy(policy.logits.detach()))


def slope(function, width: float = 1e-4) -> float:
    return (function(width) - function(-width)) / (2 * width)


def covariance(p: Tensor, x: Tensor, y: Tensor) -> float:
    """Over an action drawn from p."""
    return float((p * x * y).sum() - (p * x).sum() * (p * y).sum())


def check_entropy_dynamics(distributed, entropy) -> None:
    p = LOGITS.softmax(-1)[0]
    ones = torch.ones_like(p)
    found = slope(lambda rate: entropy_after_a_step(rate, ones, distributed, entropy=entropy))
    assert abs(found + covariance(p, p.log(), ADVANTAGES)) < 1e-5  # theta moves by rate * A

    centred = ADVANTAGES - (p * ADVANTAGES).sum()
    found = slope(lambda rate: entropy_after_a_step(rate, p, distributed, entropy=entropy))
    assert abs(found + covariance(p, p.log(), p * centred)) < 1e-5  # theta moves by rate * p * A: the policy gradient


def test_a_step_changes_the_entropy_by_minus_the_covariance_of_log_probability_and_advantage(distributed):
    check_entropy_dynamics(distributed, entropy)
    check_entropy_dynamics(distributed, Categorical(4).entropy)


def test_the_check_of_the_entropy_notices(distributed):
    refute(lambda variant: check_entropy_dynamics(distributed, variant), broken.entropy_has_the_wrong_sign)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.algorithms.ppo.score_surrogate", lambda *args: -score_surrogate(*args))
        refute(lambda variant: check_entropy_dynamics(distributed, variant), entropy)


def test_preferring_the_likely_action_lowers_the_entropy_and_preferring_an_unlikely_one_raises_it(distributed):
    p = LOGITS.softmax(-1)[0]
    for action, rises in ((0, False), (3, True)):
        advantages = torch.eye(4, dtype=F64)[action]
        found = slope(lambda rate, a=advantages: entropy_after_a_step(rate, p, distributed, advantages=a))
        assert (found > 0) is rises


def test_the_entropy_bonus_raises_the_entropy_by_the_squared_norm_of_its_gradient(distributed):
    """d H / d theta = -p (log p + H); descent on -c H moves theta by rate c dH/dtheta."""
    p = LOGITS.softmax(-1)[0]
    gradient = -p * (p.log() + entropy(LOGITS))
    settings = {"advantages": torch.zeros_like(p), "entropy_coef": 0.3}
    found = slope(lambda rate: entropy_after_a_step(rate, p, distributed, **settings))
    assert abs(found - 0.3 * float((gradient**2).sum())) < 1e-5
    assert float((gradient**2).sum()) > 0.01
