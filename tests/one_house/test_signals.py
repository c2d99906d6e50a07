"""Ctrl-C and SIGTERM end a run after the current step, saved; a second one ends it at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rlhf.runs.signals import Interrupted
from rlhf.training.learner import Learner
from tests.one_house.worlds import ROOT, WORLDS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("world", WORLDS)
def test_a_signal_in_the_middle_of_a_step_ends_the_run_after_it_saved_and_free(world, number, tmp_path, monkeypatch):
    world.start(tmp_path / "whole")
    learn, steps = Learner.learn, []

    def pressed(self, *args, **kwargs):
        steps.append(kwargs["step"])
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        return learn(self, *args, **kwargs)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as raised:
        patch.setattr(Learner, "learn", pressed)
        world.start(tmp_path / "parts")
    assert raised.value.number == number and steps == [0, 1] and signal.getsignal(number) is before
    assert not (tmp_path / "parts" / world.weights_file).exists()  # nothing pretends to be the result
    world.start(tmp_path / "parts", resume=True)
    assert world.left(tmp_path / "parts") == world.left(tmp_path / "whole")


@pytest.mark.parametrize("world", WORLDS)
def test_a_second_signal_ends_the_run_at_once_and_one_that_a_launcher_repeats_does_not(world, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.runs.signals.SAME_SIGNAL_S", 0.2)
    learn, reached = Learner.learn, []

    def pressed(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # the same, by way of a launcher
        reached.append("after the first")
        time.sleep(0.3)
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second")
        return learn(self, *args, **kwargs)

    monkeypatch.setattr(Learner, "learn", pressed)
    with pytest.raises(Interrupted):
        world.start(tmp_path)
    assert reached == ["after the first"]


COMMANDS = {
    "tokens": "from tests import tiny; from rlhf.commands.cli import guard\n"
    "with guard(): tiny.trainer({out!r}, total_steps=100000).train()",
    "control": "from gym_baselines.__main__ import main\n"
    "main(['train', '--env', 'CartPole-v1', '--total_steps', '100000000', '--output_dir', {out!r}])",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_a_signal_ends_says_what_is_saved_and_exits_as_shells_expect(name, number, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-u", "-c", COMMANDS[name].format(out=str(out))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
            assert process.poll() is None, process.communicate()
        process.send_signal(number)
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors[-2000:]
    assert "the run ends after this step" in errors and "Traceback" not in errors
    assert "continue with resume" in printed and list((out / "checkpoints").glob("step-*"))
