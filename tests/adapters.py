"""LoRA settings and short runs with adapters on tiny models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf import PPOTrainer
from tests import tiny

IDS = torch.tensor([[3, 4, 5, 6, 3, 7], [9, 8, 7, 3, 4, 4]])


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def trained_peft(family: str = "llama", *, seed: int = 5, lm_seed: int = 0, **changes: Any) -> PeftModel:
    """A PeftModel whose adapter has an effect, as if it had been trained."""
    model = get_peft_model(tiny.causal_lm(family, seed=lm_seed), lora(**changes))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def short_run(output_dir: Path, **changes: Any) -> PPOTrainer:
    """Two steps with an adapter, trained."""
    trainer = tiny.trainer(output_dir, **{"peft_config": lora(), "total_steps": 2, **changes})
    trainer.train()
    return trainer


@torch.no_grad()
def logits(lm: Any) -> Tensor:
    return lm(IDS).logits


def opened(base: Path, adapter: Path) -> PeftModel:
    """The adapter on its base, by stock peft and transformers alone."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def copies(tensors: Any, *, where: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors if where(name)}
