"""Translates a DeepSpeed configuration: a file of its own, or a block in another trainer's file."""

from collections.abc import Iterator, Mapping
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
    deepspeed_config: Mapping[str, Any],
    conversion: ConvertedSettings,
    outer_values: Mapping[str, str] | None = None,
    prefix: str = "",
) -> None:
    """Translate every setting of a DeepSpeed configuration into `conversion`, as settings of shardtune or notes.

    `deepspeed_config`: the configuration, as read from JSON: {"zero_optimization": {"stage": 3}, "train_batch_size": 64}.
    `outer_values`: the settings, as text by normalised name, of the trainer whose file names this configuration; they override
        it.
    None if the file stands alone.
    `prefix`: what stands before the names of settings in notes, such as `ds.json: `.
    """
    deepspeed_settings = OtherTrainerSettings({**scalar_settings(deepspeed_config), **(outer_values or {})})
    is_used_alone = outer_values is None
    for key, value in deepspeed_config.items():
        full_name = f"{prefix}{key}"
        # `auto`: the trainer that calls DeepSpeed fills the value in, and its own setting is translated.
        if _is_auto(value):
            conversion.names_without_value.append(full_name)
        elif key in BLOCKS_WITH_OWN_RULES and isinstance(value, dict):
            _translate_block(key, value, deepspeed_config, conversion, full_name, is_used_alone=is_used_alone)
        elif key == "activation_checkpointing":
            why = "strategy.activation_checkpointing=full or selective recomputes activations"
            conversion.add_unsupported(full_name, value, why)
        else:
            conversion.add_translation(full_name, value, _translate_top_level(key, value, deepspeed_settings))


def _translate_block(
    key: str,
    block: Mapping[str, Any],
    deepspeed_config: Mapping[str, Any],
    conversion: ConvertedSettings,
    block_name: str,
    *,
    is_used_alone: bool,
) -> None:
    """Translate one block of a DeepSpeed configuration that has rules of its own, such as `optimizer`, into `conversion`.

    `key`: one of `BLOCKS_WITH_OWN_RULES`.
    `deepspeed_config`: the whole configuration, since `fp16` and `bf16` are read together.
    `block_name`: the block in messages, such as `ds.json: optimizer`.
    `is_used_alone`: no other trainer's file names this configuration, so nothing else decides on the precision.
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
        # A block that is off says nothing if the block of another precision is on, or another trainer's setting decides.
        off_means_fp32 = is_used_alone and not _is_another_precision_on(key, deepspeed_config)
        _translate_precision_block(key, block, conversion, block_name, off_means_fp32=off_means_fp32)


def _translate_top_level(key: str, value: Any, deepspeed_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Translate a setting of a DeepSpeed file that stands in no block: `steps_per_print` -> `logging.every_steps`.

    `value`: as read from JSON.
    `deepspeed_settings`: all single values of the file as text, on which a rule may depend.
    A setting without an equivalent gets a note.
    """
    if key == "steps_per_print":
        return TranslatedSetting({"logging.every_steps": to_cli_text(value)})
    # The table is first: it has the settings that mean something in DeepSpeed alone. The rest are names that other trainers
    # share.
    translation = _translation_in_table(TOP_LEVEL_TRANSLATIONS, key)
    # A rule reads one value as text, so a block, or a key that is no text, has none.
    if translation is None and not isinstance(value, dict) and str(key) in deepspeed_settings.value_by_name:
        translation = translate_by_rule(key, deepspeed_settings)
    return translation or TranslatedSetting(note=NOT_PASSED_ON_REASON)


def _is_auto(value: Any) -> bool:
    """Whether a setting has no value of its own: `auto`, null or empty, which the trainer that calls DeepSpeed fills in."""
    return value is None or (isinstance(value, str) and value.lower() in ("auto", ""))


def _settings_with_value(
    block: Mapping[str, Any], block_name: str, conversion: ConvertedSettings
) -> Iterator[tuple[str, str, Any]]:
    """The settings of a block that have a value of their own, as (key, full name in messages, value).

    Those that are `auto` or empty are noted in `conversion` as names without a value. `block_name`: such as `ds.json: optimizer`.
    """
    for key, value in block.items():
        full_name = f"{block_name}.{key}"
        if _is_auto(value):
            conversion.names_without_value.append(full_name)
        else:
            yield key, full_name, value


def _translation_in_table(table: Mapping[str, TranslatedSetting], key: str) -> TranslatedSetting | None:
    """The translation of the setting `key` in a table; None if it is not there. `table`: by names with blanks between them."""
    for names, translation in table.items():
        if key in names.split():
            return translation
    return None


