"""Policy networks: initialisation, every kind of space, masks, pictures, own features, normalised observations."""

from math import exp, log

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text
from torch import nn
from torch.nn.functional import conv2d, linear

from gym_baselines.envs.spaces import check_spaces_supported
from gym_baselines.layers import Normalizer
from gym_baselines.networks import ActorCritic, NetworkConfig
from rlhf.core.distributions import MASKED_LOGIT
from rlhf.core.masking import local_sum
from rlhf.errors import InputError
from tests.controls import refute, run_ranks
from tests.rounding import EPS

F64 = torch.float64
VECTOR = Box(-np.inf, np.inf, (4,), np.float32)
PICTURES = Box(0, 255, (4, 84, 84), np.uint8)
UNEQUAL = Box(np.array([[-1.0, 0.0], [2.0, -8.0]]), np.array([[1.0, 10.0], [3.0, 8.0]]), dtype=np.float64)
SQUASHED = NetworkConfig(squash=True)

ACTIONS = {
    "Discrete": (Discrete(3), None),
    "Discrete from 5": (Discrete(3, start=5), None),
    "MultiDiscrete": (MultiDiscrete([3, 2, 4], start=[0, 1, -2]), None),
    "MultiDiscrete in two dimensions": (MultiDiscrete([[2, 3], [4, 2]]), None),
    "MultiBinary": (MultiBinary(5), None),
    "MultiBinary in two dimensions": (MultiBinary([2, 3]), None),
    "Box": (UNEQUAL, None),
    "Box squashed": (UNEQUAL, SQUASHED),
    "Box without bounds": (Box(-np.inf, np.inf, (2,), np.float32), None),
}
each_action_space = pytest.mark.parametrize("actions, config", ACTIONS.values(), ids=ACTIONS)


def observations(rows=8, seed=0, dtype=F64):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draws(policy, rows=8, seed=0):
    return torch.rand(rows, policy.num_draws, generator=torch.Generator().manual_seed(seed), dtype=F64)


