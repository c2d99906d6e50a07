"""A linear policy, batches of its own actions, and gradients of PPO on them."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Independent, Normal

from rlhf.algorithms.ppo import PPO, PPOConfig
from rlhf.core.distributions import Categorical, Gaussian
from rlhf.core.masking import local_sum
from rlhf.training.update import UpdateConfig
from rlhf.types import PolicyOutputs, TrainingBatch, Trajectories
from tests.updates import update

EXACT = {"rtol": 0, "atol": 1e-12}
ROWS = 40
F64 = torch.float64
FAMILIES = {"categorical": Categorical(4), "gaussian": Gaussian(2)}


class Linear(nn.Module):
    """Parameters of the distribution = observations @ weight; a Gaussian's log-std does not depend on the observation.

    With `tells_kl` false it gives no analytic KL, like a language model.
    """

    def __init__(self, family, *, seed: int = 0, tells_kl: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        outputs = family.num_params if family.is_discrete else family.dimensions
        self.family, self.tells_kl = family, tells_kl
        self.weight = nn.Parameter(torch.randn(3, outputs, generator=generator, dtype=F64))
        self.value = nn.Parameter(torch.randn(3, generator=generator, dtype=F64))
        self.log_std = None
        if not family.is_discrete:
            self.log_std = nn.Parameter(0.3 * torch.randn(outputs, generator=generator, dtype=F64))

    def params(self, observations: Tensor) -> Tensor:
        params = observations @ self.weight
        return params if self.log_std is None else torch.cat([params, self.log_std.expand_as(params)], -1)

    def forward(self, inputs, actions, with_values=True, with_entropy=False, old_distribution=None) -> PolicyOutputs:
        params = self.params(inputs["observations"]).unsqueeze(1)
        tells = self.tells_kl and old_distribution is not None
        return PolicyOutputs(
            logprobs=self.family.logprobs(params, actions),
            values=(inputs["observations"] @ self.value).unsqueeze(1) if with_values else None,
            entropy=self.family.entropy(params) if with_entropy else None,
            distribution=params,
            kl=self.family.kl(old_distribution, params) if tells else None,
        )

    def torch_distribution(self, observations: Tensor):
        """The same by torch.distributions."""
        params = self.params(observations)
        if self.family.is_discrete:
            return TorchCategorical(logits=params)
        mean, log_std = params.chunk(2, -1)
        return Independent(Normal(mean, log_std.exp()), 1)


def moved(policy: Linear, by: float = 0.3) -> Linear:
    """Another policy of the same kind, some way off."""
    other = Linear(policy.family, seed=1, tells_kl=policy.tells_kl)
    with torch.no_grad():
        for parameter, old in zip(other.parameters(), policy.parameters(), strict=True):
            parameter.copy_(old + by * parameter)
    return other


def batch_of(policy: Linear, algorithm: PPO, *, state=None, rows: int = ROWS) -> TrainingBatch:
    """One-step episodes with random rewards and the actions that `policy`, the old one, drew; every fifth is a ghost."""
    generator = torch.Generator().manual_seed(7)
    observations = torch.randn(rows, 3, generator=generator, dtype=F64)
    family = policy.family
    with torch.no_grad():
        params = policy.params(observations)
        actions = family.sample(params, torch.rand(rows, family.num_draws, generator=generator, dtype=F64))
        logprobs = family.logprobs(params, actions).unsqueeze(1)
    mask = (torch.arange(rows) % 5 != 4).unsqueeze(1)
    trajectories = Trajectories(
        inputs={"observations": observations},
        actions=actions.unsqueeze(1),
        mask=mask,
        rewards=torch.randn(rows, 1, generator=generator, dtype=F64),
        sampling_logprobs=logprobs,
        old_logprobs=logprobs,
        values=torch.zeros(rows, 1, dtype=F64),
        next_values=torch.zeros(rows, 1, dtype=F64),
        terminated=torch.ones(rows, 1, dtype=torch.bool),
        episode_ends=torch.ones(rows, 1, dtype=torch.bool),
        old_distribution=params.unsqueeze(1),
        row_tokens=torch.ones(rows, dtype=torch.int64),
        row_index=torch.arange(rows),
    )
    return algorithm.prepare(trajectories, 0.0, algorithm.initial_state() if state is None else state, local_sum)


def settings(**changes) -> PPOConfig:
    defaults = {
        "kl_coef": 0.0,
        "baseline": "none",
        "gae_lambda": 1.0,
        "normalize_advantages": "none",
        "surrogate": "unclipped",
    }
    return PPOConfig(**{**defaults, **changes})


def gradient(policy: Linear, algorithm: PPO, batch: TrainingBatch) -> list[Tensor]:
    """Of the algorithm's loss on the whole batch, for each parameter of the policy (not of the values)."""
    count = {name: w.count.sum() for name, w in batch.weightings.items()}
    old = {} if batch.old_distribution is None else {"old_distribution": batch.old_distribution}
    needs = algorithm.needs
    outputs = policy(batch.inputs, batch.actions, with_values="values" in needs, with_entropy="entropy" in needs, **old)
    loss = algorithm.loss(outputs, replace(batch, denominators=count)).total
    return gradients_of(loss, policy)


def gradients_of(loss: Tensor, policy: Linear) -> list[Tensor]:
    parameters = [parameter for name, parameter in policy.named_parameters() if name != "value"]
    return list(torch.autograd.grad(loss, parameters))


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def run_update(distributed, *, epochs=3, policy=None, minibatch_size=None, state=None, learning_rate=0.05, **changes):
    """One real update by plain gradient descent. Returns (old policy, new policy, batch, state, metrics)."""
    old = policy or Linear(Categorical(4))
    new = moved(old, by=0.0)
    algorithm = PPO(settings(**{"penalty_coef": 1.0, **changes}))
    state = algorithm.initial_state() if state is None else state
    batch = batch_of(old, algorithm, state=state)
    config = UpdateConfig(num_epochs=epochs, minibatch_size=minibatch_size, max_grad_norm=1e9)
    optimizer = torch.optim.SGD(new.parameters(), lr=learning_rate)
    metrics = update(new, algorithm, batch, optimizer, config, distributed, seed=0, step=0, state=state)
    return old, new, batch, state, metrics
