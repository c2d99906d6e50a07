"""Sampling against a slow re-implementation: full forwards without a cache, one row alone, plain Python inverting the CDF.

The promises: a completion depends on its prompt, the weights and its own draws, never on the batch; log-probs are those of
softmax(logits / temperature); ended rows cost nothing; prompts are read once.
"""

import math
from bisect import bisect_right
from itertools import accumulate

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from rlhf.core.random import SAMPLING, invert_cdf, uniform
from rlhf.errors import InputError
from rlhf.models.loading import end_tokens
from rlhf.rollout.engine import Completion, GenerationConfig, Span
from rlhf.rollout.in_process import check_cache
from tests import tiny
from tests.rollout.sampling import Draws, generate
from tests.rounding import EPS

PROMPTS = tiny.sequences(5, seed=3, longest=9)
SLOTS = [4, 0, 9, 2, 7]
EOS = [tiny.EOS]
ENDS = [tiny.EOS, 5, 6]
"""More end tokens, so that rows end at many different lengths."""


def draws(slots=SLOTS, *, seed: int = 11, step: int = 3) -> Draws:
    return Draws(seed=seed, stream=SAMPLING, step=step, slots=slots)


def settings(**changes) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": 8, "temperature": 0.7, **changes})


def plain_inverse(probabilities: list[float], draw: float) -> int:
    """The first token whose cumulative probability exceeds the draw."""
    return bisect_right(list(accumulate(probabilities)), draw)


def slow_completion(
    lm, prompt: list[int], config: GenerationConfig, slot: int, copy: int, eos: list[int]
) -> Completion:
    """One completion, token by token: the whole sequence alone through the model, no cache, no padding."""
    ids, logprobs = [], []
    for t in range(config.max_new_tokens):
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].double()
        weights = (logits / config.temperature).softmax(-1).tolist()
        draw = float(uniform(11, SAMPLING, t, copy, slot, 3))
        ids.append(plain_inverse(weights, draw))
        logprobs.append(math.log(weights[ids[-1]]))
        if ids[-1] in eos:
            return Completion(ids, logprobs, "stop", [Span(0, 0, t + 1)])
    return Completion(ids, logprobs, "length", [Span(0, 0, config.max_new_tokens)])


def assert_same(completions: list[Completion], expected: list[Completion], tolerance: float) -> None:
    for got, wanted in zip(completions, expected, strict=True):
        assert (got.ids, got.ended, got.versions) == (wanted.ids, wanted.ended, wanted.versions)
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), tiny.PRECISIONS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sampling_equals_full_forwards_of_each_row_alone(family, dtype, tolerance):
    lm, config = tiny.causal_lm(family, dtype=dtype), settings()
    slow = [slow_completion(lm, p, config, s, c, ENDS) for p, s in zip(PROMPTS, SLOTS, strict=True) for c in range(3)]
    lengths = {len(completion.ids) for completion in slow}
    assert len(lengths) > 2 and {completion.ended for completion in slow} == {
        "stop",
        "length",
    }  # a case worth comparing
    assert_same(generate(lm, PROMPTS, config, draws=draws(), eos_ids=ENDS, num_completions=3), slow, tolerance)


def without_positions(lm):
    forward = lm.forward
    lm.forward = lambda *args, position_ids=None, **options: forward(*args, **options)
    return lm


