"""Checkpoints of real runs in both worlds: whatever file is damaged, and however, the newest whole one is used, aloud.

And whatever is edited and sealed anew, so that the checksums are right, is refused before anything is loaded.
"""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf import InputError
from rlhf.runs import checkpoint as format_module
from rlhf.runs.checkpoint import MANIFEST, Saved, read_checkpoint, seal
from rlhf.runs.directory import RunDirectory
from rlhf.runs.run import Run
from rlhf.training import learner as learner_module
from tests import tiny
from tests.one_house.worlds import At, Breaks, Control, Tokens, breaks
from tests.runs.test_checkpoint import DAMAGE

FILES = {
    Tokens: ("policy.safetensors", "optimizer.safetensors", "state.json", MANIFEST),
    Control: ("policy.safetensors", "optimizer.safetensors", "rows.safetensors", "state.json", MANIFEST),
}
OLD, NEW = "step-000001", "step-000002"


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """World -> the directory of a run that holds the checkpoints of two steps, and what it leaves when it is resumed."""
    runs = {}
    for world in (Tokens(), Control()):
        folder = tmp_path_factory.mktemp("run")

        def save(trainer):
            trainer.run.directory.keep = 2
            trainer.run.save()

        callbacks = [At(0, save), At(1, breaks)]
        with pytest.raises(Breaks):
            world.start(folder, callbacks=callbacks)
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [OLD, NEW]
        resumed = shutil.copytree(folder, tmp_path_factory.mktemp("whole") / "run")
        world.start(resumed, resume=True)
        runs[type(world)] = folder, world.left(resumed)
    return runs


@pytest.fixture
def copy(broken_off, tmp_path):
    return lambda world: shutil.copytree(broken_off[type(world)][0], tmp_path / "run")


# --- damage -----------------------------------------------------------------------------------------------------------


def of_files(*cases):
    return [
        pytest.param(world, file, case, id=f"{type(world).__name__}-{file}-{case}")
        for world in (Tokens(), Control())
        for file in FILES[type(world)]
        for case in cases
    ]


def damage(folder: Path, file: str, case: str) -> None:
    path = folder / "checkpoints" / NEW / file
    if case == "of the other step":
        shutil.copy(folder / "checkpoints" / OLD / file, path)
        return
    data = DAMAGE[case](path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)


@pytest.mark.parametrize(("world", "file", "case"), of_files(*DAMAGE, "of the other step"))
def test_a_damaged_file_is_named_and_the_newest_whole_checkpoint_is_used(world, file, case, copy):
    folder = copy(world)
    damage(folder, file, case)
    with pytest.warns(UserWarning, match=rf"Falling back to {OLD}.*{NEW}/") as warned:
        run = RunDirectory(folder)
        assert run.open(resume=True).step == 1
    run.close()
    assert file in str(warned[0].message) or file == MANIFEST  # then the file that does not fit to it


@pytest.mark.parametrize(("world", "file", "case"), of_files("bit 3 at 0.5"))
def test_a_run_with_a_damaged_file_goes_on_from_the_step_before_to_the_same_bytes(world, file, case, broken_off, copy):
    folder = copy(world)
    damage(folder, file, case)
    with pytest.warns(UserWarning, match=rf"Falling back to {OLD}"):
        world.start(folder, resume=True)
    assert world.left(folder) == broken_off[type(world)][1]


