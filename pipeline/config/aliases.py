"""Names known from other tools that mean exactly what a setting means; `elsewhere.py` has what comes near."""

SECTION_OF = {  # settings that may be given without their section
    "launch": "hostfile launcher nnodes rdzv_endpoint master_port ddp_timeout",
    "model": "attn_implementation trust_remote_code dropout load_in_4bit",
    "data": "task max_prompt_length max_response_length",
    "train": "batch_size micro_batch_size max_tokens num_train_epochs max_steps precision zero gradient_checkpointing "
    "logging_steps eval_steps save_steps save_total_limit padding_free group_by_length router_aux_loss_coef",
    "optimizer": "learning_rate lr_scheduler_type warmup_ratio warmup_steps min_lr_ratio weight_decay adam_beta1 "
    "adam_beta2 adam_epsilon max_grad_norm",
    "generation": "max_new_tokens min_new_tokens do_sample temperature temperatures top_p top_k num_beams "
    "length_penalty no_repeat_ngram_size repetition_penalty num_return_sequences",
    "algorithm.settings": "clip kl_beta kl_form beta objective label_smoothing missing_eos_penalty "
    "desirable_weight undesirable_weight",
}
ALIASES: dict[str, str] = {
    **{name: f"{section}.{name}" for section, names in SECTION_OF.items() for name in names.split()},
    **dict.fromkeys(("gpus", "num_gpus", "nproc_per_node"), "launch.processes"),
    **dict.fromkeys(
        ("model", "model_name", "model_name_or_path", "model_path", "base_model", "pretrain"), "model.path"
    ),
    "model_revision": "model.revision",
    **dict.fromkeys(("lora_r", "lora_rank"), "model.lora.r"),
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.target_modules",
    "template": "template.kind",
    "system_prompt": "template.system",
    **dict.fromkeys(("data", "dataset", "dataset_name", "data_path"), "data.path"),
    **dict.fromkeys(("train_file", "train_files", "data.train_files"), "data.train"),
    **dict.fromkeys(("validation_file", "validation_files", "val_files", "data.val_files"), "data.validation"),
    **dict.fromkeys(("test_file", "test_files"), "data.test"),
    "max_train_samples": "data.max_rows",
    "prompt_max_len": "data.max_prompt_length",
    "data.static": "static",
    "train_batch_size": "train.batch_size",
    "micro_train_batch_size": "train.micro_batch_size",
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs"), "train.num_train_epochs"),
    "max_train_steps": "train.max_steps",
    **dict.fromkeys(("deepspeed", "deepspeed_config", "zero_stage"), "train.zero"),
    "aux_loss_coef": "train.router_aux_loss_coef",
    "activation_checkpointing": "train.gradient_checkpointing",
    "optim": "optimizer.name",
    "lr": "optimizer.learning_rate",
    "lr_scheduler": "optimizer.lr_scheduler_type",
    "lr_warmup_ratio": "optimizer.warmup_ratio",
    **dict.fromkeys(("num_warmup_steps", "lr_warmup_steps"), "optimizer.warmup_steps"),
    **dict.fromkeys(("gradient_clipping", "max_norm"), "optimizer.max_grad_norm"),
    "mask_rate": "masking.rate",
    **dict.fromkeys(("kl_coef", "init_kl_coef"), "algorithm.settings.kl_beta"),
    **dict.fromkeys(("reward_model", "reward_model_path", "reward_pretrain", "reward_fn", "reward_function"), "reward"),
}

# `bf16=true` is `train.precision=bf16`; `bf16=false` would leave open what else, and is refused.
SWITCHES: dict[str, tuple[str, str]] = {"bf16": ("train.precision", "bf16"), "fp16": ("train.precision", "fp16")}

# Published ids of algorithms whose file in stages/algo/ has another name.
ALGORITHM_IDS: dict[str, str] = {"a_lol": "alol"}

# Values of a setting that mean exactly what another one means.
SAME_VALUES: dict[str, dict[str, str]] = {
    "train.zero": {str(stage): f"zero{stage}" for stage in range(4)},
    "optimizer.name": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), "adamw"),
        "adamw_bnb_8bit": "adamw_8bit",
    },
    "optimizer.lr_scheduler_type": {"constant_with_warmup": "constant", "wsd": "warmup_stable_decay"},
}
