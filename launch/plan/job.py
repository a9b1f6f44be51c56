"""The job that a plan is for: its GPU, ranks and batch, and the lengths of its documents."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from launch.cluster.advice import memory_mib_of_setting
from trainer.build.parallel import check_parallel
from trainer.build.parts import prepare_data
from trainer.config.run import RunConfig
from trainer.model.loading import load_model_config, load_tokenizer
from trainer.objectives.registry import data_spec_of, max_generated_tokens
from trainer.planner.hardware import Card
from trainer.planner.lengths import DocumentLengths, lengths_of_data
from trainer.planner.plan import PlannedJob
from trainer.planner.round_time import round_sizes_of_run


class _PlannedLengths(NamedTuple):
    """Lengths in tokens that a plan assumes."""

    samples: DocumentLengths
    """Of samples, each with an answer of the greatest length if the model generates answers."""
    mean_prompt: float
    """Mean tokens of a document without a generated answer; its prompt, if the model generates answers."""
    longest_prompt: int


def prepare_planned_job(config: RunConfig, card: Card) -> PlannedJob:
    """Gather what a plan needs to know of the run that all its options have in common: GPU, ranks, batch, document lengths.

    With `data.path` or `data.sources`, the data is prepared and its lengths are measured, which may take an hour. Without, all
    documents are taken to be as long as `data.max_length` allows. Raises ConfigError if ranks cannot share the model's rows,
    although `parallel.sequence` asks for it.
    """
    check_parallel(config)
    has_data = config.data.path or config.data.sources
    lengths = _measured_lengths(config) if has_data else _longest_allowed_lengths(config)
    return PlannedJob(
        card=card,
        precision=config.precision,
        num_nodes=config.launcher.nodes,
        ranks_per_node=config.launcher.per_node,
        global_batch=config.batch["global"],
        node_memory_gib=_node_memory_gib(config, card),
        document_lengths=lengths.samples,
        round_sizes=round_sizes_of_run(
            config, load_model_config(config.model), lengths.mean_prompt, lengths.longest_prompt
        ),
    )


def _measured_lengths(config: RunConfig) -> _PlannedLengths:
    """Measure the lengths of the run's documents; the data is prepared for that, and the run finds it in the cache later."""
    data = prepare_data(config, load_tokenizer(config.model))
    lengths = lengths_of_data(config, data.train)
    # A prompt is learned with each of its answers, so that a micro-batch may hold the longest prompt several times.
    answers_per_prompt = int(getattr(config.objective, "group_size", 1))
    return _PlannedLengths(
        samples=replace(lengths, longest=np.repeat(lengths.longest, answers_per_prompt)),
        mean_prompt=float(data.train.lengths.mean()),
        longest_prompt=int(data.train.lengths.max()),
    )


def _longest_allowed_lengths(config: RunConfig) -> _PlannedLengths:
    """The lengths to plan with if no data is given: all documents are as long as `data.max_length` allows, the worst case.

    An answer that the model generates comes on top, as long as the objective allows.
    """
    data_spec = data_spec_of(config.objective)
    # If the data has no answers, the model generates one behind each prompt.
    longest = data_spec.longest_sequence(config.data.max_length) + max_generated_tokens(config.objective)
    return _PlannedLengths(
        samples=DocumentLengths.uniform(longest, data_spec.sequences_per_document),
        mean_prompt=float(config.data.max_length),
        longest_prompt=config.data.max_length,
    )


def _node_memory_gib(config: RunConfig, card: Card) -> float | None:
    """Memory that a job has of a node: what it asks SLURM for, else what the card's hosts have; None if neither is known."""
    requested_mib = memory_mib_of_setting(getattr(config.launcher, "mem", None))
    return requested_mib / 1024 if requested_mib else card.node_memory_gib
