"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: one frozen base, several adapters, of which one is active.

The base is shared: policy, reference and value adapter are the same weights with another adapter on, or with none.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import InputError
from rlhf.models.lora import check_lora

if TYPE_CHECKING:  # peft takes seconds to import, and most runs do not need it
    from peft import LoraConfig, PeftModel

POLICY, REFERENCE, CRITIC = "default", "reference", "critic"
"""Names of the adapters. "default" is the name under which stock peft saves and loads an adapter."""


class Adapters:
    """The adapters of one base model. `lm` is the transformers model itself, with peft's layers in place of its own."""

    def __init__(self, model: "PeftModel", *, seed: int = 0) -> None:
        """Freezes the base, and makes the adapter "default" trainable, in float32 or wider. seed: of adapters to come.

        Raises InputError if the model has other adapters, or settings with which the base would not stay as it is.
        """
        if list(model.peft_config) != [POLICY]:
            raise InputError(
                f"policy: it has the adapters {', '.join(model.peft_config)}. Give a PeftModel with one, {POLICY!r}."
            )
        self.config: LoraConfig = model.peft_config[POLICY]  # type: ignore[assignment]
        check_lora(self.config)
        self.model = model
        self.seed = seed
        self.lm: PreTrainedModel = model.get_base_model()  # type: ignore[assignment]
        self.active_name: str | None = None
        """The adapter that is on; None: none."""
        self._layers = _switched_layers(self.lm)
        if any(getattr(layer, "merged", False) for layer in self._layers):
            raise InputError("policy: its adapter is merged into the base. Call unmerge_adapter() before training.")
        for layer in self._layers:
            layer.enable_adapters(True)
        self._train_only(POLICY)
        self._activate(POLICY)

    @classmethod
    def add(cls, lm: PreTrainedModel, config: "LoraConfig", *, seed: int = 0) -> "Adapters":
        """A new adapter in `lm`, which is changed in place; it has no effect yet. seed: decides its first weights."""
        from peft import get_peft_model

        check_lora(config)
        saved = config.modules_to_save or ()  # peft adds the heads of classifiers
        try:
            with _new_weights(seed):
                config = deepcopy(config)  # peft writes into the settings
                model = get_peft_model(lm, config)
        except ValueError as error:
            raise InputError(f"peft_config does not fit {type(lm).__name__}: {error}") from error
        if config.target_parameters:  # peft has rewritten the settings
            raise InputError(
                f"peft_config: target_modules takes in experts, which {type(lm).__name__} holds as parameters of several "
                f"experts at once ({', '.join(sorted(config.target_parameters))}), not as linear layers. Name the layers "
                "outside of the experts, such as target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj']."
            )
        found = [name for name, module in lm.named_modules() if hasattr(module, "modules_to_save")]
        for wanted in saved:  # peft says nothing if a name fits no module
            if not any(name.endswith(wanted) for name in found):
                raise InputError(
                    f"peft_config: modules_to_save={wanted!r} is no module of {type(lm).__name__}, so that nothing would "
                    "be trained for it. Correct the name."
                )
        return cls(model, seed=seed)

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Compute with the adapter `name` inside the block; None: with the base alone.

        Sets the name in each layer: peft's own switches also change which parameters are trained.
        """
        before = self.active_name
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, name: str | None) -> None:
        if name != self.active_name:
            for layer in self._layers:
                layer._active_adapter = [] if name is None else [name]
            self.active_name = name

    @property
    def is_fresh(self) -> bool:
        """Whether the policy's adapter has no effect yet: LoRA starts with one of its two factors at 0."""
        zero = (f".lora_B.{POLICY}.", f".lora_embedding_A.{POLICY}")
        factors = [parameter for name, parameter in self.lm.named_parameters() if any(z in name for z in zero)]
        modules = [m for m in self._layers if POLICY in getattr(m, "modules_to_save", {})]
        same = all(
            torch.equal(saved, module.original_module.state_dict()[name])
            for module in modules
            for name, saved in module.modules_to_save[POLICY].state_dict().items()
        )
        return same and not any(bool(factor.any()) for factor in factors)

    def freeze_copy(self, name: str) -> None:
        """Add the adapter `name`, frozen, with the settings and the present weights of the policy's."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        own = get_peft_model_state_dict(self.model, adapter_name=POLICY, save_embedding_layers=False)
        with _new_weights(self.seed):
            self.model.add_adapter(name, self.config)
        set_peft_model_state_dict(self.model, own, adapter_name=name)
        self._added()

    def take(self, other: "PeftModel") -> str:
        """Add a frozen copy of the adapter of another model with the same base; returns the name it has here.

        Modules that the other model trained whole (its head) are left out: this one has no such modules.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        name = f"taken_{len(self.model.peft_config)}"
        config: Any = deepcopy(other.peft_config[POLICY])
        config.modules_to_save, config.task_type = None, self.model.peft_config[POLICY].task_type
        state = get_peft_model_state_dict(other, adapter_name=POLICY, save_embedding_layers=False)
        with _new_weights(self.seed):
            self.model.add_adapter(name, config)
        set_peft_model_state_dict(self.model, {k: t for k, t in state.items() if ".lora_" in k}, adapter_name=name)
        self._added()
        return name

    def add_adapter(self, name: str) -> None:
        """Add the trained adapter `name`, with the settings of the policy's adapter and no effect yet."""
        config = deepcopy(self.config)
        config.modules_to_save = None  # such as the output, of which values make no use
        with _new_weights(self.seed + 1):
            self.model.add_adapter(name, config)
        self._added()

    def _added(self) -> None:
        self._layers = _switched_layers(self.lm)
        self._train_only(POLICY, CRITIC)
        self.lm.eval()  # the dropout of the new one would act
        self.active_name = None  # peft has switched to another one
        self._activate(POLICY)

    def _train_only(self, *names: str) -> None:
        for full, parameter in self.lm.named_parameters():
            trained = adapter_of(full) in names
            parameter.requires_grad_(trained)
            if trained and parameter.dtype.itemsize < 4:
                parameter.data = parameter.data.float()

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of the adapter `name`."""
        return [parameter for full, parameter in self.lm.named_parameters() if adapter_of(full) == name]

    def cast_base(self, dtype: torch.dtype) -> None:
        """Convert the frozen weights of floating point to `dtype`."""
        for parameter in self.lm.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)

    def save(self, folder: Path, weights: Mapping[str, Tensor], name: str = POLICY) -> None:
        """Write the adapter `name` to `folder`, as stock peft loads it. weights: those of `lm`, by name."""
        from peft import get_peft_model_state_dict

        state = {f"base_model.model.{key}": tensor for key, tensor in weights.items()}
        tensors = get_peft_model_state_dict(self.model, state, adapter_name=name, save_embedding_layers=False)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy(self.model.peft_config[name])
        config.inference_mode = True  # as peft saves it
        for field, value in vars(config).items():
            if isinstance(value, set):  # which peft would write in another order in another process
                setattr(config, field, sorted(value))
        config.save_pretrained(str(folder))

    def merged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the base with the policy's adapter added to them, by the base's names.

        weights: those of `lm`, by name; they are not changed (merging and unmerging would not restore every bit).
        Merged tensors are in float32 or wider, so that small differences are not rounded away.
        """
        modules = dict(self.lm.named_modules())
        result = {}
        for full, tensor in weights.items():
            name = base_name(full)
            if name is None:
                continue
            owner, _, leaf = full.rpartition(".")
            saved = full.replace(".original_module.", f".modules_to_save.{POLICY}.")
            layer: Any = modules.get(owner.removesuffix(".base_layer"))
            if saved != full and saved in weights:
                tensor = weights[saved]
            elif owner.endswith(".base_layer") and leaf == "weight" and POLICY in layer.scaling:
                wide = torch.promote_types(tensor.dtype, torch.float32)
                tensor = tensor.to(wide) + _delta(layer, owner.removesuffix(".base_layer"), weights).to(wide)
            result[name] = tensor
        return result


