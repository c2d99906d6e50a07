"""GRPO's optimizer step depends on the completions alone: not on microbatches, padding, the order of rows or processes.

The batches come from tiny language models through the collector's own scoring pass, the gradients from `update` itself. The
policy that sampled is another one, so that some tokens are clipped. The two processes are real (torchrun, gloo); this file
is also what they run.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf import GenerationConfig, GRPOConfig, GRPOTrainer, GRPOTrainerConfig, UpdateConfig
from rlhf.algorithms import grpo as grpo_module
from rlhf.algorithms.grpo import GRPO
from rlhf.core.masking import local_sum
from rlhf.distributed import Distributed
from rlhf.models.policy import Policy
from rlhf.rollout.sampled import Sampled
from rlhf.runs.jsonlines import read_metrics
from rlhf.training.steppers import split_minibatch
from rlhf.types import TrainingBatch, Trajectories
from tests import broken, tiny
from tests.rollout.episodes import episode, sampled, score
from tests.rounding import EPS
from tests.updates import update

ROWS, GROUP, TOTAL = 16, 4, 12
"""Completions, how many of each prompt, and the tokens of a row: prompts are the longer, the shorter their completion."""
NEAR = {torch.float32: 128 * EPS, torch.float64: 1e-10}
"""Largest difference of two gradients, over the norm of either."""
DTYPES = pytest.mark.parametrize("dtype", NEAR, ids=lambda dtype: str(dtype).removeprefix("torch."))
RATIOS = {"token": 0.2, "sequence_mean": 0.05, "sequence": 0.3}
"""Ratio -> a clip range at which some of the tokens are clipped and some are not."""
AGGREGATIONS = ["sequence_mean", "token_mean", "group_token_mean", "constant_length"]
CONFIGS = {
    **{
        f"{ratio}-{aggregation}-{kl}": GRPOConfig(
            completions_per_prompt=GROUP,
            ratio=ratio,
            clip_range=clip_range,
            aggregation=aggregation,
            constant_length=9,
            kl_coef=0.1 if kl else 0.0,
            kl_estimator=kl or "k3",
        )
        for ratio, clip_range in RATIOS.items()
        for aggregation, kl in zip(AGGREGATIONS, [None, "k3", "weighted_k3", "sequence_k2"], strict=True)
    },
    "truncated ones left out": GRPOConfig(
        completions_per_prompt=GROUP, aggregation="token_mean", mask_truncated=True, kl_coef=0.1, entropy_coef=0.01
    ),
    "whitened, KL to go": GRPOConfig(
        completions_per_prompt=GROUP,
        scale="batch_std",
        whiten_tokens=True,
        kl_coef=0.1,
        kl_placement="return_to_go",
        aggregation="group_token_mean",
    ),
    "RLOO, clipped weights": GRPOConfig(
        completions_per_prompt=GROUP,
        center="leave_one_out",
        surrogate="clipped_weight",
        kl_coef=0.1,
        kl_placement="score",
    ),
}
CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
HARD = CONFIGS["token-token_mean-k3"]


def policy(dtype: torch.dtype, seed: int = 0) -> Policy:
    """GPT-2, whose absolute positions show a row that has moved."""
    return Policy(tiny.causal_lm("gpt2", seed=seed, dtype=dtype, num_hidden_layers=1, n_layer=1))


def near(policy_: Policy, dtype: torch.dtype, scale: float) -> Policy:
    """Another policy not far away."""
    other, generator = policy(dtype), torch.Generator().manual_seed(7)
    for parameter, start in zip(other.parameters(), policy_.parameters(), strict=True):
        noise = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(dtype)
        parameter.data = start.data + scale * noise
    return other


def completions(*, even: bool = True) -> Sampled:
    """4 prompts x 4 completions of 1 to 7 tokens, three of them cut and one without a score.

    even: rows of 12 tokens each, so that `microbatch_tokens` can ask for exactly so many rows; else of uneven length.
    """
    texts = tiny.sequences(ROWS, seed=3, longest=7)
    prompts = [
        [3 + (row // GROUP + i) % 8 for i in range(TOTAL - len(texts[row]) if even else 1 + row % 5)]
        for row in range(ROWS)
    ]
    scores = torch.randn(ROWS, generator=torch.Generator().manual_seed(4)).tolist()
    scores[6] = None
    rows = zip(prompts, texts, strict=True)
    episodes = [episode(prompt, ids, ended=row not in (1, 5, 14)) for row, (prompt, ids) in enumerate(rows)]
    return sampled(episodes, scores)


def trajectories(dtype: torch.dtype, rollout: Sampled | None = None) -> Trajectories:
    rollout = completions() if rollout is None else rollout
    learner = policy(dtype)
    old, reference = near(learner, dtype, 0.01), near(learner, dtype, 0.03)
    return score(rollout.episodes, rollout.rewards.scores, old, reference)


def gradient_of(
    config: GRPOConfig, given: Trajectories | TrainingBatch, microbatch_tokens: int = 10**6
) -> torch.Tensor:
    """What the optimizer is given in the one step over the whole batch."""
    algorithm = GRPO(config)
    batch = given if isinstance(given, TrainingBatch) else algorithm.prepare(given, 0.0, {}, local_sum)
    learner, seen = policy(batch.old_logprobs.dtype), []
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            torch.cat([p.grad.flatten().clone() for p in learner.parameters() if p.grad is not None])
        )
    )
    before = [p.detach().clone() for p in learner.parameters()]
    settings = UpdateConfig(num_epochs=1, minibatch_size=None, microbatch_tokens=microbatch_tokens, max_grad_norm=1e30)
    metrics = update(learner, algorithm, batch, optimizer, settings, Distributed(), seed=0, step=0)
    (gradient,) = seen
    assert metrics["grad_norm"] == pytest.approx(float(gradient.norm()), rel=128 * EPS) and gradient.norm() > 1e-3
    change = torch.cat([(a - b.detach()).flatten() for a, b in zip(before, learner.parameters(), strict=True)])
    torch.testing.assert_close(change, gradient, rtol=1024 * EPS, atol=16 * EPS)  # rate 1, and the norm was not clipped
    return gradient


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- microbatches ---


@pytest.mark.parametrize(
    "config", [c for name, c in CONFIGS.items() if "-" in name], ids=lambda c: f"{c.ratio}-{c.aggregation}"
)
def test_some_tokens_of_the_batch_are_clipped_and_some_are_not(config):
    """Otherwise the tests below would say nothing about the clip."""
    algorithm = GRPO(config)
    batch = algorithm.prepare(trajectories(torch.float64), 0.0, {}, local_sum)
    learner = policy(torch.float64)
    settings = UpdateConfig(num_epochs=1, minibatch_size=None)
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    metrics = update(learner, algorithm, batch, optimizer, settings, Distributed(), seed=0, step=0)
    assert 0.05 < metrics["clip_fraction_low"] + metrics["clip_fraction_high"] < 0.6


@DTYPES
@CONFIG
def test_the_gradient_is_the_same_for_every_split_into_microbatches(config, dtype):
    """16 rows as 1 x 16, 2 x 8, 4 x 4, 8 x 2 and 16 x 1."""
    batch = GRPO(config).prepare(trajectories(dtype), 0.0, {}, local_sum)
    assert len(set(batch.row_tokens.tolist())) == 1 and len(set(batch.mask.sum(-1).tolist())) > 4
    whole = gradient_of(config, batch)
    for rows in (8, 4, 2, 1):
        pieces = split_minibatch(batch, rows * TOTAL, 0, 1)
        assert [piece.rows for piece in pieces] == [rows] * (ROWS // rows)
        assert difference(gradient_of(config, batch, rows * TOTAL), whole) == pytest.approx(0, abs=NEAR[dtype]), rows


@DTYPES
@pytest.mark.parametrize("microbatch_tokens", [1, 15, 25, 40])
def test_rows_of_uneven_length_may_be_split_anyhow(microbatch_tokens, dtype):
    given = trajectories(dtype, completions(even=False))
    sizes = [
        piece.rows for piece in split_minibatch(GRPO(HARD).prepare(given, 0.0, {}, local_sum), microbatch_tokens, 0, 1)
    ]
    assert len(set(sizes)) > 1 or microbatch_tokens == 1
    cut, whole = gradient_of(HARD, given, microbatch_tokens), gradient_of(HARD, given)
    assert difference(cut, whole) == pytest.approx(0, abs=NEAR[dtype])


def test_the_comparison_notices_a_mean_over_each_microbatch(monkeypatch):
    batch = GRPO(HARD).prepare(trajectories(torch.float64), 0.0, {}, local_sum)
    monkeypatch.setattr(grpo_module, "weighted_sum", broken.weighted_sum_averages_its_own_elements)
    alone = gradient_of(HARD, batch, 2 * TOTAL) / 8  # the mean of 8 means
    assert difference(alone, gradient_of(HARD, batch)) > 0.1


# --- padding ---


def padded(given: Trajectories, width: int, fill: float, token: int) -> Trajectories:
    """The same completions with `width` more columns; padding holds `token` and, where there are numbers, `fill`."""

    def widen(tensor, value):
        return torch.cat([tensor, tensor.new_full((tensor.shape[0], width), value)], 1)

    mask, lengths = widen(given.mask, False), given.row_tokens.unsqueeze(1)
    ids = widen(given.inputs["input_ids"], token)
    ids = torch.where(torch.arange(ids.shape[1]) < lengths, ids, token)
    numbers = ("rewards", "sampling_logprobs", "old_logprobs", "ref_logprobs", "values", "next_values")
    return replace(
        given,
        inputs={**given.inputs, "input_ids": ids},
        actions=torch.where(mask, widen(given.actions, token), token),
        mask=mask,
        terminated=widen(given.terminated, False),
        episode_ends=widen(given.episode_ends, False),
        **{name: torch.where(mask, widen(getattr(given, name), 0.0), fill) for name in numbers},
    )


@DTYPES
@CONFIG
def test_padding_and_what_it_holds_change_nothing(config, dtype):
    given = trajectories(dtype)
    plain = gradient_of(config, given)
    for width, fill, token, rows in [
        (0, float("nan"), tiny.EOS, ROWS),
        (1, float("inf"), 5, 4),
        (20, -1e30, tiny.PAD, 16),
    ]:
        wide = padded(given, width, fill, token)
        # the ratio of a whole completion is exp of a sum: it multiplies the rounding of each token's log-prob
        limit = NEAR[dtype] * (4 if config.ratio == "sequence" else 1)
        assert difference(gradient_of(config, wide, rows * TOTAL), plain) == pytest.approx(0, abs=limit), (width, fill)


def test_the_comparison_notices_padding_that_counts():
    given = trajectories(torch.float64)
    wide = padded(given, 2, 0.0, tiny.PAD)
    counted = replace(wide, mask=wide.mask | (torch.arange(wide.mask.shape[1]) == wide.mask.sum(-1, keepdim=True)))
    assert difference(gradient_of(HARD, counted), gradient_of(HARD, given)) > 0.01


# --- order ---


def in_order(given: Trajectories, order: list[int]) -> Trajectories:
    """The rows in another order, numbered anew."""
    rows = torch.tensor(order)
    tensors = {name: value[rows] for name, value in vars(given).items() if isinstance(value, torch.Tensor)}
    inputs = {name: value[rows] for name, value in given.inputs.items()}
    return replace(given, **{**tensors, "inputs": inputs, "row_index": torch.arange(ROWS)})


@DTYPES
@CONFIG
def test_the_order_of_groups_of_rows_within_them_and_after_prepare_changes_nothing(config, dtype):
    given = trajectories(dtype)
    plain = gradient_of(config, given)
    groups = [row for group in (2, 0, 3, 1) for row in range(group * GROUP, (group + 1) * GROUP)]
    inside = [group * GROUP + row for group in range(ROWS // GROUP) for row in (3, 1, 0, 2)]
    for order in (groups, inside):
        moved = gradient_of(config, in_order(given, order), 3 * TOTAL)
        assert difference(moved, plain) == pytest.approx(0, abs=NEAR[dtype])
    batch = GRPO(config).prepare(given, 0.0, {}, local_sum)
    mixed = batch.select(torch.randperm(ROWS, generator=torch.Generator().manual_seed(2)))
    assert difference(gradient_of(config, mixed), plain) == pytest.approx(0, abs=NEAR[dtype])


def test_the_comparison_notices_groups_that_are_torn_apart():
    given = trajectories(torch.float64)
    torn = in_order(given, [row % 4 * 4 + row // 4 for row in range(ROWS)])
    assert difference(gradient_of(HARD, torn), gradient_of(HARD, given)) > 0.1


# --- processes ---

STEPS = 4
PROMPTS = ["ab", "c", "defgh", "gha", "bbbbbbb", "hg", "fed", "ea", "ff"]
CASES = {
    # 5 prompts: 2 on the first process and 3 on the second, several rounds, uneven shares of what is found
    "dynamic": {
        "prompts_per_step": 5,
        "grpo": {
            "dynamic_sampling_rounds": 4,
            "dynamic_sampling_reward": "verdict",
            "kl_coef": 0.05,
            "scale": "batch_std",
        },
        "update": {"num_epochs": 2, "minibatch_size": 5, "microbatch_tokens": 24},
    },
    # every advantage needs sums over both processes; some completions have no score, some are cut
    "whitened": {
        "prompts_per_step": 3,
        "grpo": {
            "whiten_tokens": True,
            "kl_coef": 0.05,
            "kl_placement": "return_to_go",
            "aggregation": "group_token_mean",
            "scale": "batch_std",
            "mask_truncated": True,
        },
        "update": {"num_epochs": 2, "minibatch_size": 3},
    },
}


def verdict(completions, target, **_):
    """Right if the target letter occurs at all; silent on texts that begin with h."""
    return [
        None if text.startswith("h") else float(letter in text)
        for text, letter in zip(completions, target, strict=True)
    ]


def run_case(case: str, output_dir: Path) -> dict:
    """Parameters after all steps, the tokens of every round of sampling, and those that each step trained on."""
    sampled: list = []
    chosen: list = []

    def shape(completions, completion_ids, prompts, log_metric):
        sampled.append([(prompt, list(ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)])
        for text in completions:
            log_metric("letters", len(text))
        return [None if text.startswith("h") else 0.01 * len(text) for text in completions]

    settings = dict(CASES[case])
    config = GRPOTrainerConfig(
        output_dir=str(output_dir),
        total_steps=STEPS,
        learning_rate=1e-2,
        generation=GenerationConfig(max_new_tokens=6),
        grpo=GRPOConfig(completions_per_prompt=3, **settings.pop("grpo")),
        update=UpdateConfig(**settings.pop("update")),
        reward_weights=[1.0, -1.0],
        **settings,
    )
    lm = tiny.causal_lm("gpt2", dtype=torch.float64)
    trainer = GRPOTrainer(lm, [verdict, shape], tiny.rows(PROMPTS), config, tokenizer=tiny.tokenizer())
    prompts = getattr(trainer.source, "source", trainer.source)
    collected = prompts.collected

    def watched(step, rollout, *others):
        rows = zip(rollout.prompts, rollout.episodes, strict=True)
        chosen.append([(prompt.prompt, each.ids) for prompt, each in rows])
        return collected(step, rollout, *others)

    prompts.collected = watched
    trainer.train()
    return {"weights": dict(trainer.policy.state_dict()), "sampled": sampled, "chosen": chosen}


def main(out: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    for case in CASES:
        torch.save(run_case(case, out / case), out / f"{case}.{os.environ['RANK']}.pt")


def launch(out: Path, timeout: float = 240) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += [
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        "-m",
        "tests.trainers.test_grpo_invariance",
        str(out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The directory in which two processes have run every case."""
    out = tmp_path_factory.mktemp("two")
    done = launch(out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return out


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, two):
    """(name, what one process computed, what each of the two did, the metrics of both runs)."""
    out = tmp_path_factory.mktemp("one")
    one = run_case(request.param, out)
    ranks = [torch.load(two / f"{request.param}.{rank}.pt") for rank in range(2)]
    return request.param, one, ranks, (read_metrics(out), read_metrics(two / request.param))


