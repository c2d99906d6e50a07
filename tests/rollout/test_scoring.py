"""From episodes to trajectories: where the score lies, what counts, what follows what, and who is named on failure."""

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf.errors import TrainingError
from rlhf.models.policy import Policy
from rlhf.models.reference import frozen_copy
from rlhf.rollout.engine import Completion
from rlhf.rollout.episode import Episode, pack
from rlhf.rollout.sampled import final_scores, length_metrics, rollout_metrics
from rlhf.rollout.scoring import check_finite
from tests import tiny
from tests.rollout.episodes import completion, episode, sampled, score
from tests.rollout.sampling import alone

CPU = torch.device("cpu")


def episodes(rows: list[tuple[list[int], list[int]]], *, cut: tuple[int, ...] = (), version=0):
    """(prompt ids, completion ids) per row; rows in `cut` ended at the length limit. Sampling log-probs are -1, -2, ..."""
    return [
        episode(prompt, ids, [-1.0 - t for t in range(len(ids))], ended=row not in cut, version=version)
        for row, (prompt, ids) in enumerate(rows)
    ]


class Counting(torch.nn.Module):
    """A policy whose numbers are readable: the log-prob of a token is -token, the value before place t is 10 + t."""

    critic = object()

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, inputs, actions, *, with_values):
        self.batches.append(len(actions))
        places = torch.arange(actions.shape[1]).expand(actions.shape) + inputs["prompt_lengths"].unsqueeze(1)
        return SimpleNamespace(logprobs=-actions.float(), values=10.0 + places if with_values else None)


def scored(rows, scores, row_index=None, **options):
    return score(episodes(rows, **options), scores, Counting(), row_index=row_index, microbatch_tokens=1000)


THREE_TOKENS = [([3], [5, 6, tiny.EOS]), ([4, 4], [tiny.EOS]), ([3, 3, 3], [7, 8])]


def test_the_hand_table_of_a_three_token_example():
    """Rows: ended after three tokens; ended at once; cut by the length limit after two. '.' of the table is 0 or False."""
    got = scored(THREE_TOKENS, [1.5, -2.0, 0.25], cut=(2,))
    assert got.actions.tolist() == [[5, 6, 2], [2, 0, 0], [7, 8, 0]]
    assert got.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert got.rewards.tolist() == [[0, 0, 1.5], [-2.0, 0, 0], [0, 0.25, 0]]  # on the EOS itself, or the last token
    assert got.episode_ends.tolist() == [[False, False, True], [True, False, False], [False, True, False]]
    assert got.terminated.tolist() == [
        [False, False, True],
        [True, False, False],
        [False, False, False],
    ]  # not the cut one
    assert got.old_logprobs.tolist() == [[-5, -6, -2], [-2, 0, 0], [-7, -8, 0]]
    assert got.sampling_logprobs.tolist() == [[-1, -2, -3], [-1, 0, 0], [-1, -2, 0]]
    assert got.values.tolist() == [[11, 12, 13], [12, 0, 0], [13, 14, 0]]
    assert got.next_values.tolist() == [[12, 13, 0], [0, 0, 0], [14, 0, 0]]  # nothing follows the end
    assert got.row_tokens.tolist() == [4, 3, 5]
    assert got.ref_logprobs is None


def test_the_end_token_counts_although_padding_is_the_same_token():
    """Masks come from lengths: with EOS as padding and EOS as an ordinary early token nothing changes."""
    rows = [([3], [tiny.EOS, 5, tiny.EOS]), ([tiny.EOS], [tiny.EOS])]
    got = scored(rows, [1.0, 2.0])
    assert got.mask.tolist() == [[True, True, True], [True, False, False]]
    assert got.rewards.tolist() == [[0, 0, 1.0], [2.0, 0, 0]]


def test_rows_keep_their_place_in_the_global_batch_and_the_version_that_sampled_them():
    got = scored(THREE_TOKENS, [0.0] * 3, row_index=[7, 2, 5], version=4)
    assert got.row_index.tolist() == [7, 2, 5] and got.policy_version[got.mask].unique().tolist() == [4]


@pytest.mark.parametrize("microbatch_tokens", [1, 5, 6, 9, 10, 100])
def test_microbatches_of_any_size_give_the_same_rows_and_hold_no_more_than_asked(microbatch_tokens):
    policy, rows = Counting(), [(p, [*c, tiny.EOS]) for p, c in zip(tiny.sequences(9), tiny.sequences(9), strict=True)]
    whole = scored(rows, [0.0] * 9)
    got = score(episodes(rows), [0.0] * 9, policy, microbatch_tokens=microbatch_tokens)
    torch.testing.assert_close((got.old_logprobs, got.values), (whole.old_logprobs, whole.values), rtol=0, atol=0)
    longest = max(len(p) + len(c) for p, c in rows)
    assert sum(policy.batches) == 9
    assert all(count == 1 or count * longest <= microbatch_tokens for count in policy.batches)


