"""Rules that translate the value of another trainer's setting, for settings where another name is not enough.

`names.py` says which setting has which rule. A rule returns settings of shardtune as typed, or a note why there are none.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from launch.config.importers.equivalent import (
    OtherTrainerSettings,
    TranslatedSetting,
    format_number,
    is_set,
    is_true,
    list_entries,
    parse_number,
)

Rule = Callable[[str, OtherTrainerSettings], TranslatedSetting]
"""Translates one setting of another trainer: takes its value as text, and all settings of that trainer.

Many rules need the value alone, some the other settings alone; they take both, because all rules are called alike.
"""
MICRO_BATCH_NAMES = (
    "per_device_train_batch_size",
    "micro_batch_size",
    "train_micro_batch_size_per_gpu",
    "per_gpu_train_batch_size",
)
OPTIMIZER_NAMES = {
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
SCHEDULE_NAMES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant constant_with_warmup",
    "wsd": "warmup_stable_decay wsd",
}
OBJECTIVE_NAMES = {
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
    "grpo": "grpo",
}
REWARD_SCALE_NAMES = {"std": "group true", "batch_std": "batch", "none": "none false"}
"""What advantages are divided by, and TRL's names for it."""
REWARD_COMBINATION_NAMES = {"sum": "sum_then_normalize", "normalised": "normalize_then_sum"}
"""How several rewards become one, and TRL's names for it."""
LOSS_AGGREGATION_NAMES = {
    "token": "token-mean",
    "answer": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
    "sum": "seq-mean-token-sum",
}
"""What the loss of a policy is divided by, and verl's names for it."""
ADVANTAGE_ESTIMATOR_NAMES = {
    "grpo": "grpo",
    "rloo": "rloo",
    "reinforce_pp": "reinforce_plus_plus reinforce_plus_plus_baseline",
}
"""Our choices, and verl's names of the estimators that they differ by."""
LOSS_TYPES_OF_DPO = ("ipo", "hinge")
"""Values of `objective.loss_type` under objective=dpo that others take for objectives of their own."""
ATTENTION_NAMES = {
    "flash_attention_2": "flash_attention_2 fa2 flash_attention flash_attn true",
    "sdpa": "sdpa",
    "eager": "eager disabled",
    "flex": "flex_attention",
    "auto": "auto",
}


def renamed_to(key: str) -> Rule:
    """A rule for a setting that exists here as `key`, with the same values: `learning_rate` is `optim.lr`."""
    return lambda value, _: TranslatedSetting({key: value})


def switch(overrides_if_on: dict[str, str], note: str = "") -> Rule:
    """Make a rule for a switch: our settings are `overrides_if_on` if it is true; if it is false, none is needed."""

    def rule(value: str, _: OtherTrainerSettings) -> TranslatedSetting:
        if is_true(value):
            return TranslatedSetting(overrides_if_on, note)
        return TranslatedSetting(not_needed=True)

    return rule


def choice(key: str, other_names_by_choice: dict[str, str], note: str = "") -> Rule:
    """Make a rule for a setting with named choices, which other trainers call otherwise: `adamw_torch` is `optim=adamw`.

    `key`: shardtune's setting.
    `other_names_by_choice`: for each choice of it the names elsewhere, with blanks between them: {"adamw": "adamw_torch
        adamw_hf"}.
    `note`: for the user, whatever the choice.
    An unknown name gets a note that lists the choices.
    """

    def rule(value: str, _: OtherTrainerSettings) -> TranslatedSetting:
        for our_choice, other_names in other_names_by_choice.items():
            if value.lower() in other_names.split():
                return TranslatedSetting({key: our_choice}, note)
        return TranslatedSetting(note=f"there is no {value} here; {key} is one of {', '.join(other_names_by_choice)}")

    return rule


def step_interval(key: str, advice: str) -> Rule:
    """Make a rule for a setting that says how often something is done: a number of steps is shardtune's setting `key`.

    Other trainers also take a share of the run (below 1), which has no equivalent: then a note gives the `advice`.
    """

    def rule(value: str, _: OtherTrainerSettings) -> TranslatedSetting:
        steps_or_share = parse_number(value)
        if steps_or_share is None or steps_or_share < 1:
            return TranslatedSetting(note=f"a share of the run; {advice}")
        return TranslatedSetting({key: format_number(steps_or_share)})

    return rule


def without_equivalent(why: str) -> Rule:
    """A rule for a setting that shardtune has no equivalent for. `why`: the note for the user."""
    return lambda value, _: TranslatedSetting(note=why)


def not_needed(why: str) -> Rule:
    """A rule for a setting that can be left out. `why`: the note for the user."""
    return lambda value, _: TranslatedSetting(note=why, not_needed=True)


