"""Shared by sft.py and reward_model.py: settings, set-up of `transformers.Trainer`, loading and saving."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rlhf.data.rows import load_rows
from rlhf.errors import InputError
from rlhf.models.adapters import Adapters
from rlhf.models.loading import load_tokenizer
from rlhf.models.lora import LoRASettings
from rlhf.runs.files import beside, put_in_place


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """Settings of a supervised stage. Batch sizes are global: they mean the same on any number of processes."""

    model: str
    """Model to start from: a folder or a hub name."""
    dataset: str
    """Training rows: a JSON-lines, parquet or CSV file, a folder, or a hub name."""
    output_dir: str
    """Folder for the trained model, its tokenizer and metrics.json; must be empty or absent unless `overwrite`."""
    eval_dataset: str | None = None
    """Held-out rows to evaluate on, in the same forms as `dataset`."""
    max_tokens: int = 1024
    """Length limit of prompt plus completion, in tokens; longer rows are dropped."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW, which then falls linearly to 0."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    num_epochs: float = 1.0
    """Passes over the training rows."""
    batch_size: int = 32
    """Rows per optimizer step, over all processes."""
    microbatch_size: int = 32
    """Most rows in one forward pass of a process; changes memory and speed, not results."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this norm."""
    bf16: bool = False
    """Compute in bfloat16 by autocast; the weights that are trained stay float32."""
    lora: LoRASettings = field(default_factory=LoRASettings)
    save_steps: int = 0
    """Optimizer steps between checkpoints in `<output_dir>.checkpoints`; 0 saves none."""
    resume: bool = False
    """Continue from the newest checkpoint in `<output_dir>.checkpoints`."""
    overwrite: bool = False
    """Replace `output_dir` if it is not empty."""
    progress: bool = True
    """Show a progress bar."""
    seed: int = 0
    """Seed of the data order and of new weights."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "learning_rate", "num_epochs", "batch_size", "microbatch_size", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be greater than 0, but it is {getattr(self, name)}.")
        for name in ("save_steps", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be 0 or more, but it is {getattr(self, name)}.")
        if not 0 <= self.warmup_fraction < 1:
            raise InputError(f"warmup_fraction must be in [0, 1), but it is {self.warmup_fraction}.")

    @property
    def checkpoint_dir(self) -> Path:
        return Path(f"{self.output_dir}.checkpoints")


def check_output_dir(config: SupervisedConfig) -> None:
    """Refuse a non-empty output folder unless `overwrite`, and `resume` without a checkpoint."""
    folder = Path(config.output_dir)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not config.overwrite):
        raise InputError(f"output_dir {folder} is not empty. Name another folder, or replace it with --overwrite true.")
    if config.resume and not any(config.checkpoint_dir.glob("checkpoint-*")):
        raise InputError(f"resume is true, but {config.checkpoint_dir} holds no checkpoint. Run with --resume false.")


def quiet_libraries() -> None:
    """Turn off the libraries' progress bars for single files; training draws its own bar."""
    transformers.utils.logging.disable_progress_bar()  # one per checkpoint file read and written
    datasets.disable_progress_bars()  # one per data file, too brief to read