def _translate_zero_block(block: Mapping[str, Any], conversion: ConvertedSettings, block_name: str) -> None:
    """Translate DeepSpeed's block `zero_optimization`, such as {"stage": 3, "overlap_comm": true}, into `conversion`.

    The stage decides shardtune's strategy (0: ddp, 3: zero3), and what the other settings mean. A stage that is none of 0 to 3 is
    noted as unsupported, and the other settings are translated as under stage 0.
    `block_name`: the block in messages.
    """
    # DeepSpeed's own default is stage 0: no sharding, which is ddp here.
    stage_text = to_cli_text(block.get("stage", 0))
    is_known_stage = stage_text in ("0", "1", "2", "3")
    stage = stage_text if is_known_stage else "0"
    # Offloading depends on both the stage and the device, so all settings are derived together and handed out one by one below.
    zero_overrides = rules.zero_overrides({**block, "stage": stage})  # such as {"strategy": "zero3", ...}
    strategy = zero_overrides["strategy"]
    if is_known_stage:
        translation = TranslatedSetting({"strategy": strategy})
    else:
        translation = TranslatedSetting(note="strategy is ddp, zero1, zero2 or zero3; type one")
    conversion.add_translation(f"{block_name}.stage", stage_text, translation)

    settings_beside_stage = {key: value for key, value in block.items() if key != "stage"}
    for key, full_name, value in _settings_with_value(settings_beside_stage, block_name, conversion):
        if key in ("offload_optimizer", "offload_param") and isinstance(value, dict):
            _translate_offload_block(key, value, zero_overrides, conversion, full_name)
        else:
            conversion.add_translation(full_name, value, _translate_zero_setting(key, value, strategy))


def _translate_zero_setting(key: str, value: Any, strategy: str) -> TranslatedSetting:
    """Translate one setting of DeepSpeed's block `zero_optimization`: `cpu_offload`, True, `zero2` -> offload_optimizer=cpu.

    `strategy`: shardtune's name for the ZeRO stage: `ddp` (stage 0), `zero1`, `zero2` or `zero3`.
    Settings of stage 3 mean nothing under another stage. A setting without an equivalent gets a note.
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
    """Translate DeepSpeed's block `offload_optimizer` or `offload_param`, such as {"device": "cpu", "pin_memory": true}.

    `key`: which of the two, and `block_name`: its name in messages.
    `zero_overrides`: shardtune's settings for the whole of `zero_optimization`, such as {"strategy.offload_optimizer": "cpu"}, of
        which this block's settings get their share. They are without a device that does not offload, such as `none`, which then
        needs no setting.

    Other settings become notes in `conversion`.
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
    conversion: ConvertedSettings,
    block_name: str,
    *,
    off_means_fp32: bool,
) -> None:
    """Translate DeepSpeed's block `bf16` or `fp16`, such as {"enabled": true}, to shardtune's `precision`, in `conversion`.

    `key`: `bf16`, `bfloat16` or `fp16`.
    `block_name`: the block in messages.
    `off_means_fp32`: if the block is off, nothing else in the settings names a precision.
    Settings beside `enabled`, such as the loss scale, have no equivalent and get a note.
    """
    precision = "fp16" if key == "fp16" else "bf16"
    is_on = is_true(to_cli_text(block.get("enabled")))
    for inner_key, full_name, value in _settings_with_value(block, block_name, conversion):
        if inner_key == "enabled":
            translation = _translate_precision_switch(value, precision, off_means_fp32=off_means_fp32)
            conversion.add_translation(full_name, value, translation)
        elif not is_on:
            conversion.add_translation(full_name, value, TranslatedSetting(note="it is off", not_needed=True))
        else:
            why = "the loss scale of fp16 finds itself" if precision == "fp16" else NOT_PASSED_ON_REASON
            conversion.add_translation(full_name, value, TranslatedSetting(note=why))


def _translate_precision_switch(value: Any, precision: str, *, off_means_fp32: bool) -> TranslatedSetting:
    """Shardtune's `precision` for the setting `enabled` of DeepSpeed's block `fp16` or `bf16`.

    - It is on: that precision.
    - It is off and nothing else in the settings names a precision (`off_means_fp32`): fp32.
    - Otherwise no setting is needed, since another setting decides.
    """
    if is_true(to_cli_text(value)):
        return TranslatedSetting({"precision": precision})
    if off_means_fp32:
        return TranslatedSetting({"precision": "fp32"}, "off means fp32 there; auto takes what the card has")
    return TranslatedSetting(not_needed=True)


