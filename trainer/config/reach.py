"""What a setting does beyond the run itself: it describes the run, or it reaches out of it.

Somebody else's run directory is data for its reader. A setting that describes (model, method, data, sizes) is taken from it. A
setting that reaches out (sends, runs, fetches, writes elsewhere, reads the reader's files) counts only if the reader typed its
value: see `launch/config/read_run.py`. Every setting has its class here, by its own name; a test fails for one that has none.
"""

from __future__ import annotations

from enum import StrEnum


class Reach(StrEnum):
    """What a setting reaches."""

    describes = "describes"
    address = "address"
    """A server, and the environment variable that is sent to it: one value with two settings."""
    code = "code"
    """Python code is run."""
    network = "network"
    """Something is fetched from the network."""
    tracker = "tracker"
    """A tracker is told, or who is told."""
    command = "command"
    """A command is run, or the machine it runs on is chosen."""
    place = "place"
    """A directory is written."""
    file = "file"
    """A file is read, and its texts stand in what is written."""


_WRITING = "max_new_tokens beams temperature top_p top_k stop seed draws batch_tokens"

_DESCRIBES = {
    "run": "resume accept seed device threads matmul shared_memory lease_s must_fit timeout_s",
    "model": "path tokenizer revision attention add_tokens router_aux_loss router_z_loss dropout neftune_alpha "
    "quantisation double_quantisation keep_packed adapters",
    "data": "path eval_path eval_share test_path test_share group_by format columns ignore_columns max_bad_share languages "
    "max_length control_tokens over_length packing layout shuffle verify workers max_documents min_supervised_share",
    "data.sources.*": "path weight format columns subset split revision licence replay",
    "data.checks": "quarantine",
    "data.cleaning": "fix_encoding control_characters unicode",
    "data.filters": "min_characters max_characters min_completion_characters drop_echoes drop_phrases languages",
    "data.duplicates": "exact normalized near threshold text",
    "data.leakage": "policy near",
    "data.decontamination": "paths policy",
    "data.privacy": "mode preset types engine min_score regions scan_documents allow",
    "data.balance": "by target temperature shares cap max_repeats",
    "data.mixing": "over epoch",
    "data.learn": "turns roles reasoning",
    "data.card": "title description source_description licence contact intended_use languages",
    "tuning": "name layers modules embeddings bias_only norm_only targets modules_to_save from_ rank alpha dropout rslora dora "
    "init lr_ratio rank_pattern alpha_pattern experts router init_rank target_rank initial_share final_share delta_t beta1 "
    "beta2 orth_reg_weight feedforward d_initial projection_seed save_projection decompose_both decompose_factor block_size "
    "block_share neumann_terms num_factors num_virtual_tokens projection encoder_hidden_size init_text encoder "
    "encoder_layers adapter_len adapter_layers placement size activation attention type options",
    "objective": "name label_smoothing labels multi_label class_weights beta loss_type sft_weight gamma centre prefix "
    "max_target desirable_weight undesirable_weight divergence interpolation temperature",
    "objective.forgetting": "kl_weight replay_loss",
    "objective.teacher": "path revision",
    "strategy": "name activation_checkpointing memory_gib compile defer_sync bucket_mib reshard_after_forward cpu_offload "
    "replicate stage offload_optimizer offload_parameters persistence_threshold prefetch_mib",
    "optim": "name lr weight_decay max_grad_norm max_skipped_steps layer_decay ema_decay betas eps min_8bit_elements "
    "decay_exponent clip_threshold eps_scale momentum nesterov iterations bf16 scale",
    "optim.groups.*": "match lr_factor weight_decay",
    "schedule": "name warmup_steps warmup_share decay_share min_factor",
    "guards": "loss grad_norm window threshold replicas_every_steps max_rollbacks",
    "challenges.overfitting": "action",
    "challenges.forgetting": "tasks limit action max_rows",
    "challenges.output": "action",
    "challenges.divergence": "action",
    "evaluation": "every_steps at_start batch max_documents watch greater_is_better patience min_delta resamples resample_seed",
    "evaluation.generate": f"{_WRITING} samples",
    "evaluation.tasks.*": "kind format columns max_rows limit",
    "evaluation.tasks.*.write": _WRITING,
    "evaluation.server": "model parallel retries timeout_s",
    "evaluation.judge": "model parallel retries timeout_s temperature max_new_tokens max_calls max_tokens",
    # A verb that reads a run looks for checkpoints in `fallback_dir`, and writes nothing there.
    "checkpoint": "every_steps every_minutes mtbf_h keep save_final background max_failures fallback_dir",
    "export": "at_end merge dtype max_shard_gib papers verify",
    "review": "rubric n seed repeats",
    "review.write": _WRITING,
    # What is sent to a tracker is of no danger to who chose the tracker.
    "logging": "every_steps group name notes job_type tags columns energy step_parts slow_rank report reference_tflops",
    "profile": "steps",
    "launcher": "name processes nodes node_rank retry partition account qos time gpus_per_node cpus_per_task mem gres exclusive "
    "constraint exclude reservation job_name comment after dependency array_limit signal_lead_s pipeline cpu_partition "
    "preflight",
}
"""Settings that describe the run, by the group they stand in."""

_REACHES = {
    Reach.address: "evaluation.judge.url evaluation.judge.key_env evaluation.server.url evaluation.server.key_env "
    "launcher.rdzv launcher.address launcher.mail launcher.mail_user",
    Reach.code: "model.trust_remote_code objective.teacher.trust_remote_code",
    Reach.network: "model.download data.remote data.streaming",
    Reach.tracker: "logging.wandb logging.project logging.entity logging.alerts logging.artifacts logging.tables "
    "logging.tensorboard logging.trackio logging.mlflow",
    Reach.command: "launcher.hosts launcher.ssh launcher.setup launcher.python launcher.code launcher.container "
    "launcher.container_by launcher.container_mounts launcher.container_workdir launcher.part_options launcher.extra",
    Reach.place: "run.dir data.cache_dir evaluation.judge.cache_dir strategy.nvme_path launcher.stage",
    # A task of lm_eval reads a YAML, which may name functions: then its path is code.
    Reach.file: "evaluation.tasks.*.path evaluation.tasks.*.options model.chat_template export.answers "
    "challenges.forgetting.data",
}
"""Settings that reach out, by their class."""

_WHOLE_TABLES = ("batch", "budget", "precision", "gates", "substitutions")
"""Groups without a text in them that could name anything, and tables of numbers by names of the user's."""

OF_EACH_START = ("run", "launcher")
"""Groups that no verb takes from a run that it reads: each start has its own."""


def _table() -> dict[str, Reach]:
    table = dict.fromkeys(_WHOLE_TABLES, Reach.describes)
    for group, names in _DESCRIBES.items():
        table |= dict.fromkeys([f"{group}.{name}" for name in names.split()], Reach.describes)
    for reach, keys in _REACHES.items():
        table |= dict.fromkeys(keys.split(), reach)
    return table


REACH = _table()
"""The class of each setting by its full key; `*` stands for a name that the user chooses."""

NAMED_TABLES = ("data.sources", "optim.groups", "evaluation.tasks")
"""Tables whose entries have a name that the user chooses."""


def reach_of(key: str) -> Reach:
    """The class of a setting, also of one value in a table, such as `evaluation.tasks.facts.options.terms`.

    Raises KeyError for a setting that the table does not know.
    """
    parts = key.split(".")
    if ".".join(parts[:2]) in NAMED_TABLES and len(parts) > 2:
        parts[2] = "*"
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in REACH:
            return REACH[prefix]
    raise KeyError(key)
