"""A verification from a configuration to its verdict: the copies and documents once, then the steps on all ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from strategies.runtime import Runtime
from strategies.sequence import with_sequence_parallelism
from trainer.config.run import RunConfig
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.loading import load_model_config
from trainer.objectives.registry import data_spec_of, objective_family
from trainer.verification.documents import LABELS, write_documents
from trainer.verification.small_model import SmallModel, write_small_model
from trainer.verification.small_run import SmallRun, small_run_config
from trainer.verification.steps import compare_steps
from trainer.verification.verdict import verdict_on_steps

MODEL_DIR_NAME, TEACHER_DIR_NAME, DOCUMENTS_DIR_NAME = "model", "teacher", "documents"
"""Names in the directory of a verification."""
DOCUMENTS_PER_SAMPLE = 6
"""Drawn documents for each sample of the step: a pack holds about three."""


def label_names_of_documents(config: RunConfig) -> list[str] | None:
    """Label names for the random documents: those of the settings, or made-up ones; None for objectives without labels."""
    family = objective_family(config.objective)
    # A fixed number of outputs are scores (reward models, regression): there are no labels then.
    has_fixed_outputs = family.num_outputs is not None
    if family.kind is not ModelKind.classifier or has_fixed_outputs:
        return None
    settings: Any = config.objective
    if settings.labels:
        return list(settings.labels)
    if isinstance(settings.class_weights, list):
        return [f"label {number}" for number in range(len(settings.class_weights))]
    return list(LABELS)


def write_small_models_and_documents(
    config: RunConfig, directory: Path, *, user_ranks: int | None
) -> tuple[SmallModel, SmallRun]:
    """Prepare a verification in `directory`: write small copies of the model and its teacher, and random documents.

    No collective. Returns the copy of the model, and the run on these copies. `user_ranks`: ranks that the settings ask
    for, by which gradient accumulation is chosen; None if not known. Raises ConfigError if the model or its teacher is not on
    this machine, or no small copy can be made.
    """
    family = objective_family(config.objective)  # what kind of model the objective trains, and with how many outputs
    label_names = label_names_of_documents(config)
    num_outputs = family.num_outputs or (len(label_names) if label_names else None)
    model = write_small_model(config.model, family.kind, directory / MODEL_DIR_NAME, num_outputs=num_outputs)
    teacher = family.teacher(config.objective)
    if teacher is not None:
        teacher_model = ModelConfig(
            path=teacher.path,
            revision=teacher.revision,
            trust_remote_code=teacher.trust_remote_code,
            download=config.model.download,
        )
        # With another seed than the student: from a teacher with equal weights, it would get no gradient.
        write_small_model(teacher_model, ModelKind.causal, directory / TEACHER_DIR_NAME, num_outputs=None, seed=1)
    small_run = small_run_of_directory(directory, config, user_ranks=user_ranks)
    write_documents(
        directory / DOCUMENTS_DIR_NAME,
        data_spec_of(config.objective),
        DOCUMENTS_PER_SAMPLE * small_run.config.batch["global"],
        vocabulary_size=load_model_config(small_run.config.model).get_text_config().vocab_size,
        num_labels=len(label_names or LABELS),
        multi_label=family.multi_label(config.objective),
        must_learn=_every_document_needs_target(config),
    )
    return model, small_run


def _every_document_needs_target(config: RunConfig) -> bool:
    """Whether every random document must have something to learn: pairs, ratings, labels, an encoder-decoder's answers."""
    family = objective_family(config.objective)
    data_spec = data_spec_of(config.objective)
    # Marks are numbers for the objective beside a document, such as its label or rating.
    return family.kind is not ModelKind.causal or bool(data_spec.marks) or data_spec.sequences_per_document > 1


def small_run_of_directory(directory: Path, config: RunConfig, *, user_ranks: int | None) -> SmallRun:
    """The run on the small copies and documents that were written into `directory`, made from the user's `config`."""
    has_teacher = objective_family(config.objective).teacher(config.objective) is not None
    teacher_directory = directory / TEACHER_DIR_NAME if has_teacher else None
    return small_run_config(copy.deepcopy(config), directory / MODEL_DIR_NAME, teacher_directory, user_ranks=user_ranks)


def verify_step_against_single_process(
    config: RunConfig,
    directory: Path,
    runtime: Runtime,
    *,
    user_ranks: int | None,
    report_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Compare a training step of the run on all ranks with the same step by one process, on a small copy of its model.

    Returns the verdict as JSON values; {} on all ranks but 0. All ranks must call, after `write_small_models_and_documents` on
    one of them. `user_ranks`: ranks that the settings ask for; None if not known. `report_progress`: gets texts such as "one
    process, fp32". Raises the errors of building the run, and of its engines.
    """
    small_run = small_run_of_directory(directory, config, user_ranks=user_ranks)
    runtime = with_sequence_parallelism(runtime, small_run.config.parallel.sequence)
    documents = directory / DOCUMENTS_DIR_NAME
    label_names = label_names_of_documents(config)
    compared = compare_steps(small_run, documents, label_names, directory, runtime, report_progress)
    if not runtime.is_main:
        return {}
    return verdict_on_steps(compared).as_json_values()
