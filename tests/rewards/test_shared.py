"""A reward model that is an adapter of the policy's base uses that base: the same scores, one backbone."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rlhf.rewards.model import RewardModel
from rlhf.rewards.shared import AdapterScores, share_base
from tests import tiny

IDS = [[3, 4, 5], [6, 7, 8, 9, 2], [5]]


def lora(task: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear", task_type=task)


@pytest.fixture
def base(tmp_path):
    """A language model's folder, its tokenizer included."""
    tiny.causal_lm("llama").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def judge(base, tmp_path):
    """The folder of a reward adapter of that model, as recipes/reward_model.py --lora.r 2 writes it."""
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model = get_peft_model(classifier, lora("SEQ_CLS"))
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    model.save_pretrained(tmp_path / "judge")
    tiny.tokenizer().save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def trainer(base, judge, out):
    lm = type(tiny.causal_lm("llama")).from_pretrained(base)
    return tiny.trainer(out, lm=lm, rewards=[str(judge)], peft_config=lora(), critic="adapter")


def test_an_adapter_of_the_policys_base_scores_as_it_did_alone_and_holds_no_backbone(base, judge, tmp_path):
    alone = RewardModel.load(judge, policy_tokenizer=tiny.tokenizer()).score(IDS)
    made = trainer(base, judge, tmp_path / "run")
    shared = made.rewards.functions[0]
    assert isinstance(shared.model, AdapterScores) and shared.score(IDS) == alone
    assert sum(p.numel() for p in shared.model.parameters()) == 16, "a head of 16 numbers is all it has of its own"
    assert made.policy.adapters.active_name == "default"


def test_training_moves_neither_the_reward_adapter_nor_its_scores(base, judge, tmp_path):
    made = trainer(base, judge, tmp_path / "run")
    shared = made.rewards.functions[0]
    before = shared.score(IDS)
    made.train()
    assert shared.score(IDS) == before
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-000003" / "policy.safetensors")
    assert kept and not any("taken" in name for name in kept)
    assert not any("taken" in name for name, p in made.policy.named_parameters() if p.requires_grad)


def test_an_adapter_of_another_base_keeps_its_own(base, judge, tmp_path):
    """Here one weight of the policy's base differs by its last bit."""
    lm = type(tiny.causal_lm("llama")).from_pretrained(base)
    weight = lm.model.layers[1].mlp.up_proj.weight
    weight.data[0, 0] = torch.nextafter(weight.data[0, 0], torch.tensor(10.0))
    made = tiny.trainer(tmp_path / "run", lm=lm, rewards=[str(judge)], peft_config=lora())
    model = made.rewards.functions[0].model
    assert not isinstance(model, AdapterScores)
    assert not share_base(copy.copy(made.rewards.functions[0]), made.policy.adapters)
