"""A learnt reward: a sequence classifier with one label, read at the last token of prompt + completion."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.data.tokenization import Encoder, Text
from rlhf.errors import InputError
from rlhf.models.loading import adapter_loading, base_of, from_pretrained, is_adapter, load_classifier


class RewardModel:
    """Scores completions with a sequence-classification model; a reward function like any other, see combine.py.

    If the model has the policy's vocabulary (or no tokenizers are given), it reads the ids that were sampled. Otherwise
    `reward_tokenizer` tokenises the text again, conversations through its own chat template.

    The score is read at the last real token of each row, known from its length. Only if the model pads with its own EOS
    is it read at the last token that is not EOS, since stock transformers train and score such a model there.

    Args:
        model: a sequence classifier with num_labels=1.
        reward_tokenizer: the model's tokenizer.
        policy_tokenizer: the tokenizer of the policy; a trainer sets its own, see `for_policy`.
        microbatch_tokens: limit of one forward, in tokens including padding (a single row may exceed it).
        name: its name in logs and messages.
    """

    def __init__(
        self,
        model: Any,
        *,
        reward_tokenizer: Any = None,
        policy_tokenizer: Any = None,
        microbatch_tokens: int = 16384,
        name: str = "reward_model",
    ) -> None:
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        if labels != 1:
            raise InputError(
                f"reward_model={name!r} has {'no' if labels is None else labels} labels, but a reward is one number. "
                "Train it with num_labels=1, as recipes/reward_model.py does."
            )
        if microbatch_tokens < 1:
            raise InputError(f"microbatch_tokens={microbatch_tokens}: give at least 1.")
        self.model = model.eval()
        self.name = name
        self.microbatch_tokens = microbatch_tokens
        self.reward_tokenizer = reward_tokenizer
        self.policy_tokenizer: Any = None
        self.encoder: Encoder | None = None
        self._stock_index = _pads_with_eos(model, reward_tokenizer)
        self.for_policy(policy_tokenizer)

    def for_policy(self, tokenizer: Any) -> "RewardModel":
        """Sets the policy's tokenizer, unless one is set already; returns self. Trainers call this with their own."""
        if self.policy_tokenizer is None and tokenizer is not None:
            self.policy_tokenizer = tokenizer
            if self.reward_tokenizer is not None and not _reads_alike(self.reward_tokenizer, tokenizer):
                self.encoder = Encoder(self.reward_tokenizer)
        return self

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        *,
        policy_tokenizer: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "RewardModel":
        """Loads a model, and its tokenizer if saved, from a directory or hub name; InputError if it is no reward model.

        dtype: of its weights; None: as transformers chooses. options: as for the constructor.
        """
        where = f"reward_model={str(path)!r}"
        if not Path(path).exists() and (len(Path(path).parts) != 2 or Path(path).parent.is_dir()):
            raise InputError(
                f"{where} does not exist. Give a directory saved by save_pretrained or owner/name on the hub."
            )
        try:
            if is_adapter(str(path)):
                return cls._of_adapter(str(path), device, policy_tokenizer, dtype, options)
            kinds = from_pretrained(AutoConfig, path, "reward_model").architectures or []
            if kinds and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
                raise InputError(
                    f"{where} is a {kinds[0]}, not a sequence classifier. Train a reward model on it first: "
                    "recipes/reward_model.py."
                )
            loader = AutoModelForSequenceClassification
            model, report = from_pretrained(
                loader, path, "reward_model", output_loading_info=True, **({} if dtype is None else {"dtype": dtype})
            )
        except InputError:
            raise
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{where} cannot be loaded: {reason} Give the directory or hub name of a sequence-classification model."
            ) from error
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:3])
            raise InputError(f"{where} lacks trained weights for {missing}. Train it with recipes/reward_model.py.")
        options = {"name": Path(path).name, **options}
        return cls(model.to(device), reward_tokenizer=_tokenizer_at(path), policy_tokenizer=policy_tokenizer, **options)

    @classmethod
    def _of_adapter(
        cls,
        path: str,
        device: torch.device | str,
        policy_tokenizer: Any,
        dtype: torch.dtype | None,
        options: dict[str, Any],
    ) -> "RewardModel":
        """The base that the adapter at `path` names, with that adapter, whose folder also holds the trained head."""
        from peft import PeftModel

        base = load_classifier(base_of(path, "reward_model"), "reward_model", dtype=dtype)
        with adapter_loading():
            model = PeftModel.from_pretrained(base, path).to(device)
        options = {"name": Path(path).name, **options}
        return cls(model, reward_tokenizer=_tokenizer_at(path), policy_tokenizer=policy_tokenizer, **options)

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[float]:
        """One score per completion. `prompt_ids` is needed when the model reads the policy's ids."""
        if self.encoder is not None:
            return self.score(self._retokenise(self.encoder, prompts, completions, completion_ids))
        if prompt_ids is None:
            raise InputError(f"reward_model={self.name!r} reads token ids: pass prompt_ids with the completions.")
        return self.score([[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)])

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Scores of whole token sequences, `microbatch_tokens` at a time; order and padding do not affect them."""
        self._check(sequences)
        scores = torch.zeros(len(sequences), dtype=torch.float64)
        for rows in _batches([len(ids) for ids in sequences], self.microbatch_tokens):
            scores[rows] = self._forward([list(sequences[i]) for i in rows]).to("cpu", torch.float64)
        return scores.tolist()

    def _forward(self, sequences: list[list[int]]) -> Tensor:
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(ids) for ids in sequences], device=device)
        width = int(lengths.max())
        ids = torch.tensor([row + [0] * (width - len(row)) for row in sequences], device=device)
        mask = (torch.arange(width, device=device) < lengths.unsqueeze(1)).long()
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # adapters stay on
        head = getattr(model, "score", None)
        if head is None:  # not a causal model: its own forward picks the token to read
            return self.model(input_ids=ids, attention_mask=mask).logits[:, 0]
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = torch.tensor([self._last_index(row) for row in sequences], device=device)
        return head(hidden[torch.arange(len(sequences), device=device), last])[:, 0]

    def _last_index(self, ids: list[int]) -> int:
        if self._stock_index:
            return max((i for i, token in enumerate(ids) if token != self._pad_id), default=0)
        return len(ids) - 1

    @property
    def _pad_id(self) -> int | None:
        return self.model.config.get_text_config().pad_token_id

    def _retokenise(
        self, encoder: Encoder, prompts: Sequence[Text], completions: Sequence[Text], ids: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """The texts as ids of the reward model; a completion ends with EOS if the policy ended it."""
        eos = self.policy_tokenizer.eos_token_id
        sequences = []
        for prompt, completion, tokens in zip(prompts, completions, ids, strict=True):
            pair = encoder.pair(prompt, completion, ended=bool(tokens) and tokens[-1] == eos)
            sequences.append(pair[0] + pair[1])
        return sequences

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        config = self.model.config.get_text_config()
        embedded = self.model.get_input_embeddings().weight.shape[0]
        longest = getattr(config, "max_position_embeddings", None)
        for row, ids in enumerate(sequences):
            if not ids:
                raise InputError(f"reward_model={self.name!r}: row {row} has no tokens. Give prompt and completion.")
            if max(ids) >= embedded:
                raise InputError(
                    f"reward_model={self.name!r}: row {row} has token {max(ids)}, but the model embeds {embedded}. "
                    "Its vocabulary is not the policy's: save its tokenizer beside it."
                )
            if longest is not None and len(ids) > longest:
                raise InputError(
                    f"reward_model={self.name!r}: row {row} has {len(ids)} tokens, the model reads {longest}. "
                    "Lower max_prompt_tokens or max_new_tokens."
                )


def _tokenizer_at(path: str | Path) -> Any:
    try:
        return from_pretrained(AutoTokenizer, path, "reward_model")
    except InputError:
        raise
    except (OSError, ValueError):
        return None  # none was saved: the model reads the policy's ids


def _batches(lengths: Sequence[int], microbatch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, longest first; rows times width stays within `microbatch_tokens`."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = max(1, microbatch_tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def _reads_alike(reward_tokenizer: Any, policy_tokenizer: Any) -> bool:
    """Whether ids of the policy mean the same to the reward model, conversations included."""
    if reward_tokenizer is policy_tokenizer:
        return True
    template = getattr(reward_tokenizer, "chat_template", None)
    return (
        reward_tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        and reward_tokenizer.eos_token_id == policy_tokenizer.eos_token_id
        and template in (None, getattr(policy_tokenizer, "chat_template", None))
        and Encoder(reward_tokenizer).prefix == Encoder(policy_tokenizer).prefix
    )


def _pads_with_eos(model: Any, tokenizer: Any) -> bool:
    config = model.config.get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return config.pad_token_id is not None and config.pad_token_id in [*ends, getattr(tokenizer, "eos_token_id", None)]
