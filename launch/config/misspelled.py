"""Names that people type who guess or know other trainers, each with the setting that they need here.

`launch.config.hints` looks here before it looks for a similar name, since a similar name may do something else.
"""

REPLACEMENT_BY_WRONG_KEY = {
    "data.train_path": "data.path={value}",
    "data.train": "data.path={value}",
    "data.train_file": "data.path={value}",
    "datasets": "data.path={value}; several files are data.path=[a.jsonl,b.jsonl], several sources data.sources",
    "data.datasets": "data.path={value}; several files are data.path=[a.jsonl,b.jsonl], several sources data.sources",
    "run.name": "logging.name={value}",
    "gpus": "launcher.processes={value}",
    "strategy.offload": "strategy.cpu_offload=true with strategy=fsdp2, or strategy.offload_optimizer=cpu with strategy=zero3",
    "evaluation.strategy": "evaluation.every_steps=<steps>; evaluation=none leaves it out",
    "early_stopping": "evaluation.patience=<evaluations without improvement> and evaluation.every_steps=<steps>",
}
"""What to type in place of a key; `{value}` is what was typed behind it."""
ADVICE_BY_FLAG_OF_OTHER_LAUNCHERS = {
    "multi_gpu": "every GPU of this host gets a process, if the strategy shares; launcher.processes=<number> says fewer",
}
"""Switches of other launchers, without a value, and what happens here instead."""
COMMAND_BY_WRONG_VERB = {
    "data": "prepare --print",
    "merge": "export <run> merge=true",
    "sweep": "train -m",
    "push": "export <run> to=hub:<owner>/<name>",
    "finetune": "train",
    "generate": "chat",
    "inference": "chat",
}
"""What to type in place of a verb that does not exist here: the command that does its job."""


def replacement_text(key: str, value: str) -> str | None:
    """What to type in place of `key=value`, for a key that people know from other trainers; None if it is no such key.

    `gpus`, `4` -> `type launcher.processes=4`. A key in capitals is taken for an environment variable.
    """
    if key in REPLACEMENT_BY_WRONG_KEY:
        return f"type {REPLACEMENT_BY_WRONG_KEY[key].format(value=value)}"
    if key.isupper():
        return f"a variable of the environment goes before the command: {key}={value} shardtune ..."
    return None
