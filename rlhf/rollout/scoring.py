"""Turns episodes and their scores into `Trajectories`, with one pass of the training forward over the episodes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf.distributed import Distributed
from rlhf.errors import TrainingError
from rlhf.lifeline import phase
from rlhf.models.policy import Policy
from rlhf.models.reference import Reference
from rlhf.rollout.episode import Episode, Packed, next_sampled, pack
from rlhf.types import Inputs, PolicyOutputs, Trajectories


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Computes old log-probs, values and reference log-probs with the current weights of policy and reference."""

    policy: Policy
    reference: Reference | None
    microbatch_tokens: int
    """About how many tokens one forward pass takes."""
    distributed: Distributed

    @phase("scoring")
    @torch.no_grad()
    def __call__(
        self, episodes: Sequence[Episode], scores: Sequence[float | None], row_index: Sequence[int], *, step: int
    ) -> Trajectories:
        """scores: one per episode; None: it has none. row_index: row of each episode in the global batch.

        The score is added to the reward of the last sampled token, where the episode ends. The next value there is 0,
        whether an end token ended the episode or it was cut. Raises TrainingError, naming `step` and the row, if a number
        is not finite.
        """
        device = self.distributed.device
        packed = pack(episodes, device)
        if not packed.mask.any():
            raise TrainingError(f"No token was sampled in step {step}, by this process. Check the engine.")
        with_values = self.policy.critic is not None
        with self._inference(), self.distributed.autocast():
            own = self._forward(partial(self.policy, with_values=with_values), packed)
            ref = None if self.reference is None else self._forward(self.reference, packed)
        dtype = own.logprobs.dtype
        of_row = torch.tensor([score or 0.0 for score in scores], dtype=dtype, device=device)
        scored = torch.tensor([score is not None for score in scores], device=device)
        values = torch.zeros_like(own.logprobs) if own.values is None else own.values.to(dtype)
        score = torch.where(packed.last, of_row.unsqueeze(1), 0.0)
        trajectories = Trajectories(
            inputs=packed.inputs,
            actions=packed.actions,
            mask=packed.mask,
            rewards=packed.rewards.to(dtype) + score,
            sampling_logprobs=packed.sampling_logprobs.to(dtype),
            old_logprobs=own.logprobs,
            values=values,
            next_values=torch.where(packed.mask, next_sampled(values, packed.mask), 0.0),
            terminated=packed.terminated,
            episode_ends=packed.last,
            ref_logprobs=None if ref is None else ref.logprobs,
            row_tokens=packed.row_tokens,
            row_index=torch.tensor(row_index, device=device),
            scored=None if all(score is not None for score in scores) else scored,
            policy_version=packed.versions,
        )
        check_finite(trajectories, step)
        return trajectories

    def _inference(self) -> AbstractContextManager[None]:
        modules = [self.policy, self.reference.module if self.reference is not None else None]
        return self.distributed.layout.inference(*[m for m in modules if m is not None], gather=False)

    def _forward(self, policy: Callable[[Inputs, Tensor], PolicyOutputs], packed: Packed) -> PolicyOutputs:
        """Run `policy` on all rows, about `microbatch_tokens` at a time, longest first; 0 where the mask is False."""
        order = packed.row_tokens.argsort(descending=True, stable=True)
        rows = order.split(max(1, self.microbatch_tokens // int(packed.row_tokens.max())))
        # Agreed upon before the first forward: afterwards, processes would wait for each other for ever.
        rest = self._most(len(rows)) - len(rows)
        pieces = [policy({k: tensor[r] for k, tensor in packed.inputs.items()}, packed.actions[r]) for r in rows]
        for _ in range(rest):  # other processes need this one's weights for their rows
            policy({k: tensor[order[-1:]] for k, tensor in packed.inputs.items()}, packed.actions[order[-1:]])
        restore = order.argsort()

        def joined(tensors: list[Tensor]) -> Tensor:
            return torch.where(packed.mask, torch.cat(tensors)[restore], 0.0)

        values = [piece.values for piece in pieces if piece.values is not None]
        return PolicyOutputs(logprobs=joined([p.logprobs for p in pieces]), values=joined(values) if values else None)

    def _most(self, forwards: int) -> int:
        """The largest number of forwards that a process needs, if all must make as many."""
        if not self.distributed.layout.in_step:
            return forwards
        return max(self.distributed.gather_objects([forwards]))


def check_finite(trajectories: Trajectories, step: int) -> None:
    """Raise TrainingError, naming the first completion with a number that is not finite, before the update."""
    for name in ("rewards", "sampling_logprobs", "old_logprobs", "ref_logprobs", "values"):
        tensor = getattr(trajectories, name)
        if tensor is not None and not torch.isfinite(tensor).all():
            row = int((~torch.isfinite(tensor)).any(-1).nonzero()[0])
            raise TrainingError(
                f"{name} of step {step}, completion {int(trajectories.row_index[row])} are not finite; nothing was learnt "
                "from this step. Check the model's weights and precision, and the scale of the rewards."
            )