def test_inputs_are_prompt_then_completion_then_padding():
    inputs, actions, mask, *_ = pack(episodes(THREE_TOKENS), CPU)
    assert inputs["input_ids"].tolist() == [[3, 5, 6, 2, 0], [4, 4, 2, 0, 0], [3, 3, 3, 7, 8]]
    assert inputs["prompt_lengths"].tolist() == [1, 2, 3]
    assert actions.shape == mask.shape == (3, 3)


# --- scores of completions without an end ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing_eos", "expected"),
    [("keep", [1.0, 2.0, -3.0]), ("replace", [1.0, -1.5, -1.5]), ("subtract", [1.0, 3.5, -1.5])],
)
def test_only_completions_cut_by_the_limit_are_treated_as_missing_eos_says(missing_eos, expected):
    """replace: N+ detail 23; subtract: TRL's missing_eos_penalty. How sampling ended counts, not the ids: the second row
    holds an EOS in its middle, and is cut all the same."""
    made = [episode([3], [5]), episode([3], [tiny.EOS, 5], ended=False), episode([3], [5], ended=False)]
    assert final_scores(sampled(made, [1.0, 2.0, -3.0]), missing_eos, -1.5) == expected


def test_an_episode_without_a_sampled_token_has_no_score_that_its_group_could_count():
    """As when an engine gives a request up: a score of 0 in its place would move the mean of the group."""
    given_up = Episode.of_turns([3, 4], [(Completion([], [], "aborted", []), ())])
    made = [given_up, episode([3, 4], [5, 2], ended=True)]
    for missing_eos, value in (("keep", 0.0), ("replace", -1.0), ("subtract", 1.0)):
        assert final_scores(sampled(made, [-5.0, -1.0]), missing_eos, value) == [None, -1.0]


def test_lengths_count_what_was_sampled_and_not_what_was_inserted_between():
    turns = [(completion([5, 6], ended=False), (7, 7, 7)), (completion([5]), ())]
    made = sampled([Episode.of_turns([3], turns)], [1.0], per_function={"mine": [1.0]})
    assert rollout_metrics([made], ["mine"], alone())["completion_length"] == 3
    assert length_metrics([made], "mine", alone())["completion_length_max"] == 3


# --- with a real policy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_reference_and_the_policy_are_scored_alike(family):
    lm = tiny.causal_lm(family, dtype=torch.float64)
    policy = Policy(lm, temperature=0.7, critic="head")
    same, other = (
        frozen_copy(lm, temperature=0.7),
        frozen_copy(tiny.causal_lm(family, seed=5).double(), temperature=0.7),
    )
    rows = [(p, [*c, tiny.EOS]) for p, c in zip(tiny.sequences(5), tiny.sequences(5, seed=1), strict=True)]
    got = score(episodes(rows), [0.0] * 5, policy, same, microbatch_tokens=30)
    assert torch.equal(got.old_logprobs, got.ref_logprobs)
    far = score(episodes(rows), [0.0] * 5, policy, other, microbatch_tokens=30)
    assert (far.ref_logprobs - far.old_logprobs).abs()[far.mask].min() > 1e-3
    for row, (prompt, ids) in enumerate(rows):  # by definition, one sequence alone
        logits = other.module.lm(input_ids=torch.tensor([prompt + ids])).logits[0] / 0.7
        for t, token in enumerate(ids):
            expected = logits.log_softmax(-1)[len(prompt) + t - 1, token].item()
            assert far.ref_logprobs[row, t].item() == pytest.approx(expected, abs=1e-8)
    assert not got.old_logprobs[~got.mask].any() and not far.ref_logprobs[~far.mask].any()


# --- numbers that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["rewards", "sampling_logprobs", "old_logprobs", "ref_logprobs", "values"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_stops_the_run_and_names_step_field_and_completion(field, value):
    trajectories = scored(THREE_TOKENS, [0.0] * 3, row_index=[7, 2, 5])
    object.__setattr__(trajectories, "ref_logprobs", torch.zeros(3, 3))
    check_finite(trajectories, 12)
    getattr(trajectories, field)[1, 0] = value
    with pytest.raises(TrainingError, match=f"{field} of step 12, completion 2 .*not finite; nothing was learnt"):
        check_finite(trajectories, 12)
