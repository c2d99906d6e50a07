"""Will it fit? The bytes that one process of a run holds in each phase, from the settings and the models' configurations.

    weights, gradients   numbers x bytes of their type (float32: 4, bfloat16: 2)     divided by the processes under FSDP2
    Adam's moments       2 x 4 bytes per trained number                              likewise
    DDP's buckets        a second copy of the gradients
    FSDP2's gathers      sampling: the whole policy; otherwise the root's weights and those of two layers
    optimizer            temporaries: on a GPU one copy of what is trained; on a CPU two of its largest tensor
    all else             found by a dry run of the real code, see dry_run.py

Bytes are those of tensors. Libraries, kernels and a GPU's context (about 0.5 GB) come on top, and an allocator wastes some:
`SPARE` leaves room for them.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from rlhf.algorithms.base import Algorithm
from rlhf.models.adapters import POLICY
from rlhf.models.critic import AdapterCritic, ModelCritic
from rlhf.models.lora import LoRASettings
from rlhf.trainers.config import TrainerConfig
from rlhf.trainers.dry_run import Shape, Transient, reward_forward, reward_weights, transients

GB = 10**9
SPARE = 0.1
"""Share of a device's memory that a run should leave free."""
REWARD_TOKENS = 16_384
"""Tokens of a forward of a reward model, see `RewardModel`."""
HELD, PHASES = "held", ("sampling", "scoring", "backward", "optimizer step")


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of a run, by their configurations."""

    policy: Any
    lora: Any = None
    reference_adapter: bool = False
    critic: Any = None
    reference: Any = None
    """Configuration of a reference that is a model of its own; None: there is none, or it is the base of the adapter."""
    rewards: tuple[tuple[Any, torch.dtype | None], ...] = ()
    """Configuration and type of each reward model; None: the type in which it was saved."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run computes on."""

    kind: str
    """"cuda" or "cpu"."""
    memory: int
    """Bytes that one process may use."""
    processes: int = 1
    sharded: bool = False
    """FSDP2 instead of a copy of the model in each process."""


