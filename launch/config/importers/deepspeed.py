"""Translates a DeepSpeed configuration: a file of its own, or a block in another trainer's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.config.importers import rules
from launch.config.importers.conversion import Converted, text_of, texts
from launch.config.importers.equivalent import ForeignSettings, TranslatedSetting, is_true, number, shown
from launch.config.importers.names import answer

SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
OF_TOP = {
    "prescale_gradients gradient_predivide_factor communication_data_type sparse_gradients data_types": TranslatedSetting(
        said="gradients are averaged over all tokens of a step, in the precision that the strategy chooses"
    ),
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer": TranslatedSetting(
        said="docs/optimizers.md says which optimizer runs with ZeRO", needless=True
    ),
    "wall_clock_breakdown dump_state memory_breakdown": TranslatedSetting(
        said="logging.step_parts=true tells the parts of a step", needless=True
    ),
}
OF_ZERO = {
    "reduce_bucket_size allgather_bucket_size": TranslatedSetting(
        said="strategy.bucket_mib sets both, in MiB instead of elements; it is chosen for the hardware otherwise"
    ),
    "stage3_prefetch_bucket_size": TranslatedSetting(said="strategy.prefetch_mib sets it, in MiB instead of elements"),
    "overlap_comm contiguous_gradients allgather_partitions reduce_scatter round_robin_gradients": TranslatedSetting(
        said="chosen for the hardware", needless=True
    ),
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save": TranslatedSetting(
        said="export/ always holds whole weights", needless=True
    ),
}
NOT_HERE = "it is not passed on to DeepSpeed: what its engine is told is derived from strategy.*"


def convert(tree: Mapping[str, Any], into: Converted, outer: Mapping[str, str] | None = None, prefix: str = "") -> None:
    """File every setting of `tree`; `outer` are those of the trainer that named the file, which go before it."""
    theirs = ForeignSettings({**texts(tree), **(outer or {})})
    for key, value in tree.items():
        name, block = f"{prefix}{key}", value if isinstance(value, dict) else None
        if _is_auto(value):
            into.empty.append(name)
        elif key == "zero_optimization" and block is not None:
            _zero(block, into, name)
        elif key in ("bf16", "bfloat16", "fp16") and block is not None:
            _precision(key, block, tree, into, name, alone=outer is None)
        elif key == "optimizer" and block is not None:
            _optimizer(block, into, name)
        elif key == "scheduler" and block is not None:
            _scheduler(block, into, name)
        elif key in ("wandb", "tensorboard") and block is not None:
            _tracker(key, block, into, name)
        elif key == "steps_per_print":
            into.take(name, value, TranslatedSetting({"logging.every_steps": text_of(value)}))
        elif (said := _of(OF_TOP, key)) is not None:
            into.take(name, value, said)
        elif key == "activation_checkpointing":
            into.lack(name, value, "strategy.activation_checkpointing=full or selective recomputes activations")
        else:
            known = None if block is not None else answer(key, theirs) if str(key) in theirs.given else None
            into.take(name, value, known or TranslatedSetting(said=NOT_HERE))


def _is_auto(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.lower() in ("auto", ""))


def _of(table: Mapping[str, TranslatedSetting], key: str) -> TranslatedSetting | None:
    return next((said for names, said in table.items() if key in names.split()), None)


def _zero(block: Mapping[str, Any], into: Converted, name: str) -> None:
    given = text_of(block.get("stage", 0))
    known = given in ("0", "1", "2", "3")
    words = rules.zero_words({**block, "stage": given if known else "0"})
    stage = words["strategy"]
    said = (
        TranslatedSetting({"strategy": stage})
        if known
        else TranslatedSetting(said="strategy is ddp, zero1, zero2 or zero3; type one")
    )
    into.take(f"{name}.stage", given, said)
    for key, value in block.items():
        inner = f"{name}.{key}"
        if key == "stage":
            continue
        if _is_auto(value):
            into.empty.append(inner)
        elif key in ("offload_optimizer", "offload_param") and isinstance(value, dict):
            _offload(key, value, words, into, inner)
        elif key == "cpu_offload":
            on = {"strategy.offload_optimizer": "cpu"} if stage != "ddp" else {}
            into.take(
                inner, value, TranslatedSetting(on) if is_true(text_of(value)) else TranslatedSetting(needless=True)
            )
        elif key in ("stage3_param_persistence_threshold", "param_persistence_threshold") and stage == "zero3":
            into.take(
                inner, value, TranslatedSetting({"strategy.persistence_threshold": shown(number(text_of(value)) or 0)})
            )
        elif key.startswith("stage3_") and stage != "zero3":
            into.take(inner, value, TranslatedSetting(said="of stage 3 alone", needless=True))
        else:
            into.take(inner, value, _of(OF_ZERO, key) or TranslatedSetting(said=NOT_HERE))


def _offload(key: str, block: Mapping[str, Any], words: Mapping[str, str], into: Converted, name: str) -> None:
    ours = "strategy.offload_optimizer" if key == "offload_optimizer" else "strategy.offload_parameters"
    used = {each: words[each] for each in (ours, "strategy.nvme_path") if each in words}
    for inner, value in block.items():
        if inner == "device":
            into.take(
                f"{name}.device",
                value,
                TranslatedSetting({ours: words[ours]}) if ours in words else TranslatedSetting(needless=True),
            )
        elif inner == "nvme_path" and "strategy.nvme_path" in used:
            into.take(f"{name}.nvme_path", value, TranslatedSetting({"strategy.nvme_path": used["strategy.nvme_path"]}))
        elif inner == "pin_memory":
            into.take(
                f"{name}.pin_memory", value, TranslatedSetting(said="host memory is pinned on GPUs", needless=True)
            )
        else:
            into.lack(f"{name}.{inner}", value, NOT_HERE)


def _precision(
    key: str, block: Mapping[str, Any], tree: Mapping[str, Any], into: Converted, name: str, *, alone: bool
) -> None:
    ours = "fp16" if key == "fp16" else "bf16"
    for inner, value in block.items():
        if _is_auto(value):
            into.empty.append(f"{name}.{inner}")
        elif inner != "enabled":
            on = is_true(text_of(block.get("enabled")))
            why = "the loss scale of fp16 finds itself" if ours == "fp16" else NOT_HERE
            into.take(
                f"{name}.{inner}",
                value,
                TranslatedSetting(said=why) if on else TranslatedSetting(said="it is off", needless=True),
            )
        elif is_true(text_of(value)):
            into.take(f"{name}.enabled", value, TranslatedSetting({"precision": ours}))
        else:
            others = [tree.get(other) for other in ("fp16", "bf16", "bfloat16") if other != key]
            says = any(isinstance(other, dict) and not _is_off(other.get("enabled", False)) for other in others)
            off = TranslatedSetting({"precision": "fp32"}, "off means fp32 there; auto takes what the card has")
            into.take(f"{name}.enabled", value, off if alone and not says else TranslatedSetting(needless=True))


def _is_off(value: Any) -> bool:
    return not is_true(text_of(value))


def _parameters(block: Mapping[str, Any], into: Converted, name: str) -> Mapping[str, Any]:
    found = block.get("params")
    if isinstance(found, dict):
        return found
    if _is_auto(found):
        into.empty.append(f"{name}.params")
    else:
        into.lack(f"{name}.params", found, "holds no settings")
    return {}


def _optimizer(block: Mapping[str, Any], into: Converted, name: str) -> None:
    kind, parameters = block.get("type"), _parameters(block, into, name)
    if kind is not None:
        into.take(f"{name}.type", kind, rules.CHOICES["optim"](text_of(kind), ForeignSettings({})))
    for key, value in parameters.items():
        if _is_auto(value):
            into.empty.append(f"{name}.params.{key}")
        elif key in ("lr", "betas", "eps", "weight_decay", "momentum"):
            into.take(f"{name}.params.{key}", value, TranslatedSetting({f"optim.{key}": text_of(value)}))
        else:
            why = "weight decay is decoupled from the gradients, whatever the library behind it"
            torch_only = key in ("torch_adam", "adam_w_mode", "bias_correction") and is_true(text_of(value))
            into.take(
                f"{name}.params.{key}",
                value,
                TranslatedSetting(said=why if torch_only else NOT_HERE, needless=torch_only),
            )
    for key in block.keys() - {"type", "params"}:
        into.lack(f"{name}.{key}", block[key], NOT_HERE)


def _scheduler(block: Mapping[str, Any], into: Converted, name: str) -> None:
    kind, parameters = text_of(block.get("type")), _parameters(block, into, name)
    if kind not in SCHEDULES:
        into.lack(f"{name}.type", kind, "schedule is one of cosine, linear, constant, wsd")
    else:
        logarithmic = kind != "WarmupCosineLR" and parameters.get("warmup_type", "log") == "log"
        remark = "the rate rises linearly here, and there by the logarithm of the step" if logarithmic else ""
        into.take(f"{name}.type", kind, TranslatedSetting({"schedule": SCHEDULES[kind]}, remark))
    ours = {
        "warmup_num_steps": "schedule.warmup_steps",
        "warmup_max_lr": "optim.lr",
        "total_num_steps": "budget.steps",
        "cos_min_ratio": "schedule.min_factor",
    }
    for key, value in parameters.items():
        if _is_auto(value):
            into.empty.append(f"{name}.params.{key}")
        elif key in ours:
            into.take(f"{name}.params.{key}", value, TranslatedSetting({ours[key]: text_of(value)}))
        elif (key == "warmup_min_lr" and not number(text_of(value))) or key == "warmup_type":
            into.take(
                f"{name}.params.{key}",
                value,
                TranslatedSetting(said="the rate rises linearly from near 0", needless=True),
            )
        else:
            into.lack(
                f"{name}.params.{key}", value, "the schedule has no such setting; docs/config.md lists schedule.*"
            )


def _tracker(key: str, block: Mapping[str, Any], into: Converted, name: str) -> None:
    on = is_true(text_of(block.get("enabled")))
    for inner, value in block.items():
        if inner == "enabled":
            ours = {"logging.wandb": "online"} if key == "wandb" else {"logging.tensorboard": "true"}
            into.take(f"{name}.enabled", value, TranslatedSetting(ours) if on else TranslatedSetting(needless=True))
        elif key == "wandb" and on and inner in ("project", "group"):
            into.take(f"{name}.{inner}", value, TranslatedSetting({f"logging.{inner}": text_of(value)}))
        elif key == "wandb" and on and inner == "team":
            into.take(f"{name}.team", value, TranslatedSetting({"logging.entity": text_of(value)}))
        else:
            why = "logs are in the run directory" if on else "it is off"
            into.take(f"{name}.{inner}", value, TranslatedSetting(said=why, needless=True))
