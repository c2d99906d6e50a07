"""What a run hands out in the end: the policy as stock transformers loads it."""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from rlhf.models.policy import Policy
from rlhf.runs.checkpoint import flush_directory
from rlhf.training.weights import named_tensors


def save_policy(policy: Policy, tokenizer: Any, final: Path) -> None:
    """Writes the folder `final`, whole or not at all: model, tokenizer, and the value head beside them."""
    temporary = final.with_name(f"{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    policy.lm.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if policy.value_head is not None:
        save_file(named_tensors(policy.value_head), temporary / "value_head.safetensors")
    flush_directory(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
