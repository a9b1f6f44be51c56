"""Setting names of Hugging Face's Trainer, TRL, axolotl, LLaMA-Factory, accelerate and DeepSpeed, with our names."""

from __future__ import annotations

from launch.config.importers import rules
from launch.config.importers.equivalent import ForeignSettings, TranslatedSetting, parse_number
from launch.config.importers.rules import Rule, choice, needless, no_equal, same, switch

LORA = {"tuning": "lora"}


def _lora_setting(key: str) -> Rule:
    """A setting of LoRA's, which also chooses LoRA."""
    return lambda value, _: TranslatedSetting({**LORA, f"tuning.{key}": value})


def _rules(names: str, rule: Rule) -> dict[str, Rule]:
    """One rule for several names, with blanks between them."""
    return dict.fromkeys(names.split(), rule)


RUN = {
    **_rules("output_dir", same("run.dir")),
    **_rules("resume_from_checkpoint", same("run.resume")),
    **_rules("data_seed", needless("run.seed draws the order of the data too")),
    **_rules("nproc_per_node num_processes n_gpu num_gpus", same("launcher.processes")),
    **_rules("nnodes num_machines", same("launcher.nodes")),
    **_rules("machine_rank", same("launcher.node_rank")),
    **_rules("main_process_ip main_process_port", lambda value, foreign: _rendezvous(foreign)),
    **_rules("use_cpu", switch({"run.device": "cpu"})),
    **_rules("ddp_timeout", same("run.timeout_s")),
    **_rules("max_steps", rules.steps),
    **_rules("num_train_epochs num_epochs epochs n_epochs", rules.epochs),
    **_rules(" ".join(rules.MICRO), rules.batch),
    **_rules("gradient_accumulation_steps train_batch_size", rules.batch),
    **_rules("fp16 float16", rules.precision("fp16")),
    **_rules("bf16 bfloat16", rules.precision("bf16")),
    **_rules("mixed_precision", choice("precision", {"fp32": "no fp32", "bf16": "bf16", "fp16": "fp16"})),
    **_rules("tf32", needless("fp32 products of a card are torch's own choice")),
    **_rules(
        "torch_dtype dtype",
        choice("precision", {"fp32": "float32 fp32", "bf16": "bfloat16 bf16", "fp16": "float16 fp16"}),
    ),
    **_rules("deepspeed", rules.deepspeed),
    **_rules("zero_stage", choice("strategy", {"ddp": "0", "zero1": "1", "zero2": "2", "zero3": "3"})),
    **_rules("fsdp", rules.fsdp),
    **_rules("gradient_checkpointing", switch({"strategy.activation_checkpointing": "full"})),
    **_rules("torch_compile", switch({"strategy.compile": "true"})),
    **_rules(
        "do_train do_eval overwrite_output_dir overwrite_cache plot_loss disable_tqdm remove_unused_columns report_to_all "
        "save_safetensors local_rank ddp_find_unused_parameters dataloader_pin_memory strict debug model_type "
        "tokenizer_type is_llama_derived_model gradient_checkpointing_kwargs dataset_prepared_path use_fast_tokenizer "
        "dataloader_num_workers ddp_backend xformers_attention include_tokens_per_second "
        "lora_fan_in_fan_out wandb_watch wandb_log_model eval_table_size logging_strategy save_only_model",
        needless("not needed here"),
    ),
}
MODEL = {
    **_rules("model_name_or_path base_model model_name pretrained_model_name_or_path model_id", same("model.path")),
    **_rules("tokenizer_name tokenizer_name_or_path tokenizer_config", same("model.tokenizer")),
    **_rules("model_revision revision_of_model", same("model.revision")),
    **_rules("trust_remote_code", same("model.trust_remote_code")),
    **_rules("attn_implementation flash_attn", choice("model.attention", rules.ATTENTION)),
    **_rules(
        "flash_attention", switch({"model.attention": "auto"}, note="auto takes FlashAttention where it is installed")
    ),
    **_rules("sdp_attention", switch({"model.attention": "sdpa"})),
    **_rules("load_in_4bit", switch({"model.quantisation": "nf4"})),
    **_rules("load_in_8bit", switch({"model.quantisation": "int8"})),
    **_rules("quantization_bit", rules.bits),
    **_rules("lora_model_dir adapter_name_or_path", lambda value, _: TranslatedSetting({**LORA, "tuning.from": value})),
    **_rules("lora_r lora_rank", _lora_setting("rank")),
    **_rules("lora_alpha", _lora_setting("alpha")),
    **_rules("lora_dropout", _lora_setting("dropout")),
    **_rules("lora_target lora_target_modules", rules.targets),
    **_rules("lora_target_linear", switch({**LORA, "tuning.targets": "all-linear"})),
    **_rules("lora_modules_to_save modules_to_save", _lora_setting("modules_to_save")),
    **_rules(
        "additional_target",
        lambda value, _: TranslatedSetting({**LORA, "tuning.modules_to_save": f"[{value.strip('[]')}]"}),
    ),
    **_rules("use_rslora peft_use_rslora", switch({**LORA, "tuning.rslora": "true"})),
    **_rules("use_dora peft_use_dora", switch({**LORA, "tuning.dora": "true"})),
    **_rules("loraplus_lr_ratio", _lora_setting("lr_ratio")),
    **_rules("use_peft use_lora", switch(LORA)),
    **_rules("adapter finetuning_type", rules.tuning),
    **_rules("neftune_noise_alpha neftune_alpha", same("model.neftune_alpha")),
    **_rules("rope_scaling rope_theta", no_equal("set model.positions and model.rope")),
    **_rules("resize_token_embeddings", needless("model.add_tokens=[...] does it")),
    **_rules("special_tokens", no_equal("the tokenizer's own are used; model.add_tokens=[...] adds to the vocabulary")),
    **_rules(
        "enable_liger_kernel use_liger_kernel use_liger liger_fused_linear_cross_entropy cut_cross_entropy",
        needless("the loss never holds all logits, as Liger's kernel does"),
    ),
    **_rules("use_unsloth", no_equal("kernels of Unsloth are not used")),
    **_rules(
        "liger_rope liger_rms_norm liger_layer_norm liger_glu_activation liger_swiglu liger_cross_entropy",
        no_equal("kernels of Liger are not used"),
    ),
    **_rules("plugins", no_equal("plugins of axolotl are not loaded")),
}
DATA = {
    **_rules(
        "sequence_parallel_size sequence_parallel_degree context_parallel_size sp_size cp_size ulysses_parallel_size "
        "ulysses_sequence_parallel_size",
        same("parallel.sequence"),
    ),
    **_rules("max_seq_length max_seq_len cutoff_len sequence_len model_max_length block_size", same("data.max_length")),
    **_rules("max_length", same("data.max_length")),
    **_rules("packing sample_packing neat_packing", same("data.packing")),
    **_rules(
        "eval_sample_packing eval_packing pad_to_sequence_len padding_free", needless("the layout is data.layout's")
    ),
    **_rules("group_by_length length_column_name", needless("a step's documents are dealt out by length anyway")),
    **_rules("dataset dataset_name dataset_path train_file train_data train_dataset", same("data.path")),
    **_rules("eval_dataset validation_file eval_file eval_data", same("data.eval_path")),
    **_rules("val_set_size val_size test_size", rules.held_out),
    **_rules("max_samples max_train_samples", same("data.max_documents")),
    **_rules("max_eval_samples", same("evaluation.max_documents")),
    **_rules("preprocessing_num_workers dataset_num_proc dataset_processes num_proc", same("data.workers")),
    **_rules(
        "dataset_text_field",
        lambda value, _: TranslatedSetting({"data.columns.text": value} if value != "text" else {}),
    ),
    **_rules("train_on_inputs train_on_prompt", rules.whole_prompts),
    **_rules(
        "completion_only_loss assistant_only_loss", needless("answers alone are learned, unless data.learn says more")
    ),
    **_rules("mask_history", switch({"data.learn.turns": "last"})),
    **_rules(
        "template chat_template",
        no_equal("the tokenizer's own template is used; model.chat_template=<file> names another"),
    ),
    **_rules("shuffle_dataset", same("data.shuffle")),
    **_rules("stage rl", rules.objective),
    **_rules("pref_beta dpo_beta rl_beta", same("objective.beta")),
    **_rules("pref_loss", lambda value, _: _pair_loss(value)),
    **_rules("simpo_gamma", same("objective.gamma")),
}
OPTIMIZER = {
    **_rules("learning_rate", same("optim.lr")),
    **_rules("weight_decay", same("optim.weight_decay")),
    **_rules("label_smoothing_factor label_smoothing", same("objective.label_smoothing")),
    **_rules("ema_decay model_ema_decay", same("optim.ema_decay")),
    **_rules("llrd layerwise_lr_decay layer_wise_lr_decay layer_decay", same("optim.layer_decay")),
    **_rules("max_grad_norm gradient_clipping", same("optim.max_grad_norm")),
    **_rules("adam_beta1 adam_beta2", rules.betas),
    **_rules("adam_epsilon adam_eps", same("optim.eps")),
    **_rules("optimizer", choice("optim", rules.OPTIMIZERS)),
    **_rules("lr_scheduler_type lr_scheduler", choice("schedule", rules.SCHEDULES)),
    **_rules("warmup_steps", rules.warmup),
    **_rules("warmup_ratio", same("schedule.warmup_share")),
    **_rules("cosine_min_lr_ratio min_lr_ratio", same("schedule.min_factor")),
    **_rules(
        "loss_watchdog_threshold loss_watchdog_patience",
        no_equal("guards.loss=note, skip or rollback watches the loss"),
    ),
}
REPORTING = {
    **_rules("seed", same("run.seed")),
    **_rules("logging_steps", same("logging.every_steps")),
    **_rules("logging_dir", needless("logs are in the run directory")),
    **_rules("report_to", rules.report_to),
    **_rules("run_name wandb_name", same("logging.name")),
    **_rules("wandb_run_id", no_equal("the last part of run.dir is the id of the run")),
    **_rules("wandb_project", same("logging.project")),
    **_rules("wandb_entity", same("logging.entity")),
    **_rules("wandb_mode", same("logging.wandb")),
    **_rules("use_tensorboard", same("logging.tensorboard")),
    **_rules("save_steps", rules.saving),
    **_rules("save_strategy", lambda value, _: _saving_strategy(value)),
    **_rules("save_total_limit", same("checkpoint.keep")),
    **_rules("saves_per_epoch", no_equal("checkpoint.every_steps or checkpoint.every_minutes says how often")),
    **_rules("eval_steps", rules.evaluating),
    **_rules("evals_per_epoch", no_equal("evaluation.every_steps says how often")),
    **_rules("eval_strategy evaluation_strategy", lambda value, foreign: _evaluation_strategy(value)),
    **_rules("per_device_eval_batch_size eval_batch_size", same("evaluation.batch")),
    **_rules(
        "metric_for_best_model",
        lambda value, _: TranslatedSetting({"evaluation.watch": f"eval/{value.removeprefix('eval_')}"}),
    ),
    **_rules("greater_is_better", same("evaluation.greater_is_better")),
    **_rules("early_stopping_patience", same("evaluation.patience")),
    **_rules(
        "load_best_model_at_end", no_equal("the best checkpoint is kept: `shardtune export <run> checkpoint=best`")
    ),
    **_rules(
        "push_to_hub hub_model_id hub_strategy",
        no_equal("a run pushes nothing; afterwards type `shardtune export <run> to=hub:<owner>/<name>`"),
    ),
    **_rules("predict_with_generate", no_equal("evaluation.generate.samples=N writes and scores answers")),
}
NAMES: dict[str, Rule] = {**RUN, **MODEL, **DATA, **OPTIMIZER, **REPORTING}


