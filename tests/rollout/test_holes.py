"""Episodes with holes, tokens that the policy read but did not sample, by enumeration of a two-turn language.

The policy samples one token; 0 ends. After 1 a tool inserts "2 2", after 2 it inserts "0", the end token, which counts for
nothing there. Then the policy samples a second token, where 0 ends, and a third, after which there is no more; if the third
is not 0, the tool inserts a last word that nobody answers. That makes 15 episodes of 1 to 6 tokens. Policy, reference and
value head are a tiny GPT-2 in float64, and every expectation is a finite sum, differentiated by autograd.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from rlhf.algorithms.grpo import GRPO, GRPOConfig
from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.core.masking import local_sum
from rlhf.models.policy import Policy
from rlhf.rollout import scoring as scoring_module
from rlhf.rollout.engine import Completion, Span
from rlhf.rollout.episode import Episode, Packed, next_sampled, pack
from rlhf.training.steppers import forward, prepare_minibatch
from rlhf.types import TrainingBatch, Trajectories, Weighting
from tests import tiny
from tests.controls import refute
from tests.rollout.episodes import score

END = 0
INSERTED = {1: [2, 2], 2: [END]}
PROMPT = [5, 6]
BETA, GAMMA, LAMBDA = 0.3, 0.97, 0.8
EXACT = {"rtol": 0, "atol": 1e-12}


def turn(ids: list[int], *, ended: bool, version: int = 0) -> Completion:
    return Completion(ids, [-1.0] * len(ids), "stop" if ended else "length", [Span(version, 0, len(ids))])


def every_episode() -> list[Episode]:
    episodes = [Episode.of_turns(PROMPT, [(turn([END], ended=True), [])])]
    for first, inserted in INSERTED.items():
        begun = (turn([first], ended=False), inserted)
        episodes.append(Episode.of_turns(PROMPT, [begun, (turn([END], ended=True), [])]))
        for second, third in product((1, 2), (END, 1, 2)):
            last_word = [] if third == END else [1]
            episodes.append(Episode.of_turns(PROMPT, [begun, (turn([second, third], ended=third == END), last_word)]))
    return episodes


EPISODES = every_episode()
SCORES = torch.randn(len(EPISODES), generator=torch.Generator().manual_seed(3), dtype=torch.float64).tolist()


def model(seed: int, *, value_head: bool = False) -> Policy:
    lm = tiny.causal_lm("gpt2", seed=seed, dtype=torch.float64, num_hidden_layers=1, n_layer=1)
    policy = Policy(lm, temperature=1.0, critic="head" if value_head else None)
    if value_head:
        tiny.randomise(policy.critic.head)

    def ban(module, args, outputs):
        """Only 0, 1 and 2 are ever said, so that the 15 episodes are all there are."""
        return torch.cat([outputs[..., :3], outputs[..., 3:] - 1e9], -1)

    lm.get_output_embeddings().register_forward_hook(ban)
    return policy


@pytest.fixture
def policy() -> Policy:
    return model(0, value_head=True)


@pytest.fixture
def reference() -> Policy:
    return model(1).requires_grad_(False)


def sampled_logprobs(policy: Policy, episode: Episode) -> Tensor:
    """(sampled tokens,): by the stock model on the whole sequence, with gradients."""
    logits = policy.lm(input_ids=torch.tensor([[*episode.prompt_ids, *episode.ids]])).logits[0].log_softmax(-1)
    start = len(episode.prompt_ids) - 1
    chosen = logits[torch.arange(start, start + len(episode.ids)), torch.tensor(episode.ids)]
    return chosen[torch.tensor(episode.sampled)]


def sampled_values(policy: Policy, episode: Episode) -> Tensor:
    """(sampled tokens,): the value before each."""
    hidden = policy.lm.base_model(input_ids=torch.tensor([[*episode.prompt_ids, *episode.ids]])).last_hidden_state
    start = len(episode.prompt_ids) - 1
    values = policy.critic.head(hidden[0, start : start + len(episode.ids)])
    return values[torch.tensor(episode.sampled)]


def test_the_fifteen_episodes_are_all_there_are(policy):
    chances = torch.stack([sampled_logprobs(policy, episode).sum().exp() for episode in EPISODES])
    assert chances.sum().item() == pytest.approx(1.0, abs=1e-12) and chances.min() > 1e-6
    assert {len(episode.ids) for episode in EPISODES} == {1, 3, 4, 5, 6}
    assert any(not episode.sampled[-1] for episode in EPISODES) and EPISODES[0].sampled == [True]


def collected(policy: Policy, reference: Policy) -> Trajectories:
    return score(EPISODES, SCORES, policy, reference)


# --- the tensors ---


def test_the_hand_table_of_an_episode_with_a_hole_and_a_last_word():
    """After "1" comes "2 2" from the tool; the policy goes on with "1 2", and the tool has the last word."""
    (episode,) = [e for e in EPISODES if e.ids == [1, 2, 2, 1, 2, 1]]
    packed = pack(
        [replace(episode, rewards=[0.0, 0.5, 0.0, 0.0, 0.0, 0.25], versions=[3, 0, 0, 4, 4, 0])], torch.device("cpu")
    )
    assert packed.mask.tolist() == [[True, False, False, True, True, False]]
    assert packed.last.tolist() == [[False, False, False, False, True, False]]
    assert packed.terminated.tolist() == [[False] * 6]  # cut
    assert packed.rewards.tolist() == [[0.5, 0, 0, 0, 0.25, 0]]  # what the tool paid lies on the token that called it
    assert packed.versions.tolist() == [[3, 0, 0, 4, 4, 0]]
    assert packed.row_tokens.tolist() == [8] and packed.inputs["input_ids"].tolist() == [[5, 6, 1, 2, 2, 1, 2, 1]]
    values = torch.tensor([[10.0, 0, 0, 13, 14, 0]])
    assert next_sampled(values, packed.mask).tolist() == [[13, 13, 13, 14, 0, 0]]


def check_numbers(policy: Policy, reference: Policy) -> None:
    """Log-probs, reference log-probs, values and next values of the sampled tokens, one sequence alone."""
    got = collected(policy, reference)
    for row, episode in enumerate(EPISODES):
        own = got.mask[row]
        with torch.no_grad():
            values = sampled_values(policy, episode)
            wanted = {
                "old_logprobs": sampled_logprobs(policy, episode),
                "ref_logprobs": sampled_logprobs(reference, episode),
                "values": values,
                "next_values": torch.cat([values[1:], values.new_zeros(1)]),
                "rewards": torch.tensor([0.0] * (len(values) - 1) + [SCORES[row]], dtype=torch.float64),
            }
        for name, expected in wanted.items():
            torch.testing.assert_close(getattr(got, name)[row][own], expected, **EXACT)


# --- advantages ---


def penalised(policy: Policy, reference: Policy, row: int) -> Tensor:
    """Rewards of the sampled tokens: the KL's share of each, and the score on the last."""
    with torch.no_grad():
        kl = sampled_logprobs(policy, EPISODES[row]) - sampled_logprobs(reference, EPISODES[row])
    return -BETA * kl + torch.tensor([0.0] * (len(kl) - 1) + [SCORES[row]], dtype=torch.float64)


