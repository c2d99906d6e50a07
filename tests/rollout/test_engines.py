"""Two engines behind one port: both keep what an engine promises, and both trainers run on either."""

from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from rlhf import GRPOConfig, GRPOTrainer, GRPOTrainerConfig, TrainingError, UpdateConfig
from rlhf.core.random import EVALUATION, SAMPLING, uniform
from rlhf.models.policy import Policy
from rlhf.rollout.engine import EngineLost, GenerationConfig, Promises, RolloutEngine, Span
from rlhf.rollout.in_process import InProcessEngine
from rlhf.runs.jsonlines import read_metrics
from tests import tiny
from tests.rollout.conformance import Conformance
from tests.rollout.sampling import alone
from tests.rollout.scripted import ScriptedEngine


class TestInProcess(Conformance):
    def make(self, lm) -> RolloutEngine:
        return InProcessEngine(Policy(lm), alone())

    def test_it_keeps_its_promise_of_bits(self, engine, lm):
        """Whatever is sampled beside a completion, in float64 to a rounding error."""
        assert engine.promises.stateless and engine.promises.exact


def slow_script(lm):
    """Writes down what the model would say: one token after the other, without a cache, by the definition of a draw."""

    def script(request, sampling):
        key, text, logprobs = request.key, list(request.ids), []
        for place in range(request.max_new_tokens or sampling.max_new_tokens):
            with torch.no_grad():
                logits = lm(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].double()
            chances = (logits / sampling.temperature).softmax(-1)
            draw = uniform(key.seed, key.stream, place + key.turn * 2**20, key.copy, key.slot, key.step)
            token = int(logits.argmax()) if sampling.greedy else int((chances.cumsum(-1) > draw).nonzero()[0])
            text.append(token)
            logprobs.append(chances[token].log().item())
        return text[len(request.ids) :], logprobs

    return script


class TestScripted(Conformance):
    def make(self, lm) -> RolloutEngine:
        return ScriptedEngine(slow_script(lm))


class TestWithState(Conformance):
    """An engine as servers are: what it draws depends on what it drew before, and its log-probs are rough."""

    def make(self, lm) -> RolloutEngine:
        count = iter(range(10**6))
        script = slow_script(lm)

        def drawn_anew(request, sampling):
            ids, logprobs = script(replace(request, key=request.key._replace(step=next(count))), sampling)
            return ids, [min(0.0, value + 0.02 * (-1) ** place) for place, value in enumerate(logprobs)]

        return ScriptedEngine(drawn_anew, promises=Promises(stateless=False, exact=False, logprob_gap=0.5))


def ppo(out, lm, **options):
    settings = {"total_steps": 3, "eval_dataset": tiny.rows(["abc"]), "eval_every": 2, "ppo": {"kl_target": 0.5}}
    return tiny.trainer(out, lm=lm, **{**settings, **options})


def grpo(out, lm, **options):
    config = GRPOTrainerConfig(
        output_dir=str(out),
        total_steps=3,
        prompts_per_step=4,
        learning_rate=1e-2,
        checkpoint_every=0,
        generation=GenerationConfig(max_new_tokens=6),
        grpo=GRPOConfig(completions_per_prompt=3, dynamic_sampling_rounds=2, kl_coef=0.05),
        update=UpdateConfig(num_epochs=2, minibatch_size=6),
    )
    return GRPOTrainer(lm, tiny.count_target, tiny.rows(), config, tokenizer=tiny.tokenizer(), **options)


TRAINERS = {"ppo": ppo, "grpo": grpo}


@pytest.mark.parametrize("name", TRAINERS)
def test_both_trainers_run_on_another_engine_through_the_port_alone(name, tmp_path):
    """The script says what the policy itself would have said, so the run is the same but for rounding."""
    own = TRAINERS[name](tmp_path / "own", tiny.causal_lm(dtype=torch.float64))
    own.train()
    lm = tiny.causal_lm(dtype=torch.float64)
    engine = ScriptedEngine(slow_script(lm))
    scripted = TRAINERS[name](tmp_path / "scripted", lm, engine=engine)
    scripted.train()
    assert [version for version, _ in engine.synced] == [0, 0, 1, 2, 3]  # made, begun, and after each step
    assert not torch.equal(
        *(
            weights["lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"]
            for _, weights in engine.synced[1:3]
        )
    )
    streams = {request.key.stream for request in engine.asked}
    assert streams == ({SAMPLING, EVALUATION} if name == "ppo" else {SAMPLING})
    keys = [(request.key, tuple(request.ids)) for request in engine.asked if request.key.stream == SAMPLING]
    assert len(set(keys)) == len(keys)  # no completion is asked for twice
    for line, wanted in zip(read_metrics(tmp_path / "scripted"), read_metrics(tmp_path / "own"), strict=True):
        assert line == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("name", TRAINERS)
