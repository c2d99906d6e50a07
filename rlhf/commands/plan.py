"""Will it fit? `python -m rlhf.commands.plan --config x.yaml`: the memory that a run of this configuration needs, by phase.

Takes the settings of the recipes and reads the models' config.json alone: no weights are loaded, and nothing is downloaded
(a hub name must be in the local cache; `--policy FOLDER` names a folder with a config.json instead).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import transformers
import yaml
from transformers import AutoConfig

from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.ppo import PPO
from rlhf.algorithms.presets import PRESETS
from rlhf.commands.cli import guard, parse
from rlhf.commands.user_settings import UserSettings
from rlhf.errors import InputError
from rlhf.models.loading import base_of, is_adapter, load_model
from rlhf.trainers.config import GRPOTrainerConfig, PPOTrainerConfig, TrainerConfig
from rlhf.trainers.plan import HELD, PHASES, Machine, Models, Plan, advice, gb, lines, plan, this_machine


@dataclass(frozen=True, kw_only=True)
class _Asked(UserSettings):
    """What the recipes add to a trainer's settings, and what the plan adds to theirs."""

    critic: str = "head"
    """As in recipes/ppo_rlhf.py."""
    preset: str | None = None
    """As in recipes/grpo.py."""
    output_dir: str = "runs/plan"
    """Not used, like the data's settings."""
    device_gb: float | None = None
    """Memory of each GPU, in units of 10**9 bytes; null: of this machine."""
    processes: int = 1
    """Number of GPUs, one process each."""
    layout: Literal["ddp", "fsdp2"] = "ddp"
    """How several processes hold the model: a copy each, or in shards."""


@dataclass(frozen=True, kw_only=True)
class PPOPlan(_Asked, PPOTrainerConfig): ...


@dataclass(frozen=True, kw_only=True)
class GRPOPlan(_Asked, GRPOTrainerConfig): ...


def kind_of(arguments: Sequence[str]) -> type[PPOPlan] | type[GRPOPlan]:
    """PPO or GRPO, by the settings that only one of them has. InputError if none or both are named."""
    names = {argument[2:].partition("=")[0].partition(".")[0] for argument in arguments if argument.startswith("--")}
    for before, argument in zip(["", *arguments], arguments, strict=False):
        file = (
            argument.partition("=")[2] if argument.startswith("--config=") else argument if before == "--config" else ""
        )
        if Path(file).is_file():
            read = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            names |= {str(key).partition(".")[0] for key in read} if isinstance(read, dict) else set()
    own = [{f.name for f in fields(kind)} - {f.name for f in fields(TrainerConfig)} - shared for kind, shared in _KINDS]
    found = [kind for (kind, _), mine in zip(_KINDS, own, strict=True) if names & mine]
    if len(found) != 1:
        raise InputError(
            f"The settings name {'both ppo and grpo' if found else 'neither ppo nor grpo'}, so that it is open which of "
            "them is planned. Give one setting of one of them, such as --ppo.kl_coef or --grpo.completions_per_prompt."
        )
    return found[0]


_SHARED = {f.name for f in fields(_Asked)}
_KINDS: list[tuple[Any, set[str]]] = [(PPOPlan, _SHARED - {"critic"}), (GRPOPlan, _SHARED - {"preset"})]


def read(arguments: Sequence[str]) -> tuple[Any, PPO | GRPO, Models, Machine]:
    """What to plan, from the command line."""
    kind = kind_of(arguments)
    asked: Any = parse(kind, arguments, description=__doc__)
    if asked.preset is not None and kind is GRPOPlan:
        if asked.preset not in PRESETS:
            raise InputError(f"preset={asked.preset!r} is unknown. Choose one of {', '.join(PRESETS)}.")
        asked = parse(kind, arguments, defaults={"grpo": PRESETS[asked.preset]})
    if asked.policy is None:
        raise InputError("policy is not set: name the model to plan for, a folder with its config.json.")
    algorithm = PPO(asked.ppo) if kind is PPOPlan else GRPO(asked.grpo.with_length(asked.generation.max_new_tokens))
    base, lora = asked.policy, asked.lora.peft_config()
    if is_adapter(base):
        from peft import PeftConfig

        base, lora = base_of(base, "policy"), PeftConfig.from_pretrained(base)
    policy = _config(base, "policy")
    critic = asked.critic if asked.critic in ("head", "adapter") else _config(asked.critic, "critic")
    reward = None if asked.reward_model is None else _config(asked.reward_model, "reward_model")
    if asked.critic == "adapter" and lora is None:
        raise InputError('critic="adapter" is an adapter of the policy\'s base: set lora.r too.')
    models = Models(
        policy=policy,
        lora=lora,
        reference_adapter=base != asked.policy,
        critic=critic if "values" in algorithm.needs else None,
        reference=policy if lora is None and "reference" in algorithm.needs else None,
        rewards=() if reward is None else ((reward, asked.frozen_dtype),),
    )
    sharded = asked.layout == "fsdp2"
    if asked.processes < 1 or (asked.device_gb is not None and not asked.device_gb > 0):
        raise InputError(f"processes={asked.processes} and device_gb={asked.device_gb} must be above 0.")
    machine = this_machine(asked.processes, sharded)
    if asked.device_gb is not None:
        memory = int(asked.device_gb * 10**9)
        machine = Machine(kind="cuda", memory=memory, processes=asked.processes, sharded=sharded)
    return asked, algorithm, models, machine


def held_out(asked: Any) -> int:
    """How many prompts to evaluate on: so many that memory does not depend on it, if there are any."""
    return asked.processes * asked.generation.completions_at_once if asked.eval_dataset else 0


def _config(name: str, setting: str) -> Any:
    try:
        return load_model(AutoConfig, name, setting, local_files_only=True)
    except InputError as error:
        raise InputError(
            f"{setting}: the configuration of {name!r} is not on this machine. Give a folder that holds its config.json, "
            "or load it once from the hub."
        ) from error


def table(found: Plan) -> str:
    """The plan's rows and totals, phase by phase."""
    sizes = [(row.name, [row.bytes if row.phase in (HELD, phase) else 0 for phase in PHASES]) for row in found.rows]
    merged: dict[str, list[int]] = {}
    for name, columns in sizes:
        merged[name] = [a + b for a, b in zip(merged.get(name, [0] * len(PHASES)), columns, strict=True)]
    merged["total"] = [found.total(phase) for phase in PHASES]
    head = f"{'per process':<34}" + "".join(f"{phase:>16}" for phase in PHASES)
    body = (f"{name:<34}" + "".join(f"{gb(size) if size else '':>16}" for size in row) for name, row in merged.items())
    return "\n".join([head, *body])


@guard()
def main(arguments: Sequence[str] | None = None) -> None:
    transformers.utils.logging.set_verbosity_error()
    asked = read(sys.argv[1:] if arguments is None else arguments)
    prompts = held_out(asked[0])
    found = plan(*asked, held_out=prompts)
    print(table(found))
    print(*lines(found, advice(*asked, held_out=prompts)), sep="\n")


if __name__ == "__main__":
    main()