def adapted(
    model: Any, config: "LoraConfig | None" = None, *, seed: int = 0
) -> tuple[PreTrainedModel, Adapters | None]:
    """The language model, and its adapters if there are any.

    model: a transformers model, or a `PeftModel`, whose adapter is trained. config: add a new adapter with these settings.
    seed: decides the first weights of new adapters.
    """
    if hasattr(model, "get_base_model"):
        if config is not None:
            raise InputError("peft_config: the policy has an adapter already. Leave peft_config out to train that one.")
        adapters = Adapters(model, seed=seed)
        return adapters.lm, adapters
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            "policy: its adapter was loaded by transformers, which keeps it frozen. Give the adapter's path, or a model "
            "from peft.PeftModel.from_pretrained."
        )
    if _switched_layers(model):
        raise InputError(
            "policy: it has the layers of an adapter in it, from an earlier training. Load the model again, or give the "
            "PeftModel."
        )
    if config is None:
        return model, None
    adapters = Adapters.add(model, config, seed=seed)
    return adapters.lm, adapters


def adapter_of(name: str) -> str | None:
    """The adapter to which the parameter `name` belongs; None: to the base."""
    parts = name.split(".")
    kinds = ("modules_to_save", "token_adapter", "trainable_tokens_delta", "trainable_tokens_original")
    for kind, adapter in pairwise(parts):
        if kind.startswith("lora_") or kind in kinds:
            return adapter
    return None


def base_name(name: str) -> str | None:
    """The name that a tensor has in the model without adapters; None: it belongs to an adapter."""
    if adapter_of(name) is not None:
        return None
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


@contextmanager
def _new_weights(seed: int) -> Iterator[None]:
    """peft draws new weights from torch's global generator: let them depend on the seed alone, and nothing on them."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        for message in _DEALT_WITH:
            warnings.filterwarnings("ignore", message)
        torch.manual_seed(seed)
        yield


_DEALT_WITH = (".*is_gradient_checkpointing.*", "fan_in_fan_out is set to", ".*ensure_weight_tying.*")
"""Warnings that call for nothing: peft corrects the layout itself, and `merged` unties what was trained apart."""


def _switched_layers(lm: nn.Module) -> list[Any]:
    return [module for module in lm.modules() if hasattr(module, "_active_adapter")]


def _delta(layer: Any, name: str, weights: Mapping[str, Tensor]) -> Tensor:
    """What the policy's adapter adds to the weight of `layer`: scaling * B A, in the layout of that weight."""
    embedding = f"{name}.lora_embedding_A.{POLICY}" in weights
    first, second = (
        weights[f"{name}.lora_{'embedding_' if embedding else ''}{k}.{POLICY}{'' if embedding else '.weight'}"]
        for k in "AB"
    )
    product = (second @ first) * layer.scaling[POLICY]
    return product.T if embedding or layer.fan_in_fan_out else product
