"""Which low-rank adapters are trained: the settings of commands, and the check of those that peft takes."""

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

from rlhf.errors import InputError
from rlhf.settings import check_types

if TYPE_CHECKING:  # peft takes seconds to import, and most runs do not need it
    from peft import LoraConfig

_KEEPS_BASE = (True, False, "gaussian", "orthogonal")
"""Values of LoraConfig.init_lora_weights that leave the base as it is."""

_UNDERSTOOD = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("fan_in_fan_out", "ensure_weight_tying", "inference_mode", "runtime_config"),
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
}
"""Fields of LoraConfig with which the adapter is a product of two matrices that is added to frozen weights. The others
must have their defaults, those of later versions of peft included."""


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Train a low-rank adapter instead of all weights. In Python, pass a `peft.LoraConfig` to the trainer."""

    r: int = 0
    """Rank of the adapter; 0: no adapter, all weights are trained."""
    alpha: float = 32
    """The adapter's product is scaled by alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers to adapt; "all-linear": every linear layer but the output."""
    modules_to_save: list[str] | None = None
    """Names of modules to train whole beside the adapter, such as lm_head."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.r < 0 or not self.alpha > 0:
            raise InputError(f"lora.r={self.r} must be 0 or more, and lora.alpha={self.alpha} above 0.")

    def peft_config(self, task: str = "CAUSAL_LM") -> "LoraConfig | None":
        """The settings as peft takes them; None without an adapter."""
        if self.r == 0:
            return None
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft divides it, and takes any number
            target_modules=self.target_modules,
            modules_to_save=self.modules_to_save,
            task_type=task,
        )


def check_lora(config: Any) -> None:
    """Raise InputError unless this is LoRA that leaves the base as it is, so that the base is the reference policy."""
    kind = getattr(config, "peft_type", None)
    if str(getattr(kind, "value", kind)) != "LORA":
        raise InputError(f"peft_config: {type(config).__name__} is not supported. Give a peft.LoraConfig.")
    if config.init_lora_weights not in _KEEPS_BASE:
        raise InputError(
            f"peft_config: init_lora_weights={config.init_lora_weights!r} changes the base, to which an exported adapter "
            "would then not fit. Set it to True or 'gaussian'."
        )
    for field in fields(config):
        plain = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(config, field.name)
        if field.name not in _UNDERSTOOD and (value or plain) != plain:
            raise InputError(
                f"peft_config: {field.name}={value!r} is not supported, since the adapter must be exactly a "
                f"product of two matrices that is added to frozen weights. Set it to {plain!r}."
            )
