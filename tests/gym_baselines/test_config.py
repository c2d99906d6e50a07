"""Settings: presets against the numbers they were published with, changes by name, and input that cannot work."""

import json
import re
from collections import Counter
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

import pytest

from gym_baselines import A2C, PPO, TRPO, PPOPenalty, Reinforce
from gym_baselines.config import ALIASES, TrainConfig, with_settings
from gym_baselines.envs.environments import EnvironmentConfig
from gym_baselines.measuring.zoo import ZOO
from gym_baselines.networks import NetworkConfig
from gym_baselines.presets import ALGORITHMS, PRESETS, is_tuned, preset
from rlhf.algorithms.ppo import PPOConfig
from rlhf.algorithms.trpo import TrustRegionConfig
from rlhf.commands.cli import from_plain
from rlhf.errors import InputError
from rlhf.runs.metrics import TABLE
from rlhf.settings import dotted
from rlhf.training.update import UpdateConfig


def leaves(config: TrainConfig) -> dict[str, object]:
    """Every setting under its own name, wherever it lives."""
    return {name.rpartition(".")[2]: value for name, value in dotted(asdict(config))}


def complete() -> TrainConfig:
    """A config in which every group is present."""
    return preset("CartPole-v1", "trpo")


# --- presets ---

SB3_PPO = {  # defaults of Stable-Baselines3's PPO, where the published settings are silent
    "n_envs": 1,
    "n_steps": 2048,
    "batch_size": 64,
    "n_epochs": 10,
    "learning_rate": 3e-4,
    "clip_range": 0.2,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "ent_coef": 0.0,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
    "normalize": False,
}
ATARI = {
    "n_timesteps": 1e7,
    "n_envs": 8,
    "n_steps": 128,
    "n_epochs": 4,
    "batch_size": 256,
    "learning_rate": "lin_2.5e-4",
    "clip_range": "lin_0.1",
    "vf_coef": 0.5,
    "ent_coef": 0.01,
}
PUBLISHED = {  # of our own presets
    **{env: ZOO[algorithm, env] for algorithm, env in ZOO if algorithm == "sb3_ppo" and env != "Pendulum-v1"},
    "ALE/Pong-v5": ATARI,
    "ALE/Breakout-v5": ATARI,
}
OURS = {"CartPole-v1": {"entropy_coef": 0.01}}
"""Where a preset says that it differs, and why."""


def scheduled(value: float | str) -> tuple[float, bool]:
    """The zoo's "lin_x": x at the start, 0 in the end."""
    return (float(value.removeprefix("lin_")), True) if isinstance(value, str) else (value, False)


def check_published(env: str, changes: dict[str, object]) -> None:
    published = {**SB3_PPO, **PUBLISHED[env]}
    learning_rate, falls = scheduled(published["learning_rate"])
    clip_range, clip_falls = scheduled(published["clip_range"])
    wanted = {
        "total_steps": published["n_timesteps"],
        "num_envs": published["n_envs"],
        "rollout_steps": published["n_steps"],
        "minibatch_size": published["batch_size"],
        "num_epochs": published["n_epochs"],
        "learning_rate": learning_rate,
        "lr_schedule": "linear" if falls else "constant",
        "clip_range": clip_range,
        "anneal_clip": clip_falls,
        "gamma": published["gamma"],
        "gae_lambda": published["gae_lambda"],
        "entropy_coef": published["ent_coef"],
        "value_coef": 2 * published["vf_coef"],  # ours weighs 0.5 (V - R)^2
        "max_grad_norm": published["max_grad_norm"],
        "normalize_observations": published["normalize"],
        "normalize_rewards": published["normalize"],
        "surrogate": "clipped",
        "baseline": "value",
        "normalize_advantages": "minibatch",
        "value_clip_range": None,
        "target_kl": None,
        "optimizer": "adam",
        "optimizer_eps": 1e-5,
        "hidden_sizes": (64, 64),
        "activation": "tanh",
        "penalty_coef": 0.0,
    }
    wanted |= OURS.get(env, {})
    found = {**leaves(preset(env)), **changes}
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("env", PUBLISHED)
def test_a_ppo_preset_holds_the_published_numbers(env):
    check_published(env, {})