def joined(ranks: list[dict], what: str) -> list:
    return [a + b for a, b in zip(ranks[0][what], ranks[1][what], strict=True)]


def test_two_processes_sample_and_choose_what_one_does(case):
    _, one, ranks, _ = case
    assert joined(ranks, "sampled") == one["sampled"]
    assert joined(ranks, "chosen") == one["chosen"]
    assert len({len(ids) for rows in one["chosen"] for _, ids in rows}) > 2


def test_two_processes_learn_the_parameters_that_one_learns(case):
    _, one, ranks, _ = case
    first, second = (rank["weights"] for rank in ranks)
    start = tiny.causal_lm("gpt2", dtype=torch.float64).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert max((first[key] - one["weights"][key]).abs().max().item() for key in first) == pytest.approx(0, abs=1e-9)
    assert max((first[f"lm.{key}"] - start[key]).abs().max().item() for key in start) > 1e-3


def test_two_processes_report_the_metrics_that_one_reports(case):
    _, _, _, (one, both) = case
    assert len(one) == STEPS
    for line, expected in zip(both, one, strict=True):
        assert line == pytest.approx(expected, abs=1e-8)


def test_in_the_dynamic_case_the_processes_find_unequally_much_in_several_rounds(case):
    """Otherwise it would not show what it is for."""
    name, _, ranks, (lines, _) = case
    if name != "dynamic":
        assert any(line["rewards/unscored"] > 0 for line in lines) and any(
            line["completions/clipped_ratio"] > 0 for line in lines
        )
        return
    assert {line["dynamic_sampling/rounds"] for line in lines} - {1.0}
    found = [sum(len(call) for call in rank["sampled"]) for rank in ranks]
    assert found[0] != found[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
