"""Adapters: what they leave alone, what their exports are, and what is refused."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from rlhf import InputError
from rlhf.models.adapters import CRITIC, POLICY, REFERENCE, Adapters, adapted
from rlhf.models.export import save_merged
from rlhf.models.loading import load_causal_lm
from rlhf.models.policy import Policy, load_policy
from rlhf.models.reference import AdapterReference
from tests import adapters as runs
from tests import tiny
from tests.adapters import logits, lora
from tests.rounding import EPS

# --- exports ------------------------------------------------------------------------------------------------------------

NAMES = {"gpt2": ("wte", "c_attn"), "llama": ("embed_tokens", "q_proj")}
"""Embedding and a linear layer. GPT-2 is tied and has Conv1D layers; this Llama is untied."""
KINDS = {
    "all linear layers": lambda e, q: {},
    "lm_head whole": lambda e, q: {"modules_to_save": ["lm_head"]},
    "embedding whole": lambda e, q: {"modules_to_save": [e]},
    "both whole": lambda e, q: {"modules_to_save": [e, "lm_head"]},
    "embedding adapted": lambda e, q: {"target_modules": [e, q]},
    "lm_head adapted": lambda e, q: {"target_modules": ["lm_head", q]},
    "ranks and scales": lambda e, q: {"rank_pattern": {q: 2}, "alpha_pattern": {q: 3}, "use_rslora": True},
    "kept tied": lambda e, q: {"modules_to_save": [e], "ensure_weight_tying": True},
}
CASES = [(f, kind, {}, torch.float64) for f in NAMES for kind in KINDS]
CASES += [(f, kind, {}, torch.float32) for f in NAMES for kind in ("all linear layers", "both whole")]
CASES.append(("llama", "embedding adapted", {"tie_word_embeddings": True}, torch.float64))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(("family", "kind", "model", "dtype"), CASES, ids=str)
def test_the_adapter_and_the_merged_model_say_what_the_live_policy_says(family, kind, model, dtype, tmp_path):
    """Through stock peft and stock transformers; the live weights are not touched by either."""
    lm = tiny.causal_lm(family, dtype=dtype, **model)
    lm.save_pretrained(tmp_path / "base")
    base = logits(lm)
    trainer = runs.short_run(tmp_path / "run", lm=lm, peft_config=lora(**KINDS[kind](*NAMES[family])), total_steps=1)
    live, before = logits(lm), runs.copies(lm.state_dict().items())
    assert (live - base).abs().max() > 1e-3  # training did something
    save_merged(trainer.policy, trainer.tokenizer, tmp_path / "merged")
    after = lm.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    tolerance = 1024 * EPS if dtype == torch.float32 else 1e-12
    if dtype == torch.float64 and family == "llama":
        tolerance = 64 * EPS  # its norms compute in float32
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == dtype and type(merged) is type(lm)
    torch.testing.assert_close(logits(merged), live, rtol=0, atol=tolerance)
    stock = runs.opened(tmp_path / "base", tmp_path / "run" / "policy")
    torch.testing.assert_close(logits(stock), live, rtol=0, atol=tolerance)
    with trainer.policy.with_adapter(None):  # and the base is as it was, to the bit
        assert torch.equal(logits(lm), base)


def test_the_comparison_notices_a_scale_that_is_left_out_and_a_layout_that_is_turned(tmp_path, monkeypatch):
    """GPT-2's Conv1D stores the transpose; square layers would take either."""
    trainer = runs.short_run(tmp_path / "run", lm=tiny.causal_lm("gpt2"), peft_config=lora(target_modules=["c_proj"]))
    live, state = logits(trainer.policy.lm), trainer.policy.lm.state_dict()

    def difference() -> float:
        model = tiny.causal_lm("gpt2")
        model.load_state_dict(trainer.policy.adapters.merged(state))
        return float((logits(model) - live).abs().max())

    assert difference() < 1024 * EPS
    for layer in trainer.policy.adapters._layers:
        monkeypatch.setitem(layer.scaling, POLICY, 1.0)
    assert difference() > 1e-3
    monkeypatch.undo()
    attention = trainer.policy.lm.transformer.h[0].attn.c_proj  # 16 x 16
    monkeypatch.setattr(attention, "fan_in_fan_out", False)
    assert difference() > 1e-3


