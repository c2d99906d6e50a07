"""Runs with adapters: the reference is the base to the bit, checkpoints hold the adapter alone, and resuming is exact."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rlhf import GenerationConfig, InputError
from rlhf.algorithms.ppo import PPOConfig
from rlhf.runs.jsonlines import read_metrics
from tests import adapters as runs
from tests import tiny, token_tree, tree
from tests.adapters import logits, lora
from tests.tiny import AtStep
from tests.trainers import grpo_runs
from tests.trainers.test_interruption import differing, stop

STEPS = 3


def make_trainer(output_dir: Path, **changes):
    """PPO with an adapter; every step but the first crosses an epoch."""
    settings = {
        "total_steps": STEPS,
        "checkpoint_every": 1,
        "keep_checkpoints": STEPS,
        "warmup_steps": 2,
        "ppo": {"kl_target": 0.5, "kl_horizon": 40, "entropy_coef": 0.01},
        "generation": {"max_new_tokens": 4},
        "peft_config": lora(),
    }
    return tiny.trainer(output_dir, **{**settings, **changes})


def make_grpo(output_dir: Path, **changes):
    peft_config = changes.pop("peft_config", lora())
    settings = {"total_steps": STEPS, "grpo": {"dynamic_sampling_rounds": 1}, "keep_checkpoints": STEPS, **changes}
    return grpo_runs.make_trainer(output_dir, peft_config=peft_config, **settings)


MAKERS = {
    "ppo": make_trainer,
    "grpo": make_grpo,
    "value adapter": lambda *a, **k: make_trainer(*a, critic="adapter", **k),
}


def results(output_dir: Path) -> dict[str, bytes]:
    files = [output_dir / "metrics.jsonl", output_dir / "completions.jsonl"]
    files += [f for f in sorted((output_dir / "policy").rglob("*")) if f.is_file()]
    for step in range(1, STEPS + 1):
        folder = output_dir / "checkpoints" / f"step-{step:06d}"
        files += [folder / name for name in ("policy.safetensors", "optimizer.safetensors")]
    return {str(file.relative_to(output_dir)): file.read_bytes() for file in files}


@pytest.fixture(scope="module", params=list(MAKERS))
def whole(request, tmp_path_factory):
    """(maker, trainer, directory, files) of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    trainer = MAKERS[request.param](out)
    trainer.train()
    return MAKERS[request.param], trainer, out, results(out)


# --- the base -----------------------------------------------------------------------------------------------------------


def test_the_kl_at_step_0_is_exactly_0_and_then_it_is_not(whole):
    _, _, out, _ = whole
    lines = read_metrics(out)
    name = "reward_kl" if "reward_kl" in lines[0] else "kl"
    first, *_, last = [line[name] for line in lines]
    if name == "kl":  # in the loss: a mean over optimizer steps, of which the first is at the reference
        assert 0 <= first < abs(last)
    else:
        assert first == 0.0 != last


def test_the_kl_of_grpo_at_step_0_is_exactly_0(tmp_path):
    """One update per step, so that step 0 measures it once, before anything has moved."""
    make_grpo(tmp_path, update=grpo_runs.ONE_UPDATE).train()
    first, *_, last = (line["kl"] for line in read_metrics(tmp_path))
    assert first == 0.0 < last


def test_the_base_is_equal_to_the_bit_after_training_and_the_adapter_alone_is_in_the_optimizer(whole):
    maker, trainer, *_ = whole
    layers = 2 if maker is not make_grpo else 1
    base = tiny.causal_lm(num_hidden_layers=layers)
    with trainer.policy.with_adapter(None):
        assert torch.equal(logits(trainer.policy.lm), logits(base))
    assert not torch.equal(logits(trainer.policy.lm), logits(base))
    names = {id(p): name for name, p in trainer.policy.named_parameters()}
    held = [names[id(p)] for group in trainer.learner.own_optimizer.param_groups for p in group["params"]]
    assert held and all(".lora_" in name or name.startswith("critic.") for name in held)
    assert {names[id(p)] for p in trainer.learner.own_optimizer.state} == set(held)


