"""Every file in recipes/configs/ is read and checked as its command would, without a download; so are accelerate's."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from rlhf.commands.cli import parse
from rlhf.errors import InputError
from rlhf.rewards.functions import load_reward_function
from tests.architectures import folder_of

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
PLANNED = [path for path in CONFIGS if "rlhf.commands.plan" in path.read_text()]
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


def planned(path, folder, *overrides, model=None):
    """The plan of a configuration on the device that its comment names, and what was asked for."""
    from rlhf.commands.plan import held_out, plan
    from rlhf.commands.plan import read as asked_for

    text = path.read_text()
    device = re.search(rf"rlhf.commands.plan --config recipes/configs/{path.name} (.*)", text)[1].split()
    named = {k: v for k, v in yaml.safe_load(text).items() if k in ("policy", "critic", "reward_model")}
    models = [f"--{name}={folder_of(model or value, folder)}" for name, value in named.items()]
    asked = asked_for([f"--config={path}", *device, *models, *overrides])
    return plan(*asked, held_out=held_out(asked[0])), asked


def remedies(asked):
    from rlhf.commands.plan import advice, held_out

    return {found.remedy: found.plan for found in advice(*asked, held_out=held_out(asked[0]))}


def test_which_configs_say_what_device_they_fit():
    assert len(PLANNED) == 5 and {path.stem for path in PLANNED} <= {path.stem for path in REAL}


@pytest.mark.slow
@names(PLANNED)
def test_a_config_fits_its_device_with_a_tenth_to_spare_and_not_with_twice_the_microbatch(path, tmp_path):
    found, _ = planned(path, tmp_path)
    assert found.fits and found.peak <= 0.9 * found.memory
    doubled, asked = planned(path, tmp_path, f"--update.microbatch_tokens={2 * read(path).update.microbatch_tokens}")
    assert not doubled.fits
    assert remedies(asked)["update.microbatch_tokens, half"].fits


@pytest.mark.slow
@names([path for path in PLANNED if "lora" in path.stem])
def test_without_lora_it_does_not_fit_and_the_plan_says_so(path, tmp_path):
    found, asked = planned(path, tmp_path, "--lora.r=0")
    assert not found.fits
    assert remedies(asked)["lora.r: 16"].peak < found.peak


@pytest.mark.slow
def test_the_larger_pythia_needs_the_eight_gpus_that_its_config_names(tmp_path):
    path = RECIPES / "configs" / "ppo_tldr_pythia.yaml"
    one, _ = planned(path, tmp_path, model="pythia-2.8b")
    eight, _ = planned(path, tmp_path, "--processes=8", "--layout=fsdp2", model="pythia-2.8b")
    assert eight.fits and not one.fits


def test_the_plan_takes_every_setting_of_the_recipes():
    from grpo import GRPORecipe
    from ppo_rlhf import PPORecipe

    from rlhf.commands.plan import GRPOPlan, PPOPlan

    for recipe, plan in ((PPORecipe, PPOPlan), (GRPORecipe, GRPOPlan)):
        assert {f.name for f in dataclasses.fields(recipe)} <= {f.name for f in dataclasses.fields(plan)}


@names(CONFIGS)
def test_the_plan_knows_ppo_from_grpo(path):
    from rlhf.commands.plan import GRPOPlan, PPOPlan, kind_of

    assert kind_of([f"--config={path}"]) is (PPOPlan if path.stem.startswith("ppo_") else GRPOPlan)
    assert kind_of(["--config", str(path), "--seed=1"]) is kind_of([f"--config={path}"])
    with pytest.raises(InputError, match=r"neither ppo nor grpo.*--ppo"):
        kind_of(["--seed=1"])


def test_nothing_is_downloaded_to_read_a_config(monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("a config was read from the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for path in REAL:
        read(path)
