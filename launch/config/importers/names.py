"""Setting names of Hugging Face's Trainer, TRL, axolotl, LLaMA-Factory, accelerate and DeepSpeed, with our names."""

from launch.config.importers import rules
from launch.config.importers.equivalent import OtherTrainerSettings, TranslatedSetting, parse_number
from launch.config.importers.rules import Rule, choice, not_needed, renamed_to, switch, without_equivalent

LORA_OVERRIDES = {"tuning": "lora"}


def _lora_setting(key: str) -> Rule:
    """A rule for a setting of LoRA's, which also chooses `tuning=lora`."""
    return lambda value, _: TranslatedSetting({**LORA_OVERRIDES, f"tuning.{key}": value})


def _rules(names: str, rule: Rule) -> dict[str, Rule]:
    """The same rule by each of several names, with blanks between them: `"nnodes num_machines"` gives two entries."""
    return dict.fromkeys(names.split(), rule)


RUN_RULES = {
    **_rules("output_dir", renamed_to("run.dir")),
    **_rules("resume_from_checkpoint", renamed_to("run.resume")),
    **_rules("data_seed", not_needed("run.seed draws the order of the data too")),
    **_rules("nproc_per_node num_processes n_gpu num_gpus", renamed_to("launcher.processes")),
    **_rules("nnodes num_machines", renamed_to("launcher.nodes")),
    **_rules("machine_rank", renamed_to("launcher.node_rank")),
    **_rules("main_process_ip main_process_port", lambda value, other_settings: _rendezvous(other_settings)),
    **_rules("use_cpu", switch({"run.device": "cpu"})),
    **_rules("ddp_timeout", renamed_to("run.timeout_s")),
    **_rules("max_steps", rules.step_budget),
    **_rules("num_train_epochs num_epochs epochs n_epochs", rules.epoch_budget),
    **_rules(" ".join(rules.MICRO_BATCH_NAMES), rules.batch_sizes),
    **_rules("gradient_accumulation_steps train_batch_size", rules.batch_sizes),
    **_rules("fp16 float16", rules.precision_switch("fp16")),
    **_rules("bf16 bfloat16", rules.precision_switch("bf16")),
    **_rules("mixed_precision", choice("precision", {"fp32": "no fp32", "bf16": "bf16", "fp16": "fp16"})),
    **_rules("tf32", not_needed("fp32 products of a card are torch's own choice")),
    **_rules(
        "torch_dtype dtype",
        choice("precision", {"fp32": "float32 fp32", "bf16": "bfloat16 bf16", "fp16": "float16 fp16"}),
    ),
    **_rules("deepspeed", rules.deepspeed_stage),
    **_rules("zero_stage", choice("strategy", {"ddp": "0", "zero1": "1", "zero2": "2", "zero3": "3"})),
    **_rules("fsdp", rules.fsdp_strategy),
    **_rules("gradient_checkpointing", switch({"strategy.activation_checkpointing": "full"})),
    **_rules("torch_compile", switch({"strategy.compile": "true"})),
    **_rules(
        "do_train do_eval overwrite_output_dir overwrite_cache plot_loss disable_tqdm remove_unused_columns report_to_all "
        "save_safetensors local_rank ddp_find_unused_parameters dataloader_pin_memory strict debug model_type "
        "tokenizer_type is_llama_derived_model gradient_checkpointing_kwargs dataset_prepared_path use_fast_tokenizer "
        "dataloader_num_workers ddp_backend xformers_attention include_tokens_per_second "
        "lora_fan_in_fan_out wandb_watch wandb_log_model eval_table_size logging_strategy save_only_model",
        not_needed("not needed here"),
    ),
}
MODEL_RULES = {
    **_rules(
        "model_name_or_path base_model model_name pretrained_model_name_or_path model_id", renamed_to("model.path")
    ),
    **_rules("tokenizer_name tokenizer_name_or_path tokenizer_config", renamed_to("model.tokenizer")),
    **_rules("model_revision revision_of_model", renamed_to("model.revision")),
    **_rules("trust_remote_code", renamed_to("model.trust_remote_code")),
    **_rules("attn_implementation flash_attn", choice("model.attention", rules.ATTENTION_NAMES)),
    **_rules(
        "flash_attention", switch({"model.attention": "auto"}, note="auto takes FlashAttention where it is installed")
    ),
    **_rules("sdp_attention", switch({"model.attention": "sdpa"})),
    **_rules("load_in_4bit", switch({"model.quantisation": "nf4"})),
    **_rules("load_in_8bit", switch({"model.quantisation": "int8"})),
    **_rules("quantization_bit", rules.quantisation_bits),
    **_rules(
        "lora_model_dir adapter_name_or_path",
        lambda value, _: TranslatedSetting({**LORA_OVERRIDES, "tuning.from": value}),
    ),
    **_rules("lora_r lora_rank", _lora_setting("rank")),
    **_rules("lora_alpha", _lora_setting("alpha")),
    **_rules("lora_dropout", _lora_setting("dropout")),
    **_rules("lora_target lora_target_modules", rules.lora_targets),
    **_rules("lora_target_linear", switch({**LORA_OVERRIDES, "tuning.targets": "all-linear"})),
    **_rules("lora_modules_to_save modules_to_save", _lora_setting("modules_to_save")),
    **_rules(
        "additional_target",
        lambda value, _: TranslatedSetting({**LORA_OVERRIDES, "tuning.modules_to_save": f"[{value.strip('[]')}]"}),
    ),
    **_rules("use_rslora peft_use_rslora", switch({**LORA_OVERRIDES, "tuning.rslora": "true"})),
    **_rules("use_dora peft_use_dora", switch({**LORA_OVERRIDES, "tuning.dora": "true"})),
    **_rules("loraplus_lr_ratio", _lora_setting("lr_ratio")),
    **_rules("use_peft use_lora", switch(LORA_OVERRIDES)),
    **_rules("adapter finetuning_type", rules.tuning_method),
    **_rules("neftune_noise_alpha neftune_alpha", renamed_to("model.neftune_alpha")),
    **_rules("rope_scaling rope_theta", without_equivalent("set model.positions and model.rope")),
    **_rules("resize_token_embeddings", not_needed("model.add_tokens=[...] does it")),
    **_rules(
        "special_tokens",
        without_equivalent("the tokenizer's own are used; model.add_tokens=[...] adds to the vocabulary"),
    ),
    **_rules(
        "enable_liger_kernel use_liger_kernel use_liger liger_fused_linear_cross_entropy cut_cross_entropy",
        not_needed("the loss never holds all logits, as Liger's kernel does"),
    ),
    **_rules("use_unsloth", without_equivalent("kernels of Unsloth are not used")),
    **_rules(
        "liger_rope liger_rms_norm liger_layer_norm liger_glu_activation liger_swiglu liger_cross_entropy",
        without_equivalent("kernels of Liger are not used"),
    ),
    **_rules("plugins", without_equivalent("plugins of axolotl are not loaded")),
}
DATA_RULES = {
    **_rules(
        "sequence_parallel_size sequence_parallel_degree context_parallel_size sp_size cp_size ulysses_parallel_size "
        "ulysses_sequence_parallel_size",
        renamed_to("parallel.sequence"),
    ),
    **_rules("expert_parallel_size expert_model_parallel_size ep_size", renamed_to("parallel.experts")),
    **_rules(
        "max_seq_length max_seq_len cutoff_len sequence_len model_max_length block_size", renamed_to("data.max_length")
    ),
    **_rules("max_length", renamed_to("data.max_length")),
    **_rules("packing sample_packing neat_packing", renamed_to("data.packing")),
    **_rules(
        "eval_sample_packing eval_packing pad_to_sequence_len padding_free", not_needed("the layout is data.layout's")
    ),
    **_rules("group_by_length length_column_name", not_needed("a step's documents are dealt out by length anyway")),
    **_rules("dataset dataset_name dataset_path train_file train_data train_dataset", renamed_to("data.path")),
    **_rules("eval_dataset validation_file eval_file eval_data", renamed_to("data.eval_path")),
    **_rules("val_set_size val_size test_size", rules.held_out_share),
    **_rules("max_samples max_train_samples", renamed_to("data.max_documents")),
    **_rules("max_eval_samples", renamed_to("evaluation.max_documents")),
    **_rules("preprocessing_num_workers dataset_num_proc dataset_processes num_proc", renamed_to("data.workers")),
    **_rules(
        "dataset_text_field",
        lambda value, _: TranslatedSetting({"data.columns.text": value} if value != "text" else {}),
    ),
    **_rules("train_on_inputs train_on_prompt", rules.train_on_prompts),
    **_rules(
        "completion_only_loss assistant_only_loss", not_needed("answers alone are learned, unless data.learn says more")
    ),
    **_rules("mask_history", switch({"data.learn.turns": "last"})),
    **_rules(
        "template chat_template",
        without_equivalent("the tokenizer's own template is used; model.chat_template=<file> names another"),
    ),
    **_rules("shuffle_dataset", renamed_to("data.shuffle")),
    **_rules("stage rl", rules.objective_or_dpo_loss),
    **_rules("pref_beta dpo_beta rl_beta", renamed_to("objective.beta")),
    **_rules("pref_loss", lambda value, _: _pair_loss(value)),
    **_rules("simpo_gamma", renamed_to("objective.gamma")),
}
REINFORCEMENT_RULES = {  # of TRL's GRPOConfig, then of verl
    **_rules("num_generations", renamed_to("objective.group_size")),
    **_rules("max_completion_length max_response_length", renamed_to("objective.rollout.max_new_tokens")),
    **_rules("max_prompt_length", renamed_to("data.max_length")),
    **_rules("num_iterations ppo_epochs", renamed_to("objective.rollout.iterations")),
    **_rules("epsilon clip_ratio clip_ratio_low", renamed_to("objective.clip")),
    **_rules("epsilon_high clip_ratio_high", renamed_to("objective.clip_high")),
    **_rules("clip_ratio_c", renamed_to("objective.clip_negative")),
    **_rules("kl_loss_coef kl_coef", renamed_to("objective.kl.weight")),
    **_rules("mask_truncated_completions", renamed_to("objective.mask_truncated")),
    **_rules("importance_sampling_level", renamed_to("objective.importance_level")),
    **_rules("scale_rewards", choice("objective.scale", rules.REWARD_SCALE_NAMES)),
    **_rules("multi_objective_aggregation", choice("objective.combine", rules.REWARD_COMBINATION_NAMES)),
    **_rules("loss_agg_mode", choice("objective.normalise", rules.LOSS_AGGREGATION_NAMES)),
    **_rules("adv_estimator", choice("objective", rules.ADVANTAGE_ESTIMATOR_NAMES)),
    **_rules(
        "reward_funcs reward_weights custom_reward_function",
        without_equivalent(
            "objective.rewards=rewards.py takes each function of a file; objective.rewards.<name>.weight weighs it"
        ),
    ),
    **_rules(
        "steps_per_generation ppo_mini_batch_size",
        without_equivalent(
            "objective.rollout.steps says how many optimizer steps the answers of a round are divided into"
        ),
    ),
    **_rules(
        "use_vllm vllm_mode vllm_gpu_memory_utilization",
        without_equivalent("the run's own engine writes the answers, under every strategy"),
    ),
}
OPTIMIZER_RULES = {
    **_rules("learning_rate", renamed_to("optim.lr")),
    **_rules("weight_decay", renamed_to("optim.weight_decay")),
    **_rules("label_smoothing_factor label_smoothing", renamed_to("objective.label_smoothing")),
    **_rules("ema_decay model_ema_decay", renamed_to("optim.ema_decay")),
    **_rules("llrd layerwise_lr_decay layer_wise_lr_decay layer_decay", renamed_to("optim.layer_decay")),
    **_rules("max_grad_norm gradient_clipping", renamed_to("optim.max_grad_norm")),
    **_rules("adam_beta1 adam_beta2", rules.adam_betas),
    **_rules("adam_epsilon adam_eps", renamed_to("optim.eps")),
    **_rules("optimizer", choice("optim", rules.OPTIMIZER_NAMES)),
    **_rules("lr_scheduler_type lr_scheduler", choice("schedule", rules.SCHEDULE_NAMES)),
    **_rules("warmup_steps", rules.warmup_length),
    **_rules("warmup_ratio", renamed_to("schedule.warmup_share")),
    **_rules("cosine_min_lr_ratio min_lr_ratio", renamed_to("schedule.min_factor")),
    **_rules(
        "loss_watchdog_threshold loss_watchdog_patience",
        without_equivalent("guards.loss=note, skip or rollback watches the loss"),
    ),
}
REPORTING_RULES = {
    **_rules("seed", renamed_to("run.seed")),
    **_rules("logging_steps", renamed_to("logging.every_steps")),
    **_rules("logging_dir", not_needed("logs are in the run directory")),
    **_rules("report_to", rules.report_to),
    **_rules("run_name wandb_name", renamed_to("logging.name")),
    **_rules("wandb_run_id", without_equivalent("the last part of run.dir is the id of the run")),
    **_rules("wandb_project", renamed_to("logging.project")),
    **_rules("wandb_entity", renamed_to("logging.entity")),
    **_rules("wandb_mode", renamed_to("logging.wandb")),
    **_rules("use_tensorboard", renamed_to("logging.tensorboard")),
    **_rules(
        "save_steps",
        rules.step_interval("checkpoint.every_steps", "set checkpoint.every_steps or checkpoint.every_minutes"),
    ),
    **_rules("save_strategy", lambda value, _: _saving_strategy(value)),
    **_rules("save_total_limit", renamed_to("checkpoint.keep")),
    **_rules(
        "saves_per_epoch", without_equivalent("checkpoint.every_steps or checkpoint.every_minutes says how often")
    ),
    **_rules("eval_steps", rules.step_interval("evaluation.every_steps", "set evaluation.every_steps")),
    **_rules("evals_per_epoch", without_equivalent("evaluation.every_steps says how often")),
    **_rules("eval_strategy evaluation_strategy", lambda value, other_settings: _evaluation_strategy(value)),
    **_rules("per_device_eval_batch_size eval_batch_size", renamed_to("evaluation.batch")),
    **_rules(
        "metric_for_best_model",
        lambda value, _: TranslatedSetting({"evaluation.watch": f"eval/{value.removeprefix('eval_')}"}),
    ),
    **_rules("greater_is_better", renamed_to("evaluation.greater_is_better")),
    **_rules("early_stopping_patience", renamed_to("evaluation.patience")),
    **_rules(
        "load_best_model_at_end",
        without_equivalent("the best checkpoint is kept: `shardtune export <run> checkpoint=best`"),
    ),
    **_rules(
        "push_to_hub hub_model_id hub_strategy",
        without_equivalent("a run pushes nothing; afterwards type `shardtune export <run> to=hub:<owner>/<name>`"),
    ),
    **_rules("predict_with_generate", without_equivalent("evaluation.generate.samples=N writes and scores answers")),
}
RULE_BY_NORMALISED_NAME: dict[str, Rule] = {
    **RUN_RULES,
    **MODEL_RULES,
    **DATA_RULES,
    **REINFORCEMENT_RULES,
    **OPTIMIZER_RULES,
    **REPORTING_RULES,
}


