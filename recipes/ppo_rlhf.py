"""PPO fine-tuning of a language model against a reward model or reward functions, with the whole RLHF loop in `train`.

Each step does the following:

1. The engine samples a completion of each of the step's prompts with the current policy.
2. The reward models and functions give every completion one score.
3. Policy and reference compute the log-probs of the sampled tokens: each token's reward is -`kl_coef` times
   log(policy / reference), plus the score at the last token; the value head predicts the rewards still to come.
4. GAE turns rewards and values into one advantage per token; a few epochs of minibatches make tokens with a positive
   advantage likelier and the others less likely, within the clip range, and fit the value head to the returns.
5. The engine receives the new weights, and the run writes metrics, completions and, every `checkpoint_every` steps, a
   checkpoint.

    accelerate launch recipes/ppo_rlhf.py                                   # embedded data, offline, minutes on 2 cores
    accelerate launch recipes/ppo_rlhf.py --policy runs/sft --dataset prompts.jsonl \\
        --reward my_rewards.py:polite --output_dir runs/mine --learning_rate 1e-5

Without `--policy` the whole embedded pipeline runs (pipeline.py): data, SFT, reward model, PPO, evaluation.
Every setting of rlhf/trainers/config.py works as `--name value` and in a YAML file given with `--config`.
"""

import sys
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import transformers
from command import UserRun, embedded_by_default, say_where

from rlhf.algorithms.ppo import PPO
from rlhf.commands.cli import run_command
from rlhf.data.tokenization import require_pad_token
from rlhf.distributed import Distributed
from rlhf.models.export import save_policy
from rlhf.models.loading import end_tokens
from rlhf.models.policy import Policy
from rlhf.rewards.combine import Rewards
from rlhf.rollout.engine import hand_over
from rlhf.rollout.in_process import InProcessEngine
from rlhf.rollout.prompts import PromptSource, Sampler, evaluate
from rlhf.rollout.sampled import with_advantages
from rlhf.rollout.scoring import Scorer
from rlhf.runs.reporting import StepBar
from rlhf.runs.run import Run
from rlhf.trainers.checks import (
    agreement_with,
    check_batch_sizes,
    check_critic,
    check_model,
    check_rewards,
    check_sampling,
)
from rlhf.trainers.config import PPOTrainerConfig
from rlhf.trainers.inputs import adamw, critic_of, model_of, prompts_of, reference_of, reward_of
from rlhf.trainers.placing import gathered, place, reward_models
from rlhf.trainers.plan import memory_lines
from rlhf.trainers.report import MUST_MATCH, POLICY_FOLDERS, description, first_check, identity
from rlhf.training.learner import Learner


@dataclass(frozen=True, kw_only=True)
class PPORecipe(UserRun, PPOTrainerConfig):
    """Settings of the command: model, data and rewards (UserRun), and how to train (PPOTrainerConfig)."""

    trainer_config = PPOTrainerConfig

    critic: str = "head"
    """"head": a value head on the policy; "adapter": an adapter of its base; or the path of a causal LM or reward model."""
    output_dir: str = "runs/ppo_rlhf"
    """Directory of this run, for checkpoints, metrics and the trained policy."""


