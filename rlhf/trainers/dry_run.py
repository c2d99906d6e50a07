"""What a step allocates, found by running the real code on tensors without storage: nothing is computed or loaded.

The models are made on the meta device from their configurations, then given torch's fake tensors, which go through the same
operations as real ones. `Ledger` adds up the bytes of those that are alive.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from rlhf.core.logprobs import token_logprobs
from rlhf.core.random import invert_cdf
from rlhf.models.adapters import REFERENCE, adapted
from rlhf.models.policy import Policy
from rlhf.models.recompute import recompute_layers
from rlhf.models.states import Anatomy


class Ledger(TorchDispatchMode):
    """Bytes of the tensors that operations make inside this context: alive at the moment (`now`), and at most (`peak`)."""

    def __init__(self, *known: nn.Module) -> None:
        """known: modules whose weights and gradients are not counted."""
        super().__init__()
        tensors = [t for m in known for t in (*m.parameters(), *m.buffers())]
        self._seen = {_storage(t)._cdata: 0 for t in (*tensors, *(t.grad for t in tensors if t.grad is not None))}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := _storage(tensor))._cdata not in self._seen:
                self._seen[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._seen.pop(key)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


@dataclass(frozen=True)
class Transient:
    """Bytes that a forward or backward allocates and frees again: `kept` to its end, which grows by the same amount with
    each layer (KV cache, weights cast by autocast, what the backward pass needs); the most `beside` that at one time."""

    kept: int
    beside: int

    @property
    def peak(self) -> int:
        return self.kept + self.beside


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the sizes of the policy's tensors, besides the number of tokens."""

    config: Any
    """Configuration of the causal LM."""
    lora: Any = None
    """A `peft.LoraConfig`."""
    critic: Any = None
    """None, "head", "adapter", or the configuration of a model of its own."""
    reference_adapter: bool = False
    """Whether the reference is a copy of the adapter, which then has an effect already."""
    frozen: torch.dtype | None = None
    """Type of the weights that are not trained; None: float32."""
    computes: torch.dtype | None = None
    """Type of autocast; None: none."""
    casts: torch.dtype | None = None
    """Type to which the layout casts all weights before they compute (FSDP2); None: as they are."""
    recompute: bool = False
    """Whether layers are checkpointed."""

    @property
    def layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    def with_layers(self, number: int) -> "Shape":
        critic = self.critic  # one of another depth stays whole: it adds the same to all runs
        if not isinstance(critic, str | None) and critic.get_text_config().num_hidden_layers == self.layers:
            critic = _shortened(critic, number)
        return replace(self, config=_shortened(self.config, number), critic=critic)

    def build(self) -> Policy:
        """The policy on the meta device, made by the constructors that a run uses."""
        with _meta():
            lm, adapters = adapted(AutoModelForCausalLM.from_config(self.config, dtype=torch.float32), self.lora)
            if adapters is not None and self.frozen is not None:
                adapters.cast_base(self.frozen)
            if adapters is not None and self.reference_adapter:
                adapters.freeze_copy(REFERENCE)
            critic = self.critic
            if critic is not None and not isinstance(critic, str):
                critic = _classifier(critic, torch.float32)
            width = int(lm.get_input_embeddings().embedding_dim)  # type: ignore[arg-type]
            return Policy(lm, critic=critic, adapters=adapters, anatomy=Anatomy(width=width, plain_head=True))