@pytest.mark.parametrize("world", [Tokens(), Control()], ids=["tokens", "control"])
def test_without_checksums_a_flipped_bit_would_be_silent(world, copy, monkeypatch):
    """Negative control."""
    folder = copy(world)
    listed = json.loads((folder / "checkpoints" / NEW / MANIFEST).read_bytes())["files"]
    damage(folder, "policy.safetensors", "bit 0 at 1.0")
    monkeypatch.setattr(format_module, "_sha256", lambda file: listed[file.name]["sha256"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RunDirectory(folder).open(resume=True).step == 2


# --- edited, and sealed anew ------------------------------------------------------------------------------------------


def tensors(file: str, edit):
    """An edit of a file of tensors: `edit` gets them by name, with the name of the first whose state has a shape."""

    def of(path: Path) -> None:
        named = load_file(path / file)
        first = min(name for name, tensor in named.items() if tensor.dim() and tensor.is_floating_point())
        edit(named, first)
        save_file(named, path / file)

    return of


def retyped(dtype):
    return lambda named, first: named.update({first: named[first].to(dtype)})


def all_retyped(dtype):
    return lambda named, first: named.update({name: tensor.to(dtype) for name, tensor in named.items()})


def reshaped(named, first):
    named[first] = torch.cat([named[first], named[first]])


def scalar(named, first):
    named[first] = torch.tensor(1.0)


def missing(named, first):
    del named[first]


def extra(named, first):
    named["exp_avg/other"] = named[first].clone()


def renamed(named, first):
    named[first + "x"] = named.pop(first)


def none_left(named, first):
    named.clear()


TENSOR_EDITS = {
    "bfloat16": retyped(torch.bfloat16),
    "int64": retyped(torch.int64),
    "float64": all_retyped(torch.float64),
    "all bfloat16": all_retyped(torch.bfloat16),
    "reshaped": reshaped,
    "scalar": scalar,
    "missing": missing,
    "extra": extra,
    "renamed": renamed,
    "none left": none_left,
}


def value(*place, to):
    """An edit of state.json: sets the value at `place`, or deletes it."""

    def of(path: Path) -> None:
        state = json.loads((path / "state.json").read_bytes())
        inner = state
        for name in place[:-1]:
            inner = inner[name]
        if to is GONE:
            del inner[place[-1]]
        else:
            inner[place[-1]] = to
        (path / "state.json").write_text(json.dumps(state))

    return of


GONE = object()
OPTIMIZER = ("learner", "optimizer")
GROUP = (*OPTIMIZER, "hyperparameters", 0)
PLACES = {
    ("learner",): (GONE, [], "x", None),
    ("learner", "updates"): (GONE, "2", [2], 2.0, -1, True, None, 7),
    ("learner", "algorithm"): (GONE, [0.1], 0.1, None),
    ("learner", "optimizer"): (GONE, [], None, {}),
    (*OPTIMIZER, "parameters"): (GONE, [], {}, [["other"]], [[1]], "x", None),
    (*OPTIMIZER, "hyperparameters"): (GONE, [], {}, [None], [[]], 3),
    (*OPTIMIZER, "scalars"): (GONE, [], {"step/other": 1}, {"step": 1}, None),
    (*OPTIMIZER, "tensors"): ([], {}, {"exp_avg/other": "float32 (1,)"}),
    (*GROUP, "eps"): ("1e-8", [1e-8], None, True, float("nan")),
    (*GROUP, "betas"): (0.9, [0.9], [0.9, "0.999"], {"a": 1}, None),
    (*GROUP, "amsgrad"): (1, "no", None),
    (*GROUP, "other"): (1,),
    ("source",): (GONE, [], "x", None),
}
ONLY = {
    Tokens: {
        ("source", "prompts_seen"): (GONE, "8", [8], 8.0, -1, True, None),
        ("learner", "algorithm", "kl_coef"): ("0.1", [0.1], None, True, float("inf")),
    },
    Control: {
        ("learner", "algorithm", "penalty_coef"): ("0.1", [0.1], None, True, float("inf")),
        ("source", "environment_steps"): (GONE, "64", [64], 64.0, -1, None),
        ("source", "rollouts"): (GONE, "2", 3, None),
        ("source", "recent"): (GONE, [[1.0]], [["1", 2]], {}, None),
        ("source", "reward_moments"): ([1.0, 2.0, 3.0], "x"),
        ("source", "rows"): (GONE, [], {}, {"x/y": 1}, {"0/length": "1"}),
        ("source", "rows", "0/length"): (GONE, "1", 1.0, None, [1]),
        ("source", "rows", "0/replay/episode"): (GONE, "1", None),
        ("schedule",): (GONE, [], None),
        ("schedule", "steps"): (GONE, 3, [1], [1, "2"], [2, 1], None),
    },
}


def edits():
    """(world, file or place, edit)"""
    found = []
    for world in (Tokens(), Control()):
        kind = type(world).__name__
        for file in [file for file in FILES[type(world)] if file.endswith(".safetensors")]:
            for name, edit in TENSOR_EDITS.items():
                if file != "rows.safetensors" or name != "float64":  # rewards and returns are of that type
                    found.append(pytest.param(world, tensors(file, edit), id=f"{kind}-{file}-{name}"))
        for place, values in (PLACES | ONLY[type(world)]).items():
            for to in values:
                shown = "gone" if to is GONE else repr(to)
                found.append(
                    pytest.param(world, value(*place, to=to), id=f"{kind}-{'.'.join(map(str, place))}-{shown}")
                )
        for text in ("", "[]", "3", '{"learner": 1', "[" * 100_000):
            edit = lambda path, text=text: (path / "state.json").write_text(text)  # noqa: E731
            found.append(pytest.param(world, edit, id=f"{kind}-state.json-{text[:12]!r}"))
    return found


def resealed(path: Path, edit) -> None:
    checkpoint = read_checkpoint(path)
    (path / MANIFEST).unlink()
    edit(path)
    seal(path, checkpoint.step, checkpoint.config)


class Watch:
    """Remembers the weights and the state of the optimizer of a run before it restores."""

    def __init__(self, monkeypatch) -> None:
        restore = Run.restore

        def watched(run, parts):
            self.learner = parts["learner"]
            self.before = self.now()
            restore(run, parts)

        monkeypatch.setattr(Run, "restore", watched)

    def now(self):
        optimizer = self.learner.own_optimizer.state_dict()
        weights = {name: tensor.clone() for name, tensor in self.learner.policy.state_dict().items()}
        return weights, repr(optimizer), dict(self.learner.algorithm_state), self.learner.updates

    def unchanged(self) -> bool:
        (weights, *before), (now_weights, *now) = self.before, self.now()
        return before == now and all(torch.equal(weights[name], now_weights[name]) for name in weights)


@pytest.mark.parametrize(("world", "edit"), edits())
def test_what_was_edited_and_sealed_anew_is_refused_before_anything_is_loaded(world, edit, copy, monkeypatch):
    folder = copy(world)
    shutil.rmtree(folder / "checkpoints" / OLD)
    resealed(folder / "checkpoints" / NEW, edit)
    watch = Watch(monkeypatch)
    with pytest.raises(InputError, match=rf"{NEW}.*(Resume|Start over|new run)"):
        world.start(folder, resume=True)
    assert not hasattr(watch, "before") or watch.unchanged()
    RunDirectory(folder)._take_lock("here")  # it is free


@pytest.mark.parametrize("world", [Tokens(), Control()], ids=["tokens", "control"])
def test_a_checkpoint_that_is_sealed_anew_unchanged_is_accepted(world, broken_off, copy):
    folder = copy(world)
    resealed(folder / "checkpoints" / NEW, lambda path: None)
    world.start(folder, resume=True)
    assert world.left(folder) == broken_off[type(world)][1]


@pytest.mark.parametrize("world", [Tokens(), Control()], ids=["tokens", "control"])
def test_without_the_check_of_the_learner_an_edited_checkpoint_would_be_loaded(world, copy, monkeypatch):
    """Negative control: torch converts the precision in silence."""
    folder = copy(world)
    resealed(folder / "checkpoints" / NEW, tensors("policy.safetensors", retyped(torch.bfloat16)))
    monkeypatch.setattr("rlhf.training.weights.check_named_tensors", lambda module, tensors: None)
    monkeypatch.setattr(learner_module, "check_named_tensors", lambda module, tensors: None)
    world.start(folder, resume=True)


def test_a_source_that_cannot_read_its_state_leaves_the_learner_as_it_was(copy, monkeypatch):
    """The learner is loaded last."""
    folder = copy(Tokens())
    watch = Watch(monkeypatch)

    def load(self, saved):
        raise KeyError("mine")

    monkeypatch.setattr("rlhf.rollout.prompts.PromptSource.load", load)
    with pytest.raises(InputError, match=rf"{NEW}: the state of 'source' cannot be read \(KeyError: 'mine'\)"):
        Tokens().start(folder, resume=True)
    assert watch.unchanged()


def test_a_learner_that_is_given_another_optimizers_state_keeps_its_weights(tmp_path):
    """Also where no run checks it first."""
    trainer = tiny.trainer(tmp_path, total_steps=1)
    trainer.train()
    saved = trainer.learner.state(1)
    other = {name: tensor + 1 for name, tensor in saved.tensors["policy"].items()}
    optimizer = {name: tensor.bfloat16() for name, tensor in saved.tensors["optimizer"].items()}
    before = tiny.weights(trainer)
    with pytest.raises(InputError, match=r"optimizer\.safetensors differs from what was saved: exp_avg/.* is bfloat16"):
        trainer.learner.load(Saved(saved.values, {"policy": other, "optimizer": optimizer}))
    assert tiny.furthest(before, tiny.weights(trainer)) == 0.0
