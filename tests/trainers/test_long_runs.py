"""Promises of other tests at the sizes of docs/reliability.md: more steps, more processes, more places.

This file is also the program whose ten processes must leave the same bytes.
"""

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf import InputError, TrainingError
from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.ppo import PPO
from rlhf.layout import Replicated
from rlhf.rollout import scoring
from rlhf.rollout.scoring import Scorer
from rlhf.runs.jsonlines import read_metrics
from rlhf.runs.signals import Interrupted
from tests import tiny
from tests.adapters import lora, trained_peft
from tests.one_house.worlds import WORLDS, At, Control, Tokens
from tests.rounding import EPS
from tests.tiny import AtStep, furthest, weights
from tests.trainers import grpo_runs
from tests.trainers.test_interruption import PACKAGE, Stopped, differing, make_trainer, run_until_stopped, stop

pytestmark = pytest.mark.slow


def left(output_dir: Path) -> dict[str, bytes]:
    """The bytes of metrics, completions, policy and last checkpoint; its manifest names the settings, which may differ."""
    last = max((output_dir / "checkpoints").glob("step-*"))
    files = [output_dir / "metrics.jsonl", output_dir / "completions.jsonl", *sorted((output_dir / "policy").iterdir())]
    files += [file for file in last.iterdir() if file.name != "MANIFEST.json"]
    return {str(file.relative_to(output_dir)): file.read_bytes() for file in files}


# --- resumed at every step, and in the middle of one --------------------------------------------------------------------

N = 10
MAKERS = {"ppo": make_trainer, "grpo": grpo_runs.make_whole}


@pytest.fixture(scope="module", params=MAKERS)
def ten(request, tmp_path_factory):
    """(maker of a run of ten steps with microbatches of one row, what it leaves)."""

    def make(out: Path, **changes):
        minibatch = {"num_epochs": 2, "minibatch_size": 2 if request.param == "ppo" else 6, "microbatch_tokens": 1}
        return MAKERS[request.param](out, **{"total_steps": N, "update": minibatch, **changes})

    out = tmp_path_factory.mktemp("whole")
    make(out).train()
    return make, left(out)


@pytest.mark.parametrize("step", range(N))
def test_a_run_of_ten_steps_resumes_after_each_to_the_same_bytes(step, ten, tmp_path):
    make, whole = ten
    make(tmp_path, callbacks=[AtStep(step, stop)]).train()
    assert (tmp_path / "checkpoints" / f"step-{step + 1:06d}").is_dir()
    make(tmp_path).train(resume=True)
    assert differing(left(tmp_path), whole) == []


@pytest.mark.parametrize("backward", [2, 5, 7])
def test_a_run_broken_off_between_two_microbatches_resumes_to_the_same_bytes(backward, ten, tmp_path, monkeypatch):
    make, whole = ten
    method, calls = Replicated.backward, []

    def breaks(self, loss, *args, **kwargs):
        if trainer.step == 3:
            calls.append(1)
            if len(calls) == backward:
                raise Stopped
        return method(self, loss, *args, **kwargs)

    trainer = make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Replicated, "backward", breaks)
        run_until_stopped(trainer)
    assert len(calls) == backward and len(read_metrics(tmp_path)) == 3
    make(tmp_path).train(resume=True)
    assert differing(left(tmp_path), whole) == []


# --- signals at ten places ----------------------------------------------------------------------------------------------