def test_an_engine_whose_logprobs_are_not_the_policys_ends_the_run_at_the_step_that_shows_it(name, tmp_path):
    lm = tiny.causal_lm()
    script = slow_script(lm)

    def stale(request, sampling):
        """From the second step on it samples with other weights."""
        if request.key.step == 0:
            return script(request, sampling)
        return slow_script(other)(request, sampling)

    other = tiny.causal_lm(seed=5)
    with pytest.raises(TrainingError, match=r"nats in step 1 .*not the same policy"):
        TRAINERS[name](tmp_path, lm, engine=ScriptedEngine(stale)).train()
    assert [line["step"] for line in read_metrics(tmp_path)] == [0]
    assert (tmp_path / "checkpoints" / "step-000001").is_dir()  # the step before it is not lost


def test_an_engine_that_promises_less_is_held_to_what_it_promises(tmp_path):
    lm = tiny.causal_lm()
    script = slow_script(lm)

    def rough(request, sampling):
        ids, logprobs = script(request, sampling)
        return ids, [value - 0.05 * (place % 2) for place, value in enumerate(logprobs)]

    engine = ScriptedEngine(rough, promises=Promises(stateless=False, exact=False, logprob_gap=0.5))
    ppo(tmp_path, lm, engine=engine).train()
    assert max(line["sampler_gap"] for line in read_metrics(tmp_path)) == pytest.approx(0.05, abs=1e-4)


# --- engines that fail ---


class Fails(ScriptedEngine):
    """Does something else than answer, from the `at`-th submission of training on."""

    def __init__(self, lm, instead, at: int = 2) -> None:
        super().__init__(slow_script(lm))
        self.instead = instead
        self.left = at

    def submit(self, requests, sampling):
        self.left -= 1
        return super().submit(requests, sampling) if self.left else self.instead(self, requests, sampling)


def loses(engine, requests, sampling):
    raise EngineLost("the server is gone")


def loses_late(engine, requests, sampling):
    futures = super(Fails, engine).submit(requests, sampling)
    futures[-1] = Future()
    futures[-1].set_exception(EngineLost("the server is gone"))
    return futures


def hangs(engine, requests, sampling):
    return [Future() for _ in requests]


def cancels(engine, requests, sampling):
    futures = hangs(engine, requests, sampling)
    for future in futures:
        future.cancel()
    return futures


def answers_less(engine, requests, sampling):
    return super(Fails, engine).submit(requests[1:], sampling)


def leaves_out_a_version(engine, requests, sampling):
    futures = super(Fails, engine).submit(requests, sampling)
    whole = futures[3].result()
    futures[3] = Future()
    futures[3].set_result(replace(whole, versions=[]))
    return futures


def leaves_out_logprobs(engine, requests, sampling):
    futures = super(Fails, engine).submit(requests, sampling)
    whole = futures[0].result()
    futures[0] = Future()
    futures[0].set_result(replace(whole, logprobs=whole.logprobs[:-1]))
    return futures


def gives_nothing(engine, requests, sampling):
    futures = [Future() for _ in requests]
    for future in futures:
        future.set_result(None)
    return futures


def changed(index, **fields):
    """One answer with other fields."""

    def answers(engine, requests, sampling):
        futures = super(Fails, engine).submit(requests, sampling)
        whole = futures[index].result()
        futures[index] = Future()
        futures[index].set_result(replace(whole, **fields))
        return futures

    return answers


def forgets_its_version(engine, requests, sampling):
    engine.version = -1
    raise EngineLost("the server is gone")


