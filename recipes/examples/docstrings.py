"""Makes a small chat model and its data from English text on every machine: the docstrings of the standard library.

    python recipes/examples/docstrings.py runs/docs

writes runs/docs/model (an untrained Qwen3 model and its tokenizer with a chat template), runs/docs/chats.jsonl
(questions and answers for recipes/sft.py) and runs/docs/prompts.jsonl (questions for recipes/ppo_rlhf.py).
"""

import importlib
import inspect
import json
import pkgutil
import random
import re
import sys
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SKIPPED = {
    "antigravity",
    "this",
    "idlelib",
    "lib2to3",
    "test",
    "turtledemo",
    "tkinter",
    "turtle",
    "pydoc_data",
    "msilib",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def documented() -> dict[str, str]:
    """Public names of the standard library -> first paragraph of their docstring, if it has 20 to 240 characters."""
    found: dict[str, str] = {}
    names = [m.name for m in pkgutil.iter_modules() if m.name in sys.stdlib_module_names and not m.name.startswith("_")]
    for module_name in sorted(set(names) - SKIPPED):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(module_name)
        except Exception:  # a module for another platform
            continue
        for name, value in inspect.getmembers(module):
            if not name.startswith("_") and getattr(value, "__module__", None) == module_name:
                found[f"{module_name}.{name}"] = _first_paragraph(value)
                if inspect.isclass(value):
                    methods = inspect.getmembers(value, inspect.isfunction)
                    found |= {f"{module_name}.{name}.{m}": _first_paragraph(f) for m, f in methods if m[0] != "_"}
    return {name: text for name, text in found.items() if 20 <= len(text) <= 240}


def _first_paragraph(value: object) -> str:
    text = inspect.getdoc(value) or ""
    return re.sub(r"\s+", " ", text.split("\n\n")[0]).strip()


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 2,000 tokens; padding, start of turn and end of turn (the EOS) are three different ones."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2000,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def main(folder: Path) -> None:
    answers = documented()
    draw = random.Random(0)
    questions = {name: draw.choice(["What is {}?", "What does {} do?", "Explain {}."]).format(name) for name in answers}
    tokenizer = make_tokenizer([*answers.values(), *questions.values()])
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.06,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    chats = [_chat(questions[name], answer) for name, answer in answers.items()]
    _write(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    _write(folder / "prompts.jsonl", [{"prompt": chat[:1]} for chat in draw.sample(chats, 1000)])
    print(f"{len(chats)} questions and answers, {sum(p.numel() for p in model.parameters()):,} parameters -> {folder}")


def _chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/docs"))
