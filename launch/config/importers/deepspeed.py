"""Translates a DeepSpeed configuration: a file of its own, or a block in another trainer's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.config.importers import rules
from launch.config.importers.conversion import ConvertedSettings, scalar_settings, to_cli_text
from launch.config.importers.equivalent import ForeignSettings, TranslatedSetting, format_number, is_true, parse_number
from launch.config.importers.names import translate

SCHEDULE_BY_DEEPSPEED_TYPE = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
SETTING_BY_SCHEDULER_PARAMETER = {
    "warmup_num_steps": "schedule.warmup_steps",
    "warmup_max_lr": "optim.lr",
    "total_num_steps": "budget.steps",
    "cos_min_ratio": "schedule.min_factor",
}
"""Our settings by the parameters of DeepSpeed's schedulers."""
NVME_PATH = "strategy.nvme_path"
BLOCKS_WITH_RULES = ("zero_optimization", "bf16", "bfloat16", "fp16", "optimizer", "scheduler", "wandb", "tensorboard")
"""Blocks of the outermost level that have rules of their own."""
TOP_LEVEL_TRANSLATIONS = {
    "prescale_gradients gradient_predivide_factor communication_data_type sparse_gradients data_types": TranslatedSetting(
        note="gradients are averaged over all tokens of a step, in the precision that the strategy chooses"
    ),
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer": TranslatedSetting(
        note="docs/optimizers.md says which optimizer runs with ZeRO", not_needed=True
    ),
    "wall_clock_breakdown dump_state memory_breakdown": TranslatedSetting(
        note="logging.step_parts=true tells the parts of a step", not_needed=True
    ),
}
ZERO_TRANSLATIONS = {
    "reduce_bucket_size allgather_bucket_size": TranslatedSetting(
        note="strategy.bucket_mib sets both, in MiB instead of elements; it is chosen for the hardware otherwise"
    ),
    "stage3_prefetch_bucket_size": TranslatedSetting(note="strategy.prefetch_mib sets it, in MiB instead of elements"),
    "overlap_comm contiguous_gradients allgather_partitions reduce_scatter round_robin_gradients": TranslatedSetting(
        note="chosen for the hardware", not_needed=True
    ),
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save": TranslatedSetting(
        note="export/ always holds whole weights", not_needed=True
    ),
}
DEEPSPEED_ADAM_LR = "1e-3"
"""The learning rate of DeepSpeed's Adam and AdamW if the file gives none."""
NOT_PASSED_ON_REASON = "it is not passed on to DeepSpeed: what its engine is told is derived from strategy.*"


def translate_deepspeed_settings(
    tree: Mapping[str, Any],
    conversion: ConvertedSettings,
    outer_values: Mapping[str, str] | None = None,
    prefix: str = "",
) -> None:
    """Translate every setting of a DeepSpeed configuration (`tree`, as read from JSON) into `conversion`.

    `outer_values`: the settings, by normalised name, of the trainer whose file names this one, which override it; None if no
    other trainer names it. `prefix`: what stands before the names of settings in notes.
    """
    foreign = ForeignSettings({**scalar_settings(tree), **(outer_values or {})})
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if _is_auto(value):
            conversion.names_without_value.append(name)
        elif key in BLOCKS_WITH_RULES and isinstance(value, dict):
            _translate_block(key, value, tree, conversion, name, is_own_file=outer_values is None)
        elif key == "activation_checkpointing":
            why = "strategy.activation_checkpointing=full or selective recomputes activations"
            conversion.add_unsupported(name, value, why)
        else:
            conversion.add_translation(name, value, _translate_top_level(key, value, foreign))


def _translate_block(
    key: str,
    block: Mapping[str, Any],
    tree: Mapping[str, Any],
    conversion: ConvertedSettings,
    name: str,
    *,
    is_own_file: bool,
) -> None:
    """Translate one of `BLOCKS_WITH_RULES` into `conversion` by the rules for its `key`.

    `tree`: the whole file. `name`: the block in messages. `is_own_file`: no other trainer names the file.
    """
    if key == "zero_optimization":
        _translate_zero_block(block, conversion, name)
    elif key == "optimizer":
        _translate_optimizer_block(block, conversion, name)
    elif key == "scheduler":
        _translate_scheduler_block(block, conversion, name)
    elif key in ("wandb", "tensorboard"):
        _translate_tracker_block(key, block, conversion, name)
    else:
        _translate_precision_block(key, block, tree, conversion, name, is_own_file=is_own_file)


