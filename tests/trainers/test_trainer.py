"""PPOTrainer end to end on tiny models: what it promises before, during and after a run."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf import InputError, TrainingError
from rlhf.runs.jsonlines import read_metrics
from tests import tiny
from tests.rounding import EPS
from tests.tiny import furthest, weights
from tests.trainers.second_look import Recorder, logprobs_alone

# --- before the first update: one policy --------------------------------------------------------------------------------


def training_forwards(trainer) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(input ids, actions, log-probs) of every forward with gradients, as the optimizer's loss saw them."""
    seen = []

    def record(module, args, kwargs, outputs):
        if outputs.logprobs.requires_grad:
            seen.append((args[0]["input_ids"], args[0]["prompt_lengths"], args[1], outputs.logprobs.detach().clone()))

    trainer.policy.register_forward_hook(record, with_kwargs=True)
    return seen


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_training_forward_before_the_first_update_gives_the_sampling_logprobs(family, temperature, tmp_path):
    """Dropout of 0.5 stands in the model's configuration, and the model comes in training mode."""
    lm, recorder = tiny.causal_lm(family, dropout=0.5).train(), Recorder()
    trainer = tiny.trainer(
        tmp_path,
        lm=lm,
        rewards=recorder,
        total_steps=1,
        prompts_per_step=8,
        generation={"temperature": temperature},
        update={"num_epochs": 1, "minibatch_size": 8, "microbatch_tokens": 30},
        ppo={"entropy_coef": 0.01},
    )
    sampled, sample = [], trainer.source.sample
    trainer.source.sample = lambda *a: sampled.append(sample(*a)) or sampled[-1]
    forwards = training_forwards(trainer)
    metrics = trainer.train()
    by_text = {
        (*episode.prompt_ids, *episode.ids): (len(episode.ids), episode.logprobs) for episode in sampled[0].episodes
    }
    assert len(forwards) > 1  # several microbatches
    compared = 0
    for ids, prompt_lengths, actions, logprobs in forwards:
        for row in range(len(ids)):
            options = [
                (text, *found)
                for text, found in by_text.items()
                if ids[row, : len(text)].tolist() == list(text) and len(text) - found[0] == prompt_lengths[row]
            ]
            text, length, expected = max(options, key=lambda option: len(option[0]))
            assert actions[row, :length].tolist() == list(text[-length:])
            assert logprobs[row, :length].tolist() == pytest.approx(expected, abs=2048 * EPS)
            compared += 1
    assert compared == 8
    assert metrics["sampler_gap"] == pytest.approx(0, abs=2048 * EPS)
    assert metrics["policy_kl_k1"] == pytest.approx(0, abs=64 * EPS)
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_run_that_hardly_learns_keeps_the_ratio_at_one_and_the_reference_at_hand(temperature, tmp_path):
    trainer = tiny.trainer(tmp_path, total_steps=3, learning_rate=1e-12, generation={"temperature": temperature})
    trainer.train()
    for line in read_metrics(tmp_path):
        assert [line["sampler_gap"], line["reward_kl"]] == pytest.approx([0, 0], abs=2048 * EPS)
        assert line["policy_kl"] == pytest.approx(0, abs=1e-8)
        assert line["clip_fraction_low"] == line["clip_fraction_high"] == 0


def test_the_self_check_says_how_far_sampler_reference_and_policy_are_apart(tmp_path, capsys):
    tiny.trainer(tmp_path, total_steps=1).train()
    printed = capsys.readouterr().out
    assert "1 process(es) on cpu, float32" in printed
    assert "4 prompts x 1 = 4 completions per step" in printed and "2 epoch(s) x 2 minibatch(es) of 2" in printed
    assert "5 prompts (0 dropped, 0 cut)" in printed
    assert "KL(policy || reference) = 0 nats" in printed
    assert "log-probs differ by at most" in printed


def test_a_model_whose_two_forwards_disagree_is_stopped_before_anything_is_learnt(tmp_path):
    """Here the cached forward drops the positions, which GPT-2 needs."""
    lm = tiny.causal_lm("gpt2")
    trainer = tiny.trainer(tmp_path, lm=lm)
    forward = lm.forward
    lm.forward = lambda *args, position_ids=None, **options: forward(*args, **options)
    before = weights(trainer)
    with pytest.raises(TrainingError, match=r"differ by .* nats .*Nothing was trained.*GPT2"):
        trainer.train()
    assert furthest(before, weights(trainer)) == 0.0


