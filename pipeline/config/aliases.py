"""Names that users of other tools know, and the settings they stand for; and names that get a hint instead."""

SECTION_OF = {  # settings that may be given without their section
    "launch": "hostfile launcher master_port ddp_timeout",
    "model": "attn_implementation trust_remote_code",
    "data": "task max_prompt_length max_response_length",
    "train": "batch_size micro_batch_size max_tokens num_train_epochs max_steps precision zero gradient_checkpointing "
    "logging_steps eval_steps save_steps save_total_limit",
    "optimizer": "learning_rate lr_scheduler_type warmup_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm",
    "generation": "max_new_tokens min_new_tokens do_sample temperature temperatures top_p top_k num_beams "
    "length_penalty early_stopping no_repeat_ngram_size repetition_penalty num_return_sequences",
    "algorithm.settings": "clip kl_beta kl_form beta objective",
}
ALIASES: dict[str, str] = {
    **{name: f"{section}.{name}" for section, names in SECTION_OF.items() for name in names.split()},
    "gpus": "launch.processes",
    "model": "model.path",
    "model_name_or_path": "model.path",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.target_modules",
    "data": "data.path",
    "dataset": "data.path",
    "data.static": "static",
    "per_device_train_batch_size": "train.micro_batch_size",
    "deepspeed": "train.zero",
    "lr": "optimizer.learning_rate",
    "mask_rate": "masking.rate",
    "kl_coef": "algorithm.settings.kl_beta",
}

# `bf16=true` is `train.precision=bf16`; `bf16=false` would leave open what else, and is refused.
SWITCHES: dict[str, tuple[str, str]] = {"bf16": ("train.precision", "bf16"), "fp16": ("train.precision", "fp16")}

# Published ids of algorithms whose file in stages/algo/ has another name.
ALGORITHM_IDS: dict[str, str] = {"a_lol": "alol"}

ADVICE: dict[str, str] = {
    "gradient_accumulation_steps": "is derived from other settings: set train.batch_size (rows per step over all ranks)"
    " and train.micro_batch_size",
    "warmup_steps": "is not a setting; set warmup_ratio, a fraction of all steps",
    "max_length": "is not a setting; set data.max_prompt_length and data.max_response_length",
    "output_dir": "is not a setting; set run=NAME (results go to runs/NAME/) or runs_dir=DIRECTORY",
    "resume_from_checkpoint": "is not a setting; a stage goes on by itself from its last checkpoint",
    "report_to": "is not a setting; metrics.jsonl and TensorBoard are always written",
}