@pytest.mark.parametrize("changes", [{"value_coef": 0.5}, {"lr_schedule": "constant"}, {"gae_lambda": 0.95}])
def test_the_check_of_the_numbers_notices(changes):
    with pytest.raises(AssertionError):
        check_published("CartPole-v1", changes)


def test_every_preset_of_ppo_is_published_or_known_to_be_ours():
    assert {env for env in PRESETS if is_tuned(env, "ppo")} == {*PUBLISHED, "Pendulum-v1"}


def test_the_other_presets_of_cartpole_hold_the_published_numbers():
    a2c = leaves(preset("CartPole-v1", "a2c"))
    wanted = {
        "num_envs": 8,
        "total_steps": 500_000,
        "entropy_coef": 0.0,
        "rollout_steps": 5,
        "learning_rate": 7e-4,
        "gamma": 0.99,
        "gae_lambda": 1.0,
        "value_coef": 1.0,
        "max_grad_norm": 0.5,
        "optimizer": "rmsprop",
        "optimizer_eps": 1e-5,
        "num_epochs": 1,
        "minibatch_size": None,
        "normalize_advantages": "none",
        "surrogate": "score",
    }
    published = {name: a2c[name] for name in wanted}
    published["gamma"] = a2c["gamma"]
    assert published == wanted
    trpo = leaves(preset("CartPole-v1", "trpo"))
    wanted = {
        "total_steps": 100_000,
        "minibatch_size": 512,
        "damping": 1e-3,
        "gamma": 0.99,
        "learning_rate": 1e-3,
        "num_epochs": 20,
        "max_kl": 0.01,
    }
    assert {name: trpo[name] for name in wanted} == wanted
    assert trpo["num_envs"] * trpo["rollout_steps"] == 2 * 512


