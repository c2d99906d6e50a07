"""RLHF from scratch on embedded data: demonstrations -> SFT -> preferences -> reward model -> PPO -> evaluation.

Each stage writes a directory below output_dir; finished stages are reused. The hidden gold scorer simulates the human:
it decides the preferences and judges the policies at the end, but no model is trained on its scores.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import embedded
from reward_model import RewardModelConfig, train_reward_model
from small_task import be_quick_and_quiet, train_sft
from stages import Stages

from rlhf.data.prompts import PromptDataset
from rlhf.data.rows import load_rows
from rlhf.distributed import Distributed
from rlhf.models.loading import end_tokens, load_tokenizer
from rlhf.models.lora import LoRASettings
from rlhf.models.policy import load_policy
from rlhf.models.reference import FrozenReference
from rlhf.rewards.combine import Rewards
from rlhf.rewards.model import RewardModel
from rlhf.rollout.in_process import InProcessEngine
from rlhf.rollout.prompts import Sampler, evaluate
from rlhf.rollout.sampled import Sampled
from rlhf.rollout.scoring import Scorer
from rlhf.runs.curves import plot_curves
from rlhf.trainers.config import PPOTrainerConfig
from rlhf.trainers.ppo import PPOTrainer

CURVES = ["score", "rewards/gold/mean", "reward_kl", "completion_length", "entropy", "value_loss"]
NUM_SAMPLES = 3


def gold(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The hidden judge as a reward function; logged with weight 0, never trained on."""
    return [embedded.gold_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def run(
    config: PPOTrainerConfig,
    *,
    lora: LoRASettings | None = None,
    critic: str = "head",
    resume: bool | str = False,
    overwrite: bool = False,
) -> dict[str, dict[str, float]]:
    """Run all stages; return the numbers of the table printed at the end.

    config: settings of the PPO stage, except that `output_dir` is the pipeline's. lora, critic: those of the PPO stage; the
    critic "reward_model" starts from the trained reward model. resume: see `Trainer.train`; even without it, the PPO stage
    continues from its newest checkpoint. overwrite: run all stages again.
    """
    lora = lora or LoRASettings()
    be_quick_and_quiet()
    distributed = Distributed(precision=config.precision, collective_timeout_s=config.collective_timeout_s)
    root = Path(config.output_dir)
    settings = asdict(replace(config, output_dir="")) | {"lora": asdict(lora), "critic": critic}
    stages = Stages(root, settings, distributed, overwrite=overwrite)
    stages.run("data", "data", lambda folder: embedded.write_data(folder, config.seed), on_main=True)
    stages.run("supervised fine-tuning", "sft", lambda folder: train_sft(embedded, root / "data", folder, config.seed))
    stages.run("reward model", "reward_model", lambda folder: _train_reward_model(root, folder, config.seed))
    stages.run("PPO", "ppo/policy", lambda _: _train_ppo(root, config, lora, critic, resume))
    return _evaluate(root, config, distributed)


def _train_reward_model(root: Path, folder: Path, seed: int) -> None:
    train_reward_model(
        RewardModelConfig(
            model=str(root / "sft"),
            dataset=str(root / "data" / "preferences_train.jsonl"),
            eval_dataset=str(root / "data" / "preferences_test.jsonl"),
            output_dir=str(folder),
            seed=seed,
            **embedded.REWARD_MODEL_SETTINGS,
        )
    )


def _train_ppo(root: Path, config: PPOTrainerConfig, lora: LoRASettings, critic: str, resume: bool | str) -> None:
    settings = replace(config, output_dir=str(root / "ppo"), reward_weights=[1.0, 0.0])
    trainer = PPOTrainer(
        str(root / "sft"),
        [str(root / "reward_model"), gold],
        str(root / "data" / "prompts_train.jsonl"),
        settings,
        eval_dataset=str(root / "data" / "prompts_test.jsonl"),
        critic=str(root / "reward_model") if critic == "reward_model" else critic,
        peft_config=lora.peft_config(),
    )
    trainer.train(resume=resume or (root / "ppo" / "checkpoints").is_dir())


def _evaluate(root: Path, config: PPOTrainerConfig, distributed: Distributed) -> dict[str, dict[str, float]]:
    """Evaluate both policies on held-out prompts with the same random draws; print table and samples, plot curves."""
    sampled, results = {}, {}
    for name, folder in {"SFT": root / "sft", "PPO": root / "ppo" / "policy"}.items():
        sampled[name], results[name] = _sample(root, folder, config, distributed)
    texts = {name: _texts(root, episodes) for name, episodes in sampled.items()}
    prompts = [str(prompt.prompt) for prompt in sampled["SFT"].prompts]
    for name in results:
        results[name] |= {
            "win_rate": embedded.win_rate(prompts, texts[name], texts["SFT"]),
            "distinct_1": embedded.distinct_n(texts[name], 1),
            "distinct_2": embedded.distinct_n(texts[name], 2),
        }
    if distributed.is_main:
        accuracy = json.loads((root / "reward_model" / "metrics.json").read_text())["eval_accuracy"]
        results["reward_model"] = {"eval_accuracy": accuracy}
        (root / "results.json").write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
        plot_curves(root / "ppo", root / "curves.png", CURVES)
        print(_table(results, len(prompts)))
        for i in range(NUM_SAMPLES):
            print(f"\n{prompts[i]}\n  SFT  {texts['SFT'][i]}\n  PPO  {texts['PPO'][i]}")
        print(f"\ncurves: {root / 'curves.png'}   numbers: {root / 'results.json'}, {root / 'ppo' / 'metrics.jsonl'}")
        print(f"try it: python -m rlhf.commands.sample {root / 'ppo' / 'policy'}")
    return results


def _sample(
    root: Path, folder: Path, config: PPOTrainerConfig, distributed: Distributed
) -> tuple[Sampled, dict[str, float]]:
    tokenizer = load_tokenizer(str(folder))
    policy, other = (
        load_policy(str(path), temperature=config.generation.temperature).to(distributed.device)
        for path in (folder, root / "sft")
    )
    reference = FrozenReference(other.lm, temperature=config.generation.temperature)
    sampler = Sampler(
        engine=InProcessEngine(policy, distributed, completions_at_once=config.generation.completions_at_once),
        rewards=Rewards([RewardModel.load(root / "reward_model", distributed.device), gold], weights=[1.0, 0.0]),
        tokenizer=tokenizer,
        sampling=config.generation.sampling(end_tokens(policy.lm, tokenizer.eos_token_id)),
        seed=config.seed,
    )
    tokens_at_once = config.update.microbatch_tokens
    scorer = Scorer(policy=policy, reference=reference, microbatch_tokens=tokens_at_once, distributed=distributed)
    rows = load_rows(root / "data" / "prompts_test.jsonl")
    data = PromptDataset.build(rows, tokenizer, max_prompt_tokens=config.max_prompt_tokens)
    return evaluate(data, range(len(data)), sampler, scorer, distributed, step=0, drawn_as=1)


def _texts(root: Path, sampled: Sampled) -> list[str]:
    tokenizer = load_tokenizer(str(root / "sft"))
    return tokenizer.batch_decode([episode.ids for episode in sampled.episodes], skip_special_tokens=True)


def _table(results: dict[str, dict[str, float]], num_prompts: int) -> str:
    sft, ppo = results["SFT"], results["PPO"]
    rows = [
        ("reward-model score", f"{sft['rewards/reward_model/mean']:.2f}", f"{ppo['rewards/reward_model/mean']:.2f}"),
        ("gold score (hidden judge)", f"{sft['rewards/gold/mean']:.2f}", f"{ppo['rewards/gold/mean']:.2f}"),
        ("win rate against SFT (gold)", "", f"{ppo['win_rate']:.0%}"),
        ("KL to SFT, nats per completion", f"{sft['reward_kl']:.1f}", f"{ppo['reward_kl']:.1f}"),
        ("completion length, tokens", f"{sft['completion_length']:.1f}", f"{ppo['completion_length']:.1f}"),
        ("distinct 1-grams", f"{sft['distinct_1']:.3f}", f"{ppo['distinct_1']:.3f}"),
        ("distinct 2-grams", f"{sft['distinct_2']:.3f}", f"{ppo['distinct_2']:.3f}"),
    ]
    accuracy = results["reward_model"]["eval_accuracy"]
    lines = [f"\n{f'{num_prompts} held-out prompts':<34}{'SFT':>10}{'PPO':>10}"]
    lines += [f"{name:<34}{before:>10}{after:>10}" for name, before, after in rows]
    return "\n".join([*lines, f"reward model: {accuracy:.1%} of held-out preference pairs ordered as the human did"])
