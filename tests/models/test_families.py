"""Every family of causal LM with attention in each layer works, or is refused by name before anything is sampled.

Tiny random models of each family, made from configurations alone. Expected values come from stock transformers: the whole
sequence alone, without cache or padding. Windows and chunks are 4 tokens wide, shorter than the prompts; soft caps and
scales are strong enough to show; biases are not 0. A few families run in `make test`, all in `make test-slow`.
"""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rlhf.errors import InputError
from rlhf.models.adapters import Adapters
from rlhf.models.export import save_policy
from rlhf.models.policy import Policy
from rlhf.models.recompute import recompute_layers
from rlhf.models.states import anatomy_of
from rlhf.rollout.in_process import InProcessEngine
from rlhf.trainers.checks import check_sampling
from tests import tiny
from tests.models import test_models as scoring
from tests.rollout import test_in_process as sampling
from tests.rollout.sampling import alone, generate
from tests.rounding import EPS
from tests.trainers import grpo_runs

_SIZES = {
    **{"vocab_size": tiny.VOCABULARY, "pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS},
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.5},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "is_decoder": True},
    **{"moe_intermediate_size": 12, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "init_std": 0.5},
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
}
"""A setting that a family does not know is ignored by it."""
_OWN = None
"""The family computes this setting itself."""
_LATENT = {"head_dim": _OWN, "num_key_value_heads": 2}
_WINDOW = {"sliding_window": 4}
_SOFT = {"final_logit_softcapping": 2.0}
_SPLIT = {"vocab_size_per_layer_input": tiny.VOCABULARY, "hidden_size_per_layer_input": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "biogpt": {},
    "bloom": {},
    "codegen": {"num_attention_heads": 4, "rotary_dim": 4, "head_dim": _OWN, "num_key_value_heads": _OWN},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, **_WINDOW},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "ernie4_5_moe": {},
    "falcon": {"head_dim": _OWN},
    "falcon, alibi": {"head_dim": _OWN, "alibi": True},
    "gemma": {},
    "gemma2": {**_SOFT, **_WINDOW, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**_SOFT, **_WINDOW},
    "gemma3n_text": {**_SPLIT, "laurel_rank": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": _SPLIT,
    "glm4": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_layers": 2, "num_heads": 2}
    | {"num_hidden_layers": _OWN, "num_attention_heads": _OWN},
    "gpt_neox": {},
    "gpt_oss": _WINDOW,
    "gptj": {"rotary_dim": 4, "head_dim": _OWN},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0},
    "helium": {},
    "llama": {},
    "llama4_text": {"attention_chunk_size": 4},
    "minicpm3": _LATENT,
    "mistral": _WINDOW,
    "mixtral": _WINDOW,
    "mpt": {},
    "nanochat": _SOFT,
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmoe": {},
    "opt": {
        "word_embed_proj_dim": 8,
        "do_layer_norm_before": False,
        "ffn_dim": 24,
        "init_std": 0.2,
    },  # the shape of OPT-350m
    "persimmon": {},
    "phi": {},
    "phi3": _WINDOW,
    "phimoe": _WINDOW,
    "qwen2": {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {"shared_expert_intermediate_size": 12},
    "qwen3": {},
    "qwen3_moe": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": _WINDOW,
    "xglm": {},
}
FAST = ("opt", "gemma2", "mixtral", "gpt_neox", "llama4_text")
NOT_IN_FLOAT64 = {"xglm"}
"""It masks with the lowest number of the dtype, converted to float32: transformers itself cannot run it."""
STREAMS = {"gemma3n_text", "gemma4_text"}
"""Their `hidden_states` are several streams at once, which say nothing about the last states."""
NO_LORA = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "ernie4_5_moe", "mixtral", "olmoe", "qwen3_moe"), "takes in experts"
    ),
    **dict.fromkeys(("llama4_text", "phimoe"), "tuple"),  # a router that peft takes for a linear layer
}
"""Families in which peft cannot adapt all linear layers, and a word of the reason."""


