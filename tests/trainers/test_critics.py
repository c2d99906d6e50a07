"""Critics (a head, a model of its own, an adapter of the policy's base): their start, their training, what they leave."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf import GenerationConfig, GRPOConfig, GRPOTrainer, GRPOTrainerConfig, InputError
from rlhf.models.adapters import CRITIC
from rlhf.models.critic import load_critic
from rlhf.models.policy import Policy
from rlhf.models.states import states_before
from rlhf.rewards.model import RewardModel
from rlhf.runs.jsonlines import read_metrics
from rlhf.training.steppers import EagerStepper
from tests import adapters as runs
from tests import tiny
from tests.adapters import IDS, lora
from tests.rounding import EPS
from tests.tiny import AtStep
from tests.trainers import grpo_runs
from tests.trainers.test_interruption import differing, stop

KINDS = ("head", "adapter", "model")
STEPS = 3


def make_trainer(output_dir: Path, kind: str, **changes):
    """PPO with a critic of this kind. The policy has an adapter where the critic is one."""
    own = {"peft_config": lora()} if kind == "adapter" else {}
    critic = tiny.reward_model("gpt2") if kind == "model" else kind
    settings = {"total_steps": STEPS, "checkpoint_every": 1, "critic": critic, **own}
    return tiny.trainer(output_dir, **{**settings, **changes})


def own_names(trainer) -> set[str]:
    own = {id(p) for p in trainer.policy.critic.own_parameters()}
    return {name for name, p in trainer.policy.named_parameters() if id(p) in own}


# --- where they start ---------------------------------------------------------------------------------------------------


def prefix_values(policy: Policy) -> torch.Tensor:
    """The critic's value of every prefix of IDS."""
    places = torch.arange(IDS.shape[1]).expand(len(IDS), -1)
    with torch.no_grad():
        return policy.critic(states_before(policy.lm, IDS, places), IDS, places)


@pytest.mark.parametrize("given", ["module", "path"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_critic_made_from_a_reward_model_starts_at_its_score_of_every_prefix(family, given, tmp_path):
    model = tiny.reward_model(family)
    model.save_pretrained(tmp_path)
    critic = str(tmp_path) if given == "path" else tiny.reward_model(family)
    values = prefix_values(Policy(tiny.causal_lm("qwen3"), critic=critic))
    scores = RewardModel(model)
    for row, ids in enumerate(IDS.tolist()):
        expected = scores.score([ids[: length + 1] for length in range(len(ids))])
        assert values[row].tolist() == pytest.approx(expected, abs=2048 * EPS)
    assert values.abs().min() > 1e-3


def test_the_first_rollout_is_valued_with_the_reward_models_scores(tmp_path):
    model = tiny.reward_model("gpt2")
    trainer = tiny.trainer(tmp_path, critic=tiny.reward_model("gpt2"))
    seen = trainer.source.collect(0).trajectories
    starts = seen.inputs["prompt_lengths"].tolist()
    for row, start in enumerate(starts):
        count = int(seen.mask[row].sum())
        ids = seen.inputs["input_ids"][row].tolist()
        expected = RewardModel(model).score([ids[: start + t] for t in range(count)])
        assert seen.values[row, :count].tolist() == pytest.approx(expected, abs=2048 * EPS)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_critic_made_from_a_causal_lm_starts_at_0_with_its_body(family, tmp_path):
    lm = tiny.causal_lm(family, seed=4)
    lm.save_pretrained(tmp_path)
    policy = Policy(tiny.causal_lm(), critic=str(tmp_path))
    assert not prefix_values(policy).any()
    body = policy.critic.model.base_model.state_dict()
    assert all(torch.equal(body[name], tensor) for name, tensor in lm.base_model.state_dict().items())


@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_a_head_and_a_value_adapter_start_at_0(kind, tmp_path):
    assert not prefix_values(make_trainer(tmp_path, kind).policy).any()


def test_loading_a_critic_disturbs_no_draws(tmp_path):
    tiny.causal_lm().save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    load_critic(str(tmp_path))
    assert torch.equal(torch.random.get_rng_state(), before)


# --- warm-up ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_warm_up_the_policy_and_its_moments_stay_and_the_critic_moves(kind, tmp_path):
    looked = []

    def look(trainer) -> None:
        after, names = tiny.weights(trainer), {id(p): name for name, p in trainer.policy.named_parameters()}
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        looked.append((moved, {names[id(p)] for p in trainer.learner.own_optimizer.state}))

    trainer = make_trainer(
        tmp_path,
        kind,
        critic_warmup_steps=2,
        weight_decay=0.1,  # moves whatever has a gradient, be it 0
        ppo={"entropy_coef": 0.1, "normalize_advantages": "minibatch"},
        callbacks=[AtStep(1, look)],
    )
    before, own = tiny.weights(trainer), own_names(trainer)
    trainer.train()
    ((moved, with_moments),) = looked
    assert moved and moved <= own and any("head" in name or "score" in name for name in moved)
    assert with_moments == own


@pytest.mark.parametrize("kind", KINDS)
def test_after_the_warm_up_the_policy_learns_and_metrics_of_the_warm_up_do_not_pretend_that_it_did(kind, tmp_path):
    trainer = make_trainer(tmp_path, kind, critic_warmup_steps=1, ppo={"entropy_coef": 0.1})
    before, own = tiny.weights(trainer), own_names(trainer)
    trainer.train()
    after = tiny.weights(trainer)
    assert any(not torch.equal(after[n], before[n]) for n in after if n not in own)
    warm, first, *_ = read_metrics(tmp_path)
    assert "policy_loss" not in warm and "clip_fraction_low" not in warm and warm["value_loss"] > 0
    assert warm.get("entropy", 1.0) > 0.1  # that of the rollout, or none: 0 would be wrong
    assert math.isfinite(first["policy_loss"]) and first["entropy"] > 0.1
    assert first["reward_kl"] == 0.0  # the second rollout is still the reference's


def test_the_warm_up_notices_a_policy_that_gets_a_gradient_of_0(tmp_path, monkeypatch):
    """With weights of 0 instead of no gradient, the policy's group has moments, and weight decay moves it."""
    step = EagerStepper._step
    monkeypatch.setattr(EagerStepper, "_step", lambda self, only=None: step(self))
    trainer = make_trainer(tmp_path, "adapter", critic_warmup_steps=2)
    own = own_names(trainer)
    trainer.train_step()
    names = {id(p): name for name, p in trainer.policy.named_parameters()}
    assert not {names[id(p)] for p in trainer.learner.own_optimizer.state} <= own


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 1])
def test_a_run_stopped_in_or_after_the_warm_up_resumes_to_the_byte(kind, step, whole_runs, tmp_path):
    make_trainer(tmp_path, kind, **COSTLY, callbacks=[AtStep(step, stop)]).train()
    make_trainer(tmp_path, kind, **COSTLY).train(resume=True)
    assert differing(results(tmp_path), whole_runs[kind]) == []


