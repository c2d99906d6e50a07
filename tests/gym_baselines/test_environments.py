"""Environments: their start states, their exact restoring, what steps and infos mean in each mode, what is refused."""

import sys
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from gym_baselines.envs.environments import (
    EVALUATION,
    EnvironmentConfig,
    action_masks,
    as_vector_env,
    autoreset_mode,
    check_environment,
    make_env,
    make_vector_env,
    replay,
    replay_records,
    replays,
    reports_games,
)
from rlhf.errors import InputError, TrainingError
from tests.controls import refute
from tests.gym_baselines.environments import Clock

MODES = ["next_step", "same_step", "disabled"]
ROWS = (4, 5)  # global indices: not those of the places in this process


def play(envs, steps, seed):
    """Everything that `steps` random steps answer, final observations included. The caller of DISABLED resets."""
    actions, space = np.random.default_rng(seed), envs.single_action_space
    chosen = np.empty((envs.num_envs, *space.shape), space.dtype)  # filled anew for each step: nobody may keep it
    answers = []
    for _ in range(steps):
        if isinstance(space, Discrete):
            chosen[:] = actions.integers(space.n, size=envs.num_envs)
        else:
            chosen[:] = actions.uniform(space.low, space.high, chosen.shape)
        observations, rewards, terminated, truncated, infos = envs.step(chosen)
        ends = terminated | truncated
        finals = [infos["final_obs"][row].tolist() for row in ends.nonzero()[0]] if "final_obs" in infos else []
        answers.append((observations.tolist(), rewards.tolist(), terminated.tolist(), truncated.tolist(), finals))
        if autoreset_mode(envs) == AutoresetMode.DISABLED and ends.any():
            answers.append(envs.reset(options={"reset_mask": ends})[0].tolist())
    return answers


# --- replay ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name, limit, counts",
    [
        ("CartPole-v1", None, [0, 1, 2, 57, 130]),
        ("CartPole-v1", 1, [3, 97, 2, 40]),  # many episodes, and back and forth between them
        ("Pendulum-v1", 7, [5, 7, 8, 23]),  # the limit falls on the interruption, and just before it
        ("LunarLander-v3", None, [60, 130]),
        ("Hopper-v5", None, [24, 45]),
    ],
)
def test_replayed_environments_go_on_as_if_never_interrupted(name, limit, counts, mode):
    """To the last bit: observations, rewards, ends, final observations, and the start states of later episodes."""
    if name != "CartPole-v1" and name != "Pendulum-v1":
        pytest.importorskip("mujoco" if name == "Hopper-v5" else "Box2D")
    options = EnvironmentConfig(autoreset=mode, max_episode_steps=limit)
    fresh = make_vector_env(name, rows=ROWS, seed=1, options=options)
    for count in counts:
        envs = make_vector_env(name, rows=ROWS, seed=1, options=options)
        now = envs.reset()[0].tolist()
        played = play(envs, count, seed=2)
        if played:
            now = played[-1] if mode == "disabled" and isinstance(played[-1], list) else played[-1][0]
        records = replay_records(envs, ROWS)
        assert replay(fresh, records)[0].tolist() == now
        assert play(fresh, 60, seed=3) == play(
            envs, 60, seed=3
        )  # `fresh` has a past of its own from the second round on


def test_a_process_for_each_environment_gives_the_same_and_replays_too():
    for mode in MODES:
        answers = []
        for kind in ("sync", "async"):
            options = EnvironmentConfig(vectorization=kind, autoreset=mode, max_episode_steps=11)
            envs, fresh = (make_vector_env("CartPole-v1", rows=ROWS, seed=0, options=options) for _ in range(2))
            envs.reset()
            answers.append(play(envs, 35, seed=0))
            replay(fresh, replay_records(envs, ROWS))
            answers.append(play(envs, 20, seed=1))
            assert play(fresh, 20, seed=1) == answers[-1]
            envs.close(), fresh.close()
        assert answers[:2] == answers[2:]


def test_a_record_survives_being_written_as_numbers():
    """Lists, as JSON gives them back, are as good as the arrays: float32 actions too."""
    for name in ("CartPole-v1", "Pendulum-v1"):
        envs, fresh = (make_vector_env(name, rows=ROWS, seed=0) for _ in range(2))
        envs.reset()
        play(envs, 30, seed=0)
        records = replay_records(envs, ROWS)
        listed = {row: {**record, "actions": record["actions"].tolist()} for row, record in records.items()}
        replay(fresh, listed)
        assert play(fresh, 40, seed=1) == play(envs, 40, seed=1)