def normalised_name(name: str) -> str:
    """The name of a setting by which rules are found: `--Optim.Learning-Rate` is `learning_rate`."""
    return name.lstrip("-+~").replace("-", "_").rsplit(".", 1)[-1].lower()


def translate_by_rule(name: str, other_settings: OtherTrainerSettings) -> TranslatedSetting | None:
    """Translate the setting `name` of another trainer by its rule: `learning_rate` -> {"optim.lr": "1e-4"}; None without a rule.

    `other_settings`: all settings of the other trainer as text; this one's value is taken from there, so it must be among them.
    """
    key = normalised_name(name)
    rule = RULE_BY_NORMALISED_NAME.get(key)
    return None if rule is None else rule(other_settings.value_by_name[key], other_settings)


def _pair_loss(value: str) -> TranslatedSetting:
    """Our `objective` for LLaMA-Factory's `pref_loss`, the loss over pairs of answers: `orpo` is one, `ipo` is a loss of dpo."""
    if value in ("orpo", "simpo"):
        return TranslatedSetting({"objective": value})
    if value in ("sigmoid", "ipo", "hinge"):
        return TranslatedSetting({"objective": "dpo", "objective.loss_type": value})
    return TranslatedSetting(note="objective=dpo has objective.loss_type=sigmoid, ipo or hinge")