def model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of `family`, in eval mode, always the same one."""
    return _made(AutoModelForCausalLM, family, {**FAMILIES.get(family, {}), **changes}, dtype)


def _made(auto_class: Any, family: str, changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    settings = {name: value for name, value in {**_SIZES, **changes}.items() if value is not _OWN}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = auto_class.from_config(AutoConfig.for_model(family.split(",")[0], **settings)).to(dtype).eval()
        for parameter in lm.parameters():
            if parameter.dim() == 1:  # biases start at 0
                parameter.data += 0.3 * torch.randn(parameter.shape).to(parameter)
    if dtype == torch.float64 and hasattr(lm.config, "num_experts_per_tok"):
        lm.set_experts_implementation("eager")  # the others multiply in float32 or narrower alone
    return lm


def scored(lm: Any, *, grad: bool = False, adapters: Adapters | None = None) -> tuple[Policy, Any]:
    policy = Policy(lm, temperature=scoring.TEMPERATURE, critic="head", adapters=adapters)
    tiny.randomise(policy.critic.head)
    return policy, scoring.forward(policy, scoring.PROMPTS, scoring.COMPLETIONS, extra=2, grad=grad)


every_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES]
)


@every_family
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 2048), (torch.float64, 64)])
def test_a_policy_scores_as_its_model_does_each_sequence_alone(family, dtype, roundings):
    """In float64, too, parts of many families (norms, rotations, routers, soft caps) are computed in float32."""
    if dtype == torch.float64 and family in NOT_IN_FLOAT64:
        pytest.skip("transformers cannot run it")
    policy, outputs = scored(model(family, dtype))
    for row, (prompt, completion) in enumerate(zip(scoring.PROMPTS, scoring.COMPLETIONS, strict=True)):
        if family in STREAMS:
            continue
        logprobs, values, entropies = scoring.oracle(policy, prompt, completion)
        for got, wanted in ((outputs.logprobs, logprobs), (outputs.values, values), (outputs.entropy, entropies)):
            torch.testing.assert_close(got[row, : len(completion)], wanted, rtol=0, atol=roundings * EPS)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(STREAMS))
def test_a_policy_of_several_streams_scores_as_its_model_does(family):
    policy, outputs = scored(model(family))
    for row, (prompt, completion) in enumerate(zip(scoring.PROMPTS, scoring.COMPLETIONS, strict=True)):
        with torch.no_grad():
            logits = policy.lm(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
        wanted = (logits[len(prompt) - 1 : -1] / policy.temperature).log_softmax(-1)
        chosen = wanted[range(len(completion)), completion]
        torch.testing.assert_close(outputs.logprobs[row, : len(completion)], chosen, rtol=0, atol=2048 * EPS)


@every_family
def test_sampling_equals_full_forwards_of_each_row_alone(family):
    """Left padding, a cache, two completions of each prompt, rows that end early: none of it changes a token."""
    lm, config = model(family), sampling.settings(temperature=3.0)  # sharp models say the same each time
    pairs = list(zip(sampling.PROMPTS, sampling.SLOTS, strict=True))
    slow = [sampling.slow_completion(lm, p, config, s, copy, sampling.ENDS) for p, s in pairs for copy in range(2)]
    fast = generate(lm, sampling.PROMPTS, config, draws=sampling.draws(), eos_ids=sampling.ENDS, num_completions=2)
    assert len({len(completion.ids) for completion in slow}) > 1
    sampling.assert_same(fast, slow, 2048 * EPS)


@every_family
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_step_of_training_runs_and_the_sampler_is_the_policy(family, algorithm, tmp_path):
    lm = model(family)
    before = copy.deepcopy(lm.state_dict())
    if algorithm == "ppo":
        gap = tiny.trainer(tmp_path, lm=lm, total_steps=1, learning_rate=1e-3).train()["sampler_gap"]
    else:
        trainer = grpo_runs.make_trainer(tmp_path, lm=lm, total_steps=1, learning_rate=1e-3, checkpoint_every=0)
        gap = trainer.train()["sampling/sampling_logp_difference/max"]
    assert gap < 2048 * EPS
    after = lm.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert all(torch.isfinite(tensor).all() for tensor in after.values() if tensor.is_floating_point())


@every_family
def test_layers_that_are_computed_again_give_equal_gradients(family):
    lm = model(family)
    mask = torch.arange(max(map(len, scoring.COMPLETIONS)) + 2) < torch.tensor([[len(c)] for c in scoring.COMPLETIONS])
    gradients = []
    for again in (False, True):
        policy = Policy(copy.deepcopy(lm), critic="head")
        tiny.randomise(policy.critic.head)
        if again:
            recompute_layers(policy)
        outputs = scoring.forward(policy, scoring.PROMPTS, scoring.COMPLETIONS, extra=2, grad=True)
        ((outputs.logprobs + 0.3 * outputs.entropy + outputs.values) * mask).sum().backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    assert any(gradient is not None and gradient.any() for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@every_family
def test_a_new_adapter_of_all_linear_layers_changes_nothing(family):
    lm = model(family)
    _, base = scored(copy.deepcopy(lm))
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")

    def adapted() -> Any:
        adapters = Adapters.add(lm, config, seed=0)
        return scored(adapters.lm, adapters=adapters)[1]

    if family in NO_LORA:
        with pytest.raises(InputError, match=NO_LORA[family]):
            adapted()
    else:
        assert torch.equal(adapted().logprobs, base.logprobs)


@every_family
def test_the_export_is_the_same_model_in_stock_transformers(family, tmp_path):
    lm = model(family)
    save_policy(Policy(lm), tiny.tokenizer(), tmp_path / "policy")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(opened(ids, use_cache=False).logits, lm(ids, use_cache=False).logits)


# --- families that cannot work ------------------------------------------------------------------------------------------

_TEXT = {"num_key_value_heads": _OWN, "head_dim": _OWN}
_STATE = "keeps a recurrent state"
_CACHE = "cannot sample with a cache"
_OTHER = "samples with other log-probs"
_SHORT = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8} | {
    f"{part}_attention_heads": 2 for part in ("encoder", "decoder")
}

REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mamba": ("MambaForCausalLM", _STATE, {}),
    "falcon_mamba": ("FalconMambaForCausalLM", _STATE, {}),
    "rwkv": ("RwkvForCausalLM", _STATE, {}),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", _STATE, {}),
    "jamba": ("JambaForCausalLM", _STATE, {}),
    "bamba": ("BambaForCausalLM", _STATE, {"mamba_n_heads": 2, "mamba_d_head": 16}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", _STATE, {"layer_types": ["conv", "full_attention"]}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", _CACHE, {}),
    "cpmant": ("CpmAntForCausalLM", _CACHE, {}),
    "bart": ("BartForCausalLM", f"{_CACHE}|{_OTHER}", _SHORT),  # no positions of its own in the forward
    "bert": ("BertLMHeadModel", _OTHER, {"is_decoder": False}),  # looks to the right
    "roberta": ("RobertaForCausalLM", _OTHER, {}),  # counts positions from the pad token's id
}


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f == "bert" else pytest.mark.slow) for f in REFUSED])
def test_a_family_that_cannot_work_is_refused_by_name_before_anything_is_sampled(family, tmp_path):
    name, lack, changes = REFUSED[family]
    with pytest.raises(InputError, match=rf"policy: {name} ({lack})"):
        tiny.trainer(tmp_path / "run", lm=_made(AutoModelForCausalLM, family, changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_encoder_decoders_are_refused(family, tmp_path):
    sizes = {"t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2} | _TEXT, "bart": _SHORT}
    changes = sizes[family] | {
        "hidden_size": _OWN,
        "num_attention_heads": _OWN,
        "num_hidden_layers": _OWN,
        "is_decoder": _OWN,
    }
    with pytest.raises(InputError, match=r"policy: \w+ForConditionalGeneration is an encoder-decoder.*causal"):
        tiny.trainer(tmp_path, lm=_made(AutoModelForSeq2SeqLM, family, changes))


def test_eager_attention_in_float64_is_refused(tmp_path):
    """Its softmax is in float32, where the lowest number of float64 is minus infinity: padding becomes NaN."""
    with pytest.raises(InputError, match=r"policy: Gemma2ForCausalLM gives log-probs that are not numbers.*dtype"):
        tiny.trainer(tmp_path, lm=model("gemma2", torch.float64))


def test_a_sequence_longer_than_a_model_of_any_family_has_positions_for_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"max_new_tokens=30.*positions for 16"):
        tiny.trainer(
            tmp_path, lm=model("mpt", max_seq_len=16, max_position_embeddings=_OWN), generation={"max_new_tokens": 30}
        )


# --- the check at the start ---------------------------------------------------------------------------------------------


def _without(name: str):
    def broken(policy: Policy) -> None:
        forward = policy.lm.forward
        policy.lm.forward = lambda *args, **options: forward(*args, **{k: v for k, v in options.items() if k != name})

    return broken


def _forgets_the_transform(policy: Policy) -> None:
    assert policy._own_forward
    policy._own_forward = False


def _reads_one_place_off(policy: Policy) -> None:
    forward = policy.forward
    policy.forward = lambda inputs, actions: forward(
        {**inputs, "prompt_lengths": (inputs["prompt_lengths"] - 1).clamp(min=1)}, actions
    )


def _mixes_rows(policy: Policy) -> None:
    policy.decode = lambda **inputs: policy.lm(**inputs | {"input_ids": inputs["input_ids"].flip(0)})


BROKEN = {
    "no positions": ("gpt2", _without("position_ids")),
    "no attention mask": ("llama", _without("attention_mask")),
    "no transform": ("gemma2", _forgets_the_transform),
    "no division of the states": ("minicpm3", _forgets_the_transform),
    "one place off": ("llama", _reads_one_place_off),
    "rows of another prompt": ("llama", _mixes_rows),
}


def _check(policy: Policy) -> None:
    check_sampling(InProcessEngine(policy, alone()))


@pytest.mark.parametrize("what", BROKEN)
def test_the_check_at_the_start_notices(what):
    family, damage = BROKEN[what]
    policy = Policy(model(family), temperature=0.7)
    _check(policy)
    damage(policy)
    with pytest.raises(InputError, match=r"samples with other log-probs|cannot sample"):
        _check(policy)


def test_the_check_at_the_start_changes_nothing_and_draws_nothing():
    policy = Policy(model("llama"), critic="head")
    before, state = copy.deepcopy(policy.state_dict()), torch.get_rng_state()
    _check(policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize("family", ["opt", "llama4_text", "gemma2", "minicpm3", "cohere", "phi"])
def test_the_probe_finds_the_width_and_what_happens_to_the_logits(family):
    """`pad_token_id` is 0, and its embedding is 0 in most families, which would hide a scale."""
    anatomy = anatomy_of(model(family))
    assert anatomy.width == (8 if family == "opt" else 16)
    assert anatomy.plain_head == (family in ("opt", "llama4_text", "phi"))