COSTLY = {"critic_warmup_steps": 1, "critic_learning_rate": 3e-3, "critic_max_grad_norm": 0.1, "warmup_steps": 2}


def results(output_dir: Path) -> dict[str, bytes]:
    files = [output_dir / "metrics.jsonl", *(f for f in sorted((output_dir / "policy").rglob("*")) if f.is_file())]
    last = output_dir / "checkpoints" / f"step-{STEPS:06d}"
    files += [last / name for name in ("policy.safetensors", "optimizer.safetensors", "state.json")]
    return {str(file.relative_to(output_dir)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    found = {}
    for kind in KINDS:
        out = tmp_path_factory.mktemp(kind)
        make_trainer(out, kind, **COSTLY).train()
        found[kind] = results(out)
    return found


# --- learning rate and clipping of its own ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_learning_rate_of_the_critic_is_its_own_at_every_step_of_the_schedule(kind, tmp_path):
    trainer = make_trainer(tmp_path, kind, critic_learning_rate=4e-4, learning_rate=1e-2, lr_schedule="linear")
    rates = []
    trainer.learner.own_optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(tuple(group["lr"] for group in optimizer.param_groups))
    )
    trainer.train()
    expected = [(1e-2 * (1 - step / STEPS), 4e-4 * (1 - step / STEPS)) for step in range(STEPS) for _ in range(4)]
    for found, wanted in zip(rates, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_adams_first_step_moves_each_group_by_its_own_rate(kind, tmp_path):
    """|step| = lr |g| / (|g| + eps), with eps = 1e-5 and g the clipped gradient."""
    settings = {
        "critic_learning_rate": 3e-5,
        "learning_rate": 1e-3,
        "update": {"num_epochs": 1, "minibatch_size": None},
    }
    trainer = make_trainer(tmp_path, kind, ppo={"normalize_advantages": "none"}, **settings)
    before, own, gradients = tiny.weights(trainer), own_names(trainer), {}

    def keep(*_):
        gradients.update({n: p.grad.clone() for n, p in trainer.policy.named_parameters() if p.grad is not None})

    trainer.learner.own_optimizer.register_step_pre_hook(keep)
    trainer.train_step()
    after = tiny.weights(trainer)
    for name, gradient in gradients.items():
        rate = 3e-5 if name in own else 1e-3
        expected = before[name].double() - rate * gradient.double() / (gradient.double().abs() + 1e-5)
        size = float(before[name].abs().max())
        torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=8 * EPS * size + 64 * EPS * rate)
    assert {n in own for n in gradients} == {True, False}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [None, 1e-3])
