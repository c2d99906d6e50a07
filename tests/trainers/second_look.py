"""What runs report, found a second time: log-probs from stock transformers, and what a reward function was given."""

import torch

from tests import tiny


def logprobs_alone(lm, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    """By definition: the sequence alone through the stock model."""
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0] / temperature
    logits = logits.log_softmax(-1)
    return [logits[len(prompt) + t - 1, token].item() for t, token in enumerate(completion)]


class Recorder:
    """A reward function that remembers every call."""

    __name__ = "recorder"

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(self, prompts, completions, completion_ids, target, prompt_ids=None, trainer_state=None):
        scores = tiny.count_target(completions, target)
        self.calls.append(
            {
                "prompts": list(prompts),
                "completions": list(completions),
                "ids": [list(ids) for ids in completion_ids],
                "target": list(target),
                "prompt_ids": prompt_ids,
                "state": dict(trainer_state),
                "scores": scores,
            }
        )
        return scores
