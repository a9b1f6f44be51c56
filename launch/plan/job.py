"""The job that a plan is for: its ranks, and the lengths of its documents."""

from __future__ import annotations

from trainer.build.parts import prepare_data
from trainer.config.run import RunConfig
from trainer.model.loading import load_tokenizer
from trainer.objectives.registry import data_spec_of
from trainer.planner.hardware import Card
from trainer.planner.lengths import DocumentLengths, sampled_lengths
from trainer.planner.plan import PlannedRun


def job_of(config: RunConfig, card: Card) -> PlannedRun:
    """The ranks, and how long what they are given is. Prepares data where data.path says some."""
    per = data_spec_of(config.objective).sequences_per_document
    given = config.data.path or config.data.sources
    return PlannedRun(
        card=card,
        precision=config.precision,
        nodes=config.launcher.nodes,
        ranks_per_node=config.launcher.per_node,
        global_batch=config.batch["global"],
        lengths=_measured(config, per) if given else DocumentLengths.uniform(config.data.max_length, per),
    )


def _measured(config: RunConfig, per: int) -> DocumentLengths:
    data = prepare_data(config, load_tokenizer(config.model))
    return sampled_lengths(config, data.train, per).lengths(config.data, per)
