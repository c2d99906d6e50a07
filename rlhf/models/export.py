"""Exports the trained policy in a form that stock transformers loads."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from rlhf.errors import TrainingError
from rlhf.lifeline import phase
from rlhf.models.policy import Policy
from rlhf.runs.files import written_beside
from rlhf.training.weights import named_tensors


@phase("export")
def save_policy(policy: Policy, tokenizer: Any, final: Path) -> None:
    """Write model, tokenizer and value head to the folder `final`, completely or not at all.

    The folder is loaded again and compared with the policy, number by number; raises TrainingError if they differ.
    """
    with written_beside(final) as temporary, _no_bars():
        policy.lm.save_pretrained(temporary, state_dict=_rewritten(policy.lm))
        _declare(temporary, _widest(policy.lm))
        tokenizer.save_pretrained(temporary)
        if policy.value_head is not None:
            save_file(named_tensors(policy.value_head), temporary / "value_head.safetensors")
        check_export(policy.lm, temporary)


def check_export(lm: PreTrainedModel, folder: Path) -> None:
    """Raise TrainingError if `folder` does not load as the weights of `lm`. Needs memory for a second copy of them."""
    reopened = type(lm).from_pretrained(folder, dtype="auto").state_dict()
    other = [name for name, tensor in lm.state_dict().items() if not _equal(tensor, reopened.get(name))]
    if other:
        raise TrainingError(
            f"{folder} does not load as the policy that was trained: {', '.join(other[:3])} differ when loaded "
            f"({len(other)} tensors in all). The run's last checkpoint holds the trained weights. Look for weights that "
            "the model shares or changes in a way that its configuration does not record."
        )


def _rewritten(lm: PreTrainedModel) -> dict[str, Tensor] | None:
    """The weights to write, where those of the model as they are would load as others; None: save as usual.

    A shared embedding is written twice if the configuration says that it is not shared: transformers would write it once
    and initialise the other one randomly on loading. Weights of several precisions (frozen bfloat16 beside trained
    float32) are written in the widest, since transformers loads all of them in one.
    """
    embeddings = lm.get_output_embeddings(), lm.get_input_embeddings()
    shared = all(e is not None for e in embeddings) and embeddings[0].weight is embeddings[1].weight
    apart = shared and not lm.config.get_text_config().tie_word_embeddings
    widest = _widest(lm)
    state = lm.state_dict()
    mixed = any(t.dtype != widest for t in state.values() if t.is_floating_point())
    if not apart and not mixed:
        return None
    if apart:
        state = {name: tensor.clone() for name, tensor in state.items()}
    written: dict[tuple[int, torch.Size], Tensor] = {}  # tensors that are one stay one
    for name, tensor in state.items():
        wide = tensor.to(widest) if tensor.is_floating_point() else tensor
        state[name] = written.setdefault((tensor.data_ptr(), tensor.shape), wide)
    return state


def _widest(lm: PreTrainedModel) -> torch.dtype:
    return reduce(torch.promote_types, {t.dtype for t in lm.state_dict().values() if t.is_floating_point()})


def _declare(folder: Path, dtype: torch.dtype) -> None:
    """Let the saved configuration name this dtype: transformers writes that of the first weight."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    name = str(dtype).removeprefix("torch.")
    if config.get("dtype") != name:
        file.write_text(json.dumps(config | {"dtype": name}, indent=2, sort_keys=True) + "\n")


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    """The same numbers; `other` may hold them in a wider type."""
    if other is None or other.shape != tensor.shape:
        return False
    return other.dtype == torch.promote_types(other.dtype, tensor.dtype) and torch.equal(
        tensor.cpu().to(other.dtype), other
    )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the progress bars of transformers, since the run has its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