def this_machine(processes: int = 1, sharded: bool = False) -> Machine:
    """The first GPU; without one the machine's memory, divided among the processes."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return Machine(kind="cuda", memory=memory, processes=processes, sharded=sharded)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes
    return Machine(kind="cpu", memory=memory, processes=processes, sharded=sharded)


@dataclass(frozen=True)
class Row:
    name: str
    bytes: int
    phase: str = HELD
    """One of PHASES; HELD: in all of them."""


@dataclass(frozen=True)
class Plan:
    rows: tuple[Row, ...]
    memory: int
    """Bytes that one process may use."""

    def total(self, phase: str) -> int:
        return sum(row.bytes for row in self.rows if row.phase in (HELD, phase))

    @property
    def worst(self) -> str:
        """The phase with the peak."""
        return max(PHASES, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.worst)

    @property
    def fits(self) -> bool:
        return self.peak <= (1 - SPARE) * self.memory


def plan(
    config: TrainerConfig,
    algorithm: Algorithm,
    models: Models,
    machine: Machine,
    *,
    prompt_tokens: int | None = None,
    held_out: int = 0,
) -> Plan:
    """prompt_tokens: length of the longest prompt; default: the most that `config` allows. held_out: number of prompts to
    evaluate on; they share no prefill, and so may take more memory than the prompts of a step."""
    rows = tuple(_rows(config, algorithm, models, machine, prompt_tokens or config.max_prompt_tokens, held_out))
    return Plan(tuple(row for row in rows if row.bytes), machine.memory)


def _rows(
    config: TrainerConfig, algorithm: Algorithm, models: Models, machine: Machine, prompt: int, held_out: int
) -> Iterator[Row]:
    fast = torch.bfloat16 if config.precision == "bfloat16" else None
    shape = Shape(
        config=models.policy,
        lora=models.lora,
        critic=models.critic,
        reference_adapter=models.reference_adapter,
        frozen=config.frozen_dtype,
        computes=None if machine.sharded else fast,
        casts=fast if machine.sharded else None,
        recompute=config.gradient_checkpointing,
    )
    shards = machine.processes if machine.sharded else 1
    policy = shape.build()
    own = list(policy.critic.own_parameters()) if policy.critic is not None else []
    others = _others(policy.parameters(), own)
    trained = [p for p in policy.parameters() if p.requires_grad]
    full = sum(p.nbytes for p in trained)
    yield Row("weights, trained", sum(p.nbytes for p in others if p.requires_grad) // shards)
    yield Row("weights, frozen", sum(p.nbytes for p in others if not p.requires_grad) // shards)
    yield Row("critic's own weights", sum(p.nbytes for p in own) // shards)
    yield Row("Adam's moments", 2 * full // shards)
    yield Row("DDP's buckets", full if machine.processes > 1 and not machine.sharded else 0)

    new, width = config.generation.max_new_tokens, prompt + config.generation.max_new_tokens
    copies = algorithm.completions_per_prompt
    prompts = -(-config.prompts_per_step // machine.processes)
    per_microbatch = max(1, config.update.microbatch_tokens // width)
    rows = min(per_microbatch, prompts * copies)
    values = models.critic is not None
    scored = transients(shape, "scoring", rows, prompt, new, values=values)
    if models.reference is not None:
        other = Shape(
            config=models.reference, frozen=config.frozen_dtype, casts=config.frozen_dtype, computes=shape.computes
        )
        yield Row(
            "reference", sum(p.numel() for p in other.build().parameters()) * _width(config.frozen_dtype) // shards
        )
        scored = scored + transients(other, "scoring", rows, prompt, new, values=False)
    types = [(found, dtype or _saved_type(found)) for found, dtype in models.rewards]
    yield Row("reward models", sum(reward_weights(*reward) for reward in types) // shards)
    judged_at_once = min(prompts * copies, max(1, REWARD_TOKENS // width))
    judged = [Transient(0, reward_forward(*reward, judged_at_once, width)) for reward in types]

    at_once = config.generation.completions_at_once
    batches = {(min(prompts, max(1, at_once // copies)), copies), (min(at_once, -(-held_out // machine.processes)), 1)}
    sample = partial(transients, shape, "sampling", temperature=config.generation.temperature)
    sampled = [sample(groups, size, prompt, new) for groups, size in batches if groups]
    most = max(sampled, key=lambda found: max(t.peak for t in found))
    yield Row("KV cache and casts", most[1].kept, "sampling")
    yield Row("prefill, logits and draws", max(t.peak for t in most) - most[1].kept, "sampling")
    yield Row("forwards without gradients", max(t.peak for t in scored + judged), "scoring")
    size = (config.update.minibatch_size or config.prompts_per_step * copies) // machine.processes
    update = (min(per_microbatch, max(1, size)), prompt, new)
    (learnt,) = transients(shape, "update", *update, values=values, entropy="entropy" in algorithm.needs)
    for phase in ("backward", "optimizer step"):
        yield Row("gradients", full // shards, phase)
    yield Row("activations", learnt.kept, "backward")
    yield Row("backward's temporaries", learnt.beside, "backward")
    largest = 2 * max(p.nbytes for p in trained)
    yield Row("AdamW's temporaries", (full if machine.kind == "cuda" else largest) // shards, "optimizer step")
    if machine.sharded:
        yield from _gathers(policy, shape.casts)


def _gathers(policy: Any, casts: torch.dtype | None) -> Iterator[Row]:
    """What FSDP2 holds besides its shards. With casts, gathered tensors have that type; gradients are added in float32."""
    from rlhf.layout import _units

    def size(parameters: Any, type_bytes: int | None = None) -> int:
        return sum(p.numel() * (type_bytes or (casts or p.dtype).itemsize) for p in parameters)

    layers = [list(layer.parameters()) for layer in _units(policy)[0]]
    root = _others(policy.parameters(), [p for layer in layers for p in layer])
    two = [*root, *max(layers, key=size, default=[]), *max(layers, key=size, default=[])]
    yield Row("gathered policy", size(policy.parameters()), "sampling")
    yield Row("gathered layers", size(two), "scoring")
    learning = [p for p in two if p.requires_grad]
    yield Row("gathered layers and their gradients", size(two) + size(learning) + size(learning, 4), "backward")


def _others(parameters: Any, known: list[nn.Parameter]) -> list[nn.Parameter]:
    seen = set(map(id, known))
    return [p for p in parameters if id(p) not in seen]


def _width(dtype: torch.dtype | None) -> int:
    return 4 if dtype is None else dtype.itemsize


def _saved_type(config: Any) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


# --- what a run says, and what to change ---

Changed = tuple[TrainerConfig, Models, Machine]


def _lora(config: TrainerConfig, models: Models, machine: Machine) -> Changed:
    return config, replace(models, lora=LoRASettings(r=16).peft_config(), reference=None), machine


def _halved(group: str, name: str, config: TrainerConfig, models: Models, machine: Machine) -> Changed:
    settings = getattr(config, group)
    less = replace(settings, **{name: max(1, getattr(settings, name) // 2)})
    return replace(config, **{group: less}), models, machine


def _set(name: str, value: Any, config: TrainerConfig, models: Models, machine: Machine) -> Changed:
    return replace(config, **{name: value}), models, machine


def _fsdp2(config: TrainerConfig, models: Models, machine: Machine) -> Changed:
    processes = machine.processes if machine.processes > 1 and not machine.sharded else 8 * machine.processes
    return config, models, replace(machine, sharded=True, processes=processes)


REMEDIES: dict[str, Callable[[TrainerConfig, Models, Machine], Changed]] = {
    "frozen_precision: bfloat16": partial(_set, "frozen_precision", "bfloat16"),
    "precision: bfloat16": partial(_set, "precision", "bfloat16"),
    "gradient_checkpointing: true": partial(_set, "gradient_checkpointing", True),
    "update.microbatch_tokens, half": partial(_halved, "update", "microbatch_tokens"),
    "generation.completions_at_once, half": partial(_halved, "generation", "completions_at_once"),
    "lora.r: 16": _lora,
    "FSDP2 over more GPUs": _fsdp2,
}
"""What to change, the cheapest first."""


@dataclass(frozen=True)
class Advice:
    remedy: str
    plan: Plan


def advice(
    config: TrainerConfig, algorithm: Algorithm, models: Models, machine: Machine, **options: Any
) -> list[Advice]:
    """Remedies that lower the peak, each by itself; the last is all of them together. None if the run fits."""
    now = plan(config, algorithm, models, machine, **options)
    if now.fits:
        return []
    everything: Changed = (config, models, machine)
    found = []
    for name, change in REMEDIES.items():
        if (name.startswith("lora") and models.lora is not None) or (
            name.startswith("FSDP2") and machine.kind == "cpu"
        ):
            continue
        changed = change(config, models, machine)
        then = plan(changed[0], algorithm, *changed[1:], **options)
        if then.peak < 0.99 * now.peak:
            found.append(Advice(name, then))
            everything = change(*everything)
    together = plan(everything[0], algorithm, *everything[1:], **options)
    return [*found, Advice("all of these together", together)] if len(found) > 1 else found


def gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 10**6:.1f} MB"


def lines(found: Plan, remedies: list[Advice] = ()) -> list[str]:  # type: ignore[assignment]
    """What a run prints: the peak, what it consists of, and what would lower it."""
    parts = sorted((row for row in found.rows if row.phase in (HELD, found.worst)), key=lambda row: -row.bytes)
    about = ", ".join(f"{row.name} {gb(row.bytes)}" for row in parts[:4])
    verdict = "fits" if found.fits else f"does NOT fit with {SPARE:.0%} to spare"
    peak = f"about {gb(found.peak)} of {gb(found.memory)} per process at the peak ({found.worst})"
    first = f"memory: {peak}, {verdict}: {about}"
    return [
        first,
        *(
            f"    {a.remedy}: {gb(a.plan.peak)}, saves {gb(found.peak - a.plan.peak)}"
            + (", fits" if a.plan.fits else "")
            for a in remedies
        ),
    ]


def models_of(policy: Any, reference: Any, rewards: Any) -> Models:
    """The models of a run that has been built. rewards: the modules among its rewards."""
    adapters, critic = policy.adapters, policy.critic
    kind = "adapter" if isinstance(critic, AdapterCritic) else None if critic is None else "head"
    own = reference.module if reference is not None else None
    return Models(
        policy=policy.lm.config,
        lora=None if adapters is None else adapters.model.peft_config[POLICY],
        reference_adapter=reference is not None and own is None and reference.adapter is not None,
        critic=critic.model.config if isinstance(critic, ModelCritic) else kind,
        reference=None if own is None else own.lm.config,
        rewards=tuple((model.config, next(model.parameters()).dtype) for model in rewards),
    )


def memory_lines(
    config: TrainerConfig,
    algorithm: Algorithm,
    policy: Any,
    reference: Any,
    rewards: Any,
    distributed: Any,
    *,
    prompt_tokens: int,
    held_out: int,
) -> list[str]:
    """What a run that has been built prints; nothing if its models are small beside the machine, and never an error."""
    try:
        machine = this_machine(distributed.world_size, distributed.layout.in_step)
        if 16 * sum(p.numel() for p in policy.parameters()) < machine.memory / 100:
            return []
        arguments = (config, algorithm, models_of(policy, reference, rewards), machine)
        with torch.random.fork_rng():
            options: dict[str, Any] = {"prompt_tokens": prompt_tokens, "held_out": held_out}
            return lines(plan(*arguments, **options), advice(*arguments, **options))
    except Exception as error:  # a plan is a help, and must not end a run that might have worked
        return [f"memory: cannot be planned for this model ({type(error).__name__}: {error})"]
