"""Translates a whole settings file of another trainer. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.config.importers import datasets, deepspeed, rules
from launch.config.importers.conversion import Converted, text_of, texts
from launch.config.importers.equivalent import ForeignSettings, TranslatedSetting, number, shown
from launch.config.importers.names import NAMES, answer, plain
from strategies import atomic_io
from strategies.errors import ConfigError

MOST = 2**20
"""Bytes of a file of settings: hundreds of times what people write."""
AXOLOTL, FACTORY, DEEPSPEED, ACCELERATE = "axolotl", "LLaMA-Factory", "DeepSpeed", "accelerate"
HUGGING_FACE = "Hugging Face's Trainer and TRL"
MARKS = {
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
"""Settings by which a file is known; those of the first trainer that has one of them."""
COMMON = {"learning_rate": "5e-5", "lr_scheduler_type": "linear", "num_train_epochs": "3", "warmup_steps": "0"}
DEFAULTS = {
    AXOLOTL: {"sequence_len": "512", "num_epochs": "1", "micro_batch_size": "1", "lr_scheduler": "cosine"},
    FACTORY: {**COMMON, "finetuning_type": "lora", "cutoff_len": "2048", "per_device_train_batch_size": "8"},
    HUGGING_FACE: {**COMMON, "per_device_train_batch_size": "8"},
}
"""What the others do where their file says nothing, and we would do otherwise."""
INSTEAD = {
    "warmup_steps": ("warmup_ratio",),
    "num_train_epochs": ("max_steps", "epochs"),
    "num_epochs": ("max_steps",),
    "lr_scheduler": ("lr_scheduler_type",),
}
"""Settings in whose presence a default of theirs does not hold."""
FIRST = ("pref_loss", "stage", "finetuning_type", "adapter", "use_peft", "load_in_4bit", "deepspeed", "fsdp")
"""What decides on a whole group goes before what only sets a part of it."""
WRAPPING = {
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
STARTING = {
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
UNKNOWN = "no setting of this name is known here; docs/config.md lists all there are"


def convert(path: Path, ranks: int | None = None) -> Converted:
    """Our words for the file at `path`, of a run with `ranks`, where that is known.

    Errors: ConfigError where it cannot be read, or is no file of those trainers.
    """
    tree = read(path)
    trainer = whose(tree)
    if trainer is None:
        raise ConfigError(
            f"from={path}: no setting in it is one of axolotl, LLaMA-Factory, Hugging Face's Trainer, TRL or DeepSpeed; "
            "a file of ours is given as a bare word: shardtune train my.yaml"
        )
    into = Converted(trainer)
    if trainer == DEEPSPEED:
        deepspeed.convert(tree, into)
    else:
        _convert(tree, into, path.parent, ranks)
    return into


def read(path: Path) -> dict[str, Any]:
    """The file's settings as nested dictionaries. Errors: ConfigError."""
    import yaml

    try:
        text = atomic_io.read_bytes(path.expanduser(), most=MOST).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = atomic_io.reason(error) if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"from={path}: cannot be read ({reason})") from error
    try:
        if path.suffix == ".json":
            tree = json.loads(text)
        elif any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ConfigError(f"from={path}: has YAML aliases (*name), which are not followed; write the values out")
        else:
            tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ConfigError(f"from={path}: is no {kind} ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"from={path}: holds no settings; give a file of `name: value`")
    return tree


def whose(tree: Mapping[str, Any]) -> str | None:
    """The trainer that a file was written for; None where no name in it is known."""
    inner = {f"{key}.{name}" for key, value in tree.items() if isinstance(value, dict) for name in value}
    there = {str(key) for key in tree} | inner
    for trainer, marks in MARKS.items():
        if there & set(marks):
            return trainer
    return HUGGING_FACE if any(plain(str(key)) in NAMES for key in tree) else None


def _convert(tree: Mapping[str, Any], into: Converted, base: Path, ranks: int | None = None) -> None:
    given = {plain(key): value for key, value in texts(tree).items()}
    defaults = {
        key: value
        for key, value in DEFAULTS.get(into.trainer, {}).items()
        if key not in given and not any(other in given for other in INSTEAD.get(key, ()))
    }
    theirs = ForeignSettings({**defaults, **given}, ranks)
    if into.trainer == AXOLOTL and "adapter" not in given:
        into.take("adapter", "(none)", TranslatedSetting({"tuning": "full"}))
    for key in sorted(tree, key=lambda each: FIRST.index(each) if each in FIRST else len(FIRST)):
        _one(str(key), tree, theirs, into, base)
    for key, value in defaults.items():
        said = answer(key, theirs)
        into.take(key, f"{value} (what {into.trainer} does)", said or TranslatedSetting(needless=True))
    if into.trainer == FACTORY and into.words.get("tuning") == "lora":
        rank = number(theirs.get("lora_rank")) or 8
        into.take("lora_rank", f"{shown(rank)}", TranslatedSetting({"tuning.rank": shown(rank)}))
        if "lora_alpha" not in given:
            into.take(
                "lora_alpha",
                "twice the rank (what LLaMA-Factory does)",
                TranslatedSetting({"tuning.alpha": shown(2 * rank)}),
            )


def _one(key: str, tree: Mapping[str, Any], theirs: ForeignSettings, into: Converted, base: Path) -> None:
    """File one setting of the outermost level."""
    value, name = tree[key], plain(key)
    if value is None or value in ("", [], {}):
        into.empty.append(key)
    elif name in ("datasets", "test_datasets"):
        datasets.axolotl(value, name, into, base)
    elif name in ("dataset", "eval_dataset") and into.trainer == FACTORY:
        names = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        datasets.factory(names, name, str(tree.get("dataset_dir", "data")), into, base)
    elif name == "dataset_dir":
        into.take(key, value, TranslatedSetting(said="files are named whole in data.path", needless=True))
    elif name in ("dataset", "dataset_name", "dataset_path"):
        into.take(key, value, TranslatedSetting({"data.path": datasets.place(text_of(value), base)}))
    elif name == "deepspeed":
        _deepspeed(value, theirs, into, base)
    elif name in ("fsdp", "fsdp_config"):
        _fsdp(key, tree, theirs, into)
    elif name == "gradient_checkpointing" and value in ("unsloth", "offload"):
        why = "activations are recomputed, and never kept in host memory: strategy.activation_checkpointing=full"
        into.lack(key, value, why)
    elif name == "deepspeed_config" and isinstance(value, dict):
        _accelerated(value, theirs, into, base)
    elif name in STARTING:
        into.take(key, value, TranslatedSetting(said="processes are started by launcher.*", needless=True))
    elif name not in NAMES:
        into.lack(key, value, UNKNOWN)
    elif isinstance(value, dict):
        said = answer(name, ForeignSettings({**theirs.given, name: text_of(value)}))
        why = said.said if said and said.said else "a block of settings has no equal as a whole"
        into.take(key, value, TranslatedSetting(said=why, needless=said is not None and said.needless))
    else:
        said = answer(name, theirs)
        into.take(key, value, said or TranslatedSetting(said=UNKNOWN))


def _deepspeed(value: Any, theirs: ForeignSettings, into: Converted, base: Path) -> None:
    if isinstance(value, dict):
        deepspeed.convert(value, into, theirs.given, "deepspeed.")
        return
    here = [
        path for path in (Path(str(value)).expanduser(), base / str(value)) if datasets.exists(path) and path.is_file()
    ]
    if not here:
        into.take("deepspeed", value, rules.deepspeed(text_of(value), theirs))
        return
    into.take("deepspeed", value, TranslatedSetting(said="its settings are turned one by one", needless=True))
    deepspeed.convert(read(here[0]), into, theirs.given, f"{here[0].name}: ")


def _accelerated(block: dict[str, Any], theirs: ForeignSettings, into: Converted, base: Path) -> None:
    """accelerate's own block about DeepSpeed, which may name a file of DeepSpeed's."""
    names = {
        "zero_stage": "stage",
        "offload_optimizer_device": "offload_optimizer",
        "offload_param_device": "offload_param",
    }
    for key, value in block.items():
        said = f"deepspeed_config.{key}"
        if key == "deepspeed_config_file":
            _deepspeed(value, theirs, into, base)
        elif key in names:
            zero = {"stage": block.get("zero_stage", 2)}
            zero |= {} if key == "zero_stage" else {names[key]: {"device": text_of(value)}}
            found = Converted(into.trainer)
            deepspeed.convert({"zero_optimization": zero}, found)
            into.take(said, value, TranslatedSetting(found.words, needless=not found.words))
        elif plain(key) in NAMES:
            into.take(
                said,
                value,
                answer(key, ForeignSettings({**theirs.given, plain(key): text_of(value)}))
                or TranslatedSetting(said=UNKNOWN),
            )
        else:
            into.lack(said, value, deepspeed.NOT_HERE)


def _fsdp(key: str, tree: Mapping[str, Any], theirs: ForeignSettings, into: Converted) -> None:
    """`fsdp` and `fsdp_config` decide together."""
    block = tree.get("fsdp_config")
    block = block if isinstance(block, dict) else {}
    parts = [text_of(tree["fsdp"]).strip("[]")] if tree.get("fsdp") not in (None, "", []) else ["full_shard"]
    strategy = str(block.get("fsdp_sharding_strategy", block.get("sharding_strategy", "")))
    offload = block.get("fsdp_offload_params", block.get("offload_params", False))
    kept = block.get("fsdp_reshard_after_forward", block.get("reshard_after_forward", True))
    parts += [strategy.lower()] if strategy else []
    parts += ["offload"] if offload is True else []
    parts += ["shard_grad_op"] if kept is False else []
    if key == "fsdp" or "fsdp" not in tree or tree["fsdp"] in (None, "", []):
        into.take(key, tree[key], rules.fsdp(",".join(parts), theirs))
    if key != "fsdp_config":
        return
    decided = ("sharding_strategy", "offload_params", "reshard_after_forward")
    for name, value in block.items():
        if name.removeprefix("fsdp_") in WRAPPING:
            why = "the repeated blocks of the model are sharded, and export/ is written, without it"
            into.take(f"fsdp_config.{name}", value, TranslatedSetting(said=why, needless=True))
        elif name.removeprefix("fsdp_") in decided:
            into.take(f"fsdp_config.{name}", value, TranslatedSetting(said="read together with fsdp", needless=True))
        elif name in ("fsdp_activation_checkpointing", "activation_checkpointing") and value is True:
            into.take(f"fsdp_config.{name}", value, TranslatedSetting({"strategy.activation_checkpointing": "full"}))
        else:
            into.lack(f"fsdp_config.{name}", value, UNKNOWN)
