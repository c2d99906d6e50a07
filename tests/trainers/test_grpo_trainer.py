"""GRPOTrainer: dynamic sampling, what teaches nothing, and its metrics."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from rlhf import GenerationConfig, GRPOConfig, GRPOTrainer, GRPOTrainerConfig, InputError, UpdateConfig
from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.presets import PRESETS
from rlhf.core.masking import local_sum
from rlhf.runs.jsonlines import read_metrics
from tests import tiny
from tests.rounding import EPS
from tests.trainers.grpo_runs import ONE_UPDATE, PLAIN, PROMPTS, Recorded, lines_of, make_trainer, shape, verdict
from tests.trainers.test_grpo_invariance import GROUP, completions, gradient_of, trajectories

# --- dynamic sampling: which groups ---


def constant(completions, **_):
    return [1.0 for _ in completions]


def varied(completions, **_):
    """Differs within every group."""
    return [0.01 * row for row in range(len(completions))]


@pytest.mark.parametrize(
    ("settings", "rewards", "rounds"),
    [
        ({}, (constant, varied), 3),  # the first is the verdict, though the sum differs
        ({"dynamic_sampling_reward": "constant"}, (varied, constant), 3),
        ({"dynamic_sampling_reward": "varied"}, (constant, varied), 1),
    ],
)
def test_groups_are_chosen_by_the_named_verdict_and_not_by_the_sum(settings, rewards, rounds, tmp_path):
    trainer = make_trainer(tmp_path, rewards=rewards, grpo=settings, dataset=tiny.rows(["ab"]), total_steps=1)
    metrics = trainer.train()
    assert metrics["dynamic_sampling/rounds"] == rounds
    assert metrics["dynamic_sampling/prompts"] == metrics["prompts_seen"] == 3 * rounds
    assert metrics["optimizer_steps"] == 4  # 12 completions again, in two epochs of two minibatches


def test_an_unknown_verdict_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"dynamic_sampling_reward='verdikt'.*verdict, shape"):
        make_trainer(tmp_path, grpo={"dynamic_sampling_reward": "verdikt"})


def test_rounds_draw_what_one_round_of_their_joint_size_draws(tmp_path):
    """The same prompts and tokens: no slot, and so no completion, is used again. One prompt alone shows it best."""
    for name, dataset in {"one": tiny.rows(["ab"]), "seven": tiny.rows(PROMPTS)}.items():
        rounds, once = Recorded(constant), Recorded(constant)
        lm = {"num_hidden_layers": 1, "initializer_range": 0.02}  # nearly uniform: chance repeats nothing long
        common = {"total_steps": 1, "dataset": dataset, "generation": {"max_new_tokens": 8}, "update": ONE_UPDATE}
        make_trainer(tmp_path / f"{name} rounds", rewards=(rounds,), lm=tiny.causal_lm(**lm), **common).train()
        common |= {"prompts_per_step": 9, "grpo": {"dynamic_sampling_rounds": 1}}
        make_trainer(tmp_path / f"{name} once", rewards=(once,), lm=tiny.causal_lm(**lm), **common).train()
        assert [len(call) for call in rounds.calls] == [12, 12, 12]
        assert rounds.rows == once.rows
        long = [ids for _, ids, _ in rounds.rows if len(ids) >= 6]
        assert len(long) > 10 and len(set(long)) == len(long)


# --- what teaches nothing ---

TRUNCATED = [row for row, each in enumerate(completions().episodes) if each.ended != "stop"]
LEFT_OUT = GRPOConfig(completions_per_prompt=GROUP, mask_truncated=True, kl_coef=0.1, entropy_coef=0.1)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "group_token_mean", "constant_length"])
def test_truncated_completions_that_are_left_out_have_no_gradient_and_change_no_weight(aggregation):
    """The others' gradient is what it is when the truncated ones merely have advantage 0."""
    settings = {"completions_per_prompt": GROUP, "aggregation": aggregation, "constant_length": 5}
    given = trajectories(torch.float64)
    masked = GRPO(GRPOConfig(**settings, mask_truncated=True)).prepare(given, 0.0, {}, local_sum)
    all_in = GRPO(GRPOConfig(**settings)).prepare(given, 0.0, {}, local_sum)
    kept = [row for row in range(len(given.mask)) if row not in TRUNCATED]
    assert (masked.weightings["policy"].weight[TRUNCATED] == 0).all()
    assert torch.equal(masked.weightings["policy"].weight[kept], all_in.weightings["policy"].weight[kept])
    assert torch.equal(masked.weightings["policy"].count, all_in.weightings["policy"].count)
    assert all_in.advantages[TRUNCATED].abs().max() > 0.1
    all_in.advantages[TRUNCATED] = 0.0
    got, wanted = (gradient_of(GRPOConfig(**settings), batch) for batch in (masked, all_in))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("left_out", [True, False])
