"""Translates a whole settings file of another trainer. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.config.importers import datasets, deepspeed, rules
from launch.config.importers.conversion import ConvertedSettings, scalar_settings, to_cli_text
from launch.config.importers.equivalent import OtherTrainerSettings, TranslatedSetting, format_number, parse_number
from launch.config.importers.names import RULE_BY_NORMALISED_NAME, normalised_name, translate_by_rule
from strategies import atomic_io
from strategies.errors import ConfigError

MAX_SETTINGS_FILE_BYTES = 2**20
"""Bytes of a file of settings: hundreds of times what people write."""
AXOLOTL = "axolotl"
LLAMA_FACTORY = "LLaMA-Factory"
DEEPSPEED = "DeepSpeed"
ACCELERATE = "accelerate"
HUGGING_FACE = "Hugging Face's Trainer and TRL"
TELLING_SETTINGS_BY_TRAINER = {
    DEEPSPEED: (
        "zero_optimization",
        "train_micro_batch_size_per_gpu",
        "train_batch_size",
        "bf16.enabled",
        "fp16.enabled",
        "optimizer.type",
    ),
    ACCELERATE: ("distributed_type", "compute_environment"),
    AXOLOTL: ("base_model", "sequence_len", "datasets", "micro_batch_size"),
    LLAMA_FACTORY: ("finetuning_type", "stage", "template", "cutoff_len", "dataset_dir"),
}
"""Settings by which the trainer of a file is known: the first trainer of which the file has one, because trainers share names."""
COMMON_DEFAULTS = {"learning_rate": "5e-5", "lr_scheduler_type": "linear", "num_train_epochs": "3", "warmup_steps": "0"}
DEFAULTS_BY_TRAINER = {
    AXOLOTL: {"sequence_len": "512", "num_epochs": "1", "micro_batch_size": "1", "lr_scheduler": "cosine"},
    LLAMA_FACTORY: {
        **COMMON_DEFAULTS,
        "finetuning_type": "lora",
        "cutoff_len": "2048",
        "per_device_train_batch_size": "8",
    },
    HUGGING_FACE: {**COMMON_DEFAULTS, "per_device_train_batch_size": "8"},
}
"""Defaults of the other trainers that differ from ours: what they do if their file says nothing."""
SETTINGS_BY_TRL_LEARNING_RATE = {
    "2e-5": ("dataset_text_field", "completion_only_loss", "assistant_only_loss", "packing"),
    "1e-6": (
        *(
            "num_generations",
            "max_completion_length",
            "precompute_ref_log_probs",
            "desirable_weight",
            "undesirable_weight",
        ),
    ),
    "1e-4": ("center_rewards_coefficient",),
}
"""TRL's own default of `learning_rate`, by settings of which its file has one: of SFT; of GRPO, DPO and KTO; of rewards."""
OVERRIDING_SETTINGS = {
    "warmup_steps": ("warmup_ratio",),
    "num_train_epochs": ("max_steps", "epochs"),
    "num_epochs": ("max_steps",),
    "lr_scheduler": ("lr_scheduler_type",),
}
"""By setting: other settings of the same trainer that take effect instead, so that its default does not."""
GROUP_DECIDING_SETTINGS = (
    "pref_loss",
    "stage",
    "finetuning_type",
    "adapter",
    "use_peft",
    "load_in_4bit",
    "deepspeed",
    "fsdp",
)
"""Settings that decide on a whole group of ours. They are translated before the settings within such a group."""
FSDP_SETTINGS_NOT_NEEDED = {
    *(
        "transformer_layer_cls_to_wrap",
        "auto_wrap_policy",
        "state_dict_type",
        "final_state_dict_type",
        "use_orig_params",
    ),
    *("sync_module_states", "cpu_ram_efficient_loading", "version", "backward_prefetch", "backward_prefetch_policy"),
    *("limit_all_gathers", "forward_prefetch"),
}
"""How FSDP is told of the model's blocks, and how it loads and saves: shardtune does that without a setting."""
PROCESS_STARTING_SETTINGS = {
    *(
        "compute_environment",
        "distributed_type",
        "rdzv_backend",
        "same_network",
        "main_training_function",
        "downcast_bf16",
    ),
    *("tpu_env", "tpu_use_cluster", "tpu_use_sudo", "enable_cpu_affinity"),
}
"""How accelerate starts processes."""
ZERO_KEY_BY_ACCELERATE_KEY = {
    "zero_stage": "stage",
    "offload_optimizer_device": "offload_optimizer",
    "offload_param_device": "offload_param",
}
"""accelerate's names of ZeRO settings, with DeepSpeed's in the block `zero_optimization`."""
UNKNOWN_SETTING_REASON = "no setting of this name is known here; docs/config.md lists all there are"
NO_EQUIVALENT_OF_BLOCK_REASON = "a block of settings has no equal as a whole"