class Forgetful(Clock):
    """Not a function of its seed and actions: it draws from NumPy's global generator."""

    def step(self, action):
        observation, *rest = super().step(action)
        return observation + np.random.random(), *rest


def test_an_environment_that_does_not_replay_shows_it_in_the_observation():
    def check(make):
        envs, fresh = (make_vector_env(make, rows=ROWS, seed=0) for _ in range(2))
        envs.reset()
        now = play(envs, 9, seed=0)[-1][0]
        assert replay(fresh, replay_records(envs, ROWS))[0].tolist() == now

    check(Clock)
    refute(check, Forgetful)


def test_the_end_of_a_replayed_episode_is_still_followed_by_a_step_that_only_resets():
    """Clock with limit 3, interrupted on its end: the next step gives observation 0 and reward 0, and no action counts."""
    envs, fresh = (make_vector_env(partial(Clock, limit=3), rows=[0], seed=0) for _ in range(2))
    envs.reset()
    assert [answer[0] for answer in play(envs, 3, seed=0)] == [[[1.0]], [[2.0]], [[3.0]]]
    assert replay(fresh, replay_records(envs, [0]))[0].tolist() == [[3.0]]
    assert replay_records(fresh, [0])[0]["actions"].shape == (3,)  # a second interruption at once loses nothing
    after = play(fresh, 4, seed=1)
    assert [answer[0] for answer in after] == [[[0.0]], [[1.0]], [[2.0]], [[3.0]]]
    assert [answer[1] for answer in after] == [[0.0], [1.0], [1.0], [1.0]]
    assert [answer[3] for answer in after] == [[False], [False], [False], [True]]
    assert len(replay_records(fresh, [0])[0]["actions"]) == 3  # the ghost's action is none of them


# --- start states ---


def test_modes_make_and_rows_do_not_change_what_an_episode_is():
    """Start states of the first 40 episodes of a row, by each mode, alone or beside others: the same ones."""

    def starts(rows, mode):
        options = EnvironmentConfig(autoreset=mode, max_episode_steps=1)
        envs = make_vector_env("CartPole-v1", rows=rows, seed=7, options=options)
        place = list(rows).index(3)
        found = [envs.reset()[0][place].tolist()]
        for _ in range(40 if mode != "next_step" else 80):
            observations, _, terminated, truncated, _ = envs.step(np.zeros(len(rows), dtype=np.int64))
            if mode == "disabled":
                observations, _ = envs.reset(options={"reset_mask": terminated | truncated})
            if mode != "next_step" or not (terminated | truncated)[place]:
                found.append(observations[place].tolist())
        return found

    expected = starts([3], "next_step")
    assert len({tuple(start) for start in expected}) == 41
    for mode in MODES:
        assert starts([1, 3, 8], mode) == expected


def test_evaluation_has_start_states_of_its_own():
    def start(**kw):
        return tuple(make_env("CartPole-v1", **kw).reset()[0].tolist())

    assert (
        len(
            {start(seed=0, row=0), start(seed=0, row=0, purpose=EVALUATION), start(seed=0, row=1), start(seed=1, row=0)}
        )
        == 4
    )


# --- settings ---


def test_a_limit_truncates_an_id_and_a_factory_alike():
    for env in ("CartPole-v1", lambda: gym.make("CartPole-v1")):
        made = make_env(env, seed=0, row=0, options=EnvironmentConfig(max_episode_steps=5))
        made.reset()
        assert [made.step(t % 2)[3] for t in range(5)] == [False] * 4 + [True]


def test_frames_are_stacked_and_observations_flattened():
    stacked = make_env(partial(Clock, limit=9), seed=0, row=0, options=EnvironmentConfig(frame_stack=3))
    stacked.reset()
    stacked.step(0)
    assert stacked.step(0)[0][:, 0].tolist() == [0.0, 1.0, 2.0]
    one_hot, _ = check_environment("FrozenLake-v1", EnvironmentConfig(flatten=True))
    assert isinstance(one_hot, Box) and one_hot.shape == (16,)


