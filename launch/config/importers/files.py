"""Translates a whole settings file of another trainer. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.config.importers import datasets, deepspeed, rules
from launch.config.importers.conversion import ConvertedSettings, scalar_settings, to_cli_text
from launch.config.importers.equivalent import ForeignSettings, TranslatedSetting, format_number, parse_number
from launch.config.importers.names import RULES_BY_FOREIGN_NAME, normalised_name, translate
from strategies import atomic_io
from strategies.errors import ConfigError

MAX_SETTINGS_FILE_BYTES = 2**20
"""Bytes of a file of settings: hundreds of times what people write."""
AXOLOTL = "axolotl"
FACTORY = "LLaMA-Factory"
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
    FACTORY: ("finetuning_type", "stage", "template", "cutoff_len", "dataset_dir"),
}
"""Settings by which the trainer of a file is known: the first trainer of which the file has one."""
COMMON_DEFAULTS = {"learning_rate": "5e-5", "lr_scheduler_type": "linear", "num_train_epochs": "3", "warmup_steps": "0"}
DEFAULTS_BY_TRAINER = {
    AXOLOTL: {"sequence_len": "512", "num_epochs": "1", "micro_batch_size": "1", "lr_scheduler": "cosine"},
    FACTORY: {**COMMON_DEFAULTS, "finetuning_type": "lora", "cutoff_len": "2048", "per_device_train_batch_size": "8"},
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
"""Settings in whose presence a default of theirs does not hold."""
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
FSDP_WRAPPING_SETTINGS = {
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
"""How FSDP is told of the model, and how it loads and saves."""
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
        _translate_tree(tree, conversion, path.parent, num_ranks)
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

    - The first trainer in `TELLING_SETTINGS_BY_TRAINER` of whose settings the file has one.
    - Otherwise Hugging Face's Trainer, if any setting is known.
    - Otherwise None.
    """
    setting_names = {str(key) for key in tree}
    for key, value in tree.items():
        if isinstance(value, dict):
            setting_names |= {f"{key}.{name}" for name in value}  # such as `zero_optimization.stage`
    for trainer, telling_settings in TELLING_SETTINGS_BY_TRAINER.items():
        if setting_names & set(telling_settings):
            return trainer
    has_known_name = any(normalised_name(str(key)) in RULES_BY_FOREIGN_NAME for key in tree)
    return HUGGING_FACE if has_known_name else None


def _translate_tree(
    tree: Mapping[str, Any], conversion: ConvertedSettings, file_dir: Path, num_ranks: int | None = None
) -> None:
    """Translate every setting of a trainer other than DeepSpeed into `conversion`, then its defaults that differ from ours.

    `tree`: the settings of the file. `file_dir`: the directory of the file, from which relative paths start. `num_ranks`: the
    number of ranks of the run, None if it is not known.
    """
    written_values = {normalised_name(key): value for key, value in scalar_settings(tree).items()}  # by name
    defaults = _defaults_that_hold(conversion.trainer, written_values)
    foreign = ForeignSettings({**defaults, **written_values}, num_ranks)
    if conversion.trainer == AXOLOTL and "adapter" not in written_values:
        conversion.add_translation("adapter", "(none)", TranslatedSetting({"tuning": "full"}))
    # In this order, because the first of two contradicting settings stays.
    for key in sorted(tree, key=_translation_order):
        _add_setting(str(key), tree, foreign, conversion, file_dir)
    # The defaults last, so that they do not go before what the file says.
    for key, value in defaults.items():
        translation = translate(key, foreign) or TranslatedSetting(not_needed=True)
        conversion.add_translation(key, f"{value} (what {conversion.trainer} does)", translation)
    if conversion.trainer == FACTORY and conversion.overrides.get("tuning") == "lora":
        _add_factory_lora_defaults(foreign, conversion, has_alpha="lora_alpha" in written_values)


def _add_factory_lora_defaults(foreign: ForeignSettings, conversion: ConvertedSettings, *, has_alpha: bool) -> None:
    """Write out LLaMA-Factory's LoRA defaults, which differ from ours: rank 8, and an alpha of twice the rank."""
    rank = parse_number(foreign.get("lora_rank")) or 8
    rank_text = format_number(rank)
    conversion.add_translation("lora_rank", rank_text, TranslatedSetting({"tuning.rank": rank_text}))
    if not has_alpha:
        translation = TranslatedSetting({"tuning.alpha": format_number(2 * rank)})
        conversion.add_translation("lora_alpha", "twice the rank (what LLaMA-Factory does)", translation)