def test_the_clip_norm_of_the_critic_acts_on_its_group_alone(kind, limit, tmp_path):
    """Norms as the optimizer sees them are the smaller of limit and reported norm, for each group that is clipped alone."""
    trainer = make_trainer(
        tmp_path,
        kind,
        critic_max_grad_norm=limit,
        update={"max_grad_norm": 0.05, "num_epochs": 1, "minibatch_size": None},
    )
    seen = []
    trainer.learner.own_optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(
            {
                g["name"]: math.sqrt(
                    sum(float(p.grad.double().square().sum()) for p in g["params"] if p.grad is not None)
                )
                for g in optimizer.param_groups
            }
        )
    )
    metrics = trainer.train_step()
    (norms,) = seen
    if kind == "head" and limit is None:  # clipped together with the policy
        assert "critic_grad_norm" not in metrics
        assert math.hypot(*norms.values()) == pytest.approx(min(0.05, metrics["grad_norm"]), rel=1e-4)
        return
    assert metrics["grad_norm"] > 0.05 and metrics["critic_grad_norm"] > (limit or 0.05)  # so that both are clipped
    assert norms["policy"] == pytest.approx(0.05, rel=1e-4)
    assert norms["critic"] == pytest.approx(limit or 0.05, rel=1e-4)


# --- what they leave ----------------------------------------------------------------------------------------------------


def test_the_exported_head_is_the_head(tmp_path):
    trainer = make_trainer(tmp_path, "head")
    trainer.train()
    head = load_file(tmp_path / "policy" / "value_head.safetensors")
    own = dict(trainer.policy.critic.head.named_parameters())
    assert head.keys() == own.keys() and all(torch.equal(head[name], own[name]) for name in own)
    assert any(tensor.any() for tensor in head.values())


@pytest.mark.parametrize("source", ["reward model", "causal LM"])
def test_the_exported_critic_loads_in_stock_transformers_and_again_as_a_critic(source, tmp_path):
    critic = tiny.reward_model("gpt2")
    if source == "causal LM":
        tiny.causal_lm("gpt2", seed=4).save_pretrained(critic := tmp_path / "given")
        critic = str(critic)
    trainer = tiny.trainer(tmp_path / "run", critic=critic)
    trainer.train()
    folder = tmp_path / "run" / "policy" / "critic"
    stock, live = AutoModelForSequenceClassification.from_pretrained(folder), prefix_values(trainer.policy)
    for row, ids in enumerate(IDS):
        for length in range(1, len(ids) + 1):
            with torch.no_grad():
                score = stock(ids[:length].unsqueeze(0)).logits.item()
            assert live[row, length - 1].item() == pytest.approx(score, abs=2048 * EPS)
    assert not torch.equal(live, prefix_values(Policy(tiny.causal_lm(), critic=tiny.reward_model("gpt2"))))
    again = tiny.trainer(tmp_path / "again", critic=str(folder))
    assert torch.equal(prefix_values(again.policy), live)


def test_the_exported_value_adapter_loads_with_peft_and_values_alike(tmp_path):
    tiny.causal_lm().save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "run", "adapter", peft_config=lora(modules_to_save=["lm_head"]))
    trainer.train()
    folder = tmp_path / "run" / "policy" / "critic"
    stock, head = runs.opened(tmp_path / "base", folder), load_file(folder / "value_head.safetensors")
    with torch.no_grad():
        states = stock.get_base_model().base_model(IDS).last_hidden_state
    values = torch.nn.functional.linear(states, head["linear.weight"], head["linear.bias"])
    torch.testing.assert_close(values.squeeze(-1), prefix_values(trainer.policy), rtol=0, atol=64 * EPS)
    policy = runs.opened(tmp_path / "base", tmp_path / "run" / "policy")
    with torch.no_grad():
        other = policy.get_base_model().base_model(IDS).last_hidden_state
    assert (other - states).abs().max() > 1e-3  # the policy's adapter is another one
    assert torch.equal(runs.logits(policy), runs.logits(trainer.policy.lm))