def test_names_in_the_exported_settings_are_in_an_order_that_no_process_changes(tmp_path):
    """peft keeps them in sets, whose order is another one in every process."""
    runs.short_run(tmp_path, total_steps=1, critic="adapter")
    for folder in ("policy", "policy/critic"):
        names = json.loads((tmp_path / folder / "adapter_config.json").read_text())["target_modules"]
        assert len(names) == 14 and names == sorted(names)


def test_the_adapter_alone_is_written_and_no_weight_of_the_base(tmp_path):
    trainer = runs.short_run(tmp_path)
    from safetensors.torch import load_file

    written = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in written)
    layers = 2 * (4 + 3)  # two layers of four projections of attention and three of the MLP, A and B each
    assert len(written) == 2 * layers and not (tmp_path / "policy" / "model.safetensors").exists()
    numbers = sum(t.numel() for t in written.values())
    assert numbers == sum(p.numel() for p in trainer.policy.adapters.parameters(POLICY))


# --- one base, several adapters -----------------------------------------------------------------------------------------


def policy_with(model, **options) -> Policy:
    lm, adapters = adapted(model)
    return Policy(lm, adapters=adapters, **options)


def flags(policy: Policy) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in policy.named_parameters()}


INPUTS = {"input_ids": runs.IDS, "prompt_lengths": torch.tensor([3, 2])}
ACTIONS = runs.IDS[:, 3:]


@pytest.mark.parametrize("critic", [None, "adapter"])
def test_a_reference_call_changes_neither_what_is_trained_nor_what_is_on(critic):
    policy = policy_with(runs.trained_peft(), critic=critic)
    reference = AdapterReference(policy)
    before = flags(policy)
    assert any(before.values()) and not all(before.values())
    assert not any(flag for name, flag in before.items() if f".{REFERENCE}." in name)
    reference(INPUTS, ACTIONS)
    assert flags(policy) == before and policy.adapters.active_name == POLICY
    assert all(layer.active_adapters == [POLICY] for layer in policy.adapters._layers)


def test_after_an_error_inside_the_adapter_that_was_on_is_on_again():
    policy = policy_with(runs.trained_peft(), critic="adapter")
    live = logits(policy.lm)
    with pytest.raises(ZeroDivisionError), policy.with_adapter(None), policy.with_adapter(CRITIC):
        raise ZeroDivisionError
    assert torch.equal(logits(policy.lm), live) and policy.adapters.active_name == POLICY


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.5}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_the_reference_of_a_trained_adapter_is_that_adapter_frozen(changes):
    """To the bit, also with dropout, which acts in neither; the base is another policy."""
    policy = policy_with(runs.trained_peft(**changes))
    with torch.no_grad():
        live = policy(INPUTS, ACTIONS).logprobs
    reference = AdapterReference(policy)
    assert reference.adapter == REFERENCE
    with torch.no_grad():
        for parameter in policy.adapters.parameters(POLICY):
            parameter.add_(0.1)
        assert torch.equal(reference(INPUTS, ACTIONS).logprobs, live)
        assert not torch.equal(policy(INPUTS, ACTIONS).logprobs, live)
        with policy.with_adapter(None):
            assert (policy(INPUTS, ACTIONS).logprobs - live).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "lora_B"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
    ],
)
def test_an_adapter_without_effect_needs_no_copy_and_any_effect_is_noticed(changes, name):
    lm = tiny.causal_lm()
    adapters = Adapters.add(lm, lora(**changes))
    assert adapters.is_fresh
    last = [p for full, p in lm.named_parameters() if name in full and p.requires_grad][-1]
    last.data.view(-1)[-1] += 0.1
    assert not adapters.is_fresh


