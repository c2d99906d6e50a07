"""The PPO command without a model: all stages run and continue where they were stopped, and the judge stays apart."""

import json

import embedded
import pipeline
import pytest
from ppo_rlhf import PPORecipe

from rlhf.commands.cli import parse
from rlhf.errors import InputError
from rlhf.training.learner import Learner

pytest.importorskip("matplotlib")

SIZES = {"SFT": 128, "PREFERENCES": 128, "TEST_PREFERENCES": 16, "PROMPTS": 16, "TEST_PROMPTS": 8}
SETTINGS = [
    "--total_steps=3",
    "--prompts_per_step=4",
    "--update.minibatch_size=4",
    "--update.num_epochs=2",
    "--learning_rate=1e-2",
    "--eval_every=2",
    "--checkpoint_every=1",
    "--generation.max_new_tokens=8",
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, size in SIZES.items():
        monkeypatch.setattr(embedded, f"NUM_{name}", size)


def run(folder, *changes):
    config = parse(PPORecipe, [*SETTINGS, f"--output_dir={folder}", *changes]).training()
    return pipeline.run(config, resume=False, overwrite=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder, results) of all stages in one go."""
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, size in SIZES.items():
            patch.setattr(embedded, f"NUM_{name}", size)
        return folder, run(folder)


def trained(folder):
    return (folder / "ppo" / "policy" / "model.safetensors").read_bytes()


def test_all_stages_run_are_reused_and_refuse_other_settings(undisturbed, capsys):
    folder, results = undisturbed
    assert set(results) == {"SFT", "PPO", "reward_model"}
    assert json.loads((folder / "results.json").read_text()) == results
    assert (folder / "curves.png").stat().st_size > 0
    assert run(folder) == results  # the same draws: the same figures
    printed = capsys.readouterr().out
    assert printed.count("reusing") == 4 and "8 held-out prompts" in printed
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        run(folder, "--seed=1")


def test_the_model_before_ppo_is_at_no_distance_from_itself_and_wins_half(undisturbed):
    _, results = undisturbed
    assert results["SFT"]["win_rate"] == 0.5
    assert abs(results["SFT"]["reward_kl"]) < 1e-4 < results["PPO"]["reward_kl"]


def test_the_judge_is_told_and_not_trained_on(undisturbed, tmp_path, monkeypatch):
    folder, results = undisturbed
    monkeypatch.setattr(pipeline, "gold", judge := lambda completions, **_: [7.0] * len(completions))
    judge.__name__ = "gold"
    other = run(tmp_path / "run")
    assert trained(tmp_path / "run") == trained(folder)
    assert other["PPO"]["rewards/gold/mean"] == 7.0 != results["PPO"]["rewards/gold/mean"]
    name = "rewards/reward_model/mean"
    assert other["PPO"][name] == results["PPO"][name] == pytest.approx(results["PPO"]["score"])


def test_a_stage_that_was_stopped_is_continued_or_made_again(undisturbed, tmp_path, monkeypatch, capsys):
    folder, results = undisturbed
    learn, train_reward_model = Learner.learn, pipeline.train_reward_model

    def fails_once(self, *trajectories, step, **rest):
        if step == 2:
            raise RuntimeError("lost")
        return learn(self, *trajectories, step=step, **rest)

    def fails_at_its_end(*arguments):
        train_reward_model(*arguments)
        raise RuntimeError("lost")

    for owner, name, broken in ((pipeline, "train_reward_model", fails_at_its_end), (Learner, "learn", fails_once)):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="lost"):
            patch.setattr(owner, name, broken)
            run(tmp_path / "run")
    capsys.readouterr()
    assert run(tmp_path / "run") == results
    printed = capsys.readouterr().out
    assert printed.count("reusing") == 3 and "resumed from" in printed
    assert trained(tmp_path / "run") == trained(folder)
