"""The collector for language models: prompts -> completions -> scores -> `Trajectories`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.core.masking import masked_sum
from rlhf.data.prompts import Prompt
from rlhf.distributed import Distributed
from rlhf.errors import InputError, TrainingError
from rlhf.models.policy import Policy
from rlhf.rewards.combine import RewardResult, Rewards, completion_texts, deviation, deviations
from rlhf.rollout.in_process import Completion, Draws, GenerationConfig, end_tokens, generate
from rlhf.training.sums import MetricSums
from rlhf.types import Inputs, PolicyOutputs, Trajectories

MissingEOS = Literal["keep", "replace", "subtract"]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One process's completions of a step, those of one prompt adjacent; lists have one entry per completion."""

    prompts: list[Prompt]
    """The prompt of each completion."""
    row_index: list[int]
    """The place of each completion in the global batch, whichever process sampled it."""
    completions: list[Completion]
    rewards: RewardResult
    version: int
    """How many updates the sampling policy had seen."""


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Samples completions with the policy, has them scored by the rewards, and computes what training needs of them."""

    policy: Policy
    reference: Policy | None
    rewards: Rewards
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig
    missing_eos: MissingEOS
    missing_eos_value: float | None
    microbatch_tokens: int
    distributed: Distributed
    allow_unscored: bool = False
    """A completion on which every reward function abstains is left out of learning, instead of an error."""

    def rollout(
        self,
        prompts: Sequence[Prompt],
        draws: Draws,
        *,
        copies: int = 1,
        version: int,
        trainer_state: dict[str, Any],
    ) -> Rollout:
        """`copies` completions of each of this process's prompts, and their scores."""
        with self.distributed.autocast():
            completions = generate(
                self.policy.lm,
                [prompt.ids for prompt in prompts],
                self.generation,
                draws=draws,
                eos_ids=end_tokens(self.policy.lm, self.tokenizer.eos_token_id),
                num_completions=copies,
            )
        repeated = [prompt for prompt in prompts for _ in range(copies)]
        texts, ids = [prompt.prompt for prompt in repeated], [completion.ids for completion in completions]
        rewards = self.rewards(
            prompts=texts,
            completions=completion_texts(texts, ids, self.tokenizer),
            completion_ids=ids,
            columns={name: [prompt.columns[name] for prompt in repeated] for name in repeated[0].columns},
            prompt_ids=[prompt.ids for prompt in repeated],
            trainer_state=trainer_state,
            allow_unscored=self.allow_unscored,
        )
        return Rollout(
            prompts=repeated,
            row_index=[slot * copies + copy for slot in draws.slots for copy in range(copies)],
            completions=completions,
            rewards=rewards,
            version=version,
        )

    def trajectories(self, rollout: Rollout, *, step: int) -> Trajectories:
        """The rollout with log-probs, values and reference log-probs of the learner's present weights."""
        with self.distributed.autocast():
            result = score(
                rollout,
                final_scores(
                    rollout.rewards.scores, rollout.completions, self.missing_eos, self.missing_eos_value or 0.0
                ),
                self.policy,
                self.reference,
                microbatch_tokens=self.microbatch_tokens,
                device=self.distributed.device,
            )
        check_finite(result, step)
        return result

    def metrics(self, *rollouts: Rollout) -> dict[str, float]:
        """What the completions show before anything is learnt from them; global."""
        sums, totals = MetricSums(), [rollout.rewards.totals for rollout in rollouts]
        for rollout in rollouts:
            scores = [score for score in rollout.rewards.scores if not math.isnan(score)]
            sums.add(_mean("score", scores) | _mean("score_std", [s * s for s in scores]))
            sums.add(_mean("completion_length", [len(c.ids) for c in rollout.completions]))
            sums.add(_mean("truncated_fraction", [not c.ended for c in rollout.completions]))
        own = [name for total in totals for name in total]
        for name in sorted(set(self.distributed.gather_objects(own))):  # a function may log one on one process only
            pairs = [total.get(name, (0.0, 0.0)) for total in totals]
            sums.add({name: (_number(sum(t for t, _ in pairs)), _number(sum(n for _, n in pairs)))})
        metrics = sums.reduce(self.distributed.all_sum)
        if "score" not in metrics:
            raise InputError(
                f"No completion of this step has a score: {', '.join(self.rewards.names)} returned None for every row. Let "
                "a reward function return numbers."
            )
        metrics["score_std"] = deviation(metrics["score_std"], metrics["score"])
        return deviations(metrics)

    def evaluation(self, rollout: Rollout) -> dict[str, float]:
        """The same on held-out prompts, with the KL to the reference."""
        metrics = {f"eval/{name}": value for name, value in self.metrics(rollout).items()}
        if self.reference is not None:
            trajectories = self.trajectories(rollout, step=rollout.version)
            assert trajectories.ref_logprobs is not None
            total = masked_sum(trajectories.old_logprobs - trajectories.ref_logprobs, trajectories.mask)
            pair = torch.stack([total, total.new_tensor(float(len(rollout.completions)))])
            total, count = self.distributed.all_sum(pair).tolist()
            metrics["eval/reward_kl"] = total / count
        return metrics