def _translate_top_level(key: str, value: Any, foreign: ForeignSettings) -> TranslatedSetting:
    """Our settings for a setting of the outermost level that is no block with rules of its own, or a note that there are none.

    `foreign`: all settings of the file as text, on which a rule may depend.
    """
    if key == "steps_per_print":
        return TranslatedSetting({"logging.every_steps": to_cli_text(value)})
    translation = _translation_in(TOP_LEVEL_TRANSLATIONS, key)
    if translation is None and not isinstance(value, dict) and str(key) in foreign.value_by_name:
        translation = translate(key, foreign)
    return translation or TranslatedSetting(note=NOT_PASSED_ON_REASON)


def _is_auto(value: Any) -> bool:
    """Whether a setting has no value of its own: `auto`, null or empty, which the trainer that calls DeepSpeed fills in."""
    return value is None or (isinstance(value, str) and value.lower() in ("auto", ""))


def _translation_in(table: Mapping[str, TranslatedSetting], key: str) -> TranslatedSetting | None:
    """The translation of the setting `key` in a table; None if it is not there. `table`: by names with blanks between them."""
    for names, translation in table.items():
        if key in names.split():
            return translation
    return None


def _translate_zero_block(block: Mapping[str, Any], conversion: ConvertedSettings, name: str) -> None:
    """Translate the block `zero_optimization` into `conversion`.

    The stage decides our strategy, and what the other settings mean. A stage that is none of 0 to 3 is noted as unsupported,
    and the other settings are translated as under stage 0. `name`: the block's full key in messages.
    """
    # DeepSpeed's own default is stage 0: no sharding, which is ddp here.
    stage_text = to_cli_text(block.get("stage", 0))
    is_known_stage = stage_text in ("0", "1", "2", "3")
    stage = stage_text if is_known_stage else "0"
    zero_overrides = rules.zero_overrides({**block, "stage": stage})  # such as {"strategy": "zero3", ...}
    strategy = zero_overrides["strategy"]
    if is_known_stage:
        translation = TranslatedSetting({"strategy": strategy})
    else:
        translation = TranslatedSetting(note="strategy is ddp, zero1, zero2 or zero3; type one")
    conversion.add_translation(f"{name}.stage", stage_text, translation)

    for key, value in block.items():
        full_name = f"{name}.{key}"
        if key == "stage":
            continue
        if _is_auto(value):
            conversion.names_without_value.append(full_name)
        elif key in ("offload_optimizer", "offload_param") and isinstance(value, dict):
            _translate_offload_block(key, value, zero_overrides, conversion, full_name)
        else:
            conversion.add_translation(full_name, value, _translate_zero_setting(key, value, strategy))


def _translate_zero_setting(key: str, value: Any, strategy: str) -> TranslatedSetting:
    """Our settings for one setting of `zero_optimization`. `strategy`: our name for its stage, such as `zero3`.

    Settings of stage 3 mean nothing under another stage. Those without an equivalent get a note.
    """
    text = to_cli_text(value)
    if key == "cpu_offload":  # a switch of older versions of DeepSpeed
        if not is_true(text):
            return TranslatedSetting(not_needed=True)
        return TranslatedSetting({"strategy.offload_optimizer": "cpu"} if strategy != "ddp" else {})
    if key in ("stage3_param_persistence_threshold", "param_persistence_threshold") and strategy == "zero3":
        return TranslatedSetting({"strategy.persistence_threshold": format_number(parse_number(text) or 0)})
    if key.startswith("stage3_") and strategy != "zero3":
        return TranslatedSetting(note="of stage 3 alone", not_needed=True)
    return _translation_in(ZERO_TRANSLATIONS, key) or TranslatedSetting(note=NOT_PASSED_ON_REASON)


def _translate_offload_block(
    key: str, block: Mapping[str, Any], zero_overrides: Mapping[str, str], conversion: ConvertedSettings, name: str
) -> None:
    """Translate the block `offload_optimizer` or `offload_param` (`key`), such as {"device": "cpu", "pin_memory": true}.

    `zero_overrides`: our settings for the whole of `zero_optimization`, from which the block takes its own. A device that they
    lack, such as `none`, needs no setting. `name`: the block's full key in messages.
    """
    our_key = "strategy.offload_optimizer" if key == "offload_optimizer" else "strategy.offload_parameters"
    for inner_key, value in block.items():
        full_name = f"{name}.{inner_key}"
        if inner_key == "device" and our_key in zero_overrides:
            conversion.add_translation(full_name, value, TranslatedSetting({our_key: zero_overrides[our_key]}))
        elif inner_key == "device":
            conversion.add_translation(full_name, value, TranslatedSetting(not_needed=True))
        elif inner_key == "nvme_path" and NVME_PATH in zero_overrides:
            conversion.add_translation(full_name, value, TranslatedSetting({NVME_PATH: zero_overrides[NVME_PATH]}))
        elif inner_key == "pin_memory":
            translation = TranslatedSetting(note="host memory is pinned on GPUs", not_needed=True)
            conversion.add_translation(full_name, value, translation)
        else:
            conversion.add_unsupported(full_name, value, NOT_PASSED_ON_REASON)