def check_gae(policy: Policy, reference: Policy) -> None:
    """A_t = sum over l >= t of (gamma lambda)^(l - t) (r_l + gamma V_{l + 1} - V_l), over the sampled tokens alone."""
    config = PPOConfig(kl_coef=BETA, gamma=GAMMA, gae_lambda=LAMBDA, normalize_advantages="none")
    batch = PPO(config).prepare(collected(policy, reference), 0.0, {"kl_coef": BETA}, local_sum)
    for row, episode in enumerate(EPISODES):
        with torch.no_grad():
            values = sampled_values(policy, episode)
        deltas = penalised(policy, reference, row) + GAMMA * torch.cat([values[1:], values.new_zeros(1)]) - values
        wanted = [
            sum((GAMMA * LAMBDA) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))
        ]
        own = batch.mask[row]
        torch.testing.assert_close(batch.advantages[row][own], torch.stack(wanted), **EXACT)
        torch.testing.assert_close(batch.returns[row][own], torch.stack(wanted) + values, **EXACT)
        assert not batch.advantages[row][~own].any()


def check_groups(policy: Policy, reference: Policy) -> None:
    """The score less beta times the KL of the sampled tokens, less the group's mean; or less the KL still to come."""
    with torch.no_grad():
        kls = [sampled_logprobs(policy, e) - sampled_logprobs(reference, e) for e in EPISODES]
    settings = {"completions_per_prompt": len(EPISODES), "scale": "none", "kl_coef": BETA}
    for placement in ("score", "return_to_go"):
        algorithm = GRPO(GRPOConfig(**settings, kl_placement=placement))
        batch = algorithm.prepare(collected(policy, reference), 0.0, {}, local_sum)
        totals = torch.tensor(SCORES, dtype=torch.float64)
        if placement == "score":
            totals = totals - BETA * torch.stack([kl.sum() for kl in kls])
        for row, kl in enumerate(kls):
            to_go = BETA * kl.flip(0).cumsum(0).flip(0) if placement == "return_to_go" else 0.0
            wanted = (totals[row] - totals.mean()) * torch.ones_like(kl) - to_go
            torch.testing.assert_close(batch.advantages[row][batch.mask[row]], wanted, **EXACT)
        weights = batch.weightings["policy"].weight
        assert weights.sum(1).tolist() == pytest.approx([1.0] * len(EPISODES), abs=1e-12)  # a mean over sampled tokens


