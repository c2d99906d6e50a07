"""Which model, data and rewards a command works on: the settings that commands add to those of their trainer."""

from dataclasses import dataclass, field

from rlhf.models.lora import LoRASettings


@dataclass(frozen=True, kw_only=True)
class UserSettings:
    """The user's model, data and rewards. Shared by the recipes that train a policy and by the memory plan."""

    policy: str | None = None
    """Causal LM to train, a directory or hub name; null runs the embedded pipeline."""
    tokenizer: str | None = None
    """Tokenizer, a directory or hub name; null takes the policy's."""
    dataset: str | None = None
    """Prompts: a JSON-lines, parquet or CSV file, a directory, or a hub name; with a column "prompt" or "messages"."""
    eval_dataset: str | None = None
    """Held-out prompts to evaluate on, in the same forms as `dataset`."""
    dataset_split: str = "train"
    """Split of `dataset` to train on, or a slice of one, such as train[:1000]."""
    eval_split: str = "train"
    """Split of `eval_dataset` to evaluate on, or a slice of one."""
    prompt_column: str = "prompt"
    """Column that holds the prompts. If it is not "prompt", texts become a user turn when the tokenizer has a chat
    template, and conversations lose a final assistant turn. The other columns are passed to the reward functions."""
    system_prompt: str | None = None
    """System turn to put before each prompt, in place of its own. Each prompt becomes a conversation, so the tokenizer
    needs a chat template."""
    lora: LoRASettings = field(default_factory=LoRASettings)
    reward_model: str | None = None
    """Sequence classifier with one label, a directory or hub name."""
    reward: list[str] = field(default_factory=list)
    """Reward functions, as file.py:name or module:name."""
    resume: bool | str = False
    """Continue from the newest checkpoint in output_dir (true), or from the checkpoint at a path."""
    overwrite: bool = False
    """Replace what output_dir already holds."""