def batch_sizes(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Our `batch.micro` and `batch.global` from another trainer's batch size per device, accumulation steps and ranks.

    2 per device, 8 accumulation steps and 4 ranks are batch.micro=2 batch.global=64. If the other trainer's settings have a
    global batch, that is taken instead of the product. Without a batch per device and a global one there is only a note.

    `value` is not read: this is the rule of each of these settings, and each gives the same result.
    `other_settings`: all settings as text, and the number of ranks (None: not known, taken as 1, which the note says).
    """
    micro = parse_number(other_settings.get(*MICRO_BATCH_NAMES))
    accumulation = parse_number(other_settings.get("gradient_accumulation_steps")) or 1
    global_batch = parse_number(other_settings.get("train_batch_size"))
    overrides = {} if micro is None else {"batch.micro": format_number(micro)}
    if global_batch is not None:
        return TranslatedSetting({**overrides, "batch.global": format_number(global_batch)})
    if micro is None:
        return TranslatedSetting(
            note="it is derived: set batch.global, the documents of a whole step (per device x accumulation x ranks)"
        )
    ranks = other_settings.ranks or 1
    overrides["batch.global"] = format_number(micro * accumulation * ranks)
    ranks_text = f"{ranks} ranks" if ranks > 1 else f"{ranks} rank"
    note = (
        f"batch.global: {format_number(micro)} per device x {format_number(accumulation)} accumulation x {ranks_text}"
    )
    if not other_settings.ranks:
        note += "; with more ranks, times their number"
    return TranslatedSetting(overrides, note)


def step_budget(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """A budget in steps. -1 means no limit in the other trainers."""
    if (parse_number(value) or 0) > 0:
        return TranslatedSetting({"budget.steps": value})
    return TranslatedSetting(note="no limit; budget.epochs says how long", not_needed=True)


def epoch_budget(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Our `budget.epochs` for a number of passes over the data; not needed if `other_settings` limits the steps as well."""
    if (parse_number(other_settings.get("max_steps")) or 0) > 0:
        return TranslatedSetting(
            note="max_steps goes before it there, and exactly one budget is given here", not_needed=True
        )
    passes = parse_number(value)
    epochs = value if passes is None else format_number(passes)
    return TranslatedSetting({"budget.epochs": epochs})


def held_out_share(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Our `data.eval_share`, the share of the training data kept for evaluation: `0.1` is data.eval_share=0.1.

    Other trainers also take a number of documents there, which gives a note, as shardtune would need to know how many there are.
    0 needs no setting. `other_settings` is not read; every rule takes it.
    """
    share = parse_number(value) or 0
    if share == 0:
        return TranslatedSetting(not_needed=True)
    if share <= 0.5:  # more is a number of documents: nobody keeps more than half of the data back
        return TranslatedSetting({"data.eval_share": format_number(share)})
    return TranslatedSetting(
        note=f"a number of documents is no share; set data.eval_share to {value} over the number of documents"
    )


def precision_switch(kind: str) -> Rule:
    """A rule for the switch `fp16` or `bf16` (`kind`) of other trainers: see `_translate_precision_switch`."""
    return lambda value, other_settings: _translate_precision_switch(kind, value, other_settings)


def _translate_precision_switch(kind: str, value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Shardtune's one setting `precision` for a switch `fp16` or `bf16`, which are two switches in other trainers.

    `kind`: which of the two.
    `value`: its text, such as `true`, `auto` or `full`.
    `other_settings`: all settings, of which the other switch is read.

    - The switch is auto: precision=auto.
    - It is on: precision=<kind>.
    - It is off and the other one is on or auto: no setting is needed, since the other one decides.
    - It is off, and so is the other one: precision=fp32.
    """
    if value.lower() == "auto":
        return TranslatedSetting({"precision": "auto"})
    if is_true(value) or value.lower() == "full":
        return TranslatedSetting({"precision": kind})
    other_kind = "bf16" if kind == "fp16" else "fp16"
    # Read from the mapping itself, since `get` takes auto as not set.
    is_other_auto = str(other_settings.value_by_name.get(other_kind)).lower() == "auto"
    if is_true(other_settings.get(other_kind)) or is_other_auto:
        return TranslatedSetting(not_needed=True)
    return TranslatedSetting({"precision": "fp32"}, "off means fp32 there; auto takes what the card has")


def lora_targets(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Our `tuning.targets`, the layers that get LoRA adapters: all linear ones, a regular expression, or a list of names.

    `all-linear`, or `q_proj,v_proj`, which is tuning.targets=[q_proj,v_proj].
    """
    names = list_entries(value)
    if names in (["all"], ["all-linear"], ["all_linear"]):
        return TranslatedSetting({"tuning": "lora", "tuning.targets": "all-linear"})
    # One name with characters of a regular expression: it may hold commas, so it is passed on whole.
    is_regex = len(names) == 1 and re.search(r"[*()|\\^$]", value)
    layers = value if is_regex else f"[{','.join(names)}]"
    return TranslatedSetting({"tuning": "lora", "tuning.targets": layers})


def tuning_method(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Our `tuning` for the name of a tuning method in another trainer: `qlora` is tuning=lora model.quantisation=nf4.

    An unknown name gets a note. `other_settings` is not read; every rule takes it.
    """
    overrides_by_name = {
        "lora": {"tuning": "lora"},
        "qlora": {"tuning": "lora", "model.quantisation": "nf4"},
        "full": {"tuning": "full"},
        "freeze": {"tuning": "freeze"},
        "oft": {"tuning": "oft"},
        "prompt_tuning": {"tuning": "prompt"},
        "prefix_tuning": {"tuning": "prefix"},
        "ptuning": {"tuning": "p_tuning"},
        "adapter": {"tuning": "bottleneck"},
        "adapters": {"tuning": "bottleneck"},
        "houlsby": {"tuning": "bottleneck"},
        "pfeiffer": {"tuning": "bottleneck", "tuning.placement": "pfeiffer"},
    }
    overrides = overrides_by_name.get(value.lower())
    if overrides is None:
        return TranslatedSetting(note=f"there is no {value} here; `shardtune train --help` lists tuning=")
    return TranslatedSetting(overrides)


def quantisation_bits(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Our `model.quantisation` for a number of bits in which the frozen base model is stored."""
    quantisation = {"4": "nf4", "8": "int8"}.get(value)
    if quantisation is None:
        return TranslatedSetting(note="a frozen base is stored in 4 bits (nf4, fp4) or 8 (int8)")
    return TranslatedSetting({"model.quantisation": quantisation})


def report_to(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Our `logging` settings for a list of trackers: `[wandb]` is logging.wandb=online, `none` is logging.wandb=disabled.

    `all` turns on wandb and tensorboard alone, since the others need a server or an account. Trackers that shardtune does not
    know get a note. `other_settings` is not read; every rule takes it.
    """
    trackers = [name.lower() for name in list_entries(value)]
    has_all = "all" in trackers
    # Always set, since shardtune's own default, auto, logs to wandb: as WANDB_MODE says, else offline.
    overrides = {"logging.wandb": "online" if has_all or "wandb" in trackers else "disabled"}
    if has_all or "tensorboard" in trackers:
        overrides["logging.tensorboard"] = "true"
    for name in ("mlflow", "trackio"):
        if name in trackers:
            overrides[f"logging.{name}"] = "true"
    supported = ("wandb", "tensorboard", "mlflow", "trackio", "all", "none")
    unsupported = [name for name in trackers if name not in supported]
    note = f"{', '.join(unsupported)}: metrics.jsonl in the run directory has every row" if unsupported else ""
    return TranslatedSetting(overrides, note)


def adam_betas(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Adam's two decay rates, which are two settings in other trainers and one list, `optim.betas`, here."""
    first = other_settings.get("adam_beta1") or 0.9
    second = other_settings.get("adam_beta2") or 0.999
    return TranslatedSetting({"optim.betas": f"[{first},{second}]"})


def warmup_length(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Our warmup for another trainer's, which is a number of steps, or a share of all steps if below 1.

    `100` is schedule.warmup_steps=100, `0.1` is schedule.warmup_share=0.1, `0` is no warmup, unless `other_settings` also sets
    `warmup_ratio`. Text that is no number stays as it is, so that our own validation refuses it.
    """
    steps_or_share = parse_number(value)
    if steps_or_share is not None and 0 < steps_or_share < 1:
        return TranslatedSetting({"schedule.warmup_share": format_number(steps_or_share)})
    if steps_or_share == 0:
        if other_settings.get("warmup_ratio"):
            return TranslatedSetting(not_needed=True)  # the ratio says it
        return TranslatedSetting({"schedule.warmup_share": "0"})
    return TranslatedSetting({"schedule.warmup_steps": value})


def deepspeed_stage(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """The strategy of shardtune for the setting `deepspeed: <path>`, for a message about that setting on the command line.

    Only the ZeRO block of the file is read here; `shardtune init from=` translates all of it. By the path `value`:

    - The file is here: by the ZeRO stage in it; a note if it cannot be read or has no such stage.
    - It is not here: by the stage in its name, so that `ds_z3.json` is strategy=zero3; a note if the name says none.

    `other_settings` is not read; every rule takes it.
    """
    path = Path(value).expanduser()
    deepspeed_config = None
    if path.suffix == ".json" and path.is_file():
        try:
            deepspeed_config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return TranslatedSetting(note=f"{value} cannot be read ({error}); set strategy=zero1, zero2 or zero3")
    if isinstance(deepspeed_config, dict):
        zero_block = deepspeed_config.get("zero_optimization") or {}
        if str(zero_block.get("stage") or 0) not in ("0", "1", "2", "3"):
            return TranslatedSetting(note=f"{value} names no ZeRO stage; set strategy=zero1, zero2 or zero3")
        note = f"of {value}; `shardtune init from={value}` turns the rest"
        return TranslatedSetting(zero_overrides(zero_block), note)
    # `ds_zero3.json`, `stage_2.json` or `z3.json`.
    stage = re.search(r"(?:zero|stage|z)_?([0-3])", path.name.lower())
    if stage is None:
        return TranslatedSetting(
            note="a ZeRO stage is strategy=zero1, zero2 or zero3; the rest of DeepSpeed's file is derived"
        )
    return TranslatedSetting(zero_overrides({"stage": int(stage[1])}), f"as the name says ({value} is not here)")


def zero_overrides(zero_block: dict[str, object]) -> dict[str, str]:
    """Settings of shardtune for DeepSpeed's block `zero_optimization`: the strategy, and what is offloaded to CPU or NVMe.

    {"stage": 3, "offload_param": {"device": "cpu"}} is {"strategy": "zero3", "strategy.offload_parameters": "cpu"}. Stage 0, the
    default, shards nothing: {"strategy": "ddp"}. Raises ValueError if the stage is no number.
    """
    stage = int(str(zero_block.get("stage") or 0))
    if stage == 0:
        return {"strategy": "ddp"}
    overrides = {"strategy": f"zero{stage}"}
    our_names = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}
    for deepspeed_key, our_name in our_names.items():
        offload = zero_block.get(deepspeed_key)
        if not isinstance(offload, dict) or offload.get("device") not in ("cpu", "nvme"):
            continue
        overrides[f"strategy.{our_name}"] = str(offload["device"])
        if offload["device"] == "nvme" and is_set(str(offload.get("nvme_path"))):
            overrides["strategy.nvme_path"] = str(offload["nvme_path"])
    return overrides


def fsdp_strategy(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """The strategy of shardtune for FSDP's options: `full_shard,offload` is strategy=fsdp2 strategy.cpu_offload=true.

    `value`: options separated by commas, in other trainers' words:

    - none, or false: nothing is needed;
    - `no_shard`: ddp, with a note if `offload` is beside it, since ddp keeps its parameters on the GPUs;
    - one with `hybrid`: hsdp; anything else: fsdp2. Under `shard_grad_op` it keeps gathered parameters for the backward pass (as
      ZeRO 2 does).

    `other_settings` is not read; every rule takes it.
    """
    options = value.lower()
    if not list_entries(value) or options == "false":
        return TranslatedSetting(not_needed=True)
    if "no_shard" in options:
        note = "ddp offloads nothing; strategy=fsdp2 strategy.cpu_offload=true shards and offloads"
        return TranslatedSetting({"strategy": "ddp"}, note=note if "offload" in options else "")
    overrides = {"strategy": "hsdp" if "hybrid" in options else "fsdp2"}
    if "shard_grad_op" in options:
        overrides["strategy.reshard_after_forward"] = "false"
    if "offload" in options:
        overrides["strategy.cpu_offload"] = "true"
    return TranslatedSetting(overrides)


def train_on_prompts(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Our `data.learn.roles` for a switch that lets the loss cover prompts as well as answers."""
    if not is_true(value):
        return TranslatedSetting(not_needed=True)
    return TranslatedSetting(
        {"data.learn.roles": "[system,user,assistant]"}, "for conversations; plain prompts are never learned"
    )


def objective_or_dpo_loss(value: str, other_settings: OtherTrainerSettings) -> TranslatedSetting:
    """Our `objective` for another trainer's name. A variant of DPO's loss is an objective elsewhere, a setting of dpo here."""
    if value.lower() in LOSS_TYPES_OF_DPO:
        return TranslatedSetting({"objective": "dpo", "objective.loss_type": value.lower()})
    return choice("objective", OBJECTIVE_NAMES)(value, other_settings)


def translate_optimizer_name(name: str) -> TranslatedSetting:
    """Our `optim` for another trainer's name of an optimizer: `adamw_torch` is optim=adamw; a note for an unknown name."""
    return choice("optim", OPTIMIZER_NAMES)(name, OtherTrainerSettings({}))


RULE_BY_GROUP: dict[str, Rule] = {
    "optim": choice("optim", OPTIMIZER_NAMES),
    "schedule": choice("schedule", SCHEDULE_NAMES),
    "objective": objective_or_dpo_loss,
    "tuning": tuning_method,
}
"""Groups of ours whose choices others name otherwise."""