def convert_settings_file(path: Path, num_ranks: int | None = None) -> ConvertedSettings:
    """Translate the settings file of another trainer at `path`, such as axolotl's `config.yml`, into our settings.

    `num_ranks` turns batch sizes per device into a global one; None if it is not known. Raises ConfigError if the file cannot be
    read, or belongs to none of the trainers that are known here.
    """
    tree = read_settings_tree(path)
    trainer = detect_trainer(tree)
    if trainer is None:
        raise ConfigError(
            f"from={path}: no setting in it is one of axolotl, LLaMA-Factory, Hugging Face's Trainer, TRL or DeepSpeed; "
            "a file of ours is given by its name alone: shardtune train my.yaml"
        )
    conversion = ConvertedSettings(trainer)
    if trainer == DEEPSPEED:
        deepspeed.translate_deepspeed_settings(tree, conversion)
    else:
        _translate_settings(tree, conversion, path.parent, num_ranks)
    return conversion


def read_settings_tree(path: Path) -> dict[str, Any]:
    """The settings of a YAML or JSON file (`.json`) as nested dictionaries.

    Raises ConfigError if it cannot be read, is no such file, holds no settings, or has YAML aliases.
    """
    import yaml

    try:
        content = atomic_io.read_bytes(path.expanduser(), max_bytes=MAX_SETTINGS_FILE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = atomic_io.error_summary(error) if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"from={path}: cannot be read ({reason})") from error
    is_json = path.suffix == ".json"
    try:
        if is_json:
            tree = json.loads(content)
        else:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, yaml.SafeLoader)):
                # A few lines of aliases can stand for a tree without an end.
                raise ConfigError(
                    f"from={path}: has YAML aliases (*name), which are not followed; write the values out"
                )
            tree = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        file_format = "JSON" if is_json else "YAML"
        raise ConfigError(f"from={path}: is no {file_format} ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"from={path}: holds no settings; give a file of `name: value`")
    return tree


def detect_trainer(tree: Mapping[str, Any]) -> str | None:
    """The trainer that a settings file (`tree`) was written for, by the names of the settings in it.

    - The first trainer in `TELLING_SETTINGS_BY_TRAINER` (DeepSpeed before axolotl) of whose settings the file has one.
    - Otherwise Hugging Face's Trainer, if any setting has a rule for its translation.
    - Otherwise None.
    """
    setting_names = {str(key) for key in tree}
    for key, value in tree.items():
        if isinstance(value, dict):
            setting_names |= {f"{key}.{name}" for name in value}  # such as `zero_optimization.stage`
    for trainer, telling_settings in TELLING_SETTINGS_BY_TRAINER.items():
        if setting_names & set(telling_settings):
            return trainer
    has_known_name = any(normalised_name(str(key)) in RULE_BY_NORMALISED_NAME for key in tree)
    return HUGGING_FACE if has_known_name else None


def _translate_settings(
    tree: Mapping[str, Any], conversion: ConvertedSettings, file_dir: Path, num_ranks: int | None = None
) -> None:
    """Translate every setting of a trainer other than DeepSpeed into `conversion`, then its defaults that differ from ours.

    `tree`: the settings of the file, as read from YAML. `file_dir`: the directory of the file, from which relative paths start.
    `num_ranks`: the number of ranks of the run, None if it is not known.
    """
    # Such as {"lr": "1e-4"}.
    written_values = {normalised_name(key): value for key, value in scalar_settings(tree).items()}
    defaults = _defaults_in_effect(conversion.trainer, written_values)
    other_trainer = OtherTrainerSettings({**defaults, **written_values}, num_ranks)
    if conversion.trainer == AXOLOTL and "adapter" not in written_values:
        conversion.add_translation("adapter", "(none)", TranslatedSetting({"tuning": "full"}))
    # In this order, because the first of two contradicting settings stays.
    for key in sorted(tree, key=_translation_order):
        _add_setting(str(key), tree, other_trainer, conversion, file_dir)
    # The defaults last, so that they do not go before what the file says.
    for key, value in defaults.items():
        translation = translate_by_rule(key, other_trainer) or TranslatedSetting(not_needed=True)
        conversion.add_translation(key, f"{value} (what {conversion.trainer} does)", translation)
    if conversion.trainer == LLAMA_FACTORY and conversion.overrides.get("tuning") == "lora":
        _add_llama_factory_lora_defaults(other_trainer, conversion, has_alpha="lora_alpha" in written_values)


def _add_llama_factory_lora_defaults(
    other_trainer: OtherTrainerSettings, conversion: ConvertedSettings, *, has_alpha: bool
) -> None:
    """Add LLaMA-Factory's LoRA defaults, which differ from shardtune's, to `conversion`: rank 8, and an alpha of twice the rank.

    `has_alpha`: the file sets an alpha.
    """
    rank = parse_number(other_trainer.get("lora_rank")) or 8
    rank_text = format_number(rank)
    conversion.add_translation("lora_rank", rank_text, TranslatedSetting({"tuning.rank": rank_text}))
    if not has_alpha:
        translation = TranslatedSetting({"tuning.alpha": format_number(2 * rank)})
        conversion.add_translation("lora_alpha", "twice the rank (what LLaMA-Factory does)", translation)


def _translation_order(key: str) -> int:
    """Where a setting stands in the order of translation: those of `GROUP_DECIDING_SETTINGS` in their order, then all others."""
    return GROUP_DECIDING_SETTINGS.index(key) if key in GROUP_DECIDING_SETTINGS else len(GROUP_DECIDING_SETTINGS)


def _defaults_in_effect(trainer: str, written_values: Mapping[str, str]) -> dict[str, str]:
    """The defaults of a trainer, as text by name, that nothing in its file overrides: {"num_epochs": "1"}.

    `written_values`: the settings of the file, as text by normalised name (lower case, `_` for `-`). Empty for a trainer
    without known defaults, such as accelerate.
    """
    defaults = {}
    for key, value in DEFAULTS_BY_TRAINER.get(trainer, {}).items():
        overriding_names = (key, *OVERRIDING_SETTINGS.get(key, ()))
        if not any(name in written_values for name in overriding_names):
            defaults[key] = value
    if trainer == HUGGING_FACE and "learning_rate" in defaults:
        # The rate depends on the kind of training, which settings of its own give away.
        for rate, names in SETTINGS_BY_TRL_LEARNING_RATE.items():
            if any(name in written_values for name in names):
                defaults["learning_rate"] = rate
                break
    return defaults


def _add_setting(
    key: str,
    tree: Mapping[str, Any],
    other_trainer: OtherTrainerSettings,
    conversion: ConvertedSettings,
    file_dir: Path,
) -> None:
    """Translate the setting `key` of the outermost level of a file (`tree`) into `conversion`.

    Settings for data sets, DeepSpeed and FSDP are read by functions of their own, the others by a rule each. `other_trainer`: all
    settings of the file as text, on which a rule may depend. `file_dir`: the directory of the file.
    """
    value = tree[key]
    name = normalised_name(key)
    if value is None or value in ("", [], {}):
        conversion.names_without_value.append(key)
    elif name in ("datasets", "test_datasets"):
        datasets.translate_axolotl_datasets(value, name, conversion, file_dir)
    elif name in ("dataset", "eval_dataset") and conversion.trainer == LLAMA_FACTORY:
        dataset_names = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        dataset_directory = str(tree.get("dataset_dir", "data"))
        datasets.translate_llama_factory_datasets(dataset_names, name, dataset_directory, conversion, file_dir)
    elif name == "deepspeed":
        _add_deepspeed_settings(value, other_trainer, conversion, file_dir)
    elif name in ("fsdp", "fsdp_config"):
        _add_fsdp(key, tree, other_trainer, conversion)
    elif name == "deepspeed_config" and isinstance(value, dict):
        _add_accelerate_deepspeed(value, other_trainer, conversion, file_dir)
    else:
        conversion.add_translation(key, value, _translate_setting(name, value, other_trainer, file_dir))


def _translate_setting(name: str, value: Any, other_trainer: OtherTrainerSettings, file_dir: Path) -> TranslatedSetting:
    """The settings of shardtune for one setting of another trainer's file, or a note that says why there are none.

    `name`: its normalised name. `other_trainer`: all settings of the file as text, on which a rule may depend. `file_dir`: the
    directory of the file, where relative paths start. Most settings have a rule in `RULE_BY_NORMALISED_NAME`.
    """
    # Cases that a rule cannot decide, because it knows neither the file's directory nor the type of the value in the file.
    if name == "dataset_dir":
        return TranslatedSetting(note="files are named whole in data.path", not_needed=True)
    if name in ("dataset", "dataset_name", "dataset_path"):
        return TranslatedSetting({"data.path": datasets.shardtune_data_path(to_cli_text(value), file_dir)})
    if name == "gradient_checkpointing" and value in ("unsloth", "offload"):
        return TranslatedSetting(
            note="activations are recomputed, and never kept in host memory: strategy.activation_checkpointing=full"
        )
    if name in PROCESS_STARTING_SETTINGS:
        return TranslatedSetting(note="processes are started by launcher.*", not_needed=True)
    if name not in RULE_BY_NORMALISED_NAME:
        return TranslatedSetting(note=UNKNOWN_SETTING_REASON)
    if not isinstance(value, dict):
        return translate_by_rule(name, other_trainer) or TranslatedSetting(note=UNKNOWN_SETTING_REASON)
    return _translate_block_by_rule(name, value, other_trainer)


def _translate_block_by_rule(
    name: str, block: dict[str, Any], other_trainer: OtherTrainerSettings
) -> TranslatedSetting:
    """The note on a block of settings whose name has a rule, such as `warmup_steps: {a: 1}`: a translation to no setting.

    The rule may say why there is no equivalent, or that none is needed. Settings that it gives are left out, since a rule reads
    one value and not a block.
    """
    translation = translate_by_rule(
        name, OtherTrainerSettings({**other_trainer.value_by_name, name: to_cli_text(block)})
    )
    if translation is None:
        return TranslatedSetting(note=NO_EQUIVALENT_OF_BLOCK_REASON)
    return TranslatedSetting(note=translation.note or NO_EQUIVALENT_OF_BLOCK_REASON, not_needed=translation.not_needed)


def _add_deepspeed_settings(
    value: Any, other_trainer: OtherTrainerSettings, conversion: ConvertedSettings, file_dir: Path
) -> None:
    """Translate the setting `deepspeed` of another trainer into `conversion`, by what its value is:

    - a block of DeepSpeed's settings: each of them;
    - the path of a file of such settings: each setting in the file;
    - a file that is not here: the ZeRO stage, if the file's name says it.

    `other_trainer`: that trainer's settings as text; they override those of DeepSpeed. `file_dir`: the directory of its file.
    """
    if isinstance(value, dict):
        deepspeed.translate_deepspeed_settings(
            value, conversion, outer_values=other_trainer.value_by_name, prefix="deepspeed."
        )
        return
    candidates = (Path(str(value)).expanduser(), file_dir / str(value))
    # `exists` first, because `is_file` alone raises for text that can be no path.
    existing_files = [path for path in candidates if datasets.exists(path) and path.is_file()]
    if not existing_files:
        conversion.add_translation("deepspeed", value, rules.deepspeed_stage(to_cli_text(value), other_trainer))
        return
    deepspeed_file = existing_files[0]
    conversion.add_translation(
        "deepspeed", value, TranslatedSetting(note="its settings are turned one by one", not_needed=True)
    )
    deepspeed.translate_deepspeed_settings(
        read_settings_tree(deepspeed_file),
        conversion,
        outer_values=other_trainer.value_by_name,
        prefix=f"{deepspeed_file.name}: ",
    )


def _add_accelerate_deepspeed(
    block: dict[str, Any], other_trainer: OtherTrainerSettings, conversion: ConvertedSettings, file_dir: Path
) -> None:
    """Translate accelerate's block `deepspeed_config` into `conversion`: {"zero_stage": 3, "offload_optimizer_device": "cpu"}.

    It may name a file of DeepSpeed's settings. Its other settings are of `zero_optimization`, or have a rule because other
    trainers have them too; those without a rule are noted as unsupported. `other_trainer`: all settings of the file as text.
    """
    for key, value in block.items():
        setting_name = f"deepspeed_config.{key}"
        if key == "deepspeed_config_file":
            _add_deepspeed_settings(value, other_trainer, conversion, file_dir)
        elif key in ZERO_KEY_BY_ACCELERATE_KEY:
            overrides = _overrides_of_accelerate_zero_setting(key, value, block)
            conversion.add_translation(setting_name, value, TranslatedSetting(overrides, not_needed=not overrides))
        elif normalised_name(key) in RULE_BY_NORMALISED_NAME:
            settings = OtherTrainerSettings({**other_trainer.value_by_name, normalised_name(key): to_cli_text(value)})
            translation = translate_by_rule(key, settings) or TranslatedSetting(note=UNKNOWN_SETTING_REASON)
            conversion.add_translation(setting_name, value, translation)
        else:
            conversion.add_unsupported(setting_name, value, deepspeed.NOT_PASSED_ON_REASON)


def _overrides_of_accelerate_zero_setting(key: str, value: Any, block: Mapping[str, Any]) -> dict[str, str]:
    """The settings of shardtune for one ZeRO setting of accelerate's `block`: `zero_stage`, 3 -> {"strategy": "zero3"}.

    The setting is translated as a DeepSpeed file that has it alone, beside the stage on which its meaning depends.
    """
    default_stage = 2  # accelerate's own
    zero_block: dict[str, Any] = {"stage": block.get("zero_stage", default_stage)}
    if key != "zero_stage":
        zero_block[ZERO_KEY_BY_ACCELERATE_KEY[key]] = {"device": to_cli_text(value)}
    zero_conversion = ConvertedSettings(ACCELERATE)
    deepspeed.translate_deepspeed_settings({"zero_optimization": zero_block}, zero_conversion)
    return zero_conversion.overrides


def _add_fsdp(
    key: str, tree: Mapping[str, Any], other_trainer: OtherTrainerSettings, conversion: ConvertedSettings
) -> None:
    """Translate `fsdp` or `fsdp_config` (`key`) of the file `tree` of Hugging Face's Trainer or of accelerate into `conversion`.

    Called once for each of the two that the file has. The strategy follows from both together and is added once: with `fsdp` if
    that is set, otherwise with `fsdp_config`. The settings within `fsdp_config` are translated or noted one by one.
    """
    has_fsdp = tree.get("fsdp") not in (None, "", [])
    block = tree.get("fsdp_config")
    if not isinstance(block, dict):
        block = {}
    if key == "fsdp" or not has_fsdp:
        conversion.add_translation(key, tree[key], rules.fsdp_strategy(_fsdp_option_text(tree, block), other_trainer))
    if key == "fsdp_config":
        _add_fsdp_block(block, conversion)


def _add_fsdp_block(block: Mapping[str, Any], conversion: ConvertedSettings) -> None:
    """Translate the settings within the block `fsdp_config`, or note each as not needed or unsupported, in `conversion`."""
    for name, value in block.items():
        setting_name = f"fsdp_config.{name}"
        bare_name = name.removeprefix("fsdp_")
        if bare_name in FSDP_SETTINGS_NOT_NEEDED:
            note = "the repeated blocks of the model are sharded, and export/ is written, without it"
            translation = TranslatedSetting(note=note, not_needed=True)
        elif bare_name in ("sharding_strategy", "offload_params", "reshard_after_forward"):
            translation = TranslatedSetting(note="read together with fsdp", not_needed=True)
        elif bare_name == "activation_checkpointing" and value is True:
            translation = TranslatedSetting({"strategy.activation_checkpointing": "full"})
        else:
            conversion.add_unsupported(setting_name, value, UNKNOWN_SETTING_REASON)
            continue
        conversion.add_translation(setting_name, value, translation)


def _fsdp_option_text(tree: Mapping[str, Any], block: Mapping[str, Any]) -> str:
    """The options that `fsdp` and the block `fsdp_config` ask for together, in the form of `fsdp`: `full_shard,offload`."""
    has_fsdp = tree.get("fsdp") not in (None, "", [])
    options = [to_cli_text(tree["fsdp"]).strip("[]") if has_fsdp else "full_shard"]
    # Each setting of the block has two spellings, with and without `fsdp_`, by the version of the other trainer.
    sharding = str(block.get("fsdp_sharding_strategy", block.get("sharding_strategy", "")))
    if sharding:
        options.append(sharding.lower())
    offload_params = block.get("fsdp_offload_params", block.get("offload_params", False))
    if offload_params is True:
        options.append("offload")
    reshard_after_forward = block.get("fsdp_reshard_after_forward", block.get("reshard_after_forward", True))
    if reshard_after_forward is False:
        options.append("shard_grad_op")
    return ",".join(options)
