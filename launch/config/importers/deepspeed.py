"""Translates a DeepSpeed configuration: a file of its own, or a block in another trainer's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.config.importers import rules
from launch.config.importers.conversion import ConvertedSettings, scalar_settings, to_cli_text
from launch.config.importers.equivalent import (
    OtherTrainerSettings,
    TranslatedSetting,
    format_number,
    is_true,
    parse_number,
)
from launch.config.importers.names import translate_by_rule

SCHEDULE_BY_DEEPSPEED_TYPE = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
SETTING_BY_SCHEDULER_PARAMETER = {
    "warmup_num_steps": "schedule.warmup_steps",
    "warmup_max_lr": "optim.lr",
    "total_num_steps": "budget.steps",
    "cos_min_ratio": "schedule.min_factor",
}
"""Our settings by the parameters of DeepSpeed's schedulers."""
OPTIMIZER_PARAMETERS_OF_SAME_NAME = ("lr", "betas", "eps", "weight_decay", "momentum")
"""Parameters of DeepSpeed's optimizers that `optim` has under the same name."""
ADAM_SWITCHES_THAT_ARE_ON_HERE = ("torch_adam", "adam_w_mode", "bias_correction")
LOGGING_KEY_BY_WANDB_KEY = {"project": "logging.project", "group": "logging.group", "team": "logging.entity"}
"""Our settings by those of DeepSpeed's block `wandb`."""
NVME_PATH_KEY = "strategy.nvme_path"
BLOCKS_WITH_OWN_RULES = (
    "zero_optimization",
    "bf16",
    "bfloat16",
    "fp16",
    "optimizer",
    "scheduler",
    "wandb",
    "tensorboard",
)
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
    deepspeed_settings = OtherTrainerSettings({**scalar_settings(tree), **(outer_values or {})})
    is_used_alone = outer_values is None
    for key, value in tree.items():
        full_name = f"{prefix}{key}"
        if _is_auto(value):
            conversion.names_without_value.append(full_name)
        elif key in BLOCKS_WITH_OWN_RULES and isinstance(value, dict):
            _translate_block(key, value, tree, conversion, full_name, is_used_alone=is_used_alone)
        elif key == "activation_checkpointing":
            why = "strategy.activation_checkpointing=full or selective recomputes activations"
            conversion.add_unsupported(full_name, value, why)
        else:
            conversion.add_translation(full_name, value, _translate_top_level(key, value, deepspeed_settings))


def _translate_block(
    key: str,
    block: Mapping[str, Any],
    tree: Mapping[str, Any],
    conversion: ConvertedSettings,
    block_name: str,
    *,
    is_used_alone: bool,
) -> None:
    """Translate one of `BLOCKS_WITH_OWN_RULES` into `conversion` by the rules for its `key`.

    `tree`: the whole file. `block_name`: the block in messages. `is_used_alone`: no other trainer's file names this one.
    """
    if key == "zero_optimization":
        _translate_zero_block(block, conversion, block_name)
    elif key == "optimizer":
        _translate_optimizer_block(block, conversion, block_name)
    elif key == "scheduler":
        _translate_scheduler_block(block, conversion, block_name)
    elif key in ("wandb", "tensorboard"):
        _translate_tracker_block(key, block, conversion, block_name)
    else:
        _translate_precision_block(key, block, tree, conversion, block_name, is_used_alone=is_used_alone)


def _translate_top_level(key: str, value: Any, deepspeed_settings: OtherTrainerSettings) -> TranslatedSetting:
    """The settings of shardtune for a DeepSpeed setting of the outermost level without a block, or a note that there are none.

    `deepspeed_settings`: all settings of the file as text, on which a rule may depend.
    """
    if key == "steps_per_print":
        return TranslatedSetting({"logging.every_steps": to_cli_text(value)})
    translation = _translation_in_table(TOP_LEVEL_TRANSLATIONS, key)
    # A rule reads one value as text, so a block, or a key that is no text, has none.
    if translation is None and not isinstance(value, dict) and str(key) in deepspeed_settings.value_by_name:
        translation = translate_by_rule(key, deepspeed_settings)
    return translation or TranslatedSetting(note=NOT_PASSED_ON_REASON)


