"""Experiment files composed as a user types them, for models of the published shapes: no file of a model is needed."""

import re

from launch.config.choices import CONF_DIR
from launch.config.compose import compose_config
from trainer.config.parallel import dp_size_of
from trainer.planner.depth_extrapolation import ExtrapolatedStep
from trainer.planner.simulation import simulate_depth

LONG_ROWS = ("llama3_8b_1m_lora_fsdp2", "llama3_8b_1m_full_fsdp2", "llama3_8b_3m_lora_fsdp2")
"""Experiments whose ranks share rows of a million tokens and more."""
DEALT_EXPERTS = ("deepseek_v3_lora_fsdp2",)
"""Experiments whose experts are distributed over ranks."""
NAMES = ("llama2_7b_lora_fsdp2", "qwen3_30b_a3b_lora_fsdp2", *LONG_ROWS, *DEALT_EXPERTS)
"""Experiments whose files say what a simulated step takes."""


def simulated_experiment(name: str, *more: str) -> ExtrapolatedStep:
    """The last rank's step of one full micro-batch, the model at its full depth; with `more` words."""
    config = compose_config(
        [f"experiment={name}", "data.path=train.jsonl", "precision=bf16", *more], check=False
    ).config
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    world = int(re.search(r"^# Hardware: (\d+) GPUs", text, re.MULTILINE)[1])
    config.launcher.processes = world
    config.batch["global"] = config.batch["micro"] * dp_size_of(config, world)
    lengths = [config.data.max_length] * config.batch["micro"]
    return simulate_depth(config, lengths, rank=world - 1, world_size=world, local_world_size=world)
