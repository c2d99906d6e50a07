"""The memory plan: each figure is known by other means, by algebra or by building and training the tiny model."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from rlhf import GenerationConfig, PPOConfig, PPOTrainer, PPOTrainerConfig, UpdateConfig
from rlhf.algorithms.ppo import PPO
from rlhf.models.lora import LoRASettings
from rlhf.models.policy import Policy
from rlhf.models.recompute import recompute_layers
from rlhf.trainers import plan as planning
from rlhf.trainers.dry_run import Hollow, Shape, transients
from rlhf.trainers.plan import PHASES, Machine, Models, Plan, Row, advice, models_of, plan
from tests import tiny
from tests.architectures import PARAMETERS, folder_of

ROWS, PROMPT, NEW = 4, 7, 6
LAYERS = 2


def settings(tmp_path, **changes):
    update = UpdateConfig(num_epochs=1, minibatch_size=ROWS, microbatch_tokens=2 * (PROMPT + NEW))
    generation = GenerationConfig(max_new_tokens=NEW)
    fixed = {"update": update, "generation": generation, "ppo": PPOConfig(kl_coef=0.05)}
    sizes = {"prompts_per_step": ROWS, "total_steps": 1, "max_prompt_tokens": PROMPT}
    return PPOTrainerConfig(output_dir=str(tmp_path / "run"), **(fixed | sizes | changes))


def trained(config, *, lora=0, critic=None):
    trainer = PPOTrainer(
        tiny.causal_lm(),
        lambda completions, **_: [float(len(text)) for text in completions],
        tiny.rows(),
        config,
        tokenizer=tiny.tokenizer(),
        critic=critic,
        peft_config=LoRASettings(r=lora).peft_config(),
    )
    trainer.train()
    return trainer


def cpu(**changes):
    return Machine(**({"kind": "cpu", "memory": 10**9} | changes))


def sizes(found: Plan) -> dict[str, int]:
    return {row.name: row.bytes for row in found.rows}


CASES = [{}, {"lora": 4}, {"lora": 4, "critic": "adapter"}, {"critic": "own"}]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_held_all_the_time_is_what_a_trainer_holds_after_a_step(case, tmp_path):
    critic = tiny.reward_model() if case.get("critic") == "own" else case.get("critic")
    config = settings(tmp_path)
    trainer = trained(config, **(case | {"critic": critic}))
    found = sizes(plan(config, trainer.algorithm, models_of(trainer.policy, trainer.reference, []), cpu()))
    parameters = list(trainer.policy.parameters())
    own = {id(p) for p in trainer.policy.critic.own_parameters()}

    def total(chosen):
        return sum(p.nbytes for p in parameters if chosen(p))

    assert found["weights, trained"] == total(lambda p: p.requires_grad and id(p) not in own)
    assert found.get("weights, frozen", 0) == total(lambda p: not p.requires_grad and id(p) not in own)
    assert found["critic's own weights"] == total(lambda p: id(p) in own)
    assert found["gradients"] == total(lambda p: p.requires_grad)
    states = trainer.learner.own_optimizer.state.values()
    assert found["Adam's moments"] == sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    reference = trainer.reference.module
    assert found.get("reference", 0) == (sum(p.nbytes for p in reference.parameters()) if reference is not None else 0)
    assert ("reference" in found) == ("lora" not in case)  # with adapters, the base is the reference


def shape(**changes):
    return Shape(**({"config": tiny.config("llama"), "critic": "head"} | changes))


@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_of_public_models_are_counted_as_their_authors_do(name, tmp_path):
    from transformers import AutoConfig

    built = Shape(config=AutoConfig.from_pretrained(folder_of(name, tmp_path))).build()
    assert sum(p.numel() for p in built.parameters()) == PARAMETERS[name]


def test_adapters_are_counted_as_algebra_does():
    config, r = tiny.config("llama"), 4
    hidden, inner, heads, kv, size = 16, 24, 2, 1, config.head_dim
    pairs = [(hidden, heads * size), (hidden, kv * size), (hidden, kv * size), (heads * size, hidden)]
    pairs += [(hidden, inner), (hidden, inner), (inner, hidden)]
    policy = shape(lora=LoRASettings(r=r).peft_config(), critic=None).build()
    numbers = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert numbers == LAYERS * sum(r * (a + b) for a, b in pairs)


def test_the_kv_cache_grows_by_the_bytes_that_algebra_and_a_real_cache_say():
    groups, copies, more = 3, 2, 32
    hollow = Hollow(shape())
    (_, short), (_, long) = (hollow.sampling(groups, copies, PROMPT, new, temperature=1.0) for new in (NEW, NEW + more))
    cache = DynamicCache(config=tiny.config("llama"))
    with torch.no_grad():
        ids = torch.ones(groups * copies, more, dtype=torch.int64)
        tiny.causal_lm()(input_ids=ids, past_key_values=cache, use_cache=True)
    real = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert (
        real == 2 * LAYERS * 1 * 8 * 4 * groups * copies * more
    )  # keys and values x layers x kv heads x width x float32
    assert long.kept - short.kept == real


def test_the_plan_has_the_kv_cache_of_what_a_process_samples_at_once(tmp_path):
    def cache(new, at_once=256, **machine):
        generation = GenerationConfig(max_new_tokens=new, completions_at_once=at_once)
        return sizes(plan(*everything(tmp_path, cpu(**machine), generation=generation)))["KV cache and casts"]

    of_a_token = 2 * LAYERS * 1 * 8 * 4
    assert cache(NEW + 32) - cache(NEW) == ROWS * 32 * of_a_token
    assert cache(NEW + 32, at_once=3) - cache(NEW, at_once=3) == 3 * 32 * of_a_token
    assert cache(NEW + 32, processes=2) - cache(NEW, processes=2) == ROWS // 2 * 32 * of_a_token


def saved_bytes(policy, recompute):
    """Bytes that autograd keeps for the backward pass of a real model, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    inputs = {
        "input_ids": torch.ones(ROWS, PROMPT + NEW, dtype=torch.int64),
        "prompt_lengths": torch.full((ROWS,), PROMPT),
    }
    if recompute:
        recompute_layers(policy)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = policy(inputs, torch.ones(ROWS, NEW, dtype=torch.int64), with_values=True)
    assert outputs.values is not None
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_that_autograd_saves(recompute):
    (found,) = Hollow(shape(recompute=recompute)).update(ROWS, PROMPT, NEW, values=True, entropy=False)
    real = saved_bytes(Policy(tiny.causal_lm(), critic="head"), recompute)
    assert real <= found.kept <= 1.1 * real  # beside them there are the outputs themselves


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_deep_model_needs_what_the_straight_line_through_two_and_three_layers_says(family, recompute):
    deep = {"n_layer": 7} if family == "gpt2" else {"num_hidden_layers": 7}
    whole = shape(config=tiny.config(family, **deep), recompute=recompute)
    runs = [
        ("update", (ROWS, PROMPT, NEW), {"values": True, "entropy": True}),
        ("scoring", (ROWS, PROMPT, NEW), {"values": True}),
        ("sampling", (3, 2, PROMPT, NEW), {"temperature": 0.7}),
    ]
    for phase, numbers, options in runs:
        line, real = transients(whole, phase, *numbers, **options), getattr(Hollow(whole), phase)(*numbers, **options)
        assert [t.kept for t in line] == pytest.approx([t.kept for t in real], rel=0.02)
        assert [t.peak for t in line] == pytest.approx([t.peak for t in real], rel=0.03), phase


