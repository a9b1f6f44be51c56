"""What a plan and a dry run say of a round of online learning: seconds of writing, scoring and training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from launch.cluster.long_steps import REACHED_PEAK_SHARE
from launch.config.prices import cards, cards_of_gpu_kind
from strategies.base import Precision
from trainer.config.run import RunConfig
from trainer.model.architecture import text_model_config, width_and_num_blocks
from trainer.planner.hardware import GIB, Card
from trainer.planner.round_time import GeneratorSizes, RoundSizes, RoundTime, estimate_round_time, round_sizes_of_run
from trainer.session.run_facts import model_flops_per_token
from trainer.step import BuiltModel

TRAINING_STATE_BYTES = 12
"""Bytes of a trained parameter between two steps beside its weight: the two moments of Adam and a weight, in float32."""
SCORING_NOT_MEASURED_TEXT = (
    "not known before rewards have run: shardtune evaluate with the settings of the run measures it"
)


def round_lines(sizes: RoundSizes, planned: RoundTime) -> list[str]:
    """Tell how long a round of reinforcement learning takes, by its stages, and what memory it needs while answers are written.

    In a round the model writes answers to prompts, rewards score them, and one step or several train on them. `sizes`: how many
    answers, and how long; `planned`: predicted seconds and bytes. Returns two lines that are not wrapped.
    """
    scoring = SCORING_NOT_MEASURED_TEXT if planned.scoring_s is None else f"{planned.scoring_s:.1f} s"
    weights_place = (
        "whole on each rank"
        if planned.gathers_weights_once
        else "gathered block by block for each token, which is slow"
    )
    steps = "1 step" if sizes.num_steps == 1 else f"{sizes.num_steps} steps"
    return [
        f"a round of {sizes.num_prompts} prompts x {sizes.group_size} answers of {sizes.max_new_tokens:,} tokens takes at most "
        f"{planned.total_s:.1f} s, planned: writing {planned.generation_s:.1f} s, training {planned.training_s:.1f} s ({steps}); "
        f"scoring is {scoring}",
        f"while it writes, a rank needs {planned.generation_bytes / GIB:.2f} GiB for weights ({weights_place}) and "
        "keys of the answers",
    ]


def round_as_json(planned: RoundTime | None) -> dict[str, Any] | None:
    """The predicted round of reinforcement learning for `plan --json`: {"writing": 12.5, "scoring": None, ..., "steps": 4}.

    In seconds, and in GiB what a rank needs while it writes answers. `scoring` is None if it was not measured. None for a run
    without rounds. Scripts read the keys, so they stay.
    """
    if planned is None:
        return None
    return {
        "writing": planned.generation_s,
        "scoring": planned.scoring_s,
        "training": planned.training_s,
        "total": planned.total_s,
        "steps": planned.num_steps,
        "writing_gib": planned.generation_bytes / GIB,
        "gathers_once": planned.gathers_weights_once,
    }


def round_lines_of_dry_run(
    config: RunConfig,
    built: BuiltModel,
    *,
    prompt_lengths: np.ndarray,
    mean_length: float,
    gpu_kinds: Iterable[str],
    num_parameters: int,
    num_trained: int,
) -> list[str]:
    """Say in `train --dry-run` how long a round of reinforcement learning will take (answers written, scored and trained on).

    No lines if the run generates no answers. The time is predicted for the slowest GPU that the job may get.

    Arguments:
        prompt_lengths: int64, tokens of each prompt.
        mean_length: mean tokens of a prompt with its answer.
        gpu_kinds: the cluster's names for the GPUs of the job, such as "h100"; if none is known, the GPU of this machine counts.
        num_trained: how many of the `num_parameters` parameters are trained.
    """
    sizes = round_sizes_of_run(config, built.config, float(prompt_lengths.mean()), int(prompt_lengths.max(initial=0)))
    if sizes is None:
        return []
    card = _slowest_card(config, gpu_kinds)
    if card is None:
        return [
            "seconds of a round are not known for this processor: shardtune evaluate with the settings of the run measures them "
            "on its first prompts"
        ]
    ranks = config.launcher.per_node * config.launcher.nodes
    generator = _generator_sizes(config, built, num_parameters)
    planned = estimate_round_time(
        sizes,
        generator,
        config,
        card,
        num_ranks=ranks,
        num_hosts=config.launcher.nodes,
        step_s=_training_step_s(config, built, mean_length, card),
        resting_bytes=(generator.weight_bytes + num_trained * TRAINING_STATE_BYTES) / ranks,  # sharded over all ranks
    )
    return [f"{card.name}: {line}" for line in round_lines(sizes, planned)]


def _generator_sizes(config: RunConfig, built: BuiltModel, num_parameters: int) -> GeneratorSizes:
    """What of the model decides how long an answer takes to generate: its parameters, blocks, vocabulary, and bytes a weight."""
    _, num_blocks = width_and_num_blocks(built.base_on_meta)
    return GeneratorSizes(
        num_parameters=num_parameters,
        num_blocks=num_blocks,
        num_vocabulary_rows=int(getattr(text_model_config(built.config), "vocab_size", 0)),
        weight_itemsize=4 if config.precision is Precision.fp32 else 2,
    )


def _training_step_s(config: RunConfig, built: BuiltModel, mean_length: float, card: Card) -> float:
    """Estimate the seconds of a training step without a simulation: its FLOPs, at the share of the GPU's peak that runs reach.

    `mean_length`: mean tokens of a prompt with its answer.
    """
    ranks = config.launcher.per_node * config.launcher.nodes
    # `answer_share` is read for encoder-decoders only, which have no rounds.
    flops_per_token = model_flops_per_token(built, mean_length, answer_share=0.5)
    flops = flops_per_token * mean_length * config.batch["global"]
    return flops / (ranks * REACHED_PEAK_SHARE * card.tflops(config.precision) * 1e12)


def _slowest_card(config: RunConfig, gpu_kinds: Iterable[str]) -> Card | None:
    """The GPU to predict the time of a round for: of those that the job may get, the one with the slowest memory.

    Memory decides, since all weights are read for each token that is generated. `gpu_kinds`: the cluster's names, such as
    "h100"; if conf/hardware/ has none of them, the GPU of this machine counts. None if that is not there either, and for a run
    on the CPU.
    """
    if str(config.run.device) != "cuda":
        return None
    # The keys of the cards' YAML files in conf/hardware/, such as {"name": "NVIDIA H100 80GB HBM3", "memory_gb_s": 3350, ...}.
    figures_of_cards: list[dict[str, Any]] = []
    for kind in gpu_kinds:
        figures_of_cards += cards_of_gpu_kind(kind)
    if not figures_of_cards and torch.cuda.is_available():
        gpu_name = torch.cuda.get_device_name()
        figures_of_cards = [figures for figures in cards().values() if figures["name"] == gpu_name]
    gpu_cards = [Card(**figures) for figures in figures_of_cards]
    return min(gpu_cards, key=lambda card: card.memory_gb_s, default=None)
