"""How a run of the trainer ends before its time: by a callback, by an error, by settings that cannot work."""

import math
import os
import signal
import time

import pytest
import torch

from rlhf import Callback, InputError, TrainingError
from rlhf.runs.jsonlines import read_metrics
from tests import tiny
from tests.tiny import AtStep, furthest, weights

# --- stopping -----------------------------------------------------------------------------------------------------------


def test_a_callback_can_end_the_run_and_the_state_is_saved(tmp_path):
    stop = AtStep(1, lambda trainer: setattr(trainer, "should_stop", True))
    trainer = tiny.trainer(tmp_path, total_steps=5, callbacks=[stop])
    trainer.train()
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]
    assert (tmp_path / "checkpoints" / "step-000002").is_dir() and (tmp_path / "policy").is_dir()


def test_callbacks_are_called_in_the_order_of_the_run_with_the_logged_numbers(tmp_path):
    calls = []

    class Watch(Callback):
        def on_train_start(self, trainer):
            calls.append("start")

        def on_step_end(self, trainer, step, metrics):
            calls.append((step, metrics["score"]))

        def on_evaluate(self, trainer, step, metrics):
            calls.append("evaluate")

        def on_train_end(self, trainer):
            calls.append("end" if (tmp_path / "policy").is_dir() else "too early")

    tiny.trainer(tmp_path, total_steps=2, eval_dataset=tiny.rows(["abc"]), callbacks=[Watch()]).train()
    first, second = read_metrics(tmp_path)
    assert calls == ["start", (0, first["score"]), "evaluate", (1, second["score"]), "end"]


def test_a_trainer_that_has_trained_continues_but_does_not_start_again(tmp_path):
    """Its policy is no longer the one it was given; nothing of the finished run is touched."""
    trainer = tiny.trainer(tmp_path, total_steps=2, callbacks=[stop_after(0)])
    trainer.train()
    written = (tmp_path / "metrics.jsonl").read_bytes()
    for options in ({}, {"overwrite": True}):
        with pytest.raises(InputError, match=r"train: .*resume=True.*new trainer"):
            trainer.train(**options)
    assert (tmp_path / "metrics.jsonl").read_bytes() == written
    trainer.callbacks = []
    trainer.train(resume=True)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_a_refused_run_does_not_keep_its_directory_locked(tmp_path):
    tiny.trainer(tmp_path, total_steps=1).train()
    refused = tiny.trainer(tmp_path, seed=1)
    with pytest.raises(InputError, match="seed"):
        refused.train(resume=True)
    tiny.trainer(tmp_path, total_steps=1).train(resume=True)


def failing_at(step: int, value=None):
    def reward(completions, target, trainer_state):
        scores = tiny.count_target(completions, target)
        if trainer_state["global_step"] == step:
            if value is None:
                raise ZeroDivisionError("ask the judge later")
            scores[2] = value
        return scores

    return reward


@pytest.mark.parametrize("value", [None, math.nan, math.inf, 3e38])
def test_a_reward_that_fails_names_itself_and_leaves_the_steps_before_it_whole(value, tmp_path):
    """Weights are those after step 1, bit for bit, on disk and in memory."""
    good = tiny.trainer(tmp_path / "good", total_steps=4, callbacks=[stop_after(1)])
    good.train()
    trainer = tiny.trainer(tmp_path / "bad", rewards=failing_at(2, value), total_steps=4)
    with pytest.raises(
        InputError, match="'reward'.*" + ("ZeroDivisionError: ask the judge" if value is None else "row 2")
    ):
        trainer.train()
    assert furthest(weights(trainer), weights(good)) == 0.0
    checkpoints = [path / "checkpoints" / "step-000002" for path in (tmp_path / "good", tmp_path / "bad")]
    for name in ("policy.safetensors", "optimizer.safetensors", "state.json"):
        assert (checkpoints[0] / name).read_bytes() == (checkpoints[1] / name).read_bytes()
    assert not (tmp_path / "bad" / "policy").exists()  # nothing pretends to be the result


def stop_after(step: int) -> AtStep:
    return AtStep(step, lambda trainer: setattr(trainer, "should_stop", True))


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("timeout_s", [None, 60.0])
def test_a_copy_that_a_reward_function_forks_and_that_comes_back_does_not_train_along(kind, timeout_s, tmp_path):
    """The function is called once in each step, in this process alone, and every child of it has ended."""
    calls, children = tmp_path / "calls", []

    def score(completions, target):
        pid = os.fork()
        if pid:
            children.append(pid)
            os.waitpid(pid, 0)
        with calls.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return tiny.count_target(completions, target)

    async def later(completions, target):
        return score(completions, target)

    reward = score if kind == "sync" else later
    tiny.trainer(tmp_path / "run", rewards=reward, total_steps=2, reward_timeout_s=timeout_s).train()
    assert calls.read_text().split().count(str(os.getpid())) == 2 and len(children) == 2
    assert len(calls.read_text().split()) == 4  # each child once, and no step of its own


def test_a_forked_copy_that_lives_on_does_not_keep_the_runs_directory_locked(tmp_path):
    children = []

    def score(completions, target):
        children.append(os.fork())
        if children[-1] == 0:
            time.sleep(60)
            os._exit(0)
        return tiny.count_target(completions, target)

    try:
        tiny.trainer(tmp_path, rewards=score, total_steps=1).train()
        tiny.trainer(tmp_path, total_steps=1).train(overwrite=True)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("place", ["the first minibatch", "a later minibatch"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_touches_the_weights(place, tmp_path):
    trainer = tiny.trainer(tmp_path, total_steps=2, callbacks=[])
    after = 0 if place == "the first minibatch" else 2
    history, backwards = [weights(trainer)], []
    trainer.learner.optimizer.register_step_post_hook(lambda *args: history.append(weights(trainer)))
    parameter = next(trainer.policy.parameters())

    def poison(gradient):
        backwards.append(1)
        return torch.full_like(gradient, math.nan) if len(backwards) == after + 1 else gradient

    parameter.register_hook(poison)
    with pytest.raises(TrainingError, match=r"gradient of step 0.*not finite; it was not applied"):
        trainer.train()
    assert len(history) == after + 1
    assert furthest(weights(trainer), history[-1]) == 0.0
    assert not list((tmp_path / "checkpoints").iterdir())  # half an update belongs to no step


def test_a_model_that_gives_no_numbers_is_stopped_and_the_first_completion_named(tmp_path):
    lm = tiny.causal_lm()
    trainer = tiny.trainer(tmp_path, lm=lm)
    lm.get_output_embeddings().weight.data[5] = math.nan
    with pytest.raises(TrainingError, match="of step 0, completion 0 are not finite"):
        trainer.train()
    with pytest.raises(InputError, match=r"LlamaForCausalLM gives log-probs that are not numbers.*weights"):
        tiny.trainer(tmp_path / "again", lm=lm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_refused_because_small_updates_would_vanish(dtype, tmp_path):
    with pytest.raises(InputError, match=r"policy.*float16.*float32"):
        tiny.trainer(tmp_path, lm=tiny.causal_lm(dtype=dtype))


def test_prompts_and_completions_beyond_the_models_positions_are_refused_before_training(tmp_path):
    with pytest.raises(InputError, match=r"max_new_tokens=60: with the longest prompt that makes 67 tokens.*for 64"):
        tiny.trainer(tmp_path, generation={"max_new_tokens": 60})


def test_a_minibatch_size_that_does_not_divide_the_step_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"update.minibatch_size=3 does not divide the 4 completions"):
        tiny.trainer(tmp_path, update={"minibatch_size": 3})