class Hollow:
    """A policy without storage, on which a run's forwards and backwards are made."""

    def __init__(self, shape: Shape) -> None:
        self.policy = shape.build()
        for part in self.policy.modules() if shape.casts is not None else ():
            for parameter in part.parameters(recurse=False):
                if not getattr(part, "computes_in_float32", False):
                    parameter.data = parameter.data.to(shape.casts)
        if shape.recompute:
            recompute_layers(self.policy)
        self.mode = _fill(self.policy)
        self.autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=shape.computes is not None)

    def _inputs(self, rows: int, prompt: int, new: int) -> tuple[dict[str, Tensor], Tensor]:
        with self.mode:
            ids, actions = torch.zeros(rows, prompt + new, dtype=torch.int64), torch.zeros(rows, new, dtype=torch.int64)
        return {"input_ids": ids, "prompt_lengths": torch.full((rows,), prompt)}, actions

    def update(self, rows: int, prompt: int, new: int, *, values: bool, entropy: bool) -> list[Transient]:
        """Forward and backward of a microbatch, when the minibatch's gradients exist already: each adds to them."""
        inputs, actions = self._inputs(rows, prompt, new)
        for parameter in self.policy.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        with Ledger(self.policy) as ledger:
            with self.autocast():
                outputs = self.policy(inputs, actions, with_values=values, with_entropy=entropy)
                loss = sum(t.sum() for t in (outputs.logprobs, outputs.values, outputs.entropy) if t is not None)
            kept = ledger.now
            loss.backward()  # type: ignore[union-attr]
        return [Transient(kept, ledger.peak - kept)]

    @torch.no_grad()
    def scoring(self, rows: int, prompt: int, new: int, *, values: bool) -> list[Transient]:
        """Forward of a microbatch without gradients; the reference's is like it."""
        inputs, actions = self._inputs(rows, prompt, new)
        with Ledger(self.policy) as ledger, self.autocast():
            self.policy(inputs, actions, with_values=values)
            kept = ledger.now
        return [Transient(kept, ledger.peak - kept)]

    @torch.no_grad()
    def sampling(self, groups: int, copies: int, prompt: int, new: int, *, temperature: float) -> list[Transient]:
        """Prefill of `groups` prompts, and the last token of `copies` completions of each, all of full length, as
        `InProcessEngine` computes them. Prompts are of unequal length, so that attention has a mask."""
        with Ledger(self.policy) as ledger, self.mode, self.autocast():
            cache = DynamicCache(config=self.policy.lm.config)
            logits = self._decode(cache, groups, prompt, prompt)
            prefill = Transient(ledger.now, ledger.peak - ledger.now)
            ledger.peak = 0
            cache.batch_repeat_interleave(copies)
            logits = logits.repeat_interleave(copies, 0)
            layers: Any = cache.layers
            for number, layer in enumerate(layers):  # all new tokens at once, in place of one after the other
                keys, values = layer.keys, layer.values
                tokens = [t.new_empty(*t.shape[:2], new - 1, t.shape[-1]) for t in (keys, values)]
                cache.update(tokens[0], tokens[1], number)
                del keys, values, tokens
            if new > 1:
                logits = self._decode(cache, groups * copies, 1, prompt + new)
            chosen = invert_cdf(logits, logits.new_empty(len(logits), dtype=torch.float64), temperature=temperature)
            token_logprobs(logits, chosen, temperature=temperature)
            kept = ledger.now
        return [prefill, Transient(kept, ledger.peak - kept)]

    def _decode(self, cache: DynamicCache, rows: int, width: int, seen: int) -> Tensor:
        ids, attention = torch.zeros(rows, width, dtype=torch.int64), torch.zeros(rows, seen, dtype=torch.int64)
        more: dict[str, Any] = {"logits_to_keep": 1} if width > 1 else {}
        caching: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        return self.policy.decode(input_ids=ids, attention_mask=attention, position_ids=ids, **caching, **more).logits[
            :, -1
        ]


def transients(shape: Shape, phase: str, *sizes: int, **options: Any) -> list[Transient]:
    """What `Hollow.phase(*sizes, **options)` says: run with 2 and 3 layers, and continued to the model's own number, since
    `kept` is linear in the layers, and `beside` belongs to one of them or to the head."""
    key = (repr(shape), phase, sizes, tuple(options.items()))
    if key not in _found:
        number = shape.layers
        runs = [
            getattr(Hollow(shape.with_layers(n)), phase)(*sizes, **options)
            for n in sorted({min(number, 2), min(number, 3)})
        ]
        more = [(number - 3) * (b.kept - a.kept) if number > 3 else 0 for a, b in zip(runs[0], runs[-1], strict=True)]
        _found[key] = [Transient(t.kept + m, t.beside) for t, m in zip(runs[-1], more, strict=True)]
    return _found[key]


_found: dict[Any, list[Transient]] = {}


def reward_forward(config: Any, dtype: torch.dtype, rows: int, width: int) -> int:
    """Bytes of a reward model's forward of `rows` sequences of `width` tokens, with their mask. One layer at a time: the
    number of layers does not matter."""
    with _meta():
        model = _classifier(_shortened(config, min(2, config.get_text_config().num_hidden_layers)), dtype).eval()
    mode = _fill(model)
    with torch.no_grad(), Ledger(model) as ledger, mode:
        ids = torch.zeros(rows, width, dtype=torch.int64)
        model.base_model(input_ids=ids, attention_mask=ids, use_cache=False)
    return ledger.peak


def reward_weights(config: Any, dtype: torch.dtype) -> int:
    """Bytes of a reward model's weights."""
    with _meta():
        return sum(parameter.nbytes for parameter in _classifier(config, dtype).parameters())


def _classifier(config: Any, dtype: torch.dtype) -> Any:
    config = deepcopy(config)
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def _shortened(config: Any, layers: int) -> Any:
    """The configuration of a model with fewer layers; its lists with an entry per layer are cut."""
    config = deepcopy(config)
    text = config.get_text_config()
    before = text.num_hidden_layers
    text.num_hidden_layers = layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:layers])
    return config


@contextmanager
def _meta() -> Iterator[None]:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fill(model: nn.Module) -> FakeTensorMode:
    """Give a model of the meta device fake tensors of the CPU, in place; tied weights stay tied."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}

    def fake(tensor: Any, wrap: Callable[[Tensor], Tensor]) -> Any:
        if tensor is None or isinstance(tensor, torch._subclasses.FakeTensor):
            return tensor
        if id(tensor) not in made:
            with mode:
                made[id(tensor)] = tensor, wrap(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        return made[id(tensor)][1]

    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                trained = parameter.requires_grad
                part._parameters[name] = fake(parameter, lambda t, on=trained: nn.Parameter(t, requires_grad=on))  # type: ignore[misc]
        for name, buffer in part._buffers.items():
            part._buffers[name] = fake(buffer, lambda t: t)
    return mode
