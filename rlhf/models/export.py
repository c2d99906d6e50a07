"""What a run hands out in the end: the policy as stock transformers loads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from rlhf.errors import TrainingError
from rlhf.models.policy import Policy
from rlhf.runs.files import written_beside
from rlhf.training.weights import named_tensors


def save_policy(policy: Policy, tokenizer: Any, final: Path) -> None:
    """Writes the folder `final`, whole or not at all: model, tokenizer, and the value head beside them.

    What was written is opened again and compared with the policy, bit for bit: TrainingError if it is another one.
    """
    with written_beside(final) as temporary, _no_bars():
        policy.lm.save_pretrained(temporary, state_dict=_apart(policy.lm))
        tokenizer.save_pretrained(temporary)
        if policy.value_head is not None:
            save_file(named_tensors(policy.value_head), temporary / "value_head.safetensors")
        check_export(policy.lm, temporary)


def check_export(lm: PreTrainedModel, folder: Path) -> None:
    """TrainingError if `folder` does not load as the very weights of `lm`; it needs memory for a second copy of them."""
    reopened = type(lm).from_pretrained(folder, dtype=lm.dtype).state_dict()
    other = [name for name, tensor in lm.state_dict().items() if not _equal(tensor, reopened.get(name))]
    if other:
        raise TrainingError(
            f"{folder} does not load as the policy that was trained: {', '.join(other[:3])} came back with other numbers "
            f"({len(other)} tensors in all). The run's last checkpoint holds the right ones. Look for weights that are "
            "shared or changed outside of the model's configuration."
        )


def _apart(lm: PreTrainedModel) -> dict[str, Tensor] | None:
    """The weights with a shared embedding written twice, if the configuration says that it is not shared: transformers
    would write it once and load the other one anew. None: as usual."""
    embeddings = lm.get_output_embeddings(), lm.get_input_embeddings()
    shared = all(e is not None for e in embeddings) and embeddings[0].weight is embeddings[1].weight
    if not shared or lm.config.get_text_config().tie_word_embeddings:
        return None
    return {name: tensor.detach().clone() for name, tensor in lm.state_dict().items()}


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and other.dtype == tensor.dtype and torch.equal(tensor.cpu(), other)


@contextmanager
def _no_bars() -> Iterator[None]:
    """No bars for single files: the run has its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
