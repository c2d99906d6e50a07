"""What a run reports: metrics, completions and what reward functions are given.

Numbers are computed here a second time, from stock transformers and the reward function's own record.
"""

import copy
import itertools
import json
import math

import pytest
import torch

from rlhf import Callback, InputError
from rlhf.core.random import EVALUATION
from rlhf.rollout.engine import GenerationConfig
from rlhf.runs.jsonlines import read_metrics
from tests import tiny
from tests.rollout.sampling import Draws, generate
from tests.rounding import EPS
from tests.trainers.second_look import Recorder, logprobs_alone


def test_reported_numbers_are_means_over_completions_and_over_tokens_that_count(tmp_path):
    """Computed again from the reward function's record and from the untrained model, one sequence at a time."""
    lm, recorder = tiny.causal_lm(), Recorder()
    before = copy.deepcopy(lm)
    tiny.trainer(
        tmp_path, lm=lm, rewards=recorder, total_steps=1, prompts_per_step=8, generation={"temperature": 0.7}
    ).train()
    (call,), (line,) = recorder.calls, read_metrics(tmp_path)
    scores, lengths = torch.tensor(call["scores"]).double(), [len(ids) for ids in call["ids"]]
    assert len(set(lengths)) > 2  # else padding could not show
    pairs = zip(call["prompt_ids"], call["ids"], strict=True)
    logprobs = [value for p, c in pairs for value in logprobs_alone(before, p, c, 0.7)]
    cut = [ids[-1] != tiny.EOS for ids in call["ids"]]
    expected = {
        "score": scores.mean().item(),
        "score_std": scores.std(correction=0).item(),
        "rewards/recorder/mean": scores.mean().item(),
        "completion_length": sum(lengths) / 8,
        "truncated_fraction": sum(cut) / 8,
        "entropy": -sum(logprobs) / len(logprobs),
        "reward_kl": 0.0,
        "kl_coef": 0.05,
        "learning_rate": 1e-2,
        "optimizer_steps": 8.0,
        "prompts_seen": 8,
    }
    assert {name: line[name] for name in expected} == pytest.approx(expected, abs=2048 * EPS)


def test_the_adaptive_coefficient_follows_zieglers_rule_from_step_to_step(tmp_path):
    """kl_coef of step k + 1 = kl_coef * (1 + clip(KL_k / target - 1, -0.2, 0.2) * completions / horizon)."""
    tiny.trainer(tmp_path, total_steps=3, ppo={"kl_target": 0.5, "kl_horizon": 40}).train()
    lines = read_metrics(tmp_path)
    for now, following in itertools.pairwise(lines):
        error = min(max(now["reward_kl"] / 0.5 - 1, -0.2), 0.2)
        assert following["kl_coef"] == pytest.approx(now["kl_coef"] * (1 + error * 4 / 40), rel=1e-12)
    assert lines[0]["kl_coef"] == 0.05 and lines[1]["kl_coef"] == pytest.approx(0.05 * 0.98)  # KL 0: too low


def test_the_learning_rate_rises_and_falls_as_the_schedule_says(tmp_path):
    trainer = tiny.trainer(tmp_path, total_steps=4, warmup_steps=2, learning_rate=0.04)
    used = []
    trainer.learner.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    trainer.train()
    expected = [0.04 * 0.5, 0.04 * 0.75, 0.04 * 0.5, 0.04 * 0.25]
    assert [line["learning_rate"] for line in read_metrics(tmp_path)] == pytest.approx(expected)
    assert used == pytest.approx([rate for rate in expected for _ in range(4)])  # four optimizer steps each


def test_the_reward_function_is_given_what_users_expect(tmp_path):
    recorder = Recorder()
    tiny.trainer(tmp_path, rewards=recorder, total_steps=2).train()
    tokenizer = tiny.tokenizer()
    assert [call["state"] for call in recorder.calls] == [
        {"global_step": 0, "max_steps": 2},
        {"global_step": 1, "max_steps": 2},
    ]
    for call in recorder.calls:
        assert len(call["prompts"]) == 4 and set(call["prompts"]) <= set(tiny.PROMPTS)
        assert call["target"] == [prompt[0] for prompt in call["prompts"]]  # columns stay with their prompt
        assert call["prompt_ids"] == [tokenizer(prompt)["input_ids"] for prompt in call["prompts"]]
        for text, ids in zip(call["completions"], call["ids"], strict=True):
            assert text == "".join(tiny.LETTERS[token - 3] for token in ids if token >= 3)


def test_what_a_reward_function_logs_is_reported_under_custom(tmp_path):
    def reward(completions, log_metric):
        for text in completions:
            log_metric("longest/word", len(text))
        return [float(len(text)) for text in completions]

    tiny.trainer(tmp_path, rewards=reward, total_steps=1).train()
    (line,) = read_metrics(tmp_path)
    assert line["custom/longest_word"] == line["score"] > 0


def test_another_precision_in_a_process_that_has_trained_is_refused(tmp_path):
    tiny.trainer(tmp_path)
    with pytest.raises(InputError, match=r"precision='bfloat16'.*new process"):
        tiny.trainer(tmp_path, precision="bfloat16")


