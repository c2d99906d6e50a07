"""An example reward function. With conversational prompts, each completion is a list with one assistant message."""


def brief(completions, **_):
    """1 for a whole sentence of at most 8 words that ends in a full stop; less the longer it gets."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(text.endswith(".")) - max(0, len(text.split()) - 8) / 8 for text in texts]
