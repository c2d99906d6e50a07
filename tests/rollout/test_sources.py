"""A source of trajectories is an argument: it wraps the data set's prompts, or makes episodes of several turns of them."""

from dataclasses import replace

import pytest
import torch

from rlhf.core.random import SAMPLING
from rlhf.rollout.engine import Key, Request
from rlhf.rollout.episode import Episode
from rlhf.rollout.prompts import PromptSource
from rlhf.runs.jsonlines import read_metrics
from rlhf.training.source import Collected
from tests import tiny
from tests.rollout.test_engines import grpo

INSERTED = [4, 4, tiny.EOS, 6]
"""What the tool says; an end token of the tool's ends nothing."""


class TwoTurns:
    """Each episode: a completion, a tool's answer, another completion. Scores count the letter "a" in what was sampled.

    Everything of it goes through ports: the engine for tokens, the scorer for trajectories. No other file knows of tools.
    """

    def __init__(self, prompts: PromptSource) -> None:
        self.prompts, self.sampler, self.scorer = prompts, prompts.sampler, prompts.scorer
        self.episodes: list[list[Episode]] = []

    def _turn(self, step, texts, copies, turn):
        requests = [
            Request(ids, Key(self.sampler.seed, SAMPLING, step, row // copies, row % copies, turn))
            for row, ids in enumerate(texts)
        ]
        return [future.result() for future in self.sampler.engine.submit(requests, self.sampler.sampling)]

    def collect(self, step: int) -> Collected:
        source, copies = self.prompts, self.prompts.completions_per_prompt
        drawn, _ = source.draw(step, 0, source.prompts_per_step)
        prompts = [prompt.ids for prompt in drawn for _ in range(copies)]
        first = self._turn(step, prompts, copies, 0)
        texts = [[*p, *c.ids, *INSERTED] for p, c in zip(prompts, first, strict=True)]
        second = self._turn(step, texts, copies, 1)
        turns = zip(prompts, first, second, strict=True)
        episodes = [Episode.of_turns(p, [(a, INSERTED), (b, [])]) for p, a, b in turns]
        self.episodes.append(episodes)
        scores = [float(sum(t == 3 for t, own in zip(e.ids, e.sampled, strict=True) if own)) for e in episodes]
        source.cursor += source.prompts_per_step
        trajectories = self.scorer(episodes, scores, range(len(episodes)), step=step)
        return Collected(trajectories=trajectories, metrics={"score": sum(scores) / len(scores)})

    def state(self, step):
        return self.prompts.state(step)

    def load(self, saved):
        self.prompts.load(saved)


def test_episodes_of_two_turns_with_a_tool_between_train_through_the_ports_alone(tmp_path):
    made = []
    lm = tiny.causal_lm(dtype=torch.float64)
    trainer = tiny.trainer(
        tmp_path,
        lm=lm,
        total_steps=12,
        prompts_per_step=16,
        learning_rate=2e-2,
        update={"minibatch_size": 16},
        ppo={"kl_coef": 0.0},
        source=lambda prompts: made.append(TwoTurns(prompts)) or made[-1],
    )
    trainer.train()
    lines = read_metrics(tmp_path)
    assert max(line["sampler_gap"] for line in lines) == pytest.approx(0, abs=1e-9)  # both turns, at every step
    assert sum(line["score"] for line in lines[-3:]) / 3 > 2 * sum(line["score"] for line in lines[:3]) / 3
    for episode in made[0].episodes[0]:
        holes = [token for token, own in zip(episode.ids, episode.sampled, strict=True) if not own]
        assert holes == INSERTED


class Twice:
    """A wrapper: every step's trajectories are of the prompts alone, and counted."""

    def __init__(self, prompts: PromptSource) -> None:
        self.prompts, self.steps = prompts, []

    def collect(self, step):
        self.steps.append(step)
        collected = self.prompts.collect(step)
        return replace(collected, metrics={**collected.metrics, "custom/wrapped": 1.0})

    def state(self, step):
        return self.prompts.state(step)

    def load(self, saved):
        self.prompts.load(saved)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_wrapper_of_the_prompts_is_used_saved_and_resumed(name, tmp_path):
    def make(folder, **options):
        settings = {"total_steps": 4} if name == "ppo" else {}
        trainer = tiny.trainer if name == "ppo" else lambda out, **kw: grpo(out, tiny.causal_lm(), **kw)
        return trainer(folder, source=Twice, **settings, **options)

    whole = make(tmp_path / "whole")
    whole.train()
    assert whole.source.steps == list(range(whole.config.total_steps))
    make(tmp_path / "parts", callbacks=[tiny.AtStep(1, lambda t: setattr(t, "should_stop", True))]).train()
    resumed = make(tmp_path / "parts")
    resumed.train(resume=True)
    assert resumed.source.steps == list(range(2, whole.config.total_steps))
    names = ("metrics.jsonl", "completions.jsonl", "policy/model.safetensors")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "parts" / n).read_bytes() for n in names)
    assert all(line["custom/wrapped"] == 1.0 for line in read_metrics(tmp_path / "parts"))