def test_what_a_left_out_completion_says_does_not_matter(left_out):
    """Neither through the policy's loss nor the KL's nor the entropy's; if it is not left out, it does."""
    config = LEFT_OUT if left_out else GRPOConfig(completions_per_prompt=GROUP, kl_coef=0.1, entropy_coef=0.1)
    rollout = completions()
    plain = gradient_of(config, trajectories(torch.float64, rollout))
    for row in TRUNCATED:
        old = rollout.episodes[row]
        rollout.episodes[row] = replace(old, ids=[3 + (i + 1) % 8 for i in old.ids])
    change = (gradient_of(config, trajectories(torch.float64, rollout)) - plain).abs().max()
    assert change == pytest.approx(0, abs=1e-12) if left_out else change > 1e-3


def group_means_by_hand(scores: list[float | None], size: int) -> list[float]:
    """(R - mean) / deviation over those of the group that have a score; 0 for those without, and in equal groups."""
    advantages = []
    for start in range(0, len(scores), size):
        said = [score for score in scores[start : start + size] if score is not None]
        mean, deviation = (statistics.fmean(said), statistics.pstdev(said)) if said else (0.0, 0.0)
        for score in scores[start : start + size]:
            equal = score is None or max(said) - min(said) < 1e-9
            advantages.append(0.0 if equal else (score - mean) / (deviation + 1e-6))
    return advantages


def test_unscored_completions_have_advantage_0_and_the_others_a_baseline_without_them(tmp_path):
    def now_and_then(completions, **_):
        return [None if text.startswith(("b", "g", "h")) else float(len(text)) for text in completions]

    calls = Recorded(now_and_then)
    make_trainer(tmp_path, rewards=(calls,), grpo=PLAIN, log_completions=12, total_steps=2).train()
    lines = lines_of(tmp_path)
    scores = [score for _, _, score in calls.rows]
    assert 3 < scores.count(None) < 20 and [line["score"] for line in lines] == scores
    by_hand = group_means_by_hand(scores, 4)
    assert [line["advantage"] for line in lines] == pytest.approx(by_hand, abs=128 * EPS)
    assert all(line["advantage"] == 0.0 for line in lines if line["score"] is None)
    unscored = [line["rewards/unscored"] for line in read_metrics(tmp_path)]
    assert unscored == [scores[:12].count(None) / 12, scores[12:].count(None) / 12]


@pytest.mark.parametrize("settings", [{}, {"whiten_tokens": True}, {"kl_coef": 0.1, "kl_placement": "return_to_go"}])
@pytest.mark.parametrize("center", ["group_mean", "leave_one_out", "none"])
def test_an_unscored_completion_has_advantage_0_whatever_is_done_to_the_others(center, settings):
    """Row 6 has no score. Whitening makes the tokens of the others have mean 0 and variance 1."""
    config = GRPOConfig(completions_per_prompt=GROUP, center=center, **settings)
    batch = GRPO(config).prepare(trajectories(torch.float64), 0.0, {}, local_sum)
    assert (batch.advantages[6] == 0).all()
    others = batch.mask & (torch.arange(batch.rows) != 6).unsqueeze(1)
    if config.whiten_tokens:
        mean, deviation = batch.advantages[others].mean(), batch.advantages[others].std(correction=0)
        assert float(mean) == pytest.approx(0, abs=1e-9) and float(deviation) == pytest.approx(1, abs=1e-6)


