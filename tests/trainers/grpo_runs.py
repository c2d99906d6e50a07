"""Short GRPO runs on tiny models, with rewards that are known."""

import json
from pathlib import Path

from rlhf import GenerationConfig, GRPOConfig, GRPOTrainer, GRPOTrainerConfig, UpdateConfig
from tests import tiny
from tests.trainers.test_interruption import STEPS

PROMPTS = ["ab", "c", "defgh", "gha", "bbbbbbb", "hg", "fed"]


def verdict(completions, target, **_):
    """Right if the target letter occurs."""
    return [float(letter in text) for text, letter in zip(completions, target, strict=True)]


def shape(completions, **_):
    """Differs within nearly every group."""
    return [0.01 * len(text) for text in completions]


class Recorded:
    """`function`, and the prompts, tokens and scores of every call."""

    def __init__(self, function=verdict) -> None:
        self.function, self.__name__ = function, function.__name__
        self.calls: list[list[tuple[str, tuple[int, ...], float | None]]] = []

    def __call__(self, prompts, completion_ids, **columns):
        scores = self.function(**columns)
        self.calls.append([*zip(prompts, map(tuple, completion_ids), scores, strict=True)])
        return scores

    @property
    def rows(self):
        return [row for call in self.calls for row in call]


def make_trainer(
    output_dir,
    *,
    rewards=(verdict, shape),
    lm=None,
    dataset=None,
    callbacks=(),
    eval_dataset=None,
    peft_config=None,
    **changes,
):
    """4 steps of 3 prompts x 4 completions, up to 3 rounds of sampling, 4 optimizer steps each."""
    groups = {
        "grpo": {"completions_per_prompt": 4, "dynamic_sampling_rounds": 3, "kl_coef": 0.05, "entropy_coef": 0.01},
        "update": {"num_epochs": 2, "minibatch_size": 6},
        "generation": {"max_new_tokens": 4},
    }
    groups = {name: group | changes.pop(name, {}) for name, group in groups.items()}
    settings = {
        "total_steps": STEPS,
        "prompts_per_step": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "checkpoint_every": 1,
    }
    return GRPOTrainer(
        tiny.causal_lm(num_hidden_layers=1) if lm is None else lm,
        list(rewards),
        tiny.rows(PROMPTS) if dataset is None else dataset,
        GRPOTrainerConfig(
            output_dir=str(output_dir),
            grpo=GRPOConfig(**groups["grpo"]),
            update=UpdateConfig(**groups["update"]),
            generation=GenerationConfig(**groups["generation"]),
            **(settings | changes),
        ),
        tokenizer=tiny.tokenizer(),
        callbacks=callbacks,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )


def make_whole(output_dir, **changes):
    """The run that tests/trainers/test_grpo_resume.py interrupts: with evaluations too."""
    return make_trainer(output_dir, **{"eval_dataset": tiny.rows(["abc", "hh"]), "eval_every": 2, **changes})


ONE_UPDATE = {"num_epochs": 1, "minibatch_size": None}


PLAIN = {"dynamic_sampling_rounds": 1, "kl_coef": 0.0, "entropy_coef": 0.0}


def lines_of(output_dir: Path, name: str = "completions.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output_dir / name).read_text().splitlines()]
