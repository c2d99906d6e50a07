"""Names the setting to use here for each one of TRL's GRPOTrainer, for error messages; docs/from-trl.md says more."""

_VLLM = "not available: completions come from the policy itself, in the precision it trains in. Leave it out"
_TOOLS = (
    "not available: a completion is one turn without tools. Put the call's result into the prompt column beforehand"
)
_IMAGES = "not available: prompts are text. Train the language model alone"
_CUT = "not available: the sampler would be another policy than the one that is trained. Use generation.temperature"
_SURROGATE = "not available: choose grpo.surrogate clipped or clipped_weight"
_REFERENCE = "not available: the reference stays as it is. Start a second run from the policy of the first"
_ENTROPY = "not available: use a fixed grpo.entropy_coef"
_HUB = "not available: nothing is uploaded. Upload output_dir yourself"
_QUANTISED = "not available: a setting cannot load it. Load the quantised model in Python and pass it as policy"
_SHARDING = (
    "not available: the launch decides. Start with accelerate launch --config_file recipes/accelerate/fsdp2.yaml"
)

INSTEAD: dict[str, str] = {
    # the group and the scores
    "num_generations": "grpo.completions_per_prompt",
    "num_generations_eval": "not available: evaluation samples one completion of each prompt of eval_dataset",
    "scale_rewards": "grpo.scale (group_std, batch_std or none), with grpo.std_ddof 1 and grpo.std_eps 1e-4 as in TRL",
    "multi_objective_aggregation": "not available: scores are summed, then compared. Scale each reward by reward_weights",
    # the loss
    "beta": "grpo.kl_coef",
    "use_bias_correction_kl": "grpo.kl_estimator: weighted_k3 for true, k3 for false",
    "epsilon": "grpo.clip_range",
    "epsilon_high": "grpo.clip_range_high; for CISPO TRL's cap minus 1, with grpo.clip_range 1",
    "delta": "grpo.dual_clip",
    "importance_sampling_level": "grpo.ratio: token, or sequence_mean for TRL's sequence",
    "loss_type": "grpo.aggregation: sequence_mean for grpo, token_mean for dapo, constant_length for dr_grpo; for cispo "
    "also grpo.surrogate clipped_weight",
    "mask_truncated_completions": "grpo.mask_truncated",
    "entropy_coef": "grpo.entropy_coef",
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), _SURROGATE),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), _SURROGATE),
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _REFERENCE),
    **dict.fromkeys(("use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max"), _ENTROPY),
    **dict.fromkeys(("entropy_coef_delta", "entropy_target"), _ENTROPY),
    "top_entropy_quantile": "not available: all tokens of a completion learn",
    "off_policy_mask_threshold": "not available: update.target_kl stops the updates of a rollout that go too far",
    # batches and the loop
    "per_device_train_batch_size": "prompts_per_step (prompts, over all processes) and update.minibatch_size (completions "
    "per optimizer step); update.microbatch_tokens decides the memory",
    "gradient_accumulation_steps": "update.minibatch_size (completions per optimizer step, over all processes)",
    "steps_per_generation": "prompts_per_step and update.minibatch_size",
    "generation_batch_size": "prompts_per_step (prompts, not completions)",
    "num_iterations": "update.num_epochs",
    "num_train_epochs": "total_steps (rollouts): epochs times prompts in the data set / prompts_per_step",
    "max_steps": "total_steps (rollouts, not optimizer steps)",
    "max_grad_norm": "update.max_grad_norm",
    "lr_scheduler_type": "lr_schedule (linear, cosine or constant)",
    "warmup_ratio": "warmup_steps (rollouts)",
    "optim": "not available: the optimizer is AdamW",
    "shuffle_dataset": "not available: prompts are shuffled anew each epoch, as seed decides",
    "data_seed": "seed",
    "remove_unused_columns": "not available: reward functions get every column",
    "pad_to_multiple_of": "not available: padding changes no result here",
    # generation
    "max_completion_length": "generation.max_new_tokens",
    "max_prompt_length": "max_prompt_tokens, and prompt_too_long for what happens to longer ones",
    "temperature": "generation.temperature",
    **dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"), _CUT),
    "chat_template_kwargs": "not available: write conversations as the tokenizer's template wants them",
    "cache_implementation": "not available: generation.completions_at_once decides the memory of generation",
    **dict.fromkeys(
        (
            *("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex"),
            *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
            *("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"),
            *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_cap"),
            *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
            *("use_transformers_continuous_batching", "transformers_continuous_batching_config"),
            "use_transformers_paged",
        ),
        _VLLM,
    ),
    **dict.fromkeys(("tools", "environment_factory", "rollout_func", "max_tool_calling_iterations"), _TOOLS),
    **dict.fromkeys(("image", "images", "log_multimodal"), _IMAGES),
    # models, memory, precision
    "model_name_or_path": "policy",
    "reward_funcs": "reward (file.py:name or module:name), or reward_model for a model",
    "reward_model_name_or_path": "reward_model",
    "dataset_name": "dataset",
    "model_init_kwargs": "not available: load the model yourself and pass it as policy in Python",
    "trust_remote_code": "not available: load the model yourself and pass it as policy in Python",
    "router_aux_loss_coef": "not available: the loss has no term for the balance of experts",
    "disable_dropout": "not available: dropout is always off",
    "cast_lm_head_to_fp32": "not available: weights are float32 anyway; set precision float32 for the arithmetic too",
    "bf16": "precision bfloat16",
    "fp16": "precision bfloat16",
    **dict.fromkeys(("use_peft", "peft_config", "lora_r"), "lora.r, above 0 to train an adapter"),
    **dict.fromkeys(("load_in_4bit", "quantization_config"), _QUANTISED),
    **dict.fromkeys(("ds3_gather_for_generation", "deepspeed", "fsdp"), _SHARDING),
    "torch_compile": "not available: only control tasks with small networks are compiled",
    # logs and checkpoints
    "logging_steps": "not available: every step is logged; log_completions_every is for tables of completions",
    "report_to": "tracker",
    "eval_steps": "eval_every",
    "eval_strategy": "eval_every",
    "save_steps": "checkpoint_every",
    "save_strategy": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "resume_from_checkpoint": "resume",
    "overwrite_output_dir": "overwrite",
    "num_completions_to_print": "log_completions (how many are written)",
    "log_unique_prompts": "log_completions (how many are written)",
    **dict.fromkeys(("log_completions_hub_repo", "push_to_hub"), _HUB),
}
"""TRL's name -> the setting to use here, or "not available: " and what to do; the text ends an error message."""


def instead(name: str) -> str | None:
    """What to set instead of TRL's setting `name`, as a sentence; None if TRL has none of that name.

    `name` may begin with a group (grpo.beta).
    """
    hint = INSTEAD.get(name.rpartition(".")[2])
    if hint is None:
        return None
    leaf = name.rpartition(".")[2]
    return f"TRL's {leaf} is {hint}." if hint.startswith("not ") else f"In place of TRL's {leaf}, set {hint}."
