"""Memory of PPO beside TRL 1.12, the last release with a PPO trainer, on equal work.

    python3.11 -m venv trl112 && trl112/bin/pip install trl==1.12.0 transformers==5.17.0 torch
    python benchmarks/trl_memory.py trl112/bin/python

Both sides train with a policy, reference, value model and reward model of one size (a random Llama of about 100 million
parameters): two steps of 8 completions in microbatches of 4. TRL holds four models and trains two of them whole, in
float32. Ours is LoRA on one backbone, which is policy, reference and (by a second adapter) critic; the reward model is
separate. What is not trained is in float32, as TRL's, or in bfloat16. Peaks are measured as in memory.py.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error"}

from memory import COMPLETIONS, NEW, PROMPT, RETURNS_MEMORY, anonymous, llama, peak_memory, tokenizer

LIMIT = 0.45
"""What this toolkit promises: at most this share of TRL's peak."""
SIDES = ("TRL 1.12", "ours, float32", "ours, bfloat16")


def trl() -> int:
    """Peak of TRL's PPO, in bytes."""
    from datasets import Dataset
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    before = anonymous()
    with tempfile.TemporaryDirectory() as folder, peak_memory() as found:
        policy, reference = LlamaForCausalLM(llama()), LlamaForCausalLM(llama())
        reference.load_state_dict(policy.state_dict())
        reward, value = LlamaForSequenceClassification(llama()), LlamaForSequenceClassification(llama())
        rows = Dataset.from_dict({"input_ids": [[2 + (i + j) % 8000 for j in range(PROMPT)] for i in range(64)]})
        settings = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=COMPLETIONS // 2,
            gradient_accumulation_steps=2,
            num_mini_batches=1,
            num_ppo_epochs=1,
            total_episodes=2 * COMPLETIONS,
            response_length=NEW,
            local_rollout_forward_batch_size=COMPLETIONS // 2,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            num_sample_generations=0,
            report_to=[],
            save_strategy="no",
        )
        trainer = PPOTrainer(
            args=settings,
            processing_class=tokenizer(),
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=rows,
            eval_dataset=rows.select(range(COMPLETIONS)),
        )
        trainer.train()
    return found[-1] - before


def ours(frozen: str) -> int:
    """Peak of this toolkit's PPO, in bytes."""
    from memory import trained

    case: dict[str, Any] = {"lora": 16, "critic": "adapter", "reward_model": frozen}
    return trained(case | {"config": {"frozen_precision": frozen}})["measured"]


def in_a_process(python: str, side: str) -> int:
    environment = os.environ | RETURNS_MEMORY | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([python, __file__, "--side", side], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        side = sys.argv[2]
        print(json.dumps(trl() if side == SIDES[0] else ours(side.partition(", ")[2])))
        return
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    theirs = in_a_process(sys.argv[1], SIDES[0])
    print(f"{SIDES[0]:<16}{theirs / 10**6:>8.0f} MB", flush=True)
    for side in SIDES[1:]:
        own = in_a_process(sys.executable, side)
        holds = "ok" if own <= LIMIT * theirs else f"ABOVE {LIMIT}"
        print(f"{side:<16}{own / 10**6:>8.0f} MB   {own / theirs:.3f} of TRL's   {holds}", flush=True)


if __name__ == "__main__":
    main()
