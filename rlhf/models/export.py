"""Exports the trained policy in a form that stock transformers, or peft, loads."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from rlhf.errors import TrainingError
from rlhf.lifeline import phase
from rlhf.models.adapters import adapter_of
from rlhf.models.policy import Policy
from rlhf.runs.files import disk_errors, written_beside

Whole = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Gathers complete tensors on the process that writes, see `Layout.whole`."""


@phase("export")
def save_policy(policy: Policy, tokenizer: Any, final: Path, *, whole: Whole = dict, writes: bool = True) -> None:
    """Write the model (or its adapter, as peft does), tokenizer and critic to the folder `final`, completely or not at
    all. All processes call it; the one with `writes` writes.

    The folder is read again and compared with the policy, number by number; raises TrainingError if they differ, or if
    it cannot be written.
    """
    state = policy.lm.state_dict()
    if policy.adapters is not None:  # the base stays where it is
        state = {name: tensor for name, tensor in state.items() if adapter_of(name) is not None}
    state = whole(state)
    critic = whole({} if policy.critic is None else policy.critic.state_dict())
    if not writes:
        return
    with _writing(final) as temporary:
        if policy.adapters is None:
            write_model(policy.lm, state, temporary)
        else:
            policy.adapters.save(temporary, state)
            _check_adapter(state, temporary)
        tokenizer.save_pretrained(temporary)
        if policy.critic is not None:
            policy.critic.save(temporary, critic | {f"lm.{name}": tensor for name, tensor in state.items()}, tokenizer)


def save_merged(policy: Policy, tokenizer: Any, final: Path, *, whole: Whole = dict, writes: bool = True) -> None:
    """Write the base with the adapter added to it, as stock transformers loads it, else as `save_policy`.

    The live weights are not touched, since merging and unmerging would not restore every bit.
    """
    assert policy.adapters is not None, "the policy has no adapters to merge"
    state = whole(policy.lm.state_dict())
    if not writes:
        return
    with _writing(final) as temporary:
        write_model(policy.lm, policy.adapters.merged(state), temporary)
        tokenizer.save_pretrained(temporary)


def write_model(lm: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights `state` with the configuration of `lm` to `folder`, and check what was written."""
    state = dict(state)
    tied = _tie(lm, state)
    written = _widened(state)
    lm.save_pretrained(folder, state_dict=written)
    _declare(folder, _widest(state), tied)
    check_export(lm, folder, state)


def check_export(lm: PreTrainedModel, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Raise TrainingError if `folder` does not load as the weights `state`. Needs memory for a second copy of them."""
    _compare(state, type(lm).from_pretrained(folder, dtype="auto").state_dict(), folder)


def _check_adapter(state: Mapping[str, Tensor], folder: Path) -> None:
    written = load_file(folder / "adapter_model.safetensors")
    plain = {name.replace(".default", ""): tensor for name, tensor in state.items() if adapter_of(name) == "default"}
    short = {name.removeprefix("base_model.model."): tensor for name, tensor in written.items()}
    _compare(plain, {name: short.get(name, short.get(name.replace(".modules_to_save", ""))) for name in plain}, folder)


def _compare(state: Mapping[str, Tensor], reopened: Mapping[str, Tensor | None], folder: Path) -> None:
    other = [name for name, tensor in state.items() if not _equal(tensor, reopened.get(name))]
    if other:
        raise TrainingError(
            f"{folder} does not load as the policy that was trained: {', '.join(other[:3])} differ when loaded "
            f"({len(other)} tensors in all). The run's last checkpoint holds the trained weights. Look for weights that "
            "the model shares or changes in a way that its configuration does not record."
        )


def _tie(lm: PreTrainedModel, state: dict[str, Tensor]) -> bool | None:
    """Make one tensor of each pair of tied weights, or two if the configuration does not tie them. Returns what the
    configuration must say; None: as it does."""
    configured = bool(lm.config.get_text_config().tie_word_embeddings)
    tied = getattr(lm, "_tied_weights_keys", None) or {}
    pairs = [(a, b) for a, b in tied.items() if a in state and b in state] if isinstance(tied, Mapping) else []
    for target, source in pairs:
        if configured and not torch.equal(state[target], state[source]):
            return False  # trained apart: transformers would tie them again
        state[target] = state[source] if configured else state[target].clone()
    return None


def _widened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of several precisions (frozen bfloat16 beside trained float32) in the widest of them, since transformers
    loads all in one. Tensors that are one stay one."""
    widest = _widest(state)
    written: dict[tuple[int, torch.Size], Tensor] = {}
    return {
        name: written.setdefault(
            (tensor.data_ptr(), tensor.shape), tensor.to(widest) if tensor.is_floating_point() else tensor
        ).contiguous()
        for name, tensor in state.items()
    }


def _widest(state: Mapping[str, Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, {t.dtype for t in state.values() if t.is_floating_point()})


def _declare(folder: Path, dtype: torch.dtype, tied: bool | None) -> None:
    """Let the saved configuration name this dtype (transformers writes that of the first weight), and what is tied."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    said = {"dtype": str(dtype).removeprefix("torch.")} | ({} if tied is None else {"tie_word_embeddings": tied})
    if not said.items() <= config.items():
        file.write_text(json.dumps(config | said, indent=2, sort_keys=True) + "\n")


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    """The same numbers; `other` may hold them in a wider type."""
    if other is None or other.shape != tensor.shape:
        return False
    return other.dtype == torch.promote_types(other.dtype, tensor.dtype) and torch.equal(
        tensor.cpu().to(other.dtype), other
    )


@contextmanager
def _writing(final: Path) -> Iterator[Path]:
    remedy = "The run's last checkpoint holds the trained policy: free disk space or fix the path, then resume."
    failed = disk_errors(f"{final} was not written", remedy, also=Exception)  # tokenizers raise nothing more exact
    with failed, written_beside(final) as temporary, _no_bars():
        yield temporary


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
