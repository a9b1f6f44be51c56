"""Translations of values, for settings where another name is not enough."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from launch.config.importers.equivalent import (
    ForeignSettings,
    TranslatedSetting,
    format_number,
    is_set,
    is_true,
    list_entries,
    parse_number,
)

Rule = Callable[[str, ForeignSettings], TranslatedSetting]
MICRO = (
    "per_device_train_batch_size",
    "micro_batch_size",
    "train_micro_batch_size_per_gpu",
    "per_gpu_train_batch_size",
)
OPTIMIZERS = {
    "adamw": "adamw adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused adam fusedadam torch_adam "
    "paged_adamw paged_adamw_32bit",
    "adamw_8bit": "adamw_8bit adamw_bnb_8bit paged_adamw_8bit adamw_torch_8bit",
    "adafactor": "adafactor",
    "lion": "lion lion_32bit lion_8bit paged_lion_32bit paged_lion_8bit lion_pytorch",
    "muon": "muon",
    "sgd": "sgd",
    "schedule_free": "schedule_free_adamw schedule_free_sgd schedule_free_radam",
}
"""Our optimizers, and what others call them."""
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant constant_with_warmup",
    "wsd": "warmup_stable_decay wsd",
}
OBJECTIVES = {
    "sft": "sft",
    "pretrain": "pt pretrain",
    "reward": "rm reward",
    "dpo": "dpo",
    "kto": "kto",
    "orpo": "orpo",
    "simpo": "simpo",
    "classification": "cls classification",
    "seq2seq": "seq2seq",
    "distillation": "distillation",
}
LOSS_TYPES_OF_DPO = ("ipo", "hinge")
"""Values of `objective.loss_type` under objective=dpo that others take for objectives of their own."""
ATTENTION = {
    "flash_attention_2": "flash_attention_2 fa2 flash_attention flash_attn true",
    "sdpa": "sdpa",
    "eager": "eager disabled",
    "flex": "flex_attention",
    "auto": "auto",
}


def same(key: str) -> Rule:
    """The same under another name."""
    return lambda value, _: TranslatedSetting({key: value})


def switch(on: dict[str, str], off: dict[str, str] | None = None, note: str = "") -> Rule:
    """Words for a switch that is on, and for one that is off."""

    def rule(value: str, _: ForeignSettings) -> TranslatedSetting:
        if is_true(value):
            return TranslatedSetting(on, note)
        return TranslatedSetting(off or {}, needless=not off)

    return rule


def choice(key: str, table: dict[str, str], note: str = "") -> Rule:
    """A choice of ours by one of theirs. `table`: for each of ours, the names that others have for it."""

    def rule(value: str, _: ForeignSettings) -> TranslatedSetting:
        for our_name, foreign_names in table.items():
            if value.lower() in foreign_names.split():
                return TranslatedSetting({key: our_name}, note)
        return TranslatedSetting(note=f"there is no {value} here; {key} is one of {', '.join(table)}")

    return rule


def no_equal(why: str) -> Rule:
    """Nothing here does that."""
    return lambda value, _: TranslatedSetting(note=why)


def needless(why: str) -> Rule:
    """Nothing is to be set."""
    return lambda value, _: TranslatedSetting(note=why, needless=True)


def batch(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """The documents of a rank's forward pass, and those of a whole step, which follow from it."""
    micro = parse_number(foreign.get(*MICRO))
    accumulation = parse_number(foreign.get("gradient_accumulation_steps")) or 1
    global_batch = parse_number(foreign.get("train_batch_size"))
    words = {} if micro is None else {"batch.micro": format_number(micro)}
    if global_batch is not None:
        return TranslatedSetting({**words, "batch.global": format_number(global_batch)})
    if micro is None:
        return TranslatedSetting(
            note="it is derived: set batch.global, the documents of a whole step (per device x accumulation x ranks)"
        )
    ranks = foreign.ranks or 1
    words["batch.global"] = format_number(micro * accumulation * ranks)
    rank_word = "ranks" if ranks > 1 else "rank"
    note = (
        f"batch.global: {format_number(micro)} per device x {format_number(accumulation)} accumulation x "
        f"{ranks} {rank_word}"
    )
    if not foreign.ranks:
        note += "; with more ranks, times their number"
    return TranslatedSetting(words, note)


