"""The embedded task of GRPO: answers are right by Python's own arithmetic, data are a function of the seed, and what is
measured is what is said."""

import json
from itertools import combinations
from random import Random

import arithmetic
import pytest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "NUM_SFT", 2000)  # the recipe's own size differs only in number
        yield arithmetic.write_data(tmp_path_factory.mktemp("data"), seed=3)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers(prompt):
    left, right = prompt.removesuffix("=").split("+")
    return int(left), int(right)


def test_answers_are_right_by_pythons_own_arithmetic(data):
    for name in ("prompts_train", "prompts_test"):
        for row in rows(data[name]):
            assert row == {"prompt": row["prompt"], "answer": str(sum(numbers(row["prompt"])))}


def test_prompts_are_all_sums_of_two_digit_numbers_once(data):
    found = [numbers(row["prompt"]) for name in ("prompts_train", "prompts_test") for row in rows(data[name])]
    assert len(found) == len(set(found))
    assert {n for pair in found for n in pair} == set(range(10, 100))
    held_out = {tuple(sorted(numbers(row["prompt"]))) for row in rows(data["prompts_test"])}
    expected = {(a, b) for a in range(10, 100) for b in range(10, 100) if tuple(sorted((a, b))) not in held_out}
    assert expected == {numbers(row["prompt"]) for row in rows(data["prompts_train"])}


def test_no_held_out_problem_occurs_in_training_also_not_with_its_numbers_exchanged(data):
    def problems(*names):
        return {frozenset(numbers(row["prompt"])) for name in names for row in rows(data[name])}

    train, test = problems("sft", "prompts_train"), problems("sft_test", "prompts_test")
    assert len(test) == arithmetic.NUM_TEST and not train & test


def test_same_seed_same_bytes_other_seed_other_bytes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "NUM_SFT", 2000)
    again, other = arithmetic.write_data(tmp_path / "again", seed=3), arithmetic.write_data(tmp_path / "other", seed=4)
    assert set(data) == {"sft", "sft_test", "prompts_train", "prompts_test"}
    for name, path in data.items():
        assert path.read_bytes() == again[name].read_bytes()
        assert path.read_bytes() != other[name].read_bytes()


def test_data_are_never_written_over_something_else(tmp_path):
    (tmp_path / "mine.txt").write_text("a user's file")
    with pytest.raises(ValueError, match="not empty"):
        arithmetic.write_data(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_pupil_who_never_forgets_adds_and_one_who_always_does_adds_digit_by_digit(monkeypatch):
    random = Random(0)
    problems = [(random.randrange(10, 100), random.randrange(10, 100)) for _ in range(300)]
    monkeypatch.setattr(arithmetic, "FORGOTTEN_CARRIES", 0.0)
    assert all(arithmetic.add_like_a_pupil(a, b, random) == a + b for a, b in problems)
    monkeypatch.setattr(arithmetic, "FORGOTTEN_CARRIES", 1.0)
    for a, b in problems:
        digits = [(x + y) % 10 for x, y in zip(divmod(a, 10), divmod(b, 10), strict=True)]
        assert arithmetic.add_like_a_pupil(a, b, random) == 10 * digits[0] + digits[1]


@pytest.mark.parametrize(
    ("problem", "expected"),
    [((12, 34), {46: 1.0}), ((17, 25), {42: 0.5, 32: 0.5}), ((47, 85), {132: 0.25, 122: 0.25, 32: 0.25, 22: 0.25})],
)
def test_a_pupil_forgets_each_carry_independently_half_of_the_time(problem, expected):
    random, draws = Random(1), 4000
    found = [arithmetic.add_like_a_pupil(*problem, random) for _ in range(draws)]
    assert set(found) == set(expected)
    for answer, chance in expected.items():  # 5 standard errors
        assert abs(found.count(answer) / draws - chance) <= 5 * (chance * (1 - chance) / draws) ** 0.5


def test_demonstrations_are_right_half_of_the_time_and_never_above_the_promised_60_percent(data):
    right = [int(row["completion"]) == sum(numbers(row["prompt"])) for row in rows(data["sft"])]
    assert 0.5 < sum(right) / len(right) < 0.6


def test_text_and_tokens_correspond_one_to_one_and_special_tokens_are_apart(data, tmp_path):
    from transformers import AutoTokenizer

    arithmetic.tokenizer().save_pretrained(tmp_path)
    for tokenizer in (arithmetic.tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        specials = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
        assert len(set(specials)) == 4 and tokenizer.padding_side == "left"
        for row in rows(data["sft"])[:100]:
            for text in row.values():
                ids = tokenizer(text)["input_ids"]
                assert len(ids) == len(text) and not set(specials) & set(ids)
                assert tokenizer.decode(ids) == text
        for ids in ([4], [4, 4], [13, 4, 14, 5, 15]):
            assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_one(num_samples):
    for num_right in range(num_samples + 1):
        answers = [True] * num_right + [False] * (num_samples - num_right)
        for k in range(1, num_samples + 1):
            subsets = list(combinations(answers, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert arithmetic.pass_at_k(num_samples, num_right, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_1_is_the_accuracy_and_impossible_counts_are_refused():
    assert arithmetic.pass_at_k(16, 5, 1) == pytest.approx(5 / 16, abs=1e-15)
    for num_samples, num_right, k in ((4, 5, 1), (4, 2, 5), (4, 2, 0), (4, -1, 1)):
        with pytest.raises(ValueError, match="pass_at_k"):
            arithmetic.pass_at_k(num_samples, num_right, k)
