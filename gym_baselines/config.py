"""The settings of a training run on a Gymnasium environment."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, Literal

from gym_baselines.envs.environments import EnvironmentConfig
from gym_baselines.networks import NetworkConfig
from rlhf.algorithms.ppo import PPOConfig
from rlhf.algorithms.trpo import TrustRegionConfig
from rlhf.errors import InputError
from rlhf.settings import check_types, dotted
from rlhf.training.update import UpdateConfig

AlgorithmName = Literal["ppo", "ppo_penalty", "a2c", "reinforce", "trpo"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Sizes are global: over all processes."""

    env: str = "CartPole-v1"
    """Gymnasium id of the environment."""
    algorithm: AlgorithmName = "ppo"
    """Algorithm whose defaults and preset were the starting point; only the other settings decide what is computed."""
    seed: int = 0
    """Seed of everything random: weights, start states, actions, minibatches."""
    total_steps: int = 100_000
    """Environment steps to train for, over all environments; the rollout that reaches this number is completed."""
    num_envs: int = 8
    """Environments played side by side."""
    rollout_steps: int = 128
    """Steps of each environment between two updates."""
    whole_episodes: bool = False
    """Learn from complete episodes only (REINFORCE). Steps of an unfinished episode are carried over to the update
    after its end; a slightly older policy played them, so make rollouts long compared with episodes."""
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    """How environments are made, stepped and reset."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The policy and value networks."""
    normalize_rewards: bool = False
    """Divide rewards by the running standard deviation of their discounted sum, and clip them to +-10."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Adam, or RMSprop with decay 0.99 (as in A2C)."""
    optimizer_eps: float = 1e-5
    """The optimizer's epsilon."""
    learning_rate: float = 3e-4
    """Learning rate at the start of the run; with TRPO it applies to the value network only."""
    lr_schedule: Literal["linear", "constant"] = "linear"
    """Let the learning rate fall linearly to 0 over the run, or keep it constant."""
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            kl_coef=0.0, gamma=0.99, value_coef=1.0, value_clip_range=None, normalize_advantages="minibatch"
        )
    )
    """Objective and advantages of every algorithm (not only PPO), with defaults that are usual for control tasks."""
    trust_region: TrustRegionConfig | None = None
    """TRPO's policy step, which replaces gradient steps on the surrogate; off if null."""
    update: UpdateConfig = field(
        default_factory=lambda: UpdateConfig(num_epochs=10, minibatch_size=64, max_grad_norm=0.5)
    )
    """How the optimizer steps on a rollout; minibatch_size counts transitions."""
    compile: bool = False
    """Compile each optimizer step as one graph. Needs a small network, one process and a C++ compiler. Costs some
    seconds at the start and then saves most of the time of an update."""
    device: Literal["cpu", "auto"] = "cpu"
    """Small networks are fastest on the CPU; auto takes a GPU if there is one (Atari)."""
    eval_every: int | None = None
    """Environment steps between two evaluations of the greedy policy; none during training if null."""
    eval_episodes: int = 20
    """Episodes of each evaluation."""
    final_episodes: int = 100
    """Episodes of the evaluation that ends the command `train`: as many with greedy as with sampled actions."""
    checkpoint_every: int | None = 50_000
    """Environment steps between two checkpoints in output_dir, from which the run can be resumed; none if null."""
    keep_checkpoints: int = 1
    """How many of the newest checkpoints to keep."""
    output_dir: str | None = None
    """Folder for the trained agent, checkpoints and metrics; nothing is written if null."""
    overwrite: bool = False
    """Replace the run that output_dir already holds."""
    resume: bool = False
    """Continue the run in output_dir from its newest checkpoint, bit for bit as if it had never stopped."""
    tensorboard: bool = False
    """Write TensorBoard files to output_dir/tensorboard, with Stable-Baselines3's metric names."""
    progress_bar: bool = True
    """Show a progress bar on the terminal."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            "total_steps",
            "num_envs",
            "rollout_steps",
            "eval_every",
            "eval_episodes",
            "final_episodes",
            "checkpoint_every",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}.")
        if self.keep_checkpoints < 1:
            raise InputError(f"keep_checkpoints must be at least 1, got {self.keep_checkpoints}.")
        for name in ("learning_rate", "optimizer_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be above 0 and finite, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must lie in [0, 2**32), got {self.seed}.")
        if self.output_dir is None and (self.resume or self.tensorboard):
            raise InputError("resume and tensorboard need an output_dir: name the folder of the run.")
        if self.tensorboard and find_spec("tensorboard") is None:
            raise InputError(
                "tensorboard is not installed: pip install 'rlhf-toolkit[tracking]', or set tensorboard to false."
            )
        if self.resume and self.overwrite:
            raise InputError("resume continues the run and overwrite deletes it: give only one of the two.")
        self._check_batch()
        self._check_algorithm()

    def _check_batch(self) -> None:
        size = self.update.minibatch_size
        if size is not None and self.batch_size % size and not self.whole_episodes:
            raise InputError(
                f"update.minibatch_size = {size} does not divide the {self.batch_size} transitions of a rollout (num_envs "
                f"{self.num_envs} x rollout_steps {self.rollout_steps}): choose one that does, or null for all of them."
            )
        if self.ppo.normalize_advantages != "none" and (size or self.batch_size) < 2:
            raise InputError(
                "Advantages of a single transition cannot be normalised: choose a larger minibatch_size, or "
                "normalize_advantages none."
            )

    def _check_algorithm(self) -> None:
        ppo = self.ppo
        if ppo.kl_coef > 0:
            raise InputError(
                f"ppo.kl_coef = {ppo.kl_coef} penalises the distance from a reference policy, and control "
                "tasks have none: set it to 0."
            )
        if ppo.baseline == "none" and not self.whole_episodes:
            raise InputError(
                "ppo.baseline 'none' needs the whole return of each step, and rollouts may end before an episode does: "
                "set whole_episodes to true, or baseline to value."
            )
        if (self.trust_region is not None) != (self.algorithm == "trpo"):
            raise InputError(
                f"algorithm = {self.algorithm!r} and trust_region {'set' if self.trust_region else 'null'} contradict each "
                "other: TRPO is the algorithm with a trust region. Start from algorithm trpo, or leave trust_region alone."
            )
        if self.trust_region is not None and ppo.normalize_advantages == "minibatch":
            raise InputError(
                "trust_region makes one step with the whole batch: set ppo.normalize_advantages to batch (or none)."
            )
        if self.trust_region is not None and self.update.target_kl is not None:
            raise InputError(
                "update.target_kl stops gradient steps of the policy, but with trust_region they fit the values alone: set "
                "it to null; trust_region.max_kl bounds the policy's step."
            )
        if self.trust_region is not None and self.network.shared_trunk:
            raise InputError(
                "trust_region (TRPO) steps the policy alone, so it cannot share layers with the value function: set "
                "network.shared_trunk to false."
            )

    def learning_rate_at(self, progress: float) -> float:
        """The learning rate when the share `progress` of the run is done. Pure: no scheduler needs saving."""
        return self.learning_rate * (1.0 - progress if self.lr_schedule == "linear" else 1.0)

    @property
    def batch_size(self) -> int:
        """Transitions of one rollout, ghost steps included."""
        return self.num_envs * self.rollout_steps


ALIASES = {
    "n_envs": "num_envs",
    "n_steps": "rollout_steps",
    "n_epochs": "num_epochs",
    "batch_size": "minibatch_size",
    "ent_coef": "entropy_coef",
    "net_arch": "hidden_sizes",
    "total_timesteps": "total_steps",
    "clip_range_vf": "value_clip_range",
}
"""Stable-Baselines3's names -> our names, for settings that mean the same."""

