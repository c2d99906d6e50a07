"""Turns text into token ids, in the same way for sampling, supervised fine-tuning and reward models.

A prompt's ids are always the beginning of the ids of prompt + completion, so that a model is trained on the prompts
that it will be asked to continue. Prompt and completion in plain text (`str`) are tokenised separately; a conversation
(list of `{"role", "content"}` messages) goes through the tokenizer's chat template.
"""

from collections.abc import Mapping
from typing import Any

from rlhf.errors import InputError, excerpt

Message = dict[str, Any]
Text = str | list[Message]


class Encoder:
    """Encodes with one tokenizer. Ids begin with exactly one BOS if the tokenizer or the chat template adds one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.prefix = _special_prefix(tokenizer)

    def prompts(self, prompts: list[Any]) -> list[list[int]]:
        """Ids of each prompt; a conversation ends with the generation prompt, so that the next token is the answer's.

        A conversation whose last turn is the assistant's is continued inside that turn (a prefilled answer).
        """
        return self.encode([self.text(prompt) for prompt in prompts])

    def text(self, prompt: Text) -> str:
        """The prompt as one string, template applied."""
        if isinstance(prompt, str):
            return prompt
        prefilled = prompt[-1]["role"] == "assistant"
        return self._render(prompt, add_generation_prompt=not prefilled, continue_final_message=prefilled)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each whole text, with one BOS if the tokenizer uses BOS."""
        return [self._with_bos(ids) for ids in self._encode(texts)]

    def pair(self, prompt: Text, completion: Text, *, ended: bool = True) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of its completion; the completion ends with one EOS, or with none if not `ended`.

        InputError if the chat template writes the prompt differently when the answer follows.
        """
        if isinstance(prompt, str) and isinstance(completion, str):
            prompt_ids, completion_ids = self.prompts([prompt])[0], self._encode([completion])[0]
        elif isinstance(prompt, list):
            turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            prompt_ids, completion_ids = self._conversation(prompt, turns)
        else:
            raise InputError("the prompt is plain text and the completion a conversation; write both in the same way")
        return prompt_ids, self._finish(completion_ids, ended)

    def _conversation(self, prompt: list[Message], completion: list[Message]) -> tuple[list[int], list[int]]:
        before, whole = self.text(prompt), self._render(prompt + completion)
        if not whole.startswith(before):
            raise InputError(
                "the chat template writes the prompt differently when the answer follows: "
                f"{excerpt(before)} is not the beginning of {excerpt(whole)}. Training would then not see what "
                "generation sees. Use a chat_template whose generation prompt is the beginning of an assistant turn."
            )
        prompt_ids, whole_ids = self.encode([before, whole])
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, whole_ids[len(prompt_ids) :]
        # A token would span the border, which sampling cannot produce: the rest is tokenised separately.
        return prompt_ids, self._encode([whole[len(before) :]])[0]

    def _finish(self, ids: list[int], ended: bool) -> list[int]:
        """`ids` with exactly one EOS at the end (none if not `ended`), also if a template adds a newline after it."""
        eos = self.tokenizer.eos_token_id
        if eos in ids:
            end = len(ids) - ids[::-1].index(eos)
            if not self.tokenizer.decode(ids[end:]).strip():
                ids = ids[:end]
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        return [*ids, eos] if ended and eos is not None else ids

    def _render(self, messages: list[Message], **options: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                "the data is conversational but the tokenizer has no chat template. Use an instruction-tuned model's "
                "tokenizer, set tokenizer.chat_template, or write prompts as plain strings."
            )
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # templates raise any exception, for instance when roles do not alternate
            raise InputError(f"the chat template refused {excerpt(messages)}: {error}. Repair the messages.") from error

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.prefix and ids[: len(self.prefix)] != self.prefix:
            ids = self.prefix + ids
        bos = self.tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids


def require_pad_token(tokenizer: Any) -> str | None:
    """Requires an EOS token (else InputError); if there is no pad token, makes EOS the pad token and returns a note.

    Masks come from lengths everywhere, so that pad = EOS changes no result.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no eos_token, so a completion could never end. Set tokenizer.eos_token to the token "
            "that ends an answer and save the tokenizer again."
        )
    if tokenizer.pad_token_id is not None:
        return None
    tokenizer.pad_token = tokenizer.eos_token
    return f"the tokenizer has no pad token: {tokenizer.eos_token!r} (EOS) is used for padding; masks come from lengths"


def text_problem(text: Any) -> str | None:
    """The problem with a prompt or completion, worded to follow "row 3: "; None if there is none."""
    if isinstance(text, str):
        return None
    if not isinstance(text, list):
        return f"{excerpt(text)}, neither a string nor a list of messages"
    if not text:
        return "no messages"
    for message in text:
        fields = message if isinstance(message, Mapping) else {}
        if not isinstance(fields.get("role"), str) or not (
            isinstance(fields.get("content"), str) or fields.get("tool_calls")
        ):
            return f"a message without a role and a content string: {excerpt(message)}"
    return None


def clean(text: Any) -> Any:
    """Messages without keys that are None: a data set returns None for every key that a message lacks."""
    if not isinstance(text, list):
        return text
    return [{k: v for k, v in m.items() if v is not None} if isinstance(m, Mapping) else m for m in text]


def _special_prefix(tokenizer: Any) -> list[int]:
    """The special tokens, usually BOS or none, that the tokenizer itself puts before a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    if not plain:  # the vocabulary lacks the letter
        return [token for token in full[:1] if token == tokenizer.bos_token_id]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []
