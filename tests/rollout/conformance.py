"""What every rollout engine promises, as tests to be inherited: `class TestMine(Conformance): def make(self, lm): ...`.

`make(lm)` gives an engine that samples with the weights of `lm`, a tiny Llama, once they have been synced. Nothing here
looks inside an engine. A server's engine runs the same suite against a real server.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rlhf.core.random import EVALUATION, SAMPLING
from rlhf.models.policy import Policy
from rlhf.rollout.engine import Completion, Key, Request, RolloutEngine, Sampling
from rlhf.rollout.episode import single_turn
from rlhf.training.weights import named_tensors
from tests import tiny
from tests.rollout.episodes import score
from tests.rounding import EPS

PROMPTS = tiny.sequences(4, seed=3, longest=9)
SAMPLED = Sampling(max_new_tokens=5, temperature=0.7, end_ids=(tiny.EOS, 5))


def requests(prompts: Sequence[Sequence[int]] = PROMPTS, *, copies: int = 3, **key: Any) -> list[Request]:
    fields = {"seed": 11, "stream": SAMPLING, "step": 3} | key
    return [Request(p, Key(**fields, slot=slot, copy=copy)) for slot, p in enumerate(prompts) for copy in range(copies)]


def answers(engine: RolloutEngine, asked: Sequence[Request], sampling: Sampling = SAMPLED) -> list[Completion]:
    return [future.result(timeout=60) for future in engine.submit(asked, sampling)]


def assert_equal(engine: RolloutEngine, got: Sequence[Completion], wanted: Sequence[Completion]) -> None:
    """The same tokens, ends and versions, and log-probs as near as the engine promises; as many, if it has state."""
    for one, other in zip(got, wanted, strict=True):
        if not engine.promises.stateless:
            continue
        assert (one.ids, one.ended, one.versions) == (other.ids, other.ended, other.versions)
        assert one.logprobs == pytest.approx(
            other.logprobs, abs=2048 * EPS if engine.promises.exact else engine.promises.logprob_gap
        )


class Conformance:
    """Inherit from it, and define `make`."""

    def make(self, lm: Any) -> RolloutEngine:
        raise NotImplementedError

    @pytest.fixture
    def lm(self) -> Any:
        return tiny.causal_lm()

    @pytest.fixture
    def engine(self, lm):
        engine = self.make(lm)
        engine.sync(lambda: named_tensors(lm).items(), 7)
        yield engine
        engine.close()

    def test_every_request_is_answered_in_order_within_its_limits(self, engine):
        asked = requests()
        found = answers(engine, asked)
        assert len(found) == len(asked)
        for completion in found:
            assert 1 <= len(completion.ids) == len(completion.logprobs) <= SAMPLED.max_new_tokens
            assert all(math.isfinite(value) and value <= 1e-6 for value in completion.logprobs)
            ends = [token in SAMPLED.end_ids for token in completion.ids]
            assert not any(ends[:-1]) and ends[-1] == (completion.ended == "stop")
            assert completion.ended == "stop" or len(completion.ids) == SAMPLED.max_new_tokens
        assert {completion.ended for completion in found} == {"stop", "length"}  # a case worth looking at

    def test_a_requests_own_limit_comes_before_the_submissions(self, engine):
        asked = requests(copies=2)
        mixed = [r if i % 2 else Request(r.ids, r.key, max_new_tokens=2) for i, r in enumerate(asked)]
        whole, cut = answers(engine, asked), answers(engine, mixed)
        for i, (long, short) in enumerate(zip(whole, cut, strict=True)):
            assert len(short.ids) <= (SAMPLED.max_new_tokens if i % 2 else 2)
            if not engine.promises.stateless:
                continue
            assert short.ids == (long.ids if i % 2 else long.ids[:2])
            assert short.ended == (long.ended if i % 2 or len(long.ids) <= 2 else "length")

    def test_versions_are_those_of_the_last_sync_and_cover_every_token(self, engine, lm):
        for version, in_flight in ((7, "wait"), (12, "wait"), (13, "continue")):
            engine.sync(lambda: named_tensors(lm).items(), version, in_flight=in_flight)
            assert engine.version == version
            for completion in answers(engine, requests(copies=1)):
                spans = completion.versions
                assert {span.version for span in spans} == {version}
                covered = [place for span in spans for place in range(span.start, span.end)]
                assert covered == list(range(len(completion.ids)))

    def test_asking_again_with_equal_keys_gives_equal_completions(self, engine):
        assert_equal(engine, answers(engine, requests()), answers(engine, requests()))

    def test_neither_order_nor_company_changes_a_completion(self, engine):
        asked = requests()
        together = answers(engine, asked)
        assert_equal(engine, answers(engine, asked[::-1])[::-1], together)
        assert_equal(engine, [answers(engine, [request])[0] for request in asked[:4]], together[:4])

    def test_every_part_of_the_key_changes_the_draws(self, engine):
        hot = Sampling(max_new_tokens=12, temperature=3.0, end_ids=())
        prompt = [PROMPTS[0]]
        kinds = [{}, {"seed": 12}, {"stream": EVALUATION}, {"step": 4}, {"turn": 1}]
        found = [answers(engine, requests(prompt, copies=2, **kind), hot) for kind in kinds]
        found.append(answers(engine, requests([PROMPTS[0]] * 2, copies=1), hot)[1:])  # another slot
        texts = [tuple(completion.ids) for completions in found for completion in completions]
        assert len(set(texts)) == len(texts) == 11  # one chance in 10^9 that two of them agree

    def test_greedy_completions_take_the_likeliest_token_each_time(self, engine, lm):
        greedy = Sampling(max_new_tokens=8, temperature=0.7, end_ids=(tiny.EOS,), greedy=True)
        for prompt, completion in zip(PROMPTS, answers(engine, requests(copies=1), greedy), strict=True):
            stock = lm.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
            assert completion.ids == stock.tolist()

    def test_logprobs_are_those_of_the_training_forward_as_far_as_is_promised(self, engine, lm):
        """Of softmax(logits / temperature), token by token; in the mean ten times nearer, if they are not exact."""
        asked = requests()
        found = answers(engine, asked)
        episodes = [single_turn(r.ids, c) for r, c in zip(asked, found, strict=True)]
        scored = score(episodes, [0.0] * len(episodes), Policy(lm, temperature=SAMPLED.temperature))
        gaps = (scored.sampling_logprobs - scored.old_logprobs)[scored.mask].abs()
        assert gaps.max() < (1024 * EPS if engine.promises.exact else engine.promises.logprob_gap)
        assert gaps.mean() < 0.1 * engine.promises.logprob_gap

    def test_a_later_turn_goes_on_from_every_token_so_far(self, engine, lm):
        """The second completion is that of the whole text, and its draws are its own."""
        (first,) = answers(engine, requests([PROMPTS[0]], copies=1))
        text = [*PROMPTS[0], *first.ids, 4, 6]
        (second,) = answers(engine, requests([text], copies=1, turn=1))
        scored = score([single_turn(text, second)], [0.0], Policy(lm, temperature=SAMPLED.temperature))
        gaps = (scored.sampling_logprobs - scored.old_logprobs)[scored.mask].abs()
        assert gaps.max() < (1024 * EPS if engine.promises.exact else engine.promises.logprob_gap)

    def test_after_a_restart_and_a_sync_it_answers_as_before(self, engine, lm):
        before = answers(engine, requests())
        engine.restart()
        engine.sync(lambda: named_tensors(lm).items(), 7)
        assert_equal(engine, answers(engine, requests()), before)

    def test_nothing_asked_is_nothing_answered(self, engine):
        assert engine.submit([], SAMPLED) == []
