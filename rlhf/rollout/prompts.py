"""Prompts as a source of trajectories: an engine completes them, rewards score them, the training forward reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.core.masking import masked_sum
from rlhf.core.random import EVALUATION, SAMPLING
from rlhf.data.prompts import Prompt, PromptDataset
from rlhf.distributed import Distributed
from rlhf.rewards.combine import Rewards, completion_texts
from rlhf.rollout.engine import Key, Request, RolloutEngine, Sampling
from rlhf.rollout.episode import single_turn
from rlhf.rollout.sampled import MissingEOS, Sampled, final_scores, length_metrics, lines, no_episodes, rollout_metrics
from rlhf.rollout.scoring import Scorer
from rlhf.runs.checkpoint import Saved
from rlhf.training.source import Collected


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Prompts -> episodes of one completion each, and their scores."""

    engine: RolloutEngine
    rewards: Rewards
    tokenizer: Any
    sampling: Sampling
    seed: int
    max_steps: int = 0
    """Steps of the run, which reward functions are told."""
    allow_unscored: bool = False
    """An episode on which every reward function abstains is left out of learning, instead of an error."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        slots: Sequence[int],
        *,
        step: int,
        copies: int = 1,
        stream: int = SAMPLING,
        drawn_as: int | None = None,
    ) -> Sampled:
        """`copies` episodes of each of this process's prompts.

        slots: the place of each prompt in the global step. stream: keeps the draws of training and evaluation apart.
        drawn_as: the step that names the draws, if it is another one.
        """
        if not prompts:
            return no_episodes(self.rewards.names)
        drawn = step if drawn_as is None else drawn_as
        requests = [
            Request(prompt.ids, Key(self.seed, stream, drawn, slot, copy))
            for prompt, slot in zip(prompts, slots, strict=True)
            for copy in range(copies)
        ]
        completions = [future.result() for future in self.engine.submit(requests, self.sampling)]
        repeated = [prompt for prompt in prompts for _ in range(copies)]
        texts, ids = [prompt.prompt for prompt in repeated], [completion.ids for completion in completions]
        rewards = self.rewards(
            prompts=texts,
            completions=completion_texts(texts, ids, self.tokenizer),
            completion_ids=ids,
            columns={name: [prompt.columns[name] for prompt in repeated] for name in repeated[0].columns},
            prompt_ids=[prompt.ids for prompt in repeated],
            trainer_state={"global_step": step, "max_steps": self.max_steps},
            allow_unscored=self.allow_unscored,
        )
        return Sampled(
            prompts=repeated,
            row_index=[slot * copies + copy for slot in slots for copy in range(copies)],
            episodes=[single_turn(p.ids, c) for p, c in zip(repeated, completions, strict=True)],
            rewards=rewards,
        )


class PromptSource:
    """A `Source` that takes the data set's prompts in an order decided by the seed, and completes each of them alike."""

    def __init__(
        self,
        data: PromptDataset,
        sampler: Sampler,
        scorer: Scorer,
        distributed: Distributed,
        *,
        prompts_per_step: int,
        completions_per_prompt: int = 1,
        missing_eos: MissingEOS = "keep",
        missing_eos_value: float | None = None,
        verdict: str | None = None,
        log_completions: int = 0,
    ) -> None:
        """Sizes are global. missing_eos: see `final_scores`. verdict: the reward that says whether a completion is right;
        lengths are then told by it. log_completions: how many are put before people."""
        self.data, self.sampler, self.scorer, self.distributed = data, sampler, scorer, distributed
        self.prompts_per_step, self.completions_per_prompt = prompts_per_step, completions_per_prompt
        self.missing_eos, self.missing_eos_value = missing_eos, missing_eos_value
        self.verdict, self.log_completions = verdict, log_completions
        self.cursor = 0
        """Prompts drawn from the data set so far."""
        self._began = (-1, 0)  # the last step that drew prompts, and the cursor before it

    def collect(self, step: int) -> Collected:
        sampled = self.sample(step, 0, self.prompts_per_step)
        return self.collected(step, sampled, [sampled], self.prompts_per_step)

    def sample(self, step: int, first: int, count: int) -> Sampled:
        """This process's share of the step's prompts first .. first + count - 1, completed and scored; may be empty."""
        prompts, slots = self.draw(step, first, count)
        return self.sampler(prompts, slots, step=step, copies=self.completions_per_prompt)

    def draw(self, step: int, first: int, count: int) -> tuple[list[Prompt], list[int]]:
        """This process's share of the step's prompts first .. first + count - 1, and the place of each in the step."""
        if self._began[0] != step:
            self._began = (step, self.cursor)
        indices = self.data.step_indices(self.cursor + first, count, self.sampler.seed)
        mine = self.distributed.share(count)
        return [self.data[indices[i]] for i in mine], [first + i for i in mine]

    def collected(self, step: int, chosen: Sampled, sampled: Sequence[Sampled], used: int) -> Collected:
        """The episodes to learn from, with the metrics of all that were sampled for the step, from `used` prompts."""
        metrics = rollout_metrics(sampled, self.sampler.rewards.names, self.distributed)
        if self.verdict is not None:
            metrics |= length_metrics(sampled, self.verdict, self.distributed)
        scores = final_scores(chosen, self.missing_eos, self.missing_eos_value or 0.0)
        trajectories = self.scorer(chosen.episodes, scores, chosen.row_index, step=step)
        self.cursor += used
        return Collected(
            trajectories=trajectories,
            metrics=metrics | {"prompts_seen": self.cursor},
            samples=lines(chosen, self.log_completions, self.sampler.tokenizer),
        )

    def state(self, step: int) -> Saved:
        began, before = self._began
        return Saved({"prompts_seen": before if began == step else self.cursor})

    def load(self, saved: Saved) -> None:
        self.cursor = saved.values["prompts_seen"]


def evaluate(
    data: PromptDataset,
    rows: Sequence[int],
    sampler: Sampler,
    scorer: Scorer,
    distributed: Distributed,
    *,
    step: int,
    drawn_as: int = 0,
) -> tuple[Sampled, dict[str, float]]:
    """One sampled completion for each of the `rows` of `data` that this process takes, and their metrics, global.

    The same random draws every time (`drawn_as` names others). The KL is that of the policy to the scorer's reference.
    """
    sampled = sampler([data[i] for i in rows], rows, step=step, stream=EVALUATION, drawn_as=drawn_as)
    metrics = rollout_metrics([sampled], sampler.rewards.names, distributed)
    if scorer.reference is not None:
        trajectories = scorer(sampled.episodes, sampled.rewards.scores, sampled.row_index, step=step)
        assert trajectories.ref_logprobs is not None
        total = masked_sum(trajectories.old_logprobs - trajectories.ref_logprobs, trajectories.mask)
        pair = distributed.all_sum(total.new_tensor([float(total), float(len(sampled.episodes))]))
        metrics["reward_kl"] = float(pair[0]) / float(pair[1])
    return sampled, metrics