def livelier(policy, seed=0):
    """Heads that say something: at the start all actions are nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        policy.policy_net[-1].weight.normal_(generator=generator)
        policy.policy_net[-1].bias.normal_(generator=generator)
    return policy


# --- initialisation ---


@pytest.mark.parametrize("config", [NetworkConfig(), NetworkConfig(shared_trunk=True)], ids=["separate", "shared"])
def test_layers_start_orthogonal_with_the_gains_of_ppo(config):
    """W W^T = gain^2 I (or W^T W, whichever is smaller): sqrt(2) inside, 0.01 at the actions, 1 at the value."""
    policy = ActorCritic(VECTOR, Discrete(3), config).double()
    heads = {id(policy.policy_net[-1]): 0.01, id(policy.value_net[-1]): 1.0}
    layers = [module for module in policy.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == (6 if config == NetworkConfig() else 4)
    for layer in layers:
        weight = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
        gain = heads.get(id(layer), 2**0.5)
        torch.testing.assert_close(weight @ weight.T / gain**2, torch.eye(len(weight), dtype=F64), rtol=0, atol=1e-5)
        assert (layer.bias == 0).all()


@pytest.mark.parametrize("space", [VECTOR, PICTURES], ids=["vector", "pictures"])
def test_the_seed_alone_decides_the_weights(space):
    state = torch.get_rng_state()
    first = ActorCritic(space, Discrete(3), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers change
    torch.rand(7)
    again, other = (ActorCritic(space, Discrete(3), seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("weight"))


def test_networks_have_the_layers_that_were_asked_for():
    config = NetworkConfig(hidden_sizes=(5, 6), value_hidden_sizes=(7,), activation="elu")
    policy = ActorCritic(VECTOR, Discrete(3), config)
    shapes = {
        name: [tuple(p.shape) for p in getattr(policy, name).parameters()] for name in ("policy_net", "value_net")
    }
    assert shapes["policy_net"] == [(5, 4), (5,), (6, 5), (6,), (3, 6), (3,)]
    assert shapes["value_net"] == [(7, 4), (7,), (1, 7), (1,)]
    assert [type(m) for m in policy.policy_net][1::2] == [nn.ELU, nn.ELU]
    linear_values = ActorCritic(VECTOR, Discrete(3), NetworkConfig(value_hidden_sizes=()))
    assert len(linear_values.value_net) == 1 and len(linear_values.policy_net) == 5


def test_the_deviation_starts_where_it_was_set_and_does_not_depend_on_the_observation():
    policy = ActorCritic(VECTOR, UNEQUAL, NetworkConfig(log_std_init=-1.5)).double()
    outputs = policy({"observations": observations()}, torch.zeros(8, 1, 4, dtype=F64))
    assert (outputs.distribution[..., 4:] == -1.5).all() and policy.log_std.requires_grad
    assert ActorCritic(VECTOR, Discrete(2)).log_std is None


# --- acting and learning see the same distribution ---


@each_action_space
def test_the_sampled_action_has_the_log_prob_that_learning_gives_it(actions, config):
    policy = livelier(ActorCritic(VECTOR, actions, config).double())
    x = observations(64)
    chosen, logprobs = policy.sample(x, draws(policy, 64))
    assert logprobs.shape == (64,) and chosen.shape == (64, *policy.family.action_shape)
    outputs = policy({"observations": x}, chosen.unsqueeze(1), with_entropy=True)
    torch.testing.assert_close(outputs.logprobs, logprobs.unsqueeze(1), rtol=0, atol=1e-12)
    assert outputs.values.shape == outputs.entropy.shape == (64, 1)
    torch.testing.assert_close(outputs.values.squeeze(1), policy.values(x), rtol=0, atol=1e-12)
    assert outputs.distribution.shape == (64, 1, policy.family.num_params) and outputs.kl is None


@each_action_space
def test_what_the_environment_is_given_lies_in_its_space(actions, config):
    policy = livelier(ActorCritic(VECTOR, actions, config))
    x = 3 * observations(200, dtype=torch.float32)
    for chosen in (policy.sample(x, draws(policy, 200))[0], policy.greedy(x)):
        given = policy.env_actions(chosen.detach())
        assert given.dtype == actions.dtype and all(actions.contains(action) for action in given)


def test_choices_are_counted_from_the_first_that_the_space_has():
    discrete = ActorCritic(VECTOR, Discrete(3, start=5))
    assert discrete.env_actions(torch.tensor([0, 2, 1])).tolist() == [5, 7, 6]
    several = ActorCritic(VECTOR, MultiDiscrete([3, 2, 4], start=[0, 1, -2]))
    assert several.env_actions(torch.tensor([[2, 0, 3]])).tolist() == [[2, 1, 1]]
    grid = ActorCritic(VECTOR, MultiDiscrete([[2, 3], [4, 2]]))
    assert grid.env_actions(torch.tensor([[1, 2, 3, 0]])).tolist() == [[[1, 2], [3, 0]]]


def test_gaussian_actions_are_cut_and_squashed_ones_bent_into_the_bounds():
    u = torch.tensor([[0.3, 20.0, -0.1, -0.5], [-9.0, 5.0, 2.5, 9.0]], dtype=F64)
    cut = ActorCritic(VECTOR, UNEQUAL).double().env_actions(u)
    assert cut.tolist() == [[[0.3, 10.0], [2.0, -0.5]], [[-1.0, 5.0], [2.5, 8.0]]]
    bent = ActorCritic(VECTOR, UNEQUAL, SQUASHED).double().env_actions(u)
    share = 1 / (1 + np.exp(-2 * u.numpy().reshape(2, 2, 2)))  # (1 + tanh) / 2
    np.testing.assert_allclose(bent, UNEQUAL.low + (UNEQUAL.high - UNEQUAL.low) * share, rtol=0, atol=1e-12)


def test_the_kl_is_that_of_the_old_distribution_to_this_one():
    """By hand from both softmaxes; the reversed one is another number."""
    old, new = (livelier(ActorCritic(VECTOR, Discrete(3)).double(), seed) for seed in (0, 1))
    x, actions = observations(), torch.zeros(8, 1, dtype=torch.int64)
    before = old({"observations": x}, actions).distribution

    def check(with_old):
        p, q = old.policy_net(x).softmax(-1), new.policy_net(x).softmax(-1)
        torch.testing.assert_close(with_old(before).kl.squeeze(1), (p * (p / q).log()).sum(-1), rtol=0, atol=1e-12)

    check(lambda before: new({"observations": x}, actions, old_distribution=before))
    now = new({"observations": x}, actions).distribution
    refute(check, lambda before: old({"observations": x}, actions, old_distribution=now))


FEATURES = {
    "separate": (VECTOR, {}),
    "shared": (VECTOR, {"config": NetworkConfig(shared_trunk=True)}),
    "own features": (VECTOR, {"features": lambda space: nn.Linear(space.shape[0], 3)}),
    "Gaussian": (VECTOR, {"actions": UNEQUAL}),
}


@pytest.mark.parametrize("case", FEATURES)
def test_a_policy_says_that_it_shares_layers_where_log_probs_and_values_depend_on_one_parameter(case):
    space, settings = FEATURES[case]
    settings = {"actions": Discrete(3), **settings}
    policy = livelier(ActorCritic(space, settings.pop("actions"), **settings).double())
    actions = policy.sample(observations(), draws(policy))[0]
    logprobs = policy({"observations": observations()}, actions.unsqueeze(1)).logprobs
    everything = list(policy.parameters())
    gradients = torch.autograd.grad(logprobs.sum(), everything, allow_unused=True)
    needed = {id(p) for p, gradient in zip(everything, gradients, strict=True) if gradient is not None}
    with_values = torch.autograd.grad(policy.values(observations()).sum(), everything, allow_unused=True)
    shared = {id(p) for p, gradient in zip(everything, with_values, strict=True) if gradient is not None} & needed
    assert bool(shared) == policy.shares_layers == (case in ("shared", "own features"))


def test_the_forward_compiles_as_one_graph():
    policy = livelier(ActorCritic(VECTOR, MultiDiscrete([3, 2]), NetworkConfig(normalize_observations=True)))
    x, mask = observations(dtype=torch.float32), torch.ones(8, 5, dtype=torch.bool)
    inputs, actions = {"observations": x, "action_mask": mask}, torch.zeros(8, 1, 2, dtype=torch.int64)
    old = torch.zeros(8, 1, 5)
    compiled = torch.compile(policy, fullgraph=True, backend="eager")
    for name in ("logprobs", "values", "entropy", "kl"):
        found, expected = (getattr(f(inputs, actions, True, True, old), name) for f in (compiled, policy))
        torch.testing.assert_close(found, expected)


# --- masks ---


def test_a_forbidden_action_is_never_taken_and_the_others_keep_their_proportions():
    policy = livelier(ActorCritic(VECTOR, Discrete(4)).double())
    x = observations(1).expand(2001, 4)
    mask = torch.tensor([True, False, True, False])
    grid = torch.linspace(0, 1 - 2**-53, 2001, dtype=F64)[:, None]
    actions, logprobs = policy.sample(x, grid, mask.expand(2001, 4))
    assert set(actions.tolist()) == {0, 2}
    free = policy.policy_net(x[:1]).softmax(-1)[0]
    expected = free / free[mask].sum()
    torch.testing.assert_close(logprobs.exp(), expected[actions], rtol=0, atol=1e-12)
    scored = policy({"observations": x[:4], "action_mask": mask.expand(4, 4)}, torch.arange(4)[:, None])
    assert scored.logprobs[1].exp() == scored.logprobs[3].exp() == 0
    assert (scored.distribution[:, 0, ~mask] == MASKED_LOGIT).all()
    for forbidden in range(4):  # the best one too
        only = torch.ones(1, 4, dtype=torch.bool)
        only[0, forbidden] = False
        assert policy.greedy(x[:1], only).item() == free.masked_fill(~only[0], 0).argmax()


def test_a_mask_of_several_choices_lists_them_one_after_the_other():
    policy = livelier(ActorCritic(VECTOR, MultiDiscrete([3, 2])))
    mask = torch.tensor([[False, False, True, True, False]]).expand(500, 5)
    actions, logprobs = policy.sample(observations(500, dtype=torch.float32), draws(policy, 500), mask)
    assert (actions == torch.tensor([2, 0])).all() and (logprobs == 0).all()


def test_a_row_that_allows_nothing_is_harmless():
    """The state after an end: finite numbers, a uniform choice, and no gradient."""
    policy = livelier(ActorCritic(VECTOR, Discrete(4)))
    mask = torch.tensor([[False] * 4, [True] * 4])
    inputs = {"observations": observations(2, dtype=torch.float32), "action_mask": mask}
    outputs = policy(inputs, torch.zeros(2, 1, dtype=torch.int64), with_entropy=True)
    assert outputs.logprobs[0].item() == pytest.approx(-log(4)) and outputs.entropy[0].item() == pytest.approx(log(4))
    (gradient,) = torch.autograd.grad(outputs.logprobs[0].sum(), policy.policy_net[-1].weight)
    assert (gradient == 0).all()


def test_a_mask_of_real_numbers_is_refused():
    policy = ActorCritic(VECTOR, UNEQUAL)
    with pytest.raises(InputError, match=r"mask.*Box"):
        policy.greedy(observations(dtype=torch.float32), torch.ones(8, 8, dtype=torch.bool))


# --- observations ---


def pictures(rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (rows, 4, 84, 84), generator=generator, dtype=torch.uint8)


def test_the_atari_network_is_that_of_the_paper():
    """1 684 128 parameters below the heads, as in every implementation; the forward, written out, on x / 255."""
    policy = ActorCritic(PICTURES, Discrete(6))
    assert sum(p.numel() for p in policy.body.parameters()) == 1_684_128
    w = list(policy.body.parameters())
    for p in w[1::2]:
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    x = pictures()
    h = conv2d(x.float() / 255, w[0], w[1], stride=4).relu()
    h = conv2d(h, w[2], w[3], stride=2).relu()
    h = conv2d(h, w[4], w[5]).relu()
    h = linear(h.flatten(1), w[6], w[7]).relu()
    torch.testing.assert_close(policy.values(x), policy.value_net(h).squeeze(1), rtol=2048 * EPS, atol=2048 * EPS)
    assert (policy.values(x).std() > 0) and policy.shares_layers
    orthogonal = ActorCritic(PICTURES, Discrete(6)).body.layers[0].weight.flatten(1)
    torch.testing.assert_close(orthogonal @ orthogonal.T, 2 * torch.eye(32), rtol=0, atol=2048 * EPS)


def test_pictures_may_have_their_channels_last():
    first, last = ActorCritic(PICTURES, Discrete(6)), ActorCritic(Box(0, 255, (84, 84, 4), np.uint8), Discrete(6))
    torch.testing.assert_close(last.values(pictures().permute(0, 2, 3, 1)), first.values(pictures()))


@pytest.mark.parametrize(
    "space",
    [Box(0, 255, (4, 35, 84), np.uint8), Box(0, 1, (4, 84, 84), np.float32), Box(0, 255, (84, 84), np.uint8)],
    ids=["too small", "no bytes", "no channels"],
)
def test_what_is_no_picture_goes_to_plain_layers_and_not_into_convolutions(space):
    assert ActorCritic(space, Discrete(2)).body is None
    with pytest.raises(InputError, match=r"nature_cnn.*pictures.*Box"):
        ActorCritic(space, Discrete(2), NetworkConfig(encoder="nature_cnn"))


def test_pictures_are_scaled_whatever_looks_at_them():
    """A black picture is 0 and a white one 1, for plain layers and for features of one's own."""
    policies = [
        ActorCritic(PICTURES, Discrete(2), NetworkConfig(encoder="mlp", hidden_sizes=())),
        ActorCritic(PICTURES, Discrete(2), features=lambda _: nn.Flatten()),
    ]
    white = torch.full((1, 4, 84, 84), 255, dtype=torch.uint8)
    for policy in policies:
        torch.testing.assert_close(policy.values(white), policy.value_net(torch.ones(1, 4 * 84 * 84)).squeeze(1))


