"""Facts of public models, from their config.json, so that plans for them can be made without a download."""

import json
from pathlib import Path
from typing import Any

_QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "max_position_embeddings": 32768,
    "dtype": "bfloat16",
}
_NEOX = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": 50304, "dtype": "float32"}


def _qwen(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, shared: int, *, tied: bool
) -> dict[str, Any]:
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return _QWEN | sizes | {"num_attention_heads": heads, "num_key_value_heads": shared, "tie_word_embeddings": tied}


def _pythia(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    return _NEOX | sizes | {"num_attention_heads": heads, "max_position_embeddings": 2048, "tie_word_embeddings": False}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": _qwen(151936, 896, 4864, 24, 14, 2, tied=True),
    "Qwen2.5-1.5B": _qwen(151936, 1536, 8960, 28, 12, 2, tied=True),
    "Qwen2.5-Math-1.5B": _qwen(151936, 1536, 8960, 28, 12, 2, tied=True),
    "Qwen2.5-7B": _qwen(152064, 3584, 18944, 28, 28, 4, tied=False),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-2.8b": _pythia(2560, 32, 32),
}
PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "pythia-1b": 1_011_781_632,
    "pythia-2.8b": 2_775_208_960,
}
"""As their model cards and checkpoints say."""


def folder_of(name: str, parent: Path) -> str:
    """A folder with the config.json of the architecture whose name occurs in `name`."""
    (known,) = (known for known in ARCHITECTURES if known in name)
    folder = parent / known
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(ARCHITECTURES[known]))
    return str(folder)