@pytest.mark.parametrize("make", ["fresh", "critic", "reference", "path", "value head"])
def test_new_adapters_depend_on_the_seed_alone_and_disturb_no_draws(make, tmp_path):
    runs.trained_peft().save_pretrained(tmp_path / "adapter")
    tiny.causal_lm().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    found = []
    for number in (1, 2):
        lm, given = tiny.causal_lm(), runs.trained_peft()
        torch.manual_seed(number)
        before = torch.random.get_rng_state()
        if make == "fresh":
            policy = Policy(lm, adapters=Adapters.add(lm, lora(), seed=3))
        elif make == "critic":
            policy = Policy(lm, adapters=Adapters.add(lm, lora(), seed=3), critic="adapter")
        elif make == "reference":
            AdapterReference(policy := policy_with(given))
        elif make == "path":
            policy = load_policy(str(tmp_path / "adapter"))
        else:
            policy = Policy(lm, critic="head")
        assert torch.equal(torch.random.get_rng_state(), before)
        found.append(runs.copies(policy.named_parameters()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    other = tiny.causal_lm()
    if make == "fresh":
        again = runs.copies(Policy(other, adapters=Adapters.add(other, lora(), seed=4)).named_parameters())
        assert any(not torch.equal(again[name], found[0][name]) for name in again if "lora_A" in name)


def test_settings_are_not_written_into_and_serve_models_of_two_families():
    config = lora()
    for family in ("gpt2", "llama"):
        Adapters.add(tiny.causal_lm(family), config)
    assert config.target_modules == "all-linear" and config.base_model_name_or_path is None


def test_adapters_that_were_switched_off_are_trained_all_the_same():
    model = runs.trained_peft()
    live = logits(model)
    model.base_model.disable_adapter_layers()
    assert not torch.equal(logits(model), live)
    assert torch.equal(logits(policy_with(model).lm), live)


# --- what is refused ----------------------------------------------------------------------------------------------------

REFUSED = {
    "bias": "all",
    "use_dora": True,
    "init_lora_weights": "pissa",
    "trainable_token_indices": [3],
    "layer_replication": [[0, 2], [1, 2]],
    "alora_invocation_tokens": [3],
    "use_qalora": True,
    "lora_bias": True,
}


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_under_which_the_adapter_is_more_than_a_product_on_a_frozen_base_are_refused(setting):
    lm = tiny.causal_lm()
    before = runs.copies(lm.named_parameters())
    with pytest.raises(InputError, match=rf"peft_config: {setting}=.*Set it to"):
        Adapters.add(lm, lora(**{setting: REFUSED[setting]}))
    after = dict(lm.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_setting_of_a_later_peft_is_refused_unless_it_has_its_default():
    from dataclasses import dataclass

    @dataclass
    class Later(LoraConfig):
        twist: float = 0.0

    options = {"r": 4, "target_modules": "all-linear"}
    Adapters.add(tiny.causal_lm(), Later(**options))
    with pytest.raises(InputError, match=r"twist=0\.5"):
        Adapters.add(tiny.causal_lm(), Later(**options, twist=0.5))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(task_type="CAUSAL_LM"), r"IA3Config is not supported.*LoraConfig"),
        ({"r": 4}, r"dict is not supported"),
        (lora(target_modules=["nothing"]), r"does not fit LlamaForCausalLM.*nothing"),
        (lora(target_modules=["input_layernorm"]), r"does not fit LlamaForCausalLM"),
        (lora(modules_to_save=["lm_haed"]), r"modules_to_save='lm_haed' is no module"),
    ],
    ids=["IA3", "a dict", "no such target", "a norm", "a misspelt module"],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        adapted(tiny.causal_lm(), config)


def with_two() -> PeftModel:
    model = runs.trained_peft()
    model.add_adapter("other", lora())
    return model


def merged() -> PeftModel:
    model = runs.trained_peft()
    model.merge_adapter()
    return model


def dora() -> PeftModel:
    return get_peft_model(tiny.causal_lm(), lora(use_dora=True))


def inside() -> object:
    """The model of an earlier training, without the PeftModel around it."""
    return runs.trained_peft().get_base_model()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_two, "default, other"),
        (merged, "unmerge_adapter"),
        (dora, "use_dora=True"),
        (inside, "Load the model again"),
    ],
)
def test_models_whose_adapters_are_not_as_they_must_be_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        adapted(make())


def test_an_adapter_on_an_adapter_is_refused():
    with pytest.raises(InputError, match="has an adapter already"):
        adapted(runs.trained_peft(), lora())
    with pytest.raises(InputError, match="Load the model again"):
        adapted(inside(), lora())


def test_an_adapter_that_transformers_loaded_is_refused_and_one_loaded_by_its_path_is_trained(tmp_path):
    lm = tiny.causal_lm()
    lm.save_pretrained(tmp_path / "base")
    runs.short_run(tmp_path / "run", lm=load_causal_lm(str(tmp_path / "base")))
    with pytest.raises(InputError, match="loaded by transformers"):
        adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy"))
    _, adapters = adapted(load_causal_lm(str(tmp_path / "run" / "policy")))
    assert all(parameter.requires_grad for parameter in adapters.parameters(POLICY))


def test_an_adapter_without_the_name_of_its_base_is_refused_with_the_remedy(tmp_path):
    runs.trained_peft().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"does not name its base.*base_model_name_or_path"):
        load_causal_lm(str(tmp_path))
