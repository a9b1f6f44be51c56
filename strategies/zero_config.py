"""Typed ZeRO settings to DeepSpeed's own dictionary: a pure function, so that each number has one owner."""

from __future__ import annotations

from typing import Any

from strategies.base import ActivationCheckpointing, Precision, ZeroConfig

MIB = 2**20
MAX_LIVE_PARAMETERS = int(1e9)
"""Parameters that stage 3 keeps gathered at most beside those in use, and over how many to the next use it keeps them."""


def _offload(target: str, nvme_path: str | None) -> dict[str, Any] | None:
    if target == "none":
        return None
    section: dict[str, Any] = {"device": target, "pin_memory": True}
    if target == "nvme":
        section["nvme_path"] = nvme_path
    return section


def _offloads(config: ZeroConfig, *, on_cpu: bool) -> dict[str, Any]:
    sections = {
        "offload_optimizer": _offload(config.offload_optimizer, config.nvme_path),
        "offload_param": _offload(config.offload_parameters, config.nvme_path),
    }
    used_sections = {key: section for key, section in sections.items() if section is not None}
    return {key: {**section, "pin_memory": not on_cpu} for key, section in used_sections.items()}


def steps_on_device(config: ZeroConfig, precision: Precision, optimizer: Any) -> bool:
    """Whether clipping and skipping can be decided without the host (`DeviceClipping`)."""
    fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    return fused and config.stage == 2 and precision is Precision.bf16 and config.offload_optimizer == "none"


NO_LEAF_MODULES: dict[str, Any] = {"classes": []}
"""By default some blocks of experts are gathered whole, and reduced by a hook that fires before there are gradients where
nothing below them trains. A layer's experts are one module here: none is left ungathered."""


def deepspeed_config(
    config: ZeroConfig,
    *,
    precision: Precision,
    max_grad_norm: float,
    on_cpu: bool,
    trained_per_rank: int = 0,
    on_device: bool = False,
) -> dict[str, Any]:
    """The dictionary given to `deepspeed.initialize`; `trained_per_rank` is the number of trained elements of one rank.

    `on_device`: DeepSpeed leaves clipping and skipping to us.

    Batch sizes are placeholders: the loop hands over micro-batches and marks the last one itself
    (`set_gradient_accumulation_boundary`), and losses arrive already divided.
    """
    # On a CPU a bucket should fit the cache: with 200 MiB stages 1 and 2 are a tenth slower.
    bucket_mib = config.bucket_mib or (8 if on_cpu else 200)
    numel = bucket_mib * MIB // 2  # DeepSpeed counts elements; two bytes each in the compute type
    zero: dict[str, Any] = {
        "stage": config.stage,
        "overlap_comm": not on_cpu,
        # Copies gradients into one buffer against fragments, which host memory does not suffer from.
        "contiguous_gradients": not on_cpu or config.offload_optimizer != "none",
        "reduce_bucket_size": numel,
        "allgather_bucket_size": numel,
        # Each part of a bucket to the rank that keeps it is half of an all-reduce's traffic, in as many calls as a bucket has
        # owners: where those are few. Through host memory all ranks read the same bucket anyway.
        "use_multi_rank_bucket_allreduce": on_cpu or trained_per_rank < numel // 4,
    }
    zero |= _offloads(config, on_cpu=on_cpu)
    if config.stage == 3:
        zero["stage3_param_persistence_threshold"] = config.persistence_threshold
        zero["stage3_prefetch_bucket_size"] = config.prefetch_mib * MIB // 2
        zero["stage3_max_live_parameters"] = MAX_LIVE_PARAMETERS
        zero["stage3_max_reuse_distance"] = MAX_LIVE_PARAMETERS
        # DeepSpeed's own linear function adds biases in place, into results that selective checkpointing keeps: they
        # would be added again with every recomputation. What it saves is small beside that of checkpointing.
        zero["memory_efficient_linear"] = config.activation_checkpointing is not ActivationCheckpointing.selective
        zero["stage3_gather_16bit_weights_on_model_save"] = False
        zero["leaf_module"] = NO_LEAF_MODULES
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if on_device else max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused CPU AdamW steps offloaded state; DeepSpeed's own would need a C++ compiler.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if precision is Precision.bf16:
        # Stage 1 adds each gradient to an fp32 sum, whole on every rank, and would keep those in bf16 beside it.
        settings["bf16"] = {"enabled": True, "check_grad_overflow": not on_device, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    elif precision is Precision.fp16:
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 2000}
    return settings
