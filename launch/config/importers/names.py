"""Setting names of Hugging Face's Trainer, TRL, axolotl, LLaMA-Factory, accelerate and DeepSpeed, with our names."""

from __future__ import annotations

from launch.config.importers import rules
from launch.config.importers.equivalent import ForeignSettings, TranslatedSetting, number
from launch.config.importers.rules import Rule, choice, needless, none, same, switch

LORA = {"tuning": "lora"}


def _lora(key: str) -> Rule:
    return lambda value, _: TranslatedSetting({**LORA, f"tuning.{key}": value})


def _named(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RUN = {
    **_named("output_dir", same("run.dir")),
    **_named("resume_from_checkpoint", same("run.resume")),
    **_named("data_seed", needless("run.seed draws the order of the data too")),
    **_named("nproc_per_node num_processes n_gpu num_gpus", same("launcher.processes")),
    **_named("nnodes num_machines", same("launcher.nodes")),
    **_named("machine_rank", same("launcher.node_rank")),
    **_named("main_process_ip main_process_port", lambda value, theirs: _rendezvous(theirs)),
    **_named("use_cpu", switch({"run.device": "cpu"})),
    **_named("ddp_timeout", same("run.timeout_s")),
    **_named("max_steps", rules.steps),
    **_named("num_train_epochs num_epochs epochs n_epochs", rules.epochs),
    **_named(" ".join(rules.MICRO), rules.batch),
    **_named("gradient_accumulation_steps train_batch_size", rules.batch),
    **_named("fp16 float16", rules.precision("fp16")),
    **_named("bf16 bfloat16", rules.precision("bf16")),
    **_named("mixed_precision", choice("precision", {"fp32": "no fp32", "bf16": "bf16", "fp16": "fp16"})),
    **_named("tf32", needless("fp32 products of a card are torch's own choice")),
    **_named(
        "torch_dtype dtype",
        choice("precision", {"fp32": "float32 fp32", "bf16": "bfloat16 bf16", "fp16": "float16 fp16"}),
    ),
    **_named("deepspeed", rules.deepspeed),
    **_named("zero_stage", choice("strategy", {"ddp": "0", "zero1": "1", "zero2": "2", "zero3": "3"})),
    **_named("fsdp", rules.fsdp),
    **_named("gradient_checkpointing", switch({"strategy.activation_checkpointing": "full"})),
    **_named("torch_compile", switch({"strategy.compile": "true"})),
    **_named(
        "do_train do_eval overwrite_output_dir overwrite_cache plot_loss disable_tqdm remove_unused_columns report_to_all "
        "save_safetensors local_rank ddp_find_unused_parameters dataloader_pin_memory strict debug model_type "
        "tokenizer_type is_llama_derived_model gradient_checkpointing_kwargs dataset_prepared_path use_fast_tokenizer "
        "dataloader_num_workers ddp_backend xformers_attention include_tokens_per_second "
        "lora_fan_in_fan_out wandb_watch wandb_log_model eval_table_size logging_strategy save_only_model",
        needless("concerns that trainer alone"),
    ),
}
MODEL = {
    **_named("model_name_or_path base_model model_name pretrained_model_name_or_path model_id", same("model.path")),
    **_named("tokenizer_name tokenizer_name_or_path tokenizer_config", same("model.tokenizer")),
    **_named("model_revision revision_of_model", same("model.revision")),
    **_named("trust_remote_code", same("model.trust_remote_code")),
    **_named("attn_implementation flash_attn", choice("model.attention", rules.ATTENTION)),
    **_named(
        "flash_attention", switch({"model.attention": "auto"}, said="auto takes FlashAttention where it is installed")
    ),
    **_named("sdp_attention", switch({"model.attention": "sdpa"})),
    **_named("load_in_4bit", switch({"model.quantisation": "nf4"})),
    **_named("load_in_8bit", switch({"model.quantisation": "int8"})),
    **_named("quantization_bit", rules.bits),
    **_named("lora_model_dir adapter_name_or_path", lambda value, _: TranslatedSetting({**LORA, "tuning.from": value})),
    **_named("lora_r lora_rank", _lora("rank")),
    **_named("lora_alpha", _lora("alpha")),
    **_named("lora_dropout", _lora("dropout")),
    **_named("lora_target lora_target_modules", rules.targets),
    **_named("lora_target_linear", switch({**LORA, "tuning.targets": "all-linear"})),
    **_named("lora_modules_to_save modules_to_save", _lora("modules_to_save")),
    **_named(
        "additional_target",
        lambda value, _: TranslatedSetting({**LORA, "tuning.modules_to_save": f"[{value.strip('[]')}]"}),
    ),
    **_named("use_rslora peft_use_rslora", switch({**LORA, "tuning.rslora": "true"})),
    **_named("use_dora peft_use_dora", switch({**LORA, "tuning.dora": "true"})),
    **_named("loraplus_lr_ratio", _lora("lr_ratio")),
    **_named("use_peft use_lora", switch(LORA)),
    **_named("adapter finetuning_type", rules.tuning),
    **_named("neftune_noise_alpha neftune_alpha", same("model.neftune_alpha")),
    **_named("rope_scaling rope_theta", none("set it in the config.json of the model")),
    **_named("resize_token_embeddings", needless("model.add_tokens=[...] does it")),
    **_named("special_tokens", none("the tokenizer's own are used; model.add_tokens=[...] adds to the vocabulary")),
    **_named(
        "enable_liger_kernel use_liger_kernel use_liger liger_fused_linear_cross_entropy cut_cross_entropy",
        needless("the loss never holds all logits, as Liger's kernel does"),
    ),
    **_named("use_unsloth", none("kernels of Unsloth are not used")),
    **_named(
        "liger_rope liger_rms_norm liger_layer_norm liger_glu_activation liger_swiglu liger_cross_entropy",
        none("kernels of Liger are not used"),
    ),
    **_named("plugins", none("plugins of axolotl are not loaded")),
}
DATA = {
    **_named("max_seq_length max_seq_len cutoff_len sequence_len model_max_length block_size", same("data.max_length")),
    **_named("max_length", same("data.max_length")),
    **_named("packing sample_packing neat_packing", same("data.packing")),
    **_named(
        "eval_sample_packing eval_packing pad_to_sequence_len padding_free", needless("the layout is data.layout's")
    ),
    **_named("group_by_length length_column_name", needless("a step's documents are dealt out by length anyway")),
    **_named("dataset dataset_name dataset_path train_file train_data train_dataset", same("data.path")),
    **_named("eval_dataset validation_file eval_file eval_data", same("data.eval_path")),
    **_named("val_set_size val_size test_size", rules.held_out),
    **_named("max_samples max_train_samples", same("data.max_documents")),
    **_named("max_eval_samples", same("evaluation.max_documents")),
    **_named("preprocessing_num_workers dataset_num_proc dataset_processes num_proc", same("data.workers")),
    **_named(
        "dataset_text_field",
        lambda value, _: TranslatedSetting({"data.columns.text": value} if value != "text" else {}),
    ),
    **_named("train_on_inputs train_on_prompt", rules.whole_prompts),
    **_named(
        "completion_only_loss assistant_only_loss", needless("answers alone are learned, unless data.learn says more")
    ),
    **_named("mask_history", switch({"data.learn.turns": "last"})),
    **_named(
        "template chat_template", none("the tokenizer's own template is used; model.chat_template=<file> names another")
    ),
    **_named("shuffle_dataset", same("data.shuffle")),
    **_named("stage rl", rules.objective),
    **_named("pref_beta dpo_beta rl_beta", same("objective.beta")),
    **_named("pref_loss", lambda value, _: _pair_loss(value)),
    **_named("simpo_gamma", same("objective.gamma")),
}
OPTIMIZER = {
    **_named("learning_rate", same("optim.lr")),
    **_named("weight_decay", same("optim.weight_decay")),
    **_named("label_smoothing_factor label_smoothing", same("objective.label_smoothing")),
    **_named("ema_decay model_ema_decay", same("optim.ema_decay")),
    **_named("llrd layerwise_lr_decay layer_wise_lr_decay layer_decay", same("optim.layer_decay")),
    **_named("max_grad_norm gradient_clipping", same("optim.max_grad_norm")),
    **_named("adam_beta1 adam_beta2", rules.betas),
    **_named("adam_epsilon adam_eps", same("optim.eps")),
    **_named("optimizer", choice("optim", rules.OPTIMIZERS)),
    **_named("lr_scheduler_type lr_scheduler", choice("schedule", rules.SCHEDULES)),
    **_named("warmup_steps", rules.warmup),
    **_named("warmup_ratio", same("schedule.warmup_share")),
    **_named("cosine_min_lr_ratio min_lr_ratio", same("schedule.min_factor")),
    **_named(
        "loss_watchdog_threshold loss_watchdog_patience", none("guards.loss=note, skip or rollback watches the loss")
    ),
}
TELLING = {
    **_named("seed", same("run.seed")),
    **_named("logging_steps", same("logging.every_steps")),
    **_named("logging_dir", needless("logs are in the run directory")),
    **_named("report_to", rules.report_to),
    **_named("run_name wandb_name", same("logging.name")),
    **_named("wandb_run_id", none("the last part of run.dir is the id of the run")),
    **_named("wandb_project", same("logging.project")),
    **_named("wandb_entity", same("logging.entity")),
    **_named("wandb_mode", same("logging.wandb")),
    **_named("use_tensorboard", same("logging.tensorboard")),
    **_named("save_steps", rules.saving),
    **_named("save_strategy", lambda value, _: _saving_when(value)),
    **_named("save_total_limit", same("checkpoint.keep")),
    **_named("saves_per_epoch", none("checkpoint.every_steps or checkpoint.every_minutes says how often")),
    **_named("eval_steps", rules.evaluating),
    **_named("evals_per_epoch", none("evaluation.every_steps says how often")),
    **_named("eval_strategy evaluation_strategy", lambda value, theirs: _when(value)),
    **_named("per_device_eval_batch_size eval_batch_size", same("evaluation.batch")),
    **_named(
        "metric_for_best_model",
        lambda value, _: TranslatedSetting({"evaluation.watch": f"eval/{value.removeprefix('eval_')}"}),
    ),
    **_named("greater_is_better", same("evaluation.greater_is_better")),
    **_named("early_stopping_patience", same("evaluation.patience")),
    **_named("load_best_model_at_end", none("the best checkpoint is kept: `shardtune export <run> checkpoint=best`")),
    **_named(
        "push_to_hub hub_model_id hub_strategy",
        none("a run pushes nothing; afterwards type `shardtune export <run> to=hub:<owner>/<name>`"),
    ),
    **_named("predict_with_generate", none("evaluation.generate.samples=N writes and scores answers")),
}
NAMES: dict[str, Rule] = {**RUN, **MODEL, **DATA, **OPTIMIZER, **TELLING}


def plain(name: str) -> str:
    """A name without the dashes, dots and cases in which it may be written."""
    return name.lstrip("-+~").replace("-", "_").rsplit(".", 1)[-1].lower()


def answer(name: str, theirs: ForeignSettings) -> TranslatedSetting | None:
    """What `name` of `theirs.given` is here; None where no other trainer has it either."""
    rule = NAMES.get(plain(name))
    return None if rule is None else rule(theirs.given[plain(name)], theirs)


def _pair_loss(value: str) -> TranslatedSetting:
    if value in ("orpo", "simpo"):
        return TranslatedSetting({"objective": value})
    if value in ("sigmoid", "ipo", "hinge"):
        return TranslatedSetting({"objective": "dpo", "objective.loss_type": value})
    return TranslatedSetting(said="objective=dpo has objective.loss_type=sigmoid, ipo or hinge")


def _when(value: str) -> TranslatedSetting:
    if value.lower() in ("no", "none", "false"):
        return TranslatedSetting({"evaluation": "none"})
    return TranslatedSetting(said="evaluation.every_steps says how often; at the end it is always done")


def _saving_when(value: str) -> TranslatedSetting:
    """Whether there are checkpoints before the last one."""
    if value.lower() in ("no", "none", "false"):
        return TranslatedSetting({"checkpoint.every_minutes": "0"})
    if value.lower() == "steps":
        return TranslatedSetting(said="save_steps says how often", needless=True)
    return TranslatedSetting(said="checkpoint.every_steps or checkpoint.every_minutes says how often")


def _rendezvous(theirs: ForeignSettings) -> TranslatedSetting:
    """Where several hosts meet; one host alone finds a free port."""
    host, port = theirs.get("main_process_ip"), theirs.get("main_process_port")
    if (number(theirs.get("num_machines")) or 1) < 2:
        return TranslatedSetting(said="one host alone finds a free port", needless=True)
    if not host or not port:
        return TranslatedSetting(said="launcher.rdzv=<host>:<port> says where several hosts meet")
    return TranslatedSetting({"launcher.rdzv": f"{host}:{port}"})