# --- gradients ---


def in_expectation(batch: TrainingBatch, policy: Policy, *, per_token: bool) -> TrainingBatch:
    """Each episode weighted by its probability: the sum over rows is then the mean over the policy's episodes."""
    with torch.no_grad():
        chances = torch.stack([sampled_logprobs(policy, e).sum().exp() for e in EPISODES])
    share = batch.mask / (batch.mask.sum(1, keepdim=True) if per_token else 1.0)
    weighting = Weighting(chances.unsqueeze(1) * share, chances)
    return replace(batch, weightings=dict.fromkeys(batch.weightings, weighting))


def gradient_of_loss(policy: Policy, algorithm, batch: TrainingBatch) -> list[Tensor]:
    minibatch = prepare_minibatch(batch, whiten_advantages=False)
    loss = algorithm.loss(forward(policy, algorithm, minibatch), minibatch).total
    return list(torch.autograd.grad(loss, list(policy.lm.parameters()), allow_unused=True, materialize_grads=True))


def gradient_of(policy: Policy, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(policy.lm.parameters()), allow_unused=True, materialize_grads=True))


def objective(policy: Policy, reference: Policy) -> Tensor:
    """J = sum over episodes of p (R - beta sum over sampled tokens of log p / ref)."""
    total = torch.zeros((), dtype=torch.float64)
    for row, episode in enumerate(EPISODES):
        own, ref = sampled_logprobs(policy, episode), sampled_logprobs(reference, episode)
        total = total + own.sum().exp() * (SCORES[row] - BETA * (own - ref).sum())
    return total