def test_atari_presets_prepare_the_game_as_the_literature_does():
    found = leaves(preset("ALE/Pong-v5"))
    wanted = {"atari": True, "frame_stack": 4, "shared_trunk": True, "encoder": "auto", "sticky_actions": 0.0}
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_environment_has_valid_settings_for_every_algorithm(algorithm):
    for env in [*PRESETS, "SomethingElse-v0"]:
        config = preset(env, algorithm)
        assert (config.env, config.algorithm) == (env, algorithm)
        assert (config.trust_region is not None) == (algorithm == "trpo")
        assert config.whole_episodes == (algorithm == "reinforce")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_settings_that_were_saved_as_json_can_be_read_again(algorithm):
    config = preset("CartPole-v1", algorithm, seed=3, hidden_sizes=(32,))
    assert from_plain(TrainConfig, json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("env", PRESETS)
def test_the_minibatches_of_a_preset_are_all_of_one_size(env):
    for algorithm in PRESETS[env]:
        config = preset(env, algorithm)
        assert config.batch_size % (config.update.minibatch_size or config.batch_size) == 0


def test_a_preset_names_only_settings_that_exist():
    for settings in [*ALGORITHMS.values(), *(each for tuned in PRESETS.values() for each in tuned.values())]:
        assert settings.keys() <= leaves(complete()).keys() | {"trust_region"}


def test_changes_win_over_the_preset_and_the_preset_over_the_algorithm():
    assert preset("CartPole-v1").ppo.gae_lambda == 0.8
    assert preset("CartPole-v1", gae_lambda=0.9).ppo.gae_lambda == 0.9
    assert preset("CartPole-v1", n_steps=64).rollout_steps == 64
    assert preset("SomethingElse-v0").ppo.gae_lambda == TrainConfig().ppo.gae_lambda


def test_an_unknown_algorithm_is_refused_with_the_choices():
    with pytest.raises(InputError, match=r"ppo, ppo_penalty, a2c, reinforce, trpo.*'sac'"):
        preset("CartPole-v1", "sac")


# --- changing settings by name ---


def test_every_setting_has_a_name_of_its_own():
    """So a flat name means one setting; groups do not share names with settings either."""
    config = complete()
    count = Counter(name.rpartition(".")[2] for name, _ in dotted(asdict(config)))
    count.update(field.name for field in fields(config) if is_dataclass(getattr(config, field.name)))
    assert [name for name, times in count.items() if times > 1] == []
    assert not count.keys() & ALIASES.keys() and set(ALIASES.values()) <= count.keys()


@pytest.mark.parametrize("name", sorted(leaves(preset("CartPole-v1", "trpo"))))
def test_a_setting_is_changed_by_its_name_and_no_other_is(name):
    """Set to what it is already: nothing is lost on the way, whichever group it lives in."""
    config = complete()
    assert with_settings(config, **{name: leaves(config)[name]}) == config


CHANGES = {
    "learning_rate": 0.5,
    "clip_range": 0.3,
    "hidden_sizes": (8,),
    "max_episode_steps": 7,
    "num_epochs": 3,
    "max_kl": 0.5,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_by_name_changes_that_setting_alone(name):
    before = complete()
    after = with_settings(before, **{name: CHANGES[name]})
    differs = {key for key, value in leaves(after).items() if value != leaves(before)[key]}
    assert differs == {name} and leaves(after)[name] == CHANGES[name]


NAMES = {
    "n_envs": ("num_envs", 4),
    "n_steps": ("rollout_steps", 64),
    "n_epochs": ("num_epochs", 3),
    "batch_size": ("minibatch_size", 32),
    "ent_coef": ("entropy_coef", 0.1),
    "net_arch": ("hidden_sizes", (32, 16)),
    "total_timesteps": ("total_steps", 5),
    "clip_range_vf": ("value_clip_range", 0.1),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_stable_baselines3_that_mean_the_same_are_taken(name):
    ours, value = NAMES[name]
    assert ALIASES[name] == ours
    changed = with_settings(TrainConfig(), **{name: value})
    assert changed == with_settings(TrainConfig(), **{ours: value}) and leaves(changed)[ours] == value


def test_all_aliases_are_tested():
    assert NAMES.keys() == ALIASES.keys()


def test_lists_become_tuples():
    assert with_settings(TrainConfig(), net_arch=[32, 16]).network.hidden_sizes == (32, 16)


def test_a_whole_group_is_taken_and_a_member_beside_it_changes_it_further():
    ppo = replace(TrainConfig().ppo, gamma=0.5, clip_range=0.4)
    changed = with_settings(TrainConfig(), ppo=ppo, clip_range=0.3)
    assert (changed.ppo.gamma, changed.ppo.clip_range) == (0.5, 0.3)


def test_settings_that_are_valid_only_together_can_be_changed_together():
    config = with_settings(TrainConfig(), baseline="none", gae_lambda=1.0, whole_episodes=True)
    assert config.ppo.baseline == "none"
    config = with_settings(TrainConfig(), penalty_target=0.01, penalty_coef=1.0, num_envs=4, rollout_steps=16)
    assert config.ppo.penalty_target == 0.01 and config.batch_size == 64


@pytest.mark.parametrize(
    ("cls", "algorithm"),
    [(PPO, "ppo"), (PPOPenalty, "ppo_penalty"), (A2C, "a2c"), (Reinforce, "reinforce"), (TRPO, "trpo")],
)
def test_a_class_is_a_set_of_settings(cls, algorithm):
    assert cls("CartPole-v1", seed=3).config == preset("CartPole-v1", algorithm, seed=3)
    assert cls("CartPole-v1", n_envs=4, batch_size=None).config.num_envs == 4


# --- bad input ---

UNKNOWN = {
    "learning_rte": "learning_rate",
    "clip_rang": "clip_range",
    "hiden_sizes": "hidden_sizes",
    "max_grad_nrm": "max_grad_norm",
    "autoresets": "autoreset",
    "gae_lamda": "gae_lambda",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_setting_is_refused_with_the_nearest(name):
    with pytest.raises(InputError, match=f"'{name}'.*'{UNKNOWN[name]}'"):
        PPO("CartPole-v1", **{name: 1})


ELSEWHERE = {
    "vf_coef": "value_coef.*twice",
    "policy": "hidden_sizes",
    "policy_kwargs": "activation",
    "normalize_advantage": "normalize_advantages",
    "use_sde": "not supported",
    "tensorboard_log": "output_dir",
    "verbose": "progress_bar",
    "max_kl": "trpo",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_name_that_means_something_else_here_is_explained(name):
    with pytest.raises(InputError, match=f"{name}.*{ELSEWHERE[name]}"):
        PPO("CartPole-v1", **{name: 1})


BAD = {
    "total_steps": ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
    "total_timesteps": ({"total_timesteps": -5}, "total_steps must be at least 1, got -5"),
    "num_envs": ({"n_envs": 0}, "num_envs must be at least 1, got 0"),
    "rollout_steps": ({"n_steps": 0}, "rollout_steps must be at least 1, got 0"),
    "num_epochs": ({"n_epochs": 0}, "num_epochs must be at least 1, got 0"),
    "minibatch_size": ({"batch_size": 0}, "minibatch_size must be at least 1, got 0"),
    "eval_every": ({"eval_every": 0}, "eval_every must be at least 1, got 0"),
    "eval_episodes": ({"eval_episodes": 0}, "eval_episodes must be at least 1"),
    "checkpoint_every": ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
    "keep_checkpoints": ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
    "divides": ({"n_envs": 3, "n_steps": 7, "batch_size": 4}, "minibatch_size = 4.*21 transitions.*3 x.*7.*or null"),
    "larger": ({"n_envs": 2, "n_steps": 8, "batch_size": 64}, "minibatch_size = 64.*16 transitions"),
    "whitening one": ({"batch_size": 1}, "single transition.*larger minibatch_size.*none"),
    "whitening a batch of one": ({"n_envs": 1, "n_steps": 1, "batch_size": None}, "single transition"),
    "no whole episodes": ({"baseline": "none", "gae_lambda": 1.0}, "baseline 'none'.*whole_episodes to true"),
    "lambda without values": ({"baseline": "none", "whole_episodes": True}, "gae_lambda = 0.8.*gae_lambda to 1"),
    "reference": ({"kl_coef": 0.1}, "kl_coef = 0.1.*set it to 0"),
    "resume": ({"resume": True}, "resume.*output_dir"),
    "tensorboard": ({"tensorboard": True}, "tensorboard.*output_dir"),
    "resume and overwrite": ({"resume": True, "overwrite": True, "output_dir": "runs/x"}, "only one of the two"),
    "learning_rate": ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    "learning_rate nan": ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
    "learning_rate inf": ({"learning_rate": float("inf")}, "learning_rate.*finite"),
    "optimizer_eps": ({"optimizer_eps": -1e-5}, "optimizer_eps must be above 0"),
    "seed": ({"seed": -1}, r"seed must lie in \[0, 2\*\*32\), got -1"),
    "large seed": ({"seed": 2**32}, "seed must lie"),
    "gamma": ({"gamma": 1.01}, "gamma must be between 0 and 1, got 1.01"),
    "gamma nan": ({"gamma": float("nan")}, "gamma must be between 0 and 1"),
    "clip_range": ({"clip_range": 0.0}, "clip_range must be above 0, got 0.0"),
    "entropy_coef": ({"ent_coef": -0.1}, "entropy_coef must be 0 or more"),
    "max_grad_norm": ({"max_grad_norm": 0.0}, "max_grad_norm.*above 0"),
    "target_kl": ({"target_kl": 0.0}, "target_kl.*null"),
    "hidden_sizes": ({"hidden_sizes": (64, 0)}, "hidden_sizes must be .*1 or more each"),
    "one number": ({"hidden_sizes": 64}, "hidden_sizes must be .*64"),
    "Stable-Baselines3's two networks": ({"net_arch": {"pi": [64], "vf": [64]}}, "hidden_sizes must be "),
    "activation": ({"activation": "gelu"}, "activation must be one of tanh.*'gelu'"),
    "autoreset": ({"autoreset": "sometimes"}, "autoreset must be one of next_step.*'sometimes'"),
    "vectorization": ({"vectorization": "subproc"}, "vectorization must be one of sync.*'subproc'"),
    "penalty": ({"penalty_target": 0.01}, "penalty_target.*penalty_coef"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_value_that_cannot_work_is_refused_by_name_with_the_remedy(case):
    settings, message = BAD[case]
    with pytest.raises(InputError, match=message):
        PPO("CartPole-v1", **settings)


def test_a_trust_region_fits_neither_whitened_minibatches_nor_a_shared_trunk():
    with pytest.raises(InputError, match=r"normalize_advantages to batch \(or none\)"):
        TRPO("CartPole-v1", normalize_advantages="minibatch")
    with pytest.raises(InputError, match=r"shared_trunk to false"):
        TRPO("CartPole-v1", shared_trunk=True)
    with pytest.raises(InputError, match="max_kl must be above 0"):
        TRPO("CartPole-v1", max_kl=0.0)


def test_a_minibatch_size_need_not_divide_whole_episodes_whose_number_of_steps_nobody_knows():
    assert Reinforce("CartPole-v1", batch_size=100).config.update.minibatch_size == 100


CHOICES = {
    "optimizer": "sgd",
    "lr_schedule": "cosine",
    "device": "cuda",
    "surrogate": "clip",
    "baseline": "mean",
    "normalize_advantages": True,
    "penalty_adapts": "minibatch",
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_that_does_not_exist_is_refused(name):
    with pytest.raises(InputError, match=name):
        PPO("CartPole-v1", **{name: CHOICES[name]})


MISTYPED = {
    "n_envs": "8",
    "learning_rate": lambda progress: 3e-4 * progress,  # a schedule of Stable-Baselines3
    "seed": 1.5,
    "network": None,
    "total_steps": 1e5 + 0.5,
}


@pytest.mark.parametrize("name", MISTYPED)
def test_a_value_of_another_type_is_refused_by_name(name):
    with pytest.raises(InputError, match=ALIASES.get(name, name)):
        PPO("CartPole-v1", **{name: MISTYPED[name]})


def test_groups_that_stand_alone_check_themselves():
    for make in (
        lambda: PPOConfig(gamma=2.0),
        lambda: UpdateConfig(num_epochs=0),
        lambda: NetworkConfig(activation="gelu"),
        lambda: EnvironmentConfig(autoreset="never"),
        lambda: TrustRegionConfig(damping=-1.0),
    ):
        with pytest.raises(InputError):
            make()


# --- docs/tuning.md ---

TUNING = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text()


def test_the_guide_explains_every_setting_and_no_other():
    own = {"env", "algorithm"}
    assert {name for name in leaves(complete()) if f"`{name}`" not in TUNING} <= own
    settings = TUNING[TUNING.index("## Settings") : TUNING.index("## Which vectorization")]
    first_columns = [line.split("|")[1] for line in settings.splitlines() if line.startswith("| `")]
    named = {name for column in first_columns for name in re.findall(r"`(\w+)`", column)}
    assert len(named) > 50 and named <= leaves(complete()).keys()


def test_the_guide_explains_every_metric_of_a_control_run_and_no_other():
    rows = TUNING[TUNING.index("## Metrics") : TUNING.index("## Names and")].splitlines()
    named = {name for row in rows if row.startswith("| `") for name in re.findall(r"`([\w/]+)`", row.split("|")[1])}
    of_language_models = {"score", "score_std", "reward_kl", "kl_coef", "prompts_seen", "completion_length"}
    of_language_models |= {"truncated_fraction", "rewards/unscored", "critic_grad_norm"}
    of_language_models |= {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "kl",
        "sampling/sampling_logp_difference/max",
    }
    of_language_models |= {"dynamic_sampling/rounds", "dynamic_sampling/prompts"}
    known = {name for name in TABLE if "<" not in name} - of_language_models
    assert {name.removeprefix("eval/") for name in named} == known


def test_the_guide_translates_the_names_of_other_libraries_as_the_code_does():
    for theirs, ours in ALIASES.items():
        assert re.search(
            rf"^\| `{ours}`.*`{theirs}`.*taken|^\| [^|]*`{ours}`[^|]*\| [^|]*`{theirs}`[^|]*taken", TUNING, re.M
        )
