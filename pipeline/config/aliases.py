"""Names that users of other tools know, and the settings they stand for; also names that need a word of advice."""

ALIASES: dict[str, str] = {
    # launcher
    "gpus": "launch.processes",
    "hostfile": "launch.hostfile",
    "launcher": "launch.launcher",
    "master_port": "launch.master_port",
    "ddp_timeout": "launch.ddp_timeout",
    # model
    "model": "model.path",
    "model_name_or_path": "model.path",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.target_modules",
    # data
    "data": "data.path",
    "dataset": "data.path",
    "task": "data.task",
    "max_prompt_length": "data.max_prompt_length",
    "max_response_length": "data.max_response_length",
    "data.static": "static",
    # training
    "batch_size": "train.batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "max_tokens": "train.max_tokens",
    "per_device_train_batch_size": "train.micro_batch_size",
    "num_train_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "precision": "train.precision",
    "zero": "train.zero",
    "deepspeed": "train.zero",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "logging_steps": "train.logging_steps",
    "eval_steps": "train.eval_steps",
    "save_steps": "train.save_steps",
    "save_total_limit": "train.save_total_limit",
    # optimizer
    "learning_rate": "optimizer.learning_rate",
    "lr": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.lr_scheduler_type",
    "warmup_ratio": "optimizer.warmup_ratio",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.adam_beta1",
    "adam_beta2": "optimizer.adam_beta2",
    "adam_epsilon": "optimizer.adam_epsilon",
    "max_grad_norm": "optimizer.max_grad_norm",
    # masking
    "mask_rate": "masking.rate",
    # algorithms
    "clip": "algorithm.settings.clip",
    "kl_beta": "algorithm.settings.kl_beta",
    "kl_form": "algorithm.settings.kl_form",
    "kl_coef": "algorithm.settings.kl_beta",
    "beta": "algorithm.settings.beta",
    "objective": "algorithm.settings.objective",
    # generation
    "max_new_tokens": "generation.max_new_tokens",
    "min_new_tokens": "generation.min_new_tokens",
    "do_sample": "generation.do_sample",
    "temperature": "generation.temperature",
    "temperatures": "generation.temperatures",
    "top_p": "generation.top_p",
    "top_k": "generation.top_k",
    "num_beams": "generation.num_beams",
    "length_penalty": "generation.length_penalty",
    "early_stopping": "generation.early_stopping",
    "no_repeat_ngram_size": "generation.no_repeat_ngram_size",
    "repetition_penalty": "generation.repetition_penalty",
    "num_return_sequences": "generation.num_return_sequences",
}

# `bf16=true` is `train.precision=bf16`; there is no meaning for `bf16=false`, which does not say what else.
SWITCHES: dict[str, tuple[str, str]] = {
    "bf16": ("train.precision", "bf16"),
    "fp16": ("train.precision", "fp16"),
}

# Published ids of algorithms whose file in stages/algo/ has another name.
ALGORITHM_IDS: dict[str, str] = {"a_lol": "alol"}

ADVICE: dict[str, str] = {
    "gradient_accumulation_steps": "is derived, not set; say train.batch_size (rows per step over all ranks)"
    " and train.micro_batch_size",
    "warmup_steps": "is not a setting; say warmup_ratio, a fraction of all steps",
    "max_length": "is not a setting; say data.max_prompt_length and data.max_response_length",
    "output_dir": "is not a setting; say run=NAME (results go to runs/NAME/) or runs_dir=DIRECTORY",
    "resume_from_checkpoint": "is not a setting; a stage goes on by itself from its last checkpoint",
    "report_to": "is not a setting; metrics.jsonl and TensorBoard are always written",
}