# --- the reference ------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_policy_as_it_was_given_and_stays_it(tmp_path):
    """Also if the policy was changed in memory after it was loaded: its KL to the reference starts at 0."""
    path = tmp_path / "model"
    tiny.causal_lm().save_pretrained(path)
    lm = type(tiny.causal_lm()).from_pretrained(path)
    for parameter in lm.parameters():
        parameter.data *= 1.1
    given = copy.deepcopy(lm.state_dict())
    trainer = tiny.trainer(tmp_path / "run", lm=lm)
    trainer.train()
    reference = trainer.reference.module.lm.state_dict()
    assert all(torch.equal(reference[name], given[name]) for name in given)
    first, *_, last = read_metrics(tmp_path / "run")
    assert abs(first["reward_kl"]) < 1e-6 < 1e-3 < abs(last["reward_kl"])


def test_another_reference_can_be_given_and_the_kl_is_measured_to_it(tmp_path):
    other, recorder = tiny.causal_lm(seed=7), Recorder()
    lm = tiny.causal_lm()
    before = copy.deepcopy(lm)
    tiny.trainer(tmp_path, lm=lm, reference=other, rewards=recorder, total_steps=1).train()
    (call,) = recorder.calls
    pairs = zip(call["prompt_ids"], call["ids"], strict=True)
    totals = [sum(logprobs_alone(before, p, c, 1.0)) - sum(logprobs_alone(other, p, c, 1.0)) for p, c in pairs]
    assert read_metrics(tmp_path)[0]["reward_kl"] == pytest.approx(sum(totals) / 4, abs=1e-4)


def test_without_a_kl_penalty_there_is_no_reference_in_memory(tmp_path):
    trainer = tiny.trainer(tmp_path, ppo={"kl_coef": 0.0}, total_steps=1)
    trainer.train()
    assert trainer.reference is None and "reward_kl" not in read_metrics(tmp_path)[0]


# --- layout must not matter ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """Two steps in float64 whose completions differ in length: (weights, metrics)."""
    return float64_run(tmp_path_factory.mktemp("plain"))


def few_kinds(completion_ids):
    """Looks at ids, so that it does not matter which of them the tokenizer calls special."""
    return [len(set(ids)) - 0.3 * len(ids) for ids in completion_ids]


def float64_run(path: Path, *, tokenizer=None, **options):
    trainer = tiny.trainer(
        path,
        rewards=few_kinds,
        lm=tiny.causal_lm("gpt2", dtype=torch.float64),
        tokenizer=tokenizer,
        total_steps=2,
        prompts_per_step=6,
        update={"minibatch_size": 3, **options.pop("update", {})},
        ppo={"entropy_coef": 0.02, "kl_target": 1.0, "normalize_advantages": "minibatch"},
        **options,
    )
    trainer.train()
    return weights(trainer), read_metrics(path)


@pytest.mark.parametrize(
    "options",
    [
        {"update": {"microbatch_tokens": 1}},
        {"update": {"microbatch_tokens": 25}},
        {"generation": {"completions_at_once": 1}},
        {"generation": {"completions_at_once": 4}},
    ],
    ids=str,
)
def test_what_fits_into_memory_at_once_changes_no_result(options, plain_run, tmp_path):
    got, metrics = float64_run(tmp_path, **options)
    expected, expected_metrics = plain_run
    assert furthest(got, expected) == pytest.approx(0, abs=1e-10)
    for line, wanted in zip(metrics, expected_metrics, strict=True):
        assert line == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("pad", ["<eos>", None, "b"])
def test_the_pad_token_changes_no_result_be_it_the_end_token_missing_or_an_ordinary_letter(pad, plain_run, tmp_path):
    got, metrics = float64_run(tmp_path, tokenizer=tiny.tokenizer(pad=pad))
    assert furthest(got, plain_run[0]) == 0.0 and metrics == plain_run[1]


def test_equal_seeds_give_equal_files_and_another_seed_gives_others(tmp_path):
    files = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)  # the global generator plays no part
        tiny.trainer(tmp_path / str(number), seed=seed, eval_dataset=tiny.rows(["abc"]), checkpoint_every=2).train()
        names = ("metrics.jsonl", "completions.jsonl", "policy/model.safetensors", "policy/value_head.safetensors")
        files.append([(tmp_path / str(number) / name).read_bytes() for name in names])
    assert files[0] == files[1]
    assert all(first != other for first, other in zip(files[0], files[2], strict=True))


# --- the update ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [0.05, 1e6])
def test_the_gradient_is_clipped_to_its_limit_before_each_optimizer_step(max_grad_norm, tmp_path):
    trainer = tiny.trainer(tmp_path, total_steps=1, update={"max_grad_norm": max_grad_norm})
    norms = []
    trainer.learner.optimizer.register_step_pre_hook(
        lambda optimizer, args, options: norms.append(
            math.sqrt(sum(p.grad.square().sum().item() for p in trainer.policy.parameters() if p.grad is not None))
        )
    )
    metrics = trainer.train()
    assert len(norms) == 4 and metrics["grad_norm"] > 0.06
    if max_grad_norm < 1:
        assert norms == pytest.approx([max_grad_norm] * 4, rel=1e-4)
    else:
        assert sum(norms) / 4 == pytest.approx(metrics["grad_norm"], rel=1e-4)


