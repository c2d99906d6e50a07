"""Helpers that the embedded tasks share: tokenizer, small model, JSON-lines files, supervised fine-tuning."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import torch
import transformers
from sft import SFTConfig, fine_tune
from supervised import Inputs
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.data.rows import load_rows
from rlhf.errors import InputError
from rlhf.runs.files import written_beside

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


def token_ids(words: Sequence[str]) -> dict[str, int]:
    """Token -> id: the four special tokens, then the words."""
    return {token: index for index, token in enumerate([*SPECIALS, *words])}


def wrapped(core: Tokenizer, *, max_tokens: int) -> PreTrainedTokenizerFast:
    """Wrap `core`, whose vocabulary comes from `token_ids`, as a tokenizer of transformers."""
    pad, bos, eos, unknown = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        padding_side="left",
        model_max_length=max_tokens,
    )


def small_llama(tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, num_layers: int) -> LlamaConfig:
    """A causal Llama with four heads, for the tokenizer's vocabulary and length."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        initializer_range=hidden_size**-0.5,  # the usual 0.02 is for wide models and learns slowly here
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def check_empty(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"folder {folder} is not empty. Name another one, or delete it.")


def write_files(folder: Path, files: Mapping[str, Sequence[Mapping[str, str]]]) -> dict[str, Path]:
    """Write rows as `folder/NAME.jsonl` and return the paths; `folder` is renamed into place once it is complete."""
    with written_beside(folder) as partial:
        partial.mkdir(parents=True)
        for name, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (partial / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in files}


def be_quick_and_quiet() -> None:
    """Use one thread (two are slower on models this small) and hide the progress bars of loading and saving."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def train_sft(task: ModuleType | Any, data: Path, folder: Path, seed: int) -> None:
    """Fine-tune a new model of `task` (`embedded` or `arithmetic`) on `data`'s demonstrations; save it to `folder`."""
    torch.manual_seed(seed)  # the only global randomness: the initial weights
    model = LlamaForCausalLM(task.model_config())
    settings = SFTConfig(
        model="(made from a config)",
        dataset=str(data / "sft.jsonl"),
        output_dir=str(folder),
        seed=seed,
        **task.SFT_SETTINGS,
    )
    inputs = Inputs(task.tokenizer(), load_rows(settings.dataset), load_rows(data / "sft_test.jsonl"))
    fine_tune(model, inputs, settings)
