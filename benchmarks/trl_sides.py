"""One optimizer step of GRPO by TRL's GRPOTrainer and by this toolkit, on the same batch and weights.

Used by trl_parity.py.
"""

import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from rlhf.algorithms.grpo import GRPO, GRPOConfig  # noqa: E402
from rlhf.distributed import Distributed  # noqa: E402
from rlhf.models.policy import Policy  # noqa: E402
from rlhf.rollout.engine import Completion, Span  # noqa: E402
from rlhf.rollout.episode import Episode, single_turn  # noqa: E402
from rlhf.rollout.scoring import Scorer  # noqa: E402
from rlhf.training.update import UpdateConfig, make_stepper, update  # noqa: E402
from rlhf.types import TrainingBatch  # noqa: E402

disable_progress_bar()
disable_progress_bars()
VERSION = trl.__version__

GROUP = 4
LONGEST = 9
VOCABULARY = 24
PAD = 0
EOS = 2
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
OUR_CLIP = {"clip_range": 0.2, "clip_range_high": 0.28}
OURS = {"completions_per_prompt": GROUP, "std_ddof": 1, "std_eps": 1e-4}
"""With TRL's standard deviation: divided by n - 1, plus 1e-4."""


@dataclass(frozen=True)
class Case:
    """The same settings for TRL and for us. accumulation: TRL's (gradient_accumulation_steps, steps_per_generation)."""

    name: str
    trl: dict[str, Any]
    ours: dict[str, Any]
    accumulation: tuple[int, int] = (3, 3)


# --- the batch and the models ---


@dataclass(frozen=True)
class Batch:
    """Three prompts with four completions each, of uneven length, some truncated; rows of one prompt are adjacent."""

    prompts: list[list[int]]
    completions: list[list[int]]
    scores: list[float]

    @classmethod
    def draw(cls, *, even_prompts: bool) -> "Batch":
        generator = torch.Generator().manual_seed(5)

        def tokens(length: int) -> list[int]:
            return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

        prompts = [tokens(5 if even_prompts else length) for length in (2, 7, 4)]
        lengths = [3, LONGEST, 5, 1, 6, 8, LONGEST, 4, 2, 7, LONGEST, 5]
        completions = [tokens(n) if n == LONGEST else [*tokens(n - 1), EOS] for n in lengths]
        scores = [1.0, 0.3, -0.2, 0.9, 0.0, 1.0, 1.0, 0.0, 2.5, 2.4, -1.0, 0.7]
        return cls([prompt for prompt in prompts for _ in range(GROUP)], completions, scores)

    def episodes(self) -> list[Episode]:
        def completion(ids: list[int]) -> Completion:
            return Completion(ids, [0.0] * len(ids), "stop" if ids[-1] == EOS else "length", [Span(0, 0, len(ids))])

        return [single_turn(p, completion(ids)) for p, ids in zip(self.prompts, self.completions, strict=True)]


@dataclass
class Weights:
    """Three sets of weights of one architecture: the sampler's, those of the policy after a step, the reference's."""

    family: str
    dtype: torch.dtype
    sampler: Any = field(init=False)
    present: Any = field(init=False)
    reference: Any = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        sizes = {
            "vocab_size": VOCABULARY,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": EOS,
            "initializer_range": 0.4,
        }
        if self.family == "gpt2":
            drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            config: Any = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **drop, **sizes)
        else:
            shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = LlamaConfig(**shape, num_key_value_heads=1, max_position_embeddings=64, **sizes)
        self.sampler = AutoModelForCausalLM.from_config(config).to(self.dtype)
        self.present, self.reference = self._moved(0.05, 1), self._moved(0.1, 2)

    def _moved(self, size: float, seed: int) -> Any:
        """A copy whose weights have moved by `size` times their usual size, at random."""
        generator = torch.Generator().manual_seed(seed)
        lm = deepcopy(self.sampler)
        for parameter in lm.parameters():
            parameter.data += size * 0.4 * torch.randn(parameter.shape, generator=generator).to(self.dtype)
        return lm


# --- one optimizer step of each ---


@dataclass(frozen=True)
class Result:
    """Loss, gradients by parameter name, and the advantage of each row in the order of the batch."""

    loss: float
    gradients: dict[str, Tensor]
    advantages: Tensor
    window: list[int]
    """Rows of the batch that this optimizer step used."""
    clipped: tuple[float, float] = (0.0, 0.0)
    """Shares of tokens whose gradient is zero because of the lower and of the upper clip bound."""