def test_left_padding_without_positions_is_noticed_on_absolute_positions():
    """The negative control of the test above: GPT-2 must fail where Llama cannot tell."""
    config, found = settings(), {}
    for family in ("gpt2", "llama"):
        lm = tiny.causal_lm(family, dtype=torch.float64)
        right = generate(lm, PROMPTS, config, draws=draws(), eos_ids=EOS)
        wrong = generate(without_positions(lm), PROMPTS, config, draws=draws(), eos_ids=EOS)
        pairs = zip(right, wrong, strict=True)
        found[family] = max(abs(a.logprobs[0] - b.logprobs[0]) if a.ids[0] == b.ids[0] else 9.0 for a, b in pairs)
    assert found["gpt2"] > 0.1 and found["llama"] == pytest.approx(0, abs=64 * EPS)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_stands_in_the_padding_is_never_seen(family):
    """Any pad id, EOS among them, gives the same completions: only the attention mask and the positions count."""
    lm, config = tiny.causal_lm(family), settings()
    expected = generate(lm, PROMPTS, config, draws=draws(), eos_ids=EOS, num_completions=2)

    def repad(module, args, options, *, pad):
        ids, attention = options["input_ids"], options.get("attention_mask")
        if attention is not None and ids.shape == attention.shape:  # the prefill, which holds the padding
            options["input_ids"] = torch.where(attention.bool(), ids, pad)
        return args, options

    for pad in (1, tiny.EOS, 7):
        hook = lm.register_forward_pre_hook(lambda m, a, o, pad=pad: repad(m, a, o, pad=pad), with_kwargs=True)
        padded = generate(lm, PROMPTS, config, draws=draws(), eos_ids=EOS, num_completions=2)
        hook.remove()
        assert_same(padded, expected, 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_completion_does_not_depend_on_the_batch_it_is_sampled_in(family):
    lm, config = tiny.causal_lm(family, dtype=torch.float64), settings()
    together = generate(lm, PROMPTS, config, draws=draws(), eos_ids=ENDS, num_completions=2)
    for at_once in (1, 2, 3, 5, 9):
        split = generate(
            lm, PROMPTS, settings(completions_at_once=at_once), draws=draws(), eos_ids=ENDS, num_completions=2
        )
        assert_same(split, together, 1e-10)
    for order in ([4, 3, 2, 1, 0], [2, 0, 1], [3]):
        part = generate(
            lm,
            [PROMPTS[i] for i in order],
            config,
            draws=draws([SLOTS[i] for i in order]),
            eos_ids=ENDS,
            num_completions=2,
        )
        assert_same(part, [together[2 * i + copy] for i in order for copy in range(2)], 1e-10)
    first = generate(lm, PROMPTS, config, draws=draws(), eos_ids=ENDS, num_completions=1)
    assert_same(first, together[::2], 1e-10)  # more completions of a prompt do not change the first


def test_equal_prompts_seeds_steps_and_completions_draw_differently():
    lm, config = tiny.causal_lm(), settings(temperature=3.0, max_new_tokens=20)
    runs = [
        generate(lm, [[5, 6]] * 3, config, draws=draws([0, 1, 2]), eos_ids=[], num_completions=2),
        generate(lm, [[5, 6]], config, draws=draws([0], step=4), eos_ids=[]),
        generate(lm, [[5, 6]], config, draws=draws([0], seed=12), eos_ids=[]),
    ]
    texts = [tuple(completion.ids) for run in runs for completion in run]
    assert len(set(texts)) == len(texts) == 8


def rows_fed(lm) -> list[tuple[int, int]]:
    """(rows, columns) of every forward of sampling from now on."""
    shapes: list[tuple[int, int]] = []

    def note(module, args, options):
        if options["use_cache"]:
            shapes.append(tuple(options["input_ids"].shape))

    lm.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


@pytest.mark.parametrize("num_completions", [1, 4])
def test_prompts_are_read_once_and_rows_that_ended_cost_nothing(num_completions):
    lm = tiny.causal_lm()
    shapes = rows_fed(lm)
    completions = generate(lm, PROMPTS, settings(), draws=draws(), eos_ids=EOS, num_completions=num_completions)
    lengths = [len(completion.ids) for completion in completions]
    assert len(set(lengths)) > 2
    prefill, *steps = shapes
    assert prefill == (len(PROMPTS), max(map(len, PROMPTS)))
    # the token sampled last is never read; every other one costs one row of one column
    assert steps == [(sum(length > t for length in lengths), 1) for t in range(1, max(lengths))]


def test_every_prompt_is_read_once_when_memory_allows_few_completions_at_a_time():
    lm = tiny.causal_lm()
    shapes = rows_fed(lm)
    generate(lm, PROMPTS, settings(completions_at_once=4), draws=draws(), eos_ids=EOS, num_completions=2)
    assert sum(rows for rows, columns in shapes if columns > 1) == len(PROMPTS)
    assert max(rows for rows, _ in shapes) <= 4


# --- how completions end ------------------------------------------------------------------------------------------------


def test_a_completion_holds_its_end_token_once_and_nothing_after_it():
    completions = generate(tiny.causal_lm(), PROMPTS, settings(), draws=draws(), eos_ids=EOS, num_completions=20)
    for completion in completions:
        assert len(completion.ids) == len(completion.logprobs) <= 8
        assert tiny.EOS not in completion.ids[:-1]
        assert (completion.ended == "stop") == (completion.ids[-1] == tiny.EOS)
        assert completion.ended == "stop" or len(completion.ids) == 8
    assert any(
        completion.ended == "stop" and len(completion.ids) == 8 for completion in completions
    )  # just within the limit


def test_an_immediate_end_is_a_completion_of_one_token_and_needs_no_further_forward():
    lm = tiny.causal_lm()
    shapes = rows_fed(lm)
    everything = list(range(tiny.VOCABULARY))
    completions = generate(lm, PROMPTS, settings(), draws=draws(), eos_ids=everything)
    assert len(shapes) == 1
    assert all(len(completion.ids) == 1 and completion.ended == "stop" for completion in completions)


def test_a_limit_of_one_token_gives_one_token_that_is_cut_unless_it_ends():
    lm = tiny.causal_lm()
    for completion in generate(lm, PROMPTS, settings(max_new_tokens=1), draws=draws(), eos_ids=EOS, num_completions=9):
        assert len(completion.ids) == 1 and (completion.ended == "stop") == (completion.ids == EOS)


def test_every_end_token_of_the_models_settings_ends_a_completion():
    lm = tiny.causal_lm()
    lm.generation_config.eos_token_id = [tiny.EOS, 5]
    assert end_tokens(lm, tiny.EOS) == [tiny.EOS, 5]
    completions = generate(lm, PROMPTS, settings(), draws=draws(), eos_ids=end_tokens(lm, tiny.EOS), num_completions=9)
    assert {completion.ids[-1] for completion in completions if completion.ended == "stop"} == {tiny.EOS, 5}
    assert all(5 not in completion.ids[:-1] for completion in completions)


def test_the_tokenizers_end_token_counts_where_the_models_settings_have_another_or_none():
    lm = tiny.causal_lm()
    lm.generation_config.eos_token_id = 5
    assert end_tokens(lm, tiny.EOS) == [tiny.EOS, 5]
    lm.generation_config.eos_token_id = None
    assert end_tokens(lm, tiny.EOS) == [tiny.EOS]
    with pytest.raises(InputError, match=r"no end-of-sequence token.*eos_token"):
        end_tokens(lm, None)


# --- the distribution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_completions_are_those_of_stock_generate(family):
    lm = tiny.causal_lm(family)
    completions = generate(lm, PROMPTS, settings(), draws=draws(), eos_ids=EOS, greedy=True)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        stock = lm.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert completion.ids == stock.tolist()


def exact_pairs(lm, prompt: list[int], temperature: float) -> dict[tuple[int, ...], float]:
    """Probability of every completion of at most two tokens, by enumeration."""

    def next_token(ids: list[int]) -> list[float]:
        with torch.no_grad():
            return (lm(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1).tolist()

    table = {}
    for a, p in enumerate(next_token(prompt)):
        if a == tiny.EOS:
            table[(a,)] = p
        else:
            table |= {(a, b): p * q for b, q in enumerate(next_token([*prompt, a]))}
    return table


def chi_square(completions: list[Completion], expected: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic in standard deviations above its mean; cells of fewer than 5 expected counts are joined."""
    counts = dict.fromkeys(expected, 0)
    for completion in completions:
        counts[tuple(completion.ids)] += 1
    total = len(completions)
    frequent = [key for key, p in expected.items() if p * total >= 5]
    pairs = [(counts[key], expected[key] * total) for key in frequent]
    rest = total - sum(wanted for _, wanted in pairs)
    pairs.append((total - sum(got for got, _ in pairs), max(rest, 1e-9)))
    statistic = sum((got - wanted) ** 2 / wanted for got, wanted in pairs)
    freedom = len(pairs) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_completions_follow_the_models_distribution_over_slots_and_over_copies_of_one_prompt():
    lm, prompt, total = tiny.causal_lm("gpt2"), [5, 6, 3], 4000
    config = settings(max_new_tokens=2, temperature=1.5, completions_at_once=total)
    expected = exact_pairs(lm, prompt, 1.5)
    copies = generate(lm, [prompt], config, draws=draws([0]), eos_ids=EOS, num_completions=total)
    slots = generate(lm, [prompt] * total, config, draws=draws(range(total)), eos_ids=EOS)
    assert abs(chi_square(copies, expected)) < 4 and abs(chi_square(slots, expected)) < 4
    assert chi_square(copies, exact_pairs(lm, prompt, 1.2)) > 10  # another temperature would be noticed


def test_reported_logprobs_are_those_of_the_tempered_distribution():
    lm, prompt = tiny.causal_lm("gpt2"), [5, 6, 3]
    expected = exact_pairs(lm, prompt, 0.7)
    for completion in generate(
        lm, [prompt], settings(max_new_tokens=2), draws=draws([0]), eos_ids=EOS, num_completions=50
    ):
        assert sum(completion.logprobs) == pytest.approx(math.log(expected[tuple(completion.ids)]), abs=2048 * EPS)


def test_tokens_of_probability_zero_are_never_sampled():
    lm, banned = tiny.causal_lm(), [0, 4, tiny.VOCABULARY - 1]

    def ban(module, args, outputs):
        outputs.logits[..., banned] = -math.inf

    lm.register_forward_hook(ban)
    config = settings(temperature=5.0, completions_at_once=1000)
    completions = generate(lm, PROMPTS, config, draws=draws(), eos_ids=EOS, num_completions=200)
    sampled = {token for completion in completions for token in completion.ids}
    assert sampled == set(range(tiny.VOCABULARY)) - set(banned)
    assert all(math.isfinite(value) for completion in completions for value in completion.logprobs)


BELOW_ONE = 1.0 - 2.0**-53


def quarters() -> torch.Tensor:
    """Probabilities 0, 1/4, 0, 1/4, 1/2, 0: exact in binary."""
    return torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5, 0.0]).log()


@pytest.mark.parametrize(
    ("draw", "token"), [(0.0, 1), (0.2499999, 1), (0.25, 3), (0.4999999, 3), (0.5, 4), (BELOW_ONE, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_picks_the_first_token_whose_cumulative_probability_exceeds_it(draw, token, dtype):
    chosen = invert_cdf(quarters().to(dtype).unsqueeze(0), torch.tensor([draw], dtype=torch.float64))
    assert chosen.tolist() == [token]


@pytest.mark.parametrize("draw", [0.0, 1e-300, 0.5, BELOW_ONE])
def test_the_ends_of_the_unit_interval_never_pick_an_impossible_token(draw):
    """Whatever rounding makes of the last cumulative sum."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 300, generator=generator) * 10
    logits[torch.rand(500, 300, generator=generator) < 0.5] = -math.inf
    logits[:, -1] = -math.inf
    logits[:, 0] = -math.inf
    chosen = invert_cdf(logits, torch.full((500,), draw, dtype=torch.float64))
    assert torch.isfinite(logits.gather(1, chosen.unsqueeze(1))).all()


def test_inverting_agrees_with_plain_python_on_random_rows():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(300, 12, generator=generator, dtype=torch.float64) * 3
    numbers = torch.rand(300, generator=generator, dtype=torch.float64)
    for temperature in (0.3, 1.0, 2.5):
        weights = (logits / temperature).softmax(-1).tolist()
        expected = [plain_inverse(row, draw) for row, draw in zip(weights, numbers.tolist(), strict=True)]
        assert invert_cdf(logits, numbers, temperature=temperature).tolist() == expected


def test_logits_that_are_not_numbers_give_a_token_of_the_vocabulary_and_a_logprob_that_shows_them():
    """Nothing reads beyond the vocabulary (on a GPU that would end the process); the run then stops by the log-prob."""
    lm = tiny.causal_lm()
    lm.get_output_embeddings().weight.data.fill_(math.nan)
    for completion in generate(lm, PROMPTS, settings(), draws=draws(), eos_ids=EOS):
        assert max(completion.ids) < tiny.VOCABULARY and math.isnan(completion.logprobs[0])


@pytest.mark.parametrize(
    "changes", [{"max_new_tokens": 0}, {"completions_at_once": 0}, {"temperature": 0.0}, {"temperature": math.nan}]
)
def test_impossible_settings_are_named(changes):
    (name,) = changes
    with pytest.raises(InputError, match=f"generation.{name}"):
        GenerationConfig(**changes)


def test_a_model_with_a_recurrent_state_is_refused_by_name():
    lm = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=11, hidden_size=16, num_hidden_layers=1, state_size=4, eos_token_id=2)
    )
    with pytest.raises(InputError, match=r"policy: MambaForCausalLM keeps a recurrent state"):
        check_cache(lm)
