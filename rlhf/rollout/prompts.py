"""Trajectories from prompts: an engine completes them, rewards score them, the training forward adds log-probs."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from rlhf.core.masking import masked_sum
from rlhf.core.random import EVALUATION, SAMPLING
from rlhf.data.prompts import Prompt, PromptDataset
from rlhf.distributed import Distributed
from rlhf.errors import TrainingError
from rlhf.lifeline import phase
from rlhf.rewards.combine import Rewards, completion_texts
from rlhf.rollout.engine import Completion, Key, Request, RolloutEngine, Sampling, Weights, completions_of
from rlhf.rollout.episode import single_turn
from rlhf.rollout.sampled import MissingEOS, Sampled, final_scores, length_metrics, lines, no_episodes, rollout_metrics
from rlhf.rollout.scoring import Scorer
from rlhf.runs.checkpoint import Saved
from rlhf.training.source import Collected


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Samples and scores completions: prompts -> episodes of one completion each, with their scores."""

    engine: RolloutEngine
    rewards: Rewards
    tokenizer: Any
    sampling: Sampling
    seed: int
    max_steps: int = 0
    """Number of steps of the run, passed to the reward functions."""
    engine_timeout_s: float | None = None
    """Seconds to wait for the engine's completions of a step; None: no limit."""
    weights: Weights | None = None
    """The policy's weights, with which a lost engine is synced after a restart; None: a lost engine ends the run."""
    allow_unscored: bool = False
    """Leave an episode out of learning if every reward function abstains on it, instead of raising an error."""
    gathered: Callable[[str], AbstractContextManager[None]] = lambda models: nullcontext()
    """Context in which this process holds the complete weights of the "policy" or the "rewards"; all processes enter it,
    also one without prompts."""

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
        """Sample `copies` episodes of each prompt and score them.

        Args:
            prompts: this process's prompts; may be empty.
            slots: the place of each prompt in the global step.
            step: the training step, as reward functions see it.
            copies: completions per prompt.
            stream: random stream; training and evaluation use different ones.
            drawn_as: the step that keys the random draws, if it is not `step`.
        """
        drawn = step if drawn_as is None else drawn_as
        requests = [
            Request(list(prompt.ids), Key(self.seed, stream, drawn, slot, copy))
            for prompt, slot in zip(prompts, slots, strict=True)
            for copy in range(copies)
        ]
        with self.gathered("policy"):
            completions = self._complete(requests)
        with self.gathered("rewards"):
            return self._scored(prompts, slots, completions, step=step, copies=copies)

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        if not requests:
            return []
        completions = completions_of(
            self.engine, requests, self.sampling, timeout_s=self.engine_timeout_s, weights=self.weights
        )
        _check_versions(completions, self.engine.version)
        return completions

    def _scored(
        self,
        prompts: Sequence[Prompt],
        slots: Sequence[int],
        completions: Sequence[Completion],
        *,
        step: int,
        copies: int,
    ) -> Sampled:
        if not completions:
            return no_episodes(self.rewards.names)
        repeated = [prompt for prompt in prompts for _ in range(copies)]
        texts = [prompt.prompt for prompt in repeated]
        ids = [completion.ids for completion in completions]
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


def _check_versions(completions: Sequence[Completion], version: int) -> None:
    """TrainingError if a completion comes from other weights than those that the engine has, while none was in flight."""
    found = {span.version for completion in completions for span in completion.versions}
    if found - {version}:
        raise TrainingError(
            f"The engine has the weights after {version} updates and says that it sampled with those after "
            f"{', '.join(map(str, sorted(found)))}. Nothing was trained in this step. Check the engine."
        )


class PromptSource:
    """A `Source` that takes prompts from the data set, in an order set by the seed, and samples completions of them."""

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
        """
        Args:
            data: the prompts to train on.
            sampler: samples and scores the completions.
            scorer: computes log-probs and values of the sampled episodes.
            distributed: the process group.
            prompts_per_step: prompts per step over all processes.
            completions_per_prompt: completions per prompt.
            missing_eos: how to change the score of a completion without an end token, see `final_scores`.
            missing_eos_value: `value` in `final_scores`.
            verdict: name of the reward that says whether a completion is right (above 0); completion lengths are then
                also reported by verdict.
            log_completions: how many completions to write to completions.jsonl.
        """
        self.data = data
        self.sampler = sampler
        self.scorer = scorer
        self.distributed = distributed
        self.prompts_per_step = prompts_per_step
        self.completions_per_prompt = completions_per_prompt
        self.missing_eos = missing_eos
        self.missing_eos_value = missing_eos_value
        self.verdict = verdict
        self.log_completions = log_completions
        self.cursor = 0
        """Prompts drawn from the data set so far."""
        self._began = (-1, 0)  # the last step that drew prompts, and the cursor before it

    def collect(self, step: int) -> Collected:
        sampled = self.sample(step, 0, self.prompts_per_step)
        return self.collected(step, sampled, [sampled], self.prompts_per_step)

    def sample(self, step: int, first: int, count: int) -> Sampled:
        """Complete and score this process's share of the step's prompts first .. first + count - 1; it may be empty."""
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
        """Build the result of a step, for the learner, and advance the cursor by `used`.

        chosen: the episodes to learn from. sampled: all episodes of the step, from which metrics are computed. used: number
        of prompts that the step took from the data set, over all processes.
        """
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
        self.cursor = saved.count("prompts_seen")


@phase("evaluation")
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
    """Sample one completion of each prompt of `rows` and score it.

    With the same `drawn_as`, every evaluation uses the same random draws.

    Args:
        data: the data set.
        rows: indices into `data` of this process's prompts.
        sampler: samples and scores the completions.
        scorer: if it has a reference policy, "reward_kl" is the KL from the policy to that reference.
        distributed: the process group, over which metrics are averaged.
        step: the training step, as reward functions and errors name it.
        drawn_as: the step that keys the random draws.

    Returns:
        This process's completions, and the metrics over all processes.
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
