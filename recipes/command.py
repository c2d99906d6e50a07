"""What the commands that train a policy share: the user's model, data and rewards as settings, and their checks."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import load_rows, prompt_rows
from rlhf.errors import InputError
from rlhf.models.loading import load_tokenizer
from rlhf.rewards.calls import isolated
from rlhf.rewards.functions import load_reward_function
from rlhf.trainers.config import TrainerConfig

EMBEDDED_TAKES = ("policy", "resume", "overwrite", "preset")
"""What also makes sense without a model of the user's, besides the trainer's settings."""


@dataclass(frozen=True, kw_only=True)
class UserRun:
    """Settings that a command adds to its trainer's: what to train on what. Inherit from this first, then from those."""

    trainer_config: ClassVar[type[TrainerConfig]]

    policy: str | None = None
    """Causal LM to train, a directory or hub name; null runs the embedded pipeline."""
    tokenizer: str | None = None
    """Its tokenizer; null takes the policy's."""
    dataset: str | None = None
    """Prompts: a JSON-lines, parquet or CSV file, a directory, or a hub name; a column "prompt" or "messages"."""
    eval_dataset: str | None = None
    """Held-out prompts."""
    dataset_split: str = "train"
    """Part of `dataset` to train on; also a slice, such as train[:1000]."""
    eval_split: str = "train"
    """Part of `eval_dataset` to evaluate on."""
    prompt_column: str = "prompt"
    """Column that holds the prompts. Under another name than "prompt", texts become a user's turn if the tokenizer has a
    chat template, and conversations lose a final assistant turn. The other columns reach the reward functions."""
    system_prompt: str | None = None
    """System turn before each prompt (in place of its own), which makes it a conversation: the tokenizer needs a chat
    template."""
    reward_model: str | None = None
    """Sequence classifier with one label, a directory or hub name."""
    reward: list[str] = field(default_factory=list)
    """Reward functions, as file.py:name or module:name."""
    resume: bool | str = False
    """Continue from the newest checkpoint in output_dir (true), or from the checkpoint at a path."""
    overwrite: bool = False
    """Replace what output_dir already holds."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # the trainer's settings, next in the order of inheritance
        if self.policy is not None:
            if self.dataset is None:
                raise InputError("dataset: name the prompts to train on (a file, a directory or a hub name).")
            if self.reward_model is None and not self.reward:
                raise InputError(
                    "reward_model and reward are both missing: name at least one, such as --reward file.py:name."
                )
            return
        trained = {f.name for f in fields(self.trainer_config)} - {"reward_weights"}
        for f in fields(self):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if f.name not in {*trained, *EMBEDDED_TAKES} and getattr(self, f.name) != default:
                raise InputError(
                    f"{f.name} is set but policy is not: name the model to train, or leave both out for the embedded data."
                )

    def training(self, **changes: Any) -> Any:
        """The trainer's own settings, without what the command adds."""
        kind = self.trainer_config
        return kind(**{f.name: getattr(self, f.name) for f in fields(kind)} | changes)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that is named, or the policy's."""
        assert self.policy is not None, "without a policy the embedded pipeline runs"
        return load_tokenizer(self.tokenizer or self.policy, setting="tokenizer" if self.tokenizer else "policy")

    def rows(self, setting: str, tokenizer: Any) -> Dataset | None:
        """The rows of `dataset` or `eval_dataset`, their prompts in the column "prompt"."""
        name = getattr(self, setting)
        if name is None:
            return None
        rows = load_rows(name, self.dataset_split if setting == "dataset" else self.eval_split, setting=setting)
        chat = self.prompt_column != "prompt" and bool(tokenizer.chat_template)
        return prompt_rows(rows, self.prompt_column, self.system_prompt, chat=chat, setting=setting)

    def rewards(self) -> list[str | Callable[..., Any]]:
        """What the trainer takes: the reward model's path, if there is one, and the loaded functions."""
        models = [self.reward_model] if self.reward_model else []
        return [*models, *map(_reward_function, self.reward)]


def _reward_function(name: str) -> Callable[..., Any]:
    """In a process of its own, where it can neither hang nor end the run."""
    return isolated(load_reward_function(name, "reward"))


def embedded_by_default(arguments: list[str], config_file: str) -> list[str]:
    """Without a policy or settings of the user's, those of the embedded task: arguments to put before the user's."""
    named = any(a.split("=")[0] in ("--policy", "--config", "--help", "-h", "--print_config") for a in arguments)
    return [] if named else [f"--config={Path(__file__).parent / 'configs' / config_file}"]


def say_where(policy: Path) -> None:
    """The last line of a command that trained."""
    print(f"the trained policy is in {policy}; try it: python -m rlhf.commands.sample {policy}")
