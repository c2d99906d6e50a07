"""Is the memory plan right? Trains random models of about 100 million parameters, and compares bytes: predicted, measured.

    python benchmarks/memory.py [CASE ...]

Measured is the most anonymous memory of a process (resident minus shared pages of /proc/self/statm, read every millisecond)
during two steps of training, less what it had after its imports. Each case is a process of its own, in which glibc returns
freed memory to the system at once (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), which it otherwise keeps for later.
Linux, CPU, float32 except where said. A minute or two per case.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
PROMPT, NEW, COMPLETIONS = 112, 16, 8

CASES: dict[str, dict[str, Any]] = {
    "ppo": {},
    "ppo_checkpointing": {"config": {"gradient_checkpointing": True}},
    "ppo_critic": {"critic": "own"},
    "ppo_reward_model": {"reward_model": "float32"},
    "ppo_lora": {"lora": 16},
    "ppo_lora_value_adapter": {"lora": 16, "critic": "adapter"},
    "ppo_bfloat16": {"config": {"precision": "bfloat16"}},
    "ppo_long_sampling": {"lora": 16, "completions": 64, "config": {"gradient_checkpointing": True}},
}
"""Name -> what differs from PPO on all weights, with a value head and a frozen reference."""


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list whose last element is the largest `anonymous` of the block."""
    found = [anonymous()]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            found.append(max(found.pop(), anonymous()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def tokenizer() -> Any:
    """One token per word: <pad>, <eos>, w0 to w7999."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(8000))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def llama() -> Any:
    """The configuration of a model of 105 million parameters."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 12}
    return LlamaConfig(vocab_size=8002, pad_token_id=0, bos_token_id=None, eos_token_id=1, num_labels=1, **sizes)


def trained(what: dict[str, Any]) -> dict[str, Any]:
    """Train in this process; {"predicted", "measured", ...} in bytes. what: as in CASES."""
    import torch
    import transformers
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    import rlhf
    from rlhf.models.lora import LoRASettings
    from rlhf.rewards.model import RewardModel
    from rlhf.trainers.placing import reward_models
    from rlhf.trainers.plan import models_of, plan, this_machine

    if what.get("lora"):
        import peft  # noqa: F401  # its import is not the run's
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    before = anonymous()
    completions = what.get("completions", COMPLETIONS)
    with tempfile.TemporaryDirectory() as folder, peak_memory() as found:
        reward: Any = length
        if what.get("reward_model"):
            model = LlamaForSequenceClassification(llama()).to(getattr(torch, what["reward_model"]))
            reward = RewardModel(model, reward_tokenizer=tokenizer())
        critic = what.get("critic")
        config = rlhf.PPOTrainerConfig(
            output_dir=folder,
            prompts_per_step=completions,
            total_steps=2,
            max_prompt_tokens=PROMPT,
            generation=rlhf.GenerationConfig(max_new_tokens=NEW),
            update=rlhf.UpdateConfig(num_epochs=1, minibatch_size=COMPLETIONS, microbatch_tokens=4 * (PROMPT + NEW)),
            ppo=rlhf.PPOConfig(kl_coef=0.05),
            **what.get("config", {}),
        )
        trainer = rlhf.PPOTrainer(
            LlamaForCausalLM(llama()),
            reward,
            [{"prompt": " ".join(f"w{(i * 31 + j) % 8000}" for j in range(PROMPT - i % 2))} for i in range(64)],
            config,
            tokenizer=tokenizer(),
            critic=LlamaForSequenceClassification(llama()) if critic == "own" else critic,
            peft_config=LoRASettings(r=what["lora"]).peft_config() if "lora" in what else None,
        )
        trainer.train()
    built = models_of(trainer.policy, trainer.reference, reward_models(trainer.rewards))
    predicted = plan(config, trainer.algorithm, built, this_machine(), prompt_tokens=PROMPT)
    return {"predicted": predicted.peak, "measured": found[-1] - before, "phase": predicted.worst}


def length(completions: Any, **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def in_a_process(case: str) -> dict[str, Any]:
    """`trained` in a fresh process."""
    environment = os.environ | RETURNS_MEMORY | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--measure", case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(cases: list[str], run: Callable[[str], dict[str, Any]] = in_a_process) -> None:
    print(f"{'case':<24}{'predicted':>10}{'measured':>10}{'ratio':>8}  peak in       seconds")
    for case in cases:
        start = time.perf_counter()
        result = run(case)
        ratio = result["predicted"] / result["measured"]
        megabytes = (f"{result[name] / 10**6:>7.0f} MB" for name in ("predicted", "measured"))
        print(
            f"{case:<24}{''.join(megabytes)}{ratio:>8.3f}  {result['phase']:<14}{time.perf_counter() - start:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(trained(CASES[sys.argv[2]])))
    else:
        table(sys.argv[1:] or list(CASES))