def split_batch(batch_size: int, microbatch_size: int, processes: int) -> tuple[int, int]:
    """(rows per process and forward pass, forward passes per optimizer step) that make up the global batch exactly."""
    rows = min(microbatch_size, max(batch_size // processes, 1))
    if batch_size % (rows * processes):
        raise InputError(
            f"batch_size {batch_size} does not split into microbatches of {rows} rows on {processes} process(es). "
            "Make it a multiple of microbatch_size times the number of processes."
        )
    return rows, batch_size // (rows * processes)


def training_arguments(config: SupervisedConfig) -> TrainingArguments:
    """Translate `config` to `TrainingArguments`."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and `accelerate launch` set it
    rows, accumulation_steps = split_batch(config.batch_size, config.microbatch_size, processes)
    arguments = TrainingArguments(
        output_dir=str(config.checkpoint_dir),
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=config.microbatch_size,
        gradient_accumulation_steps=accumulation_steps,
        num_train_epochs=config.num_epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_fraction,  # a value below 1 is a share of the steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_steps=0.05,
        report_to=[],
        disable_tqdm=True,  # replaced by our own bar, see `prepare_trainer`
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = (
            1  # one device per process; Trainer would silently multiply the batch by the number of devices
        )
    return arguments


class _Bar(ProgressCallback):
    """The Trainer's progress bar with the loss at its end, instead of a printed dictionary per logging step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws no second bar for the evaluation."""


def to_train(model: PreTrainedModel, config: SupervisedConfig, task: str) -> Any:
    """The model, or a `PeftModel` of it if `config` asks for an adapter, which alone is then trained and saved.

    task: what the model does, in peft's words; of a SEQ_CLS model peft also trains the head.
    """
    settings = config.lora.peft_config(task)
    if settings is None:
        return model
    adapters = Adapters.add(model, settings, seed=config.seed)
    if config.bf16:
        adapters.cast_base(torch.bfloat16)
    return adapters.model


def prepare_trainer(trainer: Trainer, config: SupervisedConfig) -> None:
    """Replace the Trainer's printed logs by our progress bar (by nothing without `config.progress`)."""
    trainer.remove_callback(PrinterCallback)
    if config.progress:
        trainer.add_callback(_Bar)


def fit(trainer: Trainer, config: SupervisedConfig) -> dict[str, float]:
    """Train; return the mean loss of the last twentieth of the steps, the seconds taken and the number of steps."""
    prepare_trainer(trainer, config)
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=config.resume)
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {
        "train_loss": losses[-1] if losses else result.training_loss,
        "train_seconds": time.perf_counter() - start,
        "num_steps": float(result.global_step),
    }


def match_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer's pad id into the model's config, which stock models use to find the last real token."""
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise InputError(
            "The tokenizer needs a pad and an EOS token. Set tokenizer.pad_token and save the tokenizer again."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model embeds only {rows}. "
            "Use the model's own tokenizer, or call model.resize_token_embeddings and save the model again."
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@dataclass(frozen=True)
class Inputs:
    """The loaded tokenizer and rows that a configuration names."""

    tokenizer: PreTrainedTokenizerBase
    train_rows: datasets.Dataset
    eval_rows: datasets.Dataset | None

    def tokenized(self, tokenize: Callable[..., datasets.Dataset], max_tokens: int) -> list[Any]:
        """Apply tokenize(rows, tokenizer, max_tokens=, setting=): [training set, evaluation set or None]."""
        named = {"dataset": self.train_rows, "eval_dataset": self.eval_rows}
        return [
            None if rows is None else tokenize(rows, self.tokenizer, max_tokens=max_tokens, setting=setting)
            for setting, rows in named.items()
        ]


def load_inputs(config: SupervisedConfig) -> Inputs:
    """Load the model's tokenizer and the rows; `check_output_dir` refuses bad folders before anything is loaded."""
    check_output_dir(config)
    quiet_libraries()
    tokenizer = load_tokenizer(config.model, setting="model")
    rows = load_rows(config.dataset)
    return Inputs(
        tokenizer, rows, None if config.eval_dataset is None else load_rows(config.eval_dataset, setting="eval_dataset")
    )


def save(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, metrics: dict[str, float], config: SupervisedConfig
) -> Path:
    """Write model, tokenizer and metrics.json to `output_dir`, which is never incomplete; delete checkpoints."""
    final = Path(config.output_dir)
    partial = final.with_name(f"{final.name}.tmp")
    if trainer.is_world_process_zero():
        beside(final)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))  # called on every process, because it gathers sharded weights
    if trainer.is_world_process_zero():
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; metrics.json holds what matters
        tokenizer.save_pretrained(partial)
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        put_in_place(partial, final)
        shutil.rmtree(config.checkpoint_dir, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return final


def report(
    name: str, trainer: Trainer, rows: str, metrics: dict[str, float], held_out: str, config: SupervisedConfig
) -> None:
    """Print one line on what a stage did.

    Args:
        name: The stage.
        rows: Number and kind of training rows, such as "100 pairs".
        metrics: Metrics of `fit`.
        held_out: Text on the held-out metrics, beginning with a comma; empty if there is no evaluation set.
    """
    if trainer.is_world_process_zero():
        print(
            f"{name}: {rows}, {metrics['num_steps']:.0f} steps of {config.batch_size}, "
            f"train loss {metrics['train_loss']:.3f}{held_out}, {metrics['train_seconds']:.0f} s -> "
            + config.output_dir
        )