_ELSEWHERE = {
    "vf_coef": "value_coef, which weighs 0.5 (V - R)^2: twice the vf_coef of Stable-Baselines3",
    "policy": "hidden_sizes, activation, encoder or features; policies are chosen by the spaces",
    "policy_kwargs": "hidden_sizes, activation, shared_trunk, log_std_init or features",
    "normalize_advantage": "normalize_advantages ('minibatch', 'batch' or 'none')",
    "use_sde": "nothing: state-dependent exploration is not supported",
    "tensorboard_log": "output_dir and tensorboard=True",
    "verbose": "progress_bar",
}


def with_settings(config: TrainConfig, **changes: Any) -> TrainConfig:
    """`config` with settings changed by name, in whichever group they are: `clip_range`, `hidden_sizes`, ...

    Also accepts whole groups (`ppo=PPOConfig(...)`) and Stable-Baselines3's names (`ALIASES`). Raises InputError for a
    name that is not a setting.
    """
    for theirs, ours in ALIASES.items():
        if theirs in changes and ours in changes:
            raise InputError(f"{theirs} and {ours} are the same setting: give one of them.")
    changes = {ALIASES.get(name, name): value for name, value in changes.items()}
    own = {f.name for f in fields(config)}
    direct = {name: _plain(config, name, value) for name, value in changes.items() if name in own}
    changes = {name: value for name, value in changes.items() if name not in own}
    for group in own:
        value = direct.get(group, getattr(config, group))
        inside = {f.name for f in fields(value)} & changes.keys() if is_dataclass(value) else ()
        if inside:
            direct[group] = replace(value, **{name: _plain(value, name, changes.pop(name)) for name in sorted(inside)})
    if changes:
        raise InputError(_unknown(next(iter(changes)), config))
    return replace(config, **direct)


def _unknown(name: str, config: TrainConfig) -> str:
    if name in _ELSEWHERE:
        return f"There is no setting {name!r} here; use {_ELSEWHERE[name]}."
    trust_region = {f.name for f in fields(TrustRegionConfig)}
    if name in trust_region and config.trust_region is None:
        return f"{name} is a setting of TRPO's trust region, and this is {config.algorithm}: choose algorithm trpo."
    leaves = [name for name, _ in dotted(asdict(config))]
    close = get_close_matches(name, [leaf.rpartition(".")[2] for leaf in leaves], n=1)
    return f"There is no setting {name!r}." + (f" Did you mean {close[0]!r}?" if close else " See TrainConfig for all.")


def _plain(group: Any, name: str, value: Any) -> Any:
    """`value` in the type of the setting: a list becomes a tuple, and 1e6 steps an integer."""
    if isinstance(value, list):
        return tuple(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a NumPy number
    counts = isinstance(getattr(group, name), int | None) and isinstance(value, float) and value.is_integer()
    return int(value) if counts else value
