"""The job that a plan is for: its ranks, and the lengths of its documents."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from launch.cluster.advice import memory_mib_of_setting
from trainer.build.parallel import check_parallel
from trainer.build.parts import prepare_data
from trainer.config.run import RunConfig
from trainer.model.loading import load_model_config, load_tokenizer
from trainer.objectives.registry import data_spec_of, max_generated_tokens
from trainer.planner.hardware import Card
from trainer.planner.lengths import DocumentLengths, sampled_lengths
from trainer.planner.plan import PlannedJob
from trainer.planner.round_time import round_load_of_run


def planned_run_of(config: RunConfig, card: Card) -> PlannedJob:
    """What a plan needs to know of a run: card, ranks, batch, and the lengths of its documents.

    With `data.path` or `data.sources`, the data is prepared and its lengths are measured, which may take an hour. Without, all
    documents are taken to be as long as `data.max_length` allows. Raises ConfigError if ranks cannot share the model's rows,
    although `parallel.sequence` asks for it.
    """
    check_parallel(config)
    data_spec = data_spec_of(config.objective)
    sequences_per_document = data_spec.sequences_per_document
    mean_prompt_tokens = float(config.data.max_length)
    longest_prompt = config.data.max_length
    if config.data.path or config.data.sources:
        data = prepare_data(config, load_tokenizer(config.model))
        lengths = sampled_lengths(config, data.train, sequences_per_document).lengths(
            config.data, sequences_per_document
        )
        # A prompt is learned with each of its answers, so that a micro-batch may hold the longest prompt several times.
        answers_per_prompt = int(getattr(config.objective, "group_size", 1))
        lengths = replace(lengths, longest=np.repeat(lengths.longest, answers_per_prompt))
        mean_prompt_tokens = float(data.train.lengths.mean())
        longest_prompt = int(data.train.lengths.max())
    else:
        # If the data has no answers, the model generates one behind each prompt.
        longest = data_spec.longest_sequence(config.data.max_length) + max_generated_tokens(config.objective)
        lengths = DocumentLengths.uniform(longest, sequences_per_document)
    return PlannedJob(
        card=card,
        precision=config.precision,
        num_nodes=config.launcher.nodes,
        ranks_per_node=config.launcher.per_node,
        global_batch=config.batch["global"],
        node_memory_gib=_node_memory_gib(config, card),
        document_lengths=lengths,
        round_load=round_load_of_run(config, load_model_config(config.model), mean_prompt_tokens, longest_prompt),
    )


def _node_memory_gib(config: RunConfig, card: Card) -> float | None:
    """Memory that a job has of a node: what it asks SLURM for, else what the card's hosts have; None if neither is known."""
    requested_mib = memory_mib_of_setting(getattr(config.launcher, "mem", None))
    return requested_mib / 1024 if requested_mib else card.node_memory_gib