class Struck:
    """Sends `number` to this process at call `place` of the toolkit's functions in the second and third step; twice, at
    the next call again."""

    def __init__(self, place: int | None, number: int = 0, *, twice: bool = False) -> None:
        self.places = [] if place is None else [place, place + 1] if twice else [place]
        self.number, self.calls, self.steps, self.counting = number, 0, [], False

    def run(self, world, folder: Path) -> None:
        ends = [At(step, lambda trainer, step=step: self.ended(step)) for step in range(4)]
        sys.setprofile(self.profile)
        try:
            world.start(folder, callbacks=ends)
        finally:
            sys.setprofile(None)

    def ended(self, step: int) -> None:
        self.counting = step < 2
        if self.calls > max(self.places, default=math.inf):
            self.steps.append(step)  # ended after the last signal

    def profile(self, frame, event, argument) -> None:
        if self.counting and event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.calls += 1
            if self.calls in self.places:
                os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """World -> (what its run leaves, number of calls in which signals may come)."""
    found = {}
    for world in (Tokens(), Control()):
        folder, count = tmp_path_factory.mktemp("whole"), Struck(None)
        count.run(world, folder)
        found[type(world)] = world.left(folder), count.calls
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("world", WORLDS)
def test_a_signal_anywhere_in_a_step_saves_and_a_second_one_ends_it_at_once(
    world, tenth, twice, number, undisturbed, tmp_path, monkeypatch
):
    whole, calls = dict(undisturbed[type(world)][0]), undisturbed[type(world)][1]
    if twice:
        monkeypatch.setattr("rlhf.runs.signals.SAME_SIGNAL_S", -1.0)  # no two count as one
    struck = Struck(int(calls * (tenth + 0.5) / 10), number, twice=twice)
    with pytest.raises(Interrupted) as raised:
        struck.run(world, tmp_path)
    assert raised.value.number == number and len(struck.steps) <= (0 if twice else 1)
    world.start(tmp_path, resume=True)
    found = world.left(tmp_path)
    if twice:  # if it comes between an update and its line, the line is lost
        lines, others = (files.pop("metrics.jsonl").splitlines() for files in (found, whole))
        assert set(lines) <= set(others) and len(lines) >= len(others) - 1
    assert found == whole


# --- a run that hardly learns -------------------------------------------------------------------------------------------

POLICIES = {
    "all weights": lambda: {"lm": tiny.causal_lm("gpt2", dropout=0.5).train()},
    "a new adapter": lambda: {"lm": tiny.causal_lm("gpt2", dropout=0.5).train(), "peft_config": lora()},
    "a trained adapter": lambda: {"lm": trained_peft("gpt2").train()},
}


def twenty_steps(algorithm: str, policy: str, out: Path, monkeypatch, rate: float) -> tuple[list[float], list[dict]]:
    """The largest |ratio - 1| of every microbatch, and the metrics."""
    kind, make = {"ppo": (PPO, tiny.trainer), "grpo": (GRPO, grpo_runs.make_trainer)}[algorithm]
    loss, ratios = kind.loss, []

    def watched(self, outputs, batch):
        gaps = (outputs.logprobs - batch.old_logprobs).detach().exp() - 1
        ratios.append(gaps[batch.mask].abs().max().item())
        return loss(self, outputs, batch)

    monkeypatch.setattr(kind, "loss", watched)
    settings = {"total_steps": 20, "learning_rate": rate, "checkpoint_every": 0, "generation": {"temperature": 0.6}}
    make(out, **POLICIES[policy](), **settings).train()
    return ratios, read_metrics(out)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("policy", POLICIES)
def test_twenty_steps_at_hardly_any_rate_stay_at_the_policy_that_sampled_and_at_the_reference(
    policy, algorithm, tmp_path, monkeypatch
):
    """With temperature and, in the model's configuration, dropout; the model comes in training mode."""
    ratios, lines = twenty_steps(algorithm, policy, tmp_path, monkeypatch, 1e-12)
    assert len(lines) == 20 and len(ratios) >= 80
    assert max(ratios) <= 1e-5
    assert abs(lines[0]["reward_kl" if algorithm == "ppo" else "kl"]) <= 1e-6
    name = {"ppo": "sampler_gap", "grpo": "sampling/sampling_logp_difference/max"}[algorithm]
    assert max(line[name] for line in lines) < 2048 * EPS


def test_the_check_of_the_ratio_notices_a_run_that_learns(tmp_path, monkeypatch):
    """Negative control."""
    ratios, _ = twenty_steps("ppo", "all weights", tmp_path, monkeypatch, 1e-4)
    assert max(ratios) > 1e-5


# --- numbers that are not finite ----------------------------------------------------------------------------------------

NUMBERS = [math.nan, math.inf, -math.inf]


