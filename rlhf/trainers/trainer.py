"""The loop for language models. `Trainer.train` is the table of contents; every mechanism has a file of its own."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.algorithms.base import Algorithm
from rlhf.core.random import EVALUATION, SAMPLING
from rlhf.data.prompts import PromptDataset
from rlhf.data.rows import load_rows
from rlhf.data.tokenization import require_pad_token
from rlhf.distributed import Distributed
from rlhf.errors import InputError
from rlhf.models.loading import check_precision, check_vocabulary, load_causal_lm, load_tokenizer
from rlhf.models.policy import Policy, frozen_copy
from rlhf.rewards.combine import Rewards
from rlhf.rewards.model import RewardModel
from rlhf.rollout.in_process import Draws, check_cache, end_tokens
from rlhf.rollout.scoring import Collector, Rollout
from rlhf.runs.callbacks import Callback
from rlhf.runs.checkpoint import Saved, flush_directory
from rlhf.runs.reporting import StepBar
from rlhf.runs.run import Run
from rlhf.trainers.config import TrainerConfig
from rlhf.training.learner import Learner
from rlhf.training.sampler import Agreement
from rlhf.training.weights import fingerprint, named_tensors

MUST_MATCH = {"seed", "prompts_per_step", "dataset", "reference", "algorithm", "generation"}
"""What a resumed run may not change: the prompts, the draws or the objective would be others from there on."""

MAX_SAMPLER_GAP = {"float32": 0.1, "bfloat16": 1.0}
"""Nats between sampling and training log-probs of one token beyond which they are not the same policy."""


Reward = str | Callable[..., Any]


class Trainer:
    """Trains a causal LM against rewards with any `Algorithm`.

    policy: a path or a transformers causal LM (trained in place). rewards: reward functions, `RewardModel`s, paths of
    reward models, or a list of them. dataset: a path, a `datasets.Dataset` or a list of rows, with a column "prompt" or
    "messages". reference: the policy to stay close to; by default a frozen copy of `policy` as it is now.
    """

    allow_unscored = False
    """Whether a completion may stay without a score; algorithms that need one for each refuse it."""

    def __init__(
        self,
        algorithm: Algorithm,
        policy: str | PreTrainedModel,
        rewards: Reward | Sequence[Reward],
        dataset: str | Dataset | Sequence[Mapping[str, Any]],
        config: TrainerConfig,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        eval_dataset: str | Dataset | Sequence[Mapping[str, Any]] | None = None,
        reference: str | PreTrainedModel | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.algorithm, self.config = algorithm, config
        self.completions_per_step = config.prompts_per_step * algorithm.completions_per_prompt
        self.distributed = Distributed(
            precision=config.precision, tracker=config.tracker, tracker_dir=str(Path(config.output_dir) / "tracker")
        )
        # What can be refused is refused before the first model is loaded.
        self.tokenizer = self._tokenizer(tokenizer, policy)
        self._notes = [note for note in [require_pad_token(self.tokenizer)] if note]
        self.data = self._prompts(dataset, "dataset")
        self.eval_data = None if eval_dataset is None else self._prompts(eval_dataset, "eval_dataset")
        self._check_batch_sizes()
        self.rewards = Rewards(
            [self._reward(r) for r in as_list(rewards)],
            weights=config.reward_weights,
            timeout_s=config.reward_timeout_s,
        )
        self._check_rewards()

        lm = load_causal_lm(policy) if isinstance(policy, str) else policy
        self._check_model(lm)
        temperature, device = config.generation.temperature, self.distributed.device
        self.reference: Policy | None = None
        if "reference" in algorithm.needs:
            source = load_causal_lm(reference, setting="reference") if isinstance(reference, str) else reference or lm
            self.reference = frozen_copy(source, temperature=temperature).to(device)
        self.policy = Policy(lm, temperature=temperature, value_head="values" in algorithm.needs).to(device)
        self.learner = Learner(
            self.policy,
            algorithm,
            partial(adamw, config),
            config.update,
            self.distributed,
            seed=config.seed,
            agreement=Agreement(bound=MAX_SAMPLER_GAP[config.precision], remedy=_two_forwards(lm)),
        )
        self.collector = Collector(
            policy=self.policy,
            reference=self.reference,
            rewards=self.rewards,
            tokenizer=self.tokenizer,
            generation=config.generation,
            missing_eos=config.missing_eos,
            missing_eos_value=config.missing_eos_value,
            microbatch_tokens=config.update.microbatch_tokens,
            distributed=self.distributed,
            allow_unscored=self.allow_unscored,
        )
        self._reference_fingerprint = None if self.reference is None else fingerprint(self.reference)
        self.run = Run(
            config.output_dir,
            self.distributed,
            description=self._description(),
            must_match=MUST_MATCH,
            keep_checkpoints=config.keep_checkpoints,
            callbacks=callbacks,
            writes=("policy", "policy.tmp"),
        )
        self.cursor = 0
        """Prompts drawn from the data set by the steps that are done."""

    # ---- the loop ----

    def train(self, *, resume: bool | str = False, overwrite: bool = False) -> dict[str, float]:
        """Run to `total_steps`; the last step's metrics.

        resume: True continues from the newest complete checkpoint of output_dir, a path from that checkpoint.
        overwrite: replace the run that output_dir already holds.
        """
        self._open(resume, overwrite)
        metrics: dict[str, float] = {}
        bar = StepBar(first_step=self.step, total_steps=self.config.total_steps, hidden=not self.distributed.is_main)
        try:
            with self.run.training(self._parts, bar):
                self.run.notify("on_train_start", self)
                while self.step < self.config.total_steps and not self.run.stopping():
                    metrics = self.train_step()
                    done = self.step + 1
                    try:
                        if self.eval_data is not None and self._due(done, self.config.eval_every):
                            metrics |= self.evaluate()
                    finally:  # a failing evaluation does not lose the step
                        self.run.log(metrics, self.samples)
                    self.run.notify("on_step_end", self, done - 1, metrics)
                    if self._due(done, self.config.checkpoint_every):
                        self.run.save(self._parts())
                self.run.finish(self._parts())
                self.save_policy()
                self.run.notify("on_train_end", self)
        finally:
            self.run.close()
        return metrics

    def train_step(self) -> dict[str, float]:
        """One rollout and what is learnt from it."""
        config = self.config
        rollout, metrics, cursor = self._collect(self.cursor)
        trajectories = self.collector.trajectories(rollout, step=self.step)
        learnt = self.learner.learn(
            trajectories,
            step=self.step,
            progress=self.step / config.total_steps,
            learning_rate=config.learning_rate_at(self.step),
        )
        if not self._checked:
            self._say_check(learnt)
        self.cursor, self.samples = cursor, self._sample_rows(rollout)
        return metrics | learnt | {"prompts_seen": cursor}

    def evaluate(self) -> dict[str, float]:
        """One sampled completion per prompt of eval_dataset, scored; the same random draws every time."""
        assert self.eval_data is not None, "evaluate() needs an eval_dataset"
        mine = list(self.distributed.share(len(self.eval_data)))
        draws = Draws(seed=self.config.seed, stream=EVALUATION, step=0, slots=mine)
        prompts = [self.eval_data[i] for i in mine]
        rollout = self.collector.rollout(prompts, draws, version=self.step, trainer_state=self._trainer_state())
        metrics = self.collector.evaluation(rollout)
        self.run.notify("on_evaluate", self, self.step, metrics)
        return metrics

    def _collect(self, cursor: int) -> tuple[Rollout, dict[str, float], int]:
        """This process's share of the step's prompts, completed and scored; its metrics; the prompts drawn by then."""
        rollout = self._sample(cursor, self.config.prompts_per_step)
        return rollout, self.collector.metrics(rollout), cursor + self.config.prompts_per_step

    def _sample(self, cursor: int, count: int, *, first_slot: int = 0) -> Rollout:
        """This process's share of the `count` prompts after the first `cursor` ones of the run, completed and scored.

        first_slot: how many prompts of this step were sampled before; it keeps their random draws apart.
        """
        seed = self.config.seed
        indices = self.data.step_indices(cursor, count, seed)
        mine = self.distributed.share(count)
        return self.collector.rollout(
            [self.data[indices[i]] for i in mine],
            Draws(seed=seed, stream=SAMPLING, step=self.step, slots=[first_slot + i for i in mine]),
            copies=self.algorithm.completions_per_prompt,
            version=self.step,
            trainer_state=self._trainer_state(),
        )

    # ---- starting, saving, telling ----

    def _tokenizer(self, tokenizer: Any, policy: str | PreTrainedModel) -> PreTrainedTokenizerBase:
        if tokenizer is None:
            if not isinstance(policy, str):
                raise InputError("tokenizer: a policy given as a module needs its tokenizer too.")
            return load_tokenizer(policy, setting="policy")
        return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer

    def _reward(self, reward: Reward) -> Callable[..., Any]:
        if isinstance(reward, RewardModel):
            return reward.for_policy(self.tokenizer)
        if not isinstance(reward, str):
            return reward
        return RewardModel.load(reward, self.distributed.device, policy_tokenizer=self.tokenizer)

    def _prompts(self, dataset: Any, setting: str) -> PromptDataset:
        if isinstance(dataset, str):
            dataset = load_rows(dataset, setting=setting)
        elif not isinstance(dataset, Dataset):
            dataset = Dataset.from_list([dict(row) for row in dataset])
        return PromptDataset.build(
            dataset,
            self.tokenizer,
            max_prompt_tokens=self.config.max_prompt_tokens,
            prompt_too_long=self.config.prompt_too_long,
            setting=setting,
        )

    def _check_rewards(self) -> None:
        for data in filter(None, (self.data, self.eval_data)):
            self.rewards.check_columns(data[0].columns)

    def _check_batch_sizes(self) -> None:
        size = self.config.update.minibatch_size or self.completions_per_step
        processes = self.distributed.world_size
        if self.completions_per_step % size:
            raise InputError(
                f"update.minibatch_size={size} does not divide the {self.completions_per_step} completions of a step "
                f"(prompts_per_step={self.config.prompts_per_step} x {self.algorithm.completions_per_prompt}). "
                "Choose sizes so that every optimizer step sees the same number of completions."
            )
        prompts = min(self.config.prompts_per_step, len(self.eval_data) if self.eval_data else math.inf)
        if prompts < processes:
            raise InputError(
                f"prompts_per_step (or eval_dataset) has {prompts} prompts, which leaves some of the {processes} processes "
                "without one. Give more, or start fewer processes."
            )

    def _check_model(self, lm: PreTrainedModel) -> None:
        check_vocabulary(lm, self.tokenizer)
        check_precision(lm)
        check_cache(lm)
        end_tokens(lm, self.tokenizer.eos_token_id)
        longest = max(data.longest for data in (self.data, self.eval_data) if data is not None)
        longest += self.config.generation.max_new_tokens
        limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise InputError(
                f"generation.max_new_tokens={self.config.generation.max_new_tokens}: with the longest prompt that makes "
                f"{longest} tokens, but the policy has positions for {limit}. Lower it or max_prompt_tokens."
            )

    def _open(self, resume: bool | str, overwrite: bool) -> None:
        """Claim the output directory and, when resuming, continue exactly where the checkpoint was written."""
        self._checked = False
        if not resume:
            self._require_untrained()
        checkpoint = self.run.open(resume=resume, overwrite=overwrite)
        try:
            if checkpoint is None:
                self._require_untrained()
            else:
                self.learner.load(checkpoint.part("learner"))
                self.cursor = checkpoint.part("source").values["prompts_seen"]
            self._describe()
        except BaseException:
            self.run.close()  # a refused run does not keep the directory locked
            raise

    def _require_untrained(self) -> None:
        if self.learner.has_learnt:
            raise InputError(
                "train: this trainer has changed its policy already, so it cannot start at step 0. Continue with "
                "resume=True, or make a new trainer with the policy to start from."
            )

    def _parts(self) -> Mapping[str, Saved] | None:
        if self.learner.updating or self.learner.updates != self.step:
            return None
        return {"learner": self.learner.state(), "source": Saved({"prompts_seen": self.cursor})}

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.run.step

    @property
    def should_stop(self) -> bool:
        """Set it to end after the current step."""
        return self.run.should_stop

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self.run.should_stop = value

    def save_policy(self) -> None:
        """OUTPUT_DIR/policy: a model that stock transformers loads, its tokenizer, and the value head beside them."""
        if self.distributed.is_main:
            final = Path(self.config.output_dir) / "policy"
            temporary = final.with_name("policy.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            self.policy.lm.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            if self.policy.value_head is not None:
                save_file(named_tensors(self.policy.value_head), temporary / "value_head.safetensors")
            flush_directory(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        self.distributed.barrier()

    def _trainer_state(self) -> dict[str, Any]:
        return {"global_step": self.step, "max_steps": self.config.total_steps}

    def _sample_rows(self, rollout: Rollout) -> list[dict[str, Any]]:
        """The first completions of the step, as lines of completions.jsonl."""
        if not self._due(self.step + 1, self.config.log_completions_every):
            return []
        rows = range(min(self.config.log_completions, len(rollout.completions)))
        texts = self.tokenizer.batch_decode([rollout.completions[row].ids for row in rows])
        rewards = rollout.rewards
        return [
            {name: values[row] for name, values in rewards.extra.items()}
            | {f"rewards/{name}": values[row] for name, values in rewards.per_function.items()}
            | {
                "prompt": rollout.prompts[row].prompt,
                "completion": texts[row],
                "score": None if math.isnan(rewards.scores[row]) else rewards.scores[row],
                "advantage": self.learner.first_advantages[rollout.row_index[row]].item(),
            }
            for row in rows
        ]

    def _description(self) -> dict[str, Any]:
        """What a checkpoint remembers of its run, to notice a resume with something else."""
        return {
            **asdict(self.config),
            "dataset": self.data.fingerprint,
            "rewards": self.rewards.names,
            "reference": self._reference_fingerprint,
            "algorithm": type(self.algorithm).__name__,
        }

    def _due(self, done: int, every: int) -> bool:
        """Every so many steps, and after the last."""
        return done == self.config.total_steps or (every > 0 and done % every == 0)

    def _describe(self) -> None:
        """What will run, with every derived size; before the first step."""
        d, c, data = self.distributed, self.config, self.data
        completions = self.completions_per_step
        size = c.update.minibatch_size or completions
        self.run.say(
            f"{d.world_size} process(es) on {d.device.type}, {c.precision}, "
            f"{sum(p.numel() for p in self.policy.parameters()):,} parameters, output in {c.output_dir}",
            f"data: {len(data)} prompts ({data.dropped} dropped, {data.truncated} cut), "
            + (f"{len(self.eval_data)} for evaluation" if self.eval_data else "none for evaluation"),
            f"batch: {c.prompts_per_step} prompts x {self.algorithm.completions_per_prompt} = {completions} completions "
            f"per step, {c.update.num_epochs} epoch(s) x {completions // size} minibatch(es) of {size}",
            f"rewards: {', '.join(self.rewards.names)}",
            *self._notes,
            *self._repeats(),
        )

    def _say_check(self, metrics: Mapping[str, float]) -> None:
        """Of the first step, before which policy, sampler and reference are one."""
        self._checked = True
        gap, kl = metrics["sampler_gap"], metrics.get("reward_kl")
        of_reference = "no reference" if kl is None else f"KL(policy || reference) = {kl:.3g} nats per completion"
        self.run.say(
            f"check: sampling and training log-probs differ by at most {gap:.2g} (ratio within {gap:.2g} of 1); "
            + of_reference
        )

    def _repeats(self) -> list[str]:
        count, given = self.config.prompts_per_step, len(self.data)
        if count <= given:
            return []
        return [f"note: a step takes {count} prompts and there are {given}: they repeat within it, with other draws"]


def as_list(rewards: Reward | Sequence[Reward]) -> list[Reward]:
    """One reward or several, as a list."""
    return [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)


def adamw(config: TrainerConfig, policy: Module) -> torch.optim.Optimizer:
    """AdamW over what is trained; eps as in the control presets and in N+ (arXiv 2403.17031, appendix)."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.learning_rate, eps=1e-5, weight_decay=config.weight_decay)


def _two_forwards(lm: PreTrainedModel) -> str:
    return (
        f"The forward of {type(lm).__name__} with a cache and without are not the same policy: use another attention "
        "implementation or precision, or report the model."
    )
