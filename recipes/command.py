"""Settings for the user's model, data and rewards, with their checks; shared by the commands that train a policy."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.commands.user_settings import UserSettings
from rlhf.data.rows import load_rows, prompt_rows
from rlhf.errors import InputError
from rlhf.models.loading import load_tokenizer
from rlhf.rewards.calls import isolated
from rlhf.rewards.functions import load_reward_function
from rlhf.trainers.config import TrainerConfig

EMBEDDED_TAKES = ("policy", "lora", "critic", "resume", "overwrite", "preset")
"""Settings of a command that, besides the trainer's, may be set when `policy` is not (for the embedded task)."""


@dataclass(frozen=True, kw_only=True)
class UserRun(UserSettings):
    """Settings that a command adds to its trainer's: model, data and rewards.

    Inherit from this class first, then from the trainer's settings.
    """

    trainer_config: ClassVar[type[TrainerConfig]]

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # the trainer's settings, next in the order of inheritance
        if self.policy is not None:
            if self.dataset is None:
                raise InputError(
                    "dataset is not set: name the prompts to train on (a file, a directory or a hub name)."
                )
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
        """The trainer's settings, without those that the command adds. changes: values to use instead."""
        kind = self.trainer_config
        return kind(**{f.name: getattr(self, f.name) for f in fields(kind)} | changes)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load `tokenizer` if it is set, else the policy's."""
        assert self.policy is not None, "without a policy the embedded pipeline runs"
        return load_tokenizer(self.tokenizer or self.policy, setting="tokenizer" if self.tokenizer else "policy")

    def rows(self, setting: str, tokenizer: Any) -> Dataset | None:
        """The rows of `dataset` or `eval_dataset`, with the prompts in the column "prompt"; None if it is not set."""
        name = getattr(self, setting)
        if name is None:
            return None
        rows = load_rows(name, self.dataset_split if setting == "dataset" else self.eval_split, setting=setting)
        chat = self.prompt_column != "prompt" and bool(tokenizer.chat_template)
        return prompt_rows(rows, self.prompt_column, self.system_prompt, chat=chat, setting=setting)

    def rewards(self) -> list[str | Callable[..., Any]]:
        """The trainer's `rewards` argument: the reward model's path, if there is one, and the loaded functions."""
        models = [self.reward_model] if self.reward_model else []
        return [*models, *map(_reward_function, self.reward)]


def _reward_function(name: str) -> Callable[..., Any]:
    """Load a reward function to run in its own process, where it can neither hang nor end the run."""
    return isolated(load_reward_function(name, "reward"))


def embedded_by_default(arguments: list[str], config_file: str) -> list[str]:
    """Arguments to put before the user's: the embedded task's config, unless the user names a policy or a config."""
    named = any(a.split("=")[0] in ("--policy", "--config", "--help", "-h", "--print_config") for a in arguments)
    return [] if named else [f"--config={Path(__file__).parent / 'configs' / config_file}"]


def say_where(policy: Path) -> None:
    """Print where the trained policy is, as the last line of a command."""
    print(f"the trained policy is in {policy}; try it: python -m rlhf.commands.sample {policy}")
