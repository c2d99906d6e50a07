"""Loads language models and tokenizers, with clear error messages."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from rlhf.errors import InputError

ADAPTER_FILE = "adapter_config.json"
"""The file by which a folder is known to hold an adapter."""


def load_tokenizer(path: str, *, setting: str = "tokenizer") -> PreTrainedTokenizerBase:
    return load_model(AutoTokenizer, path, setting)


def load_causal_lm(path: str, *, setting: str = "policy", dtype: torch.dtype = torch.float32) -> Any:
    """A causal LM, or a `PeftModel` if the path is that of an adapter, whose base is then loaded too.

    dtype: of the weights; for an adapter, of its base. Weights that are trained must be float32: updates of 1e-6 vanish
    in bfloat16. Set the trainer's precision for faster arithmetic.
    """
    if not is_adapter(path):
        return load_model(AutoModelForCausalLM, path, setting, dtype=dtype)
    from peft import PeftModel

    base = load_model(AutoModelForCausalLM, base_of(path, setting), f"{setting} (base of {path})", dtype=dtype)
    loader = _Loader(lambda found, **_: PeftModel.from_pretrained(base, found, is_trainable=True))
    with adapter_loading():
        return load_model(loader, path, setting)


@contextmanager
def adapter_loading() -> Iterator[None]:
    """Context in which peft loads an adapter: it draws weights before it reads them, and warns of nothing that matters."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")  # a matter between peft and transformers
        yield


def load_classifier(path: str, setting: str, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A sequence classifier with one label. The head of a causal LM is new, and no message says so."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return load_model(AutoModelForSequenceClassification, path, setting, num_labels=1, dtype=dtype or torch.float32)
    finally:
        logging.set_verbosity(level)


def is_adapter(path: str) -> bool:
    """Whether the folder `path` holds an adapter instead of a model."""
    return (Path(path).expanduser() / ADAPTER_FILE).is_file()


def base_of(path: str, setting: str) -> str:
    """The path or hub name of the model that the adapter at `path` was trained on."""
    from peft import PeftConfig

    base = load_model(
        _Loader(lambda found, **_: PeftConfig.from_pretrained(found)), path, setting
    ).base_model_name_or_path
    if not base:
        raise InputError(
            f"{setting}: {path}/{ADAPTER_FILE} does not name its base. Write base_model_name_or_path into it, or load the "
            "adapter in Python and pass the PeftModel."
        )
    return str(base)


class _Loader:
    """A function in the form of a class with `from_pretrained`, as `load_model` takes it."""

    def __init__(self, from_pretrained: Any) -> None:
        self.from_pretrained = from_pretrained


def load_model(loader: Any, path: str, setting: str, **options: Any) -> Any:
    """`loader.from_pretrained(path)`, with an InputError that names `setting` if there is no such model."""
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).expanduser().is_dir():
        raise InputError(
            f"{setting}: there is no directory {path!r}. Give a directory saved by save_pretrained or a hub name."
        )
    try:
        found = str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path
        return from_pretrained(loader, found, setting, **options)
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{setting}: cannot load {path!r} ({reason}). Give a directory saved by save_pretrained or a hub name."
        ) from error


def from_pretrained(loader: Any, path: str | Path, setting: str, **options: Any) -> Any:
    """`loader.from_pretrained`, without running code shipped with a model (transformers would ask on standard input for
    permission). Raises InputError if the model needs such code."""
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise InputError(
            f"{setting}: {str(path)!r} needs Python code of its own, which is never run unasked. Read it; if you trust "
            f"it, load the model in Python with trust_remote_code=True and pass the object as {setting}."
        ) from error


def check_vocabulary(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that every token of the tokenizer has an embedding."""
    size = vocabulary_size(lm)
    if len(tokenizer) > size:
        raise InputError(
            f"tokenizer: it has {len(tokenizer)} tokens, but the policy embeds only {size}. Use the policy's own "
            "tokenizer, or call policy.resize_token_embeddings(len(tokenizer)) before training."
        )


def vocabulary_size(lm: PreTrainedModel) -> int:
    """How many tokens the model embeds."""
    return len(lm.get_input_embeddings().weight)  # type: ignore[arg-type]  # an adapted one has no num_embeddings


def check_precision(lm: PreTrainedModel, *, setting: str = "policy") -> None:
    """Check that the trained weights are float32 or wider."""
    narrow = sorted({str(p.dtype) for p in lm.parameters() if p.requires_grad and p.dtype.itemsize < 4})
    if narrow:
        raise InputError(
            f"{setting}: its weights are {', '.join(narrow)}, in which small updates vanish. Load it in float32, or call "
            f'{setting}.float(); precision="bfloat16" still computes in bfloat16.'
        )


def end_tokens(lm: PreTrainedModel, tokenizer_eos: int | None) -> list[int]:
    """The token ids that end a completion: the tokenizer's and those of the model's generation settings."""
    configured = getattr(lm.generation_config, "eos_token_id", None) if lm.generation_config is not None else None
    candidates = [*(configured if isinstance(configured, list) else [configured]), tokenizer_eos]
    ids = {i for i in candidates if i is not None}
    if not ids:
        raise InputError(
            "tokenizer: it has no end-of-sequence token, so completions could never end. Set tokenizer.eos_token."
        )
    return sorted(ids)
