"""Two engines behind one port: both keep what an engine promises, and both trainers run on either."""

import pytest
import torch

from rlhf import GRPOConfig, GRPOTrainer, GRPOTrainerConfig, TrainingError, UpdateConfig
from rlhf.core.random import EVALUATION, SAMPLING, uniform
from rlhf.models.policy import Policy
from rlhf.rollout.engine import GenerationConfig, Promises, RolloutEngine
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
    assert [version for version, _ in engine.synced] == [0, 1, 2, 3]
    assert not torch.equal(
        *(
            weights["lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"]
            for _, weights in engine.synced[:2]
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
