"""Translations of values, for settings where another name is not enough."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from launch.config.importers.equivalent import (
    ForeignSettings,
    TranslatedSetting,
    is_set,
    is_true,
    listed,
    number,
    shown,
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


def switch(on: dict[str, str], off: dict[str, str] | None = None, said: str = "") -> Rule:
    """Words for a switch that is on, and for one that is off."""
    return lambda value, _: (
        TranslatedSetting(on, said) if is_true(value) else TranslatedSetting(off or {}, needless=not off)
    )


def choice(key: str, table: dict[str, str], said: str = "") -> Rule:
    """A name of ours by one of theirs."""

    def rule(value: str, _: ForeignSettings) -> TranslatedSetting:
        ours = next((name for name, others in table.items() if value.lower() in others.split()), None)
        return (
            TranslatedSetting({key: ours}, said)
            if ours
            else TranslatedSetting(said=f"there is no {value} here; {key} is one of {', '.join(table)}")
        )

    return rule


def none(why: str) -> Rule:
    """Nothing here does that."""
    return lambda value, _: TranslatedSetting(said=why)


def needless(why: str) -> Rule:
    """Nothing is to be set."""
    return lambda value, _: TranslatedSetting(said=why, needless=True)


def batch(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """Documents a rank and forward pass, and what follows for the whole step."""
    micro, times = number(theirs.get(*MICRO)), number(theirs.get("gradient_accumulation_steps")) or 1
    whole = number(theirs.get("train_batch_size"))
    if micro is None and whole is None:
        return TranslatedSetting(
            said="it is derived: set batch.global, the documents of a whole step (per device x accumulation x ranks)"
        )
    words = {} if micro is None else {"batch.micro": shown(micro)}
    if whole is not None:
        return TranslatedSetting({**words, "batch.global": shown(whole)})
    assert micro is not None
    ranks = theirs.ranks or 1
    reckoned = f"{shown(micro)} per device x {shown(times)} accumulation x {ranks} rank{'s' if ranks > 1 else ''}"
    more = "" if theirs.ranks else "; with more ranks, times their number"
    return TranslatedSetting({**words, "batch.global": shown(micro * times * ranks)}, f"batch.global: {reckoned}{more}")


def steps(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """A budget in steps, where it is one."""
    if (number(value) or 0) > 0:
        return TranslatedSetting({"budget.steps": value})
    return TranslatedSetting(said="no limit; budget.epochs says how long", needless=True)


def epochs(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """A budget in passes, unless steps are given."""
    if (number(theirs.get("max_steps")) or 0) > 0:
        return TranslatedSetting(
            said="max_steps goes before it there, and exactly one budget is given here", needless=True
        )
    return TranslatedSetting({"budget.epochs": shown(passes) if (passes := number(value)) is not None else value})


def held_out(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """A share of the training data; a number of documents is none."""
    share = number(value) or 0
    if share == 0:
        return TranslatedSetting(needless=True)
    if share <= 0.5:
        return TranslatedSetting({"data.eval_share": shown(share)})
    return TranslatedSetting(
        said=f"a number of documents is no share; set data.eval_share to {value} over the number of documents"
    )


def precision(kind: str) -> Rule:
    """fp16, bf16 and their like are switches there, and one setting here."""

    def rule(value: str, theirs: ForeignSettings) -> TranslatedSetting:
        if value.lower() == "auto":
            return TranslatedSetting({"precision": "auto"})
        if is_true(value) or value.lower() == "full":
            return TranslatedSetting({"precision": kind})
        other = "bf16" if kind == "fp16" else "fp16"
        if is_true(theirs.get(other)) or str(theirs.given.get(other)).lower() == "auto":
            return TranslatedSetting(needless=True)
        return TranslatedSetting({"precision": "fp32"}, "off means fp32 there; auto takes what the card has")

    return rule


def targets(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """Which layers get adapters."""
    names = listed(value)
    if names in (["all"], ["all-linear"], ["all_linear"]):
        return TranslatedSetting({"tuning": "lora", "tuning.targets": "all-linear"})
    regex = len(names) == 1 and re.search(r"[*()|\\^$]", value)
    return TranslatedSetting({"tuning": "lora", "tuning.targets": value if regex else f"[{','.join(names)}]"})


def tuning(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """lora, qlora, full, freeze."""
    words = {
        "lora": {"tuning": "lora"},
        "qlora": {"tuning": "lora", "model.quantisation": "nf4"},
        "full": {"tuning": "full"},
        "freeze": {"tuning": "freeze"},
        "oft": {"tuning": "oft"},
    }.get(value.lower())
    return (
        TranslatedSetting(words)
        if words
        else TranslatedSetting(said=f"there is no {value} here; `shardtune train --help` lists tuning=")
    )


def bits(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """A base in 4 or 8 bits."""
    ours = {"4": "nf4", "8": "int8"}.get(value)
    return (
        TranslatedSetting({"model.quantisation": ours})
        if ours
        else TranslatedSetting(said="a frozen base is stored in 4 bits (nf4, fp4) or 8 (int8)")
    )


def report_to(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """Who hears of the run."""
    names = [name.lower() for name in listed(value)]
    words = {"logging.wandb": "online" if {"wandb", "all"} & set(names) else "disabled"}
    if {"tensorboard", "all"} & set(names):
        words["logging.tensorboard"] = "true"
    words |= {f"logging.{name}": "true" for name in ("mlflow", "trackio") if name in names}
    other = [name for name in names if name not in ("wandb", "tensorboard", "mlflow", "trackio", "all", "none")]
    return TranslatedSetting(
        words, f"{', '.join(other)}: metrics.jsonl in the run directory has every row" if other else ""
    )


def betas(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """Both decay rates are one list here."""
    first, second = (theirs.get(f"adam_beta{n}") for n in (1, 2))
    return TranslatedSetting({"optim.betas": f"[{first or 0.9},{second or 0.999}]"})


def warmup(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """Steps, or (below one) a share of all steps."""
    given = number(value)
    if given is not None and 0 < given < 1:
        return TranslatedSetting({"schedule.warmup_share": shown(given)})
    if given == 0:
        return (
            TranslatedSetting({"schedule.warmup_share": "0"})
            if not theirs.get("warmup_ratio")
            else TranslatedSetting(needless=True)
        )
    return TranslatedSetting({"schedule.warmup_steps": value})


def saving(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """Steps between checkpoints."""
    given = number(value)
    if given is None or given < 1:
        return TranslatedSetting(said="a share of the run; set checkpoint.every_steps or checkpoint.every_minutes")
    return TranslatedSetting({"checkpoint.every_steps": shown(given)})


def evaluating(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """Steps between evaluations."""
    given = number(value)
    if given is None or given < 1:
        return TranslatedSetting(said="a share of the run; set evaluation.every_steps")
    return TranslatedSetting({"evaluation.every_steps": shown(given)})


def deepspeed(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """A ZeRO stage out of a file of DeepSpeed, or out of its name where there is no such file."""
    path = Path(value).expanduser()
    tree = None
    if path.suffix == ".json" and path.is_file():
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return TranslatedSetting(said=f"{value} cannot be read ({error}); set strategy=zero1, zero2 or zero3")
    if isinstance(tree, dict):
        zero = tree.get("zero_optimization") or {}
        if str(zero.get("stage") or 0) not in ("0", "1", "2", "3"):
            return TranslatedSetting(said=f"{value} names no ZeRO stage; set strategy=zero1, zero2 or zero3")
        return TranslatedSetting(zero_words(zero), f"of {value}; `shardtune init from={value}` turns the rest")
    stage = re.search(r"(?:zero|stage|z)_?([0-3])", path.name.lower())
    if stage is None:
        return TranslatedSetting(
            said="a ZeRO stage is strategy=zero1, zero2 or zero3; the rest of DeepSpeed's file is derived"
        )
    return TranslatedSetting(zero_words({"stage": int(stage[1])}), f"as the name says ({value} is not here)")


def zero_words(zero: dict[str, object]) -> dict[str, str]:
    """The strategy of a `zero_optimization`."""
    stage = int(str(zero.get("stage") or 0))
    if stage == 0:
        return {"strategy": "ddp"}
    words = {"strategy": f"zero{stage}"}
    for theirs, ours in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        block = zero.get(theirs)
        device = block.get("device") if isinstance(block, dict) else None
        if device in ("cpu", "nvme"):
            words[f"strategy.{ours}"] = str(device)
            if device == "nvme" and isinstance(block, dict) and is_set(str(block.get("nvme_path"))):
                words["strategy.nvme_path"] = str(block["nvme_path"])
    return words


def fsdp(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """Sharded where it is asked for at all."""
    if not listed(value) or value.lower() == "false":
        return TranslatedSetting(needless=True)
    if any(name in value for name in ("no_shard", "NO_SHARD")):
        return TranslatedSetting({"strategy": "ddp"})
    words = {"strategy": "hsdp" if "hybrid" in value.lower() else "fsdp2"}
    if "shard_grad_op" in value.lower():
        words["strategy.reshard_after_forward"] = "false"
    if "offload" in value.lower():
        words["strategy.cpu_offload"] = "true"
    return TranslatedSetting(words)


def whole_prompts(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """Whether the loss covers prompts too."""
    if not is_true(value):
        return TranslatedSetting(needless=True)
    return TranslatedSetting(
        {"data.learn.roles": "[system,user,assistant]"}, "for conversations; plain prompts are never learned"
    )


def objective(value: str, theirs: ForeignSettings) -> TranslatedSetting:
    """An objective of another trainer. A variant of DPO's loss is an objective elsewhere, and a setting of dpo here."""
    if value.lower() in LOSS_TYPES_OF_DPO:
        return TranslatedSetting({"objective": "dpo", "objective.loss_type": value.lower()})
    return choice("objective", OBJECTIVES)(value, theirs)


CHOICES: dict[str, Rule] = {
    "optim": choice("optim", OPTIMIZERS),
    "schedule": choice("schedule", SCHEDULES),
    "objective": objective,
    "tuning": tuning,
}
"""Groups of ours whose choices others name otherwise."""
