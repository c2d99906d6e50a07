"""A tokenizer made in memory: one id per word, line feeds and special tokens are tokens of their own."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = ["\n", *["a", "b", "c", "d", "e", "f", "g", "h", "hello", "world", "sys"]]
VOCABULARY = {word: i for i, word in enumerate(SPECIAL + WORDS)}
PAD, BOS, EOS, END = (VOCABULARY[name] for name in ("<pad>", "<s>", "</s>", "<|end|>"))

TURNS = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}%END%{% endfor %}"
START = "{% if add_generation_prompt %}<|assistant|> {% endif %}"
PLAIN_TEMPLATE = TURNS.replace("%END%", "<|end|>") + START
BOS_TEMPLATE = "{{ bos_token }}" + PLAIN_TEMPLATE
EOS_TEMPLATE = TURNS.replace("%END%", "</s>") + START
EOS_LINE_TEMPLATE = TURNS.replace("%END%", "</s>\n") + START


def make_tokenizer(*, adds_bos=False, template=None, words=WORDS, **special):
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        **{name: token for name, token in names.items() if token is not None},
    )


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def ids(text):
    """Ids of words and special tokens written with spaces between them."""
    return [VOCABULARY[word] for word in text.split(" ")]
