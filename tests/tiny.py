"""Tiny tokenizers, random models and short runs for tests: made in memory, nothing is downloaded.

Weights are drawn with a large spread (initializer_range 0.5), so that distributions are peaked, differ from position to
position, and a mistake of one position or one temperature moves log-probs by whole nats instead of hiding in rounding.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers import initialization as init
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf import Callback, GenerationConfig, PPOConfig, PPOTrainer, PPOTrainerConfig, UpdateConfig
from tests.rounding import EPS

PRECISIONS = [(torch.float32, 2048 * EPS), (torch.float64, 1e-8)]
"""(dtype, tolerance) of log-probs, values and entropies of these models: some hundreds of roundings, and headroom."""

PAD, BOS, EOS = 0, 1, 2
LETTERS = "abcdefgh"
VOCABULARY = 3 + len(LETTERS)
FAMILIES = ("gpt2", "llama", "qwen3")
"""GPT-2 has absolute positions, which show mistakes that rotary ones hide."""

_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def tokenizer(*, pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """One token per letter. pad="<eos>": padding and end of sequence are the same token; None: no pad token."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<bos>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


@torch.no_grad()
def _init_gpt2(self: GPT2PreTrainedModel, module: torch.nn.Module) -> None:
    """GPT-2's first weights as transformers 5.23 draws them; earlier versions do not scale the residual projections."""
    std = self.config.initializer_range
    PreTrainedModel._init_weights(self, module)
    if isinstance(module, Conv1D):
        init.normal_(module.weight, mean=0.0, std=std)
        init.zeros_(module.bias)
    if isinstance(module, GPT2Attention | GPT2MLP):
        init.normal_(module.c_proj.weight, mean=0.0, std=std / (2 * self.config.n_layer) ** 0.5)


GPT2PreTrainedModel._init_weights = _init_gpt2  # equal models with every version of transformers


def config(family: str, *, dropout: float = 0.0, **changes: Any) -> Any:
    """A model of two layers, 16 wide, with room for 64 positions."""
    if family == "gpt2":
        rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **rates}
        return GPT2Config(**{**_SPECIAL, **sizes, "initializer_range": 0.5, **changes})
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 8, "attention_dropout": dropout}
    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[family]
    return kind(**{**_SPECIAL, **sizes, "initializer_range": 0.5, **changes})


def causal_lm(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model, in eval mode, and a function of `seed` alone."""
    return _seeded(AutoModelForCausalLM, config(family, **changes), seed, dtype)


def reward_model(family: str = "llama", *, seed: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random sequence classifier with one label."""
    return _seeded(AutoModelForSequenceClassification, config(family, num_labels=1, **changes), seed, dtype)


def _seeded(auto_class: Any, settings: Any, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto_class.from_config(settings).to(dtype).eval()


def randomise(module: torch.nn.Module, *, seed: int = 2) -> None:
    """Parameters drawn anew: a value head starts at 0, where nothing shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def sequences(count: int, *, seed: int = 0, shortest: int = 1, longest: int = 7) -> list[list[int]]:
    """Random rows of letters of uneven length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = ["ab", "c", "defgh", "gha", "bbbbbbb"]


def rows(prompts: Sequence[str] = PROMPTS) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "target": prompt[0]} for prompt in prompts]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """As JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def count_target(completions: Sequence[str], target: Sequence[str], **_: Any) -> list[float]:
    """A reward function as users write them: how often the row's target letter occurs, less a little for length."""
    return [text.count(letter) - 0.1 * len(text) for text, letter in zip(completions, target, strict=True)]


def trainer(
    output_dir: Path | str,
    *,
    lm: Any = None,
    rewards: Callable[..., Any] | Sequence[Callable[..., Any]] = count_target,
    dataset: Any = None,
    generation: dict[str, Any] | None = None,
    update: dict[str, Any] | None = None,
    ppo: dict[str, Any] | None = None,
    tokenizer: Any = None,
    eval_dataset: Any = None,
    reference: Any = None,
    callbacks: Sequence[Any] = (),
    engine: Any = None,
    source: Any = None,
    critic: Any = None,
    peft_config: Any = None,
    **settings: Any,
) -> PPOTrainer:
    """A PPOTrainer on a random Llama and five prompts, three steps of four prompts: everything can be overridden."""
    settings = {"total_steps": 3, "prompts_per_step": 4, "learning_rate": 1e-2, "checkpoint_every": 0, **settings}
    return PPOTrainer(
        causal_lm() if lm is None else lm,
        rewards,
        rows() if dataset is None else dataset,
        PPOTrainerConfig(
            output_dir=str(output_dir),
            generation=GenerationConfig(**{"max_new_tokens": 6, **(generation or {})}),
            update=UpdateConfig(**{"num_epochs": 2, "minibatch_size": 2, **(update or {})}),
            ppo=PPOConfig(**(ppo or {})),
            **settings,
        ),
        tokenizer=_default_tokenizer() if tokenizer is None else tokenizer,
        eval_dataset=eval_dataset,
        reference=reference,
        callbacks=callbacks,
        engine=engine,
        source=source,
        critic=critic,
        peft_config=peft_config,
    )


_default_tokenizer = tokenizer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


class AtStep(Callback):
    """Calls `action(trainer)` when the given step has ended."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_step_end(self, trainer, step, metrics):
        if step == self.step:
            self.action(trainer)