def test_a_render_mode_is_for_evaluation_alone():
    def shown():
        return gym.make("Pendulum-v1", render_mode="rgb_array")

    for env, render_mode in ((shown, None), ("Pendulum-v1", "rgb_array")):
        with pytest.raises(InputError, match="render_mode='rgb_array'"):
            make_env(env, seed=0, row=0, render_mode=render_mode)
        made = make_env(env, seed=0, row=0, purpose=EVALUATION, render_mode=render_mode)
        assert made.render_mode == "rgb_array"
    assert make_env("Pendulum-v1", seed=0, row=0).render_mode is None


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"vectorization": "threads"}, ["vectorization", "threads", "async"]),
        ({"autoreset": "never"}, ["autoreset", "never", "disabled"]),
        ({"max_episode_steps": 0}, ["max_episode_steps", "0"]),
        ({"frame_stack": 0}, ["frame_stack", "0"]),
        ({"atari": True, "sticky_actions": 1.5}, ["sticky_actions", "1.5"]),
        ({"sticky_actions": 0.25}, ["sticky_actions", "atari"]),
        ({"vectorization": "envpool", "autoreset": "same_step"}, ["envpool", "next_step", "same_step"]),
        ({"vectorization": "envpool", "frame_stack": 2}, ["envpool", "frame_stack", "2"]),
        ({"vectorization": "envpool", "flatten": True}, ["envpool", "flatten"]),
    ],
)
def test_a_bad_setting_is_named_with_its_value(settings, named):
    with pytest.raises(InputError) as error:
        EnvironmentConfig(**settings)
    assert all(part in str(error.value) for part in named), str(error.value)


# --- what cannot be trained on ---


class OldReset(Clock):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed, options=options)[0]


class WrongShape(Clock):
    observation_space = Box(0, 1, (3,), np.float64)


class NoSeed(Clock):
    def reset(self):
        return super().reset()


class SeenAsDict(Clock):
    observation_space = Dict({"time": Discrete(3)})


class Speaks(Clock):
    action_space = gym.spaces.Text(5)


def broken():
    raise ZeroDivisionError("no luck")


BAD_ENVIRONMENTS = {
    "unknown": ("CartPol-v1", ["CartPol-v1", "CartPole-v1"]),
    "unknown version": ("CartPole-v9", ["CartPole-v9", "CartPole-v1"]),
    "unknown module": ("nowhere:Env-v0", ["nowhere:Env-v0"]),
    "a factory that fails": (broken, ["ZeroDivisionError", "no luck"]),
    "a factory of nothing": (lambda: None, ["None", "gymnasium.Env"]),
    "a factory of a vector environment": (lambda: SyncVectorEnv([Clock]), ["SyncVectorEnv", "gymnasium.Env"]),
    "an environment": (Clock(), ["Clock", "function"]),
    "a number": (3, ["3", "function"]),
    "a reset without info": (OldReset, ["reset", "(observation, info)"]),
    "a reset without seed": (NoSeed, ["reset", "seed", "TypeError"]),
    "observations of another shape": (WrongShape, ["(1,)", "(3,)"]),
    "Dict observations": (SeenAsDict, ["Dict('time'", "flatten"]),
    "Text actions": (Speaks, ["Text(", "MultiDiscrete"]),
}


@pytest.mark.parametrize("case", BAD_ENVIRONMENTS, ids=str)
def test_what_cannot_be_trained_on_is_refused_by_name(case):
    env, named = BAD_ENVIRONMENTS[case]
    for refused in (check_environment, partial(make_vector_env, rows=[0], seed=0)):
        with pytest.raises(InputError) as error:
            refused(env)
        assert all(part in str(error.value) for part in named), str(error.value)


def test_a_function_that_gives_the_same_environment_again_is_refused():
    one = Clock()
    with pytest.raises(InputError, match="same environment twice"):
        make_vector_env(lambda: one, rows=[0, 1], seed=0)
    make_vector_env(lambda: one, rows=[0], seed=0)