def test_checkpoints_hold_adapter_and_critic_alone_and_are_as_small_as_these(whole):
    _, trainer, out, _ = whole
    trained = {name: p for name, p in trainer.policy.named_parameters() if p.requires_grad}
    for step in range(1, STEPS + 1):
        folder = out / "checkpoints" / f"step-{step:06d}"
        with safe_open(folder / "policy.safetensors", "pt") as file:
            assert set(file.keys()) == set(trained)
        with safe_open(folder / "optimizer.safetensors", "pt") as file:
            moments = set(file.keys())
        assert moments == {f"{kind}/{n}" for n in trained for kind in ("exp_avg", "exp_avg_sq", "step")}
        numbers = sum(p.numel() for p in trained.values())
        for name, values in (("policy", numbers), ("optimizer", 2 * numbers + len(trained))):
            size = (folder / f"{name}.safetensors").stat().st_size
            assert 4 * values < size < 4 * values + 256 * (1 + len(trained) * (1 if name == "policy" else 3))


@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_stopped_after_any_step_and_resumed_leaves_the_same_bytes(step, whole, tmp_path):
    maker, _, _, files = whole
    torch.manual_seed(step)  # plays no part
    maker(tmp_path, callbacks=[AtStep(step, stop)]).train()
    maker(tmp_path).train(resume=True)
    assert differing(results(tmp_path), files) == []


def test_the_comparison_notices_an_adapter_that_is_drawn_from_the_global_generator(whole, tmp_path, monkeypatch):
    from contextlib import nullcontext

    maker, _, _, files = whole
    monkeypatch.setattr("rlhf.models.adapters._new_weights", lambda seed: nullcontext())
    maker(tmp_path).train()
    assert "metrics.jsonl" in differing(results(tmp_path), files)


def test_another_seed_draws_another_adapter(tmp_path):
    names = []
    for seed in (0, 1):
        policy = make_trainer(tmp_path / str(seed), seed=seed).policy
        names.append([p for n, p in policy.named_parameters() if "lora_A" in n])
    assert not any(torch.equal(first, second) for first, second in zip(*names, strict=True))


@pytest.mark.parametrize("kl_coef", [0.05, 0.0])
def test_resuming_on_a_base_that_has_changed_is_refused_and_named(kl_coef, tmp_path):
    settings = {"ppo": {"kl_coef": kl_coef}, "total_steps": 2}
    make_trainer(tmp_path, callbacks=[AtStep(0, stop)], **settings).train()
    lm = tiny.causal_lm()
    lm.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(InputError, match=r"reference: .*\(saved\)" if kl_coef else "other frozen weights"):
        make_trainer(tmp_path, lm=lm, **settings).train(resume=True)
    make_trainer(tmp_path, **settings).train(resume=True)


# --- the reference ------------------------------------------------------------------------------------------------------


def alone(lm, inputs, actions) -> list[list[float]]:
    """Log-probs of each row by the stock model's own logits."""
    rows = []
    for ids, length, chosen in zip(inputs["input_ids"], inputs["prompt_lengths"].tolist(), actions, strict=True):
        with torch.no_grad():
            logprobs = lm(ids[: length + len(chosen)].unsqueeze(0)).logits[0].log_softmax(-1)
        rows.append([float(logprobs[length - 1 + t, token]) for t, token in enumerate(chosen.tolist())])
    return rows


def test_the_reference_is_the_stock_model_before_training_and_after_three_steps(tmp_path):
    trainer = tiny.trainer(tmp_path, lm=tiny.causal_lm(dtype=torch.float64), peft_config=lora(), callbacks=[])
    stock = tiny.causal_lm(dtype=torch.float64)
    for trained in (False, True):
        if trained:
            trainer.train()
        inputs = {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 8, 9]] * 2), "prompt_lengths": torch.tensor([3, 2])}
        actions = torch.tensor([[6, 7, 8, 9], [5, 6, 7, 8]])
        expected = torch.tensor(alone(stock, inputs, actions)).double()
        with torch.no_grad():
            found, own = trainer.reference(inputs, actions).logprobs, trainer.policy(inputs, actions).logprobs
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert torch.equal(own, found) is not trained


