"""Trains a language model against rewards. `Trainer.train` is the loop; each mechanism has a module of its own."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.algorithms.base import Algorithm
from rlhf.data.tokenization import require_pad_token
from rlhf.distributed import Distributed
from rlhf.errors import InputError
from rlhf.models.adapters import Adapters
from rlhf.models.critic import CriticChoice
from rlhf.models.export import save_policy
from rlhf.models.loading import end_tokens
from rlhf.models.policy import Policy
from rlhf.models.reference import Reference
from rlhf.rewards.combine import Rewards
from rlhf.rollout.engine import RolloutEngine, hand_over
from rlhf.rollout.in_process import InProcessEngine
from rlhf.rollout.prompts import PromptSource, Sampler, evaluate
from rlhf.rollout.sampled import with_advantages
from rlhf.rollout.scoring import Scorer
from rlhf.runs.callbacks import Callback
from rlhf.runs.metrics import check_metrics
from rlhf.runs.reporting import StepBar
from rlhf.runs.run import Run
from rlhf.trainers.checks import (
    agreement_with,
    check_batch_sizes,
    check_critic,
    check_model,
    check_rewards,
    check_sampling,
    engine_note,
)
from rlhf.trainers.config import TrainerConfig
from rlhf.trainers.inputs import (
    Reward,
    Rows,
    adamw,
    as_list,
    critic_of,
    model_of,
    prompts_of,
    reference_of,
    reward_of,
    tokenizer_of,
)
from rlhf.trainers.placing import gathered, place, reward_models
from rlhf.trainers.plan import memory_lines
from rlhf.trainers.report import MUST_MATCH, POLICY_FOLDERS, description, first_check, identity
from rlhf.training.learner import Learner
from rlhf.training.source import Source, check_samples


class Trainer:
    """Trains a causal LM against rewards. Subclasses choose the `Algorithm` (`make_algorithm`)."""

    allow_unscored = False
    """Whether a completion may go without a score; False for algorithms that need a score for each."""
    metric_names: ClassVar[Mapping[str, str]] = {}
    """Metric name in this package -> name under which this trainer reports it."""

    def __init__(
        self,
        policy: str | PreTrainedModel,
        rewards: Reward | Sequence[Reward],
        dataset: Rows,
        config: TrainerConfig,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        eval_dataset: Rows | None = None,
        reference: str | PreTrainedModel | None = None,
        critic: CriticChoice | None = None,
        peft_config: Any = None,
        callbacks: Sequence[Callback] = (),
        engine: RolloutEngine | None = None,
        source: Callable[[PromptSource], Source] | None = None,
    ) -> None:
        """Loads and checks everything; nothing is written before `train`.

        Args:
            policy: a path, a hub name, or a transformers causal LM or `PeftModel`, which is trained in place.
            rewards: reward functions, `RewardModel`s, paths of reward models, or a list of them.
            dataset: prompts: a path, a `datasets.Dataset` or a list of rows, with a column "prompt" or "messages".
            config: the settings of the run, of the subclass's type.
            tokenizer: the policy's tokenizer or its path; needed unless `policy` is a path or hub name.
            eval_dataset: held-out prompts, in the same forms as `dataset`.
            reference: the reference policy; by default a frozen copy of `policy` as it is now, or the base of its adapter.
            critic: "head" (a value head, the default of PPO), "adapter" (of the policy's base), or a model of its own: a
                reward model, which is trained in place, or the path of one or of a causal LM.
            peft_config: a `peft.LoraConfig`: train a new adapter instead of all weights.
            callbacks: notified of the run's start, steps, evaluations and end.
            engine: samples the completions; by default the policy itself, in this process. The caller closes it.
            source: makes the source of trajectories from the data set's `PromptSource`; default: `_wrapped`.
        """
        rewards, config = self._with_own_rewards(as_list(rewards), config)
        self.config = config
        self.algorithm = self.make_algorithm()
        self.distributed = Distributed(
            precision=config.precision,
            tracker=config.tracker,
            tracker_dir=str(Path(config.output_dir) / "tracker"),
            collective_timeout_s=config.collective_timeout_s,
        )
        # Bad inputs are refused before the policy is loaded.
        self.tokenizer = tokenizer_of(tokenizer, policy)
        self._note = require_pad_token(self.tokenizer)
        self.data = prompts_of(dataset, self.tokenizer, config)
        self.eval_data = None
        if eval_dataset is not None:
            self.eval_data = prompts_of(eval_dataset, self.tokenizer, config, "eval_dataset")
        check_batch_sizes(config, self.algorithm.completions_per_prompt, self.eval_data, self.distributed.world_size)
        self.rewards = Rewards(
            [reward_of(r, self.tokenizer, config.frozen_dtype) for r in rewards],
            weights=config.reward_weights,
            timeout_s=config.reward_timeout_s,
        )
        self._check_rewards()
        lm, adapters = model_of(policy, config, peft_config)
        check_model(lm, self.tokenizer, config, self.data, self.eval_data)
        self._make_models(lm, adapters, reference, critic_of(critic, self.algorithm, adapters, self.tokenizer), engine)
        prompts = self._make_source()
        self.source: Source = self._wrapped(prompts) if source is None else source(prompts)
        self.run = Run(
            config.output_dir,
            self.distributed,
            description=identity(config, self.data, self.rewards.names, self.reference, self.algorithm),
            must_match=MUST_MATCH,
            keep_checkpoints=config.keep_checkpoints,
            callbacks=callbacks,
            writes=POLICY_FOLDERS,
        )
        self.samples: list[dict[str, Any]] = []
        """Lines of completions.jsonl for the last step; empty if none were due."""
        self._said_check = False

    def _make_models(
        self,
        lm: PreTrainedModel,
        adapters: Adapters | None,
        reference: str | PreTrainedModel | None,
        critic: CriticChoice | None,
        engine: RolloutEngine | None,
    ) -> None:
        config = self.config
        distributed = self.distributed
        generation = config.generation
        self.policy = Policy(lm, temperature=generation.temperature, critic=critic, adapters=adapters)
        check_critic(self.policy, self.tokenizer, config, self.rewards, self.data, self.eval_data)
        self.reference: Reference | None = None
        if "reference" in self.algorithm.needs:
            self.reference = reference_of(self.policy, reference, config)
        place(self.policy, self.reference, self.rewards, config, distributed)
        at_once = generation.completions_at_once
        self.engine = engine or InProcessEngine(self.policy, distributed, completions_at_once=at_once)
        check_sampling(self.engine)
        self.learner = Learner(
            self.policy,
            self.algorithm,
            partial(adamw, config),
            config.update,
            distributed,
            seed=config.seed,
            agreement=agreement_with(self.engine, lm),
            critic_warmup_steps=getattr(config, "critic_warmup_steps", 0),
        )
        hand_over(self.engine, self.policy.weights, 0)

    def _make_source(self) -> PromptSource:
        """The source of trajectories: prompts -> completions of the engine -> scores -> trajectories."""
        config = self.config
        self.sampler = Sampler(
            engine=self.engine,
            rewards=self.rewards,
            tokenizer=self.tokenizer,
            sampling=config.generation.sampling(end_tokens(self.policy.lm, self.tokenizer.eos_token_id)),
            seed=config.seed,
            max_steps=config.total_steps,
            engine_timeout_s=config.engine_timeout_s,
            weights=self.policy.weights if self.distributed.world_size == 1 else None,
            allow_unscored=self.allow_unscored,
            gathered=partial(gathered, self.policy, self.rewards, self.distributed),
        )
        self.scorer = Scorer(
            policy=self.policy,
            reference=self.reference,
            microbatch_tokens=config.update.microbatch_tokens,
            distributed=self.distributed,
        )
        return PromptSource(
            self.data,
            self.sampler,
            self.scorer,
            self.distributed,
            prompts_per_step=config.prompts_per_step,
            completions_per_prompt=self.algorithm.completions_per_prompt,
            missing_eos=config.missing_eos,
            missing_eos_value=config.missing_eos_value,
            verdict=self._verdict(),
            log_completions=config.log_completions,
        )

    # ---- the loop ----

    def train(self, *, resume: bool | str = False, overwrite: bool = False) -> dict[str, float]:
        """Trains up to `total_steps`; returns the metrics of the last step.

        resume: True continues from the newest complete checkpoint of output_dir, a path from that checkpoint.
        overwrite: replace the run that output_dir already holds.
        """
        config = self.config
        run = self.run
        metrics = dict[str, float]()
        self._begin(resume, overwrite)
        bar = StepBar(first_step=run.step, total_steps=config.total_steps, hidden=not self.distributed.is_main)
        try:
            with run.training(bar):
                run.notify("on_train_start", self)
                while run.step < config.total_steps and not run.stopping():
                    step = run.step
                    evaluates = self.eval_data is not None and config.is_due(config.eval_every, step)
                    metrics = self.train_step()
                    try:
                        hand_over(self.engine, self.policy.weights, step + 1)
                        metrics |= self.evaluate() if evaluates else {}
                    finally:  # the step is logged, and can be saved, even if the engine or the evaluation fails
                        run.log(metrics, self.samples)
                    run.notify("on_step_end", self, step, metrics)
                    if config.is_due(config.checkpoint_every, step):
                        run.save()
                run.finish()
                self.save_policy()
                run.notify("on_train_end", self)
        finally:
            run.close()
        return metrics

    def train_step(self) -> dict[str, float]:
        """One rollout and the update on it; returns the metrics of both."""
        config = self.config
        step = self.step
        collected = self.source.collect(step)
        check_metrics(self._named(collected.metrics))
        check_samples(collected)
        learnt = self.learner.learn(
            collected.trajectories,
            step=step,
            progress=step / config.total_steps,
            learning_rate=config.learning_rate_at(step),
        )
        if not self._said_check:
            self.run.say(first_check(learnt))
            self._said_check = True
        logged = collected.samples if config.is_due(config.log_completions_every, step) else []
        self.samples = with_advantages(logged, self.learner.first_advantages)
        return self._named(dict(collected.metrics) | learnt)

    def evaluate(self) -> dict[str, float]:
        """Samples and scores one completion per prompt of eval_dataset, with the same random draws every time."""
        data = self.eval_data
        assert data is not None, "evaluate() needs an eval_dataset"
        mine = self.distributed.share(len(data))
        _, metrics = evaluate(data, mine, self.sampler, self.scorer, self.distributed, step=self.step)
        metrics = {f"eval/{name}": value for name, value in self._named(metrics).items()}
        self.run.notify("on_evaluate", self, self.step, metrics)
        return metrics

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self.run.step

    @property
    def should_stop(self) -> bool:
        """Set this to True to end training after the current step."""
        return self.run.should_stop

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self.run.should_stop = value

    def make_algorithm(self) -> Algorithm:
        """The algorithm that `config` asks for."""
        raise NotImplementedError

    def _with_own_rewards(
        self, rewards: Sequence[Reward], config: TrainerConfig
    ) -> tuple[Sequence[Reward], TrainerConfig]:
        """The user's rewards plus those that settings add, and the settings with the weights of all of them."""
        return rewards, config

    def _check_rewards(self) -> None:
        check_rewards(self.rewards, self.data, self.eval_data)

    def _verdict(self) -> str | None:
        """Name of the reward that judges whether a completion is right, if there is one."""
        return None

    def _wrapped(self, source: PromptSource) -> Source:
        """The source of trajectories to use unless the user passes `source`."""
        return source

    def _begin(self, resume: bool | str, overwrite: bool) -> None:
        """Claims the output directory and, when resuming, restores the state of the checkpoint."""
        self._said_check = False
        if not resume:
            self._require_untrained()
        self.run.open(resume=resume, overwrite=overwrite)
        try:
            if not self.run.resumes:
                self._require_untrained()
            self.run.restore({"learner": self.learner, "source": self.source})
            hand_over(self.engine, self.policy.weights, self.step)
            about = (self.config, self.policy, self.data, self.eval_data, self.rewards.names, self.distributed)
            lines = description(*about, completions_per_prompt=self.algorithm.completions_per_prompt)
            lines += self._memory()
            self.run.say(*lines, self._note, engine_note(self.engine), *self.learner.adapted)
        except BaseException:
            self.run.close()  # a refused run does not keep the directory locked
            raise

    def _memory(self) -> list[str]:
        """Lines about the memory that the run will need."""
        models = (self.policy, self.reference, list(reward_models(self.rewards)))
        sizes = {"prompt_tokens": self.data.longest, "held_out": len(self.eval_data) if self.eval_data else 0}
        return memory_lines(self.config, self.algorithm, *models, self.distributed, **sizes)

    def _require_untrained(self) -> None:
        if self.learner.has_learnt:
            raise InputError(
                "train: this trainer has changed its policy already, so it cannot start at step 0. Continue with "
                "resume=True, or make a new trainer with the policy to start from."
            )

    def save_policy(self) -> None:
        """Writes OUTPUT_DIR/policy: a model that stock transformers loads (an adapter: peft), its tokenizer, its critic."""
        folder = Path(self.config.output_dir) / "policy"
        distributed = self.distributed
        save_policy(self.policy, self.tokenizer, folder, whole=distributed.layout.whole, writes=distributed.is_main)
        distributed.barrier()

    def _named(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {self.metric_names.get(name, name): value for name, value in metrics.items()}
