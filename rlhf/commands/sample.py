"""Samples completions of typed prompts: `python -m rlhf.commands.sample MODEL`, a directory or hub name."""

import argparse
import sys
from collections.abc import Iterator

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.commands.cli import guard
from rlhf.core.random import SAMPLING
from rlhf.data.prompts import PromptDataset
from rlhf.data.rows import ListRows
from rlhf.distributed import Distributed
from rlhf.errors import InputError
from rlhf.models.adapters import adapted
from rlhf.models.loading import end_tokens, load_causal_lm, load_tokenizer
from rlhf.models.policy import Policy
from rlhf.rollout.engine import Completion, GenerationConfig, Key, Request, completions_of
from rlhf.rollout.in_process import InProcessEngine


def complete(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, str]],
    config: GenerationConfig,
    *,
    num_completions: int,
    seed: int,
    turn: int = 0,
    greedy: bool = False,
) -> list[Completion]:
    """Completions of one prompt.

    Args:
        prompt: plain text, or a conversation as a list of messages.
        config: length limit and temperature.
        seed: with `turn`, decides the random draws: equal seeds and turns give equal completions.
        turn: number of the prompt within a session.
        greedy: take the likeliest token each time, whatever the temperature.
    """
    lm, adapters = adapted(lm)
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", 2**20) - config.max_new_tokens
    if limit < 1:
        raise InputError(f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt. Lower it.")
    data = PromptDataset.build(
        ListRows([{"prompt": prompt}], "prompt"), tokenizer, max_prompt_tokens=limit, setting="prompt"
    )
    distributed = Distributed()
    engine = InProcessEngine(Policy(lm, adapters=adapters).to(distributed.device), distributed)
    requests = [Request(data[0].ids, Key(seed, SAMPLING, turn, 0, copy)) for copy in range(num_completions)]
    sampling = config.sampling(end_tokens(lm, tokenizer.eos_token_id), greedy=greedy)
    return completions_of(engine, requests, sampling)


def _prompts(interactive: bool) -> Iterator[str]:
    """Lines of standard input, up to its end or an empty line."""
    while True:
        try:
            line = input("prompt> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            return
        yield line


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.commands.sample", description="Type a prompt, see completions."
    )
    parser.add_argument("model", help="directory or hub name of a causal LM")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--num_completions", type=int, default=3)
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token each time; one completion")
    parser.add_argument(
        "--chat", action="store_true", help="send the prompt as a user message, through the chat template"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@guard()
def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    arguments = _arguments()
    if arguments.num_completions < 1 or not 0 <= arguments.seed < 2**32:
        raise InputError("num_completions must be at least 1, and seed in [0, 2**32).")
    config = GenerationConfig(max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature)
    tokenizer = load_tokenizer(arguments.model, setting="model")
    lm = load_causal_lm(arguments.model, setting="model")
    lm.eval()
    interactive = sys.stdin.isatty()
    if interactive:
        print("An empty line ends the session.")
    for turn, line in enumerate(_prompts(interactive)):
        completions = complete(
            lm,
            tokenizer,
            [{"role": "user", "content": line}] if arguments.chat else line,
            config,
            num_completions=1 if arguments.greedy else arguments.num_completions,
            seed=arguments.seed,
            turn=turn,
            greedy=arguments.greedy,
        )
        for completion in completions:
            text = tokenizer.decode(completion.ids, skip_special_tokens=True)
            print(f"- {text}{'' if completion.ended == 'stop' else ' [cut by max_new_tokens]'}")


if __name__ == "__main__":
    main()