def final_scores(
    scores: Sequence[float], completions: Sequence[Completion], missing_eos: MissingEOS, value: float
) -> list[float]:
    """Scores with completions that were cut by the length limit treated as asked: "keep" the score, "replace" it by
    `value` (N+ detail 23: -1), or "subtract" `value` from it (TRL's missing_eos_penalty)."""

    def final(score: float, ended: bool) -> float:
        if ended or missing_eos == "keep":
            return score
        return value if missing_eos == "replace" else score - value

    return [final(score, completion.ended) for score, completion in zip(scores, completions, strict=True)]


def policy_inputs(rollout: Rollout, device: torch.device) -> tuple[Inputs, Tensor, Tensor]:
    """(inputs of `Policy`, actions (rows, time), mask (rows, time)); masks come from lengths, never from token ids."""
    prompts = [prompt.ids for prompt in rollout.prompts]
    completions = [completion.ids for completion in rollout.completions]
    inputs = {
        "input_ids": _right_pad([p + c for p, c in zip(prompts, completions, strict=True)], device),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts], device=device),
    }
    actions = _right_pad(completions, device)
    lengths = torch.tensor([len(completion) for completion in completions], device=device)
    return inputs, actions, torch.arange(actions.shape[1], device=device) < lengths.unsqueeze(1)


@torch.no_grad()
def score(
    rollout: Rollout,
    scores: Sequence[float],
    policy: Policy,
    reference: Policy | None,
    *,
    microbatch_tokens: int,
    device: torch.device,
) -> Trajectories:
    """The one pass that fills old log-probs, values and reference log-probs, with the learner's present weights.

    The score lies on the last token that counts, where the episode ends: terminated by EOS, or truncated by the length
    limit, after which nothing is expected either (V = 0; `missing_eos` says what such a completion is worth).
    """
    inputs, actions, mask = policy_inputs(rollout, device)
    row_tokens = inputs["prompt_lengths"] + mask.sum(-1)
    own = _forward(policy, inputs, actions, mask, row_tokens, microbatch_tokens)
    ref = None if reference is None else _forward(reference, inputs, actions, mask, row_tokens, microbatch_tokens)
    dtype = own.logprobs.dtype
    last = torch.zeros_like(mask)
    last[torch.arange(len(mask), device=device), mask.sum(-1) - 1] = True
    of_row = torch.tensor(scores, dtype=dtype, device=device)
    values = torch.zeros_like(own.logprobs) if own.values is None else own.values.to(dtype)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    return Trajectories(
        inputs=inputs,
        actions=actions,
        mask=mask,
        rewards=torch.where(last, of_row.nan_to_num(0.0).unsqueeze(1), 0.0),
        sampling_logprobs=_right_pad([completion.logprobs for completion in rollout.completions], device, dtype),
        old_logprobs=own.logprobs,
        values=values,
        next_values=torch.where(last, 0.0, next_values),
        terminated=last & torch.tensor([c.ended for c in rollout.completions], device=device).unsqueeze(1),
        episode_ends=last,
        ref_logprobs=None if ref is None else ref.logprobs,
        row_tokens=row_tokens,
        row_index=torch.tensor(rollout.row_index, device=device),
        scored=None if not of_row.isnan().any() else ~of_row.isnan(),
        policy_version=torch.full_like(actions, rollout.version),
    )


def _forward(
    policy: Policy, inputs: Inputs, actions: Tensor, mask: Tensor, row_tokens: Tensor, microbatch_tokens: int
) -> PolicyOutputs:
    """`policy` over all rows, about `microbatch_tokens` at a time, longest first; 0 where `mask` is False."""
    order = row_tokens.argsort(descending=True, stable=True)
    pieces: list[PolicyOutputs] = []
    for rows in order.split(max(1, microbatch_tokens // int(row_tokens.max()))):
        part = {name: tensor[rows] for name, tensor in inputs.items()}
        pieces.append(policy(part, actions[rows], with_values=policy.value_head is not None))
    restore = order.argsort()

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.where(mask, torch.cat(tensors)[restore], 0.0)

    values = [piece.values for piece in pieces if piece.values is not None]
    return PolicyOutputs(logprobs=joined([p.logprobs for p in pieces]), values=joined(values) if values else None)


def check_finite(trajectories: Trajectories, step: int) -> None:
    """Name the first completion whose numbers are not finite, before anything is learnt from it."""
    for name in ("rewards", "sampling_logprobs", "old_logprobs", "ref_logprobs", "values"):
        tensor = getattr(trajectories, name)
        if tensor is not None and not torch.isfinite(tensor).all():
            row = int((~torch.isfinite(tensor)).any(-1).nonzero()[0])
            raise TrainingError(
                f"{name} of step {step}, completion {int(trajectories.row_index[row])} are not finite; nothing was learnt "
                "from this step. Check the model's weights and precision, and the scale of the rewards."
            )


def _right_pad(rows: Sequence[Sequence[Any]], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype, device=device)


def _mean(name: str, values: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """`values` as a (sum, count) pair to be added over processes."""
    return {name: (_number(sum(values)), _number(len(values)))}


def _number(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)
