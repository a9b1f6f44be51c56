"""Translates a DeepSpeed configuration: a file of its own, or a block in another trainer's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.config.importers import rules
from launch.config.importers.conversion import Converted, as_typed, typed_values
from launch.config.importers.equivalent import ForeignSettings, TranslatedSetting, format_number, is_true, parse_number
from launch.config.importers.names import translate

SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
TOP_LEVEL = {
    "prescale_gradients gradient_predivide_factor communication_data_type sparse_gradients data_types": TranslatedSetting(
        note="gradients are averaged over all tokens of a step, in the precision that the strategy chooses"
    ),
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer": TranslatedSetting(
        note="docs/optimizers.md says which optimizer runs with ZeRO", needless=True
    ),
    "wall_clock_breakdown dump_state memory_breakdown": TranslatedSetting(
        note="logging.step_parts=true tells the parts of a step", needless=True
    ),
}
ZERO_SETTINGS = {
    "reduce_bucket_size allgather_bucket_size": TranslatedSetting(
        note="strategy.bucket_mib sets both, in MiB instead of elements; it is chosen for the hardware otherwise"
    ),
    "stage3_prefetch_bucket_size": TranslatedSetting(note="strategy.prefetch_mib sets it, in MiB instead of elements"),
    "overlap_comm contiguous_gradients allgather_partitions reduce_scatter round_robin_gradients": TranslatedSetting(
        note="chosen for the hardware", needless=True
    ),
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save": TranslatedSetting(
        note="export/ always holds whole weights", needless=True
    ),
}
NOT_PASSED_ON = "it is not passed on to DeepSpeed: what its engine is told is derived from strategy.*"


def convert(
    tree: Mapping[str, Any], conversion: Converted, outer: Mapping[str, str] | None = None, prefix: str = ""
) -> None:
    """File every setting of `tree`; `outer` are those of the trainer that named the file, which go before it."""
    foreign = ForeignSettings({**typed_values(tree), **(outer or {})})
    for key, value in tree.items():
        name, block = f"{prefix}{key}", value if isinstance(value, dict) else None
        if _is_auto(value):
            conversion.empty.append(name)
        elif key == "zero_optimization" and block is not None:
            _add_zero(block, conversion, name)
        elif key in ("bf16", "bfloat16", "fp16") and block is not None:
            _add_precision(key, block, tree, conversion, name, alone=outer is None)
        elif key == "optimizer" and block is not None:
            _add_optimizer(block, conversion, name)
        elif key == "scheduler" and block is not None:
            _add_scheduler(block, conversion, name)
        elif key in ("wandb", "tensorboard") and block is not None:
            _add_tracker(key, block, conversion, name)
        elif key == "steps_per_print":
            conversion.add(name, value, TranslatedSetting({"logging.every_steps": as_typed(value)}))
        elif (translation := _answer_in(TOP_LEVEL, key)) is not None:
            conversion.add(name, value, translation)
        elif key == "activation_checkpointing":
            conversion.add_no_equal(
                name, value, "strategy.activation_checkpointing=full or selective recomputes activations"
            )
        else:
            translation_by_name = (
                None if block is not None else translate(key, foreign) if str(key) in foreign.by_name else None
            )
            conversion.add(name, value, translation_by_name or TranslatedSetting(note=NOT_PASSED_ON))


def _is_auto(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.lower() in ("auto", ""))


def _answer_in(table: Mapping[str, TranslatedSetting], key: str) -> TranslatedSetting | None:
    return next((translation for names, translation in table.items() if key in names.split()), None)


def _add_zero(block: Mapping[str, Any], conversion: Converted, name: str) -> None:
    stage_text = as_typed(block.get("stage", 0))
    is_known_stage = stage_text in ("0", "1", "2", "3")
    words = rules.zero_words({**block, "stage": stage_text if is_known_stage else "0"})
    strategy = words["strategy"]
    translation = (
        TranslatedSetting({"strategy": strategy})
        if is_known_stage
        else TranslatedSetting(note="strategy is ddp, zero1, zero2 or zero3; type one")
    )
    conversion.add(f"{name}.stage", stage_text, translation)
    for key, value in block.items():
        full_name = f"{name}.{key}"
        if key == "stage":
            continue
        if _is_auto(value):
            conversion.empty.append(full_name)
        elif key in ("offload_optimizer", "offload_param") and isinstance(value, dict):
            _add_offload(key, value, words, conversion, full_name)
        elif key == "cpu_offload":
            offload_words = {"strategy.offload_optimizer": "cpu"} if strategy != "ddp" else {}
            conversion.add(
                full_name,
                value,
                TranslatedSetting(offload_words) if is_true(as_typed(value)) else TranslatedSetting(needless=True),
            )
        elif key in ("stage3_param_persistence_threshold", "param_persistence_threshold") and strategy == "zero3":
            conversion.add(
                full_name,
                value,
                TranslatedSetting(
                    {"strategy.persistence_threshold": format_number(parse_number(as_typed(value)) or 0)}
                ),
            )
        elif key.startswith("stage3_") and strategy != "zero3":
            conversion.add(full_name, value, TranslatedSetting(note="of stage 3 alone", needless=True))
        else:
            conversion.add(full_name, value, _answer_in(ZERO_SETTINGS, key) or TranslatedSetting(note=NOT_PASSED_ON))


def _add_offload(
    key: str, block: Mapping[str, Any], words: Mapping[str, str], conversion: Converted, name: str
) -> None:
    our_key = "strategy.offload_optimizer" if key == "offload_optimizer" else "strategy.offload_parameters"
    used_words = {
        key_of_ours: words[key_of_ours] for key_of_ours in (our_key, "strategy.nvme_path") if key_of_ours in words
    }
    for inner, value in block.items():
        if inner == "device":
            conversion.add(
                f"{name}.device",
                value,
                TranslatedSetting({our_key: words[our_key]}) if our_key in words else TranslatedSetting(needless=True),
            )
        elif inner == "nvme_path" and "strategy.nvme_path" in used_words:
            conversion.add(
                f"{name}.nvme_path", value, TranslatedSetting({"strategy.nvme_path": used_words["strategy.nvme_path"]})
            )
        elif inner == "pin_memory":
            conversion.add(
                f"{name}.pin_memory", value, TranslatedSetting(note="host memory is pinned on GPUs", needless=True)
            )
        else:
            conversion.add_no_equal(f"{name}.{inner}", value, NOT_PASSED_ON)


def _add_precision(
    key: str, block: Mapping[str, Any], tree: Mapping[str, Any], conversion: Converted, name: str, *, alone: bool
) -> None:
    kind = "fp16" if key == "fp16" else "bf16"
    for inner, value in block.items():
        if _is_auto(value):
            conversion.empty.append(f"{name}.{inner}")
        elif inner != "enabled":
            is_on = is_true(as_typed(block.get("enabled")))
            why = "the loss scale of fp16 finds itself" if kind == "fp16" else NOT_PASSED_ON
            conversion.add(
                f"{name}.{inner}",
                value,
                TranslatedSetting(note=why) if is_on else TranslatedSetting(note="it is off", needless=True),
            )
        elif is_true(as_typed(value)):
            conversion.add(f"{name}.enabled", value, TranslatedSetting({"precision": kind}))
        else:
            other_blocks = [tree.get(other_key) for other_key in ("fp16", "bf16", "bfloat16") if other_key != key]
            is_said_elsewhere = any(
                isinstance(other_key, dict) and not _is_off(other_key.get("enabled", False))
                for other_key in other_blocks
            )
            off_translation = TranslatedSetting(
                {"precision": "fp32"}, "off means fp32 there; auto takes what the card has"
            )
            conversion.add(
                f"{name}.enabled",
                value,
                off_translation if alone and not is_said_elsewhere else TranslatedSetting(needless=True),
            )


def _is_off(value: Any) -> bool:
    return not is_true(as_typed(value))


def _parameters(block: Mapping[str, Any], conversion: Converted, name: str) -> Mapping[str, Any]:
    parameters = block.get("params")
    if isinstance(parameters, dict):
        return parameters
    if _is_auto(parameters):
        conversion.empty.append(f"{name}.params")
    else:
        conversion.add_no_equal(f"{name}.params", parameters, "holds no settings")
    return {}


def _add_optimizer(block: Mapping[str, Any], conversion: Converted, name: str) -> None:
    kind, parameters = block.get("type"), _parameters(block, conversion, name)
    if kind is not None:
        conversion.add(f"{name}.type", kind, rules.CHOICES["optim"](as_typed(kind), ForeignSettings({})))
    for key, value in parameters.items():
        if _is_auto(value):
            conversion.empty.append(f"{name}.params.{key}")
        elif key in ("lr", "betas", "eps", "weight_decay", "momentum"):
            conversion.add(f"{name}.params.{key}", value, TranslatedSetting({f"optim.{key}": as_typed(value)}))
        else:
            why = "weight decay is decoupled from the gradients, whatever the library behind it"
            torch_only = key in ("torch_adam", "adam_w_mode", "bias_correction") and is_true(as_typed(value))
            conversion.add(
                f"{name}.params.{key}",
                value,
                TranslatedSetting(note=why if torch_only else NOT_PASSED_ON, needless=torch_only),
            )
    for key in block.keys() - {"type", "params"}:
        conversion.add_no_equal(f"{name}.{key}", block[key], NOT_PASSED_ON)


def _add_scheduler(block: Mapping[str, Any], conversion: Converted, name: str) -> None:
    kind, parameters = as_typed(block.get("type")), _parameters(block, conversion, name)
    if kind not in SCHEDULES:
        conversion.add_no_equal(f"{name}.type", kind, "schedule is one of cosine, linear, constant, wsd")
    else:
        logarithmic = kind != "WarmupCosineLR" and parameters.get("warmup_type", "log") == "log"
        remark = "the rate rises linearly here, and there by the logarithm of the step" if logarithmic else ""
        conversion.add(f"{name}.type", kind, TranslatedSetting({"schedule": SCHEDULES[kind]}, remark))
    our_keys = {
        "warmup_num_steps": "schedule.warmup_steps",
        "warmup_max_lr": "optim.lr",
        "total_num_steps": "budget.steps",
        "cos_min_ratio": "schedule.min_factor",
    }
    for key, value in parameters.items():
        if _is_auto(value):
            conversion.empty.append(f"{name}.params.{key}")
        elif key in our_keys:
            conversion.add(f"{name}.params.{key}", value, TranslatedSetting({our_keys[key]: as_typed(value)}))
        elif (key == "warmup_min_lr" and not parse_number(as_typed(value))) or key == "warmup_type":
            conversion.add(
                f"{name}.params.{key}",
                value,
                TranslatedSetting(note="the rate rises linearly from near 0", needless=True),
            )
        else:
            conversion.add_no_equal(
                f"{name}.params.{key}", value, "the schedule has no such setting; docs/config.md lists schedule.*"
            )


def _add_tracker(key: str, block: Mapping[str, Any], conversion: Converted, name: str) -> None:
    is_on = is_true(as_typed(block.get("enabled")))
    for inner, value in block.items():
        if inner == "enabled":
            switch_words = {"logging.wandb": "online"} if key == "wandb" else {"logging.tensorboard": "true"}
            conversion.add(
                f"{name}.enabled", value, TranslatedSetting(switch_words) if is_on else TranslatedSetting(needless=True)
            )
        elif key == "wandb" and is_on and inner in ("project", "group"):
            conversion.add(f"{name}.{inner}", value, TranslatedSetting({f"logging.{inner}": as_typed(value)}))
        elif key == "wandb" and is_on and inner == "team":
            conversion.add(f"{name}.team", value, TranslatedSetting({"logging.entity": as_typed(value)}))
        else:
            why = "logs are in the run directory" if is_on else "it is off"
            conversion.add(f"{name}.{inner}", value, TranslatedSetting(note=why, needless=True))