def test_a_numbered_state_is_seen_one_hot():
    table = ActorCritic(Discrete(5, start=2), Discrete(2)).double()
    vector = ActorCritic(Box(0, 1, (5,)), Discrete(2)).double()
    assert torch.equal(table.values(torch.arange(2, 7)), vector.values(torch.eye(5, dtype=F64)))


@pytest.mark.parametrize("shape", [(), (2, 3), (1, 2, 2)], ids=str)
def test_observations_of_any_shape_are_flattened(shape):
    policy = ActorCritic(Box(-1, 1, shape), Discrete(2))
    flat = ActorCritic(Box(-1, 1, (int(np.prod(shape)),)), Discrete(2))
    x = torch.rand(7, *shape)
    assert torch.equal(policy.values(x), flat.values(x.reshape(7, -1)))


def test_observations_of_any_number_type_are_taken():
    policy = ActorCritic(Box(0, 100, (4,), np.int64), Discrete(2))
    x = torch.tensor([[1, 2, 3, 100]])
    for dtype in (torch.int64, torch.int32, torch.uint8, F64):
        assert torch.equal(policy.values(x.to(dtype)), policy.values(x.float()))


# --- features of one's own ---


class Sines(nn.Module):
    def __init__(self, space, width=3):
        super().__init__()
        self.layer = nn.Linear(space.shape[0], width)

    def forward(self, x):
        return self.layer(x).sin()