def test_a_value_adapter_and_the_policys_do_not_train_each_other(tmp_path):
    """The value loss alone trains the one, the policy loss alone the other."""
    trainer = make_trainer(tmp_path, "adapter", total_steps=1)
    trainer.train()
    for parameter in trainer.policy.parameters():
        parameter.grad = None
    outputs = trainer.policy({"input_ids": IDS, "prompt_lengths": torch.tensor([3, 2])}, IDS[:, 3:], with_values=True)
    own = own_names(trainer)
    for loss, inside in ((outputs.values.sum(), True), (outputs.logprobs.sum(), False)):
        names = [name for name, p in trainer.policy.named_parameters() if p.requires_grad]
        wanted = [p for _, p in trainer.policy.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
        assert {n for n, g in zip(names, found, strict=True) if g is not None} == {
            n for n in names if (n in own) is inside
        }
    assert any(f".{CRITIC}." in name for name in own)


# --- what is refused ----------------------------------------------------------------------------------------------------


def three_labels(path: Path) -> str:
    config = tiny.config("gpt2", num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    return str(path)


def few_tokens(path: Path) -> str:
    tiny.reward_model("gpt2", vocab_size=8).save_pretrained(path)
    return str(path)


def other_tokens(path: Path) -> str:
    """As many tokens, in another order."""
    tiny.reward_model("gpt2").save_pretrained(path)
    tokenizer = tiny.tokenizer()
    vocabulary = tokenizer.get_vocab()
    swapped = {"c": vocabulary["d"], "d": vocabulary["c"]}
    backend = Tokenizer(models.WordLevel(vocabulary | swapped, unk_token="<bos>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    return str(path)


def no_linear_score(path: Path) -> str:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=tiny.VOCABULARY, num_labels=1, **sizes)).save_pretrained(path)
    return str(path)


REFUSED = {
    "several labels": (three_labels, "has 3 labels, but a value is one number"),
    "a smaller vocabulary": (few_tokens, "embeds 8 tokens.*tokenizer has 11"),
    "another vocabulary": (other_tokens, "another vocabulary"),
    "no linear score": (no_linear_score, "BertForSequenceClassification has no linear score"),
    "fewer positions": (
        lambda path: tiny.reward_model("gpt2", n_positions=8),
        "13 tokens, but the critic has positions",
    ),
    "half precision": (lambda path: tiny.reward_model(dtype=torch.bfloat16), "critic: its weights are torch.bfloat16"),
    "frozen": (lambda path: tiny.reward_model().requires_grad_(False), "critic: requires_grad is False"),
    "a causal LM's module": (lambda path: tiny.causal_lm(), "no linear score.*path of one or of a causal LM"),
    "an adapter without adapters": (lambda path: "adapter", "give peft_config"),
    "no such folder": (lambda path: str(path / "none"), "critic: there is no directory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_critics_that_cannot_value_the_policys_states_are_refused_before_training(case, tmp_path):
    make, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        tiny.trainer(tmp_path / "run", critic=make(tmp_path / "critic"))
    assert not (tmp_path / "run").exists()


def test_a_larger_vocabulary_with_the_policys_tokens_is_accepted(tmp_path):
    """Reward models often have a padding token more."""
    tiny.trainer(tmp_path, critic=tiny.reward_model("gpt2", vocab_size=12))


def test_grpo_learns_without_a_critic_and_says_so(tmp_path):
    config = GRPOTrainerConfig(
        output_dir=str(tmp_path),
        prompts_per_step=4,
        grpo=GRPOConfig(completions_per_prompt=4),
        generation=GenerationConfig(max_new_tokens=4),
    )
    for critic in ("head", tiny.reward_model()):
        with pytest.raises(InputError, match="GRPO learns without values"):
            GRPOTrainer(
                tiny.causal_lm(), [grpo_runs.verdict], tiny.rows(), config, tokenizer=tiny.tokenizer(), critic=critic
            )


def test_a_critic_that_is_the_reward_itself_is_refused(tmp_path):
    """Trained in place, it would change the scores that it is trained on."""
    model = tiny.reward_model()
    with pytest.raises(InputError, match=r"critic: it is the reward model .*Give a copy"):
        tiny.trainer(tmp_path, critic=model, rewards=[RewardModel(model)])
    tiny.trainer(tmp_path, critic=tiny.reward_model(), rewards=[RewardModel(model)])


def test_another_kind_of_critic_is_not_resumed_with(tmp_path):
    make_trainer(tmp_path, "head", callbacks=[AtStep(0, stop)]).train()
    with pytest.raises(InputError, match="critic"):
        make_trainer(tmp_path, "model").train(resume=True)