def _translate_precision_block(
    key: str,
    block: Mapping[str, Any],
    tree: Mapping[str, Any],
    conversion: ConvertedSettings,
    name: str,
    *,
    is_own_file: bool,
) -> None:
    """Translate a block `bf16` or `fp16` (`key`), such as {"enabled": true}, to our `precision`.

    `tree`: the whole file, which may have the other block as well. `is_own_file`: no other trainer names the file; if one does,
    that trainer's own settings decide on the precision. Settings beside `enabled` get a note. `name`: the block in messages.
    """
    precision = "fp16" if key == "fp16" else "bf16"
    is_on = is_true(to_cli_text(block.get("enabled")))
    for inner_key, value in block.items():
        full_name = f"{name}.{inner_key}"
        if _is_auto(value):
            conversion.names_without_value.append(full_name)
        elif inner_key == "enabled":
            decides = is_own_file and not _is_another_precision_on(key, tree)
            conversion.add_translation(full_name, value, _translate_enabled(value, precision, decides=decides))
        elif not is_on:
            conversion.add_translation(full_name, value, TranslatedSetting(note="it is off", not_needed=True))
        else:
            why = "the loss scale of fp16 finds itself" if precision == "fp16" else NOT_PASSED_ON_REASON
            conversion.add_translation(full_name, value, TranslatedSetting(note=why))


def _translate_enabled(value: Any, precision: str, *, decides: bool) -> TranslatedSetting:
    """Our `precision` for `enabled` of the block `fp16` or `bf16` (`precision`).

    - It is on: that precision.
    - It is off and `decides` (nothing else in the settings names a precision): fp32.
    - Otherwise nothing.
    """
    if is_true(to_cli_text(value)):
        return TranslatedSetting({"precision": precision})
    if decides:
        return TranslatedSetting({"precision": "fp32"}, "off means fp32 there; auto takes what the card has")
    return TranslatedSetting(not_needed=True)


def _is_another_precision_on(key: str, tree: Mapping[str, Any]) -> bool:
    """Whether a block of another precision than `key` is on in the file `tree`: for `fp16`, `bf16` or `bfloat16`."""
    for other_key in ("fp16", "bf16", "bfloat16"):
        block = tree.get(other_key)
        if other_key != key and isinstance(block, dict) and is_true(to_cli_text(block.get("enabled", False))):
            return True
    return False


def _params_of_block(block: Mapping[str, Any], conversion: ConvertedSettings, name: str) -> Mapping[str, Any]:
    """The `params` of a block `optimizer` or `scheduler`; empty, with a note in `conversion`, if they are no block.

    `name`: the full key of the block in messages.
    """
    parameters = block.get("params")
    if isinstance(parameters, dict):
        return parameters
    if _is_auto(parameters):
        conversion.names_without_value.append(f"{name}.params")
    else:
        conversion.add_unsupported(f"{name}.params", parameters, "holds no settings")
    return {}


