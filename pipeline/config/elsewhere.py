"""What users of other tools type first and is no setting, stage or algorithm here, and what to type in its place.

A name that means exactly what a setting of ours means is an alias (`aliases.py`); these mean something near.
"""

from __future__ import annotations

LENGTHS = "prompt and response are cut by themselves: set max_prompt_length=1024 max_response_length=512"
BATCH = "batch_size=32 counts rows per step over all GPUs; one reads max_tokens=4096 or micro_batch_size=4 at once"
QUANTISED = (
    "set load_in_4bit=true lora_r=16 bf16=true, on a GPU: weights of 4 bits (NF4) below adapters; none of 8 bits"
)
SCORED = "rows that are scored already: stage=rl algo=alol, whose steps sample nothing"
ONLINE = f"{SCORED}; prompts and a reward that judges new texts: stage=rl algo=esrl reward=NAME, which samples little"
PAIRS = "not offered; of preference pairs learns stage=rl algo=dpo"

SAID: dict[str, str] = {  # names -> what to say of each
    "max_input_length max_target_length context_length ctx_len seq_len": LENGTHS,
    "num_steps total_steps train_steps iterations num_iterations num_episodes total_episodes": (
        "set max_steps=500, or num_train_epochs=3"
    ),
    "data_seed": "set seed=1",
    "precompute_ref_log_probs reference_free sync_ref_model": (
        "leave it out: what the reference says of each row is computed once, before the first step"
    ),
    "remote_rm_url reward_url": "set reward=http://HOST:PORT/PATH",
    "metric metrics judge": "reward=NAME is what judges; monitors='[bleu]' in stage=evaluate only watches",
    "vf_coef value_clip cliprange_value critic_learning_rate critic_pretrain": (
        "leave it out: there is no critic; algo=alol learns what to expect of a prompt by itself (value: in "
        "stages/rl.yaml)"
    ),
    "overlap_comm reduce_bucket_size stage3_max_live_parameters contiguous_gradients": (
        "DeepSpeed's own: copy a file of ds_configs/, change it there and give it as zero=FILE.json"
    ),
    "special_tokens bos_token eos_token pad_token stop_token pad_token_id": (
        "leave it out: they are those of the model's tokenizer and of its generation_config.json"
    ),
    "cache_dir hf_token token offline": "it is the hub's: set HF_HOME, HF_TOKEN or HF_HUB_OFFLINE=1 in the environment",
    "attention_dropout hidden_dropout": "dropout=0.1 sets every dropout of the model",
    "full_determinism deterministic": "leave it out: with one seed=1 a run on CPUs repeats itself to the bit",
    "max_length max_seq_length max_seq_len max_len cutoff_len sequence_len model_max_length block_size": LENGTHS,
    "max_completion_length max_output_tokens generate_max_len response_length": (
        "max_new_tokens=128 for what the policy says, max_response_length=512 for rows that it learns from"
    ),
    "bs batch effective_batch_size rollout_batch_size": BATCH,
    # there the step is their product, and either alone would leave ours at its default
    "per_device_train_batch_size per_device_batch_size gradient_accumulation_steps grad_accum "
    "accumulate_grad_batches": (
        "it is derived from other settings: set train.batch_size=32, rows per step (those of a device x accumulation x "
        "devices), and micro_batch_size=4, those that one reads at once"
    ),
    "label_smoothing_factor": "set label_smoothing=0.1: of tokens in stage=sft, of pairs in stage=rl algo=dpo",
    "actor_learning_rate critic_lr": "set learning_rate=1e-5: there is one, for there is no critic",
    "value_model value_pretrain": "leave it out: algo=alol learns what to expect of a prompt by itself, without one",
    "streaming_dataset stream": "data.streaming=true data.max_rows=100000 reads so many rows of a set and no more",
    "pref_beta": "set beta=0.1 in stage=rl algo=dpo",
    "per_device_eval_batch_size eval_batch_size": (
        "what is evaluated is read in batches of max_tokens=4096 or micro_batch_size=4, as in training; "
        "generation.batch_size=64 is prompts per call"
    ),
    "warmup": "set warmup_ratio=0.05, a fraction of all steps, or warmup_steps=100",
    "optimizer": "set optim=adamw, adamw_8bit or muon; zero=zero2_offload keeps its states in the host's memory",
    "load_in_8bit qlora use_qlora quantization quantization_bit bnb_4bit_quant_type": QUANTISED,
    "use_peft use_lora use_dora peft lora adapter finetuning_type peft_config": (
        "lora_r=16 trains LoRA adapters, lora_r=0 (the default) all weights"
    ),
    "lora_target lora_target_linear": "set lora_target_modules=all-linear (the default) or a list of modules",
    "adapter_name_or_path lora_model_dir adapter_path": "give the directory of the adapters as model=DIRECTORY",
    "tokenizer tokenizer_name tokenizer_name_or_path": (
        "the tokenizer is the one in the directory that model=DIRECTORY names"
    ),
    "dtype torch_dtype mixed_precision": "set bf16=true or fp16=true; train.precision=fp32 is the default",
    "ref_model ref_model_path ref_model_name_or_path reference_model": (
        "the reference is the model that RL starts from: the run's SFT model, or model=DIRECTORY start_from=model"
    ),
    "reward_funcs reward_functions reward_fns reward_weights": (
        "one: reward=path/file.py:function; several by weight: reward='{path/a.py: 1.0, path/b.py: 0.5}'"
    ),
    "loss_type rlhf_method trainer_type rl method advantage_estimator adv_estimator": (
        "the method is algo=alol, dpo, esrl ... (stage=help lists them)"
    ),
    "num_generations n_samples_per_prompt rloo_k group_size n_samples": (
        "responses per prompt: sampler.k=8 in stage=rl algo=reinforce, mrt or esrl; num_return_sequences=8 in "
        "stage=generate; rows of a prompt that are compared: algorithm.settings.group_size=4 in algo=agro and nca"
    ),
    "epsilon cliprange clip_range eps_clip": (
        "clip=0.9 is half the width of the ratio's interval around 1, in stage=rl algo=alol, a_lol_seq and r_lol"
    ),
    "max_samples max_rows_train num_train_samples": (
        "data.max_rows=1000 of the training rows, eval.max_rows=400 of the held-out ones"
    ),
    "datasets train_path train_dataset train_datasets prompt_data data_files": (
        "one file or data set: data.train=rows.jsonl, or data.path=OWNER/NAME of the hub; several: "
        "data.train='[a.jsonl, b.jsonl]' or data.train='logs/*.jsonl'"
    ),
    "dataset_mixer dataset_mixture dataset_mixer_list dataset_weights mix_strategy interleave_probs prompt_data_probs "
    "sampling_probs train_data_weights": (
        "weights stand beside the files, each of its file's own size: data.train='{a.jsonl: 1.0, b.jsonl: 0.3}'"
    ),
    "dataset_config dataset_config_name dataset_dir subset": (
        "part of the name: data.path=OWNER/NAME/FOLDER, or OWNER/NAME/CONFIG@refs/convert/parquet"
    ),
    "dataset_split train_split dataset_train_split": "part of the name: data.train=OWNER/NAME:SPLIT",
    "val_size val_set_size test_size validation_split eval_ratio": (
        "data.validation_fraction=0.1 holds out a share of the prompts; data.validation=FILE names rows"
    ),
    "eval_dataset eval_file eval_data validation_data test_path": (
        "set data.validation=FILE, which training watches; stage=evaluate reads data.test=FILE"
    ),
    "input_key output_key prompt_key chosen_key text_field dataset_text_field column_mapping "
    "prompt_field prompt_column response_column reward_key reward_column label_key label_column columns": (
        "say which column is which: data.columns='{prompt: question, completion: answer, reward: helpfulness}'; many "
        "are known by themselves (pipeline/data/README.md)"
    ),
    "chat_template apply_chat_template template_name prompt_template": (
        "template.kind=chat is the tokenizer's own, template.kind=text the lines under template: in stages/common.yaml"
    ),
    "enable_thinking chat_template_kwargs template_kwargs reasoning_effort thinking": (
        "set template.arguments='{NAME: VALUE}', or give rows a column chat_template_kwargs"
    ),
    "multiturn completion_only_loss assistant_only_loss train_on_inputs train_on_prompt mask_prompt": (
        "prompts are never learned; in stage=sft train_on=all learns every assistant turn, train_on=last the last one "
        "(the default, but where messages have weights)"
    ),
    "packing sample_packing packing_samples neat_packing pad_to_sequence_len": (
        "leave it out: rows are read end to end (train.padding_free=true), up to max_tokens=4096 tokens at once"
    ),
    "share_prompt": "leave it out: prompts that rows share are read once, unless padding_free=false",
    "output_dir out_dir out output log_dir save_path save_dir output_path ckpt_path logging_dir": (
        "results go to runs/NAME/STAGE/: set run=NAME, and runs_dir=DIRECTORY for another place than runs/"
    ),
    "run_name experiment_name exp_name experiment": "set run=NAME",
    "overwrite_output_dir overwrite force": (
        "nothing is written over: set another run=NAME, or delete the stage's directory"
    ),
    "resume_from_checkpoint resume load_checkpoint resume_from auto_resume": (
        "run the same command again: it goes on from its last checkpoint"
    ),
    "report_to wandb use_wandb wandb_project wandb_org wandb_run_name log_with use_tensorboard mlflow swanlab": (
        "TensorBoard files are always written, for no other tracker: see them with `tensorboard --logdir runs`"
    ),
    "push_to_hub hub_model_id hub_token": (
        "a training sends nothing: afterwards stage=export, with push_to for OWNER/NAME"
    ),
    "eval_strategy evals_per_epoch evaluation_strategy do_eval": (
        "set eval_steps=100, or eval_steps=null for the end only"
    ),
    "save_strategy saves_per_epoch": "set save_steps=200, or save_steps=null for none but when SIGTERM comes",
    "logging_strategy log_interval log_every": "set logging_steps=10",
    "early_stopping": "training never stops early: set max_steps=500; generation.early_stopping=true is that of beams",
    "load_best_model_at_end metric_for_best_model early_stopping_patience": (
        "train.keep=best (the default) keeps the weights of the best evaluation, train.keep=last the last; "
        "nothing stops early: set max_steps=500"
    ),
    "do_train do_predict task_type": "the stage says what is done: stage=sft, stage=evaluate, stage=generate ...",
    "fsdp fsdp_config use_fsdp": "weights are sharded by DeepSpeed: zero=zero3",
    "adam_offload cpu_offload offload offload_optimizer use_cpu_offload": (
        "set zero=zero2_offload (optimizer) or zero=zero3_offload (weights too)"
    ),
    "tensor_parallel_size tp pp pipeline_parallel_size context_parallel_size sequence_parallel_size": (
        "not offered; zero=zero3 shards the weights"
    ),
    "vllm use_vllm vllm_mode vllm_num_engines vllm_gpu_memory_utilization": (
        "vLLM opens the model/ that a stage leaves, and writes for stage=generate, stage=evaluate and stage=rl: "
        "generation.engine=http://HOST:PORT/v1"
    ),
    "torch_compile compile use_liger_kernel liger_kernel use_unsloth neftune_noise_alpha tf32 rpo_alpha use_rslora "
    "modules_to_save lora_modules_to_save lora_bias": "not offered; leave it out",
    "num_ppo_epochs num_mini_batches ppo_epochs": "leave it out: what is sampled is learned from once",
    "disable_tqdm remove_unused_columns gradient_checkpointing_kwargs logging_first_step "
    "overwrite_cache": "leave it out: nothing here depends on it",
    "flash_attn flash_attention use_flash_attention_2 use_flash_attn": "set attn_implementation=flash_attention_2",
    "device device_map cuda cpu use_cpu no_cuda local_rank": (
        "GPUs are used where there are any: gpus=8, or fewer by CUDA_VISIBLE_DEVICES"
    ),
    "num_processes world_size": "gpus=8 is processes per machine; hostfile=hosts names several machines",
    "num_nodes node_rank master_addr num_machines nodes": (
        "several machines: hostfile=hosts with lines `host slots=8`, srun inside a Slurm allocation, or the same "
        "command on each, with launch.nnodes and launch.rdzv_endpoint"
    ),
    "num_workers dataloader_num_workers preprocessing_num_workers dataset_num_proc": (
        "rows are tokenised once, before the first step, in data.workers=8 processes"
    ),
    "train train_data": (
        "rows to learn from are data.train=FILE; the settings of train: are train.batch_size=32 and so on"
    ),
    "validation test": "held-out rows are data.validation=FILE and data.test=FILE",
    "prompt prompts": "prompts are rows of a file, one JSON object with the key prompt per line: data.train=FILE",
    "gamma lam lambd gae_lambda": "leave it out: a response has one reward, and no token a value of its own",
    "kl kl_penalty target_kl kl_target": "kl_coef=0.05 in stage=rl algo=a_lol_kl, esrl, reinforce and mrt",
    "model_size num_parameters num_params": "in stage=plan it is parameters=8B",
    "config_file yaml": "set config=FILE.yaml, whose keys are those of stages/*.yaml",
    "trainer actor_rollout_ref critic": (
        "a section of verl's; here it is model=, data.train=, gpus=8, learning_rate=1e-5 ... (stage=help lists them)"
    ),
}
ADVICE: dict[str, str] = {name: text for names, text in SAID.items() for name in names.split()}