def steps(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """A budget in steps. -1 means no limit in the other trainers."""
    if (parse_number(value) or 0) > 0:
        return TranslatedSetting({"budget.steps": value})
    return TranslatedSetting(note="no limit; budget.epochs says how long", needless=True)


def epochs(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """A budget in passes over the data, unless steps are given."""
    if (parse_number(foreign.get("max_steps")) or 0) > 0:
        return TranslatedSetting(
            note="max_steps goes before it there, and exactly one budget is given here", needless=True
        )
    passes = parse_number(value)
    return TranslatedSetting({"budget.epochs": value if passes is None else format_number(passes)})


def held_out(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """A share of the training data that is kept for evaluation. A number of documents cannot become one here."""
    share = parse_number(value) or 0
    if share == 0:
        return TranslatedSetting(needless=True)
    if share <= 0.5:
        return TranslatedSetting({"data.eval_share": format_number(share)})
    return TranslatedSetting(
        note=f"a number of documents is no share; set data.eval_share to {value} over the number of documents"
    )


def precision(kind: str) -> Rule:
    """fp16, bf16 and their like are switches there, and one setting here."""

    def rule(value: str, foreign: ForeignSettings) -> TranslatedSetting:
        if value.lower() == "auto":
            return TranslatedSetting({"precision": "auto"})
        if is_true(value) or value.lower() == "full":
            return TranslatedSetting({"precision": kind})
        other = "bf16" if kind == "fp16" else "fp16"
        if is_true(foreign.get(other)) or str(foreign.by_name.get(other)).lower() == "auto":
            return TranslatedSetting(needless=True)
        return TranslatedSetting({"precision": "fp32"}, "off means fp32 there; auto takes what the card has")

    return rule


def targets(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """Which layers get adapters."""
    names = list_entries(value)
    if names in (["all"], ["all-linear"], ["all_linear"]):
        return TranslatedSetting({"tuning": "lora", "tuning.targets": "all-linear"})
    regex = len(names) == 1 and re.search(r"[*()|\\^$]", value)
    return TranslatedSetting({"tuning": "lora", "tuning.targets": value if regex else f"[{','.join(names)}]"})


def tuning(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """lora, qlora, full, freeze, oft."""
    words_by_name = {
        "lora": {"tuning": "lora"},
        "qlora": {"tuning": "lora", "model.quantisation": "nf4"},
        "full": {"tuning": "full"},
        "freeze": {"tuning": "freeze"},
        "oft": {"tuning": "oft"},
    }
    words = words_by_name.get(value.lower())
    if words is None:
        return TranslatedSetting(note=f"there is no {value} here; `shardtune train --help` lists tuning=")
    return TranslatedSetting(words)


def bits(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """A frozen base in 4 or 8 bits."""
    quantisation = {"4": "nf4", "8": "int8"}.get(value)
    if quantisation is None:
        return TranslatedSetting(note="a frozen base is stored in 4 bits (nf4, fp4) or 8 (int8)")
    return TranslatedSetting({"model.quantisation": quantisation})


def report_to(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """The trackers of the run."""
    names = [name.lower() for name in list_entries(value)]
    words = {"logging.wandb": "online" if "wandb" in names or "all" in names else "disabled"}
    if "tensorboard" in names or "all" in names:
        words["logging.tensorboard"] = "true"
    for name in ("mlflow", "trackio"):
        if name in names:
            words[f"logging.{name}"] = "true"
    supported = ("wandb", "tensorboard", "mlflow", "trackio", "all", "none")
    unsupported = [name for name in names if name not in supported]
    note = f"{', '.join(unsupported)}: metrics.jsonl in the run directory has every row" if unsupported else ""
    return TranslatedSetting(words, note)


def betas(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """Both decay rates, which are one list here."""
    first = foreign.get("adam_beta1") or 0.9
    second = foreign.get("adam_beta2") or 0.999
    return TranslatedSetting({"optim.betas": f"[{first},{second}]"})


def warmup(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """Warmup steps, or (below one) a share of all steps."""
    steps_or_share = parse_number(value)
    if steps_or_share is not None and 0 < steps_or_share < 1:
        return TranslatedSetting({"schedule.warmup_share": format_number(steps_or_share)})
    if steps_or_share == 0:
        if foreign.get("warmup_ratio"):
            return TranslatedSetting(needless=True)  # the ratio says it
        return TranslatedSetting({"schedule.warmup_share": "0"})
    return TranslatedSetting({"schedule.warmup_steps": value})


def saving(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """Steps between checkpoints."""
    steps_or_share = parse_number(value)
    if steps_or_share is None or steps_or_share < 1:
        return TranslatedSetting(note="a share of the run; set checkpoint.every_steps or checkpoint.every_minutes")
    return TranslatedSetting({"checkpoint.every_steps": format_number(steps_or_share)})


def evaluating(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """Steps between evaluations."""
    steps_or_share = parse_number(value)
    if steps_or_share is None or steps_or_share < 1:
        return TranslatedSetting(note="a share of the run; set evaluation.every_steps")
    return TranslatedSetting({"evaluation.every_steps": format_number(steps_or_share)})


def deepspeed(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """A ZeRO stage out of a file of DeepSpeed, or out of its name if there is no such file."""
    path = Path(value).expanduser()
    tree = None
    if path.suffix == ".json" and path.is_file():
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return TranslatedSetting(note=f"{value} cannot be read ({error}); set strategy=zero1, zero2 or zero3")
    if isinstance(tree, dict):
        zero = tree.get("zero_optimization") or {}
        if str(zero.get("stage") or 0) not in ("0", "1", "2", "3"):
            return TranslatedSetting(note=f"{value} names no ZeRO stage; set strategy=zero1, zero2 or zero3")
        return TranslatedSetting(zero_words(zero), f"of {value}; `shardtune init from={value}` turns the rest")
    stage = re.search(r"(?:zero|stage|z)_?([0-3])", path.name.lower())
    if stage is None:
        return TranslatedSetting(
            note="a ZeRO stage is strategy=zero1, zero2 or zero3; the rest of DeepSpeed's file is derived"
        )
    return TranslatedSetting(zero_words({"stage": int(stage[1])}), f"as the name says ({value} is not here)")


def zero_words(zero: dict[str, object]) -> dict[str, str]:
    """Our words for a block `zero_optimization`: the strategy, and which states are offloaded to CPU or NVMe."""
    stage = int(str(zero.get("stage") or 0))
    if stage == 0:
        return {"strategy": "ddp"}
    words = {"strategy": f"zero{stage}"}
    our_names = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}
    for foreign_name, our_name in our_names.items():
        block = zero.get(foreign_name)
        if not isinstance(block, dict) or block.get("device") not in ("cpu", "nvme"):
            continue
        words[f"strategy.{our_name}"] = str(block["device"])
        if block["device"] == "nvme" and is_set(str(block.get("nvme_path"))):
            words["strategy.nvme_path"] = str(block["nvme_path"])
    return words


def fsdp(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """FSDP's options as a strategy: fsdp2, hsdp if they say hybrid, ddp if they shard nothing."""
    if not list_entries(value) or value.lower() == "false":
        return TranslatedSetting(needless=True)
    if any(name in value for name in ("no_shard", "NO_SHARD")):
        return TranslatedSetting({"strategy": "ddp"})
    words = {"strategy": "hsdp" if "hybrid" in value.lower() else "fsdp2"}
    if "shard_grad_op" in value.lower():
        words["strategy.reshard_after_forward"] = "false"
    if "offload" in value.lower():
        words["strategy.cpu_offload"] = "true"
    return TranslatedSetting(words)


def whole_prompts(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """Whether the loss covers prompts too."""
    if not is_true(value):
        return TranslatedSetting(needless=True)
    return TranslatedSetting(
        {"data.learn.roles": "[system,user,assistant]"}, "for conversations; plain prompts are never learned"
    )


def objective(value: str, foreign: ForeignSettings) -> TranslatedSetting:
    """An objective of another trainer. A variant of DPO's loss is an objective elsewhere, and a setting of dpo here."""
    if value.lower() in LOSS_TYPES_OF_DPO:
        return TranslatedSetting({"objective": "dpo", "objective.loss_type": value.lower()})
    return choice("objective", OBJECTIVES)(value, foreign)


CHOICES: dict[str, Rule] = {
    "optim": choice("optim", OPTIMIZERS),
    "schedule": choice("schedule", SCHEDULES),
    "objective": objective,
    "tuning": tuning,
}
"""Groups of ours whose choices others name otherwise."""