def test_every_prompt_is_seen_once_per_epoch_whatever_the_batch_size(tmp_path):
    recorder = Recorder()
    tiny.trainer(tmp_path, rewards=recorder, total_steps=5, prompts_per_step=4, update={"num_epochs": 1}).train()
    seen = [prompt for call in recorder.calls for prompt in call["prompts"]]
    epochs = [seen[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == sorted(tiny.PROMPTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_numbers_of_the_update_are_means_over_the_tokens_that_count(tmp_path):
    """KL(old || policy), losses and clipped shares, again from what the loss was given; padding would shift them all."""
    trainer = tiny.trainer(
        tmp_path,
        total_steps=1,
        prompts_per_step=8,
        update={"minibatch_size": 8, "num_epochs": 3, "microbatch_tokens": 30},
    )
    sums: dict[str, list[float]] = {name: [] for name in ("kl", "policy_loss", "value_loss", "low", "high")}
    loss = trainer.algorithm.loss

    def spy(outputs, batch):
        for row in range(len(batch.actions)):
            for t in range(int(batch.mask[row].sum())):
                advantage, value, target = (x[row, t].item() for x in (batch.advantages, outputs.values, batch.returns))
                log_ratio = (outputs.logprobs[row, t] - batch.old_logprobs[row, t]).item()
                ratio, bounded = math.exp(log_ratio), min(max(math.exp(log_ratio), 0.8), 1.2)
                near = min(max(value, batch.old_values[row, t].item() - 0.2), batch.old_values[row, t].item() + 0.2)
                sums["kl"].append(ratio - 1 - log_ratio)
                sums["policy_loss"].append(-min(ratio * advantage, bounded * advantage))
                sums["value_loss"].append(0.5 * max((value - target) ** 2, (near - target) ** 2))
                sums["low"].append(float(ratio < 0.8 and advantage < 0))
                sums["high"].append(float(ratio > 1.2 and advantage > 0))
        return loss(outputs, batch)

    trainer.algorithm.loss = spy
    metrics = trainer.train()
    expected = {name: sum(values) / len(values) for name, values in sums.items()}
    assert expected["low"] + expected["high"] > 0.05  # else the clip would not show
    names = {"kl": "policy_kl", "low": "clip_fraction_low", "high": "clip_fraction_high"}
    for name, value in expected.items():
        assert metrics[names.get(name, name)] == pytest.approx(value, abs=2048 * EPS), name


def test_completions_are_written_as_they_were_sampled_and_scored(tmp_path):
    recorder = Recorder()
    tiny.trainer(tmp_path, rewards=recorder, total_steps=2, log_completions=3).train()
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    special = {tiny.PAD: "<pad>", tiny.BOS: "<bos>", tiny.EOS: "<eos>"}
    expected = [
        {
            "step": step,
            "prompt": call["prompts"][row],
            "completion": "".join(special.get(t) or tiny.LETTERS[t - 3] for t in call["ids"][row]),
            "score": call["scores"][row],
            "rewards/recorder": call["scores"][row],
        }
        for step, call in enumerate(recorder.calls)
        for row in range(3)
    ]
    assert all(math.isfinite(line.pop("advantage")) for line in lines)
    assert lines == expected


def test_evaluation_reports_held_out_prompts_with_the_weights_of_its_moment(tmp_path):
    """Sampled again here with the trained model, one prompt at a time; the KL by definition, against a copy made before."""
    lm = tiny.causal_lm(dtype=torch.float64)
    before, seen = copy.deepcopy(lm), []

    class Watch(Callback):
        def on_evaluate(self, trainer, step, metrics):
            seen.append((copy.deepcopy(trainer.policy.lm), metrics))

    held_out = tiny.rows(["abc", "hh", "dead"])
    tiny.trainer(
        tmp_path,
        lm=lm,
        eval_dataset=held_out,
        eval_every=2,
        total_steps=3,
        callbacks=[Watch()],
        missing_eos="replace",
        missing_eos_value=-1.0,
    ).train()
    lines = read_metrics(tmp_path)
    assert [("eval/score" in line) for line in lines] == [False, True, True]  # every second step, and the last
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in held_out]
    for (policy, metrics), line in zip(seen, lines[1:], strict=True):
        completions = [
            generate(
                policy,
                [prompt],
                GenerationConfig(max_new_tokens=6),
                draws=Draws(seed=0, stream=EVALUATION, step=0, slots=[slot]),
                eos_ids=[tiny.EOS],
            )[0]
            for slot, prompt in enumerate(prompts)
        ]
        texts = [tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions]
        scores = tiny.count_target(texts, [row["target"] for row in held_out])
        kl = [
            sum(logprobs_alone(policy, p, c.ids, 1.0)) - sum(logprobs_alone(before, p, c.ids, 1.0))
            for p, c in zip(prompts, completions, strict=True)
        ]
        expected = {
            "eval/score": sum(scores) / 3,
            "eval/completion_length": sum(len(c.ids) for c in completions) / 3,
            "eval/truncated_fraction": sum(c.ended != "stop" for c in completions) / 3,
            "eval/reward_kl": sum(kl) / 3,
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=64 * EPS)
        assert {name: line[name] for name in expected} == pytest.approx(expected, abs=64 * EPS)