@pytest.mark.parametrize("lost", [loses, loses_late, forgets_its_version])
@pytest.mark.parametrize("name", TRAINERS)
def test_a_lost_engine_is_started_again_and_the_run_is_what_it_would_have_been(lost, name, tmp_path):
    lm = tiny.causal_lm(num_hidden_layers=1)
    TRAINERS[name](tmp_path / "whole", lm, engine=ScriptedEngine(slow_script(lm))).train()
    lm = tiny.causal_lm(num_hidden_layers=1)
    engine = Fails(lm, lost)
    TRAINERS[name](tmp_path / "lost", lm, engine=engine).train()
    assert engine.restarts == 1
    assert (tmp_path / "lost/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("instead", "message"),
    [
        (hangs, r"within engine_timeout_s=0\.2.*Nothing was trained"),
        (cancels, "engine was lost"),
        (answers_less, r"answers to \d+ requests"),
        (leaves_out_a_version, r"request 3 .*versions \[\]"),
        (leaves_out_logprobs, r"request 0 .*log-probs"),
        (gives_nothing, r"request 0 is of type NoneType"),
        (changed(2, ids=[-5], logprobs=[-1.0], versions=[Span(1, 0, 1)]), r"request 2 has 1 tokens.*below 0"),
        (changed(1, ids=[3] * 50, logprobs=[-1.0] * 50, versions=[Span(1, 0, 50)]), r"request 1 has 50 tokens, more"),
        (changed(0, ids=[3], logprobs=[-1.0], versions=[Span(1, 0, 1)], ended="stop"), r"request 0 ended by 'stop'"),
    ],
)
def test_an_engine_that_does_not_answer_as_it_should_ends_the_run_with_the_steps_so_far(instead, message, tmp_path):
    lm = tiny.causal_lm(num_hidden_layers=1)
    trainer = ppo(tmp_path, lm, engine=Fails(lm, instead), eval_dataset=None, engine_timeout_s=0.2)
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert len(read_metrics(tmp_path)) == 1 and (tmp_path / "checkpoints" / "step-000001").is_dir()


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_after_which_the_engine_takes_no_weights_is_logged_and_saved(name, tmp_path):
    class Full(ScriptedEngine):
        def sync(self, weights, version, **options):
            if version == 2:
                raise OSError("no room for the weights")
            super().sync(weights, version, **options)

    lm = tiny.causal_lm(num_hidden_layers=1)
    with pytest.raises(OSError, match="no room"):
        TRAINERS[name](tmp_path, lm, engine=Full(slow_script(lm))).train()
    assert len(read_metrics(tmp_path)) == 2 and (tmp_path / "checkpoints" / "step-000002").is_dir()


def test_an_engine_that_has_no_weights_yet_can_be_asked_before_the_run(tmp_path):
    lm = tiny.causal_lm(num_hidden_layers=1)
    trainer = ppo(tmp_path, lm, engine=ScriptedEngine(slow_script(lm)))
    assert "eval/score" in trainer.evaluate()


def test_a_run_says_that_an_engine_with_state_repeats_nothing(tmp_path, capsys):
    lm = tiny.causal_lm(num_hidden_layers=1)
    engine = ScriptedEngine(slow_script(lm), promises=Promises(stateless=False, exact=True, logprob_gap=0.1))
    ppo(tmp_path, lm, engine=engine, total_steps=1).train()
    assert "note: this engine's completions depend on what else it computes" in capsys.readouterr().out


class Stays(ScriptedEngine):
    """It never takes new weights, and says so."""

    def sync(self, weights, version, **options):
        self.version = 0


class Lies(ScriptedEngine):
    """It never takes new weights, and says so of its completions alone."""

    def submit(self, requests, sampling):
        says, self.version = self.version, 0
        futures = super().submit(requests, sampling)
        self.version = says
        return futures


@pytest.mark.parametrize(
    ("kind", "message"), [(Stays, "mend its sync"), (Lies, "with those after 0. Nothing was trained")]
)
@pytest.mark.parametrize("name", TRAINERS)
def test_an_engine_that_stays_on_its_first_weights_ends_the_run(name, kind, message, tmp_path):
    lm = tiny.causal_lm(num_hidden_layers=1)
    first = tiny.causal_lm(num_hidden_layers=1)
    with pytest.raises(TrainingError, match=message):
        TRAINERS[name](tmp_path, lm, engine=kind(slow_script(first))).train()
    assert len(read_metrics(tmp_path)) == 1 and (tmp_path / "checkpoints" / "step-000001").is_dir()