def test_heads_stand_on_the_users_features():
    policy = livelier(ActorCritic(VECTOR, Discrete(2), NetworkConfig(hidden_sizes=(99,)), features=Sines))
    x = observations(dtype=torch.float32)
    features = policy.body(x)
    assert features.shape == (8, 3) and len(policy.policy_net) == len(policy.value_net) == 1
    assert torch.equal(policy.values(x), policy.value_net(features).squeeze(1))
    assert torch.equal(policy.greedy(x), policy.policy_net(features).argmax(-1))


def test_the_users_features_are_initialised_by_the_seed_alone():
    first = ActorCritic(VECTOR, Discrete(2), seed=3, features=Sines).body.layer.weight
    state = torch.get_rng_state()
    torch.rand(5)
    again, other = (ActorCritic(VECTOR, Discrete(2), seed=seed, features=Sines).body.layer.weight for seed in (3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.set_rng_state(state)
    ActorCritic(VECTOR, Discrete(2), features=Sines)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "features, named",
    [
        (lambda space: "no module", "no module"),
        (lambda space: nn.Linear(5, 3), "(2, *(4,))"),
        (lambda space: nn.Unflatten(1, (2, 2)), "(2, 2, 2)"),
    ],
    ids=["no module", "a module that fails", "a module with another shape"],
)
def test_features_that_do_not_fit_are_refused(features, named):
    with pytest.raises(InputError, match="features") as error:
        ActorCritic(VECTOR, Discrete(2), features=features)
    assert named in str(error.value)


# --- normalised observations ---


def rollouts(num=3, rows=4, time=6, offset=0.0):
    """(observations, mask), some of them not counting and then NaN."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(num):
        x = torch.randn(rows, time, 2, 3, generator=generator, dtype=F64) * (number + 1) + offset + number
        mask = torch.rand(rows, time, generator=generator) < 0.8
        made.append((x.masked_fill(~mask[..., None, None], float("nan")), mask))
    return made


def everything_seen(made):
    return torch.cat([x[mask] for x, mask in made])


def test_the_statistics_are_those_of_everything_that_counted():
    def check(kind):
        normalizer = kind((2, 3)).double()
        for x, mask in rollouts():
            normalizer.update(x, mask)
        seen = everything_seen(rollouts())
        assert normalizer.count == len(seen)
        torch.testing.assert_close(normalizer.mean, seen.mean(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(normalizer.var, seen.var(0, correction=0), rtol=0, atol=1e-12)

    class ForgetsTheShift(Normalizer):
        """Adds up the deviations from each rollout's own mean."""

        def update(self, observations, mask, all_sum=local_sum):
            shifted = torch.where(mask[..., None, None], observations, 0.0)
            before, mean = self.count.clone(), self.mean.clone()
            counted = mask[..., None, None]
            own = shifted.sum((0, 1)) / mask.sum()
            super().update(torch.where(counted, observations - own + mean, 0.0), mask, all_sum)
            self.mean.copy_((mean * before + own * mask.sum()) / self.count)

    check(Normalizer)
    refute(check, ForgetsTheShift)


def test_the_statistics_are_exact_far_from_zero():
    """Offset 1e6, deviation 1 to 3: sums of squares would leave no correct digit of the variance in float32."""
    normalizer = Normalizer((2, 3)).double()
    for x, mask in rollouts(offset=1e6):
        normalizer.update(x, mask)
    torch.testing.assert_close(
        normalizer.var, everything_seen(rollouts(offset=1e6)).var(0, correction=0), rtol=1e-8, atol=0
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_statistics_do_not_depend_on_the_processes(world_size):
    def work(rank, all_sum):
        normalizer = Normalizer((2, 3)).double()
        for x, mask in rollouts():
            bounds = [len(x) * r // world_size for r in (rank, rank + 1)]
            normalizer.update(x[slice(*bounds)], mask[slice(*bounds)], all_sum)
        return normalizer.state_dict()

    alone = Normalizer((2, 3)).double()
    for x, mask in rollouts():
        alone.update(x, mask)
    for state in run_ranks(work, world_size):
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)


def test_the_normalizer_does_nothing_before_its_first_update_and_where_nothing_counts():
    normalizer = Normalizer((2, 3))
    x = torch.rand(5, 2, 3) * 20 - 10
    assert torch.equal(normalizer(x), x)
    normalizer.update(x[:, None], torch.zeros(5, 1, dtype=torch.bool))
    assert torch.equal(normalizer(x), x) and normalizer.count == 0


def test_normalised_observations_are_limited_to_ten():
    normalizer = Normalizer((1,)).double()
    normalizer.update(torch.tensor([[[1.0], [3.0]]]), torch.ones(1, 2, dtype=torch.bool))
    found = normalizer(torch.tensor([[2.0], [3.0], [11.9], [12.1], [-1e9]], dtype=F64)).squeeze(1)
    torch.testing.assert_close(found, torch.tensor([0, 1, 9.9, 10, -10], dtype=F64), rtol=0, atol=1e-6)


def test_a_policy_with_a_normalizer_is_one_without_on_normalised_observations_and_nothing_but_update_changes_it():
    config = NetworkConfig(normalize_observations=True)
    policy, plain = ActorCritic(VECTOR, UNEQUAL, config).double(), ActorCritic(VECTOR, UNEQUAL).double()
    x = 5 * observations() + 3
    policy.normalizer.update(x[None], torch.ones(1, 8, dtype=torch.bool))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    standard = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(policy.values(x), plain.values(standard), rtol=0, atol=1e-12)
    torch.testing.assert_close(policy.greedy(x), plain.greedy(standard), rtol=0, atol=1e-12)
    actions, _ = policy.sample(x, draws(policy))
    policy({"observations": x}, actions.unsqueeze(1)).logprobs.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert {"normalizer.mean", "normalizer.var", "normalizer.count"} <= before.keys()
    assert not any(name.startswith("normalizer") for name, _ in policy.named_parameters())


# --- bad input ---


BAD_CONFIGS = {
    "an empty layer": ({"hidden_sizes": (64, 0)}, ["hidden_sizes", "0"]),
    "a width alone": ({"hidden_sizes": 64}, ["hidden_sizes", "64"]),
    "Stable-Baselines3's dictionary": ({"hidden_sizes": {"pi": [64], "vf": [64]}}, ["hidden_sizes", "'pi'"]),
    "an unknown activation": ({"activation": "sin"}, ["activation", "sin", "tanh"]),
    "an unknown encoder": ({"encoder": "resnet"}, ["encoder", "resnet", "nature_cnn"]),
    "a deviation that is no number": ({"log_std_init": float("nan")}, ["log_std_init", "nan"]),
    "a deviation beyond all bounds": ({"log_std_init": exp(6)}, ["log_std_init", "403"]),
    "two sizes for one trunk": (
        {"shared_trunk": True, "value_hidden_sizes": (8,)},
        ["value_hidden_sizes", "shared_trunk"],
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_setting_is_named_with_its_value(case):
    settings, named = BAD_CONFIGS[case]
    with pytest.raises(InputError) as error:
        NetworkConfig(**settings)
    assert all(part in str(error.value) for part in named), str(error.value)


INTEGERS = Box(-5, 5, (2,), np.int64)
HALF_BOUNDED = Box(np.array([-1.0, -np.inf]), np.array([1.0, 1.0]), dtype=np.float64)
BAD_SPACES = {
    "Dict observations": (Dict({"a": VECTOR}), Discrete(2), {}, ["Dict('a'", "flatten"]),
    "Text observations": (Text(3), Discrete(2), {}, ["Text", "flatten"]),
    "MultiDiscrete observations": (MultiDiscrete([2, 2]), Discrete(2), {}, ["MultiDiscrete", "flatten"]),
    "empty observations": (Box(0, 1, (0,)), Discrete(2), {}, ["holds no number"]),
    "Dict actions": (VECTOR, Dict({"a": Discrete(2)}), {}, ["Dict('a'", "ActionWrapper"]),
    "Box actions of integers": (VECTOR, INTEGERS, {}, ["int64", "MultiDiscrete"]),
    "no actions": (VECTOR, Box(-1, 1, (0,)), {}, ["holds no number"]),
    "an action with one value": (VECTOR, Box(np.float32([0, 0]), np.float32([0, 1])), {}, ["low", "high"]),
    "squashed choices": (VECTOR, Discrete(2), {"squash": True}, ["squash", "Discrete(2)", "false"]),
    "squashed without bounds": (VECTOR, HALF_BOUNDED, {"squash": True}, ["squash", "inf", "RescaleAction"]),
}


@pytest.mark.parametrize("case", BAD_SPACES)
@pytest.mark.filterwarnings("ignore")
def test_a_space_that_no_policy_can_handle_is_refused_by_name_with_a_remedy(case):
    seen, actions, settings, named = BAD_SPACES[case]
    with pytest.raises(InputError) as error:
        check_spaces_supported(seen, actions, "MyEnv-v0", **settings)
    assert all(part in str(error.value) for part in ["MyEnv-v0", *named]), str(error.value)
    with pytest.raises(InputError):
        ActorCritic(seen, actions, NetworkConfig(**settings))


@pytest.mark.parametrize("space", [PICTURES, Discrete(4)], ids=["pictures", "numbered states"])
def test_statistics_of_what_has_none_are_refused(space):
    with pytest.raises(InputError, match="normalize_observations"):
        ActorCritic(space, Discrete(2), NetworkConfig(normalize_observations=True))
