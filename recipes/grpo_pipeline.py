"""GRPO from scratch on embedded data: demonstrations -> SFT that is right about half of the time -> GRPO -> evaluation.

Each stage writes a directory below output_dir; finished stages are reused. The task is in arithmetic.py.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import arithmetic
from small_task import be_quick_and_quiet, train_sft
from stages import Stages

from rlhf.core.random import EVALUATION
from rlhf.data.prompts import PromptDataset
from rlhf.data.rows import load_rows
from rlhf.distributed import Distributed
from rlhf.models.loading import end_tokens, load_tokenizer
from rlhf.models.lora import LoRASettings
from rlhf.models.policy import load_policy
from rlhf.rollout.engine import Key, Request, completions_of
from rlhf.rollout.in_process import InProcessEngine
from rlhf.runs.curves import plot_curves
from rlhf.trainers.config import GRPOTrainerConfig
from rlhf.trainers.grpo import GRPOTrainer
from rlhf.verifiers import exact_match

CURVES = ["reward", "eval/reward", "frac_reward_zero_std", "entropy", "grad_norm", "completions/mean_length"]
NUM_SAMPLES = 16
"""Completions sampled per held-out problem to estimate accuracy and pass@k."""
SHOWN_PROBLEMS, SHOWN_SAMPLES = 4, 6


@dataclass(frozen=True)
class Answers:
    """One model's answers to the held-out problems."""

    greedy: list[str]
    sampled: list[list[str]]
    """NUM_SAMPLES answers to each problem."""
    lengths: list[int]
    """Tokens of each sampled completion, EOS included."""


def run(
    config: GRPOTrainerConfig,
    *,
    lora: LoRASettings | None = None,
    resume: bool | str = False,
    overwrite: bool = False,
) -> dict[str, dict[str, float]]:
    """Run all stages; return the numbers of the table printed at the end. Arguments: see `run` in pipeline.py."""
    lora = lora or LoRASettings()
    be_quick_and_quiet()
    distributed = Distributed(precision=config.precision, collective_timeout_s=config.collective_timeout_s)
    root = Path(config.output_dir)
    settings = asdict(replace(config, output_dir="")) | {"lora": asdict(lora)}
    stages = Stages(root, settings, distributed, overwrite=overwrite)
    stages.run("data", "data", lambda folder: arithmetic.write_data(folder, config.seed), on_main=True)
    stages.run(
        "supervised fine-tuning", "sft", lambda folder: train_sft(arithmetic, root / "data", folder, config.seed)
    )
    stages.run("GRPO", "grpo/policy", lambda _: _train_grpo(root, config, lora, resume))
    return _evaluate(root, config, distributed)


def _train_grpo(root: Path, config: GRPOTrainerConfig, lora: LoRASettings, resume: bool | str) -> None:
    trainer = GRPOTrainer(
        str(root / "sft"),
        exact_match,
        str(root / "data" / "prompts_train.jsonl"),
        replace(config, output_dir=str(root / "grpo")),
        eval_dataset=str(root / "data" / "prompts_test.jsonl"),
        peft_config=lora.peft_config(),
    )
    trainer.train(resume=resume or (root / "grpo" / "checkpoints").is_dir())


def _evaluate(root: Path, config: GRPOTrainerConfig, distributed: Distributed) -> dict[str, dict[str, float]]:
    """Evaluate both models on held-out problems with the same random draws; print table and samples, plot curves."""
    rows = list(load_rows(root / "data" / "prompts_test.jsonl"))
    right = [row["answer"] for row in rows]
    answers = {
        name: _answers(root, folder, config, distributed)
        for name, folder in {"SFT": root / "sft", "GRPO": root / "grpo" / "policy"}.items()
    }
    results = {name: measure(said, right) for name, said in answers.items()}
    if distributed.is_main:
        (root / "results.json").write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
        plot_curves(root / "grpo", root / "curves.png", CURVES)
        print(_table(results, len(rows)))
        for i, row in enumerate(rows[:SHOWN_PROBLEMS]):
            print(f"\n{row['prompt']}{row['answer']}")
            for name, said in answers.items():
                print(f"  {name:<6}{'  '.join(f'{text:<4}' for text in said.sampled[i][:SHOWN_SAMPLES])}")
        print(f"\ncurves: {root / 'curves.png'}   numbers: {root / 'results.json'}, {root / 'grpo' / 'metrics.jsonl'}")
        print(f"try it: echo 47+85= | python -m rlhf.commands.sample {root / 'grpo' / 'policy'}")
    return results


def _answers(root: Path, folder: Path, config: GRPOTrainerConfig, distributed: Distributed) -> Answers:
    tokenizer = load_tokenizer(str(folder))
    policy = load_policy(str(folder)).to(distributed.device)
    engine = InProcessEngine(policy, distributed, completions_at_once=config.generation.completions_at_once)
    rows = load_rows(root / "data" / "prompts_test.jsonl")
    data = PromptDataset.build(rows, tokenizer, max_prompt_tokens=config.max_prompt_tokens)

    def say(number: int, greedy: bool) -> tuple[list[str], list[int]]:
        requests = [
            Request(data[i].ids, Key(config.seed, EVALUATION, 1, slot=i, copy=copy))
            for i in range(len(data))
            for copy in range(number)
        ]
        sampling = config.generation.sampling(end_tokens(policy.lm, tokenizer.eos_token_id), greedy=greedy)
        completions = completions_of(engine, requests, sampling)
        texts = tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)
        return texts, [len(completion.ids) for completion in completions]

    texts, lengths = say(NUM_SAMPLES, greedy=False)
    sampled = [texts[start : start + NUM_SAMPLES] for start in range(0, len(texts), NUM_SAMPLES)]
    return Answers(greedy=say(1, greedy=True)[0], sampled=sampled, lengths=lengths)


def num_right(texts: list[str], right: list[str]) -> int:
    return exact_match(texts, right).count(1.0)


def measure(said: Answers, right: list[str]) -> dict[str, float]:
    """Accuracy of greedy answers, pass@k of sampled ones (k = 1: accuracy), mean completion length in tokens."""
    counts = [(len(texts), num_right(texts, [a] * len(texts))) for texts, a in zip(said.sampled, right, strict=True)]
    return {
        "accuracy_greedy": num_right(said.greedy, right) / len(right),
        **{
            f"pass@{k}": sum(arithmetic.pass_at_k(n, c, k) for n, c in counts) / len(counts)
            for k in (1, 4, NUM_SAMPLES)
        },
        "completion_length": sum(said.lengths) / len(said.lengths),
    }


def _table(results: dict[str, dict[str, float]], num_problems: int) -> str:
    names = {
        "accuracy_greedy": "accuracy, greedy",
        "pass@1": "accuracy, sampled (pass@1)",
        "pass@4": "pass@4",
        f"pass@{NUM_SAMPLES}": f"pass@{NUM_SAMPLES}",
        "completion_length": "completion length, tokens",
    }
    lines = [f"\n{f'{num_problems} held-out problems':<34}{'SFT':>10}{'GRPO':>10}"]
    for key, name in names.items():
        before, after = (
            f"{results[model][key]:.2f}" if key == "completion_length" else f"{results[model][key]:.1%}"
            for model in ("SFT", "GRPO")
        )
        lines.append(f"{name:<34}{before:>10}{after:>10}")
    return "\n".join(lines)