@pytest.mark.parametrize(
    "name, missing, modules, command",
    [
        ("LunarLander-v3", "Box2D", "gymnasium.envs.box2d", "pip install 'gymnasium[box2d]'"),
        ("Hopper-v5", "mujoco", "gymnasium.envs.mujoco", "pip install 'gymnasium[mujoco]'"),
        ("ALE/Pong-v5", "ale_py", "ale_py", "pip install ale-py"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, missing, modules, command, monkeypatch):
    for module in [module for module in sys.modules if module.startswith(modules)]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError) as error:
        check_environment(name)
    assert command in str(error.value), str(error.value)


def test_a_process_without_environments_is_refused():
    with pytest.raises(InputError, match="num_envs"):
        make_vector_env("CartPole-v1", rows=[], seed=0)


# --- vector environments of the user's own ---


def test_a_given_vector_environment_is_seeded_from_the_run_and_does_not_replay():
    def start(make, seed, row=0):
        envs = as_vector_env(make(), seed=seed, first_row=row)
        assert not replays(envs) and not reports_games(envs)
        return envs.reset()[0].tolist()

    sync = partial(SyncVectorEnv, [partial(gym.make, "CartPole-v1")] * 2)
    for make in (sync, partial(gym.make_vec, "CartPole-v1", num_envs=2)):
        assert start(make, 0) == start(make, 0)
        assert start(make, 0) != start(make, 1) and start(make, 0) != start(make, 0, 2)


def test_a_given_vector_environment_must_fit_the_run():
    envs = SyncVectorEnv([Clock] * 2)
    assert make_vector_env(envs, rows=[0, 1], seed=0).num_envs == 2
    with pytest.raises(InputError, match=r"holds 2 .* play 3"):
        make_vector_env(envs, rows=range(3), seed=0)
    for given, named in ((object(), "VectorEnv"), (Clock(), "not a vector environment")):
        with pytest.raises(InputError, match=named):
            as_vector_env(given)
    with pytest.raises(InputError, match="render_mode='rgb_array'"):
        as_vector_env(gym.make_vec("Pendulum-v1", num_envs=1, render_mode="rgb_array"))


@pytest.mark.parametrize("mode", [None, "Eventually", "NextStep"])
def test_an_autoreset_mode_that_is_not_known_is_refused_by_name(mode):
    envs = SyncVectorEnv([Clock])
    for known in AutoresetMode:
        envs.metadata["autoreset_mode"] = known
        assert autoreset_mode(envs) == known
    envs.metadata["autoreset_mode"] = mode
    with pytest.raises(InputError, match=rf"autoreset_mode.*{mode}"):
        autoreset_mode(envs)
    del envs.metadata["autoreset_mode"]
    with pytest.raises(InputError, match="autoreset_mode"):
        as_vector_env(envs)


# --- EnvPool ---


def pooled(name="CartPole-v1", rows=range(3), seed=0, **settings):
    pytest.importorskip("envpool")
    options = EnvironmentConfig(vectorization="envpool", **settings)
    return make_vector_env(name, rows=rows, seed=seed, options=options)


def test_an_envpool_restarts_in_the_step_after_an_end():
    """The ending step gives the last observation of CartPole's own arithmetic; the one after ignores its action."""
    envs = pooled(max_episode_steps=3)
    assert autoreset_mode(envs) == AutoresetMode.NEXT_STEP and not replays(envs)
    observations, _ = envs.reset()
    for step in range(12):
        before = observations
        observations, rewards, terminated, truncated, _ = envs.step(np.ones(3, dtype=np.int64))
        ghost = step % 4 == 3
        assert truncated.tolist() == [step % 4 == 2] * 3 and not terminated.any()
        assert rewards.tolist() == [0.0 if ghost else 1.0] * 3
        moved = before[:, 0] + 0.02 * before[:, 1]  # Euler: position += tau * velocity
        assert np.allclose(observations[:, 0], moved, rtol=0, atol=1e-7) == (not ghost)
        if ghost:
            assert np.abs(observations).max() <= 0.05  # where CartPole starts


def test_the_rows_of_an_envpool_are_the_same_whoever_plays_them():
    whole, part, again = (pooled(rows=rows).reset()[0].tolist() for rows in (range(4), [2, 3], range(4)))
    assert part == whole[2:] and again == whole and len({tuple(row) for row in whole}) == 4
    assert pooled(seed=1).reset()[0].tolist() != whole[:3]


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "Hopper-v5", "LunarLander-v3"])
def test_an_envpool_announces_gymnasiums_spaces_and_takes_their_actions(name):
    """EnvPool's own differ (LunarLander's bounds, Hopper's precision), and an agent could not be evaluated elsewhere."""
    pytest.importorskip("mujoco" if name == "Hopper-v5" else "Box2D" if name == "LunarLander-v3" else "numpy")
    envs = pooled(name)
    assert check_environment(name) == (envs.single_observation_space, envs.single_action_space)
    envs.reset()
    observations, rewards, *_ = envs.step(envs.action_space.sample())
    assert observations.shape == envs.observation_space.shape and rewards.dtype == np.float64