def _translate_optimizer_block(block: Mapping[str, Any], conversion: ConvertedSettings, name: str) -> None:
    """Translate the block `optimizer` of a DeepSpeed configuration to `optim` and `optim.*`, and add that to `conversion`.

    `block`: such as {"type": "AdamW", "params": {"lr": 1e-4}}. An Adam without a learning rate gets DeepSpeed's default rate.
    `name`: the block's full key in messages.
    """
    optimizer_type = block.get("type")
    parameters = _params_of_block(block, conversion, name)
    if optimizer_type is not None:
        translation = rules.translate_optimizer_name(to_cli_text(optimizer_type))
        conversion.add_translation(f"{name}.type", optimizer_type, translation)
    for key, value in parameters.items():
        full_name = f"{name}.params.{key}"
        is_switch_on = key in ("torch_adam", "adam_w_mode", "bias_correction") and is_true(to_cli_text(value))
        if _is_auto(value):
            conversion.names_without_value.append(full_name)
        elif key in ("lr", "betas", "eps", "weight_decay", "momentum"):
            conversion.add_translation(full_name, value, TranslatedSetting({f"optim.{key}": to_cli_text(value)}))
        elif is_switch_on:
            note = "weight decay is decoupled from the gradients, whatever the library behind it"
            conversion.add_translation(full_name, value, TranslatedSetting(note=note, not_needed=True))
        else:
            conversion.add_translation(full_name, value, TranslatedSetting(note=NOT_PASSED_ON_REASON))
    is_adam = "adam" in to_cli_text(optimizer_type).lower()
    if is_adam and "lr" not in parameters and block.get("params") != "auto":
        translation = TranslatedSetting({"optim.lr": DEEPSPEED_ADAM_LR})
        conversion.add_translation(f"{name}.params.lr", f"{DEEPSPEED_ADAM_LR} (what DeepSpeed does)", translation)
    for key in block.keys() - {"type", "params"}:
        conversion.add_unsupported(f"{name}.{key}", block[key], NOT_PASSED_ON_REASON)


def _translate_scheduler_block(block: Mapping[str, Any], conversion: ConvertedSettings, name: str) -> None:
    """Translate the block `scheduler` of a DeepSpeed configuration to `schedule`, and add that to `conversion`.

    `block`: such as {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}. Parameters that are `auto` have no value of their
    own. `name`: the block's full key in messages.
    """
    scheduler_type = to_cli_text(block.get("type"))
    parameters = _params_of_block(block, conversion, name)
    if scheduler_type not in SCHEDULE_BY_DEEPSPEED_TYPE:
        conversion.add_unsupported(f"{name}.type", scheduler_type, "schedule is one of cosine, linear, constant, wsd")
    else:
        # DeepSpeed's warmup is logarithmic unless it is told otherwise, but never that of WarmupCosineLR.
        is_logarithmic = scheduler_type != "WarmupCosineLR" and parameters.get("warmup_type", "log") == "log"
        note = "the rate rises linearly here, and there by the logarithm of the step" if is_logarithmic else ""
        conversion.add_translation(
            f"{name}.type",
            scheduler_type,
            TranslatedSetting({"schedule": SCHEDULE_BY_DEEPSPEED_TYPE[scheduler_type]}, note),
        )
    for key, value in parameters.items():
        full_name = f"{name}.params.{key}"
        starts_near_zero = key == "warmup_min_lr" and not parse_number(to_cli_text(value))
        if _is_auto(value):
            conversion.names_without_value.append(full_name)
        elif key in SETTING_BY_SCHEDULER_PARAMETER:
            conversion.add_translation(
                full_name, value, TranslatedSetting({SETTING_BY_SCHEDULER_PARAMETER[key]: to_cli_text(value)})
            )
        elif starts_near_zero or key == "warmup_type":
            note = "the rate rises linearly from near 0"
            conversion.add_translation(full_name, value, TranslatedSetting(note=note, not_needed=True))
        else:
            why = "the schedule has no such setting; docs/config.md lists schedule.*"
            conversion.add_unsupported(full_name, value, why)


def _translate_tracker_block(key: str, block: Mapping[str, Any], conversion: ConvertedSettings, name: str) -> None:
    """Translate a block `wandb` or `tensorboard` (`key`) of DeepSpeed's settings to settings of `logging`.

    `block`: such as {"enabled": true, "project": "x"}. `name`: the block's full key in the imported file, for messages.
    """
    is_on = is_true(to_cli_text(block.get("enabled")))
    for inner_key, value in block.items():
        full_name = f"{name}.{inner_key}"
        if inner_key == "enabled" and is_on:
            overrides = {"logging.wandb": "online"} if key == "wandb" else {"logging.tensorboard": "true"}
            conversion.add_translation(full_name, value, TranslatedSetting(overrides))
        elif inner_key == "enabled":
            conversion.add_translation(full_name, value, TranslatedSetting(not_needed=True))
        elif key == "wandb" and is_on and inner_key in ("project", "group"):
            conversion.add_translation(
                full_name, value, TranslatedSetting({f"logging.{inner_key}": to_cli_text(value)})
            )
        elif key == "wandb" and is_on and inner_key == "team":
            conversion.add_translation(full_name, value, TranslatedSetting({"logging.entity": to_cli_text(value)}))
        else:
            note = "logs are in the run directory" if is_on else "it is off"
            conversion.add_translation(full_name, value, TranslatedSetting(note=note, not_needed=True))
