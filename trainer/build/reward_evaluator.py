"""Builds the evaluator of objectives whose batches are rounds: rewards of answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from strategies.base import Engine
from strategies.runtime import Runtime
from trainer.config.run import RunConfig
from trainer.data.batches.loader import EvalShare
from trainer.data.prepare import PreparedData
from trainer.data.store.documents import DocumentTable
from trainer.evaluation.base import Evaluator
from trainer.evaluation.generate import AnswerGenerator
from trainer.model.loading import load_generation_config
from trainer.objectives.rollouts import RoundsConfig
from trainer.rollout.evaluator import RewardEvaluator, evaluation_decoding
from trainer.rollout.prompts import has_sources, read_prompt
from trainer.rollout.types import RewardScorer
from trainer.step import BuiltModel


def build_reward_evaluators(
    config: RunConfig,
    data: PreparedData,
    built: BuiltModel,
    tokenizer: Any,
    engine: Engine,
    runtime: Runtime,
    scorer: RewardScorer,
    stop_now: Callable[[], bool],
) -> list[Evaluator]:
    """Build the evaluator that lets the model answer held-out prompts and measures their rewards; [] without such prompts.

    For reinforcement learning, whose loss on given answers says little. `scorer`: computes the rewards, as in training.
    `evaluation.generate.samples` is the number of prompts that are answered; if it is 0, `evaluation.max_documents` limits
    them. `stop_now`: asked while answers are generated; True if the run shall stop.
    """
    settings = config.objective
    assert isinstance(settings, RoundsConfig)
    held_out = data.evaluation
    if held_out is None or len(held_out) == 0:
        return []
    generate = config.evaluation.generate
    max_prompts = generate.samples or config.evaluation.max_documents
    share = EvalShare(config.evaluation.batch, engine.rank, engine.world_size, max_prompts, by_source=True)
    table = DocumentTable(data.directory)
    names_source = has_sources(held_out)  # with several sources, metrics are reported by source too
    prompts = []
    for number, sequence in enumerate(share.covered_sequences(held_out).tolist()):
        prompts.append(read_prompt(held_out, table, sequence, number, names_source=names_source))
    answer_generator = AnswerGenerator(
        tokenizer,
        load_generation_config(config.model, built.config, decoder_start=None),  # no encoder-decoder
        runtime,
        batch=config.evaluation.batch,
        stop_now=stop_now,
    )
    return [RewardEvaluator(prompts, answer_generator, scorer, evaluation_decoding(settings.rollout, generate))]