def _is_auto(value: Any) -> bool:
    """Whether a setting has no value of its own: `auto`, null or empty, which the trainer that calls DeepSpeed fills in."""
    return value is None or (isinstance(value, str) and value.lower() in ("auto", ""))


def _translation_in_table(table: Mapping[str, TranslatedSetting], key: str) -> TranslatedSetting | None:
    """The translation of the setting `key` in a table; None if it is not there. `table`: by names with blanks between them."""
    for names, translation in table.items():
        if key in names.split():
            return translation
    return None


def _translate_zero_block(block: Mapping[str, Any], conversion: ConvertedSettings, block_name: str) -> None:
    """Translate DeepSpeed's block `zero_optimization`, such as {"stage": 3, "overlap_comm": true}, into `conversion`.

    The stage decides shardtune's strategy, and what the other settings mean. A stage that is none of 0 to 3 is noted as
    unsupported, and the other settings are translated as under stage 0. `block_name`: the block's full key in messages.
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
    conversion.add_translation(f"{block_name}.stage", stage_text, translation)

    for key, value in block.items():
        full_name = f"{block_name}.{key}"
        if key == "stage":
            continue
        if _is_auto(value):
            conversion.names_without_value.append(full_name)
        elif key in ("offload_optimizer", "offload_param") and isinstance(value, dict):
            _translate_offload_block(key, value, zero_overrides, conversion, full_name)
        else:
            conversion.add_translation(full_name, value, _translate_zero_setting(key, value, strategy))


def _translate_zero_setting(key: str, value: Any, strategy: str) -> TranslatedSetting:
    """The settings of shardtune for one setting of `zero_optimization`: `cpu_offload`, True, `zero2` -> offload_optimizer=cpu.

    `strategy`: shardtune's name for the stage, such as `zero3`. Settings of stage 3 mean nothing under another stage. Those
    without an equivalent get a note.
    """
    text = to_cli_text(value)
    if key == "cpu_offload":  # a switch of older versions of DeepSpeed
        if not is_true(text):
            return TranslatedSetting(not_needed=True)
        # Stage 0 (ddp) shards no optimizer states, and so offloads none.
        return TranslatedSetting({"strategy.offload_optimizer": "cpu"} if strategy != "ddp" else {})
    if key in ("stage3_param_persistence_threshold", "param_persistence_threshold") and strategy == "zero3":
        return TranslatedSetting({"strategy.persistence_threshold": format_number(parse_number(text) or 0)})
    if key.startswith("stage3_") and strategy != "zero3":
        return TranslatedSetting(note="of stage 3 alone", not_needed=True)
    return _translation_in_table(ZERO_TRANSLATIONS, key) or TranslatedSetting(note=NOT_PASSED_ON_REASON)


def _translate_offload_block(
    key: str,
    block: Mapping[str, Any],
    zero_overrides: Mapping[str, str],
    conversion: ConvertedSettings,
    block_name: str,
) -> None:
    """Translate DeepSpeed's block `offload_optimizer` or `offload_param` (`key`): {"device": "cpu", "pin_memory": true}.

    `zero_overrides`: shardtune's settings for the whole of `zero_optimization`, such as {"strategy.offload_optimizer": "cpu"}, of
    which this block gets its own. A device that they lack, such as `none`, needs no setting; other settings become notes.
    `block_name`: the block's full key in messages.
    """
    device_key = "strategy.offload_optimizer" if key == "offload_optimizer" else "strategy.offload_parameters"
    for inner_key, value in block.items():
        if inner_key == "device" and device_key in zero_overrides:
            translation = TranslatedSetting({device_key: zero_overrides[device_key]})
        elif inner_key == "device":
            translation = TranslatedSetting(not_needed=True)
        elif inner_key == "nvme_path" and NVME_PATH_KEY in zero_overrides:
            translation = TranslatedSetting({NVME_PATH_KEY: zero_overrides[NVME_PATH_KEY]})
        elif inner_key == "pin_memory":
            translation = TranslatedSetting(note="host memory is pinned on GPUs", not_needed=True)
        else:
            translation = TranslatedSetting(note=NOT_PASSED_ON_REASON)
        conversion.add_translation(f"{block_name}.{inner_key}", value, translation)


def _translate_precision_block(
    key: str,
    block: Mapping[str, Any],
    tree: Mapping[str, Any],
    conversion: ConvertedSettings,
    block_name: str,
    *,
    is_used_alone: bool,
) -> None:
    """Translate DeepSpeed's block `bf16` or `fp16` (`key`), such as {"enabled": true}, to shardtune's `precision`.

    `tree`: the whole file, which may have the other block as well. `is_used_alone`: no other trainer's file names this one; if
    one does, that trainer's own settings decide on the precision. Settings beside `enabled` get a note. `block_name`: the block
    in messages.
    """
    precision = "fp16" if key == "fp16" else "bf16"
    is_on = is_true(to_cli_text(block.get("enabled")))
    for inner_key, value in block.items():
        full_name = f"{block_name}.{inner_key}"
        if _is_auto(value):
            conversion.names_without_value.append(full_name)
        elif inner_key == "enabled":
            off_means_fp32 = is_used_alone and not _is_another_precision_on(key, tree)
            translation = _translate_precision_switch(value, precision, off_means_fp32=off_means_fp32)
            conversion.add_translation(full_name, value, translation)
        elif not is_on:
            conversion.add_translation(full_name, value, TranslatedSetting(note="it is off", not_needed=True))
        else:
            why = "the loss scale of fp16 finds itself" if precision == "fp16" else NOT_PASSED_ON_REASON
            conversion.add_translation(full_name, value, TranslatedSetting(note=why))


def _translate_precision_switch(value: Any, precision: str, *, off_means_fp32: bool) -> TranslatedSetting:
    """Shardtune's `precision` for `enabled` (`value`) of DeepSpeed's block `fp16` or `bf16` (`precision`).

    - It is on: that precision.
    - It is off and nothing else in the settings names a precision (`off_means_fp32`): fp32.
    - Otherwise no setting is needed, since another setting decides.
    """
    if is_true(to_cli_text(value)):
        return TranslatedSetting({"precision": precision})
    if off_means_fp32:
        return TranslatedSetting({"precision": "fp32"}, "off means fp32 there; auto takes what the card has")
    return TranslatedSetting(not_needed=True)


def _is_another_precision_on(key: str, tree: Mapping[str, Any]) -> bool:
    """Whether a block of another precision than `key` is on in the file `tree`: for `fp16`, `bf16` or `bfloat16`."""
    for other_key in ("fp16", "bf16", "bfloat16"):
        block = tree.get(other_key)
        if other_key != key and isinstance(block, dict) and is_true(to_cli_text(block.get("enabled", False))):
            return True
    return False


def _parameters_of_block(block: Mapping[str, Any], conversion: ConvertedSettings, block_name: str) -> Mapping[str, Any]:
    """The `params` of a block `optimizer` or `scheduler`; empty, with a note in `conversion`, if they are no block.

    `block_name`: the full key of the block in messages.
    """
    parameters = block.get("params")
    if isinstance(parameters, dict):
        return parameters
    if _is_auto(parameters):
        conversion.names_without_value.append(f"{block_name}.params")
    else:
        conversion.add_unsupported(f"{block_name}.params", parameters, "holds no settings")
    return {}


def _translate_optimizer_block(block: Mapping[str, Any], conversion: ConvertedSettings, block_name: str) -> None:
    """Translate the block `optimizer` of a DeepSpeed configuration to `optim` and `optim.*`, and add that to `conversion`.

    `block`: such as {"type": "AdamW", "params": {"lr": 1e-4}}. An Adam without a learning rate gets DeepSpeed's default rate.
    `block_name`: the block's full key in messages.
    """
    optimizer_type = block.get("type")
    parameters = _parameters_of_block(block, conversion, block_name)
    if optimizer_type is not None:
        translation = rules.translate_optimizer_name(to_cli_text(optimizer_type))
        conversion.add_translation(f"{block_name}.type", optimizer_type, translation)
    for key, value in parameters.items():
        full_name = f"{block_name}.params.{key}"
        is_on_as_here = key in ADAM_SWITCHES_THAT_ARE_ON_HERE and is_true(to_cli_text(value))
        if _is_auto(value):
            conversion.names_without_value.append(full_name)
            continue
        if key in OPTIMIZER_PARAMETERS_OF_SAME_NAME:
            translation = TranslatedSetting({f"optim.{key}": to_cli_text(value)})
        elif is_on_as_here:
            note = "weight decay is decoupled from the gradients, whatever the library behind it"
            translation = TranslatedSetting(note=note, not_needed=True)
        else:
            translation = TranslatedSetting(note=NOT_PASSED_ON_REASON)
        conversion.add_translation(full_name, value, translation)
    is_adam = "adam" in to_cli_text(optimizer_type).lower()
    if is_adam and "lr" not in parameters and block.get("params") != "auto":
        translation = TranslatedSetting({"optim.lr": DEEPSPEED_ADAM_LR})
        conversion.add_translation(f"{block_name}.params.lr", f"{DEEPSPEED_ADAM_LR} (what DeepSpeed does)", translation)
    for key in block.keys() - {"type", "params"}:
        conversion.add_unsupported(f"{block_name}.{key}", block[key], NOT_PASSED_ON_REASON)


def _translate_scheduler_block(block: Mapping[str, Any], conversion: ConvertedSettings, block_name: str) -> None:
    """Translate the block `scheduler` of a DeepSpeed configuration to `schedule`, and add that to `conversion`.

    `block`: such as {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}. Parameters that are `auto` have no value of their
    own. `block_name`: the block's full key in messages.
    """
    scheduler_type = to_cli_text(block.get("type"))
    parameters = _parameters_of_block(block, conversion, block_name)
    conversion.add_translation(
        f"{block_name}.type", scheduler_type, _translate_scheduler_type(scheduler_type, parameters)
    )
    for key, value in parameters.items():
        full_name = f"{block_name}.params.{key}"
        starts_near_zero = key == "warmup_min_lr" and not parse_number(to_cli_text(value))
        if _is_auto(value):
            conversion.names_without_value.append(full_name)
            continue
        if key in SETTING_BY_SCHEDULER_PARAMETER:
            translation = TranslatedSetting({SETTING_BY_SCHEDULER_PARAMETER[key]: to_cli_text(value)})
        elif starts_near_zero or key == "warmup_type":
            translation = TranslatedSetting(note="the rate rises linearly from near 0", not_needed=True)
        else:
            translation = TranslatedSetting(note="the schedule has no such setting; docs/config.md lists schedule.*")
        conversion.add_translation(full_name, value, translation)


def _translate_scheduler_type(scheduler_type: str, parameters: Mapping[str, Any]) -> TranslatedSetting:
    """Shardtune's `schedule` for DeepSpeed's type of scheduler, such as `WarmupLR`; a note alone if it has none.

    `parameters`: those of the scheduler, which say how the rate rises at the start.
    """
    if scheduler_type not in SCHEDULE_BY_DEEPSPEED_TYPE:
        return TranslatedSetting(note="schedule is one of cosine, linear, constant, wsd")
    # DeepSpeed's warmup is logarithmic unless it is told otherwise, but never that of WarmupCosineLR.
    is_logarithmic = scheduler_type != "WarmupCosineLR" and parameters.get("warmup_type", "log") == "log"
    note = "the rate rises linearly here, and there by the logarithm of the step" if is_logarithmic else ""
    return TranslatedSetting({"schedule": SCHEDULE_BY_DEEPSPEED_TYPE[scheduler_type]}, note)


def _translate_tracker_block(
    key: str, block: Mapping[str, Any], conversion: ConvertedSettings, block_name: str
) -> None:
    """Translate a block `wandb` or `tensorboard` (`key`) of DeepSpeed's settings to settings of `logging`.

    `block`: such as {"enabled": true, "project": "x"}. `block_name`: the block's full key in the imported file, for messages.
    """
    is_on = is_true(to_cli_text(block.get("enabled")))
    for inner_key, value in block.items():
        if inner_key == "enabled" and is_on:
            overrides = {"logging.wandb": "online"} if key == "wandb" else {"logging.tensorboard": "true"}
            translation = TranslatedSetting(overrides)
        elif inner_key == "enabled":
            translation = TranslatedSetting(not_needed=True)
        elif key == "wandb" and is_on and inner_key in LOGGING_KEY_BY_WANDB_KEY:
            translation = TranslatedSetting({LOGGING_KEY_BY_WANDB_KEY[inner_key]: to_cli_text(value)})
        else:
            note = "logs are in the run directory" if is_on else "it is off"
            translation = TranslatedSetting(note=note, not_needed=True)
        conversion.add_translation(f"{block_name}.{inner_key}", value, translation)
