"""A call of rewards on four completions of known lengths."""

PROMPTS = ["the first prompt", "the second", "the third", "the fourth"]


COMPLETIONS = ["a", "b b", "c c c", "d"]


def call(rewards, rows=4, **options):
    return rewards(
        prompts=PROMPTS[:rows],
        completions=COMPLETIONS[:rows],
        completion_ids=[[1]] * rows,
        **options,
    )


def by_length(completions, bonus=0.0):
    return [len(text) + bonus for text in completions]
