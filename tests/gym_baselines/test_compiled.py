"""A compiled step, and an eager one on vectors, is torch.optim's: weights, state, metrics and stops, whatever changes.

Most tests run the traced graph operation by operation, which shows what it computes without the compiler's half minute; the
slow ones compile it. What is right is said by eager mode with torch.optim, whose mathematics other files prove.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, RMSprop

from gym_baselines.stepping import compiled as compiled_module
from gym_baselines.stepping import flat_optimizer
from gym_baselines.stepping.compiled import CompiledStepper, pad_rows, round_up
from gym_baselines.stepping.flat import FlatStepper
from gym_baselines.stepping.flat_optimizer import RULES, FlatOptimizer
from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.algorithms.trpo import TRPO, TrustRegionConfig
from rlhf.core.distributions import Categorical, Gaussian, MultiCategorical, SquashedGaussian
from rlhf.core.masking import local_sum
from rlhf.distributed import Distributed
from rlhf.errors import InputError, TrainingError
from rlhf.training.update import UpdateConfig, make_stepper, update
from rlhf.types import PolicyOutputs, Trajectories
from tests.controls import names, refute
from tests.rounding import EPS

FAMILIES: dict[str, Any] = {
    "categorical": Categorical(3),
    "multi": MultiCategorical((3, 2)),
    "gaussian": Gaussian(2),
    "squashed": SquashedGaussian(2, (1.0, 2.0), (0.0, 0.5)),
}
PLAIN = partial(FlatStepper, flat_up_to=0)
"""torch.optim's own step and clipping: what the others are compared with."""
BASE = PPOConfig(
    kl_coef=0.0, gamma=0.9, value_coef=1.0, value_clip_range=None, normalize_advantages="minibatch", anneal_clip=True
)


class Policy(nn.Module):
    """Separate networks, a buffer like a normaliser's, and a parameter that nothing depends on."""

    def __init__(self, family: Any, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            outputs = family.num_params if family.is_discrete else family.num_params // 2
            self.policy_net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs))
            self.value_net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.family = family
        self.log_std = None if family.is_discrete else nn.Parameter(torch.zeros(outputs))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.tensor(1.0))
        self.to(dtype)

    def forward(self, inputs, actions, with_values=True, with_entropy=False, old_distribution=None) -> PolicyOutputs:
        observations = inputs["observations"] * self.scale
        params = self.policy_net(observations).unsqueeze(1)
        if self.log_std is not None:
            params = torch.cat([params, self.log_std.expand_as(params)], -1)
        return PolicyOutputs(
            logprobs=self.family.logprobs(params, actions),
            values=self.value_net(observations) if with_values else None,
            entropy=self.family.entropy(params) if with_entropy else None,
            distribution=params,
            kl=None if old_distribution is None else self.family.kl(old_distribution, params),
        )