def plain_name(name: str) -> str:
    """A name without the dashes, dots and cases in which it may be written."""
    return name.lstrip("-+~").replace("-", "_").rsplit(".", 1)[-1].lower()


def translate(name: str, foreign: ForeignSettings) -> TranslatedSetting | None:
    """What the setting `name` of `foreign` is here; None if no other trainer has a setting of that name."""
    rule = NAMES.get(plain_name(name))
    return None if rule is None else rule(foreign.by_name[plain_name(name)], foreign)


def _pair_loss(value: str) -> TranslatedSetting:
    """LLaMA-Factory's `pref_loss`: an objective of its own here, or a loss of objective=dpo."""
    if value in ("orpo", "simpo"):
        return TranslatedSetting({"objective": value})
    if value in ("sigmoid", "ipo", "hinge"):
        return TranslatedSetting({"objective": "dpo", "objective.loss_type": value})
    return TranslatedSetting(note="objective=dpo has objective.loss_type=sigmoid, ipo or hinge")


def _evaluation_strategy(value: str) -> TranslatedSetting:
    """Whether the run is evaluated at all."""
    if value.lower() in ("no", "none", "false"):
        return TranslatedSetting({"evaluation": "none"})
    return TranslatedSetting(note="evaluation.every_steps says how often; at the end it is always done")


def _saving_strategy(value: str) -> TranslatedSetting:
    """Whether there are checkpoints before the last one."""
    if value.lower() in ("no", "none", "false"):
        return TranslatedSetting({"checkpoint.every_minutes": "0"})
    if value.lower() == "steps":
        return TranslatedSetting(note="save_steps says how often", needless=True)
    return TranslatedSetting(note="checkpoint.every_steps or checkpoint.every_minutes says how often")


def _rendezvous(foreign: ForeignSettings) -> TranslatedSetting:
    """Where several hosts meet; one host alone finds a free port."""
    if (parse_number(foreign.get("num_machines")) or 1) < 2:
        return TranslatedSetting(note="one host alone finds a free port", needless=True)
    host = foreign.get("main_process_ip")
    port = foreign.get("main_process_port")
    if not host or not port:
        return TranslatedSetting(note="launcher.rdzv=<host>:<port> says where several hosts meet")
    return TranslatedSetting({"launcher.rdzv": f"{host}:{port}"})
