"""Translates a whole settings file of another trainer. Needs no torch."""

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
    """Translate the settings file of another trainer at `path`, such as axolotl's `config.yml`, for `shardtune init from=FILE`.

    The trainer is recognised by the names in the file. `num_ranks`: ranks (processes) of the run that is planned, with which a
    batch size per device becomes a global one; None if not known.

    Returns shardtune's settings as text by key, such as {"optim.lr": "1e-4"}, and notes on every setting that did not become one.
    Raises ConfigError if the file cannot be read, or was written for no trainer that is known here.
    """
    file_settings = read_settings_tree(path)
    trainer = detect_trainer(file_settings)
    if trainer is None:
        raise ConfigError(
            f"from={path}: no setting in it is one of axolotl, LLaMA-Factory, Hugging Face's Trainer, TRL or DeepSpeed; "
            "a file of ours is given by its name alone: shardtune train my.yaml"
        )
    conversion = ConvertedSettings(trainer)
    # A file of DeepSpeed alone has nested blocks with rules of their own, and no defaults that would have to be added.
    if trainer == DEEPSPEED:
        deepspeed.translate_deepspeed_settings(file_settings, conversion)
    else:
        _translate_settings(file_settings, conversion, path.parent, num_ranks)
    return conversion


def read_settings_tree(path: Path) -> dict[str, Any]:
    """Read the settings file of another trainer, which may be hostile or broken, as nested dictionaries.

    `path`: JSON if it ends in `.json`, otherwise YAML.
    Raises ConfigError if it cannot be read, is larger than 1 MiB, is not of that format, has YAML aliases, or is no mapping of
    names to values at its outermost level.
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
            file_settings = json.loads(content)
        else:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, yaml.SafeLoader)):
                # A few lines of aliases can stand for a tree without an end.
                raise ConfigError(
                    f"from={path}: has YAML aliases (*name), which are not followed; write the values out"
                )
            file_settings = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        file_format = "JSON" if is_json else "YAML"
        raise ConfigError(f"from={path}: is no {file_format} ({' '.join(str(error).split())})") from error
    if not isinstance(file_settings, dict):
        raise ConfigError(f"from={path}: holds no settings; give a file of `name: value`")
    return file_settings


def detect_trainer(file_settings: Mapping[str, Any]) -> str | None:
    """Name the trainer that a settings file was written for, by the names of the settings in it; such as `axolotl`.

    `file_settings`: the file as nested dictionaries.
    The answer decides which defaults hold and how ambiguous names are read:

    - The first trainer in `TELLING_SETTINGS_BY_TRAINER` (DeepSpeed before axolotl) of whose settings the file has one.
    - Otherwise Hugging Face's Trainer, if any setting has a rule for its translation.
    - Otherwise None.
    """
    setting_names = {str(key) for key in file_settings}
    for key, value in file_settings.items():
        if isinstance(value, dict):
            setting_names |= {f"{key}.{name}" for name in value}  # such as `zero_optimization.stage`
    # The order matters, since trainers share names of settings.
    for trainer, telling_settings in TELLING_SETTINGS_BY_TRAINER.items():
        if setting_names & set(telling_settings):
            return trainer
    has_known_name = any(normalised_name(str(key)) in RULE_BY_NORMALISED_NAME for key in file_settings)
    return HUGGING_FACE if has_known_name else None


def _translate_settings(
    file_settings: Mapping[str, Any], conversion: ConvertedSettings, file_dir: Path, num_ranks: int | None = None
) -> None:
    """Translate every setting of a file into `conversion`, then the trainer's defaults; for any trainer but DeepSpeed.

    A default is translated only if the file says nothing in its place and it differs from shardtune's own, so that the run stays
    the same.

    `file_settings`: the settings of the file, as read from YAML.
    `conversion`: the result so far, which knows the trainer; settings and notes are added to it.
    `file_dir`: the directory of the file, from which relative paths start.
    `num_ranks`: ranks of the planned run; None if not known.
    """
    # Such as {"lr": "1e-4"}.
    written_values = {normalised_name(key): value for key, value in scalar_settings(file_settings).items()}
    defaults = _defaults_in_effect(conversion.trainer, written_values)
    other_settings = OtherTrainerSettings({**defaults, **written_values}, num_ranks)
    # axolotl trains all weights unless the file names an adapter.
    if conversion.trainer == AXOLOTL and "adapter" not in written_values:
        conversion.add_translation("adapter", "(none)", TranslatedSetting({"tuning": "full"}))
    # In this order, because the first of two contradicting settings stays.
    for key in sorted(file_settings, key=_translation_order):
        _add_setting(str(key), file_settings, other_settings, conversion, file_dir)
    # The defaults last, so that they do not go before what the file says.
    for key, value in defaults.items():
        translation = translate_by_rule(key, other_settings) or TranslatedSetting(not_needed=True)
        conversion.add_translation(key, f"{value} (what {conversion.trainer} does)", translation)
    if conversion.trainer == LLAMA_FACTORY and conversion.overrides.get("tuning") == "lora":
        _add_llama_factory_lora_defaults(other_settings, conversion, has_alpha="lora_alpha" in written_values)


def _add_llama_factory_lora_defaults(
    other_settings: OtherTrainerSettings, conversion: ConvertedSettings, *, has_alpha: bool
) -> None:
    """Add LLaMA-Factory's LoRA defaults to `conversion`, since shardtune's differ: rank 8, and an alpha of twice the rank.

    Called after everything in the file, if the run uses LoRA. `other_settings`: the settings of the file as text, of which
    `lora_rank` is read. `has_alpha`: the file sets `lora_alpha`, so only the rank is added.
    """
    # A rank in the file gives the same setting once more, which `add_translation` recognises.
    rank = parse_number(other_settings.get("lora_rank")) or 8
    rank_text = format_number(rank)
    conversion.add_translation("lora_rank", rank_text, TranslatedSetting({"tuning.rank": rank_text}))
    if not has_alpha:
        translation = TranslatedSetting({"tuning.alpha": format_number(2 * rank)})
        conversion.add_translation("lora_alpha", "twice the rank (what LLaMA-Factory does)", translation)


def _translation_order(key: str) -> int:
    """Where a setting stands in the order of translation: those of `GROUP_DECIDING_SETTINGS` in their order, then all others."""
    return GROUP_DECIDING_SETTINGS.index(key) if key in GROUP_DECIDING_SETTINGS else len(GROUP_DECIDING_SETTINGS)


def _defaults_in_effect(trainer: str, written_values: Mapping[str, str]) -> dict[str, str]:
    """The defaults of another trainer that hold for this file, because nothing in it overrides them: {"num_epochs": "1"}.

    `trainer`: one of the constants above, such as "axolotl".
    `written_values`: the settings of the file, as text by normalised name (lower case, `_` for `-`).

    A default is overridden by its own name or by a related setting: `max_steps` overrides the default of `num_train_epochs`.
    Empty for a trainer without known defaults, such as accelerate.
    """
    defaults = {}
    for key, value in DEFAULTS_BY_TRAINER.get(trainer, {}).items():
        overriding_names = (key, *OVERRIDING_SETTINGS.get(key, ()))
        if not any(name in written_values for name in overriding_names):
            defaults[key] = value
    if trainer == HUGGING_FACE and "learning_rate" in defaults:
        # TRL has one trainer class per kind of training, each with a default rate; the file does not name the class.
        # The rate depends on the kind of training, which settings of its own give away.
        for rate, names in SETTINGS_BY_TRL_LEARNING_RATE.items():
            if any(name in written_values for name in names):
                defaults["learning_rate"] = rate
                break
    return defaults


def _add_setting(
    key: str,
    file_settings: Mapping[str, Any],
    other_settings: OtherTrainerSettings,
    conversion: ConvertedSettings,
    file_dir: Path,
) -> None:
    """Translate one setting of another trainer's file into `conversion`: settings of shardtune, or a note why there are none.

    `key`: the setting, as the file spells it at its outermost level.
    `file_settings`: the whole file; a data set's or FSDP's setting is read together with others.
    `other_settings`: all settings of the file as text by normalised name, on which a rule may depend, such as the batch size.
    `file_dir`: the directory of the file, from which relative paths start.

    Data sets, DeepSpeed and FSDP are blocks with structure, which have functions of their own. All others are one value with one
    rule.
    """
    value = file_settings[key]
    name = normalised_name(key)
    if value is None or value in ("", [], {}):
        conversion.names_without_value.append(key)
    elif name in ("datasets", "test_datasets"):
        datasets.translate_axolotl_datasets(value, name, conversion, file_dir)
    elif name in ("dataset", "eval_dataset") and conversion.trainer == LLAMA_FACTORY:
        dataset_names = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        dataset_directory = str(file_settings.get("dataset_dir", "data"))
        datasets.translate_llama_factory_datasets(dataset_names, name, dataset_directory, conversion, file_dir)
    elif name == "deepspeed":
        _add_deepspeed_settings(value, other_settings, conversion, file_dir)
    elif name in ("fsdp", "fsdp_config"):
        _add_fsdp(key, file_settings, other_settings, conversion)
    elif name == "deepspeed_config" and isinstance(value, dict):
        _add_accelerate_deepspeed(value, other_settings, conversion, file_dir)
    else:
        conversion.add_translation(key, value, _translate_setting(name, value, other_settings, file_dir))


def _translate_setting(
    name: str, value: Any, other_settings: OtherTrainerSettings, file_dir: Path
) -> TranslatedSetting:
    """Translate one setting of another trainer's file, other than data-set lists, DeepSpeed and FSDP, into settings of shardtune.

    Such as `learning_rate`, 1e-4 -> {"optim.lr": "1e-4"}; a translation with a note alone says why there is no equivalent. Most
    settings have a rule in `RULE_BY_NORMALISED_NAME`.

    `name`: its normalised name. `value`: as read from YAML. `other_settings`: all settings of the file as text, on which a rule
    may depend. `file_dir`: the directory of the file, from which relative paths start.
    """
    # Cases that a rule cannot decide, because it knows neither the file's directory nor the type of the value in the file.
    if name == "dataset_dir":
        return TranslatedSetting(note="files are named whole in data.path", not_needed=True)
    if name in ("dataset", "dataset_name", "dataset_path"):
        return TranslatedSetting({"data.path": datasets.shardtune_data_path(to_cli_text(value), file_dir)})
    # These two values offload activations to host memory as well; any other value goes to the rule below.
    if name == "gradient_checkpointing" and value in ("unsloth", "offload"):
        return TranslatedSetting(
            note="activations are recomputed, and never kept in host memory: strategy.activation_checkpointing=full"
        )
    if name in PROCESS_STARTING_SETTINGS:
        return TranslatedSetting(note="processes are started by launcher.*", not_needed=True)
    if name not in RULE_BY_NORMALISED_NAME:
        return TranslatedSetting(note=UNKNOWN_SETTING_REASON)
    if not isinstance(value, dict):
        return translate_by_rule(name, other_settings) or TranslatedSetting(note=UNKNOWN_SETTING_REASON)
    return _translate_block_by_rule(name, value, other_settings)


def _translate_block_by_rule(
    name: str, block: dict[str, Any], other_settings: OtherTrainerSettings
) -> TranslatedSetting:
    """The note on a block where one value was expected, such as `warmup_steps: {a: 1}`: a translation without settings.

    The rule of the name is asked all the same, since it may say that the setting has no equivalent, or needs none, whatever its
    value. Settings that it gives are dropped, since they would contain the text of the whole block.

    `other_settings`: all settings of the file as text, to which the block is added as text.
    """
    translation = translate_by_rule(
        name, OtherTrainerSettings({**other_settings.value_by_name, name: to_cli_text(block)})
    )
    if translation is None:
        return TranslatedSetting(note=NO_EQUIVALENT_OF_BLOCK_REASON)
    return TranslatedSetting(note=translation.note or NO_EQUIVALENT_OF_BLOCK_REASON, not_needed=translation.not_needed)


def _add_deepspeed_settings(
    value: Any, other_settings: OtherTrainerSettings, conversion: ConvertedSettings, file_dir: Path
) -> None:
    """Translate the setting `deepspeed` of another trainer into `conversion`, by what its value is:

    - a block of DeepSpeed's settings: each of them;
    - the path of a file of such settings: each setting in the file;
    - a file that is not here: the ZeRO stage, if the file's name says it.

    `other_settings`: that trainer's settings as text; they override those of DeepSpeed. `file_dir`: the directory of its file.
    """
    if isinstance(value, dict):
        deepspeed.translate_deepspeed_settings(
            value, conversion, outer_values=other_settings.value_by_name, prefix="deepspeed."
        )
        return
    candidates = (Path(str(value)).expanduser(), file_dir / str(value))
    # `exists` first, because `is_file` alone raises for text that can be no path.
    existing_files = [path for path in candidates if datasets.exists(path) and path.is_file()]
    if not existing_files:
        conversion.add_translation("deepspeed", value, rules.deepspeed_stage(to_cli_text(value), other_settings))
        return
    deepspeed_file = existing_files[0]
    conversion.add_translation(
        "deepspeed", value, TranslatedSetting(note="its settings are turned one by one", not_needed=True)
    )
    deepspeed.translate_deepspeed_settings(
        read_settings_tree(deepspeed_file),
        conversion,
        outer_values=other_settings.value_by_name,
        prefix=f"{deepspeed_file.name}: ",
    )


def _add_accelerate_deepspeed(
    block: dict[str, Any], other_settings: OtherTrainerSettings, conversion: ConvertedSettings, file_dir: Path
) -> None:
    """Translate accelerate's block `deepspeed_config` into `conversion`: {"zero_stage": 3, "offload_optimizer_device": "cpu"}.

    accelerate writes DeepSpeed's most used settings flat, under names of its own, and may name a file with the rest. By the key:

    - `deepspeed_config_file`: every setting of that file;
    - a ZeRO setting: as DeepSpeed's block `zero_optimization`;
    - a name that other trainers have too, such as `gradient_accumulation_steps`: by its rule;
    - anything else is noted as unsupported.

    `other_settings`: all settings of accelerate's file as text. `file_dir`: its directory, from which relative paths start.
    """
    for key, value in block.items():
        setting_name = f"deepspeed_config.{key}"
        if key == "deepspeed_config_file":
            _add_deepspeed_settings(value, other_settings, conversion, file_dir)
        elif key in ZERO_KEY_BY_ACCELERATE_KEY:
            overrides = _overrides_of_accelerate_zero_setting(key, value, block)
            conversion.add_translation(setting_name, value, TranslatedSetting(overrides, not_needed=not overrides))
        elif normalised_name(key) in RULE_BY_NORMALISED_NAME:
            settings = OtherTrainerSettings({**other_settings.value_by_name, normalised_name(key): to_cli_text(value)})
            translation = translate_by_rule(key, settings) or TranslatedSetting(note=UNKNOWN_SETTING_REASON)
            conversion.add_translation(setting_name, value, translation)
        else:
            conversion.add_unsupported(setting_name, value, deepspeed.NOT_PASSED_ON_REASON)


def _overrides_of_accelerate_zero_setting(key: str, value: Any, block: Mapping[str, Any]) -> dict[str, str]:
    """Settings of shardtune for one ZeRO setting of accelerate: `zero_stage`, 3 -> {"strategy": "zero3"}; empty: none needed.

    `block`: accelerate's whole block, of which the stage is read, because the meaning of the others depends on it. The setting is
        translated as if it stood alone in a DeepSpeed file beside the stage.
    """
    default_stage = 2  # accelerate's own
    zero_block: dict[str, Any] = {"stage": block.get("zero_stage", default_stage)}
    if key != "zero_stage":
        zero_block[ZERO_KEY_BY_ACCELERATE_KEY[key]] = {"device": to_cli_text(value)}
    zero_conversion = ConvertedSettings(ACCELERATE)
    deepspeed.translate_deepspeed_settings({"zero_optimization": zero_block}, zero_conversion)
    return zero_conversion.overrides


def _add_fsdp(
    key: str, file_settings: Mapping[str, Any], other_settings: OtherTrainerSettings, conversion: ConvertedSettings
) -> None:
    """Translate `fsdp` or `fsdp_config` of Hugging Face's Trainer or accelerate into `conversion`, as a sharding strategy.

    Called once for each of the two that the file has. The strategy follows from both together, so it is added once: with `fsdp`
    if that is set, otherwise with `fsdp_config`. The settings within `fsdp_config` are translated or noted one by one.

    `key`: which of the two. `file_settings`: the whole file. `other_settings`: its settings as text, for the rule.
    """
    has_fsdp = file_settings.get("fsdp") not in (None, "", [])
    block = file_settings.get("fsdp_config")
    if not isinstance(block, dict):
        block = {}
    if key == "fsdp" or not has_fsdp:
        conversion.add_translation(
            key, file_settings[key], rules.fsdp_strategy(_fsdp_option_text(file_settings, block), other_settings)
        )
    if key == "fsdp_config":
        _add_fsdp_block(block, conversion)


def _add_fsdp_block(block: Mapping[str, Any], conversion: ConvertedSettings) -> None:
    """Translate each setting of the block `fsdp_config` of another trainer into `conversion`: our setting for it, or a note.

    Such as {"fsdp_activation_checkpointing": true}; keys come with and without `fsdp_`.
    """
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


def _fsdp_option_text(file_settings: Mapping[str, Any], block: Mapping[str, Any]) -> str:
    """Join what `fsdp` and the block `fsdp_config` ask for into one text in the form of `fsdp`: `full_shard,offload`.

    So one rule translates both. `file_settings`: the whole file, whose `fsdp` may be a text or a list. `block`: its
    `fsdp_config`, empty if there is none.
    """
    has_fsdp = file_settings.get("fsdp") not in (None, "", [])
    options = [to_cli_text(file_settings["fsdp"]).strip("[]") if has_fsdp else "full_shard"]
    # Each setting of the block has two spellings, with and without `fsdp_`, by the version of the other trainer.
    sharding = str(block.get("fsdp_sharding_strategy", block.get("sharding_strategy", "")))
    if sharding:
        options.append(sharding.lower())
    offload_params = block.get("fsdp_offload_params", block.get("offload_params", False))
    if offload_params is True:
        options.append("offload")
    reshard_after_forward = block.get("fsdp_reshard_after_forward", block.get("reshard_after_forward", True))
    # Gathered weights kept after the forward pass are what `shard_grad_op` asks for.
    if reshard_after_forward is False:
        options.append("shard_grad_op")
    return ",".join(options)