def train(recipe: PPORecipe) -> None:
    """PPO on the user's model, prompts and rewards. `rlhf.PPOTrainer(...).train()` writes the same bytes."""
    config: PPOTrainerConfig = recipe.training()
    folder = Path(config.output_dir)
    distributed = Distributed(
        precision=config.precision,
        tracker=config.tracker,
        tracker_dir=str(folder / "tracker"),
        collective_timeout_s=config.collective_timeout_s,
    )

    # Prompts, as token ids; the seed decides their order.
    tokenizer = recipe.load_tokenizer()
    note = require_pad_token(tokenizer)
    prompts = prompts_of(recipe.rows("dataset", tokenizer), tokenizer, config)
    rows = recipe.rows("eval_dataset", tokenizer)
    held_out = None if rows is None else prompts_of(rows, tokenizer, config, "eval_dataset")
    check_batch_sizes(config, 1, held_out, distributed.world_size)

    # Rewards: models and functions, combined into one weighted score per completion.
    rewards = Rewards(
        [reward_of(reward, tokenizer, config.frozen_dtype) for reward in recipe.rewards()],
        weights=config.reward_weights,
        timeout_s=config.reward_timeout_s,
    )
    check_rewards(rewards, prompts, held_out)

    # The policy with its critic, and the reference policy: as the policy is before training.
    ppo = PPO(config.ppo)
    lm, adapters = model_of(recipe.policy, config, recipe.lora.peft_config())
    check_model(lm, tokenizer, config, prompts, held_out)
    critic = critic_of(recipe.critic, ppo, adapters, tokenizer)
    policy = Policy(lm, temperature=config.generation.temperature, critic=critic, adapters=adapters)
    check_critic(policy, tokenizer, config, rewards, prompts, held_out)
    reference = reference_of(policy, None, config)
    place(policy, reference, rewards, config, distributed)

    # The source: the engine completes prompts, the rewards score the completions, the scorer adds log-probs and values.
    engine = InProcessEngine(policy, distributed, completions_at_once=config.generation.completions_at_once)
    check_sampling(engine)
    sampler = Sampler(
        engine=engine,
        rewards=rewards,
        tokenizer=tokenizer,
        sampling=config.generation.sampling(end_tokens(lm, tokenizer.eos_token_id)),
        seed=config.seed,
        max_steps=config.total_steps,
        engine_timeout_s=config.engine_timeout_s,
        weights=policy.weights if distributed.world_size == 1 else None,
        gathered=partial(gathered, policy, rewards, distributed),
    )
    scorer = Scorer(
        policy=policy,
        reference=reference,
        microbatch_tokens=config.update.microbatch_tokens,
        distributed=distributed,
    )
    source = PromptSource(
        prompts,
        sampler,
        scorer,
        distributed,
        prompts_per_step=config.prompts_per_step,
        missing_eos=config.missing_eos,
        missing_eos_value=config.missing_eos_value,
        log_completions=config.log_completions,
    )

    # The learner: updates the policy on trajectories.
    learner = Learner(
        policy,
        ppo,
        partial(adamw, config),
        config.update,
        distributed,
        seed=config.seed,
        agreement=agreement_with(engine, lm),
        critic_warmup_steps=config.critic_warmup_steps,
    )

    # The run: its directory, log files, signals and checkpoints.
    run = Run(
        folder,
        distributed,
        description=identity(config, prompts, rewards.names, reference, ppo),
        must_match=MUST_MATCH,
        keep_checkpoints=config.keep_checkpoints,
        writes=POLICY_FOLDERS,
    )
    with closing(run):
        run.open(resume=recipe.resume, overwrite=recipe.overwrite)
        run.restore({"learner": learner, "source": source})
        hand_over(engine, policy.weights, run.step)
        lines = description(config, policy, prompts, held_out, rewards.names, distributed, completions_per_prompt=1)
        models = (policy, reference, list(reward_models(rewards)))
        sizes = {"prompt_tokens": prompts.longest, "held_out": 0 if held_out is None else len(held_out)}
        lines += memory_lines(config, ppo, *models, distributed, **sizes)
        run.say(*lines, note, *learner.adapted)

        first = run.step
        total = config.total_steps
        with run.training(StepBar(first_step=first, total_steps=total, hidden=not distributed.is_main)):
            while run.step < total and not run.stopping():
                step = run.step
                collected = source.collect(step)
                learnt = learner.learn(
                    collected.trajectories,
                    step=step,
                    progress=step / total,
                    learning_rate=config.learning_rate_at(step),
                )
                metrics = {**collected.metrics, **learnt}
                samples = collected.samples if config.is_due(config.log_completions_every, step) else []
                if step == first:
                    run.say(first_check(learnt))
                try:
                    hand_over(engine, policy.weights, step + 1)
                    if held_out is not None and config.is_due(config.eval_every, step):
                        mine = distributed.share(len(held_out))
                        _, scores = evaluate(held_out, mine, sampler, scorer, distributed, step=step)
                        metrics |= {f"eval/{name}": value for name, value in scores.items()}
                finally:  # log the step even if the engine or the evaluation fails
                    run.log(metrics, with_advantages(samples, learner.first_advantages))
                if config.is_due(config.checkpoint_every, step):
                    run.save()
            run.finish()
            whole = distributed.layout.whole
            save_policy(policy, tokenizer, folder / "policy", whole=whole, writes=distributed.is_main)
            distributed.barrier()
    if distributed.is_main:
        say_where(folder / "policy")


def main(config: PPORecipe) -> None:
    transformers.utils.logging.disable_progress_bar()  # a run draws its own
    if config.policy is not None:
        train(config)
    else:
        import pipeline  # only here: a run on the user's own data does not need it

        pipeline.run(
            config.training(),
            lora=config.lora,
            critic=config.critic,
            resume=config.resume,
            overwrite=config.overwrite,
        )


if __name__ == "__main__":
    sys.argv[1:1] = embedded_by_default(sys.argv[1:], "ppo_embedded.yaml")
    run_command(PPORecipe, main, "PPO fine-tuning of a language model.")
