"""recipes/ppo_rlhf.py spells out what `PPOTrainer` does: the same files, to the byte, and the same lines printed."""

import ppo_rlhf
import pytest

from rlhf import InputError, PPOTrainer
from rlhf.commands.cli import guard, parse
from rlhf.training.learner import Learner
from tests import tiny

REWARDS = """
def vowels(completions, weight, **_):
    return [w * sum(letter in "ae" for letter in text) for text, w in zip(completions, weight)]

def short(completions, trainer_state, **_):
    return [-0.1 * len(text) - trainer_state["global_step"] / trainer_state["max_steps"] for text in completions]
"""
SETTINGS = [
    "--total_steps=4",
    "--prompts_per_step=4",
    "--update.minibatch_size=2",
    "--generation.max_new_tokens=5",
    "--generation.temperature=0.8",
    "--learning_rate=1e-2",
    "--lr_schedule=linear",
    "--warmup_steps=2",
    "--reward_weights=[1.0, 0.5]",
    "--missing_eos=replace",
    "--missing_eos_value=-1",
    "--ppo.kl_coef=0.2",
    "--ppo.kl_target=0.5",
    "--eval_every=2",
    "--checkpoint_every=2",
    "--keep_checkpoints=5",
    "--log_completions_every=2",
    "--log_completions=3",
]


@pytest.fixture
def arguments(tmp_path):
    """A user's model without a pad token of its own, prompts with a column for the rewards, held-out prompts."""
    tiny.causal_lm().save_pretrained(tmp_path / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": text, "weight": i % 3 + 0.5} for i, text in enumerate(["ab", "cde", "f", "gh", "abc", "hh"])]
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    tiny.write_rows(tmp_path / "held_out.jsonl", rows[::-1][:5])
    (tmp_path / "rewards.py").write_text(REWARDS)
    named = {"policy": "model", "dataset": "rows.jsonl", "eval_dataset": "held_out.jsonl", "output_dir": "out"}
    rewards = [f'"{tmp_path}/rewards.py:{name}"' for name in ("vowels", "short")]
    return [*(f"--{k}={tmp_path / v}" for k, v in named.items()), f"--reward=[{', '.join(rewards)}]", *SETTINGS]


def by_recipe(recipe) -> None:
    ppo_rlhf.train(recipe)


def by_trainer(recipe) -> None:
    trainer = PPOTrainer(
        recipe.policy, recipe.rewards(), recipe.dataset, recipe.training(), eval_dataset=recipe.eval_dataset
    )
    trainer.train(resume=recipe.resume, overwrite=recipe.overwrite)


def left_by(train, arguments, folder, capsys) -> tuple[dict[str, bytes], list[str]]:
    """The files of a run in `folder`/out, which is moved away, but for the seconds; and what was printed of the run."""
    train(parse(ppo_rlhf.PPORecipe, arguments))
    files = {str(path.relative_to(folder / "out")): path for path in (folder / "out").rglob("*") if path.is_file()}
    content = {name: path.read_bytes() for name, path in files.items() if name != "times.jsonl"}
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("the trained policy is")]
    (folder / "out").rename(folder / train.__name__)
    return content, printed


def test_the_recipe_and_the_trainer_leave_the_same_bytes_and_print_the_same_lines(arguments, tmp_path, capsys):
    recipe, trainer = (left_by(train, arguments, tmp_path, capsys) for train in (by_recipe, by_trainer))
    assert recipe == trainer
    assert {"policy/model.safetensors", "checkpoints/step-000002/MANIFEST.json", "completions.jsonl"} <= recipe[
        0
    ].keys()
    assert b"eval/score" in recipe[0]["metrics.jsonl"] and "check: sampling" in " ".join(recipe[1])


def test_the_recipe_goes_on_after_an_error_as_if_there_had_been_none(arguments, tmp_path, capsys, monkeypatch):
    whole, _ = left_by(by_recipe, arguments, tmp_path, capsys)
    learn = Learner.learn

    def fails_once(self, trajectories, *, step, **rest):
        if step == 3:
            raise RuntimeError("lost")
        return learn(self, trajectories, step=step, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "learn", fails_once)
        with pytest.raises(RuntimeError, match="lost"):
            ppo_rlhf.train(parse(ppo_rlhf.PPORecipe, arguments))
    assert (tmp_path / "out" / "checkpoints" / "step-000003").is_dir()  # what was done is saved
    (tmp_path / "by_recipe").rename(tmp_path / "whole")
    resumed, printed = left_by(by_recipe, [*arguments, "--resume=true"], tmp_path, capsys)
    assert "resumed from" in " ".join(printed)

    assert {name: data for name, data in resumed.items() if "step-000003" not in name} == whole


@pytest.mark.parametrize("train", [by_recipe, by_trainer])
def test_a_policy_that_cannot_be_written_at_the_end_is_one_message_and_is_there_after_resume(
    arguments, train, tmp_path, capsys, monkeypatch
):
    save, folder = Learner.state, tmp_path / "out"

    def state(self, step):
        if step == 4 and not (folder / "policy").exists():
            (folder / "policy").write_text("mine")
        return save(self, step)

    monkeypatch.setattr(Learner, "state", state)
    with pytest.raises(SystemExit) as ended, guard():
        train(parse(ppo_rlhf.PPORecipe, arguments))
    told = capsys.readouterr().err
    assert ended.value.code == 1 and f"stopped: {folder / 'policy'} was not written" in told
    assert "last checkpoint holds the trained policy" in told and "Traceback" not in told
    assert (folder / "checkpoints" / "step-000004").is_dir()
    with pytest.raises(InputError, match=f"{folder / 'policy'} is a file, where a run has a folder.*Move it away"):
        ppo_rlhf.train(parse(ppo_rlhf.PPORecipe, [*arguments, "--resume"]))
    (folder / "policy").unlink()
    monkeypatch.undo()
    ppo_rlhf.train(parse(ppo_rlhf.PPORecipe, [*arguments, "--resume"]))
    assert (folder / "policy" / "model.safetensors").exists()