def test_advantages_are_whitened_over_the_whole_step_and_stay_zero_on_padding(tmp_path):
    trainer = tiny.trainer(tmp_path, total_steps=1, prompts_per_step=8)
    batches = []
    prepare = trainer.algorithm.prepare
    trainer.algorithm.prepare = lambda *args: batches.append(prepare(*args)) or batches[-1]
    trainer.train()
    (batch,) = batches
    real = batch.advantages[batch.mask].double()
    assert real.mean().item() == pytest.approx(0, abs=64 * EPS)
    assert real.var(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    assert not batch.advantages[~batch.mask].any() and not batch.returns[~batch.mask].any()


@pytest.mark.parametrize(("missing_eos", "value"), [("keep", None), ("replace", -2.0), ("subtract", 0.5)])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_the_score_of_a_cut_completion_is_treated_as_asked_by_how_sampling_really_ended(
    missing_eos, value, pad, tmp_path
):
    """The model ends with either of two tokens; only what the length limit cut is concerned, also where padding is EOS."""
    lm, recorder = tiny.causal_lm(), Recorder()
    lm.generation_config.eos_token_id = [tiny.EOS, 9]
    trainer = tiny.trainer(
        tmp_path,
        lm=lm,
        rewards=recorder,
        total_steps=1,
        prompts_per_step=20,
        tokenizer=tiny.tokenizer(pad=pad),
        missing_eos=missing_eos,
        missing_eos_value=value,
    )
    seen = []
    prepare = trainer.algorithm.prepare
    trainer.algorithm.prepare = lambda trajectories, *rest: seen.append(trajectories) or prepare(trajectories, *rest)
    trainer.train()
    (call,), (trajectories,) = recorder.calls, seen
    assert {ids[-1] for ids in call["ids"]} >= {tiny.EOS, 9}
    for row, (ids, score) in enumerate(zip(call["ids"], call["scores"], strict=True)):
        if ids[-1] not in (tiny.EOS, 9):
            score = {"keep": score, "replace": value, "subtract": score - (value or 0.0)}[missing_eos]
        expected = [0.0] * (len(ids) - 1) + [score]
        assert trajectories.rewards[row, : len(ids)].tolist() == pytest.approx(expected)
    assert read_metrics(tmp_path)[0]["score"] == pytest.approx(sum(call["scores"]) / 20)  # what the functions said


def test_a_rewarded_letter_becomes_frequent(tmp_path):
    """The loop as a whole climbs: the signs of reward, advantage and step agree."""

    def many_c(completions):
        return [text.count("c") / 6 for text in completions]

    tiny.trainer(
        tmp_path,
        lm=tiny.causal_lm(initializer_range=0.2),
        rewards=many_c,
        total_steps=15,
        prompts_per_step=32,
        learning_rate=2e-2,
        update={"minibatch_size": 32},
        ppo={"kl_coef": 0.001},
    ).train()
    lines = read_metrics(tmp_path)
    assert lines[0]["score"] < 0.2 and lines[-1]["score"] > 0.5


@pytest.mark.parametrize("case", ["every completion ends at once", "every completion is cut"])
def test_completions_of_one_token_and_completions_without_an_end_are_trained_on(case, tmp_path):
    lm, changes = tiny.causal_lm(), {"missing_eos": "replace", "missing_eos_value": -1.0}
    if case == "every completion ends at once":
        lm.generation_config.eos_token_id = list(range(tiny.VOCABULARY))
    else:
        tokenizer = tiny.tokenizer()
        tokenizer.eos_token = "<bos>"  # which the model never says
        lm.generation_config.eos_token_id = None
        never = torch.tensor([tiny.BOS])
        lm.get_output_embeddings().register_forward_hook(lambda m, args, logits: logits.index_fill(-1, never, -1e4))
        changes["tokenizer"] = tokenizer
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    metrics = tiny.trainer(tmp_path, lm=lm, total_steps=2, **changes).train()
    cut = case == "every completion is cut"
    assert metrics["truncated_fraction"] == cut and metrics["completion_length"] == (6 if cut else 1)
    assert all(math.isfinite(value) for value in metrics.values())
    assert furthest(before, {name: p.detach() for name, p in lm.named_parameters()}) > 0


# --- the result ---------------------------------------------------------------------------------------------------------

READ_POLICY = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
ids = AutoTokenizer.from_pretrained(sys.argv[1])("abcd", return_tensors="pt")["input_ids"]
torch.save(model.eval()(ids).logits.detach(), sys.argv[2])
assert not any(name.split(".")[0] == "rlhf" for name in sys.modules), "imported rlhf"
print(json.dumps([sorted(map(str, info["missing_keys"])), sorted(map(str, info["unexpected_keys"]))]))
"""


def test_the_trained_policy_loads_in_a_process_that_never_imports_this_toolkit(tmp_path):
    trainer = tiny.trainer(tmp_path / "run")
    trainer.train()
    command = [sys.executable, "-c", READ_POLICY, str(tmp_path / "run" / "policy"), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], []]
    ids = tiny.tokenizer()("abcd", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = trainer.policy.lm(ids).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=0, atol=64 * EPS)
    assert (tmp_path / "run" / "policy" / "value_head.safetensors").is_file()


def test_a_policy_given_by_its_path_trains_as_the_same_policy_in_memory_does(tmp_path):
    tiny.causal_lm().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    runs = []
    for name, lm, tokenizer in (
        ("a", str(tmp_path / "model"), str(tmp_path / "model")),
        ("b", tiny.causal_lm(), tiny.tokenizer()),
    ):
        tiny.trainer(tmp_path / name, lm=lm, tokenizer=tokenizer).train()
        runs.append((tmp_path / name / "metrics.jsonl").read_bytes())
    assert runs[0] == runs[1]


BFLOAT16_RUN = """
import sys, torch
from tests import tiny
from tests.rollout.sampling import Draws, generate
lm, used = tiny.causal_lm(initializer_range=0.1), set()
trainer = tiny.trainer(sys.argv[1], lm=lm, precision="bfloat16", frozen_precision="float32")
lm.get_output_embeddings().register_forward_hook(lambda module, args, output: used.add(output.dtype))
before = {n: p.detach().clone() for n, p in trainer.policy.named_parameters()}
metrics = trainer.train()
assert used == {torch.bfloat16}, "sampling, scoring and training compute alike"
assert {p.dtype for p in trainer.policy.parameters()} == {torch.float32}
assert all(v.dtype == torch.float32 for s in trainer.learner.own_optimizer.state.values() for v in s.values())
assert any((p - before[n]).abs().max() > 0 for n, p in trainer.policy.named_parameters())
"""


def test_bfloat16_computes_over_weights_and_moments_in_float32(tmp_path):
    """In a process of its own: Accelerate fixes the precision for the life of a process."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", BFLOAT16_RUN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    for line in read_metrics(tmp_path):
        assert line["sampler_gap"] < 0.1 and abs(line["reward_kl"]) < 5
    assert "bfloat16" in done.stdout and abs(read_metrics(tmp_path)[0]["reward_kl"]) < 1e-6


def test_a_tracker_gets_settings_and_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    tiny.trainer(tmp_path / "run", total_steps=1, tracker="tensorboard").train()
    assert list((tmp_path / "run" / "tracker").rglob("events.out.tfevents.*"))


def test_an_error_in_the_evaluation_loses_no_step(tmp_path):
    def fails_on_held_out(completions, trainer_state, prompts, **_):
        if "hhh" in prompts:
            raise RuntimeError("no answer for this one")
        return [float(len(text)) for text in completions]

    trainer = tiny.trainer(
        tmp_path, rewards=fails_on_held_out, dataset=[{"prompt": "ab"}], eval_dataset=[{"prompt": "hhh"}]
    )
    with pytest.raises(InputError, match="fails_on_held_out"):
        trainer.train()
    assert len(read_metrics(tmp_path)) == 3
    assert (tmp_path / "checkpoints" / "step-000003").is_dir()


def test_a_reward_function_that_rewrites_what_it_is_handed_changes_nothing_of_the_run(tmp_path):
    """Neither the tokens that are trained on, nor the prompts of a later epoch."""

    def vandal(prompts, completions, completion_ids, target, prompt_ids=None):
        scores = tiny.count_target(completions, target)
        for ids in [*completion_ids, *prompt_ids]:
            ids[:] = [3] * len(ids)
        for values in (prompts, completions, target):
            values[:] = ["d"] * len(values)
        return scores

    plain = tiny.trainer(tmp_path / "plain", total_steps=4)
    changed = tiny.trainer(tmp_path / "changed", total_steps=4, rewards=vandal)
    for trainer in (plain, changed):
        trainer.train()
    assert furthest(weights(plain), weights(changed)) == 0.0
    for line, wanted in zip(read_metrics(tmp_path / "changed"), read_metrics(tmp_path / "plain"), strict=True):
        assert {name.replace("vandal", "count_target"): value for name, value in line.items()} == wanted
