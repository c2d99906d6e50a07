"""The language of tests/tree.py as a job for the real `PPOTrainer`: a tiny GPT-2 whose whole vocabulary is the tree's.

The prompt is the token "a", so nothing outside the tree can ever be said. (GPT-2 has absolute positions; to attention over
equal tokens without them, "a", "a a" and "a a a" are one and the same state.) Every sentence is one of the 15, and policy,
values, J, J* and KL(policy || pi*) are computed exactly, by the model's own forward and finite sums.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf.models.states import states_before
from rlhf.trainers.config import PPOTrainerConfig, TrainerConfig
from rlhf.trainers.ppo import PPOTrainer
from rlhf.trainers.trainer import Callback, Trainer
from tests import tree

PROMPT = 1


def tokenizer() -> PreTrainedTokenizerFast:
    """Three words; the sentence end also pads, which must not matter."""
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def language_model(seed: int = 0) -> GPT2LMHeadModel:
    """Random weights, large enough that the reference policy is far from uniform."""
    config = GPT2Config(
        vocab_size=tree.VOCABULARY,
        n_embd=32,
        n_inner=64,
        n_layer=1,
        n_head=2,
        n_positions=8,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=tree.EOS,
        pad_token_id=tree.EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


_PREFIX_IDS = torch.tensor([[PROMPT, *prefix, *[tree.EOS] * (2 - len(prefix))] for prefix in tree.PREFIXES])
_LAST = torch.tensor([len(prefix) for prefix in tree.PREFIXES])


@torch.no_grad()
def logits_of(lm: GPT2LMHeadModel) -> Tensor:
    """(7, 3) float64: the model's log-probs of the next token after each prefix, by its plain forward."""
    return lm.eval()(input_ids=_PREFIX_IDS).logits[torch.arange(7), _LAST].double().log_softmax(-1)


@torch.no_grad()
def values_of(trainer: Trainer) -> Tensor:
    """(7,) float64: the critic at each prefix."""
    if trainer.policy.critic is None:
        return torch.zeros(7).double()
    places = _LAST.unsqueeze(1)
    states = states_before(trainer.policy.lm, _PREFIX_IDS, places)
    return trainer.policy.critic(states, _PREFIX_IDS, places)[:, 0].double()


@dataclass(frozen=True)
class Result:
    """What training led to, exactly."""

    regret: float
    """(J* - J) / (J* - J(reference)): 0 is the optimum, 1 the policy that training started from."""
    kl_to_optimum: float
    value_error: float
    """Root mean square of V - V* over prefixes, weighted by how often pi* visits them."""
    theta: Tensor
    """(7, 3) log-probs in the end."""
    values: Tensor
    """(steps, 7): the value head after every step."""
    kl: list[float]
    """KL(old || new) of every update, over sentences."""
    history: list[dict[str, float]]
    """The metrics of every step."""


def problem_of(lm: GPT2LMHeadModel, *, beta: float = 0.37, shift: float = 0.0, seed: int = 0) -> tree.Problem:
    """Random rewards of standard deviation 1 for the 15 sentences, and the model as it is now as the reference."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(15, generator=generator, dtype=torch.float64) + shift
    return tree.Problem(reference=logits_of(lm), rewards=rewards, beta=beta)


def train(
    problem: tree.Problem,
    lm: GPT2LMHeadModel,
    output_dir: Path,
    *,
    trainer_class: type[Trainer] = PPOTrainer,
    config_class: type[TrainerConfig] = PPOTrainerConfig,
    critic: Any = None,
    peft_config: Any = None,
    **settings: Any,
) -> Result:
    """Train `lm` on the problem with `config_class(**settings)`; everything else is a shipped default."""

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [float(problem.rewards[tree.SEQUENCES.index(tuple(ids))]) for ids in completion_ids]

    history: list[dict[str, float]] = []
    thetas, values = [logits_of(lm)], []
    config = config_class(output_dir=str(output_dir), **settings)

    class Recorder(Callback):
        def on_step_end(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:  # type: ignore[override]
            history.append(metrics)
            thetas.append(logits_of(trainer.policy.lm))
            values.append(values_of(trainer))  # 0 without a value head

    rows = [{"prompt": "a"}] * config.prompts_per_step
    models = {"critic": critic, "peft_config": peft_config}
    trainer_class(lm, reward, rows, config, tokenizer=tokenizer(), callbacks=[Recorder()], **models).train()

    best, theta = problem.best_objective(), thetas[-1] / config.generation.temperature
    error = values[-1] - problem.soft_values()[0]
    chances = problem.optimum().exp().unsqueeze(1).expand(15, 3)
    visits = torch.zeros(7).double().index_add(0, tree.STATES[tree.MASK], chances[tree.MASK])
    to_gain = best - problem.objective(problem.reference)
    sentences = [tree.sequence_logprobs(theta) for theta in thetas]
    return Result(
        regret=float((best - problem.objective(theta)) / to_gain),
        kl_to_optimum=float(tree.kl(tree.sequence_logprobs(theta), problem.optimum())),
        value_error=float(((visits * error**2).sum() / visits.sum()).sqrt()),
        theta=theta.log_softmax(-1),
        values=torch.stack(values),
        kl=[float(tree.kl(old, new)) for old, new in itertools.pairwise(sentences)],
        history=history,
    )