class TRL:
    """TRL's GRPOTrainer, which trains on given completions.

    Args:
        case: The settings, of which the `trl` part and `accumulation` are used.
        batch: Prompts, completions and their scores.
        weights: The weights of sampler, changed policy and reference.
        temperature: Sampling temperature.
        folder: Where the reference and TRL's files are written.
    """

    def __init__(self, case: Case, batch: Batch, weights: Weights, temperature: float, folder: str) -> None:
        self.batch = batch
        self.weights = weights
        self.model = deepcopy(weights.sampler)
        self.accumulation, per_generation = case.accumulation
        weights.reference.save_pretrained(folder)  # TRL loads its reference from the policy's _name_or_path
        self.model.config._name_or_path = folder
        words = {"<pad>": PAD, "<bos>": 1, "<eos>": EOS} | {f"w{i}": i for i in range(3, VOCABULARY)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<bos>")), pad_token="<pad>", eos_token="<eos>"
        )
        rows = len(batch.prompts)
        settings = {
            "output_dir": folder,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "gradient_checkpointing": False,
            "num_generations": GROUP,
            "max_completion_length": LONGEST,
            "temperature": temperature,
            "num_iterations": 2,
            "per_device_train_batch_size": rows // per_generation,
            "steps_per_generation": per_generation,
            "gradient_accumulation_steps": self.accumulation,
            "disable_tqdm": True,
        }
        self.rows = [{"prompt": f"w{3 + row}"} for row in range(rows)]
        self.trainer = trl.GRPOTrainer(
            self.model,
            lambda prompts, **_: batch.scores,
            trl.GRPOConfig(**{**settings, **CLIP, **case.trl}),
            Dataset.from_list(self.rows),
            processing_class=tokenizer,
            rollout_func=self._rollout,
        )
        if self.trainer.ref_model is not None:
            self.trainer.ref_model.to(weights.dtype)  # loaded in float32
            self.trainer.ref_model.load_state_dict(weights.reference.state_dict())
        if weights.dtype == torch.float64:
            self.trainer._get_per_token_logps_and_entropies = self._exact_logprobs
        self.trainer.current_gradient_accumulation_steps = self.accumulation  # as its training loop sets it
        self.steps = per_generation

    def _rollout(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        completions = self.batch.completions
        return {
            "prompt_ids": self.batch.prompts,
            "completion_ids": completions,
            "logprobs": [[0.0] * len(c) for c in completions],
        }

    def _exact_logprobs(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **_: Any
    ) -> tuple[Tensor, Tensor, None]:
        """(log-probs, entropies, None) of the last `logits_to_keep` tokens, without TRL's fused head."""
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions).logits
        logprobs = (logits[:, -logits_to_keep - 1 : -1] / self.trainer.temperature).log_softmax(-1)
        chosen = logprobs.gather(-1, input_ids[:, -logits_to_keep:].unsqueeze(-1)).squeeze(-1)
        return chosen, -(logprobs.exp() * logprobs).sum(-1), None

    def step(self) -> Result:
        """Run a batch with the old weights, then change them and return the next optimizer step."""
        for _ in range(self.steps):
            self.trainer.training_step(self.trainer.model, self.rows, None)
        self.model.load_state_dict(self.weights.present.state_dict())
        self.model.zero_grad(set_to_none=True)
        loss = sum(
            float(self.trainer.training_step(self.trainer.model, self.rows, None)) for _ in range(self.accumulation)
        )
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        parts = self.trainer._buffered_inputs
        places = [[self._row(ids) for ids in part["completion_ids"].tolist()] for part in parts]
        advantages = torch.zeros(len(self.rows), dtype=self.weights.dtype)
        for part, rows in zip(parts, places, strict=True):
            advantages[rows] = part["advantages"].to(self.weights.dtype)
        return Result(loss, gradients, advantages, [row for rows in places[: self.accumulation] for row in rows])

    def _row(self, padded: list[int]) -> int:
        """Index in the batch of the row with this completion; TRL shuffles the rows of a generation batch."""
        return self.batch.completions.index([token for token in padded if token != PAD])


class Keep(torch.optim.Optimizer):
    """Stores the gradients in `kept` and leaves the weights unchanged."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.parameters(), {})
        self.policy = policy

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.kept = {name: p.grad.clone() for name, p in self.policy.lm.named_parameters() if p.grad is not None}


def ours(
    case: Case, batch: Batch, weights: Weights, temperature: float, window: list[int], advantages: Tensor | None = None
) -> Result:
    """The same step by this toolkit, in microbatches of 40 tokens.

    Args:
        case: The settings, of which the `ours` part is used.
        batch: Prompts, completions and their scores.
        weights: The weights of sampler, changed policy and reference.
        temperature: Sampling temperature.
        window: Rows of the batch that the optimizer step uses.
        advantages: Advantage of each row, to use instead of our own.
    """
    algorithm = GRPO(GRPOConfig(**{**OURS, **OUR_CLIP, **case.ours}))
    group = Distributed(cpu=True)
    sampler = Policy(deepcopy(weights.sampler), temperature=temperature)
    reference = Policy(weights.reference, temperature=temperature) if "reference" in algorithm.needs else None
    scorer = Scorer(policy=sampler, reference=reference, microbatch_tokens=40, distributed=group)
    trajectories = scorer(batch.episodes(), batch.scores, range(len(batch.scores)), step=0)
    training: TrainingBatch = algorithm.prepare(trajectories, 0.0, algorithm.initial_state(), group.all_sum)
    own = training.advantages[:, 0].clone()
    if advantages is not None:
        training = replace(training, advantages=torch.where(training.mask, advantages.unsqueeze(1), 0.0))
    policy = Policy(deepcopy(weights.present), temperature=temperature)
    keep = Keep(policy)
    settings = UpdateConfig(num_epochs=1, minibatch_size=None, microbatch_tokens=40, max_grad_norm=1e9)
    stepper = make_stepper(policy, algorithm, keep, settings, group)
    metrics = update(policy, algorithm, training.select(torch.tensor(window)), stepper, settings, group, seed=0, step=0)
    loss = metrics["policy_loss"] + algorithm.config.kl_coef * metrics.get("kl_loss", 0.0)
    loss -= algorithm.config.entropy_coef * metrics.get("entropy", 0.0)
    clipped = metrics["clip_fraction_low"], metrics["clip_fraction_high"]
    return Result(loss, keep.kept, own, window, clipped)
