"""The algorithms through the public classes: which of them are the same, what is learnt, and daily use."""

from functools import cache, partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from gym_baselines import A2C, PPO, TRPO, PPOPenalty, Reinforce, evaluate
from gym_baselines.agent import Agent
from gym_baselines.callbacks import Evaluate, SaveEvery, StopAfter, StopAtReturn
from rlhf.errors import InputError
from tests.controls import refute
from tests.gym_baselines.environments import Identity

CLASSES = [PPO, PPOPenalty, A2C, Reinforce, TRPO]
SMALL = {"n_envs": 2, "n_steps": 16, "progress_bar": False, "lr_schedule": "constant", "autoreset": "same_step"}
BATCH = {PPO: {"batch_size": 16, "n_epochs": 2}, PPOPenalty: {"batch_size": 16, "n_epochs": 2}}
BATCH |= {TRPO: {"batch_size": 16, "n_epochs": 2}, A2C: {}, Reinforce: {}}


def small(cls, env=Identity, **settings):
    return cls(env, **{**SMALL, **BATCH[cls], **settings})


def weights(learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.policy.state_dict().items()}


def gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


class Aim(gym.Env):
    """Name the number that is shown, with one of your own: the reward is minus the squared distance, 6 steps long."""

    observation_space = Box(-1, 1, (2,), np.float64)
    action_space = Box(-2, 2, (2,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.shown = 0
        return self._show(), {}

    def step(self, action):
        reward, self.shown = -float(((action - self.aim) ** 2).sum()), self.shown + 1
        return self._show(), reward, self.shown == 6, False, {}

    def _show(self):
        self.aim = self.np_random.uniform(-1, 1, 2)
        return self.aim


# --- A2C is a special case of PPO (Huang et al. 2022, arXiv 2205.09123) ---

A_SPECIAL_CASE = {
    "n_epochs": 1,
    "batch_size": None,
    "normalize_advantages": "none",
    "gae_lambda": 1.0,
    "optimizer": "rmsprop",
    "n_steps": 5,
    "learning_rate": 7e-4,
}
SHARED = {"n_envs": 3, "seed": 4, "progress_bar": False, "entropy_coef": 0.01, "gamma": 0.98, "lr_schedule": "constant"}


@cache
def a2c_weights(env) -> dict[str, torch.Tensor]:
    learner = A2C(env, **SHARED).learn(120)
    assert learner.config.ppo.surrogate == "score"
    return weights(learner)


def check_a2c_is_ppo(env, **changes) -> None:
    """Eight updates, PPO's with its clip: one epoch at ratio 1 never meets it."""
    ppo = PPO(env, **{**A_SPECIAL_CASE, **changes}, **SHARED).learn(120)
    assert ppo.config.ppo.surrogate == "clipped"
    assert gap(a2c_weights(env), weights(ppo)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("env", ["CartPole-v1", Aim], ids=["CartPole", "Gaussian"])
def test_a2c_is_ppo_with_one_epoch_over_the_whole_rollout(double, env):
    check_a2c_is_ppo(env)
    assert a2c_weights(env)["policy_net.0.weight"].dtype == torch.float64


@pytest.mark.parametrize(
    "changes",
    [
        *({"n_epochs": 2}, {"gae_lambda": 0.95}, {"normalize_advantages": "batch"}),
        *({"optimizer": "adam"}, {"value_coef": 0.5}, {"learning_rate": 1e-12}),
    ],
    ids=str,
)
def test_the_check_of_a2c_notices_another_setting(double, changes):
    refute(lambda changes: check_a2c_is_ppo("CartPole-v1", **changes), changes)


# --- learning goes on ---


@pytest.mark.parametrize("cls", CLASSES)
def test_learning_in_two_parts_is_learning_at_once(cls):
    """64 steps are two rollouts; optimizer, environments, draws and coefficients go on where they were."""
    parts = small(cls, seed=2).learn(64)
    assert parts.num_timesteps == 64
    assert parts.learn(96) is parts and parts.num_timesteps == 160
    whole = small(cls, seed=2).learn(160)
    assert gap(weights(parts), weights(whole)) == 0
    assert gap(weights(parts), weights(small(cls, seed=3).learn(1))) > 1e-3


def test_steps_add_up_to_at_least_what_was_asked_and_at_most_a_rollout_more():
    learner = small(PPO).learn(50)
    assert learner.num_timesteps == 64
    assert learner.learn(1).num_timesteps == 96


def test_the_learning_rate_falls_to_zero_over_each_call_anew():
    seen: list[float] = []
    learner = small(PPO, lr_schedule="linear", learning_rate=0.01)
    for _ in range(2):
        learner.learn(128, callbacks=lambda agent, metrics: seen.append(metrics["learning_rate"]))
    assert seen == pytest.approx([0.01, 0.0075, 0.005, 0.0025] * 2, abs=1e-12)


def test_a_call_needs_at_least_one_step():
    for steps in (0, -3):
        with pytest.raises(InputError, match=f"total_steps must be at least 1, got {steps}"):
            small(PPO).learn(steps)


def test_without_a_number_the_settings_say_how_long():
    assert small(PPO, total_steps=64).learn().num_timesteps == 64


@pytest.mark.parametrize("how", ["load", "close"])
def test_a_learner_that_was_loaded_or_closed_learns_as_many_steps_as_it_is_told(how, tmp_path):
    learner = small(PPO).learn(64)
    if how == "load":
        learner.save(tmp_path)
        learner = PPO.load(tmp_path, env=Identity, progress_bar=False)
    else:
        learner.close()
    before = weights(learner)
    learner.learn(64)
    assert learner.num_timesteps == 128 and gap(weights(learner), before) > 0


# --- what is learnt: naming a symbol, 10 per episode; chance gives 3.3 ---

FAST = {
    PPO: {"n_steps": 32, "batch_size": 64, "n_epochs": 4, "learning_rate": 1e-2},
    PPOPenalty: {"n_steps": 32, "batch_size": 64, "n_epochs": 4, "learning_rate": 1e-2},
    A2C: {"n_steps": 10, "learning_rate": 5e-3},
    Reinforce: {"n_steps": 20, "learning_rate": 2e-2},
    TRPO: {"n_steps": 64, "batch_size": 128, "n_epochs": 1, "max_kl": 0.1, "damping": 0.01},
}


def learnt(cls, **changes) -> Agent:
    settings = {"n_envs": 4, "progress_bar": False, "seed": 1, **FAST[cls], **changes}
    return cls(Identity, **settings).learn(2400 if cls is A2C else 1200).agent


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_learns(cls):
    assert evaluate(learnt(cls), episodes=20).mean >= 9


def test_reinforce_learns_without_a_baseline():
    assert evaluate(learnt(Reinforce, baseline="none"), episodes=20).mean >= 9


def test_without_a_step_size_nothing_is_learnt():
    """What the same evaluation gives when learning is broken."""
    assert evaluate(learnt(A2C, learning_rate=1e-12, n_steps=60), episodes=20).mean < 7


# --- predict, save, load ---


@pytest.fixture(scope="module")
def trained() -> PPO:
    return small(PPO, seed=5).learn(160)


def test_predict_takes_one_observation_or_many(trained):
    symbols = np.eye(3, dtype=np.float32)
    many = trained.predict(symbols)
    assert many.shape == (3,) and np.issubdtype(many.dtype, np.integer)
    assert [int(trained.predict(symbol)) for symbol in symbols] == many.tolist()
    with torch.no_grad():
        assert many.tolist() == trained.policy.greedy(torch.from_numpy(symbols)).tolist()


def test_sampled_actions_are_a_function_of_seed_and_step_and_differ_between_calls_if_no_step_is_given(trained):
    shown = np.tile(np.eye(3, dtype=np.float32)[0], (200, 1))

    def draw(**options):
        return trained.predict(shown, deterministic=False, **options).tolist()

    assert draw(seed=1, step=3) == draw(seed=1, step=3) != draw(seed=2, step=3)
    assert draw(seed=1, step=3) != draw(seed=1, step=4)
    assert draw() != draw()


def test_before_learning_there_is_nothing_to_ask():
    for ask in (lambda p: p.predict(np.zeros(3)), lambda p: p.policy, lambda p: p.save("nowhere")):
        with pytest.raises(InputError, match=r"call learn first|learn"):
            ask(small(PPO))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_loaded_learner_predicts_what_the_saved_one_does(cls, tmp_path):
    learner = small(cls, seed=3).learn(32)
    learner.save(tmp_path)
    loaded = cls.load(tmp_path)
    assert gap(weights(loaded), weights(learner)) == 0
    assert loaded.num_timesteps == learner.num_timesteps
    symbols = np.eye(3, dtype=np.float32)
    assert loaded.predict(symbols).tolist() == learner.predict(symbols).tolist()
    ours, theirs = (vars(each.config) for each in (loaded, learner))
    assert {name for name in ours if ours[name] != theirs[name]} <= {"progress_bar"}
    assert evaluate(loaded, Identity, episodes=5).returns.tolist() == evaluate(learner, episodes=5).returns.tolist()


def test_a_round_number_of_steps_may_be_a_float_as_in_learn_1e6(tmp_path):
    small(PPO).learn(64.0).save(tmp_path)
    assert PPO.load(tmp_path).num_timesteps == 64


def test_settings_can_be_changed_when_loading(trained, tmp_path):
    trained.save(tmp_path)
    assert PPO.load(tmp_path, learning_rate=0.5, n_epochs=7).config.update.num_epochs == 7
    with pytest.raises(InputError, match="learning_rte"):
        PPO.load(tmp_path, learning_rte=0.5)


def test_an_agent_of_another_algorithm_is_refused_by_name(trained, tmp_path):
    trained.save(tmp_path)
    with pytest.raises(InputError, match="trained by ppo, not by a2c"):
        A2C.load(tmp_path)
    assert isinstance(Agent.load(tmp_path), Agent)
    with pytest.raises(InputError, match="does not hold an agent"):
        PPO.load(tmp_path / "elsewhere")


# --- what can be passed in ---


def features(space: gym.Space) -> nn.Module:
    return nn.Sequential(nn.Linear(space.shape[0], 8), nn.Tanh())


def test_own_features_take_the_place_of_the_hidden_layers_and_are_learnt(tmp_path):
    learner = small(PPO, features=features, seed=1).learn(32)
    before = weights(learner)
    learner.learn(64)
    changed = [name for name, tensor in weights(learner).items() if not torch.equal(tensor, before[name])]
    assert {name.split(".")[0] for name in changed} == {"body", "policy_net", "value_net"}
    torch.manual_seed(123)  # the seed alone decides, whatever the global generator's state
    assert gap(weights(small(PPO, features=features, seed=1).learn(96)), weights(learner)) == 0

    learner.save(tmp_path)
    loaded = PPO.load(tmp_path, features=features)
    assert gap(weights(loaded), weights(learner)) == 0
    with pytest.raises(InputError, match="features"):
        PPO.load(tmp_path)


def test_a_vector_environment_says_itself_how_many_it_holds():
    envs = SyncVectorEnv([Identity] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    learner = PPO(envs, n_steps=16, batch_size=48, n_epochs=1, progress_bar=False).learn(96)
    assert learner.config.num_envs == 3 and learner.num_timesteps == 96
    assert evaluate(learner, Identity, episodes=3).returns.shape == (3,)


def test_evaluation_of_a_vector_environment_is_refused_before_training():
    envs, updates = SyncVectorEnv([Identity] * 2, autoreset_mode=AutoresetMode.SAME_STEP), []
    learner = small(PPO, envs, eval_every=64)
    with pytest.raises(InputError):
        learner.learn(64, callbacks=lambda agent, metrics: updates.append(metrics))
    assert learner.num_timesteps == 0


def test_a_partial_or_a_lambda_is_a_factory_too():
    for env in (partial(Identity), lambda: Identity()):
        assert small(PPO, env).learn(32).num_timesteps == 32


def test_evaluation_during_training_plays_the_factorys_environment():
    seen: list[float] = []

    def look(agent, metrics):
        seen.append(metrics.get("eval/episode_return"))

    small(PPO, eval_every=64, eval_episodes=3).learn(128, callbacks=[look])
    assert [value is not None for value in seen] == [False, True, False, True]


# --- callbacks ---


def test_a_callback_that_returns_false_ends_the_training_and_none_does_not():
    calls: list[int] = []

    def watch(agent, metrics):
        calls.append(agent.environment_steps)
        return None if len(calls) < 3 else False

    learner = small(PPO).learn(1000, callbacks=watch)
    assert calls == [32, 64, 96] and learner.num_timesteps == 96
    learner.learn(32)  # and it can go on
    assert learner.num_timesteps == 128


def test_a_callback_may_return_numpys_false():
    assert small(PPO).learn(96, callbacks=lambda agent, metrics: np.float64(1) < 0).num_timesteps == 32


def test_all_callbacks_are_called_even_if_the_first_one_stops():
    calls: list[str] = []
    small(PPO).learn(320, callbacks=[lambda *_: False, lambda *_: calls.append("second")])
    assert calls == ["second"]


def test_training_stops_after_so_many_seconds_or_at_a_return():
    assert small(PPO).learn(1000, callbacks=StopAfter(0)).num_timesteps == 32
    agent = SimpleNamespace()
    stop = StopAtReturn(5.0)
    assert stop(agent, {}) and stop(agent, {"episode_return": 4.9})
    assert not stop(agent, {"episode_return": 5.0})


def test_evaluate_plays_when_due_keeps_the_best_and_stops(tmp_path):
    best = tmp_path / "best"
    watch = Evaluate(48, episodes=4, best_dir=best)
    learner = small(PPO, seed=1).learn(160, callbacks=watch)
    assert [steps for steps, _ in watch.history] == [64, 96, 160]  # the first update at or after 48, 96 and 144
    assert len(watch.history[-1][1].returns) == 4
    top = max(range(3), key=lambda i: (watch.history[i][1].mean, -i))
    assert Agent.load(best).environment_steps == watch.history[top][0]
    stop = Evaluate(32, episodes=2, stop_at=0.0)
    assert small(PPO).learn(1000, callbacks=stop).num_timesteps == 32
    assert evaluate(learner, episodes=4).returns.tolist() == watch.history[-1][1].returns.tolist()


def test_save_every_keeps_a_folder_per_point_and_does_not_disturb_the_training(tmp_path):
    learner = small(PPO).learn(128, callbacks=[SaveEvery(64, tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["128", "64"]
    assert gap(Agent.load(tmp_path / "128").policy.state_dict(), weights(learner)) == 0
    assert gap(weights(small(PPO).learn(128)), weights(learner)) == 0


def test_a_callback_that_is_due_every_zero_steps_is_refused(tmp_path):
    with pytest.raises(InputError, match="every must be at least 1"):
        Evaluate(0)
    with pytest.raises(InputError, match="every must be at least 1"):
        SaveEvery(0, tmp_path)


def test_the_error_of_a_callback_reaches_the_user_and_leaves_the_learner_usable():
    def fail(agent, metrics):
        raise RuntimeError("mine")

    learner = small(PPO)
    with pytest.raises(RuntimeError, match="mine"):
        learner.learn(96, callbacks=fail)
    assert learner.learn(32).num_timesteps == 64
