"""What a run refuses, it refuses before anything is changed."""

import gc
from dataclasses import replace

import pytest
import torch

from gym_baselines import PPO
from rlhf import InputError
from rlhf.runs.checkpoint import Saved
from rlhf.runs.jsonlines import read_metrics
from tests import tiny


def test_a_checkpoint_of_another_model_deletes_nothing_even_with_overwrite(tmp_path):
    options = {"total_steps": 1, "ppo": {"kl_coef": 0.0}}
    tiny.trainer(tmp_path / "one", **options).train()
    tiny.trainer(tmp_path / "two", lm=tiny.causal_lm(num_hidden_layers=1), **options).train()
    before = sorted(path for path in (tmp_path / "one").rglob("*"))
    trainer = tiny.trainer(tmp_path / "one", **options)
    with pytest.raises(InputError):
        trainer.train(resume=str(tmp_path / "two"), overwrite=True)
    assert sorted(path for path in (tmp_path / "one").rglob("*")) == before
    trainer.train(resume=True)  # and it is unlocked


def test_resume_takes_paths_and_refuses_what_is_none(tmp_path):
    tiny.trainer(tmp_path, total_steps=1).train()
    longer = tiny.trainer(tmp_path, total_steps=2)
    with pytest.raises(InputError, match=r"resume=1: give True, False, or the path"):
        longer.train(resume=1)
    longer.train(resume=tmp_path / "checkpoints" / "step-000001")
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_a_source_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path):
    class Bare:
        def __init__(self, prompts):
            self.collect = prompts.collect

    class Odd(Bare):
        def state(self, step):
            return Saved({1: "an integer key"})

        def load(self, saved): ...

    for kind, message in ((Bare, "needs the methods state"), (Odd, "JSON cannot hold")):
        with pytest.raises(InputError, match=message):
            tiny.trainer(tmp_path, source=kind).train()
        assert not (tmp_path / "metrics.jsonl").exists()


def test_a_source_with_a_metric_that_nobody_knows_is_refused_before_it_is_learnt_from(tmp_path):
    class Chatty:
        def __init__(self, prompts):
            self.prompts, self.state, self.load = prompts, prompts.state, prompts.load

        def collect(self, step):
            collected = self.prompts.collect(step)
            return replace(collected, metrics={**collected.metrics, "custom/mine": 1.0, "staleness": 2.0})

    trainer = tiny.trainer(tmp_path, source=Chatty)
    with pytest.raises(InputError, match=r"metrics staleness are not in the table.*custom/NAME"):
        trainer.train()
    assert not trainer.learner.has_learnt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"custom/mine": "1.5"}}, r"metric 'custom/mine' is '1\.5', which cannot be written"),
        ({"metrics": {"custom/mine": None}}, r"metric 'custom/mine' is None"),
        ({"metrics": {"custom/mine": torch.zeros(2)}}, r"metric 'custom/mine' is tensor"),
        ({"metrics": {"custom/mine": 10**5000}}, r"metric 'custom/mine' is <ValueError in its repr>"),
        ({"metrics": {"custom/\ud800": 1.0}}, r"metric 'custom/\\ud800' is 1\.0"),
        ({"metrics": {("custom", "mine"): 1.0}}, r"\('custom', 'mine'\) are not in the table"),
        ({"samples": [{"row": 0, "mine": "\ud800"}]}, r"the sample .* cannot be written.*surrogates"),
        ({"samples": [{"row": 0, ("a",): 1}]}, r"the sample .* cannot be written.*tuple"),
        ({"samples": [{"row": 99}]}, r'"row" 99 is not among'),
        ({"samples": [{"mine": 1}]}, r'"row" None is not among'),
        ({"samples": ["text"]}, r"the sample 'text' cannot be written"),
    ],
)
def test_a_source_with_a_line_that_cannot_be_written_is_refused_before_it_is_learnt_from(changes, message, tmp_path):
    class Chatty:
        def __init__(self, prompts):
            self.prompts, self.state, self.load = prompts, prompts.state, prompts.load

        def collect(self, step):
            return replace(self.prompts.collect(step), **changes)

    trainer = tiny.trainer(tmp_path, source=Chatty)
    with pytest.raises(InputError, match=rf"source: .*{message}.*Nothing was trained"):
        trainer.train()
    assert not trainer.learner.has_learnt


def test_a_directory_is_free_again_when_its_run_is_gone(tmp_path):
    agent = PPO("CartPole-v1", n_envs=2, n_steps=16, batch_size=32, output_dir=str(tmp_path))
    agent.learn(32, progress_bar=False)
    del agent
    gc.collect()
    again = PPO("CartPole-v1", n_envs=2, n_steps=16, batch_size=32, output_dir=str(tmp_path), resume=True)
    again.learn(64, progress_bar=False)
