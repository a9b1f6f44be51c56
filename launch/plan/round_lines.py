"""What a plan and a dry run say of a round of online learning: seconds of writing, scoring and training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from launch.cluster.long_steps import REACHED_PEAK_SHARE
from launch.config.prices import cards, cards_of_gpu_kind
from strategies.base import Precision
from trainer.config.run import RunConfig
from trainer.model.architecture import text_model_config, width_and_num_blocks
from trainer.planner.hardware import GIB, Card
from trainer.planner.round_time import RoundLoad, RoundTime, WritingModel, round_load, round_time
from trainer.session.run_facts import model_flops_per_token
from trainer.step import BuiltModel

STATE_BYTES = 12
"""Bytes of a trained parameter between two steps beside its weight: the two moments of Adam and a weight, in float32."""
NOT_MEASURED = "not known before rewards have run: shardtune evaluate with the settings of the run measures it"


def round_lines(load: RoundLoad, planned: RoundTime) -> list[str]:
    """Lines for people, not folded: the seconds of a round by its parts, and what writing holds."""
    scoring = NOT_MEASURED if planned.score_s is None else f"{planned.score_s:.1f} s"
    where = "whole on each rank" if planned.gathers_once else "gathered block by block for each token, which is slow"
    steps = "1 step" if load.steps == 1 else f"{load.steps} steps"
    return [
        f"a round of {load.prompts} prompts x {load.group_size} answers of {load.new_tokens:,} tokens takes at most "
        f"{planned.total_s:.1f} s, planned: writing {planned.write_s:.1f} s, training {planned.train_s:.1f} s ({steps}); "
        f"scoring is {scoring}",
        f"while it writes, a rank needs {planned.writing_bytes / GIB:.2f} GiB for weights ({where}) and keys of the answers",
    ]


def round_facts(planned: RoundTime | None) -> dict[str, Any] | None:
    """The same as JSON values: seconds, and GiB of a rank; None without rounds."""
    if planned is None:
        return None
    return {
        "writing": planned.write_s,
        "scoring": planned.score_s,
        "training": planned.train_s,
        "total": planned.total_s,
        "steps": planned.steps,
        "writing_gib": planned.writing_bytes / GIB,
        "gathers_once": planned.gathers_once,
    }


def dry_run_lines(
    config: RunConfig,
    built: BuiltModel,
    prompts: Any,
    mean_length: float,
    gpu_kinds: Iterable[str],
    parameters: tuple[int, int],
) -> list[str]:
    """Lines on the seconds of a round (answers written, scored and trained on) for a run that is not started.

    Empty if the run generates no answers. `prompts`: lengths of the prompts in tokens. `mean_length`: tokens of a prompt with its
    answer. `gpu_kinds`: the cluster's names for the GPUs of the job, such as "h100"; without any, the GPU of this machine counts.
    `parameters`: how many the model has, and how many of them are trained.
    """
    load = round_load(config, built.config, float(prompts.mean()), int(prompts.max(initial=0)))
    if load is None:
        return []
    card = _slowest_card(config, gpu_kinds)
    if card is None:
        return [
            "seconds of a round are not known for this processor: shardtune evaluate with the settings of the run measures them "
            "on its first prompts"
        ]
    # Seconds of a training step: its floating-point operations at the share of the GPU's peak that runs reach.
    total, trained = parameters
    ranks = config.launcher.per_node * config.launcher.nodes
    flops = model_flops_per_token(built, mean_length, 0.5) * mean_length * config.batch["global"]
    step_s = flops / (ranks * REACHED_PEAK_SHARE * card.tflops(config.precision) * 1e12)
    itemsize = 4 if config.precision is Precision.fp32 else 2
    vocabulary = int(getattr(text_model_config(built.config), "vocab_size", 0))
    _, blocks = width_and_num_blocks(built.plain)
    planned = round_time(
        load,
        WritingModel(total, blocks, vocabulary, itemsize),
        config,
        card,
        ranks=ranks,
        nodes=config.launcher.nodes,
        step_s=step_s,
        other_bytes=(total * itemsize + trained * STATE_BYTES) / ranks,
    )
    return [f"{card.name}: {line}" for line in round_lines(load, planned)]


def _slowest_card(config: RunConfig, gpu_kinds: Iterable[str]) -> Card | None:
    """The GPU with the slowest memory of those that a job may get, or the GPU of this machine; None if it is not known."""
    if str(config.run.device) != "cuda":
        return None
    known: list[dict[str, Any]] = []
    for kind in gpu_kinds:
        known += cards_of_gpu_kind(kind)
    if not known and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = [card for card in cards().values() if card["name"] == name]
    found = [Card(**card) for card in known]
    return min(found, key=lambda card: card.memory_gb_s, default=None)