def _is_another_precision_on(key: str, deepspeed_config: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed file turns on another precision than that of its block `key`: for `fp16`, `bf16` or `bfloat16`."""
    for other_key in ("fp16", "bf16", "bfloat16"):
        block = deepspeed_config.get(other_key)
        if other_key != key and isinstance(block, dict) and is_true(to_cli_text(block.get("enabled", False))):
            return True
    return False


def _parameters_of_block(block: Mapping[str, Any], conversion: ConvertedSettings, block_name: str) -> Mapping[str, Any]:
    """The `params` of DeepSpeed's block `optimizer` or `scheduler`, such as {"lr": 1e-4}.

    Empty if they are `auto`, missing or no block, which is noted in `conversion`. `block_name`: the block in messages.
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
    """Translate DeepSpeed's block `optimizer` into shardtune's `optim` and `optim.*`, in `conversion`.

    `block`: such as {"type": "AdamW", "params": {"lr": 1e-4}}.
    `block_name`: the block in messages.
    An Adam without a learning rate gets DeepSpeed's default rate, which differs from shardtune's.
    """
    optimizer_type = block.get("type")
    parameters = _parameters_of_block(block, conversion, block_name)
    if optimizer_type is not None:
        translation = rules.translate_optimizer_name(to_cli_text(optimizer_type))
        conversion.add_translation(f"{block_name}.type", optimizer_type, translation)
    for key, full_name, value in _settings_with_value(parameters, f"{block_name}.params", conversion):
        # Switched off, these would be another optimizer, which has no equivalent.
        is_on_as_here = key in ADAM_SWITCHES_THAT_ARE_ON_HERE and is_true(to_cli_text(value))
        if key in OPTIMIZER_PARAMETERS_OF_SAME_NAME:
            translation = TranslatedSetting({f"optim.{key}": to_cli_text(value)})
        elif is_on_as_here:
            note = "weight decay is decoupled from the gradients, whatever the library behind it"
            translation = TranslatedSetting(note=note, not_needed=True)
        else:
            translation = TranslatedSetting(note=NOT_PASSED_ON_REASON)
        conversion.add_translation(full_name, value, translation)
    # With `params: auto` the trainer that calls DeepSpeed gives the rate.
    is_adam = "adam" in to_cli_text(optimizer_type).lower()
    if is_adam and "lr" not in parameters and block.get("params") != "auto":
        translation = TranslatedSetting({"optim.lr": DEEPSPEED_ADAM_LR})
        conversion.add_translation(f"{block_name}.params.lr", f"{DEEPSPEED_ADAM_LR} (what DeepSpeed does)", translation)
    for key in block.keys() - {"type", "params"}:
        conversion.add_unsupported(f"{block_name}.{key}", block[key], NOT_PASSED_ON_REASON)


def _translate_scheduler_block(block: Mapping[str, Any], conversion: ConvertedSettings, block_name: str) -> None:
    """Translate DeepSpeed's block `scheduler` into shardtune's `schedule`, `optim.lr` and `budget.steps`, in `conversion`.

    `block`: such as {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}. `block_name`: the block in messages.
    """
    scheduler_type = to_cli_text(block.get("type"))
    parameters = _parameters_of_block(block, conversion, block_name)
    conversion.add_translation(
        f"{block_name}.type", scheduler_type, _translate_scheduler_type(scheduler_type, parameters)
    )
    for key, full_name, value in _settings_with_value(parameters, f"{block_name}.params", conversion):
        # Also true for text that is no number.
        starts_near_zero = key == "warmup_min_lr" and not parse_number(to_cli_text(value))
        if key in SETTING_BY_SCHEDULER_PARAMETER:
            translation = TranslatedSetting({SETTING_BY_SCHEDULER_PARAMETER[key]: to_cli_text(value)})
        elif starts_near_zero or key == "warmup_type":
            translation = TranslatedSetting(note="the rate rises linearly from near 0", not_needed=True)
        else:
            translation = TranslatedSetting(note="the schedule has no such setting; docs/config.md lists schedule.*")
        conversion.add_translation(full_name, value, translation)


def _translate_scheduler_type(scheduler_type: str, parameters: Mapping[str, Any]) -> TranslatedSetting:
    """Shardtune's `schedule` for DeepSpeed's type of scheduler: `WarmupLR` is `constant`; a note alone for an unknown type.

    `parameters`: those of the scheduler. If they ask for a logarithmic warmup, a note says that shardtune's is linear.
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
    """Translate DeepSpeed's block `wandb` or `tensorboard` into settings of `logging`, in `conversion`.

    `key`: which of the two.
    `block`: such as {"enabled": true, "project": "x"}.
    `block_name`: the block in messages.
    The settings of a tracker that is off need no equivalent.
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
