"""Optimizer state through a checkpoint continues training to the bit; settings that must match are compared."""

import json

import pytest
import torch

from rlhf.errors import InputError
from rlhf.runs.directory import RunDirectory
from rlhf.runs.resume import check_resumable
from rlhf.training.optimizer_state import load_optimizer_tensors, optimizer_tensors

OPTIMIZERS = {
    "adam": (torch.optim.Adam, {"betas": (0.8, 0.9), "eps": 1e-5}),
    "adam fused": (torch.optim.Adam, {"fused": True}),
    "adam amsgrad tensor lr": (torch.optim.Adam, {"amsgrad": True, "lr": torch.tensor(1e-2), "foreach": False}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adamw foreach": (torch.optim.AdamW, {"foreach": True}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9, "momentum": 0.3, "centered": True}),
    "sgd momentum": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2}),
}


def network_and_optimizer(kind: str):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    make, settings = OPTIMIZERS[kind]
    groups = [{"params": network[0].parameters(), "lr": 3e-3}, {"params": network[2].parameters()}]
    if isinstance(settings.get("lr"), torch.Tensor):
        groups[0]["lr"] = torch.tensor(3e-3)
        settings = {**settings, "lr": settings["lr"].clone()}
    return network, make(groups, **settings)


def train(network, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:  # a schedule that lives in the optimizer alone
            group["lr"] *= 0.9
        optimizer.zero_grad()
        (network(inputs) - inputs.sum(-1, keepdim=True)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_continued_from_a_checkpoint_equals_uninterrupted_training_to_the_bit(tmp_path, kind):
    run = RunDirectory(tmp_path)
    run.open()
    network, optimizer = network_and_optimizer(kind)
    train(network, optimizer, 0, 3)
    moments, rest = optimizer_tensors(optimizer, network.named_parameters())
    run.save(3, {"policy": network.state_dict(), "optimizer": moments}, {"optimizer": rest})
    train(network, optimizer, 3, 6)

    resumed, fresh = network_and_optimizer(kind)
    saved = run.latest()
    resumed.load_state_dict(saved.tensors("policy"))
    named = list(resumed.named_parameters())
    load_optimizer_tensors(fresh, named[::-1], saved.tensors("optimizer"), saved.state["optimizer"])
    train(resumed, fresh, 3, 6)
    for name, value in network.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert [group["lr"] for group in fresh.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert all(type(group.get("betas", ())) is tuple for group in fresh.param_groups)


@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq", "step"])
def test_losing_any_part_of_adams_state_would_be_seen(lost):
    """Negative control for the test above: its comparison is sharp enough for each part of the state."""
    network, optimizer = network_and_optimizer("adam")
    train(network, optimizer, 0, 3)
    moments, rest = optimizer_tensors(optimizer, network.named_parameters())
    other, fresh = network_and_optimizer("adam")
    other.load_state_dict(network.state_dict())
    broken = {
        name: torch.zeros_like(value) if name.startswith(f"{lost}/") else value for name, value in moments.items()
    }
    load_optimizer_tensors(fresh, other.named_parameters(), broken, json.loads(json.dumps(rest)))
    train(network, optimizer, 3, 4)
    train(other, fresh, 3, 4)
    assert not torch.equal(other[0].weight, network[0].weight)


def test_optimizer_state_is_keyed_by_parameter_name():
    network, optimizer = network_and_optimizer("adamw")
    train(network, optimizer, 0, 1)
    moments, rest = optimizer_tensors(optimizer, network.named_parameters())
    assert moments.keys() == {
        f"{key}/{name}"
        for key in ("step", "exp_avg", "exp_avg_sq")
        for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    assert rest["parameters"] == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    assert json.loads(json.dumps(rest)) == rest


class Counting(torch.optim.Optimizer):
    """Gradient steps of size 1 / (number of the step), which it keeps as a Python integer."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            entry = self.state[parameter]
            entry["step"] = entry.get("step", 0) + 1
            parameter -= parameter.grad / entry["step"]


def test_state_that_is_not_a_tensor_comes_back_too():
    weight, other = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer, fresh = Counting([weight]), Counting([other])
    weight.grad = other.grad = torch.ones(1)
    optimizer.step()
    moments, rest = optimizer_tensors(optimizer, [("w", weight)])
    load_optimizer_tensors(fresh, [("w", other)], moments, json.loads(json.dumps(rest)))
    fresh.step()
    assert moments == {} and other.item() == -1 / 2  # its second step


def test_a_hyper_parameter_can_be_changed_on_resume():
    network, optimizer = network_and_optimizer("adamw")
    train(network, optimizer, 0, 1)
    moments, rest = optimizer_tensors(optimizer, network.named_parameters())
    other, fresh = network_and_optimizer("adamw")
    fresh.param_groups[0]["lr"], fresh.param_groups[0]["weight_decay"] = 0.5, 0.7
    load_optimizer_tensors(fresh, other.named_parameters(), moments, rest, keep={"lr"})
    assert fresh.param_groups[0]["lr"] == 0.5 and fresh.param_groups[0]["weight_decay"] == 0.1


def test_another_model_is_refused_and_the_difference_named():
    network, optimizer = network_and_optimizer("adam")
    train(network, optimizer, 0, 1)
    moments, rest = optimizer_tensors(optimizer, network.named_parameters())
    wider = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    grouped = [{"params": wider[0].parameters()}, {"params": wider[2].parameters()}]
    with pytest.raises(InputError, match=r"0\.weight has shape \(8, 4\), the parameter \(8, 5\)"):
        load_optimizer_tensors(torch.optim.Adam(grouped), wider.named_parameters(), moments, rest)
    fewer = torch.optim.Adam(network[0].parameters())
    with pytest.raises(InputError, match=r"2\.bias.*2\.weight"):
        load_optimizer_tensors(fewer, network.named_parameters(), moments, rest)
    one_group = torch.optim.Adam(network.parameters())
    with pytest.raises(InputError, match="groups them differently"):
        load_optimizer_tensors(one_group, network.named_parameters(), moments, rest)


def test_settings_that_must_match_are_all_listed_and_the_others_reported():
    saved = {"model": "a", "ppo": {"gamma": 1.0, "kl_coef": 0.05}, "lr": 1e-5, "sizes": [1, 2], "gone": 1}
    current = {"model": "b", "ppo": {"gamma": 0.9, "kl_coef": 0.1}, "lr": 3e-5, "sizes": (1, 2), "new": None}
    with pytest.raises(InputError) as error:
        check_resumable(saved, current, must_match={"model", "ppo.gamma", "sizes"})
    assert 'model: "a" (saved), "b" (now)' in str(error.value) and "ppo.gamma: 1.0 (saved), 0.9 (now)" in str(
        error.value
    )
    assert "lr" not in str(error.value) and "kl_coef" not in str(error.value)
    with pytest.raises(InputError, match=r"ppo\.gamma(.|\n)*ppo\.kl_coef"):
        check_resumable(saved, current, must_match={"ppo"})
    assert check_resumable(saved, current, must_match={"sizes", "pp", "ppo.clip"}) == [
        "gone: 1 (saved), absent (now)",
        "lr: 1e-05 (saved), 3e-05 (now)",
        'model: "a" (saved), "b" (now)',
        "new: absent (saved), null (now)",
        "ppo.gamma: 1.0 (saved), 0.9 (now)",
        "ppo.kl_coef: 0.05 (saved), 0.1 (now)",
    ]
    assert check_resumable(saved, json.loads(json.dumps(saved)), must_match=set(saved)) == []
