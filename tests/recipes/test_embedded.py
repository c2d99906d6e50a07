"""The embedded task: the hidden judge ranks what a person would rank, and the data are a function of the seed."""

import json
import math
from random import Random

import embedded
import pytest
from reviews import gold_score, vocabulary, words, write_prompt, write_review

PROMPT = "review of the cheap bakery:"
GOOD = "this cheap bakery delighted me. the coffee was rich because they roast the beans. i recommend it to everyone."


@pytest.fixture(scope="module")
def small():
    """Data sets small enough for a test; the recipe's own sizes differ only in number."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("SFT", 300), ("PREFERENCES", 2000), ("TEST_PREFERENCES", 100)):
            patch.setattr(embedded, f"NUM_{name}", size)
        yield


@pytest.fixture(scope="module")
def data(small, tmp_path_factory):
    return embedded.write_data(tmp_path_factory.mktemp("data"), seed=3)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("flaw", "worse"),
    [
        ("another item", GOOD.replace("bakery", "laptop")),
        ("no item", GOOD.partition(". ")[2]),
        ("another adjective", GOOD.replace("cheap", "famous")),
        ("an aspect of another kind of item", GOOD.replace("the coffee was rich", "the battery was strong")),
        ("an adjective that does not fit", GOOD.replace("rich", "witty")),
        ("a vague adjective", GOOD.replace("rich", "nice")),
        ("blame", GOOD.replace("rich", "bitter").replace("they roast the beans", "it was reheated")),
        ("no reason", GOOD.replace(" because they roast the beans", "")),
        ("a reason for something else", GOOD.replace("they roast the beans", "it runs for two days")),
        ("a verdict that contradicts", GOOD.replace("everyone", "nobody")),
        ("no verdict", GOOD.replace(" i recommend it to everyone.", "")),
        ("a repeated sentence", GOOD + " i recommend it to everyone."),
        ("a stutter", GOOD.replace("rich", "rich rich")),
        ("filler", "well you know. " + GOOD),
        ("broken off", GOOD.removesuffix(" to everyone.")),
        ("shuffled words", " ".join(sorted(GOOD.replace(".", "").split())) + "."),
    ],
)
def test_every_flaw_lowers_the_gold_score(flaw, worse):
    assert worse != GOOD, flaw
    assert gold_score(PROMPT, worse) <= gold_score(PROMPT, GOOD) - 0.3


def test_gold_score_adds_up_as_documented():
    # item .6 + its adjective .4 + delight .4, specific praise .9, fitting reason 1, agreeing praise .8, length .5
    assert gold_score(PROMPT, GOOD) == pytest.approx(0.6 + 0.4 + 0.4 + 0.9 + 1.0 + 0.8 + 0.5)
    # a broken fragment .8 (no opinion, no item), and 2 words are 10 short of 12: .5 - 1.5
    assert gold_score(PROMPT, "the coffee.") == pytest.approx(-0.8 - 1.0)


def test_gold_score_does_not_see_case_or_the_space_before_a_full_stop():
    assert gold_score(PROMPT, GOOD.replace(".", " .").upper()) == gold_score(PROMPT, GOOD)


@pytest.mark.parametrize("text", ["", "good", "good " * 30, "delighted " * 10 + ".", GOOD * 5, ". . . ."])
def test_no_trick_by_repetition_or_emptiness_beats_a_plain_decent_review(text):
    decent = "we chose this bakery last week. the coffee was nice because they roast the beans."
    assert gold_score(PROMPT, text) < gold_score(PROMPT, decent)


def test_gold_score_is_bounded_for_any_text_of_the_vocabulary():
    random, known = Random(0), vocabulary()
    for _ in range(300):
        text = " ".join(random.choice(known) for _ in range(random.randrange(60)))
        assert -12 < gold_score(write_prompt(random), text) < 7


def test_writers_are_mediocre_and_varied_so_that_there_is_something_to_learn():
    random = Random(0)
    scores = [
        gold_score(prompt, write_review(prompt, random)) for prompt in (write_prompt(random) for _ in range(1000))
    ]
    mean = sum(scores) / len(scores)
    assert mean < 1.0 < gold_score(PROMPT, GOOD) - 3
    assert (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5 > 1.0


def test_reviews_have_2_to_28_words_and_marks_and_use_only_the_vocabulary():
    random, known = Random(1), set(vocabulary())
    for _ in range(500):
        prompt = write_prompt(random)
        review = words(write_review(prompt, random))
        assert 2 <= len(review) <= 28
        assert known.issuperset(review + words(prompt))


def test_same_seed_same_bytes_other_seed_other_bytes(data, tmp_path):
    again, other = embedded.write_data(tmp_path / "again", seed=3), embedded.write_data(tmp_path / "other", seed=4)
    for name, path in data.items():
        assert path.read_bytes() == again[name].read_bytes()
        assert path.read_bytes() != other[name].read_bytes()


def test_no_test_prompt_occurs_in_training_data(data):
    def prompts(*names):
        return {row["prompt"] for name in names for row in rows(data[name])}

    train = prompts("sft", "preferences_train", "prompts_train")
    assert not train & prompts("sft_test", "preferences_test", "prompts_test")


def test_preferences_follow_bradley_terry_with_the_documented_noise(data):
    # Given a pair's gap, the better one is chosen with probability sigmoid(gap / temperature); 5 standard errors.
    gaps = [
        abs(gold_score(row["prompt"], row["chosen"]) - gold_score(row["prompt"], row["rejected"]))
        for row in rows(data["preferences_train"])
    ]
    right = [
        gold_score(row["prompt"], row["chosen"]) > gold_score(row["prompt"], row["rejected"])
        for row in rows(data["preferences_train"])
    ]
    decided = [(gap, win) for gap, win in zip(gaps, right, strict=True) if gap > 1e-9]
    chances = [1 / (1 + math.exp(-gap / embedded.GOLD_TEMPERATURE)) for gap, _ in decided]
    spread = math.sqrt(sum(p * (1 - p) for p in chances))
    assert abs(sum(win for _, win in decided) - sum(chances)) < 5 * spread
    assert 0.8 < sum(chances) / len(chances) < 0.95


def test_text_survives_the_tokenizer_and_special_tokens_are_apart(data):
    tokenizer = embedded.tokenizer()
    specials = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len(set(specials)) == 4
    assert tokenizer.padding_side == "left"
    for row in rows(data["sft"])[:200]:
        for text in row.values():
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert not set(specials) & set(ids)


def test_the_saved_tokenizer_encodes_as_the_one_in_memory(tmp_path):
    from transformers import AutoTokenizer

    embedded.tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(GOOD)["input_ids"] == embedded.tokenizer()(GOOD)["input_ids"]
    assert loaded.padding_side == "left"


def test_distinct_n_counts_n_grams_over_all_completions():
    assert embedded.distinct_n(["a b a b", "a b"], 1) == 2 / 6
    assert embedded.distinct_n(["a b a b", "a b"], 2) == 2 / 4  # ab ba ab | ab
    assert embedded.distinct_n(["a"], 2) == 0.0


def test_win_rate_counts_a_tie_as_half():
    bad = "the coffee."
    assert embedded.win_rate([PROMPT] * 4, [GOOD, GOOD, bad, bad], [bad, GOOD, GOOD, bad]) == 0.5
    assert embedded.win_rate([PROMPT], [GOOD], [bad]) == 1.0