METHODS: dict[str, str] = {  # as stage= or algo=
    **dict.fromkeys(("ppo", "online", "rlhf", "rlaif", "rlvr", "gspo", "dapo", "online_dpo", "remax"), ONLINE),
    "grpo": f"{SCORED}; prompts and a reward: algo=reinforce algorithm.settings.baseline=group reward=NAME is nearest",
    "rloo": "it is stage=rl algo=reinforce reward=NAME, whose baseline is leave-one-out",
    "reinforce++": "set stage=rl algo=reinforce reward=NAME",
    **dict.fromkeys(("orpo", "simpo", "ipo", "cpo", "slic"), PAIRS),
    **dict.fromkeys(("raft", "rejection_sampling", "best_of_n", "rest"), "set stage=rl algo=rft"),
    **dict.fromkeys(("offline", "offline_rl", "lol_rl"), "set stage=rl algo=alol"),
    **dict.fromkeys(("sft", "train", "finetune", "fine_tune", "pt", "pretrain"), "set stage=sft"),
    "lora": "set stage=sft lora_r=16",
    **dict.fromkeys(("rm", "reward", "reward_model", "reward_modeling"), "set stage=reward name=NAME"),
    **dict.fromkeys(("eval", "evaluation", "benchmark"), "set stage=evaluate"),
    **dict.fromkeys(("infer", "inference", "predict", "sample", "generation"), "set stage=generate"),
    **dict.fromkeys(("merge", "push", "upload", "convert"), "set stage=export"),
    **dict.fromkeys(
        ("serve", "chat", "deploy"),
        "the model/ that each stage leaves is a Hugging Face directory: `vllm serve` and transformers open it as it is",
    ),
    **dict.fromkeys(("validate", "check", "dry_run"), "set the stage that is meant, and dry_run=true"),
    **dict.fromkeys(("memory", "estimate"), "set stage=plan"),
    **dict.fromkeys(("data", "prepare", "preprocess"), "no stage of its own: each reads data.train=FILE itself"),
    "all": "leave stage= out: all steps of recipe=demo run in order",
}