def check_gradient_of_ppo(policy: Policy, reference: Policy) -> None:
    """With lambda 1 the expected gradient is that of J, whatever the values say."""
    config = PPOConfig(
        kl_coef=BETA, gamma=1.0, gae_lambda=1.0, normalize_advantages="none", value_coef=0.0, surrogate="unclipped"
    )
    algorithm = PPO(config)
    batch = algorithm.prepare(collected(policy, reference), 0.0, {"kl_coef": BETA}, local_sum)
    got = gradient_of_loss(policy, algorithm, in_expectation(batch, policy, per_token=False))
    wanted = gradient_of(policy, -objective(policy, reference))
    assert max(g.abs().max() for g in wanted) > 0.1
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def check_gradient_of_grpo(policy: Policy, reference: Policy) -> None:
    """RLOO's loss, summed over sampled tokens: again the gradient of J, if the whole language is the group.

    Centring by a constant changes nothing in expectation, so `center` is none.
    """
    config = GRPOConfig(
        completions_per_prompt=len(EPISODES),
        center="none",
        scale="none",
        surrogate="score",
        aggregation="constant_length",
        constant_length=1,
        kl_coef=BETA,
        kl_placement="score",
    )
    algorithm = GRPO(config)
    batch = algorithm.prepare(collected(policy, reference), 0.0, {}, local_sum)
    got = gradient_of_loss(policy, algorithm, in_expectation(batch, policy, per_token=False))
    for ours, theirs in zip(got, gradient_of(policy, -objective(policy, reference)), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def check_loss_terms(policy: Policy, reference: Policy) -> None:
    """KL in the loss (token by token, and of the whole episode) and entropy leave holes out: means over sampled tokens."""
    for estimator in ("k2", "k3", "sequence_k2"):
        config = GRPOConfig(
            completions_per_prompt=len(EPISODES), kl_coef=BETA, kl_estimator=estimator, entropy_coef=0.1, center="none",
            scale="none",
        )  # fmt: skip
        algorithm = GRPO(config)
        batch = algorithm.prepare(collected(policy, reference), 0.0, {}, local_sum)
        minibatch = prepare_minibatch(batch, whiten_advantages=False)
        loss = algorithm.loss(forward(policy, algorithm, minibatch), minibatch)
        kls, entropies = [], []
        with torch.no_grad():
            for episode in EPISODES:
                d = sampled_logprobs(policy, episode) - sampled_logprobs(reference, episode)
                of_row = {
                    "k2": 0.5 * d**2,
                    "k3": (-d).expm1() + d,
                    "sequence_k2": 0.5 * d.sum() ** 2 / len(d) * d.new_ones(len(d)),
                }
                kls.append(of_row[estimator].mean())
                entropies.append(sampled_entropies(policy, episode).mean())
        torch.testing.assert_close(loss.terms["kl_loss"][0], torch.stack(kls).mean(), **EXACT)
        torch.testing.assert_close(loss.terms["entropy"][0], torch.stack(entropies).mean(), **EXACT)


def sampled_entropies(policy: Policy, episode: Episode) -> Tensor:
    logits = policy.lm(input_ids=torch.tensor([[*episode.prompt_ids, *episode.ids]])).logits[0]
    start = len(episode.prompt_ids) - 1
    logprobs = logits[start : start + len(episode.ids)].log_softmax(-1)[torch.tensor(episode.sampled)]
    return -(logprobs.exp() * logprobs).sum(-1)


CHECKS = [check_numbers, check_gae, check_groups, check_gradient_of_ppo, check_gradient_of_grpo, check_loss_terms]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_equals_the_closed_form(check, policy, reference):
    check(policy, reference)


# --- what each of these must notice ---


def shifted_naively(values: Tensor, mask: Tensor) -> Tensor:
    """The value of the next token, sampled or not."""
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)


def masked_by_length(episodes, device) -> Packed:
    """Every token after the prompt counts as the policy's own."""
    return pack([replace(e, sampled=[True] * len(e.ids)) for e in episodes], device)


BROKEN = {
    "next_sampled": (shifted_naively, [check_numbers, check_gae, check_gradient_of_ppo]),
    "pack": (masked_by_length, CHECKS),
}


@pytest.mark.parametrize(
    ("function", "check"), [(f, check) for f, (_, checks) in BROKEN.items() for check in checks],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)  # fmt: skip
def test_the_check_notices(function, check, policy, reference, monkeypatch):
    monkeypatch.setattr(scoring_module, function, BROKEN[function][0])
    refute(lambda _: check(policy, reference), None)