def _evaluation_strategy(value: str) -> TranslatedSetting:
    """Our setting for another trainer's that says when to evaluate: `no` is evaluation=none; a note for every epoch or step."""
    if value.lower() in ("no", "none", "false"):
        return TranslatedSetting({"evaluation": "none"})
    return TranslatedSetting(note="evaluation.every_steps says how often; at the end it is always done")


def _saving_strategy(value: str) -> TranslatedSetting:
    """Our setting for another trainer's that says when to save: `no` is checkpoint.every_minutes=0; otherwise a note."""
    if value.lower() in ("no", "none", "false"):
        return TranslatedSetting({"checkpoint.every_minutes": "0"})
    if value.lower() == "steps":
        return TranslatedSetting(note="save_steps says how often", not_needed=True)
    return TranslatedSetting(note="checkpoint.every_steps or checkpoint.every_minutes says how often")


def _rendezvous(other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Our `launcher.rdzv` from the address and port of accelerate's main process; one host alone finds a free port."""
    if (parse_number(other_settings.get("num_machines")) or 1) < 2:
        return TranslatedSetting(note="one host alone finds a free port", not_needed=True)
    host = other_settings.get("main_process_ip")
    port = other_settings.get("main_process_port")
    if not host or not port:
        return TranslatedSetting(note="launcher.rdzv=<host>:<port> says where several hosts meet")
    return TranslatedSetting({"launcher.rdzv": f"{host}:{port}"})
