"""Agents: the actions they predict, and that what is saved comes back the same or is refused."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from torch import nn

from gym_baselines.agent import AGENT_FILE, WEIGHTS_FILE, Agent, describe
from gym_baselines.config import TrainConfig
from gym_baselines.envs.environments import EnvironmentConfig
from gym_baselines.envs.spaces import are_alike, space_from_json, space_to_json
from gym_baselines.networks import ActorCritic, NetworkConfig
from rlhf.errors import InputError
from tests.rounding import EPS

VECTOR = Box(-np.inf, np.inf, (4,), np.float32)
PICTURES = Box(0, 255, (4, 40, 40), np.uint8)
BOUNDED = Box(np.float32([[-1, 0], [2, -8]]), np.float32([[1, 10], [3, 8]]))

POLICIES = {
    "Discrete": (VECTOR, Discrete(3), {}),
    "Discrete from 5, float64": (VECTOR, Discrete(3, start=5), {}),
    "MultiDiscrete, shared": (VECTOR, MultiDiscrete([3, 2]), {"shared_trunk": True, "activation": "silu"}),
    "MultiBinary": (Discrete(7, start=1), MultiBinary([2, 2]), {"hidden_sizes": ()}),
    "Gaussian, normalised": (VECTOR, BOUNDED, {"normalize_observations": True, "log_std_init": -0.5}),
    "squashed": (Box(-1, 1, (2, 3), np.float64), BOUNDED, {"squash": True, "value_hidden_sizes": (5,)}),
    "pictures": (PICTURES, Discrete(3), {}),
}


def agent(case="Discrete", **settings):
    """One whose weights were all changed since the start."""
    observations, actions, config = POLICIES[case]
    policy = ActorCritic(observations, actions, NetworkConfig(**config))
    policy = policy.double() if "float64" in case else policy
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    if policy.normalizer is not None:
        policy.normalizer.update(torch.randn(3, 5, 4, generator=generator) * 3 + 1, torch.ones(3, 5, dtype=torch.bool))
    return Agent(policy=policy, env="Some-v0", settings=settings, environment_steps=123, recent_returns=[1.5, -2.0])


def seen(space, rows=40):
    space.seed(0)
    return np.stack([space.sample() for _ in range(rows)])


each_policy = pytest.mark.parametrize("case", POLICIES)


# --- predicting ---


@each_policy
def test_one_observation_and_a_batch_of_them_get_actions_of_the_space(case):
    ours = agent(case)
    observations, actions = seen(ours.policy.observation_space), ours.policy.action_space
    for deterministic in (True, False):
        batch = ours.predict(observations, deterministic=deterministic, step=0)
        assert batch.dtype == actions.dtype and all(actions.contains(action) for action in batch)
    greedy = ours.predict(observations)
    for row in (0, 7):
        single = ours.predict(observations[row])
        assert np.shape(single) == actions.shape
        np.testing.assert_allclose(single, greedy[row], rtol=128 * EPS, atol=128 * EPS)
    assert len(np.unique(greedy.reshape(40, -1), axis=0)) > 1  # they depend on the observation


def test_the_deterministic_action_is_the_most_likely_one():
    ours = agent()
    observations = seen(VECTOR)
    logits = ours.policy.policy_net(torch.from_numpy(observations))
    assert ours.predict(observations).tolist() == logits.argmax(-1).tolist()


def test_every_stochastic_call_draws_anew_and_a_step_makes_it_repeatable():
    ours, twin = agent("Gaussian, normalised"), agent("Gaussian, normalised")
    observation = seen(VECTOR)[0]
    drawn = [ours.predict(observation, deterministic=False) for _ in range(3)]
    assert not np.allclose(drawn[0], drawn[1]) and not np.allclose(drawn[1], drawn[2])
    assert np.array_equal([twin.predict(observation, deterministic=False) for _ in range(3)], drawn)
    repeated = [ours.predict(observation, deterministic=False, step=1) for _ in range(2)]
    assert np.array_equal(repeated[0], repeated[1]) and np.array_equal(repeated[0], drawn[1])
    assert not np.array_equal(ours.predict(observation, deterministic=False, step=1, seed=1), drawn[1])


def test_rows_of_a_batch_are_drawn_independently():
    """10 000 rows of the same observation: the shares of the actions are their probabilities, to five standard errors."""
    ours = agent()
    observation = seen(VECTOR)[0]
    actions = ours.predict(np.tile(observation, (10_000, 1)), deterministic=False)
    probabilities = ours.policy.policy_net(torch.from_numpy(observation)).softmax(-1).detach().numpy()
    assert probabilities.min() > 0.02
    assert np.abs(np.bincount(actions) / 10_000 - probabilities).max() < 5 * 0.5 / 100


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_masked_action_is_not_predicted(deterministic):
    ours = agent()
    observations = seen(VECTOR, 200)
    free = ours.predict(observations, deterministic=deterministic)
    best = np.bincount(free).argmax()
    mask = np.arange(3) != best
    actions = ours.predict(observations, deterministic=deterministic, action_mask=np.tile(mask, (200, 1)))
    assert best not in actions and set(actions) <= {0, 1, 2}
    assert ours.predict(observations[0], deterministic=deterministic, action_mask=np.int8([0, 0, 1])) == 2


def test_predicting_leaves_the_policy_and_its_statistics_as_they_are():
    ours = agent("Gaussian, normalised")
    before = {name: value.clone() for name, value in ours.policy.state_dict().items()}
    ours.predict(seen(VECTOR) * 100, deterministic=False)
    assert all(torch.equal(value, before[name]) for name, value in ours.policy.state_dict().items())


BAD_OBSERVATIONS = {
    "a wrong width": ("Discrete", np.zeros(5), ["(5,)", "(4,)"]),
    "two batch dimensions": ("Discrete", np.zeros((2, 3, 4)), ["(2, 3, 4)", "(4,)"]),
    "a number": ("Discrete", np.float32(1), ["()", "(4,)"]),
    "NaN": ("Discrete", np.array([0, 0, np.nan, 0]), ["not finite", "nan"]),
    "infinity": ("Gaussian, normalised", np.array([[0, 0, np.inf, 0]]), ["not finite", "inf"]),
    "text": ("Discrete", np.array(["a", "b", "c", "d"]), ["numbers"]),
    "an unknown state": ("MultiBinary", np.array([3, 8]), ["8", "Discrete(7, start=1)"]),
    "half a state": ("MultiBinary", np.array(3.5), ["3.5", "Discrete"]),
}


@pytest.mark.parametrize("case", BAD_OBSERVATIONS)
def test_an_observation_that_does_not_fit_is_refused(case):
    policy, observation, named = BAD_OBSERVATIONS[case]
    with pytest.raises(InputError) as error:
        agent(policy).predict(observation)
    assert all(part in str(error.value) for part in named), str(error.value)


@pytest.mark.parametrize(
    "policy, mask, named",
    [
        ("Discrete", [True, False], ["(2,)", "(3,)"]),
        ("Discrete", [False, False, False], ["no choice"]),
        ("MultiDiscrete, shared", [True, True, True, False, False], ["no choice"]),  # for the second part
        ("Gaussian, normalised", [True] * 8, ["no choices to mask"]),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(policy, mask, named):
    with pytest.raises(InputError) as error:
        agent(policy).predict(np.zeros(4, np.float32), action_mask=np.array(mask))
    assert all(part in str(error.value) for part in named), str(error.value)


# --- saving and loading ---


@each_policy
def test_a_saved_agent_comes_back_the_same(case, tmp_path):
    ours = agent(case, environment=asdict(EnvironmentConfig(frame_stack=2)))
    ours.save(tmp_path / "new" / "folder")
    loaded = Agent.load(tmp_path / "new" / "folder")
    for name, value in ours.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], value)
        assert loaded.policy.state_dict()[name].dtype == value.dtype
    assert loaded.policy.observation_space == ours.policy.observation_space
    assert loaded.policy.action_space == ours.policy.action_space
    assert loaded.policy.config == ours.policy.config and loaded.policy.dtype == ours.policy.dtype
    assert vars(loaded) | {"policy": None} == vars(ours) | {"policy": None}
    assert loaded.environment_config() == EnvironmentConfig(frame_stack=2)
    observations = seen(ours.policy.observation_space)
    for deterministic in (True, False):
        expected = ours.predict(observations, deterministic=deterministic)
        assert np.array_equal(loaded.predict(observations, deterministic=deterministic), expected)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [AGENT_FILE, WEIGHTS_FILE]


def test_saving_again_replaces_what_was_there(tmp_path):
    agent("squashed").save(tmp_path)
    ours = agent("Discrete")
    ours.save(tmp_path)
    assert Agent.load(tmp_path).policy.action_space == Discrete(3)


def test_what_is_saved_is_plain_json_without_infinities(tmp_path):
    agent().save(tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    facts = json.loads((tmp_path / AGENT_FILE).read_text(), parse_constant=refuse)
    assert facts["observation_space"]["high"] == ["inf"]


def test_a_feature_module_is_needed_again_and_its_weights_come_back(tmp_path):
    def features(space):
        return nn.Sequential(nn.Linear(space.shape[0], 6), nn.Tanh())

    ours = Agent(policy=ActorCritic(VECTOR, Discrete(3), seed=1, features=features), env="Some-v0")
    ours.save(tmp_path)
    with pytest.raises(InputError, match=r"feature module.*features="):
        Agent.load(tmp_path)
    loaded = Agent.load(tmp_path, features=features)
    observations = torch.from_numpy(seen(VECTOR))
    assert torch.equal(loaded.policy.values(observations), ours.policy.values(observations))
    with pytest.raises(InputError, match="damaged"):
        Agent.load(tmp_path, features=lambda space: nn.Linear(4, 7))
    agent().save(tmp_path)
    with pytest.raises(InputError, match="without a feature module"):
        Agent.load(tmp_path, features=features)


def change_json(**changes):
    def change(directory):
        facts = json.loads((directory / AGENT_FILE).read_text())
        (directory / AGENT_FILE).write_text(json.dumps({**facts, **changes}))

    return change


def flip_a_bit(directory):
    data = bytearray((directory / WEIGHTS_FILE).read_bytes())
    data[-100] ^= 1
    (directory / WEIGHTS_FILE).write_bytes(data)


def cut(name, keep):
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:keep])


def other_weights(directory):
    agent("MultiDiscrete, shared").save(directory / "other")
    (directory / "other" / WEIGHTS_FILE).replace(directory / WEIGHTS_FILE)


DAMAGES = {
    "no description": (lambda directory: (directory / AGENT_FILE).unlink(), "No such file"),
    "no weights": (lambda directory: (directory / WEIGHTS_FILE).unlink(), "No such file"),
    "half a description": (cut(AGENT_FILE, 200), "damaged"),
    "an empty description": (cut(AGENT_FILE, 0), "damaged"),
    "no text": (lambda directory: (directory / AGENT_FILE).write_bytes(b"\xff\xfe\x00"), "damaged"),
    "a list": (lambda directory: (directory / AGENT_FILE).write_text("[1, 2]"), "something else"),
    "another program's JSON": (lambda directory: (directory / AGENT_FILE).write_text('{"a": 1}'), "something else"),
    "half the weights": (cut(WEIGHTS_FILE, 500), "not what was written"),
    "one bit of the weights": (flip_a_bit, "not what was written"),
    "another agent's weights": (other_weights, "not what was written"),
    "an older format": (change_json(format="gym_baselines agent 1"), "gym_baselines agent 1"),
    "an unknown space": (change_json(action_space={"type": "Graph"}), "Graph"),
    "a space without its size": (change_json(action_space={"type": "Discrete"}), "damaged"),
    "another network": (change_json(network={"hidden_sizes": [3]}), "damaged"),
    "an unknown setting": (change_json(network={"layers": 3}), "layers"),
    "an unknown number type": (change_json(dtype="float7"), "float7"),
    "an unknown environment option": (change_json(settings={"environment": {"colour": 1}}), "colour"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_or_foreign_agent_is_refused_with_its_folder(case, tmp_path):
    damage, named = DAMAGES[case]
    agent().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        Agent.load(tmp_path)
    assert named in str(error.value) and (str(tmp_path) in str(error.value)), str(error.value)


def test_a_folder_that_is_not_there_or_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.*output_dir"):
        Agent.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        agent().save(tmp_path / "file")
    with pytest.raises(InputError, match="file"):
        Agent.load(tmp_path / "file")


def test_a_description_says_what_was_computed_and_not_where_it_was_written(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path), resume=True, progress_bar=False)
    described = json.loads(json.dumps(describe(config)))
    assert described == json.loads(json.dumps(describe(TrainConfig())))
    assert described["ppo"]["gamma"] == 0.99 and described["network"]["hidden_sizes"] == [64, 64]


# --- spaces as JSON ---


SPACES = [
    VECTOR,
    PICTURES,
    BOUNDED,
    Box(0, 1, (), np.float64),
    Box(np.array([-np.inf, 0.1]), np.array([1 / 3, np.inf]), dtype=np.float64),
    Box(-(2**62) - 1, 2**62 + 1, (2,), np.int64),
    Discrete(4),
    Discrete(4, start=-3),
    Discrete(4, dtype=np.int32),
    MultiDiscrete([3, 2], start=[1, -1]),
    MultiDiscrete([[3, 2], [5, 1]], dtype=np.int32),
    MultiBinary(4),
    MultiBinary([2, 3]),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_space_survives_json_exactly(space):
    again = space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False)))
    assert again == space and again.dtype == space.dtype and again.shape == space.shape
    assert are_alike(again, space) and not are_alike(again, Discrete(99))
    if isinstance(space, Box):
        assert np.array_equal(again.low, space.low) and np.array_equal(again.high, space.high)
    if isinstance(space, MultiDiscrete):
        assert np.array_equal(again.start, space.start)


def test_spaces_of_other_choices_or_shapes_are_not_alike_and_other_bounds_do_not_matter():
    assert are_alike(Box(-1, 1, (2,)), Box(-5, 5, (2,), np.float64))
    assert are_alike(Discrete(3), Discrete(3, dtype=np.int32))
    for one, other in (
        (Box(-1, 1, (2,)), Box(-1, 1, (3,))),
        (Discrete(3), Discrete(3, start=1)),
        (MultiDiscrete([2, 3]), MultiDiscrete([3, 2])),
        (MultiBinary(3), MultiDiscrete([2, 2, 2])),
    ):
        assert not are_alike(one, other)
