"""Every file in recipes/configs/ is read and checked as its command would, without a download; so are accelerate's."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from rlhf.commands.cli import parse
from rlhf.errors import InputError
from rlhf.rewards.functions import load_reward_function

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
REAL = [path for path in CONFIGS if "embedded" not in path.stem]


def read(path, *overrides):
    """The settings object of the command that the file names."""
    from grpo import GRPORecipe
    from ppo_rlhf import PPORecipe

    recipe = PPORecipe if path.stem.startswith("ppo_") else GRPORecipe
    return parse(recipe, [f"--config={path}", *overrides])


def names(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def test_there_are_configs_for_both_commands_on_embedded_and_real_data():
    assert {path.stem.partition("_")[0] for path in REAL} == {"ppo", "grpo", "dapo"}
    assert {path.stem for path in set(CONFIGS) - set(REAL)} == {"ppo_embedded", "grpo_embedded"}


@names(CONFIGS)
def test_every_config_is_accepted_by_its_command_and_its_sizes_fit(path):
    config = read(path)
    written = yaml.safe_load(path.read_text())
    assert config.output_dir == written["output_dir"]
    assert config.training().learning_rate == pytest.approx(float(written["learning_rate"]))
    completions = config.prompts_per_step * (config.grpo.completions_per_prompt if hasattr(config, "grpo") else 1)
    assert completions % (config.update.minibatch_size or completions) == 0


@names(CONFIGS)
def test_a_misspelt_setting_in_a_config_would_be_noticed(path, tmp_path):
    """The negative control of the test above."""
    wrong = tmp_path / path.name
    wrong.write_text(path.read_text().replace("learning_rate:", "learning_rat:"))
    with pytest.raises(InputError, match="learning_rat"):
        read(wrong)


@names(REAL)
def test_configs_for_real_models_say_what_they_need_and_where_their_values_come_from(path):
    comment = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert all(word in comment for word in ("Needs: ", "Data: ", "Values: ", "accelerate launch"))
    assert str(path.relative_to(RECIPES.parent)) in comment  # the command in it reads this very file
    config = read(path)
    assert config.policy in path.read_text() and "/" in config.policy and "/" in config.dataset


@names(REAL)
def test_rewards_named_in_configs_exist(path):
    for name in read(path).reward:
        assert callable(load_reward_function(name))


def test_the_dapo_config_differs_from_the_preset_only_where_it_says_so():
    from rlhf.algorithms.grpo import GRPOConfig

    changes = {"overlong_buffer_tokens": 600, "dynamic_sampling_reward": "math_equality"}
    assert read(RECIPES / "configs" / "dapo_math_qwen.yaml").grpo == GRPOConfig.preset("dapo", **changes)


@names(sorted((RECIPES / "accelerate").glob("*.yaml")))
def test_accelerate_knows_every_key_of_its_files(path):
    config = load_config_from_file(str(path))  # ValueError on a key that it does not know
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]


def test_nothing_is_downloaded_to_read_a_config(monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("a config was read from the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for path in REAL:
        read(path)