def _translation_order(key: str) -> int:
    """Where a setting stands in the order of translation: those of `GROUP_DECIDING_SETTINGS` in their order, then all others."""
    return GROUP_DECIDING_SETTINGS.index(key) if key in GROUP_DECIDING_SETTINGS else len(GROUP_DECIDING_SETTINGS)


def _defaults_that_hold(trainer: str, written_values: Mapping[str, str]) -> dict[str, str]:
    """The defaults of a trainer, as text by normalised name, that nothing in its file overrides: {"num_epochs": "1"}.

    `written_values`: the settings of the file, as text by normalised name.
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
    key: str, tree: Mapping[str, Any], foreign: ForeignSettings, conversion: ConvertedSettings, file_dir: Path
) -> None:
    """Translate the setting `key` of the outermost level of a file (`tree`) into `conversion`.

    Data sets, DeepSpeed and FSDP have their own translators. `foreign`: all settings of the file as text, on which a rule may
    depend. `file_dir`: the directory of the file.
    """
    value = tree[key]
    name = normalised_name(key)
    if value is None or value in ("", [], {}):
        conversion.names_without_value.append(key)
    elif name in ("datasets", "test_datasets"):
        datasets.translate_axolotl_datasets(value, name, conversion, file_dir)
    elif name in ("dataset", "eval_dataset") and conversion.trainer == FACTORY:
        dataset_names = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        dataset_directory = str(tree.get("dataset_dir", "data"))
        datasets.translate_factory_datasets(dataset_names, name, dataset_directory, conversion, file_dir)
    elif name == "deepspeed":
        _add_deepspeed(value, foreign, conversion, file_dir)
    elif name in ("fsdp", "fsdp_config"):
        _add_fsdp(key, tree, foreign, conversion)
    elif name == "deepspeed_config" and isinstance(value, dict):
        _add_accelerate_deepspeed(value, foreign, conversion, file_dir)
    else:
        conversion.add_translation(key, value, _translate_setting(name, value, foreign, file_dir))


def _translate_setting(name: str, value: Any, foreign: ForeignSettings, file_dir: Path) -> TranslatedSetting:
    """Our settings for one setting of another trainer's file, or a note that says why there are none.

    `name`: its normalised name. `foreign`: all settings of the file, on which a rule may depend. `file_dir`: the directory of the
    file, where relative paths start. The first cases are special; most settings have a rule in `RULES_BY_FOREIGN_NAME`.
    """
    if name == "dataset_dir":
        return TranslatedSetting(note="files are named whole in data.path", not_needed=True)
    if name in ("dataset", "dataset_name", "dataset_path"):
        return TranslatedSetting({"data.path": datasets.our_data_path(to_cli_text(value), file_dir)})
    if name == "gradient_checkpointing" and value in ("unsloth", "offload"):
        return TranslatedSetting(
            note="activations are recomputed, and never kept in host memory: strategy.activation_checkpointing=full"
        )
    if name in PROCESS_STARTING_SETTINGS:
        return TranslatedSetting(note="processes are started by launcher.*", not_needed=True)
    if name not in RULES_BY_FOREIGN_NAME:
        return TranslatedSetting(note=UNKNOWN_SETTING_REASON)
    if not isinstance(value, dict):
        return translate(name, foreign) or TranslatedSetting(note=UNKNOWN_SETTING_REASON)
    return _note_on_block(name, value, foreign)


def _note_on_block(name: str, block: dict[str, Any], foreign: ForeignSettings) -> TranslatedSetting:
    """A translation to none of our settings for a block whose name has a rule.

    The rule may say why there is no equivalent, or that none is needed. Settings of ours that it gives are left out, since a rule
    reads one value and not a block.
    """
    translation = translate(name, ForeignSettings({**foreign.value_by_name, name: to_cli_text(block)}))
    if translation is None:
        return TranslatedSetting(note=NO_EQUIVALENT_OF_BLOCK_REASON)
    return TranslatedSetting(note=translation.note or NO_EQUIVALENT_OF_BLOCK_REASON, not_needed=translation.not_needed)


def _add_deepspeed(value: Any, foreign: ForeignSettings, conversion: ConvertedSettings, file_dir: Path) -> None:
    """Translate the setting `deepspeed` of another trainer into `conversion`, by what its value is:

    - a block of DeepSpeed's settings: each of them;
    - the path of a file of such settings: each setting in the file;
    - a file that is not here: the ZeRO stage, if the file's name says it.
    """
    if isinstance(value, dict):
        deepspeed.translate_deepspeed_settings(
            value, conversion, outer_values=foreign.value_by_name, prefix="deepspeed."
        )
        return
    candidates = (Path(str(value)).expanduser(), file_dir / str(value))
    existing_files = [path for path in candidates if datasets.exists(path) and path.is_file()]
    if not existing_files:
        conversion.add_translation("deepspeed", value, rules.deepspeed_stage(to_cli_text(value), foreign))
        return
    deepspeed_file = existing_files[0]
    conversion.add_translation(
        "deepspeed", value, TranslatedSetting(note="its settings are turned one by one", not_needed=True)
    )
    deepspeed.translate_deepspeed_settings(
        read_settings_tree(deepspeed_file),
        conversion,
        outer_values=foreign.value_by_name,
        prefix=f"{deepspeed_file.name}: ",
    )


def _add_accelerate_deepspeed(
    block: dict[str, Any], foreign: ForeignSettings, conversion: ConvertedSettings, file_dir: Path
) -> None:
    """Translate `deepspeed_config` of accelerate, such as {"zero_stage": 3, "offload_optimizer_device": "cpu"}.

    It may name a file of DeepSpeed. Its other settings have names of accelerate (`deepspeed_names`), or names of other trainers.
    """
    deepspeed_names = {
        # accelerate's names, with DeepSpeed's in `zero_optimization`.
        "zero_stage": "stage",
        "offload_optimizer_device": "offload_optimizer",
        "offload_param_device": "offload_param",
    }
    for key, value in block.items():
        setting_name = f"deepspeed_config.{key}"
        if key == "deepspeed_config_file":
            _add_deepspeed(value, foreign, conversion, file_dir)
        elif key in deepspeed_names:
            # As a block of DeepSpeed with this setting alone, so that the overrides are exactly those of this setting.
            zero_block: dict[str, Any] = {"stage": block.get("zero_stage", 2)}
            if key != "zero_stage":
                zero_block[deepspeed_names[key]] = {"device": to_cli_text(value)}
            zero_conversion = ConvertedSettings(conversion.trainer)
            deepspeed.translate_deepspeed_settings({"zero_optimization": zero_block}, zero_conversion)
            overrides = zero_conversion.overrides
            conversion.add_translation(setting_name, value, TranslatedSetting(overrides, not_needed=not overrides))
        elif normalised_name(key) in RULES_BY_FOREIGN_NAME:
            settings = ForeignSettings({**foreign.value_by_name, normalised_name(key): to_cli_text(value)})
            translation = translate(key, settings) or TranslatedSetting(note=UNKNOWN_SETTING_REASON)
            conversion.add_translation(setting_name, value, translation)
        else:
            conversion.add_unsupported(setting_name, value, deepspeed.NOT_PASSED_ON_REASON)


def _add_fsdp(key: str, tree: Mapping[str, Any], foreign: ForeignSettings, conversion: ConvertedSettings) -> None:
    """Translate `fsdp` or `fsdp_config` (`key`) of the file `tree` into `conversion`.

    The strategy follows from both together. It is added once: with `fsdp` if that is set, otherwise with `fsdp_config`. Then each
    setting of the block `fsdp_config` gets a note: not needed, translated or unsupported.
    """
    has_fsdp = tree.get("fsdp") not in (None, "", [])
    block = tree.get("fsdp_config")
    if not isinstance(block, dict):
        block = {}
    if key == "fsdp" or not has_fsdp:
        conversion.add_translation(key, tree[key], rules.fsdp_strategy(_fsdp_option_text(tree, block), foreign))
    if key != "fsdp_config":
        return
    for name, value in block.items():
        setting_name = f"fsdp_config.{name}"
        bare_name = name.removeprefix("fsdp_")
        if bare_name in FSDP_WRAPPING_SETTINGS:
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