def everything(tmp_path, machine=None, models=None, **changes):
    config = tiny.config("llama")
    models = models or Models(policy=config, critic="head", reference=config)
    settled = settings(tmp_path, **changes)
    return settled, PPO(settled.ppo), models, machine or cpu()


def test_the_peak_is_that_of_the_largest_phase(tmp_path):
    found = plan(*everything(tmp_path))
    assert found.peak == max(found.total(phase) for phase in PHASES) == found.total(found.worst)
    by_hand = Plan((Row("a", 5), Row("b", 3, "sampling"), Row("c", 4, "backward")), memory=10)
    assert (by_hand.peak, by_hand.worst, by_hand.fits) == (9, "backward", True)
    assert not dataclasses.replace(by_hand, memory=9).fits


def test_shards_divide_what_is_held_and_copies_do_not(tmp_path):
    one = sizes(plan(*everything(tmp_path)))
    copies = sizes(plan(*everything(tmp_path, cpu(processes=2))))
    shards = sizes(plan(*everything(tmp_path, cpu(processes=2, sharded=True))))
    for name in ("weights, trained", "Adam's moments", "reference", "gradients"):
        assert copies[name] == one[name] == pytest.approx(2 * shards[name], abs=2)
    assert copies["DDP's buckets"] == one["gradients"] and "DDP's buckets" not in shards
    assert shards["gathered policy"] == one["weights, trained"] + one["critic's own weights"]


def test_advice_names_what_would_save_memory_and_how_much(tmp_path):
    wide = tiny.config("llama", hidden_size=256, intermediate_size=512)
    whole = Models(policy=wide, critic="head", reference=wide)
    arguments = everything(tmp_path, Machine(kind="cuda", memory=10_000), whole)
    found = {a.remedy: a.plan for a in advice(*arguments)}
    now = plan(*arguments)
    less = plan(*everything(tmp_path, arguments[3], whole, frozen_precision="bfloat16"))
    assert found["frozen_precision: bfloat16"].peak == less.peak < now.peak
    lora = Models(policy=wide, critic="head", lora=LoRASettings(r=16).peft_config())
    assert found["lora.r: 16"].peak == plan(*everything(tmp_path, arguments[3], lora)).peak
    assert found["all of these together"].peak < min(p.peak for name, p in found.items() if "together" not in name)
    assert advice(*everything(tmp_path)) == []  # it fits


def test_a_plan_never_ends_a_run(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("unknown")

    trainer = trained(settings(tmp_path))
    arguments = (trainer.config, trainer.algorithm, trainer.policy, trainer.reference, [], trainer.distributed)
    assert planning.memory_lines(*arguments, prompt_tokens=PROMPT, held_out=0) == []  # small models: nothing to say
    small = Machine(kind="cpu", memory=10**5)
    monkeypatch.setattr(planning, "this_machine", lambda *_: small)
    (first, *others) = planning.memory_lines(*arguments, prompt_tokens=PROMPT, held_out=2)
    assert first.startswith("memory: about") and "does NOT fit" in first and others
    monkeypatch.setattr(planning, "plan", fails)
    (line,) = planning.memory_lines(*arguments, prompt_tokens=PROMPT, held_out=0)
    assert "cannot be planned" in line and "unknown" in line


def test_making_a_plan_draws_no_random_numbers_and_makes_no_weights(tmp_path):
    before = torch.random.get_rng_state()
    plan(*everything(tmp_path))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(type(p).__name__ == "Parameter" and p.device.type == "meta" for p in shape().build().parameters())
