"""Add an exported adapter to its base: `python -m rlhf.commands.merge runs/x/policy runs/x/merged`.

The result loads with stock transformers, and in engines that know no adapters.
"""

import argparse
from pathlib import Path

import transformers

from rlhf.commands.cli import guard
from rlhf.errors import InputError
from rlhf.models.export import save_merged
from rlhf.models.loading import is_adapter, load_tokenizer
from rlhf.models.policy import load_policy


def merge(adapter: str, output: str) -> None:
    """Write the base of `adapter`, with the adapter added to it in float32, and the tokenizer, to the folder `output`."""
    if not is_adapter(adapter):
        raise InputError(f"{adapter!r} holds no adapter: give a folder with adapter_config.json, as lora.r leaves.")
    final = Path(output)
    if final.exists():
        raise InputError(f"{output!r} exists already. Name another folder.")
    policy = load_policy(adapter, setting="adapter")
    final.parent.mkdir(parents=True, exist_ok=True)
    save_merged(policy, load_tokenizer(adapter, setting="adapter"), final)


@guard()
def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="python -m rlhf.commands.merge", description="Add an adapter to its base.")
    parser.add_argument("adapter", help="folder of the adapter, such as OUTPUT_DIR/policy")
    parser.add_argument("output", help="folder to write; must not exist")
    arguments = parser.parse_args()
    merge(arguments.adapter, arguments.output)
    print(f"{arguments.output}: the model with the adapter added to it")


if __name__ == "__main__":
    main()