def exported(path: Path, **changes) -> Path:
    """An adapter of 1 step and its base, both on disk."""
    tiny.causal_lm().save_pretrained(path / "base")
    tiny.tokenizer().save_pretrained(path / "base")
    options = {"lm": str(path / "base"), "tokenizer": str(path / "base"), "total_steps": 1, **changes}
    runs.short_run(path / "first", **options)
    return path / "first" / "policy"


@pytest.mark.parametrize("given", ["path", "PeftModel"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_policy_that_starts_from_a_trained_adapter_has_that_adapter_as_its_reference(given, dropout, tmp_path):
    """KL to it is exactly 0 at first; to the base, which a reference without adapters would be, it is not."""
    adapter = exported(tmp_path, peft_config=lora(lora_dropout=dropout))

    def policy():
        return str(adapter) if given == "path" else runs.opened(tmp_path / "base", adapter)

    start = logits(runs.opened(tmp_path / "base", adapter))
    trainer = tiny.trainer(tmp_path / "run", lm=policy())
    assert torch.equal(logits(trainer.policy.lm), start)
    trainer.train()
    first, *_, last = read_metrics(tmp_path / "run")
    assert first["reward_kl"] == 0.0 != last["reward_kl"]
    trainer = tiny.trainer(tmp_path / "control", lm=policy())
    trainer.reference.adapter = None
    trainer.train()
    assert read_metrics(tmp_path / "control")[0]["reward_kl"] > 1e-3


def test_a_run_from_a_trained_adapter_resumes_to_the_byte_and_only_from_that_one(tmp_path):
    adapter = str(exported(tmp_path))
    make = {"peft_config": None, "lm": adapter}
    make_trainer(tmp_path / "whole", **make).train()
    make_trainer(tmp_path / "run", callbacks=[AtStep(0, stop)], **make).train()
    other = str(exported(tmp_path / "other", seed=9))
    with pytest.raises(InputError, match=r"reference: .*\(saved\)"):
        make_trainer(tmp_path / "run", peft_config=None, lm=other).train(resume=True)
    make_trainer(tmp_path / "run", **make).train(resume=True)
    assert differing(results(tmp_path / "run"), results(tmp_path / "whole")) == []


def test_a_reference_may_be_a_peft_model_and_its_adapter_counts(tmp_path):
    reference = runs.trained_peft(lm_seed=3)
    trainer = tiny.trainer(tmp_path, reference=reference)
    assert torch.equal(logits(trainer.reference.module.lm), logits(reference))
    assert not torch.equal(logits(reference), logits(tiny.causal_lm(seed=3)))


def test_an_adapter_and_settings_for_another_are_refused_together(tmp_path):
    adapter = str(exported(tmp_path))
    for policy in (adapter, runs.trained_peft()):
        with pytest.raises(InputError, match="has an adapter already"):
            tiny.trainer(tmp_path / "run", lm=policy, peft_config=lora())


def test_a_model_that_an_earlier_training_put_an_adapter_in_is_refused(tmp_path):
    lm = tiny.causal_lm()
    runs.short_run(tmp_path / "a", lm=lm, total_steps=1)
    for config in (None, lora()):
        with pytest.raises(InputError, match="Load the model again"):
            tiny.trainer(tmp_path / "b", lm=lm, peft_config=config)


# --- precision ----------------------------------------------------------------------------------------------------------

BFLOAT16_RUN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from tests import tiny
from tests.adapters import lora, logits
from tests.tiny import AtStep
from tests.trainers.test_interruption import stop
out = sys.argv[1]
tiny.causal_lm(initializer_range=0.1).save_pretrained(out + "/base")
tiny.tokenizer().save_pretrained(out + "/base")
def make(name, **changes):
    options = dict(lm=out + "/base", precision="bfloat16", checkpoint_every=1, critic="adapter")
    return tiny.trainer(f"{out}/{name}", peft_config=lora(modules_to_save=["lm_head"]), **options, **changes)
trainer = make("run")
types = {(p.requires_grad, p.dtype) for p in trainer.policy.parameters()}
assert types == {(True, torch.float32), (False, torch.bfloat16)}, types
before = {n: p.detach().clone() for n, p in trainer.policy.named_parameters()}
trainer.train()
assert all(v.dtype == torch.float32 for s in trainer.learner.own_optimizer.state.values() for v in s.values())
for name, parameter in trainer.policy.named_parameters():
    assert parameter.requires_grad or torch.equal(parameter, before[name]), name
    assert parameter.dtype == before[name].dtype
moved = [n for n, p in trainer.policy.named_parameters() if not torch.equal(p, before[n])]
assert any(".default." in n for n in moved) and any(".critic." in n for n in moved)
base = AutoModelForCausalLM.from_pretrained(out + "/base", dtype=torch.bfloat16)
stock = PeftModel.from_pretrained(base, out + "/run/policy")
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert torch.equal(logits(stock), logits(trainer.policy.lm))
make("again", callbacks=[AtStep(1, stop)]).train()
make("again").train(resume=True)
for name in ("metrics.jsonl", "policy/adapter_model.safetensors", "checkpoints/step-000003/optimizer.safetensors"):
    assert open(f"{out}/run/{name}", "rb").read() == open(f"{out}/again/{name}", "rb").read(), name
"""


def test_float32_adapters_on_a_bfloat16_base_train_export_and_resume(tmp_path):
    """In a process of its own: Accelerate fixes the precision for the life of a process."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", BFLOAT16_RUN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "run")[0]["reward_kl"] == 0.0


def test_a_bfloat16_base_beside_float32_arithmetic(tmp_path):
    trainer = runs.short_run(tmp_path / "run", lm=tiny.causal_lm(), frozen_precision="bfloat16")
    assert {p.dtype for p in trainer.policy.lm.parameters() if not p.requires_grad} == {torch.bfloat16}
    first, last = read_metrics(tmp_path / "run")
    assert first["reward_kl"] == 0.0 != last["reward_kl"]
    with pytest.raises(InputError, match=r"frozen_precision=bfloat16: modules_to_save"):
        runs.short_run(tmp_path / "b", peft_config=lora(modules_to_save=["lm_head"]), frozen_precision="bfloat16")


# --- what it learns -----------------------------------------------------------------------------------------------------

BETA = 0.37
TARGETS = ["wte", "wpe", "c_attn", "c_proj", "c_fc"]
WHOLE = {"r": 32, "lora_alpha": 32, "target_modules": TARGETS, "modules_to_save": ["lm_head"]}
"""Ranks with which the optimum can be said: the model is 32 wide."""


@pytest.fixture(scope="module", params=["head", "adapter", "model"])
def learnt(request, tmp_path_factory):
    """(problem, result, value at the root) of training on the tree with adapters on and each critic."""
    out = tmp_path_factory.mktemp(request.param)
    lm = token_tree.language_model(0)
    critic = request.param
    if critic == "model":
        critic = str(out / "base")
        lm.save_pretrained(critic)
    problem = token_tree.problem_of(lm, beta=BETA)
    result = token_tree.train(
        problem,
        lm,
        out / "run",
        peft_config=lora(**WHOLE),
        critic=critic,
        learning_rate=3e-3,
        total_steps=60,
        generation=GenerationConfig(max_new_tokens=tree.MAX_TOKENS),
        ppo=PPOConfig(kl_coef=BETA),
    )
    return problem, result


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_with_adapters_on_the_known_optimum_is_reached_whatever_the_critic(learnt):
    _, result = learnt
    print(f"regret {result.regret:.4f}, KL {result.kl_to_optimum:.4f}, value error {result.value_error:.3f}")
    assert result.regret <= 0.01


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_every_critic_learns_the_value_of_the_root(learnt):
    """beta log Z, the value of the empty sentence under the optimum."""
    problem, result = learnt
    last = result.values[-1, 0]
    print(f"V(root) {last:.4f}, beta log Z {problem.best_objective():.4f}")
    assert abs(float(last - problem.best_objective())) <= 0.05
    assert result.value_error < 0.15