class Poison:
    """Puts `number` in one place of step 2; the steps before it are whole."""

    def __init__(self, place: str, number: float) -> None:
        self.place, self.number, self.armed = place, number, False

    def at(self, place: str) -> bool:
        return self.armed and self.place == place

    def tensor(self, tensor):
        tensor = tensor.clone()
        tensor[0, 0] = self.number
        return tensor

    def score(self, completions, target):
        scores = tiny.count_target(completions, target)
        return [scores[0], self.number, *scores[2:]] if self.at("score") else scores

    def put(self, patch) -> None:
        pack, forward, prepare, loss = scoring.pack, Scorer._forward, PPO.prepare, PPO.loss

        def packed(*args):
            made = pack(*args)
            gone = self.at("log-prob of the sampler")
            return made._replace(sampling_logprobs=self.tensor(made.sampling_logprobs)) if gone else made

        def forwards(scorer, policy, rows):
            made = forward(scorer, policy, rows)
            reference = policy is scorer.reference
            if self.at("log-prob of the reference" if reference else "log-prob of the policy"):
                made = replace(made, logprobs=self.tensor(made.logprobs))
            if not reference and self.at("value"):
                made = replace(made, values=self.tensor(made.values))
            return made

        def prepared(algorithm, *args):
            made = prepare(algorithm, *args)
            return replace(made, advantages=self.tensor(made.advantages)) if self.at("advantage") else made

        def lost(algorithm, *args):
            made = loss(algorithm, *args)
            return made._replace(total=made.total * self.number) if self.at("loss") else made

        for owner, name, function in (
            (scoring, "pack", packed),
            (Scorer, "_forward", forwards),
            (PPO, "prepare", prepared),
            (PPO, "loss", lost),
        ):
            patch.setattr(owner, name, function)


PLACES = ["score", "log-prob of the sampler", "log-prob of the policy", "log-prob of the reference", "value"]
PLACES += ["advantage", "loss", "gradient"]


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    poisoned_run(out, Poison("nowhere", 0.0)).train()
    return left(out)


def poisoned_run(out: Path, poison: Poison):
    def score(completions, target):
        return poison.score(completions, target)

    arm = AtStep(1, lambda trainer: setattr(poison, "armed", True))
    settings = {
        "total_steps": 4,
        "checkpoint_every": 1,
        "keep_checkpoints": 4,
        "callbacks": [arm],
        "ppo": {"kl_coef": 0.1},
    }
    return tiny.trainer(out, rewards=score, **settings)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("place", PLACES)
def test_a_number_that_is_not_finite_changes_no_weight_and_gets_into_no_checkpoint(
    place, number, four_steps, tmp_path, monkeypatch
):
    poison = Poison(place, number)
    trainer = poisoned_run(tmp_path, poison)
    history = [weights(trainer)]
    trainer.learner.optimizer.register_step_post_hook(lambda *args: history.append(weights(trainer)))
    parameter = next(trainer.policy.parameters())
    parameter.register_hook(lambda g: torch.full_like(g, number) if poison.at("gradient") else g)
    with monkeypatch.context() as patch:
        poison.put(patch)
        with pytest.raises((InputError, TrainingError), match=r"finite|row 1|nats"):
            trainer.train()
    assert furthest(weights(trainer), history[-1]) == 0.0 and len(history) >= 9  # two steps of four updates
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step-000001", "step-000002"]
    for file in (tmp_path / "checkpoints").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    poisoned_run(tmp_path, Poison("nowhere", 0.0)).train(resume=True)
    assert differing(left(tmp_path), four_steps) == []


# --- ten processes ------------------------------------------------------------------------------------------------------


def test_ten_processes_with_the_same_seed_leave_the_same_bytes(tmp_path):
    """Each with hashes of its own."""
    root, found = Path(__file__).parents[2], []
    for number in range(10):
        out = tmp_path / str(number)
        command = [sys.executable, "-m", "tests.trainers.test_long_runs", str(out)]
        hidden = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": str(number + 1)}
        subprocess.run(command, cwd=root, env={**os.environ, **hidden}, check=True, capture_output=True, timeout=300)
        found.append({name: left(out / name) for name in MAKERS} | {"control": Control().left(out / "control")})
    assert [other == found[0] for other in found] == [True] * 10
    assert all(files["metrics.jsonl"].count(b"\n") >= 4 for files in found[0].values())


def main(out: Path) -> None:
    torch.set_num_threads(1)
    for name, make in MAKERS.items():
        make(out / name).train()
    Control().start(out / "control")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