def test_if_no_completion_of_a_step_has_a_score_the_run_stops_and_names_the_functions(tmp_path):
    def silent(completions, trainer_state, **_):
        return [None if trainer_state.global_step == 1 else float(len(text)) for text in completions]

    trainer = make_trainer(tmp_path, rewards=(silent,), grpo=PLAIN, checkpoint_every=0)
    with pytest.raises(InputError, match=r"No completion of this step has a score: silent returned None for every row"):
        trainer.train()
    assert (tmp_path / "checkpoints" / "step-000001").is_dir()  # nothing trained is lost


@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
@pytest.mark.parametrize("center", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("whiten", [False, True])
def test_equal_scores_of_a_group_teach_nothing_to_the_last_bit(center, scale, whiten, tmp_path):
    """0.1, 1/3 and 0.7 repeated, whose means and deviations are not exact: another one for each prompt, and their sums."""

    def same(completions, target, **_):
        return [{"a": 0.1, "c": 1 / 3}.get(letter, 0.7) for letter in target]

    lm = tiny.causal_lm(num_hidden_layers=1)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    grpo = {**PLAIN, "completions_per_prompt": 6, "center": center, "scale": scale, "whiten_tokens": whiten}
    trainer = make_trainer(
        tmp_path, rewards=(same, same), reward_weights=[0.1, 1.3], lm=lm, grpo=grpo, total_steps=2, log_completions=99
    )
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    assert {line["advantage"] for line in lines_of(tmp_path)} == {0.0}
    assert {line["frac_reward_zero_std"] for line in read_metrics(tmp_path)} == {1.0}
    assert {line["grad_norm"] for line in read_metrics(tmp_path)} == {0.0}


def test_equal_scores_are_reported_to_have_no_deviation(tmp_path):
    """0.1 twelve times, whose sum of squares is not exact: `reward_std` is 0, as `rewards/<function>/std` is."""

    def tenth(completions, **_):
        return [0.1] * len(completions)

    metrics = make_trainer(tmp_path, rewards=(tenth,), grpo=PLAIN, total_steps=1).train()
    assert metrics["rewards/tenth/std"] == 0.0 and metrics["reward_std"] == 0.0


def test_long_completions_are_punished_as_dapo_says(tmp_path):
    """Eq. 13 of arXiv 2503.14476 by hand, over lengths 1 to 8 with a buffer of 4."""
    pytest.importorskip("rlhf.verifiers")
    calls = Recorded(constant)
    lm = tiny.causal_lm(num_hidden_layers=1, initializer_range=0.02)
    grpo = {**PLAIN, "overlong_buffer_tokens": 4}
    trainer = make_trainer(
        tmp_path,
        rewards=(calls,),
        lm=lm,
        grpo=grpo,
        generation={"max_new_tokens": 8},
        log_completions=12,
        total_steps=2,
    )
    trainer.train()
    lengths = [len(ids) for _, ids, _ in calls.rows]
    expected = [0.0 if n <= 4 else (8 - 4 - n) / 4 for n in lengths]
    assert {n for n in lengths if 4 < n < 8} and 8 in lengths and min(lengths) <= 4
    assert [line["score"] for line in lines_of(tmp_path)] == pytest.approx([1.0 + e for e in expected], abs=1e-12)


# --- metrics and completions ---


def half(completions, **_):
    return [None if text.startswith("b") else 0.5 * len(text) for text in completions]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(metrics, completions.jsonl by step, what the two reward functions saw by step) of a run of two steps."""
    out, calls = tmp_path_factory.mktemp("recorded"), [Recorded(verdict), Recorded(half)]
    make_trainer(
        out,
        rewards=calls,
        reward_weights=[1.0, -0.5],
        grpo={**PLAIN, "kl_coef": 0.1},
        total_steps=2,
        log_completions=99,
    ).train()
    lines = lines_of(out)
    by_step = [[line for line in lines if line["step"] == step] for step in range(2)]
    return read_metrics(out), by_step, list(zip(*(c.calls for c in calls), strict=True))


@pytest.mark.parametrize("step", [0, 1])
def test_metrics_are_what_the_recorded_completions_give(recorded, step):
    metrics, _, calls = recorded
    right, shaped = ([score for _, _, score in call] for call in calls[step])
    ids = [row[1] for row in calls[step][0]]
    scores = [a - 0.5 * (b or 0.0) for a, b in zip(right, shaped, strict=True)]
    lengths, ended = [len(row) for row in ids], [row[-1] == tiny.EOS for row in ids]
    said = [b for b in shaped if b is not None]
    equal = [max(group) - min(group) < 1e-9 for group in (scores[i : i + 4] for i in range(0, 12, 4))]
    expected = {
        "reward": statistics.fmean(scores),
        "reward_std": statistics.pstdev(scores),
        "rewards/verdict/mean": statistics.fmean(right),
        "rewards/verdict/std": statistics.pstdev(right),
        "rewards/half/mean": statistics.fmean(said),
        "rewards/half/std": statistics.pstdev(said),
        "rewards/half/abstained": 1 - len(said) / 12,
        "rewards/unscored": 0.0,
        "frac_reward_zero_std": statistics.fmean(equal),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - statistics.fmean(ended),
        "completions/mean_terminated_length": statistics.fmean(n for n, e in zip(lengths, ended, strict=True) if e),
        "completions/mean_length_right": statistics.fmean(n for n, r in zip(lengths, right, strict=True) if r > 0),
        "completions/mean_length_wrong": statistics.fmean(n for n, r in zip(lengths, right, strict=True) if r <= 0),
        "prompts_seen": 3 * (step + 1),
        "optimizer_steps": 4,
    }
    assert 0 < len(said) < 12 and 0 < sum(ended) < 12
    assert {name: metrics[step][name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert metrics[step]["sampling/sampling_logp_difference/max"] < 1e-4
    assert metrics[step]["kl"] >= 0 and not {"score", "score_std", "completion_length"} & metrics[step].keys()


@pytest.mark.parametrize("step", [0, 1])
def test_the_table_of_completions_holds_texts_rewards_of_each_function_and_advantages(recorded, step):
    _, tables, calls = recorded
    table, (right, shaped) = tables[step], calls[step]
    assert [line["prompt"] for line in table] == [row[0] for row in right]
    assert [line["completion"] for line in table] == tiny.tokenizer().batch_decode([list(row[1]) for row in right])
    assert [line["rewards/verdict"] for line in table] == [row[2] for row in right]
    assert [line["rewards/half"] for line in table] == [row[2] for row in shaped]
    scores = [a[2] - 0.5 * (b[2] or 0.0) for a, b in zip(right, shaped, strict=True)]
    assert [line["score"] for line in table] == pytest.approx(scores, abs=1e-12)
    assert [line["advantage"] for line in table] == pytest.approx(group_means_by_hand(scores, 4), abs=1e-4)


def test_evaluation_has_the_same_names(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=tiny.rows(["abc", "hh"]), total_steps=1)
    metrics = trainer.train()
    assert {"eval/reward", "eval/completions/mean_length", "eval/rewards/verdict/mean"} <= metrics.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset, tmp_path):
    """With small groups and lengths; one update where the preset has no ratio."""
    sizes = {"completions_per_prompt": 4} if PRESETS[preset].get("completions_per_prompt") != 1 else {}
    sizes |= {"overlong_buffer_tokens": 0} if "overlong_buffer_tokens" in PRESETS[preset] else {}
    config = GRPOTrainerConfig(
        output_dir=str(tmp_path),
        total_steps=2,
        prompts_per_step=4,
        learning_rate=1e-2,
        generation=GenerationConfig(max_new_tokens=4),
        grpo=GRPOConfig.preset(preset, **sizes),
        update=UpdateConfig(**ONE_UPDATE),
    )
    lm = tiny.causal_lm(num_hidden_layers=1)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    metrics = GRPOTrainer(lm, [verdict, shape], tiny.rows(PROMPTS), config, tokenizer=tiny.tokenizer()).train()
    assert all(math.isfinite(value) for value in metrics.values())
    assert max((value - before[name]).abs().max().item() for name, value in lm.state_dict().items()) > 1e-4
