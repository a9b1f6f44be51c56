"""Turns our ZeRO settings into DeepSpeed's dictionary: a pure function, so that each number has one owner."""

from __future__ import annotations

from typing import Any

from strategies.base import ActivationCheckpointing, Precision, ZeroConfig

MIB = 2**20
MAX_LIVE_PARAMETERS = int(1e9)
"""Limit of elements that stage 3 keeps gathered beyond those in use. Also the distance to their next use, in elements, up to
which it keeps them. Large: gathered parameters are kept until the next pass needs the room."""


def _offload_sections(config: ZeroConfig, *, on_cpu: bool) -> dict[str, Any]:
    """The sections of DeepSpeed's settings that say what lies on the host or a drive; one that offloads nothing is left out.

    {"offload_optimizer": {"device": "cpu", "pin_memory": True}}, say.
    """
    sections: dict[str, Any] = {}
    targets = {"offload_optimizer": config.offload_optimizer, "offload_param": config.offload_parameters}
    for name, target in targets.items():
        if target == "none":
            continue
        sections[name] = {"device": target, "pin_memory": not on_cpu}
        if target == "nvme":
            sections[name]["nvme_path"] = config.nvme_path
    return sections


def steps_on_device(config: ZeroConfig, precision: Precision, optimizer: Any) -> bool:
    """Whether clipping and skipping can be decided on the device, without the host (`DeviceClipping`)."""
    # torch's fused optimizers have this flag: their kernels can skip an update themselves.
    is_fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    is_stage_2_in_bf16 = config.stage == 2 and precision is Precision.bf16
    return is_fused and is_stage_2_in_bf16 and config.offload_optimizer == "none"


NO_LEAF_MODULES: dict[str, Any] = {"classes": []}
"""DeepSpeed's default gathers some blocks of experts as one, and reduces their gradients in a hook that fires too early if
nothing below them trains. Here a layer's experts are one module anyway, so that none is left ungathered."""


def deepspeed_config(
    config: ZeroConfig,
    *,
    precision: Precision,
    max_grad_norm: float,
    on_cpu: bool,
    trained_per_rank: int = 0,
    clips_on_device: bool = False,
) -> dict[str, Any]:
    """Translate the run's ZeRO settings into the dictionary for `deepspeed.initialize`.

    `max_grad_norm`: to which DeepSpeed clips gradients. `on_cpu`: whether the run is on CPUs, which want other sizes.
    `trained_per_rank`: trained elements of one rank. `clips_on_device`: DeepSpeed leaves clipping and skipping to us.

    Batch sizes are placeholders: the loop hands over micro-batches and marks the last one itself
    (`set_gradient_accumulation_boundary`), and losses arrive already divided.
    """
    # On a CPU a bucket should fit the cache: with 200 MiB stages 1 and 2 are a tenth slower.
    bucket_mib = config.bucket_mib or (8 if on_cpu else 200)
    bucket_elements = bucket_mib * MIB // 2  # DeepSpeed counts elements; two bytes each in the compute type
    zero: dict[str, Any] = {
        "stage": config.stage,
        "overlap_comm": not on_cpu,
        # Copies gradients into one buffer, against fragmentation. Host memory does not suffer from that.
        "contiguous_gradients": not on_cpu or config.offload_optimizer != "none",
        "reduce_bucket_size": bucket_elements,
        "allgather_bucket_size": bucket_elements,
        # False: each part of a bucket goes to the rank that keeps it. That is half the traffic of an all-reduce, but takes a call
        # for each owner, so it pays only if a bucket has few owners. Through host memory all ranks read the bucket anyway.
        "use_multi_rank_bucket_allreduce": on_cpu or trained_per_rank < bucket_elements // 4,
    }
    zero |= _offload_sections(config, on_cpu=on_cpu)
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
        "gradient_clipping": 0.0 if clips_on_device else max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused CPU AdamW steps offloaded state; DeepSpeed's own would need a C++ compiler.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if precision is Precision.bf16:
        # Stage 1 adds each gradient to a full fp32 sum on every rank. Without `immediate_grad_update` it keeps bf16 ones as well.
        settings["bf16"] = {"enabled": True, "check_grad_overflow": not clips_on_device, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    elif precision is Precision.fp16:
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 2000}
    return settings