def test_what_an_envpool_cannot_do_is_refused(monkeypatch):
    envpool = pytest.importorskip("envpool")
    with pytest.raises(InputError, match=r"CartPol-v1.*CartPole-v1"):
        pooled("CartPol-v1")
    with pytest.raises(InputError, match="function"):
        pooled(Clock)
    with pytest.raises(InputError, match="replay"):
        pooled().reset(options={"replay": {}})
    with pytest.raises(InputError, match="env_type='gymnasium'"):
        as_vector_env(envpool.make("CartPole-v1", env_type="dm", num_envs=2))
    with pytest.raises(InputError, match="batch_size"):
        as_vector_env(envpool.make("CartPole-v1", env_type="gymnasium", num_envs=3, batch_size=2))
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(InputError, match="pip install envpool"):
        make_vector_env("CartPole-v1", rows=[0], seed=0, options=EnvironmentConfig(vectorization="envpool"))


# --- action masks ---


class Masked(Clock):
    """Only action t modulo 3 is allowed at time t; in the last observation, none is."""

    action_space = Discrete(3)

    def reset(self, **kw):
        return super().reset(**kw)[0], self.info()

    def step(self, action):
        assert action == self.t % 3
        *answer, _ = super().step(action)
        return *answer, self.info()

    def info(self):
        return {"action_mask": np.eye(3, dtype=np.int8)[self.t % 3] * (self.t != self.limit)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_masks_belong_to_the_coming_action(mode, kind):
    """Limits 4 and 5, so that rows end apart from each other. The environments refuse what is not allowed."""
    limits = iter([4, 4, 4, 5] if kind == "async" else [4, 4, 5])  # probes are made first
    options = EnvironmentConfig(vectorization=kind, autoreset=mode, action_masks=True)
    envs = make_vector_env(lambda: Masked(limit=next(limits)), rows=[0, 1], seed=0, options=options)
    _, infos = envs.reset()
    ends = np.zeros(2, dtype=bool)
    masks = action_masks(infos, 3, ends)
    for _ in range(30):
        _, _, terminated, truncated, infos = envs.step(masks.argmax(1))
        ends = terminated | truncated
        masks = action_masks(infos, 3, ends)
        if mode == "disabled" and ends.any():
            _, infos = envs.reset(options={"reset_mask": ends})
            masks = action_masks(infos, 3, np.zeros(2, dtype=bool), previous=masks)
        assert (masks.sum(1) == np.where(ends & (mode == "next_step"), 3, 1)).all()
    envs.close()


def test_masks_that_are_missing_or_of_another_size_are_refused():
    options, running = EnvironmentConfig(action_masks=True), np.zeros(2, dtype=bool)

    class Continuous(Masked):
        action_space = Box(-1, 1, (2,))

    class TwoChoices(Masked):
        action_space = MultiDiscrete([3, 2])

    for env, named in ((Clock, "action_mask"), (Continuous, "no choices"), (TwoChoices, r"\(3,\).*\(5,\)")):
        with pytest.raises(InputError, match=named):
            check_environment(env, options)
    check_environment(Masked, options)
    both = {"action_mask": np.eye(2), "_action_mask": np.array([True, True])}
    assert action_masks(both, 2, running).tolist() == [[True, False], [False, True]]
    with pytest.raises(InputError, match=r"\(2,\).*\(3,\)"):
        action_masks(both, 3, running)
    with pytest.raises(InputError, match="environment 1 "):
        action_masks({**both, "_action_mask": np.array([True, False])}, 2, running)
    with pytest.raises(TrainingError, match="environment 1 "):
        action_masks({**both, "action_mask": np.array([[1, 0], [0, 0]])}, 2, running)
