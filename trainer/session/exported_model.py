"""Describes the model of a run for an export: on the meta device, with the checkpoints that its values come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from strategies.base import Precision
from strategies.parameters import COMPUTE_DTYPE
from strategies.saved_parameters import MeanOfCheckpoints, SavedParameters
from trainer.build.parts import build_model
from trainer.checkpoints.manifest import manifest_sha256
from trainer.config.run import RunConfig
from trainer.data.prepare import PreparedData
from trainer.export.trained_model import TrainedModel, trained_shapes
from trainer.model.config import ModelConfig
from trainer.model.loading import find_weights_directory
from trainer.optim.config import OptimName
from trainer.session.base_files import base_file_digests


def describe_trained_model(
    config: RunConfig,
    tokenizer: Any,
    data: PreparedData,
    checkpoints: list[Path],
    precision: Precision,
    *,
    on_gpu: bool = False,
    total_steps: int,
    staged_model: ModelConfig | None = None,
) -> TrainedModel:
    """Describe the model that a run trained, for an export: on meta, with the checkpoint, or the mean of several, as its values.

    `checkpoints`: one, or several that are averaged, the oldest first.
    `precision`: what the run computed in; `on_gpu`: whether on GPUs.
    `total_steps`: of the run's budget.
    `staged_model`: names the copy of the base on this host, from which weights are read, if there is one. The export still names
    the base of `config`.

    Reads headers and indexes alone. No collective. Errors: those of building the model, StorageError, ConfigError.
    """
    half_on_gpu = on_gpu and precision is not Precision.fp32
    local_config = config if staged_model is None else replace(config, model=staged_model)
    built, source = build_model(local_config, tokenizer, data, half_on_gpu=half_on_gpu)
    built.set_total_steps(total_steps)  # AdaLoRA's phases follow from it, and the files of its adapter state them
    # A schedule-free optimizer trains other weights than are to be used, which its beta and its state give.
    schedule_free_beta = None
    if config.optim.name is OptimName.schedule_free:
        schedule_free_beta = float(config.optim.betas[0])  # type: ignore[attr-defined]
    shapes = trained_shapes(built)
    saved = [SavedParameters(path, shapes, schedule_free_beta=schedule_free_beta) for path in checkpoints]
    return TrainedModel(
        built=built,
        source=source,
        trained=saved[0] if len(saved) == 1 else MeanOfCheckpoints(saved),
        tokenizer=tokenizer,
        base_directory=find_weights_directory(local_config.model),
        base_path=str(find_weights_directory(config.model)),
        seed=config.run.seed,
        frozen_dtype=COMPUTE_DTYPE[precision],
        # What the export is made of; its files record it. A teacher leaves nothing in them.
        origin={
            "checkpoints": [manifest_sha256(path) for path in checkpoints],
            "base": base_file_digests(config, with_teacher=False),
            "merge": bool(config.export.merge),
        },
    )