def play(policy: Policy, seed: int, *, rows: int = 3, time: int = 8) -> Trajectories:
    """Random transitions with ghosts and episode ends, scored by the policy."""
    dtype = policy.unused.dtype
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=dtype)
    observations, family = normal(rows, time, 3), policy.family
    draws = torch.rand(rows * time, family.num_draws, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        flat = {"observations": observations.flatten(0, 1)}
        unscored = torch.zeros(rows * time, 1, *family.action_shape, dtype=torch.int64 if family.is_discrete else dtype)
        distribution = policy(flat, unscored).distribution
        actions = family.sample(distribution.squeeze(1), draws)
        outputs = policy(flat, actions.unsqueeze(1))
    logprobs, values = outputs.logprobs.view(rows, time), outputs.values.view(rows, time)
    ends = torch.rand(rows, time, generator=generator) < 0.2
    return Trajectories(
        inputs={"observations": observations},
        actions=actions.view(rows, time, *family.action_shape),
        mask=torch.rand(rows, time, generator=generator) < 0.8,
        rewards=5 * normal(rows, time),
        sampling_logprobs=logprobs,
        old_logprobs=logprobs + 0.1 * normal(rows, time),
        values=values,
        next_values=normal(rows, time),
        terminated=ends,
        episode_ends=ends,
        old_distribution=distribution.view(rows, time, -1),
        row_tokens=torch.full((rows,), time),
        row_index=torch.arange(rows),
    )


CASES: dict[str, dict[str, Any]] = {
    "clipped, whitened, annealed": {},
    "gradients far below the limit": {"update": {"max_grad_norm": 1e9}},
    "unclipped with an adaptive penalty": {
        "ppo": {"surrogate": "unclipped", "penalty_coef": 0.5, "penalty_target": 1e-9, "penalty_adapts": "epoch"}
    },
    "A2C: score function, RMSprop, one step": {
        "ppo": {"surrogate": "score", "normalize_advantages": "none"},
        "update": {"num_epochs": 1, "minibatch_size": None},
        "optimizer": partial(RMSprop, alpha=0.99, eps=1e-5),
    },
    "REINFORCE without values": {"ppo": {"surrogate": "score", "baseline": "none", "gae_lambda": 1.0}},
    "entropy bonus, clipped values, dual clip": {
        "ppo": {"entropy_coef": 0.3, "value_clip_range": 0.05, "dual_clip": 1.5, "clip_range_high": 0.3}
    },
    "uneven minibatches": {"update": {"minibatch_size": 10}},
    "whole batches of an odd size": {"update": {"minibatch_size": None}, "time": 7},
    "fused Adam of other constants": {"optimizer": partial(Adam, betas=(0.8, 0.95), eps=1e-3, fused=True)},
    "a KL target that stops it": {"update": {"num_epochs": 20, "target_kl": 0.02}, "rate": 0.05},
    "TRPO's values": {"trust_region": TrustRegionConfig(), "ppo": {"normalize_advantages": "batch"}},
    **{f"{name} actions": {"family": name, "ppo": {"entropy_coef": 0.1}} for name in ("multi", "gaussian", "squashed")},
    **{f"penalised {name}": {"family": name, "ppo": {"penalty_coef": 0.5}} for name in ("multi", "gaussian")},
}


class Run:
    """A few updates of one stepper on the same data as any other Run's of the case."""

    def __init__(self, stepper: Any, distributed: Distributed, case: dict[str, Any], dtype=torch.float64) -> None:
        self.case, self.distributed = case, distributed
        ppo = replace(BASE, **case.get("ppo", {}))
        self.algorithm = TRPO(ppo, case["trust_region"]) if "trust_region" in case else PPO(ppo)
        self.state = self.algorithm.initial_state()
        self.policy = Policy(FAMILIES[case.get("family", "categorical")], dtype)
        self.optimizer = case.get("optimizer", partial(Adam, eps=1e-5))(self.policy.parameters(), lr=1.0)
        self.config = UpdateConfig(
            **{"num_epochs": 3, "minibatch_size": 8, "max_grad_norm": 0.5} | case.get("update", {})
        )
        self.metrics: list[dict[str, float]] = []
        self.use(stepper)

    def use(self, stepper: Any) -> None:
        self.stepper = stepper(
            self.policy,
            self.algorithm,
            self.optimizer,
            self.distributed,
            max_grad_norm=self.config.max_grad_norm,
            target_kl=self.config.target_kl,
            microbatch_tokens=self.config.microbatch_tokens,
        )

    def update(self, step: int) -> "Run":
        rate = self.case.get("rate", 0.01) * (1 - step / 10)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.policy.scale = self.policy.scale * 1.1  # as a normaliser's statistics: replaced, not changed
        trajectories = play(self.policy, seed=step, time=self.case.get("time", 8))
        batch = self.algorithm.prepare(trajectories, step / 10, self.state, local_sum).flatten()
        self.metrics.append(
            update(
                self.policy,
                self.algorithm,
                batch,
                self.stepper,
                self.config,
                self.distributed,
                seed=0,
                step=step,
                state=self.state,
            )
        )
        return self

    def numbers(self) -> dict[str, Tensor]:
        """All that an update changes."""
        found = dict(self.policy.named_parameters())
        for name, parameter in self.policy.named_parameters():
            found |= {f"{name}.{key}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        for step, metrics in enumerate(self.metrics):
            found |= {f"{step}.{key}": torch.tensor(value) for key, value in metrics.items()}
        return {name: value.detach().clone() for name, value in found.items()} | {
            name: torch.tensor(value) for name, value in self.state.items()
        }


class Traced(CompiledStepper):
    """The traced graph, run operation by operation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, compiler=self.keep)
        self.compiled = 0

    def keep(self, graph, inputs):
        self.compiled += 1
        return graph


def assert_equal(run: Run, other: Run, **tolerance: float) -> None:
    ours, theirs = run.numbers(), other.numbers()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


TIGHT = {"rtol": 1e-9, "atol": 1e-12}
LOOSE = {"rtol": 128 * EPS, "atol": 128 * EPS}


@pytest.fixture(scope="module")
def distributed() -> Distributed:
    return Distributed(cpu=True)


def check_case(case: dict[str, Any], distributed: Distributed, stepper: Any, dtype=torch.float64, updates=2) -> None:
    plain, other = Run(PLAIN, distributed, case, dtype), Run(stepper, distributed, case, dtype)
    for step in range(updates):
        assert_equal(other.update(step), plain.update(step), **(TIGHT if dtype == torch.float64 else LOOSE))


@pytest.mark.parametrize("case", CASES)
def test_the_traced_step_is_the_eager_step(distributed, case):
    check_case(CASES[case], distributed, Traced)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_the_eager_step_on_vectors_is_that_of_torch(distributed, case, dtype):
    check_case(CASES[case], distributed, FlatStepper, dtype)


def test_the_cases_clip_pad_and_stop_as_their_names_say(distributed):
    """Else the test above would show little."""
    run = Run(Traced, distributed, CASES["clipped, whitened, annealed"]).update(0)
    assert run.metrics[0]["grad_norm"] > 1 and run.metrics[0]["clip_fraction_low"] > 0.01
    stopped = Run(Traced, distributed, CASES["a KL target that stops it"]).update(0)
    assert 1 < stopped.metrics[0]["optimizer_steps"] < 60
    penalised = Run(Traced, distributed, CASES["unclipped with an adaptive penalty"]).update(0)
    assert penalised.state["penalty_coef"] == 4.0  # doubled after each of 3 epochs, the later ones of which felt it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("clipped, whitened, annealed", torch.float32),
        ("uneven minibatches", torch.float64),
        ("unclipped with an adaptive penalty", torch.float64),
        ("A2C: score function, RMSprop, one step", torch.float64),
        ("entropy bonus, clipped values, dual clip", torch.float64),
        ("penalised gaussian", torch.float32),
    ],
)
def test_the_compiled_step_is_the_eager_step(distributed, case, dtype):
    check_case(CASES[case], distributed, CompiledStepper, dtype, updates=4)


def epsilon_inside_the_root(weights, gradient, moments, count, rate, settings):
    _, moments = flat_optimizer.adam(weights, gradient, moments, count, rate, {**settings, "eps": 0.0})
    step = rate / (1 - settings["betas"][0] ** count)
    root = (moments[1] / (1 - settings["betas"][1] ** count) + settings["eps"] ** 2).sqrt()
    return weights - step * moments[0] / root, moments


def no_bias_correction(weights, gradient, moments, count, rate, settings):
    return flat_optimizer.adam(weights, gradient, moments, count * 0 + 10**6, rate, settings)


@pytest.mark.parametrize("formula", [epsilon_inside_the_root, no_bias_correction], ids=lambda f: f.__name__)
def test_another_formula_of_adam_is_noticed(distributed, formula, monkeypatch):
    check = partial(check_case, CASES["fused Adam of other constants"], distributed)
    check(Traced)
    monkeypatch.setitem(RULES, Adam, replace(RULES[Adam], formula=formula))
    refute(check, Traced)


def heavy_padding(monkeypatch) -> None:
    def pad(batch, rows):
        return batch.select(torch.arange(rows).clamp(max=batch.rows - 1))

    monkeypatch.setattr(compiled_module, "pad_rows", pad)


def stale_learning_rate(monkeypatch) -> None:
    run, first = CompiledStepper._run, {}

    def run_at_the_first_rate(self, *args):
        self._rate.copy_(first.setdefault(self, self._rate.clone()))
        return run(self, *args)

    monkeypatch.setattr(CompiledStepper, "_run", run_at_the_first_rate)


def no_whitening(monkeypatch) -> None:
    prepare = partial(compiled_module.prepare_minibatch)

    def prepare_only(batch, whiten_advantages):
        return prepare(batch, whiten_advantages=False)

    monkeypatch.setattr(compiled_module, "prepare_minibatch", prepare_only)


def forgotten_state(monkeypatch) -> None:
    monkeypatch.setattr(FlatOptimizer, "store", lambda self: None)


BROKEN = [heavy_padding, stale_learning_rate, no_whitening, forgotten_state]


@pytest.mark.parametrize("breaking", BROKEN, ids=names(BROKEN))
def test_a_broken_stepper_is_noticed(distributed, breaking, monkeypatch):
    check = partial(check_case, CASES["uneven minibatches"], distributed)
    check(Traced)
    breaking(monkeypatch)
    refute(check, Traced)


# --- one graph serves a run ---


def test_changing_rates_clip_ranges_and_penalties_make_no_new_graph(distributed):
    run = Run(Traced, distributed, CASES["unclipped with an adaptive penalty"])
    for step in range(4):
        run.update(step)
    assert run.stepper.compiled == 1


def test_batches_of_many_sizes_need_few_graphs(distributed):
    """As whole episodes give: all of 51 to 64 rows share the sizes 56 and 64."""
    run = Run(Traced, distributed, {"update": {"minibatch_size": None, "num_epochs": 1}})
    for step, time in enumerate(range(17, 22)):
        run.case = run.case | {"time": time}
        run.update(step)
    assert run.stepper.compiled == 2


def test_sizes_are_rounded_up_by_a_quarter_at_most_and_usual_ones_not_at_all():
    rounded = [round_up(rows) for rows in range(1, 5000)]
    assert all(rows <= size <= 1.25 * rows for rows, size in enumerate(rounded, start=1))
    assert rounded == sorted(rounded) and len(set(rounded)) <= 4 * 13
    assert all(round_up(size) == size for size in (1, 5, 40, 64, 80, 128, 256, 320, 512, 640, 1024, 2048))


def test_padding_keeps_every_weight_and_adds_none(distributed):
    run = Run(Traced, distributed, {})
    batch = run.algorithm.prepare(play(run.policy, 0), 0.0, run.state, local_sum).flatten()
    padded = pad_rows(batch, 30)
    assert padded.rows == 30 and torch.equal(padded.select(slice(0, 24)).actions, batch.actions)
    assert torch.equal(padded.mask[:24], batch.mask) and not padded.mask[24:].any()
    for name, weighting in padded.weightings.items():
        assert torch.equal(weighting.weight[:24], batch.weightings[name].weight)
        assert not weighting.weight[24:].any() and not weighting.count[24:].any()


def test_two_runs_in_one_process_do_not_share_a_graph(distributed):
    cases = [CASES["clipped, whitened, annealed"], {"ppo": {"surrogate": "unclipped", "clip_range": 0.01}}]
    compiled, eager = ([Run(kind, distributed, case) for case in cases] for kind in (Traced, PLAIN))
    for step in range(2):
        for run, other in zip(compiled, eager, strict=True):
            assert_equal(run.update(step), other.update(step), **TIGHT)


# --- the optimizer's own state stays the truth ---


@pytest.mark.parametrize("case", ["clipped, whitened, annealed", "A2C: score function, RMSprop, one step"])
def test_eager_and_compiled_updates_go_on_from_one_another(distributed, case):
    mixed, eager = (Run(PLAIN, distributed, CASES[case]) for _ in range(2))
    for step, stepper in enumerate([Traced, PLAIN, FlatStepper, Traced]):
        mixed.use(stepper)
        assert_equal(mixed.update(step), eager.update(step), **TIGHT)


def test_a_loaded_optimizer_state_is_continued(distributed):
    """As after a resume: the same stepper, tensors replaced under it."""
    run, eager = Run(Traced, distributed, {}), Run(PLAIN, distributed, {})
    for one in (run, eager):
        one.update(0)
        one.optimizer.load_state_dict(one.optimizer.state_dict())
        for parameter in one.policy.parameters():
            parameter.data = parameter.data.clone()
    assert_equal(run.update(1), eager.update(1), **TIGHT)


@pytest.mark.parametrize("stepper", [Traced, FlatStepper])
def test_a_new_stepper_goes_on_to_the_last_bit(distributed, stepper):
    """What a stepper keeps between updates decides nothing, so an interrupted run equals an uninterrupted one."""
    resumed, whole = (Run(stepper, distributed, CASES["uneven minibatches"], torch.float32) for _ in range(2))
    for step in range(3):
        resumed.use(stepper)
        assert_equal(resumed.update(step), whole.update(step), rtol=0, atol=0)


def test_parameters_without_a_gradient_stay_and_get_no_state(distributed):
    run = Run(Traced, distributed, {}).update(0)
    assert torch.equal(run.policy.unused, torch.ones(2, dtype=torch.float64))
    assert run.policy.unused not in run.optimizer.state


# --- stopping ---


def poisoned(run: Run, step: int, number: float):
    """A batch whose row 20 has an advantage that is no number."""
    batch = run.algorithm.prepare(play(run.policy, step), 0.0, run.state, local_sum).flatten()
    advantages = batch.advantages.clone()
    place = int(batch.mask[:, 0].nonzero()[-1])
    advantages[place] = number
    return replace(batch, advantages=advantages)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run_where_eager_mode_stops(distributed, number):
    case = {"ppo": {"normalize_advantages": "none"}, "update": {"minibatch_size": 4, "num_epochs": 1}}
    runs = [Run(kind, distributed, case).update(0) for kind in (Traced, PLAIN)]
    messages = []
    for run in runs:
        batch = poisoned(run, 1, number)
        with pytest.raises(TrainingError, match=r"step 5.*not finite; it was not applied") as raised:
            update(
                run.policy,
                run.algorithm,
                batch,
                run.stepper,
                run.config,
                distributed,
                seed=0,
                step=5,
            )
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert_equal(*runs, **TIGHT)
    assert all(torch.isfinite(value).all() for value in runs[0].numbers().values())


# --- bad input ---


def make(distributed, *, optimizer=Adam, policy=None, options=None, **changes):
    policy = policy or Policy(FAMILIES["categorical"], torch.float64)
    made = optimizer(policy.parameters(), lr=0.1, **(options or {}))
    return make_stepper(policy, PPO(BASE), made, UpdateConfig(**changes), distributed, CompiledStepper)


def test_several_processes_are_refused():
    group = SimpleNamespace(world_size=2, rank=0, strategy="MULTI_CPU")
    with pytest.raises(InputError, match=r"compile is for one process, and this run has 2.*set compile to false"):
        make(group)


def test_a_missing_compiler_is_named(distributed, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"compile needs a C\+\+ compiler.*'no-such-compiler'.*set compile to false"):
        make(distributed)


@pytest.mark.parametrize(
    ("optimizer", "options", "words"),
    [
        (torch.optim.SGD, {}, "Adam and RMSprop, not of SGD"),
        (torch.optim.AdamW, {}, "not of AdamW"),
        (Adam, {"weight_decay": 0.1}, "weight_decay = 0.1"),
        (Adam, {"amsgrad": True}, "amsgrad = True"),
        (RMSprop, {"momentum": 0.9}, "momentum = 0.9"),
        (RMSprop, {"centered": True}, "centered = True"),
    ],
)
def test_an_optimizer_of_other_arithmetic_is_refused(distributed, optimizer, options, words):
    with pytest.raises(InputError, match=f"compile.*{words}"):
        make(distributed, optimizer=optimizer, options=options)


def test_several_groups_and_mixed_types_are_refused(distributed):
    policy = Policy(FAMILIES["categorical"], torch.float64)
    halves = [{"params": policy.policy_net.parameters()}, {"params": policy.value_net.parameters()}]
    with pytest.raises(InputError, match="compile takes an optimizer with one group"):
        make(distributed, policy=policy, optimizer=lambda parameters, lr: Adam(halves, lr=lr))
    policy.value_net.float()
    with pytest.raises(
        InputError, match=r"compile takes parameters of one type, not \['torch.float32', 'torch.float64'\]"
    ):
        make(distributed, policy=policy)


def run_with(distributed, batch_changes=lambda batch: batch, policy=None, **changes) -> None:
    run = Run(PLAIN, distributed, {})
    run.policy = policy or run.policy
    batch = batch_changes(run.algorithm.prepare(play(run.policy, 0), 0.0, run.state, local_sum))
    optimizer = Adam(run.policy.parameters())
    config = UpdateConfig(**changes)
    stepper = make_stepper(run.policy, run.algorithm, optimizer, config, distributed, CompiledStepper)
    update(run.policy, run.algorithm, batch, stepper, config, distributed, seed=0, step=0)


def test_rows_of_several_steps_are_refused(distributed):
    with pytest.raises(InputError, match="compile is for control tasks"):
        run_with(distributed)


def test_a_minibatch_that_memory_would_cut_is_refused(distributed):
    with pytest.raises(InputError, match=r"24 rows are more than microbatch_tokens = 10.*minibatch_size"):
        run_with(distributed, lambda batch: batch.flatten(), microbatch_tokens=10)


def test_a_policy_that_branches_on_numbers_is_refused(distributed):
    class Branching(Policy):
        def forward(self, inputs, *args, **kwargs):
            outputs = super().forward(inputs, *args, **kwargs)
            return outputs if outputs.logprobs.sum() < 100 else replace(outputs, logprobs=outputs.logprobs * 0)

    with pytest.raises(InputError, match=r"compile failed.*does not branch on numbers.*set compile to false"):
        run_with(distributed, lambda batch: batch.flatten(), policy=Branching(FAMILIES["categorical"], torch.float64))


def test_unequal_step_counts_are_refused_where_one_count_must_serve(distributed):
    """Compiled, that is; eager mode then steps each parameter by itself."""
    runs = [Run(kind, distributed, {}).update(0) for kind in (Traced, FlatStepper, PLAIN)]
    for run in runs:
        run.optimizer.state[run.policy.value_net[0].bias]["step"] += 1
    with pytest.raises(InputError, match=r"stepped equally often.*set compile to false"):
        runs[0].update(1)
    assert_equal(runs[1].update(1), runs[2].update(1), **TIGHT)
